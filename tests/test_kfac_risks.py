"""KFAC and EKFAC follow every kind of risk: factors, v and J v against dense algebra written here.

The risks of `test_risk` come with their losses, weights and inputs as plain formulas. From these
come, without a function of the package, the inputs a of each linear map, the gradients g of every
square root of the output curvature, the gradients G_i of the examples, and so

    A = mean a a^T,  B = (1/n) sum g g^T,  E = (1/n) sum_i (U_B^T G_i U_A)^2,  d = (1/n) sum_i G_i^2
"""

import copy
import math
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from test_risk import CASES, L2, case, error, field_jacobians, jacobian, loss_by_hand
from together import solve_and_cross
from torch import nn
from torch.func import functional_call

import bilevel_lite as bl
from bilevel_lite import tape
from bilevel_lite.ekfac import ekfac_operator
from bilevel_lite.kfac import kfac_factors, kfac_operator

DAMPING = 0.03
FISHERS = ["exact", "mc", "empirical"]

# ---------------------------------------------------------------- the algebra by hand


def places(model):
    """Where each parameter stands in theta, by identity."""
    out, start = {}, 0
    for p in model.parameters():
        if p.requires_grad:
            out[id(p)] = slice(start, start + p.numel())
            start += p.numel()
    return out


def models_of(risk):
    return [r.model for r in risk.risks] if isinstance(risk, bl.SumOfRisks) else [risk.model]


