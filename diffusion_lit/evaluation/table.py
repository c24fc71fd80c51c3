"""Tables of scores over samplers, weights, training steps or guidance, filled for a checkpoint in `test`.

A table is a list of cells; each is an evaluation of its own, written to the run's results, and one that is on record
already is not computed again.
"""

import csv
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from diffusion_lit.callbacks.collective import on_rank_zero
from diffusion_lit.checkpoint import AVERAGED, read_checkpoint
from diffusion_lit.diffusion import Sampler
from diffusion_lit.generator import Generator
from diffusion_lit.records import RESULTS
from diffusion_lit.types import Part


@dataclass(frozen=True)
class Cell:
    """One evaluation of a table.

    Attributes:
        row: Its row.
        column: Its column.
        sampler: Draws the images; None: as the evaluation has it.
        checkpoint: Gives the weights; None: the ones that are loaded.
        weights: Which of its weights: "averaged", "raw" or a decay.
        published: The paper's value.
    """

    row: str
    column: str
    sampler: Sampler | None = None
    checkpoint: Path | None = None
    weights: str = AVERAGED
    published: float | None = None


Filled: TypeAlias = Sequence[tuple[Cell, Mapping[str, Any]]]
"""Cells with their records."""


class Table(Part):
    """What to evaluate, and how to show it.

    Attributes:
        name: Of the files: <run>/table_<name>.md, .csv and .png.
        corner: What rows and columns are.
        columns: The option that chooses columns.
        source: A sentence on the published values, where there are any.
    """

    name: str
    corner: str
    columns: str = "steps"
    source: str = ""

    @abstractmethod
    def cells(self, checkpoint: Path) -> list[Cell]:
        """All cells, row by row, for a checkpoint; raises ValueError if there are none."""

    def sequence(self, checkpoint: Path, filled: Filled) -> Iterator[Cell]:
        """The cells in the order in which they are evaluated.

        Args:
            checkpoint: The checkpoint that the table is of.
            filled: The cells so far with their records; it grows, so that a search can decide by the scores.
        """
        yield from self.cells(checkpoint)

    @abstractmethod
    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        """Plots a score on a matplotlib figure."""

    def caption(self) -> str:
        """A sentence for under the table; may be empty."""
        return ""

    def shown(self, scores: Sequence[str]) -> list[str]:
        """Which of a record's scores the files show, in order; by default all."""
        return list(scores)

    def compares(self, generator: Generator, record: Mapping[str, Any]) -> bool:
        """Whether the published values are of such a model, such data and such features as a record's."""
        return True

    def applied(self, cell: Cell, generator: Generator) -> AbstractContextManager[None]:
        """A context in which the generator is as the cell wants it, beyond sampler and weights."""
        return nullcontext()

    def check(self, generator: Generator) -> None:
        """Raises ValueError if the table cannot be filled for the generator."""
        for cell in self.cells(loaded_from(generator)):
            if cell.sampler is not None:
                try:
                    generator.check_sampler(cell.sampler)
                except ValueError as error:
                    reason = str(error).partition(";")[0]
                    raise ValueError(
                        f"table: column {cell.column}: {reason}; choose others by --evaluation.table.{self.columns}"
                    ) from None


class Line(Table):
    """A table of one column per score, drawn over numbers.

    Attributes:
        axis: What the numbers are.
        scale: Of the axis.
    """

    axis: str
    scale: str = "linear"

    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        axes = figure.subplots()
        points = [(self.place(cell.row), record["scores"][score], cell.row) for cell, record in filled]
        placed = [(place, value) for place, value, _ in points if place is not None]
        if placed:
            axes.set_xscale(self.scale if len(placed) > 1 else "linear")
            axes.plot(*zip(*placed, strict=True), marker="o")
        for place, value, row in points:
            if place is None:
                axes.axhline(value, linestyle="--", color="grey", label=row)
                axes.legend(fontsize=8)
        axes.set(xlabel=self.axis, ylabel=score)
        axes.grid(alpha=0.3, which="both")

    @abstractmethod
    def place(self, row: str) -> float | None:
        """The number of a row on the axis; None: the row is drawn as a level."""


@contextmanager
def changed(part: Any, name: str, value: float) -> Iterator[None]:
    """A context in which an attribute of a part has another value."""
    before = getattr(part, name)
    setattr(part, name, value)
    try:
        yield
    finally:
        setattr(part, name, before)


def loaded_from(generator: Generator) -> Path:
    """The checkpoint that a generator was loaded from; raises ValueError if there is none."""
    if generator.loaded is None or generator.loaded.path is None:
        raise ValueError("table: give --ckpt_path CHECKPOINT")
    return generator.loaded.path


