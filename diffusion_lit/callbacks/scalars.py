"""The scalars of training."""

import time
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.loggers import IMAGES_SEEN, log_metrics

QUARTERS = 4


class Scalars(L.Callback):
    """Logs loss, loss by quarter of t, gradient norm, learning rate and images/s every `trainer.log_every_n_steps`.

    Losses are means over all images of all processes since the last time, skipped steps apart. They are summed on the
    device, so that a step does not wait for the host.
    """

    def __init__(self) -> None:
        self.interval = Interval(None)
        self._sums: Tensor | None = None
        self._of_step = torch.zeros(0)
        self._step = 0
        self._started: float | None = None
        self._images = 0
        self._trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval = Interval(getattr(trainer, "log_every_n_steps", None) or None)
        self.interval.start(trainer)
        sums = torch.zeros(2, QUARTERS + 1) if self._sums is None else self._sums
        if sums.ndim == 3:  # From a checkpoint: of every process.
            world = trainer.world_size
            shared = torch.zeros(world, *sums.shape[1:])
            shared[0] = sums.sum(0)
            sums = (sums if len(sums) == world else shared)[trainer.global_rank]
        self._sums = sums.to(device=pl_module.device, dtype=torch.float32)
        self._of_step = torch.zeros_like(self._sums)
        self._step = trainer.global_step
        self._trainer = trainer

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if self._started is None:
            self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        if self._sums is None or not isinstance(outputs, dict) or "losses" not in outputs:
            return
        losses, t = outputs["losses"].float(), outputs["t"]
        quarter = (t * QUARTERS).ceil().long().clamp(1, QUARTERS) - 1
        rows = torch.stack([losses, torch.ones_like(losses)])
        self._of_step[:, :QUARTERS].index_add_(1, quarter, rows)
        self._of_step[0, QUARTERS] += outputs["mean_loss"].float() * len(losses)
        self._of_step[1, QUARTERS] += len(losses)
        self._images += len(losses)
        if trainer.global_step == self._step:
            return
        # A step that is interrupted between its batches is done again, so none of it may count before its end.
        self._step = trainer.global_step
        if not getattr(pl_module, "skipped_in_a_row", 0):
            self._sums += self._of_step
        self._of_step.zero_()
        if self.interval.due(trainer):
            self._log(trainer, pl_module, self._sums)

    def _log(self, trainer: L.Trainer, module: L.LightningModule, sums: Tensor) -> None:
        total = trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        (*by_quarter, loss), (*counts, count) = ((total[0] / total[1].clamp(min=1)).tolist(), total[1].tolist())
        metrics = {"train/loss": loss} if count else {}
        for i, (value, of_quarter) in enumerate(zip(by_quarter, counts, strict=True)):
            if of_quarter:
                metrics[f"train/loss_t_{i / QUARTERS:.2f}_{(i + 1) / QUARTERS:.2f}"] = value
        norm = getattr(module, "gradient_norm", None)
        if norm is not None:
            metrics["train/gradient_norm"] = float(norm)
        metrics["train/skipped_steps"] = getattr(module, "skipped_steps", 0)
        metrics["train/learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        now = time.perf_counter()
        if self._started is not None:
            metrics["train/images_per_s"] = self._images * trainer.world_size / (now - self._started)
        metrics[IMAGES_SEEN] = images_seen(trainer)
        log_metrics(trainer, metrics)
        if count:
            module.log("train/loss", loss, prog_bar=True, logger=False)
        sums.zero_()
        self._started, self._images = None, 0

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._trainer = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer = None

    def state_dict(self) -> dict[str, Any]:
        """The sums of all processes, (W, 2, 5); after a failure, when the others cannot be asked, of this one."""
        if self._sums is None:
            return {}
        sums = self._sums[None]
        if self._trainer is not None and self._trainer.world_size > 1:
            sums = self._trainer.strategy.all_gather(self._sums)
        return {"sums": sums.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = state_dict.get("sums")


def images_seen(trainer: L.Trainer) -> int:
    """Training images used so far, by all processes."""
    return trainer.global_step * int(getattr(getattr(trainer, "datamodule", None), "batch_size", 1))
