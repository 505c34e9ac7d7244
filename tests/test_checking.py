"""`check` is a judge: right solvers agree, and what is broken on purpose does not, by name.

The package is broken inside each test, one function at a time; a judge that took the way of the
judged number would agree with it.
"""

import copy

import pytest
import torch
from test_kfac import Borrowing, Positions, classify
from test_kfac_risks import heads
from test_risk import case, problem_of, solve
from torch import nn

import bilevel_lite as bl
from bilevel_lite import checking, kfac, products, same_function, slopes, solvers, tape

pytestmark = pytest.mark.filterwarnings("ignore::bilevel_lite.linsolve.NegativeCurvatureWarning")


def judged(c, solver, theta=None, **options):
    return bl.check(
        problem_of(c), c.lam, c.theta if theta is None else theta, c.batch, None, solver,
        verbose=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["weights", "inputs", "rising", "inputs, rising", "sum"])
def solved(request):
    """Where lam may stand, at the solution; the losses' own slope counts where they are read."""
    c = case(request.param)
    return c, solve(c, c.lam, c.theta)


# ---------------------------------------------------------------- right ones agree


RIGHT = {
    "direct": bl.Direct,
    "cg": lambda: bl.CG(300, tol=1e-12),
    "cg behind kfac": lambda: bl.CG(300, tol=1e-12, precondition=bl.KFAC(1e-2)),
}


@pytest.mark.parametrize("name", list(RIGHT))
def test_right_solvers_agree(solved, name):
    c, theta = solved
    few = {"num_directions": 3, "generator": torch.Generator().manual_seed(0)}
    report = judged(c, RIGHT[name](), theta, solve_inner=lambda lam: solve(c, lam, theta), **few)
    assert report.passed and report.faults == (), str(report)
    assert report.rtol == 1e-4 and "agrees to 1e-04" in str(report)
    errors = report.relative_error_exact, report.relative_error_cross
    assert max(errors) < 1e-7 and report.relative_error_differences < 1e-6


def single(c, theta):
    """The same case in float32; the inner problem is still solved in float64."""
    short, lam = copy.deepcopy(c), c.lam.float()
    short.risk.model.float()

    def cast(part):
        if isinstance(part, tuple):
            return tuple(map(cast, part))
        return part.float() if part.is_floating_point() else part

    short.batch, short.lam, short.target = cast(c.batch), lam, c.target.float()
    return short, theta.float()


