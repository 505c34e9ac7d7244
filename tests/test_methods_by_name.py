"""Methods by their command-line names: their own options are settings of the same name."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite.experiment.methods import METHODS, OWN, STEP, build
from bilevel_lite.experiment.settings import LATER, Settings, written
from bilevel_lite.tasks.cleaning_comparison import SPACES


@dataclass
class Made:
    """A task of two numbers, as far as a method needs one."""

    problem: Any
    lam0: Any
    theta0: Any
    project: Any = None
    group: Any = None

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
        value = known.search[0] if known.search else (known.default or 4) / 2
        value = int(value) if name == "itd" else value
        method = build(Settings(method=name, **{option: value}), made())
        assert getattr(method, option) == value
        for follower, leader in recipe.tied.items():
            if leader == option:
                assert getattr(method, follower) == value
    others = [option for option in OWN if option not in recipe.own]
    with pytest.raises(ValueError, match=f"{others[0]}: is no option of {name}; it is one of"):
        build(Settings(method=name, **{others[0]: 0.1}), made())


BAD = {"iters": -1, "step": -1.0, "damping": -1.0, "ema": 1.5, "every": 0, "beta": 1.5,
       "alpha": -1.0}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "setting"),
    [(name, setting) for name, recipe in METHODS.items() for setting in BAD
     if setting in recipe.reads(Settings()) | set(recipe.own)],
)  # fmt: skip
def test_a_number_out_of_range_is_refused_by_the_name_that_was_given(name, setting):
    """Of the setting, not of the option that a method or a solver reads from it."""
    with pytest.raises(ValueError, match=f"^{setting}: got {BAD[setting]}"):
        build(Settings(method=name, **{setting: BAD[setting]}), made())


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


def test_the_inner_optimiser_is_a_setting():
    """Two AdamW steps and a cosine by hand; lam moves by momentum. One number, g = lam theta^2."""
    s = Settings(
        method="aid-identity", inner_optimizer="adamw", inner_schedule="cosine", inner_lr=0.1,
        inner_momentum=0.8, inner_steps=1, outer_steps=4, outer_lr=0.01, outer_momentum=0.5,
    )  # fmt: skip
    method = build(s, made())
    theta, lam, m, a, moved, before = 1.0, 1.0, 0.0, 0.0, 0.0, []
    for k in range(3):
        grad, lr = 2 * lam * theta, 0.1 * (1 + math.cos(math.pi * k / 4)) / 2
        m, a = 0.8 * m + 0.2 * grad, 0.999 * a + 0.001 * grad**2
        theta -= lr * (m / (1 - 0.8 ** (k + 1))) / ((a / (1 - 0.999 ** (k + 1))) ** 0.5 + 1e-8)
        moved = 0.5 * moved - 2 * theta * (s.step * 2 * theta)  # J v = 2 theta v
        lam -= 0.01 * moved
        before.append(method.state_dict())
        method.step()
        assert float((method.theta - theta).abs().max()) < 1e-12
        assert float((method.lam - lam).abs().max()) < 1e-12
    again = build(s, made())
    again.load_state_dict(before[1])
    assert not torch.equal(again.lam, method.lam)
    for _ in range(2):
        again.step()
    assert torch.equal(again.lam, method.lam) and torch.equal(again.theta, method.theta)


def test_an_inner_optimiser_is_refused_where_it_would_not_be_used():
    for name in ("itd", "mrbo", "nbo-cg", "soba"):
        for option, value in (("inner_optimizer", "adamw"), ("inner_schedule", "cosine")):
            with pytest.raises(ValueError, match=f"{option}: got '{value}', but {name} moves"):
                build(Settings(method=name, **{option: value}), made())
    with pytest.raises(ValueError, match="inner_schedule: .*budget=50"):
        build(Settings(method="sama", inner_schedule="cosine", budget=50.0), made())


def test_later_settings_are_written_where_they_are_not_the_default():
    s = Settings()
    assert set(vars(s)) - set(written(s)) == set(LATER)
    assert written(Settings(inner_optimizer="adamw"))["inner_optimizer"] == "adamw"
    assert written(Settings(outer_momentum=0.9)) == {**written(s), "outer_momentum": 0.9}
