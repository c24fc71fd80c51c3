from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor

from diffusion_lit.averaging import WeightAverages
from diffusion_lit.callbacks import EMA, Checkpoints, SampleGrid, Scalars
from diffusion_lit.diffusion import (
    DDIM,
    X0,
    DenoisingLoss,
    Eps,
    MinSNR,
    Parameterization,
    PosteriorMean,
    Simple,
    V,
    Variational,
    Weighting,
)
from diffusion_lit.evaluation import Evaluation
from diffusion_lit.images import from_uint8
from diffusion_lit.methods.feature_network import FeatureNetworkModule
from diffusion_lit.metrics import Pixels
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ConvClassifier, UNet
from diffusion_lit.stepping import TRAINING, VALIDATION, seed_step
from diffusion_lit.types import Batch
from tests import tiny
from tests.tiny import curves, identical, last, load

STATE = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step")


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(identical(a[name], b[name]) for name in STATE)


class Failure(Exception):
    """What goes wrong in a test."""


class FailAt(L.Callback):
    """Raises in the n-th call of a hook."""

    def __init__(self, hook: str, call: int) -> None:
        self.calls = 0

        def fail(*_: object, **__: object) -> None:
            self.calls += 1
            if self.calls == call:
                raise Failure

        setattr(self, hook, fail)


# Resuming


@pytest.mark.few(1)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, accumulate: int) -> None:
    def callbacks() -> list[L.Callback]:
        return [EMA([0.9, 0.5], warmup=True), Scalars(), Checkpoints()]

    settings = {
        "accumulate_grad_batches": accumulate,
        "log_every_n_steps": 2,
        "val_check_interval": 4 * accumulate,
        "limit_val_batches": 1,
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.trainer(whole, 10, callbacks(), **settings).fit(tiny.module(), tiny.data())
    # Step 5 lies between two logged steps and, with 57 batches in an epoch, in the middle of one.
    tiny.trainer(parts, 5, callbacks(), **settings).fit(tiny.module(), tiny.data())
    tiny.trainer(parts, 10, callbacks(), **settings).fit(tiny.module(), tiny.data(), ckpt_path="last")
    assert same_state(load(last(whole)), load(last(parts)))
    assert curves(whole) == curves(parts)
    assert {"train/loss", "val/loss", "train/gradient_norm"} <= curves(whole).keys()
    assert [step for step, _ in curves(whole)["train/loss"]] == [2, 4, 6, 8, 10]


def test_of_runs_continued_from_one_file_in_one_process_none_changes_what_the_next_reads(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "first", 2).fit(tiny.module(), tiny.data())
    ends = []
    for name in ("second", "third"):
        made = tiny.trainer(tmp_path / name, 5)
        made.fit(tiny.module(), tiny.data(), ckpt_path=str(last(tmp_path / "first")))
        ends.append(load(last(tmp_path / name)))
    assert same_state(*ends)


@pytest.mark.further
def test_a_run_resumes_exactly_across_the_end_of_an_epoch(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data = {"batch_size": 500}
    tiny.trainer(whole, 5).fit(tiny.module(), tiny.data(**data))
    for steps in (3, 4, 5):
        tiny.trainer(parts, steps).fit(tiny.module(), tiny.data(**data), ckpt_path="last")
    assert same_state(load(last(whole)), load(last(parts)))
    assert curves(whole) == curves(parts)


HOOKS = [
    ("on_train_batch_start", 5, 2),
    ("on_train_batch_start", 6, 2),
    ("on_before_backward", 6, 2),
    ("on_before_optimizer_step", 3, 2),
    ("on_train_batch_end", 5, 2),
    # Not yet done with its step: the scores of others, and its validation.
    ("on_train_batch_end", 4, None),
    ("on_validation_start", 1, None),
    ("on_validation_batch_end", 1, None),
]
"""Where a run of two batches per step fails, at which call, and the step that it keeps."""


@pytest.mark.few(2)
@pytest.mark.parametrize(("hook", "call", "kept"), HOOKS)
def test_a_failed_run_keeps_its_newest_whole_step_and_resumes_exactly(
    tmp_path: Path, hook: str, call: int, kept: int | None
) -> None:
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 4, "limit_val_batches": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.trainer(whole, 4, **settings).fit(tiny.module(), tiny.data())
    callbacks = [EMA([0.9]), Scalars(), FailAt(hook, call), Checkpoints()]
    with pytest.raises(Failure):
        tiny.trainer(parts, 4, callbacks, **settings).fit(tiny.module(), tiny.data())
    assert (load(last(parts))["global_step"] if last(parts).exists() else None) == kept
    tiny.trainer(parts, 4, **settings).fit(tiny.module(), tiny.data(), ckpt_path="last")
    assert same_state(load(last(whole)), load(last(parts)))
    assert curves(whole) == curves(parts)


@pytest.mark.parametrize(("hook", "call", "kept"), [("on_train_batch_start", 5, 2), ("on_train_batch_end", 5, None)])
def test_running_means_that_have_moved_without_a_step_are_not_kept(
    tmp_path: Path, hook: str, call: int, kept: int | None
) -> None:
    def classifier() -> FeatureNetworkModule:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = ConvClassifier(image_size=8, in_channels=1, num_classes=10, width=8)
        return FeatureNetworkModule(network, tiny.optimizer)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.trainer(whole, 4, accumulate_grad_batches=2).fit(classifier(), tiny.data())
    callbacks = [EMA([0.9]), Scalars(), FailAt(hook, call), Checkpoints()]
    with pytest.raises(Failure):
        tiny.trainer(parts, 4, callbacks, accumulate_grad_batches=2).fit(classifier(), tiny.data())
    assert (load(last(parts))["global_step"] if last(parts).exists() else None) == kept
    tiny.trainer(parts, 4, accumulate_grad_batches=2).fit(classifier(), tiny.data(), ckpt_path="last")
    assert same_state(load(last(whole)), load(last(parts)))


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "first", 2).fit(tiny.module(), tiny.data())
    for name, start in (("new", None), ("continued", str(last(tmp_path / "first")))):
        callbacks = [EMA([0.9]), FailAt("on_before_optimizer_step", 1), Checkpoints()]
        with pytest.raises(Failure):
            tiny.trainer(tmp_path / name, 4, callbacks).fit(tiny.module(), tiny.data(), ckpt_path=start)
        assert not last(tmp_path / name).exists()


def test_a_decay_that_is_new_when_resuming_starts_at_the_primary_average(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, 2).fit(tiny.module(), tiny.data())
    primary = load(last(tmp_path))["state_dict"]
    model = tiny.module()
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, DiffusionModule)
            assert pl_module.averages is not None
            seen.update({n: v.clone() for n, v in pl_module.averages.average("0.5").items()})

    callbacks = [EMA([0.9, 0.5]), Look(), Scalars(), Checkpoints()]
    tiny.trainer(tmp_path, 3, callbacks).fit(model, tiny.data(), ckpt_path="last")
    assert identical(seen, {n: primary[n] for n in seen})


