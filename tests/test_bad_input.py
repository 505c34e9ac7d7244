"""Bad input gives one clear sentence that names what came and what was expected."""

import math
from collections import namedtuple
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import data, linsolve, products
from bilevel_lite import problem as problem_module
from bilevel_lite.session import pick_device

LAM, THETA = torch.tensor([0.1, 0.2]), torch.tensor([1.0, -1.0])
MODES = ("reverse", "forward")


def inner(lam, theta, batch):
    return 0.5 * (lam.exp() * theta.square()).sum() - theta.sum()


def outer(lam, theta, batch):
    return 0.5 * theta.square().sum()


def risk(**options):
    return bl.WeightedRisk(torch.nn.Linear(3, 4), **options)


def batch(n=5, x_rows=5, features=3):
    return torch.ones(x_rows, features), torch.arange(n) % 4, torch.arange(n)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((lambda lam, t, b: t, outer), r"inner_loss: returned shape \(2,\), expected a scalar"),
        ((inner, lambda lam, t, b: t), r"outer_loss: returned shape \(2,\), expected a scalar"),
        ((lambda lam, t, b: 1.0, outer), "inner_loss: returned float, expected a scalar tensor"),
        ((lambda lam, t, b: t.square().sum(), outer), "inner_loss: does not depend on lam"),
        ((lambda lam, t, b: lam.sum(), outer), "inner_loss: does not depend on theta"),
        ((inner, lambda lam, t, b: lam.sum()), "outer_loss: does not depend on theta"),
        ((lambda lam, t, b: None, outer), "inner_loss: returned NoneType, expected a scalar"),
        ((inner, lambda lam, t, b: (t.sum(),)), "outer_loss: returned tuple, expected a scalar"),
        ((lambda lam, t, b: t.sum().long(), outer), "inner_loss: returned torch.int64, expected"),
        ((inner, lambda lam, t, b: t.sum() + 0j), "outer_loss: returned torch.complex"),
        ((inner, lambda lam, t, b: torch.tensor(1.0)), "outer_loss: does not depend on lam or"),
        ((lambda lam, t, b: inner(lam, t, b) / 0, outer), "inner_loss: value is -?(inf|nan)"),
    ],
)
@pytest.mark.parametrize("mode", ["auto", "double_backward"])
@pytest.mark.parametrize("solver", [bl.Direct(), bl.CG(2), bl.Identity(0.1)])
def test_losses(losses, message, mode, solver):
    problem = bl.BilevelProblem(*losses)
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(problem, LAM, THETA, solver=solver, cross_mode=mode)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_losses_in_unrolling(mode):
    no_lam = bl.BilevelProblem(lambda lam, t, b: t.square().sum(), outer)
    with pytest.raises(ValueError, match="inner_loss: does not depend on lam"):
        bl.unrolled_hypergradient(no_lam, LAM, THETA, steps=2, lr=0.1, mode=mode)
    problem = bl.BilevelProblem(inner, outer)
    for steps in (400, 1100):  # the iterates overflow, or only their derivative
        with pytest.raises(ValueError, match="value is (inf|nan)|hypergradient: .* NaN or inf"):
            bl.unrolled_hypergradient(problem, LAM, THETA, steps=steps, lr=9.0, mode=mode)
    fixed = bl.BilevelProblem(
        lambda lam, t, b: (t**2 / 2 - lam * t).sum(), lambda lam, t, b: ((t - 1) ** 2).sum()
    )
    with pytest.raises(ValueError, match="NaN or infinite .* is lr above 2 / curvature"):
        bl.unrolled_hypergradient(
            fixed, torch.zeros(2), torch.zeros(2), steps=1100, lr=3.0, mode=mode
        )


@pytest.mark.parametrize("bad", [1.0, None, (1.0,), torch.tensor(1), torch.tensor(1j)])
def test_a_loss_that_is_no_number_in_every_method(bad):
    def none(lam, theta, batch):
        return bad

    for name, problem in (
        ("inner_loss", bl.BilevelProblem(none, outer)),
        ("outer_loss", bl.BilevelProblem(inner, none)),
    ):
        at, rates = (problem, LAM, THETA), {"inner_lr": 0.1, "outer_lr": 0.1}
        methods = bl.BOME(*at, **rates), bl.BVFSM(*at, **rates), bl.SOBA(*at, 0.1, **rates)
        ways = [partial(bl.unrolled_hypergradient, *at, 2, 0.1, mode) for mode in MODES]
        for call in (*ways, *(method.step for method in methods)):
            with pytest.raises(ValueError, match=f"{name}: returned .*, expected a "):
                call()


@pytest.mark.parametrize(
    "solver", [bl.Direct(), bl.CG(2), bl.CGNormal(2), bl.Neumann(2, 0.1), bl.Identity(1.0)]
)
def test_a_theta_without_entries_leaves_the_direct_gradient(solver):
    problem = bl.BilevelProblem(
        lambda lam, t, b: lam.square().sum() + t.square().sum(),
        lambda lam, t, b: lam.square().sum() + t.sum(),
    )
    h = bl.hypergradient(problem, LAM, THETA[:0], solver=solver)
    assert torch.equal(h, 2 * LAM)


