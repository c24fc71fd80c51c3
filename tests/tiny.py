"""A small system on the embedded digits, and how to train it: what the tests of the upper floors share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.data import Digits
from diffusion_lit.diffusion import DDIM, DiscreteProcess
from diffusion_lit.loggers import CSV
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.trainer import Trainer

BATCH = 32


def network(width: int = 16, dropout: float = 0.1, image_size: int = 8) -> UNet:
    """A U-Net for digits, always with the same weights, and with dropout so that random state matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(
            image_size=image_size,
            in_channels=1,
            width=width,
            multipliers=[1, 2],
            num_blocks=1,
            attention=[4],
            dropout=dropout,
            num_groups=8,
        )


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3)


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=9)


def module(**kwargs: Any) -> DiffusionModule:
    parts: dict[str, Any] = {
        "network": network(),
        "process": DiscreteProcess(num_steps=100),
        "sampler": DDIM(steps=3),
        "optimizer": optimizer,
        "lr_scheduler": scheduler,
        "seed": 3,
    }
    return DiffusionModule(**{**parts, **kwargs})


def trainer(run_dir: Path, max_steps: int = 4, callbacks: Sequence[L.Callback] | None = None, **kwargs: Any) -> Trainer:
    """A trainer on one CPU that logs every step to CSV."""
    if callbacks is None:
        callbacks = [EMA([0.9]), Scalars(), Checkpoints()]
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSV(str(run_dir)),
        "log_every_n_steps": 1,
        "max_epochs": -1,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(
        default_root_dir=str(run_dir), max_steps=max_steps, callbacks=list(callbacks), **{**settings, **kwargs}
    )


def data(**kwargs: Any) -> Digits:
    return Digits(**{"batch_size": BATCH, "eval_batch_size": 600, **kwargs})


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def identical(a: object, b: object) -> bool:
    """Whether two nested structures hold the same keys, plain values and bits."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and a == b
