"""Trainings whose weights are shared out over two processes, started by `test_sharding.py` as `python shards.py FOLDER`."""

import json
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from learners import Learner, make_node, points, trainer
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import GrowDepth, MinimumTime

SPAN = torch.linspace(0, 1, 5, dtype=torch.float64)
PLAIN = ("ddp", "fully_shard", "FSDP")
CALLBACKS = {
    "weight": lambda: MinimumTime(weight=0.3),
    "target": lambda: MinimumTime(target=0.66),
    "growth": lambda: GrowDepth(threshold=0.6, increment=0.2, max_t_f=1.7),
}


class Sharded(Learner):
    """For ModelParallelStrategy, which asks the module to share out its layers."""

    def __init__(self):
        super().__init__(make_node(seed=0, t_span=SPAN).double())

    def configure_model(self):
        if self.device_mesh is not None and not hasattr(self.model, "unshard"):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.model, mesh=mesh, ignored_params=tm.replicate_times(self.model))


class OnCpu(FSDPStrategy):
    """Lightning's own wants a GPU."""

    def _setup_model(self, model):
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


STRATEGIES = {
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "ModelParallelStrategy": lambda: ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend="gloo"
    ),
    "FSDPStrategy": lambda: OnCpu(process_group_backend="gloo"),
}


def plain(kind, accumulate=2):
    """Algorithm 1 in a loop; each rank has its own half of the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), make_node(seed=0, return_t_eval=False)).double()
    tm.wrap(model, SPAN, learn_t0=True)
    span = model[1]
    if kind == "ddp":
        outer = DistributedDataParallel(model)
    elif kind == "fully_shard":
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        outer = fully_shard(model, mesh=mesh, ignored_params=tm.replicate_times(model))
    else:
        times = tm.replicate_times(model)
        outer = FullyShardedDataParallel(
            model, ignored_states=times, use_orig_params=True, device_id=torch.device("cpu")
        )
    optimizer = torch.optim.Adam(tm.parameter_groups(outer, lr=0.02, span_lr=0.01))
    x, y = points(32, torch.float64)
    rank, seen = dist.get_rank(), []
    for step in range(12):
        for k in range(accumulate):
            rows = slice(8 * (2 * k + rank), 8 * (2 * k + rank) + 8)
            loss = nn.functional.cross_entropy(outer(x[rows])[-1], y[rows]) + 0.3 * span.duration
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        span.clip_()
        seen.append([step, span.t_f.item(), span.t0.item(), loss.item()])
    return seen


class Watch(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, run, model, outputs, batch, batch_idx):
        (span,) = tm.spans(model)
        self.seen.append([span.t_f.item(), float(outputs["loss"])])


def fit(strategy, callback, epochs, path=None):
    model, watch = Sharded(), Watch()
    run = trainer(
        epochs, CALLBACKS[callback](), watch, devices=2, strategy=STRATEGIES[strategy](), use_distributed_sampler=False
    )
    data = TensorDataset(*points(32, torch.float64))
    batches = DataLoader(data, 8, sampler=DistributedSampler(data, 2, run.global_rank, shuffle=False))
    run.fit(model, batches, ckpt_path=path, **({} if path is None else {"weights_only": True}))
    return run, watch.seen


def main(folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = {}
    for strategy in STRATEGIES:
        for callback in CALLBACKS:
            _, found[f"{strategy}, {callback}"] = fit(strategy, callback, 4)
        run, _ = fit(strategy, "weight", 2)
        run.save_checkpoint(path := Path(folder) / f"{strategy}.ckpt")
        _, found[f"{strategy}, resumed"] = fit(strategy, "weight", 4, path=path)
    for kind in PLAIN:
        found[kind] = plain(kind)
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
