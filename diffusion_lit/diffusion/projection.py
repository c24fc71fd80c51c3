"""What is known of an image, as an orthogonal projection P, and how it is put into predictions: x + P (y - x)."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.types import Condition, DenoiseFn, Part, Prediction

Projection = Callable[[Tensor], Tensor]
"""What is known of images, (B, C, H, W), as images of the same shape; linear, and its own square."""

LUMINANCE = (0.2989, 0.587, 0.114)


def inside(mask: Tensor) -> Projection:
    """Pixels are known where the mask is 1: inpainting.

    Args:
        mask: 0 or 1, in a shape that broadcasts to (B, C, H, W).
    """

    def project(x: Tensor) -> Tensor:
        return x * mask.to(x)

    return project


def gray(x: Tensor) -> Tensor:
    """Luminance is known: colourisation. x: (B, 3, H, W)."""
    if x.shape[1] != 3:
        raise ValueError(f"gray: luminance is that of 3 channels, not of {x.shape[1]}")
    weights = torch.tensor(LUMINANCE, dtype=x.dtype, device=x.device)
    unit: Tensor = (weights / weights.square().sum().sqrt()).reshape(1, 3, 1, 1)
    return (x * unit).sum(1, keepdim=True) * unit


def patches(size: int = 8) -> Projection:
    """Means of patches are known: super-resolution.

    Args:
        size: Height and width of the patches, which divide those of the images.
    """

    def project(x: Tensor) -> Tensor:
        if x.shape[-1] % size or x.shape[-2] % size:
            raise ValueError(
                f"known: patches of {size} pixels do not divide images of {x.shape[-1]} x {x.shape[-2]} pixels"
            )
        means: Tensor = F.avg_pool2d(x, size)
        enlarged: Tensor = means.repeat_interleave(size, -1).repeat_interleave(size, -2)
        return enlarged

    return project


def with_known(denoise: DenoiseFn, process: Process, known: Projection, y: Tensor, clip: bool) -> DenoiseFn:
    """Puts what is known into each predicted x_0, and computes eps anew.

    Args:
        denoise: Predicts x_0.
        process: The forward process.
        known: What is known.
        y: Images of which `known(y)` is used, (B, C, H, W).
        clip: Whether predictions are clipped to [-1, 1] before.
    """
    y = known(y)

    def merged(x_t: Tensor, t: Tensor) -> Prediction:
        prediction = denoise(x_t, t)
        x0 = prediction.x0.clamp(-1, 1) if clip else prediction.x0
        x0 = x0 + y - known(x0)
        alpha, sigma = process.alpha_sigma(t)
        return Prediction(x0=x0, eps=(x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t), extra=prediction.extra)

    return merged


class Known(Part):
    """What is known of images that are to be completed.

    Attributes:
        entries: What must be given of an image.
    """

    entries: tuple[str, ...] = ("image",)

    @abstractmethod
    def projection(self, given: Condition) -> Projection:
        """The projection for some images, of which `entries` are given, (B, ...) each."""

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises ValueError if this cannot be known of images of this shape, (C, H, W)."""


class KnownPixels(Known):
    """The pixels where `mask` is 1: inpainting."""

    entries = ("image", "mask")

    def projection(self, given: Condition) -> Projection:
        return inside(given["mask"] > 0.5)


class Luminance(Known):
    """The luminance of each pixel: colourisation."""

    def projection(self, given: Condition) -> Projection:
        return gray

    def check(self, image_shape: tuple[int, int, int]) -> None:
        if image_shape[0] != 3:
            raise ValueError(f"known: luminance is that of 3 channels, and the model's images have {image_shape[0]}")


class PatchMeans(Known):
    """The means of square patches: super-resolution.

    Args:
        size: Height and width of the patches.
    """

    def __init__(self, size: int = 4) -> None:
        if size < 1:
            raise ValueError(f"known.size={size} must be at least 1")
        self.size = size

    def projection(self, given: Condition) -> Projection:
        return patches(self.size)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        if image_shape[1] % self.size or image_shape[2] % self.size:
            raise ValueError(f"known.size={self.size} does not divide the model's images of {image_shape[1]} pixels")
