"""Configuration files: where they are, what they say, and which others they include."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import get_loader

INCLUDE = "include"


class Layer(NamedTuple):
    """A configuration, and where it is from.

    Attributes:
        source: The file's name, for messages; empty for what is typed.
        tree: Its keys and values.
    """

    source: str
    tree: dict[str, Any]


def recipes() -> Path:
    """The folder of the recipes that come with the package."""
    package = Path(__file__).parent
    return next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), package / "configs")


def names() -> dict[str, Path]:
    """The recipes of the package by name, such as cifar10 and guidance/digits."""
    return {p.relative_to(recipes()).with_suffix("").as_posix(): p for p in sorted(recipes().rglob("*.yaml"))}


def find_file(name: str, folder: Path | None = None) -> Path:
    """The configuration file of a name: a path, from `folder`, or a recipe such as cifar10.

    Raises:
        FileNotFoundError: If there is neither.
    """
    path = (folder or Path()) / os.path.expanduser(name)
    known = names()
    if path.is_file():
        return path
    if name.removesuffix(".yaml") in known:
        return known[name.removesuffix(".yaml")]
    nearest = get_close_matches(Path(name).stem, known, 1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the recipes are {', '.join(known)}"
    raise FileNotFoundError(f"there is no file or recipe {name!r}; {hint}")


def read_file(path: Path) -> dict[str, Any]:
    """The content of one YAML file.

    Raises:
        ValueError: If it is no YAML of keys and values; names the file.
    """
    try:
        tree = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not YAML ({' '.join(str(error).split())})") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} is no configuration; give a recipe of keys and values, not {str(tree)[:60]!r}")
    return tree


def layers(name: str, folder: Path | None = None, above: tuple[Path, ...] = ()) -> list[Layer]:
    """A configuration file and, below it, those that it includes.

    Args:
        name: A path, or the name of a recipe.
        folder: Where a relative path starts.
        above: The files that include this one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no YAML, or includes itself.
    """
    path = find_file(name, folder)
    if path.resolve() in above:
        raise ValueError(f"{path} includes itself, by {' and '.join(p.name for p in above)}")
    tree = read_file(path)
    included = tree.pop(INCLUDE, [])
    files = [included] if isinstance(included, str) else included
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{path}: include={included!r} must be the name of a file, or a list of names")
    below = [layer for file in files for layer in layers(file, path.parent, (*above, path.resolve()))]
    return [*below, Layer(str(path), tree)]
