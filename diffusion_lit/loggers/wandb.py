"""Weights & Biases, which never stands in the way of a run."""

import os
import socket
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

IMAGES_SEEN = "images_seen"
"""The name of the scalar that scores are plotted over."""


def why_offline(timeout: float = 3.0) -> str | None:
    """Returns why a Weights & Biases run cannot be online, None if it can be.

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
    # Last, since with a key but without a network this takes long to give up.
    return None if wandb.login(prompt=False, verify=False) else "not logged in: run `wandb login`"


class WandB(WandbLogger):
    """Weights & Biases, offline if the user is not logged in or the server does not answer.

    The run starts with `start` or with the first value, not when the trainer is set up; until then `experiment` does
    nothing. Errors of W&B are warnings: they neither stop nor fail training.

    Args:
        save_dir: Directory of W&B's files; by default the run directory.
        project: Project; by default $WANDB_PROJECT or "diffusion_lit".
        name: Name of the run; by default $WANDB_NAME or the name of the run directory.
        id: Id of a run to continue; by default $WANDB_RUN_ID or the one that the checkpoint carries.
        entity: User or team; by default $WANDB_ENTITY, or the user's own default.
        group: Group of runs, such as an experiment.
        job_type: Kind of run, such as "train".
        tags: Labels of the run.
        notes: Description of the run.
        mode: "online", "offline" or "disabled"; by default $WANDB_MODE.
        kwargs: Further arguments of WandbLogger and `wandb.init`.

    Raises:
        ValueError: If `log_model` is set.
    """

    def __init__(
        self,
        save_dir: str | None = None,
        project: str | None = None,
        name: str | None = None,
        id: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: list[str] | None = None,
        notes: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        **kwargs: Any,
    ) -> None:
        log_model = kwargs.get("log_model")
        if log_model:
            raise ValueError(
                f"trainer.logger.log_model={log_model}: checkpoints are not uploaded here; use `wandb artifact put`"
            )
        options = {
            "entity": entity or os.environ.get("WANDB_ENTITY"),
            "group": group,
            "job_type": job_type,
            "tags": tags,
            "notes": notes,
            "mode": mode,
        }
        given: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
        super().__init__(
            name=name or os.environ.get("WANDB_NAME"),
            save_dir=save_dir,  # type: ignore[arg-type]
            project=project or os.environ.get("WANDB_PROJECT") or "diffusion_lit",
            id=id or os.environ.get("WANDB_RUN_ID"),
            **given,
            **kwargs,
        )
        self._params: dict[str, Any] = {}
        self._warned = False

    @property
    def id(self) -> str | None:
        """Id of the W&B run: the one given, else its own once it has started; None where W&B is disabled."""
        return self._id

    @id.setter
    def id(self, id: str | None) -> None:
        self._id = self._wandb_init["id"] = id

    def bind(self, run_dir: str) -> None:
        """Sets the directory unless one was given."""
        self._save_dir = self._save_dir or run_dir

    @property
    def experiment(self) -> Any:
        """The W&B run; before it has started, an object that accepts every call and does nothing."""
        return DummyLogger().experiment if self._experiment is None else self._experiment

    @rank_zero_only
    def start(self) -> None:
        """Starts the W&B run, or continues the one of `id`; if that fails, warns and disables W&B."""
        if self._experiment is not None:
            return
        import wandb

        if os.environ.get("WANDB_MODE") == "":
            del os.environ["WANDB_MODE"]  # W&B refuses an empty one.
        try:
            self._experiment = run = wandb.init(**self._options())
            run.define_metric("trainer/global_step")
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            run.define_metric(IMAGES_SEEN)
            for name in ("fid", "frechet/*"):
                run.define_metric(name, step_metric=IMAGES_SEEN)
            if not run.disabled:
                self.id = run.id
        except Exception as error:
            rank_zero_warn(f"W&B is switched off: {type(error).__name__}: {error}")
            self._experiment = wandb.init(mode="disabled")
        self.log_hyperparams(self._params)

    def _options(self) -> dict[str, Any]:
        """The arguments of `wandb.init`."""
        import wandb

        directory = Path(self._save_dir or ".")
        # A run of its own, not one that this process has started before.
        options = {**self._wandb_init, "dir": str(directory), "reinit": "create_new"}
        options["name"] = options["name"] or directory.resolve().name
        options.pop("anonymous", None)
        options.setdefault("settings", wandb.Settings(silent=True, console="off", init_timeout=30))
        mode = options.get("mode") or ("offline" if self._offline else os.environ.get("WANDB_MODE"))
        if mode != "disabled":
            directory.mkdir(parents=True, exist_ok=True)
            reason = "mode=offline" if mode == "offline" else why_offline()
            if reason is not None:
                rank_zero_info(f"W&B runs offline ({reason}); `wandb sync` uploads it later")
                mode = "offline"
                options.pop("resume", None)
        return {**options, "mode": mode}

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Sends the configuration, at once or when the run starts."""
        if self._experiment is None:
            self._params.update(vars(params) if isinstance(params, Namespace) else params)
            return
        with self._harmless():
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.start()
        with self._harmless():
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        self.start()
        with self._harmless():
            super().log_image(key, images, step, **kwargs)

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """Turns errors of W&B into one warning."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                rank_zero_warn(f"W&B: {type(error).__name__}: {error}")
            self._warned = True
