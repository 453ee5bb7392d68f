"""What a training is given and what it shows of itself: to who decides the depth, and to the terms of the loss."""

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
        span_lr: learning rate of the times; None is the method's, else ``lr``: one group as in the paper's code.
        weight: the price of time, eq. (13).
        start: where a learned t_f begins; None is the end of the template.
        target: the training loss that growth, search and TargetLoss are to reach; None lets the search find its own.
        solver_tol: the solver error that a search allows, of the displacement.
        decay: of every learning rate: the factor at each iteration, or with a cosine its end over its start.
        schedule: "exponential", "cosine", or "steps": the paper's three decays by ten after 60, 100 and 140 of 160 epochs.
        batch: samples per iteration; None is all of them.
        optimizer: "adam", "adamw" with a weight decay of 1e-5, or "sgd" with momentum .9.
        subset: how many training images; None is all.
        width: channels of the convolutional network.
        test: samples that a flow is judged on.
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
        """Returns the same with those changes that are not None."""
        return replace(self, **{key: value for key, value in changes.items() if value is not None})

    def rate_factor(self, iteration: int) -> float:
        """Returns the learning rate after so many iterations over the first one."""
        if self.schedule == "cosine":
            return self.decay + (1 - self.decay) * (1 + math.cos(math.pi * iteration / self.iterations)) / 2
        if self.schedule == "steps":
            return 0.1 ** sum(iteration >= part * self.iterations for part in (0.375, 0.625, 0.875))
        return self.decay**iteration


@dataclass
class History:
    """One entry per iteration.

    Attributes:
        seconds: since the start, of this model's own iterations.
        loss: the terminal loss of the batch, without other terms.
        accuracy: of the batch, before the step; empty where there are no labels.
        t_f: after the step.
        nfe: evaluations of the field in the step.
        first_stage: iterations of the first of two stages, of a search those until its first true model; None where there
            is one stage, or no such model.
        searched: whether it is a search's: its target is met by a true model alone.
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
        """Seconds of all iterations."""
        return self.seconds[-1] if self.seconds else 0.0

    def figures(self, target: float | None) -> dict[str, Any]:
        """Returns the seconds of the first of two stages and until the target, and where those of inference will stand."""
        first = None if self.first_stage is None else ([0.0, *self.seconds][: self.first_stage + 1])[-1]
        met = first if self.searched else self.to_target(target)
        return {"inference": None, "pretraining": first, "to_target": met}

    def to_target(self, loss: float | None = 0.01, accuracy: float = 1.0) -> float | None:
        """Returns the seconds until the batch's loss and accuracy first met the target; None if they never did."""
        if loss is None:
            return None
        for before, own_loss, own_accuracy in zip([0.0, *self.seconds], self.loss, self.accuracy, strict=False):
            if own_loss <= loss and own_accuracy >= accuracy:
                return before  # they are those of the parameters before this iteration's update
        return None


@dataclass
class Step:
    """What a term of the loss sees of an iteration.

    Attributes:
        z0: initial states ``[batch, ...]``.
        y: labels ``[batch]``.
        t_eval, sol: the solve, ``[points]`` and ``[points, batch, ...]``; its first point alone where the method trains
            without one.
        iteration: counted from 0.
    """

    z0: Tensor
    y: Tensor
    t_eval: Tensor
    sol: Tensor
    iteration: int


class Context(Protocol):
    """A training, as who decides the depth and the judge see it.

    Attributes:
        model: the network with its NeuralODE, or its span.
        optimizer: that of the network, whose learning rates follow the settings.
        settings, batches: how and on what it is trained.
        history: what happened so far.
    """

    model: models.Model
    optimizer: Any
    settings: Settings
    batches: datasets.Batches
    history: History

    def loss_of_batch(self) -> Tensor:
        """Returns the terminal loss of the present batch once more."""

    def loss_again(self) -> Tensor:
        """Returns the terminal loss with the model as it is now, on more than a batch."""

    def renew_optimizer(self) -> None:
        """Begins with a fresh optimizer, at the first learning rate."""
