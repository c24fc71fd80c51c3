"""When callbacks act: every so many optimiser steps, however many batches a step has."""

import lightning.pytorch as L


class Interval:
    """Says once per multiple of n optimiser steps that it is due.

    Args:
        steps: n; None: never.
        key: What the user calls it.

    Raises:
        ValueError: If n < 1.
    """

    def __init__(self, steps: int | None, key: str = "every_n_steps") -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"{key}={steps} must be at least 1, or null for never")
        self.steps = steps
        self._last = 0

    def start(self, trainer: L.Trainer) -> None:
        """Forgets what happened up to the trainer's current step; to be called when training starts."""
        self._last = trainer.global_step

    def due(self, trainer: L.Trainer) -> bool:
        """Whether the step that the trainer has just finished is a new multiple of n."""
        step = trainer.global_step
        if self.steps is None or step == self._last or step % self.steps:
            return False
        self._last = step
        return True
