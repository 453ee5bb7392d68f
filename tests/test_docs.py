"""Every program in the documentation runs, prints what the page says it prints, and every name on a page is there.

The ```python blocks of a page run one after another in one namespace. A ```text block that follows one is its expected
output: the words must agree, numbers to 5 %. Two comments in a page change that:

    <!-- not run: why -->      before a python block: it is only compiled
    <!-- numbers vary -->      before a text block: numbers are not compared, as after training
"""

import contextlib
import importlib
import io
import math
import pkgutil
import re
from pathlib import Path

import pytest

import torchdyn_mintime

ROOT = Path(__file__).parent.parent
MARKDOWN = [
    page
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "_build" not in page.parts
]
PAGES = [page for page in MARKDOWN if "```python" in page.read_text(encoding="utf-8")]
FENCE = re.compile(
    r"(?:^<!--\s*(?P<note>not run: [^>]*|numbers vary)\s*-->\n+)?^```(?P<kind>python|text)\n(?P<body>.*?)^```$",
    re.M | re.S,
)
NUMBER = re.compile(r"(?<![\w.])[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?(?!\w)")


def blocks(text):
    """Yields (line, kind, note, body, directly follows the block before) for every python and text block."""
    end = -1
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        follows = end > 0 and not text[end : match.start()].strip()
        yield line, match["kind"], match["note"] or "", match["body"], follows
        end = match.end()


def agree(expected, got):
    """Returns whether two outputs have equal words, and numbers within 5 % (near rounding error: a factor of 20)."""
    if NUMBER.sub("#", expected).split() != NUMBER.sub("#", got).split():
        return False
    for a, b in zip(map(float, NUMBER.findall(expected)), map(float, NUMBER.findall(got)), strict=True):
        tiny = 0 < abs(a) < 1e-6
        if not (math.isclose(a, b, rel_tol=0.05, abs_tol=1e-9) or (tiny and abs(a) / 20 < abs(b) < 20 * abs(a))):
            return False
    return True


def run(page, report):
    """Runs a page's blocks, and calls `report(line, note, expected, got)` for each text block that follows one."""
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
@pytest.mark.filterwarnings("default")  # warnings of torchdyn and Lightning are no errors here
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


# What only the package itself uses, and rooms that hand on what their files have. Every other `__all__` outside the
# experiments is for users.
INTERNAL = {
    "core",
    "core.checks",
    "core.learnable_interval",
    "core.series",
    "core.solve",
    "depth.ladder",
    "depth.rates",
    "depth.rows",
    "depth.searched_model",
    "depth.stage",
    "depth.verification",
    "lightning.apart",
    "lightning.base",
    "lightning.ranks",
    "numerics",
    "numerics.checkpoint",
    "numerics.problem",
    "numerics.step_control",
}
ROW = re.compile(r"^\| `(\w+)` \| [^|]+ \| \{py:obj\}`(torchdyn_mintime[\w.]*)\.(\w+)` \|$", re.M)
PATH = re.compile(
    r"`((?:tests|docs|tutorials|benchmarks|numerics|core|losses|depth|lightning|experiments)/[\w/.-]+\.\w+)`"
)
"""A file that a page names: from the checkout's root, or a module from the package's."""


def public_names():
    """Yields (module, name, object) for every public name outside the experiments."""
    for found in pkgutil.walk_packages(torchdyn_mintime.__path__, "torchdyn_mintime."):
        room = found.name.removeprefix("torchdyn_mintime.")
        if room.split(".")[0] in ("__main__", "experiments") or room in INTERNAL:
            continue
        module = importlib.import_module(found.name)
        for name in getattr(module, "__all__", ()):
            yield found.name, name, getattr(module, name)


def test_the_api_page_has_every_public_name_by_its_shortest_path():
    rows = ROW.findall((ROOT / "docs/api.md").read_text(encoding="utf-8"))
    assert all(shown == name for shown, _, name in rows)
    assert set(torchdyn_mintime.__all__) <= {name for _, module, name in rows if module == "torchdyn_mintime"}
    shown = [getattr(importlib.import_module(module), name) for _, module, name in rows]
    assert not [f"{module}.{name}" for module, name, found in public_names() if not any(found is s for s in shown)]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_and_tests_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    files = PATH.findall(text)
    assert not [
        file for file in files if not (ROOT / file).exists() and not (ROOT / "torchdyn_mintime" / file).exists()
    ]
    tests = "".join((ROOT / file).read_text(encoding="utf-8") for file in files if file.startswith("tests/"))
    assert not [name for name in re.findall(r"`(test_u\d+\w+)`", text) if f"def {name}(" not in tests]


@pytest.mark.parametrize("page", sorted((ROOT / "docs/upstream").glob("u*.md")), ids=lambda page: page.stem)
def test_the_names_of_a_fix_are_in_the_files_that_are_named_with_it(page):
    fix = page.read_text(encoding="utf-8").partition("## The fix here")[2].partition("## Tests")[0].partition("```")[0]
    code = "".join((ROOT / "torchdyn_mintime" / file).read_text(encoding="utf-8") for file in PATH.findall(fix))
    assert not [name for name in re.findall(r"`[\w.]*?(\w+)(?:\(\))?`", fix) if name not in code]
