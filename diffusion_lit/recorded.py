"""The configuration of parts that were made in Python: the inverse of `configuration.build`."""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffusion_lit.parts import MISSING, path_of, signature, takes
from diffusion_lit.types import Part

MAIN = "__main__"


class NotRecorded(ValueError):
    """A part was made of something that a configuration cannot hold; the message names it."""


def configuration_of(part: Any, key: str, left_out: list[str]) -> dict[str, Any]:
    """The class of a part and what it was constructed with, resolved.

    An argument that the part keeps under its own name, a plain value or another part, counts as it is now: a sampler
    may have been replaced since. A factory, such as that of an optimiser, is written if it is a class or a
    `functools.partial` of one, and otherwise left out.

    Args:
        part: A `Part`, or an object that keeps the arguments of its constructor under their own names.
        key: What it is in the configuration, such as "model", for messages.
        left_out: Gets the keys of the factories that are left out.

    Returns:
        {"class_path": ..., "init_args": {...}}, plain data.

    Raises:
        NotRecorded: If an argument is neither plain data nor a part.
    """
    kind: Any = type(part)
    slots = signature(kind).slots
    arguments = {}
    for name, given in _given(part, key).items():
        where, value = f"{key}.{name}", _present(part, name, given)
        makes = takes(slots[name].hint).given if name in slots else 0
        if makes and value is not None:
            written = _factory(value, where)
            if written is None:
                left_out.append(where)
            else:
                arguments[name] = written
        else:
            arguments[name] = _value(value, where, left_out)
    return {"class_path": _import_path(kind, key), "init_args": arguments}


def _given(part: Any, key: str) -> Mapping[str, Any]:
    """What a part was constructed with, by name."""
    if isinstance(part, Part) and "_given" in vars(part):
        given: dict[str, Any] = vars(part)["_given"]
        return given
    names = [field.name for field in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else None
    kind: Any = type(part)
    names = list(signature(kind).slots) if names is None else names
    missing = [name for name in names if not hasattr(part, name)]
    if missing:
        raise NotRecorded(
            f"{key}: it is not known with which {', '.join(missing)} the {type(part).__name__} was made; derive the "
            "class from its base class in diffusion_lit, such as diffusion_lit.types.Network"
        )
    return {name: getattr(part, name) for name in names}


def _present(part: Any, name: str, given: Any) -> Any:
    """An argument as the part has it now, if it keeps it as such; else as it was given."""
    attributes = {**vars(part).get("_modules", {}), **vars(part)}
    now = attributes.get(name, MISSING)
    replaced = isinstance(now, Part) and (given is None or isinstance(given, Part))
    switched_off = now is None and isinstance(given, Part)
    changed = type(now) is type(given) and isinstance(now, bool | int | float | str)
    return now if replaced or switched_off or changed else given


def _factory(value: Any, key: str) -> dict[str, Any] | None:
    """A class, or a partial of one with plain keywords, as a part; None if it is neither."""
    made, keywords = value, {}
    if isinstance(value, functools.partial):
        # The parser's factories are partials of a function of its own, whose last argument is the class.
        made, keywords = value.args[-1] if value.args else value.func, value.keywords
    if not inspect.isclass(made):
        return None
    try:
        arguments = {name: _value(inner, f"{key}.{name}", []) for name, inner in keywords.items()}
        return {"class_path": _import_path(made, key), "init_args": arguments}
    except NotRecorded:
        return None


def _value(value: Any, key: str, left_out: list[str]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, list | tuple | range):
        return [_value(inner, f"{key}[{i}]", left_out) for i, inner in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: _value(inner, f"{key}.{name}", left_out) for name, inner in value.items()}
    if isinstance(value, Part | nn.Module) or dataclasses.is_dataclass(value):
        return configuration_of(value, key, left_out)
    raise NotRecorded(f"{key} is a {type(value).__name__}, which is neither plain data nor a part")


def _import_path(part: type, key: str) -> str:
    """Where a class can be imported from; for one of the running script, the script's own module."""
    if "<locals>" in part.__qualname__:
        raise NotRecorded(f"{key}: {part.__name__} is defined inside a function; define it in a module")
    if part.__module__ != MAIN:
        return path_of(part)
    main = sys.modules[MAIN]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    module = spec.name if spec is not None else MAIN if file is None else Path(file).stem
    return f"{module}.{part.__qualname__}"
