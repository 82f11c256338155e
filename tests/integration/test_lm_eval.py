"""lm-eval through `hip`: three routes with the same scores, batches, two processes, arguments,
truncation, errors."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from repository import ROOT
from typer.testing import CliRunner

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval_cases
from lm_eval.models.huggingface import HFLM
from lm_eval_cases import ENVIRONMENT, SETTINGS, command, make_lm

from hip_hf.cli import autoload
from hip_hf.cli import lm_eval as lm_eval_command
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.documents import CHECKPOINT
from hip_hf.eval.tasks.common import load_tokenizer
from hip_hf.integration.lm_eval.model import split_arguments
from hip_hf.integration.lm_eval.registration import UsageError, register

# fixtures; the first two are for all tests of the module
indexed_once, hooked = lm_eval_cases.indexed_once, lm_eval_cases.hooked
offline_and_on_one_thread = lm_eval_cases.offline_and_on_one_thread

META = {"max_seq_lengths": [700, 800], "samples": 3, "data_seed": 1}
TASK = "hip_passkey"


Answers = list[tuple[int, str, float]]


def evaluate(batch_size: int = 1, task: str = TASK, **arguments: Any) -> dict[str, Any]:
    """lm-eval's Python API."""
    register()
    fields = {"pretrained": str(CHECKPOINT), **SETTINGS, **arguments}
    run = dict(metadata=META, batch_size=batch_size, device="cpu", bootstrap_iters=0)
    found = lm_eval.simple_evaluate(model="hip", model_args=fields, tasks=[task], **run)
    assert found is not None
    return dict(found)


def scores_of(results: dict[str, Any], task: str = TASK) -> dict[str, float]:
    return {
        name: value
        for name, value in results["results"][task].items()
        if name.endswith(",none") and "stderr" not in name
    }


def answers_of(samples: list[dict[str, Any]]) -> Answers:
    """Document, answer and score of each sample."""
    return sorted(
        (sample["doc_id"], sample["filtered_resps"][0], sample["acc"]) for sample in samples
    )


@pytest.fixture(scope="module")
def python_api() -> dict[str, Any]:
    return evaluate()


def command_line(out: Path) -> list[str]:
    fields = ",".join(
        f"{name}={value}" for name, value in {"pretrained": CHECKPOINT, **SETTINGS}.items()
    )
    samples = ["--output_path", str(out), "--log_samples"]
    return [
        "--model_args",
        fields,
        "--tasks",
        TASK,
        "--metadata",
        json.dumps(META),
        "--device",
        "cpu",
        *samples,
    ]


def run(command: list[str], out: Path, env: dict[str, str]) -> tuple[dict[str, Any], Answers, str]:
    """What a command wrote: results, answers, and to standard error."""
    done = subprocess.run(
        [sys.executable, *command, *command_line(out)],
        cwd=out,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    answers = answers_of([json.loads(line) for line in samples.read_text().splitlines()])
    return json.loads(results.read_text()), answers, done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def test_the_task_is_neither_trivial_nor_hopeless(python_api: dict[str, Any]) -> None:
    """Else the tests that compare scores would compare zeros: the digits are partly found, and read
    sparsely."""
    found = scores_of(python_api)
    assert 0 < found["acc,none"] <= 1
    read = python_api["config"]["hip"]
    assert 0 < read["keys_read"]["prefill"] < 0.9
    assert list(read["paths"]["prefill"]) == ["sparse"]


def test_results_carry_settings_versions_and_keys_read(python_api: dict[str, Any]) -> None:
    info = python_api["config"]["hip"]
    config = HiPConfig.from_dict(info["config"])
    assert {name: getattr(config, name) for name in SETTINGS} == SETTINGS
    assert set(info["config"]) == set(HiPConfig().to_dict())
    assert {"hip_hf", "torch", "transformers", "lm_eval", "datasets"} <= set(info["versions"])
    # four layers, six prompts, and each generated token after the first
    assert sum(info["paths"]["prefill"].values()) == 4 * 6
    assert sum(info["paths"]["decode"].values()) == 4 * 6 * 15
    assert json.loads(json.dumps(info)) == info


def test_console_script_gives_the_same(python_api: dict[str, Any], tmp_path: Path) -> None:
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    results, answers, _ = run(
        ["-c", "from hip_hf_cli import main; main()", "lm-eval"], tmp_path, env
    )
    assert scores_of(results) == scores_of(python_api)
    assert answers == answers_of(python_api["samples"][TASK])
    for part in ("config", "keys_read", "paths"):
        assert results["config"]["hip"][part] == python_api["config"]["hip"][part]


def test_autoload_gives_the_same(
    python_api: dict[str, Any], hooked: dict[str, str], tmp_path: Path
) -> None:
    results, answers, _ = run(["-m", "lm_eval", "--model", "hip"], tmp_path, hooked)
    assert scores_of(results) == scores_of(python_api)
    assert answers == answers_of(python_api["samples"][TASK])


def test_two_processes_give_the_same(
    python_api: dict[str, Any], hooked: dict[str, str], tmp_path: Path
) -> None:
    # accelerate starts several processes only when told of GPUs, and lets them be CPU processes
    # only when told so as well
    env = {**hooked, "ACCELERATE_USE_CPU": "true"}
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
    ]
    launch += ["-m", "lm_eval", "--model", "hip"]
    results, answers, stderr = run(launch, tmp_path, env)
    # a group left open aborts a process now and then while Python ends
    assert re.findall("the group is (.*)", stderr) == ["closed"] * 2
    assert scores_of(results) == scores_of(python_api)
    assert answers == answers_of(python_api["samples"][TASK])
    info = results["config"]["hip"]
    assert info["processes"] == 2
    # the first process did half of the prompts
    assert sum(info["paths"]["prefill"].values()) == 4 * 3