# Averages


@pytest.mark.parametrize(("warmup", "accumulate"), [(False, 1), (True, 1), (False, 2)])
def test_averages_follow_the_recursion_over_the_weights_of_every_optimiser_step(
    tmp_path: Path, warmup: bool, accumulate: int
) -> None:
    decays = [0.999, 0.7]
    recorder = tiny.Recorder()
    model = tiny.module()
    tiny.trainer(tmp_path, 5, [EMA(decays, warmup), recorder], accumulate_grad_batches=accumulate).fit(
        model, tiny.data()
    )
    assert len(recorder.weights) == 6
    assert model.averages is not None
    for decay in decays:
        expected = dict(recorder.weights[0])
        for n, weights in enumerate(recorder.weights[1:], start=1):
            d = min(decay, (1 + n) / (10 + n)) if warmup else decay
            expected = {name: d * value + (1 - d) * weights[name] for name, value in expected.items()}
        for name, value in model.averages.average(str(decay)).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=3e-7)


def test_what_is_averaged_does_not_depend_on_the_order_of_callbacks(tmp_path: Path) -> None:
    states = []
    for i, order in enumerate([1, -1]):
        callbacks = [EMA([0.9]), SampleGrid(every_n_steps=1, num_images=2, sampler=DDIM(2)), Scalars(), Checkpoints()][
            ::order
        ]
        tiny.trainer(tmp_path / str(i), 3, callbacks).fit(tiny.module(), tiny.data())
        states.append(load(last(tmp_path / str(i))))
    assert same_state(*states)
    pictures = [(tmp_path / str(i) / "samples" / "step_00000002.png").read_bytes() for i in range(2)]
    assert pictures[0] == pictures[1]


