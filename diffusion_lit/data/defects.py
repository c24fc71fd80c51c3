"""Scikit-learn's digits as parts of a production, with defects made by rule: for trying out anomaly detection."""

from collections.abc import Callable, Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.data.dataset import Example, ImageDataset, InMemoryImages, Split
from diffusion_lit.data.digits import Digits
from diffusion_lit.data.mvtec import GOOD, DefectImages
from diffusion_lit.data.source import Source

Image = np.ndarray
Defect = Callable[[Image, np.random.Generator], tuple[Image, Image]]
"""Called with an image, uint8 (8, 8); returns it with a defect, and where it differs, bool (8, 8)."""

STRONG = 96
"""Least difference of a grey value that belongs to a defect."""

LEAST = 2
"""Least number of pixels of a defect; one that changes fewer is drawn again."""


def scratch(image: Image, random: np.random.Generator) -> tuple[Image, Image]:
    """A straight line, one pixel wide and four to six long: white over the ground and black over strokes."""
    length, angle = random.integers(4, 7), random.uniform(0, np.pi)
    row, column = random.uniform(2, 5, size=2)
    along = np.linspace(-(length - 1) / 2, (length - 1) / 2, 4 * length)
    rows = np.clip(np.rint(row + along * np.sin(angle)), 0, 7).astype(int)
    columns = np.clip(np.rint(column + along * np.cos(angle)), 0, 7).astype(int)
    damaged = image.copy()
    damaged[rows, columns] = np.where(image[rows, columns] >= 128, 0, 255)
    return damaged, changed(image, damaged)


def spot(image: Image, random: np.random.Generator) -> tuple[Image, Image]:
    """A white square of two by two pixels on the ground."""
    sums = sum(image[r : r + 7, c : c + 7].astype(int) for r in (0, 1) for c in (0, 1))
    row, column = random.permutation(np.argwhere(sums <= np.quantile(sums, 0.2)))[0]
    damaged = image.copy()
    damaged[row : row + 2, column : column + 2] = 255
    return damaged, changed(image, damaged)


def gap(image: Image, random: np.random.Generator) -> tuple[Image, Image]:
    """A missing part of a stroke: three by three pixels around one of its pixels are black."""
    row, column = random.permutation(np.argwhere(image >= 200))[0]
    damaged = image.copy()
    damaged[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 0
    return damaged, changed(image, damaged)


def changed(before: Image, after: Image) -> Image:
    """Where two images differ by `STRONG` or more."""
    different: Image = np.abs(before.astype(int) - after.astype(int)) >= STRONG
    return different


RULES: dict[str, Defect] = {"scratch": scratch, "spot": spot, "gap": gap}
WRONG = "wrong_class"
JUDGED = ("test", "validation")


class DefectDigits(Source):
    """Digits of some classes as good parts, and others with scratches, spots and gaps that are to be found.

    Of the digits of these classes, six tenths are for training, two for validation and two for the test. Of these two a
    quarter is good, and each further quarter has one kind of defect, with an exact mask. Digits of other
    classes, as many as of one defect, are defects without a mask: all of the image is wrong. No image is in two of the
    three sets.

    Args:
        classes: The classes that are good parts; null: all of them, and there is no wrong class.
        judged: Which images `test` judges: the "test" images, or those of the "validation", by which settings are
            chosen.
        seed: Decides which images are for training, and where the defects are.

    Raises:
        ValueError: If there is no class, or one is not in 0 .. 9, or there is no such set.
    """

    flips = False

    def __init__(
        self,
        classes: Sequence[int] | None = None,
        judged: Literal["test", "validation"] = "test",
        seed: int = 0,
    ) -> None:
        if classes is not None and (not classes or not set(classes) <= set(range(10))):
            raise ValueError(f"source.classes={list(classes)} must be some of 0 .. 9; set --data.source.classes")
        if judged not in JUDGED:
            raise ValueError(f"source.judged={judged!r} is neither 'test' nor 'validation'")
        self.classes = classes
        self.judged = judged
        self.seed = seed

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return Digits().image_shape

    def load(self, split: Split) -> ImageDataset | None:
        if split == "val":
            return None
        digits = cast(InMemoryImages, Digits().load("train"))
        labels = cast(Tensor, digits.labels)
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(self.seed))
        wanted = torch.tensor(list(range(10)) if self.classes is None else list(self.classes))
        good = order[torch.isin(labels[order], wanted)]
        others = order[~torch.isin(labels[order], wanted)]
        first, second = len(good) * 6 // 10, len(good) * 8 // 10
        if split == "train":
            return InMemoryImages("good digits (train)", digits.images[good[:first]])
        chosen = good[second:] if self.judged == "test" else good[first:second]
        half = len(others) // 2
        return self._with_defects(digits.images, chosen, others[half:] if self.judged == "test" else others[:half])

    def _with_defects(self, images: Tensor, good: Tensor, others: Tensor) -> "DefectDigitsTest":
        random = np.random.default_rng([self.seed, JUDGED.index(self.judged)])
        names = [GOOD, *RULES]
        defects, tests, masks = [], [], []
        for number, index in enumerate(good.tolist()):
            defect = names[number * len(names) // len(good)]
            image = images[index, 0].numpy()
            mask = np.zeros_like(image, dtype=bool)
            while defect != GOOD and mask.sum() < LEAST:
                image, mask = RULES[defect](images[index, 0].numpy(), random)
            defects.append(defect)
            tests.append(torch.from_numpy(image)[None])
            masks.append(torch.from_numpy(mask)[None])
        for index in others[: len(good) // len(names)].tolist():
            defects.append(WRONG)
            tests.append(images[index])
            masks.append(torch.zeros(1, 8, 8, dtype=torch.bool))
        return DefectDigitsTest(f"digits with defects ({self.judged})", torch.stack(tests), torch.stack(masks), defects)


class DefectDigitsTest(InMemoryImages, DefectImages):
    """Images of `DefectDigits` that are judged.

    Args:
        name: Of the set.
        images: uint8, (N, 1, 8, 8).
        masks: bool, (N, 1, 8, 8).
        defects: Class of each image.
    """

    def __init__(self, name: str, images: Tensor, masks: Tensor, defects: Sequence[str]) -> None:
        super().__init__(name, images)
        self.masks = masks
        self.defects = list(defects)
        self.names = [f"{defect}/{index:03d}" for index, defect in enumerate(defects)]
        self.masked = torch.tensor([defect != WRONG for defect in defects])

    def mask(self, index: int) -> Tensor:
        return self.masks[index]

    def read(self, index: int) -> Example:
        return self.with_truth(index, self.images[index])

    batch = ImageDataset.batch
