"""Consistency models: a network that maps x_t of any time to the start of its trajectory, in one evaluation.

    f(x_t, t) = f(x_s, s) for all points of one trajectory of the probability flow,    f(x, t_min) = x

Sources: Song, Dhariwal, Chen & Sutskever 2023 (consistency models); Song & Dhariwal 2024 (improved training, iCT);
Geng et al. 2025 (easy tuning, ECT).
"""

from diffusion_lit.methods.consistency.distance import LPIPS, Absolute, Distance, PseudoHuber, Squared
from diffusion_lit.methods.consistency.objective import (
    ConsistencyDistillation,
    ConsistencyTraining,
    InverseGap,
    InverseOutput,
    PairWeight,
    Unweighted,
)
from diffusion_lit.methods.consistency.pairs import (
    Curriculum,
    Doubling,
    Fixed,
    Neighbors,
    Pairs,
    Shrinking,
    SquareRoot,
)
from diffusion_lit.methods.consistency.sampling import Boundary, Levels, Multistep, Sigmas
from diffusion_lit.methods.consistency.search import TimeSearch

__all__ = [
    "LPIPS",
    "Absolute",
    "Boundary",
    "ConsistencyDistillation",
    "ConsistencyTraining",
    "Curriculum",
    "Distance",
    "Doubling",
    "Fixed",
    "InverseGap",
    "InverseOutput",
    "Levels",
    "Multistep",
    "Neighbors",
    "PairWeight",
    "Pairs",
    "PseudoHuber",
    "Shrinking",
    "Sigmas",
    "SquareRoot",
    "Squared",
    "TimeSearch",
    "Unweighted",
]
