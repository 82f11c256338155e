"""Settings by name on the command line, and how the measuring commands publish their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from hip_hf.config import HiPConfig
from hip_hf.eval import report
from hip_hf.eval.documents import CHECKPOINT
from hip_hf.methods import METHODS

# What `--settings` may name; anything else is read as a JSON dict of `HiPConfig` fields.
PRESETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "paper": {"representative": "middle", "score": "max", "query_stride": 4, "vote": "sampled", "beam": 1, "rescore": 1},
    "staged": {"method": "staged"},
    "quest": {"method": "quest"},
    "vertical_slash": {"method": "vertical_slash"},
    "sample": {"method": "sample"},
    "h2o": {"method": "h2o"},
    "streaming": {"method": "streaming", "options": {"recent": True}},
    "hyper": {"method": "hyper"},  # sized to read about as many keys as the others
    "oracle": {"method": "oracle"},
    "delta": {"delta": 64},
    "streaming+delta": {"method": "streaming", "options": {"recent": True}, "delta": 64},
    "dense": {"method": "dense"},
}
# What results call the checkpoint that comes with the package.
DEMO = "the demo checkpoint"
# Measure the method itself: every layer and row sparse, unless a row says otherwise.
SPARSE = {"dense_layers": 0, "dense_tail": 0, "dense_below": 0}
HELP = f"{' | '.join(PRESETS)} | all, or a JSON dict of HiPConfig fields; repeat for several rows."


def every() -> list[str]:
    """All presets as rows of a comparison, and methods that were added to ours."""
    added = METHODS.keys() - {fields.get("method", "hip") for fields in PRESETS.values()}
    return [name for name in PRESETS if name != "dense"] + sorted(added)


def as_many_keys(config: HiPConfig, tokens: int) -> dict[str, int]:
    """Options of `hyper` with which a row of a text of `tokens` reads about as many keys, on average, as `config` says.

    A row meets half a leaf, and in half of the levels an own block and a sample, which are made alike.
    """
    keys = config.sink + config.budget + config.window + config.block_q // 2
    leaf, levels = tokens, 0
    while leaf > keys:
        leaf, levels = -(-leaf // 2), levels + 1
    each = max(1, (keys - leaf // 2) // max(levels, 1))
    return {"min_seq_len": leaf, "block_size": each, "sample_size": each}


def settings_of(names: Sequence[str], tokens: int | None = None, **common: Any) -> dict[str, HiPConfig]:
    """Settings by the name they were given; fields in `common` (None: not given) hold for all that do not set them.

    `tokens`: length of the texts, by which the preset `hyper` is sized.

    Raises:
        ValueError: neither a preset nor a JSON dict, or a field is unknown or out of range.
    """
    shared = {name: value for name, value in common.items() if value is not None}
    settings = {}
    for name in [one for given in names for one in (every() if given == "all" else [given])]:
        fields = PRESETS.get(name, {"method": name} if name in METHODS else None)
        if fields is None:
            try:
                fields = json.loads(name)
            except json.JSONDecodeError:
                fields = None
        if not isinstance(fields, dict):
            raise ValueError(f"--settings: got {name!r}, allowed: {HELP}")
        config = HiPConfig.from_dict({**SPARSE, **shared, **fields})
        if name == "hyper" and tokens is not None:
            config = replace(config, options=as_many_keys(config, tokens))
        settings[name] = config
    return settings


def sizes(text: str) -> list[int]:
    """Token counts from a list like `4096,64K`. Raises ValueError for anything else."""
    try:
        counts = [int(part.upper().removesuffix("K")) * (1024 if part.upper().endswith("K") else 1) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"got {text!r}, allowed: token counts like 8192 or 64K,128K")
    return counts


def model_name(model: str) -> str:
    """How results name a model: not by where the demo checkpoint happens to be installed."""
    return DEMO if model == str(CHECKPOINT) else model


def check_output(output: Path | None) -> None:
    """Raise ValueError, before the work, for a file that could not be written after it."""
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ValueError(f"--output: got {str(output)!r}, allowed: a file in a folder that exists")


def publish(
    title: str,
    rows: Sequence[dict[str, Any]],
    as_json: bool,
    output: Path | None,
    details: dict[str, Any],
    table: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Show rows as JSON with `details`, or as a table (of fewer rows, if given). The file `output` gets the JSON in any case."""
    details = {**details, "model": model_name(details["model"])}
    if output is not None:
        with output.open("w") as file, redirect_stdout(file):
            report.show(title, rows, True, **details)
    report.show(title, rows if as_json or table is None else table, as_json, **(details if as_json else {}))
