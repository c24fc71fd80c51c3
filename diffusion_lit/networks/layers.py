"""The pieces of the DDPM U-Net: time embedding, residual block, self-attention, and changes of resolution."""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    half = width // 2
    exponents = torch.arange(half, device=time.device, dtype=torch.float32) / (half - 1)
    angles = time.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation as the DDPM code has it, eps 1e-6."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


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
        if heads < 1 or channels % heads:
            raise ValueError(
                f"SelfAttention: {channels} channels cannot be split into num_heads={heads}; use a divisor"
            )
        self.heads = heads
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
        batch, channels, height, width = x.shape
        h = self.norm(x)

        def heads_last(y: Tensor) -> Tensor:
            # Strided inputs would silently select a slow kernel on the CPU.
            split = y.reshape(batch, self.heads, channels // self.heads, height * width)
            return split.transpose(2, 3).contiguous()

        h = F.scaled_dot_product_attention(heads_last(self.q(h)), heads_last(self.k(h)), heads_last(self.v(h)))
        h = h.transpose(2, 3).reshape(batch, channels, height, width)
        return x + cast(Tensor, self.proj_out(h))


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
