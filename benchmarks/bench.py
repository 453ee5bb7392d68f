"""Speed and memory, side by side in one process: a plain Python loop, torchdiffeq, bare NeuralODE and LearnableSpan.

All contestants of a case solve the same network from the same state over [0, 1]. They take turns, round by round. The
ratio to the first contestant is taken within each round, and then the median over rounds: a machine that is busy for a
while slows a whole round, and hardly changes the ratio. With one thread the clock is the processor time of this process,
which leaves out the work of other programs. Quote the ratios; milliseconds depend on the machine.

    python -m torchdyn_mintime bench                       # one thread, all parts but compile
    python -m torchdyn_mintime bench --threads all
    python -m torchdyn_mintime bench --only shallow memory --rounds 30
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas
import torch
from rich.console import Console
from rich.progress import track

from benchmarks.cases import PARTS
from benchmarks.report import COLUMNS, as_table, write
from benchmarks.timing import Row

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> pandas.DataFrame:
    """Runs the command ``python -m torchdyn_mintime bench``, and returns the lines of its table."""
    parser = argparse.ArgumentParser(prog="python -m torchdyn_mintime bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", choices=("1", "all"), default="1", help="threads of torch (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each case (default 15)")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=PARTS,
        default=[*PARTS][:-1],
        metavar="PART",
        help=f"some of the parts {', '.join(PARTS)} (default: all but compile, which takes minutes)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/bench"), help="folder for CSV, JSON and PNG (default results/bench)"
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {options.rounds}")

    console = Console(width=None if sys.stdout.isatty() else 150)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if options.threads == "1" else len(os.sched_getaffinity(0)))
    threads = torch.get_num_threads()
    rows: list[Row] = []
    try:
        for part in track(options.only, "measuring", console=console):
            rows += PARTS[part](options.rounds)
            results = pandas.DataFrame(rows, columns=list(COLUMNS)).astype({"evaluations": "Int64"})
            written = write(results, options.out, threads)  # after each part: an interrupted run leaves what it has
    finally:
        torch.set_num_threads(before)
    console.print(as_table(results, threads))
    console.print(*(f"wrote {path}" for path in written), sep="\n")
    return results


if __name__ == "__main__":
    main()
