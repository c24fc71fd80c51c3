"""The places that loggers write to, which some of Lightning's demand."""

import inspect
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from diffusion_lit.parts import import_part

DIRECTORIES = ("save_dir", "root_dir")
"""What loggers call the directory that they write to."""
PACKAGES = {
    "TensorBoardLogger": ("tensorboard", "tensorboardX"),
    "MLFlowLogger": ("mlflow",),
    "CometLogger": ("comet_ml",),
    "LitLogger": ("litlogger",),
    "WandbLogger": ("wandb",),
}
"""The modules that a logger needs, any one of them; the first is installed by its name."""


def fill_save_dir(loggers: Any, run_dir: str) -> None:
    """Lets loggers that were given no place of their own write to the run directory.

    Args:
        loggers: `trainer.logger` of a configuration, with whole class paths: one logger, a list, a bool or None.
        run_dir: The run directory.

    Raises:
        ValueError: If a logger needs a package that is not installed.
    """
    for kind, arguments in _chosen(loggers):
        _require_package(kind)
        for name, (place, default) in _places(kind, arguments, run_dir).items():
            if arguments.get(name) in (None, default):
                arguments[name] = place


def clear_save_dir(loggers: Any, run_dir: str) -> None:
    """Undoes `fill_save_dir`, for a configuration that is to serve for other runs too."""
    for kind, arguments in _chosen(loggers):
        for name, (place, _) in _places(kind, arguments, run_dir).items():
            if arguments.get(name) == place:
                del arguments[name]


def _chosen(loggers: Any) -> Iterator[tuple[type, dict[str, Any]]]:
    """The class and the arguments of each logger of a configuration."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, dict):
            yield import_part(logger["class_path"]), logger.setdefault("init_args", {})


def _require_package(kind: type) -> None:
    for base in inspect.getmro(kind):
        modules = PACKAGES.get(base.__name__, ())
        if modules and not any(map(find_spec, modules)):
            package = modules[0].replace("_", "-")
            raise ValueError(f"trainer.logger={kind.__name__} needs {package}: pip install {package}")


def _places(kind: type, arguments: dict[str, Any], run_dir: str) -> dict[str, tuple[str, str | None]]:
    """Which arguments of a logger say where it writes: the place in the run directory, and the default."""
    places = dict.fromkeys(DIRECTORIES, run_dir)
    if issubclass(kind, MLFlowLogger):
        # MLflow no longer writes plain directories; where a server is given, that decides.
        given = arguments.get("save_dir")
        default = inspect.signature(MLFlowLogger).parameters["save_dir"].default
        here = os.path.abspath(run_dir if given in (None, default) else given)
        tracking = f"sqlite:///{here}/mlflow.db"
        own = arguments.get("tracking_uri") in (None, tracking) and "MLFLOW_TRACKING_URI" not in os.environ
        places = {"tracking_uri": tracking, "artifact_location": f"{here}/mlruns"} if own else {}
    parameters = inspect.signature(kind).parameters
    defaults = {name: parameters[name].default for name in places if name in parameters}
    return {name: (places[name], None if d is inspect.Parameter.empty else d) for name, d in defaults.items()}
