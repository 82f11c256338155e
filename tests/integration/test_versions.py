"""What is known of Transformers' versions: too old ones are refused, and what is not known ends in
an error."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from continuous import batched, prompts
from families import make_batch, make_model
from packaging.version import Version
from repository import ROOT
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import hip_hf
from hip_hf import versions
from hip_hf.integration import continuous_batching

IMPORT_AS = """
import sys, transformers, warnings
warnings.simplefilter("always")
transformers.__version__ = sys.argv[1]
import hip_hf
"""


def imported_with(version: str) -> subprocess.CompletedProcess[str]:
    """What a process says that imports `hip_hf` beside this version of Transformers."""
    return subprocess.run(
        [sys.executable, "-c", IMPORT_AS, version], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize("version", ["4.57.0", "5.4.0", "5.16.1"])
def test_a_version_that_is_too_old_is_refused_at_import(version: str) -> None:
    done = imported_with(version)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"ImportError: hip_hf: got Transformers {version}, allowed: 5.17 or later"
    )


def test_a_version_newer_than_the_tested_ones_is_warned_of_once() -> None:
    done = imported_with("5.99.0")
    assert done.returncode == 0
    assert (
        done.stderr.count(
            "UserWarning: hip_hf was tested with Transformers 5.17 to 5.24, not with 5.99.0"
        )
        == 1
    )


@pytest.mark.parametrize("version", ["5.17.0", "5.20.2", "5.24.0.dev0", "5.24.7"])
def test_tested_versions_are_taken_in_silence(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check_version(version)


def test_the_requirement_is_what_the_import_asks_for() -> None:
    oldest = ".".join(map(str, versions.OLDEST))
    assert f'"transformers>={oldest}"' in (ROOT / "pyproject.toml").read_text()
    (pinned,) = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line.startswith("transformers==")
    ]
    assert Version(pinned.partition("==")[2].partition(";")[0]).release[:2] <= versions.NEWEST


def test_the_tests_of_the_grid_exist() -> None:
    """Or every cell of it would fail for a test that was renamed."""
    for line in (ROOT / "tests" / "versions" / "grid.txt").read_text().splitlines():
        path, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text()


def patched() -> tuple[PreTrainedModel, list[Any]]:
    model = make_model("llama")
    hip_hf.patch(model)
    return model, [layer.self_attn for layer in model.model.layers]


@pytest.mark.parametrize("name", ["past_key_values", "cache", "some_later_name"])
def test_a_patched_layer_finds_the_cache_by_its_type(name: str) -> None:
    """Transformers has renamed that argument once. Without its cache a step would attend to itself
    alone."""
    model, (layer, _) = patched()
    hidden, cache = torch.randn(1, 40, 64), DynamicCache(config=model.config)
    places = model.model.rotary_emb(hidden, torch.arange(40)[None])
    with torch.no_grad():
        whole, _ = layer(hidden, position_embeddings=places)
        parts = [
            layer(
                hidden[:, at], position_embeddings=tuple(x[:, at] for x in places), **{name: cache}
            )[0]
            for at in (slice(0, 30), slice(30, 40))
        ]
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(parts[1][:, :1], whole[:, 30:31], atol=1e-5, rtol=1e-5)


def test_a_patched_layer_refuses_what_only_looks_like_a_cache() -> None:
    class Own:
        get_seq_length = Cache.get_seq_length

    model, (layer, _) = patched()
    hidden = torch.randn(1, 4, 64)
    places = model.model.rotary_emb(hidden, torch.arange(4)[None])
    with pytest.raises(
        ValueError, match=r"cache: got Own, allowed: a subclass of transformers\.Cache"
    ):
        layer(hidden, position_embeddings=places, past=Own())


def test_packed_requests_that_come_in_an_unknown_way_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if Transformers handed them over as it did not before: without that they would pass for
    one long prompt."""
    model, given = make_model("llama", budget=1024), prompts()[:2]
    assert [len(made) for made in batched(model, given, 3)] == [3, 3]
    cache = continuous_batching.cache_of

    def hidden(key: torch.Tensor, arguments: dict[str, Any]) -> Any:
        return cache(
            key.clone(),
            {
                name: value
                for name, value in arguments.items()
                if not continuous_batching.is_paged(value)
            },
        )

    monkeypatch.setattr(continuous_batching, "cache_of", hidden)
    found = model.generate_batch(
        given,
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64),
        progress_bar=False,
    )
    for request in found.values():
        assert not request.generated_tokens
        assert "brings no paged cache that is known here; allowed: `generate`" in request.error
    with torch.no_grad():  # outside of that thread nothing is packed
        model(**make_batch([40]))
