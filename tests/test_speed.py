"""Speed and memory: what must be equal, and what must not grow. Times are only compared, never asserted.

pytest tests/test_speed.py                       equalities, counts and bytes
pytest tests/test_speed.py --benchmark-only      the timed comparisons, one group a case; read the ratios
"""

import copy
import gzip
import json
import lzma

import pandas
import pytest
import torch
from problems import random_model
from torch import nn
from torchdyn.core import NeuralODE
from torchdyn.models import CNF
from torchdyn.nn import DataControl, DepthCat

import torchdyn_mintime as tm
from benchmarks import bench, cases, deployed, gpu, timing
from benchmarks.contestants import contestants, mlp, state
from benchmarks.gpu_images import compare_trainings
from benchmarks.report import COLUMNS, write
from benchmarks.timing import saved_bytes
from torchdyn_mintime.numerics import Grid, integrate, make_stepper

MIB = 2**20


# ---------------------------------------------------------------------------------------------------------------------
# checkpoint=True is the plain path, to rounding


def gradients(node, x, template, *, checkpoint, loss, **call):
    """Value and gradients of a solve with t_f in the middle of the template, and how often the field was evaluated."""
    x = x.clone().requires_grad_()
    span = tm.LearnableSpan(node, template, t_f=0.83, learn_t0=True, checkpoint=checkpoint)
    torch.manual_seed(3)  # Hutchinson's noise
    t_eval, sol = span(x, **call)
    value = loss(t_eval, sol)
    parameters = {n: p for n, p in node.vf.named_parameters() if p.requires_grad}
    wanted = {"x": x, "t_f": span.t_f, "t0": span.t0, **parameters}
    found = torch.autograd.grad(value, list(wanted.values()), allow_unused=True)
    return sol.detach(), dict(zip(wanted, found, strict=True))


def at_the_end(t_eval, sol):
    return sol[-1].tanh().sum() + sol[-1].square().sum()


def along_the_way(t_eval, sol):
    return (t_eval[:, None] * sol.flatten(1).tanh()).sum() + sol[1].square().sum()


def assert_same(node, x, template, loss, **call):
    plain_sol, plain = gradients(node, x, template, checkpoint=False, loss=loss, **call)
    sol, found = gradients(node, x, template, checkpoint=True, loss=loss, **call)
    assert torch.equal(sol, plain_sol)
    for name, g in plain.items():
        if g is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], g, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("loss", [at_the_end, along_the_way])
@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4", "tsit5", "dopri5"])
@pytest.mark.parametrize("kind", ["mlp", "depthcat", "keyword", "lambda", "second order", "conv"])
def test_checkpoint_gives_the_gradients_of_autograd(kind, solver, loss):
    model = random_model(kind, solver=solver, atol=1e-4, rtol=1e-4)
    assert_same(model.node, model.x, torch.linspace(0, 1, 8, dtype=torch.float64), loss)


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
@pytest.mark.parametrize("save_at", [[0.2, 0.5], [0.0, 0.31], [0.83]])
def test_checkpoint_with_asked_times(solver, save_at):
    """Also where t_f itself is not asked for: then it has no gradient, as under autograd."""
    model = random_model("keyword", solver=solver)
    loss = along_the_way if len(save_at) > 1 else at_the_end
    assert_same(model.node, model.x, torch.linspace(0, 1, 6, dtype=torch.float64), loss, save_at=save_at)


def test_checkpoint_backwards_in_time():
    model = random_model("keyword")
    template = torch.linspace(0, 1, 6, dtype=torch.float64)
    assert_same(model.node, model.x, template, along_the_way, t_span=template.flip(0))


def test_checkpoint_with_an_interpolator():
    model = random_model("mlp", solver="dopri5", interpolator="4th")
    assert_same(model.node, model.x, torch.linspace(0, 1, 30, dtype=torch.float64), along_the_way)


