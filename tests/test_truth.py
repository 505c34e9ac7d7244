"""Every hypergradient against an independent truth, in float64.

The problem is ridge regression with per-feature penalties exp(lam_j), an outer loss with a direct
term in lam, and theta*(lam) in closed form: autograd through the closed form is the truth.
"""

import math
import warnings

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from test_reads_and_writes import Drawing
from torch import nn

import bilevel_lite as bl
from bilevel_lite import linsolve, products
from bilevel_lite.slopes import slopes_and_route


class Ridge:
    """Ridge regression with m = d per-feature penalties; n rows for training, n for validation."""

    def __init__(self, d=12, n=60, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.randn(n, d, generator=g), torch.randn(n, generator=g)
        self.xv, self.yv = torch.randn(n, d, generator=g), torch.randn(n, generator=g)
        self.lam = torch.randn(d, generator=g) - 1
        self.v = torch.randn(d, generator=g)
        self.problem = bl.BilevelProblem(self.inner, self.outer)
        self.theta = self.solution(self.lam)
        self.h = self.x.T @ self.x / n + torch.diag(self.lam.exp())  # the Hessian, by hand
        eigenvalues = torch.linalg.eigvalsh(self.h)
        self.low, self.high = float(eigenvalues[0]), float(eigenvalues[-1])
        lam = self.lam.clone().requires_grad_()
        phi = self.outer(lam, self.solution(lam), None)
        (self.truth,) = torch.autograd.grad(phi, lam)

    def inner(self, lam, theta, batch):
        return (
            0.5 * (self.x @ theta - self.y).square().mean()
            + 0.5 * (lam.exp() * theta.square()).sum()
        )

    def outer(self, lam, theta, batch):
        return 0.5 * (self.xv @ theta - self.yv).square().mean() + 0.1 * lam.square().sum()

    def solution(self, lam):
        n = len(self.y)
        return torch.linalg.solve(
            self.x.T @ self.x / n + torch.diag(lam.exp()), self.x.T @ self.y / n
        )


@pytest.fixture(scope="module")
def ridge():
    return Ridge()


def error(got, truth):
    return float((got - truth).detach().norm() / truth.detach().norm())


# ---------------------------------------------------------------- products


def test_products_equal_the_matrices_written_by_hand(ridge):
    r = ridge
    assert error(products.hessian(r.inner, r.lam, r.theta), r.h) < 1e-13
    assert error(products.hvp(r.inner, r.lam, r.theta, None, r.v), r.h @ r.v) < 1e-13
    jv = r.lam.exp() * r.theta * r.v  # d2g / (dlam_j dtheta_j) = exp(lam_j) theta_j
    for mode in ("auto", "double_backward"):
        assert error(products.cross_vp(r.inner, r.lam, r.theta, None, r.v, mode), jv) < 1e-13
    jp, hp = products.update_vjp(r.inner, r.lam, r.theta, None, r.v)
    assert error(jp, jv) < 1e-13 and error(hp, r.h @ r.v) < 1e-13
    e = torch.linspace(-1, 1, 12)
    q, along = products.update_operator(r.inner, r.lam, 2 * r.theta, None)
    assert error(q, r.h @ (2 * r.theta) - r.x.T @ r.y / 60) < 1e-13
    assert error(along(e, r.v), r.h @ r.v + r.lam.exp() * 2 * r.theta * e) < 1e-13


def mlp_risk(loss, classes=3):
    g = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, classes)
        ).double()
    x = torch.randn(20, 4, generator=g)
    y = (
        torch.randint(classes, (20,), generator=g)
        if loss == "cross_entropy"
        else torch.randn(20, classes, generator=g)
    )
    batch = (x, y, torch.arange(20))
    risk = bl.WeightedRisk(model, loss, weight=lambda lam, b: lam[b[2]].sigmoid(), l2=0.01)
    return risk, torch.randn(20, generator=g), bl.flatten(model), batch


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_cross_product_by_dual_numbers_equals_double_backward_on_a_network(loss):
    risk, lam, theta, batch = mlp_risk(loss)
    v = torch.linspace(-1, 1, len(theta))
    dual = products.cross_vp(risk, lam, theta, batch, v)
    double = products.cross_vp(risk, lam, theta, batch, v, "double_backward")
    assert error(dual, double) < 1e-12
    # and both equal sigma'(lam_n) <grad l_n, v> / N
    losses = torch.func.jvp(lambda t: risk.losses(t, batch), (theta,), (v,))[1]
    s = lam.sigmoid()
    assert error(dual, s * (1 - s) * losses / 20) < 1e-12


