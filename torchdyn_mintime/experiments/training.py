"""The training loop. Several models take turns, one iteration each, so that a busy machine slows all of them alike."""

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from math import nan
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from torchdyn_mintime import IntegrationError, spans
from torchdyn_mintime.depth.rollback import DivergedError
from torchdyn_mintime.experiments import datasets, measure, methods, tasks
from torchdyn_mintime.experiments.context import History, Settings, Step

__all__ = ["LOOKED_AT", "Run", "race"]

LOOKED_AT = 1024
"""Number of training samples on which a search checks a model."""


class Run:
    """One model in training, and the :class:`Context` of its driver.

    Args:
        task, method, settings, data: what is trained, how, and on what.
        device: where it is trained.
        start: the state_dict of a trained model to begin with; None: a new model.

    Attributes:
        history: what was recorded so far.
        failure: why training failed, or an empty text.
        lost: seconds of failed iterations, which are added to the next one.
    """

    def __init__(
        self,
        task: tasks.Task,
        method: methods.Method,
        settings: Settings,
        data: datasets.Data,
        device: str = "cpu",
        start: dict[str, Tensor] | None = None,
    ):
        self.task, self.method, self.settings, self.device = task, method, settings, torch.device(device)
        self.data = data.to(self.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)  # the same initialisation for every method
            self.model = task.model(method, settings).to(self.device)
            if start is not None:
                self.model.load_state_dict(start)
            # A method's random numbers must not depend on which other methods train beside it.
            self._random = torch.get_rng_state()
        self.batches = datasets.Batches(self.data, settings.batch, settings.seed)  # the same batches for every method
        self._solve, self._terms = method.solver(self.model), method.loss_terms(self.model, settings)
        self.history, self.failure, self.lost = History(), "", 0.0
        self.renew_optimizer()
        self.driver = method.driver(self)

    def renew_optimizer(self) -> None:
        """Makes a new optimizer, at the first learning rate."""
        self._optimizers, self.optimizer = self.method.optimizers(self.model, self.settings)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._since_renewal = 0

    @property
    def done(self) -> bool:
        """Whether training is over."""
        return bool(self.failure) or self.driver.done

    def step(self) -> None:
        """Takes one iteration. Only forward, backward, update and the driver's work are timed."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._random)
            self._iterate(*self.batches.next())
            self._random = torch.get_rng_state()

    def _iterate(self, x: Tensor, y: Tensor) -> None:
        self._batch = x, y
        nfe, start = self.model.node.vf.nfe, measure.clock(self.device)
        self.model.train()
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        try:
            loss, output = self._backward(x, y)
            paused = measure.clock(self.device)
            self._check_gradients()
            start += measure.clock(self.device) - paused  # a user's loop has no such check
            if self.driver.before_step(loss):
                for optimizer in self._optimizers:
                    optimizer.step()
            for span in spans(self.model):
                span.clip_()  # eq. (14)
        except (IntegrationError, FloatingPointError, ValueError, DivergedError) as error:
            self._recover(error)
            self.lost += measure.clock(self.device) - start
            return
        history, seconds = self.history, self.lost + measure.clock(self.device) - start
        history.nfe.append(int(self.model.node.vf.nfe - nfe))
        history.loss.append(loss.item())
        if self.task.goal.accuracy is not None:
            history.accuracy.append(self.task.goal.accuracy(output, y).item())
        self._since_renewal += 1
        if not self.driver.owns_rates:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.settings.rate_factor(self._since_renewal)
        start = measure.clock(self.device)
        self.failure = self.driver.after_step(loss)
        seconds += measure.clock(self.device) - start
        history.t_f.append(self.model.t_f)
        history.seconds.append(seconds + history.total_seconds)
        self.lost = 0.0
        self._finish()

    def _backward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the gradient of the method's loss, and returns the terminal loss and the output."""
        method, model, goal, done = self.method, self.model, self.task.goal, len(self.history.loss)
        z0 = model.before(x)
        t_eval, sol = self._solve(z0, model.t_span) if method.solves else (model.t_span[:1], z0[None])
        step = Step(z0, y, t_eval, sol, done)
        loss = z0.new_zeros(())
        if method.solves:
            output = model.head(sol[-1])
            terminal = goal.loss(output, y)
            loss = method.terminal * terminal if method.terminal else loss
        for term in self._terms:
            loss = loss + term(step)
        loss = loss + self.driver.penalty()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite after {done} iterations")
        loss.backward()
        if not method.solves:
            with torch.no_grad():
                output = model(x)
                terminal = goal.loss(output, y)
        return terminal.detach(), output

    def _check_gradients(self) -> None:
        """Raises an error before NaN gets into the weights, where torchdyn's adaptive solvers would never end (U3)."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            raise FloatingPointError(f"the gradient is not finite after {len(self.history.loss)} iterations")

    def _recover(self, error: Exception) -> None:
        """Goes on from an earlier state if the driver has one, else ends this run alone: other methods of a table go on."""
        solvable = isinstance(error, IntegrationError | FloatingPointError)
        try:
            if not (solvable and self.driver.recovers(str(error))):
                self.failure = str(error)
        except (ValueError, DivergedError) as last:
            self.failure = str(last)
        if not self.failure:
            self._finish()

    def _finish(self) -> None:
        if self.done:
            self.failure = self.driver.finish() or self.failure

    def loss_of_batch(self) -> Tensor:
        """Computes the terminal loss of the present batch again, and returns it."""
        x, y = self._batch
        return self.task.goal.loss(self.model(x), y)

    def loss_again(self) -> Tensor:
        """Returns the terminal loss of the model as it is now, on the first :data:`LOOKED_AT` training samples.

        One batch is not enough: at a large learning rate a model may be good on one batch and bad on the next.
        """
        x = self.data.x[:LOOKED_AT]
        if self.data.draw is not None:
            x = self.data.draw(LOOKED_AT, torch.Generator().manual_seed(self.settings.seed)).to(self.device)
        return self.task.goal.loss(self.model(x), self.data.y[:LOOKED_AT])

    def judge(self) -> dict[str, Any]:
        """Returns the figures of the trained model, except its inference time.

        A model that cannot be solved has NaN in their place, and has failed.
        """
        goal, settings, history, failure = self.task.goal, self.settings, self.history, self.failure
        figures: dict[str, Any] = {
            "task": self.task.name,
            "method": self.method.label,
            "seed": settings.seed,
            "lr": settings.lr,
            "iterations": len(history.loss),
            "wrapped": self.method.span is not None or self.method.skips,
            "t_f": self.model.t_f,
            "steps": 0,
            "nfe": 0,
            "training": history.total_seconds,
            **(history.figures(settings.target) if goal.accuracy else {}),
            **dict.fromkeys(goal.figures, nan),
        }
        try:
            if goal.judges_failed or not failure:
                goal.judge(self.model, self.data, figures)
        except IntegrationError as error:
            failure = failure or f"the trained model cannot be solved: {error}"
        return {**figures, "failure": failure}

    def searched(self) -> dict[str, Any]:
        """Returns the verdict of a search and the figures of its models at all depths that passed; else an empty dictionary."""
        verdict = self.driver.verdict
        if verdict is None:
            return {}
        front = []
        for model in self.driver.front():
            front.append({"t_f": model.t_f})
            self.task.goal.judge(model, self.data, front[-1])
        return {"verdict": asdict(verdict), "front": front}

    def state_dict(self) -> dict[str, Any]:
        """Returns all that a stopped run needs to go on as if it had never stopped."""
        parts = (self.model, self.driver, self.batches, *self._optimizers)
        return {
            "parts": [part.state_dict() for part in parts],
            "history": asdict(self.history),
            "random": self._random,
            "since_renewal": self._since_renewal,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a stopped run from its :meth:`state_dict`."""
        parts = (self.model, self.driver, self.batches, *self._optimizers)
        for part, own in zip(parts, state["parts"], strict=True):
            part.load_state_dict(own)
        self.history, self._since_renewal = History(**state["history"]), state["since_renewal"]
        self._random = state["random"].cpu()


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed. A second Ctrl-C raises KeyboardInterrupt as usual."""
    if threading.current_thread() is not threading.main_thread():  # signals go to that one
        yield lambda: False
        return
    pressed = False

    def remember(*_: Any) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def race(
    runs: Sequence[Run],
    console: Console | None = None,
    title: str = "",
    advanced: Callable[[Run], None] = lambda run: None,
) -> bool:
    """Trains all runs to their ends, one iteration of each in turn.

    Ctrl-C stops it after the present iteration, so that all runs can go on from there. A second Ctrl-C stops it at once.

    Args:
        runs: the models in training.
        console: shows a progress bar for each run; None: no bars.
        title: the beginning of the bars' labels.
        advanced: called with the run after each of its iterations, to save checkpoints.

    Returns:
        Whether all runs have ended.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    shown = Progress(*columns, console=console, disable=console is None)
    with measure.single_thread(), _interrupts() as interrupted, shown as progress:
        bars = [progress.add_task(f"{title}: {run.method.label}", state="") for run in runs]
        while any(not run.done for run in runs):
            for run, bar in zip(runs, bars, strict=True):
                if run.done:
                    continue
                run.step()
                loss, t_f = run.history.loss, run.history.t_f
                done, latest = len(loss), f"loss {loss[-1]:.3f}  t_f {t_f[-1]:.3f}" if loss else ""
                # A second stage takes iterations beyond those of the settings.
                total = max(done, 1 if run.done else run.settings.iterations)
                progress.update(bar, total=total, completed=done, state=run.failure[:60] or latest)
                advanced(run)
                if interrupted():
                    return False
    return True
