r"""What else goes on the loss: terms that keep a model with few steps a true ODE.

Step doubling. With z_n the state at the end of the n steps that were taken, and z_rn that with each step split into r
equal ones, the penalty is

    weight * mean |z_n - z_rn|^2 / mean |z_n|^2,

the denominator being held constant. Both solutions tend to the ODE's own as steps shrink, and for a method of order p
the difference is 1 - r^-p of the error of z_n: a model in which it is small is the ODE that its field describes.

The others are those of the field's other papers, as integrals over the trajectory: the trapezoid rule over its points,
of a mean over the batch and all dimensions of the sample (running costs and log-densities in the state left out).

    TaylorRegularizer    int mean (d^K z / dt^K)^2 dt           Kelly et al., 2020 (TayNODE)
    KineticEnergy        int mean f^2 / 2 dt                    Finlay et al., 2020 (RNODE)
    JacobianNorm         int mean (J^T eps)^2 dt, eps ~ N(0, I)  the same
    LocalError           sum_i dt_i |local error of step i|      Pal et al., 2021 (ERNODE), and 2022 (one random step)

The points of a field that ignores time are evaluated as one batch, once the first trajectory has shown that it gives the same.
It takes the time of a few evaluations instead of one a point; ``nfe`` counts them as if they were made one by one.
"""

import math

import torch
from torch import Tensor, nn
from torchdyn.core import NeuralODE

from torchdyn_mintime import checks
from torchdyn_mintime.field import BoundField, Field
from torchdyn_mintime.numerics.integrate import Grid, IntegrationError, integrate
from torchdyn_mintime.numerics.steppers import RungeKutta, Stepper
from torchdyn_mintime.points import AtPoints
from torchdyn_mintime.secondary import LastSolve, last_solve, refine, solve_again, undisturbed, untraced
from torchdyn_mintime.span import LearnableSpan
from torchdyn_mintime.wrapping import spans

__all__ = ["JacobianNorm", "KineticEnergy", "LocalError", "StepDoubling", "TaylorRegularizer"]


class OverSpans:
    """A weighted penalty of the last forward of every span of a model, added up.

    Attributes:
        nfe: extra evaluations of the field in the last call of ``penalty``.
    """

    def __init__(self, model: nn.Module, weight: float):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module that holds LearnableSpans; got {type(model).__name__}")
        if next(spans(model), None) is None:
            raise ValueError(
                f"{type(model).__name__} has no LearnableSpan; wrap it first: torchdyn_mintime.wrap(model)"
            )
        self.model, self.weight = model, checks.number(weight, "weight", least=0)
        self.nfe = 0

    def _of_span(self, span: LearnableSpan) -> Tensor:
        """The penalty of one span, a scalar; what it evaluates is added to ``nfe``."""
        raise NotImplementedError

    def _of_all(self) -> Tensor:
        values = [self._of_span(span) for span in spans(self.model)]
        return torch.stack([v.to(values[0]) for v in values]).sum()


