"""Kernels serve `backend="auto"` only where they can be trusted; the interpreter stands for the
device."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import assert_near, make_problem, make_qkv, small
from interpreter import DEVICE
from repository import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from triton.errors import TritonError

import hip_hf
from hip_hf.attention import Result, attend
from hip_hf.backends import choice
from hip_hf.backends.triton import checks, dispatch, sparse, trust
from hip_hf.backends.triton.attention import backward
from hip_hf.backends.triton.checks import Found, Heads
from hip_hf.backends.triton.common.arguments import Operands, Part
from hip_hf.cache.offload import OffloadedStore
from hip_hf.cache.pages import BlockTable, PagedTensor
from hip_hf.eval.measure.doctor import SMALL_HEADS, SMALL_SETTINGS
from hip_hf.integration.api import configure
from hip_hf.integration.explain import explain
from hip_hf.problem import AttentionProblem
from hip_hf.state import DecodeState

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PASSED, WRONG = (
    Found("prompt", checks.SPARSE),
    Found("prompt", checks.SPARSE, 9.0, "out: 9 times the error that is allowed"),
)


class SelfTest:
    """Stands for the self-test, and counts."""

    def __init__(self, found: Found | BaseException) -> None:
        self.found, self.asked = found, []
        self.heads: list[Heads] = []

    def __call__(self, device: torch.device, heads: Heads, part: str) -> list[Found]:
        self.asked.append(part)
        self.heads.append(heads)
        if isinstance(self.found, BaseException):
            raise self.found
        return [self.found]


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that knows nothing, and calls as if their tensors were on a GPU."""
    monkeypatch.setattr(choice, "asks_for_kernels", lambda config, _: config.backend != "torch")
    monkeypatch.setattr(trust, "folder", lambda: tmp_path / "passed")
    for known in ("_verdicts", "_refused"):
        monkeypatch.setattr(trust, known, {})
    for known in ("_warned", "_passed"):
        monkeypatch.setattr(trust, known, set())
    trust._lacking.cache_clear()
    yield
    trust._lacking.cache_clear()


@pytest.fixture
def self_test(monkeypatch: pytest.MonkeyPatch) -> SelfTest:
    """The self-test passes without running."""
    test = SelfTest(PASSED)
    monkeypatch.setattr(trust, "self_test", test)
    return test


def call(dtype: torch.dtype = torch.float32, **fields: Any) -> Result:
    q, k, v = (x.to(DEVICE) for x in make_qkv(100, 20, dtype=dtype))
    return attend(make_problem(q, k, v), small(**fields))


def by_torch() -> torch.Tensor:
    """What `call` gives densely."""
    torch.manual_seed(0)
    return attend(make_problem(*make_qkv(100, 20)), small(method="dense", backend="torch")).out


def test_what_has_passed_serves(self_test: SelfTest) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = call()
    assert (result.path, result.reason) == ("sparse", "")
    assert self_test.asked == ["sparse"]


def test_what_has_passed_is_not_asked_for_again(
    self_test: SelfTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer asks at every step."""
    call()
    monkeypatch.setattr(trust, "verdict", lambda *asked: pytest.fail("asked again"))
    assert call().path == "sparse"
    why = trust.note_refusal(torch.device(DEVICE), small().text, RuntimeError("no room"))
    with pytest.warns(UserWarning, match="no room"):
        assert call().reason == f"no kernels: {why}"


def test_each_part_is_tested_when_a_call_needs_it(self_test: SelfTest) -> None:
    call()
    call(method="hyper", options=dict(min_seq_len=64))
    call(delta=32)
    call()
    assert self_test.asked == ["sparse", "hyper", "delta"]
    q, k, v = (x.to(DEVICE).requires_grad_() for x in make_qkv(100, 20))
    assert attend(make_problem(q, k, v), small()).out.requires_grad
    assert self_test.asked == ["sparse", "hyper", "delta", "gradients"]


def test_wrong_numbers_go_dense_from_the_first_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is wrong on this device: no result of it reaches a caller, and there is one
    warning."""
    prefill, ran = sparse.prefill, []

    def wrong(x: Operands, part: Part) -> None:
        prefill(x, part)
        x.out[:, -1, -1] += 0.1

    def run(device: torch.device, heads: Heads, part: str) -> list[Found]:
        ran.append(part)
        return [
            checks.check(
                "prompt",
                replace(SMALL_HEADS, dtype=torch.float32),
                device,
                replace(SMALL_SETTINGS, dense_tail=0),
            )
        ]

    monkeypatch.setattr(sparse, "prefill", wrong)
    monkeypatch.setattr(trust, "self_test", run)
    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match="hip: attention is dense where kernels would serve: the self-test"
    ) as said:
        results = [call(), call(delta=32)]
    assert len(said) == 1
    assert ran == ["sparse"]
    for result in results:
        assert result.path == "dense"
        assert result.reason.startswith(
            "no kernels: the self-test of the kernels failed (prompt: out: "
        )
        assert not result.unsupported
    assert_near(results[0].out.cpu(), by_torch(), 1e-6)


