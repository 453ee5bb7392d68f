"""Lightning callbacks: thin adapters that put the paper's training into a Trainer, with no change to the module.

Import ``pytorch_lightning`` beside this, not ``lightning.pytorch``: torchdyn's NeuralODE is of the former family.
"""

import contextlib
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from torchdyn_mintime import checks, shallow
from torchdyn_mintime.growth import DepthGrowth, DivergedError, Rescue
from torchdyn_mintime.lyapunov import CrossEntropy, LyapunovRegularizer
from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.recipes import keep_points, lyapunov, only_span
from torchdyn_mintime.secondary import last_solve
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.weighting import TargetLoss
from torchdyn_mintime.wrapping import has_bare, named_spans, parameter_groups, wrap

__all__ = ["ConvergenceRate", "GrowDepth", "MinimumTime", "Shallowest"]

_log = logging.getLogger(__name__)


class _SpanCallback(pl.Callback):
    """What callbacks over spans share: wrapping before optimizers are made, failures told to all ranks, logged figures."""

    _survives_nan = False
    """Whether a loss that is not finite is dealt with later, by all ranks alike."""
    _awaited = False
    """Whether the other ranks wait to hear from this one how its batch went."""
    _uncounted = False
    """Whether how many batches an epoch has is only known when it ends, as with an iterable data set."""

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

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ranks with different numbers of batches would wait for each other."""
        if self._tells(trainer):
            counts = _of_all_ranks(trainer, pl_module, float(trainer.num_training_batches))
            if len(set(counts)) > 1:
                raise MisconfigurationException(
                    f"the ranks have {[int(n) if math.isfinite(n) else n for n in counts]} training batches; give each the "
                    "same number, as Lightning's own distributed sampler does, or set limit_train_batches"
                )
            self._uncounted = math.inf in counts

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on the other ranks wait for this one."""
        tells = self._tells(trainer)
        if tells and self._uncounted:
            # Before the forward: it may share buffers, and the rank whose data end here makes no next one.
            self._end_together(trainer, pl_module, 1 + batch_idx, float(trainer.is_last_batch))
        self._awaited = tells

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A rank that had no batch at all says so: the others wait at the start of their first one."""
        if self._uncounted and self._tells(trainer) and not trainer.fit_loop.epoch_loop.batch_progress.current.ready:
            self._end_together(trainer, pl_module, 0, 2.0)

    @staticmethod
    def _end_together(trainer: pl.Trainer, pl_module: pl.LightningModule, batches: int, end: float) -> None:
        ends = _of_all_ranks(trainer, pl_module, end)
        if len(set(ends)) > 1:
            first = [rank for rank, value in enumerate(ends) if value == max(ends)]
            raise MisconfigurationException(
                f"the data of rank {', '.join(map(str, first))} end after {0 if max(ends) == 2 else batches} batches, those "
                "of the others do not; give each rank the same number of batches, or set limit_train_batches"
            )

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Ends the training on all ranks where the loss of one is not finite, before gradients are shared."""
        if self._tells(trainer):
            # A gradient scaler skips such a step by itself.
            calm = self._survives_nan or getattr(trainer.precision_plugin, "scaler", None) is not None
            self._tell(trainer, pl_module, calm or bool(torch.isfinite(loss.detach()).all()))
            self._awaited = not pl_module.automatic_optimization  # by hand, another backward may follow

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Tells the other ranks, which wait before their backward."""
        if self._awaited and isinstance(exception, Exception):
            with contextlib.suppress(IntegrationError, RuntimeError):  # the first error is the one to show
                self._tell(trainer, pl_module, False)

    def _tells(self, trainer: pl.Trainer) -> bool:
        """Whether there are other ranks, and this callback is the one of its kind that speaks to them."""
        if trainer.world_size == 1:
            return False
        return next(c for c in trainer.callbacks if isinstance(c, _SpanCallback)) is self  # type: ignore[attr-defined]

    def _tell(self, trainer: pl.Trainer, pl_module: pl.LightningModule, fine: bool) -> None:
        self._awaited = False
        told = _of_all_ranks(trainer, pl_module, float(fine))
        if failed := [rank for rank, value in enumerate(told) if not value]:
            raise IntegrationError(
                f"on rank {', '.join(map(str, failed))} the loss is not finite, or its training_step failed (see its own "
                "error); no rank took the step. Look at that rank's batch, or go on from the last checkpoint with a lower "
                "learning rate"
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

    Each bare NeuralODE is wrapped in a :class:`LearnableSpan` in ``setup``. With a ``weight``, the gradient of
    ``weight * (t_f - t0)`` is added to the times after every backward pass, so that training is that of
    ``loss + weight * span.duration``, with gradient accumulation, clipping and mixed precision too; after the step,
    times are clipped by eq. (14). With a ``target``, a :class:`~torchdyn_mintime.weighting.TargetLoss` finds the price of
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
        if weight is not None and target is not None:
            raise ValueError(f"give a weight or a target, not both; got weight={weight!r} and target={target!r}")
        if monitor is not None and target is None:
            raise ValueError(f"monitor={monitor!r} is held against a target; give target= too")
        self.weight = 1.0 if weight is None else checks.number(weight, "weight", least=0)
        self.target = None if target is None else checks.positive(target, "target")
        self.monitor = monitor
        self.price: TargetLoss | None = None
        self._loaded: dict[str, Any] | None = None
        self._losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks that the times will be trained, and not decayed."""
        super().on_train_start(trainer, pl_module)
        if self.target is not None:
            self.price = TargetLoss(pl_module, self.target)
            if self._loaded is not None:
                self.price.load_state_dict(self._loaded)
                self._loaded = None
            return
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

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Remembers the loss of every batch of an accumulation."""
        super().on_before_backward(trainer, pl_module, loss)
        if self.price is not None:
            self._losses.append(loss.item() / _loss_scale(trainer, pl_module))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the gradient of eq. (13)'s second term."""
        if self.target is not None:
            return
        scale = _loss_scale(trainer, pl_module)
        for _, span in self._spans(pl_module):
            _add_gradient(span.t_f, self.weight * scale)
            _add_gradient(span.t0, -self.weight * scale)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        """With a target: moves the times and their price, by the gradients of the whole accumulation."""
        if self.price is None or not self._losses or all(s.t_f.grad is None for _, s in self._spans(pl_module)):
            return
        if self.monitor is None:
            value = sum(self._losses) / len(self._losses)
        elif self.monitor in trainer.callback_metrics:
            value = float(trainer.callback_metrics[self.monitor])
        else:
            return  # not logged yet: a metric of the epoch's end
        self._losses.clear()
        self.price.step(_mean_over_ranks(trainer, pl_module, value))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Clips by eq. (14), and logs."""
        for _, span in self._spans(pl_module):
            span.clip_()
        self._log(pl_module)
        if self.price is not None and self.price.weight is not None:
            pl_module.log("time_weight", self.price.weight)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """With a target: the best feasible model, and a word on it."""
        if self.price is None:
            return
        if self.price.restore_best():
            _log.info("the target loss %g was met: %s", self.price.target, self.price.best)

    def state_dict(self) -> dict[str, Any]:
        """The price and the best model, for the checkpoint."""
        return {} if self.target is None else {"price": self._loaded if self.price is None else self.price.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: the spans may not be there yet."""
        self._loaded = state_dict.get("price")


