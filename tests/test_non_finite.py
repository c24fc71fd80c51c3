"""Gradients that are infinite or not a number: the step is skipped and counted, and too many in a row end the run."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.diffusion import Denoiser, DenoisingLoss, Gaussian, NoiseSource, Seen
from diffusion_lit.evaluation import Likelihood
from diffusion_lit.loggers import read_curves
from diffusion_lit.records import NonFinite
from diffusion_lit.system import NonFiniteGradients
from diffusion_lit.types import Condition
from tests import forked, tiny
from tests.tiny import identical, last, load


class Breaks(DenoisingLoss):
    """A loss that is not a number for some image, or overflows in its gradient only, in some calls on some rank."""

    def __init__(self, calls: Sequence[int], image: int | None = 5, rank: int = 0) -> None:
        super().__init__()
        self.calls = calls
        self.image = image
        self.rank = rank
        self.called = 0
        self.seen = 0
        self.here: Callable[[], int] = lambda: 0

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        condition: Condition,
        noise: NoiseSource = Gaussian(),
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        parts = super().__call__(denoiser, x0, condition, noise, generator)
        self.called += 1
        if self.called in self.calls and self.here() == self.rank:
            if self.image is None:
                parts["loss"] = parts["loss"] * 1e30 * 1e30
            else:
                parts["losses"][self.image] = float("nan")
                parts["loss"] = parts["loss"] * float("nan")
        return parts

    def stepped(self, step: int, denoiser: Denoiser, seen: Seen, gather: Any) -> None:
        assert seen.losses.isfinite().all()
        self.seen += 1


class States(L.Callback):
    """Keeps weights, averages, optimiser state and what the objective has seen after every step."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: object) -> None:
        weights = {name: value.detach().clone() for name, value in pl_module.named_parameters()}
        averages = {name: value.clone() for name, value in pl_module.averages.average().items()}
        optimizer = copy.deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.kept.append([weights, averages, optimizer, pl_module.averages.num_updates, pl_module.objective.seen])


@pytest.mark.few(2)
@pytest.mark.parametrize("image", [5, None])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_step_with_non_finite_gradients_changes_nothing_and_is_counted(
    tmp_path: Path, image: int | None, clip: float | None
) -> None:
    states = States()
    model = tiny.module(objective=Breaks([3, 4], image))
    callbacks = [EMA([0.9]), Scalars(), states, Checkpoints()]
    tiny.trainer(tmp_path, 6, callbacks, gradient_clip_val=clip).fit(model, tiny.data())
    changed = [not identical(before, after) for before, after in zip(states.kept, states.kept[1:], strict=False)]
    assert changed == [True, False, False, True, True]
    assert all(value.isfinite().all() for value in load(last(tmp_path))["state_dict"].values())
    curves = read_curves(tmp_path)
    assert curves["train/skipped_steps"] == [(1, 0), (2, 0), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 5, 6]
    # The schedule and the data go on: step 5 sees what it would have seen.
    assert [step for step, _ in curves["train/learning_rate"]] == [1, 2, 3, 4, 5, 6]


def test_of_several_steps_in_one_scalar_only_those_that_count_are_averaged(tmp_path: Path) -> None:
    losses = {}
    for name, every in (("each", 1), ("mean", 4)):
        callbacks = [EMA([0.9]), Scalars()]
        made = tiny.trainer(tmp_path / name, 4, callbacks, log_every_n_steps=every)
        made.fit(tiny.module(objective=Breaks([2])), tiny.data())
        losses[name] = [loss for _, loss in read_curves(tmp_path / name)["train/loss"]]
    assert len(losses["each"]) == 3
    assert losses["mean"] == [pytest.approx(sum(losses["each"]) / 3, rel=1e-6)]


def test_an_accumulated_step_with_one_bad_batch_is_skipped_as_a_whole(tmp_path: Path) -> None:
    states = States()
    model = tiny.module(objective=Breaks([4]))
    callbacks = [EMA([0.9]), states, Scalars()]
    tiny.trainer(tmp_path, 3, callbacks, accumulate_grad_batches=2).fit(model, tiny.data())
    assert model.skipped_steps == 1
    assert identical(states.kept[1], states.kept[3])
    assert not identical(states.kept[3], states.kept[5])


def test_so_many_in_a_row_stop_the_run_and_name_step_rate_images_and_checkpoint(tmp_path: Path) -> None:
    model = tiny.module(objective=Breaks([2, 4, 5, 6], 7), max_skipped_steps=3)
    data = tiny.data()
    seen: list[Tensor] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, *_: object) -> None:
            seen.append(batch["image"].clone())

    with pytest.raises(NonFiniteGradients) as stopped:
        tiny.trainer(tmp_path, 9, [EMA([0.9]), Scalars(), Keep(), Checkpoints()]).fit(model, data)
    message = str(stopped.value)
    images = data.images_of_step(6)
    read = data.on_after_batch_transfer(data.dataset("train").batch(images), 0)["image"]
    assert torch.equal(read, seen[5])
    assert f"images with non-finite losses: {images[7]};" in message
    assert "in 3 steps in a row, the last of them step 6," in message
    assert f"learning rate of {2e-3 * (0.1 + 0.9 * 5 / 9):.3g};" in message
    assert f"weights of step 3 are in {last(tmp_path)}" in message
    assert "\n" not in message
    checkpoint = load(last(tmp_path))
    assert checkpoint["global_step"] == 6
    assert checkpoint["skipped_steps"] == [4, 3]
    # Resumed, the run tries once more.
    again = tiny.module(objective=Breaks([1], 7), max_skipped_steps=3)
    with pytest.raises(NonFiniteGradients, match="in 3 steps in a row, the last of them step 7,"):
        tiny.trainer(tmp_path, 9).fit(again, tiny.data(), ckpt_path="last")
    mended = tiny.module(max_skipped_steps=3)
    tiny.trainer(tmp_path, 9).fit(mended, tiny.data(), ckpt_path="last")
    assert (mended.skipped_steps, mended.skipped_in_a_row) == (5, 0)


