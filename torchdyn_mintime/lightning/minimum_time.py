"""Minimum-time training in a Trainer: eq. (13) and (14), by a weight or for a target loss."""

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from torchdyn_mintime.core import LearnableSpan, checks, named_spans, spans
from torchdyn_mintime.depth.target import LONGEST_WINDOW, TargetLoss
from torchdyn_mintime.lightning.base import Monitoring, gradient_scale, monitored

__all__ = ["MinimumTime"]

_log = logging.getLogger(__name__)


class MinimumTime(Monitoring):
    """Trains every NeuralODE in a Lightning module for minimum time, eq. (13).

    Each bare NeuralODE is wrapped in a :class:`LearnableSpan` before the training. With a ``weight``, the gradient of
    ``weight * (t_f - t0)`` is added to the times once for every optimizer step, however many backward passes lead to it:
    the training is that of ``loss + weight * span.duration``, with gradient accumulation, a last window of fewer
    batches, clipping and mixed precision too. A module with manual optimization calls ``manual_backward``. After the step,
    times are clipped by eq. (14). With a ``target``, a :class:`~torchdyn_mintime.depth.target.TargetLoss` finds the price of
    time and moves the times itself; at the end of the training the best feasible model is given back.

    Args:
        weight: the price of time, in units of loss per unit of time; 0 lets t_f follow the loss alone. Default 1, where
            no target is given.
        target: the mean loss of an epoch to reach, instead of a weight. Of the last 50 steps, where an epoch has more.
        monitor: with a target, the logged metric that is held against it; None is the loss of an optimizer step,
            averaged over the ranks: the mean of an accumulation, or with manual optimization the sum of the losses that
            ``manual_backward`` was given. A metric that the validation logs is held against the target after each
            validation, for the model that was validated; until the first one t_f stays as it is.

    Attributes:
        price: with a target, the TargetLoss, once training has begun.

    Raises:
        ValueError: a weight that is negative or not finite, a target that is not positive, or both given.

    Warns:
        UserWarning: t_f of a span is frozen, or the optimizer decays it.

    Logs:
        ``t_f`` and ``nfe`` (with the span's name where there are several), at every step that the trainer logs and at the
        end of every epoch; with a target ``time_weight`` too.

    Example:
        >>> trainer = pl.Trainer(callbacks=[MinimumTime(weight=0.1)], logger=False, enable_checkpointing=False,
        ...                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    """

    def __init__(self, weight: float | None = None, *, target: float | None = None, monitor: str | None = None):
        super().__init__()
        if weight is not None and target is not None:
            raise ValueError(f"give a weight or a target, not both; got weight={weight!r} and target={target!r}")
        self.monitor = checks.text(monitor, "monitor")
        if monitor is not None and target is None:
            raise ValueError(f"monitor={monitor!r} is held against a target; give target= too")
        self.weight = 1.0 if weight is None else checks.number(weight, "weight", least=0)
        self.target = None if target is None else checks.positive(target, "target")
        self.price: TargetLoss | None = None
        self._unpriced: list[tuple[nn.Parameter, float]] = []
        self._epochs, self._said = 0, False

    def begin(self) -> None:
        super().begin()
        self.price = None
        self._epochs, self._said = 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that the times will be trained and not decayed; with a target, begins to find the price of time."""
        super().on_train_start(trainer, pl_module)
        for name, span in named_spans(pl_module):
            if not any(time.requires_grad for time in (span.t_f, span.t0)):
                warnings.warn(
                    f"t_f of {name or 'the span'} is frozen, and stays at {span.t_f.item():g} whatever MinimumTime is told; "
                    "call span.t_f.requires_grad_() before the training if it is to be learned",
                    stacklevel=2,
                )
        if self.target is None:
            self._check_optimizers(trainer, pl_module)
            return
        # An epoch that nobody knows the length of counts as one of many steps, and so does one that is longer.
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        self.price = TargetLoss(pl_module, self.target, window=max(1, min(LONGEST_WINDOW, math.ceil(min(steps, 1e6)))))
        loaded = self._take_loaded()
        if state := loaded.get("price"):
            self.price.load_state_dict(state)
            self._validated = loaded.get("validated", False)

    @staticmethod
    def _check_optimizers(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
        for name, span in named_spans(pl_module):
            owners = [g for g in groups if any(p is span.t_f for p in g["params"])]
            if span.t_f.requires_grad and not owners:
                raise MisconfigurationException(
                    f"t_f of {name or 'the span'} is in no optimizer; give it all of self.parameters(), or "
                    "parameter_groups(self, lr=...), in configure_optimizers"
                )
            if any(g.get("weight_decay") for g in owners):
                warnings.warn(
                    f"the optimizer decays t_f of {name or 'the span'} by weight_decay="
                    f"{[g['weight_decay'] for g in owners]}, a price of time that nobody set; "
                    "use torchdyn_mintime.parameter_groups in configure_optimizers",
                    stacklevel=2,
                )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Remembers the loss of every backward, and which times have no gradient yet."""
        super().on_before_backward(trainer, pl_module, loss)
        if self.price is not None:
            self._losses.append(loss.item() / gradient_scale(trainer))
        else:
            # Spans over one flow share their times, which are priced once.
            self._unpriced = list(dict(pair for span in spans(pl_module) for pair in self._slopes(span)).items())

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the gradient of eq. (13)'s second term, where the gradient began with this backward.

        A gradient that was there before has it already, whoever accumulates: Lightning, or a training_step that calls
        ``manual_backward`` more than once. Whoever clears it, as between the two passes of SAM, begins a new one.
        """
        scale = gradient_scale(trainer)
        for time, slope in self._unpriced:
            time.grad = torch.zeros_like(time) if time.grad is None else time.grad
            time.grad += scale * slope
        self._unpriced = []

    def _slopes(self, span: LearnableSpan) -> Iterator[tuple[nn.Parameter, float]]:
        """Yields the times that have no gradient yet, each with what the price of time adds to it."""
        for time, slope in ((span.t_f, self.weight), (span.t0, -self.weight)):
            if isinstance(time, nn.Parameter) and time.requires_grad and (time.grad is None or not time.grad.any()):
                yield time, slope

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        """With a target: moves the times and their price, by the gradients of the whole accumulation."""
        if self.price is None or not self._losses:
            return
        times = [time for span in spans(pl_module) for time in (span.t_f, span.t0)]
        if all(time.grad is None for time in times):  # losses without a time in them, as of a second network
            self._losses.clear()
            return
        owners = [
            o for o in trainer.optimizers if any(p is t for g in o.param_groups for p in g["params"] for t in times)
        ]
        if owners and optimizer not in owners:  # it is the turn of the weights alone
            return
        # By hand, what was given to backward adds up; else Lightning has divided each loss by those it accumulates.
        scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else len(self._losses)
        losses = [scale * loss for loss in self._losses]
        # A metric of the validation is known for few models. The losses follow it in between (TargetLoss.judge).
        value = monitored(trainer, pl_module, None if self._validated else self.monitor, losses)
        self._losses.clear()
        if value is None:
            # A metric of the epoch's end, in the first epoch: the optimizer must not move the times instead.
            for span in spans(pl_module):
                span.t_f.grad = span.t0.grad = None
        else:
            self.price.step(value)

    def validated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With a target for a metric of the validation: holds it against the target."""
        if self.price is not None and (value := monitored(trainer, pl_module, self.monitor, [])) is not None:
            self.price.judge(value)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Clips by eq. (14), and logs."""
        for span in spans(pl_module):
            span.clip_()
        self._log_spans(pl_module)
        if self.price is not None and self.price.weight is not None:
            pl_module.log("time_weight", self.price.weight)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees whether the epochs before have logged the metric."""
        if self._epochs:
            self._look_for_metric(trainer)
        self._epochs += 1

    def _look_for_metric(self, trainer: pl.Trainer) -> None:
        missing = self.monitor is not None and not self._awaits_validation and self._metric(trainer) is None
        if missing and not self._said:
            self._said = True
            warnings.warn(
                f"monitor={self.monitor!r} was not logged yet, so that t_f does not move; logged were "
                f"{sorted(trainer.callback_metrics)}",
                stacklevel=2,
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With a target: gives back the best feasible model, and says so."""
        self._look_for_metric(trainer)
        if self.price is not None and self.price.restore_best():
            _log.info("the target loss %g was met: %s", self.price.target, self.price.best)

    def state_dict(self) -> dict[str, Any]:
        """Returns the price of time and the best model, for a checkpoint."""
        if self._loaded or self.price is None:
            return self._loaded
        return {"price": self.price.state_dict(), "validated": self._validated}
