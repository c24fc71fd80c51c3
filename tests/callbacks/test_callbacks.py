"""When callbacks act, and what they draw and write."""

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_lit.callbacks import (
    EMA,
    Checkpoints,
    ImageWriter,
    Plots,
    SampleGrid,
    Scalars,
    counting_bar,
    sampling_bar,
)
from diffusion_lit.callbacks import progress as progress_module
from diffusion_lit.callbacks.interval import Interval
from diffusion_lit.callbacks.plots import _set_ticks, _smoothed, closing_words, plot_run
from diffusion_lit.diffusion import DDIM
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.images import tile, to_uint8
from diffusion_lit.loggers import METRICS, Curves, read_curves
from diffusion_lit.metrics import Pixels
from diffusion_lit.module import DiffusionModule
from diffusion_lit.requests import Requests
from tests import tiny
from tests.tiny import last, load


def at(step: int) -> L.Trainer:
    return cast(L.Trainer, SimpleNamespace(global_step=step))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


# Interval


def test_an_interval_is_due_once_at_every_multiple_however_many_batches_a_step_has() -> None:
    interval = Interval(3)
    interval.start(at(0))
    steps = [0, 1, 1, 2, 3, 3, 3, 4, 6, 6, 7]
    assert [step for step in steps if interval.due(at(step))] == [3, 6]


def test_an_interval_is_not_due_again_where_a_run_goes_on() -> None:
    interval = Interval(3)
    interval.start(at(6))
    assert not interval.due(at(6))
    assert interval.due(at(9))


def test_no_interval_is_never_due_and_one_below_a_step_is_refused() -> None:
    assert not any(Interval(None).due(at(step)) for step in range(5))
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        Interval(0)


# Sample grid


def test_grids_are_written_at_their_steps_and_at_the_end_always_from_the_same_noise(tmp_path: Path) -> None:
    class Frozen(L.Callback):
        """Takes every update back, so that pictures can only differ by their noise."""

        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            for p in pl_module.parameters():
                p.grad = None

    grid = SampleGrid(every_n_steps=2, num_images=3, batch_size=2, sampler=DDIM(2), seed=4)
    model = tiny.module()
    tiny.trainer(tmp_path, 5, [grid, Frozen()], gradient_clip_val=None).fit(model, tiny.data())
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["step_00000002.png", "step_00000004.png", "step_00000005.png"]
    assert len({file.read_bytes() for file in [*files, tmp_path / "samples.png"]}) == 1
    # Three images of 8 pixels are drawn as tiles of 64 with gaps of 4; the fourth place stays white.
    picture = np.asarray(Image.open(tmp_path / "samples.png"))
    assert picture.shape == (132, 132)
    assert (picture[68:, 68:] == 255).all()
    assert not (picture[:64, :64] == 255).all()


def test_a_grid_shows_the_averaged_model(tmp_path: Path) -> None:
    grid = SampleGrid(every_n_steps=None, num_images=1, batch_size=1, sampler=DDIM(2))
    model = tiny.module()
    tiny.trainer(tmp_path, 3, [EMA([0.9]), grid]).fit(model, tiny.data())
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "samples.png"))).float()
    shown = picture[4::8, 4::8]
    difference = {}
    with model.averaged_weights():
        difference["averaged"] = (to_uint8(model.sample([0], sampler=DDIM(2)))[0, 0] - shown).abs().mean()
    difference["raw"] = (to_uint8(model.sample([0], sampler=DDIM(2)))[0, 0] - shown).abs().mean()
    assert difference["averaged"] < difference["raw"]


# Scalars


def close(step: int, value: float) -> Any:
    """A point of a curve, up to float32 rounding."""
    return step, pytest.approx(value, rel=1e-4)


