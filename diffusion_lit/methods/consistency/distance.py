"""How far two predicted images are apart."""

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.types import Part


class Distance(Part):
    """A function of two batches of images, differentiable in the first."""

    def load(self) -> None:
        """Loads what the distance needs, once; raises ValueError if that is not to be had."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns distances of images (B, ...), at least 0, (B,)."""


class Squared(Distance):
    """The mean of the squared differences. Source: Song et al. 2023, section 5."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).square().flatten(1).mean(1)


class Absolute(Distance):
    """The mean of the absolute differences. Source: Song et al. 2023, section 5."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().flatten(1).mean(1)


class PseudoHuber(Distance):
    """sqrt(|x - y|^2 + c^2) - c, of whole images.

    Args:
        c: At least 0; 0: the Euclidean norm, as for easy tuning. None: 0.00054 sqrt(d), with d the numbers in an image.

    Raises:
        ValueError: If c is negative.

    Source: Song & Dhariwal 2024 (iCT), section 3.3.
    """

    def __init__(self, c: float | None = None) -> None:
        if c is not None and c < 0:
            raise ValueError(f"distance.c={c} must be at least 0; null is the paper's 0.00054 sqrt(d)")
        self.c = c

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        difference = (x - y).flatten(1)
        c = 0.00054 * math.sqrt(difference.shape[1]) if self.c is None else self.c
        if c == 0:
            # Its gradient is 0, and not NaN, where the images agree.
            norm: Tensor = torch.linalg.vector_norm(difference, dim=1)
            return norm
        return (difference.square().sum(1) + c**2).sqrt() - c


class LPIPS(Distance):
    """The learned perceptual distance of colour images; those below 224 pixels are enlarged to 224.

    Its backbone was trained on ImageNet, and so was the network of the Fréchet Inception distance: the two leak into
    each other.

    Args:
        net: "vgg", as in the paper, "alex" or "squeeze"; torchvision's weights are downloaded once.

    Source: Zhang et al. 2018; Song et al. 2023, section 5.
    """

    def __init__(self, net: str = "vgg") -> None:
        if net not in ("vgg", "alex", "squeeze"):
            raise ValueError(f"distance.net={net!r} must be 'vgg', 'alex' or 'squeeze'; the paper has 'vgg'")
        self.net = net
        self._network: Any = None

    def load(self) -> None:
        if self._network is not None:
            return
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            metric: Any = LearnedPerceptualImagePatchSimilarity(self.net)  # type: ignore[arg-type]
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(
                f"distance: torchvision's weights of {self.net} are not to be had ({reason}); put them into "
                f"{torch.hub.get_dir()}/checkpoints, or set --model.objective.distance PseudoHuber"
            ) from error
        self._network = metric.net.eval().requires_grad_(False)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError(
                f"distance: LPIPS compares images of 3 channels, not {x.shape[1]}; "
                "set --model.objective.distance PseudoHuber"
            )
        self.load()
        self._network = self._network.to(x.device)
        if x.shape[-1] < 224:
            x, y = (F.interpolate(image, size=(224, 224), mode="bilinear") for image in (x, y))
        found: Tensor = self._network(x, y)
        return found.flatten()
