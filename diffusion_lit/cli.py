"""The command line: fit, validate, test, predict and table."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from diffusion_lit.callbacks import EMA, Checkpoints, Plots, ProgressBar, SampleGrid, Scalars
from diffusion_lit.callbacks.checkpoints import CARRIED, read_checkpoint, restore, run_of
from diffusion_lit.callbacks.signals import Stopped
from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.errors import (
    USER_ERRORS,
    fail,
    innermost,
    lost_another,
    one_line,
    require_values,
)
from diffusion_lit.evaluation import Evaluation, Frechet, Likelihood
from diffusion_lit.module import DiffusionModule
from diffusion_lit.trainer import Trainer

TRACEBACK = "DIFFUSION_LIT_TRACEBACK"
SECTIONS: dict[str, type[Callback]] = {
    "ema": EMA,
    "sample_grid": SampleGrid,
    "frechet": Frechet,
    "evaluation": Evaluation,
    "likelihood": Likelihood,
    "checkpoints": Checkpoints,
}
"""The house's callbacks, each a section of the configuration."""
TOOLS: dict[str, str] = {
    "import": "diffusion_lit.tools.import_weights",
    "export": "diffusion_lit.tools.export_weights",
    "prepare": "diffusion_lit.tools.prepare",
    "reference": "diffusion_lit.tools.reference",
}
"""Further subcommands, which need no Trainer: the module whose `main` takes the arguments after the name."""


class Parser(LightningArgumentParser):
    """A parser whose errors are one line and name the nearest known key; a beginning of a key is no key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get(TRACEBACK):
            super().error(message, ex)
        fail(one_line(message, self))


class SaveConfig(SaveConfigCallback):
    """Writes <run>/config.yaml once a run has started or goes on, so that a sampled or refused one keeps its own.

    The loggers' directory, which the command line has filled in, is left out: the file serves for another run too.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Nothing yet: what is wrong with a checkpoint shows later."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            with if_possible(str(Path(trainer.default_root_dir) / self.config_filename)):
                self.save_config(trainer, pl_module, "fit")

    def save_config(self, trainer: Any, pl_module: Any, stage: str) -> None:
        config = self.config.clone()
        for init_args in logger_arguments(config.trainer):
            init_args.save_dir = None
        path = Path(trainer.default_root_dir) / self.config_filename
        self.parser.save(config, path, skip_none=False, overwrite=True, multifile=False)


def logger_arguments(trainer: Namespace) -> list[Namespace]:
    """The arguments of those loggers that keep files."""
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    arguments = [getattr(logger, "init_args", None) for logger in loggers]
    return [init_args for init_args in arguments if init_args is not None and "save_dir" in init_args]


class CLI(LightningCLI):
    """LightningCLI with the house's callbacks as sections, and checkpoints that bring their configuration along."""

    def __init__(self, args: Sequence[str] | None = None) -> None:
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            auto_configure_optimizers=False,
            parser_class=Parser,
            trainer_defaults={"callbacks": [Scalars(), Plots(), ProgressBar()]},
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            args=None if args is None else list(args),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for section, callback in SECTIONS.items():
            parser.add_lightning_class_args(callback, section)
        for target in ("model.init_args.seed", "data.init_args.seed"):
            parser.link_arguments("seed_everything", target, compute_fn=int)
        for name in ("extractor", "reference", "cache_dir"):
            parser.link_arguments(f"frechet.{name}", f"evaluation.{name}")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: {"model", "datamodule"} for name in ("fit", "validate", "test", "predict", "table")}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(with_checkpoint_config(sys.argv[1:] if args is None else args))
        seed = self.config[self.config.subcommand].seed_everything
        if seed is None or not 0 <= int(seed) < 2**32:
            raise ValueError(f"seed_everything={seed} must be within [0, {2**32 - 1}]")

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's configuration stands before the arguments already, so that they win."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config[str(self.subcommand)].trainer
        require_devices(trainer)
        for init_args in logger_arguments(trainer):
            if init_args.save_dir is None:
                init_args.save_dir = trainer.default_root_dir
        require_values(self.config[str(self.subcommand)], SECTIONS)

    def after_instantiate_classes(self) -> None:
        dumped = yaml.safe_load(self.parser.dump(self.config, skip_link_targets=True, skip_none=False))
        self.model.config = {k: v for k, v in dumped[self.subcommand].items() if k in CARRIED}


