"""The autoencoder of latent diffusion: a convolutional encoder and decoder around a regularizer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.networks.layers import (
    Downsample,
    SelfAttention,
    Upsample,
    check_shape,
    group_norm,
    level_channels,
)
from diffusion_lit.networks.regularizer import DiagonalGaussian, Regularizer
from diffusion_lit.types import Part


@dataclass(frozen=True)
class Reconstruction:
    """What the training pass of an autoencoder returns.

    Attributes:
        images: Reconstructions, (B, C, H, W), unbounded.
        latents: What the decoder got, (B, z, h, w).
        terms: The regularizer's losses per image by name, (B,) each.
        codes: Which code each position has, int64, (B, h, w); None: there are none.
    """

    images: Tensor
    latents: Tensor
    terms: dict[str, Tensor]
    codes: Tensor | None


class Block(nn.Module):
    """Residual block of two 3x3 convolutions: DDPM's without the time, and not zero at first.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dropout: Dropout probability before the second convolution, in [0, 1).
        groups: Groups of the normalization layers.
    """

    def __init__(self, in_channels: int, out_channels: int, dropout: float, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in, H, W). Returns (B, out, H, W)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return cast(Tensor, h + (x if self.nin_shortcut is None else self.nin_shortcut(x)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if there is any, and the change to the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        resample = self.upsample if self.downsample is None else self.downsample
        return h if resample is None else cast(Tensor, resample(h))


class Middle(nn.Module):
    """The blocks at the coarsest resolution, with attention between them unless it is None."""

    def __init__(self, block_1: Block, attn_1: SelfAttention | None, block_2: Block) -> None:
        super().__init__()
        self.block_1 = block_1
        self.attn_1 = attn_1
        self.block_2 = block_2

    def forward(self, h: Tensor) -> Tensor:
        h = self.block_1(h)
        return cast(Tensor, self.block_2(h if self.attn_1 is None else self.attn_1(h)))


@dataclass(frozen=True)
class Layout:
    """What encoder and decoder share.

    Attributes:
        channels: Channels at each resolution, from full to coarsest.
        has_attention: Whether a resolution has attention, likewise.
        middle_attention: Whether the middle has attention.
        dropout: Dropout probability.
        groups: Groups of the normalization layers.
    """

    channels: list[int]
    has_attention: list[bool]
    middle_attention: bool
    dropout: float
    groups: int

    def level(self, i: int, c_in: int, num_blocks: int) -> Level:
        """The blocks of resolution i, without a change of resolution."""
        level = Level()
        for _ in range(num_blocks):
            level.block.append(Block(c_in, self.channels[i], self.dropout, self.groups))
            c_in = self.channels[i]
            if self.has_attention[i]:
                level.attn.append(SelfAttention(c_in, 1, self.groups))
        return level

    def middle(self) -> Middle:
        """The blocks at the coarsest resolution."""
        c = self.channels[-1]
        attention = SelfAttention(c, 1, self.groups) if self.middle_attention else None
        blocks = [Block(c, c, self.dropout, self.groups) for _ in range(2)]
        return Middle(blocks[0], attention, blocks[1])


class Encoder(nn.Module):
    """Images, (B, C, H, W), to features, (B, out_channels, H / f, W / f); the arguments are those of `Autoencoder`."""

    def __init__(self, in_channels: int, out_channels: int, width: int, num_blocks: int, layout: Layout) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        c = width
        for i, c_level in enumerate(layout.channels):
            level = layout.level(i, c, num_blocks)
            c = c_level
            if i < len(layout.channels) - 1:
                level.downsample = Downsample(c)
            self.down.append(level)
        self.mid = layout.middle()
        self.norm_out = group_norm(c, layout.groups)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(self.mid(h)))))


class Decoder(nn.Module):
    """Latents, (B, z, h, w), to images, (B, C, f h, f w), without bounds; one block more per resolution."""

    def __init__(self, latent_channels: int, out_channels: int, num_blocks: int, layout: Layout) -> None:
        super().__init__()
        c = layout.channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, c, 3, padding=1)
        self.mid = layout.middle()
        levels = []
        for i, c_level in reversed(list(enumerate(layout.channels))):
            level = layout.level(i, c, num_blocks + 1)
            c = c_level
            if i > 0:
                level.upsample = Upsample(c)
            levels.append(level)
        # Stored from full resolution on.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(c, layout.groups)
        self.conv_out = nn.Conv2d(c, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))


class Autoencoder(nn.Module, Part):
    """The first stage of latent diffusion, KL- or VQ-regularized.

    Encoder and decoder are convolutional: images of any height and width divisible by `factor` can be encoded. The
    encoder downsamples with padding on the right and at the bottom only, so that it does not commute with mirroring.
    Submodules have the names of the published code, so that published weights load by name.

    Args:
        image_size: Height and width of the training images, divisible by 2^(number of multipliers - 1).
        in_channels: Channels of the images.
        latent_channels: Channels z of the latents.
        width: Base number of channels, a multiple of `num_groups`.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of `width`.
        num_blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attention: Resolutions (heights in pixels, of images of `image_size`) with self-attention after every block.
        middle_attention: Whether there is self-attention between the two middle blocks.
        regularizer: What stands between encoder and decoder.
        num_groups: Groups of the normalization layers.
        dropout: Dropout probability in the residual blocks, in [0, 1).

    Attributes:
        factor: Downsampling factor f, 2^(number of multipliers - 1).
        regularizer: Stored as `quantize`, under which published codebooks are found.

    Raises:
        ValueError: If an argument is out of range.

    Source: Rombach et al. 2022, appendix E.1 and G, and its code. The defaults are its KL model with f = 4, 55,312,063
    parameters.
    """

    def __init__(
        self,
        image_size: int = 256,
        in_channels: int = 3,
        latent_channels: int = 3,
        width: int = 128,
        multipliers: Sequence[int | float] = (1, 2, 4),
        num_blocks: int = 2,
        attention: Sequence[int] = (),
        middle_attention: bool = True,
        regularizer: Regularizer = DiagonalGaussian(),
        num_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        ends = {"in_channels": in_channels, "latent_channels": latent_channels}
        check_shape("Autoencoder", image_size, width, multipliers, num_blocks, attention, dropout, num_groups, ends)
        self.image_size = image_size
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.factor = 2 ** (len(multipliers) - 1)
        has_attention = [image_size >> i in attention for i in range(len(multipliers))]
        layout = Layout(level_channels(width, multipliers), has_attention, middle_attention, dropout, num_groups)
        moments = regularizer.channels(latent_channels)
        self.encoder = Encoder(in_channels, moments, width, num_blocks, layout)
        self.decoder = Decoder(latent_channels, in_channels, num_blocks, layout)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                # Shared layers begin as DDPM's do; these begin as torch's, like the published code.
                layer.reset_parameters()
        regularizer.build(latent_channels)
        self.quantize = regularizer

    @property
    def regularizer(self) -> Regularizer:
        return self.quantize

    def moments(self, images: Tensor) -> Tensor:
        """Encodes images.

        Args:
            images: (B, in_channels, H, W), in [-1, 1]; H and W divisible by `factor`.

        Returns:
            (B, regularizer.channels(z), H / factor, W / factor): mean and log-variance, or latents before quantisation.

        Raises:
            ValueError: If the images have another number of channels, or H or W is not divisible.
        """
        _, c, h, w = images.shape
        if c != self.in_channels or h % self.factor or w % self.factor:
            raise ValueError(
                f"Autoencoder: images of {c} channels and {h} x {w} pixels; it takes {self.in_channels} channels, and "
                f"sizes divisible by its factor {self.factor}; crop or pad the images"
            )
        return cast(Tensor, self.quant_conv(self.encoder(images)))

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes latents, (B, z, h, w), which a VQ model quantises first, to images, (B, C, H, W), unbounded."""
        return self._decode(self.regularizer.decoded(latents))

    def _decode(self, latents: Tensor) -> Tensor:
        return cast(Tensor, self.decoder(self.post_quant_conv(latents)))

    def forward(self, images: Tensor) -> Reconstruction:
        """The training pass: encodes, regularizes and decodes images; arguments and errors as for `moments`."""
        regularized = self.regularizer(self.moments(images))
        decoded = self._decode(regularized.latents)
        return Reconstruction(decoded, regularized.latents, regularized.terms, regularized.codes)
