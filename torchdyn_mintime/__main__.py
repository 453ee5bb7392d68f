"""The command line: ``python -m torchdyn_mintime --help``."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer
from rich.console import Console

from torchdyn_mintime import __version__
from torchdyn_mintime.experiments import MissingData, UsageError, names

if TYPE_CHECKING:
    from torchdyn_mintime.experiments.store import Store

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Iterations: TypeAlias = Annotated[
    int | None, typer.Option("--iterations", min=1, help="Optimizer steps, instead of each task's own.")
]
LARGEST_SEED = 2**31
Seed: TypeAlias = Annotated[
    int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of data, initialisation and batches.")
]
Subset: TypeAlias = Annotated[
    int | None, typer.Option("--subset", min=1, help="Number of training images, with a fifth as many test images.")
]
Width: TypeAlias = Annotated[
    int | None, typer.Option("--width", min=1, help="Number of channels of the convolutional network (paper: 64).")
]
Data: TypeAlias = Annotated[Path, typer.Option("--data", help="Folder of image data, in torchvision's layout.")]
Download: TypeAlias = Annotated[
    bool, typer.Option("--download", help="Let torchvision download image data that is missing.")
]
Device: TypeAlias = Annotated[str, typer.Option("--device", help="Where to train: cpu, cuda, ...")]
Output: TypeAlias = Annotated[Path, typer.Option("--output", help="Folder for runs, tables and pictures.")]
DATA, OUTPUT = Path("data"), Path("results")

NO_DATA, NOT_FOUND, STOPPED = 1, 3, 130
"""Exit statuses, beside 0 and 2: click takes 2 for wrong use."""


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Neural ODEs that learn how deep they need to be: the paper's experiments, with the controls beside them.

    Begin with `demo`. `run --help` lists tasks and methods, `table --help` and `figure --help` the paper's tables and figures.
    Trained models are kept. Ctrl-C saves what was trained so far (of sampler-moons, the seeds that were trained to the end),
    and the same command goes on from there.

    Exit status: 0 done; 1 nothing was made, since data is missing or damaged; 2 wrong use; 3 a model of `run` or `compress`
    missed its target, such as a search that found nothing (tables, figures and the demo show such a model as it is, and end
    with 0); 130 stopped by Ctrl-C.
    """


@app.command("demo")
def make_demo(output: Output = OUTPUT, iterations: Iterations = None, seed: Seed = 0) -> None:
    """Compares vanilla, minimum-time, the search and controls on two moons and digits, in about two minutes."""
    from torchdyn_mintime.experiments.demo import demo

    store = _store(output)
    with _said(store, "demo"):
        demo(output / "demo", store, iterations, seed)


def _listing(title: str, lines: dict[str, str]) -> str:
    """Returns names with their lines, one below another, in a form that click does not wrap."""
    width = max(map(len, lines)) + 2
    return f"\b\n{title}:\n" + "\n".join(f"  {name:<{width}}{line}" for name, line in lines.items())


RUN_HELP = f"""Trains one task and prints a row for each method and seed. A finished run is not trained again.

Settings that are not given are the published ones, or the task's own.

{_listing("Tasks", names.TASKS | names.SAMPLER_TASKS)}

{_listing("Methods", names.METHODS)}

{_listing("Methods of flow-moons and flow-circles; flow-tutorial compares vanilla and minimum-time", names.FLOW_METHODS)}

{_listing("Methods of sampler-moons", names.SAMPLER_METHODS)}
"""


