"""The U-Net of DDPM."""

from collections.abc import Sequence
from typing import cast

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
    run_block,
    sinusoidal_embedding,
)
from diffusion_lit.types import Condition


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if this resolution has it, and the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def apply_block(self, i: int, h: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """Block i, given the channels of h and of skip, and, if there is one, its attention."""
        h = self.block[i](h if skip is None else torch.cat([h, skip], dim=1), embedding)
        return cast(Tensor, self.attn[i](h)) if len(self.attn) else h


class Middle(nn.Module):
    """The coarsest resolution, between the way down and the way up."""

    def __init__(self, block_1: ResBlock, attn_1: SelfAttention, block_2: ResBlock) -> None:
        super().__init__()
        self.block_1 = block_1
        self.attn_1 = attn_1
        self.block_2 = block_2

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """h: (B, C, H, W); embedding: (B, time_width). Returns the shape of h."""
        return cast(Tensor, self.block_2(self.attn_1(self.block_1(h, embedding)), embedding))


class UNet(nn.Module):
    """A U-Net over images, told a time. Submodules are named as in the authors' PyTorch code (DDIM), so that
    published weights fit by name.

    Args:
        image_size: Height and width of the images; must halve len(multipliers) - 1 times.
        in_channels: Of the images.
        out_channels: Of the output; None: as many as in_channels.
        width: Channels at full resolution, a multiple of num_groups.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of width.
        num_blocks: Residual blocks per resolution on the way down; one more on the way up.
        attention: Resolutions (heights in pixels) with self-attention after every block; the coarsest always
            has one in the middle.
        num_heads: Attention heads.
        dropout: In the residual blocks, in [0, 1).
        num_groups: Groups of the normalisation.
        checkpoint_blocks: Whether, for gradients, a block's inputs alone are kept and what lies in it is computed
            again: less memory, a third more arithmetic.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels cannot be divided into groups or
            heads, an attention resolution does not occur, or dropout lies outside [0, 1).

    Source: Ho et al. 2020, appendix B. The defaults are its CIFAR-10 network, 35.7 M parameters.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
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
        self.width = width
        self.checkpoint_blocks = checkpoint_blocks
        time_width = 4 * width
        channels = [width * m for m in multipliers]
        resolutions = [image_size >> i for i in range(len(channels))]

        def res_block(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, time_width, dropout, num_groups)

        def self_attention(c: int) -> SelfAttention:
            return SelfAttention(c, num_heads, num_groups)

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(width, time_width), nn.Linear(time_width, time_width)])
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        for layer in (*self.temb.dense, self.conv_in):
            init_conv(cast(nn.Linear, layer))

        skips = [width]
        c = width
        self.down = nn.ModuleList()
        for i, (c_level, resolution) in enumerate(zip(channels, resolutions, strict=True)):
            level = Level()
            for _ in range(num_blocks):
                level.block.append(res_block(c, c_level))
                c = c_level
                if resolution in attention:
                    level.attn.append(self_attention(c))
                skips.append(c)
            if i < len(channels) - 1:
                level.downsample = Downsample(c)
                skips.append(c)
            self.down.append(level)

        self.mid = Middle(res_block(c, c), self_attention(c), res_block(c, c))

        levels_up = []
        for i, (c_level, resolution) in reversed(list(enumerate(zip(channels, resolutions, strict=True)))):
            level = Level()
            for _ in range(num_blocks + 1):
                level.block.append(res_block(c + skips.pop(), c_level))
                c = c_level
                if resolution in attention:
                    level.attn.append(self_attention(c))
            if i > 0:
                level.upsample = Upsample(c)
            levels_up.append(level)
        self.up = nn.ModuleList(reversed(levels_up))

        self.norm_out = group_norm(c, num_groups)
        self.conv_out = nn.Conv2d(c, in_channels if out_channels is None else out_channels, 3, padding=1)
        init_conv(self.conv_out, scale=1e-10)

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to the network's output.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, in steps of the chain.
            condition: Not used: this network is unconditional.

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
