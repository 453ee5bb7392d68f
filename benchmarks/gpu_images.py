"""The paper's images at full size: a model of four steps, the search for fewer, and vanilla for as long beside them."""

import gzip
import io
import lzma
import math
from collections.abc import Callable
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
"""Of the training loss: the weight of the past in an iteration."""
FIRST = 0.7
"""The first training's part of the seconds; the search has the rest."""
SLACK = 0.02
"""The search may give away this part of what the loss fell in the first training."""

Curve = list[tuple[float, float]]
"""(seconds, smoothed training loss) of every iteration."""


def compare_trainings(part: Row, folder: Path, device: torch.device, seconds: float, batch: int, tiny: bool) -> None:
    """Trains four steps of rk4, searches from there, and trains vanilla at step .01 for as long beside it.

    Args:
        part: ``rows`` and ``notes``, which what was found is added to.
        folder: of the images; its name says which they are.
        device: to train on.
        seconds: of the first training and the search together, and of vanilla.
        batch: images of an iteration.
        tiny: few images, a narrow network, and vanilla at step .1.
    """
    few, exactly, width, steps = (256, 64, 8, 10) if tiny else (None, 2000, 64, 100)
    x, y, x_test, y_test = (tensor.to(device) for tensor in read_images(folder, few))
    mean, deviation = x.float().mean((0, 2, 3), keepdim=True), x.float().std((0, 2, 3), keepdim=True)
    x, x_test, y, y_test = (x - mean) / deviation, (x_test - mean) / deviation, y.long(), y_test.long()

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(x), (batch,), device=device)
        return x[chosen], y[chosen]

    @torch.no_grad()
    def measure() -> Tensor:
        return cross_entropy(model(x[:1024]), y[:1024])

    def add(what: str, trained: nn.Module, curve: Curve) -> None:
        spent, loss = curve[-1]
        row = {"model": what, "seconds": spent, "iterations": len(curve), "ms an iteration": 1e3 * spent / len(curve)}
        part["rows"].append(row | {"training loss": loss} | judged(trained, x_test, y_test, exactly))

    torch.manual_seed(0)
    model = tm.wrap(Classifier(x.shape[1], width, 4)).to(device)
    for span in tm.spans(model):
        span.t_f.requires_grad_(False)
    before = measure().item()
    first = train(model, draw, FIRST * seconds)
    add("4 steps of rk4", model, first)
    reached = measure().item()
    search = tm.Shallowest(target=reached + SLACK * abs(before - reached))
    path = train(model, draw, (1 - FIRST) * seconds, search, measure)
    part["notes"].append(f"the search {'ended' if search.done else 'was stopped'}: {search.finish()}")
    add("the search from there", model, path)

    torch.manual_seed(0)
    vanilla = Classifier(x.shape[1], width, steps).to(device)
    curve = train(vanilla, draw, seconds)
    spent, loss = curve[-1]
    when = next((when for when, value in first if value <= loss), math.nan)
    saved = f"{when:.1f} s instead of {spent:.1f} s, {1 - when / spent:.0%} saved"
    part["notes"].append(f"4 steps of rk4 reach vanilla's last training loss after {saved}")
    add(f"vanilla, step {1 / steps:g}", tm.wrap(vanilla).to(device), curve)


def read_images(folder: Path, few: int | None) -> list[Tensor]:
    """Returns images ``[n, channels, height, width]`` of bytes and labels, for training and for the test."""
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
    """The paper's network for images, as a user of torchdyn writes it, with so many steps of rk4."""

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
    measure: Callable[[], Tensor] | None = None,
) -> Curve:
    """Trains for so many seconds, or until the search ends."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    if search is not None:
        search.start(model, optimizer)
    model.train()
    curve: Curve = []
    start = perf_counter()
    while (spent := perf_counter() - start) < seconds and not (search and search.done):
        x, y = draw()
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        (loss if search is None else loss + search.penalty()).backward()
        optimizer.step()
        value = loss.item()
        if search is not None:
            search.step(value, measure)
        curve.append((spent, SMOOTHING * curve[-1][1] + (1 - SMOOTHING) * value if curve else value))
    return curve


def judged(model: nn.Module, x: Tensor, y: Tensor, few: int) -> Row:
    """Returns what a trained model does on the test set, and on its first images with the ODE solved exactly."""
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