def with_checkpoint_config(args: list[str]) -> list[str]:
    """Puts the configuration that a checkpoint carries before the arguments, for every subcommand but fit.

    Loggers are off then, unless asked for: the run's curves are those of its training.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint of ours.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ckpt_path")
    path = parser.parse_known_args(args)[0].ckpt_path
    if not args or args[0] not in ("validate", "test", "predict", "table") or path is None:
        return args
    config = dict(read_checkpoint(path).get("config") or {})
    if "model" not in config and not any(arg.startswith(("-c", "--config", "--model")) for arg in args):
        raise ValueError(f"{path} carries no configuration of its model; give the one it was trained with by -c")
    config["trainer"] = {"logger": False, "default_root_dir": str(run_of(path))}
    return [args[0], "--config", json.dumps(config), *args[1:]]


def load_model(path: str) -> DiffusionModule:
    """A model in eval mode from a checkpoint alone, with its averaged weights.

    Args:
        path: A checkpoint that `fit` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the checkpoint is damaged or carries no configuration.
    """
    return restore(path, DiffusionModule).eval()


def require_devices(trainer: Namespace) -> None:
    """Raises ValueError if more GPUs are asked for than there are, or GPUs that cannot be used."""
    gpus = torch.cuda.device_count()
    apple = trainer.accelerator == "auto" and gpus == 0 and torch.backends.mps.is_available()
    if apple or trainer.accelerator == "mps":
        raise ValueError(
            f"trainer.accelerator={trainer.accelerator}: Apple's GPUs lack the float64 that the process needs; "
            "use GPUS=0, or --trainer.accelerator cpu"
        )
    if trainer.accelerator not in ("gpu", "cuda"):
        return
    wanted = str(trainer.devices)
    if gpus == 0 or (wanted.isdigit() and int(wanted) > gpus):
        raise ValueError(
            f"trainer.devices={wanted} with accelerator={trainer.accelerator}, but this machine has {gpus} GPUs; "
            f"use GPUS={gpus}" + ("" if gpus else ", which trains on the CPU")
        )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; what a user got wrong ends in one line and exit code 2.

    A run that is stopped by SIGTERM or SIGUSR1 ends in one line and exit code 75: it can go on.

    Set DIFFUSION_LIT_TRACEBACK=1 to see the traceback instead.
    """
    given = sys.argv[1:] if args is None else list(args)
    for arg in given:
        try:
            arg.encode()
        except UnicodeEncodeError:
            name = arg.encode(errors="backslashreplace").decode()
            fail(f"{name} is not UTF-8, as configurations are; rename it, or give a link to it")
    tool = TOOLS.get(given[0]) if given else None
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        # Advertisements would bury what a run says.
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
    # Lightning 2.6 under torch 2.15, and a layout that costs nothing here.
    for message in (".*isinstance\\(treespec, LeafSpec\\).*", "Grad strides do not match bucket view strides"):
        warnings.filterwarnings("ignore", message=message)
    try:
        if tool is None:
            CLI(given)
        else:
            import_module(tool).main(given[1:])
    except Stopped as end:
        if end.code:
            sys.stderr.write(f"diffusion_lit: {end}\n")
        raise
    except USER_ERRORS as error:
        if os.environ.get(TRACEBACK):
            raise
        cause = innermost(error)
        if lost_another(cause):
            reason = " ".join(str(cause).split())
            fail(f"another process has failed or does not answer, see its own error ({reason[:200]})")
        kind = f"{type(cause).__name__}: " if type(cause) in (TypeError, RuntimeError) else ""
        fail(kind + " ".join(str(cause).split()))
