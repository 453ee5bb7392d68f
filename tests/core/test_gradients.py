"""Every gradient three ways: against closed forms, against central differences in float64, one sensitivity against another.

`autograd` is held to the discrete solution itself: differences of the wrapped solve, with the span's own t_f and t0 moved in
place. `adjoint` and `interpolated_adjoint` are held to the ODE: differences of a fine Runge-Kutta solution that shares no
code with torchdyn or with the package.
"""

import math
from itertools import pairwise

import pytest
import torch
from differences import BACKWARD, CENTRAL, assert_close, difference, directions_like
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import CLOSED_FORMS, FIELDS, closed_form, random_model, reference, rk4_step
from torch import nn
from torchdyn.numerics.solvers.templates import DiffEqSolver

import torchdyn_mintime as tm
from torchdyn_mintime.numerics.steppers import make_stepper

FIXED = {"euler": 1, "midpoint": 2, "rk4": 4}
ADAPTIVE = ("dopri5", "tsit5")
ADJOINTS = ("adjoint", "interpolated_adjoint")
TIGHT = {"atol": 1e-9, "rtol": 1e-9, "atol_adjoint": 1e-9, "rtol_adjoint": 1e-9}

# Autograd with fixed steps: exactly the derivative of what was computed. The five-point differences are good to about 1e-10.
EXACT = 1e-6
# Autograd with adaptive steps holds the accepted steps fixed, while a difference sees them move: the two differ by what
# the solution itself is uncertain by, 1e-9 a step, which central differences with h = 1e-3 turn into 1e-6 and more.
STEPS_HELD = 1e-4
# An adaptive adjoint at a tolerance of 1e-9, forward and backward, accumulated over the steps.
ADJOINT = 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def _weights(sol, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sol.shape[1:], dtype=sol.dtype, generator=generator)


def end_loss(t_eval, sol, seed=0):
    """Smooth, and not linear in the state, so that a wrong end state shows in the gradient as well."""
    return (torch.tanh(sol[-1]) * _weights(sol, seed)).sum() + 0.1 * sol[-1].square().sum()


def trajectory_loss(t_eval, sol, seed=0):
    """A trapezoid integral over the trajectory: every point counts, and t_eval carries gradients of its own."""
    values = (torch.tanh(sol) * _weights(sol, seed)).flatten(1).sum(1) + 0.1 * sol.square().flatten(1).sum(1)
    return (t_eval.diff().abs() * (values[1:] + values[:-1]) / 2).sum() + 0.5 * t_eval[-1] + end_loss(t_eval, sol, seed)


LOSSES = {"end": end_loss, "trajectory": trajectory_loss}


# ---------------------------------------------------------------------------------------------------------------------
# Cases