@pytest.mark.parametrize("noise", [False, True])
def test_checkpoint_of_a_normalizing_flow(noise, float64):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    if noise:
        from torchdyn.core.defunc import DEFunc  # noqa: F401 - the estimator lives beside it
        from torchdyn.models.cnf import hutch_trace

        normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
        flow = CNF(net, trace_estimator=hutch_trace, noise_dist=normal)
    else:
        flow = CNF(net)
    node = NeuralODE(nn.Sequential(flow), solver="rk4")
    assert_same(node, torch.randn(5, 3), torch.linspace(0, 1, 6), along_the_way)


def test_checkpoint_with_a_running_cost(float64):
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    node = NeuralODE(net, solver="rk4", integral_loss=lambda t, x: x.square().sum(1, keepdim=True))
    assert_same(node, torch.cat([torch.zeros(4, 1), torch.randn(4, 2)], 1), torch.linspace(0, 1, 6), along_the_way)


def test_checkpoint_remembers_the_data_control(float64):
    """Another forward before backward replaces the control that the module holds (U19)."""
    net = nn.Sequential(DataControl(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    x, other = torch.randn(4, 2), torch.randn(4, 2)
    found = []
    for checkpoint in (False, True):
        span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 6), checkpoint=checkpoint)
        sol = span(x)[1]
        span(other)
        found.append(torch.autograd.grad(sol[-1].square().sum(), list(net.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_checkpoint_under_functional_call(float64):
    """Backward runs when the module has its own parameters again; the gradient is at the given ones."""
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    x = torch.randn(4, 2)
    found = []
    for checkpoint in (False, True):
        span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 6), checkpoint=checkpoint)
        scale = torch.tensor(1.7, requires_grad=True)
        given = {n: p.detach() * scale for n, p in span.named_parameters() if n.startswith("node.")}
        sol = torch.func.functional_call(span, given, (x,))[1]
        found.append(torch.autograd.grad(sol[-1].square().sum(), scale)[0])
    torch.testing.assert_close(*found)


def test_checkpoint_refuses_what_would_give_a_wrong_gradient():
    x = torch.randn(4, 2)
    span = tm.LearnableSpan(NeuralODE(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), solver="rk4"), checkpoint=True)
    with pytest.raises(ValueError, match="Dropout .*checkpoint=True"):
        span(x)
    span.eval()(x)[1].sum().backward()

    with pytest.raises(ValueError, match="autograd"):
        tm.LearnableSpan(NeuralODE(nn.Linear(2, 2), solver="rk4", sensitivity="adjoint"), checkpoint=True)


def test_checkpoint_after_an_optimizer_step_is_an_error_as_under_autograd():
    net = nn.Linear(2, 2)
    span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), checkpoint=True)
    loss = span(torch.randn(4, 2))[1][-1].square().sum()
    with torch.no_grad():
        net.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_checkpoint_under_autocast():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    x, found = torch.randn(4, 2), []
    for checkpoint in (False, True):
        span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 6), checkpoint=checkpoint)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = span(x)[1][-1].float().square().sum()
        found.append(torch.autograd.grad(loss, [span.t_f, *net.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)  # sums of bfloat16 products, in another order


# ---------------------------------------------------------------------------------------------------------------------
# Memory, in bytes: exact on any machine


def test_checkpoint_keeps_one_state_a_step():
    net, x = mlp(64, 128), state(512, 64)
    kept = {}
    for checkpoint in (False, True):
        span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 101), checkpoint=checkpoint)
        kept[checkpoint] = saved_bytes(lambda span=span: span(x)[1], [x, *net.parameters()])
    one = x.nbytes
    assert kept[True] <= 105 * one <= 15 * MIB
    assert kept[False] > 5 * kept[True]


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_inference_that_asks_for_the_final_state_keeps_one_state(solver):
    net, x = mlp(2, 16), state(64, 2)
    span = tm.LearnableSpan(NeuralODE(net, solver=solver), torch.linspace(0, 1, 51)).eval()
    with torch.no_grad():
        whole = span(x)[1]
        last = span(x, save_at=[span.t_f.item()])[1]
    assert torch.equal(last[-1], whole[-1])
    assert last.untyped_storage().nbytes() == x.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# Counts


