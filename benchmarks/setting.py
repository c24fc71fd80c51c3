"""What the benchmarks of a network share: the setting, both networks, and the form of a result."""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import diffusers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.alternate import compare, spread
from diffusion_lit.execution import INDUCTOR, Execution
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import UNet

Result = dict[str, Any]
"""A row: the case, seconds by name, ratios by name, all times, and rates."""
BETAS = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
"""The default process, for diffusers' schedulers."""
AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """Where, at which sizes and how often to measure.

    Attributes:
        device: Device of the networks.
        bf16: Whether they run in bf16, by autocast.
        rounds: Number of rounds; cases that take long have half as many.
        batch_sizes: For forward passes and training steps.
        sampling: Images at once, and steps of DDIM.
        width: Of the network; DDPM's has 128.
        switches: Whether ours is run with each switch of `Execution` too.
    """

    device: torch.device
    bf16: bool
    rounds: int
    batch_sizes: Sequence[int]
    sampling: tuple[int, int]
    width: int = 128
    switches: bool = False

    def variants(self) -> dict[str, Execution]:
        """The ways in which ours is run; the last has all switches on."""
        found = {"ours": Execution()}
        if self.switches:
            found |= {
                "ours, channels last": Execution(channels_last=True),
                "ours, compiled": Execution(channels_last=True, compile=INDUCTOR),
                "ours, compiled, graphs": Execution(channels_last=True, compile=INDUCTOR, cuda_graphs=True),
            }
        return found

    def pairs(self, variants: Iterable[str] | None = None) -> list[tuple[str, str]]:
        """Ratios of every variant, or of these, to every peer."""
        return [(ours, peer) for ours in variants or self.variants() for peer in self.peers()]

    def peers(self) -> dict[str, "Setting"]:
        """The precisions in which diffusers is run: ours, and float32."""
        return {"diffusers": self, **({"diffusers, float32": replace(self, bf16=False)} if self.bf16 else {})}

    @property
    def few(self) -> int:
        """Rounds of cases that take long."""
        return max(2, self.rounds // 2)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def precision(self) -> AbstractContextManager[object]:
        """bf16 by autocast, or float32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def ours(self) -> UNet:
        """DDPM's CIFAR-10 network."""
        return awake(UNet(width=self.width)).to(self.device)

    def model(self, execution: Execution = Execution(), **parts: Any) -> DiffusionModule:
        """Our model, run in the given way."""
        model = DiffusionModule(self.ours(), **parts)
        model.execute(execution)
        return model

    def theirs(self) -> nn.Module:
        """Diffusers' network with the configuration of google/ddpm-cifar10-32, and the paper's dropout."""
        return awake(diffusers_network(self.width)).to(self.device)

    @cached_property
    def gflop(self) -> float:
        """GFLOP of one forward pass of one image; a multiply-add counts as two."""
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            UNet(width=self.width)(torch.zeros(1, 3, 32, 32), torch.zeros(1))
        return float(counter.get_total_flops()) / 1e9

    def images(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Noisy images and times, the network's input."""
        x = torch.randn(batch_size, 3, 32, 32, device=self.device)
        return x, torch.full((batch_size,), 500.0, device=self.device)


def diffusers_network(width: int) -> nn.Module:
    """Diffusers' network with the same number of parameters.

    Raises:
        RuntimeError: If the numbers differ.
    """
    network: nn.Module = diffusers.UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
        dropout=0.1,
    )
    sizes = [sum(p.numel() for p in n.parameters()) for n in (network, UNet(width=width))]
    if sizes[0] != sizes[1]:
        raise RuntimeError(f"the networks have {sizes} parameters and cannot be compared")
    return network


def awake(network: AnyModule) -> AnyModule:
    """Sets all weights to values other than zero, and returns the network."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.02)
    return network


def row(case: str, times: Sequence[Mapping[str, float]], pairs: Sequence[tuple[str, str]] = (), **more: Any) -> Result:
    """A result.

    Args:
        case: Its name.
        times: Seconds by name, of every round.
        pairs: Names whose ratios are given.
        more: Further entries. `gflop` and `images` become rates of the name in `rate_of`, by default the first.
    """
    seconds = {name: spread([t[name] for t in times]) for name in times[0]}
    first = seconds[more.setdefault("rate_of", next(iter(seconds)))]["median"]
    found: Result = {
        "case": case,
        "seconds": seconds,
        "ratios": {f"{a} / {b}": compare(times, a, b) for a, b in pairs},
        "times": [dict(t) for t in times],
    }
    for amount, rate in (("gflop", "gflop_per_s"), ("images", "images_per_s")):
        if amount in more:
            found[rate] = more.pop(amount) / first
    return {**found, **more}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences Lightning."""
    loggers = [logging.getLogger(f"lightning.{name}.utilities.rank_zero") for name in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
