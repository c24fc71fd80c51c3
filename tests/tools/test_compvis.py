"""Checkpoints in the layout of latent diffusion's code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_lit.checkpoint import load_model
from diffusion_lit.codec import Codec
from diffusion_lit.conditioner import Conditioner
from diffusion_lit.methods.autoencoder.module import AutoencoderModule
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet, Autoencoder, PatchGAN, TextEncoder, VectorQuantizer
from diffusion_lit.tools import export_weights
from diffusion_lit.tools.import_weights import main
from diffusion_lit.types import Condition
from tests.tools.test_published_layouts import random_state

SIZES: dict[str, Any] = {
    "image_size": 8,
    "width": 8,
    "multipliers": [1, 2],
    "num_blocks": 1,
    "attention": [4],
    "num_groups": 4,
}
UNET: dict[str, Any] = {**SIZES, "num_heads": 2, "scale_shift_norm": False, "resblock_updown": False}
STAGE: dict[str, Any] = {key: value for key, value in SIZES.items() if key != "attention"} | {"image_size": 16}
CODES: dict[str, Any] = {"class_path": "VectorQuantizer", "init_args": {"num_codes": 7}}
AUTOENCODER: dict[str, Any] = {"class_path": "Autoencoder", "init_args": {**STAGE, "regularizer": CODES}}
STEPS = 20


def state_of(network: nn.Module, seed: int) -> dict[str, Tensor]:
    return random_state({name: tuple(t.shape) for name, t in network.state_dict().items()}, seed)


def first_stage() -> Autoencoder:
    return Autoencoder(**STAGE, regularizer=VectorQuantizer(7))


def betas() -> Tensor:
    """The schedule that the code calls linear."""
    return torch.linspace(0.0015**0.5, 0.0195**0.5, STEPS, dtype=torch.float64) ** 2


def latent_diffusion(**changes: Any) -> dict[str, Tensor]:
    """A checkpoint's tensors: raw weights of the U-Net, averages, a first stage and what belongs to the process."""
    network = ADMUNet(**{**UNET, **changes})
    raw, averaged = state_of(network, 1), state_of(network, 2)
    return {
        "betas": betas().float(),
        "alphas_cumprod": (1 - betas()).cumprod(0).float(),
        "scale_factor": torch.tensor(0.7),
        **{f"model.diffusion_model.{name}": tensor for name, tensor in raw.items()},
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5, dtype=torch.int32),
        **{"model_ema.diffusion_model" + name.replace(".", ""): tensor for name, tensor in averaged.items()},
        **{f"first_stage_model.{name}": tensor for name, tensor in state_of(first_stage(), 3).items()},
        "first_stage_model.loss.logvar": torch.zeros(()),
    }


def recipe(folder: Path, **init_args: Any) -> str:
    """Of a diffusion model in the latents; the checkpoint that it names for the first stage does not exist."""
    schedule = {"class_path": "ScaledLinear", "init_args": {"beta_start": 0.0015, "beta_end": 0.0195}}
    network = {"class_path": "ADMUNet", "init_args": {**UNET, **init_args.pop("network", {})}}
    process = {"class_path": "DiscreteProcess", "init_args": {"num_steps": STEPS, "schedule": schedule}}
    codec = {"class_path": "FirstStage", "init_args": {"checkpoint": "runs/nowhere.ckpt", "network": AUTOENCODER}}
    sampler = {"class_path": "DDIM", "init_args": {"steps": 5, "clip": False}}
    parts = {"network": network, "process": process, "sampler": sampler, "codec": codec, **init_args}
    return written(folder, {"model": {"class_path": "DiffusionModule", "init_args": parts}})


def stage_recipe(folder: Path, **init_args: Any) -> str:
    loss = {"reduction": "mean", "perceptual": None}
    model = {"class_path": "AutoencoderModule", "init_args": {"network": AUTOENCODER, "loss": loss, **init_args}}
    return written(folder, {"model": model})


def written(folder: Path, content: Mapping[str, Any]) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def saved(folder: Path, state: Mapping[str, Tensor], **beside: Any) -> Path:
    """As Lightning writes it."""
    torch.save({"state_dict": dict(state), "global_step": 7, **beside}, folder / "model.ckpt")
    return folder / "model.ckpt"


def imported(source: Path, recipe_path: str, *options: str, base: Any = DiffusionModule, trust: str = "") -> Any:
    out = source.parent / "imported.ckpt"
    main([str(source), "-c", recipe_path, "--out", str(out), *options, *(["--trust", trust] if trust else [])])
    return load_model(out, base, trust=[trust] if trust else [])


