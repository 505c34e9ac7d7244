"""The wheel, installed into a folder that nothing may change: what a user of it sees."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from form import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

import bilevel_lite

# Runs every command line that it is given, one after the other in one process (torch loads slowly).
DRIVER = """
import contextlib, io, json, sys, traceback
from bilevel_lite.__main__ import main
done = []
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as stop:  # --help, --version, unknown words
            code = stop.code
        except BaseException:
            code = traceback.format_exc()
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps({"file": sys.modules["bilevel_lite"].__file__, "done": done}))
"""


def environment(site):
    return {
        **os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1",
        "BILEVEL_LITE_PROGRESS": "0", "BILEVEL_LITE_DEVICE": "cpu",
    }  # fmt: skip


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's content, made read-only."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(wheels)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    command = [sys.executable, *install, *map(str, wheels.glob("*.whl"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in [site, *site.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    yield site
    for path in [site, *site.rglob("*")]:  # or pytest could not remove it
        path.chmod(path.stat().st_mode | 0o200)


def run(site, folder, *commands):
    """Run commands from a folder; for each its status, its output, and what went to stderr."""
    before = contents(site)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=folder, env=environment(site), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert Path(result["file"]).is_relative_to(site)
    assert contents(site) == before  # root may write into a read-only folder
    return result["done"]


SHORT = ["--dataset", "digits", "--outer-steps", "3", "--evaluate-every", "3"]


def test_results_and_figures_go_to_the_current_folder(site, tmp_path):
    (tmp_path / "file").write_text("")
    done = run(
        site,
        tmp_path,
        ["figures"],
        ["hyperclean", *SHORT, "--out", "r1"],
        ["collect", "r1", "--name", "foo"],
        ["figures"],
        ["figures", "hyperclean_mnist_linear", "--to", "other"],
        ["collect", "r1", "--name", "foo", "--to", "file/x"],
        ["figures", "hyperclean_mnist_linear", "--to", "file/x"],
        ["bench", "--publish"],
    )
    code, out, err = done[0]
    assert code == 1 and not out and err.count("\n") == 1
    assert f"{tmp_path / 'figures'} holds no collected result" in err
    assert "hyperclean_mnist_linear" in err
    assert [code for code, _, _ in done[1:5]] == [0, 0, 0, 0]
    assert done[2][1] == f"{tmp_path / 'figures' / 'data' / 'foo.json'}\n"
    assert done[3][1] == f"{tmp_path / 'figures' / 'foo.svg'}\n"
    assert done[4][1] == f"{tmp_path / 'other' / 'hyperclean_mnist_linear.svg'}\n"
    for code, _, err in done[5:]:
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    for _, _, err in done[5:7]:
        assert "cannot be written" in err
    assert "not a checkout" in done[7][2]
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*") if path.is_file()}
    assert there >= {"figures/foo.svg", "other/hyperclean_mnist_linear.svg", "r1/figure.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"file", "figures", "other", "r1"}


@pytest.mark.slow
def test_bench_stores_and_draws_what_it_measured(site, tmp_path):
    words = ["bench", "--models", "linear", "--rounds", "1", "--seconds", "0.01"]
    ((code, out, err),) = run(site, tmp_path, words)
    assert code == 0, err
    data, drawing = (
        tmp_path / "figures" / name for name in ("data/bench_cpu.json", "bench_cpu.svg")
    )
    assert out.endswith(f"{data}\n{drawing}\n")
    (mine,) = json.loads(data.read_text())["runs"]
    assert [case["model"] for case in mine["cases"]] == ["linear"]
    # one axis, as wide as the book's four: drawn from these numbers, not from the book's
    assert drawing.read_text().count('id="axes_') == 1


@pytest.mark.slow
def test_the_other_commands_write_into_their_folder_only(site, tmp_path):
    short = ["--seeds", "1", "--outer-steps", "2"]
    over = ["--method", "aid-identity", "--over", "outer_lr=1:10"]
    done = run(
        site,
        tmp_path,
        ["tasks"],
        ["run", "long_tail", "--method", "aid-cg", "--set", "outer_steps=2", "--out", "r2"],
        ["study", "solvers", "--dataset", "digits", "--only", "identity", *short, "--at",
         "inner_lr=0.1", "outer_lr=10", "--out", "r3"],
        ["search", "long_tail", *over, *short, "--trials", "1", "--search-steps", "2",
         "--out", "r4"],
    )  # fmt: skip
    assert [code for code, _, _ in done] == [0] * 4, done
    assert {path.name for path in tmp_path.iterdir()} == {"r2", "r3", "r4"}


@pytest.mark.slow
def test_methods_are_compared_and_a_strangers_found(site, tmp_path):
    own = (Path(__file__).parent / "stranger_method.py").read_text()
    (tmp_path / "mine.py").write_text(own)
    short = ["--trials", "1", "--search-steps", "2", "--outer-steps", "2", "--seeds", "1"]
    done = run(
        site,
        tmp_path,
        ["hyperclean", "--dataset", "digits", "--method", "aid-cg", "soba", "--trials", "1",
         "--search-budget", "30", "--budget", "30", "--seeds", "1", "--out", "two"],
        ["run", "long_tail", "--method", "mine:HeavyBall", "--linear-lr", "0.1", "--start", "b",
         "--outer-steps", "2", "--out", "own"],
        ["search", "long_tail", "--method", "mine:HeavyBall", "--over", "linear_lr", *short,
         "--out", "found"],
        ["search", "long_tail", "--method", "mine:HeavyBall", "--over", "outer_lr=1:10", *short,
         "--out", "none"],
    )  # fmt: skip
    assert [code for code, _, _ in done] == [0, 0, 0, 1], done
    assert done[-1][2].startswith("error: linear_lr: is not given, expected a positive number")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py", "two", "own", "found"}
    for name, methods in (("two", {"aid-cg", "soba"}), ("found", {"HeavyBall"})):
        found = json.loads((tmp_path / name / "result.json").read_text())["results"]
        assert {one["method"] for one in found} == methods


@pytest.mark.slow
def test_a_submission_is_graded(site, tmp_path):
    setup = "import torch\nimport bilevel_lite as bl\nbl.setup(seed=0)"
    h = "0.1 - lam.exp() * theta * (theta - 1) / (1 + lam.exp())"
    for name, own in (("right", h), ("wrong", f"-({h})")):
        one = f"def one(lam):\n    theta = 3 / (1 + lam.exp())\n    return {own}\n"
        cells = [setup, one + 'bl.exercises.check("1.1", one)']
        title = new_markdown_cell("# 1. The hypergradient")
        nb = new_notebook(cells=[title, *map(new_code_cell, cells)])
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
    ((code, out, err),) = run(site, tmp_path, ["grade", "right.ipynb", "wrong.ipynb"])
    assert code == 0, err
    assert "1.1" in out


def test_the_console_script(site, tmp_path):
    assert (site / "bilevel_lite" / "py.typed").is_file()
    script = site / "bin" / "bilevel-lite"
    done = subprocess.run(
        [sys.executable, str(script), "--version"],
        cwd=tmp_path, env=environment(site), capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == f"bilevel-lite {bilevel_lite.__version__}\n", done.stderr
