"""Sphinx configuration. `make docs` builds into docs/_build/html."""

import os
import re
import shutil
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "pssm"
author = "the pssm authors"
copyright = "2026, the pssm authors"
release = metadata.version("pssm-numpyro")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "benchmarks", "experiments", "**.ipynb_checkpoints"]

html_theme = "sphinx_book_theme"
html_title = "pssm"

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
# Notebooks are shown as they are; PSSM_EXECUTE_NOTEBOOKS=1 runs them all.
nb_execution_mode = "force" if os.environ.get("PSSM_EXECUTE_NOTEBOOKS") == "1" else "off"
nb_execution_timeout = 1200
nb_execution_raise_on_error = True

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the shapes are in the text; "*batch" of an annotation would be taken for emphasis
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# One object has two public addresses (pssm.observe, pssm.distributions.observe): a short name may match both.
suppress_warnings = ["ref.python"]


def copy_notebooks() -> None:
    """Copy ../notebooks/*.ipynb into docs/tutorials (git-ignored), with an index."""
    here = Path(__file__).parent
    tutorials = here / "tutorials"
    shutil.rmtree(tutorials, ignore_errors=True)
    tutorials.mkdir()
    notebooks = sorted((here.parent / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        shutil.copy(notebook, tutorials)
    lines = ["# Tutorials", "", "Notebooks from the folder `notebooks/` of the repository."]
    if notebooks:
        lines += ["", "```{toctree}", ":maxdepth: 1", "", *(notebook.stem for notebook in notebooks), "```"]
    (tutorials / "index.md").write_text("\n".join(lines) + "\n")


def skip_foreign(app, what, name, obj, skip, options):
    """Leave out what a module of the package has imported from elsewhere."""
    module = getattr(obj, "__module__", None)
    foreign = what == "module" and isinstance(module, str) and module.partition(".")[0] != "pssm"
    return True if foreign else None


def code_in_backticks(app, what, name, obj, options, lines):
    """Docstrings write code in single backticks; reStructuredText wants two. Runs before napoleon reads the lines."""
    text = re.sub(r"(?<![`:\w])`([^`]+)`(?![`_])", r"``\1``", "\n".join(lines))
    lines[:] = text.split("\n")


def setup(app):
    copy_notebooks()
    app.connect("autodoc-process-docstring", code_in_backticks, priority=400)
    app.connect("autodoc-skip-member", skip_foreign)
