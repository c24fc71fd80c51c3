"""The commands that need a Trainer: fit, validate, test, predict and table."""

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from diffusion_lit import help
from diffusion_lit.callbacks import Plots, ProgressBar, Report, Scalars
from diffusion_lit.callbacks.signals import Stopped
from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.checkpoint import read_checkpoint, run_of
from diffusion_lit.command import Command, configuration, known_elsewhere, parse, require, run_name
from diffusion_lit.configuration import Merge, class_paths, only_imports
from diffusion_lit.errors import OTHER_ERRORS
from diffusion_lit.lightning import callback_keys, ignores_carried_arguments, runs_nothing
from diffusion_lit.loggers import clear_save_dir, fill_save_dir, log_hyperparams
from diffusion_lit.main import COMMANDS, main, outlive_terminal
from diffusion_lit.parts import Slot, import_part, signature
from diffusion_lit.recipes import names
from diffusion_lit.sections import CARRIED, SECTIONS, SEED, WRITTEN
from diffusion_lit.system import System
from diffusion_lit.terminal import printable
from diffusion_lit.trainer import Trainer
from diffusion_lit.trainer_options import check_kind

__all__ = ["CARRIED", "CLI", "SECTIONS", "main", "parse", "run"]

DEFAULTS: dict[str, Any] = {
    "accelerator": "auto",
    "devices": "auto",
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 50,
    "enable_model_summary": False,
    "logger": [{"class_path": "Curves"}, {"class_path": "WandB"}],
}
"""Arguments of the Trainer where nothing else is said."""
LOADING = ("validate", "test", "predict")
"""Commands that start from the configuration that a checkpoint carries."""


class Parser(LightningArgumentParser):
    """A parser whose errors are exceptions."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(message) from ex


class _SaveConfig(SaveConfigCallback):
    """Writes <run>/config.yaml once a run has trained on a batch, so that one that is refused leaves the file alone.

    The loggers' directory, which the command line has filled in, is left out: the file serves for another run too.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)
        self._is_written = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing yet: what is wrong with a checkpoint shows later."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        log_hyperparams(trainer, trainer.resolved_config)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.is_global_zero and not self._is_written:
            self._is_written = True
            with if_possible(str(Path(trainer.default_root_dir) / self.config_filename)):
                self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        text = yaml.safe_dump(trainer.resolved_config, sort_keys=False)
        (Path(trainer.default_root_dir) / self.config_filename).write_text(text, encoding="utf-8")


@ignores_carried_arguments  # The checkpoint's configuration lies below the arguments already, so that they win.
class CLI(LightningCLI):
    """LightningCLI over a configuration that has been merged and checked: see `configuration.Merge`.

    Args:
        args: The words of the command line.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.command = parse(args, list(COMMANDS))
        if self.command.name == "table":
            self.command = as_test(self.command)
        if self.command.topics is not None:
            sys.stdout.write(help_on(self.command))
            raise SystemExit(0)
        super().__init__(
            System,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            auto_configure_optimizers=False,
            parser_class=Parser,
            trainer_defaults={"callbacks": [Scalars(), Plots(), Report(), ProgressBar()]},
            save_config_callback=_SaveConfig,
            seed_everything_default=0,
            args={},
        )

    @classmethod
    def parts(cls, args: Sequence[str]) -> "CLI":
        """The model, the data and the trainer of a command line, which is not run."""
        made: CLI = runs_nothing(cls)(args)
        return made

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self.command.name: {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for section, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, section)
        for target in ("model.init_args.seed", "data.init_args.seed"):
            parser.link_arguments(SEED, target, compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        slots = command_slots(self.command.name)
        self.tree = merged(self.command, slots)
        if self.command.print_config:
            sys.stdout.write(yaml.safe_dump(self.tree, sort_keys=False))
            raise SystemExit(0)
        fill_save_dir(self.tree["trainer"].get("logger"), self.tree["trainer"].get("default_root_dir") or ".")
        path = self.command.option("ckpt_path") if self.command.name in LOADING else None
        if self.command.name == "predict" and path is not None and self.tree.get("data") is None:
            self.tree["data"] = {"class_path": "lightning.pytorch.LightningDataModule"}  # images need no data
        check_kinds(self.tree["trainer"].get("callbacks"))
        require(self.tree, slots, path)
        check_seeds(self.tree)
        self.off = [name for name in SECTIONS if name in self.tree and self.tree[name] is None]
        keys = callback_keys(self, self.command.name)
        keys[:] = [name for name in keys if name not in self.off]
        given = {name: value for name, value in self.tree.items() if name not in self.off}
        with only_imports([*self.command.trust, *class_paths(given)]):
            self.config = parser.parse_object({"subcommand": self.command.name, self.command.name: given})

    def before_instantiate_classes(self) -> None:
        require_devices(self.config[str(self.subcommand)].trainer)
        # Lightning would make it twice, and slowly.
        text = self.parser.dump(
            self.config, format="yaml", skip_unset=False, skip_validation=True, skip_link_targets=False
        )
        self.config_dump = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))[self.subcommand]

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except OTHER_ERRORS as error:
            raise ValueError(f"the configuration makes no model: {type(error).__name__}: {error}") from error

    def after_instantiate_classes(self) -> None:
        resolved = self.config_dump | dict.fromkeys(self.off)
        for section in ("model", "data"):
            # Linked to that of the command.
            if (part := resolved.get(section)) is not None:
                part.get("init_args", {}).pop("seed", None)
        self.model.config = {name: value for name, value in resolved.items() if name in CARRIED}
        clear_save_dir(resolved["trainer"]["logger"], resolved["trainer"]["default_root_dir"] or ".")
        self.trainer.resolved_config = resolved  # type: ignore[attr-defined]


def command_slots(name: str) -> dict[str, Slot]:
    """The sections and options of a command."""
    own = signature(getattr(Trainer, name), 1).slots
    return {
        SEED: CARRIED[SEED],
        "trainer": Slot(Trainer, fixed=True),
        **CARRIED,
        **{option: slot for option, slot in own.items() if option not in ("model", "datamodule")},
    }


def merged(command: Command, slots: Mapping[str, Slot]) -> dict[str, Any]:
    """The configuration of a command: defaults, then what a checkpoint carries, then files, then options.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a key is unknown, or a value or part does not go where it was put.
    """
    path = command.option("ckpt_path") if command.name in LOADING else None
    defaults = DEFAULTS if path is None else {**DEFAULTS, "logger": False, "default_root_dir": str(run_of(path))}
    if command.option("trainer.logger") is not None:
        defaults = {**defaults, "logger": None}
    tree: dict[str, Any] = Merge(typed=True).sections({SEED: 0}, {"trainer": defaults}, slots)
    if path is not None:
        carried = carried_sections(read_checkpoint(path))
        if "model" not in carried and not command.files and "model" not in dict(command.options):
            raise ValueError(f"{path} carries no configuration of its model; give the one it was trained with by -c")
        tree = Merge(command.trust, path).sections(tree, carried, slots)
    tree = configuration(command, slots, tree, known_elsewhere())
    if tree["trainer"].get("default_root_dir") is None and (name := run_name(command)) is not None:
        tree["trainer"]["default_root_dir"] = str(Path("runs") / name)
    return tree


def carried_sections(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of a command: no other sections, and not where files are written."""
    carried = {name: value for name, value in (checkpoint.get("config") or {}).items() if name in CARRIED}
    for section, written in WRITTEN.items():
        if isinstance(carried.get(section), Mapping):
            carried[section] = {name: value for name, value in carried[section].items() if name not in written}
    return carried