def test_hvp_equals_curvlinops_and_differences_of_the_gradient():
    curvlinops = pytest.importorskip("curvlinops")
    risk, lam, theta, batch = mlp_risk("cross_entropy")
    model = risk.model
    unweighted = bl.WeightedRisk(model)
    v = torch.linspace(-1, 1, len(theta))
    params = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.HessianLinearOperator(
        model,
        torch.nn.CrossEntropyLoss(),
        params,
        [(batch[0], batch[1])],
        check_deterministic=False,
    )
    theirs = torch.as_tensor(np.asarray(operator.to_scipy() @ v.numpy()))
    assert error(products.hvp(unweighted, lam, theta, batch, v), theirs) < 1e-12
    eps = 1e-5
    up = products.gradient(risk, lam, theta + eps * v, batch)[2]
    down = products.gradient(risk, lam, theta - eps * v, batch)[2]
    assert error(products.hvp(risk, lam, theta, batch, v), (up - down) / (2 * eps)) < 1e-8


def test_weighted_risk_is_the_formula():
    risk, lam, theta, batch = mlp_risk("mse")
    outputs = torch.func.functional_call(risk.model, bl.unflatten(risk.model, theta), batch[0])
    by_hand = sum(
        float(lam[i].sigmoid()) * 0.5 * float((outputs[i] - batch[1][i]).square().sum())
        for i in range(20)
    ) / 20 + 0.01 * float(theta @ theta)
    assert float(risk(lam, theta, batch)) == pytest.approx(by_hand, rel=1e-13)


def test_flatten_and_unflatten_are_inverse_and_skip_frozen_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    theta = bl.flatten(model)
    assert theta.shape == (14,)
    for name, view in bl.unflatten(model, theta).items():
        assert torch.equal(view, model.get_parameter(name))
    model[0].weight.requires_grad_(False)
    assert bl.flatten(model).shape == (8,)
    tied = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert bl.flatten(tied).shape == (8,)


# ---------------------------------------------------------------- implicit solvers


@pytest.mark.parametrize("make", [
    lambda r: bl.Direct(),
    lambda r: bl.CG(12),
    lambda r: bl.CG(100, warm_start=True),
    lambda r: bl.CGNormal(100),
    lambda r: bl.Neumann(math.ceil(40 * r.high / r.low), 1 / r.high),
])  # fmt: skip
def test_every_implicit_solver_reaches_autograd_through_the_closed_form(ridge, make):
    r = ridge
    for mode in ("auto", "double_backward"):
        h, info = bl.hypergradient(
            r.problem, r.lam, r.theta, solver=make(r), return_info=True, cross_mode=mode
        )
        assert error(h, r.truth) < 1e-8
        assert error(info.direct, 0.2 * r.lam) < 1e-12  # the direct term is there
        assert info.solve.relative_residual < 1e-8
    assert error(info.implicit, r.truth) > 0.1  # and it matters here


def test_damping_is_added_once(ridge):
    r = ridge
    b = products.gradient(r.outer, r.lam, r.theta)[2]
    v = torch.linalg.solve(r.h + 0.3 * torch.eye(12), b)
    for solver in (
        bl.Direct(damping=0.3),
        bl.CG(12, damping=0.3),
        bl.CGNormal(60, damping=0.3),
        bl.Neumann(2000, 1 / (r.high + 0.3), damping=0.3),
    ):
        got, info = solver.solve(r.problem, r.lam, r.theta, None, b)
        assert error(got, v) < 1e-9, solver
        assert info.residual < 1e-9


def test_the_reported_residual_and_cost_are_true(ridge):
    r = ridge
    b = products.gradient(r.outer, r.lam, r.theta)[2]
    for solver, spent in (
        (bl.Identity(0.2), 0),
        (bl.Neumann(4, 0.2), 3),
        (bl.CG(3), 3),
        (bl.CGNormal(3), 7),
        (bl.Direct(), 12),
    ):
        counted = CountCalls(r.h)
        v, info = solver.solve(r.problem, r.lam, r.theta, None, b)
        residual = float((b - r.h @ v).norm())
        assert info.residual == pytest.approx(residual, rel=1e-6, abs=1e-12)
        assert info.relative_residual == pytest.approx(residual / float(b.norm()), abs=1e-9)
        assert info.products == spent and info.gradients == 2 * spent
        if isinstance(solver, bl.CG | bl.Neumann):  # the count is that of real calls
            method = {bl.CG: linsolve.cg, bl.CGNormal: linsolve.cg_normal}.get(type(solver))
            if method is None:
                linsolve.neumann(counted, b, solver.terms, solver.step)
            else:
                method(counted, b, solver.iters)
            assert counted.calls == spent


