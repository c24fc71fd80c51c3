"""How a network is run: what changes its speed and not, but for rounding, what it computes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

INDUCTOR = "inductor"


@dataclass(frozen=True)
class Execution:
    """Switches for the network, each off by default. None shows in a checkpoint: weights keep names and values.

    Attributes:
        channels_last: Whether weights of convolutions lie in memory with channels last, which tensor cores want.
        compile: A backend of torch.compile, "inductor" say; shapes are static, so that each batch size is compiled
            once, and from torch's limit of eight on not at all. None: the network runs as it is.
        cuda_graphs: Whether what needs no gradients, which is sampling, replays CUDA graphs. On a CPU there are none.

    Raises:
        ValueError: If there is no such backend, or graphs are asked for without "inductor", which records them.
    """

    channels_last: bool = False
    compile: str | None = None
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.cuda_graphs and self.compile != INDUCTOR:
            raise ValueError(
                f"trainer.cuda_graphs=true needs the network compiled: set --trainer.compile {INDUCTOR}, "
                f"not {self.compile}"
            )
        if self.compile not in (None, INDUCTOR):
            known = sorted(torch.compiler.list_backends(exclude_tags=()))
            if self.compile not in known:
                raise ValueError(
                    f"trainer.compile={self.compile!r} is no backend of torch.compile; choose {INDUCTOR}, or another "
                    f"of {', '.join(known)}"
                )

    def of(self, network: nn.Module) -> Callable[..., Tensor] | None:
        """What to call in place of a network, whose memory layout is changed in place; None: the network itself."""
        network.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)
        return None if self.compile is None else Compiled(network, self.compile, self.cuda_graphs)


class Compiled:
    """A network compiled at its first call; no module itself, so that weights are not found twice.

    Args:
        network: Which; it stays as it is.
        backend: Of torch.compile.
        cuda_graphs: Whether calls without gradients replay graphs.
    """

    def __init__(self, network: nn.Module, backend: str, cuda_graphs: bool) -> None:
        self._run: Any = torch.compile(network, dynamic=False, backend=backend)
        self._replay: Any = torch.compile(network, dynamic=False, mode="reduce-overhead") if cuda_graphs else None

    def __call__(self, *inputs: Any) -> Tensor:
        if self._replay is None or torch.is_grad_enabled():
            answer: Tensor = self._run(*inputs)
            return answer
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        # A replay writes over the answer of the one before.
        replayed: Tensor = self._replay(*inputs)
        return replayed.clone()