def assert_holds(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)


# The U-Net


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("options", "seed", "said"),
    [
        ([], 2, "averaged weights of {}; --weights raw chooses the others"),
        (["--weights", "averaged"], 2, "averaged weights of {}"),
        (["--weights", "raw"], 1, "raw weights of {}; --weights averaged"),
    ],
)
def test_averaged_weights_are_taken_or_those_asked_for(
    options: list[str], seed: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path, latent_diffusion())
    model = imported(source, recipe(tmp_path), *options)
    assert_holds(model.denoiser.network, state_of(ADMUNet(**UNET), seed))
    assert said.format(source) in capsys.readouterr().out


def test_without_averages_the_raw_weights_are_taken(tmp_path: Path) -> None:
    """As in files of which they were removed."""
    state = {name: t for name, t in latent_diffusion().items() if not name.startswith("model_ema.")}
    model = imported(saved(tmp_path, state), recipe(tmp_path))
    assert_holds(model.denoiser.network, state_of(ADMUNet(**UNET), 1))
    with pytest.raises(ValueError, match="holds one set of weights; leave out --weights raw"):
        imported(saved(tmp_path, state), recipe(tmp_path), "--weights", "raw", "--out", str(tmp_path / "b.ckpt"))


def test_a_network_with_cross_attention_and_concatenated_channels(tmp_path: Path) -> None:
    more: dict[str, Any] = {"context_width": 6, "concat_channels": 3}
    source = saved(tmp_path, latent_diffusion(**more))
    model = imported(
        source, recipe(tmp_path, network=more, conditioner={"class_path": f"{__name__}.Both"}), trust=__name__
    )
    assert_holds(model.denoiser.network, state_of(ADMUNet(**UNET, **more), 2))


@pytest.mark.parametrize("form", ["safetensors", "bare"])
def test_the_tensors_may_lie_in_other_files(form: str, tmp_path: Path) -> None:
    source = tmp_path / ("model.safetensors" if form == "safetensors" else "model.pt")
    if form == "safetensors":
        save_file(latent_diffusion(), source)
    else:
        torch.save(latent_diffusion(), source)
    assert_holds(imported(source, recipe(tmp_path)).denoiser.network, state_of(ADMUNet(**UNET), 2))


def test_missing_and_unknown_tensors_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    state = latent_diffusion()
    del state["model_ema.diffusion_modelout2bias"], state["model.diffusion_model.out.2.bias"]
    state["model.diffusion_model.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing: out\.2\.bias; unknown: extra;"):
        imported(saved(tmp_path, state), recipe(tmp_path))
    assert not (tmp_path / "imported.ckpt").exists()


@pytest.mark.parametrize(
    ("schedule", "first", "last", "words"),
    [("ScaledLinear", 0.00085, 0.012, ["0.0015", "0.00085"]), ("Linear", 0.0015, 0.0195, ["set process.schedule"])],
)
def test_a_recipe_with_another_schedule_is_refused(
    schedule: Any, first: float, last: float, words: list[str], tmp_path: Path
) -> None:
    schedule = {"class_path": schedule, "init_args": {"beta_start": first, "beta_end": last}}
    process = {"class_path": "DiscreteProcess", "init_args": {"num_steps": STEPS, "schedule": schedule}}
    with pytest.raises(ValueError, match=r"model\.ckpt was trained with another schedule") as error:
        imported(saved(tmp_path, latent_diffusion()), recipe(tmp_path, process=process))
    for word in words:
        assert word in str(error.value)


def test_a_recipe_with_another_number_of_steps_is_refused(tmp_path: Path) -> None:
    process = {"class_path": "DiscreteProcess", "init_args": {"num_steps": 30}}
    with pytest.raises(ValueError, match=r"trained with 20 steps; set process\.num_steps"):
        imported(saved(tmp_path, latent_diffusion()), recipe(tmp_path, process=process))


# The first stage


def test_the_first_stage_of_a_diffusion_model(tmp_path: Path) -> None:
    source = saved(tmp_path, latent_diffusion())
    model = imported(source, stage_recipe(tmp_path), base=AutoencoderModule)
    assert_holds(model.network, state_of(first_stage(), 3))


