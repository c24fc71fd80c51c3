"""Tables of one score over samplers, averages or training steps, filled for a checkpoint.

A table is a list of cells; each is an evaluation of its own, written to the run's results, and one that is there
already is not computed again.
"""

import csv
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from diffusion_lit.callbacks.checkpoints import FOLDER, read_checkpoint, run_of
from diffusion_lit.callbacks.collective import on_first
from diffusion_lit.diffusion import (
    DDIM,
    Ancestral,
    DPMSolver,
    FixedLarge,
    FixedSmall,
    Grid,
    Heun,
    Quadratic,
    Sampler,
)
from diffusion_lit.evaluation.evaluation import Evaluation
from diffusion_lit.module import DiffusionModule

SIGMA_HAT = "sigma-hat"
RAW = "raw"
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


@dataclass(frozen=True)
class Cell:
    """One evaluation of a table.

    Attributes:
        row: Its row.
        column: Its column.
        sampler: How images are generated; None: as the evaluation has it.
        checkpoint: Whose weights; None: those that are loaded.
        weights: Which of its weights: "averaged", "raw" or a decay; None: those that are loaded.
        published: What the paper has there.
    """

    row: str
    column: str
    sampler: Sampler | None = None
    checkpoint: Path | None = None
    weights: str | None = None
    published: float | None = None


Filled: TypeAlias = Sequence[tuple[Cell, Mapping[str, Any]]]
"""Cells with their records."""


class Table(ABC):
    """What to evaluate, and how to show it.

    Attributes:
        name: Of the files: <run>/table_<name>.md, .csv and .png.
        corner: What rows and columns are.
        columns: The option that chooses columns.
    """

    name: str
    corner: str
    columns: str = "steps"

    @abstractmethod
    def cells(self, checkpoint: Path) -> list[Cell]:
        """All cells, row by row, for a checkpoint; raises ValueError if there are none."""

    @abstractmethod
    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        """Plots a score on a matplotlib figure."""

    def caption(self) -> str:
        """A sentence for under the table; may be empty."""
        return ""


class DDIMTable(Table):
    """Number of steps by eta, and DDPM's larger variance as the last row.

    Args:
        steps: Columns.
        etas: Rows, in [0, 1].
        sigma_hat: Whether there is the row of ancestral sampling with the larger variance.
        grid: Which times; the paper's is quadratic for CIFAR-10, uniform for CelebA.
        clip: Whether predicted images are clipped; the paper's are not.
        published: Whose published values stand beside: "cifar10", "celeba64", or null for none.

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
        rows = [(f"{eta:g}", eta) for eta in self.etas] + ([(SIGMA_HAT, None)] if self.sigma_hat else [])
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
        beside = (
            ""
            if self.published is None
            else (f" In brackets the FID that Song et al. 2021 published for {self.published} (50,000 images).")
        )
        return f"{type(self.grid).__name__} grid, predictions {'' if self.clip else 'not '}clipped.{beside}"


class SamplerTable(Table):
    """Every sampler by the number of network evaluations that it may take.

    Args:
        evaluations: Columns: network evaluations per image at most. Heun's method takes an odd number, hence one less
            where that is even.
        samplers: Rows, by name; their own `steps` do not count. null: all there are, with their usual grids.

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
    ) -> None:
        self.evaluations = list(evaluations)
        self.samplers = every_sampler() if samplers is None else samplers
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


def every_sampler() -> dict[str, Sampler]:
    """The samplers that there are, by name."""
    return {
        "Ancestral, larger variance": Ancestral(variance=FixedLarge()),
        "Ancestral, smaller variance": Ancestral(variance=FixedSmall()),
        "DDIM": DDIM(),
        "DPM-Solver++ 1": DPMSolver(order=1),
        "DPM-Solver++ 2M": DPMSolver(order=2),
        "DPM-Solver++ 3M": DPMSolver(order=3),
        "Heun": Heun(),
    }


def with_steps(sampler: Sampler, steps: int) -> Sampler:
    """The same sampler with another number of steps."""
    other = copy(sampler)
    other.steps = steps
    return other


class Line(Table):
    """A table of one column, drawn over numbers."""

    axis: str
    scale = "linear"

    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        axes = figure.subplots()
        points = [(self.place(cell.row), record["scores"][score], cell.row) for cell, record in filled]
        placed = [(place, value) for place, value, _ in points if place is not None]
        axes.plot(*zip(*placed, strict=True), marker="o")
        for place, value, row in points:
            if place is None:
                axes.axhline(value, linestyle="--", color="grey", label=row)
                axes.legend(fontsize=8)
        axes.set(xlabel=self.axis, ylabel=score, xscale=self.scale)
        axes.grid(alpha=0.3, which="both")

    @abstractmethod
    def place(self, row: str) -> float | None:
        """Where a row stands on the axis; None: it is a level."""


class AverageTable(Line):
    """Every average of the weights that a checkpoint holds, and the raw weights.

    Args:
        weights: Which ones, "raw" or decays; null: all.
    """

    name = "averages"
    corner = "weights"
    axis = "1 - decay"
    scale = "log"

    def __init__(self, weights: Sequence[str] | None = None) -> None:
        self.weights = weights

    def cells(self, checkpoint: Path) -> list[Cell]:
        held = read_checkpoint(checkpoint)
        averages = held.get("averages")
        if averages is None:
            raise ValueError(f"{checkpoint} holds no averages beside its weights; take one that `fit` wrote with --ema")
        names = self.weights or [*sorted(map(str, averages["decays"]), key=float), RAW]
        return [Cell(name, "score", checkpoint=checkpoint, weights=name) for name in names]

    def place(self, row: str) -> float | None:
        return None if row == RAW else 1 - float(row)


