"""Weights that are shared out over processes: where they are met, and what is said then.

The modules are told by name: the import of torch.distributed takes long, and not every build of torch has it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["error_of_shards", "naming_shards", "refuse_shards", "sharded_by_themselves"]


def error_of_shards(error: RuntimeError, modules: Iterable[nn.Module]) -> ValueError | None:
    """Returns the error to raise where evaluations of ``modules`` failed since they found parts of weights, else None."""
    # The older FullyShardedDataParallel leaves parts that have lost their shape: there is no matrix any more.
    managed = [m for m in modules if getattr(m, "_is_fsdp_managed_module", False)]
    held = [p for m in managed for p in m.parameters(recurse=False)]  # none in a forward without use_orig_params
    parts = bool(held) and all(p.dim() < 2 for p in held)
    if type(error) is RuntimeError and (parts or "mixed torch.Tensor and DTensor" in str(error)):
        return ValueError(
            "the weights of the vector field are shared out over processes, and each process has them whole in the forward of "
            "the sharded module alone. Evaluate the field in that forward (it may return a penalty); with fully_shard also "
            "after `unshard()` of that module, or with reshard_after_forward=False"
        )
    return None


@contextmanager
def naming_shards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Names the cause where evaluations of ``modules`` fail since they find parts of weights (a ValueError)."""
    try:
        yield
    except RuntimeError as error:
        if (clearer := error_of_shards(error, modules)) is not None:
            raise clearer from error
        raise


def sharded_by_themselves(modules: Iterable[nn.Module]) -> list[str]:
    """Returns the kinds of modules that fully_shard or FullyShardedDataParallel was called with."""
    sharders = {"FSDPModule", "FullyShardedDataParallel"}
    return sorted({type(m).__name__ for m in modules if not sharders.isdisjoint(c.__name__ for c in type(m).__mro__)})


def refuse_shards(model: nn.Module, what: str) -> None:
    """Refuses a model whose weights are shared out over processes, for ``what`` evaluates it outside of its own forward.

    Raises:
        ValueError: they are.
    """
    shared = any(type(p).__name__ == "DTensor" for p in model.parameters())
    if shared or any(getattr(m, "_is_fsdp_managed_module", False) for m in model.modules()):
        raise ValueError(
            f"{what} needs whole weights in every process, and those of this {type(model).__name__} are shared out "
            "(fully_shard, FullyShardedDataParallel or a strategy of Lightning for them); use DistributedDataParallel, in a "
            "Trainer strategy='ddp', or load the state_dict of the sharded model into a model of one process"
        )
