"""Does the comparison bite? A spoiled digit, a word on stderr, a missing count must be seen."""

import copy
import re
import subprocess
import sys

import book
import form
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output


def shows_number(cell):
    """Whether a cell has text with a digit below it that nbval compares."""
    if cell.cell_type != "code" or "nbval-ignore-output" in form.tags(cell) or form.figures(cell):
        return False
    return any(re.search(r"\d", text) for text in form.texts(cell))


def beginning(nb):
    """The cells up to the first that shows a number, or None."""
    for position, cell in enumerate(nb.cells):
        if shows_number(cell):
            nb.cells = nb.cells[: position + 1]
            return nb
    return None


def specimen():
    """The shortest beginning among all chapters; a tiny notebook where there is no chapter yet."""
    read = [beginning(nbformat.read(path, as_version=4)) for path in form.chapters()]
    read = [nb for nb in read if nb is not None]
    if read:
        return min(
            read,
            key=lambda nb: sum(form.lines(cell) for cell in nb.cells if cell.cell_type == "code"),
        )
    output = new_output("stream", name="stdout", text="42\n")
    return book.normalise(new_notebook(cells=[new_code_cell("print(6 * 7)", outputs=[output])]))


def spoiled(nb):
    """A copy with one digit changed in the last cell's output."""
    nb = copy.deepcopy(nb)
    for out in nb.cells[-1].outputs:
        holder, key = (out, "text") if "text" in out else (out.data, "text/plain")
        if match := re.search(r"\d", holder[key]):
            other = str((int(match[0]) + 1) % 10)
            holder[key] = holder[key][: match.start()] + other + holder[key][match.end() :]
            return nb
    raise AssertionError("no digit to spoil")


def nbval(path):
    """Run `pytest --nbval` on one notebook."""
    arguments = [
        "-q",
        "--nbval",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        "--nbval-cell-timeout",
        "300",
    ]
    arguments += ["--nbval-sanitize-with", form.ROOT / "tests" / "nbval_sanitize.cfg", path.name]
    command = [sys.executable, "-m", "pytest", *map(str, arguments)]
    return subprocess.run(
        command, cwd=path.parent, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_nbval_sees_a_spoiled_digit(tmp_path):
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    nb = specimen()
    good.write_text(book.dumps(nb), encoding="utf-8")
    bad.write_text(book.dumps(spoiled(nb)), encoding="utf-8")
    result = nbval(good)
    assert result.returncode == 0, result.stdout + result.stderr
    result = nbval(bad)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed" in result.stdout


@pytest.mark.slow
def test_nbval_sees_a_warning_on_stderr(tmp_path):
    """As a GPU's first backward pass once printed one below a cell that was stored without."""
    said = "import warnings\nwarnings.warn('there was no current CUDA context!')\nprint(6 * 7)"
    output = new_output("stream", name="stdout", text="42\n")
    cells = [new_code_cell(source, outputs=[output]) for source in ("print(6 * 7)", said)]
    path = tmp_path / "warns.ipynb"
    path.write_text(book.dumps(book.normalise(new_notebook(cells=cells))), encoding="utf-8")
    result = nbval(path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 failed, 1 passed" in result.stdout and "stderr" in result.stdout
    assert "there was no current CUDA context!" in result.stdout


def test_the_form_test_sees_a_missing_count(tmp_path):
    nb = specimen()
    path = tmp_path / "chapters" / "00_specimen.ipynb"
    assert not [problem for problem in form.problems(nb, path) if "execution counts" in problem]
    [cell for cell in nb.cells if cell.cell_type == "code"][-1].execution_count = None
    assert [problem for problem in form.problems(nb, path) if "execution counts" in problem]
