"""The paper's second approach as a module that is ready to train."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from torchdyn_mintime.core import checks, last_solve, only_span, parameter_groups
from torchdyn_mintime.losses.lyapunov import LyapunovRegularizer, keep_points, regularizer_for
from torchdyn_mintime.losses.potentials import CrossEntropy

__all__ = ["ConvergenceRate"]


class ConvergenceRate(pl.LightningModule):
    """Trains a model by the Lyapunov loss of eq. (17): the paper's second approach.

    Algorithm 2, pre-training on a short interval and then growth until the terminal loss is met::

        module = ConvergenceRate(model, rate=20.0)
        pl.Trainer(callbacks=[GrowDepth(0.01, monitor="terminal", patience=3, pretraining=200)]).fit(module, data)

    The combined method of appendix F.2, where t_f is learned beside::

        module = ConvergenceRate(model, rate=20.0, terminal_weight=1.0, span_lr=0.001)
        pl.Trainer(callbacks=[MinimumTime(weight=1.0)]).fit(module, data)

    Where the field is all that is trained, V gets no gradient in V-dot + rate V, as in the paper's code. Where layers
    before the span or a head are trained too, it does, as eq. (16) is printed: an encoder without that learns to start
    from a large V, which falls fast and never arrives.

    Where the state has only as many entries as there are classes, give it a zero more (torchdyn's ``Augmenter``). The
    condition asks that the right logit gains on the others at every time, so paths of interleaved classes would have to
    pass through each other, which they cannot in a plane.

    Args:
        model: with exactly one LearnableSpan, whose template starts short: the paper's is [0, 0.05] at step 0.01.
        rate: kappa, per unit of time.
        lr: Adam's learning rate.
        span_lr: Adam's learning rate of t_f; default ``lr``. A tenth of a step size is a good one.
        terminal_weight: of the terminal loss, the potential's mean at z(t_f).
        potential: default: cross entropy of ``model``'s output where that is the state itself, in its first ``classes``
            entries. With a head give ``CrossEntropy(head)``.
        classes: for the default potential.

    Attributes:
        regularizer: the :class:`~torchdyn_mintime.LyapunovRegularizer`, which also certifies:
            ``module.regularizer.certificate(x, y)``.

    Raises:
        ValueError: a model without exactly one span, an adaptive solver, or neither a potential nor classes.

    Logs:
        ``terminal`` and ``lyapunov``, the two losses, averaged over each epoch.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> from torchdyn_mintime import LearnableSpan
        >>> net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 0.05, 6))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> module = ConvergenceRate(span, classes=2)
        >>> module.training_step((torch.randn(8, 3), torch.randint(0, 2, (8,))), 0).shape
        torch.Size([])
    """

    regularizer: LyapunovRegularizer

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
        self.model, self.lr, self.span_lr = model, lr, span_lr
        self.potential = CrossEntropy(classes=classes) if potential is None else potential
        # Past nn.Module's registration: the model must not stand in the state_dict twice.
        object.__setattr__(self, "regularizer", regularizer_for(model, self.potential, rate))
        keep_points(only_span(model))  # last: a refused argument must leave the span as it was

    def forward(self, x: torch.Tensor) -> Any:
        """Returns the model's own output."""
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Returns the Lyapunov loss of a batch ``(x, *target)``, with the weighted terminal loss."""
        x, *target = batch
        self.model(x)
        terminal = self.potential(last_solve(only_span(self.model)).states[-1], *target).mean()
        lyapunov_loss = self.regularizer.penalty_of_last(*target, reduction="points")
        if self._trainer is not None:
            self.log_dict(
                {"terminal": terminal.detach(), "lyapunov": lyapunov_loss.detach()},
                prog_bar=True,
                on_step=False,
                on_epoch=True,
                batch_size=len(x),
            )
        return lyapunov_loss + self.terminal_weight * terminal if self.terminal_weight else lyapunov_loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns Adam, the times at their own rate."""
        return torch.optim.Adam(parameter_groups(self, lr=self.lr, span_lr=self.span_lr))
