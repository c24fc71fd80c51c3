"""Cases of the suite without a network: reading images, and starting up."""

import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import lmdb
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.alternate import Work, alternate
from benchmarks.setting import Result, Setting, quiet, row
from benchmarks.training import Pixels
from diffusion_lit.data import LSUN, ImageData, Prepared
from diffusion_lit.tools.prepare import prepare

WORKERS = 2


def inputs(setting: Setting) -> Iterator[Result]:
    """Images per second of one process that reads, crops and stacks them, and of one with two worker processes.

    The time with workers is wall-clock time, which other work on the machine lengthens.
    """
    host = torch.device("cpu")
    data = ImageData(Pixels(), batch_size=128)
    with quiet():
        loader = iter(data.train_dataloader())
    with tempfile.TemporaryDirectory() as folder:
        write_lsun(Path(folder) / "tower_train_lmdb", count=64)
        lsun = ImageData(LSUN(folder, "tower", 256))
        with quiet():
            prepare(lsun, Path(folder) / "tower.images")
        prepared = ImageData(Prepared(f"{folder}/tower.images", 256))
        with quiet():
            by_workers = iter(ImageData(lsun.source, batch_size=16, num_workers=WORKERS).train_dataloader())

        def memory() -> None:
            for _ in range(40):
                next(loader)

        def all_of(source: ImageData) -> Callable[[], None]:
            def read() -> None:
                for _ in source.stored_batches(0, 1, 16):
                    pass

            return read

        def workers() -> float:
            for _ in range(4 * WORKERS):
                # Batches that were read ahead while other kinds were timed.
                next(by_workers)
            begun = time.perf_counter()
            for _ in range(16):
                next(by_workers)
            return time.perf_counter() - begun

        kinds: dict[str, Work] = {
            "CIFAR-10 in memory": memory,
            "LSUN 256": all_of(lsun),
            "LSUN 256, prepared": all_of(prepared),
            f"LSUN 256, {WORKERS} workers": workers,
        }
        with quiet():
            times = alternate(kinds, setting.rounds, host)
    for name, count in zip(kinds, (40 * 128, 64, 64, 16 * 16), strict=True):
        yield row(f"input: {name}", [{name: t[name]} for t in times], images=count)


def write_lsun(path: Path, count: int) -> None:
    """Writes a database like LSUN's, of pieces of two photographs, 256 pixels on the short side."""
    path.mkdir(parents=True)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    with lmdb.open(str(path), map_size=1 << 28) as database, database.begin(write=True) as transaction:
        for i in range(count):
            left, top = 37 * i % 298, 23 * i % 171
            stream = io.BytesIO()
            photographs[i % 2].crop((left, top, left + 342, top + 256)).save(stream, "JPEG", quality=75)
            transaction.put(b"%040d" % i, stream.getvalue())


def start(setting: Setting) -> Iterator[Result]:
    """Time of a whole process that makes one training step on the digits."""
    root = Path(__file__).parent.parent
    kind = "gpu" if setting.on_gpu else "cpu"
    times = []
    for _ in range(max(2, setting.rounds // 4)):
        with tempfile.TemporaryDirectory() as folder:
            args = ["fit", "-c", "digits", "--trainer.max_steps", "1"]
            options = [
                f"--trainer.default_root_dir={folder}",
                "--trainer.logger=false",
                f"--trainer.accelerator={kind}",
            ]
            few = ["--evaluation.every_n_steps=null", "--evaluation.at_start=false", "--sample_grid.num_images=1"]
            before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "diffusion_lit", *args, *options, *few],
                cwd=root, check=True, capture_output=True, env={**os.environ, "WANDB_MODE": "disabled"},
            )  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            times.append({"processor": cpu, "clock": time.perf_counter() - clock})
    yield row("start-up and one step", times)