@pytest.mark.parametrize("rate", [None, "0.1", [0.1]])
def test_a_rate_that_is_no_number_is_refused(rate):
    problem = bl.BilevelProblem(inner, outer)
    for update in (bl.updates.SGD(lambda lam, t: rate), bl.updates.Adam(lambda lam, t: rate)):
        with pytest.raises(TypeError, match="lr: its function returned .*, expected a number or"):
            bl.unrolled_hypergradient(problem, LAM, THETA, 2, update=update)


@dataclass
class Held:
    x: Any
    y: Any = None


class Carried:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    "wrap", [Held, Carried, lambda x: [Held(x)], lambda x: (1, {"a": Carried(x)}), Carried,
             lambda x: Held(Carried(x))],
)  # fmt: skip
def test_a_batch_made_of_lam_is_refused_wherever_it_is_held(wrap):
    problem, lam = bl.BilevelProblem(inner, outer), LAM.clone().requires_grad_()
    for name in ("inner_batch", "outer_batch"):
        with pytest.raises(ValueError, match=f"{name}: holds a tensor that requires a gradient"):
            bl.hypergradient(problem, LAM, THETA, **{name: wrap(2 * lam)})
    assert problem_module.examples(wrap(torch.ones(7, 2))) == 7


@pytest.mark.parametrize("level", ["inner", "outer"])
def test_a_scheduler_that_is_not_returned_is_refused(level):
    def forgets(optimizer):
        torch.optim.lr_scheduler.StepLR(optimizer, 2)

    with pytest.raises(TypeError, match=f"{level}_scheduler: made NoneType, expected one of"):
        bl.SOBA(
            bl.BilevelProblem(inner, outer), LAM, THETA, 0.1, inner_lr=0.1, outer_lr=0.1,
            **{f"{level}_scheduler": forgets},
        )  # fmt: skip


@pytest.mark.parametrize("rows", [[torch.ones(2)], [[1.0, 0.0]], torch.ones(2, 2).numpy()])
def test_directions_that_are_no_tensor_are_refused(rows):
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(TypeError, match="directions: got .*, expected a tensor, a row for each"):
        bl.finite_difference_hypergradient(problem, LAM, lambda lam: lam, directions=rows)


def test_a_joint_dependence_that_is_zero_is_not_an_error():
    separable = bl.BilevelProblem(
        lambda lam, t, b: lam.square().sum() + 0.5 * t.square().sum(),
        lambda lam, t, b: t.sum() + lam.sum(),
    )
    for mode in ("auto", "double_backward"):
        h = bl.hypergradient(separable, LAM, THETA, cross_mode=mode)
        assert torch.equal(h, torch.ones(2))


@pytest.mark.parametrize(
    ("lam", "theta", "message"),
    [
        (torch.tensor([1, 2]), THETA, "lam: got torch.int64, expected a floating-point tensor"),
        ([0.1, 0.2], THETA, "lam: got list"),
        (LAM, torch.tensor([True, False]), "theta: got torch.bool"),
    ],
)
def test_variables(lam, theta, message):
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(TypeError, match=message):
        bl.hypergradient(problem, lam, theta)
    with pytest.raises(TypeError, match=message):
        bl.AID(problem, lam, theta, bl.CG(1), inner_lr=0.1, outer_lr=0.1)


def test_nan_is_traced_to_where_it_is():
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(ValueError, match="value is nan; theta has 1 entries that are NaN"):
        bl.hypergradient(problem, LAM, torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="value is nan; lam has 2 entries"):
        bl.hypergradient(problem, LAM * float("nan"), THETA, solver=bl.CG(1))
    x, y, index = batch()
    x[2, 1] = float("nan")
    r = risk(weight=lambda lam, b: lam[b[2]])
    with pytest.raises(ValueError, match=r"value is nan; batch\[0\] has 1 entries"):
        products.gradient(r, torch.ones(5), bl.flatten(r.model), (x, y, index))


def test_problem_needs_functions():
    with pytest.raises(TypeError, match="outer_loss: got int, expected a function"):
        bl.BilevelProblem(inner, 3)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (batch(n=4), "x has 5 rows and y has 4"),
        (batch(features=2), r"Linear cannot take x of shape \(5, 2\)"),
        ((torch.ones(5, 3), torch.tensor([0, 1, 2, 3, 4])), "found 4, expected integers from 0"),
        ((torch.ones(5, 3), torch.tensor([0, 1, -1, 3, 2])), "found -1, expected"),
        ((torch.ones(5, 3), torch.rand(5)), "expected integer labels"),
        ((torch.ones(5, 3), torch.ones(5, 4)), "expected integer labels"),
    ],
)
def test_batches(bad, message):
    r = risk()
    with pytest.raises(ValueError, match=message):
        r(LAM, bl.flatten(r.model), bad)


def test_weighted_risk_options_and_weights():
    with pytest.raises(ValueError, match="loss: got 'hinge'"):
        risk(loss="hinge")
    for l2, got in ((-1, "-1"), (float("inf"), "inf"), (float("nan"), "nan"), (LAM[0], "a tensor")):
        with pytest.raises(ValueError, match=f"l2: got {got}"):
            risk(l2=l2)
    with pytest.raises(ValueError, match=r"y has shape \(5,\), expected \(5, 4\)"):
        r = risk(loss="mse")
        r(LAM, bl.flatten(r.model), batch())
    r = risk(weight=lambda lam, b: lam[b[2]])
    with pytest.raises(ValueError, match="lam: has 2 entries, too few for this batch"):
        r(LAM, bl.flatten(r.model), batch())
    r = risk(weight=lambda lam, b: lam)
    with pytest.raises(ValueError, match=r"weight: returned shape \(2,\), expected \(5,\)"):
        r(LAM, bl.flatten(r.model), batch())


