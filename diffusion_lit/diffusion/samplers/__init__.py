"""Samplers: the reverse process, step by step."""

from diffusion_lit.diffusion.samplers.ancestral import Ancestral
from diffusion_lit.diffusion.samplers.base import NoiseFn, Sampler, State, Step, clip_x0
from diffusion_lit.diffusion.samplers.ddim import DDIM, slerp
from diffusion_lit.diffusion.samplers.dpm_solver import DPMSolver
from diffusion_lit.diffusion.samplers.heun import Heun
from diffusion_lit.diffusion.samplers.plms import PLMS

__all__ = ["DDIM", "PLMS", "Ancestral", "DPMSolver", "Heun", "NoiseFn", "Sampler", "State", "Step", "clip_x0", "slerp"]
