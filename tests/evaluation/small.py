"""Small evaluations, and how to run them."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from diffusion_lit.callbacks import Checkpoints
from diffusion_lit.diffusion import DDIM
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.metrics import (
    KID,
    FrechetDistance,
    Pixels,
    PrecisionRecall,
    Score,
)
from diffusion_lit.records import RESULTS, read_records
from tests import tiny

SMALL: list[Score] = [FrechetDistance(), PrecisionRecall(), KID(subsets=3, subset_size=8)]


def evaluation(**kwargs: Any) -> Evaluation:
    settings: dict[str, Any] = {"scores": SMALL, "extractor": Pixels(2), "num_images": 22, "batch_size": 4}
    return Evaluation(**{**settings, **kwargs})


def run_test(
    place: Path, callback: L.Callback, model: L.LightningModule | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Runs `test` and returns the newest record that it wrote."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    callbacks = [callback, *([] if ckpt_path is None else [Checkpoints()])]
    made = tiny.trainer(place, callbacks=callbacks, logger=False, limit_test_batches=1, **kwargs)
    made.test(model or tiny.module(), tiny.data(), ckpt_path=ckpt_path)
    return read_records(place / RESULTS)[-1]


def training(**kwargs: Any) -> Evaluation:
    settings = {"scores": None, "every_n_steps": 2, "training_num_images": 6, "training_sampler": DDIM(2)}
    return evaluation(**{**settings, **kwargs})


class Stop(DDIM):
    """Breaks off in the batch that holds a certain image."""

    batches = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if type(self).batches == 0:
            raise RuntimeError("on purpose")
        type(self).batches -= 1
        return super().__call__(*args, **kwargs)
