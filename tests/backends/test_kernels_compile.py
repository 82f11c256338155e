"""Every kernel compiles for GPUs that are not here, without spills and with matrix instructions:
two targets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from processes import process


def run(*arguments: str) -> tuple[int, str, str]:
    """`hip-hf kernels`: exit status, output, errors."""
    done = process("-c", "from hip_hf_cli import main; main()", "kernels", *arguments)
    return done.returncode, done.stdout, done.stderr


def rows(*arguments: str) -> list[dict[str, Any]]:
    code, out, errors = run("--json", *arguments)
    assert out, errors
    found: list[dict[str, Any]] = json.loads(out)["rows"]
    wrong = [row for row in found if row["problem"]]
    assert not wrong
    assert code == 0, errors
    return found


def test_all_kernels_compile() -> None:
    found = rows("--targets", "sm90", "--dims", "64", "--dtypes", "bf16")
    names = " ".join(row["kernel"] for row in found)
    selection = ("select, prefill", "select, decode", "select, need", "select, votes")
    for kernel in (*selection, "pyramid, blend, tiles", "prefill", "decode", "backward"):
        assert kernel in names
    assert all(row["registers"] > 0 for row in found)
    heavy = [row for row in found if row["kernel"].startswith(("prefill", "backward"))]
    assert heavy
    assert all(row["matrix"] > 0 and row["path"] == "wgmma" for row in heavy)


HUNGRY = """
import torch, triton, triton.language as tl
from hip_hf.backends.triton.compile import budget
from hip_hf.backends.triton.compile.launch import Launch
from triton.runtime.jit import MockTensor as Pointer

@triton.jit
def summed(x, N: tl.constexpr, TIMES: tl.constexpr):
    at = tl.arange(0, N)
    held = tl.load(x + at)
    for _ in range(TIMES):
        held += tl.cumsum(held, 0)
    tl.store(x + at, held)

def problem(n, target, tensor_cores=False, spills=0):
    given = dict(x=Pointer(torch.float32), N=n, TIMES=4, num_warps=1)
    launch = Launch("summed", summed, given, tensor_cores)
    return budget.spend(launch, target, n, torch.float32, spills).problem

print(problem(64, "sm90"), problem(64, "sm90", True), problem(16384, "sm90"),
      problem(16384, "sm90", spills=1 << 20), problem(24, "sm90"), sep="|")
"""


def test_what_is_wrong_with_a_kernel_is_found(tmp_path: Path) -> None:
    """The check can fail: a kernel without matrix instructions, one that spills more than it may,
    one that does not compile."""
    script = tmp_path / "hungry.py"  # the compiler reads the source
    script.write_text(HUNGRY)
    done = process(str(script))
    fine, cores, spills, allowed, error = done.stdout.strip().split("|")
    assert (fine, cores, allowed) == ("", "no tensor cores", "")
    assert re.fullmatch(r"spills \d+, allowed 0", spills)
    assert error.startswith("CompilationError")


WIDE = """
import torch
from unittest.mock import patch
from hip_hf import config
from hip_hf.backends.triton.compile import budget, catalogue

wide = config.HiPConfig(query_stride=1, beam=8, rescore=8)
with patch.object(catalogue, "HiPConfig", lambda: wide):
    launches = catalogue.launches_of_search(128, torch.bfloat16, "sm90")
found = [(x.arguments["M"], budget.spend(x, "sm90", 128, torch.bfloat16).problem)
         for x in launches if x.name in ("select, prefill", "select, decode")]
print(*found, sep="|")
"""


def test_a_search_with_many_candidates_fits() -> None:
    done = process("-c", WIDE)
    assert done.stdout.strip() == "(1024, '')|(1024, '')", done.stderr


LARGE_BLOCKS = """
import sys
from dataclasses import replace
import torch
from hip_hf.backends.triton.compile import budget, catalogue
from hip_hf.backends.triton.compile.examples import example
from hip_hf.backends.triton.common.tuning import tile_of

target, block_k = sys.argv[1], int(sys.argv[2])
x = example(128, torch.bfloat16)
x = replace(x, part=replace(x.part, reads=replace(x.part.reads, block_k=block_k)))
tile = tile_of("backward keys", target, 128, 128, torch.bfloat16)
launches = catalogue.key_launches(x, tile)
print(*[budget.spend(one, target, 128, torch.bfloat16).problem for one in launches], sep="|")
"""


@pytest.mark.parametrize(("target", "block_k"), [("sm89", 256), ("gfx942", 128)])
def test_gradients_of_large_key_blocks_fit(target: str, block_k: int) -> None:
    """A tile of keys is a part of a block then: a whole block would spill, or not fit into shared
    memory."""
    done = process("-c", LARGE_BLOCKS, target, str(block_k))
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_the_pyramid_compiles_for_amd() -> None:
    found = rows(
        "--targets", "gfx942", "--dims", "64", "--dtypes", "fp16", "--only", "pyramid, blend"
    )
    assert {row["target"] for row in found} == {"gfx942"}


def test_queries_rotated_twice_are_not_kept_between_rotations() -> None:
    """They are loaded once for keys too far away and once for the rest; held in registers
    meanwhile, they would spill."""
    (row,) = rows(
        "--targets", "sm90", "--dims", "256", "--dtypes", "bf16", "--only", "prefill, extended"
    )
    assert row["path"] == "wgmma"
    assert row["spilled"] == 0


RESUMED = """
import sys
from pathlib import Path
from hip_hf.cli import kernels
from hip_hf.eval.measure.kernels import COMPILED_DTYPES
from hip_hf.backends.triton.compile import budget, catalogue
from hip_hf.backends.triton.common import tuning

