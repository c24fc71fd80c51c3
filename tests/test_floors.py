"""A room may import only what stands below it: docs/architecture.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = "diffusion_lit"
BELOW: dict[str, set[str]] = {
    "types": set(),
    "memory": {"types"},
    "images": {"types"},
    "diffusion": {"types", "images"},
    "networks": {"types", "images"},
    "data": {"types", "images", "records"},
    "metrics": {"types", "images", "memory", "records"},
    "records": set(),
    "generation": {"types"},
    "averaging": {"types"},
    "execution": set(),
    "loggers": set(),
    "optimization": set(),
    "module": {"types", "images", "memory", "diffusion", "averaging", "execution", "generation", "optimization"},
    "callbacks": {
        "types", "images", "memory", "diffusion", "averaging", "execution", "generation", "data", "metrics", "loggers",
        "module", "records",
    },
    "evaluation": {
        "types", "images", "memory", "diffusion", "averaging", "execution", "generation", "data", "metrics", "loggers",
        "module", "callbacks", "records",
    },
    "trainer": {
        "types", "images", "diffusion", "averaging", "execution", "generation", "data", "metrics", "loggers", "module",
        "callbacks", "records", "evaluation",
    },
    "tools": {
        "types", "images", "diffusion", "networks", "averaging", "generation", "data", "metrics", "module", "callbacks",
        "records",
    },
}  # fmt: skip
ABOVE_ALL = {"cli", "refusals", "__main__"}


def room_of(file: str) -> str:
    """The room of a file given by its path inside the package: methods/<paper> is a room of its own."""
    parts = Path(file).with_suffix("").parts
    return "/".join(parts[:2]) if parts[0] == "methods" else parts[0]


def imported(file: str, source: str) -> set[str]:
    """The rooms of our own package that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = [PACKAGE, *Path(file).parts[:-1]]
            here = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*here, *([node.module] if node.module else [])])
            names.update({module} if module != PACKAGE else {f"{module}.{alias.name}" for alias in node.names})
    paths = [name.split(".")[1:] for name in names if name == PACKAGE or name.startswith(f"{PACKAGE}.")]
    return {"/".join(path[:2]) if path[0] == "methods" else path[0] for path in paths if path}


def arrows_up(file: str, source: str) -> list[str]:
    """What a file imports that does not stand below it, as readable arrows."""
    room = room_of(file)
    if room in (*ABOVE_ALL, "__init__"):
        return []
    leaf = room.startswith("methods/")
    allowed = set().union(BELOW, BELOW["trainer"]) - {"trainer", "tools"} if leaf else BELOW.get(room)
    if allowed is None:
        return [f"{file}: the room {room} has no floor yet; give it one in this test"]
    wrong = imported(file, source) - allowed - {room}
    return [f"{file}: {room} -> {other}, which does not stand below it" for other in sorted(wrong)]


def test_no_arrow_points_up(repository: Path) -> None:
    package = repository / PACKAGE
    files = sorted(package.rglob("*.py"))
    assert len(files) > 30
    wrong = [arrow for f in files for arrow in arrows_up(str(f.relative_to(package)), f.read_text())]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source", "arrow"),
    [
        ("module.py", "from diffusion_lit.callbacks import EMA", "module -> callbacks"),
        ("data/base.py", "def f():\n    import diffusion_lit.metrics.features", "data -> metrics"),
        ("diffusion/grid.py", "from diffusion_lit import networks", "diffusion -> networks"),
        ("callbacks/ema.py", "from ..trainer import Trainer", "callbacks -> trainer"),
        ("loggers.py", "from diffusion_lit.types import Batch", "loggers -> types"),
        ("trainer.py", "from diffusion_lit.methods.guidance import G", "trainer -> methods/guidance"),
        ("methods/a.py", "from diffusion_lit.methods.b import B", "methods/a -> methods/b"),
        ("tools/files.py", "from diffusion_lit.trainer import Trainer", "tools -> trainer"),
        ("methods/a.py", "from diffusion_lit.tools.files import read", "methods/a -> tools"),
        ("attic/old.py", "", "no floor yet"),
    ],
)
def test_an_arrow_that_points_up_is_found(file: str, source: str, arrow: str) -> None:
    assert arrow in "\n".join(arrows_up(file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("cli.py", "from diffusion_lit.methods.guidance import G"),
        ("methods/a.py", "from diffusion_lit.module import DiffusionModule\nfrom .parts import x"),
        ("data/base.py", "from . import stream\nfrom ..types import Batch\nimport torch"),
    ],
)
def test_an_arrow_that_points_down_is_none_to_complain_of(file: str, source: str) -> None:
    wrong = arrows_up(file, source)
    assert not [arrow for arrow in wrong if "methods/parts" not in arrow]
