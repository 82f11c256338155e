"""Caches on disk: safetensors, written beside the target and moved into place, checked before
anything is read from them."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hip_hf.cache.pages import BlockTable, Store
from hip_hf.shown import refused

FORMAT = "hip_hf.cache.1"
# What safetensors calls the dtypes that a cache may have.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Tokens that are written or read at once.
TOKENS_AT_ONCE = 4096


def paged_parts(store: Store, tables: Sequence[BlockTable], length: int) -> Iterator[Tensor]:
    """The first `length` tokens of the sequences in `tables`, in the order of a contiguous
    `[B, Hkv, T, D]`, a bounded part at a time."""
    for table in tables:
        for head in range(store.heads):
            for first in range(0, length, TOKENS_AT_ONCE):
                last = min(first + TOKENS_AT_ONCE, length)
                # of an offloaded store past its pool
                yield Store.read(store, slice(head, head + 1), table, first, last)


Parts = tuple[torch.Size, torch.dtype, Iterable[Tensor]]


def write_tensors(path: Path, facts: dict[str, Any], tensors: dict[str, Parts]) -> None:
    """Write one file, atomically: it is the old one or the new one, whatever happens. No second
    copy of the tensors is made. Raises OSError if the disk is full or `path` cannot be written.

    Args:
        facts: what `reading` gives back, as JSON, by name.
        tensors: of each its shape and dtype, and its numbers in the order of a contiguous one.
    """
    metadata = {"format": FORMAT, **{name: json.dumps(fact) for name, fact in facts.items()}}
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (shape, dtype, _) in tensors.items():
        end = at + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for *_, parts in tensors.values():
                for part in parts:
                    file.write(part.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def refused_file(path: Path, got: object, allowed: str) -> ValueError:
    """The error for a file that holds something else than it should."""
    return refused(f"path {str(path)!r}", got, allowed)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file, for its tensors (`safetensors.safe_open`), and the facts that were written
    with them. Raises FileNotFoundError if there is no such file, ValueError if it is broken or
    foreign."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        got = f"{str(path)!r}, which is no file"
        raise FileNotFoundError(f"path: got {got}, allowed: a file written by HiPCache.save")
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        got = f"a truncated or foreign file ({error})"
        raise refused_file(path, got, "one of HiPCache.save") from None
    with file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise refused_file(path, f"format {metadata.get('format')!r}", f"{FORMAT!r}")
        yield file, {name: json.loads(fact) for name, fact in metadata.items() if name != "format"}
