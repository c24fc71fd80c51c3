"""What all processes do together."""

from collections.abc import Callable
from typing import TypeVar, cast

import lightning.pytorch as L
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
        RuntimeError: On the others, with its message.
    """
    result: T | None = None
    error: Exception | None = None
    if trainer.local_rank == 0 if of_machine else trainer.is_global_zero:
        try:
            result = work()
        except (RuntimeError, ValueError, OSError) as problem:
            error = problem
    message, result = trainer.strategy.broadcast((None if error is None else str(error), result))
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(message)
    return result
