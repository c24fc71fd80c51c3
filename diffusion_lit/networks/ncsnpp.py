"""The NCSN++ of denoising diffusion GANs: a U-Net that a latent variable modulates."""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.networks.fir import SmoothDownsample, SmoothStridedConv, SmoothUpsample
from diffusion_lit.networks.layers import (
    MOST_BLOCKS,
    SelfAttention,
    check_shape,
    init_conv,
    level_channels,
    run_block,
    sinusoidal_embedding,
)
from diffusion_lit.types import Condition, Network

LATENT = "latent"
"""The entry of a condition that holds the latent variable, (B, latent_size)."""


def init_by_outputs(layer: nn.Linear | nn.Conv2d, scale: float = 1.0) -> None:
    """Initializes a layer uniformly with variance scale / fan-out, and its bias with zeros (the authors' code)."""
    bound = math.sqrt(3 * scale / nn.init._calculate_fan_in_and_fan_out(layer.weight)[1])
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def num_groups(channels: int) -> int:
    """Groups of a normalization layer: at most 32, of at least 4 channels."""
    return min(channels // 4, 32)


class LatentMapping(nn.Module):
    """Maps a latent variable to what modulates the network.

    Args:
        size: Length of the latent variable.
        width: Length of the result.
        layers: Linear layers after the first.

    Source: Xiao et al. 2022, appendix C; Karras et al. 2019 (StyleGAN), for the normalization.
    """

    def __init__(self, size: int, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(size if i == 0 else width, width) for i in range(layers + 1)])
        for layer in self.layers:
            init_by_outputs(cast(nn.Linear, layer))

    def forward(self, z: Tensor) -> Tensor:
        """z: (B, size), of which the length does not matter. Returns (B, width)."""
        z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.layers:
            z = F.silu(layer(z))
        return z


class ModulatedNorm(nn.Module):
    """Group normalization whose scale and shift depend on the latent variable.

    Args:
        channels: Channels of the input.
        latent_width: Length of the mapped latent variable.
    """

    def __init__(self, channels: int, latent_width: int) -> None:
        super().__init__()
        self.groups = num_groups(channels)
        self.style = nn.Linear(latent_width, 2 * channels)
        init_by_outputs(self.style)
        with torch.no_grad():
            self.style.bias[:channels] = 1

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """x: (B, C, H, W); latent: (B, latent_width)."""
        scale, shift = self.style(latent)[:, :, None, None].chunk(2, dim=1)
        return cast(Tensor, scale * F.group_norm(x, self.groups, eps=1e-6) + shift)


