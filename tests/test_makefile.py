"""What the targets of the Makefile would run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
TEXT = (REPOSITORY / "Makefile").read_text()
OF_A_CHECKPOINT = re.findall(r"^([\w-]+): .*## .*CKPT=", TEXT, re.MULTILINE)

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def commands(target: str, *variables: str) -> list[str]:
    """The lines that a target would run where everything is installed."""
    words = ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/.ready", target, *variables]
    return subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()


def test_targets_of_a_checkpoint_give_it_to_the_program() -> None:
    assert {"sample", "evaluate", "table-ddim", "table-guidance"} <= set(OF_A_CHECKPOINT)
    for target in OF_A_CHECKPOINT:
        name = "predict" if target == "sample" else "test"
        [line] = commands(target, "CKPT=runs/a/checkpoints/last.ckpt", "ARGS=--model.sampler.steps 2")
        assert f"-m diffusion_lit {name} --ckpt_path runs/a/checkpoints/last.ckpt " in line, target
        assert line.endswith("--model.sampler.steps 2"), target
    assert " --evaluation.table GuidanceTable " in commands("table-guidance", "CKPT=a")[0]


def test_targets_of_tests_run_pytest() -> None:
    for target, marked in (("test", ""), ("test-further", "-m further"), ("test-slow", "-m slow")):
        line = next(line for line in commands(target) if "pytest" in line)
        assert marked in line
        assert "diffusion_lit test" not in line
