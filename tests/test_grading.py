"""Submissions, made up: what the grader says of them, and what they cannot make it say."""

import csv
import json
import math
from pathlib import Path

import form
import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_exercises import ANSWERS, WRONG

from bilevel_lite import exercises, grading
from bilevel_lite.__main__ import main
from bilevel_lite.grading.transcript import CannotReplay, Recorder, Replay
from bilevel_lite.grading.worker import plain

SETUP = "import torch\nimport bilevel_lite as bl\nbl.setup(seed=0)"
ONE = "def one(lam):\n    theta = 3 / (1 + lam.exp())\n"
ONE += "    return 0.1 - lam.exp() * theta * (theta - 1) / (1 + lam.exp())\n"
ONE += 'bl.exercises.check("1.1", one)'


def notebook(path: Path, *sources: str, title="# 1. The hypergradient") -> Path:
    cells = [new_markdown_cell(title), *map(new_code_cell, (SETUP, *sources))]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def graded(path, **options):
    """The submission's part of the result, and its rows by exercise."""
    (one,) = grading.grade([path], **{"seed": 7, "timeout": 100, **options})["submissions"]
    return one, {row["exercise"]: row for row in one["exercises"]}


FAST = ("01", "02", "03")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=p.stem, marks=[] if p.stem[:2] in FAST else pytest.mark.slow)
        for p in form.solutions()
    ],
)
def test_full_marks_for_the_solutions(path):
    one, rows = graded(path, timeout=600)
    wrong = {number: row for number, row in rows.items() if row["verdict"] != "correct"}
    # a stop is answered in the chapter itself
    assert not [number for number in wrong if not number[-1].isalpha()], wrong
    least = 5 if form.number(path).isdigit() else 4  # a chapter with a letter is a page
    assert one["correct"] == one["of"] >= least and not one["error"]
    judged_there = {number for number, row in rows.items() if not row["confirmed"]}
    assert judged_there <= grading.OBJECTS


@pytest.mark.slow
def test_full_marks_for_a_whole_chapter_filled_in(tmp_path):
    (path,) = (p for p in form.chapters() if p.stem.startswith("01"))
    solved = nbformat.read(form.solution_of(path), as_version=4).cells
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        numbers = form.CHECK_CALL.findall(cell.source) if cell.cell_type == "code" else []
        if numbers and numbers[0][-1].isdigit():
            answers = [c.source for c in solved if c.cell_type == "code"]
            cell.source = "\n".join(s for s in answers[1:] if numbers[0] in s or "check(" not in s)
    nbformat.write(nb, tmp_path / "filled.ipynb")
    one, _ = graded(tmp_path / "filled.ipynb", timeout=600)
    assert one["correct"] == one["of"] == 6, one


def test_all_stubs(tmp_path):
    stubs = [
        f'def f(*args):\n    raise NotImplementedError\nbl.exercises.check("1.{k}", f)'
        for k in (1, 2, 3, 4, 6)
    ]
    one, rows = graded(notebook(tmp_path / "a.ipynb", *stubs, 'bl.exercises.check("1.5", ...)'))
    assert one["correct"] == 0 and one["of"] == 6
    exercises_only = [row for number, row in rows.items() if number[-1].isdigit()]
    assert {row["verdict"] for row in exercises_only} == {"not attempted"}


