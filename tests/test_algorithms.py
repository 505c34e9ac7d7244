"""The fourteen methods against dense algebra, closed forms, theory and each other."""

import inspect
import itertools
import math
import warnings
from functools import partial

import pytest
import torch
from test_aid import Quadratic
from torch.autograd.functional import hessian as autograd_hessian

import bilevel_lite as bl
from bilevel_lite import algorithms, data
from bilevel_lite.algorithms.nhgd import rank_one_inverse
from bilevel_lite.algorithms.sama import adaptation
from bilevel_lite.kfac import kfac_factors
from bilevel_lite.refuse import NotFinite

# ------------------------------------------------------------------ problems and dense truths


def draws(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=g) for shape in shapes]


def rows(seed, n):
    """A batch (x, y) of n examples with three inputs."""
    return tuple(draws(seed, (n, 3), (n,)))


A, B, C, D = rows(1, 4), rows(2, 8), rows(3, 6), rows(4, 2)  # inner, outer, curvature, cross
LAM, THETA = torch.tensor([0.3, -0.4]), torch.tensor([0.5, -0.2, 0.7])
ETA, GAMMA = 0.1, 0.05


def curved_g(lam, theta, batch):
    """Not quadratic; lam enters twice with theta and once alone, so that g_lam is not J."""
    x, y = batch
    fit = torch.log(torch.cosh(x @ theta - y * torch.sin(lam[0]))).mean()
    return fit + 0.5 * (lam.exp() * theta[:2].square()).sum() + theta[2] ** 2 + lam[1] ** 2


def curved_f(lam, theta, batch):
    """With a direct term, and lam and theta coupled."""
    x, y = batch
    return 0.5 * (x @ theta - y).square().mean() + 0.3 * lam.square().sum() + lam[0] * theta[1] ** 2


CURVED = bl.BilevelProblem(curved_g, curved_f)


class At:
    """All derivatives of a loss at a point, from torch's own dense Hessian of (lam, theta)."""

    def __init__(self, loss, lam, theta, batch=None):
        k, point = len(lam), torch.cat([lam, theta]).requires_grad_()

        def joint(z):
            return loss(z[:k], z[k:], batch)

        self.value = joint(point).detach()
        (slope,) = torch.autograd.grad(joint(point), point)
        second = autograd_hessian(joint, point.detach())
        self.lam, self.theta = slope[:k], slope[k:]
        self.h, self.j = second[k:, k:], second[:k, k:]


def g_at(lam, theta, batch=A):
    return At(curved_g, lam, theta, batch)


def f_at(lam, theta, batch=B):
    return At(curved_f, lam, theta, batch)


def close(got, expected, rtol=1e-10):
    gap = float((got - expected).norm()) / max(float(expected.norm()), 1e-300)
    assert gap < rtol, f"relative error {gap:.2e}, allowed {rtol:.0e}"


class Cycle:
    """A sampler that goes round a list of batches; its place is its state."""

    def __init__(self, batches):
        self.batches, self.place = batches, 0

    def draw(self):
        self.place += 1
        return self.batches[(self.place - 1) % len(self.batches)]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


# ------------------------------------------------------------------ three iterations by hand
#
# Each function gives (lam, theta) after three iterations as the docstring's equations say, with
# dense matrices. What it shares with the package is the problem.

ROLES = {"inner_batch": A, "outer_batch": B}
SYSTEM = {"curvature_batch": C, "cross_batch": D}
RATES = {"inner_lr": ETA, "outer_lr": GAMMA}
INNER = 2  # inner steps


def descend(lam, theta, steps=INNER):
    for _ in range(steps):
        theta = theta - ETA * g_at(lam, theta).theta
    return theta


def by_hand_aid(lam, theta):
    for _ in range(3):
        theta = descend(lam, theta)
        f = f_at(lam, theta)
        v = torch.linalg.solve(g_at(lam, theta, C).h, f.theta)
        lam = lam - GAMMA * (f.lam - g_at(lam, theta, D).j @ v)
    return lam, theta


def by_hand_itd(lam, theta, truncate=4):
    for _ in range(3):
        last = lam.clone().requires_grad_()
        inner = theta
        for t in range(4):
            if t <= 4 - truncate:
                inner = inner.detach()
            inner = inner.requires_grad_()
            (slope,) = torch.autograd.grad(curved_g(last, inner, A), inner, create_graph=True)
            inner = inner - ETA * slope
        (h,) = torch.autograd.grad(curved_f(last, inner, B), last)
        lam, theta = lam - GAMMA * h, inner.detach()
    return lam, theta


def by_hand_amigo(lam, theta):
    v = torch.zeros(3)
    for _ in range(3):
        theta = descend(lam, theta)
        f, h = f_at(lam, theta), g_at(lam, theta, C).h
        for _ in range(3):
            v = v - 0.2 * (h @ v - f.theta)
        lam = lam - GAMMA * (f.lam - g_at(lam, theta, D).j @ v)
    return lam, theta


def by_hand_stocbio(lam, theta):
    for _ in range(3):
        theta = descend(lam, theta)
        f, m = f_at(lam, theta), torch.eye(3) - 0.2 * g_at(lam, theta, C).h
        v = 0.2 * (f.theta + m @ f.theta + m @ m @ f.theta + m @ m @ m @ f.theta)
        lam = lam - GAMMA * (f.lam - g_at(lam, theta, D).j @ v)
    return lam, theta


def by_hand_mrbo(lam, theta, inner_memory=0.6, outer_memory=0.3, decay=0.0):
    """Batches change from step to step, and the two points of a difference share them."""
    d = e = before = None
    eta = [(decay / (decay + k)) ** (1 / 3) if decay else 1.0 for k in range(3)]
    for k in range(3):
        inner, outer = (A, C)[k % 2], (B, D)[k % 2]

        def both(lam, theta, inner=inner, outer=outer):
            g, f = g_at(lam, theta, inner), f_at(lam, theta, outer)
            return g.theta, f.lam - g.j @ torch.linalg.solve(g.h, f.theta)

        new_d, new_e = both(lam, theta)
        if k:
            old_d, old_e = both(*before)
            new_d = new_d + (1 - (1 - inner_memory) * eta[k - 1] ** 2) * (d - old_d)
            new_e = new_e + (1 - (1 - outer_memory) * eta[k - 1] ** 2) * (e - old_e)
        before, d, e = (lam, theta), new_d, new_e
        lam, theta = lam - eta[k] * GAMMA * e, theta - eta[k] * ETA * d
    return lam, theta


def by_hand_soba(lam, theta):
    v = torch.zeros(3)
    for _ in range(3):
        g, f = g_at(lam, theta), f_at(lam, theta)
        theta, v, lam = (
            theta - ETA * g.theta,
            v - 0.2 * (g.h @ v - f.theta),
            lam - GAMMA * (f.lam - g.j @ v),
        )
    return lam, theta


def by_hand_nbo(lam, theta, solve, warm_up=0, curvature=C, cross=D):
    """``solve(H, r)`` is the approximate H^-1 r."""
    v = torch.zeros(3)
    for _ in range(warm_up):
        theta = theta - 0.2 * g_at(lam, theta).theta
    for _ in range(3):
        h = g_at(lam, theta, curvature).h
        n, w = solve(h, g_at(lam, theta).theta), solve(h, h @ v - f_at(lam, theta).theta)
        theta, v = theta - n, v - w
        lam = lam - GAMMA * (f_at(lam, theta).lam - g_at(lam, theta, cross).j @ v)
    return lam, theta


def three_steps(h, r):
    """Three gradient steps of 0.2 on the quadratic 1/2 x H x - r x, from zero."""
    x = torch.zeros_like(r)
    for _ in range(3):
        x = x - 0.2 * (h @ x - r)
    return x


def by_hand_nhgd(lam, theta, beta=0.9, scale=4.0):
    fisher, t = 2.0 * torch.eye(3), 1
    for _ in range(3):
        for _ in range(INNER):
            q, t = g_at(lam, theta).theta, t + 1
            keep = (t - 1) / t if beta is None else beta
            fisher = keep * fisher + (1 - keep) * scale * torch.outer(q, q)
            theta = theta - ETA * q
        f = f_at(lam, theta)
        lam = lam - GAMMA * (f.lam - g_at(lam, theta, D).j @ torch.linalg.solve(fisher, f.theta))
    return lam, theta


def by_hand_sama(lam, theta):
    for _ in range(3):
        theta = descend(lam, theta)
        f = f_at(lam, theta)
        v = ETA * f.theta
        eps = 0.5 / v.norm()
        jv = (g_at(lam, theta + eps * v).lam - g_at(lam, theta - eps * v).lam) / (2 * eps)
        lam = lam - GAMMA * (f.lam - jv)
    return lam, theta


def by_hand_bsg1(lam, theta):
    for _ in range(3):
        theta = descend(lam, theta)
        g, f = g_at(lam, theta), f_at(lam, theta)
        lam = lam - GAMMA * (f.lam - (f.theta @ g.theta) / (g.theta @ g.theta + 0.01) * g.lam)
    return lam, theta


def by_hand_bome(lam, theta, barrier, eta=0.7):
    for _ in range(3):
        there = theta
        for _ in range(3):
            there = there - 0.3 * g_at(lam, there).theta
        here, best, f = g_at(lam, theta), g_at(lam, there), f_at(lam, theta)
        q = torch.cat([here.lam - best.lam, here.theta])
        slope = torch.cat([f.lam, f.theta])
        phi = eta * (q @ q if barrier == "squared" else here.value - best.value)
        move = slope + max(float((phi - slope @ q) / (q @ q)), 0.0) * q
        lam, theta = lam - GAMMA * move[:2], theta - ETA * move[2:]
    return lam, theta


def by_hand_bvfsm(lam, theta, mu=0.2, nu=0.3, slack=2.0, decay=0.5):
    z = theta
    for k in range(3):
        mu_k, nu_k, slack_k = (value / (1 + k) ** decay for value in (mu, nu, slack))
        for _ in range(INNER):
            z = z - ETA * (g_at(lam, z).theta + 2 * mu_k * z)
        best = g_at(lam, z)
        level = best.value + mu_k * z @ z + slack_k
        for _ in range(INNER):
            g = g_at(lam, theta)
            theta = theta - ETA * (f_at(lam, theta).theta + nu_k / (level - g.value) * g.theta)
        g = g_at(lam, theta)
        h = f_at(lam, theta).lam + nu_k / (level - g.value) * (g.lam - best.lam)
        lam = lam - GAMMA * h
    return lam, theta


