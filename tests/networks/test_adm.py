import math

import pytest
import torch
from torch import Tensor

from diffusion_lit.networks import ADMUNet
from diffusion_lit.networks.adm_blocks import QKVAttention
from diffusion_lit.tools.import_weights import read_recipes
from tests.networks.small import IMAGES, TIMES, count, randomize, seeded, shapes, small_adm, small_classifier
from tests.tools.guided_diffusion import Form, unet_shapes
from tests.tools.guided_diffusion import Network as Reference

# Published networks


@pytest.mark.parametrize(
    ("arguments", "published"),
    [
        ({"image_size": 256, "multipliers": (1, 1, 2, 2, 4, 4), "head_channels": 64}, 552_814_086),
        (
            {
                "image_size": 64,
                "width": 192,
                "multipliers": (1, 2, 3, 4),
                "num_blocks": 3,
                "head_channels": 64,
                "num_classes": 1000,
            },
            295_904_454,
        ),
        ({"image_size": 128, "multipliers": (1, 1, 2, 3, 4), "num_heads": 4, "num_classes": 1000}, 421_529_606),
        ({"image_size": 256, "head_channels": 64, "num_classes": 1000}, 553_838_086),
        # Upsamplers: the low-resolution image is concatenated to the input.
        ({"image_size": 256, "in_channels": 6, "width": 192, "num_heads": 4, "num_classes": 1000}, 311_795_910),
        (
            {
                "image_size": 512,
                "in_channels": 6,
                "width": 192,
                "attention": (32, 16),
                "head_channels": 64,
                "num_classes": 1000,
            },
            308_835_270,
        ),
    ],
    ids=["LSUN 256", "ImageNet 64", "ImageNet 128", "ImageNet 256", "upsampler 64 to 256", "upsampler 128 to 512"],
)
def test_the_networks_are_adms_to_the_parameter(arguments: dict[str, object], published: int) -> None:
    with torch.device("meta"):
        assert count(ADMUNet(out_channels=6, **arguments)) == published  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("lsun_bedroom", 552_814_086),
        ("lsun_horse", 552_814_086),
        ("lsun_cat", 552_814_086),
        ("imagenet64", 295_904_454),
        ("imagenet128", 421_529_606),
        ("imagenet256", 553_838_086),
    ],
)
def test_the_recipes_have_the_published_networks(recipe: str, published: int) -> None:
    network = read_recipes([f"adm_{recipe}"])["model"]["init_args"]["network"]
    assert network["class_path"] == "diffusion_lit.networks.ADMUNet"
    with torch.device("meta"):
        assert count(ADMUNet(**network["init_args"])) == published


def test_weights_have_the_names_of_the_published_ones() -> None:
    with torch.device("meta"):
        found = shapes(ADMUNet(out_channels=6, head_channels=64, num_classes=1000))
    expected = {
        "time_embed.0.weight": (1024, 256),
        "time_embed.2.bias": (1024,),
        "label_emb.weight": (1000, 1024),
        "input_blocks.0.0.weight": (256, 3, 3, 3),
        "input_blocks.1.0.in_layers.0.weight": (256,),
        "input_blocks.2.0.out_layers.3.bias": (256,),
        "input_blocks.3.0.in_layers.2.weight": (256, 256, 3, 3),
        "input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1),
        "input_blocks.10.1.qkv.weight": (1536, 512, 1),
        "input_blocks.17.1.norm.weight": (1024,),
        "middle_block.0.out_layers.0.weight": (1024,),
        "middle_block.1.proj_out.weight": (1024, 1024, 1),
        "middle_block.2.emb_layers.1.bias": (2048,),
        "output_blocks.0.0.skip_connection.weight": (1024, 2048, 1, 1),
        "output_blocks.2.2.emb_layers.1.weight": (2048, 1024),
        "output_blocks.8.1.qkv.bias": (1536,),
        "output_blocks.11.1.in_layers.2.weight": (512, 512, 3, 3),
        "output_blocks.17.0.in_layers.2.weight": (256, 512, 3, 3),
        "out.0.weight": (256,),
        "out.2.weight": (6, 256, 3, 3),
    }
    assert {name: found.get(name) for name in expected} == expected
    absent = (
        "input_blocks.18.",
        "input_blocks.3.0.skip",
        "input_blocks.7.1",
        "output_blocks.17.1",
        "output_blocks.18.",
    )
    assert not [name for name in found if name.startswith(absent)]


