"""Folders of diffusers: for the same input the imported network gives the same output, for the same noise its sampler
draws the same images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion_lit import cli
from diffusion_lit.configuration import Merge
from diffusion_lit.diffusion import DDIM, Ancestral, Cosine
from diffusion_lit.networks import ADMUNet, UNet
from diffusion_lit.parts import MISSING
from diffusion_lit.sections import CARRIED
from diffusion_lit.tools import scheduler, unet2d
from diffusion_lit.tools.import_weights import read_recipes
from tests.tools.diffusers_models import T, assert_close, images, imported, pipeline, same_noise, theirs

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
    "a level of half as many channels more": {"block_out_channels": (8, 12)},
    "attention in between": {
        "block_out_channels": (8, 24, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 2,
    },
}


@pytest.mark.few(3)
@pytest.mark.parametrize("changes", NETWORKS.values(), ids=NETWORKS)
@torch.no_grad()
def test_diffusers_network_gives_the_same_output_here(changes: dict[str, Any], tmp_path: Path) -> None:
    unet = theirs(**changes)
    model = imported(pipeline(tmp_path, unet))
    x, times = images(unet, unet.config.in_channels), torch.tensor([0.0, 19.0])
    assert_close(model.denoiser.network(x, times), unet(x, times).sample)


DEFAULTS: dict[str, Any] = {"freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1, "norm_eps": 1e-5}
RESNETS: dict[str, Any] = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "block_out_channels": (8, 12, 16),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}
ADM_NETWORKS: dict[str, dict[str, Any]] = {
    "diffusers' defaults": {"attention_head_dim": 8},
    "one head": {"layers_per_block": 2},
    "a normalization that scales and shifts": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
    "resampling by residual blocks": {**RESNETS, "attention_head_dim": 4, "out_channels": 6},
    "classes": {"num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4},
}


@pytest.mark.few(2)
@pytest.mark.parametrize("changes", ADM_NETWORKS.values(), ids=ADM_NETWORKS)
@torch.no_grad()
def test_a_network_of_diffusers_defaults_is_adms_and_gives_the_same_output_here(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    unet = theirs(**DEFAULTS, **changes)
    network = imported(pipeline(tmp_path, unet)).denoiser.network
    assert isinstance(network, ADMUNet)
    x, times = images(unet), torch.tensor([0.0, 19.0])
    label = torch.tensor([4, 0]) if "num_class_embeds" in changes else None
    assert_close(network(x, times, {} if label is None else {"label": label}), unet(x, times, label).sample)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resnet_time_scale_shift": "scale_shift"}, ["attn_norm_num_groups=None", "norm_num_groups=4"]),
        ({"mid_block_scale_factor": 2}, ["not ADM's network: mid_block_scale_factor=2 where ours has 1"]),
        ({**RESNETS, "upsample_type": "conv", "attention_head_dim": 4}, ["['conv', 'resnet']", "everywhere"]),
        ({"attention_head_dim": 5}, ["16 channels", "head_channels=5"]),
    ],
)
def test_a_network_near_adms_is_refused_with_the_reason(
    changes: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        imported(pipeline(tmp_path, theirs(**DEFAULTS, **changes)))
    for word in words:
        assert word in str(error.value)


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


def short(part: Any) -> Any:
    """A part with the name of its class beside its arguments."""
    if isinstance(part, str) and part.startswith("diffusion_lit."):
        part = {"class_path": part}
    if not isinstance(part, dict):
        return part
    name = part["class_path"].rpartition(".")[2]
    return {"class": name, **{key: short(value) for key, value in part.get("init_args", {}).items()}}


@pytest.mark.parametrize(
    ("recipe", "config", "variance"),
    [
        ("cifar10", of_google([128, 256, 256, 256], 32, 1), "fixed_large"),
        ("lsun_cat", of_google([128, 128, 256, 256, 512, 512], 256, 4), "fixed_small"),
    ],
)
def test_the_published_conversions_are_our_recipes(recipe: str, config: dict[str, Any], variance: str) -> None:
    network, arguments = unet2d.arguments(config)
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
    carried = {"init_args": {"network": scheduler.part(network, **arguments), **parts}}
    theirs = short(Merge().value(CARRIED["model"], MISSING, carried, "model"))
    ours = short(read_recipes([recipe])["model"])
    # The conversions have no dropout, and cifar10 has no output channels of its own.
    ours["network"] |= {"dropout": 0.0, "out_channels": 3}
    for name in ("network", "process", "parameterization"):
        assert theirs[name] == ours[name]
    for name in ("class", "variance"):
        assert theirs["sampler"][name] == ours["sampler"][name]


def test_a_pipeline_needs_no_recipe_to_sample_from(tmp_path: Path) -> None:
    out = tmp_path / "run" / "checkpoints" / "imported.ckpt"
    cli.main(["import", str(pipeline(tmp_path)), "--out", str(out)])
    cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    cli.main(["predict", "--ckpt_path", str(out), "--num_images", "2", *cpu])
    assert (tmp_path / "run" / "predictions" / "imported_seed_0" / "000001.png").is_file()


def test_a_network_alone_needs_a_recipe_for_its_process(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    theirs().save_pretrained(folder)
    with pytest.raises(ValueError, match="has no scheduler: give by -c the recipe with the process"):
        imported(folder)
    # The recipe's own guidance and label dropout do not fit a network without classes.
    plain = tmp_path / "plain.yaml"
    plain.write_text("model: {guidance: null, conditioner: {dropout: 0.0}}\n")
    model = imported(folder, "-c", "cifar10_cfg", "-c", str(plain))
    assert isinstance(model.process.schedule, Cosine)
    assert isinstance(model.denoiser.network, UNet)
    config = torch.load(tmp_path / "unet.ckpt", weights_only=True)["config"]
    assert config["data"]["init_args"]["source"]["class_path"].endswith("CIFAR10")
    assert config["evaluation"]["training_num_images"] == 10_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"freq_shift": 0}, ["freq_shift=0 where ours has 1"]),
        ({"flip_sin_to_cos": True, "norm_eps": 1e-5}, ["flip_sin_to_cos=True", "norm_eps=1e-05 where ours has 1e-06"]),
        ({"downsample_padding": 1}, ["downsample_padding=1 where ours has 0"]),
        ({"resnet_time_scale_shift": "scale_shift"}, ["resnet_time_scale_shift='scale_shift'"]),
        ({"num_class_embeds": 4}, ["not DDPM's network", "num_class_embeds=4 where ours has None"]),
        ({"act_fn": "relu"}, ["act_fn='relu'"]),
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
        ("model_index.json", {"_class_name": "PNDMPipeline"}, ["PNDMPipeline", "DDPMPipeline, DDIMPipeline"]),
        ("scheduler/scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"}, ["EulerDiscreteScheduler"]),
        ("scheduler/scheduler_config.json", {"_class_name": "PNDMScheduler"}, ["skip_prk_steps=False"]),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "v_prediction"},
            ["prediction_type='v_prediction'"],
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, ["beta_schedule='sigmoid'", "linear"]),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, ["prediction_type='flow'", "epsilon"]),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "log"}, ["timestep_spacing='log'"]),
        ("scheduler/scheduler_config.json", {"variance_type": "learned"}, ["variance_type='learned'"]),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, ["trained_betas=[0.1]"]),
        ("scheduler/scheduler_config.json", {"thresholding": True}, ["thresholding=True"]),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, ["rescale_betas_zero_snr=True"]),
        ("scheduler/scheduler_config.json", {"steps_offset": -1}, ["steps_offset=-1"]),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "timestep_spacing": "trailing"},
            ["set_alpha_to_one=False", "trailing"],
        ),
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


# Samplers


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


@pytest.mark.few(4)
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


def test_from_the_command_line_a_refusal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["import", str(pipeline(tmp_path, theirs(freq_shift=0))), "--out", str(tmp_path / "x.ckpt")])
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("diffusion_lit: error: ")
    assert "unet/config.json: this UNet2DModel is not DDPM's network: freq_shift=0" in last
