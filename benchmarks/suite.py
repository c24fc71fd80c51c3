"""The benchmarks of docs/performance.md: ours and diffusers, by turns in one process.

    make bench
    make bench ARGS="--device cuda --precision bf16"

One JSON file with every time, and the tables as Markdown. At equal architecture: DDPM's CIFAR-10 network, 35.7 M
parameters, with random weights, on which no time depends. --cases chooses some.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import lightning
import lmdb
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from benchmarks.alternate import Work, alternate, compare, machine, now, spread
from diffusion_lit.averaging import WeightAverages
from diffusion_lit.callbacks import EMA
from diffusion_lit.data import LSUN, ImageData, ImageDataset, InMemoryImages, Prepared
from diffusion_lit.data.base import Split
from diffusion_lit.data.prepare import prepare
from diffusion_lit.diffusion import DDIM, ImageNoise
from diffusion_lit.images import from_uint8
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.trainer import Trainer

GFLOP_FORWARD = 12.44
"""Of the network, per 32x32 image; a multiply-add is two."""
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


@dataclass(frozen=True)
class Setting:
    """On what and how often to measure."""

    device: torch.device
    bf16: bool
    rounds: int
    batch_sizes: list[int]
    sampling: tuple[int, int]

    def precision(self) -> AbstractContextManager[object]:
        """bf16 by autocast, or float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()


class Pixels(ImageData):
    """Random images in memory, as many as CIFAR-10 has."""

    image_shape = (3, 32, 32)

    def load(self, split: Split) -> ImageDataset | None:
        if split != "train":
            return None
        images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return InMemoryImages("random pixels", images)


def awake(network: nn.Module) -> nn.Module:
    """With weights of which none is zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    return network


def our_network(setting: Setting) -> nn.Module:
    """DDPM's CIFAR-10 network."""
    return awake(UNet()).to(setting.device)


def their_network(setting: Setting) -> nn.Module:
    """Diffusers' network with the configuration of google/ddpm-cifar10-32, and the paper's dropout."""
    network = diffusers.UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
        dropout=0.1,
    )
    sizes = [sum(p.numel() for p in n.parameters()) for n in (network, UNet())]
    if sizes[0] != sizes[1]:
        raise RuntimeError(f"the networks have {sizes} parameters and cannot be compared")
    return awake(network).to(setting.device)


def forward(setting: Setting) -> Iterator[dict[str, Any]]:
    """The network alone, without gradients."""
    ours, theirs = our_network(setting).eval(), their_network(setting).eval()
    for batch_size in setting.batch_sizes:
        x = torch.randn(batch_size, 3, 32, 32, device=setting.device)
        time_ = torch.full((batch_size,), 500.0, device=setting.device)

        def run(network: nn.Module, x: Tensor = x, time_: Tensor = time_) -> None:
            with torch.no_grad(), setting.precision():
                network(x, time_)

        times = alternate({"ours": lambda: run(ours), "diffusers": lambda: run(theirs)}, setting.rounds, setting.device)
        yield row(f"forward, batch {batch_size}", times, "diffusers", gflop=GFLOP_FORWARD * batch_size)


