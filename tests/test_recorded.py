"""A model that was put together in Python carries its configuration in its checkpoints."""

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.checkpoint import load_model, read_checkpoint
from diffusion_lit.configuration import Untrusted, build
from diffusion_lit.diffusion import DDIM, ClassifierFree, Heun, Sampler
from diffusion_lit.main import main
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.parts import MISSING, defined, fits, own_class, signature, takes
from diffusion_lit.recorded import NotRecorded, configuration_of
from diffusion_lit.types import Condition, Network, Part
from tests import tiny
from tests.test_configs import CLASSIFIERS, RECIPES, instantiate

ADAM = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.95))
SAMPLERS: Any = Sampler
LARGE = {"folder", "lsun_church", "iddpm_cifar10", "cifar10_cfg", "adm_imagenet64", "edm_cifar10", "ddgan_cifar10"}
VARIOUS = [recipe for recipe in (*RECIPES, *CLASSIFIERS) if "digits" in recipe or recipe in LARGE]
"""Recipes that together have every part that any recipe has."""


class Small(Network):
    """A user's own network, which keeps none of its arguments."""

    def __init__(self, image_size: int, width: int = 8) -> None:
        super().__init__()
        self.image_size, self.in_channels = image_size, 1
        self.layers = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        result: Tensor = self.layers(x)
        return result


class Plain(nn.Module):
    """A network that is no `Network`, and keeps none of its arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.image_size, self.in_channels = 8, 1
        self.layer = nn.Conv2d(1, 1, width, padding=width // 2)

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        result: Tensor = self.layer(x)
        return result


def plain_lightning(system: lightning.LightningModule, path: Path, steps: int = 2) -> Path:
    """Trains with Lightning's own Trainer and returns the checkpoint."""
    trainer = lightning.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(system, tiny.data())
    trainer.save_checkpoint(path, weights_only=False)
    return path


def model(**kwargs: Any) -> DiffusionModule:
    return tiny.module(**{"optimizer": ADAM, "lr_scheduler": None, **kwargs})


def agrees(recorded: Any, resolved: Any) -> bool:
    """Whether two configurations are the same; where one says null a part may have made what it needs."""
    if isinstance(recorded, dict) and isinstance(resolved, dict):
        names = recorded.keys() | resolved.keys()
        return all(agrees(recorded.get(name, MISSING), resolved.get(name, MISSING)) for name in names)
    if isinstance(recorded, list) and isinstance(resolved, list):
        return len(recorded) == len(resolved) and all(map(agrees, recorded, resolved))
    return recorded == resolved or resolved is None or (recorded == {} and resolved is MISSING)


