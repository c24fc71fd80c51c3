"""From an image to the same image at a lower resolution."""

import io
from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.types import Part

INTERPOLATIONS = ("bilinear", "bicubic", "area")
"""OpenCV's interpolations 1, 2 and 3, none of which antialiases; torch computes the same, but for edges of areas."""


class Degradation(Part):
    """Makes low-resolution images."""

    @abstractmethod
    def __call__(self, image: Tensor, factor: int, generator: np.random.Generator) -> Tensor:
        """Reduces an image.

        Args:
            image: uint8, (C, H, W), with C 1 or 3, and H and W multiples of the factor.
            factor: How many times smaller the result is.
            generator: Of this image, for what is random.

        Returns:
            uint8, (C, H / factor, W / factor).
        """


class Area(Degradation):
    """Means of squares of pixels, rounded to 8 bits.

    Source: the code of Dhariwal & Nichol 2021, which does not round them.
    """

    def __call__(self, image: Tensor, factor: int, generator: np.random.Generator) -> Tensor:
        return rounded(F.avg_pool2d(image.double(), factor))


class Bicubic(Degradation):
    """Pillow's bicubic reduction, which antialiases. Source: Rombach et al. 2022, appendix D.4, for ImageNet."""

    def __call__(self, image: Tensor, factor: int, generator: np.random.Generator) -> Tensor:
        size = image.shape[2] // factor, image.shape[1] // factor
        planes = [Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC) for plane in image.numpy()]
        return torch.from_numpy(np.stack([np.asarray(plane) for plane in planes]))


class BSRLight(Degradation):
    """The light variant of BSRGAN's degradation that latent diffusion is trained with.

    In random order: a blur, a reduction to a random size, the reduction to the final size after it, noise of 1 or 2
    levels and JPEG; at the end JPEG again. At a factor of 4, one image in four is halved before.

    Source: Zhang et al. 2021 (BSRGAN), section 3, as weakened in the code of Rombach et al. 2022: kernels are narrower
    and their variances a quarter, noise has 1 to 2 levels of 255 instead of 2 to 25, JPEG quality 80 to 95 instead of
    30 to 95, and one of two blurs is left out. There every draw is from global generators, here from the image's own.
    """

    def __call__(self, image: Tensor, factor: int, generator: np.random.Generator) -> Tensor:
        height, width = image.shape[1] // factor, image.shape[2] // factor
        x = image.double() / 255
        if factor == 4 and generator.random() < 0.25:
            x = self._halved(x, generator)
            factor = 2
        steps: list[Callable[[Tensor], Tensor]] = [
            lambda x: blurred(x, random_kernel(factor, generator)),
            lambda x: self._reduced(x, factor, generator),
            lambda x: resized(x, (height, width), self._interpolation(generator)),
            lambda x: noisy(x, generator),
            lambda x: compressed(x, generator) if generator.random() < 0.9 else x,
        ]
        order = generator.permutation(len(steps)).tolist()
        first, second = sorted((order.index(1), order.index(2)))
        order[first], order[second] = 1, 2
        for number in order:
            x = steps[number](x)
        return rounded(compressed(x, generator) * 255)

    def _interpolation(self, generator: np.random.Generator) -> str:
        return str(generator.choice(INTERPOLATIONS))

    def _halved(self, x: Tensor, generator: np.random.Generator) -> Tensor:
        size = x.shape[1] // 2, x.shape[2] // 2
        if generator.random() < 0.5:
            return resized(x, size, self._interpolation(generator))
        return resized(x, size, "bicubic", antialias=True)

    def _reduced(self, x: Tensor, factor: int, generator: np.random.Generator) -> Tensor:
        """To a random size, mostly; else by a blur, of which one pixel in every `factor` is kept."""
        if generator.random() < 0.8:
            scale = generator.uniform(1, 2 * factor)
            size = max(1, int(x.shape[1] / scale)), max(1, int(x.shape[2] / scale))
            return resized(x, size, self._interpolation(generator))
        return decimated(x, factor, generator.uniform(0.1, 0.6 * factor))


def rounded(x: Tensor) -> Tensor:
    """Rounds values in 0 .. 255 to 8 bits."""
    return x.round().clamp(0, 255).to(torch.uint8)


def resized(x: Tensor, size: tuple[int, int], interpolation: str, antialias: bool = False) -> Tensor:
    """Resizes an image, (C, H, W), in [0, 1]; by default without antialiasing, as OpenCV does."""
    if tuple(x.shape[1:]) == size:
        return x
    smooth = {} if interpolation == "area" else {"align_corners": False, "antialias": antialias}
    return F.interpolate(x[None], size, mode=interpolation, **smooth)[0].clamp(0, 1)