@pytest.mark.parametrize("solver", ["rk4", "tsit5"])
def test_the_time_gradient_costs_no_evaluation(solver):
    net, x, found = mlp(3, 32), state(16, 3), []
    for learned in (False, True):
        span = tm.LearnableSpan(NeuralODE(net, solver=solver), torch.linspace(0, 1, 11))
        span.t_f.requires_grad_(learned)
        span(x)[1][-1].square().sum().backward()
        found.append(span.nfe)
    assert found[0] == found[1]


def test_the_same_step_with_and_without_a_gradient():
    """A step size that carries a gradient takes another route through the arithmetic."""
    net, x = mlp(3, 32).double(), state(16, 3).double()
    span = tm.LearnableSpan(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, 2, dtype=torch.float64))
    with torch.no_grad():
        plain = span(x)[1]
    torch.testing.assert_close(span(x)[1], plain, rtol=1e-14, atol=1e-14)


def test_what_is_kept_of_the_modules_follows_every_change():
    """The field's modules are not looked through at every call; a change of the field must still be seen."""
    x = torch.randn(4, 2)
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    node = NeuralODE(net, solver="rk4")
    span = tm.LearnableSpan(node, torch.linspace(0, 1, 3))

    def agrees():
        fresh = tm.LearnableSpan(NeuralODE(copy.deepcopy(net), solver="rk4"), torch.linspace(0, 1, 3))
        with torch.no_grad():
            return torch.equal(span(x)[1], fresh(x)[1])

    assert agrees()
    net[0] = nn.Linear(2, 2)  # replaced
    assert agrees()
    net.insert(0, DepthCat(1))  # a module that wants the time, though the field did not before
    net[1] = nn.Linear(3, 2)
    assert agrees()
    net.insert(0, DataControl())  # and one that wants the data
    net[2] = nn.Linear(5, 2)
    assert agrees()
    del net[0]
    net[1] = nn.Linear(3, 2)
    assert agrees()


# ---------------------------------------------------------------------------------------------------------------------
# The bench itself


def test_the_bench_runs_and_writes(tmp_path):
    results = bench.main(["--only", "time-gradient", "final-state", "--rounds", "1", "--out", str(tmp_path)])
    assert set(results["part"]) == {"time-gradient", "final-state"}
    written = pandas.read_csv(tmp_path / "bench-1-thread.csv")
    assert len(written) == len(results) and list(written) == list(results) == list(COLUMNS)
    records = json.loads((tmp_path / "bench-1-thread.json").read_text())["results"]
    assert [list(record) for record in records] == [list(COLUMNS)] * len(results)
    assert records[0]["evaluations"] == 400 and records[-1]["evaluations"] is None
    whole, last = results[results["part"] == "final-state"]["mebibytes"]
    assert whole == pytest.approx(101 * last)


def test_the_bench_measures_adaptive_solves_and_few_steps_beside_the_others(tmp_path):
    results = bench.main(["--only", "adaptive", "shallow", "--rounds", "1", "--out", str(tmp_path)])
    assert set(results["contestant"]) >= {"LearnableSpan", "NeuralODE"}
    assert (results["ratio"] > 0).all() and (results["milliseconds"] > 0).all()
    one_step = results[results["case"] == "1 step, forward + backward"]
    assert set(one_step["evaluations"]) == {4}


