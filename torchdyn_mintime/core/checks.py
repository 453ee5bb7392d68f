"""Arguments that are numbers or names, looked at before anything is done with them.

Each function returns the value, or says which argument is wrong, what was received and what would do: TypeError for
another kind of object, ValueError for a number that cannot be used.
"""

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["count", "finite", "number", "positive", "scalar", "text"]


def number(
    value: Any,
    name: str,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float = math.inf,
    wanted: str | None = None,
) -> float:
    """Returns a Python (or NumPy) number above ``above``, or ``least`` or more, and below ``below``, so finite by default.

    Args:
        wanted: what the number must be, for the message; default: made of the limits.
    """
    result = _as_float(value, name)
    high_enough = (above is None or result > above) and (least is None or result >= least)
    if not (high_enough and -math.inf < result < below):
        if wanted is None:
            limits = ["finite"] if below == math.inf else []
            limits += [] if above is None or above == -math.inf else [f"above {above:g}"]
            limits += [] if least is None else [f"{least:g} or more"]
            limits += [] if below == math.inf else [f"below {below:g}"]
            wanted = " and ".join(limits)
        raise ValueError(f"{name} must be {wanted}; got {value}")
    return result


def positive(value: Any, name: str) -> float:
    """Returns a finite number above 0."""
    return number(value, name, above=0.0, wanted="positive and finite")


def count(value: Any, name: str, least: int = 0, of: str = "") -> int:
    """Returns a whole number, ``least`` or more. ``of`` says what is counted: ``" of epochs"``."""
    wanted = f"a whole number{of}, {least} or more"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}; got {value!r}")
    if not isinstance(value, Integral):
        raise ValueError(f"{name} must be {wanted}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more; got {_shown(value)}")
    return int(value)


def scalar(value: Any, name: str) -> float:
    """Returns a number given as such, or as a tensor or array of one entry. It may be infinite or NaN."""
    if isinstance(value, Tensor | np.ndarray):
        if math.prod(value.shape) != 1:
            raise ValueError(f"{name} must be one number; got the shape {tuple(value.shape)}: take its mean")
        try:
            value = value.item()
        except (RuntimeError, NotImplementedError) as error:  # such as a tensor without data
            raise TypeError(f"{name} must be a number; got {value!r} ({error})") from None
    return _as_float(value, name)


def finite(value: Any, name: str) -> float:
    """Returns a finite number, given as for :func:`scalar`."""
    result = scalar(value, name)
    if not math.isfinite(result):
        raise ValueError(f"{name} must be finite; got {result}")
    return result


def text(value: Any, name: str) -> str | None:
    """Returns a string, or None."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} must be a string; got {value!r}")
    return value


def _as_float(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite; got an integer too large for a float") from None


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except ValueError:  # Python refuses to write out an integer of more than 4,300 digits
        return "an integer too large to show"
