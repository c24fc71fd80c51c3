"""How configurations merge: files, includes, checkpoints and options; what is chosen has its own defaults."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffusion_lit import cli
from diffusion_lit.checkpoint import load_model
from diffusion_lit.command import require
from diffusion_lit.configuration import Merge, build
from diffusion_lit.diffusion import DPMSolver, Heun, LogSNR, Sampler
from diffusion_lit.loggers import clear_save_dir, fill_save_dir
from diffusion_lit.main import COMMANDS
from diffusion_lit.networks.regularizer import DiagonalGaussian
from diffusion_lit.parts import MISSING, Slot, candidates, import_part, signature, takes
from diffusion_lit.recipes import find_file, layers, recipes
from diffusion_lit.system import System

SYSTEM: Any = System
FIT = cli.command_slots("fit")


def tree(*args: str) -> dict[str, Any]:
    """The configuration that a command line makes."""
    command = cli.parse(args, list(COMMANDS))
    return cli.merged(command, cli.command_slots(command.name))


def part(tree: Any, *keys: str) -> Any:
    """The part, or the value, at a place, as (class name, arguments)."""
    for key in keys:
        tree = tree.get("init_args", tree)[key]
    if isinstance(tree, dict) and "class_path" in tree:
        return tree["class_path"].rpartition(".")[2], tree.get("init_args", {})
    return tree


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


# A class that is chosen has its own defaults


def slots() -> list[tuple[str, type, str]]:
    """Every slot that `fit` has, at every depth: the part that it belongs to, the part's class and the slot's name."""
    found: dict[str, tuple[str, type, str]] = {}
    waiting: list[Any] = [slot.hint for slot in FIT.values() if slot.fixed]
    waiting += [part for name in ("model", "data") for part in candidates(takes(FIT[name].hint).bases).values()]
    seen = set()
    while waiting:
        owner = waiting.pop()
        if owner in seen or not owner.__module__.startswith("diffusion_lit."):
            continue
        seen.add(owner)
        for key, slot in signature(owner).slots.items():
            kind = takes(slot.hint)
            inner = [takes(hint).bases for hint in (*kind.items, *kind.values)]
            waiting += [part for bases in (kind.bases, *inner) for part in candidates(bases).values()]
            if len(candidates(kind.bases)) > 1:
                found[f"{owner.__name__}.{key}"] = (owner.__name__, owner, key)
    return list(found.values())


SLOTS = slots()


def test_the_slots_are_those_that_models_have() -> None:
    names = {f"{name}.{key}" for name, _, key in SLOTS}
    assert {
        *("DiffusionModule.network", "DiffusionModule.sampler", "DiffusionModule.optimizer"),
        *("DiffusionModule.lr_scheduler", "DiffusionModule.objective", "DDIM.grid", "DiscreteProcess.schedule"),
        *("Ancestral.variance", "DenoisingLoss.weighting", "Evaluation.extractor", "Evaluation.training_sampler"),
        *("ImageData.source", "SampleGrid.sampler", "DiffusionModule.parameterization", "Evaluation.table"),
    } <= names


@pytest.mark.parametrize(("name", "owner", "key"), SLOTS, ids=[f"{name}.{key}" for name, _, key in SLOTS])
@pytest.mark.parametrize("where", ["in a file", "typed"])
def test_a_class_that_is_chosen_has_its_own_defaults_in_every_slot(
    name: str, owner: type, key: str, where: str
) -> None:
    slot = signature(owner).slots[key]
    kind = takes(slot.hint)
    choices = candidates(kind.bases)
    merge = Merge(source="a.yaml") if where == "in a file" else Merge(typed=True)
    default = signature(owner).defaults.get(key, MISSING)
    for first in choices.values():
        chosen = merge.value(slot, default, first.__name__, key)
        # Whatever the first class had, with values that are none's default.
        odd = {n: 12345.5 for n, v in chosen["init_args"].items() if not isinstance(v, dict)}
        below = {**chosen, "init_args": {**chosen["init_args"], **odd}}
        for second in choices.values():
            again = merge.value(slot, below, {"class_path": second.__name__}, key)
            assert import_part(again["class_path"]) is second
            wanted = below["init_args"] if second is first else dict(signature(second, kind.given).defaults)
            assert again["init_args"] == wanted
            if second is not first:
                assert merge.value(slot, below, second.__name__, key) == again


def test_arguments_without_a_class_are_those_of_the_class_below() -> None:
    made = tree("fit", "-c", "cifar10", "--model.sampler.clip", "false")
    name, arguments = part(made, "model", "sampler")
    assert (name, arguments["clip"], arguments["variance"]["class_path"].rpartition(".")[2]) == (
        "Ancestral",
        False,
        "FixedLarge",
    )


def test_a_class_that_is_named_again_keeps_what_was_chosen_for_it() -> None:
    made = tree(
        "fit", "-c", "digits", "--model.sampler", "DDIM", "--model.sampler.eta", "0.5", "--model.sampler", "DDIM"
    )
    assert part(made, "model", "sampler")[1]["eta"] == 0.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of the digits recipe with a small network, not trained."""
    path = tmp_path_factory.mktemp("run") / "checkpoints" / "last.ckpt"
    path.parent.mkdir()
    made = tree("fit", "-c", "digits", "--model.network.width", "8", "--model.network.num_groups", "4")
    config = {name: value for name, value in made.items() if name in cli.CARRIED}
    torch.manual_seed(0)
    model = build(config["model"], SYSTEM)
    torch.save({"state_dict": model.state_dict(), "config": config, "format": 2}, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "steps", "grid"), [("DPMSolver", 20, "LogSNR"), ("Heun", 35, "Karras"), ("Ancestral", None, "Uniform")]
)
def test_another_sampler_over_a_checkpoint_or_a_recipe_has_its_documented_steps_and_grid(
    name: str, steps: int | None, grid: str, checkpoint: str
) -> None:
    for args in (["test", "--ckpt_path", checkpoint], ["fit", "-c", "digits"], ["fit", "-c", "iddpm_cifar10"]):
        chosen, arguments = part(tree(*args, "--model.sampler", name), "model", "sampler")
        if chosen == "Ancestral" and "iddpm_cifar10" in args:
            continue  # The same class as the recipe's.
        assert (chosen, arguments["steps"], part(arguments, "grid")[0]) == (name, steps, grid)


