"""Scikit-learn's scanned digits: a dataset to try things out with, on any machine and without a download."""

from functools import cache
from typing import Any

import numpy as np
import torch

from diffusion_lit.data.dataset import ImageDataset, InMemoryImages, Split
from diffusion_lit.data.source import Source

NUM_IMAGES = 1797


class Digits(Source):
    """1,797 handwritten digits, 8 x 8, grey, ten classes; part of scikit-learn.

    The 17 grey levels of the scans are spread over 0 to 255. By default each split is the whole set, which is small:
    scores then tell whether the code works, not how well a model generalises. It is not mirrored by default, because a
    mirrored digit is not a digit.

    Args:
        held_out: The last images of the set, which are the validation and the test images and are not trained on; 0:
            each split is the whole set.

    Raises:
        ValueError: If no image is left to train on.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, the UCI test set.
    """

    flips = False
    held_out: int = 0

    def __init__(self, held_out: int = 0) -> None:
        if not 0 <= held_out < NUM_IMAGES:
            raise ValueError(
                f"held_out={held_out} must lie in 0 .. {NUM_IMAGES - 1}, of {NUM_IMAGES} images; set "
                "--data.source.held_out"
            )
        self.held_out = held_out

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def load(self, split: Split) -> ImageDataset:
        digits = _scans()
        first = NUM_IMAGES - self.held_out
        chosen = slice(None) if not self.held_out else slice(first) if split == "train" else slice(first, None)
        images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return InMemoryImages(
            f"Digits {split}",
            torch.from_numpy(images)[:, None],
            torch.from_numpy(digits.target[chosen].astype(np.int64)),
            [str(name) for name in digits.target_names],
        )


@cache
def _scans() -> Any:
    # Imported here because scikit-learn takes half a second to import.
    from sklearn.datasets import load_digits

    return load_digits()