class StepDoubling(OverSpans):
    """The relative squared difference between the solution at the steps taken and the one with each step refined.

    Add :meth:`penalty` to the loss. Its gradient in the parameters, t_f, a learnable t0 and x is that of the two
    discrete solutions, under every sensitivity. Steps of an adaptive solver are held: the accepted ones are split.

    The field's data control and noise are those of the last forward. Batch statistics, ``nfe`` and the times that
    torchdyn keeps on modules stay as they are. With dropout active in the field both solutions are made without it, as
    masks that change with every evaluation leave no ODE to compare with.

    Cost: ``refinement`` times the evaluations of the forward; under an adjoint, whose gradients are not those of the
    steps, and with active dropout, once more the forward's. The refined solution is always kept for backward.

    Args:
        model: a LearnableSpan, or a module that holds some (their penalties are added).
        weight: of the penalty, in units of loss; about 1 fits a loss of size 1.
        refinement: into how many parts each step is split, 2 or more. Methods of order 1 and 2 need 4: there half
            the step removes too little of the error to show it.
        every: the penalty is taken at every ``every``-th call, ``every`` times as heavy, and is 0 at the others. Every
            4th is as good as every one on two annuli, at a quarter of the cost.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Raises:
        TypeError: ``model`` is not a module, or a value is not a number.
        ValueError: ``model`` has no LearnableSpan, or a value cannot be used.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
        >>> span = LearnableSpan(NeuralODE(net, solver="rk4"), torch.tensor([0.0, 1.0]))  # doctest: +ELLIPSIS
        Your vector field ...
        >>> doubling = StepDoubling(span)
        >>> t_eval, sol = span(torch.randn(8, 2))
        >>> loss = sol[-1].square().mean() + doubling.penalty()
        >>> loss.backward()
        >>> doubling.nfe, span.nfe
        (8, 4)
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, refinement: int = 2, *, every: int = 1):
        super().__init__(model, weight)
        self.refinement = checks.count(refinement, "refinement", 2)
        self.every = checks.count(every, "every", 1)
        self._calls = 0

    def penalty(self, x: Tensor | None = None) -> Tensor:
        """The penalty of the last forward, or of a forward from ``x``.

        Args:
            x: what ``model`` is called with; the call leaves no trace. Default: the last forward of every span.

        Returns:
            A scalar, of float32 at least.

        Raises:
            RuntimeError: no forward was made, or it was made without gradients and they are wanted now.
            IntegrationError: the refined solution is not finite.
        """
        self.nfe = 0
        self._calls += 1
        if (self._calls - 1) % self.every:
            return next(spans(self.model)).t_f.new_zeros(())
        if x is None:
            value = self._of_all()
        else:
            with undisturbed(self.model):
                self.model(x)
                self.nfe = sum(span.nfe for span in spans(self.model))
                value = self._of_all()
        return value * (self.weight * self.every)

    def _of_span(self, span: LearnableSpan) -> Tensor:
        last = last_solve(span)
        wanted = torch.is_grad_enabled() and (span.t_f.requires_grad or bool(last.bound.parameters))
        if wanted and not last.states.requires_grad:
            raise RuntimeError(
                "the last forward was made without gradients; call the model with gradients enabled, pass x, "
                "or ask for the penalty under torch.no_grad()"
            )
        taken = last.states[-1]
        # An adjoint's gradient is the ODE's: both solutions would have the same one, and their difference none.
        exact = span.sensitivity == "autograd" or not torch.is_grad_enabled()
        dropout = any("Dropout" in kind for kind in last.bound.random_or_stateful())
        with untraced(last.bound):
            if not last.reaches_end or not exact or dropout:
                taken = self._solve(last, span, 1)
            refined = self._solve(last, span, self.refinement)
        return relative_square(taken - refined, taken)

    def _solve(self, last: LastSolve, span: LearnableSpan, parts: int) -> Tensor:
        grid = refine(last.steps, last.grid.start, last.grid.end, parts)
        try:
            solution, evaluations = solve_again(last.bound, last.x, grid, span._stepper)
        except IntegrationError as error:
            error.add_note(f"in step doubling, where each step of the last forward is split into {parts}")
            raise
        self.nfe += evaluations
        return solution.states[-1]

    def __repr__(self) -> str:
        return f"StepDoubling(weight={self.weight:g}, refinement={self.refinement}, every={self.every})"


class _AlongTrajectory:
    """An integral over the trajectory's points, of what a subclass makes of the field at each."""

    def __init__(self, model: nn.Module, weight: float = 1.0):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a NeuralODE, or a module of LearnableSpans; got {type(model).__name__}")
        if not isinstance(model, NeuralODE) and next(spans(model), None) is None:
            raise ValueError(f"{type(model).__name__} has no LearnableSpan; wrap it first, by torchdyn_mintime.wrap")
        self.model = model
        self.weight = checks.number(weight, "weight", least=0)
        self.nfe = 0
        self._points = AtPoints()

    def penalty(self, t_eval: Tensor | None = None, sol: Tensor | None = None) -> Tensor:
        """The weighted integral, with its gradient in everything that the trajectory depends on.

        Args:
            t_eval, sol: what a call of the model returned, ``[points]`` and ``[points, batch, ...]``: for a bare
                NeuralODE. Default: the last forward of every span in the model.

        Returns:
            A scalar.

        Raises:
            RuntimeError: no forward was made.
            ValueError: there are too few points to integrate over.
        """
        self.nfe = 0
        wanted = torch.is_grad_enabled()
        # Derivatives of the field are needed for the value itself.
        with torch.enable_grad():
            if t_eval is not None or sol is not None:
                value = self._of_given(t_eval, sol)
            elif isinstance(self.model, NeuralODE):
                raise ValueError("a bare NeuralODE remembers no forward: pass what it returned, penalty(t_eval, sol)")
            else:
                values = [self._of_span(span) for span in spans(self.model)]
                value = torch.stack([v.to(values[0]) for v in values]).sum()
            value = self.weight * value
        return value if wanted else value.detach()

    def _of_span(self, span: LearnableSpan) -> Tensor:
        last = last_solve(span)
        t_eval = last.grid.times(span.t_f.dtype, span.t_f.device)
        with untraced(last.bound):
            return self._integral(last.bound, t_eval, last.states, span.adaptive)

    def _of_given(self, t_eval: Tensor | None, sol: Tensor | None) -> Tensor:
        if t_eval is None or sol is None or t_eval.dim() != 1 or len(t_eval) != len(sol):
            raise ValueError("pass both t_eval [points] and sol [points, batch, ...], as one call returned them")
        node = self.model.node if isinstance(self.model, LearnableSpan) else self.model
        if not isinstance(node, NeuralODE):
            raise ValueError("t_eval and sol are those of one NeuralODE or span; this model has others around it")
        with Field(node).beside(sol[0]) as bound, untraced(bound):
            return self._integral(bound, t_eval, sol, False)

    def _integral(self, bound: BoundField, t_eval: Tensor, sol: Tensor, adaptive: bool) -> Tensor:
        least = 5 if adaptive else 2
        if len(t_eval) < least:
            raise ValueError(
                f"the trajectory has {len(t_eval)} points, too few to integrate over: give the span a template of "
                f"{least} points or more, or ask for them by save_at"
            )
        before = bound.nfe
        self._prepare(bound, sol[0])
        (values,) = self._points(lambda t, z, copies: [self._at(bound, t, z, copies)], bound, t_eval, sol)
        # One of all points counts as many.
        self.nfe += (bound.nfe - before) * (len(t_eval) if self._points.together else 1)
        means = values.mean(1)
        sizes = t_eval.diff().abs().to(means)
        return (sizes * (means[1:] + means[:-1]) / 2).sum()

    def _prepare(self, bound: BoundField, z: Tensor) -> None:
        """Called once before a trajectory, with its first state."""

    def _at(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        """The integrand of each sample, ``[batch]``, at one time; in z the batch stands ``copies`` times."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weight={self.weight:g})"


class KineticEnergy(_AlongTrajectory):
    """The integral of half the mean square of the state's speed: short, straight paths cost least (RNODE).

    Cost: one evaluation a point.

    Args:
        model: a bare NeuralODE, a LearnableSpan, or a module that holds some (their penalties are added).
        weight: .01 in the paper.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> node = NeuralODE(lambda t, z, args: -z, solver="rk4")
        Your vector field ...
        >>> t_eval, sol = node(torch.ones(4, 2), torch.linspace(0, 1, 101))
        >>> round(KineticEnergy(node).penalty(t_eval, sol).item(), 3)  # (1 - exp(-2)) / 4
        0.216
    """

    def _at(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        velocity = bound.function(t.to(z), z)
        return _mean_square(bound, velocity) / 2


class JacobianNorm(_AlongTrajectory):
    """The integral of the mean square of J^T eps, an estimate of the field's Jacobian's Frobenius norm (RNODE).

    eps is one draw a trajectory: Hutchinson's noise where the field has one (a CNF), else from N(0, I). Its mean over
    eps is |J|^2 divided by the dimensions of a sample.

    Cost: one evaluation and one backward pass through it a point.

    Args:
        model: a bare NeuralODE, a LearnableSpan, or a module that holds some (their penalties are added).
        weight: .01 in the paper.
        generator: of the draws.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.
        noise: the eps of the last trajectory.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> node = NeuralODE(lambda t, z, args: -3 * z, solver="rk4")
        Your vector field ...
        >>> t_eval, sol = node(torch.randn(4096, 2), torch.linspace(0, 1, 5))
        >>> round(JacobianNorm(node).penalty(t_eval, sol).item())  # 9 |eps|^2 / 2
        9
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, *, generator: torch.Generator | None = None):
        super().__init__(model, weight)
        self.generator = generator
        self.noise: Tensor | None = None

    def _prepare(self, bound: BoundField, z: Tensor) -> None:
        sample = _sample(bound, z)
        noises = [getattr(m, "noise", None) for m in bound._modules if hasattr(m, "trace_estimator")]
        found = next((n for n in noises if isinstance(n, Tensor) and n.shape == sample.shape), None)
        if found is None:
            # Drawn as numbers of the state's dtype, on the generator's device if it has its own.
            device = sample.device if self.generator is None else self.generator.device
            found = torch.randn(sample.shape, generator=self.generator, dtype=sample.dtype, device=device)
        self.noise = found.detach().to(sample)

    def _at(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        z = z if z.requires_grad else z.detach().requires_grad_()
        velocity = _sample(bound, bound.function(t.to(z), z))
        assert self.noise is not None
        (product,) = _gradients(velocity, (z,), self.noise.repeat(copies, *[1] * (self.noise.dim() - 1)))
        return _mean_square(bound, product)


class TaylorRegularizer(_AlongTrajectory):
    """The integral of the mean square of the K-th total derivative of the state in time (TayNODE).

    d^K z / dt^K is taken along the solution: d^2 z / dt^2 = df/dt + J f, and so on. K = 2 leaves straight lines at a
    constant speed free, K = 3 parabolas.

    Cost: one evaluation and 2 (K - 1) backward passes through it, each of the graph that those before made, a point.

    Args:
        model: a bare NeuralODE, a LearnableSpan, or a module that holds some (their penalties are added).
        weight: 6e-5 for MNIST (K = 3), 3e-4 for flows (K = 2) in the paper's code.
        derivative: K, 1 or more.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> node = NeuralODE(lambda t, z, args: -2 * z, solver="rk4")
        Your vector field ...
        >>> t_eval, sol = node(torch.ones(4, 2), torch.linspace(0, 1, 101))
        >>> round(TaylorRegularizer(node).penalty(t_eval, sol).item(), 2)  # 16 exp(-4 t): 4 (1 - exp(-4))
        3.93
    """

    def __init__(self, model: nn.Module, weight: float = 1.0, derivative: int = 2):
        super().__init__(model, weight)
        self.derivative = checks.count(derivative, "derivative", 1)

    def _at(self, bound: BoundField, t: Tensor, z: Tensor, copies: int) -> Tensor:
        z = z if z.requires_grad else z.detach().requires_grad_()
        t = t.to(z)
        t = t if t.requires_grad else t.detach().requires_grad_()
        velocity = value = bound.function(t, z)
        for _ in range(self.derivative - 1):
            value = _rate_of_change(value, t, z, velocity)
        return _mean_square(bound, value)


class LocalError(OverSpans):
    """The sum over the steps of step size times the norm of the local error (ERNODE); or of one step drawn at random.

    The local error is that of one step from the state before it. For a solver with an error estimate (dopri5, tsit5) it
    is that estimate, for another one the difference between the step and two of half its size. Norms are root mean
    squares over all entries of the state. Steps that an adaptive solver accepted are held.

    Unlike step doubling, which compares the ends, it does not see how errors add up, cancel or grow along the way.

    Cost: for a solver with an estimate about twice the forward, whose stages are not kept; for another one twice the
    forward too. With ``sampled``, twice one step where the trajectory holds the states of all steps; for an adaptive
    solver, and under an adjoint, also the steps up to it.

    Args:
        model: a LearnableSpan, or a module that holds some (their penalties are added).
        weight: 10 to 100 in the paper.
        sampled: one step, drawn with equal chances, times the number of steps: the same in the mean.
        generator: of the draws.

    Attributes:
        nfe: extra evaluations of the field in the last call of :meth:`penalty`.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> span = LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4"), torch.linspace(0, 1, 3))
        Your vector field ...
        >>> local = LocalError(span, sampled=True)
        >>> t_eval, sol = span(torch.randn(8, 2))
        >>> (sol[-1].square().mean() + local.penalty()).backward()
        >>> span.nfe, local.nfe
        (8, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        weight: float = 1.0,
        *,
        sampled: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__(model, weight)
        self.sampled, self.generator = sampled, generator

    def penalty(self) -> Tensor:
        """The weighted sum for the last forward of every span, a scalar of float32 at least.

        Raises:
            RuntimeError: no forward was made.
        """
        self.nfe = 0
        return self.weight * self._of_all()

    def _of_span(self, span: LearnableSpan) -> Tensor:
        last, stepper = last_solve(span), span._stepper
        n = len(last.steps) - 1
        chosen = range(n)
        if self.sampled:
            device = None if self.generator is None else self.generator.device
            drawn = int(torch.randint(n, (), generator=self.generator, device=device))
            chosen = range(drawn, drawn + 1)
        coarse = Grid(last.steps, last.grid.start, last.grid.end)
        with untraced(last.bound):
            before = last.bound.nfe
            states = list(last.states) if not span.adaptive and last.grid.keep is None else None
            exact = span.sensitivity == "autograd" or not torch.is_grad_enabled()
            if states is None or not exact:
                states = self._states(last, coarse, stepper, chosen[-1] + 1 if not stepper.adaptive else chosen[-1])
            terms = [self._term(last, coarse, stepper, i, states) for i in chosen]
            self.nfe += last.bound.nfe - before
        return torch.stack(terms).sum() * (n / len(chosen))

    def _states(self, last: LastSolve, grid: Grid, stepper: Stepper, upto: int) -> list[Tensor]:
        """The states around the first ``upto`` steps, with their graph."""
        states = [last.x]
        for i in range(upto):
            states.append(self._step(last, _part(grid, i, 1), stepper, states[-1]))
        return states

    def _step(self, last: LastSolve, grid: Grid, stepper: Stepper, z: Tensor) -> Tensor:
        return integrate(last.bound.function, z, grid, stepper, adapt=False).states[-1]

    def _term(self, last: LastSolve, grid: Grid, stepper: Stepper, i: int, states: list[Tensor]) -> Tensor:
        size = torch.as_tensor(grid.size(i), dtype=torch.float64).abs()
        if stepper.adaptive:
            error = _estimate(last.bound, states[i], _part(grid, i, 1), stepper)
        else:
            error = states[i + 1] - self._step(last, _part(grid, i, 2), stepper, states[i])
        error = error.to(torch.promote_types(error.dtype, torch.float32))
        norm = torch.linalg.vector_norm(error) / math.sqrt(max(error.numel(), 1))
        return size.to(norm) * norm

    def __repr__(self) -> str:
        return f"LocalError(weight={self.weight:g}, sampled={self.sampled})"


def _part(grid: Grid, i: int, parts: int) -> Grid:
    """The i-th step alone, with the ends that carry its gradient, split into equal parts."""
    n = len(grid.nodes) - 1
    return refine(
        [grid.nodes[i], grid.nodes[i + 1]],
        grid.start if i == 0 else None,
        grid.end if i == n - 1 else None,
        parts,
    )


def _estimate(bound: BoundField, z: Tensor, grid: Grid, stepper: Stepper) -> Tensor:
    """A step's own error estimate, dt sum_i e_i k_i, with its gradient."""
    stepper.prepare(z)
    size, left = (torch.as_tensor(v, dtype=torch.float64) for v in (grid.size(0), grid.left(0)))
    dt, times = size.to(z), [(left + c * size).to(z) for c in stepper.nodes]
    _, stages = stepper.step(bound.function, z, times, dt)
    return stepper.error(stages, 1.0) * dt if isinstance(stepper, RungeKutta) else stepper.error(stages, float(dt))


def _sample(bound: BoundField, z: Tensor) -> Tensor:
    """The entries of a state that are the sample's own: no running cost, no log-density."""
    node = bound.node
    excess = sum(hasattr(m, "trace_estimator") for m in bound._modules)
    excess += 1 if node.integral_loss is not None and node.sensitivity == "autograd" else 0
    return z[:, excess:] if excess else z


def _mean_square(bound: BoundField, z: Tensor) -> Tensor:
    """``[batch]``: of each sample's own entries. A state may be one number a sample, or one number."""
    square = _sample(bound, z).square()
    return square.flatten(1).mean(1) if square.dim() > 1 else square.reshape(-1)


def _gradients(output: Tensor, inputs: tuple[Tensor, ...], weights: Tensor | None) -> tuple[Tensor, ...]:
    """weights^T d output / d inputs, with a graph; zero where nothing depends on an input."""
    if not output.requires_grad:
        return tuple(torch.zeros_like(i) for i in inputs)
    found = torch.autograd.grad(output, inputs, weights, create_graph=True, allow_unused=True)
    return tuple(torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True))


def _rate_of_change(value: Tensor, t: Tensor, z: Tensor, velocity: Tensor) -> Tensor:
    """d value / dt + (d value / dz) velocity: the derivative of value(t, z(t)) in time.

    Two reverse passes, since v^T J is linear in v: its derivative in v, along the velocity, is J velocity. Forward-mode
    derivatives would not pass through fields that take gradients themselves (a CNF's divergence).
    """
    v = torch.zeros_like(value, requires_grad=True)
    by_t, by_z = _gradients(value, (t, z), v)
    (rate,) = _gradients((by_z * velocity).sum() + by_t.sum(), (v,), None)
    return rate


def relative_square(difference: Tensor, state: Tensor) -> Tensor:
    """mean difference^2 / mean state^2, the latter detached; in float32 at least."""
    dtype = torch.promote_types(state.dtype, torch.float32)
    size = state.detach().to(dtype).square().mean().clamp_min(torch.finfo(dtype).tiny)
    return difference.to(dtype).square().mean() / size
