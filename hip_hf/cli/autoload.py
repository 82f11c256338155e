"""`hip-hf autoload`: let plain `lm_eval`, `accelerate launch -m lm_eval` and `transformers serve`
of this environment know `hip`.

Neither has entry points, so two small files go into the environment's site-packages: a `.pth`,
which Python reads when it starts, and the module it imports: hooks that register `hip` once
something imports lm-eval's models or the part of Transformers' server that loads models, and our
tasks once something imports lm-eval's tasks. Other programs pay for none of them.
`transformers chat` talks to such a server, and needs nothing itself.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Annotated

from typer import Argument

from hip_hf.cli.inputs import not_allowed
from hip_hf.cli.publish import Json
from hip_hf.eval.reporting import report
from hip_hf.integration.changes import AUTOLOAD

ACTIONS = ("enable", "disable", "status")

# Must not import hip_hf when Python starts: that would import torch into every program.
SOURCE = '''"""Written by `hip-hf autoload enable`; `hip-hf autoload disable` removes it. It makes
other programs know `hip`."""

import sys
from importlib import import_module
from importlib.machinery import PathFinder


class _Finder:
    """Finds one module, once, and when it has been imported calls the given functions."""

    def __init__(self, module, integration, *names):
        self.module = module
        self.integration = integration
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            self.execute = spec.loader.exec_module
            spec.loader.exec_module = self.exec_module
        return spec

    def exec_module(self, module):
        self.execute(module)
        try:
            integration = import_module(f"hip_hf.integration.{self.integration}")
            for name in self.names:
                getattr(integration, name)()
        except ImportError as error:
            remove = f"as does deleting {__file__} and the .pth beside it"
            print(f"hip_hf_autoload: hip is not registered: {error}. "
                  f"`hip-hf autoload disable` removes this hook, {remove}", file=sys.stderr)


# whoever asks for a model type has imported one of the first two: lm-eval imports its models only
# where no type is known yet
_tasks = _Finder("lm_eval.tasks", "lm_eval.registration", "register_model", "register_tasks")
sys.meta_path.insert(0, _Finder("lm_eval.models", "lm_eval.registration", "register_model"))
sys.meta_path.insert(0, _tasks)
sys.meta_path.insert(0, _Finder("transformers.cli.serving.model_manager", "serve", "register"))
'''


def files() -> dict[Path, str]:
    """What is installed: path and content."""
    site = Path(sysconfig.get_path("purelib"))
    return {site / f"{AUTOLOAD}.py": SOURCE, site / f"{AUTOLOAD}.pth": f"import {AUTOLOAD}\n"}


def state() -> str:
    """`enabled`, `disabled`, or `outdated` (there, but not as this version writes it)."""
    found = {path: path.read_text(encoding="utf-8") for path in files() if path.exists()}
    if not found:
        return "disabled"
    return "enabled" if found == files() else "outdated"


def main(
    action: Annotated[str, Argument(help=" | ".join(ACTIONS))] = "status", as_json: Json = False
) -> None:
    """Let plain lm_eval and transformers serve of this environment know `hip` (enable), stop that
    (disable), say how it is."""
    if action not in ACTIONS:
        raise not_allowed("ACTION", action, ACTIONS)
    try:
        for path, content in files().items():
            if action == "enable":
                path.write_text(content, encoding="utf-8")
            elif action == "disable":
                path.unlink(missing_ok=True)
    except OSError as error:
        raise SystemExit(f"hip-hf autoload {action}: {error}") from None
    rows = [{"file": str(path), "there": path.exists()} for path in files()]
    report.show(f"autoload: {state()}", rows, as_json, state=state())
