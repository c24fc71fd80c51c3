"""Any folder of image files."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from diffusion_lit.data.base import (
    CorruptImage,
    CorruptImageWarning,
    ImageData,
    ImageDataset,
    InMemoryImages,
    Split,
    at_least,
)
from diffusion_lit.data.decode import PREPROCESSING, decode

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
IN_MEMORY_BYTES = 2 * 1024**3
"""Sets up to this size are held in memory unless told otherwise."""

_LARGE_FILE = 16 * 1024


class Folder(ImageData):
    """Images found in a folder and everything below it, in the order of their paths.

    Two or more sub-folders that hold all the images are classes, numbered in the order of their names.
    Otherwise, with images at the top, beside sub-folders or not, or with a single sub-folder, there are no
    labels. Hidden files and folders (.name) are passed over. Images are cropped and resized as
    `decode.square` tells.

    Args:
        root: The folder of training images.
        image_size: Height and width, pixels.
        channels: 3 for RGB, 1 for grey.
        val_root: A folder of validation and test images, with the same classes if there are any. None: there
            is no validation.
        in_memory: Whether to decode all images once, when training starts. None: if they fit 2 GiB.
        batch_size: Images per optimiser step, over all processes and accumulated micro-batches together.
        num_workers: Processes that read and decode images that are not held in memory.
        flip: Whether to mirror training images left to right with probability 1/2.
        seed: Of the order and the mirroring of training images.
        on_corrupt: Whether an unreadable image is an error, or is named, counted and left out.
        eval_batch_size: Most images per batch and process in validation and test.
        on_device: Whether the device that trains holds the training images, 8 bits each; where they are held in memory.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        channels: int = 3,
        val_root: str | None = None,
        in_memory: bool | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        flip: bool = True,
        seed: int = 0,
        on_corrupt: Literal["stop", "skip"] = "stop",
        eval_batch_size: int = 256,
        on_device: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, flip, seed, on_corrupt, eval_batch_size, on_device)
        at_least("image_size", image_size, 1)
        if channels not in (1, 3):
            raise ValueError(f"channels={channels} is neither 1 (grey) nor 3 (RGB); set --data.init_args.channels")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.channels = channels
        self.val_root = None if val_root is None else Path(val_root).expanduser()
        self.in_memory = in_memory

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def load(self, split: Split) -> ImageDataset | None:
        root, option = (self.root, "root") if split == "train" else (self.val_root, "val_root")
        if root is None:
            return None
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder; set --data.init_args.{option} to a folder of images")
        files = list(find(root))
        if not files:
            raise FileNotFoundError(
                f"no images in {root} or below: looked for {' '.join(EXTENSIONS)}; "
                f"set --data.init_args.{option} to a folder of images"
            )
        classes = class_names(files)
        if split != "train":
            classes = self._training_classes(root, files, classes)
        images = FolderImages(f"{root} ({split})", root, files, classes, self.image_size, self.channels)
        if classes:
            rank_zero_info(f"{images.name}: {len(classes)} classes, from {classes[0]} to {classes[-1]}")
        bytes_in_memory = len(files) * self.channels * self.image_size**2
        in_memory = bytes_in_memory <= IN_MEMORY_BYTES if self.in_memory is None else self.in_memory
        return decode_all(images, self.on_corrupt == "skip") if in_memory else images

    def remedy(self, split: Split) -> str:
        return "; set --data.init_args.val_root to a folder of them"

    def _training_classes(self, root: Path, files: list[str], classes: list[str]) -> list[str]:
        """Numbers the classes of a validation folder as the training folder numbers them."""
        known = class_names(list(find(self.root)))
        unknown = sorted({file.split("/")[0] for file in files} - set(known))
        if not known:
            return []
        if unknown:
            raise ValueError(
                f"{root} holds {unknown[0]}, which is not one of the {len(known)} classes of {self.root}; "
                "rename it or set --data.init_args.val_root"
            )
        return known