def by_hand_f2sa(lam, theta, penalty=3.0, growth=0.5):
    z = theta
    for k in range(3):
        c = penalty + k * growth
        for _ in range(INNER):
            z = z - ETA * g_at(lam, z).theta
            theta = theta - ETA / c * (f_at(lam, theta).theta + c * g_at(lam, theta).theta)
        h = f_at(lam, theta).lam + c * (g_at(lam, theta).lam - g_at(lam, z).lam)
        lam = lam - GAMMA * h
    return lam, theta


def make(method, *args, lam=LAM, theta=THETA, problem=CURVED, **options):
    """A method on the curved problem with fixed batches of its own for each role that it has."""
    given = {**ROLES, **RATES, **{f"{role}_batch": {"curvature": C, "cross": D}[role]
                                  for role in method.roles[2:]}}  # fmt: skip
    if method is bl.SABA:
        given = RATES
    return method(problem, lam, theta, *args, **{**given, **options})


def mrbo(**options):
    inner, outer = Cycle([A, C]), Cycle([B, D])
    shared = {"inner_batch": inner, "outer_batch": outer, "curvature_batch": None,
              "cross_batch": None}  # fmt: skip
    return make(bl.MRBO, bl.Direct(), **shared, **options)


def one(batch):
    return [batch]