def run(model, place, theta, x):
    """Outputs, and for each module that owns parameters its calls' (input, output)."""
    calls, hooks = {}, []
    for name, m in model.named_modules():
        if m._parameters:
            hooks.append(
                m.register_forward_hook(
                    lambda m, i, o, name=name: calls.setdefault(name, []).append((i[0], o))
                )
            )
    params = {
        name: theta[place[id(p)]].view(p.shape)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    out = functional_call(model, params, (x,), tie_weights=False)
    for hook in hooks:
        hook.remove()
    return out, calls


def roots(c, term, o, fisher, generator, samples=1):
    """Tensors s like the outputs with sum s_i s_i^T = sigma_i h_i (+ V'_i s_i s_i^T)."""
    ignored, y = term.how.get("ignored", -100), term.y
    if y.dim() == 1 and "ignored" not in term.how:
        ignored = None

    def losses(a):
        return loss_by_hand(a, y, -1000 if ignored is None else ignored)

    leaf = losses(o).detach().requires_grad_()
    sigma = term.sigma(c.lam, leaf)
    slope = torch.zeros_like(leaf)
    if c.slope and sigma.requires_grad:
        slope = torch.autograd.grad(sigma.sum(), leaf)[0].clamp(min=0)
    sigma, n = sigma.detach(), len(o)
    at = o.clone().requires_grad_()
    s = torch.autograd.grad(losses(at).sum(), at)[0]
    view = (n, *[1] * (o.dim() - 1))
    if fisher == "empirical":
        return [(sigma + slope).sqrt().view(view) * s]
    bend = [slope.sqrt().view(view) * s] if c.slope else []
    if fisher == "mc":
        out = []
        for _ in range(samples):
            if y.is_floating_point():
                draw = torch.randn(o.shape, generator=generator)
            else:
                p = o.softmax(-1)
                drawn = p.flatten(0, -2).multinomial(1, generator=generator).view(p.shape[:-1])
                draw = p - nn.functional.one_hot(drawn, p.shape[-1])
                kept = torch.ones(y.shape) if ignored is None else (y != ignored).double()
                number = kept.reshape(n, -1).sum(1).clamp(min=1)
                share = kept / number.view(n, *[1] * (y.dim() - 1))
                draw = share.sqrt()[..., None] * draw
            out.append(sigma.sqrt().view(view) * draw / math.sqrt(samples))
        return out + bend
    columns = []  # (n, D, D): a square root of the Hessian of each loss in its own outputs
    for i in range(n):
        h = torch.autograd.functional.hessian(
            lambda a, i=i: losses(torch.cat([o[:i], a[None], o[i + 1 :]]))[i], o[i]
        )
        values, vectors = torch.linalg.eigh(sigma[i] * h.reshape(o[i].numel(), -1))
        columns.append(vectors * values.clamp(min=0).sqrt())
    columns = torch.stack(columns)
    return [columns[:, :, k].view(o.shape) for k in range(columns.shape[2])] + bend


def rows_of(module, t, output=False):
    """(n * positions, features) of what a linear map takes or gives."""
    if isinstance(module, nn.Linear):
        return t.reshape(-1, t.shape[-1])
    if not output:
        t = nn.functional.unfold(
            t, module.kernel_size, module.dilation, module.padding, module.stride
        )
    return t.flatten(2).transpose(1, 2).reshape(-1, t.shape[1])


def passes(c, fisher, theta=None, seed=0, samples=1):
    """For each term: its model, its calls, gradients g of each probe, and the examples' G_i."""
    theta = c.theta if theta is None else theta
    generator, out = torch.Generator().manual_seed(seed), []
    whole = places(c.risk.model)
    for model, term in zip(models_of(c.risk), c.terms, strict=True):
        leaf = theta.clone().requires_grad_()
        o, calls = run(model, whole, leaf, term.x(c.lam).detach())
        probes = roots(c, term, o.detach(), fisher, generator, samples)
        back = {
            name: [
                torch.autograd.grad(o, used[0][1], s, retain_graph=True, allow_unused=True)[0]
                for s in probes
            ]
            for name, used in calls.items()
        }
        j = jacobian(lambda t, m=model, e=term: run(m, whole, t, e.x(c.lam).detach())[0], theta)
        j = j.reshape(len(o), -1, len(theta))
        own = [torch.einsum("nad,na->nd", j, s.reshape(len(o), -1)) for s in probes]
        out.append(SimpleNamespace(model=model, term=term, calls=calls, back=back, own=own))
    return out


def layers_of(done):
    """Weight's start in theta -> [(pass, module name)], for linear maps used once everywhere."""
    whole, bad = {}, set()
    for one in done:
        for name, m in one.model.named_modules():
            if not m._parameters or name not in one.calls:
                continue
            held = [id(p) for p in m._parameters.values() if p is not None and p.requires_grad]
            linear = isinstance(m, nn.Linear | nn.Conv2d) and len(one.calls[name]) == 1
            if linear:
                whole.setdefault(held[0], []).append((one, name))
            else:
                bad |= set(held)
    return {key: uses for key, uses in whole.items() if key not in bad}


def a_and_b(uses, joint):
    """sum c A / sum c and sum c B over the terms that have the layer."""
    a, b, total = 0, 0, sum(one.term.c for one, _ in uses)
    for one, name in uses:
        module, (taken, _) = one.model.get_submodule(name), one.calls[name][0]
        rows = rows_of(module, taken.detach())
        if joint:
            rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        kept = getattr(one.term, "mask", None)
        if kept is not None and taken.shape[: kept.dim()] == kept.shape:
            rows = rows[kept.flatten()]
        weight = one.term.c / total if total else 1 / len(uses)
        a = a + weight * rows.T @ rows / len(rows)
        for g in one.back[name]:
            if g is not None:
                columns = rows_of(module, g, output=True)
                b = b + one.term.c * columns.T @ columns / len(one.own[0])
    return a, b


def by_hand(c, b, solver, fisher, theta=None, seed=0, old=None, beta=0.0):
    """v of KFAC or EKFAC, the factors by the weight, and the diagonal; mixed with ``old`` ones."""
    done, tau = passes(c, fisher, theta, seed, getattr(solver, "samples", 1)), DAMPING + 2 * c.l2
    whole, v, factors = places(c.risk.model), torch.full_like(b, math.nan), {}
    diagonal = sum(
        one.term.c * sum(g.square().sum(0) for g in one.own) / len(one.own[0]) for one in done
    )
    if old is not None:
        diagonal = beta * old.diagonal + (1 - beta) * diagonal
    v[:] = b / (diagonal + tau)
    ekfac = isinstance(solver, bl.EKFAC)
    for key, uses in layers_of(done).items():
        module = uses[0][0].model.get_submodule(uses[0][1])
        weight, bias = whole[id(module.weight)], None
        if module.bias is not None:
            bias = whole[id(module.bias)]
        joint = bias is not None and solver.bias == "joint"
        fa, fb = a_and_b(uses, joint)
        if old is not None:
            pairs = zip(old.factors[key], (fa, fb), strict=True)
            fa, fb = (beta * o + (1 - beta) * f for o, f in pairs)
        factors[key] = fa, fb
        big = b[weight].view(len(fb), -1)
        if joint:
            big = torch.cat([big, b[bias][:, None]], 1)
        ia, ib = torch.eye(len(fa)), torch.eye(len(fb))
        if ekfac:
            ua, ub = torch.linalg.eigh(fa)[1], torch.linalg.eigh(fb)[1]
            e, small = torch.zeros(big.shape), torch.zeros(len(fb))
            for one, _ in uses:
                for g in one.own:
                    big_g = g[:, weight].view(len(g), len(fb), -1)
                    if joint:
                        big_g = torch.cat([big_g, g[:, bias][:, :, None]], 2)
                    share = one.term.c / len(g)
                    e = e + share * (ub.T @ big_g @ ua).square().sum(0)
                    if bias is not None:
                        small = small + share * (g[:, bias] @ ub).square().sum(0)
            x = ub @ ((ub.T @ big @ ua) / (e + tau)) @ ua.T
            x_bias = None if bias is None else ub @ ((ub.T @ b[bias]) / (small + tau))
        elif solver.damping_rule == "exact":
            k = torch.kron(fb, fa) + tau * torch.eye(big.numel())
            x = torch.linalg.solve(k, big.reshape(-1)).view(big.shape)
            x_bias = None if bias is None else torch.linalg.solve(fb + tau * ib, b[bias])
        else:
            ratio = (fa.trace() / len(fa)) / (fb.trace() / len(fb))
            pi = ratio.sqrt() if solver.damping_rule == "heuristic" else torch.tensor(1.0)
            da, db = pi * math.sqrt(tau), math.sqrt(tau) / pi
            if float(fb.trace()) == 0:  # the zero block: damping alone
                x, x_bias = big / tau, None if bias is None else b[bias] / tau
            else:
                x = torch.linalg.solve(fb + db * ib, big) @ torch.linalg.inv(fa + da * ia)
                x_bias = None if bias is None else torch.linalg.solve(fb + db * ib, b[bias])
        if joint:
            v[weight], v[bias] = x[:, :-1].reshape(-1), x[:, -1]
        else:
            v[weight] = x.reshape(-1)
            if bias is not None:
                v[bias] = x_bias
    return SimpleNamespace(v=v, factors=factors, diagonal=diagonal)


def cross_by_hand(c, v, theta=None):
    """J v: d/dlam of < sum c (1/n) sum_i sigma_i(lam, l_i held still) grad l_i, v >."""
    lam = c.lam.clone().requires_grad_()
    theta = (c.theta if theta is None else theta).clone().requires_grad_()
    whole, total = places(c.risk.model), 0.0
    for model, term in zip(models_of(c.risk), c.terms, strict=True):
        o, _ = run(model, whole, theta, term.x(lam))
        l = loss_by_hand(o, term.y)
        total = total + term.c * (term.sigma(lam, l.detach()) * l).mean()
    (gradient,) = torch.autograd.grad(total, theta, create_graph=True)
    return torch.autograd.grad(gradient @ v, lam)[0]


def problem_of(c):
    return bl.BilevelProblem(c.risk, lambda lam, theta, _: (theta * c.target).sum().sin())


def direction(c, seed=5):
    return torch.randn(len(c.theta), generator=torch.Generator().manual_seed(seed))


SOLVERS = {
    "kfac": lambda fisher, **how: bl.KFAC(DAMPING, fisher, **how),
    "kfac, factored": lambda fisher, **how: bl.KFAC(
        DAMPING, fisher, damping_rule="factored", bias="separate", **how
    ),
    "kfac, exact": lambda fisher, **how: bl.KFAC(DAMPING, fisher, damping_rule="exact", **how),
    "ekfac": lambda fisher, **how: bl.EKFAC(DAMPING, fisher, **how),
    "ekfac, separate": lambda fisher, **how: bl.EKFAC(DAMPING, fisher, bias="separate", **how),
}


# ---------------------------------------------------------------- cases of this file


def case_of(risk, lam, batch, *terms, slope=False, l2=L2, seed=0):
    g = torch.Generator().manual_seed(seed)
    theta = 0.5 * torch.randn(
        sum(s.stop - s.start for s in places(risk.model).values()), generator=g
    )
    return SimpleNamespace(
        risk=risk, lam=lam, batch=batch, terms=terms, slope=slope, theta=theta, l2=l2,
        target=torch.randn(theta.shape, generator=g),
    )  # fmt: skip


def term(x, y, sigma=lambda lam, l: torch.ones_like(l), c=1.0, **more):
    return SimpleNamespace(x=lambda lam: x, y=y, sigma=sigma, c=c, how={}, **more)


def built(make):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return make()


class Pooled(nn.Module):
    """A sentence's class from the mean over its words, those rows of x that are not zero."""

    def __init__(self, width, hidden):
        super().__init__()
        self.word, self.mix = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
        self.norm, self.read = nn.LayerNorm(hidden), nn.Linear(hidden, 3)

    def forward(self, x):
        real = (x != 0).any(-1, keepdim=True).to(x)
        z = self.mix(self.norm(self.word(x).tanh())).tanh()
        return self.read((real * z).sum(1) / real.sum(1))


def sentences(kind, length, masked=True):
    """Eight sentences of two to five words, padded to one length."""
    g = torch.Generator().manual_seed(1)
    width, hidden = (5, 4) if "wide" in kind else (70, 60)
    x, words = torch.randn(8, 5, width, generator=g), torch.tensor([5, 2, 3, 5, 4, 2, 3, 4])
    y = torch.randint(3, (8, 5), generator=g)
    real = torch.arange(5) < words[:, None]
    x = nn.functional.pad(x * real[..., None], (0, 0, 0, length - 5))
    y = nn.functional.pad(y.masked_fill(~real, -100), (0, length - 5), value=-100)
    real = nn.functional.pad(real, (0, length - 5))
    if "pooled" in kind:
        model, y = built(lambda: Pooled(width, hidden)), y[:, 0].clone()
    else:
        model = built(
            lambda: nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 3))
        )
    lam = torch.randn(8, generator=g)
    risk = bl.WeightedRisk(
        model, weight=lambda lam, b: lam[b[2]].sigmoid(), l2=L2,
        mask=(lambda b: b[3]) if masked else None,
    )  # fmt: skip
    own = term(x, y, lambda lam, l: lam.sigmoid(), mask=real if masked else None)
    return case_of(risk, lam, (x, y, torch.arange(8), real), own)


