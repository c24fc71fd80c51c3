"""Scores of a model, over all processes, with all that is needed to get them again."""

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from diffusion_lit.callbacks.collective import SharedOSError, on_first, together
from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.callbacks.progress import sampling_bar
from diffusion_lit.callbacks.sample_grid import check_sampler
from diffusion_lit.callbacks.scalars import images_seen
from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.diffusion import Sampler
from diffusion_lit.evaluation.partial import PartialResults
from diffusion_lit.evaluation.real_images import RealImages
from diffusion_lit.execution import Execution
from diffusion_lit.generation import Requests, check_seed
from diffusion_lit.images import to_uint8
from diffusion_lit.loggers import IMAGES_SEEN, log_metrics
from diffusion_lit.metrics.features import FeatureExtractor, Inception, as_extractor, outputs_in_memory
from diffusion_lit.metrics.reference import Reference
from diffusion_lit.metrics.scores import FrechetDistance, Score
from diffusion_lit.module import DiffusionModule
from diffusion_lit.records import RESULTS, append_record, describe, device_name, digest, key_of, read_records

FOLDER = "evaluation"
PACKAGES = ("diffusion-lit", "torch", "lightning", "torch-fidelity", "numpy")


class Evaluation(L.Callback):
    """Scores the averaged model in `test`, and every so many steps of training if asked.

    Exactly `num_images` images are generated; what was done of them when a run stopped is kept beside its checkpoints
    and not done again. Every result becomes a line of <run>/results.jsonl with what it depends on.

    Args:
        scores: What to compute; null: the Fréchet distance alone, []: nothing.
        extractor: Makes features of 8-bit images for all scores that bring none of their own.
        num_images: Images to generate; published figures use 50,000.
        batch_size: Images generated at once by each process.
        sampler: How images are generated; null: by the model's own sampler.
        seed: Decides their noise: image i depends on it and on i alone.
        reference: An .npz file with mu and sigma for the Fréchet distance; null: computed from all training images.
        cache_dir: Where what was computed of real images is kept; null: $DIFFUSION_LIT_CACHE or ~/.cache/diffusion_lit.
        num_real: Training images for the scores that compare with single images; null: as many as are generated.
        every_n_steps: Optimiser steps between evaluations while training; null: none.

    Raises:
        ValueError: If a number is out of range, or a score cannot be computed from so many images or by its extractor.
    """

    def __init__(
        self,
        scores: list[Score] | None = None,
        extractor: FeatureExtractor | nn.Module = Inception(),
        num_images: int = 50_000,
        batch_size: int = 256,
        sampler: Sampler | None = None,
        seed: int = 0,
        reference: str | None = None,
        cache_dir: str | None = None,
        num_real: int | None = None,
        every_n_steps: int | None = None,
    ) -> None:
        self.scores = [FrechetDistance()] if scores is None else list(scores)
        self.extractor = as_extractor(extractor)
        self.requests = Requests(num_images, batch_size, section="evaluation")
        check_seed("evaluation.seed", seed)
        self.sampler = sampler
        self.seed = seed
        self.num_real = num_images if num_real is None else num_real
        self.interval = Interval(every_n_steps, "evaluation.every_n_steps")
        self._partial: PartialResults | None = None
        for score in self.scores:
            score.check(num_images)
            if score.against == "features":
                score.check(self.num_real)
            if score.output == "logits" and not self.extractor_of(score).classifies:
                raise ValueError(
                    f"{type(score).__name__} needs an extractor that is a classifier, which "
                    f"{self.extractor_of(score).name} is not; leave the score out or take Inception"
                )
        names = [extractor.name for extractor in self.used]
        if len(set(names)) < len(names):
            raise ValueError(
                f"evaluation: two extractors are called {', '.join(names)}; a score could not be told apart"
            )
        extractors = {id(e): e for e in (self.extractor, *map(self.extractor_of, self.scores))}
        self.real = {
            id_: RealImages(e, reference if e is self.extractor else None, cache_dir) for id_, e in extractors.items()
        }

    def extractor_of(self, score: Score) -> FeatureExtractor:
        """Whose features a score is about."""
        return self.extractor if score.extractor is None else score.extractor

    @property
    def used(self) -> list[FeatureExtractor]:
        """The extractors that some score needs, each once."""
        return list({id(e): e for e in map(self.extractor_of, self.scores)}.values())

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds out what is missing before anything long starts."""
        wanted = stage == "test" or (stage == "fit" and self.interval.steps is not None)
        if not wanted or not isinstance(pl_module, DiffusionModule):
            return
        if self.sampler is not None:
            check_sampler(self.sampler, pl_module.process, "evaluation")
        for extractor in self.used:
            self.real[id(extractor)].prepare(trainer)
        for score in self.scores:
            if score.against == "features":
                self.real[id(self.extractor_of(score))].require_folder()
                available = len(self.real[id(self.extractor_of(score))].data(trainer).dataset("train"))
                score.check(min(self.num_real, available))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval.start(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if self.interval.due(trainer) and isinstance(pl_module, DiffusionModule):
            # Where one of several processes gave up alone, the others would wait for it.
            with if_possible("evaluation", OSError if trainer.world_size == 1 else SharedOSError):
                try:
                    scores = self.evaluate(trainer, pl_module)["scores"]
                except OSError:
                    # Parts of these weights' images are of no use to the next.
                    if self._partial is not None and trainer.is_global_zero:
                        self._partial.remove()
                    raise
                log_metrics(trainer, {**scores, IMAGES_SEEN: images_seen(trainer)})

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if isinstance(pl_module, DiffusionModule) and self.scores:
            for name, value in self.evaluate(trainer, pl_module)["scores"].items():
                pl_module.log(name, value, sync_dist=False, rank_zero_only=False)

    def key(self, trainer: L.Trainer, module: DiffusionModule, sampler: Sampler) -> dict[str, Any]:
        """What features of generated image i depend on, beside i."""
        return {
            "weights": digest(module.state_dict().items()),
            "process": describe(module.process),
            "parameterization": describe(module.denoiser.parameterization),
            "guidance": describe(module.guidance),
            "sampler": describe(sampler),
            "seed": self.seed,
            "batch_size": self.requests.batch_size,
            "precision": str(trainer.precision),
            "extractors": [extractor.fingerprint() for extractor in self.used],
        }

    def evaluate(
        self,
        trainer: L.Trainer,
        module: DiffusionModule,
        sampler: Sampler | None = None,
        checkpoint: Path | str | None = None,
    ) -> dict[str, Any]:
        """Scores the averaged weights, or those that the module holds, and writes the result down; collective.

        Args:
            trainer: Whose processes take part.
            module: The model.
            sampler: Another than the one configured.
            checkpoint: Where the weights are from, if not from the trainer's.

        Returns:
            The record, the same on every process; its "scores" are the values by name.
        """
        sampler = sampler or self.sampler or module.sampler
        source = checkpoint or trainer.ckpt_path
        start = time.perf_counter()
        with module.averaged_weights():
            key = self.key(trainer, module, sampler)
            partial = self._partial = PartialResults(Path(trainer.default_root_dir) / FOLDER / key_of(key), key)
            on_first(trainer, lambda: announce(partial, self.requests))
            self._generate(trainer, module, sampler, partial)
            name = module.weights_name
        gaussians, features = self._real(trainer, module.device)

        def finish() -> dict[str, Any]:
            columns = partial.columns(len(self.requests), self.requests.num_images)
            scores = self._scores(columns, gaussians, features, module.device)
            record = {
                "what": "images",
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "scores": scores,
                "checkpoint": None if source is None else str(source),
                "step": trainer.global_step if trainer.training else module.loaded_step,
                "weights_name": name,
                **key,
                "evaluations": int(columns["evaluations"].min()),
                "process_seconds": round(float(columns["seconds"].sum()), 3),
                "seconds": round(time.perf_counter() - start, 3),
                **self._compared(gaussians),
                **circumstances(trainer, module),
            }
            append_record(Path(trainer.default_root_dir) / RESULTS, record)
            partial.remove()
            return record

        record = on_first(trainer, finish)
        if record is None:
            raise RuntimeError("the first process sent no result")
        rank_zero_info(f"{Path(trainer.default_root_dir) / RESULTS}: {summary(record)}")
        return record

    def _compared(self, gaussians: Mapping[str, Reference]) -> dict[str, Any]:
        """What scores depend on beside the features of generated images."""
        return {
            "num_images": self.requests.num_images,
            "scores_of": [describe_score(score) for score in self.scores],
            "references": [of_reference(gaussian) for gaussian in gaussians.values()],
            "num_real": self.num_real if any(score.against == "features" for score in self.scores) else None,
        }

    def known(self, trainer: L.Trainer, module: DiffusionModule, sampler: Sampler) -> dict[str, Any] | None:
        """The newest record of the run that is of the same in every respect, if there is one; collective."""
        gaussians, _ = self._real(trainer, module.device, only_gaussians=True)
        with module.averaged_weights():
            wanted = {**self.key(trainer, module, sampler), **self._compared(gaussians)}

        def find() -> dict[str, Any] | None:
            records: list[dict[str, Any]] = read_records(Path(trainer.default_root_dir) / RESULTS)
            of_same = [r for r in records if all(r.get(name) == value for name, value in wanted.items())]
            return of_same[-1] if of_same else None

        return on_first(trainer, find)

    def _generate(self, trainer: L.Trainer, module: DiffusionModule, sampler: Sampler, partial: PartialResults) -> None:
        for extractor in self.used:
            extractor.to(module.device).eval()
        with together(trainer), sampling_bar(trainer, module, self.requests, FOLDER):
            for number in self.requests.share(trainer.global_rank, trainer.world_size):
                request = self.requests[number]
                size = len(request["index"])
                if partial.done(number):
                    if module.on_sampling_step is not None:
                        module.on_sampling_step(1, 1)
                    continue
                start = time.perf_counter()
                with counted(module.denoiser) as calls:
                    images = to_uint8(module.sample(request["index"].tolist(), self.seed, sampler))
                seconds = elapsed(start, module.device)
                tensors = {
                    f"{extractor.name}.{name}": output
                    for extractor in self.used
                    for name, output in outputs_in_memory(extractor, images).items()
                }
                # Where memory did not suffice, the batch was made in parts.
                parts = -(-size // (module.sampled_at_once or size))
                tensors["evaluations"] = torch.full((size,), len(calls) // parts)
                tensors["seconds"] = torch.full((size,), seconds / size, dtype=torch.float64)
                partial.save(number, tensors)

    def _real(
        self, trainer: L.Trainer, device: torch.device, only_gaussians: bool = False
    ) -> tuple[dict[str, Reference], dict[str, Tensor]]:
        """What the scores compare with, by the extractor's name."""
        gaussians, features = {}, {}
        for score in self.scores:
            extractor = self.extractor_of(score)
            real = self.real[id(extractor)]
            if score.against == "gaussian":
                gaussians[extractor.name] = real.gaussian(trainer, device)
            elif score.against == "features" and extractor.name not in features and not only_gaussians:
                features[extractor.name] = real.features(trainer, device, self.num_real)
        return gaussians, features

    def _scores(
        self,
        generated: Mapping[str, Tensor],
        gaussians: Mapping[str, Reference],
        features: Mapping[str, Tensor],
        device: torch.device,
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        for score in self.scores:
            extractor = self.extractor_of(score)
            of_generated = generated[f"{extractor.name}.{score.output}"].to(device)
            real = features.get(extractor.name)
            real = None if real is None else real.to(device)
            found |= score(of_generated, gaussians.get(extractor.name), real, extractor)
        return found


def announce(partial: PartialResults, requests: Requests) -> None:
    """Opens a folder of partial results and says what of it is done already, or that others do not count."""
    done = sum(partial.path(number).is_file() for number in range(len(requests)))
    if done:
        images = min(done * requests.batch_size, requests.num_images)
        rank_zero_info(f"evaluation: going on after {images:,} of {requests.num_images:,} images in {partial.folder}")
    else:
        for folder, names in partial.others():
            rank_zero_info(f"evaluation: {folder} is unfinished, but of another {', '.join(names)}; starting anew")
    partial.open()


@contextmanager
def counted(denoiser: nn.Module) -> Iterator[list[None]]:
    """Collects one entry for each call of a denoiser inside the context: the network's hooks see none if compiled."""
    calls: list[None] = []
    hook = denoiser.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        hook.remove()


def elapsed(start: float, device: torch.device) -> float:
    """Seconds since `start`, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def describe_score(score: Score) -> dict[str, Any]:
    """A score's settings, without its extractor."""
    return {name: value for name, value in describe(score).items() if name != "extractor"}


def of_reference(reference: Reference) -> dict[str, Any]:
    """What a reference is, with a hash of its numbers."""
    return {
        "name": reference.name,
        "count": reference.count,
        "extractor": reference.extractor,
        "hash": digest([("mu", reference.mu), ("sigma", reference.sigma)]),
    }


def circumstances(trainer: L.Trainer, module: DiffusionModule) -> dict[str, Any]:
    """Where and with what something was computed."""
    return {
        "processes": trainer.world_size,
        "execution": asdict(getattr(trainer, "execution", Execution())),
        "device": device_name(module.device),
        "versions": {"python": platform.python_version(), **{package: version_of(package) for package in PACKAGES}},
        "config": module.config,
    }


def version_of(package: str) -> str:
    """A package's version; of a tree that is used without being installed, that word."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "uninstalled"


def summary(record: Mapping[str, Any]) -> str:
    """A record's scores on one line."""
    values = ", ".join(f"{name} {value:.6g}" for name, value in record["scores"].items())
    return f"{values} ({record['num_images']:,} images, {record['evaluations']} evaluations each)"
