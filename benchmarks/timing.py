"""Measures time and memory of functions that take turns, so that a busy machine slows all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MIB", "Row", "Run", "alternate", "compare", "count_evaluations", "saved_bytes"]

MIB = 2**20

Row = dict[str, Any]
Run = Callable[[], Any]


def alternate(
    runs: Sequence[Run], rounds: int, seconds_a_round: float = 0.05, clock: Callable[[], float] | None = None
) -> list[list[float]]:
    """Returns the seconds of every call, a list for each run. All lists have the same length.

    Args:
        runs: the functions. They take turns call by call, and each round reverses their order.
        rounds: the least number of rounds. If the slowest run takes less than ``seconds_a_round``, as many times more are
            made as fit, up to 100 times.
        seconds_a_round: see ``rounds``.
        clock: returns seconds. Default: with one thread the processor time of this process, else wall time. On a GPU it
            has to wait for the device.

    Example:
        >>> [len(seconds) for seconds in alternate([lambda: None, lambda: None], 2, 0.0)]
        [2, 2]
    """
    clock = clock or (time.process_time if torch.get_num_threads() == 1 else time.perf_counter)
    longest = 1e-6
    for run in runs:
        run()
        start = clock()
        run()
        longest = max(longest, clock() - start)
    rounds *= max(1, min(100, int(seconds_a_round / longest)))
    seconds: list[list[float]] = [[] for _ in runs]
    turns = list(zip(runs, seconds, strict=True))
    gc.collect()
    gc.disable()  # a collection would be charged to the run that happens to be on
    try:
        for k in range(rounds):
            for run, own in turns[:: -1 if k % 2 else 1]:
                start = clock()
                run()
                own.append(clock() - start)
            if k % 50 == 49:
                gc.collect()
    finally:
        gc.enable()
    return seconds


def compare(
    part: str, case: str, runs: Mapping[str, Run], rounds: int, field: nn.Module | None = None, **timing: Any
) -> list[Row]:
    """Returns one line of the table for each contestant of a case. The first contestant is the reference.

    Args:
        part, case: names of what is measured.
        runs: functions that do the work once, by the contestants' names.
        rounds: see :func:`alternate`, which also gets ``timing``.
        field: a module whose calls in a run are counted.

    Returns:
        ``part``, ``case`` and ``contestant``; ``ratio``, the median over rounds of the ratio to the reference within a
        round; ``milliseconds``, the median over rounds; ``evaluations``, or None without a field.
    """
    seconds = alternate(list(runs.values()), rounds, **timing)
    return [
        {
            "part": part,
            "case": case,
            "contestant": name,
            "ratio": statistics.median(a / b for a, b in zip(own, seconds[0], strict=True)),
            "milliseconds": 1e3 * statistics.median(own),
            "evaluations": None if field is None else count_evaluations(field, run),
        }
        for (name, run), own in zip(runs.items(), seconds, strict=True)
    ]


def count_evaluations(field: nn.Module, run: Run) -> int:
    """Returns the number of calls of the field in one ``run``.

    Example:
        >>> net, x = nn.Linear(2, 2), torch.ones(1, 2)
        >>> count_evaluations(net, lambda: net(net(x)))
        2
    """
    calls: list[None] = []
    handle = field.register_forward_hook(lambda *_: calls.append(None))
    run()
    handle.remove()
    return len(calls)


def saved_bytes(run: Run, held: Sequence[Tensor] = ()) -> int:
    """Returns the bytes alive between forward and backward: what autograd saved and what ``run`` returned.

    Each storage counts once.

    Args:
        run: the forward pass; returns a tensor.
        held: tensors that are alive anyway (parameters, the input), which do not count.
    """
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor.detach())  # held to the end, so that no address is given out twice
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(run())
    for tensor in held:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
