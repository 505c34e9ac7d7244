"""Answers to the exercises of chapter 9: right ones, and the mistakes that students make."""

import torch

import bilevel_lite as bl
from bilevel_lite.products import cross_vp, gradient, hvp


def amigo(
    problem, lam, theta, v, inner, outer, inner_steps, linear_steps,
    inner_lr, linear_lr, outer_lr, variant="",
):  # fmt: skip
    g, before = problem.inner_loss, theta

    def at(part):
        return before if variant in (f"old {part}", "all old") else theta

    for _ in range(inner_steps):
        theta = theta - inner_lr * gradient(g, lam, theta, inner)[2]
    direct = gradient(problem.outer_loss, lam, at("direct"), outer)[1]
    b = gradient(problem.outer_loss, lam, at("b"), outer)[2]
    if variant == "cold":
        v = torch.zeros_like(v)
    given, of = v, outer if variant == "outer H" else inner
    for _ in range(1 if variant == "one" else linear_steps):
        v = v - linear_lr * (hvp(g, lam, at("H"), of, v) - b)
    jv = cross_vp(g, lam, at("J"), inner, {"b": b, "old v": given}.get(variant, v))
    if variant == "direct":
        direct = torch.zeros_like(direct)
    if variant == "sign":
        jv = -jv
    if variant == "swapped":
        return theta, lam, v
    return lam - outer_lr * (direct - jv), theta, v


def series(matvecs, b, step, first=True, factor=True, reuse=False, last=True, reverse=False):
    p, total = b, b if first else torch.zeros_like(b)
    if reverse:
        matvecs = matvecs[::-1]
    for matvec in matvecs if last else matvecs[:-1]:
        p = p - step * (matvecs[0] if reuse else matvec)(p)
        total = total + p
    return step * total if factor else total


def in_place(matvecs, b, step):
    total = b.clone()
    for matvec in matvecs:
        b -= step * matvec(b)
        total += b
    return step * total


def tuned(
    problem, lam, theta, inner, outer, cls=bl.AID, momentum=0.7, warm=True, outer_lr=4.0, **more
):
    def optimizer(params):
        return torch.optim.SGD(params, lr=1.0, momentum=momentum)

    more = {"solver": bl.CG(3, warm_start=warm), "inner_steps": 10, **more}
    if cls is bl.SOBA:
        more = {"linear_lr": 1.0}
    return cls(
        problem, lam, theta, inner_optimizer=optimizer, outer_lr=outer_lr,
        inner_batch=inner, outer_batch=outer, **more,
    )  # fmt: skip


RIGHT = {
    "9.A": (16, "no"),
    "9.B": 1,
    "9.1": (23, 4, 18, 33),
    "9.2": (4 / 3, -1 / 12, 12 / 13, 48 / 37),
    "9.3": amigo,
    "9.4": series,
    "9.5": tuned,
}

WRONG = {
    "9.A": [(4, "no"), (16, "yes"), (1 / 16, "no"), (2, "yes"), (64, "no"), 16, (16, 3)],
    "9.B": [8, 64, 27, 0, (1, 2), "none"],
    "9.1": [
        (18, 4, 18, 33),
        (25, 4, 18, 33),
        (23, 6, 18, 33),
        (23, 4, 16, 33),
        (23, 4, 18, 30),
        (23, 4, 18, 31),
        (23, 4, 18, 23),
        (24, 4, 18, 33),
        (23, 4, 18),
        23,
    ],
    "9.2": [
        (1.5, 0, 12 / 13, 48 / 37),
        (4 / 3, 1 / 12, 12 / 13, 48 / 37),
        (4 / 3, -1 / 3, 12 / 13, 48 / 37),
        (4 / 3, -1 / 12, 4 / 3, 48 / 37),
        (4 / 3, -1 / 12, 12 / 13, 4 / 3),
        (24 / 17, -1 / 12, 12 / 13, 48 / 37),
        (4 / 3, -1 / 12, 12 / 13, 1.1),
        (4 / 3, -1 / 12),
    ],
    "9.3": [
        *(
            lambda *a, variant=variant: amigo(*a, variant=variant)
            for variant in (
                "cold",
                "old b",
                "one",
                "direct",
                "sign",
                "b",
                "swapped",
                "old v",
                "outer H",
            )  # fmt: skip
        ),
        lambda *a: amigo(*a)[0],
        lambda *a: amigo(*a[:4], a[5], a[4], *a[6:]),
    ],
    "9.4": [
        lambda *a: series(*a, first=False, factor=False, reuse=True),
        lambda *a: series(*a, first=False),
        lambda *a: series(*a, factor=False),
        lambda *a: series(*a, reuse=True),
        lambda *a: series(*a, factor=False, reuse=True),
        lambda *a: series(*a, last=False),
        lambda *a: series(*a, reverse=True),
        lambda *a: series(*a)[:2],
        in_place,
    ],
    "9.5": [
        lambda *a: tuned(*a, momentum=0.0, warm=False, outer_lr=8.0),
        lambda *a: tuned(*a, warm=False),
        lambda *a: tuned(*a, momentum=0.0),
        lambda *a: tuned(*a, cls=bl.SOBA),
        lambda *a: tuned(*a, outer_lr=100.0),
        lambda *a: tuned(*a, outer_lr=0.01),
        lambda problem, lam, theta, i, o: tuned(problem, lam + 1, theta, i, o),
    ],
}

TOLD = {
    "9.3": [
        (lambda *a, part=part: amigo(*a, variant=f"old {part}"), f"{said} is taken at the old")
        for part, said in (("direct", "direct term"), ("H", "H"), ("J", "J"))
    ] + [(lambda *a: amigo(*a, variant="all old"), "off by")],
}  # fmt: skip
