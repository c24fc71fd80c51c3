"""What goes wrong in a process of a test's own, for a configuration to name."""

import time

import lightning.pytorch as L


class FailsAt(L.Callback):
    """Raises, or never comes back, in one process at the end of a step.

    Args:
        rank: Of the process.
        step: Optimiser steps done by then.
        hangs: Whether it hangs instead.
    """

    def __init__(self, rank: int, step: int, hangs: bool = False) -> None:
        self.rank = rank
        self.step = step
        self.hangs = hangs

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            if self.hangs:
                time.sleep(3600)
            raise ValueError(f"on purpose in process {self.rank}")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == self.rank:
            if self.hangs:
                time.sleep(3600)
            raise ValueError(f"on purpose in process {self.rank}")
