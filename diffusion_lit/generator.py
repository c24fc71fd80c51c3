"""The base of every system that makes images, and which process makes which of them."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusion_lit.diffusion import Gaussian, ImageNoise, Sampler
from diffusion_lit.images import to_uint8
from diffusion_lit.lightning import attached_trainer
from diffusion_lit.memory import in_memory, shift_steps
from diffusion_lit.records import NonFinite
from diffusion_lit.system import System
from diffusion_lit.types import Condition, StepFn


class Request(TypedDict):
    """One batch of images to generate.

    Attributes:
        index: Which images, int64, (B,); indices beyond the number asked for only fill the batch.
        seed: Of the noise.
        condition: What each image shows, (B, ...) each; empty: the generator's own choice.
    """

    index: Tensor
    seed: int
    condition: Condition


class Generated(TypedDict):
    """What `predict_step` returns: `index` int64 (B,), `image` uint8 (B, C, H, W), and the condition asked for."""

    index: Tensor
    image: Tensor
    condition: Condition


class Requests(Dataset[Request]):
    """Images 0 .. num_images - 1 in batches of one size; the last is filled up with further images.

    Batch b holds images b * batch_size and following, whatever the number of processes, so that the arithmetic of
    every image is the same with one process and with many.

    Args:
        num_images: At least 1.
        batch_size: Images made at once by one process, at least 1.
        conditions: N conditions, (N, ...) each; image i shows that of i modulo N. Empty: the generator's own choice.
        seed: Of the noise.
        section: Of the configuration that the numbers are from, for messages.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        conditions: Condition | None = None,
        seed: int = 0,
        section: str | None = None,
    ) -> None:
        prefix = "" if section is None else f"{section}."
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{prefix}{name}={value} must be at least 1")
        if not 0 <= seed < 2**64:
            raise ValueError(f"{prefix}seed={seed} must lie in 0 .. 2^64 - 1")
        self.num_images = num_images
        self.batch_size = batch_size
        self.conditions = dict(conditions or {})
        self.seed = seed

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __getitem__(self, batch: int) -> Request:
        """Batch `batch`; that of number `len(self)` is empty, for processes that have no other."""
        if not 0 <= batch <= len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        start = batch * self.batch_size
        index = torch.arange(start, start + (self.batch_size if batch < len(self) else 0))
        return {"index": index, "seed": self.seed, "condition": choose_conditions(self.conditions, index)}

    def share(self, rank: int, world_size: int) -> range:
        """The batches of one of `world_size` processes; there may be none."""
        return range(rank, len(self), world_size)

    def batches(self, rank: int, world_size: int) -> Iterator[tuple[Request, int]]:
        """The batches of one process, each with the number of its images that were asked for."""
        for batch in self.share(rank, world_size):
            yield self[batch], min(self.batch_size, self.num_images - batch * self.batch_size)

    def loader(self, rank: int, world_size: int) -> DataLoader[Request]:
        """A data loader over the batches of one process; where it has none, over an empty one."""
        return DataLoader(
            self, batch_size=None, sampler=self.share(rank, world_size) or range(len(self), len(self) + 1)
        )


def choose_conditions(conditions: Condition, index: Tensor) -> dict[str, Tensor]:
    """The condition of each image: of N conditions, image i has that of i modulo N."""
    return {name: values[index % len(values)] for name, values in conditions.items()}


