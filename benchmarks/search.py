"""Compares the search with vanilla training to the same target: `python -m benchmarks.search moons`."""

import statistics
import time
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy

import torchdyn_mintime as tm
from benchmarks.contestants import node_of
from torchdyn_mintime.experiments import datasets, models

TARGET = 0.01
"""Training cross entropy that both must reach."""
MOST = 1000
"""The largest number of iterations of vanilla training."""
SIZES = {"moons": (2, 16, 2), "annuli": (3, 32, 3)}


def main(
    task: Annotated[str, typer.Argument(help="moons or annuli")],
    seeds: Annotated[int, typer.Option(help="number of seeds, from --first-seed on")] = 10,
    first_seed: Annotated[int, typer.Option(help="the first seed")] = 0,
    lr: Annotated[list[float], typer.Option(help="learning rate; may be given several times")] = [0.1, 0.03, 0.01],  # noqa: B006
    tol: Annotated[float, typer.Option(help="solver error that the search allows, over the displacement")] = 0.1,
    vanilla: Annotated[bool, typer.Option(help="train vanilla for comparison")] = True,
    output: Annotated[Path | None, typer.Option(help="CSV file to write, with a row for each run")] = None,
) -> None:
    """Searches with the default settings at every learning rate and seed, and prints medians and ranges."""
    torch.set_num_threads(1)
    rows = []
    for rate in lr:
        for seed in range(first_seed, first_seed + seeds):
            data = {"moons": datasets.moons, "annuli": datasets.annuli}[task](seed)
            plain = _vanilla(task, data, seed, rate) if vanilla else (float("nan"), 0)
            row = {"lr": rate, "seed": seed, "vanilla s": plain[0], "vanilla iterations": plain[1]}
            row |= _searched(task, data, seed, rate, tol)
            row |= {f"{name} / vanilla": row[f"{name} s"] / plain[0] for name in ("first", "eight", "two", "search")}
            rows.append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    table = pd.DataFrame(rows)
    if output is not None:
        table.to_csv(output, index=False)
    for rate, part in table.groupby("lr", sort=False):
        counts = part["evaluations"].value_counts().sort_index().to_dict()
        met = part["vanilla s"].notna()
        print(f"lr {rate}: evaluations {counts}; vanilla met the target on {met.sum()} of {len(part)}")
        for name in (
            "regret",
            "search s",
            "vanilla s",
            "first / vanilla",
            "eight / vanilla",
            "two / vanilla",
            "search / vanilla",
        ):
            values = part[name].dropna()
            if len(values):
                print(f"  {name}: {statistics.median(values):.3g} ({values.min():.3g} to {values.max():.3g})")


def _net(task: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return models.mlp(*SIZES[task])


def _vanilla(task: str, data: datasets.Data, seed: int, rate: float) -> tuple[float, int]:
    """Returns seconds and iterations until torchdyn's own node of 100 steps meets the target; NaN seconds if it does not."""
    node = node_of(_net(task, seed))
    optimizer, span, start = (
        torch.optim.Adam(node.parameters(), lr=rate),
        torch.linspace(0, 1, 101),
        time.perf_counter(),
    )
    for i in range(MOST):
        loss = cross_entropy(node(data.x, span)[1][-1][:, :2], data.y)
        if loss.item() <= TARGET:
            return time.perf_counter() - start, i
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float("nan"), MOST


def _searched(task: str, data: datasets.Data, seed: int, rate: float, tol: float) -> dict[str, float]:
    span = tm.wrap(node_of(_net(task, seed)), torch.linspace(0, 1, 101))
    search, start = tm.Shallowest(TARGET, solver_tol=tol), time.perf_counter()

    def criterion(out: tuple[Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(out[1][-1][:, :2], batch[1])

    verdict = search.fit(span, criterion, [(data.x, data.y)], lr=rate, progress=False)
    seconds = time.perf_counter() - start
    passed = [t for t in verdict.trials if t.passed]
    when, clock = {}, 0.0
    for trial in verdict.trials:
        clock += trial.seconds
        if trial.passed:
            when[trial.evaluations] = clock
    return {
        "evaluations": verdict.best.evaluations if verdict.feasible else -1,
        "solver error": verdict.best.solver_error,
        "search s": seconds,
        "first s": min(when.values(), default=float("nan")),
        "eight s": when.get(8, float("nan")),
        "two s": when.get(2, float("nan")),
        "regret": sum(t.spent for t in verdict.trials) / max(1, sum(t.spent for t in passed)),
        "iterations": verdict.iterations,
    }


if __name__ == "__main__":
    typer.run(main)
