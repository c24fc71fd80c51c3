"""`ADMUNet` as latent diffusion has it: the published networks, their conditions, and another program's arithmetic."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from diffusion_lit.networks import ADMUNet, attention_control
from diffusion_lit.networks.adm_blocks import QKVAttention
from diffusion_lit.networks.transformer import SpatialTransformer
from diffusion_lit.tools.tensor_names import from_diffusers
from tests.networks.small import IMAGES, TIMES, count, randomize, seeded, shapes, small_adm

LATENT: dict[str, Any] = {"image_size": 64, "in_channels": 3, "scale_shift_norm": False, "resblock_updown": False}
F4 = (1, 2, 3, 4)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "celebahq, ffhq, bedrooms": ({"width": 224, "multipliers": F4, "head_channels": 32}, 274_056_163),
    "churches": (
        {
            "image_size": 32, "in_channels": 4, "width": 192, "multipliers": (1, 2, 2, 4, 4),
            "attention": (32, 16, 8, 4), "num_heads": 8, "scale_shift_norm": True, "resblock_updown": True,
        },
        294_966_916,
    ),
    "cin256": (
        {
            "image_size": 32, "in_channels": 4, "width": 256, "multipliers": (1, 2, 4), "head_channels": 32,
            "context_width": 512,
        },
        394_984_196,
    ),
    "cin256-v2": (
        {"width": 192, "multipliers": (1, 2, 3, 5), "num_heads": 1, "context_width": 512},
        400_920_579,
    ),
    "txt2img": (
        {
            "image_size": 32, "in_channels": 4, "width": 320, "multipliers": (1, 2, 4, 4), "num_heads": 8,
            "context_width": 1280,
        },
        872_300_484,
    ),
    "text2img256": (
        {"width": 192, "multipliers": (1, 2, 3, 5), "head_channels": 32, "context_width": 640},
        403_623_939,
    ),
    "layout2img": (
        {"width": 128, "multipliers": F4, "head_channels": 32, "context_width": 512, "transformer_depth": 3},
        246_277_379,
    ),
    "semantic synthesis": (
        {"width": 128, "multipliers": (1, 4, 8), "attention": (), "num_heads": 8, "concat_channels": 3},
        215_229_315,
    ),
    "inpainting_big": (
        {"width": 256, "multipliers": F4, "num_heads": 8, "resblock_updown": True, "concat_channels": 4},
        387_245_827,
    ),
    "bsr_sr": (
        {"width": 160, "multipliers": (1, 2, 2, 4), "attention": (8,), "head_channels": 32, "concat_channels": 3},
        113_622_563,
    ),
    "stable diffusion v1": (
        {
            "in_channels": 4, "width": 320, "multipliers": (1, 2, 4, 4), "attention": (64, 32, 16), "num_heads": 8,
            "context_width": 768,
        },
        859_520_964,
    ),
    "adm upsampler 64 to 256": (
        {
            "image_size": 256, "width": 192, "multipliers": (1, 1, 2, 2, 4, 4), "num_heads": 4, "num_classes": 1000,
            "out_channels": 6, "scale_shift_norm": True, "resblock_updown": True, "concat_channels": 3,
        },
        311_795_910,
    ),
    "adm upsampler 128 to 512": (
        {
            "image_size": 512, "width": 192, "multipliers": (1, 1, 2, 2, 4, 4), "attention": (32, 16),
            "head_channels": 64, "num_classes": 1000, "out_channels": 6, "scale_shift_norm": True,
            "resblock_updown": True, "concat_channels": 3,
        },
        308_835_270,
    ),
}  # fmt: skip
"""Arguments beyond `LATENT`, and the number of parameters."""


def published(name: str) -> ADMUNet:
    with torch.device("meta"):
        return ADMUNet(**{**LATENT, **PUBLISHED[name][0]})


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_networks_are_the_published_ones_to_the_parameter(name: str) -> None:
    network = published(name)
    assert count(network) == PUBLISHED[name][1]
    # What is diffused, whatever is concatenated to it.
    assert network.in_channels == (4 if name in ("churches", "cin256", "txt2img", "stable diffusion v1") else 3)


def test_the_weights_have_the_published_names() -> None:
    found = shapes(published("txt2img"))
    expected = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.1.1.norm.weight": (320,),
        "input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
        "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (320, 320),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1280),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_v.weight": (320, 1280),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_out.0.bias": (320,),
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj.weight": (2560, 320),
        "input_blocks.1.1.transformer_blocks.0.ff.net.2.weight": (320, 1280),
        "input_blocks.1.1.transformer_blocks.0.norm3.weight": (320,),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "middle_block.1.transformer_blocks.0.attn1.to_out.0.weight": (1280, 1280),
        "output_blocks.5.2.conv.bias": (1280,),
        "output_blocks.11.1.proj_out.bias": (320,),
    }
    assert {name: found.get(name) for name in expected} == expected
    assert "input_blocks.1.1.transformer_blocks.0.attn2.to_q.bias" not in found
    assert "input_blocks.10.1.norm.weight" not in found


@pytest.mark.parametrize("name", ["cin256-v2", "text2img256", "txt2img", "churches"])
def test_heads_are_one_width_or_one_number_everywhere(name: str) -> None:
    network, arguments = published(name), PUBLISHED[name][0]
    layers = [layer for layer in network.modules() if isinstance(layer, SpatialTransformer | QKVAttention)]
    pairs = {(layer.norm.num_channels, layer.heads) for layer in layers}
    assert len(pairs) > 1
    if "head_channels" in arguments:
        assert {channels // heads for channels, heads in pairs} == {arguments["head_channels"]}
    else:
        assert {heads for _, heads in pairs} == {arguments["num_heads"]}


def test_with_both_rules_given_the_width_of_heads_decides() -> None:
    with torch.device("meta"):
        both = small_adm(context_width=6, num_heads=3, head_channels=4)
    heads = [layer.heads for layer in both.modules() if isinstance(layer, SpatialTransformer)]
    assert heads == [4] * len(heads)


def test_attention_can_be_in_the_middle_alone() -> None:
    network = published("semantic synthesis")
    assert [name for name, m in network.named_modules() if isinstance(m, QKVAttention)] == ["middle_block.1"]


def test_without_context_and_concatenation_nothing_changes() -> None:
    """Neither the names and shapes of the weights, nor what is drawn for them."""
    torch.manual_seed(0)
    plain = small_adm(attention=(8, 4))
    torch.manual_seed(0)
    said = small_adm(attention=(8, 4), context_width=None, transformer_depth=1, concat_channels=0)
    assert shapes(plain) == shapes(said)
    assert not any("transformer" in name for name in shapes(plain))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), said.parameters(), strict=True))


# Conditions


def conditional(**changes: Any) -> ADMUNet:
    network = small_adm(**{"context_width": 6, "concat_channels": 2, **changes})
    randomize(network)
    return network.eval()


def conditions(batch: int = 3, tokens: int = 5, seed: int = 3) -> dict[str, Tensor]:
    generator = seeded(seed)
    return {
        "context": torch.randn(batch, tokens, 6, generator=generator),
        "concat": torch.randn(batch, 2, 8, 8, generator=generator),
    }


def test_the_output_has_the_channels_of_what_is_diffused_and_starts_at_zero() -> None:
    out = small_adm(context_width=6, concat_channels=2)(IMAGES, TIMES, conditions())
    assert out.shape == IMAGES.shape
    assert (out == 0).all()


def test_a_transformer_starts_as_the_identity() -> None:
    layer = SpatialTransformer(8, 2, 4, 6, 2)
    x = torch.randn(2, 8, 4, 4, generator=seeded())
    assert torch.equal(layer(x, torch.randn(2, 3, 6)), x)


def test_every_image_is_told_its_own_context_and_concatenated_image() -> None:
    network = conditional()
    condition, other = conditions(), conditions(seed=4)
    out = network(IMAGES, TIMES, condition)
    scale = out.abs().max()
    for name in condition:
        mixed = {**condition, name: torch.cat([condition[name][:1], other[name][1:]])}
        changed = (network(IMAGES, TIMES, mixed) - out).abs().amax(dim=(1, 2, 3))
        assert changed[0] < 1e-5 * scale
        assert (changed[1:] > 1e-3 * scale).all()


def test_the_order_of_the_tokens_does_not_matter_and_their_number_is_free() -> None:
    network = conditional().double()
    condition = {name: value.double() for name, value in conditions().items()}
    out = network(IMAGES.double(), TIMES, condition)
    shuffled = {**condition, "context": condition["context"][:, torch.tensor([3, 0, 4, 1, 2])]}
    torch.testing.assert_close(network(IMAGES.double(), TIMES, shuffled), out, rtol=1e-10, atol=1e-10)
    twice = {**condition, "context": condition["context"].repeat(1, 2, 1)}
    torch.testing.assert_close(network(IMAGES.double(), TIMES, twice), out, rtol=1e-10, atol=1e-10)


def test_every_parameter_gets_a_gradient() -> None:
    network = conditional(num_classes=4, transformer_depth=2)
    network(IMAGES, TIMES, {**conditions(), "label": torch.tensor([0, 1, 2])}).square().sum().backward()
    # Rows of the embedding that no label chooses have none.
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9] == []


def test_blocks_that_are_computed_again_have_the_same_gradients() -> None:
    found = []
    for checkpoint_blocks in (False, True):
        network = conditional(checkpoint_blocks=checkpoint_blocks)
        context = conditions()["context"].requires_grad_()
        network(IMAGES, TIMES, {**conditions(), "context": context}).square().mean().backward()
        found.append([context.grad, *(p.grad for p in network.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": None}, ["no context given", "(3, K, 6)", "set a conditioner"]),
        ({"concat": None}, ["no concat given", "(3, 2, 8, 8)", "set a conditioner"]),
        ({"context": torch.zeros(3, 5, 7)}, ["context of shape (3, 5, 7)", "(3, K, 6)"]),
        ({"context": torch.zeros(3, 0, 6)}, ["context of shape (3, 0, 6)", "(3, K, 6)"]),
        ({"context": torch.zeros(3, 6)}, ["context of shape (3, 6)", "(3, K, 6)"]),
        ({"context": torch.zeros(1, 5, 6)}, ["context of shape (1, 5, 6)", "(3, K, 6)"]),
        ({"concat": torch.zeros(3, 2, 16, 16)}, ["concat of shape (3, 2, 16, 16)", "(3, 2, 8, 8)"]),
        ({"concat": torch.zeros(3, 1, 8, 8)}, ["concat of shape (3, 1, 8, 8)", "(3, 2, 8, 8)"]),
    ],
)
def test_conditions_that_are_missing_or_misshapen_are_refused(
    changes: dict[str, Tensor | None], words: list[str]
) -> None:
    given = {name: value for name, value in {**conditions(), **changes}.items() if value is not None}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        conditional()(IMAGES, TIMES, given)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_conditions_that_a_network_was_not_made_for_are_ignored() -> None:
    network = small_adm()
    randomize(network)
    assert torch.equal(network(IMAGES, TIMES, conditions()), network(IMAGES, TIMES))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context_width": 0}, ["context_width=0", "at least 1", "null"]),
        ({"context_width": 6, "transformer_depth": 0}, ["transformer_depth=0", "at least 1"]),
        ({"context_width": 6, "transformer_depth": 2**30}, ["transformer_depth=1073741824", "at most 1000"]),
        ({"transformer_depth": 2}, ["transformer_depth=2", "set context_width"]),
        ({"concat_channels": -1}, ["concat_channels=-1", "at least 0"]),
        ({"context_width": 6, "head_channels": 5}, ["head_channels=5", "16 channels", "divisor"]),
    ],
)
def test_errors_name_the_value_and_the_remedy(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        small_adm(**changes)
    for word in words:
        assert word in str(error.value)


# Control over attention


def test_a_control_tells_attention_to_the_context_from_self_attention() -> None:
    network = conditional()
    seen: list[tuple[str, tuple[int, ...]]] = []

    def record(name: str, weights: Tensor) -> Tensor:
        seen.append((name, tuple(weights.shape)))
        return weights

    with attention_control(network, record):
        network(IMAGES, TIMES, conditions())
    places = ["input_blocks.3.1", "middle_block.1", "output_blocks.0.1", "output_blocks.1.1"]
    names = [f"{place}.transformer_blocks.0.{layer}" for place in places for layer in ("attn1", "attn2")]
    assert [name for name, _ in seen] == names
    for name, shape in seen:
        cross = network.get_submodule(name).cross
        assert cross == name.endswith("attn2")
        assert shape == (3, 4, 16, 5 if cross else 16)


def test_a_control_that_looks_at_one_token_makes_the_others_meaningless() -> None:
    network = conditional()
    condition = conditions()

    def first(name: str, weights: Tensor) -> Tensor:
        if not network.get_submodule(name).cross:
            return weights
        return torch.zeros_like(weights).index_fill(3, torch.tensor([0]), 1.0)

    alone = {**condition, "context": condition["context"][:, :1]}
    expected = network(IMAGES, TIMES, alone)
    with attention_control(network, first):
        found = network(IMAGES, TIMES, condition)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


# Against diffusers


def theirs(**changes: Any) -> Any:
    torch.manual_seed(5)
    network = UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 6,
            # The number of heads, whatever its name says.
            "attention_head_dim": 4,
            "in_channels": 3,
            "out_channels": 3,
            **changes,
        }
    )
    randomize(network)
    return network.eval()


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("ours", "others"),
    [
        ({}, {}),
        ({"transformer_depth": 2}, {"transformer_layers_per_block": 2}),
        ({"concat_channels": 2}, {"in_channels": 5}),
        ({"attention": (8, 4), "num_heads": 2}, {
            "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "attention_head_dim": 2,
        }),
        ({"attention": (8, 4), "head_channels": 4}, {
            "down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2,
            "attention_head_dim": (2, 4),
        }),
        ({"attention": (8,)}, {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }),
        ({"scale_shift_norm": True}, {"resnet_time_scale_shift": "scale_shift"}),
        ({"num_blocks": 2, "multipliers": (1, 2, 2)}, {
            "layers_per_block": 2, "block_out_channels": (8, 16, 16),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        }),
    ],
    ids=["plain", "deep", "concat", "two levels", "head width", "full resolution", "scale-shift", "three levels"],
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@torch.no_grad()
def test_it_computes_what_diffusers_does(
    ours: dict[str, Any], others: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    reference = theirs(**others).to(dtype)
    shape = {"head_channels": None, "num_heads": 4, "scale_shift_norm": False, "resblock_updown": False}
    network = small_adm(**{"context_width": 6, **shape, **ours}).to(dtype)
    network.load_state_dict(from_diffusers(reference.state_dict(), network, Path("tiny")))
    x, condition = IMAGES.to(dtype), {name: value.to(dtype) for name, value in conditions().items()}
    extended = torch.cat([x, condition["concat"]], 1) if "concat_channels" in ours else x
    # Whole steps, whose embedding has the same bits in both programs' single precision.
    expected = reference(extended, TIMES.long(), condition["context"]).sample
    found = network(x, TIMES, condition)
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_the_comparison_with_diffusers_would_notice_another_epsilon() -> None:
    """GroupNorm of transformers has 1e-6, and of residual blocks 1e-5."""
    layers = [m for m in small_adm(context_width=6).modules() if isinstance(m, nn.GroupNorm)]
    assert {m.eps for m in layers} == {1e-5, 1e-6}
    assert all(m.norm.eps == 1e-6 for m in small_adm(context_width=6).modules() if isinstance(m, SpatialTransformer))
