"""Transformers' own server (`transformers serve`) knows `hip`.

    from hip_hf.integration.serve import register

    register()

`hip-hf serve` calls `register` for you, and after `hip-hf autoload enable` so does every plain
`transformers serve` of the environment. The rest of this file is for `hip-hf serve` alone: a limit
to what one request may ask for, and a status and a message for every request that fails.
Transformers (5.17 to 5.24) has neither: with continuous batching, a request that needs more than
all blocks ends the worker, and with it every other request. `hip_hf.unregister` takes all of it
back.
"""

from __future__ import annotations

import bisect
import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import transformers
from transformers.utils import logging

from hip_hf.integration.changes import wrap
from hip_hf.integration.settings import is_ours

POLL_SECONDS = 0.01

logger = logging.get_logger(__name__)


def _module(name: str) -> Any:
    """A module of Transformers' server. Raises ImportError where there is none."""
    return importlib.import_module(f"transformers.cli.serving.{name}")


def register() -> None:
    """Let the names that `hip_hf` registers be known to `transformers serve --attn-implementation`,
    which has a fixed list. Calling it again is harmless. Raises ImportError if this Transformers
    has no server, or one that is not known here."""
    manager = _module("model_manager").ModelManager
    if not hasattr(manager, "_validate_args"):
        got = f"Transformers {transformers.__version__}, whose server is not known here"
        raise ImportError(f"hip_hf: got {got}, allowed: the server of Transformers 5.17 to 5.24")
    wrap(manager, "_validate_args", _validate)


def _validate(validate: Any, self: Any) -> None:
    name = self.attn_implementation
    if not is_ours(name):
        return validate(self)
    self.attn_implementation = None  # all other options are checked as usual
    validate(self)
    self.attn_implementation = name


def after_loading(configure: Callable[[Any], Any]) -> None:
    """Call `configure` with every model that the server loads."""

    def hip_load_model(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        configure(model)
        return model

    wrap(_module("model_manager").ModelManager, "_load_model", hip_load_model)


def limit_lengths(longest: int | None) -> None:
    """Answer 400 to an empty prompt, which continuous batching does not survive, and to one that
    leaves no room for an answer; end an answer that has filled the room (`finish_reason` is
    `length`).

    `longest`: tokens of prompt and answer together. In continuous batching a request may never be
    longer than all blocks hold, whatever `longest` is.
    """
    utils = _module("utils")
    for manager in (utils.GenerateManager, utils.CBGenerateManager):
        for name in ("generate_streaming", "generate_non_streaming"):
            wrap(manager, name, functools.partial(_limited, longest))


def _limited(
    longest: int | None,
    method: Callable[..., Any],
    manager: Any,
    model: Any,
    processor: Any,
    inputs: Any,
    gen_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around the methods of Transformers' managers that generate."""
    ids = inputs["input_ids"]
    prompt = len(ids) if isinstance(ids, list) else ids.shape[-1]
    limit = _least(longest, _blocks_hold(getattr(manager, "_cb", None)))
    room = None if limit is None else limit - prompt
    if not prompt:
        raise _refusal("prompt: got no tokens, allowed: one or more")
    if room is not None and room < 1:
        allowed = f"at most {limit - 1}, which leave room for an answer"
        raise _refusal(f"prompt: got {prompt} tokens, allowed: {allowed}")
    asked = gen_config.max_new_tokens
    if asked is not None and asked < 1:
        raise _refusal(f"max_tokens: got {asked}, allowed: 1 or more")
    if asked is None and gen_config.max_length is not None:  # of prompt and answer together
        asked = gen_config.max_length - prompt
        if asked < 1:
            allowed = f"more than the prompt's {prompt} tokens"
            raise _refusal(f"max_length: got {gen_config.max_length}, allowed: {allowed}")
    gen_config.max_new_tokens = _least(asked, room)
    return method(manager, model, processor, inputs, gen_config, *args, **kwargs)


def _least(*limits: int | None) -> Any:
    """The smallest of those that there are; None without any."""
    return min((limit for limit in limits if limit is not None), default=None)


def _refusal(why: str) -> Exception:
    from fastapi import HTTPException

    return HTTPException(status_code=400, detail=why)


def _blocks_hold(batching: Any) -> int | None:
    """Tokens that one request can have if no other has any; None without continuous batching, or if
    that has failed."""
    if batching is None:
        return None
    # made by the thread that works with it, which the first request has just started; nobody can be
    # served before
    while batching.batch_processor is None and batching.is_running():
        if batching.background_thread_status.fatal_error is not None:
            break
        time.sleep(POLL_SECONDS)
    return None if batching.batch_processor is None else tokens_in(batching.batch_processor.cache)


def tokens_in(cache: Any) -> int:
    """The longest sequence that Transformers' paged cache has room for, layers with a sliding
    window beside it included."""
    if hasattr(cache, "cache_allocators"):  # sectors, each of which one kind of layer takes
        kinds, most = cache.cache_allocators.values(), cache.max_tokens_read

        def too_long(tokens: int) -> bool:
            blocks = ((kind, kind.needs_new_blocks("", 0, tokens)) for kind in kinds)
            sectors = sum(-(-count // kind.blocks_per_sector) for kind, count in blocks)
            return sectors > cache.num_sectors

    else:
        most = cache.num_pages

        def too_long(tokens: int) -> bool:
            # as many as the scheduler takes: one more than it needs
            return cache.blocks_needed((tokens + 1) // cache.block_size + 1, 0) > cache.num_blocks

    return bisect.bisect_left(range(most + 1), True, key=too_long) - 1


def explain_failures() -> None:
    """Answer requests that fail with a status and a message where OpenAI's client looks for it.
    Transformers' server says `Internal Server Error` to most of them."""
    wrap(_module("server"), "build_server", _build_server)


def _build_server(build: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from starlette.exceptions import HTTPException

    app, dead = build(*args, **kwargs), _module("utils").CBWorkerDeadError
    # what is raised for a value that does not fit, such as messages without a role
    bad = (AttributeError, IndexError, KeyError, TypeError, ValueError, TemplateError)

    async def answer(request: Any, error: Any) -> Any:
        status = 400 if isinstance(error, bad) else 500
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, HTTPException):
            status, message = error.status_code, str(error.detail)
        elif isinstance(error, RequestValidationError):
            wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
            status, message = 422, "; ".join(f"{where}: {what}" for where, what in wrong)
        elif isinstance(error, dead):
            status, message = 503, str(error)
        logger.warning(f"{request.url.path}: {status}, {message}")
        kind = "invalid_request_error" if status < 500 else "server_error"
        return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)

    for kind in (HTTPException, RequestValidationError, dead, *bad, Exception):
        app.add_exception_handler(kind, answer)
    return app
