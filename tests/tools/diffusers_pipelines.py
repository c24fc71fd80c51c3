"""Small pipelines of diffusers over latents with random weights: texts, low resolutions and holes."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.tools.diffusers_models import TINY, T, randomised

WIDTH = 16
LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "seven"]
CLIP = [
    "<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS), "th", "the</w>",
]  # fmt: skip
STAGE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
ADM: dict[str, Any] = {"freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1, "norm_eps": 1e-5}


def unet(**changes: Any) -> Any:
    """One that heeds what it is told, which random weights do too little."""
    sizes: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    network: Any = randomised(UNet2DConditionModel(**{**sizes, **changes}))
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.mul_(3.0 if ".attn2.to_" in name else 1.0)
        network.conv_in.weight[:, 4:] *= 3
    return network


def autoencoder(**changes: Any) -> Any:
    """An `AutoencoderKL` whose posterior has no noise, so that encoding is the same everywhere."""
    made: Any = randomised(AutoencoderKL(**{**STAGE, "latent_channels": 4, "scaling_factor": 0.7, **changes}))
    with torch.no_grad():
        made.quant_conv.weight[4:] = 0
        made.quant_conv.bias[4:] = -30
    return made


def scheduler(**changes: Any) -> DDIMScheduler:
    """Of few steps, in which an image turns into noise all the same."""
    return DDIMScheduler(T, 0.02, 0.5, "scaled_linear", **{"clip_sample": False, **changes})


def bert(**changes: Any) -> Any:
    """With dropout in its configuration, as by default, which evaluation leaves out."""
    sizes = {"vocab_size": len(BERT), "d_model": WIDTH, "encoder_ffn_dim": 4 * WIDTH}
    sizes |= {"encoder_layers": 2, "encoder_attention_heads": 2, "head_dim": 4}
    return randomised(LDMBertModel(LDMBertConfig(**{**sizes, **changes})))


def text_to_image(**parts: Any) -> Any:
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(BERT)})
    own = {"vqvae": autoencoder(), "bert": bert(), "tokenizer": tokenizer, "unet": unet(), "scheduler": scheduler()}
    return LDMTextToImagePipeline(**{**own, **parts})


def super_resolution(**parts: Any) -> Any:
    stage = randomised(VQModel(**STAGE, latent_channels=3, num_vq_embeddings=16, scaling_factor=0.18215))
    network = randomised(UNet2DModel(**{**TINY, **ADM, "in_channels": 6}))
    return LDMSuperResolutionPipeline(**{"vqvae": stage, "unet": network, "scheduler": scheduler(), **parts})


def tower(**changes: Any) -> Any:
    sizes = {"vocab_size": len(CLIP), "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 77}
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(**{**sizes, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **changes})
    )


def tokenizer_of_clip(**changes: Any) -> Any:
    vocabulary = {word: number for number, word in enumerate(CLIP)}
    merges = [("t", "h"), ("th", "e</w>")]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, **{"model_max_length": 77, **changes})


def stable_diffusion(cls: Any = StableDiffusionPipeline, **parts: Any) -> Any:
    own = {"vae": autoencoder(), "text_encoder": tower(), "tokenizer": tokenizer_of_clip(), "unet": unet()}
    own |= {
        "scheduler": scheduler(steps_offset=1, set_alpha_to_one=False),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return cls(**{**own, "requires_safety_checker": False, **parts})


def inpainting(**parts: Any) -> Any:
    return stable_diffusion(StableDiffusionInpaintPipeline, **{"unet": unet(in_channels=9), **parts})


def saved(pipeline: Any, folder: Path, **saving: Any) -> Path:
    pipeline.save_pretrained(folder / "pipeline", **saving)
    return folder / "pipeline"
