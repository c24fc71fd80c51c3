"""What is minimised while training."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.weighting import Simple, Weighting
from diffusion_lit.types import Condition


class Objective(ABC):
    """Turns clean data and a denoiser into a loss."""

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draws times and noise, and measures the error.

        Args:
            denoiser: What is trained.
            x0: Clean data, (B, C, H, W), in [-1, 1].
            condition: Passed on to the denoiser.
            generator: Source of times and noise; torch's global one by default.

        Returns:
            "loss", a scalar with gradient, and for the log, detached and of shape (B,), "t" and "losses".
        """


class DenoisingLoss(Objective):
    """The weighted mean squared error of eps. With the default weighting, L_simple.

    Args:
        weighting: w(t).

    Source: Ho et al. 2020, eq. 14.
    """

    def __init__(self, weighting: Weighting = Simple()) -> None:
        self.weighting = weighting

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        process = denoiser.process
        t = process.sample_times(x0.shape[0], x0.device, generator)
        eps = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
        prediction = denoiser(process.perturb(x0, eps, t), t, condition)
        losses = self.weighting(process, t).to(x0.dtype) * (eps - prediction.eps).square().flatten(1).mean(1)
        return {"loss": losses.mean(), "t": t, "losses": losses.detach()}