def heads():
    """Two heads on one encoder; ``mix`` is a linear map in one term and used twice in the other.

    The third term is switched off, and nothing else has its head.
    """
    g = torch.Generator().manual_seed(2)
    encoder, mix, norm = built(lambda: (nn.Linear(5, 6), nn.Linear(6, 6), nn.LayerNorm(6)))
    first, second, third = built(lambda: [nn.Linear(6, k) for k in (3, 3, 3)])
    one = nn.Sequential(encoder, nn.Tanh(), norm, mix, nn.Tanh(), first)
    two = nn.Sequential(encoder, nn.Tanh(), mix, nn.Tanh(), mix, nn.Tanh(), second)
    three = nn.Sequential(encoder, nn.Tanh(), third)
    x = [torch.randn(n, 5, generator=g) for n in (7, 11, 4)]
    y = [torch.randint(k, (len(r),), generator=g) for r, k in zip(x, (3, 3, 3), strict=True)]

    def rising(lam, l):
        return (lam[7] + lam[8].exp() * l).sigmoid()

    risk = bl.SumOfRisks(
        [
            bl.WeightedRisk(one, weight=lambda lam, b: lam[b[2]].sigmoid()),
            bl.WeightedRisk(two, weight=lambda lam, b, l: rising(lam, l), weight_slope=True),
            bl.WeightedRisk(three),
        ],
        [1.7, 0.6, 0.0],
        l2=L2,
    )
    lam = torch.randn(9, generator=g)
    terms = (
        term(x[0], y[0], lambda lam, l: lam[:7].sigmoid(), 1.7),
        term(x[1], y[1], rising, 0.6),
        term(x[2], y[2], c=0.0),
    )
    batch = (x[0], y[0], torch.arange(7)), (x[1], y[1]), (x[2], y[2])
    return case_of(risk, lam, batch, *terms, slope=True)


def with_rows(c, keep):
    """The same sum, its first two terms on fewer rows."""
    other = copy.copy(c)
    first, second, third = c.terms
    a, b = keep
    other.batch = tuple(t[:a] for t in c.batch[0]), tuple(t[:b] for t in c.batch[1]), c.batch[2]
    other.terms = (
        term(first.x(c.lam)[:a], first.y[:a], lambda lam, l: lam[:a].sigmoid(), first.c),
        term(second.x(c.lam)[:b], second.y[:b], second.sigma, second.c),
        third,
    )
    return other


