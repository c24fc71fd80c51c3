"""Networks with cross-attention and with concatenated conditions, to and from diffusers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

from diffusion_lit.networks import ADMUNet
from diffusion_lit.tools import unet2d, unet2d_condition
from diffusion_lit.tools.tensor_names import from_diffusers, to_diffusers
from tests.tools.diffusers_models import assert_close, randomised, seeded

TINY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 6,
    "attention_head_dim": 4,
}
EVERYWHERE: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many heads everywhere": EVERYWHERE,
    "heads of one width": {**EVERYWHERE, "attention_head_dim": (2, 4)},
    "two transformer blocks": {"transformer_layers_per_block": 2},
    "concatenated channels": {"in_channels": 8},
    "a learned variance": {"out_channels": 6},
    "classes": {"num_class_embeds": 5},
    "scale and shift": {"resnet_time_scale_shift": "scale_shift"},
    "the middle alone": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "three levels": {
        "block_out_channels": (8, 12, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "dropout": 0.1,
    },
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
TIMES = torch.tensor([0, 19])


def theirs(form: str, **changes: Any) -> Any:
    return randomised(UNet2DConditionModel(**{**TINY, **FORMS[form], **changes}))


def config_of(model: Any) -> dict[str, Any]:
    """As a config.json, in which there are no tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()}


def both(ours: ADMUNet, reference: Any) -> tuple[Tensor, Tensor]:
    """Outputs for the same images, context, classes and times."""
    dtype = next(ours.parameters()).dtype
    generator = seeded(6)
    x = torch.randn(2, ours.in_channels, 8, 8, generator=generator).to(dtype)
    concat = torch.randn(2, ours.concat_channels, 8, 8, generator=generator).to(dtype)
    context = torch.randn(2, 5, ours.context_width or 1, generator=generator).to(dtype)
    label = torch.tensor([4, 0])
    found = ours(x, TIMES.float(), {"context": context, "concat": concat, "label": label})
    given = () if ours.context_width is None else (context,)
    labels = {} if ours.num_classes is None else {"class_labels": label}
    return found, reference(torch.cat([x, concat], 1), TIMES, *given, **labels).sample


@pytest.mark.few(8)
@EVERY_FORM
@PRECISIONS
@torch.no_grad()
def test_diffusers_network_gives_the_same_output_here(form: str, dtype: torch.dtype, tolerance: float) -> None:
    reference = theirs(form).to(dtype)
    ours = ADMUNet(**unet2d_condition.arguments(config_of(reference))).to(dtype).eval()
    ours.load_state_dict(from_diffusers(reference.state_dict(), ours, Path("tiny")))
    assert_close(*both(ours, reference), tolerance=tolerance)


@pytest.mark.few(8)
@EVERY_FORM
@PRECISIONS
@torch.no_grad()
def test_our_network_gives_the_same_output_there(form: str, dtype: torch.dtype, tolerance: float) -> None:
    ours = randomised(ADMUNet(**unet2d_condition.arguments(config_of(theirs(form))))).to(dtype)
    reference: Any = UNet2DConditionModel.from_config(unet2d_condition.configuration(ours)).eval().to(dtype)
    reference.load_state_dict(to_diffusers(ours), strict=True)
    assert_close(*both(ours, reference), tolerance=tolerance)
    assert reference.config.dropout == FORMS[form].get("dropout", 0.0)


@EVERY_FORM
def test_a_configuration_comes_back_as_it_was(form: str) -> None:
    arguments = unet2d_condition.arguments(config_of(theirs(form)))
    again = unet2d_condition.configuration(ADMUNet(**arguments))
    assert unet2d_condition.arguments(again) == arguments


@torch.no_grad()
def test_attention_head_dim_is_a_number_of_heads_with_a_context_and_a_width_without() -> None:
    """The same key of two classes of diffusers: the head counts of both, over 16 channels."""
    conditional = theirs("plain")
    counts = {m.heads for name, m in conditional.named_modules() if name.endswith("attn2")}
    ours = unet2d_condition.arguments(config_of(conditional))
    assert counts == {ours["num_heads"]} == {4}
    assert "head_channels" not in ours
    without = UNet2DModel(
        **{key: value for key, value in TINY.items() if key != "cross_attention_dim"}
        | {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 8,
        }
    )
    assert {m.heads for name, m in without.named_modules() if name.endswith("attentions.0")} == {2}
    assert unet2d.arguments(config_of(without))[1]["head_channels"] == 8


