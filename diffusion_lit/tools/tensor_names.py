"""The tensors of our networks as diffusers names and shapes them.

`UNet` and `ADMUNet` are its `UNet2DModel`, an `ADMUNet` with a context is its `UNet2DConditionModel`, and an
`Autoencoder` is its `AutoencoderKL` or `VQModel`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import Tensor

from diffusion_lit.networks import ADMUNet, Autoencoder, UNet
from diffusion_lit.networks.adm_blocks import QKVAttention, Stage
from diffusion_lit.networks.transformer import SpatialTransformer
from diffusion_lit.tools.files import check_tensors

Names = Sequence[tuple[str, str]]
Exchanged: TypeAlias = UNet | ADMUNet | Autoencoder

DDPM: Names = (
    (r"\bnorm_out\.", "conv_norm_out."),
    (r"\bmid\.block_1\.", "mid_block.resnets.0."),
    (r"\bmid\.block_2\.", "mid_block.resnets.1."),
    (r"\bmid\.attn_1\.", "mid_block.attentions.0."),
    (r"\bdown\.", "down_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Substitutions, one after another, from the names of DDPM's code, which `Autoencoder` has too, to diffusers'. The
levels of the decoder, `up`, are counted the other way round besides."""

UNET: Names = (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    *DDPM,
)
"""Likewise for `UNet`."""

ADM: Names = (
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^label_emb\.", "class_embedding."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
    (r"\.op\.", ".conv."),
)
"""Likewise for `ADMUNet`, once `adm_places` has found the place of each layer. Transformers have the same names."""

ADM_ATTENTION: Names = (
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Likewise for the attention of an `ADMUNet` without context; `qkv` is three tensors there."""

ATTENTION = (QKVAttention, SpatialTransformer)

FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names in attention before diffusers 0.15."""


def blocks_per_level(network: ADMUNet) -> int:
    """The argument `num_blocks` of a network."""
    return len(network.input_blocks) // len(network.channels) - 1


def adm_places(network: ADMUNet) -> Iterator[tuple[str, str]]:
    """Pairs of names of layers of encoder and decoder: ours, and diffusers' for the same layer."""
    num_blocks = blocks_per_level(network)
    yield "input_blocks.0.0", "conv_in"
    for n, stage in enumerate(cast(list[Stage], list(network.input_blocks)[1:]), 1):
        level, block = divmod(n, num_blocks + 1)
        for i, layer in enumerate(stage):
            kind = f"attentions.{block - 1}" if isinstance(layer, ATTENTION) else f"resnets.{block - 1}"
            place = f"down_blocks.{level}.{kind}" if block else f"down_blocks.{level - 1}.downsamplers.0"
            yield f"input_blocks.{n}.{i}", place
    for n, stage in enumerate(cast(list[Stage], list(network.output_blocks))):
        level, block = divmod(n, num_blocks + 1)
        for i, layer in enumerate(stage):
            kind = f"attentions.{block}" if isinstance(layer, ATTENTION) else f"resnets.{block}"
            change = i > 0 and not isinstance(layer, ATTENTION)
            yield f"output_blocks.{n}.{i}", f"up_blocks.{level}.{'upsamplers.0' if change else kind}"


def diffusers_names(network: Exchanged) -> dict[str, str]:
    """The name in diffusers of each tensor, by our name."""
    if isinstance(network, ADMUNet):
        places = dict(adm_places(network))
        table = [*ADM, *(ADM_ATTENTION if network.context_width is None else ())]
    else:
        levels = len(network.up if isinstance(network, UNet) else network.decoder.up)
        places = {f"up.{i}": f"up_blocks.{levels - 1 - i}" for i in range(levels)}
        table = list(UNET if isinstance(network, UNet) else DDPM)

    def theirs(name: str) -> str:
        name = re.sub(r"\b(?:(?:in|out)put_blocks\.\d+|up)\.\d+(?=\.)", lambda found: places[found[0]], name)
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        return name

    return {name: theirs(name) for name in network.state_dict()}


def _rows(network: Exchanged, name: str) -> Tensor:
    """For a tensor `qkv` of an attention layer, (3, C): its rows that make queries, keys and values."""
    layer = cast(QKVAttention, network.get_submodule(name.partition(".qkv.")[0]))
    channels = layer.norm.num_channels
    rows = torch.arange(3 * channels)
    if layer.qkv_first:
        return rows.reshape(3, channels)
    return rows.reshape(layer.heads, 3, -1).transpose(0, 1).flatten(1)


def _is_projection(name: str) -> bool:
    """Whether a tensor, by diffusers' name, is a weight of attention, which ours has as a convolution's."""
    return re.search(r"\.attentions\.\d+\.(to_[qkv]|to_out\.0|qkv)\.weight$", name) is not None


def to_diffusers(network: Exchanged) -> dict[str, Tensor]:
    """The tensors of a network as diffusers has them, each contiguous, by diffusers' names."""
    names = diffusers_names(network)
    result: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        theirs = names[name]
        plain = tensor.flatten(1) if _is_projection(theirs) else tensor
        if ".qkv." in theirs:
            for kind, rows in zip("qkv", _rows(network, name), strict=True):
                result[theirs.replace(".qkv.", f".to_{kind}.")] = plain[rows.to(plain.device)]
        else:
            result[theirs] = plain.contiguous()
    return result


def from_diffusers(tensors: Mapping[str, Tensor], network: Exchanged, source: Path) -> dict[str, Tensor]:
    """Converts tensors of diffusers.

    Args:
        tensors: By diffusers' names; attention may have the names of before version 0.15.
        network: What they are for; it may be on the meta device.
        source: For messages.

    Returns:
        By our names, in the shapes of the network.

    Raises:
        ValueError: If they are not exactly the network's; see `check_tensors`.
    """
    given = {}
    for name, tensor in tensors.items():
        new = re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda old: FORMER_NAMES[old[1]], name)
        given[name if new in tensors else new] = tensor
    check_tensors({name: tensor.shape for name, tensor in to_diffusers(network).items()}, given, source)
    names = diffusers_names(network)
    result = {}
    for name, tensor in network.state_dict().items():
        theirs = names[name]
        if ".qkv." in theirs:
            parts = torch.cat([given[theirs.replace(".qkv.", f".to_{kind}.")] for kind in "qkv"])
            result[name] = torch.empty_like(parts).index_copy_(0, _rows(network, name).flatten(), parts)
        else:
            result[name] = given[theirs]
        result[name] = result[name].reshape(tensor.shape)
    return result
