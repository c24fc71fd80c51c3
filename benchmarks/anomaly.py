"""Compares AnoDDPM with two detectors that need no such training, on the same images and by the same scores.

    python -m benchmarks.anomaly runs/anomaly_digits_simplex runs/anomaly_digits_gaussian

The images are those that the first run was trained for; all runs must have the same. Nearest: the squared difference
from the nearest good image. PCA: from the projection onto the principal components of the good images. The score of an
image is then the sum of its map, or its largest value.

Where the data have validation images with defects (DefectDigits), settings are chosen by these: of each detector the
settings with the largest mean of image_AUROC and pixel_AUPRO. The table of test images marks them with a *.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA

from diffusion_lit.checkpoint import last_checkpoint, read_checkpoint
from diffusion_lit.configuration import build
from diffusion_lit.data import DefectImages, ImageData, Source
from diffusion_lit.data.defects import DefectDigits
from diffusion_lit.images import from_uint8
from diffusion_lit.methods.anomaly.scores import Array, Truth, score
from diffusion_lit.records import RESULTS, read_records

COLUMNS = ("image_AUROC", "image_AP", "pixel_AUROC", "pixel_AP", "pixel_AUPRO", "pixel_Dice")
CRITERION = ("image_AUROC", "pixel_AUPRO")
COMPONENTS = (2, 3, 5, 10, 20, 30)


class Row(NamedTuple):
    """Scores of one detector.

    Attributes:
        kind: Detectors of one kind differ by their settings.
        settings: What was chosen.
        values: Scores by name.
        intervals: Intervals of some of them.
    """

    kind: str
    settings: str
    values: Mapping[str, float]
    intervals: Mapping[str, Sequence[float]]


def source_of(run: Path, judged: str | None = None) -> Source:
    """The source of images of a run, with `judged` as its judged images where it has such a choice."""
    config = read_checkpoint(last_checkpoint(run))["config"]["data"]["init_args"]["source"]
    init_args = {name: value for name, value in config["init_args"].items() if name != "judged"}
    if judged is not None:
        init_args["judged"] = judged
    made: Source = build({**config, "init_args": init_args}, Source, source=str(run))  # type: ignore[type-abstract]
    return made


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


def judged_images(data: ImageData) -> DefectImages:
    """The images that `test` judges; raises ValueError if it is not known which are defective."""
    dataset = data.dataset("test")
    if not isinstance(dataset, DefectImages):
        raise ValueError(f"{dataset.name}: it is not known which images are defective")
    return dataset


def baselines(data: ImageData) -> Iterator[Row]:
    """The detectors that are not trained."""
    good, images, dataset = images_of(data, "train"), images_of(data, "test"), judged_images(data)
    masks = torch.cat([dataset.mask(i) for i in range(len(dataset))]).numpy()
    truth = Truth(dataset.defects, masks, dataset.masked.numpy())
    found = {("nearest good image", ""): nearest(good, images)}
    most = min(len(good), good[0].size)
    found |= {("PCA", f"{n} components, "): projected(good, images, n) for n in COMPONENTS if n < most}
    for (kind, settings), reconstruction in found.items():
        maps = np.square(images - reconstruction).mean(1)
        for pooling, scores in (("sum", maps.sum((1, 2))), ("max", maps.max((1, 2)))):
            values, intervals, _ = score(truth, maps, scores, resamples=1000)
            yield Row(kind, settings + pooling, values, intervals)


def results(run: Path, images: str) -> list[Row]:
    """The evaluations of a run on a set of images, by lambda; of equal settings the newest."""
    records = [r for r in read_records(run / RESULTS) if r["what"] == "anomalies" and r["images"][0] == images]
    rows = {}
    for record in sorted(records, key=lambda record: int(record["detector"]["lambda_steps"])):
        detector, sampler = record["detector"], record["sampler"]
        settings = f"lambda {detector['lambda_steps']}, {detector['num_reconstructions']} x {sampler['class']} "
        settings += f"{sampler['steps'] or 'all'}, {detector['pooling']}"
        rows[settings] = Row(record["noise"]["class"], settings, record["scores"], record["intervals"])
    return list(rows.values())


def criterion(row: Row) -> float:
    """What settings are chosen by."""
    return float(np.mean([row.values[name] for name in CRITERION if name in row.values]))


def chosen(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """The best settings of each kind."""
    best = {row.kind: row for row in sorted(rows, key=criterion)}
    return {(row.kind, row.settings) for row in best.values()}


def show(rows: Sequence[Row], marked: set[tuple[str, str]]) -> None:
    """Prints a table."""
    columns = [column for column in COLUMNS if any(column in row.values for row in rows)]
    print(f"| detector | {' | '.join(columns)} |")
    print(f"|{'---|' * (len(columns) + 1)}")
    for row in rows:
        mark = "* " if (row.kind, row.settings) in marked else ""
        cells = [cell(row.values[c], row.intervals.get(c)) if c in row.values else "" for c in columns]
        print(f"| {mark}{row.kind}, {row.settings} | {' | '.join(cells)} |")


def cell(value: float, interval: Sequence[float] | None) -> str:
    """A score with its interval."""
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table for each set of images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args(arguments).runs
    sets = ["validation", "test"] if isinstance(source_of(runs[0]), DefectDigits) else [None]
    marked: set[tuple[str, str]] = set()
    for judged in sets:
        data = ImageData(source_of(runs[0], judged))
        name, good = judged_images(data).name, data.dataset("train").fingerprint()
        for run in runs[1:]:
            if ImageData(source_of(run)).dataset("train").fingerprint() != good:
                raise ValueError(f"{run} was trained on other images than {runs[0]}; compare runs of the same data")
        rows = [*baselines(data), *(row for run in runs for row in results(run, name))]
        if judged == "validation":
            marked = chosen(rows)
        print(f"\n{name}, {len(judged_images(data))} images\n")
        show(rows, marked)


if __name__ == "__main__":
    main()
