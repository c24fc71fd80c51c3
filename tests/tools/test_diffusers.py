"""Diffusers' pipelines: the same input gives the same output, and the same noise the same images, both ways."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_lit import cli
from diffusion_lit.callbacks.checkpoints import restore
from diffusion_lit.diffusion import (
    DDIM,
    X0,
    Ancestral,
    Cosine,
    DiscreteProcess,
    Eps,
    FixedLarge,
    FixedSmall,
    Grid,
    LearnedRange,
    Linear,
    Parameterization,
    PosteriorMean,
    Quadratic,
    ScaledLinear,
    Schedule,
    Sigmoid,
    Spanning,
    Trailing,
    Uniform,
    V,
)
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet, UNet
from diffusion_lit.tools import export_weights, import_weights, scheduler, unet2d

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


def imported(folder: Path, *options: str) -> DiffusionModule:
    out = folder.parent / f"{folder.name}.ckpt"
    import_weights.main([str(folder), "--out", str(out), *options])
    return restore(str(out), DiffusionModule).eval()


def assert_close(ours: Tensor, others: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == others.shape
    assert (ours - others).abs().max() < tolerance * others.abs().max()


# Diffusers' network becomes ours

NETWORKS: dict[str, dict[str, Any]] = {
    "as DDPM's": {},
    "without attention": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "attention everywhere": {
        "down_block_types": ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "attention_head_dim": 4,
        "layers_per_block": 2,
    },
    "two heads at the coarsest": {"attention_head_dim": 8},
    "attention in between": {
        "block_out_channels": (8, 24, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 2,
    },
}


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_diffusers_network_gives_the_same_output_here(changes: dict[str, Any], tmp_path: Path) -> None:
    unet = theirs(**changes)
    model = imported(pipeline(tmp_path, unet))
    x, times = images(unet, unet.config.in_channels), torch.tensor([0.0, 19.0])
    assert_close(model.denoiser.network(x, times), unet(x, times).sample)


@torch.no_grad()
def test_a_pickled_file_serves_too(tmp_path: Path) -> None:
    unet = theirs()
    folder = pipeline(tmp_path, unet, safe_serialization=False)
    assert [path.suffix for path in (folder / "unet").glob("*model*")] == [".bin"]
    x, times = images(unet), torch.tensor([1.0, 7.0])
    assert_close(imported(folder).denoiser.network(x, times), unet(x, times).sample)


def former(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the names that attention had before diffusers 0.15, in which much of what is published is stored."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    pattern = re.compile("|".join(map(re.escape, old)))
    return {pattern.sub(lambda new: old[new[0]], name): tensor for name, tensor in tensors.items()}


@torch.no_grad()
def test_an_old_repository_with_former_names_and_all_files_at_its_top_serves_too(tmp_path: Path) -> None:
    unet = theirs()
    folder, old = pipeline(tmp_path, unet), tmp_path / "old"
    old.mkdir()
    (folder / "model_index.json").rename(old / "model_index.json")
    (folder / "unet" / "config.json").rename(old / "config.json")
    (folder / "scheduler" / "scheduler_config.json").rename(old / "scheduler_config.json")
    tensors = former(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    assert "mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, old / "diffusion_pytorch_model.safetensors")
    x, times = images(unet), torch.tensor([1.0, 7.0])
    assert_close(imported(old).denoiser.network(x, times), unet(x, times).sample)


def of_google(channels: list[int], size: int, attended: int) -> dict[str, Any]:
    """config.json of the conversions of DDPM's published weights, such as google/ddpm-cat-256."""
    down, up = ["DownBlock2D"] * len(channels), ["UpBlock2D"] * len(channels)
    down[attended], up[-1 - attended] = "AttnDownBlock2D", "AttnUpBlock2D"
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": channels,
        "center_input_sample": False,
        "down_block_types": down,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": size,
        "time_embedding_type": "positional",
        "up_block_types": up,
    }


