"""The agreement with lm-eval's own RULER tasks: prompts, files, scores and answers."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")
pytest.importorskip("datasets")

import lm_eval
import lm_eval_ruler
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from task_docs import docs

from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.eval.tasks import common, ruler
from hip_hf.integration.lm_eval.model import HipLM
from hip_hf.integration.lm_eval.registration import TASKS

theirs = lm_eval_ruler.theirs  # a fixture


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token per word: with the checkpoint's tokenizer `ruler_vt` never ends."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return str(folder)


def lines_of(text: str, task: str) -> tuple[str, list[str]]:
    """The context of a needle prompt and its needles' keys and values as `(key, value)` lines."""
    start = ruler.text_of("niah_utils", "TEMPLATE").index("{context}")
    body = text[text.index("\n") + 1 : text.rindex("\nWhat ")]
    assert start > 0, task
    return body, re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", body)


@pytest.mark.parametrize(
    ("their_name", "keys", "values"), [("niah_multivalue", 1, 4), ("niah_multiquery", 4, 1)]
)
def test_several_needles_agree(theirs: Any, their_name: str, keys: int, values: int) -> None:
    """As below, where several keys or values are asked for; ours hide as many, and ask for them in
    another text."""
    found = list(theirs[their_name](pretrained=str(CHECKPOINT), max_seq_lengths=[1024])["test"])
    assert len(found) == 3
    for doc in found:
        context, facts = lines_of(doc["input"], their_name)
        names = list(
            dict.fromkeys(
                next(key for key, value in facts if value == said) for said in doc["outputs"]
            )
        )
        assert (len(names), len(facts)) == (keys, keys * values)
        ours = ruler.render_needles(context, names, doc["outputs"])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (
            doc["input"],
            doc["gen_prefix"],
            doc["outputs"],
        )
    for doc in docs(f"hip_{their_name}", max_seq_lengths=[1024]):
        facts = re.findall(r"One of the special magic numbers for (\S+) is: (\d+)\.", doc["input"])
        assert sorted(value for _, value in facts) == sorted(doc["outputs"])
        assert len({key for key, _ in facts}) == keys
        assert all(key in doc["gen_prefix"] for key, _ in facts)


@pytest.mark.parametrize(
    ("their_name", "our_name"),
    [("niah_single_1", "hip_niah_single"), ("niah_multikey_2", "hip_niah_multikey")],
)
def test_needles_agree(theirs: Any, their_name: str, our_name: str) -> None:
    """From the context, key and value of each of lm-eval's documents we write the same prompt; and
    ours have their form."""
    found = list(theirs[their_name](pretrained=str(CHECKPOINT), max_seq_lengths=[1024])["test"])
    assert len(found) == 3
    for doc in found:
        context, facts = lines_of(doc["input"], their_name)
        (key,) = (key for key, value in facts if value == doc["outputs"][0])
        assert ruler.needle(key, doc["outputs"][0]) in context
        ours = ruler.render_needles(context, [key], doc["outputs"])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (
            doc["input"],
            doc["gen_prefix"],
            doc["outputs"],
        )
    mine = docs(our_name, max_seq_lengths=[1024])
    for doc in mine:
        context, facts = lines_of(doc["input"], our_name)
        noise = [
            line
            for line in context.split("\n")
            if line not in {ruler.needle(*fact) for fact in facts}
        ]
        assert set(noise) <= {ruler.NOISE}
        assert len(facts) == (1 if our_name == "hip_niah_single" else context.count("\n") + 1)
        # as long as theirs, to within the step by which they grow a prompt (five lines)
        assert context.count("\n") == pytest.approx(
            lines_of(found[0]["input"], "")[0].count("\n"), abs=6
        )


def test_variables_agree(theirs: Any, word_tokenizer: str) -> None:
    for doc in theirs["ruler_vt"](pretrained=word_tokenizer, max_seq_lengths=[1200])["test"]:
        head = ruler.text_of("vt_utils", "CONFIG")["variable_tracking"]["template"].partition(
            "{context}"
        )[0]
        at = doc["input"].rindex(head)
        context = doc["input"][at + len(head) : doc["input"].rindex("\nQuestion: ")]
        value = doc["input"].rpartition("assigned the value ")[2].split()[0]
        names = re.findall(r"VAR ([A-Z]{5}) = ", context)
        assert names == doc["outputs"]
        sentences = ruler.assignments(names, value)
        assert all(sentence in context for sentence in sentences)
        ours = ruler.render_variables([context], names, value, doc["input"][:at])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (
            doc["input"],
            doc["gen_prefix"],
            doc["outputs"],
        )
        # our worked example has the form of theirs
        mine = docs("hip_variable_tracking", pretrained=word_tokenizer, max_seq_lengths=[1200])[0]
        shape = lambda text: re.sub(r"\b[A-Z]{3,5}\b|\d+", "X", text).split("\n")[-1]  # noqa: E731
        assert shape(mine["input"][: mine["input"].rindex(head)].rstrip()) == shape(
            doc["input"][:at].rstrip()
        )
        assert mine["input"][: mine["input"].rindex(head)].endswith("\n\n\n\n") == doc["input"][
            :at
        ].endswith("\n\n\n\n")


