"""Context extension in models: what must not be mixed up, and what is refused before anything has
changed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from extended_models import SMALL, TRAINED, build, same, turning_back
from families import FAMILIES, SPARSE, make_batch
from patched import attention, forwards, logits
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    StableLmConfig,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaAttention

import hip_hf
from hip_hf.integration import extension

EXTENDED = {**SPARSE, "extend": "streaming"}


CACHES: dict[str, Callable[[Any], Any]] = {
    "paged": hip_hf.HiPCache,
    "dynamic": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=TRAINED),
}


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("dims", [(16, 32), (32, 16)])
def test_models_with_heads_of_other_sizes_in_one_process(
    dims: tuple[int, int], patched: bool
) -> None:
    batch = make_batch([120])
    for dim in dims:
        model = build(LlamaConfig(**{**SMALL, "head_dim": dim}))
        model.set_attn_implementation("eager")
        expected = logits(model, batch)
        model.set_attn_implementation("hip")
        hip_hf.configure(model, budget=104, extend="streaming")
        if not patched:
            turning_back(model)
        same(logits(model, batch), expected)
        assert extension.rope_of(model.config).dim == dim


@pytest.mark.parametrize("factors", [(0.5, 0.25), (0.25, 0.5)])
def test_models_that_rotate_parts_of_other_sizes_in_one_process(
    factors: tuple[float, float],
) -> None:
    for factor in factors:
        config = StableLmConfig(**SMALL, partial_rotary_factor=factor)
        assert extension.rope_of(config).dim == 16 * factor
    assert extension.rope_of(config) is extension.rope_of(copy.deepcopy(config))


@pytest.mark.parametrize("patched", [True, False])
def test_a_config_of_longer_heads_than_the_layers_is_refused(patched: bool) -> None:
    model = build(LlamaConfig(**SMALL), extend="streaming")
    cache = hip_hf.HiPCache(model.config)
    if not patched:
        turning_back(model)
    model.config.head_dim = 32
    with pytest.raises(
        ValueError,
        match="config: got a RoPE that turns 32 numbers of a head, allowed: up to its layers' 16",
    ):
        logits(model, make_batch([40]), past_key_values=cache)
    assert cache.get_seq_length() == 0


def otherwise() -> Iterator[tuple[str, Callable[[Any], None]]]:
    yield "unpatched", hip_hf.unpatch
    yield "sdpa", lambda model: model.set_attn_implementation("sdpa")
    yield "extend=None", lambda model: hip_hf.configure(model, extend=None)
    yield (
        "unpatched, sdpa",
        lambda model: (hip_hf.unpatch(model), model.set_attn_implementation("sdpa")),
    )


@pytest.mark.parametrize("through", ["itself", "a copy", "a pickle"])
@pytest.mark.parametrize("how", [pytest.param(how, id=name) for name, how in otherwise()])
def test_keys_without_rotation_are_not_continued_with_rotated_ones(
    how: Callable[[Any], None], through: str
) -> None:
    """Whatever makes these: the original forward of a patched or of an unpatched layer, with any
    attention."""
    model, batch, more = (
        build(LlamaConfig(**SMALL)),
        make_batch([60]),
        make_batch([3], seed=1)["input_ids"],
    )
    hip_hf.patch(model, extend="streaming")
    cache = hip_hf.HiPCache(model.config)
    logits(model, batch, past_key_values=cache)
    how(model)
    if through != "itself":
        cache = copy.deepcopy(cache) if through == "a copy" else pickle.loads(pickle.dumps(cache))
    with pytest.raises(
        ValueError,
        match=r"got a cache filled with extend='streaming', allowed: with extend=None an empty one",
    ):
        logits(model, {"input_ids": more}, past_key_values=cache)
    assert cache.get_seq_length() == 60
    cache.reset()
    expected = logits(model, {"input_ids": more})
    same(logits(model, {"input_ids": more}, past_key_values=cache), expected)


@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_another_cache_than_ours_is_refused(kind: str, patched: bool) -> None:
    """By a patched layer before it holds anything; without a patcher, where it brings the keys of
    an earlier call."""
    model = build(LlamaConfig(**SMALL), extend="streaming")
    cache, message = (
        CACHES[kind](model.config),
        "got a DynamicCache" if kind == "dynamic" else "got a StaticCache",
    )
    if not patched:
        turning_back(model)
        message = "got another one, whose keys are rotated"
        if kind == "dynamic":  # at its first call it brings no key that the call itself does not
            logits(model, make_batch([60]), past_key_values=cache)
    with pytest.raises(
        ValueError,
        match=rf"past_key_values: {message}, allowed with extend='streaming': a HiPCache",
    ):
        logits(model, {"input_ids": make_batch([3])["input_ids"]}, past_key_values=cache)
    assert not patched or cache.get_seq_length() == 0
    hip_hf.configure(model, extend=None)
    logits(model, make_batch([60]), past_key_values=CACHES[kind](model.config))


def test_layers_before_the_one_that_is_refused() -> None:
    """The first layer slides: it takes rotated keys whatever `extend` says. Its window is not full
    yet."""
    config = Qwen2Config(**SMALL, sliding_window=24, use_sliding_window=True)
    config.layer_types = ["sliding_attention", "full_attention"]
    model, batch = build(config, extend="streaming"), make_batch([20])
    cache, twin = (hip_hf.HiPCache(model.config) for _ in range(2))
    more = {"input_ids": make_batch([1], seed=1)["input_ids"]}
    for one in (cache, twin):
        logits(model, batch, past_key_values=one)
    hip_hf.configure(model, extend=None)
    for message in (
        "got a cache filled with extend='streaming'",
        "that holds a part of a call which failed",
    ):
        with pytest.raises(ValueError, match=message):
            logits(model, more, past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [21, 20]
    cache.reset()
    hip_hf.configure(model, extend="streaming")
    logits(model, batch, past_key_values=cache)
    assert torch.equal(
        logits(model, more, past_key_values=cache), logits(model, more, past_key_values=twin)
    )


ARRIVING = {
    "gemma 3, one layer full": (
        Gemma3TextConfig(
            **SMALL, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
        ),
        "gemma3_text has no patcher",
    ),
    "gpt-oss": (FAMILIES["gpt_oss"], "gpt_oss has no patcher"),
    "dynamic RoPE": (
        LlamaConfig(
            **SMALL, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        ),
        "type 'dynamic'",
    ),
    "too much to read": (
        LlamaConfig(**{**SMALL, "max_position_embeddings": 40}),
        "sink . budget . window: got 56 keys",
    ),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("name", ARRIVING)
def test_settings_that_arrive_with_the_config_are_checked_before_any_layer(
    name: str, kind: str
) -> None:
    config, message = ARRIVING[name]
    config = copy.deepcopy(config)
    config.hip = dict(EXTENDED)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("hip")
    cache = CACHES[kind](model.config)
    touched: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *args: touched.append(1))
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            logits(model, make_batch([100]), past_key_values=cache)
    assert not touched
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [0] * len(cache.layers)
    model.config.hip["extend"] = None
    logits(model, make_batch([100]), past_key_values=cache)


class OwnConfig(LlamaConfig):
    model_type = "llama"


def test_a_config_of_ones_own_that_is_a_llama() -> None:
    batch, found = make_batch([203]), []
    for kind in (LlamaConfig, OwnConfig):
        torch.manual_seed(0)
        model = LlamaForCausalLM(kind(**SMALL)).eval()
        model.set_attn_implementation("hip")
        hip_hf.configure(model, **EXTENDED)
        found.append(logits(model, batch))
    assert torch.equal(*found)


def test_a_config_of_no_model_of_transformers_is_refused() -> None:
    class Foreign(PreTrainedConfig):
        model_type = "llama"

    config = Foreign(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, max_position_embeddings=TRAINED
    )
    with pytest.raises(
        ValueError,
        match="extend: got a model with Foreign, allowed: configs of Transformers' own models",
    ):
        extension.check_extension(hip_hf.HiPConfig(**EXTENDED), config)


def test_configure_that_finds_no_layers_changes_nothing() -> None:
    class OwnAttention(LlamaAttention):
        pass

    model = build(LlamaConfig(**SMALL))
    for layer in model.model.layers:
        layer.self_attn.__class__ = OwnAttention
    before, own = copy.deepcopy(model.config.hip), forwards(model)
    with pytest.raises(ValueError, match="without LlamaAttention"):
        hip_hf.configure(model, extend="streaming")
    assert model.config.hip == before
    assert forwards(model) == own


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors that nobody gives a device are nowhere."""
    before = torch.get_default_device()
    torch.set_default_device("meta")
    yield
    torch.set_default_device(before)


