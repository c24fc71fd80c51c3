"""CLIP guidance: two networks learn which text belongs to which image, and then guide a diffusion model.

    fit -c guidance/clip_digits
    predict --ckpt_path MODEL --prompts "a three" --model.guidance CLIPGuidance --model.guidance.checkpoint CLIP

With `--model.noisy true`, the default, images are as noisy as a diffusion model sees them (GLIDE's noised CLIP);
otherwise they are clean, and guidance goes through the predicted x_0. Sources: Radford et al. 2021 (CLIP); Nichol et
al. 2022 (GLIDE), section 2.4. The mathematics of the guidance is in `diffusion.gradient`.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from diffusion_lit.checkpoint import load_model
from diffusion_lit.conditioner import Conditioner
from diffusion_lit.conditioners import Prompts
from diffusion_lit.diffusion import Denoiser, DiscreteProcess, GradientGuidance, LogLikelihood, Process, UniformTimes
from diffusion_lit.diffusion.gradient import float_type, require_same_noise
from diffusion_lit.frozen import Frozen
from diffusion_lit.images import from_uint8
from diffusion_lit.lightning import attached_trainer
from diffusion_lit.metrics import FeatureExtractor
from diffusion_lit.metrics.scores import Evidence, Score
from diffusion_lit.system import System
from diffusion_lit.text import decode_text
from diffusion_lit.types import Batch, Condition, Part, TimeDependentClassifier

MOST = 100.0
"""Greatest factor of the products of unit vectors."""


class ImageText(nn.Module, Part):
    """Maps images and texts to unit vectors, whose products say how well they agree.

    Args:
        image: The image tower, a classifier of noisy images, whose logits are taken for features: `num_classes` is D.
        text: The text tower. Its first token, projected without a bias, is the feature of a text.

    Source: Radford et al. 2021, section 2.4 and figure 3; a time for the image tower: Nichol et al. 2022, section 2.4.
    """

    def __init__(self, image: TimeDependentClassifier, text: Prompts) -> None:
        super().__init__()
        self.image_size, self.in_channels = image.image_size, image.in_channels
        self.image = image
        self.text = text
        self.projection = nn.Linear(text.width, image.num_classes, bias=False)
        nn.init.normal_(self.projection.weight, std=text.width**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def scale(self) -> Tensor:
        """The factor of the products, at most `MOST`; a scalar."""
        return self.log_scale.exp().clamp(max=MOST)

    def of_images(self, x: Tensor, time: Tensor) -> Tensor:
        """Unit vectors, (B, D), of images, (B, C, H, W), at times as the process gives them to networks, (B,)."""
        return F.normalize(self.image(x, time).float(), dim=1)

    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, (B, D), of texts."""
        return F.normalize(self.projection(self.text.encode(texts)[:, 0]).float(), dim=1)


