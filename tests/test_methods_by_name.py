"""Methods by their command-line names: their own options are settings of the same name."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite.experiment.methods import METHODS, OWN, STEP, build
from bilevel_lite.experiment.settings import Settings
from bilevel_lite.tasks.cleaning_comparison import SPACES


@dataclass
class Made:
    """A task of two numbers, as far as a method needs one."""

    problem: Any
    lam0: Any
    theta0: Any
    project: Any = None

    def batches(self, s):
        return {f"{role}_batch": None for role in ("inner", "outer", "curvature", "cross")}

    def fixed_batches(self, s):
        return [None], [None]

    def attach(self, method, s):
        pass


def made():
    def g(lam, theta, batch):
        return (lam * theta.square()).sum()

    problem = bl.BilevelProblem(g, lambda lam, theta, batch: theta.square().sum())
    return Made(problem, torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("name", [name for name in METHODS if "kfac" not in name])
def test_a_method_by_name_reads_its_own_options(name):
    recipe = METHODS[name]
    if recipe.more is not None or name == "aid-pcg":
        return
    for option, known in recipe.own.items():
        assert OWN[option][name] == known
        value = known.search[0] if known.search else known.default / 2
        method = build(Settings(method=name, **{option: value}), made())
        assert getattr(method, option) == value
        for follower, leader in recipe.tied.items():
            if leader == option:
                assert getattr(method, follower) == value
    others = [option for option in OWN if option not in recipe.own]
    with pytest.raises(ValueError, match=f"{others[0]}: is no option of {name}; it is one of"):
        build(Settings(method=name, **{others[0]: 0.1}), made())


def test_the_search_takes_its_ranges_from_the_options():
    for name, space in SPACES.items():
        for option in set(space) & set(OWN):
            assert space[option] == METHODS[name].cls.options()[option].search
        for option, read in METHODS[name].options.items():
            if (
                read is STEP and "step" in space and name != "amigo-kfac"
            ):  # its step is in G's units
                assert space["step"] == METHODS[name].cls.options()[option].search
    assert {option for space in SPACES.values() for option in space} & set(OWN)