class Shallowest(_SpanCallback):
    """The search for the fewest evaluations (:class:`torchdyn_mintime.Shallowest`) in a Trainer.

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
        self.search = shallow.Shallowest(target=target, solver_tol=solver_tol, **options)
        self.verdict: shallow.Verdict | None = None
        self._original: Callable | None = None
        self._thawed: list[torch.Tensor] = []
        self._many = False
        self._loss: torch.Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps, and freezes the times before a strategy takes hold of the parameters."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._thawed = shallow.freeze_times([span for _, span in self._spans(pl_module)])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the search, or goes on with that of a checkpoint."""
        super().on_train_start(trainer, pl_module)
        self._many = trainer.world_size > 1
        self.search.start(pl_module, trainer.optimizers)
        self.search._thawed += self._thawed  # frozen in setup already
        self.search.batches_seen_together = max(1, min(int(min(trainer.num_training_batches, 1000)), 1000))
        self.search.reduce = lambda value: _mean_over_ranks(trainer, pl_module, value)
        self._original = pl_module.training_step
        # On the instance: a strategy calls it through its own wrapper, and the term must be in the same backward.
        object.__setattr__(pl_module, "training_step", self._with_penalty)
        if self.search.done:
            trainer.should_stop = True

    def _with_penalty(self, *args: Any, **kwargs: Any) -> Any:
        assert self._original is not None
        try:
            out = self._original(*args, **kwargs)
            loss = out["loss"] if isinstance(out, dict) else out
            if loss is None:
                return None
            total = loss + self.search.penalty()
        except IntegrationError as error:
            if self._many:  # the other ranks are told, and all end
                raise
            self.search.diverged(str(error))
            return None
        self._loss = loss.detach()
        return {**out, "loss": total} if isinstance(out, dict) else total

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Looks at the progress, and decides."""
        self._log(pl_module)
        if self.search.done:  # given up in the step itself
            trainer.should_stop = True
        if self._loss is None or self.search.done:
            return
        value = _mean_over_ranks(trainer, pl_module, self._loss.item())

        def measure() -> float:
            assert self._original is not None
            log, pl_module.log = pl_module.log, lambda *args, **kwargs: None
            try:
                out = self._original(batch, batch_idx)
            finally:
                pl_module.log = log
            loss = out["loss"] if isinstance(out, dict) else out
            return loss.item()

        self.search.step(value, measure)
        self._loss = None
        if self.search.done:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The best model, and the verdict."""
        if self._original is not None:
            del pl_module.__dict__["training_step"]
            self._original = None
            self.verdict = self.search.finish()

    def state_dict(self) -> dict[str, Any]:
        """The search's state, for the checkpoint."""
        return self.search.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the checkpoint was."""
        self.search.load_state_dict(state_dict)


def _loss_scale(trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
    """What Lightning has multiplied the loss by before backward."""
    scale = 1.0 / trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1.0
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scale if scaler is None else scale * scaler.get_scale()


def _mean_over_ranks(trainer: pl.Trainer, pl_module: pl.LightningModule, value: float) -> float:
    """One figure for all ranks: they would otherwise decide differently."""
    return float(trainer.strategy.reduce(torch.tensor(value, device=pl_module.device), reduce_op="mean"))


class ConvergenceRate(pl.LightningModule):
    """A model with the Lyapunov loss of eq. (17), ready to train: the paper's second approach.

    Algorithm 2, pre-training on a short interval and then growth until the terminal loss is met::

        module = ConvergenceRate(model, rate=20.0)
        pl.Trainer(callbacks=[GrowDepth(0.01, monitor="terminal", patience=3, pretraining=200)]).fit(module, data)

    The combined method of appendix F.2, where t_f is learned beside::

        module = ConvergenceRate(model, rate=20.0, terminal_weight=1.0, span_lr=0.001)
        pl.Trainer(callbacks=[MinimumTime(weight=1.0)]).fit(module, data)

    Args:
        model: with exactly one LearnableSpan, whose template starts short: the paper's is [0, 0.05] at step 0.01.
        rate: kappa, per unit of time.
        lr: Adam's learning rate.
        span_lr: Adam's learning rate of t_f; default ``lr``. A tenth of a step size is a good one.
        terminal_weight: of the terminal loss, the potential's mean at z(t_f).
        potential: default: cross entropy of ``model``'s output where that is the state itself, in its first ``classes``
            entries. With a head give ``CrossEntropy(head)``.
        classes: for the default potential.

    Raises:
        ValueError: a model without exactly one span, an adaptive solver, or neither a potential nor classes.

    Logs:
        ``terminal`` and ``lyapunov``, the two losses, averaged over each epoch.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 0.05, 6))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> module = ConvergenceRate(span, classes=2)
        >>> module.training_step((torch.randn(8, 3), torch.randint(0, 2, (8,))), 0).shape
        torch.Size([])
    """

    _regularizer: LyapunovRegularizer

    def __init__(
        self,
        model: nn.Module,
        rate: float = 20.0,
        *,
        lr: float = 0.03,
        span_lr: float | None = None,
        terminal_weight: float = 0.0,
        potential: nn.Module | None = None,
        classes: int | None = None,
    ):
        super().__init__()
        if (potential is None) == (classes is None):
            raise ValueError(f"give a potential or the number of classes; got {potential!r} and classes={classes!r}")
        self.terminal_weight = checks.number(terminal_weight, "terminal_weight", least=0)
        self.model = model
        self.potential = CrossEntropy(classes=classes) if potential is None else potential
        # Past nn.Module's registration: the model must not stand in the state_dict twice.
        object.__setattr__(self, "_regularizer", lyapunov(model, self.potential, rate))
        self.lr, self.span_lr = lr, span_lr
        keep_points(only_span(model))  # last: a refused argument must leave the span as it was

    def forward(self, x: torch.Tensor) -> Any:
        """As the model's own."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The Lyapunov loss of a batch ``(x, *target)``, with the weighted terminal loss."""
        x, *target = batch
        self.model(x)
        end = last_solve(self._regularizer.model).states[-1]
        terminal = self.potential(end, *target).mean()
        lyapunov_loss = self._regularizer.penalty_of_last(*target, reduction="points")
        if self._trainer is not None:
            options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(x)}
            self.log("terminal", terminal.detach(), prog_bar=True, **options)
            self.log("lyapunov", lyapunov_loss.detach(), **options)
        return lyapunov_loss + self.terminal_weight * terminal if self.terminal_weight else lyapunov_loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, the times at their own rate."""
        return torch.optim.Adam(parameter_groups(self, lr=self.lr, span_lr=self.span_lr))


def _of_all_ranks(trainer: pl.Trainer, pl_module: pl.LightningModule, value: float) -> list[float]:
    """Every rank's figure, in their order."""
    return trainer.strategy.all_gather(torch.tensor(value, device=pl_module.device)).reshape(-1).tolist()


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
    sends the training back to its last good epoch with half the learning rate; a solve that fails inside training_step
    ends the training with its IntegrationError. Where ``max_t_f`` was reached and the
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
        checks.positive(threshold, "threshold")
        if increment is not None:
            checks.positive(increment, "increment")
        if max_t_f is not None:
            checks.number(max_t_f, "max_t_f")
        for name, value in (("patience", patience), ("pretraining", pretraining)):
            checks.count(value, name, of=" of epochs")
        self.threshold, self.monitor, self.increment, self.patience = threshold, monitor, increment, patience
        self.max_t_f, self.span, self.pretraining, self.rescue = max_t_f, span, pretraining, rescue
        self._survives_nan = rescue
        self.growth: DepthGrowth | None = None
        self._rescue: Rescue | None = None
        self._loaded: dict[str, Any] | None = None
        self._best = math.inf
        self._kept: dict[str, torch.Tensor] | None = None
        self._epochs = self._batches = 0
        self._sum = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Wraps, and takes t_f from the optimizer before a strategy takes hold of the parameters."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
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
        super().on_train_start(trainer, pl_module)
        assert self.growth is not None
        if self.rescue and trainer.optimizers:
            self._rescue = Rescue(pl_module, trainer.optimizers[0], every=1)
        if self._loaded is not None:
            self.growth.load_state_dict(self._loaded["growth"])
            if self._rescue is not None and self._loaded["rescue"] is not None:
                self._rescue.load_state_dict(self._loaded["rescue"])
            self._loaded = None
        if self.growth.done:
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A new average of the loss."""
        self._sum, self._batches = 0.0, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
        super().on_train_epoch_end(trainer, pl_module)
        growth = self.growth
        assert growth is not None
        self._epochs += 1
        metric = self._metric(trainer, pl_module)
        try:
            if self._rescue is not None and self._rescue.look(metric):
                growth.restart()
                return
        except DivergedError as error:
            self._give_up(trainer, pl_module, str(error))
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
            self._give_up(
                trainer,
                pl_module,
                f"t_f reached max_t_f = {growth.max_t_f:g} and {self._name} is {metric:.4g} > {self.threshold:g}",
            )

    def _give_up(self, trainer: pl.Trainer, pl_module: pl.LightningModule, why: str) -> None:
        trainer.should_stop = True
        best = f"; the best model seen ({self._name} {self._best:.4g}) is given back" if self._kept is not None else ""
        warnings.warn(f"GrowDepth did not converge: {why}{best}", stacklevel=2)
        if self._kept is not None:
            pl_module.load_state_dict(self._kept)

    @property
    def _name(self) -> str:
        return self.monitor or "the training loss"

    def _metric(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> float:
        if self.monitor is None:
            if not self._batches:
                raise MisconfigurationException("training_step returned no loss; give GrowDepth a monitor=")
            value = self._sum / self._batches
        else:
            if self.monitor not in trainer.callback_metrics:
                raise MisconfigurationException(
                    f"GrowDepth(monitor={self.monitor!r}) found no such metric; logged were {sorted(trainer.callback_metrics)}"
                )
            value = float(trainer.callback_metrics[self.monitor])
        return _mean_over_ranks(trainer, pl_module, value)

    def state_dict(self) -> dict[str, Any]:
        """The growth's state, the last good state and the best model seen, for the checkpoint."""
        own = self._loaded
        if own is None and self.growth is not None:
            own = {"growth": self.growth.state_dict(), "rescue": self._rescue and self._rescue.state_dict()}
        return {**(own or {}), "best": self._best, "kept": self._kept, "epochs": self._epochs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts: the span is not there yet, or not loaded."""
        if state_dict.get("growth") is not None:
            self._loaded = {name: state_dict.get(name) for name in ("growth", "rescue")}
        self._best = state_dict.get("best", math.inf)
        self._kept, self._epochs = state_dict.get("kept"), state_dict.get("epochs", 0)
