r"""An explicit Runge-Kutta method whose coefficients are learned, in one step over the whole interval.

With h = t_f - t_0 and s evaluations of the field,

    k_i = f(t_0 + c_i h, z_0 + h sum_{j<i} a_ij k_j),    z(t_f) = z_0 + h sum_i b_i k_i.

Learned are a (strictly lower), b, and c where it is free. What is stored is a matrix without constraints; the method is its
projection onto

    order 1:  sum_i b_i = 1,
    order 2:  sum_i b_i = 1,  sum_i b_i c_i = 1/2,  c_i = sum_j a_ij,

so that the conditions hold after any step of any optimizer. Stands on torch alone: the names are those that torchdyn's own
solvers have.

Coefficients that were fitted to solves of one direction of time keep their order in the other, and no more: the inverse of an
explicit method is no explicit method. A solver therefore knows its direction, and may have another one for the way back.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LearnableSolver", "interpolant_of", "precise", "weighted_step"]

_BASE: dict[str, tuple[list[list[float]], list[float]]] = {
    "euler": ([[]], [1.0]),
    "midpoint": ([[], [1 / 2]], [0.0, 1.0]),
    "heun3": ([[], [1 / 3], [0.0, 2 / 3]], [1 / 4, 0.0, 3 / 4]),
    "rk4": ([[], [1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}
"""The methods that a solver may start from: the rows of a, and b."""


class LearnableSolver(nn.Module):
    """An explicit Runge-Kutta method of ``stages`` evaluations, one step over the whole interval, with learned coefficients.

    It is a torchdyn solver: ``NeuralODE(field, solver=LearnableSolver(4))`` runs in plain torchdyn, which takes one such
    step between any two points of its span (two points by default).

    Args:
        stages: evaluations of the field, 1 or more.
        like: what it starts equal to, to rounding: equal steps of "euler", "midpoint" or "rk4" (whose stages must divide
            ``stages``), or another LearnableSolver, to which it is near where that has more or fewer stages. Default: Euler,
            midpoint, Heun's third-order method, and for more stages equal steps of midpoint, the last one of Heun's where
            their number is odd.
        order: the order conditions that are kept exactly, 1 or 2. Default: 2 where the start has them.
        first_node: whether c_1 is learned too, which an order of 1 allows (a field that depends on time).

    Attributes:
        free: parameter ``[stages + 2, stages]``, of float64 unless it was cast to float32: the rows of a, then b and c,
            before the projection.
        stages, order, first_node: as above.
        direction: 1 where it was fitted to solves forward in time, -1 backward, 0 where it was fitted to none. It can be set.
        other: the LearnableSolver that takes the steps of the other direction in a LearnableSpan; None by default. It can be
            set. Without one, the first step there against ``direction`` gives a warning. Plain torchdyn shows a solver no
            direction.

    Raises:
        TypeError: ``like`` is no name and no LearnableSolver.
        ValueError: a number of stages, a name or an order that cannot be had.

    Example:
        >>> from torchdyn.core import NeuralODE
        >>> solver = LearnableSolver(2)
        >>> node = NeuralODE(nn.Tanh(), solver=solver)  # doctest: +ELLIPSIS
        Your vector field ...
        >>> x = torch.randn(8, 2)
        >>> (x + torch.tanh(x + torch.tanh(x) / 2)).allclose(node(x)[1][-1], atol=1e-6)  # one step of midpoint
        True
        >>> solver.b.sum().item(), (solver.b * solver.c).sum().item()
        (1.0, 0.5)
    """

    stepping_class = "fixed"
    tableau = None
    """torchdyn's solvers keep theirs here; this one makes it from its parameter at every step."""
    _mask: Tensor
    _last: Tensor
    _mean: Tensor
    _centre: Tensor
    _settings: Tensor
    order: int
    other: "LearnableSolver | None"

    def __init__(
        self,
        stages: int,
        like: "str | LearnableSolver | None" = None,
        *,
        order: int | None = None,
        first_node: bool = False,
    ):
        super().__init__()
        if isinstance(stages, bool) or not isinstance(stages, int) or stages < 1:
            raise ValueError(f"stages must be a whole number of evaluations, 1 or more; got {stages!r}")
        start = torch.tensor(_start(stages, like), dtype=torch.float64)
        second = abs(float(start[-2] @ start[-1]) - 0.5) < 1e-9
        if isinstance(like, LearnableSolver):
            order = int(like.order) if order is None and stages > 1 else order
            second = True  # the projection makes it so
        order = (2 if second and stages > 1 else 1) if order is None else order
        if order not in (1, 2) or (order == 2 and (stages < 2 or not second)):
            raise ValueError(
                f"order={order!r} cannot be kept by {stages} stages that start like {like!r}; give order=1, or other stages"
            )
        if first_node and order == 2:
            raise ValueError("first_node=True moves c_1 from 0, which order=2 does not allow; give order=1")
        self.stages, self.order, self.first_node = stages, order, bool(first_node)
        self.free = nn.Parameter(start)
        mask = torch.ones(stages + 2, stages, dtype=torch.float64)
        mask[:stages].tril_(-1)
        mask[-1] = float(order == 1)
        mask[-1, 0] *= float(first_node)
        self.register_buffer("_mask", mask, persistent=False)
        self.register_buffer("_last", torch.eye(stages, dtype=torch.float64)[-1], persistent=False)
        # What takes the mean from a vector, and the mean that is put in its place.
        mean = torch.full((stages,), 1 / stages, dtype=torch.float64)
        self.register_buffer("_mean", mean, persistent=False)
        self.register_buffer("_centre", torch.eye(stages, dtype=torch.float64) - mean, persistent=False)
        self.register_buffer("_settings", torch.tensor([order, int(first_node), 0]))
        self.register_module("other", None)
        self._direction, self._said = 0, False

    # ------------------------------------------------------------------------------------------------- its coefficients

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns a ``[stages, stages]``, b and c ``[stages]`` in the parameter's dtype, with their gradient.

        The sum of b is 1 to two units in the last place.
        """
        s = self.stages
        free = self.free * self._mask
        a, b = free[:s], free[s]
        with precise(free):
            # As few operations as will do: where a gradient is wanted, each costs as much as a small field's layer.
            b = torch.addmv(self._mean, self._centre, b)  # its sum is 1
            if self.order == 2:  # along c without its mean, which leaves the sum as it is
                c = a.sum(1)
                direction = self._centre @ c
                b = torch.addcmul(b, direction, (0.5 - b @ c) / (direction @ direction))
            else:
                c = free[s + 1]
        # The rounding of a sum of entries of both signs is more than that of 1: the last one takes what is left of it, which
        # has no gradient.
        return a, b + self._last * (1.0 - b.detach().sum()), c

    @property
    def a(self) -> Tensor:
        """The matrix of the stages, ``[stages, stages]``, strictly lower."""
        return self.coefficients()[0]

    @property
    def b(self) -> Tensor:
        """The weights, ``[stages]``; their sum is 1."""
        return self.coefficients()[1]

    @property
    def c(self) -> Tensor:
        """The nodes, ``[stages]``, relative to the interval."""
        return self.coefficients()[2]

    def entries(self, timed: bool = True) -> Tensor:
        """Returns which entries of ``free`` play a part, bool ``[stages + 2, stages]``.

        Args:
            timed: whether the field depends on time; the nodes c play no part where it does not.
        """
        mask = self._mask != 0
        mask[-1] &= timed
        return mask

    # ------------------------------------------------------------------------------------------------------ its direction

    @property
    def direction(self) -> int:
        """1 where it was fitted to solves forward in time, -1 backward, 0 where it was fitted to none."""
        return self._direction

    @direction.setter
    def direction(self, value: int) -> None:
        if value not in (-1, 0, 1):
            raise ValueError(f"direction must be 1 (forward in time), -1 (backward) or 0 (not known); got {value!r}")
        self._direction = int(value)
        self._settings[2] = self._direction

    def toward(self, change: float) -> "LearnableSolver":
        """Returns the solver that takes steps of the sign of ``change``, a difference of times: itself, or :attr:`other`."""
        if self._direction * change >= 0:
            return self
        if self.other is None and not self._said:
            self._said = True
            fitted, run = ("forward", "backward") if self._direction > 0 else ("backward", "forward")
            warnings.warn(
                f"this LearnableSolver of {self.stages} stages was fitted to solves {fitted} in time and is run {run}, where "
                "it may err as much as midpoint does. Fit one to that direction too (fit_solver, inverse=True), and set it "
                "as its `other`; FlowModel.fit_solvers does so for flows",
                stacklevel=2,
            )
        return self if self.other is None else self.other

    # --------------------------------------------------------------------------------------------- as torchdyn's solvers

    def sync_device_dtype(self, x: Tensor, t_span: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``x``, and ``t_span`` on its device; torchdyn calls it before a solve."""
        return x, t_span.to(x.device)

    def step(
        self, f: Callable, x: Tensor, t: Tensor, dt: Tensor, k1: Tensor | None = None, args: Any = None
    ) -> tuple[None, Tensor, None]:
        """Returns (None, the state after a step of size ``dt``, None), as torchdyn's fixed-step solvers do.

        torchdyn solves a descending span with times and field of the opposite sign, so that no step shows its direction:
        what is called from there takes these coefficients both ways.
        """
        a, b, c = self.coefficients()
        weights, nodes = dt * torch.cat([a, b[None]]), (t + dt * c).to(x)
        state, _ = weighted_step(f, x, nodes.unbind(), weights, None if self.first_node else k1)
        return None, state, None

    # ------------------------------------------------------------------------------------------------ copies and devices

    def _apply(self, fn: Callable, recurse: bool = True) -> "LearnableSolver":
        # Half precision has about 3 digits, too few for coefficients that are learned in steps of 1e-2.
        def keep_precise(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.is_floating_point() and out.dtype.itemsize < 4 else out

        return super()._apply(keep_precise, recurse)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        settings = state_dict.get(prefix + "_settings")
        if settings is not None:
            *given, direction = _settings_of(settings)
            if given != (own := [self.order, int(self.first_node)]):
                made = f"order={given[0]}, first_node={bool(given[1])}"
                raise ValueError(
                    f"the state is that of a LearnableSolver made with {made}; this one has order={own[0]}, "
                    f"first_node={bool(own[1])}: make it with the same"
                )
            if prefix + "free" in state_dict:  # without it a strict load fails, which must change nothing
                self.direction = direction
                self.other = self._other_for(LearnableSolver.of_state(state_dict, prefix + "other."))
            state_dict[prefix + "_settings"] = self._settings
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _other_for(self, made: "LearnableSolver | None") -> "LearnableSolver | None":
        """Returns what takes in the state that fits ``made``: the present :attr:`other` if it can, as optimizers hold it."""
        if made is None:
            return None
        if self.other is not None and self.other.extra_repr() == made.extra_repr():
            return self.other
        return made.to(self.free).requires_grad_(self.free.requires_grad)

    @classmethod
    def of_state(cls, state_dict: Mapping[str, Any], prefix: str = "") -> "LearnableSolver | None":
        """Returns a solver that the entries of a state_dict with this prefix fit into; None where there are none."""
        free, settings = (state_dict.get(prefix + name) for name in ("free", "_settings"))
        if free is None or settings is None:
            return None
        order, first_node, _ = _settings_of(settings)
        return cls(free.shape[-1], order=order, first_node=bool(first_node)).to(free.device)

    def extra_repr(self) -> str:
        return f"stages={self.stages}, order={self.order}" + (", first_node=True" if self.first_node else "")


def _settings_of(tensor: Tensor) -> list[int]:
    """Returns order, first_node and direction, which older states do not have."""
    return [*tensor.tolist(), 0][:3]


def weighted_step(
    f: Callable, x: Tensor, times: Sequence[Any], weights: Tensor, k1: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Returns the state after a step of an explicit Runge-Kutta method, and its stages.

    Args:
        f: ``f(t, z)``, the field.
        x: the state before the step.
        times: of the stages.
        weights: ``[stages + 1, stages]``, the rows of a and then b, times the size of the step.
        k1: the first stage, if it is known.
    """
    n = len(times)
    each = weights.to(x).flatten().unbind()
    stages: list[Tensor] = []
    state = x
    for i in range(n + 1):
        state = x
        for w, k in zip(each[i * n : i * n + i], stages, strict=True):
            state = torch.addcmul(state, w, k)
        if i < n:
            stages.append(k1 if i == 0 and k1 is not None else f(times[i], state))
    return state, stages


def interpolant_of(order: int, b: Tensor, c: Tensor) -> Tensor:
    """Returns the weights of the state at a share of the step, as polynomials: ``[stages, degree]``.

    Those of least change that keep the conditions of the order 1 or 2 at every share s of the step: b(s) = s b, and for the
    order 2 b(s) = s b - s (1 - s) w with sum_i w_i = 0, sum_i w_i c_i = 1/2. Of two stages that start as midpoint it is
    midpoint's own.

    Args:
        order: 1 or 2.
        b, c: weights and nodes, ``[stages]``.
    """
    if order == 1:
        return b[:, None]
    direction = c - c.mean()
    with precise(c):
        w = direction / (2 * direction @ direction)
    return torch.stack([b - w, w], 1)


def precise(x: Tensor) -> AbstractContextManager:
    """Returns a context in which autocast does not round products on the device of ``x`` to half precision."""
    rounds = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return torch.autocast(x.device.type, enabled=False) if rounds else nullcontext()


def _start(stages: int, like: Any) -> list[list[float]]:
    """Returns the rows of a, then b and c, that a solver of so many stages starts from."""
    if isinstance(like, LearnableSolver):
        return _resized(like, stages)
    if like is None:
        equal = max(1, stages // 2)
        parts = ["euler"] if stages == 1 else ["midpoint"] * (equal - stages % 2) + ["heun3"] * (stages % 2)
    elif isinstance(like, str):
        if like not in ("euler", "midpoint", "rk4"):
            raise ValueError(f"like={like!r} is unknown; it may be 'euler', 'midpoint', 'rk4' or a LearnableSolver")
        each = len(_BASE[like][1])
        if stages % each:
            raise ValueError(f"{stages} stages are no whole number of {like} steps, which have {each} each")
        parts = [like] * (stages // each)
    else:
        raise TypeError(f"like must be the name of a method or a LearnableSolver; got {type(like).__name__}")
    before: list[float] = []
    rows, c = [], []
    for i, name in enumerate(parts):  # equal steps, one after the other, as one method
        a, b = _BASE[name]
        rows += [before + [w / len(parts) for w in row] for row in a]
        c += [(i + sum(row)) / len(parts) for row in a]
        before = before + [w / len(parts) for w in b]
    return [*([*row, *[0.0] * (stages - len(row))] for row in rows), before, c]


def _resized(solver: "LearnableSolver", stages: int) -> list[list[float]]:
    """Returns a solver's coefficients with stages of no weight added, or the stages of least effect joined to others."""
    with torch.no_grad():
        a, b, c = (v.tolist() for v in solver.coefficients())
    while len(b) > stages:
        # A stage joins the one before it: the weights add up, so that their sum and the nodes of all others stay.
        i = min(range(1, len(b)), key=lambda i: abs(b[i] * (c[i] - c[i - 1])))
        del a[i], c[i]
        for row in (*a, b):
            row[i - 1] += row.pop(i)
    while len(b) < stages:
        last = [0.5] if len(b) == 1 else a[-1]
        a = [[*row, 0.0] for row in (*a, last)]
        b, c = [*b, 0.0], [*c, 0.5 if len(c) == 1 else c[-1]]
    return [*a, b, c]
