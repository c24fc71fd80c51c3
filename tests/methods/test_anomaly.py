"""Anomalies are found: closed forms, invariances, what lies on the disk afterwards, and what is refused."""

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion_lit.callbacks import Checkpoints
from diffusion_lit.conditioner import Labels
from diffusion_lit.data import Digits, ImageData, MVTec
from diffusion_lit.data.defects import DefectDigits
from diffusion_lit.diffusion import (
    DDIM,
    Ancestral,
    DenoisingLoss,
    DiscreteProcess,
    Gaussian,
    Simplex,
    UniformTimes,
    VariancePreserving,
)
from diffusion_lit.images import from_uint8
from diffusion_lit.methods.anomaly.maps import Detector, FeatureDistance, SquaredError, smooth
from diffusion_lit.methods.anomaly.module import AnoDDPM
from diffusion_lit.methods.anomaly.scores import Scoring
from diffusion_lit.methods.feature_network import FeatureNetworkModule
from diffusion_lit.networks import ConvClassifier
from diffusion_lit.records import RESULTS, NonFinite, read_records
from diffusion_lit.types import Condition, Network
from tests import tiny
from tests.forked import fork, in_two, wait
from tests.tiny import last


class Constant(Network):
    """Takes every image for black: eps = (x_t + alpha) / sigma, as if x_0 were -1 everywhere."""

    image_size, in_channels = 8, 1

    def __init__(self, process: DiscreteProcess) -> None:
        super().__init__()
        self.process = process
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        alpha, sigma = self.process.alpha_sigma((time.double() + 1) / self.process.num_steps)
        eps: Tensor = (x + alpha.float().view(-1, 1, 1, 1)) / sigma.float().view(-1, 1, 1, 1)
        return self.weight * eps


class Stop(DDIM):
    """Fails once it has drawn so many batches."""

    batches = 10**9

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        type(self).batches -= 1
        if type(self).batches < 0:
            raise RuntimeError("on purpose")
        return super().__call__(*args, **kwargs)


def detector(lambda_steps: int = 30, **kwargs: Any) -> Detector:
    return Detector(lambda_steps, **kwargs)


def model(**kwargs: Any) -> AnoDDPM:
    parts: dict[str, Any] = {
        "network": tiny.network(),
        "detector": detector(),
        "scoring": Scoring(batch_size=16, resamples=20),
        "process": DiscreteProcess(num_steps=100),
        "objective": DenoisingLoss(times=UniformTimes(last=0.8)),
        "sampler": Ancestral(steps=10),
        "noise": Simplex(octaves=2, wavelength=8),
        "optimizer": tiny.optimizer,
        "conditioner": Labels(),
    }
    return AnoDDPM(**{**parts, **kwargs})


def data(classes: tuple[int, ...] = (3,)) -> ImageData:
    return ImageData(DefectDigits(classes), batch_size=32)


def images(count: int = 7) -> Tensor:
    return from_uint8(data().some(range(count), "test")["image"])


def run_test(place: Path, system: AnoDDPM, source: ImageData | None = None, **kwargs: Any) -> dict[str, Any]:
    """Runs `test` and returns the newest record that it wrote."""
    made = tiny.trainer(place, callbacks=[Checkpoints()], logger=False)
    made.test(system, source or data(), **kwargs)
    return read_records(place / RESULTS)[-1]


def table(path: Path) -> list[list[str]]:
    """The rows of a CSV file."""
    return list(csv.reader(path.read_text().splitlines()))


# Maps


