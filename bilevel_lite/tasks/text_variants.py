"""Plain training and the solvers of text cleaning, their step sizes, and what can be had here."""

from collections.abc import Callable
from typing import Any

from bilevel_lite import data, text
from bilevel_lite.data import DataError
from bilevel_lite.text.encoders import local

__all__ = ["BASELINES", "CROSS", "INNER_LR", "OUTER_LR", "SOLVERS", "TOY", "at_hand"]

TOY = "toy"
# a pretrained encoder of which a CPU trains a layer in a minute; 22.7 M parameters
SMALL = "sentence-transformers/all-MiniLM-L6-v2"
# plain training: its labels, its weights, and how it is called
BASELINES = {
    "noisy": ("weak", "one", "noisy training"),
    "balanced": ("weak", "balanced", "noisy training, classes as f's"),
    "validation": ("validation", "one", "validation texts only"),
    "clean": ("true", "one", "true training labels"),
}
EXACT = "bilevel_lite.tasks.exact_ggn:aid-ggn-exact"
# step sizes of AdamW: one layer as in the first trials, the others by hand; never searched
INNER_LR = {"1": 3e-4, "half": 1e-4, "all": 5e-5}
CROSS = 128  # texts of J: forward passes alone, and they say how often a weight is visited
# steps on the weights, from the searches of `text_study`: the winner on TREC, rounded, which on the
# other sets is within one tuning text of the best trial (SemEval) or equal to it (YouTube)
OUTER_LR = {
    "aid-kfac": 0.5, "aid-cg": 10.0, "aid-cg-normal": 50.0, "aid-neumann": 400.0,
    "aid-identity": 400.0, "sama": 400.0, EXACT: 0.15,
}  # fmt: skip
DELTA, STEP = {"damping": 1e-3}, {"step": 0.1}
SOLVERS: dict[str, dict] = {
    "identity": {"method": "aid-identity", **STEP},
    "sama": {"method": "sama", "alpha": 0.1},
    # the papers count products: K of them make K + 1 terms
    "neumann-3": {"method": "aid-neumann", "iters": 4, "damping": 0.0, **STEP},
    "neumann-10": {"method": "aid-neumann", "iters": 11, "damping": 0.0, **STEP},
    "cg-3-ggn": {"method": "aid-cg", "iters": 3, "curvature": "ggn", **DELTA},
    # what CG on the GGN would end with: does a better solve make a better method?
    "ggn-exact": {"method": EXACT, **DELTA},
    "cg-normal-3": {"method": "aid-cg-normal", "iters": 3, **DELTA},
    "kfac-mc": {"method": "aid-kfac", "fisher": "mc", **DELTA},
    "kfac-empirical": {"method": "aid-kfac", "fisher": "empirical", **DELTA},
}


def at_hand(dataset: str = "trec", load: Callable[[str], Any] | None = None) -> tuple[str, str]:
    """What a run of a minute on a CPU can use here, as ``(dataset, encoder)`` of the settings.

    A set (TREC) and a pretrained encoder, a folder on this machine (`bilevel_lite.text.encoder`) or
    the hub's all-MiniLM-L6-v2; if either cannot be had, the toy texts and the tiny encoder.

    Args:
        dataset: Name of the set.
        load: By which it is loaded; by default `bilevel_lite.data.load`.

    Raises:
        ImportError: without transformers.
    """
    place = str(next(iter(local()), SMALL))
    try:
        (load or data.load)(dataset)
        text.encoder(place)
    except (DataError, text.EncoderError):
        return TOY, "tiny"
    return dataset, place
