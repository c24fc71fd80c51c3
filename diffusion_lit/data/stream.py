"""Which images make up which batch: an endless stream for training, one pass for everything else."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Key(NamedTuple):
    """One image of a batch.

    Attributes:
        image: Index of the image.
        flip: Whether to mirror it.
        draw: Decides what differs each time that the image is read, such as which of its captions is taken; in
            training from 0 to 2^63 - 1, a function of (seed, position in the stream), elsewhere 0.
    """

    image: int
    flip: bool = False
    draw: int = 0


class TrainingStream(Sampler[list[Key]]):
    """An endless stream of training batches that is a pure function of (seed, position).

    Every epoch is a fresh permutation of the images, seeded by (seed, epoch), and epochs follow each other
    without a gap: no image is dropped, repeated or padded, and a batch may contain the end of one epoch and the
    beginning of the next (or several epochs, when the dataset is smaller than the batch). Micro-batch b of W
    processes and B images each is positions [b W B, (b + 1) W B), of which rank r takes its r-th B. Hence
    what a step sees does not depend on the number of processes, and a run that starts at micro-batch b is the
    tail of one that started at 0.

    Args:
        num_images: Images in the dataset.
        micro_batch: B, images per process and micro-batch.
        rank: This process, in [0, world_size).
        world_size: W, the number of processes.
        start: The first micro-batch, or a function that returns it, called at every new iteration.
        seed: Not negative.
        flip: Whether to mirror each image with probability 1/2. The order does not depend on it.

    Raises:
        ValueError: If there are no images.
    """

    def __init__(
        self,
        num_images: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        start: int | Callable[[], int] = 0,
        seed: int = 0,
        flip: bool = False,
    ) -> None:
        if num_images < 1:
            raise ValueError("there is no image to train on")
        self.num_images = num_images
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.seed = seed
        self.flip = flip
        self._epoch: tuple[int, tuple[np.ndarray, ...]] | None = None

    def __iter__(self) -> Iterator[list[Key]]:
        first = self.start() if callable(self.start) else self.start
        position = (first * self.world_size + self.rank) * self.micro_batch
        while True:
            yield self.keys(position, self.micro_batch)
            position += self.world_size * self.micro_batch

    def keys(self, position: int, count: int) -> list[Key]:
        """The `count` keys from `position` on, where position 0 is the first image of the first epoch."""
        keys: list[Key] = []
        while len(keys) < count:
            epoch, offset = divmod(position + len(keys), self.num_images)
            part = slice(offset, offset + count - len(keys))
            columns = [column[part].tolist() for column in self._shuffled(epoch)]
            keys += map(Key, *columns)
        return keys

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, ...]:
        """Indices, flips and draws of an epoch, in order, (num_images,) each."""
        if self._epoch is None or self._epoch[0] != epoch:
            for_order, for_flips, for_draws = np.random.SeedSequence([self.seed, epoch]).spawn(3)
            order = np.random.default_rng(for_order).permutation(self.num_images)
            flips = np.zeros(self.num_images, dtype=bool)
            if self.flip:
                flips = np.random.default_rng(for_flips).random(self.num_images) < 0.5
            draws = np.random.default_rng(for_draws).integers(2**63, size=self.num_images)
            self._epoch = epoch, (order, flips, draws)
        return self._epoch[1]


class OnePass(Sampler[list[Key]]):
    """Batches that contain every image exactly once over all processes, in order and not mirrored.

    Rank r takes images r, r + W, r + 2 W, ... and cuts them into batches whose sizes differ by at most one. All ranks
    have the same number of batches, at least one, so that no process waits for another that has fewer; a rank with
    fewer images than batches has empty ones.

    Args:
        num_images: Images in the dataset.
        batch_size: Most images in one batch of one process.
        rank: This process, in [0, world_size).
        world_size: W, the number of processes.
    """

    def __init__(self, num_images: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.share = range(rank, num_images, world_size)
        self.num_batches = max(1, math.ceil(math.ceil(num_images / world_size) / batch_size))

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Key]]:
        for i in range(self.num_batches):
            first, last = (j * len(self.share) // self.num_batches for j in (i, i + 1))
            yield [Key(index) for index in self.share[first:last]]
