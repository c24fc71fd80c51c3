"""Scores super-resolution and inpainting on held-out digits, beside methods that learn nothing, and draws them.

    python -m benchmarks.tasks runs/tasks

The folder has the runs that `make demo-tasks` trains: features, superresolution, inpainting and digits. FID is in the
features of the classifier, which has not seen the held-out images either.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_lit.checkpoint import load_model
from diffusion_lit.data import Area, Digits, Holes, ImageData, LowResolution
from diffusion_lit.diffusion import DDIM
from diffusion_lit.edit import Edited
from diffusion_lit.generator import Generator
from diffusion_lit.images import save_png, tile, to_uint8
from diffusion_lit.methods.feature_network import TrainedFeatures
from diffusion_lit.methods.repaint import Replacement
from diffusion_lit.methods.sdedit import SDEdit
from diffusion_lit.metrics import PSNR, SSIM, Evidence, FeatureDistance, FrechetDistance, Reference, Score
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Condition

SHOWN = 16
"""Images in each row of a picture."""
HELD_OUT = 397
"""Digits that no run is trained on."""


def enlarged(low: Tensor, size: int, how: Image.Resampling) -> Tensor:
    """Small images, (N, 1, h, w) in [-1, 1], enlarged by Pillow, uint8."""
    planes = [Image.fromarray(plane.numpy()).resize((size, size), how) for plane in to_uint8(low)[:, 0]]
    return torch.stack([torch.frombuffer(bytearray(plane.tobytes()), dtype=torch.uint8) for plane in planes]).reshape(
        -1, 1, size, size
    )


class Judge:
    """Scores images against the held-out ones.

    Args:
        features: The classifier.
        targets: What each image is to be, uint8, (N, 1, H, W).
    """

    def __init__(self, features: TrainedFeatures, targets: Tensor) -> None:
        self.features = features
        self.targets = targets
        self.real = features(targets)
        mean, covariance = self.real.double().mean(0), torch.cov(self.real.double().T)
        self.gaussian = Reference(mean, covariance, len(targets), features.name)

    def __call__(self, images: Tensor) -> dict[str, float]:
        condition: Condition = {"image": self.targets.float() / 127.5 - 1}
        columns: dict[str, Tensor] = {}
        scores: list[Score] = [FrechetDistance(), FeatureDistance(), PSNR(), SSIM(sigma=0.5)]
        for score in scores:
            columns |= score.per_image(nn.Identity(), images, condition)
        evidence = Evidence(self.features(images), gaussian=self.gaussian, columns=columns, targets=self.real)
        return {name: value for score in scores for name, value in score(evidence, self.features).items()}


def made(model: Generator, condition: Condition, seed: int = 0) -> Tensor:
    """The model's images, uint8, one for each condition."""
    count = min(map(len, condition.values()))
    return to_uint8(model.sample(range(count), seed, condition=condition))


def table(title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Prints scores."""
    columns = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(f'{values[column]:.4g}' for column in columns)} |")


def draw(rows: Mapping[str, Tensor], path: Path) -> None:
    """Draws one row of each kind of images."""
    save_png(tile(torch.cat([images[:SHOWN] for images in rows.values()]), SHOWN, 48), path)
    print(f"\n{path}, from the top: {', '.join(rows)}")


def main() -> None:
    """Prints tables and writes pictures beside the runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    runs: Path = parser.parse_args().runs
    last = "checkpoints/last.ckpt"
    features = TrainedFeatures(str(runs / "features" / last))
    models = {
        name: load_model(runs / name / last, DiffusionModule) for name in ("superresolution", "inpainting", "digits")
    }
    superresolve(runs, features, models["superresolution"])
    inpaint(runs, features, models["inpainting"], models["digits"])
    redraw(runs, models["digits"])


def held_out() -> tuple[Condition, Tensor, Tensor]:
    """What the held-out examples say, and the images themselves and those of training, uint8."""
    digits = Digits(HELD_OUT)
    data = ImageData(Holes(LowResolution(digits, 2, Area())))
    count = len(data.dataset("test"))
    given: Condition = {**data.examples(range(count), "test")}  # type: ignore[dict-item]
    train = ImageData(digits).some(range(count), "train")["image"]
    return given, to_uint8(given["image"]), train


def superresolve(runs: Path, features: TrainedFeatures, model: DiffusionModule) -> None:
    """Scores 4x4 to 8x8 pixels."""
    given, targets, train = held_out()
    low = given["low_res"]
    rows = {
        "model": made(model, {"low_res": low}),
        "bicubic": enlarged(low, 8, Image.Resampling.BICUBIC),
        "bilinear": enlarged(low, 8, Image.Resampling.BILINEAR),
        "nearest": enlarged(low, 8, Image.Resampling.NEAREST),
    }
    judge = Judge(features, targets)
    scores = {name: judge(images) for name, images in rows.items()}
    scores["as many training images"] = judge(train)
    table("4x4 to 8x8", scores)
    shown = {name: rows[name] for name in ("nearest", "bicubic", "model")}
    draw({**shown, "held-out image": targets}, runs / "superresolution.png")


def inpaint(runs: Path, features: TrainedFeatures, model: DiffusionModule, plain: DiffusionModule) -> None:
    """Scores the filling of holes, by a model trained for it and by one that was not."""
    given, targets, _ = held_out()
    condition = {name: given[name] for name in ("image", "mask")}
    known = given["mask"] > 0.5
    mean = to_uint8(given["image"].mean(0, keepdim=True)).expand_as(targets)
    plain.sampler = DDIM(50, eta=1.0)
    rows = {
        "model": made(model, condition),
        "replacement": made(Edited(plain, Replacement()), condition),
        "replacement, 10 repeats": made(Edited(plain, Replacement(10)), condition),
        "mean of the digits": torch.where(known, targets, mean),
        "black": torch.where(known, targets, torch.zeros_like(targets)),
    }
    for name, images in rows.items():
        wrong = int((images != targets)[known.expand_as(targets)].sum())
        print(f"{name}: {wrong} of {int(known.sum())} known pixels differ")
    judge = Judge(features, targets)
    table("LaMa's masks", {name: judge(images) for name, images in rows.items()})
    shown = {"holes": torch.where(known, targets, torch.full_like(targets, 128)), **rows, "held-out image": targets}
    draw({name: shown[name] for name in shown if name not in ("mean of the digits", "black")}, runs / "inpainting.png")


def redraw(runs: Path, plain: DiffusionModule) -> None:
    """Draws SDEdit from rough pictures: the held-out digits in four patches by four, with two levels."""
    given, *_ = held_out()
    rough = torch.where(given["low_res"] > 0, 1.0, -1.0).repeat_interleave(2, -1).repeat_interleave(2, -2)
    rows = {"rough": to_uint8(rough)}
    for start in (0.2, 0.4, 0.6, 0.8):
        rows[f"from {start}"] = made(Edited(plain, SDEdit(start)), {"image": rough[:SHOWN]})
    draw(rows, runs / "sdedit.png")


if __name__ == "__main__":
    main()
