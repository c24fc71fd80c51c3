"""Pipelines over latents: folders of diffusers draw the same images here, and ours draw the same images there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DConditionModel, VQModel
from safetensors import safe_open
from torch import Tensor

from diffusion_lit.checkpoint import load_model
from diffusion_lit.codecs import FirstStage
from diffusion_lit.methods.autoencoder.module import AutoencoderModule
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import Autoencoder
from diffusion_lit.tools import export_weights, import_weights
from diffusion_lit.tools.diffusers_folder import equal_network
from tests.tools import test_autoencoders, test_compvis
from tests.tools.diffusers_models import T, assert_close, imported, randomised, seeded, theirs
from tests.tools.test_unet2d_condition import theirs as conditional

DDPM: dict[str, Any] = {}
ADM: dict[str, Any] = {"freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1, "norm_eps": 1e-5}
STEPS = 5


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def noise(count: int, channels: int) -> Tensor:
    """What diffusers' pipelines draw from this generator."""
    return torch.randn(count, channels, 8, 8, generator=seeded(9))


@torch.no_grad()
def drawn_there(pipeline: Any) -> Tensor:
    """Images in [0, 1], (2, C, H, W)."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(batch_size=2, generator=seeded(9), num_inference_steps=STEPS, output_type="np").images
    return torch.from_numpy(made).permute(0, 3, 1, 2)


@torch.no_grad()
def drawn_here(model: DiffusionModule) -> Tensor:
    """Likewise, from the same noise."""
    model.sampler.steps = STEPS
    x = noise(2, model.latent_shape[0])
    latents = model.sampler(model.bind({}), x, model.process, lambda: torch.randn(x.shape))
    return (model.codec.decode(latents) / 2 + 0.5).clamp(0, 1)


def load(folder: Path) -> Any:
    return LDMPipeline.from_pretrained(folder)


def stage(kind: str, **changes: Any) -> Any:
    """An autoencoder of diffusers whose latents have three channels of 4x4 for 16x16 images."""
    cls: Any = AutoencoderKL if kind == "KL" else VQModel
    sizes = {**test_autoencoders.SIZES, "latent_channels": 3, "sample_size": 32}
    return randomised(cls(**{**sizes, **changes}))


def scheduler(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(T, 0.0015, 0.0195, "scaled_linear", clip_sample=False, **changes)


def pipeline(folder: Path, kind: str = "VQ", unet: Any = None, **changes: Any) -> Path:
    made = LDMPipeline(stage(kind, **changes), theirs() if unet is None else unet, scheduler())
    made.save_pretrained(folder / "pipeline")
    return folder / "pipeline"


# In


@pytest.mark.few(3)
@pytest.mark.parametrize("network", ["DDPM", "ADM"])
@pytest.mark.parametrize(("kind", "scale"), [("KL", 0.3), ("KL", 1.0), ("VQ", 1.0), ("VQ", 0.18215)])
def test_a_pipeline_of_diffusers_draws_the_same_images_here(
    kind: str, scale: float, network: str, tmp_path: Path
) -> None:
    folder = pipeline(tmp_path, kind, theirs(**(ADM if network == "ADM" else DDPM)), scaling_factor=scale)
    expected = drawn_there(load(folder))
    model = imported(folder)
    assert isinstance(model.codec, FirstStage)
    assert model.image_shape == (3, 32, 32)
    assert expected.std() > 0.05
    assert_close(drawn_here(model), expected, tolerance=1e-4)


def test_the_imported_checkpoint_needs_nothing_else(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    expected = drawn_here(imported(folder))
    folder.rename(tmp_path / "elsewhere")
    again = load_model(tmp_path / "pipeline.ckpt", DiffusionModule)
    assert torch.equal(drawn_here(again), expected)
    assert again.sample(range(3)).shape == (3, 3, 32, 32)


@pytest.mark.further
def test_a_vq_model_of_before_scaling_factors_is_not_scaled(tmp_path: Path) -> None:
    """As the published conversions are. Today's diffusers takes 0.18215 for them."""
    folder = pipeline(tmp_path, scaling_factor=1.0)
    expected = drawn_there(load(folder))
    path = folder / "vqvae" / "config.json"
    config = json.loads(path.read_text())
    del config["scaling_factor"]
    path.write_text(json.dumps(config))
    assert (drawn_there(load(folder)) - expected).abs().max() > 0.01
    assert_close(drawn_here(imported(folder)), expected, tolerance=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scheduler/scheduler_config.json": {"clip_sample": True}}, ["sampler.clip=true", "latents have no bounds"]),
        ({"scheduler/scheduler_config.json": {"steps_offset": 0.5}}, ["steps_offset=0.5"]),
        ({"vqvae/config.json": {"latent_channels": 3, "in_channels": 1, "out_channels": 1}}, ["misshapen"]),
        ({"model_index.json": {"_class_name": "KandinskyPipeline"}}, ["KandinskyPipeline", "LDMPipeline"]),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused(change: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    for file, values in change.items():
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        imported(folder)
    for word in words:
        assert word in str(error.value)
    assert not list(tmp_path.glob("*.ckpt"))


def test_a_pipeline_without_its_autoencoder_is_refused(tmp_path: Path) -> None:
    folder = pipeline(tmp_path)
    (folder / "vqvae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="vqvae has no diffusion_pytorch_model"):
        imported(folder)


def test_weights_of_the_autoencoder_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = stage("VQ")
    with torch.no_grad():
        broken.decoder.conv_in.bias[0] = float("nan")
    LDMPipeline(broken, theirs(), scheduler()).save_pretrained(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=r"infinite or not a number.*decoder\.conv_in\.bias"):
        imported(tmp_path / "pipeline")


@pytest.mark.parametrize("kind", ["KL", "VQ"])
@torch.no_grad()
def test_an_autoencoder_alone(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = stage(kind, scaling_factor=0.25)
    reference.save_pretrained(tmp_path / "vae")
    out = tmp_path / "vae.ckpt"
    import_weights.main([str(tmp_path / "vae"), "--out", str(out)])
    assert "set codec.scale to 0.25" in capsys.readouterr().out
    model = load_model(out, AutoencoderModule)
    test_autoencoders.assert_equal_autoencoders(model.network, reference, 1e-5)
    assert (model.loss.reduction, model.loss.regularizer_weight) == (("sum", 1e-6) if kind == "KL" else ("mean", 1.0))
    # It serves as a first stage.
    codec = FirstStage(str(out), scale=0.25)
    x = torch.rand(1, 3, 32, 32, generator=seeded(4)) * 2 - 1
    there = reference.encode(x)
    latents = there.latents if kind == "VQ" else there.latent_dist.mode()
    assert_close(codec.encode(x), 0.25 * latents)


def test_a_recipe_says_how_an_autoencoder_is_trained(tmp_path: Path) -> None:
    stage("VQ").save_pretrained(tmp_path / "vae")
    loss = {"class_path": "ReconstructionLoss", "init_args": {"regularizer_weight": 0.5, "perceptual": None}}
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": "AutoencoderModule", "init_args": {"loss": loss, "seed": 3}}})
    )
    out = tmp_path / "vae.ckpt"
    import_weights.main([str(tmp_path / "vae"), "-c", str(tmp_path / "recipe.yaml"), "--out", str(out)])
    assert load_model(out, AutoencoderModule).loss.regularizer_weight == 0.5


def test_a_network_alone_needs_what_a_pipeline_would_say(tmp_path: Path) -> None:
    """The conditioner, and how latents were scaled."""
    conditional("plain").save_pretrained(tmp_path / "context" / "unet")
    scheduler().save_pretrained(tmp_path / "context" / "scheduler")
    with pytest.raises(ValueError, match="attends to a context: give by -c the recipe with the conditioner"):
        imported(tmp_path / "context")
    stage("KL").save_pretrained(tmp_path / "vae")
    import_weights.main([str(tmp_path / "vae"), "--out", str(tmp_path / "vae.ckpt")])
    theirs().save_pretrained(tmp_path / "latent" / "unet")
    scheduler().save_pretrained(tmp_path / "latent" / "scheduler")
    codec = {"class_path": "FirstStage", "checkpoint": str(tmp_path / "vae.ckpt")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"codec": codec}}))
    with pytest.raises(ValueError, match=r"by which factor latents were scaled; set model\.codec\.scale"):
        imported(tmp_path / "latent", "-c", str(tmp_path / "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"codec": {**codec, "scale": 0.5}}}))
    assert imported(tmp_path / "latent", "-c", str(tmp_path / "recipe.yaml")).image_shape == (3, 32, 32)


def test_a_network_with_cross_attention_takes_its_conditioner_from_a_recipe(tmp_path: Path) -> None:
    reference = conditional("plain")
    reference.save_pretrained(tmp_path / "unet")
    conditioner = {"class_path": f"{test_compvis.__name__}.Both"}
    recipe = {"process": {"num_steps": T}, "sampler": {"steps": 5}, "conditioner": conditioner}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": {"init_args": recipe}}))
    out, trust = tmp_path / "unet.ckpt", test_compvis.__name__
    arguments = [str(tmp_path / "unet"), "-c", str(tmp_path / "recipe.yaml"), "--out", str(out), "--trust", trust]
    import_weights.main(arguments)
    network = load_model(out, DiffusionModule, trust=[trust]).denoiser.network
    generator = seeded(6)
    x, context = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    times = torch.tensor([0, 19])
    with torch.no_grad():
        assert_close(network(x, times.float(), {"context": context}), reference(x, times, context).sample)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # CompVis/ldm-celebahq-256: the defaults of UNet2DModel are its network.
        ({"_class_name": "UNet2DModel", "attention_head_dim": 32, "sample_size": 64}, 274_056_163),
        (
            {
                "_class_name": "VQModel", "act_fn": "silu", "block_out_channels": [128, 256, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 3, "in_channels": 3, "latent_channels": 3,
                "layers_per_block": 2, "norm_num_groups": 32, "num_vq_embeddings": 8192, "out_channels": 3,
                "sample_size": 256, "up_block_types": ["UpDecoderBlock2D"] * 3,
            },
            55_322_782,
        ),
        # The autoencoder of Stable Diffusion, kl-f8.
        (
            {
                "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
                "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4,
                "layers_per_block": 2, "out_channels": 3, "sample_size": 512,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
            },
            83_653_863,
        ),
    ],
    ids=["ldm-celebahq-256", "vq-f4", "kl-f8"],
)  # fmt: skip
def test_configurations_of_published_models_are_the_published_networks(config: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        part, _, network = equal_network(config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert part["class_path"] == type(network).__name__


# Out


def exported(path: Path, *options: str) -> Path:
    folder = path.parent / "exported"
    export_weights.main([str(path), "--to", "diffusers", "--out", str(folder), *options])
    return folder


def own_checkpoint(folder: Path, codec: dict[str, Any], regularizer: str = "KL", **network: Any) -> Path:
    """Of a model in the layout of latent diffusion's code, with an autoencoder of its own."""
    sizes = {**test_compvis.STAGE, "regularizer": "DiagonalGaussian" if regularizer == "KL" else test_compvis.CODES}
    part = {"class_path": "Autoencoder", "init_args": sizes}
    torch.manual_seed(3)
    made = test_compvis.first_stage() if regularizer == "VQ" else Autoencoder(**test_compvis.STAGE)
    state = {
        name: tensor
        for name, tensor in test_compvis.latent_diffusion(**network).items()
        if not name.startswith(("first_stage_model.", "scale_factor"))
    }
    state |= {f"first_stage_model.{name}": tensor for name, tensor in test_compvis.state_of(made, 3).items()}
    trust = test_compvis.__name__
    more = {"conditioner": {"class_path": f"{trust}.Both"}} if network else {}
    recipe = test_compvis.recipe(
        folder, codec={"class_path": "FirstStage", "init_args": {"network": part, **codec}}, network=network, **more
    )
    test_compvis.imported(test_compvis.saved(folder, state), recipe, trust=trust)
    return folder / "imported.ckpt"


SHIFTED = {"scale": [0.5, 2.0, 1.25], "shift": [0.1, -0.7, 0.3]}


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("regularizer", "codec", "scale"),
    [
        ("KL", {"scale": 0.18215}, 0.18215),
        ("KL", SHIFTED, 1.0),
        ("KL", {"scale": 0.5, "shift": 0.25}, 1.0),
        ("VQ", {}, 1.0),
    ],
    ids=["KL", "KL, by channel", "KL, shifted", "VQ"],
)
@torch.no_grad()
def test_our_model_draws_the_same_images_there(
    regularizer: str, codec: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    path = own_checkpoint(tmp_path, codec, regularizer)
    model = load_model(path, DiffusionModule)
    pipeline = load(exported(path))
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert type(pipeline.vqvae) is (AutoencoderKL if regularizer == "KL" else VQModel)
    assert pipeline.vqvae.config.scaling_factor == scale
    expected = drawn_here(model)
    assert expected.std() > 0.05
    assert_close(drawn_there(pipeline), expected, tolerance=1e-4)
    # And what is encoded there is what was diffused here.
    x = torch.rand(1, 3, 16, 16, generator=seeded(4)) * 2 - 1
    there = pipeline.vqvae.encode(x)
    latents = there.latents if regularizer == "VQ" else there.latent_dist.mode()
    assert_close(scale * latents, model.codec.encode(x), tolerance=1e-4)
    if regularizer == "KL":
        assert isinstance(model.codec, FirstStage)
        moments = model.codec.moments(x)
        deviation = (moments[:, 3:] / 2).exp() * model.codec.scale.view(1, -1, 1, 1)
        assert_close(scale * there.latent_dist.std, deviation, tolerance=1e-4)


def test_a_scale_written_is_the_number_that_was_given(tmp_path: Path) -> None:
    folder = exported(own_checkpoint(tmp_path, {"scale": 0.18215}))
    assert json.loads((folder / "vqvae" / "config.json").read_text())["scaling_factor"] == 0.18215


@pytest.mark.further
def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, {"scale": 0.5})
    first = load_model(path, DiffusionModule)
    again = imported(exported(path))
    assert torch.equal(drawn_here(again), drawn_here(first))
    assert again.codec.scale.tolist() == [0.5] * 3


@torch.no_grad()
def test_a_network_with_further_inputs_is_written_without_a_pipeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = own_checkpoint(tmp_path, {"scale": 0.5}, context_width=6, concat_channels=2)
    folder = exported(path, "--trust", test_compvis.__name__)
    assert "takes encoder_hidden_states and further channels of the sample" in capsys.readouterr().out
    assert sorted(item.name for item in folder.iterdir()) == ["scheduler", "unet", "vqvae"]
    model = load_model(path, DiffusionModule, trust=[test_compvis.__name__])
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
    x, context, concat = noise(2, 3), torch.randn(2, 4, 6, generator=seeded(1)), noise(2, 2)
    found = model.denoiser.network(x, torch.tensor([3.0, 3.0]), {"context": context, "concat": concat})
    assert_close(found, unet(torch.cat([x, concat], 1), 3, context).sample)


@pytest.mark.parametrize("kind", ["KL", "VQ"])
@torch.no_grad()
def test_an_autoencoder_alone_goes_out_again(kind: str, tmp_path: Path) -> None:
    reference = stage(kind)
    reference.save_pretrained(tmp_path / "vae")
    import_weights.main([str(tmp_path / "vae"), "--out", str(tmp_path / "vae.ckpt")])
    folder = exported(tmp_path / "vae.ckpt")
    again: Any = type(reference).from_pretrained(folder)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert again.config.scaling_factor == 1.0


def test_quantised_latents_that_are_scaled_by_channel_are_refused(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, SHIFTED, "VQ")
    with pytest.raises(ValueError, match="no VQModel whose latents are shifted or scaled by channel"):
        exported(path)
    assert not (tmp_path / "exported").exists()


def test_a_learned_variance_over_latents_is_refused(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, {"scale": 0.5}, out_channels=6)
    with pytest.raises(ValueError, match="no pipeline over latents with a learned variance"):
        exported(path, "--trust", test_compvis.__name__)


@pytest.mark.further
def test_safetensors_hold_the_whole_model_in_the_published_layout(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path, SHIFTED)
    export_weights.main([str(path), "--to", "safetensors", "--out", str(tmp_path / "out")])
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        prefixes = {name.partition(".")[0] for name in file.keys()}  # noqa: SIM118
    assert prefixes == {"model", "first_stage_model"}
    again = tmp_path / "again.ckpt"
    import_weights.main([str(tmp_path / "out" / "model.safetensors"), "--out", str(again)])
    first, second = (load_model(p, DiffusionModule) for p in (path, again))
    assert torch.equal(drawn_here(second), drawn_here(first))