@pytest.fixture
def small_bench(monkeypatch):
    """Every part on four samples and at most three steps, each contestant once; nothing is compiled."""
    alternate = timing.alternate
    monkeypatch.setattr(
        cases, "contestants", lambda net, x, steps, **options: contestants(net, x[:4], min(steps, 3), **options)
    )
    monkeypatch.setattr(deployed, "SIZES", ((2, 4, 3),))
    monkeypatch.setattr(deployed, "EVALUATIONS", (4,))
    monkeypatch.setattr(timing, "alternate", lambda runs, rounds, *rest: alternate(runs, 1, *rest))
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("fixed", {"plain loop", "LearnableSpan", "NeuralODE"}),
        ("memory", {"autograd", "checkpoint=True", "adjoint", "autograd, forward twice"}),
        ("scaling", {"plain loop", "LearnableSpan", "NeuralODE"}),
        ("linearity", {"plain loop", "LearnableSpan", "NeuralODE"}),
        ("compile", {"plain loop", "compiled step", "LearnableSpan, compiled field"}),
        ("deployed", {"LearnableSpan", "as_network", "the field alone", "ONNX Runtime"}),
        ("penalty", {"by hand", "StepDoubling"}),
        ("dense", {"the ends alone", "dense=True", "landing on each"}),
        ("trace", {"by autograd", "closed form"}),
    ],
)
def test_every_part_of_the_bench_runs(tmp_path, small_bench, part, names):
    results = bench.main(["--only", part, "--rounds", "1", "--out", str(tmp_path)])
    assert set(results["part"]) == {part} and names <= set(results["contestant"])
    assert (results["ratio"] > 0).all() and (results["milliseconds"] > 0).all()
    if part == "memory":
        held = results.set_index("contestant")["mebibytes"]
        # Where all points are returned, both keep these, and the adjoint one derivative more.
        assert max(held["adjoint"], held["checkpoint=True"]) < held["autograd"] / 2
    if part == "penalty":  # both take the same evaluations
        assert (results.groupby("case")["evaluations"].nunique() == 1).all()
    if part == "dense":
        evaluations = results.set_index(["case", "contestant"])["evaluations"]
        for case in results["case"].unique():
            assert evaluations[case, "dense=True"] == evaluations[case, "the ends alone"]
    if part == "linearity":  # NeuralODE's checks grow quadratically: it is left out where they would take minutes
        cases_of_node = set(results[results["contestant"] == "NeuralODE"]["case"])
        assert cases_of_node == {"10", "30", "100", "300", "1000"}


def test_the_bench_draws_time_against_steps(tmp_path):
    results = pandas.DataFrame(
        [("linearity", str(n), name, 1.0, n / 10, n, None) for n in (1, 10, 100) for name in ("a", "b")],
        columns=list(COLUMNS),
    )
    written = write(results, tmp_path, 2)
    assert [path.name for path in written] == ["bench-2-threads.csv", "bench-2-threads.json", "linearity-2-threads.png"]
    assert written[-1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["plain loop", "LearnableSpan", "NeuralODE", "torchdiffeq rk4"])
@pytest.mark.parametrize("steps", [1, 4, 100])
@pytest.mark.benchmark(min_rounds=5, warmup=True)
def test_forward_and_backward(benchmark, name, steps):
    benchmark.group = f"forward + backward, 3-32-3, batch 512, {steps} steps"
    benchmark(contestants(mlp(3, 32), state(512, 3), steps, backward=True)[name])


LIMITS = {
    "shallow": {
        ("1 step, forward", "LearnableSpan"): 2.0,
        ("1 step, forward + backward", "LearnableSpan"): 1.75,
        ("4 steps, forward", "LearnableSpan"): 1.55,
        ("4 steps, forward + backward", "LearnableSpan"): 1.4,
    },
    "penalty": {
        ("4 steps, 3-32-3, batch 512", "StepDoubling"): 1.2,
        ("the search, 4 learned stages, 2-64-2, batch 64", "Shallowest"): 1.9,
    },
    "adaptive": {("tsit5, as initialised, forward + backward", "LearnableSpan"): 0.85},
    "dense": {("rk4, 200 times", "dense=True"): 1.6},
    "trace": {("dimension 2, forward + backward", "closed form"): 0.55},
}
"""What docs/performance.md says of these ratios, and a fifth to a third more: they change by 5 to 10 % from run to run."""


