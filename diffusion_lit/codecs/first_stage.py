"""The latents of a trained autoencoder: what latent diffusion diffuses."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from diffusion_lit.codec import Codec, Shape
from diffusion_lit.codecs.files import OPTION, fill, fingerprint_of, read_autoencoder
from diffusion_lit.data import ImageData
from diffusion_lit.frozen import Frozen
from diffusion_lit.networks import Autoencoder
from diffusion_lit.types import Batch

Numbers = float | list[float] | None
PIXELS_AT_ONCE = 2**20
"""Pixels that are encoded or decoded at once: 16 images of 256x256."""


class FirstStage(nn.Module, Codec):
    """A trained autoencoder, which is used and not trained: x_0 = scale (z - shift), z its latents.

    The latents of a KL model are samples of its posterior, drawn anew at every step of training; those of a VQ model
    are not quantised, and decoding quantises them. Their scale is found once, before a new run, and is kept by its
    checkpoints and configuration.

    A checkpoint of the run carries the autoencoder once, under a key of its own, so that it suffices to sample.

    Args:
        checkpoint: Of the autoencoder; null: the checkpoint of the model carries it.
        network: The autoencoder, so that the file is not read before a run starts; null: the one in the file.
        scale: One number, or one for each channel of the latents; null: 1 for a VQ model, and else 1 / the standard
            deviation of the latents of some training images.
        shift: Likewise; null: 0, or the mean of each channel where `per_channel`.
        per_channel: Whether shift and scale are found for each channel, for VQ models too.
        num_images: Number of training images from which they are found.
        precision: Of the encoder: "float32", or "bf16" by autocast. The decoder always runs in float32.
        fingerprint: Of the autoencoder that must be found; null: any. A run fills it in.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it is of no autoencoder, or an argument is out of range.

    Source: Rombach et al. 2022, sections 3.1 and 3.2 and appendix G; one scale of all channels is that of its code, a
    shift and a scale of each channel a later habit.
    """

    needs_pixels = False
    shift: Tensor
    scale: Tensor

    only_at_start = ("per_channel", "num_images")

    def __init__(
        self,
        checkpoint: str | None = None,
        network: Autoencoder | None = None,
        scale: Numbers = None,
        shift: Numbers = None,
        per_channel: bool = False,
        num_images: int = 1024,
        precision: Literal["float32", "bf16"] = "float32",
        fingerprint: str | None = None,
    ) -> None:
        super().__init__()
        if num_images < 2:
            raise ValueError(f"codec.num_images={num_images} must be at least 2, to have a standard deviation")
        if precision not in ("float32", "bf16"):
            raise ValueError(f"codec.precision={precision!r} must be 'float32' or 'bf16'")
        if checkpoint is None and network is None:
            raise ValueError(f"codec: there is no first stage; give an autoencoder's checkpoint by --model.{OPTION}")
        if shift is not None and scale is None:
            raise ValueError(f"codec.shift={shift} needs a scale; set --model.codec.scale")
        self._checkpoint = checkpoint
        self._per_channel = per_channel
        self._num_images = num_images
        self.precision = precision
        self._wanted = fingerprint
        self._config: dict[str, Any] | None = None
        self._fingerprint: str | None = None
        if network is None and checkpoint is not None:
            network, self._config = read_autoencoder(checkpoint)
            self._stage = Frozen(network)
            self._identify()
        else:
            self._stage = Frozen(network)  # type: ignore[arg-type]
        self._asked = {"scale": scale, "shift": shift}
        is_vq = self.network.regularizer.num_codes is not None
        known = scale is not None or (is_vq and not per_channel)
        self.register_buffer("scale", self._numbers("scale", (1.0 if scale is None else scale) if known else None))
        self.register_buffer("shift", self._numbers("shift", (0.0 if shift is None else shift) if known else None))
        if not bool((self.scale > 0).all()) and known:
            raise ValueError(f"codec.scale={scale} must be above 0")

    def _numbers(self, name: str, value: Numbers) -> Tensor:
        """One number for each channel, (z,); not a number where they are not known yet."""
        channels = self.network.latent_channels
        numbers = torch.tensor(float("nan") if value is None else value, dtype=torch.float32).flatten()
        if len(numbers) not in (1, channels):
            raise ValueError(
                f"codec.{name} has {len(numbers)} numbers and the first stage {channels} latent channels; give one "
                "number, or one for each channel"
            )
        return numbers.expand(channels).clone()

    @property
    def network(self) -> Autoencoder:
        """The autoencoder, frozen."""
        network: Autoencoder = self._stage.network  # type: ignore[assignment]
        return network

    # The weights

    @property
    def fingerprint(self) -> str:
        """Identifies the autoencoder and its weights, which are read where they have not been."""
        self._require_weights()
        return str(self._fingerprint)

    def _require_weights(self) -> None:
        if self._fingerprint is not None:
            return
        if self._checkpoint is None:
            raise ValueError(f"codec: the first stage has no weights; give its checkpoint by --model.{OPTION}")
        trained = read_autoencoder(self._checkpoint)
        if repr(trained.network) != repr(self.network):
            raise ValueError(
                f"{OPTION}={self._checkpoint} has another network than codec.network; set --model.codec.network null "
                "to take the network from the checkpoint"
            )
        self.network.load_state_dict(trained.network.state_dict())
        self._identify()

    def _identify(self) -> None:
        found = fingerprint_of(self.network)
        if self._wanted not in (None, found):
            raise ValueError(
                f"{OPTION}={self._checkpoint}: the first stage has the fingerprint {found} and not "
                f"codec.fingerprint={self._wanted}, for which the scale was found; give the first stage of that run, "
                "or set --model.codec.fingerprint, scale and shift to null"
            )
        self._fingerprint = found

    def state(self) -> dict[str, Any]:
        return {"fingerprint": self.fingerprint, "weights": dict(self.network.state_dict())}

    def restore(self, state: Mapping[str, Any]) -> None:
        if not state:
            return
        if self._fingerprint is None and self._checkpoint is not None:
            self._require_weights()
        if self._fingerprint is None:
            fill(self.network, state["weights"], "the model's checkpoint")
            self._identify()
        if self._fingerprint != state["fingerprint"]:
            raise ValueError(
                f"{OPTION}={self._checkpoint}: this first stage (fingerprint {self._fingerprint}) is not the one that "
                f"the model was trained with ({state['fingerprint']}); give that one, or set --model.{OPTION} null to "
                "take it from the model's checkpoint"
            )

    def settled(self, carried: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {"fingerprint": self.fingerprint}
        if self._config is not None:
            found["network"] = self._config
        if self._is_scaled:
            found |= {"scale": self.scale.tolist(), "shift": self.shift.tolist()}
        return {**found, "checkpoint": None} if carried else found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes over shift and scale.

        Raises:
            ValueError: If others were asked for.
        """
        for name, value in self._asked.items():
            stored = state_dict.get(f"{prefix}{name}")
            if value is not None and stored is not None and not torch.equal(stored.cpu(), self._numbers(name, value)):
                raise ValueError(
                    f"codec.{name}={value}: the model was trained with {stored.tolist()}; leave it out, or set "
                    f"--model.codec.{name} null"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Before a run

    def check(self, data: L.LightningDataModule | None) -> None:
        found = data.source.moments_of if isinstance(data, ImageData) else None
        if found is not None and found != self.fingerprint:
            raise ValueError(
                f"the data carry moments of a first stage with the fingerprint {found}, and the model's has "
                f"{self.fingerprint}; prepare them again, or set --data.source.moments null"
            )

    @property
    def _is_scaled(self) -> bool:
        return bool(self.scale.isfinite().all())

    def start(self, data: L.LightningDataModule | None, device: torch.device) -> None:
        """Finds shift and scale from training images where they are not known.

        All processes take the same images, so that nothing needs to be exchanged.

        Raises:
            ValueError: If there are no images to find them from, or the latents are all the same.
        """
        self._require_weights()
        if not self._is_scaled:
            if not isinstance(data, ImageData):
                raise ValueError("codec.scale=null is found from training images, and there are none; give a scale")
            data.prepare_data()
            home = self.scale.device
            self.to(device)
            moments = torch.cat(list(self._some_moments(data, device)))
            self.to(home)
            dims = (0, 2, 3) if self._per_channel else (0, 1, 2, 3)
            latents = self._drawn(moments)
            std, mean = torch.std_mean(latents, dims)
            self._warn_of_noise(latents, self.network.regularizer.mode(moments).double())
            if not bool((std > 0).all() & std.isfinite().all()):
                raise ValueError(f"codec: the latents of {len(latents)} images have no spread ({std.tolist()})")
            # One scale of all channels leaves their means alone, as published.
            self.shift.copy_(mean if self._per_channel else torch.zeros(()))
            self.scale.copy_(1 / std)
        rank_zero_info(
            f"first stage {self.fingerprint}: latents are scaled by {_short(self.scale)} after a shift by "
            f"{_short(self.shift)}"
        )

    def _some_moments(self, data: ImageData, device: torch.device) -> Iterator[Tensor]:
        """Moments, on the CPU, of training images that depend on their number alone."""
        count = len(data.dataset("train"))
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(count, generator=generator)[: self._num_images].tolist()
        for start in range(0, len(chosen), 64):
            images = data.examples(chosen[start : start + 64], "train")["image"]
            yield self.moments(images.to(device)).cpu()

    def _drawn(self, moments: Tensor) -> Tensor:
        """Latents, float64, always the same for the same moments: noise of the CPU is so on every machine."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.network.regularizer.sample(moments).double()

    @staticmethod
    def _warn_of_noise(latents: Tensor, likeliest: Tensor) -> None:
        """Warns of latents that are mostly the noise of the posterior, from which nothing can be learned."""
        share = 1 - float(likeliest.var((0, 2, 3)).mean() / latents.var((0, 2, 3)).mean())
        if share > 0.5:
            rank_zero_warn(
                f"{100 * share:.0f} % of the variance of the latents is noise of the posterior: the first stage has "
                "hardly learned, or the averages of its weights have not; look at its reconstructions"
            )

    # Between images and latents

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """What the encoder says of images in [-1, 1], (B, C, H, W): float32, (B, M, h, w), unscaled."""
        self._require_weights()
        with self._autocast(images):
            return torch.cat([self.network.moments(part).float() for part in _parts(images)])

    def _autocast(self, x: Tensor, encoding: bool = True) -> AbstractContextManager[Any]:
        return torch.autocast(x.device.type, torch.bfloat16, encoding and self.precision == "bf16")

    def encode(self, images: Tensor) -> Tensor:
        """The likeliest latents, scaled."""
        return self._scaled(self.network.regularizer.mode(self.moments(images)))

    def latents(self, batch: Batch) -> Tensor:
        """Latents drawn from the posterior, scaled; from stored `moments` where a batch has them."""
        moments = batch["moments"].float() if "moments" in batch else self.moments(batch["image"])
        return self._scaled(self.network.regularizer.sample(moments))

    def decode(self, latents: Tensor) -> Tensor:
        self._require_scale()
        self._require_weights()
        z = latents.float() / _expand(self.scale) + _expand(self.shift)
        with self._autocast(z, encoding=False):
            return torch.cat([self.network.decode(part) for part in _parts(z, self.network.factor)])

    def _scaled(self, z: Tensor) -> Tensor:
        self._require_scale()
        return _expand(self.scale) * (z - _expand(self.shift))

    def _require_scale(self) -> None:
        if not self._is_scaled:
            raise ValueError("codec.scale=null is found when a run starts, which it has not; give a scale")

    def latent_shape(self, image_shape: Shape) -> Shape:
        channels, height, width = image_shape
        network = self.network
        if channels != network.in_channels or height % network.factor or width % network.factor:
            raise ValueError(
                f"images are {image_shape} (channels, height, width), and the first stage takes {network.in_channels} "
                f"channels and sizes divisible by its factor {network.factor}; give --model.{OPTION} of another one"
            )
        return network.latent_channels, height // network.factor, width // network.factor

    def image_shape(self, latent_shape: Shape) -> Shape:
        channels, height, width = latent_shape
        network = self.network
        if channels != network.latent_channels:
            raise ValueError(
                f"the network diffuses {channels} channels, and the first stage has {network.latent_channels}; set "
                f"--model.network.in_channels {network.latent_channels}"
            )
        return network.in_channels, height * network.factor, width * network.factor


def _expand(numbers: Tensor) -> Tensor:
    return numbers.view(1, -1, 1, 1)


def _parts(x: Tensor, factor: int = 1) -> Sequence[Tensor]:
    """Splits a batch, (B, C, H, W), of images `factor` times as high and wide, by `PIXELS_AT_ONCE`."""
    return torch.split(x, max(1, PIXELS_AT_ONCE // (factor**2 * x.shape[2] * x.shape[3])))


def _short(numbers: Tensor) -> str:
    distinct = dict.fromkeys(f"{n:.5g}" for n in numbers.tolist())
    return ", ".join(distinct) if len(distinct) == 1 else ", ".join(f"{n:.5g}" for n in numbers.tolist())
