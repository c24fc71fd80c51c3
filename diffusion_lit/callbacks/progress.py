"""Progress bars: Lightning's for training, and one for images while they are generated."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import TQDMProgressBar
from tqdm import tqdm

from diffusion_lit.requests import Requests
from diffusion_lit.types import StepFn

FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f}/{total} images [{rate_noinv_fmt}, {remaining} left]"


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, redrawn now and then only; `predict` shows images instead of batches.

    Args:
        refresh_rate: Batches between two drawings.
    """

    def __init__(self, refresh_rate: int = 20) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.on_sampling_step: StepFn | None = None

    def init_predict_tqdm(self) -> tqdm:
        return tqdm(disable=True)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


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
    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    at_once = requests.batch_size * trainer.world_size
    before = 0
    with tqdm(
        total=requests.num_images,
        desc=title,
        unit=" images",
        bar_format=FORMAT,
        position=1 if trainer.training else 0,
        leave=False,
        disable=not shown,
    ) as bar:

        def on_step(done: int, total: int) -> None:
            nonlocal before
            images = min(at_once, requests.num_images - before)
            bar.update(before + images * done / total - bar.n)
            if done == total:
                before += images

        yield on_step
