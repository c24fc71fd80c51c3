"""What every benchmark shares: several ways to do one thing, timed in turn in one process."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], float | None]
"""Does something once. It may return the seconds that count; else it is timed as a whole."""


def now(device: torch.device) -> float:
    """Seconds: processor time of the process on a CPU with one thread, where other work does not count; else wall-clock
    time.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(work: Work, device: torch.device) -> float:
    """The time that it takes, in seconds."""
    start = now(device)
    own = work()
    return now(device) - start if own is None else own


def alternate(kinds: Mapping[str, Work], rounds: int, device: torch.device) -> list[dict[str, float]]:
    """Seconds of every kind in every round, after a round to warm up; each round begins with another kind."""
    names = list(kinds)
    for name in names:
        kinds[name]()
    times = []
    for i in range(rounds):
        first = i % len(names)
        times.append({name: seconds(kinds[name], device) for name in names[first:] + names[:first]})
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "count": len(values)}


def compare(times: Sequence[Mapping[str, float]], ours: str, peer: str) -> dict[str, float]:
    """The spread of ours / peer, pair by pair."""
    return spread([t[ours] / t[peer] for t in times])


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and its software."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