def test_params():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"theta: got shape \(5,\), expected \(6,\)"):
        bl.unflatten(model, torch.zeros(5))
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        bl.flatten(model.requires_grad_(False))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bl.CG(0), "iters: got 0, expected an integer of at least 1"),
        (lambda: bl.CG(2.5), "iters: got 2.5"),
        (lambda: bl.Neumann(0, 0.1), "terms: got 0"),
        (lambda: bl.Identity(0), "step: got 0, expected a positive number"),
        (lambda: bl.Identity(float("nan")), "step: got nan"),
        (lambda: bl.CG(2, curvature="magic"), "curvature: got 'magic', expected"),
    ],
)
def test_solver_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_solves():
    problem = bl.BilevelProblem(inner, outer)
    for make in (bl.Direct, partial(bl.CG, 2), partial(bl.Neumann, 2, 0.1), bl.KFACRichardson):
        with pytest.raises(ValueError, match="damping: got -1"):
            make(damping=-1)
    with pytest.raises(ValueError, match="step: got -1"):
        bl.Neumann(3, -1)
    for solve in (partial(linsolve.cg, iters=2), partial(linsolve.neumann, terms=2, step=0.1)):
        with pytest.raises(ValueError, match="damping: got -1"):
            solve(lambda v: v, torch.ones(2), damping=-1)
    with pytest.raises(ValueError, match="theta: has 2 entries, more than max_dim=1"):
        bl.hypergradient(problem, LAM, THETA, solver=bl.Direct(max_dim=1))
    with pytest.raises(ValueError, match=r"b: got shape \(3,\), expected \(2,\)"):
        bl.CG(1).solve(problem, LAM, THETA, None, torch.ones(3))
    with pytest.raises(ValueError, match="is not finite"):
        linsolve.cg(lambda v: v * float("nan"), torch.ones(2), 3)
    with pytest.raises(ValueError, match="H: is singular to working precision"):
        linsolve.direct(torch.ones(2, 2), torch.ones(2))
    solver = bl.CG(1, warm_start=True)
    solver.solve(problem, LAM, THETA, None, torch.ones(2))
    with pytest.raises(ValueError, match=r"remembers a v of shape \(2,\)"):
        solver.solve(problem, torch.ones(3), torch.ones(3), None, torch.ones(3))
    with pytest.raises(ValueError, match=r"b: got torch.float16 on cpu, expected .*b.to\(theta\)"):
        bl.CG(1).solve(problem, LAM, THETA, None, torch.ones(2).half())
    with pytest.raises(TypeError, match="b: is in torch.bfloat16, in which torch factors no"):
        bl.hypergradient(problem, LAM, THETA.bfloat16())
    for solve in (linsolve.cg, linsolve.cg_normal):
        for tol in (float("nan"), float("inf"), -1.0):
            with pytest.raises(
                ValueError, match="tol: got .*, expected a number that is zero or positive"
            ):
                solve(lambda v: v, torch.ones(2), 2, tol=tol)
    for make in (partial(bl.Identity, float("inf")), partial(bl.updates.Adam, 0.1, eps=math.inf)):
        with pytest.raises(ValueError, match="got inf, expected a positive number"):
            make()
    with pytest.raises(ValueError, match="mode: got 'triple'"):
        products.cross_vp(inner, LAM, THETA, None, THETA, "triple")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 2, "lr": 0}, "lr: got 0"),
        ({"steps": 2, "mode": "sideways"}, "mode: got 'sideways'"),
        ({"steps": 2, "truncate": 0}, "truncate: got 0"),
        ({"steps": 2, "truncate": 1, "mode": "forward"}, "only reverse truncates"),
    ],
)
def test_unrolling_options(options, message):
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(ValueError, match=message):
        bl.unrolled_hypergradient(problem, LAM, THETA, **{"lr": 0.1, **options})


