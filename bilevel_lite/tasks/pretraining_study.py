"""The study of auxiliary pretraining: what weighs masked texts, by which solver; after Table 4.

Three rows learn nothing (`RIVALS`: the end task alone; both losses alike, TARTAN-MT; V as it was
drawn), and a control has both losses alike on texts of words drawn at random. One row learns a
weight for each of the two losses by cosines (META-TARTAN), the others V by a solver, with f on
held-out texts and, as the main paper has it, on the training texts. All have the same inner steps.
V moves by Adam, whose steps are as long for every solver: one box for all. The two weights of
META-TARTAN move by plain gradient descent at ten times its scripts' step, as a run has a tenth of
their steps.
"""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.experiment.supervised import PLAIN

__all__ = ["ALSO", "OUTER", "RIVALS", "SOLVERS", "TABLE_4", "variants"]

# weights that nothing is learned for
RIVALS = {"none": "end task alone", "fixed": "fixed weights", "frozen": "V as it was drawn"}
OUTER = {"held_out": "", "train": "-on-train"}  # what f sees, and how a row's name ends
SOLVERS: dict[str, dict] = {
    # the identity's step only scales what Adam scales
    "identity": {"method": "aid-identity", "step": 0.1},
    "sama": {"method": "sama", "alpha": 0.3},
    "kfac-empirical": {"method": "aid-kfac", "fisher": "empirical", "damping": 1e-2},
}
BOX = {"outer_lr": (1e-3, 1e-1)}
# the same for all rows; on a GPU, where all layers train, the main paper's length and the step that
# text cleaning has for them
ALSO = {"max_length": 64, "kept_in": "float16", "inner_lr": 1e-3}
ALSO_GPU = {"max_length": 256, "inner_lr": 5e-5}
# the main paper's Table 4: F1 in %, its spread over 3 runs; RoBERTa-base, all layers
TABLE_4 = {
    "chemprot": {"none": (82.54, 0.32), "fixed": (83.97, 0.25), "sama": (83.75, 0.24),
                 "kfac-empirical": (85.04, 0.23)},
    "hyperpartisan": {"none": (90.05, 1.24), "fixed": (94.64, 0.91), "sama": (95.18, 0.03),
                      "kfac-empirical": (95.13, 0.05)},
    "citation_intent": {"none": (67.85, 2.03), "fixed": (72.86, 3.01), "sama": (71.75, 1.65),
                        "kfac-empirical": (72.98, 1.58)},
    "sciie": {"none": (79.87, 0.58), "fixed": (80.49, 0.05), "sama": (81.06, 0.09),
              "kfac-empirical": (81.22, 0.14)},
}  # fmt: skip


def variants(dataset: str, model: str) -> list[Variant]:
    """The rivals, the two weights moved by cosines, and every solver with either f."""
    found = [Variant(kind, {**PLAIN, "weights": kind}) for kind in RIVALS]
    fixed = {**PLAIN, "weights": "fixed", "masked_texts": "scrambled"}
    found.append(Variant("fixed-scrambled", fixed))
    found.append(Variant("cosine", {"weights": "cosine", "method": "aid-identity"}))
    for outer, ending in OUTER.items():
        for name, settings in SOLVERS.items():
            found.append(Variant(name + ending, {**settings, "outer": outer}, BOX))
    return found
