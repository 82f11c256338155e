"""The registered attention inside real Transformers models: same tokens as `eager` whenever the
budget covers the context."""

import copy
import warnings

import pytest
import torch
from families import FAMILIES, make_batch, make_model, paths
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache
from transformers.models.bloom import BloomConfig, BloomForCausalLM
from transformers.models.mpt import MptConfig, MptForCausalLM

import hip_hf

COVERING = {"budget": 1024}
SLIDING = {
    "mistral": ["dense", "dense"],
    "gemma2": ["dense", "sparse"],
    "gpt_oss": ["dense", "sparse"],
}


def generate(model, batch, implementation, **kwargs):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model.generate(
            **batch,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **{"max_new_tokens": 12, **kwargs},
        )


@pytest.mark.fast
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_covering_budget_generates_as_eager(family, cache):
    model = make_model(family, **COVERING)
    batch = make_batch([70, 51, 3])
    expected = generate(model, batch, "eager", cache_implementation=cache)
    actual = generate(model, batch, "hip", cache_implementation=cache)
    assert torch.equal(actual.sequences, expected.sequences)
    for a, b in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert paths(model) == SLIDING.get(family, ["sparse", "sparse"])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_streaming_name_reads_sink_and_window_only(family):
    model = make_model(family, "streaming", **COVERING)
    batch = make_batch([90])
    with torch.no_grad():
        model(**batch)
    report = hip_hf.explain(model)
    assert report[1].method == "streaming"
    assert report[1].path == "sparse"
    assert report[1].share < 0.6


def test_streaming_equals_dense_attention_under_its_mask():
    model = make_model("llama", "streaming", block_q=1, window=16, sink=8)
    ids = make_batch([60])["input_ids"]
    with torch.no_grad():
        actual = model(ids).logits
    row, key = torch.arange(60)[:, None], torch.arange(60)
    # a query's window starts 16 keys before it, rounded down to a block of 8
    visible = (key <= row) & ((key < 8) | (key >= (row - 16).clamp(min=0) // 8 * 8))
    model.set_attn_implementation("eager")
    bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=bias).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_left_padded_rows_equal_their_unpadded_runs_when_sparse(family):
    model = make_model(family)
    batch = make_batch([203, 150, 117])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=positions).logits
    assert "sparse" in paths(model)
    assert hip_hf.explain(model)[1].share < 0.8
    for row, length in enumerate([203, 150, 117]):
        with torch.no_grad():
            alone = model(batch["input_ids"][row : row + 1, -length:]).logits[0]
        torch.testing.assert_close(together[row, -length:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_right_padding_never_votes(family):
    model = make_model(family)
    batch = make_batch([203, 150])
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"].clone()
    ids[1] = ids[1].roll(-53)
    mask[1] = mask[1].roll(-53)
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, :150]).logits[0]
        # pad tokens of another kind change nothing
        ids[1, 150:] = 7
        other = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(together[1, :150], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(together[1, :150], other[1, :150])


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunked_prefill_equals_one_shot_when_sparse(family, cache):
    model = make_model(family)
    batch = make_batch([250, 201])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        once = model(**batch, position_ids=positions).logits
        kwargs = {"max_cache_len": 300} if cache is StaticCache else {}
        past = cache(config=model.config, **kwargs)
        parts = []
        # the first row is not padded: its query blocks of 16 start at multiples of 16
        for start in range(0, 250, 80):
            end = min(start + 80, 250)
            out = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=past,
            )
            parts.append(out.logits)
            if end > 80:
                assert paths(model)[1] == "sparse"
    chunked = torch.cat(parts, dim=1)
    torch.testing.assert_close(chunked[0, :240], once[0, :240], atol=1e-4, rtol=1e-4)


