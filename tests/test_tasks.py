"""The tasks: prompts of the wanted length with what they ask for in them, and the agreement with lm-eval's RULER tasks."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

from hip_hf.eval.documents import CHECKPOINT, DOCUMENT, note
from hip_hf.eval.tasks import common, language, notes, retrieval, ruler
from hip_hf.integration.lm_eval import TASKS, UsageError

LENGTHS = [1024, 1500]
META: dict[str, Any] = {"pretrained": str(CHECKPOINT), "max_seq_lengths": LENGTHS, "samples": 2}
LARGEST_UNIT = 150  # tokens of a long clause of the novel
GENERATORS: dict[str, Callable[..., Any]] = {
    "hip_passkey": notes.passkey,
    "hip_passkeys": notes.passkeys,
    "hip_niah_single": ruler.niah_single,
    "hip_niah_multikey": ruler.niah_multikey,
    "hip_niah_multivalue": ruler.niah_multivalue,
    "hip_niah_multiquery": ruler.niah_multiquery,
    "hip_variable_tracking": ruler.variable_tracking,
    "hip_common_words": ruler.common_words,
    "hip_frequent_words": ruler.frequent_words,
    "hip_key_value": retrieval.key_value,
    "hip_copying": retrieval.copying,
}


def docs(name: str, **metadata: Any) -> list[dict[str, Any]]:
    return list(GENERATORS[name](**{**META, **metadata})["test"])


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


def test_yaml_files_name_what_there_is() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={**META, "samples": 1})
    loaded = manager.load(["hip_longctx"])
    assert set(loaded["tasks"]) == {*GENERATORS, "hip_perplexity"}
    for name, task in loaded["tasks"].items():
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


def test_passkeys_are_notes_in_the_haystack(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat. It sat on a mat! Did it? " * 60)
    for haystack in (str(text), common.SYNTHETIC):
        for row in docs("hip_passkeys", haystack=haystack):
            name = row["gen_prefix"].removeprefix("The pass key of ").removesuffix(" is")
            assert row["input"].count(note(name, row["outputs"][0])) == 1
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
    assert found == {"nll": 1.5, "perplexity": 1.5, "1024": 1.5}
    assert language.exp_of_mean([1.0, 2.0]) == pytest.approx(math.exp(1.5))


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


# The agreement with lm-eval's own tasks.


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token per word: with the checkpoint's tokenizer `ruler_vt` never ends."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """lm-eval's modules: a few documents instead of 500, no download of NLTK data, hundreds of words and not 30M pairs."""
    nltk, wonderwords = pytest.importorskip("nltk"), pytest.importorskip("wonderwords")

    class FewWords(wonderwords.RandomWord):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._categories = {name: words[:400] for name, words in self._categories.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *names: True)
        patch.setattr(wonderwords, "RandomWord", FewWords)
        from lm_eval.tasks.ruler import common_utils, cwe_utils, fwe_utils, niah_utils, prepare_niah, vt_utils

        patch.setattr(
            niah_utils, "generate_samples", lambda *a, num_samples, **k: prepare_niah.generate_samples(*a, num_samples=3, **k)
        )
        for module, name in (
            (cwe_utils, "sys_word_pair_random"),
            (fwe_utils, "sys_kwext"),
            (vt_utils, "sys_vartrack_w_noise_random"),
        ):
            patch.setattr(module, name, _fewer(getattr(module, name)))
        yield {
            "niah_single_1": niah_utils.niah_single_1,
            "niah_multikey_2": niah_utils.niah_multikey_2,
            "ruler_vt": vt_utils.get_vt_dataset,
            "ruler_cwe": cwe_utils.get_cw_dataset,
            "ruler_fwe": fwe_utils.fwe_download,
            "process_results": common_utils.process_results,
        }


