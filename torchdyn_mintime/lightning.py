"""Lightning callbacks: thin adapters that put the paper's training into a Trainer, with no change to the module.

Import ``pytorch_lightning`` beside this, not ``lightning.pytorch``: torchdyn's NeuralODE is of the former family.
"""

import logging
import math
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from torchdyn_mintime.growth import DepthGrowth, Rescue
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import has_bare, named_spans, wrap

__all__ = ["GrowDepth", "MinimumTime"]

_log = logging.getLogger(__name__)


class _SpanCallback(pl.Callback):
    """What callbacks over spans share: wrapping before optimizers are made, and the logged figures."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps every bare NeuralODE, before the optimizers are made and a checkpoint is loaded."""
        if isinstance(pl_module, LearnableSpan):
            return
        if isinstance(pl_module, nn.Module) and has_bare(pl_module):
            wrap(pl_module)
        elif not self._spans(pl_module):
            raise MisconfigurationException(
                f"{type(self).__name__} found no NeuralODE in {type(pl_module).__name__}; keep it as an attribute, in an "
                "nn.Sequential or an nn.ModuleList, where it is registered as a submodule"
            )

    @staticmethod
    def _spans(pl_module: pl.LightningModule) -> list[tuple[str, LearnableSpan]]:
        return list(named_spans(pl_module))

    def _log(self, pl_module: pl.LightningModule) -> None:
        found = self._spans(pl_module)
        for name, span in found:
            suffix = f"/{name}" if len(found) > 1 else ""
            pl_module.log(f"t_f{suffix}", span.t_f.detach(), prog_bar=True)
            pl_module.log(f"nfe{suffix}", float(span.nfe), prog_bar=True)


