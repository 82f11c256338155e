"""Log-likelihoods do not depend on which requests share a batch, and mistyped model arguments are
found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval_cases
from lm_eval.models.huggingface import HFLM
from lm_eval_cases import SETTINGS, make_lm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
)

from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.integration.lm_eval.model import PADDING, HipLM
from hip_hf.integration.lm_eval.registration import UsageError

# a fixture for all tests of this module
offline_and_on_one_thread = lm_eval_cases.offline_and_on_one_thread

Request = tuple[tuple[str, str], list[int], list[int]]


def requests(vocabulary: int, *more: tuple[list[int], list[int]]) -> list[Request]:
    """Texts of very different lengths, as token ids, and what is scored after each."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(5, vocabulary, (count,), generator=generator).tolist()  # noqa: E731
    made = [(draw(length), draw(12)) for length in (700, 30, 410, 5)]
    return [(("", str(i)), *pair) for i, pair in enumerate([*made, *more])]


def scores(lm: HFLM, asked: list[Request]) -> list[float]:
    return [score for score, _ in lm._loglikelihood_tokens(asked, disable_tqdm=True)]


@pytest.mark.parametrize(
    "fields",
    [SETTINGS, {**SETTINGS, "dense_below": 300, "dense_tail": 64}],
    ids=["sparse", "some dense"],
)
def test_scores_do_not_depend_on_the_batch(fields: dict[str, Any]) -> None:
    # among them texts that end in the very token which lm-eval pads with
    ended = [([7] * 300, [9] * 20 + [PADDING] * 3), ([PADDING] * 4, [PADDING, 5])]
    asked = requests(1000, *ended)
    single, batch = (scores(make_lm(batch_size=size, **fields), asked) for size in (1, len(asked)))
    assert batch == pytest.approx(single, abs=2e-3)
    if fields is SETTINGS:  # else every batch would give the same: enough is left out to matter
        assert scores(make_lm(**{**fields, "budget": 4096}), asked) != pytest.approx(
            single, abs=0.1
        )


def test_scores_of_an_encoder_decoder_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    sizes = dict(
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
    )
    sizes |= dict(
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=512,
        vocab_size=len(tokenizer),
    )
    special = dict(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(BartConfig(**sizes, **special)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(8)
    asked = [
        (words, end, context[: len(context) // 2]) for words, context, end in requests(1000)
    ]  # the long part is the decoder's
    fields = {**SETTINGS, "budget": 32, "window": 16, "dense_tail": 16}
    single, batch = (
        scores(
            HipLM(
                model,
                tokenizer=tokenizer,
                backend="seq2seq",
                batch_size=size,
                max_length=400,
                **fields,
            ),
            asked,
        )
        for size in (1, len(asked))
    )
    assert batch == pytest.approx(single, abs=2e-3)


def test_text_is_scored_as_the_model_scores_it() -> None:
    """Against the logits of the model itself, text by text."""
    lm = make_lm(batch_size=4, method="dense")
    asked = requests(1000)
    for (_, context, end), score in zip(asked, scores(lm, asked), strict=True):
        with torch.no_grad():
            logits = (
                lm.model(torch.tensor([context + end[:-1]])).logits[0, -len(end) :].log_softmax(-1)
            )
        assert score == pytest.approx(
            float(logits.gather(1, torch.tensor(end)[:, None]).sum()), abs=2e-3
        )


# Arguments


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("budgett", "budget"),
        ("dense_layer", "dense_layers"),
        ("bock_q", "block_q"),
        ("prompt_trunction", "prompt_truncation"),
    ],
)
def test_mistyped_arguments_are_refused_before_the_weights_load(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    said = rf"{name}: unknown model argument with value 64 \(did you mean '{meant}'\?\)"
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    with pytest.raises(UsageError, match=said):
        HipLM(model, tokenizer=str(CHECKPOINT), **{name: 64})
    monkeypatch.setattr(HFLM, "_create_model", load)
    with pytest.raises(UsageError, match=said):
        make_lm(**{name: 64})


def test_arguments_of_others_still_pass(tmp_path: Path) -> None:
    """Those of lm-eval's model, of `from_pretrained`, and settings of the model's config, some of
    them near ours."""
    lm = make_lm(
        truncation=True,
        rms_norm_eps=1e-4,
        cache_dir=str(tmp_path),
        device_map=None,
        low_cpu_mem_usage=True,
    )
    assert lm.model.config.rms_norm_eps == 1e-4
