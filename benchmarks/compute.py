"""Cases of the suite that run a network: ours and diffusers' by turns, and the machine's own limit."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import lightning
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.alternate import Work, alternate, now, spread
from benchmarks.memory import network_bytes
from benchmarks.setting import Result, Setting, diffusers_network, quiet, row
from diffusion_lit.averaging import WeightAverages
from diffusion_lit.callbacks import EMA
from diffusion_lit.data import ImageData, ImageDataset, InMemoryImages
from diffusion_lit.data.base import Split
from diffusion_lit.diffusion import DDIM, ImageNoise
from diffusion_lit.execution import Execution
from diffusion_lit.images import from_uint8
from diffusion_lit.metrics import Inception
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.trainer import Trainer

UNTIMED = 2
"""First steps under a Trainer that are not timed."""
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


class Pixels(ImageData):
    """Random images in memory, as many as CIFAR-10 has."""

    image_shape = (3, 32, 32)

    def load(self, split: Split) -> ImageDataset | None:
        if split != "train":
            return None
        images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return InMemoryImages("random pixels", images)


def limits(setting: Setting) -> Iterator[Result]:
    """The machine's own: a large matrix product, and the 3x3 convolution that the network has most of."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    size = 8192 if setting.on_gpu else 2048
    a = torch.randn(size, size, device=setting.device, dtype=dtype)
    layout = torch.channels_last if setting.on_gpu else torch.contiguous_format
    conv = nn.Conv2d(256, 256, 3, padding=1).to(setting.device, dtype).to(memory_format=layout)
    x = torch.randn(max(setting.batch_sizes), 256, 16, 16, device=setting.device, dtype=dtype).to(memory_format=layout)
    x_with_gradient = x.clone().requires_grad_()
    conv_gflop = 2 * x.numel() * 256 * 9 / 1e9

    # So often that waiting for a GPU's end takes no part in it.
    repeats = 20 if setting.on_gpu else 1

    def product() -> None:
        for _ in range(repeats):
            a @ a

    def convolution() -> None:
        with torch.no_grad():
            for _ in range(repeats):
                conv(x)

    def with_gradients() -> None:
        for _ in range(repeats):
            y = conv(x_with_gradient)
            torch.autograd.grad(y, [x_with_gradient, *conv.parameters()], y)

    kinds: dict[str, Work] = {
        "product": product,
        "convolution": convolution,
        "convolution and its gradients": with_gradients,
    }
    times = alternate(kinds, 2 * setting.rounds, setting.device)
    gflop = (2 * size**3 / 1e9, conv_gflop, 3 * conv_gflop)
    for name, amount in zip(kinds, gflop, strict=True):
        yield row(f"limit: {name}", [{name: t[name]} for t in times], gflop=repeats * amount)


def forward(setting: Setting) -> Iterator[Result]:
    """The network alone, without gradients."""
    networks: dict[str, tuple[Callable[..., object], Setting]] = {}
    for name, execution in setting.variants().items():
        network = setting.ours().eval()
        networks[name] = (execution.of(network) or network, setting)
    networks |= {name: (own.theirs().eval(), own) for name, own in setting.peers().items()}

    def run(network: Callable[..., object], own: Setting, x: Tensor, t: Tensor) -> None:
        with torch.no_grad(), own.precision():
            network(x, t)

    for batch_size in setting.batch_sizes:
        x, t = setting.images(batch_size)
        kinds: dict[str, Work] = {name: partial(run, *found, x, t) for name, found in networks.items()}
        times = alternate(kinds, setting.rounds, setting.device)
        gflop = setting.gflop * batch_size
        case, best = f"forward, batch {batch_size}", list(setting.variants())[-1]
        yield row(case, times, setting.pairs(), gflop=gflop, limit="convolution", rate_of=best)


def training(setting: Setting) -> Iterator[Result]:
    """One optimiser step: scaling, noise, forward, backward, clipping, Adam, average of the weights."""
    for batch_size in setting.batch_sizes:
        pixels = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=setting.device)
        # Graphs are for sampling.
        variants = {name: variant for name, variant in setting.variants().items() if not variant.cuda_graphs}
        kinds: dict[str, Work] = {name: our_step(setting, pixels, variant) for name, variant in variants.items()}
        kinds |= {name: their_step(own, pixels) for name, own in setting.peers().items()}
        best = list(variants)[-1]
        kinds[f"{best}, by Trainer"] = partial(trainer_step, setting, batch_size, variants[best])
        times = alternate(kinds, setting.few, setting.device)
        yield row(
            f"training step, batch {batch_size}",
            times,
            [*setting.pairs(variants), (f"{best}, by Trainer", best)],
            rate_of=best,
            gflop=3 * setting.gflop * batch_size,
            images=batch_size,
            limit="convolution and its gradients",
        )


