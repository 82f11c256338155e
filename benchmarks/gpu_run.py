"""Everything that a GPU has to tell, in eight minutes: one command, the most valuable first.

    python benchmarks/gpu_run.py FOLDER [--minutes 8] [--dry-run]

Each step has a limit of its own, and what it measures is kept at once: FOLDER holds `STEP.json`
(device, driver, versions, seconds, rows) and `STEP.log` of each, and of all `summary.json` and
`summary.md`, written anew after every step. What fails or runs out of time is recorded as such, and
the next step begins, in another process. The same command in the same folder goes on with what is
missing. `--dry-run` does the same on a CPU with tiny shapes, by Triton's interpreter: figures to be
tested, not to be believed.

Estimated seconds on an H100 that has compiled nothing yet (a kernel takes some two seconds, of
which the tests compile many at once; a dense prompt of 1M tokens takes 15), and the limits. The sum
is below eight minutes; what comes too late is dropped:

    step        estimate  limit  what
    doctor            60     90  every kernel against float64
    tests             60     90  kernel tests: the kernels of every call
    prefill           75    110  8K to 1M tokens against FlashAttention or cuDNN; at every length
                                 exact rows against dense ones
    decode            55     90  at 128K and 1M keys, 1 and 16 sequences or as many as fit, in
                                 graphs and launched
    profile           40     60  where a layer's time goes: kernels, gaps, host
    more_tests        70    110  the other kernel tests
    backward          20     40  gradients at 8K and 32K tokens
    tune              50     60  other launches of attention and selection
    model             40     60  the model of runs/smollm2 at 8K tokens; where it is not there, a
                                 Llama of random weights at 32K

Exit status: 1 if a number was wrong, else 3 if something is missing, else 0.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 8.0
# Seconds left below which no step begins.
LEAST = 10.0
DONE = "done"
# In the folder: what its figures depend on besides what is measured.
MACHINE = "machine.json"


@dataclass(frozen=True)
class Step:
    """A step with its limit in seconds."""

    name: str
    limit: float


STEPS = (
    Step("doctor", 90), Step("tests", 90), Step("prefill", 110), Step("decode", 90),
    Step("profile", 60), Step("more_tests", 110), Step("backward", 40), Step("tune", 60),
    Step("model", 60),
)  # fmt: skip


class Worker:
    """A process that takes steps, one after the other, with a log of each, until one fails or is
    stopped."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        pipe: dict[str, Any] = dict(
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.process: Any = subprocess.Popen(
            command, start_new_session=True, env=environment, **pipe
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def take(self, name: str, limit: float) -> tuple[int | None, float]:
        """Exit status of a step, None if it was not through at the limit, and the seconds that it
        took."""
        start = time.monotonic()
        with suppress(BrokenPipeError):  # it has ended, and says so below
            self.process.stdin.write(f"{name}\n")
        try:
            answer = self.answers.get(timeout=limit)
        except queue.Empty:
            return None, time.monotonic() - start
        return int(answer or self.process.wait()), time.monotonic() - start

    def stop(self) -> None:
        """End it and all that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def serve(folder: Path, take: Callable[[str], int]) -> None:
    """What a worker's process does: `take` a step at a time, its output in `STEP.log`, and answer
    its exit status."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    for line in sys.stdin:
        name = line.strip()
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log, stream.fileno())
        os.close(log)
        try:
            code = take(name)
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            code = 1
        sys.stdout.flush()
        answers.write(f"{code}\n")


def finished(folder: Path, name: str) -> bool:
    """Whether the folder has all of a step."""
    file = folder / f"{name}.json"
    return file.exists() and json.loads(file.read_text(encoding="utf-8"))["state"] == DONE


def run(
    folder: Path,
    steps: Sequence[Step],
    command: Sequence[str],
    minutes: float = MINUTES,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Take the steps that the folder has not yet: the exit status. `command`: of a process that
    serves them (`serve`)."""
    end = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    names, todo = (
        [step.name for step in steps],
        [step for step in steps if not finished(folder, step.name)],
    )
    worker = Worker(command, environment)
    try:
        import gpu_records as records  # takes seconds, and the worker imports, too

        for step in todo:
            left = end - time.monotonic()
            limit, code, seconds = min(step.limit, left), None, None
            if left >= LEAST:
                code, seconds = worker.take(step.name, limit)
            records.note(folder, step.name, code, seconds, limit)
            print(records.summarise(folder, names), flush=True)
            # whatever is wrong with the device is over with the process
            if seconds is not None and code != 0:
                worker.stop()
                worker = Worker(command, environment)
    finally:
        worker.stop()
    return records.status(folder, names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, with tiny shapes")
    # what the worker's process does
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # nothing need be installed
    if given.serve:
        import gpu_sizes
        import gpu_steps

        sizes = gpu_sizes.DRY if given.dry_run else gpu_sizes.Sizes()
        serve(given.folder, lambda name: gpu_steps.take(name, given.folder, sizes))
        return
    own = [sys.executable, str(Path(__file__).resolve()), str(given.folder), "--serve"]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    if given.dry_run:
        own.append("--dry-run")
        environment["TRITON_INTERPRET"] = "1"
    # the worker is stopped on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # on a CPU, which others may use as well, only the whole has a limit
    steps = [replace(step, limit=60 * given.minutes) for step in STEPS] if given.dry_run else STEPS
    sys.exit(run(given.folder, steps, own, given.minutes, environment))


if __name__ == "__main__":
    main()
