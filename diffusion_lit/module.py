"""DiffusionModule: wires process, network, parameterization, objective and sampler, and does nothing else."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from diffusion_lit.checkpoint import AVERAGED
from diffusion_lit.codec import Codec, Pixels
from diffusion_lit.conditioner import Conditioner, Labels
from diffusion_lit.diffusion import (
    DDIM,
    Denoiser,
    DenoisingLoss,
    DiscreteProcess,
    Eps,
    Gaussian,
    Guidance,
    ImageNoise,
    NoiseSource,
    Objective,
    Parameterization,
    Process,
    Sampler,
    Seen,
)
from diffusion_lit.diffusion.guidance import num_classes_of
from diffusion_lit.execution import Execution
from diffusion_lit.generator import Generator, check_labels
from diffusion_lit.records import describe
from diffusion_lit.stepping import gather
from diffusion_lit.types import Batch, Condition, DenoiseFn, Network, StepFn


class DiffusionModule(Generator):
    """A denoising diffusion model: trains by its objective and samples by its sampler.

    Args:
        network: Called as network(x, time, condition). It has `image_size` and `in_channels`.
        process: The forward process.
        parameterization: What the network predicts.
        objective: The loss.
        sampler: Draws images unless another is given.
        optimizer: Makes the optimiser from the parameters.
        lr_scheduler: Makes the learning-rate schedule from the optimiser, advanced every step; None: constant.
        seed: Decides times, noise and dropout while training.
        guidance: How sampling follows the condition; None: as far as the network does by itself. Training is unguided.
        max_skipped_steps: See `System`.
        codec: Between images and what is diffused; by default the pixels themselves.
        conditioner: What the network is given of a batch besides its images; None: `Labels`.
        noise: Where the noise comes from, in training and in sampling.

    Raises:
        ValueError: If parts do not fit together: see `Denoiser`, `Sampler.times`, `Guidance.check` and
            `Conditioner.check`.
    """

    sampler: Sampler

    def __init__(
        self,
        network: Network,
        process: Process = DiscreteProcess(),
        parameterization: Parameterization = Eps(),
        objective: Objective = DenoisingLoss(),
        sampler: Sampler = DDIM(),
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
        guidance: Guidance | None = None,
        max_skipped_steps: int | None = 10,
        codec: Codec = Pixels(),
        conditioner: Conditioner | None = None,
        noise: NoiseSource = Gaussian(),
    ) -> None:
        super().__init__(optimizer, lr_scheduler, seed, max_skipped_steps)
        missing = [name for name in ("image_size", "in_channels") if not hasattr(network, name)]
        if missing:
            raise ValueError(
                f"network: {type(network).__name__} has no {' and no '.join(missing)}; set image_size (height and "
                "width, pixels) and in_channels as attributes in its constructor"
            )
        self.denoiser = Denoiser(network, parameterization, process)
        self.process = process
        self.objective = objective
        self.sampler = sampler
        self.codec = codec
        # Not a default of the signature, which all modules would share: it has a training mode.
        self.conditioner = conditioner = Labels() if conditioner is None else conditioner
        self.noise_source = noise
        self.guidance = guidance
        objective.check(process)
        codec.image_shape(self.latent_shape)
        self.check_sampler(sampler)
        conditioner.check(self.denoiser.network)
        if guidance is not None:
            guidance.check(self.denoiser, self.conditioner)
            if guidance.clip and not codec.bounded:
                raise ValueError(
                    "guidance.clip=true: latents have no bounds to clip predictions to; set --model.guidance.clip false"
                )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C', H', W') of what is diffused; the image's own shape where the codec is `Pixels`."""
        network = cast(Network, self.denoiser.network)
        return network.in_channels, network.image_size, network.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.codec.image_shape(self.latent_shape)

    @property
    def num_classes(self) -> int | None:
        """Of the network, the conditioner or the guidance; None: the model cannot be asked for classes."""
        guided = None if self.guidance is None else self.guidance.num_classes
        own = num_classes_of(self.denoiser.network), self.conditioner.num_classes, guided
        return next((number for number in own if number is not None), None)

    @property
    def entries(self) -> tuple[str, ...]:
        guided = () if self.guidance is None else self.guidance.entries
        return tuple(dict.fromkeys((*self.conditioner.entries, *guided)))

    @property
    def needs_pixels(self) -> bool:
        return self.codec.needs_pixels or "image" in self.conditioner.entries

    def shape_of(self, entry: str) -> tuple[int, int, int]:
        return self.conditioner.shape_of(entry, self.image_shape, self.latent_shape)

    def takes(self, entry: str, shape: tuple[int, int, int]) -> bool:
        """Whether an entry may have a shape: also one for which latents have another size that the network takes."""
        own = self.shape_of(entry)
        multiple = getattr(self.denoiser.network, "size_multiple", None)
        if shape == own or multiple is None or shape[0] != own[0]:
            return shape == own
        sizes = zip(shape[1:], own[1:], self.latent_shape[1:], strict=True)
        return all(n > 0 and n * latent % (usual * multiple) == 0 for n, usual, latent in sizes)

    def latent_shape_for(self, condition: Condition, entries: Sequence[str] | None = None) -> tuple[int, int, int]:
        """The shape of the latents of images of a condition's size; `latent_shape` where nothing in it has a size.

        Args:
            condition: What the images show, (B, ...) each.
            entries: What of it the images depend on; None: the model's own `entries`.
        """
        channels, height, width = self.latent_shape
        for name in self.entries if entries is None else entries:
            if name in condition and condition[name].ndim == 4:
                usual, given = self.shape_of(name)[1:], condition[name].shape[2:]
                return channels, height * given[0] // usual[0], width * given[1] // usual[1]
        return self.latent_shape

    def execute(self, execution: Execution) -> None:
        self.denoiser.run = execution.of(self.denoiser.network)

    # Training

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.codec.check(getattr(self.trainer, "datamodule", None))

    def check_training(self, trainer: L.Trainer) -> None:
        super().check_training(trainer)
        self.objective.begin(self.denoiser)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        given = cast(dict[str, Tensor], batch)
        missing = [name for name in self.conditioner.entries if name not in given]
        if missing:
            raise ValueError(
                f"{type(self.conditioner).__name__} needs {' and '.join(missing)}, which the data lack; choose a "
                "--data.source that has it"
            )
        classes = num_classes_of(self.denoiser.network) or self.conditioner.num_classes
        if classes is not None and "label" not in given:
            raise ValueError(
                f"{type(self.denoiser.network).__name__} has classes but the data have no labels; choose data with "
                "classes (a folder with one sub-folder per class), or a network without num_classes"
            )
        with torch.no_grad():
            x0 = self.codec.latents(batch)
        return self.objective(self.denoiser, x0, self.conditioner(given, self.codec), self.noise_source)

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        self.codec.start(data, device)
        self.conditioner.start(data, device)
        self.objective.start(self.denoiser)

    def learn(self, outputs: Sequence[Mapping[str, Tensor]]) -> None:
        seen = Seen(torch.cat([output["t"] for output in outputs]), torch.cat([output["losses"] for output in outputs]))
        self.objective.stepped(self.step, self.denoiser, seen, partial(gather, world_size=self.trainer.world_size))

    def on_fit_start(self) -> None:
        """What the codec has found out goes into the configuration of the run."""
        arguments = self._codec_arguments(self.config)
        if arguments is not None:
            arguments.update(self.codec.settled())

    @staticmethod
    def _codec_arguments(config: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of the codec in a configuration, to be changed in place; None: there are none."""
        codec = (config.get("model") or {}).get("init_args", {}).get("codec")
        return cast("dict[str, Any] | None", codec.setdefault("init_args", {}) if codec else None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if "optimizer_states" in checkpoint:
            checkpoint["objective"] = self.objective.state_dict()
        if state := self.codec.state():
            checkpoint["codec"] = state
            checkpoint["config"] = config = copy.deepcopy(checkpoint["config"])
            arguments = self._codec_arguments(config)
            if arguments is not None:
                arguments.update(self.codec.settled(carried=True))

    def load(self, checkpoint: Mapping[str, Any], weights: str = AVERAGED, path: Path | str | None = None) -> None:
        self.codec.restore(checkpoint.get("codec", {}))
        super().load(checkpoint, weights, path)
        self.objective.trained(checkpoint.get("global_step") or 0)

    def initialize(self, checkpoint: Mapping[str, Any], weights: str = AVERAGED) -> list[str]:
        self.codec.restore(checkpoint.get("codec", {}))
        return super().initialize(checkpoint, weights)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.codec.restore(checkpoint.get("codec", {}))
        own, carried = map(self._codec_arguments, (self.config, checkpoint.get("config") or {}))
        if own is not None and carried is not None:
            # What a run has found out is no change of its options.
            own.update({name: value for name, value in carried.items() if own.get(name) is None})
            carried.update({name: value for name, value in own.items() if carried.get(name) is None})
        super().on_load_checkpoint(checkpoint)
        if self.loaded is None:
            self.objective.load_state_dict(checkpoint.get("objective", {}))
        else:
            self.objective.trained(checkpoint.get("global_step") or 0)

    # Sampling

    def check_sampler(self, sampler: Sampler) -> None:
        sampler.times(self.process)
        if sampler.clip and not self.codec.bounded:
            raise ValueError(
                "sampler.clip=true: latents have no bounds to clip predictions to; set --model.sampler.clip false"
            )

    def described(self, sampler: Sampler | None) -> dict[str, Any]:
        parts = {
            "process": self.process,
            "parameterization": self.denoiser.parameterization,
            "guidance": self.guidance,
            "codec": self.codec,
            "conditioner": self.conditioner,
            "noise": self.noise_source,
            "sampler": sampler or self.sampler,
        }
        return {name: describe(part) for name, part in parts.items()}

    def evaluations(self, sampler: Sampler | None) -> int:
        return (sampler or self.sampler).evaluations(self.process)

    def noise(self, indices: Sequence[int], seed: int) -> ImageNoise:
        return self.noise_source.images(seed, indices, self.latent_shape, self.device)

    def bind(self, condition: Condition, noise: ImageNoise | None = None) -> DenoiseFn:
        """What samplers call: the denoiser, with guidance if there is any, given this condition.

        Args:
            condition: As a batch of the data has it.
            noise: Of the images, for conditioners that add some to the condition.

        Raises:
            ValueError: If a label is out of range, or given to a model without classes.
        """
        if "label" in condition:
            check_labels(condition["label"], self.num_classes)
        given: Condition = {name: value.to(self.device) for name, value in condition.items()}
        if noise is not None:
            given = self.conditioner.vary(given, noise.draw)
        inputs = self.conditioner(given, self.codec)
        if self.guidance is None:
            return self.denoiser.bind(inputs)
        return self.guidance(self.denoiser, inputs, self.conditioner, given)

    def generate(
        self, noise: ImageNoise, condition: Condition, sampler: Sampler | None, on_step: StepFn | None = None
    ) -> Tensor:
        sampler = sampler or self.sampler
        noise.shape = self.latent_shape_for(condition)
        latents = sampler(self.bind(condition, noise), noise.draw(), self.process, noise.draw, on_step)
        return self.finished(latents, condition)

    def finished(self, latents: Tensor, condition: Condition) -> Tensor:
        """Decodes latents, (B, C', H', W'), and has the conditioner put in what the condition says of the images."""
        images = self.codec.decode(latents)
        return self.conditioner.finish(images, {name: value.to(images.device) for name, value in condition.items()})

    def trajectory(
        self,
        indices: Sequence[int],
        seed: int = 0,
        show: Literal["x0", "x_t"] = "x0",
        num_frames: int = 40,
        condition: Condition | None = None,
    ) -> Tensor:
        given = self.conditions()(torch.tensor(indices)) if condition is None else condition
        noise = self.noise(indices, seed)
        noise.shape = self.latent_shape_for(given)
        last = len(self.sampler.times(self.process)) - 1
        shown = {round(i * last / max(num_frames - 1, 1)) for i in range(num_frames)} | {last}
        frames = []
        with self.evaluating():
            path = self.sampler.path(self.bind(given, noise), noise.draw(), self.process, noise.draw)
            for number, state in enumerate(path):
                if number in shown:
                    alpha, sigma = self.process.alpha_sigma(state.t)
                    x_t = state.x_t / (alpha**2 + sigma**2).sqrt().to(state.x_t)
                    frames.append(self.finished(state.x0 if show == "x0" else x_t, given).cpu())
        return torch.stack(frames)

    def invert(self, images: Tensor, sampler: DDIM, condition: Condition | None = None) -> Tensor:
        """The noise that a deterministic sampler would turn into these images.

        Args:
            images: (B, C, H, W), in [-1, 1].
            sampler: Gives the grid.
            condition: What the images show.
        """
        with self.evaluating():
            x0 = self.codec.encode(images.to(self.device))
            return sampler.invert(self.bind(condition or {}), x0, self.process)

    def generate_from(self, noise: Tensor, sampler: DDIM, condition: Condition | None = None) -> Tensor:
        """Images from given noise, (B, C', H', W'), by a deterministic sampler.

        Raises:
            ValueError: If the sampler is not deterministic.
        """
        if sampler.eta != 0:
            raise ValueError(f"generate_from: eta={sampler.eta} adds noise of its own; use eta=0")
        noise = noise.to(self.device)
        with self.evaluating():
            latents = sampler(self.bind(condition or {}), noise, self.process, lambda: torch.zeros_like(noise))
            return self.codec.decode(latents)
