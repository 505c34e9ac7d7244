"""Bilevel algorithms: one file a method, all with the same protocol.

`METHODS` holds them by name, in the order of the imports, and whatever class says more.
"""
# ruff: noqa: F401, I001

from bilevel_lite.algorithms.method import METHODS
from bilevel_lite.algorithms.aid import AID
from bilevel_lite.algorithms.itd import ITD
from bilevel_lite.algorithms.amigo import AmIGO
from bilevel_lite.algorithms.stocbio import StocBiO
from bilevel_lite.algorithms.mrbo import MRBO
from bilevel_lite.algorithms.soba import SOBA
from bilevel_lite.algorithms.saba import SABA
from bilevel_lite.algorithms.nbo import NBO
from bilevel_lite.algorithms.nhgd import NHGD
from bilevel_lite.algorithms.sama import SAMA
from bilevel_lite.algorithms.bsg import BSG1
from bilevel_lite.algorithms.bome import BOME
from bilevel_lite.algorithms.bvfsm import BVFSM
from bilevel_lite.algorithms.f2sa import F2SA

__all__ = [*METHODS, "METHODS", "table"]


def table() -> list[tuple[str, str, str, str, str]]:
    """The map of the field: for each method what stands for H, how it is solved, what moves.

    Returns:
        Rows (method, what stands for H, how v is found, how lam and theta move, source), from the
        classes themselves.
    """
    rows = []
    for name, method in METHODS.items():
        source = (method.__doc__ or "").partition("Source: ")[2].partition("Example:")[0]
        rows.append((name, *method.choices, " ".join(source.split()).rstrip(".")))
    return rows
