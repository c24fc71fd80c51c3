"""Scores while a model trains, of values that are not finite, and on two processes."""

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.diffusion import DDIM
from diffusion_lit.images import to_uint8
from diffusion_lit.loggers import read_curves
from diffusion_lit.metrics import (
    FeatureMoments,
    FrechetDistance,
    Pixels,
    PrecisionRecall,
    Reference,
    Score,
    frechet_distance,
)
from diffusion_lit.records import RESULTS, NonFinite, read_records
from tests import forked, tiny
from tests.evaluation.small import evaluation, run_test, training
from tests.tiny import identical, last, load

# While training


class Record(L.Callback):
    """Calls something after the step of every number."""

    def __init__(self, calls: dict[int, Any]) -> None:
        self.calls = calls

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object) -> None:
        self.calls.get(trainer.global_step, lambda _: None)(pl_module)


def test_a_score_of_training_is_the_distance_of_the_averaged_model_s_images_to_the_training_set(tmp_path: Path) -> None:
    extractor = Pixels(4)
    callback = training(extractor=extractor, training_num_images=10, training_sampler=None, seed=7)
    model = tiny.module()
    tiny.trainer(tmp_path, 2, [EMA([0.9]), callback, Checkpoints()]).fit(model, tiny.data())
    [(step, value)] = read_curves(tmp_path)["frechet/pixels"]
    moments = [FeatureMoments(extractor.num_features) for _ in range(2)]
    with model.averaged_weights():
        moments[0].update(extractor(to_uint8(torch.cat([model.sample([i], 7) for i in range(10)]))))
    moments[1].update(extractor(tiny.data().dataset("train").batch(range(1797))["image"]))
    expected = frechet_distance(*moments[0].mean_and_covariance(), *moments[1].mean_and_covariance())
    assert step == 2
    assert value == pytest.approx(expected, rel=1e-3)
    assert load(tmp_path / "checkpoints" / "best.ckpt")["global_step"] == 2


def test_scores_of_training_come_at_their_steps_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    for at_start in (False, True):
        place = tmp_path / str(at_start)
        tiny.trainer(place, 5, [EMA([0.9]), training(at_start=at_start), Checkpoints()]).fit(tiny.module(), tiny.data())
        steps = [2, 4, 5] if not at_start else [0, 2, 4, 5]
        assert [step for step, _ in read_curves(place)["frechet/pixels"]] == steps
        records = read_records(place / RESULTS)
        assert [record["step"] for record in records] == steps
        assert all(record["num_images"] == 6 and record["evaluations"] == 2 for record in records)
        values = [value for _, value in read_curves(place)["frechet/pixels"]]
        best = load(place / "checkpoints" / "best.ckpt")
        state = best["callbacks"]["Evaluation"]
        assert (best["global_step"], state["best"]) == (steps[values.index(min(values))], min(values))


def test_a_resumed_run_neither_repeats_a_score_nor_forgets_the_best(tmp_path: Path) -> None:
    def fit(place: Path, steps: int, **kwargs: Any) -> Any:
        callbacks = [EMA([0.9]), training(every_n_steps=1, at_start=True, **kwargs), Scalars(), Checkpoints()]
        tiny.trainer(place, steps, callbacks).fit(tiny.module(), tiny.data(), ckpt_path="last")
        return load(last(place))["callbacks"]["Evaluation"]

    whole = fit(tmp_path / "whole", 6)
    fit(tmp_path / "parts", 3)
    assert fit(tmp_path / "parts", 6) == whole
    a, b = (read_curves(tmp_path / name)["frechet/pixels"] for name in ("whole", "parts"))
    assert a == b
    assert [record["step"] for record in read_records(tmp_path / "parts" / RESULTS)] == list(range(7))
    a, b = (load(tmp_path / name / "checkpoints" / "best.ckpt")["state_dict"] for name in ("whole", "parts"))
    assert identical(a, b)
    # The best of other scores says nothing: fewer images are farther from all.
    again = fit(tmp_path / "parts", 7, training_num_images=2)
    assert again["best_step"] == 7


def test_a_best_checkpoint_that_cannot_be_written_is_not_taken_for_written(tmp_path: Path) -> None:
    best = tmp_path / "checkpoints" / "best.ckpt"
    best.mkdir(parents=True)
    callbacks = [EMA([0.9]), training(every_n_steps=1), Record({2: lambda _: best.rmdir()}), Checkpoints()]
    with pytest.warns(UserWarning, match=r"best\.ckpt could not be written .*; training continues"):
        # One after the other, whatever they are: the first that can be written is the best so far.
        tiny.trainer(tmp_path, 3, callbacks).fit(tiny.module(), tiny.data())
    assert load(best)["callbacks"]["Evaluation"]["best_step"] == load(best)["global_step"] == 3


def test_an_option_that_does_not_fit_is_named_as_it_is_written(tmp_path: Path) -> None:
    for name in ("sampler", "training_sampler"):
        callback = training(**{"training_sampler": None, name: DDIM(steps=200)})
        with pytest.raises(ValueError, match=rf"evaluation: .*set --evaluation\.{name}\.steps 100"):
            tiny.trainer(tmp_path / name, 1, [callback]).fit(tiny.module(), tiny.data())


# Values that are not finite


