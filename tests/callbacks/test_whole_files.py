from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO

from diffusion_lit.callbacks import ProgressBar, WholeFiles
from diffusion_lit.callbacks.checkpoints import read_checkpoint, run_of
from diffusion_lit.trainer import Trainer


class Unwritable:
    def __reduce__(self) -> Any:
        raise OSError("no space left on device")


def test_a_checkpoint_is_there_whole_and_alone(tmp_path: Path) -> None:
    target = tmp_path / "new" / "a.ckpt"
    WholeFiles().save_checkpoint({"state_dict": {"w": torch.ones(3)}}, target)
    assert [path.name for path in target.parent.iterdir()] == ["a.ckpt"]
    assert torch.equal(read_checkpoint(target)["state_dict"]["w"], torch.ones(3))


def test_where_writing_fails_the_old_file_stays_and_no_part_of_a_new_one(tmp_path: Path) -> None:
    target = tmp_path / "a.ckpt"
    WholeFiles().save_checkpoint({"state_dict": {}}, target)
    before = target.read_bytes()
    with pytest.raises(OSError, match="no space"):
        WholeFiles().save_checkpoint({"big": torch.zeros(1000), "bad": Unwritable()}, target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert target.read_bytes() == before


def test_a_run_is_found_from_its_checkpoint(tmp_path: Path) -> None:
    assert run_of(tmp_path / "run" / "checkpoints" / "last.ckpt") == tmp_path / "run"
    assert run_of(tmp_path / "moved" / "last.ckpt") == tmp_path / "moved"


@pytest.mark.parametrize(
    "plugins", [None, [], MixedPrecision("bf16-mixed", "cpu"), [MixedPrecision("bf16-mixed", "cpu")]]
)
def test_checkpoints_are_whole_files_beside_whatever_plugins_a_user_gives(plugins: Any) -> None:
    made = Trainer(accelerator="cpu", devices=1, plugins=plugins, logger=False, enable_progress_bar=False)
    assert type(made.strategy.checkpoint_io) is WholeFiles
    assert (made.precision == "bf16-mixed") == bool(plugins)


def test_a_checkpoint_plugin_of_the_user_s_takes_the_place_of_ours() -> None:
    io = TorchCheckpointIO()
    made = Trainer(accelerator="cpu", devices=1, plugins=io, logger=False, enable_progress_bar=False)
    assert made.strategy.checkpoint_io is io


def test_no_progress_bar_means_none() -> None:
    made = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[ProgressBar()])
    assert made.progress_bar_callback is None
