"""What `test` says of a model, and that it can be had again: against torch-fidelity itself, and after interruptions."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor

from diffusion_lit.callbacks import EMA, Checkpoints
from diffusion_lit.data import Folder
from diffusion_lit.diffusion import DDIM, Ancestral, DiscreteProcess, FixedSmall, ImageNoise
from diffusion_lit.diffusion.likelihood import bits_per_dim
from diffusion_lit.evaluation import Evaluation, Likelihood
from diffusion_lit.evaluation.partial import PartialResults
from diffusion_lit.images import from_uint8
from diffusion_lit.metrics import KID, FrechetDistance, Inception, InceptionScore, Pixels, PrecisionRecall, Score
from diffusion_lit.records import RESULTS, key_of, read_records
from tests import tiny
from tests.metrics.inception import random_weights
from tests.tiny import last

SMALL: list[Score] = [FrechetDistance(), PrecisionRecall(), KID(subsets=3, subset_size=8)]


def evaluation(**kwargs: Any) -> Evaluation:
    settings: dict[str, Any] = {"scores": SMALL, "extractor": Pixels(2), "num_images": 22, "batch_size": 4}
    return Evaluation(**{**settings, **kwargs})


def run_test(
    place: Path, callback: L.Callback, model: L.LightningModule | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Runs `test` and returns the newest record that it wrote."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    callbacks = [callback, *([] if ckpt_path is None else [Checkpoints()])]
    made = tiny.trainer(place, callbacks=callbacks, logger=False, limit_test_batches=1, **kwargs)
    made.test(model or tiny.module(), tiny.data(), ckpt_path=ckpt_path)
    return read_records(place / RESULTS)[-1]


# Against torch-fidelity


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_weights(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_every_score_is_what_torch_fidelity_says_of_the_same_files(inception_file: Path, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    (tmp_path / "real").mkdir()
    for i, image in enumerate(np.rint(load_digits().images[:24] * (255 / 16)).astype(np.uint8)):
        Image.fromarray(image).save(tmp_path / "real" / f"{i:02d}.png")
    data = Folder(str(tmp_path / "real"), image_size=8, channels=1, flip=False, batch_size=8)
    scores: list[Score] = [FrechetDistance(), InceptionScore(splits=3), KID(2, 9), PrecisionRecall(2)]
    callback = Evaluation(scores, Inception(str(inception_file)), num_images=14, batch_size=5, num_real=24, seed=4)
    model = tiny.module()
    made = tiny.trainer(tmp_path, callbacks=[callback], logger=False)
    made.test(model, data)
    [record] = read_records(tmp_path / RESULTS)

    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    made.predict(model, num_images=14, batch_size=5, seed=4, out=str(tmp_path / "out"), npz=False)
    (tmp_path / "out" / "grid.png").unlink()
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
        kid_subset_size=9,
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
    assert len(read_records(tmp_path / RESULTS)) == 3


def test_the_scores_of_training_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    callback = evaluation(every_n_steps=2)
    tiny.trainer(tmp_path, 2, [EMA([0.9]), callback, Checkpoints()], limit_train_batches=2).fit(
        tiny.module(), tiny.data()
    )
    [during] = read_records(tmp_path / RESULTS)
    after = run_test(tmp_path, evaluation(), ckpt_path=str(last(tmp_path)))
    assert (during["weights_name"], during["step"]) == (after["weights_name"], after["step"]) == ("0.9", 2)
    assert during["scores"] == after["scores"]


def test_an_evaluation_counts_the_calls_of_the_network_not_the_steps(tmp_path: Path) -> None:
    class Twice(DDIM):
        def step(self, denoise: Any, x_t: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
            denoise(x_t, args[1])
            return super().step(denoise, x_t, *args)

    assert run_test(tmp_path, evaluation(sampler=Twice(3)))["evaluations"] == 6


# Interruptions


class Stop(DDIM):
    """Breaks off in the batch that holds a certain image."""

    batches = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if type(self).batches == 0:
            raise RuntimeError("on purpose")
        type(self).batches -= 1
        return super().__call__(*args, **kwargs)


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
    assert "going on after 16 of 22 images" in caplog.text
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
        ({"scores": [FrechetDistance(Pixels(3))], "extractor": Pixels(2)}, None),
        (
            {"scores": [FrechetDistance(), FrechetDistance(Pixels(3))]},
            "two extractors are called pixels, pixels; a score could not be told apart",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert evaluation(**settings).used[0].num_features == 27
        return
    with pytest.raises(ValueError, match=message):
        evaluation(**settings)


def test_too_few_real_images_are_refused_before_anything_is_generated(tmp_path: Path) -> None:
    callback = evaluation(scores=[KID(subset_size=1800)], num_images=1800, num_real=1800)
    Stop.batches = 0
    with pytest.raises(ValueError, match="1797 images are fewer than KID's subset_size=1800"):
        run_test(tmp_path, callback, tiny.module(sampler=Stop(3)))


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
    with pytest.raises(RuntimeError, match="2 rows of x instead of 3"):
        partial.columns(1, 3)
    assert json.loads((tmp_path / "p" / "key.json").read_text()) == {"a": 1}


def test_a_key_does_not_depend_on_the_order_in_which_it_is_written() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 1.5})


# Likelihood


def bound_by_hand(model: Any, count: int, **kwargs: Any) -> Any:
    data = tiny.data()
    x0 = from_uint8(data.some(list(range(count)))["image"])
    noise = ImageNoise(0, range(count), model.image_shape)
    with model.evaluating():
        return bits_per_dim(model.bind({}), x0, model.process, FixedSmall(), noise.draw, **kwargs)


def test_bits_per_dim_are_the_bounds_mean_with_parts_that_add_up(tmp_path: Path) -> None:
    model = tiny.module(process=DiscreteProcess(12))
    callback = Likelihood("train", num_images=10, batch_size=4, variance=FixedSmall())
    record = run_test(tmp_path, callback, model)
    bound = bound_by_hand(model, 10)
    scores = record["scores"]
    assert scores["train/bits_per_dim"] == pytest.approx(float(bound.total.mean()), rel=1e-5)
    parts = [scores[f"train/bits_per_dim_{part}"] for part in ("prior", "terms", "decoder")]
    assert sum(parts) == pytest.approx(scores["train/bits_per_dim"], rel=1e-12)
    assert record["num_images"] == 10
    assert record["evaluations"] == 12
    rows = np.loadtxt(tmp_path / record["curve"], delimiter=",", skiprows=1)
    assert rows[:, 0].tolist() == list(range(1, 13))
    assert rows[:, 1] == pytest.approx(np.arange(1, 13) / 12)
    assert rows[0, 2] == pytest.approx(parts[2])
    assert rows[1:, 2].sum() == pytest.approx(parts[1])
    assert (tmp_path / "bits_per_dim_train.png").is_file()


def test_a_strided_estimate_evaluates_fewer_terms_and_is_near(tmp_path: Path) -> None:
    model = tiny.module(process=DiscreteProcess(40))
    records = [
        run_test(tmp_path, Likelihood("train", num_images=200, num_terms=terms, variance=FixedSmall()), model)
        for terms in (None, 13)
    ]
    whole, estimate = (record["scores"]["train/bits_per_dim"] for record in records)
    error = records[1]["scores"]["train/bits_per_dim_standard_error"]
    assert [record["evaluations"] for record in records] == [40, 14]
    assert 0 < abs(whole - estimate) < 4 * error


def test_an_interrupted_likelihood_goes_on_where_it_stopped(tmp_path: Path) -> None:
    class Breaks(FixedSmall):
        calls = 10**9

        def of_step(self, *args: Any) -> Tensor:
            type(self).calls -= 1
            if type(self).calls < 0:
                raise RuntimeError("on purpose")
            return super().of_step(*args)

    def likelihood() -> Likelihood:
        return Likelihood("train", num_images=10, batch_size=4, variance=Breaks())

    model = tiny.module(process=DiscreteProcess(5))
    whole = run_test(tmp_path / "whole", likelihood(), model)["scores"]
    Breaks.calls = 12
    with pytest.raises(RuntimeError, match="on purpose"):
        run_test(tmp_path / "parts", likelihood(), model)
    Breaks.calls = 5
    assert run_test(tmp_path / "parts", likelihood(), model)["scores"] == whole
    assert Breaks.calls == 0, "of three batches of five evaluations, two were done"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 0}, "likelihood.num_images=0 must be at least 1"),
        ({"num_terms": 0}, "likelihood.num_terms=0 must be at least 1"),
    ],
)
def test_a_likelihood_of_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Likelihood("train", **settings)


def test_more_terms_than_the_process_has_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_terms=100 exceeds the 99 terms of the process"):
        run_test(tmp_path, Likelihood("train", num_terms=100))
