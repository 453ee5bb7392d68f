"""Small Lightning trainings that the tests of faults stop, kill and resume. Run as a script, it is killed (SIGKILL).

    python training.py FOLDER KILLS

One fit is run to its end in a child process. A second one, with the same settings, is killed at random moments and
resumed from its last checkpoint each time, until it ends. What both ended with is left in FOLDER.
"""

import contextlib
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import learners
import pytorch_lightning as pl
import torch
from learners import SPAN, Learner, make_node
from pytorch_lightning.callbacks import ModelCheckpoint

from torchdyn_mintime.lightning import GrowDepth, MinimumTime

EPOCHS = 4


class RandomState(pl.Callback):
    """Puts torch's random state into every checkpoint, so that a resumed fit shuffles as one that never stopped."""

    def state_dict(self):
        return {"torch": torch.get_rng_state()}

    def load_state_dict(self, state_dict):
        # At once: Lightning draws the first epoch's order before `on_train_start`.
        torch.set_rng_state(state_dict["torch"])


def learner(field=None, solver="rk4", lr=0.02, momentum=True, seed=None, hook=None):
    """Makes a classifier of points; `field` may be any vector field of two dimensions."""
    kind = torch.optim.Adam if momentum else torch.optim.SGD
    node = make_node(field=field, solver=solver, t_span=SPAN, seed=seed)
    return Learner(node, optimizer=lambda parameters: kind(parameters, lr=lr), hook=hook)


def loader(size=24):
    return learners.loader(learners.halves(size), shuffle=True)


def trainer(epochs, callback, folder=None):
    """Makes a Trainer that saves every epoch in `folder`, if one is given."""
    if folder is None:
        return learners.trainer(epochs, callback)
    saving = RandomState(), ModelCheckpoint(folder, filename="{epoch}", save_last=True, save_top_k=-1)
    return learners.trainer(epochs, callback, *saving, enable_checkpointing=True)


METHODS = {
    "weight": lambda: MinimumTime(weight=0.3),
    "target": lambda: MinimumTime(target=0.6),
    # A threshold out of reach: it grows at every epoch.
    "growth": lambda: GrowDepth(threshold=1e-6, increment=0.1, max_t_f=1.95, rescue=False),
}


def ends_with(trained, callback, run):
    """All that a resumed fit must have in common with one that was never stopped, as plain values and tensors."""
    optimizer = run.optimizers[0].state_dict()
    return {
        "model": {k: v.clone() for k, v in trained.state_dict().items()},
        "optimizer": optimizer["state"],
        "callback": callback.state_dict(),
        "step": run.global_step,
        "epoch": run.current_epoch,
        "random": torch.get_rng_state(),
    }


def equal(a, b):
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def last_checkpoint(folder):
    path = Path(folder) / "last.ckpt"
    return path if path.exists() else None


def _child(task):
    """Runs a task in a child process, which ends without the parent's cleaning up."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        task()
        code = 0
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def _fit(folder, result, method, epochs):
    model, callback = learner(seed=0), METHODS[method]()
    torch.manual_seed(1)
    run = trainer(epochs, callback, folder)
    run.fit(model, loader(), ckpt_path=last_checkpoint(folder))
    torch.save(ends_with(model, callback, run), result)


def main(folder, kills):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    folder = Path(folder)
    method, epochs = "target", 6 if kills < 5 else 12
    start = time.monotonic()
    pid = _child(lambda: _fit(folder / "whole", folder / "whole.pt", method, epochs))
    assert os.waitpid(pid, 0)[1] == 0, "the fit that nobody kills failed"
    length = time.monotonic() - start
    chance, done = random.Random(0), 0
    while True:
        pid = _child(lambda: _fit(folder / "killed", folder / "killed.pt", method, epochs))
        if done < kills:
            time.sleep(chance.uniform(0.1, 0.6) * length)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            done += 1
            # What the kill left behind must load, with the safe default.
            if path := last_checkpoint(folder / "killed"):
                torch.load(path, weights_only=True)
            print("killed", done, "last checkpoint:", path and torch.load(path, weights_only=True)["epoch"], flush=True)
        elif done < kills and status == 0:
            # It came to its end before the kill: from the start again, with the kills that are left.
            for left in (folder / "killed").glob("*.ckpt"):
                left.unlink()
        else:
            assert status == 0, f"a resumed fit failed: {status}"
            return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
