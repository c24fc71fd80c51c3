"""Sets of images, and the data module that turns one into batches."""

import hashlib
import multiprocessing
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypedDict, cast, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from diffusion_lit.data.stream import Key, OnePass, TrainingStream
from diffusion_lit.images import from_uint8
from diffusion_lit.types import Batch

Split: TypeAlias = Literal["train", "val", "test"]


class CorruptImage(ValueError):
    """An image that is there but cannot be read.

    Args:
        message: One line: the file or key, and what is wrong with it.
        index: Which image of its set, -1 where that is not known.
    """

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


class CorruptImageWarning(UserWarning):
    """Names an image that was left out because it cannot be read."""


class ImageDataset(Dataset[tuple[Tensor, int | None]], ABC):
    """A set of square 8-bit images, numbered from 0, with labels for all of them or for none.

    Args:
        name: What messages call the set: "CIFAR-10 train".
        image_size: Height and width, pixels.
        channels: 1 or 3.
    """

    def __init__(self, name: str, image_size: int, channels: int) -> None:
        self.name = name
        self.image_size = image_size
        self.channels = channels

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Tensor, int | None]:
        """Reads one image.

        Returns:
            The image, uint8, (C, H, W), and its class if the set has classes.

        Raises:
            CorruptImage: If the image cannot be read.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that is the same for the same images and differs for others; it keys stored statistics."""

    def __getitem__(self, index: int) -> tuple[Tensor, int | None]:
        return self.read(index)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Reads several images: `image` uint8 (B, C, H, W), and `label` int64 (B,) if there are classes.

        Raises:
            CorruptImage: At the first image that cannot be read.
        """
        images, labels = [], []
        for index in indices:
            image, label = self.read(index)
            images.append(image)
            if label is not None:
                labels.append(label)
        if not images:
            return {"image": torch.empty(0, self.channels, self.image_size, self.image_size, dtype=torch.uint8)}
        batch: Batch = {"image": torch.stack(images)}
        if labels:
            batch["label"] = torch.tensor(labels)
        return batch


class InMemoryImages(ImageDataset):
    """Images held as one tensor, so that a batch is one gather.

    Args:
        name: What messages call the set.
        images: uint8, (N, C, H, H).
        labels: int64, (N,), or None where there are no classes.

    Raises:
        ValueError: If the images are not square 8-bit images, or the labels do not match them in number.
    """

    def __init__(self, name: str, images: Tensor, labels: Tensor | None = None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(f"{name}: expected uint8 (N, C, H, H), got {images.dtype} {tuple(images.shape)}")
        if labels is not None and labels.shape != (len(images),):
            raise ValueError(f"{name}: {len(images)} images, but labels of shape {tuple(labels.shape)}")
        super().__init__(name, image_size=images.shape[2], channels=images.shape[1])
        self.images = images.contiguous()
        self.labels = labels if labels is None else labels.long()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, int | None]:
        return self.images[index], None if self.labels is None else int(self.labels[index])

    def batch(self, indices: Sequence[int]) -> Batch:
        return self.gather(torch.tensor(indices, dtype=torch.int64))

    def gather(self, chosen: Tensor) -> Batch:
        """As `batch`, by a tensor of numbers, int64 (B,), on the device of the images."""
        batch: Batch = {"image": self.images.index_select(0, chosen)}
        if self.labels is not None:
            batch["label"] = self.labels.index_select(0, chosen)
        return batch

    def to(self, device: torch.device) -> "InMemoryImages":
        """The same images and labels on a device; themselves, where they are there."""
        return InMemoryImages(
            self.name, self.images.to(device), None if self.labels is None else self.labels.to(device)
        )

    def fingerprint(self) -> str:
        """SHA-256 over the shape and every pixel."""
        if self._fingerprint is None:
            digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
            digest.update(self.images.numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class Chosen(TypedDict):
    """Which images a batch has, where the images are on the device already.

    Attributes:
        index: int64, (B,).
        flip: Which of them to mirror, bool, (B,).
    """

    index: Tensor
    flip: Tensor


class Choices(Dataset[Chosen]):
    """Turns the keys of a training batch into tensors, and reads nothing."""

    def __getitem__(self, key: Key) -> Chosen:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Chosen:
        indices, flips = zip(*keys, strict=True)
        return {"index": torch.tensor(indices, dtype=torch.int64), "flip": torch.tensor(flips, dtype=torch.bool)}


class Batches(Dataset[Batch]):
    """Turns the keys of a batch into the batch, and leaves out what cannot be read.

    Args:
        images: Where the images come from.
        training: Whether batches say which images to mirror, and how an unreadable image is left out: in
            training the next readable one takes its place, so that shapes stay the same; otherwise the
            batch gets smaller, down to empty, so that no image counts twice.
        unreadable: Which images were found to be unreadable, bool, (N,), written to and shared with worker
            processes. None: an unreadable image is an error.
    """

    def __init__(self, images: ImageDataset, training: bool, unreadable: Tensor | None = None) -> None:
        self.images = images
        self.training = training
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Batch:
        return self.__getitems__([key])

    def __getitems__(self, keys: list[Key]) -> Batch:
        indices = [index for index, _ in keys]
        batch = self._read(indices)
        if self.training:
            batch["flip"] = torch.tensor([flip for _, flip in keys], dtype=torch.bool)
        return batch

    def _read(self, indices: list[int]) -> Batch:
        while True:
            try:
                return self.images.batch(self._readable(indices))
            except CorruptImage as error:
                if self.unreadable is None or error.index < 0:
                    raise
                if not self.unreadable[error.index]:
                    self.unreadable[error.index] = True
                    warnings.warn(f"left out: {error}", CorruptImageWarning, stacklevel=2)

    def _readable(self, indices: list[int]) -> list[int]:
        if self.unreadable is None or not self.unreadable.any():
            return indices
        if not self.training:
            return [index for index in indices if not self.unreadable[index]]
        if self.unreadable.all():
            raise CorruptImage(f"{self.images.name}: none of the {len(self)} images can be read")
        readable = []
        for index in indices:
            while self.unreadable[index]:
                index = (index + 1) % len(self)
            readable.append(index)
        return readable


class BatchLoader(DataLoader[Batch]):
    """A loader that passes over batches in which no image was readable."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return (batch for batch in super().__iter__() if "index" in batch or len(batch["image"]))


