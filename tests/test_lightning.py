"""The private names of Lightning that are still needed: each test fails when an upgrade takes its name away."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy

from diffusion_lit import lightning as private
from diffusion_lit.callbacks import EMA
from diffusion_lit.callbacks.signals import StopSignals
from diffusion_lit.trainer import Trainer
from tests import tiny


@pytest.fixture
def plain() -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)


def test_a_module_knows_its_trainer_only_while_it_is_attached(plain: L.Trainer) -> None:
    module = tiny.module()
    assert private.attached_trainer(module) is None
    module.trainer = plain
    assert private.attached_trainer(module) is plain


def test_the_content_of_a_checkpoint_can_be_had_without_writing_it(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.fit(tiny.module(), tiny.data())
    checkpoint = private.dump_checkpoint(trainer)
    assert checkpoint["global_step"] == 1
    assert {"state_dict", "optimizer_states", "loops", "callbacks"} <= checkpoint.keys()
    assert "optimizer_states" not in private.dump_checkpoint(trainer, weights_only=True)


def test_a_timer_says_when_it_looks_at_the_clock() -> None:
    assert [private.timer_interval(Timer("00:01:00:00", interval=name)) for name in ("step", "epoch")] == [
        "step",
        "epoch",
    ]


def test_the_signal_handlers_of_a_trainer_can_be_replaced(plain: L.Trainer) -> None:
    assert isinstance(private.signal_connector(plain), private.SignalConnector)
    ours = StopSignals(plain)
    private.set_signal_connector(plain, ours)
    assert private.signal_connector(plain) is ours


def test_lightnings_fit_installs_its_handlers_through_the_connector(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    calls: list[str] = []

    class Watched(StopSignals):
        def register_signal_handlers(self) -> None:
            calls.append("installed")
            super().register_signal_handlers()

        def teardown(self) -> None:
            calls.append("removed")
            super().teardown()

    private.set_signal_connector(trainer, Watched(trainer))
    trainer.fit(tiny.module(), tiny.data())
    assert calls[0] == "installed"
    assert "removed" in calls


def test_the_loop_asks_for_a_broadcast_after_every_batch_unless_that_is_disabled(plain: L.Trainer) -> None:
    assert callable(plain.fit_loop.epoch_loop._broadcast_sigterm_tensor)
    private.disable_sigterm_broadcast(plain)
    nothing: Any = plain.fit_loop.epoch_loop._broadcast_sigterm_tensor
    assert nothing() is None


def test_the_time_out_of_a_process_group_can_be_set() -> None:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    private.set_process_timeout(trainer, 7.5)
    assert isinstance(trainer.strategy, DDPStrategy)
    assert trainer.strategy._timeout == timedelta(seconds=7.5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_rewound_checkpoint_counts_whole_steps_as_lightning_does(tmp_path: Path, accumulate: int) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate)
    trainer.fit(tiny.module(), tiny.data())
    checkpoint = tiny.load(tiny.last(tmp_path))
    loop = checkpoint["loops"]["fit_loop"]
    before = dict(loop["epoch_loop.batch_progress"]["total"])
    assert before["ready"] == 3 * accumulate
    before["ready"] = loop["epoch_loop.batch_progress"]["total"]["ready"] = 99
    private.rewind_to_step(checkpoint, accumulate)
    after = loop["epoch_loop.batch_progress"]["total"]
    assert after["ready"] == after["started"] == after["processed"] == 3 * accumulate
    assert after["completed"] == 3 * accumulate - 1
    assert loop["epoch_loop.state_dict"]["_batches_that_stepped"] == 2


def test_rich_s_bar_says_nothing_of_epochs(tmp_path: Path) -> None:
    bar = RichProgressBar()
    trainer = Trainer(default_root_dir=tmp_path, max_steps=1, logger=False, callbacks=[bar])
    assert trainer.max_epochs == -1
    assert bar._get_train_description(0) == "Training"


@pytest.fixture
def no_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns of pytest's own."""
    monkeypatch.setattr("sys.argv", ["program"])


class Small(LightningCLI):
    """A command line with a section."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(BoringModel, args=args, seed_everything_default=0)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {"fit": {"model"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(EMA, "ema")


@pytest.mark.usefixtures("no_words")
@pytest.mark.parametrize(("nothing", "steps"), [(True, 0), (False, 1)])
def test_a_command_line_that_runs_nothing_makes_its_parts(tmp_path: Path, nothing: bool, steps: int) -> None:
    place = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    quiet = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.barebones", "true"]
    made = (private.runs_nothing(Small) if nothing else Small)(["fit", *place, *quiet])
    assert made.trainer.global_step == steps


@pytest.mark.usefixtures("no_words")
def test_hyperparameters_of_a_checkpoint_are_not_taken_for_arguments(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"no_such_argument": 1}}, tmp_path / "a.ckpt")
    args = ["fit", "--ckpt_path", str(tmp_path / "a.ckpt"), "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    with pytest.raises(SystemExit):
        private.runs_nothing(Small)(args)
    ignoring = private.ignores_carried_arguments(type("Ignoring", (Small,), {}))
    assert private.runs_nothing(ignoring)(args).model is not None


@pytest.mark.usefixtures("no_words")
def test_a_section_whose_key_is_taken_out_is_not_made() -> None:
    class Without(Small):
        def before_instantiate_classes(self) -> None:
            private.callback_keys(self, "fit").remove("ema")

    args = ["fit", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    for kind, expected in ((Small, 1), (Without, 0)):
        made = private.runs_nothing(kind)(args)
        assert sum(isinstance(callback, EMA) for callback in made.trainer.callbacks) == expected  # type: ignore[attr-defined]
