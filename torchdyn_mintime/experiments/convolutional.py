"""The paper's network for images: two strided convolutions, a NeuralODE of two convolutions with time, and pooling."""

import math

import torch
from torch import Tensor, nn

__all__ = ["ConvField", "conv_parts"]


def _norm(width: int) -> nn.GroupNorm:
    # Two channels a group, as the paper's 32 groups of 64: with one, pooling behind it would see nothing.
    return nn.GroupNorm(math.gcd(32, max(1, width // 2)), width)


class _ConvWithTime(nn.Module):
    """A 3 by 3 convolution that sees the time as one more channel."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width + 1, width, 3, padding=1)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        time = torch.as_tensor(t).to(x).expand(x.shape[0], 1, *x.shape[2:])
        return self.conv(torch.cat([time, x], 1))


class ConvField(nn.Module):
    """f(t, z) on feature maps ``[batch, width, height, width]``: norm, ReLU and convolution, twice, and a norm."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.norms = nn.ModuleList(_norm(width) for _ in range(3))
        self.convolutions = nn.ModuleList(_ConvWithTime(width) for _ in range(2))

    def forward(self, t: Tensor, x: Tensor, args: dict | None = None) -> Tensor:
        for norm, convolution in zip(self.norms, self.convolutions, strict=False):
            x = convolution(t, torch.relu(norm(x)))
        return self.norms[2](x)


def conv_parts(channels: int, width: int = 64) -> dict[str, nn.Module]:
    """The keywords of ``Classifier``.

    Args:
        channels: of the images.
        width: channels inside; the paper's is 64.
    """
    before = nn.Sequential(
        nn.Conv2d(channels, width, 3),
        _norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, 2, 1),
        _norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 4, 2, 1),
    )
    head = nn.Sequential(_norm(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return {"field": ConvField(width), "before": before, "head": head}
