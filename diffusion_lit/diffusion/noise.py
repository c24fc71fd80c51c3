"""Noise for sampling that depends on (seed, index of the image) alone."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class ImageNoise:
    """Standard normal noise, one stream per image.

    The stream of image i is seeded by (seed, i) and supplies the noise of every step, so that an image does
    not depend on the batch, the rank or the number of images that it is made with. It is drawn on the CPU, in
    float32, so that it does not depend on the accelerator either.

    Args:
        seed: At least 0.
        indices: Which images, (B,).
        shape: (C, H, W).
        device: Where the noise is wanted.
    """

    def __init__(
        self,
        seed: int,
        indices: Sequence[int],
        shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self.generators = []
        for index in indices:
            state = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
            self.generators.append(torch.Generator().manual_seed(int(state[0]) >> 1))

    def draw(self) -> Tensor:
        """The next noise of every image, (B, C, H, W)."""
        noise = torch.empty(len(self.generators), *self.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self.device, non_blocking=True)
