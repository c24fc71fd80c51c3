"""Softmax attention, and control over it: reading and replacing the attention weights of a network."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

AttendFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v) -> the values, mixed by attention; shapes as in `attend`."""

ControlFn: TypeAlias = Callable[[str, Tensor], Tensor]
"""(name, weights) -> weights: called once per attention layer and forward pass.

`name` is the layer's name in `network.named_modules()`; `network.get_submodule(name).cross` tells attention to a
context from self-attention. The weights are probabilities, (B, heads, queries, keys), and
sum to 1 over the keys; what is returned has the same shape and is used as it is, without renormalisation.
"""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of every query to all keys.

    Args:
        q: Queries, (B, heads, channels per head, queries).
        k: Keys, (B, heads, channels per head, keys).
        v: Values, with the shape of `k`.

    Returns:
        Mixed values, with the shape of `q`.
    """

    def channels_last(y: Tensor) -> Tensor:
        # Strided inputs would silently select a slow kernel on the CPU.
        return y.transpose(2, 3).contiguous()

    return F.scaled_dot_product_attention(channels_last(q), channels_last(k), channels_last(v)).transpose(2, 3)


class Attention(nn.Module):
    """Base class of all layers with attention.

    Subclasses call `self.attend(q, k, v)` and nothing else to attend, so that `attention_control` reaches them.

    Attributes:
        attend: The attention function.
        cross: Whether keys and values come from a context, such as the tokens of a text, and not from the features
            that make the queries.
    """

    attend: AttendFn = staticmethod(attend)
    cross: bool = False


@contextmanager
def attention_control(network: nn.Module, control: ControlFn) -> Iterator[None]:
    """Passes the attention weights of a network through a function while the context is active.

    The weights are computed explicitly, which takes more memory than the fused kernels. When the context is left, by
    an exception too, the network is as it was before. With `checkpoint_blocks`, run the backward pass inside the
    context as well: it computes the attention, and calls the control, a second time.

    Args:
        network: The network; it has at least one `Attention` layer.
        control: Takes the name of a layer and its weights, and returns the weights to use.

    Raises:
        ValueError: If the network has no attention, if its attention is under control already, or, in the forward
            pass, if the control returns weights of another shape.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, Attention)}
    if not layers:
        raise ValueError(f"attention_control: {type(network).__name__} has no attention layer")
    for name, layer in layers.items():
        if "attend" in vars(layer):
            raise ValueError(
                f"attention_control: the attention of {name!r} is replaced already; leave that context first, or "
                "combine both controls in one function"
            )
    try:
        for name, layer in layers.items():
            layer.attend = _explicit(name, control)
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("attend", None)


def _explicit(name: str, control: ControlFn) -> AttendFn:
    def attend_explicitly(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q.transpose(2, 3) @ k / math.sqrt(q.shape[2])).softmax(-1)
        controlled = control(name, weights)
        if controlled.shape != weights.shape:
            raise ValueError(
                f"attention_control: the control returned weights of shape {tuple(controlled.shape)} for {name!r}; "
                f"return {tuple(weights.shape)}"
            )
        return v @ controlled.to(v.dtype).transpose(2, 3)

    return attend_explicitly


def count_heads(channels: int, num_heads: int, head_channels: int | None = None) -> int:
    """Number of heads of an attention layer.

    Args:
        channels: Channels of the layer.
        num_heads: Number of heads, unless `head_channels` is given.
        head_channels: Channels per head.

    Raises:
        ValueError: If the channels cannot be divided so.
    """
    setting = f"num_heads={num_heads}" if head_channels is None else f"heads of head_channels={head_channels}"
    divisor = num_heads if head_channels is None else head_channels
    if divisor < 1 or channels % divisor:
        raise ValueError(f"attention: {channels} channels cannot be split into {setting}; use a divisor")
    return num_heads if head_channels is None else channels // head_channels
