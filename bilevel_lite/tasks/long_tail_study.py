"""The study of long-tailed classes: what weighs an example, by which solver; after Table 3.

The rivals have nothing to search: they share the inner steps, step size and schedule. Of the
learned weights every solver moves lam by Adam and searches its step in one box for all, which Adam
makes fair: it moves each of lam's numbers by about its step, however long the hypergradient is.

The paper's step is 1e-5 (Meta-Weight-Net's own is 1e-5 too, by SGD); ``kfac-1e-5`` runs there,
without a search. ``kfac-normalised`` divides the weights by their mean in the batch, as
Meta-Weight-Net's code does; ``class`` learns a number for each class, which reads no loss. H and J
are taken on batches of 100, as the inner steps are.

The iterate and the steps are chosen by the accuracy on images of their own, cut from the test
images; beside the chosen look stands the last. Meta-Weight-Net's code takes the best look on the
test set: `selection` says what that alone is worth.
"""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.experiment.supervised import PLAIN

__all__ = ["OTHERS", "RIVALS", "SOLVERS", "TABLE_3", "selection", "variants"]

# weights that nothing is learned for
RIVALS = {
    "equal": "plain training", "focal": "focal loss", "balanced": "class-balanced weights",
    "frozen": "V as it was drawn", "meta": "plain, meta images too",
}  # fmt: skip
DELTA, STEP = {"damping": 1e-3}, {"step": 0.1}  # the identity's step only scales what Adam scales
SOLVERS: dict[str, dict] = {
    "identity": {"method": "aid-identity", **STEP},
    "sama": {"method": "sama", "alpha": 0.1},
    "kfac-empirical": {"method": "aid-kfac", "fisher": "empirical", **DELTA},
    "kfac-mc": {"method": "aid-kfac", "fisher": "mc", **DELTA},
}
KFAC = SOLVERS["kfac-empirical"]
# controls with the same box: what normalising, and what reading losses, is worth
OTHERS: dict[str, dict] = {
    "kfac-normalised": {**KFAC, "reading": "normalised"}, "class": {**KFAC, "weights": "class"},
}  # fmt: skip
BOX = {"outer_lr": (1e-3, 1e-1)}
# the main paper's Table 3, CIFAR-10: test accuracy in % by imbalance
IMBALANCES = (200, 100, 50, 20, 10)
TABLE_3 = {
    "equal": (65.3, 70.0, 74.2, 81.8, 86.1),
    "focal": (65.2, 69.9, 74.3, 81.5, 85.9),
    "identity": (66.3, 72.8, 78.6, 84.8, 87.5),
    "sama": (66.3, 72.9, 79.5, 85.4, 87.6),
    "kfac": (67.0, 73.1, 78.9, 85.6, 88.4),
}


def variants(dataset: str, model: str) -> list[Variant]:
    """The rivals, the solvers, the controls, and KFAC at the paper's step."""
    found = [Variant(kind, {**PLAIN, "weights": kind}) for kind in RIVALS]
    found += [Variant(name, settings, BOX) for name, settings in {**SOLVERS, **OTHERS}.items()]
    return [*found, Variant("kfac-1e-5", {**KFAC, "outer_lr": 1e-5})]


def selection(history: list[dict]) -> dict[str, float]:
    """Test accuracy of one run by three rules: the last look, the held-out set's, the test set's.

    Args:
        history: Looks with ``tuning_error`` and ``test_accuracy``.

    Returns:
        ``"last"``, ``"held out"`` and ``"on test"``, the last of which is never below the others.
    """
    chosen = min(history, key=lambda row: row["tuning_error"])
    best = max(row["test_accuracy"] for row in history)
    return {
        "last": history[-1]["test_accuracy"], "held out": chosen["test_accuracy"], "on test": best,
    }  # fmt: skip
