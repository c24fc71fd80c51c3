"""The benchmarks of docs/performance.md: ours and diffusers, in turn in one process.

    make bench
    make bench ARGS="--device cuda --precision bf16"

Prints the tables as Markdown and writes every time to a JSON file. Both run DDPM's CIFAR-10 network, 35.7 M parameters,
with random weights, on which no time depends. --cases chooses some.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import diffusers
import lightning
import torch

from benchmarks import compute, inputs, training
from benchmarks.alternate import machine
from benchmarks.setting import Result, Setting

CASES: dict[str, Callable[[Setting], Iterator[Result]]] = {
    "limits": compute.limits,
    "forward": compute.forward,
    "training": training.training,
    "overhead": training.overhead,
    "averages": compute.averages,
    "sampling": compute.sampling,
    "waits": compute.waits,
    "noise": compute.noise,
    "features": compute.features,
    "memory": training.memory,
    "inputs": inputs.inputs,
    "start": inputs.start,
}


HEADER = "| case | seconds: median (least to most) | ratios, pair by pair | rate |\n|---|---|---|---|"


def markdown(found: Result) -> str:
    """A line of the table."""

    def shown(value: Mapping[str, float], unit: str = "") -> str:
        spread = f" ({value['min']:.3g} to {value['max']:.3g})" if value["count"] > 1 else ""
        return f"{value['median']:.3g}{unit}{spread}"

    rates = [f"{found[key]:,.0f} {unit}" for key, unit in (("gflop_per_s", "GFLOP/s"), ("images_per_s", "images/s"))
             if key in found]  # fmt: skip
    if "of_limit" in found:
        rates.append(f"{found['of_limit']:.0%} of limit")
    if rates and found["rate_of"] not in ("ours", found["case"].partition(": ")[2]):
        rates[0] = f"{found['rate_of']}: {rates[0]}"
    if "waits" in found:
        rates.append(f"{found['waits']} waits {', '.join(found['places'])}")
    rates += [f"{name} {size / 2**30:.2f} GiB" for name, size in found.get("bytes", {}).items()]
    cells = (
        "; ".join(f"{name} {shown(value, ' s')}" for name, value in found["seconds"].items()),
        "; ".join(f"{name} {shown(value)}" for name, value in found["ratios"].items()),
        "; ".join(rates),
    )
    return f"| {found['case']} | {' | '.join(cells)} |"


def share_of_limit(found: Result, results: Sequence[Result]) -> None:
    """Adds to a result its share of the machine's limit, if that was measured before."""
    limits = {result["case"]: result["gflop_per_s"] for result in results if result["case"].startswith("limit: ")}
    limit = limits.get(f"limit: {found.get('limit')}")
    if limit is not None:
        found["of_limit"] = found["gflop_per_s"] / limit


def main(args: Sequence[str] | None = None) -> None:
    """Runs the cases, prints a table and writes all times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="32", choices=("32", "bf16"))
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; with one, its time is that of the process")
    parser.add_argument("--rounds", type=int, default=6, help="half as many for what takes long")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="by default 8 16, on a GPU 128 512")
    parser.add_argument("--sampling", type=int, nargs=2, help="images and steps; by default 8 10, on a GPU 512 50")
    parser.add_argument("--width", type=int, default=128, help="of the network; a narrow one shows whether all works")
    parser.add_argument(
        "--switches", action="store_true", help="ours in every way too; on a GPU that is so anyhow, elsewhere slow"
    )
    parser.add_argument("--out", type=Path, help="by default runs/benchmarks/<device>_<precision>.json")
    given = parser.parse_args(args)
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    on_gpu = device.type == "cuda"
    images, steps = given.sampling or ((512, 50) if on_gpu else (8, 10))
    batch_sizes = given.batch_sizes or ([128, 512] if on_gpu else [8, 16])
    setting = Setting(
        device,
        given.precision == "bf16",
        given.rounds,
        batch_sizes,
        (images, steps),
        given.width,
        given.switches or on_gpu,
    )
    versions = {"diffusers": diffusers.__version__, "lightning": lightning.__version__}
    about = {**machine(device), "precision": given.precision, "width": given.width, "gflop": setting.gflop, **versions}
    print(", ".join(f"{name} {value}" for name, value in about.items() if value is not None), HEADER, sep="\n\n")
    results: list[Result] = []
    out = given.out or Path("runs/benchmarks") / f"{device.type}_{given.precision}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in given.cases:
        if setting.switches:
            # Shapes compiled for one case must not count against torch's limit in the next.
            torch.compiler.reset()
        for found in CASES[name](setting):
            share_of_limit(found, results)
            results.append(found)
            print(markdown(found), flush=True)
            out.write_text(json.dumps({"machine": about, "cases": results}, indent=1) + "\n")
    print(f"\nall times: {out}")


if __name__ == "__main__":
    main()
