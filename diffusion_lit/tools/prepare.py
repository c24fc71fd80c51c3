"""Stores the decoded, cropped and resized images of a recipe in one file, once, for `Prepared` to read.

With `--first_stage CHECKPOINT` also what that autoencoder makes of them, so that latent diffusion trains without it.
"""

import argparse
import json
import math
import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from tqdm import tqdm

from diffusion_lit import command
from diffusion_lit.codecs import FirstStage
from diffusion_lit.configuration import instantiate
from diffusion_lit.data import CorruptImage, ImageData, InMemoryImages, Prepared, Split
from diffusion_lit.data.captions import Captions
from diffusion_lit.data.prepared import FORMAT, MOMENTS_FORMAT, list_arrays
from diffusion_lit.files import remove_abandoned, whole_file
from diffusion_lit.images import from_uint8
from diffusion_lit.parts import Slot
from diffusion_lit.types import StepFn

BATCH_SIZE = 64
STORED = {"image", "label", "caption"}
GREATEST = float(np.finfo(np.float16).max)


def prepare(data: ImageData, path: Path, on_images: StepFn = lambda done, total: None) -> None:
    """Stores all images of a data module, with their labels and captions, in one file.

    The file is a sequence of .npy arrays, as `numpy.save` writes them one after another: for each split the pixels,
    uint8 (N, C, H, H), and the labels, int64 (N,) or empty; then the captions, the arrays of `Captions` for each split
    that has some; at the end a JSON text. `numpy.load(file, mmap_mode="r")` gives the training images. Images that the
    data module leaves out as unreadable are not in it. Splits with the same images, as validation and test mostly are,
    are stored once.

    Args:
        data: Where the images come from.
        path: The file to write; it appears when it is complete.
        on_images: Called after every batch with the number of images read and of all images.

    Raises:
        FileExistsError: If the file exists.
        OSError: If the disk has no room for the images.
        CorruptImage: If an image cannot be read; where unreadable images are left out, if none can.
        ValueError: If the images come with more, which the file does not store.
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
        captions = [captions_of(data, split) for split in stored]
        fingerprints = []
        for pixels, texts in zip(list_arrays(part)[::2], captions, strict=True):
            images = InMemoryImages("", torch.from_numpy(pixels.map(part)))
            images.captions = texts
            fingerprints.append(images.fingerprint())
        starts: list[int | None] = []
        number = 2 * len(stored)
        for texts in captions:
            starts.append(None if texts is None else number)
            for array in () if texts is None else texts.arrays:
                np.save(file, array)
                number += 1
        names = [data.dataset(split).class_names for split in stored]
        text = {
            "format": FORMAT,
            "source": f"{type(data.source).__module__}.{type(data.source).__qualname__}",
            "parts": {split: stored.index(first_with[source]) for split, source in sources.items()},
            "fingerprints": fingerprints,
            "captions": starts,
            "class_names": [None if n is None else list(n) for n in names],
        }
        np.save(file, np.frombuffer(json.dumps(text).encode(), np.uint8))


def store(file: BinaryIO, data: ImageData, split: Split) -> Iterator[int]:
    """Appends the pixels and the labels of one split; yields the number of images of each batch that was written."""
    start, count = file.tell(), 0
    labels: list[int] = []
    stored = STORED if data.dataset(split).captions is not None else STORED - {"caption"}
    # Images may be left out, so their number is known at the end; the header has the same length for any number.
    write_header(file, len(data.dataset(split)), data.image_shape)
    for batch in data.stored_batches(0, 1, BATCH_SIZE, split):
        if more := batch.keys() - stored:
            raise ValueError(
                f"{data.dataset(split).name}: `prepare` cannot store {', '.join(sorted(more))}; prepare the images "
                "without them"
            )
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


def captions_of(data: ImageData, split: Split) -> Captions | None:
    """All captions of the images of a split that are stored; call it when all were read."""
    captions = data.dataset(split).captions
    left_out = set(data.corrupt(split))
    if captions is None or not left_out:
        return captions
    return captions.kept(number for number in range(len(captions)) if number not in left_out)


def write_header(file: BinaryIO, count: int, shape: Sequence[int], descr: str = "|u1") -> None:
    """Writes the .npy header of `count` images."""
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count, *shape)})


def prepare_moments(
    data: ImageData, first_stage: FirstStage, path: Path, on_images: StepFn = lambda done, total: None
) -> None:
    """Stores the moments of all prepared images and of their mirror images in one file.

    The file is a sequence of .npy arrays: for each different set of images float16 (N, 2, M, h, w), at the end a JSON
    text with the fingerprints of the first stage and of the images. Encoders do not commute with mirroring, hence both.

    Args:
        data: Images of `Prepared`.
        first_stage: On the device where it is to run.
        path: The file to write; it appears when it is complete.
        on_images: Called after every batch with the number of images done and of all images.

    Raises:
        FileExistsError: If the file exists.
        OSError: If the disk has no room.
        ValueError: If the first stage does not take these images.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it, or choose another file by --moments")
    splits = {data.fingerprint(split): split for split in reversed(data.parts())}
    _, height, width = first_stage.latent_shape(data.image_shape)
    network = first_stage.network
    shape = 2, network.regularizer.channels(network.latent_channels), height, width
    total = sum(len(data.dataset(split)) for split in splits.values())
    needed = 2 * total * math.prod(shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(path.parent).free):
        raise OSError(f"{path} would take {needed:,} bytes, and {free:,} are free; choose another disk by --moments")
    done = 0
    with whole_file(path) as file:
        for split in splits.values():
            write_header(file, len(data.dataset(split)), shape, "<f2")
            for batch in data.stored_batches(0, 1, BATCH_SIZE, split):
                images = from_uint8(batch["image"].to(first_stage.scale.device))
                both = torch.stack([first_stage.moments(x) for x in (images, images.flip(-1))], dim=1)
                file.write(both.clamp(-GREATEST, GREATEST).half().cpu().numpy().data)
                done += len(images)
                on_images(done, total)
        text = {"format": MOMENTS_FORMAT, "first_stage": first_stage.fingerprint, "images": list(splits)}
        np.save(file, np.frombuffer(json.dumps(text).encode(), np.uint8))


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
    tree = command.configuration(words, slots, defaults, command.known_elsewhere())
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
    parser.add_argument("--out", required=True, help="the file to write; with --first_stage it may exist already")
    parser.add_argument("--first_stage", metavar="CHECKPOINT", help="an autoencoder, whose moments are stored too")
    parser.add_argument("--moments", help="the file for these; by default OUT.moments")
    given, options = parser.parse_known_args(args)
    if given.moments is not None and given.first_stage is None:
        raise ValueError(f"moments={given.moments} are those of an autoencoder; give its checkpoint by --first_stage")
    first_stage = None if given.first_stage is None else FirstStage(given.first_stage)
    data: ImageData = parse(given.config, options).data
    path = Path(given.out).expanduser()
    remove_abandoned(path)
    if first_stage is None or not path.exists():
        data.prepare_data()
        with progress("prepare") as show:
            prepare(data, path, show)
    channels, image_size, _ = data.image_shape
    use = (
        f"use them by --data.source Prepared --data.source.file {path} "
        f"--data.source.image_size {image_size} --data.source.channels {channels}"
    )
    print(f"{path}: {path.stat().st_size:,} bytes")
    if first_stage is not None:
        moments = Path(given.moments or f"{given.out}.moments").expanduser()
        remove_abandoned(moments)
        first_stage.to("cuda" if torch.cuda.is_available() else "cpu")
        with progress("moments") as show:
            prepare_moments(ImageData(Prepared(str(path), image_size, channels)), first_stage, moments, show)
        print(f"{moments}: {moments.stat().st_size:,} bytes")
        use += f" --data.source.moments {moments}"
    print(use)


@contextmanager
def progress(name: str) -> Iterator[StepFn]:
    """A bar that shows how many images are done."""
    with tqdm(desc=name, unit=" images") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
