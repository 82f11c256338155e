"""Finished measurements of a run that may be interrupted: kept in a file beside its output, until
the run is complete."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hip_hf.eval.reporting import report

SUFFIX = ".partial"
Rows = list[dict[str, Any]]


def plain(value: Any) -> Any:
    """A tensor as lists and a dataclass as a dict, as JSON can hold them."""
    return value.tolist() if isinstance(value, torch.Tensor) else vars(value)


class Resumable:
    """What a run has measured so far: a JSON line for each measurement in `OUTPUT.partial`, or in
    memory if there is no output.

    `request` is everything that the measurements depend on. A file of another request is refused
    and not mixed in. A line that was cut off when the run was killed is dropped. As a context
    manager it shows a progress bar, and says after an interruption where the file is. Raises
    ValueError if the file belongs to another request, or holds no such measurements."""

    def __init__(self, output: Path | None = None, request: dict[str, Any] | None = None) -> None:
        self.file = None if output is None else output.with_name(output.name + SUFFIX)
        self.request = json.loads(json.dumps(request or {}))  # as it will be read
        self.done: dict[str, Any] = {}
        self.bar = report.progress()
        self.line = self.bar.add_task("", total=None)
        if self.file is not None and self.file.exists():
            self._read(self.file)

    def _read(self, file: Path) -> None:
        allowed = f"the run that it began as, or none: remove {file.name!r} to start anew"
        try:
            first, *rest = file.read_text(encoding="utf-8").split("\n")
            before = dict(json.loads(first)["request"])
            # what follows the last line break was cut off
            self.done = dict(json.loads(line) for line in rest[:-1])
        except (OSError, ValueError, KeyError, TypeError):
            got = f"{file.name!r}, which is no file of finished measurements"
            raise ValueError(f"--output: got {got}, allowed: {allowed}") from None
        if before != self.request:
            names = sorted(before.keys() | self.request)
            other = [name for name in names if before.get(name) != self.request.get(name)]
            got = f"finished measurements of a run with other {', '.join(other)}"
            raise ValueError(f"--output: got {got}, allowed: {allowed}")
        self._write(file)

    def _write(self, file: Path) -> None:
        """The file from its beginning, whole lines only."""
        lines = [{"request": self.request}, *([key, value] for key, value in self.done.items())]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def expect(self, what: str, total: int | None = None) -> None:
        """Begin the progress bar anew: `total` measurements are to come (None: nobody knows how
        many)."""
        self.bar.reset(self.line, total=total, description=what)

    def get(self, key: tuple[Any, ...], work: Callable[[], Any], what: str | None = None) -> Any:
        """What was measured for `key` before, or what `work` returns now, as JSON holds it.

        `what` is said meanwhile.
        """
        self.bar.update(self.line, description=what)
        name = json.dumps(key)
        if name not in self.done:
            value = json.loads(json.dumps(work(), default=plain))
            if self.file is not None:
                if not self.file.exists():
                    self._write(self.file)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([name, value]) + "\n")
            self.done[name] = value
        self.bar.advance(self.line)
        return self.done[name]

    def finish(self) -> None:
        """Remove the file: the output is written."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def __enter__(self) -> Resumable:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: Any) -> None:
        self.bar.stop()
        if kind is not None and self.file is not None and self.file.exists():
            kept = f"{len(self.done)} finished measurements are kept in {self.file}"
            report.notes.print(f"{kept}: the same command goes on from there")