class CountCalls:
    """An operator that counts its products."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, v):
        self.calls += 1
        return self.matrix @ v


def test_warm_start_continues_where_the_last_call_stopped(ridge):
    r = ridge
    b = products.gradient(r.outer, r.lam, r.theta)[2]
    solver = bl.CG(4, warm_start=True)
    residuals = [
        solver.solve(r.problem, r.lam, r.theta, None, b)[1].relative_residual for _ in range(6)
    ]
    assert all(after < before for before, after in zip(residuals, residuals[1:], strict=False))
    assert residuals[-1] < 1e-6
    other = bl.CG(4, warm_start=True)
    other.load_state_dict(solver.state_dict())
    a, _ = solver.solve(r.problem, r.lam, r.theta, None, b)
    c, _ = other.solve(r.problem, r.lam, r.theta, None, b)
    assert torch.equal(a, c)  # the same operations in the same order


def test_lam_of_any_shape_and_scalar_unknowns():
    problem = bl.BilevelProblem(
        lambda lam, theta, batch: 0.5 * lam.exp().sum() * theta**2 - theta,
        lambda lam, theta, batch: 0.5 * (theta - 2) ** 2,
    )
    lam = torch.tensor([[0.3, -0.2]])
    a = float(lam.exp().sum())
    theta = torch.tensor(1 / a)
    expected = (1 / a - 2) * (-1 / a**2) * lam.exp()
    for solver in (bl.CG(5), bl.Direct(), bl.CGNormal(5)):
        h = bl.hypergradient(problem, lam, theta, solver=solver)
        assert h.shape == lam.shape
        assert error(h, expected) < 1e-12


# ---------------------------------------------------------------- CG, the bugs of others


def test_cg_ends_exactly_on_the_identity_and_on_early_convergence():
    b = torch.arange(1.0, 6.0)
    done = linsolve.cg(lambda v: v, b, iters=10)
    assert torch.equal(done.solution, b)  # sums of small integers are exact in any order
    assert (done.iterations, done.products, done.converged) == (1, 1, True)
    assert linsolve.cg_normal(lambda v: v, b, iters=10).solution.allclose(b, atol=1e-15)
    h = torch.diag(torch.tensor([1.0, 1.0, 2.0, 2.0, 5.0]))  # three distinct eigenvalues
    done = linsolve.cg(lambda v: h @ v, b, iters=50)
    assert done.iterations == 3
    assert error(done.solution, b / h.diagonal()) < 1e-14


@pytest.mark.parametrize("shape", [(), (1,)])
def test_cg_on_a_scalar_unknown(shape):
    b = torch.full(shape, 3.0)
    assert torch.equal(linsolve.cg(lambda v: 4 * v, b, iters=5).solution, b / 4)  # exact


@pytest.mark.parametrize("solve", [linsolve.cg, linsolve.cg_normal])
def test_cg_in_float32_long_after_it_is_done_accuses_nobody(solve):
    """Without a tolerance the recurrence would go on until p^T H p underflows to zero."""
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        n = 3 + seed % 6
        mu = 5 * torch.rand(n, generator=generator, dtype=torch.float32) + 0.05
        b = torch.randn(n, generator=generator, dtype=torch.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            info = solve(lambda v, mu=mu: mu * v, b, 300, tol=0.0)
        assert torch.allclose(info.solution, b / mu, rtol=1e-3) and not info.negative_curvature


def test_cg_on_a_zero_right_hand_side_is_zero():
    b = torch.zeros(4)
    for solve in (linsolve.cg, linsolve.cg_normal):
        done = solve(lambda v: 2 * v, b, iters=5)
        assert torch.equal(done.solution, b) and done.iterations == 0 and done.residual == 0


def test_cg_is_scipys_cg_step_by_step(ridge):
    r = ridge
    for iters in (1, 3, 7):
        theirs, _ = scipy.sparse.linalg.cg(r.h.numpy(), r.v.numpy(), rtol=0, atol=0, maxiter=iters)
        ours = linsolve.cg(lambda v: r.h @ v, r.v, iters).solution
        assert error(ours, torch.as_tensor(theirs)) < 1e-10
    inverse_diagonal = 1 / r.h.diagonal()
    theirs, _ = scipy.sparse.linalg.cg(
        r.h.numpy(), r.v.numpy(), rtol=0, atol=0, maxiter=4, M=np.diag(inverse_diagonal.numpy())
    )
    ours = linsolve.cg(
        lambda v: r.h @ v, r.v, 4, precondition=lambda x: inverse_diagonal * x
    ).solution
    assert error(ours, torch.as_tensor(theirs)) < 1e-10


def test_cg_normal_is_cg_on_the_squared_system(ridge):
    r = ridge
    for iters in (1, 3, 6):
        theirs = linsolve.cg(lambda v: r.h @ (r.h @ v), r.h @ r.v, iters).solution
        ours = linsolve.cg_normal(lambda v: r.h @ v, r.v, iters)
        assert error(ours.solution, theirs) < 1e-8
        assert ours.products == 2 * iters + 1


def test_cg_normal_stops_where_its_tolerance_says_from_any_start(ridge):
    r = ridge
    calls = []

    def matvec(v):
        calls.append(v)
        return r.h @ v

    def normal_residual(v):
        return float((r.h @ (r.v - r.h @ v)).norm() / (r.h @ r.v).norm())

    solution = torch.linalg.solve(r.h, r.v)
    start = solution + 1e-3 * torch.linspace(-1, 1, len(solution))
    for x0, tol in ((None, 1e-2), (start, 1e-6), (start, 1e-2), (solution, 1e-8)):
        calls.clear()
        done = linsolve.cg_normal(matvec, r.v, 100, tol, x0=x0)
        assert done.converged and normal_residual(done.solution) <= tol
        assert done.products == len(calls) == 2 * done.iterations + (1 if x0 is None else 3)
        if done.iterations > 1:  # one step less was not enough
            before = linsolve.cg_normal(matvec, r.v, done.iterations - 1, tol, x0=x0)
            assert not before.converged and normal_residual(before.solution) > tol
    assert done.iterations == 0 and torch.equal(done.solution, solution)


def test_cg_on_an_indefinite_matrix_says_so_and_keeps_its_last_iterate():
    h = torch.diag(torch.tensor([3.0, 2.0, -1.0]))
    b = torch.tensor([1.0, 1.0, 0.8])
    with pytest.warns(bl.NegativeCurvatureWarning, match="not positive definite"):
        done = linsolve.cg(lambda v: h @ v, b, iters=10)
    assert done.negative_curvature and not done.converged
    assert done.curvature[0] <= 0
    before = linsolve.cg(lambda v: h @ v, b, iters=done.iterations).solution
    assert torch.equal(done.solution, before)  # the same operations in the same order
    done = linsolve.cg_normal(lambda v: h @ v, b, iters=10)  # the squared system is definite
    assert error(done.solution, b / h.diagonal()) < 1e-10
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = linsolve.cg(lambda v: h @ v, b, iters=10, damping=1.5)
    assert error(done.solution, b / (h.diagonal() + 1.5)) < 1e-12


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cg_on_a_singular_matrix_stops_before_it_explodes(dtype, preconditioned):
    """Least squares with more parameters than examples: b has a part that no H v reaches."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, 12, generator=draws, dtype=dtype)
    h, b = x.T @ x / 4, torch.randn(12, generator=draws, dtype=dtype)
    m = (lambda r: r / (h.diagonal() + 0.1)) if preconditioned else None
    size = torch.linalg.norm(torch.linalg.pinv(h.double(), rtol=1e-5) @ b.double())
    with pytest.warns(bl.NegativeCurvatureWarning, match="H is singular to working precision"):
        done = linsolve.cg(lambda v: h @ v, b, iters=40, precondition=m)
    assert done.negative_curvature and not done.converged and done.iterations <= 12
    assert done.solution.norm() < 1e6 * size
    start = torch.linalg.pinv(h.double(), rtol=1e-5).to(dtype) @ b
    with pytest.warns(bl.NegativeCurvatureWarning):  # all that is left is that part
        done = linsolve.cg(lambda v: h @ v, b, iters=40, x0=start, precondition=m)
    assert done.solution.norm() < 1e6 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cg_on_a_singular_matrix_solves_what_has_a_solution_and_says_nothing(dtype):
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(4, 12, generator=draws, dtype=dtype)
    h = x.T @ x / 4
    truth = x.T @ torch.randn(4, generator=draws, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        done = linsolve.cg(lambda v: h @ v, h @ truth, iters=40)
    assert error(done.solution, truth) < (1e-8 if dtype == torch.float64 else 1e-2)
    wide = torch.tensor([1.0, 1e-3, 1e-5], dtype=dtype)  # ill-conditioned is not singular
    done = linsolve.cg(lambda v: wide * v, torch.ones(3, dtype=dtype), iters=30)
    assert error(done.solution, 1 / wide) < 1e-3


def test_neumann_error_per_eigenvalue():
    mu = torch.tensor([0.01, 0.3, 1.0, 1.9])
    b = torch.ones(4)
    for terms in (1, 2, 5, 20):
        done = linsolve.neumann(lambda v: mu * v, b, terms, step=0.9)
        assert error(1 - mu * done.solution, (1 - 0.9 * mu) ** terms) < 1e-13
        assert done.products == terms - 1
    with pytest.raises(ValueError, match=r"curvature is at least 1.9, .* step < 2 / curv.* = 1.05"):
        linsolve.neumann(lambda v: mu * v, b, 5000, step=1.5)


def test_neumann_warns_where_its_summands_have_outgrown_b():
    mu, b = torch.tensor([1.0, 1.0, 1.0, 2.5]), torch.ones(4)
    # summand j is (0.04^j, 0.04^j, 0.04^j, (-1.4)^j), and ||b||^2 = 4 lies between 1.4^4 and 1.4^6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        linsolve.neumann(lambda v: mu * v, b, 3, step=0.96)
        linsolve.neumann(lambda v: 0 * v, b, 50, step=0.96)  # neither grows nor shrinks
    with pytest.warns(bl.DivergenceWarning) as caught:
        done = linsolve.neumann(lambda v: mu * v, b, 4, step=0.96)
    text = str(caught.list[0].message)
    assert "step: 0.96 makes" in text and "the last of 4 summands is 1.37 times the first" in text
    assert "largest curvature is at least 2.5," in text and "step < 2 / curvature = 0.8)" in text
    truth = 0.96 * torch.stack([(1 - 0.96 * mu) ** j for j in range(4)]).sum(0)
    assert error(done.solution, truth) < 1e-14 and done.products == 3


def test_neumann_says_that_no_step_helps_against_negative_curvature():
    mu, b = torch.tensor([1.0, -0.5]), torch.ones(2)
    # the first summand grows by (1.5^2 / 2)^(1/2) = 1.06 and its quotient is 0.25: not seen yet
    with pytest.warns(bl.DivergenceWarning, match="at least 2.06, if none is negative"):
        linsolve.neumann(lambda v: mu * v, b, 2, step=1.0)
    with pytest.warns(bl.DivergenceWarning, match="from -0.5 to 0.25 was met.* no step converges"):
        done = linsolve.neumann(lambda v: mu * v, b, 3, step=1.0)
    assert done.negative_curvature
    with pytest.raises(bl.refuse.NotFinite, match="from -0.5 to 0.25 was met.* no step converges"):
        linsolve.neumann(lambda v: mu * v, b, 4000, step=1.0)
    with pytest.raises(bl.refuse.NotFinite, match="matvec: H b is not finite"):
        linsolve.neumann(lambda v: v / 0, b, 4, step=1.0)


# ---------------------------------------------------------------- unrolling


def graph_unroll(r, theta, steps, lr):
    """Autograd through the kept graph: the plain truth for T steps."""
    lam = r.lam.clone().requires_grad_()
    theta = theta.clone().requires_grad_()
    for _ in range(steps):
        (g,) = torch.autograd.grad(r.inner(lam, theta, None), theta, create_graph=True)
        theta = theta - lr * g
    (h,) = torch.autograd.grad(r.outer(lam, theta, None), lam)
    return h, theta


@pytest.mark.parametrize("steps", [1, 2, 17])
def test_reverse_and_forward_equal_autograd_through_the_graph(ridge, steps):
    r, lr = ridge, 0.2
    truth, last = graph_unroll(r, 0.1 * r.v, steps, lr)
    for mode in ("reverse", "forward"):
        h, info = bl.unrolled_hypergradient(
            r.problem, r.lam, 0.1 * r.v, steps=steps, lr=lr, mode=mode, return_info=True
        )
        assert error(h, truth) < 1e-10
        assert error(info.theta, last) < 1e-12
    assert info.stored == 12 * 12


def test_batches_that_change_with_the_step_are_the_same_on_the_way_back(ridge):
    r = ridge
    rows = [torch.arange(t, 60, 4) for t in range(4)]
    problem = bl.BilevelProblem(
        lambda lam, theta, i: (
            0.5 * (r.x[i] @ theta - r.y[i]).square().mean()
            + 0.5 * (lam.exp() * theta.square()).sum()
        ),
        r.outer,
    )
    options = dict(steps=9, lr=0.1, inner_batch=lambda t: rows[t % 4])
    h = bl.unrolled_hypergradient(problem, r.lam, torch.zeros(12), **options)
    f = bl.unrolled_hypergradient(problem, r.lam, torch.zeros(12), mode="forward", **options)

    def descend(lam):
        theta = torch.zeros(12)
        for t in range(9):
            theta = theta - 0.1 * products.gradient(problem.inner_loss, lam, theta, rows[t % 4])[2]
        return theta

    differences = bl.finite_difference_hypergradient(problem, r.lam, descend)
    assert error(h, f) < 1e-12
    assert error(h, differences) < 1e-7


def test_unrolling_converges_to_the_implicit_value_at_the_predicted_rate(ridge):
    r = ridge
    lr = 1 / r.high
    rho = 1 - lr * r.low
    errors = {
        steps: error(
            bl.unrolled_hypergradient(r.problem, r.lam, r.theta, steps=steps, lr=lr), r.truth
        )
        for steps in (20, 40, 60)
    }
    for steps in (20, 40):  # from theta*, the slowest mode falls by rho a step
        slope = math.log(errors[steps + 20] / errors[steps]) / 20
        assert slope == pytest.approx(math.log(rho), rel=0.05)
    far = bl.unrolled_hypergradient(r.problem, r.lam, torch.zeros(12), steps=2000, lr=lr)
    assert error(far, r.truth) < 1e-10


@pytest.mark.parametrize("terms", [1, 2, 3, 10, 40])
def test_neumann_with_k_terms_is_k_truncated_steps_at_a_fixed_point(ridge, terms):
    r = ridge
    lr = 1 / r.high
    neumann = bl.hypergradient(r.problem, r.lam, r.theta, solver=bl.Neumann(terms, lr))
    unrolled = bl.unrolled_hypergradient(r.problem, r.lam, r.theta, steps=50, lr=lr, truncate=terms)
    assert error(neumann, unrolled) < 1e-12
    if terms == 1:
        identity = bl.hypergradient(r.problem, r.lam, r.theta, solver=bl.Identity(lr))
        assert torch.equal(identity, neumann)  # v = lr b both times, number by number
        one_step = bl.unrolled_hypergradient(r.problem, r.lam, r.theta, steps=1, lr=lr)
        assert error(identity, one_step) < 1e-12


def test_unrolled_costs_are_counted():
    r = Ridge(d=3)
    _, info = bl.unrolled_hypergradient(
        r.problem, r.lam, r.theta, steps=10, lr=0.1, truncate=4, return_info=True
    )
    assert (info.gradients, info.stored) == (10 + 1 + 2 * 4, 4 * 3)


# ---------------------------------------------------------------- differences, check


def test_finite_differences_have_second_order_error(ridge):
    r = ridge
    errors = [
        error(bl.finite_difference_hypergradient(r.problem, r.lam, r.solution, eps), r.truth)
        for eps in (1e-2, 1e-3)
    ]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)
    rows = torch.eye(12)[:3]
    some = bl.finite_difference_hypergradient(r.problem, r.lam, r.solution, directions=rows)
    assert error(some, r.truth[:3]) < 1e-7