class FolderImages(ImageDataset):
    """Image files, decoded when they are read.

    Args:
        name: What messages call the set.
        root: The folder.
        files: Paths below it, with forward slashes.
        classes: Names of the sub-folders that are classes; empty if there are none.
        image_size: Height and width to crop and resize to, pixels.
        channels: 1 or 3.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        classes: Sequence[str],
        image_size: int,
        channels: int,
    ) -> None:
        super().__init__(name, image_size, channels)
        self.root = root
        # One array: worker processes share it, where reference counts make them copy a list of strings.
        self.files = np.array([os.fsencode(file) for file in files])
        number = {name: i for i, name in enumerate(classes)}
        self.labels = torch.tensor([number[file.split("/")[0]] for file in files]) if classes else None

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Where an image lies."""
        return self.root / os.fsdecode(bytes(self.files[index]))

    def read(self, index: int) -> tuple[Tensor, int | None]:
        path = self.path(index)
        try:
            image = decode(path.read_bytes(), self.image_size, self.channels)
        except (OSError, ValueError) as error:
            raise CorruptImage(f"{path}: {error}", index) from error
        return image, None if self.labels is None else int(self.labels[index])

    def fingerprint(self) -> str:
        """SHA-256 over every file's name, size and time, and the preparation of the images."""
        digest = hashlib.sha256(f"{self.channels} {self.image_size} {PREPROCESSING}".encode())
        for index in range(len(self)):
            status = self.path(index).stat()
            digest.update(b"%s %d %d\0" % (bytes(self.files[index]), status.st_size, status.st_mtime_ns))
        return digest.hexdigest()


def find(root: Path) -> Iterator[str]:
    """Yields the image files below a folder, relative to it, in order; never walks in a circle of links.

    A link that leads nowhere is yielded, to be named as unreadable; a pipe, which would never end, is not.
    """
    seen: set[str] = set()

    def walk(folder: str, prefix: str) -> Iterator[str]:
        if (real := os.path.realpath(folder)) in seen:
            return
        seen.add(real)
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        for entry in visible:
            if entry.is_dir():
                yield from walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink()):
                yield prefix + entry.name

    yield from walk(os.fspath(root), "")


def class_names(files: Sequence[str]) -> list[str]:
    """The sub-folders that are classes: two or more that hold all the files, else none."""
    if any("/" not in file for file in files):
        return []
    names = sorted({file.split("/")[0] for file in files})
    return names if len(names) > 1 else []


def decode_all(images: FolderImages, skip_corrupt: bool) -> InMemoryImages:
    """Decodes a set into memory, in threads where files are large enough to gain by it.

    Args:
        images: The set.
        skip_corrupt: Whether to warn of an unreadable image and leave it out, instead of raising.

    Raises:
        CorruptImage: At the first unreadable image, or if all of them are.
    """
    shape = (len(images), images.channels, images.image_size, images.image_size)
    pixels = torch.empty(shape, dtype=torch.uint8)

    def decode_part(indices: range) -> list[CorruptImage]:
        errors = []
        for index in indices:
            try:
                pixels[index] = images.read(index)[0]
            except CorruptImage as error:
                if not skip_corrupt:
                    raise
                errors.append(error)
        return errors

    parts = [range(first, min(first + 64, len(images))) for first in range(0, len(images), 64)]
    if _has_large_files(images):
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            errors = [error for found in threads.map(decode_part, parts) for error in found]
    else:
        errors = [error for part in parts for error in decode_part(part)]
    if len(errors) == len(images):
        raise CorruptImage(f"none of the {len(images)} images in {images.root} can be read, first {errors[0]}")
    for error in errors:
        warnings.warn(f"left out: {error}", CorruptImageWarning, stacklevel=2)
    keep = torch.ones(len(images), dtype=torch.bool)
    keep[[error.index for error in errors]] = False
    if errors:
        pixels = pixels[keep]
    return InMemoryImages(images.name, pixels, None if images.labels is None else images.labels[keep])


def _has_large_files(images: FolderImages) -> bool:
    """Whether decoding outweighs the interpreter, so that threads help: small files are slower with them."""
    sizes = [0]
    for index in range(0, len(images), max(1, len(images) // 32)):
        with contextlib.suppress(OSError):
            sizes.append(images.path(index).stat().st_size)
    return sum(sizes) / len(sizes) > _LARGE_FILE
