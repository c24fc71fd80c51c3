"""The configuration of diffusers' `AutoencoderKL` and `VQModel`, and the arguments of the equal `Autoencoder`."""

from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from torch import nn

from diffusion_lit.networks import Autoencoder, DiagonalGaussian, Regularizer, VectorQuantizer
from diffusion_lit.networks.unet import Level
from diffusion_lit.tools.diffusers_config import Blocks, Fixed, differences, image_size, levels_of, whole_numbers
from diffusion_lit.tools.scheduler import part

KL, VQ = "AutoencoderKL", "VQModel"
CLASSES = (KL, VQ)
SCALES = {KL: 0.18215, VQ: 1.0}
"""The factor of a configuration without one. Diffusers takes 0.18215 for a `VQModel` too, but those without one are
older than this key, and their latents are not scaled."""

BLOCKS = Blocks(("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"))

FIXED: dict[str, Fixed] = {
    KL: {
        "act_fn": ("silu", "silu"),
        "use_quant_conv": (True, True),
        "use_post_quant_conv": (True, True),
        "shift_factor": (None, None),
        "latents_mean": (None, None),
        "latents_std": (None, None),
    },
    VQ: {"act_fn": ("silu", "silu"), "norm_type": ("group", "group"), "lookup_from_codebook": (False, False)},
}
"""What an `Autoencoder` needs, by class."""
READ = (
    "sample_size", "in_channels", "out_channels", "latent_channels", "block_out_channels", "down_block_types",
    "up_block_types", "layers_per_block", "norm_num_groups", "mid_block_add_attention", "num_vq_embeddings",
    "vq_embed_dim", "scaling_factor", "force_upcast",
)  # fmt: skip


class FirstStage(NamedTuple):
    """What a configuration says.

    Attributes:
        network: Arguments of an `Autoencoder`; the regularizer is the configuration of a part.
        scale: Factor from the autoencoder's latents to those that are diffused.
    """

    network: dict[str, Any]
    scale: float


def arguments(config: Mapping[str, Any]) -> FirstStage:
    """The autoencoder that an `AutoencoderKL` or a `VQModel` is.

    Args:
        config: Its config.json; a missing key has its default in diffusers.

    Raises:
        ValueError: If it has no equal here.
    """
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ValueError(f"the configuration is of {kind}; of autoencoders only {' and '.join(CLASSES)} are read")
    different = differences(config, FIXED[kind], READ)
    if different:
        raise ValueError(f"this {kind} has no equal here: {'; '.join(different)}")
    latents = whole_numbers(config, "latent_channels", 4 if kind == KL else 3)
    channels = whole_numbers(config, "in_channels", 3)
    for key, ours in (("out_channels", channels), ("vq_embed_dim", latents)):
        if config.get(key, ours) not in (ours, *([None] if key == "vq_embed_dim" else [])):
            raise ValueError(f"{key}={config[key]!r} of the {kind}: ours has {ours}")
    width, multipliers = levels_of(config, [64])
    size = image_size(config, 32)
    return FirstStage(
        {
            "image_size": size,
            "in_channels": channels,
            "latent_channels": latents,
            "width": width,
            "multipliers": multipliers,
            "num_blocks": whole_numbers(config, "layers_per_block", 1),
            "attention": [size >> i for i in BLOCKS.attended(config, len(multipliers), [False])],
            "middle_attention": bool(config.get("mid_block_add_attention", True)),
            "regularizer": regularizer_of(config),
            "num_groups": whole_numbers(config, "norm_num_groups", 32),
        },
        scale_of(config),
    )


def build(arguments: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder of `FirstStage.network`."""
    kinds: dict[str, type[Regularizer]] = {kind.__name__: kind for kind in (DiagonalGaussian, VectorQuantizer)}
    given = arguments["regularizer"]
    return Autoencoder(**{**arguments, "regularizer": kinds[given["class_path"]](**given["init_args"])})


def loss_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the loss that an autoencoder of `FirstStage.network` is trained by, without perception.

    Its perceptual network is not in the folder: a recipe says more.
    """
    is_kl = arguments["regularizer"]["class_path"] == DiagonalGaussian.__name__
    terms = (
        {"reduction": "sum", "regularizer_weight": 1e-6} if is_kl else {"reduction": "mean", "regularizer_weight": 1.0}
    )
    return {"class_path": "ReconstructionLoss", "init_args": {**terms, "perceptual": None}}


def regularizer_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the regularizer."""
    if config["_class_name"] == KL:
        return part(DiagonalGaussian)
    return part(VectorQuantizer, num_codes=whole_numbers(config, "num_vq_embeddings", 256))


def scale_of(config: Mapping[str, Any]) -> float:
    """The factor from latents to what is diffused; ValueError if it is no such number."""
    scale = config.get("scaling_factor", SCALES[config["_class_name"]])
    if type(scale) not in (int, float) or not 0 < scale < float("inf"):
        raise ValueError(f"scaling_factor={scale!r} must be a finite number above 0")
    return float(scale)


def configuration(network: Autoencoder, scale: float) -> dict[str, Any]:
    """The config.json of an autoencoder.

    Args:
        network: Of a kind that diffusers has.
        scale: Factor from its latents to those that are diffused. It is always written: without it diffusers takes
            0.18215, for a VQ model too, whose latents are not scaled.

    Raises:
        ValueError: If diffusers has no such autoencoder.
    """
    levels = cast(list[Level], list(network.encoder.down))
    channels = [cast(nn.Conv2d, level.block[0].conv1).out_channels for level in levels]
    width = network.encoder.conv_in.out_channels
    if channels[0] != width:
        raise ValueError(
            f"diffusers has no autoencoder of channels {channels} and width={width}: multipliers must begin with 1"
        )
    regularizer = network.regularizer
    if type(regularizer) not in (DiagonalGaussian, VectorQuantizer):
        raise ValueError(f"diffusers has no autoencoder with a {type(regularizer).__name__}")
    shared = {
        "_class_name": KL if regularizer.num_codes is None else VQ,
        "sample_size": network.image_size,
        "in_channels": network.in_channels,
        "out_channels": network.in_channels,
        "latent_channels": network.latent_channels,
        "block_out_channels": channels,
        **BLOCKS.types([len(level.attn) > 0 for level in levels]),
        "layers_per_block": len(levels[0].block),
        "act_fn": "silu",
        "norm_num_groups": network.encoder.norm_out.num_groups,
        "mid_block_add_attention": network.encoder.mid.attn_1 is not None,
        "scaling_factor": scale,
        # Half precision overflows in decoders such as these.
        "force_upcast": True,
    }
    if regularizer.num_codes is None:
        return shared
    codes = {"num_vq_embeddings": regularizer.num_codes, "vq_embed_dim": network.latent_channels}
    return {**shared, **codes, "norm_type": "group", "lookup_from_codebook": False}
