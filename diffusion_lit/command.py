"""A command as it was typed, and the configuration that it makes with its files."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffusion_lit.configuration import Merge
from diffusion_lit.parts import Slot, fits, import_part, signature
from diffusion_lit.recipes import Layer, layers

SEVERAL = ("prompts",)
"""Options that take several words: --prompts "a three" "a seven"."""


@dataclass
class Command:
    """A command and its options.

    Attributes:
        name: Such as fit.
        files: What `-c` names, in order.
        options: Keys and values typed, in order.
        trust: What `--trust` names.
        topics: What `--help` asks about, empty for the command itself; None: no help is asked for.
        print_config: Whether to print the configuration and stop.
    """

    name: str
    files: list[str] = field(default_factory=list)
    options: list[tuple[str, str]] = field(default_factory=list)
    trust: list[str] = field(default_factory=list)
    topics: list[str] | None = None
    print_config: bool = False

    def option(self, key: str) -> str | None:
        """The value that was typed for a key; None if there is none."""
        return dict(self.options).get(key)


def parse(args: Sequence[str], names: Sequence[str]) -> Command:
    """Reads the words of a command line.

    Args:
        args: The words after the program's name.
        names: The commands that there are.

    Raises:
        ValueError: If there is no such command, or an option lacks its value.
    """
    name = args[0] if args else ""
    if name not in names:
        nearest = get_close_matches(name, names, 1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the commands are {', '.join(names)}"
        raise ValueError(f"expected a command first, not {name!r}; {hint}" if name else f"no command given; {hint}")
    command = Command(name)
    words = list(args[1:])
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            command.topics = [*(command.topics or []), *[w.removeprefix("--") for w in words]]
            return command
        key, equals, value = word.partition("=")
        if re.fullmatch(r"--[\w.+]+|-c", key) is None:
            raise ValueError(f"{word!r} is not an option; options are written --key value")
        key = "config" if key == "-c" else key.removeprefix("--")
        if key == "print_config":
            command.print_config = True
            continue
        if key.endswith(".help"):
            given = [value] if equals else [word for word in words[:1] if not word.startswith("-")]
            command.topics = given or [key.removesuffix(".help")]
            return command
        if not equals:
            if not words or re.match(r"--[A-Za-z]|-[a-z]$", words[0]):
                raise ValueError(f"--{key} needs a value: --{key} VALUE")
            value = words.pop(0)
        if key in SEVERAL and not value.startswith("["):
            texts = [value]
            while words and not words[0].startswith("--"):
                texts.append(words.pop(0))
            value = json.dumps(texts)
        if key == "config":
            command.files.append(value)
        elif key == "trust":
            command.trust.append(value)
        else:
            command.options.append((key, value))
    return command


def configuration(
    command: Command, slots: Mapping[str, Slot], below: Mapping[str, Any], ignored: Collection[str] = ()
) -> dict[str, Any]:
    """What a command's files and options make of a configuration.

    Args:
        command: The command.
        slots: The sections that it takes.
        below: The configuration that everything is laid over.
        ignored: Keys that a file may have for other commands.

    Raises:
        ValueError: If a key is unknown, or a value or part does not go where it was put.
    """
    tree = dict(below)
    for name in command.files:
        for layer in _layers(name):
            merge = Merge(command.trust, layer.source, typed=not layer.source)
            tree = merge.sections(tree, without(layer.tree, set(ignored) - set(slots)), slots)
    typed = Merge(command.trust, typed=True)
    for key, value in command.options:
        tree = typed.sections(tree, {key: value}, slots)
    return tree


def without(tree: Mapping[str, Any], sections: Collection[str]) -> dict[str, Any]:
    """A configuration without some sections, whose keys may be dotted."""
    return {key: value for key, value in tree.items() if str(key).partition(".")[0] not in sections}


def _layers(name: str) -> list[Layer]:
    """A file's layers; text in braces is a configuration that was typed."""
    if not name.lstrip().startswith("{"):
        return layers(name)
    try:
        return [Layer("", get_loader("yaml")(name))]
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {' '.join(str(error).split())}") from error


def known_elsewhere() -> set[str]:
    """The keys that a recipe may have for commands with a Trainer."""
    trainer = import_part("diffusion_lit.trainer.Trainer")
    commands = [getattr(trainer, name) for name in ("fit", "validate", "test", "predict")]
    carried = import_part("diffusion_lit.sections.CARRIED")
    options = {option for command in commands for option in signature(command, 1).slots}
    return {"trainer", *carried, *options} - {"datamodule"}


def run_name(command: Command) -> str | None:
    """The name of the last file, which names the run's directory; None if no file is given."""
    files = [name for name in command.files if not name.lstrip().startswith("{")]
    return Path(files[-1]).stem if files else None


def require(tree: Mapping[str, Any], slots: Mapping[str, Slot], ckpt_path: str | None = None) -> None:
    """Checks that parts have all the arguments that they need.

    Args:
        tree: A configuration that `Merge` has made.
        slots: Its sections.
        ckpt_path: The checkpoint whose configuration lies below it, for messages.

    Raises:
        ValueError: That names the first argument that is missing.
    """
    for name in ("model", "data"):
        if name not in slots or tree.get(name) is not None:
            continue
        if ckpt_path is None:
            raise ValueError(f"there is no {name}; give a recipe by -c, such as -c cifar10, or --ckpt_path CHECKPOINT")
        remedy = "--data.source CLASS, such as --data.source Digits" if name == "data" else "-c"
        raise ValueError(f"{ckpt_path} carries no configuration of its {name}; give it by {remedy}")
    for name, value in tree.items():
        _require_arguments(value, name)


def _require_arguments(tree: Any, key: str) -> None:
    if isinstance(tree, list):
        for i, value in enumerate(tree):
            _require_arguments(value, f"{key}[{i}]")
    if not isinstance(tree, Mapping):
        return
    arguments = tree.get("init_args", tree)
    if "class_path" in tree:
        part = import_part(tree["class_path"])
        known = signature(part, int(fits(part, (Optimizer, LRScheduler))))
        for name in [n for n in known.slots if n not in known.defaults and n not in arguments]:
            option = re.sub(r"\[\d+\]", "", key)
            raise ValueError(f"{key}.{name} is missing, which {part.__name__} needs; give --{option}.{name}")
    for name, value in arguments.items():
        _require_arguments(value, f"{key}.{name}")
