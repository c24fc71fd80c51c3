"""The mathematics of diffusion: processes, parameterizations, objectives, samplers, guidance, likelihood."""

from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.grid import Grid, Karras, LogSNR, Quadratic, Spanning, Trailing, Uniform
from diffusion_lit.diffusion.guidance import ClassifierFree, ClassifierGuidance, Guidance
from diffusion_lit.diffusion.hybrid import Hybrid, VariationalBound
from diffusion_lit.diffusion.noise import ImageNoise
from diffusion_lit.diffusion.objective import DenoisingLoss, Objective
from diffusion_lit.diffusion.parameterization import X0, Eps, Parameterization, PosteriorMean, V
from diffusion_lit.diffusion.process import DiscreteProcess, Process
from diffusion_lit.diffusion.resampling import LossSecondMoment
from diffusion_lit.diffusion.samplers import DDIM, Ancestral, DPMSolver, Heun, Sampler, slerp
from diffusion_lit.diffusion.schedule import Cosine, Linear, ScaledLinear, Schedule, Sigmoid, Sqrt
from diffusion_lit.diffusion.variance import FixedLarge, FixedSmall, FixedVariance, LearnedRange, ReverseVariance
from diffusion_lit.diffusion.weighting import MinSNR, Simple, Variational, Velocity, Weighting

__all__ = [
    "DDIM",
    "X0",
    "Ancestral",
    "ClassifierFree",
    "ClassifierGuidance",
    "Cosine",
    "DPMSolver",
    "Denoiser",
    "DenoisingLoss",
    "DiscreteProcess",
    "Eps",
    "FixedLarge",
    "FixedSmall",
    "FixedVariance",
    "Grid",
    "Guidance",
    "Heun",
    "Hybrid",
    "ImageNoise",
    "Karras",
    "LearnedRange",
    "Linear",
    "LogSNR",
    "LossSecondMoment",
    "MinSNR",
    "Objective",
    "Parameterization",
    "PosteriorMean",
    "Process",
    "Quadratic",
    "ReverseVariance",
    "Sampler",
    "ScaledLinear",
    "Schedule",
    "Sigmoid",
    "Simple",
    "Spanning",
    "Sqrt",
    "Trailing",
    "Uniform",
    "V",
    "Variational",
    "VariationalBound",
    "Velocity",
    "Weighting",
    "slerp",
]
