"""Continuous batching: the tokens of the ordinary path, read through the pages of Transformers' own cache."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import make_batch, make_model
from helpers import assert_near, make_problem, make_qkv, small
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hip_hf
from hip_hf.attention import attend
from hip_hf.integration import paged
from hip_hf.problem import AttentionProblem

LENGTHS = [40, 7, 85, 23, 61, 12, 150, 33]
PAGE = 16


def prompts() -> list[list[int]]:
    return [make_batch([length], seed)["input_ids"][0].tolist() for seed, length in enumerate(LENGTHS)]


def batched(model: PreTrainedModel, given: list[list[int]], new: int = 8, **sizes: int) -> list[list[int]]:
    """Few tokens a call, so that prompts are split and wait for each other."""
    sizes = {"num_blocks": 64, "max_batch_tokens": 64, **sizes}
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    found = model.generate_batch(given, config, ContinuousBatchingConfig(**sizes), progress_bar=False)
    return [found[name].generated_tokens for name in sorted(found, key=lambda name: int(name.rsplit("_", 1)[-1]))]


def arriving(model: PreTrainedModel, given: list[list[int]], new: int = 8) -> list[list[int]]:
    """Three requests at first, and the next whenever one has finished: prompts and single tokens in the same calls."""
    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=sizes) as manager:
        for i, prompt in enumerate(given):
            if i >= 3:
                done = manager.get_result(timeout=60)
                found[done.request_id] = done.generated_tokens
            manager.add_request(prompt, request_id=str(i), max_new_tokens=new + i % 3)
        while len(found) < len(given):
            done = manager.get_result(timeout=60)
            found[done.request_id] = done.generated_tokens
    return [found[str(i)][:new] for i in range(len(given))]


def alone(model: PreTrainedModel, given: list[list[int]], new: int = 8) -> list[list[int]]:
    out = []
    for prompt in given:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new)
        out.append(made[0, len(prompt) :].tolist())
    return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Path, query rows and keys of every request that attends in continuous batching."""
    seen: list[tuple[str, int, int]] = []

    def watched(problem: AttentionProblem, *args: Any) -> Any:
        result = attend(problem, *args)
        seen.append((result.path, problem.q.shape[2], problem.k.shape[2]))
        return result

    monkeypatch.setattr(paged, "attend", watched)
    return seen


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_tokens_equal_the_ordinary_path(family: str, calls: list[tuple[str, int, int]]) -> None:
    """With a covering budget: how prompts are split is the scheduler's affair. Through the sparse code."""
    model = make_model(family, budget=1024)
    expected = alone(model, prompts())
    assert batched(model, prompts()) == expected
    assert arriving(model, prompts()) == expected
    assert {row.cache for row in hip_hf.explain(model)} == {"continuous batching"}
    found = {path for path, _, _ in calls}
    assert found == {"llama": {"sparse"}, "qwen3": {"sparse"}, "mistral": {"dense"}, "gemma2": {"dense", "sparse"}}[family]
    if found != {"dense"}:  # single tokens against a context, parts of prompts against one, and whole prompts
        kinds = {(rows == 1, rows == keys) for path, rows, keys in calls if path == "sparse"}
        assert {(True, False), (False, True)} <= kinds
        assert (False, False) in kinds


def test_nothing_is_kept_for_requests_that_are_done() -> None:
    """Their summaries are as long as they were, and their last pages may wait long for another request."""
    model, seen = make_model("llama", budget=1024), set[int]()
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    with model.continuous_batching_context_manager(generation_config=config, continuous_batching_config=sizes) as manager:
        names = [manager.add_request(prompt, max_new_tokens=8) for prompt in prompts()]
        for _ in names:
            assert manager.get_result(timeout=60) is not None
            seen |= {id(kept.state) for states in manager.batch_processor.cache._hip_states.values() for kept in states.values()}
        states = manager.batch_processor.cache._hip_states
    assert len(states) == model.config.num_hidden_layers
    assert seen  # of those that were still at work
    assert not any(states.values())


def test_prompts_share_a_prefix_and_go_their_own_ways(calls: list[tuple[str, int, int]]) -> None:
    """The pages of a prefix that was read before are read again, by requests that never wrote them."""
    prefix = make_batch([600], 7)["input_ids"][0].tolist()
    given = [prefix + own for own in prompts()[:3]]
    model = make_model("llama", budget=1024)
    expected = alone(model, given, 5)
    assert batched(model, given, 5, num_blocks=128, max_batch_tokens=704) == expected
    read = [rows for path, rows, _ in calls if rows > 1]
    assert {path for path, _, _ in calls} == {"sparse"}
    assert 2 * sum(map(len, given)) - sum(read) >= 2 * 512  # in both layers one request at least did not read its prefix


