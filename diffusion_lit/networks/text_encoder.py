"""The text encoder that latent diffusion trains together with its U-Net."""

from typing import cast

import torch
from torch import Tensor, nn

from diffusion_lit.networks.layers import MOST_BLOCKS, run_block
from diffusion_lit.networks.transformer import FeedForward, TokenAttention
from diffusion_lit.types import Part


class TextAttention(TokenAttention):
    """Self-attention of the tokens of a text; its last layer has the name that it has in x-transformers."""

    def __init__(self, width: int, heads: int, head_channels: int) -> None:
        super().__init__(width, heads, head_channels)
        self.to_out = nn.Linear(heads * head_channels, width)


class TextEncoder(nn.Module, Part):
    """A transformer over tokens, whose output is the context of an `ADMUNet`.

    Every token attends to every other, padding included: there is no mask, and published models, which were trained so,
    must be sampled so. Tokens of a layout, instead of a text, are encoded by the same network. Submodules have the
    names of the authors' code (x-transformers), so that published weights load by name.

    Args:
        vocabulary: Number of different tokens.
        length: Greatest number of tokens in a text.
        width: Channels of the tokens, `context_width` of the U-Net.
        depth: Number of blocks; with 0 each token of the context depends on its word alone.
        num_heads: Attention heads.
        head_channels: Channels per head; `num_heads * head_channels` may differ from `width`.
        output_head: Whether there is the layer from tokens to the vocabulary that published weights hold and nothing
            uses. It gets no gradient, which DistributedDataParallel takes for an error; leave it out to train.
        checkpoint_blocks: Whether to recompute the blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: If a number is below 1, or the depth below 0.

    Source: Rombach et al. 2022, appendix E.2.1 and table 17, and its code. With `vocabulary=30522` the defaults are the
    encoder of its text-to-image model, 543 M parameters, 582 M with the unused head.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int = 77,
        width: int = 1280,
        depth: int = 32,
        num_heads: int = 8,
        head_channels: int = 64,
        output_head: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "length": length, "width": width, "depth": depth}
        for name, size in {**sizes, "num_heads": num_heads, "head_channels": head_channels}.items():
            least = 0 if name == "depth" else 1
            if size < least:
                raise ValueError(f"TextEncoder: {name}={size} must be at least {least}")
        if depth > MOST_BLOCKS:
            raise ValueError(f"TextEncoder: depth={depth} must be at most {MOST_BLOCKS}")
        self.length = length
        self.width = width
        self.checkpoint_blocks = checkpoint_blocks
        self.token_emb = nn.Embedding(vocabulary, width)
        self.pos_emb = nn.ModuleDict({"emb": nn.Embedding(length, width)})
        layers = nn.ModuleList()
        for _ in range(depth):
            for layer in (TextAttention(width, num_heads, head_channels), FeedForward(width, gated=False)):
                layers.append(nn.ModuleList([nn.LayerNorm(width), layer]))
        self.attn_layers = nn.ModuleDict({"layers": layers})
        self.norm = nn.LayerNorm(width)
        if output_head:
            self.to_logits = nn.Linear(width, vocabulary)
        for embedding in (self.token_emb, self.pos_emb["emb"]):
            nn.init.normal_(cast(nn.Embedding, embedding).weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encodes texts.

        Args:
            tokens: int64, (B, L), L at most `length`, from 0 to `vocabulary` - 1. The range is not checked, because
                that would synchronize with the device.

        Returns:
            (B, L, width).

        Raises:
            ValueError: If there are more than `length` tokens, or they have another shape.
        """
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.length:
            raise ValueError(
                f"TextEncoder: tokens of shape {tuple(tokens.shape)}; give (B, L) with L from 1 to length={self.length}"
            )
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_emb(tokens) + self.pos_emb["emb"](positions)
        for pair in cast(nn.ModuleList, self.attn_layers["layers"]):
            norm, layer = cast(nn.ModuleList, pair)
            x = run_block(_residual, norm, layer, x, recompute=self.checkpoint_blocks)
        return cast(Tensor, self.norm(x))


def _residual(norm: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    return cast(Tensor, x + layer(norm(x)))
