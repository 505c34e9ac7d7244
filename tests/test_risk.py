"""Where lam and the loss terms may stand in a risk, against algebra written out by hand.

Every case has its losses, weights and inputs a second time, as plain formulas of theta. From those
come the field of the inner steps F = sum c (1/n) sum_i sigma_i grad l_i + 2 l2 theta, its zero by
Newton's method, its Jacobian H, and the finite differences of f at that zero.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bilevel_lite as bl
from bilevel_lite import curvature, products
from bilevel_lite.risk import PartOfTheta, is_structured, overridden

L2 = 0.05


def error(got, truth):
    return float((got - truth).detach().norm() / truth.detach().norm())


def jacobian(function, at):
    return torch.autograd.functional.jacobian(function, at)


# ---------------------------------------------------------------- models, twice


class Mixing(nn.Module):
    """Outputs at each position that see the other positions: (n, T, D) -> (n, T, C)."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        z = self.first(x).tanh()
        return self.second(z + z.mean(1, keepdim=True))


def plain(encoder, head):
    return nn.Sequential(encoder, nn.Tanh(), head)


def by_hand(theta, x, positions=False, parts=(0, 12)):
    """The same outputs from slices of theta: encoder (3 -> 3) at parts[0], head at parts[1]."""
    w1, b1 = theta[parts[0] : parts[0] + 9].view(3, 3), theta[parts[0] + 9 : parts[0] + 12]
    w2, b2 = theta[parts[1] : parts[1] + 9].view(3, 3), theta[parts[1] + 9 : parts[1] + 12]
    z = (x @ w1.T + b1).tanh()
    if positions:
        z = z + z.mean(1, keepdim=True)
    return z @ w2.T + b2


def loss_by_hand(o, y, ignored=-100):
    """The losses from the outputs: the mean over kept positions of log sum exp o - o_y."""
    if y.is_floating_point():
        return ((o - y) ** 2).reshape(len(o), -1).sum(1) / 2
    terms = o.exp().sum(-1).log() - (o * nn.functional.one_hot(y.clamp(0, 2), 3)).sum(-1)
    terms, kept = terms.reshape(len(o), -1), (y != ignored).reshape(len(o), -1)
    means = [
        one[k].mean() if k.any() else 0 * one.sum() for one, k in zip(terms, kept, strict=True)
    ]
    return torch.stack(means)


# ---------------------------------------------------------------- cases


