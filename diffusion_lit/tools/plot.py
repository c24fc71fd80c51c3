"""Curves of runs as pictures.

    python -m diffusion_lit plot runs/cifar10

Draws <run>/loss.png and <run>/scores.png from <run>/metrics.jsonl, also while the run goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffusion_lit.callbacks.plots import plot_run


def main(args: Sequence[str]) -> None:
    """Draws the curves of each run and prints the files.

    Raises:
        ValueError: If a run has no curves.
        OSError: If a picture cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="diffusion_lit plot", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the directory of a run")
    for run in parser.parse_args(args).runs:
        directory = Path(run).expanduser()
        written = plot_run(directory)
        if not written:
            raise ValueError(f"{directory} has no metrics.jsonl with losses or scores; give the directory of a run")
        print(*written, sep="\n")