def test_cheats_get_nothing(tmp_path):
    other = notebook(tmp_path / "other.ipynb", ONE)
    path = notebook(
        tmp_path / "cheat.ipynb",
        'bl.exercises.check = lambda *a: print("Exercise 1.1: correct.")',
        'bl.exercises.check("1.1", lambda lam: 0 * lam)',
        # the package, torch, and what judges
        "import bilevel_lite.exercises.ch01 as ch\n"
        "ch._compare = ch.compare = lambda *a, **k: None\n"
        "torch.linalg.solve = lambda A, b: 0 * b",
        'bl.exercises.check("1.2", lambda *a: torch.ones(4))',
        'bl.exercises.judge = lambda *a: ("correct", "")\n'
        'bl.exercises.check("1.3", lambda *a: 0.0)',
        # in the cell of the check itself
        'bl.exercises.check = lambda *a: True\nbl.exercises.check("1.4", lambda *a: 0)',
        f'text = open({str(other)!r}).read()\nbl.exercises.check("1.5", text)',
        'import subprocess\nsubprocess.run(["true"])\nbl.exercises.check("1.6", 1)',
        'print("Exercise 1.6: correct.")',
    )
    one, rows = graded(path)
    assert one["correct"] == 0 and one["of"] == 6
    assert rows["1.1"]["verdict"] == rows["1.2"]["verdict"] == "not yet"
    assert "In its own process the check said correct" in rows["1.2"]["message"]
    assert rows["1.3"]["verdict"] == "error" and "cannot be held again" in rows["1.3"]["message"]
    assert "is the check replaced there" in rows["1.4"]["message"]
    for number in ("1.5", "1.6"):
        assert rows[number]["verdict"] == "error"
        assert "stopped before the check: PermissionError" in rows[number]["message"]


def test_an_object_does_not_pass_for_a_number(tmp_path):
    path = notebook(
        tmp_path / "a.ipynb",
        'bl.exercises.judge = lambda n, a: (a(torch.ones(())), ("correct", ""))[1]\n'
        'class Thing: pass\nbl.exercises.check("1.1", lambda lam: Thing())',
    )
    _, rows = graded(path)
    assert rows["1.1"]["verdict"] == "error" and "of type Thing" in rows["1.1"]["message"]


def test_crashes_stay_in_their_cell_and_exits_leave_what_was_done(tmp_path):
    path = notebook(
        tmp_path / "crash.ipynb",
        "1 / 0",
        "%pip install -q nothing\n%matplotlib inline\nx = (",
        "import sys; sys.exit()",
        ONE,
        'def endless(*args):\n    return endless(*args)\nbl.exercises.check("1.2", endless)',
        'bl.exercises.check("1.3", lambda *a: sys.exit())',
        'for _ in range(50):\n    print("x" * 10**7)\n'
        'bl.exercises.check("1.5", (1, -1, 1 / 2, 2 / 3))',
        "import os; os._exit(0)",
        'bl.exercises.check("1.6", 1)',
    )
    one, rows = graded(path)
    assert rows["1.1"]["verdict"] == rows["1.5"]["verdict"] == "correct" and one["correct"] == 2
    assert "Your code raised RecursionError" in rows["1.2"]["message"]
    assert rows["1.3"] == {**rows["1.3"], "verdict": "error", "message": "It called exit."}
    assert rows["1.4"]["message"] == 'No cell calls bl.exercises.check("1.4", ...).'
    assert "process ended by itself" in rows["1.6"]["message"]
    assert "ZeroDivisionError" in one["note"] and "process ended by itself" in one["note"]


def test_endless_loops_end(tmp_path):
    stubborn = "import time\nwhile True:\n    try:\n        time.sleep(1)\n"
    stubborn += "    except BaseException:\n        pass"
    path = notebook(
        tmp_path / "loop.ipynb",
        'def f(*args):\n    while True:\n        pass\nbl.exercises.check("1.2", f)',
        "while True:\n    pass",
        ONE,
        stubborn,
    )
    one, rows = graded(path, timeout=32)
    assert rows["1.2"]["message"] == "It ran for more than 8 s."
    assert rows["1.1"]["verdict"] == "correct" and one["correct"] == 1
    assert one["note"].startswith("It was stopped after 32 s.")


