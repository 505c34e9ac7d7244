"""Every check accepts right answers, refuses wrong ones, and knows a stub when it sees one."""

import importlib
from pathlib import Path

import pytest

from bilevel_lite import exercises

ANSWERS, ALSO, TOLD = {}, [], []  # other right answers; mistakes and what is said of them
for path in sorted((Path(__file__).parent / "exercise_answers").glob("ch*.py")):
    spec = importlib.util.spec_from_file_location(f"exercise_answers.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    importlib.import_module(f"bilevel_lite.exercises.{path.stem}")
    for number in module.RIGHT.keys() | module.WRONG.keys():
        told = getattr(module, "TOLD", {}).get(number, [])
        wrong = [*module.WRONG.get(number, []), *(answer for answer, _ in told)]
        ANSWERS[number] = (module.RIGHT.get(number), wrong)
        ALSO += [(number, answer) for answer in getattr(module, "ALSO", {}).get(number, [])]
        TOLD += [(number, answer, said) for answer, said in told]

WRONG = [(n, i) for n, (_, wrong) in sorted(ANSWERS.items()) for i in range(len(wrong))]


def name(number):
    return f"{'Stop' if number[-1].isalpha() else 'Exercise'} {number}"


def stub(*args, **kwargs):
    raise NotImplementedError


def empty(*args, **kwargs):
    """Say what is to be done."""


def dots(*args, **kwargs): ...


def test_every_exercise_has_answers_to_test_it_with():
    assert set(ANSWERS) == set(exercises._CHECKS)
    short = [n for n, (right, wrong) in ANSWERS.items() if right is None or len(wrong) < 2]
    assert not short, f"a right and two wrong answers are needed for {short}"


@pytest.mark.parametrize("number", sorted(ANSWERS))
def test_right_is_correct(number, capsys):
    assert exercises.check(number, ANSWERS[number][0])
    assert capsys.readouterr().out == f"{name(number)}: correct.\n"


@pytest.mark.parametrize(("number", "answer"), ALSO, ids=[n for n, _ in ALSO])
def test_another_right_answer_is_correct(number, answer):
    assert exercises.judge(number, answer) == ("correct", "")
    with exercises.fresh(1):
        assert exercises.judge(number, answer) == ("correct", "")


@pytest.mark.parametrize(("number", "answer", "said"), TOLD, ids=[n for n, *_ in TOLD])
def test_a_mistake_is_told_by_its_own_name(number, answer, said):
    verdict, sentence = exercises.judge(number, answer)
    assert verdict == "not yet" and said in sentence


@pytest.mark.parametrize(("number", "index"), WRONG)
def test_wrong_is_refused_with_a_sentence(number, index, capsys):
    assert not exercises.check(number, ANSWERS[number][1][index])
    out = capsys.readouterr().out
    assert out.startswith(f"{name(number)}: not yet. ")
    assert len(out) > len(f"{name(number)}: not yet. ") + 15
    assert "Your code raised" not in out  # a wrong answer here, not a broken one


@pytest.mark.parametrize("number", sorted(ANSWERS))
def test_stubs_are_not_attempted(number, capsys):
    answers = [None, ...]
    if callable(ANSWERS[number][0]):
        answers += [stub, empty, dots, lambda *args, **kwargs: ...]
    for answer in answers:
        assert not exercises.check(number, answer)
        assert capsys.readouterr().out == f"{name(number)}: not attempted yet.\n"


def test_unknown_number():
    with pytest.raises(ValueError, match="no exercise '99.1'"):
        exercises.check("99.1", 1)
