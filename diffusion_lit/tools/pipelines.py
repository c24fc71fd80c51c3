"""Pipelines of diffusers: which networks their folders hold, and how their networks are told what images show."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion_lit.conditioners import CLIPText, Joint, LowResolution, MaskedImage, StableDiffusion
from diffusion_lit.diffusion import ClassifierFree
from diffusion_lit.tools import ldm_bert
from diffusion_lit.tools.files import read_json
from diffusion_lit.tools.ldm_bert import Conditioned
from diffusion_lit.tools.scheduler import part

Reader = Callable[[Path, Mapping[str, Any]], Conditioned]
"""Makes the conditioner of a pipeline, given its folder and the arguments of its network."""

KEYS = ("requires_safety_checker", "force_zeros_for_empty_prompt")
"""In a model_index.json besides the components."""


class Pipeline(NamedTuple):
    """What a pipeline of diffusers is here.

    Attributes:
        components: By sub-folder, the classes of its part that are read; () where the folder itself says.
        first_stage: Sub-folder with its autoencoder; None: it has none.
        is_scaled: Whether latents are scaled by the factor of the autoencoder's configuration.
        conditioner: Makes the conditioner; None: it has none.
        guidance: Scale by which the pipeline guides unless asked otherwise, in our convention; None: never.
        scheduler: What the pipeline sets in the configuration of every scheduler.
    """

    components: Mapping[str, tuple[str, ...]]
    first_stage: str | None = None
    is_scaled: bool = True
    conditioner: Reader | None = None
    guidance: float | None = None
    scheduler: Mapping[str, Any] = {}

    def parts(self) -> dict[str, Any]:
        """The configurations of the parts that the pipeline itself decides."""
        return {} if self.guidance is None else {"guidance": part(ClassifierFree, scale=self.guidance)}


def texts_of_bert(folder: Path, network: Mapping[str, Any]) -> Conditioned:
    """The trained text encoder of latent diffusion."""
    return ldm_bert.read_text(folder)


def texts_of_clip(folder: Path, network: Mapping[str, Any]) -> Conditioned:
    """The frozen text tower of CLIP, which stays where it is."""
    return Conditioned(part(CLIPText, folder=str(folder.absolute())), {})


def low_resolution(folder: Path, network: Mapping[str, Any]) -> Conditioned:
    """The low-resolution image, as it is."""
    return Conditioned(part(LowResolution, factor=1, channels=network["concat_channels"]), {})


def texts_and_masked_image(folder: Path, network: Mapping[str, Any]) -> Conditioned:
    """The text tower of CLIP, and an image with holes."""
    if network["concat_channels"] != network["in_channels"] + 1:
        raise ValueError(
            f"in_channels={network['in_channels'] + network['concat_channels']} of the U-Net: for inpainting ours has "
            f"{2 * network['in_channels'] + 1}, those of latents, a mask and a masked image's latents; import "
            "a network that is given no holes by its StableDiffusionPipeline, and inpaint with --edit Replacement"
        )
    masked = part(MaskedImage, convention=part(StableDiffusion))
    return Conditioned(part(Joint, conditioners=[texts_of_clip(folder, network).part, masked]), {})


STABLE_DIFFUSION = Pipeline(
    {"unet": (), "scheduler": (), "vae": (), "text_encoder": ("CLIPTextModel",), "tokenizer": ("CLIPTokenizer",)},
    first_stage="vae",
    conditioner=texts_of_clip,
    guidance=6.5,
    scheduler={"steps_offset": 1, "clip_sample": False},
)
PIPELINES = {
    "DDPMPipeline": Pipeline({"unet": (), "scheduler": ()}),
    "DDIMPipeline": Pipeline({"unet": (), "scheduler": ()}),
    "LDMPipeline": Pipeline({"unet": (), "scheduler": (), "vqvae": ()}, first_stage="vqvae"),
    "LDMTextToImagePipeline": Pipeline(
        {
            "unet": (),
            "scheduler": (),
            "vqvae": (),
            "bert": (ldm_bert.CLASS,),
            "tokenizer": (ldm_bert.TOKENIZER_CLASS,),
        },
        first_stage="vqvae",
        conditioner=texts_of_bert,
        guidance=0.0,
    ),
    "LDMSuperResolutionPipeline": Pipeline(
        {"unet": (), "scheduler": (), "vqvae": ()}, first_stage="vqvae", is_scaled=False, conditioner=low_resolution
    ),
    "StableDiffusionPipeline": STABLE_DIFFUSION,
    "StableDiffusionInpaintPipeline": STABLE_DIFFUSION._replace(conditioner=texts_and_masked_image),
}
"""By name in diffusers."""


class Index(NamedTuple):
    """What a model_index.json says.

    Attributes:
        pipeline: What the pipeline is here.
        ignored: Components that are there and not read.
    """

    pipeline: Pipeline
    ignored: tuple[str, ...]


def read_index(folder: Path) -> Index | None:
    """The pipeline that a folder holds; None: it holds none.

    Raises:
        FileNotFoundError: If a sub-folder is missing.
        ValueError: If the pipeline or one of its components has no equal here.
    """
    path = folder / "model_index.json"
    if not path.is_file():
        return None
    index = read_json(path)
    name = index.get("_class_name")
    pipeline = PIPELINES.get(name) if isinstance(name, str) else None
    if pipeline is None:
        raise ValueError(
            f"{folder} is a {name}; only {', '.join(PIPELINES)} have an equal here; give the folder of one of its "
            "networks, and a recipe by -c"
        )
    listed = {key: value for key, value in index.items() if not key.startswith("_") and key not in KEYS}
    kinds = {key: value[-1] for key, value in listed.items() if isinstance(value, list) and value and value[-1]}
    for component, classes in pipeline.components.items():
        kind = str(kinds.get(component)).removesuffix("Fast")
        if classes and kind not in classes:
            raise ValueError(f"{path}: {component} is a {kinds.get(component)}; only {' and '.join(classes)} are read")
    for component in pipeline.components:
        # Old repositories have all files at the top.
        if not (folder / component).is_dir() and component not in ("unet", "scheduler"):
            raise FileNotFoundError(f"{path} lists {component}, and there is no folder {folder / component}")
    return Index(pipeline, tuple(sorted(kinds.keys() - pipeline.components.keys())))