def test_differences_and_check():
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(ValueError, match="eps: got 0"):
        bl.finite_difference_hypergradient(problem, LAM, lambda lam: THETA, eps=0)
    big = torch.zeros(4001)
    cheap = bl.BilevelProblem(
        lambda lam, t, b: 0.5 * (t - lam[0]).square().sum(), lambda lam, t, b: t.sum()
    )
    with pytest.raises(ValueError, match="solve_inner: is needed, since theta has 4001 entries"):
        bl.check(cheap, LAM, big, solver=bl.CG(1))
    for given, message in (
        ({"lam": [0.1, 0.2]}, "lam: got list"),
        ({"lam": torch.ones(2, dtype=torch.long)}, "lam: got torch.int64"),
        ({"num_directions": 0}, "num_directions: got 0, expected an integer of at least 1"),
        ({"rtol": "x"}, "rtol: got 'x', expected a positive number"),
        ({"solve_inner": THETA}, "solve_inner: got Tensor, expected a function"),
        ({"generator": 0}, "generator: got 0, expected a torch.Generator"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            bl.check(problem, given.pop("lam", LAM), THETA, verbose=False, **given)
    before = torch.default_generator.get_state()
    at = cheap, LAM, torch.full((3,), float(LAM[0]))
    more = {"solve_inner": lambda lam: lam[0].expand(3), "verbose": False, "num_directions": 1}
    reports = [bl.check(*at, **more) for _ in range(2)]
    assert reports[0].relative_error_differences == reports[1].relative_error_differences
    assert torch.equal(before, torch.default_generator.get_state())


def test_an_integer_is_one_to_every_check():
    problem = bl.BilevelProblem(inner, outer)
    one = bl.hypergradient(problem, LAM, THETA, solver=bl.CG(np.int64(2)))
    assert torch.equal(one, bl.hypergradient(problem, LAM, THETA, solver=bl.CG(2)))
    rates = {"inner_lr": 0.01, "outer_lr": 0.1}
    method = bl.BVFSM(problem, LAM, THETA, decay=np.int64(2), **rates)
    assert all(torch.isfinite(method.step().hypergradient).all() for _ in range(2))
    with pytest.raises(ValueError, match="iters: got True, expected an integer"):
        linsolve.cg(lambda v: v, torch.ones(2), True)
    with pytest.raises(ValueError, match="damping: got Fraction"):
        bl.CG(3, damping=Fraction(1, 3))
    with pytest.raises(ValueError, match="batch_size: got True"):
        data.Batches(torch.ones(2, 1), torch.ones(2), True, torch.Generator())


def test_a_difference_lost_in_rounding_is_refused_by_sama():
    problem, rates = bl.BilevelProblem(inner, outer), {"inner_lr": 0.01, "outer_lr": 0.1}
    method = bl.SAMA(problem, LAM.float(), THETA.float(), alpha=1e-8, **rates)
    with pytest.raises(ValueError, match="alpha: got 1e-08, which is lost in the rounding"):
        method.step()


def test_a_rate_of_another_float_type_does_not_move_theta_to_it():
    update = bl.updates.SGD(lambda lam, t: lam.abs().double())
    problem = bl.BilevelProblem(inner, outer)
    for mode in ("reverse", "forward"):
        with pytest.raises(ValueError, match="step returned a theta in torch.float64, expected"):
            bl.unrolled_hypergradient(problem, LAM, THETA.float(), 2, mode=mode, update=update)


def test_labels_of_another_shape_under_the_ggn():
    x, y, index = batch()
    r = risk(weight=lambda lam, b: lam[b[2]])
    problem = bl.BilevelProblem(r, bl.WeightedRisk(r.model))
    at = problem, torch.ones(5), bl.flatten(r.model), (x, y[:, None], index), (x, y)
    with pytest.raises(ValueError, match=r"batch: y has shape \(5, 1\)"):
        bl.hypergradient(*at, bl.CG(2, curvature="ggn"))


def test_aid_options_and_states():
    problem = bl.BilevelProblem(inner, outer)

    def make(**options):
        given = {"inner_lr": 0.1, "outer_lr": 0.1, **options}
        return bl.AID(problem, LAM, THETA, bl.CG(2), **given)

    with pytest.raises(ValueError, match="inner_steps: got 0"):
        make(inner_steps=0)
    with pytest.raises(ValueError, match="outer_lr: got None, expected a positive step size"):
        make(outer_lr=None)
    state = make().state_dict()
    with pytest.raises(ValueError, match="of method 'SOBA', expected 'AID'"):
        make().load_state_dict({**state, "method": "SOBA"})
    with pytest.raises(ValueError, match=r"lam has shape \(3,\), expected \(2,\)"):
        make().load_state_dict({**state, "lam": torch.ones(3)})
    for bad in (None, {}, *({k: v for k, v in state.items() if k != key} for key in state)):
        with pytest.raises(ValueError, match="^state: (got NoneType|has no |is of method None)"):
            make().load_state_dict(bad)
    method = make(inner_lr=1e6)
    with pytest.raises(ValueError, match="inner_loss: value is (inf|nan)"):
        for _ in range(50):
            method.step()
    assert bool(torch.isfinite(method.lam).all())


def test_data(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"dataset: got 'mnits', expected one of \['cifar10'"):
        data.load("mnits")
    g = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="rate: got 1.5"):
        data.corrupt_labels(torch.zeros(3, dtype=torch.long), 1.5, 10, g)
    with pytest.raises(ValueError, match="labels: found 12"):
        data.corrupt_labels(torch.tensor([12]), 0.5, 10, g)
    y = torch.tensor([0, 1, 1])
    for matrix, message in (
        (torch.eye(3), r"transition: got shape \(3, 3\), expected \(2, 2\)"),
        (torch.tensor([[0.5, 0.4], [0, 1]]), "a row's sum differs from 1 by 0.1"),
        (torch.tensor([[1.5, -0.5], [0, 1]]), "the smallest entry is -0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            data.corrupt_labels(y, 0.5, 2, g, matrix)
    with pytest.raises(ValueError, match="need 11 examples, but there are 10"):
        data.split(10, (5, 6), g)
    x, y = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
    for bad, message in (
        ((x, y[:3], 2), "x has 4 rows and y has 3"),
        ((x, y, 5), "batch_size: got 5, expected 1 to 4"),
        ((x * float("inf"), y, 2), "x: 8 entries are NaN or infinite"),
    ):
        with pytest.raises(ValueError, match=message):
            data.Batches(*bad, generator=g)
    with pytest.raises(ValueError, match="labels: found 7"):
        data.Batches(x, y + 7, 2, g, num_classes=7)
    with pytest.raises(ValueError, match="device: got 'gpu'"):
        pick_device("gpu")
    monkeypatch.setenv("BILEVEL_LITE_DEVICE", "cuda:99")
    with pytest.raises(ValueError, match="cuda:99.*CUDA device"):
        pick_device()


def test_solver_state_of_another_solver():
    plain, preconditioned = bl.CG(3), bl.CG(3, precondition=bl.KFAC())
    with pytest.raises(ValueError, match="state: is of solver 'CG', expected 'KFAC'"):
        bl.KFAC().load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="is of a CG without preconditioner, expected with"):
        preconditioned.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="is of a CG with preconditioner, expected without"):
        plain.load_state_dict(preconditioned.state_dict())
    richardson = bl.KFACRichardson()
    for solver in (plain, preconditioned, bl.KFAC(), bl.EKFAC(), richardson):
        state = solver.state_dict()
        for bad in ([], None, *({k: v for k, v in state.items() if k != key} for key in state)):
            if isinstance(bad, dict) and set(state) - set(bad) <= {"parameters", "made"}:
                continue  # states of older versions
            with pytest.raises(ValueError, match="^state: (got |has no |is of )"):
                solver.load_state_dict(bad)
        for v in (torch.ones(2, dtype=torch.long), torch.ones(2) + 0j, [1.0]):
            with pytest.raises(TypeError, match="^state: v: got .*, expected a floating-point"):
                solver.load_state_dict({**state, "v": v})


def test_a_state_that_fails_half_way_changes_nothing():
    problem, (x, y, _) = bl.BilevelProblem(inner, outer), batch()

    def make(rows=4, size=2):
        sampler = data.Batches(x[:rows], y[:rows], size, torch.Generator().manual_seed(rows))
        solver = bl.CG(2, warm_start=True)
        at = problem, LAM, THETA, solver
        return bl.AID(*at, inner_batch=sampler, inner_lr=0.1, outer_lr=0.1)

    one, other = make(), make()
    one.step()
    state, v = one.state_dict(), one.solver._v.clone()
    other.step()
    other.step()
    groups = {"state": {}, "param_groups": [{"params": [0]}, {"params": [1]}]}
    parts = {**other.state_dict()["parts"], "outer_optimizer": groups}
    with pytest.raises(ValueError, match="parameter groups"):
        one.load_state_dict({**other.state_dict(), "parts": parts})
    assert torch.equal(one.solver._v, v) and one.iteration == 1
    assert (
        one.batches["inner"].state_dict()["position"] == state["parts"]["inner_batch"]["position"]
    )
    for rows, size in ((5, 2), (4, 3)):
        with pytest.raises(ValueError, match="state: is of 4 examples in batches of 2, expected"):
            make(rows, size).load_state_dict(state)
    older = state["parts"]["inner_batch"]
    del older["size"]
    make().load_state_dict(state)


@pytest.mark.parametrize("cls", [bl.CG, bl.CGNormal])
def test_a_warm_start_is_in_the_float_type_of_the_solve(cls):
    d = torch.float64
    root = torch.randn(6, 6, dtype=d, generator=torch.Generator().manual_seed(0))
    h, lam = root @ root.T + torch.eye(6, dtype=d), torch.ones(6, dtype=d)
    problem = bl.BilevelProblem(
        lambda lam, t, _: t @ h.to(t) @ t / 2 - t @ lam.to(t), lambda lam, t, _: t.sum()
    )
    solver = cls(60, warm_start=True)
    bl.hypergradient(problem, lam, lam.float(), solver=solver)
    _, info = bl.hypergradient(problem, lam, lam, solver=solver, return_info=True)
    assert info.v.dtype == d and info.solve.converged
    assert float((info.b - h @ info.v).norm()) < 1e-9 * float(info.b.norm())


@pytest.mark.parametrize("solve", [
    lambda m, b: linsolve.cg(m, b, 5), lambda m, b: linsolve.cg_normal(m, b, 5),
    lambda m, b: linsolve.neumann(m, b, 5, 0.1),
])  # fmt: skip
def test_a_right_hand_side_or_product_that_is_not_finite(solve):
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(bl.refuse.NotFinite, match="b: the right-hand side is not finite"):
        solve(lambda v: 2 * v, bad)
    with pytest.raises(bl.refuse.NotFinite, match="b: .* too large for its norm"):
        solve(lambda v: 2 * v, 1e200 * good)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(bl.refuse.NotFinite, match="matvec|step"):
            solve(lambda v, factor=factor: factor * v, good)


def test_a_loss_that_forgets_theta_says_so():
    other = torch.ones(2, requires_grad=True)

    def loss(lam, theta, batch):
        return (other * lam).sum()

    with pytest.raises(ValueError, match="does not depend on theta"):
        products.theta_gradient(loss, torch.ones(2), torch.ones(2))


def test_a_preconditioner_that_drops_parameters_is_refused():
    with pytest.raises(ValueError, match="rest='drop'"):
        bl.CG(3, precondition=bl.KFAC(0.1, rest="drop"))


def test_models_and_labels_of_another_shape_or_type():
    lam, x = torch.ones(1), torch.ones(4, 3)
    flat = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(0))
    theta = bl.params.flatten(flat)
    for loss, y in (("mse", torch.ones(4)), ("cross_entropy", torch.zeros(4).long())):
        with pytest.raises(ValueError, match=r"model: gives shape \(4,\), expected \(n, C\)"):
            bl.WeightedRisk(flat, loss)(lam, theta, (x, y))
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match="int32, expected integer labels .* torch.int64"):
        bl.WeightedRisk(model)(
            lam, bl.params.flatten(model), (x, torch.zeros(4, dtype=torch.int32))
        )


