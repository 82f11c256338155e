"""Every model type that the documentation lists as supported, by the checks that its page is made of."""

from __future__ import annotations

import pytest
from supported import CHECKS, REFUSED, STATELESS, check_refused, names, page


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", names())
def test_model_type(name: str, check: str, threads: object) -> None:
    threads(1)  # type: ignore[operator]
    if check == "kept state" and name in STATELESS:
        with pytest.raises(AssertionError, match="loses the way to its state"):
            CHECKS[check](name)
    else:
        CHECKS[check](name)


@pytest.mark.parametrize("name", REFUSED)
def test_attention_of_their_own_is_refused(name: str) -> None:
    assert "hip" in check_refused(name)


def test_the_page_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is made of outcomes, not of names."""

    def fails(name: str) -> None:
        raise AssertionError("off by 3 | 4\nand more")

    monkeypatch.setattr("supported.names", lambda: ["llama"])
    monkeypatch.setattr("supported.CHECKS", {"good": lambda name: None, "bad": fails})
    assert "| `llama` | yes | no: off by 3 / 4 |" in page()
