"""What `test` says of a codebook."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusion_lit.memory import in_memory
from diffusion_lit.methods.autoencoder.codebook import perplexity, use
from diffusion_lit.methods.autoencoder.module import AutoencoderModule
from diffusion_lit.metrics import Evidence, FeatureExtractor, Score
from diffusion_lit.types import Condition

CHUNK = 1024
CODES = "codebook.codes"
SIZE = "codebook.size"


class CodebookUse(Score):
    """The share of a VQ model's codes that occur in the images' latents, and the perplexity of the codes."""

    against: ClassVar = "nothing"
    output: ClassVar = None

    def __init__(self) -> None:
        super().__init__()

    def per_image(self, generator: nn.Module, images: Tensor, condition: Condition) -> dict[str, Tensor]:
        if not isinstance(generator, AutoencoderModule) or generator.num_codes is None:
            raise ValueError(
                f"CodebookUse: the {type(generator).__name__} has no codebook; leave it out of --evaluation.scores"
            )
        targets, count = condition["image"], len(images)
        with generator.evaluating():
            parts, _ = in_memory(lambda some, *_: generator.codes(targets[some]), count, count, "while encoding")
        codes = torch.cat(parts).flatten(1)
        small = torch.int16 if generator.num_codes <= 2**15 else torch.int32
        size = torch.full((len(codes),), generator.num_codes)
        return {CODES: codes.to(small), SIZE: size}

    def __call__(self, evidence: Evidence, extractor: FeatureExtractor) -> dict[str, float]:
        codes, size = evidence.columns[CODES], int(evidence.columns[SIZE][0])
        counts = torch.zeros(size, dtype=torch.int64)
        for part in torch.split(codes, CHUNK):
            counts += torch.bincount(part.flatten().long(), minlength=size)
        return {"codebook_use": float(use(counts)), "codebook_perplexity": float(perplexity(counts))}
