"""Objectives of the improved DDPM, which train the reverse variance too.

    L_vlb    = L_0 + L_1 + ... + L_{T-1} = T E_k[L_{k-1}],  in bits per dimension
    L_hybrid = L_simple + lambda L_vlb

L_T, the prior's, does not depend on the network and is left out. Predictions are not clipped.

Source: Nichol & Dhariwal 2021, sections 3.1 and 3.3.
"""

import torch
from torch import Tensor

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.likelihood import step_bits
from diffusion_lit.diffusion.objective import GatherFn, Objective, predict_at
from diffusion_lit.diffusion.process import DiscreteProcess
from diffusion_lit.diffusion.resampling import LossSecondMoment
from diffusion_lit.diffusion.variance import LearnedRange, ReverseVariance
from diffusion_lit.types import Condition


def chain_of(denoiser: Denoiser) -> DiscreteProcess:
    """The denoiser's process, which must be one whose bound is a sum.

    Raises:
        ValueError: If it has no steps, or one only.
    """
    process = denoiser.process
    if not isinstance(process, DiscreteProcess) or process.num_steps < 2:
        raise ValueError(
            "the variational bound is a sum over a chain: use DiscreteProcess with num_steps of at least 2"
        )
    return process


class Hybrid(Objective):
    """L_simple + lambda L_vlb; L_vlb sees the mean as given, so that it trains the variance alone.

    The paper's code adds to L_simple, at a uniform time, that time's term in bits per dimension times T / 1000
    (RESCALED_MSE). As L_vlb = T E_k[L_{k-1}], this is lambda = 0.001 for every T; there is no further factor.
    Its class-conditional and upsampling models leave the T / 1000 out (MSE): lambda = 1 / T.

    Args:
        weight: lambda, at least 0.
        variance: The reverse variance.

    Raises:
        ValueError: If the weight is below 0.

    Source: Nichol & Dhariwal 2021, eq. 16.
    """

    def __init__(self, weight: float = 0.001, variance: ReverseVariance = LearnedRange()) -> None:
        if weight < 0:
            raise ValueError(f"Hybrid: weight={weight} must be at least 0; the paper uses 0.001")
        self.weight = weight
        self.variance = variance

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        process = chain_of(denoiser)
        t = process.sample_times(x0.shape[0], x0.device, generator)
        eps, prediction = predict_at(denoiser, x0, condition, t, generator)
        simple = (eps - prediction.eps).square().flatten(1).mean(1)
        reverse_variance = self.variance(process, t, process.previous(t), prediction)
        bits = step_bits(x0, prediction.x0.detach(), process, t, reverse_variance)
        losses = simple + (self.weight * process.num_steps * bits).to(x0.dtype)
        return {"loss": losses.mean(), "t": t, "losses": losses.detach()}


class VariationalBound(Objective):
    """L_vlb alone, its times drawn by `LossSecondMoment`: the terms differ by orders of magnitude.

    The mean of "loss" is that of uniform times; "losses" are T L_{k-1} at the times that were drawn, unweighted.

    Args:
        variance: The reverse variance.
        history: Losses kept per time.
        uniform: The share of draws that is uniform, in (0, 1].

    Source: Nichol & Dhariwal 2021, section 3.3; in its code RESCALED_KL with the loss-second-moment sampler.
    """

    def __init__(self, variance: ReverseVariance = LearnedRange(), history: int = 10, uniform: float = 0.001) -> None:
        self.variance = variance
        self.times = LossSecondMoment(history, uniform)

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        process = chain_of(denoiser)
        t, weights = self.times.draw(x0.shape[0], process.num_steps, x0.device, generator)
        _, prediction = predict_at(denoiser, x0, condition, t, generator)
        reverse_variance = self.variance(process, t, process.previous(t), prediction)
        losses = process.num_steps * step_bits(x0, prediction.x0, process, t, reverse_variance)
        return {"loss": (weights * losses).mean().to(x0.dtype), "t": t, "losses": losses.detach().to(x0.dtype)}

    def observe(self, t: Tensor, losses: Tensor, gather: GatherFn) -> None:
        # As one tensor, so that processes wait for each other once.
        t, losses = gather(torch.stack([t, losses.to(t.dtype)], dim=1)).unbind(1)
        self.times.update(t, losses)

    def state_dict(self) -> dict[str, Tensor]:
        return self.times.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.times.load_state_dict(state)