class Keep(L.Callback):
    """Writes down what every batch's loss was made of."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.norms: list[float] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        self.batches.append((outputs["t"].double().clone(), outputs["losses"].double().clone()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_scalars_are_means_over_all_images_since_the_last_time(tmp_path: Path, accumulate: int) -> None:
    keep = Keep()
    settings: dict[str, Any] = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate}
    tiny.trainer(tmp_path, 4, [Scalars(), keep], **settings).fit(tiny.module(), tiny.data())
    curves = read_curves(tmp_path)
    per_log = 2 * accumulate
    for i, step in enumerate([2, 4]):
        t, losses = (torch.cat(part) for part in zip(*keep.batches[i * per_log : (i + 1) * per_log], strict=True))
        assert len(losses) == 2 * tiny.BATCH
        assert curves["train/loss"][i] == close(step, float(losses.mean()))
        for low in (0.0, 0.25, 0.5, 0.75):
            inside = losses[(t > low) & (t <= low + 0.25)]
            value = curves[f"train/loss_t_{low:.2f}_{low + 0.25:.2f}"][i]
            assert value == close(step, float(inside.mean()))
        assert curves["train/gradient_norm"][i] == close(step, keep.norms[2 * i + 1])
    assert curves["images_seen"] == [(2, 2 * tiny.BATCH), (4, 4 * tiny.BATCH)]
    assert all(rate > 0 for _, rate in curves["train/images_per_s"])


# Curves and plots


def ink(path: Path, box: tuple[float, float, float, float]) -> int:
    """How many pixels of a picture are not white within a box, given in fractions of its size."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    (left, top, right, bottom), (height, width) = box, pixels.shape
    inside = pixels[int(top * height) : int(bottom * height), int(left * width) : int(right * width)]
    return int((inside < 250).sum())


def test_losses_and_scores_are_drawn_with_their_legends_beside_them(tmp_path: Path) -> None:
    logger = Curves(str(tmp_path))
    for step in range(1, 101):
        logger.log_metrics({"train/loss": 1 / step, "train/loss_t_0.00_0.25": float("nan"), "val/loss": 2.0}, step)
    logger.log_metrics({"fid": 9.0, "frechet/pixels": float("inf")}, 100)
    logger.save()
    assert [path.name for path in plot_run(tmp_path)] == ["loss.png", "scores.png"]
    for name in ("loss.png", "scores.png"):
        assert size(tmp_path / name) == (990, 495)
        # The legend is at the top right; below it, beside the axes, there is nothing.
        assert ink(tmp_path / name, (0.85, 0.0, 1.0, 0.4)) > 100
        assert ink(tmp_path / name, (0.9, 0.5, 1.0, 0.8)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {METRICS, "loss.png", "scores.png"}


def test_no_curves_make_no_plots(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    assert plot_run(tmp_path) == []


def test_a_run_closes_with_its_first_and_last_distances_and_the_files_that_are_there(tmp_path: Path) -> None:
    logger = Curves(str(tmp_path))
    for step, values in {0: [32.812], 500: [4.0, 12.25], 1500: [0.22914]}.items():
        logger.log_metrics({"train/loss": 1.0, **dict(zip(("frechet/pixels", "fid"), values, strict=False))}, step)
    logger.save()
    (tmp_path / "config.yaml").touch()
    assert closing_words(tmp_path) == [
        "frechet/pixels: 32.81 at step 0, 0.2291 at step 1,500",
        "fid: 12.25 at step 500",
        str(tmp_path / "config.yaml"),
    ]


def test_a_smoothed_curve_is_the_mean_of_its_finite_neighbours_and_keeps_its_gaps() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, np.inf, 6.0, 7.0])
    expected = [1.5, 1.5, np.nan, 4.0, np.nan, 6.5, 6.5]
    assert np.array_equal(_smoothed(values, 3), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 0.0), (-1.0, 1.0), (0.9, 1.0), (0.1, 0.8), (0.02, 0.7), (3e-6, 2.0), (5.0, 40_000.0)]
)
def test_ticks_are_a_few_plain_numbers_that_do_not_overlap(low: float, high: float) -> None:
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 800_000], [low, high])
    _set_ticks(axes, np.array([low, high]))
    figure.draw_without_rendering()
    assert [label.get_text() for label in axes.get_yticklabels(minor=True) if label.get_text()] == []
    for axis, side in ((axes.xaxis, 0), (axes.yaxis, 1)):
        bottom, top = axis.get_view_interval()
        labels = [label for label in axis.get_ticklabels() if bottom <= label.get_position()[side] <= top]
        assert 3 <= len(labels) <= 12
        assert all(re.fullmatch(r"[-\u2212]?[\d,]+(\.\d+)?", label.get_text()) for label in labels)
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.get_points()[0, side])
        ends = [(box.get_points()[0, side], box.get_points()[1, side]) for box in boxes]
        assert all(end < start for (_, end), (start, _) in pairwise(ends))


