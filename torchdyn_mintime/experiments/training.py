"""Training several models side by side: one iteration of each in turn, so that a hot or busy machine slows all alike."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchdyn_mintime import IntegrationError, spans
from torchdyn_mintime.experiments.data import Data, cropped
from torchdyn_mintime.experiments.methods import Method
from torchdyn_mintime.experiments.models import Classifier, NoODE
from torchdyn_mintime.experiments.tasks import Settings, Task
from torchdyn_mintime.growth import DivergedError

__all__ = ["LOOKED_AT", "History", "Run", "Step", "check_gradients", "clock", "end_of", "race", "single_thread"]

LOOKED_AT = 1024
"""Training samples on which a search looks at a model before it believes it."""


def clock(device: torch.device) -> float:
    """Seconds of this thread on the CPU, so that what else the machine does is not counted; on a GPU, seconds that passed.

    On an idle machine both are the same, since all work is done in one thread.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.thread_time()


@contextmanager
def single_thread() -> Iterator[None]:
    """One thread, so that times can be compared; small networks are faster so, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class History:
    """One entry per iteration.

    Attributes:
        seconds: since the start, of this model's own iterations.
        loss: the terminal loss of the batch, without other terms.
        accuracy: of the batch, before the step.
        t_f: after the step.
        nfe: evaluations of the field in the step.
    """

    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    t_f: list[float] = field(default_factory=list)
    nfe: list[int] = field(default_factory=list)

    def seconds_at(self, iteration: int) -> float:
        """Seconds after so many iterations, or after all where there are fewer."""
        return self.seconds[min(iteration, len(self.seconds)) - 1] if self.seconds and iteration else 0.0

    def to_target(self, loss: float = 0.01, accuracy: float = 1.0) -> float | None:
        """Seconds until the batch's loss and accuracy first met the target; None if they never did."""
        for before, own_loss, own_accuracy in zip([0.0, *self.seconds], self.loss, self.accuracy, strict=False):
            if own_loss <= loss and own_accuracy >= accuracy:
                return before  # they are those of the parameters before this iteration's update
        return None


@dataclass
class Step:
    """What a term of the loss sees of an iteration.

    Attributes:
        z0: initial states ``[batch, ...]``.
        y: labels ``[batch]``.
        t_eval, sol: the solve, ``[points]`` and ``[points, batch, ...]``; its first point alone where the method trains
            without one.
    """

    z0: Tensor
    y: Tensor
    t_eval: Tensor
    sol: Tensor