MEMORY = {"inner_memory": 0.6, "outer_memory": 0.3}
NBO = {"inner_lr": 1.0, "linear_lr": 0.2}
BY_HAND = {
    "AID": (lambda: make(bl.AID, bl.Direct(), INNER), by_hand_aid),
    "ITD": (lambda: make(bl.ITD, 4), by_hand_itd),
    "ITD forward": (lambda: make(bl.ITD, 4, mode="forward"), by_hand_itd),
    "ITD truncated": (
        lambda: make(bl.ITD, 4, truncate=2),
        lambda *at: by_hand_itd(*at, truncate=2),
    ),
    "AmIGO": (lambda: make(bl.AmIGO, INNER, 3, 0.2), by_hand_amigo),
    "StocBiO": (lambda: make(bl.StocBiO, INNER, 4, 0.2), by_hand_stocbio),
    "MRBO": (lambda: mrbo(**MEMORY), by_hand_mrbo),
    "MRBO decay": (
        lambda: mrbo(decay=2.0, **MEMORY),
        lambda *at: by_hand_mrbo(*at, decay=2.0),
    ),
    "MRBO memory 0": (
        lambda: mrbo(inner_memory=0.0, outer_memory=0.0),
        lambda *at: by_hand_mrbo(*at, inner_memory=0.0, outer_memory=0.0),
    ),
    "SOBA": (lambda: make(bl.SOBA, 0.2), by_hand_soba),
    "SABA": (lambda: make(bl.SABA, 0.2, one(A), one(B), torch.Generator()), by_hand_soba),
    "NBO gd": (
        lambda: make(bl.NBO, "gd", 2, **NBO),
        lambda *at: by_hand_nbo(*at, solve=three_steps),
    ),
    "NBO gd, one batch": (
        lambda: make(bl.NBO, "gd", 2, curvature_batch=None, cross_batch=None, **NBO),
        lambda *at: by_hand_nbo(*at, solve=three_steps, curvature=A, cross=A),
    ),
    "NBO sgd": (
        lambda: make(bl.NBO, "sgd", 2, warm_up=2, **NBO),
        lambda *at: by_hand_nbo(*at, solve=three_steps, warm_up=2),
    ),
    "NBO cg": (
        lambda: make(bl.NBO, "cg", 2, inner_lr=None),
        lambda *at: by_hand_nbo(*at, solve=torch.linalg.solve),
    ),
    "NHGD": (lambda: make(bl.NHGD, INNER, 0.9, 2.0), by_hand_nhgd),
    "NHGD plain scale": (
        lambda: make(bl.NHGD, INNER, 0.9, 2.0, "plain"),
        lambda *at: by_hand_nhgd(*at, scale=1.0),
    ),
    "NHGD average": (
        lambda: make(bl.NHGD, INNER, None, 2.0),
        lambda *at: by_hand_nhgd(*at, beta=None),
    ),
    "SAMA": (lambda: make(bl.SAMA, INNER, 0.5), by_hand_sama),
    "BSG1": (lambda: make(bl.BSG1, INNER, 0.01), by_hand_bsg1),
    "BOME": (
        lambda: make(bl.BOME, 3, 0.3, 0.7),
        lambda *at: by_hand_bome(*at, barrier="squared"),
    ),
    "BOME gap": (
        lambda: make(bl.BOME, 3, 0.3, 0.7, "gap"),
        lambda *at: by_hand_bome(*at, barrier="gap"),
    ),
    "BVFSM": (lambda: make(bl.BVFSM, INNER, 0.2, 0.3, 2.0), by_hand_bvfsm),
    "F2SA": (lambda: make(bl.F2SA, INNER, 3.0, 0.5), by_hand_f2sa),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_three_iterations_equal_the_equations_written_out(name):
    build, by_hand = BY_HAND[name]
    method = build()
    for _ in range(3):
        info = method.step()
    lam, theta = by_hand(LAM, THETA)
    close(method.lam, lam)
    close(method.theta, theta)
    assert info.iteration == 3 and info.hypergradient.shape == lam.shape
    assert torch.equal(LAM, torch.tensor([0.3, -0.4]))  # the caller's tensors are not touched
    assert torch.equal(THETA, torch.tensor([0.5, -0.2, 0.7]))


def test_every_method_is_written_out():
    named = {name.split()[0] for name in BY_HAND}
    assert named == set(algorithms.METHODS)


# ------------------------------------------------------------------ the optimum

NEVER = 1e-300  # a step size that moves nothing


def isotropic(curvature=2.0):
    """`Quadratic` with A = curvature times I: one gradient step solves the inner problem."""
    q = Quadratic()
    q.a = curvature * torch.eye(6)
    m = q.b / curvature
    q.outer_hessian = m.T @ m + torch.eye(3)
    q.lam = torch.linalg.solve(q.outer_hessian, m.T @ q.c)
    q.outer_lr = 1 / float(torch.linalg.eigvalsh(q.outer_hessian)[-1])
    q.lr = 1 / curvature
    return q


def on(q, method, *args, slower=1.0, **options):
    """A method on a quadratic, from zero."""
    given = {"inner_lr": q.lr, "outer_lr": slower * q.outer_lr, **options}
    return method(q.problem, torch.zeros(3), torch.zeros(6), *args, **given)


def distance(q, method, steps):
    """Relative distance of lam from the closed-form optimum after ``steps`` iterations."""
    for _ in range(steps):
        method.step()
    return float((method.lam - q.lam).norm() / q.lam.norm())


@pytest.mark.parametrize(
    ("build", "steps", "tolerance"),
    [
        (lambda q: on(q, bl.AmIGO, 10, 10, q.lr), 100, 1e-10),
        (lambda q: on(q, bl.MRBO, bl.CG(6), 0.5, 0.5), 250, 1e-8),
        (lambda q: on(q, bl.SOBA, q.lr, slower=0.3), 700, 1e-6),
        (lambda q: on(q, bl.SABA, q.lr, [None], [None], torch.Generator(), slower=0.3), 700, 1e-6),
        (lambda q: on(q, bl.NBO, "gd", 1, q.lr, slower=0.3, inner_lr=None), 250, 1e-6),
        (lambda q: on(q, bl.NBO, "sgd", 1, q.lr, slower=0.3, inner_lr=None), 250, 1e-6),
        (lambda q: on(q, bl.NBO, "cg", 5, slower=0.7, inner_lr=None), 120, 1e-10),
        # what T unrolled steps or terms leave out is (1 - lr mu)^T: here below 2e-5
        (lambda q: on(q, bl.ITD, 60), 60, 2e-5),
        (lambda q: on(q, bl.StocBiO, 10, 60, q.lr), 60, 2e-5),
    ],
)  # fmt: skip
def test_it_reaches_the_closed_form_optimum(build, steps, tolerance):
    q = Quadratic()
    assert distance(q, build(q), steps) < tolerance


def test_sama_and_nhgd_reach_it_where_their_matrix_is_the_hessian_and_only_there():
    q = isotropic()
    assert distance(q, on(q, bl.SAMA, 1), 80) < 1e-9  # D = lr = 1 / curvature
    q = Quadratic()
    assert distance(q, on(q, bl.SAMA, 30), 80) > 0.1
    # NHGD that never updates (one step from the solution, beta ~ 1) keeps F = initial I
    q = isotropic()
    assert distance(q, on(q, bl.NHGD, 1, 1 - 1e-9, 2.0), 80) < 1e-7
    assert distance(q, on(q, bl.NHGD, 1, 1 - 1e-9, 1.0), 80) > 0.1


def test_f2sa_bias_is_the_penaltys_closed_form_and_halves_as_it_doubles():
    q, lam = Quadratic(), torch.ones(3)
    best = torch.linalg.solve(q.a, q.b @ lam)
    exact = bl.hypergradient(q.problem, lam, best)
    bias = []
    for c in (50.0, 100.0, 200.0):
        method = bl.F2SA(
            q.problem, lam, torch.zeros(6), 150, c, 0.0, inner_lr=q.lr * c / (c + 1), outer_lr=NEVER
        )
        h = method.step().hypergradient
        theta = torch.linalg.solve(torch.eye(6) + c * q.a, q.c + c * q.b @ lam)
        close(h, lam - c * q.b.T @ (theta - best), 1e-8)
        bias.append(float((h - exact).norm() / exact.norm()))
    assert bias[0] / bias[1] == pytest.approx(2, rel=0.05)
    assert bias[1] / bias[2] == pytest.approx(2, rel=0.05)
    assert 0.001 < bias[2] < 0.02
    growing = on(q, bl.F2SA, 10, 10.0, 10.0)
    assert distance(q, growing, 60) < 1e-3
    assert growing.penalty == 10 + 60 * 10


@pytest.mark.parametrize("barrier", ["squared", "gap"])
def test_bome_ends_at_a_distance_in_proportion_to_its_steps(barrier):
    q, errors = isotropic(), []
    for s in (0.5, 0.25, 0.125):
        method = on(q, bl.BOME, 1, q.lr, 0.5, barrier, inner_lr=s * q.lr, slower=s)
        errors.append(distance(q, method, round(30 / s)))
    assert 0.02 < errors[2] < 0.05
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def barrier_truth(q, lam, nu, slack):
    """BVFSM's direction at convergence, from the one scalar equation that is left.

    Where f_theta + m g_theta = 0 with m = nu / gap, theta is (I + m A)^-1 (c + m B lam), and m
    solves m (slack - (g(theta) - min g)) = nu.
    """
    best = torch.linalg.solve(q.a, q.b @ lam)

    def theta(m):
        return torch.linalg.solve(torch.eye(6) + m * q.a, q.c + m * q.b @ lam)

    def excess(m):
        d = theta(m) - best
        return m * (slack - float(0.5 * d @ q.a @ d)) - nu

    low, high = 0.0, 1.0
    while excess(high) < 0:
        high *= 2
    for _ in range(60):
        m = (low + high) / 2
        low, high = (m, high) if excess(m) < 0 else (low, m)
    return lam - m * q.b.T @ (theta(m) - best), theta(m)


@pytest.mark.parametrize(("nu", "slack"), [(0.1, 0.1), (0.01, 0.1), (0.1, 0.01), (1e-3, 1e-3)])
def test_bvfsm_at_convergence_is_the_barriers_closed_form(nu, slack):
    q = Quadratic()
    method = bl.BVFSM(
        q.problem, torch.ones(3), torch.zeros(6), 60, 0.0, nu, slack, 0.0,
        inner_lr=q.lr, outer_lr=1e-30,
    )  # fmt: skip
    for _ in range(15):
        info = method.step()
    h, theta = barrier_truth(q, torch.ones(3), nu, slack)
    close(method.theta, theta, 1e-5)
    close(info.hypergradient, h, 1e-4)


def test_bvfsm_bias_shrinks_as_the_square_root_of_nu_and_slack():
    q = Quadratic()
    exact = bl.hypergradient(q.problem, torch.ones(3), torch.linalg.solve(q.a, q.b.sum(1)))
    bias = [
        float((barrier_truth(q, torch.ones(3), s, s)[0] - exact).norm())
        for s in (1e-4, 1e-4 / 4, 1e-4 / 16)
    ]
    assert bias[0] / bias[1] == pytest.approx(2, rel=0.1)
    assert bias[1] / bias[2] == pytest.approx(2, rel=0.1)
    errors = [distance(q, on(q, bl.BVFSM, 15, 0.0, s, s, 0.0), 40) for s in (0.1, 0.025)]
    assert errors[1] < 0.65 * errors[0]
    assert distance(q, on(q, bl.BVFSM, 15, 0.0, 0.1, 0.1, 0.5), 80) < 0.5 * errors[0]


def test_bvfsm_keeps_the_gap_open_and_the_barrier_falling_whatever_the_step():
    levels = []

    class Watched(bl.BVFSM):
        def _descend(self, level, nu, lr, inner, outer):
            before = self._barrier(level, nu, self.theta, inner, outer)
            out = super()._descend(level, nu, lr, inner, outer)
            levels.append((before, self._barrier(level, nu, self.theta, inner, outer)))
            return out

    method = make(Watched, 5, 0.0, 1e-3, 1e-3, inner_lr=0.4, outer_lr=0.5)
    for _ in range(10):
        method.step()
    assert len(levels) == 50
    assert all(after < before < math.inf for before, after in levels)


# ------------------------------------------------------------------ rates


def test_nbo_error_is_squared_at_each_step_with_the_constant_of_newtons_method():
    # one inner variable: e_{k+1} / e_k^2 -> g''' / (2 g'')
    def g(lam, t, _):
        return (t.exp() - 2 * t + 0.5 * lam * t.square()).sum()

    problem = bl.BilevelProblem(g, lambda lam, t, _: (t + lam).square().sum())
    lam, root = torch.tensor([0.5]), torch.tensor([0.5])
    for _ in range(50):
        root = root - (root.exp() - 2 + 0.5 * root) / (root.exp() + 0.5)
    method = bl.NBO(problem, lam, root + 0.5, "cg", 0, outer_lr=NEVER)
    errors = [0.5]
    for _ in range(4):
        method.step()
        errors.append(float((method.theta - root).abs()))
    constant = float(root.exp() / (2 * (root.exp() + 0.5)))
    assert errors[3] / errors[2] ** 2 == pytest.approx(constant, rel=0.02)
    assert errors[3] < 1e-4 and errors[4] < 1e-8


@pytest.mark.parametrize(
    ("build", "power"),
    [
        (lambda q: on(q, bl.AID, bl.Identity(1.0), 3, outer_lr=NEVER), 3),
        (lambda q: on(q, bl.AmIGO, 3, 1, 0.1, outer_lr=NEVER), 3),
        (lambda q: on(q, bl.SOBA, 0.1, outer_lr=NEVER), 1),
        (lambda q: on(q, bl.BSG1, 3, outer_lr=NEVER), 3),
        (lambda q: on(q, bl.NBO, "gd", 2, q.lr, inner_lr=1.0, outer_lr=NEVER), 3),
    ],
)
def test_the_inner_error_contracts_as_gradient_descent_says(build, power):
    q = Quadratic()
    method = build(q)
    method.lam.fill_(1.0)
    for _ in range(4):
        method.step()
    best = torch.linalg.solve(q.a, q.b.sum(1))
    m = torch.linalg.matrix_power(torch.eye(6) - q.lr * q.a, 4 * power)
    close(method.theta - best, m @ -best)


@pytest.mark.parametrize(
    ("method", "args", "power"), [(bl.AmIGO, (1, 3, 0.2), 3), (bl.SOBA, (0.2,), 1)]
)
def test_the_warm_started_system_contracts_too(method, args, power):
    q = Quadratic()
    linear = bl.BilevelProblem(q.problem.inner_loss, lambda lam, t, _: q.c @ t + lam.sum())
    start = linear, torch.zeros(3), torch.zeros(6)
    run = method(*start, *args, inner_lr=q.lr, outer_lr=NEVER)
    for _ in range(5):
        run.step()
    v = torch.linalg.solve(q.a, q.c)
    m = torch.linalg.matrix_power(torch.eye(6) - 0.2 * q.a, 5 * power)
    close(run.v - v, m @ -v)


def test_the_outer_error_contracts_as_gradient_descent_on_phi():
    q = isotropic()
    method = on(q, bl.AID, bl.Direct(), 1, slower=0.5)
    for _ in range(6):
        method.step()
    m = torch.linalg.matrix_power(torch.eye(3) - 0.5 * q.outer_lr * q.outer_hessian, 6)
    close(method.lam - q.lam, m @ -q.lam)


# ------------------------------------------------------------------ special cases


def same_path(one, other, steps=3, rtol=1e-11):
    for _ in range(steps):
        one.step()
        other.step()
    close(one.lam, other.lam, rtol)
    close(one.theta, other.theta, rtol)


def test_nbo_without_further_steps_moves_theta_and_v_as_soba():
    nbo = make(bl.NBO, "gd", 0, 0.2, inner_lr=1.0, curvature_batch=A, cross_batch=A)
    soba = make(bl.SOBA, 0.2, inner_lr=0.2)
    nbo.v, soba.v = torch.tensor([0.3, 0.1, -0.5]), torch.tensor([0.3, 0.1, -0.5])
    nbo.step()
    soba.step()
    close(nbo.theta, soba.theta)
    close(nbo.v, soba.v)
    assert float((nbo.lam - soba.lam).norm()) > 1e-4  # lam sees the new theta and v, not the old


def test_amigo_with_a_solved_system_is_aid():
    same_path(make(bl.AmIGO, INNER, 300, 0.2), make(bl.AID, bl.Direct(), INNER))


def test_stocbio_on_one_batch_is_aid_with_a_neumann_series():
    same_path(make(bl.StocBiO, INNER, 5, 0.2), make(bl.AID, bl.Neumann(5, 0.2), INNER))


def test_saba_with_one_batch_is_soba():
    saba = make(bl.SABA, 0.2, one(A), one(B), torch.Generator())
    same_path(saba, make(bl.SOBA, 0.2), 5, 1e-13)


def test_unrolling_one_step_is_the_identity_solver_and_many_steps_are_implicit():
    q = Quadratic()
    one_step = on(q, bl.ITD, 1, outer_lr=0.01)
    same_path(one_step, on(q, bl.AID, bl.Identity(q.lr), 1, outer_lr=0.01), 20)
    method = make(bl.ITD, 400)
    h = method.step().hypergradient
    exact = f_at(LAM, method.theta).lam - g_at(LAM, method.theta).j @ torch.linalg.solve(
        g_at(LAM, method.theta).h, f_at(LAM, method.theta).theta
    )
    close(h, exact, 1e-8)


@pytest.mark.parametrize("name", BY_HAND)
def test_momentum_zero_is_plain(name):
    plain, other = BY_HAND[name][0](), BY_HAND[name][0]()
    lr = plain.inner_optimizer.param_groups[0]["lr"]
    other.inner_optimizer = torch.optim.SGD([other.theta], lr, momentum=0.0)
    other.outer_optimizer = torch.optim.SGD([other.lam], GAMMA, momentum=0.0)
    same_path(plain, other, 2, NEVER)


def test_bsg1_is_exact_for_one_inner_variable_and_a_squared_residual():
    def g(lam, t, _):
        return 0.5 * (1.7 * t - torch.sin(lam).sum() - lam[0] * lam[1]).square().sum()

    def f(lam, t, _):
        return (t.square() * lam.exp().sum()).sum() + lam.square().sum()

    problem, rates = bl.BilevelProblem(g, f), {"inner_lr": 0.1, "outer_lr": 0.1}
    h = bl.BSG1(problem, LAM, torch.tensor([2.0]), 2, 0.0, **rates).step().hypergradient
    method = bl.AID(problem, LAM, torch.tensor([2.0]), bl.Direct(), 2, **rates)
    close(h, method.step().hypergradient)
    two = bl.BilevelProblem(
        lambda lam, t, b: g(lam, t[:1], b) + 0.5 * (t[1] - lam[0]).square(),
        lambda lam, t, b: f(lam, t[:1], b) + t[1] ** 2,
    )
    theta = torch.tensor([2.0, 1.0])
    h = bl.BSG1(two, LAM, theta, 2, 0.0, **rates).step().hypergradient
    exact = bl.AID(two, LAM, theta, bl.Direct(), 2, **rates).step().hypergradient
    assert float((h - exact).norm() / exact.norm()) > 0.1


@pytest.mark.parametrize("barrier", ["squared", "gap"])
@pytest.mark.parametrize("sign", [1, -1])
def test_bome_multiplier_is_the_least_that_closes_the_gap(barrier, sign):
    """<grad f + c grad q, grad q> = phi where c > 0, and above phi with c = 0 elsewhere."""
    f = curved_g if sign > 0 else (lambda *at: -curved_g(*at))  # falls with the gap, or against it
    problem = bl.BilevelProblem(curved_g, lambda lam, t, b: 5 * f(lam, t, A))
    method = make(bl.BOME, 3, 0.3, 0.7, barrier, problem=problem)
    info = method.step()
    there = THETA
    for _ in range(3):
        there = there - 0.3 * g_at(LAM, there).theta
    here, best = g_at(LAM, THETA), g_at(LAM, there)
    q_lam, q_theta = here.lam - best.lam, here.theta
    square = q_lam @ q_lam + q_theta @ q_theta
    phi = 0.7 * (square if barrier == "squared" else here.value - best.value)
    moved = (THETA - method.theta) / ETA
    along = float(info.hypergradient @ q_lam + moved @ q_theta)
    if sign > 0:
        assert float(method.multiplier) == 0 and along > float(phi)
    else:
        assert float(method.multiplier) > 0.5 and along == pytest.approx(float(phi))


# ------------------------------------------------------------------ stochastic methods


class Script:
    """A sampler that gives the batches of a list, in order."""

    def __init__(self, batches):
        self.batches = list(batches)

    def draw(self):
        return self.batches.pop(0)


def test_stocbio_is_unbiased_for_the_series_with_the_mean_hessian():
    population = [A, C, D]
    mean = torch.zeros(2)
    for pair in itertools.product(population, repeat=2):
        method = make(bl.StocBiO, 1, 3, 0.2, curvature_batch=Script(pair), cross_batch=C)
        mean += method.step().hypergradient / 9
    theta = descend(LAM, THETA, 1)
    f = f_at(LAM, theta)
    m = torch.eye(3) - 0.2 * sum(g_at(LAM, theta, batch).h for batch in population) / 3
    v = 0.2 * (f.theta + m @ f.theta + m @ m @ f.theta)
    close(mean, f.lam - g_at(LAM, theta, C).j @ v)
    one_batch = sum(  # the same batch in both factors is biased: E[H^2] is not E[H]^2
        make(bl.StocBiO, 1, 3, 0.2, curvature_batch=b, cross_batch=C).step().hypergradient
        for b in population
    )
    assert float((one_batch / 3 - mean).norm() / mean.norm()) > 1e-4


class FiniteSum(Quadratic):
    """`Quadratic` whose A, B and c are the means of four batches' own."""

    def __init__(self):
        super().__init__()
        noise = [0.3 * e for e in draws(5, (4, 6, 6), (4, 6, 3), (4, 6))]
        e_a, e_b, e_c = (e - e.mean(0) for e in noise)
        self.inner = list(zip(self.a + e_a + e_a.transpose(1, 2), self.b + e_b, strict=True))
        self.outer = [(c,) for c in self.c + e_c]
        self.problem = bl.BilevelProblem(
            lambda lam, t, m: 0.5 * t @ m[0] @ t - t @ m[1] @ lam,
            lambda lam, t, m: 0.5 * (t - m[0]).square().sum() + 0.5 * lam.square().sum(),
        )


class Randomly:
    """A sampler with replacement."""

    def __init__(self, batches, seed):
        self.batches, self.generator = batches, torch.Generator().manual_seed(seed)

    def draw(self):
        return self.batches[int(torch.randint(len(self.batches), (1,), generator=self.generator))]


def test_saba_converges_linearly_with_constant_steps_where_soba_stalls():
    q = FiniteSum()
    rates = {"slower": 0.2, "inner_lr": 0.4 * q.lr}
    saba = on(q, bl.SABA, 0.4 * q.lr, q.inner, q.outer, torch.Generator().manual_seed(0), **rates)
    errors = [distance(q, saba, 300) for _ in range(3)]
    assert errors[1] < 0.2 * errors[0] and errors[2] < 0.2 * errors[1] < 1e-3
    samplers = {"inner_batch": Randomly(q.inner, 0), "outer_batch": Randomly(q.outer, 1)}
    soba = on(q, bl.SOBA, 0.4 * q.lr, **rates, **samplers)
    assert distance(q, soba, 500) > 100 * errors[2]


def test_sabas_estimates_are_unbiased_with_stale_tables(monkeypatch):
    inner, outer = [A, rows(7, 4), rows(8, 4)], [B, rows(9, 8)]
    saba = make(bl.SABA, 0.2, inner, outer, torch.Generator().manual_seed(3))
    for _ in range(4):
        saba.step()  # the tables' rows are now of different ages
    state = saba.state_dict()
    lam, theta, v = saba.lam.clone(), saba.theta.clone(), saba.v.clone()
    means, seen = [0.0, 0.0, 0.0], []
    for i, j in itertools.product(range(3), range(2)):
        saba.load_state_dict(state)
        picks = iter((i, j))
        monkeypatch.setattr(torch, "randint", lambda *_, picks=picks, **__: next(picks))
        info = saba.step()
        seen.append(info.hypergradient)
        moves = (theta - saba.theta) / ETA, (v - saba.v) / 0.2, info.hypergradient
        means = [mean + move / 6 for mean, move in zip(means, moves, strict=True)]
    g = [g_at(lam, theta, batch) for batch in inner]
    f = [f_at(lam, theta, batch) for batch in outer]
    b = sum(one.theta for one in f) / 2
    close(means[0], sum(one.theta for one in g) / 3)
    close(means[1], sum(one.h @ v for one in g) / 3 - b)
    close(means[2], sum(one.lam for one in f) / 2 - sum(one.j @ v for one in g) / 3)
    assert float((seen[0] - means[2]).norm()) > 1e-3  # one draw alone is not the mean


def test_mrbo_kfac_makes_the_same_draws_at_both_points_and_fresh_ones_at_the_next_step():
    task = Supervised()
    method = task.make(bl.MRBO, bl.KFAC(fisher="mc"), inner_lr=NEVER, outer_lr=NEVER, fixed=True)
    found, prepare = [], method.solver.prepare

    def watched(*args, **options):
        at = prepare(*args, **options)
        solve = at.solve
        at.solve = lambda *args: found.append(solve(*args)) or found[-1]
        return at

    method.solver.prepare = watched
    for _ in range(3):
        method.step()
    v = [out[0] for out in found]
    assert len(v) == 5  # one point, then twice two; lam and theta do not move
    # the same operations in the same order, as the draws are the same
    assert torch.equal(v[1], v[2]) and torch.equal(v[3], v[4])
    assert not torch.equal(v[0], v[2]) and not torch.equal(v[2], v[4])


def test_rank_one_update_of_the_inverse():
    root, q = draws(0, (4, 4), (4,))
    f = root @ root.T + torch.eye(4)
    got = rank_one_inverse(torch.linalg.inv(f), q, 0.8, 3.0)
    close(got, torch.linalg.inv(0.8 * f + 3.0 * torch.outer(q, q)))


def gaussian(n, batch_size, noise=1.0):
    """Linear regression that is well specified for noise 1, at the true theta; lam is idle."""
    x, e = draws(11, (n, 3), (n,))
    x = x @ torch.diag(torch.tensor([1.0, 0.5, 2.0]))
    y = x @ THETA + noise * e

    def g(lam, t, b):
        return 0.5 * (b[0] @ t - b[1]).square().mean() + 0.0 * lam.sum() * t.sum()

    problem = bl.BilevelProblem(g, lambda lam, t, b: t.sum())
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return problem, x, y, Cycle(list(batches))


def fisher_of(n, batch_size, noise=1.0, **options):
    problem, x, _, sampler = gaussian(n, batch_size, noise)
    steps = len(sampler.batches)
    method = bl.NHGD(problem, LAM, THETA, steps, None, 1.0, inner_lr=NEVER, outer_lr=NEVER,
                     inner_batch=sampler, cross_batch=sampler.batches[0], **options)  # fmt: skip
    method.step()
    fisher = torch.linalg.inv(method.m) * (steps + 1) / steps - torch.eye(3) / steps
    return fisher, x.T @ x / n


def test_nhgds_fisher_approaches_the_hessian_of_a_well_specified_model_only():
    # one entry's standard error: sqrt(3 H_ii H_jj / steps) at most; 2000 steps, so 3.9 %
    fisher, h = fisher_of(20_000, 10)
    size = h.diag().sqrt()
    off = ((fisher - h) / size / size[:, None]).abs().max()
    assert float(off) < 4 * math.sqrt(3 / 2000)
    # noise of variance 4 under a model that says 1: F is four times the Hessian
    fisher, h = fisher_of(20_000, 10, noise=2.0)
    off = ((fisher - 4 * h) / size / size[:, None] / 4).abs().max()
    assert float(off) < 4 * math.sqrt(3 / 2000)
    fisher, h = fisher_of(20_000, 10, scale="plain")  # B = 10 times too small
    off = ((10 * fisher - h) / size / size[:, None]).abs().max()
    assert float(off) < 4 * math.sqrt(3 / 2000)


def test_batch_times_mean_gradient_squared_is_the_fisher_where_the_full_gradient_vanishes():
    """What scale = B rests on; all pairs of five examples, drawn with replacement."""
    problem, x, y, _ = gaussian(5, 1)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    pairs = [torch.tensor(pair) for pair in itertools.product(range(5), repeat=2)]
    sampler = Cycle([(x[pair], y[pair]) for pair in pairs])
    method = bl.NHGD(problem, LAM, best, 25, None, 1.0, inner_lr=NEVER, outer_lr=NEVER,
                     inner_batch=sampler, cross_batch=(x, y))  # fmt: skip
    method.step()
    each = x * (x @ best - y)[:, None]
    close(torch.linalg.inv(method.m), (torch.eye(3) + 25 * each.T @ each / 5) / 26)


# ------------------------------------------------------------------ SAMA's matrix

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.3),
    "SGD, decay": lambda p: torch.optim.SGD(p, 0.3, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9),
    "dampening": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, dampening=0.4),
    "Nesterov": lambda p: torch.optim.SGD(p, 0.3, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.3, (0.8, 0.95), 0.01),
    "Adam, decay": lambda p: torch.optim.Adam(p, 0.3, (0.8, 0.95), 0.01, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.3, (0.8, 0.95), 0.01, weight_decay=0.1),
    "Adam, default": lambda p: torch.optim.Adam(p, 0.3),
}
if "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters:
    OPTIMIZERS["Adam, decoupled"] = lambda p: torch.optim.Adam(
        p, 0.3, (0.8, 0.95), 0.01, weight_decay=0.1, decoupled_weight_decay=True
    )


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_samas_matrix_is_a_finite_difference_of_the_optimisers_update(name, steps):
    (grads,) = draws(2, (steps + 1, 3))

    def run(last):
        theta = THETA.clone()
        optimizer = OPTIMIZERS[name]([theta])
        for grad in grads[:-1]:
            theta.grad = grad.clone()
            optimizer.step()
        d = adaptation(optimizer, theta, last)
        before, theta.grad = theta.clone(), last.clone()
        optimizer.step()
        return d, before - theta

    eps = 1e-5
    slope = (run(grads[-1] + eps)[1] - run(grads[-1] - eps)[1]) / (2 * eps)
    d = run(grads[-1])[0]
    if name == "Adam, default" and steps == 0:  # u = lr sign(grad), but for eps = 1e-8
        slope = 0.3 * 1e-8 / (grads[-1].abs() + 1e-8).square()
    close(d, slope, 1e-6)


