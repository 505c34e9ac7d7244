"""The book: what each figure is said to show, and notebooks that run side by side."""

import re
import threading
import time

import book
import form
import nbformat
import pages
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

PICTURE = new_output("display_data", data={"image/png": "aaaa"})


def test_a_figures_text_is_what_the_cell_below_reads_in_it():
    reads = new_markdown_cell("Left: *both* fall\nby `half`.\n\nMore.")
    cells = [new_markdown_cell("## A heading"), new_code_cell("1", outputs=[PICTURE]), reads]
    nb = new_notebook(cells=[*cells, new_code_cell("2", outputs=[PICTURE])])
    shown = pages.described(nb)
    said = [cell.metadata.mystnb["image"]["alt"] for cell in shown.cells if form.figures(cell)]
    assert said == ["Left: both fall by half.", "Figure: A heading"]
    assert not nb.cells[1].metadata  # the notebook itself stays


@pytest.mark.parametrize("path", form.chapters() + form.solutions(), ids=lambda path: path.stem)
def test_every_figure_is_said_to_show_something(path):
    for cell in pages.described(nbformat.read(path, as_version=4)).cells:
        if form.figures(cell):
            assert len(cell.metadata["mystnb"]["image"]["alt"]) > 15


def test_notebooks_run_side_by_side_and_come_in_order(monkeypatch):
    running, most = set(), []

    def attempt(path, **options):
        running.add(threading.get_ident())
        most.append(len(running))
        time.sleep(0.05 if path == "b" else 0.2)
        running.discard(threading.get_ident())
        return None if path == "b" else path.upper()

    monkeypatch.setattr(book, "attempt", attempt)
    monkeypatch.setattr(book.os, "cpu_count", lambda: 2)
    assert list(book.attempts(["a", "b", "c"])) == [("a", "A"), ("b", None), ("c", "C")]
    assert max(most) == 2


def test_a_notebook_that_fails_makes_the_command_fail(monkeypatch):
    monkeypatch.setattr(book, "attempt", lambda path, **options: (None, 1.0))
    monkeypatch.setattr(book, "render", lambda done, *options: 0)
    assert book.command_run("0") == book.command_check("0") == 2  # the chapter and its solutions


def test_check_lists_the_seconds_and_marks_what_is_slow(monkeypatch, capsys, tmp_path):
    cells = [new_code_cell("print(1)", outputs=[new_output("stream", text="1\n")])]
    stored, paths = book.normalise(new_notebook(cells=cells)), []
    for name in ("00_short", "01_long", "02_other"):
        paths.append(tmp_path / f"{name}.ipynb")
        paths[-1].write_text(book.dumps(stored), encoding="utf-8")
    seconds = {"00_short": 3, "01_long": 91, "02_other": 90}
    clock = iter([0.0, 3.0, 10.0, 101.0, 200.0, 290.0])  # before and after each
    other = book.normalise(new_notebook(cells=[new_code_cell("print(1)")]))
    monkeypatch.setattr(book, "selected", lambda chapter: paths)
    monkeypatch.setattr(book, "JOBS", 1)
    monkeypatch.setattr(book.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        book, "execute", lambda path, **options: other if path.stem == "02_other" else stored
    )
    assert book.command_check(None) == 1
    said = capsys.readouterr().out
    assert "02_other.ipynb: cell start-1 differs" in said
    table = said.partition("side by side:\n")[2].splitlines()
    assert table == [
        f"  01_long.ipynb: {seconds['01_long']} s  SLOW: more than 90 s",
        f"  02_other.ipynb: {seconds['02_other']} s",
        f"  00_short.ipynb: {seconds['00_short']} s",
        "3 notebooks, 1 differ or fail, 1 take more than 90 s",
    ]


FALLS_BACK = [
    p for p in form.chapters() if re.search(r"available\(|at_hand\(", p.read_text("utf-8"))
]


@pytest.mark.parametrize("path", FALLS_BACK, ids=lambda path: path.stem)
def test_a_chapter_runs_where_its_data_cannot_be_had(path, monkeypatch, tmp_path):
    """No folder of data or models, empty caches, and no network."""
    assert len(FALLS_BACK) == 7
    form.set_environment()
    for name in ("BILEVEL_LITE_DATA", "BILEVEL_LITE_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.delenv("BILEVEL_LITE_MODELS", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    book.execute(path)  # its assertions are in it