class StepTable(Line):
    """The snapshots of a run, `step_<n>.ckpt` (`--checkpoints.keep_every_n_steps`), by training step."""

    name = "steps"
    corner = "step"
    axis = "optimiser step"

    def cells(self, checkpoint: Path) -> list[Cell]:
        files = sorted((run_of(checkpoint) / FOLDER).glob("step_" + 8 * "[0-9]" + ".ckpt"))
        if not files:
            raise ValueError(
                f"{run_of(checkpoint) / FOLDER} holds no step_<n>.ckpt; train with --checkpoints.keep_every_n_steps"
            )
        return [Cell(str(int(file.stem[5:])), "score", checkpoint=file, weights="averaged") for file in files]

    def place(self, row: str) -> float | None:
        return float(row)


def draw_rows(figure: Any, filled: Filled, score: str, names: Mapping[str, str]) -> None:
    """Plots a curve for each row over network evaluations, and over time."""
    left, right = figure.subplots(1, 2, sharey=True)
    for row in dict.fromkeys(cell.row for cell, _ in filled):
        records = [record for cell, record in filled if cell.row == row]
        values = [record["scores"][score] for record in records]
        left.plot([record["evaluations"] for record in records], values, marker="o", label=names[row])
        right.plot([seconds_per_image(record) for record in records], values, marker="o")
    left.set(xlabel="network evaluations", ylabel=score)
    right.set(xlabel="seconds per image and process")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")


def seconds_per_image(record: Mapping[str, Any]) -> float:
    """Of generating, on one process."""
    return float(record["process_seconds"] / record["num_images"])


class Tabulator(L.Callback):
    """Fills a table in `test`.

    Args:
        evaluation: Scores the cells; its first score stands in the table, all of them in the .csv file.
        table: Which cells.
        checkpoint: Of the model.
    """

    def __init__(self, evaluation: Evaluation, table: Table, checkpoint: Path) -> None:
        self.evaluation = evaluation
        self.table = table
        self.cells = table.cells(checkpoint)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks at every cell before the first is computed."""
        if not isinstance(pl_module, DiffusionModule):
            raise ValueError(f"table: the checkpoint is of a {type(pl_module).__name__}, which generates nothing")
        for cell in self.cells:
            if cell.sampler is not None:
                try:
                    cell.sampler.times(pl_module.process)
                except ValueError as error:
                    reason = str(error).partition(";")[0]
                    raise ValueError(
                        f"table: column {cell.column}: {reason}; choose others by --table.{self.table.columns}"
                    ) from None
        self.evaluation.setup(trainer, pl_module, stage)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, DiffusionModule):
            return
        filled = []
        for number, cell in enumerate(self.cells, start=1):
            rank_zero_info(f"table {self.table.name}: {cell.row}, {cell.column} ({number} of {len(self.cells)})")
            if cell.checkpoint is not None:
                load_weights(pl_module, cell.checkpoint, cell.weights)
            sampler = cell.sampler or self.evaluation.sampler or pl_module.sampler
            record = self.evaluation.known(trainer, pl_module, sampler)
            if record is None:
                record = self.evaluation.evaluate(trainer, pl_module, sampler, cell.checkpoint)
            filled.append((cell, record))
            on_first(trainer, lambda: write(self.table, filled, Path(trainer.default_root_dir)))
        rank_zero_info((Path(trainer.default_root_dir) / f"table_{self.table.name}.md").read_text())


def load_weights(module: DiffusionModule, path: Path, weights: str | None) -> None:
    """Puts weights of another checkpoint into a model.

    Raises:
        ValueError: If they are of another architecture or not in the checkpoint.
    """
    checkpoint = read_checkpoint(path)
    module.load_weights = weights or module.load_weights
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])


def write(table: Table, filled: Filled, run_dir: Path) -> None:
    """Writes <run>/table_<name>.md, .csv and .png of the cells that are there."""
    from matplotlib.figure import Figure

    score = next(iter(filled[0][1]["scores"]))
    path = run_dir / f"table_{table.name}.md"
    path.write_text("\n".join(markdown(table, filled, score)) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        names = list(filled[0][1]["scores"])
        writer = csv.writer(file)
        writer.writerow(["row", "column", *names, "published", "evaluations", "seconds_per_image", "num_images"])
        for cell, record in filled:
            values = [record["scores"].get(name) for name in names]
            rest = [record["evaluations"], seconds_per_image(record), record["num_images"]]
            writer.writerow([cell.row, cell.column, *values, cell.published, *rest])
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    table.draw(figure, filled, score)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def markdown(table: Table, filled: Filled, score: str) -> list[str]:
    """The table in Markdown, a line each; cells that are not there are empty."""
    columns = list(dict.fromkeys(cell.column for cell, _ in filled))
    rows = list(dict.fromkeys(cell.row for cell, _ in filled))
    texts = {}
    for cell, record in filled:
        published = "" if cell.published is None else f" ({cell.published:g})"
        texts[cell.row, cell.column] = f"{record['scores'][score]:.4g}{published}"
    record = filled[-1][1]
    of = ", ".join(f"{reference['count']:,} of {reference['name']}" for reference in record["references"])
    return [
        f"`{score}` of {record['num_images']:,} images" + (f" against {of}" if of else "") + f". {table.caption()}",
        "",
        f"| {table.corner} | {' | '.join(columns)} |",
        f"|{'---|' * (len(columns) + 1)}",
        *(f"| {row} | {' | '.join(texts.get((row, column), '') for column in columns)} |" for row in rows),
    ]
