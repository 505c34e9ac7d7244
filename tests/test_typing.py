"""What a type checker sees of the package: no name that does not exist, a tensor or a pair."""

import inspect
import subprocess
import sys
from importlib import resources
from typing import get_type_hints

import pytest

import bilevel_lite as bl

try:  # from Python 3.11
    from typing import get_overloads
except ImportError:
    get_overloads = None

GOOD = """
import torch
from torch import Tensor

import bilevel_lite as bl


def g(lam: Tensor, theta: Tensor, batch: None) -> Tensor:
    return (lam * theta**2).sum()


def f(lam: Tensor, theta: Tensor, batch: None) -> Tensor:
    return theta.sum()


problem = bl.BilevelProblem(g, f)
lam, theta = torch.ones(3), torch.ones(3)
norm: Tensor = bl.hypergradient(problem, lam, theta, solver=bl.CG(3)).norm()
h, info = bl.hypergradient(problem, lam, theta, solver=bl.KFAC(0.1), return_info=True)
cost: float = info.gradients + h.norm().item()
u: Tensor = bl.unrolled_hypergradient(problem, lam, theta, 3, 0.1)
u, unroll = bl.unrolled_hypergradient(problem, lam, theta, 3, 0.1, return_info=True)
stored: int = unroll.stored


def either(info: bool) -> None:
    out = bl.hypergradient(problem, lam, theta, return_info=info)
    assert isinstance(out, tuple)


d: Tensor = bl.finite_difference_hypergradient(problem, lam, lambda lam: theta)
method = bl.AID(problem, lam, theta, solver=bl.CG(3), inner_steps=10, inner_lr=0.1, outer_lr=1.0)
loss = method.step().outer_loss
other = bl.NHGD(problem, lam, theta, inner_lr=0.3, outer_lr=0.1)
dataset = bl.data.load("digits")
model = bl.models.build("linear", 64, 10)
flat: Tensor = bl.flatten(model)
"""
# each line -> a word of the complaint
BAD = {
    "bl.nosuch": "nosuch",
    "bl.CG()": "iters",
    "bl.CGNormal()": "iters",
    "bl.Neumann(3)": "step",
    "bl.Identity()": "step",
    "bl.data.nosuch": "nosuch",
    "bl.hypergradient(problem, lam, theta, damping=3)": "hypergradient",
    "bl.hypergradient(problem, lam, theta).gradients": "gradients",
    "bl.hypergradient(problem, lam, theta, return_info=True).norm()": "norm",
    "bl.unrolled_hypergradient(problem, lam, theta, 3, 0.1, return_info=True).norm()": "norm",
    "bl.finite_difference_hypergradient(problem, lam, eps=1)": "solve_inner",
}


def mypy(folder, text):
    """Check a script as a user would, in a folder of its own; the package's own faults are not."""
    pytest.importorskip("mypy")
    (folder / "script.py").write_text(text)
    (folder / "bilevel_lite").symlink_to(resources.files("bilevel_lite"))  # as if installed there
    options = ["--follow-imports", "silent", "--no-error-summary", "--cache-dir", str(folder / "c")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, "script.py"],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_users_script_passes_and_its_faults_are_seen(tmp_path):
    start = GOOD.count("\n") + 1
    found = mypy(tmp_path, GOOD + "\n".join(BAD))
    for i, (line, word) in enumerate(BAD.items()):
        here = [text for text in found if text.startswith(f"script.py:{start + i}: error: ")]
        assert here and any(word in text for text in here), (line, found)
    assert all(int(text.split(":")[1]) >= start for text in found), found


def test_the_package_says_that_it_is_typed():
    assert resources.files("bilevel_lite").joinpath("py.typed").is_file()


def test_every_name_is_there_and_no_other():
    assert len(set(bl.__all__)) == len(bl.__all__)
    assert set(bl._LAZY) < set(bl.__all__) and all(getattr(bl, name) for name in bl.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        bl.nosuch  # noqa: B018


@pytest.mark.skipif(get_overloads is None, reason="Python before 3.11 does not keep overloads")
@pytest.mark.parametrize("function", [bl.hypergradient, bl.unrolled_hypergradient])
def test_overloads_have_the_parameters_of_the_function(function):
    true = inspect.signature(function).parameters
    tensor, pair, either = get_overloads(inspect.unwrap(function))
    for overload in (tensor, pair, either):
        given = inspect.signature(overload).parameters
        assert list(given) == list(true)
        for name, parameter in given.items():
            if name != "return_info":
                assert parameter.default == true[name].default
                assert parameter.annotation == true[name].annotation
    returns = [get_type_hints(overload)["return"] for overload in (tensor, pair, either)]
    assert (
        returns[2] == returns[0] | returns[1] == get_type_hints(inspect.unwrap(function))["return"]
    )
