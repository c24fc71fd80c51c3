"""The pieces of the DDPM U-Net: time embedding, residual block, self-attention, changes of resolution; and what other
U-Nets share with it.
"""

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def init_conv(conv: nn.Conv2d | nn.Linear, scale: float = 1.0) -> None:
    """Uniform variance-scaling over the mean of fan-in and fan-out, and no bias.

    Args:
        conv: The layer, changed in place.
        scale: Variance relative to Glorot's; DDPM starts the last layer of each branch at 1e-10, so that
            every block begins as the identity.

    Source: Ho et al. 2020, appendix B and its code.
    """
    nn.init.xavier_uniform_(conv.weight, gain=math.sqrt(scale))
    nn.init.zeros_(cast(Tensor, conv.bias))


def sinusoidal_embedding(time: Tensor, width: int) -> Tensor:
    """[sin, cos] of the time at frequencies from 1 down to 1e-4, geometrically spaced, both ends included.

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
    """[cos, sin] of the time at width / 2 frequencies 10,000^(-2i / width), of which 1 is the first.

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
    """The time multiplied by 10,000^(-i / denominator), i < count; (B, count)."""
    exponents = torch.arange(count, device=time.device, dtype=torch.float32) / denominator
    return time.float()[:, None] * torch.exp(-math.log(10_000) * exponents)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation as the DDPM code has it, eps 1e-6."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def count_heads(channels: int, num_heads: int, head_channels: int | None = None) -> int:
    """How many heads attention over so many channels has.

    Args:
        channels: Of the attention.
        num_heads: That many, unless head_channels is given.
        head_channels: As many heads as have so many channels each.

    Raises:
        ValueError: If the channels cannot be split so.
    """
    asked = f"num_heads={num_heads}" if head_channels is None else f"heads of head_channels={head_channels}"
    divisor = num_heads if head_channels is None else head_channels
    if divisor < 1 or channels % divisor:
        raise ValueError(f"attention: {channels} channels cannot be split into {asked}; use a divisor")
    return num_heads if head_channels is None else channels // head_channels


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every query to all keys.

    Args:
        q: Queries, (B, heads, channels per head, queries).
        k: Keys, (B, heads, channels per head, positions).
        v: Values, shaped as the keys.

    Returns:
        The shape of q.
    """

    def channels_last(y: Tensor) -> Tensor:
        # Strided inputs would silently select a slow kernel on the CPU.
        return y.transpose(2, 3).contiguous()

    return F.scaled_dot_product_attention(channels_last(q), channels_last(k), channels_last(v)).transpose(2, 3)


def check_shape(
    network: str,
    image_size: int,
    width: int,
    multipliers: Sequence[int],
    num_blocks: int,
    attention: Sequence[int],
    dropout: float,
    num_groups: int,
    ends: dict[str, int],
) -> None:
    """Refuses hyper-parameters that make no U-Net. They are those of `UNet`; messages begin with `network`.
    `ends` holds the channels of its input and output, by name.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels cannot be divided into groups, an
            attention resolution does not occur, or dropout lies outside [0, 1).
    """
    halvings = len(multipliers) - 1
    if halvings < 0 or num_blocks < 1 or min(multipliers, default=1) < 1:
        raise ValueError(f"{network}: multipliers={list(multipliers)} and num_blocks={num_blocks} must be at least 1")
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
    resolutions = [image_size >> i for i in range(halvings + 1)]
    for resolution in attention:
        if resolution not in resolutions:
            raise ValueError(
                f"{network}: attention at {resolution} pixels, but the resolutions are {resolutions}; "
                "choose attention from these"
            )
    for name, count in ends.items():
        if count < 1:
            raise ValueError(f"{network}: {name}={count} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"{network}: dropout={dropout} must lie in [0, 1); DDPM uses 0.1 for CIFAR-10")


def run_block(block: Callable[..., Tensor], *inputs: object, recompute: bool) -> Tensor:
    """What a block makes of its inputs.

    Args:
        block: A function or module.
        inputs: Its arguments, in order.
        recompute: Whether, for gradients, the inputs alone are kept and the block is run again on the way back, with
            the same dropout. Gradients are the same.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the time embedding, with a skip connection.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        time_width: Length of the time embedding.
        dropout: Before the second convolution, in [0, 1).
        groups: Of the normalisation.

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


class SelfAttention(nn.Module):
    """Every position attends to every other, with a skip connection.

    Args:
        channels: Of input and output.
        heads: How many parts the channels are split into.
        groups: Of the normalisation.

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
        h = attend(self.q(h).reshape(split), self.k(h).reshape(split), self.v(h).reshape(split))
        return x + cast(Tensor, self.proj_out(h.reshape(x.shape)))


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, padded on the right and below only (DDPM code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)
        init_conv(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C, H/2, W/2)."""
        return cast(Tensor, self.conv(F.pad(x, (0, 1, 0, 1))))


class Upsample(nn.Module):
    """Doubles the resolution by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        init_conv(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C, 2H, 2W)."""
        return cast(Tensor, self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")))
