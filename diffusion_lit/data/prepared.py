"""Images that were decoded once and stored in one file, which is mapped into memory."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from diffusion_lit.data.captions import Captions
from diffusion_lit.data.dataset import Example, ImageDataset, Split
from diffusion_lit.data.source import Source, at_least
from diffusion_lit.types import Batch

FORMAT = "diffusion_lit prepared images, 1"
MOMENTS_FORMAT = "diffusion_lit moments, 1"


class Prepared(Source):
    """Images that `python -m diffusion_lit prepare` has stored, already cropped and resized.

    They are read through the page cache, so that sets larger than memory work and processes share what is read. Worker
    processes help only when the disk's cache is cold. Captions are kept in memory.

    Args:
        file: The file that `prepare` wrote.
        image_size: Height and width in pixels, as prepared.
        channels: 3 for RGB, 1 for grey, as prepared.
        moments: The file that `prepare --first_stage` wrote for these images; null: batches have no moments.
        pixels: Whether batches of training, validation and testing have the images too; null: only where there are no
            moments.
            Pictures and scores always have them.

    Raises:
        ValueError: If a number is out of range, or there are neither pixels nor moments.
    """

    def __init__(
        self, file: str, image_size: int, channels: int = 3, moments: str | None = None, pixels: bool | None = None
    ) -> None:
        at_least("source.image_size", image_size, 1)
        if pixels is False and moments is None:
            raise ValueError("source.pixels=False leaves nothing to train on; give --data.source.moments")
        self.pixels = pixels
        self.file = Path(file).expanduser()
        self.moments = None if moments is None else Path(moments).expanduser()
        self.image_size = image_size
        self.channels = channels

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def load(self, split: Split) -> ImageDataset | None:
        if not self.file.is_file():
            raise FileNotFoundError(
                f"{self.file} is not a file; set --data.source.file to what python -m diffusion_lit prepare wrote"
            )
        part = parts_of(self.file).get(split)
        if part is None:
            return None
        images = MappedImages(f"{self.file} ({split})", self.file, part, self._moments(part))
        found = (images.channels, images.image_size, images.image_size)
        if found != self.image_shape:
            raise ValueError(
                f"{self.file} holds images of {found}, but {self.image_shape} were asked for; set "
                f"--data.source.image_size to {images.image_size} and --data.source.channels to {images.channels}"
            )
        return images

    @property
    def gives_pixels(self) -> bool:  # type: ignore[override]
        return self.moments is None if self.pixels is None else self.pixels

    @property
    def moments_of(self) -> str | None:  # type: ignore[override]
        return None if self.moments is None else moments_in(self.moments).first_stage

    def _moments(self, part: "Part") -> "Moments | None":
        if self.moments is None:
            return None
        file = moments_in(self.moments)
        if part.fingerprint not in file.arrays:
            raise ValueError(
                f"{self.moments} holds moments of other images than {self.file}; prepare them again, or set "
                "--data.source.moments null"
            )
        stored = file.arrays[part.fingerprint]
        if stored.shape[0] != part.pixels.shape[0]:
            raise ValueError(
                f"{self.moments} holds moments of {stored.shape[0]:,} images where {self.file} has "
                f"{part.pixels.shape[0]:,}; prepare them again, or set --data.source.moments null"
            )
        return Moments(self.moments, stored)

    def remedy(self, split: Split) -> str:
        return f": {self.file} was prepared from data without any"


@dataclass(frozen=True)
class Stored:
    """An array inside a file."""

    offset: int
    shape: tuple[int, ...]
    dtype: str

    def map(self, path: Path) -> np.ndarray:
        """Maps the array into memory; changes to it stay in this process."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        return np.memmap(path, self.dtype, "c", self.offset, self.shape)


@dataclass(frozen=True)
class Part:
    """One split in a file.

    Attributes:
        pixels: uint8, (N, C, H, H).
        labels: int64, (N,), if there are classes.
        fingerprint: As `InMemoryImages.fingerprint` of the same images.
        class_names: Name of each class, if they have names.
        captions: The arrays of `Captions`, if there are captions.
    """

    pixels: Stored
    labels: Stored | None
    fingerprint: str
    class_names: list[str] | None
    captions: Sequence[Stored] | None = None


class Moments:
    """Moments of images and of their mirror images; when pickled it is a path.

    Args:
        path: The file.
        stored: float16, (N, 2, M, h, w), in it.
    """

    def __init__(self, path: Path, stored: Stored) -> None:
        self.path = path
        self.stored = stored
        self._values: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_values": None}

    def __getitem__(self, chosen: Any) -> Tensor:
        if self._values is None:
            self._values = self.stored.map(self.path)
        return torch.from_numpy(np.array(self._values[chosen]))


