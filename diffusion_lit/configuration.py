"""Configurations: files, how they merge, and what a file may name.

A configuration is built from layers, each laid over those before: the command line's defaults, what a checkpoint
carries, the files given by `-c` with the files that these include, and the options typed. Values merge key by key and
the later one wins, with one exception: a part of another class replaces the part below it as a whole, so that a class
always has its own defaults.

What comes from a file may name the parts of this package that fit the argument's type, torch's optimisers and
schedulers, and some of Lightning's loggers and callbacks, and gives plain data for everything else. Other classes and
functions are the user's to trust, by name; until then their modules are not imported.
"""

import copy
import functools
import inspect
import operator
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_parsing_settings
from jsonargparse import _common as jsonargparse_settings

from diffusion_lit.parts import (
    MISSING,
    PACKAGE,
    Slot,
    Takes,
    candidates,
    defined,
    external_class,
    fits,
    import_part,
    is_ours,
    own_class,
    path_of,
    signature,
    takes,
)
from diffusion_lit.upgrade import RENAMED

SPECIAL = ("class_path", "init_args", "dict_kwargs")
DEPTH = 40
MOST_VALUES = 100_000
"""Of one file. What refers to a value many times, as YAML's aliases do, counts as often."""
Part = TypeVar("Part")
_PATH = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*", re.ASCII)
_PREFIXES = (PACKAGE, "torch.optim", "lightning.pytorch.loggers", "lightning.pytorch.callbacks")


class Untrusted(ValueError):
    """A configuration from a file names a class or function that is not this package's and that nobody trusts."""


