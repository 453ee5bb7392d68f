"""The paper's tables, with our rows and controls: ``TABLES``, by number.

``make`` makes one of them, ``make_all`` all of them, and ``make_own`` a table of any task and methods.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from torchdyn_mintime import spans
from torchdyn_mintime.experiments import MissingData, UsageError, figures, measure
from torchdyn_mintime.experiments.comparison import BEST_OF_SWEEP, TORCHDYN_TWIN, TWIN, Options, Row, compare
from torchdyn_mintime.experiments.methods import METHODS
from torchdyn_mintime.experiments.results import Line, markdown, print_table, show, write
from torchdyn_mintime.experiments.store import Plan, Store
from torchdyn_mintime.experiments.tasks import TASKS

__all__ = [
    "ALL",
    "FIRST_SEED",
    "FLOW_SWEEP",
    "IMAGE_SWEEP",
    "SWEEP",
    "TABLES",
    "Part",
    "make",
    "make_all",
    "make_own",
]

FLOW_SWEEP = (4, 6, 8, 12, 16)
"""Numbers of steps of the sweep for flows, as a user without this package would try them."""

IMAGE_SWEEP = (1, 2, 4, 8)
"""Numbers of steps of the sweep for images."""

FIRST_SEED = 200
"""First seed of the tables. Settings, and the defaults of the search, were chosen on seeds below it."""

# With one learning rate for weights and t_f, as in the paper's code, the rate .1 drives t_f to its lower bound: on two moons on
# most seeds, with an adaptive solver on some. So t_f has a rate of its own, that of annuli in the paper.
_TIMES = (("span_lr", 0.01),)
_LYAPUNOV = (("lr", 0.03),)  # of annuli in the paper's code
_PEERS = tuple(
    Row(method)
    for method in (
        *("lyanet", "steer", "taynode-2", "taynode-3", "rnode"),
        *("local-error", "srnode", "step-doubling", "coordinate-descent", "minimum-time-learned"),
    )
)


def _one_rate(paper: str, lr: float, weight: float | None = None) -> Row:
    """Returns minimum-time as published: t_f moves at the network's learning rate."""
    settings = (("lr", lr), ("span_lr", lr), *(() if weight is None else (("weight", weight),)))
    price = "" if weight is None else f", weight {weight:g}"
    return Row("minimum-time", paper, settings, f"minimum-time, one rate as published{price}", published=True)


_OURS = Row("minimum-time", "", _TIMES, "minimum-time, t_f at .01")
_ANNULI = (
    Row("vanilla", "t_f 1; 123 s; 86.6 ms"),
    _one_rate(".0819; 27 s (4.6x); 10.52 ms (8.2x)", 0.01),
    _OURS,
    Row("convergence-rate", ".09; 15.98 + 1.02 s (7.2x); 10.24 ms", _LYAPUNOV, published=True),
)
_DEFAULT_ADAPTIVE, _SKIPPED = Row("default-adaptive", control=True), Row("skipped", control=True)
_CONTROLS = (TWIN, BEST_OF_SWEEP, _DEFAULT_ADAPTIVE)
_IMAGE_CONTROLS = (*_CONTROLS, TORCHDYN_TWIN, _SKIPPED)
_FLOW_CONTROLS = (Row("torchdyn", control=True), _DEFAULT_ADAPTIVE, TWIN, TORCHDYN_TWIN, BEST_OF_SWEEP)
# The row "residual" takes the same step as a search that ends at one evaluation, whatever its error: is the ODE any better?
_CPU_ROWS = (Row("shallowest"), *_IMAGE_CONTROLS, Row("residual", control=True))
_CIFAR_WEIGHTS = (
    (1.0, "76.38 %; .1103; 47.3"),
    (0.5, "78.41 %; .1975; 81"),
    (0.1, "81.74 %; .3606; 146.1"),
)


def _weighted(weight: float, paper: str = "") -> Row:
    return Row("minimum-time", paper, (("weight", weight),), f"minimum-time, weight {weight:g}")


