"""A run that a second Ctrl-C breaks off, between any two lines of a step, goes on as if nothing had happened."""

import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
import lightning.pytorch as L
import pytest
import torch

import diffusion_lit
from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.diffusion import DDIM
from diffusion_lit.evaluation import Frechet
from diffusion_lit.loggers import CSV, read_rows
from diffusion_lit.methods.feature_network import FeatureNetworkModule
from diffusion_lit.metrics import Pixels
from diffusion_lit.networks import ConvClassifier
from tests import tiny
from tests.tiny import identical, last, load

STATE = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step", "curves")
STEPS = 6
WATCHED = (*(str(Path(module.__file__ or "").parent) for module in (diffusion_lit, lightning)), "torch/optim/")
"""Whose lines may be broken off: the package's, Lightning's and the optimiser's."""


class Interruption(L.Callback):
    """Raises KeyboardInterrupt, as a second Ctrl-C does, at a line between one training step and the next.

    Args:
        at: The how manyth line that runs; None: lines are only counted.
        within: Counts those of files with this in their name alone.
        step: Which optimiser step the lines are of; what is due before the next begins is part of it.
    """

    def __init__(self, at: int | None, within: str = "", step: int = 4) -> None:
        self.at = at
        self.within = within
        self.step = step
        self.lines = 0
        self.where = "nowhere"
        self.trainer: L.Trainer | None = None

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == self.step - 1 and sys.gettrace() is None:
            self.trainer = trainer
            sys.settrace(self._trace)
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                frame.f_trace = self._trace if self._watched(frame) else None
                frame = frame.f_back

    def _watched(self, frame: FrameType) -> bool:
        return any(name in frame.f_code.co_filename for name in WATCHED)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not self._watched(frame):
            return None
        if event == "call" and frame.f_code.co_name == "training_step":
            assert self.trainer is not None
            if self.trainer.global_step == self.step:
                sys.settrace(None)
                return None
        if event == "line" and self.within in frame.f_code.co_filename:
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def system(place: Path) -> tuple[L.LightningModule, list[L.Callback]]:
    """A diffusion model with grids, scores and averages."""
    grid = SampleGrid(every_n_steps=2, num_images=2, batch_size=2, sampler=DDIM(2))
    cache = str(place.parent / "cache")
    frechet = Frechet(Pixels(2), every_n_steps=2, num_images=3, batch_size=4, cache_dir=cache, at_start=True)
    return tiny.module(), [EMA([0.9]), grid, frechet, Scalars(), Checkpoints(2)]


def classifier(place: Path) -> tuple[L.LightningModule, list[L.Callback]]:
    """A network whose normalisation keeps running means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ConvClassifier(image_size=8, in_channels=1, num_classes=10, width=8)
    return FeatureNetworkModule(network, tiny.optimizer), [Checkpoints(2)]


System = Callable[[Path], tuple[L.LightningModule, list[L.Callback]]]


def fit(place: Path, interruption: Interruption | None = None, ckpt_path: str = "last", make: System = system) -> None:
    model, callbacks = make(place)
    if interruption is not None:
        callbacks.append(interruption)
    validation = {"limit_val_batches": 1, "val_check_interval": 4}
    trainer = tiny.trainer(place, STEPS, callbacks, logger=CSV(str(place)), accumulate_grad_batches=2, **validation)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, tiny.data(), ckpt_path=ckpt_path)
    finally:
        sys.settrace(None)


def broken_off(place: Path, interruption: Interruption, make: System = system) -> str:
    """Breaks a run off; returns where."""
    with pytest.raises(SystemExit):
        fit(place, interruption, make=make)
    return interruption.where


def curves(place: Path) -> list[dict[str, str]]:
    rows = read_rows(place / "csv" / "version_0" / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "train/images_per_s"} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing breaks off."""
    place = tmp_path_factory.mktemp("whole") / "run"
    fit(place)
    return place


def lines_of(place: Path, step: int) -> int:
    """How many lines may be broken off at a step."""
    counting = Interruption(None, step=step)
    fit(place, counting)
    return counting.lines


