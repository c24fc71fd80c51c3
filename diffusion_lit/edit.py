"""Other ways to make images with a trained model: the contract of editing methods, which train nothing."""

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from diffusion_lit.diffusion import ImageNoise, Sampler
from diffusion_lit.generator import Generated, Generator
from diffusion_lit.module import DiffusionModule
from diffusion_lit.records import describe
from diffusion_lit.requests import Request
from diffusion_lit.types import Batch, Condition, Part, StepFn


class Edit(Part):
    """Makes images with a diffusion model, differently from the model's own sampling.

    Attributes:
        entries: What images depend on besides what the model takes, such as ("image", "mask"). `predict` takes them
            from its options, else from the data.
    """

    entries: tuple[str, ...] = ()

    def check(self, model: DiffusionModule) -> None:
        """Raises ValueError if the method does not work with this model."""

    @abstractmethod
    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        """Turns noise into images; called in evaluation mode, without gradients.

        Args:
            model: Gives `bind`, `process`, `codec` and so on.
            noise: Gives draw after draw for each of the B images, in the shape of the latents of images of the
                condition's size.
            condition: What they show, (B, ...) each; images in [-1, 1], on any device.
            sampler: Draws them.
            on_step: Called after every sampling step.

        Returns:
            Images, (B, C, H, W), nominally in [-1, 1].
        """

    def shown(self, model: DiffusionModule, condition: Condition) -> Condition:
        """What the images show, given what was asked for, such as other texts; kept beside the images."""
        return condition

    def evaluations(self, model: DiffusionModule, sampler: Sampler) -> int:
        """Network evaluations per image."""
        return model.evaluations(sampler)


class Edited(Generator):
    """A diffusion model together with an editing method, as one generator.

    Args:
        model: The model; it is held, not copied.
        edit: The method.

    Raises:
        ValueError: If the two do not fit together.
    """

    sampler: Sampler

    def __init__(self, model: DiffusionModule, edit: Edit) -> None:
        super().__init__()
        edit.check(model)
        self.model = model
        self.edit = edit
        self.sampler = model.sampler
        self.class_names = model.class_names
        self.config, self.loaded = model.config, model.loaded

    @classmethod
    def of(cls, model: L.LightningModule, edit: Edit) -> "Edited":
        """Checks the kind of model; raises ValueError if it is none that can be used so."""
        if not isinstance(model, DiffusionModule):
            raise ValueError(f"edit: {type(edit).__name__} needs a DiffusionModule, not a {type(model).__name__}")
        return cls(model, edit)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.model.image_shape

    @property
    def num_classes(self) -> int | None:
        return self.model.num_classes

    @property
    def entries(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.model.entries, *self.edit.entries)))

    def shape_of(self, entry: str) -> tuple[int, int, int]:
        return self.model.shape_of(entry)

    def takes(self, entry: str, shape: tuple[int, int, int]) -> bool:
        return self.model.takes(entry, shape)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.model.losses(batch)

    def averaged_weights(self, name: str | None = None) -> AbstractContextManager[None]:
        return self.model.averaged_weights(name)

    def check_sampler(self, sampler: Sampler) -> None:
        self.model.check_sampler(sampler)

    def described(self, sampler: Sampler | None) -> dict[str, Any]:
        return {**self.model.described(sampler), "edit": describe(self.edit)}

    def evaluations(self, sampler: Sampler | None) -> int:
        return self.edit.evaluations(self.model, sampler or self.sampler)

    def noise(self, indices: Any, seed: int) -> ImageNoise:
        return self.model.noise(indices, seed)

    def predict_step(self, batch: Request, batch_idx: int) -> Generated:
        made = super().predict_step(batch, batch_idx)
        return {**made, "condition": self.edit.shown(self.model, made["condition"])}

    def generate(
        self, noise: ImageNoise, condition: Condition, sampler: Sampler | None, on_step: StepFn | None = None
    ) -> Tensor:
        noise.shape = self.model.latent_shape_for(condition, self.entries)
        return self.edit.generate(self.model, noise, condition, sampler or self.sampler, on_step)
