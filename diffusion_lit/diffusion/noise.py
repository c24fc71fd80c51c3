"""Noise of training and of sampling; the latter depends on (seed, image, number of the draw) alone."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lit.diffusion.philox import WORD, Words, philox
from diffusion_lit.types import Part


def normals(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Computes two standard normal numbers, float32, from two random words, by the Box-Muller transform.

    A word is the middle of one of 2^32 intervals of (0, 1), so that no number exceeds sqrt(2 log 2^33) = 6.77, which a
    normal one does once in 10^11. The numbers are computed in float64 and rounded: devices, whose functions differ in
    the last one or two bits of a float64, agree except in about one number of 10^8, which differs in the last bit of a
    float32.
    """
    length = ((radius.double() + 0.5) / 2**32).log().mul(-2).sqrt()
    turn = angle.double() * (2 * math.pi / 2**32)
    return (length * turn.cos()).float(), (length * turn.sin()).float()


class ImageNoise:
    """Standard normal noise of images: draw n of image i is a function of (seed, i, n) and the shape.

    It is computed on its device, for a whole batch at once, from a counter that no other image or draw has. So an
    image does not depend on the batch, the rank or the number of images that it is made with, and its noise depends
    on the device only by rounding: see `normals`.

    Args:
        seed: In 0 .. 2^64 - 1.
        indices: Images, (B,), each at least 0.
        shape: Shape of one image, such as (C, H, W).
        device: Device of the noise.

    Raises:
        ValueError: If the seed or an index is out of range.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed={seed} must lie in 0 .. 2^64 - 1")
        if not all(0 <= index < 2**63 for index in indices):
            raise ValueError(f"indices of images must lie in 0 .. 2^63 - 1, not {min(indices)} .. {max(indices)}")
        self.seed = seed
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.drawn = 0
        index = torch.tensor(indices, dtype=torch.int64, device=self.device).reshape(-1, 1)
        self.low, self.high = index & WORD, index >> 32

    def words(self, count: int) -> Words:
        """Returns the random words of the next draw: four tensors, (B, ceil(count / 4)), of words in 0 .. 2^32 - 1."""
        block = torch.arange(-(-count // 4), device=self.device)
        number = torch.full_like(block[:1], self.drawn)
        self.drawn += 1
        return philox((block, number, self.low, self.high), self.seed)

    def draw(self, shape: Sequence[int] | None = None) -> Tensor:
        """Returns the next noise of every image, float32.

        Args:
            shape: Shape for one image where it is not that of the images, as for a latent variable.

        Returns:
            (B, *shape).
        """
        shape = self.shape if shape is None else tuple(shape)
        words = self.words(math.prod(shape))
        noise = torch.stack([*normals(words[0], words[1]), *normals(words[2], words[3])], -1).flatten(1)
        return noise[:, : math.prod(shape)].reshape(-1, *shape)


class NoiseSource(Part):
    """The noise of a process, for training and for sampling.

    It has mean 0, and variance 1 unless a source says otherwise.
    """

    @abstractmethod
    def like(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws training noise in the shape and dtype of x, (B, ...), and on its device.

        Args:
            x: Data that the noise is for.
            generator: Source of randomness; torch's global one by default.
        """

    @abstractmethod
    def images(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> ImageNoise:
        """Returns sampling noise: draw n of image i is a function of (seed, i, n) and the shape.

        Args:
            seed: In 0 .. 2^64 - 1.
            indices: Images, (B,), each at least 0.
            shape: Shape of one image, such as (C, H, W).
            device: Device of the noise.
        """


class Gaussian(NoiseSource):
    """Independent standard normal noise."""

    def like(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)

    def images(
        self, seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> ImageNoise:
        return ImageNoise(seed, indices, shape, device)
