"""The data sets of the experiments: labelled points and images for classifiers, and points to learn the density of."""

import gzip
import math
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor
from torch.nn import functional

from torchdyn_mintime.experiments import MissingData

__all__ = [
    "Batches",
    "Data",
    "Source",
    "annuli",
    "augmented",
    "cifar10",
    "cropped",
    "density_circles",
    "density_moons",
    "digits",
    "fashion_mnist",
    "fresh",
    "mnist",
    "moons",
    "seeded",
    "spiral",
    "varied",
]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PAD, HUE, SATURATION = 4, 0.05, 0.05
"""Augmentation of images, as in the paper's code: the largest shift in pixels, and the largest changes of hue (1 is the whole
circle) and of saturation (a share of it)."""
CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@dataclass(frozen=True)
class Data:
    """A data set.

    Attributes:
        x, y: training points ``[n, ...]`` and labels ``[n]`` (int64).
        x_test, y_test: test points and labels.
        pad: largest random shift of training images, in pixels (random crop with so much black padding); 0: no shift.
        colours: whether training images are mirrored and their colours varied at random.
        scale: mean and deviation of each channel, ``[1, channels, 1, 1]``, by which images were normalised.
        files: a note on files that are not the original ones; empty if they are.
        draw: (n, generator) -> new training points ``[n, ...]``, in place of ``x``. There are no labels then.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    pad: int = 0
    colours: bool = False
    scale: tuple[Tensor, Tensor] = (torch.zeros(()), torch.ones(()))
    files: str = ""
    draw: Callable[[int, torch.Generator], Tensor] | None = None

    def to(self, device: torch.device) -> "Data":
        """Returns the data on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("x", "y", "x_test", "y_test")}
        mean, deviation = self.scale
        return replace(self, **tensors, scale=(mean.to(device), deviation.to(device)))

    def plain(self) -> "Data":
        """Returns the data without the random changes of training images."""
        return replace(self, pad=0, colours=False)


def fresh(draw: Callable[[int, torch.Generator], Tensor], x_test: Tensor) -> Data:
    """Returns data without labels, of which ``draw`` makes every batch anew."""
    none = torch.empty(0)
    return Data(none, none, x_test, none, draw=draw)


