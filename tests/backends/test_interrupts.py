"""Interrupts and failures in the middle of a call, threads that share a model, and processes that
were forked or spawned.

After an interrupt the next call is right, or it says that a new cache is needed.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import multiprocessing
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from fuzz_cases import refused
from helpers import make_qkv, small
from transformers import PreTrainedModel

from hip_hf import DecodeState, HiPCache, hip_attention, workers

PROMPT, POINTS = 100, 15  # tokens; places in a call where it is interrupted
FILES = ("hip_hf", "transformers/models", "transformers/cache_utils")


def step(model: PreTrainedModel, ids: torch.Tensor, cache: Any, rows: int) -> torch.Tensor:
    """The next tokens, as far as the cache says that they have not been read."""
    at = cache.get_seq_length()
    with torch.no_grad():
        return model(ids[:, at : at + rows], past_key_values=cache).logits


def at_line(number: int | None, error: type[BaseException], call: Callable[[], Any]) -> int:
    """The lines of our own and of the model's code that `call` runs; `error` comes before the line
    of that number, if any."""
    count = 0

    def line(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == number:
                raise error("interrupted")
        return line

    def entered(frame: FrameType, event: str, argument: Any) -> Any:
        return line if any(name in frame.f_code.co_filename for name in FILES) else None

    before = sys.gettrace()
    sys.settrace(entered)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize(
    ("family", "refresh", "rows"),
    [("llama", 1, 1), ("llama", 4, 1), ("gemma2", 4, 1), ("llama", 1, 20)],
)
def test_a_call_that_is_interrupted_anywhere(
    family: str, refresh: int, rows: int, error: type[BaseException], threads: Callable[[int], None]
) -> None:
    threads(1)  # so that all of it runs in this thread
    model, ids = make_model(family, decode_refresh=refresh), make_batch([PROMPT + 200])["input_ids"]
    ready = HiPCache(model.config)
    for count in (PROMPT, 1):  # so that there is a selection, which the next steps use
        step(model, ids, ready, count)
    spare = copy.deepcopy(ready)
    lines = at_line(None, error, lambda: step(model, ids, spare, rows))
    for number in range(7, lines, lines // POINTS):
        cache = copy.deepcopy(ready)
        with contextlib.suppress(
            error, ValueError
        ):  # which may say at once that a new cache is needed
            at_line(number, error, lambda cache=cache: step(model, ids, cache, rows))  # type: ignore[misc]
        lengths = {layer.get_seq_length() for layer in cache.layers}
        got, why = refused(lambda cache=cache: step(model, ids, cache, rows))  # type: ignore[misc]
        if got is None:
            assert why.startswith("past_key_values: got a cache ")
            assert why.endswith("allowed: `reset()` before it is used again, or a new one")
            continue
        assert len(lengths) == 1
        wants = []
        for forgets in itertools.product(
            (False, True), repeat=len(ready.paged)
        ):  # each layer keeps its selection, or makes it anew
            twin = copy.deepcopy(ready)
            while twin.get_seq_length() < max(lengths):
                step(model, ids, twin, rows)
            for layer in itertools.compress(twin.paged, forgets):
                layer.hip_state.reset()
            wants.append(step(model, ids, twin, rows))
        assert any(torch.equal(got, want) for want in wants), f"line {number} of {lines}"


def test_a_state_that_an_interrupt_met_starts_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    from hip_hf.methods.pyramid import Pyramid

    q, k, v = make_qkv(151)
    config, state, twin = small(decode_refresh=1), DecodeState(), DecodeState()
    for one in (state, twin):
        hip_attention(q[:, :, :120], k[:, :, :120], v[:, :, :120], config=config, state=one)
    write, calls = Pyramid._write, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:  # one level has the new block, the next has not
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(Pyramid, "_write", interrupted)
    rows = (q[:, :, 120:], k, v)
    with pytest.raises(KeyboardInterrupt):
        hip_attention(*rows, config=config, state=state)
    monkeypatch.undo()
    assert torch.equal(
        hip_attention(*rows, config=config, state=state),
        hip_attention(*rows, config=config, state=twin),
    )  # type: ignore[arg-type]


def test_workers_that_fail_leave_none_running() -> None:
    """Nothing writes any more when the error arrives."""
    started, going = threading.Event(), threading.Event()
    done: list[int] = []

    def task(item: int) -> None:
        if item == 0:
            started.wait(10)
            raise MemoryError("no memory")
        started.set()
        going.wait(0.3)
        done.append(item)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="no memory"):
            workers.run(task, range(20), torch.device("cpu"))
        count = len(done)
        assert count < 19  # the rest never began
        going.wait(0.5)
        assert len(done) == count
    finally:
        torch.set_num_threads(before)


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that run at the same time."""
    results: list[Any] = [None] * len(calls)

    def call(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    running = [threading.Thread(target=call, args=(i,)) for i in range(len(calls))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_threads_with_different_numbers_of_workers() -> None:
    """Neither shuts down the workers of the other."""

    def many(size: int) -> int:
        torch.set_num_threads(size)  # of this thread
        done: list[int] = []
        for _ in range(150):
            workers.run(done.append, range(4), torch.device("cpu"))
        return len(done)

    assert in_threads(lambda: many(2), lambda: many(3), lambda: many(2)) == [600, 600, 600]


def generated(model: PreTrainedModel, seed: int) -> torch.Tensor:
    batch = make_batch([PROMPT], seed)
    return model.generate(**batch, max_new_tokens=12, do_sample=False)


def test_threads_that_share_a_model() -> None:
    model = make_model("llama")
    alone = [generated(model, seed) for seed in range(3)]
    together = in_threads(*(lambda seed=seed: generated(model, seed) for seed in range(3)))  # type: ignore[misc]
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


def test_interleaved_generations() -> None:
    """Steps of several texts in turn, through one model, each on its cache."""
    model = make_model("llama")
    texts = [make_batch([PROMPT + 12], seed)["input_ids"] for seed in range(3)]

    def steps(ids: torch.Tensor, cache: HiPCache) -> Any:
        yield step(model, ids, cache, PROMPT)
        for _ in range(10):
            yield step(model, ids, cache, 1)

    alone = [list(steps(ids, HiPCache(model.config))) for ids in texts]
    together = zip(*(steps(ids, HiPCache(model.config)) for ids in texts), strict=True)
    for i, logits in enumerate(together):
        assert all(torch.equal(got, want[i]) for got, want in zip(logits, alone, strict=True))


def in_child(method: str, target: Callable[..., None], *args: Any) -> Any:
    """What a child process puts into the queue that it gets besides; None if nothing came."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=target, args=(queue, *args))
    child.start()
    try:
        return queue.get(timeout=60 if method == "spawn" else 10)
    except Exception:
        return None
    finally:
        child.kill()
        child.join()


def work(queue: Any) -> None:
    done: list[int] = []
    torch.set_num_threads(2)
    workers.run(done.append, range(4), torch.device("cpu"))
    queue.put(sorted(done))


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="a system without fork"
)
def test_a_forked_process_has_workers_of_its_own() -> None:
    """Also where another thread was just making some as it was forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    workers.run(lambda item: None, range(4), torch.device("cpu"))
    torch.set_num_threads(before)
    with workers._lock:
        assert in_child("fork", work) == [0, 1, 2, 3]


def generate_in_child(queue: Any, model: PreTrainedModel) -> None:
    queue.put(generated(model, 0).tolist())


def test_a_model_in_a_spawned_process() -> None:
    model = make_model("llama")
    assert in_child("spawn", generate_in_child, model) == generated(model, 0).tolist()
