"""What the frozen encoder costs in a training step of latent diffusion, and what stored moments save, in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.latents --config latent_demo --batch_size 32
    python -m benchmarks.latents --config ldm_church --batch_size 32 --device cuda --bf16

Steps from images, steps from moments and the encoder alone in turn. A step is forward, backward and optimiser; reading
and moving images are not in it. Images and weights are random: no time depends on them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.alternate import alternate, compare, machine, spread
from benchmarks.setting import awake
from diffusion_lit.codecs import FirstStage
from diffusion_lit.codecs.files import fingerprint_of
from diffusion_lit.module import DiffusionModule
from diffusion_lit.tools.import_weights import make, read_recipes

RATIOS = {
    "encoder alone / step from images": ("encoder", "images"),
    "step from moments / step from images": ("moments", "images"),
}


def latent_model(recipe: str, device: torch.device, bf16: bool = False) -> DiffusionModule:
    """A recipe's model with random weights, which trains in latents scaled by 1.

    Args:
        recipe: Its name.
        device: Where it is to run.
        bf16: Whether the encoder runs in bf16.

    Raises:
        ValueError: If the recipe has no first stage.
    """
    config = read_recipes([recipe])["model"]
    codec = config["init_args"].get("codec") or {}
    if not str(codec.get("class_path")).endswith("FirstStage"):
        raise ValueError(f"{recipe} has no first stage; choose a recipe of latent diffusion, such as latent_demo")
    codec["init_args"] |= {"scale": 1.0, "checkpoint": None, "precision": "bf16" if bf16 else "float32"}
    model, _ = make(config)
    if not isinstance(model, DiffusionModule) or not isinstance(model.codec, FirstStage):
        raise TypeError(
            f"{recipe} makes a {type(model).__name__} with a {type(getattr(model, 'codec', None)).__name__}"
        )
    network = awake(model.codec.network)
    model.codec.restore({"fingerprint": fingerprint_of(network), "weights": network.state_dict()})
    awake(model.denoiser)
    return model.to(device).train()


def measure(model: DiffusionModule, batch_size: int, rounds: int, bf16: bool = False) -> list[dict[str, float]]:
    """Seconds of both kinds of step and of the encoder, in every round."""
    codec: Any = model.codec
    images = torch.randn(batch_size, *model.image_shape, device=model.device).clamp(-1, 1)
    batch: dict[str, Tensor] = {"image": images}
    if model.num_classes is not None:
        batch["label"] = torch.arange(batch_size, device=model.device) % model.num_classes
    stored = {**batch, "moments": codec.moments(images).half()}
    optimizer = model.make_optimizer(model.parameters())
    precision: Any = torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext()

    def step(given: Any) -> Callable[[], None]:
        def work() -> None:
            with precision:
                loss = model.losses(given)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    def encode() -> None:
        codec.moments(images)

    kinds: dict[str, Callable[[], None]] = {"images": step(batch), "moments": step(stored), "encoder": encode}
    return alternate(kinds, rounds, model.device)


def main(args: Sequence[str] | None = None) -> None:
    """Prints machine and ratios, and writes both with all times as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="latent_demo", help="a recipe of latent diffusion")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step")
    parser.add_argument("--rounds", type=int, default=15, help="a ratio is taken within each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="network and encoder in bf16")
    parser.add_argument("--out", type=Path, help="by default runs/benchmarks/latents_<config>_<B>.json")
    given = parser.parse_args(args)
    device = torch.device(given.device)
    model = latent_model(given.config, device, given.bf16)
    times = measure(model, given.batch_size, given.rounds, given.bf16)
    name = Path(given.config).stem
    found = {
        "machine": machine(device),
        "config": name,
        "batch_size": given.batch_size,
        "bf16": given.bf16,
        "rounds": given.rounds,
        "seconds": {kind: spread([t[kind] for t in times]) for kind in times[0]},
        "ratios": {ratio: compare(times, a, b) for ratio, (a, b) in RATIOS.items()},
        "times": times,
    }
    out = given.out or Path("runs/benchmarks") / f"latents_{name}_{given.batch_size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None))
    print(f"{name}, B = {given.batch_size}, {given.rounds} rounds")
    for ratio, s in found["ratios"].items():
        print(f"{ratio:38s} {s['median']:.2f}  ({s['min']:.2f} to {s['max']:.2f})")
    print(f"step from images: {found['seconds']['images']['median']:.3f} s; all times: {out}")


if __name__ == "__main__":
    main()
