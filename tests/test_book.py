"""The book: what each figure is said to show, and notebooks that run side by side."""

import re
import subprocess
import sys
import threading
import time

import book
import form
import nbformat
import pages
import pytest
import reference
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

LEAST = (  # a picture of one point
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYPhfDwAChAGAWjR9awAAAABJRU5ErkJggg=="
)
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


def test_a_text_is_plain():
    told = pages.plain(r"The *line* of `f` ends [here](x.md) at $\theta^*$.")
    assert told == "The line of f ends here at θ^*."
    assert pages.spoken(r"\tfrac12\lVert\hat\theta\rVert \le \frac{a}{b}") == "1/2‖θ‖ ≤ a/b"
    assert pages.spoken(r"\kappa \approx 30\,000") == "κ ≈ 30 000"
    assert pages.first_sentences("Short. " + "A longer one, " * 6 + "ends. Third.").count(".") == 2
    both = "Left: " + "falls " * 12 + ". It does. Right: rises. And more."
    assert pages.first_sentences(both).endswith("Right: rises.")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A small site of one chapter, rendered as the book is."""
    folder = tmp_path_factory.mktemp("site")
    deeper = {"metadata": {"tags": ["deeper"]}}
    shown = new_output("display_data", data={"image/png": LEAST})
    badge = form.BADGE.format(address="OWNER/bilevel-lite", path="chapters/05_toy.ipynb")
    cells = [
        new_markdown_cell(f"# 5. Toy\n\n{badge}"),
        new_markdown_cell("## 5.1 A question"),
        new_code_cell("secret = 1", metadata={"tags": ["hide-input"]}),
        new_markdown_cell("### Going deeper: a proof\n\nIt is $x$:\n\n$$x$$"),
        new_code_cell("deep = 1"),
        new_markdown_cell("On we go."),
        new_markdown_cell("### Going deeper: another\n\nThe last word."),
        new_markdown_cell("## 5.2 A figure"),
        new_code_cell("draw()", outputs=[shown]),
        new_markdown_cell("The line rises from left to right, as the *theory* says it must do."),
    ]
    for cell in (*cells[3:5], cells[6]):
        cell.metadata = deeper["metadata"]
    for count, cell in enumerate(c for c in cells if c.cell_type == "code"):
        cell.execution_count = count + 1
    kernel = {"name": "python3", "display_name": "Python 3"}
    nb = new_notebook(
        cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}}
    )
    (folder / "index.md").write_text("# Book\n\n```{toctree}\n05_toy\n```\n")
    nbformat.write(pages.described(nb), folder / "05_toy.ipynb")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", "-c", book.HERE]
    done = subprocess.run([*command, folder, folder / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_a_block_going_deeper_is_folded(site):
    page = (site / "05_toy.html").read_text("utf-8")
    blocks = re.findall(r'<details class="deeper">.*?</details>', page, re.DOTALL)
    assert len(blocks) == 2
    assert "It is" in blocks[0] and "deep" in blocks[0] and "On we go" not in blocks[0]
    assert "The last word" in blocks[1] and "A figure" not in blocks[1]
    assert all("<h3>" not in block and "<section" not in block for block in blocks)
    assert "deeper-ends" not in page


def test_machinery_is_folded_and_a_figure_speaks(site):
    page = (site / "05_toy.html").read_text("utf-8")
    assert "secret" in re.search(r'<details class="[^"]*hide.*?</details>', page, re.DOTALL)[0]
    assert 'alt="The line rises from left to right, as the theory says it must do."' in page
    assert '<a class="colab" href="https://colab.research.google.com/github/' in page
    assert pages.broken(site) == []


def test_what_is_broken_in_a_site_is_said(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a id="there" href="c.html">2</a>')
    (tmp_path / "b.html").write_text('<img src="a.html" alt=""><a href="a.html#there">3</a>')
    assert pages.broken(tmp_path) == [
        "a.html: b.html#here: that page has no such place",
        "a.html: the link c.html leads nowhere",
        "b.html: the picture a.html has no text",
    ]


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
    monkeypatch.setattr(book, "attempt", lambda path, **options: None)
    monkeypatch.setattr(book, "render", lambda done, *options: 0)
    assert book.command_run("0") == book.command_check("0") == 2  # the chapter and its solutions


def test_a_docstring_becomes_what_sphinx_reads():
    lines = [
        "One line with |x| and theta*.",
        "",
        "    v = ||b||,",
        "        c",
        "",
        "More of ``a|b`` and `c|d`.",
        "",
        "Args:",
        "    **common: See |there|.",
        "        Goes on.",
        "",
        "Example:",
        "    >>> 2 ** 3 | 4",
    ]
    reference.prepared(lines)
    assert lines == [
        r"One line with \|x\| and theta\*.",
        "",
        "::",
        "",
        "    v = ||b||,",
        "        c",
        "",
        "More of ``a|b`` and `c|d`.",
        "",
        "Args:",
        r"    **common: See \|there\|.",
        "        Goes on.",
        "",
        "Example:",
        "    >>> 2 ** 3 | 4",
    ]