class Case:
    """One wrapped model with its loss, its initial state as a leaf, and what each of its gradients is measured against."""

    def __init__(self, kind, seed, template, t_f, loss, descending=False, **options):
        self.model = random_model(kind, seed=seed, **options)
        self.x = self.model.x.clone().requires_grad_(True)
        self.loss, self.seed, self.descending, self.template = LOSSES[loss], seed, descending, template
        spacing = float(template[1] - template[0])
        # Room on either side for the differences: bounds are eq. (14)'s business, tested elsewhere.
        bounds = (float(template[0]) + 1e-2 * spacing, float(template[-1]) + 3 * spacing + 1)
        self.span = tm.LearnableSpan(self.model.node, template, t_f=t_f, bounds=bounds, learn_t0=True)
        self.span.eval()

    def solve(self):
        return self.span(self.x, self.template.flip(0)) if self.descending else self.span(self.x)

    def value(self):
        return self.loss(*self.solve(), self.seed)

    def reference_value(self):
        """The loss of the ODE's own solution at the same times."""
        times = self.span.grid() if self.adaptive else None
        start, end = self.span.t0, self.span.t_f
        inner = times[1:-1].detach()
        t_eval = torch.cat([start[None], inner, end[None]])
        t_eval = t_eval.flip(0) if self.descending else t_eval
        return self.loss(t_eval, reference(self.model.rhs, self.x, t_eval, steps=160), self.seed)

    @property
    def adaptive(self):
        return True

    def targets(self):
        v = directions_like(self.model.parameters, self.seed)
        u = directions_like([self.x], self.seed + 1)
        one = torch.ones((), dtype=torch.float64)
        return {
            "dl/dt_f": ([self.span.t_f], [one]),
            "dl/dt0": ([self.span.t0], [one]),
            "dl/dx": ([self.x], u),
            "dl/dtheta": (self.model.parameters, v),
        }

    def gradients(self):
        """dl/d(target) along each target's direction, and the size of the terms that make it up."""
        t_eval, sol = self.solve()
        loss = self.loss(t_eval, sol, self.seed)
        dl_dz = torch.autograd.grad(self.loss(t_eval, sol, self.seed), sol, retain_graph=True)[0]
        loss.backward()
        with torch.no_grad():
            last, first = (0, -1) if self.descending else (-1, 0)
            speed = {
                "dl/dt_f": self.model.rhs(t_eval[last], sol[last]).norm() * dl_dz[last].norm(),
                "dl/dt0": self.model.rhs(t_eval[first], sol[first]).norm()
                * max(self.x.grad.norm(), dl_dz[first].norm()),
            }
        gradients = {}
        for name, (tensors, directions) in self.targets().items():
            assert all(t.grad is not None for t in tensors), f"{name} is missing"
            total = sum(float((t.grad * d).sum()) for t, d in zip(tensors, directions, strict=True))
            norm = math.sqrt(sum(float(t.grad.square().sum()) for t in tensors))
            gradients[name] = (total, float(speed.get(name, norm)))
        return gradients

    def check(self, value, rtol, h=1e-4, stencils=None):
        gradients = self.gradients()
        for name, (tensors, directions) in self.targets().items():
            stencil = (stencils or {}).get(name, CENTRAL)
            numeric = difference(value, tensors, directions, h, stencil)
            assert_close(gradients[name][0], numeric, gradients[name][1], rtol, name)


