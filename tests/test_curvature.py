"""Curvature operators against dense matrices built another way, and against curvlinops."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import curvature, linsolve, solvers

LOSSES = ["cross_entropy", "mse"]


def error(got, truth):
    return float((got - truth).detach().norm() / truth.detach().norm())


def setting(loss="cross_entropy", n=12, l2=0.01, weighted=True, classes=3, seed=0):
    """A small tanh network, its weighted risk and a batch."""
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, classes)
    ).double()
    theta = 0.5 * torch.randn(bl.flatten(model).numel(), generator=g)
    x = torch.randn(n, 4, generator=g)
    if loss == "mse":
        y = torch.randn(n, classes, generator=g)
    else:
        y = torch.randint(classes, (n,), generator=g)
    weight = (lambda lam, b: lam[b[2]].sigmoid()) if weighted else None
    risk = bl.WeightedRisk(model, loss, weight=weight, l2=l2)
    return risk, torch.randn(n, generator=g), theta, (x, y, torch.arange(n))


def jacobian(risk, theta, batch):
    """d outputs / d theta, shape (n, C, d), by reverse mode, column by column."""
    return torch.autograd.functional.jacobian(lambda t: risk.outputs(t, batch), theta)


def example_hessians(risk, theta, batch):
    """Hessian of each example's loss in its outputs, shape (n, C, C), by autograd."""
    outputs = risk.outputs(theta, batch)
    if risk.loss == "mse":
        return torch.eye(outputs.shape[1]).expand(len(outputs), -1, -1)
    losses = [
        torch.autograd.functional.hessian(
            lambda o, t=t: torch.nn.functional.cross_entropy(o[None], t[None]), output
        )
        for output, t in zip(outputs, batch[1], strict=True)
    ]
    return torch.stack(losses)


@pytest.mark.parametrize("loss", LOSSES)
def test_ggn_is_the_dense_product_of_jacobian_and_output_hessian(loss):
    risk, lam, theta, batch = setting(loss)
    j, h = jacobian(risk, theta, batch), example_hessians(risk, theta, batch)
    truth = torch.einsum("n,nci,ncd,ndj->ij", lam.sigmoid() / 12, j, h, j)
    truth = truth + 0.02 * torch.eye(len(theta))
    operator = curvature.GGN(risk, lam, theta, batch)
    assert error(operator.dense(), truth) < 1e-13
    v = torch.linspace(-1, 1, len(theta))
    assert error(operator @ v, truth @ v) < 1e-13
    assert error(curvature.ggn_vp(risk, lam, theta, batch, v), truth @ v) < 1e-13
    assert error(operator @ torch.stack([v, v**2], 1), truth @ torch.stack([v, v**2], 1)) < 1e-13
    exact = curvature.Fisher(risk, lam, theta, batch, "exact")
    assert error(exact.dense(), truth) < 1e-13


@pytest.mark.parametrize("loss", LOSSES)
def test_empirical_fisher_is_the_second_moment_of_the_gradients_weighted_once(loss):
    risk, lam, theta, batch = setting(loss)
    gradients = torch.autograd.functional.jacobian(lambda t: risk.losses(t, batch), theta)
    truth = torch.einsum("n,ni,nj->ij", lam.sigmoid() / 12, gradients, gradients)
    truth = truth + 0.02 * torch.eye(len(theta))
    assert error(curvature.EmpiricalFisher(risk, lam, theta, batch).dense(), truth) < 1e-13


@pytest.mark.parametrize("loss", LOSSES)
def test_operators_equal_curvlinops(loss):
    curvlinops = pytest.importorskip("curvlinops")
    risk, lam, theta, batch = setting(loss, l2=0.0, weighted=False)
    parameters = bl.unflatten(risk.model, theta)
    for name, p in risk.model.named_parameters():
        p.data.copy_(parameters[name])
    theirs_loss = (
        torch.nn.MSELoss(reduction="sum")
        if loss == "mse"
        else torch.nn.CrossEntropyLoss(reduction="sum")
    )
    scale = (2.0 if loss == "mse" else 1.0) * 12  # theirs: the sum of ||.||^2; ours: mean of half
    v = torch.linspace(-1, 1, len(theta))
    for theirs, ours in (
        (curvlinops.HessianLinearOperator, curvature.Hessian),
        (curvlinops.GGNLinearOperator, curvature.GGN),
    ):
        operator = theirs(
            risk.model,
            theirs_loss,
            list(risk.model.parameters()),
            [batch[:2]],
            check_deterministic=False,
        )
        view = curvature.from_curvlinops(operator, theta)
        assert error(ours(risk, lam, theta, batch) @ v, (view @ v) / scale) < 1e-12
    with pytest.raises(ValueError, match="shape"):
        curvature.from_curvlinops(operator, theta[:-1])


