"""The tensors in a checkpoint of latent diffusion's code, by the part that they are of.

Inside of a part they have the names that ours have. Raw weights and averages of the U-Net stand side by side; the first
stage and the conditioner have one set. A checkpoint of a first stage alone has no prefix, and its loss beside it.

Source: the code of Rombach et al. 2022.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from diffusion_lit.checkpoint import AVERAGED, RAW
from diffusion_lit.codecs import FirstStage
from diffusion_lit.diffusion import DiscreteProcess, Process
from diffusion_lit.module import DiffusionModule
from diffusion_lit.networks import TextEncoder
from diffusion_lit.parts import path_of
from diffusion_lit.tools.files import is_state, plain_names

State = Mapping[str, Tensor]

FIRST_STAGE = "first_stage_model."
NETWORK = "model.diffusion_model."
CONDITIONER = "cond_stage_model."
VOCABULARY = "cond_stage_vocabulary."
"""Of a conditioner that has one; not in files of that code, which has BERT's."""
AVERAGE = "model_ema."
"""Followed by the name of a weight without its dots."""
INSIDE = "diffusion_model."
"""With which the names of the U-Net's averaged weights begin before they lose their dots."""
LOSS = "loss."
DISCRIMINATOR = "loss.discriminator."
TENSORS = ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight")
"""Of a first stage alone."""
OURS = "denoiser.network."
"""With which the tensors of our checkpoints begin."""

ALPHA_BAR, SCALE = "alphas_cumprod", "scale_factor"
TOLERANCE = 1e-3
HEAD = "to_logits."
TEXT = "transformer."
"""Inside of a conditioner, with which the names of a text encoder's tensors begin."""


def published(held: object, source: Path) -> dict[str, Tensor] | None:
    """The tensors of a checkpoint by their plain names; None if it has another layout.

    Args:
        held: The content of the file, the tensors alone or below "state_dict".
        source: For messages.

    Raises:
        ValueError: If it is a checkpoint of this program.
    """
    inner = held.get("state_dict") if isinstance(held, Mapping) else None
    state = inner if is_state(inner) else held
    if not is_state(state):
        return None
    plain = plain_names(state)
    if any(name.startswith(OURS) for name in plain):
        raise ValueError(f"{source} is a checkpoint of this program: give it to --ckpt_path as it is")
    known = any(name.startswith((NETWORK, FIRST_STAGE)) for name in plain) or all(name in plain for name in TENSORS)
    return plain if known else None