@pytest.mark.parametrize(
    ("recipe", "config", "variance"),
    [
        ("cifar10", of_google([128, 256, 256, 256], 32, 1), "fixed_large"),
        ("lsun_cat", of_google([128, 128, 256, 256, 512, 512], 256, 4), "fixed_small"),
    ],
)
def test_the_published_conversions_are_our_recipes(
    recipe: str, config: dict[str, Any], variance: str, repository: Path
) -> None:
    ours = yaml.safe_load((repository / "configs" / f"{recipe}.yaml").read_text())["model"]["init_args"]
    # Dropout is left out there: nobody trained with the conversion.
    expected = {"in_channels": 3, "out_channels": 3, "num_groups": 32, **ours["network"]["init_args"], "dropout": 0.0}
    assert unet2d.arguments(config) == expected
    parts = scheduler.arguments(
        {
            "_class_name": "DDPMScheduler",
            "_diffusers_version": "0.1.1",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": True,
            "num_train_timesteps": 1000,
            "trained_betas": None,
            "variance_type": variance,
        }
    )
    assert parts["process"] == ours["process"]
    sampler = parts["sampler"]
    assert sampler["class_path"] == ours["sampler"]["class_path"]
    given = ours["sampler"]["init_args"]["variance"]["class_path"]
    assert sampler["init_args"]["variance"]["class_path"] == given


def test_a_pipeline_needs_no_recipe_to_sample_from(tmp_path: Path) -> None:
    out = tmp_path / "run" / "checkpoints" / "imported.ckpt"
    cli.main(["import", str(pipeline(tmp_path)), "--out", str(out)])
    cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    cli.main(["predict", "--ckpt_path", str(out), "--num_images", "2", *cpu])
    assert (tmp_path / "run" / "predictions" / "imported_seed_0" / "000001.png").is_file()


def test_a_network_alone_needs_a_recipe_for_its_process(tmp_path: Path, repository: Path) -> None:
    folder = tmp_path / "unet"
    theirs().save_pretrained(folder)
    with pytest.raises(ValueError, match="has no scheduler: give by -c the recipe whose process"):
        imported(folder)
    recipe = str(repository / "configs" / "cifar10_cfg.yaml")
    # The recipe's own guidance does not fit a network without classes.
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: {init_args: {guidance: null}}\n")
    model = imported(folder, "-c", recipe, "-c", str(plain))
    assert isinstance(model.process.schedule, Cosine)
    assert isinstance(model.denoiser.network, UNet)
    config = torch.load(tmp_path / "unet.ckpt", weights_only=True)["config"]
    assert config["data"]["class_path"].endswith("CIFAR10")
    assert config["frechet"]["num_images"] == 10_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freq_shift": 0}, ["freq_shift=0 where ours has 1"]),
        ({"flip_sin_to_cos": True, "norm_eps": 1e-5}, ["flip_sin_to_cos=True", "norm_eps=1e-05 where ours has 1e-06"]),
        ({"downsample_padding": 1}, ["downsample_padding=1 where ours has 0"]),
        ({"resnet_time_scale_shift": "scale_shift"}, ["resnet_time_scale_shift='scale_shift'"]),
        ({"num_class_embeds": 4}, ["num_class_embeds=4 where ours has None"]),
        ({"act_fn": "relu"}, ["act_fn='relu'"]),
        ({"block_out_channels": (8, 12)}, ["block_out_channels=[8, 12]", "multiples"]),
        ({"time_embedding_dim": 16}, ["time_embedding_dim=16", "4 x 8"]),
        ({"attn_norm_num_groups": 2}, ["attn_norm_num_groups=2", "norm_num_groups=4"]),
        ({"sample_size": None}, ["sample_size=None", "square"]),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, ["up_block_types=['UpBlock2D', 'AttnUpBlock2D']"]),
        (
            {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2}
            | {"attention_head_dim": 8},
            ["attention_head_dim=8", "[8, 16] channels"],
        ),
    ],
)
def test_a_network_of_another_form_is_refused_with_the_reason(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    folder = pipeline(tmp_path, theirs(**changes))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        imported(folder)
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, ["UNet2DConditionModel"]),
        ("unet/config.json", {"warp": 9}, ["warp=9, which is not known here"]),
        ("unet/config.json", {"layers_per_block": "1"}, ["layers_per_block='1'", "whole numbers"]),
        ("unet/config.json", {"block_out_channels": []}, ["block_out_channels=[]"]),
        ("unet/config.json", {"block_out_channels": [8, 16_000_000]}, ["misshapen"]),
        ("model_index.json", {"_class_name": "LDMPipeline"}, ["LDMPipeline", "DDPMPipeline or DDIMPipeline"]),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, ["PNDMScheduler"]),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, ["beta_schedule='sigmoid'", "linear"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, ["prediction_type='flow'", "epsilon"]),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "log"}, ["timestep_spacing='log'"]),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}, ["variance_type='learned'"]),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, ["trained_betas=[0.1]"]),
        ("scheduler/scheduler_config.json", {"thresholding": True}, ["thresholding=True"]),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr=True"]),
        ("scheduler/scheduler_config.json", {"steps_offset": 1}, ["steps_offset=1"]),
        ("scheduler/scheduler_config.json", {"set_alpha_to_one": False}, ["set_alpha_to_one=False"]),
        ("scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, ["clip_sample_range=2.0"]),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, ["num_train_timesteps=0"]),
        ("scheduler/scheduler_config.json", {"beta_end": 1.5}, ["beta_end=1.5"]),
        ("scheduler/scheduler_config.json", {"predict_epsilon": "no"}, ["predict_epsilon='no'"]),
    ],
)
def test_a_configuration_without_an_equal_is_refused_with_the_reason(
    file: str, changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    folder = pipeline(tmp_path)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        imported(folder)
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.glob("*.ckpt"))


