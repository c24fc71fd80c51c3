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
        Exception: On the process that did it, what `work` raised.
        OSError: On the others, if it was one.
        RuntimeError: On the others, with its message, if it was another.
    """
    result: T | None = None
    error: Exception | None = None
    if trainer.local_rank == 0 if of_machine else trainer.is_global_zero:
        try:
            result = work()
        except (RuntimeError, ValueError, OSError) as problem:
            error = problem
    failed = isinstance(error, OSError)
    message, failed, result = trainer.strategy.broadcast((None if error is None else str(error), failed, result))
    if error is not None:
        raise error
    if message is not None:
        raise (OSError if failed else RuntimeError)(message)
    return result


@contextmanager
def together(trainer: L.Trainer) -> Iterator[None]:
    """Waits at its end for all processes; where one of them cannot read or write, none goes on.

    Args:
        trainer: Whose processes.

    Raises:
        OSError: On every process if there was one on any.
    """
    error: OSError | None = None
    try:
        yield
    except OSError as problem:
        error = problem
    number = 0 if error is None else error.errno or errno.EIO
    worst = int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op="max"))
    if error is not None:
        raise error
    if worst:
        raise OSError(worst, f"{os.strerror(worst)}, on another process")
