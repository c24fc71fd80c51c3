"""Stores the decoded, cropped and resized images of a recipe in one file, once, for `Prepared` to read."""

import argparse
import json
import math
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from tqdm import tqdm

from diffusion_lit import command
from diffusion_lit.configuration import instantiate
from diffusion_lit.data import CorruptImage, ImageData, InMemoryImages, Split
from diffusion_lit.data.prepared import FORMAT, list_arrays
from diffusion_lit.metrics.files import remove_abandoned, whole_file
from diffusion_lit.parts import Slot
from diffusion_lit.types import StepFn

BATCH_SIZE = 64
STORED = {"image", "label"}


def prepare(data: ImageData, path: Path, on_images: StepFn = lambda done, total: None) -> None:
    """Stores all images of a data module, with their labels, in one file.

    The file is a sequence of .npy arrays, as `numpy.save` writes them one after another: for each split the pixels,
    uint8 (N, C, H, H), and the labels, int64 (N,) or empty; at the end a JSON text. `numpy.load(file, mmap_mode="r")`
    gives the training images. Images that the data module leaves out as unreadable are not in it. Splits with the same
    images, as validation and test mostly are, are stored once.

    Args:
        data: Where the images come from.
        path: The file to write; it appears when it is complete.
        on_images: Called after every batch with the number of images read and of all images.

    Raises:
        FileExistsError: If the file exists.
        OSError: If the disk has no room for the images.
        CorruptImage: If an image cannot be read; where unreadable images are left out, if none can.
        ValueError: If the images come with more than labels, which the file does not store.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it, or choose another file by --out")
    sources = {split: data.fingerprint(split) for split in data.parts()}
    first_with = {source: split for split, source in reversed(sources.items())}
    stored = [split for split in sources if first_with[sources[split]] == split]
    path.parent.mkdir(parents=True, exist_ok=True)
    total = sum(len(data.dataset(split)) for split in stored)
    needed = total * math.prod(data.image_shape)
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"{path} would take {needed:,} bytes, and {free:,} are free; choose another disk by --out")
    with whole_file(path) as file:
        done = 0
        for split in stored:
            for count in store(file, data, split):
                done += count
                on_images(done, total)
        file.flush()
        part = Path(file.name)
        names = [data.dataset(split).class_names for split in stored]
        text = {
            "format": FORMAT,
            "source": f"{type(data.source).__module__}.{type(data.source).__qualname__}",
            "parts": {split: stored.index(first_with[source]) for split, source in sources.items()},
            "fingerprints": [
                InMemoryImages("", torch.from_numpy(pixels.map(part))).fingerprint()
                for pixels in list_arrays(part)[::2]
            ],
            "class_names": [None if n is None else list(n) for n in names],
        }
        np.save(file, np.frombuffer(json.dumps(text).encode(), np.uint8))


def store(file: BinaryIO, data: ImageData, split: Split) -> Iterator[int]:
    """Appends the pixels and the labels of one split; yields the number of images of each batch that was written."""
    start, count = file.tell(), 0
    labels: list[int] = []
    # Images may be left out, so their number is known at the end; the header has the same length for any number.
    write_header(file, len(data.dataset(split)), data.image_shape)
    for batch in data.stored_batches(0, 1, BATCH_SIZE, split):
        if more := batch.keys() - STORED:
            raise ValueError(f"{data.dataset(split).name}: `prepare` cannot store {', '.join(sorted(more))}")
        file.write(batch["image"].numpy().data)
        labels += batch["label"].tolist() if "label" in batch else []
        count += len(batch["image"])
        yield len(batch["image"])
    if count == 0:
        raise CorruptImage(f"{data.dataset(split).name}: no image can be read")
    end = file.tell()
    file.seek(start)
    write_header(file, count, data.image_shape)
    file.seek(end)
    np.save(file, np.array(labels, dtype=np.int64))


def write_header(file: BinaryIO, count: int, image_shape: Sequence[int]) -> None:
    """Writes the .npy header of `count` images."""
    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *image_shape)})


def parse(
    recipes: Iterable[str],
    options: Sequence[str],
    further: Mapping[str, Slot] = MappingProxyType({}),
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Namespace:
    """Builds the data module of recipes as `data`, and further parts.

    Args:
        recipes: Files or names of recipes, of which only these sections are used; later ones win.
        options: Command line options, which win over the recipes.
        further: What other parts there are, by name.
        defaults: Their configurations where nothing else is said.

    Raises:
        FileNotFoundError: If a recipe is missing.
        ValueError: If there is no such part, or an option does not exist.
    """
    files = [word for recipe in recipes for word in ("-c", recipe)]
    words = command.parse(["prepare", *files, *options], ["prepare"])
    slots = {"data": Slot(ImageData, implied=ImageData), **further}
    tree = command.configuration(words, slots, defaults, ignored=None)
    if tree.get("data") is None:
        raise ValueError("there are no data; give a recipe by -c, or a source by --data.source")
    command.require(tree, slots)
    parts = {name: instantiate(tree[name], slot.hint, words.trust, name) for name, slot in slots.items()}
    return Namespace(**parts)


def main(args: Sequence[str]) -> None:
    """Prepares the images of a recipe, and prints how a run uses them.

    Raises:
        ValueError: If the recipe has no data module, or the images cannot be used.
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
    data: ImageData = parse(given.config, options).data
    path = Path(given.out).expanduser()
    remove_abandoned(path)
    data.prepare_data()
    with tqdm(desc="prepare", unit=" images") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        prepare(data, path, show)
    channels, image_size, _ = data.image_shape
    print(
        f"{path}: {path.stat().st_size:,} bytes\n"
        f"use them by --data.source Prepared --data.source.file {path} "
        f"--data.source.image_size {image_size} --data.source.channels {channels}"
    )
