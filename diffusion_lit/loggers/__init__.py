"""Where scalars and pictures go: metrics.jsonl in the run directory, Weights & Biases, and Lightning's own loggers."""

from diffusion_lit.loggers.calls import (
    bind_loggers,
    log_hyperparams,
    log_image,
    log_metrics,
    logger_state,
    resume_loggers,
)
from diffusion_lit.loggers.curves import METRICS, Curves, read_curves
from diffusion_lit.loggers.directories import clear_save_dir, fill_save_dir
from diffusion_lit.loggers.wandb import IMAGES_SEEN, WandB, why_offline

__all__ = [
    "IMAGES_SEEN",
    "METRICS",
    "Curves",
    "WandB",
    "bind_loggers",
    "clear_save_dir",
    "fill_save_dir",
    "log_hyperparams",
    "log_image",
    "log_metrics",
    "logger_state",
    "read_curves",
    "resume_loggers",
    "why_offline",
]
