"""What is minimised while training."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.weighting import Simple, Weighting
from diffusion_lit.types import Condition, Prediction

GatherFn = Callable[[Tensor], Tensor]
"""(n, ...) of each process -> (W n, ...) of all W, the same on each, in the order of ranks."""


def predict_at(
    denoiser: Denoiser, x0: Tensor, condition: Condition, t: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Prediction]:
    """Diffuses clean data by fresh noise and asks the denoiser.

    Args:
        denoiser: What is trained.
        x0: Clean data, (B, C, H, W), in [-1, 1].
        condition: Passed on to the denoiser.
        t: Times in (0, 1], (B,).
        generator: Source of the noise; torch's global one by default.

    Returns:
        (the noise eps, (B, C, H, W); the prediction).
    """
    eps = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
    return eps, denoiser(denoiser.process.perturb(x0, eps, t), t, condition)


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

    def observe(self, t: Tensor, losses: Tensor, gather: GatherFn) -> None:  # noqa: B027 (most learn nothing)
        """Told after every optimiser step what this process saw in it; an objective that learns from it overrides this.

        Args:
            t: The times of all this process's images, accumulated batches included, (n,).
            losses: Their losses, (n,).
            gather: Joins a tensor with those of the other processes; n is the same on each.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What has been learned from `observe`, for a checkpoint: the same on all processes."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027 (most learn nothing)
        """Goes on from a checkpoint's state."""


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
        eps, prediction = predict_at(denoiser, x0, condition, t, generator)
        losses = self.weighting(process, t).to(x0.dtype) * (eps - prediction.eps).square().flatten(1).mean(1)
        return {"loss": losses.mean(), "t": t, "losses": losses.detach()}
