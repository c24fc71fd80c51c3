"""How much of a codebook is used."""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

EVERY = 1000
LEAST = 0.01


def use(counts: Tensor) -> Tensor:
    """The share of codes that occur at all, a scalar; `counts`: how often each does, (num_codes,)."""
    return (counts > 0).double().mean()


def perplexity(counts: Tensor) -> Tensor:
    """The exponential of the entropy of the codes, in [1, num_codes]; `counts`: as for `use`."""
    p = counts.double() / counts.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum())


class CodebookWatch:
    """Warns if hardly any codes are used while training: looks at the codes of every `EVERY` steps.

    It warns once, and again if the codes were in use in between. A run that continues begins to count anew.

    Args:
        num_codes: Size of the codebook.
    """

    def __init__(self, num_codes: int) -> None:
        self.num_codes = num_codes
        self._used: Tensor | None = None
        self._steps = 0
        self._warned = False

    def add(self, codes: Tensor) -> None:
        """Takes note of codes of this process's images, int64, of any shape."""
        if self._used is None:
            self._used = torch.zeros(self.num_codes, dtype=torch.int32, device=codes.device)
        self._used[codes.flatten()] = 1

    def finish_step(self, step: int, world_size: int) -> None:
        """Counts a step, and warns if it is time and hardly any codes were used; collective.

        Args:
            step: The number of the step, for the message.
            world_size: Number of processes.
        """
        self._steps += 1
        if self._steps < EVERY or self._used is None:
            return
        used = self._used
        self._used, self._steps = None, 0
        if world_size > 1:
            torch.distributed.all_reduce(used)
        share = float(use(used))
        before, self._warned = self._warned, share < LEAST
        if self._warned and not before:
            rank_zero_warn(
                f"step {step}: the last {EVERY} steps used {round(share * self.num_codes)} of {self.num_codes} codes "
                f"({share:.2%}): unless training has only begun, the codebook has collapsed; start anew with a lower "
                "learning rate, fewer codes (--model.network.regularizer.num_codes), or a later discriminator "
                "(--model.adversarial.start)"
            )