def test_resampling_by_convolution_has_the_published_names_too() -> None:
    found = shapes(small_adm(resblock_updown=False))
    assert found["input_blocks.2.0.op.weight"] == (8, 8, 3, 3)
    assert found["output_blocks.1.2.conv.weight"] == (16, 16, 3, 3)
    assert small_adm(resblock_updown=False)(IMAGES, TIMES).shape == IMAGES.shape


# Fractional multipliers

ADM_512 = (0.5, 1, 1, 2, 2, 4, 4)


@pytest.mark.parametrize("num_classes", [None, 1000])
def test_adms_512_network_has_the_published_tensors(num_classes: int | None) -> None:
    """As the code that wrote the weights makes them: guided-diffusion, create_model, image_size 512."""
    form = Form(
        model_channels=256, channel_mult=ADM_512, num_res_blocks=2, attended=(4, 5, 6), num_classes=num_classes,
        num_head_channels=64, resblock_updown=True,
    )  # fmt: skip
    with torch.device("meta"):
        network = ADMUNet(512, out_channels=6, multipliers=ADM_512, head_channels=64, num_classes=num_classes)
    assert shapes(network) == {name: tuple(shape) for name, shape in unet_shapes(form).items()}


@pytest.mark.parametrize("resblock_updown", [True, False])
def test_a_network_with_a_fractional_multiplier_computes_what_openais_does(resblock_updown: bool) -> None:
    form = Form(model_channels=64, channel_mult=(0.5, 1.5), num_classes=5, num_heads=2, resblock_updown=resblock_updown)
    network = ADMUNet(
        8, width=64, multipliers=(0.5, 1.5), num_blocks=1, attention=(4,), out_channels=6, num_classes=5, num_heads=2,
        resblock_updown=resblock_updown,
    ).double()  # fmt: skip
    generator = seeded(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=generator)
    x, label = IMAGES.double(), torch.tensor([4, 0, 2])
    expected = Reference(network.state_dict(), form).denoise(x, TIMES.double(), label)
    # The embedding of the time is float32 here.
    torch.testing.assert_close(network(x, TIMES, {"label": label}), expected, rtol=1e-4, atol=1e-4)


def test_the_channels_are_the_nearest_whole_numbers() -> None:
    network = small_adm(width=12, multipliers=(0.3333333, 1 / 3 + 1), attention=())
    assert network.channels == [4, 16]
    assert network(IMAGES, TIMES).shape == IMAGES.shape


# The network


@pytest.mark.parametrize("out_channels", [None, 6])
def test_the_output_is_an_image_of_zeros_at_first(out_channels: int | None) -> None:
    out = small_adm(out_channels=out_channels)(IMAGES, TIMES)
    assert out.shape == (3, out_channels or 3, 8, 8)
    assert (out == 0).all()


@pytest.mark.parametrize("resblock_updown", [True, False])
@pytest.mark.parametrize("scale_shift_norm", [True, False])
def test_every_parameter_gets_a_gradient_once_the_branches_are_awake(
    resblock_updown: bool, scale_shift_norm: bool
) -> None:
    network = small_adm(resblock_updown=resblock_updown, scale_shift_norm=scale_shift_norm, num_classes=3)
    randomize(network)
    network(IMAGES, TIMES, {"label": torch.arange(3)}).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9] == []


def test_images_of_a_batch_do_not_mix_and_each_is_told_its_own_time_and_class() -> None:
    network = small_adm(num_classes=3).eval()
    randomize(network)
    label = torch.tensor([2, 0, 1])
    together = network(IMAGES, TIMES, {"label": label})
    scale = together.abs().max()
    for i in range(3):
        alone = network(IMAGES[i : i + 1], TIMES[i : i + 1], {"label": label[i : i + 1]})
        assert (together[i] - alone[0]).abs().max() < 1e-4 * scale
    for time, classes in ((TIMES.flip(0), label), (TIMES, torch.tensor([1, 0, 2]))):
        other = network(IMAGES, time, {"label": classes})
        assert (other[0] - together[0]).abs().max() > 1e-2 * scale
        assert (other[1] - together[1]).abs().max() < 1e-4 * scale


def test_heads_grow_with_the_channels_or_stay_as_many() -> None:
    def heads(**changes: object) -> list[int]:
        return [m.heads for m in small_adm(attention=(8, 4), **changes).modules() if isinstance(m, QKVAttention)]

    # One block down at 8 and at 16 channels, the middle, two blocks up at 16 and at 8.
    assert heads(head_channels=4) == [2, 4, 4, 4, 4, 2, 2]
    assert heads(head_channels=None, num_heads=2) == [2] * 7


