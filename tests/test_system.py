"""What every system gets from its base class, with one optimiser and with several."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import lightning.pytorch as L
import pytest
import torch

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.stepping import totals
from diffusion_lit.system import NonFiniteGradients, System
from tests import tiny
from tests.tiny import Pair


class TwiceCounted(Pair):
    """Takes the optimisers as Lightning hands them out, so that both are counted."""

    def all_optimizers(self) -> list[Any]:
        return list(self.optimizers())


Trained = TypeVar("Trained", bound=System)


def fit(run_dir: Path, system: Trained, max_steps: int = 4, **kwargs: Any) -> Trained:
    tiny.trainer(run_dir, max_steps, **kwargs).fit(system, tiny.data())
    return system


def test_of_two_optimisers_one_counts_steps_and_both_move_their_own_weights(tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in Pair().named_parameters()}
    trainer = tiny.trainer(tmp_path, max_steps=3)
    system = Pair()
    trainer.fit(system, tiny.data())
    assert trainer.global_step == 3
    assert all(not torch.equal(p, before[name]) for name, p in system.named_parameters())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 2**3)
    states = trainer.optimizers[1].state.values()
    assert [int(state["step"]) for state in states] == [3, 3]


def test_only_the_named_weights_are_averaged_and_only_by_whole_steps(tmp_path: Path) -> None:
    system = fit(tmp_path, Pair(), 2, callbacks=[EMA([0.5]), Scalars(), Checkpoints()])
    assert system.averages is not None
    assert system.averages.num_updates == 2
    assert set(system.averages.average()) == {"first.weight", "first.bias"}
    checkpoint = tiny.load(tiny.last(tmp_path))
    assert torch.equal(checkpoint["state_dict"]["second.weight"], system.second.weight)
    assert not torch.equal(checkpoint["state_dict"]["first.weight"], system.first.weight)


def test_a_run_with_two_optimisers_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", Pair(), 6)
    fit(tmp_path / "parts", Pair(), 3)
    resumed = Pair()
    tiny.trainer(tmp_path / "parts", 6).fit(resumed, tiny.data(), ckpt_path="last")
    assert tiny.identical(whole.state_dict(), resumed.state_dict())
    a, b = (tiny.load(tiny.last(tmp_path / name)) for name in ("whole", "parts"))
    for key in ("optimizer_states", "lr_schedulers", "averages", "current_model_state", "state_dict"):
        assert tiny.identical(a[key], b[key]), key


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_gradients_of_each_optimiser_are_clipped_by_their_own_norm(tmp_path: Path, limit: float) -> None:
    system = Pair()
    moved = system.first.weight.detach().clone(), system.first.bias.detach().clone()
    trainer = tiny.trainer(tmp_path, 1, gradient_clip_val=limit)
    trainer.fit(system, tiny.data())
    step = torch.cat([(a - b).flatten() for a, b in zip(moved, system.first.parameters(), strict=True)]).detach()
    assert system.gradient_norm is not None
    assert float(step.norm()) == pytest.approx(0.1 * min(limit, float(system.gradient_norm)), rel=1e-4)


def test_a_step_with_a_bad_gradient_moves_nothing_of_that_optimiser_and_no_average(tmp_path: Path) -> None:
    system = Pair(bad_at=(2,))
    trainer = tiny.trainer(tmp_path, 1)
    trainer.fit(system, tiny.data())
    before = {name: p.detach().clone() for name, p in system.named_parameters()}
    trainer = tiny.trainer(tmp_path, 2)
    trainer.fit(system, tiny.data(), ckpt_path="last")
    assert torch.equal(system.first.weight, before["first.weight"])
    assert system.skipped_steps == 1
    assert system.skipped_in_a_row == 1
    assert system.averages is not None
    assert system.averages.num_updates == 1
    assert trainer.global_step == 2


def test_too_many_bad_steps_end_a_run_and_leave_a_checkpoint_of_them(tmp_path: Path) -> None:
    system = Pair(bad_at=(2, 3, 4, 5), max_skipped_steps=3)
    with pytest.raises(NonFiniteGradients, match=r"in 3 steps in a row, the last of them step 4"):
        fit(tmp_path, system, 9)
    checkpoint = tiny.load(tiny.last(tmp_path))
    assert checkpoint["global_step"] == 4
    assert checkpoint["skipped_steps"] == [3, 3]


def test_after_too_many_bad_steps_the_continued_run_tries_the_next_one(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteGradients, match=r"in 2 steps in a row, the last of them step 3"):
        fit(tmp_path, Pair(bad_at=(2, 3), max_skipped_steps=2), 9)
    with pytest.raises(NonFiniteGradients, match=r"in 2 steps in a row, the last of them step 4"):
        tiny.trainer(tmp_path, 6).fit(Pair(bad_at=(4,), max_skipped_steps=2), tiny.data(), ckpt_path="last")
    cured = Pair(max_skipped_steps=2)
    tiny.trainer(tmp_path, 6).fit(cured, tiny.data(), ckpt_path="last")
    assert (cured.skipped_steps, cured.skipped_in_a_row) == (3, 0)


def test_two_optimizers_train_float32_weights_in_mixed_precision_near_the_exact_ones(tmp_path: Path) -> None:
    exact, mixed = (fit(tmp_path / name, Pair(), 3, precision=name) for name in ("32-true", "bf16-mixed"))
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert not tiny.identical(exact.state_dict(), mixed.state_dict())
    for name, value in exact.state_dict().items():
        torch.testing.assert_close(mixed.state_dict()[name], value, rtol=0.05, atol=5e-3)


def test_each_step_gives_its_number_to_what_learns_from_it(tmp_path: Path) -> None:
    for name, make, accumulate in (("pair", Pair, 1), ("module", tiny.module, 2)):
        steps: list[tuple[int, int]] = []
        system = make()
        system.learn = lambda outputs, seen=steps, of=system: seen.append((of.step, len(outputs)))  # type: ignore[method-assign, misc]
        fit(tmp_path / name, system, 3, accumulate_grad_batches=accumulate)
        assert steps == [(1, accumulate), (2, accumulate), (3, accumulate)], name


def test_a_validation_that_was_broken_off_leaves_nothing_to_the_next(tmp_path: Path) -> None:
    class Fails(L.Callback):
        def on_validation_batch_end(self, *_: object) -> None:
            raise ArithmeticError

    system = tiny.module()
    for limit, callbacks in ((2, [Fails()]), (1, [])):
        made = tiny.trainer(tmp_path, callbacks=callbacks, logger=False, limit_val_batches=limit)
        if callbacks:
            with pytest.raises(ArithmeticError):
                made.validate(system, tiny.data(seed=1))
        else:
            [again] = made.validate(system, tiny.data())
    [alone] = tiny.trainer(tmp_path, callbacks=[], logger=False, limit_val_batches=1).validate(
        tiny.module(), tiny.data()
    )
    assert again == alone


def test_a_second_counted_optimiser_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="2 times instead of once; take the optimisers from `all_optimizers`"):
        fit(tmp_path, TwiceCounted(), 2)


def test_several_optimisers_refuse_accumulated_batches_before_lightning_does(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.accumulate_grad_batches=2: a Pair has several optimisers"):
        fit(tmp_path, Pair(), 2, accumulate_grad_batches=2)


def test_several_optimisers_refuse_a_scaled_loss() -> None:
    # On a CPU Lightning turns 16-mixed into bf16-mixed.
    trainer: Any = SimpleNamespace(gradient_clip_algorithm=None, accumulate_grad_batches=1, precision="16-mixed")
    with pytest.raises(ValueError, match=r"trainer\.precision=16-mixed: a Pair has several optimisers"):
        Pair().check_training(trainer)


def test_totals_are_sums_over_images_as_a_whole_and_by_quarter_of_the_time() -> None:
    parts = {
        "loss": torch.tensor(2.0),
        "t": torch.tensor([0.1, 0.25, 0.26, 1.0]),
        "losses": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "accuracy": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "rate": torch.tensor(0.5),
    }
    found = {name: total.tolist() for name, total in totals(parts, 4).items()}
    assert found["loss"] == [8.0, 4.0]
    assert found["loss_t_0.00_0.25"] == [3.0, 2.0]
    assert found["loss_t_0.25_0.50"] == [3.0, 1.0]
    assert found["loss_t_0.50_0.75"] == [0.0, 0.0]
    assert found["loss_t_0.75_1.00"] == [4.0, 1.0]
    assert found["accuracy"] == [3.0, 4.0]
    assert found["accuracy_t_0.00_0.25"] == [1.0, 2.0]
    assert found["rate"] == [2.0, 4.0]
