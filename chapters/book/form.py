"""The form of a chapter: where chapters lie, how their kernels are set up, what their cells obey.

`problems(nb, path)` returns sentences, one for each broken rule; an empty list says that all is
well. Nothing here runs a notebook. `pytest --nbval` compares outputs, but passes cells that were
never run, unknown magics and wrong pictures in silence; these rules close such holes and keep the
anatomy of the chapters the same throughout.
"""

import os
import re
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"(\d\d[a-z]?)_[a-z0-9_]+\.ipynb")

# One thread a kernel: on a busy machine, threads that wait for each other cost more than they gain.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "BILEVEL_LITE_PROGRESS": "0",
}

SETUP = """\
import importlib.util
if importlib.util.find_spec("bilevel_lite") is None:  # on Colab: fetch the package
    %pip install -q "bilevel-lite @ git+https://github.com/{address}@main"
import matplotlib.pyplot as plt
import torch

import bilevel_lite as bl

device = bl.setup(seed=0)"""

BADGE = (
    "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    "(https://colab.research.google.com/github/{address}/blob/main/{path})"
)

CLOSING = ["When it fails", "Exercises", "Summary", "References"]
# hide-input: machinery, folded in the site; deeper: part of a *Going deeper* block, folded there
TAGS = {"setup", "nbval-ignore-output", "hide-input", "deeper"}
EXERCISE = re.compile(r"Exercise (\d+[a-z]?\.\d+) \(difficulty [1-5]/5, about \d+ min\)")
# Chapters that have been rewritten to the newer anatomy ("06"): `converted_problems`, and
# chapters/NOTATION.md in tests/test_notation.py, hold for these.
CONVERTED = (
    "00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "09b", "10", "11", "12", "13",
    "13b", "14", "15", "16", "17", "18", "19",
)  # fmt: skip
# Lines of the median code cell that shows something: no setup, folded cell, stop or exercise (their
# stubs of three lines would halve it). Chapters have 8 to 13: this keeps them from growing longer.
LONGEST = 13
DEEPER = "### Going deeper: "
MINUTES = re.compile(
    r"Reading: about (\d+) minutes? \(core\)(?:, (\d+) with \*Going deeper\*)?"
    r"; exercises: (?:about )?(\d+) minutes?"
)
CHECK_CALL = re.compile(r"bl\.exercises\.check\(\s*[\"']([^\"']+)[\"']")
FORBIDDEN_TEXT = {
    "a memory address": r"0x[0-9a-f]{6,}",
    "a home folder": r"/(?:home|root|Users)/|[A-Z]:\\Users",
    "a temporary folder": r"/tmp/|/var/folders/|ipykernel_\d+",
    "a path on Colab": r"/content/",
    "a CUDA device": r"cuda:\d",
}


def set_environment() -> None:
    """Prepare this process, and so the kernels it starts, for reproducible runs."""
    os.environ.update(ENVIRONMENT)
    os.environ.pop("MPLBACKEND", None)  # or no figure would appear inline


def chapters(root: Path = ROOT) -> list[Path]:
    """All chapters, in order."""
    return sorted(p for p in (root / "chapters").glob("*.ipynb") if NAME.fullmatch(p.name))


def solutions(root: Path = ROOT) -> list[Path]:
    """All solution notebooks, in order."""
    return sorted(
        p for p in (root / "chapters" / "solutions").glob("*.ipynb") if NAME.fullmatch(p.name)
    )


def is_solution(path: Path) -> bool:
    """Whether this is a notebook of solutions."""
    return path.parent.name == "solutions"


def solution_of(path: Path) -> Path:
    """Where the solutions to a chapter's exercises lie."""
    return path.parent / "solutions" / f"{path.stem}_solutions.ipynb"


def number(path: Path) -> str:
    """The chapter's number as it is written: `5` for `05_kfac.ipynb`, `3b` for `03b_more.ipynb`."""
    return NAME.fullmatch(path.name)[1].removeprefix("0")


def address(root: Path = ROOT) -> str:
    """The repository's address, `owner/name`, which pyproject.toml holds."""
    return re.search(
        r'Homepage = "https://github\.com/([^"]+)"', (root / "pyproject.toml").read_text()
    )[1]


def headings(cell) -> list[tuple[int, str]]:
    """The headings of a Markdown cell, as (level, text); code blocks are passed over."""
    found, fenced = [], False
    for line in cell["source"].splitlines() if cell["cell_type"] == "markdown" else []:
        fenced ^= line.lstrip().startswith("```")
        if not fenced and (match := re.match(r"(#+) +(.+?)\s*$", line)):
            found.append((len(match[1]), match[2]))
    return found


def lines(cell) -> int:
    """The number of lines that are not blank."""
    return sum(1 for line in cell["source"].splitlines() if line.strip())


def tags(cell) -> list[str]:
    """The cell's tags."""
    return cell["metadata"].get("tags", [])


def figures(cell) -> int:
    """The number of pictures below a cell."""
    outputs = cell.get("outputs", [])
    return sum(any(mime.startswith("image/") for mime in out.get("data", {})) for out in outputs)


def is_shown(cell) -> bool:
    """Whether a code cell is neither setup nor folded nor the stub of a stop or an exercise."""
    return not ({"setup", "hide-input"} & set(tags(cell)) or CHECK_CALL.search(cell["source"]))


def texts(cell) -> list[str]:
    """All text below a cell."""
    found = []
    for out in cell.get("outputs", []):
        found.append(str(out.get("text", "")) + "\n".join(out.get("traceback", [])))
        found += [
            str(value)
            for mime, value in out.get("data", {}).items()
            if mime[:6] != "image/" or "svg" in mime
        ]
    return found


def problems(nb, path: Path) -> list[str]:
    """Every rule that the notebook `nb`, stored at `path`, breaks."""
    code = [cell for cell in nb["cells"] if cell["cell_type"] == "code"]
    found = file_problems(nb, path, code) + opening_problems(nb, path, code)
    for position, cell in enumerate(nb["cells"]):
        complaints = markdown_problems(cell) if cell["cell_type"] != "code" else code_problems(cell)
        found += [f"cell {position} ({cell.get('id')}): {complaint}" for complaint in complaints]
    return found + (
        solution_problems(nb, path) if is_solution(path) else chapter_problems(nb, path, code)
    )


def file_problems(nb, path: Path, code) -> list[str]:
    """The file as a whole: size, metadata, ids, execution counts."""
    found = []
    if path.exists() and path.stat().st_size > 400_000:
        found.append(f"the file has {path.stat().st_size // 1000} KB, more than 400")
    if nb["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("the kernelspec is not python3")
    if set(nb["metadata"]) - {"kernelspec", "language_info"}:
        found.append("the notebook has metadata of its own: run `make execute`")
    ids = [cell.get("id") for cell in nb["cells"]]
    if None in ids or len(set(ids)) < len(ids):
        found.append("the ids of the cells are not unique")
    if [cell.get("execution_count") for cell in code] != list(range(1, len(code) + 1)):
        found.append("the execution counts are not 1 to n: run `make execute`")
    return found


def opening_problems(nb, path: Path, code) -> list[str]:
    """The title with its badge, and the setup cell."""
    found = []
    title = (
        nb["cells"][0]["source"]
        if nb["cells"] and nb["cells"][0]["cell_type"] == "markdown"
        else ""
    )
    if not re.match(rf"# {number(path)}\. \S", title):
        found.append(f"the first cell does not begin with `# {number(path)}. Title`")
    stored = f"chapters/solutions/{path.name}" if is_solution(path) else f"chapters/{path.name}"
    badge = re.escape(BADGE.format(address="@", path=stored)).replace("@", r"[\w.-]+/[\w.-]+")
    if not re.search(badge, title):
        found.append(f"the first cell has no Colab badge that opens {stored}")
    if len([line for line in title.splitlines() if line.strip()]) < 3:
        found.append("the first cell does not say in a line what will be built")
    setup = code[0] if code else {"source": "", "metadata": {}, "outputs": []}
    plain = re.sub(
        r"github\.com/[\w.-]+/[\w.-]+@", "github.com/{address}@", setup["source"].strip()
    )
    if plain != SETUP:
        found.append(
            "the first code cell is not the setup cell that all chapters share (see form.py)"
        )
    if [cell for cell in code if "setup" in tags(cell)] != code[:1]:
        found.append("the first code cell, and no other, carries the tag `setup`")
    if lines(setup) > 12 or setup["outputs"]:
        found.append("the setup cell has more than 12 lines or prints something")
    return found


def markdown_problems(cell) -> list[str]:
    """Only what GitHub, Jupyter and Colab all show; Colab opens a notebook without its folder."""
    found = []
    if not cell["source"].startswith("#") and any(level in (2, 3) for level, _ in headings(cell)):
        found.append("a heading in the middle: begin a cell with it")
    if re.search(r"^\s*(```\{|:::)", cell["source"], re.MULTILINE):
        found.append("a MyST directive, which Colab shows as plain text")
    if re.search(r"!\[[^]]*\]\((?!https://)", cell["source"]) or cell.get("attachments"):
        found.append("a picture without an https address, which Colab cannot find")
    for target in re.findall(r"\]\((?!https?://|#)([^)\s]+)\)", cell["source"]):
        if not NAME.fullmatch(Path(target.partition("#")[0]).name):
            found.append(f"a link to {target}: the book holds notebooks only; link to GitHub")
    return found


def code_problems(cell) -> list[str]:
    """One code cell with its outputs."""
    found, source = [], cell["source"]
    if not source.strip():
        found.append("empty")
    if lines(cell) > 30:
        found.append(f"{lines(cell)} lines, more than 30")
    for line in source.splitlines():
        if line.rstrip().endswith(";"):
            found.append("a trailing `;`, which nbval prints differently: end with plt.show()")
        if line.lstrip().startswith(("%", "!")) and not line.lstrip().startswith("%pip "):
            found.append(f"a magic or shell command other than %pip: {line.strip()}")
        if len(line) > 100 and "setup" not in tags(cell):
            found.append("a line longer than 100 characters")
    if "NBVAL_" in source:
        found.append("an nbval comment: use the tag, which readers do not see")
    if set(tags(cell)) - TAGS or set(cell["metadata"]) - {"tags"}:
        found.append(f"metadata other than the tags {sorted(TAGS)}")
    if "nbval-ignore-output" in tags(cell) and not re.search(r"\bassert(_\w+)?\b", source):
        found.append("tagged nbval-ignore-output without an assert")
    for out in cell.get("outputs", []):
        if out["output_type"] == "error" or out.get("name") == "stderr":
            found.append("stored an error or stderr")
        if any("widget" in mime for mime in out.get("data", {})):
            found.append("stored a widget")
    for name, pattern in FORBIDDEN_TEXT.items():
        if any(re.search(pattern, text) for text in texts(cell)):
            found.append(f"{name} in the output")
    return found


def chapter_problems(nb, path: Path, code) -> list[str]:
    """The anatomy of a chapter."""
    found, cells = [], nb["cells"]
    second = cells[1] if len(cells) > 1 else {"source": "", "cell_type": ""}
    if (2, "Objectives") not in headings(second) or "**Prerequisites.**" not in second["source"]:
        found.append("the second cell lacks `## Objectives` or `**Prerequisites.**`")
    closing = [
        text for cell in cells for level, text in headings(cell) if level == 2 and text in CLOSING
    ]
    if closing != CLOSING:
        found.append(f"the closing sections are {closing}, not {CLOSING}")
    least = 20 if number(path).isdigit() else 12  # a chapter with a letter is a page beside one
    if not least <= len(code) <= 35:
        found.append(f"{len(code)} code cells, not {least} to 35")
    shown = [lines(cell) for cell in code if is_shown(cell)]
    if shown and median(shown) > LONGEST:
        found.append(f"the median code cell has {median(shown)} lines, more than {LONGEST}")
    if sum(map(figures, cells)) > 6:
        found.append(f"{sum(map(figures, cells))} figures, more than 6")
    for cell, after in zip(cells, cells[1:] + [None], strict=True):
        prose = after["source"].strip() if after and after["cell_type"] == "markdown" else ""
        if figures(cell) and (prose.startswith("#") or len(prose.split()) < 5):
            found.append(f"cell {cell.get('id')}: no sentence reads its figure in the next cell")
        if figures(cell) and prose.startswith("**Predict"):
            found.append(f"cell {cell.get('id')}: a stop follows its figure before it is read")
    if NAME.fullmatch(path.name)[1] in CONVERTED:
        found += converted_problems(nb, path, code)
    return found + exercise_problems(nb, path)


def deeper_blocks(nb) -> list[range]:
    """Where the blocks *Going deeper* stand: a cell that begins one, and the tagged ones below."""
    found, start = [], None
    for position, cell in enumerate([*nb["cells"], None]):
        goes_on = cell is not None and "deeper" in tags(cell)
        begins = goes_on and cell["cell_type"] == "markdown" and cell["source"].startswith(DEEPER)
        if start is not None and (begins or not goes_on):
            found.append(range(start, position))
            start = None
        if goes_on and start is None:
            start = position
    return found


def converted_problems(nb, path: Path, code) -> list[str]:
    """The newer anatomy: two stops, a drawing, *Going deeper*, short cells, honest minutes."""
    found = stop_problems(nb, path)
    if not any("bl.drawings." in cell["source"] for cell in code):
        found.append("no cell calls a drawing: bl.drawings.chNN.name()")
    if f"](solutions/{solution_of(path).name})" not in "".join(
        cell["source"] for cell in nb["cells"][:3]
    ):
        found.append("no link to the solutions notebook at the start")
    for cell in code:
        if lines(cell) > 24:
            found.append(f"cell {cell.get('id')}: {lines(cell)} lines, more than 24")
    for block in deeper_blocks(nb):
        first, *rest = (nb["cells"][position] for position in block)
        if first["cell_type"] != "markdown" or not first["source"].startswith(DEEPER):
            found.append(f"cell {first.get('id')}: tagged deeper, but no block begins here")
        for cell in [first, *rest]:
            if len(headings(cell)) > (cell is first):
                found.append(f"cell {cell.get('id')}: a heading inside a block Going deeper")
    for cell in nb["cells"]:
        if any(text.startswith("Going deeper") for _, text in headings(cell)):
            if not cell["source"].startswith(DEEPER) or "deeper" not in tags(cell):
                found.append(f"cell {cell.get('id')}: does not begin `{DEEPER}...` or has no tag")
    return found + minute_problems(nb)


def stop_problems(nb, path: Path) -> list[str]:
    """Two stops, N.A and N.B, each a question and a cell that checks a guess."""
    found, stops = [], []
    for cell, after in zip(nb["cells"], [*nb["cells"][1:], None], strict=True):
        if cell["cell_type"] == "markdown" and cell["source"].startswith("**Predict"):
            match = re.match(r"\*\*Predict \((\d+[a-z]?\.[A-Z])\)\.\*\* \S", cell["source"])
            stops.append(match[1] if match else cell["source"].splitlines()[0])
            if after is None or stops[-1] not in CHECK_CALL.findall(after["source"]):
                found.append(f"stop {stops[-1]}: the next cell does not check a guess for it")
    if stops != [f"{number(path)}.A", f"{number(path)}.B"]:
        found.append(f"the stops are {stops}, not {number(path)}.A and {number(path)}.B")
    return found


def words_equations(source: str) -> tuple[int, int]:
    """Words and displayed equations of a Markdown cell; a formula in a line counts as a word."""
    displayed = r"\$\$.*?\$\$|\\begin\{(equation|align)(\*?)\}.*?\\end\{\1\2\}"
    rest = re.sub(displayed, " ", source, flags=re.DOTALL)
    rest = re.sub(r"\]\([^)]*\)|<[^>]+>", "] ", rest)
    rest = re.sub(r"\$[^$]+\$", "formula", rest)
    words = [word for word in rest.split() if re.search(r"\w", word)]
    return len(words), len(re.findall(displayed, source, re.DOTALL))


def minutes(nb) -> tuple[float, float, int]:
    """What a chapter takes: to read its core, to read all of it, and its exercises, as they say.

    150 words a minute, 1.5 minutes a displayed equation, 9 lines of code a minute. The setup cell,
    folded code, the exercises and the references are not counted as reading.
    """
    core = deep = exercise = 0
    section = ""
    for cell in nb["cells"]:
        for level, text in headings(cell):
            section = text if level <= 2 else section
            if match := re.search(r"about (\d+) min\)", text):
                exercise += int(match[1])
        if section in ("Exercises", "References") or {"setup", "hide-input"} & set(tags(cell)):
            continue
        if cell["cell_type"] == "markdown":
            words, equations = words_equations(cell["source"])
            spent = words / 150 + 1.5 * equations
        else:
            spent = lines(cell) / 9
        core, deep = core + spent * ("deeper" not in tags(cell)), deep + spent
    return core, deep, exercise


def minute_problems(nb) -> list[str]:
    """The title says how long the chapter takes, to within 10 % of what its text gives."""
    stated = MINUTES.search(" ".join(nb["cells"][0]["source"].split()))
    core, deep, exercise = minutes(nb)
    if not stated:
        return [
            "the title does not say `Reading: about X minutes (core), Y with *Going deeper*; "
            f"exercises: Z minutes`; counted: {core:.0f}, {deep:.0f}, {exercise}"
        ]
    found, said = [], (stated[1], stated[2] or stated[1], stated[3])
    for what, says, counted in zip(
        ("core", "with Going deeper", "exercises"), said, (core, deep, exercise), strict=True
    ):
        if abs(int(says) - counted) > 0.1 * counted:
            found.append(f"minutes ({what}): the title says {says}, counted {counted:.0f}")
    return found


def exercises(nb) -> dict[str, list[str]]:
    """For each heading that begins with `Exercise`, the numbers of the checks called below it."""
    found, current = {}, None
    for cell in nb["cells"]:
        for _, text in headings(cell):
            current = text if text.startswith("Exercise ") else None
            if current:
                found[current] = []
        if current and cell["cell_type"] == "code":
            found[current] += CHECK_CALL.findall(cell["source"])
    return found


def exercise_problems(nb, path: Path) -> list[str]:
    """Every exercise has a number, a difficulty, a time, a check and a solution."""
    found, given = [], exercises(nb)
    numbers = [match[1] for text in given if (match := EXERCISE.fullmatch(text))]
    for text, checks in given.items():
        match = EXERCISE.fullmatch(text)
        if not match:
            found.append(f"`{text}` is not `Exercise N.k (difficulty d/5, about m min)`")
        elif match[1] not in checks:
            found.append(
                f'exercise {match[1]}: no cell calls bl.exercises.check("{match[1]}", ...)'
            )
    if not numbers or numbers != [f"{number(path)}.{k + 1}" for k in range(len(numbers))]:
        found.append(
            f"the exercises are numbered {numbers}, not {number(path)}.1, {number(path)}.2, ..."
        )
    solution = solution_of(path)
    solved = solution.read_text(encoding="utf-8") if solution.exists() else ""
    for name in numbers:
        if not re.search(rf"### Exercise {re.escape(name)}\b", solved):
            found.append(f"exercise {name} has no solution in solutions/{solution.name}")
    return found


def solution_problems(nb, path: Path) -> list[str]:
    """Every solution is held against the check of its exercise."""
    found = []
    if not path.stem.endswith("_solutions"):
        found.append("the name does not end in _solutions.ipynb")
    for text, checks in exercises(nb).items():
        match = re.match(r"Exercise (\d+[a-z]?\.\d+)\b", text)
        if not match or match[1] not in checks:
            found.append(f"`{text}`: no cell calls bl.exercises.check with its number")
    return found