class Run:
    """One model in training.

    Args:
        task, method, settings, data: what is trained, how, and on what.
        device: where.
        start: the state of a trained model to go on from; None is a new one.

    Attributes:
        history: what happened so far.
        failure: why it stopped early, or an empty text.
        per_pass: iterations in which all data is seen.
    """

    def __init__(
        self,
        task: Task,
        method: Method,
        settings: Settings,
        data: Data,
        device: str = "cpu",
        start: dict[str, Tensor] | None = None,
    ):
        self.method, self.settings, self.device = method, settings, torch.device(device)
        self.data = data.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the same initialisation for every method
            self.model: Classifier = method.model(task, settings).to(self.device)
            if start is not None:
                self.model.load_state_dict(start)
            # What a method draws in training must not depend on which others train beside it.
            self._random = torch.get_rng_state()
        self.per_pass = max(1, len(data.x) // settings.batch) if settings.batch else 1
        self.spans = list(spans(self.model))
        self._solve = method.solver(self.model)
        self.terms = method.loss_terms(self.model, settings)
        self.history = History()
        self.failure = ""
        self._lost = 0.0  # seconds of iterations that failed, counted with the next one
        self.renew_optimizer()
        self.driver = method.driver()
        self.driver.start(self)
        self._batches = torch.Generator().manual_seed(settings.seed)  # the same batches for every method
        self._order = torch.empty(0, dtype=torch.long)

    def renew_optimizer(self) -> None:
        """A fresh optimizer, at the first learning rate."""
        self.optimizer, self._paced = self.method.optimizer(self.model, self.settings)
        self._rates = [group["lr"] for group in self._paced.param_groups]
        self._since_renewal = 0

    def _set_rates(self) -> None:
        n, i = self.settings.iterations, self._since_renewal
        # For SGD the paper divides the rate by ten after 60, 100 and 140 of 160 epochs.
        adam = self.settings.optimizer == "adam"
        factor = self.settings.decay**i if adam else 0.1 ** sum(i >= part * n for part in (0.375, 0.625, 0.875))
        for group, rate in zip(self._paced.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return bool(self.failure) or self.driver.done(self)

    def step(self) -> None:
        """One iteration. Forward, backward, update and what the method decides are timed; nothing else."""
        x, y = self._batch()
        outside = torch.get_rng_state()
        torch.set_rng_state(self._random)
        nfe, start = self.model.node.vf.nfe, clock(self.device)
        self.model.train()
        self.optimizer.zero_grad()
        try:
            terminal, logits = self._forward_backward(x, y)
            paused = clock(self.device)
            check_gradients(self.model, len(self.history.loss))
            start += clock(self.device) - paused  # a user's loop has no such look
            if self.driver.before_step(self, terminal):
                self.optimizer.step()
            for span in self.spans:
                span.clip_()  # eq. (14)
        except (IntegrationError, FloatingPointError, ValueError, DivergedError) as error:
            self._after_failure(error)
            self._lost += clock(self.device) - start
            torch.set_rng_state(outside)
            return
        evaluations, seconds = self.model.node.vf.nfe - nfe, clock(self.device) - start
        history = self.history
        history.loss.append(terminal.item())
        history.accuracy.append((logits.argmax(1) == y).float().mean().item())
        history.nfe.append(int(evaluations))
        self._since_renewal += 1
        if not self.driver.owns_rates:
            self._set_rates()
        start = clock(self.device)
        self.driver.after_step(self, terminal)
        seconds += clock(self.device) - start
        history.t_f.append(end_of(self.model))
        history.seconds.append(seconds + self._lost + (history.seconds[-1] if history.seconds else 0.0))
        self._lost = 0.0
        self._random = torch.get_rng_state()
        torch.set_rng_state(outside)
        if self.done:
            self.driver.finish(self)

    def _after_failure(self, error: Exception) -> None:
        """Goes on from another state if the driver knows one. One method that breaks must not end a table."""
        try:
            recovered = self.driver.recovers(self, error)
        except (ValueError, DivergedError) as last:
            recovered, error = False, last
        if not recovered:
            self.failure = str(error)
        elif self.done:
            self.driver.finish(self)

    def _forward_backward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the method's loss; returns the terminal loss and the logits."""
        z0, t_span = self.model.before(x), self.model.t_span
        step = Step(z0, y, *(self._solve(z0, t_span) if self.method.solves else (t_span[:1], z0[None])))
        loss = z0.new_zeros(())
        if self.method.solves:
            logits = self.model.head(step.sol[-1])
            terminal = cross_entropy(logits, y)
            if self.method.terminal:
                loss = self.method.terminal * terminal
        for term in self.terms:
            loss = loss + term(step)
        loss = loss + self.driver.penalty(self)
        if not torch.isfinite(loss):
            done = len(self.history.loss)
            raise FloatingPointError(f"the loss is not finite ({loss.item()}) after {done} iterations")
        loss.backward()
        if not self.method.solves:
            with torch.no_grad():
                logits = self.model(x)
                terminal = cross_entropy(logits, y)
        return terminal.detach(), logits

    def loss_again(self) -> Tensor:
        """The terminal loss with the model as it is now, on the first :data:`LOOKED_AT` training samples.

        One batch is not enough: at a large learning rate a model is good on one and bad on the next.
        """
        return cross_entropy(self.model(self.data.x[:LOOKED_AT]), self.data.y[:LOOKED_AT])

    def _batch(self) -> tuple[Tensor, Tensor]:
        size, data = self.settings.batch, self.data
        if size is None:
            return data.x, data.y
        if len(self._order) < size:
            self._order = torch.randperm(len(data.x), generator=self._batches)
        index, self._order = self._order[:size], self._order[size:]
        index = index.to(self.device)
        return cropped(data.x[index], data.pad, self._batches), data.y[index]

    def state_dict(self) -> dict[str, Any]:
        """All that a stopped run needs to go on as if it had not been stopped."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "driver": self.driver.state_dict(),
            "history": asdict(self.history),
            "random": self._random,
            "batches": self._batches.get_state(),
            "order": self._order,
            "since_renewal": self._since_renewal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up a stopped run."""
        self.model.load_state_dict(state["model"])
        self.driver.load_state_dict(state["driver"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = History(**state["history"])
        self._random, self._order = state["random"].cpu(), state["order"]
        self._batches.set_state(state["batches"].cpu())
        self._since_renewal = state["since_renewal"]


def check_gradients(model: torch.nn.Module, done: int) -> None:
    """Ends a run before its weights are spoiled: torchdyn's adaptive solvers never return from a NaN (U3).

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        raise FloatingPointError(f"the gradient is not finite after {done} iterations")


def end_of(model: Classifier) -> float:
    """t_f, in units of time; where the ODE is skipped, t0."""
    if isinstance(model.node, NoODE):
        return model.t_span[0].item()
    return model.node.t_f.item() if hasattr(model.node, "t_f") else model.t_span[-1].item()


def race(runs: Sequence[Any], advanced: Callable[[Any], None] = lambda run: None) -> None:
    """Trains all runs to their ends, one iteration of each in turn.

    Args:
        runs: the models in training: what has ``done`` and ``step``.
        advanced: called after each iteration, for progress bars and checkpoints.
    """
    with single_thread():
        while any(not run.done for run in runs):
            for run in runs:
                if not run.done:
                    run.step()
                    advanced(run)
