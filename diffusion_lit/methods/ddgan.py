"""Denoising diffusion GANs: a chain of few steps, each of which a conditional GAN reverses.

    x_s ~ q(x_s | x_t, x_0 = G(x_t, z, t)),    z ~ N(0, I) anew in every step,    s one step of the chain before t

The steps are too large for p(x_s | x_t) to be Gaussian: the latent variable z makes it multimodal, and a discriminator
of pairs (x_s, x_t) replaces the squared error. Source: Xiao et al. 2022, "Tackling the generative learning trilemma
with denoising diffusion GANs".
"""

import math
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.nn.functional import softplus

from diffusion_lit.diffusion import (
    X0,
    Ancestral,
    Denoiser,
    DiscreteProcess,
    FixedSmall,
    ImageNoise,
    IntegratedLinear,
    Sampler,
)
from diffusion_lit.diffusion.process import expand
from diffusion_lit.execution import Execution
from diffusion_lit.generator import Generator
from diffusion_lit.networks import Discriminator
from diffusion_lit.networks.ncsnpp import LATENT
from diffusion_lit.optimization import optimization
from diffusion_lit.records import describe
from diffusion_lit.types import Batch, Condition, Network, Prediction, StepFn


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """Returns |d logits / d images|^2, the mean over the batch, differentiable; without the factor gamma / 2.

    Args:
        logits: (B,), computed from the images.
        images: (B, ...), which require a gradient.

    Source: Mescheder et al. 2018 (R1), eq. 9.
    """
    [gradient] = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


