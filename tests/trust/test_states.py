"""Everything that can be done to a span, in any order: a state machine that looks for the order in which it breaks.

Kept throughout: the grid ascends strictly, holds no near-duplicates, starts at t0 and ends in t_f; t_f lies inside its
bounds after a training forward; gradients are finite; and what is saved, copied, wrapped, unwrapped or moved loses nothing.
"""

import copy
import io
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from profiles import PROFILE
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.nn import DepthCat

import torchdyn_mintime as tm

# 200 sequences of 50 actions are 10,000 steps.
SEQUENCES, ACTIONS = (200, 50) if PROFILE == "thorough" else (40, 25)


class Holder(nn.Module):
    """A model with a node inside, to be wrapped and unwrapped in place."""

    def __init__(self, solver, sensitivity, timed, span):
        super().__init__()
        torch.manual_seed(0)
        net = [nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)]
        if timed:
            net = [DepthCat(1), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)]
        self.node = NeuralODE(nn.Sequential(*net), solver=solver, sensitivity=sensitivity)
        self.node.t_span = span

    def forward(self, x):
        return self.node(x)


def weights_of(model):
    return {n.replace("node.node.", "node."): p.detach().clone() for n, p in model.named_parameters() if "." in n[5:]}


def template(start, points, length, dtype=torch.float64):
    return torch.linspace(start, start + length, points, dtype=dtype)


