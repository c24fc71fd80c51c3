"""Objectives of the improved DDPM, which train the reverse variance too.

    L_vlb    = L_0 + L_1 + ... + L_{T-1} = T E_k[L_{k-1}],  in bits per dimension
    L_hybrid = L_simple + lambda L_vlb

L_T, the term of the prior, does not depend on the network and is left out. Predictions are not clipped.

Source: Nichol & Dhariwal 2021, sections 3.1 and 3.3.
"""

from torch import Tensor

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.likelihood import bound_chain, step_bits
from diffusion_lit.diffusion.objective import Objective
from diffusion_lit.diffusion.process import Process
from diffusion_lit.diffusion.resampling import LossSecondMoment
from diffusion_lit.diffusion.times import Times, UniformTimes
from diffusion_lit.diffusion.variance import LearnedRange, ReverseVariance
from diffusion_lit.types import Condition, Prediction


class Hybrid(Objective):
    """L_simple + lambda L_vlb, where L_vlb treats the mean as a constant, so that it trains the variance alone.

    The paper's code adds to L_simple, at a uniform time, the term of that time in bits per dimension, times T / 1000
    (RESCALED_MSE). As L_vlb = T E_k[L_{k-1}], this is lambda = 0.001 for every T, without a further factor. Its
    class-conditional and upsampling models leave out T / 1000 (MSE): lambda = 1 / T.

    Args:
        weight: lambda, at least 0.
        variance: The reverse variance.
        times: Distribution of the training times; None: `UniformTimes`.

    Raises:
        ValueError: If the weight is below 0.

    Source: Nichol & Dhariwal 2021, eq. 16.
    """

    def __init__(
        self, weight: float = 0.001, variance: ReverseVariance = LearnedRange(), times: Times | None = None
    ) -> None:
        if weight < 0:
            raise ValueError(f"Hybrid: weight={weight} must be at least 0; the paper uses 0.001")
        self.weight = weight
        self.variance = variance
        self.times = times or UniformTimes()

    def check(self, process: Process) -> None:
        bound_chain(process)

    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        process = bound_chain(denoiser.process)
        prediction: Prediction = denoiser(process.perturb(x0, eps, t), t, condition)
        simple = (eps - prediction.eps).square().flatten(1).mean(1)
        reverse_variance = self.variance(process, t, process.previous(t), prediction)
        bits = step_bits(x0, prediction.x0.detach(), process, t, reverse_variance)
        return simple + (self.weight * process.num_steps * bits).to(x0.dtype)


class VariationalBound(Objective):
    """L_vlb alone.

    Times are drawn by `LossSecondMoment` unless others are given, as the terms differ by orders of magnitude. The
    expectation of "loss" is that of uniform times; "losses" are T L_{k-1} at the times drawn, without weights.

    Args:
        variance: The reverse variance.
        times: Distribution of the training times; None: `LossSecondMoment`.

    Source: Nichol & Dhariwal 2021, section 3.3; in its code RESCALED_KL with the loss-second-moment sampler.
    """

    def __init__(self, variance: ReverseVariance = LearnedRange(), times: Times | None = None) -> None:
        self.variance = variance
        self.times = times or LossSecondMoment()

    def check(self, process: Process) -> None:
        bound_chain(process)

    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        process = bound_chain(denoiser.process)
        prediction: Prediction = denoiser(process.perturb(x0, eps, t), t, condition)
        reverse_variance = self.variance(process, t, process.previous(t), prediction)
        return process.num_steps * step_bits(x0, prediction.x0, process, t, reverse_variance)
