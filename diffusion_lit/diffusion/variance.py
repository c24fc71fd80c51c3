"""The reverse variance: how much noise p(x_s | x_t) puts back.

Both fixed choices are optimal for some data, standard normal (large) and a single point (small), and bound
the others. Source: Ho et al. 2020, section 3.2. A network may learn where between them to stand, dimension by
dimension.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.types import Prediction


class ReverseVariance(ABC):
    """sigma^2 of p(x_s | x_t), for any s < t."""

    @abstractmethod
    def __call__(self, process: Process, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        """The variance of one step.

        Args:
            process: Gives the coefficients.
            t: Where the step starts, () or (B,).
            s: Where it ends, below t, in the shape of t.
            prediction: What the denoiser says of x_t.

        Returns:
            float64, in the shape of t or, where it is learned, of x_t; above 0 unless t = 1 and s = 0, a
            chain of one step.
        """


class FixedVariance(ReverseVariance):
    """A variance that is the same whatever the denoiser says."""

    def __call__(self, process: Process, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        return self.of_step(process, t, s)

    @abstractmethod
    def of_step(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        """The variance of the step from t to s, float64, in the shape of t."""


def _of_last_step(process: Process, t: Tensor) -> Tensor:
    """The posterior variance of the step that leads to t, q(x_t | x_2t, x_0).

    It stands in for the last step's, which is 0 and has no logarithm.
    """
    return process.posterior((2 * t).clamp(max=1.0), t)[2]


class FixedSmall(FixedVariance):
    """The posterior variance beta-tilde; in the step to clean data, where that vanishes, the step before's.

    The last reverse step adds no noise when sampling; its variance matters for the likelihood alone.
    """

    def of_step(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(s > 0, process.posterior(t, s)[2], _of_last_step(process, t))


class FixedLarge(FixedVariance):
    """beta, the variance of q(x_t | x_s); in the step to clean data `FixedSmall`'s, as in the paper's code.

    Over a sub-sequence of times it is DDIM's sigma-hat squared, 1 - alpha_bar_t / alpha_bar_s.
    """

    def of_step(self, process: Process, t: Tensor, s: Tensor) -> Tensor:
        return torch.where(s > 0, process.transition(t, s)[1], _of_last_step(process, t))


class LearnedRange(ReverseVariance):
    """exp(v' log beta + (1 - v') log beta-tilde), v' = (v + 1) / 2, of every dimension on its own.

    v is what the network puts out beside the prediction, `Prediction.extra`, in about [-1, 1] and not bounded: -1 is
    `FixedSmall` and 1 `FixedLarge`. Over a sub-sequence of times both ends are those of the pair (t, s). In
    the step to clean data the upper end is beta_1 itself, as in the paper's code; only the lower one, which vanishes
    there, is replaced as in `FixedSmall`.

    Source: Nichol & Dhariwal 2021, eq. 15, and its code, which has v' for v.
    """

    def __call__(self, process: Process, t: Tensor, s: Tensor, prediction: Prediction) -> Tensor:
        """The variance, float64, in the shape of x_t.

        Raises:
            ValueError: If the network has not put out as many further channels as x_t has.
        """
        v, channels = prediction.extra, prediction.x0.shape[1]
        if v is None or v.shape != prediction.x0.shape:
            extra = 0 if v is None else v.shape[1]
            raise ValueError(
                f"LearnedRange needs {2 * channels} channels of the network, it gave {channels + extra}; set "
                f"--model.network.init_args.out_channels {2 * channels}, or choose FixedSmall or FixedLarge"
            )
        fraction = (v.double() + 1) / 2
        upper = expand(process.transition(t, s)[1].log(), fraction)
        lower = expand(FixedSmall().of_step(process, t, s).log(), fraction)
        return (fraction * upper + (1 - fraction) * lower).exp()
