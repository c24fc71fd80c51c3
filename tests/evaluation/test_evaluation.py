"""What `test` says of a model, and that it can be had again: against torch-fidelity itself, and after interruptions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image

from diffusion_lit.callbacks import EMA, Checkpoints
from diffusion_lit.data import Folder, ImageData
from diffusion_lit.diffusion import Ancestral, FixedSmall
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.evaluation.partial import PartialResults
from diffusion_lit.evaluation.tables import every_sampler, with_steps
from diffusion_lit.metrics import (
    KID,
    Agreement,
    FrechetDistance,
    Inception,
    InceptionScore,
    Pixels,
    PrecisionRecall,
    Reference,
    Score,
)
from diffusion_lit.records import RESULTS, key_of, read_records
from tests import tiny
from tests.evaluation.small import Stop, evaluation, run_test, training
from tests.metrics.inception import random_weights
from tests.tiny import last

# Against torch-fidelity


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.mark.further
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_every_score_is_what_torch_fidelity_says_of_the_same_files(inception_file: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    (tmp_path / "real").mkdir()
    for i, image in enumerate(np.rint(load_digits().images[:8] * (255 / 16)).astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / "real" / f"{i:02d}.png")
    data = ImageData(Folder(str(tmp_path / "real"), image_size=8, channels=1), flip=False, batch_size=8)
    scores: list[Score] = [FrechetDistance(), InceptionScore(splits=3), KID(2, 6), PrecisionRecall(2)]
    callback = Evaluation(scores, Inception(str(inception_file)), num_images=7, batch_size=5, num_real=8, seed=4)
    model = tiny.module()
    made = tiny.trainer(tmp_path, callbacks=[callback], logger=False)
    made.test(model, data)
    [record] = read_records(tmp_path / RESULTS)

    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    made.predict(model, num_images=7, batch_size=5, seed=4, out=str(tmp_path / "out"), npz=False)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "out"),
        input2=str(tmp_path / "real"),
        cuda=False,
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        isc_splits=3,
        kid_subsets=2,
        kid_subset_size=6,
        prc_neighborhood=2,
        cache=False,
        verbose=False,
    )
    names = {
        "fid": "frechet_inception_distance",
        "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std",
        "kid": "kernel_inception_distance_mean",
        "kid_std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    ours = record["scores"]
    for name, theirs_name in names.items():
        assert ours[name] == pytest.approx(theirs[theirs_name], rel=1e-6), name
    assert set(ours) == set(names)


# What a record says


def test_a_record_says_all_that_a_figure_depends_on(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, 3, [EMA([0.9, 0.5]), Checkpoints()])
    made.fit(tiny.module(), tiny.data())
    sampler = Ancestral(steps=7, variance=FixedSmall(), clip=False)
    record = run_test(tmp_path, evaluation(sampler=sampler, seed=5), ckpt_path=str(last(tmp_path)))
    assert record["step"] == 3
    assert record["weights_name"] == "0.9"
    assert record["checkpoint"] == str(last(tmp_path))
    assert record["sampler"]["class"] == "Ancestral"
    assert record["sampler"]["variance"] == {"class": "FixedSmall"}
    assert record["sampler"]["grid"] == {"class": "Uniform"}
    assert (record["sampler"]["steps"], record["sampler"]["clip"], record["seed"]) == (7, False, 5)
    assert (record["num_images"], record["evaluations"], record["num_real"]) == (22, 7, 22)
    [reference] = record["references"]
    assert (reference["name"], reference["count"]) == ("Digits train", 1797)
    assert reference["extractor"] == record["extractors"][0] == Pixels(2).fingerprint()
    assert record["process"]["schedule"]["class"] == "Linear"
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["device"].startswith("cpu (")
    raw = tiny.trainer(tmp_path, callbacks=[evaluation(), Checkpoints()], logger=False, limit_test_batches=1)
    raw.test(tiny.module(), tiny.data(), ckpt_path=str(last(tmp_path)), weights="raw")
    of_raw = read_records(tmp_path / RESULTS)[-1]
    assert of_raw["weights_name"] == "raw"
    assert of_raw["weights"] != record["weights"]


def test_the_same_evaluation_twice_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    first, again = (run_test(tmp_path, evaluation())["scores"] for _ in range(2))
    assert first == again
    assert run_test(tmp_path, evaluation(seed=1))["scores"] != first
    # The second is not recorded twice.
    assert len(read_records(tmp_path / RESULTS)) == 2


def test_the_scores_of_training_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    callback = evaluation(every_n_steps=2, training_num_images=22)
    tiny.trainer(tmp_path, 2, [EMA([0.9]), callback, Checkpoints()]).fit(tiny.module(), tiny.data())
    [during] = read_records(tmp_path / RESULTS)
    after = run_test(tmp_path, evaluation(), ckpt_path=str(last(tmp_path)))
    assert (during["weights_name"], during["step"]) == (after["weights_name"], after["step"]) == ("0.9", 2)
    assert during["scores"] == after["scores"]


@pytest.mark.parametrize("name", every_sampler())
def test_a_record_counts_the_calls_of_the_network(tmp_path: Path, name: str) -> None:
    model, calls = tiny.module(), []
    model.denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    record = run_test(tmp_path, evaluation(sampler=with_steps(every_sampler()[name], 6), num_images=8), model)
    # Two batches; the loss of the test images takes one call more.
    assert len(calls) == 2 * record["evaluations"] + 1


# Interruptions


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Stop.batches = 100
    whole = run_test(tmp_path / "whole", evaluation(sampler=Stop(3)))["scores"]
    Stop.batches = 4
    with pytest.raises(RuntimeError, match="on purpose"):
        run_test(tmp_path / "parts", evaluation(sampler=Stop(3)))
    # A file that was cut short counts as not done.
    [folder] = (tmp_path / "parts" / "evaluation").iterdir()
    (folder / "000001.npz").write_bytes((folder / "000001.npz").read_bytes()[:100])
    Stop.batches = 3
    record = run_test(tmp_path / "parts", evaluation(sampler=Stop(3)))
    assert Stop.batches == 0, "six batches, four of them done, one of these damaged"
    assert "continuing after 16 of 22 images" in caplog.text
    assert record["scores"] == whole
    assert not list((tmp_path / "parts" / "evaluation").iterdir())


def test_partial_results_of_other_settings_are_named_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Stop.batches = 2
    with pytest.raises(RuntimeError, match="on purpose"):
        run_test(tmp_path, evaluation(sampler=Stop(3)))
    Stop.batches = 6
    run_test(tmp_path, evaluation(sampler=Stop(3, eta=0.5), seed=2))
    assert Stop.batches == 0
    said = caplog.text
    assert "unfinished, but of another sampler.eta, seed; starting anew" in said


def test_partial_results_are_of_batches_whatever_the_number_of_images(tmp_path: Path) -> None:
    Stop.batches = 3
    with pytest.raises(RuntimeError, match="on purpose"):
        run_test(tmp_path, evaluation(sampler=Stop(3)))
    Stop.batches = 1
    record = run_test(tmp_path, evaluation(sampler=Stop(3), num_images=15))
    Stop.batches = 4
    assert record["scores"] == run_test(tmp_path / "fresh", evaluation(sampler=Stop(3), num_images=15))["scores"]


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scores": [InceptionScore()]}, "InceptionScore needs an extractor that is a classifier, which pixels is not"),
        ({"scores": [KID()]}, "22 images are fewer than KID's subset_size=1000"),
        ({"scores": [PrecisionRecall(30)]}, "22 images do not have 30 neighbours"),
        ({"num_images": 1, "scores": [FrechetDistance()]}, "num_images=1: a Fréchet distance needs at least 2"),
        (
            {"scores": [FrechetDistance(), FrechetDistance(Pixels(3))]},
            "two extractors are called pixels, pixels; their scores could not be told apart",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation(**settings)


def test_too_few_real_images_are_refused_before_anything_is_generated(tmp_path: Path) -> None:
    callback = evaluation(scores=[KID(subset_size=1800)], num_images=1800, num_real=1800)
    Stop.batches = 0
    with pytest.raises(ValueError, match="1797 images are fewer than KID's subset_size=1800"):
        run_test(tmp_path, callback, tiny.module(sampler=Stop(3)))


def test_a_given_reference_must_be_of_the_same_features(tmp_path: Path) -> None:
    Reference(torch.zeros(12), torch.eye(12), 5, "other").save(tmp_path / "other.npz")
    callback = training(extractor=Pixels(4), reference=str(tmp_path / "other.npz"))
    with pytest.raises(ValueError, match="12 features, but pixels has 48"):
        tiny.trainer(tmp_path, 1, [EMA(), callback]).fit(tiny.module(), tiny.data())
    with pytest.raises(FileNotFoundError, match=r"evaluation.reference=.*none.npz: there is no such file"):
        run_test(tmp_path, evaluation(reference=str(tmp_path / "none.npz")))


def test_agreement_without_classes_is_refused_before_anything_is_generated(tmp_path: Path) -> None:
    Stop.batches = 0
    with pytest.raises(
        ValueError, match="Agreement: the model has no classes to ask for; leave it out of --evaluation"
    ):
        run_test(tmp_path, evaluation(scores=[Agreement()]), tiny.module(sampler=Stop(3)))


def test_a_damaged_line_of_results_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    path.write_text('{"scores": {"fid": 1}}\n{"scores": {"fi\n[1]\n{"scores": {"fid": 2}}\n')
    assert [record["scores"]["fid"] for record in read_records(path)] == [1, 2]
    assert read_records(tmp_path / "absent") == []


def test_partial_results_that_are_missing_are_not_taken_for_done(tmp_path: Path) -> None:
    partial = PartialResults(tmp_path / "p", {"a": 1})
    partial.open()
    partial.save(0, {"x": torch.ones(2)})
    assert partial.done(0)
    assert not partial.done(1)
    with pytest.raises(RuntimeError, match=r"000001.npz is missing: all processes must see one file system"):
        partial.columns(2)
    assert json.loads((tmp_path / "p" / "key.json").read_text()) == {"a": 1}


def test_a_key_does_not_depend_on_the_order_in_which_it_is_written() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 1.5})
