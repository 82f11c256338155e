"""A compiled decode step with a static cache and the kernels: a CUDA graph could replay it, and its
numbers are those without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import make_batch, make_model, paths
from interpreter import DEVICE, interpreter
from transformers import StaticCache
from transformers.masking_utils import causal_mask_function

from hip_hf import DecodeState, HiPConfig, hip_attention
from hip_hf.backends.triton.common.sequences import Sequences
from hip_hf.backends.triton.selection.search import SelectionBuffers
from hip_hf.integration import in_graph
from hip_hf.integration.in_graph import table_of
from hip_hf.integration.masks import hip_mask, mask_spans

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not in_graph._TAGS, reason="PyTorch before 2.9 breaks graphs at attention"),
    pytest.mark.skipif(
        DEVICE != "cpu",
        reason="the models of this file are on the CPU, where only the interpreter runs kernels",
    ),
]

LENGTHS, ROOM, STEPS, REFRESH = [64, 37], 16, 4, 2


@pytest.fixture(autouse=True)
def afresh(threads: Callable[[int], None]) -> Iterator[None]:
    threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Of each launch all that a CUDA graph would hold: kernel, grid, numbers, and shapes and
    strides of tensors."""
    noted: list[tuple[Any, ...]] = []
    run = interpreter.InterpretedFunction.run

    def noting(kernel: Any, *args: Any, grid: Any, **kwargs: Any) -> Any:
        given = [*args, *(kwargs[name] for name in sorted(kwargs))]
        noted.append(
            (
                kernel.__name__,
                grid,
                *((x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in given),
            )
        )
        return run(kernel, *args, grid=grid, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", noting)
    return noted


def test_a_step_is_the_same_launches_whatever_is_due(launches: list[tuple[Any, ...]]) -> None:
    """Dense and sparse layers, a padded batch, steps that select and steps that do not, through one
    graph without an operator that CUDA graphs must leave out. The keys selected, and the logits,
    are those of plain steps; one of these can follow."""
    model = make_model("llama", backend="triton", decode_refresh=REFRESH, dense_layers=1)
    graphs: list[torch.fx.GraphModule] = []

    def once(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    forward = torch.compile(model, backend=once, fullgraph=True)
    batch, caches = make_batch(LENGTHS), []
    for _ in range(2):
        caches.append(StaticCache(config=model.config, max_cache_len=LENGTHS[0] + ROOM))
        with torch.no_grad():
            model(**batch, past_key_values=caches[-1])
    assert paths(model) == ["dense", "sparse"]
    # of all slots: a mask that grows would be a graph that is made anew
    mask, seen = (
        torch.cat([batch["attention_mask"], torch.ones(2, ROOM, dtype=torch.long)], dim=1),
        [],
    )
    for step in range(STEPS + 1):
        given = {"input_ids": torch.tensor([[5 + step], [6 + step]]), "attention_mask": mask}
        given["position_ids"] = torch.tensor(LENGTHS)[:, None] + step
        with torch.no_grad():
            launches.clear()
            got = (forward if step < STEPS else model)(**given, past_key_values=caches[0]).logits
            seen.append(list(launches))
            want = model(**given, past_key_values=caches[1]).logits
        torch.testing.assert_close(got, want)
        kept = [cache.layers[1].hip_state.device.selection for cache in caches]
        assert torch.equal(kept[0].indices, kept[1].indices)
        assert kept[0].made[:, 0, 0].tolist() == [
            length + step // REFRESH * REFRESH for length in LENGTHS
        ]
    (graph,) = graphs
    operators = [
        node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    ]
    assert torch.ops.hip_hf.decode_step.default in operators
    assert not any(torch.Tag.cudagraph_unsafe in operator.tags for operator in operators)
    assert all(step == seen[0] for step in seen[1:STEPS])
    assert seen[0]


@pytest.mark.parametrize("filled", [5, 9])
def test_the_device_reads_masks_as_the_host_does(filled: int) -> None:
    """Left padding, none, a row without a key, and slots of a static cache that nothing fills
    yet."""
    padding = torch.ones(3, filled, dtype=torch.long)
    padding[0, :4], padding[1] = 0, 0
    mask = hip_mask(
        3,
        1,
        9,
        torch.tensor(filled - 1),
        0,
        causal_mask_function,
        torch.nn.functional.pad(padding, (0, 9 - filled)),
    )
    table, holes = table_of(mask)
    want = Sequences.of(mask_spans(mask, 1), torch.device("cpu")).table
    assert table[3].tolist() == [1, 0, 1]
    assert torch.equal(table[:, [0, 2]], want)
    assert not holes.any()


def test_the_device_finds_holes() -> None:
    padding = torch.ones(3, 9, dtype=torch.long)
    padding[0, 4:6], padding[1, :6], padding[2, 0] = 0, 0, 0
    padding[2, 7] = 0
    mask = hip_mask(3, 1, 9, 8, 0, causal_mask_function, padding)
    assert mask_spans(mask, 1) is None
    assert table_of(mask)[1].tolist() == [True, False, True]


def test_a_crop_reaches_what_a_graph_has_added() -> None:
    """The host knows nothing of a graph's steps, whose keys are not those that come in their
    place."""
    state, config = (
        DecodeState(),
        HiPConfig(**{**make_model("llama", backend="triton").config.hip, "window": 8}),
    )
    q, k, v = (torch.randn(1, heads, 64, 16) for heads in (4, 2, 2))
    hip_attention(q, k, v, config=config, state=state)
    state.device.pyramid.built.fill_(9)
    state.device.selection.made.fill_(70)
    state.crop(64)
    assert state.rows[0].position == 64
    assert state.device.pyramid.built.max() == 64 // config.block_k
    assert (state.device.selection.made == SelectionBuffers.NEVER).all()
