"""How far a long call is: a bar on a terminal and in a notebook, and a line now and then everywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich import get_console
from rich.progress import Progress

__all__ = ["progress_shown"]

EVERY = 20.0
"""Where there is no terminal, a line is written once in so many seconds."""


@contextmanager
def progress_shown(wanted: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """Gives a function ``show(text, done, total)``. ``done`` counts iterations; ``total`` is None where nobody knows it.

    Where there is no terminal, as in a batch job, rich shows nothing. The text then goes to the standard error stream, once
    in 20 seconds.
    """
    console = get_console()
    if not wanted:
        yield lambda text, done, total: None
    elif console.is_interactive or console.is_jupyter:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)
    else:
        yield _lines()


def _lines() -> Callable[[str, int, int | None], None]:
    last = perf_counter()

    def show(text: str, done: int, total: int | None) -> None:
        nonlocal last
        if perf_counter() - last >= EVERY:
            last = perf_counter()
            print(text if total is None else f"{text}: {done} of {total}", file=sys.stderr, flush=True)

    return show
