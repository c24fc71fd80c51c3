"""The U-Net of DDPM."""

from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.networks.layers import (
    Downsample,
    ResBlock,
    SelfAttention,
    Upsample,
    check_shape,
    group_norm,
    init_conv,
    level_channels,
    run_block,
    sinusoidal_embedding,
)
from diffusion_lit.types import Condition, Network

MakeBlock: TypeAlias = Callable[[int, int], ResBlock]
MakeAttention: TypeAlias = Callable[[int], SelfAttention]


class Level(nn.Module):
    """The blocks of one resolution, their attention layers if there are any, and the change to the next resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def apply_block(self, i: int, h: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """Runs block i on the channels of `h` and `skip`, and then its attention layer if there is one."""
        h = self.block[i](h if skip is None else torch.cat([h, skip], dim=1), embedding)
        return cast(Tensor, self.attn[i](h)) if len(self.attn) else h


class Middle(nn.Module):
    """The middle of the network, at the coarsest resolution."""

    def __init__(self, block_1: ResBlock, attn_1: SelfAttention, block_2: ResBlock) -> None:
        super().__init__()
        self.block_1 = block_1
        self.attn_1 = attn_1
        self.block_2 = block_2

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: (B, C, H, W); embedding: (B, time_width). Returns the shape of h."""
        return cast(Tensor, self.block_2(self.attn_1(self.block_1(h, embedding)), embedding))


class UNet(Network):
    """The U-Net of DDPM, conditioned on the time only.

    Submodules have the names of the authors' PyTorch code (DDIM), so that published weights load by name.

    Args:
        image_size: Height and width of the images, divisible by 2^(number of multipliers - 1).
        in_channels: Channels of the images.
        out_channels: Channels of the output; None: `in_channels`.
        width: Base number of channels, a multiple of `num_groups`.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of `width`; may be fractions.
        num_blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attention: Resolutions (heights in pixels) with self-attention after every block; the middle of the network
            always has self-attention.
        num_heads: Number of attention heads.
        dropout: Dropout probability in the residual blocks, in [0, 1).
        num_groups: Groups of the normalization layers; every resolution's channels are a multiple of it.
        checkpoint_blocks: Whether to recompute the blocks in the backward pass instead of keeping their activations:
            less memory, a third more arithmetic.

    Attributes:
        size_multiple: 2^(number of multipliers - 1); attention is at the levels of `image_size`.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels cannot be divided into groups or
            heads, an attention resolution does not occur, or `dropout` lies outside [0, 1).

    Source: Ho et al. 2020, appendix B. The defaults are its CIFAR-10 network, 35.7 M parameters.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        width: int = 128,
        multipliers: Sequence[int | float] = (1, 2, 2, 2),
        num_blocks: int = 2,
        attention: Sequence[int] = (16,),
        num_heads: int = 1,
        dropout: float = 0.1,
        num_groups: int = 32,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        ends = {"in_channels": in_channels, "out_channels": in_channels if out_channels is None else out_channels}
        check_shape("UNet", image_size, width, multipliers, num_blocks, attention, dropout, num_groups, ends)
        self.image_size = image_size
        self.in_channels = in_channels
        self.size_multiple = 2 ** (len(multipliers) - 1)
        self.width = width
        self.checkpoint_blocks = checkpoint_blocks
        time_width = 4 * width
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, time_width), nn.Linear(time_width, time_width)])
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        for layer in (*self.temb.dense, self.conv_in):
            init_conv(cast(nn.Linear, layer))

        def block(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, time_width, dropout, num_groups)

        def attention_layer(c: int) -> SelfAttention:
            return SelfAttention(c, num_heads, num_groups)

        channels = level_channels(width, multipliers)
        has_attention = [image_size >> i in attention for i in range(len(channels))]
        self.down, skips = self._encoder(channels, has_attention, num_blocks, block, attention_layer)
        c = channels[-1]
        self.mid = Middle(block(c, c), attention_layer(c), block(c, c))
        self.up = self._decoder(channels, has_attention, num_blocks, block, attention_layer, skips)

        self.norm_out = group_norm(channels[0], num_groups)
        self.conv_out = nn.Conv2d(channels[0], ends["out_channels"], 3, padding=1)
        init_conv(self.conv_out, scale=1e-10)

    def _encoder(
        self,
        channels: list[int],
        has_attention: list[bool],
        num_blocks: int,
        block: MakeBlock,
        attention_layer: MakeAttention,
    ) -> tuple[nn.ModuleList, list[int]]:
        """The levels from full resolution to the coarsest, and the channels of the skip connections."""
        levels = nn.ModuleList()
        skips = [self.width]
        for i, c in enumerate(channels):
            level = Level()
            for _ in range(num_blocks):
                level.block.append(block(skips[-1], c))
                if has_attention[i]:
                    level.attn.append(attention_layer(c))
                skips.append(c)
            if i < len(channels) - 1:
                level.downsample = Downsample(c)
                skips.append(c)
            levels.append(level)
        return levels, skips

    @staticmethod
    def _decoder(
        channels: list[int],
        has_attention: list[bool],
        num_blocks: int,
        block: MakeBlock,
        attention_layer: MakeAttention,
        skips: list[int],
    ) -> nn.ModuleList:
        """The levels of the way back, made from the coarsest on and stored from full resolution on."""
        levels = []
        c_in = channels[-1]
        for i, c in reversed(list(enumerate(channels))):
            level = Level()
            for _ in range(num_blocks + 1):
                level.block.append(block(c_in + skips.pop(), c))
                c_in = c
                if has_attention[i]:
                    level.attn.append(attention_layer(c))
            if i > 0:
                level.upsample = Upsample(c)
            levels.append(level)
        return nn.ModuleList(reversed(levels))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to the network's output.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, in steps of the chain.
            condition: Ignored; this network is unconditional.

        Returns:
            (B, out_channels, image_size, image_size).
        """
        embedding = sinusoidal_embedding(time, self.width).to(self.conv_in.weight.dtype)
        first, second = cast(nn.ModuleList, self.temb.dense)
        embedding = second(F.silu(first(embedding)))

        h = self.conv_in(x)
        skips = [h]
        for level in cast(list[Level], self.down):
            for i in range(len(level.block)):
                h = run_block(level.apply_block, i, h, embedding, recompute=self.checkpoint_blocks)
                skips.append(h)
            if level.downsample is not None:
                h = level.downsample(h)
                skips.append(h)

        h = run_block(self.mid, h, embedding, recompute=self.checkpoint_blocks)

        for level in cast(list[Level], reversed(self.up)):
            for i in range(len(level.block)):
                h = run_block(level.apply_block, i, h, embedding, skips.pop(), recompute=self.checkpoint_blocks)
            if level.upsample is not None:
                h = level.upsample(h)

        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))
