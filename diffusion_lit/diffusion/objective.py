"""Objectives: the losses that training minimizes."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.noise import Gaussian, NoiseSource
from diffusion_lit.diffusion.process import Process
from diffusion_lit.diffusion.times import Times, UniformTimes
from diffusion_lit.diffusion.weighting import Simple, Weighting
from diffusion_lit.types import Condition, Part, Prediction

GatherFn = Callable[[Tensor], Tensor]
"""(n, ...) of each process -> (W n, ...) of all W, the same on each, in the order of ranks."""


class Seen(NamedTuple):
    """What one process trained on in one optimizer step, accumulated batches included.

    Attributes:
        t: Times, (n,).
        losses: Losses there, without importance weights, (n,).
    """

    t: Tensor
    losses: Tensor


class Objective(Part):
    """Computes a loss from clean data and a denoiser.

    Attributes:
        times: Distribution of the training times.
    """

    times: Times

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition,
        noise: NoiseSource = Gaussian(),
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Draws times and then noise, and computes the loss.

        Args:
            denoiser: The denoiser that is trained.
            x0: Clean data, (B, ...).
            condition: Inputs of the denoiser, by name.
            noise: Source of the noise.
            generator: Source of randomness of times and noise; torch's global one by default.

        Returns:
            "loss", a scalar with gradient, and, without gradient and of shape (B,), "t" and "losses".
        """
        t, weights = self.times.draw(x0.shape[0], denoiser.process, x0.device, generator)
        losses = self.losses_at(denoiser, x0, noise.like(x0, generator), t, condition)
        loss = (losses if weights is None else weights * losses).mean()
        return {"loss": loss.to(x0.dtype), "t": t, "losses": losses.detach().to(x0.dtype)}

    def check(self, process: Process) -> None:
        """Raises ValueError if the objective needs another kind of process."""

    def begin(self, denoiser: Denoiser) -> None:
        """Called before training, possibly more than once; loads and checks what only training needs.

        Args:
            denoiser: The denoiser that is going to be trained, on any device.

        Raises:
            ValueError: If what is needed does not fit the denoiser.
            FileNotFoundError: If it is not there.
        """

    def start(self, denoiser: Denoiser) -> None:
        """Called once before the first step of a new run, but not when a run continues.

        Args:
            denoiser: The denoiser that is trained, on the CPU; its weights may be changed in place.
        """

    @abstractmethod
    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Computes the loss of each image at its own time, without importance weights.

        Args:
            denoiser: The denoiser that is trained.
            x0: Clean data, (B, ...).
            eps: Noise, in the shape of x0.
            t: Times in (0, 1], (B,).
            condition: Inputs of the denoiser, by name.

        Returns:
            Losses, (B,).
        """

    def trained(self, steps: int) -> None:
        """Called when the weights of a model are loaded to be scored: its losses are those after so many steps."""

    def stepped(self, step: int, denoiser: Denoiser, seen: Seen, gather: GatherFn) -> None:
        """Called after every whole optimizer step; by default lets `times` learn from the losses.

        Args:
            step: Number of optimizer steps done.
            denoiser: The denoiser that is trained, after the step.
            seen: Times and losses of this process in this step.
            gather: Joins a tensor with those of the other processes; n is the same on each.
        """
        if self.times.learns:
            # As one tensor, so that processes wait for each other once.
            joined = gather(torch.stack([seen.t, seen.losses.to(seen.t.dtype)], dim=1))
            self.times.update(*joined.unbind(1))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns all that the objective learned, for a checkpoint: the same on all processes."""
        return self.times.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.times.load_state_dict(state)


class DenoisingLoss(Objective):
    """The weighted mean squared error of eps. With the default weighting, L_simple.

    Args:
        weighting: Weight w(t) of the error.
        times: Distribution of the training times; None: `UniformTimes`.
        error: "squared", or "absolute", the mean of |eps - prediction|.

    Raises:
        ValueError: If there is no such error.

    Source: Ho et al. 2020, eq. 14; "absolute" is what some models of Rombach et al. 2022 minimize.
    """

    def __init__(
        self,
        weighting: Weighting = Simple(),
        times: Times | None = None,
        error: Literal["squared", "absolute"] = "squared",
    ) -> None:
        if error not in ("squared", "absolute"):
            raise ValueError(f"objective.error={error!r} must be 'squared' or 'absolute'")
        self.error = error
        self.weighting = weighting
        self.times = times or UniformTimes()

    def check(self, process: Process) -> None:
        self.weighting(process, torch.ones(1, dtype=torch.float64))

    def losses_at(self, denoiser: Denoiser, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition) -> Tensor:
        process = denoiser.process
        prediction: Prediction = denoiser(process.perturb(x0, eps, t), t, condition)
        difference = eps - prediction.eps
        errors = difference.square() if self.error == "squared" else difference.abs()
        return self.weighting(process, t).to(x0.dtype) * errors.flatten(1).mean(1)