@pytest.mark.parametrize("part", LIMITS)
def test_no_ratio_has_grown(benchmark, request, part):
    if not request.config.getoption("benchmark_only"):
        pytest.skip("a comparison of times, for a quiet machine: pytest tests/test_speed.py --benchmark-only")
    rows = benchmark.pedantic(lambda: list(cases.PARTS[part](15)), rounds=1)
    found = {(row["case"], row["contestant"]): row["ratio"] for row in rows}
    assert {key: found[key] for key, limit in LIMITS[part].items() if found[key] > limit} == {}


# ---------------------------------------------------------------------------------------------------------------------
# The run on a GPU, rehearsed


def test_the_run_on_a_gpu_is_rehearsed_without_data(tmp_path):
    arguments = ["--tiny", "--only", "memory", "mnist", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    found = gpu.main(arguments)
    assert [row["contestant"] for row in found["memory"]["rows"]] == ["autograd", "checkpoint=True"]
    assert found["mnist"]["rows"] == [] and found["mnist"]["notes"][0].startswith("left out: ")
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["sections"].keys() == found.keys()
    assert "| memory | 2 x rk4, batch 16 | autograd |" in (tmp_path / "out" / "gpu.md").read_text()


def test_a_section_that_fails_leaves_its_traceback_and_the_next_one_runs(tmp_path, monkeypatch):
    def fails(session, part):
        part["rows"].append({"of": "before"})
        raise KeyError("a fault")

    monkeypatch.setitem(gpu.SECTIONS, "speed", (1, 1, fails))
    found = gpu.main(["--tiny", "--only", "speed", "memory", "--out", str(tmp_path)])
    assert found["speed"]["rows"] == [{"of": "before"}] and "KeyError: 'a fault'" in found["speed"]["notes"][0]
    assert len(found["memory"]["rows"]) == 2


def write_idx(folder, images):
    """MNIST's four files, packed in two ways, of random images."""
    folder.mkdir()
    for name, n in (("train", images), ("t10k", images // 2)):
        pixels = torch.randint(256, (n, 28, 28), dtype=torch.uint8).numpy().tobytes()
        (folder / f"{name}-images-idx3-ubyte.xz").write_bytes(lzma.compress(bytes(16) + pixels))
        labels = (torch.arange(n) % 10).to(torch.uint8).numpy().tobytes()
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels))


def test_the_images_are_read_trained_on_and_judged(tmp_path):
    write_idx(tmp_path / "mnist", 128)
    part = {"rows": [], "notes": []}
    compare_trainings(part, tmp_path / "mnist", torch.device("cpu"), seconds=0.5, batch=8, tiny=True)
    evaluations = [row["evaluations"] for row in part["rows"]]
    assert (
        evaluations[0] == 16 and evaluations[-1] == 40 and evaluations == [*sorted(evaluations[:-1], reverse=True), 40]
    )
    for row in part["rows"]:
        assert row["iterations"] >= 1 and 0 <= row["accuracy"] <= 1 and row["solver error"] < 0.1
    assert part["notes"][0].startswith("the search")


@pytest.mark.parametrize("size", [10, 1000])
def test_a_grid_costs_no_more_than_its_points(size):
    """No work that is quadratic in the number of points: the drive reads each node a fixed number of times."""

    class Counting(list):
        reads = 0

        def __getitem__(self, i):
            Counting.reads += 1
            return super().__getitem__(i)

    nodes = Counting(torch.linspace(0, 1, size + 1).tolist())
    integrate(lambda t, z: -z, torch.ones(1), Grid(nodes), make_stepper("rk4"))
    assert Counting.reads <= 12 * (size + 1)
