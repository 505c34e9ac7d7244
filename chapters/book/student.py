"""Make the edition for students: ``student.py [FOLDER]``, by default ``_build/student``.

It holds the chapters and the package, and no answers: no solutions notebooks, no tests, no
sentences that link to solutions, no folds but hints. The checks have to compute the truths; they
come packed, so that nobody reads an answer by opening a file or searching the folder. Who unpacks
them on purpose can: marks are for answers that `grade` has run on fresh draws and a student can
explain (chapters/TEACHING.md).
"""

import base64
import re
import shutil
import sys
import zlib
from pathlib import Path

import form
import nbformat
from book import BUILD, dumps

from bilevel_lite import exercises

ROOT = form.ROOT
FILES = [
    "pyproject.toml", "constraints.txt", "environment.yml", "LICENSE", "LICENSE-text.md",
    "CITATION.cff", "chapters/NOTATION.md",
]  # fmt: skip
TARGETS = {"help", "setup", "$(READY)", "lab"}  # of the Makefile
FOLD = re.compile(r"\n*<details>\s*<summary>(.*?)</summary>.*?</details>", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.!?]) +")

README = """# Hypergradients for bilevel optimisation: student edition

The chapters of `bilevel_lite` and the package that they call, without the solutions.

    make lab      # set up .venv and open the chapters in JupyterLab

Python 3.10 or newer and `make` are enough. Each chapter ends in exercises; a cell with
`bl.exercises.check` says whether an answer is right, on data that it draws itself. Hand in the
notebook (`.ipynb`): it is run again from top to bottom, on other draws, and of each check the last
call counts, so fill in the cell that is there. [Notation](chapters/NOTATION.md).

Without `make`: `python -m venv .venv`, then `.venv/bin/pip install -c constraints.txt -e ".[dev]"`
and `.venv/bin/jupyter lab chapters`. `make lab CPU=1` takes the smaller PyTorch without CUDA. Data
sets are fetched when a chapter asks for them; a folder that holds them already is named by
`BILEVEL_LITE_DATA`.

Code is under MIT (LICENSE), text and figures under CC BY 4.0 (LICENSE-text.md).
"""


def without_answers(text: str) -> str:
    """Markdown without the sentences and links that lead to solutions, and without folds but hints.

    A badge leads to the whole chapter, which has them.
    """
    text = text.replace("; see the solutions)", ")")
    text = re.sub(r"^\[!\[Open In Colab\].*\n*", "", text, flags=re.MULTILINE)
    text = FOLD.sub(lambda fold: fold[0] if "hint" in fold[1].lower() else "", text)
    lines = []
    for line in text.split("\n"):
        if "solutions/" in line or "_solutions.ipynb" in line:
            parts = SENTENCE.split(line)
            line = " ".join(x for x in parts if "solutions/" not in x and "_solutions" not in x)
            if not line:
                continue
        lines.append(line)
    return "\n".join(lines).strip("\n")


def chapter(path: Path):
    """A chapter as students get it: its cells, the Markdown `without_answers`."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata["edition"] = exercises.edition(path.stem.partition("_")[0].lstrip("0") or "0")
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = without_answers(cell.source)
    return nb


def packed(path: Path) -> str:
    """A module of checks that does what it did, and reads as nothing."""
    data = base64.b85encode(zlib.compress(path.read_bytes(), 9)).decode()
    rows = "\n".join(data[k : k + 96] for k in range(0, len(data), 96))
    chapter = path.stem[2:].lstrip("0") or "0"
    return (
        f'"""Checks of chapter {chapter}, packed: they hold what the exercises ask for.'
        '"""\n\nimport base64\nimport zlib\n\n'
        f'EDITION = "{exercises.edition(chapter)}"\n'
        f'_DATA = r"""\n{rows}\n"""\n'
        'exec(zlib.decompress(base64.b85decode("".join(_DATA.split()))).decode("utf-8"))\n'
    )


def makefile() -> str:
    """The Makefile's targets for students."""
    blocks = []
    for block in (ROOT / "Makefile").read_text("utf-8").split("\n\n"):
        target = re.search(r"^([a-z$()A-Z]+):(?!=)", block, re.MULTILINE)
        if target and target[1] not in TARGETS or re.match(r"(# .*\n)*(WORKERS|BASELINE)", block):
            continue
        if block.startswith("help:"):
            block = "\n".join(x for x in block.split("\n") if "@echo" not in x)
        block = re.sub(r"^\.PHONY:.*", ".PHONY: help setup lab", block, flags=re.MULTILINE)
        blocks.append(block.strip("\n"))
    return "\n\n".join(blocks) + "\n"


def build(target: Path = BUILD / "student") -> Path:
    """Write the edition into a folder; what the folder held is gone.

    Raises:
        ValueError: if the folder holds something, and that is no edition.
    """
    if target.exists() and any(target.iterdir()) and not (target / "STUDENT").exists():
        raise ValueError(f"{target} is not empty, and no student edition: name another folder.")
    shutil.rmtree(target, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "_results")
    shutil.copytree(ROOT / "bilevel_lite", target / "bilevel_lite", ignore=ignore)
    shutil.copytree(ROOT / "figures", target / "figures", ignore=ignore)
    (target / "chapters").mkdir()
    for path in form.chapters():
        text = dumps(chapter(path))
        (target / "chapters" / path.name).write_text(text, encoding="utf-8", newline="\n")
    for path in sorted((target / "bilevel_lite" / "exercises").glob("ch*.py")):
        path.write_text(packed(path), encoding="utf-8", newline="\n")
    for name in FILES:
        shutil.copy(ROOT / name, target / name)
    (target / "Makefile").write_text(makefile(), encoding="utf-8", newline="\n")
    (target / "README.md").write_text(README, encoding="utf-8", newline="\n")
    (target / "STUDENT").write_text("Made by `make student`; not to be edited.\n", encoding="utf-8")
    return target


def main() -> int:
    """Build it, and say where it is."""
    try:
        print(build(*map(Path, sys.argv[1:2])))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
