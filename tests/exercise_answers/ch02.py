"""Answers to the exercises of chapter 2: right ones, and the mistakes that students make."""

from math import ceil, inf, log

import torch

from bilevel_lite.products import gradient, update_vjp


def steps_needed(mu, L, lr, tol):
    rho = max(abs(1 - lr * mu), abs(1 - lr * L))
    if rho >= 1:
        return inf
    return 1 if rho == 0 else ceil(log(tol) / log(rho) - 1e-9)


def steps_small_end_only(mu, L, lr, tol):
    return ceil(log(tol) / log(abs(1 - lr * mu)))


def steps_rounded_down(mu, L, lr, tol):
    rho = max(abs(1 - lr * mu), abs(1 - lr * L))
    return int(log(tol) / log(rho)) if rho < 1 else inf


def steps_exponential(mu, L, lr, tol):
    return ceil(-log(tol) / (lr * mu)) if lr * L < 2 else inf


def steps_never_infinite(mu, L, lr, tol):
    rho = max(abs(1 - lr * mu), abs(1 - lr * L))
    return ceil(log(tol) / log(rho) - 1e-9) if rho < 1 else 10**6


def choose(d, m, T):
    return "forward" if m == 1 else "reverse", "forward" if m < T else "reverse"


def choose_swapped(d, m, T):
    return choose(d, m, T)[::-1]


def choose_by_m_below_t(d, m, T):
    return ("forward", "forward") if m < T else ("reverse", "reverse")


def choose_by_dimension(d, m, T):
    return "forward" if m < d else "reverse", "forward" if m < d else "reverse"


def recursion(fix, direct=True, sign=-1.0, shift=0, turned=False):
    """A reverse recursion with or without its faults."""

    def reverse(problem, lam, theta0, lrs):
        iterates = [theta0]
        for lr in lrs:
            iterates.append(iterates[-1] - lr * gradient(problem.inner_loss, lam, iterates[-1])[2])
        _, h, p = gradient(problem.outer_loss, lam, iterates[-1])
        h = h if direct else torch.zeros_like(h)
        lrs = lrs[::-1] if turned else lrs
        for t in reversed(range(len(lrs))):
            point = iterates[t + shift]
            jp, hp = update_vjp(problem.inner_loss, lam, point, None, p)
            if not fix:
                jp, _ = update_vjp(problem.inner_loss, lam, point, None, p - lrs[t] * hp)
            h, p = h + sign * lrs[t] * jp, p - lrs[t] * hp
        return h

    return reverse


def step_size_derivative(sign=-1.0, late=True, carry=True):
    def derivative(problem, lam, theta0, steps, lr):
        iterates, grads = [theta0], []
        for _ in range(steps):
            grads.append(gradient(problem.inner_loss, lam, iterates[-1])[2])
            iterates.append(iterates[-1] - lr * grads[-1])
        p, total = gradient(problem.outer_loss, lam, iterates[-1])[2], torch.zeros(())
        for t in reversed(range(steps)):
            before = p
            if carry:
                p = p - lr * update_vjp(problem.inner_loss, lam, iterates[t], None, p)[1]
            total = total + sign * (before if late else p) @ grads[t]
        return total

    return derivative


def heavy_ball(carry=True, collect=True, direct=True):
    def hypergradient(problem, lam, theta0, steps, lr, beta):
        iterates, u = [theta0], torch.zeros_like(theta0)
        for _ in range(steps):
            u = beta * u + gradient(problem.inner_loss, lam, iterates[-1])[2]
            iterates.append(iterates[-1] - lr * u)
        _, h, p = gradient(problem.outer_loss, lam, iterates[-1])
        h = h if direct else torch.zeros_like(h)
        q = torch.zeros_like(p)
        for t in reversed(range(steps)):
            q = (q if collect else 0) - lr * p
            jq, hq = update_vjp(problem.inner_loss, lam, iterates[t], None, q)
            h, p, q = h + jq, p + hq, beta * q if carry else q
        return h

    return hypergradient


RIGHT = {
    "2.A": (1.25, -0.125),
    "2.B": 22,
    "2.1": steps_needed,
    "2.2": choose,
    "2.3": recursion(fix=True),
    "2.4": step_size_derivative(),
    "2.5": heavy_ball(),
    "2.6": (1, 2, 2),
}

WRONG = {
    "2.A": [
        (0.75, -0.125),
        (1.25, 0.125),
        (1.25, -0.25),
        (1.25, -0.5),
        (1.25, -0.15625),
        (1.25, 0.0),
        (1.25, -5 / 24),
        (1.25, 3.0),
        (1.25,),
    ],
    "2.B": [10, 21, 21.85, 1, 9, 30, "many", (22, 23)],
    "2.1": [steps_small_end_only, steps_rounded_down, steps_exponential, steps_never_infinite],
    "2.2": [
        choose_swapped,
        choose_by_m_below_t,
        choose_by_dimension,
        lambda d, m, T: "forward",
        lambda d, m, T: (1, 2),
    ],
    "2.3": [
        recursion(fix=False),
        recursion(fix=True, direct=False),
        recursion(fix=True, sign=1.0),
        recursion(fix=True, shift=1),
        recursion(fix=True, turned=True),
    ],
    "2.4": [
        step_size_derivative(sign=1.0),
        step_size_derivative(late=False),
        step_size_derivative(carry=False),
        lambda problem, lam, theta0, steps, lr: 0.0,
        lambda *a: step_size_derivative()(*a) / a[3],
    ],
    "2.5": [
        heavy_ball(carry=False),
        heavy_ball(collect=False),
        heavy_ball(direct=False),
        lambda *a: heavy_ball()(*a[:-1], 0.0),
        lambda problem, lam, theta0, steps, lr, beta: torch.zeros_like(theta0),
    ],
    "2.6": [(1, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2), 2],
}
