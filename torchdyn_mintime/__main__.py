"""The command line: ``python -m torchdyn_mintime --help``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Data = Annotated[Path, typer.Option("--data", help="Folder of image data, as torchvision lays it out.")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision fetch image data that is missing.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Output = Annotated[Path, typer.Option("--output", help="Folder for tables, figures and pictures.")]


@app.callback()
def main() -> None:
    """Neural ODEs that learn how deep they need to be: the paper's experiments, with the controls beside them."""


@app.command()
def demo(
    output: Output = Path("results"),
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of every model; default: 100.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, initialisation and batches.")] = 0,
) -> None:
    """Vanilla and minimum-time on two moons and handwritten digits: one table, with pictures. About two minutes."""
    from torchdyn_mintime.experiments import demo as module

    module.demo(output / "demo", Console(), iterations, seed)


@app.command()
def run(
    context: typer.Context,
    task: Annotated[str, typer.Argument(help="moons, annuli, digits, ...")],
    method: Annotated[list[str] | None, typer.Option(help="May be given several times. Default: minimum-time.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many, from --first-seed on.")] = 1,
    first_seed: Annotated[int, typer.Option()] = 0,
    weight: Annotated[float | None, typer.Option(min=0, help="Price of time, eq. (13).")] = None,
    start: Annotated[float | None, typer.Option(min=0, help="Where a learned t_f begins.")] = None,
    target: Annotated[float | None, typer.Option(min=0, help="Loss that growth and search are to reach.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate of the network.")] = None,
    span_lr: Annotated[float | None, typer.Option(min=0, help="Learning rate of the times.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of --iterations, where there are batches.")] = None,
    subset: Annotated[int | None, typer.Option(min=1, help="Training images; a fifth as many for the test.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the convolutional network (paper: 64).")] = None,
    data: Data = Path("data"),
    download: Download = False,
    device: Device = "cpu",
    output: Output = Path("results"),
) -> None:
    """One task: a row for each method and seed. A finished seed is not trained again, a stopped one goes on.

    What is not given is as published, or the task's own.
    """
    from torchdyn_mintime.experiments import single
    from torchdyn_mintime.experiments.errors import UsageError
    from torchdyn_mintime.experiments.images import MissingData, Source
    from torchdyn_mintime.experiments.methods import find_method
    from torchdyn_mintime.experiments.tasks import TASKS

    if task.startswith("flow-"):
        _flow(context, "", task, method, range(first_seed, first_seed + seeds), output, iterations, lr, weight)
        return
    if task not in TASKS:
        names = [*TASKS, "flow-moons", "flow-circles", "flow-tutorial"]
        raise typer.BadParameter(f"there is no task {task!r}; choose among {', '.join(names)}")
    methods = method or ["minimum-time"]
    for name in methods:
        try:
            find_method(name)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error
    settings = TASKS[task].settings.but(
        weight=weight,
        start=start,
        target=target,
        lr=lr,
        span_lr=span_lr,
        iterations=iterations,
        subset=subset,
        width=width,
    )
    console, source = Console(), Source(data, download)
    try:
        if epochs is not None:
            per_epoch = len(TASKS[task].load(settings, source).x) // (settings.batch or 10**9) or 1
            settings = settings.but(iterations=epochs * per_epoch)
        single.run(task, methods, settings, range(first_seed, first_seed + seeds), output, console, device, source)
    except MissingData as error:
        console.print(f"{TASKS[task].title}: not run: {error}")
        raise typer.Exit(1) from error
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


_FLOW_FIGURES = {"6": "flow-moons", "12": "flow-circles"}


def _flow(
    context: typer.Context,
    name: str,
    task: str,
    methods: list[str] | None,
    seeds: range,
    output: Path,
    iterations: int | None,
    lr: float | None = None,
    weight: float | None = None,
) -> None:
    """Flows have a protocol of their own: likelihood on fresh samples."""
    from torchdyn_mintime.experiments import flow_table
    from torchdyn_mintime.experiments.errors import UsageError
    from torchdyn_mintime.experiments.flow_tutorial import run_tutorial

    if task == "flow-tutorial":
        _only(context, task, "iterations", "first_seed")
        run_tutorial(seeds, iterations, output, Console())
        return
    _only(context, task, "iterations", "first_seed", "seed", "method", "lr", "weight")
    try:
        settings = flow_table.flow_settings(task, iterations=iterations, lr=lr, weight=weight)
        flow_table.run(task, tuple(methods or flow_table.METHODS), settings, seeds, output, Console(), name)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


def _only(context: typer.Context, what: str, *names: str) -> None:
    """Refuses options that were given and that ``what`` would ignore."""
    known = {*names, "task", "number", "seeds", "output"}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    wrong = [f"--{name.replace('_', '-')}" for name in given if name not in known]
    if wrong:
        raise typer.BadParameter(f"{what} has no use for {', '.join(wrong)}: leave it out")


