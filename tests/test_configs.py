"""Every recipe becomes objects, and says what its paper says."""

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from diffusion_lit import cli
from diffusion_lit.callbacks.ema import EMA, NOTABLE
from diffusion_lit.command import parse
from diffusion_lit.diffusion import DDIM, Ancestral, FixedLarge, FixedSmall
from diffusion_lit.execution import Execution
from diffusion_lit.networks import NoisyClassifier
from diffusion_lit.networks.layers import ResBlock
from diffusion_lit.recipes import layers, names, read_file, recipes
from diffusion_lit.trainer import Trainer
from diffusion_lit.upgrade import FORMAT

CONFIGS = recipes()
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != "base")
CLASSIFIERS = sorted(
    f"{path.parent.stem}/{path.stem}"
    for name in ("guidance/*_classifier", "guidance/clip_*", "features/*")
    for path in CONFIGS.glob(f"{name}.yaml")
)
# What each of the other recipes in configs/guidance/ guides.
GUIDED = {"digits": "digits", **{f"imagenet{size}": f"adm_imagenet{size}" for size in (64, 128, 256)}}


def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are not looked at; without them a network of 113 M takes no time and, never touched, no memory."""
    for name in ("kaiming_uniform_", "xavier_uniform_", "uniform_", "zeros_", "ones_", "normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


def instantiate(recipe: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> cli.CLI:
    without_weights(monkeypatch)
    return cli.CLI.parts(["fit", "-c", recipe, "--trainer.accelerator", "cpu", "--trainer.devices", "1", *more])


def test_there_is_a_recipe_for_everything_promised() -> None:
    assert {"digits", "cifar10", "lsun_church", "lsun_bedroom", "lsun_cat", "folder"} <= set(RECIPES)


@pytest.mark.few(10)
@pytest.mark.parametrize("recipe", [*RECIPES, *CLASSIFIERS])
def test_every_recipe_instantiates_without_touching_data(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate(recipe, monkeypatch)
    assert made.datamodule.image_shape == made.model.image_shape
    if recipe not in CLASSIFIERS and made.model.sampler is not None:
        made.model.sampler.times(made.model.process)
    assert not list(Path.cwd().iterdir())
    first = (CONFIGS / f"{recipe}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")


def test_the_switches_for_a_gpu_stand_on_top_of_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate("cifar10", monkeypatch, "-c", "gpu/cifar10")
    plain = instantiate("cifar10", monkeypatch)
    assert made.trainer.precision == "bf16-mixed"
    assert cast(Trainer, made.trainer).execution == Execution(channels_last=True, compile="inductor", cuda_graphs=True)
    assert made.model.max_skipped_steps is None
    optimizers = [m.model.make_optimizer([nn.Parameter(torch.zeros(1))]) for m in (made, plain)]
    assert [optimizer.defaults.pop("fused") for optimizer in optimizers] == [True, None]
    assert optimizers[0].defaults == optimizers[1].defaults
    assert rates(made.model, [0, 4999]) == rates(plain.model, [0, 4999])
    assert made.datamodule.batch_size == plain.datamodule.batch_size


def callbacks_of(made: cli.CLI) -> list[Any]:
    return list(made.trainer.callbacks)  # type: ignore[attr-defined]


def rates(model: Any, wanted: list[int]) -> list[float]:
    """The learning rate that the optimiser has while it makes each step."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = model.make_optimizer([parameter])
    scheduler = model.make_lr_scheduler(optimizer)
    seen = {}
    for step in range(max(wanted) + 1):
        if step in wanted:
            seen[step] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()
    return [seen[step] for step in wanted]


