"""Writes the learnable span and solver as a patch of torchdyn: `python tests/upstream/branch.py torchdyn-span.patch`.

The rooms `numerics` and `core` become `torchdyn.numerics.exact` and `torchdyn.core.learnable`, with the tests that need no
other room as `test/learnable/`. Nothing else of torchdyn changes but two lines that import the public names. Then the tests
run in a copy of torchdyn where this package cannot be imported, and the sizes are printed. The patch applies to the released
1.0.6, before or after the series of docs/upstream/patches.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from series import PATCHES, ROOT, apply, copy_torchdyn, outcomes

PACKAGE = ROOT / "torchdyn_mintime"
ROOMS = {"numerics": "torchdyn/numerics/exact", "core": "torchdyn/core/learnable"}
EXPORTS = {
    "torchdyn/core/__init__.py": (
        "torchdyn.core.learnable",
        ("LearnableSpan", "parameter_groups", "replicate_times", "spans", "SpeedLimit", "unwrap", "wrap"),
    ),
    "torchdyn/numerics/__init__.py": ("torchdyn.numerics.exact", ("IntegrationError", "LearnableSolver")),
}
HELPERS = ("conftest.py", "differences.py", "learners.py", "problems.py", "profiles.py")
# The package by its new names. The last rows are for tests and examples, which call everything `tm`.
RENAMED = (
    (r"torchdyn_mintime\.numerics", "torchdyn.numerics.exact"),
    (r"torchdyn_mintime\.core", "torchdyn.core.learnable"),
    (r"from torchdyn_mintime import (LearnableSolver|IntegrationError)", r"from torchdyn.numerics import \1"),
    (r"from torchdyn_mintime import (LearnableSpan|wrap)", r"from torchdyn.core import \1"),
    (r"torchdyn_mintime\.wrap", "torchdyn.core.wrap"),
    (r"\btm\.(LearnableSolver|IntegrationError)", r"torchdyn.numerics.\1"),
    (r"^import torchdyn_mintime as tm$", "import torchdyn.core as tm\nimport torchdyn.numerics"),
)
# Stands for this package where the moved code runs: whoever imports it is told.
ABSENT = 'raise ImportError("torchdyn_mintime is not part of torchdyn")\n'


def renamed(text: str) -> str:
    """Returns a file of this package as one of torchdyn."""
    for old, new in RENAMED:
        text = re.sub(old, new, text, flags=re.MULTILINE)
    return text


def moved_tests() -> dict[str, str]:
    """Returns {path: text} of the tests of both rooms that need no other room, and their helpers."""
    rooms = [path for room in ROOMS for path in sorted((ROOT / "tests" / room).glob("test_*.py"))]
    exported = {name for _, names in EXPORTS.values() for name in names}
    found = {f"test/learnable/{name}": renamed((ROOT / "tests" / name).read_text(encoding="utf-8")) for name in HELPERS}
    for path in rooms:
        text = renamed(path.read_text(encoding="utf-8"))
        if "torchdyn_mintime" not in text and not set(re.findall(r"\btm\.(\w+)", text)) - exported:
            found[f"test/learnable/{path.name}"] = text
    return found


def build(folder: Path) -> dict[str, int]:
    """Writes the moved files into a folder that has torchdyn; returns {part: lines}."""
    sizes = {}
    for room, target in ROOMS.items():
        (folder / target).mkdir(parents=True)
        for path in sorted((PACKAGE / room).glob("*.py")):
            text = renamed(path.read_text(encoding="utf-8"))
            (folder / target / path.name).write_text(text, encoding="utf-8")
            sizes[target] = sizes.get(target, 0) + text.count("\n")
    for name, text in moved_tests().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        sizes["test/learnable"] = sizes.get("test/learnable", 0) + text.count("\n")
    for name, (module, names) in EXPORTS.items():
        path = folder / name
        text = path.read_text(encoding="utf-8").rstrip() + "\n"
        added = f"\nfrom {module} import {', '.join(names)}\n__all__ += {list(names)}\n"
        path.write_text(text + added, encoding="utf-8")
        sizes[name] = added.count("\n")
    return sizes


def difference(before: Path, after: Path) -> str:
    """Returns the patch from one folder to the one beside it, as `git apply` takes it."""
    command = ["git", "diff", "--no-index", "--no-color", before.name, after.name]
    done = subprocess.run(command, cwd=before.parent, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: they differ
        raise RuntimeError(done.stderr)
    folders = rf"\b([ab])/(?:{before.name}|{after.name})/"
    return re.sub(
        r"^(?:diff --git|---|\+\+\+) .*$", lambda line: re.sub(folders, r"\1/", line.group(0)), done.stdout, flags=re.M
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("torchdyn-span.patch"), help="where the patch goes")
    parser.add_argument("-k", default="", help="run only these tests, as pytest's -k")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        before, after = copy_torchdyn(root / "before"), copy_torchdyn(root / "after")
        sizes = build(after)
        patch = difference(before, after)
        arguments.out.write_text(patch, encoding="utf-8")
        table = Table("part", "lines")
        for part, lines in sizes.items():
            table.add_row(part, str(lines))
        console.print(table, f"{arguments.out}: {len(patch) / 1e3:.0f} kB")
        released = apply([arguments.out.resolve()], copy_torchdyn(root / "released"))
        series = apply([*PATCHES, arguments.out.resolve()], copy_torchdyn(root / "series"))
        good = True
        for name, folder in (("the released torchdyn", released), ("the series", series)):
            (folder / "torchdyn_mintime.py").write_text(ABSENT, encoding="utf-8")
            where = root / f"where {folder.name}"
            where.mkdir()
            found = outcomes(
                folder, where, ["--rootdir", str(folder), str(folder / "test/learnable"), "-k", arguments.k]
            )
            failed = sorted(test for test, passed in found.items() if not passed)
            good &= not failed and bool(found)
            console.print(
                f"On {name}: {len(found) - len(failed)} of {len(found)} tests pass.", *failed[:20], sep="\n  "
            )
    if not good:
        sys.exit("Tests of the moved code fail.")


if __name__ == "__main__":
    main()
