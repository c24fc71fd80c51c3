"""RePaint: inpainting with a model that was not trained for it, by replacing what is known after each step."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.diffusion import ImageNoise, Sampler
from diffusion_lit.diffusion.process import expand
from diffusion_lit.diffusion.samplers.base import clip_x0, start_std
from diffusion_lit.edit import Edit
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Condition, StepFn


class Replacement(Edit):
    """Fills holes: after each step, x becomes m q(x_0, t) + (1 - m) x, where m is 1 for what is known.

    Known pixels of the result are the image's own. In latents, those are known of which all pixels are.

    Args:
        repeats: How often each step is taken: after each time but the last the result is noised again, so that what is
            filled in comes to agree with what is known. 1: as in Song et al. 2021; the paper repeats 10 times, and
            jumps back by 10 steps at once where here it is one.

    Raises:
        ValueError: If it is below 1.

    Source: Lugmayr et al. 2022 (RePaint), algorithm 1; Song et al. 2021 (score SDE), appendix I.2.
    """

    entries = ("image", "mask")

    def __init__(self, repeats: int = 1) -> None:
        if repeats < 1:
            raise ValueError(f"edit.repeats={repeats} must be at least 1; set --edit.repeats")
        self.repeats = repeats

    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        self._check(model, sampler)
        process = model.process
        image, known = condition["image"].to(model.device), condition["mask"].to(model.device) > 0.5
        x0 = model.codec.encode(image)
        kept = known_latents(known, x0)
        denoise = model.bind(condition, noise)
        if sampler.clip:
            denoise = clip_x0(denoise, process)
        times = sampler.times(process)
        x = start_std(process, times[0]) * noise.draw()
        step = sampler.begin(times)
        for done, (t, s) in enumerate(pairwise(times), start=1):
            for left in reversed(range(self.repeats if s > 0 else 1)):
                x, _ = step(denoise, x, process, t, s, noise.draw)
                x = torch.where(kept, process.perturb(x0, noise.draw(), s), x)
                if left:
                    alpha, variance = process.transition(t, s)
                    x = expand(alpha, x) * x + expand(variance.sqrt(), x) * noise.draw()
            if on_step is not None:
                on_step(done, len(times) - 1)
        return torch.where(known, image, model.finished(x, condition))

    def _check(self, model: DiffusionModule, sampler: Sampler) -> None:
        steps = len(sampler.times(model.process)) - 1
        plain = type(sampler).begin is Sampler.begin and sampler.evaluations(model.process) == steps
        if self.repeats > 1 and not plain:
            raise ValueError(
                f"edit.repeats={self.repeats}: {type(sampler).__name__} does not repeat single steps; set "
                "--model.sampler DDIM or Ancestral"
            )

    def evaluations(self, model: DiffusionModule, sampler: Sampler) -> int:
        steps = sampler.evaluations(model.process)
        return (steps - 1) * self.repeats + 1 if self.repeats > 1 else steps


def known_latents(known: Tensor, latents: Tensor) -> Tensor:
    """Which latents are known, bool, (B, 1, h, w): those all of whose pixels are.

    Args:
        known: Of the pixels, bool, (B, 1, H, W).
        latents: (B, C, h, w), with h and w divisors of H and W.
    """
    height, width = (of // to for of, to in zip(known.shape[2:], latents.shape[2:], strict=True))
    return F.max_pool2d(1 - known.to(latents.dtype), (height, width)) == 0
