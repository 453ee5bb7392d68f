"""Pictures: what is drawn is what was measured."""

import contextlib
import io

import numpy as np
import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models import CNF

import torchdyn_mintime as tm
from torchdyn_mintime import diagnostics, plots
from torchdyn_mintime.depth.trials import Trial, Verdict
from torchdyn_mintime.flows import ContextCat, FlowModel, Gaussian, HyperCNF, HyperNet
from torchdyn_mintime.losses.potentials import SquaredDistance


@pytest.fixture
def span():
    with contextlib.redirect_stdout(io.StringIO()):
        return tm.LearnableSpan(NeuralODE(nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), solver="rk4"))


def test_convergence_and_violation(span, tmp_path):
    regularizer = tm.LyapunovRegularizer(span, SquaredDistance(), 2.0)
    x, target = torch.randn(16, 2), torch.zeros(16, 2)
    certificate = regularizer.certificate(x, target)
    figure, (left, right) = plots.grid_of_axes(1, 2)
    plots.convergence(left, certificate)
    assert len(left.lines) == 17  # a line a sample, and the bound
    np.testing.assert_allclose(left.lines[-1].get_ydata()[-1], np.exp(-2.0), rtol=1e-5)
    t_eval, sol = span(x)
    plots.violation(right, t_eval, regularizer.violation(t_eval, sol, target))
    assert plots.save(figure, tmp_path / "deep" / "a.png").stat().st_size > 1000


def test_growth_profile_and_hamiltonian(span):
    _, axes = plots.grid_of_axes(1, 3)
    plots.growth(axes[0], [0.1, 0.2], [1.0, 0.01], 0.01)
    assert axes[0].lines[0].get_ydata().tolist() == [0.1, 0.2]
    x, y = torch.randn(16, 2), torch.randint(0, 2, (16,))
    found = diagnostics.loss_profile(span, [(x, y)], nn.functional.cross_entropy)
    plots.profile(axes[1], found)
    np.testing.assert_allclose(axes[1].lines[0].get_ydata(), found.loss.tolist())
    energy = diagnostics.hamiltonian(span, x, nn.functional.cross_entropy, y)
    plots.hamiltonian(axes[2], energy)
    np.testing.assert_allclose(axes[2].lines[0].get_ydata(), energy.values.tolist())


def searched():
    """A verdict of four depths: the third one failed."""
    found = zip((16, 8, 3, 4), (0.001, 0.02, 0.3, 0.05), (True, True, False, True), (50, 10, 30, 20), strict=True)
    labels = (("rk4", 4), ("rk4", 2), ("learned-3", 1), ("learned-4", 1))
    trials = [
        Trial(*depth, evaluations, iterations, passed, solver_error=error)
        for depth, (evaluations, error, passed, iterations) in zip(labels, found, strict=True)
    ]
    return Verdict(True, trials[3], trials, 0.1, 0.1, 110)