def test_batches_give_the_same_answers(python_api: dict[str, Any]) -> None:
    batched = evaluate(batch_size=4)
    assert answers_of(batched["samples"][TASK]) == answers_of(python_api["samples"][TASK])
    assert scores_of(batched) == scores_of(python_api)
    # the batches were padded on the left
    lengths = {sample["doc"]["length"] for sample in batched["samples"][TASK]}
    assert len(lengths) > 1


def test_other_settings_change_what_is_read(python_api: dict[str, Any]) -> None:
    dense = evaluate(method="dense", budget=1024)["config"]["hip"]
    assert dense["keys_read"]["prefill"] == 1
    assert all(path.startswith("dense") for path in dense["paths"]["prefill"])


def test_perplexity_is_that_of_the_model() -> None:
    """The task's loss equals the model's own on the same tokens."""
    found = evaluate(task="hip_perplexity", method="dense", budget=1024)
    lm = make_lm(method="dense")
    sample = found["samples"]["hip_perplexity"][0]
    doc = sample["doc"]
    ids = load_tokenizer(str(CHECKPOINT), "main", False)(
        doc["context"] + doc["target"], return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            lm.model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
        )
    assert sample["nll"] == pytest.approx(float(losses[-doc["tokens"] :].mean()), rel=1e-4)
    assert found["results"]["hip_perplexity"]["perplexity,none"] > 1


# Arguments


def test_arguments_are_told_apart() -> None:
    ours, theirs = split_arguments(
        {
            "budget": 512,
            "layers": "{1: {'budget': 64}}",
            "coarsest": "None",
            "method": "hip",
            "dtype": "float32",
            "revision": "x",
        }
    )
    assert ours == {"budget": 512, "layers": {1: {"budget": 64}}, "coarsest": None, "method": "hip"}
    assert theirs == {"dtype": "float32", "revision": "x"}


@pytest.mark.parametrize(
    ("argument", "mine"),
    [
        ({"backend": "torch"}, True),
        ({"backend": "causal"}, False),
        ({"delta": 64}, True),
        ({"delta": "64"}, True),
        ({"delta": None}, True),
        ({"delta": "some/delta-weights"}, False),
    ],
)
def test_shared_names_are_told_apart_by_value(argument: dict[str, Any], mine: bool) -> None:
    ours, theirs = split_arguments(argument)
    assert set(ours if mine else theirs) == set(argument)
    assert not (theirs if mine else ours)


