"""Whether kernels are to be trusted: what they need is there, and a self-test has passed on this
very device.

`backend="auto"` asks before every sparse call. The self-test (`checks.py`) runs once for each
device, kind of heads and part of the kernels, and what has passed is kept in a file: for this
device, driver, these versions and this code. Nothing here imports more of Triton before it is known
to be new enough.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import compress, product
from pathlib import Path
from typing import Any

import torch

from hip_hf.backends.triton import checks
from hip_hf.backends.triton.checks import Found, Heads
from hip_hf.config import HiPConfig
from hip_hf.shown import said
from hip_hf.versions import __version__

OLDEST_TRITON = (3, 6)
# Compute capability of Ampere: matrix units for bf16 and TF32, and copies that run beside the work.
OLDEST_CAPABILITY = (8, 0)
AMD_TARGETS = ("gfx942",)
# With one of them Triton builds what launches a kernel, where CC names none.
COMPILERS = ("gcc", "clang")
# Where the drivers of the two makers say which they are.
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version"))

# Whether a call learns, is of HyperAttention, with Delta correction, extended -> the parts of the
# kernels that it needs.
_SOME = (checks.GRADIENTS, checks.HYPER, checks.DELTA, checks.EXTENDED)
_PARTS = {
    flags: (checks.SPARSE, *compress(_SOME, flags)) for flags in product((False, True), repeat=4)
}
# (device, heads, part) -> why the self-test failed, or an empty string.
_verdicts: dict[tuple[torch.device, Heads, str], str] = {}
# What `failing` was asked and had nothing against: each layer asks it at every step.
_passed: set[tuple[Any, ...]] = set()
# (device, settings) -> why Triton refused a call with them.
_refused: dict[tuple[torch.device, str], str] = {}
_warned: set[str] = set()
_testing = threading.Lock()


def _unlock() -> None:
    """In a forked process nobody is left to release the lock."""
    global _testing
    _testing = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


def old_triton() -> str:
    """Why the installed Triton does not serve; empty if it does."""
    try:
        import triton
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    oldest = ".".join(map(str, OLDEST_TRITON))
    release = tuple(int(part) for part in triton.__version__.split(".")[:2] if part.isdecimal())
    why = f"Triton {triton.__version__} is too old, {oldest} or later is needed"
    return why if release < OLDEST_TRITON else ""


# Dynamo is not to follow any of this into a graph: it calls the function, and the answer is a
# constant of the graph.
@torch.compiler.assume_constant_result
def lacking(device: torch.device) -> str:
    """What this machine lacks for kernels on `device`, whatever the call; empty if nothing."""
    return _lacking(device)


@functools.cache
def _lacking(device: torch.device) -> str:
    why = old_triton()
    if why or device.type != "cuda":
        return why
    import triton

    try:
        properties = torch.cuda.get_device_properties(device)
    except (AssertionError, RuntimeError) as error:
        return f"no GPU can be reached ({str(error).splitlines()[0]})"
    name, capability = properties.name, (properties.major, properties.minor)
    if torch.version.hip:
        target = properties.gcnArchName.split(":")[0]
        if target not in AMD_TARGETS:
            some = ", ".join(AMD_TARGETS)
            return f"{name} is {target}, of AMD's GPUs only {some} is supported"
    elif capability < OLDEST_CAPABILITY:
        has, oldest = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
        return f"{name} has compute capability {has}, {oldest} or later is needed"
    compiler = triton.knobs.build.cc  # what CC names
    if any(map(shutil.which, [compiler.split()[0]] if compiler else COMPILERS)):
        return ""
    some = " or ".join(COMPILERS)
    return f"Triton needs a C compiler ({some}, or what CC names), and there is none"


def parts_needed(config: HiPConfig | None, learning: bool, extended: bool) -> tuple[str, ...]:
    """The parts of the kernels that a call needs; without settings it is dense."""
    hyper = config is not None and config.method == "hyper"
    delta = config is not None and config.delta is not None
    return _PARTS[learning, hyper, delta, extended]


@torch.compiler.assume_constant_result
def failing(
    device: torch.device, dtype: torch.dtype, dims: tuple[int, int, int], parts: tuple[str, ...],
    settings: str,
) -> str:  # fmt: skip
    """Why kernels are not to be trusted with a call: they failed the self-test, Triton refused them
    with these settings, or the test cannot run now. Empty if they are.

    `dims`: head dims of keys and of values, and query heads per key head.
    """
    if why := _refused.get((device, settings)):
        return why
    asked = device, dtype, dims, parts, settings
    if asked in _passed:
        return ""
    heads = Heads(dtype, *dims)
    why = next((why for part in parts if (why := verdict(device, heads, part))), "")
    if not why:
        _passed.add(asked)
    return why


def refuses(error: Exception, config: HiPConfig) -> bool:
    """Whether an error says that Triton could not compile or launch a kernel which nobody asked for
    by name. Those of its driver have no type of their own."""
    from triton.errors import TritonError

    if config.backend != "auto":
        return False
    return isinstance(error, TritonError) or str(error).startswith("Triton Error [")


def note_refusal(device: torch.device, settings: str, error: Exception) -> str:
    """Use no kernels with these settings any more, as Triton refused them. Returns the reason."""
    why = f"Triton refuses the kernels with these settings ({said(error)})"
    _refused[device, settings] = why
    return why


@contextmanager
def noting_refusals(device: torch.device, settings: HiPConfig) -> Iterator[None]:
    """For a backward pass or a compiled graph, where it is too late to go dense: raise an error
    that names what Triton refuses. With `auto` later calls with these settings are dense."""
    try:
        yield
    except Exception as error:
        if not refuses(error, settings):
            raise
        why = note_refusal(device, settings.text, error)
        raise RuntimeError(
            f"hip: {why}. From now on such calls are dense: make it again, compiled graphs anew."
        ) from error


@torch.compiler.assume_constant_result
def warn_once(why: str) -> None:
    """Say that calls go dense, once for each reason."""
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            f"hip: attention is dense where kernels would serve: {why}. `hip-hf doctor` says more.",
            stacklevel=2,
        )


def verdict(device: torch.device, heads: Heads, part: str) -> str:
    """Why the self-test of a part failed, or could not run; empty if it passed, now or earlier."""
    key = (device, heads, part)
    if key not in _verdicts:
        with _testing:
            if key not in _verdicts:
                return _test(*key)
    return _verdicts[key]


def _test(device: torch.device, heads: Heads, part: str) -> str:
    """Run the self-test of a part if it has not passed before: why it failed. What says nothing of
    the kernels is not kept."""
    if _has_passed(device, heads, part):
        _verdicts[device, heads, part] = ""
        return ""
    if busy := _busy(device):
        return busy
    try:
        found = self_test(device, heads, part)
    except torch.OutOfMemoryError:
        return "the self-test of the kernels found no free memory on the device"
    return keep_verdict(device, heads, part, found)


def keep_verdict(device: torch.device, heads: Heads, part: str, found: list[Found]) -> str:
    """Keep what the checks of a part have found, and say what is wrong."""
    wrong = [f"{one.name}: {one.problem}" for one in found if one.problem]
    why = f"the self-test of the kernels failed ({'; '.join(wrong)})" if wrong else ""
    _verdicts[device, heads, part] = why
    if wrong:
        _passed.clear()
        _forget(device, heads, part)
    else:
        _remember(device, heads, part)
    return why


def _busy(device: torch.device) -> str:
    """Why no self-test can run now."""
    if device.type != "cuda":
        return ""
    why = ""
    if torch.cuda._is_in_bad_fork():
        why = "this process was forked from one that used the GPU"
    elif torch.cuda.is_current_stream_capturing():
        why = "a CUDA graph is being captured (call them once before)"
    return why and f"the kernels are not tested yet, and {why}"


def self_test(
    device: torch.device, heads: Heads, part: str, config: HiPConfig | None = None,
    backend: str = "triton",
) -> list[Found]:  # fmt: skip
    """Run the checks of a part, at the default settings unless others are given.

    In a thread of its own, where no mode of the caller holds: inference, autocast, a default
    device, tensors without numbers, or a graph that is being traced.

    Raises:
        torch.OutOfMemoryError: the device's memory is full.
    """
    config = HiPConfig(dense_below=0) if config is None else config
    names = [name for name, (of, _) in checks.CHECKS.items() if of == part]
    return _alone(lambda: [checks.check(name, heads, device, config, backend) for name in names])


def _alone(work: Callable[[], list[Found]]) -> list[Found]:
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="hip_hf self-test") as thread:
        return thread.submit(work).result()


def drivers() -> list[str]:
    """The GPU drivers of this machine, in their own words."""
    return [file.read_text().splitlines()[0] for file in DRIVERS if file.exists()]


def identity(device: torch.device) -> dict[str, Any]:
    """What a passed self-test holds for: device, driver, versions, and the kernels' code."""
    import triton

    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else str(device),
        "capability": list(torch.cuda.get_device_capability(device)) if gpu else [],
        "driver": [*drivers(), torch.version.cuda, torch.version.hip],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "hip_hf": __version__,
        "code": code(),
    }


