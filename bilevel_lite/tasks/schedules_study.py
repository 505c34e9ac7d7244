"""The study of schedules: rates learned by forward mode, and what else the same gradients buy.

Nothing is searched for from outside: each way does its own search within the gradients of a run,
which are the same for all. Set by hand, after runs on seed 0, which is not among the study's: where
learned rates begin, a quarter into the box (from its middle, on images not yet standardised, the
first derivative pointed away from better rates), the first sign step, an eighth of it, and the
boxes of the greedy rules' own step. So that none gains by where the boxes lie, every search tries
the middle of its box first, through which the learned rates may pass.
"""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.tasks.schedules import Schedules
from bilevel_lite.tasks.schedules_ways import WAYS

__all__ = ["Schedules", "variants"]


def variants(dataset: str, model: str) -> list[Variant]:
    """One for each way."""
    return [Variant(way, {"way": way}) for way in WAYS]
