"""Neural ODEs that learn how deep they need to be: minimum-time and convergence-rate training for torchdyn."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdyn_mintime._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Torch and torchdyn take seconds to import: `python -m torchdyn_mintime --help` needs neither.
    if name.startswith("__") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public = importlib.import_module("torchdyn_mintime._public")
    globals().update({known: getattr(public, known) for known in public.__all__}, __all__=public.__all__)
    try:
        return globals()[name]  # a room, such as `flows`, is among them now too
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
