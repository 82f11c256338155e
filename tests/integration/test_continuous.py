"""Continuous batching: the tokens of the ordinary path, read through the pages of Transformers' own
cache."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from continuous import alone, batched, prompts
from families import FAMILIES, PATCHED, make_batch, make_model
from helpers import assert_near, make_problem, make_qkv, small
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hip_hf
from hip_hf.attention import attend
from hip_hf.integration import continuous_batching
from hip_hf.problem import AttentionProblem

PAGE = 16

# Bounds of requests, their pages, and whether the keys of their last tokens are still what they
# were.
READS_A_FORWARD = 3


def arriving(model: PreTrainedModel, given: list[list[int]], new: int = 8) -> list[list[int]]:
    """Three requests at first, and the next whenever one has finished: prompts and single tokens in
    the same calls."""
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=sizes
    ) as manager:
        for i, prompt in enumerate(given):
            if i >= 3:
                done = manager.get_result(timeout=60)
                found[done.request_id] = done.generated_tokens
            manager.add_request(prompt, request_id=str(i), max_new_tokens=new + i % 3)
        while len(found) < len(given):
            done = manager.get_result(timeout=60)
            found[done.request_id] = done.generated_tokens
    return [found[str(i)][:new] for i in range(len(given))]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Path, query rows and keys of every request that attends in continuous batching."""
    seen: list[tuple[str, int, int]] = []

    def watched(problem: AttentionProblem, *args: Any) -> Any:
        result = attend(problem, *args)
        seen.append((result.path, problem.q.shape[2], problem.k.shape[2]))
        return result

    monkeypatch.setattr(continuous_batching, "attend", watched)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_tokens_equal_the_ordinary_path(family: str, calls: list[tuple[str, int, int]]) -> None:
    """With a covering budget: how prompts are split is the scheduler's affair. Through the sparse
    code."""
    model = make_model(family, budget=1024)
    expected = alone(model, prompts())
    assert batched(model, prompts()) == expected
    assert arriving(model, prompts()) == expected
    assert {row.cache for row in hip_hf.explain(model)} == {"continuous batching"}
    found = {path for path, _, _ in calls}
    assert (
        found
        == {
            "llama": {"sparse"},
            "qwen3": {"sparse"},
            "mistral": {"dense"},
            "gemma2": {"dense", "sparse"},
        }[family]
    )
    if found != {
        "dense"
    }:  # single tokens against a context, parts of prompts against one, and whole prompts
        kinds = {(rows == 1, rows == keys) for path, rows, keys in calls if path == "sparse"}
        assert {(True, False), (False, True)} <= kinds
        assert (False, False) in kinds


class Operations(TorchDispatchMode):
    """Operations whose result depends on numbers that a device holds: the host waits for it."""

    WAITING = ("_local_scalar_dense", "equal", "nonzero", "_unique2", "unique_dim", "masked_select")

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen += [name] * (name in self.WAITING)
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Copies to the host, which on a CPU are no operations."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += [func.__name__] * (func.__name__ in ("tolist", "cpu", "numpy"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, list[str]]]:
    """Of every call of a layer: the layer, its requests, and what it read on the host, attention
    and Transformers aside."""
    done: list[tuple[int, int, list[str]]] = []
    ours = continuous_batching.continuous

    def counted(problem: Any, config: Any, layer: int, cache: Any, kwargs: dict[str, Any]) -> Any:
        seen: list[str] = []
        with Operations(seen), Methods(seen):
            result = ours(problem, config, layer, cache, kwargs)
        done.append((layer, len(kwargs["cu_seq_lens_q"]) - 1, seen))
        return result

    def aside(work: Any) -> Any:
        def quiet(*args: Any, **kwargs: Any) -> Any:
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                return work(*args, **kwargs)

        return quiet

    monkeypatch.setattr(continuous_batching, "continuous", counted)
    monkeypatch.setattr(continuous_batching, "attend", aside(attend))
    monkeypatch.setattr(continuous_batching, "_ring", aside(continuous_batching._ring))
    return done


