"""Memory that does not suffice: fewer images at once."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from diffusion_lit.types import StepFn

T = TypeVar("T")


def in_memory(work: Callable[[slice, int, int], T], count: int, at_once: int, what: str) -> tuple[list[T], int]:
    """Does something with images, out of memory with half as many at once, a quarter and so on.

    What was done of them before memory ran out is done again.

    Args:
        work: Given which images, the how manyth part that is, from 0, and of how many parts.
        count: Of images; of none there is one part.
        at_once: How many to begin with.
        what: Is done, for the warning.

    Returns:
        What `work` returned for each part, and how many images at once memory sufficed for.

    Raises:
        torch.OutOfMemoryError: If memory does not suffice for a single image.
    """
    while True:
        # Not inside the except clause: there the failed attempt's tensors are still held by its traceback.
        try:
            starts = range(0, max(count, 1), max(at_once, 1))
            parts = [
                work(slice(start, min(start + at_once, count)), part, len(starts)) for part, start in enumerate(starts)
            ]
            return parts, at_once
        except torch.OutOfMemoryError:
            if min(at_once, count) <= 1:
                raise
        at_once = -(-min(at_once, count) // 2)
        warnings.warn(f"out of memory {what}: going on with {at_once} images at once", stacklevel=3)
        torch.cuda.empty_cache()


def as_of_whole(on_step: StepFn | None, part: int, parts: int) -> StepFn | None:
    """Tells of the steps of one part as those of the whole.

    Args:
        on_step: Told of every step done.
        part: The how manyth, from 0.
        parts: How many there are.
    """
    return None if on_step is None else lambda done, total: on_step(part * total + done, parts * total)
