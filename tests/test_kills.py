"""A run that is killed anywhere and started again ends as if nothing had happened, bit for bit."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import pytest

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.data import Digits, ImageData
from diffusion_lit.diffusion import DDIM
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.metrics import Pixels
from diffusion_lit.system import System
from tests import forked, tiny

STEPS = 13
COMMAND_LINE = [
    *("--trainer.val_check_interval", "6", "--trainer.limit_val_batches", "1", "--trainer.log_every_n_steps", "1"),
    *("--data.eval_batch_size", "8", "--data.batch_size", "8", "--model.network.width", "8"),
    *("--model.network.dropout", "0.1", "--ema.decays", "[0.9, 0.5]"),
    *("--sample_grid.every_n_steps", "5", "--sample_grid.batch_size", "2"),
    *("--evaluation.every_n_steps", "4", "--evaluation.training_sampler.steps", "2"),
    *("--evaluation.training_num_images", "3"),
    *("--checkpoints.every_n_steps", "3", "--checkpoints.keep_every_n_steps", "5", "--checkpoints.keep_at_most", "2"),
]


class Variant(NamedTuple):
    """A run that is killed.

    Args:
        make: Makes the system.
        accumulate: Batches per optimizer step.
        processes: One or two.
        commands: Whether it is started by the command line instead of `Trainer.fit`.
    """

    make: Callable[[], System] = tiny.module
    accumulate: int = 1
    processes: int = 1
    commands: bool = False


VARIANTS = {
    "one process": Variant(),
    "accumulated": Variant(accumulate=2),
    "two processes": Variant(accumulate=2, processes=2),
    "two optimizers": Variant(tiny.Pair),
    "two optimizers in two processes": Variant(tiny.Pair, processes=2),
    "command line": Variant(commands=True),
    "command line, accumulated": Variant(accumulate=2, commands=True),
    "command line, two processes": Variant(accumulate=2, processes=2, commands=True),
}
QUICK = ["one process", "two processes", "two optimizers in two processes", "two optimizers", "command line"]


def fit(place: Path, variant: Variant) -> None:
    """Trains with averages, grids, scores, validations and snapshots, none of which are due at the same steps."""
    evaluation = Evaluation(
        None,
        Pixels(2),
        batch_size=4,
        every_n_steps=4,
        training_num_images=3,
        training_sampler=DDIM(2),
        at_start=True,
    )
    callbacks: list[L.Callback] = [
        EMA([0.9, 0.5]),
        SampleGrid(every_n_steps=5, num_images=2, batch_size=2, sampler=DDIM(2)),
        evaluation,
        Scalars(),
        Checkpoints(3, keep_every_n_steps=5, keep_at_most=2),
    ]
    settings: dict[str, Any] = {"val_check_interval": 6 * variant.accumulate, "limit_val_batches": 1}
    if variant.processes > 1:
        settings |= {"devices": variant.processes, "strategy": "ddp"}
    trainer = tiny.trainer(place, STEPS, callbacks, accumulate_grad_batches=variant.accumulate, **settings)
    data = ImageData(Digits(), batch_size=8, eval_batch_size=8)
    trainer.fit(variant.make(), data, ckpt_path="last")


def command(place: Path, variant: Variant) -> None:
    """The same by the command line."""
    from diffusion_lit import cli
    from tests.test_cli import CPU, QUIET, fit_args

    settings = [
        *("--trainer.accumulate_grad_batches", str(variant.accumulate)),
        *("--trainer.val_check_interval", str(6 * variant.accumulate)),
    ]
    if variant.processes > 1:
        settings += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    cli.main(fit_args(place, *QUIET, *COMMAND_LINE, *CPU, *settings, "--ckpt_path", "last", max_steps=STEPS))


def run(place: Path, variant: Variant) -> None:
    go = command if variant.commands else fit
    if variant.processes > 1:
        forked.in_two(lambda: go(place, variant))
    else:
        go(place, variant)


def count_operations(place: Path, variant: Variant) -> None:
    operations = forked.FileOperations(place)
    run(place, variant)
    (place / "operations").write_text(str(operations.count))


def run_until(place: Path, variant: Variant, at: int) -> None:
    forked.FileOperations(place, at)
    run(place, variant)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of a variant that nobody killed, with the seconds it took and the number of its file operations."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = place = tmp_path_factory.mktemp("whole")
            start = time.monotonic()
            finish(place, lambda: count_operations(place, VARIANTS[name]))
            (place / "seconds").write_text(str(time.monotonic() - start))
        return made[name]

    return get


def finish(place: Path, go: Callable[[], object]) -> None:
    place.mkdir(exist_ok=True)
    output = place / "output.txt"
    code = forked.wait(forked.fork(go, output))
    assert code == 0, output.read_text()[-3000:]


def content(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint without its configuration, which names the directory, and Lightning's counters, some of which count
    from the start of the process and all of which are set when it is loaded.
    """
    return {name: value for name, value in tiny.load(checkpoint).items() if name not in ("config", "loops")}


def assert_same(whole: Path, parts: Path) -> None:
    for folder in ("checkpoints", "samples"):
        names = [{path.name for path in place.glob(f"{folder}/*")} for place in (whole, parts)]
        assert names[0] == names[1]
    for path in (whole / "checkpoints").iterdir():
        a, b = content(path), content(parts / "checkpoints" / path.name)
        assert a.keys() == b.keys()
        different = [name for name in a if not tiny.identical(a[name], b[name])]
        assert different == [], path.name
    assert tiny.rows(whole) == tiny.rows(parts)
    for path in [*whole.glob("samples/*"), *whole.glob("samples.png")]:
        assert path.read_bytes() == (parts / path.relative_to(whole)).read_bytes()


def kill_and_continue(whole: Path, folder: Path, name: str, kills: int, seed: int) -> None:
    """Kills a run so many times, in turn at any moment and at a file operation, and compares how it ends.

    A run that ends before it has been killed often enough is compared too, and another one begun.
    """
    choice, variant = random.Random(seed), VARIANTS[name]
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
            code = forked.wait(forked.fork(lambda: run_until(parts, variant, at), output))  # noqa: B023
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


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is known of the real images is kept between the runs of a test session."""
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache_of_kills"))


@pytest.mark.few(2)
@pytest.mark.parametrize("name", QUICK)
def test_a_run_killed_a_few_times_ends_as_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Path], name: str
) -> None:
    kill_and_continue(uninterrupted(name), tmp_path, name, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_many_times_ends_as_the_uninterrupted_one(
    tmp_path: Path, uninterrupted: Callable[[str], Path], name: str, seed: int
) -> None:
    kill_and_continue(uninterrupted(name), tmp_path, name, kills=6, seed=100 + seed)
