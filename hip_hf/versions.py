"""Which versions of Transformers are supported. Imported before anything else of the package that
imports Transformers."""

from __future__ import annotations

import warnings

import transformers
from packaging.version import Version

__version__ = "0.1.0"  # of hip_hf

# Major and minor of the oldest that serves, and of the newest that the tests ran with.
OLDEST, NEWEST = (5, 17), (5, 24)


def check_version(version: str) -> None:
    """Warn of a version of Transformers that is newer than the tested ones. Raises ImportError for
    one that is older than the oldest that serves."""
    oldest, newest = (".".join(map(str, numbers)) for numbers in (OLDEST, NEWEST))
    if Version(version).release[:2] < OLDEST:
        how = "`pip install -U transformers`"
        raise ImportError(f"hip_hf: got Transformers {version}, allowed: {oldest} or later ({how})")
    if Version(version).release[:2] > NEWEST:
        tested = f"hip_hf was tested with Transformers {oldest} to {newest}, not with {version}"
        warnings.warn(tested, stacklevel=2)


check_version(transformers.__version__)

# What models and `generate` call the cache that they are given (the name before it is deprecated
# from 5.24 on).
CACHE = "cache" if Version(transformers.__version__).release[:2] >= (5, 24) else "past_key_values"