def test_it_computes_in_the_precision_of_its_weights() -> None:
    network = small_adm().double()
    randomize(network)
    assert network(IMAGES.double(), TIMES).dtype == torch.float64


# Labels


def test_the_null_label_stands_in_for_a_missing_one() -> None:
    network = small_adm(num_classes=4, null_label=True).eval()
    randomize(network)
    assert network.has_null_label
    assert network.label_emb.weight.shape == (5, 32)
    without = network(IMAGES, TIMES)
    torch.testing.assert_close(network(IMAGES, TIMES, {"label": torch.tensor([4, 4, 4])}), without)
    torch.testing.assert_close(network(IMAGES, TIMES, {}), without)
    assert not torch.allclose(network(IMAGES, TIMES, {"label": torch.tensor([0, 4, 1])})[0], without[0])


def test_a_negative_label_is_the_null_label() -> None:
    network = small_adm(num_classes=4, null_label=True)
    randomize(network)
    for mode in (True, False):
        network.train(mode)
        found = network(IMAGES, TIMES, {"label": torch.tensor([-1, 2, -7])})
        assert torch.equal(found, network(IMAGES, TIMES, {"label": torch.tensor([4, 2, 4])}))


def test_training_leaves_labels_as_they_are_and_draws_no_random_numbers() -> None:
    network = small_adm(num_classes=4, null_label=True)
    randomize(network)
    label = {"label": torch.tensor([0, 3, 1])}
    torch.manual_seed(0)
    before = torch.get_rng_state()
    trained = network.train()(IMAGES, TIMES, label)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network.eval()(IMAGES, TIMES, label), trained)


def test_without_classes_labels_are_not_looked_at() -> None:
    network = small_adm()
    randomize(network)
    assert network.num_classes is None
    assert not network.has_null_label
    torch.testing.assert_close(network(IMAGES, TIMES, {"label": torch.tensor([7, 8, 9])}), network(IMAGES, TIMES))


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        (None, ["num_classes=4", "give labels", "null_label=true"]),
        ({}, ["num_classes=4", "give labels", "null_label=true"]),
        ({"label": torch.tensor([1])}, ["(1,)", "3 images", "one per image"]),
    ],
)
def test_labels_that_are_missing_or_too_few_are_refused(condition: dict[str, Tensor] | None, words: list[str]) -> None:
    network = small_adm(num_classes=4)
    assert not network.has_null_label
    with pytest.raises(ValueError) as error:  # noqa: PT011
        network(IMAGES, TIMES, condition)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": 9}, ["image_size=9", "halved 1 times", "multiple of 2"]),
        ({"num_groups": 3}, ["num_groups=3", "width=8", "make width a multiple"]),
        ({"width": 5, "num_groups": 5}, ["width=5", "even and at least 4"]),
        ({"attention": (5,)}, ["attention at 5", "[8, 4]", "choose"]),
        ({"dropout": 1.0}, ["dropout=1.0", "[0, 1)"]),
        ({"head_channels": 5}, ["head_channels=5", "16 channels", "divisor"]),
        ({"head_channels": 0}, ["head_channels=0", "divisor"]),
        ({"multipliers": ()}, ["multipliers=[]", "at least 1"]),
        ({"num_blocks": 0}, ["num_blocks=0", "at least 1"]),
        ({"num_classes": 0}, ["num_classes=0", "at least 1"]),
        ({"head_channels": None, "num_heads": 3}, ["num_heads=3", "16 channels", "divisor"]),
        ({"null_label": True}, ["null_label=true", "set num_classes"]),
        ({"multipliers": (0.4, 1)}, ["multiplier 0.4", "width=8", "3.2 channels", "multiples of num_groups=4"]),
        ({"multipliers": (1, 1.25)}, ["multiplier 1.25", "10 channels", "multiples of num_groups=4"]),
        ({"multipliers": (0, 1)}, ["multiplier 0", "0 channels", "num_groups=4"]),
        ({"multipliers": (-1, 1)}, ["multiplier -1", "-8 channels", "num_groups=4"]),
        ({"multipliers": (1, math.nan)}, ["multiplier nan", "num_groups=4"]),
        ({"multipliers": (1, math.inf)}, ["multiplier inf", "num_groups=4"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(changes: dict[str, object], words: list[str]) -> None:
    networks = [small_adm]
    if not changes.keys() & {"num_heads", "null_label"}:
        networks.append(small_classifier)  # type: ignore[arg-type]
    for network in networks:
        with pytest.raises(ValueError) as error:  # noqa: PT011
            network(**changes)
        for word in words:
            assert word in str(error.value)
