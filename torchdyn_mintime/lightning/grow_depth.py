"""Algorithm 2 in a Trainer: t_f grows until a metric is at its threshold."""

import logging
import math
import warnings
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from torchdyn_mintime.core import checks, named_spans
from torchdyn_mintime.depth.growth import DepthGrowth
from torchdyn_mintime.depth.rollback import DivergedError, Rollback, Snapshot
from torchdyn_mintime.lightning import ranks
from torchdyn_mintime.lightning.base import Monitoring, loss_of, monitored

__all__ = ["GrowDepth"]

_log = logging.getLogger(__name__)


class GrowDepth(Monitoring):
    """Grows t_f until a metric is at its threshold, then stops the training: the second stage of Algorithm 2.

    Once an epoch the metric is looked at, averaged over all ranks so that they decide the same. A metric that explodes
    sends the training back to the last state that was good, with half the learning rates, also those that a scheduler starts
    from (its ``base_lrs``; a OneCycleLR, CyclicLR or SequentialLR goes on as it was). A solve that fails inside training_step
    ends the training with its IntegrationError. Where ``max_t_f`` was reached and the metric is still above the threshold,
    the training stops, says so, and the best model seen is given back.

    The mean training loss of an epoch says nothing of the model after its last step. So the model that is kept with it is
    that at the beginning of the epoch; with a metric that the validation logs, it is the model that was validated.

    No optimizer moves t_f meanwhile; after the training it requires a gradient again if it did before.

    Args:
        threshold: the metric at or below which t_f is deep enough.
        monitor: a metric that the module logs, once an epoch; None is training_step's loss, averaged over the epoch.
        increment, max_t_f, patience: those of :class:`~torchdyn_mintime.depth.growth.DepthGrowth`, counted in looks: epochs,
            or validations where the validation logs the metric.
        span: the name of the span that grows, where there are several.
        pretraining: so many epochs go by before the first look: stage one of Algorithm 2.
        rescue: whether an exploded metric is gone back from; else it is an error.

    Attributes:
        growth: the :class:`~torchdyn_mintime.depth.growth.DepthGrowth`, once training has begun.

    Raises:
        ValueError: a value that cannot be used, or a metric that is NaN from the start.

    Logs:
        ``t_f`` and ``nfe``, at every step that the trainer logs and at the end of every epoch; every growth and its reason
        on the ``torchdyn_mintime`` logger.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GrowDepth(threshold=0.01, patience=5)], logger=False, accelerator="cpu",
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    growth: DepthGrowth = None  # type: ignore[assignment]  # set before any hook of the training
    _rollback: Rollback | None = None

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
        super().__init__()
        self.threshold = checks.positive(threshold, "threshold")
        self.increment = None if increment is None else checks.positive(increment, "increment")
        self.max_t_f = None if max_t_f is None else checks.number(max_t_f, "max_t_f")
        self.patience = checks.count(patience, "patience", of=" of epochs")
        self.pretraining = checks.count(pretraining, "pretraining", of=" of epochs")
        self.monitor, self.span = checks.text(monitor, "monitor"), checks.text(span, "span")
        self.rescue = self._survives_nan = rescue
        self._name = self.monitor or "the training loss"
        self.begin()

    def begin(self) -> None:
        super().begin()
        self._rollback = None
        self._best, self._kept = math.inf, Snapshot()
        self._measured = Snapshot()  # what the metric speaks of: the model, and with a rescue its optimizers
        self._value: float | None = None  # of a metric of the validation, until it is looked at
        self._epochs = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps, and takes t_f from the optimizer before a strategy takes hold of the parameters."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        found = dict(named_spans(pl_module))
        name = next(iter(found)) if self.span is None and len(found) == 1 else self.span
        if name not in found:
            raise MisconfigurationException(
                f"there is no span named {name!r}; there are {sorted(found)}: say with span= which one grows"
            )
        self.growth = DepthGrowth(
            found[name], self.threshold, self.increment, max_t_f=self.max_t_f, patience=self.patience
        )
        self._undo.callback(self.growth.release)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads what a checkpoint held, now that the module's own state is loaded."""
        super().on_train_start(trainer, pl_module)
        if self.rescue and trainer.optimizers:
            self._rollback = Rollback(pl_module, trainer.optimizers, every=1)
        if loaded := self._take_loaded():
            self._best, self._epochs = loaded.get("best", math.inf), loaded.get("epochs", 0)
            self._kept.load_state_dict(loaded.get("kept"))
            self._measured.load_state_dict(loaded.get("measured"))
            self._losses[:], self._validated = loaded.get("losses", []), loaded.get("validated", False)
            self._value = loaded.get("value")
            if loaded.get("growth"):
                self.growth.load_state_dict(loaded["growth"])
            if self._rollback is not None and loaded.get("rescue"):
                self._rollback.load_state_dict(loaded["rescue"])
        trainer.should_stop = trainer.should_stop or self.growth.done

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins a new average of the loss, which will be that of the model as it is now."""
        self._losses.clear()
        if not self._validated:
            self._measure(pl_module)

    def _measure(self, pl_module: pl.LightningModule) -> None:
        """Keeps the model as it is now: the next metric is its own."""
        if self._rollback is not None:
            self._measured = self._rollback.take()
        else:
            self._measured = Snapshot()
            self._measured.take(pl_module)

    def validated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps the model that was validated."""
        self._value = monitored(trainer, pl_module, self.monitor, [])
        self._measure(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the loss to the epoch's average, and logs."""
        if (loss := loss_of(outputs)) is not None:
            # Lightning divides the loss it returns by the accumulated batches.
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(float(loss) * scale)
        self._log_spans(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the metric: grows, stops, or goes back."""
        super().on_train_epoch_end(trainer, pl_module)
        self._epochs += 1
        if self._validated and self._value is None:  # no validation in this epoch
            return
        if not self._measured:  # a checkpoint of an older version
            self._measure(pl_module)
        metric = self._value if self._validated else monitored(trainer, pl_module, self.monitor, self._losses)
        self._value = None
        if metric is None and self.monitor is not None and self._awaits_validation:
            return
        if metric is None:
            kind = "loss from training_step" if self.monitor is None else "such metric"
            raise MisconfigurationException(
                f"GrowDepth(monitor={self.monitor!r}) found no {kind}; logged were {sorted(trainer.callback_metrics)}"
            )
        try:
            if self._rollback is not None and self._rollback.look(metric, self._measured):
                _lower_schedules(trainer, self._rollback.factor)
                self.growth.restart()
                return
        except DivergedError as error:
            self._give_up(trainer, pl_module, str(error))
            return
        if self._epochs <= self.pretraining or self.growth.done:
            return
        if metric < self._best:
            self._best = metric
            self._kept = self._measured.of_model()
        self.growth.step(metric)
        if self.growth.done:
            _log.info("the threshold was met at t_f = %.6g; training stops", self.growth.span.t_f.item())
            trainer.should_stop = True
            finite = all(bool(p.detach().isfinite().all()) for p in pl_module.parameters())
            if ranks.mean(trainer, pl_module, float(finite)) < 1.0:  # the last step spoiled what had met the threshold
                self._measured.of_model().restore(pl_module)
        elif self.growth.exhausted:
            reached = f"t_f reached max_t_f = {self.growth.max_t_f:g}"
            self._give_up(trainer, pl_module, f"{reached} and {self._name} is {metric:.4g} > {self.threshold:g}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says so where the training ended before the threshold was met."""
        if self._epochs > self.pretraining and not (self.growth.done or trainer.should_stop):
            _log.warning("the training ended and %s never met the threshold: %r", self._name, self.growth)

    def _give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, why: str) -> None:
        trainer.should_stop = True
        best = f"; the best model seen ({self._name} {self._best:.4g}) is given back" if self._kept else ""
        warnings.warn(f"GrowDepth did not converge: {why}{best}", stacklevel=2)
        if self._kept:
            self._kept.restore(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Returns the growth's state, the last good state and the best model seen, for a checkpoint."""
        return self._loaded or {
            "growth": self.growth and self.growth.state_dict(),
            "rescue": self._rollback and self._rollback.state_dict(),
            "best": self._best,
            "kept": self._kept.state_dict(),
            "measured": self._measured.state_dict(),
            "losses": list(self._losses),
            "validated": self._validated,
            "value": self._value,
            "epochs": self._epochs,
        }


def _lower_schedules(trainer: pl.Trainer, factor: float) -> None:
    """Multiplies the rates that schedulers start from: one that computes its rates from these would undo a lower rate."""
    for config in trainer.lr_scheduler_configs:
        rates = getattr(config.scheduler, "base_lrs", None)
        if rates is not None:
            config.scheduler.base_lrs = [factor * rate for rate in rates]
