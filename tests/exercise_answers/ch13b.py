"""Answers to the exercises of chapter 13b: right ones, and the mistakes that students make."""

import torch


def one_step(loss, lam, support, query, lr, variant=""):
    slope = torch.func.grad(loss)
    theta = lam - lr * slope(lam, support)
    b = slope(lam if variant == "early" else theta, query)
    at = theta if variant == "late" else lam
    batch = query if variant == "query" else support
    hb = torch.func.vjp(lambda t: slope(t, batch), at)[1](b)[0]
    if variant == "first":
        return b
    if variant == "plus":
        return b + lr * hb
    if variant == "lr":
        return b - hb
    return -lr * hb if variant == "alone" else b - lr * hb


def anchored(hvp, b, tau, iters, variant=""):
    shift = {"none": 0.0, "half": tau / 2}.get(variant, tau)
    v, r, p = torch.zeros_like(b), b, b
    for _ in range(iters + (variant == "more")):
        hp = hvp(p) + shift * p
        step = (r @ r) / (p @ hp)
        v, new = v + step * p, r - step * hp
        r, p = new, new + (new @ new) / (r @ r) * p
    return v if variant == "v" else -tau * v if variant == "sign" else tau * v


def exact(hvp, b, tau, iters):
    H = torch.stack([hvp(e) for e in torch.eye(len(b)).double()])
    return tau * torch.linalg.solve(H + tau * torch.eye(len(b)).double(), b)


def looking(hvp, b, tau, iters):
    """Right, but for vmap: it looks at a number."""
    h = anchored(hvp, b, tau, iters)
    return h if float(b.norm()) > 0 else b


def wasteful(hvp, b, tau, iters):
    for _ in range(5):
        hvp(b)
    return anchored(hvp, b, tau, iters)


def ends(A, c, lr, steps, variant=""):
    eye = torch.eye(c.shape[1]).double()
    steps += {"more": 1, "less": -1}.get(variant, 0)
    M = torch.linalg.matrix_power(eye - lr * A, steps)
    kinds = [M @ A @ M, A @ M, eye - M]
    if variant == "swapped":
        kinds = [kinds[1], kinds[0], kinds[2]]
    if variant == "joint":
        kinds[0] = A
    found = [torch.linalg.solve(K.sum(0), (K @ c[..., None]).sum(0)[:, 0]) for K in kinds]
    if variant == "mean":
        found[2] = c.mean(0)
    return found[:2] if variant == "two" else tuple(found)


def limits(A, c, q, lam, variant=""):
    mu, U = torch.linalg.eigh(A)
    flat = U[:, mu < 1e-9 * mu.max()]
    P = flat @ flat.T
    weak, strong = P @ (lam - q), lam - q
    if variant == "zero":
        weak = 0 * weak
    if variant == "at c":
        weak = P @ (c - q)
    if variant == "seen":
        weak = strong - weak
    if variant == "strong at c":
        strong = c - q
    if variant == "strong zero":
        strong = 0 * strong
    if variant == "swapped":
        weak, strong = strong, weak
    return weak if variant == "alone" else (weak, strong)


def with_variant(function, variant):
    return lambda *args: function(*args, variant=variant)


def all_of(function, *variants):
    return [with_variant(function, variant) for variant in variants]


RIGHT = {
    "13b.A": (0.5**5, -(0.5**5)),
    "13b.B": (0.2, 1.0, 2.0),
    "13b.1": one_step,
    "13b.2": anchored,
    "13b.3": ends,
    "13b.4": limits,
}
WRONG = {
    "13b.A": [(0.5, -0.5), (0.5**5, 0.5**5), (0.5**5, 1.5**5), (2**5, -(2**5)), (0.5**10, 0.1)],
    "13b.B": [(0.1, 0.5, 1.0), (-0.2, -1.0, -2.0), (0.8, 0.0, -1.0), (0.2, 1.0, 0.5)],
    "13b.1": all_of(one_step, "first", "early", "late", "query", "plus", "lr", "alone"),
    "13b.2": [*all_of(anchored, "v", "sign", "none", "half", "more"), exact, wasteful, looking],
    "13b.3": all_of(ends, "more", "less", "swapped", "joint", "mean", "two"),
    "13b.4": all_of(
        limits, "zero", "at c", "seen", "strong at c", "strong zero", "swapped", "alone"
    ),
}


def writes(hvp, b, tau, iters):
    """Right, but for vmap: it writes into a tensor without a place for all tasks."""
    v, r, p = torch.zeros(len(b)).double(), b, b
    for _ in range(iters):
        hp = hvp(p) + tau * p
        step = (r @ r) / (p @ hp)
        v += step * p
        r, before = r - step * hp, r @ r
        p = r + (r @ r) / before * p
    return tau * v


def stacked(function):
    return lambda *a: torch.stack(list(function(*a)))


ALSO = {"13b.3": [stacked(ends)], "13b.4": [stacked(limits)]}
TOLD = {
    "13b.2": [(looking, "looks at a number"), (writes, "v = v + ...")],
    "13b.3": [
        (lambda A, c, lr, steps: ends(A, c, lr, 1), "MAML: lam: off"),
        (lambda *a: ends(*a, variant="less"), "MAML: count the steps"),
    ],
}