class ModulatedResBlock(nn.Module):
    """Residual block of two 3x3 convolutions: the time is added, the latent variable modulates, the sum is halved.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_width: Length of the time embedding.
        latent_width: Length of the mapped latent variable.
        dropout: Dropout probability before the second convolution, in [0, 1).
        resample: A change of resolution, on both branches before their convolutions; None: the resolution stays.

    Source: Xiao et al. 2022, appendix C; Song et al. 2021 (score SDE), appendix H, for the block.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_width: int,
        latent_width: int,
        dropout: float = 0.0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = ModulatedNorm(in_channels, latent_width)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_width, out_channels)
        self.norm2 = ModulatedNorm(out_channels, latent_width)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Conv2d | None = None
        if in_channels != out_channels or resample is not None:
            self.skip = nn.Conv2d(in_channels, out_channels, 1)
            init_conv(self.skip)
        init_conv(self.conv1)
        init_conv(self.time)
        init_conv(self.conv2, scale=1e-10)

    def forward(self, x: Tensor, time: Tensor, latent: Tensor) -> Tensor:
        """x: (B, in, H, W); time: (B, time_width); latent: (B, latent_width). Returns (B, out, H', W')."""
        h = F.silu(self.norm1(x, latent))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h) + self.time(F.silu(time))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h, latent))))
        return cast(Tensor, (h + (x if self.skip is None else self.skip(x))) * math.sqrt(0.5))


class HalvedAttention(SelfAttention):
    """Self-attention with one head; the sum with the skip connection is divided by sqrt(2)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1, num_groups(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        return super().forward(x) * math.sqrt(0.5)


class ModulatedLevel(nn.Module):
    """The blocks of one resolution, their attention, and the change to the next resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.attention = nn.ModuleList()
        self.change: ModulatedResBlock | None = None
        self.pyramid: SmoothStridedConv | None = None


class NCSNpp(Network):
    """A U-Net with residual blocks as in BigGAN, modulated by a latent variable; its output is bounded by tanh.

    The image itself, halved again and again, is added to the encoder at every resolution. There is attention after
    every block of the encoder, once per resolution in the decoder, and in the middle.

    Args:
        image_size: Height and width of the images, divisible by 2^(number of multipliers - 1).
        in_channels: Channels of the images.
        width: Base number of channels, a multiple of 4.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of `width`.
        num_blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attention: Resolutions (heights in pixels) with attention.
        dropout: Dropout probability in the residual blocks, in [0, 1).
        latent_size: Length of the latent variable z.
        latent_width: Length of what z is mapped to.
        latent_layers: Linear layers of that mapping after the first.
        checkpoint_blocks: Whether to recompute the blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: If the image size cannot be halved often enough, an attention resolution does not occur, or a number
            is out of range.

    Source: Xiao et al. 2022, appendix C; the defaults are its CIFAR-10 network, 48,432,515 parameters.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        width: int = 128,
        multipliers: Sequence[int | float] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention: Sequence[int] = (16,),
        dropout: float = 0.0,
        latent_size: int = 100,
        latent_width: int = 256,
        latent_layers: int = 4,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        counts = {"in_channels": in_channels, "latent_size": latent_size, "latent_width": latent_width}
        check_shape("NCSNpp", image_size, width, multipliers, num_blocks, attention, dropout, 4, counts)
        if not 0 <= latent_layers <= MOST_BLOCKS:
            raise ValueError(
                f"NCSNpp: latent_layers={latent_layers} must lie in 0 .. {MOST_BLOCKS}; the paper has 4 for CIFAR-10"
            )
        self.image_size, self.in_channels, self.width = image_size, in_channels, width
        self.latent_size = latent_size
        self.checkpoint_blocks = checkpoint_blocks
        self.widths = (4 * width, latent_width, dropout)
        self.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])
        self.mapping = LatentMapping(latent_size, latent_width, latent_layers)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        channels = level_channels(width, multipliers)
        has_attention = [image_size >> i in attention for i in range(len(channels))]
        self.down, skips = self._encoder(channels, has_attention, num_blocks)
        self.mid = nn.ModuleList([self._block(channels[-1]), HalvedAttention(channels[-1]), self._block(channels[-1])])
        self.up = self._decoder(channels, has_attention, num_blocks, skips)
        self.norm_out = nn.GroupNorm(num_groups(channels[0]), channels[0], eps=1e-6)
        self.conv_out = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        for layer in (*self.dense, self.conv_in):
            init_conv(cast(nn.Linear, layer))
        init_conv(self.conv_out, scale=1e-10)

    def _block(self, c_in: int, c_out: int | None = None, resample: nn.Module | None = None) -> ModulatedResBlock:
        time_width, latent_width, dropout = self.widths
        return ModulatedResBlock(c_in, c_out or c_in, time_width, latent_width, dropout, resample)

    def _encoder(
        self, channels: list[int], has_attention: list[bool], num_blocks: int
    ) -> tuple[nn.ModuleList, list[int]]:
        """The levels from full resolution to the coarsest, and the channels of the skip connections."""
        levels, skips, pyramid = nn.ModuleList(), [self.width], self.in_channels
        for i, c in enumerate(channels):
            level = ModulatedLevel()
            for _ in range(num_blocks):
                level.blocks.append(self._block(skips[-1], c))
                if has_attention[i]:
                    level.attention.append(HalvedAttention(c))
                skips.append(c)
            if i < len(channels) - 1:
                level.change = self._block(c, resample=SmoothDownsample())
                level.pyramid = SmoothStridedConv(pyramid, c)
                init_conv(level.pyramid.conv)
                pyramid = c
                skips.append(c)
            levels.append(level)
        return levels, skips

    def _decoder(
        self, channels: list[int], has_attention: list[bool], num_blocks: int, skips: list[int]
    ) -> nn.ModuleList:
        """The levels from the coarsest to full resolution."""
        levels, c_in = nn.ModuleList(), channels[-1]
        for i, c in reversed(list(enumerate(channels))):
            level = ModulatedLevel()
            for _ in range(num_blocks + 1):
                level.blocks.append(self._block(c_in + skips.pop(), c))
                c_in = c
            if has_attention[i]:
                level.attention.append(HalvedAttention(c))
            if i > 0:
                level.change = self._block(c, resample=SmoothUpsample())
            levels.append(level)
        return levels

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to clean ones.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, in steps of the chain.
            condition: `latent`, (B, latent_size), standard normal.

        Returns:
            (B, in_channels, image_size, image_size), in (-1, 1).

        Raises:
            ValueError: If there is no latent variable.
        """
        if condition is None or LATENT not in condition:
            raise ValueError("NCSNpp needs the latent variable of each image; train it with --model DDGAN")
        first, second = self.dense
        latent = self.mapping(condition[LATENT].to(self.conv_in.weight.dtype))
        embedding = sinusoidal_embedding(time, self.width).to(self.conv_in.weight.dtype)
        embedding = second(F.silu(first(embedding)))

        def run(block: nn.Module, h: Tensor) -> Tensor:
            return run_block(block, h, embedding, latent, recompute=self.checkpoint_blocks)

        skips, pyramid = [self.conv_in(x)], x
        for level in cast(list[ModulatedLevel], self.down):
            for i, block in enumerate(level.blocks):
                h = run(block, skips[-1])
                skips.append(level.attention[i](h) if len(level.attention) else h)
            if level.change is not None and level.pyramid is not None:
                pyramid = (level.pyramid(pyramid) + run(level.change, skips[-1])) * math.sqrt(0.5)
                skips.append(pyramid)
        before, attention, after = self.mid
        h = run(after, attention(run(before, skips[-1])))
        for level in cast(list[ModulatedLevel], self.up):
            for block in level.blocks:
                h = run(block, torch.cat([h, skips.pop()], dim=1))
            for attention in level.attention:
                h = attention(h)
            if level.change is not None:
                h = run(level.change, h)
        return torch.tanh(self.conv_out(F.silu(self.norm_out(h))))
