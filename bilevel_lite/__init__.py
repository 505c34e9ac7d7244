"""Hypergradients for bilevel optimisation, in the notation of the textbook.

    min over lam of  Phi(lam) = f(lam, theta*(lam)),   theta*(lam) = argmin over theta of g

    b = grad_theta f,  H = hess_theta g,  v = H^-1 b,  dPhi/dlam = grad_lam f - (d2g/dlam dtheta) v

One module for each choice made in that line; see the table in the README.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from bilevel_lite import parallel, updates
from bilevel_lite.algorithms import (
    AID,
    BOME,
    BSG1,
    BVFSM,
    F2SA,
    ITD,
    MRBO,
    NBO,
    NHGD,
    SABA,
    SAMA,
    SOBA,
    AmIGO,
    StocBiO,
)
from bilevel_lite.auditing import audit
from bilevel_lite.checking import check, finite_difference_hypergradient
from bilevel_lite.ekfac import EKFAC
from bilevel_lite.hypergrad import hypergradient
from bilevel_lite.kfac import KFAC
from bilevel_lite.kfac_richardson import KFACRichardson
from bilevel_lite.linsolve import DivergenceWarning, NegativeCurvatureWarning
from bilevel_lite.params import flatten, unflatten
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import SumOfRisks, WeightedRisk
from bilevel_lite.session import progress, setup
from bilevel_lite.solvers import CG, CGNormal, Direct, Identity, Neumann
from bilevel_lite.unroll import unrolled_hypergradient

__version__ = "0.1.0"

# Imported on first use, so that `import bilevel_lite` costs little more than `import torch`.
_LAZY = (
    "data", "drawings", "exercises", "experiment", "meta", "models", "plotting", "tasks", "text",
    "workers",
)  # fmt: skip
if TYPE_CHECKING:  # to a type checker `__getattr__` would say that every name exists
    from bilevel_lite import (
        data,
        drawings,
        exercises,
        experiment,
        meta,
        models,
        plotting,
        tasks,
        text,
        workers,
    )
else:

    def __getattr__(name):
        if name in _LAZY:
            return import_module(f"bilevel_lite.{name}")
        raise AttributeError(f"module 'bilevel_lite' has no attribute {name!r}")


__all__ = [
    "AID",
    "AmIGO",
    "BOME",
    "BSG1",
    "BVFSM",
    "BilevelProblem",
    "CG",
    "CGNormal",
    "Direct",
    "DivergenceWarning",
    "EKFAC",
    "F2SA",
    "ITD",
    "Identity",
    "KFAC",
    "KFACRichardson",
    "MRBO",
    "NBO",
    "NHGD",
    "NegativeCurvatureWarning",
    "Neumann",
    "SABA",
    "SAMA",
    "SOBA",
    "StocBiO",
    "SumOfRisks",
    "WeightedRisk",
    "audit",
    "check",
    "data",
    "drawings",
    "exercises",
    "experiment",
    "finite_difference_hypergradient",
    "flatten",
    "hypergradient",
    "meta",
    "models",
    "parallel",
    "plotting",
    "progress",
    "setup",
    "tasks",
    "text",
    "unflatten",
    "unrolled_hypergradient",
    "updates",
    "workers",
]


def __dir__():
    return sorted(__all__)