class ImageTextModule(System):
    """Trains an image tower and a text tower on images with captions.

    Each image is to be told which of the batch's texts is its own, and each text which image: the mean of both
    cross-entropies, over the batches of all processes together. Their least value is above 0 where several images of
    a batch have captions that fit each other.

    Args:
        network: The towers.
        process: The forward process, that of the diffusion model.
        noisy: Whether images are noised, to a time drawn uniformly; otherwise they are clean, and their time is 0.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides times, noise and dropout while training.
        max_skipped_steps: See `System`.

    Source: Radford et al. 2021, figure 3.
    """

    def __init__(
        self,
        network: ImageText,
        process: Process = DiscreteProcess(),
        noisy: bool = True,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        max_skipped_steps: int | None = 10,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, max_skipped_steps)
        self.network = network
        self.process = process
        self.noisy = noisy
        self.times = UniformTimes()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.in_channels, self.network.image_size, self.network.image_size

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        self.network.text.start(data, device)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy in nats, the mean of that of an image and that of its text.

        Raises:
            ValueError: If the data have no captions.
        """
        x, caption = batch["image"], batch.get("caption")
        if caption is None:
            raise ValueError("the data have no captions to learn from; choose a --data.source that has them")
        time, parts = torch.zeros(len(x), device=x.device), {}
        if self.noisy:
            parts["t"], _ = self.times.draw(len(x), self.process, x.device)
            x = self.process.perturb(x, torch.randn_like(x), parts["t"])
            time = self.process.network_time(parts["t"])
        images, texts = self.network.of_images(x, time), self.network.of_texts(decode_text(caption))
        (all_images, first), (all_texts, _) = self._of_all(images), self._of_all(texts)
        own = torch.arange(first, first + len(x), device=x.device)
        losses = sum(
            F.cross_entropy(self.network.scale * some @ others.T, own, reduction="none") / 2
            for some, others in ((images, all_texts), (texts, all_images))
        )
        losses = cast(Tensor, losses)
        return {"loss": losses.mean(), "losses": losses, **parts}

    def _of_all(self, vectors: Tensor) -> tuple[Tensor, int]:
        """The vectors of all processes, through which gradients flow, and where those of this one begin."""
        trainer = attached_trainer(self)
        if trainer is None or trainer.world_size == 1 or not self.training:
            return vectors, 0
        gathered = cast(Tensor, self.all_gather(vectors, sync_grads=True))
        return gathered.flatten(0, 1), trainer.global_rank * len(vectors)


class TextAgreement(nn.Module, LogLikelihood):
    """The agreement of an image with its text as log p(c | x) up to a constant: the scaled product of unit vectors.

    The factor is the one that training found, 100 in published models. InfoNCE's optimum is log p(x, c) / p(x) p(c), up
    to a function of each alone.

    Args:
        network: The towers, which are not trained.
        process: The process that they were trained on.
        noisy: Whether they were trained on noisy images; otherwise they are shown the predicted x_0.

    Source: Nichol et al. 2022, eq. 6.
    """

    entries = ("caption",)

    def __init__(self, network: ImageText, process: Process, noisy: bool) -> None:
        super().__init__()
        self.towers = Frozen(network)
        self.process = process
        self.clean = not noisy

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the image tower has other images or noise than the denoiser."""
        process = denoiser.process if self.clean else self.process
        names = {"image_size": "images", "in_channels": "channels"}
        require_same_noise("CLIP", self.towers.network, process, denoiser, names)

    def prepare(self, given: Condition) -> Condition:
        return {"text": _towers(self.towers).of_texts(decode_text(given["caption"]))}

    def __call__(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        towers = _towers(self.towers)
        time = torch.zeros_like(t) if self.clean else self.process.network_time(t)
        images = towers.of_images(x.to(float_type(towers.image, x)), time.to(x.device, torch.float32).expand(len(x)))
        return towers.scale * (images * condition["text"].to(images)).sum(1)


class CLIPGuidance(GradientGuidance):
    """Guidance by an image tower and a text tower that `fit --model ImageTextModule` has trained.

    Args:
        checkpoint: Of an `ImageTextModule`.
        scale: s; 0 is unguided, GLIDE takes 2 to 3.
        clip: Whether predictions of x_0 are clipped before they are guided; then set the sampler's own clip to false.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of an `ImageTextModule`.

    Source: Nichol et al. 2022, section 2.4.
    """

    def __init__(self, checkpoint: str, scale: float = 1.0, clip: bool = False) -> None:
        module = load_towers("guidance", checkpoint)
        super().__init__(TextAgreement(module.network, module.process, module.noisy), scale, clip)


class CLIPScore(Score):
    """The mean product of the unit vectors of an image and of its text, in [-1, 1].

    Images that were guided by the same towers score high without looking so.

    Args:
        checkpoint: Of an `ImageTextModule`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of an `ImageTextModule`.

    Source: Nichol et al. 2022, section 5 and figure 6; Hessel et al. 2021.
    """

    against = "nothing"
    output = None

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        self.towers = Frozen(load_towers("CLIPScore", checkpoint).network)

    def per_image(self, generator: nn.Module, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        if "caption" not in condition:
            raise ValueError("CLIPScore needs a model of texts; leave the score out")
        towers = _towers(self.towers.to(images.device))
        with torch.no_grad():
            seen = towers.of_images(from_uint8(images), torch.zeros(len(images), device=images.device))
            return {"clip_score": (seen * towers.of_texts(decode_text(condition["caption"]))).sum(1).cpu()}

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        return {"clip_score": float(evidence.columns["clip_score"].double().mean())}


def _towers(frozen: Frozen) -> ImageText:
    return cast(ImageText, frozen.network)


def load_towers(section: str, checkpoint: str) -> ImageTextModule:
    """The towers of a checkpoint, with their averaged weights.

    Args:
        section: Of the configuration that names the file, for messages.
        checkpoint: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of an `ImageTextModule`.
    """
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{section}.checkpoint={checkpoint}: there is no such file; train one with fit --model ImageTextModule"
        )
    return load_model(path, ImageTextModule)
