"""The tasks: prompts of the wanted length with what they ask for in them."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from task_docs import GENERATORS, LENGTHS, META, docs

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from hip_hf.eval.measure.documents import CHECKPOINT, DOCUMENT, note_sentence
from hip_hf.eval.tasks import common, language, retrieval
from hip_hf.integration.lm_eval.registration import TASKS, UsageError

LARGEST_UNIT = 150  # tokens of a long clause of the novel


@pytest.mark.parametrize("name", GENERATORS)
def test_prompts_fill_their_length_and_hold_the_answer(name: str) -> None:
    rows = docs(name)
    # length by length, so that each of two processes has documents of all lengths
    assert [row["max_length"] for row in rows] == [LENGTHS[0]] * 2 + [LENGTHS[1]] * 2
    for row in rows:
        assert row["max_length"] - LARGEST_UNIT < row["length"] <= row["max_length"]
        assert row["outputs"]
        said = row["input"] + " " + row["gen_prefix"]
        assert all(want in said for want in row["outputs"])
    assert rows == docs(name)
    assert rows != docs(name, data_seed=1)
    assert len({row["input"] for row in rows}) == len(rows)


@pytest.mark.fast
def test_yaml_files_name_what_there_is() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={**META, "samples": 1}
    )
    loaded = manager.load(["hip_longctx"])
    assert set(loaded["tasks"]) == {*GENERATORS, "hip_perplexity"}
    better: dict[str, set[bool]] = {}
    for name, task in loaded["tasks"].items():
        for metric, high in task.higher_is_better().items():
            better.setdefault(metric, set()).add(high)
        assert task.config.custom_dataset is GENERATORS.get(name, language.perplexity)
        if name == "hip_perplexity":
            continue
        # the room that a prompt leaves for its answer is what may be generated
        doc = task.eval_docs[0]
        task.build_all_requests(limit=1)
        (request,) = task.instances
        prompt, generation = request.args
        tokenizer = common.load_tokenizer(str(CHECKPOINT), "main", False)
        assert len(tokenizer(prompt).input_ids) + generation["max_gen_toks"] == doc["length"]
    # else lm-eval warns of a group whose tasks do not agree, length by length
    assert {metric: len(kinds) for metric, kinds in better.items()} == dict.fromkeys(better, 1)
    assert better["nll_1024"] == {False}
    assert better["1024"] == {True}


def test_passkeys_are_notes_in_the_haystack(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat. It sat on a mat! Did it? " * 60)
    for haystack in (str(text), common.SYNTHETIC):
        for row in docs("hip_passkeys", haystack=haystack):
            name = row["gen_prefix"].removeprefix("The pass key of ").removesuffix(" is")
            assert row["input"].count(note_sentence(name, row["outputs"][0])) == 1
            assert row["input"].endswith(f"\nWhat is the pass key of {name}?")
            assert row["input"].count("Remember it.") == 8
            plain = re.sub(r"\nThe pass key of \w+ is \d+\. Remember it\.\n", "", row["input"])
            assert ("The cat sat. " in plain) == (haystack != common.SYNTHETIC)


def test_copying_asks_for_words_that_follow() -> None:
    for row in docs("hip_copying"):
        passage = row["gen_prefix"] + " " + " ".join(row["outputs"])
        assert len(row["outputs"]) == retrieval.WANTED
        assert passage in row["input"]
        assert DOCUMENT.read_text().count(row["gen_prefix"]) >= 1
    doc = {"outputs": ["a", "b\nc", "", "d"], "max_length": 1024}
    assert retrieval.words_in_order(doc, [" a b c d e"])["acc"] == 1
    assert retrieval.words_in_order(doc, ["a b x d"]) == {"acc": 0.5, "1024": 0.5}
    assert retrieval.words_in_order(doc, [""])["acc"] == 0


def test_key_value_lists_every_pair_once() -> None:
    for row in docs("hip_key_value"):
        listing = json.loads(row["input"][row["input"].index("{") : row["input"].rindex("}") + 1])
        key = row["gen_prefix"].split('"')[1]
        assert listing[key] == row["outputs"][0]
        assert len(listing) > 5


def test_perplexity_scores_the_same_words_after_more_and_more_text() -> None:
    rows = list(language.perplexity(**META)["test"])
    text = DOCUMENT.read_text()
    tokenizer = common.load_tokenizer(str(CHECKPOINT), "main", False)
    count = lambda string: len(tokenizer(string, verbose=False).input_ids)  # noqa: E731
    for short, long in zip(rows[:2], rows[2:], strict=True):
        assert short["target"] == long["target"]
        assert long["context"].endswith(short["context"])
        assert long["context"] + long["target"] in text
        for row, length in zip((short, long), LENGTHS, strict=True):
            assert 0.95 * length < count(row["context"] + row["target"]) <= length
            assert row["tokens"] == count(row["context"] + row["target"]) - count(row["context"])
    found = language.process_results({"tokens": 4, "max_length": 1024}, [(-6.0, False)])
    assert found == {"nll": 1.5, "perplexity": 1.5, "nll_1024": 1.5}
    assert language.exp_of_mean([1.0, 2.0]) == pytest.approx(math.exp(1.5))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"max_seq_lengths": [0]}, "max_seq_lengths: got 0"),
        ({"max_seq_lengths": [64]}, "room for 48 tokens"),
        ({"max_seq_lengths": []}, "max_seq_lengths: got \\[\\]"),
        ({"samples": 0}, "samples: got 0"),
        ({"data_seed": -1}, "data_seed: got -1"),
        ({"pretrained": None}, "tokenizer: got None"),
        ({"haystack": "/no/such/file"}, "haystack: got '/no/such/file'"),
    ],
)
def test_bad_metadata_is_refused(metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        docs("hip_passkeys", **metadata)


def test_perplexity_refuses_what_has_none() -> None:
    with pytest.raises(UsageError, match="synthetic"):
        language.perplexity(**META, haystack=common.SYNTHETIC)
    with pytest.raises(UsageError, match=r"max_seq_lengths: got 9000000, allowed: up to about \d+"):
        language.perplexity(**{**META, "max_seq_lengths": [9000000]})


@pytest.mark.parametrize("grain", [1, 7])
def test_fit_finds_the_largest_size_that_fits(grain: int) -> None:
    """On any cost that grows, whatever the guess: the largest size, or one that fills its room."""
    rng = random.Random(grain)
    for _ in range(50):
        costs = [rng.randrange(3)]
        while len(costs) < 60:
            costs.append(costs[-1] + grain * rng.randrange(1, 6))
        room = rng.randrange(costs[0], costs[-1])
        size = common.fit(costs.__getitem__, room, rng.randrange(50), 0, largest=len(costs) - 1)
        assert costs[size] <= room
        assert costs[size + 1] > room or costs[size] >= common.FULL * room
