"""Any folder of image files."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from tqdm import tqdm

from diffusion_lit.data.caption_forms import CaptionForm
from diffusion_lit.data.dataset import (
    CorruptImage,
    CorruptImageWarning,
    Example,
    ImageDataset,
    InMemoryImages,
    NoImage,
    Split,
)
from diffusion_lit.data.decode import EXTENSIONS, PREPROCESSING, decode, spread, warn_of_small_images
from diffusion_lit.data.source import Resized

IN_MEMORY_BYTES = 2 * 1024**3
"""Datasets up to this size are held in memory by default."""

_LARGE_FILE = 16 * 1024


class Folder(Resized):
    """Image files in a folder and in all folders below it, in the order of their paths.

    Two or more sub-folders that contain all the images are classes, labelled in the order of their names. A folder with
    images at the top, or with a single sub-folder, has no classes. Images beside two or more sub-folders are refused
    unless `labels` is false, because one stray image would otherwise make the whole set unlabelled. Hidden files and
    folders (.name) are ignored. Images are cropped and resized as by `decode.square`.

    Args:
        root: Folder of training images.
        image_size: Height and width in pixels.
        channels: 3 for RGB, 1 for grey.
        val_root: Folder of validation and test images, with the same classes if there are any. None: there is no
            validation, or that of `val_fraction`.
        val_fraction: Instead of `val_root`, the share of the images in `root` that are kept for validation and test and
            not trained on, in [0, 1). Which ones depends on their names alone.
        labels: Whether sub-folders are classes. None: as described above.
        in_memory: Whether to decode all images once, when training starts. None: if they fit 2 GiB.
        captions: The form in which the images have captions: `TextFiles`, `Metadata` or `COCOCaptions`; None: they have
            none.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        root: str,
        image_size: int,
        channels: int = 3,
        val_root: str | None = None,
        val_fraction: float = 0.0,
        labels: bool | None = None,
        in_memory: bool | None = None,
        captions: CaptionForm | None = None,
    ) -> None:
        super().__init__(image_size, channels)
        self.root = Path(root).expanduser()
        self.val_root = None if val_root is None else Path(val_root).expanduser()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction={val_fraction} must lie in [0, 1); set --data.source.val_fraction")
        if val_fraction and val_root is not None:
            raise ValueError(
                f"val_root={val_root} and val_fraction={val_fraction} exclude each other; set "
                "--data.source.val_fraction 0"
            )
        self.val_fraction = val_fraction
        self.labels = labels
        self.in_memory = in_memory
        self.captions = captions
        self._training_classes: list[str] | None = None

    def load(self, split: Split) -> ImageDataset | None:
        root, option = (self.root, "root") if split == "train" or self.val_fraction else (self.val_root, "val_root")
        if root is None:
            return None
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder; set --data.source.{option} to a folder of images")
        files, others = find(root)
        if not files:
            raise FileNotFoundError(
                f"no images in {root} or below, of {len(others)} files; images are {' '.join(EXTENSIONS)}; "
                f"set --data.source.{option} to a folder of images"
            )
        name = f"{root} ({split})"
        classes = self._classes(split, root, files)
        if classes:
            rank_zero_info(f"{name}: {len(classes)} classes, from {classes[0]} to {classes[-1]}")
        if others and self.captions is None:
            rank_zero_info(
                f"{name}: ignored {len(others):,} files that are not images by their names: {several(others)}"
            )
        if self.val_fraction:
            files = part_of(files, self.val_fraction, split != "train", root)
        images = FolderImages(name, root, files, classes, self.image_size, self.channels, self.in_memory)
        if self.captions is not None:
            images.captions = self.captions.captions(root, files, split)
        return images

    def remedy(self, split: Split) -> str:
        return "; set --data.source.val_root to a folder of images, or --data.source.val_fraction 0.05"

    def _classes(self, split: Split, root: Path, files: list[str]) -> list[str]:
        """Names of the classes of a folder, which are always those of the training folder."""
        if self._training_classes is None:
            training = files if split == "train" else find(self.root).images
            self._training_classes = class_folders(self.root, training, self.labels)
        known = self._training_classes
        unknown = sorted({file.split("/")[0] for file in files} - set(known)) if known else []
        if unknown:
            raise ValueError(
                f"{root} contains {unknown[0]}, which is not one of the {len(known)} classes of {self.root}; "
                "move or rename it, or set --data.source.val_root"
            )
        return known