def fill(table: Table, evaluate: Callable[[Cell], Mapping[str, Any]], trainer: L.Trainer, generator: Generator) -> None:
    """Evaluates every cell that is not on record and writes the table after each; collective.

    The generator has its own weights again afterwards.

    Args:
        table: What to evaluate.
        evaluate: Returns the record of a cell, an old one where there is one, for the generator as it is then.
        trainer: Its processes take part.
        generator: Has the weights of a checkpoint.
    """
    checkpoint = loaded_from(generator)
    loaded = generator.loaded
    run_dir = Path(trainer.default_root_dir)
    filled: list[tuple[Cell, Mapping[str, Any]]] = []
    forecast = Forecast([evaluations(cell, generator) for cell in table.cells(checkpoint)])
    for cell in table.sequence(checkpoint, filled):
        rank_zero_info(f"table {table.name}: {cell.row}, {cell.column} ({forecast})")
        begun, clock = datetime.now(UTC), time.monotonic()
        if cell.checkpoint is not None:
            generator.load(read_checkpoint(cell.checkpoint), cell.weights, cell.checkpoint)
        with table.applied(cell, generator):
            record = evaluate(cell)
        if filled and record["scores"].keys() != filled[0][1]["scores"].keys():
            names = ", ".join(map(repr, record["scores"].keys() ^ filled[0][1]["scores"].keys()))
            raise ValueError(
                f"{run_dir / RESULTS}: the results of a table differ in their scores ({names}); move the file away"
            )
        computed = datetime.fromisoformat(record["time"]) >= begun.replace(microsecond=0)
        forecast.add(evaluations(cell, generator), time.monotonic() - clock if computed else None)
        comparable = cell.published is not None and table.compares(generator, record)
        filled.append((cell if comparable else replace(cell, published=None), record))
        on_rank_zero(trainer, lambda: write(table, filled, run_dir))
    if loaded is not None and generator.loaded != loaded:
        generator.load(read_checkpoint(checkpoint), loaded.weights, checkpoint)
    rank_zero_info(on_rank_zero(trainer, (run_dir / f"table_{table.name}.md").read_text) or "")


class Forecast:
    """How many cells of a table are done, and about how long the others take.

    Args:
        work: Network evaluations of each cell, which take most of the time.
    """

    def __init__(self, work: Sequence[int]) -> None:
        self.cells = len(work)
        self.work = sum(work)
        self.done = 0
        self._measured, self._seconds = 0, 0.0

    def add(self, work: int, seconds: float | None) -> None:
        """Counts a cell, with the time that it took; None if it was on record."""
        self.done += 1
        self.work -= work
        if seconds is not None:
            self._measured += work
            self._seconds += seconds

    def __str__(self) -> str:
        left = ""
        if self._measured and self.work > 0:
            left = f", about {tqdm.format_interval(self._seconds / self._measured * self.work)} left"
        return f"cell {self.done + 1} of {max(self.cells, self.done + 1)}{left}"


def evaluations(cell: Cell, generator: Generator) -> int:
    """Network evaluations of each image of a cell."""
    return max(generator.evaluations(cell.sampler), 1)


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
        axes.set(xscale=scale_of(axes, 0), yscale=scale_of(axes, 1))
        axes.grid(alpha=0.3, which="both")


def scale_of(axes: Any, dimension: int) -> str:
    """Logarithmic where every point drawn is positive in this dimension: a kernel distance may be below 0."""
    points = [value for line in axes.get_lines() for value in line.get_data()[dimension]]
    return "log" if points and min(points) > 0 else "linear"


def seconds_per_image(record: Mapping[str, Any]) -> float:
    """Seconds that one process takes for an image, features included."""
    return float(record["process_seconds"] / record["num_images"])


def write(table: Table, filled: Filled, run_dir: Path) -> None:
    """Writes <run>/table_<name>.md, .csv and .png of the cells that are there."""
    from matplotlib.figure import Figure

    names = table.shown(list(filled[0][1]["scores"]))
    path = run_dir / f"table_{table.name}.md"
    path.write_text("\n".join(markdown(table, filled, names)) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "column", *names, "published", "evaluations", "seconds_per_image", "num_images"])
        for cell, record in filled:
            values = [record["scores"].get(name) for name in names]
            rest = [record["evaluations"], seconds_per_image(record), record["num_images"]]
            writer.writerow([cell.row, cell.column, *values, cell.published, *rest])
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    table.draw(figure, filled, names[0])
    figure.savefig(path.with_suffix(".png"), dpi=110)


def markdown(table: Table, filled: Filled, names: Sequence[str]) -> list[str]:
    """The table in Markdown, a line each; cells that are not there are empty.

    Of several columns the cells show the first score; a table of one column has a column for each score.
    """
    line = isinstance(table, Line)
    columns = list(names) if line else list(dict.fromkeys(cell.column for cell, _ in filled))
    texts: dict[tuple[str, str], str] = {}
    for cell, record in filled:
        published = "" if cell.published is None else f" ({cell.published:g})"
        for name in names if line else names[:1]:
            column = name if line else cell.column
            texts[cell.row, column] = f"{record['scores'][name]:.4g}{published if name == names[0] else ''}"
    record = filled[-1][1]
    against = ", ".join(f"{reference['count']:,} of {reference['name']}" for reference in record.get("references", ()))
    title = "" if line else f"`{names[0]}` of "
    source = f" {table.source}" if any(cell.published is not None for cell, _ in filled) else ""
    return [
        f"{title}{record['num_images']:,} images"
        + (f" against {against}" if against else "")
        + f". {table.caption()}{source}",
        "",
        f"| {table.corner} | {' | '.join(columns)} |",
        f"|{'---|' * (len(columns) + 1)}",
        *(
            f"| {row} | {' | '.join(texts.get((row, column), '') for column in columns)} |"
            for row in dict.fromkeys(cell.row for cell, _ in filled)
        ),
    ]
