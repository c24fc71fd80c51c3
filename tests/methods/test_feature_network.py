"""A classifier of clean images is trained and then gives the features of an evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.data import Digits
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.loggers import read_curves
from diffusion_lit.methods.feature_network import FeatureNetworkModule, TrainedFeatures
from diffusion_lit.metrics import FrechetDistance, InceptionScore, Score
from diffusion_lit.networks import ConvClassifier
from diffusion_lit.records import RESULTS, read_records
from tests import tiny


def classifier() -> FeatureNetworkModule:
    arguments = {"image_size": 8, "in_channels": 1, "num_classes": 10, "width": 16}
    module = FeatureNetworkModule(
        ConvClassifier(**arguments),
        lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    )
    network = {"class_path": "diffusion_lit.networks.ConvClassifier", "init_args": arguments}
    path = "diffusion_lit.methods.feature_network.FeatureNetworkModule"
    module.config = {"model": {"class_path": path, "init_args": {"network": network}}}
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("features") / "run"
    torch.manual_seed(0)
    options: dict[str, Any] = {"limit_val_batches": 1.0, "val_check_interval": 120, "log_every_n_steps": 20}
    tiny.trainer(place, 120, [EMA([0.9]), Scalars(), Checkpoints()], **options).fit(
        classifier(), tiny.data(batch_size=64)
    )
    return place


def test_it_learns_the_digits(run: Path) -> None:
    curves = read_curves(run)
    assert curves["val/accuracy"][-1][1] > 0.9
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1] / 2


def test_its_features_lead_to_its_logits_and_do_not_depend_on_the_batch(run: Path) -> None:
    extractor = TrainedFeatures(str(run / "checkpoints" / "last.ckpt"))
    images = Digits().load("train")
    batch = images.batch(range(50))
    outputs = extractor.outputs(batch["image"])
    assert outputs["features"].shape == (50, extractor.num_features)
    assert torch.equal(outputs["features"], extractor(batch["image"]))
    accuracy = (outputs["logits"].argmax(1) == batch["label"]).float().mean()
    assert accuracy > 0.85
    alone = extractor(batch["image"][7:8])
    torch.testing.assert_close(alone[0], outputs["features"][7], rtol=1e-4, atol=1e-5)
    assert not extractor.training
    assert not extractor.network.training


def test_an_evaluation_takes_it_and_can_tell_classes(run: Path, tmp_path: Path) -> None:
    scores: list[Score] = [FrechetDistance(), InceptionScore()]
    evaluation = Evaluation(scores, TrainedFeatures(str(tiny.last(run))), num_images=20, batch_size=10)
    made = tiny.trainer(tmp_path / "out", callbacks=[evaluation], logger=False, limit_test_batches=1)
    made.test(tiny.module(), tiny.data())
    [record] = read_records(tmp_path / "out" / RESULTS)
    assert set(record["scores"]) == {
        "frechet/classifier",
        "inception_score/classifier",
        "inception_score_std/classifier",
    }
    assert record["extractors"] == [TrainedFeatures(str(run / "checkpoints" / "last.ckpt")).fingerprint()]


def test_what_is_no_such_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"extractor.checkpoint=nowhere: there is no such file"):
        TrainedFeatures("nowhere")
    with pytest.raises(ValueError, match=r"takes images of \(1, 8, 8\), not \(3, 8, 8\)"):
        TrainedFeatures(str(run / "checkpoints" / "last.ckpt")).outputs(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="image_size=3 must be at least 4"):
        ConvClassifier(image_size=3)
    with pytest.raises(ValueError, match="no labels to train a classifier on"):
        FeatureNetworkModule(ConvClassifier(8, 1)).losses({"image": torch.zeros(1, 1, 8, 8)})
