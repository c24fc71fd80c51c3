"""Masks: which pixels of an image are known, and which are holes to be filled."""

import math
from abc import abstractmethod
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffusion_lit.data import sixteen_bits
from diffusion_lit.data.decode import DECODING_ERRORS, in_colour, reason_of, upright
from diffusion_lit.data.folder import find
from diffusion_lit.types import Part

White: TypeAlias = Literal["hole", "known"]
"""What is white in files of masks: what is to be filled, or what is known."""

DRAWN_AT = 256
"""Height and width in pixels of the images that lengths of drawn masks are given for."""


class Masks(Part):
    """Gives each image a mask."""

    @abstractmethod
    def __call__(self, index: int, size: int, generator: np.random.Generator) -> Tensor:
        """The mask of one image.

        Args:
            index: Which image.
            size: Its height and width in pixels.
            generator: Of this image, for what is random.

        Returns:
            uint8, (1, size, size): 1 where pixels are known and 0 in holes, of which there is one at least.

        Raises:
            ValueError: If there is no such mask.
        """


class LaMaMasks(Masks):
    """Thick brush strokes or boxes, with equal chance.

    One to five strokes of one to five segments each, of 10 to 209 pixels and 5 to 104 wide, which turn by up to 3
    radians; or one to three boxes with sides of 30 to 150 pixels, 10 from the border. All at 256 pixels, and in
    proportion at other sizes.

    Source: Suvorov et al. 2022 (LaMa), supplement, and its code.
    """

    def __call__(self, index: int, size: int, generator: np.random.Generator) -> Tensor:
        while True:
            canvas = Image.new("L", (size, size), 1)
            draw, scale = ImageDraw.Draw(canvas), size / DRAWN_AT
            (self._strokes if generator.random() < 0.5 else self._boxes)(draw, size, scale, generator)
            mask = torch.from_numpy(np.array(canvas))[None]
            # A stroke can run along the outside of the border.
            if not mask.all():
                return mask

    def _strokes(self, draw: ImageDraw.ImageDraw, size: int, scale: float, generator: np.random.Generator) -> None:
        for number in range(generator.integers(1, 6)):
            x, y = generator.integers(size, size=2).tolist()
            for _ in range(generator.integers(1, 6)):
                angle = 0.01 + generator.integers(4)
                angle = 2 * math.pi - angle if number % 2 == 0 else angle
                length, width = scale * (10 + generator.integers(200)), scale * (5 + generator.integers(100))
                end = [
                    min(max(at + length * turn, 0), size) for at, turn in ((x, math.sin(angle)), (y, math.cos(angle)))
                ]
                draw.line([(x, y), (end[0], end[1])], 0, max(1, round(width)))
                x, y = end

    def _boxes(self, draw: ImageDraw.ImageDraw, size: int, scale: float, generator: np.random.Generator) -> None:
        margin = round(10 * scale)
        least = max(1, round(30 * scale))
        most = max(least, min(round(150 * scale), size - 2 * margin))
        for _ in range(generator.integers(1, 4)):
            width, height = generator.integers(least, most, size=2, endpoint=True).tolist()
            left, top = (
                int(generator.integers(margin, max(size - margin - side, margin), endpoint=True))
                for side in (width, height)
            )
            draw.rectangle([left, top, left + width - 1, top + height - 1], 0)


class CentreHole(Masks):
    """One square hole in the middle, the same in every image.

    Args:
        share: Its side, as a part of the image's.

    Raises:
        ValueError: If that does not lie in (0, 1].
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"masks.share={share} must lie in (0, 1], the hole's side as a part of the image's")
        self.share = share

    def __call__(self, index: int, size: int, generator: np.random.Generator) -> Tensor:
        side = max(1, round(self.share * size))
        start = (size - side) // 2
        mask = torch.ones(1, size, size, dtype=torch.uint8)
        mask[:, start : start + side, start : start + side] = 0
        return mask


class MaskFiles(Masks):
    """Image files; image i has file i modulo their number, in the order of their paths.

    Args:
        folder: Where they are, and in folders below.
        white: What is white in them.
    """

    def __init__(self, folder: str, white: White = "hole") -> None:
        check_white("source.masks.white", white)
        self.folder = folder
        self.white = white
        self._files: list[Path] | None = None

    def __call__(self, index: int, size: int, generator: np.random.Generator) -> Tensor:
        if self._files is None:
            root = Path(self.folder).expanduser()
            self._files = [root / name for name in find(root).images] if root.is_dir() else []
        if not self._files:
            raise ValueError(f"masks.folder={self.folder}: no images there; set --data.source.masks.folder")
        path = self._files[index % len(self._files)]
        mask = read_mask(path, self.white)
        if mask.shape[1:] != (size, size):
            raise ValueError(
                f"mask {path} has {mask.shape[2]} x {mask.shape[1]} pixels, and the images {size} x {size}; resize it"
            )
        return mask


def check_white(option: str, white: str) -> None:
    """Raises ValueError if an option says something else than `White` allows."""
    if white not in ("hole", "known"):
        raise ValueError(f"{option}={white!r} must be 'hole' or 'known': what is white in files of masks")


def read_mask(path: Path, white: White = "hole") -> Tensor:
    """Reads a mask of two colours: white, or any grey from 128 of 255 on, and black.

    It is turned as its file says, as images are; what is transparent is white.

    Args:
        path: An image file.
        white: What is white: "hole" in the programs of latent diffusion, Stable Diffusion and LaMa, "known" in those of
            RePaint.

    Returns:
        uint8, (1, H, W): 1 where pixels are known.

    Raises:
        ValueError: If the file cannot be read or has no hole; the message is one line.
    """
    try:
        source = sixteen_bits.load(path.read_bytes())
        array = np.array(upright(in_colour(source, 1), source))
    except DECODING_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a mask: {reason_of(error)}") from error
    mask = torch.from_numpy(((array >= 128) == (white == "known")).astype(np.uint8))[None]
    if mask.all():
        hole = "white" if white == "hole" else "black"
        raise ValueError(f"mask {path} has no hole: nothing in it is {hole}; {hole} is what is to be filled")
    return mask
