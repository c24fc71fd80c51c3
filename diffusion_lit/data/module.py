"""The data module: batches of any source's images for training, validation and testing."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from diffusion_lit.data.batches import Batches, as_is, require_shared_memory
from diffusion_lit.data.dataset import ImageDataset, InMemoryImages, Split
from diffusion_lit.data.source import Source, at_least
from diffusion_lit.data.stream import Key, OnePass, TrainingStream
from diffusion_lit.images import scaled
from diffusion_lit.types import Batch, Part

MOST_IMAGES = 2**24
"""The largest batch; its indices alone take a second to draw."""
SPATIAL = ("image", "map", "low_res", "mask")
"""Entries of a batch that are mirrored together."""


class ImageData(L.LightningDataModule, Part):
    """Batches of images for training, validation and testing.

    A batch is a dict. As it leaves the loader, `image` is uint8 (B, C, H, W), `label` int64 (B,) if there are classes,
    and `flip` bool (B,) in training; a dataset may add `caption`, `map`, `low_res`, `mask` and `moments`; these may
    stand in place of `image`. As it reaches the model, `image` is float (B, C, H, W) in [-1, 1], the spatial entries
    are mirrored, `moments` are those of the image or of its mirror image, and `flip` is gone.

    Training batches come from a `TrainingStream`, which continues at the optimiser step that the trainer has reached.
    Validation and testing see every image exactly once over all processes, in the same number of batches on each, of
    which some may be empty. The data module divides the images among the processes itself: the trainer needs
    `use_distributed_sampler=False`.

    Args:
        source: Where the images come from.
        batch_size: Images per optimiser step, over all processes and accumulated micro-batches together, so that a
            recipe stays the same on other hardware.
        num_workers: Worker processes that read images. Datasets in memory start none.
        flip: Whether to mirror training images left to right with probability 1/2. None: the source's default, which is
            true for all but `Digits`.
        seed: Seeds the order and the mirroring of training images; not negative.
        on_corrupt: Whether an unreadable image is an error ("stop"), or is named in a warning, counted and left out
            ("skip").
        eval_batch_size: Most images per batch and process in validation and testing. None: the source's default, which
            is 256 for all but `LSUN`, where it is 64.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int = 128,
        num_workers: int = 0,
        flip: bool | None = None,
        seed: int = 0,
        on_corrupt: Literal["stop", "skip"] = "stop",
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        if batch_size > MOST_IMAGES:
            raise ValueError(f"batch_size={batch_size} must be at most {MOST_IMAGES}; set --data.batch_size")
        at_least("num_workers", num_workers, 0)
        at_least("seed", seed, 0)
        if eval_batch_size is not None:
            at_least("eval_batch_size", eval_batch_size, 1)
        if on_corrupt not in ("stop", "skip"):
            raise ValueError(f"on_corrupt={on_corrupt!r} is neither 'stop' nor 'skip'; set --data.on_corrupt")
        self.source = source
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.flip = source.flips if flip is None else flip
        self.seed = seed
        self.on_corrupt = on_corrupt
        self.eval_batch_size = source.eval_batch_size if eval_batch_size is None else eval_batch_size
        self._datasets: dict[Split, ImageDataset | None] = {}
        self._unreadable: dict[Split, Tensor] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), known without reading the disk."""
        return self.source.image_shape

    @property
    def gives_pixels(self) -> bool:
        """Whether batches of training, validation and testing have `image`; else they have `moments` instead."""
        return self.source.gives_pixels

    @property
    def class_names(self) -> Sequence[str] | None:
        """Names of the classes, in the order of the labels; None if there are none. All splits have the same."""
        loaded = next((images for images in self._datasets.values() if images is not None), None)
        return (self.dataset("train") if loaded is None else loaded).class_names

    def prepare_data(self) -> None:
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:
        if stage in ("fit", None):
            self.micro_batch()
            self.dataset("train")
            self._load("val")
        elif stage == "validate":
            self.dataset("val")
        elif stage == "test":
            self._load("test")

    def dataset(self, split: Split) -> ImageDataset:
        """The images of one split, opened on first use.

        Raises:
            ValueError: If there is no such split.
        """
        images = self._load(split)
        if images is None:
            raise ValueError(f"{type(self.source).__name__} has no {split} images{self.source.remedy(split)}")
        return images

    def parts(self) -> list[Split]:
        """The splits that exist."""
        return [split for split in get_args(Split) if self.has(split)]

    def has(self, split: Split) -> bool:
        """Whether there is such a split; it is opened."""
        return self._load(split) is not None

    def micro_batch(self) -> int:
        """Images per process and micro-batch: batch_size / (processes x accumulated micro-batches).

        Raises:
            ValueError: If that is not a whole number.
        """
        _, world_size = self._rank_and_world_size()
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        parts = world_size * accumulate
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise ValueError(
                f"batch_size={self.batch_size}, the images of one optimiser step, is not a multiple of "
                f"{world_size} processes x {accumulate} accumulated micro-batches; set --data.batch_size to {nearest}"
            )
        return self.batch_size // parts

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world_size = self._rank_and_world_size()
        images = self.dataset("train")
        stream = TrainingStream(
            len(images), self.micro_batch(), rank, world_size, self._micro_batches_done, self.seed, self.flip
        )
        return self._loader("train", stream, training=True, pixels=self.gives_pixels)

    def images_of_step(self, step: int) -> list[int]:
        """Indices of the training images of one optimiser step, over all processes and micro-batches, in order.

        Args:
            step: At least 1.
        """
        stream = TrainingStream(len(self.dataset("train")), self.batch_size, seed=self.seed)
        return [key.image for key in stream.keys((step - 1) * self.batch_size, self.batch_size)]

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """One pass over the validation images; [], by which Lightning skips validation, if there are none."""
        if self._load("val") is None:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return self._loader("val", self._one_pass("val"), pixels=self.gives_pixels)

    def test_dataloader(self) -> DataLoader[Batch]:
        """One pass over the test images; one empty batch if there are none, since `test` also scores generated ones."""
        if self._load("test") is None:
            nothing = InMemoryImages("no test images", torch.empty(0, *self.image_shape, dtype=torch.uint8))
            return DataLoader(Batches(nothing, training=False), batch_sampler=[[]], collate_fn=as_is)
        return self._loader("test", self._one_pass("test"), pixels=self.gives_pixels)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Mirrors the spatial entries on the device, and scales them: see `images.scaled`."""
        ready = cast(dict[str, Tensor], dict(batch))
        flip = ready.pop("flip", None)
        if "moments" in ready:
            # An encoder does not commute with mirroring, so that both are stored.
            both = ready["moments"]
            ready["moments"] = both[:, 0] if flip is None else both[torch.arange(len(flip)), flip.long()]
        if flip is not None:
            for key in SPATIAL:
                if key in ready:
                    entry = ready[key]
                    chosen = flip.view(-1, *[1] * (entry.ndim - 1))
                    ready[key] = torch.where(chosen, entry.flip(-1), entry)
        return cast(Batch, scaled(ready))

    def stored_batches(self, rank: int, world_size: int, batch_size: int, split: Split = "train") -> Iterator[Batch]:
        """Every image of a split once, as stored, such as for reference statistics.

        Args:
            rank: This process, in [0, world_size); it gets images rank, rank + world_size, ...
            world_size: Number of processes.
            batch_size: Most images in one batch.
            split: Which split.

        Yields:
            `image` uint8 (B, C, H, W), not mirrored, 1 <= B <= batch_size, and what else the dataset has; nothing if
            the process has no readable image. `num_images` gives their exact number afterwards.
        """
        sampler = OnePass(len(self.dataset(split)), batch_size, rank, world_size)
        for batch in self._loader(split, sampler, keep_workers=False):
            if len(batch["image"]):
                yield batch

    def some(self, indices: Sequence[int], split: Split = "train") -> Batch:
        """Images of a split by index, as stored: `image` uint8 (B, C, H, W), and what else the dataset has.

        B is smaller where unreadable images are left out.
        """
        batches = Batches(self.dataset(split), training=False, unreadable=self._unreadable.get(split))
        return batches.__getitems__([Key(index) for index in indices])

    def examples(self, indices: Sequence[int], split: Split) -> Batch:
        """Examples of a split by index, as a model takes them, (B, ...) each.

        As in training, the next readable image takes the place of one that cannot be read.
        """
        batches = Batches(self.dataset(split), training=True, unreadable=self._unreadable.get(split))
        batch = cast(dict[str, Tensor], batches.__getitems__([Key(index) for index in indices]))
        del batch["flip"]
        if "moments" in batch:
            batch["moments"] = batch["moments"][:, 0]
        return cast(Batch, scaled(batch))

    def num_images(self, split: Split = "train", rank: int = 0, world_size: int = 1) -> int:
        """Readable images in a process's share of a split: as many as `stored_batches` has yielded.

        An image counts as readable until it was found not to be, so call this after the pass.
        """
        share = range(rank, len(self.dataset(split)), world_size)
        return len(share) - sum(index in share for index in self.corrupt(split))

    def corrupt(self, split: Split = "train") -> list[int]:
        """Indices of the images that this process and its workers have found unreadable so far and left out."""
        flags = self._unreadable.get(split)
        return [] if flags is None else [int(index) for index in flags.nonzero().flatten()]

    def fingerprint(self, split: Split = "train") -> str:
        """A hash that identifies the images of a split; see `ImageDataset.fingerprint`."""
        return self.dataset(split).fingerprint()

    def _load(self, split: Split) -> ImageDataset | None:
        if split not in self._datasets:
            images = self.source.load(split)
            self._datasets[split] = None if images is None else self._opened(split, images)
        return self._datasets[split]

    def _opened(self, split: Split, images: ImageDataset) -> ImageDataset:
        images = images.preload(skip_corrupt=self.on_corrupt == "skip")
        where = "in memory" if isinstance(images, InMemoryImages) else "read as needed"
        size = " x ".join(str(n) for n in (images.channels, images.image_size, images.image_size))
        rank_zero_info(f"{images.name}: {len(images):,} images, {size}, {where}")
        shared = self._workers(images) > 0
        if shared:
            require_shared_memory(self.num_workers)
        if self.on_corrupt == "skip":
            flags = torch.zeros(len(images), dtype=torch.bool)
            self._unreadable[split] = flags.share_memory_() if shared else flags  # type: ignore[no-untyped-call]
        return images

    def _workers(self, images: ImageDataset) -> int:
        return 0 if isinstance(images, InMemoryImages) else self.num_workers

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _micro_batches_done(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step * self.trainer.accumulate_grad_batches

    def _one_pass(self, split: Split) -> OnePass:
        rank, world_size = self._rank_and_world_size()
        return OnePass(len(self.dataset(split)), self.eval_batch_size, rank, world_size)

    def _loader(
        self,
        split: Split,
        batches: Sampler[list[Key]],
        training: bool = False,
        keep_workers: bool = True,
        pixels: bool = True,
    ) -> DataLoader[Batch]:
        images = self.dataset(split)
        if isinstance(images, InMemoryImages):
            # Lightning advises more workers; for one gather per batch they only cost time.
            warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
        num_workers = self._workers(images)
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return DataLoader(
            Batches(images, training, self._unreadable.get(split), pixels),
            batch_sampler=cast(Any, batches),
            collate_fn=as_is,
            num_workers=num_workers,
            persistent_workers=keep_workers and num_workers > 0,
            pin_memory=on_cuda,
            # Seeds of worker processes are drawn from here, so that iterating leaves the model's random state alone.
            generator=torch.Generator().manual_seed(self.seed),
        )
