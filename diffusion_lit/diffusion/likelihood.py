"""The variational bound: an upper bound on -log2 p(x_0), in bits per dimension.

    -log p(x_0) <= L_T + L_{T-1} + ... + L_1 + L_0

    L_T     = KL(q(x_T | x_0) || N(0, I))                            the prior
    L_{k-1} = KL(q(x_{k-1} | x_k, x_0) || p(x_{k-1} | x_k)), k > 1   the terms
    L_0     = -log p(x_0 | x_1)                                      the decoder, over 8-bit levels

All are divided by the number of dimensions and by log 2.

Source: Ho et al. 2020, eqs. 5, 8 and 13, and its code.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import DiscreteProcess, Process, expand, require_chain
from diffusion_lit.diffusion.samplers.base import NoiseFn, clip_x0
from diffusion_lit.diffusion.variance import FixedSmall, ReverseVariance
from diffusion_lit.types import DenoiseFn, Prediction, StepFn

HALF_LEVEL = 1 / 255
"""Half the distance between two of the 256 levels in [-1, 1]."""
OPEN_EDGE = 0.999
"""Levels beyond this are the first or the last, whose interval extends to infinity."""
SMALLEST_PROBABILITY = 1e-12


@dataclass(frozen=True)
class Bound:
    """The bound and its parts in bits per dimension, float64, for each of B images.

    Attributes:
        total: prior + decoder + the sum of all T - 1 terms, or its estimate from K of them, (B,).
        prior: L_T, (B,).
        decoder: L_0, (B,).
        terms: L_{k-1} for the k in `ks`, not scaled up, (B, K).
        ks: Rising table entries in 2 .. T, int64, (B, K).
    """

    total: Tensor
    prior: Tensor
    decoder: Tensor
    terms: Tensor
    ks: Tensor


def _bits(nats: Tensor) -> Tensor:
    """Averages nats, (B, ...), over the dimensions of an image, and converts them to bits, (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)


def prior_bits(x0: Tensor, process: Process) -> Tensor:
    """Returns L_T = KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (B,)."""
    alpha, sigma = process.alpha_sigma(torch.ones((), dtype=torch.float64))
    return _bits(0.5 * ((alpha * x0.double()) ** 2 + sigma**2 - 1 - 2 * sigma.log()))