@pytest.mark.parametrize("loss", LOSSES)
def test_ggn_is_the_hessian_when_the_outputs_are_linear_in_theta(loss):
    risk, lam, theta, batch = setting(loss)
    risk.model = torch.nn.Linear(4, 3).double()
    theta = theta[:15]
    g = curvature.GGN(risk, lam, theta, batch).dense()
    assert error(g, curvature.Hessian(risk, lam, theta, batch).dense()) < 1e-13


def test_scipy_view_gives_the_same_products_and_solves():
    scipy_linalg = pytest.importorskip("scipy.sparse.linalg")
    risk, lam, theta, batch = setting(l2=0.1)
    operator = curvature.GGN(risk, lam, theta, batch)
    view, v = operator.to_scipy(), np.linspace(-1, 1, len(theta))
    assert np.allclose(view @ v, (operator @ torch.as_tensor(v)).numpy(), rtol=1e-13)
    assert np.allclose(view @ np.eye(len(theta)), operator.dense().numpy(), atol=1e-14)
    solution, failed = scipy_linalg.cg(view, v, rtol=1e-12)
    assert not failed
    ours = linsolve.cg(operator, torch.as_tensor(v), 200, tol=1e-12).solution
    assert error(torch.as_tensor(solution), ours) < 1e-9


# ---------------------------------------------------------------- the output side


def probes_of(risk, outputs, y, sigma, *how, **more):
    return curvature.Probes(*how, **more).of(curvature.OutputSide(risk, outputs, y, sigma))


@pytest.mark.parametrize("loss", LOSSES)
def test_exact_probes_have_the_weighted_output_hessian_as_second_moment(loss):
    risk, lam, theta, batch = setting(loss)
    outputs, sigma = risk.outputs(theta, batch), lam.sigmoid()
    probes = torch.stack(probes_of(risk, outputs, batch[1], sigma, "exact"))
    moment = torch.einsum("mnc,mnd->ncd", probes, probes)
    h = example_hessians(risk, theta, batch)
    assert error(moment, sigma[:, None, None] * h) < 1e-13
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    by_hand = torch.einsum("n,ncd,nd->nc", sigma / 12, h, u)
    assert error(curvature.OutputSide(risk, outputs, batch[1], sigma).times(u), by_hand) < 1e-13


@pytest.mark.parametrize("loss", LOSSES)
def test_monte_carlo_probes_have_it_in_expectation_at_the_rate_one_over_root_m(loss):
    risk, lam, theta, batch = setting(loss)
    outputs, sigma = risk.outputs(theta, batch), lam.sigmoid()
    truth = sigma[:, None, None] * example_hessians(risk, theta, batch)
    g, errors = torch.Generator().manual_seed(2), []
    for m in (100, 10000):
        probes = torch.stack(probes_of(risk, outputs, batch[1], sigma, "mc", m, generator=g))
        errors.append(error(torch.einsum("mnc,mnd->ncd", probes, probes), truth))
    assert errors[1] < 0.05
    assert 5 < errors[0] / errors[1] < 20  # 10 = sqrt(100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 3), (5, 7, 4)])
def test_labels_are_those_of_multinomial_and_noise_that_of_randn(shape, dtype):
    outputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.zeros(shape[:-1], dtype=torch.int64)
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    risk = bl.WeightedRisk(torch.nn.Linear(2, 2))
    p = outputs.softmax(-1)
    root = (1 / torch.tensor(shape[1:-1] or 1, dtype=dtype).prod()).sqrt()
    for probe in probes_of(risk, outputs, y, None, "mc", 3, ours):
        labels = p.flatten(0, -2).multinomial(1, generator=theirs).view(shape[:-1])
        want = root * (p - torch.nn.functional.one_hot(labels, shape[-1]))
        assert error(probe * math.sqrt(3), want) < 10 * torch.finfo(dtype).eps
    assert torch.equal(ours.get_state(), theirs.get_state())
    risk = bl.WeightedRisk(torch.nn.Linear(2, 2), "mse")
    (probe,) = probes_of(risk, outputs, outputs, None, "mc", 1, ours)
    assert torch.equal(probe, torch.randn(shape, dtype=dtype, generator=theirs))


