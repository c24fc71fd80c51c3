"""What tests share. Threads are set before torch is imported: a forked process hangs where its parent used OpenMP."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "disabled"
# LightningCLI 2.6 calls what jsonargparse 4.5x deprecates.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test does may be written into the working directory or the user's cache."""
    place = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setenv("DIFFUSION_LIT_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the working tree."""
    return Path(__file__).parent.parent
