"""Mutation testing: how many small defects do the tests find?

python tests/mutation.py                          a sample of each part; four hours on one core
python tests/mutation.py --part growth --sample 0     all of one part

cosmic-ray changes one operator, comparison, number or keyword at a time, in a copy of the project, and runs the tests of
that part. Bit operations, shifts, powers, remainders and floor divisions are left out: put in the place of a sum they end
in a TypeError at once, and would flatter the figure. Of what is left one change is drawn for each place, and of the places
a sample. Printed are the share that was found, and every survivor, to be judged: an equivalent change cannot be found.
"""

import argparse
import random
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome

ROOT = Path(__file__).resolve().parent.parent
FLATTERING = re.compile(r"Bit|Shift|Mod\b|_Mod|FloorDiv|Pow|Invert")


@dataclass(frozen=True)
class Part:
    """What is changed, which tests must find it, the likeliest first, and how many places are drawn."""

    modules: str
    tests: str
    sample: int


PARTS = {
    "numerics": Part(
        "numerics",
        "--benchmark-skip tests/numerics tests/core/test_gradients.py tests/test_speed.py "
        "tests/upstream/test_u04_to_u10_adjoint.py tests/upstream/test_u01_to_u03_solves.py tests/core/test_span.py",
        50,
    ),
    "span": Part(
        "core/interval.py core/learnable_interval.py core/span.py",
        "--benchmark-skip tests/core/test_span.py tests/core/test_wrapping.py tests/upstream/test_u11_to_u17_use.py "
        "tests/core/test_gradients.py tests/test_speed.py",
        50,
    ),
    "lyapunov": Part(
        "losses/lyapunov.py losses/potentials.py losses/certificate.py losses/samplers.py",
        "tests/losses/test_lyapunov.py tests/losses/test_potentials.py tests/losses/test_certificate.py "
        "tests/losses/test_samplers.py",
        60,
    ),
    "step-count": Part("losses/step_count.py", "tests/losses/test_step_count.py", 30),
    "growth": Part("depth/growth.py depth/rollback.py", "tests/depth/test_growth.py tests/depth/test_rollback.py", 50),
    "target": Part("depth/target.py", "tests/depth/test_target.py", 30),
    "decisions": Part(
        "depth/ladder.py depth/stage.py depth/verification.py",
        "tests/depth/test_ladder.py tests/depth/test_stage.py tests/depth/test_verification.py",
        60,
    ),
    "search": Part(
        "depth/trials.py depth/searched_model.py depth/shallowest.py depth/compress.py",
        "tests/depth/test_shallowest.py tests/depth/test_compress.py",
        60,
    ),
    "trim": Part("depth/trim.py depth/early_exit.py depth/rows.py", "tests/depth/test_trim.py", 40),
}
CONFIG = """
[cosmic-ray]
module-path = {modules}
timeout = 900.0
excluded-modules = []
test-command = "{python} -m pytest -x -q --timeout 120 -p no:cacheprovider {tests}"
[cosmic-ray.distributor]
name = "local"
"""


def draw(path: Path, sample: int, seed: int) -> tuple[int, int]:
    """Leaves a sample in the session, and returns how many places there were, and are."""
    with use_db(path, WorkDB.Mode.open) as session:
        places: dict[tuple, list] = {}
        for item in session.work_items:
            (mutation,) = item.mutations
            if not FLATTERING.search(mutation.operator_name):
                kind = mutation.operator_name.split("_")[0]
                places.setdefault((str(mutation.module_path), mutation.start_pos, kind), []).append(item)
        chance = random.Random(seed)
        drawn = sorted(places) if not sample else chance.sample(sorted(places), min(sample, len(places)))
        kept = [chance.choice(places[place]) for place in drawn]
        session.clear()
        session.add_work_items(kept)
    return len(places), len(kept)


def report(name: str, path: Path) -> None:
    """The share that was found, and the survivors."""
    with use_db(path, WorkDB.Mode.open) as session:
        results = dict(session.results)
        items = {item.job_id: item for item in session.work_items}
    survived = [job for job, result in results.items() if result.test_outcome == TestOutcome.SURVIVED]
    found = sum(result.test_outcome == TestOutcome.KILLED for result in results.values())
    judged = found + len(survived)
    print(f"{name}: {found} of {judged} found ({100 * found / max(1, judged):.0f} %); survivors:")
    for job in survived:
        (mutation,) = items[job].mutations
        changed = [line for line in results[job].diff.splitlines() if re.match(r"[-+](?![-+])", line)]
        print(f"  {mutation.module_path}:{mutation.start_pos[0]} {mutation.operator_name}")
        print("\n".join(f"    {line}" for line in changed))


def main() -> None:
    """Runs the parts asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--sample", type=int, help="places to draw; 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.mkdir()
        for name in ("torchdyn_mintime", "benchmarks", "tests", "pyproject.toml"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for name in options.part or PARTS:
            part = PARTS[name]
            config, session = Path(folder) / f"{name}.toml", Path(folder) / f"{name}.sqlite"
            modules = [f"torchdyn_mintime/{module}" for module in part.modules.split()]
            config.write_text(CONFIG.format(modules=modules, tests=part.tests, python=sys.executable))
            _cosmic_ray("baseline", config, cwd=copy)  # the tests must pass on what is not changed
            _cosmic_ray("init", config, session, cwd=copy)
            sample = part.sample if options.sample is None else options.sample
            print("{}: {} places, {} drawn".format(name, *draw(session, sample, options.seed)), flush=True)
            _cosmic_ray("exec", config, session, cwd=copy)
            report(name, session)


def _cosmic_ray(command: str, *files: Path, cwd: Path) -> None:
    subprocess.run([Path(sys.executable).parent / "cosmic-ray", command, *files], cwd=cwd, check=True)


if __name__ == "__main__":
    main()
