"""Editing without training, against Gaussian data, whose conditional distributions are known in closed form."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_lit.codec import Codec, Pixels
from diffusion_lit.diffusion import DDIM, Ancestral, DiscreteProcess, DPMSolver, Heun, Linear
from diffusion_lit.diffusion.projection import KnownPixels, Luminance, PatchMeans
from diffusion_lit.edit import Edit, Edited
from diffusion_lit.images import to_uint8
from diffusion_lit.methods.image_guidance import ImageGuidance
from diffusion_lit.methods.projected import Projected
from diffusion_lit.methods.repaint import Replacement, known_latents
from diffusion_lit.methods.sdedit import SDEdit
from diffusion_lit.module import DiffusionModule
from diffusion_lit.types import Condition, Network
from tests.diffusion.gaussian import Array, GaussianData, alpha_bars, linear_betas
from tests.test_conditioners import Halves

STEPS = 100


class Optimal(Network):
    """Predicts the noise in Gaussian data as well as can be.

    Args:
        data: Of images of `size` by `size` pixels and one channel, each channel alike.
        channels: Of the images.
    """

    def __init__(self, data: GaussianData, size: int, channels: int = 1) -> None:
        super().__init__()
        self.data = data
        self.image_size = size
        self.in_channels = channels
        self.place = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        k = time.round().long() + 1
        planes = x.double().flatten(0, 1)[:, None]
        x0 = self.data.posterior_mean(planes, k.repeat_interleave(x.shape[1])).reshape(x.shape)
        bar = torch.from_numpy(self.data.alpha_bar)[k].reshape(-1, 1, 1, 1)
        return ((x - bar.sqrt() * x0) / (1 - bar).sqrt()).float()


def gaussian(size: int = 2, correlation: float = 0.8, channels: int = 1, **kwargs: Any) -> DiffusionModule:
    """A perfect model of images whose pixels have variance 0.25 and are all correlated alike."""
    covariance: Array = 0.25 * (correlation + (1 - correlation) * np.eye(size**2))
    data = GaussianData(np.full(size**2, 0.1), covariance, alpha_bars(linear_betas(STEPS, 1e-3, 0.2)))
    process = DiscreteProcess(STEPS, Linear(1e-3, 0.2))
    parts = {"process": process, "sampler": Ancestral(STEPS, clip=False), **kwargs}
    return DiffusionModule(Optimal(data, size, channels), **parts)


def halves(count: int, size: int = 2) -> Tensor:
    """A mask of which the left half is known."""
    mask = torch.zeros(count, 1, size, size)
    mask[:, :, :, : size // 2] = 1
    return mask


def sample(model: DiffusionModule, edit: Edit, count: int, **condition: Tensor) -> Tensor:
    return Edited(model, edit).sample(range(count), seed=1, condition=condition)


# Replacement


def test_repeated_replacement_fills_holes_as_the_conditional_distribution_says() -> None:
    """Two of four pixels are 0.9: the others then have a mean of 0.1 + 0.8 (1.6 / 1.8) = 0.811.

    With correlation r and n known pixels at a, the mean is m + n r (a - m) / (1 + (n - 1) r).
    """
    model, count = gaussian(), 600
    image = torch.full((count, 1, 2, 2), 0.9)
    expected = 0.1 + 2 * 0.8 * 0.8 / 1.8
    means = []
    for repeats in (1, 8):
        found = sample(model, Replacement(repeats), count, image=image, mask=halves(count))
        assert torch.equal(found[:, :, :, 0], image[:, :, :, 0])
        means.append(float(found[:, :, :, 1].mean()))
    # One pass is known to agree less with what is known: why the paper repeats.
    assert 0.1 < means[0] < means[1]
    assert means[1] == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("codec", [Pixels(), Halves()])
@pytest.mark.parametrize("sampler", [DDIM(7), Ancestral(7), Heun(7), DPMSolver(7)])
def test_known_pixels_are_equal_in_eight_bits(codec: Codec, sampler: Any) -> None:
    sampler.clip = False
    model = gaussian(4, codec=codec, sampler=sampler)
    size = model.image_shape[1]
    levels = torch.randint(0, 256, (5, 1, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mask = halves(5, size)
    found = to_uint8(sample(model, Replacement(), 5, image=levels.float() / 127.5 - 1, mask=mask))
    assert torch.equal(found[mask == 1], levels[mask == 1])
    assert not torch.equal(found[mask == 0], levels[mask == 0])


def test_latents_are_known_where_all_their_pixels_are() -> None:
    known = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    known[0, 0, 0, 3] = False
    assert known_latents(known, torch.zeros(1, 3, 2, 2)).tolist() == [[[[True, False], [True, True]]]]


def test_repeated_steps_are_counted_and_need_a_sampler_of_single_steps() -> None:
    model = gaussian()
    assert Replacement(3).evaluations(model, DDIM(10)) == 28
    assert Edited(model, Replacement(3)).evaluations(DDIM(10)) == 28
    assert Replacement().evaluations(model, Heun(10)) == Heun(10).evaluations(model.process)
    for sampler in (Heun(5, clip=False), DPMSolver(5, clip=False)):
        edited = Edited(gaussian(sampler=sampler), Replacement(2))
        with pytest.raises(
            ValueError, match=r"edit\.repeats=2: \w+ does not repeat single steps; set --model\.sampler"
        ):
            edited.sample([0], condition={"image": torch.zeros(1, 1, 2, 2), "mask": halves(1)})


# Part-way


def test_a_late_start_keeps_the_image_and_an_early_one_forgets_it() -> None:
    """Between the two, the correlation with the image falls as more noise is added."""
    model, count = gaussian(), 400
    image = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 0.5
    kept = []
    for start in (0.01, 0.2, 0.5, 1.0):
        found = sample(model, SDEdit(start), count, image=image).flatten()
        kept.append(float(torch.corrcoef(torch.stack([found, image.flatten()]))[0, 1]))
    assert kept[0] > 0.95
    assert kept == sorted(kept, reverse=True)
    assert abs(kept[-1]) < 0.1
    late = sample(model, SDEdit(0.01), count, image=image)
    assert float((late - image).abs().mean()) < 0.05


def test_evaluations_of_a_late_start_are_its_part_of_the_grid() -> None:
    model = gaussian()
    assert Edited(model, SDEdit(0.3)).evaluations(DDIM(100)) == 30
    # The grid has 0.01, 0.11, .. 0.91.
    assert Edited(model, SDEdit(0.5)).evaluations(DDIM(10)) == 6


# What is known


@pytest.mark.parametrize(("known", "channels"), [(Luminance(), 3), (PatchMeans(2), 1), (KnownPixels(), 1)])
def test_what_is_known_of_the_image_is_known_of_the_result(known: Any, channels: int) -> None:
    model = gaussian(4, channels=channels, sampler=DDIM(20, clip=False))
    image = torch.rand(6, channels, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    given = {"image": image, "mask": halves(6, 4)}
    found = sample(model, Projected(known), 6, **given)
    project = known.projection(given)
    torch.testing.assert_close(project(found), project(image), atol=1e-5, rtol=0)
    assert float((found - image).abs().mean()) > 0.02


@pytest.mark.parametrize("codec", [Pixels(), Halves()])
def test_guidance_brings_what_is_known_nearer_and_none_changes_nothing(codec: Codec) -> None:
    model = gaussian(4, codec=codec, sampler=DDIM(30, clip=False))
    size = model.image_shape[1]
    image = torch.full((8, 1, size, size), -0.8)
    errors = []
    for scale in (0.0, 0.03, 0.1, 3.0):
        found = sample(model, ImageGuidance(PatchMeans(4), scale), 8, image=image)
        errors.append(float((PatchMeans(4).projection({})(found) - image).abs().mean()))
        if scale == 0:
            torch.testing.assert_close(found, model.sample(range(8), seed=1, condition={}), atol=1e-5, rtol=0)
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 0.2 * errors[0]


def test_guidance_is_the_gradient_of_half_the_squared_error() -> None:
    model = gaussian(4, codec=Halves(), sampler=DDIM(5, clip=False))
    edit, known = ImageGuidance(PatchMeans(4), 0.7), PatchMeans(4).projection({})
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(1, 1, 4, 4, generator=generator), torch.randn(1, 1, 8, 8, generator=generator)
    t = torch.tensor(0.4, dtype=torch.float64)
    denoise = model.bind({})
    guided = edit.guide(denoise, model, known, known(y))(x, t)

    def energy(at: Tensor) -> float:
        with torch.no_grad():
            error = known(model.codec.decode(denoise(at, t).x0)) - known(y)
        return float(error.double().square().sum() / 2)

    step = 1e-2 * torch.eye(16).reshape(16, 1, 4, 4)
    numeric = torch.tensor([(energy(x + one) - energy(x - one)) / 2e-2 for one in step]).reshape(1, 1, 4, 4)
    alpha, sigma = model.process.alpha_sigma(t)
    plain = denoise(x, t)
    torch.testing.assert_close((guided.eps - plain.eps) / (0.7 * float(sigma)), numeric, atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(float(alpha) * guided.x0 + float(sigma) * guided.eps, x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("edit", [Replacement(2), SDEdit(0.5), Projected(KnownPixels()), ImageGuidance(KnownPixels())])
def test_an_image_depends_on_the_seed_its_number_and_its_condition_alone(edit: Edit) -> None:
    edited = Edited(gaussian(4, sampler=Ancestral(10, clip=False)), edit)
    given = {"image": torch.rand(6, 1, 4, 4) - 0.5, "mask": halves(6, 4)}
    six = edited.sample(range(6), seed=5, condition=given)
    two = edited.sample([4, 1], seed=5, condition={name: value[[4, 1]] for name, value in given.items()})
    torch.testing.assert_close(two, six[[4, 1]], atol=1e-5, rtol=0)
    assert not torch.allclose(six, edited.sample(range(6), seed=6, condition=given))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Replacement(0), r"edit\.repeats=0 must be at least 1"),
        (lambda: SDEdit(0), r"edit\.start=0 must lie in \(0, 1\]"),
        (lambda: SDEdit(1.5), r"edit\.start=1\.5"),
        (lambda: PatchMeans(0), r"known\.size=0"),
        (lambda: Edited(gaussian(), Projected()), "luminance is that of 3 channels, and the model's images have 1"),
        (lambda: Edited(gaussian(), ImageGuidance(PatchMeans(3))), r"known\.size=3 does not divide"),
        (
            lambda: Edited(gaussian(2, codec=Halves()), Projected(PatchMeans(2))),
            "Projected works on pixels, and the model has Halves; set --edit ImageGuidance",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
