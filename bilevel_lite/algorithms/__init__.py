"""Bilevel algorithms: one file a method, all with the same protocol."""

from bilevel_lite.algorithms.aid import AID

__all__ = ["AID"]
