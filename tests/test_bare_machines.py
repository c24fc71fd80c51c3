"""No network, no GPU, no writable home, no shared memory, one processor: it runs, or says what is missing."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import tiny
from tests.test_cli import fit_args

BARE = """
mount --bind "$PLACE" "$PLACE"
mount -t tmpfs none "$TMPDIR"
mount -o remount,bind,ro /
mount -t tmpfs -o ro,size=4k none /dev/shm
exec "$@"
"""
Bare = Callable[..., tuple[int, str]]


@pytest.fixture
def bare(tmp_path: Path, repository: Path) -> Iterator[Bare]:
    """Runs the command line where only the test's own directory can be written; exit code and output."""
    # W&B's sockets lie in it, and a socket's path has at most 107 bytes.
    short = tempfile.mkdtemp(prefix="bare")

    def run(args: list[str]) -> tuple[int, str]:
        if subprocess.run(["unshare", "--map-root-user", "--mount", "--net", "true"], check=False).returncode:
            pytest.skip("a process may not have its own mounts and network here")
        environment = {
            "PATH": os.environ["PATH"], "PYTHONPATH": str(repository), "PLACE": str(tmp_path),
            "TMPDIR": short, "HOME": "/root" if os.getuid() == 0 else "/",
            "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        done = subprocess.run(
            ["unshare", "--map-root-user", "--mount", "--net", "sh", "-ec", BARE, "sh",
             sys.executable, "-c", "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
             "from diffusion_lit.cli import main; main()", *args],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    yield run
    os.rmdir(short)


@pytest.mark.parametrize("limit", ["500_000_000", "3_900_000_000"])
@pytest.mark.parametrize("command", ["fit", "predict", "import", "prepare"])
def test_too_little_address_space_is_one_line(repository: Path, command: str, limit: str) -> None:
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))\n"
        f"from diffusion_lit.main import main; main(['{command}'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("diffusion_lit: error: the address space of this process is limited to ")
    assert "ulimit -v unlimited" in line


@pytest.mark.further
@pytest.mark.parametrize("home", ["/dev/null", None, "/nowhere", ""])
def test_a_home_that_is_not_there_does_not_matter(repository: Path, tmp_path: Path, home: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {"PYTHONPATH": str(repository), **({} if home is None else {"HOME": home})}
    command = [sys.executable, "-m", "diffusion_lit", *fit_args(tmp_path / "run", max_steps=1)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert tiny.last(tmp_path / "run").is_file()


def folder(root: Path) -> list[str]:
    """A folder of images, and the options that read it by worker processes."""
    (root / "cats").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((8, 8), 50 * i, np.uint8)).save(root / "cats" / f"{i}.png")
    read = ["--data.source.channels", "1", "--data.source.image_size", "8", "--data.source.in_memory", "false"]
    return ["--data.source", "Folder", "--data.source.root", str(root), *read, "--data.num_workers", "2"]


@pytest.mark.further
def test_the_digits_train_and_wandb_stays_offline(tmp_path: Path, bare: Bare) -> None:
    code, said = bare(fit_args(tmp_path / "run"))
    assert code == 0, said
    assert "W&B runs offline" in said, said
    assert {"checkpoints", "samples.png", "wandb"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert (tmp_path / "run" / tiny.CURVES).is_file()


@pytest.mark.further
def test_workers_without_shared_memory_are_refused_by_name(tmp_path: Path, bare: Bare) -> None:
    code, said = bare(fit_args(tmp_path / "run", *folder(tmp_path / "images"), "--data.batch_size", "4"))
    assert code == 2
    assert [line for line in said.splitlines() if line.startswith("diffusion_lit: error: ")] == [
        "diffusion_lit: error: num_workers=2 needs shared memory, and /dev/shm cannot be used (Read-only file system); "
        "set --data.num_workers 0"
    ]
