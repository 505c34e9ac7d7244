"""An option, said once where it is declared: its default and what it may be.

A dataclass declares ``penalty: float = positive(1.0)``; `check` refuses what does not fit, naming
the option, what came and what was expected. Searches, tables and help read the same fields.
"""

import math
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from typing import Any


def option(expected: str, fits: Callable[[Any], bool], default: Any = MISSING) -> Any:
    """Declare a field of which `check` says "NAME: got VALUE, expected EXPECTED" unless it fits."""
    return field(default=default, metadata={"expected": expected, "fits": fits})


def positive(default: Any = MISSING, none: bool = False) -> Any:
    """A number above zero; also None if ``none``."""
    return option("a positive number", lambda v: v > 0 if v is not None else none, default)


def not_negative(default: Any = MISSING) -> Any:
    """A finite number that is zero or positive."""
    return option("a number that is zero or positive", lambda v: 0 <= v < math.inf, default)


def fraction(default: Any = MISSING) -> Any:
    """A number from 0 up to, not including, 1."""
    return option("a number from 0 up to, not including, 1", lambda v: 0 <= v < 1, default)


def whole(default: Any = MISSING, least: int = 1, none: bool = False) -> Any:
    """An integer of at least ``least``; also None if ``none``."""

    def fits(v):
        return none if v is None else isinstance(v, int) and v >= least

    return option(f"an integer of at least {least}", fits, default)


def one_of(*known: str) -> Any:
    """One of some words, by default the first."""
    return option(" or ".join(map(repr, known)), lambda v: v in known, known[0])


def check(declared: Any) -> None:
    """Refuse the first option that does not fit.

    Raises:
        ValueError: naming it.
    """
    for f in fields(declared):
        value = getattr(declared, f.name)
        if "fits" in f.metadata and not f.metadata["fits"](value):
            raise ValueError(f"{f.name}: got {value!r}, expected {f.metadata['expected']}")
