"""`hip-hf passkey`: prompts as promised, answers counted right, and a report that says which path
ran."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import SMALL, TEXT, byte_tokenizer, refused, run, save_checkpoint

from hip_hf.cli import passkey as passkey_command
from hip_hf.cli.presets import settings_of, sizes
from hip_hf.config import HiPConfig
from hip_hf.eval.measure import passkey
from hip_hf.eval.measure.documents import DIGITS, FACT_NAMES, Fact, load, note_sentence, question
from hip_hf.integration.explain import explain


@pytest.mark.fast
@pytest.mark.parametrize(
    ("length", "depth", "facts"), [(300, 0.0, 1), (300, 1.0, 1), (777, 0.5, 3), (1000, 0.25, 8)]
)
def test_sample_has_the_length_and_the_fact_at_its_depth(
    length: int, depth: float, facts: int
) -> None:
    tokenizer = byte_tokenizer()
    text = tokenizer.encode(TEXT, verbose=False)
    prompt, key = passkey.make_sample(tokenizer, text, length, depth, facts, random.Random(3))
    assert len(prompt) + passkey.ANSWER_TOKENS == length
    words = tokenizer.decode(prompt)
    asked = words.rpartition("The pass key of ")[2].removesuffix(" is")
    assert words.endswith(question(asked))
    assert words.count(note_sentence(asked, key)) == 1
    assert words.count("Remember it.") == facts
    # the depth counts document text only
    before, _, after = words.removesuffix(question(asked)).partition(note_sentence(asked, key))
    plain = [len(part) for part in (_without_notes(before), _without_notes(after))]
    assert plain[0] == pytest.approx(depth * sum(plain), abs=1)


def _without_notes(words: str) -> str:
    while "\nThe pass key of " in words:
        first, _, rest = words.partition("\nThe pass key of ")
        words = first + rest.partition("Remember it.\n")[2]
    return words


def test_samples_differ_and_can_be_repeated() -> None:
    tokenizer = byte_tokenizer()
    text = tokenizer.encode(TEXT, verbose=False)
    draw = lambda seed: passkey.make_sample(tokenizer, text, 400, 0.5, 2, random.Random(seed))  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    with pytest.raises(ValueError, match="length"):
        passkey.make_sample(tokenizer, text[:100], 400, 0.5, 1, random.Random(0))


def test_facts_have_names_of_their_own() -> None:
    facts = passkey.draw_facts(random.Random(0), [0.5] * len(FACT_NAMES))
    assert len({fact.name for fact in facts}) == len(FACT_NAMES)
    assert all(
        isinstance(fact, Fact) and len(fact.key) == DIGITS and fact.key.isdigit() for fact in facts
    )


@pytest.mark.fast
def test_wilson() -> None:
    # Brown, Cai and DasGupta (2001) and any statistics package
    assert passkey.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert passkey.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert passkey.wilson(110, 110) == pytest.approx((0.9663, 1.0), abs=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("answer", "right"), [("12345", 5), ("12340", 4), ("", 0), ("1234", 4), ("21345", 3)]
)
def test_digits_right(answer: str, right: int) -> None:
    assert passkey.digits_right(answer, "12345") == right


@pytest.mark.fast
def test_answers_are_counted() -> None:
    """A model that knows the answers to all but one prompt, gets one digit of another wrong, and
    goes on talking."""
    tokenizer = byte_tokenizer()
    samples = [
        ([5, 6, 7], "12345"),
        ([5, 6, 8], "67890"),
        ([5, 6, 9], "11111"),
        ([5, 6, 10], "22222"),
    ]
    said = [" 12345", " 67891", " no  ", "222223"]

    def generate(ids: torch.Tensor, **fields: Any) -> torch.Tensor:
        assert fields["max_new_tokens"] == DIGITS + 1
        assert not fields["do_sample"]
        answers = [tokenizer.encode(text)[: DIGITS + 1] for text in said]
        width = max(map(len, answers))
        return torch.cat(
            [ids, torch.tensor([answer + [0] * (width - len(answer)) for answer in answers])], dim=1
        )

    cell = passkey.answer_samples(
        SimpleNamespace(device="cpu", generate=generate), tokenizer, samples, sparse=False
    )
    assert (cell.samples, cell.exact, cell.digits) == (4, 2, 5 + 4 + 0 + 5)
    row = cell.row("dense", 3, None)
    assert (row["accuracy"], row["digits"], row["path_prefill"], row["read_prefill"]) == (
        0.5,
        0.7,
        "sdpa",
        1.0,
    )


@pytest.mark.fast
def test_command(tmp_path: Path, threads: Any) -> None:
    threads(1)  # such small tensors only wait for each other
    model, text = save_checkpoint(tmp_path)
    arguments = [
        model,
        "--document",
        text,
        "--lengths",
        "200,256",
        "--depths",
        "2",
        "--samples",
        "3",
        "--batch",
        "2",
    ]
    partly = {**SMALL, "dense_layers": 1}
    for fields in ("dense", json.dumps(SMALL), json.dumps(partly)):
        arguments += ["--settings", fields]
    picture, saved = tmp_path / "map.png", tmp_path / "rows.json"
    pytest.importorskip("matplotlib")
    printed = run(passkey_command.main, *arguments, "--plot", str(picture), "--output", str(saved))
    assert json.loads(saved.read_text())["rows"] == printed["rows"]
    assert picture.stat().st_size > 1000
    rows = printed["rows"]
    assert len(rows) == 3 * 2 * (1 + 2)
    assert [row["depth"] for row in rows[:3]] == ["all", "0.00", "1.00"]
    assert [row["samples"] for row in rows[:3]] == [6, 3, 3]
    by_settings = {
        row["settings"]: row for row in rows if row["depth"] == "all" and row["length"] == 256
    }
    dense, sparse, mixed = by_settings.values()
    assert (dense["path_prefill"], dense["cache"]) == ("sdpa", "-")
    assert (sparse["path_prefill"], sparse["path_decode"], sparse["cache"]) == (
        "sparse",
        "sparse",
        "pages",
    )
    assert 0 < sparse["read_decode"] < sparse["read_prefill"] < 0.6
    assert "sparse" in mixed["path_prefill"]
    assert "dense (dense layer)" in mixed["path_prefill"]
    assert printed["configs"][json.dumps(SMALL)]["dense_tail"] == 0


def test_everything_read_answers_as_dense(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    loaded, tokenizer = load(model, "sdpa")
    ids = tokenizer.encode(Path(text).read_text(), verbose=False)
    samples = [
        passkey.make_sample(tokenizer, ids, 256, 0.5, 1, random.Random(seed)) for seed in range(3)
    ]
    cells = []
    for config in settings_of(["dense", '{"budget": 512, "window": 16, "sink": 8}']).values():
        sparse = passkey.use(loaded, config)
        # a random model says no digits: hold it to what dense attention says
        generate = lambda ids: loaded.generate(ids, max_new_tokens=6, do_sample=False)  # noqa: E731
        cells.append(generate(torch.tensor([prompt for prompt, _ in samples])))
        if sparse:
            assert {row.path for row in explain(loaded)} == {"sparse"}
    assert torch.equal(*cells)


def test_refusals(tmp_path: Path) -> None:
    model, text = save_checkpoint(tmp_path)
    said = refused(passkey_command.main, model, "--document", text, "--lengths", "32")
    assert "length" in said
    assert "budget" in refused(
        passkey_command.main, model, "--document", text, "--settings", '{"budget": 17}'
    )
    assert "nonsense" in refused(
        passkey_command.main, model, "--document", text, "--settings", "nonsense"
    )
    assert "8192 or 64K" in refused(
        passkey_command.main, model, "--document", text, "--lengths", "many"
    )


def test_settings_and_sizes() -> None:
    settings = settings_of(
        ["defaults", "paper", '{"beam": 2, "window": 64}'], budget=256, sink=None, window=128
    )
    assert {config.budget for config in settings.values()} == {256}
    assert {config.dense_layers for config in settings.values()} == {0}
    assert [config.window for config in settings.values()] == [128, 128, 64]
    default = HiPConfig().representative
    assert [config.representative for config in settings.values()] == [default, "middle", default]
    assert sizes("512,64K") == [512, 65536]
    with pytest.raises(ValueError, match="token counts"):
        sizes("-1")
    with pytest.raises(ValueError, match="JSON dict"):
        settings_of(["[1]"])


def test_the_shipped_checkpoint_answers() -> None:
    """Dense and pruned to a tenth of the keys; and it is small."""
    from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, load

    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 8 * 2**20
    model, tokenizer = load(CHECKPOINT, "sdpa")
    text = tokenizer.encode(DOCUMENT.read_text(), add_special_tokens=False, verbose=False)
    prompts = [
        passkey.make_sample(tokenizer, text, 2048, depth, 1, random.Random(depth))
        for depth in (0.2, 0.5, 0.8)
    ]
    for config in settings_of(["dense", "defaults"], budget=128, window=64).values():
        cell = passkey.answer_samples(model, tokenizer, prompts, passkey.use(model, config))
        assert cell.exact >= 2, config.method
        if config.method == "hip":
            assert {row.path for row in cell.prefill + cell.decode} == {"sparse"}
            assert all(row.share < 0.2 for row in cell.decode)
