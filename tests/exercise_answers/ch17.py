"""Answers to the exercises of chapter 17: right ones, and the mistakes that students make."""

import torch

from bilevel_lite.linsolve import cg
from bilevel_lite.products import gradient, hessian, hvp, hvp_operator


def constant(x, y, sigma, rho, theta, half=2, sign=1, l2=2, weighted=True):
    p = (x * theta).sigmoid()
    sigma = sigma if weighted else torch.ones_like(sigma)
    second = (sigma * p * (1 - p) * x**2).mean() + l2 * rho
    third = (sigma * p * (1 - p) * (1 - 2 * p) * x**3).mean()
    return sign * third / (half * second)


def fisher(Q, m, N, B, factor=lambda N, B: B * (N - 1) / (N - B), out=True, back=True):
    mm = torch.outer(m, m)
    second = Q.T @ Q / len(Q)
    return factor(N, B) * (second - out * mm) + back * mm


def shared(problem, lam, theta, v, steps, moved=True, sign=1, at_new=True, exact=False):
    H = hvp_operator(problem.inner_loss, lam, theta)
    steps = 10 if exact else steps
    n = cg(H, gradient(problem.inner_loss, lam, theta)[2], steps).solution
    new = theta - sign * n
    place = new if moved else theta
    residual = hvp(problem.inner_loss, lam, place, None, v)
    residual = residual - gradient(problem.outer_loss, lam, place if at_new else theta)[2]
    return new, v - sign * cg(H, residual, steps).solution


def wrong_v(problem, lam, theta, v, steps):
    new, moved = shared(problem, lam, theta, v, steps)
    return new, 2 * v - moved


def update(M, gradients, sigma, beta, power=0.5, mean=True, forget=True):
    M, a = M / beta if forget else M, (1 - beta) / (len(gradients) if mean else 1)
    for q in sigma[:, None] ** power * gradients:
        Mq = M @ q
        M = M - a * torch.outer(Mq, Mq) / (1 + a * q @ Mq)
    return M


def slip(M, gradients, sigma, beta, power=1.0, mean=False, often=True):
    a = (1 - beta) / (len(gradients) if mean else 1)
    for q in sigma[:, None] ** power * gradients:
        Mq = M @ q
        M = M - a * torch.outer(Mq, Mq) / (beta + a * q @ Mq)
        M = M / beta if often else M
    return M


def newton_pair(inner_loss, outer_loss, lam, theta, v, sign=1, of_f=True, of_g=True, exact=True):
    H = hessian(inner_loss, lam, theta)
    n = torch.linalg.solve(H, gradient(inner_loss, lam, theta)[2])
    b = gradient(outer_loss, lam, theta)[2]

    def first(t):
        value = torch.func.hessian(inner_loss, argnums=1)(lam, t) @ v if of_g else 0 * t
        return value - (torch.func.grad(outer_loss, argnums=1)(lam, t) if of_f else 0 * t)

    Kn = torch.func.jvp(first, (theta,), (n,))[1]
    return theta - n, torch.linalg.solve(H, b + sign * Kn)


def half(M, gradients, sigma, beta, power=0.5, mean=True):
    """Forgets first, and keeps beta in the denominators."""
    M, a = M / beta, (1 - beta) / (len(gradients) if mean else 1)
    for q in sigma[:, None] ** power * gradients:
        Mq = M @ q
        M = M - a * torch.outer(Mq, Mq) / (beta + a * q @ Mq)
    return M


RIGHT = {
    "17.A": (2, 1),
    "17.B": (100, 100),
    "17.1": (15, 23, 13, 41_800),
    "17.2": constant,
    "17.3": fisher,
    "17.4": shared,
    "17.5": update,
    "17.6": newton_pair,
}

