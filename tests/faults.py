"""Failures and hangs of one process, for configurations to name."""

import time

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from diffusion_lit.types import Condition, Network


class FailsAt(L.Callback):
    """Raises, or never returns, in one process at the end of a training step or of sampling.

    Args:
        rank: The process.
        step: Optimizer steps done by then.
        hangs: Whether it hangs instead.
    """

    def __init__(self, rank: int, step: int, hangs: bool = False) -> None:
        self.rank = rank
        self.step = step
        self.hangs = hangs

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            self._fail()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_rank == self.rank:
            self._fail()

    def _fail(self) -> None:
        if self.hangs:
            time.sleep(3600)
        raise ValueError(f"on purpose in process {self.rank}")


class Tabled(Network):
    """A network with a mapping of whole numbers, which has no entry for some image sizes.

    Args:
        image_size: Height and width.
        in_channels: Channels.
        table: Widths by image size.
        explains: Whether it says so in words of its own.
    """

    def __init__(self, image_size: int, in_channels: int = 1, table: dict = {}, explains: bool = False) -> None:  # type: ignore[type-arg]  # noqa: B006
        super().__init__()
        self.image_size, self.in_channels = image_size, in_channels
        try:
            self.weight = nn.Parameter(torch.zeros(table[image_size]))
        except KeyError as error:
            if explains:
                raise ValueError(f"no width for image_size={image_size}; add it to table") from error
            raise

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        return x
