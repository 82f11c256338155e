"""`HiPConfig`: what it takes, what it refuses and how it says so, and its way through JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from typing import Any

import pytest

from hip_hf import HiPConfig
from hip_hf.registry import METHODS

pytestmark = pytest.mark.fast

DEFAULTS = {
    "method": "hip",
    "options": {},
    "budget": 1024,
    "block_q": 64,
    "block_k": 16,
    "sink": 64,
    "window": 512,
    "group_shared": True,
    "representative": "blend",
    "score": "mass",
    "coarsest": None,
    "dense_layers": 3,
    "dense_below": None,
    "dense_tail": 64,
    "delta": None,
    "delta_mode": "step",
    "decode_refresh": 4,
    "extend": None,
    "layers": {},
    "backend": "auto",
    "seed": 0,
}

GOOD = [
    *[("method", name) for name in METHODS],
    ("delta", 64),
    *[("representative", name) for name in ("blend", "minmax", "middle")],
    *[("score", name) for name in ("mass", "max")],
    *[("vote", name) for name in ("need", "sampled")],
    *[("backend", name) for name in ("auto", "torch")],
    ("delta_mode", "step"),
    *[
        (name, 0)
        for name in ("sink", "window", "dense_tail", "dense_below", "seed", "dense_layers")
    ],
    *[(name, 1) for name in ("block_q", "query_stride", "beam", "rescore", "decode_refresh")],
    *[(name, None) for name in ("beam", "rescore")],
    ("budget", 16),
    ("budget", 16 * 77),
    ("coarsest", 16),
    ("coarsest", 4096),
    ("dense_layers", []),
    ("dense_layers", [0, 5]),
    ("group_shared", False),
    ("options", {"weight": 0, "sample": 2}),
    ("options", {"weight": 1.0}),
    ("layers", {3: {"budget": 64}}),
]

# field, bad value, what the message must say besides
BAD = [
    ("method", "hyped", "streaming"),
    ("method", None, "oracle"),
    *[
        ("representative", name, "blend | minmax | middle")
        for name in ("median", "mean", "outliers")
    ],
    ("score", "sum", "mass"),
    *[("vote", name, "need | sampled") for name in ("all", "pooled")],
    ("backend", "cuda", "torch"),
    *[("delta", value, "None or an integer >= 1") for value in (0, -64, 64.0, True, "64")],
    *[("decode_refresh", value, "divides") for value in ([4, 3], [2, 4])],
    *[("delta_mode", name, "step") for name in ("clusters", "interpolate")],
    ("extend", "self", "None | streaming"),
    ("group_shared", 1, "True or False"),
    ("group_shared", None, "True or False"),
    *[
        (name, 0, ">= 1")
        for name in (
            "budget",
            "block_q",
            "block_k",
            "query_stride",
            "beam",
            "rescore",
            "decode_refresh",
        )
    ],
    *[(name, -1, ">= 0") for name in ("sink", "window", "dense_tail", "seed", "dense_below")],
    *[(name, 1.0, "integer") for name in ("budget", "block_k", "window", "beam", "dense_below")],
    *[(name, "8", "integer") for name in ("budget", "sink", "rescore", "dense_below", "seed")],
    *[
        (name, True, "integer")
        for name in ("block_q", "query_stride", "decode_refresh", "dense_tail", "dense_below")
    ],
    *[(name, None, "integer") for name in ("budget", "block_k", "sink", "window")],
    ("budget", 24, "multiple of block_k=16"),
    ("coarsest", 0, "power of two"),
    ("coarsest", 8, "power of two"),
    ("coarsest", 48, "power of two"),
    ("coarsest", 72, "power of two"),
    ("coarsest", -16, "power of two"),
    ("coarsest", True, "power of two"),
    ("coarsest", "64", "power of two"),
    ("dense_layers", -1, ">= 0"),
    ("dense_layers", True, "count"),
    ("dense_layers", "3", "count"),
    ("dense_layers", None, "count"),
    ("dense_layers", [0, -1], ">= 0"),
    ("dense_layers", [0, 1.0], "list"),
    ("options", None, "mapping"),
    ("options", ["weight"], "mapping"),
    ("layers", None, "mapping"),
    ("layers", [{}], "mapping"),
    ("layers", {"one": {}}, "layer indices"),
    ("layers", {-1: {}}, "layer indices"),
    ("layers", {1.0: {}}, "layer indices"),
    ("layers", {True: {}}, "layer indices"),
    ("layers", {1: None}, "layer 1"),
    ("layers", {1: {"layers": {}}}, "layers"),
]


def test_defaults_are_those_of_the_contract() -> None:
    config = HiPConfig()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS, (
        "named here and in docs/settings.md"
    )
    # beam and rescore: numbers of candidates, by measurement (docs/decisions.md)
    assert (config.vote, config.query_stride, config.beam, config.rescore) == (
        "need",
        8,
        None,
        None,
    )
    assert {f.name for f in dataclasses.fields(HiPConfig)} == set(DEFAULTS) | {
        "beam",
        "rescore",
        "query_stride",
        "vote",
    }


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_takes(name: str, value: Any) -> None:
    assert getattr(HiPConfig(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_refuses_and_says_field_value_and_range(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"HiPConfig\.{name}: got .*, allowed: ") as caught:
        HiPConfig(**{name: value})
    got, may_be = str(caught.value).split("allowed: ")
    assert allowed in may_be
    assert name == "layers" or repr(value) in got


def test_every_field_is_validated() -> None:
    assert {name for name, *_ in BAD} == {f.name for f in dataclasses.fields(HiPConfig)}


@pytest.mark.parametrize(("name", "value", "allowed"), BAD)
def test_from_dict_and_replace_refuse_the_same(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"HiPConfig\.{name}: "):
        HiPConfig.from_dict({name: value})
    with pytest.raises(ValueError, match=rf"HiPConfig\.{name}: "):
        dataclasses.replace(HiPConfig(), **{name: value})


def test_budget_and_coarsest_follow_block_k() -> None:
    assert HiPConfig(block_k=24, budget=72, coarsest=96).coarsest == 96
    with pytest.raises(ValueError, match="multiple of block_k=24"):
        HiPConfig(block_k=24)
    with pytest.raises(ValueError, match="block_k=24 times a power of two"):
        HiPConfig(block_k=24, budget=72, coarsest=72)


def test_from_dict_refuses_unknown_fields_with_a_hint() -> None:
    said = r"HiPConfig\.budgt: unknown field with value 3 \(did you mean 'budget'\?\), allowed: \["
    with pytest.raises(ValueError, match=said):
        HiPConfig.from_dict({"budgt": 3})
    with pytest.raises(
        ValueError, match=r"HiPConfig\.xyzzy: unknown field with value 3, allowed: \["
    ):
        HiPConfig.from_dict({"xyzzy": 3})
    with pytest.raises(ValueError, match=r"from_dict: got list"):
        HiPConfig.from_dict([("budget", 32)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("hip", {"wieght": 0.5}, "weight"),
        ("hip", {"weight": -0.1}, "0 to 1"),
        ("hip", {"weight": 1.5}, "0 to 1"),
        ("hip", {"weight": float("nan")}, "0 to 1"),
        ("hip", {"weight": "0.5"}, "0 to 1"),
        ("hip", {"weight": True}, "0 to 1"),
        ("hip", {"sample": True}, "integer >= 2"),
        ("hip", {"sample": 1}, ">= 2"),
        ("hip", {"sample": 2.0}, "integer"),
        ("hip", {"descent": 0}, "integer >= 1"),
        ("hip", {"descent": True}, "integer >= 1"),
        ("hip", {"descent": 1.5}, "integer"),
        ("hip", {"onward": -0.1}, "0 to 1"),
        ("hip", {"onward": 1.1}, "0 to 1"),
        ("hip", {"onward": float("nan")}, "0 to 1"),
        ("hip", {"onward": True}, "0 to 1"),
        ("hip", {"onward": "0.3"}, "0 to 1"),
        ("streaming", {"weight": 0.5}, "recent"),
        ("streaming", {"recent": 1}, "True or False"),
        ("vertical_slash", {"vertical": 1.1}, "0 to 1"),
        ("vertical_slash", {"rows": 0}, ">= 1"),
        ("sample", {"rows": 0}, "above 0"),
        ("quest", {"weight": 0.5}, "none"),
        ("h2o", {"weight": 0.5}, "none"),
        ("oracle", {"sample": 4}, "none"),
        ("dense", {"weight": 0.5}, "none"),
    ],
)
def test_options_are_the_methods_own(method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"HiPConfig\.options") as caught:
        HiPConfig(method=method, options=options)
    assert says in str(caught.value)
    assert next(iter(options)) in str(caught.value)


def test_options_become_the_methods_dataclass() -> None:
    assert HiPConfig(options={"weight": 0.25}).method_options().weight == 0.25
    assert HiPConfig().method_options().weight == 0.5
    assert dataclasses.is_dataclass(HiPConfig(method="dense").method_options())


def test_round_trip_through_json() -> None:
    config = HiPConfig(
        method="hip",
        options={"weight": 0.25},
        budget=512,
        representative="middle",
        coarsest=256,
        dense_layers=(0, 2),  # type: ignore[arg-type]
        layers={3: {"budget": 256, "score": "max"}, 11: {"method": "dense", "options": {}}},
    )
    text = json.dumps(config.to_dict())
    back = HiPConfig.from_dict(json.loads(text))
    assert back == config
    assert json.dumps(back.to_dict()) == text
    assert list(back.layers) == [3, 11]
    assert back.dense_layers == [0, 2]
    assert (
        HiPConfig.from_dict({})
        == HiPConfig()
        == HiPConfig.from_dict(json.loads(json.dumps(HiPConfig().to_dict())))
    )


def test_unknown_names_are_refused_as_from_dict_refuses_them() -> None:
    said = r"^HiPConfig.budgte: unknown field with value 3 \(did you mean 'budget'\?\), allowed: \["
    with pytest.raises(ValueError, match=said):
        HiPConfig(budgte=3)
    with pytest.raises(ValueError, match=r"^HiPConfig.budgte: unknown field"):
        dataclasses.replace(HiPConfig(), budgte=3)
    assert (
        pickle.loads(pickle.dumps(HiPConfig(budget=64)))
        == copy.deepcopy(HiPConfig(budget=64))
        == HiPConfig(budget=64)
    )


def test_a_layer_is_named_once() -> None:
    with pytest.raises(
        ValueError, match=r"^HiPConfig.layers: got \['1', 1\], allowed: each layer once"
    ):
        HiPConfig(layers={"1": {"budget": 64}, 1: {"budget": 128}})


def test_layer_overrides() -> None:
    config = HiPConfig(
        budget=512, layers={"2": {"budget": 4096, "dense_layers": 0}, 4: {"method": "streaming"}}
    )  # type: ignore[dict-item]
    assert list(config.layers) == [2, 4]
    assert config.for_layer(2).budget == 4096
    assert config.for_layer(2).window == config.window
    assert config.for_layer(4).method == "streaming"
    assert config.for_layer(4).budget == 512
    assert config.for_layer(3) is config
    assert config.for_layer(None) is config
    assert config.is_dense_layer(2)
    assert not config.for_layer(2).is_dense_layer(2)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"budget": 24}, "HiPConfig.budget: got 24"),
        ({"bugdet": 32}, "HiPConfig.bugdet: unknown field with value 32 (did you mean 'budget'"),
        ({"options": {"wight": 1}}, "HiPConfig.options: got 'wight'"),
        ({"method": "hippo"}, "HiPConfig.method: got 'hippo'"),
    ],
)
def test_a_bad_override_names_its_layer(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=r"HiPConfig\.layers\[7\]: " + re.escape(says)):
        HiPConfig(layers={1: {"budget": 32}, 7: fields})


@pytest.mark.parametrize(
    ("fields", "kept", "rescored"),
    [
        ({"budget": 1024}, 256, 256),
        ({"budget": 256}, 256, 256),  # what is looked at does not shrink with what is read
        ({"budget": 16, "block_k": 8}, 512, 512),
        ({"budget": 1024, "block_k": 2}, 1024, 2048),  # twice as many are all that kernels hold
        ({"budget": 24, "block_k": 24}, 171, 171),
        ({"budget": 4096}, 512, 768),
        ({"budget": 256, "beam": 2, "rescore": 3}, 32, 48),
        ({"budget": 256, "beam": 1, "rescore": 1}, 16, 0),
    ],
)
def test_blocks_that_the_search_keeps_and_scores_exactly(
    fields: dict[str, Any], kept: int, rescored: int
) -> None:
    config = HiPConfig(**fields)
    assert (config.beam_blocks, config.rescore_blocks) == (kept, rescored)


def test_dense_layers_by_count_and_by_list() -> None:
    assert [HiPConfig(dense_layers=2).is_dense_layer(i) for i in (0, 1, 2)] == [True, True, False]
    assert [HiPConfig(dense_layers=[1]).is_dense_layer(i) for i in (0, 1, 2)] == [
        False,
        True,
        False,
    ]
    assert not HiPConfig(dense_layers=2).is_dense_layer(None)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        HiPConfig().budget = 32  # type: ignore[misc]


def test_does_not_share_the_callers_containers() -> None:
    options, layers, dense = {"weight": 0.25}, {1: {"options": {"weight": 0.5}}}, [0, 1]
    config = HiPConfig(options=options, layers=layers, dense_layers=dense)
    before = json.dumps(config.to_dict())
    options["weight"] = layers[1]["options"]["weight"] = -1.0
    layers[1]["budget"] = -1  # type: ignore[assignment]
    dense.append(-1)
    assert json.dumps(config.to_dict()) == before


def test_to_dict_hands_out_copies() -> None:
    config = HiPConfig(
        options={"weight": 0.25}, layers={1: {"options": {"weight": 0.5}}}, dense_layers=[0]
    )
    before, values = json.dumps(config.to_dict()), config.to_dict()
    values["options"]["weight"] = values["layers"]["1"]["options"]["weight"] = -1.0
    values["dense_layers"].append(-1)
    assert json.dumps(config.to_dict()) == before
