"""When a run writes its checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn

from diffusion_lit.callbacks.signals import requested_stop, stop
from diffusion_lit.checkpoint import last_checkpoint, snapshots
from diffusion_lit.lightning import dump_checkpoint
from diffusion_lit.loggers import logger_state
from diffusion_lit.system import NonFiniteGradients


def save(trainer: L.Trainer, path: Path | str, weights_only: bool = False) -> str | None:
    """Writes a checkpoint of a run, or warns that it cannot be written; collective.

    Returns:
        On every process, why the first could not write it; None if it could.
    """
    checkpoint = dump_checkpoint(trainer, weights_only)
    problem: str | None = None
    try:
        trainer.strategy.save_checkpoint(checkpoint, path)
    except OSError as error:
        problem = f"{path} could not be written ({error.strerror or error})"
    answer: str | None = trainer.strategy.broadcast(problem)
    if answer is not None:
        rank_zero_warn(f"{answer}; training continues")
    return answer


class Checkpoints(Checkpoint):
    """Keeps <run>/checkpoints/last.ckpt, and snapshots if asked.

    A checkpoint is written between two steps, when everything that belongs to a step is done: its scores, its samples,
    its validation. A run that continues neither repeats nor misses any of it. The former last.ckpt stays as
    previous.ckpt. Where a file cannot be written a warning says so, and training continues. After SIGTERM, SIGUSR1 or
    Ctrl-C the run stops after its step, with a checkpoint; a second Ctrl-C leaves the last one there was. A run that
    fails before its next step has changed anything writes the step before.

    Args:
        every_n_steps: Optimiser steps between two writes of last.ckpt.
        keep_every_n_steps: Optimiser steps between snapshots, step_<n>.ckpt; null: none.
        keep_at_most: How many snapshots to keep; the oldest are removed. null: all.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(
        self, every_n_steps: int = 5000, keep_every_n_steps: int | None = None, keep_at_most: int | None = None
    ) -> None:
        for name, value in (
            ("every_n_steps", every_n_steps),
            ("keep_every_n_steps", keep_every_n_steps),
            ("keep_at_most", keep_at_most),
        ):
            if value is not None and value < 1:
                raise ValueError(f"checkpoints.{name}={value} must be at least 1")
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.keep_at_most = keep_at_most
        self._saved_at: int | None = None
        self._step = 0
        self._whole = False
        self._has_buffers = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._whole = False
        # Running means move in the forward pass.
        self._has_buffers = len(pl_module.state_dict()) > len(dict(pl_module.named_parameters()))
        if not pl_module.automatic_optimization:
            # Lightning announces the steps of the optimizer that it counts, and no others.
            for optimizer in trainer.optimizers:
                optimizer.register_step_pre_hook(lambda *_: self.on_before_optimizer_step())
        last = last_checkpoint(trainer.default_root_dir)
        continued = trainer.ckpt_path is not None and Path(trainer.ckpt_path).resolve() == last.resolve()
        self._saved_at = trainer.global_step if trainer.strategy.broadcast(continued) else None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writes the curves up to here to disk first, and keeps how many lines there are."""
        checkpoint.update(logger_state(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        # This callback is the last one: all others are done with the step.
        self._whole = self._whole or trainer.global_step != self._step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step != self._step:
            self._finish_step(trainer)
        if self._has_buffers:
            self._whole = False

    def on_before_optimizer_step(self, *_: object) -> None:
        self._whole = False

    def _finish_step(self, trainer: L.Trainer) -> None:
        self._step = trainer.global_step
        if self._step % self.every_n_steps == 0:
            self._save_last(trainer)
        self._snapshot(trainer)
        reason = requested_stop(trainer)
        if reason is not None:
            if self._saved_at != self._step:
                self._save_last(trainer)
            stop(trainer, reason)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raises OSError if the result of training cannot be kept."""
        problem = None if self._saved_at == trainer.global_step else self._save_last(trainer)
        self._snapshot(trainer)
        self._whole = False
        if problem is not None:
            raise OSError(f"{problem}: training has ended, and nothing after the last whole checkpoint is kept")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes last.ckpt if the run holds a whole step; waits for no other process, because it may never come."""
        whole = self._whole and not trainer.validating and not isinstance(exception, KeyboardInterrupt)
        if (whole or isinstance(exception, NonFiniteGradients)) and self._saved_at != trainer.global_step:
            checkpoint = dump_checkpoint(trainer)
            try:
                trainer.strategy.save_checkpoint(checkpoint, last_checkpoint(trainer.default_root_dir))
            except OSError as error:
                warnings.warn(f"last.ckpt could not be written: {error}", stacklevel=2)
        self._whole = False

    def _save_last(self, trainer: L.Trainer) -> str | None:
        problem = save(trainer, last_checkpoint(trainer.default_root_dir))
        if problem is None:
            self._saved_at = trainer.global_step
        return problem

    def _snapshot(self, trainer: L.Trainer) -> None:
        step, keep = trainer.global_step, self.keep_every_n_steps
        if keep is None or step == 0 or step % keep:
            return
        path = last_checkpoint(trainer.default_root_dir).with_name(f"step_{step:08d}.ckpt")
        problem = save(trainer, path)
        if problem is None and self.keep_at_most is not None and trainer.is_global_zero:
            for old in snapshots(trainer.default_root_dir)[: -self.keep_at_most]:
                old.unlink(missing_ok=True)
