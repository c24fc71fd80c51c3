"""The Fréchet distance between generated and real images, over all processes."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from diffusion_lit.callbacks.checkpoints import FOLDER
from diffusion_lit.callbacks.collective import reduce_sum
from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.callbacks.progress import sampling_bar
from diffusion_lit.callbacks.sample_grid import check_sampler
from diffusion_lit.callbacks.scalars import images_seen
from diffusion_lit.diffusion import Sampler
from diffusion_lit.evaluation.real_images import RealImages
from diffusion_lit.generation import Requests, check_seed
from diffusion_lit.images import to_uint8
from diffusion_lit.loggers import IMAGES_SEEN, log_metrics
from diffusion_lit.metrics.features import FeatureExtractor, Inception, as_extractor, outputs_in_memory
from diffusion_lit.metrics.frechet import FeatureMoments, frechet_distance
from diffusion_lit.module import DiffusionModule


class Frechet(L.Callback):
    """Scores the averaged model while it trains; `Evaluation` scores checkpoints.

    With Inception features the scalar is called `fid`, with others `frechet/<extractor>`. The best model by this
    score is kept as <run>/checkpoints/best.ckpt.

    Args:
        extractor: Makes features of 8-bit images.
        every_n_steps: Optimiser steps between scores; null: never while training.
        num_images: Images generated for a score.
        batch_size: Images generated at once by each process.
        sampler: How images are generated; null: by the model's own sampler.
        seed: Decides their noise.
        reference: An .npz file with mu and sigma; null: computed from the training images, once, and kept.
        cache_dir: Where computed references are kept; null: $DIFFUSION_LIT_CACHE or ~/.cache/diffusion_lit.
        at_start: Whether to score the untrained model too.

    Raises:
        ValueError: If a number is out of range.

    Source: Heusel et al. 2017.
    """

    def __init__(
        self,
        extractor: FeatureExtractor | nn.Module = Inception(),
        every_n_steps: int | None = None,
        num_images: int = 10_000,
        batch_size: int = 256,
        sampler: Sampler | None = None,
        seed: int = 0,
        reference: str | None = None,
        cache_dir: str | None = None,
        at_start: bool = False,
    ) -> None:
        self.extractor = as_extractor(extractor)
        self.real = RealImages(self.extractor, reference, cache_dir)
        self.interval = Interval(every_n_steps, "frechet.every_n_steps")
        if num_images < 2:
            raise ValueError(f"frechet.num_images={num_images} must be at least 2, which a covariance needs")
        self.requests = Requests(num_images, batch_size, section="frechet")
        check_seed("frechet.seed", seed)
        self.sampler = sampler
        self.seed = seed
        self.at_start = at_start
        self.best: float | None = None
        self.best_step: int | None = None
        self._scored_at: int | None = None

    @property
    def name(self) -> str:
        """What the scalar is called."""
        return self.extractor.metric_name

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gets hold of the extractor's weights, or says on all processes why it cannot, before anything long starts."""
        if stage != "fit" or self.interval.steps is None or not isinstance(pl_module, DiffusionModule):
            return
        if self.sampler is not None:
            check_sampler(self.sampler, pl_module.process, "frechet")
        self.real.prepare(trainer)

    def score(self, trainer: L.Trainer, module: DiffusionModule, requests: Requests) -> float:
        """Generates all requested images over all processes and compares them; collective.

        Returns:
            The distance, the same on every process.

        Raises:
            ValueError: If not exactly the images asked for were counted.
        """
        reference = self.real.gaussian(trainer, module.device, requests.batch_size)
        self.extractor.to(module.device).eval()
        moments = FeatureMoments(self.extractor.num_features, module.device)
        with module.averaged_weights(), sampling_bar(trainer, module, requests, self.name), torch.no_grad():
            for request, count in requests.of_rank(trainer.global_rank, trainer.world_size):
                images = module.sample(request["index"].tolist(), self.seed, self.sampler)
                moments.update(outputs_in_memory(self.extractor, to_uint8(images[:count]))["features"])
        moments = moments.reduce(partial(reduce_sum, trainer))
        if moments.count != requests.num_images:
            raise ValueError(f"{self.name}: counted {moments.count} images instead of {requests.num_images}")
        mu, sigma = moments.mean_and_covariance()
        return frechet_distance(mu.cpu(), sigma.cpu(), reference.mu, reference.sigma)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval.start(trainer)
        if self.interval.steps is not None and isinstance(pl_module, DiffusionModule):
            self.real.gaussian(trainer, pl_module.device, self.requests.batch_size)
            if self.at_start and trainer.global_step == 0:
                self._score_and_log(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if self.interval.due(trainer) and isinstance(pl_module, DiffusionModule):
            value = self._score_and_log(trainer, pl_module)
            pl_module.log(self.name, value, prog_bar=True, logger=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = self._scored_at == trainer.global_step or trainer.interrupted
        if self.interval.steps is not None and not done and isinstance(pl_module, DiffusionModule):
            self._score_and_log(trainer, pl_module)

    def _score_and_log(self, trainer: L.Trainer, module: DiffusionModule) -> float:
        value = self.score(trainer, module, self.requests)
        self._scored_at = trainer.global_step
        log_metrics(trainer, {self.name: value, IMAGES_SEEN: images_seen(trainer)})
        rank_zero_info(f"step {trainer.global_step}: {self.name} {value:.4g} ({self.requests.num_images:,} images)")
        if self.best is None or value < self.best:
            before = self.best, self.best_step
            self.best, self.best_step = value, trainer.global_step
            try:
                trainer.save_checkpoint(Path(trainer.default_root_dir) / FOLDER / "best.ckpt", weights_only=False)
            except BaseException:
                self.best, self.best_step = before
                raise
        return value

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_step": self.best_step,
            "scored_at": self._scored_at,
            "score": [self.name, self.requests.num_images, self.seed],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("score") != self.state_dict()["score"]:
            # Another kind of score: its best says nothing of this one's.
            return
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        self._scored_at = state_dict["scored_at"]
