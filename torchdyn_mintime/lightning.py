"""Lightning callbacks: thin adapters that put the paper's training into a Trainer, with no change to the module.

Import ``pytorch_lightning`` beside this, not ``lightning.pytorch``: torchdyn's NeuralODE is of the former family.
"""

import math
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import has_bare, named_spans, wrap

__all__ = ["MinimumTime"]


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