def test_samas_matrix_keeps_its_digits_in_float32_and_is_zero_where_no_gradient_was():
    theta = torch.zeros(2, dtype=torch.float32)
    grad = torch.tensor([0.3, 0.0], dtype=torch.float32)
    d = adaptation(torch.optim.Adam([theta], 0.1), theta, grad)
    assert float(d[0]) == pytest.approx(0.1 * 1e-8 / 0.3**2, rel=1e-4) and float(d[1]) == 0


def test_sama_takes_the_matrix_of_the_last_inner_step_alone(monkeypatch):
    seen, real = [], adaptation

    def spied(optimizer, theta, grad):
        seen.append(int(optimizer.state[theta]["step"]))
        return real(optimizer, theta, grad)

    monkeypatch.setattr("bilevel_lite.algorithms.sama.adaptation", spied)
    method = make(bl.SAMA, 3, inner_optimizer=lambda p: torch.optim.Adam(p, 0.02))
    method.step(), method.step()
    assert seen == [2, 5]  # the steps taken before it


def test_sama_uses_the_optimisers_own_matrix_and_a_short_difference():
    method = make(bl.SAMA, 3, 1e-3, inner_optimizer=lambda p: torch.optim.Adam(p, 0.02))
    theta = THETA.clone()
    adam = torch.optim.Adam([theta], 0.02)
    for _ in range(3):
        theta.grad = g_at(LAM, theta).theta
        d = adaptation(adam, theta, theta.grad)
        adam.step()
    f = f_at(LAM, theta)
    close(method.step().hypergradient, f.lam - g_at(LAM, theta).j @ (d * f.theta), 1e-6)


