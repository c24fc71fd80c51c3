"""The base of every system that makes images."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypedDict

import lightning.pytorch as L
import torch
from torch import Tensor

from diffusion_lit.data import ImageData
from diffusion_lit.diffusion import Gaussian, ImageNoise, Sampler
from diffusion_lit.images import to_uint8
from diffusion_lit.lightning import attached_trainer
from diffusion_lit.memory import in_memory, shift_steps
from diffusion_lit.records import NonFinite
from diffusion_lit.requests import Conditions, Examples, Given, Request
from diffusion_lit.system import System
from diffusion_lit.types import Condition, StepFn


class Generated(TypedDict):
    """What `predict_step` returns: `index` int64 (B,), `image` uint8 (B, C, H, W), and the condition asked for."""

    index: Tensor
    image: Tensor
    condition: Condition


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

    @property
    def entries(self) -> tuple[str, ...]:
        """Entries of an example that images depend on, other than its label; (): none."""
        return ()

    def shape_of(self, entry: str) -> tuple[int, int, int]:
        """The shape, (C, H, W), of an entry that is an image, a mask or a map."""
        return self.image_shape if entry == "image" else (1, *self.image_shape[1:])

    def takes(self, entry: str, shape: tuple[int, int, int]) -> bool:
        """Whether an entry may have a shape, (C, H, W): by default the one of `shape_of` alone."""
        return shape == self.shape_of(entry)

    def conditions(self, data: L.LightningDataModule | None = None) -> Conditions:
        """What images show by default: every class in turn, or what examples of the data show.

        Args:
            data: Where examples are taken from; None: from the data of the trainer, if there is one.

        Raises:
            ValueError: If images depend on examples and there are no data, or data without them.
        """
        if not self.entries:
            if self.num_classes is None:
                return Given({})
            trained = self.num_classes if self.class_names is None else len(self.class_names)
            return Given({"label": torch.arange(min(self.num_classes, trained))})
        trainer, testing = attached_trainer(self), False
        if data is None and trainer is not None:
            data, testing = getattr(trainer, "datamodule", None), trainer.testing
        if not isinstance(data, ImageData):
            raise ValueError(
                f"the {type(self).__name__} makes images from {' and '.join(self.entries)}: say which, or give --data "
                "to take them from"
            )
        return Examples(data, [*self.entries, *([] if self.num_classes is None else ["label"])], testing)

    def pictures(self, images: Tensor, condition: Condition) -> Tensor:
        """What a grid shows of generated images: by default the images themselves.

        Args:
            images: (B, C, H, W), nominally in [-1, 1].
            condition: What they were made from, (B, ...) each.

        Returns:
            (B, C, H', W'), nominally in [-1, 1].
        """
        return images

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
        given = self.conditions()(index) if condition is None else condition

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

    def trajectory(
        self,
        indices: Sequence[int],
        seed: int = 0,
        show: Literal["x0", "x_t"] = "x0",
        num_frames: int = 40,
        condition: Condition | None = None,
    ) -> Tensor:
        """How images come about, with the weights and the sampler that the system holds.

        Args:
            indices: Which images, as in `sample`.
            seed: As in `sample`.
            show: The clean image predicted at each step ("x0"), or the noisy one ("x_t"), divided by its standard
                deviation for data of variance 1.
            num_frames: At most so many steps are shown, at even distances; the finished images are the last.
            condition: As in `sample`.

        Returns:
            (F, B, C, H, W) on the CPU, nominally in [-1, 1], F <= num_frames + 1.

        Raises:
            ValueError: If the system has no intermediate steps, or the condition does not fit it.
        """
        raise ValueError(f"a {type(self).__name__} has no intermediate steps to show")

    def predict_step(self, batch: Request, batch_idx: int) -> Generated:
        if not len(batch["index"]):
            # The share of a process for which there was no batch; nothing says what its images would show.
            return {
                "index": batch["index"],
                "image": torch.empty(0, *self.image_shape).to(torch.uint8),
                "condition": {},
            }
        condition = batch["condition"] or self.conditions()(batch["index"].cpu())
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
