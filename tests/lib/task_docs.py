"""Documents of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.eval.tasks import retrieval, ruler

LENGTHS = [1024, 1500]
META: dict[str, Any] = {"pretrained": str(CHECKPOINT), "max_seq_lengths": LENGTHS, "samples": 2}
GENERATORS: dict[str, Callable[..., Any]] = {
    "hip_passkey": retrieval.passkey,
    "hip_passkeys": retrieval.passkeys,
    "hip_niah_single": ruler.niah_single,
    "hip_niah_multikey": ruler.niah_multikey,
    "hip_niah_multivalue": ruler.niah_multivalue,
    "hip_niah_multiquery": ruler.niah_multiquery,
    "hip_variable_tracking": ruler.variable_tracking,
    "hip_common_words": ruler.common_words,
    "hip_frequent_words": ruler.frequent_words,
    "hip_key_value": retrieval.key_value,
    "hip_copying": retrieval.copying,
}


def docs(name: str, **metadata: Any) -> list[dict[str, Any]]:
    return list(GENERATORS[name](**{**META, **metadata})["test"])