def test_monte_carlo_fisher_converges_to_the_ggn_at_the_rate_one_over_root_m():
    risk, lam, theta, batch = setting()
    truth = curvature.GGN(risk, lam, theta, batch).dense()
    g, sizes, errors = torch.Generator().manual_seed(0), (16, 64, 256, 1024), []
    for m in sizes:
        draws = [
            curvature.Fisher(risk, lam, theta, batch, samples=m, generator=g).dense()
            for _ in range(3)
        ]
        errors.append(sum(error(d, truth) ** 2 for d in draws) ** 0.5)
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert abs(slope + 0.5) < 0.15
    one = curvature.Fisher(risk, lam, theta, batch, generator=g)
    v = torch.ones(len(theta))
    assert torch.equal(one @ v, one @ v)  # drawn once: the same operations


# ---------------------------------------------------------------- bad input


def test_bad_input_gives_one_clear_sentence():
    risk, lam, theta, batch = setting()
    with pytest.raises(TypeError, match="WeightedRisk"):
        curvature.GGN(lambda l, t, b: t.sum(), lam, theta, batch)
    risk.weight = lambda l, b: l[b[2]]
    with pytest.raises(ValueError, match="weight: the smallest is -"):
        curvature.GGN(risk, lam, theta, batch)
    with pytest.raises(ValueError, match="finite"):
        curvature.GGN(risk, lam.abs() * math.inf, theta, batch)
    with pytest.raises(ValueError, match="fisher: got 'type-2'"):
        curvature.Fisher(risk, lam.abs(), theta, batch, "type-2")
    with pytest.raises(ValueError, match="samples: got 0"):
        curvature.Fisher(risk, lam.abs(), theta, batch, samples=0)
    with pytest.raises(ValueError, match="draws none"):
        curvature.Fisher(risk, lam.abs(), theta, batch, "exact", samples=2)
    operator = curvature.GGN(risk, lam.abs(), theta, batch)
    with pytest.raises(ValueError, match="operand"):
        operator @ theta[:-1]
    with pytest.raises(ValueError, match="max_dim"):
        operator.dense(max_dim=10)
    empty = tuple(part[:0] for part in batch)
    with pytest.raises(ValueError, match="no example"):
        curvature.GGN(risk, lam.abs(), theta, empty)


# ---------------------------------------------------------------- memory


@pytest.fixture
def no_collector():
    """What then dies, dies of having no reference, and not of a collection that may come late."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    "build",
    [
        curvature.GGN,
        curvature.Fisher,
        curvature.EmpiricalFisher,
        curvature.Hessian,
        lambda *args: bl.products.hvp_operator(*args),
    ],
    ids=["GGN", "Fisher", "EmpiricalFisher", "Hessian", "hvp_operator"],
)
def test_an_operator_dies_with_its_last_reference(build, no_collector):
    risk, lam, theta, batch = setting()
    operator = build(risk, lam, theta, batch)
    operator(torch.ones_like(theta))
    alive = weakref.ref(operator)
    del operator
    assert alive() is None


@pytest.mark.parametrize("which", ["ggn", "hessian"])
def test_no_operator_outlives_its_solve(which, no_collector, monkeypatch):
    risk, lam, theta, batch = setting()
    built = []

    def counted(make):
        def build(*args):
            operator = make(*args)
            built.append(weakref.ref(operator))
            return operator

        return build

    for name in ("GGN", "hvp_operator"):
        monkeypatch.setattr(solvers, name, counted(getattr(solvers, name)))
    problem = bl.BilevelProblem(risk, risk)
    solver = bl.CG(3, damping=10.0, curvature=which)
    solver.solve(problem, lam, theta, batch, torch.ones_like(theta))
    assert len(built) == 1 and built[0]() is None


@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e-12])
@pytest.mark.parametrize("solve", ["cg", "cg_normal", "neumann"])
def test_a_tiny_right_hand_side_in_float32_is_solved(solve, size):
    """The squares of its entries underflow; CG once took it for zero, and called that converged."""
    H, b = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([1.0, 2.0])
    H, b = H.float(), b.float()
    options = {"terms": 60, "step": 0.3} if solve == "neumann" else {"iters": 2}
    info = getattr(linsolve, solve)(lambda v: H @ v, size * b, **options)
    truth = torch.linalg.solve(H, b)
    assert (info.solution / size - truth).norm() < 1e-4 * truth.norm()
    if solve != "neumann":
        start = linsolve.cg(lambda v: H @ v, size * b, 1, x0=size * truth)
        assert (start.solution / size - truth).norm() < 1e-4 * truth.norm()
        assert info.relative_residual < 1e-4 and info.residual < size