@pytest.mark.parametrize("name", list(RIGHT))
def test_right_solvers_agree_in_float32(solved, name):
    c, theta = solved
    short, there = single(c, theta)
    solver = bl.CG(100, tol=1e-6) if name == "cg" else RIGHT[name]()
    report = judged(
        short, solver, there, solve_inner=lambda lam: solve(c, lam.double(), theta).float(),
        num_directions=3, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert report.passed and report.rtol == 1e-2, str(report)


@pytest.mark.parametrize("make", [bl.KFAC, bl.EKFAC])
@pytest.mark.parametrize("name", ["weights", "inputs", "rising", "positions", "sum"])
def test_an_approximation_is_told_from_a_fault(name, make):
    """KFAC's v is another one, and says so; its J v is right, and nothing else is blamed."""
    report = judged(case(name), make(0.1))
    assert not report.passed and report.faults == ()
    assert report.relative_error_exact > 1e-3 and report.relative_error_cross < 1e-6
    assert report.residual > 1e-3 and "DOES NOT AGREE" in str(report)


# ---------------------------------------------------------------- broken ones do not


def wrong(function, change=lambda out: 1.01 * out):
    return lambda *args, **options: change(function(*args, **options))


def for_one(slopes):
    slopes = slopes.clone()
    slopes[0] *= 1.5
    return slopes


def blamed(report, fault):
    assert not report.passed and any(f.startswith(fault) for f in report.faults), str(report)
    assert fault in str(report) and "DOES NOT AGREE" in str(report)


@pytest.mark.parametrize("change", [lambda s: 1.01 * s, for_one])
@pytest.mark.parametrize("name", ["weights", "rising", "sum"])
def test_slopes_by_forward_mode(monkeypatch, name, change):
    def pushed(*args, push=slopes.push_forward):
        outputs, along = push(*args)
        return outputs, change(along)

    monkeypatch.setattr(slopes, "push_forward", pushed)
    mended = judged(case(name), bl.Identity(0.1))
    assert mended.relative_error_cross < 1e-6  # held against an ordinary gradient
    assert "double backward" in mended.info.solve.cross
    monkeypatch.setattr(slopes, "_confirmed", lambda *args: True)
    blamed(judged(case(name), bl.Identity(0.1)), "J v by forward mode: is not what another route")


@pytest.mark.parametrize("make", [bl.KFAC, bl.EKFAC])
def test_kfacs_own_pass(monkeypatch, make):
    def slopes(self, *args, whole=kfac.Block.slopes):
        return (1.01 if self.layer.name == "0" else 1.0) * whole(self, *args)

    monkeypatch.setattr(kfac.Block, "slopes", slopes)
    for name in ("weights", "rising"):
        blamed(judged(case(name), make(0.1)), f"J v by {make.__name__}'s own pass: is not")


@pytest.mark.parametrize("make", [Borrowing, lambda: Positions(True), lambda: Positions(False)])
def test_a_layer_that_is_not_what_its_class_says(monkeypatch, make):
    """Were every model taken for known code, and nothing compared, the judge would see it."""
    monkeypatch.setattr(tape.Tape, "verify", lambda *args: None)
    monkeypatch.setattr(kfac, "known_code", lambda model: True)
    problem, lam, theta, batch = classify(make())
    report = bl.check(problem, lam, theta, batch, batch, bl.KFAC(0.1), verbose=False)
    blamed(report, "J v by KFAC's own pass: is not")


def l2_once(matvec):
    """l2 in place of 2 l2; without either H would be singular, which is refused by name."""
    return lambda v: matvec(v) - 0.05 * v


@pytest.mark.parametrize(
    "change", [lambda matvec: lambda v: 1.01 * matvec(v), l2_once], ids=["scaled", "l2 once"]
)
@pytest.mark.parametrize("name", ["weights", "inputs", "rising", "sum"])
@pytest.mark.parametrize("make", [bl.Direct, lambda: bl.CG(300, tol=1e-12)], ids=["direct", "cg"])
def test_products_with_the_hessian(monkeypatch, name, make, change):
    for module in (products, solvers):
        monkeypatch.setattr(module, "hvp_operator", wrong(module.hvp_operator, change))
    whole = products.SecondDerivatives.__call__
    monkeypatch.setattr(
        products.SecondDerivatives,
        "__call__",
        lambda self, v: change(lambda v: whole(self, v))(v),
    )
    blamed(judged(case(name), make()), "H: the exact solution has a relative residual of")


def test_a_hessian_that_leaves_out_the_weights_slope():
    """No fault of the package: the weights stand still in it. Differences of g see what is left."""
    c = case("frozen")
    theta = solve(c, c.lam, c.theta)
    report = judged(
        c, bl.Direct(), theta, solve_inner=lambda lam: solve(c, lam, theta), num_directions=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert not report.passed and report.relative_error_differences > 1e-3


@pytest.mark.parametrize("name", ["inputs", "inputs, rising", "weights"])
@pytest.mark.parametrize("make", [bl.Direct, lambda: bl.Identity(0.1)], ids=["direct", "identity"])
def test_double_backward(monkeypatch, name, make):
    monkeypatch.setattr(products, "_cross_twice", wrong(products._cross_twice))
    own = products.SecondDerivatives
    monkeypatch.setattr(own, "cross", wrong(own.cross))
    c = case(name)
    by = "forward mode" if name == "weights" and make is not bl.Direct else "double backward"
    blamed(judged(c, make()), f"J v by {by}: is not what another route")


def test_a_plain_function_differentiated_wrongly(monkeypatch):
    monkeypatch.setattr(products, "_cross_twice", wrong(products._cross_twice))
    c = case("inputs")
    loss = c.risk
    problem = bl.BilevelProblem(lambda *at: loss(*at), problem_of(c).outer_loss)
    report = bl.check(problem, c.lam, c.theta, c.batch, None, bl.Identity(0.1), verbose=False)
    blamed(report, "J v by double backward: is not what another route")


class Elsewhere(bl.Direct):
    """J v of other rows than those of H."""

    def prepare(self, problem, lam, theta, batch, cross=False, once=False):
        at = super().prepare(problem, lam, theta, batch, cross, once)
        rows = tuple(t[1:] for t in batch)
        at.cross = lambda v: (products.cross_vp(problem.inner_loss, lam, theta, rows, v), "")
        return at


def test_j_v_of_another_batch():
    report = judged(case("weights"), Elsewhere())
    blamed(report, "J v by")
    assert report.relative_error_exact > 1e-2


@pytest.mark.parametrize("size", [1.0, 1e-2])
def test_a_loss_that_draws_from_a_generator_of_its_own(monkeypatch, size):
    c, g = case("weights"), torch.Generator().manual_seed(0)
    loss = c.risk

    def noisy(lam, theta, batch):
        return loss(lam, theta * (1 + size * torch.randn(theta.shape, generator=g)), batch)

    problem = bl.BilevelProblem(noisy, problem_of(c).outer_loss)
    at = problem, c.lam, c.theta, c.batch, None, bl.CG(5)
    with pytest.raises(ValueError, match="inner_loss: has another value .* generator of its own"):
        bl.check(*at, verbose=False)
    monkeypatch.setattr(same_function, "due", lambda *_: False)  # nor would it pass unnoticed
    blamed(bl.check(*at, verbose=False), "inner_loss: gives two values at one point")


class ThroughNumPy(torch.autograd.Function):
    """sin, with a backward that autograd cannot follow and that does not say so."""

    @staticmethod
    def forward(ctx, h):
        ctx.save_for_backward(h)
        return h.sin()

    @staticmethod
    def backward(ctx, g):
        return g * torch.from_numpy(ctx.saved_tensors[0].detach().numpy()).cos()


@pytest.mark.parametrize("make", [bl.Direct, lambda: bl.CG(3), lambda: bl.Identity(0.1)])
def test_a_function_whose_backward_has_no_graph(make):
    class Sine(nn.Module):
        def forward(self, h):
            return ThroughNumPy.apply(h)

    c = case("weights")
    first, _, second = c.risk.model
    c.risk.model = nn.Sequential(first, Sine(), second)
    blamed(judged(c, make()), "H: the exact solution has a relative residual")


@pytest.mark.parametrize("make", [bl.Direct, lambda: bl.CG(3), lambda: bl.KFAC(0.1)])
def test_dropout_is_refused(make):
    c = case("weights")
    first, _, second = c.risk.model
    c.risk.model = nn.Sequential(first, nn.Dropout(0.5), second).train()
    with pytest.raises(ValueError, match="draws random numbers|in training mode"):
        judged(c, make())


def test_h_of_another_type(monkeypatch):
    def short(*args, whole=checking.by_solver, **options):
        h, info = whole(*args, **options)
        return h.float(), info

    monkeypatch.setattr(checking, "by_solver", short)
    blamed(judged(case("weights"), bl.Direct(), rtol=1e-2), "h: is torch.float32 of shape")


def test_a_solver_that_stops_early_is_no_fault_but_does_not_agree():
    report = judged(case("weights"), bl.CG(2))
    assert not report.passed and report.faults == () and report.residual > 1e-2


# ---------------------------------------------------------------- the caller's solver


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize(
    "make",
    [
        lambda: bl.KFAC(0.1),
        lambda: bl.KFAC(0.1, ema=0.5),
        lambda: bl.KFAC(0.1, every=3),
        lambda: bl.EKFAC(0.1, every=3),
        lambda: bl.CG(2, warm_start=True),
        lambda: bl.CG(2, precondition=bl.KFAC(0.1, every=2)),
        lambda: bl.KFACRichardson(1, bl.KFAC(0.1, ema=0.5)),
    ],
)
@pytest.mark.parametrize("name", ["weights", "sum"])
def test_the_callers_solver_is_as_it_was(name, make):
    """Its memory, its generator, and so its next answer, to the last bit."""
    c, here, twin = case(name), make(), make()
    at = problem_of(c), c.lam, c.theta, c.batch, None
    for solver in (here, twin):
        bl.hypergradient(*at, solver)
    before = copy.deepcopy(here.state_dict())
    bl.check(*at, here, verbose=False)
    assert same(here.state_dict(), before)
    assert torch.equal(bl.hypergradient(*at, here), bl.hypergradient(*at, twin))


def test_a_sum_with_shared_layers_agrees():
    c = heads()
    report = bl.check(
        bl.BilevelProblem(c.risk, lambda lam, theta, _: (theta * c.target).sum().sin()),
        c.lam, c.theta, c.batch, None, bl.CG(400, tol=1e-13), verbose=False,
    )  # fmt: skip
    assert report.faults == () and report.relative_error_cross < 1e-6


# ---------------------------------------------------------------- what somebody else computed


def theirs(change=lambda h: h):
    """The hypergradient of lam in the weights, by code that check knows nothing of."""
    c = case("weights")
    theta = solve(c, c.lam, c.theta)

    def h(lam, theta):
        return change(bl.hypergradient(problem_of(c), lam, theta, c.batch, None))

    return c, theta, h


def judged_given(given, c, theta, **options):
    return bl.check(
        problem_of(c), c.lam, theta, c.batch, None, verbose=False, hypergradient=given, **options
    )


def test_a_given_hypergradient_is_judged():
    c, theta, h = theirs()
    few = {"num_directions": 3, "generator": torch.Generator().manual_seed(0)}
    for given in (h, h(c.lam, theta)):
        report = judged_given(given, c, theta, solve_inner=lambda lam: solve(c, lam, theta), **few)
        assert report.passed and report.info is None and report.residual is None, str(report)
        assert report.relative_error_exact < 1e-7 and report.relative_error_differences < 1e-6
        assert report.length == pytest.approx(1, abs=1e-7)
        assert "agrees to 1e-04 (a given hypergradient)" in str(report)


@pytest.mark.parametrize("factor", [1.01, -1.0, 0.0])
def test_a_wrong_given_one_does_not_agree(factor):
    c, theta, h = theirs(lambda h: factor * h)
    for given in (h, h(c.lam, theta)):
        report = judged_given(given, c, theta)
        assert not report.passed and report.faults == ()
        assert report.length == pytest.approx(abs(factor), abs=1e-7)
        assert report.relative_error_exact == pytest.approx(abs(factor - 1), rel=1e-4)


def shares(a, c, noise=0.0):
    """The report on a * direct + c * implicit + noise, for f with a direct term."""
    A = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    problem = bl.BilevelProblem(
        lambda lam, t, _: 0.5 * t @ A @ t - (lam[:2] * t).sum() - lam[2] * t[0],
        lambda lam, t, _: 0.5 * (t - 1).square().sum() + lam.square().sum(),
    )
    lam = torch.tensor([0.3, -0.2, 0.4])
    theta = torch.linalg.solve(A, lam[:2] + torch.tensor([0.4, 0.0]))
    v = torch.linalg.solve(A, theta - 1)
    direct, implicit = 2 * lam, torch.stack([v[0], v[1], v[0]])
    h = a * direct + c * implicit + noise * torch.linalg.cross(direct, implicit)
    return bl.check(problem, lam, theta, hypergradient=h, verbose=False), direct + implicit


@pytest.mark.parametrize(("a", "c"), [(1.0, 1.0), (0.0, 1.0), (1.0, 7.7), (3.0, 3.0), (1.0, -1.0)])
def test_what_a_given_one_is_made_of(a, c):
    report, _ = shares(a, c)
    assert report.shares == pytest.approx({"direct": a, "implicit": c, "rest": 0}, abs=1e-8)
    assert f"{a:.3g} direct, {c:.3g} implicit, rest below 1e-9" in str(report)
    assert report.passed == (a == c == 1)


def test_what_is_neither_part_is_the_rest():
    report, exact = shares(1.0, 2.0, noise=0.1)
    clean, _ = shares(1.0, 2.0)
    assert report.shares["direct"] == pytest.approx(1) and report.shares["implicit"] == (
        pytest.approx(2)
    )
    off = (report.length**2 - clean.length**2) ** 0.5  # at right angles to both parts
    assert report.shares["rest"] == pytest.approx(off, rel=1e-6) and off > 1e-3


def test_parallel_parts_have_no_shares():
    problem = bl.BilevelProblem(
        lambda lam, t, _: (t - lam).square().sum(), lambda lam, t, _: t.sum() + lam.sum()
    )
    at = torch.ones(3), torch.ones(3)
    report = bl.check(problem, *at, hypergradient=torch.full((3,), 2.0), verbose=False)
    assert report.passed and report.shares == {} and "made of" not in str(report)


def test_two_calls_that_differ_are_a_fault():
    total = torch.zeros(())

    def adding(h):
        return h * total.add_(1)

    c, theta, h = theirs(adding)
    blamed(judged_given(h, c, theta), "hypergradient: gives two values at one point")
    generator = torch.Generator().manual_seed(0)
    c, theta, h = theirs(lambda h: h + 0.1 * torch.randn(h.shape, generator=generator))
    blamed(judged_given(h, c, theta), "hypergradient: gives two values at one point")


@pytest.mark.parametrize("which", [0, 1])
def test_writing_into_what_was_given_is_a_fault_and_reaches_nobody(which):
    c, theta, h = theirs()
    before = c.lam.clone(), theta.clone()

    def writes(*at):
        value = h(*at)
        at[which].add_(1e-3)
        return value

    blamed(judged_given(writes, c, theta), "hypergradient: writes into lam or theta")
    assert torch.equal(c.lam, before[0]) and torch.equal(theta, before[1])


def test_a_given_one_that_is_not_finite_or_of_another_shape_does_not_agree():
    c, theta, h = theirs(lambda h: h * float("nan"))
    report = judged_given(h, c, theta)
    assert not report.passed and report.shares == {}
    assert report.faults == ("h: has entries that are NaN or infinite",)
    c, theta, h = theirs(lambda h: h[:2])
    blamed(judged_given(h, c, theta), "h: is torch.float64 of shape (2,)")


def test_a_given_one_is_not_judged_by_a_broken_h_or_j(monkeypatch):
    """What judges does not rest on double backward, which the given code has likely used."""
    c, theta, h = theirs()
    value = h(c.lam, theta)
    monkeypatch.setattr(products, "_cross_twice", wrong(products._cross_twice))
    assert judged_given(value, c, theta).passed
    monkeypatch.setattr(products, "hvp_operator", lambda *a: lambda v: 2 * v)
    monkeypatch.setattr(solvers, "hvp_operator", lambda *a: lambda v: 2 * v)
    blamed(judged_given(value, c, theta), "H: the exact solution has a relative residual")


def test_what_is_refused_of_a_given_one():
    c, theta, h = theirs()
    with pytest.raises(ValueError, match="solver: got one beside hypergradient, expected one"):
        judged_given(h, c, theta, solver=bl.CG(3))
    with pytest.raises(TypeError, match="hypergradient: got int, expected a tensor like lam, or a"):
        judged_given(3, c, theta)
    with pytest.raises(TypeError, match=r"hypergradient\(lam, theta\): returned list, expected a"):
        judged_given(lambda lam, theta: [1.0], c, theta)
    with pytest.raises(TypeError, match="problem: got"):
        bl.check("problem", c.lam, theta, hypergradient=h)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (None, "solve_inner: got NoneType, expected a function lam -> theta"),
        (torch.zeros(2), "solve_inner: got Tensor, expected a function lam -> theta"),
        (lambda lam: None, r"solve_inner\(lam\): got NoneType, expected a floating-point tensor"),
        (lambda lam: lam[:1], r"solve_inner\(lam\): got shape \(1,\), expected \(2,\)"),
    ],
)
def test_an_inner_solution_that_is_none_is_refused_by_all_three(wrong, message):
    problem = bl.BilevelProblem(
        lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        lambda lam, theta, _: ((theta - 1) ** 2).sum(),
    )
    lam = theta = torch.zeros(2)
    for name, call in {
        "check": lambda: bl.check(problem, lam, theta, solve_inner=wrong, verbose=False),
        "audit": lambda: bl.audit(problem, lam, theta, solvers=bl.CG(1), solve_inner=wrong),
        "differences": lambda: bl.finite_difference_hypergradient(problem, lam, wrong),
    }.items():
        if wrong is None and name != "differences":
            continue  # there it stands for none
        if "shape" in message and name == "differences":
            continue  # they know of no theta
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1.0])
def test_a_hypergradient_of_tiny_size_in_float32_is_judged_all_the_same(scale):
    """The squares of its entries underflow: everything was zero, and so was every error."""

    def outer_loss(lam, theta, batch):
        return scale * ((theta - 1) ** 2).sum()

    problem = bl.BilevelProblem(lambda lam, theta, _: ((theta - lam) ** 2).sum() / 4, outer_loss)
    zero = torch.zeros(2, dtype=torch.float32)
    at = problem, zero, zero, None, None  # H = I / 2, the truth is -2 scale
    right = torch.full_like(zero, -2 * scale)
    assert bl.check(*at, hypergradient=right, verbose=False).passed
    for wrong in (2 * right, 0 * right, -right):
        assert not bl.check(*at, hypergradient=wrong, verbose=False).passed
    assert bl.check(*at, bl.CG(2), verbose=False).passed
    assert not bl.check(*at, bl.Neumann(2, 0.5), verbose=False).passed
    _, info = bl.Neumann(2, 0.5).solve(*at[:4], right)
    assert info.relative_residual == pytest.approx(0.5625)  # (1 - 1/4)^2
    assert info.residual == pytest.approx(0.5625 * 8**0.5 * scale)