def test_looking_at_the_model_does_not_change_its_training(tmp_path: Path) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    tiny.trainer(plain, 3).fit(tiny.module(), tiny.data())
    evaluation = Evaluation(
        None, Pixels(2), batch_size=4, every_n_steps=1, training_num_images=4, at_start=True, sampler=DDIM(2)
    )
    callbacks = [
        EMA([0.9]),
        SampleGrid(every_n_steps=1, num_images=2, sampler=DDIM(2)),
        evaluation,
        Scalars(),
        Checkpoints(),
    ]
    settings = {"val_check_interval": 1, "limit_val_batches": 1}
    tiny.trainer(watched, 3, callbacks, **settings).fit(tiny.module(), tiny.data())
    assert same_state(load(last(plain)), load(last(watched)))


def test_a_checkpoint_holds_raw_and_averaged_weights_as_plain_data(tmp_path: Path) -> None:
    recorder = tiny.Recorder()
    tiny.trainer(tmp_path, 3, [EMA([0.5]), recorder, Checkpoints()]).fit(tiny.module(), tiny.data())
    checkpoint = load(last(tmp_path))
    expected = recorder.weights[0]
    for weights in recorder.weights[1:]:
        expected = {name: (value + weights[name]) / 2 for name, value in expected.items()}
    for name, value in checkpoint["state_dict"].items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=3e-7)
        assert torch.equal(checkpoint["current_model_state"][name].double(), recorder.weights[-1][name])


