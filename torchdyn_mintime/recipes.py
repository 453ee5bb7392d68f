"""Training loops of the paper's second approach, ready to call: a model and data in, the trained model and a report out.

    pretrain            the Lyapunov loss alone on a fixed interval: stage one of Algorithm 2
    convergence_rate    Algorithm 2: ``pretrain``, then growth of t_f until the loss is met
    growth              growth alone, on the terminal loss, from as little as one step
    combined            appendix F.2: Lyapunov + terminal loss + duration in one stage, t_f learned
    vanilla             the baseline: plain torchdyn, terminal loss, a fixed span

Every loop trains in place, by Adam. An iteration is one optimizer step. A loss that explodes sends the training back to
its last good state with half the learning rate. A training that did not reach its threshold gives back its best model,
says ``converged=False`` and why.

Where the field is all that is trained, V gets no gradient in V-dot + rate V, as in the paper's code. Where layers before
the span or a head are trained too, it does, as eq. (16) is printed: an encoder without that learns to start from a large V,
which falls fast and never arrives.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchdyn_mintime.growth import DepthGrowth, DivergedError, Growth, Rescue
from torchdyn_mintime.lyapunov import MIN_POINTS, CrossEntropy, LyapunovRegularizer, TruncatedCrossEntropy
from torchdyn_mintime.numerics.integrate import IntegrationError
from torchdyn_mintime.secondary import last_solve
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import parameter_groups, spans

__all__ = ["Report", "combined", "convergence_rate", "growth", "pretrain", "vanilla"]

_log = logging.getLogger(__name__)


@dataclass
class Report:
    """What a recipe did and reached.

    Attributes:
        method: the recipe's name.
        converged: whether the threshold was met (where there is one).
        reason: why the training ended, in words.
        t_f: the terminal time of the returned model (units of time).
        loss: mean terminal loss over all data, of the returned model.
        accuracy: share of right labels from 0 to 1; None where the potential has no logits.
        steps: steps of one solve.
        nfe: evaluations of the field in one solve.
        iterations: optimizer steps, by stage.
        seconds: training time, by stage.
        growths: every growth of t_f, with its reason.
        rescues: how often an exploded loss was gone back from.
        history: per iteration, ``terminal`` loss, ``lyapunov`` loss (NaN where not used) and ``t_f``.
    """

    method: str
    converged: bool = True
    reason: str = ""
    t_f: float = math.nan
    loss: float = math.nan
    accuracy: float | None = None
    steps: int = 0
    nfe: int = 0
    iterations: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    growths: list[Growth] = field(default_factory=list)
    rescues: int = 0
    history: dict[str, list[float]] = field(default_factory=lambda: {"terminal": [], "lyapunov": [], "t_f": []})

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {100 * self.accuracy:.1f} %"
        stages = ", ".join(f"{k} {n} iterations in {self.seconds[k]:.2f} s" for k, n in self.iterations.items())
        return (
            f"{self.method}: {'converged' if self.converged else 'NOT converged'} ({self.reason}); t_f {self.t_f:.4g}, "
            f"loss {self.loss:.4g}{accuracy}, {self.nfe} evaluations; {stages}; {len(self.growths)} growths, "
            f"{self.rescues} rescues"
        )


# ------------------------------------------------------------------------------------------------------------ recipes


def pretrain(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    rate: float = 20.0,
    lr: float = 0.03,
    iterations: int = 200,
    potential: nn.Module | None = None,
    reduction: str = "points",
    batch_size: int | None = None,
) -> Report:
    """The Lyapunov loss of eq. (17) on the model's present interval, t_f held: stage one of Algorithm 2.

    Args:
        model: a module with exactly one LearnableSpan, whose template starts short: the paper's is [0, 0.05] at step 0.01.
        x: data ``[n, ...]``.
        y: labels ``[n]``, or whatever the potential takes.
        rate: kappa, per unit of time.
        lr: Adam's learning rate.
        iterations: optimizer steps.
        potential: default: cross entropy of the state's first entries, as many as there are classes.
        reduction: of :meth:`LyapunovRegularizer.penalty`; the default is the paper's code.
        batch_size: default: all data at once.

    Raises:
        ValueError: a model without exactly one span, or an interval with too few points.
    """
    run = _Run("pretraining", model, x, y, potential, rate, reduction, batch_size)
    with run.frozen():
        run.optimize(lr)
        run.pretrain(iterations)
        return run.finish("all iterations done")


def convergence_rate(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    rate: float = 20.0,
    lr: float = 0.03,
    pretraining: int = 200,
    threshold: float = 0.01,
    increment: float | None = None,
    max_t_f: float | None = None,
    patience: int = 3,
    terminal_weight: float = 0.0,
    fresh_optimizer: bool = False,
    max_iterations: int = 2000,
    potential: nn.Module | None = None,
    reduction: str = "points",
    batch_size: int | None = None,
) -> Report:
    """Algorithm 2: pre-training by the Lyapunov loss, then t_f grows until the terminal loss is at the threshold.

    Growth waits for the loss to settle (``patience=3``). With ``patience=0, fresh_optimizer=True`` this is Algorithm 2 to
    the letter, as in the paper's code: t_f grows at every step, which costs few iterations and some depth.

    Where the state has only as many entries as there are classes, give it a zero more (torchdyn's ``Augmenter``). The
    condition asks that the right logit gains on the others at every time, so orbits of interleaved classes would have
    to pass through each other, which they cannot in a plane. On two moons the published 2-16-2 net stays at a Lyapunov
    loss of about 2 at whatever learning rate, and its growth runs away; 3-16-3 converges.

    Args:
        model, x, y, rate, lr, potential, reduction, batch_size: see :func:`pretrain`.
        pretraining: optimizer steps of stage one.
        threshold: epsilon, of the mean terminal loss.
        increment, max_t_f, patience: see :class:`~torchdyn_mintime.growth.DepthGrowth`; steps are optimizer steps, or
            passes over the data where it comes in batches.
        terminal_weight: in stage two the terminal loss is added with this weight; 0 is the paper.
        fresh_optimizer: Adam starts anew not only with stage two but at every growth, which makes every step one of full size.
        max_iterations: optimizer steps of stage two, at most.

    Returns:
        The report; ``converged`` is False where max_t_f or max_iterations was reached first. The model is then the best
        one seen in stage two.
    """
    run = _Run("convergence-rate", model, x, y, potential, rate, reduction, batch_size)
    with run.frozen():
        grower = DepthGrowth(run.span, threshold, increment, max_t_f=max_t_f, patience=patience)
        run.optimize(lr)
        run.pretrain(pretraining)
        # Adam starts anew: where stage one has brought its loss to 0, the memory of that would make steps tiny or wild.
        run.optimizer.state.clear()
        return run.grow(grower, max_iterations, 1.0, terminal_weight, fresh_optimizer)


def growth(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    lr: float = 0.03,
    threshold: float = 0.01,
    increment: float | None = None,
    max_t_f: float | None = None,
    patience: int = 20,
    max_iterations: int = 5000,
    potential: nn.Module | None = None,
    batch_size: int | None = None,
) -> Report:
    """Training by the terminal loss alone, t_f growing whenever the loss has stopped falling.

    Start it from one step: ``LearnableSpan(node, torch.linspace(0, 1, 101), t_f=0.01)``.

    Args:
        model, x, y, lr, potential, batch_size: see :func:`pretrain`.
        threshold, increment, max_t_f, patience: see :class:`~torchdyn_mintime.growth.DepthGrowth`.
        max_iterations: optimizer steps, at most.
    """
    run = _Run("growth", model, x, y, potential, 1.0, "points", batch_size)
    with run.frozen():
        grower = DepthGrowth(run.span, threshold, increment, max_t_f=max_t_f, patience=patience)
        run.optimize(lr)
        return run.grow(grower, max_iterations, 0.0, 1.0, False)


def combined(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    rate: float = 20.0,
    lr: float = 0.03,
    span_lr: float | None = None,
    terminal_weight: float = 1.0,
    time_weight: float = 1.0,
    iterations: int = 400,
    threshold: float | None = 0.01,
    potential: nn.Module | None = None,
    reduction: str = "points",
    batch_size: int | None = None,
) -> Report:
    """Appendix F.2 in one stage: Lyapunov loss + terminal_weight * terminal loss + time_weight * (t_f - t0).

    t_f is learned from where the span has it (the paper: 0.05), and kept at 4 steps or more, since the Lyapunov loss
    needs points to look at; its upper bound is raised to ``span.default_max_t_f()``.

    Args:
        model, x, y, rate, lr, potential, reduction, batch_size: see :func:`pretrain`.
        span_lr: Adam's learning rate of t_f, in units of time. Default: a tenth of a step size, since one step of Adam moves
            t_f by as much (the paper's ``lr`` would move it by three steps of 0.01).
        terminal_weight, time_weight: lambda 1 and 2.
        iterations: optimizer steps.
        threshold: what counts as converged; the model with the smallest t_f that met it is given back. None: the last.
    """
    run = _Run("combined", model, x, y, potential, rate, reduction, batch_size)
    span = run.span
    keep_points(span)
    run.optimize(lr, span.step_size / 10 if span_lr is None else span_lr)
    return run.combine(iterations, terminal_weight, time_weight, threshold)


def vanilla(
    model: nn.Module, x: Tensor, y: Tensor, *, lr: float = 0.03, iterations: int = 200, classes: int | None = None
) -> Report:
    """The baseline: plain torchdyn over the node's own span, by the terminal cross entropy.

    Args:
        model: a NeuralODE, or a module that returns ``(t_eval, sol)`` or ``sol``.
        x, y: data ``[n, ...]`` and labels ``[n]``.
        lr, iterations: of Adam.
        classes: how many of the state's first entries are logits; default: as many as there are labels.
    """
    report = Report("vanilla")
    potential = CrossEntropy(classes=int(y.max()) + 1 if classes is None else classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()

    def last() -> Tensor:
        out = model(x)
        return (out[1] if isinstance(out, tuple) else out)[-1]

    start = time.perf_counter()
    for _ in range(iterations):
        loss = potential(last(), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        report.history["terminal"].append(loss.item())
    report.seconds["training"], report.iterations["training"] = time.perf_counter() - start, iterations
    with torch.no_grad():
        z = last()
        report.loss, report.accuracy = potential(z, y).mean().item(), _accuracy(potential, z, y)
    report.reason = "all iterations done"
    return report


# ------------------------------------------------------------------------------------------------- what they all share


def only_span(model: nn.Module) -> LearnableSpan:
    """The one LearnableSpan of a model.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = list(spans(model))
    if len(found) != 1:
        raise ValueError(
            f"the recipes train a model with exactly one LearnableSpan; {type(model).__name__} has {len(found)}: "
            + ("choose one and write the loop by hand" if found else "wrap it first (torchdyn_mintime.wrap)")
        )
    return found[0]


def lyapunov(model: nn.Module, potential: nn.Module, rate: float) -> LyapunovRegularizer:
    """The regularizer of the model's span. V gets a gradient where more than the field is trained (see above)."""
    span = only_span(model)
    own = {id(p) for p in span.parameters()}
    field_alone = all(id(p) in own for p in (*model.parameters(), *_parameters(potential)) if p.requires_grad)
    return LyapunovRegularizer(span, potential, rate, detach_potential=field_alone)


def keep_points(span: LearnableSpan) -> None:
    """Bounds within which a learned t_f leaves the Lyapunov loss enough points to look at, and room to grow."""
    if span.adaptive:
        raise ValueError(
            f"the Lyapunov loss needs the points of a fixed-step solver to look at; {span._stepper.name} is adaptive"
        )
    least = span.t0.item() + (MIN_POINTS - 1) * span.step_size
    span.bounds = (least, max(span.bounds[1], span.default_max_t_f()))


def _parameters(potential: Callable) -> Iterator[nn.Parameter]:
    if isinstance(potential, nn.Module):
        yield from potential.parameters()


class _Run:
    """One training: the model's parts, the counters, and the best state seen."""

    def __init__(
        self,
        method: str,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        potential: nn.Module | None,
        rate: float,
        reduction: str,
        batch_size: int | None,
    ):
        span = only_span(model)
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} samples and y {len(y)}")
        if batch_size is not None and not (isinstance(batch_size, int) and batch_size > 0):
            raise ValueError(f"batch_size must be a positive number of samples; got {batch_size!r}")
        self.model, self.span, self.x, self.y = model, span, x, y
        if potential is None:
            potential = CrossEntropy(classes=int(y.max()) + 1)
        self.potential = potential
        # The metric is the loss itself, not the truncated one.
        self.terminal: nn.Module = potential
        if isinstance(potential, TruncatedCrossEntropy):
            self.terminal = CrossEntropy(potential.head, classes=potential.classes)
        self.regularizer = lyapunov(model, potential, rate)
        self.reduction = reduction
        self.batch_size = batch_size if batch_size is not None and batch_size < len(x) else None
        self.report = Report(method)
        self.optimizer: torch.optim.Optimizer
        self.rescue: Rescue
        self.watched = False
        self.trained = nn.ModuleList([model, potential])  # what is optimized, kept and gone back to

    def frozen(self) -> "_Frozen":
        """t_f requires no gradient inside, and is as before afterwards."""
        return _Frozen(self.span.t_f)

    def optimize(self, lr: float, span_lr: float | None = None) -> None:
        """An optimizer of everything, times at their own rate, and a watch over exploding losses."""
        groups = parameter_groups(self.trained, lr=lr, span_lr=span_lr)
        self.optimizer = torch.optim.Adam([g for g in groups if g["params"]])
        self.watch()
        self.trained.train()

    def watch(self) -> None:
        """Looks out for exploding losses, with what is good judged anew: each stage has another aim."""
        if self.watched:
            self.report.rescues += self.rescue.count
        self.watched = True
        self.rescue = Rescue(self.trained, self.optimizer)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All data, in random batches where a size was given."""
        if self.batch_size is None:
            yield self.x, self.y
            return
        for index in torch.randperm(len(self.x)).to(self.x.device).split(self.batch_size):
            yield self.x[index], self.y[index]

    def losses(self, x: Tensor, y: Tensor, lyapunov: bool) -> tuple[Tensor, Tensor | None]:
        """Terminal loss and Lyapunov loss of one solve."""
        self.model(x)
        terminal = self.terminal(last_solve(self.span).states[-1], y).mean()
        return terminal, self.regularizer.penalty_of_last(y, reduction=self.reduction) if lyapunov else None

    def step(
        self, x: Tensor, y: Tensor, weights: tuple[float, float, float], decide: Callable[[float], bool | None]
    ) -> None:
        """One optimizer step on weights . (Lyapunov, terminal, duration); none where the loss exploded.

        With all data at once, ``decide(terminal loss)`` is called between the solve and the step: None is to go on, True
        to solve again, since t_f has changed, False to leave the parameters as they were measured.
        """
        whole = self.batch_size is None
        try:
            terminal, lyapunov = self.losses(x, y, weights[0] > 0)
            value = terminal.item()
            if (whole or self.rescue.exploded(value)) and self.rescue.look(value):
                return
            if whole:
                verdict = decide(value)
                if verdict is False:
                    return
                if verdict:
                    terminal, lyapunov = self.losses(x, y, weights[0] > 0)
        except IntegrationError as error:
            _log.warning("a solve failed: %s", error)
            self.rescue.look(math.inf)
            return
        loss = terminal * weights[1]
        if lyapunov is not None:
            loss = loss + weights[0] * lyapunov
        if weights[2] > 0:
            loss = loss + weights[2] * self.span.duration
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.span.clip_()
        for key, number in (
            ("terminal", value),
            ("lyapunov", math.nan if lyapunov is None else lyapunov.item()),
            ("t_f", self.span.t_f.item()),
        ):
            self.report.history[key].append(number)

    def stage(
        self,
        name: str,
        iterations: int,
        weights: tuple[float, float, float],
        decide: Callable[[float], bool | None] = lambda value: None,
    ) -> str:
        """So many optimizer steps, or until ``decide`` says False. Returns why it ended."""
        start, done, ended, why = time.perf_counter(), 0, False, "the iterations ran out"

        def judge(value: float) -> bool | None:
            nonlocal ended, why
            verdict = decide(value)
            if verdict is False:
                ended, why = True, ""
            return verdict

        try:
            while done < iterations and not ended:
                # All data at once: the solve that trains measures too, before the parameters move. In batches: all data
                # are measured first, so that a model that is done is given back as measured.
                if self.batch_size is not None:
                    metric = self.measure()
                    if self.rescue.look(metric) or judge(metric) is False:
                        continue
                for x, y in self.batches():
                    self.step(x, y, weights, judge)
                    done += 1
                    if done >= iterations:
                        break
        except DivergedError as error:
            why = str(error)
        self.report.iterations[name], self.report.seconds[name] = done, time.perf_counter() - start
        return why

    def pretrain(self, iterations: int) -> None:
        why = self.stage("pretraining", iterations, (1.0, 0.0, 0.0))
        if self.report.iterations["pretraining"] < iterations:
            _log.warning("pre-training ended early: %s", why)

    def grow(self, grower: DepthGrowth, iterations: int, lyapunov: float, terminal: float, fresh: bool) -> Report:
        best = value = math.inf
        kept = None
        rescues = 0
        self.watch()

        def decide(metric: float) -> bool | None:
            nonlocal best, kept, value, rescues
            value = metric
            if value < best:
                best, kept = value, _copy(self.trained)
            if self.rescue.count > rescues:
                rescues = self.rescue.count
                grower.restart()
            grew = grower.step(value)
            if grower.done or grower.exhausted:
                return False
            if grew and fresh:
                self.optimizer.state.clear()
            return grew or None

        why = self.stage("growth", iterations, (lyapunov, terminal, 0.0), decide)
        self.report.growths = grower.history
        self.report.converged = grower.done
        if grower.done:
            return self.finish(f"loss {value:.4g} <= {grower.threshold:g}")
        why = why or "t_f reached max_t_f"
        reason = f"{why} at t_f = {self.span.t_f.item():.4g} with loss {value:.4g} > {grower.threshold:g}"
        _log.warning(
            "%s did not converge: %s; the best model, with loss %.4g, is given back", self.report.method, reason, best
        )
        if kept is not None:
            self.trained.load_state_dict(kept)
        return self.finish(reason)

    def combine(self, iterations: int, terminal: float, duration: float, threshold: float | None) -> Report:
        shortest, kept = math.inf, None

        def decide(value: float) -> None:
            nonlocal shortest, kept
            if threshold is not None and value <= threshold and (t_f := self.span.t_f.item()) < shortest:
                shortest, kept = t_f, _copy(self.trained)

        why = self.stage("training", iterations, (1.0, terminal, duration), decide)
        if threshold is None:
            return self.finish(why)
        if kept is not None:
            self.trained.load_state_dict(kept)
            return self.finish(f"the smallest t_f at which the loss was <= {threshold:g}")
        self.report.converged = False
        reason = f"the loss never fell to {threshold:g} in {self.report.iterations['training']} iterations: {why}"
        _log.warning("combined did not converge: %s", reason)
        return self.finish(reason)

    @torch.no_grad()
    def measure(self) -> float:
        """The mean terminal loss over all data, infinite where a solve fails."""
        try:
            return self._evaluate()[0]
        except IntegrationError:
            return math.inf

    @torch.no_grad()
    def _evaluate(self) -> tuple[float, float | None]:
        self.trained.eval()
        size = self.batch_size or len(self.x)
        loss, right = 0.0, 0.0
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            self.model(x)
            z = last_solve(self.span).states[-1]
            loss += self.terminal(z, y).sum().item()
            if isinstance(self.terminal, CrossEntropy):
                right += _accuracy(self.terminal, z, y) * len(y)
        self.trained.train()
        return loss / len(self.x), right / len(self.x) if isinstance(self.terminal, CrossEntropy) else None

    def finish(self, reason: str) -> Report:
        report = self.report
        report.reason = reason
        report.rescues += self.rescue.count
        report.loss, report.accuracy = self._evaluate()
        report.t_f, report.steps, report.nfe = self.span.t_f.item(), self.span.steps, self.span.nfe
        return report


class _Frozen:
    def __init__(self, parameter: nn.Parameter):
        self.parameter, self.before = parameter, parameter.requires_grad

    def __enter__(self) -> None:
        self.parameter.requires_grad_(False)
        self.parameter.grad = None

    def __exit__(self, *_: object) -> None:
        self.parameter.requires_grad_(self.before)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _accuracy(potential: CrossEntropy, z: Tensor, y: Tensor) -> float:
    return (potential.logits(z).argmax(1) == y).double().mean().item()
