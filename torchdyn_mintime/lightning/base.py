"""What the callbacks over spans share."""

import contextlib
import statistics
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torchdyn.core import NeuralODE

from torchdyn_mintime.core import LOAD_HINT, LearnableSpan, has_bare, named_spans, replicate_times, wrap
from torchdyn_mintime.lightning import ranks

__all__ = ["Monitoring", "SpanCallback", "gradient_scale", "loss_of", "monitored"]


class SpanCallback(ranks.EndTogether):
    """Wraps the module, logs its spans, keeps a loaded state until the training starts, and undoes what it changed.

    A subclass takes its loaded state from :meth:`_take_loaded` when the training starts; until then its ``state_dict`` is
    ``_loaded``. It begins every training in :meth:`begin`, as if it were new: a callback may be used for one training
    after another. What it puts on ``_undo`` is called when the training ends, with or without an error. Where it looks at
    the loss of training_step, ``_losses`` are those since its last look.
    """

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self._loaded: dict[str, Any] = {}
        self._losses: list[float] = []
        self._evaluations: dict[str, list[float]] = {}

    @property
    def log(self) -> Callable[..., None]:
        """The module's own ``log``, which Lightning gives to every callback."""
        return self._log

    @log.setter
    def log(self, log: Callable[..., None]) -> None:
        # Lightning gives it before any callback's `setup`, and those of weight averages copy the module there. torchdyn's
        # bare node cannot be copied, and a copy of it would have no times: so it is wrapped now, whatever the order of
        # the callbacks.
        self._log = log
        module = getattr(log, "__self__", None)
        if isinstance(module, pl.LightningModule) and has_bare(module) and not isinstance(module, NeuralODE):
            wrap(module)

    def _keep_times_whole(self, strategy: FSDPStrategy, pl_module: pl.LightningModule) -> None:
        """Leaves the times out of the sharding, and moves them where the strategy moves the rest."""
        times = replicate_times(pl_module)
        for time in times:
            time.data = time.data.to(strategy.root_device)
        before = strategy.kwargs.get("ignored_states")
        strategy.kwargs["ignored_states"] = [*(before or ()), *times]
        self._undo.callback(strategy.kwargs.update, ignored_states=before)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps every bare NeuralODE, before the optimizers are made and a checkpoint is loaded.

        FSDPStrategy is told to leave the times whole.

        Raises:
            MisconfigurationException: the module has no NeuralODE.
        """
        self._undo.close()  # of a training whose end this callback was not told
        if has_bare(pl_module):
            wrap(pl_module)
        if not list(named_spans(pl_module)):
            raise MisconfigurationException(
                f"{type(self).__name__} found no NeuralODE in {type(pl_module).__name__}; make it in __init__ (setup and "
                "configure_model come later than this), and keep it as an attribute, in an nn.Sequential or an "
                "nn.ModuleList, where it is registered as a submodule"
            )
        if isinstance(trainer.strategy, FSDPStrategy):
            self._keep_times_whole(trainer.strategy, pl_module)
        if stage == "fit":
            self.begin()

    def begin(self) -> None:
        """Forgets the training before, if there was one: a checkpoint's state is loaded after this."""
        self._loaded = {}
        self._losses.clear()
        self._evaluations.clear()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Undoes what the callback changed for the time of the training."""
        self._undo.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells the other ranks, and undoes the changes: Lightning calls no ``teardown`` after an error."""
        try:
            super().on_exception(trainer, pl_module, exception)
        finally:
            self._undo.close()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the figures of the epoch: t_f as it is now, and the mean evaluations of its solves."""
        super().on_train_epoch_end(trainer, pl_module)
        for name, span in self._named(pl_module):
            if seen := self._evaluations.pop(name, []):
                figures: dict[str, Any] = {f"t_f{name}": span.t_f.detach(), f"nfe{name}": statistics.fmean(seen)}
                pl_module.log_dict(figures, prog_bar=True, on_step=False, on_epoch=True)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds an entry to each span's state whose name says how to load it: torch names what does not fit."""
        state = checkpoint["state_dict"]
        for name, _ in named_spans(pl_module):
            if f"{name}.t_f" in state:  # a rank that does not write has no state
                state[f"{name}.{LOAD_HINT}"] = torch.empty(0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a state until the training starts. The spans may not be there yet, or not be loaded."""
        self._loaded = state_dict

    def _take_loaded(self) -> dict[str, Any]:
        """Returns the state that a checkpoint held, once; empty where there was none."""
        loaded, self._loaded = self._loaded, {}
        return loaded

    def _log_spans(self, pl_module: pl.LightningModule) -> None:
        """Logs ``t_f`` (units of time) and ``nfe`` (evaluations of a solve), with the span's name where there are several."""
        for name, span in self._named(pl_module):
            self._evaluations.setdefault(name, []).append(span.nfe)
            figures: dict[str, Any] = {f"t_f{name}": span.t_f.detach(), f"nfe{name}": float(span.nfe)}
            pl_module.log_dict(figures, prog_bar=True, on_step=True, on_epoch=False)

    @staticmethod
    def _named(pl_module: pl.LightningModule) -> list[tuple[str, LearnableSpan]]:
        """Returns the spans, each with what is added to the names of its figures."""
        found = list(named_spans(pl_module))
        return [(f"/{name}" if len(found) > 1 else "", span) for name, span in found]


class Monitoring(SpanCallback):
    """Knows whether its metric is one of the validation, and then of which model.

    Attributes:
        monitor: the name of the metric; None is the loss of the training.
    """

    monitor: str | None = None
    _validated = _awaits_validation = False
    _before_validation: Any = None

    def begin(self) -> None:
        """Forgets the training before: nothing was validated yet."""
        super().begin()
        self._validated, self._before_validation = False, None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sees whether there will be a validation, which may be that of a later epoch."""
        super().on_train_start(trainer, pl_module)
        self._awaits_validation = trainer.enable_validation

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remembers the metric as it was, to see whether the validation logs it."""
        self._awaits_validation = self._awaits_validation and trainer.sanity_checking
        self._before_validation = self._metric(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells :meth:`validated`, where a validation in the training has logged the metric."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if fitting and self._metric(trainer) is not self._before_validation:
            self._validated = True
            self.validated(trainer, pl_module)

    def validated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Is called after a validation that logged the metric, with the model that was validated."""

    def _metric(self, trainer: pl.Trainer) -> Any:
        return None if self.monitor is None else trainer.callback_metrics.get(self.monitor)


def gradient_scale(trainer: pl.Trainer) -> float:
    """Returns what mixed precision has multiplied the loss by, and divides the gradient by before the step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


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
