"""Measures something of many images on all processes, resumably, and puts it on record."""

import math
import platform
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from diffusion_lit.callbacks.collective import on_rank_zero, raise_together
from diffusion_lit.callbacks.progress import sampling_bar
from diffusion_lit.evaluation.partial import PartialResults
from diffusion_lit.execution import Execution
from diffusion_lit.locks import locked
from diffusion_lit.records import RESULTS, NonFinite, append_once, device_name, digest, key_of, read_records
from diffusion_lit.requests import Requests
from diffusion_lit.system import System
from diffusion_lit.types import StepFn

FOLDER = "evaluation"
PACKAGES = ("diffusion-lit", "torch", "lightning", "torch-fidelity", "numpy")
Columns: TypeAlias = Mapping[str, Tensor]
Record: TypeAlias = dict[str, Any]


def measure(
    trainer: L.Trainer,
    system: System,
    what: str,
    key: Mapping[str, Any],
    compared: Mapping[str, Any],
    requests: Requests,
    work: Callable[[int, StepFn], Columns],
    finish: Callable[[Columns], Record],
) -> Record:
    """Does the batches of `requests` over all processes and puts the outcome on record; collective.

    What was done when an evaluation stopped lies beside the run and is not done again, by any number of processes.

    Args:
        trainer: Its processes take part.
        system: Is measured with the weights that it holds.
        what: Names the kind of result in the record.
        key: What the tensors of a batch depend on, as plain data; the digest of the weights is added.
        compared: What the outcome depends on besides, as plain data.
        requests: Give the batches.
        work: Called as work(batch, on_step); returns tensors with one row per image, or one row per batch.
        finish: Called on the first process with the tensors of all batches; returns "scores" and further entries.

    Returns:
        The record, the same on every process.

    Raises:
        NonFinite: On every process, if `work` raises it, or a score is not finite; nothing is recorded then.
    """
    start = time.perf_counter()
    key = {"weights": digest(system.state_dict().items()), **key}
    run_dir = Path(trainer.default_root_dir)
    partial = PartialResults(run_dir / FOLDER / key_of(key), key)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(locked(partial.folder.with_suffix(".lock"), "evaluates", remove=True))
            open_partial(partial, requests)

        loaded = system.loaded

        def conclude() -> Record:
            columns = partial.columns(len(requests))
            path = None if loaded is None else loaded.path
            record = {
                "what": what,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                **finish(columns),
                "checkpoint": None if path is None else str(path),
                "step": trainer.global_step if trainer.training else (None if loaded is None else loaded.step),
                "weights_name": system.weights_name,
                **key,
                **compared,
                "process_seconds": round(float(columns["seconds"].sum()), 3),
                "seconds": round(time.perf_counter() - start, 3),
                **circumstances(trainer, system),
            }
            # A killed evaluation may have left the same record behind.
            append_once(run_dir / RESULTS, record, ["what", "step", "scores", *key, *compared])
            partial.remove()
            return record

        try:
            on_rank_zero(trainer, begin)
            with raise_together(trainer), sampling_bar(trainer, requests, what) as on_step:
                for batch in requests.share(trainer.global_rank, trainer.world_size):
                    if partial.done(batch):
                        on_step(1, 1)
                        continue
                    begun = time.perf_counter()
                    columns = dict(work(batch, on_step))
                    seconds = elapsed(begun, system.device)
                    partial.save(batch, {**columns, "seconds": torch.tensor([seconds], dtype=torch.float64)})
            record = on_rank_zero(trainer, conclude)
        except (NonFinite, OSError) as error:
            # Of no use: the same images again; or those of weights that do not come again, where training continues.
            if trainer.is_global_zero and (trainer.training or isinstance(error, NonFinite)):
                partial.remove()
            raise
        if record is None:
            raise RuntimeError("the first process sent no result")
        return record


def known(
    trainer: L.Trainer,
    system: System,
    key: Mapping[str, Any],
    compared: Mapping[str, Any],
    texts: Collection[str] = (),
) -> Record | None:
    """The newest record of the run that agrees in everything that its outcome depends on, if any; collective.

    Args:
        trainer: Its run directory has the records.
        system: What was measured.
        key: See `measure`.
        compared: Likewise.
        texts: Further entries that a result has, lists of texts.
    """
    wanted = {"weights": digest(system.state_dict().items()), **key, **compared}
    return on_rank_zero(trainer, lambda: newest_record(Path(trainer.default_root_dir), wanted, texts))


def newest_record(run_dir: Path, wanted: Mapping[str, Any], texts: Collection[str] = ()) -> Record | None:
    """The newest result of a run that has all these entries, if there is one; see `known`."""
    matching = [r for r in read_records(run_dir / RESULTS) if all(r.get(k) == v for k, v in wanted.items())]
    return next((r for r in reversed(matching) if is_result(r, texts)), None)


def is_result(record: Record, texts: Collection[str] = ()) -> bool:
    """Whether the entries of a record are of the kinds that `measure` writes; the file may be somebody else's."""
    moment, scores = record.get("time"), record.get("scores")
    lists = [record.get(name) for name in texts]
    if not isinstance(moment, str) or not isinstance(scores, dict) or not scores:
        return False
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        return False
    counts = [record.get("num_images"), record.get("evaluations")]
    values = [*counts, record.get("process_seconds"), *scores.values()]
    try:
        known_zone = datetime.fromisoformat(moment).tzinfo is not None
        finite = all(type(value) in (int, float) and math.isfinite(value) for value in values)
    except (ValueError, OverflowError):
        return False
    return known_zone and finite and all(type(count) is int for count in counts) and record["num_images"] > 0


def open_partial(partial: PartialResults, requests: Requests) -> None:
    """Opens a folder of partial results, and says what of it is done or that other results do not count."""
    done = sum(partial.path(number).is_file() for number in range(len(requests)))
    if done:
        images = min(done * requests.batch_size, requests.num_images)
        rank_zero_info(f"evaluation: continuing after {images:,} of {requests.num_images:,} images in {partial.folder}")
    else:
        for folder, names in partial.others():
            rank_zero_info(f"evaluation: {folder} is unfinished, but of another {', '.join(names)}; starting anew")
    partial.open()


def elapsed(start: float, device: torch.device) -> float:
    """Seconds since `start`, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def circumstances(trainer: L.Trainer, system: System) -> Record:
    """Where and with what something was computed."""
    return {
        "processes": trainer.world_size,
        "execution": asdict(getattr(trainer, "execution", Execution())),
        "device": device_name(system.device),
        "versions": {"python": platform.python_version(), **{package: version_of(package) for package in PACKAGES}},
        "config": system.config,
    }


def version_of(package: str) -> str:
    """A package's version; "uninstalled" for a source tree that is used without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "uninstalled"