@functools.cache
def code(folder: Path = Path(__file__).parent) -> str:
    """A name for all that stands in the kernels' modules, launches and their table included."""
    digest = hashlib.sha256()
    for file in sorted([*folder.rglob("*.py"), *folder.rglob("*.json")]):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()


def folder() -> Path:
    """Where passed self-tests are kept: with Triton's compiled kernels."""
    import triton

    return Path(triton.knobs.cache.dir) / "hip_hf"


def _record(device: torch.device, heads: Heads, part: str) -> tuple[Path, dict[str, Any]]:
    """The file of a passed self-test, and what stands in it."""
    content = {**identity(device), **asdict(heads), "dtype": str(heads.dtype), "part": part}
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return folder() / f"{name}.json", content


def _has_passed(device: torch.device, heads: Heads, part: str) -> bool:
    """Whether the self-test is known to have passed. A file that cannot be read counts as none."""
    file, content = _record(device, heads, part)
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == content)
    except (OSError, ValueError):
        return False


def _remember(device: torch.device, heads: Heads, part: str) -> None:
    """Keep that the self-test has passed, where possible; several processes may do so at once."""
    file, content = _record(device, heads, part)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump(content, written, indent=1)
        os.replace(written.name, file)


def _forget(device: torch.device, heads: Heads, part: str) -> None:
    """Drop what is kept of a self-test that has failed since."""
    with suppress(OSError):
        _record(device, heads, part)[0].unlink(missing_ok=True)