def case(name):
    """A risk, where to look at it, and the same by hand: terms (c, x, y, outputs, sigma)."""
    g = torch.Generator().manual_seed(sum(map(ord, name)))

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder, head, other = (nn.Linear(3, 3).double() for _ in range(3))
    n = 8
    x, y = randn(n, 3), torch.randint(3, (n,), generator=g)
    index = torch.arange(n)
    words, labels = randn(n, 4, 3), torch.randint(3, (n, 4), generator=g)
    labels[1, 2:] = labels[4, 0] = labels[5] = -100  # example 5 has no loss term at all
    model, per_word = plain(encoder, head), Mixing(encoder, head)

    def of_index(lam, index):
        return lam[index].sigmoid()

    def rising(lam, l):
        return (lam[0] + lam[1].exp() * l).sigmoid()

    def falling(lam, l):
        return (lam[0] - 0.4 * lam[1].exp() * l).sigmoid()

    def normalised(lam, l):
        v = (lam[0] + lam[1].exp() * l).sigmoid()
        return len(v) * v / v.sum()

    def poison(lam, batch):
        more = lam[:6].view(2, 3).tanh()
        rows = torch.tensor([0, 1])
        return (torch.cat([batch[0], more]), torch.cat([batch[1], rows]), *batch[2:])

    def bend(lam, batch):
        return batch[0] * lam[:3].exp(), batch[1], batch[2]

    def of_loss(v):
        return lambda lam, batch, losses: v(lam, losses)

    def own(x=lambda lam: x, y=y, sigma=lambda lam, l: torch.ones_like(l), c=1.0, **how):
        return SimpleNamespace(x=x, y=y, sigma=sigma, c=c, how=how)

    def at(risk, lam, batch, *terms, slope=False):
        d = bl.flatten(risk.model).numel()
        return SimpleNamespace(
            risk=risk, lam=lam, batch=batch, terms=terms, slope=slope, theta=0.5 * randn(d),
            target=randn(d), name=name,
        )  # fmt: skip

    def poisoned(lam):
        return torch.cat([x, lam[:6].view(2, 3).tanh()])

    more_y = torch.cat([y, torch.tensor([0, 1])])
    plainly = (x, y, index)
    if name == "weights":
        risk = bl.WeightedRisk(model, weight=lambda lam, b: of_index(lam, b[2]), l2=L2)
        return at(risk, randn(n), plainly, own(sigma=lambda lam, l: of_index(lam, index)))
    if name == "weights, mse":
        risk = bl.WeightedRisk(model, "mse", weight=lambda lam, b: of_index(lam, b[2]), l2=L2)
        real = randn(n, 3)
        return at(
            risk, randn(n), (x, real, index),
            own(y=real, sigma=lambda lam, l: of_index(lam, index)),
        )  # fmt: skip
    if name in ("rising", "falling", "rising, mse"):
        v, real = rising if "rising" in name else falling, randn(n, 3)
        loss, target = ("mse", real) if "mse" in name else ("cross_entropy", y)
        risk = bl.WeightedRisk(model, loss, of_loss(v), L2, weight_slope=True)
        return at(risk, randn(2), (x, target), own(y=target, sigma=v), slope=True)
    if name in ("frozen", "normalised"):
        v = rising if name == "frozen" else normalised
        return at(bl.WeightedRisk(model, weight=of_loss(v), l2=L2), randn(2), plainly, own(sigma=v))
    if name == "inputs":
        risk = bl.WeightedRisk(model, inputs=poison, l2=L2)
        return at(risk, randn(6), plainly, own(x=poisoned, y=more_y))
    if name == "inputs, weights":
        risk = bl.WeightedRisk(
            model, inputs=bend, weight=lambda lam, b: (lam[2:10] + b[0].sum(1)).sigmoid(), l2=L2
        )
        return at(
            risk, randn(10), plainly,
            own(
                x=lambda lam: x * lam[:3].exp(),
                sigma=lambda lam, l: (lam[2:10] + (x * lam[:3].exp()).sum(1)).sigmoid(),
            ),
        )  # fmt: skip
    if name == "inputs, rising":

        def weight(lam, batch, losses):
            return rising(lam[6:], losses)

        risk = bl.WeightedRisk(model, "cross_entropy", weight, L2, inputs=poison, weight_slope=True)
        return at(
            risk, randn(8), plainly,
            own(x=poisoned, y=more_y, sigma=lambda lam, l: rising(lam[6:], l)), slope=True,
        )  # fmt: skip
    if name == "positions":
        risk = bl.WeightedRisk(per_word, weight=lambda lam, b: of_index(lam, b[2]), l2=L2)
        return at(
            risk, randn(n), (words, labels, index),
            own(
                x=lambda lam: words, y=labels, positions=True,
                sigma=lambda lam, l: of_index(lam, index),
            ),
        )  # fmt: skip
    if name == "positions, mse":
        risk = bl.WeightedRisk(per_word, "mse", lambda lam, b: of_index(lam, b[2]), L2)
        real = randn(n, 4, 3)
        return at(
            risk, randn(n), (words, real, index),
            own(
                x=lambda lam: words, y=real, positions=True,
                sigma=lambda lam, l: of_index(lam, index),
            ),
        )  # fmt: skip
    if name == "ignored":
        some = y.clone()
        some[[0, 3]] = 7
        risk = bl.WeightedRisk(
            model, weight=lambda lam, b: of_index(lam, b[2]), l2=L2, ignore_index=7
        )
        return at(
            risk, randn(n), (x, some, index),
            own(y=some, ignored=7, sigma=lambda lam, l: of_index(lam, index)),
        )  # fmt: skip
    if name == "inputs, positions, falling":
        risk = bl.WeightedRisk(
            per_word, "cross_entropy", lambda lam, b, l: falling(lam[3:], l), L2, inputs=bend,
            weight_slope=True, mask=lambda b: torch.ones(b[1].shape, dtype=torch.bool),
        )  # fmt: skip
        return at(
            risk, randn(5), (words, labels, index),
            own(
                x=lambda lam: words * lam[:3].exp(), y=labels, positions=True,
                sigma=lambda lam, l: falling(lam[3:], l),
            ),
            slope=True,
        )  # fmt: skip
    if name == "sum":
        # theta: encoder, head, other head; the second term's own order is the same
        task = bl.WeightedRisk(model)
        mlm = bl.WeightedRisk(
            Mixing(encoder, other), weight=lambda lam, b, l: rising(lam, l), weight_slope=True
        )
        risk = bl.SumOfRisks([task, mlm], [1.0, 0.7], l2=L2)
        return at(
            risk, randn(2), ((x, y), (words, labels)), own(),
            own(x=lambda lam: words, y=labels, sigma=rising, c=0.7, positions=True, parts=(0, 24)),
            slope=True,
        )  # fmt: skip
    assert name == "sum, inputs"
    # theta has an order of its own, and every term holds all of it
    whole = nn.ModuleDict({"head": head, "encoder": encoder})
    clean = bl.WeightedRisk(model, weight=lambda lam, b: of_index(lam, b[2]), l2=0.3 * L2)
    rows = bl.WeightedRisk(per_word, inputs=bend, l2=0.2 * L2)
    risk = bl.SumOfRisks([clean, rows], [2.0, 0.5], l2=0.3 * L2, model=whole)
    return at(
        risk, randn(n), (plainly, (words, labels, index)),
        own(c=2.0, sigma=lambda lam, l: of_index(lam, index), parts=(12, 0)),
        own(
            x=lambda lam: words * lam[:3].exp(), y=labels, c=0.5, positions=True, parts=(12, 0)
        ),
    )  # fmt: skip