TABLES: dict[str, tuple[str, Mapping[str, Sequence[Row]]]] = {
    "1": (
        "Table 1: supervised learning",
        {
            "moons": (
                Row("vanilla", "t_f 1; 46.64 s; 71.88 ms"),
                _one_rate(".0904; 7.33 s (6.4x); 8.4 ms (8.6x)", 0.1),
                _OURS,
                Row(
                    "convergence-rate-longer",
                    ".10; 5.42 + .79 s (7.5x); 8.44 ms",
                    (("lr", 0.1),),
                    published=True,
                ),
                Row("target"),
                Row("shallowest"),
                *_CONTROLS,
            ),
            "annuli": (*_ANNULI, Row("target"), Row("shallowest"), Row("shallowest-adaptive"), *_CONTROLS),
        },
    ),
    "2": (
        "Table 2: image classification",
        {
            "digits": (Row("vanilla"), Row("minimum-time"), Row("shallowest"), *_CONTROLS, _SKIPPED),
            "mnist-cpu": (Row("vanilla"), Row("minimum-time"), *_CPU_ROWS),
            "fashion-mnist-cpu": (Row("vanilla"), Row("minimum-time"), *_CPU_ROWS),
            "cifar10-cpu": (
                Row("vanilla"),
                *(_weighted(weight) for weight, _ in _CIFAR_WEIGHTS),
                # The loss of weight .5 on seed 20.
                Row("target", "", (("target", 1.75),), "minimum-time, target loss 1.75"),
                *_CPU_ROWS,
            ),
            "mnist": (
                Row("vanilla", "99.57 %; 402.6 evaluations"),
                _one_rate("99.53 %; .0343; 16.1; 14x, 18x", 0.1),
                Row("minimum-time"),
                *_IMAGE_CONTROLS,
            ),
            "fashion-mnist": (
                Row("vanilla", "93.07 %; 402.6 evaluations"),
                _one_rate("92.68 %; .0564; 24.2; 12.6x, 11x", 0.1),
                Row("minimum-time"),
                *_IMAGE_CONTROLS,
            ),
            "cifar10": (
                Row("vanilla", "82.60 %; 404.9 evaluations"),
                *(_one_rate(paper, 0.1, weight) for weight, paper in _CIFAR_WEIGHTS),
                _weighted(0.1),
                *_IMAGE_CONTROLS,
            ),
        },
    ),
    "3": (
        "Table 3: the combined method",
        {
            "annuli": (
                *_ANNULI,
                Row(
                    "combined-paper",
                    ".0687; 16.03 s (7.7x); 10.01 ms",
                    (*_LYAPUNOV, ("span_lr", 0.03)),
                    "combined, one rate and bounds as published",
                    published=True,
                ),
                Row("combined", "", (*_LYAPUNOV, ("span_lr", 0.001)), "combined, t_f at .001", published=True),
                Row("growth", "", _LYAPUNOV, published=True),
                Row("shallowest"),
                *_CONTROLS,
            ),
        },
    ),
    "4": (
        "Table 4: against SNOpt",
        {
            "annuli": (
                *_ANNULI,
                Row("shallowest"),
                Row("vanilla-adjoint", "465 s; .33 s"),
                Row("snopt", "89 s; 34.2 ms"),
                Row("vanilla-adjoint-adaptive", "1307 s; .91 s"),
                Row("snopt-adaptive", "927 s; .54 s"),
                *_CONTROLS,
            ),
        },
    ),
    "5": (
        "Table 5: adaptive solvers",
        {
            "annuli-adaptive": (
                Row("vanilla", "t_f 1; 168 s; 117.288 ms"),
                _one_rate(".0724; 129 s (1.3x); 86.493 ms (1.36x)", 0.01),
                _OURS,
                Row("shallowest"),
                *_CONTROLS,
            ),
        },
    ),
    "6": (
        "Table 6: training time saved on images",
        {
            "mnist-cpu": (Row("vanilla"), Row("minimum-time"), Row("shallowest"), Row("snopt"), *_CONTROLS, _SKIPPED),
            "cifar10-cpu": (Row("vanilla"), _weighted(0.1), Row("shallowest"), Row("snopt"), *_CONTROLS, _SKIPPED),
            "mnist": (
                Row("vanilla"),
                _one_rate("94 %; t_f .0349; 99.53 %", 0.1),
                Row("snopt", "30 %; .38; 98.99 %"),
                *_IMAGE_CONTROLS,
            ),
            "cifar10": (
                Row("vanilla"),
                _one_rate("76 %; .3606; 81.74 %", 0.1, 0.1),
                Row("snopt", "19 %; .49; 77.82 %"),
                *_IMAGE_CONTROLS,
            ),
        },
    ),
    "flows": (
        "Flows",
        {
            "flow-moons": (
                Row("vanilla", "100 steps; over 18 min"),
                Row("minimum-time-paper", "20 steps; about 6 min (3x)"),
                Row("minimum-time"),
                Row("shallowest"),
                *_FLOW_CONTROLS,
            ),
            "flow-circles": (
                Row("vanilla"),
                Row("minimum-time-paper"),
                Row("minimum-time"),
                Row("shallowest"),
                *_FLOW_CONTROLS,
            ),
        },
    ),
    "peers": (
        "Other methods",
        {name: (Row("vanilla"), _OURS, Row("shallowest"), *_PEERS, TWIN) for name in ("moons", "annuli")},
    ),
    "robustness": (
        "Under noise and attack",
        {
            name: (Row("vanilla"), Row("minimum-time", "", settings), Row("shallowest"), TWIN)
            for name, settings in (("moons", _TIMES), ("annuli", _TIMES), ("digits", ()), ("mnist-cpu", ()))
        },
    ),
    "precision": (
        "Evaluations against solver error",
        {
            name: (
                Row("vanilla"),
                *(
                    Row("shallowest", "", (("solver_tol", tol),), f"search, tolerance {tol:g}")
                    for tol in (0.1, 0.03, 0.01, 0.003)
                ),
            )
            for name in ("moons", "annuli", "digits")
        },
    ),
}
"""The title of each table, and the rows for each of its tasks, by the paper's number, or by a name if the paper lacks it."""

