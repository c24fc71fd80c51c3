"""The DDPM U-Net as diffusers has it: `UNet2DModel`, its configuration and the names of its tensors."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from diffusion_lit.networks import UNet
from diffusion_lit.networks.layers import ResBlock
from diffusion_lit.networks.unet import Level
from diffusion_lit.tools.files import check_tensors

CLASS = "UNet2DModel"

FIXED: dict[str, tuple[object, object]] = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "freq_shift": (1, 0),
    "flip_sin_to_cos": (False, True),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "act_fn": ("silu", "silu"),
    "norm_eps": (1e-6, 1e-5),
    "resnet_time_scale_shift": ("default", "default"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
    "num_class_embeds": (None, None),
}
"""What must have one value for a `UNet2DModel` to be DDPM's, by key: that value, and what a missing key means."""

READ = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types",
    "layers_per_block", "dropout", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups",
    "time_embedding_dim", "num_train_timesteps",
)  # fmt: skip

NAMES = (
    (r"^temb\.dense\.0\.", "time_embedding.linear_1."),
    (r"^temb\.dense\.1\.", "time_embedding.linear_2."),
    (r"^norm_out\.", "conv_norm_out."),
    (r"^mid\.block_1\.", "mid_block.resnets.0."),
    (r"^mid\.block_2\.", "mid_block.resnets.1."),
    (r"^mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^down\.", "down_blocks."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.downsample\.", ".downsamplers.0."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.temb_proj\.", ".time_emb_proj."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)
"""Our names to diffusers', one after another; the levels on the way up are counted the other way round besides."""

FORMER_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def names(network: UNet) -> dict[str, str]:
    """Of every tensor of a network, by our name, the name that diffusers gives it."""

    def theirs(name: str) -> str:
        name = re.sub(r"^up\.(\d+)\.", lambda level: f"up_blocks.{len(network.up) - 1 - int(level[1])}.", name)
        for ours, new in NAMES:
            name = re.sub(ours, new, name)
        return name

    return {name: theirs(name) for name in network.state_dict()}


def is_projection(name: str) -> bool:
    """Whether a tensor, by diffusers' name, is a weight (C, C) in attention; ours is a convolution's, (C, C, 1, 1)."""
    return re.search(r"\.(to_[qkv]|to_out\.0)\.weight$", name) is not None


def from_diffusers(tensors: Mapping[str, Tensor], network: UNet, source: Path) -> dict[str, Tensor]:
    """Our tensors by our names.

    Args:
        tensors: Diffusers', also with the names that its attention had before version 0.15.
        network: What they are for; it may be on the meta device.
        source: For messages.

    Raises:
        ValueError: If they are not exactly the network's; see `check_tensors`.
    """
    given = {}
    for name, tensor in tensors.items():
        new = re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.)", lambda old: FORMER_NAMES[old[1]], name)
        given[name if new in tensors else new] = tensor
    theirs = names(network)
    expected = {
        theirs[name]: tensor.shape[:2] if is_projection(theirs[name]) else tensor.shape
        for name, tensor in network.state_dict().items()
    }
    check_tensors(expected, given, source)
    return {name: given[theirs[name]].reshape(tensor.shape) for name, tensor in network.state_dict().items()}


