"""Trains, samples and scores diffusion models with PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_lit.checkpoint import load_model
    from diffusion_lit.generator import Generator
    from diffusion_lit.module import DiffusionModule
    from diffusion_lit.system import System

__all__ = ["DiffusionModule", "Generator", "System", "load_model"]

_HOMES = {"DiffusionModule": "module", "Generator": "generator", "System": "system", "load_model": "checkpoint"}


def __getattr__(name: str) -> Any:
    """Imports a name when it is first used, so that `diffusion_lit --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