OWN = {
    "heads": heads,
    "words, wide": lambda: sentences("wide", 7),
    "words, narrow": lambda: sentences("narrow", 7),
    "pooled, wide": lambda: sentences("pooled, wide", 7),
    "pooled, narrow": lambda: sentences("pooled, narrow", 7),
}


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", list(OWN))
def test_sums_and_masks_are_the_algebra(name, fisher, both_routes):
    c = OWN[name]()
    b = direction(c)
    for kind, make in SOLVERS.items():
        solver = make(fisher)
        if "narrow" in name and kind == "kfac, exact":
            continue  # a matrix of 4,000 rows
        truth = by_hand(c, b, solver, fisher)
        v, jv, info = solve_and_cross(solver, problem_of(c), c.lam, c.theta, c.batch, b, False)
        assert error(v, truth.v) < 1e-10, kind
        assert error(jv, cross_by_hand(c, v)) < 1e-10, (kind, info.cross)
        own = "words" in name
        assert info.cross == (f"{type(solver).__name__}'s own pass" if own else "forward mode")


def test_a_layer_that_is_no_linear_map_in_one_term_has_no_block():
    c = heads()
    _, info = bl.KFAC(DAMPING).solve(problem_of(c), c.lam, c.theta, c.batch, c.theta)
    assert set(info.without_block) == {"0.2.weight", "0.2.bias", "0.3.weight", "0.3.bias"}


# ---------------------------------------------------------------- every kind of risk


@pytest.fixture(scope="module", params=CASES)
def c(request):
    c = case(request.param)
    c.l2 = L2
    return c


@pytest.mark.parametrize("fisher", FISHERS)
def test_v_and_j_v_are_the_algebra(c, fisher, both_routes):
    b, (_, j) = direction(c), field_jacobians(c, c.lam, c.theta)
    for name, make in SOLVERS.items():
        solver = make(fisher)
        truth = by_hand(c, b, solver, fisher)
        v, jv, info = solve_and_cross(solver, problem_of(c), c.lam, c.theta, c.batch, b, False)
        assert error(v, truth.v) < 1e-10, name
        assert error(jv, j.T @ v) < 1e-10, (name, info.cross)


def weights_of(model):
    """Layer name -> the weight's identity."""
    return {name: id(m.weight) for name, m in model.named_modules() if hasattr(m, "weight")}


@pytest.mark.parametrize("fisher", FISHERS)
def test_factors_and_operators_are_the_algebra(c, fisher):
    at, b = (c.risk, c.lam, c.theta, c.batch), direction(c)
    for bias in ("joint", "separate"):
        solver = bl.KFAC(DAMPING, fisher, damping_rule="exact", bias=bias)
        truth = by_hand(c, b, solver, fisher)
        draws = torch.Generator().manual_seed(0)
        factors = kfac_factors(*at, fisher, generator=draws, bias=bias)
        ids = weights_of(c.risk.model)
        assert {ids[name] for name in factors} == set(truth.factors)
        for name, got in factors.items():
            for one, two in zip(got, truth.factors[ids[name]], strict=True):
                assert error(one, two) < 1e-12
        for make, kind in ((kfac_operator, solver), (ekfac_operator, bl.EKFAC(DAMPING, bias=bias))):
            draws = torch.Generator().manual_seed(0)
            dense = make(*at, fisher, generator=draws, bias=bias).dense()
            v = by_hand(c, b, kind, fisher).v
            assert error(dense @ v + DAMPING * v, b) < 1e-10


@pytest.mark.parametrize("name", ["weights", "rising, mse", "positions"])
def test_several_draws(name):
    c = case(name)
    c.l2, b = L2, direction(c)
    for make in (bl.KFAC, bl.EKFAC):
        solver = make(DAMPING, samples=3)
        truth = by_hand(c, b, solver, "mc")
        v, _ = solver.solve(problem_of(c), c.lam, c.theta, c.batch, b)
        assert error(v, truth.v) < 1e-10


# ---------------------------------------------------------------- lam in the inputs


@pytest.mark.parametrize("name", ["inputs", "inputs, weights", "inputs, rising"])
def test_kfac_of_inputs_is_kfac_of_the_batch_that_the_model_sees(name):
    """Appended rows are in the factors, too: without them v is another one."""
    c = case(name)
    b, term = direction(c), c.terms[0]
    seen = term.x(c.lam), term.y, torch.arange(len(term.y))
    for fisher in FISHERS:
        for make in (bl.KFAC, bl.EKFAC):
            there = bl.WeightedRisk(
                c.risk.model, l2=L2, weight_slope=c.slope,
                weight=(lambda lam, b, l: term.sigma(c.lam, l))
                if c.slope
                else lambda lam, b: term.sigma(c.lam, torch.ones(len(b[1]))),
            )  # fmt: skip
            plain = bl.BilevelProblem(there, there)
            v, _ = make(DAMPING, fisher).solve(problem_of(c), c.lam, c.theta, c.batch, b)
            truth, _ = make(DAMPING, fisher).solve(plain, c.lam, c.theta, seen, b)
            assert error(v, truth) < 1e-12
            if len(seen[0]) > len(c.batch[0]) and not c.slope:
                few = bl.WeightedRisk(c.risk.model, l2=L2)
                without, _ = make(DAMPING, fisher).solve(
                    bl.BilevelProblem(few, few), c.lam, c.theta, c.batch, b
                )
                assert error(v, without) > 1e-2


