"""Scores of images that have a target, such as reconstructions: each image is compared with its own."""

from abc import abstractmethod
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from diffusion_lit.images import to_uint8
from diffusion_lit.metrics.features import FeatureExtractor, exact_float32
from diffusion_lit.metrics.perceptual import LPIPS, Perceptual
from diffusion_lit.metrics.scores import Evidence, Score
from diffusion_lit.types import Condition

LEAST_MSE = 1e-10
"""Relative to the range of the images: no PSNR is above 100 dB."""


class PairedScore(Score):
    """The mean over all images of how each compares with its target, both with 8 bits, in float32."""

    against: ClassVar = "nothing"
    output: ClassVar = None

    def __init__(self) -> None:
        super().__init__()

    @property
    @abstractmethod
    def name(self) -> str:
        """What the score is called in logs."""

    @abstractmethod
    def compare(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compares images, float32 (B, C, H, W) in [0, 1], with their targets: (B,)."""

    def per_image(self, generator: nn.Module, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        if "image" not in condition:
            raise ValueError(
                f"{type(self).__name__}: the model's images have no targets to compare with; leave it out of "
                "--evaluation.scores"
            )
        targets = to_uint8(condition["image"].to(images.device))
        with exact_float32(images.device):
            return {self.name: self.compare(images.float() / 255, targets.float() / 255)}

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        return {self.name: float(evidence.columns[self.name].double().mean())}


class PSNR(PairedScore):
    """Peak signal-to-noise ratio in dB, the mean of that of each image, which is at most 100."""

    name = "psnr"

    def compare(self, images: Tensor, targets: Tensor) -> Tensor:
        mse = (images - targets).square().flatten(1).mean(1)
        return -10 * mse.clamp(min=LEAST_MSE).log10()


class SSIM(PairedScore):
    """Structural similarity, by torchmetrics: Gaussian windows, the mean over channels.

    Args:
        sigma: Deviation of the window in pixels; the window has 2 [3.5 sigma] + 1 pixels, 11 by default. Images
            smaller than that need a smaller one: 0.5 gives 5 pixels.

    Raises:
        ValueError: If it is not above 0.

    Source: Wang et al. 2004.
    """

    name = "ssim"

    def __init__(self, sigma: float = 1.5) -> None:
        super().__init__()
        if not sigma > 0:
            raise ValueError(f"SSIM: sigma={sigma} must be above 0 pixels; the paper has 1.5")
        self.sigma = sigma

    @property
    def window(self) -> int:
        """Height and width of the window in pixels."""
        return 2 * int(3.5 * self.sigma + 0.5) + 1

    def compare(self, images: Tensor, targets: Tensor) -> Tensor:
        if min(images.shape[2:]) < self.window:
            raise ValueError(
                f"SSIM: images of {images.shape[2]} x {images.shape[3]} pixels are smaller than its window of "
                f"{self.window}; lower its sigma={self.sigma}, or leave it out of --evaluation.scores"
            )
        found = structural_similarity_index_measure(images, targets, sigma=self.sigma, data_range=1.0, reduction="none")
        return cast(Tensor, found).reshape(len(images))


class FeatureDistance(Score):
    """How far each image is from its target in features of unit length: the mean of |f(x) - f(y)|^2, in [0, 4].

    LPIPS, of one layer and with equal weights, in the features of any extractor.

    Args:
        extractor: Another than the evaluation's.

    Source: Zhang et al. 2018, eq. 1.
    """

    against = "targets"

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        if evidence.targets is None:
            raise ValueError(
                "FeatureDistance: the model's images have no targets to compare with; leave it out of "
                "--evaluation.scores"
            )
        x, y = (F.normalize(features.double(), dim=1) for features in (evidence.generated, evidence.targets))
        return {extractor.scalar("feature_distance"): float((x - y).square().sum(1).mean())}


class PerceptualDistance(PairedScore):
    """The perceptual distance: LPIPS, which latent diffusion's paper calls PSIM.

    Args:
        perceptual: Which distance.
    """

    def __init__(self, perceptual: Perceptual = LPIPS()) -> None:
        super().__init__()
        self.perceptual = perceptual

    @property
    def name(self) -> str:
        return self.perceptual.name

    def prepare(self) -> None:
        self.perceptual.prepare()

    def compare(self, images: Tensor, targets: Tensor) -> Tensor:
        self.perceptual.to(images.device)
        distances: Tensor = self.perceptual(2 * images - 1, 2 * targets - 1)
        return distances
