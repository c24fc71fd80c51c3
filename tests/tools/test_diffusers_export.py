"""Models exported to diffusers: the same input gives the same output there, and the same noise the same images."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusion_lit.checkpoint import load_model
from diffusion_lit.codec import Pixels
from diffusion_lit.diffusion import (
    DDIM,
    X0,
    Ancestral,
    ClassifierFree,
    Cosine,
    DiscreteProcess,
    Eps,
    FixedLarge,
    FixedSmall,
    Grid,
    Leading,
    LearnedRange,
    Linear,
    Parameterization,
    PosteriorMean,
    Preconditioned,
    Quadratic,
    ScaledLinear,
    Schedule,
    Sigmoid,
    Spanning,
    Trailing,
    Uniform,
    V,
    VariancePreserving,
)
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet
from diffusion_lit.tools import diffusers_writer, export_weights, scheduler, unet2d
from diffusion_lit.tools.tensor_names import to_diffusers
from diffusion_lit.types import Condition, Network
from tests.tools.diffusers_models import (
    T,
    assert_close,
    checkpoint,
    images,
    imported,
    ours,
    randomised,
    same_noise,
    seeded,
)


def exported(path: str, *options: str) -> Path:
    folder = Path(path).parent / "exported"
    export_weights.main([path, "--to", "diffusers", "--out", str(folder), *options])
    return folder


OWN_NETWORKS: dict[str, dict[str, Any]] = {
    "as DDPM's": {},
    "without attention": {"attention": []},
    "many heads of one width": {"num_heads": 4},
    "attention everywhere": {"attention": [8, 4, 2], "multipliers": [1, 1, 2], "num_blocks": 2, "in_channels": 1},
    "a learned variance": {"out_channels": 6},
}


@pytest.mark.parametrize("changes", OWN_NETWORKS.values(), ids=OWN_NETWORKS)
@torch.no_grad()
def test_our_network_gives_the_same_output_there(changes: dict[str, Any]) -> None:
    network = ours(**changes)
    config = unet2d.configuration(network)
    unet = UNet2DModel.from_config(config).eval()
    unet.load_state_dict(to_diffusers(network), strict=True)
    x, times = images(unet, network.in_channels), torch.tensor([0.0, 19.0])
    assert_close(network(x, times), unet(x, times).sample)
    assert unet.config.dropout == 0.1


def adm(**changes: Any) -> ADMUNet:
    sizes = {"width": 8, "multipliers": [1, 2], "num_blocks": 1, "attention": [4], "num_groups": 4, "dropout": 0.1}
    network: ADMUNet = randomised(ADMUNet(8, **{**sizes, **changes}))
    return network


ADM_NETWORKS: dict[str, dict[str, Any]] = {
    "as ADM's": {"out_channels": 6, "head_channels": 4, "attention": [8, 4], "num_blocks": 2},
    "queries, keys and values first": {"num_heads": 2, "qkv_first": True},
    "heads first": {"num_heads": 2},
    "without attention": {"attention": [], "num_heads": 2, "multipliers": [1, 1.5, 2]},
    "as improved diffusion's": {"resblock_updown": False, "num_heads": 4, "multipliers": [1, 1, 1], "attention": [2]},
    "embedding added": {"scale_shift_norm": False, "multipliers": [1], "attention": [8]},
    "classes": {"num_classes": 5},
    "classes and none": {"num_classes": 5, "null_label": True, "in_channels": 1},
}


@pytest.mark.parametrize("changes", ADM_NETWORKS.values(), ids=ADM_NETWORKS)
@torch.no_grad()
def test_adms_network_gives_the_same_output_there(changes: dict[str, Any]) -> None:
    network = adm(**changes)
    config = unet2d.configuration(network)
    unet = UNet2DModel.from_config(config).eval()
    unet.load_state_dict(to_diffusers(network), strict=True)
    x, times = images(unet, network.in_channels), torch.tensor([0.0, 19.0])
    if "num_classes" not in changes:
        assert_close(network(x, times), unet(x, times).sample)
    for label in [[0, 4], [2, 2]] if "num_classes" in changes else []:
        assert_close(network(x, times, {"label": torch.tensor(label)}), unet(x, times, torch.tensor(label)).sample)
    if "null_label" in changes:
        assert_close(network(x, times), unet(x, times, torch.tensor([5, 5])).sample)
    assert unet.config.dropout == 0.1


def test_the_exported_pipelines_images_are_those_of_adms_network(tmp_path: Path) -> None:
    network = adm(out_channels=6, head_channels=4)
    model = DiffusionModule(network, DiscreteProcess(T), sampler=Ancestral(variance=LearnedRange())).eval()
    diffusers_writer.write_diffusers(model, tmp_path / "pipeline")
    there = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert_close(*same_noise(there.scheduler, there.unet, model, T), tolerance=1e-4)
    again = imported(tmp_path / "pipeline").denoiser.network
    assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in network.named_parameters())


def test_a_network_with_classes_goes_without_a_pipeline_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = adm(num_classes=5)
    folder = exported(checkpoint(tmp_path, network, num_classes=5))
    assert "call it in a loop of your own" in capsys.readouterr().out
    assert not (folder / "model_index.json").exists()
    unet, label = UNet2DModel.from_pretrained(folder / "unet"), torch.tensor([3, 1])
    x, times = images(unet), torch.tensor([0.0, 19.0])
    with torch.no_grad():
        assert_close(network(x, times, {"label": label}), unet(x, times, label).sample)
    assert imported(folder).num_classes == 5


@pytest.mark.further
@torch.no_grad()
def test_a_null_label_is_no_class_when_it_comes_back(tmp_path: Path) -> None:
    """Diffusers counts its row as a class: that it is none an export says, and of other networks a recipe."""
    network = adm(num_classes=5, null_label=True)
    made = DiffusionModule(network, DiscreteProcess(T), sampler=Ancestral())
    diffusers_writer.write_diffusers(made, tmp_path / "ours")
    unet = UNet2DModel.from_pretrained(tmp_path / "ours" / "unet")
    assert unet.config.num_class_embeds == 6
    UNet2DModel.from_pretrained(tmp_path / "ours" / "unet").save_pretrained(tmp_path / "theirs")
    (tmp_path / "recipe.yaml").write_text(
        "model: {network: {class_path: ADMUNet, null_label: true}, process: {num_steps: 20}, sampler: {steps: 5}}"
    )
    recipe = ["-c", str(tmp_path / "recipe.yaml")]
    x, times = images(unet), torch.tensor([0.0, 19.0])
    for model in (imported(tmp_path / "ours"), imported(tmp_path / "theirs", *recipe)):
        assert model.num_classes == 5
        assert_close(model.denoiser.network(x, times), unet(x, times, torch.tensor([5, 5])).sample)
        ClassifierFree().check(model.denoiser, model.conditioner)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multipliers": [2, 1]}, ["channels [16, 8] and width=8"]),
        ({"attention": [8, 4], "num_heads": 2}, ["num_heads=2", "[8, 16] channels"]),
        ({"residual_rescale": True}, ["residual_rescale=true"]),
    ],
)
def test_a_form_of_adms_network_that_diffusers_has_not_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="diffusers has no") as error:
        unet2d.configuration(adm(**changes))
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"multipliers": [2, 1]}, ["channels [16, 8] and width=8"]),
        ({"attention": [8, 4], "num_heads": 2}, ["num_heads=2", "[8, 16] channels"]),
    ],
)
def test_a_network_that_diffusers_has_not_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="diffusers has no network") as error:
        unet2d.configuration(ours(**changes))
    for word in words:
        assert word in str(error.value)


PARAMETERIZATIONS: list[tuple[Parameterization, Schedule]] = [
    (Eps(), Linear()),
    (X0(), ScaledLinear(0.01, 0.1)),
    (V(), Cosine()),
    (V(), Cosine(0.02)),
    (Eps(), Sigmoid()),
]


@pytest.mark.few(10)
@pytest.mark.parametrize(("parameterization", "schedule"), PARAMETERIZATIONS)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("grid", [Uniform(), Trailing(), Leading(1, clean=False)])
def test_the_exported_pipelines_ddim_images_are_ours(
    parameterization: Parameterization, schedule: Schedule, clip: bool, grid: Grid, tmp_path: Path
) -> None:
    model = DiffusionModule(
        ours(), DiscreteProcess(T, schedule), parameterization, sampler=DDIM(10, grid=grid, clip=clip)
    ).eval()
    diffusers_writer.write_diffusers(model, tmp_path / "pipeline")
    there = DDIMPipeline.from_pretrained(tmp_path / "pipeline")
    assert isinstance(there.scheduler, DDIMScheduler)
    pair = same_noise(there.scheduler, there.unet, model, 10, use_clipped_model_output=clip)
    assert_close(*pair, tolerance=1e-4)


@pytest.mark.parametrize("variance", [FixedLarge(), FixedSmall(), LearnedRange()])
def test_the_exported_pipelines_ddpm_images_are_ours(variance: Any, tmp_path: Path) -> None:
    network = ours(out_channels=6 if isinstance(variance, LearnedRange) else 3)
    model = DiffusionModule(network, DiscreteProcess(T), sampler=Ancestral(variance=variance)).eval()
    diffusers_writer.write_diffusers(model, tmp_path / "pipeline")
    there = DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    assert_close(*same_noise(there.scheduler, there.unet, model, T), tolerance=1e-4)


@pytest.mark.parametrize("kind", [DDIMPipeline, DDPMPipeline])
def test_the_pipelines_draw_images_by_themselves(kind: Callable[..., Any], tmp_path: Path) -> None:
    folder = exported(checkpoint(tmp_path))
    there = kind.from_pretrained(folder)  # type: ignore[attr-defined]
    there.set_progress_bar_config(disable=True)
    own = {"use_clipped_model_output": True} if kind is DDIMPipeline else {}
    drawn = there(batch_size=2, generator=seeded(), num_inference_steps=10, output_type="pt", **own).images
    assert drawn.shape == (2, 3, 8, 8)
    if kind is DDIMPipeline:
        model = load_model(tmp_path / "last.ckpt", DiffusionModule)
        noise = torch.randn(2, 3, 8, 8, generator=seeded())
        assert_close((model.generate_from(noise, DDIM(10)) / 2 + 0.5).clamp(0, 1), drawn, tolerance=1e-4)


@torch.no_grad()
def test_what_was_exported_comes_back_as_it_was(tmp_path: Path) -> None:
    sampler = {
        "class_path": "diffusion_lit.diffusion.Ancestral",
        "init_args": {"steps": None, "variance": {"class_path": "diffusion_lit.diffusion.FixedLarge"}, "clip": False}
        | {"grid": {"class_path": "diffusion_lit.diffusion.Spanning"}},
    }
    network = ours()
    path = checkpoint(tmp_path, network, sampler=sampler, parameterization="diffusion_lit.diffusion.V")
    again = imported(exported(path))
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.denoiser.network.get_parameter(name), tensor)
    assert isinstance(again.sampler, Ancestral)
    assert isinstance(again.sampler.variance, FixedLarge)
    assert isinstance(again.sampler.grid, Spanning)
    assert not again.sampler.clip
    assert isinstance(again.denoiser.parameterization, V)
    assert again.process.num_steps == T


class ConvNetwork(Network):
    """A network that diffusers does not have."""

    image_size, in_channels = 8, 3

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        return x


class Halves(Pixels):
    """Latents that are not the images."""


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"network": ConvNetwork()}, "ConvNetwork"),
    ({"codec": Halves()}, "Halves"),
    ({"process": VariancePreserving()}, "VariancePreserving: DDPMScheduler and DDIMScheduler have a chain"),
    ({"parameterization": Preconditioned()}, "Preconditioned"),
    ({"parameterization": PosteriorMean()}, "PosteriorMean"),
    ({"process": DiscreteProcess(T, network_steps=1000)}, "network_steps=1000"),
    ({"network": ours(out_channels=4)}, "out_channels=4"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_a_model_that_diffusers_has_not_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = DiffusionModule(**{"network": ours(), "process": DiscreteProcess(T), "sampler": DDIM(10), **changes})
    with pytest.raises(ValueError, match=f"diffusers has no .*{words}"):
        export_weights.write_whole(
            tmp_path / "pipeline", lambda folder: diffusers_writer.write_diffusers(model, folder)
        )
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_behind_is_removed_by_the_next(tmp_path: Path) -> None:
    out, torn = tmp_path / "out", tmp_path / ".out.part" / "torn"
    torn.parent.mkdir()
    torn.touch()
    export_weights.write_whole(out, Path.mkdir)
    assert list(tmp_path.rglob("*")) == [out]


def test_a_grid_that_diffusers_has_not_becomes_its_usual_one() -> None:
    model = DiffusionModule(ours(), DiscreteProcess(T), sampler=DDIM(10, grid=Quadratic()))
    config = scheduler.configuration(model.process, model.denoiser.parameterization, model.sampler, ours())
    assert config["timestep_spacing"] == "leading"


# Which weights


@pytest.mark.parametrize(
    ("weights", "added", "name"), [("averaged", 0, "0.9999"), ("raw", 1, "raw"), ("0.5", 2, "0.5")]
)
@pytest.mark.parametrize("to", ["diffusers", "safetensors"])
def test_any_average_can_be_exported(weights: str, added: int, name: str, to: str, tmp_path: Path) -> None:
    path, folder = checkpoint(tmp_path), tmp_path / "out"
    export_weights.main([path, "--to", to, "--out", str(folder), "--weights", weights])
    if to == "diffusers":
        tensor = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")["conv_norm_out.bias"]
    else:
        tensor = load_file(folder / "model.safetensors")["norm_out.bias"]
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata()["weights"] == name
    assert torch.equal(tensor, ours().norm_out.bias + added)


def test_weights_that_are_not_there_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    path, folder = checkpoint(tmp_path), tmp_path / "out"
    with pytest.raises(ValueError, match=r"weights='0\.9' are not in the checkpoint; it has \['0\.5'"):
        export_weights.main([path, "--to", "safetensors", "--out", str(folder), "--weights", "0.9"])
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds something already"):
        export_weights.main([path, "--to", "safetensors", "--out", str(folder)])
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]


def test_neither_tool_imports_diffusers(repository: Path) -> None:
    for file in (repository / "diffusion_lit").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) diffusers\b", file.read_text(), re.MULTILINE), file