def gaussian_kernel(size: int, covariance: np.ndarray, shift: float = 0.0) -> np.ndarray:
    """A Gaussian with this covariance in pixels^2, (size, size), whose sum is 1.

    Args:
        size: Pixels.
        covariance: (2, 2), positive definite.
        shift: Pixels between the middle of the kernel and the Gaussian's, to the right and down.
    """
    offset = np.arange(size) - (size - 1) / 2 - shift
    points = np.stack(np.meshgrid(offset, offset), -1)
    exponent = np.einsum("hwi,ij,hwj->hw", points, np.linalg.inv(covariance), points)
    kernel = np.exp(-exponent / 2)
    total: float = kernel.sum()
    # A Gaussian far narrower than a pixel can vanish between pixels; then nothing is blurred.
    return kernel / total if total > 0 else np.pad([[1.0]], size // 2)[:size, :size]


def decimated(x: Tensor, factor: int, deviation: float) -> Tensor:
    """Blurs an image, (C, H, W), and keeps the first of every `factor` pixels, (C, H / factor, W / factor).

    The kernel is shifted, so that what is kept is the blurred value in the middle of each square of pixels.

    Args:
        x: The image.
        factor: How many times smaller the result is.
        deviation: Of the Gaussian, in pixels.
    """
    # A convolution mirrors its kernel: a Gaussian to the upper left takes pixels from the lower right.
    kernel = gaussian_kernel(25, np.eye(2) * deviation**2, -(factor - 1) / 2)
    return blurred(x, kernel)[:, ::factor, ::factor]


def random_kernel(factor: int, generator: np.random.Generator) -> np.ndarray:
    """The kernel of a blur: with equal chance an ellipse in a random direction, or a circle."""
    if generator.random() < 0.5:
        variances = (4 + factor) / 4 * generator.random(2)
        size, angle = int(generator.integers(5, 15)), generator.random() * np.pi
        axes = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        return gaussian_kernel(size, axes @ np.diag(np.maximum(variances, 1e-6)) @ axes.T)
    size, deviation = int(generator.integers(5, 8)), (2 + 0.2 * factor) / 4 * generator.random()
    return gaussian_kernel(size, np.eye(2) * max(deviation, 1e-3) ** 2)


def blurred(x: Tensor, kernel: np.ndarray) -> Tensor:
    """Convolves an image, (C, H, W), whose border is a mirror."""
    return torch.from_numpy(ndimage.convolve(x.numpy(), kernel[None], mode="mirror"))


def noisy(x: Tensor, generator: np.random.Generator) -> Tensor:
    """Adds Gaussian noise of 1 or 2 levels: independent, grey, or correlated between the channels."""
    channels, height, width = x.shape
    level, kind = generator.integers(1, 3) / 255, generator.random()
    if kind > 0.6:
        noise = level * generator.standard_normal((channels, height, width))
    elif kind < 0.4:
        noise = level * generator.standard_normal((1, height, width))
    else:
        values, vectors = np.linalg.eigh(random_covariance(channels, generator))
        mixing = vectors * np.sqrt(values.clip(min=0))
        noise = 2 / 255 * np.tensordot(mixing, generator.standard_normal((channels, height, width)), 1)
    return (x + torch.from_numpy(noise)).clamp(0, 1)


def random_covariance(channels: int, generator: np.random.Generator) -> np.ndarray:
    """Of noise in the channels, (channels, channels): correlations are at least 0, as in the published code."""
    basis = np.linalg.svd(generator.random((channels, channels)))[0]
    covariance: np.ndarray = np.abs(basis.T @ np.diag(generator.random(channels)) @ basis)
    return covariance


def compressed(x: Tensor, generator: np.random.Generator) -> Tensor:
    """Writes an image, (C, H, W) in [0, 1], as JPEG of a quality from 80 to 95, and reads it."""
    array = rounded(x * 255).numpy()
    file = io.BytesIO()
    picture = Image.fromarray(array[0] if len(array) == 1 else np.ascontiguousarray(array.transpose(1, 2, 0)))
    picture.save(file, "JPEG", quality=int(generator.integers(80, 96)))
    with Image.open(file) as read:
        pixels = np.atleast_3d(np.asarray(read)).transpose(2, 0, 1)
    return torch.from_numpy(pixels.astype(np.float64) / 255)
