"""The scalars of training."""

import time
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.loggers import IMAGES_SEEN, log_metrics
from diffusion_lit.stepping import totals
from diffusion_lit.system import System
from diffusion_lit.types import batch_size


class Scalars(L.Callback):
    """Logs losses, gradient norm, learning rate and images/s every `trainer.log_every_n_steps`.

    What a system's `losses` returned is averaged over all images of all processes since the last time, skipped steps
    excluded; values per image are also logged by quarter of the time, where there is one. Sums stay on the device, so
    that a step does not wait for the host.
    """

    def __init__(self) -> None:
        self.interval = Interval(None)
        self._sums: dict[str, Tensor] = {}
        self._step_sums: dict[str, Tensor] = {}
        self._restored: dict[str, Any] = {}
        self._step = 0
        self._started: float | None = None
        self._images = 0
        self._trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval = Interval(getattr(trainer, "log_every_n_steps", None) or None, "log_every_n_steps")
        self.interval.start(trainer)
        self._sums, self._step_sums = {}, {}
        if self._restored:
            sums: Tensor = self._restored["sums"]  # (W, names, 2), of every process.
            same = len(sums) == trainer.world_size
            # Every process has every name, because processes add their sums up row by row.
            own = sums[trainer.global_rank] if same else sums.sum(0) * trainer.is_global_zero
            self._sums = dict(zip(self._restored["names"], own.to(pl_module.device), strict=True))
            self._restored = {}
        self._step = trainer.global_step
        self._trainer = trainer

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: object
    ) -> None:
        if not isinstance(pl_module, System) or not isinstance(outputs, dict):
            return
        images = batch_size(batch)
        add(self._step_sums, totals(outputs, images))
        self._images += images
        if trainer.global_step == self._step:
            return
        # A step that is interrupted between its batches is repeated, so that none of it may count before its end.
        self._step = trainer.global_step
        if not pl_module.skipped_in_a_row:
            add(self._sums, self._step_sums)
        self._step_sums = {}
        if self.interval.due(trainer):
            self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, system: System) -> None:
        metrics = {}
        if self._sums:
            stacked = torch.stack(list(self._sums.values()))
            sums, counts = trainer.strategy.reduce(stacked, reduce_op="sum").unbind(1)
            for name, total, count in zip(self._sums, sums.tolist(), counts.tolist(), strict=True):
                if count:
                    metrics[f"train/{name}"] = total / count
        if system.gradient_norm is not None:
            metrics["train/gradient_norm"] = float(system.gradient_norm)
        metrics["train/skipped_steps"] = system.skipped_steps
        metrics["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        now = time.perf_counter()
        if self._started is not None:
            metrics["train/images_per_s"] = self._images * trainer.world_size / (now - self._started)
        metrics[IMAGES_SEEN] = images_seen(trainer)
        log_metrics(trainer, metrics)
        if "train/loss" in metrics:
            system.log("train/loss", metrics["train/loss"], prog_bar=True, logger=False)
        self._sums = {}
        self._started, self._images = None, 0

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._trainer = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """The sums of all processes; after a failure, when the others cannot be asked, those of this one."""
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values()))[None]
        if self._trainer is not None and self._trainer.world_size > 1:
            sums = self._trainer.strategy.all_gather(sums[0])
        return {"names": list(self._sums), "sums": sums.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict if "names" in state_dict else {}


def add(sums: dict[str, Tensor], further: dict[str, Tensor]) -> None:
    """Adds sums by name, in place."""
    for name, value in further.items():
        sums[name] = sums[name] + value if name in sums else value


def images_seen(trainer: L.Trainer) -> int:
    """Training images used so far, by all processes."""
    return trainer.global_step * int(getattr(getattr(trainer, "datamodule", None), "batch_size", 1))
