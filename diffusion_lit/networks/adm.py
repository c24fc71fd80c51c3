"""The U-Net of ADM."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.networks.adm_blocks import Encoder, LayerFactory, group_norm, zero_init
from diffusion_lit.networks.layers import check_shape, run_block
from diffusion_lit.types import Condition, Network


class ADMUNet(Encoder, Network):
    """The U-Net of ADM, conditioned on the time and optionally on a class label.

    Submodules have the names of the authors' code, so that published weights load by name.

    Args:
        image_size: Height and width of the images, divisible by 2^(number of multipliers - 1).
        in_channels: Channels of the images.
        out_channels: Channels of the output; None: `in_channels`. A learned variance needs twice as many.
        width: Base number of channels, a multiple of `num_groups`.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of `width`; may be fractions.
        num_blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attention: Resolutions (heights in pixels) with self-attention after every block; the middle of the network
            always has self-attention.
        num_heads: Number of attention heads, unless `head_channels` is given.
        head_channels: Channels per attention head; None: `num_heads` heads at every resolution.
        dropout: Dropout probability in the residual blocks, in [0, 1).
        scale_shift_norm: Whether the embedding scales and shifts normalized features, or is added to the features.
        resblock_updown: Whether residual blocks (BigGAN) or plain convolutions change the resolution.
        residual_rescale: Whether residual blocks divide their sum by sqrt(2); the paper's ablation, not its choice.
        num_classes: Number of classes; None: labels are ignored.
        null_label: Whether there is an embedding for "no label" too, row `num_classes`, as classifier-free guidance
            needs. It is learned only if labels are dropped in training: see `diffusion_lit.conditioner.Labels`.
        num_groups: Groups of the normalization layers; every resolution's channels are a multiple of it.
        qkv_first: Order of the rows of `qkv`: queries, keys and values first, as in the published ImageNet 64x64
            weights, or heads first, as in the others. It matters for stored weights only.
        checkpoint_blocks: Whether to recompute the blocks in the backward pass instead of keeping their activations:
            less memory, a third more arithmetic.

    Attributes:
        has_null_label: The argument `null_label`.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels cannot be divided into groups or
            heads, an attention resolution does not occur, `dropout` lies outside [0, 1), or there is a null label
            without classes.

    Source: Dhariwal & Nichol 2021 (ADM), section 3 and table 11. With `head_channels=64`, `out_channels=6` and
    `dropout=0.1` the defaults are its LSUN network, 553 M parameters.
    """

    def __init__(
        self,
        image_size: int = 256,
        in_channels: int = 3,
        out_channels: int | None = None,
        width: int = 256,
        multipliers: Sequence[int | float] = (1, 1, 2, 2, 4, 4),
        num_blocks: int = 2,
        attention: Sequence[int] = (32, 16, 8),
        num_heads: int = 1,
        head_channels: int | None = None,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        residual_rescale: bool = False,
        num_classes: int | None = None,
        null_label: bool = False,
        num_groups: int = 32,
        qkv_first: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        ends = {"in_channels": in_channels, "out_channels": in_channels if out_channels is None else out_channels}
        check_shape("ADMUNet", image_size, width, multipliers, num_blocks, attention, dropout, num_groups, ends)
        self._check_labels(num_classes, null_label)
        layers = LayerFactory(
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
        super().__init__(image_size, in_channels, width, multipliers, num_blocks, attention, layers)
        self.checkpoint_blocks = checkpoint_blocks
        self.num_classes = num_classes
        self.has_null_label = null_label
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + null_label, layers.embedding_width)

        self.output_blocks = self._decoder(num_blocks, attention, layers)
        c = self.channels[0]
        out = zero_init(nn.Conv2d(c, ends["out_channels"], 3, padding=1))
        self.out = nn.Sequential(group_norm(c, num_groups), nn.SiLU(), out)

    def _decoder(self, num_blocks: int, attention: Sequence[int], layers: LayerFactory) -> nn.ModuleList:
        stages = nn.ModuleList()
        skips = list(self.skip_channels)
        c = self.channels[-1]
        for i, c_level in reversed(list(enumerate(self.channels))):
            for _ in range(num_blocks + 1):
                stage = layers.stage(c + skips.pop(), c_level, self.image_size >> i in attention)
                stages.append(stage)
                c = c_level
            if i > 0:
                stage.append(layers.up(c))
        return stages

    @staticmethod
    def _check_labels(num_classes: int | None, null_label: bool) -> None:
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"ADMUNet: num_classes={num_classes} must be at least 1; null means no classes")
        if null_label and num_classes is None:
            raise ValueError("ADMUNet: null_label=true needs classes; set num_classes, or null_label to false")

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to the network's output.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, in steps of the chain.
            condition: `label`: int64, (B,), below `num_classes`; with a null label, a negative one stands for it,
                and without `label` every image has it. The range is not checked, because that would synchronize with
                the device. Other entries are ignored, and so is `label` without classes.

        Returns:
            (B, out_channels, image_size, image_size).

        Raises:
            ValueError: If labels are required and missing, or are not (B,).
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
        """Rows of the embedding, int64, (B,)."""
        null = cast(int, self.num_classes)
        if label is None:
            if not self.has_null_label:
                raise ValueError(
                    f"ADMUNet: no label given to a network with num_classes={null} and no null label; "
                    "give labels, or train one with null_label=true"
                )
            return torch.full((len(x),), null, device=x.device)
        if label.shape != (len(x),):
            raise ValueError(f"ADMUNet: labels of shape {tuple(label.shape)} for {len(x)} images; give one per image")
        return label.masked_fill(label < 0, null) if self.has_null_label else label
