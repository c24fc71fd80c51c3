"""The latents of a trained autoencoder: their scale, chance in them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.codecs import FirstStage, first_stage
from diffusion_lit.configuration import Untrusted
from diffusion_lit.diffusion import DDIM, GradientGuidance, LogLikelihood
from diffusion_lit.records import describe
from tests import tiny
from tests.codecs.first_stages import CODES, autoencoder, digits, latent_model, unet, write

CPU = torch.device("cpu")


@pytest.fixture
def kl(tmp_path: Path) -> str:
    return str(write(tmp_path / "kl.ckpt"))


@pytest.fixture
def vq(tmp_path: Path) -> str:
    return str(write(tmp_path / "vq.ckpt", CODES))


def started(path: str, **options: Any) -> FirstStage:
    codec = FirstStage(path, **options)
    codec.start(tiny.data(), CPU)
    return codec


def draws(codec: FirstStage, images: Tensor, count: int = 400) -> Tensor:
    return torch.stack([codec.latents({"image": images}) for _ in range(count)])


# The scale


def test_one_scale_gives_all_training_latents_deviation_1_and_leaves_their_means(kl: str) -> None:
    codec = started(kl, num_images=1000)
    latents = codec.latents({"image": digits(1500)})
    assert latents.std().item() == pytest.approx(1, abs=0.02)
    assert abs(latents.mean((0, 2, 3))).min() > 0.05
    assert codec.shift.tolist() == [0, 0]
    assert len(set(codec.scale.tolist())) == 1


def test_the_scale_is_the_unbiased_deviation_of_samples_not_of_means(kl: str) -> None:
    codec = started(kl, num_images=1797)
    network = autoencoder().eval()
    mean, log_variance = network.moments(digits(1797)).double().chunk(2, dim=1)
    total = mean.var() + log_variance.exp().mean()
    assert 1 / codec.scale[0].item() == pytest.approx(total.sqrt().item(), rel=5e-3)
    assert 1 / codec.scale[0].item() > 1.05 * mean.std().item()


def test_per_channel_every_channel_gets_mean_0_and_deviation_1(kl: str) -> None:
    latents = started(kl, per_channel=True, num_images=1797).latents({"image": digits(1797)})
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), atol=0.02, rtol=0)


def test_the_scale_depends_on_nothing_but_images_and_leaves_randomness_alone(kl: str) -> None:
    torch.manual_seed(1)
    first = started(kl, num_images=100)  # Reading the network draws nothing either.
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    codec = FirstStage(kl, num_images=100)
    codec.start(tiny.data(batch_size=7, seed=5), CPU)
    assert torch.equal(codec.scale, first.scale)
    assert not torch.equal(started(kl, num_images=50).scale, first.scale)


def test_latents_that_are_mostly_noise_give_a_warning(tmp_path: Path) -> None:
    path = write(tmp_path / "noisy.ckpt")
    content = tiny.load(path)
    content["state_dict"]["network.quant_conv.bias"][2:] = 3.0
    torch.save(content, path)
    with pytest.warns(UserWarning, match=r"9\d % of the variance of the latents is noise of the posterior"):
        started(str(path))


def test_vq_latents_are_not_scaled_and_not_quantised_until_they_are_decoded(vq: str) -> None:
    codec, network, images = started(vq), autoencoder(CODES).eval(), digits()
    z = codec.latents({"image": images})
    assert torch.equal(z, network.moments(images))
    distances = torch.cdist(z.movedim(1, -1).reshape(-1, 2), network.quantize.get_parameter("embedding.weight"))
    assert distances.amin(1).max() > 0.01
    quantised = network.quantize.get_parameter("embedding.weight")[distances.argmin(1)].reshape(16, 4, 4, 2)
    expected = network.decoder(network.post_quant_conv(quantised.movedim(-1, 1)))
    torch.testing.assert_close(codec.decode(z), expected)


@pytest.mark.parametrize("scale", [0.18215, [0.5, 2.0]])
def test_a_scale_that_is_given_is_kept(kl: str, scale: Any) -> None:
    codec = started(kl, scale=scale, shift=0.25)
    plain = FirstStage(kl, scale=1.0)
    expected = torch.tensor(scale).view(1, -1, 1, 1) * (plain.encode(digits()) - 0.25)
    torch.testing.assert_close(codec.encode(digits()), expected)
    torch.testing.assert_close(codec.decode(expected), plain.decode(plain.encode(digits())))


# Chance and gradients


def test_training_latents_are_drawn_anew_from_the_posterior(kl: str) -> None:
    codec, images = FirstStage(kl, scale=1.0), digits(4)
    mean, log_variance = autoencoder().eval().moments(images).chunk(2, dim=1)
    found = draws(codec, images)
    torch.testing.assert_close(found.mean(0), mean, atol=0.3, rtol=0)
    torch.testing.assert_close(found.std(0), (0.5 * log_variance).exp(), rtol=0.2, atol=0)


def test_encoding_is_no_matter_of_chance(kl: str) -> None:
    codec = FirstStage(kl, scale=1.0)
    assert torch.equal(codec.encode(digits()), codec.encode(digits()))
    torch.testing.assert_close(codec.encode(digits()), autoencoder().eval().moments(digits())[:, :2])


def test_stored_moments_take_the_place_of_the_encoder(kl: str) -> None:
    codec, other = FirstStage(kl, scale=1.0), digits(8)[4:]
    calls: list[Any] = []
    codec.network.encoder.register_forward_hook(lambda *given: calls.append(given))
    moments = codec.moments(other)
    calls.clear()
    torch.manual_seed(0)
    found = codec.latents({"image": digits(4), "moments": moments.half()})
    assert calls == []
    torch.manual_seed(0)
    torch.testing.assert_close(found, codec.latents({"image": other}), atol=2e-2, rtol=2e-3)


def test_gradients_flow_through_decoding_and_stop_at_encoding(kl: str) -> None:
    codec = FirstStage(kl, scale=2.0)
    assert not codec.latents({"image": digits().requires_grad_()}).requires_grad
    latents = torch.randn(2, 2, 4, 4, requires_grad=True)
    [gradient] = torch.autograd.grad(codec.decode(latents).square().sum(), latents)
    assert gradient.abs().min() > 0
    assert all(p.grad is None for p in codec.network.parameters())


def test_memory_is_bounded_by_working_on_parts(kl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = FirstStage(kl, scale=1.0)
    images, latents = digits(10), torch.randn(10, 2, 4, 4)
    whole = codec.encode(images), codec.decode(latents)
    sizes: list[int] = []
    for layer in (codec.network.encoder, codec.network.decoder):
        layer.register_forward_hook(lambda _, given, out: sizes.append(len(given[0])))
    monkeypatch.setattr(first_stage, "PIXELS_AT_ONCE", 3 * 8 * 8)
    torch.testing.assert_close((codec.encode(images), codec.decode(latents)), whole)
    assert sizes == [3, 3, 3, 1] * 2


def test_the_encoder_runs_in_bf16_by_option_and_the_decoder_never(kl: str) -> None:
    exact, rounded = FirstStage(kl, scale=1.0), FirstStage(kl, scale=1.0, precision="bf16")
    kinds: dict[str, set[torch.dtype]] = {"encoder": set(), "decoder": set()}
    for name, found in kinds.items():
        layer = rounded.network.get_submodule(f"{name}.conv_in")
        layer.register_forward_hook(lambda _, given, out, found=found: found.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact.encode(digits()), FirstStage(kl, scale=1.0).encode(digits()))
        latents = rounded.encode(digits())
        images = rounded.decode(latents)
    assert kinds == {"encoder": {torch.bfloat16}, "decoder": {torch.float32}}
    assert latents.dtype == images.dtype == torch.float32
    error = (latents - exact.encode(digits())).abs().max() / latents.std()
    assert 0 < error < 0.1


# Frozen


def test_the_autoencoder_is_frozen_in_evaluation_mode_and_no_part_of_the_model_s_state(kl: str) -> None:
    codec = FirstStage(kl, scale=1.0)
    model = latent_model(codec)
    model.train()
    assert not any(m.training for m in codec.network.modules())
    assert not any(p.requires_grad for p in codec.network.parameters())
    ours = {p.data_ptr() for p in codec.network.parameters()}
    assert not ours & {p.data_ptr() for p in model.parameters()}
    assert [name for name in model.state_dict() if name.startswith("codec")] == ["codec.scale", "codec.shift"]
    assert not any(name.startswith("codec") for name in model.averaged_names())
    assert codec.to(torch.float64).network.quant_conv.weight.dtype == torch.float64


def test_what_an_image_depends_on_names_the_weights_and_not_the_place_of_the_file(kl: str, tmp_path: Path) -> None:
    def key(path: Path | str, **options: Any) -> Any:
        return describe(FirstStage(str(path), **{"scale": 1.0, **options}))

    assert key(kl) == key(write(tmp_path / "elsewhere" / "same.ckpt"))
    assert key(kl) != key(write(tmp_path / "other.ckpt", seed=1))
    assert key(kl) != key(kl, scale=2.0)


# Mistakes


def refusal(make: Any) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        make()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_clipping_latents_is_refused(kl: str) -> None:
    found = refusal(lambda: latent_model(FirstStage(kl, scale=1.0), sampler=DDIM(3, clip=True)))
    assert found == "sampler.clip=true: latents have no bounds to clip predictions to; set --model.sampler.clip false"


def test_clipping_latents_before_they_are_guided_is_refused(kl: str) -> None:
    class Nearness(LogLikelihood):
        def __call__(self, x: torch.Tensor, t: torch.Tensor, condition: Any) -> torch.Tensor:
            return -x.square().flatten(1).sum(1)

    found = refusal(lambda: latent_model(FirstStage(kl, scale=1.0), guidance=GradientGuidance(Nearness(), clip=True)))
    assert found == "guidance.clip=true: latents have no bounds to clip predictions to; set --model.guidance.clip false"
    latent_model(FirstStage(kl, scale=1.0), guidance=GradientGuidance(Nearness()))


def test_a_network_for_other_latents_is_refused(kl: str) -> None:
    found = refusal(lambda: latent_model(FirstStage(kl), network=unet(in_channels=3)))
    assert "diffuses 3 channels, and the first stage has 2; set --model.network.in_channels 2" in found


def test_images_that_the_first_stage_does_not_take_are_refused(kl: str) -> None:
    codec = FirstStage(kl)
    assert codec.latent_shape((1, 8, 8)) == (2, 4, 4)
    assert codec.image_shape((2, 8, 8)) == (1, 16, 16)
    for shape in ((3, 8, 8), (1, 9, 8)):
        assert "1 channels and sizes divisible by its factor 2" in refusal(lambda s=shape: codec.latent_shape(s))


def test_data_of_another_size_are_refused_before_training(kl: str, tmp_path: Path) -> None:
    codec = FirstStage(kl, scale=1.0)
    big = unet()
    big.image_size = 8
    found = refusal(lambda: tiny.trainer(tmp_path, 1).fit(latent_model(codec, network=big), tiny.data()))
    assert (
        "the data's images are (1, 8, 8) (channels, height, width) but the DiffusionModule takes (1, 16, 16)" in found
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "there is no first stage; give an autoencoder's checkpoint by --model.codec.checkpoint"),
        ({"checkpoint": "nowhere.ckpt"}, "codec.checkpoint=nowhere.ckpt: there is no such file"),
        ({"num_images": 1}, "codec.num_images=1 must be at least 2"),
        ({"precision": "fp16"}, "codec.precision='fp16' must be 'float32' or 'bf16'"),
        ({"network": None, "shift": 1.0, "checkpoint": "x"}, "codec.shift=1.0 needs a scale"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    assert words in refusal(lambda: FirstStage(**options))


@pytest.mark.parametrize(("scale", "words"), [([1.0, 2.0, 3.0], "has 3 numbers"), (0.0, "must be above 0")])
def test_a_scale_that_cannot_be_is_refused(kl: str, scale: Any, words: str) -> None:
    assert words in refusal(lambda: FirstStage(kl, scale=scale))


def test_a_scale_that_is_not_known_yet_is_said_to_be_so(kl: str) -> None:
    codec = FirstStage(kl)
    for use in (lambda: codec.encode(digits()), lambda: codec.decode(torch.zeros(1, 2, 4, 4))):
        assert "codec.scale=null is found when a run starts, which it has not; give a scale" in refusal(use)
    assert "there are none; give a scale" in refusal(lambda: codec.start(None, CPU))


def test_without_weights_nothing_is_encoded() -> None:
    codec = FirstStage(network=autoencoder(), scale=1.0)
    assert "the first stage has no weights; give its checkpoint" in refusal(lambda: codec.encode(digits()))
    assert "the first stage has no weights" in refusal(lambda: codec.decode(torch.zeros(1, 2, 4, 4)))


def test_a_network_that_is_not_the_file_s_is_refused(kl: str) -> None:
    network = autoencoder()
    for layer in network.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.num_groups = 4  # Of which the weights say nothing.
    codec = FirstStage(kl, network=network, scale=1.0)
    assert "has another network than codec.network" in refusal(lambda: codec.encode(digits()))


def test_another_first_stage_than_that_of_the_configuration_is_refused(kl: str, tmp_path: Path) -> None:
    wanted = FirstStage(kl).fingerprint
    assert FirstStage(kl, fingerprint=wanted).fingerprint == wanted
    other = str(write(tmp_path / "other.ckpt", seed=1))
    assert f"and not codec.fingerprint={wanted}" in refusal(lambda: FirstStage(other, fingerprint=wanted))


def test_a_diffusion_model_is_no_first_stage(tmp_path: Path) -> None:
    model = tiny.module()
    model.config = {"model": {"class_path": "diffusion_lit.module.DiffusionModule", "init_args": {"network": {}}}}
    tiny.trainer(tmp_path, 1).fit(model, tiny.data())
    found = refusal(lambda: FirstStage(str(tiny.last(tmp_path))))
    assert "is a checkpoint of DiffusionModule, not of an autoencoder" in found


def test_a_first_stage_runs_no_code_that_its_file_names(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    attack = {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {marker}", "shell": True}}
    with pytest.raises(Untrusted):
        FirstStage(str(write(tmp_path / "evil.ckpt", network=attack)))
    assert not marker.exists()


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "broken.ckpt")
    content = tiny.load(path)
    content["state_dict"]["network.quant_conv.bias"][0] = float("nan")
    torch.save(content, path)
    assert "1 weights are not finite, first quant_conv.bias" in refusal(lambda: FirstStage(str(path)))
