"""The checks that students call: ``bl.exercises.check("1.2", my_function)``.

A check prints one line and returns whether the answer is right. A stub (a function that raises
NotImplementedError, returns ... or has an empty body; ``...`` itself) is "not attempted yet". A
check compares with an independent truth on data that the student has not seen, and its message
says what was wrong in words. `fresh` makes the checks draw other data, for who grades.

Tensors, NumPy arrays, lists and tuples are alike. A result in single precision is told so and not
accepted: 1e-6 is the distance of some mistakes, too.
"""

import dis
import functools
import hashlib
import inspect
import re
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

__all__ = [
    "Wrong", "check", "close", "compare", "draw", "exercise", "fresh", "judge", "known",
    "name_mistake", "near", "numbers", "several",
]  # fmt: skip

_CHECKS = {}


class Wrong(Exception):
    """Raised by a check; the message is for the student."""


class NotAttempted(Exception):
    """Raised when the answer is still the stub."""


def exercise(number: str):
    """Register a check under its number, "chapter.k".

    The decorated function takes the answer, returns nothing if it is right and raises `Wrong`
    with a sentence if it is not. A callable answer arrives wrapped, so that a stub is noticed.
    """

    def register(function):
        _CHECKS[number] = function
        return function

    return register


def known(chapter: str) -> list[str]:
    """The numbers of a chapter's exercises and stops, in the order of its checks.

    Args:
        chapter: Its number, ``"1"``, ``"01"`` or ``"9b"``; an unknown one has none.
    """
    if match := re.fullmatch(r"(\d+)([a-z]?)", str(chapter)):
        chapter = f"{int(match[1])}{match[2]}"
        try:
            import_module(f"bilevel_lite.exercises.ch{int(match[1]):02d}{match[2]}")
        except ModuleNotFoundError:
            pass
    return [number for number in _CHECKS if number.split(".")[0] == chapter]


def edition(chapter: str) -> str:
    """A short name of a chapter's checks as they are: two editions with one name ask the same.

    Args:
        chapter: As in its title, for example ``"9b"``.
    """
    known(chapter)
    match = re.fullmatch(r"(\d+)([a-z]?)", chapter)
    module = sys.modules.get(f"{__name__}.ch{int(match[1]):02d}{match[2]}")
    if module is None:
        return ""
    packed = getattr(module, "EDITION", "")  # in the edition for students
    return packed or hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:8]


def check(number: str, answer) -> bool:
    """Check an answer and print one line about it.

    Args:
        number: The exercise, for example ``"1.2"``, or the stop inside a chapter, ``"1.A"``.
        answer: Whatever the exercise asks for: a function, a number, a tensor, a string.

    Returns:
        True if the answer is right; False if it is wrong or not attempted yet.

    Raises:
        TypeError: if ``number`` is no string (1.10 and 1.1 are one number, but two exercises).
        ValueError: for an unknown exercise number.

    Example:
        >>> bl.exercises.check("1.1", ...)
        Exercise 1.1: not attempted yet.
        False
    """
    verdict, sentence = judge(number, answer)
    name = f"{'Stop' if number[-1].isalpha() else 'Exercise'} {number}"
    print(f"{name}: {verdict}." + f" {sentence}" * bool(sentence))
    return verdict == "correct"


def judge(number: str, answer) -> tuple[str, str]:
    """What `check` prints, without printing it: ("correct", ""), ("not yet", why), ...

    Args:
        number: As in `check`.
        answer: As in `check`.

    Returns:
        The verdict, "correct", "not yet" or "not attempted yet", and a sentence for the student.

    Raises:
        TypeError: as `check`.
        ValueError: as `check`.
    """
    if not isinstance(number, str):
        raise TypeError(f"number: got {number!r}, expected a string such as '1.2'")
    known(number.split(".")[0])
    if number not in _CHECKS:
        raise ValueError(f"number: there is no exercise {number!r}; known: {sorted(_CHECKS)}")
    given = _Answer(answer)
    with _drawing(number):
        try:
            _CHECKS[number](given if callable(answer) else given.value())
        except NotAttempted:
            return "not attempted yet", ""
        except Exception as error:
            return "not yet", _why(error, answer, given)
    return "correct", ""


def _why(error: Exception, answer, given) -> str:
    """One true sentence about what went wrong: in the answer, in its kind, or in between."""
    if callable(answer) and not given.called:
        return (
            "Values are asked for here, and this is a function: hand over what it returns, say "
            "answer() instead of answer."
        )
    if not callable(answer):
        for cause in (error, error.__context__):
            if isinstance(cause, TypeError) and "not callable" in str(cause):
                kind = type(answer).__name__
                return f"Hand over the function itself, not its value: this is of type {kind}."
    if isinstance(error, Wrong):
        if given.single and "float64" not in str(error):
            return (
                f"{error} (But first: this is in single precision, float32, and the check may "
                "blame its rounding. Use float64.)"
            )
        return str(error)
    said = f"{type(error).__name__}: {error}"
    if not callable(answer):
        return f"The check cannot read this answer, of type {type(answer).__name__} ({said})"
    if error is given.failed and given.unfit:
        return f"{given.unfit} Is the chapter of another edition, or its first line changed?"
    if error is given.failed:
        return f"Your code raised {said}"
    kind = "nothing" if given.kind is None else f"of type {given.kind.__name__}"
    return f"The check cannot use what your function returned, {kind} ({said})"