@torch.no_grad()
def test_concatenated_channels_of_a_network_without_context() -> None:
    """As of super-resolution."""
    sizes = {key: value for key, value in TINY.items() if key != "cross_attention_dim"}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "in_channels": 6,
    }
    reference = randomised(UNet2DModel(**{**sizes, **blocks}))
    network, arguments = unet2d.arguments(config_of(reference))
    assert network is ADMUNet
    ours = ADMUNet(**arguments).eval()
    assert (ours.in_channels, ours.concat_channels) == (3, 3)
    ours.load_state_dict(from_diffusers(reference.state_dict(), ours, Path("tiny")))
    assert_close(*both(ours, reference))
    again: Any = UNet2DModel.from_config(unet2d.configuration(ours)).eval()
    again.load_state_dict(to_diffusers(ours), strict=True)
    assert_close(*both(ours, again))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flip_sin_to_cos": False}, ["flip_sin_to_cos=False where ours has True"]),
        ({"freq_shift": 1}, ["freq_shift=1 where ours has 0"]),
        ({"downsample_padding": 0}, ["downsample_padding=0 where ours has 1"]),
        ({"norm_eps": 1e-6}, ["norm_eps=1e-06 where ours has 1e-05"]),
        ({"use_linear_projection": True}, ["use_linear_projection=True"]),
        ({"mid_block_type": "UNetMidBlock2D"}, ["mid_block_type='UNetMidBlock2D'"]),
        ({"attention_head_dim": [4, 2], **EVERYWHERE}, ["attention_head_dim=[4, 2]", "one number or of one width"]),
        ({"attention_head_dim": [4]}, ["attention_head_dim=[4]", "each of 2 levels"]),
        ({"attention_head_dim": 0}, ["attention_head_dim=0", "whole numbers"]),
        ({"cross_attention_dim": [6, 6]}, ["cross_attention_dim=[6, 6]", "whole numbers"]),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, ["in both the same"]),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, ["AttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ({"resnet_time_scale_shift": "spatial"}, ["resnet_time_scale_shift='spatial'"]),
        ({"time_embedding_dim": 9}, ["time_embedding_dim=9", "4 x 8"]),
        ({"encoder_hid_dim": 9}, ["encoder_hid_dim=9, which is not known here"]),
        ({"sample_size": None}, ["sample_size=None"]),
    ],
)
def test_a_network_of_another_form_is_refused_with_the_reason(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        unet2d_condition.arguments({**config_of(theirs("plain")), **changes})
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resblock_updown": True}, ["resblock_updown=true", "--to safetensors"]),
        ({"resblock_updown": False, "residual_rescale": True}, ["residual_rescale=true"]),
        ({"resblock_updown": False, "multipliers": (2, 4)}, ["multipliers must begin with 1"]),
    ],
)
def test_a_network_that_diffusers_lacks_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    sizes = {"width": 8, "multipliers": (1, 2), "num_blocks": 1, "attention": (4,), "num_groups": 4, "context_width": 6}
    with pytest.raises(ValueError) as error:  # noqa: PT011
        unet2d_condition.configuration(ADMUNet(8, **{**sizes, **changes}))
    for word in words:
        assert word in str(error.value)


@pytest.mark.further
def test_the_configuration_of_stable_diffusion_is_its_network() -> None:
    """As CompVis/stable-diffusion-v1-4 has it, with the keys of its time."""
    config = {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.2.2", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    with torch.device("meta"):
        network = ADMUNet(**unet2d_condition.arguments(config))
        assert sum(p.numel() for p in network.parameters()) == 859_520_964
        reference = UNet2DConditionModel.from_config(unet2d_condition.configuration(network))
    theirs = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in to_diffusers(network).items()} == theirs
