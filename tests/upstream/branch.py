"""Writes the learnable span and solver as a patch of torchdyn: `python tests/upstream/branch.py torchdyn-span.patch`.

The rooms `numerics` and `core` become `torchdyn.numerics.exact` and `torchdyn.core.learnable`, with the tests that need no
other room as `test/learnable/`. Nothing else of torchdyn changes but two lines that import the public names. The patch
applies to the released 1.0.6, and after the series of docs/upstream/patches. Its tests run on both, in a copy of torchdyn
where this package cannot be imported; and so do this package's tests of `losses`, with both rooms imported from torchdyn.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
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
# The rooms by their new names, in whatever uses them; and the names of the package, in what moves.
ROOMS_RENAMED = (
    (r"torchdyn_mintime\.numerics", "torchdyn.numerics.exact"),
    (r"torchdyn_mintime\.core", "torchdyn.core.learnable"),
    (r"torchdyn_mintime\.wrap", "torchdyn.core.wrap"),
)
NAMES_RENAMED = (
    (r"from torchdyn_mintime import (LearnableSolver|IntegrationError)", r"from torchdyn.numerics import \1"),
    (r"from torchdyn_mintime import (LearnableSpan|wrap)", r"from torchdyn.core import \1"),
    (r"\btm\.(LearnableSolver|IntegrationError)", r"torchdyn.numerics.\1"),
    (r"^import torchdyn_mintime as tm$", "import torchdyn.core as tm\nimport torchdyn.numerics"),
)
# They expect a fault of the released torchdyn, U16 and U1, which the series mends.
OF_THE_RELEASED = (
    "test_span.py::test_graphs_that_the_bare_node_left_in_its_layers_do_not_hinder_a_copy",
    "test_wrapping.py::test_rk4_with_a_field_of_time_is_warned_about",
)
# Stands for this package where the moved code runs: whoever imports it is told.
ABSENT = 'raise ImportError("torchdyn_mintime is not part of torchdyn")\n'


def renamed(path: Path, names: Iterable[tuple[str, str]] = (*ROOMS_RENAMED, *NAMES_RENAMED)) -> str:
    """Returns the text of a file with other names."""
    text = path.read_text(encoding="utf-8")
    for old, new in names:
        text = re.sub(old, new, text, flags=re.MULTILINE)
    return text


def moved_tests() -> dict[str, str]:
    """Returns {path: text} of the tests of both rooms that need no other room, and their helpers."""
    rooms = [path for room in ROOMS for path in sorted((ROOT / "tests" / room).glob("test_*.py"))]
    exported = {name for _, names in EXPORTS.values() for name in names}
    found = {f"test/learnable/{name}": renamed(ROOT / "tests" / name) for name in HELPERS}
    for path in rooms:
        text = renamed(path)
        if "torchdyn_mintime" not in text and not set(re.findall(r"\btm\.(\w+)", text)) - exported:
            found[f"test/learnable/{path.name}"] = text
    return found


def build(folder: Path) -> dict[str, int]:
    """Writes the moved files into a folder that has torchdyn; returns {part: lines}."""
    sizes = {}
    for room, target in ROOMS.items():
        (folder / target).mkdir(parents=True)
        for path in sorted((PACKAGE / room).glob("*.py")):
            text = renamed(path)
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


def build_plugin(folder: Path) -> tuple[int, int]:
    """Writes this package with the moved rooms imported from torchdyn, and its tests of losses.

    Returns the lines that are left, and those of the whole package.
    """
    whole = list(PACKAGE.rglob("*.py"))
    package = [path for path in whole if path.relative_to(PACKAGE).parts[0] not in ROOMS]
    tests = [*(ROOT / "tests" / name for name in HELPERS), *(ROOT / "tests/losses").glob("*.py")]
    for path in (*package, *tests):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(renamed(path, ROOMS_RENAMED), encoding="utf-8")
    left, every = (sum(path.read_text(encoding="utf-8").count("\n") for path in paths) for paths in (package, whole))
    return left, every


def difference(before: Path, after: Path) -> str:
    """Returns the patch from one folder to the one beside it, as `git apply` takes it."""
    # Whatever the user has set for git: it must read as `git apply` does without settings.
    prefixes = ["--src-prefix=a/", "--dst-prefix=b/"]
    options = ["--no-index", "--no-color", "--no-ext-diff", "--no-renames", *prefixes]
    command = ["git", "diff", *options, before.name, after.name]
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
        rooms = {path.name for room in ROOMS for path in (ROOT / "tests" / room).glob("test_*.py")}
        left = sorted(rooms - {Path(name).name for name in moved_tests()})
        console.print(table, f"Tests that need other rooms, and stay: {', '.join(left) or 'none'}.", sep="\n")
        console.print(f"{arguments.out}: {len(patch) / 1e3:.0f} kB")
        released = apply([arguments.out.resolve()], copy_torchdyn(root / "released"))
        series = apply([*PATCHES, arguments.out.resolve()], copy_torchdyn(root / "series"))
        plugin = apply([arguments.out.resolve()], copy_torchdyn(root / "plugin"))
        left_lines, all_lines = build_plugin(plugin)
        console.print(f"This package without both rooms: {left_lines} of {all_lines} lines.")
        runs = []
        for name, folder, others in (("the released torchdyn", released, ()), ("the series", series, OF_THE_RELEASED)):
            (folder / "torchdyn_mintime.py").write_text(ABSENT, encoding="utf-8")
            files = ["--rootdir", str(folder), str(folder / "test/learnable")]
            files += [f"--deselect=test/learnable/{other}" for other in others]
            runs.append((f"On {name}", folder, root, files))
        losses = ["--rootdir", str(plugin), str(plugin / "tests/losses")]
        runs.append(("Losses of the package without both rooms", plugin, plugin, losses))
        good = True
        for name, folder, where, files in runs:
            found = outcomes(folder, where, [*files, "-k", arguments.k])
            failed = sorted(test for test, passed in found.items() if not passed)
            good &= not failed and bool(found)
            console.print(f"{name}: {len(found) - len(failed)} of {len(found)} tests pass.", *failed[:20], sep="\n  ")
    if not good:
        sys.exit("Tests of the moved code fail.")


if __name__ == "__main__":
    main()