done = []

def spend(launch, target, dim, dtype, spills):
    if len(done) == most:
        raise KeyboardInterrupt
    done.append(launch.name)
    kind = str(dtype).removeprefix("torch.")
    key = (launch.name, target, dim, kind, launch.code(), launch.digest())
    return budget.Spent(*key, registers=1, spilled=spilled)

def run(spills=0):
    try:
        kernels.main("sm90", "64", "bf16", "prefill", spills, Path(sys.argv[1]), True)
    except KeyboardInterrupt:
        pass

budget.spend, most, spilled = spend, 99, 0
launches = catalogue.launches_of(64, COMPILED_DTYPES["bf16"], "sm90")
names = [launch.name for launch in launches if "prefill" in launch.name]
most = len(names) - 1
run()
assert done == names[:-1], done
most = len(names)
rows, keys, warps, stages = tuning.TILES["prefill"]["sm90"][64]
tuning.TILES["prefill"]["sm90"][64] = (rows, keys, warps, stages + 1)
tuning.tile_of.cache_clear()
again = [name for name in names if name in ("prefill", "prefill, all features")]
done.clear()
most = 99
run()
assert done == [*again, names[-1]], done
print("resumed", len(again))
done.clear()
spilled = 40
Path(sys.argv[1]).unlink()
run(40)
run(40)
assert done == names, done
run(39)
assert done == 2 * names, done
print("spilled", len(names))
"""


def test_a_changed_launch_configuration_is_compiled_anew(tmp_path: Path) -> None:
    """After an interruption, what was compiled with another entry of the launch table no longer
    counts; the rest does. Nor does what spills more than is allowed now."""
    done = process("-c", RESUMED, str(tmp_path / "kernels.json"))
    lines = done.stdout.splitlines()
    assert "resumed 2" in lines, done.stdout + done.stderr
    assert lines[-1].startswith("spilled "), done.stdout + done.stderr


def test_a_problem_shows_in_the_table() -> None:
    from hip_hf.eval.measure.kernels import summary

    name = dict(kernel="a", target="sm90", dtype="bfloat16")
    row = dict(dim=64, shared=2048, registers=9, spilled=0, path="wgmma", problem="")
    worse = dict(dim=128, shared=1024, registers=255, spilled=40, path="", problem="spills")
    (line,) = summary([name | row, name | worse])
    wanted = dict(compiled=2, registers=255, shared=2.0, spilled=40, path="wgmma", problem="spills")
    assert line == dict(kernel="a", target="sm90", **wanted)


def test_bad_arguments_are_named() -> None:
    code, _, errors = run("--targets", "sm70")
    assert code == 2
    assert "sm70" in errors
    code, _, errors = run(
        "--only", "no such kernel", "--targets", "sm90", "--dims", "64", "--dtypes", "bf16"
    )
    assert code == 1


WIDTHS = """
import torch
from hip_hf.backends.triton.compile.budget import compiling_for
from hip_hf.backends.triton.compile.catalogue import launches_of

launches = launches_of(64, torch.bfloat16, "sm90")
paged = {x.kernel.fn.__name__: x for x in launches if "stride_table" in x.kernel.arg_names}
print(*sorted(paged))
widths = {name: {x.name: x for x in launch.kernel.params}["stride_table"]
          for name, launch in paged.items()}
print(*sorted(name for name, width in widths.items() if not width.do_not_specialize))
attend, programs = paged["attend_kernel"], set()
for width in (15, 16, 17):
    with compiling_for("sm90"):
        compiled = attend.kernel.warmup(grid=(1,), **{**attend.stand_ins(), "stride_table": width})
    if callable(getattr(compiled, "result", None)):
        compiled = compiled.result()
    programs.add(compiled.hash)
print(len(programs))
"""


LENGTHS = """
from functools import partial
import torch
from hip_hf.backends.triton.compile import catalogue, examples

SETTINGS = ("sliding",)  # the example's window is as long as its prompt; a model's never changes
# strides between sequences are not divisible by 16 thanks to the heads
examples.QUERY_HEADS, examples.KEY_HEADS = 3, 1

def kinds(tokens):
    # what Triton makes a program of its own for: constants, and of other numbers whether they are 1
    # or divisible by 16
    found = {}
    catalogue.example = partial(examples.example, tokens=tokens)
    for launch in catalogue.launches_of(64, torch.bfloat16, "sm90"):
        for parameter in launch.kernel.params:
            value = launch.arguments.get(parameter.name)
            free = parameter.do_not_specialize or parameter.name in SETTINGS
            if isinstance(value, int) and not free:
                kind = value if parameter.is_constexpr or value == 1 else value % 16 == 0
                found[launch.kernel.fn.__name__, launch.name, parameter.name] = kind
    return found

before = kinds(4096)
for tokens in (4097, 4111, 8192):
    after = kinds(tokens)
    assert before.keys() == after.keys() and len(after) > 500
    print(tokens, sorted({(key[0], key[2]) for key in before if before[key] != after[key]}))
"""


def test_prompts_of_other_lengths_compile_nothing_anew() -> None:
    done = process("-c", LENGTHS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["4097 []", "4111 []", "8192 []"]


def test_a_growing_cache_compiles_nothing_anew() -> None:
    """By its width: Triton would make other programs where it is divisible by 16."""
    done = process("-c", WIDTHS)
    assert done.returncode == 0, done.stderr
    paged, specialised, programs = done.stdout.splitlines()
    assert {"attend_kernel", "select_kernel", "append_kernel", "tiles_kernel"} <= set(paged.split())
    assert specialised == ""
    assert programs == "1"
