"""Calls of a module's steps beside the training: nothing is logged, and its metrics are as before."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from torchmetrics import Metric

__all__ = ["metrics_apart", "recorded_logs"]


@contextlib.contextmanager
def metrics_apart(pl_module: pl.LightningModule) -> Iterator[None]:
    """Lets the module's metrics begin anew, and gives them back what they had counted before."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    # A reset makes new tensors, and empties lists. That of a wrapper resets what it wraps.
    kept = [{n: copy.copy(v) if isinstance(v, list | dict) else v for n, v in vars(m).items()} for m in metrics]
    for metric in metrics:
        metric.reset()
    try:
        yield
    finally:
        for metric, before in zip(metrics, kept, strict=True):
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
