"""Cases of the suite that train: steps of ours and of diffusers, under a Trainer or without, and their memory."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import diffusers
import lightning
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.alternate import Work, alternate, now, spread
from benchmarks.memory import network_bytes
from benchmarks.setting import BETAS, Result, Setting, diffusers_network, quiet, row
from diffusion_lit.averaging import WeightAverages
from diffusion_lit.callbacks import EMA
from diffusion_lit.data import ImageData, ImageDataset, InMemoryImages, Source, Split
from diffusion_lit.execution import Execution
from diffusion_lit.images import from_uint8
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet
from diffusion_lit.trainer import Trainer
from diffusion_lit.types import Network

UNTIMED = 2
"""First steps under a Trainer that are not timed."""


class Pixels(Source):
    """Random images in memory, as many as CIFAR-10 has."""

    image_shape = (3, 32, 32)

    def load(self, split: Split) -> ImageDataset | None:
        if split != "train":
            return None
        images = torch.randint(256, (50_000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return InMemoryImages("random pixels", images)


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
    """A function that makes one step with our parts, without a Trainer; with any switch on, Adam is fused too."""
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
    """A function that makes one step as diffusers' training examples do."""
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
    """Records when steps ended.

    Args:
        device: Waited for at the end of a step.
        every: Whether every step is recorded; else the last untimed one and the last, and nothing waits between them.

    Attributes:
        ends: Seconds.
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
    """Trains under our Trainer, as the command line does, and returns when steps ended; see `Clock`."""
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
        trainer.fit(model, ImageData(Pixels(), batch_size=batch_size))
    return clock.ends


def trainer_step(setting: Setting, batch_size: int, execution: Execution) -> float:
    """Seconds per step under our Trainer, data and loop included.

    Each round makes a new model; the first two steps, which allocate memory and Adam's state, are not counted.
    """
    optimizer = partial(torch.optim.Adam, lr=2e-4, fused=execution != Execution() or None)
    steps = 50 if setting.on_gpu else 3
    model = setting.model(optimizer=optimizer, max_skipped_steps=None if setting.on_gpu else 10)
    ends = fit(setting, model, batch_size, UNTIMED + steps, execution)
    return (ends[-1] - ends[0]) / steps


class TimedAdam(torch.optim.Adam):
    """Adam that sums up its own seconds, without those of the closure that computes the gradients."""

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
        spent: Seconds by part, over all steps so far.
        steps: `spent` at the end of every step.
    """

    def __init__(self, network: Network, device: torch.device) -> None:
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
    """The share of a step under our Trainer that is data, loop and clipping: the rest of forward, backward, optimiser
    and average.

    On a GPU every part waits for the device, which it does not in a run.
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


def memory(setting: Setting) -> Iterator[Result]:
    """Peak memory of a training step: on a GPU by its allocator, else as benchmarks/memory.py counts it."""
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
