"""Sphinx configuration: `make docs` builds the pages with warnings as errors, and without a network."""

import re
from importlib.metadata import version as installed_version

from docutils.parsers.rst.states import Inliner

project = "torchdyn_mintime"
author = "the torchdyn_mintime authors"
copyright = author
release = version = installed_version("torchdyn-mintime")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax is copied beside the pages
]
exclude_patterns = ["_build", "**.ipynb_checkpoints", "tables"]  # tables are included by pages
# intersphinx stays off: it fetches other projects' inventories at every build.

nb_execution_mode = "off"  # notebooks are shown as they were stored; the tests run them
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_use_ivar = True  # an attribute that a docstring lists and the class annotates is described once

html_theme = "furo"
pygments_dark_style = "github-dark"  # furo's own underlines the names of modules
html_title = f"torchdyn_mintime {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]


def _plain_bar(inliner, match, lineno):
    """Keeps a bar in a docstring, as in |f|: reST's substitutions are not used."""
    end = match.end("start")
    return match.string[:end], [], match.string[end:], []


Inliner.dispatch["|"] = _plain_bar


def _shorten(app, docname, source):
    """Shows the names of the API page under ``tm``, as programs write them."""
    if docname == "api":
        source[0] = re.sub(
            r"\{py:obj\}`torchdyn_mintime\.([\w.]+)`", r"{py:obj}`tm.\1 <torchdyn_mintime.\1>`", source[0]
        )


def setup(app):
    app.connect("source-read", _shorten)
