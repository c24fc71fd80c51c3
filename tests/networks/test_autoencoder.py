"""Autoencoders: the published sizes, the published arithmetic, and agreement with diffusers."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from diffusion_lit.networks import Autoencoder, DiagonalGaussian, PatchGAN, VectorQuantizer, attention_control
from diffusion_lit.networks.layers import Downsample
from diffusion_lit.networks.regularizer import Regularizer
from tests.networks.small import count, randomize, seeded, shapes

SMALL: dict[str, Any] = {
    "image_size": 16,
    "latent_channels": 4,
    "width": 8,
    "multipliers": (1, 2, 4),
    "num_blocks": 2,
    "num_groups": 4,
}
IMAGES = torch.rand(2, 3, 16, 16, generator=seeded(3)) * 2 - 1


def vq(num_codes: int = 32, **changes: Any) -> VectorQuantizer:
    return VectorQuantizer(num_codes, **changes)


def small(regularizer: Regularizer | None = None, **changes: Any) -> Autoencoder:
    """A small autoencoder with random weights."""
    network = Autoencoder(**{**SMALL, "regularizer": regularizer or DiagonalGaussian(), **changes})
    randomize(network)
    return network.eval()


PUBLISHED = {
    "kl-f4": ((1, 2, 4), (), True, 3, None, 55_312_063),
    "kl-f8": ((1, 2, 4, 4), (), True, 4, None, 83_653_863),
    "kl-f16": ((1, 1, 2, 2, 4), (16,), True, 16, None, 69_610_963),
    "kl-f32": ((1, 1, 2, 2, 4, 4), (16, 8), True, 64, None, 103_880_131),
    "vq-f4": ((1, 2, 4), (), True, 3, 8_192, 55_322_782),
    "vq-f4-noattn": ((1, 2, 4), (), False, 3, 8_192, 53_219_486),
    "vq-f8": ((1, 2, 2, 4), (32,), True, 4, 16_384, 67_717_295),
    "vq-f8-n256": ((1, 2, 2, 4), (32,), True, 4, 256, 67_652_783),
    "vq-f16": ((1, 1, 2, 2, 4), (16,), True, 8, 16_384, 69_593_371),
}


def published(name: str) -> Autoencoder:
    multipliers, attention, middle, z, num_codes, _ = PUBLISHED[name]
    with torch.device("meta"):
        return Autoencoder(
            latent_channels=z,
            multipliers=multipliers,
            attention=attention,
            middle_attention=middle,
            regularizer=DiagonalGaussian() if num_codes is None else VectorQuantizer(num_codes),
        )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_have_their_sizes_to_the_parameter(name: str) -> None:
    assert count(published(name)) == PUBLISHED[name][-1]


@pytest.mark.parametrize(("num_layers", "parameters"), [(3, 2_765_633), (2, 663_361)])
@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_the_published_discriminators_have_their_sizes_to_the_parameter(
    num_layers: int, parameters: int, normalization: Any
) -> None:
    with torch.device("meta"):
        assert count(PatchGAN(num_layers=num_layers, normalization=normalization)) == parameters


def test_weights_have_the_names_of_the_published_ones() -> None:
    found = shapes(published("vq-f16"))
    expected = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
        "encoder.mid.block_1.conv2.bias": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "decoder.conv_in.weight": (512, 8, 3, 3),
        "decoder.up.4.attn.2.norm.weight": (512,),
        "decoder.up.4.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.up.0.block.2.conv1.weight": (128, 128, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
        "quantize.embedding.weight": (16_384, 8),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (8,),
    }
    assert {name: found[name] for name in expected} == expected
    assert not [n for n in found if n.startswith(("encoder.down.4.downsample", "decoder.up.0.upsample"))]
    assert shapes(published("kl-f4"))["quant_conv.weight"] == (6, 6, 1, 1)
    assert not [n for n in shapes(published("kl-f4")) if n.startswith("quantize")]


# Agreement with diffusers


def diffusers_name(name: str, levels: int) -> str:
    """What diffusers calls a tensor of the published layout."""
    name = re.sub(r"encoder\.down\.(\d+)\.block", r"encoder.down_blocks.\1.resnets", name)
    name = re.sub(r"encoder\.down\.(\d+)\.attn", r"encoder.down_blocks.\1.attentions", name)
    name = re.sub(r"encoder\.down\.(\d+)\.downsample", r"encoder.down_blocks.\1.downsamplers.0", name)

    def up(match: re.Match[str]) -> str:
        part = {"block": "resnets", "attn": "attentions", "upsample": "upsamplers.0"}[match[2]]
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}.{part}"

    name = re.sub(r"decoder\.up\.(\d+)\.(block|attn|upsample)", up, name)
    for ours, theirs in (("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1")):
        name = name.replace(ours, theirs)
    name = name.replace("mid.attn_1", "mid_block.attentions.0").replace("nin_shortcut", "conv_shortcut")
    name = name.replace("norm_out", "conv_norm_out")
    if "attentions" in name:
        for ours, theirs in (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v")):
            name = name.replace(f".{ours}.", f".{theirs}.")
        name = name.replace("proj_out", "to_out.0")
    return name


def to_diffusers(network: Autoencoder, theirs: nn.Module, levels: int) -> None:
    """Copies weights."""
    wanted: Mapping[str, Tensor] = theirs.state_dict()
    state = {}
    for name, tensor in network.state_dict().items():
        renamed = diffusers_name(name, levels)
        state[renamed] = tensor.reshape(wanted[renamed].shape)
    theirs.load_state_dict(state)


SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16, 32),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
ATTENTION: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@PRECISIONS
def test_a_kl_model_agrees_with_that_of_diffusers(dtype: torch.dtype, tolerance: float) -> None:
    theirs = AutoencoderKL(**SIZES).eval().to(dtype)
    ours = small().to(dtype)
    to_diffusers(ours, theirs, 3)
    images = IMAGES.to(dtype)
    with torch.no_grad():
        moments, posterior = ours.moments(images), theirs.encode(images).latent_dist
        assert_close(moments[:, :4], posterior.mean, tolerance)
        assert_close(ours.regularizer.mode(moments), posterior.mode(), tolerance)
        assert_close(ours.regularizer(moments).terms["kl"], posterior.kl(), tolerance)
        torch.manual_seed(0)
        drawn = posterior.sample()
        torch.manual_seed(0)
        assert_close(ours.regularizer.sample(moments), drawn, tolerance)
        assert_close(ours.decode(drawn), theirs.decode(drawn).sample, tolerance)


@PRECISIONS
@pytest.mark.parametrize("attention", [(), (4,)])
def test_a_vq_model_agrees_with_that_of_diffusers(
    dtype: torch.dtype, tolerance: float, attention: tuple[int, ...]
) -> None:
    theirs = VQModel(**{**SIZES, **(ATTENTION if attention else {})}, num_vq_embeddings=32).eval().to(dtype)
    ours = small(vq(), attention=attention).to(dtype)
    to_diffusers(ours, theirs, 3)
    images = IMAGES.to(dtype)
    with torch.no_grad():
        moments, latents = ours.moments(images), theirs.encode(images).latents
        assert_close(moments, latents, tolerance)
        assert_close(ours.decode(latents), theirs.decode(latents).sample, tolerance)
        quantized, loss, (_, _, codes) = theirs.quantize(latents)
        mine = ours.regularizer(latents)
        assert mine.codes is not None
        assert torch.equal(mine.codes.flatten(), codes)
        assert len(set(codes.tolist())) > 4
        assert_close(mine.latents, quantized, tolerance)
        assert_close(mine.terms["codebook"].mean(), loss, tolerance)


@pytest.mark.parametrize(("on", "legacy"), [("codebook", True), ("commitment", False)])
def test_gradients_of_the_codebook_loss_are_those_of_diffusers(on: Any, legacy: bool) -> None:
    theirs = VQModel(**SIZES, num_vq_embeddings=32).double().quantize
    theirs.legacy = legacy
    ours = vq(on=on)
    ours.build(4)
    ours.double()
    randomize(ours)
    theirs.embedding.weight.data.copy_(ours.embedding.weight)
    z = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=seeded()).requires_grad_()
    weight = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=seeded(1))
    quantized, loss, _ = theirs(z)
    expected = torch.autograd.grad(loss + (weight * quantized).sum(), [z, theirs.embedding.weight])
    mine = ours(z)
    found = torch.autograd.grad(
        mine.terms["codebook"].mean() + (weight * mine.latents).sum(), [z, ours.embedding.weight]
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# Regularizers by hand


def test_the_divergence_is_that_of_torch_and_its_log_variance_is_clamped() -> None:
    moments = torch.randn(3, 4, 2, 2, dtype=torch.float64, generator=seeded())
    mean, log_variance = moments.chunk(2, dim=1)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(DiagonalGaussian()(moments).terms["kl"], expected)
    extreme = torch.tensor([1.5, 50.0, 1.5, -90.0]).view(2, 2, 1, 1)
    kl = DiagonalGaussian()(extreme).terms["kl"].double()
    expected = torch.tensor([0.5 * (2.25 + torch.e**20 - 1 - 20), 0.5 * (2.25 + torch.e**-30 - 1 + 30)])
    torch.testing.assert_close(kl, expected.double(), rtol=1e-6, atol=0)


def test_samples_have_the_moments_that_were_given() -> None:
    torch.manual_seed(0)
    moments = torch.tensor([0.3, -2.0, 2.0, -1.0]).view(1, 4, 1, 1).expand(1, 4, 200, 200)
    drawn = DiagonalGaussian().sample(moments)
    torch.testing.assert_close(drawn.mean((0, 2, 3)), torch.tensor([0.3, -2.0]), atol=0.06, rtol=0)
    torch.testing.assert_close(drawn.var((0, 2, 3)), torch.tensor([2.0, -1.0]).exp(), rtol=0.03, atol=0)


def hand_made(on: Any) -> VectorQuantizer:
    """Codes (0, 0), (1, 0), (0, 2)."""
    quantizer = VectorQuantizer(3, beta=0.25, on=on)
    quantizer.build(2)
    quantizer.embedding.weight.data.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]))
    return quantizer


def test_each_position_takes_the_nearest_code() -> None:
    z = torch.tensor([[0.4, 0.1], [0.6, 0.1], [0.1, 1.2], [9.0, -9.0]]).T.reshape(1, 2, 2, 2)
    quantizer = hand_made("codebook")
    assert quantizer.codes(z).tolist() == [[[0, 1], [2, 1]]]
    expected = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [1.0, 0.0]]).T.reshape(1, 2, 2, 2)
    assert torch.equal(quantizer.decoded(z), expected)
    assert torch.equal(quantizer.sample(z), z)
    assert torch.equal(quantizer.mode(z), z)


@pytest.mark.parametrize(("on", "to_codes", "to_latents"), [("codebook", 0.25, 1.0), ("commitment", 1.0, 0.25)])
def test_both_conventions_have_the_same_loss_and_gradients_of_four_to_one(
    on: Any, to_codes: float, to_latents: float
) -> None:
    quantizer = hand_made(on)
    z = torch.tensor([0.4, 0.2]).reshape(1, 2, 1, 1).requires_grad_()
    loss = quantizer(z).terms["codebook"].sum()
    # The nearest code is (0, 0): the mean of 0.16 and 0.04, and 2 (z - q) / 2 for each entry.
    assert float(loss.detach()) == pytest.approx(1.25 * 0.1, rel=1e-6)
    loss.backward()
    assert z.grad is not None
    assert z.grad.flatten().tolist() == pytest.approx([to_latents * 0.4, to_latents * 0.2], rel=1e-6)
    gradient = quantizer.embedding.weight.grad
    assert gradient is not None
    assert gradient.flatten().tolist() == pytest.approx([-to_codes * 0.4, -to_codes * 0.2, 0, 0, 0, 0], rel=1e-6)


def test_the_gradient_of_the_decoder_s_input_passes_straight_through() -> None:
    z = torch.randn(2, 2, 3, 3, generator=seeded()).requires_grad_()
    weight = torch.randn(2, 2, 3, 3, generator=seeded(1))
    (weight * hand_made("codebook")(z).latents).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, weight)


def test_codes_begin_in_a_narrow_cube() -> None:
    quantizer = VectorQuantizer(100)
    quantizer.build(4)
    weight = quantizer.embedding.weight.detach()
    assert float(weight.abs().max()) <= 0.01
    assert float(weight.std()) == pytest.approx(0.01 / 3**0.5, rel=0.1)


def test_the_nearest_codes_do_not_depend_on_how_many_distances_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = vq()
    quantizer.build(4)
    randomize(quantizer)
    z = torch.randn(2, 4, 5, 5, generator=seeded())
    whole = quantizer.codes(z)
    monkeypatch.setattr("diffusion_lit.networks.regularizer.MOST_DISTANCES", 32 * 7)
    assert torch.equal(quantizer.codes(z), whole)


def test_the_nearest_codes_are_found_in_float32_under_autocast() -> None:
    quantizer = vq(4096)
    quantizer.build(4)
    randomize(quantizer)
    z = torch.randn(2, 4, 8, 8, generator=seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = quantizer.codes(z)
    assert torch.equal(rounded, quantizer.codes(z))


# The whole network


@pytest.mark.parametrize("regularizer", [DiagonalGaussian(), None])
def test_a_training_pass_is_encoding_regularizing_and_decoding(regularizer: Regularizer | None) -> None:
    network = small(regularizer or vq())
    torch.manual_seed(0)
    passed = network(IMAGES)
    torch.manual_seed(0)
    regularized = network.regularizer(network.moments(IMAGES))
    assert torch.equal(passed.latents, regularized.latents)
    assert passed.latents.shape == (2, 4, 4, 4)
    torch.testing.assert_close(network.decode(passed.latents), passed.images, atol=1e-4, rtol=1e-4)
    assert passed.images.shape == IMAGES.shape
    assert {name: term.shape for name, term in passed.terms.items()} == dict.fromkeys(regularized.terms, (2,))


def test_every_parameter_gets_a_gradient() -> None:
    for regularizer in (DiagonalGaussian(), vq(4)):
        network = small(regularizer, attention=(4,))
        passed = network(IMAGES)
        (passed.images.square().mean() + sum(term.mean() for term in passed.terms.values())).backward()
        silent = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
        # A constant added to every key leaves a softmax as it is: no bias of k is ever learnt.
        assert [name for name in silent if not name.endswith(".k.bias")] == []


def test_downsampling_pads_on_the_right_and_at_the_bottom_only() -> None:
    """One 3x3 filter that takes its first, or its last, row and column: the last output reads zeros or pixels."""
    network = small(width=4, num_groups=1, multipliers=(1, 1), latent_channels=1)
    convolution = network.get_submodule("encoder.down.0.downsample")
    assert isinstance(convolution, Downsample)
    x = torch.arange(1.0, 17.0).reshape(1, 1, 4, 4).repeat(1, 4, 1, 1)
    with torch.no_grad():
        torch.nn.init.zeros_(convolution.conv.bias)  # type: ignore[arg-type]
        for corner, expected in (((0, 0), [[1, 3], [9, 11]]), ((2, 2), [[11, 0], [0, 0]])):
            convolution.conv.weight.zero_()
            convolution.conv.weight[:, 0, corner[0], corner[1]] = 1
            assert convolution(x)[0, 0].tolist() == expected


def test_encoding_does_not_commute_with_mirroring() -> None:
    network = small()
    moments, mirrored = network.moments(IMAGES), network.moments(IMAGES.flip(3)).flip(3)
    assert (moments - mirrored).abs().max() > 0.01 * moments.abs().max()


def test_images_of_other_sizes_are_encoded_and_decoded() -> None:
    network = small(attention=(4,))
    images = torch.rand(1, 3, 24, 12, generator=seeded())
    moments = network.moments(images)
    assert moments.shape == (1, 8, 6, 3)
    assert network.decode(network.regularizer.mode(moments)).shape == images.shape


def test_attention_is_under_control_by_name() -> None:
    network = small(attention=(4,))
    seen = []
    with torch.no_grad(), attention_control(network, lambda name, weights: seen.append(name) or weights):  # type: ignore[func-returns-value]
        network(IMAGES)
    assert seen == [
        *("encoder.down.2.attn.0", "encoder.down.2.attn.1", "encoder.mid.attn_1", "decoder.mid.attn_1"),
        *("decoder.up.2.attn.0", "decoder.up.2.attn.1", "decoder.up.2.attn.2"),
    ]


def test_a_fresh_network_has_weights_like_torch_s_and_none_of_its_branches_is_asleep() -> None:
    torch.manual_seed(0)
    network = Autoencoder(**{**SMALL, "width": 32, "num_groups": 32})
    for name in ("encoder.mid.attn_1.proj_out", "decoder.mid.block_1.conv2", "encoder.down.0.downsample.conv"):
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        # Kaiming uniform with a = sqrt(5): within 1 / sqrt(fan-in).
        bound = layer.weight[0].numel() ** -0.5
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound


def test_a_copy_has_codes_of_its_own() -> None:
    network = small(vq())
    other = copy.deepcopy(network)
    other.quantize.embedding.weight.data.zero_()  # type: ignore[union-attr, operator]
    assert network.state_dict()["quantize.embedding.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: small(image_size=18), ["image_size=18", "multiple of 4"]),
        (lambda: small(latent_channels=0), ["latent_channels=0", "at least 1"]),
        (lambda: small(attention=(5,)), ["attention at 5", "[16, 8, 4]"]),
        (lambda: small().moments(IMAGES[..., :15]), ["16 x 15", "factor 4", "crop or pad"]),
        (lambda: small().moments(IMAGES[:, :1]), ["1 channels", "takes 3"]),
        (lambda: VectorQuantizer(0), ["num_codes=0", "at least 1"]),
        (lambda: VectorQuantizer(8, beta=0.0), ["beta=0.0", "above 0"]),
        (lambda: VectorQuantizer(8, on="both"), ["on='both'", "'codebook' or 'commitment'"]),  # type: ignore[arg-type]
        (lambda: small(small(vq()).regularizer), ["belongs to an autoencoder already"]),
        (lambda: PatchGAN(num_layers=0), ["num_layers=0", "at least 1"]),
        (lambda: PatchGAN(num_layers=2**30), ["num_layers=1073741824", "at most 31"]),
        (lambda: PatchGAN(width=8, normalization="group"), ["num_groups=32", "16 channels", "divisor"]),
        (lambda: PatchGAN(normalization="layer"), ["normalization='layer'"]),  # type: ignore[arg-type]
        (lambda: PatchGAN().patches(16), ["num_layers=3", "images of 16 pixels", "at least 24"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(make: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        make()
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


# The discriminator


@pytest.mark.parametrize(
    ("num_layers", "size", "patches"), [(3, 256, 30), (2, 32, 6), (1, 8, 2), (3, 24, 1), (2, 27, 4)]
)
def test_a_discriminator_gives_a_map_of_logits(num_layers: int, size: int, patches: int) -> None:
    discriminator = PatchGAN(width=4, num_layers=num_layers)
    assert discriminator(torch.zeros(1, 3, size, size)).shape == (1, 1, patches, patches)
    assert discriminator.patches(size) == patches


def test_weights_of_a_discriminator_have_the_published_names_and_deviations() -> None:
    torch.manual_seed(0)
    discriminator = PatchGAN()
    found = shapes(discriminator)
    assert found["main.0.weight"] == (64, 3, 4, 4)
    assert found["main.3.running_mean"] == (128,)
    assert found["main.8.weight"] == (512, 256, 4, 4)
    assert found["main.11.bias"] == (1,)
    assert "main.2.bias" not in found
    parameters = dict(discriminator.named_parameters())
    assert float(parameters["main.8.weight"].detach().std()) == pytest.approx(0.02, rel=0.01)
    assert float(parameters["main.9.weight"].detach().std()) == pytest.approx(0.02, rel=0.15)
    assert float(parameters["main.9.weight"].detach().mean()) == pytest.approx(1.0, abs=0.01)
    assert float(parameters["main.9.bias"].detach().abs().max()) == 0


@pytest.mark.parametrize(("normalization", "depends"), [("batch", True), ("group", False)])
def test_logits_depend_on_the_other_images_by_batch_normalization_alone(normalization: Any, depends: bool) -> None:
    torch.manual_seed(0)
    discriminator = PatchGAN(width=8, num_layers=2, normalization=normalization, num_groups=4)
    images = torch.randn(4, 3, 32, 32, generator=seeded())
    difference = (discriminator(images)[:2] - discriminator(images[:2])).abs().max()
    assert (float(difference.detach()) > 1e-3) == depends
