"""The house: which module imports which, and how many lines each part may have."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "bilevel_lite"
FILES = {
    ".".join(("bilevel_lite", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def imported(name: str) -> set[str]:
    """The package's modules that a module imports, also inside its functions.

    What the package's own ``__init__`` imports on first use is not counted: nobody waits for it.
    """
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
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