def test_generate_by_name_goes_through_pages(calls: list[tuple[str, int, int]]) -> None:
    model = make_model("llama", budget=1024)
    ids = make_batch([60])["input_ids"].repeat(2, 1)
    ids[1] = ids[1].flip(0)
    expected = [list(prompt) + made for prompt, made in zip(ids.tolist(), alone(model, ids.tolist(), 5), strict=True)]
    sizes = ContinuousBatchingConfig(num_blocks=24, max_batch_tokens=64)
    options: dict[str, Any] = dict(cache_implementation="paged", do_sample=False, max_new_tokens=5)
    made = model.generate(ids, continuous_batching_config=sizes, **options)
    assert made.view(2, -1).tolist() == expected
    assert {path for path, _, _ in calls} == {"sparse"}


def test_a_cache_of_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="cache: got object of an unknown layout"):
        paged.find_place(object(), 0)


class Pages:
    """A layer of Transformers' paged cache, and requests that write to it. Keys and values are as given, to be looked up."""

    def __init__(self, pages: int = 40) -> None:
        self.keys, self.values = (torch.full((pages * PAGE, 2, 8), torch.nan, dtype=torch.float64) for _ in range(2))
        allocator = SimpleNamespace(
            layer_type="full_attention", index=0, tokens_per_page=PAGE, _kv_token_views={0: (self.keys, self.values)}
        )
        self.cache = SimpleNamespace(layer_to_allocator={0: allocator})
        self.config = small(decode_refresh=4, dense_layers=0)

    def call(self, *requests: tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Pages, q `[1, 4, new, 8]`, and all keys and values `[1, 2, T, 8]` of each request; the outputs."""
        read, write, rows, keys = [], [], [0], [0]
        for pages, q, k, _ in requests:
            tokens = [page * PAGE + offset for page in pages for offset in range(PAGE)][: k.shape[2]]
            read += tokens
            write += tokens[k.shape[2] - q.shape[2] :]
            rows.append(rows[-1] + q.shape[2])
            keys.append(keys[-1] + k.shape[2])
        q = torch.cat([q for _, q, _, _ in requests], 2)
        k, v = (torch.cat([r[i][:, :, r[i].shape[2] - r[1].shape[2] :] for r in requests], 2) for i in (2, 3))
        problem = AttentionProblem(q, k, v, (), q.shape[-1] ** -0.5, None, None, None)
        indices = {"read_index": [torch.tensor(read)], "write_index": [torch.tensor(write)]}
        lengths = {"cu_seq_lens_q": torch.tensor(rows), "cu_seq_lens_k": {"full_attention": torch.tensor(keys)}}
        out = paged.continuous(problem, self.config, 0, self.cache, {**indices, **lengths}).out
        return list(out.split([q.shape[2] for _, q, _, _ in requests], 2))


def request(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return make_qkv(tokens, None, dim=8, dtype=torch.float64)


def stateless(pages: Pages, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int) -> torch.Tensor:
    return attend(make_problem(q[:, :, -rows:], k, v), pages.config).out


def part(pages: list[int], x: tuple[torch.Tensor, ...], first: int, end: int) -> tuple[Any, ...]:
    q, k, v = x
    return pages, q[:, :, first:end], k[:, :, :end], v[:, :, :end]


def test_a_selection_serves_the_steps_after_it_in_mixed_calls() -> None:
    """Two requests in scattered pages, one deep in decode while the other still reads its prompt."""
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


@pytest.mark.parametrize("parts", [(300,), (37, 101, 164, 300), (16, 32, 48, 64, 300), (150, 299, 300)])
def test_beyond_a_covering_budget_split_prompts_lose_no_quality(parts: tuple[int, ...]) -> None:
    """However a prompt is split, and decoded after: no farther from dense attention than the prompt at once, statelessly."""
    there, (q, k, v) = Pages(), request(320)
    q, pages = 4 * q, list(range(20))  # a few keys matter
    got = [there.call(part(pages, (q, k, v), first, end))[0] for first, end in pairwise([0, *parts, *range(301, 321)])]
    whole = attend(make_problem(q, k, v), there.config).out
    exact = attend(make_problem(q, k, v), small(dense_layers=1), layer=0)
    assert exact.path == "dense"
    split, at_once = ((out - exact.out).square().mean() for out in (torch.cat(got, 2), whole))
    assert at_once > 0.01 * exact.out.square().mean()  # the budget prunes
    assert split <= 1.05 * at_once


@pytest.mark.parametrize("through", ["passing", "copied", "own"])
def test_state_dies_with_its_page(through: str) -> None:
    """A request's last token lies at the end of a page; then its pages are another's, whose key at that place is the same.

    `passing`: the other wrote them in one go and lies elsewhere by now; a third shares the prefix. `copied`: they were
    filled without attention, into a row of other pages. `own`: the other is itself the one to continue.
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