# ------------------------------------------------------------------ KFAC inside


class Supervised:
    """Weighted examples on a linear classifier, with a sampler for each role."""

    def __init__(self, seed=0):
        self.x, self.y = draws(1, (40, 3))[0], torch.arange(40) % 2
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = torch.nn.Linear(3, 2).double()
        risk = bl.WeightedRisk(self.model, weight=lambda lam, b: lam[b[2]], l2=0.1)
        self.problem = bl.BilevelProblem(risk, bl.WeightedRisk(self.model))
        self.lam, self.theta, self.seed = torch.full((40,), 0.5), bl.flatten(self.model), seed

    def batches(self, salt, size=8):
        generator = torch.Generator().manual_seed(10 * self.seed + salt)
        return data.Batches(self.x, self.y, size, generator, 2)

    def make(self, method, *args, fixed=False, **options):
        sizes = {"inner": 8, "outer": 8, "curvature": 16, "cross": 4}
        given = {"inner_lr": 0.1, "outer_lr": 0.05}
        for salt, role in enumerate(method.roles, start=1):
            sampler = self.batches(salt, sizes[role])
            given[f"{role}_batch"] = sampler.all() if fixed else sampler
        return method(self.problem, self.lam, self.theta, *args, **{**given, **options})

    def hessian(self, lam, theta):
        batch = (self.x, self.y, torch.arange(40))
        return autograd_hessian(lambda t: self.problem.inner_loss(lam, t, batch), theta)


def test_amigo_with_kfac_in_the_place_of_the_system_is_aid_with_kfac():
    task = Supervised()
    amigo = task.make(bl.AmIGO, 3, kfac=bl.KFAC(0.1, seed=4), reading="replace")
    aid = task.make(bl.AID, bl.KFAC(0.1, seed=4), 3)
    other_draws = task.make(bl.AID, bl.KFAC(0.1, seed=5), 3)
    same_path(amigo, aid, 4)
    other_draws.step()
    assert not torch.equal(other_draws.lam, aid.lam)


def test_amigo_preconditioned_by_fixed_factors_solves_the_true_system():
    task = Supervised()
    kfac = bl.KFAC(0.01, "exact", every=1000)
    method = task.make(
        bl.AmIGO, 1, 20, 0.5, kfac, fixed=True, inner_lr=NEVER, outer_lr=NEVER, outer_batch=(
            task.x[:9], task.y[:9], torch.arange(9))
    )  # fmt: skip
    for _ in range(4):
        method.step()
    b = At(task.problem.outer_loss, task.lam[:0], task.theta, (task.x[:9], task.y[:9])).theta
    truth = torch.linalg.solve(task.hessian(task.lam, task.theta), b)
    close(method.v, truth, 1e-8)
    first = task.make(bl.AmIGO, 1, 1, 1.0, bl.KFAC(0.01, "exact"), fixed=True)
    first.step()
    truth = torch.linalg.solve(task.hessian(task.lam, first.theta), b)
    assert float((first.v - truth).norm() / truth.norm()) > 1e-3


def test_nhgd_kfac_is_the_running_average_of_the_inner_steps_factors():
    task = Supervised()
    method = task.make(bl.NHGD, 2, kfac=bl.KFAC(0.05, "empirical", ema=0.7))
    sampler, outer, cross = task.batches(1), task.batches(2), task.batches(3, 4)
    lam, theta, kept = task.lam, task.theta, None
    for _ in range(3):
        for _ in range(2):
            batch = sampler.draw()
            risk = task.problem.inner_loss
            (new,) = kfac_factors(risk, lam, theta, batch, "empirical").values()
            kept = new if kept is None else [0.7 * f + 0.3 * n for f, n in zip(kept, new)]  # noqa: B905
            theta = theta - 0.1 * At(risk, lam, theta, batch).theta
        b = At(task.problem.outer_loss, lam, theta, outer.draw()).theta
        a, g = kept
        pi = ((a.trace() / 4) / (g.trace() / 2)).sqrt()
        root = math.sqrt(0.05 + 2 * 0.1)
        v = torch.cat([b[:6].view(2, 3), b[6:, None]], 1)  # (W, bias)
        v = torch.linalg.inv(g + root / pi * torch.eye(2)) @ v
        v = v @ torch.linalg.inv(a + pi * root * torch.eye(4))
        v = torch.cat([v[:, :3].reshape(-1), v[:, 3]])
        lam = lam + 0.05 * At(risk, lam, theta, cross.draw()).j @ v
        method.step()
    close(method.lam, lam)
    close(method.theta, theta)


# ------------------------------------------------------------------ the protocol


def momentum(p):
    return torch.optim.SGD(p, 0.05, momentum=0.9)


