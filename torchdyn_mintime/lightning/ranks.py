"""What the ranks of a training agree on.

A rank is one of the processes that train copies of one model (``devices`` of a Trainer). Ranks wait for each other: before
every backward, and at every figure that they share. A rank that ends alone, by an error or because its data end, would
leave the others waiting for good. Here it tells them, and all end with an error that says why.
"""

import contextlib
import math
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from torchdyn_mintime.numerics import IntegrationError

__all__ = ["EndTogether", "gather", "mean"]


def gather(trainer: pl.Trainer, pl_module: pl.LightningModule, value: float) -> list[float]:
    """Returns the figure of every rank, in the order of the ranks."""
    return trainer.strategy.all_gather(torch.tensor(value, device=pl_module.device)).reshape(-1).tolist()


def mean(trainer: pl.Trainer, pl_module: pl.LightningModule, value: float) -> float:
    """Returns the mean over the ranks. They would decide differently by their own figures."""
    return float(trainer.strategy.reduce(torch.tensor(value, device=pl_module.device), reduce_op="mean"))


class EndTogether(pl.Callback):
    """Ends a training on all ranks, where one of them cannot go on.

    That is when a loss is not finite, when ``training_step`` fails, and when the data of one rank end before those of the
    others. Where a trainer has several of these callbacks, the first one speaks for all.

    Raises:
        MisconfigurationException: the ranks have different numbers of batches.
        IntegrationError: a loss is not finite, or ``training_step`` failed on another rank.
    """

    _survives_nan = False
    """Whether a loss that is not finite is dealt with later, by all ranks alike."""
    _awaited = False
    """Whether the other ranks wait to hear from this one how its batch went."""
    _uncounted = False
    """Whether the number of batches in an epoch is known only at its end, as with an iterable data set."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the numbers of batches."""
        if self._speaks(trainer):
            counts = self._compare_batches(trainer, pl_module, float(trainer.num_training_batches))
            self._uncounted = math.inf in counts

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Compares whether this batch is the last one, where that was not known before."""
        speaks = self._speaks(trainer)
        if speaks and self._uncounted:
            # Before the forward: it may share buffers, and the rank whose data end here makes no next one.
            self._compare_batches(trainer, pl_module, 1.0 + batch_idx if trainer.is_last_batch else math.inf)
        self._awaited = speaks  # from here on, until the backward

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells the others that this rank had no batch at all. They wait at the start of their first one."""
        no_batch = not trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if no_batch and self._uncounted and self._speaks(trainer):
            self._compare_batches(trainer, pl_module, 0.0)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Compares whether the losses are finite, before gradients are shared."""
        if self._speaks(trainer):
            # A gradient scaler skips such a step by itself.
            calm = self._survives_nan or getattr(trainer.precision_plugin, "scaler", None) is not None
            self._tell(trainer, pl_module, calm or bool(torch.isfinite(loss.detach()).all()))
            self._awaited = not pl_module.automatic_optimization  # by hand, another backward may follow

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells the others, which wait before their backward."""
        if self._awaited and isinstance(exception, Exception):
            with contextlib.suppress(IntegrationError, RuntimeError):  # the first error is the one to show
                self._tell(trainer, pl_module, False)

    def _speaks(self, trainer: pl.Trainer) -> bool:
        """Returns whether there are other ranks, and this callback is the one that speaks to them."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return trainer.world_size > 1 and next(c for c in callbacks if isinstance(c, EndTogether)) is self

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule, fine: bool) -> None:
        self._awaited = False
        if failed := [rank for rank, value in enumerate(gather(trainer, pl_module, float(fine))) if not value]:
            raise IntegrationError(
                f"on rank {', '.join(map(str, failed))} the loss is not finite, or its training_step failed (see its own "
                "error); no rank took the step. Look at that rank's batch, or go on from the last checkpoint with a lower "
                "learning rate"
            )

    @staticmethod
    def _compare_batches(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: float) -> list[float]:
        """Returns how many batches of an epoch each rank has; infinitely many where nobody knows yet."""
        counts = gather(trainer, pl_module, batches)
        if len(set(counts)) > 1:
            first = [str(rank) for rank, count in enumerate(counts) if count == min(counts)]
            raise MisconfigurationException(
                f"the data of rank {', '.join(first)} end after {min(counts):g} batches, those of the others do not: the "
                f"ranks have [{', '.join(f'{count:g}' for count in counts)}] training batches; give each the same number, "
                "as Lightning's own distributed sampler does, or set limit_train_batches"
            )
        return counts
