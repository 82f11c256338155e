"""`hip-hf doctor` without a GPU: the torch backend, and the kernels in Triton's interpreter."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreter import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from hip_hf.backends import base
from hip_hf.backends.triton import checks, dense, sparse, trust
from hip_hf.backends.triton.common import tuning
from hip_hf.backends.triton.compile.catalogue import launches_of
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import doctor
from hip_hf_cli import app

pytestmark = pytest.mark.skipif(
    DEVICE == "cuda", reason="what stands for a GPU here is the interpreter"
)


def run(*arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and document of a run in fp32 with short calls."""
    done = CliRunner().invoke(
        app,
        ["doctor", "--device", "cpu", "--dtypes", "fp32", "--length", "256", "--json", *arguments],
    )
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, json.loads(done.stdout)


@pytest.fixture
def only_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKS", {"dense": checks.CHECKS["dense"]})


def kernels() -> dict[int, str]:
    """Every kernel that is launched: those of the modules that say what to compile."""
    return {
        id(launch.kernel): launch.kernel.fn.__name__
        for launch in launches_of(64, torch.float32, "sm90")
    }


def test_every_kernel_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks find nothing wrong with either backend, and leave out no kernel."""
    from triton.runtime.interpreter import InterpretedFunction

    missing, launch = kernels(), InterpretedFunction.run

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        missing.pop(id(self), None)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    code, document = run()
    wrong = [row for row in document["rows"] if row["problem"]]
    assert not wrong
    assert code == 0
    assert [row["check"] for row in document["rows"]] == 2 * list(checks.CHECKS)
    assert missing == {}
    assert document["about"]["kernels"] == "can run"
    assert [row["phase"] for row in document["speed"]] == [
        "prefill",
        "decode amortised",
        "decode refreshed",
    ]


def test_what_is_timed_is_sparse(only_dense: None) -> None:
    """Also where models are dense by default because the context is short."""
    speed = run("--length", "3K")[1]["speed"]
    assert [row["path"] for row in speed] == ["sparse"] * 3


def test_without_the_interpreter_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, only_dense: None
) -> None:
    monkeypatch.setattr(sparse, "INTERPRETED", False)
    code, document = run()
    assert code == 0
    assert [row["backend"] for row in document["rows"]] == ["torch, fp32, D=32"]
    assert "none is tried here" in document["about"]["kernels"]
    monkeypatch.setattr(trust, "old_triton", lambda: "Triton 3.2.0 is too old")
    assert run()[1]["about"]["kernels"] == "Triton 3.2.0 is too old"


@pytest.mark.parametrize("how", ["wrong", "refused"])
def test_a_bad_kernel_is_found(monkeypatch: pytest.MonkeyPatch, only_dense: None, how: str) -> None:
    """Exit status 1, and the table says what to set instead."""

    def bad(x: Any, *rest: Any) -> None:
        if how == "refused":
            raise RuntimeError("out of resource: shared memory\nmore of it")
        x.out.zero_()
        x.lse.zero_()

    monkeypatch.setattr(dense, "dense_rows", bad)
    code, document = run()
    assert code == 1
    assert document["failed"] == 1
    kernel_row, torch_row = document["rows"]
    assert torch_row["works"] == "yes"
    assert kernel_row["works"] == "no"
    said = (
        "times the error that is allowed"
        if how == "wrong"
        else "RuntimeError: out of resource: shared memory"
    )
    assert kernel_row["problem"].endswith(said)
    assert "attn_implementation" in kernel_row["instead"]


def test_a_kernel_that_fails_when_it_is_timed_hides_nothing(
    monkeypatch: pytest.MonkeyPatch, only_dense: None
) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(doctor, "timed", fails)
    code, document = run()
    assert code == 1
    assert document["about"]["timings"] == "none: RuntimeError: an illegal memory access"
    assert [row["works"] for row in document["rows"]] == ["yes", "yes"]


def test_what_it_says_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks/gpu_run.py` asks for it before every step. The tensors hold nothing."""
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    tuning._target.cache_clear()
    with FakeTensorMode():
        found = doctor.facts(torch.device("cuda", 0), "")
        monkeypatch.setattr(card, "major", 11)
        tuning._target.cache_clear()
        newer = doctor.facts(torch.device("cuda", 0), "")
    tuning._target.cache_clear()
    said = tuple(found[name] for name in ("device", "memory_gib", "capability", "kernels"))
    assert said == ("NVIDIA H200", 150.0, "9.0", "can run")
    assert (found["target"], found["launch_table"]) == ("sm90", "of this target")
    assert (newer["target"], newer["launch_table"]) == ("sm110", "of the closest older target")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_arguments_are_named() -> None:
    for arguments, name in (
        (["--device", "cuda"], "no GPU"),
        (["--dtypes", "fp8"], "fp8"),
        (["--length", "long"], "long"),
    ):
        done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["doctor", *arguments])
        assert done.exit_code == 2
        assert name in done.output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "groups"), [(128, 4), (64, 1), (32, 7)])
def test_what_is_to_be_selected_is_no_matter_of_rounding(
    monkeypatch: pytest.MonkeyPatch, dim: int, groups: int, dtype: torch.dtype
) -> None:
    """With the settings and heads of models: half precision finds the blocks that float64 finds, in
    a decode step also those that take the places of the worst."""
    decode_steps, attend = [], base.attend

    def attended(problem: Any, *rest: Any) -> Any:
        result = attend(problem, *rest)
        if problem.q.shape[2] == 1 and result.mask is not None:
            decode_steps.append(result.mask.indices)
        return result

    monkeypatch.setattr(base, "attend", attended)
    heads, config = checks.Heads(dtype, dim, dim, groups), HiPConfig(dense_below=0)
    for name in ("prompt", "decode", "pages", "delta", "extended"):
        found = checks.check(name, heads, torch.device("cpu"), config, "torch")
        assert not found.problem, name
    assert config.budget_blocks // checks.PLANTED_TOGETHER == 16
    for selected in decode_steps:
        ends = (selected[..., 1:] - selected[..., :-1] > 1).sum(-1) + 1
        assert (ends == 16).all()
        assert selected.shape[-1] == 64


def test_decode_by_kernels_passes_with_the_settings_of_models() -> None:
    """The self-test on a GPU runs with the defaults, in bf16; here heads are smaller."""
    heads = checks.Heads(torch.bfloat16, 32, 32, 2)
    found = checks.check("decode", heads, torch.device("cpu"), HiPConfig(dense_below=0))
    assert not found.problem
    assert found.error > 0


def test_errors_that_are_no_numbers_count() -> None:
    """A result with NaN, or infinite in another place, is wrong however large what is allowed."""
    trial = checks.Trial(
        checks.Heads(dtype=torch.float32), torch.device("cpu"), doctor.SMALL_SETTINGS
    )
    want = torch.tensor([1.0, -torch.inf, 2.0])
    trial.same("out", want.clone(), want)
    assert trial.error == 0
    for got in ([1.0, -torch.inf, torch.nan], [1.0, 0.0, 2.0], [torch.inf, -torch.inf, 2.0]):
        trial.error = 0.0
        trial.same("out", torch.tensor(got), want)
        assert trial.error > 1e6
