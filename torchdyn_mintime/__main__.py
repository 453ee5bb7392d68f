"""The command line: ``python -m torchdyn_mintime --help``."""

from pathlib import Path
from typing import Annotated, Any

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
        _flow(task, method, range(first_seed, first_seed + seeds), iterations, lr, output)
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
    task: str, methods: list[str] | None, seeds: range, iterations: int | None, lr: float | None, output: Path
) -> None:
    """Flows have a protocol of their own: likelihood on fresh samples."""
    from torchdyn_mintime.experiments.errors import UsageError
    from torchdyn_mintime.experiments.flow_tutorial import run_tutorial
    from torchdyn_mintime.experiments.flows import FlowSettings, run_flow

    if task == "flow-tutorial":
        if methods or lr is not None:
            raise typer.BadParameter(
                "flow-tutorial has its methods and learning rate of its own: leave --method and --lr out"
            )
        run_tutorial(seeds, iterations, output, Console().print)
        return
    given: dict[str, Any] = {k: v for k, v in {"iterations": iterations, "lr": lr}.items() if v is not None}
    for name in methods or ["compare"]:
        try:
            run_flow(task, name, seeds=tuple(seeds), settings=FlowSettings(**given), out=output, say=Console().print)
        except UsageError as error:
            raise typer.BadParameter(str(error)) from error


@app.command()
def table(
    number: Annotated[str, typer.Argument(help="1 to 6, as in the paper.")],
    seeds: Annotated[int, typer.Option(min=1, help="How many.")] = 5,
    lrs: Annotated[
        str, typer.Option(help="Learning rates to try every method with; 'own': the task's.")
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
    from torchdyn_mintime.experiments.images import Source

    if number not in tables.TABLES:
        raise typer.BadParameter(f"there is no table {number!r}; choose among {', '.join(tables.TABLES)}")
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
    tables.make(number, options, output, Console())


@app.command()
def figure(
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
        _flow(_FLOW_FIGURES[number], None, range(seed, seed + 1), iterations, None, output)
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
