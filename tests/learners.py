"""Small trainings in Lightning, for all tests: one module, one trainer, one loader."""

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdyn.core import NeuralODE
from torchdyn.datasets import generate_concentric_spheres

ADAM = lambda parameters: torch.optim.Adam(parameters, lr=0.02)  # noqa: E731
SPAN = torch.linspace(0, 1, 5)


def make_node(dim=2, width=4, solver="rk4", t_span=None, seed=None, field=None, **options):
    """Makes a NeuralODE over a small network, or over ``field``; ``t_span`` becomes its own."""
    if seed is not None:
        torch.manual_seed(seed)
    field = field or nn.Sequential(nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, dim))
    node = NeuralODE(field, solver=solver, **options)
    if t_span is not None:
        node.t_span = t_span
    return node


class Learner(pl.LightningModule):
    """Classifies by the state at t_f.

    Args:
        model: returns ``(t_eval, sol)``; default: a small node over ``SPAN``.
        t_span: passed with every batch, as torchdyn's quickstart does; None leaves it to the model.
        optimizer: makes an optimizer of all parameters.
        classes: how many of the state's first entries are logits; None is all.
        hook: called with the learner and the number of the batch before every step.
        metric: gives the figure that is logged as "metric" in an epoch, by the epoch's number.

    Attributes:
        losses: of every step.
    """

    def __init__(self, model=None, t_span=None, optimizer=ADAM, classes=None, hook=None, metric=None):
        super().__init__()
        self.model = make_node(t_span=SPAN) if model is None else model
        self.t_span, self.optimizer, self.classes, self.hook, self.metric = t_span, optimizer, classes, hook, metric
        self.losses = []

    def loss(self, x, y):
        _, sol = self.model(x) if self.t_span is None else self.model(x, self.t_span)
        return nn.functional.cross_entropy(sol[-1][:, : self.classes], y)

    def training_step(self, batch, batch_idx):
        if self.hook is not None:
            self.hook(self, batch_idx)
        loss = self.loss(*batch)
        self.losses.append(loss.item())
        self.log("loss", loss, on_epoch=True, on_step=False)
        if self.metric is not None:
            self.log("metric", self.metric(self.current_epoch), on_epoch=True, on_step=False)
        return loss

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


def points(n=24, dtype=torch.float32):
    """Points of a plane, and whether their coordinates have the same sign."""
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def halves(n=24):
    """Points of a plane, and on which side of the vertical axis they are."""
    x, _ = points(n)
    return x, (x[:, 0] > 0).long()


def blobs(n=64, extra=1):
    """Two clouds that need little depth, with zeros added to the state."""
    y = torch.arange(n) % 2
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(3)) * 0.2 + torch.where(y == 1, 1.0, -1.0)[:, None]
    return torch.cat([x, torch.zeros(n, extra)], 1), y


def annuli(n=128):
    """Two rings around each other, with a zero added to the state, so that paths may pass each other."""
    x, y = generate_concentric_spheres(n, noise=1e-2, dim=2, inner_radius=0.5, outer_radius=1)
    return nn.functional.pad(x, (0, 1)), y.long()


def loader(data, batch=8, shuffle=False):
    """Loads ``(x, y)`` in batches."""
    return DataLoader(TensorDataset(*data), batch_size=batch, shuffle=shuffle)


def trainer(epochs, *callbacks, **options):
    """Makes a quiet Trainer on the processor."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    here = dict(accelerator="cpu", devices=1)
    return pl.Trainer(**{**quiet, **here, "max_epochs": epochs, "callbacks": list(callbacks), **options})
