"""Writes networks and pipelines as diffusers reads them, without diffusers."""

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import nn

from diffusion_lit.codec import Pixels
from diffusion_lit.codecs import FirstStage
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet, Autoencoder, UNet
from diffusion_lit.tools import autoencoders, scheduler, unet2d, unet2d_condition
from diffusion_lit.tools.pipelines_writer import Written, note, pipeline_of
from diffusion_lit.tools.tensor_names import Exchanged, to_diffusers

DIFFUSERS_VERSION = "0.42.1"
VERSION = {"_diffusers_version": DIFFUSERS_VERSION}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a configuration as diffusers does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_network(network: Exchanged, config: dict[str, Any], folder: Path) -> None:
    """Writes a network, which `from_pretrained` of its class reads."""
    write_json(folder / "config.json", {**config, **VERSION})
    save_file(to_diffusers(network), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_autoencoder(network: Autoencoder, folder: Path, scale: float = 1.0) -> None:
    """Writes an `AutoencoderKL` or a `VQModel`, whose latents times `scale` are diffused."""
    write_network(network, autoencoders.configuration(network, scale), folder)


def write_diffusers(model: DiffusionModule, folder: Path) -> str | None:
    """Writes a pipeline, or where there is none of the network's inputs, its networks and its scheduler.

    The pipeline is a `DDPMPipeline`, which `DDIMPipeline` reads too, or over latents that of `pipeline_of`.

    Returns:
        In what the pipeline differs from the model, for the user; None: in nothing.

    Raises:
        ValueError: If diffusers has no such network, process or latents.
    """
    network = cast(UNet | ADMUNet, model.denoiser.network)
    if type(network) not in (UNet, ADMUNet):
        raise ValueError(
            f"diffusers has no {type(network).__name__}: its U-Nets can be a UNet or an ADMUNet; use --to safetensors"
        )
    config = unet_configuration(network)
    if type(model.codec) is not Pixels and type(model.codec) is not FirstStage:
        raise ValueError(f"diffusers has no pipeline of a {config['_class_name']} with a {type(model.codec).__name__}")
    schedule = scheduler.configuration(model.process, model.denoiser.parameterization, model.sampler, network)
    parts: dict[str, Any] = {"unet": ["diffusers", config["_class_name"]]}
    pipeline = None if inputs(network) else Written("DDPMPipeline")
    if isinstance(model.codec, FirstStage):
        pipeline = pipeline_of(model)
        stage, scale = scaled_autoencoder(model.codec)
        schedule = scheduler.ddim_configuration(schedule)
        place = (pipeline or Written("")).first_stage
        write_autoencoder(stage, folder / place, scale)
        parts[place] = ["diffusers", autoencoders.configuration(stage, scale)["_class_name"]]
    parts["scheduler"] = ["diffusers", schedule["_class_name"]]
    if pipeline is not None:
        parts |= pipeline.write(folder)
        sorted_parts = {name: parts[name] for name in sorted(parts)}
        write_json(folder / "model_index.json", {"_class_name": pipeline.name, **VERSION, **sorted_parts})
    write_json(folder / "scheduler" / "scheduler_config.json", {**schedule, **VERSION})
    write_network(network, config, folder / "unet")
    return note(pipeline, model.sampler.grid)


def unet_configuration(network: UNet | ADMUNet) -> dict[str, Any]:
    """The config.json of a U-Net; ValueError if diffusers has no such network."""
    if getattr(network, "has_level", False):
        raise ValueError("diffusers' U-Nets do not embed a level (level=true); use --to safetensors")
    if isinstance(network, ADMUNet) and network.context_width is not None:
        return unet2d_condition.configuration(network)
    return unet2d.configuration(network)


def inputs(network: nn.Module) -> list[str]:
    """What the network takes besides images and times, by diffusers' names; pipelines here pass none of it."""
    given = {
        "class_labels": getattr(network, "num_classes", None),
        "encoder_hidden_states": getattr(network, "context_width", None),
        "further channels of the sample": getattr(network, "concat_channels", None),
    }
    return [name for name, number in given.items() if number]


def scaled_autoencoder(codec: FirstStage) -> tuple[Autoencoder, float]:
    """The autoencoder of a codec, and the one factor that diffusers has from its latents to what is diffused.

    A shift, or factors of single channels, become part of the convolutions around the latents. The clamp of
    log-variances to [-30, 20] then is one of others, which is no matter.

    Raises:
        ValueError: If the codec is not scaled yet, or if the latents are quantised, which a shift or factors of single
            channels would change.
    """
    scale, shift = codec.scale.double().cpu(), codec.shift.double().cpu()
    if not scale.isfinite().all():
        raise ValueError("the checkpoint does not say by which factor latents were scaled; train it for a step first")
    if (scale == scale[0]).all() and (shift == 0).all():
        # The shortest number that is the same in single precision.
        return codec.network, float(str(codec.scale.cpu().numpy()[0]))
    if codec.network.regularizer.num_codes is not None:
        raise ValueError(
            "diffusers has no VQModel whose latents are shifted or scaled by channel (codec.per_channel=true); use "
            "--to safetensors"
        )
    network = copy.deepcopy(codec.network)
    with torch.no_grad():
        inner, outer = network.quant_conv, network.post_quant_conv
        weight, bias = outer.weight.double().cpu(), cast(torch.Tensor, outer.bias).double().cpu()
        cast(torch.Tensor, outer.bias).copy_(bias + weight.flatten(1) @ shift)
        outer.weight.copy_(weight / scale[None, :, None, None])
        factors = torch.cat([scale, torch.ones_like(scale)])
        added = torch.cat([-scale * shift, 2 * scale.log()])
        inner.weight.copy_(inner.weight.double().cpu() * factors[:, None, None, None])
        cast(torch.Tensor, inner.bias).copy_(cast(torch.Tensor, inner.bias).double().cpu() * factors + added)
    return network, 1.0