def test_missing_unknown_and_misshapen_tensors_have_diffusers_names(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["up_blocks.0.attentions.1.to_v.bias"]
    tensors["mid_block.attentions.0.to_q.weight"] = torch.zeros(16, 8)
    # Under both its names: which is meant cannot be known.
    tensors["mid_block.attentions.0.query.bias"] = torch.zeros(16)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        imported(folder)
    message = str(error.value)
    assert "missing: up_blocks.0.attentions.1.to_v.bias;" in message
    assert "unknown: mid_block.attentions.0.query.bias;" in message
    assert "misshapen: mid_block.attentions.0.to_q.weight (16, 8) instead of (16, 16);" in message


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("unet/config.json", "config.json: there is no such file"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused(gone: str, words: str, tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    (folder / gone).unlink()
    with pytest.raises(FileNotFoundError, match=words):
        imported(folder)


# Diffusers' sampler becomes ours


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


SCHEDULERS: dict[str, dict[str, Any]] = {
    "as DDPM's for LSUN": {},
    "as DDPM's for CIFAR-10": {"variance_type": "fixed_large"},
    "scaled linear, unclipped": {"beta_schedule": "scaled_linear", "beta_start": 0.01, "beta_end": 0.1}
    | {"clip_sample": False},
    "cosine, velocity": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "clean data, trailing": {"prediction_type": "sample", "timestep_spacing": "trailing"},
    "log of the small variance": {"variance_type": "fixed_small_log"},
    "linspace": {"timestep_spacing": "linspace"},
}


# Over fewer steps, diffusers takes each to be T / S wide, which its linspace is not.
DRAWN = [(name, steps) for name in SCHEDULERS for steps in (T, 10) if (name, steps) != ("linspace", 10)]


@pytest.mark.parametrize(("name", "steps"), DRAWN)
def test_diffusers_ddpm_draws_the_same_images_here(name: str, steps: int, tmp_path: Path) -> None:
    made_by, unet = DDPMScheduler(num_train_timesteps=T, **SCHEDULERS[name]), theirs()
    model = imported(pipeline(tmp_path, unet, made_by))
    assert isinstance(model.sampler, Ancestral)
    assert_close(*same_noise(made_by, unet, model, steps), tolerance=1e-4)


def test_a_learned_variance_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    made_by, unet = DDPMScheduler(num_train_timesteps=T, variance_type="learned_range"), theirs(out_channels=6)
    model = imported(pipeline(tmp_path, unet, made_by))
    assert_close(*same_noise(made_by, unet, model, T), tolerance=1e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_diffusers_ddim_draws_the_same_images_here(spacing: str, tmp_path: Path) -> None:
    made_by, unet = DDIMScheduler(num_train_timesteps=T, timestep_spacing=spacing), theirs()
    model = imported(pipeline(tmp_path, unet, made_by))
    assert isinstance(model.sampler, DDIM)
    assert_close(*same_noise(made_by, unet, model, 10, use_clipped_model_output=True), tolerance=1e-4)


def test_samplers_take_as_many_steps_as_diffusers_pipelines() -> None:
    steps = {
        (kind, count): scheduler.arguments({"_class_name": kind, "num_train_timesteps": count})["sampler"]["init_args"][
            "steps"
        ]
        for kind in ("DDPMScheduler", "DDIMScheduler")
        for count in (1000, 20)
    }
    assert list(steps.values()) == [None, None, 50, 20]


# Ours become diffusers'


def ours(**changes: Any) -> UNet:
    sizes = {"image_size": 8, "width": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4], "num_groups": 4}
    network: UNet = randomised(UNet(**{**sizes, "dropout": 0.1, **changes}))
    return network


def checkpoint(folder: Path, network: nn.Module | None = None, **parts: Any) -> str:
    """A checkpoint as `fit` writes it, averages included, of parts given by class and arguments."""
    network = ours() if network is None else network
    arguments = {
        "class_path": f"diffusion_lit.networks.{type(network).__name__}",
        "init_args": {"image_size": 8, "width": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4]}
        | {"num_groups": 4},
    }
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


def exported(path: str, *options: str) -> Path:
    folder = Path(path).parent / "exported"
    export_weights.main([path, "--to", "diffusers", "--out", str(folder), *options])
    return folder


OWN_NETWORKS: dict[str, dict[str, Any]] = {
    "as DDPM's": {},
    "without attention": {"attention": []},
    "many heads of one width": {"num_heads": 4},
    "attention everywhere": {"attention": [8, 4, 2], "multipliers": [1, 1, 2], "num_blocks": 2, "in_channels": 1},
    "a learned variance": {"out_channels": 6},
}


@pytest.mark.parametrize("changes", OWN_NETWORKS.values(), ids=OWN_NETWORKS)
@torch.no_grad()
def test_our_network_gives_the_same_output_there(changes: dict[str, Any]) -> None:
    network = ours(**changes)
    config = unet2d.configuration(network)
    unet = UNet2DModel.from_config(config).eval()
    unet.load_state_dict(unet2d.to_diffusers(network), strict=True)
    x, times = images(unet, network.in_channels), torch.tensor([0.0, 19.0])
    assert_close(network(x, times), unet(x, times).sample)
    assert unet.config.dropout == 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multipliers": [2, 1]}, ["channels [16, 8] and width=8"]),
        ({"attention": [8, 4], "num_heads": 2}, ["num_heads=2", "[8, 16] channels"]),
    ],
)
def test_a_network_that_diffusers_has_not_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="diffusers has no network") as error:
        unet2d.configuration(ours(**changes))
    for word in words:
        assert word in str(error.value)