def test_no_notebook_is_one_sentence(tmp_path, capsys):
    for name, text in (("empty", ""), ("text", "hello"), ("list", "[1]"), ("no", '{"cells": 3}')):
        (tmp_path / f"{name}.ipynb").write_text(text)
    (tmp_path / "folder").mkdir()
    bare = notebook(tmp_path / "bare.ipynb", "x = 1", title="# Notes")
    names = [str(tmp_path / f"{n}.ipynb") for n in ("missing", "empty", "text", "list", "no")]
    out, table = tmp_path / "out" / "marks.json", tmp_path / "marks.csv"
    words = [*names, str(tmp_path / "folder"), str(bare), "--out", str(out), "--csv", str(table)]
    assert main(["grade", *words]) == 1
    errors = [one["error"] for one in json.loads(out.read_text())["submissions"]]
    said = ["no such file", "file is empty", "no notebook", "no notebook", "no notebook",
            "folder without notebooks", "no chapter of the course"]  # fmt: skip
    assert all(part in error for part, error in zip(said, errors, strict=True)), errors
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["message"] for row in rows] == errors
    assert capsys.readouterr().out.count("\n") == 8
    assert main(["grade", str(bare), "--timeout", "0"]) == 1
    assert "--timeout: got 0.0" in capsys.readouterr().err


def test_what_is_expected_of_a_notebook():
    assert grading.expected("# 1. The hypergradient") == exercises.known("1")
    assert grading.expected("# 13b. A page") == exercises.known("13b") != exercises.known("13")
    exam = 'some text\n### Exercise 2.3\nbl.exercises.check("1.1", f)\nbl.exercises.check("9.9", f)'
    assert grading.expected(exam) == ["2.3", "1.1"]


def test_lines_for_ipython_do_nothing():
    assert plain("if x:\n    %pip install y\n!ls") == "if x:\n    pass\npass"
    assert plain("%%time\nx = 1") == "\nx = 1"
    assert plain("%time x = 1\nlen?\nfiles = !ls") == "x = 1\npass\nfiles = None"
    for python in ("x = (7\n     % 4)", 'y = """\n% a\n!b\n"""'):
        assert plain(python) == python


def test_what_grade_may_not_do(tmp_path):
    path = notebook(tmp_path / "one.ipynb", ONE)
    for timeout in (math.inf, 1e12, 0, math.nan):
        with pytest.raises(ValueError, match="up to a day"):
            grading.grade([path], timeout=timeout)
    result = {"submissions": [{"file": str(path)}]}
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is a submission"):
        grading.write(result, tmp_path / ".." / tmp_path.name / "one.ipynb")
    assert path.read_bytes() == before


@pytest.mark.parametrize(("name", "option"), [("out", "out"), ("csv", "table")])
def test_a_full_disk_names_the_file(tmp_path, monkeypatch, name, option):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(csv, "DictWriter", full)
    result = {"submissions": [], "seed": 0}
    message = rf"^{name}: .*marks cannot be written \(No space left on device\)"
    with pytest.raises(ValueError, match=message):
        grading.write(result, **{option: tmp_path / "marks"})


def test_answers_of_the_checkout_are_refused(tmp_path):
    path = "Path(bl.__file__).parents[1] / 'tests' / 'exercise_answers' / 'ch01.py'"
    steal = f"import runpy\nfrom pathlib import Path\nRIGHT = runpy.run_path({path})['RIGHT']\n"
    one, rows = graded(
        notebook(tmp_path / "one.ipynb", steal + 'bl.exercises.check("1.1", RIGHT["1.1"])')
    )
    assert one["correct"] == 0 and "read answers" in rows["1.1"]["message"]


def test_what_students_do_without_harm(tmp_path):
    stub = 'def one(lam):\n    raise NotImplementedError\n\n_ = bl.exercises.check("1.1", one)'
    shell = 'get_ipython().run_line_magic("matplotlib", "inline")\n'
    share = 'from fractions import Fraction\nbl.exercises.check("13.A", (Fraction(2, 3), 8 / 9))'
    one, rows = graded(notebook(tmp_path / "one.ipynb", shell + ONE, share))
    assert rows["1.1"]["verdict"] == rows["13.A"]["verdict"] == "correct"
    one, rows = graded(notebook(tmp_path / "two.ipynb", ONE, stub))
    assert rows["1.1"]["verdict"] == "not attempted"
    assert "An earlier call of this check said correct" in rows["1.1"]["message"]