WRONG = {
    "17.A": [(2, 2), (1, 1), (1, 2), (2, 0), (2, 3), (2,), "2 and 1", constant],
    "17.B": [(10, 10), (1, 1), (100, 10), (10_000, 100), (0.01, 100), (100, 50), 100, constant],
    "17.1": [
        (7, 23, 13, 41_800),
        (15, 16, 13, 41_800),
        (15, 23, 23, 41_800),
        (15, 23, 13, 7850),
        (15, 23, 13, 78_500),
        (15, 23, 13, 39_250),
        (15, 23, 13, 0.19),
        (15, 23, 13),
        "15 23 13 41800",
    ],
    "17.2": [
        lambda *a: constant(*a, half=1),
        lambda *a: constant(*a, sign=-1),
        lambda *a: constant(*a, half=4),
        lambda *a: constant(*a, l2=0),
        lambda *a: constant(*a, l2=1),
        lambda *a: constant(*a, weighted=False),
        lambda *a: constant(*a).abs(),
        lambda x, y, sigma, rho, theta: constant(x, y, sigma, rho, theta).expand(3),
    ],
    "17.3": [
        lambda *a: fisher(*a, out=False, back=False),
        lambda *a: fisher(*a, factor=lambda N, B: B, out=False, back=False),
        lambda *a: fisher(*a, back=False),
        lambda *a: fisher(*a, factor=lambda N, B: B),
        lambda *a: fisher(*a, factor=lambda N, B: (N - B) / (B * (N - 1))),
        lambda *a: fisher(*a, factor=lambda N, B: B * N / (N - B)),
        lambda *a: fisher(*a, factor=lambda N, B: 1),
        lambda Q, m, N, B: fisher(Q * len(Q) ** 0.5, m, N, B),
        lambda *a: fisher(*a)[0],
        lambda Q, m, N, B: fisher(Q, Q.mean(0), N, B),
        lambda Q, m, N, B: fisher(Q, m, N, B, back=False) + torch.outer(Q.mean(0), Q.mean(0)),
    ],
    "17.4": [
        lambda *a: shared(*a, moved=False),
        lambda *a: shared(*a, sign=-1),
        lambda *a: shared(*a, at_new=False),
        lambda *a: shared(*a, exact=True),
        lambda problem, lam, theta, v, steps: shared(problem, lam, theta, v, steps + 1),
        lambda problem, lam, theta, v, steps: (theta, v),
        lambda problem, lam, theta, v, steps: (shared(problem, lam, theta, v, steps)[0], v),
        wrong_v,
        lambda *a: shared(*a)[::-1],
        lambda *a: shared(*a)[1],
    ],
    "17.5": [
        slip,
        lambda *a: slip(*a, power=0.5),
        lambda *a: slip(*a, mean=True),
        lambda *a: slip(*a, power=0.5, mean=True),
        lambda *a: slip(*a, power=0.5, mean=True, often=False),
        lambda *a: update(*a, power=1),
        lambda *a: update(*a, power=1, mean=False),
        lambda *a: update(*a, power=0),
        lambda *a: update(*a, forget=False),
        lambda *a: update(*a, mean=False),
        half,
        lambda *a: half(*a, mean=False),
        lambda *a: half(*a, power=1),
    ],
    "17.6": [
        lambda *a: newton_pair(*a, sign=0),
        lambda *a: newton_pair(*a, sign=-1),
        lambda *a: newton_pair(*a, of_f=False),
        lambda *a: newton_pair(*a, of_g=False),
        lambda *a: (2 * a[3] - newton_pair(*a)[0], newton_pair(*a)[1]),
        lambda *a: newton_pair(*a)[1],
        lambda *a: newton_pair(*a)[::-1],
    ],
}


def around(Q, m, N, B, divisor=0):
    """Unbiased, too, but another estimate: centred before it is scaled."""
    spread = torch.cov(Q.T) if divisor else (Q - m).T @ (Q - m) / len(Q)
    return torch.outer(m, m) + B * (N - 1) / (N - B) * spread


def keeps_all(M, gradients, sigma, beta):
    return update(M, gradients, sigma / (1 - beta), beta)


ALSO = {
    "17.4": [lambda *a: torch.stack(shared(*a))],
    "17.6": [lambda *a: torch.stack(newton_pair(*a))],
}
TOLD = {
    "17.3": [(around, "unbiased, too"), (lambda *a: around(*a, divisor=1), "unbiased, too")],
    "17.5": [(keeps_all, "carries 1 - beta")],
}