class Merge:
    """Lays a layer over a configuration and checks it.

    Args:
        trust: Modules and classes whose parts the layer may name, beside this package's.
        source: The layer's file, for messages.
        typed: Whether a user has typed the layer: values are read as YAML, and any part may be named.
    """

    def __init__(self, trust: Collection[str] = (), source: str = "", typed: bool = False) -> None:
        self.trust = trust
        self.source = f"{source}: " if source else ""
        self.typed = typed
        self._count = 0

    def sections(self, below: Mapping[str, Any], above: Any, slots: Mapping[str, Slot]) -> dict[str, Any]:
        """A whole configuration.

        Args:
            below: What was laid before.
            above: The layer.
            slots: The sections that there are.

        Raises:
            ValueError: If a key is unknown, a value is not of its argument's kind, or a part is not to be named.
            Untrusted: If a part needs the user's word.
        """
        return self._arguments(dict(below), above, slots, {}, "", False)

    def value(self, slot: Slot, below: Any, above: Any, key: str, depth: int = 0) -> Any:
        """The value of one argument; `below` is MISSING where it has none yet."""
        self._enter(key, depth)
        kind = replace(takes(slot.hint), bases=()) if slot.plain else takes(slot.hint)
        if self.typed and isinstance(above, str):
            above = read_value(above, kind)
        if slot.fixed:
            return self._section(slot, below, above, key, depth)
        if kind.bases and isinstance(above, Mapping) and isinstance(below, list) and below:
            return [*below[:-1], self.value(slot, below[-1], above, key, depth + 1)]
        if kind.bases and (isinstance(above, Mapping) or (isinstance(above, str) and str not in kind.scalars)):
            return self._part(slot, kind, below, above, key, depth)
        if type(above) in (int, float) and kind.items and not kind.accepts(above):
            above = [above]
        if isinstance(above, list) and kind.items:
            if kind.length not in (None, len(above)):
                raise self._error(f"{key}={above}", f"must be {kind.length} values")
            item = replace(slot, hint=_union(kind.items))
            return [self.value(item, MISSING, v, f"{key}[{i}]", depth + 1) for i, v in enumerate(above)]
        if isinstance(above, Mapping) and kind.values and kind.parts and not slot.plain:
            old = below if isinstance(below, dict) else {}
            item = replace(slot, hint=_union(kind.values))
            return old | {
                n: self.value(item, old.get(n, MISSING), v, f"{key}.{n}", depth + 1) for n, v in above.items()
            }
        value = self._plain(above, key, depth)
        if kind.function or (slot.plain and kind.anything):
            for text in _texts(value):
                if "." in text and _PATH.fullmatch(text):
                    self._may_import(text, key)
        if not kind.accepts(value):
            raise self._error(f"{key}={'null' if value is None else repr(value)}", f"must be {kind}")
        if type(value) is int and float not in kind.scalars and not kind.anything:
            self._require_size(value, key)
        return value

    def _enter(self, key: str, depth: int) -> None:
        """Counts a value; raises ValueError if it lies too deep, or there are too many."""
        self._count += 1
        if depth > DEPTH or self._count > MOST_VALUES:
            problem = f"is nested more than {DEPTH} deep" if depth > DEPTH else f"has more than {MOST_VALUES} values"
            raise self._error(key[:60], problem)

    def _require_size(self, value: int, key: str) -> None:
        """Refuses sizes and counts that no machine has; seeds and steps may be larger."""
        name = key.rpartition(".")[2]
        if abs(value) >= 2**31 and "seed" not in name and not name.endswith("_steps"):
            raise self._error(f"{key}={value}", "must be below 2^31 = 2147483648")

    def _section(self, slot: Slot, below: Any, above: Any, key: str, depth: int) -> Any:
        if above is None:
            return None
        known = signature(slot.hint)
        old = dict(below) if isinstance(below, Mapping) else {}
        return self._arguments(old, above, known.slots, known.defaults, key, known.more, depth)

    def _part(self, slot: Slot, kind: Takes, below: Any, above: Any, key: str, depth: int) -> dict[str, Any]:
        given = {"class_path": above} if isinstance(above, str) else dict(above)
        old = below if isinstance(below, Mapping) and "class_path" in below else None
        name = given.pop("class_path", None)
        if name is not None:
            part = self.choose(name, kind.bases, key)
        elif old is not None:
            part = import_part(old["class_path"])
        elif slot.implied is not None:
            part = slot.implied
        else:
            option = next(iter(given.get("init_args") or given), "arguments")
            raise ValueError(f"{self.source}there is no {key} to give {option!r} to; choose it by --{key} CLASS")
        known = signature(part, kind.given)
        arguments: dict[str, Any] = copy.deepcopy(dict(known.defaults))
        extra: dict[str, Any] = {}
        if old is not None and import_part(old["class_path"]) is part:
            arguments |= copy.deepcopy(dict(old.get("init_args") or {}))
            extra |= old.get("dict_kwargs") or {}
        slots = known.slots
        if external_class(path_of(part)) is part:
            slots = {name: replace(inner, plain=True) for name, inner in slots.items()}
        arguments = self._arguments(arguments, given, slots, known.defaults, key, known.more, depth + 1)
        extra |= arguments.pop("dict_kwargs", {})
        chosen = {"class_path": path_of(part), "init_args": arguments}
        return {**chosen, "dict_kwargs": extra} if extra else chosen

    def _arguments(
        self,
        old: dict[str, Any],
        above: Any,
        slots: Mapping[str, Slot],
        defaults: Mapping[str, Any],
        key: str,
        more: bool,
        depth: int = 0,
    ) -> dict[str, Any]:
        """`old` with the arguments of a layer laid over them, which may stand in `init_args` or not."""
        self._enter(key, depth)
        if not isinstance(above, Mapping):
            raise self._error(key, f"must be keys and values, not {above!r}")
        new = dict(old)
        for full, value in above.items():
            name, _, rest = str(full).partition(".")
            inner, append = ({rest: value} if rest else value), name.endswith("+")
            name = name.removesuffix("+")
            where = f"{key}.{name}" if key else name
            if name in ("init_args", "dict_kwargs") and name not in slots and depth:
                if inner is not None:
                    new = self._arguments(new, inner, slots, defaults, key, more, depth + 1)
            elif name in slots:
                below = new.get(name, defaults.get(name, MISSING))
                if append:
                    inner = [
                        *(below if isinstance(below, list) else []),
                        *(inner if isinstance(inner, list) else [inner]),
                    ]
                new[name] = self.value(slots[name], below, inner, where, depth + 1)
            elif more and _PATH.fullmatch(name) and "." not in name and name not in SPECIAL:
                new.setdefault("dict_kwargs", {})[name] = self._plain(inner, where, depth)
            else:
                raise self._unknown(name, rest, where, slots)
        return new

    def choose(self, name: Any, bases: tuple[type, ...], key: str) -> Any:
        """The class, or for a factory the function, that a configuration names for a slot.

        Raises:
            ValueError: If there is no such class, or it is not of the slot's kind.
            Untrusted: If it is not this package's and not trusted; nothing of it has been imported.
        """
        if not isinstance(name, str) or _PATH.fullmatch(name) is None:
            raise self._error(key, f"{name!r} is not the name of a class")
        part: Any = None
        if "." not in name:
            found = [own_class(f"{module}.{name}") for module in defined().get(name, ())]
            part = next((p for p in (*found, external_class(name)) if fits(p, bases)), None)
            part = part or next((p for p in found if p is not None), None)
        elif name.startswith(f"{PACKAGE}."):
            part = own_class(name)
        elif (part := external_class(name)) is None:
            self._may_import(name, key)
            part = import_part(name)
        if part is None:
            raise self._absent(name, bases, key)
        if not fits(part, bases) and not (inspect.isfunction(part) and not is_ours(part)):
            kinds = " or ".join(base.__name__ for base in bases)
            remedy = "" if is_ours(part) else f"derive it from {path_of(bases[0])}, or choose one of "
            there = remedy or "there are "
            raise self._error(key, f"{name} is no {kinds}; {there}{', '.join(sorted(candidates(bases)))}")
        if inspect.isabstract(part):
            raise self._error(key, f"{name} is abstract; choose one of {', '.join(sorted(candidates(bases)))}")
        return part

    def _may_import(self, path: str, key: str) -> None:
        """Raises Untrusted unless the user has typed an import path, or trusts it."""
        trusted = any(path == name or path.startswith(f"{name}.") for name in self.trust)
        if self.typed or trusted:
            return
        foreign = f"{self.source}{key}: {path} is not part of {PACKAGE}, and a file may not run other code"
        if path.partition(".")[0] in sys.stdlib_module_names:
            raise Untrusted(f"{foreign}; no model needs it, so that this file may be an attack")
        raise Untrusted(f"{foreign}; if you trust it, add --trust {path.rpartition('.')[0] or path}")

    def _plain(self, value: Any, key: str, depth: int = 0) -> Any:
        """Plain data as they are, with `~` expanded; raises ValueError for anything that could become a part."""
        self._enter(key, depth)
        if isinstance(value, str):
            if not self.typed and any(mark in value for mark in ":{["):
                self._plain_text(value, key, depth)
            return os.path.expanduser(value) if value.startswith("~") else value
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, list | tuple):
            return [self._plain(inner, f"{key}[{i}]", depth + 1) for i, inner in enumerate(value)]
        if not isinstance(value, Mapping):
            raise self._error(key, f"must be plain data, not {type(value).__name__}")
        for name in value:
            if any(word.strip().casefold() in SPECIAL for word in str(name).split(".")):
                raise Untrusted(f"{self.source}{key} takes plain data, no part ({value.get('class_path', name)!r})")
        return {name: self._plain(inner, f"{key}.{name}", depth + 1) for name, inner in value.items()}

    def _plain_text(self, value: str, key: str, depth: int) -> None:
        """Refuses a string that a parser would read as a part."""
        try:
            inner = get_loader("yaml")(value)
        except (yaml.YAMLError, RecursionError, ValueError):
            return
        if not isinstance(inner, str):
            self._plain(inner, key, depth + 1)

    def _error(self, key: str, problem: str) -> ValueError:
        return ValueError(f"{self.source}{key}: {problem}" if key else f"{self.source}{problem}")

    def _unknown(self, name: str, rest: str, where: str, slots: Mapping[str, Slot]) -> ValueError:
        end = f".{rest.replace('init_args.', '')}" if rest else ""
        new = RENAMED.get(f"{where}{end}") or (RENAMED[where] + end if where in RENAMED else None)
        if new:
            return ValueError(f"{self.source}unknown key {where + end!r}; it is called {new!r}")
        nearest = get_close_matches(name, [*slots, *(SPECIAL[:2] if "." in where else ())], 1)
        if nearest:
            right = ".".join([*where.split(".")[:-1], nearest[0]])
            return ValueError(f"{self.source}unknown key {where + end!r}; did you mean {right + end!r}?")
        return ValueError(f"{self.source}unknown key {where + end!r}; there are {', '.join(slots) or 'none'}")

    def _absent(self, name: str, bases: tuple[type, ...], key: str) -> ValueError:
        known = candidates(bases)
        nearest = get_close_matches(name.rpartition(".")[2], known, 1)
        if not nearest:
            return self._error(key, f"there is no {name}; there are {', '.join(sorted(known))}")
        return self._error(key, f"there is no {name}; did you mean {nearest[0]!r}?")


