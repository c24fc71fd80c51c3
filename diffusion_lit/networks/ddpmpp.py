"""DDPM++, the U-Net of the score SDE as EDM trains it."""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.networks.attention import Attention
from diffusion_lit.networks.layers import check_shape, level_channels, run_block, sinusoidal_embedding
from diffusion_lit.types import Condition, Network


def init(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> nn.Module:
    """Initializes weights by Glorot's uniform rule times `gain`, and biases with zeros; returns the layer."""
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.zeros_(cast(Tensor, layer.bias))
    return layer


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with at least 4 channels a group, at most 32 groups, and eps 1e-6."""
    return nn.GroupNorm(max(min(32, channels // 4), 1), channels, eps=1e-6)


class SingleHeadAttention(Attention):
    """Self-attention of one head over all positions, with a skip connection; their sum is divided by sqrt(2)."""

    heads = 1

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = init(nn.Conv2d(channels, 3 * channels, 1), math.sqrt(0.2))
        self.proj = init(nn.Conv2d(channels, channels, 1), 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        # Output channels are q, k and v of the first channel, then those of the second, as in EDM's weights.
        q, k, v = self.qkv(self.norm(x)).reshape(len(x), 1, x.shape[1], 3, -1).unbind(3)
        return (x + cast(Tensor, self.proj(self.attend(q, k, v).reshape(x.shape)))) * math.sqrt(0.5)


class PlusBlock(nn.Module):
    """Residual block of two 3x3 convolutions, conditioned on an embedding; it can change the resolution.

    The sum with the skip connection is divided by sqrt(2).

    Args:
        c_in: Channels of the input.
        c_out: Channels of the output.
        embedding_width: Length of the embedding, which is added between the convolutions.
        dropout: Dropout probability before the second convolution, in [0, 1).
        attention: Whether self-attention follows.
        resample: A change of resolution without parameters, applied on both branches before their convolutions.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        embedding_width: int,
        dropout: float,
        attention: bool = False,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.resample = nn.Identity() if resample is None else resample
        self.norm0, self.norm1 = group_norm(c_in), group_norm(c_out)
        self.conv0 = init(nn.Conv2d(c_in, c_out, 3, padding=1))
        self.affine = init(nn.Linear(embedding_width, c_out))
        self.dropout = nn.Dropout(dropout)
        self.conv1 = init(nn.Conv2d(c_out, c_out, 3, padding=1), 1e-5)
        same = c_in == c_out and resample is None
        self.skip = nn.Identity() if same else init(nn.Conv2d(c_in, c_out, 1))
        self.attention = SingleHeadAttention(c_out) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """x: (B, in, H, W), to which `skip` is concatenated; embedding: (B, width). Returns (B, out, H', W')."""
        x = x if skip is None else torch.cat([x, skip], dim=1)
        h = self.conv0(self.resample(F.silu(self.norm0(x)))) + self.affine(embedding)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        return cast(Tensor, self.attention((self.skip(self.resample(x)) + h) * math.sqrt(0.5)))


class DDPMpp(Network):
    """DDPM++ with BigGAN's resampling, conditioned on the time and optionally on a class label.

    Args:
        image_size: Height and width of the images, divisible by 2^(number of multipliers - 1).
        in_channels: Channels of the images.
        out_channels: Channels of the output; None: `in_channels`.
        width: Base number of channels, a multiple of 4.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of `width`.
        num_blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attention: Resolutions (heights in pixels) with self-attention: after every block in the encoder, after the last
            one in the decoder; the first block of the decoder always has it.
        dropout: Dropout probability in the residual blocks, in [0, 1).
        num_classes: Number of classes; None: labels are ignored.
        augment_dim: Numbers that say how an image was augmented; EDM has 9, and 0 where images are not augmented. Zeros
            stand for an image as it is, and are what the network is given without an entry `augment`.
        checkpoint_blocks: Whether to recompute the blocks in the backward pass instead of keeping their activations:
            less memory, a third more arithmetic.

    Attributes:
        has_null_label: True where there are classes: a negative label, or none, is mapped like a one-hot vector of
            zeros. It is learned only if labels are dropped in training: see `diffusion_lit.conditioner.Labels`.
        size_multiple: 2^(number of multipliers - 1); attention is at the levels of `image_size`.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels are no multiples of 4, an attention
            resolution does not occur, `dropout` lies outside [0, 1), `num_classes` is below 1 or `augment_dim` below 0.

    Source: Song et al. 2021 (score SDE), appendix H, with the sizes and initialization of Karras et al. 2022 (EDM),
    appendix F.2 and its code. The defaults are EDM's CIFAR-10 network.
    """

    def __init__(
        self,
        image_size: int = 32,
        in_channels: int = 3,
        out_channels: int | None = None,
        width: int = 128,
        multipliers: Sequence[int | float] = (2, 2, 2),
        num_blocks: int = 4,
        attention: Sequence[int] = (16,),
        dropout: float = 0.13,
        num_classes: int | None = None,
        augment_dim: int = 0,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        ends = {"in_channels": in_channels, "out_channels": in_channels if out_channels is None else out_channels}
        check_shape("DDPMpp", image_size, width, multipliers, num_blocks, attention, dropout, 4, ends)
        if (num_classes is not None and num_classes < 1) or augment_dim < 0:
            raise ValueError(
                f"DDPMpp: num_classes={num_classes} must be at least 1, and augment_dim={augment_dim} at least 0; "
                "num_classes=null means no classes"
            )
        self.image_size = image_size
        self.in_channels = in_channels
        self.size_multiple = 2 ** (len(multipliers) - 1)
        self.width = width
        self.num_classes = num_classes
        self.has_null_label = num_classes is not None
        self.checkpoint_blocks = checkpoint_blocks
        embedded = 4 * width
        if num_classes is not None:
            self.map_label = init(nn.Linear(num_classes, width))
        if augment_dim:
            self.map_augment = nn.Linear(augment_dim, width, bias=False)
            nn.init.xavier_uniform_(self.map_augment.weight)
        self.augment_dim = augment_dim
        self.map_layer0 = init(nn.Linear(width, embedded))
        self.map_layer1 = init(nn.Linear(embedded, embedded))

        def block(c_in: int, c_out: int, attends: bool = False, resample: nn.Module | None = None) -> PlusBlock:
            return PlusBlock(c_in, c_out, embedded, dropout, attends, resample)

        channels = level_channels(width, multipliers)
        attends = [image_size >> i in attention for i in range(len(channels))]
        self.conv_in = init(nn.Conv2d(in_channels, width, 3, padding=1))
        self.enc, skips = nn.ModuleList(), [width]
        for i, c in enumerate(channels):
            if i > 0:
                self.enc.append(block(skips[-1], skips[-1], resample=nn.AvgPool2d(2)))
                skips.append(skips[-1])
            for _ in range(num_blocks):
                self.enc.append(block(skips[-1], c, attends[i]))
                skips.append(c)
        c = channels[-1]
        self.mid = nn.ModuleList([block(c, c, True), block(c, c)])
        self.dec = nn.ModuleList()
        for i, c_level in reversed(list(enumerate(channels))):
            level = nn.ModuleList()
            if i < len(channels) - 1:
                level.append(block(c, c, resample=nn.Upsample(scale_factor=2.0, mode="nearest")))
            for j in range(num_blocks + 1):
                level.append(block(c + skips.pop(), c_level, attends[i] and j == num_blocks))
                c = c_level
            self.dec.append(level)
        self.norm_out = group_norm(c)
        self.conv_out = init(nn.Conv2d(c, ends["out_channels"], 3, padding=1), 1e-5)

    def embed(self, time: Tensor, condition: Condition | None, dtype: torch.dtype) -> Tensor:
        """The embedding of times and labels, (B, 4 width)."""
        embedding = sinusoidal_embedding(time, self.width).to(dtype)
        given = {} if condition is None else condition
        if self.num_classes is not None:
            label = given.get("label", torch.full_like(time, -1, dtype=torch.int64))
            if label.shape != time.shape:
                raise ValueError(
                    f"DDPMpp: labels of shape {tuple(label.shape)} for {len(time)} images; give one per image"
                )
            one_hot = F.one_hot(label.clamp(min=0), self.num_classes) * (label >= 0)[:, None]
            embedding = embedding + self.map_label(one_hot.to(dtype) * math.sqrt(self.num_classes))
        if self.augment_dim:
            # Also where all are zero: every parameter needs a gradient, if a zero one, in distributed training.
            augment = given.get("augment", embedding.new_zeros(len(time), self.augment_dim))
            embedding = embedding + self.map_augment(augment.to(dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(embedding))))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to the network's output.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32.
            condition: `label`: int64, (B,), below `num_classes`; a negative one, like a missing `label`, means no
                class. Ignored without classes. `augment`: (B, augment_dim); zeros if missing.

        Returns:
            (B, out_channels, image_size, image_size).

        Raises:
            ValueError: If labels are not (B,).
        """
        recompute = self.checkpoint_blocks
        embedding = self.embed(time, condition, cast(Tensor, self.conv_in.weight).dtype)
        h = cast(Tensor, self.conv_in(x))
        skips = [h]
        for block in self.enc:
            h = run_block(block, h, embedding, recompute=recompute)
            skips.append(h)
        for block in self.mid:
            h = run_block(block, h, embedding, recompute=recompute)
        for level in cast(list[nn.ModuleList], self.dec):
            for block in level:
                resamples = not isinstance(cast(PlusBlock, block).resample, nn.Identity)
                inputs = [] if resamples else [skips.pop()]
                h = run_block(block, h, embedding, *inputs, recompute=recompute)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(h))))
