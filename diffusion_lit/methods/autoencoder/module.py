"""The system that trains an autoencoder, and reconstructs images as a generator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from diffusion_lit.callbacks.collective import on_rank_zero
from diffusion_lit.diffusion import ImageNoise, Sampler
from diffusion_lit.execution import Execution
from diffusion_lit.generator import Generator
from diffusion_lit.methods.autoencoder.codebook import CodebookWatch, perplexity, use
from diffusion_lit.methods.autoencoder.losses import Adversarial, ReconstructionLoss, last_gradients
from diffusion_lit.networks import Autoencoder, Reconstruction
from diffusion_lit.optimization import optimization
from diffusion_lit.types import Batch, Condition, StepFn


class AutoencoderModule(Generator):
    """Trains an autoencoder, with a discriminator against it if there is one; image i is a reconstruction of image i.

    A step is one of the autoencoder and, once the discriminator takes part, one of the discriminator, on
    reconstructions by the new weights. The steps of the autoencoder are counted. Only the autoencoder is averaged.

    Args:
        network: The autoencoder; its regularizer makes it KL or VQ.
        loss: What it minimizes besides the adversarial loss.
        adversarial: The discriminator and its loss; None: there is none, and one optimiser.
        optimizer: Makes the autoencoder's optimiser from its parameters.
        lr_scheduler: Makes the autoencoder's schedule of the learning rate, advanced every step; None: constant.
        discriminator_optimizer: Makes the discriminator's optimiser.
        discriminator_lr_scheduler: Makes the discriminator's schedule.
        seed: Decides the noise of the posterior while training.
        max_skipped_steps: See `System`.

    Raises:
        ValueError: If parts do not fit together.
    """

    def __init__(
        self,
        network: Autoencoder,
        loss: ReconstructionLoss = ReconstructionLoss(),
        adversarial: Adversarial | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        discriminator_optimizer: OptimizerCallable = torch.optim.Adam,
        discriminator_lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        max_skipped_steps: int | None = 10,
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, max_skipped_steps)
        self.network = network
        self.loss = loss
        self.adversarial = adversarial
        self.automatic_optimization = adversarial is None
        self.make_discriminator_optimizer = discriminator_optimizer
        self.make_discriminator_lr_scheduler = discriminator_lr_scheduler
        self.run: Callable[..., Any] | None = None
        self.codebook = None if self.num_codes is None else CodebookWatch(self.num_codes)
        if adversarial is not None:
            self._check_discriminator(adversarial)

    def _check_discriminator(self, adversarial: Adversarial) -> None:
        discriminator, network = adversarial.discriminator, self.network
        if discriminator.in_channels != network.in_channels:
            raise ValueError(
                f"the autoencoder makes {network.in_channels} channels and the discriminator takes "
                f"{discriminator.in_channels}; make in_channels of both agree"
            )
        discriminator.patches(network.image_size)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.in_channels, self.network.image_size, self.network.image_size

    @property
    def num_codes(self) -> int | None:
        """Size of the codebook; None: there is none."""
        return self.network.regularizer.num_codes

    def averaged_names(self) -> list[str]:
        return [name for name in super().averaged_names() if name.startswith("network.")]

    def execute(self, execution: Execution) -> None:
        if self.adversarial is not None and execution.compile is not None:
            raise ValueError(
                f"trainer.compile={execution.compile}: the adaptive weight needs the gradient of single weights, for "
                "which a compiled autoencoder would run its whole backward pass; leave it out"
            )
        self.run = execution.of(self.network)
        Execution(channels_last=execution.channels_last).of(self.loss)
        if self.adversarial is not None:
            Execution(channels_last=execution.channels_last).of(self.adversarial)

    def setup(self, stage: str) -> None:
        if stage != "predict" and self.loss.perceptual is not None:
            # One process of a machine downloads what is missing.
            on_rank_zero(self.trainer, self.loss.perceptual.prepare, per_machine=True)
            self.loss.perceptual.prepare()
            self.loss.perceptual.check(self.image_shape)
        super().setup(stage)

    # Training

    def configure_optimizers(self) -> Any:
        autoencoder = optimization(self.network.parameters(), self.make_optimizer, self.make_lr_scheduler)
        if self.adversarial is None:
            return autoencoder
        # The steps of the first one are counted.
        discriminator = optimization(
            self.adversarial.parameters(), self.make_discriminator_optimizer, self.make_discriminator_lr_scheduler
        )
        return [autoencoder, discriminator]

    def reconstruct(self, images: Tensor) -> Reconstruction:
        """The training pass of the autoencoder, with the noise of the posterior drawn here."""
        return cast(Reconstruction, (self.run or self.network)(images))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The nll and the regularizer's term, without the adversarial loss; images are (B, C, H, W)."""
        return self._losses(self.reconstruct(batch["image"]), batch["image"])[1]

    def _losses(self, passed: Reconstruction, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The nll, a scalar; and what `losses` returns."""
        nll, parts = self.loss(passed.images, images)
        losses = nll + self.loss.regularizer_weight * sum(passed.terms.values())
        parts |= {"loss": losses.mean(), "losses": losses, **passed.terms}
        if passed.codes is not None:
            if self.training and self.codebook is not None:
                self.codebook.add(passed.codes)
            counts = torch.bincount(passed.codes.flatten(), minlength=cast(int, self.num_codes))
            parts |= {"codebook_use": use(counts), "codebook_perplexity": perplexity(counts)}
        return nll.mean(), parts

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        if self.adversarial is None:
            return super().training_step(batch, batch_idx)
        images, adversarial = batch["image"], self.adversarial
        of_autoencoder, of_discriminator = self.all_optimizers()
        passed = self.reconstruct(images)
        nll, parts = self._losses(passed, images)
        loss = parts["loss"]
        active = adversarial.active(self.step - 1)
        if active:
            g = adversarial.against(passed.images)
            last = self.network.decoder.conv_out.weight
            weight = adversarial.adaptive_weight(*last_gradients(nll, g, last, self.trainer.world_size))
            loss = loss + weight * adversarial.factor * g
            parts |= {"adversarial": g, "adaptive_weight": weight}
        taken = self.update(of_autoencoder, loss)
        if taken and active:
            parts |= self._update_discriminator(adversarial, of_discriminator, images)
        else:
            # Without gradients a step changes nothing, and schedules must not run ahead of their optimiser.
            of_discriminator.step()
        outputs = self.note(parts)
        self.finish_step()
        return outputs

    def _update_discriminator(self, adversarial: Adversarial, optimizer: Any, images: Tensor) -> dict[str, Tensor]:
        """A step of the discriminator on reconstructions by the autoencoder's new weights."""
        of_autoencoder = self.gradient_norm
        with torch.no_grad():
            reconstructions = self.reconstruct(images).images
        judged = adversarial(images, reconstructions)
        self.update(optimizer, judged["discriminator"])
        norm, self.gradient_norm = self.gradient_norm, of_autoencoder
        return {**judged, "discriminator_gradient_norm": cast(Tensor, norm)}

    def learn(self, outputs: Sequence[Mapping[str, Tensor]]) -> None:
        if self.codebook is not None:
            self.codebook.finish_step(self.step, self.trainer.world_size)

    # Reconstructions

    @property
    def entries(self) -> tuple[str, ...]:
        return ("image",)

    def takes(self, entry: str, shape: tuple[int, int, int]) -> bool:
        """Whether an entry may have a shape: images of any size that the factor divides."""
        channels, *size = shape
        return channels == self.network.in_channels and all(n > 0 and n % self.network.factor == 0 for n in size)

    def pictures(self, images: Tensor, condition: Condition) -> Tensor:
        """Originals, each with its reconstruction on the right: (B, C, H, 2 W)."""
        return torch.cat([condition["image"].to(images.device), images], dim=3)

    def codes(self, images: Tensor) -> Tensor:
        """Which code each position of images, (B, C, H, W), has: int64, (B, h, w), of a model that has a codebook."""
        regularizer = self.network.regularizer
        return cast(Tensor, regularizer.codes(regularizer.mode(self.network.moments(images.to(self.device)))))

    def check_sampler(self, sampler: Sampler) -> None:
        """There is no sampler."""

    def described(self, sampler: Sampler | None) -> dict[str, Any]:
        return {"images": "reconstructions"}

    def evaluations(self, sampler: Sampler | None) -> int:
        return 1

    def generate(
        self, noise: ImageNoise, condition: Condition, sampler: Sampler | None, on_step: StepFn | None = None
    ) -> Tensor:
        """Reconstructs the images of the condition, (B, C, H, W), from the likeliest latents; there is no noise."""
        if "image" not in condition:
            raise ValueError("an autoencoder reconstructs images and was given none; give --data to take them from")
        moments = self.network.moments(condition["image"].to(self.device))
        images = self.network.decode(self.network.regularizer.mode(moments))
        if on_step is not None:
            on_step(1, 1)
        return images
