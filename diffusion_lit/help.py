"""Help on commands, sections and parts, a screen at a time."""

import inspect
import re
import textwrap
import typing
from collections.abc import Mapping
from typing import Any

from diffusion_lit.command import Command
from diffusion_lit.configuration import Merge
from diffusion_lit.parts import Signature, Slot, candidates, import_part, signature, takes

WIDTH = 100
LONG = 20
"""More arguments than this get a line each, so that help fits a screen."""
SECTIONS = {
    "model": "what is trained: the network, the process, the objective, the sampler, the optimiser",
    "data": "the images",
    "trainer": "the run: its directory, steps, devices, precision, loggers",
    "ema": "averages of the weights",
    "sample_grid": "pictures of samples while training",
    "evaluation": "scores, such as FID, while training and in test",
    "likelihood": "bits per dimension in test",
    "checkpoints": "when to write checkpoints, and which to keep",
}
ARGUMENTS = r"^\s*Args:\s*\n(.*?)(?:\n\s*\n\s*(?:Raises|Returns|Attributes|Source)|\Z)"
"""The section of a docstring about arguments."""
ENTRY = r"^(\w+)(?: \([^)]*\))?:\s*(.*?)(?=^\w+(?: \([^)]*\))?:|\Z)"
"""One argument in it."""
SEVERAL = """
  -c RECIPE              a YAML file, or a recipe of the package: {recipes}
  --trust NAME           a module whose parts files may name; asked for where it is needed
  --print_config         print the configuration that results, and stop
  --seed_everything N    the seed of everything (0)"""


def show(command: Command, slots: Mapping[str, Slot], tree: Mapping[str, Any], about: str, recipes: list[str]) -> str:
    """The help that a command line asks for.

    Args:
        command: The command.
        slots: Its sections and options.
        tree: Its configuration, whose values and chosen parts are shown.
        about: What the command does.
        recipes: Names of the recipes.

    Raises:
        ValueError: If there is nothing of that name.
    """
    if command.topics:
        return "\n".join(topic(name, slots, tree) for name in command.topics)
    shown = textwrap.wrap(", ".join(recipes), WIDTH - 25)
    lines = [f"usage: diffusion_lit {command.name} [-c RECIPE] [--key value ...]", "", f"{about.capitalize()}.", ""]
    lines += ["options:", SEVERAL.strip("\n").format(recipes=f"\n{25 * ' '}".join(["", *shown]).rstrip())]
    own = {n: s for n, s in slots.items() if n not in (*SECTIONS, "seed_everything")}
    lines += arguments(Signature(own, {}), tree, descriptions(command_function(command.name)))
    lines += ["", f"sections, each with help of its own, as in: diffusion_lit {command.name} --help model.sampler"]
    lines += [f"  {name:<22} {text}" for name, text in SECTIONS.items() if name in slots]
    return "\n".join(lines) + "\n"


def command_function(name: str) -> Any:
    """The method of the Trainer behind a command."""
    return getattr(import_part("diffusion_lit.trainer.Trainer"), name)


def topic(name: str, slots: Mapping[str, Slot], tree: Any) -> str:
    """Help on one key, such as model.sampler, or on one class, such as model.sampler.DDIM or DDIM."""
    *keys, last = name.replace(".init_args", "").split(".")
    known: Mapping[str, Slot] = slots
    values: Any = tree
    chosen: Any = None
    slot: Slot | None = None
    for key in [*keys, last]:
        if key in known:
            slot, values = known[key], (values or {}).get(key)
            values = values[-1] if isinstance(values, list) and values and isinstance(values[-1], dict) else values
            chosen = part_in(slot, values)
        elif slot is not None and key == last:
            chosen, values = Merge(typed=True).choose(key, takes(slot.hint).bases, name), None
        else:
            chosen = Merge(typed=True).choose(key, (object,), name)
        known = {} if chosen is None else signature(chosen, 0 if slot is None else takes(slot.hint).given).slots
        values = values.get("init_args", values) if isinstance(values, dict) else None
    return "\n".join(described(name, slot, chosen, known, values)) + "\n"


def part_in(slot: Slot, value: Any) -> Any:
    """The class that is chosen for a slot; None where none is."""
    if slot.fixed:
        return slot.hint
    if isinstance(value, Mapping) and "class_path" in value:
        return import_part(value["class_path"])
    return slot.implied


def described(name: str, slot: Slot | None, part: Any, known: Mapping[str, Slot], values: Any) -> list[str]:
    """Help on a key and the class that is chosen for it."""
    lines: list[str] = []
    if slot is not None and not slot.fixed and takes(slot.hint).bases:
        lines += [f"--{name} CLASS, one of:"]
        for kind in candidates(takes(slot.hint).bases).values():
            lines += [f"  {kind.__name__:<22} {first_sentence(kind)}"]
        lines += [""]
    elif slot is not None and not slot.fixed:
        return [*lines, f"--{name} VALUE: {takes(slot.hint)}" if not takes(slot.hint).anything else f"--{name} VALUE"]
    if part is None:
        return [*lines, f"More on one of them: --help {name}.CLASS"]
    head = "" if slot is None or not slot.fixed else f"{name}: "
    lines += [f"{head}{part.__name__}: {first_sentence(part)}", ""]
    order = signature(part, 0 if slot is None else takes(slot.hint).given)
    return lines + arguments(Signature(known, order.defaults), values or {}, descriptions(part))


def arguments(known: Signature, values: Mapping[str, Any], texts: Mapping[str, str]) -> list[str]:
    """One line or more for each argument: its name, what it is, its value."""
    lines = []
    for name, slot in known.slots.items():
        default = values.get(name, known.defaults.get(name, inspect.Parameter.empty))
        kind = takes(slot.hint)
        shown = "" if default is inspect.Parameter.empty or default is None else f" ({brief(default)})"
        text = texts.get(name) or ("" if kind.anything else str(kind))
        width = max(24, len(name) + 5)
        if len(known.slots) > LONG:
            text = textwrap.shorten(text, WIDTH - width - len(shown) - 2, placeholder=" ...")
        lines += textwrap.wrap(
            f"--{name}".ljust(width - 2) + " " + text + shown,
            WIDTH,
            initial_indent="  ",
            subsequent_indent=26 * " ",
            break_long_words=False,
        )
    return lines


def brief(value: Any) -> str:
    """A value in few words: of a part, its class."""
    if isinstance(value, Mapping):
        return str(value.get("class_path", "...")).rpartition(".")[2]
    if isinstance(value, list):
        return f"[{', '.join(map(brief, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def first_sentence(part: Any) -> str:
    """The first line of a class's documentation."""
    text = (inspect.getdoc(part) or "").partition("\n\n")[0]
    return textwrap.shorten(re.sub(r"\s+", " ", text), WIDTH - 26, placeholder=" ...")


def descriptions(part: Any) -> dict[str, str]:
    """What the documentation of a class, and of the classes it extends, says about its arguments."""
    found: dict[str, str] = {}
    for kind in part.__mro__ if inspect.isclass(part) else [part]:
        for text in (typing.cast(Any, kind).__doc__, getattr(vars(kind).get("__init__"), "__doc__", None)):
            section = re.search(ARGUMENTS, text or "", re.S | re.M)
            if section is not None:
                body = textwrap.dedent(section[1])
                for entry in re.finditer(ENTRY, body, re.S | re.M):
                    plain = re.sub(r"``|:\w+:", "", entry[2])
                    found.setdefault(entry[1], textwrap.shorten(plain, 3 * WIDTH // 2, placeholder=" ..."))
    return found