class MinimumTime(_SpanCallback):
    """Minimum-time training, eq. (13), of every NeuralODE in a Lightning module.

    Each bare NeuralODE is wrapped in a :class:`LearnableSpan` in ``setup``. After every backward pass the gradient of
    ``weight * (t_f - t0)`` is added to the times, so that training is that of ``loss + weight * span.duration``, with
    gradient accumulation, clipping and mixed precision too. After the step, times are clipped by eq. (14).

    Args:
        weight: the price of time, in units of loss per unit of time; 0 lets t_f follow the loss alone.

    Raises:
        ValueError: a weight that is negative or not finite.

    Logs:
        ``t_f`` and ``nfe`` (with the span's name where there are several).

    Example:
        >>> trainer = pl.Trainer(callbacks=[MinimumTime(weight=0.1)], logger=False, enable_checkpointing=False,
        ...                      enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    """

    def __init__(self, weight: float = 1.0):
        if not isinstance(weight, int | float):
            raise TypeError(f"weight must be a number; got {weight!r}")
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be finite and 0 or more; got {weight}")
        self.weight = float(weight)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that the times will be trained, and not decayed."""
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups]
        for name, span in self._spans(pl_module):
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

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the gradient of eq. (13)'s second term."""
        scale = 1.0
        if pl_module.automatic_optimization:
            scale /= trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            scale *= scaler.get_scale()
        for _, span in self._spans(pl_module):
            _add_gradient(span.t_f, self.weight * scale)
            _add_gradient(span.t0, -self.weight * scale)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Clips by eq. (14), and logs."""
        for _, span in self._spans(pl_module):
            span.clip_()
        self._log(pl_module)


def _add_gradient(time: torch.Tensor, value: float) -> None:
    if not time.requires_grad:
        return
    if time.grad is None:
        time.grad = torch.full_like(time, value)
    else:
        time.grad += value


class GrowDepth(_SpanCallback):
    """The second stage of Algorithm 2 in a Trainer: t_f grows until a metric is at its threshold, then training stops.

    Once an epoch the metric is looked at, averaged over all ranks so that they decide the same. A metric that explodes
    sends the training back to its last good epoch with half the learning rate. Where ``max_t_f`` was reached and the
    metric is still above the threshold, the training stops, says so, and the best model seen is given back.

    Args:
        threshold: the metric at or below which t_f is deep enough.
        monitor: a metric that the module logs, once an epoch; None is training_step's loss, averaged over the epoch.
        increment, max_t_f, patience: those of :class:`~torchdyn_mintime.growth.DepthGrowth`, counted in epochs.
        span: the name of the span that grows, where there are several.
        pretraining: so many epochs go by before the first look: stage one of Algorithm 2.
        rescue: whether an exploded metric is gone back from; else it is an error.

    Attributes:
        growth: the :class:`~torchdyn_mintime.growth.DepthGrowth`, once training has begun.

    Raises:
        ValueError: a value that cannot be used, or a metric that is NaN from the start.

    Logs:
        ``t_f`` and ``nfe``; every growth and its reason on the ``torchdyn_mintime`` logger.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GrowDepth(threshold=0.01, patience=5)], logger=False, accelerator="cpu",
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(
        self,
        threshold: float,
        monitor: str | None = None,
        increment: float | None = None,
        patience: int = 0,
        *,
        max_t_f: float | None = None,
        span: str | None = None,
        pretraining: int = 0,
        rescue: bool = True,
    ):
        for name, value in (("threshold", threshold), ("increment", increment)):
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive, finite number; got {value!r}")
        for name, count in (("patience", patience), ("pretraining", pretraining)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"{name} must be a whole number of epochs, 0 or more; got {count!r}")
        self.threshold, self.monitor, self.increment, self.patience = threshold, monitor, increment, patience
        self.max_t_f, self.span, self.pretraining, self.rescue = max_t_f, span, pretraining, rescue
        self.growth: DepthGrowth | None = None
        self._rescue: Rescue | None = None
        self._loaded: dict[str, Any] | None = None
        self._best = math.inf
        self._kept: dict[str, torch.Tensor] | None = None
        self._epochs = self._batches = 0
        self._sum = 0.0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes t_f from the optimizer, and goes on where a checkpoint was."""
        found = dict(self._spans(pl_module))
        if self.span is None and len(found) != 1:
            raise MisconfigurationException(
                f"there are {len(found)} spans, {sorted(found)}; say which one grows: span="
            )
        if self.span is not None and self.span not in found:
            raise MisconfigurationException(f"there is no span named {self.span!r}; there are {sorted(found)}")
        span = found[self.span] if self.span is not None else next(iter(found.values()))
        self.growth = DepthGrowth(span, self.threshold, self.increment, max_t_f=self.max_t_f, patience=self.patience)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads what a checkpoint held, now that the model's own state is loaded."""
        assert self.growth is not None
        if self._loaded is not None:
            self.growth.load_state_dict(self._loaded)
            self._loaded = None
        if self.rescue and trainer.optimizers:
            self._rescue = Rescue(pl_module, trainer.optimizers[0], every=1)
            self._rescue.best = self._best
        if self.growth.done:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new average of the loss."""
        self._sum, self._batches = 0.0, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Adds the loss to the epoch's average, and logs."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None:
            # Lightning divides the loss it returns by the accumulated batches.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._sum += float(loss) * scale
            self._batches += 1
        self._log(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the metric: grow, stop, or go back."""
        growth = self.growth
        assert growth is not None
        self._epochs += 1
        metric = self._metric(trainer, pl_module)
        if self._rescue is not None and self._rescue.look(metric):
            return
        if self._epochs <= self.pretraining or growth.done:
            return
        if metric < self._best:
            self._best = metric
            self._kept = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        growth.step(metric)
        if growth.done:
            _log.info("the threshold was met at t_f = %.6g; training stops", growth.span.t_f.item())
            trainer.should_stop = True
        elif growth.exhausted:
            trainer.should_stop = True
            warnings.warn(
                f"GrowDepth did not converge: t_f reached max_t_f = {growth.max_t_f:g} and {self._name} is {metric:.4g} > "
                f"{self.threshold:g}; the best model seen ({self._name} {self._best:.4g}) is given back",
                stacklevel=2,
            )
            if self._kept is not None:
                pl_module.load_state_dict(self._kept)

    @property
    def _name(self) -> str:
        return self.monitor or "the training loss"

    def _metric(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        if self.monitor is None:
            if not self._batches:
                raise MisconfigurationException("training_step returned no loss; give GrowDepth a monitor=")
            value = torch.tensor(self._sum / self._batches, device=pl_module.device)
        else:
            if self.monitor not in trainer.callback_metrics:
                raise MisconfigurationException(
                    f"GrowDepth(monitor={self.monitor!r}) found no such metric; logged were {sorted(trainer.callback_metrics)}"
                )
            value = torch.as_tensor(trainer.callback_metrics[self.monitor]).to(pl_module.device)
        # One figure for all ranks: they would otherwise grow apart.
        return float(trainer.strategy.reduce(value.detach(), reduce_op="mean"))

    def state_dict(self) -> dict[str, Any]:
        """The growth's state and the best model seen, for the checkpoint."""
        growth = self._loaded if self.growth is None or self._loaded is not None else self.growth.state_dict()
        return {"growth": growth, "best": self._best, "kept": self._kept, "epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: the span is not there yet, or not loaded."""
        self._loaded, self._best = state_dict.get("growth"), state_dict.get("best", math.inf)
        self._kept, self._epochs = state_dict.get("kept"), state_dict.get("epochs", 0)
