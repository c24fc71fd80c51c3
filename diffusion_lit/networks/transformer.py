"""Transformer layers over tokens, and the transformer that stands in a U-Net and attends to a context."""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lit.networks.attention import Attention
from diffusion_lit.networks.layers import group_norm


class TokenAttention(Attention):
    """Attention of tokens to each other, or to the tokens of a context.

    Args:
        width: Channels of the tokens.
        heads: Number of attention heads.
        head_channels: Channels per head; `heads * head_channels` may differ from `width`.
        context_width: Channels of the context's tokens; None: the tokens attend to each other.

    Attributes:
        cross: Whether keys and values come from a context.

    Source: Vaswani et al. 2017, section 3.2; Rombach et al. 2022, section 3.3, and its code (no bias before the
    attention).
    """

    def __init__(self, width: int, heads: int, head_channels: int, context_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.cross = context_width is not None
        inner = heads * head_channels
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width if context_width is None else context_width, inner, bias=False)
        self.to_v = nn.Linear(width if context_width is None else context_width, inner, bias=False)
        self.to_out: nn.Module = nn.Sequential(nn.Linear(inner, width))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, L, width); context: (B, K, context_width), for cross-attention. Returns (B, L, width)."""
        source = context if self.cross and context is not None else x
        q, k, v = (self._split(y) for y in (self.to_q(x), self.to_k(source), self.to_v(source)))
        return cast(Tensor, self.to_out(self.attend(q, k, v).flatten(1, 2).transpose(1, 2)))

    def _split(self, y: Tensor) -> Tensor:
        """(B, L, heads * c) to (B, heads, c, L)."""
        return y.reshape(*y.shape[:2], self.heads, -1).permute(0, 2, 3, 1)


class GEGLU(nn.Module):
    """A linear layer, of whose output one half is multiplied by the GELU of the other.

    Args:
        width: Channels of the input.
        out_width: Channels of the output.

    Source: Shazeer 2020, eq. 6; the exact GELU.
    """

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out_width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width). Returns (..., out_width)."""
        values, gate = self.proj(x).chunk(2, dim=-1)
        return cast(Tensor, values * F.gelu(gate))


class FeedForward(nn.Module):
    """Two linear layers over each token, with four times its channels between them.

    Args:
        width: Channels of input and output.
        gated: Whether the activation is GEGLU, or GELU.
    """

    def __init__(self, width: int, gated: bool = True) -> None:
        super().__init__()
        inner = 4 * width
        first = GEGLU(width, inner) if gated else nn.Sequential(nn.Linear(width, inner), nn.GELU())
        # The authors have a dropout of probability 0 in second place: the names of the weights count it.
        self.net = nn.Sequential(first, nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, width). Returns the same shape."""
        return cast(Tensor, self.net(x))


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, and a gated feed-forward layer, each of them normalized and residual.

    Args:
        width: Channels of the tokens.
        heads: Number of attention heads.
        head_channels: Channels per head.
        context_width: Channels of the context's tokens.

    Source: Rombach et al. 2022, its code. The paper's table has the feed-forward layer before the cross-attention;
    published weights have it last.
    """

    def __init__(self, width: int, heads: int, head_channels: int, context_width: int) -> None:
        super().__init__()
        self.attn1 = TokenAttention(width, heads, head_channels)
        self.ff = FeedForward(width)
        self.attn2 = TokenAttention(width, heads, head_channels, context_width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B, L, width); context: (B, K, context_width). Returns the shape of x."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return cast(Tensor, x + self.ff(self.norm3(x)))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of a feature map, which also attend to a context, with a skip connection.

    Submodules have the names of the authors' code, so that published weights load by name. The last layer starts at
    zero, so that the whole starts as the identity.

    Args:
        channels: Channels of input and output.
        heads: Number of attention heads, a divisor of `channels`.
        groups: Groups of the normalization layer, whose eps is 1e-6.
        context_width: Channels of the context's tokens.
        depth: Number of transformer blocks.

    Source: Rombach et al. 2022, section 3.3 and appendix E.2.1.
    """

    def __init__(self, channels: int, heads: int, groups: int, context_width: int, depth: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, groups)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        blocks = [TransformerBlock(channels, heads, channels // heads, context_width) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Conv2d(channels, channels, 1)
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: (B, C, H, W); context: (B, K, context_width). Returns the shape of x."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + cast(Tensor, self.proj_out(tokens.transpose(1, 2).reshape(x.shape)))