class _Answer:
    """An answer as a check sees it: stubs are noticed, results are brought into one form.

    NumPy arrays become tensors, and single precision becomes double, which is remembered.
    """

    def __init__(self, answer):
        self.answer, self.called, self.single = answer, False, False
        self.failed, self.kind = None, None  # what was raised; of what type the result was
        self.unfit = ""  # said where the function takes other arguments than it is given

    def value(self):
        """The answer itself, where it is no function."""
        if self.answer is None or self.answer is ...:
            raise NotAttempted
        if isinstance(self.answer, tuple | list) and self.answer:
            empty = [k + 1 for k, x in enumerate(self.answer) if x is None or x is ...]
            if len(empty) == len(self.answer):
                raise NotAttempted
            if empty:
                raise Wrong(f"Entry {empty[0]} of {len(self.answer)} is still empty.")
        return self.plain(self.answer)

    def __call__(self, *args, **kwargs):
        self.called = True
        try:
            result = self.answer(*args, **kwargs)
        except NotImplementedError as error:
            if "not implemented for" in str(error):  # torch's own, of an operation and a dtype
                self.failed = error
                raise
            raise NotAttempted from None
        except Exception as error:
            self.failed = error
            try:
                inspect.signature(self.answer).bind(*args, **kwargs)
            except TypeError:
                given = f"{len(args)} arguments are handed over here"
                self.unfit = f"{given}; your function does not take them."
            except ValueError:  # no signature is known
                pass
            raise
        if result is ... or (result is None and _empty(self.answer)):
            raise NotAttempted
        if result is None:
            raise Wrong("Your function returned None: is a `return` missing?")
        self.kind = type(result)
        return self.plain(result)

    def plain(self, value):
        """Arrays as tensors, single precision as double, within lists, tuples and dicts too."""
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "bif":
            self.single |= value.dtype.kind == "f" and value.dtype.itemsize < 8
            scalar = isinstance(value, np.generic)
            return value.item() if scalar else self.plain(torch.as_tensor(value.copy()))
        if isinstance(value, torch.Tensor):
            half = value.is_floating_point() and value.dtype != torch.float64
            self.single |= half
            return value.double() if half else value
        if type(value) in (list, tuple):
            return type(value)(self.plain(part) for part in value)
        if type(value) is dict:
            return {name: self.plain(part) for name, part in value.items()}
        return value


# what the body of an empty function compiles to, in Python 3.10 to 3.14
_NOTHING = {"RESUME", "NOP", "COPY_FREE_VARS", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}


def _empty(function) -> bool:
    """Whether a function's body is a docstring, ``pass`` or ``...``; a lambda's is an answer."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(function.__call__, "__code__", None)
    if code is None or code.co_name == "<lambda>":
        return False
    return all(step.opname in _NOTHING for step in dis.get_instructions(code))


_seed = None  # of `fresh`


@contextmanager
def fresh(seed: int):
    """Within it each check draws other data than students see, the same for the same ``seed``.

    A check draws from ``torch.Generator().manual_seed(k)`` with a fixed k; here another number
    takes the place of k, made from k and ``seed``. An exercise with one right number for an answer
    draws nothing, and stays as it is; so do those in `KEPT`.
    """
    global _seed
    before, _seed = _seed, int(seed)
    try:
        yield
    finally:
        _seed = before


# Checks made for their own draws: 9.5 asks for a gap that harder draws do not reach, and of 17.2's
# constants one must be negative, or the absolute value would pass.
KEPT = {"9.5", "17.2"}


@contextmanager
def _drawing(number: str):
    """While a check runs inside `fresh`, seeds mean other draws; else nothing changes."""
    usual, mine = torch.Generator, _seed
    if mine is None or number in KEPT:
        yield
        return

    class Kind(type(usual)):
        def __instancecheck__(cls, other):
            return isinstance(other, usual)

    class Generator(usual, metaclass=Kind):
        def manual_seed(self, seed):
            digest = hashlib.sha256(f"{mine} {seed}".encode()).digest()
            return super().manual_seed(int.from_bytes(digest[:6], "big"))

    torch.Generator = Generator
    try:
        yield
    finally:
        torch.Generator = usual


def _tensor(value, like: torch.Tensor) -> torch.Tensor:
    """An answer as a tensor of the truth's type; one number is one, whatever its shape."""
    parts = isinstance(value, tuple | list)
    if parts and any(isinstance(x, torch.Tensor) and x.numel() != 1 for x in value):
        value = torch.stack([torch.as_tensor(x) for x in value])
    elif parts:
        value = [x.item() if isinstance(x, torch.Tensor) else x for x in value]
    plain = not isinstance(value, torch.Tensor | np.ndarray)  # numbers: float32 would round them
    value = torch.as_tensor(value, dtype=like.dtype if plain else None).detach().to(like)
    return value.reshape(like.shape) if value.numel() == like.numel() == 1 else value


