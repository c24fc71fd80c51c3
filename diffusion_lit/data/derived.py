"""Sources that add to another source's images what a conditional model is given: low resolution, holes, maps."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.data.dataset import CorruptImage, Example, ImageDataset, Split
from diffusion_lit.data.decode import DECODING_ERRORS, centre, reason_of, upright
from diffusion_lit.data.degradation import Bicubic, Degradation
from diffusion_lit.data.folder import FolderImages
from diffusion_lit.data.masks import LaMaMasks, Masks
from diffusion_lit.data.source import Source, at_least
from diffusion_lit.records import describe
from diffusion_lit.types import Batch

LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "JPEG2000")
"""Formats, as Pillow calls them, that change values, of which maps of classes are made."""

Value = Callable[[int, Tensor, np.random.Generator], Tensor]


class Derived(Source, ABC):
    """Another source with a further entry in each example.

    Args:
        source: Gives the images.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.flips = source.flips
        self.eval_batch_size = source.eval_batch_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.source.image_shape

    @property
    def moments_of(self) -> str | None:  # type: ignore[override]
        return self.source.moments_of

    def prepare(self) -> None:
        self.source.prepare()

    def remedy(self, split: Split) -> str:
        return self.source.remedy(split)

    def load(self, split: Split) -> ImageDataset | None:
        images = self.source.load(split)
        return None if images is None else self.derive(images, split)

    @abstractmethod
    def derive(self, images: ImageDataset, split: Split) -> "DerivedImages":
        """Adds the entry to one split."""


class DerivedImages(ImageDataset):
    """Another dataset with a further entry.

    The entry of image i is a function of i and of the draw that `vary` is given, which is 0 outside of training.

    Args:
        images: The dataset.
        entry: Name of the entry.
        settings: What it depends on besides the images.
        value: Called as value(index, image, generator); returns the entry of one image, uint8 (C, H, W), or raises
            CorruptImage if it cannot be read. Worker processes may pickle it.
    """

    def __init__(self, images: ImageDataset, entry: str, settings: str, value: Value) -> None:
        super().__init__(images.name, images.image_size, images.channels, images.class_names)
        self.images = images
        self.entry = entry
        self.settings = settings
        self.value = value

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.images.fingerprint()} {self.entry} {self.settings}".encode()).hexdigest()

    def read(self, index: int) -> Example:
        example = cast(dict[str, Any], self.images.read(index))
        return cast(Example, example | {self.entry: self.value(index, example["image"], generator_of(index, 0))})

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.images.batch(indices)

    def vary(self, batch: Batch, indices: Sequence[int], draws: Sequence[int]) -> Batch:
        varied = cast(dict[str, Tensor], self.images.vary(batch, indices, draws))
        rows = [
            self.value(index, image, generator_of(index, draw))
            for index, image, draw in zip(indices, varied["image"], draws, strict=True)
        ]
        return cast(Batch, varied | ({self.entry: torch.stack(rows)} if rows else {}))

    def texts(self, at_most: int) -> list[str]:
        return self.images.texts(at_most)

    def preload(self, skip_corrupt: bool) -> "ImageDataset":
        loaded = self.images.preload(skip_corrupt)
        # Images that were left out would move the numbers of those behind them.
        self.images = loaded if len(loaded) == len(self.images) else self.images
        return self


def generator_of(index: int, draw: int) -> np.random.Generator:
    """The randomness of one image in one reading."""
    return np.random.default_rng([index, draw])


class LowResolution(Derived):
    """Adds `low_res`: each image at a lower resolution.

    Args:
        source: Gives the images.
        factor: How many times smaller, a divisor of their height and width.
        degradation: How they become smaller.

    Raises:
        ValueError: If the factor is below 2 or divides no image.

    Source: Saharia et al. 2021 (SR3); Rombach et al. 2022, section 4.4.
    """

    def __init__(self, source: Source, factor: int = 4, degradation: Degradation = Bicubic()) -> None:
        super().__init__(source)
        at_least("source.factor", factor, 2)
        if source.image_shape[1] % factor:
            raise ValueError(
                f"source.factor={factor} does not divide images of {source.image_shape[1]} pixels; set "
                "--data.source.factor"
            )
        self.factor = factor
        self.degradation = degradation

    def derive(self, images: ImageDataset, split: Split) -> DerivedImages:
        return DerivedImages(images, "low_res", f"{self.factor} {describe(self.degradation)}", self._low_res)

    def _low_res(self, index: int, image: Tensor, generator: np.random.Generator) -> Tensor:
        return self.degradation(image, self.factor, generator)


