"""The study of text cleaning: the solvers of the main paper's Table 7, each with the same search.

Every variant has the same inner steps (AdamW, one step size for all, `text_cleaning.INNER_LR`), the
same trials, and searches one number, the step size on the weights, as the paper does. The rest is
as there: delta = 1e-3, T = 3 iterations of CG, K = 3 or 10 products of Neumann, SAMA's alpha = 0.1.

The paper's grid, 0.01 to 100, is the same for all methods, whose v differ by a factor of a thousand
in length. Here each box is two decades wide around the step that moves a weight by about 0.3 at
its first visit (with momentum, on TREC at the start: the median entry of the hypergradient was 6
for KFAC, 0.09 for CG, 0.03 to 0.04 for identity, Neumann and CG on the normal equations, 0.003 for
SAMA). `study text --widen 1` goes beyond a box whose edge wins.

Textbook CG is run on the GGN, which is positive: on the Hessian of such a network it stops at the
first direction of negative curvature. CG on the normal equations and Neumann are run on the
Hessian, as the authors' code and the paper have them.
"""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.tasks.text_cleaning import BASELINES, PLAIN, TextCleaning
from bilevel_lite.tasks.text_cleaning import SIZES as SETS

__all__ = ["SIZES", "SOLVERS", "TextCleaning", "variants"]

# training texts, and f's half of the validation texts
SIZES = {name: (train, valid - round(0.5 * valid)) for name, (train, valid) in SETS.items()}

DELTA, STEP = {"damping": 1e-3}, {"step": 0.1}
# name -> settings, and the middle of its box
SOLVERS: dict[str, tuple[dict, float]] = {
    "identity": ({"method": "aid-identity", **STEP}, 1.0),
    "sama": ({"method": "sama", "alpha": 0.1}, 10.0),
    # the papers count products: K of them make K + 1 terms
    "neumann-3": ({"method": "aid-neumann", "iters": 4, "damping": 0.0, **STEP}, 1.0),
    "neumann-10": ({"method": "aid-neumann", "iters": 11, "damping": 0.0, **STEP}, 1.0),
    "cg-3-ggn": ({"method": "aid-cg", "iters": 3, "curvature": "ggn", **DELTA}, 0.3),
    "cg-normal-3": ({"method": "aid-cg-normal", "iters": 3, **DELTA}, 1.0),
    "kfac-mc": ({"method": "aid-kfac", "fisher": "mc", **DELTA}, 0.01),
    "kfac-empirical": ({"method": "aid-kfac", "fisher": "empirical", **DELTA}, 0.01),
}


def variants(dataset: str, model: str) -> list[Variant]:
    """Plain training on three sets of labels, which has nothing to search, then the solvers."""
    plain = [Variant(name, {**PLAIN, "labels": labels}) for name, (labels, _) in BASELINES.items()]
    found = [
        Variant(name, settings, {"outer_lr": (0.1 * middle, 10 * middle)})
        for name, (settings, middle) in SOLVERS.items()
    ]
    return plain + found
