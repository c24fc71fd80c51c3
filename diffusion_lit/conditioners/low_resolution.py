"""Super-resolution: the network is given the image at a lower resolution."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.codec import Codec, Shape
from diffusion_lit.conditioner import DrawFn
from diffusion_lit.conditioners.spatial import Spatial
from diffusion_lit.diffusion import DiscreteProcess, Process
from diffusion_lit.types import Condition, Part

NOISE = "low_res_noise"
"""The entry that holds the noise of an image when sampling."""
TIME = "low_res_time"
"""The entry that holds the time to which an image is diffused."""
LEVEL = "level"
"""The input of the network that tells it that time."""


class NoiseAugmentation(Part):
    """Diffuses low-resolution images a little, so that the network forgives the errors of the stage before it.

    In training to a random time, in sampling to a fixed one.

    Args:
        most: Largest time in training, in (0, 1] of the process; 1 as in the paper's untruncated variant.
        level: Time in sampling, in [0, most]; searched for after training.
        time_input: How the network is given the time: as one more "channel", of which every pixel is the time; or,
            as in the paper, by an "embedding" of its own, for which the network needs `level`; null: not at all.
        process: Diffuses them.

    Raises:
        ValueError: If a time is out of range, or `time_input` is something else.

    Source: Ho et al. 2021 (cascaded diffusion models), section 4.2.
    """

    def __init__(
        self,
        most: float = 0.5,
        level: float = 0.1,
        time_input: Literal["channel", "embedding"] | None = "channel",
        process: Process = DiscreteProcess(),
    ) -> None:
        if time_input not in ("channel", "embedding", None):
            raise ValueError(
                f"conditioner.augmentation.time_input={time_input!r} must be 'channel', 'embedding' or null"
            )
        if not 0 < most <= 1 or not 0 <= level <= most:
            raise ValueError(
                f"conditioner.augmentation: 0 <= level={level} <= most={most} <= 1 and most > 0 must hold; set "
                "--model.conditioner.augmentation.level"
            )
        self.most = most
        self.level = level
        self.time_input = time_input
        self.process = process


class LowResolution(Spatial):
    """Gives the network `low_res`, enlarged bilinearly.

    Args:
        factor: How many times it is enlarged: to the size of what is diffused. 1: it has that size already, as where
            latents are as many times smaller than images.
        channels: Of the images.
        augmentation: Noise of the low-resolution images; None: there is none.
        dropout: See `Spatial`.

    Raises:
        ValueError: If a number is below 1.

    Source: Dhariwal & Nichol 2021, section 4.2 and table 13; Rombach et al. 2022, section 4.4, for factor 1.
    """

    entries = ("low_res",)

    def __init__(
        self,
        factor: int = 4,
        channels: int = 3,
        augmentation: NoiseAugmentation | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dropout)
        if factor < 1 or channels < 1:
            raise ValueError(f"conditioner.factor={factor} and conditioner.channels={channels} must be at least 1")
        self.factor = factor
        self.channels = channels
        self.augmentation = augmentation
        if augmentation is not None and augmentation.time_input == "embedding":
            self.roles = ("concat", LEVEL)

    def check(self, network: nn.Module) -> None:
        """Raises ValueError if the network takes no further channels, or not the time of the noise."""
        super().check(network)
        if LEVEL in self.roles and not getattr(network, "has_level", False):
            raise ValueError(
                f"conditioner.augmentation.time_input=embedding: this {type(network).__name__} does not embed the time "
                "of the noise; choose ADMUNet and set --model.network.level true"
            )

    def forward(self, given: Condition, codec: Codec) -> Condition:
        augmentation = self.augmentation
        if augmentation is None or "low_res" not in given:
            return super().forward(given, codec)
        time = self._times(augmentation, given["low_res"])
        made = super().forward({**given, TIME: time}, codec)
        return {**made, LEVEL: augmentation.process.network_time(time)} if LEVEL in self.roles else made

    def null(self, condition: Condition) -> Condition:
        return {name: value if name == LEVEL else torch.zeros_like(value) for name, value in condition.items()}

    def shape_of(self, entry: str, image_shape: Shape, latent_shape: Shape) -> Shape:
        return self.channels, latent_shape[1] // self.factor, latent_shape[2] // self.factor

    def vary(self, given: Condition, draw: DrawFn) -> Condition:
        if self.augmentation is None or "low_res" not in given:
            return given
        return {**given, NOISE: draw(given["low_res"].shape[1:])}

    def concat(self, given: Condition, codec: Codec) -> Tensor:
        low = given["low_res"]
        if low.shape[1] != self.channels:
            raise ValueError(
                f"low_res: {low.shape[1]} channels, and the conditioner has {self.channels}; set "
                "--model.conditioner.channels"
            )
        if self.augmentation is not None:
            low = self.augmentation.process.perturb(low, self._noise(given), given[TIME]).to(low.dtype)
        if self.factor > 1:
            low = F.interpolate(low, scale_factor=self.factor, mode="bilinear", align_corners=False)
        if self.augmentation is not None and self.augmentation.time_input == "channel":
            channel = given[TIME].to(low.dtype).view(-1, 1, 1, 1).expand(-1, 1, *low.shape[2:])
            low = torch.cat([low, channel], 1)
        return low

    def _times(self, augmentation: NoiseAugmentation, low: Tensor) -> Tensor:
        if self.training:
            return augmentation.most * torch.rand(len(low), device=low.device, dtype=torch.float64)
        return torch.full((len(low),), augmentation.level, device=low.device, dtype=torch.float64)

    def _noise(self, given: Condition) -> Tensor:
        if self.training:
            return torch.randn_like(given["low_res"])
        if NOISE not in given:
            raise ValueError("LowResolution: its noise is drawn with that of the images, and here there is none")
        return given[NOISE]
