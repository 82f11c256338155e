"""Sphinx settings. `figures.py` makes pictures, and tables of results and supported models, while
the documentation is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests" / "lib")]

import hip_hf  # noqa: E402

project = "hip_hf"
author = "the hip_hf authors"
version = release = hip_hf.__version__
html_title = f"hip_hf {release}"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["**.ipynb_checkpoints"]
html_theme = "furo"
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = (
    "off"  # the tests execute the notebooks; these are the outputs that they were saved with
)
default_role = "code"  # docstrings write code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
copybutton_exclude = ".linenos, .gp"


def setup(app: Any) -> None:
    import figures

    app.connect("builder-inited", lambda app: figures.make_all(HERE / "_generated"))
