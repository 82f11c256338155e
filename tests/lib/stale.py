"""What a launch must not expect in the memory that it is given, though an earlier one has left it
there: spoilt before it."""

from __future__ import annotations

from typing import Any

import torch
from poison import FAR, spoil


def spoil_stale(kernel: str, arguments: dict[str, Any]) -> None:
    """Spoil scratch, selections that a launch of `kernel` makes anew, and summaries of chunks that
    are not built."""
    for name in scratch_of(arguments):
        spoil(arguments[name])
    if kernel == "choose_kernel" or (
        kernel == "select_kernel" and arguments["LOOKS"] == 1 and not arguments["first_program"]
    ):
        spoil_selections(arguments)
    if kernel == "tiles_kernel" or (kernel == "append_kernel" and arguments["BUILD"]):
        spoil_unbuilt(arguments)


def scratch_of(arguments: dict[str, Any]) -> tuple[str, ...]:
    """Scores of long start levels, what programs that share a search leave, and decode's partial
    results."""
    if arguments.get("START_LEVEL_IN_MEMORY"):
        return ("scratch",)
    if "scratch" in arguments and arguments["LOOKS"] > 1:
        return ("scratch", "listed")
    return ("OUT", "LSE") if "Q" in arguments and arguments.get("SPLITS", 1) > 1 else ()


def spoil_selections(x: dict[str, Any]) -> None:
    """All of a prompt; in decode those that do not serve any more."""
    anew = torch.ones_like(x["counts"], dtype=torch.bool)
    if x.get("STATEFUL", True):
        rows, position = x["sequences"][3, :, None, None], x["sequences"][4, :, None, None]
        age = position - x["made"]
        anew = ~((rows == 1) & (age >= 0) & (age < x["refresh"]))
    for name in ("indices", "counts", "windows"):
        x[name][anew] = FAR


def spoil_unbuilt(x: dict[str, Any]) -> None:
    """In the table and among the states of tiles' roots: chunk `i` of level `l` is row
    `((2 * i + 1) << l) - 1`."""
    for name, level in (("table", 0), ("states", x["LEVELS"])):
        row = torch.arange(x[name].shape[2]) + 1
        end = (row + (row & -row)) // 2 << level  # in blocks
        for sequence, built in enumerate(x["built"].amax(1)):
            x[name][sequence, :, end > built] = torch.nan
