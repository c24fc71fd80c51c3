"""The recipes of latent diffusion say what the paper and its code say, to the number."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lit.conditioners import ClassContext
from diffusion_lit.diffusion import DDIM, ClassifierFree
from diffusion_lit.networks import DiagonalGaussian, VectorQuantizer
from diffusion_lit.trainer import Trainer
from tests.test_configs import callbacks_of, instantiate, rates

# Rombach et al. 2022, tables 12 and 13, and the configurations of its code: parameters of the U-Net, latents, codes,
# batch, learning rate, steps, last beta, error, steps and eta of DDIM.
PAPER = {
    "ldm_celebahq": (274_056_163, (3, 64, 64), 8192, 48, 9.6e-5, 410_000, 0.0195, "squared", 200, 0.0),
    "ldm_ffhq": (274_056_163, (3, 64, 64), 8192, 42, 8.4e-5, 635_000, 0.0195, "squared", 200, 1.0),
    "ldm_bedroom": (274_056_163, (3, 64, 64), 8192, 48, 9.6e-5, 1_900_000, 0.0195, "squared", 200, 1.0),
    "ldm_church": (294_966_916, (4, 32, 32), None, 96, 5e-5, 500_000, 0.0155, "absolute", 200, 0.0),
    "ldm_imagenet_f8": (394_984_196, (4, 32, 32), 16_384, 64, 6.4e-5, 4_800_000, 0.0195, "squared", 200, 0.0),
    "ldm_imagenet_f4": (400_920_579, (3, 64, 64), 8192, 1200, 1e-4, 178_000, 0.0195, "squared", 250, 0.0),
}
STAGES = {"ldm_church": 83_653_863, "ldm_imagenet_f8": 67_717_295}
"""Parameters of the first stage where it is not vq_f4's 55,322,782."""
LAST_ALPHA_BAR = {0.0195: 1.42304e-4, 0.0155: 6.68665e-4, 0.0205: 9.69109e-5}


@pytest.mark.few(3)
@pytest.mark.parametrize("recipe", PAPER)
def test_a_recipe_of_latent_diffusion_is_the_paper_s(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, latents, codes, batch, rate, steps, last_beta, error, sampling, eta = PAPER[recipe]
    made = instantiate(recipe, monkeypatch)
    model: Any = made.model
    assert sum(p.numel() for p in model.denoiser.network.parameters()) == parameters
    assert model.latent_shape == latents
    assert model.image_shape == made.datamodule.image_shape == (3, 256, 256)
    stage = model.codec.network
    assert sum(p.numel() for p in stage.parameters()) == STAGES.get(recipe, 55_322_782)
    assert isinstance(stage.regularizer, DiagonalGaussian if codes is None else VectorQuantizer)
    assert stage.regularizer.num_codes == codes
    # Of a VQ model 1, else found when the run starts.
    assert model.codec.scale.isnan().all() if codes is None else model.codec.scale.eq(1).all()
    assert (made.datamodule.batch_size, cast(Trainer, made.trainer).max_steps) == (batch, steps)
    assert not cast(Trainer, made.trainer).clip_norm
    assert model.make_optimizer([nn.Parameter(torch.zeros(1))]).defaults["lr"] == pytest.approx(rate)
    assert type(model.sampler) is DDIM
    assert (model.sampler.steps, model.sampler.eta, model.sampler.clip) == (sampling, eta, False)
    assert model.objective.error == error
    optimizer = model.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["weight_decay"] == 0.01
    [ema] = [c for c in callbacks_of(made) if type(c).__name__ == "EMA"]
    assert (ema.decays, ema.warmup) == ([0.9999], True)
    alpha, _ = model.process.alpha_sigma(torch.tensor([1.0], dtype=torch.float64))
    assert (alpha**2).item() == pytest.approx(LAST_ALPHA_BAR[last_beta], rel=1e-5)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} <= {0.0}


@pytest.mark.further
def test_the_churches_warm_up_over_10_000_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rates(instantiate("ldm_church", monkeypatch).model, [0, 4999, 9999, 10_050])
    assert found == pytest.approx([5e-9, 2.5e-5, 5e-5, 5e-5])


@pytest.mark.few(1)
@pytest.mark.parametrize(("recipe", "parameters"), [("ldm_imagenet_f8", 512_000), ("ldm_imagenet_f4", 512_512)])
def test_the_recipes_by_class_have_the_published_embeddings(
    recipe: str, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = instantiate(recipe, monkeypatch).model
    assert isinstance(model.conditioner, ClassContext)
    assert sum(p.numel() for p in model.conditioner.parameters()) == parameters
    assert model.num_classes == 1000
    if recipe == "ldm_imagenet_f4":
        # s = 1.5 of the paper is w = 0.5 here.
        assert isinstance(model.guidance, ClassifierFree)
        assert model.guidance.scale == 0.5


def operations(run: Callable[[], Tensor], trains: bool = True) -> int:
    """Floating-point operations of convolutions and products, forwards and, where it trains, backwards."""
    with FlopCounterMode(display=False) as counter:
        out = run()
        if trains:
            torch.autograd.backward(out.square().sum())
    return int(counter.get_total_flops())


@pytest.mark.further
def test_the_pixel_model_of_the_demo_is_trained_with_as_many_operations_as_both_stages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stages = ("latent_demo_autoencoder", "latent_demo", "latent_demo_pixels")
    first, second, pixels = (instantiate(recipe, monkeypatch) for recipe in stages)
    images, t = torch.randn(1, 3, 32, 32), torch.full((1,), 0.5)
    autoencoder = operations(lambda: first.model.network(images).images)
    encoder = operations(lambda: first.model.network.moments(images), trains=False)
    latents = operations(lambda: second.model.denoiser.network(torch.randn(1, 4, 8, 8), t, {}))
    alone = operations(lambda: pixels.model.denoiser.network(images, t, {}))
    trained = [made.trainer.max_steps * made.datamodule.batch_size for made in (first, second, pixels)]
    assert trained[2] * alone == pytest.approx(trained[0] * autoencoder + trained[1] * (encoder + latents), rel=0.01)
