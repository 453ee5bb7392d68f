"""Applies docs/upstream/patches to a copy of the installed torchdyn, and shows which faults are left: `make upstream`.

Four things are run, each in a process of its own, where the copy comes before the installed package:

- the halves of tests/upstream that show a fault of plain torchdyn (the strict xfails), on the released and on the patched one;
- the tests that the patches bring, in torchdyn's own layout: on the released one, with all patches, and with each alone;
- the halves that show this package to be right, on the patched one, since users will have both;
- torchdyn's own tests on both, where TORCHDYN_TESTS names the test folder of a copy of its repository.

The command ends with an error if a patch does not apply, mends nothing, or breaks a test. Nothing installed is changed.
"""

import argparse
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "docs/upstream/patches").glob("u*.patch"))
# Halves that no patch mends, and why.
LEFT = {
    "test_u11_plain": "no solver of torchdyn passes a batch of times",
    "test_u17_plain": "the default of torch.load since torch 2.6",
    "test_u18_plain_torchdyn_takes_a_dict_state": "torchdyn has dicts only for solvers of the user's own",
    "test_u18_plain_torchdyn_builds_a_neural_sde": "repaired in torchdyn's repository after 1.0.6",
}

# A half that expects a refusal of the released torchdyn, which its patch ends.
REFUSED = "test_u11_to_u17_use.py::test_u12_torchdyn_itself_accepts_every_grid_or_unwrap_says_that_it_does_not"
# Each run forks from one process that has imported what takes seconds; torchdyn itself is new to each.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "pytorch_lightning", "sklearn.datasets", "torch", "torchcde", "torchsde"])


def copy_torchdyn(folder: Path) -> Path:
    """Copies the installed torchdyn into a new folder, and returns the folder, which PYTHONPATH may name."""
    package = importlib.util.find_spec("torchdyn").submodule_search_locations[0]  # found, not imported
    shutil.copytree(package, folder / "torchdyn", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def apply(patches: Iterable[Path], folder: Path, *options: str) -> Path:
    """Applies patches in order, without fuzz; CalledProcessError says in ``stderr`` what does not fit."""
    # Above a repository git would take the folder for a part of it, and skip all files.
    env = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.resolve().parent)}
    for patch in patches:
        subprocess.run(
            ["git", "apply", *options, str(patch)], cwd=folder, env=env, check=True, capture_output=True, text=True
        )
    return folder


def own_tests(patch: Path) -> list[str]:
    """Returns the test files that a patch adds, relative to torchdyn's repository."""
    return re.findall(r"^\+\+\+ b/(test/\S+)$", patch.read_text(encoding="utf-8"), re.MULTILINE)


