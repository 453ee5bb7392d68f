"""Neural ODEs that learn how deep they need to be: minimum-time and convergence-rate training for torchdyn."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdyn_mintime import diagnostics, flows, lightning, numerics, plots  # noqa: F401
    from torchdyn_mintime._public import *  # noqa: F403

__version__ = "0.1.0"

_ROOMS = ("diagnostics", "flows", "lightning", "numerics", "plots")


def __getattr__(name: str) -> Any:
    # Torch and torchdyn take seconds to import: `python -m torchdyn_mintime --help` needs neither.
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ROOMS:
        return importlib.import_module(f"torchdyn_mintime.{name}")
    public = importlib.import_module("torchdyn_mintime._public")
    globals().update({known: getattr(public, known) for known in public.__all__}, __all__=public.__all__)
    try:
        return globals()[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__"), *_ROOMS})
