"""Bits per dimension of real images in `test`."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
from torch import Tensor

from diffusion_lit.diffusion import DiscreteProcess, FixedSmall, ImageNoise
from diffusion_lit.diffusion.likelihood import bits_per_dim
from diffusion_lit.evaluation import Likelihood
from diffusion_lit.images import from_uint8
from tests import tiny
from tests.evaluation.small import run_test


def test_a_likelihood_of_more_images_does_not_take_a_shorter_last_batch_for_its_own(tmp_path: Path) -> None:
    model = tiny.module(process=DiscreteProcess(4))

    class Fails(Likelihood):
        """Leaves its parts behind."""

        def evaluate(self, trainer: L.Trainer, *args: Any) -> Any:
            trainer.strategy.broadcast = fail_at_the_end(trainer.strategy.broadcast)  # type: ignore[method-assign]
            return super().evaluate(trainer, *args)

    def fail_at_the_end(broadcast: Any) -> Any:
        calls = iter(range(2))

        def called(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == 1:
                raise RuntimeError("on purpose")
            return broadcast(*args, **kwargs)

        return called

    with pytest.raises(RuntimeError, match="on purpose"):
        run_test(tmp_path, Fails("train", num_images=6, batch_size=4), model)
    record = run_test(tmp_path, Likelihood("train", num_images=10, batch_size=4), model)
    assert record["num_images"] == 10
    fresh = run_test(tmp_path / "fresh", Likelihood("train", num_images=10, batch_size=4), model)
    assert record["scores"] == fresh["scores"]


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


@pytest.mark.further
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

        def between(self, *args: Any) -> Tensor:
            type(self).calls -= 1
            if type(self).calls < 0:
                raise RuntimeError("on purpose")
            return super().between(*args)

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
