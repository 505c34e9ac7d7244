"""The house: which module imports which, and how many lines each part may have."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bilevel_lite"
FILES = {
    ".".join(("bilevel_lite", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(name: str) -> set[str]:
    """The package's modules that a module imports, also inside its functions.

    What the package's own ``__init__`` imports on first use, or for a type checker alone, is not
    counted: nobody waits for it.
    """
    found, tree = set(), ast.parse(FILES[name].read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute here"
            # a name of a package is its module, if there is one
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in FILES else node.module)
    return {module for module in found if module in FILES} - {name}


IMPORTS = {name: imported(name) for name in FILES}


def reached(start: str) -> set[str]:
    """All modules that a module imports, directly or not."""
    found, new = set(), {start}
    while new:
        found |= new
        new = set().union(*(IMPORTS[name] for name in new)) - found
    return found


def test_the_imports_are_read_from_the_files():
    assert "bilevel_lite.params" in IMPORTS["bilevel_lite.risk"]
    assert "bilevel_lite.plotting" in IMPORTS["bilevel_lite.session"]  # within a function
    assert "bilevel_lite.algorithms.aid" in reached("bilevel_lite.__main__")


def test_no_circle():
    circles = [
        sorted(b for b in reached(a) if a in reached(b))
        for a in FILES
        if any(a in reached(b) for b in IMPORTS[a])
    ]
    assert not circles, f"these import each other: {circles[0]}"


def test_experiment_knows_no_task():
    for name in FILES:
        if name.startswith("bilevel_lite.experiment"):
            tasks = {other for other in reached(name) if other.startswith("bilevel_lite.tasks")}
            assert not tasks, f"{name} knows {sorted(tasks)}"


# part -> (its files, the lines that it may have in all); None: no limit yet. A limit is what the
# part has now: lower it whenever the part shrinks, raise it on purpose only.
LONG = ("functional", "population", "schedules", "updates")
SEVERAL = ("parallel", "workers")
NOT_CORE = ("__main__", "meta", "models", "plotting", "session", *LONG, *SEVERAL)
NOT_METHODS = ("__init__", "adaptation", "method", "rank_one", "resume")
CORE = [path for path in PACKAGE.glob("*.py") if path.stem not in NOT_CORE]
METHODS = {path.stem: path for path in (PACKAGE / "algorithms").glob("*.py")}
METHODS = {name: path for name, path in METHODS.items() if name not in NOT_METHODS}
PARTS = {
    "core and algorithms": ([*CORE, *(PACKAGE / "algorithms").glob("*.py")], 12909),
    "methods": ([*METHODS.values()], 935),
    "data": ([*(PACKAGE / "data").glob("*.py")], 1444),
    "meta-learning": ([PACKAGE / "meta.py"], 510),
    "long horizons": ([PACKAGE / f"{name}.py" for name in LONG], 757),
    "several processes": ([PACKAGE / f"{name}.py" for name in SEVERAL], 719),
    "experiment": ([*(PACKAGE / "experiment").glob("*.py")], 3802),
    "grading": ([*(PACKAGE / "grading").glob("*.py")], 764),
    "text": ([*(PACKAGE / "text").glob("*.py")], 1173),
    "tasks": ([*(PACKAGE / "tasks").glob("*.py")], 5556),
}
# one file of algorithms/ (here the docstring's example counts too), one of tasks/
LARGEST = {"method": 100, "task": 444}


def lines(path: Path) -> int:
    """Lines of a file, less the examples that end its docstrings (tests/test_docstrings.py)."""
    text = path.read_text("utf-8")
    text = re.sub(r'("""[^"\n]*)\n+ *Example:\n.*?\n *(?=""")', r"\1", text, flags=re.DOTALL)
    return re.sub(r'\n+ *Example:\n.*?(?=\n *""")', "", text, flags=re.DOTALL).count("\n")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_has_no_more_lines_than_it_may(part):
    files, most = PARTS[part]
    total = sum(map(lines, files))
    assert most is None or total <= most, f"{part}: {total} lines, {most} allowed"
    assert most is None or total > 0.9 * most, f"{part}: only {total} lines now, lower its limit"


@pytest.mark.parametrize(
    "path", [*METHODS.values(), *(PACKAGE / "tasks").glob("*.py")], ids=lambda p: p.stem
)
def test_a_method_and_a_task_are_short(path):
    if path.parent.name == "algorithms":
        most, there = LARGEST["method"], path.read_text("utf-8").count("\n")
    else:
        most, there = LARGEST["task"], lines(path)
    assert there <= most, f"{path.name}: {there} lines, {most} allowed"
