"""Models in `torch.compile`: attention breaks no graph, and gives what it gives without one, with
the state beside the cache."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from transformers import CompileConfig, PreTrainedModel, StaticCache

import hip_hf
from hip_hf.integration import in_graph, masks
from hip_hf.integration.attention_function import attention_forward
from hip_hf.state import _states

pytestmark = pytest.mark.skipif(
    not in_graph._TAGS, reason="PyTorch before 2.9 breaks graphs at attention"
)

PROMPT, STEPS, REFRESH = 120, 5, 2
IDS = make_batch([PROMPT])["input_ids"]


@pytest.fixture(autouse=True)
def afresh(threads: Callable[[int], None]) -> Iterator[None]:
    threads(1)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # which are the process's
    yield
    torch._dynamo.reset()


def filled(model: PreTrainedModel, **batch: torch.Tensor) -> StaticCache:
    """A static cache with room for more than the prompt that it holds."""
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + 40)
    with torch.no_grad():
        model(**(batch or {"input_ids": IDS}), past_key_values=cache)
    return cache


def compiled(model: PreTrainedModel) -> Any:
    """The model as one graph, traced whole but not lowered: that needs a C++ compiler. A second one
    would be an error."""
    graphs: list[torch.fx.GraphModule] = []

    def once(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        assert len(graphs) == 1, "compiled again"
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    return torch.compile(model, backend=once, fullgraph=True)


def decoded(
    model: PreTrainedModel, forward: Any, cache: StaticCache
) -> tuple[list[torch.Tensor], list[int]]:
    """Logits of some steps, and for which position each of them had selected."""
    logits, selected = [], []
    for step in range(STEPS):
        with torch.no_grad():
            logits.append(forward(IDS[:, step : step + 1], past_key_values=cache).logits)
        assert paths(model) == ["sparse", "sparse"]
        assert {row.cache for row in hip_hf.explain(model)} == {"kept state"}
        selected += {made_for(layer.hip_state) for layer in cache.layers}
    return logits, selected


def made_for(state: hip_hf.DecodeState) -> int:
    """The position that the selection was made for; where kernels keep it the device knows, and the
    host need not."""
    if state.device is None:
        return state.rows[0].selection.position
    (position,) = set(state.device.selection.made.flatten().tolist())
    return position


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def test_attention_breaks_no_graph(backend: str, patched: bool) -> None:
    model = make_model("llama", backend=backend)
    if patched:
        hip_hf.patch(model)
    cache = filled(model)
    with torch.no_grad():
        found = torch._dynamo.explain(lambda ids: model(ids, past_key_values=cache).logits)(
            IDS[:, :1]
        )
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    operator = torch.ops.hip_hf.layer if backend == "torch" else torch.ops.hip_hf.decode_step
    assert [node.target for node in found.graphs[0].graph.nodes].count(operator.default) == 2


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.kernels)])
def test_a_compiled_step_gives_what_a_plain_one_gives(backend: str) -> None:
    """It is sparse, and selects anew when that is due. The graph serves every cache of its
    shape."""
    model = make_model("llama", backend=backend, decode_refresh=REFRESH)
    forward = compiled(model)
    for _ in range(2):
        got, selected = decoded(model, forward, filled(model))
        want, expected = decoded(model, model, filled(model))
        assert all(map(torch.equal, got, want))
        assert selected == expected == [PROMPT + step // REFRESH * REFRESH for step in range(STEPS)]


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_compiled_prompt_gives_what_a_plain_one_gives(chunks: int) -> None:
    """It is sparse, all at once or in chunks, and a later step goes on from it. No settings had
    been looked at before."""
    model = make_model("llama", decode_refresh=REFRESH)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    caches = [StaticCache(config=model.config, max_cache_len=PROMPT + 40) for _ in range(2)]
    for ids in IDS.chunk(chunks, dim=1):
        with torch.no_grad():
            got = forward(ids, past_key_values=caches[0]).logits
            assert paths(model) == ["sparse", "sparse"]
            want = model(ids, past_key_values=caches[1]).logits
        assert torch.equal(got, want)
    assert [layer.hip_state.rows[0].position for layer in caches[0].layers] == [PROMPT, PROMPT]
    assert torch.equal(*(model(IDS[:, :1], past_key_values=cache).logits for cache in caches))


def test_settings_are_looked_at_as_a_graph_is_made() -> None:
    model = make_model("llama")
    model.config.hip["budget"] = -3
    cache = StaticCache(config=model.config, max_cache_len=PROMPT)
    with pytest.raises(Exception, match=r"HiPConfig.budget: got -3, allowed"):
        torch.compile(model, backend="eager")(IDS, past_key_values=cache)
    assert not cache.layers[0].is_initialized


@pytest.mark.parametrize(
    "settings", [{}, {"delta": 16}], ids=["sparse", "dense where gradients are asked for"]
)
def test_gradients_break_no_graph(settings: dict[str, Any]) -> None:
    """They are those without a graph, to the bit; padding is read in the backward pass as well."""
    model, batch = make_model("llama", **settings), make_batch([PROMPT, 71])

    def learnt(forward: Any) -> tuple[torch.Tensor, ...]:
        model.zero_grad()
        logits = forward(**batch, use_cache=False).logits
        (logits * batch["attention_mask"][..., None]).square().sum().backward()
        return logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())

    got = learnt(compiled(model))
    assert paths(model) == [("dense" if settings else "sparse")] * 2
    assert all(map(torch.equal, got, learnt(model)))


def test_a_hip_cache_breaks_graphs_a_known_number_of_times() -> None:
    """Where it is updated: four frames of each layer are left for that. More would be places within
    that Dynamo cannot follow."""
    model = make_model("llama")
    cache, other = (hip_hf.HiPCache(model.config) for _ in range(2))
    with torch.no_grad():
        found = torch._dynamo.explain(lambda ids: model(ids, past_key_values=cache).logits)(IDS)
        assert found.graph_break_count == 4 * 2
        assert all("outside_of_graphs" in reason.reason for reason in found.break_reasons)
        model(IDS, past_key_values=other)
        step = torch.compile(model, backend="eager")(IDS[:, :1], past_key_values=cache).logits
        assert paths(model) == ["sparse", "sparse"]
        assert torch.equal(step, model(IDS[:, :1], past_key_values=other).logits)


def test_a_copy_of_a_cache_goes_on_by_itself() -> None:
    model = make_model("llama", decode_refresh=REFRESH)
    forward, cache = compiled(model), filled(model)
    other = copy.deepcopy(cache)
    want, _ = decoded(model, forward, cache)
    got, _ = decoded(model, forward, other)
    assert all(map(torch.equal, got, want))


def padded_step(*lengths: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two prompts, padded on the left, and what the step after them is called with."""
    batch = make_batch(list(lengths))
    step = {"input_ids": torch.tensor([[5], [6]]), "position_ids": torch.tensor(lengths)[:, None]}
    step["attention_mask"] = torch.cat(
        [batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1
    )
    return batch, step


def test_a_compiled_step_reads_padding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a layer: on a GPU the host waits for what it reads. Each forward reads anew, also of
    a second model between."""
    waits = []
    monkeypatch.setattr(
        masks, "_extents", lambda mask, own=masks._extents: waits.append(1) or own(mask)
    )
    models = [make_model("llama"), make_model("qwen3")]
    forwards = [compiled(model) for model in models]
    for model in models:  # what stands in its masks' functions is known by then
        filled(model)
    for lengths in ((PROMPT, 71), (PROMPT, 93), (PROMPT, 71)):
        batch, step = padded_step(*lengths)
        for model, forward in zip(models, forwards, strict=True):
            with torch.no_grad():
                want = model(**step, past_key_values=filled(model, **batch)).logits
                cache = filled(model, **batch)
                waits.clear()
                got = forward(**step, past_key_values=cache).logits
            assert len(waits) == 1
            assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_that_compiles_its_steps(family: str) -> None:
    """Its masks are made outside of the graph, for sliding windows as well."""
    model = make_model(family, decode_refresh=REFRESH)
    graph = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    graph._compile_all_devices = True
    fixed = dict(do_sample=False, max_new_tokens=STEPS, cache_implementation="static")
    want = model.generate(IDS, **fixed, disable_compile=True)
    assert torch.equal(model.generate(IDS, **fixed, compile_config=graph), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_numbers_keep_no_state_alive() -> None:
    gc.collect()
    before = len(_states)
    state = hip_hf.DecodeState()
    assert len(_states) == before + 1
    del state
    gc.collect()
    assert len(_states) == before


@pytest.mark.parametrize("causal", [True, False])
def test_a_layer_may_give_its_mask_by_name(causal: bool) -> None:
    """As the attention of some models of Transformers does."""
    module = make_model("llama").model.layers[0].self_attn
    heads = [module.config.num_attention_heads, *[module.config.num_key_value_heads] * 2]
    given = [torch.randn(1, count, PROMPT, module.head_dim) for count in heads]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return attention_forward(module, *tensors, attention_mask=None, is_causal=causal)[0]

    with torch.no_grad():
        want = attend(*given)
        got = torch.compile(attend, backend="eager", fullgraph=True)(*given)
    assert torch.equal(got, want)