def outcomes(folder: Path | None, where: Path, arguments: Sequence[str]) -> dict[str, bool]:
    """Returns {test: passed} of one run of pytest, with the torchdyn of a folder, or the installed one."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        run = PROCESSES.Process(target=_run, args=(folder, where, Path(scratch) / "log", [*options, *arguments]))
        run.start()
        run.join()
        if not report.exists():
            raise RuntimeError(f"pytest did not run:\n{(Path(scratch) / 'log').read_text()[-5000:]}")
        cases = [case for case in ET.parse(report).iter("testcase") if case.find("skipped") is None]
        return {
            f"{case.get('classname')}::{case.get('name')}": case.find("failure") is None and case.find("error") is None
            for case in cases
        }


def _run(folder: Path | None, where: Path, log: Path, arguments: list[str]) -> None:
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(where)
    # Neither this checkout nor what the caller had: the folder, where the run starts, and what is installed.
    own = str(Path(__file__).parent)
    sys.path[:] = [*([str(folder)] if folder else []), str(where), *(p for p in sys.path if p not in ("", own))]
    # Small networks want one thread; one commit, one verdict.
    os.environ.update(PYTHONPATH=str(folder or ""), OMP_NUM_THREADS="1", CI="1")
    pytest.main(arguments)


def fault_halves(folder: Path | None, *arguments: str) -> dict[str, bool]:
    """Returns {half: passed}: one that passes no longer shows its fault."""
    return outcomes(folder, ROOT, ["tests/upstream", "-m", "xfail", "--runxfail", *arguments])


def patch_tests(patches: Iterable[Path], folder: Path) -> dict[str, bool]:
    """Returns {test: passed} of the tests that patches bring, in a folder where they are."""
    files = [str(folder / name) for patch in patches for name in own_tests(patch)]
    with tempfile.TemporaryDirectory() as empty:  # where a run starts is importable: not the folder itself
        return outcomes(folder, Path(empty), ["--rootdir", str(folder), *files])


def _share(found: Sequence[bool]) -> str:
    return f"{sum(found)} of {len(found)}" if found else "-"


def _of(found: dict[str, bool], patch: Path) -> list[bool]:
    modules = tuple(Path(name).stem for name in own_tests(patch))
    return [passed for name, passed in found.items() if name.partition("::")[0].endswith(modules)]


def show_faults(released: dict[str, bool], patched: dict[str, bool], console: Console) -> bool:
    """Prints for each fault how many halves show it; returns whether only those that are left on purpose remain."""
    table = Table("fault", "shown by the released torchdyn", "by the patched one", "left, because")
    good = True
    faults = sorted({re.search(r"::test_u(\d+)_", name)[1] for name in released}, key=int)
    for fault in faults:
        before, after = ({n: p for n, p in found.items() if f"::test_u{fault}_" in n} for found in (released, patched))
        shown = [name for name, passed in after.items() if not passed]
        reasons = {why for start, why in LEFT.items() if any(f"::{start}" in name for name in shown)}
        good &= not any(before.values()) and all(any(f"::{start}" in name for start in LEFT) for name in shown)
        table.add_row(
            f"U{fault}",
            _share([not p for p in before.values()]),
            _share([not p for p in after.values()]),
            "; ".join(sorted(reasons)),
        )
    console.print(table)
    return good


def show_patches(root: Path, console: Console) -> bool:
    """Prints which of the patches' tests pass without, with all and with each alone; returns whether all is as it should be."""
    released = apply(PATCHES, copy_torchdyn(root / "tests only"), "--include=test/*")
    together = apply(PATCHES, copy_torchdyn(root / "together"))
    without, with_all = patch_tests(PATCHES, released), patch_tests(PATCHES, together)
    table = Table("patch", "lines of torchdyn", "its tests pass without it", "with all patches", "with it alone")
    good = all(with_all.values())
    for patch in PATCHES:
        alone = patch_tests([patch], apply([patch], copy_torchdyn(root / patch.stem)))
        before, after = _of(without, patch), _of(with_all, patch)
        good &= not all(before) and bool(after) and all(alone.values()) and len(alone) == len(after)
        table.add_row(patch.stem, changed(patch), _share(before), _share(after), _share(list(alone.values())))
    console.print(table)
    return good


def changed(patch: Path) -> str:
    """Returns the lines that a patch adds to and takes from torchdyn itself, without its tests, as in "+3 -1"."""
    parts = re.split(r"^diff --git ", patch.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    lines = [line for part in parts if part.startswith("a/torchdyn/") for line in part.splitlines()]
    count = {sign: sum(re.match(rf"\{sign}(?!\{sign}\{sign} )", line) is not None for line in lines) for sign in "+-"}
    return f"+{count['+']} -{count['-']}"


def show_plugin(root: Path, console: Console) -> bool:
    """Runs the halves that show this package to be right, on the patched torchdyn; returns whether they still do."""
    deselected = [f"--deselect=tests/upstream/{name}" for name in ("test_series.py", REFUSED)]
    found = outcomes(root / "together", ROOT, ["tests/upstream", "-m", "not xfail", *deselected])
    failed = [name for name, passed in found.items() if not passed]
    console.print(
        f"This package on the patched torchdyn: {_share(list(found.values()))} of the other halves pass.", *failed
    )
    return not failed


def show_own_suite(root: Path, console: Console) -> bool:
    """Runs torchdyn's own tests on both, if TORCHDYN_TESTS names them; returns whether no patch breaks one."""
    suite = os.environ.get("TORCHDYN_TESTS")
    if not suite:
        console.print("TORCHDYN_TESTS does not name the test folder of a copy of torchdyn: its own tests were not run.")
        return True
    folder = str(Path(suite).resolve())
    found = []
    for name in ("suite, released", "suite, patched"):
        where = root / name  # the suite writes files where it runs
        where.mkdir()
        found.append(outcomes(None if "released" in name else root / "together", where, ["--rootdir", folder, folder]))
    released, patched = found
    broken = sorted(n for n, passed in released.items() if passed and not patched.get(n))
    console.print(
        f"torchdyn's own tests: {_share(list(released.values()))} pass on the released one, "
        f"{_share(list(patched.values()))} on the patched one; broken by the patches: {', '.join(broken) or 'none'}."
    )
    return not broken


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        try:
            good = show_patches(root, console)
        except subprocess.CalledProcessError as error:
            sys.exit(f"A patch does not apply to torchdyn {importlib.metadata.version('torchdyn')}:\n{error.stderr}")
        good &= show_faults(fault_halves(None), fault_halves(root / "together"), console)
        good &= show_plugin(root, console)
        good &= show_own_suite(root, console)
    if not good:
        sys.exit("Not as it should be: see the tables above.")


if __name__ == "__main__":
    main()
