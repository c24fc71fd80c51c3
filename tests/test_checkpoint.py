"""Checkpoint files: whole or absent, damage that is found, which one a run continues from, and those of 0.1.0."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, TorchCheckpointIO

from diffusion_lit.callbacks import EMA, Checkpoints, ProgressBar, Scalars
from diffusion_lit.checkpoint import (
    DamagedCheckpointWarning,
    WholeFiles,
    newest_checkpoint,
    read_checkpoint,
    run_of,
)
from diffusion_lit.loggers import METRICS
from diffusion_lit.records import read_records
from diffusion_lit.trainer import Trainer
from tests import tiny


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


# Damage


def written(path: Path, value: float = 1.0) -> Path:
    state = {"w": torch.full((300,), value), "b": torch.arange(7)}
    WholeFiles().save_checkpoint({"state_dict": state, "global_step": int(value)}, path)
    return path


def test_a_checkpoint_is_an_ordinary_zip_archive_that_torch_reads(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["w"], torch.ones(300))


def test_a_flipped_bit_is_found_or_changes_nothing_that_is_read(tmp_path: Path) -> None:
    original = written(tmp_path / "a.ckpt")
    whole, content = original.read_bytes(), read_checkpoint(original)
    with zipfile.ZipFile(original) as archive:
        [storage] = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
        [pickled] = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
    tensor = whole.index(torch.ones(300).numpy().tobytes())
    assert storage.file_size == 1200
    random = np.random.default_rng(0)
    inside = {*range(tensor, tensor + 1200, 29), *range(pickled.header_offset + 120, pickled.header_offset + 200, 7)}
    places = inside | set(random.integers(0, len(whole), 200).tolist()) | set(range(len(whole) - 300, len(whole), 3))
    found: dict[int, str] = {}
    for place in sorted(places):
        bad = bytearray(whole)
        bad[place] ^= 1 << int(random.integers(8))
        path = tmp_path / f"bad_{place}.ckpt"
        path.write_bytes(bad)
        try:
            assert tiny.identical(read_checkpoint(path), content), place
        except ValueError as error:
            found[place] = str(error)
        path.unlink()
    assert found.keys() >= inside
    assert all("is damaged" in message and "\n" not in message for message in found.values())


def test_a_file_that_ends_early_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.ckpt").read_bytes()
    random = np.random.default_rng(1)
    lengths = {*random.integers(0, len(whole), 60).tolist(), 0, 1, 4, *range(len(whole) - 75, len(whole))}
    for length in sorted(lengths):
        path = tmp_path / f"cut_{length}.ckpt"
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut_\d+\.ckpt is damaged"):
            read_checkpoint(path)


class Attack:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_foreign_files_are_refused_in_one_line_and_nothing_in_them_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "text.ckpt").write_text("<html>not found</html>")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    torch.save({"state_dict": Attack(mark)}, tmp_path / "attack.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    files = sorted(tmp_path.iterdir())
    for path in files:
        with pytest.raises(ValueError, match=rf"{path.name} is (damaged, or no|not a) checkpoint") as error:
            read_checkpoint(path)
        assert "\n" not in str(error.value)
    assert len(files) == 7
    assert not mark.exists()
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt: there is no such file"):
        read_checkpoint(tmp_path / "absent.ckpt")
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=x*: there is no such file"):
        read_checkpoint(300 * "x")


def test_a_checkpoint_of_another_program_is_read_as_it_is(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "a.ckpt")
    assert torch.equal(read_checkpoint(tmp_path / "a.ckpt")["state_dict"]["w"], torch.ones(2))


def test_what_is_done_to_a_checkpoint_that_was_read_shows_in_no_other_reading(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt")
    first = read_checkpoint(path)
    first["state_dict"]["w"].zero_()
    first["global_step"] = 7
    again = read_checkpoint(path)
    assert torch.equal(again["state_dict"]["w"], torch.ones(300))
    assert again["global_step"] == 1


def test_two_runs_from_one_checkpoint_in_one_process_are_the_same(tmp_path: Path) -> None:
    tiny.trainer(tmp_path / "start", 2).fit(tiny.module(), tiny.data())
    for name in ("a", "b"):
        start = str(tiny.last(tmp_path / "start"))
        tiny.trainer(tmp_path / name, 4).fit(tiny.module(), tiny.data(), ckpt_path=start)
    a, b = (tiny.load(tiny.last(tmp_path / name)) for name in ("a", "b"))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states", "loops"):
        assert tiny.identical(a[name], b[name]), name


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    tiny.trainer(tmp_path, 1).fit(tiny.module(), tiny.data())
    checkpoint = tiny.load(tiny.last(tmp_path))
    name = next(n for n in checkpoint["state_dict"] if n.endswith("bias"))
    checkpoint["current_model_state"][name][0] = float("inf")
    tiny.module().load(checkpoint)
    for held, weights in ((checkpoint, "raw"), (broken(checkpoint, name), "averaged")):
        with pytest.raises(ValueError, match=rf"1 weights of the checkpoint are not finite, first {name}: training"):
            tiny.module().load(held, weights)
    with pytest.raises(ValueError, match="not finite"):
        tiny.module().initialize(broken(checkpoint, name))
    path = tmp_path / "broken.ckpt"
    torch.save(broken(checkpoint, name), path)
    with pytest.raises(ValueError, match="not finite"):
        tiny.trainer(tmp_path / "other", 2).fit(tiny.module(), tiny.data(), ckpt_path=str(path))


def broken(checkpoint: dict[str, Any], name: str) -> dict[str, Any]:
    state = checkpoint["state_dict"]
    return {**checkpoint, "state_dict": {**state, name: torch.full_like(state[name], float("nan"))}}


# Which file


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_last_checkpoint_becomes_the_previous_one(
    tmp_path: Path, hard_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("no hard links here")

    if not hard_links:
        monkeypatch.setattr("os.link", refuse)
    for value in (1.0, 2.0, 3.0):
        written(tmp_path / "last.ckpt", value)
    there = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.iterdir()}
    assert there == {"last.ckpt": 3, "previous.ckpt": 2}
    written(tmp_path / "best.ckpt", 9.0)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    assert newest_checkpoint(tmp_path) is None
    for value in (4.0, 5.0):
        written(folder / "last.ckpt", value)
    written(folder / "step_00000002.ckpt", 2.0)
    written(folder / "best.ckpt", 3.0)

    def found() -> tuple[str, int]:
        newest = newest_checkpoint(tmp_path)
        assert newest is not None
        return newest[0].name, newest[1]["global_step"]

    def damage(name: str) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    assert found() == ("last.ckpt", 5)
    damage("last.ckpt")
    with pytest.warns(DamagedCheckpointWarning, match=r"last\.ckpt is damaged.*continuing from .*previous\.ckpt"):
        assert found() == ("previous.ckpt", 4)
    damage("previous.ckpt")
    with pytest.warns(
        DamagedCheckpointWarning, match=r"(last|previous)\.ckpt is damaged.*continuing from .*best\.ckpt"
    ):
        assert found() == ("best.ckpt", 3)
    damage("best.ckpt")
    damage("step_00000002.ckpt")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*last\.ckpt is damaged"):
        newest_checkpoint(tmp_path)


def test_a_run_with_a_damaged_last_checkpoint_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def fit(place: Path, steps: int) -> None:
        callbacks = [EMA([0.9]), Scalars(), Checkpoints(every_n_steps=2)]
        tiny.trainer(place, steps, callbacks).fit(tiny.module(), tiny.data(), ckpt_path="last")

    fit(whole, 6)
    fit(parts, 5)
    content = bytearray(tiny.last(parts).read_bytes())
    content[1000] ^= 1
    tiny.last(parts).write_bytes(content)
    (parts / "checkpoints" / "last.ckpt.99999.part").write_bytes(b"left by a killed process")
    with pytest.warns(DamagedCheckpointWarning, match=r"last\.ckpt is damaged"):
        fit(parts, 6)
    a, b = tiny.load(tiny.last(whole)), tiny.load(tiny.last(parts))
    for name in ("state_dict", "current_model_state", "averages", "optimizer_states", "lr_schedulers", "global_step"):
        assert tiny.identical(a[name], b[name])
    there = {path.name for path in (parts / "checkpoints").iterdir()}
    assert there == {"last.ckpt", "previous.ckpt", "last.ckpt.damaged"}
    assert (parts / "checkpoints" / "last.ckpt.damaged").read_bytes() == content
    assert [record["step"] for record in read_records(parts / METRICS)] == [1, 2, 3, 4, 5, 6]


def test_snapshots_beyond_so_many_are_removed_oldest_first_and_all_kinds_load(tmp_path: Path) -> None:
    callbacks = [EMA([0.5]), Checkpoints(every_n_steps=2, keep_every_n_steps=1, keep_at_most=2)]
    tiny.trainer(tmp_path, 5, callbacks).fit(tiny.module(), tiny.data())
    there = sorted((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in there] == [
        "last.ckpt",
        "previous.ckpt",
        "step_00000004.ckpt",
        "step_00000005.ckpt",
    ]
    for path in there:
        model = tiny.module()
        tiny.trainer(tmp_path, logger=False, limit_test_batches=1).test(model, tiny.data(), str(path))
        averaged = read_checkpoint(path)["state_dict"]
        assert tiny.identical(dict(model.state_dict()), averaged)
        assert not tiny.identical(averaged, read_checkpoint(path)["current_model_state"])


@pytest.mark.parametrize("name", ["every_n_steps", "keep_every_n_steps", "keep_at_most"])
def test_numbers_of_checkpoints_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"checkpoints\.{name}=0 must be at least 1"):
        Checkpoints(**{name: 0})


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("state_dict", None),
        ("state_dict", {"weight": "text"}),
        ("averages", None),
        ("averages", {"averages": [1], "decays": [0.9]}),
        ("averages", {"averages": {"0.9": {"weight": 5}}, "decays": [0.9]}),
        ("current_model_state", 5),
        ("global_step", "3"),
        ("global_step", True),
        ("class_names", ["frog", None]),
        ("config", ["model"]),
        ("loops", 7),
        ("optimizer_states", {}),
    ],
)
def test_an_entry_of_another_kind_is_named(entry: str, value: Any, tmp_path: Path) -> None:
    whole = {"state_dict": {}, "current_model_state": {}, "averages": {"averages": {}, "decays": [0.9]}, "format": 2}
    torch.save(whole, tmp_path / "whole.ckpt")
    assert read_checkpoint(tmp_path / "whole.ckpt")["format"] == 2
    torch.save({**whole, entry: value}, tmp_path / "odd.ckpt")
    with pytest.raises(ValueError, match=rf"odd\.ckpt is damaged, or no checkpoint: its ({entry}|0\.9) "):
        read_checkpoint(tmp_path / "odd.ckpt")
