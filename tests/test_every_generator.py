"""What every system that makes images can do: resume, be killed, run on two processes, generate, be scored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.generator import Generator
from diffusion_lit.loggers import read_curves
from diffusion_lit.metrics import Pixels
from diffusion_lit.requests import Requests
from tests import forked, systems, tiny

STEPS = 6
KEY = "frechet/pixels"
NAMES = list(systems.GENERATORS)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return systems.teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module", params=NAMES)
def make(request: pytest.FixtureRequest, teacher: Path) -> Callable[[], Generator]:
    build = systems.GENERATORS[request.param]
    return lambda: build(teacher)


def run(place: Path, system: Generator, max_steps: int = STEPS, **kwargs: Any) -> Generator:
    """Trains with averages, a grid and a score, or continues the run that is there."""
    callbacks = [
        EMA([0.9, 0.5]),
        Scalars(),
        SampleGrid(3, num_images=4, batch_size=4, sampler=None),
        Evaluation(
            extractor=Pixels(4),
            num_images=22,
            training_num_images=22,
            batch_size=11,
            every_n_steps=2,
            cache_dir=str(place / "cache"),
        ),
        Checkpoints(every_n_steps=2),
    ]
    trainer = tiny.trainer(place, max_steps, callbacks, **kwargs)
    trainer.fit(system, tiny.data(), ckpt_path="last")
    return system


@pytest.fixture(scope="module")
def whole(make: Callable[[], Generator], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, and in `operations` how many operations on files it took."""
    place = tmp_path_factory.mktemp("whole")

    def counted() -> None:
        operations = forked.FileOperations(place)
        run(place, make())
        (place / "operations").write_text(str(operations.count))

    assert forked.wait(forked.fork(counted, place / "output.txt")) == 0, (place / "output.txt").read_text()[-3000:]
    return place


def assert_same(whole: Path, parts: Path) -> None:
    a, b = (tiny.load(tiny.last(place)) for place in (whole, parts))
    held = {"state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "skipped_steps"}
    assert held <= a.keys()
    assert [name for name in {*held, "objective"} & a.keys() if not tiny.identical(a[name], b[name])] == []
    for step in (3, 6):
        name = f"samples/step_{step:08d}.png"
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    # A run that stops is scored once more.
    scores = [dict(read_curves(place)[KEY]) for place in (whole, parts)]
    assert [scores[0][step] for step in (2, 4, 6)] == [scores[1][step] for step in (2, 4, 6)]


@pytest.mark.further
@pytest.mark.parametrize("stop", [1, 4])
def test_a_run_in_two_parts_ends_as_one_in_one_bit_for_bit(
    make: Callable[[], Generator], whole: Path, tmp_path: Path, stop: int
) -> None:
    run(tmp_path, make(), stop)
    run(tmp_path, make())
    assert_same(whole, tmp_path)


@pytest.mark.few(3)
def test_a_run_killed_between_two_file_operations_ends_as_one_that_was_not(
    make: Callable[[], Generator], whole: Path, tmp_path: Path
) -> None:
    count = int((whole / "operations").read_text())

    def lethal() -> None:
        forked.FileOperations(tmp_path, count // 2)
        run(tmp_path, make())

    output = tmp_path / "output.txt"
    assert forked.wait(forked.fork(lethal, output)) == -9, output.read_text()[-3000:]
    assert forked.wait(forked.fork(lambda: run(tmp_path, make()), output)) == 0
    assert_same(whole, tmp_path)


@pytest.mark.few(3)
def test_two_processes_hold_the_same_weights_and_resume_bit_for_bit(
    make: Callable[[], Generator], tmp_path: Path
) -> None:
    def train() -> None:
        for name, stops in (("whole", [STEPS]), ("parts", [3, STEPS])):
            for stop in stops:
                system = run(tmp_path / name, make(), stop, devices=2, strategy="ddp")
            torch.save(system.state_dict(), tmp_path / f"{name}_{system.global_rank}.pt")

    child = forked.fork(lambda: forked.in_two(train), tmp_path / "output.txt")
    assert forked.wait(child) == 0, (tmp_path / "output.txt").read_text()[-3000:]
    states = [
        torch.load(tmp_path / f"{name}_{rank}.pt", weights_only=True) for name in ("whole", "parts") for rank in (0, 1)
    ]
    assert all(tiny.identical(state, states[0]) for state in states[1:])
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_predict_makes_the_averaged_model_s_images_from_seed_and_index_alone(
    make: Callable[[], Generator], whole: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        trainer = tiny.trainer(tmp_path, 1, [], logger=False)
        asked: dict[str, Any] = {"num_images": 6, "batch_size": 3, "seed": 5, "out": str(tmp_path / name)}
        trainer.predict(make(), tiny.data(), ckpt_path=str(tiny.last(whole)), **asked)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.png"))
    assert len(files) == 6
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    system = make()
    system.load(tiny.load(tiny.last(whole)))
    given = system.conditions(tiny.data())
    six = system.sample(range(6), seed=5, condition=given(torch.arange(6)))
    two = system.sample([4, 1], seed=5, condition=given(torch.tensor([4, 1])))
    torch.testing.assert_close(two, six[[4, 1]], atol=1e-5, rtol=0)


def test_a_process_without_images_makes_none_whatever_images_are_made_from(
    make: Callable[[], Generator], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = make()
    # As of a generator whose images depend on examples, where there are none.
    monkeypatch.setattr(type(system), "entries", ("caption",))
    [request] = list(Requests(3, 4).loader(rank=1, world_size=2))
    made = system.predict_step(request, 0)
    assert made["image"].shape == (0, *system.image_shape)
    assert made["image"].dtype == torch.uint8
