"""The examples in the docstrings print what they say, and each public name has one."""

import ast
import doctest
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import reference
import torch

import bilevel_lite as bl

PACKAGE = Path(bl.__file__).parent
NODES = ast.Module, ast.ClassDef, ast.FunctionDef


def examples() -> dict[str, tuple[str, Path, int]]:
    """Where a docstring has an example: name -> (docstring, file, line).

    Read from the files: doctest's own search passes over decorated functions.
    """
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        stem = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            text = ast.get_docstring(node) if isinstance(node, NODES) else None
            if text and ">>>" in text:
                name = f"{stem.removesuffix('.__init__')}.{getattr(node, 'name', '')}".rstrip(".")
                found[name] = text, path, getattr(node, "lineno", 1)
    return found


EXAMPLES = examples()


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name, capsys, monkeypatch):
    monkeypatch.setenv("BILEVEL_LITE_PROGRESS", "0")
    monkeypatch.setenv("BILEVEL_LITE_DEVICE", "cpu")
    text, path, line = EXAMPLES[name]
    names = {"bl": bl, "torch": torch}
    test = doctest.DocTestParser().get_doctest(text, names, name, str(path), line)
    runner = doctest.DocTestRunner(verbose=False)
    threads = torch.get_num_threads()
    try:
        runner.run(test, clear_globs=False)
    finally:
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(threads)
        plt.close("all")
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out


def defined_at(name: str) -> str:
    """The name under which the file has it: ``bilevel_lite.solvers.CG`` for ``CG``."""
    owner, _, last = name.rpartition(".")
    if isinstance(getattr(bl, name, None), type(bl)):
        return f"bilevel_lite.{name}"
    thing = getattr(import_module(f"bilevel_lite.{owner}".rstrip(".")), last)
    return f"{thing.__module__}.{thing.__name__}"


def test_every_name_of_the_reference_has_an_example():
    listed = [name for names in reference.GROUPS.values() for name in names]
    lacking = [name for name in listed if defined_at(name) not in EXAMPLES]
    lacking += [
        name
        for name in reference.MODULES
        if not any(key.startswith(f"bilevel_lite.{name}") for key in EXAMPLES)
    ]
    assert not lacking, f"no example in the docstrings of {lacking}"
    assert len(set(listed)) == len(listed)


def test_every_public_name_is_in_the_reference():
    listed = {name for names in reference.GROUPS.values() for name in names}
    modules = {name for name in bl.__all__ if isinstance(getattr(bl, name), type(bl))}
    assert set(bl.__all__) <= listed | modules
    assert modules <= set(reference.MODULES)