def _fewer(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: make(*args, **{**kwargs, "num_samples": min(kwargs.get("num_samples", 3), 3)})


def lines_of(text: str, task: str) -> tuple[str, list[str]]:
    """The context of a needle prompt and its needles' keys and values as `(key, value)` lines."""
    start = ruler.text_of("niah_utils", "TEMPLATE").index("{context}")
    body = text[text.index("\n") + 1 : text.rindex("\nWhat ")]
    assert start > 0, task
    return body, re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", body)


@pytest.mark.parametrize(
    ("their_name", "our_name"), [("niah_single_1", "hip_niah_single"), ("niah_multikey_2", "hip_niah_multikey")]
)
def test_needles_agree(theirs: Any, their_name: str, our_name: str) -> None:
    """From the context, key and value of each of lm-eval's documents we write the same prompt; and ours have their form."""
    found = list(theirs[their_name](pretrained=str(CHECKPOINT), max_seq_lengths=[1024])["test"])
    assert len(found) == 3
    for doc in found:
        context, facts = lines_of(doc["input"], their_name)
        (key,) = (key for key, value in facts if value == doc["outputs"][0])
        assert ruler.needle(key, doc["outputs"][0]) in context
        ours = ruler.render_needles(context, [key], doc["outputs"])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (doc["input"], doc["gen_prefix"], doc["outputs"])
    mine = docs(our_name, max_seq_lengths=[1024])
    for doc in mine:
        context, facts = lines_of(doc["input"], our_name)
        noise = [line for line in context.split("\n") if line not in {ruler.needle(*fact) for fact in facts}]
        assert set(noise) <= {ruler.NOISE}
        assert len(facts) == (1 if our_name == "hip_niah_single" else context.count("\n") + 1)
        # as long as theirs, to within the step by which they grow a prompt (five lines)
        assert context.count("\n") == pytest.approx(lines_of(found[0]["input"], "")[0].count("\n"), abs=6)


def test_variables_agree(theirs: Any, word_tokenizer: str) -> None:
    for doc in theirs["ruler_vt"](pretrained=word_tokenizer, max_seq_lengths=[1200])["test"]:
        head = ruler.text_of("vt_utils", "CONFIG")["variable_tracking"]["template"].partition("{context}")[0]
        at = doc["input"].rindex(head)
        context = doc["input"][at + len(head) : doc["input"].rindex("\nQuestion: ")]
        value = doc["input"].rpartition("assigned the value ")[2].split()[0]
        names = re.findall(r"VAR ([A-Z]{5}) = ", context)
        assert names == doc["outputs"]
        sentences = ruler.assignments(names, value)
        assert all(sentence in context for sentence in sentences)
        ours = ruler.render_variables([context], names, value, doc["input"][:at])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (doc["input"], doc["gen_prefix"], doc["outputs"])
        # our worked example has the form of theirs
        mine = docs("hip_variable_tracking", pretrained=word_tokenizer, max_seq_lengths=[1200])[0]
        shape = lambda text: re.sub(r"\b[A-Z]{3,5}\b|\d+", "X", text).split("\n")[-1]  # noqa: E731
        assert shape(mine["input"][: mine["input"].rindex(head)].rstrip()) == shape(doc["input"][:at].rstrip())
        assert mine["input"][: mine["input"].rindex(head)].endswith("\n\n\n\n") == doc["input"][:at].endswith("\n\n\n\n")


def test_words_agree(theirs: Any, word_tokenizer: str) -> None:
    meta = {"pretrained": word_tokenizer, "max_seq_lengths": [1200]}
    for doc in theirs["ruler_cwe"](**meta)["test"]:
        context = doc["input"].split("\n")[1]
        ours = ruler.render_words("cwe_utils", context, doc["outputs"])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (doc["input"], doc["gen_prefix"], doc["outputs"])
        counts = [
            Counter(re.findall(r"\d+\. (\D+?)(?= \d+\.|$)", text))
            for text in (context, docs("hip_common_words", **meta)[0]["input"].split("\n")[1])
        ]
        assert [set(count.values()) for count in counts] == [{6, 1}] * 2
        assert [sum(times == 6 for times in count.values()) for count in counts] == [10, 10]
    for doc in theirs["ruler_fwe"](**meta)["test"]:
        head, tail = ruler.text_of("fwe_utils", "CONFIG")["template"].split("{context}")
        context = doc["input"].removeprefix(head).removesuffix(tail)
        ours = ruler.render_words("fwe_utils", context, doc["outputs"])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (doc["input"], doc["gen_prefix"], doc["outputs"])
    for words, outputs in [(context.split(), doc["outputs"])] + [
        (row["input"].removeprefix(head).removesuffix(tail).split(), row["outputs"]) for row in docs("hip_frequent_words", **meta)
    ]:
        counts = Counter(words)
        ranked = [word for word, _ in counts.most_common()]
        assert ranked[0] == "..."
        assert ranked[1:4] == outputs
        # Zipf's law with exponent 2: the noise takes 6 / pi^2 of the words
        assert counts["..."] / counts[outputs[0]] == pytest.approx(4, rel=0.1)


def test_scores_agree(theirs: Any) -> None:
    rng = random.Random(0)
    for _ in range(200):
        outputs = [
            str(rng.randrange(100)) if rng.random() < 0.5 else rng.choice(["Anne", "Bath", "Lyme"])
            for _ in range(rng.randint(1, 5))
        ]
        answer = rng.choice(["", "\n", "so: "]) + rng.choice([", ", "\t", " and "]).join(
            rng.sample([*outputs, "anne", "BATH", "7"], 3 if len(outputs) > 1 else 1)
        )
        doc = {"outputs": outputs, "max_length": 4096}
        ours, want = common.process_results(doc, [answer]), theirs["process_results"](doc, [answer])
        assert ours == {"acc": want["4096"], "4096": want["4096"]}
