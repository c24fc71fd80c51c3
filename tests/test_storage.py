"""A disk that is full or a directory that is gone: training continues, says what was not saved and damages nothing."""

import json
import os
import resource
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest

from diffusion_lit.callbacks import EMA, Checkpoints, Plots, SampleGrid, Scalars
from diffusion_lit.checkpoint import read_checkpoint
from diffusion_lit.diffusion import DDIM
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.metrics import Pixels
from diffusion_lit.records import append_record, read_records
from tests import forked, tiny
from tests.tiny import identical, last, load

STATE = ("state_dict", "current_model_state", "averages", "optimizer_states", "global_step")


class Between(L.Callback):
    """Calls something at the end of two steps."""

    def __init__(self, calls: dict[int, Any]) -> None:
        self.calls = calls

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step in self.calls:
            self.calls[trainer.global_step]()


def fit(place: Path, calls: dict[int, Any], steps: int = 9) -> None:
    grid = SampleGrid(every_n_steps=2, num_images=2, batch_size=2, sampler=DDIM(2))
    evaluation = Evaluation(
        None,
        Pixels(2),
        batch_size=4,
        cache_dir=str(place / "cache"),
        sampler=DDIM(2),
        every_n_steps=3,
        training_num_images=3,
    )
    scores: list[L.Callback] = [grid, evaluation]
    callbacks = [Between(calls), Plots(), EMA([0.9]), *scores, Scalars(), Checkpoints(2, keep_every_n_steps=6)]
    logger = tiny.logger(place, every_n_steps=1)
    tiny.trainer(place, steps, callbacks, logger=logger).fit(tiny.module(), tiny.data(), ckpt_path="last")


def test_on_a_full_disk_nothing_is_damaged_and_what_was_not_saved_is_said(tmp_path: Path) -> None:
    place = tmp_path / "run"
    kept: dict[str, bytes] = {}
    names = ("checkpoints/last.ckpt", "checkpoints/previous.ckpt", "samples.png", tiny.CURVES)

    def full() -> None:
        kept.update({name: (place / name).read_bytes() for name in names})
        # No file may grow beyond this: the write fails as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))

    def empty() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        same = [name for name in names if (place / name).read_bytes() == kept[name]]
        (tmp_path / "same.json").write_text(json.dumps([same, sorted(p.name for p in place.rglob("*part*"))]))

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(place, {5: full, 8: empty})
        (tmp_path / "warnings.json").write_text(json.dumps([str(warning.message) for warning in caught]))

    # Not into a file, which could not grow either.
    code = forked.wait(forked.fork(run, Path("/dev/null")))
    assert code == 0
    same, parts = json.loads((tmp_path / "same.json").read_text())
    assert same == list(names)
    assert parts == []
    said = json.loads((tmp_path / "warnings.json").read_text())
    for name in ("last.ckpt", "step_00000006.ckpt", "step_00000006.png", Path(tiny.CURVES).name, "evaluation"):
        assert any(name in line and "could not be written (File too large)" in line for line in said), name
    fit(tmp_path / "whole", {})
    a, b = load(last(tmp_path / "whole")), load(last(place))
    assert [name for name in STATE if not identical(a[name], b[name])] == []
    # Lines are kept until they can be written; the evaluation that failed at step 6 logs none.
    steps, whole = ([row["step"] for row in tiny.rows(run)] for run in (place, tmp_path / "whole"))
    whole.remove(6)
    assert steps == whole


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_processes_the_one_without_room_ends_a_score_for_both_and_training_continues(
    tmp_path: Path, rank: int
) -> None:
    place = tmp_path / "run"

    def limit(size: int) -> None:
        if os.environ["RANK"] == str(rank):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def train() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        evaluation = Evaluation(
            None, Pixels(2), training_num_images=6, batch_size=2, cache_dir=str(place / "cache"), every_n_steps=2
        )
        calls = Between({3: lambda: limit(64), 5: lambda: limit(resource.RLIM_INFINITY)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer = tiny.trainer(place, 6, [calls, evaluation, Checkpoints()], devices=2, strategy="ddp")
            trainer.fit(tiny.module(), tiny.data())
        if trainer.is_global_zero:
            said = [str(warning.message) for warning in caught]
            (tmp_path / "said.json").write_text(json.dumps([line for line in said if "evaluation" in line]))

    code = forked.wait(forked.fork(lambda: forked.in_two(train), tmp_path / "output.txt"))
    assert code == 0, (tmp_path / "output.txt").read_text()
    [said] = json.loads((tmp_path / "said.json").read_text())
    where = "File too large" if rank == 0 else "File too large, on another process"
    assert said == f"evaluation could not be written ({where}); training continues"
    assert [record["step"] for record in read_records(place / "results.jsonl")] == [2, 6]
    assert list((place / "evaluation").iterdir()) == []
    assert load(last(place))["global_step"] == 6


@pytest.mark.further
def test_where_the_run_s_directory_is_gone_training_continues_and_writes_again_when_it_can(tmp_path: Path) -> None:
    place, moved = tmp_path / "run", tmp_path / "moved"

    def gone() -> None:
        place.rename(moved)
        place.touch()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(place, {5: gone, 8: place.unlink})
    said = [str(warning.message) for warning in caught]
    for name in ("last.ckpt", "step_00000006.png", Path(tiny.CURVES).name, "evaluation"):
        assert any(name in line and "could not be written" in line for line in said), name
    fit(tmp_path / "whole", {})
    a, b = load(last(tmp_path / "whole")), load(last(place))
    assert [name for name in STATE if not identical(a[name], b[name])] == []
    assert read_checkpoint(last(moved))["global_step"] == 4


def test_where_the_end_of_training_cannot_be_kept_the_run_fails(tmp_path: Path) -> None:
    place = tmp_path / "run"

    def gone() -> None:
        shutil.rmtree(place)
        place.touch()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OSError, match=r"last\.ckpt could not be written .*: training has ended, and nothing after"):
            fit(place, {3: gone}, steps=4)


def test_a_result_that_does_not_fit_the_disk_is_an_error_and_leaves_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        append_record(path, {"number": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"No space left|File too large"):
            append_record(path, {"number": 2, "long": "x" * 100})
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        append_record(path, {"number": 3})

    assert forked.wait(forked.fork(run, tmp_path / "output.txt")) == 0, (tmp_path / "output.txt").read_text()
    assert read_records(path) == [{"number": 1}, {"number": 3}]
    with path.open("a") as file:
        file.write('{"number": 4')
    append_record(path, {"number": 5})
    assert read_records(path) == [{"number": 1}, {"number": 3}, {"number": 5}]
