"""What the host does for a layer and step beside the kernels: launches, tensor operations and
Python calls have upper limits, and nothing waits for the device.

Kernels are not run where calls are counted: the host does not look at what they give.
"""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
import torch
from fake_cuda import GPU, Operations
from interpreter import DEVICE, interpreter
from repository import LIB, ROOT
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import hip_hf
from hip_hf import DecodeState, hip_attention
from hip_hf.backends.triton import ops
from hip_hf.cache import pages as paged_keys
from hip_hf.cache.pages import BlockTable
from hip_hf.config import HiPConfig
from hip_hf.integration import attention_function, continuous_batching, masks
from hip_hf.integration import patched_forward as forward
from hip_hf.integration.hip_cache import HiPCache
from hip_hf.integration.in_graph import table_of
from hip_hf.problem import AttentionProblem

device_guards, launches = fake_cuda.device_guards, fake_cuda.launches  # fixtures

pytestmark = pytest.mark.skipif(
    DEVICE != "cpu", reason="on a GPU the same calls run with numbers in them"
)

PROMPT = 400
# Every call is sparse, by kernels; every second step selects anew.
FIELDS = dict(
    backend="triton",
    dense_below=0,
    dense_layers=0,
    budget=64,
    sink=16,
    window=32,
    dense_tail=16,
    decode_refresh=2,
)

# Kept steps attend in parts and combine them. The others first extend the pyramid, weigh the votes,
# search and choose.
KEPT_LAUNCHES, SELECTING_LAUNCHES = 2, 6
# A prompt's pyramid and its votes take two each; then selection, attention, and the dense tail with
# its combination.
PROMPT_LAUNCHES = 8
# Of a kept step, views included: keys and values transposed and written (4), the windows' starts,
# the output made and transposed twice.
KEPT_OPERATIONS = 8
# A selecting one makes room for votes besides.
SELECTING_OPERATIONS = 9
# A kept step makes its output and nothing else. (Transformers' static cache makes a position of its
# own.)
KEPT_ALLOCATIONS = 1
# A prompt sets up states, pyramid, votes and selection for all of its rows; a sequence more adds
# its part of the pages.
PROMPT_OPERATIONS, OPERATIONS_A_SEQUENCE = 45, 15
# Measured on Python 3.11, and a twentieth more: versions differ in what they call. Attention of
# PyTorch's own, with its cache, takes some 30. A sequence more may add this much.
KEPT_CALLS, SELECTING_CALLS, CALLS_A_SEQUENCE = 460, 700, 95


@dataclass
class Counted:
    """Of a layer and step."""

    launches: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    calls: int = 0

    @property
    def allocations(self) -> int:
        """Tensors that were made, views not counted."""
        made = ("empty", "zeros", "ones", "full", "arange", "clone", "copy", "cat", "stack")
        return sum(
            count
            for name, count in self.operations.items()
            if name.split(".")[1].removeprefix("new_").startswith(made)
        )


@contextmanager
def counting(counted: Counted, calls: bool) -> Iterator[None]:
    """Counts Python calls or else operations: a mode that sees each operation makes calls of its
    own."""

    def called(frame: Any, event: str, argument: Any) -> None:
        counted.calls += event in ("call", "c_call")

    if not calls:
        with Operations(counted.operations):
            yield
        return
    sys.setprofile(called)
    try:
        yield
    finally:
        sys.setprofile(None)