def test_out_of_memory_is_not_taken_for_a_wrong_shape():
    class Full(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Linear(3, 2)

        def forward(self, x):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory; total size 20 GiB")

    model = Full()
    batch = (torch.ones(4, 3), torch.zeros(4).long())
    with pytest.raises(torch.cuda.OutOfMemoryError):
        bl.WeightedRisk(model)(torch.ones(1), bl.params.flatten(model), batch)


def test_a_matrix_or_directions_that_do_not_fit():
    with pytest.raises(bl.refuse.NotFinite, match="H: has entries that are NaN"):
        linsolve.direct(torch.full((2, 2), float("nan")), torch.ones(2))
    problem = bl.BilevelProblem(
        lambda lam, theta, _: (theta - lam).square().sum(), lambda lam, theta, _: theta.sum()
    )
    with pytest.raises(ValueError, match=r"directions: got shape \(1, 3\), expected \(k, \*\(2,\)"):
        bl.finite_difference_hypergradient(
            problem, torch.ones(2), lambda lam: lam, directions=torch.ones(1, 3)
        )


# ------------------------------------------------------------------ batches and samplers


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), 3)


def sampler():
    return data.Batches(*batch()[:2], 2, torch.Generator())


NO_BATCHES = {
    "a loader": (loader, r"got DataLoader, expected .*; its batches are next\(iter\(loader\)\)"),
    "an iterator": (lambda: iter(loader()), "got _SingleProcess.*; it can be read only once"),
    "a generator": (lambda: (b for b in [batch()]), "got generator, .* read only once"),
    "a dataset": (lambda: loader().dataset, "got TensorDataset, .*; put its tensors into a tuple"),
    "a name": (lambda: "mnist", "got str, .*; load the data first"),
    "a function": (lambda: lambda t: batch(), "got function, .*; call it first"),
    "a class": (lambda: data.Batches, "got type, .*; call it first"),
}
NO_BATCHES_OF_A_RISK = {
    **NO_BATCHES,
    "nothing": (lambda: None, r"got NoneType, expected a tuple \(x, y, ...\)"),
    "a dict": (
        lambda: dict(zip("xyi", batch(), strict=True)),
        r"got dict, expected a tuple \(x, y",
    ),
    "x alone": (lambda: (batch()[0],), "got 1 part, expected a tuple"),
    "a tensor": (lambda: batch()[0], "got Tensor, expected a tuple"),
    "x as a dict": (lambda: ({"x": batch()[0]}, *batch()[1:]), "got dict as x, expected a tensor"),
    "y as a list": (lambda: (batch()[0], [0] * 5), "got list as y, expected a tensor"),
    "y as a number": (
        lambda: (batch()[0], torch.tensor(1)),
        "got a tensor without rows as y, expected a tensor",
    ),
    "no examples": (lambda: tuple(part[:0] for part in batch()), "holds no example"),
    "other lengths": (lambda: batch(n=4), "x has 5 rows and y has 4"),
}


