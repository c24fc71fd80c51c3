"""A classifier is trained by the command line and then gives the features of an evaluation."""

from pathlib import Path

import pytest
import torch

from diffusion_lit import cli
from diffusion_lit.data import Digits
from diffusion_lit.loggers import read_curves
from diffusion_lit.methods.feature_network import FeatureNetworkModule, TrainedFeatures
from diffusion_lit.networks import ConvClassifier
from diffusion_lit.records import RESULTS, read_records
from tests import tiny

CONFIGS = Path(__file__).parent.parent.parent / "configs"
CPU = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("features") / "run"
    files = ["-c", str(CONFIGS / "base.yaml"), "-c", str(CONFIGS / "features" / "digits.yaml")]
    more = ["--trainer.max_steps=120", "--trainer.val_check_interval=120", "--trainer.log_every_n_steps=20"]
    logger = "--trainer.logger=diffusion_lit.loggers.CSV"
    cli.main(["fit", *files, f"--trainer.default_root_dir={place}", *CPU, *more, logger])
    return place


def test_it_learns_the_digits(run: Path) -> None:
    curves = read_curves(run)
    assert curves["val/accuracy"][-1][1] > 0.9
    assert curves["train/loss"][-1][1] < curves["train/loss"][0][1] / 2


def test_its_features_lead_to_its_logits_and_do_not_depend_on_the_batch(run: Path) -> None:
    extractor = TrainedFeatures(str(run / "checkpoints" / "last.ckpt"))
    images = Digits().dataset("train")
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
    tiny.trainer(tmp_path, 2).fit(tiny.module(), tiny.data())
    cli.main(
        [
            *("test", "--model", "DiffusionModule", "--model.network", "tests.tiny.network", "--data", "Digits"),
            *("--model.process.num_steps", "100", "--model.sampler.steps", "3"),
            *("--frechet.extractor", "diffusion_lit.methods.feature_network.TrainedFeatures"),
            *("--frechet.extractor.checkpoint", str(run / "checkpoints" / "last.ckpt")),
            *("--evaluation.scores", "[FrechetDistance, InceptionScore]", "--evaluation.num_images", "20"),
            *("--evaluation.batch_size", "10", "--trainer.limit_test_batches", "1", "--trainer.logger", "false"),
            *("--trainer.default_root_dir", str(tmp_path / "out"), *CPU),
        ]
    )
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
        FeatureNetworkModule(ConvClassifier(8, 1)).classify({"image": torch.zeros(1, 1, 8, 8)})
