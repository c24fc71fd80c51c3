"""Which pipeline of diffusers a model over latents is, and what that holds besides networks and scheduler."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from safetensors.torch import save_file

from diffusion_lit.codecs import FirstStage
from diffusion_lit.conditioner import Conditioner
from diffusion_lit.conditioners import CLIPText, Joint, LowResolution, MaskedImage, StableDiffusion, Text, WordPiece
from diffusion_lit.conditioners.tokenizer import BEGIN, END, PAD, UNKNOWN
from diffusion_lit.diffusion.grid import Grid
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import ADMUNet
from diffusion_lit.tools import ldm_bert

Components = Mapping[str, Any]
"""By name, the library and class of a component, as model_index.json has them."""


class Written(NamedTuple):
    """A pipeline.

    Attributes:
        name: Its class.
        first_stage: Sub-folder of its autoencoder.
        write: Writes into a folder what makes conditions, and returns these components.
        offset: The scheduler's `steps_offset` where the pipeline sets it, whatever the grid; None: it does not.
    """

    name: str
    first_stage: str = "vqvae"
    write: Callable[[Path], Components] = lambda folder: {}
    offset: int | None = None


def pipeline_of(model: DiffusionModule) -> Written | None:
    """The pipeline of diffusers that passes a latent model all that its network takes; None: there is none."""
    network, conditioner = model.denoiser.network, model.conditioner
    if not isinstance(network, ADMUNet) or network.num_classes is not None:
        return None if getattr(network, "num_classes", None) is not None else Written("LDMPipeline")
    takes = (network.context_width is not None, network.concat_channels > 0)
    if takes == (False, False):
        return Written("LDMPipeline")
    codec = cast(FirstStage, model.codec)
    is_kl, is_unscaled = codec.network.regularizer.num_codes is None, bool((codec.scale == 1).all())
    if takes == (True, False) and isinstance(conditioner, Text) and type(conditioner.tokenizer) is WordPiece:
        return Written("LDMTextToImagePipeline", write=lambda folder: write_bert(conditioner, folder))
    if takes == (True, False) and isinstance(conditioner, CLIPText) and is_kl:
        return Written("StableDiffusionPipeline", "vae", lambda folder: write_clip(conditioner, folder), offset=1)
    if takes == (True, True) and (text := text_beside_holes(conditioner)) is not None and is_kl:
        return Written("StableDiffusionInpaintPipeline", "vae", lambda folder: write_clip(text, folder), offset=1)
    if takes == (False, True) and is_unscaled and is_low_resolution(conditioner):
        return Written("LDMSuperResolutionPipeline")
    return None


def is_low_resolution(conditioner: Conditioner) -> bool:
    """Whether it gives low-resolution images as they are."""
    return isinstance(conditioner, LowResolution) and conditioner.factor == 1 and conditioner.augmentation is None


def text_beside_holes(conditioner: Conditioner) -> CLIPText | None:
    """The texts of a conditioner that makes no more than them and an image with holes, as Stable Diffusion has it."""
    parts = list(conditioner.conditioners) if isinstance(conditioner, Joint) else []
    texts = [part for part in parts if isinstance(part, CLIPText)]
    holes = [part for part in parts if isinstance(part, MaskedImage) and type(part.convention) is StableDiffusion]
    return texts[0] if len(parts) == 2 and texts and holes else None


def note(written: Written | None, grid: Grid) -> str | None:
    """In what the pipeline differs, for the user; None: in nothing."""
    if written is None or written.offset is None or getattr(grid, "offset", 0) == written.offset:
        return None
    return (
        f"a {written.name} sets steps_offset={written.offset} whatever its scheduler says; to draw the same here, "
        "export with a sampler whose grid is Leading(offset=1)"
    )


def write_bert(conditioner: Text, folder: Path) -> Components:
    """Writes a text encoder that is trained with the network, and its tokenizer.

    Raises:
        ValueError: If there is no vocabulary, or texts have another length than in diffusers.
    """
    encoder, place = conditioner.encoder, folder / "bert"
    config = ldm_bert.configuration(encoder)
    write_bert_tokenizer(cast(WordPiece, conditioner.tokenizer), folder / "tokenizer")
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(ldm_bert.to_bert(encoder), place / "model.safetensors", metadata={"format": "pt"})
    return {
        "bert": ["latent_diffusion", ldm_bert.CLASS],
        "tokenizer": ["transformers", ldm_bert.TOKENIZER_CLASS],
    }


def write_bert_tokenizer(tokenizer: WordPiece, folder: Path) -> None:
    """Writes a vocabulary as `BertTokenizer` reads it; ValueError if there is none."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.processors import TemplateProcessing

    if not tokenizer.ready:
        raise ValueError("the text encoder has no vocabulary yet; train it for a step first")
    backend = Backend.from_str(bytes(tokenizer.get_extra_state().tolist()).decode())
    backend.add_special_tokens([PAD, UNKNOWN, BEGIN, END])
    backend.post_processor = TemplateProcessing(
        single=f"{BEGIN} $A {END}",
        pair=f"{BEGIN} $A {END} $B:1 {END}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (BEGIN, END)],
    )
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    words = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")
    names = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": BEGIN, "sep_token": END}
    more = {"do_lower_case": tokenizer.lowercase, "model_max_length": ldm_bert.LENGTH}
    config = {"tokenizer_class": ldm_bert.TOKENIZER_CLASS, **names, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_clip(conditioner: CLIPText, folder: Path) -> Components:
    """Writes a text tower of CLIP and its tokenizer; a pipeline without a safety checker."""
    conditioner.save(folder)
    nothing = [None, None]
    return {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        **dict.fromkeys(("feature_extractor", "image_encoder", "safety_checker"), nothing),
        "requires_safety_checker": False,
    }
