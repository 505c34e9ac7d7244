"""An option is said once, where a class declares it: default, range, meaning, where to search.

    penalty: float = positive(default=1.0, help="c at the start", search=(0.1, 10.0))

in a dataclass serves the constructor, messages (`check`), docstrings (`document`), command lines
and searches (`options_of`).
"""

import inspect
import math
import re
import textwrap
from collections.abc import Callable, Container
from dataclasses import MISSING, dataclass, field, fields, replace
from fractions import Fraction
from numbers import Integral, Real
from types import UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """What is known of one option.

    Attributes:
        default: Its default, `dataclasses.MISSING` if it must be given.
        expected: What it may be, in the words of a message.
        fits: The same as a function.
        help: Its meaning, one line.
        search: Where to search: two numbers are the ends of a logarithmic scale, anything else is
            a list of choices; None if it is not searched for.
        known: The words that it may be, where it is one of some.
        none: True if it may be None.
        endless: True if it may be infinite.
        error: What is raised where it does not fit.
    """

    default: Any
    expected: str
    fits: Callable[[Any], bool]
    help: str = ""
    search: tuple | None = None
    known: tuple[str, ...] = ()
    none: bool = False
    endless: bool = False
    error: type[Exception] = ValueError

    def check(self, name: str, value: Any, none: bool = False) -> None:
        """Refuse a value that does not fit: "NAME: got VALUE, expected ..."."""
        try:
            fits = none if value is None else bool(self.fits(value))
            if _number(value) and math.isinf(value):
                fits = fits and self.endless
        except (TypeError, ValueError, RuntimeError):  # it cannot even be compared
            fits = False
        if not fits:
            raise self.error(f"{name}: got {value!r}, expected {self.expected}")


def option(expected: str, fits: Callable[[Any], bool], default: Any = MISSING, **more: Any) -> Any:
    """A field with an `Option`, of which ``more`` are further attributes.

    It may be None if that is its default. Default and ``search`` are checked as values will be.
    """
    one = Option(default, expected, fits, **{"none": default is None, **more})
    for value in (() if default is MISSING else (default,)) + (one.search or ()):
        one.check("option", value, one.none)
    return field(default=default, metadata={"option": one})


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | Fraction)  # torch takes none


def positive(default: Any = MISSING, expected: str = "a positive number", **more: Any) -> Any:
    """A number above zero."""
    return option(expected, lambda v: _number(v) and v > 0, default, **more)


def not_negative(default: Any = MISSING, **more: Any) -> Any:
    """A finite number that is zero or positive."""
    return option(
        "a finite number that is zero or positive",
        lambda v: _number(v) and v >= 0,
        default,
        **more,
    )


def fraction(default: Any = MISSING, **more: Any) -> Any:
    """A number from 0 up to, not including, 1."""
    return option(
        "a number from 0 up to, not including, 1",
        lambda v: _number(v) and 0 <= v < 1,
        default,
        **more,
    )


def whole(default: Any = MISSING, least: int = 1, **more: Any) -> Any:
    """An integer of at least ``least``."""
    expected = f"an integer of at least {least}" if least > -math.inf else "an integer"
    return option(
        expected, lambda v: _number(v) and isinstance(v, Integral) and v >= least, default, **more
    )


def flag(default: bool, **more: Any) -> Any:
    """True or False."""
    return option("True or False", lambda v: isinstance(v, bool), default, **more)


def one_of(*known: str, default: str | None = None, **more: Any) -> Any:
    """One of some words, by default the first."""
    *others, last = map(repr, known)
    expected = f"{', '.join(others)} or {last}"
    first = known[0] if default is None else default
    return option(expected, lambda v: v in known, first, known=known, **more)


def instance(kind: type, expected: str, default: Any = MISSING, **more: Any) -> Any:
    """An object of a kind; TypeError for others."""
    return option(expected, lambda v: isinstance(v, kind), default, error=TypeError, **more)


def again(declared: Any, name: str, **other: Any) -> Any:
    """A field with the option that another class has declared, but for ``other`` attributes."""
    return same(options_of(declared)[name], **other)


def same(one: Option, **other: Any) -> Any:
    """A field with this option, but for ``other`` attributes."""
    one = replace(one, **other)
    return field(default=one.default, metadata={"option": one})


if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:

    def dataclass_transform(**_: Any) -> Callable[[type], type]:
        """Tell type checkers that subclasses become dataclasses; Python 3.10 has none of it.

        They take a default for one where it is given by name.
        """
        return lambda cls: cls


def types_of(declared: Any) -> dict[str, Any]:
    """What kind each field of a dataclass is of, by name; ``float | None`` is a float."""
    try:
        hints = get_type_hints(declared)
    except NameError:  # a name that only a type checker imports; numbers and words need none
        hints = {f.name: _PLAIN.get(f"{f.type}".removesuffix(" | None")) for f in fields(declared)}
    out = {}
    for f in fields(declared):
        some = [kind for kind in get_args(hints[f.name]) if kind is not type(None)]
        one = get_origin(hints[f.name]) in (Union, UnionType) and len(some) == 1
        out[f.name] = some[0] if one else hints[f.name]
    return out


_PLAIN = {kind.__name__: kind for kind in (int, float, str, bool)}


def options_of(declared: Any) -> dict[str, Option]:
    """The options of a dataclass or of one of its objects, by name."""
    return {f.name: f.metadata["option"] for f in fields(declared) if "option" in f.metadata}


def check(declared: Any, *needed: str) -> None:
    """Refuse the first option that does not fit; those ``needed`` may not be None here.

    Raises:
        ValueError, TypeError: naming it, what came and what was expected.
    """
    for name, one in options_of(declared).items():
        one.check(name, getattr(declared, name), one.none and name not in needed)


def document(cls: type, known: Container[str] = (), rest: str = "") -> type:
    """Write a class's options, but those ``known``, first under "Args:", if they are not there.

    Where that line is missing it is put before what is raised, the cost and the source, with
    ``rest`` under it.
    """
    text = inspect.cleandoc(cls.__doc__ or "")
    if not text or text.startswith(f"{cls.__name__}("):  # dataclass writes its signature for none
        text = f"{cls.__name__}."
    if "\nArgs:\n" not in text:
        end = re.search(r"\n(Raises|Warns|Cost|Cost of a step|Source|Example):|\Z", text).start()
        rest = rest and f"    {rest}\n"
        text = f"{text[:end].rstrip()}\n\nArgs:\n{rest}{text[end:]}"
    head, args, tail = text.partition("\nArgs:\n")
    for name, one in options_of(cls).items():
        if name not in known and f"\n    {name}: " not in text:
            default = "" if one.default is MISSING else f", by default {one.default!r}"
            lines = textwrap.wrap(f"{name}: {one.help}; {one.expected}{default}.", 92)
            args += "    " + "\n        ".join(lines) + "\n"
    cls.__doc__ = head + args + tail
    return cls
