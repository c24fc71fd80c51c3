"""A room may import only what stands below it: docs/architecture.md."""

import ast
from pathlib import Path

import pytest

PACKAGE = "diffusion_lit"
FLOORS: list[set[str]] = [
    {
        "types",
        "text",
        "files",
        "terminal",
        "lightning",
        "upgrade",
        "averaging",
        "execution",
        "optimization",
        "stepping",
        "parts",
        "locks",
    },
    {"codec", "frozen", "images", "memory", "recipes", "configuration", "trainer_options"},
    {"conditioner"},
    {"records", "recorded", "command"},
    {"data", "metrics", "networks", "diffusion"},
    {"checkpoint", "loggers"},
    {"weights", "requests", "codecs", "conditioners"},
    {"system"},
    {"generator"},
    {"module", "prediction"},
    {"edit"},
    {"callbacks"},
    {"evaluation"},
    {"sections"},
    {"sections"},
    {"tools", "methods/*"},
    {"trainer"},
    {"errors"},
    {"help"},
    {"main"},
    {"cli"},
    {"__main__", "completion"},
]
"""From the lowest up: a room imports what stands below it, and nothing beside it."""
LEAVES = {"tools", "methods/*"}


def room_name(room: str) -> str:
    """The name of a room in `FLOORS`: all methods stand on one floor."""
    return "methods/*" if room.startswith("methods/") else room


def floor_of(room: str) -> int | None:
    """The number of the floor that a room stands on; None if it has none."""
    return next((number for number, rooms in enumerate(FLOORS) if room_name(room) in rooms), None)


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
    if room == "__init__":
        return []
    floor = floor_of(room)
    if floor is None:
        return [f"{file}: the room {room} has no floor yet; give it one in this test"]
    wrong = []
    for other in sorted(imported(file, source) - {room}):
        below = floor_of(other)
        leaf = room_name(other) in LEAVES and room not in ("cli", "errors")
        if below is None or below >= floor or leaf:
            wrong.append(f"{file}: {room} -> {other}, which does not stand below it")
    return wrong


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
        ("records.py", "from diffusion_lit.loggers import read_curves", "records -> loggers"),
        ("trainer.py", "from diffusion_lit.methods.guidance import G", "trainer -> methods/guidance"),
        ("methods/a.py", "from diffusion_lit.methods.b import B", "methods/a -> methods/b"),
        ("tools/files.py", "from diffusion_lit.trainer import Trainer", "tools -> trainer"),
        ("methods/a.py", "from diffusion_lit.tools.files import read", "methods/a -> tools"),
        (
            "system.py",
            "from diffusion_lit.diffusion import DDIM\nfrom diffusion_lit.generator import Generator",
            "system -> generator",
        ),
        ("evaluation/measure.py", "from diffusion_lit.trainer import Trainer", "evaluation -> trainer"),
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
