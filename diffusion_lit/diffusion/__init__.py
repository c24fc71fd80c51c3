"""The mathematics of diffusion: processes, parameterizations, objectives, samplers, guidance, likelihood."""

from diffusion_lit.diffusion.cosine import CosineProcess
from diffusion_lit.diffusion.denoiser import Denoiser
from diffusion_lit.diffusion.gradient import ClassifierGuidance, GradientGuidance, LogLikelihood, NoisyClassification
from diffusion_lit.diffusion.grid import Grid, Karras, Leading, LogSNR, Quadratic, Spanning, Trailing, Uniform
from diffusion_lit.diffusion.guidance import ClassifierFree, Guidance
from diffusion_lit.diffusion.hybrid import Hybrid, VariationalBound
from diffusion_lit.diffusion.noise import Gaussian, ImageNoise, NoiseSource
from diffusion_lit.diffusion.objective import DenoisingLoss, Objective, Seen
from diffusion_lit.diffusion.parameterization import X0, Eps, Parameterization, PosteriorMean, Preconditioned, V
from diffusion_lit.diffusion.process import DiscreteProcess, Process, VarianceExploding, VariancePreserving
from diffusion_lit.diffusion.resampling import LossSecondMoment
from diffusion_lit.diffusion.samplers import DDIM, PLMS, Ancestral, DPMSolver, Heun, Sampler, slerp
from diffusion_lit.diffusion.schedule import Cosine, IntegratedLinear, Linear, ScaledLinear, Schedule, Sigmoid, Sqrt
from diffusion_lit.diffusion.simplex import NormalizedSimplex, Simplex
from diffusion_lit.diffusion.times import EvenTimes, LogNormal, Times, UniformTimes
from diffusion_lit.diffusion.variance import FixedLarge, FixedSmall, FixedVariance, LearnedRange, ReverseVariance
from diffusion_lit.diffusion.weighting import (
    EDM,
    MinSNR,
    Simple,
    TruncatedSNR,
    Variational,
    Velocity,
    Weighting,
)

__all__ = [
    "DDIM",
    "EDM",
    "PLMS",
    "X0",
    "Ancestral",
    "ClassifierFree",
    "ClassifierGuidance",
    "Cosine",
    "CosineProcess",
    "DPMSolver",
    "Denoiser",
    "DenoisingLoss",
    "DiscreteProcess",
    "Eps",
    "EvenTimes",
    "FixedLarge",
    "FixedSmall",
    "FixedVariance",
    "Gaussian",
    "GradientGuidance",
    "Grid",
    "Guidance",
    "Heun",
    "Hybrid",
    "ImageNoise",
    "IntegratedLinear",
    "Karras",
    "Leading",
    "LearnedRange",
    "Linear",
    "LogLikelihood",
    "LogNormal",
    "LogSNR",
    "LossSecondMoment",
    "MinSNR",
    "NoiseSource",
    "NoisyClassification",
    "NormalizedSimplex",
    "Objective",
    "Parameterization",
    "PosteriorMean",
    "Preconditioned",
    "Process",
    "Quadratic",
    "ReverseVariance",
    "Sampler",
    "ScaledLinear",
    "Schedule",
    "Seen",
    "Sigmoid",
    "Simple",
    "Simplex",
    "Spanning",
    "Sqrt",
    "Times",
    "Trailing",
    "TruncatedSNR",
    "Uniform",
    "UniformTimes",
    "V",
    "VarianceExploding",
    "VariancePreserving",
    "Variational",
    "VariationalBound",
    "Velocity",
    "Weighting",
    "slerp",
]
