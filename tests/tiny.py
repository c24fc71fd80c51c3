"""Small systems on the embedded digits, and how to train them: what tests of training share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.data import Digits, ImageData
from diffusion_lit.diffusion import DDIM, DiscreteProcess
from diffusion_lit.loggers import METRICS, Curves, read_curves
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.optimization import optimization
from diffusion_lit.records import read_records
from diffusion_lit.system import System
from diffusion_lit.trainer import Trainer
from diffusion_lit.types import Batch

BATCH = 32
CURVES = METRICS
"""The file of a run's scalars, from the run directory."""
CLOCK = "train/images_per_s"
"""The scalar that depends on the machine."""


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


class Pair(System):
    """Two linear maps that are trained against each other, each by an optimizer of its own.

    Args:
        bad_at: Steps, from 1, whose loss is not a number.
        random: Whether losses depend on the random state.
    """

    def __init__(self, bad_at: Sequence[int] = (), random: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(64, 64)
            self.second = nn.Linear(64, 1)
        self.bad_at = bad_at
        self.random = random

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def averaged_names(self) -> list[str]:
        return [name for name in super().averaged_names() if name.startswith("first.")]

    def configure_optimizers(self) -> Any:
        def halving(optimizer: Any) -> Any:
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

        return [
            optimization(self.first.parameters(), lambda p: torch.optim.SGD(p, lr=0.1), halving),
            optimization(self.second.parameters(), lambda p: torch.optim.Adam(p, lr=0.01), None),
        ]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        x = batch["image"].flatten(1)
        y = self.first(x + 0.1 * torch.randn_like(x) if self.random else x)
        scale = float("nan") if self.trainer.training and self.trainer.global_step + 1 in self.bad_at else 1.0
        losses = (y - x).square().mean(1) * scale
        return {
            "loss": losses.mean() + 0.1 * self.second(y).mean(),
            "losses": losses,
            "other": self.second(y).square().mean(),
        }

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        counted, other = self.all_optimizers()
        parts = self.losses(batch)
        self.update(other, parts["other"])
        self.update(counted, self.losses(batch)["loss"])
        outputs = self.note(parts)
        self.finish_step()
        return outputs


def trainer(run_dir: Path, max_steps: int = 4, callbacks: Sequence[L.Callback] | None = None, **kwargs: Any) -> Trainer:
    """A trainer on one CPU that logs every step to the run directory."""
    if callbacks is None:
        callbacks = [EMA([0.9]), Scalars(), Checkpoints()]
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": logger(run_dir),
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


def logger(run_dir: Path, every_n_steps: int = 100) -> Curves:
    """What writes `CURVES`, every so many steps and before every checkpoint."""
    return Curves(str(run_dir), flush_every_n_steps=every_n_steps)


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a run without `CLOCK`, as (step, value) in order of steps, by name."""
    return {name: curve for name, curve in read_curves(run_dir).items() if name != CLOCK}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `CURVES` as they stand there, without `CLOCK`, each with the "step" as a number."""
    return [{name: value for name, value in row.items() if name != CLOCK} for row in read_records(run_dir / CURVES)]


def data(**kwargs: Any) -> ImageData:
    return ImageData(Digits(), **{"batch_size": BATCH, "eval_batch_size": 600, **kwargs})


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


class Recorder(L.Callback):
    """Keeps the raw weights after every optimiser step, in float64."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def record(self, module: L.LightningModule) -> None:
        self.weights.append({n: p.detach().double().clone() for n, p in module.named_parameters()})

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.record(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == len(self.weights):
            self.record(pl_module)
