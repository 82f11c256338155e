"""`config.hip` of a checkpoint from anywhere: validated like what a user gives, and harmless. Each
value is refused by name or runs, in the memory and the time of ordinary settings; nothing is
unpickled, fetched, executed or read from elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SPARSE, make_batch, make_model
from repository import ROOT

import hip_hf
from hip_hf import HiPConfig, hip_attention
from hip_hf.config import MOST, MOST_BLOCK_Q
from hip_hf.eval.measure.documents import CHECKPOINT

HUGE = 2**70
LONGEST_ERROR = 1500  # characters; the names of all fields are among them


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


SIZES = [
    "budget",
    "block_q",
    "block_k",
    "query_stride",
    "sink",
    "window",
    "beam",
    "rescore",
    "coarsest",
    "dense_layers",
]
SIZES += ["dense_below", "dense_tail", "delta", "decode_refresh", "seed"]
OPTIONS: dict[str, dict[str, Any]] = {
    "hip": {"sample": HUGE, "descent": HUGE},
    "hyper": {"block_size": HUGE},
    "vertical_slash": {"rows": HUGE},
    "staged": {"halvings": HUGE},
    "quest": {"a": nested(5000)},
}
REFUSED: list[Any] = [
    *({name: value} for name in SIZES for value in (HUGE, 10**5000)),
    *({"method": method, "options": options} for method, options in OPTIONS.items()),
    {"method": "staged", "options": {"stages": [[HUGE, HUGE, 1], [8, 32, 1]]}},
    {"method": "sample", "options": {"rows": float("nan")}},
    {"layers": {"1": {"options": {"sample": nested(5000)}}}},
    {"layers": {"9" * 5000: {}}},
    {"layers": {"1": {"budget": HUGE}}},
    {"layers": {"-1": {}}},
    {"layers": [1]},
    {"decode_refresh": [1] * 10**6},
    {"decode_refresh": [HUGE, 1]},
    {"method": "x" * 10**6},
    {"method": "os.system"},
    {"budget": "x" * 10**6},
    {"budget": float("inf")},
    {"x" * 10**6: 1},
    {"__class__": 1},
    {"text": "x"},
    {1: 2},
    *([], 5, True, "hip"),
]


@pytest.mark.parametrize(
    "hostile",
    REFUSED,
    ids=lambda value: str(list(value) if isinstance(value, dict) else value)[:30],
)
def test_hostile_settings_are_refused_in_one_short_sentence(hostile: Any) -> None:
    """At the model's first forward, before the cache has anything."""
    model = make_model("llama")
    model.config.hip = {**SPARSE, **hostile} if isinstance(hostile, dict) else hostile
    cache = hip_hf.HiPCache(model.config)
    with torch.no_grad(), pytest.raises(ValueError, match=r"^HiPConfig\.") as caught:
        model(**make_batch([40]), past_key_values=cache)
    assert len(str(caught.value)) < LONGEST_ERROR
    assert cache.get_seq_length() == 0


def test_layers_that_the_model_does_not_have_are_refused() -> None:
    """As `configure` refuses them; another model may have them."""
    for field in ({"layers": {"2": {"budget": 64}}}, {"dense_layers": [2]}):
        model = make_model("llama")
        model.config.hip = {**SPARSE, **field}
        with (
            torch.no_grad(),
            pytest.raises(
                ValueError, match=r"^layer: got 2, allowed: 0 to 1, the layers of this model"
            ),
        ):
            model(**make_batch([40]))


# What is not refused must not cost more than settings of this kind do.


@pytest.fixture
def largest_tensor(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers in the largest tensor that any operation gave since the list was cleared."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    most = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes = [
                leaf.untyped_storage().nbytes()
                for leaf in tree_leaves(out)
                if isinstance(leaf, torch.Tensor)
            ]
            most[0] = max([most[0], *sizes])
            return out

    with Watch():
        yield most


LARGEST: list[dict[str, Any]] = [
    *({name: MOST} for name in SIZES if name not in ("block_q", "block_k", "budget", "seed")),
    {"budget": MOST},
    {"block_k": MOST, "budget": MOST},
    {"seed": 2**63 - 1},
    {"block_q": MOST_BLOCK_Q},
    {"delta": 16, "decode_refresh": MOST},
    {"method": "hyper", "options": {"block_size": MOST, "sample_size": MOST, "min_seq_len": 16}},
    {"method": "sample", "options": {"rows": 1e-300}},
    {"method": "vertical_slash", "options": {"rows": MOST}},
    {
        "method": "hip",
        "options": {"sample": MOST},
        "rescore": MOST,
        "beam": MOST,
        "query_stride": 1,
    },
]