def adam(p):
    return torch.optim.Adam(p, 0.02)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def halve(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


FREE = {"inner_optimizer": momentum, "outer_optimizer": adam, "inner_scheduler": cosine,
        "outer_scheduler": halve, "projection": lambda lam: lam.clamp(0, 1)}  # fmt: skip
PLAIN = {key: value for key, value in FREE.items() if key != "inner_optimizer"}


def saba(task, **options):
    inner, outer = ([task.batches(s).draw() for _ in range(4)] for s in (1, 2))
    generator = torch.Generator().manual_seed(task.seed)
    return bl.SABA(task.problem, task.lam, task.theta, 0.2, inner, outer, generator,
                   **{"inner_lr": 0.1, "outer_lr": 0.05, **options})  # fmt: skip


RUNS = {
    "AID": lambda t: t.make(bl.AID, bl.CG(2, warm_start=True), 2, **FREE),
    "AID kept KFAC": lambda t: t.make(bl.AID, bl.KFAC(0.1, ema=0.5, every=2), 2, **FREE),
    "ITD": lambda t: t.make(bl.ITD, 3, **PLAIN),
    "AmIGO": lambda t: t.make(bl.AmIGO, 2, 2, 0.2, **FREE),
    "AmIGO KFAC": lambda t: t.make(bl.AmIGO, 2, 2, 0.5, bl.KFAC(0.1, every=3), **FREE),
    "AmIGO replaced": lambda t: t.make(bl.AmIGO, 2, kfac=bl.KFAC(), reading="replace", **FREE),
    "StocBiO": lambda t: t.make(bl.StocBiO, 2, 3, 0.2, **FREE),
    "MRBO": lambda t: t.make(bl.MRBO, bl.Neumann(3, 0.2), decay=3.0, **FREE),
    "MRBO KFAC": lambda t: t.make(bl.MRBO, bl.KFAC(0.1), 0.5, 0.5, **PLAIN),
    "SOBA": lambda t: t.make(bl.SOBA, 0.2, **FREE),
    "SABA": lambda t: saba(t, **FREE),
    "NBO": lambda t: t.make(bl.NBO, "sgd", 2, 0.2, warm_up=2, **FREE),
    "NHGD": lambda t: t.make(bl.NHGD, 2, None, **FREE),
    "NHGD KFAC": lambda t: t.make(bl.NHGD, 2, kfac=bl.KFAC(0.1, "empirical", ema=0.8), **FREE),
    "SAMA": lambda t: t.make(bl.SAMA, 2, **{**FREE, "inner_optimizer": adam}),
    "BSG1": lambda t: t.make(bl.BSG1, 2, **FREE),
    "BOME": lambda t: t.make(bl.BOME, 2, **FREE),
    "BVFSM": lambda t: t.make(bl.BVFSM, 2, 0.01, **PLAIN),
    "F2SA": lambda t: t.make(bl.F2SA, 2, **PLAIN),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bit_equal(name, tmp_path):
    whole = RUNS[name](Supervised())
    with warnings.catch_warnings():
        # torch warns of schedules without optimiser steps
        warnings.simplefilter("error", UserWarning)
        for _ in range(3):
            whole.step()
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    kept = whole.state_dict()  # must not change with the run
    for _ in range(4):
        last = whole.step()
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert same(kept, loaded)
    for state in (loaded, kept):
        resumed = RUNS[name](Supervised(seed=0 if name == "SABA" else 7))
        if name == "SABA":
            resumed.generator.manual_seed(7)
        resumed.load_state_dict(state)
        for _ in range(4):
            again = resumed.step()
        assert same(whole.state_dict(), resumed.state_dict())
        assert torch.equal(last.hypergradient, again.hypergradient)
        assert (last.iteration, last.gradients) == (again.iteration, again.gradients) and last


def test_every_method_is_resumed():
    assert {name.split()[0] for name in RUNS} == set(algorithms.METHODS)


def same(one, other):
    """Equal to the last bit, whatever is nested in what.

    May be asked of copies, and of runs of the same operations in the same order on one processor.
    """
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# g on 4 rows is the unit, so that 8 rows of f count twice, 6 for H 1.5 times, 2 for J half
F, H, J = 2.0, 2 * 1.5, 2 * 0.5
COSTS = {
    "AID": (lambda: make(bl.AID, bl.CG(2, tol=0.0), 3), 3 + F + 2 * H + J),
    "ITD": (lambda: make(bl.ITD, 5), 5 + 5 * 2 + F + 0.5),
    "ITD truncated": (lambda: make(bl.ITD, 5, truncate=2), 5 + 2 * 2 + F + 0.5),
    "ITD forward": (lambda: make(bl.ITD, 5, mode="forward"), 5 * 2 * 2 + F + 0.5),
    "AmIGO": (lambda: make(bl.AmIGO, 3, 4, 0.2), 3 + F + 4 * H + J),
    "StocBiO": (lambda: make(bl.StocBiO, 3, 4, 0.2), 3 + F + 3 * H + J),
    "MRBO": (lambda: make(bl.MRBO, bl.Neumann(3, 0.2)), 2 * (1 + F + 2 * H + J)),
    "SOBA": (lambda: make(bl.SOBA, 0.2), 1 + F + 2),
    "SABA": (lambda: make(bl.SABA, 0.2, [A, A], [B, B, B], torch.Generator()), 1 + F + 2),
    "NBO gd": (lambda: make(bl.NBO, "gd", 2, 0.2), 1 + 2 * F + 5 * H + J),
    "NBO sgd": (lambda: make(bl.NBO, "sgd", 2, 0.2), 1 + 2 * F + 5 * H + J),
    "NBO cg": (lambda: make(bl.NBO, "cg", 1), 1 + 2 * F + 5 * H + J),
    "NHGD": (lambda: make(bl.NHGD, 3), 3 + F + J),
    "SAMA": (lambda: make(bl.SAMA, 3), 3 + F + 2),
    "BSG1": (lambda: make(bl.BSG1, 3), 3 + F + 1),
    "BOME": (lambda: make(bl.BOME, 3), 3 + 2 + F),
    # z, V, theta and g once more; f for each step and at the end; nothing is halved: 1 + 3 looks
    "BVFSM": (lambda: make(bl.BVFSM, 3, nu=0.3, slack=2.0),
              3 + 1 + 3 + 1 + 4 * F + 0.5 * 4 + 0.5 * 3 * F),
    "F2SA": (lambda: make(bl.F2SA, 3), 3 * (2 + F) + F + 2),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTS)
def test_costs_are_counted_as_the_docstring_says_in_units_of_the_inner_batch(name):
    build, expected = COSTS[name]
    method = build()
    first, second = method.step().gradients, method.step().gradients
    assert second - first == pytest.approx(expected)
    at_first = {"AmIGO": expected - H, "MRBO": expected / 2, "SABA": expected + 2 * 3 + 3 * F}
    if name.startswith("NBO"):
        at_first[name] = expected - H
    assert first == pytest.approx(at_first.get(name, expected))


def test_costs_with_a_kfac_and_after_resuming_with_batches_of_many_sizes():
    task = Supervised()
    risk_batch = (task.x[:8], task.y[:8], torch.arange(8))
    replaced = task.make(bl.AmIGO, 3, kfac=bl.KFAC(), reading="replace", inner_batch=risk_batch)
    assert replaced.step().gradients == 3 + 1 + 1 * (16 / 8) + 2 * (4 / 8)  # a build is a gradient
    kept = task.make(bl.AmIGO, 3, 4, 0.2, bl.KFAC(every=4), inner_batch=risk_batch)
    assert kept.step().gradients == 3 + 1 + (1 + 3 * 2) * (16 / 8) + 2 * (4 / 8)
    # with a memory each inner step's factors are built, without one only the last step's
    for memory, builds in ((0.5, 3), (0.0, 1)):
        kfac = bl.KFAC(fisher="empirical", ema=memory)
        nhgd = task.make(bl.NHGD, 3, kfac=kfac, inner_batch=risk_batch)
        assert nhgd.step().gradients == 3 + builds + 1 + 2 * (4 / 8)

    def uneven():
        return make(bl.AmIGO, 2, 2, 0.2, inner_batch=Cycle([A, C, D]), curvature_batch=None)

    whole, resumed = uneven(), uneven()
    whole.step()
    resumed.load_state_dict(whole.state_dict())
    assert len(resumed.batches["inner"].draw()[0]) == 6  # another size than the first, 4
    resumed.load_state_dict(whole.state_dict())
    assert resumed.step().gradients == whole.step().gradients


@pytest.mark.parametrize(
    ("method", "args", "count"),
    [
        (bl.AID, [bl.CG(2), 3], 3 + 1), (bl.ITD, [3], 3), (bl.AmIGO, [3, 4, 0.2], 3 + 4 + 1),
        (bl.StocBiO, [3, 4, 0.2], 3 + 3 + 1), (bl.MRBO, [bl.CG(2)], 1), (bl.SOBA, [0.2], 1),
        (bl.NBO, ["gd", 2, 0.2], 1), (bl.NBO, ["sgd", 2, 0.2], 1 + 2), (bl.NHGD, [3], 3 + 1),
        (bl.SAMA, [3], 3), (bl.BSG1, [3], 3 + 1), (bl.BOME, [3], 1), (bl.BVFSM, [3], 1),
        (bl.F2SA, [3], 3 + 1),
    ],
)  # fmt: skip
def test_inner_batches_drawn_in_a_step(method, args, count):
    sampler = Cycle([A])
    run = make(method, *args, inner_batch=sampler, **{f"{r}_batch": None for r in method.roles[2:]})
    run.step()
    assert sampler.place == count


EVERY_OPTIMIZER = [
    name
    for name in ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam",
                 "RAdam", "RMSprop", "Rprop", "SGD")
    if hasattr(torch.optim, name)
]  # fmt: skip


@pytest.mark.parametrize("name", EVERY_OPTIMIZER)
def test_any_torch_optimiser_and_schedule_moves_either_level(name):
    def optimizer(p):
        return getattr(torch.optim, name)(p, lr=0.05, **({} if name == "Rprop" else plain))

    plain = {"weight_decay": 0.0, **({"lambd": 0.0} if name == "ASGD" else {})}
    method = make(bl.AID, bl.Direct(), 2, inner_optimizer=optimizer, outer_optimizer=optimizer,
                  inner_scheduler=halve, outer_scheduler=cosine,
                  projection=lambda lam: lam.clamp(-0.39, 0.29))  # fmt: skip
    lam, theta = LAM.clone(), THETA.clone()
    by_hand = optimizer([theta]), optimizer([lam])
    schedules = halve(by_hand[0]), cosine(by_hand[1])
    for _ in range(4):
        info = method.step()
        for _ in range(2):
            theta.grad = g_at(lam, theta).theta
            by_hand[0].step()
        f = f_at(lam, theta)
        v = torch.linalg.solve(g_at(lam, theta, C).h, f.theta)
        lam.grad = f.lam - g_at(lam, theta, D).j @ v
        close(info.hypergradient, lam.grad, 1e-8)  # before the optimiser can have touched it
        by_hand[1].step()
        lam.clamp_(-0.39, 0.29)
        for schedule in schedules:
            schedule.step()
    close(method.lam, lam, 1e-8)
    close(method.theta, theta, 1e-8)
    assert float((method.lam - LAM).norm()) > 1e-4


EVERY = [bl.AID, bl.AmIGO, bl.BOME, bl.BSG1, bl.NBO, bl.NHGD, bl.SOBA, bl.StocBiO]
ARGUMENTS = {
    bl.AID: [bl.CG(2)], bl.NBO: ["gd", 2, 0.2], bl.SOBA: [0.2], bl.StocBiO: [2, 2, 0.2],
    bl.AmIGO: [2, 2, 0.2],
}  # fmt: skip


@pytest.mark.parametrize("kind", EVERY)
def test_an_inner_optimiser_with_a_penalty_of_its_own_is_refused(kind):
    """theta would solve another problem than the one whose H is taken; J v was off by 44 %."""
    made = partial(make, kind, *ARGUMENTS.get(kind, []))
    for wrong, told in (
        (lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.5), "has weight_decay=0.5, a penalty"),
        (lambda p: torch.optim.AdamW(p, 0.1), "has weight_decay=0.01, a penalty that g has not"),
        (lambda p: torch.optim.ASGD(p, 0.1), "has lambd=0.0001, a penalty that g has not"),
        (lambda p: torch.optim.SGD(p, 0.1, maximize=True), "has maximize=True, but theta min"),
    ):
        with pytest.raises(ValueError, match=f"inner_optimizer: {told}"):
            made(inner_optimizer=wrong)
    made(inner_optimizer=lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.0),
         outer_optimizer=lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.5))  # fmt: skip


@pytest.mark.parametrize(
    "name", [*(f"{at}_{what}" for at in ("inner", "outer") for what in ("optimizer", "scheduler")),
             "projection"],
)  # fmt: skip
def test_what_is_no_function_is_refused_at_once(name):
    with pytest.raises(TypeError, match=f"{name}: got int, expected a function"):
        make(bl.SOBA, 0.2, **{name: 5})


def test_a_schedule_that_watches_the_loss():
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)

    method = make(bl.SOBA, 0.2, outer_scheduler=plateau)
    for _ in range(2):
        method.step()  # no loss is good enough for that threshold
    assert method.outer_optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * GAMMA)


def test_projections_are_applied_after_each_step_and_need_no_derivative():
    rounded = make(
        bl.SOBA, 0.2, projection=torch.round, outer_lr=0.5, lam=torch.tensor([3.0, -2.0])
    )
    free = make(bl.SOBA, 0.2, outer_lr=0.5, lam=torch.tensor([3.0, -2.0]))
    free.step()
    rounded.step()
    assert torch.equal(rounded.lam, free.lam.round()) and not torch.equal(free.lam, rounded.lam)
    rounded.step()
    assert torch.equal(rounded.lam, rounded.lam.round())

    def in_place(lam):
        return lam.clamp_(0, 1)

    clamped = make(bl.SOBA, 0.2, projection=in_place)
    clamped.step()
    assert float(clamped.lam[1]) == 0 and float(clamped.lam[0]) > 0.1


@pytest.mark.parametrize("shape", [(), (1, 2)])
def test_lam_has_any_shape(shape):
    def g(lam, t, _):
        return (t - lam.sum()).square().sum() + 0.1 * t.square().sum()

    problem = bl.BilevelProblem(g, lambda lam, t, _: (t - 1).square().sum() + lam.square().sum())
    options = {"inner_lr": 0.1, "outer_lr": 0.01}
    lam = torch.full(shape, 0.3)
    for method, args in (
        (bl.AID, [bl.Direct()]), (bl.ITD, []), (bl.AmIGO, [2, 2, 0.1]), (bl.StocBiO, []),
        (bl.MRBO, [bl.Direct()]), (bl.SOBA, [0.1]), (bl.NBO, ["cg"]), (bl.NHGD, []),
        (bl.SABA, [0.1, [None], [None], torch.Generator()]), (bl.SAMA, []), (bl.BSG1, []),
        (bl.BOME, []), (bl.BVFSM, []), (bl.F2SA, []),
    ):  # fmt: skip
        run = method(problem, lam, torch.zeros(2), *args, **options)
        for _ in range(2):
            assert run.step().hypergradient.shape == shape
        assert run.lam.shape == shape and bool((run.lam != 0.3).all())


