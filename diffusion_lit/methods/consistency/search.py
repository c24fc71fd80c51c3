"""The times of multistep sampling, found one after another by ternary search on a score, as a table."""

from collections.abc import Generator as Coroutine
from collections.abc import Iterator
from pathlib import Path

from diffusion_lit.evaluation.table import Cell, Filled, Line
from diffusion_lit.methods.consistency.sampling import Levels, Multistep


def ternary(low: int, high: int) -> Coroutine[int, float, int]:
    """Searches for the least value of a function that falls and then rises, on the whole numbers low .. high.

    Yields:
        Where a value is wanted, which is sent in return; no place twice.

    Returns:
        The place of the least value seen, the lowest if several have it.
    """
    values: dict[int, float] = {}
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        for place in (left, right):
            if place not in values:
                values[place] = yield place
        if values[left] <= values[right]:
            high = right
        else:
            low = left
    for place in range(low, high + 1):
        if place not in values:
            values[place] = yield place
    return min(sorted(values), key=lambda place: values[place])


class TimeSearch(Line):
    """Searches the levels at which `Multistep` evaluates the network: the first score evaluated is made least.

    The first row is one evaluation. Then the best level is searched for a second one, then for a third after it, and so
    on. The assumption that the score falls and rises once along the levels is the paper's.

    Args:
        levels: N, the levels of the grid, at least steps + 1.
        steps: Network evaluations of the last rows, at least 2.
        clip: Whether predictions are clipped to [-1, 1].

    Raises:
        ValueError: If a number is out of range.

    Source: Song et al. 2023, section 4 and appendix C.
    """

    name = "times"
    corner = "levels"
    axis = "level searched for"
    columns = "levels"

    def __init__(self, levels: int = 40, steps: int = 2, clip: bool = True) -> None:
        if steps < 2 or levels < steps + 1:
            raise ValueError(
                f"table: steps={steps} must be at least 2, and levels={levels} at least {max(steps, 2) + 1}; the paper "
                "has 2 and 40"
            )
        self.levels = levels
        self.steps = steps
        self.clip = clip

    def cell(self, indices: list[int]) -> Cell:
        """The evaluation of one list of levels, which ends at the last."""
        listed = [*indices, self.levels - 1]
        sampler = Multistep(grid=Levels(self.levels, listed), clip=self.clip)
        return Cell(", ".join(map(str, listed)), "score", sampler)

    def cells(self, checkpoint: Path) -> list[Cell]:
        return [self.cell([0])]

    def sequence(self, checkpoint: Path, filled: Filled) -> Iterator[Cell]:
        yield self.cell([0])
        chosen = [0]
        for remaining in range(self.steps - 2, -1, -1):
            search = ternary(chosen[-1] + 1, self.levels - 2 - remaining)
            place = next(search)
            while True:
                yield self.cell([*chosen, place])
                try:
                    place = search.send(float(next(iter(filled[-1][1]["scores"].values()))))
                except StopIteration as end:
                    chosen.append(end.value)
                    break

    def place(self, row: str) -> float | None:
        return float(row.split(", ")[-2])
