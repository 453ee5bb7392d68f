"""Docstrings that are written to be read in an editor, made fit for Sphinx.

Formulas stand indented in module docstrings: they are shown as they are. A | means an absolute value or a norm, never a
substitution of reStructuredText.
"""

import re


def _literal_formulas(lines):
    """Puts `::` before every indented block of a module's docstring."""
    out, indented = [], False
    for line in lines:
        starts = line.startswith("    ")
        if starts and not indented and (not out or not out[-1].strip()):
            out += ["::", ""]
        if line.strip():
            indented = starts
        out.append(line)
    return out


def _plain_bars(line):
    return re.sub(r"(``.*?``)|\|", lambda m: m[1] or r"\|", line)


def process(app, what, name, obj, options, lines):
    if what == "module":
        lines[:] = _literal_formulas(lines)
        lines[:] = [line if line.startswith("    ") else _plain_bars(line) for line in lines]
    else:
        lines[:] = [line if line.lstrip().startswith((">>>", "...")) else _plain_bars(line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", process)
    return {"parallel_read_safe": True}
