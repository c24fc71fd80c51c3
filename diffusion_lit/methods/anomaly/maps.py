"""From an image to its map of anomalies: noise it, denoise it, and compare."""

from abc import abstractmethod
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.checkpoint import load_model
from diffusion_lit.frozen import Frozen
from diffusion_lit.networks import ConvClassifier
from diffusion_lit.types import Part


class Found(NamedTuple):
    """What was found in B images.

    Attributes:
        noised: The images as the first reconstruction starts from them, (B, C, H, W).
        reconstruction: The mean of the reconstructions, (B, C, H, W), nominally in [-1, 1].
        anomaly_map: Larger where an image is less like what the model was trained on, float32, (B, H, W).
        pred_score: The score of each image, from its map, (B,).
    """

    noised: Tensor
    reconstruction: Tensor
    anomaly_map: Tensor
    pred_score: Tensor


class Distance(Part):
    """How far an image is from its reconstruction, at each pixel."""

    @abstractmethod
    def __call__(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        """Compares images.

        Args:
            images: (B, C, H, W), in [-1, 1].
            reconstructions: (B, C, H, W), nominally in [-1, 1].

        Returns:
            At least 0, (B, H, W).
        """


class SquaredError(Distance):
    """Mean over channels of the squared difference, in 0 .. 4, as published for AnoDDPM."""

    def __call__(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        return (images - reconstructions).float().square().mean(1)


class FeatureDistance(nn.Module, Distance):
    """1 - cosine similarity of the features of a classifier at each position, in 0 .. 2, averaged over its stages.

    Args:
        checkpoint: Of a classifier that `fit --model FeatureNetworkModule` has trained on images of the same kind.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no such classifier.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__()
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"distance.checkpoint={checkpoint}: there is no such file; train a classifier first"
            )
        network = getattr(load_model(path), "network", None)
        if not isinstance(network, ConvClassifier):
            raise ValueError(
                f"distance.checkpoint={checkpoint} holds no classifier with features; train one with fit --model "
                "FeatureNetworkModule"
            )
        self.network = Frozen(network)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Features after each of the three stages, (B, channels, h, w)."""
        x, found = images, []
        trunk = list(cast(ConvClassifier, self.network.network).trunk)
        for number, layer in enumerate(trunk, start=1):
            x = layer(x)
            if number % (len(trunk) // 3) == 0:
                found.append(x)
        return found

    def forward(self, images: Tensor, reconstructions: Tensor) -> Tensor:
        if images.shape[1] != self.network.network.in_channels:
            raise ValueError(
                f"the distance's classifier takes images of {self.network.network.in_channels} channels, not "
                f"{images.shape[1]}"
            )
        maps = []
        for a, b in zip(self.stages(images), self.stages(reconstructions), strict=True):
            # Of unit vectors 1 - cosine; and 0 where both are 0.
            apart = (F.normalize(a.float()) - F.normalize(b.float())).square().sum(1, keepdim=True) / 2
            maps.append(F.interpolate(apart, images.shape[-2:], mode="bilinear"))
        return torch.cat(maps, 1).mean(1)


class Detector(Part):
    """How anomalies are looked for.

    Args:
        lambda_steps: Noising steps, of the T of the process, before an image is denoised again; the paper's lambda.
        num_reconstructions: Reconstructions, each from noise of its own, whose mean an image is compared with.
        distance: Compares an image with its reconstruction.
        smoothing: Standard deviation in pixels of the Gaussian that maps are smoothed by; 0: they are not. 4 is usual
            for images of 256 pixels.
        pooling: The score of an image: the largest value of its map ("max"), which finds small defects in large images,
            or the mean ("mean"), which is steadier in small ones.
        heat: Value of a map that overlays show in the hottest colour.

    Raises:
        ValueError: If a number is out of range.

    Source: Wyatt et al. 2022, algorithm 2.
    """

    def __init__(
        self,
        lambda_steps: int = 250,
        num_reconstructions: int = 1,
        distance: Distance = SquaredError(),
        smoothing: float = 0.0,
        pooling: Literal["max", "mean"] = "max",
        heat: float = 0.5,
    ) -> None:
        for name, value in (("lambda_steps", lambda_steps), ("num_reconstructions", num_reconstructions)):
            if value < 1:
                raise ValueError(f"detector.{name}={value} must be at least 1")
        if not smoothing >= 0:
            raise ValueError(f"detector.smoothing={smoothing} pixels must be at least 0; 0 smooths nothing")
        if pooling not in ("max", "mean"):
            raise ValueError(f"detector.pooling={pooling!r} is neither 'max' nor 'mean'")
        if not heat > 0:
            raise ValueError(f"detector.heat={heat} must be above 0; 0.5 shows squared errors in 0 .. 4")
        self.lambda_steps = lambda_steps
        self.num_reconstructions = num_reconstructions
        self.distance = distance
        self.smoothing = smoothing
        self.pooling = pooling
        self.heat = heat


def smooth(maps: Tensor, std: float) -> Tensor:
    """Convolves maps, (B, H, W), with a Gaussian of a standard deviation in pixels, renormalised at the edges."""
    if not std:
        return maps
    for axis in (1, 2):
        place = torch.arange(maps.shape[axis], dtype=torch.float64, device=maps.device)
        weight = torch.exp(-((place[:, None] - place) ** 2) / (2 * std**2))
        weight = (weight / weight.sum(1, keepdim=True)).to(maps.dtype)
        maps = torch.einsum("ij,bjw->biw" if axis == 1 else "ij,bhj->bhi", weight, maps)
    return maps
