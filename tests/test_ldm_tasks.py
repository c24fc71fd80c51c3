"""Conditional tasks of latent diffusion: recipes by their published numbers, and known pixels through a first stage."""

from pathlib import Path

import pytest
import torch

from diffusion_lit.codecs import FirstStage
from diffusion_lit.conditioners import MaskedImage
from diffusion_lit.diffusion import DDIM
from diffusion_lit.diffusion.projection import PatchMeans
from diffusion_lit.edit import Edited
from diffusion_lit.images import to_uint8
from diffusion_lit.methods.image_guidance import ImageGuidance
from diffusion_lit.methods.repaint import Replacement
from diffusion_lit.methods.sdedit import SDEdit
from diffusion_lit.networks import ADMUNet
from tests.codecs.first_stages import CODES, digits, latent_model, write
from tests.test_configs import instantiate

# Rombach et al. 2022, tables 12 to 15 and the published files: U-Net, conditioner, batch, largest beta.
PUBLISHED = {
    "ldm_semantic": (215_229_315, 546, 48, 0.0205),
    "ldm_superresolution": (113_622_563, 0, 64, 0.0155),
    "ldm_inpainting": (387_245_827, 0, 128, 0.0205),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_has_the_published_numbers(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unet, conditioner, batch, beta = PUBLISHED[recipe]
    made = instantiate(recipe, monkeypatch)
    model = made.model
    assert sum(p.numel() for p in model.denoiser.network.parameters()) == unet
    assert sum(p.numel() for p in model.conditioner.parameters()) == conditioner
    assert made.datamodule.batch_size == batch
    assert model.process.schedule.betas(1000)[-1] == pytest.approx(beta)
    assert (model.image_shape, model.latent_shape) == ((3, 256, 256), (3, 64, 64))
    if recipe == "ldm_superresolution":
        assert model.shape_of("low_res") == (3, 64, 64)


@pytest.mark.parametrize("codes", [None, CODES])
@pytest.mark.parametrize("way", ["trained for it", "replacement"])
def test_known_pixels_are_equal_in_eight_bits_through_a_first_stage(
    codes: int | None, way: str, tmp_path: Path
) -> None:
    codec = FirstStage(str(write(tmp_path / "stage.ckpt", codes)), scale=1.0)
    levels = to_uint8(digits(3))
    known = torch.ones(3, 1, 8, 8)
    known[:, :, :4, 4:] = 0
    condition = {"image": digits(3), "mask": known}
    if way == "trained for it":
        network = ADMUNet(
            4, 2, width=8, multipliers=[1, 2], num_blocks=1, attention=[], num_groups=4, concat_channels=3
        )
        found = latent_model(codec, network=network, conditioner=MaskedImage()).sample(range(3), condition=condition)
    else:
        found = Edited(latent_model(codec), Replacement()).sample(range(3), condition=condition)
    assert torch.equal(to_uint8(found)[known == 1], levels[known == 1])
    assert not torch.equal(to_uint8(found)[known == 0], levels[known == 0])


def test_editing_works_in_latents_and_guidance_reaches_the_network_through_the_decoder(tmp_path: Path) -> None:
    model = latent_model(FirstStage(str(write(tmp_path / "stage.ckpt")), scale=1.0), sampler=DDIM(10, clip=False))
    image = digits(3)
    late = Edited(model, SDEdit(0.02)).sample(range(3), condition={"image": image})
    kept = model.codec.decode(model.codec.encode(image))
    assert float((late - kept).abs().mean()) < 0.5 * float((model.sample(range(3), condition={}) - kept).abs().mean())
    known = PatchMeans(4)
    errors = [
        float((known.projection({})(made - image)).abs().mean())
        for made in (
            Edited(model, ImageGuidance(known, scale)).sample(range(3), condition={"image": image})
            for scale in (0.0, 1.0)
        )
    ]
    assert errors[1] < errors[0]
