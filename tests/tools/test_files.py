"""Files that strangers made: nothing in them runs, and a damaged one is said to be so."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_lit.tools import files, import_weights
from diffusion_lit.tools.diffusers_folder import read_network
from diffusion_lit.tools.files import read, read_json


class Malicious:
    """Unpickled, it creates a file."""

    def __init__(self, creates: Path) -> None:
        self.creates = creates

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.creates),)


def malicious(place: Path, kind: str) -> Path:
    file, content = place / "weights.bin", {"a": torch.zeros(1), "b": Malicious(place / "owned")}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content["b"], protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    return file


KINDS = ["zip", "former", "pickle"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_would_run_a_program_is_refused_with_the_reason_and_does_not(kind: str, tmp_path: Path) -> None:
    file = malicious(tmp_path, kind)
    with pytest.raises(ValueError, match=r"asks for \w+\.mkdir, and only tensors and plain data are read"):
        read(file)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_such_a_file_would_have_run_it(kind: str, tmp_path: Path) -> None:
    file = malicious(tmp_path, kind)
    if kind == "pickle":
        pickle.loads(file.read_bytes())
    else:
        torch.load(file, weights_only=False)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tool_refuses_it_as_a_file_and_in_a_folder_of_diffusers(kind: str, tmp_path: Path) -> None:
    file = malicious(tmp_path, kind)
    for source in (file, tmp_path):
        if source.is_dir():
            file.rename(tmp_path / "diffusion_pytorch_model.bin")
            (tmp_path / "config.json").write_text(
                '{"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [8], "norm_eps": 1e-6,'
                '"freq_shift": 1, "flip_sin_to_cos": false, "downsample_padding": 0, "attention_head_dim": null,'
                '"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "norm_num_groups": 4}'
            )
        with pytest.raises(ValueError, match=r"asks for \w+\.mkdir"):
            import_weights.main([str(source), "--out", str(tmp_path / "imported.ckpt")])
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "imported.ckpt").exists()


def truncated(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-40])
    return file


def test_what_takes_long_to_read_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(2000))
    files.announce(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(files, "LARGE", 1500)
    for source in (tmp_path, tmp_path / "weights.bin"):
        files.announce(source)
        assert capsys.readouterr().err == f"reading {source}, 0.0 GB\n"


def test_damaged_files_are_said_to_be_so(tmp_path: Path) -> None:
    zipped, former, safe, words, empty, new = (
        tmp_path / name for name in ("a.pt", "b.pt", "c.safetensors", "d.pt", "e.pt", "f.pt")
    )
    tensors = {"a": torch.arange(64.0)}
    torch.save(tensors, zipped)
    torch.save(tensors, former, _use_new_zipfile_serialization=False)
    save_file(tensors, safe)
    for file in (zipped, former, safe):
        truncated(file)
    words.write_text("hello, no weights")
    empty.touch()
    new.write_bytes(pickle.dumps([1], protocol=5))
    for file in (zipped, former, safe, words, empty, new):
        with pytest.raises(ValueError, match=f"{file.name} is damaged, or no file of tensors"):
            read(file)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        read(tmp_path / "absent.pt")


def test_a_configuration_is_a_json_object(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text, words in (("{", "is not JSON"), ("[1]", "holds no JSON object"), (b"\xff\xfe\x00", "is not JSON")):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=words):
            read_json(file)


def test_sizes_and_kinds_that_cannot_be_are_refused_with_the_file_that_says_them(tmp_path: Path) -> None:
    good = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "block_out_channels": [32, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    }
    bad: list[dict[str, object]] = [
        {"block_out_channels": [2**40] * 2},
        {"block_out_channels": [10**30] * 2},
        {"layers_per_block": 10**9},
        {"dropout": [1]},
        {"dropout": "x"},
        {"down_block_types": None},
        {"down_block_types": [["a"], {}]},
        {"_class_name": ["x"]},
        {
            "block_out_channels": [32] * 20_000,
            "down_block_types": ["DownBlock2D"] * 20_000,
            "up_block_types": ["UpBlock2D"] * 20_000,
        },
    ]
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    for change in bad:
        (tmp_path / "config.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=r"config\.json: [^\n]*$"):
            read_network(tmp_path)
