"""The parts of the package: which classes there are, what arguments they take, and what may go into each argument.

An argument whose type is a class of parts, such as `sampler: Sampler`, takes a part, whose class a
configuration chooses. Everything else takes plain data.
"""

import collections.abc
import enum
import importlib
import importlib.util
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

PACKAGE = "diffusion_lit"
MISSING = inspect.Parameter.empty
_TEXTS = (enum.Enum, os.PathLike, timedelta, torch.dtype, torch.device, bytes, complex)
"""Plain types whose values are written as strings."""
REFUSED = (
    *("BackboneFinetuning", "BaseFinetuning", "BatchSizeFinder", "EMAWeightAveraging", "GradientAccumulationScheduler"),
    *("LearningRateFinder", "ModelPruning", "OnExceptionCheckpoint", "SpikeDetection", "StochasticWeightAveraging"),
    "WeightAveraging",
)
"""Lightning's callbacks that may be named, and that no run takes: `trainer_options` says what to use instead."""
_EXTERNAL: dict[str, tuple[str, ...] | None] = {
    "torch.optim": None,
    "torch.optim.lr_scheduler": None,
    "lightning.pytorch.loggers": (
        *("CSVLogger", "TensorBoardLogger", "WandbLogger", "MLFlowLogger", "CometLogger", "LitLogger"),
    ),
    "lightning.pytorch.callbacks": (
        *("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary"),
        *("RichModelSummary", "RichProgressBar", "TQDMProgressBar", "Timer", *REFUSED),
    ),
}
"""Classes of other packages that a configuration may name, by module; None: all that the module offers itself."""


@dataclass(frozen=True)
class Takes:
    """What an argument takes, according to its type.

    Attributes:
        bases: Base classes of the parts that it takes.
        given: How many arguments a part is given by its user, where the argument is a factory of parts.
        items: Types of a list's items; empty where it takes no list.
        values: Types of a dictionary's values; empty where it takes no dictionary.
        scalars: Its plain types, such as int and str.
        choices: Its plain values, where it takes some values only.
        length: How many items a list must have; None: any number.
        function: Whether it takes a function or a class as such, by import path.
        anything: Whether it has no type.
    """

    bases: tuple[type, ...] = ()
    given: int = 0
    items: tuple[Any, ...] = ()
    values: tuple[Any, ...] = ()
    scalars: frozenset[type] = frozenset()
    choices: tuple[Any, ...] = ()
    length: int | None = None
    function: bool = False
    anything: bool = False

    @property
    def text(self) -> bool:
        """Whether it takes a string as it is."""
        return self.anything or str in self.scalars or any(isinstance(choice, str) for choice in self.choices)

    @property
    def parts(self) -> bool:
        """Whether it takes parts, itself or as items or values."""
        return bool(self.bases) or any(takes(hint).parts for hint in (*self.items, *self.values))

    def accepts(self, value: Any) -> bool:
        """Whether plain data are of the argument's type, as far as that is known."""
        if self.anything or value in self.choices:
            return True
        if isinstance(value, str):
            return str in self.scalars or self.function or bool(self.bases)
        if isinstance(value, list | dict):
            return bool(self.items if isinstance(value, list) else self.values)
        return type(value) in self.scalars or (type(value) is int and float in self.scalars)

    def __str__(self) -> str:
        """What may be given, for messages."""
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
        found = [name for scalar, name in names.items() if scalar in self.scalars]
        found += [repr(choice) if isinstance(choice, str) else str(choice) for choice in self.choices]
        found += ["a list"] * bool(self.items) + ["keys and values"] * bool(self.values)
        found += ["the import path of a function"] * self.function + [base.__name__ for base in self.bases]
        return ", or ".join([*found, *(["null"] if type(None) in self.scalars else [])])


