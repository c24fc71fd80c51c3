"""Weights of DDIM's and OpenAI's code: the imported model computes what an independent definition does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_lit import cli
from diffusion_lit.checkpoint import load_model
from diffusion_lit.methods.classifier_guidance import NoisyClassifierModule
from diffusion_lit.module import DiffusionModule
from diffusion_lit.tools.import_weights import main
from tests.tools import official_ddpm
from tests.tools.guided_diffusion import Form, Network, as_classifier, classifier_shapes, unet_shapes

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TIMES = torch.tensor([3.0, 700.0])
UNET = {
    "class_path": "diffusion_lit.networks.UNet",
    "init_args": {"image_size": 8, "width": 32, "multipliers": [1, 2], "num_blocks": 1, "attention": [4]},
}
DDPM = official_ddpm.shapes(ch=32, ch_mult=[1, 2], num_res_blocks=1, attended=[1])


def random_state(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(list(shape), generator=generator) * 0.2 for name, shape in shapes.items()}


def recipe(folder: Path, network: Mapping[str, Any], **model: Any) -> str:
    path = folder / "recipe.yaml"
    data = {
        "class_path": "diffusion_lit.data.ImageData",
        "init_args": {"source": {"class_path": "diffusion_lit.data.Digits"}},
    }
    path.write_text(yaml.safe_dump({"model": {**model, "init_args": {"network": network}}, "data": data}))
    return str(path)


def imported(folder: Path, source: Path, network: Mapping[str, Any], *options: str) -> nn.Module:
    out = folder / "imported.ckpt"
    main([str(source), "-c", recipe(folder, network), "--out", str(out), *options])
    return load_model(out, DiffusionModule).denoiser.network


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def saved(folder: Path, value: object) -> Path:
    torch.save(value, folder / "published.pt")
    return folder / "published.pt"


# DDIM's layout


def optimizer_state() -> dict[str, Any]:
    return {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}


@pytest.mark.few(3)
@pytest.mark.parametrize("attended", [[1], [0, 1], []])
@pytest.mark.parametrize("multipliers", [[1, 2], [2, 1]])
@torch.no_grad()
def test_ddims_network_gives_the_same_output(attended: list[int], multipliers: list[int], tmp_path: Path) -> None:
    state = random_state(official_ddpm.shapes(32, multipliers, 1, attended))
    sizes = {**UNET["init_args"], "attention": [8 >> i for i in attended], "multipliers": multipliers}  # type: ignore[dict-item]
    network = imported(tmp_path, saved(tmp_path, state), {**UNET, "init_args": sizes})
    assert_same(network(X, TIMES), official_ddpm.output(state, X, TIMES))


@pytest.mark.few(3)
@pytest.mark.parametrize(("option", "chosen"), [([], 1), (["--weights", "averaged"], 1), (["--weights", "raw"], 0)])
@pytest.mark.parametrize("sort", [list, tuple])
@torch.no_grad()
def test_of_a_training_checkpoint_the_averaged_weights_are_taken_or_those_asked_for(
    sort: type, option: list[str], chosen: int, tmp_path: Path
) -> None:
    raw, shadow = random_state(DDPM, 1), random_state(DDPM, 2)
    parallel = {f"module.{name}": tensor for name, tensor in raw.items()}
    source = saved(tmp_path, sort([parallel, optimizer_state(), 7, 12_000, shadow]))
    network = imported(tmp_path, source, UNET, *option)
    assert_same(network(X, TIMES), official_ddpm.output((raw, shadow)[chosen], X, TIMES))


@torch.no_grad()
def test_the_file_may_be_safetensors_or_in_the_former_format_or_in_half_precision(tmp_path: Path) -> None:
    state = {name: tensor.half().float() for name, tensor in random_state(DDPM).items()}
    expected = official_ddpm.output(state, X, TIMES)
    files = [tmp_path / name for name in ("a.safetensors", "b.ckpt", "c.pth")]
    save_file(state, files[0])
    torch.save(state, files[1], _use_new_zipfile_serialization=False)
    torch.save({name: tensor.half() for name, tensor in state.items()}, files[2])
    for i, file in enumerate(files):
        place = tmp_path / str(i)
        place.mkdir()
        assert_same(imported(place, file, UNET)(X, TIMES), expected)


@pytest.mark.few(2)
@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_networks_are_removed(prefix: str, tmp_path: Path) -> None:
    state = random_state(DDPM)
    source = saved(tmp_path, {prefix + name: tensor for name, tensor in state.items()})
    for name, tensor in imported(tmp_path, source, UNET).state_dict().items():
        assert torch.equal(tensor, state[name])


def test_prefixes_of_blocks_that_were_compiled_alone_are_removed(tmp_path: Path) -> None:
    state = random_state(DDPM)
    source = saved(tmp_path, {name.replace(".block.", ".block._orig_mod."): t for name, t in state.items()})
    assert imported(tmp_path, source, UNET).state_dict().keys() == state.keys()


def test_it_is_said_which_of_two_sets_of_weights_was_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path, [random_state(DDPM, 1), random_state(DDPM, 2)])
    imported(tmp_path, source, UNET)
    assert f"averaged weights of {source}; --weights raw chooses the others" in capsys.readouterr().out


# OpenAI's layout


def adm(form: Form, **more: Any) -> dict[str, Any]:
    """The configuration of the network of a form."""
    init_args = {
        "image_size": 8,
        "out_channels": form.out_channels,
        "width": form.model_channels,
        "multipliers": list(form.channel_mult),
        "num_blocks": form.num_res_blocks,
        "attention": [8 >> i for i in form.attended],
        "num_heads": form.num_heads,
        "head_channels": None if form.num_head_channels == -1 else form.num_head_channels,
        "scale_shift_norm": form.use_scale_shift_norm,
        "resblock_updown": form.resblock_updown,
        "qkv_first": form.use_new_attention_order,
        "num_classes": form.num_classes,
        **more,
    }
    return {"class_path": "diffusion_lit.networks.ADMUNet", "init_args": init_args}


FORMS = {
    "improved-diffusion": Form(),
    "improved-diffusion by class": Form(num_classes=5, num_res_blocks=2),
    "improved-diffusion, fixed variance": Form(out_channels=3, use_scale_shift_norm=False, attended=(0, 1)),
    "guided-diffusion, LSUN": Form(num_head_channels=16, resblock_updown=True),
    "guided-diffusion, 64x64": Form(
        num_head_channels=16, resblock_updown=True, use_new_attention_order=True, num_classes=5, num_res_blocks=2
    ),
    "guided-diffusion, 128x128": Form(num_classes=5, resblock_updown=True, channel_mult=(1, 1, 2), attended=(1, 2)),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_openais_network_gives_the_same_output(form: Form, tmp_path: Path) -> None:
    state = random_state(unet_shapes(form))
    network = imported(tmp_path, saved(tmp_path, state), adm(form))
    label = None if form.num_classes is None else torch.tensor([1, 4])
    condition = {} if label is None else {"label": label}
    assert_same(network(X, TIMES, condition), Network(state, form).denoise(X, TIMES, label))


@torch.no_grad()
def test_the_order_of_queries_keys_and_values_is_the_recipes_to_say(tmp_path: Path) -> None:
    form = FORMS["guided-diffusion, 64x64"]
    state = random_state(unet_shapes(form))
    network = imported(tmp_path, saved(tmp_path, state), adm(form, qkv_first=False))
    label = torch.tensor([1, 4])
    theirs = Network(state, form).denoise(X, TIMES, label)
    assert (network(X, TIMES, {"label": label}) - theirs).abs().max() > 0.01 * theirs.abs().max()


@pytest.mark.parametrize("resblock_updown", [False, True])
@torch.no_grad()
def test_openais_classifier_gives_the_same_logits(resblock_updown: bool, tmp_path: Path) -> None:
    form = as_classifier(Form(resblock_updown=resblock_updown), num_classes=7)
    state = random_state(classifier_shapes(form, image_size=8))
    sizes = {"image_size": 8, "width": 32, "multipliers": [1, 2], "num_blocks": 1, "attention": [4]}
    network = {
        "class_path": "diffusion_lit.networks.NoisyClassifier",
        "init_args": {**sizes, "num_classes": 7, "head_channels": 16, "resblock_updown": resblock_updown},
    }
    system = f"{NoisyClassifierModule.__module__}.{NoisyClassifierModule.__qualname__}"
    out = tmp_path / "imported.ckpt"
    source = saved(tmp_path, state)
    main([str(source), "-c", recipe(tmp_path, network, class_path=system), "--out", str(out)])
    module = load_model(out, NoisyClassifierModule)
    assert_same(module(X, TIMES), Network(state, form).classify(X, TIMES))


# What does not fit


def broken() -> dict[str, Tensor]:
    state = random_state(DDPM)
    del state["mid.attn_1.k.bias"], state["up.1.upsample.conv.weight"]
    state["conv_in.weight"] = torch.zeros(16, 3, 3, 3)
    state["norm_out.bias"] = torch.zeros(32, dtype=torch.int64)
    return {**state, "logvar": torch.zeros(1000), "extra.weight": torch.zeros(1)}


def test_missing_unknown_and_misshapen_tensors_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    source, out = saved(tmp_path, broken()), tmp_path / "run" / "imported.ckpt"
    with pytest.raises(ValueError, match="does not fit the network, so nothing was loaded") as error:
        main([str(source), "-c", recipe(tmp_path, UNET), "--out", str(out)])
    message = str(error.value)
    assert "missing: mid.attn_1.k.bias, up.1.upsample.conv.weight;" in message
    assert "unknown: logvar, extra.weight;" in message
    assert "misshapen: conv_in.weight (16, 3, 3, 3) instead of (32, 3, 3, 3);" in message
    assert "not floating point: norm_out.bias torch.int64;" in message
    assert not out.parent.exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_named_and_nothing_is_written(value: float, tmp_path: Path) -> None:
    state = random_state(DDPM)
    state["mid.block_1.conv1.weight"][3, 2, 1, 0] = value
    state["conv_out.bias"][0] = value
    out = tmp_path / "run" / "imported.ckpt"
    with pytest.raises(ValueError, match=r"infinite or not a number.*: (\S+, )*mid\.block_1\.conv1\.weight") as error:
        main([str(saved(tmp_path, state)), "-c", recipe(tmp_path, UNET), "--out", str(out)])
    assert "conv_out.bias" in str(error.value)
    assert not out.parent.exists()


def test_of_very_many_wrong_tensors_the_rest_are_counted(tmp_path: Path) -> None:
    source = saved(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"missing: temb\.dense\.0\.weight, .* and {len(DDPM) - 20} more; unknown: a"):
        main([str(source), "-c", recipe(tmp_path, UNET), "--out", str(tmp_path / "imported.ckpt")])


@pytest.mark.parametrize(
    ("held", "options", "words"),
    [
        ({"model": {"a": torch.zeros(1)}, "step": 3}, [], ["0 sets of tensors", "'model', 'step'", "state_dict alone"]),
        ([random_state({"a": [1]})] * 3, [], ["3 sets of tensors", "state_dict alone"]),
        (random_state(DDPM), ["--weights", "raw"], ["one set of weights", "leave out --weights raw"]),
        ({"time_embedding.linear_1.weight": torch.zeros(1)}, [], ["diffusers' layout", "its folder"]),
        ("words", [], ["0 sets of tensors", "str"]),
    ],
)
def test_a_file_without_one_set_of_weights_is_refused(
    held: object, options: list[str], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        main([str(saved(tmp_path, held)), "-c", recipe(tmp_path, UNET), "--out", str(tmp_path / "x.ckpt"), *options])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["does not say which network", "-c"]),
        ("data: {source: Digits}", ["does not say which network"]),
        ("[1, 2]", ["is no configuration"]),
        ("a: [", ["is not YAML"]),
        (
            "model: {init_args: {network: {class_path: diffusion_lit.networks.UNot}}}",
            ["recipe.yaml: model.network: there is no", "UNot"],
        ),
        (
            "model: {network: {class_path: os.system}}",
            ["recipe.yaml: model.network: os.system is not part"],
        ),
        (
            "model: {init_args: {network: {class_path: diffusion_lit.networks.UNet, init_args: {width: 7}}}}",
            ["width=7"],
        ),
    ],
)
def test_a_recipe_that_makes_no_model_is_refused(text: str | None, words: list[str], tmp_path: Path) -> None:
    source, config = saved(tmp_path, random_state(DDPM)), tmp_path / "recipe.yaml"
    config.write_text(text or "")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        main([str(source), *([] if text is None else ["-c", str(config)]), "--out", str(tmp_path / "imported.ckpt")])
    for word in words:
        assert word in str(error.value)


# An ordinary checkpoint


def test_the_checkpoint_is_enough_to_sample_score_and_train_on(tmp_path: Path) -> None:
    state = random_state(official_ddpm.shapes(32, [1, 2], 1, [], channels=1))
    run, changes = tmp_path / "run", tmp_path / "changes.yaml"
    changes.write_text(
        "sample_grid: {every_n_steps: null}\nevaluation: {every_n_steps: null, at_start: false}\n"
        "model: {sampler: {steps: 2}}\n"
    )
    ckpt = str(run / "checkpoints" / "imported.ckpt")
    cli.main(["import", str(saved(tmp_path, state)), "-c", "digits", "-c", str(changes), "--out", ckpt])
    cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    cli.main(["predict", "--ckpt_path", ckpt, "--num_images", "3", *cpu])
    assert len(list((run / "predictions" / "imported_seed_0").glob("0*.png"))) == 3
    less = ["--evaluation.num_images", "2", "--evaluation.batch_size", "2", "--trainer.limit_test_batches", "1"]
    cli.main(["test", "--ckpt_path", ckpt, "--weights", "raw", *less, *cpu])

    tuned = tmp_path / "tuned"
    args = ["--trainer.default_root_dir", str(tuned), "--trainer.max_steps", "1", "--data.batch_size", "4"]
    cli.main(["fit", "-c", "digits", "-c", str(changes), *args, *cpu, "--trainer.logger", "false", "--ckpt_path", ckpt])
    trained = torch.load(tuned / "checkpoints" / "last.ckpt", weights_only=True)
    assert trained["global_step"] == 1
    for name, tensor in trained["current_model_state"].items():
        moved = (tensor - state[name.removeprefix("denoiser.network.")]).abs().max()
        # AdamW's first step is at most the learning rate.
        assert 0 < moved < 2.1e-3


def test_a_file_that_is_there_is_never_overwritten(tmp_path: Path) -> None:
    source, out = saved(tmp_path, random_state(DDPM)), tmp_path / "last.ckpt"
    out.write_text("precious")
    with pytest.raises(ValueError, match=r"last\.ckpt exists already; choose another"):
        main([str(source), "-c", recipe(tmp_path, UNET), "--out", str(out)])
    assert out.read_text() == "precious"
