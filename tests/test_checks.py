"""The checks of the exercises: every kind of answer gets a true sentence, on any draw.

`test_exercises.py` holds right and wrong answers against each check; here the same answers come in
other clothes, and on other draws than the students'.
"""

import functools
import re

import form
import numpy as np
import pytest
import torch
from test_exercises import ANSWERS, WRONG

from bilevel_lite import exercises

NUMBERS = sorted(ANSWERS)
FUNCTIONS = [n for n in NUMBERS if callable(ANSWERS[n][0])]
VALUES = [n for n in NUMBERS if n not in FUNCTIONS]
# Their checks want tensors, and say so of a list.
TENSORS = ("0.4", "4.4", "5.4", "7.4", "7.5")


def dressed(number, change):
    """The right answer with every tensor, array and number in it changed."""
    right = ANSWERS[number][0]

    def all_of(x):
        return type(x)(all_of(y) for y in x) if type(x) in (list, tuple) else change(x)

    if not callable(right):
        return all_of(right)
    return functools.wraps(right)(lambda *args: all_of(right(*args)))


def single(x):
    if isinstance(x, float):
        return np.float32(x)
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def array(x):
    return x.detach().numpy() if isinstance(x, torch.Tensor) else x


def one(x):
    x = torch.tensor(x) if isinstance(x, float) else x
    return x.reshape(1) if isinstance(x, torch.Tensor) and x.dim() == 0 else x


def listed(x):
    return x.tolist() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("change", [array, one], ids=["NumPy", "shape (1,)"])
