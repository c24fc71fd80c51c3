"""Pipelines of diffusers that are told what to show: they draw the same images here, from the same noise."""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PNDMScheduler
from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion_superresolution as low_resolutions
from safetensors.torch import load_file
from torch import Tensor

from diffusion_lit import cli
from diffusion_lit.checkpoint import load_model
from diffusion_lit.conditioners import CLIPText, Joint, LowResolution, MaskedImage, Text, WordPiece
from diffusion_lit.diffusion import DDIM, PLMS, ClassifierFree, Uniform
from diffusion_lit.module import DiffusionModule
from diffusion_lit.text import encode_text
from diffusion_lit.tools import diffusers_writer
from tests.tools import diffusers_pipelines as made
from tests.tools.diffusers_models import T, imported, seeded

STEPS = 5
PROMPTS = ["the seven", "a 7 " * 60]
"""The second is longer than 77 tokens."""
FILLED = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
TOLERANCE = 1e-4
agree = partial(torch.testing.assert_close, rtol=1e-5, atol=TOLERANCE)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def noise(model: DiffusionModule) -> Tensor:
    return model.noise([3, 4], 7).draw()


def here(model: DiffusionModule, condition: dict[str, Tensor], scale: float | None = None) -> Tensor:
    """Images in [0, 1], (2, C, H, W)."""
    assert isinstance(model.sampler, DDIM | PLMS)
    model.sampler.steps = STEPS
    if scale is not None:
        assert isinstance(model.guidance, ClassifierFree)
        model.guidance.scale = scale - 1
    return (model.sample([3, 4], 7, condition=condition) / 2 + 0.5).clamp(0, 1)


def there(folder: Path, **asked: Any) -> Tensor:
    """Images of the pipeline in a folder, likewise."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(num_inference_steps=STEPS, output_type="pt", **asked).images
    assert images.std() > 0.05
    return images


@pytest.fixture(scope="module", autouse=True)
def warnings_of_cut_texts() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_lit.conditioners.text.Prompts.warn", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Of each kind one pipeline, saved once."""
    place = tmp_path_factory.mktemp("pipelines")

    def folder(kind: str) -> Path:
        if not (place / kind).exists():
            made.saved(getattr(made, kind)(), place / kind)
        return place / kind / "pipeline"

    return folder


Folders = Callable[[str], Path]


def model_of(folder: Path) -> Any:
    """What is imported, read from its checkpoint."""
    checkpoint = folder.parent / "pipeline.ckpt"
    return load_model(checkpoint, DiffusionModule) if checkpoint.exists() else imported(folder)


def test_texts_of_latent_diffusion(folders: Folders) -> None:
    model = model_of(folders("text_to_image"))
    assert isinstance(model.conditioner, Text)
    asked = {"prompt": PROMPTS, "latents": noise(model), "height": 64, "width": 64}
    # A scale of 1, that of the pipeline by default, is unguided in both.
    assert model.guidance.scale == 0
    given = {"caption": encode_text(PROMPTS)}
    plain = here(model, given)
    agree(plain, there(folders("text_to_image"), **asked))
    guided = here(model, given, 4.0)
    expected = there(folders("text_to_image"), guidance_scale=4.0, **asked)
    agree(guided, expected)
    assert (guided - plain).abs().max() > 0.01
    # The text matters, and what was beyond 77 tokens does not.
    other = here(model, {"caption": encode_text(["x y z " * 20, "a 7 " * 50])}, 4.0)
    assert (other[0] - guided[0]).abs().max() > 0.01
    agree(other[1], guided[1])


@pytest.mark.further
def test_texts_of_stable_diffusion(folders: Folders) -> None:
    folder = folders("stable_diffusion")
    model = model_of(folder)
    assert isinstance(model.conditioner, CLIPText)
    assert model.guidance.scale == 6.5
    assert (model.sampler.grid.offset, model.sampler.grid.clean) == (1, False)
    given = {"caption": encode_text(PROMPTS)}
    asked = {"prompt": PROMPTS, "latents": noise(model)}
    agree(here(model, given), there(folder, **asked))
    agree(here(model, given, 1.0), there(folder, guidance_scale=1.0, **asked))