def weighted_problem():
    r = risk(weight=lambda lam, b: lam[b[2]].exp(), l2=0.1)
    return bl.BilevelProblem(r, risk(l2=0.1)), torch.ones(5), bl.flatten(r.model)


@pytest.mark.parametrize("of_risk", [True, False])
@pytest.mark.parametrize("kind", NO_BATCHES_OF_A_RISK)
def test_what_is_no_batch(kind, of_risk):
    make, message = NO_BATCHES_OF_A_RISK[kind]
    if not of_risk and kind not in NO_BATCHES:
        return  # a plain function may take it
    at = weighted_problem() if of_risk else (bl.BilevelProblem(inner, outer), LAM, THETA)
    good, both = batch(), (ValueError, TypeError)
    rates = {"inner_lr": 0.1, "outer_lr": 0.1}
    with pytest.raises(both, match=f"inner_batch: {message}"):
        bl.hypergradient(*at, make(), good)
    with pytest.raises(both, match=f"outer_batch: {message}"):
        bl.hypergradient(*at, good, make())
    if make() is not None:
        with pytest.raises(both, match=f"curvature_batch: {message}"):
            bl.hypergradient(*at, good, good, curvature_batch=make())
        with pytest.raises(both, match=f"cross_batch: {message}"):
            bl.hypergradient(*at, good, good, cross_batch=make())
    if kind not in ("a function", "a class"):
        with pytest.raises(both, match=f"inner_batch: {message}"):
            bl.unrolled_hypergradient(*at, 2, 0.1, inner_batch=make(), outer_batch=good)
    with pytest.raises(both, match=f"inner_batch: {message}"):
        bl.unrolled_hypergradient(*at, 2, 0.1, inner_batch=lambda t: make(), outer_batch=good)
    with pytest.raises(both, match=f"outer_batch: {message}"):
        bl.unrolled_hypergradient(*at, 2, 0.1, inner_batch=good, outer_batch=make())
    with pytest.raises(both, match=f"outer_batch: {message}"):
        bl.finite_difference_hypergradient(*at[:2], lambda lam: at[2], outer_batch=make())
    for cls in (bl.SAMA, bl.ITD, bl.BVFSM):  # all methods share the check
        with pytest.raises(both, match=f"inner_batch: {message}"):
            cls(*at, inner_batch=make(), outer_batch=good, **rates)
        with pytest.raises(both, match=f"outer_batch: {message}"):
            cls(*at, inner_batch=good, outer_batch=make(), **rates)
    with pytest.raises(both, match=rf"inner_batches\[1\]: {message}"):
        bl.SABA(*at, 0.1, [good, make()], [good], torch.Generator(), **rates)


