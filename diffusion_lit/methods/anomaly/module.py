"""The system that learns good images and marks what is not like them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from diffusion_lit.data import DefectImages, ImageData
from diffusion_lit.data.folder import several
from diffusion_lit.data.mvtec import GOOD
from diffusion_lit.diffusion import DiscreteProcess, ImageNoise
from diffusion_lit.evaluation.measure import Record, known, measure
from diffusion_lit.evaluation.table import fill
from diffusion_lit.generator import check_finite
from diffusion_lit.images import from_uint8, to_uint8
from diffusion_lit.lightning import log_gathered
from diffusion_lit.memory import in_memory, shift_steps
from diffusion_lit.methods.anomaly.maps import Detector, Found, smooth
from diffusion_lit.methods.anomaly.pictures import (
    AnomalyWriter,
    Inspection,
    below,
    image_names,
    save_grid,
    stored_images,
)
from diffusion_lit.methods.anomaly.scores import Scoring, Truth, score, smooth_frames
from diffusion_lit.methods.anomaly.table import LambdaTable
from diffusion_lit.module import DiffusionModule
from diffusion_lit.records import describe
from diffusion_lit.requests import Requests
from diffusion_lit.types import Batch, Network, StepFn

GRID = 3
"""Images of each class in the picture that `test` makes."""


class AnoDDPM(DiffusionModule):
    """A diffusion model of good images, by which defects of others are found.

    An image is noised up to step lambda and denoised again, which leaves what is common and loses what is not; the map
    of anomalies is where the result differs from the image. `test` scores the maps of test images with known defects,
    `predict` writes maps, overlays and scores.

    Args:
        network: See `DiffusionModule`.
        detector: How anomalies are looked for.
        scoring: How `test` scores what was found.
        table: Values of lambda for a table of scores in `test`; null: the detector's own alone.
        **kwargs: Of `DiffusionModule`.

    Raises:
        ValueError: If the process has no step lambda, or the model is not trained there.

    Source: Wyatt et al. 2022.
    """

    def __init__(
        self,
        network: Network,
        detector: Detector = Detector(),
        scoring: Scoring = Scoring(),
        table: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(network, **kwargs)
        self.detector = detector
        if isinstance(detector.distance, torch.nn.Module):
            self.distance_network = detector.distance
        self.scoring = scoring
        self.table = None if table is None else LambdaTable(table)
        for steps in [detector.lambda_steps, *(table or [])]:
            self.time_of(steps)

    def time_of(self, lambda_steps: int) -> float:
        """The time of a step; raises ValueError if there is none, or the model is not trained there."""
        if not isinstance(self.process, DiscreteProcess):
            raise ValueError(f"AnoDDPM counts steps of a chain, which {type(self.process).__name__} is not")
        num_steps = self.process.num_steps
        if not 1 <= lambda_steps <= num_steps:
            raise ValueError(
                f"lambda_steps={lambda_steps} must lie in 1 .. {num_steps}, the steps of the process; set "
                "--model.detector.lambda_steps 250"
            )
        last = getattr(self.objective.times, "last", 1.0)
        if lambda_steps > last * num_steps + 1e-6:
            raise ValueError(
                f"lambda_steps={lambda_steps}: the model is trained up to step {last * num_steps:g} only; lower "
                "--model.detector.lambda_steps, or train with a larger --model.objective.times.last"
            )
        return lambda_steps / num_steps

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["noise"] = describe(self.noise_source)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_noise(checkpoint)
        super().on_load_checkpoint(checkpoint)

    def load(self, checkpoint: Mapping[str, Any], weights: str = "averaged", path: Path | str | None = None) -> None:
        self._check_noise(checkpoint)
        super().load(checkpoint, weights, path)

    def _check_noise(self, checkpoint: Mapping[str, Any]) -> None:
        own, trained = describe(self.noise_source), checkpoint.get("noise")
        if trained is not None and trained != own:
            raise ValueError(
                f"noise: the model was trained with {sentence(trained)}, not {sentence(own)}; leave --model.noise out, "
                "or train another model"
            )

    # Detection

    def detect(self, images: Tensor, indices: Sequence[int], seed: int = 0, on_step: StepFn | None = None) -> Found:
        """Looks for anomalies with the weights that the system holds.

        Args:
            images: (B, C, H, W), in [-1, 1].
            indices: Which images these are, (B,): what is found in image i depends on the image, the seed and i alone.
            seed: Of the noise.
            on_step: Called after every sampling step.

        Raises:
            NonFinite: If a value of a reconstruction is infinite or not a number.
        """
        images = images.to(self.device)
        if not len(images):
            return Found(images, images, images[:, 0], images.flatten(1).sum(1))

        def work(chosen: slice, part: int, num_parts: int) -> Found:
            shifted = shift_steps(on_step, part, num_parts)
            return self._detect(images[chosen], self.noise(indices[chosen], seed), shifted)

        with self.evaluating():
            parts, _ = in_memory(work, len(images), len(images), "while looking for anomalies")
        found = Found(*(torch.cat(values) for values in zip(*parts, strict=True)))
        check_finite(found.reconstruction, indices, seed)
        return found

    def _detect(self, images: Tensor, noise: ImageNoise, on_step: StepFn | None) -> Found:
        count = self.detector.num_reconstructions
        start = self.time_of(self.detector.lambda_steps)
        x0 = self.codec.encode(images)
        t = torch.full((len(x0),), start, dtype=torch.float64, device=x0.device)
        denoise = self.bind({})
        noised, total = images, torch.zeros_like(images)
        for number in range(count):
            x_t = self.process.perturb(x0, noise.draw(), t)
            if number == 0:
                noised = self.codec.decode(x_t)
            step = shift_steps(on_step, number, count)
            latents = self.sampler(denoise, x_t, self.process, noise.draw, step, start)
            total += self.codec.decode(latents) / count
        found = smooth(self.detector.distance(images, total), self.detector.smoothing)
        pixels = found.flatten(1)
        return Found(noised, total, found, pixels.amax(1) if self.detector.pooling == "max" else pixels.mean(1))

    def detections(self) -> int:
        """Network evaluations per image."""
        start = self.time_of(self.detector.lambda_steps)
        return self.detector.num_reconstructions * (len(self.sampler.times(self.process, start)) - 1)

    # Test

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "test":
            images = defect_images(self.trainer)
            if GOOD not in images.defects or set(images.defects) == {GOOD}:
                missing = "defective" if GOOD in images.defects else "good"
                raise ValueError(f"{images.name} has no {missing} images; scores need good and defective ones")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing: the loss of defective images means little."""

    def on_test_epoch_end(self) -> None:
        if self.table is not None:
            fill(self.table, lambda cell: self.evaluate(reuse=True), self.trainer, self)
            return
        for name, value in self.evaluate()["scores"].items():
            log_gathered(self, name, value)

    def evaluate(self, reuse: bool = False) -> Record:
        """Scores the maps of the test images and puts the result on record; collective.

        Args:
            reuse: Whether a record of the same evaluation is taken instead of a new one.

        Returns:
            The record, the same on every process: "scores", "intervals", "threshold" and all they depend on.
        """
        data, images = self.trainer.datamodule, defect_images(self.trainer)  # type: ignore[attr-defined]
        requests = Requests(len(images), self.scoring.batch_size, seed=self.scoring.seed)
        key = {
            **self.described(self.sampler),
            "detector": {name: value for name, value in describe(self.detector).items() if name != "heat"},
            "images": [images.name, images.fingerprint()],
            "seed": requests.seed,
            "batch_size": requests.batch_size,
            "precision": str(self.trainer.precision),
        }
        names = ("share", "resamples", "frame_smoothing")
        compared = {name: value for name, value in describe(self.scoring).items() if name in names}

        def work(batch: int, on_step: StepFn) -> dict[str, Tensor]:
            index, stored = stored_images(data, below(requests, batch))
            found = self.detect(from_uint8(stored), index, requests.seed, on_step)
            pictures = {"noised": to_uint8(found.noised), "reconstruction": to_uint8(found.reconstruction)}
            return {"index": torch.tensor(index), "map": found.anomaly_map, "score": found.pred_score, **pictures}

        def finish(columns: Mapping[str, Tensor]) -> Record:
            return self._conclude(columns, images)

        with self.averaged_weights():
            record = known(self.trainer, self, key, compared, ("without_masks", "empty_masks")) if reuse else None
            if record is None:
                record = measure(self.trainer, self, "anomalies", key, compared, requests, work, finish)
        rank_zero_info(summary(record))
        return record

    def _conclude(self, columns: Mapping[str, Tensor], images: DefectImages) -> Record:
        index = columns["index"].tolist()
        defects = [images.defects[i] for i in index]
        masks = torch.cat([images.mask(i) for i in index])
        truth = Truth(defects, masks.numpy(), images.masked[index].numpy())
        empty = truth.bad & truth.masked & ~truth.masks.any((1, 2))
        scores = smooth_frames(columns["score"].double().numpy(), defects, self.scoring.frame_smoothing)
        maps = columns["map"].double().numpy()
        values, intervals, threshold = score(truth, maps, scores, self.scoring.share, self.scoring.resamples)
        shown = [n for defect in dict.fromkeys(defects) for n in np.flatnonzero([d == defect for d in defects])[:GRID]]
        path = Path(self.trainer.default_root_dir) / f"anomalies_{self.detector.lambda_steps}.png"
        stored = torch.stack([images.read(index[n])["image"] for n in shown])
        pictures = [columns[name][shown] for name in ("noised", "reconstruction", "map")]
        save_grid([stored, *pictures, masks[shown]], self.detector.heat, path)
        return {
            "scores": values,
            "intervals": intervals,
            "threshold": threshold,
            "num_images": len(index),
            "without_masks": sorted({d for d, is_known in zip(defects, truth.masked, strict=True) if not is_known}),
            "empty_masks": [images.names[index[n]] for n in np.flatnonzero(empty)],
            "evaluations": self.detections(),
            "grid": path.name,
        }

    # Predict

    def prediction(
        self,
        data: L.LightningDataModule | None,
        directory: Path,
        num_images: int | None,
        batch_size: int | None,
        seed: int,
    ) -> tuple[L.LightningDataModule, L.Callback]:
        """Looks for anomalies in the test images of the data, the first `num_images` or all."""
        if not isinstance(data, ImageData):
            raise ValueError("predict: anomalies are looked for in images; give --data.source")
        if data.image_shape != self.image_shape:
            raise ValueError(f"the data's images are {data.image_shape} but the model takes {self.image_shape}")
        images = data.dataset("test")
        count = len(images) if num_images is None else min(num_images, len(images))
        requests = Requests(count, self.scoring.batch_size if batch_size is None else batch_size, seed=seed)
        return Inspection(data, requests), AnomalyWriter(directory, image_names(images)[:count], self.detector.heat)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:  # type: ignore[override]
        """Returns `index`, and anomalib's `image`, `anomaly_map` and `pred_score`, on the CPU."""
        with self.averaged_weights():
            found = self.detect(from_uint8(batch["image"]), batch["index"].tolist(), batch["seed"])
        return {
            "index": batch["index"].cpu(),
            "image": batch["image"].cpu(),
            "anomaly_map": found.anomaly_map.cpu(),
            "pred_score": found.pred_score.cpu(),
        }


def defect_images(trainer: L.Trainer) -> DefectImages:
    """The trainer's test images; raises ValueError if it is not known which of them are defective."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageData):
        raise ValueError("test: anomalies are looked for in images; give --data.source")
    images = data.dataset("test")
    if not isinstance(images, DefectImages):
        raise ValueError(
            f"{images.name}: it is not known which images are defective; give them as --data.source MVTec, or use "
            "predict, which needs no truth"
        )
    return images


def sentence(described: Mapping[str, Any]) -> str:
    """A described part as "Simplex(octaves=6, ...)"."""
    settings = ", ".join(f"{name}={value}" for name, value in described.items() if name != "class")
    return f"{described['class']}({settings})"


def summary(record: Record) -> str:
    """The scores of all defects, what there is no mask of, and whose mask is empty, on one line."""
    values = ", ".join(f"{name} {value:.4f}" for name, value in record["scores"].items() if "/" not in name)
    without = f"; image scores only: {', '.join(record['without_masks'])}" if record["without_masks"] else ""
    hidden = f"; no pixel of the defect lies in the square of {several(record['empty_masks'])}"
    return f"{record['num_images']} images: {values}{without}{hidden if record['empty_masks'] else ''}"
