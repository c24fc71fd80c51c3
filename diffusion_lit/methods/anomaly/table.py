"""A table of scores over lambda."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from diffusion_lit.evaluation.table import Cell, Filled, Line, changed
from diffusion_lit.generator import Generator


class LambdaTable(Line):
    """A row for each lambda, a column for each score of all defects together.

    Args:
        lambdas: Noising steps.

    Raises:
        ValueError: If there are none.
    """

    name = "lambda"
    corner = "lambda"
    axis = "lambda, steps of noise"

    def __init__(self, lambdas: Sequence[int]) -> None:
        if not lambdas:
            raise ValueError("table=[] makes no table; give --model.table '[50, 100, 250]'")
        self.lambdas = list(lambdas)

    def cells(self, checkpoint: Path) -> list[Cell]:
        return [Cell(str(steps), "score") for steps in self.lambdas]

    def applied(self, cell: Cell, generator: Generator) -> AbstractContextManager[None]:
        return changed(generator.detector, "lambda_steps", int(cell.row))

    def place(self, row: str) -> float | None:
        return float(row)

    def shown(self, scores: Sequence[str]) -> list[str]:
        return [name for name in scores if "/" not in name]

    def draw(self, figure: Any, filled: Filled, score: str) -> None:
        """Plots every score of all defects together."""
        axes = figure.subplots()
        for name in self.shown(list(filled[0][1]["scores"])):
            values = [record["scores"][name] for _, record in filled]
            axes.plot([int(cell.row) for cell, _ in filled], values, marker="o", label=name)
        axes.set(xlabel=self.axis, ylim=(0, 1))
        axes.legend(fontsize=8, loc="lower right")
        axes.grid(alpha=0.3)
