"""Quality against network evaluations of the models that `make demo-fast` trains on the digits, their speed and memory.

    python -m benchmarks.fast runs/fast

The folder has a run of each model. Prints tables as Markdown, and writes them as fast.json beside a plot, fast.png, and
a picture of samples, samples.png. The Fréchet distance is that of pixels, of as many images as there are digits.
Seconds are processor times of one thread, all kinds in turn in one process; bytes are counted, not measured.
"""

import argparse
import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

from benchmarks.alternate import Work, alternate, compare, machine, spread
from benchmarks.memory import Living
from diffusion_lit.checkpoint import load_model, read_checkpoint
from diffusion_lit.data import Digits, ImageData
from diffusion_lit.diffusion import DDIM, Karras, Sampler, Trailing
from diffusion_lit.generator import Generator
from diffusion_lit.images import save_png, tile, to_uint8
from diffusion_lit.methods.consistency import Multistep
from diffusion_lit.metrics import FeatureMoments, Pixels, frechet_distance
from diffusion_lit.module import DiffusionModule

LAST = "last"
BATCH = 256
TIMED = 64
"""Images that are made at once where seconds are taken."""
SHOWN = 24
BASELINE = "DDIM of the EDM"
STUDENTS = {1: LAST, 2: "step_00000700", 4: "step_00000400"}
"""Checkpoints of progressive distillation by the steps of the student, as progressive_digits.yaml keeps them."""


@dataclass(frozen=True)
class Cell:
    """A model with a sampler.

    Attributes:
        method: Row of the table.
        model: Name of the model.
        sampler: Draws the images; None: the model's own.
        evaluations: Network evaluations for each image.
    """

    method: str
    model: str
    sampler: Sampler | None
    evaluations: int

    @property
    def name(self) -> str:
        return f"{self.method}, {self.evaluations}"


def cells() -> list[Cell]:
    """All that is compared."""
    steps = (1, 2, 4, 10, 50)
    found = [Cell(BASELINE, "edm", DDIM(n, grid=Karras()), n) for n in steps]
    found += [Cell("DDIM, cosine process", "teacher", DDIM(n, grid=Trailing()), n) for n in steps]
    for method, model in (
        ("consistency distillation", "cd"),
        ("easy consistency tuning", "ect"),
        ("consistency training", "ct"),
    ):
        found += [Cell(method, model, Multistep(n), n) for n in (1, 2, 4)]
    students = [Cell("progressive distillation", f"progressive_{n}", DDIM(n, grid=Trailing()), n) for n in STUDENTS]
    return [*found, *students, Cell("denoising diffusion GAN", "ddgan", None, 4)]


def load(runs: Path) -> dict[str, Generator]:
    """The models by name, with their averaged weights."""
    names = {name: (name, LAST) for name in ("edm", "teacher", "cd", "ect", "ct", "ddgan")}
    names |= {f"progressive_{n}": ("progressive", file) for n, file in STUDENTS.items()}
    return {
        name: load_model(runs / run / "checkpoints" / f"{file}.ckpt", Generator)  # type: ignore[type-abstract]
        for name, (run, file) in names.items()
    }  # fmt: skip


class Judge:
    """Scores images against all digits."""

    def __init__(self) -> None:
        data = ImageData(Digits())
        real = data.some(range(len(data.dataset("train"))))
        self.pixels = Pixels()
        self.real = self.moments(real["image"])

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of uint8 images' pixels."""
        moments = FeatureMoments(self.pixels.num_features)
        moments.update(self.pixels(images))
        return moments.mean_and_covariance()

    def __call__(self, images: Tensor) -> float:
        """The Fréchet distance of uint8 images."""
        return frechet_distance(*self.moments(images), *self.real)


def sample(model: Generator, sampler: Sampler | None, count: int) -> Tensor:
    """Images 0 to count - 1, uint8, (count, 1, 8, 8)."""
    parts = torch.arange(count).split(BATCH)
    return torch.cat([to_uint8(model.sample(part.tolist(), sampler=sampler)) for part in parts])


def seconds(found: Sequence[Cell], models: Mapping[str, Generator], rounds: int) -> list[dict[str, float]]:
    """Seconds of `TIMED` images of each cell in each round."""

    def work(cell: Cell) -> None:
        sample(models[cell.model], cell.sampler, TIMED)

    kinds: dict[str, Work] = {cell.name: partial(work, cell) for cell in found}
    return alternate(kinds, rounds, torch.device("cpu"))


def training_bytes(model: DiffusionModule, images: Tensor) -> dict[str, int]:
    """What a training step takes: the network's weights, what is held besides them and their gradients, and the rest.

    Args:
        model: In evaluation mode; it is left in training mode.
        images: A batch in [-1, 1].
    """
    model.train()
    weights = sum(p.nbytes for p in model.parameters())
    with Living([*model.parameters(), images]) as living:
        model.objective.begin(model.denoiser)
        # The first step makes what stays: the average of a target, or a teacher.
        model.losses({"image": images})["loss"].backward()
        gc.collect()
        held = living.peak = living.now
        model.losses({"image": images})["loss"].backward()
    return {"weights": weights, "held": held - weights, "step": living.peak - held}