CASES = [
    "weights",
    "weights, mse",
    "rising",
    "rising, mse",
    "falling",
    "frozen",
    "normalised",
    "inputs",
    "inputs, weights",
    "inputs, rising",
    "positions",
    "positions, mse",
    "ignored",
    "inputs, positions, falling",
    "sum",
    "sum, inputs",
]
STILL = ["frozen", "normalised"]  # H leaves the weights' slope out, on purpose
SLOPED = ["rising", "rising, mse", "falling", "inputs, rising", "inputs, positions, falling", "sum"]


# ---------------------------------------------------------------- the algebra by hand


def outputs_of(term, lam, theta):
    how = {k: v for k, v in term.how.items() if k != "ignored"}
    return by_hand(theta, term.x(lam), **how)


def losses_of(term, lam, theta):
    return loss_by_hand(outputs_of(term, lam, theta), term.y, term.how.get("ignored", -100))


def field(c, lam, theta, still=False):
    """F(lam, theta), with the graph of both; ``still``: weights that do not move with theta."""
    total = 2 * L2 * theta
    for term in c.terms:
        l = losses_of(term, lam, theta)
        sigma = term.sigma(lam, l.detach() if still else l)
        (gradient,) = torch.autograd.grad(l, theta, sigma, create_graph=True)
        total = total + term.c / len(l) * gradient
    return total


def field_jacobians(c, lam, theta, still=False):
    """(dF/dtheta, shape (d, d), and dF/dlam, shape (d, m))."""
    lam, theta = lam.detach().requires_grad_(), theta.detach().requires_grad_()
    rows = [
        torch.autograd.grad(f, (theta, lam), retain_graph=True, allow_unused=True)
        for f in field(c, lam, theta, still)
    ]
    return torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def solve(c, lam, theta):
    """The minimum of the potential to machine precision: Newton, along |eigenvalues|."""
    for _ in range(200):
        theta = theta.detach().requires_grad_()
        f = field(c, lam, theta)
        h = torch.stack([torch.autograd.grad(one, theta, retain_graph=True)[0] for one in f])
        values, vectors = torch.linalg.eigh(0.5 * (h + h.T))
        step = vectors @ ((vectors.T @ f.detach()) / values.abs())
        theta = theta.detach() - step * min(1.0, 0.5 / float(step.norm()))
        if step.norm() < 1e-14 * (1 + theta.norm()):
            return theta
    assert float(step.norm()) < 1e-12
    return theta


def outer(lam, theta, target):
    return ((theta - target) ** 3).sum() / 3 + theta.sum().sin()


def output_curvature(c, term, theta, bend):
    """n C example by example: Hessian of sigma l, or of W(l), in the outputs, by autograd."""
    o, out = outputs_of(term, c.lam, theta).detach(), []
    l = loss_by_hand(o, term.y, term.how.get("ignored", -100))
    leaf = l.detach().requires_grad_()
    sigma = term.sigma(c.lam, leaf)
    slope = torch.autograd.grad(sigma.sum(), leaf)[0] if c.slope and sigma.requires_grad else None
    for i in range(len(o)):

        def one(a, i=i):
            return loss_by_hand(a[None], term.y[i : i + 1], term.how.get("ignored", -100))[0]

        h = torch.autograd.functional.hessian(one, o[i]).reshape(o[i].numel(), -1)
        s = jacobian(one, o[i]).reshape(-1)
        own = 0 if slope is None else bend(slope[i])
        out.append((sigma[i] * h + own * torch.outer(s, s)).detach())
    return torch.stack(out)


def ggn(c, theta, bend=lambda s: s):
    """sum c J^T C J + 2 l2 I, J by reverse mode and C by autograd in the outputs."""
    total = 2 * L2 * torch.eye(len(theta))
    for term in c.terms:
        j = jacobian(lambda t, term=term: outputs_of(term, c.lam, t), theta)
        j = j.reshape(len(j), -1, len(theta))
        middle = output_curvature(c, term, theta, bend)
        total = total + term.c / len(j) * torch.einsum("nai,nab,nbj->ij", j, middle, j)
    return total


@pytest.fixture(scope="module", params=CASES)
def c(request):
    return case(request.param)


@pytest.fixture(scope="module")
def solved(c):
    """The case at the zero of its field, with the derivative of f there along two directions."""
    theta = solve(c, c.lam, c.theta)
    directions = torch.randn(2, len(c.lam), generator=torch.Generator().manual_seed(1))

    def phi(lam):
        return float(outer(lam, solve(c, lam, theta), c.target))

    eps = 5e-4
    slopes = [
        sum(w * phi(c.lam + k * eps * e) for k, w in ((2, -1), (1, 8), (-1, -8), (-2, 1)))
        / (12 * eps)
        for e in directions
    ]
    return SimpleNamespace(theta=theta, directions=directions, slopes=torch.tensor(slopes))


def problem_of(c):
    return bl.BilevelProblem(c.risk, lambda lam, theta, _: outer(lam, theta, c.target))