REPORTS = {"robustness": measure.ROBUSTNESS}
"""Reports of the tables that show other figures than the goal of their tasks."""

LARGE = ("mnist", "fashion-mnist", "cifar10")
"""Tasks at the paper's size, for a GPU. They are run only if ``--only`` names them."""


@dataclass(frozen=True)
class Part:
    """One call of the command ``table``, as ``tables all`` makes it.

    Attributes:
        number: the table's number or name.
        only: the task.
        seeds: the number of seeds.
        rates: the learning rates that are tried.
        hours: the expected hours on one idle core.
    """

    number: str
    only: str
    seeds: int
    rates: tuple[float, ...]
    hours: float

    @property
    def options(self) -> Options:
        """The options of the call."""
        sweep = FLOW_SWEEP if self.number == "flows" else IMAGE_SWEEP if self.only.endswith("-cpu") else SWEEP
        return Options(range(FIRST_SEED, FIRST_SEED + self.seeds), self.rates, sweep)


SEARCH = METHODS["shallowest"].label

SUMMARISED = ("1", "2", "5")
"""Tables that the summary has: those with minimum-time and the search."""

SWEEP = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of steps of the sweep for other tasks."""

_GRID = (0.01, 0.03, 0.1)

ALL = (
    Part("5", "annuli-adaptive", 5, _GRID, 0.3),
    Part("3", "annuli", 5, _GRID, 0.5),
    Part("1", "moons", 5, _GRID, 0.4),
    Part("1", "annuli", 5, _GRID, 0.8),
    Part("4", "annuli", 5, _GRID, 1.2),
    Part("flows", "flow-moons", 5, (), 0.6),
    Part("flows", "flow-circles", 5, (), 0.6),
    Part("2", "digits", 5, _GRID, 0.5),
    Part("robustness", "moons", 5, _GRID, 0.1),
    Part("robustness", "annuli", 5, _GRID, 0.1),
    Part("robustness", "digits", 5, _GRID, 0.1),
    Part("precision", "moons", 5, _GRID, 0.3),
    Part("precision", "annuli", 5, _GRID, 0.3),
    Part("precision", "digits", 5, _GRID, 0.3),
    Part("2", "mnist-cpu", 3, (), 2.2),
    Part("2", "fashion-mnist-cpu", 3, (), 2.2),
    Part("2", "cifar10-cpu", 3, (), 4.5),
    Part("6", "mnist-cpu", 3, (), 1.5),
    Part("6", "cifar10-cpu", 3, (), 2.0),
    Part("robustness", "mnist-cpu", 3, (), 0.1),
    Part("peers", "moons", 5, _GRID, 0.8),
    Part("peers", "annuli", 5, _GRID, 1.6),
)
"""Every table of the documentation, in the order in which ``tables all`` makes them. No run is trained twice."""


def make(number: str, options: Options, folder: Path, store: Store, only: tuple[str, ...] = ()) -> pd.DataFrame:
    """Trains a table's rows and controls, prints the table, and writes it as CSV, JSON and Markdown.

    Tables with a search beside minimum time add a line for each task to ``summary.md``. Does not train again what an earlier
    call has finished. A task whose data is missing is left out, with a note, if the table has others.

    Args:
        number: a key of :data:`TABLES`.
        options: seeds, learning rates, steps of the sweep, settings.
        folder: for the table and the pictures.
        store: where the runs are kept.
        only: tasks of the table; empty: all but those of :data:`LARGE`.

    Returns:
        The results, a row for each trained model.

    Raises:
        UsageError: the table has no such task, or nothing could be made, and not for want of data.
        MissingData: nothing could be made, for want of data.
    """
    (title, sections), console = TABLES[number], store.console
    if unknown := set(only) - set(sections):
        raise UsageError(f"table {number} has no {min(unknown)!r}; its tasks are {', '.join(sections)}")
    results, texts = [], [f"# {title}"]
    refused: type[Exception] = UsageError
    for name in only or [name for name in sections if name not in LARGE]:
        task, rows = TASKS[name], sections[name]
        report = REPORTS.get(number, task.report)
        try:
            lines, plans = compare(name, rows, options, store, report)
        except (MissingData, UsageError) as error:
            console.print(f"{task.title}: not run: {error}")
            texts.append(f"## {task.title}\n\nNot run: {error}.")
            refused = MissingData if isinstance(error, MissingData) else refused
            continue
        heading = _titled(task.title, store.data(plans[rows[0]][0]).files)
        texts.append(show(f"{title}: {heading}", heading, lines, report, console))
        results += [line.results for line in lines if not line.results.empty]
        if number in SUMMARISED:
            _sum_up(name, lines, folder)
        if task.goal is measure.CLASSIFICATION:
            picture = folder / f"table-{number}-{name}.png"
            if number == "precision":
                figures.draw_precision_of(plans, store, picture)
            else:
                figures.draw_front_of(lines, plans, store, picture)
        figures.draw_flows_of([plans[row][0] for row in rows if row in plans], store, folder / f"table-{name}")
    if not results:
        raise refused("none of its tasks could be run")
    found = pd.concat(results)
    write(found, texts, folder, "-".join(("table", number, *only)), console)
    return found


def _titled(title: str, files: str) -> str:
    """Returns the title with the note on the data, if there is one."""
    return f"{title} ({files})" if files else title


def make_all(folder: Path, store: Store) -> None:
    """Makes every part of :data:`ALL`. After a stop, the same call goes on where it was.

    Writes each part's table as ``table-NUMBER-TASK``.
    """
    total = sum(part.hours for part in ALL)
    store.console.print(f"{len(ALL)} tables, about {total:.0f} hours of one core if nothing was trained before:")
    for part in ALL:
        store.console.print(f"  table {part.number}, {TASKS[part.only].title}: {part.hours:g} h", highlight=False)
    for part in ALL:
        with suppress(MissingData, UsageError):  # it is said already
            make(part.number, part.options, folder, store, (part.only,))


def _sum_up(task: str, lines: Sequence[Line], folder: Path) -> None:
    """Puts the line of a task into ``summary.csv`` and ``summary.md``, beside those of other tasks, if both methods ended."""
    if not {"minimum-time", SEARCH} <= {label for line in lines for label in line.results.get("method", ())}:
        return
    path, table = folder / "summary.csv", pd.DataFrame([_summary_of(task, lines)])
    if path.exists():
        others = pd.read_csv(path, dtype=str, keep_default_na=False)
        table = pd.concat([others[others["task"] != table.loc[0, "task"]], table]).fillna("")
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    (folder / "summary.md").write_text(markdown(table) + "\n", encoding="utf-8")


def _summary_of(task: str, lines: Sequence[Line]) -> dict[str, str]:
    """Returns a line of the summary: evaluations, gains and loss of a task, and whether the search's model is a true ODE."""
    vanilla, report = lines[0], TASKS[task].report
    by_method = {label: line for line in lines for label in line.results.get("method", ())}
    ours, search = by_method["minimum-time"], by_method[SEARCH]
    shown = {"vanilla": vanilla, "minimum time": ours, "search": search}
    good = [
        line
        for line in lines
        if line.control and not line.results.empty and line.results["steps"].astype(float).min() > 0
    ]
    good = [line for line in good if report.as_good(line.results, vanilla.results)]
    control = min(good, key=lambda line: line.finished["nfe"].median(), default=None)
    best = "none as good on every seed" if control is None else f"{control.text('nfe')} ({control.label})"
    cells = {name: line.text("nfe") for name, line in shown.items()}
    share = (search.finished["error"].astype(float) <= 0.1).mean() if len(search.finished) else 0.0
    return {
        "task": TASKS[task].title,
        "evaluations: vanilla": cells["vanilla"],
        "best control": best,
        "minimum time": cells["minimum time"],
        "search": cells["search"],
        "depth of minimum time: training, inference": _depths(ours, "training", "inference"),
        "depth of the search: training, first true model to target, inference": _depths(
            search, "training", "to_target", "inference"
        ),
        "test loss: vanilla, minimum time, search": ", ".join(line.text("loss", "{:.2g}") for line in shown.values()),
        "search true on test data": f"{share:.0%} of seeds; error {search.text('error', '{:.2g}')}, "
        f"{search.text('changed', '{:.1f}', scale=100)} % of predictions change",
    }


