"""Pictures of a run's curves."""

import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from diffusion_lit.files import whole_file
from diffusion_lit.loggers import read_curves
from diffusion_lit.terminal import printable

Curve = list[tuple[int, float]]
LARGEST = 1e100
"""Larger values are gaps: sums and ticks of them would overflow."""
SMOOTHED_POINTS = 50
"""A longer curve of a loss is smoothed, by a mean over this fraction of it."""


class Plots(L.Callback):
    """Draws <run>/loss.png and <run>/scores.png from metrics.jsonl, and at the end prints what the run has made.

    They are drawn when a checkpoint is saved, when training ends, and when it is interrupted. A picture that cannot be
    drawn is a warning.

    Args:
        every_n_seconds: Seconds between two drawings while training goes on, at least.
    """

    def __init__(self, every_n_seconds: float = 30.0) -> None:
        self.every_n_seconds = every_n_seconds
        self._drawn = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._drawn = time.monotonic()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.training and time.monotonic() - self._drawn >= self.every_n_seconds:
            self._draw(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws here rather than in on_train_end, where other callbacks still log."""
        self._draw(trainer)
        rank_zero_info("\n".join(closing_words(Path(trainer.default_root_dir))))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            logger.save()
        try:
            plot_run(Path(trainer.default_root_dir))
        except Exception as error:
            rank_zero_warn(f"the curves could not be drawn ({error}); training goes on")
        self._drawn = time.monotonic()


def closing_words(run_dir: Path) -> list[str]:
    """Returns each Fréchet distance of a run, first and last, and the files that a user looks for."""
    words = []
    for name, curve in _scores(read_curves(run_dir)).items():
        (first, before), (last, after) = curve[0], curve[-1]
        start = f"{before:.4g} at step {first:,}, " if first < last else ""
        words.append(f"{name}: {start}{after:.4g} at step {last:,}")
    files = ("samples.png", "loss.png", "scores.png", "config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt")
    return words + [str(run_dir / file) for file in files if (run_dir / file).is_file()]


def _scores(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if name == "fid" or name.startswith("frechet/")}


def plot_run(run_dir: Path) -> list[Path]:
    """Draws the curves of a run: losses to loss.png, Fréchet distances to scores.png.

    Returns:
        The files that were written; none for what the run has no values of.
    """
    curves = read_curves(run_dir)
    losses = {name: curves[name] for name in sorted(curves) if name.startswith(("train/loss", "val/loss"))}
    scores = _scores(curves)
    name = _plain(run_dir.resolve().name)
    written = []
    if losses:
        written.append(_plot(losses, f"Loss of {name}", "loss", run_dir / "loss.png", smooth=True))
    if scores:
        title = f"Fréchet distance of {name}"
        written.append(_plot(scores, title, "Fréchet distance", run_dir / "scores.png", smooth=False))
    return written


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """A mean over `width` neighbours, fewer at the ends; values that are not finite stay gaps and count nowhere."""
    finite = np.isfinite(values)
    window = np.ones(width)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return np.where(finite, total / np.maximum(np.convolve(finite, window, mode="same"), 1), np.nan)


def _plain(text: str) -> str:
    """A text that Matplotlib does not take for a formula."""
    return printable(text).replace("$", r"\$")


def _label(name: str, width: int) -> str:
    """What a curve is called in the legend."""
    stem, part, interval = name.partition("_t_")
    label = f"{stem}, t {interval.replace('_', ' to ')}" if part else name
    return _plain(label) + (f"\n(mean of {width})" if width > 1 else "")


def _plot(curves: dict[str, Curve], title: str, quantity: str, path: Path, smooth: bool) -> Path:
    """Draws curves over optimizer steps, with the legend beside them; the file is replaced as a whole."""
    # Not by pyplot, whose state and backend belong to the user.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = []
    for name, curve in curves.items():
        steps, values = np.array(curve, dtype=float).T
        values = np.where(np.abs(values) < LARGEST, values, np.nan)
        width = max(1, len(values) // SMOOTHED_POINTS) if smooth else 1
        values = _smoothed(values, width)
        shown.append(values[np.isfinite(values)])
        few = len(values) <= SMOOTHED_POINTS
        thin = "_t_" in name
        axes.plot(
            steps,
            values,
            label=_label(name, width),
            linewidth=0.9 if thin else 1.8,
            alpha=0.7 if thin else 1.0,
            marker="o" if few else None,
            markersize=3,
        )
    axes.set(title=title, xlabel="optimizer step", ylabel=quantity)
    axes.grid(alpha=0.3)
    _set_ticks(axes, np.concatenate(shown))
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    with whole_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
    return path


def _set_ticks(axes: Any, values: np.ndarray) -> None:
    """Chooses a logarithmic scale for positive values over more than a factor of 3, and plain numbers at few ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: np.format_float_positional(value, precision=12, trim="-"))
    low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    if 0 < low < high / 3:
        axes.set_yscale("log")
        subs = (1, 2, 5) if high < 1000 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=(1, 2, 5, 10)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
