"""Classifier guidance: a classifier of noisy images is trained here, and then guides a diffusion model.

    fit -c configs/base.yaml -c configs/guidance/digits_classifier.yaml
    predict --ckpt_path MODEL --model.init_args.guidance diffusion_lit.methods.classifier_guidance.TrainedClassifier
        --model.init_args.guidance.init_args.checkpoint CLASSIFIER

The mathematics of the guidance is in `diffusion.guidance`. Source: Dhariwal & Nichol 2021, section 4.
"""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.callbacks.checkpoints import restore
from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.diffusion import ClassifierGuidance, DiscreteProcess
from diffusion_lit.diffusion.guidance import require_time
from diffusion_lit.loggers import log_metrics
from diffusion_lit.module import TRAINING, VALIDATION, restart_at_step, seed_step
from diffusion_lit.types import Batch

QUARTERS = 4


class NoisyClassifierModule(L.LightningModule):
    """Trains a classifier on images as noisy as a diffusion model sees them.

    Cross-entropy at x_t ~ q(x_t | x_0), t uniform.

    Logs loss and accuracy, as a whole and by quarter of t: near t = 1 no classifier can know.

    Args:
        network: Called as network(x_t, time); gives logits, (B, num_classes). It has `image_size`, `in_channels` and
            `num_classes`.
        process: The forward process, that of the diffusion model.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides times, noise and dropout while training.

    Raises:
        ValueError: If the network takes no time.
    """

    def __init__(
        self,
        network: nn.Module,
        process: DiscreteProcess = DiscreteProcess(),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_time(network)
        self.network = network
        self.process = process
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.seed = seed
        self.config: dict[str, Any] = {}
        self._interval = Interval(None)
        self._tally = torch.zeros(2, QUARTERS)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        size = cast(int, self.network.image_size)
        return cast(int, self.network.in_channels), size, size

    def setup(self, stage: str) -> None:
        """Raises ValueError if the data's images have not the network's shape, or something is to be generated."""
        if stage == "predict":
            raise ValueError("predict: a classifier generates nothing; give --ckpt_path of a diffusion model")
        shape = getattr(getattr(self.trainer, "datamodule", None), "image_shape", self.image_shape)
        if tuple(shape) != self.image_shape:
            raise ValueError(
                f"the data's images are {tuple(shape)} (channels, height, width) but the classifier takes "
                f"{self.image_shape}; make data.init_args.image_size and the network's image_size and in_channels agree"
            )

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Logits, (B, num_classes), at times as the process tells them to networks, (B,)."""
        return cast(Tensor, self.network(x_t, time))

    def classify(self, batch: Batch) -> dict[str, Tensor]:
        """Draws times and noise, and judges the noisy images.

        Returns:
            Of each image, (B,): "t", its cross-entropy in nats, "losses", and whether it was recognised, "correct".

        Raises:
            ValueError: If the data have no labels.
        """
        x0 = batch["image"]
        if "label" not in batch:
            raise ValueError("the data have no labels to train a classifier on; choose data with classes")
        t = self.process.sample_times(len(x0), x0.device)
        x_t = self.process.perturb(x0, torch.randn_like(x0), t)
        logits = self(x_t, self.process.network_time(t)).float()
        label = batch["label"]
        losses = F.cross_entropy(logits, label, reduction="none")
        return {"t": t, "losses": losses, "correct": (logits.argmax(1) == label).float()}

    def on_train_start(self) -> None:
        self._interval = Interval(getattr(self.trainer, "log_every_n_steps", None) or None)
        self._interval.start(self.trainer)
        self._tally = torch.zeros(2, QUARTERS, device=self.device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_step(self.seed, TRAINING, self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        parts = self.classify(batch)
        loss = parts["losses"].mean()
        return {**parts, "losses": parts["losses"].detach(), "loss": loss, "mean_loss": loss.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Adds up and, every `trainer.log_every_n_steps`, logs the accuracy; the loss is `Scalars`' to log."""
        self._tally += tally(outputs)
        if self._interval.due(self.trainer):
            right, count = self.trainer.strategy.reduce(self._tally, reduce_op="sum").tolist()
            metrics = {"train/accuracy": sum(right) / max(sum(count), 1)}
            metrics |= {f"train/accuracy_{name}": r / n for name, r, n in zip(NAMES, right, count, strict=True) if n}
            log_metrics(self.trainer, metrics)
            self._tally = torch.zeros_like(self._tally)

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        seed_step(self.seed, VALIDATION, self.global_rank, batch_idx)

    on_test_batch_start = on_validation_batch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_scores("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_scores("test", batch)

    def _log_scores(self, stage: str, batch: Batch) -> None:
        if not len(batch["image"]):
            return
        parts = self.classify(batch)
        right, count = tally(parts)
        scores = {
            "loss": (parts["losses"].mean(), len(parts["t"])),
            "accuracy": (parts["correct"].mean(), len(parts["t"])),
        }
        for name, r, n in zip(NAMES, right, count, strict=True):
            scores[f"accuracy_{name}"] = (r / n.clamp(min=1), int(n))
        for name, (value, weight) in scores.items():
            self.log(f"{stage}/{name}", value, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            restart_at_step(checkpoint, self.trainer.accumulate_grad_batches)


NAMES = [f"t_{i / QUARTERS:.2f}_{(i + 1) / QUARTERS:.2f}" for i in range(QUARTERS)]


def tally(parts: dict[str, Tensor]) -> Tensor:
    """How many images were recognised, and how many there were, by quarter of t, (2, 4)."""
    quarter = (parts["t"] * QUARTERS).ceil().long().clamp(1, QUARTERS) - 1
    rows = torch.stack([parts["correct"], torch.ones_like(parts["correct"])])
    return torch.zeros(2, QUARTERS, device=rows.device).index_add_(1, quarter, rows)


class TrainedClassifier(ClassifierGuidance):
    """Classifier guidance by a classifier that `fit --model NoisyClassifierModule` has trained.

    Args:
        checkpoint: The classifier's.
        scale: s; 0 is unguided, 1 the paper's with a conditional model, and up to 10 with an unconditional one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a `NoisyClassifierModule`.
    """

    def __init__(self, checkpoint: str, scale: float = 1.0) -> None:
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(
                f"guidance.checkpoint={checkpoint}: there is no such file; train a classifier with fit --model "
                "NoisyClassifierModule, or give one by --model.init_args.guidance.init_args.checkpoint"
            )
        module = restore(checkpoint, NoisyClassifierModule)
        super().__init__(module.network, module.process, scale)
