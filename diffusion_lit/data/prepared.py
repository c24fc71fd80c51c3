"""Images that were decoded once and lie in one file, mapped into memory."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from diffusion_lit.data.base import ImageData, ImageDataset, Split, at_least
from diffusion_lit.types import Batch

FORMAT = "diffusion_lit prepared images, 1"


class Prepared(ImageData):
    """Images that `python -m diffusion_lit prepare` has stored, already cropped and resized.

    They are read through the page cache, so that sets larger than memory work and processes share what is read.
    Few images need no worker processes; from a cold disk they help.

    Args:
        file: What `prepare` wrote.
        image_size: Height and width, pixels, as prepared.
        channels: 3 for RGB, 1 for grey, as prepared.
        batch_size: Images per optimiser step, over all processes and accumulated micro-batches together.
        num_workers: Processes that read images.
        flip: Whether to mirror training images left to right with probability 1/2.
        seed: Of the order and the mirroring of training images.
        eval_batch_size: Most images per batch and process in validation and test.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        file: str,
        image_size: int,
        channels: int = 3,
        batch_size: int = 128,
        num_workers: int = 0,
        flip: bool = True,
        seed: int = 0,
        eval_batch_size: int = 256,
    ) -> None:
        super().__init__(batch_size, num_workers, flip, seed, "stop", eval_batch_size)
        at_least("image_size", image_size, 1)
        self.file = Path(file).expanduser()
        self.image_size = image_size
        self.channels = channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def load(self, split: Split) -> ImageDataset | None:
        if not self.file.is_file():
            raise FileNotFoundError(
                f"{self.file} is not a file; set --data.init_args.file to what python -m diffusion_lit prepare wrote"
            )
        part = parts_of(self.file).get(split)
        if part is None:
            return None
        images = MappedImages(f"{self.file} ({split})", self.file, part)
        found = (images.channels, images.image_size, images.image_size)
        if found != self.image_shape:
            raise ValueError(
                f"{self.file} holds images of {found}, but {self.image_shape} were asked for; set "
                f"--data.init_args.image_size to {images.image_size} and --data.init_args.channels to {images.channels}"
            )
        return images

    def remedy(self, split: Split) -> str:
        return f": {self.file} was prepared from data without any"


@dataclass(frozen=True)
class Stored:
    """An array inside a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    def map(self, path: Path) -> np.ndarray:
        """Maps it into memory; what is written to it stays in this process."""
        return np.memmap(path, self.dtype, "c", self.offset, self.shape)


@dataclass(frozen=True)
class Part:
    """What one part of the data has in a file: pixels, uint8 (N, C, H, H), and labels, int64 (N,) if there are any."""

    pixels: Stored
    labels: Stored | None
    fingerprint: str


class MappedImages(ImageDataset):
    """One part of a prepared file. Pickled, it is a path: the process that reads maps the file itself.

    Args:
        name: What messages call the set.
        path: The file.
        part: Where in it.
    """

    def __init__(self, name: str, path: Path, part: Part) -> None:
        _, channels, image_size, _ = part.pixels.shape
        super().__init__(name, image_size, channels)
        self.path = path
        self.part = part
        self.labels = None if part.labels is None else torch.from_numpy(np.array(part.labels.map(path)))
        self._pixels: np.ndarray | None = None

    @property
    def pixels(self) -> np.ndarray:
        """uint8, (N, C, H, H), on the disk."""
        if self._pixels is None:
            self._pixels = self.part.pixels.map(self.path)
        return self._pixels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    def __len__(self) -> int:
        return self.part.pixels.shape[0]

    def read(self, index: int) -> tuple[Tensor, int | None]:
        image = torch.from_numpy(np.array(self.pixels[index]))
        return image, None if self.labels is None else int(self.labels[index])

    def batch(self, indices: Sequence[int]) -> Batch:
        chosen = np.array(indices, dtype=np.int64)
        batch: Batch = {"image": torch.from_numpy(np.array(self.pixels[chosen]))}
        if self.labels is not None:
            batch["label"] = self.labels[torch.from_numpy(chosen)]
        return batch

    def fingerprint(self) -> str:
        """SHA-256 over the shape and every pixel, taken when they were stored: that of the same images in memory."""
        return self.part.fingerprint


def parts_of(path: Path) -> dict[Split, Part]:
    """What a prepared file holds, by split.

    Raises:
        ValueError: If this is no whole prepared file.
    """
    try:
        arrays = list_arrays(path)
        with path.open("rb") as file:
            file.seek(arrays[-1].offset)
            said = json.loads(file.read())
        if said["format"] != FORMAT:
            raise ValueError(f"its format is {said['format']!r}, not {FORMAT!r}")
        parts: dict[Split, Part] = {}
        for split, number in said["parts"].items():
            pixels, labels = arrays[2 * number : 2 * number + 2]
            has_labels = labels.shape == pixels.shape[:1]
            parts[split] = Part(pixels, labels if has_labels else None, said["fingerprints"][number])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} holds no prepared images, or not all of them: {error}; "
            "prepare them again by python -m diffusion_lit prepare"
        ) from error
    return parts


def list_arrays(path: Path) -> list[Stored]:
    """The arrays of a file that holds one .npy after another.

    Raises:
        ValueError: If it holds something else, or ends too early.
    """
    size = path.stat().st_size
    arrays: list[Stored] = []
    with path.open("rb") as file:
        while not arrays or file.tell() < size:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
            arrays.append(Stored(file.tell(), shape, dtype.str))
            file.seek(dtype.itemsize * math.prod(shape), 1)
        if file.tell() > size:
            raise ValueError(f"it has {size:,} bytes of {file.tell():,}")
    return arrays