@cache
def takes(hint: Any) -> Takes:
    """What an argument of a type takes."""
    hint = getattr(hint, "__value__", hint)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return takes(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _together([takes(member) for member in arguments])
    if origin is typing.Literal:
        return Takes(choices=arguments)
    if hint in (Callable, typing.Callable) or origin is Callable:
        result = takes(arguments[1]) if arguments else Takes()
        count = len(arguments[0]) if arguments and isinstance(arguments[0], list) else 0
        return Takes(bases=result.bases, given=count, function=not result.bases)
    if origin is type or hint is type:
        return Takes(function=True)
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return Takes(values=arguments[1:] or (Any,))
    if inspect.isclass(origin) and issubclass(origin, Iterable):
        fixed = origin is tuple and Ellipsis not in arguments
        return Takes(
            length=len(arguments) if fixed else None, items=tuple(a for a in arguments if a is not Ellipsis) or (Any,)
        )
    if hint in (Any, object) or not inspect.isclass(hint):
        return Takes(anything=True)
    if issubclass(hint, Mapping | tuple | list | set):
        return Takes(values=(Any,)) if issubclass(hint, Mapping) else Takes(items=(Any,))
    if issubclass(hint, _TEXTS):
        return Takes(scalars=frozenset({str}))
    for plain in (bool, int, float, str, type(None)):
        if issubclass(hint, plain):
            return Takes(scalars=frozenset({plain}))
    return Takes(bases=(hint,))


def _together(members: list[Takes]) -> Takes:
    lists = [member for member in members if member.items]
    return Takes(
        bases=tuple(base for member in members for base in member.bases),
        given=max(member.given for member in members),
        items=tuple(hint for member in members for hint in member.items),
        values=tuple(hint for member in members for hint in member.values),
        scalars=frozenset().union(*(member.scalars for member in members)),
        choices=tuple(choice for member in members for choice in member.choices),
        length=lists[0].length if len(lists) == 1 else None,
        function=any(member.function for member in members),
        anything=any(member.anything for member in members),
    )


@dataclass(frozen=True)
class Slot:
    """An argument.

    Attributes:
        hint: Its type.
        implied: The class of parts that is meant where a configuration gives arguments but no class.
        fixed: Whether the argument is always a part of the class `hint`, of which only arguments are given.
        plain: Whether it takes no parts, whatever its type.
    """

    hint: Any
    implied: type | None = None
    fixed: bool = False
    plain: bool = False


@dataclass(frozen=True)
class Signature:
    """The arguments of a class.

    Attributes:
        slots: By name.
        defaults: Values of those that have a default, as plain data: a part is its class path and arguments.
        more: Whether it takes further arguments that it does not name.
    """

    slots: Mapping[str, Slot]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    more: bool = False


@cache
def signature(part: Any, given: int = 0) -> Signature:
    """The arguments of a class, or of a function, without the first `given`."""
    named: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    more = extended = False
    makers = [part]
    if inspect.isclass(part):
        # A module takes any argument, and refuses it.
        bases = [base for base in part.__mro__[:-1] if base is not nn.Module]
        makers = [vars(base)["__init__"] for base in bases if "__init__" in vars(base)]
    for make in makers:
        parameters = list(inspect.signature(make).parameters.values())[inspect.isclass(part) :]
        kinds = {parameter.kind for parameter in parameters}
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                named.setdefault(parameter.name, parameter)
        try:
            names = {**vars(typing), **vars(collections.abc), **inspect.unwrap(make).__globals__}
            hints = {**typing.get_type_hints(make, localns=names), **hints}
        except (NameError, TypeError, AttributeError):
            hints = {**{parameter.name: Any for parameter in parameters}, **hints}
        more = inspect.Parameter.VAR_KEYWORD in kinds
        if not more:
            break
        extended = True
    skipped = set(list(named)[:given])
    plain = {name: parameter.default for name, parameter in named.items() if name not in skipped}
    needed = any(default is MISSING for default in plain.values())
    passing = needed and extended
    if not more and not passing and all(map(_is_plain, plain.values())):
        defaults = {name: value for name, value in plain.items() if value is not MISSING}
        return Signature(
            {name: Slot(hints.get(name, Any)) for name in plain}, {n: _listed(v) for n, v in defaults.items()}
        )
    defaults = _parsed_defaults(part, skipped)
    # What a class passes to its base itself, as Lightning's loggers do with their directory, is no argument of it.
    own = inspect.signature(part).parameters
    passed = {n for n in named if n not in own and n not in defaults and named[n].default is MISSING}
    arguments = [name for name in {**named, **defaults} if name not in skipped and name not in passed]
    optional = [n for n in defaults if n not in named or named[n].default is not MISSING]
    return Signature(
        {name: Slot(hints.get(name, Any)) for name in arguments}, {n: _listed(defaults[n]) for n in optional}, more
    )


def _parsed_defaults(part: Any, skipped: set[str]) -> dict[str, Any]:
    """The defaults of arguments as jsonargparse finds them in the source: parts as class paths and arguments."""
    parser = ArgumentParser(exit_on_error=False)
    skip: set[str | int] = {*skipped}
    if inspect.isclass(part):
        parser.add_class_arguments(part, "part", skip=skip, fail_untyped=False)
    else:
        parser.add_function_arguments(part, "part", skip=skip, fail_untyped=False)
    found = parser.get_defaults().get("part")
    return {} if found is None else found.as_dict()


def _is_plain(value: Any) -> bool:
    """Whether a default is plain data, or there is none."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is MISSING or value is None or type(value) in (bool, int, float, str)


def _listed(value: Any) -> Any:
    """Plain data with lists for tuples, and texts for members of an enumeration."""
    if isinstance(value, enum.Enum):
        return value.value if isinstance(value, str) else value.name
    if isinstance(value, Mapping):
        return {name: _listed(inner) for name, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, list | tuple) else value


@cache
def modules() -> Mapping[str, Path]:
    """The package's modules, by import path."""
    folder = Path(__file__).parent
    paths = {path: (PACKAGE, *path.relative_to(folder).with_suffix("").parts) for path in sorted(folder.rglob("*.py"))}
    return {".".join(parts).removesuffix(".__init__"): path for path, parts in paths.items()}


@cache
def defined() -> Mapping[str, tuple[str, ...]]:
    """Names of all classes of the package, and the modules that define them; nothing is imported."""
    found: dict[str, tuple[str, ...]] = {}
    for module, path in modules().items():
        for name in re.findall(r"^class ([A-Z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[name] = (*found.get(name, ()), module)
    return found


def import_part(path: str) -> Any:
    """The class or function at an import path; whether that may be imported has been decided.

    Raises:
        ValueError: If there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        with working_directory(module.partition(".")[0]):
            return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"there is no {path}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"there is no {path}: module {module} has no {name}") from error


@contextmanager
def working_directory(name: str) -> Iterator[None]:
    """Within it a module of that name is found in the working directory too, if it is nowhere else.

    The installed program does not look there by itself, as `python -m` does; nor should it, for what nobody has asked
    for.
    """
    here = os.getcwd()
    if not name or name in sys.modules or importlib.util.find_spec(name) is not None:
        yield
        return
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def path_of(part: Any) -> str:
    """The import path of a class or function, from the outermost package below the first that offers it."""
    packages, name = part.__module__.split("."), part.__name__
    for end in range(2, len(packages)):
        package = ".".join(packages[:end])
        if getattr(sys.modules.get(package), name, None) is part:
            return f"{package}.{name}"
    return f"{part.__module__}.{part.__qualname__}"


def is_ours(part: Any) -> bool:
    """Whether a class is one of this package."""
    return inspect.isclass(part) and f"{part.__module__}.".startswith(f"{PACKAGE}.")


def own_class(path: str) -> type | None:
    """The class of this package at an import path; None if there is no such class."""
    module, _, name = path.rpartition(".")
    if module not in modules() or name not in defined():
        return None
    part = getattr(importlib.import_module(module), name, None)
    return part if is_ours(part) else None


def external_class(path: str) -> type | None:
    """The class of torch or Lightning at an import path or of a name; None if it is not one that may be named."""
    name = path.rpartition(".")[2]
    for module, allowed in _EXTERNAL.items():
        if path != name and not path.startswith(f"{module}."):
            continue
        part = vars(importlib.import_module(module)).get(name) if allowed is None or name in allowed else None
        if inspect.isclass(part) and path in (name, f"{module}.{name}", f"{part.__module__}.{name}"):
            return part
    return None


def fits(part: Any, bases: tuple[type, ...]) -> bool:
    """Whether a class may go where parts of some base classes go."""
    return inspect.isclass(part) and any(base in part.__mro__ for base in bases)


def candidates(bases: tuple[type, ...]) -> dict[str, type]:
    """All classes of this package, and those of others that may be named, that fit, by name."""
    own = (own_class(f"{module}.{name}") for name, modules in defined().items() for module in modules)
    other = (
        external_class(f"{module}.{name}")
        for module, allowed in _EXTERNAL.items()
        for name in allowed or vars(importlib.import_module(module))
        if name not in REFUSED
    )
    parts = [part for part in (*own, *other) if part is not None and fits(part, bases)]
    return {part.__name__: part for part in parts if not inspect.isabstract(part)}
