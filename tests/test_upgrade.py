"""Checkpoints of version 0.1.0: their configuration gets today's keys, and their models sample the same images."""

from pathlib import Path
from typing import Any

import torch

from diffusion_lit.checkpoint import (
    WholeFiles,
    load_model,
    read_checkpoint,
)
from diffusion_lit.conditioner import Labels
from diffusion_lit.diffusion import DDIM, ClassifierFree, Cosine, DiscreteProcess, V
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet
from diffusion_lit.upgrade import FORMAT, upgrade_config

NETWORK = {
    "image_size": 8,
    "in_channels": 1,
    "width": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention": [4],
    "head_channels": 8,
    "num_classes": 10,
    "num_groups": 8,
}
DIFFUSION = "diffusion_lit.diffusion"
PIXELS = {"class_path": "diffusion_lit.metrics.Pixels", "init_args": {"size": 8}}
FAST = {"class_path": f"{DIFFUSION}.DDIM", "init_args": {"steps": 5, "eta": 0.0}}


def old_config(**arguments: Any) -> dict[str, Any]:
    """What version 0.1.0 stored of a run of its digits_cfg.yaml, shortened to what is not a default."""
    parts = {
        "network": {"class_path": "diffusion_lit.networks.ADMUNet", "init_args": {**NETWORK, "label_dropout": 0.1}},
        "process": {
            "class_path": f"{DIFFUSION}.DiscreteProcess",
            "init_args": {
                "num_steps": 100,
                "schedule": {"class_path": f"{DIFFUSION}.Cosine", "init_args": {"offset": 0.008}},
                "network_steps": None,
            },
        },
        "parameterization": {"class_path": f"{DIFFUSION}.V"},
        "objective": {
            "class_path": f"{DIFFUSION}.DenoisingLoss",
            "init_args": {"weighting": {"class_path": f"{DIFFUSION}.Velocity"}},
        },
        "sampler": {
            "class_path": f"{DIFFUSION}.DDIM",
            "init_args": {"steps": 4, "eta": 0.0, "grid": {"class_path": f"{DIFFUSION}.Uniform"}, "clip": True},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002, "betas": [0.9, 0.999]}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 2000}},
        "guidance": {
            "class_path": f"{DIFFUSION}.ClassifierFree",
            "init_args": {"scale": 1.0, "interval": [0.0, 1.0], "rescale": 0.0},
        },
        "max_skipped_steps": 10,
    }
    return {
        "seed_everything": 0,
        "model": {"class_path": "diffusion_lit.module.DiffusionModule", "init_args": {**parts, **arguments}},
        "data": {
            "class_path": "diffusion_lit.data.Digits",
            "init_args": {
                "batch_size": 8,
                "num_workers": 0,
                "flip": False,
                "on_corrupt": "stop",
                "eval_batch_size": 256,
                "on_device": False,
            },
        },
        "ema": {"decays": [0.997], "warmup": True},
        "frechet": {
            "extractor": PIXELS,
            "every_n_steps": 2,
            "num_images": 8,
            "batch_size": 8,
            "sampler": FAST,
            "seed": 0,
            "reference": None,
            "cache_dir": None,
            "at_start": True,
        },
        "evaluation": {"scores": None, "num_images": 1797, "batch_size": 256, "sampler": None, "every_n_steps": None},
    }


def test_a_configuration_of_version_0_1_0_gets_todays_keys() -> None:
    old = old_config()
    new = upgrade_config(old)
    assert old == old_config(), "the stored one is left alone"
    assert "frechet" not in new
    arguments = new["model"]["init_args"]
    assert arguments["network"]["init_args"] == {**NETWORK, "null_label": True}
    assert arguments["conditioner"] == {"class_path": "diffusion_lit.conditioner.Labels", "init_args": {"dropout": 0.1}}
    assert arguments["sampler"] == old["model"]["init_args"]["sampler"]
    assert new["data"] == {
        "class_path": "diffusion_lit.data.ImageData",
        "init_args": {
            "source": {"class_path": "diffusion_lit.data.Digits", "init_args": {}},
            "batch_size": 8,
            "num_workers": 0,
            "flip": False,
            "on_corrupt": "stop",
            "eval_batch_size": 256,
        },
    }
    assert new["evaluation"] == {
        "scores": None,
        "num_images": 1797,
        "batch_size": 256,
        "sampler": None,
        "extractor": PIXELS,
        "reference": None,
        "cache_dir": None,
        "at_start": True,
        "every_n_steps": 2,
        "training_num_images": 8,
        "training_sampler": FAST,
    }
    assert new["ema"] == old["ema"]


def test_less_usual_configurations_of_version_0_1_0_are_translated_too() -> None:
    bound = {"class_path": f"{DIFFUSION}.VariationalBound", "init_args": {"history": 5, "uniform": 0.01}}
    new = upgrade_config(old_config(objective=bound))
    assert new["model"]["init_args"]["objective"]["init_args"] == {
        "times": {"class_path": f"{DIFFUSION}.LossSecondMoment", "init_args": {"history": 5, "uniform": 0.01}}
    }
    without = {"class_path": "diffusion_lit.networks.ADMUNet", "init_args": {**NETWORK, "label_dropout": 0.0}}
    new = upgrade_config(old_config(network=without))
    assert new["model"]["init_args"]["network"]["init_args"]["null_label"] is False
    assert new["model"]["init_args"]["conditioner"]["init_args"] == {"dropout": 0.0}
    # Scores of training by the section `evaluation` alone: as many images as in `test`, by the same sampler.
    old = old_config()
    old["frechet"]["every_n_steps"] = None
    old["evaluation"]["every_n_steps"] = 50
    new = upgrade_config(old)["evaluation"]
    assert (new["every_n_steps"], new["training_num_images"]) == (50, 1797)
    assert new.get("training_sampler") is None
    # A data module of the user's is nobody else's to translate.
    other = {**old_config(), "data": {"class_path": "theirs.Data", "init_args": {"batch_size": 3}}}
    assert upgrade_config(other)["data"] == other["data"]
    assert upgrade_config({"model": None, "data": None}) == {"model": None, "data": None}


def test_a_model_of_version_0_1_0_loads_and_samples_the_same_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DiffusionModule(
        ADMUNet(**NETWORK, null_label=True),  # type: ignore[arg-type]
        DiscreteProcess(100, Cosine()),
        V(),
        sampler=DDIM(4),
        guidance=ClassifierFree(1.0),
        conditioner=Labels(0.1),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    held = {"state_dict": model.state_dict(), "global_step": 2, "weights": "0.997", "config": old_config()}
    torch.save({**held, "callbacks": {"Frechet": {"best": 40.0}, "Scalars": {}}}, path)
    assert read_checkpoint(path)["callbacks"] == {"Scalars": {}}
    loaded = load_model(path, DiffusionModule)
    assert torch.equal(loaded.sample(range(4), 3), model.sample(range(4), 3))
    assert (loaded.loaded.step, loaded.weights_name) == (2, "0.997")  # type: ignore[union-attr]
    assert loaded.num_classes == 10


def test_a_checkpoint_of_this_version_is_not_translated(tmp_path: Path) -> None:
    config = {"model": {"class_path": "x", "init_args": {"network": {"init_args": {"label_dropout": 0.1}}}}}
    WholeFiles().save_checkpoint({"state_dict": {}, "config": config}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["config"] == config
    assert read_checkpoint(tmp_path / "a.ckpt")["format"] == FORMAT
