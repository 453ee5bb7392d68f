"""A lock for the length of a solve, and what a backward does where another thread holds it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

__all__ = ["BESIDE", "NOT_LOCKED", "Lock", "alone_in_backward"]

NOT_LOCKED = nullcontext()
"""In the place of a lock, where the modules keep nothing of a solve."""

BESIDE = threading.RLock()
"""Held by evaluations beside solves, of any model: they put tensors of their own in the places of the field's meanwhile."""


class Lock:
    """A lock that its thread may take again.

    Attributes:
        hold: stands for the present hold, from the first taking to the last release; None where nobody has the lock.
    """

    def __init__(self) -> None:
        self._lock, self._depth = threading.RLock(), 0
        self.hold: object | None = None

    def acquire(self, blocking: bool = True) -> bool:
        """Takes the lock, and waits for it where it is ``blocking``; returns whether it was taken."""
        if not self._lock.acquire(blocking):
            return False
        if self._depth == 0:
            self.hold = object()
        self._depth += 1
        return True

    def release(self) -> None:
        """Gives it back, once for each time that it was taken."""
        self._depth -= 1
        if self._depth == 0:
            self.hold = None
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: Any) -> None:
        self.release()


@contextmanager
def alone_in_backward(alone: Any, on_cpu: bool, made_in: object | None = None) -> Iterator[None]:
    """Keeps solves of other threads away from a part of a backward that writes to modules, where solves keep them away.

    On the processor a backward runs in the thread that has called it, and waits for a solve of another thread to end. A GPU
    has one thread for all backwards, and a field that differentiates inside (a trace) needs it too: it must not wait.

    Args:
        made_in: the hold of the lock in which the graph was made. As long as that lasts, its thread is the one that waits for
            this backward: penalties and fits differentiate beside a solve.

    Raises:
        RuntimeError: another thread solves with the same field on a GPU.
    """
    waits_for_this = not on_cpu and made_in is not None and made_in is alone.hold
    if alone is NOT_LOCKED or waits_for_this:
        yield
        return
    if not alone.acquire(blocking=on_cpu):
        raise RuntimeError(
            "a backward on the GPU met a solve of another thread with the same vector field, which keeps the time, the control "
            "or noise on its modules: call backward where no other thread solves, or give each thread a copy of the model"
        )
    try:
        yield
    finally:
        alone.release()