def refused_launch(*args: Any, **kwargs: Any) -> None:
    raise TritonError("out of resource: shared memory")


class Refusing:
    """Stands for a kernel that does not fit on the device."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return refused_launch


REFUSALS = (
    TritonError("out of resource: shared memory"),
    RuntimeError("Triton Error [CUDA]: out of resource: shared memory"),
)


@pytest.mark.parametrize("error", REFUSALS, ids=["compiler", "driver"])
def test_a_launch_that_triton_refuses_goes_dense(
    monkeypatch: pytest.MonkeyPatch, self_test: SelfTest, error: Exception
) -> None:
    """The self-test knows the default settings; others may ask for more than the device has. The
    state goes on."""
    run, tried = dispatch.run_by_kernels, []

    def refused(problem: AttentionProblem, config: Any, *rest: Any) -> Any:
        tried.append(config.budget)
        if config.budget == 16:
            raise error
        return run(problem, config, *rest)

    monkeypatch.setattr(dispatch, "run_by_kernels", refused)
    q, k, v = (x.to(DEVICE) for x in make_qkv(101))
    state = DecodeState()
    with pytest.warns(UserWarning, match="out of resource"):
        result = attend(
            make_problem(q[:, :, :100], k[:, :, :100], v[:, :, :100]), small(), None, state
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one is enough
        step = attend(make_problem(q[:, :, 100:], k, v), small(), None, state)
    assert tried == [16]
    assert result.path == step.path == "dense"
    assert (
        f"Triton refuses the kernels with these settings ({type(error).__name__}: {error}"
        in step.reason
    )
    want = attend(make_problem(q[:, :, 100:], k, v), small(method="dense", backend="torch")).out
    assert_near(step.out.cpu(), want.cpu(), 1e-6)
    assert call(budget=32).path == "sparse"
    with pytest.raises(type(error)):
        call(backend="triton")


def test_a_backward_pass_that_triton_refuses_says_so_and_later_calls_go_dense(
    monkeypatch: pytest.MonkeyPatch, self_test: SelfTest
) -> None:
    """The forward pass is over: this call cannot go dense any more."""
    monkeypatch.setattr(backward, "query_gradient_kernel", Refusing())
    tensors = [x.to(DEVICE).requires_grad_() for x in make_qkv(100, 20)]
    with pytest.raises(
        RuntimeError, match=r"out of resource: shared memory.*From now on such calls are dense"
    ):
        attend(make_problem(*tensors), small()).out.sum().backward()
    with pytest.warns(UserWarning, match="Triton refuses"):
        result = attend(make_problem(*tensors), small())
    assert result.path == "dense"
    result.out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)
    with pytest.raises(TritonError):  # by name there is no other way
        attend(make_problem(*tensors), small(backend="triton")).out.sum().backward()


def test_a_compiled_graph_that_triton_refuses_says_so_and_the_next_one_is_dense(
    monkeypatch: pytest.MonkeyPatch, self_test: SelfTest
) -> None:
    monkeypatch.setattr(sparse, "prefill", refused_launch)
    q, k, v = (x.to(DEVICE) for x in make_qkv(64, 20))
    config = small()

    def compiled(whole: bool) -> torch.Tensor:
        torch._dynamo.reset()
        attention = lambda q, k, v: hip_hf.hip_attention(q, k, v, config=config)  # noqa: E731
        with torch.no_grad():
            return torch.compile(attention, backend="eager", fullgraph=whole)(q, k, v)

    with pytest.raises(RuntimeError, match=r"out of resource: shared memory.*compiled graphs anew"):
        compiled(whole=True)
    with pytest.warns(UserWarning, match="Triton refuses"):
        out = compiled(whole=False)  # what is dense without kernels looks at its numbers
    dense = hip_hf.hip_attention(
        q.cpu(), k.cpu(), v.cpu(), config=small(method="dense", backend="torch")
    )
    assert_near(out.cpu(), dense, 1e-6)


def test_other_errors_of_a_call_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, self_test: SelfTest
) -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("no error of Triton's"),
    ):
        monkeypatch.setattr(
            dispatch, "run_by_kernels", lambda *args, error=error: (_ for _ in ()).throw(error)
        )
        with pytest.raises(type(error), match=str(error)):
            call()


@pytest.mark.parametrize(
    ("capability", "amd", "why"),
    [
        ((7, 5), "", "compute capability 7.5, 8.0 or later"),
        ((8, 0), "", ""),
        ((12, 0), "", ""),
        ((9, 0), "gfx90a", "gfx90a"),
        ((9, 4), "gfx942", ""),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], amd: str, why: str
) -> None:
    properties = SimpleNamespace(
        name="A card", major=capability[0], minor=capability[1], gcnArchName=f"{amd}:xnack-"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "6.4" if amd else None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    found = trust.lacking(GPU)
    assert why in found
    assert bool(found) == bool(why)


def test_without_a_compiler_or_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="A card", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/cc" if name == "my-cc" else None)
    monkeypatch.setenv("CC", "my-cc -O2")
    assert trust._lacking(GPU) == ""
    monkeypatch.delenv("CC")
    trust._lacking.cache_clear()
    assert trust._lacking(GPU).startswith("Triton needs a C compiler (gcc or clang")

    def broken(device: torch.device) -> None:
        raise RuntimeError("no NVIDIA driver\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    trust._lacking.cache_clear()
    assert trust._lacking(GPU) == "no GPU can be reached (no NVIDIA driver)"


@pytest.mark.parametrize("version", ["3.2.0", "3.5.1+git1", None])
def test_a_triton_that_is_old_or_missing_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    fake = None if version is None else ModuleType("triton")
    if fake is not None:
        fake.__version__ = version
    monkeypatch.setitem(sys.modules, "triton", fake)
    why = (
        "cannot be imported"
        if version is None
        else f"Triton {version} is too old, 3.6 or later is needed"
    )
    with pytest.warns(UserWarning, match="hip: attention is dense"):
        result = call()
    assert result.path == "dense"
    assert why in result.reason
    torch.manual_seed(0)
    assert_near(call().out.cpu(), by_torch(), 1e-6)
    with pytest.raises(ValueError, match=r"HiPConfig.backend: got 'triton', allowed here: auto"):
        call(backend="triton")


def test_the_requirement_is_what_is_asked_for() -> None:
    oldest = ".".join(map(str, trust.OLDEST_TRITON))
    assert f'"triton>={oldest};' in (ROOT / "pyproject.toml").read_text()


def test_what_has_no_kernels_is_dense_on_a_gpu(self_test: SelfTest) -> None:
    """The torch backend would make thousands of launches there; it serves who names it."""
    result = call(torch.float64)
    assert (result.path, result.reason, result.unsupported) == (
        "dense",
        "no kernels: float64 has no kernels",
        True,
    )
    assert self_test.asked == []
    assert call(method="oracle").reason == "no kernels: method oracle has no kernels"
    assert call(method="oracle", backend="torch").path == "sparse"


def test_passed_tests_are_kept_for_the_same_device_driver_and_code(
    monkeypatch: pytest.MonkeyPatch, self_test: SelfTest, tmp_path: Path
) -> None:
    def runs() -> int:
        """Self-tests that a new process runs."""
        before = len(self_test.asked)
        trust._verdicts.clear()
        assert trust.verdict(CPU, Heads(), checks.SPARSE) == ""
        return len(self_test.asked) - before

    assert [runs(), runs()] == [1, 0]
    for name, value in (("drivers", lambda: ["another"]), ("code", lambda: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(trust, name, value)
            assert [runs(), runs()] == [1, 0]
    (file, *_) = sorted((tmp_path / "passed").iterdir(), key=lambda file: file.stat().st_mtime)
    assert runs() == 0
    for broken in ("", "{", '{"device": "cpu"}', "[]"):
        file.write_text(broken)
        assert [runs(), runs()] == [1, 0]
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(trust, "folder", lambda: blocked / "passed")
    assert [runs(), runs()] == [1, 1]


def test_what_failed_is_not_kept_on_disk(self_test: SelfTest, tmp_path: Path) -> None:
    assert trust.verdict(CPU, Heads(), checks.SPARSE) == ""
    trust.keep_verdict(CPU, Heads(), checks.SPARSE, [WRONG])
    assert not list((tmp_path / "passed").iterdir())
    assert "9 times" in trust.verdict(CPU, Heads(), checks.SPARSE)
    assert self_test.asked == ["sparse"]


def test_full_memory_says_nothing_of_the_kernels(self_test: SelfTest) -> None:
    self_test.found = torch.OutOfMemoryError("full")
    assert "no free memory" in trust.verdict(CPU, Heads(), checks.SPARSE)
    self_test.found = PASSED
    assert trust.verdict(CPU, Heads(), checks.SPARSE) == ""


@pytest.mark.parametrize("answers", [True, False])
def test_a_check_says_if_the_gpu_is_lost_to_the_process(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an access out of range each call of CUDA repeats the error, until the process ends."""
    error = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setitem(checks.CHECKS, "prompt", (checks.SPARSE, fail))
    monkeypatch.setattr(torch.cuda, "synchronize", (lambda device: None) if answers else fail)
    problem = checks.check("prompt", Heads(), GPU, SMALL_SETTINGS).problem
    assert "illegal memory access" in problem
    assert ("this process can use the GPU no more" in problem) == (not answers)


