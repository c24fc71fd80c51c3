"""Guidance by an image, through the network and the decoder of latents."""

import torch
from torch import Tensor

from diffusion_lit.diffusion import ImageNoise, Process, Sampler
from diffusion_lit.diffusion.process import expand
from diffusion_lit.diffusion.projection import Known, Luminance, Projection
from diffusion_lit.edit import Edit
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Condition, DenoiseFn, Prediction, StepFn


class ImageGuidance(Edit):
    """Moves each prediction towards what is known of an image: eps + s sigma grad ½ |P y - P D(x_0(x_t))|^2.

    P y is what is known, D the decoder. What is known comes out nearly, and not exactly, unless its pixels do.

    Args:
        known: What is known: `Luminance`, `PatchMeans` or `KnownPixels`.
        scale: s; 0 is unguided. The paper does not give it.

    Source: Rombach et al. 2022, appendix C, with a Gaussian of unit variance.
    """

    def __init__(self, known: Known = Luminance(), scale: float = 1.0) -> None:
        self.known = known
        self.scale = scale
        self.entries = known.entries

    def check(self, model: DiffusionModule) -> None:
        self.known.check(model.image_shape)

    def generate(
        self,
        model: DiffusionModule,
        noise: ImageNoise,
        condition: Condition,
        sampler: Sampler,
        on_step: StepFn | None = None,
    ) -> Tensor:
        # A tensor of inference mode cannot be differentiated, hence the clones.
        with torch.inference_mode(False), torch.no_grad():
            given = {name: value.to(model.device).clone() for name, value in condition.items()}
            known = self.known.projection(given)
            denoise = model.bind(given, noise)
            guided = self.guide(denoise, model, known, known(given["image"]))
        latents = sampler(guided, noise.draw(), model.process, noise.draw, on_step)
        return model.finished(latents, given)

    def guide(self, denoise: DenoiseFn, model: DiffusionModule, known: Projection, y: Tensor) -> DenoiseFn:
        """Adds the guidance to a denoiser.

        Args:
            denoise: Predicts x_0 and eps.
            model: Has the codec and the process.
            known: P.
            y: P y, (B, C, H, W).
        """
        process: Process = model.process

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            with torch.inference_mode(False), torch.enable_grad():
                x = x_t.detach().clone().requires_grad_()
                prediction = denoise(x, t.clone())
                error = known(model.codec.decode(prediction.x0)) - y
                (gradient,) = torch.autograd.grad(error.square().sum() / 2, x)
            alpha, sigma = process.alpha_sigma(t)
            shift = self.scale * gradient
            extra = prediction.extra
            return Prediction(
                x0=prediction.x0.detach() - expand(sigma**2 / alpha, x_t) * shift,
                eps=prediction.eps.detach() + expand(sigma, x_t) * shift,
                extra=None if extra is None else extra.detach(),
            )

        return guided
