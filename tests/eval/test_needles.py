"""`hip-hf needles`: prompts as promised, digits counted right, logits and perplexity those of the
model itself."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from shlex import split
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import SMALL, TEXT, TINY, byte_tokenizer, invoke, refused, run, save_checkpoint
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from hip_hf.cli import needles as needles_command
from hip_hf.cli.presets import over_budgets, settings_of
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import losses, needles
from hip_hf.eval.measure.documents import (
    CHECKPOINT,
    DIGITS,
    DOCUMENT,
    Fact,
    load,
    note_sentence,
    question,
)
from hip_hf.eval.measure.losses import StepLosses
from hip_hf.eval.measure.needles import NeedlesAnswer, NeedlesCounts, NeedlesPlan, NeedlesPrompt
from hip_hf.eval.reporting.resumable import Resumable

DENSE = HiPConfig(method="dense")


def make_prompt(seed: int, length: int = 600, facts: int = 4) -> NeedlesPrompt:
    """A prompt about `TEXT` for the byte tokenizer."""
    tokenizer, rng = byte_tokenizer(), random.Random(seed)
    text = tokenizer.encode(TEXT, verbose=False)
    return needles.make_needles(tokenizer, text, length, facts, rng)


@pytest.mark.parametrize(("length", "facts"), [(400, 1), (2000, 8), (2345, 5)])
def test_a_prompt_has_every_fact_once_and_asks_for_all(length: int, facts: int) -> None:
    tokenizer, prompt = byte_tokenizer(), make_prompt(3, length, facts)
    assert len(prompt.ids) == length
    document = tokenizer.decode(prompt.ids[: prompt.document])
    end = tokenizer.decode(prompt.ids[prompt.document :])
    asked = [answer.fact for answer in prompt.answers]
    assert end == "".join(f"{question(fact.name)} {fact.key}." for fact in asked)
    assert len({fact.name for fact in asked}) == facts
    for fact in asked:
        assert document.count(note_sentence(fact.name, fact.key)) == 1
    plain = document
    for fact in asked:
        plain = plain.replace(note_sentence(fact.name, fact.key), "")
    assert plain == TEXT[: len(plain)]
    # a byte is a token
    assert document.index("\nThe pass key") >= math.floor(needles.FREE * len(plain))
    # one in each equal part
    parts = sorted((fact.depth - needles.FREE) / (1 - needles.FREE) for fact in asked)
    assert [math.floor(part * facts) for part in parts] == list(range(facts))


def test_answers_stand_where_the_prompt_says() -> None:
    tokenizer, prompt = byte_tokenizer(), make_prompt(1, 2000, 8)
    for answer in prompt.answers:
        assert tokenizer.decode([prompt.ids[at] for at in answer.positions]) == answer.fact.key
        assert answer.digits == (1,) * DIGITS


def test_questions_come_in_another_order_and_can_be_repeated() -> None:
    first, again, other = (make_prompt(seed, 2000, 8) for seed in (1, 1, 2))
    depths = [answer.fact.depth for answer in first.answers]
    assert depths != sorted(depths)
    assert first == again != other
    with pytest.raises(ValueError, match="length"):
        make_prompt(0, 200, 8)


def test_windows_are_disjoint_where_the_text_is_long_enough() -> None:
    plan, text = NeedlesPlan({}, [100], prompts=4), list(range(1000))
    windows = [plan.window(text, 200, number, random.Random(number)) for number in range(4)]
    assert all(len(window) == 200 for window in windows)
    assert len({token for window in windows for token in window}) == 800
    overlapping = [plan.window(text, 600, number, random.Random(number))[0] for number in range(4)]
    assert overlapping == [0, 133, 266, 400]


class Knowing:
    """A model whose logits are given: hidden states are numbers of rows, and its head looks up what
    it says there."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.device = logits, "cpu"
        self.config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())

    def set_attn_implementation(self, name: str) -> None:
        assert name == "sdpa"

    def get_decoder(self) -> Any:
        return lambda ids, use_cache: SimpleNamespace(
            last_hidden_state=torch.arange(ids.shape[1])[None]
        )

    def get_output_embeddings(self) -> Any:
        return lambda rows: self.logits[rows]


