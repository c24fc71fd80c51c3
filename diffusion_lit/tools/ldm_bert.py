"""The text encoder of diffusers' `LDMTextToImagePipeline`: its `LDMBertModel` and `BertTokenizer` are `Text` here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffusion_lit.conditioners import Text, WordPiece
from diffusion_lit.conditioners.tokenizer import BEGIN, END, PAD, UNKNOWN
from diffusion_lit.networks import TextEncoder
from diffusion_lit.networks.transformer import TokenAttention
from diffusion_lit.tools.diffusers_config import differences, whole_numbers
from diffusion_lit.tools.files import check_tensors, is_state, naming, plain_names, read, read_json
from diffusion_lit.tools.scheduler import part

CLASS, TOKENIZER_CLASS = "LDMBertModel", "BertTokenizer"
LENGTH = 77
"""Tokens that the pipeline makes of every text."""
WEIGHTS_FILES = tuple(
    name
    for variant in ("", ".fp16", ".bf16")
    for name in (f"model{variant}.safetensors", f"pytorch_model{variant}.bin")
)
"""Names of weights files, the preferred first."""
HEAD = "to_logits."
"""With which the names of an output head begin that nothing uses."""
ARGUMENTS: Mapping[str, tuple[str, int]] = {
    "vocabulary": ("vocab_size", 30522),
    "length": ("max_position_embeddings", LENGTH),
    "width": ("d_model", 1280),
    "depth": ("encoder_layers", 32),
    "num_heads": ("encoder_attention_heads", 8),
    "head_channels": ("head_dim", 64),
}
"""By argument of `TextEncoder`, the key, and the value that a missing key has."""

NAMES = (
    (r"^token_emb\.", "model.embed_tokens."),
    (r"^pos_emb\.emb\.", "model.embed_positions."),
    (r"^norm\.", "model.layer_norm."),
    (r"^(model\.layers\.\d+)\.0\.", r"\1.{norm}."),
    (r"\.1\.to_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.1\.to_out\.", ".self_attn.out_proj."),
    (r"\.1\.net\.0\.0\.", ".fc1."),
    (r"\.1\.net\.2\.", ".fc2."),
)
"""Substitutions from our names to diffusers', once the number of each layer is that of its block."""


class Conditioned(NamedTuple):
    """A conditioner with weights.

    Attributes:
        part: Its configuration.
        state: Its tensors by our names; empty: it has none.
    """

    part: dict[str, Any]
    state: Mapping[str, Tensor]


