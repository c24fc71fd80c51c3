"""What all processes do together."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import lightning.pytorch as L
import torch
from torch import Tensor

from diffusion_lit.records import NonFinite

T = TypeVar("T")


class SharedOSError(OSError):
    """A file could not be read or written by one process; raised on every process at the same place."""


def as_shared(error: OSError) -> SharedOSError:
    """The error as every process raises it; "Input/output error" where it has no number."""
    where = "" if error.filename is None else f": {error.filename}"
    return SharedOSError(error.errno or errno.EIO, f"{error.strerror or error}{where}")


def reduce_sum(trainer: L.Trainer, tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes; collective."""
    return cast(Tensor, trainer.strategy.reduce(tensor, reduce_op="sum"))


def on_rank_zero(trainer: L.Trainer, work: Callable[[], T], per_machine: bool = False) -> T | None:
    """Runs `work` on the first process while the others wait for its result or its error; collective.

    Args:
        trainer: Its processes take part.
        work: Its result is sent to all processes.
        per_machine: Whether the first process of every machine runs it; the result of the very first is sent.

    Raises:
        SharedOSError: On all processes, if `work` raised an OSError.
        NonFinite: On all processes, if `work` raised it.
        Exception: On the process that ran it, whatever else `work` raised.
        RuntimeError: On the others, with its message.
    """
    result: T | None = None
    error: RuntimeError | ValueError | OSError | None = None
    if trainer.local_rank == 0 if per_machine else trainer.is_global_zero:
        try:
            result = work()
        except (RuntimeError, ValueError, OSError) as problem:
            error = problem
    cannot = as_shared(error).args if isinstance(error, OSError) else None
    kind = None if error is None else NonFinite if isinstance(error, NonFinite) else RuntimeError
    message, kind, cannot, result = trainer.strategy.broadcast((str(error), kind, cannot, result))
    if cannot is not None:
        raise SharedOSError(*cannot) from error
    if error is not None:
        raise error
    if kind is not None:
        raise kind(message)
    return result


@contextmanager
def raise_together(trainer: L.Trainer) -> Iterator[None]:
    """Waits at its end for all processes; all of them raise if one of them meets an error of these kinds. Collective.

    Args:
        trainer: Its processes take part.

    Raises:
        SharedOSError: On every process, if there was an OSError on any.
        NonFinite: On every process, if there was one on any, and no OSError.
    """
    error: OSError | NonFinite | None = None
    try:
        yield
    except (OSError, NonFinite) as problem:
        error = problem
    number = (as_shared(error).errno or 0) if isinstance(error, OSError) else 0
    found = torch.tensor([number, isinstance(error, NonFinite)], device=trainer.strategy.root_device)
    worst, non_finite = trainer.strategy.reduce(found, reduce_op="max").tolist()
    if isinstance(error, OSError):
        raise as_shared(error) from error
    if worst:
        raise SharedOSError(worst, f"{os.strerror(worst)}, on another process")
    if error is not None:
        raise error
    if non_finite:
        raise NonFinite("values on another process are not finite; its own message says which")
