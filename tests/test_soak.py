"""A long run with sampling and scoring every few seconds: what it holds does not grow."""

import csv
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_cli import CPU

SECONDS = float(os.environ.get("DIFFUSION_LIT_SOAK", "3600"))
OFTEN = [
    *("--trainer.max_steps", "-1", "--sample_grid.every_n_steps", "10", "--sample_grid.sampler.steps", "10"),
    *("--evaluation.every_n_steps", "10", "--evaluation.training_num_images", "64"),
    *("--evaluation.training_sampler.steps", "10"),
    *("--checkpoints.every_n_steps", "10", "--checkpoints.keep_every_n_steps", "500"),
    *("--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "10", "--checkpoints.keep_at_most", "3"),
]


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for process in found:
        for task in Path(f"/proc/{process}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found


def held(pid: int) -> dict[str, int]:
    """What a process and its descendants hold; memory is what is theirs alone, in KiB.

    Threads of descendants, W&B's service, are counted for themselves: its runtime starts another now and then.
    """
    now = {"processes": 0, "threads": 0, "service threads": 0, "files": 0, "memory": 0}
    for process in family(pid):
        place = Path(f"/proc/{process}")
        try:
            rollup = (place / "smaps_rollup").read_text().splitlines()
            counts = len(list((place / "task").iterdir())), len(list((place / "fd").iterdir()))
        except (FileNotFoundError, ProcessLookupError):
            continue
        now["processes"] += 1
        now["threads" if process == pid else "service threads"] += counts[0]
        now["files"] += counts[1]
        now["memory"] += sum(int(line.split()[1]) for line in rollup if line.startswith("Private_"))
    return now


@pytest.mark.slow
def test_memory_files_threads_and_processes_stay_flat(tmp_path: Path) -> None:
    """What is held in the last quarter is compared with what was in the second; DIFFUSION_LIT_SOAK=<seconds>."""
    args = ["fit", "-c", "digits", *CPU, *OFTEN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    rows = []
    with (tmp_path / "output.txt").open("w") as output:
        run = subprocess.Popen(
            [sys.executable, "-m", "diffusion_lit", *args, "--trainer.default_root_dir", str(tmp_path / "run")],
            stdout=output, stderr=output, env=environment,
        )  # fmt: skip
        start = time.monotonic()
        while (passed := time.monotonic() - start) < SECONDS and run.poll() is None:
            rows.append({"seconds": round(passed), **held(run.pid)})
            time.sleep(SECONDS / 720)
        alive = run.poll() is None
        run.send_signal(signal.SIGTERM)
        code = run.wait(60)
    with (tmp_path / "soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert alive, (tmp_path / "output.txt").read_text()[-3000:]
    assert code == 75
    quarter = len(rows) // 4
    early, late = rows[quarter : 2 * quarter], rows[-quarter:]
    print(f"{len(rows)} looks in {SECONDS:,.0f} s, {tmp_path / 'soak.csv'}")
    for name in rows[0].keys() - {"seconds"}:
        before, after = ([row[name] for row in part] for part in (early, late))
        print(f"{name}: median {statistics.median(before):,} then {statistics.median(after):,}, most {max(after):,}")
        if name == "service threads":
            assert max(after) <= max(before) + 2
            continue
        assert statistics.median(after) <= statistics.median(before) * (1.02 if name == "memory" else 1)
        assert max(after) <= max(before) * (1.05 if name == "memory" else 1)
    for folder in ("checkpoints", "samples"):
        assert len(list((tmp_path / "run" / folder).iterdir())) > 0
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 6