class Meter:
    """Counts what one layer of a model does in its cache and in attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, layer: Any) -> None:
        self.now, self.by_calls, self.in_layer, self.inside = Counted(), False, False, False
        monkeypatch.setattr(
            interpreter.InterpretedFunction, "run", lambda kernel, *args, **kwargs: self._launched()
        )
        for owner, name in (
            (HiPCache, "update"),
            (StaticCache, "update"),
            (attention_function, "attend_layer"),
            (forward, "next_token"),
        ):
            monkeypatch.setattr(owner, name, self._around(getattr(owner, name)))
        layer.register_forward_pre_hook(lambda *_: setattr(self, "in_layer", True))
        layer.register_forward_hook(lambda *_: setattr(self, "in_layer", False))

    def _launched(self) -> None:
        self.now.launches += self.inside

    def _around(self, work: Any) -> Any:
        def done(*args: Any, **kwargs: Any) -> Any:
            if self.inside or not self.in_layer:
                return work(*args, **kwargs)
            self.inside = True
            try:
                with counting(self.now, self.by_calls):
                    return work(*args, **kwargs)
            finally:
                self.inside = False

        return done

    def of(self, step: Any, calls: bool = False) -> Counted:
        """What a forward of the model adds."""
        self.now, self.by_calls = Counted(), calls
        with torch.no_grad():
            step()
        return self.now


def llama(**fields: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config.hip = {**FIELDS, **fields}
    config._attn_implementation = "hip"
    return LlamaForCausalLM(config).eval()


KINDS = ("plain", "patched", "static")


def metered(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Meter, Any]:
    """A layer's meter, and what makes a step of its model with `batch` rows."""
    model = llama()
    if kind == "patched":
        hip_hf.patch(model)
    cache = (
        StaticCache(config=model.config, max_cache_len=PROMPT + 100)
        if kind == "static"
        else HiPCache(model.config)
    )

    def step(rows: int = 1) -> Any:
        return lambda: model(torch.zeros(batch, rows, dtype=torch.long), past_key_values=cache)

    return Meter(monkeypatch, model.model.layers[1].self_attn), step


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_and_step(kind: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    meter, step = metered(kind, batch, monkeypatch)
    prompt = meter.of(step(PROMPT))
    assert prompt.launches == PROMPT_LAUNCHES
    assert prompt.operations.total() <= PROMPT_OPERATIONS + (batch - 1) * OPERATIONS_A_SEQUENCE, (
        prompt.operations
    )
    first = meter.of(step())
    assert first.launches == SELECTING_LAUNCHES
    # these are the same whatever the batch, but for the first step after a prompt, which makes the
    # block table
    of_cache = sum(
        meter.of(step()).operations[name]
        for name in ("aten.arange.default", "aten.add.Tensor", "aten.add_.Tensor")
    )
    selecting, kept = meter.of(step()), meter.of(step())
    assert (selecting.launches, kept.launches) == (SELECTING_LAUNCHES, KEPT_LAUNCHES)
    assert selecting.operations.total() - of_cache <= SELECTING_OPERATIONS, selecting.operations
    assert kept.operations.total() - of_cache <= KEPT_OPERATIONS, kept.operations
    assert of_cache == (3 if kind == "static" else 0)  # Transformers' own
    assert kept.allocations == KEPT_ALLOCATIONS + (kind == "static"), kept.operations


def calls_of_steps(batch: int) -> list[int]:
    """Python calls of a selecting and of a kept step, for each of `KINDS`."""
    found = []
    for kind in KINDS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            meter, step = metered(kind, batch, monkeypatch)
            for rows in (PROMPT, 1, 1):
                meter.of(step(rows))
            found += [meter.of(step(), calls=True).calls for _ in range(2)]
    return found


@pytest.mark.parametrize("batch", [1, 3])
def test_python_calls(batch: int) -> None:
    """In a process of its own: a device or tracer that another test leaves behind makes calls as
    well."""
    script = f"import test_host_overhead; print(*test_host_overhead.calls_of_steps({batch}))"
    path = os.pathsep.join(map(str, (ROOT, LIB, Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    more = (batch - 1) * CALLS_A_SEQUENCE
    limits = [SELECTING_CALLS + more, KEPT_CALLS + more] * len(KINDS)
    found = [int(number) for number in done.stdout.split()]
    assert len(found) == len(limits)
    assert all(0 < calls <= limit for calls, limit in zip(found, limits, strict=True)), found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(
    kind: str,
    padded: bool,
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither a prompt, nor a step that selects, nor one that does not. What a padding mask says is
    read once a forward: a few numbers a sequence, and so is how far a static cache is filled.
    (`generate` of Transformers waits once a step as well, to see whether all sequences have
    ended.)"""
    starts, read, slots = [0, 37 * padded], [], PROMPT + 100

    def extents(mask: torch.Tensor) -> list[list[int]]:
        """In place of `_extents`, which has no numbers to read here."""
        read.append(mask.shape[-1])
        return [[keys - start, start, keys, start - (keys - 1), 0] for start in starts]

    monkeypatch.setattr(masks, "_extents", extents)
    with torch.device(GPU), torch.no_grad():
        model = llama()
        cache = StaticCache(config=model.config, max_cache_len=slots) if kind == "static" else None
        if kind == "patched":
            hip_hf.patch(model)
        for keys, rows, launched in (
            (PROMPT, PROMPT, PROMPT_LAUNCHES),
            (PROMPT + 1, 1, SELECTING_LAUNCHES),
            (PROMPT + 2, 1, KEPT_LAUNCHES),
            (PROMPT + 3, 1, SELECTING_LAUNCHES),
        ):
            launches.clear()
            read.clear()
            given = (
                {"attention_mask": torch.ones(len(starts), keys, dtype=torch.long)}
                if padded
                else {}
            )
            out = model(
                torch.zeros(len(starts), rows, dtype=torch.long), past_key_values=cache, **given
            )
            cache = out.past_key_values
            assert out.logits.device == GPU
            assert len(launches) == 2 * launched
            asked = padded or (kind == "static" and rows == 1)
            assert read == [slots if kind == "static" else keys] * asked


def test_a_step_for_a_cuda_graph_waits_for_nothing(launches: list[str]) -> None:
    """Not for its mask either. It launches what a step that selects does."""
    config, state, batch = HiPConfig(**FIELDS), DecodeState(), 2
    with torch.device(GPU), torch.no_grad():
        q, k, v = (
            torch.randn(batch, heads, PROMPT, 32, dtype=torch.bfloat16) for heads in (4, 2, 2)
        )
        hip_attention(q, k, v, config=config, state=state)
        launches.clear()
        mask = torch.ones(batch, PROMPT, dtype=torch.long)
        table, _ = table_of(
            masks.hip_mask(
                batch, 1, PROMPT, PROMPT - 1, 0, masks.causal_mask_function, mask, device=GPU
            )
        )
        run = ops.decode_step._init_fn  # a fake tensor would not get beyond the operator
        out = run(
            q[:, :, -1:], k, v, None, table, *state.device.tensors(), config.text, 0.125, None, None
        )
    assert out.shape == (batch, 1, 4, 32)
    assert len(launches) == SELECTING_LAUNCHES


def test_continuous_batching_waits_three_times_a_forward(
    launches: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the bounds of two requests, their pages, and the marks of both layers: of whole prompts,
    and of tokens after them."""
    page, told = 64, []
    pages = [[2 * i + request for i in range(PROMPT // page + 1)] for request in range(2)]

    def step(before: int, new: int, *numbers: list[int]) -> list[int]:
        """A forward over these lengths; how many numbers it asked for, fetch by fetch, in place of
        which it gets `numbers`."""
        left = iter(numbers)
        told.clear()

        def fetch(parts: list[torch.Tensor]) -> list[list[int]]:
            found = next(left, [])
            assert sum(map(len, parts)) == len(found)
            told.append(len(found))
            numbers = iter(found)
            return [list(itertools.islice(numbers, len(part))) for part in parts]

        monkeypatch.setattr(continuous_batching, "_fetch", fetch)
        indices = {
            name: [torch.zeros(2 * n, dtype=torch.long)]
            for name, n in (("read_index", before + new), ("write_index", new))
        }
        bounds = torch.zeros(3, dtype=torch.int32)
        given = {**indices, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        for layer in range(2):
            q, k, v = (
                torch.randn(1, heads, 2 * new, 32, dtype=torch.bfloat16) for heads in (4, 2, 2)
            )
            problem = AttentionProblem(q, k, v, (), 0.125, None, None, None)
            assert (
                continuous_batching.continuous(
                    problem, HiPConfig(**FIELDS), layer, cache, given
                ).path
                == "sparse"
            )
        return list(told)

    with torch.device(GPU), torch.no_grad():
        stored = {
            layer: tuple(torch.zeros(20 * page, 2, 32, dtype=torch.bfloat16) for _ in range(2))
            for layer in range(2)
        }
        allocator = SimpleNamespace(
            layer_type="full_attention", index=0, tokens_per_page=page, _kv_token_views=stored
        )
        cache = SimpleNamespace(layer_to_allocator=dict.fromkeys(stored, allocator))
        firsts = [number * page for request in pages for number in request]
        prompts = [0, PROMPT, 2 * PROMPT]
        assert step(0, PROMPT, [*prompts, *prompts], firsts) == [6, len(firsts), 0]
        for keys in (PROMPT + 1, PROMPT + 2):
            assert step(keys - 1, 1, [0, 1, 2, 0, keys, 2 * keys], firsts, [1] * 4) == [
                6,
                len(firsts),
                4,
            ]
    assert launches


def test_what_a_padding_mask_says_is_read_once() -> None:
    """The numbers that the test above stands in for, and the wait."""
    padding = torch.ones(3, 9, dtype=torch.long)
    padding[0, :4], padding[1] = 0, 0
    mask = masks.hip_mask(3, 2, 9, 7, 0, masks.causal_mask_function, padding)
    counted: Counter[str] = Counter()
    with Operations(counted):
        assert masks._extents(mask) == [
            [5, 4, 9, -4, 0],
            [0, 8, 1, masks.PAD - masks.LAST, masks.PAD - masks.LAST],
            [9, 0, 9, -8, 0],
        ]
    assert counted["aten._local_scalar_dense.default"] == 0
    assert counted["aten._to_copy.default"] == 1  # of slots, to another dtype


def test_a_pickled_cache_writes_where_it_reads() -> None:
    """Views of pages are kept from step to step, and would come back as copies."""
    cache, new = HiPCache(llama().config), torch.randn(1, 2, 1, 32)
    cache.update(torch.randn(1, 2, 5, 32), torch.randn(1, 2, 5, 32), 0)
    cache.update(torch.randn(1, 2, 1, 32), torch.randn(1, 2, 1, 32), 0)
    for other in (pickle.loads(pickle.dumps(cache)), copy.deepcopy(cache)):
        other.update(new, new, 0)
        assert torch.equal(other.layers[0].keys[:, :, -1:], new)
        assert torch.equal(other.layers[0].pool.keys.pages()[0, 6], new[0, :, 0])
        assert cache.get_seq_length() == 6


def test_a_pickle_of_another_process_knows_no_stacked_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There tables are counted from the beginning, and another one may have the number that stands
    in it."""
    first, second = BlockTable([3, 4]), BlockTable([5])
    BlockTable.stacked([first, second], torch.device("cpu"))
    kept = pickle.dumps(first)
    monkeypatch.setattr(paged_keys, "_versions", itertools.count(second.version))
    other, new = pickle.loads(kept), BlockTable([9])
    new.version = second.version
    assert BlockTable.stacked([other, new], torch.device("cpu")).tolist() == [[3, 4], [9, 0]]
