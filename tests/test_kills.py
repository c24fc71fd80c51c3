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
    """A checkpoint without its configuration, which names the directory, and Lightning's counters, some of which count
    from the start of the process and all of which are set anew at the next.
    """
    return {name: value for name, value in tiny.load(checkpoint).items() if name not in ("config", "loops")}


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


def kill_and_go_on(whole: Path, folder: Path, variant: str, kills: int, seed: int) -> None:
    """Kills a run so many times, in turn at any moment and at a file operation, and compares how it ends.

    A run that ends before it has been killed often enough is compared too, and another one begun.
    """
    choice = random.Random(seed)
    seconds, operations = float((whole / "seconds").read_text()), int((whole / "operations").read_text())
    killed, runs = 0, 0
    while True:
        parts = folder / f"run_{runs}"
        parts.mkdir(exist_ok=True)
        output = parts / "output.txt"
        if killed == kills:
            finish(parts, lambda: run(parts, variant))  # noqa: B023
        elif killed % 2:
            at = choice.randrange(1, operations // 2)
            code = forked.wait(forked.fork(lambda: lethal(parts, variant, at), output))  # noqa: B023
        else:
            child = forked.fork(lambda: run(parts, variant), output)  # noqa: B023
            time.sleep(seconds * choice.uniform(0.3, 0.9))
            forked.kill_group(child)
            code = forked.wait(child)
        if killed < kills and code == -9:
            killed += 1
            continue
        assert killed == kills or code == 0, output.read_text()[-3000:]
        assert_same(whole, parts)
        runs += 1
        if killed == kills:
            return


@pytest.mark.parametrize("variant", ["one process", "two processes"])
def test_a_run_killed_a_few_times_ends_as_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Path], variant: str
) -> None:
    kill_and_go_on(uninterrupted(variant), tmp_path, variant, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_many_times_ends_as_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Path], variant: str, seed: int
) -> None:
    """Fifty-four kills in all."""
    kill_and_go_on(uninterrupted(variant), tmp_path, variant, kills=6, seed=100 + seed)
