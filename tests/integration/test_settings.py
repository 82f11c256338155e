"""Settings on a model, and `explain`."""

import pytest
import torch
from families import SPARSE, make_batch, make_model
from transformers import AutoModelForCausalLM, DynamicCache

import hip_hf
from hip_hf import HiPConfig
from hip_hf.integration.settings import read_settings

pytestmark = pytest.mark.fast


def test_settings_are_saved_and_loaded_with_the_checkpoint(tmp_path):
    model = make_model("llama", layers={1: {"budget": 64}}, options={"weight": 0.25})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="hip")
    assert HiPConfig.from_dict(loaded.config.hip) == HiPConfig.from_dict(model.config.hip)
    assert HiPConfig.from_dict(loaded.config.hip).layers == {1: {"budget": 64}}
    ids = make_batch([200])["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_deleted_mode_is_read_where_nothing_is_corrected():
    """Earlier versions saved it with every model."""
    config, deleted = make_model("llama").config, {"delta_mode": "clusters"}
    config.hip = {**HiPConfig(budget=64, layers={1: {"sink": 16}}).to_dict(), **deleted}
    assert read_settings(config) == HiPConfig(budget=64, layers={1: {"sink": 16}})
    for corrected in ({"delta": 64}, {"layers": {1: {"delta": 64}}}):
        config.hip = {**corrected, **deleted}
        with pytest.raises(ValueError, match=r"delta_mode: got 'clusters', allowed: step"):
            read_settings(config)
    with pytest.raises(ValueError, match=r"delta_mode: got 'clusters', allowed: step"):
        hip_hf.configure(make_model("llama"), **deleted)


def test_absent_settings_are_the_defaults():
    model = make_model("llama")
    del model.config.hip
    with torch.no_grad():
        model(make_batch([30])["input_ids"])
    assert (
        "below dense_below" in hip_hf.explain(model)[1].reason
        or hip_hf.explain(model)[1].reason == "dense layer"
    )


def test_configure_merges_fields_over_what_is_there():
    model = make_model("llama")
    hip_hf.configure(model, budget=64)
    assert HiPConfig.from_dict(model.config.hip) == HiPConfig(**{**SPARSE, "budget": 64})
    returned = hip_hf.configure(model, HiPConfig(window=128), sink=16)
    assert HiPConfig.from_dict(model.config.hip) == returned == HiPConfig(window=128, sink=16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"budgte": 64}, r"budgte: unknown field .*did you mean 'budget'"),
        ({"budget": 20}, r"budget: got 20, allowed: a multiple of block_k=8"),
        ({"dense_layers": [5]}, r"layer: got 5, allowed: 0 to 1"),
        ({"layers": {7: {"budget": 64}}}, r"layer: got 7, allowed: 0 to 1"),
        ({"window": -1}, r"window: got -1"),
    ],
)
def test_a_failed_configure_changes_nothing(fields, message):
    model = make_model("llama")
    before = dict(model.config.hip)
    with pytest.raises(ValueError, match=message):
        hip_hf.configure(model, **fields)
    assert model.config.hip == before


def test_a_change_takes_effect_at_the_next_call():
    model = make_model("llama")
    ids = make_batch([300])["input_ids"]
    densities = []
    with torch.no_grad():
        for budget in (32, 128):
            hip_hf.configure(model, budget=budget)
            model(ids)
            densities.append(hip_hf.explain(model)[0].share)
        model.config.hip["dense_layers"] = 1  # changed in place, without configure
        model(ids)
    assert densities[0] < densities[1] < 1
    assert [row.path for row in hip_hf.explain(model)] == ["dense", "sparse"]


def test_a_change_in_the_middle_of_decoding_starts_the_state_afresh():
    model = make_model("llama")
    ids = make_batch([200])["input_ids"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        hip_hf.configure(model, block_k=16, representative="minmax")
        actual = model(ids[:, :1], past_key_values=cache).logits
        fresh = DynamicCache(config=model.config)
        for layer, other in zip(fresh.layers, cache.layers, strict=True):
            layer.update(other.keys[:, :, :-1].clone(), other.values[:, :, :-1].clone())
        expected = model(ids[:, :1], past_key_values=fresh).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_layers_override_single_layers():
    model = make_model("llama", layers={"1": {"method": "dense"}})
    with torch.no_grad():
        model(make_batch([100])["input_ids"])
    report = hip_hf.explain(model)
    assert [(row.path, row.reason) for row in report] == [
        ("sparse", ""),
        ("dense", "method is dense"),
    ]


def test_explain_prints_a_table_with_every_layers_path():
    model = make_model("llama", dense_layers=1)
    assert [row.path for row in hip_hf.explain(model)] == ["not called", "not called"]
    with torch.no_grad():
        model(make_batch([300])["input_ids"])
    text = str(hip_hf.explain(model))
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["layer", "method", "path"]
    assert "dense layer" in lines[2]
    assert "100.0%" in lines[2]
    assert "sparse" in lines[3]


def test_explain_refuses_a_model_with_other_attention():
    with pytest.raises(ValueError, match="got attn_implementation='eager'"):
        hip_hf.explain(make_model("llama", "eager"))


def test_invalid_settings_in_a_checkpoint_are_named():
    model = make_model("llama")
    model.config.hip["beam"] = 0
    with pytest.raises(
        ValueError, match=r"HiPConfig.beam: got 0, allowed: None or an integer >= 1"
    ):
        model(make_batch([40])["input_ids"])


def test_inference_mode_and_ordinary_mode_share_a_cache():
    """Workers and pyramids must not care which mode made a tensor."""
    model = make_model("llama", decode_refresh=1)
    ids = make_batch([200])["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected)
    with torch.no_grad():
        for _ in range(20):
            out = model(ids[:, :1], past_key_values=cache)
    assert out.logits.isfinite().all()
    assert hip_hf.explain(model)[0].path == "sparse"