def memory(runs: Path) -> dict[str, dict[str, int]]:
    """Bytes of training steps of 64 images, by method."""
    images = torch.randn(64, 1, 8, 8).clamp(-1, 1)
    found = {}
    for name, run, decay in (
        ("EDM", "edm", None),
        ("consistency training", "ct", 0.0),
        ("consistency training, averaged target", "ct", 0.95),
        ("consistency distillation: a teacher", "cd", 0.0),
        ("consistency distillation: a teacher and an averaged target", "cd", 0.95),
        ("progressive distillation: a teacher", "progressive", None),
    ):
        path = runs / run / "checkpoints" / f"{LAST}.ckpt"
        model = load_model(path, DiffusionModule)
        objective: Any = model.objective
        if decay is not None:
            objective.decay = decay
        if run == "progressive":
            objective.load_state_dict(read_checkpoint(path)["objective"])
        found[name] = training_bytes(model, images)
    return found


def table(corner: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> None:
    """Prints a Markdown table."""
    print(f"\n| {corner} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(values)} |")


def grid(found: Sequence[Cell], values: Mapping[str, str]) -> dict[str, list[str]]:
    """Rows of values by method and evaluations, for `table`."""
    columns = sorted({cell.evaluations for cell in found})
    rows: dict[str, list[str]] = {cell.method: [""] * len(columns) for cell in found}
    for cell in found:
        rows[cell.method][columns.index(cell.evaluations)] = values[cell.name]
    return rows


def draw(found: Sequence[Cell], scores: Mapping[str, float], path: Path) -> None:
    """Plots the Fréchet distance against network evaluations."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method in dict.fromkeys(cell.method for cell in found):
        row = [cell for cell in found if cell.method == method]
        style = "--" if "DDIM" in method else "-"
        row.sort(key=lambda cell: cell.evaluations)
        points = [(cell.evaluations, scores[cell.name]) for cell in row]
        axes.plot(*zip(*points, strict=True), style, marker="o", label=method)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per image", ylabel="frechet/pixels")
    ticks = sorted({cell.evaluations for cell in found})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def verdict(found: Sequence[Cell], scores: Mapping[str, float]) -> str:
    """Whether something with at most two evaluations is better than DDIM with ten."""
    ten = min(scores[cell.name] for cell in found if "DDIM" in cell.method and cell.evaluations == 10)
    few = (cell for cell in found if cell.evaluations <= 2)
    best = min(few, key=lambda cell: scores[cell.name])
    word = "better" if scores[best.name] < ten else "not better"
    return (
        f"The best with at most 2 evaluations, {best.name}: {scores[best.name]:.4g}, {word} than the best DDIM with "
        f"10: {ten:.4g}"
    )


def main() -> None:
    """Scores, times, counts, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--images", type=int, default=1797)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    runs: Path = options.runs
    torch.set_num_threads(1)
    models, judge, found = load(runs), Judge(), cells()
    about = machine(torch.device("cpu"))
    scores: dict[str, float] = {}
    pictures: dict[str, Tensor] = {}
    for cell in found:
        model = models[cell.model]
        images = sample(model, cell.sampler, options.images)
        pictures[cell.name] = images[:SHOWN]
        scores[cell.name] = judge(images)
    columns = [str(n) for n in sorted({cell.evaluations for cell in found})]
    table("frechet/pixels \\ evaluations", columns, grid(found, {k: f"{v:.4g}" for k, v in scores.items()}))
    print(f"\n{verdict(found, scores)}")

    times = seconds(found, models, options.rounds)
    slow = f"{BASELINE}, 50"
    speed = {cell.name: spread([t[cell.name] / TIMED for t in times]) for cell in found}
    rows = {}
    for name, value in speed.items():
        ratio = compare(times, slow, name)
        faster = f"{ratio['median']:.3g} ({ratio['min']:.3g} to {ratio['max']:.3g})"
        rows[name] = (f"{1000 * value['median']:.3g} ms", f"{1 / value['median']:,.0f}", faster)
    table("method, evaluations", ("an image", "images/s", f"{slow}, takes so many times as long"), rows)
    sizes = memory(runs)
    megabytes = {k: [f"{v[part] / 1e6:.2f}" for part in ("weights", "held", "step")] for k, v in sizes.items()}
    table("MB in a training step of 64 images", ("weights", "held besides", "step's own, at its peak"), megabytes)

    draw(found, scores, runs / "fast.png")
    save_png(tile(torch.cat([*pictures.values()]), SHOWN, 32), runs / "samples.png")
    print(f"\n{runs / 'samples.png'}, from the top: {'; '.join(pictures)}")
    result = {"machine": about, "scores": scores, "seconds per image": speed, "times": times, "bytes": sizes}
    (runs / "fast.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{runs / 'fast.png'}\n{runs / 'fast.json'}\n{', '.join(f'{k} {v}' for k, v in about.items())}")


if __name__ == "__main__":
    main()
