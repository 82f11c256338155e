"""lm-eval in one process and in two, by `accelerate launch`: the seconds of the whole command, and
that the scores are the same.

    python benchmarks/lm_eval_processes.py runs/smollm2
        --output benchmarks/results/lm_eval_processes.json

One process has as many threads as two have together, and once as many as each of the two. Rounds
alternate; seconds are the median over rounds, of commands that start Python, load the model and
evaluate. `speedup`: over the first row. Run with the Python of the environment that `hip-hf` is
installed in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from hip_hf.cli.inputs import user_errors
from hip_hf.cli.publish import Json, Output, Targets, model_name

PROCESSES = 2
LAUNCH = [
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(PROCESSES),
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0", "--no_python",
]  # fmt: skip


def evaluate(processes: int, threads: int, arguments: list[str]) -> dict[str, Any]:
    """One command: its seconds, and the scores that it wrote."""
    # accelerate starts several processes only when told of GPUs, and lets them be CPU processes
    # only when told so as well
    own = {
        "OMP_NUM_THREADS": str(threads),
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    hip_hf = str(Path(sys.executable).with_name("hip-hf"))
    command = [hip_hf] if processes == 1 else [sys.executable, *LAUNCH, hip_hf]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [*command, "lm-eval", *arguments, "--output_path", folder],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"lm-eval in {processes} processes failed:\n{done.stderr[-3000:]}")
        (file,) = Path(folder).rglob("results_*.json")
        found = json.loads(file.read_text(encoding="utf-8"))
    assert found["config"]["hip"]["processes"] == processes
    return {"seconds": seconds, "scores": found["results"]}


def main(
    model: str,
    tasks: str = "hip_passkey",
    length: Annotated[int, typer.Option(min=256, help="Tokens of a prompt.")] = 2048,
    samples: Annotated[
        int, typer.Option(min=PROCESSES, help="Prompts: each process needs one.")
    ] = 8,
    settings: Annotated[str, typer.Option(help="Model arguments.")] = "budget=256,dense_below=0",
    cores: Annotated[
        int, typer.Option(min=PROCESSES, help="Threads of all processes together.")
    ] = PROCESSES,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Time, compare the scores, and print the table."""
    metadata = {"max_seq_lengths": [length], "samples": samples, "data_seed": 0}
    arguments = [
        "--model_args",
        f"pretrained={model},{settings}",
        "--tasks",
        tasks,
        "--metadata",
        json.dumps(metadata),
    ]
    arguments += ["--device", "cpu"]
    ways = dict.fromkeys([(1, cores // PROCESSES), (1, cores), (PROCESSES, cores // PROCESSES)])
    details = {
        "model": model_name(Path(model).name),
        "tasks": tasks,
        "settings": settings,
        "rounds": rounds,
        **metadata,
    }
    with user_errors():
        targets = Targets(as_json, output)
        kept = targets.kept("lm_eval_processes", cores=cores, **details)
    found: dict[tuple[int, int], list[dict[str, Any]]] = {way: [] for way in ways}
    kept.expect("commands", rounds * len(ways))
    with kept:
        for turn in range(rounds):
            for way in ways:
                found[way].append(kept.get((turn, *way), partial(evaluate, *way, arguments)))
    scores = [one["scores"] for some in found.values() for one in some]
    if any(other != scores[0] for other in scores):
        raise SystemExit(f"the scores differ: {list(found)}: {scores}")
    seconds = {way: median(one["seconds"] for one in some) for way, some in found.items()}
    first = next(iter(seconds.values()))
    rows = [
        {
            "processes": processes,
            "threads_each": threads,
            "seconds": spent,
            "speedup": first / spent,
        }
        for (processes, threads), spent in seconds.items()
    ]
    title = (
        f"lm-eval of {details['model']}, {tasks}, {length} tokens: "
        f"{len(scores)} commands with the same scores"
    )
    targets.publish("lm_eval_processes", title, rows, {**details, "scores": scores[0]}, kept)


if __name__ == "__main__":
    typer.run(main)
