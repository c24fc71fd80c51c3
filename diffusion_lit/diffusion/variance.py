"""Reverse variances: the variance of p(x_s | x_t).

The fixed variances are optimal for standard normal data (large) and for a single point (small), and bound those of
other data. Source: Ho et al. 2020, section 3.2. A network may learn a value between them for every dimension.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.types import Part, Prediction


class ReverseVariance(Part):
    """sigma^2 of p(x_s | x_t), for any s < t."""

    @abstractmethod
    def __call__(self, process: Process, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        """Returns the variance of one step.

        Args:
            process: The forward process.
            t: Start of the step, () or (B,).
            s: End of the step, below t, in the shape of t.
            prediction: The denoiser's prediction from x_t.

        Returns:
            float64, in the shape of t or, where it is learned, of x_t; above 0 except for t = 1 and s = 0, a chain of
            one step.
        """


class FixedVariance(ReverseVariance):
    """A variance that does not depend on the denoiser."""

    def __call__(self, process: Process, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        return self.between(process, t, s)

    @abstractmethod
    def between(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """Returns the variance of the step from t to s, float64, in the shape of t."""


def _last_variance(process: Process, t: Tensor) -> Tensor:
    """Returns the posterior variance of q(x_t | x_2t, x_0), in place of that of the last step, which is 0."""
    return process.posterior((2 * t).clamp(max=1.0), t)[2]


class FixedSmall(FixedVariance):
    """The posterior variance beta-tilde; for the step to clean data, where that is 0, the variance of the step before.

    Sampling adds no noise in the last step; its variance matters for the likelihood alone.
    """

    def between(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(s > 0, process.posterior(t, s)[2], _last_variance(process, t))


class FixedLarge(FixedVariance):
    """beta, the variance of q(x_t | x_s); for the step to clean data that of `FixedSmall`, as in the paper's code.

    On a sub-sequence of times it is the square of DDIM's sigma-hat, 1 - alpha_bar_t / alpha_bar_s.
    """

    def between(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(s > 0, process.transition(t, s)[1], _last_variance(process, t))


class LearnedRange(ReverseVariance):
    """exp(v' log beta + (1 - v') log beta-tilde), v' = (v + 1) / 2, separately for every dimension.

    v is an output of the network, `Prediction.extra`, in about [-1, 1] and not bounded: -1 gives `FixedSmall` and 1
    `FixedLarge`. On a sub-sequence of times both ends are those of the pair (t, s). In the step to clean data the upper
    end is beta_1 itself, as in the paper's code; the lower one, which is 0 there, is replaced as in `FixedSmall`.

    Source: Nichol & Dhariwal 2021, eq. 15, and its code, which has v' for v.
    """

    def __call__(self, process: Process, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        """Returns the variance, float64, in the shape of x_t.

        Raises:
            ValueError: If the network has not twice as many output channels as x_t has channels.
        """
        v, channels = prediction.extra, prediction.x0.shape[1]
        if v is None or v.shape != prediction.x0.shape:
            extra = 0 if v is None else v.shape[1]
            raise ValueError(
                f"LearnedRange needs {2 * channels} output channels of the network, which has {channels + extra}; set "
                f"--model.network.out_channels {2 * channels}, or choose FixedSmall or FixedLarge"
            )
        fraction = (v.double() + 1) / 2
        upper = expand(process.transition(t, s)[1].log(), fraction)
        lower = expand(FixedSmall().between(process, t, s).log(), fraction)
        return (fraction * upper + (1 - fraction) * lower).exp()
