"""Reference statistics of the images of a recipe, for scores here and in other programs.

    python -m diffusion_lit reference -c configs/cifar10.yaml --out cifar10_train.npz

The file contains mu and sigma, as pytorch-fid, clean-fid and OpenAI's evaluator read them, the number of images, the
name of the dataset and the extractor.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

from diffusion_lit.data import ImageData, Split
from diffusion_lit.evaluation.real_images import images_of
from diffusion_lit.files import remove_abandoned
from diffusion_lit.metrics import FeatureExtractor, Inception, Reference, WeightsUnavailable, compute_reference
from diffusion_lit.parts import Slot, path_of
from diffusion_lit.tools.prepare import parse


def statistics(
    data: ImageData, extractor: FeatureExtractor, split: Split, device: torch.device, batch_size: int = 250
) -> Reference:
    """Computes mean and covariance of the features of a split: every image once, not mirrored.

    Raises:
        WrongImageCount: If not every readable image was counted.
        ValueError: If there is no such split, or it has fewer than two images.
        WeightsUnavailable: If the extractor's weights cannot be obtained.
    """
    images = data.dataset(split)
    with tqdm(desc=images.name, total=len(images), unit=" images") as bar:
        batches = images_of(data.stored_batches(0, 1, batch_size, split), bar.update)
        readable = partial(data.num_images, split)
        return compute_reference(batches, extractor, device, expected=readable, name=images.name)


def main(args: Sequence[str]) -> None:
    """Computes the statistics of a recipe's images and writes them to a file.

    Raises:
        ValueError: If the recipe has no data module, or the images cannot be used.
        OSError: If the images are missing, or the file exists already.
        WeightsUnavailable: If the extractor's weights cannot be obtained.
    """
    parser = argparse.ArgumentParser(
        prog="diffusion_lit reference",
        description=(__doc__ or "").splitlines()[0],
        epilog="Further --data options are those of fit; --extractor chooses the features, Inception by default.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", default=[], help="a recipe; later ones win")
    parser.add_argument("--out", required=True, help="the .npz file to write")
    parser.add_argument("--split", default="train", choices=get_args(Split), help="which split")
    parser.add_argument("--batch_size", type=int, default=250, help="images at once")
    parser.add_argument("--device", default=None, help="cuda, cpu, ...; by default a GPU if there is one")
    given, options = parser.parse_known_args(args)
    if given.batch_size < 1:
        raise ValueError(f"--batch_size={given.batch_size} must be at least 1")
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and torch.cuda.device_count() <= (device.index or 0):
        raise ValueError(
            f"--device {given.device}: this machine has {torch.cuda.device_count()} GPUs; use --device cpu"
        )
    path = Path(given.out).expanduser()
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it, or choose another file by --out")
    remove_abandoned(path)
    extractor = {"class_path": path_of(Inception), "init_args": {}}
    parts = parse(given.config, options, {"extractor": Slot(FeatureExtractor)}, {"extractor": extractor})
    parts.data.prepare_data()
    try:
        reference = statistics(parts.data, parts.extractor, given.split, device, given.batch_size)
    except WeightsUnavailable as error:
        raise WeightsUnavailable(str(error).replace("--evaluation.", "--")) from error
    reference.save(path)
    print(
        f"{path}: {reference.count:,} images of {reference.name}, {reference.extractor}\n"
        f"use it by --evaluation.reference {path}"
    )
