"""Calls of a module's steps beside the training: nothing is logged, and its metrics, lists and dicts are as before."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torchmetrics import Metric

__all__ = ["Logged", "Number", "metrics_apart", "recorded_logs", "reduced"]

_REDUCTIONS: dict[str, tuple[Any, ...]] = {
    "mean": ("mean", "avg", torch.mean),
    "sum": ("sum", torch.sum, sum),
    "max": ("max", torch.max, max),
    "min": ("min", torch.min, min),
}
"""What Lightning takes for ``reduce_fx``."""
_NOT_THE_USERS = frozenset(vars(pl.LightningModule()))
"""Attributes of torch and Lightning, such as the dict of submodules."""
_OPTIONS = tuple(inspect.signature(pl.LightningModule.log).parameters)[3:]
"""The arguments of ``log`` after the name and the value. Those of ``log_dict`` after the dictionary are in the same order."""


@contextlib.contextmanager
def metrics_apart(pl_module: pl.LightningModule) -> Iterator[None]:
    """Lets the module's metrics begin anew, and gives them back what they had counted before.

    What its steps put into lists and dicts of the module, for the end of the epoch, is taken out again.
    """
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    # A reset makes new tensors, and empties lists. That of a wrapper resets what it wraps.
    kept = [{n: copy.copy(v) if isinstance(v, list | dict) else v for n, v in vars(m).items()} for m in metrics]
    collected = [(mine, list(mine) if isinstance(mine, list) else dict(mine)) for mine in _lists_and_dicts(pl_module)]
    for metric in metrics:
        metric.reset()
    try:
        yield
    finally:
        for mine, contents in collected:
            mine.clear()
            (mine.extend if isinstance(mine, list) else mine.update)(contents)
        for metric, before in zip(metrics, kept, strict=True):
            vars(metric).update(before)


def _lists_and_dicts(pl_module: pl.LightningModule) -> Iterator[Any]:
    """Yields those that are the user's own attributes, and those directly in them, such as one for each loader."""
    for name, mine in vars(pl_module).items():
        if name not in _NOT_THE_USERS and isinstance(mine, list | dict):
            yield mine
            for inner in mine.values() if isinstance(mine, dict) else mine:
                if isinstance(inner, list | dict):
                    yield inner


class Number(NamedTuple):
    """A number that was logged, as one of several that Lightning makes one of."""

    value: float
    reduction: str
    batch_size: float


class Logged(NamedTuple):
    """A value that a step logs, and what ``self.log`` is told of it."""

    name: str
    value: Any
    reduce_fx: Any = "mean"
    batch_size: Any = None

    def number(self, batch: Any) -> Number:
        """Returns the value as a number, of as many samples as were told, or else are in the batch.

        Raises:
            MisconfigurationException: Lightning does not take this ``reduce_fx``, or cannot see how large the batch is.
        """
        wanted = self.reduce_fx.lower() if isinstance(self.reduce_fx, str) else self.reduce_fx
        kind = next((kind for kind, names in _REDUCTIONS.items() if wanted in names), None)
        if kind is None:
            raise MisconfigurationException(
                f"{self.name!r} is logged with reduce_fx={self.reduce_fx!r}; Lightning takes 'mean', 'sum', 'min' or 'max'. "
                "Log with one of these, or log a torchmetrics object that does what you want"
            )
        size = self.batch_size
        if size is None:
            size = extract_batch_size(batch) if kind == "mean" else 1
        return Number(float(self.value), kind, float(size))


def reduced(numbers: list[Number]) -> float:
    """Returns the one number that Lightning makes of those of all batches."""
    values, sizes = (torch.tensor([n[i] for n in numbers], dtype=torch.float64) for i in (0, 2))
    kind = numbers[-1].reduction
    return float((values * sizes).sum() / sizes.sum() if kind == "mean" else getattr(values, kind)())


@contextlib.contextmanager
def recorded_logs(pl_module: pl.LightningModule) -> Iterator[dict[str, list[Logged]]]:
    """Lets the module log nothing, and gives what it would have logged, by name: what is logged is the training's."""
    seen: dict[str, list[Logged]] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        options = {**dict(zip(_OPTIONS, args, strict=False)), **kwargs}
        how = {key: options[key] for key in ("reduce_fx", "batch_size") if key in options}
        seen.setdefault(name, []).append(Logged(name, value, **how))

    def log_dict(dictionary: Any, *args: Any, **kwargs: Any) -> None:
        for name, value in dictionary.items():
            log(name, value, *args, **kwargs)

    held: dict[str, Any] = {key: vars(pl_module)[key] for key in ("log", "log_dict") if key in vars(pl_module)}
    vars(pl_module)["log"], vars(pl_module)["log_dict"] = log, log_dict
    try:
        yield seen
    finally:
        for key in ("log", "log_dict"):
            del vars(pl_module)[key]
        vars(pl_module).update(held)