PARAMETERIZATIONS: list[tuple[Parameterization, Schedule]] = [
    (Eps(), Linear()),
    (X0(), ScaledLinear(0.01, 0.1)),
    (V(), Cosine()),
    (V(), Cosine(0.02)),
    (Eps(), Sigmoid()),
]


@pytest.mark.parametrize(("parameterization", "schedule"), PARAMETERIZATIONS)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("grid", [Uniform(), Trailing()])
def test_the_exported_pipelines_ddim_images_are_ours(
    parameterization: Parameterization, schedule: Schedule, clip: bool, grid: Grid, tmp_path: Path
) -> None:
    model = DiffusionModule(
        ours(), DiscreteProcess(T, schedule), parameterization, sampler=DDIM(10, grid=grid, clip=clip)
    ).eval()
    export_weights.write_diffusers(model, tmp_path / "pipeline")
    there = DDIMPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(there.scheduler, DDIMScheduler)
    pair = same_noise(there.scheduler, there.unet, model, 10, use_clipped_model_output=clip)
    assert_close(*pair, tolerance=1e-4)


@pytest.mark.parametrize("variance", [FixedLarge(), FixedSmall(), LearnedRange()])
def test_the_exported_pipelines_ddpm_images_are_ours(variance: Any, tmp_path: Path) -> None:
    network = ours(out_channels=6 if isinstance(variance, LearnedRange) else 3)
    model = DiffusionModule(network, DiscreteProcess(T), sampler=Ancestral(variance=variance)).eval()
    export_weights.write_diffusers(model, tmp_path / "pipeline")
    there = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert_close(*same_noise(there.scheduler, there.unet, model, T), tolerance=1e-4)


@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
def test_the_pipelines_draw_images_by_themselves(kind: Callable[..., Any], tmp_path: Path) -> None:
    folder = exported(checkpoint(tmp_path))
    there = kind.from_pretrained(folder)  # type: ignore[attr-defined]
    there.set_progress_bar_config(disable=True)
    own = {"use_clipped_model_output": True} if kind is DDIMPipeline else {}
    drawn = there(batch_size=2, generator=seeded(), num_inference_steps=10, output_type="pt", **own).images
    assert drawn.shape == (2, 3, 8, 8)
    if kind is DDIMPipeline:
        model = restore(str(tmp_path / "last.ckpt"), DiffusionModule)
        noise = torch.randn(2, 3, 8, 8, generator=seeded())
        assert_close((model.decode(noise, DDIM(10)) / 2 + 0.5).clamp(0, 1), drawn, tolerance=1e-4)