@pytest.mark.few(5)
@pytest.mark.parametrize("recipe", VARIOUS)
def test_parts_say_what_the_command_line_made_them_of(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = instantiate(recipe, monkeypatch)
    resolved = made.model.config
    for name, part in (("model", made.model), ("data", made.datamodule)):
        left_out: list[str] = []
        recorded = configuration_of(part, name, left_out)
        recorded["init_args"].pop("seed")
        resolved[name]["init_args"].pop("seed", None)
        assert left_out == []
        assert agrees(recorded, resolved[name])


def test_a_model_of_a_plain_trainer_is_loaded_and_makes_the_same_images(tmp_path: Path) -> None:
    system = model()
    path = plain_lightning(system, tmp_path / "model.ckpt")
    loaded = load_model(path, DiffusionModule)
    assert torch.equal(loaded.sample(range(3), seed=1), system.sample(range(3), seed=1))
    optimizer: Any = loaded.make_optimizer([nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["betas"]) == (1e-3, (0.9, 0.95))
    config = read_checkpoint(path)["config"]
    assert config["seed_everything"] == 3
    assert config["data"]["init_args"]["batch_size"] == tiny.BATCH
    assert config["model"]["init_args"]["optimizer"]["class_path"] == "torch.optim.Adam"


def test_a_loaded_model_that_is_trained_on_carries_its_configuration_too(tmp_path: Path) -> None:
    first = plain_lightning(model(), tmp_path / "first.ckpt")
    second = plain_lightning(load_model(first, DiffusionModule).train(), tmp_path / "second.ckpt")
    one, two = (read_checkpoint(path)["config"]["model"] for path in (first, second))
    one["init_args"].pop("optimizer"), two["init_args"].pop("optimizer")
    assert one == two


@pytest.mark.further
def test_the_commands_take_the_checkpoint_of_a_model_made_in_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(plain_lightning(model(), tmp_path / "model.ckpt"))
    quiet = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    main(["predict", "--ckpt_path", path, "--num_images", "2", *quiet])
    assert (tmp_path / "predictions" / "model_seed_0" / "000001.png").is_file()
    main(["test", "--ckpt_path", path, "--evaluation.extractor", "Pixels", "--evaluation.num_images", "8", *quiet])
    assert (tmp_path / "results.jsonl").is_file()
    main(["export", path, "--to", "diffusers", "--out", str(tmp_path / "pipeline")])
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_a_checkpoint_without_data_makes_images_and_says_which_option_scores_need(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dict(torch.load(plain_lightning(model(), tmp_path / "model.ckpt"), weights_only=True))
    del content["config"]["data"]
    path = str(tmp_path / "bare.ckpt")
    torch.save(content, path)
    quiet = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    main(["predict", "--ckpt_path", path, "--num_images", "2", *quiet])
    assert (tmp_path / "predictions" / "bare_seed_0" / "000001.png").is_file()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["test", "--ckpt_path", path, *quiet])
    assert "bare.ckpt carries no configuration of its data; give it by --data.source CLASS" in capsys.readouterr().err


def test_what_was_replaced_after_construction_is_recorded_as_it_is_now(tmp_path: Path) -> None:
    system = model(sampler=DDIM(steps=3))
    system.sampler = Heun(steps=5)
    assert configuration_of(system, "model", [])["init_args"]["sampler"]["class_path"].endswith(".Heun")
    guidance = ClassifierFree(scale=1.0)
    guidance.scale = 2.5
    assert configuration_of(guidance, "guidance", [])["init_args"]["scale"] == 2.5


def test_a_function_that_makes_the_optimiser_is_said_once_and_its_default_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    system = model(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with caplog.at_level("INFO"):
        path = plain_lightning(system, tmp_path / "model.ckpt")
        system.recorded()
    line = "model.optimizer is a function: it is not recorded, and its default is used instead"
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    optimizer: Any = load_model(path, DiffusionModule).make_optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.Adam
    assert "optimizer" not in read_checkpoint(path)["config"]["model"]["init_args"]


def test_a_network_of_the_user_s_own_needs_trust_and_is_then_made_as_it_was(tmp_path: Path) -> None:
    system = model(network=Small(8, width=5))
    path = plain_lightning(system, tmp_path / "model.ckpt")
    with pytest.raises(Untrusted, match=r"tests\.test_recorded\.Small is not part of diffusion_lit.*--trust tests"):
        load_model(path)
    loaded = load_model(path, DiffusionModule, trust=["tests.test_recorded"])
    assert torch.equal(loaded.sample(range(2)), system.sample(range(2)))


def test_a_part_that_cannot_be_recorded_disturbs_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        path = plain_lightning(model(network=Plain(3)), tmp_path / "model.ckpt")
    assert "no configuration of the model (model.network: it is not known with which width the Plain" in caplog.text
    with pytest.raises(ValueError, match=r"carries no configuration of its model; make the model in Python"):
        load_model(path)


def test_what_is_neither_plain_data_nor_a_part_is_named() -> None:
    class Local(DDIM):
        pass

    with pytest.raises(NotRecorded, match=r"sampler: Local is defined inside a function"):
        configuration_of(Local(), "sampler", [])
    sampler = DDIM(steps=torch.tensor(3))  # type: ignore[arg-type]
    with pytest.raises(NotRecorded, match=r"sampler\.steps is a Tensor, which is neither plain data nor a part"):
        configuration_of(sampler, "sampler", [])


def test_what_is_recorded_makes_the_same_part() -> None:
    sampler = DDIM(7, eta=0.5, clip=False)
    again = build(configuration_of(sampler, "sampler", []), SAMPLERS)
    assert vars(again)["steps"] == 7
    assert configuration_of(again, "sampler", []) == configuration_of(sampler, "sampler", [])


SCRIPT = """
import torch
from diffusion_lit import DiffusionModule, load_model
from diffusion_lit.networks import UNet
from diffusion_lit.parts import MISSING, defined, fits, own_class, signature, takes
from diffusion_lit.recorded import configuration_of

class Mine(UNet):
    pass

if __name__ == "__main__":
    network = Mine(image_size=8, in_channels=1, width=8, multipliers=[1], attention=[], num_groups=4)
    print(configuration_of(DiffusionModule(network), "model", [])["init_args"]["network"]["class_path"])
"""


@pytest.mark.further
def test_a_class_of_a_script_is_recorded_by_the_script_s_name(tmp_path: Path) -> None:
    (tmp_path / "my_training.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "my_training.py")], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout.strip() == "my_training.Mine"


def test_constructors_keep_their_signatures() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        UNet(image_size=8, widht=8)  # type: ignore[call-arg]


def test_whatever_a_part_of_the_package_takes_is_a_part_too() -> None:
    classes = [own_class(f"{module}.{name}") for name, modules in defined().items() for module in modules]
    made = [kind for kind in classes if kind is not None and fits(kind, (Part,)) and not inspect.isabstract(kind)]
    assert len(made) > 60
    others = [
        f"{kind.__name__}.{name}: {base.__name__}"
        for kind in made
        for name, slot in signature(kind).slots.items()
        for base in takes(slot.hint).bases
        if base.__module__.startswith("diffusion_lit") and not issubclass(base, Part)
    ]
    assert others == []
