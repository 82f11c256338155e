"""What errors show of a value that they refuse, and what is shown of an error."""

from __future__ import annotations

import reprlib


class _Short(reprlib.Repr):
    """Settings come with checkpoints, and may be of any size: errors show their beginning and
    end."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxdict = 32
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write very long numbers
        return repr(x) if x.bit_length() <= 64 else f"an integer of {x.bit_length()} bits"


shown = _Short().repr


def refused(name: str, got: object, allowed: str) -> ValueError:
    """The error for an argument, a setting or a file that is not as it must be."""
    return ValueError(f"{name}: got {got}, allowed: {allowed}")


def said(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