def test_digits_are_counted_right() -> None:
    """Two answers of two tokens; one digit of the second, of a token of three digits, is wrong."""
    ids = [1, 2, 3, 4, 5, 6, 7, 8]
    answers = [
        NeedlesAnswer(Fact("a", "34", 0), (2, 3), (1, 1)),
        NeedlesAnswer(Fact("b", "6778", 0), (5, 6), (1, 3)),
    ]
    said = [0, 3, 4, 0, 6, 0, 0, 0]  # after each token: right for positions 2, 3 and 5, wrong for 6
    logits = torch.nn.functional.one_hot(torch.tensor(said), 10).float()
    cell = needles.read_needles(Knowing(logits), NeedlesPrompt(ids, 2, answers), DENSE)
    assert (cell.prompts, cell.answers, cell.exact, cell.digits, cell.right) == (1, 2, 1, 6, 3)
    right, wrong = (-math.log(math.exp(good) / (math.e + 9)) for good in (1, 0))
    assert cell.nll == pytest.approx(3 * right + wrong)
    assert (cell.tokens, cell.document_nll) == (1, pytest.approx(wrong))
    row = (cell + cell).row("dense", 8, "text")
    assert (row["digits"], row["answers_right"], row["answers"], row["prompts"]) == (0.5, 0.5, 4, 2)
    assert row["nll"] == pytest.approx((3 * right + wrong) / 6)
    assert row["perplexity"] == pytest.approx(math.exp(wrong))
    assert (row["read"], row["path"]) == (1.0, "sdpa")


def test_logits_and_losses_are_those_of_the_shipped_checkpoint() -> None:
    """Chunks of rows make what the whole model makes, and the dense row is what can be counted by
    hand."""
    model, tokenizer = load(CHECKPOINT, "sdpa")
    text = tokenizer.encode(DOCUMENT.read_text(), add_special_tokens=False, verbose=False)
    prompt = needles.make_needles(tokenizer, text, 3 * losses.LOGITS_ROWS - 7, 6, random.Random(0))
    with torch.no_grad():
        logits = model(torch.tensor([prompt.ids])).logits[0]
        loss, right = losses.losses_of(model, prompt.ids)
    want = torch.nn.functional.cross_entropy(
        logits[:-1], torch.tensor(prompt.ids[1:]), reduction="none"
    )
    torch.testing.assert_close(loss.float(), want, atol=1e-4, rtol=1e-4)
    assert right.tolist() == (logits[:-1].argmax(1) == torch.tensor(prompt.ids[1:])).tolist()
    cell = needles.read_needles(model, prompt, DENSE)
    likely, places = logits.argmax(1), [answer.positions for answer in prompt.answers]
    said = [tokenizer.decode([likely[at - 1] for at in own]) for own in places]
    keys = [answer.fact.key for answer in prompt.answers]
    assert cell.exact == sum(map(str.__eq__, said, keys))
    assert list(map(len, said)) == list(map(len, keys))
    assert cell.right == sum(map(str.__eq__, "".join(said), "".join(keys)))
    assert cell.right >= 20  # of 30: it was trained for this
    targets = torch.tensor(prompt.ids[1 : prompt.document])
    direct = torch.nn.functional.cross_entropy(logits[: prompt.document - 1], targets)
    row = cell.row("dense", len(prompt.ids), "novel")
    assert row["perplexity"] == pytest.approx(math.exp(direct), rel=1e-4)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, final_logit_softcapping=0.05)),
        lambda: GraniteForCausalLM(GraniteConfig(**TINY, logits_scaling=8.0)),
        lambda: CohereForCausalLM(CohereConfig(**TINY, logit_scale=0.25)),
    ],
    ids=["gemma2", "granite", "cohere"],
)
def test_scaled_and_capped_logits_are_the_models_own(model: Any) -> None:
    net = model().eval()
    ids = torch.randint(1, 257, (1, 50))
    with torch.no_grad():
        torch.testing.assert_close(
            losses.logits_of(net, losses.hidden_of(net, ids[0].tolist())), net(ids).logits[0]
        )
    losses.check_logits(net, ids[0].tolist())


