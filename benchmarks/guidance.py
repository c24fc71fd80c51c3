"""What classifier-free guidance costs: sampling with it against sampling without, in one process, by turns.

    OMP_NUM_THREADS=1 python -m benchmarks.guidance --config configs/digits_cfg.yaml --batch_size 32 --steps 10

Beside both stands a control, sampling without guidance at twice the batch: what it costs beyond twice as much is the
machine's, its memory's above all; what guidance costs beyond the control is ours. Weights are random: no time depends
on them. On a CPU the time is that of the process, with the system's on its behalf, so that other work on the machine
counts little; on a GPU it is the clock's, from an idle device to an idle device.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from benchmarks.alternate import machine
from diffusion_lit.module import DiffusionModule

RATIOS = {
    "guided / unguided": ("guided", "unguided"),
    "control: unguided at 2B / unguided": ("double", "unguided"),
    "guided / unguided at 2B": ("guided", "double"),
}


def model_of(config: Path, steps: int, device: torch.device) -> DiffusionModule:
    """A recipe's model with random weights, whose sampler takes so many steps."""
    recipe = yaml.safe_load(config.read_text())["model"]
    recipe["class_path"] = "diffusion_lit.module.DiffusionModule"
    recipe["init_args"]["sampler"]["init_args"]["steps"] = steps
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DiffusionModule, "model")
    with warnings.catch_warnings():
        # jsonargparse 4.49 deprecates the only name that 4.40 knows.
        warnings.simplefilter("ignore", DeprecationWarning)
        model: DiffusionModule = parser.instantiate_classes(parser.parse_object({"model": recipe})).model
    if model.guidance is None:
        raise ValueError(f"{config} has no guidance; choose a recipe that has, such as configs/digits_cfg.yaml")
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.to(device).eval()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes: of the process on a CPU, by the clock on a GPU."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(model: DiffusionModule, batch_size: int, rounds: int) -> list[dict[str, float]]:
    """Seconds of every kind of sampling, in every round one after the other, each time beginning with another one."""
    guidance = model.guidance

    def sample(count: int, guided: bool) -> None:
        model.guidance = guidance if guided else None
        model.sample(range(count))

    kinds: dict[str, Callable[[], None]] = {
        "unguided": lambda: sample(batch_size, guided=False),
        "guided": lambda: sample(batch_size, guided=True),
        "double": lambda: sample(2 * batch_size, guided=False),
    }
    names = list(kinds)
    for name in names:
        kinds[name]()
    times = []
    for i in range(rounds):
        order = names[i % len(names) :] + names[: i % len(names)]
        times.append({name: seconds(kinds[name], model.device) for name in order})
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and range."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "quartile_1": low, "quartile_3": high, "min": min(values), "max": max(values)}


def main(args: Sequence[str] | None = None) -> None:
    """Prints machine and ratios, and writes both with all times as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/digits_cfg.yaml"), help="a guided recipe")
    parser.add_argument("--batch_size", type=int, default=32, help="B, images made at once")
    parser.add_argument("--steps", type=int, default=10, help="of the sampler")
    parser.add_argument("--rounds", type=int, default=15, help="at least 2; a ratio is taken within each")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="by default runs/benchmarks/guidance_<config>_<B>.json")
    given = parser.parse_args(args)
    device = torch.device(given.device)
    times = measure(model_of(given.config, given.steps, device), given.batch_size, given.rounds)
    ratios = {name: spread([t[a] / t[b] for t in times]) for name, (a, b) in RATIOS.items()}
    found = {
        "machine": machine(device),
        "config": given.config.name,
        "batch_size": given.batch_size,
        "steps": given.steps,
        "rounds": given.rounds,
        "seconds": {name: spread([t[name] for t in times]) for name in times[0]},
        "ratios": ratios,
        "times": times,
    }
    out = given.out or Path("runs/benchmarks") / f"guidance_{given.config.stem}_{given.batch_size}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n")
    print(", ".join(f"{name} {value}" for name, value in machine(device).items() if value is not None))
    print(f"{given.config.name}, B = {given.batch_size}, {given.steps} steps, {given.rounds} rounds")
    for name, s in ratios.items():
        print(f"{name:36s} {s['median']:.2f}  (quartiles {s['quartile_1']:.2f} to {s['quartile_3']:.2f})")
    median = statistics.median(t["unguided"] for t in times)
    print(f"unguided: {median:.3f} s; all times: {out}")


if __name__ == "__main__":
    main()
