"""The ready potentials: their values, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchdyn_mintime.losses.potentials import CrossEntropy, SquaredDistance, TruncatedCrossEntropy


def test_ready_potentials():
    z, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    head = nn.Linear(4, 3)
    assert torch.equal(CrossEntropy(head)(z, y), F.cross_entropy(head(z), y, reduction="none"))
    assert torch.equal(CrossEntropy(classes=3)(z, y), F.cross_entropy(z[:, :3], y, reduction="none"))
    plain = CrossEntropy(classes=3)(z, y)
    assert torch.equal(TruncatedCrossEntropy(classes=3)(z, y), plain)
    assert torch.equal(TruncatedCrossEntropy(classes=3, floor=1.0)(z, y), (plain - 1).clamp_min(0))
    assert torch.allclose(SquaredDistance()(z, z + 2), torch.full((6,), 16.0))


def test_what_potentials_refuse():
    with pytest.raises(ValueError, match="floor must be .* got -1"):
        TruncatedCrossEntropy(floor=-1)
    with pytest.raises(ValueError, match="classes=2 picks logits"):
        CrossEntropy(nn.Linear(2, 2), classes=2)
    with pytest.raises(TypeError, match="integer labels; got torch.float32"):
        CrossEntropy()(torch.zeros(2, 2), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_labels_may_be_integers_of_any_size(dtype):
    z, y = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    assert torch.equal(CrossEntropy()(z, y.to(dtype)), CrossEntropy()(z, y))