def test_another_edition_is_named(tmp_path):
    path = notebook(tmp_path / "one.ipynb", ONE)
    for edition, said in (("0123abcd", True), (exercises.edition("1"), False)):
        nb = nbformat.read(path, as_version=4)
        nb.metadata["edition"] = edition
        nbformat.write(nb, path)
        assert ("another edition" in graded(path)[0]["note"]) == said


def test_nobody_in_a_folder_is_left_out(tmp_path, capsys, monkeypatch):
    for name in ("Łukasz", "zip only", ".ipynb_checkpoints"):
        (tmp_path / "class" / name).mkdir(parents=True)
    folder = tmp_path / "class"
    notebook(folder / "Łukasz" / "Abgabe 1.IPYNB", ONE)
    notebook(folder / ".ipynb_checkpoints" / "1.ipynb", ONE)
    notebook(folder / "second.ipynb", ONE)
    for name in ("zip only/work.zip", "zip only/again.zip", "roster.csv", "late.pdf"):
        (folder / name).write_bytes(b"x")
    names = [path.relative_to(folder).as_posix() for path in grading.notebooks([folder])]
    assert names == ["late.pdf", "second.ipynb", "zip only", "Łukasz/Abgabe 1.IPYNB"]
    out, table = tmp_path / "marks.json", tmp_path / "marks.csv"
    real = grading._submission

    def slow(path, *rest):
        if path.name == "Abgabe 1.IPYNB":
            raise KeyboardInterrupt
        return real(path, *rest)

    words = ["grade", str(folder), "--seed", "5", "--out", str(out), "--csv", str(table)]
    with monkeypatch.context() as patched:
        patched.setattr(grading, "_submission", slow)
        assert main(words) == 130
    said = capsys.readouterr()
    assert "stopped: 3 of 4 graded" in said.err and "second.ipynb" in said.out
    assert "folder without notebooks" in said.out
    assert [one["error"] == "" for one in json.loads(out.read_text("utf-8"))["submissions"]] == [
        False, True, False,
    ]  # fmt: skip
    assert main(words) == 1  # there are files that are no notebooks
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == grading.COLUMNS
    marks = [row for row in rows if row["verdict"] == "correct" and row["counts"] == "True"]
    assert [Path(row["file"]).name for row in marks] == ["second.ipynb", "Abgabe 1.IPYNB"]
    assert {(row["exercise"], row["chapter"], row["seed"]) for row in marks} == {("1.1", "1", "5")}
    (tmp_path / "full").mkdir()
    assert main(["grade", str(folder), "--out", str(tmp_path / "full")]) == 1
    assert "--out: " in capsys.readouterr().err and not list((tmp_path / "full").iterdir())


# every answer that there is, through a record: the verdict is the same
@pytest.mark.parametrize("number", sorted(ANSWERS))
def test_a_record_is_judged_like_the_answer(number):
    replay(number, ANSWERS[number][0], must=number not in grading.OBJECTS)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "index"), WRONG)
def test_a_record_of_a_wrong_answer(number, index):
    replay(number, ANSWERS[number][1][index], must=False)


def replay(number, answer, must):
    recorder = Recorder()
    with exercises.fresh(5):
        there = exercises.judge(number, recorder.answer(answer))
        try:
            here = exercises.judge(number, Replay(recorder.record).answer)
        except CannotReplay:
            assert not must
            return
    # what an answer writes into its arguments is seen there only; "correct" needs both
    assert here == there or (there[0] == "not yet" and answer.__name__ == "in_place")


def test_a_result_changed_in_the_record_is_wrong():
    recorder = Recorder()
    with exercises.fresh(5):
        assert exercises.judge("1.2", recorder.answer(ANSWERS["1.2"][0]))[0] == "correct"
        kind, value = recorder.record["functions"][0][-1]["result"]
        recorder.record["functions"][0][-1]["result"] = (kind, value * 1.001)
        assert exercises.judge("1.2", Replay(recorder.record).answer)[0] == "not yet"
        assert isinstance(value, torch.Tensor)
