"""Classifier guidance: a classifier of noisy images is trained here, and then guides a diffusion model.

    fit -c configs/guidance/digits_classifier.yaml
    predict --ckpt_path MODEL --model.guidance TrainedClassifier --model.guidance.checkpoint CLASSIFIER

The mathematics of the guidance is in `diffusion.guidance`. Source: Dhariwal & Nichol 2021, section 4.
"""

from pathlib import Path
from typing import cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.checkpoint import load_model
from diffusion_lit.diffusion import ClassifierGuidance, DiscreteProcess, Process, UniformTimes
from diffusion_lit.system import System
from diffusion_lit.types import Batch, TimeDependentClassifier


def require_labels(batch: Batch) -> Tensor:
    """The labels of a batch, int64 (B,); raises ValueError if there are none."""
    if "label" not in batch:
        raise ValueError("the data have no labels to train a classifier on; choose data with classes")
    return batch["label"]


class NoisyClassifierModule(System):
    """Trains a classifier on images as noisy as a diffusion model sees them.

    Cross-entropy at x_t ~ q(x_t | x_0), t uniform. Loss and accuracy are logged as a whole and by quarter of t: near
    t = 1 no classifier can know.

    Args:
        network: Called as network(x_t, time); returns logits, (B, num_classes).
        process: The forward process, that of the diffusion model.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides times, noise and dropout while training.
        max_skipped_steps: See `System`.
    """

    def __init__(
        self,
        network: TimeDependentClassifier,
        process: Process = DiscreteProcess(),
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        max_skipped_steps: int | None = 10,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, max_skipped_steps)
        self.network = network
        self.process = process
        self.times = UniformTimes()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.in_channels, self.network.image_size, self.network.image_size

    @property
    def num_classes(self) -> int | None:
        return self.network.num_classes

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        """Logits, (B, num_classes), at times as the process gives them to networks, (B,)."""
        return cast(Tensor, self.network(x_t, time))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy in nats and whether each image was recognised, at times and with noise drawn here.

        Raises:
            ValueError: If the data have no labels.
        """
        x0, label = batch["image"], require_labels(batch)
        t, _ = self.times.draw(len(x0), self.process, x0.device)
        x_t = self.process.perturb(x0, torch.randn_like(x0), t)
        logits = self(x_t, self.process.network_time(t)).float()
        losses = F.cross_entropy(logits, label, reduction="none")
        return {"loss": losses.mean(), "t": t, "losses": losses, "accuracy": (logits.argmax(1) == label).float()}


class TrainedClassifier(ClassifierGuidance):
    """Classifier guidance by a classifier that `fit --model NoisyClassifierModule` has trained.

    Args:
        checkpoint: The classifier's.
        scale: s; 0 is unguided, 1 the paper's with a conditional model, and up to 10 with an unconditional one.
        clip: Whether predictions of x_0 are clipped before they are guided, as in the published code; then the
            sampler's own clip is set to false.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of a `NoisyClassifierModule`.
    """

    def __init__(self, checkpoint: str, scale: float = 1.0, clip: bool = False) -> None:
        if not Path(checkpoint).expanduser().is_file():
            raise FileNotFoundError(
                f"guidance.checkpoint={checkpoint}: there is no such file; train a classifier with fit --model "
                "NoisyClassifierModule, or give one by --model.guidance.checkpoint"
            )
        module = load_model(Path(checkpoint).expanduser(), NoisyClassifierModule)
        super().__init__(module.network, module.process, scale, clip)
