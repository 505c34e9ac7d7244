"""The checks that students call: ``bl.exercises.check("1.2", my_function)``.

A check prints one line and returns whether the answer is right. A stub (a function that raises
NotImplementedError or returns None or ..., or ``...`` itself) is "not attempted yet". A check
compares with an independent truth on data that the student has not seen, and its message says
what was wrong in words.
"""

from importlib import import_module

import torch

__all__ = ["Wrong", "check", "close", "compare", "draw", "exercise", "numbers"]

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
    """
    if not isinstance(number, str):
        raise TypeError(f"number: got {number!r}, expected a string such as '1.2'")
    chapter = number.split(".")[0]
    if chapter.isdigit():
        try:
            import_module(f"bilevel_lite.exercises.ch{int(chapter):02d}")
        except ModuleNotFoundError:
            pass
    if number not in _CHECKS:
        raise ValueError(f"number: there is no exercise {number!r}; known: {sorted(_CHECKS)}")
    name = f"{'Stop' if number[-1].isalpha() else 'Exercise'} {number}"
    try:
        _CHECKS[number](_attempted(answer))
    except NotAttempted:
        print(f"{name}: not attempted yet.")
    except Wrong as wrong:
        print(f"{name}: not yet. {wrong}")
    except Exception as error:
        print(f"{name}: not yet. Your code raised {type(error).__name__}: {error}")
    else:
        print(f"{name}: correct.")
        return True
    return False


def _attempted(answer):
    """Raise NotAttempted for a stub; wrap a function so that a stub inside it is noticed."""
    if answer is None or answer is ...:
        raise NotAttempted
    if not callable(answer):
        return answer

    def wrapped(*args, **kwargs):
        try:
            result = answer(*args, **kwargs)
        except NotImplementedError:
            raise NotAttempted from None
        if result is None or result is ...:
            raise NotAttempted
        return result

    return wrapped


def close(got, expected, what: str = "the result", rtol: float = 1e-6, hint: str = "") -> None:
    """Compare an answer with the truth.

    Args:
        got: The student's tensor or number.
        expected: The truth.
        what: What the message calls it.
        rtol: Largest ||got - expected|| / ||expected||.
        hint: Added to the message when it is wrong.

    Raises:
        Wrong: if the shape differs or the error is larger than ``rtol``.
    """
    expected = torch.as_tensor(expected)
    try:
        got = torch.as_tensor(got).detach().to(expected)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what} should be a number or a tensor, got {type(got).__name__}.") from None
    if got.shape != expected.shape:
        raise Wrong(f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}.")
    size = max(float(expected.norm()), 1e-300)
    error = float((got - expected).norm()) / size
    if not error <= rtol:
        raise Wrong(f"{what} is off by a relative error of {error:.1e}. {hint}".rstrip())


def draw(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal numbers in float64, whatever default a notebook has set."""
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def numbers(answer, count: int) -> list[float]:
    """Read an answer as so many numbers: a list, a tuple or a tensor of any shape.

    Raises:
        Wrong: if it is something else, or has another number of them.
    """
    try:
        if not isinstance(answer, str):
            answer = torch.as_tensor(answer, dtype=torch.float64).flatten()
        values = [float(value) for value in answer]
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"The answer should be {count} numbers.") from None
    if len(values) != count:
        raise Wrong(f"The answer should be {count} numbers; there are {len(values)}.")
    return values


def compare(got, truth: torch.Tensor, mistakes: list, what: str, rtol: float = 1e-8) -> None:
    """Compare with the truth; name the mistake if the answer is a known wrong one.

    Args:
        got: The student's tensor or number.
        truth: The truth.
        mistakes: Pairs (sentence for the student, the wrong result that it explains).
        what: What the message calls the answer.
        rtol: Largest relative error.

    Raises:
        Wrong: as `close`, or with the sentence of the mistake.
    """
    try:
        value = torch.as_tensor(got).detach().to(truth)
    except (TypeError, ValueError, RuntimeError):
        value = None
    if value is not None and value.shape == truth.shape:
        size = float(truth.norm())
        if not float((value - truth).norm()) <= rtol * size:
            for sentence, wrong in mistakes:
                if wrong.shape != value.shape or float((wrong - truth).norm()) <= 1e-6 * size:
                    continue  # on these data the mistake makes no difference
                if float((value - wrong).norm()) <= 1e-6 * size:
                    raise Wrong(sentence)
    close(got, truth, what, rtol)
