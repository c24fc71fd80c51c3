"""Out of memory while sampling: fewer images at once, and the same ones."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion_lit.callbacks import Checkpoints
from diffusion_lit.diffusion import DDIM
from diffusion_lit.evaluation import Evaluation, Likelihood
from diffusion_lit.metrics import Pixels
from diffusion_lit.records import read_records
from diffusion_lit.types import Condition
from tests import tiny


class Small(nn.Module):
    """A network on a device that holds so many images at most."""

    def __init__(self, limit: int, labels: bool = False) -> None:
        super().__init__()
        self.inner = tiny.network()
        self.limit = limit
        self.image_size, self.in_channels = 8, 1
        self.sizes: list[int] = []
        if labels:
            self.num_classes, self.has_null_label = 10, False

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        image: Tensor = self.inner(x, time, {})
        return image if "label" not in condition else image + condition["label"].view(-1, 1, 1, 1) / 10


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 8])
def test_the_batch_is_halved_until_it_fits_and_images_stay_the_same(limit: int, labels: bool) -> None:
    network = Small(limit, labels)
    model = tiny.module(network=network, sampler=DDIM(steps=3, eta=0.5))
    network.limit = 100
    expected = model.sample(range(11), seed=4)
    network.limit = limit
    with pytest.warns(UserWarning, match=r"out of memory while sampling: continuing with \d+ images at once"):
        images = model.sample(range(11), seed=4)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    network.sizes.clear()
    again = model.sample(range(11), seed=4)
    assert max(network.sizes) <= limit
    assert torch.equal(again, images)


def test_memory_that_does_not_hold_one_image_is_an_error() -> None:
    with (
        pytest.warns(UserWarning, match="continuing with 1 images"),
        pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"),
    ):
        tiny.module(network=Small(0)).sample(range(2))


def test_progress_is_told_as_of_the_whole() -> None:
    seen: list[tuple[int, int]] = []
    model = tiny.module(network=Small(2))
    with pytest.warns(UserWarning, match="out of memory"):
        model.sample(range(4), on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_predictions_survive_it(tmp_path: Path) -> None:
    def images(limit: int, place: Path) -> Any:
        trainer = tiny.trainer(place, callbacks=[], logger=False)
        trainer.predict(tiny.module(network=Small(limit)), num_images=9, batch_size=8, seed=1, out=str(place))
        return np.stack([np.asarray(Image.open(place / f"{i:06}.png")) for i in range(9)]).astype(int)

    expected = images(8, tmp_path / "large")
    with pytest.warns(UserWarning, match="continuing with [42] images at once"):
        small = images(2, tmp_path / "small")
    assert abs(small - expected).max() <= 1


class Hungry(Pixels):
    """Features of two images at once, no more."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        if len(images) > 2:
            raise torch.OutOfMemoryError
        return super().outputs(images)


def test_scores_survive_it_too(tmp_path: Path) -> None:
    def score(extractor: Pixels, place: Path) -> dict[str, float]:
        evaluation = Evaluation(extractor=extractor, num_images=5, batch_size=5, cache_dir=str(place))
        trainer = tiny.trainer(place, 1, callbacks=[evaluation, Checkpoints()], logger=False)
        trainer.fit(tiny.module(), tiny.data())
        trainer.test(tiny.module(), tiny.data(), ckpt_path=str(tiny.last(place)))
        return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("frechet")}

    expected = score(Pixels(2), tmp_path / "large")
    assert expected
    with pytest.warns(UserWarning, match="out of memory in pixels"):
        assert score(Hungry(2), tmp_path / "small") == pytest.approx(expected, rel=1e-9)


@pytest.mark.further
def test_the_likelihood_survives_it_too(tmp_path: Path) -> None:
    def bound(limit: int, place: Path) -> dict[str, float]:
        network = Small(100, labels=True)
        model = tiny.module(network=network)
        likelihood = Likelihood("test", num_images=7, batch_size=5)
        trainer = tiny.trainer(place, 1, callbacks=[likelihood], logger=False, limit_test_batches=1)
        network.limit = limit
        trainer.test(model, tiny.data(eval_batch_size=2))
        assert limit > 5 or max(network.sizes[-100:]) <= limit
        [record] = read_records(place / "results.jsonl")
        with (place / "bits_per_dim_test.csv").open(newline="") as file:
            steps = [row["k"] for row in csv.DictReader(file)]
        assert record["num_images"] == 7
        assert steps == [str(k) for k in range(1, 101)]
        return {name: float(value) for name, value in record["scores"].items()}

    expected = bound(100, tmp_path / "large")
    with pytest.warns(
        UserWarning, match="out of memory in the likelihood: continuing with [32] images at once"
    ) as said:
        assert bound(2, tmp_path / "small") == pytest.approx(expected, rel=1e-5)
    # What sufficed once is not tried again with more.
    assert len([warning for warning in said if "out of memory" in str(warning.message)]) == 2
