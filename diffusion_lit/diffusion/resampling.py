"""Training times learned from the losses."""

import torch
from torch import Tensor

from diffusion_lit.diffusion.process import Process, require_chain
from diffusion_lit.diffusion.times import Times


class LossSecondMoment(Times):
    """Times of a chain, drawn in proportion to the root mean square of the latest losses there.

        p_k = (1 - u) r_k / sum_j r_j + u / T,    r_k = sqrt(mean of the last H losses at k, squared)

    and uniformly until every k has H losses. The loss of an image has the weight 1 / (T p_k), so that the mean is that
    of uniform times; among all p this one has the least variance.

    The history stays on the device of the losses, so that a step never waits for the host. Processes that receive the
    same losses in the same order have the same history, and draw from the same p.

    Args:
        history: H, number of losses kept per time, at least 1.
        uniform: u, share of uniform draws, in (0, 1], so that every time is visited.

    Raises:
        ValueError: If a number is out of range.

    Source: Nichol & Dhariwal 2021, section 3.3 and eq. 18; H and u from there and its code.
    """

    learns = True

    def __init__(self, history: int = 10, uniform: float = 0.001) -> None:
        if history < 1 or not 0 < uniform <= 1:
            raise ValueError(
                f"history={history} must be at least 1 and uniform={uniform} lie in (0, 1]; the paper has 10 and 0.001"
            )
        self.history = history
        self.uniform = uniform
        # One ring buffer for each k = 1 .. T, and a last one for losses that are not kept.
        self._losses: Tensor | None = None
        self._counts: Tensor | None = None

    def _tables(self, num_steps: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the losses, float64, (T + 1, H), and the number of losses so far, int64, (T + 1,)."""
        if self._losses is None or self._counts is None:
            self._losses = torch.zeros(num_steps + 1, self.history, dtype=torch.float64)
            self._counts = torch.zeros(num_steps + 1, dtype=torch.int64)
        if len(self._counts) != num_steps + 1:
            kept = len(self._counts) - 1
            raise ValueError(
                f"the objective's losses are of a chain of {kept} steps, the process has {num_steps}; "
                f"set --model.process.num_steps {kept}, or start a new run"
            )
        self._losses, self._counts = self._losses.to(device), self._counts.to(device)
        return self._losses, self._counts

    def probabilities(self, num_steps: int, device: torch.device | str = "cpu") -> Tensor:
        """Returns p_1 .. p_T, float64, (T,), summing to 1.

        Args:
            num_steps: T, the same in every call.
            device: Device of the result.

        Raises:
            ValueError: If the losses are of a chain of another length.
        """
        losses, counts = (table[:-1] for table in self._tables(num_steps, torch.device(device)))
        root = losses.square().mean(1).sqrt()
        total = root.sum()
        learned = (1 - self.uniform) * root / total + self.uniform / num_steps
        return torch.where((counts >= self.history).all() & (total > 0), learned, 1 / num_steps)

    def draw(
        self, count: int, process: Process, device: torch.device, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        num_steps = require_chain(process, "LossSecondMoment").num_steps
        p = self.probabilities(num_steps, device)
        row = torch.multinomial(p, count, replacement=True, generator=generator)
        return (row + 1).to(torch.float64) / num_steps, 1 / (num_steps * p[row])

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Replaces the oldest losses by new ones, in their order; losses that are not finite are left out.

        Args:
            t: Times that were drawn, (n,).
            losses: Losses there, without importance weights, (n,).

        Raises:
            RuntimeError: If nothing has been drawn yet, so that T is not known.
        """
        if self._counts is None:
            raise RuntimeError("update before the first draw: the number of times is not known yet")
        num_steps = len(self._counts) - 1
        kept, counts = self._tables(num_steps, t.device)
        losses = losses.detach().to(torch.float64)
        row = (t * num_steps).round().long() - 1
        row, order = torch.where(losses.isfinite(), row, num_steps).sort(stable=True)
        place = torch.arange(len(row), device=row.device)
        # A time may occur more than once, and more than H times.
        before = place - torch.searchsorted(row, row)
        after = torch.searchsorted(row, row, right=True) - place - 1
        slot = (counts[row] + before) % self.history
        kept[torch.where(after < self.history, row, num_steps), slot] = losses[order]
        counts.index_add_(0, row, torch.ones_like(row))

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the losses, float64, (T, H), and their numbers so far, int64, (T,); empty before the first draw."""
        if self._losses is None or self._counts is None:
            return {}
        return {"losses": self._losses[:-1].cpu().clone(), "counts": self._counts[:-1].cpu().clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restores a state; an empty one forgets all losses.

        Raises:
            ValueError: If the state has another number of losses per time.
        """
        if not state:
            self._losses = self._counts = None
            return
        losses, counts = state["losses"], state["counts"]
        if losses.shape[1] != self.history:
            raise ValueError(
                f"the checkpoint keeps {losses.shape[1]} losses per time, these {self.history}; "
                f"set history of --model.objective.times to {losses.shape[1]}"
            )
        self._losses = torch.cat([losses, losses.new_zeros(1, self.history)])
        self._counts = torch.cat([counts, counts.new_zeros(1)])
