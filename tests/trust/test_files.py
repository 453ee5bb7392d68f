"""Checkpoints and data files that are cut, foreign or wrong: a clear error, nothing unpickled, the model as it was."""

import gzip
import io
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn
from torchdyn.core import NeuralODE
from trust.training import METHODS, equal, last_checkpoint, learner, loader, trainer

import torchdyn_mintime as tm
from torchdyn_mintime.experiments import MissingData, datasets


def make_span(seed=0, points=5):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
    return tm.wrap(NeuralODE(net, solver="rk4"), torch.linspace(0, 1, points))


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Lightning checkpoint of each method, as bytes."""
    found = {}
    for method, callback in METHODS.items():
        folder = tmp_path_factory.mktemp(method)
        trainer(1, callback(), folder).fit(learner(), loader())
        found[method] = last_checkpoint(folder).read_bytes()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_nothing_that_the_safe_loader_refuses(checkpoint, method):
    state = torch.load(io.BytesIO(checkpoint[method]), weights_only=True)
    assert any(k.endswith("t_f") for k in state["state_dict"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.999], ids=["empty", "cut", "the end is missing"])
def test_a_truncated_checkpoint_is_an_error_that_changes_nothing(checkpoint, method, part, tmp_path):
    data = checkpoint[method]
    path = tmp_path / "cut.ckpt"
    path.write_bytes(data[: int(part * len(data))])
    model = learner()
    # Lightning reads the file before the callbacks' setup, or after it: the weights are the same either way.
    before = {n.replace("model.node.", "model."): p.clone() for n, p in model.named_parameters()}
    with pytest.raises((RuntimeError, OSError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)) as caught:
        trainer(2, METHODS[method]()).fit(model, loader(), ckpt_path=path)
    # The errors are torch's and Lightning's own. Of an empty file they say nothing but "EOFError".
    assert str(caught.value) or isinstance(caught.value, EOFError)
    after = {n.replace("model.node.", "model."): p for n, p in model.named_parameters() if not n.endswith("t_f")}
    assert equal(after, before)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_a_checkpoint_that_runs_code_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights only"):
        torch.load(io.BytesIO(saved({"state_dict": Evil()})), weights_only=True)


FOREIGN = {
    "of another model": nn.Linear(3, 3).state_dict(),
    "without a weight": {k: v for k, v in make_span().state_dict().items() if not k.endswith("0.weight")},
    "of another shape": {**make_span().state_dict(), "vf.vf.vf.0.weight": torch.zeros(7, 2)},
    "with t_f a vector": {**make_span().state_dict(), "t_f": torch.zeros(2)},
    "a template that descends": {**make_span().state_dict(), "template": torch.tensor([1.0, 0.0])},
    "a template of one point": {**make_span().state_dict(), "template": torch.tensor([1.0])},
    "a template of NaN": {**make_span().state_dict(), "template": torch.tensor([0.0, float("nan")])},
    "bounds of one number": {**make_span().state_dict(), "bounds": torch.tensor([1.0])},
    "bounds of NaN": {**make_span().state_dict(), "bounds": torch.tensor([0.1, float("nan")])},
    "bounds before t0": {**make_span().state_dict(), "bounds": torch.tensor([-2.0, -1.0])},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_state_is_a_clear_error(kind):
    span = make_span()
    template, bounds = span.t_span.clone(), span.bounds
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        span.load_state_dict(FOREIGN[kind])
    name = next(n for n in ("template", "bound", "t_f", "weight") if n in kind or n == "weight")
    assert name in str(caught.value), str(caught.value)
    # torch itself copies weights one by one; the interval at least is whole.
    assert torch.equal(span.t_span, template) and span.bounds == bounds
    grid = span.grid().tolist()
    assert grid == sorted(grid)


def test_a_state_of_a_broken_training_is_an_error_at_the_first_use():
    span = make_span()
    span.load_state_dict({**span.state_dict(), "t_f": torch.tensor(float("nan"))})
    with pytest.raises(tm.IntegrationError, match="checkpoint"):
        span(torch.ones(1, 2))


@pytest.mark.parametrize("state", [{}, {"threshold": 1.0}, {"history": [], "steps": 0}], ids=["empty", "one", "two"])
def test_a_foreign_state_of_a_growth_is_a_clear_error(state):
    growth = tm.DepthGrowth(make_span(), 0.1)
    before = growth.state_dict()
    with pytest.raises(ValueError, match="missing"):
        growth.load_state_dict(state)
    assert growth.state_dict() == before


def test_a_foreign_state_of_a_target_is_an_error_that_changes_nothing():
    price = tm.TargetLoss(make_span(), 0.1)
    before = price.state_dict()
    with pytest.raises((KeyError, ValueError)):
        price.load_state_dict({"weight": 3.0})
    assert price.state_dict() == before


# ---------------------------------------------------------------------------------------------------------------------
# IDX files: two zero bytes, the type, the number of dimensions, each as 4 bytes, then the entries


def idx(array, magic=b"\0\0\x08"):
    return magic + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = idx(np.arange(6 * 28 * 28, dtype=np.uint8).reshape(6, 28, 28))
LABELS = idx(np.arange(6, dtype=np.uint8))


def folder_with(folder, first, suffix=""):
    names = dict(zip(datasets.IDX, (IMAGES, LABELS, IMAGES, LABELS), strict=True))
    for name, data in names.items():
        (folder / name).write_bytes(data)
    if first is not None:
        (folder / datasets.IDX[0]).unlink()
        (folder / (datasets.IDX[0] + suffix)).write_bytes(first)
    return datasets.Source(folder)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
def test_good_files_are_read(tmp_path, packed):
    source = folder_with(tmp_path, gzip.compress(IMAGES) if packed else IMAGES, ".gz" if packed else "")
    data = datasets.mnist(0, source=source)
    assert data.x.shape == (6, 1, 28, 28) and data.y.tolist() == [0, 1, 2, 3, 4, 5]


BAD = {
    "empty": (b"", ""),
    "cut in the header": (IMAGES[:6], ""),
    "cut in the entries": (IMAGES[:-100], ""),
    "too long": (IMAGES + b"12", ""),
    "of the wrong magic number": (b"\x89PNG" + IMAGES, ""),
    "of floats": (idx(np.zeros((6, 28, 28), np.uint8), b"\0\0\x0d"), ""),
    "labels in place of images": (LABELS, ""),
    "gzipped and cut": (gzip.compress(IMAGES)[:-20], ".gz"),
    "not gzipped at all": (IMAGES, ".gz"),
    "gzipped without the suffix": (gzip.compress(IMAGES), ""),
    "gzipped, with a wrong sum": (gzip.compress(IMAGES)[:-8] + b"\0" * 8, ".gz"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_data_file_is_named(tmp_path, kind):
    source = folder_with(tmp_path, *BAD[kind])
    with pytest.raises(MissingData, match="train-images-idx3-ubyte"):
        datasets.mnist(0, source=source)