def go_on(whole: Path, place: Path, where: str) -> None:
    """Ends a run that was broken off, and compares it with the whole one."""
    fit(place)
    a, b = load(last(whole)), load(last(place))
    assert [name for name in STATE if not identical(a[name], b[name])] == [], where
    assert a["callbacks"]["Frechet"] == b["callbacks"]["Frechet"], where
    assert curves(place) == curves(whole), where


MANY = [pytest.param(step, 40, marks=pytest.mark.slow, id=f"many-{step}") for step in (1, 4, STEPS)]


@pytest.mark.parametrize(("step", "count"), [pytest.param(4, 2, id="few"), *MANY])
def test_broken_off_between_any_two_lines_it_ends_as_the_whole_run(
    tmp_path: Path, whole: Path, step: int, count: int
) -> None:
    lines = lines_of(tmp_path / "lines", step)
    for at in random.Random(count).sample(range(1, lines + 1), count):
        place = tmp_path / str(at)
        go_on(whole, place, broken_off(place, Interruption(at, step=step)))


@pytest.mark.parametrize(
    ("within", "at"),
    [
        ("torch/optim/adam.py", 20),
        ("diffusion_lit/averaging.py", 20),
        ("diffusion_lit/callbacks/checkpoints.py", 50),
        ("diffusion_lit/loggers.py", 60),
    ],
)
def test_nor_does_it_matter_where_things_are_half_done(tmp_path: Path, whole: Path, within: str, at: int) -> None:
    where = broken_off(tmp_path, Interruption(at, within))
    assert within in where
    if within in ("torch/optim/adam.py", "diffusion_lit/averaging.py"):
        assert load(last(tmp_path))["global_step"] == 2
    go_on(whole, tmp_path, where)


@pytest.mark.parametrize(("within", "at"), [("torch/optim/adam.py", 20), ("methods/feature_network.py", 7)])
def test_running_means_that_have_moved_are_not_kept(tmp_path: Path, within: str, at: int) -> None:
    fit(tmp_path / "whole", make=classifier)
    where = broken_off(tmp_path / "run", Interruption(at, within), classifier)
    assert within in where
    assert load(last(tmp_path / "run"))["global_step"] == 2
    fit(tmp_path / "run", make=classifier)
    a, b = load(last(tmp_path / "whole")), load(last(tmp_path / "run"))
    assert identical(a["state_dict"], b["state_dict"])
    assert identical(a["optimizer_states"], b["optimizer_states"])


def test_a_step_whose_score_is_broken_off_is_kept_beside(
    tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`last` scores again; what goes on from the other file has the same weights and no score."""
    where = broken_off(tmp_path / "run", Interruption(1, "diffusion_lit/metrics/frechet.py"))
    kept = last(tmp_path / "run").with_name("interrupted.ckpt")
    [said] = [record.message for record in caplog.records if "broken off" in record.message]
    assert said.startswith("step 4 was broken off")
    assert f"`--ckpt_path last` goes on from before and does it all; `--ckpt_path {kept}` goes on from here" in said
    assert load(last(tmp_path / "run"))["global_step"] == 2
    assert load(kept)["global_step"] == 4
    fit(tmp_path / "other", ckpt_path=str(kept))
    a, b = load(last(whole)), load(last(tmp_path / "other"))
    assert [name for name in STATE if name != "curves" and not identical(a[name], b[name])] == []
    go_on(whole, tmp_path / "run", where)
    assert not kept.exists()


def test_a_run_without_a_checkpoint_yet_begins_anew_and_is_not_overwritten_by_accident(
    tmp_path: Path, whole: Path, caplog: pytest.LogCaptureFixture
) -> None:
    where = broken_off(tmp_path, Interruption(1, "diffusion_lit/metrics/frechet.py", step=2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.stem != "best"] == ["interrupted.ckpt"]
    assert any("`--ckpt_path last` begins anew" in record.message for record in caplog.records)
    with pytest.raises(ValueError, match="holds a run already"):
        tiny.trainer(tmp_path, STEPS).fit(tiny.module(), tiny.data())
    go_on(whole, tmp_path, where)