def _texts(value: Any) -> Iterator[str]:
    """All strings in plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def _union(hints: tuple[Any, ...]) -> Any:
    return functools.reduce(operator.or_, hints)


def read_value(text: str, kind: Takes) -> Any:
    """What a user means who types a value for an argument of a kind."""
    try:
        value = get_loader("yaml")(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text
    if isinstance(value, str) or (value is None and text.strip() == ""):
        return text
    if kind.anything or not kind.text or isinstance(value, dict):
        return value
    if isinstance(value, list):
        return value if kind.items else text
    return value if type(value) in kind.scalars or (type(value) is int and float in kind.scalars) else text


def build(config: Any, base: type[Part], trust: Collection[str] = (), source: str = "", key: str = "") -> Part:
    """Makes a part from its configuration.

    Args:
        config: Its class and arguments: {"class_path": ..., "init_args": {...}}, also in the short forms of recipes.
        base: What the part has to be.
        trust: Modules and classes, by import path, whose parts the configuration may name.
        source: The file that it is from, for messages.
        key: What the part is there, such as "model", for messages.

    Raises:
        ValueError: If the configuration does not make such a part.
        Untrusted: If it names what is not this package's and not trusted; nothing of that has been imported.
    """
    tree = Merge(trust, source).value(Slot(base), MISSING, config, key)
    return instantiate(tree, base, trust, source or key)


def instantiate(tree: Mapping[str, Any], base: type[Part], trust: Collection[str] = (), source: str = "") -> Part:
    """Makes a part from a configuration that `Merge` has made, and so checked; see `build`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(base, "part")
    with only_imports([*trust, *class_paths(tree)]):
        try:
            made = parser.instantiate_classes(parser.parse_object({"part": tree}))
        except ArgumentError as error:
            raise ValueError(f"{source or base.__name__}: {' '.join(str(error).split())}") from error
    part: Part = made.part
    return part


def class_paths(tree: Any) -> list[str]:
    """All class paths in a configuration, and where these classes are defined."""
    if isinstance(tree, list):
        return [path for value in tree for path in class_paths(value)]
    if not isinstance(tree, Mapping):
        return []
    inner = [path for value in tree.values() for path in class_paths(value)]
    if "class_path" not in tree:
        return inner
    part = import_part(tree["class_path"])
    return [*inner, tree["class_path"], f"{part.__module__}.{part.__qualname__}"]


@contextmanager
def only_imports(trust: Collection[str]) -> Iterator[None]:
    """Within it the parser imports nothing but what configurations may name: a second check behind `Merge`."""
    settings = jsonargparse_settings.parsing_settings
    names = ("import_path_verdicts", "import_paths_enforced", "instantiate_subclass_spec_in_any")
    before = {name: settings[name] for name in names}
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*_PREFIXES, *trust],
        instantiate_subclass_spec_in_any=False,
    )
    try:
        yield
    finally:
        settings.update(before)