def test_logits_that_are_made_in_an_unknown_way_are_refused() -> None:
    net = GraniteForCausalLM(GraniteConfig(**TINY)).eval()
    net.config.logits_scaling = 1.0
    forward = net.forward

    def louder(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        out.logits = 3 * out.logits
        return out

    net.forward = louder
    with pytest.raises(ValueError, match="got a GraniteForCausalLM, allowed: models whose logits"):
        losses.check_logits(net, list(range(1, 20)))


def test_command(tmp_path: Path, threads: Any) -> None:
    threads(1)  # such small tensors only wait for each other
    model, text = save_checkpoint(tmp_path)
    sizes = {name: value for name, value in SMALL.items() if name != "budget"}
    arguments = [model, "--documents", f"{text},code"]
    arguments += split("--lengths 512,600 --prompts 2 --facts 3")
    for fields in ("dense", json.dumps(sizes), json.dumps({**sizes, "dense_layers": 1})):
        arguments += ["--settings", fields]
    pytest.importorskip("matplotlib")
    picture, saved, page = tmp_path / "curve.png", tmp_path / "rows.json", tmp_path / "page.html"
    files = ["--plot", str(picture), "--output", str(saved), "--report", str(page)]
    printed = run(needles_command.main, *arguments, "--budgets", "32,64", *files)
    rows = printed["rows"]
    assert json.loads(saved.read_text())["rows"] == rows
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert page.stat().st_size > 1000
    # lengths, documents, settings: dense once, the others with two budgets
    assert len(rows) == 2 * 2 * 5
    assert "text.txt, code of Python" in printed["document"]
    assert [row["answers"] for row in rows] == [6] * len(rows)
    own = [row for row in rows if (row["length"], row["document"]) == (600, "text.txt")]
    by_settings = {row["settings"]: row for row in own}
    dense = by_settings["dense"]
    small, large = (by_settings[f"{json.dumps(sizes)} @ {budget}"] for budget in (32, 64))
    mixed = by_settings[f"{json.dumps({**sizes, 'dense_layers': 1})} @ 32"]
    names = ("path", "read", "perplexity_over_dense", "digits_minus_dense")
    assert [dense[name] for name in names] == ["sdpa", 1, 1, 0]
    assert small["path"] == large["path"] == "sparse"
    assert 0 < small["read"] < large["read"] < mixed["read"] < 0.8
    assert mixed["path"] == "1 dense (dense layer), 1 sparse"
    for row in (small, large, mixed):
        assert row["digits_minus_dense"] == row["digits"] - dense["digits"]
        assert row["nll_minus_dense"] == row["nll"] - dense["nll"] != 0
        assert row["perplexity_over_dense"] == row["perplexity"] / dense["perplexity"] != 1
    assert (dense["selection_over_attention"], dense["flops_over_dense"]) == (None, None)
    assert small["selection_over_attention"] > large["selection_over_attention"] > 0
    most = small["read"] * (1 + 2 * small["selection_over_attention"])
    assert small["read"] < small["flops_over_dense"] < most
    assert printed["configs"][f"{json.dumps(sizes)} @ 32"]["dense_tail"] == 0


def test_without_dense_there_is_nothing_to_compare_with(tmp_path: Path, threads: Any) -> None:
    threads(1)
    model, text = save_checkpoint(tmp_path)
    given = split("--lengths 400 --prompts 1 --facts 1 --settings")
    printed = run(needles_command.main, model, "--documents", text, *given, json.dumps(SMALL))
    (row,) = printed["rows"]
    for name in ("digits_minus_dense", "nll_minus_dense", "perplexity_over_dense"):
        assert row[name] is None


def test_everything_read_counts_as_dense(tmp_path: Path) -> None:
    model, _ = load(save_checkpoint(tmp_path)[0], "sdpa")
    configs = settings_of(["dense", '{"budget": 1024, "window": 16, "sink": 8}']).values()
    dense, hip = (needles.read_needles(model, make_prompt(0), config) for config in configs)
    assert hip.paths == ["sparse"]
    assert (hip.right, hip.exact) == (dense.right, dense.exact)
    assert hip.nll == pytest.approx(dense.nll, rel=1e-5)
    assert hip.document_nll == pytest.approx(dense.document_nll, rel=1e-5)


def test_decode_steps_that_read_everything_say_what_one_pass_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load(save_checkpoint(tmp_path)[0], "sdpa")
    prompts = [make_prompt(0), make_prompt(1)]
    fields = [json.dumps(dict(budget=budget, window=16, sink=8)) for budget in (1024, 32)]
    configs = settings_of(fields).values()
    read, steps, own = [], StepLosses(model), StepLosses._ahead
    noted = lambda self, ids: read.append(len(ids)) or own(self, ids)  # noqa: E731
    monkeypatch.setattr(StepLosses, "_ahead", noted)
    for prompt in prompts:
        wide, narrow = (needles.read_needles(model, prompt, config, steps) for config in configs)
        dense = needles.read_needles(model, prompt, DENSE)
        assert wide.paths == narrow.paths == ["sparse"]
        assert narrow.read[0] < 0.3 < wide.read[0] == 1
        assert (wide.right, wide.exact) == (dense.right, dense.exact)
        assert wide.nll == pytest.approx(dense.nll, rel=1e-5)
        assert narrow.nll != pytest.approx(dense.nll, rel=1e-4)
        for cell in (wide, narrow):  # the document is read densely
            assert cell.document_nll == pytest.approx(dense.document_nll, rel=1e-5)
    first, second = (prompt.document for prompt in prompts)  # once for both settings
    assert read == [first, *[1] * 2 * (600 - first), second, *[1] * 2 * (600 - second)]


def test_documents_are_read_densely_whatever_the_settings(tmp_path: Path) -> None:
    model, _ = load(save_checkpoint(tmp_path)[0], "sdpa")
    prompt, common = make_prompt(0), dict(budget=32, window=16, sink=8)
    staged = {"method": "staged", "decode_refresh": [4, 2]}
    staged["options"] = {"stages": [[64, 64, 2], [16, 32, 1]]}
    some = {"layers": {"1": {"method": "streaming"}}}
    configs = settings_of([json.dumps(fields | common) for fields in (staged, some)]).values()
    dense = needles.read_needles(model, prompt, DENSE)
    for config in configs:  # each the first to be asked about a document
        cell = needles.read_needles(model, prompt, config, StepLosses(model))
        assert cell.document_nll == pytest.approx(dense.document_nll, rel=1e-5)


def test_a_cache_that_cannot_go_back_reads_the_document_again() -> None:
    net = Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=64)).eval()
    ids = torch.randint(1, 257, (300,)).tolist()
    config = next(iter(settings_of(['{"budget": 1024, "window": 16, "sink": 8}']).values()))
    steps = StepLosses(net)
    with torch.no_grad():
        first, second = (steps.losses_of(ids, 250, config) for _ in range(2))
        want = losses.losses_of(net, ids)
    for got in (first, second):
        torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-4)


