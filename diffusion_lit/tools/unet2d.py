"""The configuration of diffusers' `UNet2DModel` and the arguments of the network that computes the same here.

`UNet2DModel` is DDPM's network, `UNet`, or ADM's, `ADMUNet`, depending on its configuration; some configurations are
neither. `UNET` and `ADM` hold the values that make it one of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import nn

from diffusion_lit.networks import ADMUNet, UNet
from diffusion_lit.networks.adm_blocks import ConditionedResBlock, QKVAttention
from diffusion_lit.networks.layers import ResBlock
from diffusion_lit.networks.unet import Level
from diffusion_lit.tools.diffusers_config import (
    Fixed,
    channels_of,
    class_configuration,
    classes_of,
    differences,
    image_size,
    levels_of,
    whole_numbers,
)
from diffusion_lit.tools.tensor_names import blocks_per_level

CLASS = "UNet2DModel"
CHANNELS = [224, 448, 672, 896]
"""Of each level, where a configuration does not say."""

BOTH: Fixed = {
    "center_input_sample": (False, False),
    "time_embedding_type": ("positional", "positional"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2D"),
    "mid_block_scale_factor": (1, 1),
    "act_fn": ("silu", "silu"),
    "add_attention": (True, True),
    "class_embed_type": (None, None),
}
"""What both networks need."""
UNET: Fixed = {
    **BOTH,
    "freq_shift": (1, 0),
    "flip_sin_to_cos": (False, True),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "conv"),
    "upsample_type": ("conv", "conv"),
    "norm_eps": (1e-6, 1e-5),
    "resnet_time_scale_shift": ("default", "default"),
    "num_class_embeds": (None, None),
}
"""What `UNet` needs."""
ADM: Fixed = {
    **BOTH,
    "freq_shift": (0, 0),
    "flip_sin_to_cos": (True, True),
    "downsample_padding": (1, 1),
    "norm_eps": (1e-5, 1e-5),
}
"""What `ADMUNet` needs."""

READ = (
    "sample_size", "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types",
    "layers_per_block", "dropout", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups",
    "time_embedding_dim", "num_train_timesteps", "num_class_embeds",
)  # fmt: skip


class Blocks(NamedTuple):
    """Names of the blocks of one level."""

    plain: str
    attention: str
    resnet: str


DOWN = Blocks("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP = Blocks("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")


def arguments(config: Mapping[str, Any]) -> tuple[type[UNet | ADMUNet], dict[str, Any]]:
    """The network that a `UNet2DModel` is, and its arguments.

    Args:
        config: Its config.json; a missing key has its default in diffusers.

    Raises:
        ValueError: If it is neither DDPM's network nor ADM's; names what differs from the nearer one.
    """
    if config.get("_class_name", CLASS) != CLASS:
        raise ValueError(f"the configuration is of {config['_class_name']}; only a {CLASS} can be imported")
    from_ddpm = differences(config, UNET, READ)
    from_adm = differences(config, ADM, (*READ, "resnet_time_scale_shift", "downsample_type", "upsample_type"))
    if from_ddpm and len(from_ddpm) <= len(from_adm):
        raise ValueError(f"this {CLASS} is not DDPM's network: {'; '.join(from_ddpm)}")
    if from_ddpm and from_adm:
        raise ValueError(f"this {CLASS} is not ADM's network: {'; '.join(from_adm)}")
    return (ADMUNet, adm_arguments(config)) if from_ddpm else (UNet, unet_arguments(config))


def unet_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `UNet`; ValueError if it has no such form."""
    shared = shared_arguments(config)
    groups = shared["num_groups"]
    if config.get("attn_norm_num_groups") not in (None, groups):
        raise ValueError(f"attn_norm_num_groups={config['attn_norm_num_groups']}: ours is norm_num_groups={groups}")
    channels = whole_numbers(config, "block_out_channels", CHANNELS)
    attended = attended_levels(config, len(channels), resnets=False)
    of_attention = [channels[i] for i in attended] + [channels[-1]]
    return {**shared, "num_heads": one_count_of_heads(of_attention, config.get("attention_head_dim", 8))}