class Life(RuleBasedStateMachine):
    @initialize(
        solver=st.sampled_from(["rk4", "euler", "midpoint", "tsit5", "dopri5"]),
        sensitivity=st.sampled_from(["autograd", "autograd", "adjoint", "interpolated_adjoint"]),
        timed=st.booleans(),
        start=st.sampled_from([0.0, -0.5, 2.0]),
        points=st.integers(2, 6),
        learn_t0=st.booleans(),
        double=st.booleans(),
    )
    def begin(self, solver, sensitivity, timed, start, points, learn_t0, double):
        dtype = torch.float64 if double else torch.float32
        self.options = (solver, sensitivity, timed, template(start, points, 1.0, dtype))
        self.learn_t0 = learn_t0
        self.model = self.fresh()
        self.loss, self.trained, self.snapshot, self.names = None, False, None, set(weights_of(self.model))
        self.seed = 0

    def fresh(self):
        return tm.wrap(Holder(*self.options).to(self.options[3].dtype), learn_t0=self.learn_t0)

    # ------------------------------------------------------------------------------------------------------- helpers

    @property
    def span(self):
        node = self.model.node
        return node if isinstance(node, tm.LearnableSpan) else None

    @property
    def dtype(self):
        return next(self.model.node.vf.parameters()).dtype

    def state(self, batch=3):
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(batch, 2, generator=generator).to(self.dtype)

    def facts(self, model=None):
        """All that must not get lost."""
        node = (model or self.model).node
        if not isinstance(node, tm.LearnableSpan):
            return {"t_span": node.t_span.tolist()}
        return {
            "t_f": node.t_f.item(),
            "t0": node.t0.item(),
            "bounds": node.bounds,
            "template": node.t_span.tolist(),
            "learn_t0": isinstance(node.t0, nn.Parameter),
            "grid": node.grid().tolist(),
        }

    def same_weights(self, before, model=None):
        after = weights_of(model or self.model)
        assert after.keys() == before.keys() == self.names
        assert all(torch.equal(after[k].double(), before[k].double()) for k in before)

    def forget_graph(self):
        self.loss = None
        self.model.zero_grad()

    wrapped = precondition(lambda self: self.span is not None)

    # ------------------------------------------------------------------------------------------------------- training

    @rule(train=st.booleans(), batch=st.sampled_from([0, 1, 3]))
    def forward(self, train, batch):
        before = weights_of(self.model)
        if self.span is None:
            batch = max(batch, 1)  # torchdyn's adaptive solvers never end on an empty batch: its error is NaN (U3)
        self.model.train(train)
        t_f = None if self.span is None else self.span.t_f.item()
        try:
            t_eval, sol = self.model(self.state(batch))
        except tm.IntegrationError:
            assert self.span is not None
            return
        assert sol.shape == (len(t_eval), batch, 2) and bool(torch.isfinite(sol).all())
        if self.span is None:
            return
        self.loss = (sol[-1].square().sum() + 0.1 * t_eval[-1], True)
        lower, upper = self.span.bounds
        if train:
            # The bounds are numbers and t_f has a dtype: they agree to its rounding.
            slack = 1e-6 * max(1.0, abs(upper))
            assert lower - slack <= self.span.t_f.item() <= upper + slack
        else:
            assert self.span.t_f.item() == t_f, "a forward in eval mode writes nothing"
        self.same_weights(before)

    @wrapped
    @rule()
    def backward(self):
        if self.loss is None:
            return
        loss, self.loss = self.loss[0], None
        loss.backward()
        for name, p in self.model.named_parameters():
            assert p.grad is None or bool(torch.isfinite(p.grad).all()), name

    @wrapped
    @rule(lr=st.sampled_from([1e-3, 0.1]), span_lr=st.sampled_from([0.01, 1.0, 1e3]), clip=st.booleans())
    def optimizer_step(self, lr, span_lr, clip):
        self.loss = None  # its graph is of the weights before the step
        own = [p for p in self.span.parameters(recurse=False) if p.requires_grad]
        rest = list(self.span.node.vf.parameters())
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        torch.optim.SGD([{"params": rest, "lr": lr}, {"params": own, "lr": span_lr}], lr=lr).step()
        self.model.zero_grad()
        if clip:
            self.span.clip_()

    @wrapped
    @rule()
    def clip(self):
        self.span.clip_()
        assert not self.span.clip_(), "the second time there is nothing to write"

    # ------------------------------------------------------------------------------------------------------ the interval

    @wrapped
    @rule(increment=st.floats(0.01, 0.4), more=st.floats(0.0, 1.0))
    def grow(self, increment, more):
        self.span.clip_()
        before, requires = self.span.t_f.item(), self.span.t_f.requires_grad
        facts = self.facts()
        try:
            growth = tm.DepthGrowth(self.span, 1e-9, increment, max_t_f=before + more if more > 0.01 else None)
        except ValueError:
            # The default max_t_f follows from the template, which may have become shorter than t_f.
            assert more <= 0.01 and self.span.default_max_t_f() < before
            assert self.facts() == facts and self.span.t_f.requires_grad == requires
            return
        grew = growth.step(1.0)
        after = self.span.t_f.item()
        assert (after > before) == grew and after <= growth.max_t_f + 1e-6 * max(1.0, abs(growth.max_t_f))
        assert not self.span.t_f.requires_grad
        growth.release()
        assert self.span.t_f.requires_grad == requires
        self.forget_graph()

    @wrapped
    @rule(loss_factor=st.sampled_from([0.5, 1.0, 3.0]))
    def trim(self, loss_factor):
        self.span.clip_()
        before, requires = weights_of(self.model), self.span.t_f.requires_grad
        x, t_f = self.state(4), self.span.t_f.item()

        def loss(out, *_):
            return (out[1][-1] if isinstance(out, tuple) else out).float().square().mean()

        with torch.no_grad():
            threshold = float(loss(self.model.eval()(x))) * loss_factor
        try:
            result = tm.trim(self.model, [x], loss, threshold)
        except ValueError:
            assert self.span.t_f.item() == t_f
        else:
            assert self.span.t_f.item() <= t_f + 1e-6 * max(1.0, abs(t_f)) and result.saved >= 1
        assert self.span.t_f.requires_grad == requires
        self.same_weights(before)
        self.forget_graph()

    @wrapped
    @rule(shift=st.sampled_from([-0.25, 0.0, 0.3]), points=st.integers(2, 7), length=st.floats(0.2, 2.0))
    def new_template(self, shift, points, length):
        start = self.span.t_span[0].item() + shift
        new = template(start, points, length, self.span.t_f.dtype)
        before = self.facts()
        try:
            self.span.t_span = new
        except ValueError:
            assert self.facts() == before
        else:
            assert torch.equal(self.span.t_span, new)
        self.forget_graph()

    @wrapped
    @rule(lower=st.floats(0.01, 0.5), upper=st.floats(0.4, 3.0))
    def new_bounds(self, lower, upper):
        start = self.span.t_span[0].item()
        before = self.facts()
        try:
            self.span.bounds = (start + lower, start + upper)
        except ValueError:
            assert lower >= upper
            assert self.facts() == before
        self.forget_graph()

    @wrapped
    @rule(part=st.floats(0.1, 1.0))
    def new_step_size(self, part):
        if self.span.adaptive:
            return
        length = (self.span.t_span[-1] - self.span.t_span[0]).item()
        before = self.facts()
        try:
            self.span.step_size = part * length
        except ValueError:
            # One step longer than what t_f has become.
            assert part * length > (self.span.t_f - self.span.t0).item() * (1 - 1e-3)
            assert self.facts() == before
        else:
            # Rounded to the dtype of the times; a step as long as the span but for a sliver becomes the span.
            assert self.span.step_size == pytest.approx(part * length, rel=1e-3, abs=1e-4)
        self.forget_graph()

    # ------------------------------------------------------------------------------------------------- moves and copies

    @rule(to=st.sampled_from(["float", "double", "bfloat16", "cpu"]))
    def move(self, to):
        if self.span is None and to == "bfloat16":
            return  # bare torchdyn cannot solve in bfloat16
        self.forget_graph()
        before = None if self.span is None else self.span.t_f.dtype
        getattr(self.model, to)()
        if self.span is None:
            # torchdyn keeps the span as a plain attribute, and its adaptive solvers want it in the state's dtype.
            self.model.node.t_span = self.model.node.t_span.to(self.dtype)
        else:
            expected = {"float": torch.float32, "double": torch.float64}.get(to, before)
            assert self.span.t_f.dtype == self.span.t0.dtype == expected

    @wrapped
    @rule()
    def save(self):
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        self.snapshot = (file.getvalue(), self.facts(), weights_of(self.model))
        self.load_into(self.fresh().to(self.dtype))

    def load_into(self, model):
        """Loads the snapshot; values of another precision are rounded, no more."""
        data, facts, weights = self.snapshot
        model.load_state_dict(torch.load(io.BytesIO(data), weights_only=True))
        now = self.facts(model)
        for key in ("t_f", "t0"):
            assert now[key] == pytest.approx(facts[key], rel=1e-6, abs=1e-6)
        assert now["bounds"] == facts["bounds"]
        assert now["template"] == pytest.approx(facts["template"], rel=1e-6, abs=1e-6)
        kept = weights_of(model)
        assert kept.keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(kept[name], value.to(kept[name].dtype))

    @wrapped
    @rule()
    def load(self):
        if self.snapshot is not None and self.dtype != torch.bfloat16:
            self.forget_graph()
            self.load_into(self.model)

    @wrapped
    @rule()
    def deepcopy(self):
        self.model.eval()
        other = copy.deepcopy(self.model)
        assert self.facts(other) == self.facts()
        self.same_weights(weights_of(self.model), other)
        x = self.state()
        with torch.no_grad():
            torch.testing.assert_close(other(x), self.model(x), rtol=0, atol=0)
        self.model, self.loss = other, None

    @wrapped
    @rule()
    def unwrap(self):
        if self.dtype == torch.bfloat16:
            return
        self.forget_graph()
        self.span.clip_()
        before, grid, t_f = weights_of(self.model), self.span.grid().tolist(), self.span.t_f.item()
        with warnings.catch_warnings():
            # torchdyn's rk4 is first order for a field of time, and its adaptive steps are of float32 precision.
            warnings.filterwarnings("ignore", message=".*torchdyn's own solve differs")
            facts = self.facts()
            try:
                tm.unwrap(self.model, self.state())
            except ValueError as error:
                # torchdyn's adaptive solvers lose inner points too, and only the last one can be moved until they do not.
                assert self.span.adaptive and len(grid) > 2, error  # noqa: PT017
                assert self.facts() == facts
                return
        assert isinstance(self.model.node, NeuralODE)
        # The end may be moved by a few units in the last place of float32, until torchdyn does not lose it.
        assert self.model.node.t_span.tolist() == pytest.approx(grid, rel=1e-5, abs=1e-5)
        assert self.model.node.t_span[-1].item() == pytest.approx(t_f, rel=1e-5, abs=1e-5)
        self.same_weights(before)

    @precondition(lambda self: self.span is None)
    @rule()
    def wrap(self):
        before, span = weights_of(self.model), self.model.node.t_span
        tm.wrap(self.model, learn_t0=self.learn_t0)
        assert torch.equal(self.span.t_span.to(span.dtype), span)
        assert self.span.t_f.item() == span[-1].item()
        self.same_weights(before)

    # ------------------------------------------------------------------------------------------------------- kept always

    @invariant()
    def the_grid_is_in_order(self):
        if getattr(self, "model", None) is None or self.span is None:
            return
        grid = self.span.grid().detach()
        t0, t_f = self.span.t0, self.span.t_f
        t0, t_f = self.span.interval.clipped(t0.item(), t_f.item(), t_f.dtype, isinstance(t0, nn.Parameter))
        assert grid[0].item() == pytest.approx(t0, abs=1e-12) and grid[-1].item() == pytest.approx(t_f, abs=1e-12)
        for a, b in itertools.pairwise(grid.tolist()):
            # The closeness that torchdyn's own check of a grid allows.
            assert b - a > 1e-8 + 1e-5 * abs(b), (a, b)

    @invariant()
    def the_weights_are_all_there_and_finite(self):
        if getattr(self, "model", None) is None:
            return
        kept = weights_of(self.model)
        assert kept.keys() == self.names
        assert all(bool(torch.isfinite(v).all()) for v in kept.values())
        if self.span is not None:
            assert math.isfinite(self.span.t_f.item()) and self.span.t_f.dtype.itemsize >= 4


TestLife = Life.TestCase
TestLife.settings = settings(
    settings.get_profile(PROFILE), max_examples=SEQUENCES, stateful_step_count=ACTIONS, report_multiple_bugs=False
)