def test_a_checkpoint_written_while_the_average_is_active_has_both_the_right_way_round(tmp_path: Path) -> None:
    class SaveInside(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert isinstance(pl_module, DiffusionModule)
            trainer.save_checkpoint(tmp_path / "outside.ckpt", weights_only=False)
            with pl_module.averaged_weights():
                trainer.save_checkpoint(tmp_path / "inside.ckpt", weights_only=False)

    tiny.trainer(tmp_path, 3, [EMA([0.9]), SaveInside()]).fit(tiny.module(), tiny.data())
    assert same_state(load(tmp_path / "inside.ckpt"), load(tmp_path / "outside.ckpt"))


def test_an_error_in_validation_leaves_the_raw_weights_in_the_model(tmp_path: Path) -> None:
    class Fails(DiffusionModule):
        def losses(self, batch: Batch) -> dict[str, Tensor]:
            if self.trainer.validating:
                assert self.averages is not None
                assert self.averages.active == "0.5"
                raise Failure
            return super().losses(batch)

    recorder = tiny.Recorder()
    model = Fails(tiny.network(), optimizer=tiny.optimizer)
    callbacks = [EMA([0.5]), recorder, Checkpoints()]
    with pytest.raises(Failure):
        tiny.trainer(tmp_path, 3, callbacks, val_check_interval=2, limit_val_batches=1).fit(model, tiny.data())
    for name, value in model.named_parameters():
        assert torch.equal(value.double(), recorder.weights[2][name])
    assert model.averages is not None
    assert any(not torch.equal(v, model.get_parameter(n)) for n, v in model.averages.average().items())


def test_a_weights_only_checkpoint_holds_the_average_and_says_that_it_has_no_other(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, 3)
    trainer.fit(tiny.module(), tiny.data())
    trainer.save_checkpoint(tmp_path / "small.ckpt", weights_only=True)
    small, full = load(tmp_path / "small.ckpt"), load(last(tmp_path))
    assert identical(small["state_dict"], full["state_dict"])
    assert "current_model_state" not in small
    model = tiny.module()
    tiny.trainer(tmp_path, limit_val_batches=1).validate(model, tiny.data(), str(tmp_path / "small.ckpt"))
    assert identical(dict(model.state_dict()), small["state_dict"])
    with pytest.raises(ValueError, match=r"weights='raw' are not in the checkpoint; it has \['0\.9', 'averaged'\]"):
        tiny.trainer(tmp_path, limit_val_batches=1).validate(
            tiny.module(), tiny.data(), str(tmp_path / "small.ckpt"), weights="raw"
        )


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with two averages."""
    place = tmp_path_factory.mktemp("run")
    tiny.trainer(place, 3, [EMA([0.9, 0.5]), Checkpoints()]).fit(tiny.module(), tiny.data())
    return place


@pytest.mark.few(1)
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_but_fit_takes_the_weights_asked_for(run_dir: Path, tmp_path: Path, stage: str) -> None:
    checkpoint = load(last(run_dir))
    expected = {
        "averaged": checkpoint["state_dict"],
        "0.9": checkpoint["state_dict"],
        "raw": checkpoint["current_model_state"],
        "0.5": checkpoint["averages"]["averages"]["0.5"],
    }
    for weights, state in expected.items():
        model = tiny.module()
        more = {"num_images": 1, "batch_size": 1, "out": str(tmp_path / weights)} if stage == "predict" else {}
        trainer = tiny.trainer(
            tmp_path, callbacks=[Checkpoints()], logger=False, limit_test_batches=1, limit_val_batches=1
        )
        data = None if stage == "predict" else tiny.data()
        getattr(trainer, stage)(model, data, ckpt_path=str(last(run_dir)), weights=weights, **more)
        assert identical(dict(model.named_parameters()), state) or all(
            torch.equal(value, state[name]) for name, value in model.named_parameters()
        )
    with pytest.raises(ValueError, match=r"weights='0\.7' are not in the checkpoint; it has \['0\.5', '0\.9'"):
        tiny.trainer(tmp_path).test(tiny.module(), tiny.data(), str(last(run_dir)), weights="0.7")


def test_after_fit_in_one_process_the_average_is_looked_at_unless_raw_is_asked_for(tmp_path: Path) -> None:
    model = tiny.module()
    trainer = tiny.trainer(tmp_path, 3, limit_test_batches=1)
    trainer.fit(model, tiny.data())
    [averaged] = trainer.test(model, tiny.data())
    [raw] = trainer.test(model, tiny.data(), weights="raw")
    [loaded] = tiny.trainer(tmp_path, logger=False, limit_test_batches=1).test(
        tiny.module(), tiny.data(), str(last(tmp_path))
    )
    assert averaged == loaded
    assert raw != averaged
    with pytest.raises(ValueError, match=r"'0\.3' are not averaged"):
        trainer.test(model, tiny.data(), weights="0.3")


def test_averages_do_not_nest_but_the_same_one_may_be_entered_again() -> None:
    model = tiny.module()
    model.averages = WeightAverages(model, [0.9, 0.5])
    with model.averaged_weights(), model.averaged_weights("0.9"):
        with pytest.raises(RuntimeError, match=r"the average 0\.9 is active already"), model.averaged_weights("0.5"):
            pass
        assert model.averages.active == "0.9"
    assert model.averages.active is None


@pytest.mark.parametrize("decays", [[], [1.0], [-0.1], [0.9, 0.9]])
def test_impossible_decays_are_refused(decays: list[float]) -> None:
    with pytest.raises(ValueError, match=r"ema\.decays=.* must be distinct values in \[0, 1\)"):
        WeightAverages(tiny.network(), decays)


def test_only_trainable_parameters_are_averaged() -> None:
    network = tiny.network()
    network.conv_in.requires_grad_(False)
    averages = WeightAverages(network, [0.9]).average()
    assert averages.keys() == {n for n, _ in network.named_parameters() if not n.startswith("conv_in")}


def test_training_works_without_averages(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny.trainer(whole, 4, [Checkpoints()]).fit(tiny.module(), tiny.data())
    for steps in (2, 4):
        tiny.trainer(parts, steps, [Checkpoints()]).fit(tiny.module(), tiny.data(), ckpt_path="last")
    a, b = load(last(whole)), load(last(parts))
    assert identical(a["state_dict"], b["state_dict"])
    assert "averages" not in a
    trainer = tiny.trainer(tmp_path, callbacks=[Checkpoints()], logger=False)
    trainer.predict(tiny.module(), ckpt_path=str(last(whole)), num_images=1, batch_size=1, out=str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"it has \['averaged', 'raw'\]"):
        trainer.predict(tiny.module(), ckpt_path=str(last(whole)), weights="0.9", out=str(tmp_path / "again"))


# Steps


@pytest.mark.few(4)
@pytest.mark.parametrize("parameterization", [Eps(), X0(), V(), PosteriorMean()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("weighting", [Simple(), Variational(), MinSNR()], ids=lambda w: type(w).__name__)
def test_every_parameterization_trains_two_batches_under_every_weighting(
    tmp_path: Path, parameterization: Parameterization, weighting: Weighting
) -> None:
    recorder = tiny.Recorder()
    model = tiny.module(parameterization=parameterization, objective=DenoisingLoss(weighting))
    tiny.trainer(tmp_path, 2, [recorder], logger=False).fit(model, tiny.data())
    assert all(p.isfinite().all() for p in model.parameters())
    moved = [
        any(not torch.equal(after[name], before[name]) for name in before)
        for before, after in zip(recorder.weights, recorder.weights[1:], strict=False)
    ]
    assert moved == [True, True]


def test_mixed_precision_trains_float32_weights_whose_loss_is_near_the_exact_one(tmp_path: Path) -> None:
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        model = tiny.module()
        callbacks = [EMA([0.9]), SampleGrid(every_n_steps=2, num_images=2, sampler=DDIM(2)), Scalars(), Checkpoints()]
        tiny.trainer(tmp_path / precision, 4, callbacks, precision=precision).fit(model, tiny.data())
        losses[precision] = curves(tmp_path / precision)["train/loss"]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert losses["bf16-mixed"] != losses["32-true"]
    for (_, exact), (_, mixed) in zip(*losses.values(), strict=True):
        assert mixed == pytest.approx(exact, rel=0.02)


def test_accumulated_batches_give_the_mean_gradient_over_them(tmp_path: Path) -> None:
    gradients: list[list[Tensor]] = []

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            gradients.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])

    model = tiny.module(network=tiny.network(dropout=0.0))
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": None}
    tiny.trainer(tmp_path, 1, [Keep()], **settings).fit(model, tiny.data())

    again = tiny.module(network=tiny.network(dropout=0.0))
    batch = next(iter(tiny.data().train_dataloader()))
    losses = []
    for i, images in enumerate(from_uint8(batch["image"]).chunk(2)):
        seed_step(3, TRAINING, 0, i)
        losses.append(again.losses({"image": images})["loss"])
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(again.parameters()))
    assert len(gradients) == 1
    for got, want in zip(gradients[0], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_to_the_global_norm_and_the_norm_before_is_kept(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
            gradients = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                seen.append(torch.cat(gradients).norm())

    for limit in (1e-3, None):
        model = tiny.module()
        tiny.trainer(tmp_path, 2, [Keep()], gradient_clip_val=limit, logger=False).fit(model, tiny.data())
        assert model.gradient_norm is not None
        assert float(seen[-1]) == pytest.approx(limit or float(model.gradient_norm), rel=1e-3)
        assert float(model.gradient_norm) > 1e-2
    with pytest.raises(ValueError, match="only 'norm'"):
        tiny.trainer(tmp_path, 2, [], gradient_clip_algorithm="value", logger=False).fit(tiny.module(), tiny.data())


def test_validation_and_test_losses_are_means_over_all_images_with_the_averaged_weights(tmp_path: Path) -> None:
    model = tiny.module()
    trainer = tiny.trainer(tmp_path, 3, val_check_interval=3, limit_val_batches=None)
    data = tiny.data()
    trainer.fit(model, data)
    [(step, logged)] = curves(tmp_path)["val/loss"]
    [tested] = trainer.test(model, data)
    assert model.averages is not None
    total = 0.0
    with model.averages.swapped(model), torch.no_grad():
        model.eval()
        images = from_uint8(data.dataset("val").batch(range(1797))["image"])
        batches = [images[:599], images[599:1198], images[1198:]]
        for i, batch in enumerate(batches):
            seed_step(3, VALIDATION, 0, i)
            total += float(model.losses({"image": batch})["losses"].sum())
    assert step in (2, 3)
    assert logged == pytest.approx(total / 1797, rel=1e-5)
    assert tested["test/loss"] == pytest.approx(total / 1797, rel=1e-5)


def test_an_empty_test_batch_counts_for_nothing(tmp_path: Path) -> None:
    model = tiny.module()
    model.test_step({"image": torch.zeros(0, 1, 8, 8)}, 0)
    model.validation_step({"image": torch.zeros(0, 1, 8, 8)}, 0)
    assert model._totals == {}


def test_data_of_another_shape_are_refused_before_anything_is_kept(tmp_path: Path) -> None:
    model = tiny.module(
        network=UNet(image_size=16, in_channels=1, width=16, multipliers=[1], attention=[], num_groups=8)
    )
    with pytest.raises(ValueError, match=r"images are \(1, 8, 8\) .* DiffusionModule takes \(1, 16, 16\)"):
        tiny.trainer(tmp_path).fit(model, tiny.data())
    assert not list(tmp_path.rglob("*.ckpt"))