class FolderImages(ImageDataset):
    """Image files, decoded when they are read.

    Args:
        name: Name of the dataset in messages.
        root: The folder.
        files: Paths below it, with forward slashes.
        classes: Names of the sub-folders that are classes; empty if there are none.
        image_size: Height and width to crop and resize to, in pixels.
        channels: 1 or 3.
        in_memory: Whether `preload` decodes all of them. None: if they fit 2 GiB.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: Sequence[str],
        classes: Sequence[str],
        image_size: int,
        channels: int,
        in_memory: bool | None = False,
    ) -> None:
        super().__init__(name, image_size, channels, list(classes) or None)
        self.root = root
        # One array: worker processes share it, where reference counts make them copy a list of strings.
        self.files = np.array([os.fsencode(file) for file in files])
        number = {name: i for i, name in enumerate(classes)}
        self.labels = torch.tensor([number[file.split("/")[0]] for file in files]) if classes else None
        fits = len(files) * channels * image_size**2 <= IN_MEMORY_BYTES
        self.in_memory = fits if in_memory is None else in_memory

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """Path of an image."""
        return self.root / os.fsdecode(bytes(self.files[index]))

    def read(self, index: int) -> Example:
        path = self.path(index)
        try:
            example: Example = {"image": decode(path.read_bytes(), self.image_size, self.channels)}
        except (OSError, ValueError) as error:
            raise CorruptImage(f"{path}: {error}", index) from error
        if self.labels is not None:
            example["label"] = int(self.labels[index])
        return example

    def preload(self, skip_corrupt: bool) -> ImageDataset:
        indices = range(len(self)) if self.in_memory else spread(len(self))
        warn_of_small_images(self.name, self.image_size, len(self), indices, self.path)
        return decode_all(self, skip_corrupt) if self.in_memory else self

    def fingerprint(self) -> str:
        """SHA-256 of every file's name, size and time, of the preprocessing, and of the captions if there are any."""
        digest = hashlib.sha256(f"{self.channels} {self.image_size} {PREPROCESSING}".encode())
        for index in range(len(self)):
            status = self.path(index).stat()
            digest.update(b"%s %d %d\0" % (bytes(self.files[index]), status.st_size, status.st_mtime_ns))
        if self.captions is not None:
            digest.update(self.captions.fingerprint().encode())
        return digest.hexdigest()


def part_of(files: Sequence[str], fraction: float, held_out: bool, root: Path) -> list[str]:
    """The files that are held out for validation, or all others, in their order.

    The share of the files whose names have the smallest hashes is held out, so that few of them change sides when
    files are added.

    Raises:
        ValueError: If one side has none.
    """
    count = round(fraction * len(files))
    if not 0 < count < len(files):
        raise ValueError(
            f"{root} has {len(files)} images, of which val_fraction={fraction} leaves {count} for validation and "
            f"{len(files) - count} for training; set --data.source.val_fraction to another, or 0"
        )
    by_hash = sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file)).digest())
    chosen = set(by_hash[:count] if held_out else by_hash[count:])
    return [file for file in files if file in chosen]


class Found(NamedTuple):
    """Files below a folder: paths relative to it, in order.

    Attributes:
        images: Those with the extension of an image format.
        others: All others.
    """

    images: list[str]
    others: list[str]


