"""Autoencoders of diffusers: what one program encodes and decodes the other does too."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from diffusion_lit.networks import Autoencoder
from diffusion_lit.tools import autoencoders
from diffusion_lit.tools.tensor_names import from_diffusers, to_diffusers
from tests.tools.diffusers_models import assert_close, randomised, seeded
from tests.tools.test_published_layouts import random_state

SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
}
AT_4: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}
FORMS: dict[str, tuple[type, dict[str, Any]]] = {
    "KL": (AutoencoderKL, {}),
    "KL with attention inside a level": (AutoencoderKL, {**AT_4, "latent_channels": 16}),
    "VQ": (VQModel, {"num_vq_embeddings": 12}),
    "VQ with attention inside a level": (VQModel, AT_4),
    "VQ without any attention": (VQModel, {"mid_block_add_attention": False}),
    "one channel, one block": (AutoencoderKL, {"in_channels": 1, "out_channels": 1, "layers_per_block": 1}),
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
PRECISIONS = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])


def theirs(form: str) -> Any:
    cls, changes = FORMS[form]
    return randomised(cls(**{**SIZES, **changes}))


def config_of(model: Any) -> dict[str, Any]:
    """As a config.json, in which there are no tuples."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in model.config.items()} | {
        "_class_name": type(model).__name__
    }


def built(arguments: Mapping[str, Any]) -> Autoencoder:
    return autoencoders.build(arguments).eval()


def pictures(channels: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(2, channels, 16, 16, generator=seeded(4)) * 2 - 1).to(dtype)


def assert_equal_autoencoders(ours: Autoencoder, reference: Any, tolerance: float) -> None:
    x = pictures(ours.in_channels, next(ours.parameters()).dtype)
    moments = ours.moments(x)
    if isinstance(reference, VQModel):
        assert_close(moments, reference.encode(x).latents, tolerance)
    else:
        assert_close(moments, reference.encode(x).latent_dist.parameters, tolerance)
    # Not at the codes, so that quantisation matters.
    latents = ours.regularizer.mode(moments)
    assert_close(ours.decode(latents), reference.decode(latents).sample, tolerance)


@EVERY_FORM
@PRECISIONS
@torch.no_grad()
def test_diffusers_autoencoder_computes_the_same_here(form: str, dtype: torch.dtype, tolerance: float) -> None:
    reference = theirs(form).to(dtype)
    ours = built(autoencoders.arguments(config_of(reference)).network).to(dtype)
    ours.load_state_dict(from_diffusers(reference.state_dict(), ours, Path("tiny")))
    assert_equal_autoencoders(ours, reference, tolerance)


@pytest.mark.few(5)
@EVERY_FORM
@PRECISIONS
@torch.no_grad()
def test_our_autoencoder_computes_the_same_there(form: str, dtype: torch.dtype, tolerance: float) -> None:
    ours = randomised(built(autoencoders.arguments(config_of(theirs(form))).network)).to(dtype)
    config = autoencoders.configuration(ours, scale=1.5)
    cls = FORMS[form][0]
    reference: Any = cls.from_config(config).eval().to(dtype)  # type: ignore[attr-defined]
    reference.load_state_dict(to_diffusers(ours), strict=True)
    assert_equal_autoencoders(ours, reference, tolerance)
    assert reference.config.scaling_factor == 1.5


@EVERY_FORM
def test_a_configuration_comes_back_as_it_was(form: str) -> None:
    config = config_of(theirs(form))
    stage = autoencoders.arguments(config)
    assert stage.scale == 0.18215
    again = autoencoders.configuration(built(stage.network), stage.scale)
    assert autoencoders.arguments(again) == stage
    assert {key: config[key] for key in again if key in config and key not in ("vq_embed_dim", "force_upcast")} == {
        key: value for key, value in again.items() if key in config and key not in ("vq_embed_dim", "force_upcast")
    }


def test_without_attention_inside_levels_the_tensors_do_not_fit() -> None:
    """Conversions of diffusers drop it, and a file that lacks it must not be loaded."""
    reference = theirs("VQ with attention inside a level")
    tensors = {n: t for n, t in reference.state_dict().items() if "_blocks.2.attentions" not in n}
    assert len(tensors) < len(reference.state_dict())
    with torch.device("meta"):
        ours = built(autoencoders.arguments(config_of(reference)).network)
    with pytest.raises(ValueError, match=r"missing: encoder\.down_blocks\.2\.attentions\.0\."):
        from_diffusers(tensors, ours, Path("converted"))


