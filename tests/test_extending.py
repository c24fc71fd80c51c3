"""What docs/extending.md and the README print works as printed: the files are saved and the commands run."""

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_lit.checkpoint import last_checkpoint
from diffusion_lit.loggers import METRICS
from diffusion_lit.main import main
from diffusion_lit.records import RESULTS, read_records
from tests import forked
from tests.tiny import identical, load

REPOSITORY = Path(__file__).parent.parent
PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.\w+)\n")
PROGRAM = "python -m diffusion_lit "
SECTIONS = {text.partition("\n")[0]: text for text in PAGE.split("\n## ")[1:]}
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
FAST = [
    *("--evaluation.every_n_steps", "null", "--trainer.max_steps", "3"),
    *("--sample_grid.num_images", "2", "--sample_grid.sampler.steps", "2"),
]
"""For the digits, whose recipe scores 1,024 images before its first step and draws 64 after its last."""
SYSTEM = "A system"


def blocks(text: str) -> list[tuple[str, str]]:
    """The language and the content of every code block."""
    return BLOCK.findall(text)


def save_files(text: str, place: Path) -> None:
    """Saves the blocks whose first line names a file."""
    for _, content in blocks(text):
        if (name := FILE.match(content)) is not None:
            (place / name[1]).write_text(content)


def commands(text: str) -> list[list[str]]:
    """The words after the program's name of every command."""
    found = [content.replace("\\\n", " ") for language, content in blocks(text) if not language]
    return [shlex.split(line)[3:] for content in found for line in content.splitlines() if line.startswith(PROGRAM)]


def in_place(words: Sequence[str]) -> Callable[[], None]:
    """Runs a command as `python -m` does, which finds modules in the current directory."""

    def run() -> None:
        sys.path.insert(0, "")
        main(list(words))

    return run


def in_two_processes(words: Sequence[str]) -> Callable[[], None]:
    more = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    return lambda: forked.in_two(in_place([*words, *more]))


