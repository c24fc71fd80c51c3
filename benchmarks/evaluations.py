"""How good images are after how many network evaluations, by every sampler.

    python -m benchmarks.evaluations runs/demo/checkpoints/best.ckpt --num_images 1000

The Fréchet distance to the training images in the features that the checkpoint's configuration scores with. Every
sampler starts from the same noise; prints a table and writes JSON.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import nn

from diffusion_lit.callbacks.checkpoints import read_checkpoint, restore
from diffusion_lit.data import ImageData
from diffusion_lit.diffusion import DDIM, Ancestral, DPMSolver, FixedSmall, Heun, Sampler
from diffusion_lit.generation import Requests
from diffusion_lit.images import to_uint8
from diffusion_lit.metrics import FeatureMoments, as_extractor, frechet_distance
from diffusion_lit.module import DiffusionModule

BATCH = 250
SAMPLERS: dict[str, Callable[[int], Sampler]] = {
    "Ancestral (FixedSmall)": lambda n: Ancestral(n, FixedSmall()),
    "DDIM": DDIM,
    "DPMSolver, order 2": lambda n: DPMSolver(n, 2),
    "DPMSolver, order 3": lambda n: DPMSolver(n, 3),
    "Heun": Heun,
}


def scorer(checkpoint: str, model: DiffusionModule, num_images: int) -> Callable[[Sampler], float]:
    """What gives a sampler's Fréchet distance."""
    config = read_checkpoint(checkpoint)["config"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageData, "data")
    parser.add_argument("--extractor", type=nn.Module)
    parts = {"data": config["data"], "extractor": config["frechet"]["extractor"]}
    made = parser.instantiate_classes(parser.parse_object(parts))
    extractor = as_extractor(made.extractor)
    extractor.prepare()

    def moments(batches: Any) -> Any:
        sums = None
        for batch in batches:
            features = extractor(batch)
            sums = sums or FeatureMoments(features.shape[1])
            sums.update(features)
        return sums.mean_and_covariance() if sums else None

    real = moments(made.data.reference_batches(0, 1, BATCH))

    def score(sampler: Sampler) -> float:
        batches = (
            to_uint8(model.sample(request["index"].tolist(), sampler=sampler)[:count]).cpu()
            for request, count in Requests(num_images, min(BATCH, num_images)).of_rank(0, 1)
        )
        return frechet_distance(*moments(batches), *real)

    return score


def main() -> None:
    """Prints the table as it grows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="of a diffusion model")
    parser.add_argument("--num_images", type=int, default=1000, help="generated for every figure")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 15, 20, 50, 100])
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=list(SAMPLERS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/evaluations.json"))
    given = parser.parse_args()
    model = restore(given.checkpoint, DiffusionModule).eval().to(given.device)
    score = scorer(given.checkpoint, model, given.num_images)
    print("| sampler | " + " | ".join(map(str, given.evaluations)) + " |\n|" + "---|" * (len(given.evaluations) + 1))
    found: dict[str, dict[int, float]] = {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for name in given.samplers:
        found[name] = {n: score(SAMPLERS[name](n)) for n in given.evaluations}
        print(f"| {name} | " + " | ".join(f"{value:.4g}" for value in found[name].values()) + " |", flush=True)
        about = {"checkpoint": Path(given.checkpoint).name, "num_images": given.num_images, "torch": torch.__version__}
        given.out.write_text(json.dumps({**about, "frechet": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