def test_the_map_of_a_model_that_knows_black_images_only_is_the_squared_difference_from_black() -> None:
    process = DiscreteProcess(100)
    system = model(network=Constant(process), process=process, sampler=DDIM(steps=10, clip=False))
    found = system.detect(images(), range(7))
    torch.testing.assert_close(found.reconstruction, torch.full((7, 1, 8, 8), -1.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.anomaly_map, (images() + 1)[:, 0].square(), atol=1e-3, rtol=1e-3)
    assert torch.equal(found.pred_score, found.anomaly_map.flatten(1).amax(1))


def test_an_image_is_noised_by_the_source_up_to_lambda() -> None:
    system = model()
    found = system.detect(images(), range(7), seed=4)
    alpha, sigma = system.process.alpha_sigma(torch.tensor(0.3, dtype=torch.float64))
    noise = system.noise_source.images(4, range(7), (1, 8, 8)).draw()
    torch.testing.assert_close(found.noised, alpha.float() * images() + sigma.float() * noise)
    assert system.detections() == 4, "steps 30, 21, 11 and 1"


def test_several_reconstructions_are_averaged_before_they_are_compared() -> None:
    one, three = (model(detector=detector(num_reconstructions=n)) for n in (1, 3))
    first = one.detect(images(), range(7))
    mean = three.detect(images(), range(7))
    assert torch.equal(first.noised, mean.noised)
    noise = three.noise(range(7), 0)
    t = torch.full((7,), 0.3, dtype=torch.float64)
    singles = []
    with three.evaluating():
        for _ in range(3):
            x_t = three.process.perturb(images(), noise.draw(), t)
            singles.append(three.sampler(three.bind({}), x_t, three.process, noise.draw, start=0.3))
    torch.testing.assert_close(mean.reconstruction, torch.stack(singles).mean(0))
    torch.testing.assert_close(mean.anomaly_map, (images() - torch.stack(singles).mean(0))[:, 0].square())
    assert three.detections() == 12


@pytest.mark.parametrize("noise", [Simplex(octaves=2, wavelength=8), Gaussian()])
def test_the_map_of_an_image_does_not_depend_on_the_images_beside_it(noise: Any) -> None:
    system = model(noise=noise)
    together = system.detect(images(), range(7)).anomaly_map
    order = [5, 2, 6]
    some = system.detect(images()[order], order).anomaly_map
    torch.testing.assert_close(some, together[order], atol=1e-5, rtol=1e-4)
    others = system.detect(images(), range(1, 8)).anomaly_map
    assert (others - together).abs().amax((1, 2)).min() > 1e-3, "another index has other noise"


def test_the_score_of_an_image_is_the_mean_of_its_map_where_that_is_asked_for() -> None:
    found = model(detector=detector(pooling="mean")).detect(images(), range(7))
    torch.testing.assert_close(found.pred_score, found.anomaly_map.mean((1, 2)))


def test_the_squared_error_is_a_mean_over_channels() -> None:
    a, b = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    b[0, 0, 0, 1] = 2
    torch.testing.assert_close(SquaredError()(a, b), torch.tensor([[[0, 4 / 3], [0, 0]]]))


def test_smoothing_is_scipy_s_inside_and_keeps_constants_at_the_edges() -> None:
    from scipy.ndimage import gaussian_filter

    random = torch.rand(2, 40, 31, generator=torch.Generator().manual_seed(0))
    expected = gaussian_filter(random.double().numpy(), (0, 2, 2), truncate=8)
    torch.testing.assert_close(
        smooth(random, 2.0)[:, 16:24, 15:16].double(), torch.from_numpy(expected)[:, 16:24, 15:16], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(smooth(torch.full((1, 5, 7), 3.0), 2.0), torch.full((1, 5, 7), 3.0))
    assert torch.equal(smooth(random, 0.0), random)


# Test


def test_a_record_has_scores_by_defect_with_intervals_and_there_is_a_picture(tmp_path: Path) -> None:
    record = run_test(tmp_path, model())
    assert record["num_images"] == 46
    assert record["empty_masks"] == []
    assert record["without_masks"] == ["wrong_class"]
    for name in ("image_AUROC", "pixel_AUPRO", "pixel_Dice", "spot/pixel_AUROC", "wrong_class/image_AUROC"):
        low, high = record["intervals"][name]
        assert low <= high, name
    assert "wrong_class/pixel_AUROC" not in record["scores"]
    assert record["detector"]["lambda_steps"] == 30
    assert record["noise"] == {"class": "Simplex", "octaves": 2, "persistence": 0.8, "wavelength": 8}
    with Image.open(tmp_path / record["grid"]) as picture:
        # Five columns of tiles of 64 pixels and three images of each of five classes.
        assert picture.size == (5 * 68 - 4, 15 * 68 - 4)


def test_defects_that_the_square_cuts_away_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("train/good", "test/good", "test/hole"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (32, 8), 99 * i).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "ground_truth/hole").mkdir(parents=True)
    for i, place in enumerate([16, 2]):
        pixels = np.zeros((8, 32), dtype=np.uint8)
        pixels[2:5, place : place + 3] = 1
        Image.fromarray(pixels).save(tmp_path / f"ground_truth/hole/{i}_mask.png")
    with caplog.at_level("INFO"):
        record = run_test(tmp_path, model(), ImageData(MVTec(str(tmp_path), 8, 1)))
    assert record["empty_masks"] == ["hole/1.png"]
    assert "no pixel of the defect lies in the square of hole/1.png" in caplog.text
    assert "pixel_AUPRO" in record["scores"]


def test_a_killed_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run_test(tmp_path / "whole", model(sampler=Stop(5)))
    Stop.batches = 1
    with pytest.raises(RuntimeError, match="on purpose"):
        run_test(tmp_path / "parts", model(sampler=Stop(5)))
    Stop.batches = 2
    again = run_test(tmp_path / "parts", model(sampler=Stop(5)))
    assert Stop.batches == 0, "of three batches one was done"
    Stop.batches = 10**9
    assert again["scores"] == whole["scores"]
    assert again["intervals"] == whole["intervals"]


def test_a_table_has_a_row_for_each_lambda_and_does_not_compute_one_twice(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, max_steps=1)
    made.fit(model(), data())
    for _ in range(2):
        run_test(tmp_path, model(table=[10, 30]), ckpt_path=str(last(tmp_path)))
    records = read_records(tmp_path / RESULTS)
    assert [record["detector"]["lambda_steps"] for record in records] == [10, 30]
    names, *rows = table(tmp_path / "table_lambda.csv")
    assert [row[0] for row in rows] == ["10", "30"]
    column = names.index("pixel_AUPRO")
    assert [float(row[column]) for row in rows] == [record["scores"]["pixel_AUPRO"] for record in records]
    assert (tmp_path / "table_lambda.md").read_text().count("\n| ") == 3
    assert "spot/" not in (tmp_path / "table_lambda.md").read_text()
    assert (tmp_path / "table_lambda.png").is_file()


def test_settings_are_chosen_by_other_images_than_the_test_s(tmp_path: Path) -> None:
    first = run_test(tmp_path, model(), ImageData(DefectDigits((3,), judged="validation")))
    second = run_test(tmp_path, model(), data())
    assert [record["images"][0] for record in (first, second)] == [
        "digits with defects (validation)",
        "digits with defects (test)",
    ]
    assert first["scores"] != second["scores"]


@pytest.mark.further
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    def run(place: Path, **kwargs: Any) -> None:
        system = model()
        made = tiny.trainer(place, callbacks=[], logger=False, **kwargs)
        made.test(system, data())
        made = tiny.trainer(place, callbacks=[], logger=False, **kwargs)
        made.predict(system, data(), out=str(place / "out"), num_images=37, batch_size=16)

    def two() -> None:
        in_two(partial(run, tmp_path / "two", devices=2, strategy="ddp"))

    run(tmp_path / "one")
    assert wait(fork(two, tmp_path / "output")) == 0, (tmp_path / "output").read_text()
    one, two_ = (read_records(tmp_path / name / RESULTS) for name in ("one", "two"))
    assert one[0]["scores"] == two_[0]["scores"]
    assert (one[0]["processes"], two_[0]["processes"]) == (1, 2)
    files = [
        sorted(p.relative_to(tmp_path / n / "out") for p in (tmp_path / n / "out").rglob("*.*")) for n in ("one", "two")
    ]
    assert files[0] == files[1]
    assert len(files[0]) == 2 * 37 + 1
    for file in files[0]:
        assert (tmp_path / "one" / "out" / file).read_bytes() == (tmp_path / "two" / "out" / file).read_bytes(), file


def test_nothing_is_found_in_no_images_as_a_process_without_a_share_has_them() -> None:
    system = model()
    found = system.detect(images(0), [])
    assert [len(values) for values in found] == [0] * 4
    assert found.anomaly_map.shape == (0, *system.image_shape[1:])
    made = system.predict_step({"image": torch.zeros(0, 1, 8, 8).byte(), "index": torch.zeros(0).long(), "seed": 0}, 0)
    assert made["anomaly_map"].shape == (0, 8, 8)


def test_a_reconstruction_that_is_not_finite_is_refused() -> None:
    system = model()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(NonFinite, match="2 of 2 images have values that are not finite"):
        system.detect(images(2), range(2))


# Training


def test_training_is_up_to_the_largest_time_only_and_resumes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.trainer(whole, max_steps=4).fit(model(), data())
    tiny.trainer(parts, max_steps=2).fit(model(), data())
    tiny.trainer(parts, max_steps=4).fit(model(), data(), ckpt_path="last")
    assert tiny.identical(tiny.load(last(whole))["state_dict"], tiny.load(last(parts))["state_dict"])


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(detector=detector(101)), r"lambda_steps=101 must lie in 1 .. 100, the steps of the process"),
        (lambda: model(detector=detector(81)), r"lambda_steps=81: the model is trained up to step 80 only"),
        (lambda: model(table=[30, 400]), r"lambda_steps=400 must lie in 1 .. 100"),
        (lambda: model(table=[]), r"table=\[\] makes no table"),
        (lambda: model(process=VariancePreserving()), r"VariancePreserving is not"),
        (lambda: detector(0), "detector.lambda_steps=0 must be at least 1"),
        (lambda: detector(num_reconstructions=0), "detector.num_reconstructions=0 must be at least 1"),
        (lambda: detector(smoothing=-1), "detector.smoothing=-1"),
        (lambda: detector(pooling="median"), "detector.pooling='median'"),
        (lambda: detector(heat=0), "detector.heat=0"),
    ],
)
def test_a_detector_that_cannot_be_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_trained_with_other_noise_than_asked_for_is_refused(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, max_steps=1).fit(model(), data())
    message = r"trained with Simplex\(octaves=2, persistence=0.8, wavelength=8\), not Gaussian\(\); leave --model.noise"
    with pytest.raises(ValueError, match=message):
        run_test(tmp_path, model(noise=Gaussian()), ckpt_path=str(last(tmp_path)))
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, max_steps=2).fit(model(noise=Gaussian()), data(), ckpt_path="last")


