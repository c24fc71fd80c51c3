"""Noise for sampling that depends on (seed, index of the image, number of the draw) alone."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion_lit.diffusion.philox import WORD, philox


def normals(radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, float32, from two random words: the transform of Box and Muller.

    A word is the middle of one of 2^32 intervals of (0, 1), so that no normal exceeds sqrt(2 log 2^33) = 6.77, which a
    true one does once in 10^11. Computed in float64 and then rounded: two devices, whose functions are right to the
    last bit or two of a float64, agree but for about one number in 10^8, there by the last bit of a float32.
    """
    length = ((radius.double() + 0.5) / 2**32).log().mul(-2).sqrt()
    turn = angle.double() * (2 * math.pi / 2**32)
    return (length * turn.cos()).float(), (length * turn.sin()).float()


class ImageNoise:
    """Standard normal noise: draw n of image i is a function of (seed, i, n), and of the shape.

    It is computed where it is wanted, for the whole batch at once, from a counter that no other image or draw has.
    So an image does not depend on the batch, the rank or the number of images that it is made with, and its
    noise not on the device but for rounding: see `normals`.

    Args:
        seed: In 0 .. 2^64 - 1.
        indices: Which images, (B,), each at least 0.
        shape: (C, H, W).
        device: Where the noise is wanted.

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
        self.block = torch.arange(-(-math.prod(self.shape) // 4), device=self.device)

    def draw(self) -> Tensor:
        """The next noise of every image, (B, C, H, W), float32."""
        number = torch.full_like(self.block[:1], self.drawn)
        self.drawn += 1
        words = philox((self.block, number, self.low, self.high), self.seed)
        noise = torch.stack([*normals(words[0], words[1]), *normals(words[2], words[3])], -1).flatten(1)
        return noise[:, : math.prod(self.shape)].reshape(-1, *self.shape)
