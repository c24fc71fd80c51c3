"""What a user is told who got something wrong: one line that names the key, the value and the remedy."""

import inspect
import os
import re
import sys
import traceback
from difflib import get_close_matches
from pydoc import locate
from types import NoneType
from typing import Any, NoReturn, cast, get_args, get_type_hints

import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException

from diffusion_lit import callbacks, data, diffusion, evaluation, loggers, metrics, networks
from diffusion_lit.methods import classifier_guidance, feature_network
from diffusion_lit.module import DiffusionModule

REQUIRED = "the following arguments are required: "
USER_ERRORS = (ValueError, TypeError, RuntimeError, ArithmeticError, OSError, MisconfigurationException)
ROOMS = (callbacks, data, diffusion, evaluation, loggers, metrics, networks)


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
    for room in (*ROOMS, classifier_guidance, feature_network):
        for part in vars(room).values():
            if inspect.isclass(part):
                names.update(inspect.signature(part.__init__).parameters)
    return names | set(inspect.signature(DiffusionModule).parameters)


def one_line(message: str, parser: ArgumentParser) -> str:
    """A parser's message on one line; where a key is unknown, the nearest known one beside it."""
    text = " ".join(line.strip(" -|\t") for line in message.splitlines())
    text = re.sub(r"(value|path string):\s*$", r"\1: ''", text)
    unknown = re.search(
        r"""(?:[Uu]nrecognized arguments: --|ambiguous option: --|[Oo]ption '|Key '|nested key ['"]?)([\w.]+)""", text
    )
    if text.startswith(REQUIRED):
        of_command = any(action.dest == "config" for action in parser._actions)
        remedy = "give --ckpt_path CHECKPOINT, or -c CONFIG" if of_command else "give it as --...init_args.{}"
        return f"{text}; {remedy.format(text.removeprefix(REQUIRED).split(',')[0])}"
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
    missing = re.search(
        r"Problem with given class_path '([\w.]+)'.*?has no attribute|Expected a dot import path string: ([\w.]+)", text
    )
    if missing is None:
        return text
    given = missing[1] or missing[2]
    keys = re.findall(r'Parser key "([\w.]+)"', text[: missing.start()])
    where = f"{keys[-1]}: " if keys else ""
    parts = {
        name: f"{room.__name__}.{name}"
        for room in ROOMS
        for name, part in vars(room).items()
        if inspect.isclass(part) and part.__module__.startswith("diffusion_lit.")
    }
    nearest = get_close_matches(given.rpartition(".")[2], parts, 1)
    if not nearest:
        return text
    path = parts[nearest[0]]
    if given in (nearest[0], path):
        return f"{where}{path} is not of the kind of part that goes there"
    return f"{where}there is no {given}; did you mean {(path if '.' in given else nearest[0])!r}?"


def innermost(error: BaseException) -> BaseException:
    """What was wrong to begin with, where another error hides it.

    The parser wraps what a part raises that it was making; Lightning fails to close a loader that failed to open.
    """
    hiding = ("jsonargparse", "lightning.pytorch.utilities.combined_loader")
    while raised_in(error, hiding) and isinstance(error.__cause__ or error.__context__, USER_ERRORS):
        error = cast(BaseException, error.__cause__ or error.__context__)
    return error


def raised_in(error: BaseException, modules: tuple[str, ...]) -> bool:
    """Whether the statement that raised an error stands in one of some modules or packages."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and str(frames[-1].f_globals.get("__name__")).startswith(modules)


def require_values(config: Namespace, sections: dict[str, type]) -> None:
    """Refuses null where one of our parts takes none, which the parser lets pass.

    Args:
        config: The parsed configuration of a subcommand.
        sections: The class of every section whose arguments stand in it without a class path.

    Raises:
        ValueError: That names the key.
    """
    for section, part in sections.items():
        require_arguments(section, part, config.get(section))
    for section, value in vars(config).items():
        if section not in sections:
            require_inside(section, value)


def require_inside(key: str, value: Any) -> None:
    """`require_values` of whatever parts a value holds."""
    if isinstance(value, list):
        for item in value:
            require_inside(key, item)
    elif isinstance(value, Namespace) and "class_path" in value:
        require_arguments(f"{key}.init_args", locate(value.class_path), value.get("init_args"))


def require_arguments(key: str, part: Any, arguments: Namespace | None) -> None:
    """`require_values` of the arguments of one part."""
    ours = inspect.isclass(part) and part.__module__.startswith("diffusion_lit.")
    hints = get_type_hints(part.__init__) if ours else {}
    for name, value in (vars(arguments) if arguments else {}).items():
        if value is None and name in hints and hints[name] is not Any and NoneType not in get_args(hints[name]):
            raise ValueError(f"{key}.{name}=null has to be a value; leave the key away for its default")
        require_inside(f"{key}.{name}", value)
