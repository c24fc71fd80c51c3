"""The command line: fit, validate, test, predict and table."""

import argparse
import inspect
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from diffusion_lit import callbacks, data, diffusion, loggers, metrics, networks, tables
from diffusion_lit.callbacks import (
    EMA,
    Checkpoints,
    Evaluation,
    Frechet,
    Likelihood,
    Plots,
    ProgressBar,
    SampleGrid,
    Scalars,
)
from diffusion_lit.callbacks.checkpoints import CARRIED, read_checkpoint, restore, run_of
from diffusion_lit.callbacks.signals import Stopped
from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.methods import classifier_guidance, feature_network
from diffusion_lit.module import DiffusionModule
from diffusion_lit.trainer import Trainer

TRACEBACK = "DIFFUSION_LIT_TRACEBACK"
TOOLS: dict[str, str] = {
    "import": "diffusion_lit.exchange.import_weights",
    "export": "diffusion_lit.exchange.export_weights",
    "prepare": "diffusion_lit.data.prepare",
    "reference": "diffusion_lit.statistics",
}
"""Further subcommands, which need no Trainer: the module whose `main` takes the arguments after the name."""
USER_ERRORS = (ValueError, TypeError, RuntimeError, OSError, MisconfigurationException)


class Parser(LightningArgumentParser):
    """A parser whose errors are one line and name the nearest known key; a beginning of a key is no key."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get(TRACEBACK):
            super().error(message, ex)
        fail(one_line(message, self))


def fail(message: str) -> NoReturn:
    """Ends the program with a one-line error, which names the process where there are several."""
    sys.stderr.write(f"diffusion_lit: error: {which_process()}{message}\n")
    sys.stderr.flush()
    raise SystemExit(2)


def which_process() -> str:
    """Such as "rank 3: ", in one of several processes as launchers tell it; else nothing."""
    rank = next((os.environ[name] for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if name in os.environ), None)
    several = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1")) != "1"
    return f"rank {rank}: " if several and rank is not None else ""


def lost_another(error: BaseException) -> bool:
    """Whether an error is that of waiting for another process."""
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and ("gloo" in str(error).lower() or "nccl" in str(error).lower())
    )


def known_names(parser: ArgumentParser) -> set[str]:
    """Every name that may occur in a dotted key: of sections, their arguments, and those of every part on offer."""
    names = {"class_path", "init_args", "dict_kwargs"}
    for action in parser._actions:
        names.update(action.dest.split("."))
        for subparser in (action.choices if isinstance(action.choices, dict) else {}).values():
            names |= known_names(subparser)
    for room in (callbacks, data, diffusion, loggers, metrics, networks, tables, classifier_guidance, feature_network):
        for part in vars(room).values():
            if inspect.isclass(part):
                names.update(inspect.signature(part.__init__).parameters)
    return names | set(inspect.signature(DiffusionModule).parameters)


def one_line(message: str, parser: ArgumentParser) -> str:
    """A parser's message on one line; where a key is unknown, the nearest known one beside it."""
    text = " ".join(line.strip(" -|\t") for line in message.splitlines())
    unknown = re.search(
        r"""(?:[Uu]nrecognized arguments: --|ambiguous option: --|[Oo]ption '|Key '|nested key ['"]?)([\w.]+)""", text
    )
    if unknown is None:
        return nearest_part(text)
    names = known_names(parser)
    parts = unknown[1].split(".")
    nearest = [part if part in names else next(iter(get_close_matches(part, names, 1)), "") for part in parts]
    if all(nearest) and nearest != parts:
        return f"unknown key {unknown[1]!r}; did you mean {'.'.join(nearest)!r}?"
    return text


def nearest_part(text: str) -> str:
    """A parser's message, shortened to the nearest known part where it is about one that does not exist."""
    absent = re.search(r"""Parser key "(?:[\w.]+\.)?(\w+)":.* is abstract.*NestedArg\(key='([\w.]+)'""", text)
    if absent is not None:
        part, option = absent[1], absent[2]
        return f"there is no {part} to give {option!r} to; choose one first, by its class: --...{part} CLASS"
    if text.startswith("the following arguments are required"):
        return f"{text}; give --ckpt_path CHECKPOINT, or -c CONFIG"
    missing = re.search(
        r"Problem with given class_path '([\w.]+)'.*?has no attribute|Expected a dot import path string: ([\w.]+)", text
    )
    if missing is None:
        return text
    given = missing[1] or missing[2]
    parts = {
        name: f"{room.__name__}.{name}"
        for room in (callbacks, data, diffusion, loggers, metrics, networks, tables)
        for name, part in vars(room).items()
        if inspect.isclass(part) and part.__module__.startswith("diffusion_lit.")
    }
    nearest = get_close_matches(given.rpartition(".")[2], parts, 1)
    if not nearest:
        return text
    return f"there is no {given}; did you mean {(parts[nearest[0]] if '.' in given else nearest[0])!r}?"


def innermost(error: BaseException) -> BaseException:
    """What the parser wrapped, where it did: an error raised by a part that it was making."""
    while raised_by_parser(error) and isinstance(error.__cause__ or error.__context__, USER_ERRORS):
        error = cast(BaseException, error.__cause__ or error.__context__)
    return error


def raised_by_parser(error: BaseException) -> bool:
    """Whether the statement that raised an error is jsonargparse's own."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith("jsonargparse")


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
        for callback, section in (
            (EMA, "ema"),
            (SampleGrid, "sample_grid"),
            (Frechet, "frechet"),
            (Evaluation, "evaluation"),
            (Likelihood, "likelihood"),
            (Checkpoints, "checkpoints"),
        ):
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

    def _parse_ckpt_path(self) -> None:
        """Nothing: the checkpoint's configuration stands before the arguments already, so that they win."""

    def before_instantiate_classes(self) -> None:
        trainer = self.config[str(self.subcommand)].trainer
        require_devices(trainer)
        for init_args in logger_arguments(trainer):
            if init_args.save_dir is None:
                init_args.save_dir = trainer.default_root_dir

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
    """Raises ValueError if more GPUs are asked for than there are."""
    gpus = torch.cuda.device_count()
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
