"""The search for the fewest evaluations in a Trainer."""

import copy
import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import CombinedLoader
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from torchdyn_mintime.core import checks, evaluating, freeze_times, spans
from torchdyn_mintime.depth import shallowest as search
from torchdyn_mintime.lightning import ranks
from torchdyn_mintime.lightning.apart import Number, metrics_apart, recorded_logs, reduced
from torchdyn_mintime.lightning.base import SpanCallback, gradient_scale, loss_of
from torchdyn_mintime.numerics import IntegrationError, LearnableSolver

__all__ = ["Shallowest"]

LONGEST_PASS = 1000
"""So many batches count as a pass where there are more, or as long as nobody knows how many there are."""


class Shallowest(SpanCallback):
    """Finds the fewest evaluations (:class:`torchdyn_mintime.Shallowest`) in a Trainer.

    The callback adds the search's part to the loss that ``training_step`` returns. It calls ``training_step`` a second time for
    each batch, with the ends of a finer reference. Your module needs no change. The training stops when the search has
    ended. However it ends, the module is then the best true model found.

    Args:
        target, slack, solver_tol, budget, solvers, accept: those of :class:`torchdyn_mintime.Shallowest`.
        monitor: the name of a metric that ``validation_step`` logs, a number or a torchmetrics object. The target, or the
            slack, then holds for this metric and not for the training loss. The search takes it over the validation
            batches, with the steps taken and with the ODE solved exactly. Numbers are taken together as Lightning does, by
            the ``reduce_fx`` and the ``batch_size`` of ``self.log``.
        mode: "min" if a smaller ``monitor`` is better, "max" if a larger one is. With "max" the losses of the trials are the
            metric with a minus sign.

    Attributes:
        search: the search.
        verdict: its result, after the training.

    Raises:
        ValueError: a bound that cannot be used.
        MisconfigurationException: the module optimizes by hand, an average of the weights is taken beside the search, or
            the monitored metric is not logged, or not so that Lightning would take it.

    Logs:
        ``t_f`` and ``nfe`` for the trainer's logger. What is tried, and why, goes to the ``torchdyn_mintime`` logger.

    Example:
        >>> trainer = pl.Trainer(callbacks=[Shallowest(slack=0.02)], logger=False, accelerator="cpu",
        ...                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    """

    def __init__(
        self,
        target: float | None = None,
        slack: float = 0.02,
        solver_tol: float = 0.1,
        *,
        monitor: str | None = None,
        mode: str = "min",
        **options: Any,
    ):
        super().__init__()
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max'; got {mode!r}")
        sign = -1.0 if mode == "max" and monitor is not None else 1.0
        target = None if target is None else sign * checks.number(target, "target")
        self._make = functools.partial(search.Shallowest, target, slack, solver_tol, **options)
        self.monitor, self._sign = checks.text(monitor, "monitor"), sign
        self.begin()

    def begin(self) -> None:
        """Forgets the training before, if there was one."""
        super().begin()
        self.search = self._make()
        self.verdict: search.Verdict | None = None
        self._last: tuple[Tensor, Callable[[], Any]] | None = None
        self._whole: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps every NeuralODE, and freezes the times before a strategy takes hold of the parameters."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            _refuse_what_it_cannot_train(trainer, pl_module)
            for time in freeze_times(spans(pl_module)):
                self._undo.callback(time.requires_grad_)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes learned solvers out until a training starts: the optimizers do not know their coefficients."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        learned = [span for span in spans(pl_module) if isinstance(span.solver, LearnableSolver)]
        if learned:
            self._whole = copy.deepcopy(pl_module.state_dict())
        for span in learned:
            span.solver = "rk4"

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the search, or goes on with that of a checkpoint."""
        super().on_train_start(trainer, pl_module)
        found = self.search
        found.reduce = functools.partial(ranks.mean, trainer, pl_module)
        if self.monitor is not None:
            found.judge = functools.partial(self._validated, trainer, pl_module)
            found.figure, found.sign = self.monitor, self._sign
        if not (found.trials and trainer.num_training_batches == math.inf):  # else it was learned before the checkpoint
            found.batches_seen_together = max(1, int(min(trainer.num_training_batches, LONGEST_PASS)))
        if self._whole is not None:
            pl_module.load_state_dict(self._whole)
        self._stop_schedulers(trainer)
        found.start(pl_module, trainer.optimizers)
        self._undo.callback(self._finish)
        found.share_gradients = functools.partial(_mean_gradients, trainer)
        # On the instance: a strategy calls it through its own wrapper, and the term must be in the same backward.
        vars(pl_module)["training_step"] = self._with_penalty(pl_module.training_step, trainer, pl_module)
        self._undo.callback(vars(pl_module).pop, "training_step")
        trainer.should_stop = trainer.should_stop or found.done

    def _stop_schedulers(self, trainer: pl.Trainer) -> None:
        """Leaves the learning rates to the search, which begins with those of the optimizers, or the largest of OneCycleLR."""
        for config in trainer.lr_scheduler_configs:
            warnings.warn(
                f"the search sets the learning rates by itself, and does not step {type(config.scheduler).__name__}",
                stacklevel=2,
            )
            self._undo.callback(setattr, config, "frequency", config.frequency)
            config.frequency = sys.maxsize
        if trainer.lr_scheduler_configs and not self.search.trials:
            for optimizer in trainer.optimizers:
                for group in optimizer.param_groups:  # a scheduler may begin with others
                    group["lr"] = group.get("max_lr", group.get("initial_lr", group["lr"]))

    def _with_penalty(self, original: Callable, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable:
        """Returns a ``training_step`` with the search's term on its loss."""

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            step = functools.partial(original, *args, **kwargs)

            def again() -> Tensor:
                # A look at the end of a batch is outside of the precision that training_step is called in.
                precision = trainer.precision_plugin.train_step_context()
                with precision, recorded_logs(pl_module), metrics_apart(pl_module):
                    found = loss_of(step())
                return loss.new_tensor(math.nan) if found is None else found

            try:
                out = step()
                if (loss := loss_of(out)) is None:
                    return None
                total = loss + self.search.penalty(again)
            except IntegrationError as error:
                if trainer.world_size > 1:  # the others are told, and all end
                    raise
                self.search.diverged(str(error))
                return None
            self._last = loss.detach(), again
            return {**out, "loss": total} if isinstance(out, dict) else total

        return training_step

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Divides the gradients of learned solvers by the scale of mixed precision, which the optimizers do not know."""
        scale = gradient_scale(trainer)
        for span in spans(pl_module) if scale != 1.0 else ():
            if isinstance(span.solver, LearnableSolver) and span.solver.free.grad is not None:
                span.solver.free.grad /= scale

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Looks at the progress, and decides."""
        self._log_spans(pl_module)
        if self._last is not None and not self.search.done:
            loss, again = self._last
            self.search.step(ranks.mean(trainer, pl_module, loss.item()), again)
        self._last = None
        trainer.should_stop = trainer.should_stop or self.search.done

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Learns how many batches a pass has, where the data do not say so before."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.num_training_batches == math.inf:
            batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            self.search.batches_seen_together = max(1, min(batches, LONGEST_PASS))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives back the best model found, and the verdict."""
        self._finish()

    def _finish(self) -> None:
        if self.verdict is None:
            self.verdict = self.search.finish()

    def _validated(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        """Returns the monitored metric over the validation batches; lower is better."""
        assert self.monitor is not None
        if trainer.val_dataloaders is None:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        # Which loaders are gone through together has no public name. Without validation data there are none.
        loader: CombinedLoader | None = getattr(trainer.fit_loop.epoch_loop.val_loop, "_combined_loader", None)
        if loader is not None:
            loader.limits = trainer.num_val_batches
        step, data = pl_module.validation_step, getattr(trainer, "datamodule", None)
        hooks = data if data and is_overridden("on_before_batch_transfer", data) else pl_module
        wanted = [
            is_param_in_hook_signature(step, name, min_args=i) for i, name in ((2, "batch_idx"), (3, "dataloader_idx"))
        ]
        numbers: list[Number] = []
        metric: Metric | None = None
        with evaluating(pl_module), torch.no_grad(), metrics_apart(pl_module):
            for given, i, of_loader in () if loader is None else loader:
                # Loaders that are gone through together have the limits in their length alone.
                if i >= max(trainer.num_val_batches):
                    break
                batch = hooks.on_before_batch_transfer(trainer.precision_plugin.convert_input(given), of_loader)
                batch = trainer.strategy.batch_to_device(batch, dataloader_idx=of_loader)
                indices = itertools.compress((i, of_loader), wanted)
                with recorded_logs(pl_module) as seen, trainer.precision_plugin.val_step_context():
                    step(batch, *indices)
                for name in {self.monitor, self.monitor.removesuffix(f"/dataloader_idx_{of_loader}")} & set(seen):
                    for logged in seen[name]:
                        if isinstance(logged.value, Metric):
                            metric = logged.value
                        else:
                            numbers.append(logged.number(batch))
            if metric is not None:
                return self._sign * float(metric.compute())
        if not numbers:
            raise MisconfigurationException(
                f"monitor={self.monitor!r} was not logged by validation_step; log a number of that name there, and give the "
                "Trainer validation data"
            )
        return self._sign * reduced(numbers)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the search, for a checkpoint."""
        return self.search.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint was."""
        self.search.load_state_dict(state_dict)


def _refuse_what_it_cannot_train(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False), and the search adds to the loss "
            "that training_step returns; drive torchdyn_mintime.Shallowest in a plain loop instead"
        )
    averages = (StochasticWeightAveraging, WeightAveraging)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, averages):
            raise MisconfigurationException(
                f"{type(callback).__name__} averages the weights of one model, and the search changes the model's solver as it "
                "goes; leave it out, and train the model that was found once more with it"
            )


def _mean_gradients(trainer: pl.Trainer, gradients: list[Tensor]) -> None:
    """Takes the mean over the ranks: a strategy knows only the parameters that were there before the training."""
    for gradient in gradients:
        mean = trainer.strategy.reduce(gradient, reduce_op="mean")
        if isinstance(mean, Tensor):
            gradient.copy_(mean)