def _depths(line: Line, *names: str) -> str:
    """Returns how many times less than vanilla a line takes by depth alone, for each figure; "-" if a seed lacks the figure."""
    found = [line.depth(name) for name in names]
    return ", ".join("-" if times is None else f"{times:.3g}" for times in found)


# ------------------------------------------------------------------------------------- a table of any task and methods


def make_own(
    task: str, methods: Sequence[str], options: Options, folder: Path, store: Store, name: str = ""
) -> pd.DataFrame:
    """Trains some methods on one task, prints a row for each seed, then medians, and draws the models of the first seed.

    Does not train again what an earlier call has finished, and goes on with what it was stopped at. For a flow with the
    method minimum-time, vanilla with as many steps is added, by a span's rk4 and by torchdyn's own.

    Args:
        task: a key of ``TASKS``.
        methods: names that the task's ``method`` takes; ratios are to the first.
        options: seeds and settings.
        folder: for the table and the figures.
        store: where the runs are kept.
        name: of the files; default: made of task and methods.

    Returns:
        The results, a row for each trained model.

    Raises:
        UsageError: the task does not take a method or a setting.
        MissingData: the task's data is not there.
    """
    title, goal, report, console = TASKS[task].title, TASKS[task].goal, TASKS[task].report, store.console
    name = name or f"run-{task}-{'-'.join(methods).replace(':', '-')}"
    rows = [
        Row(m, control=i > 0 and m.startswith(("default-adaptive", "vanilla:", "torchdyn")))
        for i, m in enumerate(methods)
    ]
    twin = [TWIN, TORCHDYN_TWIN] if goal is measure.DENSITY and "minimum-time" in methods else []
    lines, plans = compare(task, [*rows, *twin], options, store)
    notes = [[note(plan, store) for plan in own] for own in plans.values()]
    seeds = [line.by_seed(own) for line, own in zip(lines, notes, strict=True)]
    first = [own[0] for own in plans.values()]
    cells = report.frame([line for own in seeds for line in own], detailed=True)
    print_table(cells.drop(columns="paper"), f"{title}, seed by seed", "", console)
    text = show(title, title, lines, report, console)
    if goal is measure.CLASSIFICATION:
        for line, plan in zip(lines, first, strict=True):
            console.print(_beside_published(line, plan), highlight=False)
            figures.draw_classifier(plan, store, folder)
        for plan in (plan for own in plans.values() for plan in own):
            if certificate := figures.certificate_of(plan, store):
                console.print(
                    f"{store.result(plan)['method']}, seed {plan.settings.seed}: {certificate}", highlight=False
                )
    drawn = [own[0] for row, own in plans.items() if row != TORCHDYN_TWIN]
    figures.draw_flows_of(drawn, store, folder / name)
    results = pd.concat([line.results for line in lines])
    write(results, [text], folder, name, console)
    return results


def note(plan: Plan, store: Store) -> str:
    """Returns a note on a run: why it failed, or that t_f is at its lower bound; else an empty text."""
    at_bound = (span.t_f.item() <= span.bounds[0] * (1 + 1e-5) for span in spans(store.model(plan)))
    return store.result(plan)["failure"] or ("t_f is at its lower bound" if any(at_bound) else "")


def _beside_published(line: Line, plan: Plan) -> str:
    """Returns a sentence on t_f and the training accuracy of a line, beside the published t_f if there is one."""
    values, perfect = line.results["t_f"].astype(float), (line.results["train_accuracy"] == 1).sum()
    text = (
        f"{line.label}: t_f {values.median():.4f} ({values.min():.4f} to {values.max():.4f}), "
        f"100 % on the training data in {perfect} of {len(values)}"
    )
    if published := TASKS[plan.task].published.get(plan.method):
        near = (abs(values / published - 1) <= 0.25).sum()
        text += f"; published t_f {published:g}: {near} of {len(values)} within 25 %"
    return text
