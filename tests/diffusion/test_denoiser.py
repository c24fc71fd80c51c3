import pytest
import torch
from torch import Tensor, nn

from diffusion_lit.diffusion import DDIM, Denoiser, DiscreteProcess, Eps, Parameterization, V
from diffusion_lit.diffusion.samplers import clip_x0
from diffusion_lit.types import Condition

PROCESS = DiscreteProcess()
T_HALF = torch.tensor([0.5, 0.25], dtype=torch.float64)


class Stacked(nn.Module):
    """A network that puts out the halves and the quarters of its input, and as many further channels as asked for."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return torch.cat([x / 2, (x / 4)[:, : self.more]], dim=1)


def images() -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("parameterization", [Eps(), V()], ids=["eps", "v"])
def test_channels_beyond_the_first_are_handed_on_and_change_nothing_else(parameterization: Parameterization) -> None:
    plain, learned = (Denoiser(Stacked(more), parameterization, PROCESS)(images(), T_HALF, {}) for more in (0, 3))
    assert plain.extra is None
    assert learned.extra is not None
    assert torch.equal(learned.extra, images() / 4)
    assert torch.equal(learned.x0, plain.x0)
    assert torch.equal(learned.eps, plain.eps)


def test_clipping_keeps_what_else_the_network_said() -> None:
    denoise = Denoiser(Stacked(3), Eps(), PROCESS).bind({})
    clipped = clip_x0(denoise, PROCESS)(5 * images(), T_HALF)
    assert clipped.x0.abs().max() == 1
    assert clipped.extra is not None
    assert torch.equal(clipped.extra, 5 * images() / 4)


def test_a_sampler_that_needs_no_variance_ignores_further_channels() -> None:
    plain, learned = (
        DDIM(5)(Denoiser(Stacked(more), Eps(), PROCESS).bind({}), images(), PROCESS, images) for more in (0, 3)
    )
    assert torch.equal(plain, learned)