@pytest.mark.parametrize("form", ["with its loss", "alone", "averaged"])
def test_a_first_stage_of_a_checkpoint_of_its_own(form: str, tmp_path: Path) -> None:
    raw, averaged = state_of(first_stage(), 4), state_of(first_stage(), 5)
    state = dict(raw)
    if form != "alone":
        state |= {"loss.logvar": torch.zeros(()), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}
        state |= {f"loss.discriminator.{name}": t for name, t in state_of(PatchGAN(width=8, num_layers=1), 6).items()}
    if form == "averaged":
        state |= {"model_ema.decay": torch.tensor(0.9)}
        state |= {"model_ema." + name.replace(".", ""): tensor for name, tensor in averaged.items()}
    model = imported(saved(tmp_path, state), stage_recipe(tmp_path), base=AutoencoderModule)
    assert_holds(model.network, averaged if form == "averaged" else raw)


@pytest.mark.parametrize("there", [True, False])
def test_a_discriminator_is_loaded_if_it_is_there(there: bool, tmp_path: Path) -> None:
    judge = {"class_path": "PatchGAN", "init_args": {"width": 8, "num_layers": 1}}
    weights = state_of(PatchGAN(width=8, num_layers=1), 6)
    weights = {name: t.round().long() if "num_batches" in name else t for name, t in weights.items()}
    state = state_of(first_stage(), 4)
    if there:
        state |= {f"loss.discriminator.{name}": tensor for name, tensor in weights.items()}
    adversarial = {"class_path": "Adversarial", "init_args": {"discriminator": judge}}
    path = stage_recipe(tmp_path, adversarial=adversarial)
    model = imported(saved(tmp_path, state), path, base=AutoencoderModule)
    found = model.adversarial.discriminator.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in found) == there


@pytest.mark.parametrize(
    ("layout", "words"),
    [("diffusion", "holds a U-Net and no first stage"), ("first stage", "holds a first stage and no U-Net")],
)
def test_a_recipe_of_the_wrong_kind_is_refused(layout: str, words: str, tmp_path: Path) -> None:
    state = latent_diffusion() if layout == "diffusion" else state_of(first_stage(), 1)
    state = {name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.")}
    path = (stage_recipe if layout == "diffusion" else recipe)(tmp_path)
    with pytest.raises(ValueError, match=words):
        imported(saved(tmp_path, state), path)


@torch.no_grad()
def test_a_diffusion_model_brings_its_first_stage_and_scale(tmp_path: Path) -> None:
    model = imported(saved(tmp_path, latent_diffusion()), recipe(tmp_path))
    assert_holds(model.codec.network, state_of(first_stage(), 3))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = first_stage()
    expected.load_state_dict(state_of(expected, 3))
    torch.testing.assert_close(model.codec.decode(latents), expected.eval().decode(latents / 0.7))
    assert model.sample(range(2)).shape == (2, 3, 16, 16)


def test_a_file_without_first_stage_needs_that_of_the_recipe(tmp_path: Path) -> None:
    state = {name: t for name, t in latent_diffusion().items() if not name.startswith("first_stage_model.")}
    with pytest.raises(FileNotFoundError, match=r"runs/nowhere\.ckpt"):
        imported(saved(tmp_path, state), recipe(tmp_path))
    stage = tmp_path / "stage.ckpt"
    torch.save(state_of(first_stage(), 3), tmp_path / "stage.pt")
    main([str(tmp_path / "stage.pt"), "-c", stage_recipe(tmp_path), "--out", str(stage)])
    codec = {"class_path": "FirstStage", "init_args": {"checkpoint": str(stage)}}
    model = imported(saved(tmp_path, state), recipe(tmp_path, codec=codec))
    assert_holds(model.codec.network, state_of(first_stage(), 3))


def test_a_model_of_pixels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds an autoencoder and the model has a Pixels"):
        imported(saved(tmp_path, latent_diffusion()), recipe(tmp_path, codec={"class_path": "Pixels"}))


def test_a_scale_that_nobody_says_is_asked_for(tmp_path: Path) -> None:
    network = {"class_path": "Autoencoder", "init_args": {**STAGE, "regularizer": "DiagonalGaussian"}}
    codec = {"class_path": "FirstStage", "init_args": {"network": network}}
    state = {name: t for name, t in latent_diffusion().items() if name != "scale_factor"}
    with pytest.raises(ValueError, match=r"by which factor latents were scaled; set model\.codec\.scale"):
        imported(saved(tmp_path, state), recipe(tmp_path, codec=codec))


# The conditioner


class Texts(Conditioner):
    """Encodes tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = TextEncoder(9, 4, 6, depth=2, num_heads=1, head_channels=2)

    def forward(self, given: Condition, codec: Codec) -> Condition:
        return {"context": self.encoder(given["tokens"])}

    def null(self, condition: Condition) -> Condition:
        return condition

    def has_null(self, network: nn.Module) -> bool:
        return False


class Classes(Texts):
    """One token for each class."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.tokens = nn.Embedding(3, 6)


class Both(Texts):
    """Without weights."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def test_the_text_encoder_is_loaded_without_its_unused_head(tmp_path: Path) -> None:
    weights = state_of(TextEncoder(9, 4, 6, depth=2, num_heads=1, head_channels=2, output_head=True), 8)
    state = latent_diffusion(context_width=6)
    state |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in weights.items()}
    path = recipe(tmp_path, network={"context_width": 6}, conditioner={"class_path": f"{__name__}.Texts"})
    model = imported(saved(tmp_path, state), path, trust=__name__)
    expected = {name: tensor for name, tensor in weights.items() if "to_logits" not in name}
    assert_holds(model.conditioner.encoder, expected)
    # And goes out, with the whole model, as it came in.
    out = ["--out", str(tmp_path / "out"), "--trust", __name__]
    export_weights.main([str(tmp_path / "imported.ckpt"), "--to", "safetensors", *out])
    found = load_file(tmp_path / "out" / "model.safetensors")
    texts = {name.removeprefix("cond_stage_model."): t for name, t in found.items() if "cond_stage" in name}
    assert texts.keys() == {f"transformer.{name}" for name in expected}
    assert {name for name in found if "cond_stage" not in name} < state.keys()


@pytest.mark.further
def test_texts_need_their_vocabulary_which_goes_with_them(tmp_path: Path) -> None:
    """Files of that code do not hold it: the recipe names BERT's. Ours do."""
    sizes: dict[str, Any] = {"vocabulary": 9, "length": 5, "width": 6, "depth": 1, "num_heads": 1, "head_channels": 2}
    state = latent_diffusion(context_width=6)
    encoder = TextEncoder(**sizes, output_head=True)
    state |= {f"cond_stage_model.transformer.{name}": tensor for name, tensor in state_of(encoder, 8).items()}
    source = saved(tmp_path, state)

    def recipe_with(**tokenizer: Any) -> str:
        parts = {
            "encoder": {"class_path": "TextEncoder", **sizes},
            "tokenizer": {"class_path": "WordPiece", **tokenizer},
        }
        return recipe(tmp_path, network={"context_width": 6}, conditioner={"class_path": "Text", **parts})

    with pytest.raises(ValueError, match=r"does not hold the vocabulary of its texts; set .*tokenizer\.file"):
        imported(source, recipe_with())
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "seven", "##s"]))
    model = imported(source, recipe_with(file=str(words)))
    words.unlink()
    assert model.conditioner.tokens_of(["a sevens"]).tolist() == [[2, 4, 5, 6, 3]]
    out = tmp_path / "out"
    export_weights.main([str(tmp_path / "imported.ckpt"), "--to", "safetensors", "--out", str(out)])
    again = tmp_path / "again.ckpt"
    main([str(out / "model.safetensors"), "--out", str(again)])
    second: Any = load_model(again, DiffusionModule).conditioner
    assert torch.equal(second.encode(["a sevens"]), model.conditioner.encode(["a sevens"]))


