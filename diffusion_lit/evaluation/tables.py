"""The tables there are: DDIM's, every sampler, averages of the weights, training steps, guidance scales."""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from pathlib import Path
from typing import Any, Literal

from diffusion_lit.checkpoint import FOLDER, RAW, read_checkpoint, run_of, snapshots
from diffusion_lit.diffusion import (
    DDIM,
    Ancestral,
    DPMSolver,
    FixedLarge,
    FixedSmall,
    Grid,
    Heun,
    Linear,
    Quadratic,
    Sampler,
)
from diffusion_lit.evaluation.table import Cell, Filled, Line, Table, changed, draw_rows
from diffusion_lit.generator import Generator
from diffusion_lit.records import describe

SIGMA_HAT = "sigma-hat"
PUBLISHED: dict[str, dict[str, dict[int, float]]] = {
    "cifar10": {
        "0": {10: 13.36, 20: 6.84, 50: 4.67, 100: 4.16, 1000: 4.04},
        "0.2": {10: 14.04, 20: 7.11, 50: 4.77, 100: 4.25, 1000: 4.09},
        "0.5": {10: 16.66, 20: 8.35, 50: 5.25, 100: 4.46, 1000: 4.29},
        "1": {10: 41.07, 20: 18.36, 50: 8.01, 100: 5.78, 1000: 4.73},
        SIGMA_HAT: {10: 367.43, 20: 133.37, 50: 32.72, 100: 9.99, 1000: 3.17},
    },
    "celeba64": {
        "0": {10: 17.33, 20: 13.73, 50: 9.17, 100: 6.53, 1000: 3.51},
        "0.2": {10: 17.66, 20: 14.11, 50: 9.51, 100: 6.79, 1000: 3.64},
        "0.5": {10: 19.86, 20: 16.06, 50: 11.01, 100: 8.09, 1000: 4.28},
        "1": {10: 33.12, 20: 26.03, 50: 18.48, 100: 13.93, 1000: 5.98},
        SIGMA_HAT: {10: 299.71, 20: 183.83, 50: 71.71, 100: 45.20, 1000: 3.26},
    },
}
"""FID over 50,000 images. Source: Song et al. 2021 (DDIM), table 1."""
NETWORKS = {"cifar10": 35_746_307, "celeba64": 78_700_803}
"""Numbers of weights of the networks of this table."""
DATA = {"cifar10": r"cifar10(?!\d)", "celeba64": r"celeba(?!_?(hq|mask|v))"}
"""Patterns of the names of their data, in small letters and without hyphens: neither CIFAR-100 nor CelebA-HQ."""


def shortest(number: float) -> str:
    """A number in a few digits, from which it can be read again exactly."""
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