class Batches:
    """The batches of one training. The same seed gives the same batches.

    Args:
        data: the data set.
        size: samples of a batch; None: all.
        seed: of their order.

    Attributes:
        per_pass: batches of one pass through the data.
    """

    def __init__(self, data: Data, size: int | None, seed: int):
        self.data, self.size = data, size
        self.per_pass = max(1, len(data.x) // size) if size else 1
        # New points need random numbers of their own, apart from all that is drawn from the seed itself.
        self.generator = torch.Generator().manual_seed(seed + (data.draw is not None))
        self.order = torch.empty(0, dtype=torch.long)

    def next(self) -> tuple[Tensor, Tensor]:
        """Returns points and labels of the next batch."""
        data, size = self.data, self.size
        if size is None:
            return data.x, data.y
        if data.draw is not None:
            return data.draw(size, self.generator).to(data.x.device), data.y
        if len(self.order) < size:
            self.order = torch.randperm(len(data.x), generator=self.generator)
        index, self.order = self.order[:size].to(data.x.device), self.order[size:]
        return varied(data.x[index], data, self.generator), data.y[index]

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the order of batches."""
        return {"generator": self.generator.get_state(), "order": self.order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores that position."""
        self.generator.set_state(state["generator"].cpu())
        self.order = state["order"].cpu()


def varied(x: Tensor, data: Data, generator: torch.Generator) -> Tensor:
    """Returns normalised images ``[n, channels, height, width]``, each varied at random as ``data`` says.

    The images are varied as they were before normalisation, so that the padding is black.
    """
    if not data.pad and not data.colours:
        return x
    mean, deviation = data.scale
    x = cropped(x * deviation + mean, data.pad, generator)
    if data.colours:
        x = _coloured(x, generator)
    return (x - mean) / deviation


def cropped(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Returns images ``[n, channels, height, width]``, each shifted at random by up to ``pad`` pixels and filled with zeros."""
    if pad == 0:
        return x
    height, width = x.shape[-2:]
    padded = functional.pad(x, (pad, pad, pad, pad))
    corner = torch.randint(2 * pad + 1, (2, len(x)), generator=generator).to(x.device)
    rows = corner[0, :, None] + torch.arange(height, device=x.device)
    columns = corner[1, :, None] + torch.arange(width, device=x.device)
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _coloured(x: Tensor, generator: torch.Generator) -> Tensor:
    """Returns colour images in [0, 1], half of them mirrored, with random hue and saturation, as in the paper's code."""
    from torchvision.transforms.v2.functional import adjust_hue, adjust_saturation  # type: ignore[import-untyped]

    mirrored, hue, saturation = torch.rand((3, len(x)), generator=generator)
    x = torch.where((mirrored < 0.5).to(x.device)[:, None, None, None], x.flip(-1), x)
    x = x.clamp(0, 1)  # normalising and undoing it has rounding errors
    changes = zip(x, (HUE * (2 * hue - 1)).tolist(), (1 + SATURATION * (2 * saturation - 1)).tolist(), strict=True)
    return torch.stack([adjust_hue(adjust_saturation(image, s), h) for image, h, s in changes])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the global random states of numpy and torch, which torchdyn's data sets use, and restores both afterwards."""
    with isolate_rng(include_cuda=False):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        yield


# ------------------------------------------------------------------------------------------------------- to classify


def _drawn_twice(kind: str, n: int, seed: int, **options: float) -> Data:
    from torchdyn.datasets import ToyDataset

    with seeded(seed):
        (x, y), (x_test, y_test) = (ToyDataset().generate(n, kind, **options) for _ in range(2))
    return Data(x.float(), y.long(), x_test.float(), y_test.long())


def moons(seed: int = 0, n: int = 512, noise: float = 0.1) -> Data:
    """Returns torchdyn's two moons, ``[n, 2]``. The test set is a second draw.

    Example:
        >>> moons().x.shape
        torch.Size([512, 2])
    """
    return _drawn_twice("moons", n, seed, noise=noise)


def annuli(seed: int = 0, n: int = 512, noise: float = 1e-2) -> Data:
    """Returns concentric annuli, eq. (42): radius 1 is class 0 and radius .5 class 1, ``[n, 3]``.

    The third dimension is zero. In the plane no ODE can separate the classes, since its paths do not cross. The added
    dimension makes it possible.
    """
    return augmented(_drawn_twice("spheres", n, seed, dim=2, noise=noise, inner_radius=0.5, outer_radius=1.0))


def augmented(data: Data) -> Data:
    """Returns the data with a zero added to each state: a dimension in which paths can pass each other."""
    return replace(data, x=functional.pad(data.x, (0, 1)), x_test=functional.pad(data.x_test, (0, 1)))


def digits(seed: int = 0) -> Data:
    """Returns scikit-learn's handwritten digits, ``[n, 64]`` in [0, 1]: 1,347 for training, 450 for the test.

    Args:
        seed: of the split, which keeps the share of each digit.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=450, random_state=seed, stratify=y)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    return Data(x.float(), y.long(), x_test.float(), y_test.long())


# -------------------------------------------------------------------------------------------------- images to classify


@dataclass(frozen=True)
class Source:
    """Where image data comes from.

    Attributes:
        folder: the user's folder of image data, into which torchvision also downloads.
        download: whether torchvision may download what is missing.
    """

    folder: Path = Path("data")
    download: bool = False


def mnist(seed: int, subset: int | None = None, source: Source | None = None) -> Data:
    """Returns MNIST, ``[n, 1, 28, 28]``. For the arguments and errors see :func:`cifar10`."""
    return _prepared(_idx("MNIST", source or Source(), []), seed, subset)


def fashion_mnist(seed: int, subset: int | None = None, source: Source | None = None) -> Data:
    """Returns Fashion-MNIST, ``[n, 1, 28, 28]``. Finds the files of Debian's package. For the arguments see :func:`cifar10`."""
    return _prepared(_idx("FashionMNIST", source or Source(), [DEBIAN]), seed, subset)


def cifar10(seed: int, subset: int | None = None, source: Source | None = None) -> Data:
    """Returns CIFAR-10, ``[n, 3, 32, 32]``. Each channel is normalised by the mean and deviation of the training images.

    Reads batches in CIFAR's own layout even if their checksums are not the original ones, such as images that were
    compressed again. ``files`` of the result then says so.

    Args:
        seed: of the choice of a subset.
        subset: the number of training images, with a fifth as many test images. None: all.
        source: where the files are.

    Raises:
        MissingData: the files were not found, or one is damaged.
    """
    source = source or Source()
    try:
        return _prepared(_torchvision("CIFAR10", source), seed, subset, colours=True)
    except MissingData:
        folder = source.folder / "cifar-10-batches-py"
        if not all((folder / name).exists() for name in CIFAR_BATCHES):
            raise
    parts = [_read_cifar(folder / name) for name in CIFAR_BATCHES]
    x, y = (torch.cat(each) for each in zip(*parts[:-1], strict=True))
    found = _prepared([x, y, *parts[-1]], seed, subset, colours=True)
    return replace(found, files="files whose checksums are not the originals'")


def _read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Reads one batch of CIFAR's python version: a pickled dictionary of pixels ``[n, 3072]`` and labels."""
    try:
        with path.open("rb") as file:
            batch = _Arrays(file, encoding="bytes").load()
        batch = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        x, y = np.asarray(batch["data"]), np.asarray(batch["labels"])
        if x.dtype != np.uint8 or x.shape != (len(y), 3072):
            raise ValueError(f"pixels of the type {x.dtype} and the shape {x.shape} for {len(y)} labels")
    except (pickle.UnpicklingError, EOFError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise MissingData(f"{path.name} is no batch of CIFAR-10 images ({error}); download it again") from error
    return torch.from_numpy(x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy()), torch.from_numpy(y).long()


class _Arrays(pickle.Unpickler):
    """Reads only plain values and arrays. Other pickles could run any code, and these files have no known checksum."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")} or (
            (module, name) == ("_codecs", "encode")
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _idx(name: str, source: Source, folders: Sequence[Path]) -> list[Tensor]:
    """Returns training images and labels, test images and labels, from the first folder that has all four files.

    The files of MNIST and of Fashion-MNIST have the same names, so folders with the name of the data set come first.
    """
    for folder in (source.folder / name / "raw", *folders, source.folder):
        files = [_existing(folder / file) for file in IDX]
        if all(files):
            return [_read_idx(file) for file in files if file]
    return _torchvision(name, source)


def _existing(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.exists()), None)


def _read_idx(path: Path) -> Tensor:
    """Reads an IDX file: two zero bytes, the type (8: bytes), the number of dimensions, their sizes of 4 bytes, the entries."""
    raw = path.read_bytes()
    if path.suffix == ".gz":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise MissingData(f"{path.name} cannot be unpacked: {error}; download it again") from error
    if raw[:3] != b"\0\0\x08":
        raise MissingData(f"{path.name} is not an IDX file of bytes: it starts with {raw[:4]!r}")
    dimensions, begin = raw[3] if len(raw) > 3 else 0, 4
    begin += 4 * dimensions
    # Labels have one dimension and images three. A file that has others was swapped with another file.
    expected = 1 if "labels" in path.name else 3
    if dimensions != expected or len(raw) < begin:
        raise MissingData(
            f"{path.name} is damaged: its {len(raw)} bytes name {dimensions} dimensions, not {expected}; download it again"
        )
    shape = np.frombuffer(raw, ">u4", dimensions, 4).tolist()
    if len(raw) - begin != math.prod(shape):
        raise MissingData(
            f"{path.name} is damaged: {len(raw) - begin} entries, not the {math.prod(shape)} of {shape}; download it again"
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=begin).reshape(shape).copy())


def _torchvision(name: str, source: Source) -> list[Tensor]:
    import torchvision.datasets  # type: ignore[import-untyped]  # slow, and not needed for anything else

    try:
        load = partial(getattr(torchvision.datasets, name), source.folder, download=source.download)
        parts = [load(train=train) for train in (True, False)]
    except RuntimeError as error:
        package = ", or install Debian's package dataset-fashion-mnist" if name == "FashionMNIST" else ""
        raise MissingData(
            f"data missing: {name}; give --data with the folder that has it in torchvision's layout, or --download if there is "
            f"a network{package}"
        ) from error
    return [torch.as_tensor(values) for part in parts for values in (part.data, part.targets)]


def _prepared(parts: Sequence[Tensor], seed: int, subset: int | None, colours: bool = False) -> Data:
    x, y, x_test, y_test = parts
    if subset is not None:
        chosen = torch.Generator().manual_seed(seed)
        first, second = (
            torch.randperm(len(a), generator=chosen)[:n] for a, n in ((x, subset), (x_test, max(1, subset // 5)))
        )
        x, y, x_test, y_test = x[first], y[first], x_test[second], y_test[second]
    # MNIST has no dimension of channels, and CIFAR-10 has it last.
    channels = (a[:, None] if a.ndim == 3 else a.movedim(3, 1) for a in (x, x_test))
    x, x_test = (a.float() / 255 for a in channels)
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, x_test = ((a - mean) / deviation for a in (x, x_test))
    return Data(x, y.long(), x_test, y_test.long(), pad=PAD, colours=colours, scale=(mean, deviation))


# ------------------------------------------------------------------------------------------ to learn the density of


def density_moons(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns new points of two moons with noise 0.06, ``[n, 2]``.

    Example:
        >>> density_moons(5).shape
        torch.Size([5, 2])
    """
    angle = math.pi * torch.rand(n, generator=generator)
    side = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, -1.0)
    # The lower moon is the upper one turned by half a turn about (1/2, 1/4).
    x = torch.stack([0.5 + side * (torch.cos(angle) - 0.5), 0.25 + side * (torch.sin(angle) - 0.25)], 1)
    return x + 0.06 * torch.randn(n, 2, generator=generator)


def density_circles(n: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns new points of two circles of radius 1 and 0.5 with noise 0.06, ``[n, 2]``, as in the Neural ODEs example.

    Example:
        >>> density_circles(5).shape
        torch.Size([5, 2])
    """
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    radius = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, 0.5)
    x = radius[:, None] * torch.stack([torch.cos(angle), torch.sin(angle)], 1)
    return x + 0.06 * torch.randn(n, 2, generator=generator)


def spiral(seed: int, test: int) -> Data:
    """Returns the Gaussian spiral of torchdyn's tutorial, 16,384 points of deviation 1; the last ``test`` ones are the test."""
    from torchdyn.datasets import ToyDataset

    with seeded(seed):
        spread = {"std_gaussians_start": 0.05, "std_gaussians_end": 0.02}
        x, _ = ToyDataset().generate(1 << 14, "gaussians_spiral", n_gaussians=7, n_gaussians_per_loop=4, **spread)
        x = x[torch.randperm(len(x))].float()
    x = (x - x.mean(0)) / x.std(0)
    # As in the tutorial: with repetitions, from torch's global generator, which also gives Hutchinson's noise.
    return fresh(lambda n, generator: x[torch.randint(len(x) - test, (n,))], x[-test:])
