"""The real images that generated ones are compared with, over all processes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from diffusion_lit.callbacks.collective import on_rank_zero, raise_together, reduce_sum
from diffusion_lit.callbacks.progress import counting_bar
from diffusion_lit.data import ImageData
from diffusion_lit.data.dataset import Split
from diffusion_lit.evaluation.partial import PartialResults
from diffusion_lit.files import default_cache_dir
from diffusion_lit.metrics.features import FeatureExtractor, outputs_in_memory
from diffusion_lit.metrics.reference import (
    Reference,
    cache_path,
    cached_reference,
    compute_reference,
)
from diffusion_lit.records import key_of
from diffusion_lit.types import Batch

BATCH = 250


class RealImages:
    """All images of a split, unflipped, as one extractor sees them.

    Args:
        extractor: Makes features of 8-bit images.
        reference: An .npz file with mu and sigma; None: computed from the images, once, and kept.
        cache_dir: Where what was computed is kept; None: $DIFFUSION_LIT_CACHE or ~/.cache/diffusion_lit.
        split: Which images.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference: str | None = None,
        cache_dir: str | None = None,
        split: Split = "train",
    ) -> None:
        self.split = split
        self.extractor = extractor
        self.reference_file = reference
        self.cache_dir = cache_dir
        self._gaussian: Reference | None = None

    def prepare(self, trainer: L.Trainer) -> None:
        """Loads the extractor's weights, or raises on all processes, before anything long starts.

        Raises:
            FileNotFoundError: If the reference file is not there.
            RuntimeError: If the weights cannot be had.
        """
        if self.reference_file is not None and not Path(self.reference_file).is_file():
            raise FileNotFoundError(f"evaluation.reference={self.reference_file}: there is no such file")
        on_rank_zero(trainer, self.extractor.prepare, per_machine=True)
        self.extractor.prepare()

    def data(self, trainer: L.Trainer) -> ImageData:
        """The trainer's data; raises ValueError if it has none."""
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageData):
            raise ValueError("a score needs real images: give --data, or statistics by --evaluation.reference")
        return data

    def gaussian(self, trainer: L.Trainer, device: torch.device) -> Reference:
        """Mean and covariance: from the given file, from the cache, or computed by all processes; collective."""
        if self._gaussian is not None:
            return self._gaussian
        self.extractor.to(device)
        if self.reference_file is not None:
            self._gaussian = Reference.load(self.reference_file, self.extractor)
            return self._gaussian
        data = self.data(trainer)
        images = data.dataset(self.split)
        sums, process = partial(reduce_sum, trainer), (trainer.global_rank, trainer.world_size)
        path = cache_path(self.cache_dir, images.fingerprint(), self.extractor.fingerprint(), images.image_size)

        def compute() -> Reference:
            name = self.extractor.metric_name
            rank_zero_info(f"{name}: computing reference statistics of {images.name}, {len(images):,} images")
            with counting_bar(trainer, len(images), "real images") as count:
                counted = images_of(data.stored_batches(*process, BATCH, self.split), count)
                readable = partial(data.num_images, self.split, *process)
                return compute_reference(counted, self.extractor, device, sums, readable, images.name)

        self._gaussian = cached_reference(path, compute, self.extractor, device, sums, write=trainer.local_rank == 0)
        return self._gaussian

    def _folder(self) -> Path:
        return (default_cache_dir() if self.cache_dir is None else Path(self.cache_dir).expanduser()) / "features"

    def require_folder(self) -> None:
        """Raises ValueError if features cannot be kept."""
        try:
            self._folder().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{self._folder()} cannot hold features of real images ({error.strerror}); choose another folder by "
                "--evaluation.cache_dir or $DIFFUSION_LIT_CACHE"
            ) from error

    def features(self, trainer: L.Trainer, device: torch.device, count: int) -> dict[str, Tensor]:
        """Features of `count` images; collective.

        Which images is drawn once and for all; all of them where there are no more. Kept where statistics are.

        Returns:
            On the CPU: "features", (M, D), float32, and "label", int64 (M,), if the images have classes.
        """
        data = self.data(trainer)
        images = data.dataset(self.split)
        count = min(count, len(images))
        key = {
            "images": images.fingerprint(),
            "resolution": images.image_size,
            "extractor": self.extractor.fingerprint(),
            "count": count,
        }
        kept = PartialResults(self._folder() / key_of(key), key)
        with raise_together(trainer):
            if trainer.local_rank == 0:
                kept.open()
        self.extractor.to(device).eval()
        batches = choose_batches(len(images), count)
        with raise_together(trainer), counting_bar(trainer, count, "real images") as counted:
            for number in range(trainer.global_rank, len(batches), trainer.world_size):
                if not kept.done(number):
                    batch = data.some(batches[number], self.split)
                    features = outputs_in_memory(self.extractor, batch["image"].to(device))["features"]
                    labels = {"label": batch["label"]} if "label" in batch else {}
                    kept.save(number, {"features": features, **labels})
                counted(len(batches[number]))
        return kept.columns(len(batches))


def images_of(batches: Iterable[Batch], done: Callable[[int], object]) -> Iterator[Tensor]:
    """The images of batches; `done` is called with the number of each once they have been used."""
    for batch in batches:
        yield batch["image"]
        done(len(batch["image"]))


def choose_batches(available: int, count: int) -> Sequence[list[int]]:
    """`count` of the numbers below `available`, always the same ones, in batches; all of them are in order."""
    order = np.random.default_rng(0).permutation(available)[:count] if count < available else np.arange(available)
    return [order[start : start + BATCH].tolist() for start in range(0, count, BATCH)]