def test_the_front_of_a_search_is_its_passed_depths_and_the_tolerance(tmp_path):
    figure, (axis,) = plots.grid_of_axes(1, 1)
    plots.front(axis, searched(), label="moons")
    curve, tolerance = axis.lines
    assert curve.get_xdata().tolist() == [16, 8, 4] and curve.get_ydata().tolist() == [0.001, 0.02, 0.05]
    assert curve.get_label() == "moons" and list(tolerance.get_ydata()) == [0.1, 0.1]
    assert [text.get_text() for text in axis.texts] == ["4 x rk4", "2 x rk4", "learned-4"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["4", "8", "16"]
    assert plots.save(figure, tmp_path / "a.png").stat().st_size > 1000


def test_a_search_shows_every_depth_over_the_iterations_spent_at_it(tmp_path):
    figure, (axis,) = plots.grid_of_axes(1, 1)
    plots.search(axis, searched())
    spent, ends = axis.lines[::2], axis.lines[1::2]
    assert [list(line.get_xdata()) for line in spent] == [[0, 50], [50, 60], [60, 90], [90, 110]]
    assert [line.get_ydata()[0] for line in spent] == [16, 8, 3, 4]
    assert [line.get_linestyle() for line in spent] == ["-", "-", ":", "-"]
    assert [line.get_marker() for line in ends] == ["o", "o", "x", "o"]
    assert plots.save(figure, tmp_path / "a.png").stat().st_size > 1000


def test_a_search_that_found_nothing_can_be_drawn():
    _, (left, right) = plots.grid_of_axes(1, 2)
    failed = Trial("rk4", 4, 16)
    verdict = Verdict(False, failed, [failed], None, 0.1, 0)
    plots.front(left, verdict)
    plots.search(right, verdict)
    assert left.lines[0].get_xdata().tolist() == [] and len(right.lines) == 2


def test_dots_of_trajectories_are_where_the_steps_end_and_marks_lie_on_their_curves():
    _, (left, right) = plots.grid_of_axes(1, 2)
    sol, ends = torch.randn(5, 12, 2), torch.randn(12, 2) + 20
    plots.trajectories(left, sol, torch.zeros(12, dtype=torch.int64), ends=ends, title="")
    starts, dots = (torch.as_tensor(np.asarray(drawn.get_offsets())) for drawn in left.collections)
    torch.testing.assert_close(starts.float(), sol[0])
    torch.testing.assert_close(dots.float(), ends)
    plots.curves(right, {"one": ([1, 2], [3, 4]), "two": ([1], [5])}, x="", y="", title="", marks={"two": (1, 5)})
    (dot,) = [line for line in right.lines if line.get_marker() == "o"]
    assert dot.get_xydata().tolist() == [[1, 5]] and dot.get_color() == plots.COLOURS[1]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["one", "two"]
    plots.curves(left, {"one": ([1, 2], [3, 4]), "two": ([1], [5])}, x="", y="", title="", legend=False)
    assert left.get_legend() is None


def test_wide_states_are_projected_with_their_dots():
    _, (axis,) = plots.grid_of_axes(1, 1)
    ends = torch.zeros(50, 6)
    ends[:, 4] = torch.linspace(-5, 5, 50)
    plots.trajectories(axis, torch.zeros(3, 50, 6), torch.zeros(50, dtype=torch.int64), ends=ends, title="")
    xs = np.asarray(axis.collections[1].get_offsets())[:, 0]
    assert xs.max() - xs.min() == pytest.approx(10, rel=1e-4)


def strong(net: HyperNet) -> HyperNet:
    """A hypernetwork at its start moves nothing; this one moves points by about their own size."""
    with torch.no_grad():
        net.net[-1].weight.mul_(5)
        net.net[-1].bias.mul_(5)
    return net


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_frames_of_a_flow_show_the_flow_itself(solver):
    node = NeuralODE(HyperCNF(strong(HyperNet(2, 4, 8))).double(), solver=solver, atol=1e-6, rtol=1e-6)
    t_span = torch.linspace(0, 1, 9 if solver == "rk4" else 2, dtype=torch.float64)
    model = FlowModel(tm.LearnableSpan(node, t_span, t_f=0.7), Gaussian(2, variance=0.1).double())
    film = plots.flow_frames(model, torch.zeros(2), frames=3, samples=50, cells=60, extent=2.0)
    assert film.times == pytest.approx([0.7, 0.35, 0.0])
    cell = (2 * 2.0 / 59) ** 2
    assert torch.allclose(film.density.sum((1, 2)) * cell, torch.ones(3, dtype=torch.float64), atol=0.02)
    back = model.encode(film.samples[-1])[0]
    assert torch.allclose(back, film.samples[0], atol=1e-3)
    # Row along y, column along x: the density at a cell is that at its place.
    line = torch.linspace(-2.0, 2.0, 60, dtype=torch.float64)
    place = torch.stack([line[40], line[25]])[None]
    assert film.density[-1][25, 40].item() == pytest.approx(model.log_prob(place).exp().item(), rel=1e-6)


def test_pictures_of_flows_are_written(tmp_path):
    span = tm.LearnableSpan(NeuralODE(HyperCNF(HyperNet(2, 4, 8)), solver="rk4"), torch.linspace(0, 1, 4))
    model = FlowModel(span, Gaussian(2))
    paths = plots.flows({"one": model}, torch.randn(40, 2), tmp_path / "moons", frames=2)
    assert [p.suffix for p in paths] == [".png", ".gif"] and all(p.stat().st_size > 1000 for p in paths)


def test_values_against_evaluations_are_markers_or_lines_by_seed():
    _, (axis,) = plots.grid_of_axes(1, 1)
    values = {
        "vanilla": [[(400, 0.1)], [(400, 0.2)]],
        "search": [[(16, 0.3), (2, 0.5), (4, 0.4)]],
        "skipped": [[(0, 0.9)]],
    }
    plots.trade_off(axis, values, y="loss", title="")
    drawn = [(line.get_xdata().tolist(), line.get_ydata().tolist(), line.get_linestyle()) for line in axis.lines]
    assert drawn[:2] == [([400], [0.1], "None"), ([400], [0.2], "None")]
    assert drawn[2] == ([2, 4, 16], [0.5, 0.4, 0.3], "-")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["vanilla", "search", "skipped"]
    assert {0, 1, 16, 256} <= set(axis.get_xticks())


def test_a_band_shows_the_deviation_and_dimensions_their_states():
    _, (left, right) = plots.grid_of_axes(1, 2)
    plots.curves(left, {"a": ([0, 1], [1.0, 2.0])}, x="t", y="v", title="", log=True, spread={"a": [0.5, 5.0]})
    (band,) = left.collections
    edges = band.get_paths()[0].vertices[:, 1]
    assert edges.max() == pytest.approx(7.0) and edges.min() == pytest.approx(0.02)  # never below 0 on a log scale
    sol = torch.randn(4, 6, 3)
    plots.dimensions(right, torch.linspace(0, 1, 4), sol, torch.zeros(6, dtype=torch.int64), 2, most=3)
    assert len(right.lines) == 3
    np.testing.assert_allclose(right.lines[1].get_ydata(), sol[:, 2, 2], rtol=1e-6)


def test_a_figure_for_a_column_has_its_width_and_small_letters(tmp_path):
    figure, axes = plots.column_of_axes(2, 2)
    axes[0].plot([0, 1], [0, 1], label="a")
    axes[0].legend()
    assert figure.get_figwidth() == pytest.approx(3.4)
    plots.save(figure, tmp_path / "a.png", small=True)
    assert axes[0].get_legend().get_texts()[0].get_fontsize() == 6 and axes[3].xaxis.label.get_fontsize() == 7


class Growing(nn.Module):
    """dz/dt = .7 z, with the log-density last."""

    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.7))

    def forward(self, t, x, args=None):
        return torch.cat([self.rate * x[:, :2], 2 * self.rate.expand(len(x), 1)], 1)