def test_settings_merge_over_the_checkpoint() -> None:
    lm = make_lm(budget=128)
    config = lm.model.config.hip
    assert config["budget"] == 128
    assert config["query_stride"] == 8  # the checkpoint's
    assert lm.model.config._attn_implementation == "hip"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"budget": 17}, r"HiPConfig\.budget: got 17"),
        ({"method": "magic"}, r"HiPConfig\.method: got 'magic'"),
        ({"prompt_truncation": "right"}, "prompt_truncation: got 'right'"),
        ({"attn_implementation": "sdpa"}, "attn_implementation: got 'sdpa'"),
    ],
)
def test_bad_settings_are_refused_before_the_weights_load(
    arguments: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(HFLM, "_create_model", load)
    with pytest.raises(UsageError, match=said):
        make_lm(**arguments)


def test_layers_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="layer: got 9"):
        make_lm(layers={9: {"budget": 64}})


def test_register_twice_is_harmless() -> None:
    from lm_eval.tasks import TaskManager

    register()
    once = TaskManager.__init__
    register()
    assert TaskManager.__init__ is once
    manager = TaskManager(include_defaults=False)
    assert "hip_longctx" in manager.all_groups


# Truncation


def test_middle_truncation_keeps_both_ends() -> None:
    left, middle = make_lm(), make_lm(prompt_truncation="middle")
    tokenizer = left.tokenizer
    long, short = "The beginning. " + "word " * 300 + "The end.", "Short."
    ids = tokenizer(long).input_ids
    room = 40
    cut, mask = middle.tok_batch_encode([long, short], left_truncate_len=room)
    assert cut.shape == (2, room)
    assert cut[0].tolist() == ids[:20] + ids[-20:]
    expected = tokenizer(short).input_ids
    assert cut[1, mask[1].bool()].tolist() == expected
    assert mask[1].tolist() == [0] * (room - len(expected)) + [1] * len(expected)
    assert left.tok_batch_encode([long], left_truncate_len=room)[0][0].tolist() == ids[-room:]
    # what fits is not touched
    assert torch.equal(
        *(lm.tok_batch_encode([long, short], left_truncate_len=9999)[0] for lm in (left, middle))
    )


def test_middle_truncation_of_what_is_scored() -> None:
    """A continuation after a prompt that is too long is scored as after the prompt without its
    middle."""
    lm = make_lm(prompt_truncation="middle", method="dense", max_length=64)
    ids = lm.tokenizer("The beginning. " + "word " * 60 + "The end.").input_ids
    end = lm.tokenizer(" It was").input_ids
    room = 65 - len(end)
    kept = ids[: room // 2] + ids[-(room - room // 2) :]
    (cut,), (plain,) = (
        lm._loglikelihood_tokens([(("", ""), tokens, end)], disable_tqdm=True)
        for tokens in (ids, kept)
    )
    assert cut == plain
    left = make_lm(method="dense", max_length=64)
    assert left._loglikelihood_tokens([(("", ""), ids, end)], disable_tqdm=True)[0][
        0
    ] != pytest.approx(cut[0], rel=1e-6)


def test_stop_sequences_end_an_answer() -> None:
    lm = make_lm()
    prompt = (
        "\nThe pass key of amber is 48213. Remember it.\n" * 3
        + "\nWhat is the pass key of amber? The pass key of amber is"
    )

    def ask(until: list[str]) -> str:
        request = _request(prompt, {"until": until, "max_gen_toks": 12, "do_sample": False})
        return lm.generate_until([request])[0]

    answer = ask([])
    stop = answer.strip()[2]
    assert stop in answer
    assert ask([stop]) == answer[: answer.index(stop)]


def _request(prompt: str, generation: dict[str, Any]) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type="generate_until", doc={}, arguments=(prompt, generation), idx=0)


# Presets and errors


@pytest.fixture(scope="module")
def known() -> set[str]:
    """All tasks and groups of lm-eval, ours among them."""
    from lm_eval.tasks import TaskManager

    register()
    return set(TaskManager().all_tasks)