def find(root: Path) -> Found:
    """Lists the files below a folder; follows links, but never in a circle.

    A link that leads nowhere counts as an image, so that it is named as unreadable; a pipe, which would never end, does
    not.
    """
    seen: set[str] = set()
    found = Found([], [])

    def walk(folder: str, prefix: str) -> None:
        if (real := os.path.realpath(folder)) in seen:
            return
        seen.add(real)
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
        for entry in visible:
            if entry.is_dir():
                walk(entry.path, f"{prefix}{entry.name}/")
            else:
                is_image = entry.name.lower().endswith(EXTENSIONS) and (entry.is_file() or entry.is_symlink())
                (found.images if is_image else found.others).append(prefix + entry.name)

    walk(os.fspath(root), "")
    return found


def class_folders(root: Path, files: Sequence[str], labels: bool | None = None) -> list[str]:
    """Names of the sub-folders that are classes; none if there are no classes.

    Args:
        root: The folder.
        files: Images below it.
        labels: Whether sub-folders are classes; None: if there are two or more and they contain all the images.

    Raises:
        ValueError: If there are images beside the sub-folders, so that they would have no class.
    """
    if labels is False:
        return []
    names = sorted({file.split("/")[0] for file in files if "/" in file})
    if labels is None and len(names) < 2:
        return []
    outside = [file for file in files if "/" not in file]
    if outside:
        raise ValueError(
            f"{root} has {len(names)} folders of images, which are classes, and {len(outside)} images beside them: "
            f"{several(outside)}; move these, or set --data.source.labels false to train without classes"
        )
    return names


def several(files: Sequence[str], count: int = 3) -> str:
    """The first names, of different extensions where possible: "notes.txt, clip.mov, ..."."""
    first = {os.path.splitext(file)[1].lower(): file for file in reversed(files)}
    shown = [*list(first.values())[::-1], *(file for file in files if file not in first.values())][:count]
    shown = [file.encode(errors="backslashreplace").decode() for file in shown]
    return ", ".join(shown + ["..."] * (len(files) > count))


def decode_all(images: FolderImages, skip_corrupt: bool) -> InMemoryImages:
    """Decodes a dataset into memory, in threads if the files are large enough to gain by it.

    Args:
        images: The dataset.
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
                pixels[index] = images.read(index)["image"]
            except CorruptImage as error:
                if not skip_corrupt:
                    raise
                errors.append(error)
        return errors

    parts = [range(first, min(first + 64, len(images))) for first in range(0, len(images), 64)]
    errors: list[CorruptImage] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads, _progress(images) as bar:
        apply = threads.map if _has_large_files(images) else map
        for part, found in zip(parts, apply(decode_part, parts), strict=True):
            errors += found
            bar.update(len(part))
    if len(errors) == len(images):
        raise NoImage(f"none of the {len(images)} images in {images.root} can be read, first {errors[0]}")
    for error in errors:
        warnings.warn(f"left out: {error}", CorruptImageWarning, stacklevel=2)
    keep = torch.ones(len(images), dtype=torch.bool)
    keep[[error.index for error in errors]] = False
    if errors:
        pixels = pixels[keep]
    labels = None if images.labels is None else images.labels[keep]
    decoded = InMemoryImages(images.name, pixels, labels, images.class_names)
    decoded.names = [os.fsdecode(bytes(file)) for file in images.files[keep.numpy()]]
    if images.captions is not None:
        decoded.captions = images.captions.kept(keep.nonzero().flatten().tolist()) if errors else images.captions
    return decoded


def _progress(images: FolderImages) -> tqdm:
    """A progress bar, shown after two seconds by the first process if it has a terminal."""
    hidden = None if getattr(rank_zero_only, "rank", 0) == 0 else True
    name = f"decoding {images.name}"
    return tqdm(desc=name, total=len(images), unit=" images", delay=2, leave=False, disable=hidden)


def _has_large_files(images: FolderImages) -> bool:
    """Whether decoding takes longer than the interpreter does, so that threads help: they slow small files down."""
    sizes = [0]
    for index in range(0, len(images), max(1, len(images) // 32)):
        with contextlib.suppress(OSError):
            sizes.append(images.path(index).stat().st_size)
    return sum(sizes) / len(sizes) > _LARGE_FILE
