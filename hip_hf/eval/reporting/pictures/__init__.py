"""The pictures of saved results: a module for each command or benchmark, whose `draw(document, file)` makes the picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hip_hf.eval.reporting.pictures import compare, fidelity, latency, longctx, memory, needles, passkey, perplexity, serving

PICTURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "passkey": passkey.draw,
    "needles": needles.draw,
    "perplexity": perplexity.draw,
    "fidelity": fidelity.draw,
    "latency": latency.draw,
    "memory": memory.draw,
    "compare": compare.draw,
    "longctx": longctx.draw,  # of benchmarks/longctx.py
    "serving": serving.draw,  # of benchmarks/serving.py
}
