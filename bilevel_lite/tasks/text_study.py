"""The study of text cleaning: the solvers of the main paper's Table 7, each with the same search.

Every variant has the same inner steps (AdamW, the same step size for all, `text_cleaning.INNER_LR`)
and the same number of trials, over the step size on the weights and, where a method has one, over
one number of its own: what is added to the curvature, the step of the Neumann series, SAMA's alpha.
The paper searches the outer step size alone (0.01 to 100) and fixes the others.
"""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.tasks.text_cleaning import (
    BASELINES,
    PLAIN,
    TextCleaning,
)
from bilevel_lite.tasks.text_cleaning import (
    SIZES as ALL,
)

__all__ = ["SIZES", "TextCleaning", "variants"]

# training texts, and f's half of the validation texts
SIZES = {name: (train, valid - round(0.5 * valid)) for name, (train, valid) in ALL.items()}

OUTER = {"outer_lr": (0.01, 100.0)}

# name -> settings; all search OUTER. delta, T, K and alpha as in the paper.
DELTA, STEP = {"damping": 1e-3}, {"step": 0.1}
SOLVERS: dict[str, dict] = {
    "identity": {"method": "aid-identity", **STEP},
    "sama": {"method": "sama", "alpha": 0.1},
    # the papers count products: K of them make K + 1 terms
    "neumann-3": {"method": "aid-neumann", "iters": 4, "damping": 0.0, **STEP},
    "neumann-10": {"method": "aid-neumann", "iters": 11, "damping": 0.0, **STEP},
    "cg-3-ggn": {"method": "aid-cg", "iters": 3, "curvature": "ggn", **DELTA},
    "cg-normal-3": {"method": "aid-cg-normal", "iters": 3, **DELTA},
    "kfac-mc": {"method": "aid-kfac", "fisher": "mc", **DELTA},
    "kfac-empirical": {"method": "aid-kfac", "fisher": "empirical", **DELTA},
}


def variants(dataset: str, model: str) -> list[Variant]:
    """Plain training on three sets of labels, which has nothing to search, then the solvers."""
    plain = [Variant(name, {**PLAIN, "labels": labels}) for name, (labels, _) in BASELINES.items()]
    return plain + [Variant(name, settings, OUTER) for name, settings in SOLVERS.items()]
