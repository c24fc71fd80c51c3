"""Small networks and pipelines of diffusers, and what comparisons with them share."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn

from diffusion_lit.checkpoint import load_model
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.tools import import_weights

T = 20
TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(network: Any) -> Any:
    """All weights random, those too that start at zero."""
    generator = seeded(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return network.eval()


def theirs(**changes: Any) -> Any:
    return randomised(UNet2DModel(**{**TINY, **changes}))


def images(network: nn.Module, channels: int = 3) -> Tensor:
    size = int(network.config.sample_size)  # type: ignore[union-attr, arg-type]
    return torch.randn(2, channels, size, size, generator=seeded(2))


def pipeline(folder: Path, unet: Any = None, made_by: Any = None, **saving: Any) -> Path:
    made_by = DDPMScheduler(num_train_timesteps=T) if made_by is None else made_by
    DDPMPipeline(theirs() if unet is None else unet, made_by).save_pretrained(folder / "pipeline", **saving)
    return folder / "pipeline"


def imported(folder: Path, *options: str) -> Any:
    """The `DiffusionModule` that `import` makes of a folder."""
    out = folder.parent / f"{folder.name}.ckpt"
    import_weights.main([str(folder), "--out", str(out), *options])
    return load_model(out, DiffusionModule)


def assert_close(ours: Tensor, others: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == others.shape
    assert (ours - others).abs().max() < tolerance * others.abs().max()


def same_noise(made_by: Any, unet: Any, model: DiffusionModule, steps: int, **stepping: Any) -> tuple[Tensor, Tensor]:
    """Images of theirs and ours, unclipped, that begin at one noise and draw further noise from one stream."""
    x = images(unet)
    generator = seeded(3)
    made_by.set_timesteps(steps)
    with torch.no_grad():
        theirs = x
        for t in made_by.timesteps:
            theirs = made_by.step(unet(theirs, t).sample, t, theirs, generator=generator, **stepping).prev_sample
        generator = seeded(3)
        model.sampler.steps = steps
        denoise = model.bind({})
        ours = model.sampler(denoise, x, model.process, lambda: torch.randn(x.shape, generator=generator))
    return ours, theirs


def ours(**changes: Any) -> UNet:
    sizes = {"image_size": 8, "width": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4], "num_groups": 4}
    network: UNet = randomised(UNet(**{**sizes, "dropout": 0.1, **changes}))
    return network


def checkpoint(folder: Path, network: nn.Module | None = None, num_classes: int | None = None, **parts: Any) -> str:
    """A checkpoint as `fit` writes it, averages included, of parts given by class and arguments."""
    network = ours() if network is None else network
    arguments: dict[str, Any] = {
        "class_path": f"diffusion_lit.networks.{type(network).__name__}",
        "init_args": {"image_size": 8, "width": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4]}
        | {"num_groups": 4},
    }
    if num_classes is not None:
        arguments["init_args"]["num_classes"] = num_classes
    process = {"class_path": "diffusion_lit.diffusion.DiscreteProcess", "init_args": {"num_steps": T}}
    sampler = {"class_path": "diffusion_lit.diffusion.DDIM", "init_args": {"steps": 10}}
    model = {
        "class_path": "diffusion_lit.module.DiffusionModule",
        "init_args": {"network": arguments, "process": process, "sampler": sampler, **parts},
    }
    state = {f"denoiser.network.{name}": tensor for name, tensor in network.state_dict().items()}
    content = {
        "state_dict": state,
        "weights": "0.9999",
        "current_model_state": {name: tensor + 1 for name, tensor in state.items()},
        "averages": {"averages": {"0.5": {name: tensor + 2 for name, tensor in state.items()}}},
        "config": {"model": model},
        "global_step": 123,
    }
    torch.save(content, folder / "last.ckpt")
    return str(folder / "last.ckpt")
