"""A grid of samples at intervals, always from the same noise."""

from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor

from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.callbacks.progress import sampling_bar
from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.diffusion import DDIM, Sampler
from diffusion_lit.generator import Generator
from diffusion_lit.images import save_png, tile, to_uint8
from diffusion_lit.loggers import log_image
from diffusion_lit.requests import Requests


class SampleGrid(L.Callback):
    """Draws images 0 .. num_images - 1 of the averaged model, so that the same images can be watched as they form.

    Writes <run>/samples/step_<n>.png and, always the newest, <run>/samples.png; the first process does it alone. Where
    images have values that are not finite, a warning says so and nothing is written.

    Args:
        every_n_steps: Optimiser steps between grids; null: only one when training ends.
        num_images: Images in the grid.
        batch_size: Images generated at once.
        sampler: Draws them; null: the model's own.
        seed: Decides their noise.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        every_n_steps: int | None = 5000,
        num_images: int = 64,
        batch_size: int = 64,
        sampler: Sampler | None = DDIM(steps=50),
        seed: int = 0,
    ) -> None:
        self.interval = Interval(every_n_steps, "sample_grid.every_n_steps")
        self.requests = Requests(num_images, batch_size, seed=seed, section="sample_grid")
        self.sampler = sampler
        self._drawn_at: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, Generator) and self.sampler is not None:
            check_section_sampler(pl_module, self.sampler, "sample_grid")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval.start(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if self.interval.due(trainer) and isinstance(pl_module, Generator):
            self.draw(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = self._drawn_at == trainer.global_step or trainer.interrupted
        if not done and isinstance(pl_module, Generator):
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, generator: Generator) -> None:
        """Generates, writes and logs the grid."""
        self._drawn_at = trainer.global_step
        if trainer.is_global_zero:
            run_dir = Path(trainer.default_root_dir)
            path = run_dir / "samples" / f"step_{trainer.global_step:08d}.png"
            with if_possible(str(path)):
                grid = tile(self._images(trainer, generator))
                save_png(grid, path)
                save_png(grid, run_dir / "samples.png")
                log_image(trainer, "samples", path)
        trainer.strategy.barrier("sample_grid")

    def _images(self, trainer: L.Trainer, generator: Generator) -> Tensor:
        images = []
        with generator.averaged_weights(), sampling_bar(trainer, self.requests, "samples") as on_step:
            for request, count in self.requests.batches(0, 1):
                given = generator.conditions()(request["index"])
                batch = generator.sample(request["index"].tolist(), request["seed"], self.sampler, given, on_step)
                images.append(to_uint8(generator.pictures(batch, given)[:count]).cpu())
        return torch.cat(images)


def check_section_sampler(generator: Generator, sampler: Sampler, section: str, name: str = "sampler") -> None:
    """Raises ValueError, naming the section's own option, if a section's sampler does not fit the generator."""
    try:
        generator.check_sampler(sampler)
    except ValueError as error:
        message = str(error).replace("--model.sampler", f"--{section}.{name}").replace("--model.", f"--{section}.")
        raise ValueError(f"{section}: {message}") from None