def test_words_agree(theirs: Any, word_tokenizer: str) -> None:
    meta = {"pretrained": word_tokenizer, "max_seq_lengths": [1200]}
    for doc in theirs["ruler_cwe"](**meta)["test"]:
        context = doc["input"].split("\n")[1]
        ours = ruler.render_words("cwe_utils", context, doc["outputs"])
        assert (ours.input, ours.gen_prefix, ours.outputs) == (
            doc["input"],
            doc["gen_prefix"],
            doc["outputs"],
        )
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
        assert (ours.input, ours.gen_prefix, ours.outputs) == (
            doc["input"],
            doc["gen_prefix"],
            doc["outputs"],
        )
    for words, outputs in [(context.split(), doc["outputs"])] + [
        (row["input"].removeprefix(head).removesuffix(tail).split(), row["outputs"])
        for row in docs("hip_frequent_words", **meta)
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


# Our tasks, and the files of lm-eval's.
FILES = {
    "hip_niah_single": "niah_single_1",
    "hip_niah_multikey": "niah_multikey_2",
    "hip_niah_multivalue": "niah_multivalue",
    "hip_niah_multiquery": "niah_multiquery",
    "hip_variable_tracking": "vt",
    "hip_common_words": "cwe",
    "hip_frequent_words": "fwe",
}
SAME = (
    "output_type",
    "test_split",
    "doc_to_text",
    "doc_to_target",
    "gen_prefix",
    "target_delimiter",
)


def read_yaml(file: Path) -> dict[str, Any]:
    """A task's file and what it includes, without the functions it names."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    config = yaml.load(file.read_text(encoding="utf-8"), Loader)
    included = config.pop("include", None)
    return {**(read_yaml(file.parent / included) if included else {}), **config}


def files_of(ours: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our task's file and lm-eval's."""
    folder = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    return read_yaml(TASKS / f"{ours}.yaml"), read_yaml(folder / f"{FILES[ours]}.yaml")


@pytest.mark.parametrize("name", FILES)
def test_files_agree(name: str) -> None:
    ours, theirs = files_of(name)
    assert {field: ours[field] for field in SAME} == {field: theirs[field] for field in SAME}
    # a temperature of 0 is greedy decoding again
    assert {"temperature": 0.0, **ours["generation_kwargs"]} == theirs["generation_kwargs"]


def test_answers_and_scores_agree(
    theirs: Any, monkeypatch: pytest.MonkeyPatch, threads: Any
) -> None:
    """One model reads three of lm-eval's documents by lm-eval's task, and what we write from the
    same ingredients by ours."""
    threads(1)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = list(theirs["niah_single_1"](pretrained=str(CHECKPOINT), max_seq_lengths=[700])["test"])
    mine = []
    for doc in found:
        context, facts = lines_of(doc["input"], "niah_single_1")
        prompt = ruler.render_needles(
            context, [key for key, value in facts if value in doc["outputs"]], doc["outputs"]
        )
        mine.append({**vars(prompt), "max_length": doc["max_length"]})
    # the checkpoint finds none of the numbers: scores above zero take a word that it says in some
    # of its answers
    for doc in (*found, *mine):
        doc["outputs"] = [*doc["outputs"], "mint"]
    lm = HipLM(
        str(CHECKPOINT),
        device="cpu",
        budget=128,
        window=64,
        dense_layers=0,
        dense_below=0,
        dense_tail=0,
    )
    answers, scores = [], []
    for config, rows, score in zip(
        files_of("hip_niah_single"), (mine, found), (common, theirs), strict=True
    ):
        by = score.process_results if score is common else score["process_results"]
        metric = {"metric": "700", "aggregation": "mean", "higher_is_better": True}
        own = {
            **config,
            "custom_dataset": lambda rows=rows, **metadata: {"test": Dataset.from_list(rows)},
        }
        own |= {"process_results": by, "metric_list": [metric], "tag": None}
        own["generation_kwargs"]["max_gen_toks"] = 24  # digits enough
        run = lm_eval.simple_evaluate(
            lm, tasks=[ConfigurableTask(config=own)], bootstrap_iters=0, log_samples=True
        )
        ((_, samples),) = run["samples"].items()
        answers.append([sample["filtered_resps"] for sample in samples])
        scores.append([sample["700"] for sample in samples])
        assert [
            value
            for values in run["results"].values()
            for name, value in values.items()
            if name == "700,none"
        ] == [pytest.approx(sum(scores[-1]) / 3)]
    assert answers[0] == answers[1]
    assert len({str(answer) for answer in answers[0]}) == 3  # and each says something else
    assert scores[0] == scores[1]
    assert set(scores[0]) == {0, 0.5}
    assert list(lm.read.paths["prefill"]) == ["sparse"]