@pytest.mark.further
def test_the_scheduler_of_stable_diffusion(folders: Folders, tmp_path: Path) -> None:
    """That of its published folders; and what the pipeline sets, whatever the folder says."""
    pndm = PNDMScheduler(T, 0.02, 0.5, "scaled_linear", skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    folder = made.saved(made.stable_diffusion(scheduler=pndm), tmp_path)
    model = imported(folder)
    assert isinstance(model.sampler, PLMS)
    asked = {"prompt": PROMPTS, "latents": noise(model)}
    given = {"caption": encode_text(PROMPTS)}
    agree(here(model, given), there(folder, **asked))
    old = shutil.copytree(folders("stable_diffusion"), tmp_path / "old")
    path = old / "scheduler" / "scheduler_config.json"
    config = {**json.loads(path.read_text()), "clip_sample": True, "steps_offset": 0}
    path.write_text(json.dumps(config))
    with pytest.warns(FutureWarning, match=r"clip_sample|steps_offset"):
        expected = there(old, **asked)
    agree(here(imported(old), given), expected)


def holes() -> tuple[Tensor, Tensor]:
    """Two images in [0, 1], and where they are known."""
    known = torch.ones(2, 1, 16, 16)
    known[0, :, 3:11, 2:9] = 0
    known[1, :, :, 7:] = 0
    return torch.rand(2, 3, 16, 16, generator=seeded(4)), known


def test_inpainting_of_stable_diffusion(folders: Folders) -> None:
    """In holes; elsewhere images here are what was given, and the pipeline's what the network makes of it."""
    folder = folders("inpainting")
    model = model_of(folder)
    assert isinstance(model.conditioner, Joint)
    assert [type(part) for part in model.conditioner.conditioners] == [CLIPText, MaskedImage]
    image, known = holes()
    given = {"caption": encode_text(PROMPTS), "image": 2 * image - 1, "mask": known}
    found = here(model, given)
    expected = there(folder, prompt=PROMPTS, image=image, mask_image=1 - known, latents=noise(model))
    hole = (known == 0).expand_as(image)
    agree(found[hole], expected[hole])
    agree(found[~hole], image[~hole])
    # Guidance leaves the masked image as it is: the pipeline repeats it for the empty text.
    assert model.conditioner.null({"context": torch.ones(1, 77, 16), "concat": torch.ones(1, 5, 8, 8)})["concat"].all()


def test_super_resolution(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline decodes latents without the factor in the configuration of its autoencoder."""
    folder = folders("super_resolution")
    model = model_of(folder)
    assert isinstance(model.conditioner, LowResolution)
    assert model.codec.scale.tolist() == [1.0] * 3
    low = torch.rand(2, 3, 8, 8, generator=seeded(4)) * 2 - 1
    monkeypatch.setattr(low_resolutions, "randn_tensor", lambda *_, **__: noise(model))
    agree(here(model, {"low_res": low}), there(folder, image=low))


def refused(folder: Path, capsys: Any) -> str:
    """The line in which an import ends, of which nothing is left behind."""
    capsys.readouterr()
    out = folder.parent / "refused.ckpt"
    with pytest.raises(SystemExit):
        cli.main(["import", str(folder), "--out", str(out)])
    assert not out.exists()
    [line] = capsys.readouterr().err.splitlines()
    assert "Errors:" not in line
    return str(line)


@pytest.mark.few(10)
@pytest.mark.parametrize(
    ("kind", "file", "changes", "words"),
    [
        (
            "text_to_image",
            "model_index.json",
            {"_class_name": "KandinskyPipeline"},
            ["is a KandinskyPipeline; only DDPM"],
        ),
        (
            "text_to_image",
            "model_index.json",
            {"bert": ["transformers", "T5EncoderModel"]},
            ["bert is a T5EncoderModel"],
        ),
        ("stable_diffusion", "model_index.json", {"text_encoder": [None, None]}, ["text_encoder is a None; only CLIP"]),
        ("text_to_image", "bert/config.json", {"activation_function": "relu"}, ["activation_function='relu'"]),
        ("text_to_image", "bert/config.json", {"encoder_ffn_dim": 32}, ["encoder_ffn_dim=32 where ours has 64"]),
        ("text_to_image", "bert/config.json", {"max_position_embeddings": 76}, ["max_position_embeddings=76"]),
        ("text_to_image", "bert/config.json", {"model_type": "bert"}, ["model_type='bert'", "LDMBertModel"]),
        ("text_to_image", "bert/config.json", {"encoder_layers": 3}, ["missing: model.layers.2.self_attn"]),
        ("text_to_image", "tokenizer/tokenizer_config.json", {"cls_token": "<s>"}, ["'cls_token': '<s>'"]),
        ("text_to_image", "tokenizer/tokenizer.json", {"model": {"type": "BPE"}}, ["is a BPE tokenizer"]),
        ("text_to_image", "unet/config.json", {"class_embed_type": "timestep"}, ["class_embed_type='timestep'"]),
        (
            "text_to_image",
            "unet/config.json",
            {"addition_embed_type": "text_time"},
            ["addition_embed_type='text_time'"],
        ),
        ("text_to_image", "unet/config.json", {"time_cond_proj_dim": 8}, ["time_cond_proj_dim=8"]),
        ("text_to_image", "scheduler/scheduler_config.json", {"clip_sample": True}, ["latents have no bounds"]),
        ("text_to_image", "scheduler/scheduler_config.json", {"trained_betas": [0.1]}, ["trained_betas=[0.1]"]),
        ("text_to_image", "scheduler/scheduler_config.json", {"steps_offset": -1}, ["steps_offset=-1"]),
        (
            "text_to_image",
            "scheduler/scheduler_config.json",
            {"set_alpha_to_one": False, "timestep_spacing": "trailing"},
            ["set_alpha_to_one=False", "'trailing'"],
        ),
        ("stable_diffusion", "vae/config.json", {"shift_factor": 0.1}, ["shift_factor=0.1"]),
        ("stable_diffusion", "text_encoder/config.json", {"use_attention_mask": True}, ["use_attention_mask"]),
        ("stable_diffusion", "text_encoder/config.json", {"num_hidden_layers": 3}, ["of its weights are missing"]),
        ("stable_diffusion", "tokenizer/tokenizer_config.json", {"model_max_length": 20}, ["makes 20 tokens", "77"]),
        ("stable_diffusion", "model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, ["in_channels=4"]),
    ],
)
def test_a_pipeline_without_an_equal_is_refused_in_one_line(
    kind: str, file: str, changes: dict[str, Any], words: list[str], folders: Folders, tmp_path: Path, capsys: Any
) -> None:
    folder = shutil.copytree(folders(kind), tmp_path / "copy")
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    line = refused(folder, capsys)
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("kind", "missing", "words"),
    [
        ("text_to_image", "bert", r"lists bert, and there is no folder .*/copy/bert"),
        ("text_to_image", "tokenizer", r"lists tokenizer, and there is no folder .*/copy/tokenizer"),
        ("text_to_image", "vqvae", r"lists vqvae, and there is no folder .*/copy/vqvae"),
        ("text_to_image", "scheduler", r"copy has no scheduler"),
        ("stable_diffusion", "text_encoder", r"lists text_encoder, and there is no folder .*/copy/text_encoder"),
        ("stable_diffusion", "tokenizer", r"lists tokenizer, and there is no folder .*/copy/tokenizer"),
        ("super_resolution", "unet", r"copy has no diffusion_pytorch_model\.safetensors"),
    ],
)
def test_a_missing_sub_folder_is_named(
    kind: str, missing: str, words: str, folders: Folders, tmp_path: Path, capsys: Any
) -> None:
    folder = shutil.copytree(folders(kind), tmp_path / "copy")
    shutil.rmtree(folder / missing)
    assert re.search(words, refused(folder, capsys))


def test_a_tower_that_has_been_moved_is_named(folders: Folders, tmp_path: Path, capsys: Any) -> None:
    """A checkpoint does not hold the tower of CLIP; it says where it is."""
    folder = shutil.copytree(folders("stable_diffusion"), tmp_path / "copy")
    imported(folder)
    folder.rename(tmp_path / "moved")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["predict", "--ckpt_path", str(tmp_path / "copy.ckpt"), "--prompts", "a three"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"diffusion_lit: error: conditioner.folder={folder} holds no CLIP text model: ")


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["text_to_image", "stable_diffusion", "inpainting", "super_resolution"])
def test_the_image_depends_on_each_condition(kind: str, folders: Folders) -> None:
    """Which comparisons with the pipeline would not show if it did not."""
    model = model_of(folders(kind))
    image, known = holes()
    given = {"caption": encode_text(PROMPTS), "image": 2 * image - 1, "mask": known}
    given["low_res"] = torch.rand(2, 3, 8, 8, generator=seeded(5)) * 2 - 1
    changed = {"caption": encode_text(["x y z " * 20, "1 2 3 " * 20]), "image": 1 - 2 * image, "mask": known.flip(0)}
    changed["low_res"] = -given["low_res"]
    first = here(model, {name: given[name] for name in model.entries})
    for name in model.entries:
        second = here(model, {**{name: given[name] for name in model.entries}, name: changed[name]})
        # Here both masks have a hole.
        assert (second - first)[:, :, 3:11, 7:9].abs().max() > 10 * TOLERANCE, name


def test_what_is_not_imported_is_said(folders: Folders, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(folders("stable_diffusion"), tmp_path / "copy")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    capsys.readouterr()
    imported(folder)
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("; not imported: feature_extractor, safety_checker")


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["text_to_image", "stable_diffusion"])
def test_files_in_half_precision(kind: str, folders: Folders, tmp_path: Path) -> None:
    """Their numbers, in float32."""
    pipeline: Any = getattr(made, kind)().to(torch.float16)
    folder = made.saved(pipeline, tmp_path, variant="fp16")
    assert len(list(folder.glob("*/*.fp16.safetensors"))) == 3
    half, whole = imported(folder), model_of(folders(kind))
    given = {"caption": encode_text(PROMPTS)}
    first, second = (model.conditioner(given, model.codec)["context"] for model in (half, whole))
    assert first.dtype == torch.float32
    assert 0 < (first - second).abs().max() < 0.02 * second.abs().max()
    assert here(half, given).dtype == torch.float32


class Anything:
    """What a pickle may ask for."""


@pytest.mark.further
@pytest.mark.parametrize(("kind", "place"), [("text_to_image", "bert"), ("stable_diffusion", "text_encoder")])
def test_pickles_of_text_encoders(kind: str, place: str, folders: Folders, tmp_path: Path, capsys: Any) -> None:
    """Are read where they hold tensors alone."""
    folder = shutil.copytree(folders(kind), tmp_path / "copy")
    file = folder / place / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save({**tensors, "more": Anything()}, folder / place / "pytorch_model.bin")
    assert "only tensors and plain data" in refused(folder, capsys)
    torch.save(tensors, folder / place / "pytorch_model.bin")
    given = {"caption": encode_text(PROMPTS)}
    first, second = imported(folder), model_of(folders(kind))
    assert torch.equal(*(model.conditioner(given, model.codec)["context"] for model in (first, second)))


# Out


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["text_to_image", "stable_diffusion", "inpainting", "super_resolution"])
def test_a_pipeline_goes_out_as_it_came_in(kind: str, folders: Folders, tmp_path: Path, capsys: Any) -> None:
    """Every tensor and every token; and it comes in again."""
    model_of(folders(kind))
    checkpoint, out = folders(kind).parent / "pipeline.ckpt", tmp_path / "out"
    capsys.readouterr()
    cli.main(["export", str(checkpoint), "--to", "diffusers", "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    first: Any = DiffusionPipeline.from_pretrained(folders(kind))
    again: Any = DiffusionPipeline.from_pretrained(out)
    assert type(again) is type(first)
    assert again.components.keys() == first.components.keys()
    for name, component in first.components.items():
        if isinstance(component, torch.nn.Module):
            expected = {key: value for key, value in component.state_dict().items() if "to_logits" not in key}
            found = {key: value for key, value in again.components[name].state_dict().items() if "to_logits" not in key}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items()), name
    if hasattr(first, "tokenizer"):
        ids = [pipeline.tokenizer(PROMPTS, max_length=77, **FILLED)["input_ids"] for pipeline in (first, again)]
        assert torch.equal(*ids)
    own = {"timestep_spacing", "steps_offset", "set_alpha_to_one", "beta_start", "beta_end", "beta_schedule"}
    for key in {*own, "clip_sample", "prediction_type", "num_train_timesteps"}:
        assert again.scheduler.config[key] == first.scheduler.config[key], key
    assert torch.equal(imported(out).noise([0], 0).draw(), model_of(folders(kind)).noise([0], 0).draw())


def test_a_vocabulary_learned_here_goes_out(folders: Folders, tmp_path: Path) -> None:
    """Without the further tokens that BERT's has."""
    model = load_model(imported_again(folders("text_to_image"), tmp_path), DiffusionModule)
    assert isinstance(model.conditioner, Text)
    model.conditioner.tokenizer = WordPiece()
    model.conditioner.tokenizer.learn(["a bold seven", "the digit three", "a thin 7"], 60)
    assert diffusers_writer.write_diffusers(model, tmp_path / "out") is None
    prompts = ["A thin sevens", "three, xyz 7"]
    asked = {"prompt": prompts, "latents": noise(model), "height": 64, "width": 64}
    tokens = DiffusionPipeline.from_pretrained(tmp_path / "out").tokenizer(prompts, max_length=77, **FILLED)
    assert torch.equal(tokens["input_ids"], model.conditioner.tokens_of(prompts))
    agree(here(model, {"caption": encode_text(prompts)}, 1.0), there(tmp_path / "out", **asked))


def imported_again(folder: Path, place: Path) -> Path:
    """A checkpoint of its own."""
    model_of(folder)
    return Path(shutil.copy(folder.parent / "pipeline.ckpt", place / "own.ckpt"))


def test_where_the_pipeline_has_a_grid_of_its_own_an_export_says_so(folders: Folders, tmp_path: Path) -> None:
    model = model_of(folders("stable_diffusion"))
    model.sampler.grid = Uniform()
    said = diffusers_writer.write_diffusers(model, tmp_path / "out")
    assert said is not None
    assert said.startswith("a StableDiffusionPipeline sets steps_offset=1")