# ---------------------------------------------------------------- positions and padding


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_one_position_is_none(loss, fisher):
    model = built(lambda: nn.Linear(5, 3))
    g = torch.Generator().manual_seed(1)
    x, lam = torch.randn(9, 5, generator=g), torch.randn(9, generator=g)
    y = torch.randint(3, (9,), generator=g) if loss == "cross_entropy" else torch.randn(9, 3)
    risk = bl.WeightedRisk(model, loss, weight=lambda lam, b: lam[b[2]].sigmoid(), l2=L2)
    problem, theta = bl.BilevelProblem(risk, risk), bl.flatten(model)
    flat, words = (x, y, torch.arange(9)), (x[:, None], y[:, None], torch.arange(9))
    for make in (bl.KFAC, bl.EKFAC):
        one, two = (
            bl.hypergradient(problem, lam, theta, batch, batch, make(DAMPING, fisher))
            for batch in (flat, words)
        )
        assert error(one, two) < 1e-12


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("kind", ["words, wide", "words, narrow", "pooled, wide", "pooled, narrow"])
def test_padding_changes_nothing_under_a_mask(kind, fisher):
    short, long, bare = (sentences(kind, t, m) for t, m in ((5, True), (20, True), (20, False)))
    for name, make in SOLVERS.items():
        h, same, other = (
            bl.hypergradient(problem_of(c), c.lam, c.theta, c.batch, None, make(fisher))
            for c in (short, long, bare)
        )
        assert error(same, h) < 1e-10, name
        if not name.startswith("ekfac"):  # whose E has no padding in it; only its basis has
            assert error(other, h) > 1e-2, name
    joint = "joint"
    for one, two in zip(
        kfac_factors(short.risk, short.lam, short.theta, short.batch, fisher, bias=joint).values(),
        kfac_factors(long.risk, long.lam, long.theta, long.batch, fisher, bias=joint).values(),
        strict=True,
    ):
        assert error(one[0], two[0]) < 1e-12 and error(one[1], two[1]) < 1e-12


class Layouts(nn.Module):
    """A linear map on both halves of each word, a convolution over words, a map on their mean."""

    def __init__(self):
        super().__init__()
        self.part, self.conv, self.read = nn.Linear(3, 4), nn.Conv2d(1, 2, (1, 3)), nn.Linear(12, 3)

    def forward(self, x):
        real = (x != 0).any(-1, keepdim=True).to(x)
        z = self.part(x.view(*x.shape[:2], 2, 3)).tanh().flatten(2)
        z = self.conv((real * z)[:, None]).tanh().permute(0, 2, 1, 3).flatten(2)
        return self.read((real * z).sum(1) / real.sum(1))


@pytest.mark.parametrize("length", [4, 9, 12])  # 12: as wide as the inputs of the last map
def test_a_mask_is_of_words_in_whatever_layout_a_layer_takes_them(length):
    model, words = built(Layouts), torch.tensor([4, 2, 3, 4, 1])
    g = torch.Generator().manual_seed(6)
    real, y = torch.arange(length) < words[:, None], torch.randint(3, (5,), generator=g)
    x = torch.zeros(5, length, 6)
    x[:, :4] = torch.randn(5, 4, 6, generator=g)
    x = x * real[..., None]
    risk, at = bl.WeightedRisk(model, mask=lambda b: b[2]), (torch.zeros(0), bl.flatten(model))
    found = kfac_factors(risk, *at, (x, y, real), "exact", bias="separate")
    halves = x[real].view(-1, 3)
    z = model.part(halves).tanh().view(-1, 8).detach()
    patches = z.unfold(1, 3, 1).reshape(-1, 3)
    for name, rows in (("part", halves), ("conv", patches)):
        assert error(found[name][0], rows.T @ rows / len(rows)) < 1e-12, name
    bare = kfac_factors(bl.WeightedRisk(model), *at, (x, y), "exact", bias="separate")
    assert error(found["read"][0], bare["read"][0]) < 1e-12
    for name in ("part", "conv"):
        assert error(found[name][1], bare[name][1]) < 1e-12  # no gradient at padding
        assert error(found[name][0], bare[name][0]) > 1e-2, name


def test_padding_and_draws_of_one_sentence():
    """Its words come first, so that they get the same draws however long the padding is."""
    hs = []
    for length in (5, 20):
        c = sentences("words, wide", length)
        one = tuple(t[:1] for t in c.batch)
        hs.append(bl.hypergradient(problem_of(c), c.lam, c.theta, one, None, bl.KFAC(DAMPING)))
    assert error(hs[1], hs[0]) < 1e-10


def test_a_kept_factor_is_not_that_of_another_mask():
    c = sentences("words, narrow", 7)
    x, y, index, real = c.batch
    fewer = real & (torch.arange(7) < 2)
    batches = (x, y, index, real), (x, y.masked_fill(~fewer, -100), index, fewer)
    for make in (bl.KFAC, bl.EKFAC):
        kept = make(DAMPING, "exact", fixed_batch=True)
        for batch in batches:
            fresh = make(DAMPING, "exact")
            got, truth = (
                bl.hypergradient(problem_of(c), c.lam, c.theta, batch, None, solver)
                for solver in (kept, fresh)
            )
            assert error(got, truth) < 1e-12


# ---------------------------------------------------------------- what is remembered


STEPS = [(7, 11), (3, 11), (7, 4), (5, 6)]  # rows of the two terms, call by call


def call(c, solver, k, b):
    """One call of a solver on the sum, at another point and with other rows each time."""
    at = with_rows(c, STEPS[k])
    theta = (1 + 0.1 * k) * c.theta
    return at, theta, solve_and_cross(solver, problem_of(at), c.lam, theta, at.batch, b)