@st.composite
def cases(draw, kinds=FIELDS, max_points=50, beyond=True):
    """A field, a template and an end time away from the template's points: negative times, t0 = 0 and not, 2 to 50 points."""
    points = draw(st.integers(2, max_points), label="points")
    start = draw(st.sampled_from([0.0, -1.3, -0.4, 0.25]), label="t0")
    length = draw(st.sampled_from([0.4, 1.0, 1.4]), label="length")
    template = torch.linspace(start, start + length, points, dtype=torch.float64)
    spacing = length / (points - 1)
    # With t0 to be learned, t_f stays more than one step above it: nearer, t0 would be clipped. Beyond the template's end
    # the grid goes on, so that the end is as good a place as any other.
    step = draw(st.integers(1, max(1, points - (1 if beyond else 2))), label="whole steps")
    fraction = draw(st.floats(0.15, 0.85), label="part of the last step")
    return {
        "kind": draw(st.sampled_from(kinds), label="field"),
        "seed": draw(st.integers(0, 999), label="seed"),
        "template": template,
        "t_f": start + (step + fraction) * spacing,
        "loss": draw(st.sampled_from(sorted(LOSSES)), label="loss"),
        "descending": draw(st.booleans(), label="descending"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Autograd: the discrete solution's own gradients


@pytest.mark.parametrize("solver", FIXED)
@given(case=cases())
def test_autograd_with_fixed_steps_is_exactly_the_discrete_gradient(solver, case):
    case = Case(**case, solver=solver)
    # h stays well inside .15 of the smallest spacing, 1.4 / 49 / 7: the number of steps is the same on either side.
    case.check(case.value, EXACT, h=1e-4)


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_autograd_at_the_templates_end_is_the_left_derivative(solver, loss, descending):
    # Where one more step is just being added the discrete solution has a kink; the initial t_f is such a place.
    template = torch.linspace(-0.3, 0.7, 6, dtype=torch.float64)
    case = Case("keyword", 3, template, None, loss, descending, solver=solver)
    assert float(case.span.t_f.detach()) == pytest.approx(0.7)
    case.check(case.value, EXACT, h=1e-4, stencils={"dl/dt_f": BACKWARD})


@pytest.mark.parametrize("solver", FIXED)
def test_autograd_at_an_inner_node_is_the_left_derivative(solver):
    template = torch.linspace(0, 1, 6, dtype=torch.float64)
    case = Case("keyword", 4, template, float(template[3]), "end", solver=solver)
    case.check(case.value, EXACT, h=1e-4, stencils={"dl/dt_f": BACKWARD})


@pytest.mark.parametrize("solver", FIXED)
def test_the_right_derivative_at_a_node_is_another_one(solver):
    # The test above would prove nothing if the two sides agreed: past the node a new step starts with a fresh field.
    template = torch.linspace(0, 1, 3, dtype=torch.float64)
    case = Case("keyword", 4, template, float(template[1]), "end", solver=solver)
    tensors, directions = case.targets()["dl/dt_f"]
    left = difference(case.value, tensors, directions, 1e-4, BACKWARD)
    # Started past the near-duplicate rule (1e-3 of a step), where the node is a point of its own again.
    with torch.no_grad():
        case.span.t_f.add_(2e-3)
    right = difference(case.value, tensors, directions, 1e-4, CENTRAL)
    assert abs(left - right) > 1e-6 * abs(left)


@pytest.mark.parametrize("solver", ADAPTIVE)
@settings(max_examples=max(5, settings().max_examples // 3))  # a tight adaptive solve costs ten fixed-step ones
@given(case=cases(kinds=("linear", "mlp", "depthcat", "keyword", "plain", "second order", "1-D state"), max_points=6))
def test_autograd_with_adaptive_steps_is_the_gradient_of_the_accepted_steps(solver, case):
    case = Case(**case, solver=solver, **TIGHT)
    case.check(case.value, STEPS_HELD, h=1e-3)


@pytest.mark.parametrize("kind", ["lambda", "conv"])
def test_autograd_with_adaptive_steps_for_the_other_fields(kind):
    case = Case(kind, 5, torch.linspace(-0.2, 0.9, 4, dtype=torch.float64), 0.8, "trajectory", solver="dopri5", **TIGHT)
    case.check(case.value, STEPS_HELD, h=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# The adjoints: the ODE's own gradients


@pytest.mark.parametrize("solver", ADAPTIVE)
@pytest.mark.parametrize("sensitivity", ADJOINTS)
@settings(max_examples=max(5, settings().max_examples // 3))  # as above, and the reference is as dear again
@given(case=cases(kinds=("linear", "mlp", "depthcat", "keyword", "plain", "second order", "1-D state"), max_points=6))
def test_an_adaptive_adjoint_is_the_gradient_of_the_ode(solver, sensitivity, case):
    case = Case(**case, solver=solver, sensitivity=sensitivity, **TIGHT)
    case.check(case.reference_value, ADJOINT, h=1e-3)


@pytest.mark.parametrize("kind", ["lambda", "conv"])
@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_an_adaptive_adjoint_for_the_other_fields(kind, sensitivity):
    template = torch.linspace(-0.2, 0.9, 4, dtype=torch.float64)
    case = Case(kind, 5, template, 0.8, "trajectory", solver="dopri5", sensitivity=sensitivity, **TIGHT)
    case.check(case.reference_value, ADJOINT, h=1e-3)


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_an_adaptive_adjoint_with_many_points(sensitivity):
    template = torch.linspace(-0.5, 0.6, 50, dtype=torch.float64)
    case = Case("depthcat", 8, template, 0.57, "trajectory", solver="tsit5", sensitivity=sensitivity, **TIGHT)
    case.check(case.reference_value, ADJOINT, h=1e-3)


def _adjoint_errors(solver, sensitivity, steps, loss="end", descending=False):
    """Relative errors of an adjoint with fixed steps against the ODE, at a t_f that stays the same as the steps shrink."""
    template = torch.linspace(-0.4, 0.8, steps + 1, dtype=torch.float64)
    case = Case("keyword", 6, template, None, loss, descending, solver=solver, sensitivity=sensitivity)
    got = case.gradients()
    errors = {}
    for name, (tensors, directions) in case.targets().items():
        numeric = difference(case.reference_value, tensors, directions)
        errors[name] = abs(got[name][0] - numeric) / max(abs(numeric), 1e-2 * got[name][1])
    return errors


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("sensitivity", ADJOINTS)
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_the_error_of_a_fixed_step_adjoint_falls_with_the_solvers_order(solver, sensitivity, descending):
    coarse = _adjoint_errors(solver, sensitivity, 10, descending=descending)
    fine = _adjoint_errors(solver, sensitivity, 40, descending=descending)
    for name in coarse:
        # Steps four times shorter: the error falls by 4^order. Half an order is left for the steps being still coarse,
        # and a floor of 1e-8 for the reference.
        assert fine[name] <= max(1e-8, coarse[name] / 4 ** (FIXED[solver] - 0.5)), (name, coarse[name], fine[name])
        assert fine[name] <= {"euler": 0.2, "midpoint": 1e-2, "rk4": 1e-5}[solver], name


@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_a_fixed_step_adjoint_with_a_loss_on_the_trajectory(sensitivity):
    errors = _adjoint_errors("rk4", sensitivity, 40, loss="trajectory")
    assert max(errors.values()) <= 1e-5, errors


# ---------------------------------------------------------------------------------------------------------------------
# One sensitivity against another


@pytest.mark.parametrize("kind", FIELDS)
def test_all_sensitivities_agree(kind):
    template = torch.linspace(-0.3, 0.8, 5, dtype=torch.float64)
    results = {}
    for sensitivity in ("autograd", *ADJOINTS):
        case = Case(kind, 2, template, 0.7, "trajectory", solver="dopri5", sensitivity=sensitivity, **TIGHT)
        results[sensitivity] = case.gradients()
    for sensitivity in ADJOINTS:
        for name, (expected, scale) in results["autograd"].items():
            assert_close(results[sensitivity][name][0], expected, scale, STEPS_HELD, f"{sensitivity}, {name}")


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_float32_agrees_with_float64(solver, sensitivity):
    tight = {"atol": 1e-6, "rtol": 1e-6, "atol_adjoint": 1e-6, "rtol_adjoint": 1e-6} if solver == "tsit5" else {}
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model = random_model("keyword", seed=1, dtype=torch.float32, solver=solver, sensitivity=sensitivity, **tight)
        model.node.to(dtype)
        span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 21, dtype=dtype), t_f=0.87, learn_t0=True)
        assert span.t_f.dtype == span.t0.dtype == dtype
        t_eval, sol = span(model.x.to(dtype))
        assert sol.dtype == dtype
        trajectory_loss(t_eval.double(), sol.double()).backward()
        gradients.append([span.t_f.grad, span.t0.grad, *(p.grad for p in model.parameters)])
    for single, double in zip(*gradients, strict=True):
        # float32 carries seven digits; sums of a few hundred terms and a tolerance of 1e-6 leave four.
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_times_in_float64_drive_a_float32_state(sensitivity):
    model = random_model("mlp", dtype=torch.float32, solver="rk4", sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11, dtype=torch.float64))
    t_eval, sol = span(model.x)
    assert sol.dtype == torch.float32 and span.t_f.dtype == torch.float64 and t_eval.dtype == torch.float64
    sol[-1].sum().backward()
    assert span.t_f.grad.dtype == torch.float64 and torch.isfinite(span.t_f.grad)


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms


@pytest.mark.parametrize("equation", CLOSED_FORMS)
@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
@pytest.mark.parametrize("solver", ["rk4", "dopri5", "tsit5"])
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_closed_forms(equation, sensitivity, solver, descending):
    fixed = solver == "rk4"
    node, field, x = closed_form(equation, solver=solver, sensitivity=sensitivity, **({} if fixed else TIGHT))
    x.requires_grad_(True)
    template = torch.linspace(-0.4, 0.9, 101 if fixed else 3, dtype=torch.float64)
    span = tm.LearnableSpan(node, template, learn_t0=True)
    _t_eval, sol = span(x, template.flip(0)) if descending else span(x)
    weights = torch.randn(x.shape, dtype=torch.float64)
    (sol[-1] * weights).sum().backward()
    got = [span.t0.grad, span.t_f.grad, x.grad, *(p.grad for p in field.parameters())]
    t0, t_f = (t.detach().clone().requires_grad_(True) for t in (span.t0, span.t_f))
    exact = field.exact(t_f, t0, x) if descending else field.exact(t0, t_f, x)
    expected = torch.autograd.grad((exact * weights).sum(), [t0, t_f, x, *field.parameters()], allow_unused=True)
    # rk4 with 100 steps: its own error is a few times (1.3 / 100)^4 = 3e-8.
    torch.testing.assert_close(sol[-1], exact, rtol=1e-6, atol=1e-7)
    for a, b in zip(got, expected, strict=True):
        rtol = STEPS_HELD if sensitivity == "autograd" and not fixed else ADJOINT
        scale = (weights.norm() * exact.norm()).item()
        assert float((a - b).norm()) <= rtol * max(float(b.norm()), 1e-2 * scale)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's formulas


def _pairing(solver, steps, sensitivity="autograd"):
    """dl/dt_f as computed, and eq. (12): dPhi/dz(t_f) . f(z(t_f))."""
    model = random_model("keyword", seed=12, solver=solver, sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0.1, 1.1, steps + 1, dtype=torch.float64))
    _, sol = span(model.x)
    z = sol[-1].detach().requires_grad_(True)
    (costate,) = torch.autograd.grad(end_loss(None, z[None]), z)
    end_loss(None, sol[-1:]).backward()
    return float(span.t_f.grad), (costate * model.rhs(span.t_f.detach(), z)).sum().item()


@pytest.mark.parametrize("solver", FIXED)
def test_equation_12_is_the_limit_of_fine_steps(solver):
    gaps = [abs(a - b) / abs(b) for a, b in (_pairing(solver, steps) for steps in (10, 20, 40))]
    assert gaps[0] > 1e-9, "with coarse steps the two are different things"
    order = math.log2(gaps[0] / gaps[-1]) / 2
    assert order >= FIXED[solver] - 0.3, gaps


@pytest.mark.parametrize("sensitivity", ADJOINTS)
@pytest.mark.parametrize("solver", FIXED)
def test_equation_12_is_what_an_adjoint_computes(solver, sensitivity):
    computed, formula = _pairing(solver, 10, sensitivity)
    # At any number of steps: the formula is evaluated at the computed end state, one evaluation of the field.
    assert computed == pytest.approx(formula, rel=1e-9)


def _equation_36(sensitivity, cost):
    """dl/dt0 as computed; -(p(t0) f(t0) + L(t0)); and eq. (36) as printed. For x' = a x cos t and L = c |x|^2."""
    options = {"integral_loss": (lambda t, x: cost * x.square().sum(1))} if cost else {}
    node, field, x = closed_form("breathing", solver="dopri5", sensitivity=sensitivity, **TIGHT, **options)
    x.requires_grad_(True)
    t0 = torch.tensor(0.3, dtype=torch.float64)
    span = tm.LearnableSpan(node, torch.tensor([0.3, 1.2], dtype=torch.float64), learn_t0=True)
    _, sol = span(x)
    sol[-1].square().sum().backward()
    right = -((x.grad * field(t0, x)).sum() + cost * x.square().sum()).item()
    # As printed: dl/dt_f - integral from t_f to t0 of (-p df/dt - dL/dt) dt = dl/dt_f - integral from t0 to t_f of p df/dt.
    times = torch.linspace(0.3, 1.2, 401, dtype=torch.float64)
    with torch.no_grad():
        z = torch.stack([field.exact(t0, t, x) for t in times])
        z_f = z[-1]
        # p(t) = dl/dz(t), for this scalar equation in closed form: z(t_f) = z(t) g, and L adds its own integral.
        growth = torch.exp(field.rate * (torch.sin(times[-1]) - torch.sin(times)))[:, None, None]
        p = 2 * z_f * growth
        for i, t in enumerate(times if cost else []):
            later = z[i:] / z[i]
            p[i] += torch.trapezoid(2 * cost * later**2 * z[i], times[i:], dim=0) if t < times[-1] else 0
        slope = (p * (-field.rate * torch.sin(times)[:, None, None] * z)).sum((1, 2))
        printed = float(span.t_f.grad) - float(torch.trapezoid(slope, times))
    return float(span.t0.grad), right, printed


@pytest.mark.parametrize("cost", [0.0, 0.8], ids=["no running cost", "with a running cost"])
@pytest.mark.parametrize("sensitivity", ADJOINTS)
def test_equation_36_has_the_wrong_sign_as_printed(sensitivity, cost):
    computed, right, printed = _equation_36(sensitivity, cost)
    assert computed == pytest.approx(right, rel=1e-5)
    assert abs(computed - printed) > 0.1 * abs(computed)
    # The printed formula with its sign turned is the same number: the integral of dH/dt is H(t_f) - H(t0). The trapezoid
    # rule with 400 intervals is good to 1e-5.
    assert -printed == pytest.approx(right, rel=1e-4)


def test_dl_dt0_has_the_right_sign_under_autograd():
    node, field, x = closed_form("breathing", solver="dopri5", **TIGHT)
    x.requires_grad_(True)
    span = tm.LearnableSpan(node, torch.tensor([0.3, 1.2], dtype=torch.float64), learn_t0=True)
    span(x)[1][-1].square().sum().backward()
    right = -(x.grad * field(torch.tensor(0.3, dtype=torch.float64), x)).sum().item()
    assert float(span.t0.grad) == pytest.approx(right, rel=STEPS_HELD)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_an_autonomous_field_only_knows_the_duration(sensitivity):
    model = random_model("mlp", seed=3, solver="dopri5", sensitivity=sensitivity, **TIGHT)
    span = tm.LearnableSpan(model.node, torch.tensor([0.3, 1.2], dtype=torch.float64), learn_t0=True)
    t_eval, sol = span(model.x)
    end_loss(t_eval, sol).backward()
    assert float(span.t0.grad) == pytest.approx(-float(span.t_f.grad), rel=STEPS_HELD)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_equation_13_adds_the_weight_to_the_gradient(solver, sensitivity):
    gradients = []
    for weight in (0.0, 0.35):
        model = random_model("mlp", solver=solver, sensitivity=sensitivity)
        span = tm.LearnableSpan(model.node, torch.linspace(0.2, 1, 11, dtype=torch.float64), learn_t0=True)
        t_eval, sol = span(model.x)
        (end_loss(t_eval, sol) + weight * span.duration).backward()
        gradients.append((float(span.t_f.grad), float(span.t0.grad)))
    assert gradients[1][0] - gradients[0][0] == pytest.approx(0.35, rel=1e-9)
    assert gradients[1][1] - gradients[0][1] == pytest.approx(-0.35, rel=1e-9)


@pytest.mark.parametrize("sensitivity", ADJOINTS)
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
@given(asked=st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True))
def test_a_start_that_is_not_asked_for_has_its_gradient(sensitivity, descending, asked):
    """Against autograd, with steps so fine that the two differ by 1e-8."""
    found = []
    for chosen in ("autograd", sensitivity):
        model = random_model("mlp", seed=3, solver="rk4", sensitivity=chosen)
        span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 41, dtype=torch.float64), learn_t0=True)
        times = [(40 - i) / 40 if descending else i / 40 for i in asked]
        sol = span(model.x, span.t_span.flip(0) if descending else None, save_at=times)[1]
        sol.square().sum().backward()
        found.append((span.t_f if descending else span.t0).grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# The running cost, and losses on the times alone


@pytest.mark.parametrize("sensitivity", ADJOINTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
@pytest.mark.parametrize("descending", [False, True], ids=["ascending", "descending"])
def test_the_running_cost_is_in_every_gradient(solver, sensitivity, descending):
    """Against the state augmented by the cost so far, integrated by the reference. The cost has parameters and a time."""
    price = nn.Parameter(torch.tensor(0.6, dtype=torch.float64))

    class Cost(nn.Module):
        def __init__(self):
            super().__init__()
            self.price = price

        def forward(self, t, x):
            return (1 + torch.sin(t)) * self.price * x.square().sum(1)

    cost = Cost()
    tight = TIGHT if solver == "dopri5" else {}
    model = random_model("keyword", seed=9, solver=solver, sensitivity=sensitivity, integral_loss=cost, **tight)
    template = torch.linspace(0.1, 1.0, 61 if solver == "rk4" else 4, dtype=torch.float64)
    span = tm.LearnableSpan(model.node, template, learn_t0=True)
    x = model.x.clone().requires_grad_(True)
    t_eval, sol = span(x, template.flip(0)) if descending else span(x)
    end_loss(t_eval, sol).backward()
    leaves = [span.t_f, span.t0, x, price, *model.parameters]
    got = [p.grad.clone() for p in leaves]

    def augmented(t, y):
        z = y[:, 1:]
        return torch.cat([cost(t, z)[:, None], model.rhs(t, z)], 1)

    times = torch.stack([span.t_f, span.t0] if descending else [span.t0, span.t_f])
    y = reference(augmented, torch.cat([torch.zeros_like(x[:, :1]), x], 1), times)
    total = y[-1, :, 0].sum()
    expected = torch.autograd.grad(end_loss(None, y[:, :, 1:]) + total, leaves)
    for a, b in zip(got, expected, strict=True):
        assert float((a - b).norm()) <= ADJOINT * max(float(b.norm()), 1e-2)
    assert float(torch.as_tensor(span.running_cost).detach().sum()) == pytest.approx(total.item(), rel=1e-5)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_t_eval_carries_the_gradient_of_both_times(solver, sensitivity):
    model = random_model("mlp", solver=solver, sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5, dtype=torch.float64), learn_t0=True)
    t_eval, _ = span(model.x)
    # The paper's code adds t_eval[-1] to its loss.
    (3 * t_eval[-1] + 2 * t_eval[0]).backward()
    assert (float(span.t_f.grad), float(span.t0.grad)) == (3.0, 2.0)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_trajectory_has_the_gradients_of_a_forward_under_autograd(solver, sensitivity):
    results = []
    for way in ("forward", "trajectory"):
        chosen = "autograd" if way == "forward" else sensitivity
        model = random_model("keyword", seed=2, solver=solver, sensitivity=chosen, **(TIGHT if solver != "rk4" else {}))
        template = torch.linspace(0, 1, 9, dtype=torch.float64)
        span = tm.LearnableSpan(model.node, template)
        sol = span(model.x)[1] if way == "forward" else span.trajectory(model.x, template)
        sol.square().sum().backward()
        results.append([sol.detach(), span.t_f.grad, *(p.grad for p in model.parameters)])
    for a, b in zip(*results, strict=True):
        # The same computation in both: to rounding.
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
def test_points_read_off_an_interpolant_have_the_right_time_gradients(sensitivity):
    # With torchdyn's interpolator the points between do not shorten the steps; many of them lie in the last step, whose
    # length moves with t_f, yet where they are read off does not.
    template = torch.linspace(0, 1, 31, dtype=torch.float64)
    model = random_model(
        "keyword", solver="dopri5", sensitivity=sensitivity, interpolator="4th", atol=1e-6, rtol=1e-6,
        atol_adjoint=1e-9, rtol_adjoint=1e-9,
    )  # fmt: skip
    span = tm.LearnableSpan(model.node, template, learn_t0=True)
    _t_eval, sol = span(model.x)
    exact = reference(model.rhs, model.x, template)
    # The interpolant is of fourth order over long steps: 2e-5 here at a tolerance of 1e-6.
    torch.testing.assert_close(sol, exact, rtol=1e-4, atol=1e-4)
    assert span.steps < 15, "the points between are landed on: nothing is interpolated"
    sol.square().sum().backward()
    times = template.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(reference(model.rhs, model.x, times).square().sum(), times)
    # 1 %: the interpolant's error is differentiated with it.
    assert float(span.t_f.grad) == pytest.approx(float(expected[-1]), rel=1e-2)
    assert float(span.t0.grad) == pytest.approx(float(expected[0]), rel=1e-2)


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_backward_can_be_repeated(solver, sensitivity):
    case = Case(
        "keyword",
        1,
        torch.linspace(0, 1, 5, dtype=torch.float64),
        0.9,
        "trajectory",
        solver=solver,
        sensitivity=sensitivity,
    )
    loss = case.value()
    leaves = [case.span.t_f, case.span.t0, case.x, *case.model.parameters]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# What a solve costs and keeps


def _saved_bytes(run):
    """What autograd holds for backward, without the parameters and inputs that exist anyway."""
    kept = {}

    def pack(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    return sum(kept.values()), out


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_what_the_adjoint_keeps_does_not_grow_with_the_steps(solver):
    kept = []
    for fine in (False, True):
        options = {"atol": 1e-10, "rtol": 1e-10} if fine and solver == "dopri5" else {}
        model = random_model("mlp", batch=64, solver=solver, sensitivity="adjoint", **options)
        steps = 1 if solver == "dopri5" else (200 if fine else 20)
        span = tm.LearnableSpan(model.node, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        save_at = (1.0,) if solver == "rk4" else ()
        kept.append(_saved_bytes(lambda span=span, x=model.x, save_at=save_at: span(x, save_at=save_at))[0])
    # The grid's times themselves, 8 bytes a step, may be kept; a state of 64 x 2 would be 1,024 bytes a step.
    assert kept[1] - kept[0] <= 180 * 8 + 512


def test_the_autograd_graph_does_grow_with_the_steps():
    # The measure above sees what it should: the same two solves under autograd.
    kept = []
    for steps in (20, 200):
        model = random_model("mlp", batch=64, solver="rk4")
        span = tm.LearnableSpan(model.node, torch.linspace(0, 1, steps + 1, dtype=torch.float64))
        kept.append(_saved_bytes(lambda span=span, x=model.x: span(x, save_at=(1.0,)))[0])
    assert kept[1] > 5 * kept[0]


@pytest.mark.parametrize("sensitivity", ("autograd", *ADJOINTS))
@pytest.mark.parametrize("solver", ["euler", "rk4", "dopri5"])
def test_the_time_gradient_costs_at_most_one_evaluation(solver, sensitivity):
    counts = []
    for learn in (False, True):
        model = random_model("mlp", seed=1, solver=solver, sensitivity=sensitivity)
        span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 11, dtype=torch.float64))
        span.t_f.requires_grad_(learn)
        evaluations = []
        model.node.vf.vf.vf.register_forward_hook(lambda *_, seen=evaluations: seen.append(1))
        span(model.x)[1][-1].sum().backward()
        counts.append(len(evaluations))
    assert counts[1] <= counts[0] + 1


# ---------------------------------------------------------------------------------------------------------------------
# The yardsticks themselves


@pytest.mark.parametrize("equation", CLOSED_FORMS)
def test_the_reference_solves_the_closed_forms(equation):
    _, field, x = closed_form(equation)
    rhs = (
        field
        if getattr(field, "order", 1) == 1
        else (lambda t, y: torch.cat([y[:, 2:] if y.shape[1] > 2 else y[:, 1:], field(t, y)], 1))
    )
    for times in ((-0.4, 0.9), (0.9, -0.4)):
        span = torch.tensor(times, dtype=torch.float64)
        torch.testing.assert_close(reference(rhs, x, span)[-1], field.exact(span[0], span[1], x), rtol=1e-8, atol=1e-9)


def test_the_reference_step_has_order_four():
    errors = []
    for steps in (10, 20):
        z, dt = torch.ones(1, dtype=torch.float64), 1 / steps
        for _ in range(steps):
            z = rk4_step(lambda t, x: -x, torch.zeros(()), z, dt)
        errors.append(abs(float(z) - math.exp(-1)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.1)


@pytest.mark.parametrize("sensitivity", ["adjoint", "interpolated_adjoint"])
def test_a_gradient_of_zero_stays_zero_and_is_not_nan(sensitivity):
    model = random_model("mlp", solver="rk4", sensitivity=sensitivity)
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5, dtype=torch.float64))
    x = model.x.requires_grad_()
    (0.0 * span(x)[1][-1].sum()).backward()
    grads = [x.grad, span.t_f.grad, *(p.grad for p in span.vf.parameters() if p.grad is not None)]
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


