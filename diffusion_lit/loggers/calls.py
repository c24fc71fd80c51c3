"""What is sent to every logger of a trainer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, TensorBoardLogger
from PIL import Image

from diffusion_lit.loggers.curves import Curves
from diffusion_lit.loggers.wandb import WandB


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Sends scalars to every logger, at the current optimizer step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def log_image(trainer: Trainer, name: str, path: Path) -> None:
    """Sends a picture to every logger that takes pictures, on the first process, at the current optimizer step."""
    if not trainer.is_global_zero:
        return
    step = trainer.global_step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger | MLFlowLogger):
            with Image.open(path) as image:
                picture = image.convert("RGB")
            if isinstance(logger, TensorBoardLogger):
                import numpy as np

                logger.experiment.add_image(name, np.asarray(picture), step, dataformats="HWC")
            else:
                logger.experiment.log_image(logger.run_id, picture, key=name, step=step)
        elif isinstance(logger, CometLogger):
            logger.experiment.log_image(str(path), name=name, step=step)
        elif hasattr(logger, "log_image"):
            logger.log_image(name, [str(path)], step=step)


def log_hyperparams(trainer: Trainer, config: Mapping[str, Any]) -> None:
    """Sends a configuration to every logger and starts the W&B run; to be called once training begins."""
    for logger in trainer.loggers:
        logger.log_hyperparams(dict(config))
        if isinstance(logger, WandB):
            logger.start()


def bind_loggers(trainer: Trainer) -> None:
    """Lets loggers of this package write to the trainer's run directory where they were given no other."""
    for logger in trainer.loggers:
        if isinstance(logger, Curves | WandB):
            logger.bind(trainer.default_root_dir)


def logger_state(trainer: Trainer) -> dict[str, Any]:
    """Writes the curves to disk, and returns what a checkpoint has to keep of the loggers.

    Returns:
        "curves": the number of lines in metrics.jsonl; "wandb": the id of the W&B run. Each only where there is one.
    """
    state: dict[str, Any] = {}
    for logger in trainer.loggers:
        if isinstance(logger, Curves):
            logger.flush()
            state["curves"] = logger.lines
        elif isinstance(logger, WandB) and logger.id is not None:
            state["wandb"] = logger.id
    return state


def resume_loggers(trainer: Trainer, step: int, state: Mapping[str, Any]) -> None:
    """Lets loggers continue from a checkpoint; to be called before training.

    Args:
        trainer: The trainer.
        step: The checkpoint's step; 0 for a new run.
        state: The checkpoint, or whatever holds the entries of `logger_state`; {"curves": 0} for a new run.
    """
    for logger in trainer.loggers:
        if isinstance(logger, Curves):
            logger.resume(step, state.get("curves"))
        elif isinstance(logger, WandB) and logger.id is None:
            logger.id = state.get("wandb")
