"""Every chapter has the form that chapters/book/form.py describes; each rule is seen to bite."""

import copy

import form
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NOTEBOOKS = form.chapters() + form.solutions()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    nb = nbformat.v4.reads(path.read_text(encoding="utf-8"))  # nbformat.read would mend double ids
    assert form.problems(nb, path) == []


def test_every_notebook_is_a_chapter_or_a_solution():
    folders = [form.ROOT / "chapters", form.ROOT / "chapters" / "solutions"]
    assert {path for folder in folders for path in folder.glob("*.ipynb")} == set(NOTEBOOKS)
    assert {form.solution_of(path) for path in form.chapters()} >= set(form.solutions())


def test_each_chapter_ends_with_a_link_to_the_next():
    """A chapter with a letter stands beside the path."""
    path = [one for one in form.chapters() if one.name[2] == "_"]
    for one in form.chapters():
        last = nbformat.read(one, 4).cells[-1].source.splitlines()[-1]
        later = [other.name for other in path if other.name[:2] > one.name[:2]]
        assert not later or (last.startswith("Next: ") and f"({later[0]})" in last), one.name


# A notebook that breaks no rule, then one broken rule at a time.


def code(source, *outputs, **metadata):
    return new_code_cell(source, outputs=list(outputs), metadata=metadata)


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def finish(cells):
    for position, cell in enumerate(cells):
        cell.id = f"cell-{position}"
    for position, cell in enumerate(cell for cell in cells if cell.cell_type == "code"):
        cell.execution_count = position + 1
    kernel = {"name": "python3", "display_name": "Python 3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def opening(path):
    badge = form.BADGE.format(address="OWNER/bilevel-lite", path=path)
    setup = code(form.SETUP.format(address="OWNER/bilevel-lite"), tags=["setup"])
    return [
        new_markdown_cell(
            f"# 5. A title\n\n{badge}\n\nYou will build a thing. One minute on a CPU."
        ),
        setup,
    ]


def good_chapter():
    title, setup = opening("chapters/05_toy.ipynb")
    picture = new_output(
        "display_data",
        data={"image/png": "aaaa", "text/plain": "<Figure size 500x300 with 1 Axes>"},
    )
    return finish(
        [
            title,
            new_markdown_cell("## Objectives\n\n- derive it\n\n**Prerequisites.** Chapter 4."),
            setup,
            new_markdown_cell("## 5.1 What is it?"),
            *[code(f"x = {k}\nprint(x)", printed(f"{k}\n")) for k in range(16)],
            code("plt.plot([1, 2])\nplt.show()", picture),
            new_markdown_cell("The line goes up from left to right."),
            code(
                "assert x == 15\nprint('2.31 s')", printed("2.31 s\n"), tags=["nbval-ignore-output"]
            ),
            new_markdown_cell("## When it fails"),
            code("y = 1"),
            new_markdown_cell(
                "## Exercises\n\n### Exercise 5.1 (difficulty 2/5, about 15 min)\n\nDo it."
            ),
            code(
                'answer = None\nbl.exercises.check("5.1", answer)', printed("not attempted yet\n")
            ),
            new_markdown_cell("## Summary\n\n- it is so"),
            new_markdown_cell("## References\n\n- somebody"),
        ]
    )


def good_solution():
    title, setup = opening("chapters/solutions/05_toy_solutions.ipynb")
    heading = new_markdown_cell("### Exercise 5.1")
    return finish(
        [title, setup, heading, code('bl.exercises.check("5.1", 1)', printed("correct\n"))]
    )


@pytest.fixture
def chapter(tmp_path, monkeypatch):
    monkeypatch.setattr(form, "CONVERTED", ())
    path = tmp_path / "chapters" / "05_toy.ipynb"
    form.solution_of(path).parent.mkdir(parents=True)
    nbformat.write(good_solution(), form.solution_of(path))
    nb = good_chapter()
    nbformat.write(nb, path)
    return nb, path


def find(nb, text):
    return next(cell for cell in nb.cells if text in cell.source)


def replace(old, new):
    def change(nb):
        cell = find(nb, old)
        cell.source = cell.source.replace(old, new)

    return change


def output(*outputs):
    def change(nb):
        find(nb, "x = 3").outputs = list(outputs)

    return change


def tag(*names):
    def change(nb):
        find(nb, "x = 3").metadata["tags"] = list(names)

    return change


def cells(edit):
    """An edit of the list of cells; ids and counts stay right, so that one rule alone is broken."""

    def change(nb):
        nb.cells = finish(edit(nb.cells)).cells

    return change


def at(nb_cells, text):
    return next(k for k, cell in enumerate(nb_cells) if text in cell.source)


def without(text):
    return cells(lambda all_cells: [cell for cell in all_cells if text not in cell.source])


def more_figures(all_cells):
    start = at(all_cells, "plt.plot")
    return all_cells[:start] + [
        copy.deepcopy(cell) for _ in range(7) for cell in all_cells[start : start + 2]
    ]


def swap_closing(all_cells):
    return all_cells[:-2] + all_cells[:-3:-1]


def set_count(nb):
    find(nb, "x = 3").execution_count = None


def set_id(nb):
    find(nb, "x = 3").id = find(nb, "x = 4").id


def set_kernel(nb):
    nb.metadata.kernelspec.name = "private"


def long_median(nb):
    for k in range(16):
        find(nb, f"x = {k}\n").source += "\nx = x" * 12


WIDGET = new_output(
    "display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}
)
BROKEN = {
    "a null count": (set_count, "execution counts"),
    "the same id twice": (set_id, "not unique"),
    "a private kernel": (set_kernel, "kernelspec"),
    "metadata of the notebook": (lambda nb: nb.metadata.update(widgets={}), "metadata of its own"),
    "metadata of a cell": (
        lambda nb: find(nb, "x = 3").metadata.update(collapsed=True),
        "metadata other",
    ),
    "stderr": (output(printed("warning\n", "stderr")), "stderr"),
    "an error": (output(new_output("error", ename="E", evalue="", traceback=[])), "error"),
    "a widget": (output(WIDGET), "widget"),
    "an address": (output(printed("<object at 0x7f3a5c2d1e80>\n")), "memory address"),
    "a home folder": (output(printed("/home/ada/x\n")), "home folder"),
    "a temporary folder": (output(printed("/tmp/x\n")), "temporary folder"),
    "Colab's folder": (output(printed("/content/x\n")), "Colab"),
    "a GPU": (output(new_output("execute_result", data={"text/plain": "device='cuda:0'"})), "CUDA"),
    "a semicolon": (replace("plt.show()", "plt.show();"), "trailing"),
    "a magic": (replace("x = 3\n", "%time x = 3\n"), "magic"),
    "a shell command": (replace("x = 3\n", "!ls\n"), "magic or shell"),
    "a skipped cell": (tag("nbval-skip"), "tags"),
    "a skipping comment": (replace("x = 3\n", "# NBVAL_SKIP\n"), "nbval comment"),
    "an expected error": (tag("raises-exception"), "tags"),
    "nothing asserted": (replace("assert x == 15\n", ""), "without an assert"),
    "an empty cell": (replace("x = 3\nprint(x)", ""), "empty"),
    "a long cell": (replace("x = 3\n", "x = 3\n" * 30), "more than 30"),
    "a long line": (replace("x = 3\n", "x = 3" + " + 0" * 30), "longer than 100"),
    "a long median": (long_median, "median"),
    "the wrong number": (replace("# 5. A", "# 6. A"), "does not begin"),
    "another's badge": (replace("chapters/05_toy", "chapters/06_toy"), "badge"),
    "no line on what is built": (
        replace("You will build a thing. One minute on a CPU.", ""),
        "in a line",
    ),
    "no objectives": (replace("## Objectives", "**Objectives**"), "Objectives"),
    "no prerequisites": (replace("**Prerequisites.**", "Prerequisites:"), "Prerequisites"),
    "another setup cell": (replace("seed=0", "seed=1"), "not the setup cell"),
    "an untagged setup cell": (
        lambda nb: find(nb, "bl.setup").metadata.pop("tags"),
        "the tag `setup`",
    ),
    "two setup cells": (tag("setup"), "the tag `setup`"),
    "a setup cell that prints": (
        lambda nb: find(nb, "bl.setup").outputs.append(printed("hi")),
        "prints",
    ),
    "no failure": (without("## When it fails"), "closing sections"),
    "the wrong order": (cells(swap_closing), "closing sections"),
    "too few cells": (without("print(x)"), "not 20 to 35"),
    "too many cells": (
        cells(lambda all_cells: all_cells + [code("pass") for _ in range(20)]),
        "not 20 to 35",
    ),
    "an unread figure": (without("The line goes up"), "no sentence"),
    "a heading after a figure": (replace("The line goes up", "## The line goes up"), "no sentence"),
    "a stop after a figure": (
        replace("The line goes up", "**Predict (5.A).** Does the line go up"),
        "before it is read",
    ),
    "a heading in the middle": (
        replace("The line goes up from", "It.\n\n## Up\n\nIt is"),
        "middle",
    ),
    "too many figures": (cells(more_figures), "more than 6"),
    "MyST": (replace("Do it.", "```{note}\nDo it.\n```"), "MyST"),
    "a relative picture": (replace("Do it.", "![it](it.png)"), "Colab cannot find"),
    "a link to another file": (replace("Do it.", "[it](../figures/it.md)"), "link to GitHub"),
    "no difficulty": (replace(" (difficulty 2/5, about 15 min)", ""), "is not `Exercise"),
    "no check": (replace("bl.exercises.check", "print"), "no cell calls"),
    "another check": (replace('check("5.1"', 'check("5.2"'), "no cell calls"),
    "an exercise of another chapter": (replace("Exercise 5.1", "Exercise 6.1"), "numbered"),
}


def test_a_good_chapter_and_a_good_solution_pass(chapter):
    nb, path = chapter
    assert form.problems(nb, path) == []
    assert form.problems(good_solution(), form.solution_of(path)) == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_seen(name, chapter):
    nb, path = chapter
    change, complaint = BROKEN[name]
    change(nb)
    assert any(complaint in problem for problem in form.problems(nb, path))


def test_a_chapter_with_a_letter_may_be_shorter(chapter):
    nb, path = chapter
    for count, complaint in ((12, False), (11, True)):
        few = [cell for cell in nb.cells if cell.cell_type == "code"][:count]
        found = form.chapter_problems(nb, path.with_name("05b_toy.ipynb"), few)
        assert any("not 12 to 35" in problem for problem in found) == complaint
        found = form.chapter_problems(nb, path, few)
        assert any("not 20 to 35" in problem for problem in found)


def test_a_missing_solution_is_seen(chapter):
    nb, path = chapter
    form.solution_of(path).unlink()
    assert "no solution" in form.problems(nb, path)[0]


def test_a_large_file_is_seen(chapter):
    nb, path = chapter
    path.write_text(" " * 400_001)
    assert "400" in form.problems(nb, path)[0]


def test_an_unchecked_solution_is_seen(chapter):
    nb, path = good_solution(), form.solution_of(chapter[1])
    nb.cells[-1].source = "print('correct')"
    assert "no cell calls" in form.problems(nb, path)[0]


def test_normalising_twice_changes_nothing_more(chapter):
    import book

    nb = book.normalise(chapter[0])
    once = book.dumps(nb)
    assert book.dumps(book.normalise(nbformat.reads(once, as_version=4))) == once
    assert form.problems(nb, chapter[1]) == []


# The newer anatomy, which holds for the chapters in form.CONVERTED.


@pytest.fixture
def converted(chapter, monkeypatch):
    monkeypatch.setattr(form, "CONVERTED", ("05",))
    nb, path = chapter
    link = "[Solutions](solutions/05_toy_solutions.ipynb)"
    title, aims, setup, *rest = nb.cells
    stated = "about 5 minutes\n(core), 10 with *Going deeper*; exercises: 15 minutes."
    title.source += f"\n\n{link}\n\nReading: {stated}"

    def stop(name):
        check = f'guess = None\nbl.exercises.check("{name}", guess)'
        return [
            new_markdown_cell(f"**Predict ({name}).** Which is larger?"),
            code(check, printed("not attempted yet\n")),
        ]

    deeper = {"metadata": {"tags": ["deeper"]}}
    added = [
        *stop("5.A"),
        code("bl.drawings.ch05.layer()\nplt.show()"),
        *stop("5.B"),
        new_markdown_cell("### Going deeper: why\n\n" + "word " * 300 + "\n\n$$1$$", **deeper),
        code("z = 1  # deep", tags=["deeper"]),
        new_markdown_cell("### Going deeper: more\n\n$$\n2\n$$", **deeper),
    ]
    rest = [cell for cell in rest if "x = 7" not in cell.source]
    return finish([title, aims, setup, *rest[:-5], *added, *rest[-5:]]), path


def test_a_good_converted_chapter_passes(converted):
    assert form.problems(*converted) == []


def untag(text):
    def change(nb):
        find(nb, text).metadata.pop("tags")

    return change


CONVERTED = {
    "no second stop": (without("(5.B)"), "the stops are"),
    "stops in the wrong order": (
        lambda nb: [replace("(5.A)", "(5.C)")(nb), replace('"5.A"', '"5.C"')(nb)],
        "the stops are",
    ),
    "a stop without a question": (replace(" Which is larger?", ""), "the stops are"),
    "a stop that checks nothing": (replace('"5.A"', '"5.B"'), "does not check"),
    "no drawing": (without("bl.drawings"), "drawing"),
    "no link to the solutions": (replace("[Solutions](", "("), "link to the solutions"),
    "a cell of 25 lines": (replace("x = 3\n", "x = 3\n" * 24), "more than 24"),
    "Going deeper without the tag": (untag("deeper: more"), "has no tag"),
    "Going deeper at another level": (replace("### Going deeper: m", "## Going deeper: m"), "###"),
    "a tag without a block": (tag("deeper"), "no block begins"),
    "a heading inside a block": (replace("$$1$$", "#### Aside"), "a heading inside"),
    "a heading inside a block, later": (replace("$$\n2", "## Aside\n\n$$\n2"), "a heading inside"),
    "no minutes": (replace("Reading: about", "Reading takes"), "does not say"),
    "too few minutes": (replace("about 5 minutes", "about 2 minutes"), "minutes (core)"),
    "too many minutes": (replace("5 minutes\n(core), 10", "5 minutes\n(core), 30"), "with Going"),
    "other minutes of exercises": (replace("exercises: 15", "exercises: 25"), "exercises"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_a_broken_rule_of_the_newer_anatomy_is_seen(name, converted, monkeypatch):
    nb, path = converted
    change, complaint = CONVERTED[name]
    change(nb)
    assert any(complaint in problem for problem in form.problems(nb, path))
    monkeypatch.setattr(form, "CONVERTED", ())
    assert not any(complaint in problem for problem in form.problems(nb, path))


def test_minutes_are_counted_as_the_rule_says():
    deep = {"metadata": {"tags": ["deeper"]}}
    references = new_markdown_cell("## References\n\n" + "word " * 300)
    cells = [
        new_markdown_cell("# A title\n\n" + "word " * 148),  # 150 words: one minute
        code("setup = 1\n" * 90, tags=["setup"]),
        new_markdown_cell("$$x$$\n\n\\begin{align*}\ny\n\\end{align*}"),  # two equations: three
        code("a = 1\n\n" * 18),  # two minutes
        code("hidden = 1\n" * 90, tags=["hide-input"]),
        new_markdown_cell("### Going deeper: x\n\n$$y$$" + " $a + b$" * 147, **deep),  # 150, one
        new_markdown_cell(
            "## Exercises\n\n### Exercise 5.1 (difficulty 1/5, about 7 min)\n\n$$1$$"
        ),
        new_markdown_cell("### Exercise 5.2 (difficulty 1/5, about 8 min)"),
        references,
    ]
    core, all_of_it, exercises = form.minutes(finish(cells))
    assert (core, all_of_it, exercises) == pytest.approx((6, 8.5, 15))


def test_blocks_that_follow_each_other_are_two():
    deep = {"metadata": {"tags": ["deeper"]}}
    one, two = (new_markdown_cell(f"### Going deeper: {k}", **deep) for k in "ab")
    cells = [one, code("1", tags=["deeper"]), two, new_markdown_cell("On."), code("2")]
    assert form.deeper_blocks(finish(cells)) == [range(0, 2), range(2, 3)]
    assert form.deeper_blocks(finish(cells[:3])) == [range(0, 2), range(2, 3)]
