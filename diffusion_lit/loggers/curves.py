"""A run's scalars in its own directory."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from diffusion_lit.records import append_lines, read_records

METRICS = "metrics.jsonl"
LAST_STEP = 2**53
"""A step that a float64 still tells from the next one."""


class Curves(Logger):
    """Writes scalars to <save_dir>/metrics.jsonl, one line per call: {"step": n, name: value, ...}.

    Lines are appended in one write every `flush_every_n_steps`, before every checkpoint and at the end. A resumed run
    first cuts off the lines that its checkpoint does not know. Values that are not finite, which JSON lacks, are
    written as "nan", "inf" and "-inf". Where the file cannot be written, a warning says so, and the lines are kept for
    the next time.

    Args:
        save_dir: Directory of the file; by default the run directory.
        flush_every_n_steps: Optimizer steps between two writes.

    Raises:
        ValueError: If `flush_every_n_steps` is below 1.
    """

    def __init__(self, save_dir: str | None = None, flush_every_n_steps: int = 100) -> None:
        if flush_every_n_steps < 1:
            raise ValueError(f"trainer.logger.flush_every_n_steps={flush_every_n_steps} must be at least 1")
        self.flush_every_n_steps = flush_every_n_steps
        self._save_dir = save_dir
        self._buffer: list[str] = []
        self._flushed_at = 0
        self._resumed: tuple[int, int | None] | None = None

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return self._save_dir or "."

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.save_dir) / METRICS

    @property
    def lines(self) -> int:
        """Number of lines in the file, and of those that wait to be written."""
        return _content(self.path).count(b"\n") + len(self._buffer)

    def bind(self, run_dir: str) -> None:
        """Sets the directory unless one was given."""
        self._save_dir = self._save_dir or run_dir

    def resume(self, step: int, lines: int | None) -> None:
        """Drops what was written after a checkpoint, at the next write, so that a start that fails changes nothing.

        Args:
            step: The checkpoint's step; no line beyond it is kept.
            lines: Number of lines that are kept at most; None: not known.
        """
        self._resumed, self._flushed_at = (step, lines), step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        step = step or 0
        values = {name: float(value) for name, value in metrics.items() if name not in ("step", "epoch")}
        finite = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self._buffer.append(json.dumps({"step": step, **finite}))
        if step - self._flushed_at >= self.flush_every_n_steps:
            self._flushed_at = step
            self.flush()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the configuration is in the run's config.yaml."""

    @rank_zero_only
    def flush(self) -> None:
        """Brings the file up to date: cuts it if the run was resumed, and writes the lines that wait."""
        try:
            if self._resumed is not None:
                _cut(self.path, *self._resumed)
                self._resumed = None
            if self._buffer:
                append_lines(self.path, self._buffer)
                self._buffer = []
        except OSError as error:
            rank_zero_warn(f"{self.path} could not be written ({error.strerror or error}); training goes on")

    @rank_zero_only
    def save(self) -> None:
        if self._buffer:
            self.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _cut(path: Path, step: int, lines: int | None) -> None:
    """Cuts a file after so many lines, or before the first that is incomplete or beyond a step."""
    content = _content(path)
    kept = 0
    for number, line in enumerate(content.splitlines(keepends=True)):
        if number == lines or not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept += len(line)
    if kept < len(content):
        os.truncate(path, kept)


def read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads the scalars that `Curves` wrote for a run.

    Returns:
        (step, value) pairs in order of steps, by name; values may be nan or infinite. Empty if there is no file. What
        `Curves` does not write is left out.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    for record in read_records(run_dir / METRICS):
        step = record.pop("step", 0)
        for name, value in record.items():
            number = _number(value)
            if number is not None and type(step) is int and 0 <= step < LAST_STEP:
                curves[name][step] = number
    return {name: sorted(curve.items()) for name, curve in curves.items()}


def _number(value: Any) -> float | None:
    """A scalar as `Curves` writes it; None: it is something else."""
    if not isinstance(value, int | float | str) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
