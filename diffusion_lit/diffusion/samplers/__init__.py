"""Samplers: the reverse process, step by step."""

from diffusion_lit.diffusion.samplers.ancestral import Ancestral
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler, State, clip_x0
from diffusion_lit.diffusion.samplers.ddim import DDIM, slerp

__all__ = ["DDIM", "Ancestral", "NoiseFn", "Sampler", "State", "clip_x0", "slerp"]
