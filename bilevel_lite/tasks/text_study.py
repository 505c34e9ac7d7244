"""The study of text cleaning: the solvers of the main paper's Table 7, each with the same search.

Every variant has the same inner steps (AdamW, one step size for all, `text_cleaning.INNER_LR`), the
same trials, and searches one number, the step size on the weights, as the paper does. The rest is
as there: delta = 1e-3, T = 3 iterations of CG, K = 3 or 10 products of Neumann, SAMA's alpha = 0.1.

J v is taken on `CROSS` texts, whatever the other batches are: it needs forward passes alone, and
says how often a weight is visited. The paper's 1,000 iterations of 128 come by each text of TREC 25
times; 150 of 32 would come by once, 150 of 128 do 3.8 times.

The paper's grid, 0.01 to 100, is the same for all methods, whose v differ by a factor of a thousand
in length. Here each box is two decades wide, around `MIDDLE`: ten times the step that moves a
weight by some tenths at its first visit, from the median entry of the hypergradient on TREC (in
boxes a decade lower every winner stood at the upper edge); `--widen 1` goes beyond a box whose edge
wins.

Textbook CG is run on the GGN, which is positive: on the Hessian of such a network it stops at the
first direction of negative curvature. CG on the normal equations and Neumann are run on the
Hessian, as the authors' code and the paper have them.
"""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.experiment.supervised import PLAIN
from bilevel_lite.tasks.text_cleaning import SIZES as SETS
from bilevel_lite.tasks.text_cleaning import TextCleaning
from bilevel_lite.tasks.text_variants import BASELINES, CROSS, EXACT, SOLVERS

__all__ = ["CROSS", "SIZES", "SOLVERS", "TextCleaning", "variants"]

# training texts, and f's half of the validation texts
SIZES = {name: (train, valid - round(0.5 * valid)) for name, (train, valid) in SETS.items()}

MIDDLE = {
    "aid-kfac": 0.4, "aid-cg": 12.0, "aid-cg-normal": 40.0, "aid-neumann": 40.0,
    "aid-identity": 40.0, "sama": 400.0, EXACT: 0.12,
}  # fmt: skip


def variants(dataset: str, model: str) -> list[Variant]:
    """Plain training, which has nothing to search, then the solvers."""
    plain = [
        Variant(name, {**PLAIN, "labels": labels, "weights": weights})
        for name, (labels, weights, _) in BASELINES.items()
    ]
    found = []
    for name, settings in SOLVERS.items():
        middle = MIDDLE[settings["method"]]
        found.append(Variant(name, settings, {"outer_lr": (middle / 10, middle * 10)}))
    return plain + found
