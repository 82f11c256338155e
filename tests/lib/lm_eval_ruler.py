"""lm-eval's own RULER tasks, as a fixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hip_hf.eval.tasks import common


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """lm-eval's modules: a few documents instead of 500, no download of NLTK data, hundreds of
    words and not 30M pairs."""
    nltk, wonderwords = pytest.importorskip("nltk"), pytest.importorskip("wonderwords")

    class FewWords(wonderwords.RandomWord):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._categories = {name: words[:400] for name, words in self._categories.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk, "download", lambda *names: True)
        patch.setattr(wonderwords, "RandomWord", FewWords)
        from lm_eval.tasks.ruler import (
            common_utils,
            cwe_utils,
            fwe_utils,
            niah_utils,
            prepare_niah,
            vt_utils,
        )

        patch.setattr(
            niah_utils,
            "generate_samples",
            lambda *a, num_samples, **k: prepare_niah.generate_samples(*a, num_samples=3, **k),
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
            # in the haystack that needs no network; the essays that these tasks hide in come from
            # the hub
            "niah_multivalue": _in_repeated_lines(
                prepare_niah, niah_utils.TEMPLATE, num_needle_v=4
            ),
            "niah_multiquery": _in_repeated_lines(
                prepare_niah, niah_utils.TEMPLATE, num_needle_q=4, num_needle_k=4
            ),
            "process_results": common_utils.process_results,
        }


def _fewer(make: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: make(
        *args, **{**kwargs, "num_samples": min(kwargs.get("num_samples", 3), 3)}
    )


def _in_repeated_lines(module: Any, template: str, **counts: int) -> Callable[..., Any]:
    def make(pretrained: str, max_seq_lengths: list[int]) -> dict[str, Any]:
        (length,) = max_seq_lengths
        kinds = dict(
            type_haystack="repeat",
            type_needle_k="words",
            type_needle_v="numbers",
            template=template,
            num_samples=3,
        )
        tokenizer = common.load_tokenizer(pretrained, "main", False)
        haystack = module.get_haystack("repeat")
        return {
            "test": module.generate_samples(
                haystack, tokenizer, max_seq_length=length, **kinds, **counts
            )
        }

    return make