@pytest.mark.parametrize("preset", lm_eval_command.TASK_PRESETS)
def test_presets_become_arguments_of_lm_eval(preset: str, known: set[str]) -> None:
    """lm-eval's own parser reads them, and its tasks are there."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.config.evaluate_config import EvaluatorConfig

    user = [
        "--preset",
        preset,
        "--model_args",
        "pretrained=some/model,budget=512",
        "--metadata",
        "samples=3",
        "--limit",
        "2",
    ]
    arguments = lm_eval_command.arguments_for(user)
    config = EvaluatorConfig.from_cli(HarnessCLI()._parser.parse_args(arguments))
    wanted = lm_eval_command.TASK_PRESETS[preset]
    assert config.model == "hip"
    assert config.tasks == list(wanted.tasks)
    assert config.model_args == {**wanted.model_args, "pretrained": "some/model", "budget": 512}
    assert {name: config.metadata[name] for name in wanted.metadata} == wanted.metadata
    assert config.metadata["samples"] == 3
    assert set(wanted.tasks) <= known


def test_what_the_user_gives_wins() -> None:
    arguments = lm_eval_command.arguments_for(
        ["--preset=longbench", "-t", "longbench_lcc", "--model_args", "prompt_truncation=left"]
    )
    assert arguments.count("-t") == 1
    assert "--tasks" not in arguments
    assert arguments.index("prompt_truncation=left") > arguments.index(
        json.dumps({"prompt_truncation": "middle"})
    )
    assert lm_eval_command.arguments_for(["--model", "hf", "--tasks", "x"]) == [
        "run",
        "--model",
        "hf",
        "--tasks",
        "x",
    ]
    assert lm_eval_command.arguments_for(["--config", "x.yaml"]) == ["run", "--config", "x.yaml"]
    assert lm_eval_command.arguments_for(["ls", "tasks"]) == ["ls", "tasks"]
    with pytest.raises(UsageError, match="--preset: got 'nonsense', allowed: longctx"):
        lm_eval_command.arguments_for(["--preset", "nonsense"])
    with pytest.raises(UsageError, match="--preset: got it with another model type"):
        lm_eval_command.arguments_for(["--preset", "longbench", "--model", "hf"])


def test_a_missing_extra_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """`longbench` needs packages that few have."""
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setitem(sys.modules, "jieba", None)
    for name in [
        name for name in sys.modules if "longbench" in name
    ]:  # of a test that had stand-ins for the packages
        monkeypatch.delitem(sys.modules, name)
    done = command(
        "--preset", "longbench", "--model_args", f"pretrained={CHECKPOINT}", "--device", "cpu"
    )
    assert isinstance(done.exception, SystemExit), done.exception
    said = str(done.exception.code)
    assert said.startswith("hip-hf lm-eval: Please install the required dependencies")
    assert "\n" not in said


def test_a_model_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    done = command("--model_args", "pretrained=nobody/has-this", "--tasks", TASK, "--device", "cpu")
    assert isinstance(done.exception, SystemExit), done.exception
    assert str(done.exception.code).startswith(
        "hip-hf lm-eval: cannot reach the Hugging Face Hub: "
    )


def test_a_wrong_setting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    done = command(
        "--model_args", f"pretrained={CHECKPOINT},budget=17", "--tasks", TASK, "--device", "cpu"
    )
    assert str(done.exception.code).startswith("hip-hf lm-eval: HiPConfig.budget: got 17"), (
        done.exception
    )


# Autoload


def test_autoload_writes_and_removes_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoload.sysconfig, "get_path", lambda name: str(tmp_path))

    def do(*arguments: str) -> dict[str, Any]:
        app = typer.Typer()
        app.command()(autoload.main)
        done = CliRunner().invoke(app, [*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return dict(json.loads(done.stdout))

    assert do()["state"] == "disabled"
    assert do("enable")["state"] == "enabled"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hip_hf_autoload.pth",
        "hip_hf_autoload.py",
    ]
    (tmp_path / "hip_hf_autoload.py").write_text("# of another version\n")
    assert do("status")["state"] == "outdated"
    assert do("enable")["state"] == "enabled"
    assert do("disable")["state"] == "disabled"
    assert not list(tmp_path.iterdir())
    assert do("disable")["state"] == "disabled"


def test_autoload_costs_other_programs_nothing(hooked: dict[str, str]) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'hip_hf') if name in sys.modules]"
    code = f"import sys; assert 'hip_hf_autoload' in sys.modules; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], env=hooked, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_autoload_without_the_package_says_so(hooked: dict[str, str], tmp_path: Path) -> None:
    """The hook outlived hip_hf: lm-eval works, and a line says what to remove."""
    code = "import sys; sys.modules['hip_hf'] = None\nimport lm_eval.tasks\nprint('fine')"
    done = subprocess.run(
        [sys.executable, "-c", code], env=hooked, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "fine", done.stderr
    assert "hip is not registered" in done.stderr
    assert "autoload disable" in done.stderr
