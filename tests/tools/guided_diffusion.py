"""What weights in the layout of OpenAI's code mean, improved-diffusion and guided-diffusion, written down on its own:
tensors by name -> output.

What the tensors do not say is told beside them: heads, the order of their rows, and the form of the blocks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]
GROUPS = 32


@dataclass(frozen=True)
class Form:
    """The options of `create_model` there; `attended` are levels, from full resolution."""

    model_channels: int = 32
    channel_mult: tuple[float, ...] = (1, 2)
    num_res_blocks: int = 1
    attended: tuple[int, ...] = (1,)
    out_channels: int = 6
    num_heads: int = 4
    num_head_channels: int = -1
    num_classes: int | None = None
    use_scale_shift_norm: bool = True
    resblock_updown: bool = False
    use_new_attention_order: bool = False

    def heads(self, channels: int) -> int:
        return self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels


def encoder_shapes(form: Form) -> tuple[dict[str, list[int]], list[int]]:
    """The tensors of time embedding, way down and middle, and the channels of the skips."""
    found: dict[str, list[int]] = {}
    width = form.model_channels
    affine(found, "time_embed.0", 4 * width, width)
    affine(found, "time_embed.2", 4 * width, 4 * width)
    c = int(width * form.channel_mult[0])
    affine(found, "input_blocks.0.0", c, 3, 3, 3)
    skips, n = [c], 1
    for i, mult in enumerate(form.channel_mult):
        if i > 0:
            if form.resblock_updown:
                block(found, f"input_blocks.{n}.0", c, c, form)
            else:
                affine(found, f"input_blocks.{n}.0.op", c, c, 3, 3)
            skips.append(c)
            n += 1
        for _ in range(form.num_res_blocks):
            block(found, f"input_blocks.{n}.0", c, int(width * mult), form)
            c = int(width * mult)
            if i in form.attended:
                attention(found, f"input_blocks.{n}.1", c)
            skips.append(c)
            n += 1
    block(found, "middle_block.0", c, c, form)
    attention(found, "middle_block.1", c)
    block(found, "middle_block.2", c, c, form)
    return found, skips


def unet_shapes(form: Form) -> dict[str, list[int]]:
    """The tensors of `UNetModel`."""
    found, skips = encoder_shapes(form)
    width = form.model_channels
    if form.num_classes is not None:
        found["label_emb.weight"] = [form.num_classes, 4 * width]
    c, n = int(width * form.channel_mult[-1]), 0
    for i in range(len(form.channel_mult) - 1, -1, -1):
        for j in range(form.num_res_blocks + 1):
            c_out = int(width * form.channel_mult[i])
            block(found, f"output_blocks.{n}.0", c + skips.pop(), c_out, form)
            c = c_out
            if i in form.attended:
                attention(found, f"output_blocks.{n}.1", c)
            if i > 0 and j == form.num_res_blocks:
                name = f"output_blocks.{n}.{2 if i in form.attended else 1}"
                if form.resblock_updown:
                    block(found, name, c, c, form)
                else:
                    affine(found, f"{name}.conv", c, c, 3, 3)
            n += 1
    norm_shape(found, "out.0", c)
    affine(found, "out.2", form.out_channels, c, 3, 3)
    return found


def classifier_shapes(form: Form, image_size: int) -> dict[str, list[int]]:
    """The tensors of `EncoderUNetModel` with attention pooling; `out_channels` are its classes."""
    found, skips = encoder_shapes(form)
    c, size = skips[-1], image_size >> (len(form.channel_mult) - 1)
    norm_shape(found, "out.0", c)
    found["out.2.positional_embedding"] = [c, size * size + 1]
    affine(found, "out.2.qkv_proj", 3 * c, c, 1)
    affine(found, "out.2.c_proj", form.out_channels, c, 1)
    return found


def affine(found: dict[str, list[int]], name: str, *shape: int) -> None:
    found[f"{name}.weight"], found[f"{name}.bias"] = list(shape), [shape[0]]


def norm_shape(found: dict[str, list[int]], name: str, c: int) -> None:
    found[f"{name}.weight"] = found[f"{name}.bias"] = [c]


def block(found: dict[str, list[int]], name: str, c_in: int, c_out: int, form: Form) -> None:
    norm_shape(found, f"{name}.in_layers.0", c_in)
    affine(found, f"{name}.in_layers.2", c_out, c_in, 3, 3)
    affine(found, f"{name}.emb_layers.1", c_out * (2 if form.use_scale_shift_norm else 1), 4 * form.model_channels)
    norm_shape(found, f"{name}.out_layers.0", c_out)
    affine(found, f"{name}.out_layers.3", c_out, c_out, 3, 3)
    if c_in != c_out:
        affine(found, f"{name}.skip_connection", c_out, c_in, 1, 1)


def attention(found: dict[str, list[int]], name: str, c: int) -> None:
    norm_shape(found, f"{name}.norm", c)
    affine(found, f"{name}.qkv", 3 * c, c, 1)
    affine(found, f"{name}.proj_out", c, c, 1)


class Network:
    """Computes with tensors by name, as a `Form` says."""

    def __init__(self, state: State, form: Form) -> None:
        self.state, self.form = state, form

    def has(self, name: str) -> bool:
        return any(key.startswith(f"{name}.") for key in self.state)

    def conv(self, name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(h, weight, self.state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def matrix(self, name: str, h: Tensor) -> Tensor:
        """A linear layer over (B, C), or a convolution of width 1 over (B, C, L)."""
        weight, bias = self.state[f"{name}.weight"].flatten(1), self.state[f"{name}.bias"]
        return torch.einsum("oc,bc...->bo...", weight, h) + bias.reshape(-1, *[1] * (h.ndim - 2))

    def norm(self, name: str, h: Tensor) -> Tensor:
        parts = h.reshape(len(h), GROUPS, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        shape = (-1, *[1] * (h.ndim - 2))
        weight, bias = (self.state[f"{name}.{part}"].reshape(shape) for part in ("weight", "bias"))
        return parts.reshape(h.shape) * weight + bias

    def embed(self, t: Tensor) -> Tensor:
        half = self.form.model_channels // 2
        angles = t[:, None] * 10_000 ** (-torch.arange(half) / half)
        return self.matrix(
            "time_embed.2", swish(self.matrix("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1)))
        )

    def attend(self, qkv: Tensor, heads: int, new_order: bool) -> Tensor:
        """Attention of all to all: (B, 3C, L) -> (B, C, L), head by head."""
        c = qkv.shape[1] // 3
        d = c // heads
        results = []
        for head in range(heads):
            if new_order:
                q, k, v = (qkv[:, part * c + head * d : part * c + (head + 1) * d] for part in range(3))
            else:
                q, k, v = (qkv[:, (3 * head + part) * d : (3 * head + part + 1) * d] for part in range(3))
            weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(d), dim=-1)
            results.append(torch.einsum("bts,bcs->bct", weights, v))
        return torch.cat(results, dim=1)

    def attention(self, name: str, h: Tensor) -> Tensor:
        qkv = self.matrix(f"{name}.qkv", self.norm(f"{name}.norm", h).flatten(2))
        a = self.attend(qkv, self.form.heads(h.shape[1]), self.form.use_new_attention_order)
        return h + self.matrix(f"{name}.proj_out", a).reshape(h.shape)

    def block(self, name: str, h: Tensor, embedding: Tensor, resolution: str = "same") -> Tensor:
        inner = resized(swish(self.norm(f"{name}.in_layers.0", h)), resolution)
        inner = self.conv(f"{name}.in_layers.2", inner)
        told = self.matrix(f"{name}.emb_layers.1", swish(embedding))[:, :, None, None]
        if self.form.use_scale_shift_norm:
            scale, shift = told.tensor_split(2, dim=1)
            inner = self.norm(f"{name}.out_layers.0", inner) * (1 + scale) + shift
        else:
            inner = self.norm(f"{name}.out_layers.0", inner + told)
        inner = self.conv(f"{name}.out_layers.3", swish(inner))
        h = resized(h, resolution)
        return inner + (self.conv(f"{name}.skip_connection", h) if self.has(f"{name}.skip_connection") else h)

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """What each of the input blocks puts out, and at the end the middle."""
        found = [self.conv("input_blocks.0.0", x)]
        every = self.form.num_res_blocks + 1
        n = 1
        while self.has(f"input_blocks.{n}"):
            name, h = f"input_blocks.{n}", found[-1]
            if n % every == 0:
                updown = self.form.resblock_updown
                h = self.block(f"{name}.0", h, embedding, "half") if updown else self.conv(f"{name}.0.op", h, stride=2)
            else:
                h = self.block(f"{name}.0", h, embedding)
                h = self.attention(f"{name}.1", h) if self.has(f"{name}.1") else h
            found.append(h)
            n += 1
        h = self.attention("middle_block.1", self.block("middle_block.0", found[-1], embedding))
        return [*found, self.block("middle_block.2", h, embedding)]

    def denoise(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """`UNetModel`'s answer to images (B, C, H, W) at times (B,) of classes (B,)."""
        embedding = self.embed(t)
        if label is not None:
            embedding = embedding + self.state["label_emb.weight"][label]
        *skips, h = self.encode(x, embedding)
        n = 0
        while skips:
            name = f"output_blocks.{n}"
            h = self.block(f"{name}.0", torch.cat([h, skips.pop()], 1), embedding)
            if self.has(f"{name}.1.qkv"):
                h = self.attention(f"{name}.1", h)
            for last in (f"{name}.1", f"{name}.2"):
                if self.has(f"{last}.conv"):
                    h = self.conv(f"{last}.conv", resized(h, "double"))
                elif self.has(f"{last}.in_layers"):
                    h = self.block(last, h, embedding, "double")
            n += 1
        return self.conv("out.2", swish(self.norm("out.0", h)))

    def classify(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits of `EncoderUNetModel`, (B, classes)."""
        h = swish(self.norm("out.0", self.encode(x, self.embed(t))[-1])).flatten(2)
        h = torch.cat([h.mean(2, keepdim=True), h], dim=2) + self.state["out.2.positional_embedding"]
        # The pooling has the new order whatever the blocks have.
        a = self.attend(self.matrix("out.2.qkv_proj", h), self.form.heads(h.shape[1]), new_order=True)
        return self.matrix("out.2.c_proj", a)[:, :, 0]


def swish(h: Tensor) -> Tensor:
    return h * torch.sigmoid(h)


def resized(h: Tensor, resolution: str) -> Tensor:
    if resolution == "half":
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
    return h.repeat_interleave(2, 2).repeat_interleave(2, 3) if resolution == "double" else h


def as_classifier(form: Form, num_classes: int) -> Form:
    """The form of a classifier: heads by channels, logits out."""
    return replace(form, out_channels=num_classes, num_head_channels=16, num_classes=None)
