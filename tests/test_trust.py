"""No configuration in a file runs or imports what is not this package's, unless the user trusts it by name."""

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse._common import parsing_settings

from diffusion_lit import cli, configuration
from diffusion_lit.checkpoint import load_model
from diffusion_lit.configuration import Untrusted, build
from diffusion_lit.diffusion import Sampler

MODEL: dict[str, Any] = {
    "class_path": "diffusion_lit.module.DiffusionModule",
    "init_args": {
        "network": {
            "class_path": "diffusion_lit.networks.UNet",
            "init_args": {"image_size": 8, "in_channels": 1, "width": 8, "multipliers": [1], "num_groups": 4},
        },
    },
}
DATA = {
    "class_path": "diffusion_lit.data.ImageData",
    "init_args": {"source": {"class_path": "diffusion_lit.data.Digits"}},
}
RUN = {"class_path": "subprocess.Popen", "init_args": {"args": "touch MARKER", "shell": True}}
NORM = {"class_path": "torch.nn.InstanceNorm2d", "init_args": {"num_features": 192, "device": RUN}}
NETWORK, OPTIMIZER, SCHEDULER = "model.init_args.network", "model.init_args.optimizer", "model.init_args.lr_scheduler"
SAMPLER = "model.init_args.sampler"
ADAM, DDIM, GRID = "torch.optim.Adam", "diffusion_lit.diffusion.DDIM", "diffusion_lit.diffusion.Uniform"
SAMPLERS: Any = Sampler
SCORE = {"class_path": "diffusion_lit.metrics.FrechetDistance"}


def part(path: Any, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def deep(levels: int, inner: Any) -> Any:
    for _ in range(levels):
        inner = [inner]
    return inner


def bomb(levels: int = 30) -> Any:
    """A list of 2^levels values, of which few are distinct: what YAML's aliases and pickles can hold."""
    found: Any = ["x"]
    for _ in range(levels):
        found = [found, found]
    return found


ALIASES = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join(10 * [f'*{a}'])}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)