NEAR = 1e-4  # of this size is what single precision, or a finite difference, leaves


def close(got, expected, what: str = "the result", rtol: float = 1e-6, hint: str = "") -> None:
    """Compare an answer with the truth.

    Args:
        got: The student's tensor or number.
        expected: The truth.
        what: What the message calls it.
        rtol: Largest ||got - expected|| / ||expected||; of a truth that is zero, largest ||got||.
        hint: Added to the message when it is wrong.

    Raises:
        Wrong: if the shape differs or the error is larger than ``rtol``. A small error is said to
            be one of precision.
    """
    expected = torch.as_tensor(expected)
    try:
        got = _tensor(got, expected)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what} should be a number or a tensor, got {type(got).__name__}.") from None
    if got.shape != expected.shape:
        raise Wrong(f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}.")
    error = float((got - expected).norm()) / (float(expected.norm()) or 1.0)
    if not error <= rtol:
        if error <= NEAR:
            raise Wrong(
                f"{what}: nearly right, off by a relative error of {error:.1e}, where {rtol:.0e} "
                "is asked for. Single precision (float32) on the way leaves as much, or a finite "
                "difference; use float64 and the formula."
            )
        raise Wrong(f"{what}: off by a relative error of {error:.1e}. {hint}".rstrip())


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal numbers in float64, whatever default a notebook has set."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def numbers(answer, count: int) -> list[float]:
    """Read an answer as so many numbers: a list, a tuple or a tensor of any shape.

    Raises:
        Wrong: if it is something else, or has another number of them.
    """
    wanted = "a number" if count == 1 else f"{count} numbers"
    try:
        if not isinstance(answer, str):
            answer = _tensor(answer, torch.zeros(0, dtype=torch.float64)).flatten()
        values = [float(value) for value in ([answer] if isinstance(answer, str) else answer)]
    except (TypeError, ValueError, RuntimeError):
        parts = answer if isinstance(answer, tuple | list) else [answer]
        text = ", not text" * any(isinstance(part, str) for part in parts)
        raise Wrong(f"The answer should be {wanted}{text}.") from None
    if len(values) != count:
        raise Wrong(f"The answer should be {wanted}; there are {len(values)}.")
    return values


def several(answer, count: int, sentence: str) -> list:
    """The parts of an answer: a tuple or list of so many, or one tensor with a row for each.

    Raises:
        Wrong: with the sentence, if it is something else, or has another number of them.
    """
    if isinstance(answer, torch.Tensor) and answer.dim() > 1:
        answer = answer.unbind()
    if not isinstance(answer, tuple | list) or len(answer) != count:
        raise Wrong(sentence)
    return list(answer)


def near(value: float, truth: float, name: str, mistakes: list, hint: str, rtol: float) -> None:
    """Hold one number against the truth, with a sentence for each mistake that is known.

    Args:
        value: The answer.
        truth: What it should be.
        name: What the messages call it.
        mistakes: (wrong value, sentence) of known mistakes.
        hint: Said of any other value.
        rtol: Relative tolerance, of the truth and of the mistakes.

    Raises:
        Wrong: if it is not the truth.
    """
    if abs(value - truth) <= rtol * abs(truth):
        return
    for wrong, sentence in mistakes:
        if abs(value - wrong) <= rtol * abs(wrong):
            raise Wrong(f"{name}: {sentence}")
    raise Wrong(f"{name}: {value:.6g} is not right. {hint}")


def name_mistake(got, truth: torch.Tensor, mistakes: list, rtol: float = 1e-8) -> None:
    """Name the mistake if the answer is a known wrong one.

    On some data a mistake gives the truth, or nearly so: then nobody is accused of it.

    Args:
        got: The student's tensor or number.
        truth: The truth.
        mistakes: Pairs (sentence for the student, the wrong result that it explains).
        rtol: An answer that is as near to the truth, relative to its size, is right.

    Raises:
        Wrong: with the sentence of the mistake.
    """
    try:
        value = _tensor(got, truth)
    except (TypeError, ValueError, RuntimeError):
        return  # `close` says what is wrong with it
    if value.shape != truth.shape:
        return
    size = float(truth.norm()) or 1.0
    off = float((value - truth).norm())
    for sentence, wrong in mistakes if not off <= rtol * size else ():
        wrong = torch.as_tensor(wrong).to(truth)
        if wrong.shape != truth.shape:
            continue
        left, apart = float((value - wrong).norm()), float((wrong - truth).norm())
        # single precision of the mistake still is the mistake, and of the truth is the truth
        if left <= 1e-6 * size and left < 0.1 * off and apart > rtol * size:
            raise Wrong(sentence)


def compare(
    got, truth: torch.Tensor, mistakes: list, what: str, rtol: float = 1e-8, hint: str = ""
) -> None:
    """`name_mistake`, and `close`: compare with the truth, and say what was wrong.

    Raises:
        Wrong: as both.
    """
    name_mistake(got, truth, mistakes, rtol)
    close(got, truth, what, rtol, hint)