@app.command(help=RUN_HELP)
def run(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="A name of the list above.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="May be given several times. Default: minimum-time; for flows and the -cpu tasks several to compare."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from --first-seed on.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="The first seed.")] = 0,
    weight: Annotated[float | None, typer.Option(min=0, help="Price of time, eq. (13).")] = None,
    start: Annotated[float | None, typer.Option(min=0, help="First value of a learned t_f.")] = None,
    target: Annotated[
        float | None, typer.Option(min=0, help="Training loss that growth and search are to reach.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate of the network.")] = None,
    span_lr: Annotated[float | None, typer.Option(min=0, help="Learning rate of the times.")] = None,
    iterations: Iterations = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes through the data, instead of --iterations.")] = None,
    subset: Subset = None,
    width: Width = None,
    data: Data = DATA,
    download: Download = False,
    device: Device = "cpu",
    output: Output = OUTPUT,
) -> None:
    from torchdyn_mintime.experiments import comparison, samplers, tables
    from torchdyn_mintime.experiments.tasks import TASKS

    if task in names.SAMPLER_TASKS:
        _only(context, task, "method", "iterations", "first_seed")
        store = _store(output)
        with _said(store, task):
            samplers.run(method or (), range(first_seed, first_seed + seeds), iterations, output, store)
        return
    if task not in TASKS:
        raise typer.BadParameter(f"there is no task {task!r}; choose among {', '.join([*TASKS, *names.SAMPLER_TASKS])}")
    wanted = TASKS[task]
    if wanted.options is not None:
        _only(context, task, "iterations", "first_seed", *wanted.options)
    if iterations is not None and epochs is not None:
        raise typer.BadParameter("give --iterations or --epochs: each says how long to train")
    store = _store(output, data, download, device)
    with _said(store, wanted.title):
        methods = method or wanted.compared
        for name in methods:
            wanted.method(name)
        given = dict(weight=weight, start=start, target=target, lr=lr, span_lr=span_lr, subset=subset, width=width)
        settings = wanted.settings.but(**given)
        if epochs is not None:
            iterations = epochs * (len(wanted.load(settings, store.source).x) // (settings.batch or 10**9) or 1)
        options = comparison.Options(
            range(first_seed, first_seed + seeds), settings={**given, "iterations": iterations}
        )
        own_methods = wanted.options is None or "method" in wanted.options
        found = tables.make_own(task, methods, options, output, store, "" if own_methods else f"run-{task}")
        if (found["failure"] != "").any():
            raise typer.Exit(NOT_FOUND)


TABLE_HELP = f"""Makes a table of the paper: its rows, ours and the controls. Finished runs are not trained again.

{_listing("Tables", names.TABLES)}
"""


@app.command(help=TABLE_HELP)
def table(
    context: typer.Context,
    number: Annotated[str, typer.Argument(help="A name of the list above.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from --first-seed on.")] = 5,
    lrs: Annotated[
        str,
        typer.Option(help="Learning rates that every method is tried with, on another seed; 'own': the task's rate."),
    ] = ".01,.03,.1",
    only: Annotated[
        list[str] | None, typer.Option(help="One of the table's tasks; may be given several times.")
    ] = None,
    iterations: Iterations = None,
    subset: Subset = None,
    width: Width = None,
    sweep: Annotated[
        str, typer.Option(help="Numbers of steps at which vanilla is trained, to find the fewest that are as good.")
    ] = "1,2,3,4,6,8,12,16",
    first_seed: Annotated[
        int,
        typer.Option(min=0, max=LARGEST_SEED, help="The first seed. Settings were chosen on seeds below the default."),
    ] = 200,
    data: Data = DATA,
    download: Download = False,
    device: Device = "cpu",
    output: Output = OUTPUT,
) -> None:
    from torchdyn_mintime.experiments import comparison, tables
    from torchdyn_mintime.experiments.tasks import TASKS

    if number not in tables.TABLES:
        raise typer.BadParameter(f"there is no table {number!r}; choose among {', '.join(tables.TABLES)}")
    _, sections = tables.TABLES[number]
    settings = dict(iterations=iterations, subset=subset, width=width)
    rates = () if lrs == "own" else _numbers(lrs, float)
    numbers = range(first_seed, first_seed + seeds)
    options = comparison.Options(numbers, rates, _numbers(sweep, int), settings)
    if number == "flows":
        _only(context, "table flows", "only", "iterations", "first_seed")
        options = comparison.Options(numbers, (), tables.FLOW_SWEEP, settings)
    elif all(TASKS[name].options is not None for name in only or sections if name in sections):
        taken = ("only", "iterations", "first_seed", "lrs", "sweep", "data", "download", "device")
        _only(context, " ".join(["table", number, *(only or ())]), *taken)
    store = _store(output, data, download, device)
    with _said(store, f"table {number}"):
        tables.make(number, options, output, store, tuple(only or ()))


@app.command("tables")
def all_tables(
    which: Annotated[str, typer.Argument(help="The word 'all'.")],
    data: Data = DATA,
    download: Download = False,
    device: Device = "cpu",
    output: Output = OUTPUT,
) -> None:
    """Makes every table of the documentation. Prints first how many hours it takes. Finished runs are not trained again."""
    from torchdyn_mintime.experiments import tables

    if which != "all":
        raise typer.BadParameter(f"there is no {which!r}; write 'tables all', or 'table NUMBER' for one of them")
    store = _store(output, data, download, device)
    with _said(store, "tables"):
        tables.make_all(output, store)


FIGURE_HELP = f"""Draws a figure of the paper, from models trained here. Finished runs are not trained again.

{_listing("Figures", names.FIGURES)}
"""


@app.command(help=FIGURE_HELP)
def figure(
    context: typer.Context,
    number: Annotated[str, typer.Argument(help="A number of the list above.")],
    iterations: Iterations = None,
    seed: Seed = 0,
    subset: Subset = None,
    width: Width = None,
    data: Data = DATA,
    download: Download = False,
    device: Device = "cpu",
    output: Output = OUTPUT,
) -> None:
    from torchdyn_mintime.experiments import comparison, figures, tables

    known = sorted([*figures.FIGURES, *figures.FLOW_FIGURES], key=int)
    if number not in known:
        raise typer.BadParameter(f"there is no figure {number!r}; choose among {', '.join(known)}")
    if number in figures.FLOW_FIGURES:
        _only(context, figures.FLOW_FIGURES[number], "iterations", "seed")
    elif number != "5":  # the one of images
        _only(context, f"figure {number}", "iterations", "seed", "data", "download", "device")
    store = _store(output, data, download, device)
    with _said(store, f"figure {number}"):
        options = comparison.Options((seed,), settings=dict(iterations=iterations, subset=subset, width=width))
        if number in figures.FLOW_FIGURES:
            task = figures.FLOW_FIGURES[number]
            tables.make_own(task, ("vanilla", "minimum-time"), options, output, store, f"figure-{number}")
        else:
            figures.make(number, options, output, store)


@app.command()
def compress(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="The .pt of a finished vanilla run, in results/runs.")],
    target: Annotated[
        float | None, typer.Option(min=0, help="Training loss to keep; default: a little above the model's own.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate; default: a tenth of the run's.")] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps at most; default: as many as the run's settings have.")
    ] = None,
    trim: Annotated[
        bool, typer.Option("--trim", help="Train nothing; only remove steps and time that the loss does not need.")
    ] = False,
    data: Data = DATA,
    download: Download = False,
    device: Device = "cpu",
    output: Output = OUTPUT,
) -> None:
    """Fine-tunes a trained model to the fewest evaluations and writes it as plain torchdyn."""
    from torchdyn_mintime.experiments.compress import compress

    if trim:
        _only(context, "--trim", "checkpoint", "target", "trim", "data", "download", "device")
    store, folder = _store(output, data, download, device), output / "compressed"
    with _said(store, "compress"):
        path = compress(checkpoint, folder, store, target=target, lr=lr, iterations=iterations, only_trim=trim)
        if path is None:
            raise typer.Exit(NOT_FOUND)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Measures speed and memory beside torchdyn and torchdiffeq. `bench --help` lists the options.",
)
def bench(context: typer.Context) -> None:
    try:
        from benchmarks import bench as module
    except ModuleNotFoundError as error:
        if error.name != "benchmarks":
            raise
        raise typer.BadParameter(
            "the benchmarks are not part of the installed package; run this in the root of a checkout of the repository"
        ) from error
    module.main(context.args)