def hypergradient(c, theta, solver):
    return bl.hypergradient(
        problem_of(c), c.lam, theta, c.batch, None, solver, cross_mode="double_backward"
    )


# ---------------------------------------------------------------- value, H, J


def test_value_and_gradient_are_the_formula(c):
    theta = c.theta.clone().requires_grad_()
    value, _, gradient = products.gradient(c.risk, c.lam, theta, c.batch)
    truth = L2 * theta @ theta
    for term in c.terms:
        l = losses_of(term, c.lam, theta)
        truth = truth + term.c * (term.sigma(c.lam, l) * l).mean()
    assert error(value, truth) < 1e-14
    assert error(gradient, field(c, c.lam, theta)) < 1e-12


def test_hessian_and_cross_derivative_are_the_fields(c):
    h, j = field_jacobians(c, c.lam, c.theta, still=c.name in STILL)
    assert error(products.hessian(c.risk, c.lam, c.theta, c.batch), h) < 1e-11
    full, _ = field_jacobians(c, c.lam, c.theta)
    if c.name in SLOPED + STILL:  # and V' is something
        assert error(field_jacobians(c, c.lam, c.theta, still=True)[0], full) > 1e-3
    v = torch.linspace(-1, 1, len(c.theta))
    jv = products.cross_vp(c.risk, c.lam, c.theta, c.batch, v, "double_backward")
    assert error(jv, j.T @ v) < 1e-11
    e = torch.linspace(1, 2, len(c.lam))
    _, along = products.update_operator(c.risk, c.lam, c.theta, c.batch)
    assert error(along(e, v), h @ v + j @ e) < 1e-11


@pytest.mark.parametrize("name", ["direct", "cg", "neumann"])
def test_hypergradient_equals_differences_of_the_solved_problem(c, solved, name):
    h, j = field_jacobians(c, c.lam, solved.theta, still=c.name in STILL)
    truth = solved.slopes
    if c.name in STILL:  # H leaves out a part on purpose: the same by algebra
        b = torch.func.grad(outer, 1)(c.lam, solved.theta, c.target)
        truth = -solved.directions @ j.T @ torch.linalg.solve(h, b)
    eigenvalues = torch.linalg.eigvalsh(0.5 * (h + h.T))
    assert eigenvalues[0] > 0
    step = 1 / float(eigenvalues[-1])
    solver = {
        "direct": bl.Direct(),
        "cg": bl.CG(300, tol=1e-13),
        "neumann": bl.Neumann(int(25 / (step * float(eigenvalues[0]))), step),
    }[name]
    got = hypergradient(c, solved.theta, solver)
    assert error(solved.directions @ got, truth) < 1e-8


def test_weights_held_still_make_an_error_that_the_slope_mends():
    """The default H has no V': the hypergradient is off by what the option adds."""
    c = case("frozen")
    theta = solve(c, c.lam, c.theta)
    h, j = field_jacobians(c, c.lam, theta)
    b = torch.func.grad(outer, 1)(c.lam, theta, c.target)
    truth = -j.T @ torch.linalg.solve(h.T, b)
    assert error(hypergradient(c, theta, bl.Direct()), truth) > 1e-3
    mended = bl.WeightedRisk(c.risk.model, weight=c.risk.weight, l2=L2, weight_slope=True)
    c.risk = mended
    assert error(hypergradient(c, theta, bl.Direct()), truth) < 1e-10


# ---------------------------------------------------------------- what stands for H


def test_ggn_is_the_dense_product_and_cg_solves_with_it(c):
    truth = ggn(c, c.theta)
    operator = curvature.GGN(c.risk, c.lam, c.theta, c.batch)
    assert error(operator.dense(), truth) < 1e-12
    v = torch.linspace(-1, 1, len(c.theta))
    assert error(curvature.ggn_vp(c.risk, c.lam, c.theta, c.batch, v), truth @ v) < 1e-12
    if c.name == "inputs, positions, falling":
        assert torch.linalg.eigvalsh(truth)[0] < 2 * L2  # V' < 0 bites
    _, j = field_jacobians(c, c.lam, c.theta)
    b = torch.func.grad(outer, 1)(c.lam, c.theta, c.target)
    by_algebra = -j.T @ torch.linalg.solve(truth, b)
    for solver in (bl.CG(400, tol=1e-13, curvature="ggn"), bl.Direct(curvature="ggn")):
        assert error(hypergradient(c, c.theta, solver), by_algebra) < 1e-8


def test_fishers_are_their_second_moments(c):
    at = (c.risk, c.lam, c.theta, c.batch)
    exact = curvature.Fisher(*at, "exact").dense()
    assert error(exact, ggn(c, c.theta, bend=lambda s: s.clamp(min=0))) < 1e-12
    empirical = 2 * L2 * torch.eye(len(c.theta))
    for term in c.terms:
        g = jacobian(lambda t, term=term: losses_of(term, c.lam, t), c.theta)
        l = losses_of(term, c.lam, c.theta).detach().requires_grad_()
        sigma = term.sigma(c.lam, l)
        if c.slope and sigma.requires_grad:
            sigma = sigma + torch.autograd.grad(sigma.sum(), l)[0].clamp(min=0)
        empirical = empirical + term.c / len(l) * (g.T * sigma.detach()) @ g
    assert error(curvature.EmpiricalFisher(*at).dense(), empirical) < 1e-12