def test_a_sampler_chosen_in_a_file_over_a_checkpoint_has_its_own_defaults(checkpoint: str, tmp_path: Path) -> None:
    file = write(tmp_path / "faster.yaml", "model: {sampler: DPMSolver}")
    made = cli.CLI.parts(["predict", "--ckpt_path", checkpoint, "-c", file])
    sampler = made.model.sampler
    assert isinstance(sampler, DPMSolver)
    assert (sampler.steps, type(sampler.grid)) == (20, LogSNR)
    assert isinstance(load_model(checkpoint), torch.nn.Module)


# Short names and forms


@pytest.mark.parametrize(
    "text",
    [
        "model: {sampler: {class_path: DDIM, steps: 7}}",
        "model: {sampler: {class_path: diffusion_lit.diffusion.DDIM, steps: 7}}",
        "model: {sampler: {class_path: diffusion_lit.diffusion.samplers.ddim.DDIM, init_args: {steps: 7}}}",
        "model: {class_path: DiffusionModule, init_args: {sampler: {class_path: DDIM, init_args: {steps: 7}}}}",
        "model: {class_path: diffusion_lit.module.DiffusionModule, sampler: {class_path: DDIM, steps: 7}}",
        "model.sampler: {class_path: DDIM, steps: 7}",
        "{model.sampler.class_path: DDIM, model.sampler.steps: 7}",
    ],
)
def test_all_forms_of_a_file_mean_the_same(text: str, tmp_path: Path) -> None:
    file = write(tmp_path / "form.yaml", text)
    assert tree("fit", "-c", "digits", "-c", file) == {
        **tree("fit", "-c", "digits", "--model.sampler.steps", "7"),
        "trainer": {**tree("fit", "-c", "digits")["trainer"], "default_root_dir": "runs/form"},
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--model.sampler.steps", "7"],
        ["--model.sampler.steps=7"],
        ["--model.init_args.sampler.init_args.steps", "7"],
        ["--model.sampler", "{class_path: DDIM, steps: 7}"],
        ["--model.sampler", "DDIM", "--model.sampler.steps", "7"],
        ["--config", '{"model": {"sampler": {"steps": 7}}}'],
    ],
)
def test_all_forms_of_an_option_mean_the_same(options: list[str]) -> None:
    assert part(tree("fit", "-c", "digits", *options), "model", "sampler")[1]["steps"] == 7


