"""Features for scores where Inception's cannot be had or do not suit the images: a classifier of one's own data.

    fit -c configs/features/cifar10.yaml
    test --ckpt_path MODEL --evaluation.extractor TrainedFeatures --evaluation.extractor.checkpoint CLASSIFIER
    fit -c kl_f8 --model.loss.perceptual TrainedPerceptual --model.loss.perceptual.checkpoint CLASSIFIER

Distances in such features rank models of one data set; they compare with no published number.
"""

from pathlib import Path
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.checkpoint import load_model
from diffusion_lit.frozen import Frozen
from diffusion_lit.images import from_uint8
from diffusion_lit.metrics import FeatureExtractor, Perceptual, WeightsUnavailable, exact_float32
from diffusion_lit.metrics.perceptual import feature_distance
from diffusion_lit.networks import ConvClassifier
from diffusion_lit.system import System
from diffusion_lit.types import Batch


class FeatureNetworkModule(System):
    """Trains a classifier of clean images by cross-entropy, and logs how many it recognises.

    Args:
        network: The classifier.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides dropout.
        max_skipped_steps: See `System`.
    """

    def __init__(
        self,
        network: ConvClassifier,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        max_skipped_steps: int | None = 10,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, max_skipped_steps)
        self.network = network

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.in_channels, self.network.image_size, self.network.image_size

    @property
    def num_classes(self) -> int | None:
        return self.network.num_classes

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy in nats, and whether each image was recognised.

        Raises:
            ValueError: If the data have no labels.
        """
        if "label" not in batch:
            raise ValueError("the data have no labels to train a classifier on; choose data with classes")
        logits, label = self.network(batch["image"]).float(), batch["label"]
        losses = F.cross_entropy(logits, label, reduction="none")
        return {"loss": losses.mean(), "losses": losses, "accuracy": (logits.argmax(1) == label).float()}


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
        self.network = load_classifier(checkpoint, "extractor").requires_grad_(False)
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


class TrainedPerceptual(Perceptual):
    """A distance in the three stages of a classifier that `fit --model FeatureNetworkModule` has trained.

    It needs no weights but one's own, and its values compare with no published number.

    Args:
        checkpoint: The classifier's; read by `prepare`, or when it is first needed.
    """

    name = "classifier"

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self._network: Frozen | None = None

    def prepare(self) -> None:
        self._prepared()

    def check(self, image_shape: tuple[int, int, int]) -> None:
        network = self._prepared()
        expected = (network.in_channels, network.image_size, network.image_size)
        if image_shape != expected:
            raise ValueError(f"the classifier of TrainedPerceptual takes images of {expected}, not {image_shape}")

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        network = self._prepared()
        if network.head.weight.device != images.device:
            network.to(images.device)
        return feature_distance(network.stages(images), network.stages(targets))

    def _prepared(self) -> ConvClassifier:
        if self._network is None:
            try:
                self._network = Frozen(load_classifier(self._checkpoint, "perceptual"))
            except FileNotFoundError as error:
                raise WeightsUnavailable(f"TrainedPerceptual: {error}; train one by fit -c features/cifar10") from error
        return cast(ConvClassifier, self._network.network)


def load_classifier(checkpoint: str, option: str) -> ConvClassifier:
    """The classifier in a checkpoint, in eval mode; `option` names where its path is from, in messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a `FeatureNetworkModule`.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{option}.checkpoint={checkpoint}: there is no such file")
    return load_model(path, FeatureNetworkModule).network.eval()
