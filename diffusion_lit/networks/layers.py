"""Layers of the DDPM U-Net, and functions that all U-Nets here share."""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion_lit.networks.attention import Attention, count_heads


def init_conv(conv: nn.Conv2d | nn.Linear, scale: float = 1.0) -> None:
    """Initializes a layer by uniform variance scaling over the mean of fan-in and fan-out, and its bias with zeros.

    Args:
        conv: The layer, changed in place.
        scale: Variance relative to Glorot's. DDPM uses 1e-10 for the last layer of each residual branch, so that
            every block starts as the identity.

    Source: Ho et al. 2020, appendix B and its code.
    """
    nn.init.xavier_uniform_(conv.weight, gain=math.sqrt(scale))
    nn.init.zeros_(cast(Tensor, conv.bias))


def sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """Embeds times as [sin, cos] at geometrically spaced frequencies, from 1 to 1e-4 inclusive.

    Args:
        time: (B,), in steps of the chain, not scaled to [0, 1].
        width: Length of the embedding, even and at least 4.

    Returns:
        float32, (B, width).

    Source: Ho et al. 2020, appendix B, and its code (denominator half - 1).
    """
    angles = _angles(time, width // 2, width // 2 - 1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def cosine_sine_embedding(time: Tensor, width: int) -> Tensor:
    """Embeds times as [cos, sin] at the frequencies 10,000^(-2i / width), 0 <= i < width / 2.

    Args:
        time: (B,), in steps of the chain, not scaled to [0, 1].
        width: Length of the embedding, even.

    Returns:
        float32, (B, width).

    Source: Nichol & Dhariwal 2021, code; Dhariwal & Nichol 2021 likewise.
    """
    angles = _angles(time, width // 2, width // 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _angles(time: Tensor, count: int, denominator: int) -> Tensor:
    """The times multiplied by 10,000^(-i / denominator), 0 <= i < count; (B, count)."""
    exponents = torch.arange(count, device=time.device, dtype=torch.float32) / denominator
    return time.float()[:, None] * torch.exp(-math.log(10_000) * exponents)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalization with the eps of the DDPM code, 1e-6."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


MOST_BLOCKS = 1000
"""More than anyone has trained; each takes time to make and memory."""


def check_shape(
    network: str,
    image_size: int,
    width: int,
    multipliers: Sequence[int | float],
    num_blocks: int,
    attention: Sequence[int],
    dropout: float,
    num_groups: int,
    ends: dict[str, int],
) -> None:
    """Checks the arguments of a U-Net.

    Args:
        network: Class name, with which messages begin.
        image_size: As for `UNet`, like the arguments that follow.
        width: Base number of channels.
        multipliers: Channels of each resolution, as multiples of `width`.
        num_blocks: Residual blocks per resolution.
        attention: Resolutions with attention.
        dropout: Dropout probability.
        num_groups: Groups of the normalization layers.
        ends: Channels of the input and of the output, by argument name.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels are not whole multiples of `num_groups`,
            an attention resolution does not occur, `dropout` lies outside [0, 1), or a number is below 1.
    """
    if not multipliers:
        raise ValueError(f"{network}: multipliers=[] must hold at least 1 number, one per resolution")
    for name, count in {"num_blocks": num_blocks, **ends}.items():
        if count < 1:
            raise ValueError(f"{network}: {name}={count} must be at least 1")
    if num_blocks > MOST_BLOCKS:
        raise ValueError(f"{network}: num_blocks={num_blocks} must be at most {MOST_BLOCKS}")
    halvings = len(multipliers) - 1
    if image_size < 1 or image_size % 2**halvings:
        raise ValueError(
            f"{network}: image_size={image_size} cannot be halved {halvings} times; "
            f"use a multiple of {2**halvings}, or fewer than {halvings + 1} multipliers"
        )
    if width < 4 or width % 2:
        raise ValueError(f"{network}: width={width} must be even and at least 4: half are sines, half cosines")
    if num_groups < 1 or width % num_groups:
        raise ValueError(
            f"{network}: num_groups={num_groups} does not divide width={width}; make width a multiple of num_groups"
        )
    for multiplier in multipliers:
        groups = width * multiplier / num_groups
        # Written so that NaN and infinity are refused too.
        if not (groups > 0.5 and min(groups % 1, 1 - groups % 1) < 1e-6):
            raise ValueError(
                f"{network}: multiplier {multiplier} of width={width} makes {width * multiplier:g} channels; "
                f"choose multipliers that make whole multiples of num_groups={num_groups}"
            )
    resolutions = [image_size >> i for i in range(halvings + 1)]
    for resolution in attention:
        if resolution not in resolutions:
            raise ValueError(
                f"{network}: attention at {resolution} pixels, but the resolutions are {resolutions}; "
                "choose attention from these"
            )
    if not 0 <= dropout < 1:
        raise ValueError(f"{network}: dropout={dropout} must lie in [0, 1); DDPM uses 0.1 for CIFAR-10")


def level_channels(width: int, multipliers: Sequence[int | float]) -> list[int]:
    """Channels at each resolution, from full to coarsest; `check_shape` has checked that they are whole numbers."""
    return [round(width * multiplier) for multiplier in multipliers]


def run_block(block: Callable[..., Tensor], *inputs: object, recompute: bool) -> Tensor:
    """Calls a block, optionally with gradient checkpointing.

    Args:
        block: A function or module.
        inputs: Its positional arguments.
        recompute: Whether to keep the inputs alone for the backward pass and to run the block again there, with the
            same dropout. The gradients are the same.

    Returns:
        The output of the block.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class ResBlock(nn.Module):
    """Residual block of two 3x3 convolutions; the time embedding is added between them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_width: Length of the time embedding.
        dropout: Dropout probability before the second convolution, in [0, 1).
        groups: Groups of the normalization layers.

    Source: Ho et al. 2020, appendix B.
    """

    def __init__(self, in_channels: int, out_channels: int, time_width: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.temb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        for layer in (self.conv1, self.temb_proj):
            init_conv(layer)
        init_conv(self.conv2, scale=1e-10)
        self.nin_shortcut: nn.Conv2d | None = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
            init_conv(self.nin_shortcut)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, in, H, W); embedding: (B, time_width). Returns (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.temb_proj(F.silu(embedding))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return cast(Tensor, h + (x if self.nin_shortcut is None else self.nin_shortcut(x)))


class SelfAttention(Attention):
    """Self-attention over all positions of a feature map, with a skip connection.

    Args:
        channels: Channels of input and output.
        heads: Number of attention heads.
        groups: Groups of the normalization layer.

    Raises:
        ValueError: If the channels cannot be divided into heads.

    Source: Ho et al. 2020, appendix B (one head).
    """

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = count_heads(channels, heads)
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        for layer in (self.q, self.k, self.v):
            init_conv(layer)
        init_conv(self.proj_out, scale=1e-10)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        h = self.norm(x)
        split = (x.shape[0], self.heads, x.shape[1] // self.heads, -1)
        h = self.attend(self.q(h).reshape(split), self.k(h).reshape(split), self.v(h).reshape(split))
        return x + cast(Tensor, self.proj_out(h.reshape(x.shape)))


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, padded on the right and at the bottom only (DDPM code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        init_conv(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C, H/2, W/2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Doubles the resolution by nearest-neighbor interpolation, followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        init_conv(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C, 2H, 2W)."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
