"""The U-Net of ADM, which latent diffusion has with attention to a context and further input channels."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.networks.adm_blocks import Encoder, LayerFactory, TimeEmbedding, group_norm, zero_init
from diffusion_lit.networks.layers import MOST_BLOCKS, check_shape, run_block
from diffusion_lit.types import Condition, Network


class ADMUNet(Encoder, Network):
    """The U-Net of ADM, conditioned on the time and optionally on a class label, a context of tokens and images.

    Submodules have the names of the authors' code, so that published weights load by name.

    Args:
        image_size: Height and width of the images, divisible by 2^(number of multipliers - 1).
        in_channels: Channels of the images, or of what else is diffused, without `concat_channels`.
        out_channels: Channels of the output; None: `in_channels`. A learned variance needs twice as many.
        width: Base number of channels, a multiple of `num_groups`.
        multipliers: Channels at each resolution, from full to coarsest, as multiples of `width`; may be fractions.
        num_blocks: Residual blocks per resolution in the encoder; the decoder has one more.
        attention: Resolutions (heights in pixels) with self-attention after every block; the middle of the network
            always has it, and with [] it alone.
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
        context_width: Channels of the tokens of the condition `context`, to which every attention layer, then a
            transformer, attends; None: there is no context.
        transformer_depth: Blocks of each transformer.
        concat_channels: Channels of the condition `concat`, which is concatenated to the images; 0: there is none.
        level: Whether the condition `level`, such as the time to which a low-resolution image is noised, is embedded
            as the time is, by layers of its own, and added to it.

    Attributes:
        has_null_label: The argument `null_label`.
        context_width: The argument.
        concat_channels: The argument.
        has_level: The argument `level`.
        size_multiple: 2^(number of multipliers - 1); attention is at the levels of `image_size`.

    Raises:
        ValueError: If the image size cannot be halved often enough, channels cannot be divided into groups or
            heads, an attention resolution does not occur, `dropout` lies outside [0, 1), there is a null label
            without classes, or a number of channels or blocks is too small.

    Source: Dhariwal & Nichol 2021 (ADM), section 3 and table 11. With `head_channels=64`, `out_channels=6` and
    `dropout=0.1` the defaults are its LSUN network, 553 M parameters. Context and concatenation: Rombach et al. 2022
    (latent diffusion), section 3.3. The level: Ho et al. 2021 (cascaded diffusion models), section 4.2.
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
        context_width: int | None = None,
        transformer_depth: int = 1,
        concat_channels: int = 0,
        level: bool = False,
    ) -> None:
        ends = {"in_channels": in_channels, "out_channels": in_channels if out_channels is None else out_channels}
        check_shape("ADMUNet", image_size, width, multipliers, num_blocks, attention, dropout, num_groups, ends)
        self._check_labels(num_classes, null_label)
        self._check_conditions(context_width, transformer_depth, concat_channels)
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
            context_width,
            transformer_depth,
        )
        super().__init__(image_size, in_channels, width, multipliers, num_blocks, attention, layers, concat_channels)
        self.context_width = context_width
        self.concat_channels = concat_channels
        self.size_multiple = 2 ** (len(multipliers) - 1)
        self.checkpoint_blocks = checkpoint_blocks
        self.num_classes = num_classes
        self.has_null_label = null_label
        self.has_level = level
        if level:
            self.level_embed = TimeEmbedding(width, layers.embedding_width)
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

    @staticmethod
    def _check_conditions(context_width: int | None, transformer_depth: int, concat_channels: int) -> None:
        if context_width is not None and context_width < 1:
            raise ValueError(f"ADMUNet: context_width={context_width} must be at least 1; null means no context")
        if transformer_depth < 1:
            raise ValueError(f"ADMUNet: transformer_depth={transformer_depth} must be at least 1")
        if transformer_depth > MOST_BLOCKS:
            raise ValueError(f"ADMUNet: transformer_depth={transformer_depth} must be at most {MOST_BLOCKS}")
        if transformer_depth != 1 and context_width is None:
            raise ValueError(
                f"ADMUNet: transformer_depth={transformer_depth} needs transformers; set context_width, or "
                "transformer_depth to 1"
            )
        if concat_channels < 0:
            raise ValueError(f"ADMUNet: concat_channels={concat_channels} must be at least 0")

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        """Maps noisy images to the network's output.

        Args:
            x: (B, in_channels, image_size, image_size).
            time: (B,), float32, in steps of the chain.
            condition: Entries by name; those that the network was not made for are ignored.
                `label`: int64, (B,), below `num_classes`; with a null label, a negative one stands for it, and without
                `label` every image has it. The range is not checked, because that would synchronize with the device.
                `context`: tokens, (B, K, context_width), K at least 1.
                `concat`: (B, concat_channels, image_size, image_size).
                `level`: (B,), float32, in the units of `time`.

        Returns:
            (B, out_channels, image_size, image_size).

        Raises:
            ValueError: If an entry is required and missing, or has another shape.
        """
        given = {} if condition is None else condition
        embedding = self.time_embed(time)
        if self.num_classes is not None:
            embedding = embedding + self.label_emb(self._labels(given.get("label"), x))
        if self.has_level:
            embedding = embedding + self.level_embed(self._required(given, "level", (len(x),)))
        context = None
        if self.context_width is not None:
            context = self._required(given, "context", (len(x), None, self.context_width))
        if self.concat_channels:
            concat = self._required(given, "concat", (len(x), self.concat_channels, *x.shape[2:]))
            x = torch.cat([x, concat.to(x.dtype)], dim=1)
        h, skips = self.encode(x, embedding, context)
        for stage in self.output_blocks:
            h = run_block(stage, h, embedding, skips.pop(), context, recompute=self.checkpoint_blocks)
        return cast(Tensor, self.out(h))

    @staticmethod
    def _required(condition: Condition, name: str, shape: tuple[int | None, ...]) -> Tensor:
        """An entry of the condition; None in its shape stands for any number above 0."""
        wanted = f"({', '.join('K' if n is None else str(n) for n in shape)})"
        tensor = condition.get(name)
        if tensor is None:
            raise ValueError(
                f"ADMUNet: no {name} given to a network that needs it, {wanted}; set a conditioner that makes {name}"
            )
        fits = len(shape) == tensor.ndim and all(
            found > 0 if n is None else found == n for found, n in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise ValueError(f"ADMUNet: {name} of shape {tuple(tensor.shape)}, but the network needs {wanted}")
        return tensor

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
