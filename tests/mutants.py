"""Mutation testing: what share of small faults do the tests notice? `make mutants` mutates the
files that `[tool.mutmut]` of pyproject.toml names, tries a sample of each on the tests it names,
lists the survivors and fails where too many survive.

    make mutants                              # a sample of every file
    make mutants MUTANTS="--most 1000000"     # every mutant: hours
    make mutants MUTANTS="--only need.py hip.py"

Triton kernels are not mutated: mutmut leaves decorated functions alone.
"""

from __future__ import annotations

import argparse
import random
import resource
import sys
from pathlib import Path

import torch
from mutmut.__main__ import cli, collect_source_file_mutation_data
from mutmut.configuration import config
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name

NOTICED = ("killed", "timeout", "segfault")
KILLED = 0.85  # of the tried mutants of a file, at least
MOST = 150  # mutants of a file that are tried
SEED = 0
MEMORY = 4 << 30  # bytes of address space: a mutant that loops for ever may fill a list meanwhile


def sample(path: str, most: int) -> list[str]:
    """The names of at most `most` mutants of a file, the same in every run."""
    source = Path(path).read_text()
    names = sorted(
        get_mutant_name(Path(path), name)
        for name in mutate_file_contents(path, source).mutant_names
    )
    return names if len(names) <= most else random.Random(SEED).sample(names, most)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--most", type=int, default=MOST, help="mutants that are tried of each file"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="files whose path ends so")
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(
        1
    )  # mutants are forked from this process: none of torch's threads may hold a lock then
    names = {
        path: sample(path, given.most)
        for path in config().only_mutate
        if path.endswith(tuple(given.only))
    }
    tried = [name for some in names.values() for name in some]
    cli.main(["run", "--max-children", "1", *tried], standalone_mode=False)

    found = {
        name: status_by_exit_code[code]
        for _, name, code in collect_source_file_mutation_data(mutant_names=tried)[0]
    }
    enough = True
    for path, some in names.items():
        survivors = [name for name in some if found[name] not in NOTICED]
        share = 1 - len(survivors) / len(some)
        enough &= share >= KILLED
        for name in survivors:
            print(f"# {name}: {found[name]}\n{get_diff_for_mutant(name, path=path)}")
        hung = sum(found[name] == "timeout" for name in some)
        killed = f"{len(some) - len(survivors)} of {len(some)} mutants killed"
        print(f"{path}: {killed} ({hung} by hanging), {share:.1%}")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
