"""Classifiers: of noisy images, for guidance, and of clean images, for features."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.networks.adm_blocks import Encoder, LayerFactory, group_norm, split_heads
from diffusion_lit.networks.attention import Attention, count_heads
from diffusion_lit.networks.layers import check_shape
from diffusion_lit.types import Part, TimeDependentClassifier


class AttentionPool2d(Attention):
    """Attention pooling: the mean of a feature map attends to the mean and to all positions.

    Args:
        size: Height and width of the feature map.
        channels: Channels of the feature map.
        heads: Number of attention heads.
        out_channels: Length of the output.

    Source: Radford et al. 2021 (CLIP), section 2.4; Dhariwal & Nichol 2021, section 4.
    """

    def __init__(self, size: int, channels: int, heads: int, out_channels: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, size**2 + 1) / math.sqrt(channels))
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, size, size). Returns (B, out_channels)."""
        flat = x.flatten(2)
        places = torch.cat([flat.mean(2, keepdim=True), flat], dim=2) + self.positional_embedding
        q, k, v = split_heads(self.qkv_proj(places), self.heads, qkv_first=True)
        pooled = self.attend(q[..., :1], k, v).flatten(1, 2)
        return cast(Tensor, self.c_proj(pooled)).squeeze(2)


class NoisyClassifier(Encoder, TimeDependentClassifier):
    """ADM's classifier of noisy images: the encoder of `ADMUNet`, followed by attention pooling.

    Submodules have the names of the authors' code, so that published weights load by name.

    Args:
        image_size: Height and width of the images, divisible by 2^(number of multipliers - 1).
        in_channels: Channels of the images.
        num_classes: Number of classes.
        width: Base number of channels, a multiple of `num_groups`.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of `width`; may be fractions.
        num_blocks: Residual blocks per resolution (the paper's depth).
        attention: Resolutions (heights in pixels) with self-attention after every block; the middle of the network
            always has self-attention.
        head_channels: Channels per attention head, in the pooling too.
        dropout: Dropout probability in the residual blocks, in [0, 1).
        scale_shift_norm: Whether the time scales and shifts normalized features, or is added to the features.
        resblock_updown: Whether residual blocks (BigGAN) or plain convolutions change the resolution.
        num_groups: Groups of the normalization layers; every resolution's channels are a multiple of it.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels cannot be divided into groups or
            heads, an attention resolution does not occur, or `dropout` lies outside [0, 1).

    Source: Dhariwal & Nichol 2021, section 4 and table 12. The defaults are its 128x128 classifier, 43 M parameters.
    """

    def __init__(
        self,
        image_size: int = 128,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: int = 128,
        multipliers: Sequence[int | float] = (1, 1, 2, 3, 4),
        num_blocks: int = 2,
        attention: Sequence[int] = (32, 16, 8),
        head_channels: int = 64,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        num_groups: int = 32,
    ) -> None:
        ends = {"in_channels": in_channels, "num_classes": num_classes}
        check_shape("NoisyClassifier", image_size, width, multipliers, num_blocks, attention, dropout, num_groups, ends)
        layers = LayerFactory(4 * width, dropout, num_groups, 1, head_channels, scale_shift_norm, resblock_updown)
        super().__init__(image_size, in_channels, width, multipliers, num_blocks, attention, layers)
        self.num_classes = num_classes
        c = self.channels[-1]
        size = image_size >> (len(multipliers) - 1)
        pool = AttentionPool2d(size, c, count_heads(c, 1, head_channels), num_classes)
        self.out = nn.Sequential(group_norm(c, num_groups), nn.SiLU(), pool)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Classifies noisy images.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, in steps of the chain.

        Returns:
            Logits, (B, num_classes).
        """
        h, _ = self.encode(x, self.time_embed(time))
        return cast(Tensor, self.out(h))


STAGE = 6
"""Layers of a stage of `ConvClassifier`: twice convolution, normalization and activation."""


class ConvClassifier(nn.Module, Part):
    """A small convolutional classifier of clean images, for its features.

    It has three stages of two 3x3 convolutions with batch normalization; the second and the third halve the resolution.

    Args:
        image_size: Height and width of the images in pixels, at least 4.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        width: Channels of the first stage; the others have two and four times as many.
        dropout: Dropout probability on the features, in [0, 1).

    Attributes:
        num_features: Length of the feature vectors, 4 `width`.

    Raises:
        ValueError: If `image_size` is below 4.
    """

    def __init__(
        self, image_size: int, in_channels: int = 3, num_classes: int = 10, width: int = 32, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"network.image_size={image_size} must be at least 4: the network halves it twice")
        self.image_size = image_size
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.num_features = 4 * width
        layers: list[nn.Module] = []
        channels = in_channels
        for stage, out in enumerate((width, 2 * width, 4 * width)):
            for half in range(2):
                stride = 2 if stage > 0 and half == 0 else 1
                layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
                channels = out
        self.trunk = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(self.num_features, num_classes)

    def stages(self, x: Tensor) -> list[Tensor]:
        """Maps images in [-1, 1], (B, C, H, W), to the output of each of the three stages."""
        outputs = []
        for layer in range(0, len(self.trunk), STAGE):
            x = self.trunk[layer : layer + STAGE](x)
            outputs.append(x)
        return outputs

    def features(self, x: Tensor) -> Tensor:
        """Maps images in [-1, 1], (B, C, H, W), to the mean of the last stage over all positions, (B, 4 width)."""
        return torch.mean(self.trunk(x), dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images in [-1, 1], (B, C, H, W), to logits, (B, num_classes)."""
        logits: Tensor = self.head(self.dropout(self.features(x)))
        return logits