@pytest.mark.parametrize("make", [bl.KFAC, bl.EKFAC])
def test_averages_over_the_calls_of_a_sum(make, both_routes):
    c, old = heads(), None
    solver, b = make(DAMPING, "exact", ema=0.7), direction(c)
    for k in range(len(STEPS)):
        at, theta, (v, jv, _) = call(c, solver, k, b)
        truth = by_hand(at, b, solver, "exact", theta, old=old, beta=0.7)
        assert error(v, truth.v) < 1e-10
        assert error(jv, cross_by_hand(at, v, theta)) < 1e-10
        old = truth


@pytest.mark.parametrize("make", [bl.KFAC, bl.EKFAC])
def test_kept_blocks_of_a_sum(make, both_routes):
    c = heads()
    solver, b = make(DAMPING, "exact", every=2), direction(c)
    for k in range(len(STEPS)):
        at, theta, (v, jv, info) = call(c, solver, k, b)
        assert info.staleness == k % 2
        if k % 2 == 0:
            truth = by_hand(at, b, solver, "exact", theta).v
        assert error(v, truth) < 1e-10
        assert error(jv, cross_by_hand(at, v, theta)) < 1e-10


@pytest.mark.parametrize("name", ["heads", "words, narrow", "pooled, wide", "rising", "inputs"])
def test_a_stopped_solver_goes_on_to_the_last_bit(name, tmp_path):
    """From its state, as a copy, or pickled: the same operations in the same order."""
    c = OWN[name]() if name in OWN else case(name)
    b = direction(c)

    def calls(solver):
        out = []
        for k in range(3):
            theta = (1 + 0.1 * k) * c.theta
            at = problem_of(c), c.lam, theta, c.batch, b
            out += solve_and_cross(solver, *at)[:2]
        return out

    for make in (
        lambda: bl.KFAC(DAMPING, every=2),
        lambda: bl.KFAC(DAMPING, ema=0.5, every=4, damping_rule="exact", bias="separate"),
        lambda: bl.KFAC(DAMPING, fixed_batch=True),
        lambda: bl.EKFAC(DAMPING, every=4),
        lambda: bl.EKFAC(DAMPING, ema=0.5, every=2, bias="separate"),
    ):
        straight = make()
        calls(straight)
        path, ways = tmp_path / "state.pt", [make(), pickle.loads(pickle.dumps(straight))]
        torch.save(straight.state_dict(), path)
        ways[0].load_state_dict(torch.load(path, weights_only=True))
        ways.append(copy.deepcopy(straight))
        truth = calls(straight)
        for other in ways:
            for got, wanted in zip(calls(other), truth, strict=True):
                assert torch.equal(got, wanted)


def test_a_kept_first_factor_of_a_sum():
    """Each term's first layer has inputs of its own; where several share one it is not kept."""
    c, b = heads(), None
    alone = bl.SumOfRisks([c.risk.risks[0]], [1.7], l2=L2, model=c.risk.risks[0].model)
    for risk, batch in ((c.risk, c.batch), (alone, c.batch[:1])):
        d = bl.flatten(risk.model).numel()
        b, theta = torch.linspace(-1, 1, d), torch.linspace(-0.5, 0.5, d).sin()
        problem = bl.BilevelProblem(risk, risk)
        kept = bl.KFAC(DAMPING, "exact", fixed_batch=True)
        for k in range(3):
            point = (1 + 0.1 * k) * theta
            got = kept.solve(problem, c.lam, point, batch, b)[0]
            fresh = bl.KFAC(DAMPING, "exact").solve(problem, c.lam, point, batch, b)[0]
            assert error(got, fresh) < 1e-11
    assert len(kept._memory.inputs) == 1


# ---------------------------------------------------------------- what is replaced


@pytest.mark.parametrize("part", ["outputs", "losses", "weights", "output_gradient", "__call__"])
def test_a_subclass_that_computes_something_else_is_refused_and_a_function_to_cg(part):
    c = case("weights")

    def replaced(self, *args, **options):
        return getattr(bl.WeightedRisk, part)(self, *args, **options) * 1.5

    mine = type("Mine", (bl.WeightedRisk,), {part: replaced})
    risk = mine(c.risk.model, weight=c.risk.weight, l2=L2)
    problem = bl.BilevelProblem(risk, lambda lam, theta, _: (theta * c.target).sum().sin())
    for solver in (
        bl.KFAC(DAMPING),
        bl.EKFAC(DAMPING),
        bl.CG(3, curvature="ggn"),
        bl.KFACRichardson(2),
        bl.CG(3, precondition=bl.KFAC(DAMPING)),
    ):
        with pytest.raises(TypeError, match=f"Mine overrides '{part}' of WeightedRisk"):
            bl.hypergradient(problem, c.lam, c.theta, c.batch, None, solver)
    # the function's own second derivatives, here by hand
    theta, lam = c.theta.clone().requires_grad_(), c.lam.clone().requires_grad_()
    (g,) = torch.autograd.grad(risk(lam, theta, c.batch), theta, create_graph=True)
    rows = [torch.autograd.grad(one, (theta, lam), retain_graph=True) for one in g]
    h, j = torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
    b = c.target * (c.theta @ c.target).cos()
    truth = -j.T @ torch.linalg.solve(h + DAMPING * torch.eye(len(h)), b)
    got = bl.hypergradient(problem, c.lam, c.theta, c.batch, None, bl.Direct(DAMPING))
    assert error(got, truth) < 1e-10


# ---------------------------------------------------------------- v is not formed


def shapes(name):
    """A model of known code and a batch of it; wide and narrow by n."""
    return {
        "linear": (lambda: nn.Linear(30, 4), (30,)),
        "mlp": (lambda: nn.Sequential(nn.Linear(20, 25), nn.Tanh(), nn.Linear(25, 4)), (20,)),
        "words": (
            lambda: nn.Sequential(nn.Linear(15, 20), nn.Tanh(), nn.Flatten(), nn.Linear(60, 4)),
            (3, 15),
        ),
        "convolutions": (
            lambda: nn.Sequential(
                nn.Conv2d(2, 6, 3, padding=1, stride=(2, 1), bias=False),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Conv2d(6, 9, 2, dilation=2),
                nn.Flatten(),
                nn.Linear(45, 4),
            ).eval(),
            (2, 6, 7),
        ),
    }[name]


