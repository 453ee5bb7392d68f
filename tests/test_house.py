"""Where things may stand: imports go down the floors only, and no room touches another's private names."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "torchdyn_mintime"
FLOORS = [
    {"numerics"},
    {"core"},
    {"losses"},
    {"depth"},
    {"flows"},
    {"diagnostics"},
    {"plots"},
    {"lightning"},
    {"experiments"},
]
OUTSIDE = {"__init__", "_public", "__main__"}  # the first two hand names on; the last is the command line
OLD_NAMES = {
    "exits": ["early_exit", "EarlyExit"],
    "grid": ["cut", "merge"],
    "growth": ["DepthGrowth", "DivergedError", "Growth", "Rescue"],
    "lyapunov": [
        *("Certificate", "CrossEntropy", "LyapunovRegularizer", "SquaredDistance", "TruncatedCrossEntropy"),
        *("ball", "box"),
    ],
    "optim": ["CoordinateDescent", "GaussNewtonTime"],
    "regularizers": ["JacobianNorm", "KineticEnergy", "LocalError", "StepDoubling", "TaylorRegularizer"],
    "shallow": ["Shallowest", "Trial", "Verdict"],
    "span": ["LearnableSpan"],
    "speed": ["SpeedLimit"],
    "steer": ["RandomSpan"],
    "step_count": ["StepCount"],
    "trimming": ["Trimmed", "TrimmedSpan", "trim"],
    "weighting": ["TargetLoss"],
    "wrapping": ["parameter_groups", "spans", "unwrap", "wrap"],
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def imported(path: Path) -> set[str]:
    """The rooms that a file imports; "__init__" is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchdyn_mintime":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            known = set().union(*FLOORS) | set(OLD_NAMES)
            found |= {name if name in known else "__init__" for name in names}
        elif isinstance(node, ast.Import):
            ours = [a.name.split(".") for a in node.names if a.name.startswith("torchdyn_mintime")]
            found |= {parts[1] if len(parts) > 1 else "__init__" for parts in ours}
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if room(p) not in OUTSIDE | set(OLD_NAMES))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_the_floors_only(path):
    own = room(path)
    for name in imported(path):
        assert name != "__init__" or own == "experiments", "only experiments import the package itself"
        assert name not in set(OLD_NAMES), f"{name} is a path of older versions"
        if name != "__init__":
            assert name == own or floor(name) < floor(own), f"{own} imports {name}, which is above or beside it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_room_touches_anothers_private_names(path):
    """``x._name`` is allowed on self and cls, and on modules of torch and torchdyn; within core and numerics on all."""
    if room(path) in {"core", "numerics"}:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    private = {
        f"{ast.unparse(node.value)}.{node.attr} in line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value).split(".")[-1].split("[")[0] not in {"self", "cls", "module", "modules"}
    }
    assert not private
    names = {
        f"{node.module}: {alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torchdyn_mintime")
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert not names


def test_old_import_paths_hand_on_what_they_had():
    for name, names in OLD_NAMES.items():
        module = __import__(f"torchdyn_mintime.{name}", fromlist=names)
        assert all(hasattr(module, n) for n in names), name