def test_prefill_chunk_size_of_generate():
    model = make_model("llama", **COVERING)
    batch = make_batch([200])
    expected = generate(model, batch, "eager")
    actual = generate(model, batch, "hip", prefill_chunk_size=64)
    assert torch.equal(actual.sequences, expected.sequences)
    assert paths(model) == ["sparse", "sparse"]


@pytest.mark.parametrize("budget", [32, 1024])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_packed_sequences_equal_their_own_runs(family, budget):
    model = make_model(family, budget=budget)
    ids = make_batch([300])["input_ids"]
    lengths = [120, 37, 143]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=positions, use_cache=False).logits[0]
        alone = [model(part[None], use_cache=False).logits[0] for part in ids[0].split(lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_holes_in_the_padding_mask_go_dense_with_one_warning():
    model = make_model("llama")
    batch = make_batch([90, 60])
    batch["attention_mask"][0, 70:75] = 0  # more keys before it than are read
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**batch).logits
    model.set_attn_implementation("hip")
    from hip_hf.integration import layer_attention

    layer_attention._warned.clear()
    with pytest.warns(UserWarning, match="padding in the middle") as caught, torch.no_grad():
        actual = model(**batch).logits
    assert len(caught) == 1
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], atol=1e-4, rtol=1e-4)
    assert [row.reason for row in hip_hf.explain(model)] == ["padding in the middle of a row"] * 2


def test_a_callers_own_boolean_mask_goes_dense():
    model = make_model("llama")
    ids = make_batch([50])["input_ids"]
    visible = torch.ones(50, 50, dtype=torch.bool).tril()
    visible[30:, 5] = False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        actual = model(ids, attention_mask=visible[None, None]).logits
        model.set_attn_implementation("eager")
        bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
        expected = model(ids, attention_mask=bias[None, None]).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_training_step_has_the_gradients_of_dense_attention():
    gradients = []
    for implementation in ("eager", "hip"):
        model = make_model("gemma2", implementation).train()
        batch = make_batch([60, 40])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[1, 20] = -100  # predicted from a pad row, where implementations may differ
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(**batch, labels=labels).loss.backward()
        gradients.append(
            [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        )
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (BloomConfig(vocab_size=100, hidden_size=64, n_layer=1, n_head=4), BloomForCausalLM),
        (MptConfig(vocab_size=100, d_model=64, n_layers=1, n_heads=4), MptForCausalLM),
    ],
    ids=["bloom", "mpt"],
)
def test_families_that_would_ignore_the_attention_are_refused(config, kind):
    model = kind(copy.deepcopy(config)).eval()
    model.config._attn_implementation = "hip"
    with pytest.raises(
        ValueError, match=r"attn_implementation: got 'hip' for model type '(bloom|mpt)'"
    ):
        model(torch.randint(3, 90, (1, 20)))


def test_output_attentions_and_dropout_are_refused():
    model = make_model("llama")
    ids = make_batch([20])["input_ids"]
    with pytest.raises(ValueError, match="output_attentions: got True, allowed: False"):
        model(ids, output_attentions=True)
    model = make_model("llama").train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout: got 0\.1, allowed: 0"):
        model(ids)


def test_position_bias_and_sparse_indices_are_refused():
    from hip_hf.integration.attention_function import attention_forward

    model = make_model("llama")
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    named = dict.fromkeys(("position_bias", "indices", "block_indices"), "LlamaAttention passes")
    for name, what in named.items():
        with pytest.raises(ValueError, match=f"^{name}: {what}"):
            attention_forward(
                model.model.layers[0].self_attn, q, k, k, None, **{name: torch.zeros(1)}
            )