def test_monte_carlo_fisher_is_unbiased(c):
    truth = ggn(c, c.theta, bend=lambda s: s.clamp(min=0))

    def off(m, seed):
        g = torch.Generator().manual_seed(seed)
        drawn = curvature.Fisher(c.risk, c.lam, c.theta, c.batch, samples=m, generator=g)
        return error(drawn.dense(), truth)

    fine, coarse = off(1000, 0), sum(off(10, seed) ** 2 for seed in range(1, 6)) ** 0.5 / 5**0.5
    assert fine < 0.08 and coarse / fine > 4  # 10 = sqrt(1000 / 10)


@pytest.mark.parametrize("name", ["positions", "inputs, positions, falling", "rising", "ignored"])
def test_probes_are_square_roots_of_the_curvature_of_each_example(name):
    c = case(name)
    (term,) = c.risk.terms(c.lam, c.batch)
    outputs = term.risk.outputs(term.read(c.theta), term.batch)
    side = curvature.output_side(term, c.lam, outputs)
    truth = output_curvature(c, c.terms[0], c.theta, bend=lambda s: s.clamp(min=0))

    def moment(probes):
        rows = [s.reshape(len(s), -1) for s in probes]
        return sum(torch.einsum("na,nb->nab", s, s) for s in rows)

    exact = curvature.Probes("exact").of(side)
    assert error(moment(exact), truth) < 1e-13
    positions = outputs[0].numel() // 3
    assert len(exact) == 3 * positions + (side.slope is not None)
    drawn = curvature.Probes("mc", 20000, torch.Generator().manual_seed(0)).of(side)
    assert error(moment(drawn), truth) < 0.03
    own = output_curvature(c, c.terms[0], c.theta, bend=lambda s: s)
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2))
    times = torch.einsum("nab,nb->na", own, u.reshape(len(u), -1)) / len(u)
    assert error(side.times(u).reshape(len(u), -1), times) < 1e-13


# ---------------------------------------------------------------- sums


def test_a_sum_reads_each_part_of_theta_by_identity():
    c = case("sum, inputs")
    clean, rows = c.risk.terms(c.lam, c.batch)
    # theta is (head, encoder); the models read (encoder, head)
    assert torch.equal(clean.read(torch.arange(24.0)), torch.arange(24.0).roll(12))
    assert clean.part.places == [slice(12, 21), slice(21, 24), slice(0, 9), slice(9, 12)]
    assert error(torch.tensor(c.risk.l2), torch.tensor(L2)) < 1e-14
    with pytest.raises(ValueError, match=r"theta: got shape \(3,\), expected \(24,\)"):
        clean.read(torch.zeros(3))
    assert PartOfTheta([1], [2, 3])(torch.arange(5.0)).tolist() == [2, 3, 4]


def test_a_sum_of_one_risk_is_that_risk():
    c = case("rising")
    alone = bl.SumOfRisks([c.risk])
    assert torch.equal(bl.flatten(alone.model), bl.flatten(c.risk.model))
    value = alone(c.lam, c.theta, (c.batch,))
    assert torch.equal(value, c.risk(c.lam, c.theta, c.batch))
    dense = curvature.GGN(alone, c.lam, c.theta, (c.batch,)).dense()
    assert error(dense, curvature.GGN(c.risk, c.lam, c.theta, c.batch).dense()) < 1e-14


def test_a_term_with_coefficient_zero_adds_nothing():
    c = case("sum")
    c.risk.coefficients = [1.0, 0.0]
    dense = curvature.GGN(c.risk, c.lam, c.theta, c.batch).dense()
    assert error(dense[24:, 24:], 2 * L2 * torch.eye(12)) < 1e-14


# ---------------------------------------------------------------- masks


def test_a_mask_is_that_of_the_batch_that_the_model_sees():
    c = case("positions")

    def shorter(lam, batch):
        return batch[0][:5], batch[1][:5]

    risk = bl.WeightedRisk(c.risk.model, mask=lambda b: b[1] != -100, inputs=shorter)
    seen = risk.seen(c.lam, c.batch)
    assert torch.equal(risk.unpadded(seen), c.batch[1][:5] != -100)
    assert c.risk.unpadded(c.batch) is None
    bare = bl.WeightedRisk(c.risk.model)
    at = (c.lam, c.theta, c.batch)
    assert torch.equal(bl.WeightedRisk(c.risk.model, mask=lambda b: b[1] != -100)(*at), bare(*at))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda b: b[0].sum(2), "mask: returned torch.float64, expected a bool tensor"),
        (lambda b: None, "mask: returned NoneType, expected a bool tensor"),
        (lambda b: b[1][0] == 0, r"mask: returned shape \(4,\), expected \(n, P\) with n = 8"),
        (lambda b: b[1] == 9, "mask: is False everywhere"),
        (lambda b: b[1] == 1, "mask: is False at .* positions that have a loss term"),
    ],
)
def test_masks_that_cannot_be(mask, message):
    c = case("positions")
    with pytest.raises(ValueError, match=message):
        bl.WeightedRisk(c.risk.model, mask=mask).unpadded(c.batch)