def adm_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ADMUNet`; ValueError if it has no such form."""
    shared = shared_arguments(config)
    shift = config.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise ValueError(f"resnet_time_scale_shift={shift!r} has no equal here; known are 'default', 'scale_shift'")
    groups, given = shared["num_groups"], config.get("attn_norm_num_groups")
    if given != groups and not (given is None and shift == "default"):
        raise ValueError(
            f"attn_norm_num_groups={given}: ours normalizes in groups of norm_num_groups={groups} before the attention "
            "in the middle"
        )
    head_channels = config.get("attention_head_dim", 8)
    return {
        **shared,
        **channels_of(config, 3),
        "head_channels": None if head_channels is None else whole_numbers(config, "attention_head_dim", 8),
        "scale_shift_norm": shift == "scale_shift",
        "resblock_updown": has_resblocks(config),
        **classes_of(config),
    }


def shared_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `UNet` and `ADMUNet` share; ValueError if they have no such form."""
    width, multipliers = levels_of(config, CHANNELS)
    size = image_size(config, None)
    if config.get("time_embedding_dim") not in (None, 4 * width):
        raise ValueError(f"time_embedding_dim={config['time_embedding_dim']}: ours is 4 x {width}")
    attended = attended_levels(config, len(multipliers), resnets=True)
    return {
        "image_size": size,
        "in_channels": whole_numbers(config, "in_channels", 3),
        "out_channels": whole_numbers(config, "out_channels", 3),
        "width": width,
        "multipliers": multipliers,
        "num_blocks": whole_numbers(config, "layers_per_block", 2),
        "attention": [size >> i for i in attended],
        "dropout": float(config.get("dropout", 0.0)),
        "num_groups": whole_numbers(config, "norm_num_groups", 32),
    }


def block_types(config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The blocks of encoder and decoder, both from full resolution to the coarsest."""
    down = config.get("down_block_types", [DOWN.plain, *[DOWN.attention] * 3])
    up = config.get("up_block_types", [*[UP.attention] * 3, UP.plain])
    return list(down), list(up)[::-1]


def attended_levels(config: Mapping[str, Any], levels: int, resnets: bool) -> list[int]:
    """The levels with attention, from full resolution; encoder and decoder must agree.

    Args:
        config: Of the network.
        levels: How many there are.
        resnets: Whether residual blocks may change the resolution.
    """
    down, up = block_types(config)
    attended = [i for i, kind in enumerate(down) if kind == DOWN.attention]
    known = [(blocks.plain, *([blocks.resnet] if resnets else [])) for blocks in (DOWN, UP)]
    for kinds, blocks, plain in ((down, DOWN, known[0]), (up, UP, known[1])):
        fits = [kind == blocks.attention if i in attended else kind in plain for i, kind in enumerate(kinds)]
        if len(kinds) != levels or not all(fits):
            raise ValueError(
                f"down_block_types={down} and up_block_types={up[::-1]}: our {levels} levels have {list(known[0])} and "
                f"{list(known[1])}, or with attention {DOWN.attention} and {UP.attention}, the same level in both"
            )
    return attended


def has_resblocks(config: Mapping[str, Any]) -> bool:
    """Whether residual blocks change the resolution; ValueError if they do at some levels only."""
    down, up = block_types(config)
    found = set()
    for kinds, blocks, key in ((down[:-1], DOWN, "downsample_type"), (up[1:], UP, "upsample_type")):
        for kind in kinds:
            by_type = config.get(key, "conv") if kind == blocks.attention else "conv"
            found.add("resnet" if kind == blocks.resnet else by_type)
    if found not in (set(), {"conv"}, {"resnet"}):
        given = {key: config[key] for key in ("downsample_type", "upsample_type") if key in config}
        raise ValueError(
            f"down_block_types={down}, up_block_types={up[::-1]} and {given} change the resolution by {sorted(found)}; "
            "ours does so by convolutions everywhere, or by residual blocks everywhere"
        )
    return found == {"resnet"}


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


def out_channels(network: UNet | ADMUNet) -> int:
    """Channels of the output."""
    return network.conv_out.out_channels if isinstance(network, UNet) else cast(nn.Conv2d, network.out[2]).out_channels


def configuration(network: UNet | ADMUNet) -> dict[str, Any]:
    """The config.json of a network.

    Raises:
        ValueError: If diffusers has no such network.
    """
    return unet_configuration(network) if isinstance(network, UNet) else adm_configuration(network)


def unet_configuration(network: UNet) -> dict[str, Any]:
    """The config.json of a `UNet`; ValueError if diffusers has no such network."""
    levels = cast(list[Level], list(network.down))
    blocks = cast(list[ResBlock], [level.block[0] for level in levels])
    channels = [block.conv1.out_channels for block in blocks]
    attended = [len(level.attn) > 0 for level in levels]
    heads = {c: network.mid.attn_1.heads for c, has in zip(channels, attended, strict=True) if has or c == channels[-1]}
    return {
        **shared_configuration(network, network.width, channels, attended, heads),
        "layers_per_block": len(levels[0].block),
        "dropout": network.mid.block_1.dropout.p,
        "norm_num_groups": network.norm_out.num_groups,
        **{key: ours for key, (ours, _) in UNET.items()},
    }


def adm_configuration(network: ADMUNet) -> dict[str, Any]:
    """The config.json of an `ADMUNet`; ValueError if diffusers has no such network."""
    num_blocks = blocks_per_level(network)
    first = [cast(nn.ModuleList, network.input_blocks[i * (num_blocks + 1) + 1]) for i in range(len(network.channels))]
    attended = [any(isinstance(layer, QKVAttention) for layer in stage) for stage in first]
    layers = [layer for layer in network.modules() if isinstance(layer, QKVAttention)]
    heads = {layer.norm.num_channels: layer.heads for layer in layers}
    block = cast(ConditionedResBlock, cast(nn.ModuleList, network.middle_block)[0])
    if block.gain != 1:
        raise ValueError("diffusers has no residual_rescale=true: its residual blocks are not divided by sqrt(2)")
    resblocks = len(attended) > 1 and isinstance(
        cast(nn.ModuleList, network.input_blocks[num_blocks + 1])[0], ConditionedResBlock
    )
    groups = cast(nn.GroupNorm, network.out[0]).num_groups
    shared = shared_configuration(network, network.time_embed.width, network.channels, attended, heads, resblocks)
    kind = "resnet" if resblocks else "conv"
    return {
        **shared,
        "in_channels": network.in_channels + network.concat_channels,
        "layers_per_block": num_blocks,
        "dropout": cast(nn.Dropout, block.out_layers[2]).p,
        "norm_num_groups": groups,
        # Without it there is no normalization in the middle, under scale_shift.
        "attn_norm_num_groups": groups,
        "resnet_time_scale_shift": "scale_shift" if block.scale_shift_norm else "default",
        "downsample_type": kind,
        "upsample_type": kind,
        **class_configuration(network),
        **{key: ours for key, (ours, _) in ADM.items()},
    }


def shared_configuration(
    network: UNet | ADMUNet,
    width: int,
    channels: Sequence[int],
    attended: Sequence[bool],
    heads: Mapping[int, int],
    resblocks: bool = False,
) -> dict[str, Any]:
    """What both networks have in config.json.

    Args:
        network: One of them.
        width: Length of the time's sinusoids.
        channels: Of each level, from full resolution.
        attended: Whether each level has attention.
        heads: How many, by the channels of the attention.
        resblocks: Whether residual blocks change the resolution.

    Raises:
        ValueError: If diffusers has no such network.
    """
    if channels[0] != width:
        raise ValueError(
            f"diffusers has no network of channels {list(channels)} and width={width}: "
            "its time embedding is as wide as the first level, so multipliers must begin with 1"
        )
    head_channels = {c // count for c, count in heads.items()}
    if any(count > 1 for count in heads.values()) and len(head_channels) > 1:
        raise ValueError(
            f"diffusers has no network of num_heads={max(heads.values())} over attentions of {sorted(heads)} channels: "
            "its heads have the same width everywhere"
        )
    down, up = (blocks.resnet if resblocks else blocks.plain for blocks in (DOWN, UP))
    return {
        "_class_name": CLASS,
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": out_channels(network),
        "block_out_channels": list(channels),
        "down_block_types": [DOWN.attention if has else down for has in attended],
        "up_block_types": [UP.attention if has else up for has in reversed(attended)],
        "attention_head_dim": None if set(heads.values()) == {1} else head_channels.pop(),
    }
