"""Where a solve has its points: the template cut at t_f. Plain numbers, no training and no tensors.

Time has no scale of its own: how close two points may be is measured by the points beside them, and by the rounding of
the times, never by the size of t.
"""

import bisect
from collections.abc import Sequence

__all__ = ["cut", "merge"]

MAX_POINTS = 1_000_000

NEAR = 1e-3
"""A point closer to a kept time than this share of the step there goes: a sliver of a step costs as much as a whole one."""


def _going_on(template: Sequence[float]) -> float:
    """Returns the spacing beyond the template's end: the last one, or the mean where the last is below a tenth of it."""
    last, mean = template[-1] - template[-2], (template[-1] - template[0]) / (len(template) - 1)
    # A template refined toward its end, or with a sliver there, would go on in thousands of its finest steps.
    return last if last >= 0.1 * mean else mean


def cut(
    template: Sequence[float],
    t0: float,
    t_f: float,
    *,
    extend: bool = True,
    moving_start: bool = False,
    rounding: float = 0.0,
) -> list[float]:
    """Returns t0, the template's points between t0 and t_f, then t_f itself.

    Args:
        template: ascending times.
        t0, t_f: the ends, t0 < t_f. Both always stay. A point closer to t_f (or to a t0 off the template) than a
            thousandth of the step there goes.
        extend: beyond the template's end, go on with its last spacing (fixed steps); with the mean spacing where the last
            is below a tenth of that.
        moving_start: t0 may lie before the template: its first step grows to two step sizes, then splits.
        rounding: times that differ by no more than this are one (units of time).

    Example:
        >>> cut([0.0, 0.5, 1.0], 0.0, 0.7)
        [0.0, 0.5, 0.7]
        >>> cut([0.0, 0.5, 1.0], 0.0, 1.7)
        [0.0, 0.5, 1.0, 1.5, 1.7]
    """
    size, inner = len(template), []
    begin = bisect.bisect_right(template, t0 + rounding)
    if begin == 0 and moving_start and extend:
        step = template[1] - template[0]
        n = int((template[0] - t0) / step * (1 + 1e-12))
        if n > MAX_POINTS:
            raise ValueError(
                f"t0 = {t0:.6g} lies {n} steps of {step:.6g} before the template's start {template[0]:.6g}"
            )
        inner += [t for k in range(n - 1, 0, -1) if t0 < (t := template[0] - k * step) < t_f]
        begin = 0 if n > 0 else 1
    elif begin == 0 and moving_start:
        begin = 1
    elif begin == 0 or t0 - template[begin - 1] > rounding:  # t0 lies off the template
        while begin < size and template[begin] - t0 < NEAR * _step(template, begin + 1):
            begin += 1
    end = bisect.bisect_left(template, t_f - rounding)
    lands = (
        end < size and template[end] - t_f <= rounding
    )  # on a point, whose neighbours stand as the template has them
    while not lands and end > begin and t_f - template[end - 1] < NEAR * _step(template, end - 1):
        end -= 1
    inner += template[begin:end]
    if extend and end == size and t_f > template[-1]:
        spacing = _going_on(template)
        n = int((t_f - template[-1]) / spacing) + 1
        if n > MAX_POINTS:
            raise ValueError(
                f"t_f = {t_f:.6g} lies {n} steps of {spacing:.6g} beyond the template's end {template[-1]:.6g}"
            )
        last = t_f - max(NEAR * spacing, rounding)
        inner += [t for k in range(1, n + 1) if t0 + NEAR * spacing < (t := template[-1] + k * spacing) < last]
    return [t0, *inner, t_f]


def _step(template: Sequence[float], i: int) -> float:
    """Returns the step of the template that ends at its i-th point, or the one nearest to it."""
    i = min(max(i, 1), len(template) - 1)
    return template[i] - template[i - 1]


def merge(
    nodes: Sequence[float], asked: Sequence[float], *, rounding: float = 0.0
) -> tuple[list[float], list[bool], list[int]]:
    """Adds the asked times to a grid.

    Each has a point of its own, however close to others; one that differs from an end by rounding alone is that end. An
    interior point of the grid within a thousandth of its step of an asked time makes room for it.

    Args:
        nodes: the grid, ascending.
        asked: times between its ends, in any order, repeated or not.
        rounding: times that differ by no more than this are one (units of time).

    Returns:
        The points; which of them were asked for; and for each asked time, which of those it is.

    Example:
        >>> merge([0.0, 0.5, 1.0], [1.0, 0.2, 0.2])
        ([0.0, 0.2, 0.5, 1.0], [False, True, False, True], [1, 0, 0])
    """
    first, last = nodes[0], nodes[-1]
    asked = [first if t <= first + rounding else last if t >= last - rounding else t for t in asked]
    wanted = sorted(set(asked))
    inside = [t for t in wanted if first < t < last]

    def free(i: int) -> bool:
        k = bisect.bisect_left(inside, nodes[i])
        room = max(NEAR * (nodes[i] - nodes[i - 1]), rounding)
        return all(abs(nodes[i] - t) > room for t in inside[max(k - 1, 0) : k + 1])

    points = sorted([first, *(nodes[i] for i in range(1, len(nodes) - 1) if free(i)), *inside, last])
    place = {t: i for i, t in enumerate(wanted)}
    return points, [t in place for t in points], [place[t] for t in asked]