def test_a_mask_on_mse_that_counts_padding_is_refused():
    c = case("positions, mse")
    risk = bl.WeightedRisk(c.risk.model, "mse", mask=lambda b: b[0][..., 0] > 0)
    with pytest.raises(ValueError, match="leave padding out of the outputs"):
        risk.unpadded(c.batch)


# ---------------------------------------------------------------- subclasses

STRUCTURE = [
    "__call__", "losses", "mean", "output_gradient", "output_losses", "outputs", "seen", "share",
    "terms", "unpadded", "weight_slopes", "weights",
]  # fmt: skip


@pytest.mark.parametrize("where", ["class", "instance", "parent"])
@pytest.mark.parametrize("name", STRUCTURE)
def test_a_replaced_part_of_the_structure_is_refused_by_name(name, where):
    def other(*args, **kwargs):
        return torch.zeros(())

    model, lam, theta = nn.Linear(3, 2), torch.ones(4), torch.zeros(8)
    batch = (torch.ones(4, 3), torch.zeros(4).long())
    if where == "instance":
        risk = bl.WeightedRisk(model)
        setattr(risk, name, other)
    else:
        kind = type("Mine", (bl.WeightedRisk,), {name: other})
        kind = type("Child", (kind,), {}) if where == "parent" else kind
        risk = kind(model)
    assert overridden(risk) == name and not is_structured(risk)
    message = f"overrides '{name}' of WeightedRisk.*use the arguments inputs="
    for reader in (curvature.GGN, curvature.EmpiricalFisher, curvature.Fisher):
        with pytest.raises(TypeError, match=message):
            reader(risk, lam, theta, batch)
    with pytest.raises(TypeError, match=message):
        bl.kfac.kfac_factors(risk, lam, theta, batch)
    with pytest.raises(TypeError, match="term 0: .*overrides"):
        bl.SumOfRisks([risk])
    sums = bl.SumOfRisks([bl.WeightedRisk(model)])
    sums.risks = [risk]
    assert not is_structured(sums)
    with pytest.raises(TypeError, match=message):
        curvature.GGN(sums, lam, theta, (batch,))


def test_an_overriding_subclass_is_a_plain_function_to_other_solvers():
    c = case("weights")

    class Twice(bl.WeightedRisk):
        def __call__(self, lam, theta, batch):
            return 2 * super().__call__(lam, theta, batch)

    mine = Twice(c.risk.model, weight=c.risk.weight, l2=L2)
    at = (c.lam, c.theta, c.batch)
    assert error(products.hessian(mine, *at), 2 * products.hessian(c.risk, *at)) < 1e-13


def test_a_subclass_that_overrides_nothing_is_a_weighted_risk():
    c = case("weights")

    class Named(bl.WeightedRisk):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.title = "mine"

        def report(self):
            return self.title

    mine = Named(c.risk.model, weight=c.risk.weight, l2=L2)
    assert is_structured(mine) and overridden(mine) is None
    at = (c.lam, c.theta, c.batch)
    ours, theirs = (curvature.GGN(r, *at).dense() for r in (mine, c.risk))
    assert torch.equal(ours, theirs)
    assert not is_structured(lambda lam, theta, batch: theta.sum())


@pytest.mark.parametrize("name", ["weight", "inputs", "mask", "l2"])
def test_a_subclass_may_not_take_the_name_of_an_argument(name):
    with pytest.raises(TypeError, match=f"Mine: defines '{name}', which is an argument"):
        type("Mine", (bl.WeightedRisk,), {name: lambda self, lam, batch: lam})


# ---------------------------------------------------------------- bad input


def model():
    return nn.Linear(3, 2).double()


@pytest.mark.parametrize(
    "weight",
    [
        lambda lam: lam,
        lambda lam, batch, losses=None: lam,
        lambda lam, batch, losses, more: lam,
        lambda *args: args[0],
        lambda lam, batch, *rest: lam,
    ],
)
def test_a_weight_whose_parameters_cannot_be_told(weight):
    with pytest.raises(ValueError, match=r"weight: takes .* cannot be told; give it exactly"):
        bl.WeightedRisk(model(), weight=weight)
    risk = bl.WeightedRisk(model())
    with pytest.raises(ValueError, match="cannot be told"):
        risk.weight = weight