def help_on(command: Command) -> str:
    """The help that a command line asks for."""
    slots = command_slots(command.name)
    shown = [name for name in names() if name != "base"]
    return help.show(command, slots, merged(command, slots), COMMANDS[command.name], shown)


def as_test(command: Command) -> Command:
    """`table --table X` as `test --evaluation.table X`."""
    options = [(f"evaluation.{k}" if k.partition(".")[0] == "table" else k, v) for k, v in command.options]
    command.name, command.options = "test", [("evaluation.table", "DDIMTable"), *options]
    return command


def check_kinds(callbacks: Any) -> None:
    """Raises ValueError if a configuration chooses a callback that no trainer takes, before its arguments matter."""
    for chosen in callbacks if isinstance(callbacks, list) else [callbacks]:
        if isinstance(chosen, Mapping) and inspect.isclass(kind := import_part(chosen["class_path"])):
            check_kind(kind)


def check_seeds(tree: Mapping[str, Any]) -> None:
    """Raises ValueError if a seed is out of range, or one is given that `seed_everything` would override."""
    seed = tree[SEED]
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"{SEED}={seed} must be within [0, {2**32 - 1}]")
    for section in ("model", "data"):
        part = tree.get(section) or {}
        given = part.get("init_args", {}).get("seed", seed)
        if given not in (seed, signature(import_part(part["class_path"])).defaults.get("seed")):
            raise ValueError(f"{section}.seed={given} would be overridden; give --{SEED} {given}")


def require_devices(trainer: Namespace) -> None:
    """Raises ValueError if more GPUs are asked for than there are, or GPUs that cannot be used."""
    gpus = torch.cuda.device_count()
    apple = trainer.accelerator == "auto" and gpus == 0 and torch.backends.mps.is_available()
    if apple or trainer.accelerator == "mps":
        raise ValueError(
            f"trainer.accelerator={trainer.accelerator}: Apple's GPUs have no float64, which the process needs; "
            "use --trainer.accelerator cpu"
        )
    if trainer.accelerator not in ("gpu", "cuda"):
        return
    wanted = str(trainer.devices)
    if gpus == 0 or (wanted.isdigit() and int(wanted) > gpus):
        remedy = f"use --trainer.devices {gpus}" if gpus else "use --trainer.accelerator cpu"
        raise ValueError(
            f"trainer.devices={wanted} with accelerator={trainer.accelerator}, but this machine has {gpus} GPUs; "
            f"{remedy}"
        )


def _shown(record: logging.LogRecord) -> bool:
    """Makes a message printable; whether it is no advertisement."""
    record.msg, record.args = printable(record.getMessage()), ()
    return "Tip:" not in record.msg


def _format_warning(formatted: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    return printable(formatted(*args, **kwargs))


def run(args: Sequence[str]) -> None:
    """Runs a command; see `main`."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_shown)
    if not isinstance(warnings.formatwarning, partial):
        warnings.formatwarning = partial(_format_warning, warnings.formatwarning)
    # Lightning 2.6 under torch 2.15, and a layout that costs nothing here.
    for message in (".*isinstance\\(treespec, LeafSpec\\).*", "Grad strides do not match bucket view strides"):
        warnings.filterwarnings("ignore", message=message)
    try:
        with outlive_terminal() if args[:1] == ["fit"] else nullcontext():
            CLI(args)
    except Stopped as end:
        if end.code:
            sys.stderr.write(f"diffusion_lit: {end}\n")
        raise
