"""The edition for students is the chapters minus the answers, and it works."""

import ast
import difflib
import os
import re
import subprocess
import sys

import form
import nbformat
import pytest
import student

ANSWERS = form.ROOT / "tests" / "exercise_answers"


@pytest.fixture(scope="module")
def edition(tmp_path_factory):
    return student.build(tmp_path_factory.mktemp("student") / "edition")


def squeezed(text):
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("path", form.chapters(), ids=lambda p: p.stem)
def test_a_chapter_lacks_only_the_answers(edition, path):
    old = nbformat.read(path, as_version=4)
    new = nbformat.read(edition / "chapters" / path.name, as_version=4)
    assert len(old.cells) == len(new.cells)
    for before, after in zip(old.cells, new.cells, strict=True):
        if before.source == after.source:
            assert before == after
            continue
        assert before.cell_type == "markdown"
        assert {**before, "source": ""} == {**after, "source": ""}
        assert "see the solutions" not in after.source and "Colab](" not in after.source
        words = before.source.replace("; see the solutions)", ")").split()
        left = after.source.split()
        for tag, i, j, k, m in difflib.SequenceMatcher(None, words, left, False).get_opcodes():
            gone = " ".join(words[i:j])
            assert tag in ("equal", "delete"), (gone, left[k:m])
            if tag == "delete":
                assert any(x in gone for x in ("solutions/", "<details>", "[![Open")), gone


def test_folds_stay_if_they_are_hints():
    text = (
        "Why?\n\n<details><summary>Hint</summary>Look at $b$.</details>\n\n"
        "<details>\n<summary>Answer</summary>\n\nIt is 7.\n</details>\n\nGo on. "
        "See [solutions](solutions/01_x_solutions.ipynb). Then rest."
    )
    assert student.without_answers(text) == (
        "Why?\n\n<details><summary>Hint</summary>Look at $b$.</details>\n\nGo on. Then rest."
    )


def solved(path):
    """The text of a solutions notebook that answers: whole functions, long sentences."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells[2:]:
        if cell.cell_type == "markdown":
            sentences = re.split(r"(?<=[.!?])\s+", cell.source)
            found += [s for s in sentences if len(s) > 70 and "solutions" not in s]
            continue
        found += re.findall(r'bl\.exercises\.check\("[^"]+", [-(\[\d].*\)', cell.source)
        source = re.sub(r"^\s*%.*$", "pass", cell.source, flags=re.MULTILINE)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                found.append("\n".join(lines[node.lineno : node.end_lineno]))
    return [squeezed(x).strip() for x in found]


def test_no_answer_is_to_be_found(edition):
    texts, chapters = {}, ""
    for path in edition.rglob("*"):
        assert "solution" not in path.name and "exercise_answers" not in path.name
        assert not path.is_dir() or path.name != "tests"
        if path.suffix in (".py", ".md", ".ipynb", ".toml", ".txt", ".json"):
            texts[path] = squeezed(path.read_text("utf-8"))
            if path.suffix == ".ipynb":
                nb = nbformat.read(path, as_version=4)
                texts[path] = squeezed("\n\n".join(cell.source for cell in nb.cells))
                chapters += texts[path]
    shown = squeezed("".join(
        cell.source
        for path in form.chapters()
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ))  # fmt: skip
    # what a solution takes over from its chapter is no answer
    answers = [x for path in form.solutions() for x in solved(path) if x not in shown]
    assert len(answers) > 200
    # what the checks say of mistakes is half an answer, too
    for path in sorted((form.ROOT / "bilevel_lite" / "exercises").glob("ch*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            for part in ast.iter_child_nodes(node) if not isinstance(node, ast.Expr) else ():
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    answers += [squeezed(part.value)] * (len(part.value) > 60)
    for answer in answers:
        for path, text in texts.items():
            if len(answer) < 60 and "exercises" not in answer and path.suffix == ".py":
                continue  # the package clamps a weight, too
            assert answer not in text, f"{path.relative_to(edition)}: {answer}"
    assert "bl.exercises.check" in chapters and "/solutions/" not in chapters


def test_the_page_for_teachers_is_left_out_and_its_links_lead_somewhere(edition):
    assert {path.name for path in edition.rglob("*.md")} >= {"README.md", "NOTATION.md"}
    assert not list(edition.rglob("TEACHING.md"))
    text = (form.ROOT / "chapters" / "TEACHING.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {p.name for p in form.chapters()} <= set(links)
    assert all((form.ROOT / "chapters" / link).is_file() for link in links), links
    for name in re.findall(r"`((?:bilevel_lite|figures|tests)/[\w./]+)`", text):
        assert (form.ROOT / name).exists(), name


def test_its_checks_work(edition):
    code = (
        "import torch, bilevel_lite as bl; torch.set_default_dtype(torch.float64)\n"
        "from bilevel_lite import exercises\n"
        "assert exercises.check('1.5', (1, -1, 1 / 2, 2 / 3))\n"
        "assert not exercises.check('2.6', (1, 1, 2))\n"
        "assert not exercises.check('1.1', lambda lam: 0 * lam)\n"
        "print(bl.__file__, len(exercises.known('5')))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(edition), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=edition, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert said[0] == "Exercise 1.5: correct." and said[1].startswith("Exercise 2.6: not yet. One")
    assert said[-1].startswith(str(edition)) and int(said[-1].split()[-1]) >= 6


def test_another_folder_is_left_alone(tmp_path, edition):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="no student edition"):
        student.build(tmp_path)
    assert (tmp_path / "mine.txt").exists()
    (edition / "chapters" / "old.ipynb").write_text("")
    assert student.build(edition) == edition and not (edition / "chapters" / "old.ipynb").exists()
    makefile = (edition / "Makefile").read_text()
    assert "lab: setup" in makefile and "test" not in re.findall(r"^(\w+):", makefile, re.M)
