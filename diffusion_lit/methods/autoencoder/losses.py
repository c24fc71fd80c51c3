"""What an autoencoder minimizes, and what a discriminator does against it.

    nll = sum over pixels and channels of (|x - x'| + d(x, x')),    d a perceptual distance, one number per image
    autoencoder:    nll + weight r + w g,    r the regularizer's term, g = -mean D(x')
    w = disc_weight min(|d nll / d W| / (|d g / d W| + 1e-4), cap),    W the weights of the decoder's last convolution

The published KL models take these sums, the published VQ models means over pixels and channels. With N = C H W numbers
per image, sums with the weight a of r and the cap c are N times means with a / N and c / N; the 1e-4 stays. At 256x256,
N = 196,608: the KL models' cap of 1e4 is 0.051 in units of means, and their weight of 1e-6 is 5.1e-12 per nat.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.metrics import LPIPS, Perceptual
from diffusion_lit.networks import PatchGAN
from diffusion_lit.networks.regularizer import at_least_float32
from diffusion_lit.types import Part

EPS = 1e-4


class ReconstructionLoss(nn.Module, Part):
    """L1 and a perceptual distance that counts in every pixel and channel; and the weight of the regularizer.

    Args:
        reduction: Over pixels and channels: "sum", as the published KL models have it, or "mean", as the VQ models.
        regularizer_weight: Of the regularizer's term, at least 0: 1e-6 per nat in sums for KL, 1 in means for VQ.
        perceptual: The perceptual distance; None: L1 alone.
        perceptual_weight: Its factor, at least 0.

    Raises:
        ValueError: If an argument is out of range.

    Source: the code of Rombach et al. 2022 ("sum") and of Esser et al. 2021 ("mean").
    """

    def __init__(
        self,
        reduction: Literal["sum", "mean"] = "sum",
        regularizer_weight: float = 1e-6,
        perceptual: Perceptual | None = LPIPS(),
        perceptual_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if reduction not in ("sum", "mean"):
            raise ValueError(f"loss.reduction={reduction!r} must be 'sum' or 'mean'")
        if regularizer_weight < 0 or perceptual_weight < 0:
            raise ValueError(
                f"loss: regularizer_weight={regularizer_weight} and perceptual_weight={perceptual_weight} must be at "
                "least 0"
            )
        self.reduction = reduction
        self.regularizer_weight = regularizer_weight
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight

    def forward(self, reconstructions: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The nll of images, (B, C, H, W): per image, (B,), and its parts as means over pixels, (B,) each."""
        reconstructions, images = at_least_float32(reconstructions), at_least_float32(images)
        l1 = (reconstructions - images).abs().flatten(1).mean(1)
        parts = {"l1": l1}
        total = l1
        if self.perceptual is not None:
            distance = self.perceptual(reconstructions, images)
            parts[self.perceptual.name] = distance
            total = total + self.perceptual_weight * distance
        return (total * images[0].numel() if self.reduction == "sum" else total), parts


class Adversarial(nn.Module, Part):
    """A discriminator of reconstructions, from a certain step on.

    Before `start` the discriminator is not called: it does not learn, nor is it in the autoencoder's loss.

    Args:
        discriminator: The network; it learns by an optimiser of its own.
        start: Optimiser steps of the autoencoder before it takes part, at least 0.
        weight: Factor `disc_weight` of the adaptive weight, above 0.
        factor: Of both networks' adversarial losses, above 0.
        loss: Of the discriminator: "hinge", or "vanilla", the cross-entropy.
        cap: The most that the ratio of gradients may be, above 0. Its unit is that of the nll, see above.

    Raises:
        ValueError: If an argument is out of range.

    Source: Esser et al. 2021, eqs. 5 to 7, and the code of Rombach et al. 2022.
    """

    def __init__(
        self,
        discriminator: PatchGAN,
        start: int = 50_001,
        weight: float = 0.5,
        factor: float = 1.0,
        loss: Literal["hinge", "vanilla"] = "hinge",
        cap: float = 1e4,
    ) -> None:
        super().__init__()
        if loss not in ("hinge", "vanilla"):
            raise ValueError(f"adversarial.loss={loss!r} must be 'hinge' or 'vanilla'")
        if start < 0:
            raise ValueError(f"adversarial.start={start} must be at least 0; the published KL models have 50001")
        for name, number in {"weight": weight, "factor": factor, "cap": cap}.items():
            if not number > 0:
                raise ValueError(f"adversarial.{name}={number} must be above 0; leave the part out by null instead")
        self.discriminator = discriminator
        self.start = start
        self.weight = weight
        self.factor = factor
        self.loss = loss
        self.cap = cap

    def active(self, steps: int) -> bool:
        """Whether the discriminator takes part after this many steps."""
        return steps >= self.start

    def against(self, reconstructions: Tensor) -> Tensor:
        """What the autoencoder minimizes, g = -mean D(x'), a scalar."""
        return -at_least_float32(self.discriminator(reconstructions)).mean()

    def adaptive_weight(self, nll_gradient: Tensor, g_gradient: Tensor) -> Tensor:
        """The weight w of g, a scalar, by the gradients of nll and g with respect to the last weights."""
        ratio: Tensor = nll_gradient.norm() / (g_gradient.norm() + EPS)
        return self.weight * ratio.clamp(0, self.cap)

    def forward(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """What the discriminator minimizes, "discriminator", a scalar; and the mean logits, detached."""
        real = at_least_float32(self.discriminator(images))
        fake = at_least_float32(self.discriminator(reconstructions))
        if self.loss == "hinge":
            losses = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
        else:
            losses = F.softplus(-real).mean() + F.softplus(fake).mean()
        return {
            "discriminator": self.factor * 0.5 * losses,
            "logits_real": real.mean().detach(),
            "logits_fake": fake.mean().detach(),
        }


def last_gradients(nll: Tensor, g: Tensor, last: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """The gradients of two scalars with respect to one parameter, each the mean over all processes; collective."""
    gradients = torch.stack([torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, g)])
    if world_size > 1:
        torch.distributed.all_reduce(gradients)
        gradients /= world_size
    return gradients[0], gradients[1]
