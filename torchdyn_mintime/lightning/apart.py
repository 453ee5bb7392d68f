"""Calls of a module's steps beside the training: nothing is logged, and its metrics are as before."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from torchmetrics import Metric

__all__ = ["metrics_apart", "recorded_logs"]


@contextlib.contextmanager
def metrics_apart(pl_module: pl.LightningModule) -> Iterator[None]:
    """Lets the module's metrics begin anew, and gives them back what they had counted before."""
    kept: list[tuple[Metric, dict[str, Any]]] = []
    for metric in pl_module.modules():
        if isinstance(metric, Metric):
            # A reset makes new tensors, and empties lists.
            kept.append((metric, {n: list(v) if isinstance(v, list) else v for n, v in vars(metric).items()}))
            metric.reset()
    try:
        yield
    finally:
        for metric, before in kept:
            vars(metric).update(before)


@contextlib.contextmanager
def recorded_logs(pl_module: pl.LightningModule) -> Iterator[dict[str, Any]]:
    """Lets the module log nothing, and gives what it would have logged, by name: what is logged is the training's."""
    seen: dict[str, Any] = {}

    def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        seen[name] = value

    def log_dict(values: Any, *args: Any, **kwargs: Any) -> None:
        seen.update(values.items())

    held: dict[str, Any] = {key: vars(pl_module)[key] for key in ("log", "log_dict") if key in vars(pl_module)}
    vars(pl_module)["log"], vars(pl_module)["log_dict"] = log, log_dict
    try:
        yield seen
    finally:
        for key in ("log", "log_dict"):
            del vars(pl_module)[key]
        vars(pl_module).update(held)
