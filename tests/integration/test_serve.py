"""`hip-hf serve` as OpenAI's own client sees it: answers are `generate`'s, what fails says why, and
the others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT

pytest.importorskip("fastapi")
pytest.importorskip("openai")

from openai import APIStatusError, OpenAI
from pretrained import fetched
from served import NEW_TOKENS, Served, complete_all, serving, settings_options, soak
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

import hip_hf
from hip_hf.cli import autoload
from hip_hf.eval.measure import documents
from hip_hf_cli import app

WORDS = 255
LONGEST = 4096  # tokens of a request, in either mode
PAGE = 32
# Sparse everywhere. Plain generation prunes; in continuous batching, which splits prompts as it
# likes, the budget covers all.
SPARSE = {
    "dense_below": 0,
    "dense_layers": 0,
    "dense_tail": 0,
    "block_q": 16,
    "block_k": 4,
    "sink": 4,
    "window": 16,
}
SETTINGS = {"plain": {**SPARSE, "budget": 16}, "continuous": {**SPARSE, "budget": LONGEST}}
MODES = {
    "plain": ["--max-model-len", str(LONGEST)],
    "continuous": [
        "--continuous-batching", "--cb-block-size", str(PAGE),
        "--cb-num-blocks", str(LONGEST // PAGE + 1), "--cb-max-batch-tokens", "256",
    ],
}  # fmt: skip
LENGTHS = [3, 40, 500, 17, 260, 3500, 90, 8]
TRANSFORMERS = ("-c", "from transformers.cli.transformers import app; app()")  # its command
TIMEOUT = 300.0  # of a request that must be answered
HANG_UPS = 20
SOON = 60.0  # less than the answers of those who hung up would take
REAL_LENGTHS = [100, 130, 170, 250, 350, 500, 900, 2500]
REAL_TOKENS = 8


def environment() -> dict[str, str]:
    """Of a server that imports this working tree."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def options_of(settings: dict[str, int]) -> list[str]:
    return settings_options(f"{name}={value}" for name, value in settings.items())


