"""Guidance: trading diversity for fidelity to a condition.

A guidance turns a denoiser and a condition into the `DenoiseFn` that samplers call, so that every sampler works with
every guidance. It changes the score, and with it both parts of a prediction:

    x_t = alpha x0 + sigma eps,    score = -eps / sigma

Weights that add up to 1 keep this equation when they are applied to x0 and eps alike; a change of eps by d implies a
change of x0 by -sigma / alpha d.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.conditioner import Conditioner
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.process import expand
from diffusion_lit.types import Condition, DenoiseFn, Part, Prediction


class Guidance(Part):
    """A function of a denoiser and a condition. Subclasses that hold networks are modules, which move with their owner.

    Attributes:
        num_classes: Number of classes if it does not depend on the network; None: it does.
        clip: Whether it clips predictions of x_0, which data without bounds do not allow.
    """

    num_classes: int | None = None
    clip: bool = False

    @property
    def entries(self) -> tuple[str, ...]:
        """Entries of an example that it cannot do without, other than its label, whatever the model takes."""
        return ()

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the guidance does not work with this denoiser and these conditions."""

    @abstractmethod
    def __call__(
        self, denoiser: Denoiser, condition: Condition, conditioner: Conditioner, given: Condition | None = None
    ) -> DenoiseFn:
        """Returns (x_t, t) -> Prediction, with x0 and eps that agree.

        Args:
            denoiser: The denoiser to guide.
            condition: Output of the conditioner, on the device of the images.
            conditioner: The conditioner, which knows the null condition.
            given: What the images are to show as a batch has it, before the conditioner; None: `condition`.

        Raises:
            ValueError: If the condition is empty, or the guidance does not work with this denoiser.
        """


def num_classes_of(network: nn.Module) -> int | None:
    """Returns the number of classes of a network; None: it takes no labels."""
    return cast("int | None", getattr(network, "num_classes", None))


def require_condition(present: bool, guidance: Guidance) -> None:
    """Raises ValueError if a guidance has nothing to guide towards."""
    if not present:
        texts = "caption" in guidance.entries
        raise ValueError(
            f"{type(guidance).__name__} guides towards a condition and was given none; set "
            f"{'texts with --prompts' if texts else 'classes with --labels'}, or remove --model.guidance"
        )


class ClassifierFree(Guidance):
    """eps = (1 + w) eps_c - w eps_u, from one network that predicts with the condition and with the null condition.

    Both predictions are made in one call with twice the batch; where the guidance is off, one call with the batch.

    Args:
        scale: w as in the paper: 0 is the conditional model, -1 the unconditional one. Many programs use s = 1 + w,
            which is 1 for the conditional model.
        interval: Times (lo, hi] with guidance, 0 <= lo < hi <= 1, where t = 0 is clean data; elsewhere the conditional
            prediction is used. Source: Kynkäänniemi et al. 2024, eq. 5.
        rescale: phi, in [0, 1]: how far the standard deviation of each x0, which a large w increases, is reduced to
            that of the conditional prediction. Source: Lin et al. 2024, eqs. 15 and 16.

    Raises:
        ValueError: If the interval or rescale is out of range.

    Source: Ho & Salimans 2022, eq. 6.
    """

    def __init__(self, scale: float = 1.0, interval: Sequence[float] = (0.0, 1.0), rescale: float = 0.0) -> None:
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"guidance.interval={list(interval)} must be two times, 0 <= lo < hi <= 1; [0, 1] guides always"
            )
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance.rescale={rescale} must lie in [0, 1]; 0 is off, Lin et al. use 0.7")
        self.scale = scale
        self.low, self.high = interval
        self.rescale = rescale

    def check(self, denoiser: Denoiser, conditioner: Conditioner) -> None:
        """Raises ValueError if the network has not learned to predict from the null condition."""
        if not conditioner.has_null(denoiser.network):
            raise ValueError(
                f"guidance: the model's {type(denoiser.network).__name__} makes no unconditional predictions; train "
                "it with --model.conditioner.dropout 0.1, use classifier guidance, or remove --model.guidance"
            )

    def __call__(
        self, denoiser: Denoiser, condition: Condition, conditioner: Conditioner, given: Condition | None = None
    ) -> DenoiseFn:
        self.check(denoiser, conditioner)
        require_condition(bool(condition), self)
        null = conditioner.null(condition)
        both = {name: torch.cat([value, null[name]]) for name, value in condition.items()}

        def guided(x_t: Tensor, t: Tensor) -> Prediction:
            inside = (t > self.low) & (t <= self.high)
            if self.scale == 0 or not bool(inside.any()):
                return denoiser(x_t, t, condition)  # type: ignore[no-any-return]
            prediction = denoiser(torch.cat([x_t, x_t]), t if t.ndim == 0 else t.repeat(2), both)
            (x0_c, x0_u), (eps_c, eps_u) = prediction.x0.chunk(2), prediction.eps.chunk(2)
            w = expand(torch.where(inside, self.scale, 0.0).to(x_t.device), x_t)
            x0, eps = x0_c + w * (x0_c - x0_u), eps_c + w * (eps_c - eps_u)
            if self.rescale:
                x0 = torch.where(w == 0, x0, self._rescaled(x0, x0_c))
                alpha, sigma = denoiser.process.alpha_sigma(t)
                eps = (x_t - expand(alpha, x_t) * x0) / expand(sigma, x_t)
            extra = None if prediction.extra is None else prediction.extra[: len(x_t)]
            return Prediction(x0=x0, eps=eps, extra=extra)

        return guided

    def _rescaled(self, x0: Tensor, x0_c: Tensor) -> Tensor:
        dims = tuple(range(1, x0.ndim))
        ratio = x0_c.std(dims, keepdim=True) / x0.std(dims, keepdim=True).clamp(min=1e-8)
        return self.rescale * ratio * x0 + (1 - self.rescale) * x0