def test_data_of_which_nobody_knows_what_is_defective_are_refused_in_test(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not known which images are defective; give them as --data.source MVTec"):
        run_test(tmp_path, model(), ImageData(Digits()))
    for folder in ("train/good", "test/hole"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(ValueError, match="has no good images; scores need good and defective ones"):
        run_test(tmp_path, model(), ImageData(MVTec(str(tmp_path), 8, 1)))


def test_a_distance_without_its_classifier_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such file; train a classifier first"):
        FeatureDistance(str(tmp_path / "none.ckpt"))


def test_features_differ_where_the_images_do(tmp_path: Path) -> None:
    classifier = FeatureNetworkModule(ConvClassifier(8, 1, 10, width=4))
    classifier.config = {
        "model": {
            "class_path": "diffusion_lit.methods.feature_network.FeatureNetworkModule",
            "init_args": {
                "network": {
                    "class_path": "diffusion_lit.networks.ConvClassifier",
                    "init_args": {"image_size": 8, "in_channels": 1, "num_classes": 10, "width": 4},
                }
            },
        }
    }
    tiny.trainer(tmp_path, max_steps=1).fit(classifier, tiny.data())
    distance = FeatureDistance(str(last(tmp_path)))
    assert distance.state_dict() == {}
    other = images(2)
    torch.testing.assert_close(distance(images(2), other), torch.zeros(2, 8, 8), atol=1e-5, rtol=0)
    other[0, 0, 0, 0] = -other[0, 0, 0, 0] + 1
    found = distance(images(2), other)
    assert found[0, 0, 0] > 1e-3
    assert found[1].max() < 1e-5
    system = model(detector=detector(distance=distance))
    assert not [name for name in system.state_dict() if "distance" in name]
    assert system.detect(images(), range(7)).anomaly_map.shape == (7, 8, 8)
    with pytest.raises(ValueError, match="takes images of 1 channels, not 3"):
        distance(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