class MappedImages(ImageDataset):
    """One split of a prepared file. When pickled it is a path: each process maps the file itself.

    Args:
        name: Name of the dataset in messages.
        path: The file.
        part: Position of the split in the file.
        moments: What a first stage makes of the images.
    """

    def __init__(self, name: str, path: Path, part: Part, moments: Moments | None = None) -> None:
        _, channels, image_size, _ = part.pixels.shape
        super().__init__(name, image_size, channels, part.class_names)
        self.path = path
        self.part = part
        self.labels = None if part.labels is None else torch.from_numpy(np.array(part.labels.map(path)))
        if self.labels is not None and len(self.labels):
            least, most = int(self.labels.min()), int(self.labels.max())
            if least < 0 or (part.class_names is not None and most >= len(part.class_names)):
                raise ValueError(f"{path} has labels in {least} .. {most}, which are no classes; prepare it again")
        if part.captions is not None:
            try:
                self.captions = Captions.of([np.array(stored.map(path)) for stored in part.captions])
            except ValueError as error:
                raise ValueError(f"{path} cannot be used: {error}; prepare the images again") from error
            if len(self.captions) != len(self):
                raise ValueError(f"{path} has captions of {len(self.captions):,} of {len(self):,} images")
        self.moments = moments
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

    def read(self, index: int) -> Example:
        example: Example = {"image": torch.from_numpy(np.array(self.pixels[index]))}
        if self.labels is not None:
            example["label"] = int(self.labels[index])
        if self.moments is not None:
            example["moments"] = self.moments[index]
        return example

    def batch(self, indices: Sequence[int]) -> Batch:
        chosen = np.array(indices, dtype=np.int64)
        image = torch.from_numpy(np.array(self.pixels[chosen]))
        return cast(Batch, {"image": image, **self.without_pixels(indices)})

    def without_pixels(self, indices: Sequence[int]) -> Batch:
        chosen = np.array(indices, dtype=np.int64)
        batch = cast(Batch, {})
        if self.labels is not None:
            batch["label"] = self.labels[torch.from_numpy(chosen)]
        if self.moments is not None:
            batch["moments"] = self.moments[chosen]
        return batch

    def fingerprint(self) -> str:
        """SHA-256 of the shape, all pixels and the captions, stored with them; equal to that of images in memory."""
        return self.part.fingerprint


def parts_of(path: Path) -> dict[Split, Part]:
    """The splits in a prepared file.

    Raises:
        ValueError: If this is not a complete prepared file.
    """
    try:
        arrays = list_arrays(path)
        with path.open("rb") as file:
            file.seek(arrays[-1].offset)
            content = json.loads(file.read())
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
        fingerprints = content["fingerprints"]
        # Files of version 0.1.0 have no class names.
        names = content.get("class_names", [None] * len(fingerprints))
        captions = content.get("captions", [None] * len(fingerprints))
        parts: dict[Split, Part] = {}
        for split, number in content["parts"].items():
            pixels, labels = arrays[2 * number : 2 * number + 2]
            if pixels.dtype != "|u1" or len(pixels.shape) != 4 or pixels.shape[2] != pixels.shape[3]:
                raise ValueError(f"it has images of {pixels.dtype} with the shape {pixels.shape}")
            has_labels = labels.shape == pixels.shape[:1] and labels.dtype == "<i8"
            start, classes = captions[number], names[number]
            if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
                raise ValueError("its class_names are not texts")
            texts = None if start is None else arrays[start : start + 3]
            parts[split] = Part(pixels, labels if has_labels else None, str(fingerprints[number]), classes, texts)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a complete file of prepared images: {error}; "
            "prepare them again by python -m diffusion_lit prepare"
        ) from error
    return parts


class MomentsFile(NamedTuple):
    """What a file of moments holds.

    Attributes:
        first_stage: Fingerprint of the autoencoder.
        arrays: By the fingerprint of the images; float16, (N, 2, M, h, w), of each image and its mirror image.
    """

    first_stage: str
    arrays: dict[str, Stored]


def moments_in(path: Path) -> MomentsFile:
    """What a file of moments holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete file of moments.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not a file; set --data.source.moments to what python -m diffusion_lit prepare --first_stage "
            "wrote, or to null"
        )
    try:
        arrays = list_arrays(path)
        with path.open("rb") as file:
            file.seek(arrays[-1].offset)
            content = json.loads(file.read())
        if content["format"] != MOMENTS_FORMAT:
            raise ValueError(f"its format is {content['format']!r}, not {MOMENTS_FORMAT!r}")
        if wrong := [a for a in arrays[:-1] if a.dtype != "<f2" or len(a.shape) != 5 or a.shape[1] != 2]:
            raise ValueError(f"it has an array of {wrong[0].dtype} with the shape {wrong[0].shape}")
        return MomentsFile(
            str(content["first_stage"]), dict(zip(map(str, content["images"]), arrays[:-1], strict=True))
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a complete file of moments: {error}; prepare them again by python -m diffusion_lit prepare"
        ) from error


def list_arrays(path: Path) -> list[Stored]:
    """The arrays of a file of .npy arrays, one after another.

    Raises:
        ValueError: If the file contains something else, or was cut short.
    """
    size = path.stat().st_size
    arrays: list[Stored] = []
    with path.open("rb") as file:
        while not arrays or file.tell() < size:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
            if dtype.hasobject or min(shape, default=0) < 0:
                raise ValueError(f"it has an array of {dtype} with the shape {shape}")
            arrays.append(Stored(file.tell(), shape, dtype.str))
            file.seek(dtype.itemsize * math.prod(shape), 1)
        if file.tell() > size:
            raise ValueError(f"it has {size:,} bytes of {file.tell():,}")
    return arrays
