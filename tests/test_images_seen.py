"""What is counted in training images: half-lives of averages, and the warm-up of the learning rate."""

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch

from diffusion_lit.callbacks import EMA, ChangedOptions, Checkpoints
from diffusion_lit.optimization import ImageWarmup, optimization
from tests import tiny
from tests.tiny import last, load


@pytest.mark.few(1)
@pytest.mark.parametrize("ramp_up", [0.5, None])
def test_an_average_by_half_life_forgets_half_in_so_many_images(tmp_path: Path, ramp_up: float | None) -> None:
    recorder, model = tiny.Recorder(), tiny.module()
    ema = EMA([], half_lives=[60], ramp_up=ramp_up)
    tiny.trainer(tmp_path, 5, [ema, recorder, Checkpoints()]).fit(model, tiny.data())
    assert model.averages is not None
    expected = dict(recorder.weights[0])
    for n, weights in enumerate(recorder.weights[1:]):
        half_life = 60 if ramp_up is None else min(60, ramp_up * n * tiny.BATCH)
        d = 0.0 if half_life == 0 else 0.5 ** (tiny.BATCH / half_life)
        expected = {name: d * value + (1 - d) * weights[name] for name, value in expected.items()}
    for name, value in model.averages.average("60_images").items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert load(last(tmp_path))["weights"] == "60_images"
    ends = []
    for run, ckpt_path in ((tmp_path, "last"), (tmp_path / "whole", None)):
        model, ema = tiny.module(), EMA([], half_lives=[60], ramp_up=ramp_up)
        tiny.trainer(run, 7, [ema, Checkpoints()]).fit(model, tiny.data(), ckpt_path=ckpt_path)
        assert model.averages is not None
        ends.append(model.averages.average())
    assert tiny.identical(*ends)


def test_images_are_counted_also_where_a_run_goes_on_with_another_batch_size(tmp_path: Path) -> None:
    """Three steps of 32 images, then two of 16 and two of 64."""
    rates: list[float] = []
    recorder = tiny.Recorder()

    class Steps(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            recorder.record(pl_module)

    recorder.record(tiny.module())
    for batch_size, stop in ((32, 3), (16, 5), (64, 7)):
        model = tiny.module(lr_scheduler=lambda optimizer: ImageWarmup(optimizer, 200))
        ema = EMA([], half_lives=[60], ramp_up=0.5)
        callbacks = [ema, Steps(), Checkpoints(), ChangedOptions()]
        tiny.trainer(tmp_path, stop, callbacks).fit(model, tiny.data(batch_size=batch_size), ckpt_path="last")
    sizes = [32, 32, 32, 16, 16, 64, 64]
    seen = [sum(sizes[:n]) for n in range(7)]
    assert rates == pytest.approx([2e-3 * min(n / 200, 1) for n in seen])
    assert model.averages is not None
    expected = dict(recorder.weights[0])
    for n, size, weights in zip(seen, sizes, recorder.weights[1:], strict=True):
        half_life = min(60, 0.5 * n)
        d = 0.0 if half_life == 0 else 0.5 ** (size / half_life)
        expected = {name: d * value + (1 - d) * weights[name] for name, value in expected.items()}
    for name, value in model.averages.average("60_images").items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_half_lives_need_the_batch_size_of_the_data(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 1)
    with pytest.raises(ValueError, match=r"ema\.half_lives are counted in images, but the data have no batch_size"):
        EMA([], half_lives=[60]).on_fit_start(trainer, tiny.module())
    with pytest.raises(ValueError, match=r"half_lives=\[0\].*must be above 0"):
        EMA(half_lives=[0])


def test_the_learning_rate_rises_over_the_first_images(tmp_path: Path) -> None:
    rates: list[float] = []

    class Rates(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    def make(optimizer: torch.optim.Optimizer) -> ImageWarmup:
        return ImageWarmup(optimizer, 2 * tiny.BATCH + 16)

    model = tiny.module(lr_scheduler=make)
    tiny.trainer(tmp_path, 5, [Rates()]).fit(model, tiny.data())
    assert rates == pytest.approx([2e-3 * min(i * 32 / 80, 1) for i in range(5)])
    with pytest.raises(ValueError, match="the data have no batch_size"):
        optimization(model.parameters(), tiny.optimizer, make)