def read_text(folder: Path) -> Conditioned:
    """Reads a `bert` and a `tokenizer` folder.

    Args:
        folder: Of the pipeline.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If they have no equal here.
    """
    place = folder / "bert"
    files = [place / name for name in WEIGHTS_FILES if (place / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{place} has no {WEIGHTS_FILES[0]} or {WEIGHTS_FILES[1]}; sharded weights are not read"
        )
    config = read_json(place / "config.json")
    with naming(place / "config.json"), torch.device("meta"):
        given = arguments(config)
        encoder = TextEncoder(**given)
    tensors = read(files[0])
    if not is_state(tensors):
        raise ValueError(f"{files[0]} does not hold tensors by name")
    tokenizer, options = read_tokenizer(folder / "tokenizer", given["vocabulary"])
    state = {f"encoder.{name}": tensor for name, tensor in from_bert(plain_names(tensors), encoder, files[0]).items()}
    state |= {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    return Conditioned(part(Text, encoder=part(TextEncoder, **given), tokenizer=part(WordPiece, **options)), state)


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `TextEncoder` that an `LDMBertModel` is.

    Args:
        config: Its config.json; a missing key has its default in diffusers.

    Raises:
        ValueError: If it has no equal here.
    """
    if config.get("model_type") != "ldmbert":
        raise ValueError(
            f"the text encoder's configuration is of model_type={config.get('model_type')!r}; only a {CLASS} is read"
        )
    given = {name: whole_numbers(config, key, missing) for name, (key, missing) in ARGUMENTS.items()}
    fixed = {
        "activation_function": ("gelu", "gelu"),
        "encoder_ffn_dim": (4 * given["width"], 5120),
        "max_position_embeddings": (LENGTH, LENGTH),
    }
    different = differences(config, fixed, config.keys())
    if different:
        raise ValueError(f"this {CLASS} has no equal here: {'; '.join(different)}")
    return given


def read_tokenizer(place: Path, vocabulary: int) -> tuple[WordPiece, dict[str, Any]]:
    """The tokenizer of BERT in a folder: with its vocabulary, and the arguments of one without.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is another kind of tokenizer, or its vocabulary is larger than that of the encoder.
    """
    files = [place / name for name in ("tokenizer.json", "vocab.txt") if (place / name).is_file()]
    if not files:
        raise FileNotFoundError(f"{place} has no tokenizer.json or vocab.txt")
    config = read_json(place / "tokenizer_config.json")
    options = {"lowercase": bool(config.get("do_lower_case", True))}
    if files[0].suffix == ".json":
        kind = (read_json(files[0]).get("model") or {}).get("type")
        if kind != "WordPiece":
            raise ValueError(f"{files[0]} is a {kind} tokenizer; only that of BERT, WordPiece, is read")
    names = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": BEGIN, "sep_token": END}
    other = {key: config[key] for key, ours in names.items() if config.get(key, ours) != ours}
    if other:
        raise ValueError(f"{place} has {other} in its tokenizer_config.json; ours are {', '.join(names.values())}")
    tokenizer = WordPiece(str(files[0]), **options)
    tokenizer.learn((), vocabulary)
    tokenizer([""], 2)  # Which it refuses without these tokens.
    return tokenizer, options


def bert_names(encoder: TextEncoder) -> dict[str, str]:
    """The name in diffusers of each tensor, by our name."""

    def theirs(name: str) -> str:
        found = re.match(r"attn_layers\.layers\.(\d+)", name)
        layer = 0 if found is None else int(found[1])
        if found is not None:
            name = f"model.layers.{layer // 2}{name.removeprefix(found[0])}"
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        return name.format(norm="final_layer_norm" if layer % 2 else "self_attn_layer_norm")

    return {name: theirs(name) for name in encoder.state_dict()}


def from_bert(tensors: Mapping[str, Tensor], encoder: TextEncoder, source: Path) -> dict[str, Tensor]:
    """The tensors of an `LDMBertModel` by our names, without the head that nothing uses.

    Args:
        tensors: By diffusers' names.
        encoder: What they are for; it may be on the meta device.
        source: For messages.

    Raises:
        ValueError: If they are not exactly the encoder's; see `check_tensors`.
    """
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(HEAD)}
    names = bert_names(encoder)
    check_tensors({names[name]: tensor.shape for name, tensor in encoder.state_dict().items()}, given, source)
    return {name: given[theirs] for name, theirs in names.items()}


def configuration(encoder: TextEncoder) -> dict[str, Any]:
    """The config.json of a text encoder.

    Raises:
        ValueError: If its texts have another length than the pipeline's.
    """
    if encoder.length != LENGTH:
        raise ValueError(f"diffusers' texts have {LENGTH} tokens and conditioner.encoder.length is {encoder.length}")
    layers = cast(nn.ModuleList, encoder.attn_layers["layers"])
    attention = next((m for m in encoder.modules() if isinstance(m, TokenAttention)), None)
    heads = 8 if attention is None else attention.heads
    inner = 8 * 64 if attention is None else attention.to_q.out_features
    given = {
        "vocabulary": encoder.token_emb.num_embeddings,
        "length": encoder.length,
        "width": encoder.width,
        "depth": len(layers) // 2,
        "num_heads": heads,
        "head_channels": inner // heads,
    }
    return {
        "architectures": [CLASS],
        "model_type": "ldmbert",
        **{ARGUMENTS[name][0]: value for name, value in given.items()},
        "encoder_ffn_dim": 4 * encoder.width,
        "activation_function": "gelu",
        "dropout": 0.0,
        "pad_token_id": 0,
    }


def to_bert(encoder: TextEncoder) -> dict[str, Tensor]:
    """The tensors of a text encoder by diffusers' names; the head that nothing uses, which diffusers needs, is zero."""
    names = bert_names(encoder)
    state = {names[name]: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    words, width = encoder.token_emb.weight.shape
    head = {f"{HEAD}weight": torch.zeros(words, width), f"{HEAD}bias": torch.zeros(words)}
    return {**{name: value for name, value in state.items() if not name.startswith(HEAD)}, **head}
