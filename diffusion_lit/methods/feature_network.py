"""Features for scores where Inception's cannot be had or do not suit the images: a classifier of one's own data.

    fit -c configs/base.yaml -c configs/features/cifar10.yaml
    test --ckpt_path MODEL --frechet.extractor diffusion_lit.methods.feature_network.TrainedFeatures
        --frechet.extractor.init_args.checkpoint CLASSIFIER

Distances in such features rank models of one data set; they compare with no published number.
"""

from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.callbacks.checkpoints import restore
from diffusion_lit.images import from_uint8
from diffusion_lit.metrics import FeatureExtractor, exact_float32
from diffusion_lit.module import TRAINING, restart_at_step, seed_step
from diffusion_lit.networks import ConvClassifier
from diffusion_lit.types import Batch


class FeatureNetworkModule(L.LightningModule):
    """Trains a classifier of clean images by cross-entropy, and says how many it recognises.

    Args:
        network: The classifier.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides dropout.
    """

    def __init__(
        self,
        network: ConvClassifier,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.seed = seed
        self.config: dict[str, Any] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.network.in_channels, self.network.image_size, self.network.image_size

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

    def classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats, and the share that was recognised.

        Raises:
            ValueError: If the data have no labels.
        """
        if "label" not in batch:
            raise ValueError("the data have no labels to train a classifier on; choose data with classes")
        logits = self.network(batch["image"]).float()
        accuracy = (logits.argmax(1) == batch["label"]).float().mean()
        return F.cross_entropy(logits, batch["label"]), accuracy

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_step(self.seed, TRAINING, self.global_rank, self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss, accuracy = self.classify(batch)
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_scores("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_scores("test", batch)

    def _log_scores(self, stage: str, batch: Batch) -> None:
        if len(batch["image"]):
            loss, accuracy = self.classify(batch)
            scores = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
            self.log_dict(scores, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch["image"]))

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


class TrainedFeatures(FeatureExtractor):
    """The last features of a classifier that `fit --model FeatureNetworkModule` has trained, and its logits.

    Args:
        checkpoint: The classifier's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a `FeatureNetworkModule`.
    """

    name = "classifier"
    classifies = True

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        if not Path(checkpoint).is_file():
            raise FileNotFoundError(f"extractor.checkpoint={checkpoint}: there is no such file")
        self.network = restore(checkpoint, FeatureNetworkModule).network.eval().requires_grad_(False)
        self.num_features = self.network.num_features
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.outputs(images)["features"]

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        network = self.network
        expected = (network.in_channels, network.image_size, network.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"the classifier takes images of {expected}, not {tuple(images.shape[1:])}")
        with exact_float32(images.device):
            features = network.features(from_uint8(images))
            logits = cast(Tensor, network.head(features))
        return {"features": features, "logits": logits}