class DDGAN(Generator):
    """Trains a generator of x_0 from (x_t, z) against a discriminator of pairs (x_s, x_t), and samples in T steps.

    Only the generator is averaged and, by `trainer.compile`, compiled: the gradient penalty needs second derivatives,
    which compiled networks do not have.

    Args:
        network: The generator, called as network(x_t, time, {"latent": z}); returns x_0. It has `latent_size`.
        discriminator: Called as discriminator(x_s, x_t, time); returns logits, (B,).
        process: The chain, of few steps.
        sampler: Draws images unless another is given; None: all steps of the chain by its posterior, without clipping.
        r1_gamma: Weight gamma of the penalty gamma / 2 |gradient|^2 of real pairs, at least 0.
        r1_every: The penalty is part of every n-th step, and is not multiplied by n.
        optimizer: Makes the generator's optimiser from its parameters.
        lr_scheduler: Makes the generator's schedule of the learning rate, advanced every step; None: constant.
        discriminator_optimizer: Makes the discriminator's optimiser.
        discriminator_lr_scheduler: Makes the discriminator's schedule.
        seed: Decides times, noise and latent variables while training.
        max_skipped_steps: See `System`.

    Raises:
        ValueError: If parts do not fit together, a number is out of range, or the discriminator is compiled.
    """

    sampler: Sampler
    optimizer_keys = ("optimizer", "discriminator_optimizer")

    def __init__(
        self,
        network: Network,
        discriminator: Discriminator,
        process: DiscreteProcess = DiscreteProcess(4, IntegratedLinear()),
        sampler: Sampler | None = None,
        r1_gamma: float = 0.02,
        r1_every: int = 15,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        discriminator_optimizer: OptimizerCallable = torch.optim.Adam,
        discriminator_lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        max_skipped_steps: int | None = 10,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, max_skipped_steps)
        self.automatic_optimization = False
        self.denoiser = Denoiser(network, X0(), process)
        self.discriminator = discriminator
        self.process = process
        self.sampler = Ancestral(None, FixedSmall(), clip=False) if sampler is None else sampler
        self.r1_gamma, self.r1_every = r1_gamma, r1_every
        self.make_discriminator_optimizer = discriminator_optimizer
        self.make_discriminator_lr_scheduler = discriminator_lr_scheduler
        self._check_parts()
        self.latent_size = cast(int, network.latent_size)
        self.check_sampler(self.sampler)

    def _check_parts(self) -> None:
        network = cast(Network, self.denoiser.network)
        if getattr(network, "latent_size", 0) < 1:
            raise ValueError(
                f"network: {type(network).__name__} has no latent variable; set --model.network NCSNpp, or latent_size "
                "as an attribute in its constructor"
            )
        if not 0 <= self.r1_gamma < math.inf or self.r1_every < 1:
            raise ValueError(
                f"r1_gamma={self.r1_gamma} must be finite and at least 0, and r1_every={self.r1_every} at least 1; the "
                "paper has 0.02 and 15 for CIFAR-10"
            )
        if self.r1_gamma > 0 and hasattr(self.discriminator, "_orig_mod"):
            raise ValueError(
                f"r1_gamma={self.r1_gamma} needs second derivatives, which a compiled discriminator does not have; "
                "give it uncompiled, or set --model.r1_gamma 0"
            )
        shapes = [(part.in_channels, part.image_size) for part in (network, self.discriminator)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the generator makes {shapes[0]} and the discriminator takes {shapes[1]} (channels, size); make "
                "image_size and in_channels of both agree"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        network = cast(Network, self.denoiser.network)
        return network.in_channels, network.image_size, network.image_size

    def averaged_names(self) -> list[str]:
        return [name for name in super().averaged_names() if name.startswith("denoiser.")]

    def execute(self, execution: Execution) -> None:
        self.denoiser.run = execution.of(self.denoiser.network)
        Execution(channels_last=execution.channels_last).of(self.discriminator)

    # Training

    def configure_optimizers(self) -> Any:
        # The steps of the first one are counted.
        return [
            optimization(self.denoiser.parameters(), self.make_optimizer, self.make_lr_scheduler),
            optimization(
                self.discriminator.parameters(),
                self.make_discriminator_optimizer,
                self.make_discriminator_lr_scheduler,
                key=self.optimizer_keys[1],
            ),
        ]

    def pairs(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws times t of the chain, x_s ~ q(x_s | x_0) and x_t ~ q(x_t | x_s), s one step before t.

        Args:
            x0: Clean images, (B, C, H, W).

        Returns:
            (t, x_s, x_t); t is float64, (B,).
        """
        k = torch.randint(1, self.process.num_steps + 1, (len(x0),), device=x0.device)
        t = k.to(torch.float64) / self.process.num_steps
        s = self.process.previous(t)
        x_s = self.process.perturb(x0, torch.randn_like(x0), s)
        alpha_ts, variance = self.process.transition(t, s)
        x_t = expand(alpha_ts, x0) * x_s + expand(variance.sqrt(), x0) * torch.randn_like(x0)
        return t, x_s, x_t

    def fake(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Draws x_s ~ q(x_s | x_t, x_0 = G(x_t, z, t)), (B, C, H, W), with z and noise drawn here."""
        z = torch.randn(len(x_t), self.latent_size, device=x_t.device)
        x0: Tensor = self.denoiser(x_t, t, {LATENT: z}).x0
        a, b, variance = self.process.posterior(t, self.process.previous(t))
        return expand(a, x_t) * x_t + expand(b, x_t) * x0 + expand(variance.sqrt(), x_t) * torch.randn_like(x_t)

    def judge(self, x_s: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Logits of pairs, (B,), float32."""
        return cast(Tensor, self.discriminator(x_s, x_t, self.process.network_time(t))).float()

    def discriminator_losses(self, batch: Batch, penalize: bool) -> dict[str, Tensor]:
        """What the discriminator minimizes, "discriminator", and, detached, its parts; all scalars.

        Args:
            batch: As for `losses`.
            penalize: Whether the gradient penalty is part of it.
        """
        t, x_s, x_t = self.pairs(batch["image"])
        with torch.no_grad():
            fake = self.fake(x_t, t)
        x_s.requires_grad_(penalize)
        real_logits, fake_logits = self.judge(x_s, x_t, t), self.judge(fake, x_t, t)
        loss = softplus(-real_logits).mean() + softplus(fake_logits).mean()
        parts = {"real_logit": real_logits.mean().detach(), "fake_logit": fake_logits.mean().detach()}
        if penalize:
            penalty = gradient_penalty(real_logits, x_s)
            parts["r1"] = penalty.detach()
            loss = loss + self.r1_gamma / 2 * penalty
        return {"discriminator": loss, **parts}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """What the generator minimizes, -log D of its pairs, at times and with noise drawn here."""
        t, _, x_t = self.pairs(batch["image"])
        losses = softplus(-self.judge(self.fake(x_t, t), x_t, t))
        return {"loss": losses.mean(), "t": t, "losses": losses.detach()}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        of_generator, of_discriminator = self.all_optimizers()
        penalize = self.r1_gamma > 0 and self.trainer.global_step % self.r1_every == 0
        judged = self.discriminator_losses(batch, penalize)
        self.update(of_discriminator, judged["discriminator"])
        parts = self.losses(batch)
        self.update(of_generator, parts["loss"])
        outputs = self.note({**judged, **parts})
        self.finish_step()
        return outputs

    # Sampling

    def check_sampler(self, sampler: Sampler) -> None:
        sampler.times(self.process)

    def described(self, sampler: Sampler | None) -> dict[str, Any]:
        return {"process": describe(self.process), "sampler": describe(sampler or self.sampler)}

    def evaluations(self, sampler: Sampler | None) -> int:
        return (sampler or self.sampler).evaluations(self.process)

    def generate(
        self, noise: ImageNoise, condition: Condition, sampler: Sampler | None, on_step: StepFn | None = None
    ) -> Tensor:
        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            prediction: Prediction = self.denoiser(x_t, t, {LATENT: noise.draw((self.latent_size,))})
            return prediction

        return (sampler or self.sampler)(denoise, noise.draw(), self.process, noise.draw, on_step)
