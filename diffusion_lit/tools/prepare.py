"""Stores the decoded, cropped and resized images of a recipe in one file, once, for `Prepared` to read."""

import argparse
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from numpy.lib import format as npy
from tqdm import tqdm

from diffusion_lit.data.base import CorruptImage, ImageData, InMemoryImages, Split
from diffusion_lit.data.prepared import FORMAT, list_arrays
from diffusion_lit.records import read_recipe

BATCH_SIZE = 64


def prepare(data: ImageData, path: Path, on_images: Callable[[int], object] = int) -> None:
    """Stores all images of a data module, as it yields them and with their labels, in one file.

    The file is a row of .npy arrays, one after another as `numpy.save` writes them: for each part the pixels, uint8
    (N, C, H, H), and the labels, int64 (N,) or empty; at last a JSON text. `numpy.load(file, mmap_mode="r")` gives the
    training images. Images that the data module leaves out as unreadable are not in it. Parts that are one, as
    validation and test mostly are, are stored once.

    Args:
        data: Where the images come from.
        path: The file to make; it appears when it is whole.
        on_images: Told how many images were stored since it was last told.

    Raises:
        FileExistsError: If there is such a file.
        OSError: If the disk has no room for the images.
        CorruptImage: If an image, or where unreadable ones are left out every image, cannot be read.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it, or choose another file by --out")
    sources = {split: data.fingerprint(split) for split in data.parts()}
    first_with = {source: split for split, source in reversed(sources.items())}
    stored = [split for split in sources if first_with[sources[split]] == split]
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(len(data.dataset(split)) for split in stored) * math.prod(data.image_shape)
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"{path} would take {needed:,} bytes, and {free:,} are free; choose another disk by --out")
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("wb") as file:
            for split in stored:
                store(file, data, split, on_images)
        text = {
            "format": FORMAT,
            "source": f"{type(data).__module__}.{type(data).__qualname__}",
            "parts": {split: stored.index(first_with[source]) for split, source in sources.items()},
            "fingerprints": [
                InMemoryImages("", torch.from_numpy(pixels.map(part))).fingerprint()
                for pixels in list_arrays(part)[::2]
            ],
        }
        with part.open("ab") as file:
            np.save(file, np.frombuffer(json.dumps(text).encode(), np.uint8))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def store(file: BinaryIO, data: ImageData, split: Split, on_images: Callable[[int], object]) -> None:
    """Appends the pixels and the labels of one part."""
    start, count = file.tell(), 0
    labels: list[int] = []
    # Images may be left out: how many there are is known in the end, and the header is as long for any number.
    write_header(file, len(data.dataset(split)), data.image_shape)
    for batch in data.stored_batches(0, 1, BATCH_SIZE, split):
        file.write(batch["image"].numpy().data)
        labels += batch["label"].tolist() if "label" in batch else []
        count += len(batch["image"])
        on_images(len(batch["image"]))
    if count == 0:
        raise CorruptImage(f"{data.dataset(split).name}: no image can be read")
    end = file.tell()
    file.seek(start)
    write_header(file, count, data.image_shape)
    file.seek(end)
    np.save(file, np.array(labels, dtype=np.int64))


def write_header(file: BinaryIO, count: int, image_shape: Sequence[int]) -> None:
    """Writes what stands before the pixels of so many images in a .npy file."""
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *image_shape)})


def parts_of(
    recipes: Iterable[str], options: Sequence[str], further: Callable[[ArgumentParser], object] | None = None
) -> Namespace:
    """The data module of recipes, of which only the section `data` is looked at, as `data`; and further parts.

    Args:
        recipes: YAML files, later ones winning.
        options: Further --data options, which win over all, and those of further parts.
        further: Adds arguments for these to a parser.

    Raises:
        FileNotFoundError: If a recipe is missing.
        ValueError: If there is no such data module, or an option does not exist.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(ImageData, "data", required=True)
    if further is not None:
        further(parser)
    args = []
    for recipe in recipes:
        said = read_recipe(recipe)
        if "data" in said:
            args += ["--config", json.dumps({"data": said["data"]})]
    if not args and not options:
        raise ValueError("there are no data; give a recipe by -c, or a data module by --data")
    try:
        parts: Namespace = parser.instantiate_classes(parser.parse_args([*args, *options]))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    return parts


def main(args: Sequence[str]) -> None:
    """Prepares the images of a recipe, and says how a run uses them.

    Raises:
        ValueError: If the recipe names no data module, or the images cannot be used.
        OSError: If the images are missing, the file exists already, or the disk is full.
    """
    parser = argparse.ArgumentParser(
        prog="diffusion_lit prepare",
        description=(__doc__ or "").splitlines()[0],
        epilog="Further --data options are those of fit.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", default=[], help="a recipe; later ones win")
    parser.add_argument("--out", required=True, help="the file to write")
    given, options = parser.parse_known_args(args)
    data: ImageData = parts_of(given.config, options).data
    path = Path(given.out).expanduser()
    data.prepare_data()
    with tqdm(desc="prepare", unit=" images") as bar:
        prepare(data, path, bar.update)
    channels, image_size, _ = data.image_shape
    print(
        f"{path}: {path.stat().st_size:,} bytes\n"
        f"use them by --data diffusion_lit.data.Prepared --data.init_args.file {path} "
        f"--data.init_args.image_size {image_size} --data.init_args.channels {channels}"
    )