def test_samplers():
    at = weighted_problem()
    with pytest.raises(TypeError, match=r"inner_batch: got Batches, .* a sampler: .*draw\(\)"):
        bl.hypergradient(*at, sampler(), batch())
    for name in ("inner_sampler", "outer_sampler"):
        with pytest.raises(TypeError, match=f"{name}: got DataLoader, expected a sampler"):
            bl.audit(*at, batch(), batch(), [bl.CG(1)], **{name: loader()})
    with pytest.raises(TypeError, match="such as bilevel_lite.data.Batches"):
        bl.SAMA(*at, inner_batch=loader(), outer_batch=batch(), inner_lr=0.1, outer_lr=0.1)


def test_a_plain_function_takes_what_it_likes():
    x = torch.arange(6.0).view(3, 2)

    def loss(lam, theta, b):
        rows = b["x"] if isinstance(b, dict) else b.rows
        return 0.5 * (rows @ theta - lam.sum()).square().mean() + theta.square().sum()

    class Own:
        rows = x

    for own in ({"x": x}, Own()):
        problem = bl.BilevelProblem(loss, loss)
        bl.hypergradient(problem, LAM, THETA, own, own)
        bl.unrolled_hypergradient(problem, LAM, THETA, 2, 0.1, inner_batch=own, outer_batch=own)
        for cls, options in ((bl.NHGD, {}), (bl.SOBA, {"linear_lr": 0.1}), (bl.BOME, {})):
            method = cls(
                problem, LAM, THETA, inner_lr=0.01, outer_lr=0.01, inner_batch=own,
                outer_batch=own, **options,
            )  # fmt: skip
            method.step()
    assert bl.problem.relative_size({"x": x}, {"x": x[:1]}) == 3
    assert bl.problem.relative_size(x, x[:1]) == 3
    assert bl.problem.relative_size({"in": {"x": x}}, (["text"], x[:1])) == 3
    assert bl.problem.relative_size((), {}) == 1
    with pytest.raises(ValueError, match=r"value is nan; batch\['x'\] has 1 entries"):
        bl.hypergradient(problem, LAM, THETA, {"x": x}, {"x": x / x})


def test_a_plain_function_without_its_batch():
    def needs(lam, theta, b):
        return (b[0] @ theta - lam.sum()).square().mean()

    problem = bl.BilevelProblem(needs, needs)
    with pytest.raises(TypeError, match="batch: got None, but outer_loss needs a batch"):
        bl.hypergradient(problem, LAM, THETA)
    with pytest.raises(TypeError, match="batch: got None, but inner_loss needs a batch"):
        bl.unrolled_hypergradient(problem, LAM, THETA, 2, 0.1)


class Wraps(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.map, self.wrap = torch.nn.Linear(3, 4), wrap

    def forward(self, x):
        return self.wrap(self.map(x))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda o: {"logits": o}, "model: Wraps gives dict, expected a tensor"),
        (lambda o: (o, None), "model: Wraps gives tuple, expected a tensor"),
        (lambda o: o[:2], "model: gives 2 rows for 5 examples"),
        (
            lambda o: o[:, None].expand(5, 3, 4),
            r"y has shape \(5,\) .* outputs of shape \(5, 3, 4\)",
        ),
    ],
)
def test_model_outputs(wrap, message):
    r = bl.WeightedRisk(Wraps(wrap))
    problem, theta = bl.BilevelProblem(inner, r), bl.flatten(r.model)
    with pytest.raises(ValueError, match=message):
        r(LAM, theta, batch())
    with pytest.raises(ValueError, match=message):
        bl.hypergradient(problem, LAM, theta, None, batch())