def to_diffusers(network: UNet) -> dict[str, Tensor]:
    """Diffusers' tensors by diffusers' names, each contiguous."""
    theirs = names(network)
    return {
        theirs[name]: (tensor[..., 0, 0] if is_projection(theirs[name]) else tensor).contiguous()
        for name, tensor in network.state_dict().items()
    }


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `UNet` that a `UNet2DModel` is.

    Args:
        config: Its config.json; a missing key means what it does to diffusers.

    Raises:
        ValueError: If it is not DDPM's network.
    """
    if config.get("_class_name", CLASS) != CLASS:
        raise ValueError(f"the configuration is of {config['_class_name']}; only a {CLASS} can be imported")
    different = [
        f"{key}={config.get(key, missing)!r} where ours has {ours!r}"
        for key, (ours, missing) in FIXED.items()
        if config.get(key, missing) != ours and (key, config.get(key)) != ("act_fn", "swish")
    ]
    known = {*FIXED, *READ}
    different += [
        f"{key}={value!r}, which is not known here"
        for key, value in config.items()
        if key not in known and not key.startswith("_") and value not in (None, False)
    ]
    if different:
        raise ValueError(f"this {CLASS} is not DDPM's network: {'; '.join(different)}")
    channels = whole_numbers(config, "block_out_channels", [224, 448, 672, 896])
    levels = len(channels)
    width, size = channels[0], config.get("sample_size")
    size = size[0] if isinstance(size, list) and len(size) == 2 and size[0] == size[1] else size
    if not isinstance(size, int):
        raise ValueError(f"sample_size={size!r}: our U-Net needs the height of square images; write it into the file")
    if any(c % width for c in channels):
        raise ValueError(f"block_out_channels={channels}: ours are whole multiples of the first")
    if config.get("time_embedding_dim") not in (None, 4 * width):
        raise ValueError(f"time_embedding_dim={config['time_embedding_dim']}: ours is 4 x {width}")
    groups = whole_numbers(config, "norm_num_groups", 32)
    if config.get("attn_norm_num_groups") not in (None, groups):
        raise ValueError(f"attn_norm_num_groups={config['attn_norm_num_groups']}: ours is norm_num_groups={groups}")
    attended = attended_levels(config, levels)
    heads = one_count_of_heads([channels[i] for i in attended] + [channels[-1]], config.get("attention_head_dim", 8))
    return {
        "image_size": size,
        "in_channels": whole_numbers(config, "in_channels", 3),
        "out_channels": whole_numbers(config, "out_channels", 3),
        "width": width,
        "multipliers": [c // width for c in channels],
        "num_blocks": whole_numbers(config, "layers_per_block", 2),
        "attention": [size >> i for i in attended],
        "num_heads": heads,
        "dropout": float(config.get("dropout", 0.0)),
        "num_groups": groups,
    }


def whole_numbers(config: Mapping[str, Any], key: str, missing: Any) -> Any:
    """A positive whole number, or a list of such where that is what a missing key means."""
    value = config.get(key, missing)
    numbers = value if isinstance(missing, list) else [value]
    if not isinstance(numbers, list) or not numbers or not all(type(n) is int and n > 0 for n in numbers):
        raise ValueError(f"{key}={value!r} in the configuration is not of whole numbers above 0")
    return value


def attended_levels(config: Mapping[str, Any], levels: int) -> list[int]:
    """The levels with attention, from full resolution, in which the way down and the way up must agree."""
    plain, attention = ["DownBlock2D", "UpBlock2D"], ["AttnDownBlock2D", "AttnUpBlock2D"]
    down = config.get("down_block_types", [plain[0], *[attention[0]] * 3])
    up = config.get("up_block_types", [*[attention[1]] * 3, plain[1]])
    attended = [i for i, kind in enumerate(down) if kind == attention[0]]
    form = [attention if i in attended else plain for i in range(levels)]
    if list(down) != [kinds[0] for kinds in form] or list(up) != [kinds[1] for kinds in reversed(form)]:
        raise ValueError(
            f"down_block_types={down} and up_block_types={up}: our {levels} levels have {plain} or {attention}, "
            "and attention on the way up where they have it on the way down"
        )
    return attended


def one_count_of_heads(channels: Sequence[int], head_channels: Any) -> int:
    """How many heads attention has, the same for all these channels; without head_channels, one."""
    if head_channels is None:
        return 1
    counts = {c // head_channels if type(head_channels) is int and head_channels > 0 else 0 for c in channels}
    if len(counts) > 1 or 0 in counts or any(c % head_channels for c in channels):
        raise ValueError(
            f"attention_head_dim={head_channels} over attentions of {sorted(set(channels))} channels: our U-Net has as "
            "many heads in all of them"
        )
    return counts.pop()


def configuration(network: UNet) -> dict[str, Any]:
    """The config.json of a network.

    Raises:
        ValueError: If diffusers has no such network.
    """
    levels = cast(list[Level], list(network.down))
    blocks = cast(list[ResBlock], [level.block[0] for level in levels])
    channels = [block.conv1.out_channels for block in blocks]
    attended = [len(level.attn) > 0 for level in levels]
    of_attention = {c for c, has in zip(channels, attended, strict=True) if has} | {channels[-1]}
    heads = network.mid.attn_1.heads
    if channels[0] != network.width:
        raise ValueError(f"diffusers has no network of channels {channels} and width={network.width}: the first is it")
    if heads > 1 and len(of_attention) > 1:
        raise ValueError(
            f"diffusers has no network of num_heads={heads} over attentions of {sorted(of_attention)} channels: its "
            "heads are as wide everywhere"
        )
    return {
        "_class_name": CLASS,
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": network.conv_out.out_channels,
        "block_out_channels": channels,
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attended)],
        "layers_per_block": len(levels[0].block),
        "dropout": network.mid.block_1.dropout.p,
        "attention_head_dim": None if heads == 1 else channels[-1] // heads,
        "norm_num_groups": network.norm_out.num_groups,
        **{key: ours for key, (ours, _) in FIXED.items()},
    }