# Where in the configuration, and what an attacker puts there.
ATTACKS: dict[str, tuple[str, Any]] = {
    "a class inside an untyped argument of a torch class as extractor": ("evaluation.extractor", NORM),
    "a torch network as extractor": ("evaluation.extractor", part("torch.nn.Identity")),
    "torch_fidelity's network, which unpickles a file": (
        "evaluation.extractor",
        part("torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3", name="x"),
    ),
    "a class as the model": ("model", RUN),
    "a class as the data": ("data", RUN),
    "a class as the network": (NETWORK, RUN),
    "a class of a file in the working directory": (NETWORK, part("evil.Network")),
    "a module in the working directory by a short name": (NETWORK, part("evil")),
    "a torch network around a class": (NETWORK, part("torch.nn.Linear", in_features=RUN, out_features=1)),
    "a class as a whole number": (f"{NETWORK}.init_args.width", RUN),
    "a class in a list of numbers": (f"{NETWORK}.init_args.multipliers", [1, RUN]),
    "a class as the source": ("data.init_args.source", RUN),
    "a class as a path": ("data.init_args.source", part("diffusion_lit.data.Folder", root=RUN, image_size=8)),
    "a class as the sampler": (SAMPLER, RUN),
    "a class as the sampler's grid": (SAMPLER, part(DDIM, grid=RUN)),
    "a class as the sampler's number of steps": (SAMPLER, part(DDIM, steps=RUN)),
    "a part of the wrong kind": (SAMPLER, part("diffusion_lit.networks.UNet")),
    "a class as the optimiser": (OPTIMIZER, RUN),
    "a class as an optimiser's rate": (OPTIMIZER, part(ADAM, lr=RUN)),
    "a class in an optimiser's tuple": (OPTIMIZER, part(ADAM, betas=[RUN, 0.9])),
    "a class in dict_kwargs of an optimiser": (OPTIMIZER, {"class_path": ADAM, "dict_kwargs": {"lr": RUN}}),
    "a function as the optimiser": (OPTIMIZER, "os.system"),
    "a function of the module that optimisers are in": (OPTIMIZER, "torch.optim.sys.exit"),
    "a function as the schedule's factor": (
        SCHEDULER,
        part("torch.optim.lr_scheduler.LambdaLR", lr_lambda="os.system"),
    ),
    "functions in a list": (SCHEDULER, part("torch.optim.lr_scheduler.LambdaLR", lr_lambda=["evil.run"])),
    "functools.partial as the schedule": (SCHEDULER, part("torch.optim.lr_scheduler.partial", func="os.system")),
    "a schedule inside a schedule": (
        SCHEDULER,
        part("torch.optim.lr_scheduler.SequentialLR", schedulers=[RUN], milestones=[1]),
    ),
    "a class in a list of scores": ("evaluation.scores", [part("diffusion_lit.metrics.FrechetDistance"), RUN]),
    "an extractor inside a score": (
        "evaluation.scores",
        [part("diffusion_lit.metrics.FrechetDistance", extractor=NORM)],
    ),
    "a class in a dictionary of samplers": (
        "evaluation.table",
        part("diffusion_lit.evaluation.SamplerTable", samplers={"x": RUN}),
    ),
    "a class as a decay": ("ema.decays", [RUN]),
    "a class as an interval": ("checkpoints.every_n_steps", RUN),
    "a class as the seed": ("seed_everything", RUN),
    "a class without init_args": (NETWORK, {"class_path": "subprocess.Popen", "args": "touch MARKER", "shell": True}),
    "a class path with a space": (NETWORK, part(" subprocess.Popen")),
    "a class path with a newline": (NETWORK, part("subprocess.Popen\n")),
    "a class path in other letters": (NETWORK, part("ｓubprocess.Popen")),
    "a class path that is a list": (NETWORK, part(["subprocess.Popen"])),
    "a path through our package to another": (NETWORK, part("diffusion_lit.cli.sys.exit")),
    "a name that our package has imported": (NETWORK, part("diffusion_lit.recipes.Path")),
    "a package whose name begins as ours": (NETWORK, part("diffusion_lit_evil.Network")),
    "a key with dots": ("model", {**MODEL, "init_args.network.init_args.width": RUN}),
    "a key with spaces": (f"{NETWORK}.init_args.width", {" class_path ": "subprocess.Popen"}),
    "a class path as text": (f"{NETWORK}.init_args.dropout", json.dumps(RUN)),
    "a class path as text in another form": (
        f"{NETWORK}.init_args.dropout",
        "class_path: subprocess.Popen\ninit_args: {}",
    ),
    "a class path as text of an untyped argument": (OPTIMIZER, part(ADAM, foreach=json.dumps(RUN))),
    "a configuration file as a part": (SAMPLER, "evil.yaml"),
    "a class very deep in lists": (f"{NETWORK}.init_args.multipliers", deep(300, RUN)),
    "more values than any memory holds": (
        "evaluation.table",
        part("diffusion_lit.evaluation.SamplerTable", samplers={"x": bomb()}),
    ),
    "more values than any memory holds, as text": (OPTIMIZER, part(ADAM, foreach=ALIASES)),
    "an unknown section with a class": ("model.init_args.extra", RUN),
}


