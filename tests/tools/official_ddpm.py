"""What weights in the layout of DDIM's PyTorch code mean, written down on its own: tensors by name -> output.

No class here is a copy of a network of ours or theirs: the names of the tensors say which blocks there are.
"""

import math
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
GROUPS = 32


def shapes(
    ch: int, ch_mult: list[int], num_res_blocks: int, attended: list[int], channels: int = 3
) -> dict[str, list[int]]:
    """The tensors that `Model` of that code has; `attended` are levels, from full resolution."""
    found: dict[str, list[int]] = {}

    def add(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = list(shape), [shape[0]]

    def norm(name: str, c: int) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = [c]

    def block(name: str, c_in: int, c_out: int) -> None:
        norm(f"{name}.norm1", c_in)
        add(f"{name}.conv1", c_out, c_in, 3, 3)
        add(f"{name}.temb_proj", c_out, 4 * ch)
        norm(f"{name}.norm2", c_out)
        add(f"{name}.conv2", c_out, c_out, 3, 3)
        if c_in != c_out:
            add(f"{name}.nin_shortcut", c_out, c_in, 1, 1)

    def attention(name: str, c: int) -> None:
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            add(f"{name}.{part}", c, c, 1, 1)

    add("temb.dense.0", 4 * ch, ch)
    add("temb.dense.1", 4 * ch, 4 * ch)
    add("conv_in", ch, channels, 3, 3)
    c, skips, top = ch, [ch], len(ch_mult) - 1
    for i, mult in enumerate(ch_mult):
        for j in range(num_res_blocks):
            block(f"down.{i}.block.{j}", c, ch * mult)
            c = ch * mult
            skips.append(c)
            if i in attended:
                attention(f"down.{i}.attn.{j}", c)
        if i < top:
            add(f"down.{i}.downsample.conv", c, c, 3, 3)
            skips.append(c)
    block("mid.block_1", c, c)
    attention("mid.attn_1", c)
    block("mid.block_2", c, c)
    for i in range(top, -1, -1):
        for j in range(num_res_blocks + 1):
            block(f"up.{i}.block.{j}", c + skips.pop(), ch * ch_mult[i])
            c = ch * ch_mult[i]
            if i in attended:
                attention(f"up.{i}.attn.{j}", c)
        if i > 0:
            add(f"up.{i}.upsample.conv", c, c, 3, 3)
    norm("norm_out", c)
    add("conv_out", channels, c, 3, 3)
    return found


def output(state: State, x: Tensor, t: Tensor) -> Tensor:
    """The network's answer to images (B, C, H, W) at indices (B,)."""

    def conv(name: str, h: Tensor, padding: int = 0, stride: int = 1) -> Tensor:
        return F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"], stride, padding)

    def linear(name: str, h: Tensor) -> Tensor:
        return h @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, h: Tensor) -> Tensor:
        parts = h.reshape(len(h), GROUPS, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return parts.reshape(h.shape) * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def swish(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def block(name: str, h: Tensor) -> Tensor:
        inner = conv(f"{name}.conv1", swish(norm(f"{name}.norm1", h)), 1)
        inner = inner + linear(f"{name}.temb_proj", swish(temb))[:, :, None, None]
        inner = conv(f"{name}.conv2", swish(norm(f"{name}.norm2", inner)), 1)
        return inner + (conv(f"{name}.nin_shortcut", h) if f"{name}.nin_shortcut.weight" in state else h)

    def attention(name: str, h: Tensor) -> Tensor:
        if f"{name}.q.weight" not in state:
            return h
        normed = norm(f"{name}.norm", h)
        q, k, v = (conv(f"{name}.{part}", normed).flatten(2) for part in ("q", "k", "v"))
        weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(h.shape[1]), dim=2)
        return h + conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).reshape(h.shape))

    def count(pattern: str) -> int:
        return len({match[0] for name in state if (match := re.match(pattern, name))})

    half = state["temb.dense.0.weight"].shape[1] // 2
    angles = t[:, None] * 10_000 ** (-torch.arange(half) / (half - 1))
    temb = linear("temb.dense.1", swish(linear("temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1))))

    skips = [conv("conv_in", x, 1)]
    levels = count(r"down\.\d+\.")
    for i in range(levels):
        for j in range(count(rf"down\.{i}\.block\.\d+\.")):
            skips.append(attention(f"down.{i}.attn.{j}", block(f"down.{i}.block.{j}", skips[-1])))
        if i < levels - 1:
            skips.append(conv(f"down.{i}.downsample.conv", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
    h = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", skips[-1])))
    for i in range(levels - 1, -1, -1):
        for j in range(count(rf"up\.{i}\.block\.\d+\.")):
            h = attention(f"up.{i}.attn.{j}", block(f"up.{i}.block.{j}", torch.cat([h, skips.pop()], 1)))
        if i > 0:
            h = conv(f"up.{i}.upsample.conv", h.repeat_interleave(2, 2).repeat_interleave(2, 3), 1)
    return conv("conv_out", swish(norm("norm_out", h)), 1)
