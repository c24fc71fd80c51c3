"""Work on images that falls back to fewer images at once when memory runs out."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from diffusion_lit.types import StepFn

T = TypeVar("T")


def in_memory(work: Callable[[slice, int, int], T], count: int, at_once: int, activity: str) -> tuple[list[T], int]:
    """Works on images in parts; out of memory, with half as many images at once, a quarter and so on.

    What was done before memory ran out is done again.

    Args:
        work: Called as work(images, part, num_parts) with a slice of the images and the number of the part, from 0.
        count: Number of images; of none there is one part.
        at_once: Images per part to begin with.
        activity: Named in the warning.

    Returns:
        What `work` returned for each part, and the number of images at once that memory sufficed for.

    Raises:
        torch.OutOfMemoryError: If memory does not suffice for a single image.
    """
    while True:
        # Not inside the except clause: there the traceback still holds the tensors of the failed attempt.
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
        warnings.warn(f"out of memory {activity}: continuing with {at_once} images at once", stacklevel=3)
        torch.cuda.empty_cache()


def shift_steps(on_step: StepFn | None, part: int, num_parts: int) -> StepFn | None:
    """Reports the steps of one part as steps of the whole.

    Args:
        on_step: Called with (steps done, steps in all).
        part: Number of the part, from 0.
        num_parts: How many parts there are.
    """
    return None if on_step is None else lambda done, total: on_step(part * total + done, num_parts * total)