def test_one_thread_tests_and_the_others_wait(self_test: SelfTest) -> None:
    threads = [
        threading.Thread(target=trust.verdict, args=(CPU, Heads(), checks.SPARSE)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert self_test.asked == ["sparse"]


@pytest.mark.parametrize("state", ["_is_in_bad_fork", "is_current_stream_capturing"])
def test_no_test_in_a_captured_graph_or_a_broken_fork(
    monkeypatch: pytest.MonkeyPatch, self_test: SelfTest, state: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trust, "identity", lambda device: {})
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, state, lambda: True)
        assert trust.verdict(GPU, Heads(), checks.SPARSE).startswith(
            "the kernels are not tested yet"
        )
        assert self_test.asked == []
    assert trust.verdict(GPU, Heads(), checks.SPARSE) == ""
    assert self_test.asked == ["sparse"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process")  # it has threads: that is what is tried
def test_a_process_forked_during_a_test_is_not_locked() -> None:
    with trust._testing:
        child = os.fork()
        if child == 0:
            os._exit(0 if trust._testing.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_the_test_runs_in_no_mode_of_the_caller() -> None:
    def modes() -> list[Any]:
        return [
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.empty(1),
        ]

    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"), FakeTensorMode():
        *found, made = trust._alone(modes)
    assert found == [False, False, True]
    assert type(made) is torch.Tensor
    assert made.device == CPU


def test_an_offloaded_cache_is_read_by_the_torch_backend(self_test: SelfTest) -> None:
    """Kernels would read host memory, and dense attention all of it."""
    q, k, v = make_qkv(96, 1)
    paged = []
    for x in (k, v):
        store = OffloadedStore(x.shape[1], x.shape[3], x.dtype, CPU, 8, "cpu", 12, 2)
        store.arenas, store.bounds = [store.make_arena(12)], [0]
        table = BlockTable(list(range(12)))
        store.write(table, 0, x[0])
        assert store.pages() is None
        assert store.for_search().pages() is None
        paged.append(PagedTensor(store, [table], 96))
    problem = replace(make_problem(q, k, v), k=paged[0], v=paged[1])
    assert choice.backend_of(problem, small()) == "torch"
    result = attend(problem, small(), None, DecodeState())
    assert (result.path, result.reason) == ("sparse", "")
    assert self_test.asked == []
    with pytest.raises(ValueError, match="not one piece of device memory"):
        attend(problem, small(backend="triton"))


def test_a_compiled_graph_asks_once_when_it_is_made(self_test: SelfTest) -> None:
    q, k, v = (x.to(DEVICE) for x in make_qkv(64, 20))
    config = small()
    compiled = torch.compile(
        lambda q, k, v: hip_hf.hip_attention(q, k, v, config=config),
        backend="eager",
        fullgraph=True,
    )
    with torch.no_grad():
        got = compiled(q, k, v)
        want = hip_hf.hip_attention(q, k, v, config=replace(config, backend="torch"))
    assert_near(got.cpu(), want.cpu(), 2e-5)
    assert self_test.asked == ["sparse"]
    assert self_test.heads == [Heads(q.dtype, q.shape[3], v.shape[3], q.shape[1] // k.shape[1])]


def test_explain_says_why_a_model_is_dense(self_test: SelfTest) -> None:
    self_test.found = WRONG
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    model.set_attn_implementation("hip")
    configure(model, small(dense_layers=0))
    with torch.no_grad(), pytest.warns(UserWarning, match="the self-test of the kernels failed"):
        model(torch.arange(100)[None] % 64)
    for row in explain(model):
        assert (row.path, row.reason) == (
            "dense",
            f"no kernels: the self-test of the kernels failed (prompt: {WRONG.problem})",
        )
