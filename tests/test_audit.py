"""The audit's parts against what they must be, on problems where each can be made zero."""

import math

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import data, plotting


def setting(n=30, l2=0.05):
    """A weighted softmax regression that is solved to rounding, and one that is not."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3).double()
    risk = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]].sigmoid(), l2=l2)
    problem = bl.BilevelProblem(risk, bl.WeightedRisk(model))
    inner = x, y, torch.arange(n)
    outer = torch.randn(20, 4, generator=g), torch.randint(3, (20,), generator=g)
    lam = torch.randn(n, generator=g)

    def solve_inner(lam):
        theta = torch.zeros(15)
        for _ in range(12):  # Newton
            h = bl.curvature.Hessian(risk, lam, theta, inner).dense()
            step = bl.products.theta_gradient(risk, lam, theta, inner)[1]
            theta = theta - torch.linalg.solve(h, step)
        return theta

    return problem, lam, solve_inner, inner, outer


def test_parts_add_up_and_each_is_what_it_says():
    problem, lam, solve_inner, inner, outer = setting()
    star = solve_inner(lam)
    theta = star + 0.3 * torch.randn(15, generator=torch.Generator().manual_seed(1))
    solvers = {
        "direct": bl.Direct(),
        "damped": bl.Direct(damping=0.1),
        "cg": bl.CG(2, damping=0.1),
        "ggn": bl.CG(50, curvature="ggn"),
        "identity": bl.Identity(2.0),
        "kfac": bl.KFAC(0.1, "exact"),
    }
    report = bl.audit(problem, lam, theta, inner, outer, solvers, solve_inner)
    slopes = bl.finite_difference_hypergradient(problem, lam, solve_inner, 1e-5, outer)
    assert float((report.truth - slopes).norm() / slopes.norm()) < 1e-7
    rows = {row.name: row for row in report.rows}
    for name, row in rows.items():
        own = bl.hypergradient(problem, lam, theta, inner, outer, solvers[name])
        total = sum(row.vectors.values())
        assert float((report.truth + total - own).norm()) < 1e-12
        assert row.relative_error == pytest.approx(
            float((own - slopes).norm() / slopes.norm()), 1e-4
        )
        assert row.parts["inner"] == rows["direct"].parts["inner"] > 0.05
    # exactly: the same operations in the same order
    assert rows["direct"].parts["curvature"] == rows["direct"].parts["linear"] == 0
    damped = bl.hypergradient(problem, lam, theta, inner, outer, bl.Direct(0.1))
    exact = bl.hypergradient(problem, lam, theta, inner, outer)
    size = float(report.truth.norm())
    assert rows["damped"].parts["curvature"] == pytest.approx(float((damped - exact).norm()) / size)
    assert rows["damped"].parts["linear"] == 0
    # CG with the same damping is charged with the same curvature, and for having stopped early
    assert rows["cg"].parts["curvature"] == pytest.approx(rows["damped"].parts["curvature"])
    two = bl.hypergradient(problem, lam, theta, inner, outer, bl.CG(2, damping=0.1))
    assert rows["cg"].parts["linear"] == pytest.approx(float((two - damped).norm()) / size)
    # of one linear layer the GGN is the Hessian
    assert rows["ggn"].parts["curvature"] < 1e-12 and rows["ggn"].parts["linear"] < 1e-6
    for name in ("identity", "kfac"):
        assert rows[name].parts["linear"] == 0 and rows[name].parts["curvature"] > 0.01
    assert rows["cg"].products == 2 and rows["cg"].gradients == pytest.approx(2 * 2 + 2 + 20 / 30)


def test_at_the_solution_only_the_solver_errs():
    problem, lam, solve_inner, inner, outer = setting()
    solvers = [bl.Direct(), bl.CG(15), bl.CG(1)]
    report = bl.audit(problem, lam, solve_inner(lam), inner, outer, solvers, solve_inner)
    direct, full, one = report.rows
    assert [row.name for row in report.rows] == ["Direct", "CG", "CG (2)"]
    assert direct.relative_error < 1e-12 and full.relative_error < 1e-8
    assert direct.cosine == pytest.approx(1) and direct.length == pytest.approx(1)
    assert one.relative_error == pytest.approx(one.parts["linear"]) and one.relative_error > 0.01
    alone = bl.audit(problem, lam, solve_inner(lam), inner, outer, [bl.CG(1)])
    assert set(alone.rows[0].parts) == {"curvature", "linear"}


class Listed:
    """A sampler that goes through a list."""

    def __init__(self, batches):
        self.batches = batches * 2

    def draw(self):
        return self.batches.pop(0)


def test_minibatch_part():
    problem, lam, solve_inner, inner, outer = setting()
    theta = solve_inner(lam)
    halves = [tuple(t[:15] for t in inner), tuple(t[15:] for t in inner)]
    report = bl.audit(
        problem, lam, theta, inner, outer, [bl.Direct()], None, Listed(halves), None, 2
    )
    (row,) = report.rows
    full = bl.hypergradient(problem, lam, theta, inner, outer)
    noise = torch.stack([bl.hypergradient(problem, lam, theta, h, outer) - full for h in halves])
    size = float(full.norm())
    assert row.parts["minibatch"] == pytest.approx(
        float(noise.square().sum(1).mean().sqrt()) / size
    )
    assert torch.allclose(row.vectors["minibatch"], noise.mean(0), atol=1e-14)
    assert row.relative_error == pytest.approx(row.parts["minibatch"])
    same = bl.audit(problem, lam, theta, inner, outer, [bl.CG(15)], None, Listed([inner]), None, 2)
    assert same.rows[0].parts["minibatch"] < 1e-12
    x, y = outer
    sampler = data.Batches(x, y, 5, torch.Generator().manual_seed(0))
    noisy = bl.audit(problem, lam, theta, inner, outer, [bl.CG(15)], outer_sampler=sampler)
    assert noisy.rows[0].parts["minibatch"] > 0.1 and "minibatch" in str(noisy)


def test_a_solution_that_is_none_is_refused():
    problem, lam, solve_inner, inner, outer = setting()
    for wrong, message in (
        (lambda lam: None, "got NoneType, expected a floating-point tensor"),
        (lambda lam: solve_inner(lam).numpy(), "got ndarray, expected a floating-point tensor"),
        (lambda lam: solve_inner(lam)[:2], r"got shape \(2,\), expected"),
        (solve_inner(lam), "got Tensor, expected a function"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"solve_inner(\(lam\))?: {message}"):
            bl.audit(problem, lam, solve_inner(lam), inner, outer, [bl.CG(1)], wrong)


def test_a_solver_keeps_what_it_remembers():
    problem, lam, solve_inner, inner, outer = setting()
    cg = bl.CG(2, warm_start=True)
    bl.audit(problem, lam, solve_inner(lam), inner, outer, [cg])
    assert cg._v is None


def test_large_problems_use_cg_and_say_when_it_fails(monkeypatch):
    problem, lam, solve_inner, inner, outer = setting()
    star = solve_inner(lam)
    small = bl.audit(problem, lam, star, inner, outer, [bl.CG(2), bl.Direct(0.1)])
    solve = bl.Direct.__init__

    def tiny(self, damping=0.0, curvature="hessian", max_dim=4000):
        solve(self, damping, curvature, max_dim=3)

    monkeypatch.setattr(bl.Direct, "__init__", tiny)
    large = bl.audit(problem, lam, star, inner, outer, [bl.CG(2)])
    assert large.rows[0].relative_error == pytest.approx(small.rows[0].relative_error, 1e-6)
    saddle = bl.BilevelProblem(
        lambda lam, t, _: 0.5 * (t[0] ** 2 - t[1] ** 2) + lam @ t[:2] + t.square().sum() * 0,
        lambda lam, t, _: t.sum(),
    )
    with (
        pytest.warns(bl.NegativeCurvatureWarning),
        pytest.raises(ValueError, match="CG stopped at"),
    ):
        bl.audit(saddle, torch.ones(2), torch.ones(4), solvers=[bl.CG(1)])


def test_a_hypergradient_of_zero_has_no_angle():
    problem, lam, solve_inner, inner, outer = setting()

    class Sampler:
        def __init__(self, batches):
            self.batches = iter(batches)

        def draw(self):
            return next(self.batches)

    # a batch may switch f off, and with it the hypergradient
    gated = bl.BilevelProblem(
        problem.inner_loss, lambda lam, t, b: b[2] * problem.outer_loss(lam, t, b[:2])
    )
    on, off = (*outer, 1.0), (*outer, 0.0)
    args = gated, lam, solve_inner(lam), inner, on, [bl.CG(2)]
    (plain,) = bl.audit(*args).rows
    (mixed,) = bl.audit(*args, outer_sampler=Sampler([on, off, off, on]), draws=4).rows
    assert 0.5 < plain.cosine < 0.999 and mixed.cosine == pytest.approx(plain.cosine, 1e-12)
    assert mixed.length == pytest.approx(plain.length / 2, 1e-12)  # there it does count
    (none,) = bl.audit(*args, outer_sampler=Sampler([off, off]), draws=2).rows
    assert math.isnan(none.cosine) and none.length == 0
    assert none.relative_error == pytest.approx(1, 1e-12)


def test_a_tiny_hypergradient_in_float32_is_not_zero():
    """f times 1e-25: squares of its hypergradient are no float32."""
    rows = []
    for factor, dtype in ((1.0, torch.float64), (1e-25, torch.float32)):
        scale = torch.tensor([1.0, 9.0], dtype=dtype)
        problem = bl.BilevelProblem(
            lambda lam, theta, _, scale=scale: (scale * (theta - lam) ** 2).sum(),
            lambda lam, theta, _, factor=factor: factor * ((theta - 1) ** 2).sum(),
        )
        at = problem, torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype), None, None
        (row,) = bl.audit(*at, solvers=bl.CG(1)).rows
        rows.append([row.relative_error, row.cosine, row.length, row.parts["linear"]])
    assert rows[1] == pytest.approx(rows[0], rel=1e-5)


def test_prints_and_draws():
    problem, lam, solve_inner, inner, outer = setting()
    report = bl.audit(
        problem, lam, solve_inner(lam) + 0.1, inner, outer, [bl.Direct(), bl.KFAC(0.1)], solve_inner
    )
    text = str(report)
    assert text.splitlines()[0].split() == [
        "solver", "error", "cosine", "length", "|", "inner", "curvature", "linear", "|", "gradients"
    ]  # fmt: skip
    assert len(text.splitlines()) == 3 and " 0 " in text
    plotting.plt.close(report.figure())


def test_bad_input():
    problem, lam, solve_inner, inner, outer = setting()
    theta = solve_inner(lam)
    with pytest.raises(ValueError, match="solvers: is empty"):
        bl.audit(problem, lam, theta, inner, outer)
    for solvers, message in (
        ([3], "got 3, expected solvers such as"),
        (5, "got 5, expected solvers such as"),
        (None, "got None, expected solvers such as"),
        ({1: bl.CG(2)}, "got 1 as a name, expected strings"),
    ):
        with pytest.raises(TypeError, match=f"^solvers: {message}"):
            bl.audit(problem, lam, theta, inner, outer, solvers)
    report = bl.audit(problem, lam, theta, inner, outer, (bl.CG(k) for k in (1, 2)))
    assert [row.name for row in report.rows] == ["CG", "CG (2)"]
    with pytest.raises(ValueError, match="draws: got 0"):
        bl.audit(problem, lam, theta, inner, outer, [bl.CG(1)], draws=0)
    flat = bl.BilevelProblem(problem.inner_loss, lambda lam, t, _: (t * 0).sum())
    with pytest.raises(ValueError, match="true hypergradient is zero"):
        bl.audit(flat, lam, theta, inner, outer, [bl.CG(1)])
