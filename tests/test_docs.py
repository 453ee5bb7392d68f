"""Every program in the documentation runs, and prints what the page says it prints.

The ```python blocks of a page run one after another in one namespace. A ```text block that follows one is its expected
output: the words must agree, numbers to 5 %. Two comments in a page change that:

    <!-- not run: why -->      before a python block: it is only compiled
    <!-- numbers vary -->      before a text block: numbers are not compared, as after training
"""

import contextlib
import io
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.exists() and "_build" not in page.parts and "```python" in page.read_text(encoding="utf-8")
]
FENCE = re.compile(
    r"(?:^<!--\s*(?P<note>not run: [^>]*|numbers vary)\s*-->\n+)?^```(?P<kind>python|text)\n(?P<body>.*?)^```$",
    re.M | re.S,
)
NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?!\w)")


def blocks(text):
    """(line, kind, note, body, directly follows the block before) of every python and text block."""
    end = -1
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        follows = end > 0 and not text[end : match.start()].strip()
        yield line, match["kind"], match["note"] or "", match["body"], follows
        end = match.end()


def agree(expected, got):
    """Whether two outputs have the same words, and numbers within 5 % (near rounding error, within a factor of 20)."""
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", got).split():
        return False
    for a, b in zip(map(float, NUMBER.findall(expected)), map(float, NUMBER.findall(got)), strict=True):
        tiny = 0 < abs(a) < 1e-6
        if not (math.isclose(a, b, rel_tol=0.05, abs_tol=1e-9) or (tiny and abs(a) / 20 < abs(b) < 20 * abs(a))):
            return False
    return True


def run(page, report):
    """Run a page's blocks; `report(line, note, expected, got)` is called for each text block that follows one."""
    namespace, output = {"__name__": "__main__"}, ""
    for line, kind, note, body, follows in blocks(page.read_text(encoding="utf-8")):
        if kind == "text":
            if follows:
                report(line, note, body, output)
            continue
        # Padded, so that a traceback names the line of the page.
        code = compile("\n" * (line - 1) + body, str(page), "exec")
        output = ""
        if note.startswith("not run"):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(code, namespace)
        output = "".join(s for s in stream.getvalue().splitlines(True) if not s.startswith("Your vector field"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("default")  # torchdyn's and Lightning's warnings are their own affair
def test_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = []

    def report(line, note, expected, got):
        if note == "numbers vary":
            expected, got = (NUMBER.sub("1", s) for s in (expected, got))
        if not agree(expected, got):
            wrong.append(f"{page.name}:{line} says\n{expected}\nbut it printed\n{got}")

    run(page, report)
    assert not wrong, "\n".join(wrong)