def test_check_passes_the_right_and_fails_the_wrong(ridge, capsys):
    r = ridge
    good = bl.check(r.problem, r.lam, r.theta, solver=bl.CG(12), solve_inner=r.solution)
    assert good.passed and good.relative_error_differences < 1e-7
    assert "agrees" in capsys.readouterr().out
    bad = bl.check(r.problem, r.lam, r.theta, solver=bl.Identity(1.0), solve_inner=r.solution)
    assert not bad.passed
    assert "DOES NOT AGREE" in capsys.readouterr().out
    dropped = bl.BilevelProblem(r.inner, lambda lam, theta, b: r.outer(lam.detach(), theta, b))
    truth_without = error(bl.hypergradient(dropped, r.lam, r.theta), r.truth)
    assert truth_without > 0.1  # forgetting the direct term is visible
    few = bl.check(
        r.problem, r.lam, r.theta, solver=bl.CG(12), solve_inner=r.solution, verbose=False,
        num_directions=3, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert few.passed and few.relative_error_differences < 1e-6


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_solvers_on_the_ggn_solve_with_the_dense_ggn(loss):
    risk, lam, theta, batch = mlp_risk(loss)
    problem = bl.BilevelProblem(risk, bl.WeightedRisk(risk.model, loss))
    b = torch.linspace(-1, 1, len(theta))
    jacobian = torch.func.jacrev(lambda t: risk.outputs(t, batch))(theta)
    p = risk.outputs(theta, batch).softmax(1)
    g = 2 * 0.01 * torch.eye(len(theta))
    for i in range(20):
        h = torch.diag(p[i]) - torch.outer(p[i], p[i]) if loss == "cross_entropy" else torch.eye(3)
        g = g + lam[i].sigmoid() / 20 * jacobian[i].T @ h @ jacobian[i]
    v = torch.linalg.solve(g, b)
    step = 1 / float(torch.linalg.eigvalsh(g)[-1])
    for solver in (
        bl.Direct(curvature="ggn"),
        bl.CG(200, curvature="ggn"),
        bl.CGNormal(400, curvature="ggn"),
        bl.Neumann(20_000 if loss == "cross_entropy" else 4_000, step, curvature="ggn"),
    ):
        got, info = solver.solve(problem, lam, theta, batch, b)
        assert error(got, v) < 1e-7, solver
        assert info.relative_residual < 1e-7 and not info.negative_curvature
    with pytest.raises(TypeError, match="give a bilevel_lite.WeightedRisk"):
        plain = bl.BilevelProblem(lambda lam, t, b: risk(lam, t, b), risk)
        bl.CG(2, curvature="ggn").solve(plain, lam, theta, batch, b)


@pytest.mark.parametrize("frozen", ["nothing", "weight", "bias", "first layer"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_slopes_are_the_gradients_along_v_whatever_is_trained(kind, frozen):
    """Linear maps of plain inputs are pushed forward in a way of their own; so are frozen parts."""
    g = torch.Generator().manual_seed(0)
    first = nn.Linear(9, 4) if kind == "linear" else nn.Conv2d(1, 4, 2, stride=2, padding=1)
    tail = [] if kind == "linear" else [nn.Flatten()]
    model = nn.Sequential(first, nn.Tanh(), *tail, nn.LazyLinear(3, bias=False)).double()
    x = torch.randn(5, *((9,) if kind == "linear" else (1, 3, 3)), generator=g)
    y = torch.tensor([0, 2, 1, 1, 0])
    model(x)
    for name, parameter in list(first.named_parameters()):
        if frozen in (name, "first layer"):
            fixed = parameter.detach().clone()
            delattr(first, name)
            first.register_buffer(name, fixed)  # no part of theta
    risk, theta = bl.WeightedRisk(model), bl.flatten(model)
    v = torch.randn(len(theta), generator=g)
    slopes, _ = slopes_and_route(risk, theta, (x, y), v)
    for i in range(5):
        at = theta.clone().requires_grad_()
        loss = risk.losses(at, (x[i : i + 1], y[i : i + 1]))[0]
        (grad,) = torch.autograd.grad(loss, at)
        assert abs(float(slopes[i] - grad @ v)) < 1e-12


@pytest.mark.parametrize("h, b", [(1e-4, 1e-4), (1e-8, 1e-8), (1e-10, 1e-4), (1e-14, 1e-11)])
@pytest.mark.parametrize("solve", [linsolve.cg, linsolve.cg_normal])
def test_a_small_matrix_in_float32(solve, h, b):
    """||H H r||^2 underflows there: v was zero, and said to be converged."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=g, dtype=torch.float32)
    a = (a @ a.T / 5 + torch.eye(5, dtype=torch.float32)) * h
    right = b * torch.randn(5, generator=g, dtype=torch.float32)
    info = solve(lambda v: a @ v, right, 40, tol=1e-6)
    truth = torch.linalg.solve(a.double(), right.double())
    assert info.converged and error(info.solution.double(), truth) < 1e-5
    started = solve(lambda v: a @ v, right, 40, tol=1e-6, x0=info.solution.flip(0))
    assert started.converged and error(started.solution.double(), truth) < 1e-5
    low, high = info.curvature
    power = 1 if solve is linsolve.cg else 2
    eigenvalues = torch.linalg.eigvalsh(a.double()) ** power
    if h > 1e-14:  # H^2 is no number of float32 there
        assert 0.99 * eigenvalues[0] <= low <= high <= 1.01 * eigenvalues[-1]


@pytest.mark.parametrize("size", [1e2, 1e4, 1e7])
@pytest.mark.parametrize("solve", [linsolve.cg, linsolve.cg_normal])
def test_a_start_far_away_in_float32_is_not_called_converged_by_its_rounding(solve, size):
    g = torch.Generator().manual_seed(0)
    a = torch.randn(5, 5, generator=g, dtype=torch.float32)
    a = a @ a.T / 5 + torch.eye(5, dtype=torch.float32)
    b, x0 = (torch.randn(5, generator=g, dtype=torch.float32) for _ in range(2))
    info = solve(lambda v: a @ v, b, 40, tol=1e-6, x0=size * x0)
    assert info.converged and float((b - a @ info.solution).norm()) < 3e-6 * float(b.norm())


@pytest.mark.parametrize("of", [torch.linalg.solve, torch.linalg.slogdet, torch.linalg.det])
def test_a_forward_mode_of_linear_algebra_inside_a_loss_is_refused(of):
    """The gradient of torch.func.jvp of these is wrong in torch, by 25 % to 110 %."""

    def g(lam, theta, _):
        a = theta.view(3, 3) + 2 * torch.eye(3)
        if of is torch.linalg.solve:
            d = torch.func.jvp(lambda z: of(a, z), (a[0].detach(),), (a[1].detach(),))[1]
        else:
            take = (lambda m: of(m)[1]) if of is torch.linalg.slogdet else of
            d = torch.func.jvp(take, (a,), (a.detach(),))[1]
        return lam * d.square().sum() + theta.square().sum()

    problem = bl.BilevelProblem(g, lambda lam, theta, _: (theta - 1).square().sum())
    theta = 0.1 * torch.arange(9.0)
    with pytest.raises(ValueError, match="takes a forward-mode derivative"):
        bl.hypergradient(problem, torch.tensor(0.7), theta, solver=bl.Direct(50.0))


def test_the_gradient_in_lam_alone_leaves_thetas_backward_pass_out():
    draws = torch.Generator().manual_seed(0)
    lam, theta, x = (torch.randn(3, generator=draws, dtype=torch.float64) for _ in range(3))
    backs = []

    def squared(z):  # and how often one goes back through it
        out = z**2
        if out.requires_grad:
            out.register_hook(lambda _: backs.append(1))
        return out

    cases = {
        "a weight": (lambda lam, theta, x: (lam * squared(theta) * x).sum(), theta**2 * x),
        "upstream of it": (
            lambda lam, theta, x: (squared(theta * lam) * x).sum(), 2 * lam * theta**2 * x
        ),
    }  # fmt: skip
    for name, (loss, truth) in cases.items():
        both, counts = products.gradient(loss, lam, theta, x), []
        for _ in range(6):  # some of them are looked at, and those go back through all
            backs.clear()
            value, slope = products.lam_gradient(loss, lam, theta, x)
            counts.append(len(backs))
            assert torch.equal(value, both[0]) and not slope.requires_grad
            assert (slope - truth).abs().max() < 1e-14 and torch.equal(slope, both[1])
        assert (0 in counts) == (name == "a weight")
    unread = products.lam_gradient(lambda lam, theta, x: (theta * x).sum(), lam, theta, x)[1]
    assert unread.shape == lam.shape and not unread.any()
    with pytest.raises(ValueError, match="g: .* finite"):
        products.lam_gradient(lambda lam, theta, x: (lam / 0).sum(), lam, theta, x, "g")


def test_the_gradient_in_lam_alone_is_of_the_same_loss_and_looked_at():
    draws = torch.Generator().manual_seed(0)
    lam, theta = (torch.randn(64, generator=draws, dtype=torch.float64) for _ in range(2))

    def penalised(lam, theta, batch):  # a loss that differentiates in theta itself
        value = (lam * theta**3).sum()
        if theta.requires_grad:
            value = value + torch.autograd.grad(value, theta, create_graph=True)[0].square().sum()
        return value

    truth = theta**3 + 2 * lam * (3 * theta**2) ** 2
    for _ in range(6):  # the 1st, 2nd, 4th are looked at, by the whole gradient
        found = products.lam_gradient(penalised, lam, theta)[1]
        assert (found - truth).norm() < 1e-14 * truth.norm()

    def drawn(lam, theta, batch):
        return (Drawing.apply(theta) - lam).square().sum()

    with pytest.raises(ValueError, match="has another gradient when the same graph is gone back"):
        products.lam_gradient(drawn, lam, theta)
