"""A discriminator of patches: one logit for each of many overlapping parts of an image."""

from typing import Literal, cast

from torch import Tensor, nn

from diffusion_lit.types import Part

SLOPE = 0.2
"""Slope of the leaky ReLU below 0."""
DEVIATION = 0.02
"""Standard deviation of the weights at first."""
MOST_LAYERS = 31
"""Each halves the images: more than these leave nothing of any."""
KERNEL = 4
MOST = 8
"""The greatest number of channels, as a multiple of the first."""


class PatchGAN(nn.Module, Part):
    """Convolutions of 4x4 that end in a map of logits, above 0 for what looks real.

    Args:
        in_channels: Channels of the images.
        width: Channels after the first convolution; they double up to eight times as many.
        num_layers: Convolutions with stride 2, at least 1; two with stride 1 follow.
        normalization: After all convolutions but the first and the last. "batch" is as published: an image's logits
            depend on the images beside it, so that several processes do not make the steps of one. "group": they do.
        num_groups: Groups of the normalization "group".

    Raises:
        ValueError: If a number is out of range.

    Source: Isola et al. 2017, section 3.2.2, in the code of Esser et al. 2021: 2,765,633 parameters with three layers,
    663,361 with two.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 64,
        num_layers: int = 3,
        normalization: Literal["batch", "group"] = "batch",
        num_groups: int = 32,
    ) -> None:
        super().__init__()
        for name, number in {"in_channels": in_channels, "width": width, "num_layers": num_layers}.items():
            if number < 1:
                raise ValueError(
                    f"PatchGAN: {name}={number} must be at least 1; the published ones have 3, 64 and 2..3"
                )
        if num_layers > MOST_LAYERS:
            raise ValueError(f"PatchGAN: num_layers={num_layers} must be at most {MOST_LAYERS}")
        if normalization not in ("batch", "group"):
            raise ValueError(f"PatchGAN: normalization={normalization!r} must be 'batch' or 'group'")
        if normalization == "group" and (num_groups < 1 or 2 * width % num_groups):
            raise ValueError(
                f"PatchGAN: num_groups={num_groups} does not divide the {2 * width} channels after the second "
                f"convolution; take a divisor of {2 * width}"
            )
        self.in_channels = in_channels
        self.num_layers = num_layers

        def normalize(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels) if normalization == "batch" else nn.GroupNorm(num_groups, channels)

        widths = [width * min(2**i, MOST) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, KERNEL, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], KERNEL, stride, padding=1, bias=False),
                normalize(widths[i]),
                nn.LeakyReLU(SLOPE),
            ]
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, KERNEL, padding=1))
        self.main.apply(initialize)

    def patches(self, image_size: int) -> int:
        """Height and width of the map of logits of images of this height and width.

        Raises:
            ValueError: If the images are too small for a single logit.
        """
        size = image_size
        for _ in range(self.num_layers):
            size //= 2
        if size < KERNEL - 1:
            raise ValueError(
                f"PatchGAN: num_layers={self.num_layers} leaves nothing of images of {image_size} pixels; take fewer "
                f"layers, or images of at least {(KERNEL - 1) * 2**self.num_layers} pixels"
            )
        return size - 2

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, C, H, W). Returns logits, (B, 1, h, w)."""
        return cast(Tensor, self.main(images))


def initialize(layer: nn.Module) -> None:
    """Draws the weights of a layer from N(0, 0.02), the scales of a normalization from N(1, 0.02)."""
    if isinstance(layer, nn.Conv2d):
        nn.init.normal_(layer.weight, 0.0, DEVIATION)
    elif isinstance(layer, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(layer.weight, 1.0, DEVIATION)
        nn.init.zeros_(layer.bias)