class Broken(DDIM):
    """Makes one image not a number, in one process."""

    rank: int | None = None

    def __call__(self, denoise: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        images = super().__call__(denoise, x, *args, **kwargs)
        if self.rank is None or os.environ.get("RANK", "0") == str(self.rank):
            images[1, 0, 2, 3] = float("nan")
        return images


class Overflowing(Pixels):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mul(1e38).mul(1e3)


class NotANumber(FrechetDistance):
    def __call__(self, *args: Any) -> dict[str, float]:
        return {**super().__call__(*args), "other": float("nan")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": Broken(2)}, r"1 of 4 images have values that are not finite \(seed 0, images 1\)"),
        ({"extractor": Overflowing(2), "reference": "zero.npz"}, r"features of 6 images in pixels are not finite"),
        ({"scores": [NotANumber()]}, r"scores.other=nan is not finite"),
    ],
)
def test_what_is_not_finite_fails_a_test_and_does_not_go_on_record(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    Reference(torch.zeros(12), torch.eye(12), 5, "zero").save("zero.npz")
    with pytest.raises(NonFinite, match=message):
        run_test(tmp_path, evaluation(**{"scores": None, "num_images": 6, **settings}))
    assert read_records(tmp_path / RESULTS) == []
    assert list((tmp_path / "evaluation").iterdir()) == []


def test_what_is_not_finite_while_training_is_a_warning(tmp_path: Path) -> None:
    callback = training(training_sampler=Broken(2))
    grid = SampleGrid(every_n_steps=3, num_images=4, batch_size=4, sampler=Broken(2))
    made = tiny.trainer(tmp_path, 3, [EMA([0.9]), callback, grid, Checkpoints()])
    with pytest.warns(UserWarning, match="was left out") as said:
        made.fit(tiny.module(), tiny.data())
    messages = [str(warning.message) for warning in said]
    assert len([m for m in messages if m.startswith("evaluation was left out: 1 of 4 images have values")]) == 2
    assert len([m for m in messages if "step_00000003.png was left out: 1 of 4 images have values" in m]) == 1
    assert read_records(tmp_path / RESULTS) == []
    assert load(last(tmp_path))["global_step"] == 3
    assert not (tmp_path / "samples.png").exists()


def test_predict_refuses_to_write_images_that_are_not_finite(tmp_path: Path) -> None:
    made = tiny.trainer(tmp_path, callbacks=[], logger=False)
    with pytest.raises(NonFinite, match=r"1 of 3 images have values that are not finite \(seed 5, images 1\)"):
        made.predict(tiny.module(sampler=Broken(2)), num_images=3, seed=5, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# Two processes


def in_two(tmp_path: Path, run: Any) -> str:
    """Runs something in two processes and returns what they print."""
    output = tmp_path / "output.txt"
    code = forked.wait(forked.fork(lambda: forked.in_two(run), output))
    assert code == 0, output.read_text()
    return output.read_text()


@pytest.mark.few(1)
@pytest.mark.parametrize("num_images", [22, 3])
def test_two_processes_score_what_one_scores_also_where_one_has_nothing_to_do(tmp_path: Path, num_images: int) -> None:
    scores: list[Score] = [FrechetDistance(), PrecisionRecall(1)]
    one = run_test(tmp_path / "one", evaluation(scores=scores, num_images=num_images))

    def run() -> None:
        run_test(tmp_path / "two", evaluation(scores=scores, num_images=num_images), devices=2, strategy="ddp")

    in_two(tmp_path, run)
    [two] = read_records(tmp_path / "two" / RESULTS)
    assert two["processes"] == 2
    assert two["num_images"] == num_images
    for name, value in one["scores"].items():
        assert two["scores"][name] == pytest.approx(value, rel=1e-9), name


@pytest.mark.few(1)
@pytest.mark.parametrize("rank", [0, 1])
def test_where_images_of_one_process_are_not_finite_both_leave_the_score_out(tmp_path: Path, rank: int) -> None:
    sampler = Broken(2)
    sampler.rank = rank

    def run() -> None:
        made = tiny.trainer(
            tmp_path, 3, [EMA([0.9]), training(training_sampler=sampler), Checkpoints()], devices=2, strategy="ddp"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.fit(tiny.module(), tiny.data())
        assert made.global_step == 3

    in_two(tmp_path, run)
    assert read_records(tmp_path / RESULTS) == []
    assert list((tmp_path / "evaluation").iterdir()) == []


def test_a_killed_evaluation_continues_on_two_processes(tmp_path: Path) -> None:
    whole = run_test(tmp_path / "whole", evaluation())["scores"]

    class Killed(DDIM):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(*args, **kwargs)

    Killed.__qualname__ = Killed.__name__ = "DDIM"
    place = tmp_path / "parts"
    child = forked.fork(lambda: run_test(place, evaluation(sampler=Killed(3))), tmp_path / "killed.txt")
    assert forked.wait(child) == -signal.SIGKILL
    [folder] = [path for path in (place / "evaluation").iterdir() if path.is_dir()]
    done = sorted(folder.glob("*.npz"))
    assert [path.name for path in done] == ["000000.npz", "000001.npz", "000002.npz"]
    (place / "times.txt").write_text(" ".join(str(path.stat().st_mtime_ns) for path in done))

    def run() -> None:
        run_test(place, evaluation(sampler=DDIM(3)), devices=2, strategy="ddp")

    said = in_two(tmp_path, run)
    assert "continuing after 12 of 22 images" in said
    [record] = read_records(place / RESULTS)
    assert record["scores"] == pytest.approx(whole, rel=1e-9)
    assert list((place / "evaluation").iterdir()) == []
