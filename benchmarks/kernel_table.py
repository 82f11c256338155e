"""Prints the kernels' table of docs/performance.md, from the results of `hip-hf kernels`.

hip-hf kernels --output benchmarks/results/kernels.json
python benchmarks/kernel_table.py [--dim 128] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hip_hf.eval.reporting.report import markdown

RESULTS = Path(__file__).parent / "results" / "kernels.json"


def cell(row: dict[str, Any]) -> str:
    """Registers a thread, KB of shared memory, matrix instructions; what is wrong, if anything
    is."""
    spent = f"{row['registers']} / {row['shared'] / 1024:.0f} / {row['path'] or '-'}"
    return f"{spent} {row['problem']}" if row["problem"] else spent


def table(rows: list[dict[str, Any]], dim: int, dtype: str) -> str:
    """Kernels by targets, for one head dim and dtype."""
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["dim"] == dim and row["dtype"] == dtype:
            lines.setdefault(row["kernel"], {"kernel": row["kernel"]})[row["target"]] = cell(row)
    return markdown(list(lines.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    print(table(json.loads(RESULTS.read_text())["rows"], given.dim, given.dtype))


if __name__ == "__main__":
    main()
