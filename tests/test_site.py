"""The site: texts of figures, folds, links, the reference, and pages that read their numbers."""

import json
import re
import subprocess
import sys

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


def test_a_text_is_plain():
    told = pages.plain(r"The *line* of `f` ends [here](x.md) at $\theta^*$.")
    assert told == "The line of f ends here at θ^*."
    assert pages.spoken(r"\tfrac12\lVert\hat\theta\rVert \le \frac{a}{b}") == "1/2‖θ‖ ≤ a/b"
    assert pages.spoken(r"\lambda \propto 1/\sqrt M, \mathrm{tr}\,\Omega") == "λ ∝ 1/√ M, tr Ω"
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
    table = {"text/markdown": "| a | b |\n|---|---|\n| $x$ | 2 |"}
    displayed = new_output("display_data", data=table)
    badge = form.BADGE.format(address="OWNER/bilevel-lite", path="chapters/05_toy.ipynb")
    cells = [
        new_markdown_cell(f"# 5. Toy\n\n{badge}"),
        new_markdown_cell("## 5.1 A question"),
        new_code_cell("secret = 1", metadata={"tags": ["hide-input"]}),
        new_markdown_cell("### Going deeper: a proof\n\nIt is $x$:\n\n$$x$$"),
        new_code_cell("deep = 1", outputs=[displayed]),
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
    assert "<td" in blocks[0] and "|---|" not in page  # a displayed table is one


def test_machinery_is_folded_and_a_figure_speaks(site):
    page = (site / "05_toy.html").read_text("utf-8")
    assert "secret" in re.search(r'<details class="[^"]*hide.*?</details>', page, re.DOTALL)[0]
    assert 'alt="The line rises from left to right, as the theory says it must do."' in page
    assert '<a class="colab" href="https://colab.research.google.com/github/' in page
    assert pages.broken(site) == []


def test_a_chapter_links_its_solutions_once():
    kfac = form.ROOT / "chapters" / "05_kfac.ipynb"
    nb = nbformat.read(kfac, as_version=4)
    link = "](solutions/05_kfac_solutions.ipynb)"
    for cell in nb.cells:  # the site must add it
        cell.source = cell.source.replace(link, "]()")
    for given in (nb, pages.described(nb)):
        shown = "".join(cell.source for cell in pages.described(given).cells)
        assert shown.count(link) == 1
    solved = nbformat.read(form.solution_of(kfac), as_version=4)
    assert "[Solutions of" not in pages.described(solved).cells[0].source


def test_what_is_broken_in_a_site_is_said(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">1</a><a id="there" href="c.html">2</a>')
    (tmp_path / "b.html").write_text('<img src="a.html" alt=""><a href="a.html#there">3</a>')
    assert pages.broken(tmp_path) == [
        "a.html: b.html#here: that page has no such place",
        "a.html: the link c.html leads nowhere",
        "b.html: the picture a.html has no text",
    ]


def test_a_methods_signature_is_short():
    given = "(problem, lam, theta, solver, *, inner_lr=None, outer_lr=None)"
    assert (
        reference.shortened(given, "bilevel_lite.AID") == "(problem, lam, theta, solver, **common)"
    )
    assert reference.shortened(given, "bilevel_lite.algorithms.method.Method") == given
    assert reference.shortened("(iters, tol=1e-10)", "bilevel_lite.CG") == "(iters, tol=1e-10)"


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
        ".. code-block:: text",
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


@pytest.mark.parametrize("name", ["which_method.md", "coming_from.md"])
def test_the_numbers_of_a_page_are_all_stored(name):
    text = pages.filled(name)
    assert "<<" not in text
    assert len(re.findall(r"\d\.\d", text)) > 10


def test_a_stored_benchmark_of_a_gpu_is_shown(monkeypatch, tmp_path):
    data = tmp_path / "figures" / "data"
    data.mkdir(parents=True)
    stored = pages.stored("bench_cpu")
    (data / "bench_cuda.json").write_text(json.dumps(stored))  # any: of another device here
    monkeypatch.setattr(form, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "stored", lambda name: stored)
    said = pages.gpu_section()
    assert said.endswith(pages.bench_table()) and "costs 0.5 to 2.9 times" in said
    (data / "bench_cuda.json").unlink()
    assert pages.gpu_section() == "Nothing here was measured on a GPU."


def test_what_the_pages_say_of_the_numbers_holds():
    peers, bench, study = pages.stored("peers"), pages.bench, pages.study
    for model in ("mlp", "lenet", "resnet18"):
        assert bench(model, "kfac-mc") < bench(model, "cg-3")
        assert bench("resnet18", "kfac-mc") <= bench(model, "kfac-mc") <= bench("mlp", "kfac-mc")
    assert abs(bench("linear", "kfac-mc") / bench("linear", "cg-10") - 1) < 0.1
    assert bench("linear", "kfac-mc, first factor kept") < bench("linear", "cg-3")
    small, large = "hyperclean_mnist_mlp_solvers", "hyperclean_cifar10_solvers_large"
    assert abs(study(small, "kfac") - study(small, "cg-3")) < 0.014  # what three seeds can tell
    assert study(large, "cg-3") < study(large, "kfac")
    costs, memory, errors = peers["costs"], peers["memory"], peers["errors"]
    kfac = costs["KFAC, Monte Carlo"]["bilevel_lite"]
    others = [by for by in costs["CG, 3 steps"].values()]
    assert all(kfac[0] > by[0] and kfac[k] < by[k] for by in others for k in (1, 2, 3) if by[k])
    assert (round(min(pages.gain()), 1), round(max(pages.gain()), 1)) == (2.0, 2.4)
    assert pages.slower("CG, 3 steps", (1, 2, 3)) < 5 and pages.slower("CG, 3 steps", (0,)) > 10
    assert pages.slower("Neumann, 10 terms", (1, 2, 3)) < 13
    assert memory["KFAC, Monte Carlo"]["bilevel_lite"] < min(memory["CG, 3 steps"].values()) / 3
    assert memory["10 unrolled steps"]["bilevel_lite"] < 0.6 * memory["10 unrolled steps"]["higher"]
    steps = costs["10 unrolled steps"]
    assert all(steps["higher"][k] < steps["bilevel_lite"][k] for k in (2, 3))
    assert peers["gradients"]["CG, 10 steps"] < peers["gradients"]["KFAC, Monte Carlo"]
    assert errors["CG, 10 steps"][0] < errors["KFAC, Monte Carlo"][0] < errors["CG, 3 steps"][0]
    assert errors["CG, 30 steps"][0] < errors["CG, 3 steps, preconditioned by KFAC"][0]
    job = peers["job"]
    assert job["bilevel_lite, CG, 3 steps"] == job["hypertorch, CG, 3 steps"]
    assert job["bilevel_lite, CG, 3 steps"] < job["bilevel_lite, KFAC"]