class ImageData(L.LightningDataModule, ABC):
    """Images for training, validation and testing.

    Batches are dicts. They leave the loader as 8 bits, `image` uint8 (B, C, H, W) with `label` int64 (B,)
    where there are classes and `flip` bool (B,) in training, and reach the model with `image` float (B, C, H,
    W) in [-1, 1], mirrored already, and without `flip`. Training batches come from a `TrainingStream`, which
    continues at the optimiser step that the trainer has reached; validation and test hold every image exactly
    once over all processes. The shards are cut here: the trainer needs `use_distributed_sampler=False`.

    Args:
        batch_size: Images per optimiser step, over all processes and accumulated micro-batches together, so
            that a recipe stays the same on other hardware.
        num_workers: Processes that read images. Sets held in memory need none and start none.
        flip: Whether to mirror training images left to right with probability 1/2.
        seed: Of the order and the mirroring of training images; not negative.
        on_corrupt: Whether an unreadable image is an error ("stop"), or is named in a warning, counted and
            left out ("skip").
        eval_batch_size: Most images per batch and process in validation and test.
        on_device: Whether the device that trains holds all training images, 8 bits each, so that a batch's numbers are
            all it is sent; for sets held in memory.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        flip: bool = True,
        seed: int = 0,
        on_corrupt: Literal["stop", "skip"] = "stop",
        eval_batch_size: int = 256,
        on_device: bool = False,
    ) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("eval_batch_size", eval_batch_size, 1)
        at_least("num_workers", num_workers, 0)
        at_least("seed", seed, 0)
        if on_corrupt not in ("stop", "skip"):
            raise ValueError(f"on_corrupt={on_corrupt!r} is neither 'stop' nor 'skip'; set --data.init_args.on_corrupt")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.flip = flip
        self.seed = seed
        self.on_corrupt = on_corrupt
        self.eval_batch_size = eval_batch_size
        self.on_device = on_device
        self._resident: InMemoryImages | None = None
        self._datasets: dict[Split, ImageDataset | None] = {}
        self._unreadable: dict[Split, Tensor] = {}

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W), known without touching the disk."""

    @abstractmethod
    def load(self, split: Split) -> ImageDataset | None:
        """Opens one part of the data; called once per part and process.

        Returns:
            The images, or None if the data have no such part.

        Raises:
            FileNotFoundError: If the images are not where they should be.
            ValueError: If what is there cannot be used.
        """

    def setup(self, stage: str | None = None) -> None:
        if stage in ("fit", None):
            self.micro_batch()
            images = self.dataset("train")
            if self.on_device and not isinstance(images, InMemoryImages):
                raise ValueError(
                    f"on_device=true, but {images.name} is read as needed; set --data.init_args.on_device false, or "
                    "hold the set in memory"
                )
            self._load("val")
        elif stage == "validate":
            self.dataset("val")
        elif stage == "test":
            self._load("test")

    def dataset(self, split: Split) -> ImageDataset:
        """The images of one part, opened on first use.

        Raises:
            ValueError: If there is no such part.
        """
        images = self._load(split)
        if images is None:
            raise ValueError(f"{type(self).__name__} has no {split} images{self.remedy(split)}")
        return images

    def parts(self) -> list[Split]:
        """The parts that there are."""
        return [split for split in get_args(Split) if self._load(split) is not None]

    def remedy(self, split: Split) -> str:
        """What to do about a missing part, to be appended to the error: "; set ..."."""
        return ""

    def micro_batch(self) -> int:
        """Images per process and micro-batch: batch_size / (processes x accumulated micro-batches).

        Raises:
            ValueError: If that is not a whole number.
        """
        _, world_size = self._place()
        accumulate = 1 if self.trainer is None else self.trainer.accumulate_grad_batches
        parts = world_size * accumulate
        if self.batch_size % parts:
            below = self.batch_size // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise ValueError(
                f"batch_size={self.batch_size}, the images of one optimiser step, does not divide over "
                f"{world_size} processes x {accumulate} accumulated micro-batches; "
                f"set --data.init_args.batch_size to {nearest}"
            )
        return self.batch_size // parts

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world_size = self._place()
        images = self.dataset("train")
        stream = TrainingStream(
            len(images), self.micro_batch(), rank, world_size, self._micro_batches_done, self.seed, self.flip
        )
        return self._loader("train", stream, training=True)

    def images_of_step(self, step: int) -> list[int]:
        """Which training images an optimiser step sees, of all processes and micro-batches, in order.

        Args:
            step: At least 1.
        """
        stream = TrainingStream(len(self.dataset("train")), self.batch_size, seed=self.seed)
        return [index for index, _ in stream.keys((step - 1) * self.batch_size, self.batch_size)]

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """One pass over the validation images; if there are none, Lightning's way to skip it: []."""
        if self._load("val") is None:
            warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
            return []
        return self._loader("val", self._one_pass("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        """One pass over the test images; if there are none, one empty batch: a test scores generated images too."""
        if self._load("test") is None:
            nothing = InMemoryImages("no test images", torch.empty(0, *self.image_shape, dtype=torch.uint8))
            return BatchLoader(Batches(nothing, training=False), batch_sampler=[[]], collate_fn=as_is)
        return self._loader("test", self._one_pass("test"))

    def on_after_batch_transfer(self, batch: Batch | Chosen, dataloader_idx: int) -> Batch:
        """Mirrors and scales on the device, uint8 to float in [-1, 1]; takes the images from there, if they are."""
        flip = batch.get("flip")
        whole = self._gathered(cast(Chosen, batch)["index"]) if "index" in batch else batch
        image = whole["image"]
        if flip is not None:
            image = torch.where(flip[:, None, None, None], image.flip(-1), image)
        ready: Batch = {"image": from_uint8(image)}
        if "label" in whole:
            ready["label"] = whole["label"]
        return ready

    def _gathered(self, index: Tensor) -> Batch:
        if self._resident is None or self._resident.images.device != index.device:
            images = self.dataset("train")
            if not isinstance(images, InMemoryImages):
                raise TypeError(f"{images.name} is not held in memory")
            self._resident = images.to(index.device)
        return self._resident.gather(index)

    def reference_batches(
        self, rank: int, world_size: int, batch_size: int, split: Split = "train"
    ) -> Iterator[Tensor]:
        """Every image of a part once, as stored, for reference statistics; see `num_images` for the exact
        count.

        Args:
            rank: This process, in [0, world_size); it gets images rank, rank + world_size, ...
            world_size: Processes that share the pass.
            batch_size: Most images in one batch.
            split: Which part.

        Yields:
            uint8, (B, C, H, W), unmirrored, 1 <= B <= batch_size.
        """
        for batch in self.stored_batches(rank, world_size, batch_size, split):
            yield batch["image"]

    def some(self, indices: Sequence[int], split: Split = "train") -> Batch:
        """Images of a part by number, as stored: `image` uint8 (B, C, H, W), and `label` where there are classes.

        Where unreadable images are left out, B is smaller.
        """
        images = self.dataset(split)
        batches = Batches(images, training=False, unreadable=self._unreadable.get(split))
        return batches.__getitems__([(index, False) for index in indices])

    def stored_batches(self, rank: int, world_size: int, batch_size: int, split: Split = "train") -> Iterator[Batch]:
        """As `reference_batches`, with labels where there are classes."""
        sampler = OnePass(len(self.dataset(split)), batch_size, rank, world_size)
        yield from self._loader(split, sampler, keep_workers=False)

    def num_images(self, split: Split = "train", rank: int = 0, world_size: int = 1) -> int:
        """Readable images in a process's share of a part: what `reference_batches` has yielded at its end.

        Images count as readable until they were found not to be, so ask after the pass.
        """
        share = range(rank, len(self.dataset(split)), world_size)
        return len(share) - sum(index in share for index in self.corrupt(split))

    def corrupt(self, split: Split = "train") -> list[int]:
        """The images that this process and its workers have found unreadable so far and left out."""
        flags = self._unreadable.get(split)
        return [] if flags is None else [int(index) for index in flags.nonzero().flatten()]

    def fingerprint(self, split: Split = "train") -> str:
        """Tells these images from others; see `ImageDataset.fingerprint`."""
        return self.dataset(split).fingerprint()

    def _load(self, split: Split) -> ImageDataset | None:
        if split not in self._datasets:
            images = self.load(split)
            self._datasets[split] = images
            if images is not None:
                where = "in memory" if isinstance(images, InMemoryImages) else "read as needed"
                size = " x ".join(str(n) for n in (images.channels, images.image_size, images.image_size))
                rank_zero_info(f"{images.name}: {len(images):,} images, {size}, {where}")
                shared = self._workers(images) > 0
                if shared:
                    require_shared_memory(self.num_workers)
                if self.on_corrupt == "skip":
                    flags = torch.zeros(len(images), dtype=torch.bool)
                    self._unreadable[split] = flags.share_memory_() if shared else flags  # type: ignore[no-untyped-call]
        return self._datasets[split]

    def _workers(self, images: ImageDataset) -> int:
        return 0 if isinstance(images, InMemoryImages) else self.num_workers

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _micro_batches_done(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_step * self.trainer.accumulate_grad_batches

    def _one_pass(self, split: Split) -> OnePass:
        rank, world_size = self._place()
        return OnePass(len(self.dataset(split)), self.eval_batch_size, rank, world_size)

    def _loader(
        self, split: Split, batches: Sampler[list[Key]], training: bool = False, keep_workers: bool = True
    ) -> DataLoader[Batch]:
        images = self.dataset(split)
        if isinstance(images, InMemoryImages):
            # Lightning advises more workers; for one gather per batch they only cost.
            warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")
        num_workers = self._workers(images)
        on_cuda = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        resident = training and self.on_device and isinstance(images, InMemoryImages)
        return BatchLoader(
            cast(Dataset[Batch], Choices()) if resident else Batches(images, training, self._unreadable.get(split)),
            batch_sampler=batches,
            collate_fn=as_is,
            num_workers=num_workers,
            persistent_workers=keep_workers and num_workers > 0,
            pin_memory=on_cuda,
            # Its workers' seed is drawn from here, so that iterating leaves the model's noise as it is.
            generator=torch.Generator().manual_seed(self.seed),
        )


def as_is(batch: Any) -> Any:
    """The collate function of a data set that makes whole batches."""
    return batch


def require_shared_memory(num_workers: int) -> None:
    """Refuses worker processes where the system gives them nothing to share batches by.

    Raises:
        ValueError: If there is no shared memory.
    """
    try:
        multiprocessing.Lock()
    except OSError as error:
        raise ValueError(
            f"num_workers={num_workers} needs shared memory, and /dev/shm cannot be used ({error.strerror}); "
            "set data.init_args.num_workers=0"
        ) from error


def at_least(name: str, value: int, bound: int) -> None:
    """Refuses a setting of the data module that is too small.

    Raises:
        ValueError: If `value` is below `bound`.
    """
    if value < bound:
        raise ValueError(f"{name}={value} is below {bound}; raise --data.init_args.{name}")