def test_weights_whose_parameters_can_be_told():
    class Net(nn.Module):
        def forward(self, lam, batch, losses):
            return lam * losses

    class Object:
        def __call__(self, lam, batch):
            return lam

    def with_constant(lam, batch, *, c=2.0):
        return c * lam

    for weight, reads in ((Net(), True), (Object(), False), (with_constant, False)):
        assert bl.WeightedRisk(model(), weight=weight).reads_losses is reads
    with pytest.raises(ValueError, match="cannot be told"):
        bl.WeightedRisk(model(), weight=dict)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight": 3}, TypeError, "weight: got int, expected a function"),
        ({"inputs": torch.ones(2)}, TypeError, "inputs: got Tensor, expected a function"),
        ({"mask": "pad"}, TypeError, "mask: got str"),
        ({"weight_slope": True}, ValueError, "weight_slope: is True, but the weight does not"),
        (
            {"weight": lambda lam, b: lam, "weight_slope": True},
            ValueError,
            "give weight.lam, batch, losses",
        ),
        ({"loss": "mse", "ignore_index": 0}, ValueError, "ignore_index: got 0 with loss='mse'"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        bl.WeightedRisk(model(), **options)


BATCH = (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]), torch.arange(4))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda lam, b: lam[:3], r"weight: returned shape \(3,\), expected \(4,\)"),
        (lambda lam, b, l: l[:, None], r"weight: returned shape \(4, 1\), expected \(4,\)"),
        (lambda lam, b: 1.0, "weight: returned float, expected a floating-point tensor"),
        (lambda lam, b: b[1], "weight: returned dtype torch.int64, expected a floating-point"),
        (lambda lam, b: lam / 0 * b[1], "weight: is NaN or infinite for 4 of 4 examples"),
        (lambda lam, b: lam[b[2] + 1], "lam: has 4 entries, too few for this batch"),
        (lambda lam, b: lam[b[3]], "batch: has too few parts"),
    ],
)
def test_weights_that_cannot_be(weight, message):
    risk = bl.WeightedRisk(model(), weight=weight)
    with pytest.raises(ValueError, match=message):
        risk(torch.ones(4), torch.zeros(8), BATCH)


def test_negative_weights_are_a_loss_but_no_curvature():
    for weight in (lambda lam, b: -lam, lambda lam, b, l: -l):
        risk = bl.WeightedRisk(model(), weight=weight)
        assert risk(torch.ones(4), torch.zeros(8), BATCH) < 0
        with pytest.raises(ValueError, match="weight: the smallest is -"):
            curvature.GGN(risk, torch.ones(4), torch.zeros(8), BATCH)


def test_weights_normalised_over_the_batch_have_no_slope():
    c = case("normalised")
    risk = bl.WeightedRisk(c.risk.model, weight=c.risk.weight, l2=L2, weight_slope=True)
    at = (c.lam, c.theta, c.batch)
    for use in (lambda r: r(*at), lambda r: curvature.GGN(r, *at)):
        with pytest.raises(ValueError, match="has no potential .* use weight_slope=False"):
            use(risk)


def test_losses_are_needed_where_the_weight_reads_them():
    c = case("rising")
    with pytest.raises(ValueError, match="weight: reads the examples' losses, which were not"):
        c.risk.weights(c.lam, c.batch)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda lam, b: b[0], "inputs: returned Tensor, expected a tuple"),
        (lambda lam, b: (b[0],), "inputs: returned 1 part, expected a tuple"),
        (lambda lam, b: (b[0], None), "inputs: returned NoneType as y"),
        (lambda lam, b: (b[0], lam.sum()), "inputs: returned a tensor without rows as y"),
        (lambda lam, b: (torch.cat([b[0], b[0]]), b[1]), "x has 8 rows and y has 4"),
        (lambda lam, b: (b[0][:, :2], b[1]), r"Linear cannot take x of shape \(4, 2\)"),
        (lambda lam, b: (b[0] + lam[b[2] + 9, None], b[1]), "lam: has 4 entries, too few"),
    ],
)
def test_inputs_that_cannot_be(inputs, message):
    risk = bl.WeightedRisk(model(), inputs=inputs)
    with pytest.raises(ValueError, match=message):
        risk(torch.ones(4), torch.zeros(8), BATCH)


def test_no_caller_can_forget_the_inputs_or_apply_them_twice():
    c = case("inputs, weights")
    seen = c.risk.seen(c.lam, c.batch)
    for use in (
        lambda b: c.risk.outputs(c.theta, b),
        lambda b: c.risk.losses(c.theta, b),
        lambda b: c.risk.weights(c.lam, b),
    ):
        use(seen)
        with pytest.raises(ValueError, match=r"give risk.seen\(lam, batch\)"):
            use(c.batch)
    with pytest.raises(ValueError, match="has been through inputs"):
        c.risk(c.lam, c.theta, seen)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"x": 1}, "batch: got dict, expected a tuple"),
        (({"ids": 1}, BATCH[1]), "batch: got dict as x, expected a tensor"),
        ((torch.ones(4, 5, 3), BATCH[1]), r"shape \(4,\) .* expected integer labels of shape"),
        ((torch.ones(4, 2, 3), torch.zeros(4, 2)), r"labels of shape \(4, 2\), dtype torch.int64"),
        ((torch.ones(4, 2, 3), torch.full((4, 2), 2)), "found 2, .* 0 to 1; or ignore_index, -100"),
        ((torch.ones(4, 3), torch.tensor([0, 1, -100, 0])), "found -100.*ignore_index= names"),
    ],
)
def test_batches_that_cannot_be(batch, message):
    with pytest.raises(ValueError, match=message):
        bl.WeightedRisk(model())(torch.ones(4), torch.zeros(8), batch)


