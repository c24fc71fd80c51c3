"""A grid of samples every now and then, always from the same noise."""

from pathlib import Path

import lightning.pytorch as L
import torch

from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.callbacks.progress import sampling_bar
from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.diffusion import DDIM, DiscreteProcess, Sampler
from diffusion_lit.generation import Requests, check_seed
from diffusion_lit.images import save_png, tile, to_uint8
from diffusion_lit.loggers import log_image
from diffusion_lit.module import DiffusionModule


class SampleGrid(L.Callback):
    """Draws the averaged model's images 0 .. num_images - 1, so that the same pictures can be watched as they form.

    Writes <run>/samples/step_<n>.png and, always the newest, <run>/samples.png; the first process does it alone.

    Args:
        every_n_steps: Optimiser steps between grids; null: only one when training ends.
        num_images: Images in the grid.
        batch_size: Images generated at once.
        sampler: How they are drawn.
        seed: Decides their noise.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        every_n_steps: int | None = 5000,
        num_images: int = 64,
        batch_size: int = 64,
        sampler: Sampler = DDIM(steps=50),
        seed: int = 0,
    ) -> None:
        self.interval = Interval(every_n_steps, "sample_grid.every_n_steps")
        self.requests = Requests(num_images, batch_size, section="sample_grid")
        check_seed("sample_grid.seed", seed)
        self.sampler = sampler
        self.seed = seed
        self._drawn_at: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, DiffusionModule):
            check_sampler(self.sampler, pl_module.process, "sample_grid")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval.start(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if self.interval.due(trainer) and isinstance(pl_module, DiffusionModule):
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = self._drawn_at == trainer.global_step or trainer.interrupted
        if not done and isinstance(pl_module, DiffusionModule):
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Generates, writes and logs the grid."""
        if not isinstance(module, DiffusionModule):
            raise TypeError(f"SampleGrid needs a DiffusionModule, not {type(module).__name__}")
        self._drawn_at = trainer.global_step
        if trainer.is_global_zero:
            with module.averaged_weights(), sampling_bar(trainer, module, self.requests, "samples"):
                images = [
                    to_uint8(module.sample(request["index"].tolist(), self.seed, self.sampler)[:count]).cpu()
                    for request, count in self.requests.of_rank(0, 1)
                ]
            grid = tile(torch.cat(images))
            run_dir = Path(trainer.default_root_dir)
            path = run_dir / "samples" / f"step_{trainer.global_step:08d}.png"
            with if_possible(str(path)):
                save_png(grid, path)
                save_png(grid, run_dir / "samples.png")
                log_image(trainer, "samples", path)
        trainer.strategy.barrier("sample_grid")


def check_sampler(sampler: Sampler, process: DiscreteProcess, section: str) -> None:
    """Raises ValueError, naming the section's own option, if a section's sampler does not fit the process."""
    try:
        sampler.times(process)
    except ValueError as error:
        raise ValueError(f"{section}: " + str(error).replace("--model.", f"--{section}.")) from None
