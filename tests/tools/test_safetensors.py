"""Safetensors that `export` writes: they say what they are, and `import` needs nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_lit.checkpoint import load_model
from diffusion_lit.configuration import Untrusted
from diffusion_lit.diffusion import DDIM
from diffusion_lit.module import DiffusionModule
from diffusion_lit.tools import export_weights, import_weights
from tests.tools.diffusers_models import T, checkpoint, ours


def exported(folder: Path) -> Path:
    export_weights.main([checkpoint(folder), "--to", "safetensors", "--out", str(folder / "out")])
    return folder / "out" / "model.safetensors"


def imported(file: Path, *options: str) -> DiffusionModule:
    out = file.parent / "again.ckpt"
    import_weights.main([str(file), "--out", str(out), *options])
    return load_model(out, DiffusionModule)


def with_model(file: Path, model: object) -> Path:
    """The file with another configuration in its metadata."""
    save_file(load_file(file), file, metadata={"format": "pt", "model": json.dumps(model)})
    return file


def test_they_say_what_they_are(tmp_path: Path) -> None:
    with safe_open(exported(tmp_path), "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(ours().state_dict())
    expected = {"format": "pt", "network": "UNet", "weights": "0.9999", "step": "123"}
    assert {key: metadata[key] for key in expected} == expected


def test_they_go_back_in_without_a_recipe(tmp_path: Path) -> None:
    again = imported(exported(tmp_path))
    for name, tensor in ours().state_dict().items():
        assert torch.equal(again.denoiser.network.get_parameter(name), tensor)
    assert again.process.num_steps == T
    assert isinstance(again.sampler, DDIM)
    assert again.sampler.steps == 10


def test_the_folder_that_export_names_will_do_too(tmp_path: Path) -> None:
    folder = exported(tmp_path).parent
    abandoned = tmp_path / "again.ckpt.123.part"  # by an import that was killed
    abandoned.touch()
    again = imported(folder)
    assert (tmp_path / "again.ckpt").is_file()
    assert not list(tmp_path.glob("*.part"))
    held = again.denoiser.network.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in ours().state_dict().items())


def test_a_recipe_is_laid_over_what_they_say(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {sampler: {steps: 7}}\ndata: {source: Digits}\n")
    again = imported(exported(tmp_path), "-c", str(recipe))
    assert again.sampler.steps == 7
    assert again.process.num_steps == T
    config = torch.load(tmp_path / "out" / "again.ckpt", weights_only=True)["config"]
    assert config["data"]["init_args"]["source"]["class_path"].endswith(".Digits")


PLACES = ["network", "process", "sampler", "optimizer", "codec"]
FOREIGN = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "owned"]}}


@pytest.mark.parametrize("recipe", ["modle: {network: UNet}", "modle.network: UNet", "extra: 1"])
def test_a_section_that_there_is_not_is_refused(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(recipe)
    with pytest.raises(ValueError, match=r"odd\.yaml: unknown key '(modle|modle\.network|extra)'"):
        imported(exported(tmp_path), "-c", str(tmp_path / "odd.yaml"))


def test_sections_of_other_commands_and_dotted_keys_are_no_mistakes(tmp_path: Path) -> None:
    (tmp_path / "whole.yaml").write_text("trainer.max_steps: 3\nnum_images: 4\nmodel.sampler.steps: 7\n")
    assert imported(exported(tmp_path), "-c", str(tmp_path / "whole.yaml")).sampler.steps == 7


@pytest.mark.parametrize("place", PLACES)
def test_their_configuration_may_name_no_other_code(place: str, tmp_path: Path) -> None:
    file = exported(tmp_path)
    with safe_open(file, "pt") as content:
        model: dict[str, Any] = json.loads(content.metadata()["model"])
    for foreign in (FOREIGN, "os.system"):
        model["init_args"][place] = foreign
        with pytest.raises(Untrusted, match=f"{file}: model.{place}: (subprocess|os).* is not part of diffusion_lit"):
            imported(with_model(file, model))
    with pytest.raises(Untrusted, match=f"{file}: model: subprocess.Popen is not part"):
        imported(with_model(file, FOREIGN))
    assert not Path("owned").exists()
    assert not (file.parent / "again.ckpt").exists()


def test_a_class_of_ones_own_needs_to_be_trusted_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "package_of_a_user.py").write_text(
        "from diffusion_lit.networks import UNet\n\n\nclass Mine(UNet):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = exported(tmp_path)
    with safe_open(file, "pt") as content:
        model: dict[str, Any] = json.loads(content.metadata()["model"])
    model["init_args"]["network"]["class_path"] = "package_of_a_user.Mine"
    with pytest.raises(Untrusted, match="add --trust package_of_a_user"):
        imported(with_model(file, model))
    import_weights.main([str(file), "--out", str(tmp_path / "x.ckpt"), "--trust", "package_of_a_user"])
    again = load_model(tmp_path / "x.ckpt", DiffusionModule, trust=["package_of_a_user"])
    assert type(again.denoiser.network).__name__ == "Mine"
    again_out = ["--to", "safetensors", "--out", str(tmp_path / "twice")]
    with pytest.raises(Untrusted, match="add --trust package_of_a_user"):
        export_weights.main([str(tmp_path / "x.ckpt"), *again_out])
    export_weights.main([str(tmp_path / "x.ckpt"), *again_out, "--trust", "package_of_a_user"])


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "is not JSON"), ("[1]", "holds no JSON object"), ('{"init_args": 3}', "must be keys and values, not 3")],
)
def test_damaged_metadata_are_refused(text: str, words: str, tmp_path: Path) -> None:
    file = exported(tmp_path)
    save_file(load_file(file), file, metadata={"model": text})
    with pytest.raises(ValueError, match=words):
        imported(file)


def test_without_their_metadata_a_recipe_is_asked_for(tmp_path: Path) -> None:
    file = exported(tmp_path)
    save_file(load_file(file), file)
    with pytest.raises(ValueError, match="does not say which network it is of: give a recipe by -c"):
        imported(file)


@pytest.mark.further
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    file = exported(tmp_path)
    with safe_open(file, "pt") as content:
        metadata = content.metadata()
    tensors = load_file(file)
    tensors["conv_in.bias"][2] = float("nan")
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ValueError, match=r"infinite or not a number.*: conv_in\.bias; use weights from before"):
        imported(file)
    assert not (file.parent / "again.ckpt").exists()