def test_other_kinds_of_arguments():
    problem = bl.BilevelProblem(inner, outer)
    with pytest.raises(TypeError, match="problem: got function, expected a bilevel_lite.Bilevel"):
        bl.hypergradient(inner, LAM, THETA)
    with pytest.raises(TypeError, match="problem: got function"):
        bl.SAMA(inner, LAM, THETA, inner_lr=0.1, outer_lr=0.1)
    with pytest.raises(TypeError, match="solver: got 'cg', expected a solver"):
        bl.hypergradient(problem, LAM, THETA, solver="cg")
    with pytest.raises(TypeError, match=r"solve_inner\(lam\): got list, expected a floating-point"):
        bl.finite_difference_hypergradient(problem, LAM, lambda lam: [1.0])
    with pytest.raises(TypeError, match="number: got 1.2, expected a string such as '1.2'"):
        bl.exercises.check(1.2, 3.0)
    with pytest.raises(
        ValueError, match="weight: returned float, expected a floating-point tensor"
    ):
        r = risk(weight=lambda lam, b: 1.0)
        r(LAM, bl.flatten(r.model), batch())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: at(bl.hypergradient, solver=bl.CG), "solver: got <class .*CG.* expected a solver"),
        (lambda: at(bl.check, solver=bl.KFAC), "solver: got <class .*KFAC.* expected a solver"),
        (lambda: data.Batches(*batch()[:2], 5, 0), "generator: got 0, expected a torch.Generator"),
        (lambda: data.Batches(*batch()[:2], 5, None), "generator: got None, expected a torch.Gen"),
        (lambda: data.split(10, (5, 5), 0), "generator: got 0, expected a torch.Generator"),
        (
            lambda: data.corrupt_labels(torch.zeros(9, dtype=int), 0.5, 10, 3),
            "generator: got 3, expected a torch.Generator",
        ),
        (
            lambda: data.Batches(torch.ones(5, 2).numpy(), torch.zeros(5), 5, torch.Generator()),
            "x: got ndarray, expected a tensor",
        ),
        (lambda: bl.WeightedRisk(None), "model: got NoneType, expected a torch.nn.Module"),
        (lambda: bl.flatten([THETA]), "model: got list, expected a torch.nn.Module"),
        (lambda: bl.unflatten(THETA, torch.nn.Linear(1, 1)), "model: got Tensor, expected a torch"),
        (lambda: bl.unflatten(torch.nn.Linear(1, 1), None), "theta: got NoneType, expected a ten"),
        (lambda: bl.unflatten(torch.nn.Linear(1, 1), 2.0), "theta: got float, expected a tensor"),
        (
            lambda: bl.params.predict(torch.nn.Linear(1, 1), [1.0, 2.0], torch.ones(1)),
            r"theta: got list, expected a tensor of shape \(2,\)",
        ),
    ],
)
def test_one_thing_for_another(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def at(function, **options):
    return function(bl.BilevelProblem(inner, outer), LAM, THETA, **options)


def test_numbers_of_another_precision_than_the_model():
    one = torch.float32 if torch.get_default_dtype() is torch.float64 else torch.float64
    x, y, index = batch()
    with pytest.raises(ValueError, match="batch: Linear cannot take x of torch.float"):
        risk()(LAM, bl.flatten(torch.nn.Linear(3, 4)), (x.to(one), y, index))


def test_a_single_solver_is_audited():
    report = at(bl.audit, solvers=bl.CG(2))
    assert len(report.rows) == 1


def test_a_direction_of_another_shape_is_refused():
    lam, theta = torch.ones(2), torch.ones(2)

    def g(lam, theta, batch):
        return (lam * theta**3).sum()

    for v in (torch.ones(3), torch.ones(1, 2), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"v: got shape .*, expected \(2,\), that of theta"):
            products.hvp(g, lam, theta, None, v)


def test_inside_of_a_transform_it_says_so():
    problem = bl.BilevelProblem(
        lambda lam, t, b: (t - lam).square().sum(), lambda lam, t, b: t.square().sum()
    )
    with pytest.raises(ValueError, match="inside a transform of torch.func"):
        torch.vmap(lambda lam: bl.hypergradient(problem, lam, torch.ones(3), solver=bl.CG(2)))(
            torch.ones(4, 3)
        )


def test_nhgd_takes_a_theta_of_any_shape():
    problem = bl.BilevelProblem(
        lambda lam, t, b: (t - lam[0]).square().sum() + (lam[1] * t**4).sum(),
        lambda lam, t, b: (t - 1).square().sum(),
    )
    lam, theta, made = torch.tensor([0.5, 0.3]), torch.linspace(0.5, 1, 6), []
    for shape in ((6,), (3, 2)):
        method = bl.NHGD(problem, lam, theta.view(shape), inner_lr=0.05, outer_lr=0.1)
        for _ in range(3):
            method.step()
        made.append((method.lam, method.theta.reshape(-1)))
    assert torch.equal(made[0][0], made[1][0]) and torch.allclose(made[0][1], made[1][1])


def test_a_named_tuple_keeps_its_names_and_a_bad_index_is_no_fault_of_lams():
    kind = namedtuple("Named", "x y index")
    model = torch.nn.Linear(3, 2)
    batch = kind(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    risk = bl.WeightedRisk(
        model, weight=lambda lam, b: lam[b.index],
        inputs=lambda lam, b: kind(b.x * lam.mean(), b.y, b.index),
    )  # fmt: skip
    theta, two = bl.flatten(model), torch.full((4,), 2.0)
    plain = bl.WeightedRisk(model)(two, theta, (2 * batch.x, batch.y))
    assert float(risk(two, theta, batch)) == pytest.approx(2 * float(plain))
    floats = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]])
    with pytest.raises(ValueError, match="no index"):
        floats(torch.ones(4), theta, (*batch[:2], batch.index.double()))
    with pytest.raises(ValueError, match="lam: has 3 entries, too few"):
        floats(torch.ones(3), theta, tuple(batch))


def test_a_scripted_module_is_refused():
    net = torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2))
    risk, batch = bl.WeightedRisk(net), (torch.ones(2, 2), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="model: is a scripted or traced module, for whose param"):
        risk.losses(torch.ones(9), batch)
