"""Chapter 9b: `check` finds each wrong hypergradient of the gallery, and passes the repaired one.

The chapter's own cells are run here, so that what readers see is what is judged.
"""

import re

import form
import matplotlib
import nbformat
import pytest
import torch

import bilevel_lite as bl

(PATH,) = (path for path in form.chapters() if path.name.startswith("09b"))
NB = nbformat.read(PATH, as_version=4)
TEXT = "\n".join(cell.source for cell in NB.cells if cell.cell_type == "markdown")
NAMES = re.findall(r'@slip\("([^"]+)"', "\n".join(c.source for c in NB.cells))
# not needed for the gallery: exercises, pictures, training
PASSED_OVER = ("exercises.check", "plt.show", "def train")


@pytest.fixture(scope="module")
def gallery():
    matplotlib.use("Agg")
    names = {"bl": bl, "torch": torch}
    for cell in NB.cells:
        if (2, "When it fails") in form.headings(cell):
            break
        skip = "setup" in form.tags(cell) or any(text in cell.source for text in PASSED_OVER)
        if cell.cell_type == "code" and not skip:
            exec(cell.source, names)  # noqa: S102
    return names["gallery"]


def test_the_gallery_is_the_one_that_the_text_numbers(gallery):
    numbered = re.findall(r"^\*\*(\d+)\. ", TEXT, re.MULTILINE)
    assert numbered == [str(k + 1) for k in range(len(NAMES))]
    assert list(gallery.h) == NAMES and len(NAMES) == 19
    assert set(gallery.case.values()) <= set(gallery.cases)


@pytest.mark.parametrize("name", NAMES)
def test_check_finds_the_wrong_one_and_passes_the_repaired_one(gallery, name):
    wrong, repaired = gallery.judge(name), gallery.judge(name, repaired=True)
    assert not wrong.passed, str(wrong)
    assert repaired.passed and repaired.faults == (), str(repaired)
    if name in ("running sum", "point not put back"):
        assert wrong.faults  # the number of one call is right, or a multiple of it
    else:
        assert wrong.relative_error_exact > 1e-4


# section 9b.7: (direct, implicit) of those that the fingerprint names, with no rest
NAMED = {"missing direct term": (0, 1), "step left out": (1, 2)}


@pytest.mark.parametrize("name", NAMED)
def test_the_fingerprint_names_the_slip(gallery, name):
    direct, implicit = NAMED[name]
    expected = {"direct": direct, "implicit": implicit, "rest": 0}
    assert gallery.judge(name).shares == pytest.approx(expected, abs=1e-6)


def test_damping_once_is_told_from_damping_twice_by_the_damped_problem(gallery):
    """With the plain problem both differ from the exact one: neither would pass."""
    case = gallery.cases["filter"]
    for options in ({}, {"repaired": True}):
        h = gallery.h["damping twice"](case["lam"], case["theta"], **options)
        assert not bl.check(**case, hypergradient=h, rtol=1e-6, verbose=False).passed
