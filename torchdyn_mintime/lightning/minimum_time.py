"""Minimum-time training in a Trainer: eq. (13) and (14), by a weight or for a target loss."""

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from torchdyn_mintime.core import checks, named_spans, spans
from torchdyn_mintime.depth.target import TargetLoss
from torchdyn_mintime.lightning.base import SpanCallback, monitored

__all__ = ["MinimumTime"]

_log = logging.getLogger(__name__)


class MinimumTime(SpanCallback):
    """Trains every NeuralODE in a Lightning module for minimum time, eq. (13).

    Each bare NeuralODE is wrapped in a :class:`LearnableSpan` in ``setup``. With a ``weight``, the gradient of
    ``weight * (t_f - t0)`` is added to the times after every backward pass, so that training is that of
    ``loss + weight * span.duration``, with gradient accumulation, clipping and mixed precision too; after the step,
    times are clipped by eq. (14). With a ``target``, a :class:`~torchdyn_mintime.depth.target.TargetLoss` finds the price of
    time and moves the times itself; at the end of the training the best feasible model is given back.

    Args:
        weight: the price of time, in units of loss per unit of time; 0 lets t_f follow the loss alone. Default 1, where
            no target is given.
        target: the loss to reach, instead of a weight.
        monitor: with a target, the logged metric that is held against it; None is training_step's loss, averaged over
            the ranks.

    Attributes:
        price: with a target, the TargetLoss, once training has begun.

    Raises:
        ValueError: a weight that is negative or not finite, a target that is not positive, or both given.

    Logs:
        ``t_f`` and ``nfe`` (with the span's name where there are several); with a target ``time_weight`` too.

    Example:
        >>> trainer = pl.Trainer(callbacks=[MinimumTime(weight=0.1)], logger=False, enable_checkpointing=False,
        ...                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    """

    def __init__(self, weight: float | None = None, *, target: float | None = None, monitor: str | None = None):
        super().__init__()
        if weight is not None and target is not None:
            raise ValueError(f"give a weight or a target, not both; got weight={weight!r} and target={target!r}")
        if monitor is not None and target is None:
            raise ValueError(f"monitor={monitor!r} is held against a target; give target= too")
        self.weight = 1.0 if weight is None else checks.number(weight, "weight", least=0)
        self.target = None if target is None else checks.positive(target, "target")
        self.monitor = monitor
        self.price: TargetLoss | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that the times will be trained and not decayed; with a target, begins to find the price of time."""
        super().on_train_start(trainer, pl_module)
        if self.target is None:
            self._check_optimizers(trainer, pl_module)
            return
        self.price = TargetLoss(pl_module, self.target)
        if state := self._take_loaded().get("price"):
            self.price.load_state_dict(state)

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
        """Remembers the loss of every batch of an accumulation."""
        super().on_before_backward(trainer, pl_module, loss)
        if self.price is not None:
            self._losses.append(loss.item() / _loss_scale(trainer, pl_module))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the gradient of eq. (13)'s second term."""
        if self.target is None:
            price = self.weight * _loss_scale(trainer, pl_module)
            slopes = [pair for span in spans(pl_module) for pair in ((span.t_f, price), (span.t0, -price))]
            for time, slope in slopes:
                if time.requires_grad:
                    time.grad = torch.zeros_like(time) if time.grad is None else time.grad
                    time.grad += slope

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        """With a target: moves the times and their price, by the gradients of the whole accumulation."""
        if self.price is None or not self._losses or all(span.t_f.grad is None for span in spans(pl_module)):
            return
        # A metric of the epoch's end is not logged before it.
        if (value := monitored(trainer, pl_module, self.monitor, self._losses)) is not None:
            self._losses.clear()
            self.price.step(value)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Clips by eq. (14), and logs."""
        for span in spans(pl_module):
            span.clip_()
        self._log_spans(pl_module)
        if self.price is not None and self.price.weight is not None:
            pl_module.log("time_weight", self.price.weight)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With a target: gives back the best feasible model, and says so."""
        if self.price is not None and self.price.restore_best():
            _log.info("the target loss %g was met: %s", self.price.target, self.price.best)

    def state_dict(self) -> dict[str, Any]:
        """Returns the price of time and the best model, for a checkpoint."""
        return self._loaded or ({} if self.price is None else {"price": self.price.state_dict()})


def _loss_scale(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """Returns what Lightning has multiplied the loss by before backward."""
    scale = 1.0 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scale if scaler is None else scale * scaler.get_scale()