@pytest.mark.parametrize("attended", [True, False])
def test_attention_inside_levels_is_exported(attended: bool) -> None:
    form = "KL with attention inside a level" if attended else "KL"
    exported = to_diffusers(built(autoencoders.arguments(config_of(theirs(form))).network))
    found = {name.partition(".attentions")[0] for name in exported if "blocks" in name and ".attentions." in name}
    assert found == ({"encoder.down_blocks.2", "decoder.up_blocks.0"} if attended else set())


@pytest.mark.parametrize(
    ("form", "written", "scale"),
    [("VQ", None, 1.0), ("KL", None, 0.18215), ("VQ", 1, 1.0), ("VQ", 0.18215, 0.18215), ("KL", 0.3, 0.3)],
)
def test_a_vq_model_of_before_scaling_factors_has_none(form: str, written: float | None, scale: float) -> None:
    config = config_of(theirs(form))
    del config["scaling_factor"]
    assert autoencoders.arguments(config if written is None else {**config, "scaling_factor": written}).scale == scale


def test_the_factor_is_always_written_because_it_has_a_default_there() -> None:
    ours = built(autoencoders.arguments(config_of(theirs("VQ"))).network)
    config = autoencoders.configuration(ours, 1.0)
    reference: Any = VQModel.from_config(config)
    assert reference.config.scaling_factor == 1.0
    del config["scaling_factor"]
    default: Any = VQModel.from_config(config)
    assert default.config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [
        ("KL", {"_class_name": "AsymmetricAutoencoderKL"}, ["AsymmetricAutoencoderKL", "only AutoencoderKL"]),
        ("KL", {"use_quant_conv": False}, ["AutoencoderKL has no equal", "use_quant_conv=False where"]),
        ("KL", {"shift_factor": 0.1}, ["shift_factor=0.1"]),
        ("KL", {"act_fn": "relu"}, ["act_fn='relu'"]),
        ("KL", {"out_channels": 1}, ["out_channels=1", "ours has 3"]),
        ("KL", {"warp": 9}, ["warp=9, which is not known here"]),
        ("KL", {"scaling_factor": 0}, ["scaling_factor=0", "above 0"]),
        ("KL", {"scaling_factor": "1"}, ["scaling_factor='1'"]),
        ("KL", {"block_out_channels": [8, 16]}, ["down_block_types", "our 2 levels"]),
        ("KL", {"up_block_types": AT_4["up_block_types"]}, ["in both the same"]),
        ("KL", {"latent_channels": "4"}, ["latent_channels='4'", "whole numbers"]),
        ("VQ", {"vq_embed_dim": 5}, ["vq_embed_dim=5", "ours has 3"]),
        ("VQ", {"norm_type": "spatial"}, ["VQModel has no equal here", "norm_type='spatial'"]),
        ("VQ", {"lookup_from_codebook": True}, ["lookup_from_codebook=True"]),
    ],
)  # fmt: skip
def test_an_autoencoder_of_another_form_is_refused_with_the_reason(
    form: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        autoencoders.arguments({**config_of(theirs(form)), **changes})
    for word in words:
        assert word in str(error.value)


def test_an_autoencoder_that_diffusers_lacks_is_refused() -> None:
    ours = Autoencoder(16, width=8, multipliers=(2, 4), num_blocks=1, num_groups=4)
    with pytest.raises(ValueError, match=r"channels \[16, 32\] and width=8: multipliers must begin with 1"):
        autoencoders.configuration(ours, 1.0)


def test_former_names_of_attention_serve_too() -> None:
    """Under which the autoencoders of Stable Diffusion were published."""
    reference = theirs("KL")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in reference.state_dict().items():
        renamed = name
        for new, former in old.items():
            renamed = renamed.replace(f".{new}.", f".{former}.")
        tensors[renamed] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    ours = built(autoencoders.arguments(config_of(reference)).network)
    ours.load_state_dict(from_diffusers(tensors, ours, Path("tiny")))


def test_of_a_published_layout_nothing_is_lost() -> None:
    """To diffusers and back, of a network with everything."""
    ours = built(autoencoders.arguments(config_of(theirs("VQ with attention inside a level"))).network)
    state = random_state({name: tuple(t.shape) for name, t in ours.state_dict().items()})
    ours.load_state_dict(state)
    back = from_diffusers(to_diffusers(ours), ours, Path("tiny"))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