def test_the_table_has_a_full_row_for_every_method():
    rows = algorithms.table()
    assert [row[0] for row in rows] == list(algorithms.METHODS)
    assert len(rows) == len({row[0] for row in rows}) == 14
    for row in rows:
        assert len(row) == 5 and all(isinstance(entry, str) and entry for entry in row), row
        assert "(20" in row[4] and "\n" not in row[4], row  # a source with its year
    assert set(algorithms.__all__) == {row[0] for row in rows} | {"METHODS", "table"}
    assert {row[0] for row in rows} <= set(bl.__all__)


# ------------------------------------------------------------------ what goes wrong

STEEP = {
    "AID": lambda: make(bl.AID, bl.Neumann(2, 0.2), INNER, outer_lr=30.0),
    "ITD": lambda: make(bl.ITD, 3, outer_lr=30.0),
    "AmIGO": lambda: make(bl.AmIGO, INNER, 3, 0.2, outer_lr=30.0),
    "StocBiO": lambda: make(bl.StocBiO, INNER, 4, 0.2, outer_lr=30.0),
    "MRBO": lambda: make(bl.MRBO, bl.Neumann(2, 0.2), outer_lr=30.0),
    "SOBA": lambda: make(bl.SOBA, 0.2, outer_lr=30.0),
    "SABA": lambda: make(bl.SABA, 0.2, [A, rows(7, 4)], one(B), torch.Generator(), outer_lr=30.0),
    "NBO": lambda: make(bl.NBO, "gd", 1, 0.2, outer_lr=30.0),
    "NHGD": lambda: make(bl.NHGD, INNER, outer_lr=30.0),
    "SAMA": lambda: make(bl.SAMA, INNER, outer_lr=30.0, inner_optimizer=momentum),
    "BSG1": lambda: make(bl.BSG1, INNER, outer_lr=30.0),
    "BOME": lambda: make(bl.BOME, 3, outer_lr=30.0),
    "BVFSM": lambda: make(bl.BVFSM, 3, outer_lr=30.0),
    "F2SA": lambda: make(bl.F2SA, 3, outer_lr=30.0),
}


@pytest.mark.parametrize("name", STEEP)
def test_a_step_size_that_diverges_is_named_and_the_last_good_state_kept(name):
    method, good, value = STEEP[name](), None, None
    with pytest.raises(NotFinite) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.NegativeCurvatureWarning)
        warnings.simplefilter("ignore", bl.DivergenceWarning)
        for _ in range(300):
            good = method.state_dict()
            value = method.step().outer_loss
    text = str(caught.value)
    assert text.startswith(f"{name}, step {good['iteration'] + 1}")
    if good["iteration"]:
        assert f"(the outer loss was {float(value):.3g} one step before)" in text
    assert (
        f"try a smaller inner_lr (now {method.inner_optimizer.param_groups[0]['lr']:.3g})" in text
    )
    assert "outer_lr (now 30)" in text
    assert same(good, method.state_dict())
    assert bool(torch.isfinite(method.lam).all() & torch.isfinite(method.theta).all())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make(bl.SOBA, 50.0), r"linear_lr \(now 50\)"),
        (lambda: make(bl.AmIGO, 1, 40, 50.0), r"linear_lr \(now 50\)"),
        (lambda: make(bl.NBO, "gd", 40, 50.0), r"linear_lr \(now 50\)"),
        (lambda: make(bl.StocBiO, 1, 400, 50.0), r"linear_lr \(now 50\)"),
        (lambda: make(bl.BOME, 40, 50.0), r"copy_lr \(now 50\)"),
        (lambda: make(bl.AID, bl.Neumann(400, 50.0), 1), "step: 50.0 makes the Neumann series"),
        (lambda: make(bl.AID, bl.Direct(), 40, inner_lr=50.0), r"inner_lr \(now 50\)"),
    ],
)
def test_the_step_size_that_is_to_blame_is_among_those_named(build, words):
    method = build()
    with pytest.raises(NotFinite, match=words):
        for _ in range(400):
            method.step()


def test_a_run_goes_on_after_a_smaller_step():
    method = make(bl.AID, bl.Direct(), 40, inner_lr=50.0)
    with pytest.raises(NotFinite, match=r"AID, step 1, try a smaller inner_lr \(now 50\)"):
        method.step()
    assert torch.equal(method.lam, LAM) and torch.equal(method.theta, THETA)
    assert method.gradients == 0
    method.inner_optimizer.param_groups[0]["lr"] = ETA
    fresh = make(bl.AID, bl.Direct(), 40)
    same_path(method, fresh, 3, NEVER)


@pytest.mark.parametrize("name", ["AID kept KFAC", "SABA", "NHGD KFAC"])
def test_an_interrupted_step_changes_nothing(name):
    def interrupt(lam):
        raise KeyboardInterrupt

    method, resumed = RUNS[name](Supervised()), RUNS[name](Supervised())
    for _ in range(2):
        method.step()
    before, projection = method.state_dict(), method.projection
    method.projection = interrupt
    with pytest.raises(KeyboardInterrupt):
        method.step()
    assert same(before, method.state_dict())
    method.projection = projection
    resumed.load_state_dict(before)
    same_path(method, resumed, 3, NEVER)


def test_what_overflows_in_memory_is_seen_at_once():
    problem = bl.BilevelProblem(
        lambda lam, t, _: (t - lam).square().sum(), lambda lam, t, _: 1e200 * t.sum()
    )
    method = bl.SOBA(problem, torch.ones(2), torch.ones(2), 1e200, inner_lr=0.1, outer_lr=0.1)
    with pytest.raises(NotFinite, match=r"SOBA, step 1, .*: v: 2 of 2 entries are NaN or inf"):
        method.step()
    assert float(method.v.norm()) == 0


def test_bvfsm_says_when_the_slack_is_lost_in_rounding():
    method = make(bl.BVFSM, 2, 0.0, 0.1, 1e-20)
    with pytest.raises(ValueError, match="BVFSM, step 1, .*: slack: is lost in the rounding of g"):
        method.step()
    assert torch.equal(method.theta, THETA)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_nan_in_a_gradient_of_a_finite_loss(where):
    def cusp(lam, t, _):  # sqrt(0): the value is 0, the derivative infinite, times 0 is NaN
        return (t[:1] * 0).abs().sqrt().sum()

    def g(lam, t, b):
        return (t - lam).square().sum() + (cusp(lam, t, b) if where == "inner" else 0)

    def f(lam, t, b):
        return (t - 1).square().sum() + (cusp(lam, t, b) if where == "outer" else 0)

    problem = bl.BilevelProblem(g, f)
    rest = "theta: 1 of 2 entries are NaN or inf"
    for method, args, words in (
        (bl.SOBA, [0.1], rest),
        (bl.AmIGO, [1, 1, 0.1], f"gradient of {where}_loss in {rest}"),
        (bl.SAMA, [], f"gradient of {where}_loss in {rest}"),
        (bl.BOME, [], "NaN or inf"),
        (bl.ITD, [2], "NaN or inf"),
        (bl.F2SA, [2], "NaN or inf"),
    ):
        run = method(problem, torch.ones(2), torch.ones(2), *args, inner_lr=0.1, outer_lr=0.1)
        with pytest.raises(NotFinite, match=f"{method.__name__}, step 1, try a .*: .*{words}"):
            run.step()
        assert torch.equal(run.theta, torch.ones(2)) and torch.equal(run.lam, torch.ones(2))


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: make(bl.AID, "cg"), TypeError, "solver: got 'cg', expected a solver such as"),
        (lambda: make(bl.MRBO, None), TypeError, "solver: got None"),
        (lambda: make(bl.SOBA, 0.2, solver=bl.CG(2)), TypeError, "solver: SOBA takes none"),
        (lambda: make(bl.ITD, solver=bl.CG(2)), TypeError, "solver: ITD takes none .*unrolling"),
        (lambda: make(bl.AmIGO, kfac=bl.CG(2)), TypeError, "kfac: got CG.*expected a .*KFAC"),
        (lambda: make(bl.NHGD, kfac=bl.Direct()), TypeError, "kfac: got Direct"),
        (lambda: make(bl.AID, bl.CG(1), outer_rate=3), TypeError, "outer_rate: no argument of AID"),
        (lambda: make(bl.SOBA, 0.2, curvature_batch=C), ValueError, "curvature_batch: SOBA has no"),
        (lambda: make(bl.SAMA, cross_batch=C), ValueError, "cross_batch: SAMA has no use"),
        (lambda: make(bl.NHGD, curvature_batch=C), ValueError, "curvature_batch: NHGD has no use"),
        (lambda: make(bl.SABA, 0.1, [], [B], torch.Generator()), ValueError,
         "inner_batches: got an empty list, expected a list of batches"),
        (lambda: make(bl.SABA, 0.1, [A], B, torch.Generator()), ValueError,
         "outer_batches: got tuple, expected a list"),
        (lambda: make(bl.SABA, 0.1, [A, C], [B], torch.Generator()), ValueError,
         r"inner_batches: sizes are \[4, 6\], expected one size"),
        (lambda: make(bl.SABA, 0.1, [A], [B], torch.Generator(), inner_batch=A), ValueError,
         "inner_batch: SABA has no use for it"),
        (lambda: make(bl.SOBA, 0.0), ValueError, "linear_lr: got 0.0, expected a positive number"),
        (lambda: make(bl.AmIGO), ValueError, "linear_lr: got None, expected a positive number"),
        (lambda: make(bl.AmIGO, 0), ValueError, "inner_steps: got 0, expected an integer of at"),
        (lambda: make(bl.AmIGO, reading="both"), ValueError, "reading: got 'both', expected"),
        (lambda: make(bl.StocBiO, terms=0), ValueError, "terms: got 0"),
        (lambda: make(bl.MRBO, bl.CG(1), 1.0), ValueError, "inner_memory: got 1.0, expected a num"),
        (lambda: make(bl.MRBO, bl.CG(1), decay=-1), ValueError, "decay: got -1"),
        (lambda: make(bl.NBO, "newton"), ValueError, "solve: got 'newton', expected 'gd'"),
        (lambda: make(bl.NBO, "gd"), ValueError, "linear_lr: got None"),
        (lambda: make(bl.NBO, "cg", -1), ValueError, "steps: got -1, expected an integer of at"),
        (lambda: make(bl.NHGD, beta=1.0), ValueError, "beta: got 1.0, expected a number from 0"),
        (lambda: make(bl.NHGD, beta=0.0), ValueError, "beta: got 0.0, expected a positive"),
        (lambda: make(bl.NHGD, scale="B"), ValueError, "scale: got 'B'"),
        (lambda: make(bl.NHGD, theta=torch.zeros(20_001)), ValueError,
         "theta: has 20001 entries, so F would have as many rows; give kfac"),
        (lambda: make(bl.NHGD, theta=[0.0]), TypeError, "theta: got list"),
        (lambda: make(bl.SAMA, alpha=0.0), ValueError, "alpha: got 0.0"),
        (lambda: make(bl.SAMA, inner_optimizer=lambda p: torch.optim.Adagrad(p, 0.1)), ValueError,
         "SAMA knows the derivative of SGD, Adam and AdamW steps .*got Adagrad"),
        (lambda: make(bl.SAMA, inner_optimizer=lambda p: torch.optim.Adam(p, 0.1, amsgrad=True)),
         ValueError, "no amsgrad"),
        (lambda: make(bl.BSG1, floor=-1.0), ValueError, "floor: got -1.0"),
        (lambda: make(bl.BOME, barrier="log"), ValueError, "barrier: got 'log'"),
        (lambda: make(bl.BOME, eta=0.0), ValueError, "eta: got 0.0"),
        (lambda: make(bl.BVFSM, slack=0.0), ValueError, "slack: got 0.0"),
        (lambda: make(bl.BVFSM, decay=float("inf")), ValueError, "decay: got inf"),
        (lambda: make(bl.F2SA, penalty=0.0), ValueError, "penalty: got 0.0"),
        (lambda: make(bl.F2SA, growth=-1.0), ValueError, "growth: got -1.0"),
        (lambda: make(bl.ITD, truncate=0), ValueError, "truncate: got 0"),
        (lambda: make(bl.ITD, mode="both"), ValueError, "mode: got 'both'"),
        (lambda: make(bl.ITD, truncate=1, mode="forward"), ValueError, "truncate: got 1, but mode"),
        (lambda: make(bl.SOBA, 0.1, outer_lr=-1), ValueError, "outer_lr: got -1, expected a pos"),
        (lambda: make(bl.SOBA, 0.1, inner_optimizer=lambda p: 3), TypeError,
         "inner_optimizer: returned int, expected a torch.optim.Optimizer"),
        (lambda: make(bl.SOBA, 0.1, outer_optimizer=lambda p: torch.optim.SGD([THETA.clone()], 1)),
         ValueError, "outer_optimizer: the optimiser does not hold the lam it was given"),
        (lambda: make(bl.SOBA, 0.1, inner_optimizer=torch.optim.LBFGS), ValueError,
         "inner_optimizer: LBFGS evaluates the loss by itself"),
    ],
)  # fmt: skip
def test_bad_input(build, kind, message):
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.parametrize("method", [bl.ITD, bl.BVFSM, bl.F2SA])
def test_methods_of_plain_descent_refuse_an_inner_optimiser(method):
    with pytest.raises(
        ValueError, match=f"{method.__name__} is defined for plain gradient descent"
    ):
        make(method, inner_optimizer=momentum)


