"""Bilevel algorithms: one file a method, all with the same protocol."""

from bilevel_lite.algorithms.aid import AID
from bilevel_lite.algorithms.amigo import AmIGO
from bilevel_lite.algorithms.bome import BOME
from bilevel_lite.algorithms.bsg import BSG1
from bilevel_lite.algorithms.bvfsm import BVFSM
from bilevel_lite.algorithms.f2sa import F2SA
from bilevel_lite.algorithms.itd import ITD
from bilevel_lite.algorithms.mrbo import MRBO
from bilevel_lite.algorithms.nbo import NBO
from bilevel_lite.algorithms.nhgd import NHGD
from bilevel_lite.algorithms.sama import SAMA
from bilevel_lite.algorithms.soba import SABA, SOBA
from bilevel_lite.algorithms.stocbio import StocBiO

METHODS = (
    AID, ITD, AmIGO, StocBiO, MRBO, SOBA, SABA, NBO, NHGD, SAMA, BSG1, BOME, BVFSM, F2SA,
)  # fmt: skip

__all__ = [*(method.__name__ for method in METHODS), "METHODS", "table"]


def table() -> list[tuple[str, str, str, str, str]]:
    """The map of the field: for each method what stands for H, how it is solved, what moves.

    Returns:
        Rows (method, what stands for H, how v is found, how lam and theta move, source), from the
        classes themselves.
    """
    rows = []
    for method in METHODS:
        source = method.__doc__.rpartition("Source: ")[2].strip().rstrip(".")
        rows.append((method.__name__, *method.choices, " ".join(source.split())))
    return rows