class DDIMTable(Table):
    """Number of steps by eta, and DDPM's larger variance as the last row.

    Args:
        steps: Columns.
        etas: Rows, in [0, 1].
        sigma_hat: Whether there is the row of ancestral sampling with the larger variance.
        grid: Which times; the paper's is quadratic for CIFAR-10, uniform for CelebA.
        clip: Whether predicted images are clipped; the paper's are not.
        published: Whose published values stand beside, "cifar10" or "celeba64", where data, features, process and
            network are the paper's; null: none.

    Raises:
        ValueError: If there are no steps or no rows, or an eta lies outside [0, 1].

    Source: Song et al. 2021 (DDIM), table 1.
    """

    name = "ddim"
    corner = "eta \\ steps"

    def __init__(
        self,
        steps: Sequence[int] = (10, 20, 50, 100, 1000),
        etas: Sequence[float] = (0.0, 0.2, 0.5, 1.0),
        sigma_hat: bool = True,
        grid: Grid = Quadratic(),
        clip: bool = False,
        published: Literal["cifar10", "celeba64"] | None = "cifar10",
    ) -> None:
        if not steps or not (etas or sigma_hat):
            raise ValueError(f"table: steps={list(steps)} and etas={list(etas)} make no table; give at least one each")
        self.steps = list(steps)
        self.etas = list(etas)
        self.sigma_hat = sigma_hat
        self.grid = grid
        self.clip = clip
        self.published = published
        self.cells(Path())

    def cells(self, checkpoint: Path) -> list[Cell]:
        rows = [(shortest(eta), eta) for eta in self.etas] + ([(SIGMA_HAT, None)] if self.sigma_hat else [])
        published = {} if self.published is None else PUBLISHED[self.published]
        return [
            Cell(row, str(steps), self._sampler(steps, eta), published=published.get(row, {}).get(steps))
            for row, eta in rows
            for steps in self.steps
        ]

    def _sampler(self, steps: int, eta: float | None) -> Sampler:
        if eta is None:
            return Ancestral(steps, FixedLarge(), self.grid, self.clip)
        return DDIM(steps, eta, self.grid, self.clip)

    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        names = {row: row if row == SIGMA_HAT else f"eta {row}" for row in (cell.row for cell, _ in filled)}
        draw_rows(figure, filled, score, names)

    def caption(self) -> str:
        return f"{type(self.grid).__name__} grid, predictions {'' if self.clip else 'not '}clipped."

    @property
    def source(self) -> str:  # type: ignore[override]
        return f"In brackets the FID that Song et al. 2021 published for {self.published} (50,000 images)."

    def compares(self, generator: Generator, record: Mapping[str, Any]) -> bool:
        """Whether the data are CIFAR-10 or CelebA, the features Inception's, and process and network the paper's."""
        names = [str(reference["name"]).lower().replace("-", "") for reference in record["references"]]
        process, denoiser = record.get("process") or {}, getattr(generator, "denoiser", None)
        return (
            self.published is not None
            and any(re.search(DATA[self.published], name) for name in names)
            and "fid" in record["scores"]
            and (process.get("num_steps"), process.get("schedule")) == (1000, describe(Linear()))
            and denoiser is not None
            and sum(p.numel() for p in denoiser.parameters()) == NETWORKS[self.published]
        )


class SamplerTable(Table):
    """Every sampler by the number of network evaluations that it may take.

    Args:
        evaluations: Columns: network evaluations per image at most. Heun's method takes an odd number, hence one less
            where that is even.
        samplers: Rows, by name; their own `steps` do not count. null: all there are, with their usual grids.
        clip: Whether these clip predictions, as they usually do; false for latent diffusion.

    Raises:
        ValueError: If there are no columns or no rows, or a number is below 1.
    """

    name = "samplers"
    corner = "sampler \\ evaluations"
    columns = "evaluations"

    def __init__(
        self,
        evaluations: Sequence[int] = (5, 10, 15, 20, 50, 100),
        samplers: dict[str, Sampler] | None = None,
        clip: bool = True,
    ) -> None:
        self.evaluations = list(evaluations)
        self.samplers = every_sampler(clip) if samplers is None else samplers
        if not self.evaluations or not self.samplers or min(self.evaluations) < 1:
            raise ValueError(
                f"table: evaluations={self.evaluations} of {len(self.samplers)} samplers make no table; "
                "give at least one of each, from 1 on"
            )

    def cells(self, checkpoint: Path) -> list[Cell]:
        return [
            Cell(name, str(count), with_steps(sampler, count))
            for name, sampler in self.samplers.items()
            for count in self.evaluations
        ]

    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        draw_rows(figure, filled, score, {name: name for name in self.samplers})

    def caption(self) -> str:
        return "Columns are network evaluations per image, at most."


def every_sampler(clip: bool = True) -> dict[str, Sampler]:
    """The samplers that there are, by name, with their usual clipping or without any."""
    samplers: dict[str, Sampler] = {
        "Ancestral, larger variance": Ancestral(variance=FixedLarge()),
        "Ancestral, smaller variance": Ancestral(variance=FixedSmall()),
        "DDIM": DDIM(),
        "DPM-Solver++ 1": DPMSolver(order=1),
        "DPM-Solver++ 2M": DPMSolver(order=2),
        "DPM-Solver++ 3M": DPMSolver(order=3),
        "Heun": Heun(),
    }
    for sampler in samplers.values():
        sampler.clip = sampler.clip and clip
    return samplers