class Heun(DiffEqSolver):
    """A solver of a user's own."""

    def __init__(self, stepping_class="fixed"):
        super().__init__(order=2, stepping_class=stepping_class)

    def step(self, f, x, t, dt, k1=None, args=None):
        k1 = f(t, x)
        k2 = f(t + dt, x + dt * k1)
        return None, x + dt / 2 * (k1 + k2), dt / 2 * (k2 - k1)


def test_a_users_own_solver_takes_its_steps_and_has_its_gradients():
    model = random_model("depthcat", solver="rk4")
    model.node.solver = Heun()
    span = tm.LearnableSpan(model.node, torch.linspace(0, 1, 5, dtype=torch.float64), t_f=0.6)
    x, f = model.x, span.vf

    def end():
        return span(x)[1][-1]

    by_hand, times = x, [0.0, 0.25, 0.5, 0.6]
    for a, b in pairwise(times):
        t, u = (torch.tensor(v, dtype=torch.float64) for v in (a, b))
        k1 = f(t, by_hand)
        by_hand = by_hand + (u - t) / 2 * (k1 + f(u, by_hand + (u - t) * k1))
    torch.testing.assert_close(end(), by_hand)
    end().sum().backward()
    slope = difference(lambda: end().sum(), [span.t_f], [torch.ones_like(span.t_f)])
    assert span.t_f.grad.item() == pytest.approx(slope, rel=1e-7)


def test_what_is_no_solver_is_refused():
    with pytest.raises(ValueError, match="stepping_class is 'fixed' or 'adaptive'; got 'own'"):
        make_stepper(Heun("own"))
    with pytest.raises(TypeError, match="Linear is not a torchdyn solver: it has no step, order"):
        make_stepper(nn.Linear(2, 2))
    assert make_stepper(Heun("adaptive")).adaptive and not make_stepper(Heun()).adaptive
