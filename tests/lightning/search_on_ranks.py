"""A search on two processes, started by `test_shallowest.py` as a user starts it: `python search_on_ranks.py FOLDER`.

Lightning's strategy "ddp" runs this file a second time for the second rank. Each rank leaves what it saw in FOLDER.
"""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pytorch_lightning as pl
import torch
from learners import Learner, annuli, loader, make_node, trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import torchdyn_mintime as tm
from torchdyn_mintime.lightning import Shallowest


class Watch(pl.Callback):
    """Records what must be equal on all ranks after every step, and the gradients of learned solvers before and after."""

    def __init__(self, search):
        self.search, self.seen, self.gradients = search, [], []

    def on_train_start(self, trainer, model):
        share = self.search.search.share_gradients

        def watched(gradients):
            own = [g.tolist() for g in gradients]
            share(gradients)
            self.gradients.append([own, [g.tolist() for g in gradients]])

        self.search.search.share_gradients = watched

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        (span,) = tm.spans(model)
        weights = torch.cat([p.detach().flatten().double() for p in span.parameters()])
        self.seen.append([self.search.search.trials[-1].label, self.search.search.done, weights.tolist()])


def main(folder):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = TensorDataset(*annuli(64))
    module = Learner(make_node(3, 16, seed=0), torch.linspace(0, 1, 5), lambda p: torch.optim.Adam(p, 0.03), classes=2)
    callback = Shallowest(target=0.4, solver_tol=0.2)
    watch = Watch(callback)
    run = trainer(100, callback, watch, devices=2, strategy="ddp", use_distributed_sampler=False)
    rank = run.global_rank
    run.fit(module, DataLoader(data, batch_size=32, sampler=DistributedSampler(data, 2, rank, shuffle=False)))
    verdict = callback.verdict
    found = [verdict.feasible, verdict.iterations, [[t.label, t.passed, t.iterations, t.loss] for t in verdict.trials]]
    x, y = next(iter(loader(annuli(64), 64)))
    with torch.no_grad():
        loss = module.loss(x, y).item()
    record = {"found": found, "seen": watch.seen, "gradients": watch.gradients, "loss": loss}
    (Path(folder) / f"{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main(sys.argv[1])
