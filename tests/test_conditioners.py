"""Conditions that are images: what the network is given of them, and what finished images keep of them."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion_lit.codec import Codec, Pixels, Shape
from diffusion_lit.conditioner import Labels
from diffusion_lit.conditioners import (
    GLIDE,
    Joint,
    LatentDiffusion,
    LowResolution,
    MaskConvention,
    MaskedImage,
    NoiseAugmentation,
    SemanticMap,
    StableDiffusion,
)
from diffusion_lit.data import Digits, Folder, Holes, ImageData, WithMaps
from diffusion_lit.data import LowResolution as LowResolutionOf
from diffusion_lit.diffusion import DDIM, ClassifierFree, DiscreteProcess
from diffusion_lit.images import to_uint8
from diffusion_lit.methods.repaint import Replacement
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet
from diffusion_lit.types import Condition
from tests import forked, tiny


class Halves(Codec):
    """Latents are means of squares of two pixels: half the size."""

    def encode(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images, 2)

    def decode(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents, scale_factor=2, mode="nearest")

    def latent_shape(self, image_shape: Shape) -> Shape:
        return image_shape[0], image_shape[1] // 2, image_shape[2] // 2

    def image_shape(self, latent_shape: Shape) -> Shape:
        return latent_shape[0], 2 * latent_shape[1], 2 * latent_shape[2]


def network(concat: int, size: int = 8, **kwargs: Any) -> ADMUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = ADMUNet(
            image_size=size, in_channels=1, width=16, multipliers=[1, 2], num_blocks=1, attention=[], num_groups=8,
            concat_channels=concat, **kwargs,
        )  # fmt: skip
        nn.init.normal_(cast(nn.Conv2d, made.out[-1]).weight, std=0.05)
        return made


def model(conditioner: Any, concat: int, size: int = 8, **kwargs: Any) -> DiffusionModule:
    options = {name: kwargs.pop(name) for name in ("num_classes", "null_label", "level") if name in kwargs}
    made = {"sampler": DDIM(3), **kwargs}
    return tiny.module(network=network(concat, size, **options), conditioner=conditioner, **made)


def images(count: int = 3, channels: int = 1, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def mask(count: int = 3, size: int = 8) -> Tensor:
    known = torch.ones(count, 1, size, size)
    known[:, :, :4, 4:] = 0
    return known


# Low resolution


def test_low_resolution_is_enlarged_bilinearly_or_given_as_it_is() -> None:
    low = images(size=4)
    [(name, concat)] = LowResolution(2, 1)({"low_res": low}, Pixels()).items()
    assert name == "concat"
    torch.testing.assert_close(concat, F.interpolate(low, (8, 8), mode="bilinear"))
    assert torch.equal(LowResolution(1, 1)({"low_res": low}, Pixels())["concat"], low)


def test_noise_of_low_resolution_is_that_of_the_process_and_its_time_is_told() -> None:
    augmentation = NoiseAugmentation(most=0.8, level=0.3)
    part = LowResolution(2, 1, augmentation).eval()
    low, noise = images(size=4), torch.randn(3, 1, 4, 4)
    given = part.vary({"low_res": low}, lambda shape: noise.reshape(3, *shape))
    concat = part(given, Pixels())["concat"]
    alpha, sigma = DiscreteProcess().alpha_sigma(torch.tensor(0.3))
    expected = F.interpolate((alpha * low + sigma * noise).float(), (8, 8), mode="bilinear")
    torch.testing.assert_close(concat[:, :1], expected)
    torch.testing.assert_close(concat[:, 1:], torch.full((3, 1, 8, 8), 0.3))
    with pytest.raises(ValueError, match="its noise is drawn with that of the images, and here there is none"):
        part({"low_res": low}, Pixels())
    untold = LowResolution(2, 1, NoiseAugmentation(time_input=None)).eval()
    assert untold(untold.vary({"low_res": low}, lambda shape: noise), Pixels())["concat"].shape == (3, 1, 8, 8)


def test_the_time_of_the_noise_may_have_an_embedding_of_its_own() -> None:
    part = LowResolution(2, 1, NoiseAugmentation(most=0.8, level=0.3, time_input="embedding"), dropout=0.5).eval()
    noise = torch.randn(3, 1, 4, 4)
    condition = part(part.vary({"low_res": images(size=4)}, lambda shape: noise), Pixels())
    assert condition["concat"].shape == (3, 1, 8, 8)
    # 300 steps of 1000, which the network counts from 0.
    assert condition["level"].tolist() == [299.0] * 3
    null = part.null(condition)
    assert not null["concat"].any()
    assert torch.equal(null["level"], condition["level"])
    net = network(1, level=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert sum(p.numel() for p in net.level_embed.parameters()) == 16 * 64 + 64 + 64 * 64 + 64
    x, time = images(), torch.full((3,), 5.0)
    near, far = (net(x, time, {**condition, "level": torch.full((3,), level)}) for level in (0.0, 500.0))
    assert not torch.allclose(near, far)
    with pytest.raises(ValueError, match=r"no level given to a network that needs it, \(3\)"):
        net(x, time, {"concat": condition["concat"]})


def test_a_cascade_with_an_embedded_time_trains_and_is_guided(tmp_path: Path) -> None:
    part = LowResolution(2, 1, NoiseAugmentation(level=0.4, time_input="embedding"), dropout=0.1)
    made = model(part, 1, level=True, guidance=ClassifierFree(1.0))
    tiny.trainer(tmp_path, 2).fit(made, ImageData(LowResolutionOf(Digits(), 2), batch_size=16))
    given = {"low_res": images(4, size=4)}
    four = made.sample(range(4), seed=5, condition=given)
    torch.testing.assert_close(made.sample([2], seed=5, condition={"low_res": given["low_res"][2:3]}), four[2:3])
    with pytest.raises(ValueError, match=r"does not embed the time of the noise; .* --model\.network\.level true"):
        model(LowResolution(2, 1, NoiseAugmentation(time_input="embedding")), 1)


def test_times_of_the_noise_are_uniform_in_training() -> None:
    part = LowResolution(1, 1, NoiseAugmentation(most=0.6)).train()
    times = part({"low_res": torch.zeros(20_000, 1, 1, 1)}, Pixels())["concat"][:, 1].flatten()
    assert 0 <= float(times.min()) < 0.001
    assert 0.599 < float(times.max()) <= 0.6
    assert float(times.mean()) == pytest.approx(0.3, abs=0.006)


def test_no_noise_at_time_zero() -> None:
    part = LowResolution(1, 1, NoiseAugmentation(level=0.0)).eval()
    low = images(size=4)
    given = part.vary({"low_res": low}, lambda shape: torch.randn(3, *shape))
    torch.testing.assert_close(part(given, Pixels())["concat"][:, :1], low)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseAugmentation(level=0.7), r"0 <= level=0\.7 <= most=0\.5 <= 1"),
        (lambda: NoiseAugmentation(most=1.5), r"most=1\.5 <= 1"),
        (lambda: LowResolution(0), r"factor=0 .* must be at least 1"),
        (lambda: SemanticMap(0), "num_classes=0"),
        (lambda: MaskedImage(dropout=1.0), r"dropout=1\.0 must lie in \[0, 1\)"),
        (lambda: Joint([]), "there are none"),
        (lambda: Joint([LowResolution(), MaskedImage()]), "two make concat; leave one of them out"),
        (lambda: model(LowResolution(2, 1), 0), r"ADMUNet does not take; .* set --model\.network\.concat_channels"),
        (lambda: LowResolution(2, 3)({"low_res": images(size=4)}, Pixels()), r"1 channels, and the conditioner has 3"),
        (lambda: LowResolution(2, 3)({}, Pixels()), "LowResolution needs low_res, which was not given"),
        (
            lambda: MaskedImage()({"image": images(), "mask": mask(size=16)}, Pixels()),
            r"mask: shape \(3, 1, 16, 16\) for images of \(3, 1, 8, 8\)",
        ),
        (
            lambda: SemanticMap(5).eval()({"map": torch.full((1, 1, 8, 8), 5)}, Pixels()),
            "map: class 5, and the model has 5, from 0 to 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "\n" not in str(refusal.value)


# Maps


def test_the_rescaler_of_maps_has_the_published_parameters_and_is_linear_in_the_one_hot_map() -> None:
    part = SemanticMap(182)
    assert sum(p.numel() for p in part.parameters()) == 546
    values = torch.randint(0, 182, (2, 1, 16, 16), dtype=torch.uint8)
    one_hot = F.one_hot(values[:, 0].long(), 182).permute(0, 3, 1, 2).float()
    means = F.avg_pool2d(one_hot, 2)  # bilinear by a half is the mean of two by two
    means = F.avg_pool2d(means, 2)
    expected = torch.einsum("oc,bchw->bohw", part.channel_mapper.weight[:, :, 0, 0], means)
    torch.testing.assert_close(part({"map": values}, Pixels())["concat"], expected)


def test_maps_with_classes_beyond_the_model_s_are_refused_before_training(tmp_path: Path) -> None:
    maps = WithMaps(Folder(str(tmp_path), 8, 1), str(tmp_path), num_classes=7)
    data = ImageData(Holes(maps))
    with pytest.raises(ValueError, match=r"conditioner\.num_classes=5, and the data's maps have 7 classes; set"):
        tiny.trainer(tmp_path / "run").fit(model(SemanticMap(5, 0), 3), data)
    SemanticMap(7).start(data, torch.device("cpu"))


def test_the_weights_of_a_conditioner_are_trained_and_averaged(tmp_path: Path) -> None:
    data = ImageData(Digits(), batch_size=32)
    made = model(SemanticMap(2, halvings=0, channels=2), 2)
    before = made.conditioner.channel_mapper.weight.clone()  # type: ignore[union-attr, operator]

    def with_map(batch: Any, index: int) -> Any:
        ready = ImageData.on_after_batch_transfer(data, batch, index)
        return {**ready, "map": (ready["image"] > 0).long()}

    data.on_after_batch_transfer = with_map  # type: ignore[method-assign, assignment]
    tiny.trainer(tmp_path, 3).fit(made, data)
    checkpoint = tiny.load(tiny.last(tmp_path))
    name = "conditioner.channel_mapper.weight"
    raw, averaged = checkpoint["current_model_state"][name], checkpoint["state_dict"][name]
    assert not torch.equal(raw, before)
    assert not torch.equal(raw, averaged)


# Holes


@pytest.mark.parametrize(
    ("convention", "mask_channel", "hole", "known", "fill"),
    [
        (LatentDiffusion(), 1, 1.0, -1.0, -1.0),
        (StableDiffusion(), 0, 1.0, 0.0, 0.0),
        (GLIDE(), 1, 0.0, 1.0, 0.0),
        (MaskConvention(hole=2.0, known=3.0, fill=0.5, mask_first=True), 0, 2.0, 3.0, 0.5),
    ],
)
def test_published_conventions(
    convention: MaskConvention, mask_channel: int, hole: float, known: float, fill: float
) -> None:
    """The values that each published program gives its network, for one pixel in a hole and one that is known."""
    image, given = images(), mask()
    concat = MaskedImage(convention)({"image": image, "mask": given}, Pixels())["concat"]
    told, picture = concat[:, mask_channel], concat[:, 1 - mask_channel]
    assert set(told[given[:, 0] == 0].tolist()) == {hole}
    assert set(told[given[:, 0] == 1].tolist()) == {known}
    assert set(picture[given[:, 0] == 0].tolist()) == {fill}
    assert torch.equal(picture[given[:, 0] == 1], image[:, 0][given[:, 0] == 1])


def test_in_latents_the_masked_image_is_encoded_and_the_mask_is_reduced() -> None:
    image, given = images(), mask()
    concat = MaskedImage(LatentDiffusion())({"image": image, "mask": given}, Halves())["concat"]
    black = torch.where(given > 0.5, image, torch.full_like(image, -1))
    torch.testing.assert_close(concat[:, :1], F.avg_pool2d(black, 2))
    assert torch.equal(concat[:, 1:], 1 - 2 * given[:, :, ::2, ::2])


@pytest.mark.parametrize(("codec", "size"), [(Pixels(), 8), (Halves(), 4)])
def test_known_pixels_come_back_exactly_in_eight_bits_and_holes_are_filled(codec: Codec, size: int) -> None:
    made = model(MaskedImage(), 2, size, codec=codec, sampler=DDIM(3, clip=False))
    levels = torch.randint(0, 256, (3, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    image, given = levels.float() / 127.5 - 1, mask()
    found = to_uint8(made.sample(range(3), condition={"image": image, "mask": given}))
    assert torch.equal(found[given > 0.5], levels[given > 0.5])
    assert not torch.equal(found[given < 0.5], levels[given < 0.5])


# Together


def test_conditioners_together_make_all_inputs_and_their_null() -> None:
    part = Joint([Labels(dropout=0.5), LowResolution(2, 1, dropout=0.5)]).eval()
    condition: Condition = part({"label": torch.tensor([3, 4]), "low_res": images(2, size=4)}, Pixels())
    assert set(condition) == {"label", "concat"}
    null = part.null(condition)
    assert null["label"].tolist() == [-1, -1]
    assert not null["concat"].any()
    made = model(part, 1, num_classes=10, null_label=True, guidance=ClassifierFree(1.0))
    assert made.entries == ("low_res",)
    assert made.shape_of("low_res") == (1, 4, 4)
    assert made.shape_of("image") == (1, 8, 8)
    given = {"label": torch.tensor([3, 4]), "low_res": images(2, size=4)}
    assert made.sample([0, 1], condition=given).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="makes no unconditional predictions"):
        model(Joint([Labels(), LowResolution(2, 1)]), 1, num_classes=10, guidance=ClassifierFree())


def test_guidance_leaves_what_training_never_dropped() -> None:
    """Here the image; or the label, where the network has none for no class."""
    low = images(2, size=4)
    part = Joint([Labels(0.1), LowResolution(2, 1)])
    model(part, 1, num_classes=10, null_label=True, guidance=ClassifierFree(1.0))
    condition: Condition = part.eval()({"label": torch.tensor([3, 4]), "low_res": low}, Pixels())
    null = part.null(condition)
    assert null["label"].tolist() == [-1, -1]
    assert torch.equal(null["concat"], condition["concat"])
    part = Joint([Labels(), LowResolution(2, 1, dropout=0.5)])
    made = model(part, 1, num_classes=10, guidance=ClassifierFree(1.0))
    null = part.null(condition)
    assert null["label"].tolist() == [3, 4]
    assert not null["concat"].any()
    given = {"label": torch.tensor([3, 4]), "low_res": low}
    assert made.sample([0, 1], condition=given).shape == (2, 1, 8, 8)


def test_dropped_conditions_are_zero_in_training_alone() -> None:
    part = LowResolution(1, 1, dropout=0.3)
    low = torch.ones(5000, 1, 1, 1)
    assert float(part.train()({"low_res": low}, Pixels())["concat"].mean()) == pytest.approx(0.7, abs=0.03)
    assert torch.equal(part.eval()({"low_res": low}, Pixels())["concat"], low)


# Image i depends on the seed, i and its condition

TASKS: dict[str, tuple[Any, int, Any]] = {
    "low resolution": (lambda: LowResolution(2, 1), 1, LowResolutionOf(Digits(), 2)),
    "noised low resolution": (
        lambda: LowResolution(2, 1, NoiseAugmentation(level=0.4)),
        2,
        LowResolutionOf(Digits(), 2),
    ),
    "holes": (lambda: MaskedImage(), 2, Holes(Digits())),
}


@pytest.mark.parametrize("task", TASKS)
def test_an_image_depends_on_the_seed_its_number_and_its_condition_alone(task: str) -> None:
    make, concat, source = TASKS[task]
    made, data = model(make(), concat), ImageData(source)
    given = made.conditions(data)(torch.arange(6))
    six = made.sample(range(6), seed=5, condition=given)
    some = [4, 1]
    two = made.sample(some, seed=5, condition={name: value[some] for name, value in given.items()})
    torch.testing.assert_close(two, six[some], atol=1e-5, rtol=0)
    other = made.sample(range(6), seed=6, condition=given)
    assert not torch.allclose(six, other)
    turned = made.sample(range(6), seed=5, condition={name: value.roll(1, 0) for name, value in given.items()})
    assert not torch.allclose(six, turned)


@pytest.mark.few(1)
@pytest.mark.parametrize("task", TASKS)
def test_a_resumed_run_is_bit_exact(task: str, tmp_path: Path) -> None:
    make, concat, source = TASKS[task]
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            data = ImageData(source, batch_size=16)
            tiny.trainer(tmp_path / name, stop).fit(model(make(), concat), data, ckpt_path="last")
    a, b = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "parts"))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states"):
        assert tiny.identical(a[name], b[name])


def generate(place: Path, **kwargs: Any) -> None:
    """Six images of every task, and of an editing method, in batches of two, from the examples of the data."""
    for task, (make, concat, source) in TASKS.items():
        trainer = tiny.trainer(place, 1, [], logger=False, **kwargs)
        out = str(place / task)
        trainer.predict(model(make(), concat), ImageData(source), num_images=6, batch_size=2, seed=5, out=out)
    trainer = tiny.trainer(place, 1, [], logger=False, **kwargs)
    data, out = ImageData(Holes(Digits())), str(place / "edit")
    trainer.predict(tiny.module(), data, num_images=6, batch_size=2, out=out, edit=Replacement(2))


@pytest.mark.further
def test_two_processes_write_the_files_of_one(tmp_path: Path) -> None:
    """The sampler's own noise, that of the condition and that of replacement come from the image's number."""
    for name, call in (
        ("one", lambda: generate(tmp_path / "one")),
        ("two", lambda: forked.in_two(lambda: generate(tmp_path / "two", devices=2, strategy="ddp"))),
    ):
        (tmp_path / name).mkdir()
        child = forked.fork(call, tmp_path / f"{name}.txt")
        assert forked.wait(child) == 0, (tmp_path / f"{name}.txt").read_text()[-3000:]
    for task in (*TASKS, "edit"):
        one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / task).glob("*.png")} for n in ("one", "two"))
        assert len(one) == 6
        assert one == two