@torch.no_grad()
def test_what_was_exported_comes_back_as_it_was(tmp_path: Path) -> None:
    sampler = {
        "class_path": "diffusion_lit.diffusion.Ancestral",
        "init_args": {"steps": None, "variance": {"class_path": "diffusion_lit.diffusion.FixedLarge"}, "clip": False}
        | {"grid": {"class_path": "diffusion_lit.diffusion.Spanning"}},
    }
    network = ours()
    path = checkpoint(tmp_path, network, sampler=sampler, parameterization="diffusion_lit.diffusion.V")
    again = imported(exported(path))
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.denoiser.network.get_parameter(name), tensor)
    assert isinstance(again.sampler, Ancestral)
    assert isinstance(again.sampler.variance, FixedLarge)
    assert isinstance(again.sampler.grid, Spanning)
    assert not again.sampler.clip
    assert isinstance(again.denoiser.parameterization, V)
    assert again.process.num_steps == T


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"network": randomised(ADMUNet(8, width=8, multipliers=[1], attention=[], num_groups=4))}, "ADMUNet"),
    ({"parameterization": PosteriorMean()}, "PosteriorMean"),
    ({"process": DiscreteProcess(T, network_steps=1000)}, "network_steps=1000"),
    ({"network": ours(out_channels=4)}, "out_channels=4"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_a_model_that_diffusers_has_not_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = DiffusionModule(**{"network": ours(), "process": DiscreteProcess(T), "sampler": DDIM(10), **changes})
    with pytest.raises(ValueError, match=f"diffusers has no .*{words}"):
        export_weights.write_whole(tmp_path / "pipeline", lambda folder: export_weights.write_diffusers(model, folder))
    assert not list(tmp_path.iterdir())


def test_a_grid_that_diffusers_has_not_becomes_its_usual_one() -> None:
    model = DiffusionModule(ours(), DiscreteProcess(T), sampler=DDIM(10, grid=Quadratic()))
    config = scheduler.configuration(model.process, model.denoiser.parameterization, model.sampler, ours())
    assert config["timestep_spacing"] == "leading"


# Which weights


@pytest.mark.parametrize(
    ("weights", "added", "name"), [("averaged", 0, "0.9999"), ("raw", 1, "raw"), ("0.5", 2, "0.5")]
)
@pytest.mark.parametrize("to", ["diffusers", "safetensors"])
def test_any_average_can_be_exported(weights: str, added: int, name: str, to: str, tmp_path: Path) -> None:
    path, folder = checkpoint(tmp_path), tmp_path / "out"
    export_weights.main([path, "--to", to, "--out", str(folder), "--weights", weights])
    if to == "diffusers":
        tensor = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_norm_out.bias"]
    else:
        tensor = load_file(folder / "model.safetensors")["norm_out.bias"]
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata()["weights"] == name
    assert torch.equal(tensor, ours().norm_out.bias + added)


def test_safetensors_say_what_they_are_and_go_back_in(tmp_path: Path) -> None:
    network = ours()
    path, folder = checkpoint(tmp_path, network), tmp_path / "out"
    export_weights.main([path, "--to", "safetensors", "--out", str(folder)])
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(network.state_dict())
    told = {"format": "pt", "network": "UNet", "weights": "0.9999", "step": "123"}
    assert {key: metadata[key] for key in told} == told
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": json.loads(metadata["model"])}))
    import_weights.main([str(folder / "model.safetensors"), "-c", str(recipe), "--out", str(tmp_path / "again.ckpt")])
    again = restore(str(tmp_path / "again.ckpt"), DiffusionModule).denoiser.network
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.get_parameter(name), tensor)


def test_weights_that_are_not_there_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    path, folder = checkpoint(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match=r"weights='0\.9' are not in the checkpoint; it has \['0\.5'"):
        export_weights.main([path, "--to", "safetensors", "--out", str(folder), "--weights", "0.9"])
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds something already"):
        export_weights.main([path, "--to", "safetensors", "--out", str(folder)])
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_from_the_command_line_a_refusal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["import", str(pipeline(tmp_path, theirs(freq_shift=0))), "--out", str(tmp_path / "x.ckpt")])
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("diffusion_lit: error: this UNet2DModel is not DDPM's network: freq_shift=0")


def test_neither_tool_imports_diffusers(repository: Path) -> None:
    for file in (repository / "diffusion_lit").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) diffusers\b", file.read_text(), re.MULTILINE), file