def test_the_count_outlives_a_pause(tmp_path: Path) -> None:
    for steps in (3, 6):
        calls = [2, 3] if steps == 3 else [1]
        model = tiny.module(objective=Breaks(calls), max_skipped_steps=3)
        made = tiny.trainer(tmp_path, steps)
        if steps == 3:
            made.fit(model, tiny.data(), ckpt_path="last")
        else:
            with pytest.raises(NonFiniteGradients, match="the last of them step 4"):
                made.fit(model, tiny.data(), ckpt_path="last")


def test_where_nobody_looks_such_gradients_reach_the_weights(tmp_path: Path) -> None:
    model = tiny.module(objective=Breaks([2]), max_skipped_steps=None)

    class Deaf(Breaks):
        def stepped(self, *_: Any) -> None:
            """Whatever they are."""

    model.objective = Deaf([2])
    tiny.trainer(tmp_path, 2, [EMA([0.9])], logger=False).fit(model, tiny.data())
    assert not all(value.isfinite().all() for value in model.parameters())


def test_two_processes_skip_together_and_name_the_image_of_whichever_saw_it(tmp_path: Path) -> None:
    def run() -> None:
        objective = Breaks([2, 4, 5], 3, rank=1)
        model = tiny.module(objective=objective, max_skipped_steps=2)
        objective.here = lambda: model.global_rank
        made = tiny.trainer(tmp_path / "run", 9, devices=2, strategy="ddp")
        with pytest.raises(NonFiniteGradients) as stopped:
            made.fit(model, tiny.data())
        (tmp_path / f"rank_{model.global_rank}").write_text(str(stopped.value))

    assert forked.wait(forked.fork(lambda: forked.in_two(run), tmp_path / "output.txt")) == 0
    first, second = ((tmp_path / f"rank_{rank}").read_text() for rank in (0, 1))
    assert first == second
    data = tiny.data()
    data.setup("fit")
    assert f"the last of them step 5, at a learning rate of {2e-3 * (0.1 + 0.9 * 4 / 9):.3g};" in first
    assert f"losses: {data.images_of_step(5)[tiny.BATCH // 2 + 3]};" in first


def test_a_learning_rate_that_blows_up_ends_in_one_line(tmp_path: Path) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e30)

    model = tiny.module(optimizer=optimizer, lr_scheduler=None)
    with pytest.raises(NonFiniteGradients, match=r"^gradients were not finite in 10 steps in a row") as stopped:
        tiny.trainer(tmp_path, 40).fit(model, tiny.data())
    assert "learning rate of 1e+30" in str(stopped.value)


def spoil(value: Any) -> bool:
    """Makes the first number with a fraction in a part of a checkpoint not a number; whether there is one."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim:
        value.view(-1)[0] = float("nan")
        return True
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return any(spoil(part) for part in inner)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "entry", ["state_dict", "current_model_state", "averages", "optimizer_states", "objective", "lr"]
)
def test_a_run_does_not_continue_from_anything_that_is_not_finite(entry: str, tmp_path: Path) -> None:
    tiny.trainer(tmp_path, 2, [EMA([0.9, 0.5]), Checkpoints()]).fit(tiny.module(), tiny.data())
    checkpoint = load(last(tmp_path))
    if entry == "objective":
        checkpoint[entry] = {"history": torch.zeros(3)}
    if entry == "lr":
        checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] = float("nan")
    else:
        assert spoil(checkpoint[entry])
    torch.save(checkpoint, last(tmp_path))
    with pytest.raises(ValueError, match=r"(is|are) not finite.*take an earlier checkpoint"):
        tiny.trainer(tmp_path, 4, [EMA([0.9, 0.5]), Checkpoints()]).fit(tiny.module(), tiny.data(), ckpt_path="last")


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_loss_that_is_not_finite_ends_an_evaluation(command: str, tmp_path: Path) -> None:
    model = tiny.module()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)
    with pytest.raises(NonFinite, match=r"^(val|test)/loss=nan"):
        getattr(tiny.trainer(tmp_path, limit_val_batches=1, limit_test_batches=1), command)(model, tiny.data())


def test_a_bound_that_is_not_finite_leaves_nothing_on_record(tmp_path: Path) -> None:
    model = tiny.module()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)
    likelihood = Likelihood("test", num_images=2, num_terms=2)
    with pytest.raises(NonFinite, match="the bits per dimension of 2 test images are not finite, first of image 0"):
        tiny.trainer(tmp_path, callbacks=[likelihood], limit_test_batches=1).test(model, tiny.data())
    assert not list(tmp_path.glob("bits_per_dim*"))
    assert not (tmp_path / "results.jsonl").exists()


def test_images_that_are_not_finite_leave_no_folder(tmp_path: Path) -> None:
    """Where a folder was there before, or holds something, it stays."""
    model = tiny.module()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1e30)
    (tmp_path / "before").mkdir()
    for out in (None, "new/er", "before"):
        with pytest.raises(NonFinite, match="2 of 2 images have values that are not finite"):
            tiny.trainer(tmp_path).predict(model, num_images=2, out=None if out is None else str(tmp_path / out))
    assert list(tmp_path.iterdir()) == [tmp_path / "before"]


def test_a_bound_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_skipped_steps=0 must be at least 1"):
        tiny.module(max_skipped_steps=0)