class Holes(Derived):
    """Adds `mask`: 1 where pixels are known and 0 in holes.

    Args:
        source: Gives the images.
        masks: Where the holes are.

    Source: Suvorov et al. 2022 (LaMa); Rombach et al. 2022, section 4.5.
    """

    def __init__(self, source: Source, masks: Masks = LaMaMasks()) -> None:
        super().__init__(source)
        self.masks = masks

    def derive(self, images: ImageDataset, split: Split) -> DerivedImages:
        return DerivedImages(images, "mask", str(describe(self.masks)), self._mask)

    def _mask(self, index: int, image: Tensor, generator: np.random.Generator) -> Tensor:
        return self.masks(index, image.shape[-1], generator)


class WithMaps(Derived):
    """Adds `map`: the class of each pixel, from a folder of PNG files beside the images.

    The map of image a/b.jpg is a/b.png, a palette or grey PNG whose values are classes, of the image's own size. It is
    cropped and resized with its image, by nearest neighbours.

    Args:
        source: Gives the images.
        folder: Folder of the maps of training images.
        num_classes: Number of classes; values are below it.
        val_folder: Folder of the maps of validation and test images, where there are any.

    Raises:
        ValueError: If the number is not positive, or above 256, which 8 bits do not hold.

    Source: Rombach et al. 2022, section 4.3.2.
    """

    def __init__(self, source: Source, folder: str, num_classes: int, val_folder: str | None = None) -> None:
        super().__init__(source)
        at_least("source.num_classes", num_classes, 1)
        if num_classes > 256:
            raise ValueError(f"source.num_classes={num_classes} are more than the 256 that a PNG of 8 bits holds")
        self.folder = folder
        self.num_classes = num_classes
        self.val_folder = val_folder

    def derive(self, images: ImageDataset, split: Split) -> DerivedImages:
        folder, option = (self.folder, "folder") if split == "train" else (self.val_folder, "val_folder")
        if not isinstance(images, FolderImages):
            raise ValueError(f"source: WithMaps needs a Folder of images, not {type(images).__name__}")
        root = None if folder is None else Path(folder).expanduser()
        if root is None or not root.is_dir():
            raise ValueError(f"{option}={folder} is no folder of maps; set --data.source.{option}")
        return MapImages(images, root, self.num_classes)


class MapImages(DerivedImages):
    """See `WithMaps`."""

    def __init__(self, images: FolderImages, folder: Path, num_classes: int) -> None:
        super().__init__(images, "map", f"{num_classes}", self._map)
        self.files = images
        self.folder = folder
        self.num_classes = num_classes

    def path(self, index: int) -> Path:
        """The map of an image."""
        return self.folder / self.files.path(index).relative_to(self.files.root).with_suffix(".png")

    def fingerprint(self) -> str:
        digest = hashlib.sha256(super().fingerprint().encode())
        for index in range(len(self)):
            path = self.path(index)
            status = path.stat() if path.is_file() else None
            digest.update(repr(None if status is None else (status.st_size, status.st_mtime_ns)).encode())
        return digest.hexdigest()

    def _map(self, index: int, image: Tensor, generator: np.random.Generator) -> Tensor:
        try:
            with Image.open(self.files.path(index)) as picture:
                return read_map(self.path(index), self.num_classes, self.image_size, picture)
        except (OSError, ValueError) as error:
            raise CorruptImage(str(error), index) from error


def read_map(
    path: Path, num_classes: int | None = None, image_size: int | None = None, picture: Image.Image | None = None
) -> Tensor:
    """Reads a map of classes.

    Args:
        path: A palette or grey PNG of 8 bits, or another format that keeps values.
        num_classes: Values are below it; None: any.
        image_size: Height and width of the result; None: as the file has it.
        picture: The image, whose size the map must have and whose orientation it is given.

    Returns:
        uint8, (1, H, W).

    Raises:
        ValueError: If the file cannot be read, is none of these, or has another size or other classes.
    """
    try:
        with Image.open(path) as image:
            image.load()
            source: Image.Image = image
            form = image.format
    except DECODING_ERRORS as error:
        raise ValueError(f"{path} cannot be read as a map: {reason_of(error)}") from error
    if form in LOSSY:
        raise ValueError(f"map {path} is a {form} file, in which values change; save the classes as a PNG of 8 bits")
    if source.mode not in ("P", "L", "1"):
        raise ValueError(f"map {path} has mode {source.mode}; save the classes as a palette or grey PNG of 8 bits")
    if picture is not None:
        if source.size != picture.size:
            raise ValueError(
                f"map {path} has {source.width} x {source.height} pixels, and its image {picture.width} x "
                f"{picture.height}"
            )
        source = upright(source, picture)
    if image_size is not None:
        source = centre(source, image_size, Image.Resampling.NEAREST)
    array = np.array(source).astype(np.uint8)
    if num_classes is not None and array.max() >= num_classes:
        raise ValueError(f"map {path} has class {array.max()}, and there are {num_classes}, from 0 on")
    return torch.from_numpy(array)[None]
