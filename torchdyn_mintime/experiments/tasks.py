"""What is trained: the data, the network and the published settings of each task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from torchdyn_mintime.experiments import data, images
from torchdyn_mintime.experiments.convolutional import conv_parts
from torchdyn_mintime.experiments.images import Source
from torchdyn_mintime.experiments.models import Classifier, mlp, span_of

__all__ = ["TASKS", "Settings", "Task"]


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Attributes:
        iterations: optimizer steps.
        lr: learning rate of the network.
        span_lr: learning rate of the times; None is ``lr``, one group as in the paper's code.
        weight: the price of time, eq. (13).
        start: where a learned t_f begins; None is the end of the template.
        target: the training loss that growth, search and TargetLoss are to reach.
        decay: factor on every learning rate at each iteration.
        batch: samples per iteration; None is all of them.
        optimizer: "adam", or "sgd" with momentum .9 and the paper's three decays by ten.
        subset: how many training images; None is all.
        width: channels of the convolutional network.
        seed: of the data, the initialisation and the batches.
    """

    iterations: int
    lr: float
    span_lr: float | None = None
    weight: float = 1.0
    start: float | None = None
    target: float = 0.01
    decay: float = 1.0
    batch: int | None = None
    optimizer: str = "adam"
    subset: int | None = None
    width: int = 64
    seed: int = 0

    def but(self, **changes: Any) -> "Settings":
        """The same with those changes that are not None."""
        return replace(self, **{key: value for key, value in changes.items() if value is not None})


@dataclass(frozen=True)
class Task:
    """A data set with its network.

    Attributes:
        title: as printed.
        load: the data, from the settings (seed and subset) and where images come from.
        parts: the network's parts around and in the NeuralODE: keywords of ``Classifier``, made anew at each call.
        settings: the published ones, or ours where there are none.
        t_span: the points of the vanilla solve.
        node: options of the NeuralODE, where they are not torchdyn's rk4.
        published: t_f in the paper's tables, by method.
    """

    title: str
    load: Callable[[Settings, Source], data.Data]
    parts: Callable[[Settings], dict[str, nn.Module]]
    settings: Settings
    t_span: Tensor = field(default_factory=lambda: span_of(100))
    node: Mapping[str, Any] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)

    def model(self, settings: Settings, t_span: Tensor | None = None, **node: Any) -> Classifier:
        """A new network with torchdyn's own NeuralODE; its initialisation follows torch's seed."""
        own = self.t_span if t_span is None else t_span
        return Classifier(t_span=own, **self.parts(settings), **{**self.node, **node})


def _digits(settings: Settings) -> dict[str, nn.Module]:
    return {"field": mlp(32, 64, 32), "before": nn.Linear(64, 32), "head": nn.Linear(32, 10)}


_ANNULI = Task(
    "concentric annuli",
    lambda settings, source: data.annuli(settings.seed),
    lambda settings: {"field": mlp(3, 32, 3)},
    Settings(iterations=800, lr=0.01, decay=0.999),
    published={"minimum-time": 0.0819, "convergence-rate": 0.09, "combined": 0.0687},
)

# 160 epochs of 60,000 or 50,000 images in batches of 128. The paper gives no weight for MNIST and Fashion-MNIST.
_IMAGES = Settings(iterations=75_040, lr=0.1, span_lr=0.01, weight=1.0, batch=128, optimizer="sgd")

TASKS: dict[str, Task] = {
    "moons": Task(
        "two moons",
        lambda settings, source: data.moons(settings.seed),
        lambda settings: {"field": mlp(2, 16, 2)},
        Settings(iterations=500, lr=0.1, span_lr=0.01),
        published={"minimum-time": 0.0904, "convergence-rate": 0.10},
    ),
    "moons-augmented": Task(
        "two moons, one zero added",
        lambda settings, source: data.augmented(data.moons(settings.seed)),
        lambda settings: {"field": mlp(3, 16, 3)},
        Settings(iterations=300, lr=0.03, span_lr=0.01),
        published={"minimum-time": 0.0904, "convergence-rate": 0.10},
    ),
    "annuli": _ANNULI,
    "annuli-adaptive": Task(
        "concentric annuli, adaptive solver",
        _ANNULI.load,
        _ANNULI.parts,
        _ANNULI.settings,
        t_span=span_of(1),
        node={"solver": "dopri5"},
        published={"minimum-time": 0.0724},
    ),
    "digits": Task(
        "handwritten digits",
        lambda settings, source: data.digits(settings.seed),
        _digits,
        Settings(iterations=400, lr=0.03, span_lr=0.01, weight=0.5, target=0.05, decay=0.995, batch=128),
    ),
    "mnist": Task(
        "MNIST",
        lambda settings, source: images.mnist(settings.seed, settings.subset, source),
        lambda settings: conv_parts(1, settings.width),
        _IMAGES,
        published={"minimum-time": 0.0343},
    ),
    "fashion-mnist": Task(
        "Fashion-MNIST",
        lambda settings, source: images.fashion_mnist(settings.seed, settings.subset, source),
        lambda settings: conv_parts(1, settings.width),
        _IMAGES,
        published={"minimum-time": 0.0564},
    ),
    # For half an hour of one CPU core, vanilla included: the best of a few settings tried with four steps of rk4.
    "fashion-mnist-cpu": Task(
        "Fashion-MNIST, 10,000 images, 16 channels",
        lambda settings, source: images.fashion_mnist(settings.seed, settings.subset, source),
        lambda settings: conv_parts(1, settings.width),
        Settings(
            iterations=800,
            lr=0.02,
            span_lr=0.01,
            weight=0.1,
            target=0.65,
            decay=0.994,
            batch=64,
            subset=10_000,
            width=16,
        ),
    ),
    "cifar10": Task(
        "CIFAR-10",
        lambda settings, source: images.cifar10(settings.seed, settings.subset, source),
        lambda settings: conv_parts(3, settings.width),
        Settings(iterations=62_560, lr=0.1, span_lr=0.01, weight=0.1, batch=128, optimizer="sgd"),
        published={"minimum-time": 0.3606},
    ),
}
