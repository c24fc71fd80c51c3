"""The text tower of CLIP, frozen, as the context of a network."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from diffusion_lit.conditioners.text import Prompts
from diffusion_lit.conditioners.tokenizer import Word
from diffusion_lit.frozen import Frozen

TOWER, TOKENIZER = "text_encoder", "tokenizer"
"""Sub-folders of a pipeline."""
ARCHITECTURE = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id"),
)
"""All that is taken from a tower's config.json, which could ask for code too: kernels, quantisation."""
ADAPTER = "adapter_config.json"


class CLIPText(Prompts):
    """A text tower of CLIP, which is used and not trained.

    The context is the last hidden state after the final normalization, of all tokens, padding included: no mask but the
    causal one. Models that were trained without a mask must be sampled without one. The tower is in no checkpoint, so
    the folder is needed to sample too. Needs the `transformers` package: `pip install diffusion-lit[text]`.

    Args:
        folder: Holds a `CLIPTextModel` and its tokenizer, as `save_pretrained` writes them or a pipeline's folders
            `text_encoder` and `tokenizer` have them. Nothing is downloaded.
        dropout: Probability, in [0, 1), that a text is replaced by the empty one in training.

    Raises:
        ValueError: If the probability is out of range, the package is missing, or the folder holds no such model.

    Source: Radford et al. 2021 (CLIP); as a condition: Rombach et al. 2022, the model Stable Diffusion.
    """

    def __init__(self, folder: str, dropout: float = 0.1) -> None:
        super().__init__(dropout)
        path = Path(folder).expanduser()
        tower, self._tokenizer = _load(path)
        self.tower = Frozen(tower)
        self.length = int(tower.config.max_position_embeddings)

    @property
    def width(self) -> int:
        return int(cast(Any, self.tower.network).config.hidden_size)

    def encode(self, texts: Sequence[str]) -> Tensor:
        whole = self._tokenizer(list(texts))["input_ids"]
        self.warn(texts, [max(len(ids) - self.length, 0) for ids in whole], self.length)
        device = next(self.tower.network.parameters()).device
        with torch.no_grad():
            return cast(Tensor, self.tower(self.tokens_of(texts).to(device)).last_hidden_state)

    def tokens_of(self, texts: Sequence[str]) -> Tensor:
        padded = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return cast(Tensor, padded["input_ids"])

    def words(self, text: str) -> list[Word]:
        encoded = self._tokenizer(text, truncation=True, max_length=self.length, return_offsets_mapping=True)
        places: dict[int, list[int]] = {}
        for position, number in enumerate(encoded.word_ids()):
            if number is not None:
                places.setdefault(number, []).append(position)
        offsets = encoded["offset_mapping"]
        return [Word(text[offsets[found[0]][0] : offsets[found[-1]][1]], found) for found in places.values()]

    def save(self, folder: Path) -> None:
        """Writes the tower and its tokenizer into the folders `text_encoder` and `tokenizer`."""
        from transformers.utils import logging

        with _quietly(logging):
            cast(Any, self.tower.network).save_pretrained(folder / TOWER)
            self._tokenizer.save_pretrained(folder / TOKENIZER)


def _load(path: Path) -> tuple[Any, Any]:
    """The tower and its tokenizer."""
    try:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError(
            f"conditioner: CLIPText needs the transformers package ({error}); pip install 'diffusion-lit[text]'"
        ) from error
    tower, words = (path / name if (path / name).is_dir() else path for name in (TOWER, TOKENIZER))
    for folder, file in ((tower, "config.json"), (words, "tokenizer_config.json")):
        if not (folder / file).is_file():
            raise ValueError(
                f"conditioner.folder={path} holds no CLIP text model: {folder / file} is missing; give a folder that "
                "CLIPTextModel and CLIPTokenizer were saved in"
            )
    if (tower / ADAPTER).is_file():
        raise ValueError(f"conditioner.folder={path}: {tower / ADAPTER} changes the tower; merge it into the weights")
    try:
        model = _tower(CLIPTextModel, CLIPTextConfig, tower)
        tokenizer = CLIPTokenizer.from_pretrained(words, local_files_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"conditioner.folder={path}: the weights are a pickle that asks for more than tensors, and only tensors "
            "and plain data are read; have their author save them as safetensors"
        ) from error
    except Exception as error:  # The package raises plain exceptions.
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"conditioner.folder={path} holds no CLIP text model that can be read: {reason}") from error
    length = model.config.max_position_embeddings
    if tokenizer.model_max_length < length:
        raise ValueError(
            f"conditioner.folder={path}: the tokenizer makes {tokenizer.model_max_length} tokens and the tower takes "
            f"{length}; give the tokenizer that the tower was trained with"
        )
    return model, tokenizer


def _tower(cls: Any, settings: Any, folder: Path) -> Any:
    """The text tower in a folder, in float32, also of a file in half precision; all of its weights must be there."""
    from transformers.utils import logging

    plain = any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin"))
    half = next((kind for kind in ("fp16", "bf16") if list(folder.glob(f"*.{kind}.*"))), None)
    with _quietly(logging):
        said = settings.from_pretrained(folder, local_files_only=True)
        model, info = cls.from_pretrained(
            folder,
            config=settings(**{name: getattr(said, name) for name in ARCHITECTURE}),
            attn_implementation="sdpa",
            weights_only=True,
            local_files_only=True,
            dtype=torch.float32,
            variant=None if plain else half,
            output_loading_info=True,
        )
    missing = [*info["missing_keys"], *info["mismatched_keys"]]
    if missing:
        raise ValueError(f"{len(missing)} of its weights are missing, first {missing[0]}")
    if getattr(said, "use_attention_mask", False):
        raise ValueError("use_attention_mask in its config.json has no equal here: no mask is given to the tower")
    return model


@contextmanager
def _quietly(logging: Any) -> Iterator[None]:
    """A context without progress bars and warnings of the transformers package."""
    shows, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shows:
            logging.enable_progress_bar()