@pytest.fixture(autouse=True)
def evil(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, from which Python imports, with a module and a configuration of an attacker's."""
    here = Path.cwd()
    touch = f"open({str(here / 'MARKER')!r}, 'w').close()\n"
    for name in ("evil", "diffusion_lit_evil"):
        (here / f"{name}.py").write_text(
            f"{touch}import torch\nclass Network(torch.nn.Module): pass\ndef run(x): return 1\n"
        )
    (here / "evil.yaml").write_text(yaml.safe_dump(RUN))
    monkeypatch.syspath_prepend(str(here))
    return here


def carry(path: Path, config: Any) -> str:
    torch.save({"state_dict": {}, "config": config, "format": 2}, path)
    return str(path)


def attacked(key: str, value: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"model": copy.deepcopy(MODEL), "data": copy.deepcopy(DATA)}
    *folders, leaf = key.split(".")
    place = config
    for folder in folders:
        place = place.setdefault(folder, {})
    place[leaf] = value
    return config


def assert_nothing_ran(here: Path) -> None:
    assert not (here / "MARKER").exists()
    assert not {"evil", "diffusion_lit_evil"} & sys.modules.keys()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_checkpoint_is_refused_in_one_line_and_nothing_runs(
    name: str, evil: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = attacked(*ATTACKS[name])
    file = carry(evil / "bad.ckpt", config)
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", "--ckpt_path", file, "--trainer.accelerator", "cpu"])
    error = capfd.readouterr().err
    assert end.value.code == 2, error
    assert error.count("\n") == 1, error
    assert error.startswith("diffusion_lit: error: ")
    assert len(error) < 600
    assert_nothing_ran(evil)
    if not name.startswith(("a class as the data", "a class as the s", "a class as a path", "an unknown")):
        return
    (evil / "bad.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "-c", str(evil / "bad.yaml")])
    assert end.value.code == 2
    assert_nothing_ran(evil)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.callbacks", [RUN]),
        ("trainer.callbacks", [part("lightning.pytorch.callbacks.LambdaCallback", setup="evil.run")]),
        ("trainer.callbacks", [part("lightning.pytorch.callbacks.ModelCheckpoint", monitor=RUN)]),
        ("trainer.logger", RUN),
        ("trainer.logger", part("lightning.pytorch.loggers.WandbLogger", experiment=RUN)),
        ("trainer.logger", {"class_path": "WandbLogger", "dict_kwargs": {"settings": RUN}}),
        ("trainer.logger", [part("evil.Network")]),
        ("trainer.strategy", part("evil.Network")),
        ("trainer.plugins", [RUN]),
        ("trainer.profiler", RUN),
        ("trainer.max_steps", RUN),
    ],
)
def test_a_hostile_recipe_is_refused_in_its_trainer_too(
    key: str, value: Any, evil: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (evil / "bad.yaml").write_text(yaml.safe_dump(attacked(key, value)))
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "-c", str(evil / "bad.yaml")])
    error = capfd.readouterr().err
    assert end.value.code == 2
    assert error.count("\n") == 1
    assert "bad.yaml" in error
    assert_nothing_ran(evil)


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch MARKER']",
        "model: !!python/name:os.system",
        "model: !!python/object/new:subprocess.Popen [touch MARKER]",
        "model: !!python/module:evil",
    ],
)
def test_a_tag_that_makes_an_object_is_refused_with_the_file_s_name(
    text: str, evil: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (evil / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "-c", str(evil / "bad.yaml")])
    assert end.value.code == 2
    assert "bad.yaml" in capfd.readouterr().err
    assert_nothing_ran(evil)


@pytest.mark.parametrize("name", [name for name, (key, _) in ATTACKS.items() if key.startswith("model")])
def test_a_model_loaded_from_python_is_checked_alike(name: str, evil: Path) -> None:
    file = carry(evil / "bad.ckpt", attacked(*ATTACKS[name]))
    with pytest.raises(ValueError, match=r"bad\.ckpt"):
        load_model(file)
    assert_nothing_ran(evil)


def test_sections_that_a_checkpoint_does_not_need_are_not_read(evil: Path) -> None:
    config = {**attacked("trainer.callbacks", [RUN]), "out": "elsewhere", "ckpt_path": "evil", "other": RUN}
    file = carry(evil / "odd.ckpt", config)
    command = cli.parse(["predict", "--ckpt_path", file], ["predict"])
    tree = cli.merged(command, cli.command_slots("predict"))
    assert "callbacks" not in tree["trainer"]
    assert "other" not in tree
    assert tree.get("out") is None
    assert tree["ckpt_path"] == file


def test_a_trusted_class_is_imported_and_no_other(evil: Path) -> None:
    (evil / "mine.py").write_text(
        "from diffusion_lit.diffusion import DDIM\n"
        "class Mine(DDIM):\n"
        "    def __init__(self, tag=None): super().__init__(7)\n"
    )
    assert build({"class_path": "mine.Mine"}, SAMPLERS, trust=["mine"]).steps == 7
    for trust in (["min"], ["mine.Other"], ["evil"]):
        with pytest.raises(Untrusted, match="--trust mine"):
            build({"class_path": "mine.Mine"}, SAMPLERS, trust)
    with pytest.raises(Untrusted, match="takes plain data"):
        build(part("mine.Mine", tag=RUN), SAMPLERS, trust=["mine"])
    assert_nothing_ran(evil)