def test_command_by_decode_steps(tmp_path: Path, threads: Any) -> None:
    threads(1)
    model, text = save_checkpoint(tmp_path)
    given = split("--lengths 400 --prompts 1 --facts 2 --settings dense --decode --settings")
    printed = run(needles_command.main, model, "--documents", text, *given, json.dumps(SMALL))
    assert printed["decode"] is True
    dense, sparse = printed["rows"]
    assert (dense["path"], sparse["path"]) == ("dense (method is dense)", "sparse")
    assert sparse["perplexity_over_dense"] == 1
    assert sparse["nll"] != dense["nll"]
    assert "flops_over_dense" not in sparse


def test_all_settings_are_measured_on_a_prompt_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, str]] = []

    def read_needles(
        model: Any, prompt: NeedlesPrompt, config: HiPConfig, steps: StepLosses | None
    ) -> NeedlesCounts:
        assert steps is None
        seen.append((prompt.ids[0], config.method))
        return NeedlesCounts(1, 1, 1, 5, 5, 1.0, 10, 1.0, [1.0], ["sdpa"])

    monkeypatch.setattr(needles, "read_needles", read_needles)
    monkeypatch.setattr(needles, "check_logits", lambda *args: None)
    made = lambda self, tokenizer, text, length, number: NeedlesPrompt([number], 1, [])  # noqa: E731
    monkeypatch.setattr(NeedlesPlan, "prompt", made)
    plan = NeedlesPlan(settings_of(["dense", "defaults"]), [100], prompts=2, facts=1)
    needles.needles_rows(None, None, {"text": []}, plan, Resumable(None, {}))
    assert seen == [(0, "dense"), (0, "hip"), (1, "dense"), (1, "hip")]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--documents", "nowhere.txt"], "--documents: got 'nowhere.txt'"),
        (["--documents", "novel,novel"], "got 'novel' twice"),
        (["--lengths", "many"], "8192 or 64K"),
        (["--budgets", "17"], "budget"),
        (["--settings", "nonsense"], "nonsense"),
        (["--facts", "65"], "--facts"),
        (["--plot", "nowhere/else.png"], "--plot"),
    ],
)
def test_refusals_before_the_model_loads(
    arguments: list[str], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = lambda *args: pytest.fail("the model was loaded")  # noqa: E731
    monkeypatch.setattr(needles_command.inputs, "load_to_measure", fails)
    assert what in refused(needles_command.main, *arguments)


def test_lengths_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    given = [model, "--documents", text, "--settings", json.dumps(SMALL)]
    said = refused(needles_command.main, *given, "--lengths", "100000")
    assert "length: got 100000, allowed: at most the" in said
    assert "notes and question" in refused(needles_command.main, *given, "--lengths", "300")


def test_code_is_the_standard_librarys() -> None:
    source = needles.standard_library()
    assert source == needles.standard_library()
    assert len(source) > 2**21
    first = source.index("Abstract Base Classes (ABCs) according to PEP 3119")
    assert first < source.index("Random variable generators.")
    assert "\nbuild_time_vars = " not in source  # of one machine


def test_budgets_are_in_the_names_where_there_are_several() -> None:
    several = over_budgets(["dense", "defaults"], [64, 128])
    assert list(several) == ["dense", "defaults @ 64", "defaults @ 128"]
    assert [config.budget for name, config in several.items() if name != "dense"] == [64, 128]
    assert list(over_budgets(["dense", "defaults"], [64])) == ["dense", "defaults"]


def test_windows_that_overlap_are_told(tmp_path: Path, threads: Any) -> None:
    threads(1)
    model, text = save_checkpoint(tmp_path)
    given = (model, "--documents", text, "--facts", 1, "--settings", "dense", "--lengths", 1200)
    for prompts, told in ((2, False), (3, True)):
        result = invoke(needles_command.main, *given, "--prompts", prompts)
        assert result.exit_code == 0, result.output
        assert ("windows of the 3 prompts overlap" in " ".join(result.stderr.split())) == told
