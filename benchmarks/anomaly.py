"""Compares AnoDDPM with two detectors that need no such training, on the same images and by the same scores.

    python -m benchmarks.anomaly runs/anomaly_digits runs/anomaly_digits_gaussian
    python -m benchmarks.anomaly --root data/parts --image_size 64 --channels 3 runs/parts

Nearest: the squared difference from the nearest good image. PCA: from the projection onto the principal components of
the good images. Their score of an image is the sum of its map, the distance, or its largest value.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA

from diffusion_lit.data import DefectImages, ImageData, MVTec
from diffusion_lit.data.defects import DefectDigits
from diffusion_lit.images import from_uint8
from diffusion_lit.methods.anomaly.scores import Array, Truth, score
from diffusion_lit.records import RESULTS, read_records

COLUMNS = ("image_AUROC", "image_AP", "pixel_AUROC", "pixel_AP", "pixel_AUPRO", "pixel_Dice")
COMPONENTS = (5, 10, 20, 30)


def images_of(data: ImageData, split: str) -> Array:
    """All images of a split in [-1, 1], (N, C, H, W)."""
    dataset = data.dataset("train" if split == "train" else "test")
    stored = torch.cat([data.some([i], "train" if split == "train" else "test")["image"] for i in range(len(dataset))])
    return from_uint8(stored).double().numpy()


def nearest(good: Array, images: Array) -> Array:
    """The good image that is nearest to each, (N, C, H, W)."""
    distances = torch.cdist(torch.from_numpy(images).flatten(1), torch.from_numpy(good).flatten(1))
    found: Array = good[distances.argmin(1).numpy()]
    return found


def projected(good: Array, images: Array, components: int) -> Array:
    """Each image projected onto principal components of the good ones, (N, C, H, W)."""
    fitted = PCA(components, random_state=0).fit(good.reshape(len(good), -1))
    flat = images.reshape(len(images), -1)
    result: Array = fitted.inverse_transform(fitted.transform(flat)).reshape(images.shape)
    return result


def baselines(data: ImageData) -> Iterator[tuple[str, Mapping[str, float], Mapping[str, list[float]]]]:
    """Name, scores and intervals of each detector."""
    good, images = images_of(data, "train"), images_of(data, "test")
    dataset = data.dataset("test")
    if not isinstance(dataset, DefectImages):
        raise ValueError(f"{dataset.name}: it is not known which images are defective")
    masks = torch.cat([dataset.mask(i) for i in range(len(dataset))]).numpy()
    truth = Truth(dataset.defects, masks, dataset.masked.numpy())
    found = {"nearest good image": nearest(good, images)}
    found |= {f"PCA, {n} components": projected(good, images, n) for n in COMPONENTS if n < len(good)}
    for name, reconstruction in found.items():
        maps = np.square(images - reconstruction).mean(1)
        for kind, scores in (("sum", maps.sum((1, 2))), ("max", maps.max((1, 2)))):
            values, intervals, _ = score(truth, maps, scores, resamples=1000)
            yield f"{name}, {kind}", values, intervals


def results(run: Path) -> Iterator[tuple[str, Mapping[str, float], Mapping[str, list[float]]]]:
    """Name, scores and intervals of each evaluation of a run, by lambda."""
    records = [record for record in read_records(run / RESULTS) if record["what"] == "anomalies"]
    for record in sorted(records, key=lambda record: record["detector"]["lambda_steps"]):
        name = f"{record['noise']['class']}, lambda {record['detector']['lambda_steps']}"
        name += f", {record['detector']['num_reconstructions']} x {record['sampler']['class']}"
        yield name, record["scores"], record["intervals"]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--root", help="a folder in MVTec AD's layout; the embedded digits by default")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--channels", type=int, default=3)
    args = parser.parse_args()
    source = DefectDigits() if args.root is None else MVTec(args.root, args.image_size, args.channels)
    rows = [*baselines(ImageData(source)), *(row for run in args.runs for row in results(run))]
    columns = [column for column in COLUMNS if any(column in values for _, values, _ in rows)]
    print(f"| detector | {' | '.join(columns)} |")
    print(f"|{'---|' * (len(columns) + 1)}")
    for name, values, intervals in rows:
        cells = [cell(values[column], intervals.get(column)) if column in values else "" for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")


def cell(value: float, interval: list[float] | None) -> str:
    """A score with its interval."""
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


if __name__ == "__main__":
    main()
