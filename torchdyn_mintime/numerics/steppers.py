r"""One step of an explicit method, with the right nodes and with coefficients as exact as the state.

A Runge-Kutta step from t to t + dt is

    k_i = f(t + c_i dt, z + dt sum_j a_ij k_j),    z_new = z + dt sum_i b_i k_i,    error = dt sum_i e_i k_i.

Coefficients are Python floats, so that they never carry a dtype of their own: a float64 state is stepped in float64.
A step size that is a float goes into fused ``add(..., alpha=)`` calls; one that is a tensor carries a gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchdyn.numerics.solvers import hyper, ode
from torchdyn.numerics.solvers._constants import construct_dopri5, construct_rk4, construct_tsit5
from torchdyn.numerics.solvers.templates import MultipleShootingDiffeqSolver

from torchdyn_mintime.numerics.learned import LearnableSolver, interpolant_of, weighted_step

__all__ = [
    "AsynchronousLeapfrog",
    "ForeignStepper",
    "Hypersolver",
    "LearnedStepper",
    "RungeKutta",
    "Stepper",
    "make_stepper",
]

VectorField = Callable[[Any, Tensor], Tensor]
Times = Sequence[Tensor | None]
Weights = tuple[tuple[float, tuple[int, ...]], ...]
"""Weights and the stages that have them. Stages of one weight are added first: a weight is a product in backward."""


class Stepper:
    """One step of a one-step method.

    Attributes:
        name: as in error messages.
        order: order of the method, the one its step control assumes.
        adaptive: whether it estimates its error, so that the drive chooses the steps.
        nodes: the c_i (numbers, or tensors where they are learned), at which the stage times are given to :meth:`step`.
        evaluations: evaluations of f in a step (the first one of an adaptive step is the last of the step before).
        timed: whether the stepper itself needs times, even if f does not.
        first_same_as_last: whether the last stage is f at the new state.
        interpolant: what gives states inside a step (:mod:`~torchdyn_mintime.numerics.dense`), ``[stages, degree]``; None
            where the method has none.
    """

    name: str
    order: int
    adaptive = False
    nodes: Sequence[float | Tensor] = (0.0,)
    evaluations = 1
    timed = False
    first_same_as_last = False
    interpolant: Any = None

    def toward(self, change: float) -> "Stepper":
        """Returns the stepper of steps of the sign of ``change``, a difference of times."""
        return self

    def prepare(self, x: Tensor) -> "Stepper":
        """Returns the stepper of one solve from the initial state ``x``. Called once before it, after :meth:`toward`."""
        return self

    def step(
        self, f: VectorField, x: Tensor, times: Times, dt: float | Tensor, k1: Tensor | None = None
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns the state after a step of size ``dt``, and its stages. ``times[i]`` is t + c_i dt; None if f ignores it."""
        raise NotImplementedError

    def error(self, stages: Sequence[Tensor], dt: float) -> Tensor:
        """Returns the estimate of the local error, with the shape of the state (adaptive steppers)."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


def _combine(x: Tensor, dt: float | Tensor, stages: Sequence[Tensor], weights: Weights) -> Tensor:
    """Returns x + dt * sum_j w_j k_j."""
    if not weights:
        return x
    (w, of_first), *rest = weights
    if isinstance(dt, float):
        out = torch.add(x, _sum(stages, of_first), alpha=dt * w)
        for w, of_next in rest:
            # In place is safe: `out` is fresh, and an addition keeps neither of its terms for backward.
            out.add_(_sum(stages, of_next), alpha=dt * w)
        return out
    if not rest:
        return torch.addcmul(x, dt, _sum(stages, of_first), value=w)
    # One product with dt for all stages: each would cost a sum over the state in backward.
    return torch.addcmul(x, dt, _weighted_sum(stages, weights))


def _weighted_sum(stages: Sequence[Tensor], weights: Weights) -> Tensor:
    (w, of_first), *rest = weights
    out = _sum(stages, of_first) * w
    for w, of_next in rest:
        out.add_(_sum(stages, of_next), alpha=w)
    return out


def _sum(stages: Sequence[Tensor], which: tuple[int, ...]) -> Tensor:
    first, *rest = which
    out = stages[first]
    for n, j in enumerate(rest):
        out = out.add_(stages[j]) if n else out + stages[j]
    return out


def _nonzero(row: Sequence[float]) -> Weights:
    groups: dict[float, list[int]] = {}
    for j, w in enumerate(row):
        if w != 0.0:
            groups.setdefault(float(w), []).append(j)
    return tuple((w, tuple(which)) for w, which in groups.items())


class RungeKutta(Stepper):
    """An explicit Runge-Kutta method given by its tableau."""

    def __init__(
        self,
        name: str,
        order: int,
        c: Sequence[float],
        a: Sequence[Sequence[float]],
        b: Sequence[float],
        e: Sequence[float] | None = None,
        interpolant: Sequence[Sequence[float]] | None = None,
    ):
        self.interpolant = interpolant
        self.name, self.order, self.nodes = name, order, tuple(c)
        self.adaptive = e is not None
        self.first_same_as_last = self.adaptive
        self.evaluations = len(c)
        self._a = tuple(_nonzero(row) for row in a)
        self._b = _nonzero(b)
        self._e = _nonzero(e) if e is not None else ()

    def step(self, f, x, times, dt, k1=None):
        stages = [f(times[0], x) if k1 is None else k1]
        x_new = None
        for t, row in zip(times[1:], self._a, strict=True):
            x_new = _combine(x, dt, stages, row)
            stages.append(f(t, x_new))
        if not self.first_same_as_last:  # else the last stage was taken at the new state itself
            x_new = _combine(x, dt, stages, self._b)
        return x_new, stages

    def error(self, stages, dt):
        return _weighted_sum(stages, self._e).mul_(dt)


def _euler() -> RungeKutta:
    return RungeKutta("euler", 1, [0.0], [], [1.0], interpolant=[[1.0]])


def _midpoint() -> RungeKutta:
    return RungeKutta("midpoint", 2, [0.0, 0.5], [[0.5]], [0.0, 1.0], interpolant=[[1.0, -1.0], [0.0, 1.0]])


def _rk4() -> RungeKutta:
    # torchdyn reads c = (0, 1/2, 1/2) for the stages 2 to 4, which is first order for a field that depends on t.
    a = [[1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]]
    # The cubic with an error of the order h^4 (Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, II.6).
    middle = [0.0, 1.0, -2 / 3]
    inside = [[1.0, -3 / 2, 2 / 3], middle, middle, [0.0, -1 / 2, 2 / 3]]
    return RungeKutta("rk4", 4, [0.0, 1 / 2, 1 / 2, 1.0], a, [1 / 6, 1 / 3, 1 / 3, 1 / 6], interpolant=inside)


def _dopri5() -> RungeKutta:
    """Returns the method of Dormand and Prince (1980), with Shampine's error weights, as torchdyn has them."""
    b = [35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0]
    b_hat = [1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60]
    a = [
        [1 / 5],
        [3 / 40, 9 / 40],
        [44 / 45, -56 / 15, 32 / 9],
        [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
        [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
        b[:6],
    ]
    e = [u - v for u, v in zip(b, b_hat, strict=True)]
    # Shampine's interpolant of order 4, in the form of Hairer, Norsett and Wanner (II.6):
    # b(s) = s b + s (1 - s) (e_1 - b) + s^2 (1 - s) (2 b - e_1 - e_7) + s^2 (1 - s)^2 d.
    d = [
        -12715105075 / 11282082432,
        0.0,
        87487479700 / 32700410799,
        -10690763975 / 1880347072,
        701980252875 / 199316789632,
        -1453857185 / 822651844,
        69997945 / 29380423,
    ]
    inside = []
    for i, (w, v) in enumerate(zip(b, d, strict=True)):
        first, last = float(i == 0), float(i == 6)
        two, three = first - w, 2 * w - first - last
        inside.append([w + two, -two + three + v, -three - 2 * v, v])
    return RungeKutta("dopri5", 5, [0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0], a, b, e, inside)


def _tsit5() -> RungeKutta:
    """Returns the method of Tsitouras (2011)."""
    b = [
        0.09646076681806522951816731316512876333711995238157997181903319145764851595234062815396,
        1 / 100,
        0.4798896504144995747752495322905965199130404621990332488332634944254542060153074523509,
        1.379008574103741893192274821856872770756462643091360525934940067397245698027561293331,
        -3.290069515436080679901047585711363850115683290894936158531296799594813811049925401677,
        2.324710524099773982415355918398765796109060233222962411944060046314465391054716027841,
        0.0,
    ]
    b_hat = [
        0.09468075576583945807478876255758922856117527357724631226139574065785592789071067303271,
        0.009183565540343253096776363936645313759813746240984095238905939532922955247253608687270,
        0.4877705284247615707855642599631228241516691959761363774365216240304071651579571959813,
        1.234297566930478985655109673884237654035539930748192848315425833500484878378061439761,
        -2.707712349983525454881109975059321670689605166938197378763992255714444407154902012702,
        1.866628418170587035753719399566211498666255505244122593996591602841258328965767580089,
        1 / 66,
    ]
    a = [
        [161 / 1000],
        [
            -0.008480655492356988544426874250230774675121177393430391537369234245294192976164141156943,
            0.3354806554923569885444268742502307746751211773934303915373692342452941929761641411569,
        ],
        [
            2.897153057105493432130432594192938764924887287701866490314866693455023795137503079289,
            -6.359448489975074843148159912383825625952700647415626703305928850207288721235210244366,
            4.362295432869581411017727318190886861027813359713760212991062156752264926097707165077,
        ],
        [
            5.325864828439256604428877920840511317836476253097040101202360397727981648835607691791,
            -11.74888356406282787774717033978577296188744178259862899288666928009020615663593781589,
            7.495539342889836208304604784564358155658679161518186721010132816213648793440552049753,
            -0.09249506636175524925650207933207191611349983406029535244034750452930469056411389539635,
        ],
        [
            5.861455442946420028659251486982647890394337666164814434818157239052507339770711679748,
            -12.92096931784710929170611868178335939541780751955743459166312250439928519268343184452,
            8.159367898576158643180400794539253485181918321135053305748355423955009222648673734986,
            -0.07158497328140099722453054252582973869127213147363544882721139659546372402303777878835,
            -0.02826905039406838290900305721271224146717633626879770007617876201276764571291579142206,
        ],
        b[:6],
    ]
    c = [0.0, 0.161, 0.327, 0.9, 0.9800255409045096857298102862870245954942137979563024768854764293221, 1.0, 1.0]
    e = [u - v for u, v in zip(b, b_hat, strict=True)]
    # The interpolant of order 4 of the same paper, with the products of its factors written out.
    r = [-1.0530884977290216, 0.1017, 2.490627285651252793, -16.54810288924490272]
    r += [47.37952196281928122, -34.87065786149660974, 2.5]
    pairs = [(1.21712927295533244, 0.61620406037800089), (1.203071208372362603, 0.658047292653547382)]
    pairs += [(1.2, 0.666666666666666667), (1.0, 0.6)]
    # r s (s - 1.33) (s^2 - 1.436 s + 0.714)
    u, v, w = 1.3299890189751412, 1.4364028541716351, 0.7139816917074209
    inside = [[-r[0] * u * w, r[0] * (w + u * v), -r[0] * (u + v), r[0]]]
    inside.append([0.0, r[1] * 1.2949852507374631, -r[1] * 2.1966568338249754, r[1]])
    inside.append([0.0, r[2] * 1.57803468208092486, -r[2] * 2.38535645472061657, r[2]])
    inside += [[0.0, f * p * q, -f * (p + q), f] for f, (p, q) in zip(r[3:], pairs, strict=True)]
    return RungeKutta("tsit5", 5, c, a, b, e, inside)


class Hypersolver(Stepper):
    """A base step corrected by a network, z_new + dt^(p + 1) g(t, z) (Poli et al., 2020)."""

    timed = True

    def __init__(self, base: Stepper, solver: Any):
        self._base, self._hypernet, self._power = base, solver.hypernet, solver.op1
        self.name, self.order = f"hyper-{base.name}", base.order
        self.nodes, self.evaluations = base.nodes, base.evaluations

    def step(self, f, x, times, dt, k1=None):
        x_new, stages = self._base.step(f, x, times, dt, k1)
        return x_new + dt**self._power * self._hypernet(times[0], x), stages


class AsynchronousLeapfrog(Stepper):
    """Asynchronous leapfrog on a state [x, v], whose field takes and gives x alone. Order 2, one evaluation a step."""

    name, order, nodes = "alf", 2, (0.5,)

    def __init__(self, solver: Any):
        self._const = solver.const

    def step(self, f, x, times, dt, k1=None):
        if x.shape[-1] % 2:
            raise ValueError(
                f"alf steps a state [x, v] of even size in its last dimension; got the shape {tuple(x.shape)}"
            )
        position, v = x.chunk(2, -1)
        middle = position + 0.5 * dt * v
        v_new = 2 * self._const * (f(times[0], middle) - v) + v
        return torch.cat([middle + 0.5 * dt * v_new, v_new], -1), ()


class ForeignStepper(Stepper):
    """A user's solver instance, called as torchdyn calls it.

    Its tableau is cast anew from the one it came with, so that a float32 batch does not degrade a float64 one later.
    """

    timed = True

    def __init__(self, solver: Any):
        self._solver = solver
        self._given = self._cast = getattr(solver, "tableau", None)
        self.name, self.order = type(solver).__name__, int(solver.order)
        self.adaptive = solver.stepping_class == "adaptive"
        self._err: Tensor | None = None
        # What it evaluates in a step is its own affair: the drive counts its calls.
        self.evaluations = 0

    def prepare(self, x):
        solver = self._solver
        if getattr(solver, "tableau", None) is not self._cast:  # the user has changed it
            self._given = solver.tableau
        if self._given is not None:
            solver.tableau = self._given
        solver.sync_device_dtype(x, x.new_zeros(1))
        self._cast = getattr(solver, "tableau", None)
        return self

    def step(self, f, x, times, dt, k1=None):
        dt = x.new_tensor(dt) if isinstance(dt, float) else dt
        last, x_new, self._err, *stages = self._solver.step(f, x, times[0], dt, k1=k1, args={})
        self.first_same_as_last = last is not None
        return x_new, (*(stages[0] if stages else ()), last)

    def error(self, stages, dt):
        return self._err


class LearnedStepper(Stepper):
    """A LearnableSolver: numbers where no gradient of its coefficients is wanted, tensors where one is."""

    def __init__(self, solver: LearnableSolver):
        self._solver = solver
        self.name, self.order, self.evaluations = f"learned-{solver.stages}", solver.order, solver.stages
        self._numbers: tuple[Any, RungeKutta] | None = None
        self._back: LearnedStepper | None = None

    def toward(self, change):
        solver = self._solver.toward(change)
        if solver is self._solver:
            return self
        if self._back is None or self._back._solver is not solver:
            self._back = LearnedStepper(solver)
        return self._back

    def prepare(self, x):
        free = self._solver.free
        # What torch.func puts in the place of the parameter may carry a gradient that it does not show.
        own = isinstance(free, nn.Parameter) and free.device.type == "cpu"
        if not own or (free.requires_grad and torch.is_grad_enabled()):
            return _TensorRungeKutta(self.name, self.order, *self._solver.coefficients())
        values = free.tolist()  # a parameter can be written to in ways that leave no trace but its values
        if self._numbers is None or self._numbers[0] != values:
            self._numbers = values, self.as_numbers()
        return self._numbers[1]

    def as_numbers(self) -> RungeKutta:
        """Returns the method with its coefficients as they are now, as numbers."""
        with torch.no_grad():
            coefficients = self._solver.coefficients()
            inside = interpolant_of(self.order, *coefficients[1:]).tolist()
        a, b, c = (v.tolist() for v in coefficients)
        return RungeKutta(self.name, self.order, c, [row[:i] for i, row in enumerate(a)][1:], b, interpolant=inside)

    @property
    def interpolant(self):
        return interpolant_of(self.order, self._solver.b, self._solver.c)


class _TensorRungeKutta(Stepper):
    """An explicit Runge-Kutta method whose coefficients carry a gradient."""

    def __init__(self, name: str, order: int, a: Tensor, b: Tensor, c: Tensor):
        self.name, self.order, self.evaluations = name, order, len(b)
        self.nodes, self._weights = c.unbind(), torch.cat([a, b[None]])
        self._b, self._c = b, c

    @property
    def interpolant(self):
        return interpolant_of(self.order, self._b, self._c)

    def step(self, f, x, times, dt, k1=None):
        return weighted_step(f, x, times, dt * self._weights, k1)


_STOCK: dict[type, Callable[[], RungeKutta]] = {
    ode.Euler: _euler,
    ode.Midpoint: _midpoint,
    ode.RungeKutta4: _rk4,
    ode.DormandPrince45: _dopri5,
    ode.Tsitouras45: _tsit5,
}
_HYPER: dict[type, Callable[[], RungeKutta]] = {
    hyper.HyperEuler: _euler,
    hyper.HyperMidpoint: _midpoint,
    hyper.HyperRungeKutta4: _rk4,
}
_TABLEAUS = {
    ode.RungeKutta4: construct_rk4,
    ode.DormandPrince45: construct_dopri5,
    ode.Tsitouras45: construct_tsit5,
    hyper.HyperRungeKutta4: construct_rk4,
}


def _is_stock(solver: Any) -> bool:
    """Returns whether the solver still has the tableau that torchdyn gave it (users may tweak or train it)."""
    if type(solver) not in _TABLEAUS:
        return True
    given, stock = solver.tableau, _TABLEAUS[type(solver)](torch.float64)
    if any(t.requires_grad for t in (given[0], *given[1], given[2])):
        return False
    flat = [torch.cat([t.detach().double().cpu().flatten() for t in (c, *a, b)]) for c, a, b, _ in (given, stock)]
    # 1e-6: torchdyn builds the tableau in float32 whatever the state; half precision batches round it further.
    rounding = 1e-6 if given[0].dtype in (torch.float32, torch.float64) else 2e-2
    return torch.allclose(flat[0], flat[1], rtol=rounding, atol=rounding)


def make_stepper(solver: Any) -> Stepper:
    """Returns the stepper of a torchdyn solver, given by name or as an instance.

    Raises:
        ValueError: for a name that torchdyn does not know, and for solvers that cannot give right values or gradients.
        TypeError: for an object that is not a solver.

    Example:
        >>> make_stepper("rk4").order
        4
    """
    if isinstance(solver, str):
        if solver not in ode.SOLVER_DICT:
            raise ValueError(f"unknown solver {solver!r}; torchdyn's ODE solvers are {sorted(ode.SOLVER_DICT)}")
        solver = ode.str_to_solver(solver)
    kind = type(solver)
    if isinstance(solver, LearnableSolver):
        return LearnedStepper(solver)
    if isinstance(solver, ode.ImplicitEuler):
        raise ValueError(
            "the solver 'ieuler' is refused: torchdyn's implicit Euler step gives no gradient to the state, "
            "the parameters or the time, and takes f at t instead of t + dt; use 'rk4', or 'dopri5' with tolerances"
        )
    if isinstance(solver, MultipleShootingDiffeqSolver):
        raise ValueError(
            f"{kind.__name__} is a multiple-shooting solver; use a sequential one such as 'rk4' or 'tsit5'"
        )
    if isinstance(solver, ode.AsynchronousLeapfrog):
        if solver.stepping_class != "fixed":
            raise ValueError(
                "alf with stepping_class='adaptive' is refused: what it returns is no error estimate; "
                "use stepping_class='fixed', or 'dopri5' for adaptive steps"
            )
        return AsynchronousLeapfrog(solver)
    if kind in _STOCK and _is_stock(solver):
        return _STOCK[kind]()
    if kind in _HYPER and _is_stock(solver):
        return Hypersolver(_HYPER[kind](), solver)
    missing = [name for name in ("step", "order", "stepping_class", "sync_device_dtype") if not hasattr(solver, name)]
    if missing:
        raise TypeError(f"{kind.__name__} is not a torchdyn solver: it has no {', '.join(missing)}")
    if solver.stepping_class not in ("fixed", "adaptive"):
        raise ValueError(f"a solver's stepping_class is 'fixed' or 'adaptive'; got {solver.stepping_class!r}")
    return ForeignStepper(solver)
