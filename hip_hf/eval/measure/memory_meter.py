"""Memory of this process and of a cache, as the commands print it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_mib(field: str) -> float | None:
    """Memory of this process now (`VmRSS`) or at its peak (`VmHWM`); None where the system does not say.

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
    pyramids = [row.pyramid for layer in cache.paged for row in layer.hip_state.rows.values() if row.pyramid]
    return sum(pyramid.nbytes for pyramid in pyramids)


def cache_mib(cache: Any) -> float:
    """What a `HiPCache` holds: pages in use, and the summaries beside them."""
    pages = sum(layer.pool.bytes(layer.pool.used) for layer in cache.paged if layer.pool is not None)
    return (pages + summaries_bytes(cache)) / MIB


class Meter:
    """What a piece of work takes on top of what was there, in MiB: on the host, and on a GPU if it works there."""

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
