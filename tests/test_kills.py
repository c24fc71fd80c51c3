"""A run that is killed anywhere and started again ends as if nothing had happened, bit for bit."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusion_lit import cli
from diffusion_lit.loggers import read_rows
from tests import forked, tiny
from tests.test_cli import CPU, QUIET, fit_args

RUN = [
    *("--trainer.val_check_interval", "6", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"),
    *("--data.init_args.eval_batch_size", "8", "--data.init_args.batch_size", "8"),
    *("--model.network.init_args.width", "8", "--model.network.init_args.dropout", "0.1"),
    *("--ema.decays", "[0.9, 0.5]", "--sample_grid.every_n_steps", "5", "--sample_grid.batch_size", "2"),
    *("--frechet.every_n_steps", "4", "--frechet.sampler.init_args.steps", "2", "--frechet.num_images", "3"),
    *("--checkpoints.every_n_steps", "3", "--checkpoints.keep_every_n_steps", "5", "--checkpoints.keep_at_most", "2"),
]
VARIANTS = {
    "one process": [],
    "accumulated": ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "12"],
    "two processes": [
        *("--trainer.devices", "2", "--trainer.strategy", "ddp"),
        *("--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "12"),
    ],
}
STEPS = 13


def run(place: Path, variant: str) -> None:
    args = fit_args(place, *QUIET, *RUN, *CPU, *VARIANTS[variant], "--ckpt_path", "last", max_steps=STEPS)
    if variant == "two processes":
        forked.in_two(lambda: cli.main(args))
    else:
        cli.main(args)


def counted(place: Path, variant: str) -> None:
    operations = forked.FileOperations(place)
    run(place, variant)
    (place / "operations").write_text(str(operations.count))


def lethal(place: Path, variant: str, at: int) -> None:
    forked.FileOperations(place, at)
    run(place, variant)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of a variant that nobody killed, with the seconds it took and the number of its file operations."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = place = tmp_path_factory.mktemp("whole")
            start = time.monotonic()
            finish(place, lambda: counted(place, variant))
            (place / "seconds").write_text(str(time.monotonic() - start))
        return made[variant]

    return get


def finish(place: Path, go: Callable[[], object]) -> None:
    place.mkdir(exist_ok=True)
    output = place / "output.txt"
    code = forked.wait(forked.fork(go, output))
    assert code == 0, output.read_text()[-3000:]


def content(checkpoint: Path) -> dict[str, Any]:
    state = tiny.load(checkpoint)
    del state["config"]
    return state


def table(place: Path) -> list[dict[str, str]]:
    """The rows of a run's CSV file as they stand there, without what depends on the clock."""
    rows = read_rows(place / "csv" / "version_0" / "metrics.csv")
    return [{name: value for name, value in row.items() if name != "train/images_per_s"} for row in rows]


def assert_same(whole: Path, parts: Path) -> None:
    for folder in ("checkpoints", "samples"):
        assert {p.name for p in (whole / folder).iterdir()} == {p.name for p in (parts / folder).iterdir()}
    for path in (whole / "checkpoints").iterdir():
        a, b = content(path), content(parts / "checkpoints" / path.name)
        assert a.keys() == b.keys()
        different = [name for name in a if not tiny.identical(a[name], b[name])]
        assert different == [], path.name
    assert table(whole) == table(parts)
    for path in [*(whole / "samples").iterdir(), whole / "samples.png"]:
        assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()


def kill_and_go_on(whole: Path, parts: Path, variant: str, kills: int, seed: int) -> int:
    """Kills a run again and again, half of the times at a moment and half at a file operation, then lets it end.

    Returns:
        How many kills found the run alive.
    """
    choice = random.Random(seed)
    parts.mkdir()
    seconds, operations = float((whole / "seconds").read_text()), int((whole / "operations").read_text())
    killed = 0
    for i in range(kills):
        if i % 2:
            at = choice.randrange(1, operations // 2)
            child = forked.fork(lambda at=at: lethal(parts, variant, at), parts / "output.txt")  # type: ignore[misc]
        else:
            child = forked.fork(lambda: run(parts, variant), parts / "output.txt")
            time.sleep(seconds * choice.uniform(0.3, 0.9))
            forked.kill_group(child)
        code = forked.wait(child)
        assert code in (0, -9), (parts / "output.txt").read_text()[-3000:]
        killed += code == -9
    finish(parts, lambda: run(parts, variant))
    return killed


@pytest.mark.parametrize("variant", ["one process", "two processes"])
def test_a_run_killed_a_few_times_ends_as_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Path], variant: str
) -> None:
    whole, parts = uninterrupted(variant), tmp_path / "parts"
    assert kill_and_go_on(whole, parts, variant, kills=2, seed=1) > 0
    assert_same(whole, parts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_many_times_ends_as_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Path], variant: str, seed: int, record_property: Any
) -> None:
    whole, parts = uninterrupted(variant), tmp_path / "parts"
    killed = kill_and_go_on(whole, parts, variant, kills=8, seed=100 + seed)
    assert killed >= 5
    assert_same(whole, parts)
    record_property("kills", killed)
    print(f"{variant}, seed {seed}: {killed} kills survived")
