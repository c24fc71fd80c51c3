"""What classifier-free guidance costs: sampling with and without it, in turn in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.guidance --config digits_cfg --batch_size 32 --steps 10

A control beside both samples without guidance at twice the batch. What the control costs beyond twice the unguided time
is due to the machine, mostly its memory; what guidance costs beyond the control is due to our code. Weights are random:
no time depends on them.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.alternate import alternate, compare, machine, spread
from benchmarks.setting import awake
from diffusion_lit.module import DiffusionModule
from diffusion_lit.tools.import_weights import make, read_recipes

RATIOS = {
    "guided / unguided": ("guided", "unguided"),
    "control: unguided at 2B / unguided": ("double", "unguided"),
    "guided / unguided at 2B": ("guided", "double"),
}


def guided_model(recipe: str, steps: int, device: torch.device) -> DiffusionModule:
    """A recipe's model with random weights and a sampler of the given number of steps.

    Raises:
        ValueError: If the recipe has no guidance.
    """
    model, _ = make(read_recipes([recipe])["model"])
    if not isinstance(model, DiffusionModule) or model.guidance is None:
        raise ValueError(f"{recipe} has no guidance; choose a recipe that has, such as digits_cfg")
    model.sampler.steps = steps
    return awake(model).to(device).eval()


def measure(model: DiffusionModule, batch_size: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of every kind of sampling, in every round."""
    guidance = model.guidance

    def sample(count: int, guided: bool) -> None:
        model.guidance = guidance if guided else None
        model.sample(range(count))

    kinds: dict[str, Callable[[], None]] = {
        "unguided": lambda: sample(batch_size, guided=False),
        "guided": lambda: sample(batch_size, guided=True),
        "double": lambda: sample(2 * batch_size, guided=False),
    }
    return alternate(kinds, rounds, model.device)


def main(args: Sequence[str] | None = None) -> None:
    """Prints machine and ratios, and writes both with all times as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="digits_cfg", help="a recipe with guidance")
    parser.add_argument("--batch_size", type=int, default=32, help="B, images made at once")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--rounds", type=int, default=15, help="a ratio is taken within each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="by default runs/benchmarks/guidance_<config>_<B>.json")
    given = parser.parse_args(args)
    device = torch.device(given.device)
    times = measure(guided_model(given.config, given.steps, device), given.batch_size, given.rounds)
    name = Path(given.config).stem
    found = {
        "machine": machine(device),
        "config": name,
        "batch_size": given.batch_size,
        "steps": given.steps,
        "rounds": given.rounds,
        "seconds": {kind: spread([t[kind] for t in times]) for kind in times[0]},
        "ratios": {ratio: compare(times, a, b) for ratio, (a, b) in RATIOS.items()},
        "times": times,
    }
    out = given.out or Path("runs/benchmarks") / f"guidance_{name}_{given.batch_size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items() if value is not None))
    print(f"{name}, B = {given.batch_size}, {given.steps} steps, {given.rounds} rounds")
    for ratio, s in found["ratios"].items():
        print(f"{ratio:36s} {s['median']:.2f}  ({s['min']:.2f} to {s['max']:.2f})")
    print(f"unguided: {found['seconds']['unguided']['median']:.3f} s; all times: {out}")


if __name__ == "__main__":
    main()
