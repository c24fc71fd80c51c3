"""Discriminators that compare a less noisy image with a noisier one, given the time."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.networks.fir import SmoothDownsample
from diffusion_lit.networks.layers import sinusoidal_embedding
from diffusion_lit.networks.ncsnpp import init_by_outputs
from diffusion_lit.types import Part

SLOPE = 0.2
"""Slope of the leaky ReLU below 0."""


class Discriminator(nn.Module, Part):
    """Tells real pairs (x_s, x_t) of one trajectory from pairs whose x_s was generated.

    Attributes:
        image_size: Height and width of the images.
        in_channels: Channels of one image.
    """

    image_size: int
    in_channels: int

    @abstractmethod
    def forward(self, x_s: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """Returns logits, (B,), above 0 for what looks real.

        Args:
            x_s: Less noisy images, (B, C, H, W).
            x_t: Noisier images, (B, C, H, W).
            time: That of x_t, (B,), float32, in steps of the chain.
        """


class DownBlock(nn.Module):
    """Residual block of two 3x3 convolutions without normalization; the time is added between them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_width: Length of the time embedding.
        downsample: Whether the resolution is halved.
    """

    def __init__(self, in_channels: int, out_channels: int, time_width: int, downsample: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.resample = SmoothDownsample() if downsample else nn.Identity()
        for layer in (self.conv1, self.time, self.skip):
            init_by_outputs(cast(nn.Conv2d, layer))
        init_by_outputs(self.conv2, scale=1e-10)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x: (B, in, H, W); time: (B, time_width). Returns (B, out, H', W')."""
        h = self.conv1(F.leaky_relu(x, SLOPE)) + self.time(time)[:, :, None, None]
        h = self.conv2(self.resample(F.leaky_relu(h, SLOPE)))
        return cast(Tensor, (h + self.skip(self.resample(x))) * math.sqrt(0.5))


def append_deviation(x: Tensor, group: int = 4) -> Tensor:
    """Appends one channel: the standard deviation over a group of images, averaged over positions and channels.

    Args:
        x: (B, C, H, W). Image i is in the group of i modulo the number of groups.
        group: Images per group, at most; the largest number up to it that divides B is taken.

    Returns:
        (B, C + 1, H, W).

    Source: Karras et al. 2018 (progressive GANs), section 3.
    """
    b, _, h, w = x.shape
    group = next(size for size in range(min(b, group), 0, -1) if b % size == 0) if b else 1
    variance = x.reshape(group, -1, *x.shape[1:]).var(0, unbiased=False) if b else x
    deviation = (variance + 1e-8).sqrt().mean((1, 2, 3), keepdim=True)
    return torch.cat([x, deviation.repeat(group, 1, h, w)], dim=1)


class PairDiscriminator(Discriminator):
    """The convolutional discriminator of denoising diffusion GANs.

    Args:
        image_size: Height and width of the images, divisible by 2^(number of blocks that halve it).
        in_channels: Channels of one image.
        widths: Channels after the first convolution and after each block.
        downsample: For each block, whether it halves the resolution; None: all but the first.
        time_width: Length of the time embedding, even and at least 4.
        zero_start: Whether all logits are about 0 at first, as in the paper's network for small images.

    Raises:
        ValueError: If the numbers of blocks disagree, or the image size cannot be halved so often.

    Source: Xiao et al. 2022, appendix C; the defaults are its CIFAR-10 network, 12,741,633 parameters.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        widths: Sequence[int] = (128, 128, 256, 512, 512),
        downsample: Sequence[bool] | None = None,
        time_width: int = 256,
        zero_start: bool = True,
    ) -> None:
        super().__init__()
        halves = [False, *[True] * (len(widths) - 2)] if downsample is None else list(downsample)
        if len(widths) < 2 or len(halves) != len(widths) - 1 or image_size % 2 ** sum(halves):
            raise ValueError(
                f"PairDiscriminator: image_size={image_size}, {len(widths)} widths and {len(halves)} entries of "
                "downsample: there must be one width more than blocks, and the size must be halved once for each true"
            )
        self.image_size, self.in_channels, self.time_width = image_size, in_channels, time_width
        self.dense = nn.ModuleList([nn.Linear(time_width, time_width), nn.Linear(time_width, time_width)])
        self.conv_in = nn.Conv2d(2 * in_channels, widths[0], 1)
        blocks = zip(widths[:-1], widths[1:], halves, strict=True)
        self.blocks = nn.ModuleList([DownBlock(c_in, c_out, time_width, half) for c_in, c_out, half in blocks])
        last = widths[-1]
        self.conv_out = nn.Conv2d(last + 1, last, 3, padding=1)
        self.linear = nn.Linear(last, 1)
        for layer in (*self.dense, self.conv_in, self.linear):
            init_by_outputs(cast(nn.Linear, layer))
        init_by_outputs(self.conv_out, scale=1e-10 if zero_start else 1.0)

    def forward(self, x_s: Tensor, x_t: Tensor, time: Tensor) -> Tensor:
        """See `Discriminator.forward`."""
        first, second = self.dense
        embedding = sinusoidal_embedding(time, self.time_width).to(self.conv_in.weight.dtype)
        embedding = F.leaky_relu(second(F.leaky_relu(first(embedding), SLOPE)), SLOPE)
        h = self.conv_in(torch.cat([x_s, x_t], dim=1))
        for block in self.blocks:
            h = block(h, embedding)
        h = F.leaky_relu(self.conv_out(append_deviation(h)), SLOPE)
        return cast(Tensor, self.linear(h.sum((2, 3))).squeeze(1))
