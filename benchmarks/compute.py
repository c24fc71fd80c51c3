"""Cases of the suite that run a network or a part of one: ours and diffusers' in turn, and the machine's own limit."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from benchmarks.alternate import Work, alternate
from benchmarks.setting import BETAS, Result, Setting, row
from benchmarks.training import our_step
from diffusion_lit.averaging import WeightAverages
from diffusion_lit.diffusion import DDIM, ImageNoise
from diffusion_lit.execution import Execution
from diffusion_lit.metrics import Inception
from diffusion_lit.module import DiffusionModule


def limits(setting: Setting) -> Iterator[Result]:
    """The machine's limit: a large matrix product, and the 3x3 convolution that takes most of the network's time."""
    dtype = torch.bfloat16 if setting.bf16 else torch.float32
    size = 8192 if setting.on_gpu else 2048
    a = torch.randn(size, size, device=setting.device, dtype=dtype)
    layout = torch.channels_last if setting.on_gpu else torch.contiguous_format
    conv = nn.Conv2d(256, 256, 3, padding=1).to(setting.device, dtype).to(memory_format=layout)
    x = torch.randn(max(setting.batch_sizes), 256, 16, 16, device=setting.device, dtype=dtype).to(memory_format=layout)
    x_with_gradient = x.clone().requires_grad_()
    conv_gflop = 2 * x.numel() * 256 * 9 / 1e9

    # Often enough that the wait for a GPU does not count.
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
    """How often the host waits for the GPU in a training step and in a DDIM sample; nothing without a GPU."""
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
    """Inception's features, as for FID, of 32x32 images; random weights, always in float32."""
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
    """Writes random weights in torch-fidelity's format."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        """The network, which otherwise cannot be made without weights."""

        def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
            pass

    torch.save({}, path)
    torch.save(Untrained("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    return path