def test_the_tokens_of_classes_are_loaded(tmp_path: Path) -> None:
    weight = torch.randn(3, 6)
    state = {**latent_diffusion(context_width=6), "cond_stage_model.embedding.weight": weight}
    path = recipe(tmp_path, network={"context_width": 6}, conditioner={"class_path": f"{__name__}.Classes"})
    model = imported(saved(tmp_path, state), path, trust=__name__)
    assert torch.equal(model.conditioner.tokens.weight, weight)


def test_a_conditioner_that_is_missing_in_the_file_is_named(tmp_path: Path) -> None:
    path = recipe(tmp_path, network={"context_width": 6}, conditioner={"class_path": f"{__name__}.Classes"})
    with pytest.raises(ValueError, match=r"missing: tokens\.weight;"):
        imported(saved(tmp_path, latent_diffusion(context_width=6)), path, trust=__name__)


# Safety


class Callback:
    """Something that a checkpoint of training may hold."""


def test_a_pickle_that_asks_for_classes_is_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, latent_diffusion(), callbacks={Callback: 1})
    with pytest.raises(ValueError, match=r"asks for .*Callback.*only tensors and plain data are read"):
        imported(source, recipe(tmp_path))


def test_a_checkpoint_of_our_own_is_recognized(tmp_path: Path) -> None:
    model = imported(saved(tmp_path, latent_diffusion()), recipe(tmp_path))
    del model
    with pytest.raises(ValueError, match="is a checkpoint of this program: give it to --ckpt_path"):
        main([str(tmp_path / "imported.ckpt"), "-c", recipe(tmp_path), "--out", str(tmp_path / "again.ckpt")])
