"""Where a solve has its points: the template cut at t_f. Plain numbers, no training and no tensors."""

import bisect
from collections.abc import Sequence

__all__ = ["cut", "merge"]

MAX_POINTS = 1_000_000


def _gap(t: float, step: float) -> float:
    """Returns how close to a kept time a template point may be. torchdyn compares times to 1e-8 + 1e-5 |t|."""
    return max(2e-5 * max(1.0, abs(t)), 1e-3 * step)


def cut(
    template: Sequence[float], t0: float, t_f: float, *, step: float, extend: bool = True, moving_start: bool = False
) -> list[float]:
    """Returns t0, the template's points between t0 and t_f, then t_f itself.

    Args:
        template: ascending times.
        t0, t_f: the ends, t0 < t_f. Both always stay; points too close to them go.
        step: the step size that closeness is measured by.
        extend: beyond the template's end, go on with its last spacing (fixed steps).
        moving_start: t0 may lie off the template: points not after it go, and before the template's start the first
            step grows to two step sizes, then splits.

    Example:
        >>> cut([0.0, 0.5, 1.0], 0.0, 0.7, step=0.5)
        [0.0, 0.5, 0.7]
        >>> cut([0.0, 0.5, 1.0], 0.0, 1.7, step=0.5)
        [0.0, 0.5, 1.0, 1.5, 1.7]
    """
    first = t0 + _gap(t0, step)
    last = t_f - _gap(t_f, step)
    inner: list[float] = []
    begin = 1  # the template's first point is t0, or has become it
    if moving_start and extend and t0 < template[0]:
        n = int((template[0] - t0) / step * (1 + 1e-12))
        if n > MAX_POINTS:
            raise ValueError(
                f"t0 = {t0:.6g} lies {n} steps of {step:.6g} before the template's start {template[0]:.6g}"
            )
        inner += [t for k in range(n - 1, 0, -1) if first < (t := template[0] - k * step) < last]
        begin = 0 if n > 0 else 1
    elif moving_start:
        begin = max(1, bisect.bisect_right(template, first))
    end = bisect.bisect_left(template, last)
    inner += [t for t in template[begin:end] if first < t < last]
    if extend and last > template[-1]:
        spacing = template[-1] - template[-2]
        n = int((last - template[-1]) / spacing) + 1
        if n > MAX_POINTS:
            raise ValueError(
                f"t_f = {t_f:.6g} lies {n} steps of {spacing:.6g} beyond the template's end {template[-1]:.6g}"
            )
        inner += [t for k in range(1, n + 1) if first < (t := template[-1] + k * spacing) < last]
    return [t0, *inner, t_f]


def merge(nodes: Sequence[float], asked: Sequence[float], *, step: float) -> tuple[list[float], list[bool]]:
    """Adds the asked times to a grid, each once, and says which points are to be returned.

    An interior point too close to an asked time makes room for it; the ends stay and stand for asked times next to them.

    Example:
        >>> merge([0.0, 0.5, 1.0], [0.2, 1.0], step=0.5)
        ([0.0, 0.2, 0.5, 1.0], [False, True, False, True])
    """
    first, last = nodes[0], nodes[-1]
    keep_ends = [False, False]
    inside: list[float] = []
    for t in sorted(asked):
        if abs(t - first) <= _gap(first, 0.0):
            keep_ends[0] = True
        elif abs(t - last) <= _gap(last, 0.0):
            keep_ends[1] = True
        elif not inside or t - inside[-1] > _gap(t, 0.0):
            inside.append(t)
    marked = [(t, True) for t in inside]
    for t in nodes[1:-1]:
        i = bisect.bisect_left(inside, t)
        near = inside[max(i - 1, 0) : i + 1]
        if all(abs(t - s) > _gap(t, step) for s in near):
            marked.append((t, False))
    marked.sort()
    return [first, *(t for t, _ in marked), last], [keep_ends[0], *(k for _, k in marked), keep_ends[1]]
