"""What all processes do together."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar, cast

import lightning.pytorch as L
import torch
from torch import Tensor

T = TypeVar("T")


class SharedOSError(OSError):
    """What could not be read or written by one process, raised by every one of them at the same place."""


def as_shared(error: OSError) -> SharedOSError:
    """The same, as every process raises it; "Input/output error" where it has no number."""
    where = "" if error.filename is None else f": {error.filename}"
    return SharedOSError(error.errno or errno.EIO, f"{error.strerror or error}{where}")


def reduce_sum(trainer: L.Trainer, tensor: Tensor) -> Tensor:
    """Sums a tensor over all processes."""
    return cast(Tensor, trainer.strategy.reduce(tensor, reduce_op="sum"))


def on_first(trainer: L.Trainer, work: Callable[[], T], of_machine: bool = False) -> T | None:
    """Runs something on the first process while the others wait for its result, or for its error.

    Args:
        trainer: Whose processes.
        work: What to do; its result travels to all processes.
        of_machine: Whether the first process of every machine does it; what travels is then the first one's.

    Raises:
        SharedOSError: On all, if `work` raised an OSError.
        Exception: On the process that did it, whatever else `work` raised.
        RuntimeError: On the others, with its message.
    """
    result: T | None = None
    error: Exception | None = None
    if trainer.local_rank == 0 if of_machine else trainer.is_global_zero:
        try:
            result = work()
        except (RuntimeError, ValueError, OSError) as problem:
            error = problem
    cannot = as_shared(error).args if isinstance(error, OSError) else None
    message, cannot, result = trainer.strategy.broadcast((None if error is None else str(error), cannot, result))
    if cannot is not None:
        raise SharedOSError(*cannot) from error
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(message)
    return result


@contextmanager
def together(trainer: L.Trainer) -> Iterator[None]:
    """Waits at its end for all processes; where one of them cannot read or write, none goes on.

    Args:
        trainer: Whose processes.

    Raises:
        SharedOSError: On every process if there was an OSError on any.
    """
    error: OSError | None = None
    try:
        yield
    except OSError as problem:
        error = problem
    number = 0 if error is None else as_shared(error).errno
    worst = int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op="max"))
    if error is not None:
        raise as_shared(error) from error
    if worst:
        raise SharedOSError(worst, f"{os.strerror(worst)}, on another process")
