"""Recipes of EDM and of consistency models say what their papers say."""

from typing import Any

import pytest
import torch
from torch import nn

from diffusion_lit.callbacks import EMA
from diffusion_lit.methods.consistency import (
    LPIPS,
    Boundary,
    ConsistencyDistillation,
    ConsistencyTraining,
    Doubling,
    Multistep,
    Neighbors,
    PseudoHuber,
    Shrinking,
    SquareRoot,
)
from diffusion_lit.networks import DDPMpp
from diffusion_lit.optimization import ImageWarmup, optimization
from tests.test_configs import callbacks_of, instantiate


def decays_of(made: Any) -> list[Any]:
    [ema] = [callback for callback in callbacks_of(made) if isinstance(callback, EMA)]
    return [ema.decays, ema.half_lives]


# Karras et al. 2022, tables 7 and 8 and their command: parameters, batch, images in millions, learning rate, half-life,
# dropout, evaluations.
EDM = {
    "edm_cifar10": (55_733_891, 512, 200, 1e-3, 500_000, 0.13, 35),
    "edm_cifar10_conditional": (55_735_299, 512, 200, 1e-3, 500_000, 0.13, 35),
    "edm_imagenet64": (295_899_267, 4096, 2500, 1e-4, 50_000_000, 0.1, 511),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", EDM)
def test_recipes_of_edm_are_the_papers_to_the_number(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, batch, millions, rate, half_life, dropout, evaluations = EDM[recipe]
    made = instantiate(recipe, monkeypatch)
    model = made.model
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert made.datamodule.batch_size == batch
    assert made.trainer.max_steps * batch == pytest.approx(millions * 1e6, abs=batch)
    assert decays_of(made) == [[], [half_life]]
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {dropout}
    assert model.sampler.evaluations(model.process) == evaluations
    assert not made.trainer.gradient_clip_val
    found = optimization([nn.Parameter(torch.zeros(1))], model.make_optimizer, model.make_lr_scheduler, batch)
    scheduler = found["lr_scheduler"]["scheduler"]
    assert isinstance(scheduler, ImageWarmup)
    assert (scheduler.images, scheduler.base_lrs) == (10_000_000, [rate])
    assert type(found["optimizer"]) is torch.optim.Adam
    assert type(made.model.denoiser.network) is (DDPMpp if "cifar10" in recipe else type(made.model.denoiser.network))


def test_churn_is_that_of_edms_own_training(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = instantiate("edm_imagenet64", monkeypatch).model.sampler
    assert (sampler.s_churn, sampler.s_min, sampler.s_max, sampler.s_noise) == (40, 0.05, 50, 1.003)


# Song et al. 2023, table 3 and their code; Song & Dhariwal 2024; Geng et al. 2025: distilled, batch, learning rate,
# steps, averages, dropout, decay of the target, (first, last) or levels, noise levels sampled at.
CONSISTENCY: dict[str, tuple[Any, ...]] = {
    "cd_cifar10": (True, 512, 4e-4, 800_000, [0.9999], 0.0, 0.0, 18, [80]),
    "ct_cifar10": (False, 512, 4e-4, 800_000, [0.9999], 0.0, 0.9, (2, 150), [80]),
    "ict_cifar10": (False, 1024, 1e-4, 400_000, [0.99993], 0.3, 0.0, (10, 1280), [80, 0.821]),
    "ect_cifar10": (False, 128, 1e-4, 200_000, [0.9999], 0.2, 0.0, None, [80, 0.821]),
    "cd_imagenet64": (True, 2048, 8e-6, 600_000, [0.9999432, 0.9999, 0.999], 0.0, 0.95, 40, [80, 1.382]),
    "ct_imagenet64": (False, 2048, 1e-4, 800_000, [0.9999432, 0.9999, 0.999], 0.0, 0.95, (2, 200), [80, 1.913]),
    "cd_lsun_bedroom": (True, 256, 1e-5, 600_000, [0.9999432, 0.99994, 0.9999], 0.0, 0.95, 40, [80, 4.366]),
    "ct_lsun_bedroom": (False, 256, 5e-5, 1_000_000, [0.9999432, 0.99994, 0.9999], 0.0, 0.95, (2, 150), [80, 3.991]),
    "cd_lsun_cat": (True, 256, 1e-5, 600_000, [0.9999432, 0.99994, 0.9999], 0.0, 0.95, 40, [80, 4.366]),
    "ct_lsun_cat": (False, 256, 5e-5, 1_000_000, [0.9999432, 0.99994, 0.9999], 0.0, 0.95, (2, 150), [80, 5.249]),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", CONSISTENCY)
def test_recipes_of_consistency_models_are_the_papers_to_the_number(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilled, batch, rate, steps, decays, dropout, decay, levels, sigmas = CONSISTENCY[recipe]
    made = instantiate(recipe, monkeypatch)
    model: Any = made.model
    objective: Any = model.objective
    pairs = objective.times
    kind: type = type(objective)
    assert kind is (ConsistencyDistillation if distilled else ConsistencyTraining)
    assert (made.datamodule.batch_size, made.trainer.max_steps, decays_of(made)) == (batch, steps, [decays, []])
    optimizer = model.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.RAdam
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"], model.make_lr_scheduler) == (rate, 0, None)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {dropout}
    assert objective.decay == decay
    assert not made.trainer.gradient_clip_val
    if levels is None:
        assert isinstance(pairs, Shrinking)
        assert (pairs.q, pairs.stage_steps, objective.distance.c) == (2, 25_000, 0)
    else:
        assert isinstance(pairs, Neighbors)
        assert isinstance(model.denoiser.parameterization, Boundary)
        curriculum: Any = pairs.curriculum
        assert levels == ((curriculum.first, curriculum.last) if isinstance(levels, tuple) else curriculum.first)
    if isinstance(levels, tuple):
        assert type(curriculum) is (Doubling if recipe == "ict_cifar10" else SquareRoot)
        assert curriculum.steps == steps
    tuned = recipe in ("ict_cifar10", "ect_cifar10")
    distance: object = objective.distance
    assert isinstance(distance, PseudoHuber if tuned else LPIPS)
    assert isinstance(model.sampler, Multistep)
    assert (80 * model.sampler.times(model.process)).tolist() == pytest.approx([*sigmas, 0], rel=4e-4)
    if distilled:
        assert objective.teacher == f"runs/{recipe.replace('cd_', 'edm_')}/checkpoints/last.ckpt"
