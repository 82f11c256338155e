"""The lm-eval model type `hip`: fields of `HiPConfig` as model arguments, the rest is lm-eval's
Hugging Face model."""

from __future__ import annotations

import ast
import atexit
import dataclasses
import difflib
import inspect
from collections import Counter, defaultdict
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import truncate_tokens
from torch import nn

import hip_hf
from hip_hf.config import BACKENDS, HiPConfig
from hip_hf.geometry import DECODE_ROWS
from hip_hf.integration.api import configure
from hip_hf.integration.layer_attention import Call
from hip_hf.integration.lm_eval.registration import UsageError
from hip_hf.integration.model_checks import attention_layers
from hip_hf.integration.settings import NAMES, read_settings, text_config

TRUNCATION = ("left", "middle")
FIELDS = {field.name: field for field in dataclasses.fields(HiPConfig)}
# From this ratio of `difflib` on an argument that nobody knows is taken for a mistyped field.
# Lower ones are met by names that Transformers' `from_pretrained` takes (`device_mesh`), which are
# listed nowhere.
MISTYPED = 0.7
# What lm-eval pads scored texts with, on the right and whatever the tokenizer's padding is.
PADDING = 0


def split_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Model arguments as (fields of `HiPConfig`, all others).

    Two names mean something to lm-eval's model as well; the value tells which is meant: `backend`
    is a field when it is one of `BACKENDS`, and `delta` when it is a number (lm-eval's is a path of
    delta weights).
    """
    fields: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in arguments.items():
        is_field = name in FIELDS
        if name == "backend":
            is_field = value in BACKENDS
        elif name == "delta":
            is_field = value is None or not isinstance(_value(value), str)
        if is_field:
            fields[name] = value if name in ("method", "representative") else _value(value)
        else:
            others[name] = value
    return fields, others


def refuse_mistyped(arguments: dict[str, Any], config: Any) -> None:
    """Raise UsageError for an argument that is nearly a field, and neither one of lm-eval's
    model nor, in the model's `config`, a setting of the model: it would end up in the model's
    constructor, or nowhere."""
    taken, known = inspect.signature(HFLM.__init__).parameters, [*FIELDS, "prompt_truncation"]
    for name, value in arguments.items():
        if name in taken or hasattr(config, name):
            continue
        close = difflib.get_close_matches(name, known, n=1, cutoff=MISTYPED)
        if close:
            what = f"unknown model argument with value {value!r}"
            raise UsageError(f"{name}: {what} (did you mean {close[0]!r}?)")


def _value(text: Any) -> Any:
    """What a model argument says: lists, dicts and None come as text from one string of all."""
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _without_padding(ids: list[int]) -> tuple[int, ...]:
    """Token ids up to the last that is not the one which lm-eval pads with."""
    end = len(ids)
    while end and ids[end - 1] == PADDING:
        end -= 1
    return tuple(ids[:end])


def _leave_group() -> None:
    """Close the group of the processes that share a model's heads, unless somebody has."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class KeysRead:
    """A forward hook on the model that counts what its attention layers did: the density of each
    call (of the visible keys, the fraction that was read), and paths.

    A call with up to `DECODE_ROWS` rows is decode, as it is for the attention. All densities count
    alike.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = attention_layers(model)
        self.clear()

    def clear(self) -> None:
        """Start counting anew."""
        # of each phase the densities of its calls, added up, and how many these are
        self.totals: dict[str, list[float]] = {"prefill": [0.0, 0], "decode": [0.0, 0]}
        self.paths: dict[str, Counter[str]] = defaultdict(Counter)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        rows = next(tensor.shape[1] for tensor in given if tensor is not None)
        phase = "decode" if rows <= DECODE_ROWS else "prefill"
        for layer in self.layers:
            call: Call | None = layer.__dict__.get("_hip_call")
            if call is not None:
                self.totals[phase][0] += call.density
                self.totals[phase][1] += 1
                path = call.path if call.path == "sparse" else f"{call.path} ({call.reason})"
                self.paths[phase][path] += 1

    def summary(self) -> dict[str, Any]:
        """Mean density in prefill and in decode (None: no such call), and layer calls per path."""
        means = {
            name: total / count if count else None for name, (total, count) in self.totals.items()
        }
        return {
            "keys_read": means,
            "paths": {name: dict(each) for name, each in self.paths.items()},
        }


class HipLM(HFLM):
    """lm-eval's Hugging Face model, attending through `hip`.

    Model arguments that are fields of `HiPConfig` merge over the checkpoint's own settings
    (`config.hip`); `prompt_truncation` says where prompts longer than the model are cut: `left`
    (lm-eval's way) or `middle` (LongBench's); all others go to `HFLM`.

    Raises:
        UsageError: a setting is unknown to `HiPConfig` or out of range; before any weights are
        loaded.
    """

    def __init__(self, pretrained: Any, prompt_truncation: str = "left", **arguments: Any) -> None:
        if prompt_truncation not in TRUNCATION:
            got = f"prompt_truncation: got {prompt_truncation!r}"
            raise UsageError(f"{got}, allowed: {' | '.join(TRUNCATION)}")
        self.prompt_truncation = prompt_truncation
        self._fields, self._rest = split_arguments(arguments)
        rest = dict(self._rest)
        name = rest.pop("attn_implementation", "hip")
        if name not in NAMES:
            allowed = f"{' | '.join(NAMES)}; use the model type `hf` for others"
            raise UsageError(f"attn_implementation: got {name!r}, allowed: {allowed}")
        if isinstance(pretrained, str):
            rest["attn_implementation"] = name
        else:
            refuse_mistyped(self._rest, pretrained.config)
            pretrained.set_attn_implementation(name)
        self._ends_in_padding: dict[tuple[int, ...], int] = {}
        super().__init__(pretrained, **rest)
        self.use(**self._fields)
        if hasattr(self, "accelerator") and self.world_size == 1 and rest.get("tp_plan") is None:
            # HFLM shares the work among processes only where it sees several GPUs; without this
            # each would do all of it
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        # lm-eval ends with the group open: a thread of it that lets go of a tensor while Python
        # ends aborts the process
        if hasattr(self, "accelerator"):
            atexit.register(self.accelerator.state.destroy_process_group)
        elif rest.get("tp_plan") is not None:
            atexit.register(_leave_group)
        self.read = KeysRead(self.model)
        self.model.register_forward_hook(self.read, with_kwargs=True)

    def use(self, config: HiPConfig | None = None, **fields: Any) -> HiPConfig:
        """`configure` the model for the next evaluation. Raises UsageError for what it refuses;
        nothing has changed then."""
        try:
            self.settings = configure(self.model, config, **fields)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return self.settings

    def _get_config(self, *args: Any, **kwargs: Any) -> None:
        super()._get_config(*args, **kwargs)
        refuse_mistyped(self._rest, self._config)
        try:
            base = read_settings(self._config.get_text_config(decoder=True)).to_dict()
            HiPConfig.from_dict({**base, **self._fields})
        except ValueError as error:
            raise UsageError(str(error)) from None

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask `[B, T]` of a batch of prompts, cut as `prompt_truncation` says."""
        if self.prompt_truncation == "left" or left_truncate_len is None:
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, truncation)
        rows = [self._cut(self.tok_encode(string), left_truncate_len) for string in strings]
        given = {"input_ids": rows}
        padded = self.tokenizer.pad(given, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        if self.prompt_truncation == "middle":
            longest = self.max_length + 1  # the last token is scored, not read
            cut = self._cut
            requests = [(words, cut(ids, longest - len(end)), end) for words, ids, end in requests]
        self._ends_in_padding = {}
        for _, context, end in requests:
            ids = self._read(context, end)
            if ids and ids[-1] == PADDING:
                text = _without_padding(ids)
                self._ends_in_padding[text] = max(len(ids), self._ends_in_padding.get(text, 0))
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def _read(self, context: list[int], end: list[int]) -> list[int]:
        """The tokens that lm-eval gives the decoder for a request: a row before it is padded."""
        if self.backend == "seq2seq":
            return end[-self.max_length :]
        return (context + end)[-(self.max_length + 1) :][:-1]

    def _mask(self, rows: torch.Tensor) -> torch.Tensor:
        """Which tokens of scored rows `[B, T]` are text: lm-eval knows, and does not tell its
        model. A row that ends in the token which lm-eval pads with is told from a padded one by the
        requests; from another request's that goes on with nothing but such tokens it is not."""
        mask = torch.zeros_like(rows)
        for real, ids in zip(mask, rows.tolist(), strict=True):
            text = _without_padding(ids)
            real[: self._ends_in_padding.get(text, len(text))] = 1
        return mask

    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of a batch of scored texts, padded on the right; with the mask, so that no row
        depends on the others."""
        given: dict[str, Any] = {"attention_mask": attn_mask, "labels": labels}
        if labels is None:
            given = {"attention_mask": self._mask(inps)}
        else:
            given["decoder_attention_mask"] = self._mask(labels)
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype, dtype is not None):
            return self.model(inps, **given).logits

    @staticmethod
    def _cut(tokens: list[int], room: int) -> list[int]:
        # `truncate_tokens` doubles what is shorter than the room
        return truncate_tokens(tokens, room, "middle") if len(tokens) > room else tokens

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results' `config`; under `hip`, all settings, versions and density."""
        packages = ("torch", "transformers", "lm_eval", "datasets")
        versions = {package: version(package) for package in packages}
        settings = {
            "config": read_settings(text_config(self.model)).to_dict(),
            "versions": {"hip_hf": hip_hf.__version__, **versions},
            "prompt_truncation": self.prompt_truncation,
            "processes": self.world_size,  # the figures below are those of the first
        }
        return {**super().get_model_info(), "hip": {**settings, **self.read.summary()}}
