"""Progress bars of training, one for each model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["bars"]


@contextmanager
def bars(runs: Sequence[Any], title: str, console: Console) -> Iterator[Callable[[Any], None]]:
    """One bar for each run; gives a function to call after each of a run's iterations."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        made = {
            id(run): progress.add_task(
                f"{title}: {run.method.label}", total=run.settings.iterations, completed=len(run.history.loss), state=""
            )
            for run in runs
        }

        def advanced(run: Any) -> None:
            history, bar = run.history, made[id(run)]
            state = run.failure[:60]
            if history.loss and not state:
                state = f"loss {history.loss[-1]:.3f}  t_f {history.t_f[-1]:.3f}"
            # A second stage goes on beyond the iterations of the first.
            total = max(run.settings.iterations, len(history.loss)) if not run.done else max(len(history.loss), 1)
            progress.update(bar, total=total, completed=len(history.loss), state=state)

        yield advanced
