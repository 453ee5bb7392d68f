"""What the callbacks over spans share."""

import contextlib
import statistics
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from torchdyn_mintime.core import has_bare, named_spans, wrap
from torchdyn_mintime.lightning import ranks

__all__ = ["SpanCallback", "loss_of", "monitored"]


class SpanCallback(ranks.EndTogether):
    """Wraps the module, logs its spans, keeps a loaded state until the training starts, and undoes what it changed.

    A subclass takes its loaded state from :meth:`_take_loaded` when the training starts; until then its ``state_dict`` is
    ``_loaded``. What it puts on ``_undo`` is called when the training ends, with or without an error. Where it looks at the
    loss of training_step, ``_losses`` are those since its last look.
    """

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._loaded: dict[str, Any] = {}
        self._losses: list[float] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps every bare NeuralODE, before the optimizers are made and a checkpoint is loaded.

        Raises:
            MisconfigurationException: the module has no NeuralODE.
        """
        if has_bare(pl_module):
            wrap(pl_module)
        if not list(named_spans(pl_module)):
            raise MisconfigurationException(
                f"{type(self).__name__} found no NeuralODE in {type(pl_module).__name__}; keep it as an attribute, in an "
                "nn.Sequential or an nn.ModuleList, where it is registered as a submodule"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undoes what the callback changed for the time of the training."""
        self._undo.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells the other ranks, and undoes the changes: Lightning calls no ``teardown`` after an error."""
        super().on_exception(trainer, pl_module, exception)
        self._undo.close()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a state until the training starts. The spans may not be there yet, or not be loaded."""
        self._loaded = state_dict

    def _take_loaded(self) -> dict[str, Any]:
        """Returns the state that a checkpoint held, once; empty where there was none."""
        loaded, self._loaded = self._loaded, {}
        return loaded

    def _log_spans(self, pl_module: pl.LightningModule) -> None:
        """Logs ``t_f`` (units of time) and ``nfe`` (evaluations of a solve), with the span's name where there are several."""
        found = list(named_spans(pl_module))
        for name, span in found:
            suffix = f"/{name}" if len(found) > 1 else ""
            pl_module.log(f"t_f{suffix}", span.t_f.detach(), prog_bar=True)
            pl_module.log(f"nfe{suffix}", float(span.nfe), prog_bar=True)


def loss_of(outputs: Any) -> Any:
    """Returns the loss (a tensor) in what ``training_step`` returned; None where it returned none."""
    return outputs.get("loss") if isinstance(outputs, dict) else outputs


def monitored(
    trainer: pl.Trainer, pl_module: pl.LightningModule, monitor: str | None, losses: list[float]
) -> float | None:
    """Returns the logged metric ``monitor``, or the mean of ``losses``, averaged over the ranks; None where there is none."""
    value: float | torch.Tensor | None
    if monitor is None:
        value = statistics.fmean(losses) if losses else None
    else:
        value = trainer.callback_metrics.get(monitor)
    return None if value is None else ranks.mean(trainer, pl_module, float(value))