def training(setting: Setting) -> Iterator[dict[str, Any]]:
    """One optimiser step: scaling, noise, forward, backward, clipping, Adam, average of the weights."""
    for batch_size in setting.batch_sizes:
        pixels = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=setting.device)
        kinds: dict[str, Work] = {
            "ours": our_step(setting, pixels),
            "diffusers": their_step(setting, pixels),
            "ours, by Trainer": lambda n=batch_size: trainer_step(setting, n),
        }
        times = alternate(kinds, max(2, setting.rounds // 2), setting.device)
        found = row(f"training step, batch {batch_size}", times, "diffusers", gflop=3 * GFLOP_FORWARD * batch_size)
        found["ratios"]["by Trainer / ours"] = compare(times, "ours, by Trainer", "ours")
        yield found


def our_step(setting: Setting, pixels: Tensor) -> Callable[[], None]:
    """One step by our parts, without a Trainer."""
    model = DiffusionModule(our_network(setting)).train()
    optimizer, averages = torch.optim.Adam(model.parameters(), 2e-4), WeightAverages(model, [0.9999])

    def step() -> None:
        with setting.precision():
            loss = model.objective(model.denoiser, from_uint8(pixels), {})["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.update(model)

    return step


def their_step(setting: Setting, pixels: Tensor) -> Callable[[], None]:
    """One step as diffusers' training examples make it."""
    network = their_network(setting).train()
    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    average = diffusers.training_utils.EMAModel(network.parameters(), 0.9999, foreach=True)
    scheduler = diffusers.DDPMScheduler(**BETAS)

    def step() -> None:
        clean = pixels.float() / 127.5 - 1
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=setting.device)
        with setting.precision():
            loss = F.mse_loss(network(scheduler.add_noise(clean, noise, t), t).sample.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(network.parameters())

    return step


class Clock(lightning.pytorch.Callback):
    """When each step had ended."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(now(self.device))


def trainer_step(setting: Setting, batch_size: int, steps: int = 2) -> float:
    """Seconds per step under our Trainer, from the end of one to the end of the next, data and loop included."""
    clock = Clock(setting.device)
    model = DiffusionModule(our_network(setting), optimizer=lambda parameters: torch.optim.Adam(parameters, 2e-4))
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="gpu" if setting.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if setting.bf16 else "32-true",
            max_steps=1 + steps,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            callbacks=[EMA([0.9999]), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, Pixels(batch_size=batch_size))
    return (clock.ends[-1] - clock.ends[0]) / steps


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lightning says nothing."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sampling(setting: Setting) -> Iterator[dict[str, Any]]:
    """Images from noise by DDIM, in float32 or bf16 networks."""
    batch_size, steps = setting.sampling
    model = DiffusionModule(our_network(setting), sampler=DDIM(steps)).eval()
    pipeline = diffusers.DDIMPipeline(their_network(setting).eval(), diffusers.DDIMScheduler(**BETAS))
    pipeline.set_progress_bar_config(disable=True)

    def ours() -> None:
        with setting.precision():
            model.sample(range(batch_size))

    def theirs() -> None:
        with setting.precision():
            pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="pt")

    times = alternate({"ours": ours, "diffusers": theirs}, max(2, setting.rounds // 2), setting.device)
    gflop = GFLOP_FORWARD * batch_size * steps
    yield row(f"DDIM-{steps}, batch {batch_size}", times, "diffusers", gflop=gflop)


def noise(setting: Setting) -> Iterator[dict[str, Any]]:
    """The noise of a step of ancestral sampling beside the network's forward pass."""
    network = our_network(setting).eval()
    for batch_size in setting.batch_sizes:
        x = torch.randn(batch_size, 3, 32, 32, device=setting.device)
        time_ = torch.full((batch_size,), 500.0, device=setting.device)
        source = ImageNoise(0, range(batch_size), (3, 32, 32), setting.device)

        def run(x: Tensor = x, time_: Tensor = time_) -> None:
            with torch.no_grad(), setting.precision():
                network(x, time_)

        def draw(source: ImageNoise = source) -> None:
            source.draw()

        times = alternate({"noise": draw, "forward": run}, setting.rounds, setting.device)
        yield {
            "case": f"noise of a step, batch {batch_size}",
            "seconds": {name: spread([t[name] for t in times]) for name in times[0]},
            "ratios": {"noise / forward": compare(times, "noise", "forward")},
            "times": times,
        }


def limits(setting: Setting) -> Iterator[dict[str, Any]]:
    """The machine's own: a large matrix product, and the 3x3 convolution that the network has most of."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    batch_size, size = max(setting.batch_sizes), 8192 if setting.device.type == "cuda" else 2048
    a = torch.randn(size, size, device=setting.device, dtype=dtype)
    conv = nn.Conv2d(256, 256, 3, padding=1).to(setting.device, dtype)
    x = torch.randn(batch_size, 256, 16, 16, device=setting.device, dtype=dtype)

    def product() -> None:
        a @ a

    def convolution() -> None:
        with torch.no_grad():
            conv(x)

    times = alternate({"product": product, "convolution": convolution}, 2 * setting.rounds, setting.device)
    for name, gflop in (("product", 2 * size**3 / 1e9), ("convolution", 2 * x.numel() * 256 * 9 / 1e9)):
        found = spread([t[name] for t in times])
        yield {"case": f"limit: {name}", "seconds": {name: found}, "ratios": {}, "gflop_per_s": gflop / found["median"]}


def inputs(setting: Setting) -> Iterator[dict[str, Any]]:
    """Images per second of one process that reads, crops and stacks."""
    host = torch.device("cpu")
    data = Pixels(batch_size=128)
    with quiet():
        loader = iter(data.train_dataloader())
    with tempfile.TemporaryDirectory() as folder:
        write_lsun(Path(folder) / "tower_train_lmdb", count=64)
        lsun = LSUN(folder, "tower", 256)
        with quiet():
            prepare(lsun, Path(folder) / "tower.images")
        prepared = Prepared(f"{folder}/tower.images", 256)

        def memory() -> None:
            for _ in range(40):
                next(loader)

        def all_of(source: ImageData) -> Callable[[], None]:
            def read() -> None:
                for _ in source.stored_batches(0, 1, 16):
                    pass

            return read

        kinds = {"CIFAR-10 in memory": memory, "LSUN 256": all_of(lsun), "LSUN 256, prepared": all_of(prepared)}
        with quiet():
            times = alternate(kinds, setting.rounds, host)
    counts = {"CIFAR-10 in memory": 40 * 128, "LSUN 256": 64, "LSUN 256, prepared": 64}
    for name, count in counts.items():
        found = spread([t[name] for t in times])
        rate = count / found["median"]
        yield {"case": f"input: {name}", "seconds": {name: found}, "ratios": {}, "images_per_s": rate}


def write_lsun(path: Path, count: int) -> None:
    """A database as LSUN's are, of pieces of two photographs, 256 pixels on the short side."""
    path.mkdir(parents=True)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    with lmdb.open(str(path), map_size=1 << 28) as database, database.begin(write=True) as transaction:
        for i in range(count):
            left, top = 37 * i % 298, 23 * i % 171
            stream = io.BytesIO()
            photographs[i % 2].crop((left, top, left + 342, top + 256)).save(stream, "JPEG", quality=75)
            transaction.put(b"%040d" % i, stream.getvalue())


def start(setting: Setting) -> Iterator[dict[str, Any]]:
    """From nothing to the end of a first training step on the digits, and of the process."""
    root = Path(__file__).parent.parent
    times = []
    for _ in range(max(2, setting.rounds // 4)):
        with tempfile.TemporaryDirectory() as folder:
            args = ["fit", "-c", "configs/base.yaml", "-c", "configs/digits.yaml", "--trainer.max_steps", "1"]
            options = [f"--trainer.default_root_dir={folder}", "--trainer.logger=false", "--trainer.accelerator=cpu"]
            few = ["--frechet.every_n_steps=null", "--frechet.at_start=false", "--sample_grid.num_images=1"]
            before, clock = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "diffusion_lit", *args, *options, *few],
                cwd=root, check=True, capture_output=True, env={**os.environ, "WANDB_MODE": "disabled"},
            )  # fmt: skip
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            times.append({"processor": cpu, "clock": time.perf_counter() - clock})
    seconds = {name: spread([t[name] for t in times]) for name in times[0]}
    yield {"case": "start-up and one step", "seconds": seconds, "ratios": {}, "times": times}


CASES: dict[str, Callable[[Setting], Iterator[dict[str, Any]]]] = {
    "limits": limits,
    "forward": forward,
    "training": training,
    "sampling": sampling,
    "noise": noise,
    "inputs": inputs,
    "start": start,
}


def row(case: str, times: list[dict[str, float]], peer: str, gflop: float) -> dict[str, Any]:
    """The result of ours beside a peer."""
    found = {name: spread([t[name] for t in times]) for name in times[0]}
    return {
        "case": case,
        "seconds": found,
        "ratios": {f"ours / {peer}": compare(times, "ours", peer)},
        "gflop_per_s": gflop / found["ours"]["median"],
        "times": times,
    }


def markdown(found: dict[str, Any]) -> str:
    """A line for every case."""

    def shown(value: dict[str, float], unit: str = "") -> str:
        return f"{value['median']:.3g}{unit} ({value['min']:.3g} to {value['max']:.3g})"

    seconds = "; ".join(f"{name} {shown(value, ' s')}" for name, value in found["seconds"].items())
    ratios = "; ".join(f"{name} {shown(value)}" for name, value in found["ratios"].items())
    rates = (("gflop_per_s", "GFLOP/s"), ("images_per_s", "images/s"))
    rate = "; ".join(f"{found[key]:,.0f} {unit}" for key, unit in rates if key in found)
    return f"| {found['case']} | {seconds} | {ratios} | {rate} |"


def main() -> None:
    """Runs the cases, prints a table and writes all times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="32", choices=("32", "bf16"))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; with one, its time is that of the process")
    parser.add_argument("--rounds", type=int, default=6, help="half as many for what takes long")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, help="by default runs/benchmarks/<device>_<precision>.json")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    large = device.type == "cuda"
    setting = Setting(
        device,
        given.precision == "bf16",
        given.rounds,
        batch_sizes=[128, 512] if large else [8],
        sampling=(512, 50) if large else (8, 10),
    )
    about = {**machine(device), "precision": given.precision, "diffusers": diffusers.__version__}
    about["lightning"] = lightning.__version__
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None), "\n", sep="\n")
    print("| case | seconds: median (least to most) | ratios, pair by pair | rate |\n|---|---|---|---|")
    results = []
    out = given.out or Path("runs/benchmarks") / f"{device.type}_{given.precision}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in given.cases:
        for found in CASES[name](setting):
            results.append(found)
            print(markdown(found), flush=True)
            out.write_text(json.dumps({"machine": about, "cases": results}, indent=1) + "\n")
    print(f"\nall times: {out}")


if __name__ == "__main__":
    main()
