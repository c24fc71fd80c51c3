"""Where scalars and pictures go: CSV files and Weights & Biases."""

import csv
import os
import socket
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

CURVES = "csv"
IMAGES_SEEN = "images_seen"


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Sends scalars to every logger, at the current optimiser step."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=trainer.global_step)


def log_image(trainer: Trainer, name: str, path: Path) -> None:
    """Sends a picture to every logger that takes pictures, on the first process."""
    for logger in trainer.loggers:
        if trainer.is_global_zero and hasattr(logger, "log_image"):
            logger.log_image(name, [str(path)], step=trainer.global_step)


class CSV(CSVLogger):
    """Scalars in <save_dir>/csv/version_<n>/metrics.csv, a version for each start of the run.

    Args:
        save_dir: The run's directory; the command line fills it in.
        flush_logs_every_n_steps: How often the file is written.
    """

    def __init__(self, save_dir: str | None = None, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir or ".", CURVES, flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._flushed_at = 0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Writes the file by steps passed; Lightning's does so at steps that scalars every n steps never meet."""
        super().log_metrics(dict(metrics), step)
        if step is not None and step - self._flushed_at >= self._flush_logs_every_n_steps:
            self.save()
            self._flushed_at = step


def read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars that `CSV` wrote for a run, as rising (step, value) lists by name.

    Where a resumed run repeats steps, what it wrote counts.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    versions = sorted(run_dir.glob(f"{CURVES}/version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:]))
    for path in versions:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if rows:
            start = min(int(row["step"]) for row in rows)
            for curve in curves.values():
                for step in [step for step in curve if step >= start]:
                    del curve[step]
        for row in rows:
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    curves[name][int(row["step"])] = float(value)
    return {name: sorted(curve.items()) for name, curve in curves.items() if curve}


def why_offline(timeout: float = 3.0) -> str | None:
    """The reason for which a Weights & Biases run cannot be online, None if it can be.

    Args:
        timeout: Seconds to wait for the server.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun", "disabled"):
        return f"WANDB_MODE={mode}"
    url = urlparse(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=timeout).close()
    except OSError:
        return f"{url.hostname} does not answer"
    # Only now: with a key but no network, this would take long to give up.
    return None if wandb.login(prompt=False, verify=False) else "not logged in: run `wandb login`"


class WandB(WandbLogger):
    """Weights & Biases, offline where the user is not logged in or the server does not answer.

    It never blocks and never fails a run: what cannot be started is switched off with a warning.

    Args:
        save_dir: The run's directory; the command line fills it in.
        project: Project to log to.
        name: Name of the run; by default that of its directory.
        id: Of a run to be continued.
    """

    def __init__(
        self,
        save_dir: str | None = None,
        project: str = "diffusion_lit",
        name: str | None = None,
        id: str | None = None,
    ) -> None:
        directory = Path(save_dir or ".")
        self._warned = False
        super().__init__(name=name or directory.resolve().name, save_dir=str(directory), project=project, id=id)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run, started at first use."""
        if self._experiment is not None:
            return self._experiment
        import wandb

        self._wandb_init.pop("anonymous", None)
        self._wandb_init["settings"] = wandb.Settings(silent=True, console="off", init_timeout=30)
        reason = why_offline()
        try:
            if reason is not None:
                disabled = os.environ.get("WANDB_MODE") == "disabled"
                if not disabled:
                    rank_zero_info(f"W&B runs offline ({reason}); `wandb sync` uploads it later")
                self._wandb_init["mode"] = "disabled" if disabled else "offline"
                self._wandb_init.pop("resume", None)
            Path(self._wandb_init["dir"]).mkdir(parents=True, exist_ok=True)
            # Not the base class's: it would go on with another run of this process.
            self._experiment = run = wandb.init(**self._wandb_init, reinit="create_new")
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        except (wandb.Error, OSError) as error:
            rank_zero_warn(f"W&B is switched off: {type(error).__name__}: {error}")
            self._experiment = run = wandb.init(mode="disabled")
        run.define_metric(IMAGES_SEEN)
        for name in ("fid", "frechet/*"):
            run.define_metric(name, step_metric=IMAGES_SEEN)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        with self._harmless():
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        with self._harmless():
            super().log_image(key, images, step, **kwargs)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turns an error of W&B into one warning."""
        import wandb

        try:
            yield
        except (wandb.Error, OSError) as error:
            if not self._warned:
                rank_zero_warn(f"W&B: {type(error).__name__}: {error}")
            self._warned = True
