"""Scores of a generator, its likelihood, and tables of scores."""

from diffusion_lit.evaluation.evaluation import Evaluation
from diffusion_lit.evaluation.likelihood import Likelihood
from diffusion_lit.evaluation.table import Table
from diffusion_lit.evaluation.tables import AverageTable, DDIMTable, GuidanceTable, SamplerTable, StepTable

__all__ = [
    "AverageTable",
    "DDIMTable",
    "Evaluation",
    "GuidanceTable",
    "Likelihood",
    "SamplerTable",
    "StepTable",
    "Table",
]
