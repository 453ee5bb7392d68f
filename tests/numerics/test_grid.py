"""The points of a grid: no scale of time is preferred, and no asked time is lost."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchdyn_mintime.numerics import cut, merge

EPS = 2.0**-52

gaps = st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=30)


def template_of(widths):
    return torch.tensor([0.0, *widths], dtype=torch.float64).cumsum(0).tolist()


@given(gaps, st.floats(0.01, 1.6), st.integers(-30, 30), st.booleans())
def test_a_grid_scales_with_time(widths, where, exponent, extend):
    template = template_of(widths)
    t_f, scale = where * template[-1], 2.0**exponent  # a power of 2 changes no digit
    scaled = cut([scale * t for t in template], 0.0, scale * t_f, extend=extend)
    assert scaled == [scale * t for t in cut(template, 0.0, t_f, extend=extend)]


@given(st.integers(2, 200), st.sampled_from([1e-9, 1e-6, 1.0, 1e6]), st.sampled_from([0.0, 1.0, -1e3, 1e5]))
def test_every_point_of_a_template_stays_while_t_f_is_its_end(points, length, ratio):
    t0 = ratio * length
    template = torch.linspace(t0, t0 + length, points, dtype=torch.float64).tolist()
    rounding = EPS / 2 * max(map(abs, template))
    assert cut(template, template[0], template[-1], rounding=rounding) == template


def test_points_refined_toward_the_end_stay():
    template = [0.0, 0.1, 0.5, *(1 - 10.0**-k for k in range(1, 9)), 1.0]
    assert cut(template, 0.0, 1.0) == template
    # Beside t_f a point goes if it is nearer than a thousandth of the step that leads to it, not of the first one.
    near, far = 1 - 1e-7 + 1e-11, 1 - 1e-7 + 1e-8
    assert cut(template, 0.0, near) == [*template[:9], near]
    assert cut(template, 0.0, far) == [*template[:10], far]


@pytest.mark.parametrize("sliver", [1e-12, 1e-5, 1e-3])
def test_a_sliver_at_the_end_is_no_step_size_to_go_on_with(sliver):
    template = [*torch.linspace(0, 1, 11, dtype=torch.float64).tolist(), 1 + sliver]
    grid = cut(template, 0.0, 3.0)
    # Ten steps up to 1, the sliver, and twenty-two of the mean spacing at the most.
    assert len(grid) <= 11 + 1 + 23
    assert all(b > a for a, b in itertools.pairwise(grid))
    # A last spacing of a tenth of the mean or more is meant.
    assert cut([0.0, 0.5, 0.7, 0.8], 0.0, 1.05)[-3:] == pytest.approx([0.9, 1.0, 1.05])


@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40),
    st.sampled_from([1e-6, 1.0, 86_400.0]),
    st.lists(st.integers(0, 39), max_size=10),
)
def test_each_asked_time_has_its_row_in_the_order_asked(times, scale, again):
    asked = [scale * t for t in times]
    asked += [asked[k % len(asked)] for k in again]
    nodes = [scale * k / 10 for k in range(11)]
    points, keep, rows = merge(nodes, asked, rounding=EPS / 2 * scale)
    kept = [t for t, k in zip(points, keep, strict=True) if k]
    assert len(rows) == len(asked)
    assert [kept[row] for row in rows] == pytest.approx(asked, rel=0, abs=EPS * scale)
    assert all(b > a for a, b in itertools.pairwise(points))
    assert points[0] == nodes[0] and points[-1] == nodes[-1]
    # The steps between are no longer than before, but for the points that made room for an asked time beside them.
    assert max(b - a for a, b in itertools.pairwise(points)) <= 0.1 * scale * (1 + 2.1e-3)
