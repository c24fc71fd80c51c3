"""Inpainting: the network is given an image with holes, and where the holes are."""

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_lit.codec import Codec
from diffusion_lit.conditioners.spatial import Spatial
from diffusion_lit.types import Condition, Part


class MaskConvention(Part):
    """How a network is told of holes; published networks differ in all of it.

    Args:
        hole: Value of the mask in holes.
        known: Value of the mask elsewhere.
        fill: Value of pixels in holes, in [-1, 1]: -1 is black, 0 grey.
        mask_first: Whether the mask comes before the image among the channels.
    """

    def __init__(self, hole: float = 1.0, known: float = 0.0, fill: float = 0.0, mask_first: bool = False) -> None:
        self.hole = hole
        self.known = known
        self.fill = fill
        self.mask_first = mask_first


class LatentDiffusion(MaskConvention):
    """The image's latents, of which the holes were black, then the mask: 1 in holes, -1 elsewhere.

    Source: the code of Rombach et al. 2022, `scripts/inpaint.py`.
    """

    def __init__(self) -> None:
        super().__init__(hole=1.0, known=-1.0, fill=-1.0, mask_first=False)


class StableDiffusion(MaskConvention):
    """The mask, 1 in holes and 0 elsewhere, then the image's latents, of which the holes were grey.

    Source: the inpainting pipeline of Stable Diffusion in diffusers.
    """

    def __init__(self) -> None:
        super().__init__(hole=1.0, known=0.0, fill=0.0, mask_first=True)


class GLIDE(MaskConvention):
    """The image, of which the holes are grey, then the mask: 0 in holes, 1 elsewhere.

    Source: Nichol et al. 2022, and the code of its inpainting model.
    """

    def __init__(self) -> None:
        super().__init__(hole=0.0, known=1.0, fill=0.0, mask_first=False)


class MaskedImage(Spatial):
    """Gives the network the known pixels of `image`, as latents, and `mask`; puts them into finished images.

    Latents are the likeliest ones, scaled as those that are diffused, so that they are a function of the image. (The
    programs of Stable Diffusion draw them from the posterior.)

    Args:
        convention: How the network is told.
        dropout: See `Spatial`.

    Source: Rombach et al. 2022, section 4.5.
    """

    entries = ("image", "mask")

    def __init__(self, convention: MaskConvention = LatentDiffusion(), dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.convention = convention

    def concat(self, given: Condition, codec: Codec) -> Tensor:
        image, known, told = given["image"], known_pixels(given), self.convention
        with torch.no_grad():
            latents = codec.encode(torch.where(known, image, torch.full_like(image, told.fill)))
        mask = torch.where(known, told.known, told.hole).to(latents.dtype)
        mask = F.interpolate(mask, latents.shape[2:], mode="nearest")
        return torch.cat([mask, latents] if told.mask_first else [latents, mask], 1)

    def finish(self, images: Tensor, given: Condition) -> Tensor:
        return torch.where(known_pixels(given), given["image"].to(images.dtype), images)


def known_pixels(given: Condition) -> Tensor:
    """Where pixels are known, bool, (B, 1, H, W).

    Raises:
        ValueError: If the mask does not fit the image.
    """
    image, mask = given["image"], given["mask"]
    if mask.shape != (len(image), 1, *image.shape[2:]):
        raise ValueError(
            f"mask: shape {tuple(mask.shape)} for images of {tuple(image.shape)}; give one value for each pixel"
        )
    return mask > 0.5
