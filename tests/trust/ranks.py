"""Trainings on two processes, started by `test_ddp.py` as a user starts them: `python ranks.py FOLDER`.

Lightning's strategy "ddp" runs this file a second time for the second rank. Each rank leaves what it saw in FOLDER.
"""

import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from learners import Learner, make_node, points, trainer
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler, TensorDataset

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import GrowDepth, MinimumTime

SPAN = torch.linspace(0, 1, 5, dtype=torch.float64)
SIZE, BATCH, EPOCHS = 32, 16, 4


class Faulty(Learner):
    """In float64: a sum over two halves of a batch differs from the whole by rounding alone."""

    def __init__(self, fault=None):
        super().__init__(make_node(seed=0, t_span=SPAN).double())
        self.fault = fault

    def training_step(self, batch, batch_idx):
        fault = self.fault if self.trainer.global_rank == 1 and batch_idx == 1 else None
        if fault == "the solve fails":
            with torch.no_grad():
                next(self.model.parameters()).mul_(float("nan"))
        elif fault == "an error of the user's own":
            raise KeyError("a fault of the user's own")
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if fault == "the loss is NaN" else loss


class Watch(pl.Callback):
    """What must be equal on all ranks, after every step."""

    def __init__(self, other):
        self.other, self.seen = other, []

    def record(self, model, when):
        (span,) = tm.spans(model)
        price, growth = getattr(self.other, "price", None), getattr(self.other, "growth", None)
        self.seen.append(
            {
                "when": when,
                "t_f": span.t_f.item(),
                "bounds": span.bounds,
                "weights": torch.cat([p.detach().flatten() for p in span.node.parameters()]).tolist(),
                "price": price.weight if price else None,
                "grown": len(growth.history) if growth else None,
                "done": growth.done if growth else None,
            }
        )

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.record(model, "batch")

    def on_train_epoch_end(self, trainer, model):
        self.record(model, "epoch")


METHODS = {
    "weight": lambda: MinimumTime(weight=0.3),
    "target": lambda: MinimumTime(target=0.66),
    "growth": lambda: GrowDepth(threshold=0.6, increment=0.2, max_t_f=1.7),
}
FAULTS = (
    "the loss is NaN",
    "the solve fails",
    "an error of the user's own",
    "another number of batches",
    "another number of batches, not known before",
    "no batch at all, not known before",
)


def dataset():
    return TensorDataset(*points(SIZE, torch.float64))


class Uneven(Sampler):
    """The first samples: all of them for the first rank, ``less`` of them missing for the second."""

    def __init__(self, rank, less):
        self.size = SIZE - less * rank

    def __iter__(self):
        return iter(range(self.size))

    def __len__(self):
        return self.size


class Stream(IterableDataset):
    """The same without a length: nobody knows how many there are before the end."""

    def __init__(self, rank, less):
        self.data, self.size = dataset(), SIZE - less * rank

    def __iter__(self):
        return (self.data[i] for i in range(self.size))


def loader(rank, devices, fault=None, less=0, stream=False):
    """Batches of a rank. Of two processes each gets half of every batch: every second sample."""
    size = BATCH // devices
    if fault in FAULTS[3:]:
        less, stream = SIZE if fault == FAULTS[5] else BATCH, fault != FAULTS[3]
    if stream:
        return DataLoader(Stream(rank, less), batch_size=size)
    data = dataset()
    sampler = Uneven(rank, less) if less else DistributedSampler(data, devices, rank, shuffle=False)
    return DataLoader(data, batch_size=size, sampler=sampler)


def fit(method, fault=None, devices=2, epochs=EPOCHS, **batches):
    """The rank's record."""
    model, callback = Faulty(fault), METHODS[method]()
    watch = Watch(callback)
    run = trainer(
        epochs,
        callback,
        watch,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        use_distributed_sampler=False,  # Lightning's own shuffles
    )
    run.fit(model, loader(run.global_rank, devices, fault, **batches))
    return watch.seen


def main(folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {method: fit(method) for method in METHODS}
    # The last batch of an epoch has 8 samples on the first rank and 3 on the second.
    found |= {f"{method}, uneven": fit(method, less=5) for method in METHODS}
    found["weight, uneven, of a stream"] = fit("weight", less=5, stream=True)
    rank = torch.distributed.get_rank()
    for fault in FAULTS:
        try:
            fit("growth" if fault == "the solve fails" else "weight", fault)
        except (tm.IntegrationError, MisconfigurationException, KeyError) as error:
            found[fault] = [type(error).__name__, str(error)]
        else:
            found[fault] = None
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
