"""Programs that tests run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

from repository import LIB, ROOT


def launch(processes: int, *arguments: object) -> None:
    """Run a script of the tests in several processes, which meet on a free port of this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
    ]
    path = os.pathsep.join([str(ROOT), str(LIB)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own: in this one Triton may be interpreting."""
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
