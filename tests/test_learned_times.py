"""An objective that learns from its losses: over processes, through a checkpoint, and by whole steps only."""

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.callbacks import EMA
from diffusion_lit.data import Digits, ImageData
from diffusion_lit.diffusion import DDIM, DiscreteProcess, LossSecondMoment, VariationalBound
from diffusion_lit.module import DiffusionModule
from diffusion_lit.trainer import Trainer
from diffusion_lit.types import Condition, Network
from tests import forked

T, HISTORY, BATCH = 6, 2, 16


class TwoChannels(Network):
    """A network of a few weights that says eps and the variance."""

    image_size, in_channels = 8, 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.linspace(-0.2, 0.3, parameter.numel()).reshape(parameter.shape))

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None = None) -> Tensor:
        output: Tensor = self.conv(x)
        return output


class Seen(L.Callback):
    """What one process saw of every batch: (k, loss) of its images."""

    def __init__(self, place: Path | None = None) -> None:
        self.place = place
        self.batches: list[list[tuple[int, float]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: object) -> None:
        k = (outputs["t"] * T).round().long().tolist()
        self.batches.append(list(zip(k, outputs["losses"].tolist(), strict=True)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.place is not None:
            objective: Any = pl_module.objective
            torch.save((self.batches, objective.state_dict()), self.place / f"{trainer.global_rank}.pt")


def module() -> DiffusionModule:
    return DiffusionModule(
        TwoChannels(),
        DiscreteProcess(T),
        objective=VariationalBound(times=LossSecondMoment(HISTORY)),
        sampler=DDIM(steps=2),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
    )


def trainer(place: Path, max_steps: int, callbacks: list[L.Callback], **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    return Trainer(default_root_dir=str(place), max_steps=max_steps, callbacks=callbacks, **{**settings, **options})


def data() -> ImageData:
    return ImageData(Digits(), batch_size=BATCH)


def last_losses(pairs: list[tuple[int, float]]) -> list[list[float]]:
    """The last losses at each k, sorted."""
    kept: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=HISTORY))
    for k, loss in pairs:
        kept[k].append(loss)
    return [sorted(kept[k]) for k in range(1, T + 1)]


def test_a_run_that_goes_on_has_the_history_and_the_weights_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole, half, rest = module(), module(), module()
    trainer(tmp_path / "whole", 8, [EMA([0.9])]).fit(whole, data())
    first = trainer(tmp_path / "half", 4, [EMA([0.9])])
    first.fit(half, data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    carried = torch.load(tmp_path / "half.ckpt", weights_only=True)["objective"]
    assert carried["counts"].sum() == 4 * BATCH
    assert (carried["counts"] >= HISTORY).all()
    trainer(tmp_path / "rest", 8, [EMA([0.9])]).fit(rest, data(), ckpt_path=str(tmp_path / "half.ckpt"))
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(rest.objective.state_dict()[name], value)
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value)


def test_weights_alone_carry_no_history(tmp_path: Path) -> None:
    model = module()
    fitted = trainer(tmp_path, 1, [])
    fitted.fit(model, data())
    fitted.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert "objective" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)


def test_a_step_that_was_not_finished_leaves_no_trace(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx == 5:
                raise RuntimeError("stopped in the middle of a step")

    whole, stopped, rest = module(), module(), module()
    seen, accumulate = Seen(), {"accumulate_grad_batches": 2}
    trainer(tmp_path / "whole", 4, [seen], **accumulate).fit(whole, data())
    interrupted = trainer(tmp_path / "stopped", 4, [Stop()], **accumulate)
    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted.fit(stopped, data())
    interrupted.save_checkpoint(tmp_path / "stopped.ckpt")
    trainer(tmp_path / "rest", 4, [], **accumulate).fit(rest, data(), ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert sum(map(len, seen.batches)) == 4 * BATCH
    for name, value in whole.objective.state_dict().items():
        assert torch.equal(rest.objective.state_dict()[name], value)


def test_validation_teaches_nothing(tmp_path: Path) -> None:
    model = module()
    trainer(tmp_path, 2, [], limit_val_batches=2, val_check_interval=1).fit(model, data())
    assert model.objective.state_dict()["counts"].sum() == 2 * BATCH


def test_two_processes_hold_the_losses_of_both(tmp_path: Path) -> None:
    def train() -> None:
        trainer(tmp_path, 6, [Seen(tmp_path)], devices=2, strategy="ddp").fit(module(), data())

    assert forked.wait(forked.fork(lambda: forked.in_two(train), tmp_path / "output.txt")) == 0
    (first, state), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert len(first) == len(second) == 6
    assert first != second
    pairs = [pair for a, b in zip(first, second, strict=True) for pair in [*a, *b]]
    assert len(pairs) == 6 * BATCH
    assert state["counts"].sum() == 6 * BATCH
    assert state["losses"].sort(dim=1).values.tolist() == last_losses(pairs)
