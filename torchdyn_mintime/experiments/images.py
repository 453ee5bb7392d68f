"""The paper's image data sets: MNIST, Fashion-MNIST, CIFAR-10, from a folder of the user's, a package or a download."""

import gzip
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchdyn_mintime.experiments.data import Data
from torchdyn_mintime.experiments.errors import UsageError

__all__ = ["MissingData", "Source", "cifar10", "fashion_mnist", "mnist"]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PAD = 4
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


class MissingData(RuntimeError):
    """A data set is not at hand; the message says how to get it."""


@dataclass(frozen=True)
class Source:
    """Where image data comes from.

    Attributes:
        folder: of the user's; what torchvision downloads lies below it, too.
        download: whether torchvision may fetch what is missing.
    """

    folder: Path = Path("data")
    download: bool = False


def mnist(seed: int, subset: int | None = None, source: Source | None = None) -> Data:
    """MNIST, ``[n, 1, 28, 28]``. For arguments see ``cifar10``."""
    return _prepared(*_idx("MNIST", source or Source(), []), seed, subset)


def fashion_mnist(seed: int, subset: int | None = None, source: Source | None = None) -> Data:
    """Fashion-MNIST, ``[n, 1, 28, 28]``; Debian's package is found by itself. For arguments see ``cifar10``."""
    return _prepared(*_idx("FashionMNIST", source or Source(), [DEBIAN]), seed, subset)


def cifar10(seed: int, subset: int | None = None, source: Source | None = None) -> Data:
    """CIFAR-10, ``[n, 3, 32, 32]``, normalised by the mean and deviation of the training images of each channel.

    Args:
        seed: of the choice of a subset.
        subset: how many training images; a fifth as many are taken for the test. None is all.
        source: where the files are.

    Raises:
        MissingData: they are nowhere.
    """
    source = source or Source()
    parts = [_torchvision("CIFAR10", source, train) for train in (True, False)]
    images = [torch.as_tensor(part.data).movedim(3, 1) for part in parts]
    labels = [torch.as_tensor(part.targets) for part in parts]
    return _prepared(images[0], labels[0], images[1], labels[1], seed, subset)


def _idx(name: str, source: Source, folders: Iterable[Path]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    for folder in (source.folder, source.folder / name / "raw", *folders):
        files = [_existing(folder / file) for file in IDX]
        if all(files):
            x, y, x_test, y_test = (_read_idx(file) for file in files if file)
            return x[:, None], y, x_test[:, None], y_test
    parts = [_torchvision(name, source, train) for train in (True, False)]
    return parts[0].data[:, None], parts[0].targets, parts[1].data[:, None], parts[1].targets


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.exists()), None)


def _read_idx(path: Path) -> Tensor:
    """The IDX format: two zero bytes, the type (8: bytes), how many dimensions, each as 4 bytes, then the entries."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise UsageError(f"{path.name} cannot be unpacked: {error}; fetch it again") from error
    if raw[:3] != b"\0\0\x08":
        raise UsageError(f"{path.name} is not an IDX file of bytes: it starts with {raw[:4]!r}")
    dimensions, begin = raw[3] if len(raw) > 3 else 0, 4
    begin += 4 * dimensions
    # Labels have one dimension, images three; a file that says otherwise has been swapped with another.
    expected = 1 if "labels" in path.name else 3
    if dimensions != expected or len(raw) < begin:
        raise UsageError(f"{path.name} has {dimensions} dimensions in {len(raw)} bytes, not {expected}; fetch it again")
    shape = np.frombuffer(raw, ">u4", dimensions, 4).tolist()
    if len(raw) - begin != math.prod(shape):
        raise UsageError(
            f"{path.name} has {len(raw) - begin} entries, not the {math.prod(shape)} of {shape}; fetch it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=begin).reshape(shape).copy())


def _torchvision(name: str, source: Source, train: bool) -> Any:
    import torchvision.datasets  # type: ignore[import-untyped]  # slow, and not needed for anything else

    try:
        return getattr(torchvision.datasets, name)(source.folder, train=train, download=source.download)
    except RuntimeError as error:
        package = ", or install Debian's package dataset-fashion-mnist" if name == "FashionMNIST" else ""
        raise MissingData(
            f"data missing: {name}; give --data with a folder that holds it as torchvision lays it out, or --download "
            f"where there is a network{package}"
        ) from error


def _prepared(x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, seed: int, subset: int | None) -> Data:
    if subset is not None:
        chosen = torch.Generator().manual_seed(seed)
        first, second = (
            torch.randperm(len(a), generator=chosen)[:n] for a, n in ((x, subset), (x_test, max(1, subset // 5)))
        )
        x, y, x_test, y_test = x[first], y[first], x_test[second], y_test[second]
    x, x_test = x.float() / 255, x_test.float() / 255
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Data((x - mean) / deviation, y.long(), (x_test - mean) / deviation, y_test.long(), pad=PAD)
