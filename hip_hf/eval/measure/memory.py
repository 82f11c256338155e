"""What each kind of cache takes at which lengths, and the meter of memory that others use, too.

Each figure of a cache comes from a process of its own: it fills the cache of a model with random
keys, a chunk at a time as chunked prefill does, decodes a few tokens, and reads its own memory from
the operating system.
"""

from __future__ import annotations

import copy
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch

from hip_hf.versions import CACHE

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
CACHE_KINDS = ("dynamic", "static", "hip", "hip offloaded")
CHUNK, STEPS = 2048, 16
# What is built of a model has no more than `SMALL` of these.
_FEED_FORWARD = ("intermediate_size", "n_inner", "ffn_hidden_size", "moe_intermediate_size")
NOT_IN_A_CACHE = ("vocab_size", *_FEED_FORWARD)
SMALL = 64


def memory_mib(field: str) -> float | None:
    """Memory of this process now (`VmRSS`) or at its peak (`VmHWM`); None where the system does not
    say.

    Not `ru_maxrss` on Linux: a child inherits its parent's there.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024
    if field != "VmHWM" or sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB


def summaries_bytes(cache: Any) -> int:
    """What the summaries of a `HiPCache` take."""
    rows = [row for layer in cache.paged for row in layer.hip_state.rows.values()]
    return sum(row.pyramid.nbytes for row in rows if row.pyramid)


def cache_mib(cache: Any) -> float:
    """What a `HiPCache` holds: pages in use, and the summaries beside them."""
    pools = [layer.pool for layer in cache.paged if layer.pool is not None]
    return (sum(pool.bytes(pool.used) for pool in pools) + summaries_bytes(cache)) / MIB


class MemoryMeter:
    """What a piece of work takes on top of what was there, in MiB: on the host, and on a GPU if it
    works there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if _CLEAR.exists():  # Linux, which can forget the peak so far
            _CLEAR.write_text("5")
        self.before = memory_mib("VmRSS")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.device_before = torch.cuda.memory_allocated(device)

    def peak_mib(self) -> float | None:
        """The host's peak on top of `before`; None where the system does not say."""
        peak = memory_mib("VmHWM")
        return None if peak is None or self.before is None else peak - self.before

    def device_peak_mib(self) -> float | None:
        """The GPU's; None without one."""
        if self.device.type != "cuda":
            return None
        return (torch.cuda.max_memory_allocated(self.device) - self.device_before) / MIB


def _make_cache(kind: str, config: Any, length: int) -> Any:
    from transformers import DynamicCache, StaticCache

    from hip_hf import HiPCache
    from hip_hf.cache.pool import PAGE
    from hip_hf.integration.settings import read_settings

    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "static":
        return StaticCache(config=config, max_cache_len=length + STEPS)
    if kind == "hip":
        return HiPCache(config)
    settings = read_settings(config)
    # blocks that a step selects, at worst each in a page of its own
    step = settings.selected_keys // settings.block_k
    return HiPCache(config, offload="cpu", device_pages=max(step, length // PAGE // 8))


def _device_bytes(cache: Any, resident: int) -> int:
    """What has to be on the device: everything, or the pools of an offloaded cache and the
    summaries."""
    if getattr(cache, "offload_to", None) is None:
        return resident
    pools = [store.pool for layer in cache.paged for store in (layer.pool.keys, layer.pool.values)]
    return sum(pool.rows.nbytes for pool in pools) + summaries_bytes(cache)


def read_config(model: str) -> Any:
    """The config of a checkpoint's language part, without what has no share in its cache:
    feed-forward layers and vocabulary. Raises OSError or ValueError if there is no such checkpoint,
    or none with a decoder that Transformers can build."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    for name in NOT_IN_A_CACHE:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, SMALL)
    config.pad_token_id = None  # it may lie outside the small vocabulary
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    return config


def shapes_of(net: Any) -> list[tuple[torch.Size, torch.Size]]:
    """Keys and values `[1, Hkv, 1, D]` that each layer gives its cache for one token: families name
    their sizes differently. Raises ValueError if not every layer keeps keys and values."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    net(torch.tensor([[5]]), **{CACHE: cache})
    held = [
        layer
        for layer in cache.layers
        if all(getattr(layer, name, None) is not None for name in ("keys", "values"))
    ]
    if len(held) != net.config.num_hidden_layers:
        allowed = "models whose layers all keep keys and values"
        raise ValueError(f"got {net.config.model_type!r}, allowed: {allowed}")
    return [(layer.keys.shape, layer.values.shape) for layer in held]


def cache_row(kind: str, config: Any, length: int) -> dict[str, Any]:
    """One row of the table, measured in the calling process. `config`: as `read_config` gives
    it."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.max_position_embeddings = max(config.max_position_embeddings, length + STEPS)
    net = AutoModelForCausalLM.from_config(config).eval()
    if kind.startswith("hip"):
        net.set_attn_implementation("hip")
    config = net.config

    def random(shape: torch.Size, tokens: int) -> torch.Tensor:
        return torch.randn(1, shape[1], tokens, shape[3], dtype=net.dtype)

    with torch.inference_mode():
        shapes = shapes_of(net)
        # whatever is allocated once
        net(torch.tensor([[5]]), **{CACHE: _make_cache(kind, config, CHUNK)})
        meter = MemoryMeter(torch.device("cpu"))
        cache = _make_cache(kind, config, length)
        for first in range(0, length, CHUNK):
            tokens = min(CHUNK, length - first)
            for layer, (keys, values) in enumerate(shapes):
                cache.update(random(keys, tokens), random(values, tokens), layer)
        for _ in range(STEPS):
            net(torch.tensor([[5]]), **{CACHE: cache})
    now, peak = memory_mib("VmRSS"), meter.peak_mib()
    assert now is not None
    assert meter.before is not None
    resident = int((now - meter.before) * MIB)
    return {
        "cache": kind,
        "length": length,
        "bytes_per_token": resident / length,
        "resident_MiB": resident / MIB,
        "peak_MiB": peak,
        "device_MiB": _device_bytes(cache, resident) / MIB,
    }


def row_in_own_process(kind: str, config: Any, length: int) -> dict[str, Any]:
    """`cache_row` in a process that has done nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(cache_row, (kind, config, length))