def test_plots_are_redrawn_at_a_checkpoint_but_not_too_often(tmp_path: Path) -> None:
    class Look(L.Callback):
        """Notes after every step whether there is a picture, and takes it away."""

        def __init__(self, place: Path) -> None:
            self.picture = place / "loss.png"
            self.drawn: list[bool] = []

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            self.drawn.append(self.picture.is_file())
            self.picture.unlink(missing_ok=True)

    drawn = {}
    for seconds in (0.0, 1000.0):
        look = Look(tmp_path / str(seconds))
        callbacks = [Plots(seconds), Scalars(), Checkpoints(every_n_steps=2), look]
        tiny.trainer(look.picture.parent, 5, callbacks).fit(tiny.module(), tiny.data())
        assert look.picture.is_file()
        drawn[seconds] = look.drawn
    assert drawn == {0.0: [False, False, True, False, True], 1000.0: [False] * 5}


def test_plots_that_cannot_be_drawn_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "loss.png").mkdir()
    with pytest.warns(UserWarning, match=r"the curves could not be drawn \(.*Is a directory"):
        tiny.trainer(tmp_path, 1, [Plots(), Scalars()]).fit(tiny.module(), tiny.data())


@pytest.mark.parametrize("interrupted", [False, True])
def test_plots_hold_the_last_score_also_of_an_interrupted_run(
    tmp_path: Path, interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            if interrupted and trainer.global_step == 2:
                raise RuntimeError("on purpose")

    scores = Evaluation(None, Pixels(2), batch_size=4, every_n_steps=100, training_num_images=4, at_start=True)
    made = tiny.trainer(tmp_path, 3, [Plots(), EMA(), scores, Scalars(), Stop(), Checkpoints()])
    drawn: list[dict[str, Any]] = []
    original = read_curves

    def keep(run_dir: Path) -> dict[str, Any]:
        drawn.append(original(run_dir))
        return drawn[-1]

    monkeypatch.setattr("diffusion_lit.callbacks.plots.read_curves", keep)
    if interrupted:
        with pytest.raises(RuntimeError, match="on purpose"):
            made.fit(tiny.module(), tiny.data())
    else:
        made.fit(tiny.module(), tiny.data())
    assert [step for step, _ in drawn[-1]["frechet/pixels"]] == ([0] if interrupted else [0, 3])
    assert [step for step, _ in drawn[-1]["train/loss"]] == ([1, 2] if interrupted else [1, 2, 3])
    assert (tmp_path / "loss.png").is_file()


# Image writer


class Labelled(DiffusionModule):
    """As if a condition had been asked for."""

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return {**super().predict_step(batch, batch_idx), "condition": {"label": batch["index"] * 2 + 1}}


def test_images_are_written_with_labels_as_png_npz_and_grid(tmp_path: Path) -> None:
    model = Labelled(tiny.network(), sampler=DDIM(2))
    tiny.trainer(tmp_path, callbacks=[], logger=False).predict(model, num_images=5, batch_size=2, seed=3)
    out = tmp_path / "predictions" / "seed_3"
    with np.load(out.with_name("seed_3.npz")) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert images.shape == (5, 8, 8, 1)
    assert images.dtype == np.uint8
    assert labels.tolist() == [1, 3, 5, 7, 9]
    expected = to_uint8(model.eval().sample([2, 3], 3))
    assert np.array_equal(images[2, :, :, 0], expected[0, 0].numpy())
    for i in range(5):
        with Image.open(out / f"{i:06}.png") as image:
            assert image.info["label"] == str(2 * i + 1)
            assert np.array_equal(np.asarray(image), images[i, :, :, 0])
    # Nothing but samples, so that other programs can score the folder.
    assert sorted(path.name for path in out.iterdir()) == [f"{i:06}.png" for i in range(5)]
    assert size(out.with_name("seed_3_grid.png")) == (3 * 68 - 4, 2 * 68 - 4)


def test_small_images_are_enlarged_pixel_by_pixel_and_the_rows_of_a_grid_named() -> None:
    images = torch.arange(4 * 2 * 2, dtype=torch.uint8).reshape(4, 1, 2, 2) * 15
    grid = tile(images, columns=2, tile_size=5, gap=1)
    assert grid.shape == (1, 2 * 6 + 1, 2 * 6 + 1)  # three pixels for one
    assert torch.equal(grid[:, :6, 7:], images[1].repeat_interleave(3, 1).repeat_interleave(3, 2))
    named = tile(images, columns=2, tile_size=32, rows=["cat", "a dog"])
    bare = tile(images, columns=2, tile_size=32)
    width = named.shape[2] - bare.shape[2]
    margin = named[..., :width]
    assert torch.equal(named[..., width:], bare)
    ink = (255 - margin.float()).reshape(68, -1)
    assert ink[:34].sum() > 0
    assert ink[34:].sum() > ink[:34].sum()
    assert ink[[0, 33, 34, 67]].sum() == ink[:, 0].sum() == 0


def test_without_labels_there_are_none_and_without_npz_no_file(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    made.predict(tiny.module(), num_images=2, batch_size=2, out=str(tmp_path / "a"))
    assert np.load(tmp_path / "a.npz").files == ["arr_0"]
    made.predict(tiny.module(), num_images=2, batch_size=2, out=str(tmp_path / "b"), npz=False)
    assert not (tmp_path / "b.npz").exists()
    assert not any(isinstance(callback, ImageWriter) for callback in made.callbacks)  # type: ignore[attr-defined]


# Progress


@pytest.mark.parametrize(("num_images", "batch_size", "world_size"), [(10, 4, 1), (3, 8, 1), (22, 4, 2), (9, 4, 2)])
def test_a_sampling_bar_counts_every_image_once(
    num_images: int, batch_size: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(progress_module, "tqdm", Bar)
    trainer = cast(
        L.Trainer,
        SimpleNamespace(is_global_zero=True, progress_bar_callback=1, world_size=world_size, training=False),
    )
    requests = Requests(num_images, batch_size)
    at_ends = []
    with sampling_bar(trainer, requests, "images") as on_step:
        for _ in requests.share(0, world_size):
            for done in range(1, 4):
                before = bars[0].n
                on_step(done, 3)
                assert bars[0].n >= before
            at_ends.append(bars[0].n)
    rounds = range(batch_size * world_size, num_images + batch_size * world_size, batch_size * world_size)
    assert at_ends == pytest.approx([min(r, num_images) for r in rounds])
    assert bars[0].total == num_images
    bars.clear()
    with counting_bar(trainer, num_images, "real images") as count:
        for first in range(0, num_images, world_size * batch_size):
            count(min(batch_size, num_images - first))
    assert bars[0].n == bars[0].total == num_images


# Checkpoints


def test_snapshots_are_kept_and_the_last_is_written_at_the_end(tmp_path: Path) -> None:
    callbacks = [EMA(), Checkpoints(every_n_steps=2, keep_every_n_steps=2)]
    tiny.trainer(tmp_path, 5, callbacks, accumulate_grad_batches=2).fit(tiny.module(), tiny.data())
    files = {path.name: load(path)["global_step"] for path in (tmp_path / "checkpoints").iterdir()}
    assert files == {"step_00000002.ckpt": 2, "step_00000004.ckpt": 4, "previous.ckpt": 4, "last.ckpt": 5}


def test_an_error_before_the_first_step_does_not_touch_the_last_checkpoint(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise RuntimeError("on purpose")

    tiny.trainer(tmp_path, 2).fit(tiny.module(), tiny.data())
    before = last(tmp_path).read_bytes()
    with pytest.raises(RuntimeError, match="on purpose"):
        tiny.trainer(tmp_path, 4, [EMA(), Scalars(), Fails(), Checkpoints()]).fit(
            tiny.module(), tiny.data(), ckpt_path="last"
        )
    assert last(tmp_path).read_bytes() == before


def test_a_keyboard_interrupt_at_any_place_leaves_the_last_checkpoint_as_it_is(tmp_path: Path) -> None:
    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            if trainer.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        tiny.trainer(tmp_path, 5, [EMA(), Interrupt(), Checkpoints(every_n_steps=2)]).fit(tiny.module(), tiny.data())
    assert load(last(tmp_path))["global_step"] == 2


@pytest.mark.parametrize(
    ("ema", "share"), [(EMA([0.999]), 0.9970), (EMA([0.999], warmup=True), 0.0), (EMA([0.1]), 0.001)]
)
def test_an_average_that_is_mostly_of_the_first_weights_is_said(
    ema: EMA, share: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert ema.start_share(3) == pytest.approx(share, abs=1e-4)
    with caplog.at_level("INFO"):
        tiny.trainer(tmp_path, 3, callbacks=[ema, Checkpoints()]).fit(tiny.module(), tiny.data())
    assert ("still holds 100% of the weights that it starts from" in caplog.text) == (share > 0.1)
