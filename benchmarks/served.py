"""A model that another process of this machine serves, and clients that ask it: for measurements
and tests."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
# `hip-hf serve`, whether or not the script is on the path
HIP_HF = ("-c", "from hip_hf_cli import main; main()", "serve")
START_SECONDS, START_POLL_SECONDS, STOP_SECONDS = 600, 0.1, 30
NEW_TOKENS, LONG = 16, 10_000  # of an answer; of one that nobody waits for
# Seconds between two pieces of an answer, while eight long prompts may be read one by one.
PATIENCE = 3600.0
LOG_LINES = 30  # of a server that did not start, in the error


def settings_options(settings: Iterable[str]) -> list[str]:
    """Options of `hip-hf serve` for settings of the form `field=value`."""
    return [option for one in settings for option in ("--set", one)]


@dataclass(frozen=True)
class Served:
    """A server that is up; clients name its model by its checkpoint."""

    model: str
    url: str
    process: subprocess.Popen[bytes]

    def client(self, **options: Any) -> Any:
        """OpenAI's own client, which tries nothing twice."""
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def resident_mib(self) -> float:
        """Memory of the server's process."""
        import psutil

        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@contextmanager
def serving(
    model: str,
    *options: str,
    log: Path,
    command: Sequence[str] = HIP_HF,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Served]:
    """A server of a checkpoint that is up while the context is open.

    Args:
        options: of the command.
        log: what the server prints goes to this file.
        command: Python's arguments that run it.
        environment: of the process; None: as this one's.

    Raises:
        RuntimeError: it ended, or was not up in ten minutes; with the end of what it printed.
    """
    arguments = [sys.executable, *command, model, "--host", HOST, "--port", "0", *options]
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    end = time.monotonic() + START_SECONDS
    printed = partial(log.read_text, encoding="utf-8", errors="replace")
    try:
        while (
            found := re.search(rf"running on (http://{re.escape(HOST)}:\d+)", printed())
        ) is None:
            if process.poll() is not None or time.monotonic() > end:
                said = printed().splitlines()[-LOG_LINES:]
                raise RuntimeError("the server did not start:\n" + "\n".join(said))
            time.sleep(START_POLL_SECONDS)
        yield Served(model, found.group(1), process)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass
class ServedAnswer:
    """A streamed answer and when it came, in seconds after it was asked for."""

    text: str = ""
    first_token_s: float = 0.0
    seconds: float = 0.0
    usage: dict[str, int] = field(default_factory=dict)


def greedy(new_tokens: int) -> dict[str, Any]:
    """What a request says to get `new_tokens` tokens, the likeliest each, whatever the checkpoint
    says."""
    options = {
        "do_sample": False,
        "max_new_tokens": new_tokens,
        "eos_token_id": -1,
        "pad_token_id": 0,
    }
    return {"extra_body": {"generation_config": json.dumps(options)}}


def complete(client: Any, model: str, prompt: str, new_tokens: int) -> ServedAnswer:
    """Stream the continuation of a prompt by `new_tokens` tokens."""
    answer, start = ServedAnswer(), time.perf_counter()
    for chunk in client.completions.create(
        model=model, prompt=prompt, stream=True, **greedy(new_tokens)
    ):
        if chunk.choices[0].text and not answer.text:
            answer.first_token_s = time.perf_counter() - start
        answer.text += chunk.choices[0].text
        if chunk.usage is not None:
            answer.usage = chunk.usage.model_dump()
    answer.seconds = time.perf_counter() - start
    return answer


def complete_all(
    client: Any, model: str, prompts: Sequence[str], new_tokens: int
) -> list[ServedAnswer]:
    """The same for several prompts at once, a client each."""
    with ThreadPoolExecutor(len(prompts)) as clients:
        return list(
            clients.map(lambda prompt: complete(client, model, prompt, new_tokens), prompts)
        )


def soak(
    server: Served,
    text: Callable[[int, int], str],
    generated: Callable[[str], str],
    requests: int,
    every: int,
    longest: int,
    refused: int,
    clients: int = 8,
) -> list[dict[str, Any]]:
    """Ask for answers of all kinds, several at once, and note the server's memory before, and after
    each `every` requests.

    `text(tokens, seed)` makes prompts. A tenth have `longest` tokens; the logarithms of the others'
    lengths are spread evenly, so that most are short. Some have `refused` tokens, which is more
    than the server takes. `generated(prompt)` is the right answer, greedy and of `NEW_TOKENS`
    tokens: it is asked for after each row's requests, while the server has nothing to do.

    In a row all counts are of the requests so far. `wrong` got what they should not have: an error,
    no error, or, asked again alone, another answer than the first time. `other` answers are not
    `generated`. `most_tokens`: of an answered prompt.
    """
    from openai import APIStatusError

    client, most = server.client(timeout=PATIENCE), 0
    counts = {"answered": 0, "hung_up": 0, "refused": 0, "wrong": 0, "other": 0}

    def same() -> str:
        return complete(client, server.model, text(-(-longest // 8), 0), NEW_TOKENS).text

    def ask(i: int) -> tuple[str, str, ServedAnswer | None]:
        prompt = text(
            longest if i % 10 == 0 else math.ceil(longest ** random.Random(i).random()), i
        )
        try:
            if i % 10 == 8:
                client.completions.create(model=server.model, prompt=text(refused, i))
            elif i % 10 == 9:
                client.chat.completions.create(model=server.model, messages=[])
            elif i % 5 == 2:
                with client.completions.create(
                    model=server.model, prompt=prompt, stream=True, **greedy(LONG)
                ) as stream:
                    next(stream)
                return "hung_up", prompt, None
            else:
                answer = complete(client, server.model, prompt, NEW_TOKENS)
                if answer.usage["completion_tokens"] == NEW_TOKENS:
                    return "answered", prompt, answer
        except APIStatusError as error:
            return "refused" if error.status_code == 400 and i % 10 >= 8 else "wrong", prompt, None
        return "wrong", prompt, None

    first_answer, rows = same(), []
    for first in range(0, requests + 1, every):
        rows.append(
            {
                "requests": first,
                **counts,
                "most_tokens": most,
                "resident_MiB": server.resident_mib(),
            }
        )
        if first < requests:
            with ThreadPoolExecutor(clients) as threads:
                found = list(threads.map(ask, range(first, min(first + every, requests))))
            counts["wrong"] += same() != first_answer
            for outcome, prompt, answer in found:
                counts[outcome] += 1
                if answer is not None:
                    counts["other"] += answer.text != generated(prompt)
                    most = max(most, answer.usage["prompt_tokens"])
    return rows