class Generator(System):
    """A system that makes images; image i depends on (seed, i) and its condition alone.

    Attributes:
        sampler: Draws images unless another is given; None: the system needs none.
    """

    predicts: ClassVar[bool] = True
    sampler: Sampler | None = None

    @abstractmethod
    def generate(
        self, noise: ImageNoise, condition: Condition, sampler: Sampler | None, on_step: StepFn | None = None
    ) -> Tensor:
        """Turns noise into images with the weights that the system holds; called in evaluation mode, no gradients.

        Args:
            noise: Gives draw after draw for each of the B images.
            condition: What they show, (B, ...) each, as a batch of the data has it.
            sampler: Draws them.
            on_step: Called after every sampling step.

        Returns:
            Images, (B, C, H, W), nominally in [-1, 1].

        Raises:
            ValueError: If the condition does not fit the system.
        """

    @abstractmethod
    def check_sampler(self, sampler: Sampler) -> None:
        """Raises ValueError if images cannot be drawn by this sampler; a system that needs none ignores it."""

    @abstractmethod
    def described(self, sampler: Sampler | None) -> dict[str, Any]:
        """All that image i depends on besides the weights, the seed and i, as plain data for the key of a result."""

    @abstractmethod
    def evaluations(self, sampler: Sampler | None) -> int:
        """Network evaluations per image."""

    def noise(self, indices: Sequence[int], seed: int) -> ImageNoise:
        """Noise of images, a function of (seed, index, number of the draw)."""
        return Gaussian().images(seed, indices, self.image_shape, self.device)

    def conditions(self) -> Condition:
        """What images show by default: image i has condition i modulo N of these N, (N, ...) each."""
        if self.num_classes is None:
            return {}
        trained = self.num_classes if self.class_names is None else len(self.class_names)
        return {"label": torch.arange(min(self.num_classes, trained))}

    def sample(
        self,
        indices: Sequence[int],
        seed: int = 0,
        sampler: Sampler | None = None,
        condition: Condition | None = None,
        on_step: StepFn | None = None,
    ) -> Tensor:
        """Generates images with the weights that the system holds.

        Where memory does not suffice for all of them at once, half as many are made at a time from then on; images are
        the same up to rounding, because each depends on the seed, its index and its condition alone.

        Args:
            indices: Which images, (B,); image i depends on the seed and i alone.
            seed: At least 0.
            sampler: Another sampler than the system's own.
            condition: What images show, (B, ...) each; None: that of i modulo N of `conditions`; {}: nothing, where
                the network can do without.
            on_step: Called after every sampling step.

        Returns:
            Images, (B, C, H, W), nominally in [-1, 1], on the system's device.

        Raises:
            ValueError: If the condition does not fit the system.
            NonFinite: If a value of an image is infinite or not a number.
            torch.OutOfMemoryError: If memory does not suffice for a single image.
        """
        if not len(indices):
            return torch.empty(0, *self.image_shape, device=self.device)
        index = torch.tensor(indices)
        given = choose_conditions(self.conditions(), index) if condition is None else condition

        def work(chosen: slice, part: int, num_parts: int) -> Tensor:
            return self.generate(
                self.noise(indices[chosen], seed),
                {name: value[chosen] for name, value in given.items()},
                sampler or self.sampler,
                shift_steps(on_step, part, num_parts),
            )

        at_once = min(self._at_once or len(indices), len(indices))
        with self.evaluating():
            images, suffices = in_memory(work, len(indices), at_once, "while sampling")
        if suffices < at_once:
            self._at_once = suffices
        return check_finite(torch.cat(images), indices, seed)

    _at_once: int | None = None

    def predict_step(self, batch: Request, batch_idx: int) -> Generated:
        condition = batch["condition"] or choose_conditions(self.conditions(), batch["index"].cpu())
        trainer = attached_trainer(self)
        bar = None if trainer is None else trainer.progress_bar_callback
        with self.averaged_weights():
            images = self.sample(
                batch["index"].tolist(),
                batch["seed"],
                condition=condition,
                on_step=getattr(bar, "on_sampling_step", None),
            )
        return {"index": batch["index"], "image": to_uint8(images), "condition": condition}


def check_finite(images: Tensor, indices: Sequence[int], seed: int) -> Tensor:
    """Returns images, (B, C, H, W), of these indices; raises NonFinite if a value is infinite or not a number."""
    finite = images.flatten(1).isfinite().all(1).tolist()
    if not all(finite):
        wrong = [str(index) for index, is_finite in zip(indices, finite, strict=True) if not is_finite]
        raise NonFinite(
            f"{len(wrong)} of {len(finite)} images have values that are not finite (seed {seed}, images "
            f"{', '.join(wrong[:8])}{', ...' if len(wrong) > 8 else ''}); look at the model's loss, or take more "
            "steps, a smaller guidance scale or --trainer.precision 32-true"
        )
    return images


def check_labels(labels: Tensor, num_classes: int | None) -> None:
    """Raises ValueError if a model with this many classes, None for an unconditional one, cannot show these labels."""
    if num_classes is None:
        raise ValueError("labels: the model is unconditional and cannot be asked for a class; leave labels out")
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"labels: {int(wrong[0])} must lie in 0 .. {num_classes - 1}, the model's {num_classes} classes"
        )


def parse_labels(
    labels: str | Sequence[int] | None, per_class: int | None, num_classes: int | None, class_names: Sequence[str] = ()
) -> list[int] | None:
    """Which classes to generate, in order; None: none in particular.

    Args:
        labels: Classes one after the other, "3,3,7", "frog,7" or numbers.
        per_class: Instead, this many images of every class, class by class.
        num_classes: The model's; None if it is unconditional.
        class_names: Names that may stand for numbers, in the order of the classes.

    Raises:
        ValueError: If both are given, something is no class or out of range, or the model is unconditional.
    """
    if labels is None and per_class is None:
        return None
    if labels is not None and per_class is not None:
        raise ValueError(f"labels={labels} and per_class={per_class} exclude each other; give one of them")
    if per_class is not None:
        if per_class < 1:
            raise ValueError(f"per_class={per_class} must be at least 1")
        check_labels(torch.zeros(0), num_classes)
        return [label for label in range(num_classes or 0) for _ in range(per_class)]
    words = [word.strip() for word in labels.strip("[] ").split(",")] if isinstance(labels, str) else labels or []
    known: Mapping[str, int] = {name: number for number, name in enumerate(class_names)}
    try:
        numbers = [known[word] if word in known else int(word) for word in words]  # type: ignore[index]
    except ValueError:
        numbers = []
    if not numbers:
        names = f"; its classes are {', '.join(list(class_names)[:20])}" if class_names else ""
        raise ValueError(f"labels={labels!r} must be classes between commas, such as --labels 3,3,7{names}")
    check_labels(torch.tensor(numbers), num_classes)
    return numbers
