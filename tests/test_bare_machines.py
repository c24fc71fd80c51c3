"""No network, no GPU, no writable home, no shared memory, one processor: it runs, or says what is missing."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_cli import fit_args

BARE = """
mount --bind "$PLACE" "$PLACE"
mount -o remount,bind,ro /
mount -t tmpfs -o ro,size=4k none /dev/shm
exec "$@"
"""
Bare = Callable[..., tuple[int, str]]


@pytest.fixture
def bare(tmp_path: Path, repository: Path) -> Bare:
    """Runs the command line where only the test's own directory can be written; exit code and output."""

    def run(args: list[str]) -> tuple[int, str]:
        if subprocess.run(["unshare", "--map-root-user", "--mount", "--net", "true"], check=False).returncode:
            pytest.skip("a process may not have its own mounts and network here")
        (tmp_path / "tmp").mkdir()
        environment = {
            **os.environ,
            "PLACE": str(tmp_path), "TMPDIR": str(tmp_path / "tmp"), "HOME": "/root" if os.getuid() == 0 else "/",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(repository),
        }  # fmt: skip
        for name in ("WANDB_MODE", "DIFFUSION_LIT_CACHE"):
            environment.pop(name, None)
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "--net", "sh", "-ec", BARE, "sh",
             sys.executable, "-c", "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
             "from diffusion_lit.cli import main; main()", *args],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    return run


def folder(root: Path) -> list[str]:
    """A folder of images, and the options that read it by worker processes."""
    (root / "cats").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(root / "cats" / f"{i}.png")
    read = ["--data.init_args.channels", "1", "--data.init_args.image_size", "8", "--data.init_args.in_memory", "false"]
    return ["--data", "Folder", "--data.init_args.root", str(root), *read, "--data.init_args.num_workers", "2"]


def test_the_digits_train_and_wandb_stays_offline(tmp_path: Path, bare: Bare) -> None:
    code, said = bare(fit_args(tmp_path / "run"))
    assert code == 0, said
    assert "W&B runs offline" in said
    assert {"checkpoints", "samples.png", "csv", "wandb"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_workers_without_shared_memory_are_refused_by_name(tmp_path: Path, bare: Bare) -> None:
    code, said = bare(fit_args(tmp_path / "run", *folder(tmp_path / "images"), "--data.init_args.batch_size", "4"))
    assert code == 2
    assert [line for line in said.splitlines() if line.startswith("diffusion_lit: error: ")] == [
        "diffusion_lit: error: num_workers=2 needs shared memory, and /dev/shm cannot be used (Read-only file system); "
        "set data.init_args.num_workers=0"
    ]
