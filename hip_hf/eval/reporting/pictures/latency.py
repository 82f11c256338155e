"""The picture of `hip-hf latency`: times faster than PyTorch against the length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hip_hf.eval.reporting import plots

TITLE = "latency: "


def draw(document: dict[str, Any], file: Path) -> None:
    """The ratio against the length: prefill and decode side by side, a line per dtype and setting."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in document["rows"]:
        if not row["times_faster"]:
            continue  # selection alone has no counterpart
        panel, _, how = row["phase"].partition(" ")
        label = " ".join(part for part in (row["dtype"], row["settings"], how) if part)
        panels.setdefault(panel, {}).setdefault(label, []).append((row["length"], row["times_faster"]))
    conditions = document["title"].removeprefix(TITLE)
    plots.ratios(file, f"One attention call, hip against scaled_dot_product_attention\n{conditions}", panels)
