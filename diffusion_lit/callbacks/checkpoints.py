"""What is kept of a run, and how it is written."""

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

FOLDER = "checkpoints"
LAST = "last"
CARRIED = (
    "seed_everything",
    "model",
    "data",
    "ema",
    "sample_grid",
    "frechet",
    "evaluation",
    "likelihood",
    "checkpoints",
)
"""The sections of a configuration that a checkpoint carries."""
Module = TypeVar("Module", bound=L.LightningModule)


def last_checkpoint(run_dir: Path | str) -> Path:
    """Where a run keeps its newest checkpoint."""
    return Path(run_dir) / FOLDER / f"{LAST}.ckpt"


def run_of(checkpoint: Path | str) -> Path:
    """The run directory that a checkpoint lies in; its own directory where it was moved out of one."""
    folder = Path(checkpoint).resolve().parent
    return folder.parent if folder.name == FOLDER else folder


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """Opens a checkpoint without executing anything in it; tensors stay on disk until they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than tensors and plain data.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt_path={path}: there is no such file")
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} is damaged, or no checkpoint of tensors and plain data ({reason})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint: it has no state_dict")
    return checkpoint


def restore(path: str, base: type[Module]) -> Module:
    """A model from a checkpoint alone, with the weights that a reader of it wants.

    Args:
        path: A checkpoint that `fit` wrote.
        base: What the model must be.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, carries no configuration or is of something else.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint.get("config", {}).get("model")
    if config is None:
        raise ValueError(f"{path} carries no configuration of its model: it was not written by the command line")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "model")
    try:
        made = parser.instantiate_classes(parser.parse_object({"model": config}))
    except ArgumentError as error:
        if "does not correspond to a subclass" in str(error):
            raise ValueError(
                f"{path} is of {config.get('class_path')}, no {base.__name__}; give the checkpoint of a {base.__name__}"
            ) from error
        raise ValueError(
            f"{path} is of {config.get('class_path')}, no {base.__name__} that can be made: {error}"
        ) from error
    model: Module = made.model
    model.load_state_dict(checkpoint["state_dict"])
    return model


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it, so that a file is there whole or not at all."""

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                torch.save(dict(checkpoint), file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


class Checkpoints(ModelCheckpoint):
    """Keeps <run>/checkpoints/last.ckpt, also when training ends, is interrupted or fails; and snapshots if asked.

    Args:
        every_n_steps: Optimiser steps between two writings of last.ckpt.
        keep_every_n_steps: Optimiser steps between snapshots, step_<n>.ckpt, that are never removed; null: none.
    """

    def __init__(self, every_n_steps: int = 5000, keep_every_n_steps: int | None = None) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_every_n_steps", keep_every_n_steps)):
            if value is not None and value < 1:
                raise ValueError(f"checkpoints.{name}={value} must be at least 1")
        super().__init__(
            filename=LAST,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
            auto_insert_metric_name=False,
        )
        self.keep_every_n_steps = keep_every_n_steps
        self._training = False

    @property
    def state_key(self) -> str:
        """Not Lightning's, which holds the settings: a run may go on with others."""
        return type(self).__qualname__

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.dirpath = str(Path(trainer.default_root_dir).absolute() / FOLDER)
        with warnings.catch_warnings():
            # So it is in every run that goes on; `Trainer.fit` has refused all others.
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes nothing over: names are fixed, and a run may have been moved."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = True
        super().on_train_start(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes last.ckpt, but not over a good one where a run fails before it has started; waits for no process,
        because the others may never come.
        """
        if self._training and self._last_global_step_saved != trainer.global_step:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, last_checkpoint(trainer.default_root_dir))
            self._last_global_step_saved = trainer.global_step
        self._training = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, keep = trainer.global_step, self.keep_every_n_steps
        if keep is not None and step % keep == 0 and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(Path(str(self.dirpath)) / f"step_{step:08d}.ckpt", weights_only=False)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._last_global_step_saved:
            trainer.save_checkpoint(last_checkpoint(trainer.default_root_dir), weights_only=False)
            self._last_global_step_saved = trainer.global_step
        self._training = False
        super().on_train_end(trainer, pl_module)
