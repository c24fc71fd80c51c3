"""A run that a second Ctrl-C breaks off, between any two lines of a step, goes on as if nothing had happened."""

import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import pytest

from diffusion_lit.callbacks import EMA, Checkpoints, Frechet, SampleGrid, Scalars
from diffusion_lit.diffusion import DDIM
from diffusion_lit.loggers import CSV, read_rows
from diffusion_lit.metrics import Pixels
from tests import tiny
from tests.tiny import identical, last, load

STATE = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step", "curves")
STEPS, BROKEN = 6, 4
"""How long a run is, and which step is broken off: one with a grid and a score."""
WATCHED = ("/diffusion_lit/", "/lightning/pytorch/", "/torch/optim/")


class Interruption(L.Callback):
    """Raises KeyboardInterrupt at a line of step BROKEN, of Lightning, of the optimiser or of the package.

    Args:
        at: The how manyth line that runs; None: lines are only counted.
        within: Counts those of files with this in their name alone.
    """

    def __init__(self, at: int | None, within: str = "") -> None:
        self.at = at
        self.within = within
        self.lines = 0
        self.where = "nowhere"

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step == BROKEN - 1 and sys.gettrace() is None:
            sys.settrace(self._trace)
            frame: FrameType | None = sys._getframe(1)
            while frame is not None:
                frame.f_trace = self._trace if self._watched(frame) else None
                frame = frame.f_back
        elif trainer.global_step == BROKEN:
            sys.settrace(None)

    def _watched(self, frame: FrameType) -> bool:
        return any(name in frame.f_code.co_filename for name in WATCHED)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not self._watched(frame):
            return None
        if event == "line" and self.within in frame.f_code.co_filename:
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._trace


def fit(place: Path, interruption: Interruption | None = None, ckpt_path: str = "last") -> None:
    grid = SampleGrid(every_n_steps=2, num_images=2, batch_size=2, sampler=DDIM(2))
    frechet = Frechet(Pixels(2), every_n_steps=2, num_images=3, batch_size=4, cache_dir=str(place.parent / "cache"))
    callbacks: list[L.Callback] = [EMA([0.9]), grid, frechet, Scalars(), Checkpoints(2)]
    if interruption is not None:
        callbacks.append(interruption)
    trainer = tiny.trainer(place, STEPS, callbacks, logger=CSV(str(place)), accumulate_grad_batches=2)
    trainer.fit(tiny.module(), tiny.data(), ckpt_path=ckpt_path)


def broken_off(place: Path, at: int, within: str = "") -> str:
    """Breaks a run off; returns where."""
    interruption = Interruption(at, within)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SystemExit):
                fit(place, interruption)
    finally:
        sys.settrace(None)
    return interruption.where


def curves(place: Path) -> list[dict[str, str]]:
    rows = read_rows(place / "csv" / "version_0" / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "train/images_per_s"} for row in rows]


@dataclass(frozen=True)
class Whole:
    """The run that nothing breaks off.

    Attributes:
        place: Its directory.
        lines: That run in step BROKEN.
    """

    place: Path
    lines: int


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    counting = Interruption(None)
    place = tmp_path_factory.mktemp("whole") / "run"
    fit(place, counting)
    assert counting.lines > 5_000
    return Whole(place, counting.lines)


def go_on(whole: Whole, place: Path, where: str) -> None:
    """Ends a run that was broken off, and compares it with the whole one."""
    fit(place)
    a, b = load(last(whole.place)), load(last(place))
    assert [name for name in STATE if not identical(a[name], b[name])] == [], where
    assert a["callbacks"]["Frechet"] == b["callbacks"]["Frechet"], where
    assert curves(place) == curves(whole.place), where


@pytest.mark.parametrize("count", [pytest.param(5, id="few"), pytest.param(200, marks=pytest.mark.slow, id="many")])
def test_broken_off_between_any_two_lines_it_ends_as_the_whole_run(tmp_path: Path, whole: Whole, count: int) -> None:
    for at in random.Random(count).sample(range(1, whole.lines + 1), count):
        place = tmp_path / str(at)
        go_on(whole, place, broken_off(place, at))


@pytest.mark.parametrize("within", ["torch/optim/adam.py", "diffusion_lit/averaging.py"])
def test_a_step_broken_off_half_way_is_not_kept(tmp_path: Path, whole: Whole, within: str) -> None:
    where = broken_off(tmp_path, 20, within)
    assert within in where
    assert load(last(tmp_path))["global_step"] == 2
    assert not (tmp_path / "checkpoints" / "interrupted.ckpt").exists()
    go_on(whole, tmp_path, where)


def test_a_step_whose_score_is_broken_off_is_kept_beside(
    tmp_path: Path, whole: Whole, caplog: pytest.LogCaptureFixture
) -> None:
    """`last` scores again; what goes on from the other file has the same weights and no score."""
    interruption = Interruption(1, "diffusion_lit/metrics/frechet.py")
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path / "run", interruption)
    finally:
        sys.settrace(None)
    kept = last(tmp_path / "run").with_name("interrupted.ckpt")
    [said] = [record.message for record in caplog.records if "broken off" in record.message]
    assert said.startswith("step 4 was broken off")
    assert str(kept) in said
    assert load(last(tmp_path / "run"))["global_step"] == 2
    assert load(kept)["global_step"] == BROKEN
    fit(tmp_path / "other", ckpt_path=str(kept))
    a, b = load(last(whole.place)), load(last(tmp_path / "other"))
    assert [name for name in STATE if name != "curves" and not identical(a[name], b[name])] == []
    go_on(whole, tmp_path / "run", interruption.where)
