"""Network + parameterization = denoiser: from x_t to a prediction of x_0 and eps."""

from collections.abc import Callable

from torch import Tensor, nn

from diffusion_lit.diffusion.parameterization import Parameterization
from diffusion_lit.diffusion.process import Process, expand
from diffusion_lit.types import Condition, DenoiseFn, Prediction


class Denoiser(nn.Module):
    """Asks the network and reads its answer.

    Args:
        network: Called as network(x_t, time, condition) with time float32, (B,); returns (B, C, H, W). It may
            put out more channels than x_t has: the first C are read, the others go on as they are.
        parameterization: What the first C channels of the network's output mean.
        process: Gives the coefficients.

    Attributes:
        run: What is called in place of the network, such as its compiled form; None: the network itself.

    Raises:
        ValueError: If the parameterization is undefined somewhere on the process.
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
            x_t: Noisy data, (B, C, H, W).
            t: Times in (0, 1], () or (B,).
            condition: Passed on to the network.

        Returns:
            The prediction in the dtype of x_t, whatever precision the network ran in.
        """
        # Not blocking: a time that a sampler holds on the host would make it wait for the device at every step.
        time = self.process.network_time(t).to(x_t.device, non_blocking=True).expand(x_t.shape[0])
        channels = x_t.shape[1]
        answer = (self.run or self.network)(x_t, time, condition).to(x_t.dtype)
        output, extra = answer[:, :channels], answer[:, channels:] if answer.shape[1] > channels else None
        x0_x, x0_f, eps_x, eps_f = (expand(c, x_t) for c in self.parameterization.reading(self.process, t))
        return Prediction(x0=x0_x * x_t + x0_f * output, eps=eps_x * x_t + eps_f * output, extra=extra)

    def bind(self, condition: Condition) -> DenoiseFn:
        """Fixes the condition: gives the (x_t, t) -> Prediction that samplers call."""
        return lambda x_t, t: self(x_t, t, condition)
