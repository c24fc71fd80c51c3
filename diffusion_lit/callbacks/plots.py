"""The curves of a run as pictures, without any service."""

from pathlib import Path

import lightning.pytorch as L
import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.loggers import read_curves

Curve = list[tuple[int, float]]


class Plots(L.Callback):
    """Draws <run>/loss.png and <run>/frechet.png from the CSV files when training ends or is interrupted, and says what
    the run has made.
    """

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not at the end of training: other callbacks have a last value to log then."""
        self._plot(trainer)
        rank_zero_info("\n".join(closing_words(Path(trainer.default_root_dir))))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._plot(trainer)

    def _plot(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.save()
            with if_possible("the plots of the run"):
                plot_run(Path(trainer.default_root_dir))


def closing_words(run_dir: Path) -> list[str]:
    """Each Fréchet distance of a run, first and last, and the files that a person looks for."""
    words = []
    for name, curve in _distances(read_curves(run_dir)).items():
        (first, before), (last, after) = curve[0], curve[-1]
        words.append(f"{name}: {before:.4g} at step {first:,}, {after:.4g} at step {last:,}")
    files = ("samples.png", "loss.png", "frechet.png", "config.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt")
    return words + [str(run_dir / file) for file in files if (run_dir / file).is_file()]


def _distances(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if name == "fid" or name.startswith("frechet/")}


def plot_run(run_dir: Path) -> list[Path]:
    """Draws the pictures that a run's curves allow.

    Returns:
        What was written.
    """
    curves = read_curves(run_dir)
    losses = {name: curves[name] for name in sorted(curves) if name.startswith(("train/loss", "val/loss"))}
    distances = _distances(curves)
    written = []
    if losses:
        written.append(_draw(losses, "loss", run_dir / "loss.png", smooth=True))
    if distances:
        written.append(_draw(distances, "Fréchet distance", run_dir / "frechet.png", smooth=False))
    return written


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _draw(curves: dict[str, Curve], title: str, path: Path, smooth: bool) -> Path:
    # The figure is made without pyplot, whose state and backend belong to the user.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        steps, values = (np.array(column, dtype=float) for column in zip(*curve, strict=True))
        width = max(1, len(values) // 50) if smooth else 1
        style = {"marker": "o", "markersize": 3} if len(values) <= 50 else {}
        bold = "_t_" not in name
        axes.plot(
            steps,
            _smoothed(values, width),
            label=name + (f" (mean of {width})" if width > 1 else ""),
            linewidth=1.8 if bold else 0.9,
            alpha=1.0 if bold else 0.7,
            **style,  # type: ignore[arg-type]
        )
    if all(value > 0 for curve in curves.values() for _, value in curve):
        axes.set_yscale("log")
    axes.set(xlabel="optimiser step", ylabel=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    part = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(part, dpi=110, format="png")
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return path