def discretized_log_prob(x0: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Returns log probabilities of 8-bit levels: a Gaussian density, integrated over the interval of each level.

    The normal distribution function is exact. The published code approximates it by a tanh, which changes L_0 by
    3e-5 to 7e-2 bits per dimension.

    Args:
        x0: Levels, in {-1, -1 + 2/255, ..., 1}.
        mean: Mean of the Gaussian, in the shape of x0.
        deviation: Standard deviation, above 0, broadcast against x0.

    Returns:
        Nats, float64, in the shape of x0; at least log 1e-12.

    Source: Ho et al. 2020, eq. 13 and its code (half-width 1/255, edges at 0.999, clamp at 1e-12).
    """
    # In float32 the difference of two nearly equal probabilities would not reach down to the clamp.
    x0, deviation = x0.double(), deviation.double()
    distance = x0 - mean.double()
    # The right tail is mirrored to the left, because close to 1 the difference would lose its digits.
    mirrored = distance > 0
    below = -torch.where(mirrored, distance, -distance)
    first, last = x0 < -OPEN_EDGE, x0 > OPEN_EDGE
    # torch.special.ndtr computes 1 + erf, which loses the digits of the left tail; erfc keeps them.
    upper, lower = (torch.erfc(-(below + half) / deviation * 0.5**0.5) / 2 for half in (HALF_LEVEL, -HALF_LEVEL))
    upper = torch.where(torch.where(mirrored, first, last), torch.ones_like(x0), upper)
    lower = torch.where(torch.where(mirrored, last, first), torch.zeros_like(x0), lower)
    return (upper - lower).clamp(min=SMALLEST_PROBABILITY).log()


def decoder_bits(x0: Tensor, x0_hat: Tensor, reverse_variance: Tensor) -> Tensor:
    """Returns L_0 = -log p(x_0 | x_1) in bits per dimension.

    Args:
        x0: 8-bit images scaled to [-1, 1], (B, ...).
        x0_hat: x_0 predicted from x_1, in the shape of x0; it is the mean of the step to clean data.
        reverse_variance: Variance of that step, above 0, (), (B,) or in the shape of x0.

    Returns:
        float64, (B,).
    """
    deviation = expand(reverse_variance.sqrt(), x0.double())
    return _bits(-discretized_log_prob(x0, x0_hat, deviation))


def divergence_bits(
    x0: Tensor, x0_hat: Tensor, process: Process, t: Tensor, s: Tensor, reverse_variance: Tensor
) -> Tensor:
    """Returns KL(q(x_s | x_t, x_0) || p(x_s | x_t)) in bits per dimension.

    Args:
        x0: Clean data, (B, ...).
        x0_hat: x_0 predicted from x_t, in the shape of x0.
        process: The forward process.
        t: Start of the step, () or (B,).
        s: End of the step, below t. At 0 the posterior is a point and the divergence infinite; a finite value is
            returned, so that `torch.where` can replace it without gradients that are not finite.
        reverse_variance: Variance of p, above 0, (), (B,) or in the shape of x0.

    Returns:
        float64, (B,).
    """
    _, b, _ = process.posterior(t, s)
    # The posterior variance, with another value in place of 0.
    posterior_variance = FixedSmall().between(process, t, s)
    # The means differ by b (x_0 - x0_hat) alone; subtracting them would lose digits.
    squared = (x0 - x0_hat).double().square()
    reverse = expand(reverse_variance, squared)
    ratio = expand(posterior_variance, squared) / reverse
    return _bits(0.5 * (ratio - 1 - ratio.log()) + expand(b, squared) ** 2 * squared / (2 * reverse))


def step_bits(x0: Tensor, x0_hat: Tensor, process: DiscreteProcess, t: Tensor, reverse_variance: Tensor) -> Tensor:
    """Returns L_{k-1} of each image at its own time, L_0 in the step to clean data, in bits per dimension.

    Args:
        x0: 8-bit images scaled to [-1, 1], (B, ...).
        x0_hat: x_0 predicted from x_t, in the shape of x0.
        process: The forward process.
        t: Times, (B,); each step is one step of the chain.
        reverse_variance: Variance of those steps, above 0, (B,) or in the shape of x0.

    Returns:
        float64, (B,).
    """
    s = process.previous(t)
    divergence = divergence_bits(x0, x0_hat, process, t, s, reverse_variance)
    return torch.where(s > 0, divergence, decoder_bits(x0, x0_hat, reverse_variance))


def _entries(num_steps: int, num_terms: int | None, noise: NoiseFn, x0: Tensor) -> Tensor:
    """Chooses the terms to evaluate for each image: rising k in 2 .. T, int64, (B, K).

    These are all of them, or K evenly spaced ones after a uniformly random offset, so that every k is equally likely.
    The offset is computed from the noise of the image, so that it does not depend on the batch.
    """
    batch, count = x0.shape[0], num_steps - 1
    if num_terms is None or num_terms == count:
        return torch.arange(2, num_steps + 1, device=x0.device).expand(batch, -1)
    offset: Tensor = torch.special.ndtr(noise().to(x0.device).double().flatten(1)[:, :1])
    stratum = torch.arange(num_terms, device=x0.device, dtype=torch.float64)
    return 2 + ((stratum + offset) * count / num_terms).long().clamp(max=count - 1)


def bound_chain(process: Process) -> DiscreteProcess:
    """Returns the process if the bound is defined for it.

    Raises:
        ValueError: If it is no chain, or a chain of one step.
    """
    chain = require_chain(process, "the variational bound")
    if chain.num_steps < 2:
        raise ValueError(
            f"process.num_steps={chain.num_steps} must be at least 2 for the variational bound: one step has no "
            "reverse variance; set --model.process.num_steps"
        )
    return chain


@torch.no_grad()
def bits_per_dim(
    denoise: DenoiseFn,
    x0: Tensor,
    process: Process,
    variance: ReverseVariance,
    noise: NoiseFn,
    num_terms: int | None = None,
    clip: bool = True,
    on_step: StepFn | None = None,
) -> Bound:
    """Computes an upper bound of -log2 p(x_0) / D, with one draw of x_k for each term.

    With num_terms the sum over k is estimated from that many of its T - 1 terms, evenly spaced after a random offset,
    and scaled by (T - 1) / K. The estimate is unbiased and has more variance, as the terms differ by orders of
    magnitude over k. Prior and decoder are always evaluated.

    Args:
        denoise: Predicts x_0.
        x0: 8-bit images scaled to [-1, 1], (B, ...).
        process: The forward process, a chain of at least two steps; its prior is standard normal.
        variance: The reverse variance, also of the decoder.
        noise: Draws fresh standard normal noise in the shape of x0.
        num_terms: K, in 1 .. T - 1; None: all.
        clip: Whether predictions of x_0 are clipped to [-1, 1], as in the paper's code.
        on_step: Called after every network evaluation, K + 1 in all.

    Raises:
        ValueError: If the process is no chain of at least two steps, or num_terms lies outside 1 .. T - 1.

    Source: Ho et al. 2020, eqs. 5 and 13.
    """
    process = bound_chain(process)
    total_steps = process.num_steps
    if num_terms is not None and not 1 <= num_terms <= total_steps - 1:
        raise ValueError(
            f"likelihood.num_terms={num_terms} must lie in 1 .. {total_steps - 1}, the terms of the process; "
            f"lower it to {total_steps - 1}, or leave it out to evaluate every term"
        )
    if clip:
        denoise = clip_x0(denoise, process)
    ks = _entries(total_steps, num_terms, noise, x0)
    evaluations = ks.shape[1] + 1

    def predict(t: Tensor) -> Prediction:
        return denoise(process.perturb(x0, noise().to(x0), t), t)

    first = torch.full((x0.shape[0],), 1 / total_steps, dtype=torch.float64, device=x0.device)
    prediction = predict(first)
    decoder = decoder_bits(x0, prediction.x0, variance(process, first, torch.zeros_like(first), prediction))
    if on_step is not None:
        on_step(1, evaluations)

    terms = []
    for done, k in enumerate(ks.unbind(1), start=2):
        t, s = k.double() / total_steps, (k.double() - 1) / total_steps
        prediction = predict(t)
        terms.append(divergence_bits(x0, prediction.x0, process, t, s, variance(process, t, s, prediction)))
        if on_step is not None:
            on_step(done, evaluations)

    kl = torch.stack(terms, dim=1)
    prior = prior_bits(x0, process)
    total = prior + decoder + kl.sum(1) * ((total_steps - 1) / kl.shape[1])
    return Bound(total=total, prior=prior, decoder=decoder, terms=kl, ks=ks)
