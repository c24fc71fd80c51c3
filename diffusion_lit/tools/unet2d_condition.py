"""The configuration of diffusers' `UNet2DConditionModel`, and the arguments of the equal `ADMUNet` with a context."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import nn

from diffusion_lit.networks import ADMUNet
from diffusion_lit.networks.adm_blocks import ConditionedResBlock, Stage
from diffusion_lit.networks.transformer import SpatialTransformer
from diffusion_lit.tools.diffusers_config import (
    Blocks,
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

CLASS = "UNet2DConditionModel"
BLOCKS = Blocks(("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D"))
CHANNELS = [320, 640, 1280, 1280]
"""Of each level, where a configuration does not say."""

FIXED: Fixed = {
    "center_input_sample": (False, False),
    "flip_sin_to_cos": (True, True),
    "freq_shift": (0, 0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn"),
    "only_cross_attention": (False, False),
    "downsample_padding": (1, 1),
    "mid_block_scale_factor": (1, 1),
    "act_fn": ("silu", "silu"),
    "norm_eps": (1e-5, 1e-5),
    "num_attention_heads": (None, None),
    "dual_cross_attention": (False, False),
    "use_linear_projection": (False, False),
    "class_embed_type": (None, None),
    "resnet_out_scale_factor": (1.0, 1.0),
    "time_embedding_type": ("positional", "positional"),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "attention_type": ("default", "default"),
}
"""What `ADMUNet` needs."""
READ = (
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
    "layers_per_block", "dropout", "norm_num_groups", "cross_attention_dim", "transformer_layers_per_block",
    "attention_head_dim", "num_class_embeds", "resnet_time_scale_shift", "time_embedding_dim",
    # The numbers of what is not there, and a precision, which belongs to the trainer here.
    "addition_embed_type_num_heads", "upcast_attention",
)  # fmt: skip


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `ADMUNet` that a `UNet2DConditionModel` is.

    Where the input has more channels than the output, those beyond are the condition `concat`.

    Args:
        config: Its config.json; a missing key has its default in diffusers.

    Raises:
        ValueError: If it has no equal here.
    """
    different = differences(config, FIXED, READ)
    if different:
        raise ValueError(f"this {CLASS} has no equal here: {'; '.join(different)}")
    width, multipliers = levels_of(config, CHANNELS)
    if config.get("time_embedding_dim") not in (None, 4 * width):
        raise ValueError(f"time_embedding_dim={config['time_embedding_dim']}: ours is 4 x {width}")
    shift = config.get("resnet_time_scale_shift", "default")
    if shift not in ("default", "scale_shift"):
        raise ValueError(f"resnet_time_scale_shift={shift!r} has no equal here; known are 'default', 'scale_shift'")
    size = image_size(config, None)
    attended = BLOCKS.attended(config, len(multipliers), [True, True, True, False])
    return {
        "image_size": size,
        **channels_of(config, 4),
        "width": width,
        "multipliers": multipliers,
        "num_blocks": whole_numbers(config, "layers_per_block", 2),
        "attention": [size >> i for i in attended],
        **heads_of(config, attended),
        "dropout": float(config.get("dropout", 0.0)),
        "scale_shift_norm": shift == "scale_shift",
        "resblock_updown": False,
        **classes_of(config),
        "num_groups": whole_numbers(config, "norm_num_groups", 32),
        "context_width": whole_numbers(config, "cross_attention_dim", 1280),
        "transformer_depth": whole_numbers(config, "transformer_layers_per_block", 1),
    }


def heads_of(config: Mapping[str, Any], attended: Sequence[int]) -> dict[str, int]:
    """The argument `num_heads` or `head_channels`.

    `attention_head_dim` is the number of heads, of all levels or of each of them, and not their width.
    """
    channels = whole_numbers(config, "block_out_channels", CHANNELS)
    given = config.get("attention_head_dim", 8)
    counts = whole_numbers({"attention_head_dim": given}, "attention_head_dim", [] if isinstance(given, list) else 8)
    by_level = counts if isinstance(counts, list) else [counts] * len(channels)
    if len(by_level) != len(channels):
        raise ValueError(f"attention_head_dim={given}: give one number, or one for each of {len(channels)} levels")
    # The middle has the heads of the coarsest level.
    pairs = {(channels[i], by_level[i]) for i in (*attended, len(channels) - 1)}
    if len({heads for _, heads in pairs}) == 1:
        return {"num_heads": by_level[-1]}
    if len({c / heads for c, heads in pairs}) == 1:
        return {"head_channels": channels[-1] // by_level[-1]}
    raise ValueError(
        f"attention_head_dim={given} heads over {channels} channels: ours are of one number or of one width everywhere"
    )


def configuration(network: ADMUNet) -> dict[str, Any]:
    """The config.json of an `ADMUNet` with a context.

    Raises:
        ValueError: If diffusers has no such network.
    """
    num_blocks = blocks_per_level(network)
    first = [cast(Stage, network.input_blocks[i * (num_blocks + 1) + 1]) for i in range(len(network.channels))]
    attended = [any(isinstance(layer, SpatialTransformer) for layer in stage) for stage in first]
    middle = cast(list[nn.Module], list(network.middle_block))
    block, transformer = cast(ConditionedResBlock, middle[0]), cast(SpatialTransformer, middle[1])
    _check(network, block, num_blocks)
    by_channels = {m.norm.num_channels: m.heads for m in network.modules() if isinstance(m, SpatialTransformer)}
    # A level without attention has heads in the list all the same.
    heads = [by_channels.get(c, transformer.heads) for c in network.channels]
    return {
        "_class_name": CLASS,
        "sample_size": network.image_size,
        "in_channels": network.in_channels + network.concat_channels,
        "out_channels": cast(nn.Conv2d, network.out[2]).out_channels,
        **BLOCKS.types(attended),
        "block_out_channels": list(network.channels),
        "layers_per_block": num_blocks,
        "dropout": cast(nn.Dropout, block.out_layers[2]).p,
        "norm_num_groups": cast(nn.GroupNorm, network.out[0]).num_groups,
        "cross_attention_dim": network.context_width,
        "transformer_layers_per_block": len(transformer.transformer_blocks),
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "resnet_time_scale_shift": "scale_shift" if block.scale_shift_norm else "default",
        **class_configuration(network),
        **{key: ours for key, (ours, _) in FIXED.items()},
    }


def _check(network: ADMUNet, block: ConditionedResBlock, num_blocks: int) -> None:
    width = network.time_embed.width
    if network.channels[0] != width:
        raise ValueError(
            f"diffusers has no network of channels {network.channels} and width={width}: "
            "its time embedding is as wide as the first level, so multipliers must begin with 1"
        )
    if block.gain != 1:
        raise ValueError("diffusers has no residual_rescale=true: its residual blocks are not divided by sqrt(2)")
    if len(network.channels) > 1 and isinstance(
        cast(Stage, network.input_blocks[num_blocks + 1])[0], ConditionedResBlock
    ):
        raise ValueError(
            f"diffusers has no network with resblock_updown=true and a context: its {CLASS} changes the resolution by "
            "convolutions; use --to safetensors"
        )
