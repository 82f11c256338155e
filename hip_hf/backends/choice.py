"""Which backend serves a call: kernels, where they are wanted, can serve, and are to be trusted;
else the torch backend."""

from __future__ import annotations

import torch

from hip_hf.cache.pages import PagedTensor
from hip_hf.config import HiPConfig
from hip_hf.problem import AttentionProblem


def asks_for_kernels(config: HiPConfig, device: torch.device) -> bool:
    """Whether settings mean the kernels for tensors on `device`."""
    return config.backend == "triton" or (config.backend == "auto" and device.type == "cuda")


def offloaded(problem: AttentionProblem) -> bool:
    """Whether keys lie where kernels do not reach: a cache was asked to keep them in host memory or
    on disk, and only the torch backend reads through its pools. Dense attention would bring all of
    them to the device at every step."""
    return isinstance(problem.k, PagedTensor) and not problem.k.store.resident


def kernels_wanted(problem: AttentionProblem, config: HiPConfig) -> bool:
    """Whether kernels should serve where they can. An offloaded cache is for the torch backend."""
    asked = asks_for_kernels(config, problem.q.device)
    return asked and (config.backend == "triton" or not offloaded(problem))


def kernels_serve(problem: AttentionProblem, config: HiPConfig, densely: bool = False) -> bool:
    """Whether kernels are wanted and can serve. `densely`: a dense call, whatever the method."""
    return kernels_wanted(problem, config) and not no_kernels(problem, config, densely)[0]


def no_kernels(
    problem: AttentionProblem, config: HiPConfig, densely: bool = False
) -> tuple[str, bool]:
    """Why the kernels cannot serve a call, or (`auto`) are not to be trusted with it; empty if they
    can. And whether there was a warning of it, as of all that is not for want of support.
    `densely`: the call is dense, whatever the method."""
    from hip_hf.backends.triton import trust  # which imports no Triton

    device = problem.q.device
    why = trust.lacking(device)
    if not why:
        from hip_hf.backends.triton.sparse import unsupported, unsupported_tensors

        why = unsupported_tensors(problem) if densely else unsupported(problem, config)
        if why or config.backend == "triton":
            return why, False
        extended = problem.positions is not None
        parts = trust.parts_needed(None if densely else config, problem.needs_grad, extended)
        # a graph that is being compiled is then for these alone
        dims = (problem.q.shape[3], problem.v.shape[3], problem.groups)
        why = trust.failing(device, problem.q.dtype, dims, parts, config.text)
    if why and config.backend == "auto":
        trust.warn_once(why)
    return why, bool(why)


def backend_of(problem: AttentionProblem, config: HiPConfig) -> str:
    """`triton` or `torch`, for a call of the sparse path. With `auto`, where kernels are wanted and
    cannot serve, a call is dense: `dense_reason` has asked for that already.

    Raises:
        ValueError: the kernels were asked for by name and cannot serve.
    """
    if not kernels_wanted(problem, config):
        return "torch"
    why = no_kernels(problem, config)[0] if config.backend == "triton" else ""
    if why:
        raise ValueError(f"HiPConfig.backend: got 'triton', allowed here: auto | torch ({why})")
    return "triton"