def test_sums_that_cannot_be():
    one, two = bl.WeightedRisk(model()), bl.WeightedRisk(model(), l2=0.1)
    for arguments, kind, message in (
        (([],), ValueError, "risks: got none"),
        (([one, torch.sin],), TypeError, "risks: term 1 is builtin_function_or_method"),
        (([one], [1, 2]), ValueError, "coefficients: got 2 for 1 risks"),
        (([one], [-1.0]), ValueError, "coefficients: got -1.0, expected a number that is zero or"),
        (([one], ["a"]), ValueError, "coefficients: got 'a', expected a number"),
        (([one], [torch.ones(())]), ValueError, "coefficients: got a tensor, expected a number"),
        (([one], None, -1), ValueError, "l2: got -1"),
        (([one, two],), ValueError, "term 1 has l2=0.1, but its model holds 8 of theta's 16"),
        (([one], None, 0.0, two.model), ValueError, "model: does not hold parameter 'weight' of"),
    ):
        with pytest.raises(kind, match=message):
            bl.SumOfRisks(*arguments)
    sums = bl.SumOfRisks([one, bl.WeightedRisk(one.model)])
    for batch, message in (
        (BATCH, "batch: got 3 parts, expected a tuple of 2 batches"),
        (BATCH[0], "batch: got Tensor, expected a tuple of 2 batches"),
        (BATCH[:2], "batch: got Tensor, expected a tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            sums(torch.ones(4), torch.zeros(8), batch)


def test_exact_probes_that_would_not_fit_are_refused():
    risk = bl.WeightedRisk(model())
    outputs = torch.zeros(2, 40, 1000)
    with pytest.raises(ValueError, match="1000 x 40 probes of shape .* use 'mc' or 'empirical'"):
        side = curvature.OutputSide(risk, outputs, torch.zeros(2, 40).long())
        curvature.Probes("exact").of(side)


def test_a_batch_whose_labels_are_all_ignored_has_no_loss_and_no_curvature():
    risk = bl.WeightedRisk(Mixing(nn.Linear(3, 3), nn.Linear(3, 2)))
    batch = (torch.ones(2, 4, 3), torch.full((2, 4), -100))
    theta = bl.flatten(risk.model)
    assert risk(torch.ones(1), theta, batch) == 0
    for operator in (curvature.GGN, curvature.EmpiricalFisher):
        assert not operator(risk, torch.ones(1), theta, batch).dense().any()


def test_inputs_and_weights_that_read_losses_need_the_slope():
    model, batch = torch.nn.Linear(3, 1).double(), _three_rows()

    def made(**options):
        inputs = lambda lam, b: (b[0], b[1] + lam * b[0][:, :1])  # noqa: E731
        weight = lambda lam, b, losses: torch.sigmoid(1 - losses)  # noqa: E731
        return bl.WeightedRisk(model, "mse", weight, l2=0.3, inputs=inputs, **options)

    with pytest.raises(ValueError, match="weight_slope: is False, but with inputs"):
        made()
    risk, eps = made(weight_slope=True), 1e-5
    lam, theta = torch.tensor(0.4).double(), bl.flatten(model)

    def q(lam):
        return products.theta_gradient(risk, lam, theta, batch)[1]

    v = torch.linspace(-1, 1, 4).double()
    truth = (q(lam + eps) - q(lam - eps)) @ v / (2 * eps)
    assert abs(float(products.cross_vp(risk, lam, theta, batch, v) - truth)) < 1e-8
    later = bl.WeightedRisk(model, "mse", inputs=lambda lam, b: b)
    later.weight = lambda lam, b, losses: losses
    with pytest.raises(ValueError, match="weight_slope: is False"):
        later(lam, theta, batch)


def _three_rows():
    x = torch.tensor([[1.0, 0.5, -1.0], [0.2, -0.4, 0.3], [-0.7, 1.1, 0.6]]).double()
    return x, torch.tensor([[1.0], [0.0], [-2.0]]).double()


def test_an_outer_loss_has_no_weights_that_read_its_losses():
    model = torch.nn.Linear(3, 1).double()
    focal = bl.WeightedRisk(model, "mse", weight=lambda lam, b, losses: 1 - torch.exp(-losses))
    for outer in (focal, bl.SumOfRisks([bl.WeightedRisk(model, "mse"), focal])):
        problem = bl.BilevelProblem(bl.WeightedRisk(model, "mse", l2=0.1), outer)
        at = torch.zeros(1).double(), bl.flatten(model)
        with pytest.raises(ValueError, match="outer_loss: its weights read the losses"):
            bl.hypergradient(problem, *at, _three_rows(), _three_rows(), bl.Direct())
        with pytest.raises(ValueError, match="outer_loss: its weights read the losses"):
            bl.AID(problem, *at, bl.CG(2), inner_lr=0.1, outer_lr=0.1)
