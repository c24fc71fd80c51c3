"""How far it is: Lightning's bar for training, one for images while they are generated, and lines without a bar."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar as AnyProgressBar
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from tqdm import tqdm

from diffusion_lit.lightning import show_no_epochs
from diffusion_lit.requests import Requests
from diffusion_lit.types import StepFn

FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f}/{total} images [{rate_noinv_fmt}, {remaining} left]"


class ProgressBar(TQDMProgressBar):
    """Lightning's bar over all optimiser steps of a run, redrawn now and then; `predict` shows images, not batches.

    Args:
        refresh_rate: Steps between two drawings.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.on_sampling_step: StepFn | None = None

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        super().on_train_start(trainer, *_)
        bar = self.train_progress_bar
        bar.set_description(self.train_description, refresh=False)
        # The rate is that of the steps since the start of this process.
        bar.initial = bar.n = trainer.global_step
        bar.total = total_steps(trainer)
        bar.unit = " steps"
        bar.refresh()

    def on_train_epoch_start(self, *_: Any) -> None:
        """Nothing: the bar goes over all epochs."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        bar, step = self.train_progress_bar, trainer.global_step
        if self.is_enabled and step != bar.n and (step % self.refresh_rate == 0 or step == bar.total):
            bar.n = step
            bar.set_postfix(self.get_metrics(trainer, pl_module))

    def init_predict_tqdm(self) -> tqdm:
        return tqdm(disable=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class Report(L.Callback):
    """Says what is trained, why it stops early, and where no bar is shown how far it is: now and then, and at the end.

    Args:
        seconds: Between two lines.
    """

    def __init__(self, seconds: float = 60.0) -> None:
        self.seconds = seconds
        self._start = self._said = 0.0
        self._first = self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = self._said = time.monotonic()
        self._first = self._step = trainer.global_step
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        start = f", from step {self._first:,}" if self._first else ""
        total = total_steps(trainer)
        rank_zero_info(
            f"training {type(pl_module).__name__}, {trained:,} parameters{start}"
            + (f" to step {total:,}" if total is not None else "")
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step != self._step and time.monotonic() - self._said >= self.seconds:
            self._say(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step != self._step:
            self._say(trainer, end=True)
        for callback in trainer.early_stopping_callbacks if trainer.should_stop else []:
            if callback.stopping_reason_message:
                rank_zero_info(f"stopped after step {trainer.global_step:,}: {callback.stopping_reason_message}")

    def _say(self, trainer: L.Trainer, end: bool = False) -> None:
        self._step, self._said = trainer.global_step, time.monotonic()
        if trainer.progress_bar_callback is not None:
            return
        total, loss = total_steps(trainer), trainer.callback_metrics.get("train/loss")
        rate = (self._step - self._first) / max(self._said - self._start, 1e-9)
        parts = [f"loss {float(loss):.4g}"] if loss is not None else []
        parts.append(f"{rate:.3g} steps/s")
        if total is not None and not end:
            parts.append(f"{tqdm.format_interval(max(total - self._step, 0) / rate)} left")
        rank_zero_info(f"step {self._step:,}{'' if total is None else f' of {total:,}'}: {', '.join(parts)}")


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimiser steps of a run from its beginning to its end; None if it has no end."""
    total = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return None if total == float("inf") or total < 0 else int(total)


def one_bar(callbacks: Sequence[L.Callback], shown: bool | None) -> list[L.Callback]:
    """Callbacks without this package's bar, if none is to be shown or the user has chosen another, such as Rich's."""
    for callback in callbacks:
        show_no_epochs(callback)
    other = any(isinstance(c, AnyProgressBar) and not isinstance(c, ProgressBar) for c in callbacks)
    return [c for c in callbacks if not (isinstance(c, ProgressBar) and (other or shown is False))]


def image_bar(trainer: L.Trainer, total: int, title: str) -> tqdm:
    """A bar over images, below that of training, on the first process unless bars are switched off."""
    position, shown = int(trainer.training), trainer.is_global_zero and trainer.progress_bar_callback is not None
    look = {"desc": title, "unit": " images", "bar_format": FORMAT, "position": position}
    return tqdm(total=total, leave=False, disable=not shown, **look)


@contextmanager
def sampling_bar(trainer: L.Trainer, requests: Requests, title: str) -> Iterator[StepFn]:
    """Shows images done, images per second and time left, on the first process.

    Args:
        trainer: Shows no bar if its progress bar is switched off.
        requests: What all processes generate; a round is one batch of each, and they are assumed to be equally fast.
        title: Shown in front of the bar.

    Yields:
        The function to call after every sampling step; called with (1, 1) it counts a whole batch.
    """
    at_once = requests.batch_size * trainer.world_size
    before = 0
    with image_bar(trainer, requests.num_images, title) as bar:

        def on_step(done: int, total: int) -> None:
            nonlocal before
            images = min(at_once, requests.num_images - before)
            bar.update(before + images * done / total - bar.n)
            if done == total:
                before += images

        yield on_step


@contextmanager
def counting_bar(trainer: L.Trainer, total: int, title: str) -> Iterator[Callable[[int], None]]:
    """Shows how many images all processes have gone through, how fast, and the time left, on the first process.

    Args:
        trainer: Shows no bar if its progress bar is switched off.
        total: Images of all processes, which are assumed to be equally fast.
        title: Shown in front of the bar.

    Yields:
        The function to call with the number of images that this process has just gone through.
    """
    with image_bar(trainer, total, title) as bar:

        def count(images: int) -> None:
            bar.update(min(images * trainer.world_size, total - bar.n))

        yield count