def our_step(setting: Setting, pixels: Tensor, execution: Execution = Execution()) -> Callable[[], None]:
    """One step by our parts, without a Trainer; where a switch is on, Adam is fused too."""
    model = setting.model(execution).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, fused=execution != Execution() or None)
    averages = WeightAverages(model, [0.9999])

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
    network = setting.theirs().train()
    optimizer = torch.optim.Adam(network.parameters(), 2e-4)
    average = EMAModel(network.parameters(), 0.9999, foreach=True)
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
    """When steps had ended.

    Args:
        device: What is waited for.
        every: Whether every step is, or the last untimed one and the last alone, so that between them nothing waits.
    """

    def __init__(self, device: torch.device, every: bool) -> None:
        self.device = device
        self.every = every
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: lightning.pytorch.Trainer, *_: Any) -> None:
        if self.every or trainer.global_step in (UNTIMED, trainer.max_steps):
            self.ends.append(now(self.device))


def fit(
    setting: Setting, model: DiffusionModule, batch_size: int, steps: int, execution: Execution = Execution()
) -> list[float]:
    """Trains under our Trainer, as the command line does; when each step had ended."""
    clock = Clock(setting.device, every=isinstance(model, TimedModule))
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = Trainer(
            default_root_dir=folder,
            accelerator="gpu" if setting.on_gpu else "cpu",
            devices=1,
            precision="bf16-mixed" if setting.bf16 else "32-true",
            max_steps=steps,
            max_epochs=-1,
            check_val_every_n_epoch=None,
            limit_val_batches=0,
            gradient_clip_val=1.0,
            **asdict(execution),
            callbacks=[EMA([0.9999]), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, Pixels(batch_size=batch_size, on_device=setting.on_gpu))
    return clock.ends


def trainer_step(setting: Setting, batch_size: int, execution: Execution) -> float:
    """Seconds per step under our Trainer, to the end of the last, data and loop included.

    The model is made anew in each round, and first steps pay for fresh memory and for Adam's state: two are left out.
    """
    optimizer = partial(torch.optim.Adam, lr=2e-4, fused=execution != Execution() or None)
    steps = 50 if setting.on_gpu else 3
    model = setting.model(optimizer=optimizer, max_skipped_steps=None if setting.on_gpu else 10)
    ends = fit(setting, model, batch_size, UNTIMED + steps, execution)
    return (ends[-1] - ends[0]) / steps


class TimedAdam(torch.optim.Adam):
    """Adam that sums up the seconds it takes itself, without those of the closure that makes the gradients."""

    def __init__(self, parameters: Any, spent: dict[str, float], device: torch.device) -> None:
        super().__init__(parameters, lr=2e-4)
        self.spent = spent
        self.device = device

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        start = now(self.device)
        super().step()
        self.spent["optimiser"] += now(self.device) - start
        return loss


class TimedModule(DiffusionModule):
    """Sums up the seconds of forward, backward, optimiser and average.

    Attributes:
        spent: Seconds by part, of every step so far.
        steps: `spent` at the end of every step.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self.spent = dict.fromkeys(("forward", "backward", "optimiser", "average"), 0.0)
        super().__init__(network, optimizer=partial(TimedAdam, spent=self.spent, device=device))
        self.timed_on = device
        self.steps: list[float] = []

    def training_step(self, *args: Any) -> Any:
        return self._timed("forward", super().training_step, *args)

    def backward(self, *args: Any, **kwargs: Any) -> None:
        self._timed("backward", super().backward, *args, **kwargs)

    def on_train_start(self) -> None:
        super().on_train_start()
        averages = self.averages
        if averages is not None:
            averages.update = partial(self._timed, "average", averages.update)  # type: ignore[method-assign]

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(sum(self.spent.values()))

    def _timed(self, part: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = now(self.timed_on)
        found = work(*args, **kwargs)
        self.spent[part] += now(self.timed_on) - start
        return found


def overhead(setting: Setting) -> Iterator[Result]:
    """What of a step under our Trainer is neither forward, backward, optimiser nor average: data, loop and clipping.

    On a GPU every part waits for the device, which a run does not.
    """
    batch_size = setting.batch_sizes[0]
    model = TimedModule(setting.ours(), setting.device)
    ends = fit(setting, model, batch_size, UNTIMED + setting.few)
    timed = slice(UNTIMED - 1, None)
    times = [
        {"step": end - start, "its parts": whole - before, "the rest": end - start - (whole - before)}
        for start, end, before, whole in zip(
            ends[timed], ends[UNTIMED:], model.steps[timed], model.steps[UNTIMED:], strict=False
        )
    ]
    yield row(f"Lightning's share, batch {batch_size}", times, [("the rest", "step")], parts=model.spent)


def averages(setting: Setting) -> Iterator[Result]:
    """The average of the weights after a step."""
    ours, theirs = setting.ours(), list(setting.theirs().parameters())
    mine = WeightAverages(ours, [0.9999])
    their, slow = (EMAModel(theirs, 0.9999, foreach=foreach) for foreach in (True, False))
    kinds: dict[str, Work] = {
        "ours": partial(mine.update, ours),
        "diffusers": partial(their.step, theirs),
        "diffusers, by default": partial(slow.step, theirs),
    }
    found = [("ours", "diffusers"), ("ours", "diffusers, by default")]
    yield row("average of the weights", alternate(kinds, setting.rounds, setting.device), found)


def sampling(setting: Setting) -> Iterator[Result]:
    """Images from noise by DDIM, in float32 or bf16 networks."""
    batch_size, steps = setting.sampling

    def ours(model: DiffusionModule) -> None:
        with setting.precision():
            model.sample(range(batch_size))

    def theirs(pipeline: Any, own: Setting) -> None:
        with own.precision():
            pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="pt")

    variants = setting.variants()
    kinds: dict[str, Work] = {
        name: partial(ours, setting.model(variant, sampler=DDIM(steps)).eval()) for name, variant in variants.items()
    }
    for name, own in setting.peers().items():
        pipeline = diffusers.DDIMPipeline(own.theirs().eval(), diffusers.DDIMScheduler(**BETAS))
        pipeline.set_progress_bar_config(disable=True)
        kinds[name] = partial(theirs, pipeline, own)
    times = alternate(kinds, setting.few, setting.device)
    gflop = setting.gflop * batch_size * steps
    yield row(
        f"DDIM-{steps}, batch {batch_size}",
        times,
        setting.pairs(),
        gflop=gflop,
        images=batch_size,
        limit="convolution",
        rate_of=list(variants)[-1],
    )


def waits(setting: Setting) -> Iterator[Result]:
    """How often the host waits for a GPU in a training step and in a DDIM sample; none without a GPU."""
    if not setting.on_gpu:
        return
    batch_size, steps = setting.sampling
    pixels = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=setting.device)
    model = setting.model(sampler=DDIM(steps)).eval()
    fused = Execution(channels_last=True)
    cases: dict[str, Callable[[], object]] = {
        "a training step": our_step(setting, pixels, fused),
        f"DDIM-{steps}": partial(model.sample, range(batch_size)),
    }
    for name, work in cases.items():
        work()
        torch.cuda.synchronize(setting.device)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            work()
            torch.cuda.set_sync_debug_mode("default")
        places = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in seen})
        yield {"case": f"waits in {name}", "seconds": {}, "ratios": {}, "waits": len(seen), "places": places}


def noise(setting: Setting) -> Iterator[Result]:
    """The noise of a step of ancestral sampling beside the network's forward pass."""
    network = setting.ours().eval()
    for batch_size in setting.batch_sizes:
        x, t = setting.images(batch_size)
        source = ImageNoise(0, range(batch_size), (3, 32, 32), setting.device)

        def run(x: Tensor = x, t: Tensor = t) -> None:
            with torch.no_grad(), setting.precision():
                network(x, t)

        def draw(source: ImageNoise = source) -> None:
            source.draw()

        times = alternate({"noise": draw, "forward": run}, setting.rounds, setting.device)
        yield row(f"noise of a step, batch {batch_size}", times, [("noise", "forward")])


def features(setting: Setting) -> Iterator[Result]:
    """What FID asks of every image, 32x32: Inception's features, with random weights, always in float32."""
    batch_size = 64 if setting.on_gpu else 4
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=setting.device)
    with tempfile.TemporaryDirectory() as folder:
        extractor = Inception(str(inception_weights(Path(folder) / "weights.pth")))
        extractor.prepare()

    def extract() -> None:
        with torch.no_grad():
            extractor(images)

    times = alternate({"ours": extract}, setting.few, setting.device)
    yield row(f"FID features, batch {batch_size}", times, images=batch_size)


def inception_weights(path: Path) -> Path:
    """Random weights in a file of torch-fidelity's format."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        """The network, which cannot be made without weights otherwise."""

        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            pass

    torch.save({}, path)
    torch.save(Untrained("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    return path


def memory(setting: Setting) -> Iterator[Result]:
    """The most that a training step needs: on a GPU as its allocator says, else as benchmarks/memory.py counts."""
    for batch_size in setting.batch_sizes:
        found = {}
        if setting.on_gpu:
            pixels = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=setting.device)
            for name, make in (("ours", our_step), ("diffusers", their_step)):
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated(setting.device)
                step = make(setting, pixels)
                for _ in range(2):
                    step()
                torch.cuda.reset_peak_memory_stats(setting.device)
                step()
                found[name] = torch.cuda.max_memory_allocated(setting.device) - before
                del step
        else:
            for name, network in (("ours", UNet), ("diffusers", diffusers_network)):
                found[name] = network_bytes(partial(network, width=setting.width), batch_size, setting.bf16)["peak"]
        ratio = spread([found["ours"] / found["diffusers"]])
        yield {
            "case": f"memory of a step, batch {batch_size}",
            "seconds": {},
            "ratios": {"ours / diffusers": ratio},
            "bytes": found,
        }
