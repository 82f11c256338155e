"""Settings and lengths as the measuring commands take them on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any

from typer import Option

from hip_hf.cli.inputs import loading, not_allowed
from hip_hf.config import HiPConfig
from hip_hf.eval.measure.mass import SPARSE
from hip_hf.eval.reporting.report import AT
from hip_hf.integration.settings import read_settings
from hip_hf.methods.base import method_of
from hip_hf.registry import METHODS

# The settings that a model uses when it is loaded with attn_implementation="hip": those in its
# config, or `HiPConfig()`.
OWN = "own"
# Presets that `all` leaves out: the baseline, and what is only a cheaper search of the same method.
LEFT_OUT = ("dense", "beam1")


def presets() -> dict[str, dict[str, Any]]:
    """What `--settings` may name, as fields of `HiPConfig`: what the methods of the table
    declare."""
    found = {}
    for method in METHODS:
        for name, fields in (method_of(method).presets or {method: {}}).items():
            found[name] = {"method": method, **fields}
    return found


NAMES = f"{' | '.join(presets())} | {OWN} (the checkpoint's) | all"
HELP = f"{NAMES}, or a JSON dict of HiPConfig fields; repeat for several rows."
Settings = Annotated[list[str], Option(help=HELP)]


def every() -> list[str]:
    """All presets as rows of a comparison, with those of methods that were added (`add_method`)."""
    return [name for name in presets() if name not in LEFT_OUT]


def own_settings(checkpoint: str | None) -> HiPConfig:
    """The settings in a checkpoint's config.

    Raises:
        ValueError: there is no checkpoint, or its settings are invalid.
        typer.BadParameter: it cannot be loaded.
    """
    from transformers import AutoConfig

    if checkpoint is None:
        raise ValueError(f"--settings: got {OWN!r}, allowed: the others (there is no model here)")
    with loading(repr(checkpoint)):
        config = AutoConfig.from_pretrained(checkpoint)
    return read_settings(config.get_text_config(decoder=True))


def settings_of(
    names: Sequence[str],
    tokens: int | None = None,
    base: dict[str, Any] = SPARSE,
    checkpoint: str | None = None,
    **common: Any,
) -> dict[str, HiPConfig]:
    """Settings by the name they were given; fields in `common` (None: not given) hold for all that
    do not set them.

    `tokens`: length of the texts, by which presets of methods without a budget are sized. `base`:
    fields that hold where nothing else is said.
    `checkpoint`: whose settings `own` is, untouched by `base` and `common`.

    Raises:
        ValueError: neither a preset nor a JSON dict, or a field is unknown or out of range.
    """
    shared = {name: value for name, value in common.items() if value is not None}
    settings, known = {}, presets()
    for name in [one for given in names for one in (every() if given == "all" else [given])]:
        if name == OWN:
            settings[name] = own_settings(checkpoint)
            continue
        fields = known.get(name, {"method": name} if name in METHODS else None)
        if fields is None:
            with suppress(json.JSONDecodeError):
                fields = json.loads(name)
        if not isinstance(fields, dict):
            raise ValueError(f"--settings: got {name!r}, allowed: {HELP}")
        try:
            config = HiPConfig.from_dict({**base, **shared, **fields})
        except ValueError as error:
            raise ValueError(f"--settings {name}: {error}") from None
        sized = method_of(config.method).sized
        if name in known and sized is not None and tokens is not None:
            config = replace(config, options=sized(config, tokens))
        settings[name] = config
    return settings


def over_budgets(
    names: Sequence[str], budgets: Sequence[int], always: bool = False, **others: Any
) -> dict[str, HiPConfig]:
    """`settings_of(names, **others)` with each of the budgets, which the names tell where there
    are several, or `always`. What no budget changes is there once.

    Raises:
        ValueError: as `settings_of` does.
    """
    told, configs = always or len(budgets) > 1, {}
    for budget in budgets:
        for name, config in settings_of(names, budget=budget, **others).items():
            own = told and config.method != "dense" and name != OWN
            configs[f"{name}{AT}{budget}" if own else name] = config
    return configs


def refuse_extension(configs: dict[str, HiPConfig]) -> None:
    """Raise ValueError for settings that extend the context, where queries and keys were rotated by
    a model."""
    for config in configs.values():
        if config.extend is not None:
            allowed = "None (`hip-hf passkey` measures it in a model)"
            raise ValueError(f"--settings extend: got {config.extend!r}, allowed: {allowed}")


def sizes(text: str) -> list[int]:
    """Token counts from a list like `4096,64K,1M`. Raises ValueError for anything else."""
    units, counts = {"K": 1024, "M": 1024**2}, []
    for part in (part.strip().upper() for part in text.split(",")):
        digits = part[:-1] if part[-1:] in units else part
        counts.append(int(digits) * units.get(part[-1:], 1) if digits.isdecimal() else 0)
    if min(counts) < 1:
        raise ValueError(f"got {text!r}, allowed: token counts like 8192 or 64K,1M")
    return counts


def parse_choice(text: str, allowed: Sequence[str], option: str) -> list[str]:
    """A comma list of the names in `allowed`. Raises typer.BadParameter for any other."""
    chosen = [part.strip() for part in text.split(",")]
    for name in chosen:
        if name not in allowed:
            raise not_allowed(option, name, ", ".join(allowed))
    return chosen