# Ho et al. 2020, appendix B: parameters, batch, learning rate, steps, dropout, flips.
PAPER = {
    "cifar10": (35_746_307, 128, 2e-4, 800_000, 0.1, True),
    "lsun_bedroom": (113_673_219, 64, 2e-5, 2_400_000, 0.0, False),
    "lsun_cat": (113_673_219, 64, 2e-5, 1_800_000, 0.0, True),
    "lsun_church": (113_673_219, 64, 2e-5, 1_200_000, 0.0, True),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", PAPER)
def test_a_paper_s_recipe_is_the_paper_s_to_the_number(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, batch, rate, steps, dropout, flip = PAPER[recipe]
    made = instantiate(recipe, monkeypatch)
    model, data, trainer = made.model, made.datamodule, cast(Trainer, made.trainer)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert rates(model, [4999, 6000]) == pytest.approx([rate, rate])
    assert (data.batch_size, data.flip, trainer.max_steps) == (batch, flip, steps)
    assert trainer.clip_norm == 1.0
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} <= {dropout}
    assert sum(isinstance(m, ResBlock) for m in model.modules()) == (2 + 3) * (4 if recipe == "cifar10" else 6) + 2
    [ema] = [c for c in callbacks_of(made) if type(c).__name__ == "EMA"]
    assert (ema.decays, ema.warmup) == ([0.9999], False)
    assert type(model.sampler) is Ancestral
    assert type(model.sampler.variance) is (FixedLarge if recipe == "cifar10" else FixedSmall)
    assert len(model.sampler.times(model.process)) == 1001
    assert isinstance(model.make_optimizer([nn.Parameter(torch.zeros(1))]), torch.optim.Adam)
    alpha, _ = model.process.alpha_sigma(torch.tensor([1 / 1000, 1.0], dtype=torch.float64))
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(alpha**2, torch.stack([1 - betas[0], (1 - betas).prod()]), rtol=1e-12, atol=0)


def test_the_anomaly_recipe_is_that_of_its_authors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    # Julian-Wyatt/AnoDDPM: args28.json, and the defaults of UNet.py and GaussianDiffusion.py.
    made = instantiate("anoddpm", monkeypatch)
    model, data, trainer = made.model, made.datamodule, cast(Trainer, made.trainer)
    # Counted by hand from the layers of UNet.py; with attention at 16 and 8 alone there would be 130,331,393.
    assert sum(p.numel() for p in model.parameters()) == 131_649_793
    assert (data.batch_size, data.flip, trainer.max_steps, trainer.clip_norm) == (1, False, 300_000, 1.0)
    optimizer = model.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-4, 0.0)
    assert model.make_lr_scheduler is None
    assert model.time_of(800) == 0.8
    with pytest.raises(ValueError, match="trained up to step 800"):
        model.time_of(801)
    field = model.noise_source
    assert (field.octaves, field.persistence, field.wavelength) == (6, 0.8, 64)
    assert type(model.sampler.variance) is FixedLarge


# Rombach et al. 2022, table 8, and the code's configurations: parameters, batch, steps, start of the discriminator, its
# weight and layers.
PAPER_AUTOENCODERS = {
    "kl_f4": (55_312_063, 10, 176_991, 50_001, 0.5, 3),
    "kl_f8": (83_653_863, 4, 246_803, 50_001, 0.5, 3),
    "kl_f16": (69_610_963, 6, 442_998, 50_001, 0.5, 3),
    "kl_f32": (103_880_131, 6, 406_763, 50_001, 0.5, 3),
    "vq_f4": (55_322_782, 8, 533_066, 0, 0.75, 3),
    "vq_f8": (67_717_295, 10, 971_043, 1, 0.6, 2),
    "vq_f16": (69_593_371, 14, 1_101_166, 250_001, 0.75, 2),
}