WAYS = {
    **SOLVERS,
    "kfac, exact, separate": lambda fisher, **how: bl.KFAC(
        DAMPING, fisher, damping_rule="exact", bias="separate", **how
    ),
}


@pytest.mark.parametrize("n", [3, 40])  # columns fewer than rows, and more
@pytest.mark.parametrize("name", ["linear", "mlp", "words", "convolutions"])
def test_the_hypergradient_does_not_depend_on_whether_v_is_asked_for(name, n):
    make, shape = shapes(name)
    model, g = built(make), torch.Generator().manual_seed(n)
    x, y = torch.randn(2 * n, *shape, generator=g), torch.randint(4, (2 * n,), generator=g)
    risk = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]].sigmoid(), l2=0.01)
    problem, lam = bl.BilevelProblem(risk, risk), torch.randn(2 * n, generator=g)
    theta, index = bl.flatten(model), torch.arange(2 * n)
    first, second = (tuple(t[part] for t in (x, y, index)) for part in (slice(n), slice(n, 2 * n)))
    for kind, solver in WAYS.items():
        for fisher in ("mc", "empirical"):
            for fixed in (False, True):
                bare, asked = (solver(fisher, fixed_batch=fixed) for _ in range(2))
                for batch in (first, first, second, first):  # kept inputs; another batch
                    at = problem, lam, theta, batch, second
                    h = bl.hypergradient(*at, bare)
                    same, info = bl.hypergradient(*at, asked, return_info=True)
                    assert info.solve.cross == f"{type(asked).__name__}'s own pass"
                    assert error(h, same) < 1e-12, (kind, fisher, fixed)
                # and that is J of v, by double backward
                at_lam, at_theta = lam.clone().requires_grad_(), theta.clone().requires_grad_()
                loss = nn.functional.cross_entropy(
                    functional_call(model, bl.unflatten(model, at_theta), (batch[0],)),
                    batch[1],
                    reduction="none",
                )
                value = (at_lam[batch[2]].sigmoid() * loss).mean()
                (grad,) = torch.autograd.grad(value, at_theta, create_graph=True)
                truth = -torch.autograd.grad(grad @ info.v, at_lam)[0]
                assert error(info.implicit, truth) < 1e-10, (kind, fisher, fixed)


def test_float32_holds_on_inputs_up_to_255():
    """V (s X X^T + delta I)^-1 X loses what 1 / delta amplifies; pushed through it does not."""
    make = lambda: nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))  # noqa: E731
    model, g, n = built(make), torch.Generator().manual_seed(0), 128
    x = 255 * torch.rand(n, 784, generator=g) * (torch.rand(n, 784, generator=g) < 0.2)
    y, lam = torch.randint(10, (n,), generator=g), torch.rand(n, generator=g)
    theta = bl.flatten(model.double())
    with torch.no_grad():
        theta[: 784 * 256] /= 100
    hs = {}
    for dtype in (torch.float64, torch.float32):
        risk = bl.WeightedRisk(model.to(dtype), weight=lambda lam, b: lam[b[2]])
        clean, at = bl.WeightedRisk(model), (lam.to(dtype), theta.to(dtype))
        batch = x.to(dtype), y, torch.arange(n)
        for name, solver in {
            "kfac": bl.KFAC(1e-3, "empirical"),
            "factored": bl.KFAC(1e-3, "empirical", damping_rule="factored"),
        }.items():
            h, info = bl.hypergradient(
                bl.BilevelProblem(risk, clean), *at, batch, batch, solver, return_info=True
            )
            hs[name, dtype] = info.implicit.double()
            assert info.solve.cross == "KFAC's own pass"
    for name in ("kfac", "factored"):
        assert error(hs[name, torch.float32], hs[name, torch.float64]) < 2e-5


# ---------------------------------------------------------------- places, and what changes in them


class Held(nn.Module):
    """A module whose own parameters are the weights of two linear maps of the terms' models."""

    def __init__(self, *layers):
        super().__init__()
        for k, layer in enumerate(layers):
            for name, p in layer.named_parameters():
                self.register_parameter(f"{name}{k}", p)


def test_two_layers_held_by_one_module_have_a_block_each():
    first, last = built(lambda: (nn.Linear(5, 4), nn.Linear(4, 3)))
    g = torch.Generator().manual_seed(0)
    batch = torch.randn(9, 5, generator=g), torch.randint(3, (9,), generator=g)
    term_risk = bl.WeightedRisk(nn.Sequential(first, nn.Tanh(), last))
    alone, held = (
        bl.SumOfRisks([term_risk], l2=L2, model=whole)
        for whole in (term_risk.model, Held(first, last))
    )
    theta, lam = bl.flatten(alone.model), torch.zeros(1)
    b = torch.randn(theta.shape, generator=g)
    for make in (lambda: bl.KFAC(DAMPING, "exact", every=2), lambda: bl.EKFAC(DAMPING, "exact")):
        one, two = (
            make().solve(bl.BilevelProblem(r, r), lam, theta, (batch,), b)[0] for r in (alone, held)
        )
        assert error(two, one) < 1e-12
    assert set(kfac_factors(held, lam, theta, (batch,))) == {"", "weight1"}


