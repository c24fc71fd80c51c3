"""Whether bf16 learns what float32 learns: the digits recipe by several seeds in both.

    python -m benchmarks.precision

Loss curves: at every logged step, bf16 against the range of float32's seeds. Seed by seed, both see the same images,
times and noise, so that their difference is the precision's alone. Then the Fréchet distance of samples that one
float32 model makes in float32 and in bf16, by several seeds of noise, whose spread is the distance's own noise.
--read compares the losses of an earlier run.
"""

import argparse
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.alternate import machine, spread
from benchmarks.setting import quiet
from diffusion_lit import cli
from diffusion_lit.checkpoint import last_checkpoint
from diffusion_lit.loggers import read_curves
from diffusion_lit.records import RESULTS, read_records

PRECISIONS = {"float32": "32-true", "bf16": "bf16-mixed"}
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]
Curve = dict[int, float]
"""Loss by step."""


def train(run: Path, precision: str, seed: int, steps: int, every: int, more: Sequence[str]) -> Curve:
    """Trains the recipe and returns the losses that it logs."""
    settings = {
        "seed_everything": seed,
        "trainer.default_root_dir": run,
        "trainer.precision": precision,
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": every,
        "trainer.logger": "Curves",
        "evaluation.every_n_steps": "null",
        "evaluation.at_start": "false",
        "sample_grid.num_images": 1,
    }
    options = [f"--{name}={value}" for name, value in settings.items()]
    with quiet():
        cli.main(["fit", "-c", "digits", *HERE, *options, *more])
    return dict(read_curves(run)["train/loss"])


def distances(run: Path, seeds: Sequence[int], num_images: int, steps: int) -> dict[str, list[float]]:
    """The Fréchet distance of samples by precision, one per seed of their noise."""
    found: dict[str, list[float]] = {}
    few = [f"--evaluation.num_images={num_images}", "--trainer.limit_test_batches=1"]
    sampler = ["--evaluation.sampler=DDIM", f"--evaluation.sampler.steps={steps}"]
    for name, precision in PRECISIONS.items():
        for seed in seeds:
            with quiet(), redirect_stdout(io.StringIO()):
                cli.main(
                    ["test", "--ckpt_path", str(last_checkpoint(run)), *HERE, *few, *sampler,
                     f"--evaluation.seed={seed}", f"--trainer.precision={precision}"]
                )  # fmt: skip
            scores = read_records(run / RESULTS)[-1]["scores"]
            found.setdefault(name, []).append(next(iter(scores.values())))
    return found


def compare(curves: dict[str, list[Curve]]) -> dict[str, Any]:
    """How bf16's curves lie to float32's.

    A curve that is itself the end of float32's range leaves it by any difference at all. So differences are measured by
    the range: below 1, precision matters less than the seed.

    Returns:
        "same_seed": of one loss / the other with the same seed, the spread; "of_range": of their difference / the range
        of float32's losses at its step; "seeds": of float32's losses / their mean at each step.
    """
    exact, rounded = curves["float32"], curves["bf16"]
    by_step = {step: [curve[step] for curve in exact] for step in exact[0]}
    points = [(seed, step) for seed in range(len(exact)) for step in by_step]
    return {
        "same_seed": spread([rounded[seed][step] / exact[seed][step] for seed, step in points]),
        "of_range": spread(
            [
                abs(rounded[seed][step] - exact[seed][step]) / (max(by_step[step]) - min(by_step[step]))
                for seed, step in points
            ]
        ),
        "seeds": spread([loss * len(losses) / sum(losses) for losses in by_step.values() for loss in losses]),
    }


def read(path: Path) -> tuple[dict[str, Any], dict[str, list[Curve]], dict[str, list[float]]]:
    """The machine, the losses and the distances of an earlier run."""
    found = json.loads(path.read_text())
    curves = {
        name: [{int(step): loss for step, loss in curve.items()} for curve in of_seeds]
        for name, of_seeds in found["curves"].items()
    }
    return found["machine"], curves, found["frechet"]


def main(args: Sequence[str] | None = None) -> None:
    """Trains, samples, prints the comparison and writes it with all losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of training, and of samples")
    parser.add_argument("--steps", type=int, default=300, help="of the optimiser")
    parser.add_argument("--every", type=int, default=20, help="steps whose mean loss is a point of a curve")
    parser.add_argument("--num_images", type=int, default=1797, help="for a Fréchet distance")
    parser.add_argument("--sampling_steps", type=int, default=25, help="of DDIM")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/precision.json"))
    parser.add_argument("--read", type=Path, help="an earlier run's losses, instead of training")
    given, more = parser.parse_known_args(args)
    if given.seeds < 2:
        parser.error(f"--seeds={given.seeds} must be at least 2: one has no range")
    if given.read is not None:
        show(*read(given.read), given.out)
        return
    curves: dict[str, list[Curve]] = {name: [] for name in PRECISIONS}
    with TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for name, precision in PRECISIONS.items():
                run = Path(folder) / f"{name}_{seed}"
                curves[name].append(train(run, precision, seed, given.steps, given.every, more))
        frechet = distances(Path(folder) / "float32_0", range(given.seeds), given.num_images, given.sampling_steps)
    show(machine(torch.device("cpu")), curves, frechet, given.out)


def show(about: dict[str, Any], curves: dict[str, list[Curve]], frechet: dict[str, list[float]], out: Path) -> None:
    """Prints the comparison and writes it."""
    found = compare(curves)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": about, **found, "frechet": frechet, "curves": curves}, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    print("| | median | least to most |\n|---|---|---|")
    rows = {
        "loss in bf16 / in float32, same seed": found["same_seed"],
        "their difference / range of float32's seeds": found["of_range"],
        "loss in float32 / mean of seeds": found["seeds"],
        **{f"Fréchet distance of samples in {name}": spread(values) for name, values in frechet.items()},
    }
    for name, s in rows.items():
        print(f"| {name} | {s['median']:.4g} | {s['min']:.4g} to {s['max']:.4g} |")
    print(f"\nall losses: {out}")


if __name__ == "__main__":
    main()
