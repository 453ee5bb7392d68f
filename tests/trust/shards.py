"""Trainings whose weights are shared out over two processes, started by `test_sharding.py` as `python shards.py FOLDER`."""

import copy
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
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import GrowDepth, MinimumTime

SPAN = torch.linspace(0, 1, 5, dtype=torch.float64)
PLAIN = ("ddp", "fully_shard", "FSDP")
MODELS = {
    "rk4": {},
    "adjoint": {"sensitivity": "adjoint"},
    "a learned solver": {"solver": tm.LearnableSolver(4)},
}
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


def share(model, kind):
    """Returns what to call, for a model whose weights are shared out in the way ``kind``."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    times = tm.replicate_times(model)
    if kind == "fully_shard":
        return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)), ignored_params=times)
    return FullyShardedDataParallel(model, ignored_states=times, use_orig_params=True, device_id=torch.device("cpu"))


def classifier(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), make_node(seed=0, return_t_eval=False, **copy.deepcopy(options))).double()
    return tm.wrap(model, SPAN, learn_t0=True)


def plain(kind, name="rk4", accumulate=2, interrupted=False):
    """Algorithm 1 in a loop; each rank has its own half of the data. ``interrupted``: saved and loaded half way."""
    model = classifier(**MODELS[name])
    outer, span = share(model, kind), model[1]
    optimizer = torch.optim.Adam(tm.parameter_groups(outer, lr=0.02, span_lr=0.01))
    x, y = points(32, torch.float64)
    rank, seen = dist.get_rank(), []
    for step in range(12):
        if interrupted and step == 6:
            # Through DDP torch does not find the names of a span's state_dict.
            model_state, optimizer_state = get_state_dict(model if kind == "ddp" else outer, optimizer)
            model = classifier(**MODELS[name])
            outer, span = share(model, kind), model[1]
            optimizer = torch.optim.Adam(tm.parameter_groups(outer, lr=0.02, span_lr=0.01))
            set_state_dict(
                model if kind == "ddp" else outer,
                optimizer,
                model_state_dict=model_state,
                optim_state_dict=optimizer_state,
            )
        for k in range(accumulate):
            rows = slice(8 * (2 * k + rank), 8 * (2 * k + rank) + 8)
            loss = nn.functional.cross_entropy(outer(x[rows])[-1], y[rows]) + 0.3 * span.duration
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        span.clip_()
        seen.append([step, span.t_f.item(), span.t0.item(), loss.item()])
    return seen


def words(kind):
    """What is said to uses of a sharded model that find parts of weights."""

    def layers_by_themselves(**options):
        made = make_node(seed=0, **options).double()
        for layer in [m for m in made.vf.modules() if isinstance(m, nn.Linear)]:
            if kind == "fully_shard":
                fully_shard(layer, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
        span = tm.LearnableSpan(made, SPAN, checkpoint="sensitivity" not in options)
        if kind == "FSDP":
            times, policy = tm.replicate_times(span), ModuleWrapPolicy({nn.Linear})
            return FullyShardedDataParallel(
                span,
                ignored_states=times,
                use_orig_params=True,
                device_id=torch.device("cpu"),
                auto_wrap_policy=policy,
            )
        return share(span, kind)

    x, _ = points(8, torch.float64)
    span = tm.LearnableSpan(make_node(seed=0).double(), SPAN)
    outer = share(span, kind)
    outer(x)[1][-1].sum().backward()  # the weights are parts again
    uses = {
        "trajectory": lambda: span.trajectory(x),
        "fit_solver": lambda: tm.fit_solver(span, points(64, torch.float64)[0]),
        "search": lambda: tm.Shallowest(target=1.0).start(span, torch.optim.SGD(outer.parameters(), lr=0.1)),
        "adjoint": lambda: layers_by_themselves(sensitivity="adjoint")(x),
        "checkpoint": lambda: layers_by_themselves()(x),
    }
    said = {}
    for name, use in uses.items():
        try:
            use()
        except ValueError as error:
            said[name] = str(error)
    return said


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
        found[kind] = {name: plain(kind, name) for name in MODELS}
        found[f"{kind}, interrupted"] = plain(kind, "a learned solver", interrupted=True)
    found["words"] = {kind: words(kind) for kind in PLAIN[1:]}
    (Path(folder) / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
