"""Scores of a generator, while it trains and in `test`, over all processes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from diffusion_lit.callbacks.checkpoints import save
from diffusion_lit.callbacks.collective import SharedOSError, on_rank_zero
from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.callbacks.sample_grid import check_section_sampler
from diffusion_lit.callbacks.scalars import images_seen
from diffusion_lit.callbacks.storage import if_possible
from diffusion_lit.checkpoint import FOLDER as CHECKPOINTS
from diffusion_lit.data.dataset import Split
from diffusion_lit.diffusion import Sampler
from diffusion_lit.evaluation.measure import Record, known, measure
from diffusion_lit.evaluation.real_images import RealImages
from diffusion_lit.evaluation.table import Table, fill
from diffusion_lit.generator import Generator
from diffusion_lit.images import to_uint8
from diffusion_lit.lightning import log_gathered
from diffusion_lit.loggers import IMAGES_SEEN, log_metrics
from diffusion_lit.metrics.features import FeatureExtractor, Inception, outputs_in_memory
from diffusion_lit.metrics.reference import Reference
from diffusion_lit.metrics.scores import Evidence, FrechetDistance, Score
from diffusion_lit.records import NonFinite, describe, digest
from diffusion_lit.requests import Requests
from diffusion_lit.types import StepFn


class Evaluation(L.Callback):
    """Scores the averaged model in `test`, and every so many steps of training if asked.

    Exactly as many images are generated as asked for, over all processes; what was done of them when a run stopped is
    not done again. Every result becomes a line of <run>/results.jsonl with what it depends on, unless a value is not
    finite: then `test` fails, and training continues with a warning. The best model by Fréchet distance while training
    is kept as <run>/checkpoints/best.ckpt.

    Args:
        scores: What to compute; null: the Fréchet distance alone, []: nothing.
        extractor: Makes features of 8-bit images, for all scores that bring none of their own.
        num_images: Images to generate in `test`; published figures use 50,000.
        batch_size: Images generated at once by each process.
        sampler: Draws the images; null: the model's own sampler.
        seed: Decides their noise: image i depends on it and on i alone.
        reference: An .npz file with mu and sigma for the Fréchet distance; null: computed from all training images.
        cache_dir: Where what was computed of real images is kept; null: $DIFFUSION_LIT_CACHE or ~/.cache/diffusion_lit.
        num_real: Real images for the scores that compare with single images; null: as many as are generated.
        split: Of the real images that generated ones are compared with, where there is no `reference`.
        every_n_steps: Optimiser steps between scores while training; null: none.
        training_num_images: Images to generate for a score while training.
        training_sampler: Draws them; null: `sampler`.
        at_start: Whether to score the untrained model too.
        table: In `test`, a table of scores instead of a single evaluation: `DDIMTable` and so on.

    Raises:
        ValueError: If a number is out of range, or a score cannot be computed from so many images or by its extractor.
    """

    def __init__(
        self,
        scores: list[Score] | None = None,
        extractor: FeatureExtractor = Inception(),
        num_images: int = 50_000,
        batch_size: int = 256,
        sampler: Sampler | None = None,
        seed: int = 0,
        reference: str | None = None,
        cache_dir: str | None = None,
        num_real: int | None = None,
        split: Split = "train",
        every_n_steps: int | None = None,
        training_num_images: int = 10_000,
        training_sampler: Sampler | None = None,
        at_start: bool = False,
        table: Table | None = None,
    ) -> None:
        self.scores = [FrechetDistance()] if scores is None else list(scores)
        self.extractor = extractor
        self.requests = Requests(num_images, batch_size, seed=seed, section="evaluation")
        self.sampler = sampler
        self.num_real = num_real
        self.interval = Interval(every_n_steps, "evaluation.every_n_steps")
        self.training_sampler = training_sampler or sampler
        self.at_start = at_start
        self.table = table
        if training_num_images < 1:
            raise ValueError(f"evaluation.training_num_images={training_num_images} must be at least 1")
        self.training_requests = Requests(training_num_images, batch_size, seed=seed, section="evaluation")
        self.best: float | None = None
        self.best_step: int | None = None
        self._scored_at: int | None = None
        self._check_scores(num_images)
        if every_n_steps is not None:
            self._check_scores(training_num_images)
        extractors = {id(e): e for e in (self.extractor, *self.extractors)}
        self.real = {
            id_: RealImages(e, reference if e is self.extractor else None, cache_dir, split)
            for id_, e in extractors.items()
        }

    def _check_scores(self, num_images: int) -> None:
        for score in self.scores:
            score.check(num_images)
            if score.against == "features":
                score.check(self.num_real or num_images)
            if score.output == "logits" and not self.extractor_of(score).classifies:
                raise ValueError(
                    f"{type(score).__name__} needs an extractor that is a classifier, which "
                    f"{self.extractor_of(score).name} is not; leave the score out or take Inception"
                )
        names = [extractor.name for extractor in self.extractors]
        if len(set(names)) < len(names):
            raise ValueError(
                f"evaluation: two extractors are called {', '.join(names)}; their scores could not be told apart"
            )

    def extractor_of(self, score: Score) -> FeatureExtractor:
        """The extractor whose features a score is computed from."""
        return self.extractor if score.extractor is None else score.extractor

    @property
    def extractors(self) -> list[FeatureExtractor]:
        """The extractors that some score needs, each once."""
        needed = [self.extractor_of(score) for score in self.scores if score.output is not None]
        return list({id(extractor): extractor for extractor in needed}.values())

    # When

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Finds out what is missing before anything long starts."""
        training = stage == "fit" and self.interval.steps is not None
        if not (training or stage == "test") or not isinstance(pl_module, Generator):
            if self.table is not None and stage == "test":
                raise ValueError(f"evaluation.table: a {type(pl_module).__name__} generates nothing to score")
            return
        for name, sampler in (("sampler", self.sampler), ("training_sampler", self.training_sampler)):
            if sampler is not None and (training or name == "sampler"):
                check_section_sampler(pl_module, sampler, "evaluation", name)
        for extractor in self.extractors:
            self.real[id(extractor)].prepare(trainer)
        for score in self.scores:
            on_rank_zero(trainer, score.prepare, per_machine=True)
            score.prepare()
            if score.needs_labels and pl_module.num_classes is None:
                raise ValueError(
                    f"{type(score).__name__}: the model has no classes to ask for; leave it out of --evaluation.scores"
                )
            if score.against == "features":
                real = self.real[id(self.extractor_of(score))]
                real.require_folder()
                requests = self.training_requests if training else self.requests
                data = real.data(trainer)
                score.check(min(self.num_real or requests.num_images, len(data.dataset(real.split))))
                if score.needs_labels and "label" not in data.some([0]):
                    raise ValueError(
                        f"{type(score).__name__}: the real images have no classes; leave it out of --evaluation.scores"
                    )
        if self.table is not None and stage == "test":
            self.table.check(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.interval.start(trainer)
        if self.interval.steps is None or not isinstance(pl_module, Generator):
            return
        if self.at_start and trainer.global_step == 0:
            self._score_training(trainer, pl_module)
        else:
            self._real(trainer, pl_module.device, 0, gaussians_only=True)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if self.interval.due(trainer) and isinstance(pl_module, Generator):
            for i, (name, value) in enumerate(self._score_training(trainer, pl_module).items()):
                # Of interest to Lightning's callbacks, such as EarlyStopping; the bar has room for one.
                pl_module.log(name, value, prog_bar=i == 0, logger=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        done = self._scored_at == trainer.global_step or trainer.interrupted
        if self.interval.steps is not None and not done and isinstance(pl_module, Generator):
            self._score_training(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not isinstance(pl_module, Generator) or not self.scores:
            return
        if self.table is not None:
            fill(self.table, lambda c: self.evaluate(trainer, pl_module, c.sampler, reuse=True), trainer, pl_module)
            return
        for name, value in self.evaluate(trainer, pl_module)["scores"].items():
            log_gathered(pl_module, name, value)

    def _score_training(self, trainer: L.Trainer, generator: Generator) -> Mapping[str, float]:
        scores: Mapping[str, float] = {}
        if not self.scores:
            return scores
        # If one of several processes gave up alone, the others would wait for it.
        with if_possible("evaluation", OSError if trainer.world_size == 1 else SharedOSError):
            sampler = self.training_sampler or generator.sampler
            scores = self.evaluate(trainer, generator, sampler, requests=self.training_requests)["scores"]
            self._scored_at = trainer.global_step
            log_metrics(trainer, {**scores, IMAGES_SEEN: images_seen(trainer)})
            self._keep_best(trainer, scores)
        return scores

    def _keep_best(self, trainer: L.Trainer, scores: Mapping[str, float]) -> None:
        distances = [self.extractor_of(s).metric_name for s in self.scores if isinstance(s, FrechetDistance)]
        value = scores.get(distances[0]) if distances else None
        if value is None or (self.best is not None and value >= self.best):
            return
        before = self.best, self.best_step
        # Before the file is written, which holds them too.
        self.best, self.best_step = value, trainer.global_step
        problem: str | None = "interrupted"
        try:
            problem = save(trainer, Path(trainer.default_root_dir) / CHECKPOINTS / "best.ckpt")
        finally:
            if problem is not None:
                self.best, self.best_step = before

    def state_dict(self) -> dict[str, Any]:
        kind = [[type(s).__name__ for s in self.scores], self.extractor.name, self.training_requests.num_images]
        return {
            "best": self.best,
            "best_step": self.best_step,
            "scored_at": self._scored_at,
            "score": [*kind, self.training_requests.seed],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The best of another kind of score means nothing for this one.
        if state_dict.get("score") == self.state_dict()["score"]:
            self.best, self.best_step = state_dict["best"], state_dict["best_step"]
            self._scored_at = state_dict["scored_at"]

    # What

    def evaluate(
        self,
        trainer: L.Trainer,
        generator: Generator,
        sampler: Sampler | None = None,
        requests: Requests | None = None,
        reuse: bool = False,
    ) -> Record:
        """Scores the averaged weights, or those that the generator holds, and puts the result on record; collective.

        Args:
            trainer: Its processes take part.
            generator: Makes the images.
            sampler: Another than the one configured.
            requests: Other images than those of `test`.
            reuse: Whether a record of the same evaluation is taken instead of a new one.

        Returns:
            The record, the same on every process; its "scores" are the values by name.
        """
        sampler = sampler or self.sampler or generator.sampler
        requests = requests or self.requests
        num_real = self.num_real or requests.num_images
        gaussians, features = self._real(trainer, generator.device, num_real)
        conditions = generator.conditions()
        shown = conditions.described()
        key = {
            **generator.described(sampler),
            **({} if shown is None else {"conditions": shown}),
            "seed": requests.seed,
            "batch_size": requests.batch_size,
            "precision": str(trainer.precision),
            "extractors": [extractor.fingerprint() for extractor in self.extractors],
        }
        alone = [describe_score(score) for score in self.scores if score.output is None]
        if alone:
            key["scores_of_single_images"] = alone
        paired = [self.extractor_of(score).name for score in self.scores if score.against == "targets"]
        if paired:
            key["targets"] = sorted(set(paired))
        compared = {
            "num_images": requests.num_images,
            "scores_of": [describe_score(score) for score in self.scores],
            "references": [describe_reference(gaussian) for gaussian in gaussians.values()],
            "num_real": num_real if features else None,
        }

        def work(batch: int, on_step: StepFn) -> dict[str, Tensor]:
            request = requests[batch]
            given = conditions(request["index"])
            images = to_uint8(generator.sample(request["index"].tolist(), requests.seed, sampler, given, on_step))
            columns = {
                f"{extractor.name}.{name}": output
                for extractor in self.extractors
                for name, output in outputs_in_memory(extractor, images).items()
            }
            for extractor in self.extractors:
                if extractor.name in paired and "image" in given:
                    targets = to_uint8(given["image"].to(images.device))
                    columns[f"{extractor.name}.targets"] = outputs_in_memory(extractor, targets)["features"]
            for score in self.scores:
                columns |= score.per_image(generator, images, given)
            return columns | ({"label": given["label"]} if "label" in given else {})

        def finish(columns: Mapping[str, Tensor]) -> Record:
            rows = {name: values[: requests.num_images] for name, values in columns.items() if name != "seconds"}
            short = [name for name, values in rows.items() if len(values) != requests.num_images]
            if short:
                raise RuntimeError(f"{len(rows[short[0]])} rows of {short[0]} instead of {requests.num_images}")
            scores = self._scores(rows, gaussians, features, generator.device)
            return {"scores": scores, "evaluations": generator.evaluations(sampler)}

        for extractor in self.extractors:
            extractor.to(generator.device).eval()
        with generator.averaged_weights():
            record = known(trainer, generator, key, compared) if reuse else None
            if record is None:
                record = measure(trainer, generator, "images", key, compared, requests, work, finish)
        rank_zero_info(summary(trainer, record))
        return record

    def _real(
        self, trainer: L.Trainer, device: torch.device, num_real: int, gaussians_only: bool = False
    ) -> tuple[dict[str, Reference], dict[str, Mapping[str, Tensor]]]:
        """What the scores compare with, by the extractor's name; collective."""
        gaussians: dict[str, Reference] = {}
        features: dict[str, Mapping[str, Tensor]] = {}
        for score in self.scores:
            extractor = self.extractor_of(score)
            real = self.real[id(extractor)]
            if score.against == "gaussian":
                gaussians[extractor.name] = real.gaussian(trainer, device)
            elif score.against == "features" and extractor.name not in features and not gaussians_only:
                features[extractor.name] = real.features(trainer, device, num_real)
        return gaussians, features

    def _scores(
        self,
        generated: Mapping[str, Tensor],
        gaussians: Mapping[str, Reference],
        features: Mapping[str, Mapping[str, Tensor]],
        device: torch.device,
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        for score in self.scores:
            extractor = self.extractor_of(score)
            real = features.get(extractor.name, {})
            if score.output is None:
                found |= score(Evidence(torch.empty(0), columns=generated), extractor)
                continue
            outputs = generated[f"{extractor.name}.{score.output}"]
            wrong = int((~outputs.isfinite().all(1)).sum())
            if wrong:
                raise NonFinite(f"{score.output} of {wrong} images in {extractor.name} are not finite")
            evidence = Evidence(
                generated=outputs.to(device),
                labels=generated.get("label"),
                gaussian=gaussians.get(extractor.name),
                real=real["features"].to(device) if real else None,
                real_labels=real.get("label"),
                columns=generated,
                targets=generated.get(f"{extractor.name}.targets"),
            )
            found |= score(evidence, extractor)
        return found


def describe_score(score: Score) -> dict[str, Any]:
    """A score's settings, without its extractor."""
    return {name: value for name, value in describe(score).items() if name != "extractor"}


def describe_reference(reference: Reference) -> dict[str, Any]:
    """What a reference is, with a hash of its numbers."""
    return {
        "name": reference.name,
        "count": reference.count,
        "extractor": reference.extractor,
        "hash": digest([("mu", reference.mu), ("sigma", reference.sigma)]),
    }


def summary(trainer: L.Trainer, record: Record) -> str:
    """A record's scores on one line."""
    values = ", ".join(f"{name} {value:.6g}" for name, value in record["scores"].items())
    where = f"step {record['step']}" if trainer.training else str(Path(trainer.default_root_dir) / "results.jsonl")
    return f"{where}: {values} ({record['num_images']:,} images, {record['evaluations']} evaluations each)"