def words(count: int, seed: int = 0) -> str:
    numbers = torch.randint(WORDS, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{number}" for number in numbers.tolist())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose tokens are words."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS + 1, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4 * LONGEST,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4)  # so that it matters what is attended to
    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<unk>", *(f"w{i}" for i in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(MODES))
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def server(
    mode: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("log") / "server"
    options = [*MODES[mode], *options_of(SETTINGS[mode])]
    with serving(str(checkpoint), *options, log=log, environment=environment()) as served_model:
        yield served_model


@pytest.fixture(scope="module")
def client(server: Served) -> Any:
    return server.client(timeout=TIMEOUT)


def chat(client: OpenAI, server: Served, text: str, tokens: int = 6, **options: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(
        model=server.model, messages=messages, max_tokens=tokens, temperature=0, **options
    )


def answer(client: OpenAI, server: Served, text: str, tokens: int = 6) -> str:
    return str(chat(client, server, text, tokens).choices[0].message.content)


def generated(
    folder: Path, texts: list[str], tokens: int, attention: str = "hip", **settings: int
) -> list[str]:
    """What `generate` makes of texts, greedily."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    hip_hf.configure(model, **settings)
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=0,
        )
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


# Answers


def test_a_chat_whole_and_streamed(
    client: OpenAI, server: Served, mode: str, checkpoint: Path
) -> None:
    text = words(400)
    (expected,) = generated(checkpoint, [text], 6, **SETTINGS[mode])
    whole = chat(client, server, text)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].finish_reason == "length"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (400, 6)
    chunks = list(chat(client, server, text, stream=True))
    parts = [chunk.choices[0].delta.content for chunk in chunks]
    assert "".join(part or "" for part in parts) == expected
    assert sum(bool(part) for part in parts) > 1  # it did not come at once
    assert chunks[-1].usage.completion_tokens == 6


def test_settings_reach_the_model(
    client: OpenAI, server: Served, mode: str, checkpoint: Path
) -> None:
    """A budget that prunes makes other answers than dense attention, one that covers all the same
    ones."""
    texts = [words(400, seed) for seed in range(3)]
    dense = generated(checkpoint, texts, 6, "sdpa")
    found = [answer(client, server, text) for text in texts]
    assert (found == dense) is (mode == "continuous")


def test_completions_and_responses(
    client: OpenAI, server: Served, mode: str, checkpoint: Path
) -> None:
    text = words(50)
    (expected,) = generated(checkpoint, [text], 6, **SETTINGS[mode])
    made = client.completions.create(model=server.model, prompt=text, max_tokens=6, temperature=0)
    assert made.choices[0].text == expected
    said = client.responses.create(
        model=server.model, input=text, max_output_tokens=6, temperature=0, stream=False
    )
    assert said.output_text == expected
    events = client.responses.create(
        model=server.model, input=text, max_output_tokens=6, temperature=0, stream=True
    )
    assert (
        "".join(event.delta for event in events if event.type == "response.output_text.delta")
        == expected
    )


def test_eight_clients_at_once(client: OpenAI, server: Served, mode: str, checkpoint: Path) -> None:
    texts = [words(length, seed) for seed, length in enumerate(LENGTHS)]
    expected = generated(checkpoint, texts, 12, **SETTINGS[mode])
    with ThreadPoolExecutor(len(texts)) as clients:
        found = list(clients.map(lambda text: answer(client, server, text, 12), texts))
    assert found == expected


def test_transformers_chat_streams_the_answer_to_a_terminal(
    server: Served, mode: str, checkpoint: Path, tmp_path: Path
) -> None:
    """As the documentation has it: what is typed goes to `hip-hf serve`, and comes back as
    `generate` answers."""
    text = words(9)
    (expected,) = generated(checkpoint, [f"{text} "], 6, **SETTINGS[mode])
    arguments = [
        *TRANSFORMERS,
        "chat",
        server.model,
        server.url,
        "do_sample=False",
        "max_new_tokens=6",
    ]
    typed, env = f"{text}\nN\n!exit\n", environment()  # no, the answer need not go on
    del env["HF_HUB_OFFLINE"]  # which would keep it from this machine, too
    done = subprocess.run(
        [sys.executable, *arguments],
        input=typed,
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert expected in " ".join(done.stdout.split())


# What goes wrong


BAD = {
    "unknown model": (400, "no-such-model", {"model": "no-such-model"}),
    "no messages": (400, "empty conversation", {"messages": []}),
    "messages of another type": (400, "string", {"messages": "hello"}),
    "a message without a role": (400, "role", {"messages": [{"content": "w1"}]}),
    "a temperature in words": (400, "hot", {"temperature": "hot"}),
    "no tokens to make": (400, "max_tokens", {"max_tokens": 0}),
    "a field that there is not": (422, "no_such_field", {"extra_body": {"no_such_field": 1}}),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", list(BAD))
def test_a_bad_request_gets_a_status_and_a_message(
    client: OpenAI, server: Served, what: str, stream: bool
) -> None:
    status, said, wrong = BAD[what]
    good: dict[str, Any] = {
        "model": server.model,
        "messages": [{"role": "user", "content": "w1"}],
        "max_tokens": 2,
    }
    with pytest.raises(APIStatusError) as error:
        client.chat.completions.create(**{**good, **wrong}, stream=stream)
    assert error.value.status_code == status
    assert said in error.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, LONGEST + PAGE, 5 * LONGEST])
def test_a_prompt_that_does_not_fit_is_refused(
    client: OpenAI, server: Served, checkpoint: Path, mode: str, tokens: int, stream: bool
) -> None:
    """Nor does an empty one: continuous batching does not survive it. Whoever is answered at that
    time notices nothing."""
    texts = [words(300, seed) for seed in range(4)]
    expected = generated(checkpoint, texts, 20, **SETTINGS[mode])
    with ThreadPoolExecutor(len(texts)) as clients:
        others = clients.map(lambda text: answer(client, server, text, 20), texts)
        with pytest.raises(APIStatusError) as error:
            client.completions.create(
                model=server.model, prompt=words(tokens), max_tokens=5, stream=stream
            )
        assert list(others) == expected
    assert error.value.status_code == 400
    assert f"prompt: got {tokens or 'no'} tokens, allowed:" in error.value.message


@pytest.mark.parametrize(("length", "made"), [(13, 3), (10, None), (3, None)])
def test_a_length_of_prompt_and_answer_together_is_kept_to(
    client: OpenAI, server: Served, length: int, made: int | None
) -> None:
    """`max_length` of a request's generation settings: with continuous batching Transformers'
    server knows none."""
    settings = {"max_length": length, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    asked = dict(
        model=server.model, prompt=words(10), extra_body={"generation_config": json.dumps(settings)}
    )
    if made is None:
        says = f"max_length: got {length}, allowed: more than the prompt's 10 tokens"
        with pytest.raises(APIStatusError, match=says) as error:
            client.completions.create(**asked)
        assert error.value.status_code == 400
    else:
        assert client.completions.create(**asked).usage.completion_tokens == made


def test_an_answer_ends_where_there_is_no_more_room(
    client: OpenAI, server: Served, mode: str
) -> None:
    most = LONGEST if mode == "plain" else (LONGEST // PAGE + 1) * PAGE
    made = chat(client, server, words(most - 4), 100)
    assert made.choices[0].finish_reason == "length"
    assert LONGEST <= made.usage.total_tokens <= most


def test_who_hangs_up_is_not_waited_for(server: Served) -> None:
    """Whether before the first token or later on. All these answers to their ends would take
    minutes."""
    for i in range(HANG_UPS):
        stream = server.client().completions.create(
            model=server.model, prompt=words(20, i), max_tokens=LONGEST, stream=True
        )
        for _ in range(i % 3):
            next(stream)
        stream.close()
    made = chat(
        server.client(timeout=SOON), server, words(LONGEST - 100), 4
    )  # which takes almost all of the cache
    assert made.usage.completion_tokens == 4


def test_many_requests_leave_no_memory_behind(server: Served, mode: str, checkpoint: Path) -> None:
    """A short form of `benchmarks/serving_soak.py`."""

    def expected(text: str) -> str:
        return generated(checkpoint, [text], NEW_TOKENS, **SETTINGS[mode])[0]

    first, middle, last = soak(
        server, words, expected, requests=40, every=20, longest=500, refused=2 * LONGEST
    )
    assert [(row["wrong"], row["other"]) for row in (first, middle, last)] == [(0, 0)] * 3
    assert last["most_tokens"] == 500
    assert last["answered"] > middle["answered"] > first["answered"] == 0
    assert last["resident_MiB"] < 1.1 * middle["resident_MiB"]


# The command


@pytest.fixture
def refused() -> Iterator[Callable[..., str]]:
    """What `hip-hf serve` says to arguments that it does not take; what it changes in Transformers
    is undone."""

    def run(*arguments: str) -> str:
        done = CliRunner(env={"COLUMNS": "400", "TERM": "dumb"}).invoke(app, ["serve", *arguments])
        assert done.exit_code == 2, done.output
        return " ".join(done.output.split())

    yield run
    hip_hf.unregister()
    hip_hf.register()


def test_mistakes_are_one_line(refused: Callable[..., str], checkpoint: Path) -> None:
    assert "budget: got -1, allowed:" in refused(str(checkpoint), "--set", "budget=-1")
    dense = ["--attn-implementation", "sdpa", "--set", "budget=64"]
    assert "settings apply to --attn-implementation hip" in refused(str(checkpoint), *dense)
    assert "layer: got 7, allowed: 0 to 1" in refused(str(checkpoint), "--set", "dense_layers=[7]")
    assert "cannot load" in refused(str(checkpoint.parent))
    assert "Must be one of" in refused(str(checkpoint), "--attn-implementation", "hop")


def test_plain_transformers_serve_after_autoload(checkpoint: Path, tmp_path: Path) -> None:
    """`transformers serve --attn-implementation hip`, in an environment that `hip-hf autoload
    enable` has written to."""
    site = tmp_path / "site"
    site.mkdir()
    for path, content in autoload.files().items():
        (site / path.name).write_text(content)
    (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site)!r})\n")
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join([str(site), env["PYTHONPATH"]])
    command = [*TRANSFORMERS, "serve"]
    attention = ["--attn-implementation", "hip"]
    with serving(
        str(checkpoint), *attention, log=tmp_path / "log", command=command, environment=env
    ) as plain:
        text = words(400)
        assert (
            answer(plain.client(timeout=TIMEOUT), plain, text)
            == generated(checkpoint, [text], 6)[0]
        )


# A real model


def test_real_model_answers_eight_clients_as_generate_does(tmp_path: Path) -> None:
    """Prompts that are all read at once attend as in `generate`, the two that are pruned too:
    dense, the shorter of these gets another answer."""
    folder = fetched()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(documents.DOCUMENT.read_text(encoding="utf-8"), verbose=False).input_ids
    texts = [
        tokenizer.decode(ids[100 * i : 100 * i + length]) for i, length in enumerate(REAL_LENGTHS)
    ]
    settings = {"dense_below": REAL_LENGTHS[-2] - 200, "budget": 128, "window": 64}
    room = [
        "--continuous-batching",
        "--cb-num-blocks",
        "64",
        "--cb-max-batch-tokens",
        str(2 * sum(REAL_LENGTHS)),
    ]
    with serving(
        str(folder), *room, *options_of(settings), log=tmp_path / "log", environment=environment()
    ) as real:
        found = complete_all(real.client(timeout=TIMEOUT), real.model, texts, REAL_TOKENS)
    expected = generated(folder, texts, REAL_TOKENS, **settings)
    assert [made.text for made in found] == expected
    assert generated(folder, texts[-2:-1], REAL_TOKENS, "sdpa") != expected[-2:-1]
    assert {made.usage["completion_tokens"] for made in found} == {REAL_TOKENS}
