"""The digits with captions: to try out models of texts on any machine and without a download."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffusion_lit.data.captions import Captions
from diffusion_lit.data.dataset import ImageDataset, InMemoryImages, Split
from diffusion_lit.data.digits import Digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SEEN = (
    *(
        "{n}",
        "a {n}",
        "the digit {n}",
        "a handwritten {n}",
        "the number {n}",
        "an image of a {n}",
        "a picture of a {n}",
    ),
    *(
        "a photo of the digit {n}",
        "this is a {n}",
        "this shows the number {n}",
        "{n}, written by hand",
        "the figure {n}",
    ),
)
"""Wordings of training captions that say the digit."""

SEEN_STROKES = (
    *("a {s} {n}", "{s} {n}", "the digit {n}, {s}", "a {s} handwritten {n}", "a {n} in {s} strokes", "a small {s} {n}"),
    *("the number {n} written with a {s} pen", "a picture of a {s} {n}", "this is a {n}, and it is {s}", "{n}, {s}"),
    *("a drawing of a {n} with {s} lines", "somebody wrote a {s} {n}", "this shows a {n} in {s} lines", "the {s} {n}"),
    *("an image of the number {n}, {s}", "a {s} digit {n}"),
)
"""Wordings of training captions that say the stroke too."""

UNSEEN = (
    *("a picture of the number {n}", "an image of the digit {n}", "a handwritten figure {n}", "this is the digit {n}"),
    *("a small drawing of a {n}", "a photo of a {n}", "this shows a handwritten {n}"),
    "somebody wrote the number {n} by hand",
)
"""Wordings that no training caption has; of their words each occurs in some."""

UNSEEN_STROKES = (
    *("a {s} figure {n}", "an image of a {s} {n}", "the number {n} in {s} strokes", "a photo of a {s} {n}"),
    *("a handwritten {n} with {s} lines", "this shows a {s} {n}"),
)


class CaptionedDigits(Digits):
    """`Digits` with captions that name the digit, by word or numeral, and in some the stroke: bold or thin.

    Of the images of a digit, the third with the most ink is bold and the third with the least is thin. A training image
    has all captions that are true of it, in 28 wordings; captions of the validation and test images, one for each
    image, have other wordings.

    Args:
        held_out: See `Digits`.
        unseen: Whether captions of validation and test images have wordings that training captions never have; false:
            they have those of training.
    """

    def __init__(self, held_out: int = 0, unseen: bool = True) -> None:
        super().__init__(held_out)
        self.unseen = unseen

    def load(self, split: Split) -> ImageDataset:
        images = super().load(split)
        if not isinstance(images, InMemoryImages) or images.labels is None:
            raise TypeError("Digits are in memory and have labels")
        strokes = find_strokes(images.images, images.labels)
        unseen = self.unseen and split != "train"
        texts = [
            wordings(NAMES[label], str(label), stroke, unseen)
            for label, stroke in zip(images.labels.tolist(), strokes, strict=True)
        ]
        if split != "train":
            chosen = np.random.default_rng(0).random(len(texts))
            texts = [[options[int(place * len(options))]] for options, place in zip(texts, chosen, strict=True)]
        images.captions = Captions(texts)
        return images


def find_strokes(images: Tensor, labels: Tensor) -> list[str | None]:
    """Whether each image, uint8 (N, 1, H, W), has much ink for its class, "bold", little, "thin", or neither, None."""
    ink = images.flatten(1).double().mean(1)
    strokes: list[str | None] = [None] * len(ink)
    for label in sorted(set(labels.tolist())):
        low, high = torch.quantile(ink[labels == label], torch.tensor([1 / 3, 2 / 3], dtype=ink.dtype)).tolist()
        for index in (labels == label).nonzero().flatten().tolist():
            strokes[index] = "bold" if ink[index] >= high else "thin" if ink[index] <= low else None
    return strokes


def wordings(name: str, numeral: str, stroke: str | None, unseen: bool = False) -> Sequence[str]:
    """All captions of a digit: by word and by numeral, without and, if there is one, with its stroke."""
    plain, stroked = (UNSEEN, UNSEEN_STROKES) if unseen else (SEEN, SEEN_STROKES)
    templates = [*plain, *(stroked if stroke else ())]
    return [template.format(n=n, s=stroke) for template in templates for n in (name, numeral)]
