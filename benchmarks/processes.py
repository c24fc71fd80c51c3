"""Two processes of one thread against one process of two threads, in turn: training steps with the same batch.

    python -m benchmarks.processes

Needs two idle cores: times are wall-clock times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import torch

from benchmarks.alternate import compare, machine, spread
from benchmarks.setting import awake, quiet
from benchmarks.training import Pixels
from diffusion_lit.callbacks import EMA
from diffusion_lit.data import ImageData
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.trainer import Trainer

CORES = 2
KINDS = {"two processes": 2, "one process": 1}


class Ends(L.Callback):
    """Records when each step ended, by the clock."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter())


def work(processes: int, batch_size: int, steps: int, width: int, out: Path) -> None:
    """Trains in one of `processes` processes, and writes the mean seconds of a step after the first."""
    torch.set_num_threads(CORES // processes)
    ends = Ends()
    model = DiffusionModule(awake(UNet(width=width)), optimizer=partial(torch.optim.Adam, lr=2e-4))
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=processes,
            strategy="ddp" if processes > 1 else "auto",
            max_steps=1 + steps,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            callbacks=[EMA([0.9999]), ends],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, ImageData(Pixels(), batch_size=batch_size))
    if trainer.is_global_zero:
        out.write_text(json.dumps((ends.times[-1] - ends.times[0]) / steps))


def start(processes: int, *options: str) -> float:
    """Seconds of a step in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "benchmarks.processes", "--work", str(processes), "--out", str(out), *options]
        threads = str(CORES // processes)
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True)
        return float(json.loads(out.read_text()))


def main(args: Sequence[str] | None = None) -> None:
    """Prints both times and their ratio, and writes all times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=16, help="over all processes")
    parser.add_argument("--steps", type=int, default=3, help="timed in each turn, after one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="of the network")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/processes.json"))
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    if given.work is not None:
        work(given.work, given.batch_size, given.steps, given.width, given.out)
        return
    options = [f"--{name}={getattr(given, name)}" for name in ("batch_size", "steps", "width")]
    times = [
        {name: start(KINDS[name], *options) for name in (list(KINDS) if i % 2 else list(KINDS)[::-1])}
        for i in range(given.rounds)
    ]
    ratio = compare(times, *KINDS)
    about = {**machine(torch.device("cpu")), "threads": CORES}
    found = {"machine": about, "batch_size": given.batch_size, "ratio": ratio, "times": times}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None))
    for name in KINDS:
        s = spread([t[name] for t in times])
        print(f"{name}: {s['median']:.3f} s a step of {given.batch_size} images ({s['min']:.3f} to {s['max']:.3f})")
    print(f"two / one: {ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})")


if __name__ == "__main__":
    main()
