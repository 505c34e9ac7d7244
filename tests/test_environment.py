"""The ways to install agree: conda's file names extras that exist, everything is pinned."""

import re

import yaml
from form import ROOT

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def extras():
    block = re.search(r"\[project\.optional-dependencies\](.*?)\n\[", PYPROJECT, re.DOTALL)[1]
    return dict(re.findall(r"^(\w+) = \[(.*?)\]$", block, re.MULTILINE | re.DOTALL))


def names(text):
    return re.findall(r'"([A-Za-z0-9_-]+)>=', text)


def test_environment_names_extras_that_exist():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    assert {re.match(r"\w+", entry)[0] for entry in plain} >= {"python", "pip", "make"}
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    constraints, editable = pip
    assert constraints == "-c constraints.txt"
    wanted = re.fullmatch(r"-e \.\[([\w,]+)\]", editable)[1].split(",")
    assert set(wanted) == {"test", "notebook", "book"} <= set(extras())


def test_every_dependency_is_pinned_in_the_constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert "torch==2.13.0" in pins
    pinned = {re.match(r"([a-z0-9.-]+)==[\w.]+( ; .+)?$", pin)[1] for pin in pins}
    core = re.search(r"\ndependencies = \[(.*?)\]", PYPROJECT, re.DOTALL)[1]
    for block in [core, *extras().values()]:
        assert {name.lower() for name in names(block)} <= pinned


def test_dependencies_have_lower_bounds_only():
    core = re.search(r"\ndependencies = \[(.*?)\]", PYPROJECT, re.DOTALL)[1]
    assert len(names(core)) == core.count('",') > 5
    assert not re.search(r"==|<|~=|!=", core)


def test_workflows_run_commands_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    said = ""
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in workflow["jobs"].values():
            assert job["runs-on"] == "ubuntu-latest"
            said += "".join(step.get("run", "") + "\n" for step in job["steps"])
    commands = set(re.findall(r"^make (\w+)", said, re.MULTILINE))
    assert commands == {"setup", "repo", "lint", "test", "html"}
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in commands)
