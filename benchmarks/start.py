"""How long a start takes, in processor time: help, and training up to its first step, with what that is made of.

    python -m benchmarks.start --rounds 5

Every start is a process of its own. The first step is that of `fit -c digits` without the score before it. A later
row contains the earlier ones; the last one includes W&B, without a network.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from statistics import median

FIT = ["fit", "-c", "digits", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
FAST = ["--evaluation.at_start", "false", "--trainer.default_root_dir", "run"]
IMPORTS = "import os\nimport lightning.pytorch as L\nfrom diffusion_lit.cli import CLI\n"
END = "os._exit(0)"
"""Without what Python does at its own end, which is no part of a start."""
PARTS = "made = CLI.parts({args})\n"
STEP = """
class Ends(L.Callback):
    def on_train_batch_end(self, *args):
        os._exit(0)

made.trainer.callbacks.append(Ends())
made.trainer.fit(made.model, made.datamodule)
"""
QUIET = PARTS.format(args=[*FIT, *FAST, "--trainer.logger", "Curves"])
STARTS = {
    "`diffusion-lit --help`": ["-m", "diffusion_lit", "--help"],
    "`diffusion-lit fit --help`": ["-m", "diffusion_lit", "fit", "--help"],
    "imports": ["-c", IMPORTS + END],
    "configuration and parts": ["-c", IMPORTS + QUIET + END],
    "first step, without W&B": ["-c", IMPORTS + QUIET + STEP],
    "first step, with W&B": ["-c", IMPORTS + PARTS.format(args=[*FIT, *FAST]) + STEP],
}
"""The words after `python`."""


def seconds(words: Sequence[str]) -> float:
    """Processor time of a Python process and of what it starts and waits for.

    Raises:
        RuntimeError: If it fails; with its output.
    """
    with tempfile.TemporaryDirectory() as place:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", "PYTHONPATH": path}
        before = os.times()
        done = subprocess.run([sys.executable, *words], cwd=place, env=environment, capture_output=True, text=True)
        after = os.times()
    if done.returncode:
        raise RuntimeError(f"{words} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return after.children_user - before.children_user + after.children_system - before.children_system


def main(args: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is started, in turn")
    rounds = parser.parse_args(args).rounds
    times: dict[str, list[float]] = {name: [] for name in STARTS}
    for _ in range(rounds):
        for name, words in STARTS.items():
            times[name].append(seconds(words))
    print("| start | seconds of processor time: median (least to most) |\n|---|---|")
    for name, values in times.items():
        print(f"| {name} | {median(values):.3g} ({min(values):.3g} to {max(values):.3g}) |", flush=True)


if __name__ == "__main__":
    main()