def finish(run: Callable[[], object], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls a function in a process of its own, in a directory, and expects it to end well."""
    monkeypatch.chdir(place)
    output = place / "output.txt"
    code = forked.wait(forked.fork(run, output))
    assert code == 0, output.read_text()[-3000:]


@pytest.mark.few(1)
@pytest.mark.parametrize("section", [name for name, text in SECTIONS.items() if commands(text)])
def test_the_files_and_commands_of_a_section_work_in_an_empty_directory(
    section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_files(SECTIONS[section], tmp_path)
    for words in commands(SECTIONS[section]):
        fast = FAST if words[:3] == ["fit", "-c", "digits"] else []
        finish(in_place([*words, *QUIET, *fast]), tmp_path, monkeypatch)
    assert list(tmp_path.glob("runs/*/checkpoints/last.ckpt"))


def test_the_page_has_the_four_examples_that_it_promises() -> None:
    assert [name for name, text in SECTIONS.items() if commands(text)] == [
        "A sampler",
        "A network",
        "A data set",
        SYSTEM,
    ]


def test_the_table_of_parts_names_each_base_class_and_exactly_its_abstract_methods() -> None:
    rows = re.findall(r"^\| `(diffusion_lit[\w.]*)\.(\w+)` \| (.*?) \|", SECTIONS["Other parts"], re.MULTILINE)
    assert len(rows) > 10
    for module, name, methods in rows:
        base: Any = getattr(import_module(module), name)
        assert set(re.findall(r"`(\w+)`", methods)) == set(base.__abstractmethods__), name


# The system with two optimisers


@pytest.fixture(scope="module")
def gan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The system of the page, trained by its own command, with the number of file operations that this took."""
    place = tmp_path_factory.mktemp("gan")
    save_files(SECTIONS[SYSTEM], place)
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_cache(place, monkeypatch)
        finish(counted(fit(), place), place, monkeypatch)
    return place


def share_cache(gan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real images have the same statistics in all runs: computed again, their last bits may differ."""
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(gan / "cache"))


def fit(*more: str) -> list[str]:
    return [*next(words for words in commands(SECTIONS[SYSTEM]) if words[0] == "fit"), *QUIET, *more]


def counted(words: Sequence[str], place: Path) -> Callable[[], None]:
    def run() -> None:
        operations = forked.FileOperations(place / "runs")
        in_place(words)()
        (place / "operations").write_text(str(operations.count))

    return run


def lethal(words: Sequence[str], place: Path, at: int) -> Callable[[], None]:
    def run() -> None:
        forked.FileOperations(place / "runs", at)
        in_place(words)()

    return run


def test_the_system_leaves_averages_grids_scores_curves_and_both_optimisers(gan: Path) -> None:
    run = gan / "runs" / "my_gan"
    checkpoint = load(last_checkpoint(run))
    assert checkpoint["global_step"] == 40
    assert len(checkpoint["optimizer_states"]) == 2
    assert all(state["state"][0]["step"] == 40 for state in checkpoint["optimizer_states"])
    averaged, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert raw.keys() == {name for name in averaged if name.startswith("generator.")}
    assert not identical({name: averaged[name] for name in raw}, raw)
    grids = [path.name for path in sorted((run / "samples").iterdir())]
    assert grids == [f"step_{step:08d}.png" for step in (10, 20, 30, 40)]
    curves = read_records(run / METRICS)
    assert [r["step"] for r in curves if "frechet/pixels" in r] == [20, 40]
    assert [r["step"] for r in curves if "train/discriminator" in r] == [10, 20, 30, 40]
    assert (run / "checkpoints" / "best.ckpt").is_file()


def test_the_system_that_is_killed_in_the_middle_ends_as_the_uninterrupted_one(
    gan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_cache(gan, monkeypatch)
    save_files(SECTIONS[SYSTEM], tmp_path)
    monkeypatch.chdir(tmp_path)
    at = int((gan / "operations").read_text()) // 2
    output = tmp_path / "output.txt"
    assert forked.wait(forked.fork(lethal(fit(), tmp_path, at), output)) == -9, output.read_text()[-3000:]
    killed = load(last_checkpoint(tmp_path / "runs" / "my_gan"))["global_step"]
    assert 0 < killed < 40
    finish(in_place(fit("--ckpt_path", "last")), tmp_path, monkeypatch)
    whole, parts = gan / "runs" / "my_gan", tmp_path / "runs" / "my_gan"
    for name in ("last.ckpt", "best.ckpt", "previous.ckpt"):
        a, b = load(whole / "checkpoints" / name), load(parts / "checkpoints" / name)
        # Lightning's counters start anew with each process.
        assert [key for key in a if key != "loops" and not identical(a[key], b[key])] == [], name
    assert timeless(whole) == timeless(parts)
    for path in (whole / "samples").iterdir():
        assert path.read_bytes() == (parts / "samples" / path.name).read_bytes()


def timeless(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's curves, without what depends on the clock."""
    return [{k: v for k, v in r.items() if k != "train/images_per_s"} for r in read_records(run / METRICS)]


@pytest.mark.further
def test_one_process_and_two_predict_the_same_images_and_test_repeats_the_score(
    gan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_cache(gan, monkeypatch)
    predict, test = (words for words in commands(SECTIONS[SYSTEM]) if words[0] != "fit")
    small = ["--batch_size", "4", *QUIET]
    finish(in_place([*predict, *small, "--out", "one"]), gan, monkeypatch)
    finish(in_two_processes([*predict, *small, "--out", "two"]), gan, monkeypatch)
    one, two = (sorted((gan / name).iterdir()) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] == [f"{i:06d}.png" for i in range(16)]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    finish(in_place([*test, *QUIET]), gan, monkeypatch)
    [score] = {record["scores"]["frechet/pixels"] for record in read_records(gan / "runs" / "my_gan" / RESULTS)[1:]}
    assert f"results.jsonl: frechet/pixels {score:.6g} (64 images" in (gan / "output.txt").read_text()


# The README


def test_the_python_examples_of_the_readme_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [content for language, content in blocks((REPOSITORY / "README.md").read_text()) if language == "python"]
    text = "\n".join(examples)
    assert "max_steps=1500" in text
    script = tmp_path / "example.py"
    script.write_text(text.replace("max_steps=1500", "max_steps=3").replace("steps=200", "steps=4"))

    def run() -> None:
        names = runpy.run_path(str(script))
        images = names["images"]
        assert images.shape == (16, 1, 8, 8)
        assert bool(torch.isfinite(images).all())
        np.save("images.npy", images.numpy())

    finish(run, tmp_path, monkeypatch)
    assert np.load(tmp_path / "images.npy").std() > 0
