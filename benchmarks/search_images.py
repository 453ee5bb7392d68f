"""The search on images where the ODE has work to do: `python -m benchmarks.search_images --data FOLDER`.

The encoder is one convolution of 4 x 4 patches and the head a pooling and a linear layer, so that the network without its
ODE is poor. Printed is the front of the search beside vanilla training, a fixed solver of as many steps without any check,
and the network with its ODE skipped.
"""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torchdyn_mintime as tm
from benchmarks.contestants import node_of
from torchdyn_mintime.core import exact_solves, solver_error
from torchdyn_mintime.experiments import datasets
from torchdyn_mintime.experiments.models import ConvField

READERS = {"mnist": datasets.mnist, "fashion-mnist": datasets.fashion_mnist, "cifar10": datasets.cifar10}


class Classifier(nn.Module):
    """Patches, a neural ODE, pooling, a linear layer."""

    def __init__(self, channels: int, width: int, steps: int | None, solver: str = "rk4"):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 4, 4)
        self.ode = node_of(ConvField(width), solver=solver) if steps else None
        if self.ode is not None:
            self.ode.t_span = torch.linspace(0, 1, steps + 1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        z = self.patches(x)
        return self.head(z if self.ode is None else self.ode(z)[1][-1])


def main(
    data: Annotated[Path, typer.Option(help="folder of the images")],
    task: Annotated[str, typer.Option(help=", ".join(READERS))] = "mnist",
    seed: int = 0,
    subset: Annotated[int, typer.Option(help="training images")] = 10_000,
    width: int = 16,
    batch: int = 64,
    lr: float = 0.005,
    iterations: Annotated[int, typer.Option(help="of the controls")] = 1600,
    vanilla: Annotated[int, typer.Option(help="iterations of vanilla at step .01")] = 100,
    solver_tol: float = 0.1,
) -> None:
    """Trains all of them on the same images, and prints accuracies and times."""
    torch.set_num_threads(1)
    found = READERS[task](seed, subset, datasets.Source(data))
    test = list(zip(found.x_test[:2000].split(250), found.y_test[:2000].split(250), strict=True))
    order = torch.randperm(len(found.x), generator=torch.Generator().manual_seed(seed))
    batches = [(found.x[i], found.y[i]) for i in order.split(batch) if len(i) == batch]

    def make(steps: int | None, solver: str = "rk4") -> Classifier:
        torch.manual_seed(seed)
        return Classifier(found.x.shape[1], width, steps, solver)

    def criterion(output: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(output, part[1])

    for name, steps, solver in (
        ("the ODE skipped", None, "rk4"),
        ("1 x euler, unchecked", 1, "euler"),
        ("2 x rk4, unchecked", 2, "rk4"),
    ):
        model = make(steps, solver)
        seconds = trained(model, batches, iterations, lr)
        print(f"{name}: {_judged(model, test)}, {seconds:.0f} s of training", flush=True)
    model, first = tm.wrap(make(100)), time.perf_counter()
    search = tm.Shallowest(solver_tol=solver_tol)
    verdict = search.fit(model, criterion, batches, lr=lr, progress=False)
    print(
        f"the search: {time.perf_counter() - first:.0f} s, {verdict.iterations} iterations of {batch}\n{verdict}",
        flush=True,
    )
    for trial in verdict.front:
        taken = search.take(evaluations=trial.evaluations)
        print(
            f"  {trial.label}: {_judged(taken, test)}; solver error on the test images {solver_error(taken, test[0][0]):.3f}"
        )
    bare = make(100)
    seconds = trained(bare, batches, vanilla, lr) / vanilla * verdict.iterations
    print(f"vanilla, step .01: {seconds:.0f} s for as many iterations as the search (from {vanilla})", flush=True)


def trained(model: nn.Module, batches: list[tuple[Tensor, Tensor]], iterations: int, lr: float) -> float:
    """Trains with Adam, and returns the seconds."""
    optimizer, start, done = torch.optim.Adam(model.parameters(), lr=lr), time.perf_counter(), 0
    while done < iterations:
        for x, y in batches[: iterations - done]:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            done += 1
    return time.perf_counter() - start


@torch.no_grad()
def _judged(model: nn.Module, test: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Returns the accuracy as it is and solved exactly, and the share of predictions that change."""
    right = exact = changed = n = 0
    spans = list(tm.spans(model)) if isinstance(model, nn.Module) else []
    model.eval()
    for x, y in test:
        own = model(x).argmax(1)
        right, n = right + int((own == y).sum()), n + len(y)
        if spans:
            with exact_solves(model):
                other = model(x).argmax(1)
            exact, changed = exact + int((other == y).sum()), changed + int((other != own).sum())
    if not spans:
        return f"{right / n:.1%}"
    return f"{right / n:.1%}, solved exactly {exact / n:.1%}, {changed / n:.1%} of predictions change"


if __name__ == "__main__":
    typer.run(main)
