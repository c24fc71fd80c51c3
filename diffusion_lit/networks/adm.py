"""The U-Net of ADM, and the classifier of noisy images that is its first half."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.networks.layers import (
    Upsample,
    attend,
    check_shape,
    cosine_sine_embedding,
    count_heads,
    run_block,
)
from diffusion_lit.types import Condition


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation as OpenAI's code has it, eps 1e-5."""
    return nn.GroupNorm(groups, channels, eps=1e-5)


def zeroed(conv: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """Starts a layer at zero, so that its block begins as the identity."""
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(cast(Tensor, conv.bias))
    return conv


class ConditionedResBlock(nn.Module):
    """Two 3x3 convolutions around the embedding of time and class, with a skip connection, at one resolution or
    between two.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        embedding_width: Length of the embedding.
        dropout: Before the second convolution, in [0, 1).
        groups: Of the normalisation.
        scale_shift_norm: Whether the embedding gives scale and shift of the second normalisation,
            GN(h) (1 + scale) + shift, or is added ahead of it.
        rescale: Whether the sum with the skip connection is divided by sqrt 2.
        resample: A change of resolution without parameters, done on both branches ahead of their convolutions
            (BigGAN); None: none.

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
        told = 2 * out_channels if scale_shift_norm else out_channels
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_width, told))
        self.out_layers = nn.Sequential(
            group_norm(out_channels, groups),
            nn.SiLU(),
            nn.Dropout(dropout),
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x: (B, in, H, W); embedding: (B, embedding_width). Returns (B, out, H', W')."""
        norm, activation, conv = self.in_layers
        h = conv(self.resample(activation(norm(x))))
        told = self.emb_layers(embedding)[:, :, None, None]
        norm, activation, dropout, conv = self.out_layers
        if self.scale_shift_norm:
            scale, shift = told.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + told)
        h = conv(dropout(activation(h)))
        return cast(Tensor, (self.skip_connection(self.resample(x)) + h) * self.gain)