def test_bidirectional_attention_goes_to_pytorch():
    from hip_hf.integration.attention_function import attention_forward

    module = make_model("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16)
    out, _ = attention_forward(module, q, k, k, None, is_causal=False)
    wide = k.repeat_interleave(2, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, wide, wide).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert module._hip_call.reason == "attention is not causal"


def test_bidirectional_attention_keeps_softcap_and_sinks():
    from hip_hf.integration.attention_function import attention_forward

    module = make_model("llama").model.layers[0].self_attn
    q, k, sinks = torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16), torch.randn(4)
    wide = k.repeat_interleave(2, 1)
    for hidden in (0, 9):
        mask = None if hidden == 0 else (torch.arange(30) >= hidden).expand(1, 1, 30, 30)
        out, _ = attention_forward(module, q, k, k, mask, is_causal=False, softcap=1.5, s_aux=sinks)
        logits = 1.5 * torch.tanh(q @ wide.transpose(2, 3) * 16**-0.5 / 1.5)
        logits[..., :hidden] = -torch.inf
        logits = torch.cat([logits, sinks.view(1, 4, 1, 1).expand(1, 4, 30, 1)], -1)
        torch.testing.assert_close(out, (logits.softmax(-1)[..., :30] @ wide).transpose(1, 2))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["encoder", "encoder and decoder"])
def test_models_with_encoders(kind, padded):
    """Attention that is not causal stays what it is, in whole models, where no mask at all may be
    asked for."""
    from transformers import BertConfig, BertModel, T5GemmaConfig, T5GemmaForConditionalGeneration

    small = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    if kind == "encoder":
        kinds, config = BertModel, BertConfig(**small)
    else:
        part = dict(small, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0)
        kinds, config = (
            T5GemmaForConditionalGeneration,
            T5GemmaConfig(encoder=part, decoder=part, vocab_size=64),
        )
    torch.manual_seed(0)
    model = kinds(config).eval()
    ids = torch.randint(3, 64, (2, 40))
    batch = dict(input_ids=ids)
    if padded:
        batch["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(33, 40), 0)
    if kind != "encoder":
        batch["decoder_input_ids"] = torch.randint(3, 64, (2, 17))
    outputs = {}
    for name in ("eager", "hip"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            outputs[name] = model(**batch)[0]
    real = slice(0, 33) if padded and kind == "encoder" else slice(None)
    torch.testing.assert_close(
        outputs["hip"][:, real], outputs["eager"][:, real], atol=2e-5, rtol=1e-4
    )


def test_sliding_layers_run_sparse_in_a_model():
    """Mistral's layers all slide; a window longer than the sparse set is pruned within. A padded
    row equals the row alone."""
    config = copy.deepcopy(FAMILIES["mistral"])
    config.sliding_window = 150
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="hip").eval()
    hip_hf.configure(
        model,
        budget=16,
        block_q=16,
        block_k=4,
        sink=4,
        window=16,
        dense_below=0,
        dense_tail=0,
        dense_layers=0,
    )
    batch = make_batch([300, 211])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(
        min=0
    )  # the rotations of the row alone, to the last bit
    with torch.no_grad():
        both = model(**batch, position_ids=positions).logits
        assert paths(model) == ["sparse"] * config.num_hidden_layers
        alone = model(batch["input_ids"][1:, 89:]).logits
    torch.testing.assert_close(both[1:, 89:], alone, atol=1e-4, rtol=1e-4)


def test_mask_is_linear_in_the_context():
    from transformers.masking_utils import causal_mask_function

    from hip_hf.integration.masks import hip_mask

    mask = hip_mask(2, 5000, 5000, 0, 0, causal_mask_function, config=LlamaConfig())
    assert mask.shape == (2, 1, 1, 5000)
    assert mask.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model = make_model("llama").to(dtype)
    batch = make_batch([200, 150])
    with torch.no_grad():
        logits = model(**batch).logits
        model.set_attn_implementation("eager")
        hip_hf.configure(model, budget=1024)
        expected = model(**batch).logits
        model.set_attn_implementation("hip")
        covering = model(**batch).logits
    real = batch["attention_mask"].bool()
    assert logits[real].isfinite().all()
    assert (covering - expected)[real].abs().max() < 0.1 * expected[real].abs().max()
