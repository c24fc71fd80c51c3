"""Scikit-learn's scanned digits: a dataset to try things out with, on any machine and without a download."""

import numpy as np
import torch

from diffusion_lit.data.dataset import ImageDataset, InMemoryImages, Split
from diffusion_lit.data.source import Source


class Digits(Source):
    """1,797 handwritten digits, 8 x 8, grey, ten classes; part of scikit-learn.

    The 17 grey levels of the scans are spread over 0 to 255. Each split is the whole set: it is too small to be
    divided. Scores on it tell whether the code works, not how well a model generalises. By default it is not mirrored,
    because a mirrored digit is not a digit.

    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits, the UCI test set.
    """

    flips = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 8, 8

    def load(self, split: Split) -> ImageDataset:
        # Imported here because scikit-learn takes half a second to import.
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        return InMemoryImages(
            f"Digits {split}",
            torch.from_numpy(images)[:, None],
            torch.from_numpy(digits.target.astype(np.int64)),
            [str(name) for name in digits.target_names],
        )