def growing(log_density="first", solver="rk4", points=11, **options):
    """The flow of dz/dt = .7 z, whose Gaussian base has the deviation exp(.7 t) on the way."""
    net = nn.Linear(2, 2, bias=False)
    net.weight.data = 0.7 * torch.eye(2)
    field = CNF(net) if log_density == "first" else Growing()
    span = tm.LearnableSpan(NeuralODE(field, solver=solver), torch.linspace(0, 1, points))
    return FlowModel(span, Gaussian(2), log_density=log_density, **options)


@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("log_density", ["first", "last"])
@pytest.mark.parametrize("base_at", ["start", "end"])
def test_frames_of_a_flow_go_from_its_base_to_its_data(base_at, log_density, fitted):
    model = growing(log_density, base_at=base_at)
    if fitted:
        model = model.fit_solvers(model.sample(200), evaluations=3, progress=False).model
    film = plots.flow_frames(model, torch.zeros(2), frames=3, samples=500, cells=21, extent=1.0)
    assert film.times == pytest.approx([0.0, 0.5, 1.0] if base_at == "start" else [1.0, 0.5, 0.0])
    growth = torch.exp(torch.tensor([0.0, 0.35, 0.7]) * (1 if base_at == "start" else -1))
    torch.testing.assert_close(film.samples, film.samples[:1] * growth[:, None, None], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(film.density[:, 10, 10], 1 / (2 * torch.pi * growth**2), rtol=0.02, atol=0)
    # The last frame is the model itself, to rounding.
    torch.testing.assert_close(film.samples[-1], model.decode(film.samples[0])[0], rtol=1e-5, atol=1e-5)
    assert film.steps == (1 if fitted else 10)


def test_frames_of_a_conditional_flow_are_those_of_its_context(tmp_path):
    net = nn.Sequential(ContextCat(), nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))
    model = FlowModel(tm.LearnableSpan(NeuralODE(CNF(net), solver="rk4"), torch.linspace(0, 1, 5)), Gaussian(2))
    context = torch.randn(1, 3)
    film = plots.flow_frames(model, torch.zeros(2), frames=2, samples=5, cells=11, context=context)
    expected = model.log_prob(torch.zeros(1, 2), context).exp()
    torch.testing.assert_close(film.density[-1, 5, 5], expected[0], rtol=1e-4, atol=0)
    paths = plots.flows({"one": model}, torch.randn(9, 2), str(tmp_path / "flow"), frames=2, context=context)
    assert all(path.exists() for path in paths)


def test_one_frame_alone_is_refused():
    with pytest.raises(ValueError, match="frames must be 2 or more; got 1"):
        plots.flow_frames(growing(), torch.zeros(2), frames=1)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 1)])
def test_paths_of_one_dimension_name_what_draws_them(shape):
    _, (axis,) = plots.grid_of_axes(1, 1)
    with pytest.raises(ValueError, match=r"two dimensions or more.*got \(3, 5.*plots.dimensions"):
        plots.trajectories(axis, torch.randn(shape), torch.zeros(5), title="")


def test_half_precision_labels_of_floating_point_and_paths_as_text_can_be_drawn(tmp_path):
    figure, axes = plots.grid_of_axes(1, 3)
    sol, labels = torch.randn(4, 9, 5, dtype=torch.bfloat16), (torch.arange(9) % 2).float()
    plots.trajectories(axes[0], sol, labels, title="", ends=sol[-1])
    plots.dimensions(axes[1], torch.linspace(0, 1, 4), sol, labels, 0)
    plots.points(axes[2], sol[0].float(), labels, title="")
    assert [text.get_text() for text in axes[2].get_legend().get_texts()] == ["class 0", "class 1"]
    assert plots.save(figure, str(tmp_path / "new" / "a.png")) == tmp_path / "new" / "a.png"


def test_many_frames_of_an_adaptive_flow_begin_at_its_base():
    torch.manual_seed(0)
    film = plots.flow_frames(growing(solver="dopri5", points=2), torch.zeros(2), frames=130, samples=3, cells=2)
    assert len(film.times) == len(film.samples) == 130
