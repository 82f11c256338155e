"""lm-eval knows `hip`: the model type, the tasks of this package and the attention names.

    from hip_hf.integration.lm_eval.registration import register

    register()
    arguments = {"pretrained": "any/checkpoint", "budget": 512}
    lm_eval.simple_evaluate(model="hip", model_args=arguments, tasks=["hip_longctx"])

`hip-hf lm-eval` calls `register` for you, and after `hip-hf autoload enable` so does every plain
`lm_eval` of the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hip_hf.integration import changes

TASKS = Path(__file__).parents[2] / "eval" / "tasks"
MODEL = "hip"


class UsageError(ValueError):
    """What a user can get wrong in model arguments and metadata: shown without a traceback."""


def register() -> None:
    """Make lm-eval know the model type `hip` and the tasks in `hip_hf/eval/tasks`. Calling it again
    is harmless, and `hip_hf.unregister` takes it back.

    lm-eval has no entry points for plugins. Its model registry takes names at run time; its task
    manager takes folders only as an argument of the caller's, to which this adds that of `hip_hf`.

    Raises:
        ImportError: lm-eval is not installed.
    """
    register_model()
    register_tasks()


def register_model() -> None:
    """The first half of `register`: the model type, beside all of lm-eval's own."""
    # lm-eval imports it, for its own types, only where no type is registered yet
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="hip_hf.integration.lm_eval.model:HipLM")
        # lm-eval has no public way to take a type back
        changes.at_undo(lambda: model_registry._objs.pop(MODEL, None))


def register_tasks() -> None:
    """The second half of `register`: the tasks."""
    from lm_eval.tasks import TaskManager

    changes.wrap(TaskManager, "__init__", _with_our_tasks)


def _with_our_tasks(
    init: Any, self: Any, verbosity: Any = None, include_path: Any = None, *args: Any, **kwargs: Any
) -> None:
    given = include_path if isinstance(include_path, (list, tuple)) else [include_path]
    init(self, verbosity, [TASKS, *(given if include_path else [])], *args, **kwargs)