class QKVAttention(nn.Module):
    """Every position attends to every other, with a skip connection.

    Args:
        channels: Of input and output.
        heads: How many parts the channels are split into.
        groups: Of the normalisation.
        qkv_first: Whether the channels that `qkv` puts out are split into queries, keys and values first and into
            heads then, or the other way round. Only stored weights see the difference.

    Source: Dhariwal & Nichol 2021, section 3.
    """

    def __init__(self, channels: int, heads: int, groups: int, qkv_first: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_first = qkv_first
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        flat = x.flatten(2)
        h = attend(*split_heads(self.qkv(self.norm(flat)), self.heads, self.qkv_first))
        return x + cast(Tensor, self.proj_out(h.reshape(flat.shape))).reshape(x.shape)


def split_heads(qkv: Tensor, heads: int, qkv_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each (B, heads, C / heads, L), of (B, 3C, L); `qkv_first` as in `QKVAttention`."""
    batch, channels, length = qkv.shape
    if qkv_first:
        q, k, v = qkv.reshape(batch, 3, heads, channels // (3 * heads), length).unbind(1)
    else:
        q, k, v = qkv.reshape(batch, heads, 3, channels // (3 * heads), length).unbind(2)
    return q, k, v


class AttentionPool2d(nn.Module):
    """Pools a feature map: its mean attends to the mean and to every position, each with a learned place.

    Args:
        size: Height and width of the map.
        channels: Of the map.
        heads: How many parts the channels are split into.
        out_channels: Length of the result.

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
        pooled = attend(q[..., :1], k, v).flatten(1, 2)
        return cast(Tensor, self.c_proj(pooled)).squeeze(2)


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, padded on all sides (OpenAI's code)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, C, H/2, W/2)."""
        return cast(Tensor, self.op(x))


class Stage(nn.ModuleList):
    """Layers one after another, of which the residual blocks are told the embedding."""

    def forward(self, h: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """h, and skip with it: (B, C, H, W); embedding: (B, embedding_width). Returns what the last layer does."""
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        for layer in self:
            h = layer(h, embedding) if isinstance(layer, ConditionedResBlock) else layer(h)
        return h


class TimeEmbedding(nn.ModuleList):
    """Cosines and sines of the time, and two layers on top."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__([nn.Linear(width, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width)])
        self.width = width

    def forward(self, time: Tensor) -> Tensor:
        """time: (B,), in steps of the chain. Returns (B, embedding_width)."""
        first, activation, second = self
        sinusoids = cosine_sine_embedding(time, self.width).to(cast(Tensor, first.weight).dtype)
        return cast(Tensor, second(activation(first(sinusoids))))


@dataclass(frozen=True)
class Parts:
    """Makes the layers of a network, all alike but for their channels; the fields are arguments of `ADMUNet`."""

    embedding_width: int
    dropout: float
    num_groups: int
    num_heads: int
    head_channels: int | None
    scale_shift_norm: bool
    resblock_updown: bool
    residual_rescale: bool = False
    qkv_first: bool = False

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

    def attention(self, c: int) -> QKVAttention:
        """Self-attention."""
        return QKVAttention(c, count_heads(c, self.num_heads, self.head_channels), self.num_groups, self.qkv_first)

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
        """A residual block, with attention if asked for."""
        return Stage([self.block(c_in, c_out), *([self.attention(c_out)] if attention else [])])


class Encoder(nn.Module):
    """What U-Net and classifier share: the embedding of the time, the way down and the coarsest resolution.

    Attributes:
        skip_channels: Channels that each of `input_blocks` puts out.
        checkpoint_blocks: Whether blocks are computed again for gradients.
    """

    checkpoint_blocks = False

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        width: int,
        multipliers: Sequence[int],
        num_blocks: int,
        attention: Sequence[int],
        parts: Parts,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.time_embed = TimeEmbedding(width, parts.embedding_width)
        c = width * multipliers[0]
        self.skip_channels = [c]
        self.input_blocks = nn.ModuleList([Stage([nn.Conv2d(in_channels, c, 3, padding=1)])])
        for i, multiplier in enumerate(multipliers):
            if i > 0:
                self.input_blocks.append(Stage([parts.down(c)]))
                self.skip_channels.append(c)
            for _ in range(num_blocks):
                self.input_blocks.append(parts.stage(c, width * multiplier, image_size >> i in attention))
                c = width * multiplier
                self.skip_channels.append(c)
        self.middle_block = Stage([parts.block(c, c), parts.attention(c), parts.block(c, c)])

    def encode(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The coarsest feature map, and what each of `input_blocks` put out on the way to it."""
        skips = []
        for stage in self.input_blocks:
            x = run_block(stage, x, embedding, recompute=self.checkpoint_blocks)
            skips.append(x)
        return run_block(self.middle_block, x, embedding, recompute=self.checkpoint_blocks), skips


class ADMUNet(Encoder):
    """A U-Net over images, told a time and, if it has classes, a class. Submodules are named as in the authors' code,
    so that published weights fit by name.

    Args:
        image_size: Height and width of the images; must halve len(multipliers) - 1 times.
        in_channels: Of the images.
        out_channels: Of the output; None: as many as in_channels. A learned variance takes twice as many.
        width: What the multipliers multiply, itself a multiple of num_groups.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of width.
        num_blocks: Residual blocks per resolution on the way down; one more on the way up.
        attention: Resolutions (heights in pixels) with self-attention after every block; the coarsest always
            has one in the middle.
        num_heads: Attention heads at every resolution, unless head_channels is given.
        head_channels: Channels per head: the more channels, the more heads. None: num_heads heads.
        dropout: In the residual blocks, in [0, 1).
        scale_shift_norm: Whether the embedding scales and shifts the normalised features, or is added to features.
        resblock_updown: Whether residual blocks change the resolution (BigGAN), or convolutions do.
        residual_rescale: Whether residual blocks divide their sum by sqrt 2; the paper tried it and left it out.
        num_classes: How many classes there are; None: labels are not looked at.
        label_dropout: Probability, in [0, 1), that an image's label is replaced by the null label in training. Above
            0 there is a null label, of index num_classes, for classifier-free guidance.
        num_groups: Groups of the normalisation.
        qkv_first: Order of the rows of `qkv`: split into queries, keys and values ahead of heads, as in the
            published ImageNet 64x64 weights, or into heads first, as in the others. Makes no other difference.
        checkpoint_blocks: As for `UNet`.

    Attributes:
        has_null_label: Whether it can predict without a label although it has classes.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels cannot be divided into groups or
            heads, an attention resolution does not occur, a probability lies outside [0, 1), or there are labels to
            drop but no classes.

    Source: Dhariwal & Nichol 2021 (ADM), section 3 and table 11. With head_channels=64, out_channels=6 and dropout=0.1
    the defaults are its LSUN network, 553 M parameters.
    """

    def __init__(
        self,
        image_size: int = 256,
        in_channels: int = 3,
        out_channels: int | None = None,
        width: int = 256,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4, 4),
        num_blocks: int = 2,
        attention: Sequence[int] = (32, 16, 8),
        num_heads: int = 1,
        head_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        residual_rescale: bool = False,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        num_groups: int = 32,
        qkv_first: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        ends = {"in_channels": in_channels, "out_channels": in_channels if out_channels is None else out_channels}
        check_shape("ADMUNet", image_size, width, multipliers, num_blocks, attention, dropout, num_groups, ends)
        self._check_labels(num_classes, label_dropout)
        parts = Parts(
            4 * width,
            dropout,
            num_groups,
            num_heads,
            head_channels,
            scale_shift_norm,
            resblock_updown,
            residual_rescale,
            qkv_first,
        )
        super().__init__(image_size, in_channels, width, multipliers, num_blocks, attention, parts)
        self.checkpoint_blocks = checkpoint_blocks
        self.num_classes = num_classes
        self.label_dropout = label_dropout
        self.has_null_label = label_dropout > 0
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + self.has_null_label, parts.embedding_width)

        c = width * multipliers[-1]
        skips = list(self.skip_channels)
        self.output_blocks = nn.ModuleList()
        for i, multiplier in reversed(list(enumerate(multipliers))):
            for _ in range(num_blocks + 1):
                stage = parts.stage(c + skips.pop(), width * multiplier, image_size >> i in attention)
                self.output_blocks.append(stage)
                c = width * multiplier
            if i > 0:
                stage.append(parts.up(c))
        out = zeroed(nn.Conv2d(c, in_channels if out_channels is None else out_channels, 3, padding=1))
        self.out = nn.Sequential(group_norm(c, num_groups), nn.SiLU(), out)

    @staticmethod
    def _check_labels(num_classes: int | None, label_dropout: float) -> None:
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"ADMUNet: num_classes={num_classes} must be at least 1; null means no classes")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"ADMUNet: label_dropout={label_dropout} must lie in [0, 1); 0.1 is usual")
        if label_dropout > 0 and num_classes is None:
            raise ValueError(
                f"ADMUNet: label_dropout={label_dropout} but there are no labels to drop; set num_classes, or "
                "label_dropout to 0"
            )

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to the network's output.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, in steps of the chain.
            condition: `label`: int64, (B,), below num_classes, or num_classes itself where there is a null label;
                their range is not checked here, where that would make the device wait. Without it every image has
                the null label. Nothing else is looked at, nor is the label without classes.

        Returns:
            (B, out_channels, image_size, image_size).

        Raises:
            ValueError: If labels are needed and missing, or are not (B,).
        """
        embedding = self.time_embed(time)
        if self.num_classes is not None:
            label = self._labels(None if condition is None else condition.get("label"), x)
            embedding = embedding + self.label_emb(label)
        h, skips = self.encode(x, embedding)
        for stage in self.output_blocks:
            h = run_block(stage, h, embedding, skips.pop(), recompute=self.checkpoint_blocks)
        return cast(Tensor, self.out(h))

    def _labels(self, label: Tensor | None, x: Tensor) -> Tensor:
        """The labels to embed, int64, (B,): with dropout in training, and null where there are none."""
        null = cast(int, self.num_classes)
        if label is None:
            if not self.has_null_label:
                raise ValueError(
                    f"ADMUNet: no label given to a network with num_classes={null} and no null label; "
                    "give labels, or train with label_dropout above 0"
                )
            return torch.full((len(x),), null, device=x.device)
        if label.shape != (len(x),):
            raise ValueError(f"ADMUNet: labels of shape {tuple(label.shape)} for {len(x)} images; give one per image")
        if self.training and self.has_null_label:
            dropped = torch.rand(len(x), device=x.device) < self.label_dropout
            label = label.masked_fill(dropped, null)
        return label


class NoisyClassifier(Encoder):
    """Which class a noisy image is of: the first half of `ADMUNet`, and attention pooling. Submodules are named as in
    the authors' code, so that published weights fit by name.

    Args:
        image_size: Height and width of the images; must halve len(multipliers) - 1 times.
        in_channels: Of the images.
        num_classes: How many classes there are.
        width: As for `ADMUNet`.
        multipliers: As for `ADMUNet`.
        num_blocks: Residual blocks per resolution, the paper's depth.
        attention: As for `ADMUNet`.
        head_channels: Channels per attention head, in the pooling too.
        dropout: In the residual blocks, in [0, 1).
        scale_shift_norm: As for `ADMUNet`.
        resblock_updown: As for `ADMUNet`.
        num_groups: Groups of the normalisation.

    Raises:
        ValueError: As `ADMUNet` does.

    Source: Dhariwal & Nichol 2021, section 4 and table 12. The defaults are its 128x128 classifier, 43 M parameters.
    """

    def __init__(
        self,
        image_size: int = 128,
        in_channels: int = 3,
        num_classes: int = 1000,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 3, 4),
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
        parts = Parts(4 * width, dropout, num_groups, 1, head_channels, scale_shift_norm, resblock_updown)
        super().__init__(image_size, in_channels, width, multipliers, num_blocks, attention, parts)
        self.num_classes = num_classes
        c = width * multipliers[-1]
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