def test_arrays_and_single_entries_are_what_they_hold(number, change):
    assert exercises.judge(number, dressed(number, change)) == ("correct", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_lists_are_tensors_or_said_not_to_be(number):
    verdict, sentence = exercises.judge(number, dressed(number, listed))
    assert verdict == "correct" or (number in TENSORS and len(sentence) > 20)


@pytest.mark.parametrize("number", NUMBERS)
def test_lists_and_tuples_are_alike(number):
    right = ANSWERS[number][0]

    def swap(x):
        return list(x) if type(x) is tuple else tuple(x) if type(x) is list else x

    answer = (lambda *args: swap(right(*args))) if callable(right) else swap(right)
    assert exercises.judge(number, answer) == ("correct", "")


@pytest.mark.parametrize("number", NUMBERS)
def test_single_precision_is_correct_or_told(number):
    verdict, sentence = exercises.judge(number, dressed(number, single))
    assert verdict == "correct" or "float32" in sentence


def forgot(*args, **kwargs):
    result = 1
    result += 1


@pytest.mark.parametrize("number", FUNCTIONS)
def test_a_missing_return_is_told(number):
    for answer in (forgot, lambda *args, **kwargs: None):
        verdict, sentence = exercises.judge(number, answer)
        assert (verdict, "`return` missing" in sentence) == ("not yet", True)


@pytest.mark.parametrize("number", [n for n in FUNCTIONS if n != "7.5"])  # takes values too
@pytest.mark.parametrize("value", [3.0, torch.ones(3), "x", (1, 2)], ids=lambda v: str(type(v)))
def test_a_value_for_a_function_is_told(number, value):
    verdict, sentence = exercises.judge(number, value)
    assert verdict == "not yet"
    if "function" not in sentence:  # then what the function returns is an answer, too
        assert exercises.judge(number, ANSWERS[number][0]()) == ("correct", "")


@pytest.mark.parametrize("number", VALUES)
def test_a_function_for_a_value_is_told_or_called(number):
    verdict, sentence = exercises.judge(number, lambda: ANSWERS[number][0])
    assert verdict == "correct" or "Values are asked for here" in sentence


@pytest.mark.parametrize("number", [n for n in VALUES if isinstance(ANSWERS[n][0], tuple)])
def test_what_is_half_filled_in(number):
    right = ANSWERS[number][0]
    assert exercises.judge(number, (...,) * len(right)) == ("not attempted yet", "")
    for hole in (None, ...):
        verdict, sentence = exercises.judge(number, (*right[:-1], hole))
        assert (verdict, "still empty" in sentence) == ("not yet", True)


@pytest.mark.parametrize("number", NUMBERS)
def test_odd_answers_are_never_blamed_on_the_students_code(number):
    for odd in ("x", object(), {}, [], True, torch.ones(2, 2, dtype=torch.complex128)):
        answer = (lambda *args, odd=odd: odd) if number in FUNCTIONS else odd
        verdict, sentence = exercises.judge(number, answer)
        assert verdict == "not yet" and "Your code raised" not in sentence


def test_the_students_own_exception_is_reported():
    said = exercises.judge("1.1", lambda lam: 1 / 0)
    assert said == ("not yet", "Your code raised ZeroDivisionError: division by zero")
    missing = exercises.judge("1.1", lambda lam: (_ for _ in ()).throw(NotImplementedError("todo")))
    assert missing[0] == "not attempted yet"


def test_a_number_that_is_no_string(capsys):
    with pytest.raises(TypeError, match="number: got 5.3, expected a string"):
        exercises.check(5.3, 1.0)


def test_what_counts_as_empty():
    def documented():
        """Do it."""

    def passed():
        pass

    def assigned():
        x = 3  # noqa: F841

    def nested():
        return documented

    assert all(map(exercises._empty, (documented, passed, functools.partial(passed))))
    assert not any(map(exercises._empty, (assigned, nested, lambda: None, len, torch.nn.ReLU())))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("seed", [1, pytest.param(range(2, 12), marks=pytest.mark.slow)], ids=str)
def test_right_answers_are_accused_of_nothing_on_any_draw(number, seed):
    for s in [seed] if isinstance(seed, int) else seed:
        with exercises.fresh(s):
            assert exercises.judge(number, ANSWERS[number][0]) == ("correct", ""), s


@pytest.mark.parametrize(("number", "index"), WRONG)
def test_wrong_answers_pass_on_no_draw(number, index):
    with exercises.fresh(1):
        assert exercises.judge(number, ANSWERS[number][1][index])[0] == "not yet"


def test_the_page_for_teachers_says_where_the_seed_does_not_matter():
    text = (form.ROOT / "chapters" / "TEACHING.md").read_text("utf-8")
    said = set(
        re.findall(r"\d+[a-z]?\.\d+", text.split("*Where the seed does not matter.*")[1][:700])
    )
    assert said <= set(NUMBERS)
    assert said >= {n for n in VALUES if not n[-1].isalpha()} | exercises.KEPT


def test_fresh_draws_are_others_and_the_same_for_one_seed():
    def drawn(seed):
        seen = []

        def answer(lam, *rest):
            seen.append(lam.clone())
            return ANSWERS["1.2"][0](lam, *rest)

        if seed is None:
            assert exercises.check("1.2", answer)
        else:
            with exercises.fresh(seed):
                assert exercises.check("1.2", answer)
        return seen[0]

    usual, generator = drawn(None), torch.Generator
    assert torch.equal(drawn(5), drawn(5)) and not torch.equal(drawn(5), drawn(6))
    assert torch.equal(drawn(None), usual) and not torch.equal(drawn(5), usual)
    assert torch.Generator is generator
    with exercises.fresh(1):  # a generator from before is one still
        kind = exercises._drawing("1.2")
        with kind:
            assert isinstance(generator(), torch.Generator)


def test_a_mistake_that_gives_the_truth_is_nobodys_mistake():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        truth, noise = torch.randn(2, 3, generator=generator)
        noise = noise * truth.norm() / noise.norm()
        near, other = truth + 2e-7 * noise, truth + 1e-3 * noise
        same = [("accused", truth), ("accused", truth + 1e-9 * noise)]
        exercises.compare(truth, truth, same, "x")
        for got in (near, near.float()):
            with pytest.raises(exercises.Wrong, match="nearly right"):
                exercises.compare(got, truth, same, "x")
        for got in (other, other.float()):  # a mistake keeps its name in single precision
            with pytest.raises(exercises.Wrong, match="that one"):
                exercises.compare(got, truth, [*same, ("that one", other)], "x")


def test_a_truth_that_is_zero():
    exercises.close(1e-9, 0.0)
    exercises.compare(torch.tensor([0.0]), torch.tensor(0.0), [("accused", torch.tensor(0.0))], "x")
    with pytest.raises(exercises.Wrong, match="off by"):
        exercises.close(0.1, 0.0)


def test_a_function_of_another_edition_is_told_so():
    def old(v, slope, g, h, theta, l2):
        return theta

    verdict, why = exercises.judge("13.1", old)
    assert verdict == "not yet" and "7 arguments are handed over here" in why
    assert "another edition" in why

    def fails(v, slope, g, hu, theta, u, l2):
        return theta @ torch.zeros(1)

    assert "Your code raised RuntimeError" in exercises.judge("13.1", fails)[1]


def test_numbers_written_as_text():
    assert exercises.judge("14.B", "+1") == ("correct", "")
    assert exercises.judge("14.B", "plus")[1] == "The answer should be a number, not text."
    assert exercises.judge("12.B", ("1.7 points", 5.2))[1] == (
        "The answer should be 2 numbers, not text."
    )


def test_an_edition_is_that_of_the_checks():
    names = [exercises.edition(chapter) for chapter in ("0", "1", "9b", "13b")]
    assert len(set(names)) == 4 and all(len(name) == 8 for name in names)
    assert exercises.edition("99") == ""
