"""Denoiser: a network with its parameterization, which predicts x_0 and eps from x_t."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from diffusion_lit.diffusion.parameterization import Parameterization
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.types import Condition, DenoiseFn, Prediction


class Denoiser(nn.Module):
    """Evaluates a network and computes x_0 and eps from its output.

    Args:
        network: Called as network(x, time, condition) with time float32, (B,); returns (B, C', ...). If C' exceeds the
            channels C of x_t, the first C are interpreted and the others are passed on.
        parameterization: Meaning of the first C channels of the output, and scaling of the inputs.
        process: The forward process.

    Attributes:
        run: Function that is called in place of the network, such as its compiled form; None: the network itself.

    Raises:
        ValueError: If the parameterization is undefined at a time of the process.
    """

    def __init__(self, network: nn.Module, parameterization: Parameterization, process: Process) -> None:
        super().__init__()
        parameterization.check(process)
        self.network = network
        self.parameterization = parameterization
        self.process = process
        self.run: Callable[..., Tensor] | None = None

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        """Predicts x_0 and eps.

        Args:
            x_t: Noisy data, (B, C, ...).
            t: Times in (0, 1], () or (B,).
            condition: Further inputs of the network, by name.

        Returns:
            The prediction in the dtype of x_t, whatever the precision of the network.
        """
        parameterization, process = self.parameterization, self.process
        # Without blocking: with a time on the host, a sampler would wait for the device at every step.
        time = parameterization.network_time(process, t).to(x_t.device, non_blocking=True).expand(x_t.shape[0])
        scale = parameterization.input_scale(process, t)
        x = x_t if scale is None else expand(scale, x_t) * x_t
        answer = (self.run or self.network)(x, time, condition).to(x_t.dtype)
        channels = x_t.shape[1]
        output, extra = answer[:, :channels], answer[:, channels:] if answer.shape[1] > channels else None
        x0_x, x0_f, eps_x, eps_f = (expand(c, x_t) for c in parameterization.coefficients(process, t))
        return Prediction(x0=x0_x * x_t + x0_f * output, eps=eps_x * x_t + eps_f * output, extra=extra)

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Calls the network itself while the context is active, so that changes of its layers have an effect."""
        run, self.run = self.run, None
        try:
            yield
        finally:
            self.run = run

    def bind(self, condition: Condition) -> DenoiseFn:
        """Returns (x_t, t) -> Prediction, with a fixed condition."""
        return lambda x_t, t: self(x_t, t, condition)
