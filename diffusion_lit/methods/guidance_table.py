"""Fidelity against diversity as the guidance scale grows: a table and a plot.

    python -m diffusion_lit.methods.guidance_table CHECKPOINT --scales=0,1,3

For each scale: the Fréchet distance to the training images, how often a judge trained on real images sees the class
asked for, and precision and recall. All of them in the features that the checkpoint's configuration scores with.
Sources: Ho & Salimans 2022, figure 4; Kynkäänniemi et al. 2019 (precision and recall, 3 neighbours).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jsonargparse import ArgumentParser
from sklearn.svm import SVC
from torch import Tensor, nn
from torch_fidelity.metric_prc import calculate_precision_recall_part

from diffusion_lit.callbacks.checkpoints import read_checkpoint, restore, run_of
from diffusion_lit.data.base import ImageData, ImageDataset
from diffusion_lit.generation import Requests
from diffusion_lit.images import to_uint8
from diffusion_lit.metrics import FeatureExtractor, FeatureMoments, as_extractor, frechet_distance
from diffusion_lit.module import DiffusionModule

BATCH = 250


class Row(NamedTuple):
    """What one scale gives."""

    scale: float
    frechet: float
    accuracy: float
    precision: float
    recall: float


def real_features(images: ImageDataset, count: int, extractor: FeatureExtractor) -> tuple[Tensor, Tensor]:
    """Features, (N, D), and labels, (N,), of at most so many images, drawn in an order that is always the same."""
    order = np.random.default_rng(0).permutation(len(images))[:count].tolist()
    batches = [images.batch(order[i : i + BATCH]) for i in range(0, len(order), BATCH)]
    if "label" not in batches[0]:
        raise ValueError(f"{images.name} has no labels to train a judge on; choose a model of data with classes")
    return torch.cat([extractor(b["image"]) for b in batches]), torch.cat([b["label"] for b in batches])


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance."""
    sums = FeatureMoments(features.shape[1])
    sums.update(features)
    return sums.mean_and_covariance()


def generated_features(model: DiffusionModule, requests: Requests, extractor: FeatureExtractor) -> Tensor:
    """Features of generated images, image i of class i modulo the number of classes, (N, D)."""
    features = [
        extractor(to_uint8(model.sample(request["index"].tolist())[:count]).cpu())
        for request, count in requests.of_rank(0, 1)
    ]
    return torch.cat(features)


def table(checkpoint: str, scales: Sequence[float], num_images: int) -> tuple[float, list[Row]]:
    """Samples at every scale, in the checkpoint's own guidance.

    Returns:
        The judge's accuracy on real images that it has not seen, and a row for each scale.

    Raises:
        ValueError: If the model has no guidance, or its data no labels.
    """
    model = restore(checkpoint, DiffusionModule).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if model.guidance is None or not hasattr(model.guidance, "scale") or model.num_classes is None:
        raise ValueError(f"{checkpoint}: the model is not guided; train one with configs/digits_cfg.yaml, say")
    config = read_checkpoint(checkpoint)["config"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    parser.add_argument("--extractor", type=nn.Module)
    parts = {"data": config["data"], "extractor": config["frechet"]["extractor"]}
    made = parser.instantiate_classes(parser.parse_object(parts))
    extractor = as_extractor(made.extractor)
    extractor.prepare()
    real, labels = real_features(made.data.dataset("train"), 10_000, extractor)
    half = len(real) // 2
    judge = SVC().fit(real[:half].numpy(), labels[:half].numpy())
    seen = float(judge.score(real[half:].numpy(), labels[half:].numpy()))
    of_real = moments(real)
    asked = torch.arange(num_images) % model.num_classes
    rows = []
    for scale in scales:
        model.guidance.scale = scale
        features = generated_features(model, Requests(num_images, min(BATCH, num_images)), extractor)
        distance = frechet_distance(*moments(features), *of_real)
        agreement = float(judge.score(features.numpy(), asked.numpy()))
        rows.append(Row(scale, distance, agreement, *calculate_precision_recall_part(features, real)))
    return seen, rows


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws the rows over the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    scales = [row.scale for row in rows]
    for name in ("accuracy", "precision", "recall"):
        axes.plot(scales, [getattr(row, name) for row in rows], marker="o", label=name)
    axes.set(xlabel="guidance scale", ylim=(0, 1.02))
    distance = axes.twinx()
    distance.plot(scales, [row.frechet for row in rows], marker="s", color="black", linestyle="--")
    distance.set_ylabel("Fréchet distance (dashed)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table as Markdown and writes it and the plot beside the run's other pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="of a guided model")
    parser.add_argument("--scales", default="-1,0,0.5,1,2,4", help="of its guidance, between commas")
    parser.add_argument("--num_images", type=int, default=1000, help="generated at each scale")
    given = parser.parse_args(args)
    try:
        scales = [float(scale) for scale in given.scales.split(",")]
        seen, rows = table(given.checkpoint, scales, given.num_images)
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"guidance_table: error: {' '.join(str(error).split())}\n")
        raise SystemExit(2) from None
    lines = [
        f"{given.num_images} images a scale; the judge is right about {seen:.1%} of real images that it has not seen.",
        "",
        "| scale | Fréchet distance | accuracy | precision | recall |",
        "|---|---|---|---|---|",
        *(f"| {r.scale:g} | {r.frechet:.4g} | {r.accuracy:.3f} | {r.precision:.3f} | {r.recall:.3f} |" for r in rows),
    ]
    run_dir = run_of(given.checkpoint)
    (run_dir / "guidance.md").write_text("\n".join(lines) + "\n")
    plot(rows, run_dir / "guidance.png")
    print("\n".join([*lines, "", str(run_dir / "guidance.md"), str(run_dir / "guidance.png")]))


if __name__ == "__main__":
    main()
