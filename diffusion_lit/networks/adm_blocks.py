"""Layers of ADM's networks, and the encoder that its U-Net and its classifier share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.networks.attention import Attention, count_heads
from diffusion_lit.networks.layers import Upsample, cosine_sine_embedding, level_channels, run_block
from diffusion_lit.networks.transformer import SpatialTransformer


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalization with the eps of OpenAI's code, 1e-5."""
    return nn.GroupNorm(groups, channels, eps=1e-5)


def zero_init(conv: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """Sets a layer's weights to zero, so that its residual block starts as the identity, and returns it."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


class ConditionedResBlock(nn.Module):
    """Residual block of two 3x3 convolutions, conditioned on an embedding; it can change the resolution.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        embedding_width: Length of the embedding.
        dropout: Dropout probability before the second convolution, in [0, 1).
        groups: Groups of the normalization layers.
        scale_shift_norm: Whether the embedding scales and shifts the output of the second normalization,
            GN(h) (1 + scale) + shift, or is added to its input.
        rescale: Whether the sum with the skip connection is divided by sqrt(2).
        resample: A change of resolution without parameters, applied on both branches before their convolutions
            (BigGAN); None: the resolution stays.

    Source: Dhariwal & Nichol 2021, sections 3 and 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_width: int,
        dropout: float,
        groups: int,
        scale_shift_norm: bool = True,
        rescale: bool = False,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift_norm = scale_shift_norm
        self.gain = math.sqrt(0.5) if rescale else 1.0
        self.resample = nn.Identity() if resample is None else resample
        self.in_layers = nn.Sequential(
            group_norm(in_channels, groups), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        embedded = 2 * out_channels if scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, embedded))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, in, H, W); embedding: (B, embedding_width). Returns (B, out, H', W')."""
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        shift = self.emb_layers(embedding)[:, :, None, None]
        norm, activation, dropout, conv = self.out_layers
        if self.scale_shift_norm:
            scale, shift = shift.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + shift)
        h = conv(dropout(activation(h)))
        return cast(Tensor, (self.skip_connection(self.resample(x)) + h) * self.gain)


class QKVAttention(Attention):
    """Self-attention over all positions of a feature map, with a skip connection.

    Args:
        channels: Channels of input and output.
        heads: Number of attention heads.
        groups: Groups of the normalization layer.
        qkv_first: Whether the output channels of `qkv` are split into queries, keys and values first and into heads
            second, or the other way round. It matters for stored weights only.

    Source: Dhariwal & Nichol 2021, section 3.
    """

    def __init__(self, channels: int, heads: int, groups: int, qkv_first: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_first = qkv_first
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        flat = x.flatten(2)
        h = self.attend(*split_heads(self.qkv(self.norm(flat)), self.heads, self.qkv_first))
        return x + cast(Tensor, self.proj_out(h.reshape(flat.shape))).reshape(x.shape)


def split_heads(qkv: Tensor, heads: int, qkv_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Splits (B, 3C, L) into queries, keys and values, (B, heads, C / heads, L) each.

    Args:
        qkv: What is split.
        heads: Number of attention heads.
        qkv_first: As for `QKVAttention`.
    """
    batch, channels, length = qkv.shape
    if qkv_first:
        q, k, v = qkv.reshape(batch, 3, heads, channels // (3 * heads), length).unbind(1)
    else:
        q, k, v = qkv.reshape(batch, heads, 3, channels // (3 * heads), length).unbind(2)
    return q, k, v


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, padded on all sides (OpenAI's code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C, H/2, W/2)."""
        return cast(Tensor, self.op(x))


class Stage(nn.ModuleList):
    """A sequence of layers, of which residual blocks get the embedding as well, and transformers the context."""

    def forward(
        self, h: Tensor, embedding: Tensor, skip: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Applies the layers in order.

        Args:
            h: Features, (B, C, H, W).
            embedding: (B, embedding_width).
            skip: Features that are concatenated to `h` first, (B, C', H, W).
            context: Tokens, (B, K, context_width), if there are transformers.

        Returns:
            The output of the last layer.
        """
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        for layer in self:
            if isinstance(layer, ConditionedResBlock):
                h = layer(h, embedding)
            elif isinstance(layer, SpatialTransformer):
                h = layer(h, context)
            else:
                h = layer(h)
        return h


class TimeEmbedding(nn.ModuleList):
    """Embedding of the time: cosines and sines, followed by two linear layers."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__([nn.Linear(width, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width)])
        self.width = width

    def forward(self, time: Tensor) -> Tensor:
        """time: (B,), in steps of the chain. Returns (B, embedding_width)."""
        first, activation, second = self
        sinusoids = cosine_sine_embedding(time, self.width).to(cast(Tensor, first.weight).dtype)
        return cast(Tensor, second(activation(first(sinusoids))))


@dataclass(frozen=True)
class LayerFactory:
    """Makes the layers of one network. The fields are arguments of `ADMUNet`."""

    embedding_width: int
    dropout: float
    num_groups: int
    num_heads: int
    head_channels: int | None
    scale_shift_norm: bool
    resblock_updown: bool
    residual_rescale: bool = False
    qkv_first: bool = False
    context_width: int | None = None
    transformer_depth: int = 1

    def block(self, c_in: int, c_out: int, resample: nn.Module | None = None) -> ConditionedResBlock:
        """A residual block."""
        return ConditionedResBlock(
            c_in,
            c_out,
            self.embedding_width,
            self.dropout,
            self.num_groups,
            self.scale_shift_norm,
            self.residual_rescale,
            resample,
        )

    def attention(self, c: int) -> QKVAttention | SpatialTransformer:
        """Self-attention, or with a context a transformer that attends to it too."""
        heads = count_heads(c, self.num_heads, self.head_channels)
        if self.context_width is None:
            return QKVAttention(c, heads, self.num_groups, self.qkv_first)
        return SpatialTransformer(c, heads, self.num_groups, self.context_width, self.transformer_depth)

    def down(self, c: int) -> nn.Module:
        """Halves the resolution."""
        return self.block(c, c, nn.AvgPool2d(2)) if self.resblock_updown else Downsample(c)

    def up(self, c: int) -> nn.Module:
        """Doubles the resolution."""
        if self.resblock_updown:
            return self.block(c, c, nn.Upsample(scale_factor=2.0, mode="nearest"))
        upsample = Upsample(c)
        upsample.conv.reset_parameters()
        return upsample

    def stage(self, c_in: int, c_out: int, attention: bool) -> Stage:
        """A residual block, followed by what `attention` makes if that argument is true."""
        return Stage([self.block(c_in, c_out), *([self.attention(c_out)] if attention else [])])


class Encoder(nn.Module):
    """Time embedding, encoder and middle: the part that ADM's U-Net and classifier share.

    Attributes:
        channels: Channels at each resolution, from full to coarsest.
        skip_channels: Output channels of each of `input_blocks`.
        checkpoint_blocks: Whether the blocks are recomputed in the backward pass.
    """

    checkpoint_blocks = False

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        width: int,
        multipliers: Sequence[int | float],
        num_blocks: int,
        attention: Sequence[int],
        layers: LayerFactory,
        concat_channels: int = 0,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.time_embed = TimeEmbedding(width, layers.embedding_width)
        self.channels = level_channels(width, multipliers)
        c = self.channels[0]
        self.skip_channels = [c]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels + concat_channels, c, 3, padding=1)])])
        for i, c_level in enumerate(self.channels):
            if i > 0:
                self.input_blocks.append(Stage([layers.down(c)]))
                self.skip_channels.append(c)
            for _ in range(num_blocks):
                self.input_blocks.append(layers.stage(c, c_level, image_size >> i in attention))
                c = c_level
                self.skip_channels.append(c)
        self.middle_block = Stage([layers.block(c, c), layers.attention(c), layers.block(c, c)])

    def encode(self, x: Tensor, embedding: Tensor, context: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Computes the features at the coarsest resolution, and the output of each of `input_blocks`."""
        skips = []
        for stage in self.input_blocks:
            x = run_block(stage, x, embedding, None, context, recompute=self.checkpoint_blocks)
            skips.append(x)
        return run_block(self.middle_block, x, embedding, None, context, recompute=self.checkpoint_blocks), skips