def test_a_solver_that_the_problem_cannot_serve_and_a_projection_to_another_shape():
    before = (LAM.clone(), THETA.clone())
    for method in (
        make(bl.AID, bl.KFAC()),
        make(bl.MRBO, bl.KFAC()),
        make(bl.NHGD, kfac=bl.KFAC(fisher="empirical")),
        make(bl.AmIGO, linear_lr=0.1, kfac=bl.KFAC()),
        make(bl.AID, bl.CG(2, curvature="ggn")),
    ):
        with pytest.raises(TypeError, match="WeightedRisk"):
            method.step()
        assert torch.equal(method.lam, before[0]) and torch.equal(method.theta, before[1])
    for projection, got in ((lambda lam: lam[:1], r"torch.Size\(\[1\]\)"), (print, "NoneType")):
        method = make(bl.SOBA, 0.2, projection=projection)
        with pytest.raises(ValueError, match=rf"projection: returned {got}, expected a tensor of"):
            method.step()
        assert torch.equal(method.lam, before[0]) and torch.equal(method.theta, before[1])


def test_states_that_are_of_something_else():
    def soba(**options):
        return make(bl.SOBA, 0.2, **options)

    state = soba().state_dict()
    for method, message in (
        (make(bl.AID, bl.CG(2)), "state: is of method 'SOBA', expected 'AID'"),
        (soba(theta=THETA.float(), lam=LAM), "theta has .*float64, expected torch.float32"),
        (soba(lam=torch.zeros(3)), r"lam has shape \(2,\), expected \(3,\)"),
        (soba(inner_optimizer=adam), "state: inner_optimizer was SGD, expected Adam"),
        (soba(outer_scheduler=halve), "state: outer_scheduler was None, expected StepLR"),
        (soba(inner_batch=Cycle([A])), "state: inner_batch was None, expected Cycle"),
    ):
        before = method.state_dict()
        with pytest.raises(ValueError, match=message):
            method.load_state_dict(state)
        assert same(before, method.state_dict())
    kfac = make(bl.AmIGO, linear_lr=0.1, kfac=bl.KFAC())
    with pytest.raises(ValueError, match="state: solver was None, expected KFAC"):
        kfac.load_state_dict(make(bl.AmIGO, linear_lr=0.1).state_dict())
    two = make(bl.SABA, 0.2, [A, A], [B], torch.Generator())
    with pytest.raises(
        ValueError, match=r"state: is of \[1, 1\] inner and outer batches, expected"
    ):
        two.load_state_dict(make(bl.SABA, 0.2, [A], [B], torch.Generator()).state_dict())


# ------------------------------------------------------------------ states


def run_on(samplers, optimizer=None):
    """AID on the curved problem with two samplers, of which one feeds g and H, J."""
    return bl.AID(
        CURVED, LAM, THETA, bl.CG(2, damping=0.1), 2, outer_lr=0.05,
        inner_batch=samplers[0], outer_batch=samplers[1],
        inner_optimizer=lambda p: torch.optim.SGD(p, 0.05, 0.9),
        outer_optimizer=optimizer or (lambda p: torch.optim.Adam(p, 0.05)),
    )  # fmt: skip


class Pairs(data.Batches):
    """Batches (x, y), without the index."""

    def draw(self):
        return super().draw()[:2]


def two_samplers(shared: bool):
    generators = [torch.Generator().manual_seed(k) for k in (5, 6)]
    x, y = rows(9, 40)
    return [Pairs(x, y, 8, generators[0 if shared else k]) for k in (0, 1)]


def test_a_state_can_be_loaded_more_than_once():
    method = run_on(two_samplers(False))
    for _ in range(3):
        method.step()
    state, ends = method.state_dict(), []
    for _ in range(3):
        method.load_state_dict(state)
        for _ in range(2):
            method.step()
        ends.append(method.lam.clone())
    # the same operations in the same order
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("shared", [False, True])
def test_samplers_with_one_generator_resume_exactly(shared):
    whole = run_on(two_samplers(shared))
    for _ in range(12):  # several passes of five batches
        whole.step()
    for cut in (1, 4, 7):
        first = run_on(two_samplers(shared))
        for _ in range(cut):
            first.step()
        second = run_on(two_samplers(shared))
        second.load_state_dict(first.state_dict())
        for _ in range(12 - cut):
            second.step()
        # the same operations in the same order
        assert torch.equal(second.lam, whole.lam) and torch.equal(second.theta, whole.theta)


def test_nhgd_inverts_at_every_iteration():
    with pytest.raises(ValueError, match="kfac: has every = 3"):
        bl.NHGD(CURVED, LAM, THETA, kfac=bl.KFAC(fisher="empirical", ema=0.9, every=3),
                inner_lr=0.1, outer_lr=0.1, inner_batch=A, outer_batch=B)  # fmt: skip


def test_the_reported_hypergradient_is_not_changed_by_nesterov():
    def nesterov(p):
        return torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=True)

    plain = run_on([A, B], lambda p: torch.optim.SGD(p, 0.05))
    other = run_on([A, B], nesterov)
    # the same operations in the same order until lam moves
    assert torch.equal(plain.step().hypergradient, other.step().hypergradient)


def test_a_batch_without_examples_or_without_rows():
    empty = tuple(part[:0] for part in A)
    with pytest.raises(ValueError, match="inner_batch: holds no examples"):
        run_on([empty, B]).step()
    square = bl.BilevelProblem(
        lambda lam, theta, batch: (theta - lam.sum() * batch[0]).square().sum(),
        lambda lam, theta, batch: (theta - batch[0]).square().sum(),
    )
    number = (torch.tensor(2.0),)  # a batch is whatever the losses take
    method = bl.AID(
        square, LAM, THETA, bl.CG(2), 2, inner_lr=0.1, outer_lr=0.1, inner_batch=number,
        outer_batch=number,
    )  # fmt: skip
    assert method.step().gradients == 2 + 1 + 2 + 2  # CG is done after one product


def test_nhgd_counts_the_rows_that_the_inputs_make():
    """F is the empirical Fisher of what the model sees: six rows, each twice, as the twelve."""
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(3)).double()
    y, model, found = x.sum(1, keepdim=True), torch.nn.Linear(2, 1).double(), []
    twice = (x.repeat(2, 1), y.repeat(2, 1))
    for batch, inputs in (
        (twice, None),
        ((x, y), lambda lam, b: tuple(part.repeat(2, 1) for part in b)),
    ):
        risk = bl.WeightedRisk(model, "mse", weight=lambda lam, b: lam.expand(12), inputs=inputs)
        problem = bl.BilevelProblem(risk, bl.WeightedRisk(model, "mse"))
        method = bl.NHGD(
            problem,
            torch.ones(1).double(),
            bl.flatten(model),
            inner_lr=0.1,
            outer_lr=0.1,
            inner_batch=batch,
            outer_batch=(x, y),
        )
        method.step()
        found.append(method.m)
    assert torch.allclose(*found, rtol=1e-12)


def test_bome_copies_with_the_present_rate():
    problem = bl.BilevelProblem(
        lambda lam, theta, _: ((theta - lam) ** 2).sum(), lambda lam, theta, _: (theta**2).sum()
    )
    ends = []
    for copy_lr in (None, 0.01):
        theta = torch.ones(2)
        method = bl.BOME(
            problem, torch.zeros(2), theta, inner_lr=0.1, outer_lr=0.1, copy_lr=copy_lr
        )
        method.inner_optimizer.param_groups[0]["lr"] = 0.01  # as a scheduler does
        method.step()
        ends.append(method.theta.clone())
    assert torch.equal(*ends)