@pytest.mark.few(3)
@pytest.mark.parametrize("recipe", PAPER_AUTOENCODERS)
def test_an_autoencoder_s_recipe_is_the_paper_s_to_the_number(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, batch, steps, start, weight, layers_ = PAPER_AUTOENCODERS[recipe]
    made = instantiate(recipe, monkeypatch)
    model, adversarial = made.model, made.model.adversarial
    assert sum(p.numel() for p in model.network.parameters()) == parameters
    assert model.network.factor == int(recipe.partition("_f")[2])
    judge = sum(p.numel() for p in adversarial.parameters())
    assert judge == {3: 2_765_633, 2: 663_361}[layers_]
    assert (adversarial.start, adversarial.weight, adversarial.cap, adversarial.loss) == (start, weight, 1e4, "hinge")
    kl = recipe.startswith("kl")
    assert (model.loss.reduction, model.loss.regularizer_weight) == (("sum", 1e-6) if kl else ("mean", 1.0))
    assert type(model.loss.perceptual).__name__ == "LPIPS"
    assert (made.datamodule.batch_size, made.trainer.max_steps) == (batch, steps)
    assert not cast(Trainer, made.trainer).clip_norm
    for make in (model.make_optimizer, model.make_discriminator_optimizer):
        optimizer = make([nn.Parameter(torch.zeros(1))])
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.defaults["lr"] == pytest.approx(4.5e-6 * batch)
        assert optimizer.defaults["betas"] == (0.5, 0.9)
    callbacks = {type(c).__name__: c for c in callbacks_of(made)}
    assert "EMA" not in callbacks
    names = [type(score).__name__ for score in callbacks["Evaluation"].scores]
    assert names == ["FrechetDistance", "PSNR", "SSIM", "PerceptualDistance", *([] if kl else ["CodebookUse"])]


# Dhariwal & Nichol 2021, table 12, and their command: parameters, batch, learning rate, weight decay, steps.
PAPER_CLASSIFIERS = {
    "imagenet64": (65_438_568, 1024, 6e-4, 0.2, 300_000),
    "imagenet128": (42_568_040, 256, 3e-4, 0.05, 300_000),
    "imagenet256": (54_096_360, 256, 3e-4, 0.05, 500_000),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("recipe", PAPER_CLASSIFIERS)
def test_a_classifier_s_recipe_is_the_paper_s_to_the_number(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, batch, rate, decay, steps = PAPER_CLASSIFIERS[recipe]
    made = instantiate(f"guidance/{recipe}_classifier", monkeypatch)
    model, data, trainer = made.model, made.datamodule, cast(Trainer, made.trainer)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.network.num_classes == 1000
    assert (data.batch_size, data.flip, trainer.max_steps) == (batch, True, steps)
    assert not trainer.clip_norm
    optimizer = model.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["weight_decay"] == decay
    scheduler = model.make_lr_scheduler(optimizer)
    annealed = [optimizer.param_groups[0]["lr"]]
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        annealed.append(optimizer.param_groups[0]["lr"])
    assert annealed == pytest.approx([rate * (1 - step / steps) for step in range(10)], rel=1e-9)
    assert scheduler.total_iters == steps


@pytest.mark.few(2)
@pytest.mark.parametrize("recipe", GUIDED)
def test_a_sampling_recipe_guides_its_model_by_the_classifier_of_its_training_recipe(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = read_file(CONFIGS / "guidance" / f"{recipe}.yaml")["model"]["guidance"]
    # As `fit` would have left it, but for fewer channels: at full width it would take a quarter of a gigabyte.
    small = [f"--model.network.{name}=4" for name in ("width", "num_groups", "head_channels")]
    command = cli.parse(["fit", "-c", f"guidance/{recipe}_classifier", *small], ["fit"])
    training = cli.merged(command, cli.command_slots("fit"))
    assert wanted["checkpoint"] == f"{training['trainer']['default_root_dir']}/checkpoints/last.ckpt"
    config = training["model"]
    network = config["init_args"]["network"]["init_args"]
    place = Path.cwd() / wanted["checkpoint"]
    place.parent.mkdir(parents=True)
    state = NoisyClassifier(**network).state_dict()
    content = {
        "state_dict": {f"network.{k}": v for k, v in state.items()},
        "config": {"model": config},
        "format": FORMAT,
    }
    torch.save(content, place)
    without_weights(monkeypatch)
    args = ["predict", "-c", GUIDED[recipe], "-c", f"guidance/{recipe}"]
    made = cli.CLI.parts([*args, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    guidance = made.model.guidance
    assert guidance.scale == {"digits": 2.0, "imagenet64": 1.0, "imagenet128": 0.5, "imagenet256": 1.0}[recipe]
    assert made.model.num_classes == network["num_classes"]
    guidance.check(made.model.denoiser, made.model.conditioner)
    if recipe.startswith("imagenet"):
        assert type(made.model.sampler) is Ancestral
        assert len(made.model.sampler.times(made.model.process)) == 251


def test_a_sampling_recipe_guides_the_model_of_texts_by_the_towers_of_their_training_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = read_file(CONFIGS / "guidance" / "text_digits.yaml")["model"]["guidance"]
    command = cli.parse(["fit", "-c", "guidance/clip_digits"], ["fit"])
    training = cli.merged(command, cli.command_slots("fit"))
    assert wanted["checkpoint"] == f"{training['trainer']['default_root_dir']}/checkpoints/last.ckpt"
    towers = instantiate("guidance/clip_digits", monkeypatch).model
    place = Path.cwd() / wanted["checkpoint"]
    place.parent.mkdir(parents=True)
    config = {"model": training["model"]}
    vocabulary = {name: value for name, value in towers.state_dict().items() if name.endswith("_extra_state")}
    state = {name: torch.zeros_like(value) for name, value in towers.state_dict().items()}
    torch.save({"state_dict": {**state, **vocabulary}, "config": config, "format": FORMAT}, place)
    args = ["predict", "-c", "text_digits", "-c", "guidance/text_digits"]
    made = cli.CLI.parts([*args, "--trainer.accelerator", "cpu", "--trainer.devices", "1"])
    guidance = made.model.guidance
    assert type(guidance).__name__ == "CLIPGuidance"
    assert not guidance.likelihood.clean
    guidance.check(made.model.denoiser, made.model.conditioner)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("recipe", "rate", "warmup"), [("cifar10", 2e-4, 5000), ("lsun_cat", 2e-5, 5000), ("folder", 1e-4, 1000)]
)
def test_the_learning_rate_warms_up_linearly_to_its_full_value(
    recipe: str, rate: float, warmup: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = instantiate(recipe, monkeypatch).model
    steps = [0, 1, 99, warmup // 2, warmup - 2, warmup - 1, warmup, warmup + 10]
    expected = [rate * min(1.0, (step + 1) / warmup) for step in steps]
    assert rates(model, steps) == pytest.approx(expected, rel=1e-9)


def test_the_digits_recipe_anneals_over_the_steps_that_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate("digits", monkeypatch)
    steps = int(made.trainer.max_steps)
    start, half, end = rates(made.model, [0, steps // 2, steps - 1])
    assert half == pytest.approx(start / 2, rel=1e-2)
    assert end < start / 1000


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_short_and_says_only_what_differs_from_what_it_includes(path: Path) -> None:
    def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
        if not isinstance(tree, dict):
            return {path: tree}
        return {k: v for key, value in tree.items() for k, v in leaves(value, (*path, key)).items()}

    text = path.read_text()
    assert "init_args" not in text
    assert "diffusion_lit." not in text
    assert text.startswith("# ")
    *below, own = layers(str(path))
    included: dict[tuple[str, ...], Any] = {}
    for layer in below:
        included |= leaves(layer.tree)
    chosen = {key[:-1] for key in leaves(own.tree) if key[-1:] == ("class_path",)}
    repeated = [
        key
        for key, value in leaves(own.tree).items()
        if included.get(key, object()) == value and not any(key[: len(c)] == c for c in chosen)
    ]
    assert repeated == []


@pytest.mark.parametrize("recipe", sorted(set(names()) - {"base"}))
def test_the_average_of_a_whole_run_is_of_trained_weights(recipe: str) -> None:
    tree = cli.merged(parse(["fit", "-c", recipe], ["fit"]), cli.command_slots("fit"))
    if tree.get("ema", {}) is not None and "max_steps" in tree["trainer"]:
        assert EMA(**tree.get("ema", {})).start_share(tree["trainer"]["max_steps"]) <= NOTABLE


def test_a_recipe_has_at_most_17_lines_on_average() -> None:
    lines = [len(path.read_text().splitlines()) for path in CONFIGS.rglob("*.yaml")]
    assert sum(lines) <= 17 * len(lines)


def test_while_training_a_score_uses_fewer_images_than_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate("cifar10", monkeypatch)
    [evaluation] = [c for c in callbacks_of(made) if type(c).__name__ == "Evaluation"]
    assert (evaluation.training_requests.num_images, evaluation.requests.num_images) == (10_000, 50_000)
    assert isinstance(evaluation.training_sampler, DDIM)
    assert evaluation.sampler is None


def test_the_readme_names_every_recipe() -> None:
    """By name, or by a family such as `cd_*`, of which the table lists the members."""
    said = re.findall(r"`([^`\s]+)`", (CONFIGS.parent / "README.md").read_text())
    assert [recipe for recipe in RECIPES if not any(fnmatch(recipe, name) for name in said)] == []