def test_what_is_typed_is_the_user_s_word(evil: Path) -> None:
    (evil / "typed.py").write_text("from diffusion_lit.diffusion import DDIM\nclass Mine(DDIM): pass\n")
    command = cli.parse(["fit", "-c", "digits", "--model.sampler", "typed.Mine", "--model.sampler.steps", "9"], ["fit"])
    tree = cli.merged(command, cli.command_slots("fit"))
    assert tree["model"]["init_args"]["sampler"] == part(
        "typed.Mine", steps=9, eta=0.0, grid={"class_path": GRID}, clip=True
    )


def test_the_parser_itself_imports_nothing_else(evil: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Sampler, "part")
    with configuration.only_imports([]), pytest.raises(ArgumentError, match="not allowed"):
        parser.parse_object({"part": {"class_path": "evil.Network"}})
    assert_nothing_ran(evil)


def test_the_same_configurations_without_the_attack_are_accepted() -> None:
    for key, value in (("ema.decays", [0.5]), (SAMPLER, part(DDIM, grid=part(GRID))), ("evaluation.scores", [SCORE])):
        configuration.Merge().sections({}, attacked(key, value), cli.command_slots("fit"))


def test_the_parser_s_settings_are_as_before_afterwards() -> None:
    before = dict(parsing_settings)
    with configuration.only_imports(["mine"]):
        assert parsing_settings != before
    assert parsing_settings == before


def test_a_checkpoint_does_not_say_where_files_are_written(evil: Path) -> None:
    file = carry(evil / "odd.ckpt", attacked("evaluation.cache_dir", str(evil / "cache")))
    command = cli.parse(["test", "--ckpt_path", file], ["test"])
    assert cli.merged(command, cli.command_slots("test"))["evaluation"].get("cache_dir") is None
    command = cli.parse(["test", "--ckpt_path", file, "--evaluation.cache_dir", "mine"], ["test"])
    assert cli.merged(command, cli.command_slots("test"))["evaluation"]["cache_dir"] == "mine"


@pytest.mark.parametrize("config", [[1], "model", 5, {"model": None}, {"model": [1]}, {"model": "x" * 5000}])
def test_a_configuration_of_another_form_is_one_line(
    config: Any, evil: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = carry(evil / "odd.ckpt", config)
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", "--ckpt_path", file])
    error = capfd.readouterr().err
    assert (end.value.code, error.count("\n")) == (2, 1), error


def test_a_checkpoint_that_names_itself_is_refused(evil: Path, capfd: pytest.CaptureFixture[str]) -> None:
    network = copy.deepcopy(MODEL["init_args"]["network"])
    network["init_args"]["attention"] = []
    distance = part("diffusion_lit.methods.anomaly.maps.FeatureDistance", checkpoint=str(evil / "bad.ckpt"))
    detector = part("diffusion_lit.methods.anomaly.maps.Detector", distance=distance)
    model = part("AnoDDPM", network=network, detector=detector)
    file = carry(evil / "bad.ckpt", {"model": model, "data": DATA})
    with pytest.raises(ValueError, match="names itself"):
        load_model(file)
    with pytest.raises(SystemExit):
        cli.main(["predict", "--ckpt_path", file, "--trainer.accelerator", "cpu"])
    line = capfd.readouterr().err.splitlines()[-1]
    assert line == f"diffusion_lit: error: {file} names itself, through its own configuration"


def test_a_module_of_the_working_directory_is_found_when_it_is_named_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where the installed program runs; `python -m` looks there by itself.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path and Path(path).resolve() != tmp_path.resolve()])
    (tmp_path / "wanted.py").write_text("from diffusion_lit.diffusion import DDIM\nclass Mine(DDIM): pass\n")
    (tmp_path / "unasked.py").write_text("raise RuntimeError\n")
    with pytest.raises(Untrusted, match="--trust wanted"):
        build({"class_path": "wanted.Mine"}, SAMPLERS)
    assert "wanted" not in sys.modules
    assert build({"class_path": "wanted.Mine", "steps": 5}, SAMPLERS, trust=["wanted"]).steps == 5
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("unasked")
