"""Scores of a model, its likelihood, and tables of scores."""

from diffusion_lit.evaluation.evaluation import Evaluation
from diffusion_lit.evaluation.frechet import Frechet
from diffusion_lit.evaluation.likelihood import Likelihood
from diffusion_lit.evaluation.tables import AverageTable, DDIMTable, SamplerTable, StepTable, Table

__all__ = [
    "AverageTable",
    "DDIMTable",
    "Evaluation",
    "Frechet",
    "Likelihood",
    "SamplerTable",
    "StepTable",
    "Table",
]
