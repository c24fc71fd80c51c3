"""Completing images in pixels: what is known is put into each predicted image."""

from copy import copy

from torch import Tensor

from diffusion_lit.codec import Pixels
from diffusion_lit.diffusion import ImageNoise, Sampler
from diffusion_lit.diffusion.projection import Known, Luminance, with_known
from diffusion_lit.edit import Edit
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Condition, StepFn


class Projected(Edit):
    """Colourisation, super-resolution and inpainting with a model of pixels that was not trained for them.

    What is known of the image is known of the result too.

    Args:
        known: What is known: `Luminance`, `PatchMeans` or `KnownPixels`.

    Source: Song et al. 2023 (consistency models), algorithm 4, for any sampler; Choi et al. 2021 (ILVR), with a
    projection for the low-pass filter.
    """

    def __init__(self, known: Known = Luminance()) -> None:
        self.known = known
        self.entries = known.entries

    def check(self, model: DiffusionModule) -> None:
        if not isinstance(model.codec, Pixels):
            raise ValueError(
                f"edit: Projected works on pixels, and the model has {type(model.codec).__name__}; set --edit "
                "ImageGuidance"
            )
        self.known.check(model.image_shape)

    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        given = {name: value.to(model.device) for name, value in condition.items()}
        known = self.known.projection(given)
        denoise = with_known(model.bind(given, noise), model.process, known, given["image"], sampler.clip)
        unclipped = copy(sampler)
        unclipped.clip = False
        x = unclipped(denoise, noise.draw(), model.process, noise.draw, on_step)
        return model.finished(x, given)
