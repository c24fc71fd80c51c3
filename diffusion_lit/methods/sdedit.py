"""SDEdit: images are noised part of the way, and denoised from there."""

from torch import Tensor

from diffusion_lit.diffusion import ImageNoise, Sampler
from diffusion_lit.edit import Edit
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Condition, StepFn


class SDEdit(Edit):
    """Turns strokes and rough pictures into images of the model's kind.

    Args:
        start: Time to which images are noised, in (0, 1]: the smaller, the more of them remains. The paper has 0.3 to
            0.6, of a process of its own. None: the sampler's first time, as for consistency models whose `Multistep`
            lists noise levels.

    Raises:
        ValueError: If it is out of range.

    Source: Meng et al. 2022, algorithm 1.
    """

    entries = ("image",)

    def __init__(self, start: float | None = 0.5) -> None:
        if start is not None and not 0 < start <= 1:
            raise ValueError(f"edit.start={start} must lie in (0, 1]: 1 is pure noise; set --edit.start 0.5")
        self.start = start

    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        x0 = model.codec.encode(condition["image"].to(model.device))
        first = self._first(model, sampler)
        x_t = model.process.perturb(x0, noise.draw(), sampler.times(model.process, first)[0])
        denoise = model.bind(condition, noise)
        latents = sampler(denoise, x_t, model.process, noise.draw, on_step, start=first)
        return model.finished(latents, condition)

    def _first(self, model: DiffusionModule, sampler: Sampler) -> float:
        return float(sampler.times(model.process)[0]) if self.start is None else self.start

    def evaluations(self, model: DiffusionModule, sampler: Sampler) -> int:
        whole, part = (len(sampler.times(model.process, start)) - 1 for start in (None, self._first(model, sampler)))
        # Samplers may take several evaluations a step.
        return -(-sampler.evaluations(model.process) * part // whole)
