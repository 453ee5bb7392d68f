"""The settings and the history of a training, and what it shows to the terms of its loss and to its driver."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from torchdyn_mintime.experiments import datasets, models

__all__ = ["Context", "History", "Settings", "Step"]


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Attributes:
        iterations: optimizer steps.
        lr: learning rate of the network.
        span_lr: learning rate of the times. None: that of the method, or else ``lr``, as in the paper's code.
        weight: the price of time, eq. (13), in loss per unit of time.
        start: the first value of a learned t_f; None: the end of the template.
        target: the training loss that growth, search and TargetLoss are to reach. None: a search finds its own.
        solver_tol: the solver error that a search allows, over the displacement.
        decay: of every learning rate. With the exponential schedule the factor at each iteration, with the cosine the last rate
            over the first.
        schedule: "exponential", "cosine", or "steps": the paper's three decays by ten after 60, 100 and 140 of 160 epochs.
        batch: samples per iteration; None: all of them.
        optimizer: "adam", "adamw" with a weight decay of 1e-5, or "sgd" with momentum 0.9.
        subset: the number of training images; None: all.
        width: the number of channels of the convolutional network.
        test: the number of samples that a flow is judged on.
        seed: of the data, the initialisation and the batches.
    """

    iterations: int
    lr: float
    span_lr: float | None = None
    weight: float = 1.0
    start: float | None = None
    target: float | None = 0.01
    solver_tol: float = 0.1
    decay: float = 1.0
    schedule: str = "exponential"
    batch: int | None = None
    optimizer: str = "adam"
    subset: int | None = None
    width: int = 64
    test: int = 20_000
    seed: int = 0

    def but(self, **changes: Any) -> "Settings":
        """Returns these settings with the changes that are not None."""
        return replace(self, **{key: value for key, value in changes.items() if value is not None})

    def rate_factor(self, iteration: int) -> float:
        """Returns the learning rate after ``iteration`` iterations, divided by the first one."""
        if self.schedule == "cosine":
            return self.decay + (1 - self.decay) * (1 + math.cos(math.pi * iteration / self.iterations)) / 2
        if self.schedule == "steps":
            return 0.1 ** sum(iteration >= part * self.iterations for part in (0.375, 0.625, 0.875))
        return self.decay**iteration


@dataclass
class History:
    """What was recorded in training. The lists have one entry per iteration.

    Attributes:
        seconds: time that this model's own iterations have taken since the start.
        loss: the terminal loss of the batch, without other terms.
        accuracy: of the batch, before the step; empty where there are no labels.
        t_f: after the step.
        nfe: evaluations of the field in the iteration.
        first_stage: the number of iterations of the first of two stages; of a search, until its first true model. None if there
            is one stage, or no such model.
        searched: whether this is a search, where only a true model meets the target.
    """

    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    t_f: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)
    first_stage: int | None = None
    searched: bool = False

    @property
    def total_seconds(self) -> float:
        """The seconds of all iterations."""
        return self.seconds[-1] if self.seconds else 0.0

    def figures(self, target: float | None) -> dict[str, Any]:
        """Returns the seconds of the first of two stages, those until the target, and an empty place for those of inference."""
        first = None if self.first_stage is None else ([0.0, *self.seconds][: self.first_stage + 1])[-1]
        met = first if self.searched else self.to_target(target)
        return {"inference": None, "pretraining": first, "to_target": met}

    def to_target(self, loss: float | None = 0.01, accuracy: float = 1.0) -> float | None:
        """Returns the seconds until the batch's loss and accuracy first met the target; None if they never did."""
        if loss is None:
            return None
        for before, own_loss, own_accuracy in zip([0.0, *self.seconds], self.loss, self.accuracy, strict=False):
            if own_loss <= loss and own_accuracy >= accuracy:
                return before  # loss and accuracy are those of the parameters before this iteration's update
        return None


@dataclass
class Step:
    """What a term of the loss gets of an iteration.

    Attributes:
        z0: initial states ``[batch, ...]``.
        y: labels ``[batch]``.
        t_eval, sol: the solve, ``[points]`` and ``[points, batch, ...]``. They have only the first point if the method trains
            without a solve.
        iteration: counted from 0.
    """

    z0: Tensor
    y: Tensor
    t_eval: Tensor
    sol: Tensor
    iteration: int


class Context(Protocol):
    """What a driver, which decides the depth, sees of a training.

    Attributes:
        model: the network with its NeuralODE, or its span.
        optimizer: that of the network, whose learning rates follow the settings.
        settings, batches: how and on what the model is trained.
        history: what was recorded so far.
    """

    model: models.Model
    optimizer: Any
    settings: Settings
    batches: datasets.Batches
    history: History

    def loss_of_batch(self) -> Tensor:
        """Computes the terminal loss of the present batch again, and returns it."""

    def loss_again(self) -> Tensor:
        """Returns the terminal loss of the model as it is now, on a fixed set of training samples."""

    def renew_optimizer(self) -> None:
        """Makes a new optimizer, at the first learning rate."""