def _store(output: Path, data: Path = DATA, download: bool = False, device: str = "cpu") -> "Store":
    import torch

    from torchdyn_mintime.experiments import datasets, store

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # an assertion where torch was built without the device
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"--device {device!r} cannot be used ({reason}); try --device cpu") from error
    for folder in (output, output / "runs"):  # now: what is trained first would be lost
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise typer.BadParameter(f"--output: {folder} cannot be written ({error}); name another folder") from error
    return store.Store(output / "runs", Console(), datasets.Source(data, download), device)


@contextmanager
def _said(store: "Store", what: str) -> Iterator[None]:
    """Shows errors that a user can mend, and a stop by Ctrl-C, without a traceback. Other errors are defects and show it."""
    try:
        yield
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    except MissingData as error:
        store.console.print(f"{what}: not run: {error}")
        raise typer.Exit(NO_DATA) from error
    except KeyboardInterrupt as stop:
        kept = f"Stopped. Models that were trained to the end are kept in {store.folder}."
        store.console.print(str(stop) or kept, highlight=False)
        raise typer.Exit(STOPPED) from None


def _only(context: typer.Context, what: str, *names: str) -> None:
    """Raises an error for options that were given and that ``what`` would ignore."""
    known = {*names, "task", "number", "seeds", "output"}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    wrong = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if wrong:
        raise typer.BadParameter(f"{what} does not take {', '.join(wrong)}: leave it out")


def _numbers(text: str, kind: type) -> tuple:
    try:
        numbers = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"give numbers with commas between them; got {text!r}") from None
    if not all(0 < number < math.inf for number in numbers):
        raise typer.BadParameter(f"give positive finite numbers; got {text!r}")
    return numbers


if __name__ == "__main__":
    app(prog_name="python -m torchdyn_mintime")
