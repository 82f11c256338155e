"""Masks of numbers to add to the logits: a caller's, and those that models make themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import _BASE, SPARSE, make_batch, make_model, paths
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LayoutLMConfig,
    LayoutLMModel,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedModel,
)
from transformers.masking_utils import causal_mask_function
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

import hip_hf
from hip_hf.integration.attention_function import attention_forward
from hip_hf.integration.masks import hip_mask

KEYS = 120
NOT_OURS = "the mask is not causal, or not made by hip"


def biased(shape: tuple[int, ...], hidden: float) -> torch.Tensor:
    """A causal mask with real biases, each between -3 and 3; `hidden` where a key is not seen."""
    bias = 6 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 3
    return bias.masked_fill(~torch.ones(KEYS, KEYS, dtype=torch.bool).tril(), hidden)


@pytest.mark.parametrize("hidden", [torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("shape", [(1, 1, KEYS, KEYS), (2, 4, KEYS, KEYS)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_numbers_are_added_to_the_logits(
    family: str, shape: tuple[int, ...], hidden: float
) -> None:
    """As eager attention adds them: in a prompt, and in a step on its cache (where no layer slides:
    it lacks the first keys)."""
    ids, mask, found = make_batch([KEYS, KEYS])["input_ids"], biased(shape, hidden), []
    for implementation in ("hip", "eager"):
        model = make_model(family, implementation)
        with torch.no_grad():
            out = model(ids[:, :-1], attention_mask=mask[:, :, :-1, :-1])
            found.append(out.logits)
            if family == "llama":
                found.append(
                    model(
                        ids[:, -1:],
                        attention_mask=mask[:, :, -1:],
                        past_key_values=out.past_key_values,
                    ).logits
                )
        if implementation == "hip":
            assert {(row.path, row.reason) for row in hip_hf.explain(model)} == {
                ("dense", NOT_OURS)
            }
    half = len(found) // 2
    torch.testing.assert_close(found[:half], found[half:], atol=1e-4, rtol=1e-4)


def test_a_row_that_only_minus_infinity_hides_gives_zeros() -> None:
    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, KEYS, 16), torch.randn(1, 2, KEYS, 16)
    mask = biased((1, 1, KEYS, KEYS), -torch.inf)
    mask[:, :, 7] = -torch.inf
    out = attention_forward(module, q, k, k, mask)[0]
    assert out.isfinite().all()
    assert (out.flatten(2).abs().sum(-1) == 0).nonzero().tolist() == [[0, 7]]


def test_gradients_reach_the_numbers() -> None:
    ids, found = make_batch([KEYS])["input_ids"], []
    for implementation in ("hip", "eager"):
        mask = biased((1, 1, KEYS, KEYS), torch.finfo(torch.float32).min).requires_grad_()
        make_model("llama", implementation)(
            ids, attention_mask=mask
        ).logits.square().mean().backward()
        found.append(mask.grad)
    assert found[0].any()
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


def test_a_mask_of_ours_that_a_model_has_added_to_is_found_out() -> None:
    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, KEYS, 16), torch.randn(1, 2, KEYS, 16)
    mask = hip_mask(1, KEYS, KEYS, 0, 0, causal_mask_function)
    said = r"^attention_mask: got numbers up to 5\.\d+e\+08 .*has computed with a mask of hip"
    with pytest.raises(ValueError, match=said):
        attention_forward(module, q, k, k, mask + torch.randn(1, 1, KEYS, KEYS))


@pytest.mark.parametrize("made", ["caller", "model"])
def test_a_mask_that_does_not_fit_is_refused_whoever_made_it(made: str) -> None:
    model, ids, wrong = (
        make_model("llama"),
        make_batch([KEYS])["input_ids"],
        torch.zeros(1, 1, KEYS, 30),
    )
    if made == "model":
        own = lambda module, args, kwargs: (args, {**kwargs, "attention_mask": wrong})  # noqa: E731
        model.model.layers[1].self_attn.register_forward_pre_hook(own, with_kwargs=True)
    said = rf"^attention_mask: got a torch\.float32 tensor of shape \(1, 1, {KEYS}, 30\) for "
    said += rf"1 rows of {KEYS} keys, allowed: one that broadcasts to \(1, 4, {KEYS}, {KEYS}\)$"
    with pytest.raises(ValueError, match=said):
        model(ids, attention_mask=wrong if made == "caller" else None)


def test_a_model_that_asks_for_the_mask_in_full_gets_it() -> None:
    """It goes on computing with it. Also where Transformers asks for one by itself, in a step on a
    static cache."""

    class Asking(LlamaConfig):
        pass

    def kind(config: LlamaConfig, rows: int, **options: Any) -> torch.dtype:
        return hip_mask(
            1, rows, KEYS, KEYS - rows, 0, causal_mask_function, config=config, **options
        ).dtype

    asking, other = Asking(**_BASE), LlamaConfig(**_BASE)
    assert kind(other, 1, allow_is_causal_skip=False) == torch.int32
    assert kind(asking, 60, allow_is_causal_skip=False) == torch.bool
    assert kind(asking, 1) == torch.bool
    assert kind(other, 60) == torch.int32


def make_doge() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("doge", **_BASE, keep_window_size=60)
    )


def make_layoutlm() -> PreTrainedModel:
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    return LayoutLMModel(LayoutLMConfig(vocab_size=100, **sizes))


def sharp(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(3)  # sharper attention than a fresh initialisation has
    return model.eval()


@pytest.mark.parametrize("make", [make_doge, make_layoutlm])
def test_models_that_make_numbers_of_their_own(make: Any) -> None:
    torch.manual_seed(0)
    model, batch, found = sharp(make()), make_batch([KEYS, 90]), []
    for implementation in ("hip", "eager"):
        model.set_attn_implementation(implementation)
        hip_hf.configure(model, **SPARSE)
        with torch.no_grad():
            found.append(model(**batch)[0][batch["attention_mask"].bool()])
        if implementation == "hip":
            assert set(paths(model)) <= {"dense"}
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_doge_generates_as_eager_does() -> None:
    torch.manual_seed(0)
    model, batch, found = sharp(make_doge()), make_batch([KEYS, 90]), []
    model.generation_config.eos_token_id = None
    for implementation in ("hip", "eager"):
        model.set_attn_implementation(implementation)
        out = model.generate(
            **batch,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(torch.stack(out.logits))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "implementation", ["hip", {"text_config": "hip", "vision_config": "eager"}]
)
def test_mllama_with_an_image(implementation: Any) -> None:
    """Its cross-attention layers get a mask of numbers, which is none of the caller's."""
    text = MllamaTextConfig(
        **{**_BASE, "num_hidden_layers": 3},
        cross_attention_layers=[1],
        rope_parameters={"rope_type": "default"},
    )
    sizes = dict(
        hidden_size=32,
        intermediate_size=32,
        attention_heads=2,
        image_size=16,
        patch_size=8,
        vision_output_dim=64,
    )
    layers = dict(num_hidden_layers=2, num_global_layers=1, intermediate_layers_indices=[0])
    vision = MllamaVisionConfig(
        **sizes, **layers, max_num_tiles=2, supported_aspect_ratios=[[1, 1], [1, 2]]
    )
    torch.manual_seed(0)
    model = sharp(
        MllamaForConditionalGeneration(
            MllamaConfig(vision_config=vision, text_config=text, image_token_index=98)
        )
    )
    model.model.language_model.layers[1].cross_attn_attn_gate.data.fill_(1.0)  # it starts closed
    ids = make_batch([KEYS])["input_ids"]
    ids[:, 40] = 98
    seen = torch.ones(1, KEYS, 1, 2, dtype=torch.long)
    seen[:, :40] = 0
    seen[:, 80:, :, 1] = 0
    image = dict(
        pixel_values=torch.randn(1, 1, 2, 3, 16, 16), aspect_ratio_ids=torch.full((1, 1), 2)
    )
    image |= dict(
        aspect_ratio_mask=torch.ones(1, 1, 2, dtype=torch.long), cross_attention_mask=seen
    )
    found = []
    for one in (implementation, "eager"):
        model.set_attn_implementation(one)
        if one != "eager":
            hip_hf.configure(model, **{**SPARSE, "budget": 512})
        with torch.no_grad():
            found.append(model(ids, **image).logits)
        if one != "eager":
            called = [row for row in hip_hf.explain(model) if row.path != "not called"]
            assert [row.path for row in called] == ["sparse", "dense", "sparse"]
            with torch.no_grad():
                other = model(
                    ids, **{**image, "pixel_values": torch.zeros_like(image["pixel_values"])}
                ).logits
            assert not torch.allclose(other, found[0], atol=1e-2), "the image does not matter"
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
