"""Scikit-learn's scanned digits: a set to try things out with, on any machine and without a download."""

from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits

from diffusion_lit.data.base import ImageData, ImageDataset, InMemoryImages, Split


class Digits(ImageData):
    """1,797 handwritten digits, 8 x 8, grey, ten classes; they come with scikit-learn.

    The scans' 17 grey levels are spread over 0 to 255. Every part is the whole set: it is too small to
    be divided, and figures measured on it say whether the code works, not how well a model generalises.

    Args:
        batch_size: Images per optimiser step, over all processes and accumulated micro-batches together.
        num_workers: Not used: the set is held in memory.
        flip: Whether to mirror training images; off, because a mirrored digit is not a digit.
        seed: Of the order of training images.
        on_corrupt: Not used: nothing is decoded.
        eval_batch_size: Most images per batch and process in validation and test.
        on_device: Whether the device that trains holds the training images, 8 bits each.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, the UCI test set.
    """

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        flip: bool = False,
        seed: int = 0,
        on_corrupt: Literal["stop", "skip"] = "stop",
        eval_batch_size: int = 256,
        on_device: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, flip, seed, on_corrupt, eval_batch_size, on_device)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def load(self, split: Split) -> ImageDataset:
        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return InMemoryImages(
            f"Digits {split}",
            torch.from_numpy(images)[:, None],
            torch.from_numpy(digits.target.astype(np.int64)),
        )