@pytest.mark.parametrize("patched", [True, False])
def test_a_default_device_elsewhere(patched: bool, request: pytest.FixtureRequest) -> None:
    model, batch = (
        build(LlamaConfig(**SMALL), extend="streaming", dense_layers=1),
        make_batch([300]),
    )
    if not patched:
        turning_back(model)
    step = {"input_ids": torch.tensor([[7]])}
    expected, cache = [logits(model, batch)], hip_hf.HiPCache(model.config)
    logits(model, batch, past_key_values=cache)
    expected.append(logits(model, step, past_key_values=cache))
    model = copy.deepcopy(model)  # without what was kept of the first run
    for module in model.modules():
        module.__dict__.pop("_hip_positions", None)
    extension._ropes.clear()
    cache = hip_hf.HiPCache(model.config)
    request.getfixturevalue("elsewhere")
    assert torch.equal(logits(model, batch, past_key_values=cache), expected[0])
    assert torch.equal(logits(model, step, past_key_values=cache), expected[1])


@pytest.mark.parametrize("route", ["configure", "configure, patch", "patch, configure", "loaded"])
def test_unpatch_leaves_no_extension_behind(route: str) -> None:
    """Nothing would serve it: what `unpatch` gives back is the model as it was."""
    model, batch = build(LlamaConfig(**SMALL), budget=24), make_batch([300])
    expected, own = logits(model, batch), forwards(model)
    if route == "loaded":
        config = copy.deepcopy(model.config)
        config.hip["extend"] = "streaming"
        other = AutoModelForCausalLM.from_config(config).eval()
        other.load_state_dict(model.state_dict())
        model = other
        model.set_attn_implementation("hip")
    for part in route.split(", "):
        if part == "patch":
            hip_hf.patch(model)
        elif part == "configure":
            hip_hf.configure(model, extend="streaming")
    assert len(attention(model)) == 2
    assert not torch.allclose(logits(model, batch), expected, atol=1e-2), (
        "the context was not extended"
    )
    for _ in range(2):
        hip_hf.unpatch(model)
        assert (model.config.hip["extend"], model.config.hip["budget"]) == (None, 24)
        assert forwards(model) == own
        assert torch.equal(logits(model, batch), expected)
    generated = model.generate(
        **make_batch([200]), max_new_tokens=3, do_sample=False, cache_implementation="static"
    )
    assert generated.shape == (1, 203)


def test_unpatch_leaves_a_model_without_a_patcher_alone() -> None:
    model = build(StableLmConfig(**SMALL), extend="streaming")
    hip_hf.unpatch(model)
    assert model.config.hip["extend"] == "streaming"


@pytest.mark.parametrize("patched", [True, False])
def test_gaps_in_position_ids(patched: bool) -> None:
    """As docs/extension.md says: patched layers count keys; rotated back, a gap stays one."""
    model, batch = build(LlamaConfig(**SMALL), budget=104, extend="streaming"), make_batch([60])
    if not patched:
        turning_back(model)
    gap = torch.cat([torch.arange(30), torch.arange(50, 80)])[None]
    got = logits(model, batch, position_ids=gap)
    model.set_attn_implementation("eager")
    with_gap, without = (
        logits(model, batch, position_ids=ids) for ids in (gap, torch.arange(60)[None])
    )
    assert not torch.allclose(with_gap, without, atol=1e-2)
    same(got, without if patched else with_gap)