def test_a_network_of_a_short_name_alone_is_one_of_defaults() -> None:
    assert part(tree("fit", "-c", "digits", "--model.network", "ADMUNet"), "model", "network") == (
        "ADMUNet",
        signature(import_part("diffusion_lit.networks.ADMUNet")).defaults,
    )


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("ema.decays", "[0.9, 0.99]", [0.9, 0.99]),
        ("ema.decays", "0.99", [0.99]),
        ("trainer.max_steps", "1_000", 1000),
        ("trainer.gradient_clip_val", "null", None),
        ("trainer.gradient_clip_val", "1e-3", 0.001),
        ("trainer.gradient_clip_val", ".inf", float("inf")),
        ("trainer.logger", "false", False),
        ("trainer.devices", "auto", "auto"),
        ("trainer.devices", "2", 2),
        ("trainer.devices", "[0, 1]", [0, 1]),
        ("trainer.precision", "bf16-mixed", "bf16-mixed"),
        ("trainer.max_time", "00:01:00:00", "00:01:00:00"),
        ("ckpt_path", "123", "123"),
        ("ckpt_path", "last", "last"),
        ("sample_grid.every_n_steps", "null", None),
    ],
)
def test_a_typed_value_is_read_as_its_argument_takes_it(option: str, text: str, value: object) -> None:
    found = part(tree("fit", "-c", "digits", f"--{option}", text), *option.split("."))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("trainer.max_steps", "many", "trainer.max_steps='many': must be a whole number"),
        ("trainer.max_steps", "null", "trainer.max_steps=null: must be a whole number"),
        ("trainer.max_steps", "1.5", "trainer.max_steps=1.5: must be a whole number"),
        ("model.sampler.steps", "true", "model.sampler.steps=True: must be a whole number, or null"),
        ("model.optimizer.lr", "null", "model.optimizer.lr=null: must be a number"),
        ("model.optimizer.betas", "null", "model.optimizer.betas=null: must be a list"),
        ("model.network.multipliers", "{a: 1}", "must be a list"),
        ("ema.warmup", "1", "ema.warmup=1: must be true or false"),
        ("data.on_corrupt", "ignore", "data.on_corrupt='ignore': must be 'stop', or 'skip'"),
        ("trainer.process_timeout", "null", "trainer.process_timeout=null: must be a number"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_key_value_and_bound(option: str, value: str, bound: str) -> None:
    with pytest.raises(ValueError, match=f"^{option}=.*must be") as refusal:
        tree("fit", "-c", "digits", f"--{option}", value)
    assert bound in str(refusal.value)


def test_a_list_of_parts_can_be_given_appended_to_and_completed() -> None:
    scores = ["--evaluation.scores", "[FrechetDistance, {class_path: KID, subsets: 5}]"]
    made = tree("fit", "-c", "digits", *scores)
    assert [part({"x": score}, "x")[0] for score in made["evaluation"]["scores"]] == ["FrechetDistance", "KID"]
    callbacks = ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    made = tree("fit", "-c", "digits", *callbacks, "--trainer.callbacks+", "LearningRateMonitor")
    first, second = made["trainer"]["callbacks"]
    assert part({"x": first}, "x")[0] == "EarlyStopping"
    assert first["init_args"]["monitor"] == "val/loss"
    assert part({"x": second}, "x")[0] == "LearningRateMonitor"


def test_the_defaults_of_every_part_of_lightning_and_torch_are_plain_data() -> None:
    found = [*candidates((Callback,)).values(), *candidates((Logger,)).values(), Timer]
    for kind in (*found, *candidates((Optimizer,)).values(), *candidates((LRScheduler,)).values()):
        yaml.safe_dump(dict(signature(kind, 1).defaults))
    timer = ["--trainer.callbacks+", "lightning.pytorch.callbacks.Timer", "--trainer.callbacks.duration", "00:01:00:00"]
    [made] = tree("fit", "-c", "digits", *timer)["trainer"]["callbacks"]
    assert part(made)[1]["interval"] == "step"


def test_what_a_part_in_a_list_lacks_is_asked_for_by_an_option_that_there_is() -> None:
    callbacks = ["--trainer.callbacks+", "LearningRateMonitor", "--trainer.callbacks+", "GradientAccumulationScheduler"]
    line = r"trainer\.callbacks\[1\]\.scheduling is missing, .* give --trainer\.callbacks\.scheduling$"
    with pytest.raises(ValueError, match=line):
        require(tree("fit", "-c", "digits", *callbacks), FIT)
    require(tree("fit", "-c", "digits", *callbacks, "--trainer.callbacks.scheduling", "{0: 2}"), FIT)


@pytest.mark.parametrize("name", ["CSVLogger", "Curves", "WandB"])
def test_loggers_work_by_name_and_write_to_the_run(name: str) -> None:
    made = tree("fit", "-c", "digits", "--trainer.logger", name)["trainer"]
    fill_save_dir(made["logger"], "runs/digits")
    chosen, arguments = part(made, "logger")
    assert chosen == name
    assert arguments["save_dir"] == "runs/digits"
    require({"trainer": made}, {})
    clear_save_dir(made["logger"], "runs/digits")
    assert made["logger"]["init_args"].get("save_dir") != "runs/digits"


# Files


def test_an_included_file_lies_below_and_is_found_from_the_file_that_includes_it(tmp_path: Path) -> None:
    write(tmp_path / "a" / "low.yaml", "include: digits\ntrainer: {max_steps: 3}\nema: {decays: [0.1]}")
    file = write(tmp_path / "a" / "high.yaml", "include: [low.yaml]\nema: {decays: [0.2]}")
    made = tree("fit", "-c", file)
    assert (made["trainer"]["max_steps"], made["ema"]["decays"]) == (3, [0.2])
    assert part(made, "data", "source")[0] == "Digits"
    assert made["trainer"]["default_root_dir"] == "runs/high"


@pytest.mark.parametrize("text", ["include: {this}", "include: [digits, {other}]"])
def test_files_that_include_each_other_are_refused(text: str, tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "include: this.yaml")
    file = write(tmp_path / "this.yaml", text.format(this="this.yaml", other="other.yaml"))
    with pytest.raises(ValueError, match=r"this\.yaml includes itself"):
        layers(file)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [", "while parsing"),
        ("a: b: c", "mapping values are not allowed"),
        ("- 1", "is no configuration; give a recipe"),
        ("just text", "is no configuration; give a recipe"),
        ("include: 3", "include=3 must be the name of a file"),
        ("\x00", "control characters are not allowed"),
        ("[" * 3000, "bad.yaml"),
        ("model: 3", "model=3: must be System"),
        ("model: [1]", "model=[1]: must be System"),
        ("trainer: 3", "trainer: must be keys and values, not 3"),
        ("model: {network: {class_path: UNet, init_args: 3}}", "model.network: must be keys and values, not 3"),
        ("model: {sampler: {class_path: [DDIM]}}", "['DDIM'] is not the name of a class"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(text: str, part: str, tmp_path: Path) -> None:
    file = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ValueError, match=r"bad\.yaml") as refusal:
        tree("fit", "-c", file)
    assert part in str(refusal.value)


def test_all_packages_and_recipes_are_installed(repository: Path) -> None:
    settings = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(repository) for path in (repository / "diffusion_lit").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(settings["packages"]) == {*packages, "diffusion_lit.configs"}
    assert settings["package-dir"] == {"diffusion_lit.configs": "configs"}
    installed = {path for mask in settings["package-data"]["diffusion_lit.configs"] for path in recipes().glob(mask)}
    assert installed == {path for path in recipes().rglob("*") if path.is_file()}


def test_a_recipe_is_found_by_name_from_anywhere_and_a_file_goes_before() -> None:
    assert find_file("cifar10") == find_file("cifar10.yaml") == recipes() / "cifar10.yaml"
    assert find_file("guidance/digits") == recipes() / "guidance" / "digits.yaml"
    write(Path("cifar10.yaml"), "trainer: {max_steps: 1}")
    assert find_file("cifar10.yaml") == Path("cifar10.yaml")
    with pytest.raises(FileNotFoundError, match="no file or recipe 'cifar1'; did you mean 'cifar10'"):
        find_file("cifar1")


@pytest.mark.parametrize("order", [["base", "cifar10"], ["cifar10", "base"], ["cifar10"]])
def test_base_yaml_changes_nothing_before_or_after_a_recipe(order: list[str]) -> None:
    files = [word for name in order for word in ("-c", str(recipes() / f"{name}.yaml"))]
    name = {"default_root_dir": f"runs/{order[-1]}"}
    wanted = tree("fit", "-c", "cifar10")
    assert tree("fit", *files) == {**wanted, "trainer": {**wanted["trainer"], **name}}


def test_keys_of_other_commands_in_a_file_are_passed_over() -> None:
    made = tree("test", "-c", "digits", "-c", "guidance/digits")
    assert "per_class" not in made
    assert tree("predict", "-c", "digits", "-c", "guidance/digits")["per_class"] == 8
    with pytest.raises(ValueError, match="unknown key 'per_class'"):
        tree("test", "-c", "digits", "--per_class", "8")


def test_a_home_directory_is_expanded_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "include: folder\ntrainer: {default_root_dir: ~/run}\ndata: {source: {root: ~/x}}"
    write(tmp_path / "mine.yaml", text)
    made = tree("fit", "-c", "~/mine.yaml", "--evaluation.cache_dir", "~/cache")
    assert made["trainer"]["default_root_dir"] == str(tmp_path / "run")
    assert part(made, "data", "source")[1]["root"] == str(tmp_path / "x")
    assert made["evaluation"]["cache_dir"] == str(tmp_path / "cache")


def test_a_section_can_be_switched_off_and_on_again() -> None:
    made = cli.CLI.parts(["fit", "-c", "digits", "--ema", "null", "--evaluation", "null", "--trainer.logger", "false"])
    kinds = {type(callback).__name__ for callback in vars(made.trainer)["callbacks"]}
    assert "SampleGrid" in kinds
    assert not {"EMA", "Evaluation"} & kinds
    assert (made.model.config["ema"], made.model.config["evaluation"]) == (None, None)
    assert tree("fit", "-c", "digits", "--ema", "null", "--ema.warmup", "true")["ema"] == {"warmup": True}


def test_a_seed_that_would_be_overridden_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.seed=5 would be overridden; give --seed_everything 5"):
        cli.check_seeds(tree("fit", "-c", "digits", "--model.seed", "5"))
    for seed in ("-1", str(2**32)):
        with pytest.raises(ValueError, match="within"):
            cli.check_seeds(tree("fit", "-c", "digits", "--seed_everything", seed))
    made = cli.CLI.parts(["fit", "-c", "digits", "--seed_everything", "7", "--trainer.logger", "false"])
    assert (made.model.seed, made.datamodule.seed) == (7, 7)


def test_a_table_is_an_evaluation_s(checkpoint: str) -> None:
    command = cli.as_test(cli.parse(["table", "--ckpt_path", checkpoint, "--table", "SamplerTable"], ["table"]))
    made = cli.merged(command, cli.command_slots("test"))
    assert part(made, "evaluation", "table")[0] == "SamplerTable"
    command = cli.as_test(cli.parse(["table", "--ckpt_path", checkpoint, "--table.steps", "[5]"], ["table"]))
    made = cli.merged(command, cli.command_slots("test"))
    assert part(made, "evaluation", "table")[1]["steps"] == [5]


# Types


def test_what_an_argument_takes_is_read_from_its_type() -> None:
    def example(
        a: int | None, b: Sampler, c: list[Sampler], d: dict[str, Sampler], e: Any, f: "type[Sampler]", g: float = 1.0
    ) -> None: ...

    found = {name: takes(slot.hint) for name, slot in signature(example).slots.items()}
    assert [str(found[name]) for name in "abg"] == ["a whole number, or null", "Sampler", "a number"]
    assert [name for name in found if found[name].parts] == ["b", "c", "d"]
    assert found["e"].anything
    assert found["f"].function


def test_a_part_that_is_needed_and_missing_is_named() -> None:
    made = Merge(typed=True).sections({}, {"model": {"sampler": "Heun"}}, FIT)
    with pytest.raises(ValueError, match=r"model\.network is missing, which DiffusionModule needs"):
        require({**made, "data": {"class_path": "x"}}, {"model": Slot(object)})
    assert part(made, "model", "sampler")[0] == Heun.__name__


# Help


@pytest.mark.parametrize(
    ("topics", "parts"),
    [
        ([], ["usage: diffusion_lit fit", "--ckpt_path", "sections", "cifar10", "--trust"]),
        (["model.sampler"], ["--model.sampler CLASS", "DPMSolver", "Heun", "--eta", "(50)"]),
        (["model.sampler.Heun"], ["Heun", "--grid", "(Karras)", "(35)"]),
        (["model.optimizer"], ["AdamW", "SGD"]),
        (["evaluation"], ["--num_images", "(1797)"]),
        (["trainer"], ["--max_steps", "--process_timeout"]),
        (["data.source"], ["Folder", "LSUN", "Digits"]),
        (["data.source.Folder"], ["--root"]),
        (["trainer.max_steps"], ["--trainer.max_steps VALUE: a whole number"]),
    ],
)
def test_help_fits_a_screen_and_says_what_there_is(topics: list[str], parts: list[str]) -> None:
    text = cli.help_on(cli.parse(["fit", "-c", "digits", "--help", *topics], ["fit"]))
    assert [word for word in parts if word not in text] == []
    assert text.count("\n") <= 60
    assert max(map(len, text.splitlines())) <= 110


def test_help_on_a_class_may_be_asked_for_as_lightning_has_it() -> None:
    def shown(*words: str) -> str:
        return cli.help_on(cli.parse(["fit", *words], ["fit"]))

    assert shown("--model.help", "DiffusionModule") == shown("--help", "DiffusionModule")
    assert shown("--model.sampler.help", "DDIM") == shown("--help", "DDIM")
    assert shown("--model.sampler.help") == shown("--help", "model.sampler")


def test_help_about_nothing_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="no SampelGrid"):
        cli.help_on(cli.parse(["fit", "--help", "SampelGrid"], ["fit"]))


def test_a_module_without_arguments_takes_none() -> None:
    assert signature(DiagonalGaussian).slots == {}
    assert not signature(DiagonalGaussian).more