@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("llama", 5), ("gemma2", 4)])
def test_host_reads_are_as_few_whatever_the_layers_and_requests(
    family: str,
    layers: int,
    reads: list[tuple[int, int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = FAMILIES[family].to_dict() | {"num_hidden_layers": layers, "layer_types": None}
    monkeypatch.setitem(PATCHED, family, type(FAMILIES[family])(**config))
    batched(make_model(family, budget=1024), prompts(), new=4)
    forwards = [reads[i : i + layers] for i in range(0, len(reads), layers)]
    assert all([layer for layer, _, _ in forward] == list(range(layers)) for forward in forwards)
    assert max(requests for _, requests, _ in reads) > READS_A_FORWARD
    for forward in forwards:
        seen = [name for _, _, names in forward for name in names]
        assert 0 < len(seen) <= READS_A_FORWARD, seen


def test_requests_that_were_evicted_go_on(
    calls: list[tuple[str, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than the cache holds: some lose their pages to others, and come back to other
    pages."""
    gone: list[str] = []
    forget = continuous_batching._forget_request

    def forgotten(cache: Any, request: str) -> None:
        gone.append(request)
        forget(cache, request)

    monkeypatch.setattr(continuous_batching, "_forget_request", forgotten)
    given, new = [prompt[:30] for prompt in prompts()[::2]], 40
    model = make_model("llama", budget=1024)
    page = (
        "page_size" if hasattr(ContinuousBatchingConfig, "page_size") else "block_size"
    )  # up to 5.17
    assert batched(model, given, new, **{page: PAGE}, num_blocks=12) == alone(model, given, new)
    assert len(gone) > len(given)  # freed more often than they ended
    assert {path for path, _, _ in calls} == {"sparse"}


def test_nothing_is_kept_for_requests_that_are_done() -> None:
    """Their summaries are as long as they were, and their last pages may wait long for another
    request."""
    model, seen = make_model("llama", budget=1024), set[int]()
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=sizes
    ) as manager:
        names = [manager.add_request(prompt, max_new_tokens=8) for prompt in prompts()]
        for _ in names:
            assert manager.get_result(timeout=60) is not None
            seen |= {
                id(kept.state)
                for states in manager.batch_processor.cache._hip_states.values()
                for kept in states.values()
            }
        states = manager.batch_processor.cache._hip_states
    assert len(states) == model.config.num_hidden_layers
    assert seen  # of those that were still at work
    assert not any(states.values())


def test_prompts_share_a_prefix_and_go_their_own_ways(calls: list[tuple[str, int, int]]) -> None:
    """The pages of a prefix that was read before are read again, by requests that never wrote
    them."""
    prefix = make_batch([600], 7)["input_ids"][0].tolist()
    given = [prefix + own for own in prompts()[:3]]
    model = make_model("llama", budget=1024)
    expected = alone(model, given, 5)
    assert batched(model, given, 5, num_blocks=128, max_batch_tokens=704) == expected
    read = [rows for path, rows, _ in calls if rows > 1]
    assert {path for path, _, _ in calls} == {"sparse"}
    assert (
        2 * sum(map(len, given)) - sum(read) >= 2 * 512
    )  # in both layers one request at least did not read its prefix


@pytest.mark.fast
def test_generate_by_name_goes_through_pages(calls: list[tuple[str, int, int]]) -> None:
    model = make_model("llama", budget=1024)
    ids = make_batch([60])["input_ids"].repeat(2, 1)
    ids[1] = ids[1].flip(0)
    expected = [
        list(prompt) + made
        for prompt, made in zip(ids.tolist(), alone(model, ids.tolist(), 5), strict=True)
    ]
    sizes = ContinuousBatchingConfig(num_blocks=24, max_batch_tokens=64)
    options: dict[str, Any] = dict(cache_implementation="paged", do_sample=False, max_new_tokens=5)
    made = model.generate(ids, continuous_batching_config=sizes, **options)
    assert made.view(2, -1).tolist() == expected
    assert {path for path, _, _ in calls} == {"sparse"}


def test_a_cache_of_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="cache: got object of an unknown layout"):
        continuous_batching.find_place(object(), 0)


class Pages:
    """Layers of Transformers' paged cache, and requests that write to it. Keys and values are as
    given, to be looked up.

    Bounds come in buffers that every call fills anew, as Transformers' do, padded with requests
    that bring nothing."""

    def __init__(self, pages: int = 40, layers: int = 1) -> None:
        shape = layers, pages * PAGE, 2, 8
        self.stored = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2)]
        self.keys, self.values = (x[0] for x in self.stored)
        views = dict(enumerate(zip(*self.stored, strict=True)))
        allocator = SimpleNamespace(
            layer_type="full_attention", index=0, tokens_per_page=PAGE, _kv_token_views=views
        )
        self.cache = SimpleNamespace(layer_to_allocator=dict.fromkeys(views, allocator))
        self.config = small(decode_refresh=4, dense_layers=0)
        self.rows, self.lengths = (torch.empty(5, dtype=torch.int32) for _ in range(2))

    def call(
        self, *requests: tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor], layer: int = 0
    ) -> list[torch.Tensor]:
        """Pages, q `[1, 4, new, 8]`, and all keys and values `[1, 2, T, 8]` of each request; the
        outputs."""
        read, write = [], []
        self.rows.zero_()
        self.lengths.zero_()
        for i, (pages, q, k, _) in enumerate(requests):
            tokens = [page * PAGE + offset for page in pages for offset in range(PAGE)][
                : k.shape[2]
            ]
            read += tokens
            write += tokens[k.shape[2] - q.shape[2] :]
            self.rows[i + 1 :] += q.shape[2]
            self.lengths[i + 1 :] += k.shape[2]
        q = torch.cat([q for _, q, _, _ in requests], 2)
        k, v = (
            torch.cat([r[i][:, :, r[i].shape[2] - r[1].shape[2] :] for r in requests], 2)
            for i in (2, 3)
        )
        problem = AttentionProblem(q, k, v, (), q.shape[-1] ** -0.5, None, None, None)
        indices = {"read_index": [torch.tensor(read)], "write_index": [torch.tensor(write)]}
        lengths = {"cu_seq_lens_q": self.rows, "cu_seq_lens_k": {"full_attention": self.lengths}}
        out = continuous_batching.continuous(
            problem, self.config, layer, self.cache, {**indices, **lengths}
        ).out
        return list(out.split([q.shape[2] for _, q, _, _ in requests], 2))


def request(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return make_qkv(tokens, None, dim=8, dtype=torch.float64)


def stateless(
    pages: Pages, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int
) -> torch.Tensor:
    return attend(make_problem(q[:, :, -rows:], k, v), pages.config).out


def part(pages: list[int], x: tuple[torch.Tensor, ...], first: int, end: int) -> tuple[Any, ...]:
    q, k, v = x
    return pages, q[:, :, first:end], k[:, :, :end], v[:, :, :end]


def test_a_selection_serves_the_steps_after_it_in_mixed_calls() -> None:
    """Two requests in scattered pages, one deep in decode while the other still reads its
    prompt."""
    there, a, b = Pages(), request(120), request(150)
    ours, others = [3, 1, 30, 7, 12, 9, 22, 2], [4, 17, 5, 6, 31, 8, 10, 11, 13, 14]
    there.call(part(ours, a, 0, 100))
    first, _ = there.call(part(ours, a, 100, 101), part(others, b, 0, 64))
    state = next(kept.state for kept in there.cache._hip_states[0].values() if kept.pages[0] == 3)
    chosen = state.rows[0].selection
    assert chosen is not None
    assert chosen.position == 100
    for at in range(101, 104):
        there.call(part(ours, a, at, at + 1), part(others, b, at - 37, at - 36))
        assert state.rows[0].selection is chosen
    there.call(part(ours, a, 104, 105))
    assert state.rows[0].selection.position == 104
    assert len(there.cache._hip_states[0]) == 2
    assert first.isfinite().all()


@pytest.mark.parametrize(
    "parts", [(300,), (37, 101, 164, 300), (16, 32, 48, 64, 300), (150, 299, 300)]
)
def test_beyond_a_covering_budget_split_prompts_lose_no_quality(parts: tuple[int, ...]) -> None:
    """However a prompt is split, and decoded after: no farther from dense attention than the prompt
    at once, statelessly."""
    there, (q, k, v) = Pages(), request(320)
    q, pages = 4 * q, list(range(20))  # a few keys matter
    got = [
        there.call(part(pages, (q, k, v), first, end))[0]
        for first, end in pairwise([0, *parts, *range(301, 321)])
    ]
    whole = attend(make_problem(q, k, v), there.config).out
    exact = attend(make_problem(q, k, v), small(dense_layers=1), layer=0)
    assert exact.path == "dense"
    split, at_once = ((out - exact.out).square().mean() for out in (torch.cat(got, 2), whole))
    assert at_once > 0.01 * exact.out.square().mean()  # the budget prunes
    assert split <= 1.05 * at_once


@pytest.mark.parametrize("through", ["passing", "copied", "own"])
def test_state_dies_with_its_page(through: str) -> None:
    """A request's last token lies at the end of a page; then its pages are another's, whose key at
    that place is the same.

    `passing`: the other wrote them in one go and lies elsewhere by now; a third shares the prefix.
    `copied`: they were filled without attention, into a row of other pages. `own`: the other is
    itself the one to continue.
    """
    there = Pages()
    there.config = small(decode_refresh=1, dense_layers=0)
    pages, a, b = list(range(8)), request(128), request(140)
    b[1][:, :, 127] = a[1][:, :, 127]
    there.call(part(pages, a, 0, 128))
    assert len(there.cache._hip_states[0]) == 1
    if through == "passing":
        there.call(part([*pages, 8], b, 0, 136))
    elif through == "own":
        there.call(part(pages, b, 0, 64))
        there.call(part(pages, b, 64, 128))
    else:
        pages = [*range(20, 27), 7]
        for x, stored in ((b[1], there.keys), (b[2], there.values)):
            at = torch.tensor([page * PAGE + offset for page in pages for offset in range(PAGE)])
            stored[at] = x[0, :, :128].transpose(0, 1)
    (out,) = there.call(part([*pages, 9], b, 128, 129))
    q, k, v = (x[:, :, :129] for x in b)
    assert_near(out, stateless(there, q, k, v, 1), 1e-12)


def test_a_forward_that_stopped_halfway_says_nothing_of_the_next() -> None:
    """Told apart by its layers where the tensors are the same, and by its tensors where it begins
    above."""
    there, a, b = Pages(layers=2), request(64), request(80)
    there.call(part([0, 1, 2, 3], a, 0, 64))
    for layer in (0, 1):
        if layer:
            there.rows = there.rows.clone()
        (out,) = there.call(part([9, 4, 8, 5, 7], b, 0, 80), layer=layer)
        assert_near(out, stateless(there, *b, 80), 1e-12)
        assert torch.equal(
            there.stored[0][layer, 7 * PAGE : 8 * PAGE], b[1][0, :, 64:80].transpose(0, 1)
        )
        there.call(part([0, 1, 2, 3], a, 0, 64))
