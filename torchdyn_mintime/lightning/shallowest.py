"""The search for the fewest evaluations in a Trainer."""

import functools
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

from torchdyn_mintime.core import freeze_times, spans
from torchdyn_mintime.depth import shallowest as search
from torchdyn_mintime.lightning import ranks
from torchdyn_mintime.lightning.base import SpanCallback, loss_of
from torchdyn_mintime.numerics import IntegrationError

__all__ = ["Shallowest"]


class Shallowest(SpanCallback):
    """Finds the fewest evaluations (:class:`torchdyn_mintime.Shallowest`) in a Trainer.

    The search's term is added to the loss that ``training_step`` returns; the module itself is not changed. The
    training stops when the search has ended, and the best model found is given back.

    Args:
        target, solver_tol, solvers, max_steps, patience: those of :class:`torchdyn_mintime.Shallowest`.

    Attributes:
        search: the search.
        verdict: its result, after the training.

    Raises:
        ValueError: a bound that cannot be used.

    Logs:
        ``steps`` and ``nfe``; what is tried and why on the ``torchdyn_mintime`` logger.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Shallowest(target=0.01, solver_tol=0.1)], logger=False, accelerator="cpu",
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(self, *, target: float, solver_tol: float = 0.1, **options: Any):
        super().__init__()
        self.search = search.Shallowest(target=target, solver_tol=solver_tol, **options)
        self.verdict: search.Verdict | None = None
        self._last: tuple[torch.Tensor, Callable[[], Any]] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps, and freezes the times before a strategy takes hold of the parameters."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            for time in freeze_times(spans(pl_module)):
                self._undo.callback(time.requires_grad_)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the search, or goes on with that of a checkpoint."""
        super().on_train_start(trainer, pl_module)
        self.search.start(pl_module, trainer.optimizers)
        self.search.batches_seen_together = max(1, int(min(trainer.num_training_batches, 1000)))
        self.search.reduce = functools.partial(ranks.mean, trainer, pl_module)
        # On the instance: a strategy calls it through its own wrapper, and the term must be in the same backward.
        vars(pl_module)["training_step"] = self._with_penalty(pl_module.training_step, trainer.world_size)
        self._undo.callback(vars(pl_module).pop, "training_step")
        trainer.should_stop = trainer.should_stop or self.search.done

    def _with_penalty(self, original: Callable, world_size: int) -> Callable:
        """Returns a ``training_step`` with the search's term on its loss."""

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = functools.partial(original, *args, **kwargs)
            try:
                out = step()
                if (loss := loss_of(out)) is None:
                    return None
                total = loss + self.search.penalty()
            except IntegrationError as error:
                if world_size > 1:  # the others are told, and all end
                    raise
                self.search.diverged(str(error))
                return None
            self._last = loss.detach(), step
            return {**out, "loss": total} if isinstance(out, dict) else total

        return training_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Looks at the progress, and decides."""
        self._log_spans(pl_module)
        if self._last is not None and not self.search.done:
            loss, step = self._last
            self.search.step(ranks.mean(trainer, pl_module, loss.item()), functools.partial(_measure, pl_module, step))
        self._last = None
        trainer.should_stop = trainer.should_stop or self.search.done

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives back the best model found, and the verdict."""
        self.verdict = self.search.finish()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the search, for a checkpoint."""
        return self.search.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint was."""
        self.search.load_state_dict(state_dict)


def _measure(pl_module: pl.LightningModule, step: Callable[[], Any]) -> float:
    """Returns the loss of a ``training_step``, and logs nothing: what is logged is the training's."""
    vars(pl_module)["log"] = lambda *args, **kwargs: None
    try:
        return float(loss_of(step()))
    finally:
        del vars(pl_module)["log"]