@pytest.mark.parametrize("fields", LARGEST, ids=lambda fields: "-".join(map(str, fields))[:40])
def test_the_largest_settings_take_no_more_memory(
    fields: dict[str, Any], largest_tensor: list[int]
) -> None:
    """No tensor grows with a setting: the largest is that of a T x T one at most, and decode needs
    no more."""
    tokens, heads = 300, 4
    model = make_model("llama")
    hip_hf.configure(model, **{"dense_tail": 16, **fields})
    with torch.no_grad():
        model.generate(**make_batch([tokens, 260]), max_new_tokens=3, do_sample=False)
    assert largest_tensor[0] <= 8 * 2 * heads * tokens * tokens


def test_a_selection_that_serves_for_ever_grows_with_the_steps_alone() -> None:
    """What its steps read is kept side by side, beyond the room that there is at first, and stays
    right."""
    settings = dict(
        budget=32, block_k=8, block_q=16, sink=8, window=16, dense_below=0, dense_tail=0
    )
    tokens, steps = 200, 150
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, 4, tokens + steps, 16),
        torch.randn(1, 2, tokens + steps, 16),
        torch.randn(1, 2, tokens + steps, 16),
    )
    found = []
    for refresh in (MOST, steps + 1):
        state, config = hip_hf.DecodeState(), HiPConfig(**settings, decode_refresh=refresh)
        outs = []
        for end in (tokens, *range(tokens + 1, tokens + steps + 1)):
            first = 0 if end == tokens else end - 1
            outs.append(
                hip_attention(
                    q[:, :, first:end], k[:, :, :end], v[:, :, :end], config=config, state=state
                )
            )
        found.append(torch.cat(outs, 2))
        buffer = state.rows[0].decode_buffer
        assert buffer.count > tokens > settings["budget"] + settings["sink"] + settings["window"]
        assert buffer.k.shape[1] <= 2 * buffer.count
    assert torch.equal(*found)


# A checkpoint whose settings name code, files and addresses.

WATCHED = """
import json, os, sys
from pathlib import Path
import torch, transformers, hip_hf
from transformers import AutoModelForCausalLM

folder, hostile, seen = sys.argv[1], json.loads(sys.argv[2]), set()
config = Path(folder, "config.json")
plain = json.loads(config.read_text())
watched = {"socket.connect", "socket.getaddrinfo", "pickle.find_class", "subprocess.Popen"}
watched |= {"os.system", "exec", "import", "open"}

def audit(event, args):
    if event in watched and not (event == "open" and os.fsdecode(str(args[0])).startswith(folder)):
        seen.add((event, str(args[0])[:80]))

def use(settings):
    config.write_text(json.dumps({**plain, "hip": {**plain["hip"], **settings}}))
    seen.clear()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="hip")
        with torch.no_grad():
            model.generate(torch.ones(1, 200, dtype=torch.long), max_new_tokens=2)
    except ValueError as refused:
        return str(refused), set(seen)
    return "", set(seen)

use({"dense_below": 0})  # what is imported once
sys.addaudithook(audit)
known = use({})[1]
found = [use(settings) for settings in hostile]
print("\\n" + json.dumps([[error, sorted(events - known)] for error, events in found]))
"""


def test_settings_reach_nothing_outside_the_checkpoint(tmp_path: Path) -> None:
    """Nothing is opened, imported, unpickled, executed or connected to that loading the checkpoint
    does not do by itself."""
    cases = [
        ({"method": "os", "options": {"path": "/etc/hostname"}}, "HiPConfig.method: got 'os'"),
        (
            {"trust_remote_code": True, "auto_map": {"AutoModel": "evil.Model"}},
            "HiPConfig.trust_remote_code: unknown field",
        ),
        ({"backend": "http://example.com/x"}, "HiPConfig.backend: got 'http://example.com/x'"),
        ({"budget": 64, "dense_below": 0}, ""),
    ]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    command = [
        sys.executable,
        "-c",
        WATCHED,
        str(folder),
        json.dumps([settings for settings, _ in cases]),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (_, said), (error, events) in zip(
        cases, json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert error.startswith(said) if said else not error
        assert events == []
