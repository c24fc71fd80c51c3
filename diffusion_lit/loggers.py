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


class Table:
    """Scalars in a CSV file that is whole at every moment.

    Rows are appended and synced to disk. Where a row brings a new column, or a run goes on from an earlier step, the
    file is written anew beside and renamed.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics: list[dict[str, Any]] = []
        self._columns: list[str] | None = None
        self._written = 0
        self._step: int | None = None
        self._limit: int | None = None
        self._torn = False

    def __len__(self) -> int:
        """Rows of this run, those that are not written yet included."""
        self._open()
        return self._written + len(self.metrics)

    def go_on(self, step: int, rows: int | None) -> None:
        """Drops what was written after the checkpoint that the run goes on from, with the next writing.

        Args:
            step: The checkpoint's; no row beyond it stays.
            rows: How many rows there were then; None: not known.
        """
        self._step, self._limit, self._columns = step, rows, None

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Adds a row."""
        self.metrics.append({name: float(value) for name, value in metrics.items()} | {"step": step})

    def log_hparams(self, params: Mapping[str, Any]) -> None:
        """Nothing: the run's configuration is in its config.yaml."""

    def save(self) -> None:
        """Writes the rows that are not written yet.

        Raises:
            OSError: If that is not possible; the file is as before then, and the rows are kept for another try.
        """
        try:
            self._save()
        except OSError:
            raise
        except BaseException:
            # Ctrl-C: which rows are written, the file alone knows.
            self._torn = True
            raise

    def _save(self) -> None:
        kept = self._open()
        columns = self._columns or []
        new = set().union(*self.metrics) - set(columns)
        if new or kept is not None or not self.path.is_file():
            rows = (read_rows(self.path) if kept is None else kept) + self.metrics
            columns = sorted({*columns, *new})
            if not rows and not self.path.is_file():
                return
            self._write_anew(columns, rows)
            self._columns, self._written, self._step, self.metrics = columns, len(rows), None, []
        elif self.metrics:
            self._append(columns)
            self._written, self.metrics = self._written + len(self.metrics), []

    def _open(self) -> list[dict[str, Any]] | None:
        """Looks at what the file holds when that is not known; returns the rows of it that stay if others do not."""
        if self._columns is not None and self._step is None and not self._torn:
            return None
        rows = read_rows(self.path)
        if self._torn and self._step is None:
            self.metrics = self.metrics[max(len(rows) - self._written, 0) :]
        self._torn = False
        step, limit = self._step, len(rows) if self._limit is None else self._limit
        kept = rows if step is None else [row for row in rows[:limit] if int(row["step"]) <= step]
        self._columns, self._written = (list(rows[0]) if rows else []), len(kept)
        return None if step is None else kept

    def _write_anew(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.part")
        try:
            with part.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(rows)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _append(self, columns: list[str]) -> None:
        size = self.path.stat().st_size
        try:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, columns).writerows(self.metrics)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.truncate(self.path, size)
            raise


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `Table` without one that is torn at its end; none where there is no file."""
    try:
        with path.open(newline="") as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return []
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines(keepends=True))
    return [row for row in rows if None not in row and None not in row.values()]


class CSV(CSVLogger):
    """Scalars in <save_dir>/csv/version_0/metrics.csv: one file of a run, however often it is interrupted.

    Args:
        save_dir: The run's directory; the command line fills it in.
        flush_logs_every_n_steps: How often the file is written, beside before every checkpoint.
    """

    def __init__(self, save_dir: str | None = None, flush_logs_every_n_steps: int = 100) -> None:
        super().__init__(save_dir or ".", CURVES, version=0, flush_logs_every_n_steps=flush_logs_every_n_steps)
        self._flushed_at = 0
        self._table = Table(Path(self.log_dir) / "metrics.csv")

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The table."""
        return self._table

    @property
    def num_rows(self) -> int:
        """How many rows the run has."""
        return len(self._table)

    def go_on(self, step: int, rows: int | None) -> None:
        """See `Table.go_on`."""
        self._table.go_on(step, rows)
        self._flushed_at = step

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Writes the file by steps passed; Lightning's does so at steps that scalars every n steps never meet."""
        self._table.log_metrics(metrics, step or 0)
        if step is not None and step - self._flushed_at >= self._flush_logs_every_n_steps:
            self.save()
            self._flushed_at = step

    @rank_zero_only
    def save(self) -> None:
        """Writes what is not written yet; where that is not possible, warns and keeps it for the next time."""
        try:
            self._table.save()
        except OSError as error:
            rank_zero_warn(f"{self._table.path} could not be written ({error.strerror or error}); training goes on")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


def curves_of(trainer: Trainer) -> CSV | None:
    """The logger that keeps a run's curves on disk, if there is one."""
    return next((logger for logger in trainer.loggers if isinstance(logger, CSV)), None)


def read_curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars that `CSV` wrote for a run, as rising (step, value) lists by name.

    Where a resumed run repeats steps, what it wrote counts.
    """
    curves: dict[str, dict[int, float]] = defaultdict(dict)
    versions = sorted(run_dir.glob(f"{CURVES}/version_*/metrics.csv"), key=lambda p: int(p.parent.name[8:]))
    for path in versions:
        rows = read_rows(path)
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
