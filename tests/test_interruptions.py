"""A second Ctrl-C, between any two lines of a step, leaves a last.ckpt from which the run continues to the same end."""

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
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.methods.feature_network import FeatureNetworkModule
from diffusion_lit.metrics import Pixels
from diffusion_lit.networks import ConvClassifier
from tests import tiny
from tests.tiny import identical, last, load

STATE = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step", "curves")
STEPS = 6
WATCHED = (*(str(Path(module.__file__ or "").parent) for module in (diffusion_lit, lightning)), "torch/optim/")
"""Files whose lines may be interrupted: the package's, Lightning's and the optimizers'."""


class Interruption(L.Callback):
    """Raises KeyboardInterrupt, as a second Ctrl-C does, at a line between one training step and the next.

    Args:
        at: The line, counted as they run, from 1; None: lines are only counted.
        within: Counts the lines of files with this in their path alone.
        step: The optimizer step; what is due before the next one begins is part of it.
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


Made = tuple[L.LightningModule, list[L.Callback], int]
"""A system, its callbacks, and how many batches make a step."""


def generator(place: Path) -> Made:
    """A diffusion model with grids, scores and averages."""
    grid = SampleGrid(every_n_steps=2, num_images=2, batch_size=2, sampler=DDIM(2))
    evaluation = Evaluation(
        None,
        Pixels(2),
        batch_size=4,
        cache_dir=str(place.parent / "cache"),
        every_n_steps=2,
        training_num_images=3,
        at_start=True,
    )
    return tiny.module(), [EMA([0.9]), grid, evaluation, Scalars(), Checkpoints(2)], 2


def classifier(place: Path) -> Made:
    """A network whose normalisation keeps running means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ConvClassifier(image_size=8, in_channels=1, num_classes=10, width=8)
    return FeatureNetworkModule(network, tiny.optimizer), [EMA([0.9]), Scalars(), Checkpoints(2)], 2


def pair(place: Path) -> Made:
    """Two optimizers, which move their weights at different lines of a step."""
    return tiny.Pair(), [EMA([0.9]), Scalars(), Checkpoints(2)], 1


Make = Callable[[Path], Made]


def fit(place: Path, make: Make, interruption: Interruption | None = None) -> None:
    model, callbacks, accumulate = make(place)
    if interruption is not None:
        callbacks.append(interruption)
    settings: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2 * accumulate}
    trainer = tiny.trainer(place, STEPS, callbacks, accumulate_grad_batches=accumulate, **settings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, tiny.data(), ckpt_path="last")
    finally:
        sys.settrace(None)


def interrupt(place: Path, make: Make, interruption: Interruption) -> str:
    """Interrupts a run; returns where."""
    with pytest.raises(SystemExit):
        fit(place, make, interruption)
    return interruption.where


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Make], Path]:
    """The run of a system that nothing interrupts."""
    made: dict[Make, Path] = {}

    def get(make: Make) -> Path:
        if make not in made:
            made[make] = tmp_path_factory.mktemp("whole") / "run"
            fit(made[make], make)
        return made[make]

    return get


def count_lines(place: Path, make: Make, step: int) -> int:
    """How many lines of a step may be interrupted."""
    counting = Interruption(None, step=step)
    fit(place, make, counting)
    return counting.lines


def assert_continues(whole: Path, place: Path, make: Make, where: str) -> None:
    """Continues a run that was interrupted, and compares its end with that of the whole one."""
    fit(place, make)
    a, b = load(last(whole)), load(last(place))
    assert [name for name in STATE if not identical(a.get(name), b.get(name))] == [], where
    assert identical(a["callbacks"], b["callbacks"]), where
    assert tiny.rows(place) == tiny.rows(whole), where


SYSTEMS = [generator, classifier, pair]
MANY = [
    pytest.param(make, step, 40, marks=pytest.mark.slow, id=f"many-{make.__name__}-{step}")
    for make in SYSTEMS
    for step in (1, 4, STEPS)
]


@pytest.mark.few(1)
@pytest.mark.skipif(sys.gettrace() is not None, reason="the lines are traced already, by what measures the coverage")
@pytest.mark.parametrize(
    ("make", "step", "count"), [*(pytest.param(make, 4, 2, id=make.__name__) for make in SYSTEMS), *MANY]
)
def test_interrupted_at_any_line_the_run_continues_to_the_same_end(
    tmp_path: Path, whole: Callable[[Make], Path], make: Make, step: int, count: int
) -> None:
    lines = count_lines(tmp_path / "lines", make, step)
    for at in random.Random(count).sample(range(1, lines + 1), count):
        place = tmp_path / str(at)
        where = interrupt(place, make, Interruption(at, step=step))
        if last(place).exists():
            assert load(last(place))["global_step"] in (step - step % 2, step - 1 - (step - 1) % 2), where
        assert_continues(whole(make), place, make, where)


PLACES = [
    (generator, "torch/optim/adam.py", 20),
    (generator, "diffusion_lit/averaging.py", 20),
    (generator, "diffusion_lit/evaluation/measure.py", 20),
    (generator, "diffusion_lit/callbacks/checkpoints.py", 9),
    (classifier, "torch/optim/adam.py", 20),
    (classifier, "methods/feature_network.py", 7),
    (pair, "torch/optim/adam.py", 20),
    (pair, "torch/optim/sgd.py", 8),
    (pair, "diffusion_lit/averaging.py", 8),
]


@pytest.mark.few(3)
@pytest.mark.parametrize(("make", "within", "at"), PLACES)
def test_a_step_that_is_interrupted_half_done_is_not_kept(
    tmp_path: Path, whole: Callable[[Make], Path], make: Make, within: str, at: int
) -> None:
    where = interrupt(tmp_path, make, Interruption(at, within))
    assert within in where
    assert load(last(tmp_path))["global_step"] == 2
    assert_continues(whole(make), tmp_path, make, where)


@pytest.mark.further
def test_a_checkpoint_that_is_interrupted_while_it_is_written_leaves_the_one_before(
    tmp_path: Path, whole: Callable[[Make], Path]
) -> None:
    where = interrupt(tmp_path, generator, Interruption(40, "diffusion_lit/checkpoint.py"))
    assert load(last(tmp_path))["global_step"] in (2, 4)
    assert {path.suffix for path in last(tmp_path).parent.iterdir()} == {".ckpt"}
    assert_continues(whole(generator), tmp_path, generator, where)


def test_a_run_without_a_checkpoint_yet_begins_again(tmp_path: Path, whole: Callable[[Make], Path]) -> None:
    where = interrupt(tmp_path, generator, Interruption(1, "diffusion_lit/metrics/frechet.py", step=2))
    assert not last(tmp_path).exists()
    assert_continues(whole(generator), tmp_path, generator, where)
