"""The data sets of the experiments, as tensors: points ``x`` and labels ``y``, for training and for the test."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

__all__ = ["Data", "annuli", "cropped", "digits", "moons", "seeded"]


@dataclass(frozen=True)
class Data:
    """A data set for classification.

    Attributes:
        x, y: training points ``[n, ...]`` and labels ``[n]`` (int64).
        x_test, y_test: those of the test.
        pad: how far training images are shifted at random (random crop with so much padding); 0 is not at all.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    pad: int = 0

    def to(self, device: torch.device) -> "Data":
        """The same data on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("x", "y", "x_test", "y_test")})


def cropped(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Images ``[n, channels, height, width]``, each shifted at random by up to ``pad`` pixels, zeros coming in."""
    if pad == 0:
        return x
    height, width = x.shape[-2:]
    padded = torch.nn.functional.pad(x, (pad, pad, pad, pad))
    corner = torch.randint(2 * pad + 1, (2, len(x)), generator=generator).to(x.device)
    rows = corner[0, :, None] + torch.arange(height, device=x.device)
    columns = corner[1, :, None] + torch.arange(width, device=x.device)
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torchdyn's generators draw from the global states of numpy and torch; both are as before afterwards."""
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


def _drawn_twice(kind: str, n: int, seed: int, **options: float) -> Data:
    from torchdyn.datasets import ToyDataset

    with seeded(seed):
        (x, y), (x_test, y_test) = (ToyDataset().generate(n, kind, **options) for _ in range(2))
    return Data(x.float(), y.long(), x_test.float(), y_test.long())


def moons(seed: int = 0, n: int = 512, noise: float = 0.1) -> Data:
    """torchdyn's two moons, ``[n, 2]``. The test set is a second draw.

    Example:
        >>> moons().x.shape
        torch.Size([512, 2])
    """
    return _drawn_twice("moons", n, seed, noise=noise)


def annuli(seed: int = 0, n: int = 512, noise: float = 1e-2) -> Data:
    """Concentric annuli, eq. (42): radius 1 is class 0 and radius .5 class 1, ``[n, 3]``: the third dimension is zero.

    In the plane no flow can part them (paths of an ODE do not cross); the zero is the augmentation that allows it.
    """
    return augmented(_drawn_twice("spheres", n, seed, dim=2, noise=noise, inner_radius=0.5, outer_radius=1.0))


def augmented(data: Data) -> Data:
    """One zero added to each state: a dimension through which paths can pass each other."""

    def augment(x: Tensor) -> Tensor:
        return torch.cat([x, torch.zeros(len(x), 1)], 1)

    return Data(augment(data.x), data.y, augment(data.x_test), data.y_test)


def digits(seed: int = 0) -> Data:
    """scikit-learn's bundled handwritten digits, ``[n, 64]`` in [0, 1]: 1,347 for training, 450 for the test.

    Args:
        seed: of the split, which keeps the share of each digit.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x / 16, y, test_size=450, random_state=seed, stratify=y)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in parts)
    return Data(x.float(), y.long(), x_test.float(), y_test.long())