@pytest.mark.parametrize("make", [bl.KFAC, bl.EKFAC])
@pytest.mark.parametrize("how", [{"every": 3}, {"ema": 0.5}])
def test_factors_of_other_parameters_are_not_used(make, how):
    """As many numbers, but others: first one bias is frozen, then another of the same size."""
    model = built(lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4)))
    risk = bl.WeightedRisk(model, l2=L2)
    problem, g = bl.BilevelProblem(risk, risk), torch.Generator().manual_seed(0)
    batch, lam = (torch.randn(9, 5, generator=g), torch.arange(9) % 4), torch.zeros(1)
    model[0].bias.requires_grad_(False)
    theta, solver = bl.flatten(model), make(DAMPING, **how)
    solver.solve(problem, lam, theta, batch, theta)
    other = make(DAMPING, **how)
    other.load_state_dict(solver.state_dict())
    model[0].bias.requires_grad_(True)
    model[2].bias.requires_grad_(False)
    theta = bl.flatten(model)
    for remembers in (solver, other):
        with pytest.raises(ValueError, match="parameters of other names .* use a new solver"):
            remembers.solve(problem, lam, theta, batch, theta)
    make(DAMPING).solve(problem, lam, theta, batch, theta)


def test_a_kept_first_factor_is_not_that_of_another_layer():
    """The same tensor goes into two models, whose first layers see other patches of it."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 1, 6, 6, generator=g), torch.arange(6) % 3
    solver = bl.KFAC(DAMPING, "exact", fixed_batch=True)
    for stride in (1, 2, 1):
        model = built(
            lambda s=stride: nn.Sequential(
                nn.Conv2d(1, 2, 3, stride=s), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
            )
        )
        risk = bl.WeightedRisk(model, l2=L2)
        at = bl.BilevelProblem(risk, risk), torch.zeros(1), bl.flatten(model), (x, y)
        v, _ = solver.solve(*at, bl.flatten(model))
        assert error(v, bl.KFAC(DAMPING, "exact").solve(*at, bl.flatten(model))[0]) < 1e-12


def test_kept_eigenbases_do_not_hold_the_inputs_they_were_made_of():
    c = sentences("words, narrow", 7)
    solver = bl.EKFAC(DAMPING, every=3, fixed_batch=True)
    bl.hypergradient(problem_of(c), c.lam, c.theta, c.batch, None, solver)
    for a, b, *_ in solver._memory.factors.values():
        assert a.thin and a.inputs is None and b.inputs is None
    assert all(getattr(block, "columns", None) is None for block in solver._memory.blocks)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("make", [bl.KFAC, bl.EKFAC])
@pytest.mark.parametrize("name", ["weights", "rising"])
def test_what_is_counted_is_what_is_done(monkeypatch, name, make):
    """Half a gradient for the forward pass and for each probe; J v, 2 by whatever way it comes."""
    c, done = case(name), {"forward": 0, "backward": 0}

    def counted(kind, whole):
        def run(self, *args, **options):
            done[kind] += 1
            return whole(self, *args, **options)

        return run

    more = c.slope and 1  # one probe more where the weights' slope counts
    columns = {"exact": 3 + more, "mc": 1 + more, "empirical": 1}
    bl.hypergradient(problem_of(c), c.lam, c.theta, c.batch, None, make(DAMPING))  # a known model
    monkeypatch.setattr(tape.Tape, "_run", counted("forward", tape.Tape._run))
    monkeypatch.setattr(tape.Tape, "backward", counted("backward", tape.Tape.backward))
    for fisher, probes in columns.items():
        solver = make(DAMPING, fisher, every=2)
        at = problem_of(c), c.lam, c.theta, c.batch
        done.update(forward=0, backward=0)
        _, info = bl.hypergradient(*at, None, solver, return_info=True, diagnose=False)
        assert info.solve.cross == f"{make.__name__}'s own pass"
        # for J v one pass back more, but where the probe is the losses' own gradient
        assert done == {"forward": 1, "backward": probes + (fisher != "empirical")}
        assert solver.last_cost == info.solve.gradients == (1 + probes) / 2
        assert info.gradients == 1 + (1 + probes) / 2 + 2
        _, info = bl.hypergradient(*at, None, solver, return_info=True, diagnose=False)
        assert done["forward"] == 1 and solver.last_cost == info.solve.gradients == 0
        assert info.gradients == 1 + 2
        solver = make(DAMPING, fisher)
        done.update(forward=0, backward=0)
        _, info = solver.solve(*at, c.theta, diagnose=False)
        assert done == {"forward": 1, "backward": probes} and info.gradients == (1 + probes) / 2


def test_three_draws_are_three_probes():
    c, solver = case("weights"), bl.KFAC(DAMPING, samples=3)
    solver.solve(problem_of(c), c.lam, c.theta, c.batch, c.theta)
    assert solver.last_cost == 2


# ---------------------------------------------------------------- threads


def test_threads_on_models_that_share_an_encoder():
    """Each has a model and a solver of its own; torch's call with other parameters is no one's."""
    encoder, norm = built(lambda: (nn.Linear(20, 30), nn.LayerNorm(30)))
    g = torch.Generator().manual_seed(0)
    x, y, lam = torch.randn(100, 20, generator=g), torch.arange(100) % 4, torch.rand(100)
    batch = x, y, torch.arange(100)
    cases = []
    for k in range(3):
        model = nn.Sequential(encoder, norm, nn.Tanh(), built(lambda: nn.Linear(30, 4)))
        risk = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]], l2=L2)
        cases.append((bl.BilevelProblem(risk, risk), (1 + 0.1 * k) * bl.flatten(model)))

    def compute(problem, theta):
        return bl.hypergradient(problem, lam, theta, batch, batch, bl.KFAC(DAMPING, "exact"))

    truths, wrong = [compute(*one) for one in cases], []

    def work(one, truth):
        try:
            wrong.extend(e for e in (error(compute(*one), truth) for _ in range(15)) if e > 1e-12)
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, truths, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