def part(state: State, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def without_loss(state: State) -> dict[str, Tensor]:
    """The tensors of a first stage without those of its loss and their averages."""
    return {name: tensor for name, tensor in state.items() if not name.startswith((LOSS, AVERAGE))}


def described(model: Mapping[str, Any], state: State) -> dict[str, Any]:
    """The configuration of a model, with what a checkpoint says of it: that it holds the first stage, and the scale."""
    codec = model.get("init_args", {}).get("codec") or {}
    if codec.get("class_path") != path_of(FirstStage) or not part(state, FIRST_STAGE):
        return dict(model)
    found = scale(state)
    given = {**codec.get("init_args", {}), "checkpoint": None, **({} if found is None else {"scale": found})}
    return {**model, "init_args": {**model["init_args"], "codec": {**codec, "init_args": given}}}


def network(
    state: State, own: Collection[str], weights: str | None, source: Path
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of the U-Net.

    Args:
        state: Of the checkpoint.
        own: Their names here.
        weights: "averaged" or "raw"; None: averaged where there are both.
        source: For messages.

    Returns:
        The tensors by our names; and which of two sets they are, None where there is one.

    Raises:
        ValueError: If there is no U-Net, or one set of weights of two is asked for and there are not two.
    """
    if not part(state, NETWORK):
        raise ValueError(f"{source} holds a first stage and no U-Net: give a recipe of an autoencoder by -c")
    return _choose(part(state, NETWORK), part(state, AVERAGE), INSIDE, own, weights, source)


def first_stage(
    state: State, own: Collection[str], weights: str | None, source: Path
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of the autoencoder, of a diffusion model or alone; arguments and results as for `network`."""
    inner = part(state, FIRST_STAGE)
    if not inner and part(state, NETWORK):
        raise ValueError(f"{source} holds a U-Net and no first stage: give a recipe of a diffusion model by -c")
    state = inner or state
    return _choose(without_loss(state), part(state, AVERAGE), "", own, weights, source)


def _choose(
    raw: dict[str, Tensor],
    average: Mapping[str, Tensor],
    inside: str,
    own: Collection[str],
    weights: str | None,
    source: Path,
) -> tuple[dict[str, Tensor], str | None]:
    names = {(inside + name).replace(".", ""): name for name in own}
    # What averages do not hold, such as buffers, and how they were made, `decay` and `num_updates`, is not among these.
    averaged = {names[name]: tensor for name, tensor in average.items() if name in names}
    if not averaged and weights is not None:
        raise ValueError(f"{source} holds one set of weights; leave out --weights {weights}")
    if not averaged or weights == RAW:
        return raw, RAW if averaged else None
    return {**raw, **averaged}, AVERAGED


def conditioner(state: State, own: Collection[str]) -> dict[str, Tensor]:
    """The tensors of the conditioner by our names, `own`.

    The two have other prefixes. What a text encoder does not have here, its unused output head, is left out.
    """
    theirs = part(state, CONDITIONER)
    if len(own) == 1 and len(theirs) == 1:
        return dict(zip(own, theirs.values(), strict=True))
    ours = common_prefix(own)
    inside = common_prefix(theirs)
    renamed = {ours + name.removeprefix(inside): tensor for name, tensor in theirs.items()}
    return {name: tensor for name, tensor in renamed.items() if name in own or HEAD not in name}


def common_prefix(names: Collection[str]) -> str:
    """With which all names begin, up to a dot."""
    common = os.path.commonpath([name.replace(".", "/") for name in names]).replace("/", ".") if names else ""
    return f"{common}." if common else ""


def scale(state: State) -> float | None:
    """The factor from the first stage's latents to what was diffused; None if the checkpoint does not say."""
    return float(state[SCALE]) if SCALE in state and state[SCALE].numel() == 1 else None


def check_process(state: State, process: Process, source: Path) -> None:
    """Raises ValueError if a checkpoint says that its process is another."""
    if ALPHA_BAR not in state or not isinstance(process, DiscreteProcess):
        return
    theirs = state[ALPHA_BAR].double()
    if len(theirs) != process.num_steps:
        raise ValueError(f"{source} was trained with {len(theirs)} steps; set process.num_steps to that")
    alpha, _ = process.alpha_sigma(torch.arange(1, process.num_steps + 1).double() / process.num_steps)
    ours = alpha.flatten().double().square()
    if ((ours - theirs).abs() > TOLERANCE * theirs).any():
        raise ValueError(
            f"{source} was trained with another schedule: its betas run from {_first_beta(theirs):.4g}, to alpha_bar = "
            f"{float(theirs[-1]):.6g}, and the recipe's from {_first_beta(ours):.4g} to {float(ours[-1]):.6g}; set "
            "process.schedule"
        )


def _first_beta(alpha_bar: Tensor) -> float:
    return 1 - float(alpha_bar[0])


def tensors(model: DiffusionModule) -> dict[str, Tensor]:
    """All tensors of a model by the names of that layout; one set of weights, without the tables of the process."""
    encoders = [f"{name}." for name, part in model.conditioner.named_modules() if isinstance(part, TextEncoder)]
    own = {}
    for name, tensor in model.conditioner.named_parameters():
        prefix = next((encoder for encoder in encoders if name.startswith(encoder)), None)
        own[name if prefix is None else TEXT + name.removeprefix(prefix)] = tensor
    vocabularies = {
        name: tensor
        for name, tensor in model.conditioner.state_dict().items()
        if name.endswith(_EXTRA_STATE_KEY_SUFFIX)
    }
    stage = model.codec.network.state_dict() if isinstance(model.codec, FirstStage) else {}
    return {
        **{NETWORK + name: tensor for name, tensor in model.denoiser.network.state_dict().items()},
        **{CONDITIONER + name: tensor.detach() for name, tensor in own.items()},
        **{VOCABULARY + name: tensor for name, tensor in vocabularies.items()},
        **{FIRST_STAGE + name: tensor for name, tensor in stage.items()},
    }
