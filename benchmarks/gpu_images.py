"""Trains on the paper's images at full size: by the search, and vanilla for the same time."""

import gzip
import io
import lzma
from collections.abc import Callable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torchdyn_mintime as tm
from benchmarks.contestants import node_of
from benchmarks.timing import Row
from torchdyn_mintime import diagnostics
from torchdyn_mintime.experiments.models import conv_parts

__all__ = ["compare_trainings"]

SMOOTHING = 0.95
"""Smoothing of the training loss: the weight of the value before, in each iteration."""
MEASURED = 1024
"""Number of training images on which the search compares the loss with its target."""

Curve = list[tuple[float, float]]
"""(seconds, smoothed training loss) of every iteration."""


def compare_trainings(part: Row, folder: Path, device: torch.device, seconds: float, batch: int, tiny: bool) -> None:
    """Searches from an untrained model on, and trains vanilla with steps of 0.01 for the same time.

    Args:
        part: the results are added to its ``rows`` and ``notes``.
        folder: folder of the images; its name says which they are.
        device: where to train.
        seconds: duration of the search, and of vanilla.
        batch: images of an iteration.
        tiny: few images, a narrow network, and vanilla with steps of 0.1.
    """
    few, exactly, width, steps = (256, 64, 8, 10) if tiny else (None, 2000, 64, 100)
    x, y, x_test, y_test = (tensor.to(device) for tensor in read_images(folder, few))
    mean, deviation = x.float().mean((0, 2, 3), keepdim=True), x.float().std((0, 2, 3), keepdim=True)
    x, x_test, y, y_test = (x - mean) / deviation, (x_test - mean) / deviation, y.long(), y_test.long()

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (batch,), device=device)
        return x[chosen], y[chosen]

    def measure() -> tuple[Tensor, Tensor]:
        output = model(x[:MEASURED])
        return cross_entropy(output, y[:MEASURED]), output.argmax(1)

    def add(what: str, trained: nn.Module, curve: Curve, **figures: object) -> None:
        row = {"model": what, "iterations": len(curve), "ms an iteration": 1e3 * curve[-1][0] / len(curve)}
        part["rows"].append(row | figures | judged(trained, x_test, y_test, exactly))

    torch.manual_seed(0)
    model = tm.wrap(Classifier(x.shape[1], width, 4)).to(device)
    search = tm.Shallowest(budget=seconds)
    search.batches_seen_together = max(1, MEASURED // batch)
    path = train(model, draw, seconds, search, measure)
    verdict = search.finish()
    part["notes"].append(f"the search {'ended' if search.done else 'was stopped'}: {verdict}")
    for trial in verdict.front:
        spent = sum(t.seconds for t in verdict.trials[: verdict.trials.index(trial) + 1])
        figures = {"seconds": spent, "loss": trial.loss, "loss, solved exactly": trial.reference_loss}
        add(f"the search, {trial.label}", search.take(evaluations=trial.evaluations), path, **figures)

    torch.manual_seed(0)
    vanilla = Classifier(x.shape[1], width, steps).to(device)
    curve = train(vanilla, draw, seconds)
    spent, loss = curve[-1]
    when = next((when for when, value in path if value <= loss), None)
    saved = "" if when is None else f" after {when:.1f} s instead of {spent:.1f} s, {1 - when / spent:.0%} saved"
    part["notes"].append(f"the search {'reaches' if saved else 'does not reach'} vanilla's last training loss{saved}")
    add(f"vanilla, step {1 / steps:g}", tm.wrap(vanilla).to(device), curve, seconds=spent, loss=loss)


def read_images(folder: Path, few: int | None) -> list[Tensor]:
    """Returns training images and labels, then test images and labels. Images are bytes ``[n, channels, height, width]``."""
    found = []
    if folder.name == "cifar10-jpeg75":
        packed = np.load(folder / "cifar10-jpeg75.npz")
        head, body, offset = packed["head"].tobytes(), packed["body"], packed["offset"]

        def decoded(i: int) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(head + body[offset[i] : offset[i + 1]].tobytes())))

        for test in (False, True):
            rows = np.flatnonzero(packed["test"] == test)[:few]
            with ThreadPool() as pool:
                pixels = np.stack(pool.map(decoded, rows))
            found += [torch.from_numpy(pixels).movedim(3, 1), torch.from_numpy(packed["label"][rows])]
        return found
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        path = folder / f"{name}-ubyte.gz"
        unpack, path = (gzip.decompress, path) if path.exists() else (lzma.decompress, path.with_suffix(".xz"))
        entries = np.frombuffer(unpack(path.read_bytes()), np.uint8, offset=16 if "images" in name else 8)
        found.append(torch.from_numpy(entries.reshape((-1, 1, 28, 28) if "images" in name else -1)[:few].copy()))
    return found


class Classifier(nn.Module):
    """The paper's network for images, as a user of torchdyn writes it, with equal steps of rk4."""

    def __init__(self, channels: int, width: int, steps: int):
        super().__init__()
        parts = conv_parts(channels, width)
        self.before, self.node, self.head = parts["before"], node_of(parts["field"]), parts["head"]
        self.node.t_span = torch.linspace(0, 1, steps + 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.node(self.before(x))[1][-1])


def train(
    model: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    seconds: float,
    search: tm.Shallowest | None = None,
    measure: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> Curve:
    """Trains for ``seconds``, or until the search ends, and returns the curve of the loss."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    if search is not None:
        search.start(model, optimizer)
    model.train()
    curve: Curve = []
    start = perf_counter()
    while (spent := perf_counter() - start) < seconds and not (search and search.done):
        x, y = draw()
        closure = partial(_loss, model, x, y)
        loss = closure()
        optimizer.zero_grad()
        (loss if search is None else loss + search.penalty(closure)).backward()
        optimizer.step()
        value = loss.item()
        if search is not None:
            search.step(value, measure)
        curve.append((spent, SMOOTHING * curve[-1][1] + (1 - SMOOTHING) * value if curve else value))
    return curve


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y)


def judged(model: nn.Module, x: Tensor, y: Tensor, few: int) -> Row:
    """Returns the figures of a trained model on the test set, and on its first images with the ODE solved exactly."""
    exact: list[Tensor] = []

    def keep(output: Tensor, target: Tensor) -> Tensor:
        exact.append(output.argmax(1))
        return cross_entropy(output, target)

    model.eval()
    with torch.no_grad():
        own = torch.cat([model(images).argmax(1) for images in x.split(1000)])
    evaluations = sum(span.nfe for span in tm.spans(model))
    diagnostics.solved_exactly(model, [(x[:few], y[:few])], keep)
    return {
        "evaluations": evaluations,
        "accuracy": (own == y).float().mean().item(),
        f"accuracy on {few}": (own[:few] == y[:few]).float().mean().item(),
        "the same, solved exactly": (exact[0] == y[:few]).float().mean().item(),
        "predictions changed": (exact[0] != own[:few]).float().mean().item(),
        "solver error": diagnostics.solver_error(model, x[:few]),
    }