@app.command()
def table(
    context: typer.Context,
    number: Annotated[str, typer.Argument(help="1 to 6, as in the paper; 'flows' for section 4.2's.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    lrs: Annotated[
        str, typer.Option(help="Learning rates to try every method with, on a seed of its own; 'own': the task's.")
    ] = ".01,.03,.1",
    only: Annotated[list[str] | None, typer.Option(help="Of the table's tasks; may be given several times.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of each task's own.")] = None,
    subset: Annotated[int | None, typer.Option(min=1, help="Training images; a fifth as many for the test.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the convolutional network (paper: 64).")] = None,
    sweep: Annotated[str, typer.Option(help="Steps of the control.")] = "1,2,3,4,6,8,12,16",
    data: Data = Path("data"),
    download: Download = False,
    device: Device = "cpu",
    output: Output = Path("results"),
) -> None:
    """A table of the paper: its rows, ours, and the controls, in one run. What was finished is not run again."""
    from torchdyn_mintime.experiments import tables
    from torchdyn_mintime.experiments.errors import UsageError
    from torchdyn_mintime.experiments.images import Source

    if number == "flows":
        _flow_table(context, seeds, iterations, only, output)
        return
    if number not in tables.TABLES:
        raise typer.BadParameter(f"there is no table {number!r}; choose among {', '.join(tables.TABLES)}, flows")
    options = tables.Options(
        seeds=seeds,
        rates=() if lrs == "own" else _numbers(lrs, float),
        iterations=iterations,
        subset=subset,
        width=width,
        tasks=tuple(only or ()),
        sweep=_numbers(sweep, int),
        source=Source(data, download),
        device=device,
    )
    try:
        tables.make(number, options, output, Console())
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error


def _flow_table(
    context: typer.Context, seeds: int, iterations: int | None, only: list[str] | None, output: Path
) -> None:
    from torchdyn_mintime.experiments import flow_table
    from torchdyn_mintime.experiments.errors import UsageError
    from torchdyn_mintime.experiments.flows import FLOW_TASKS

    _only(context, "table flows", "only", "iterations")
    try:
        settings = {task: flow_table.flow_settings(task, iterations=iterations) for task in only or FLOW_TASKS}
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    flow_table.make(settings, seeds, output, Console())


@app.command()
def figure(
    context: typer.Context,
    number: Annotated[str, typer.Argument(help="1, 3 to 12, as in the paper; 2 is a drawing, in the docs.")],
    iterations: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of each task's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, initialisation and batches.")] = 0,
    subset: Annotated[int | None, typer.Option(min=1, help="Training images; a fifth as many for the test.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the convolutional network (paper: 64).")] = None,
    data: Data = Path("data"),
    download: Download = False,
    device: Device = "cpu",
    output: Output = Path("results"),
) -> None:
    """A figure of the paper, from models trained here. What was trained before is not trained again."""
    from torchdyn_mintime.experiments import figures
    from torchdyn_mintime.experiments.errors import UsageError
    from torchdyn_mintime.experiments.images import MissingData, Source

    if number in _FLOW_FIGURES:
        methods = ["vanilla", "minimum-time"]
        _flow(
            context,
            f"figure-{number}",
            _FLOW_FIGURES[number],
            methods,
            range(seed, seed + 1),
            output,
            iterations=iterations,
        )
        return
    if number not in figures.FIGURES:
        names = sorted([*figures.FIGURES, *_FLOW_FIGURES], key=int)
        raise typer.BadParameter(f"there is no figure {number!r}; choose among {', '.join(names)}")
    options = figures.Options(iterations, seed, subset, width, Source(data, download), device)
    console = Console()
    try:
        figures.make(number, options, output, console)
    except (MissingData, UsageError) as error:
        console.print(f"figure {number}: not run: {error}")
        raise typer.Exit(1) from error


@app.command()
def compress(
    checkpoint: Annotated[Path, typer.Argument(help="The .pt of a finished vanilla run, in results/runs.")],
    target: Annotated[
        float | None, typer.Option(min=0, help="Training loss to keep; default: about the model's own.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Learning rate; default: a tenth of the run's.")] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="At most; default: as many as the run had.")] = None,
    trim: Annotated[bool, typer.Option("--trim", help="Train nothing; only take steps and time away.")] = False,
    data: Data = Path("data"),
    download: Download = False,
    device: Device = "cpu",
    output: Output = Path("results"),
) -> None:
    """Fine-tunes a trained model to the fewest evaluations and writes it as plain torchdyn."""
    from torchdyn_mintime.experiments import compress as module
    from torchdyn_mintime.experiments.errors import UsageError
    from torchdyn_mintime.experiments.images import MissingData, Source

    try:
        module.compress(
            checkpoint,
            output / "compressed",
            Console(),
            target=target,
            lr=lr,
            iterations=iterations,
            source=Source(data, download),
            device=device,
            only_trim=trim,
        )
    except UsageError as error:
        raise typer.BadParameter(str(error)) from error
    except MissingData as error:
        typer.echo(f"not run: {error}")
        raise typer.Exit(1) from error


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    help="Speed and memory beside torchdyn and torchdiffeq; `bench --help` lists its options.",
)
def bench(context: typer.Context) -> None:
    from torchdyn_mintime import bench as module

    module.main(context.args)


def _numbers(text: str, kind: type) -> tuple:
    try:
        numbers = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be numbers with commas between them") from None
    if any(number <= 0 for number in numbers):
        raise typer.BadParameter(f"{text!r} must be positive")
    return numbers


if __name__ == "__main__":
    app(prog_name="python -m torchdyn_mintime")