def with_steps(sampler: Sampler, steps: int) -> Sampler:
    """The same sampler with another number of steps."""
    other = copy(sampler)
    other.steps = steps
    return other


class AverageTable(Line):
    """Every average of the weights that a checkpoint holds, and the raw weights.

    Args:
        weights: Which ones, "raw" or decays; null: all.
    """

    name = "averages"
    corner = "weights"
    axis = "1 - decay, or images of the half-life"
    scale = "log"

    def __init__(self, weights: Sequence[str] | None = None) -> None:
        self.weights = weights

    def cells(self, checkpoint: Path) -> list[Cell]:
        held = read_checkpoint(checkpoint)
        averages = held.get("averages")
        if averages is None:
            raise ValueError(f"{checkpoint} holds no averages beside its weights; take one that `fit` wrote with --ema")
        names = self.weights or [*sorted(map(str, averages["decays"]), key=memory), RAW]
        return [Cell(name, "score", checkpoint=checkpoint, weights=name) for name in names]

    def place(self, row: str) -> float | None:
        return None if row == RAW else 1 - float(row) if memory(row) < 1 else memory(row)


def memory(name: str) -> float:
    """The number in the name of an average: its decay, or its half-life in images."""
    return float(name.removesuffix("_images"))


class StepTable(Line):
    """The snapshots of a run, `step_<n>.ckpt` (`--checkpoints.keep_every_n_steps`), by training step."""

    name = "steps"
    corner = "step"
    axis = "optimiser step"

    def cells(self, checkpoint: Path) -> list[Cell]:
        files = snapshots(run_of(checkpoint))
        if not files:
            raise ValueError(
                f"{run_of(checkpoint) / FOLDER} holds no step_<n>.ckpt; train with --checkpoints.keep_every_n_steps"
            )
        return [Cell(str(int(file.stem[5:])), "score", checkpoint=file, weights="averaged") for file in files]

    def place(self, row: str) -> float | None:
        return float(row)


class GuidanceTable(Line):
    """Fidelity against diversity as the guidance scale grows: a row per scale, a column per score.

    Score it with `--evaluation.scores '[FrechetDistance, Agreement, PrecisionRecall]'`.

    Args:
        scales: Of the model's own guidance.

    Raises:
        ValueError: If there are no scales.

    Sources: Ho & Salimans 2022, figure 4; Dhariwal & Nichol 2021, figure 4.
    """

    name = "guidance"
    corner = "scale"
    axis = "guidance scale"
    columns = "scales"

    def __init__(self, scales: Sequence[float] = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)) -> None:
        if not scales:
            raise ValueError("table: give at least one of --evaluation.table.scales")
        self.scales = list(scales)

    def cells(self, checkpoint: Path) -> list[Cell]:
        return [Cell(shortest(scale), "score") for scale in self.scales]

    def check(self, generator: Generator) -> None:
        super().check(generator)
        guidance = getattr(generator, "guidance", None)
        if not hasattr(guidance, "scale"):
            raise ValueError(
                "table: the model is not guided; choose a guidance by --model.guidance, or train a guided model, "
                "configs/digits_cfg.yaml for example"
            )

    def applied(self, cell: Cell, generator: Generator) -> AbstractContextManager[None]:
        return changed(generator.guidance, "scale", float(cell.row))

    def place(self, row: str) -> float | None:
        return float(row)

    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        """Plots every score, those in [0, 1] on one axis and the first on another."""
        axes = figure.subplots()
        scales = [float(cell.row) for cell, _ in filled]
        others = [name for name in filled[0][1]["scores"] if name != score]
        for name in others:
            axes.plot(scales, [record["scores"][name] for _, record in filled], marker="o", label=name)
        axes.set(xlabel=self.axis)
        first = axes.twinx() if others else axes
        values = [record["scores"][score] for _, record in filled]
        first.plot(scales, values, marker="s", color="black", linestyle="--")
        first.set_ylabel(f"{score} (dashed)")
        if others:
            axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
