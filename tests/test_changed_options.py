"""A run that continues with other options: they win and are printed, or are refused; without any it is bit-exact."""

import inspect
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from diffusion_lit.callbacks import EMA, Checkpoints, Scalars
from diffusion_lit.callbacks.changes import DESCRIBED, require_kept
from diffusion_lit.codecs import FirstStage
from diffusion_lit.conditioners.tokenizer import WordPiece
from diffusion_lit.methods.progressive_distillation import ProgressiveDistillation
from diffusion_lit.optimization import optimization
from diffusion_lit.system import System
from tests import tiny
from tests.systems import ddgan

DONE, END = 3, 7
OLD: dict[str, Any] = {"lr": 2e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
COSINE: dict[str, Any] = {"T_max": 10, "eta_min": 1e-5}
Rate = Callable[[int], float]


def cosine(lr: float, T_max: int, eta_min: float) -> Rate:
    """The rate of step k + 1 as a function of k, in closed form; it stays at its end."""
    return lambda k: eta_min + (lr - eta_min) * (1 + math.cos(math.pi * min(k, T_max) / T_max)) / 2


def make(
    schedule: Any = CosineAnnealingLR, kind: Any = AdamW, arguments: Any = COSINE, **options: Any
) -> tuple[Any, Any]:
    """What makes an optimiser, and what makes its schedule."""
    given = {**OLD, **options} if kind is AdamW else options
    return (
        lambda parameters: kind(parameters, **given),
        None if schedule is None else lambda optimizer: schedule(optimizer, **arguments),
    )


def one(changed: tuple[Any, Any]) -> System:
    return tiny.module(network=tiny.network(width=8), optimizer=changed[0], lr_scheduler=changed[1])


def first_of_two(changed: tuple[Any, Any]) -> System:
    """A GAN whose generator's options are given; those of the discriminator do not change."""
    other = make()
    return ddgan(
        optimizer=changed[0],
        lr_scheduler=changed[1],
        discriminator_optimizer=other[0],
        discriminator_lr_scheduler=other[1],
    )


def second_of_two(changed: tuple[Any, Any]) -> System:
    other = make()
    return ddgan(
        optimizer=other[0],
        lr_scheduler=other[1],
        discriminator_optimizer=changed[0],
        discriminator_lr_scheduler=changed[1],
    )


SYSTEMS: dict[str, tuple[Callable[..., System], int, str]] = {
    "one optimiser": (one, 0, ""),
    "the first of two": (first_of_two, 0, ""),
    "the second of two": (second_of_two, 1, "discriminator_"),
}
"""Each with the number of the optimiser whose options change, and what the names of these begin with."""


class Rates(L.Callback):
    """Keeps the learning rate of every step, of one optimiser."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        self.rates.append(trainer.optimizers[self.number].param_groups[0]["lr"])


def fit(run_dir: Path, system: System, steps: int, *callbacks: L.Callback, **kwargs: Any) -> None:
    every = [*callbacks, EMA([0.9]), Scalars(), Checkpoints()]
    tiny.trainer(run_dir, steps, every, **kwargs).fit(system, tiny.data(), ckpt_path="last")


@pytest.fixture(scope="module", params=list(SYSTEMS))
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of `DONE` steps of every kind of system."""
    place = tmp_path_factory.mktemp("begun")
    fit(place, SYSTEMS[request.param][0](make()), DONE)
    return request.param, place


CHANGES: dict[str, tuple[tuple[Any, Any], dict[str, Any], Rate, list[str]]] = {
    "lr": (make(lr=1e-4), {"lr": 1e-4}, cosine(1e-4, **COSINE), ["optimizer.lr: 0.002 -> 0.0001"]),
    "weight_decay": (
        make(weight_decay=0.5),
        {"weight_decay": 0.5},
        cosine(2e-3, **COSINE),
        ["optimizer.weight_decay: 0.01 -> 0.5"],
    ),
    "betas": (
        make(betas=(0.5, 0.9)),
        {"betas": (0.5, 0.9)},
        cosine(2e-3, **COSINE),
        ["optimizer.betas: [0.9, 0.99] -> [0.5, 0.9]"],
    ),
    "eps": (make(eps=1e-3), {"eps": 1e-3}, cosine(2e-3, **COSINE), ["optimizer.eps: 1e-08 -> 0.001"]),
    "T_max": (
        make(arguments={"T_max": 20, "eta_min": 1e-5}),
        {},
        cosine(2e-3, 20, 1e-5),
        ["lr_scheduler.T_max: 10 -> 20"],
    ),
    "eta_min": (
        make(arguments={"T_max": 10, "eta_min": 1e-3}),
        {},
        cosine(2e-3, 10, 1e-3),
        ["lr_scheduler.eta_min: 1e-05 -> 0.001"],
    ),
    "another schedule": (
        make(LinearLR, arguments={"start_factor": 0.1, "total_iters": 5}),
        {},
        lambda k: 2e-3 * min(0.1 + 0.9 * k / 5, 1.0),
        ["lr_scheduler: torch.optim.lr_scheduler.CosineAnnealingLR -> torch.optim.lr_scheduler.LinearLR"],
    ),
    "no schedule": (
        make(None),
        {},
        lambda k: 2e-3,
        ["lr_scheduler: torch.optim.lr_scheduler.CosineAnnealingLR -> null"],
    ),
    "two at once": (
        make(StepLR, arguments={"step_size": 2, "gamma": 0.5}, lr=1e-3, eps=1e-4),
        {"eps": 1e-4},
        lambda k: 1e-3 * 0.5 ** (k // 2),
        ["optimizer.lr: 0.002 -> 0.001", "optimizer.eps: 1e-08 -> 0.0001", "lr_scheduler: "],
    ),
}


@pytest.mark.few(6)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_options_win_and_are_printed(
    begun: tuple[str, Path], change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, place = begun
    make_system, number, prefix = SYSTEMS[name]
    changed, settings, rate, lines = CHANGES[change]
    shutil.copytree(place, tmp_path / "run")
    rates = Rates(number)
    with caplog.at_level(logging.INFO):
        fit(tmp_path / "run", make_system(changed), END, rates)
    assert rates.rates == pytest.approx([rate(k) for k in range(DONE, END)], rel=1e-9)
    said = [r.getMessage() for r in caplog.records if " -> " in r.getMessage()]
    assert [f"model.{prefix}{line}" for line in lines] == [
        s[: len(f"model.{prefix}{x}")] for s, x in zip(said, lines, strict=True)
    ]
    assert all(line.endswith(f", from step {DONE + 1} on") for line in said)
    states = tiny.load(tiny.last(tmp_path / "run"))["optimizer_states"]
    [group] = states[number]["param_groups"]
    expected = {k: v for k, v in {**OLD, **settings}.items() if k != "lr"}
    assert {key: group[key] for key in expected} == expected
    assert group["lr"] == pytest.approx(rate(END), rel=1e-9)
    assert {float(state["step"]) for state in states[number]["state"].values()} == {END}
    for other in states[:number] + states[number + 1 :]:
        [group] = other["param_groups"]
        assert {key: group[key] for key in ("betas", "eps", "weight_decay")} == {
            k: OLD[k] for k in ("betas", "eps", "weight_decay")
        }
        assert group["lr"] == pytest.approx(cosine(2e-3, **COSINE)(END), rel=1e-9)


def without_record(run_dir: Path, *entries: str) -> None:
    """Takes entries out of a run's checkpoint, such as those that older versions did not write."""
    checkpoint = tiny.load(tiny.last(run_dir))
    torch.save({name: value for name, value in checkpoint.items() if name not in entries}, tiny.last(run_dir))


@pytest.mark.few(2)
@pytest.mark.parametrize("change", ["lr", "betas", "T_max", "another schedule", "no schedule"])
def test_they_win_too_where_a_checkpoint_does_not_say_how_its_optimisers_were_made(
    begun: tuple[str, Path], change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, place = begun
    make_system, number, prefix = SYSTEMS[name]
    changed, settings, rate, lines = CHANGES[change]
    shutil.copytree(place, tmp_path / "run")
    without_record(tmp_path / "run", DESCRIBED, "config")
    rates = Rates(number)
    with caplog.at_level(logging.INFO):
        fit(tmp_path / "run", make_system(changed), END, rates)
    assert rates.rates == pytest.approx([rate(k) for k in range(DONE, END)], rel=1e-9)
    said = [r.getMessage() for r in caplog.records if " -> " in r.getMessage()]
    [line] = said
    # Which class a schedule had is not known without a configuration.
    assert line.startswith(
        f"model.{prefix}{lines[0] if settings or change == 'T_max' else 'lr_scheduler: another schedule ->'}"
    )
    [group] = tiny.load(tiny.last(tmp_path / "run"))["optimizer_states"][number]["param_groups"]
    assert {key: group[key] for key in settings if key != "lr"} == {k: v for k, v in settings.items() if k != "lr"}


@pytest.mark.few(1)
def test_without_such_a_record_unchanged_options_change_nothing(
    begun: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, place = begun
    for run in ("with", "without"):
        shutil.copytree(place, tmp_path / run)
    without_record(tmp_path / "without", DESCRIBED)
    with caplog.at_level(logging.INFO):
        for run in ("with", "without"):
            fit(tmp_path / run, SYSTEMS[name][0](make()), DONE + 2)
    a, b = (tiny.load(tiny.last(tmp_path / run)) for run in ("with", "without"))
    assert [
        key for key in ("state_dict", "optimizer_states", "lr_schedulers") if not tiny.identical(a[key], b[key])
    ] == []
    assert " -> " not in caplog.text


def test_the_trainer_s_options_that_change_results_are_printed_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(tmp_path, one(make()), 2)
    with caplog.at_level(logging.INFO):
        fit(tmp_path, one(make()), 3, gradient_clip_val=0.5, precision="bf16-mixed", accumulate_grad_batches=2)
    said = sorted(r.getMessage() for r in caplog.records if " -> " in r.getMessage())
    assert said == [
        "trainer.accumulate_grad_batches: 1 -> 2, from step 3 on",
        "trainer.gradient_clip_val: 1.0 -> 0.5, from step 3 on",
        "trainer.precision: 32-true -> bf16-mixed, from step 3 on",
    ]


def test_what_only_the_beginning_of_a_run_reads_may_not_change() -> None:
    def tree(**codec: Any) -> dict[str, Any]:
        part = {"class_path": "diffusion_lit.codecs.FirstStage", "init_args": {"checkpoint": "a", **codec}}
        return {"model": {"class_path": "diffusion_lit.module.DiffusionModule", "init_args": {"codec": part}}}

    require_kept(tree(per_channel=False), tree(per_channel=False, checkpoint="b"), "")
    require_kept(tree(), tree(per_channel=True), "")
    with pytest.raises(
        ValueError, match=r"^model\.codec\.per_channel: False -> True: only the beginning of a run reads it"
    ):
        require_kept(tree(per_channel=False), tree(per_channel=True), "")


def test_every_argument_that_only_the_beginning_reads_exists() -> None:
    for part in (FirstStage, WordPiece, ProgressiveDistillation):
        assert set(part.only_at_start) <= inspect.signature(part).parameters.keys()
        assert part.only_at_start


@pytest.mark.few(2)
def test_unchanged_options_change_nothing(
    begun: tuple[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, place = begun
    make_system = SYSTEMS[name][0]
    shutil.copytree(place, tmp_path / "parts")
    with caplog.at_level(logging.INFO):
        fit(tmp_path / "parts", make_system(make()), END)
    fit(tmp_path / "whole", make_system(make()), END)
    a, b = (tiny.load(tiny.last(tmp_path / place)) for place in ("whole", "parts"))
    same = ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "optimization")
    assert [key for key in same if not tiny.identical(a[key], b[key])] == []
    assert " -> " not in caplog.text


def test_options_that_were_changed_once_go_on_unchanged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path / "parts", one(make()), 2)
    for end in (4, 6):
        with caplog.at_level(logging.INFO):
            fit(tmp_path / "parts", one(make(lr=1e-4)), end)
    assert caplog.text.count(" -> ") == 1
    rate = tiny.load(tiny.last(tmp_path / "parts"))["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(cosine(1e-4, **COSINE)(6), rel=1e-9)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("changed", "line"),
    [
        (
            make(kind=SGD, lr=0.1, momentum=0.9),
            r"was trained by AdamW, from whose state SGD cannot continue; .*--init_from",
        ),
        (make(amsgrad=True), r"KeyError: 'max_exp_avg_sq'\).*--init_from"),
        (make(arguments={"T_max": DONE}), rf"T_max={DONE}: this schedule has ended at step {DONE}"),
        (make(OneCycleLR, arguments={"max_lr": 1.0, "total_steps": 2}), "Tried to step 3 times"),
    ],
    ids=["another optimiser", "more state", "an ended schedule", "a schedule that is too short"],
)
def test_what_a_checkpoint_cannot_continue_with_is_refused_and_leaves_it_alone(
    begun: tuple[str, Path], changed: tuple[Any, Any], line: str, tmp_path: Path
) -> None:
    name, place = begun
    make_system, _, prefix = SYSTEMS[name]
    shutil.copytree(place, tmp_path / "run")
    before = tiny.last(tmp_path / "run").read_bytes()
    with pytest.raises(ValueError, match=rf"^model\.{prefix}(optimizer|lr_scheduler)[.:].*{line}"):
        fit(tmp_path / "run", make_system(changed), END)
    assert tiny.last(tmp_path / "run").read_bytes() == before


def test_a_setting_for_which_the_state_suffices_may_change_in_any_optimiser(tmp_path: Path) -> None:
    fit(tmp_path, one(make(None, SGD, lr=0.01)), 2)
    fit(tmp_path, one(make(None, SGD, lr=0.01, momentum=0.9)), 4)
    assert tiny.load(tiny.last(tmp_path))["optimizer_states"][0]["param_groups"][0]["momentum"] == 0.9


def test_a_setting_for_which_the_state_does_not_suffice_may_not(tmp_path: Path) -> None:
    fit(tmp_path, one(make(None, RMSprop, lr=1e-3)), 2)
    with pytest.raises(ValueError, match="does not suffice"):
        fit(tmp_path, one(make(None, RMSprop, lr=1e-3, centered=True)), 4)


def test_a_one_cycle_schedule_may_be_the_end_of_a_longer_one(tmp_path: Path) -> None:
    def both(optimizer: Any) -> Any:
        return SequentialLR(optimizer, [LinearLR(optimizer, 0.5, total_iters=2), OneCycleLR(optimizer, 0.1, 2)], [2])

    fit(tmp_path, tiny.module(optimizer=lambda p: SGD(p, lr=0.1, momentum=0.9), lr_scheduler=both), 4)
    assert tiny.load(tiny.last(tmp_path))["global_step"] == 4


def test_a_schedule_that_cycles_betas_leaves_none_behind(tmp_path: Path) -> None:
    fit(tmp_path, one(make(OneCycleLR, arguments={"max_lr": 1e-3, "total_steps": 9})), 3)
    cycled = tiny.load(tiny.last(tmp_path))["optimizer_states"][0]["param_groups"][0]
    assert cycled["betas"] != OLD["betas"]
    fit(tmp_path, one(make(None)), 4)
    group = tiny.load(tiny.last(tmp_path))["optimizer_states"][0]["param_groups"][0]
    assert group["betas"] == OLD["betas"]
    assert group.keys() == {*AdamW([torch.zeros(1)]).param_groups[0]}
    assert group.keys() < cycled.keys()


@pytest.mark.few(1)
@pytest.mark.parametrize("eta_min", [0.0, 1e-4])
def test_a_cosine_stays_at_its_end(tmp_path: Path, eta_min: float, caplog: pytest.LogCaptureFixture) -> None:
    options = make(arguments={"T_max": 3, "eta_min": eta_min})
    rates = Rates(0)
    with caplog.at_level(logging.INFO):
        fit(tmp_path / "whole", one(options), 8, rates)
    assert rates.rates == pytest.approx([cosine(2e-3, 3, eta_min)(k) for k in range(8)], abs=1e-12)
    assert "T_max=3: from that step to trainer.max_steps=8 the learning rate stays at" in caplog.text
    for end in (5, 8):
        fit(tmp_path / "parts", one(options), end)
    a, b = (tiny.load(tiny.last(tmp_path / place)) for place in ("whole", "parts"))
    assert tiny.identical(a["optimizer_states"], b["optimizer_states"])


def test_a_cosine_after_a_warm_up_stays_at_its_end_too() -> None:
    def both(optimizer: Any) -> Any:
        return SequentialLR(optimizer, [LinearLR(optimizer, 0.5, total_iters=2), CosineAnnealingLR(optimizer, 3)], [2])

    made = optimization([torch.nn.Parameter(torch.zeros(1))], lambda p: SGD(p, lr=1.0), both)
    rates = []
    for _ in range(12):
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
        rates.append(made["optimizer"].param_groups[0]["lr"])
    assert rates[-7:] == pytest.approx([0.0] * 7)


@pytest.mark.parametrize(
    ("schedule", "arguments", "line"),
    [
        (ReduceLROnPlateau, {}, "model.lr_scheduler: ReduceLROnPlateau follows a score"),
        (StepLR, {"step_size": 2, "last_epoch": 5}, "model.lr_scheduler: last_epoch must be -1"),
        (CosineAnnealingLR, {"T_max": 0}, "model.lr_scheduler"),
        (OneCycleLR, {"max_lr": 0.1, "total_steps": 1}, "model.lr_scheduler: OneCycleLR ends after 1 steps"),
    ],
)
def test_a_schedule_that_cannot_be_advanced_is_refused(
    schedule: Any, arguments: dict[str, Any], line: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(line)}"):
        fit(tmp_path, one(make(schedule, arguments=arguments)), 2)
