"""Answers to the exercises of chapter 13: right ones, and the mistakes that students make."""

import torch


def field_and_product(v, slope, g, hu, theta, u, l2, variant=""):
    n = len(g)
    field = (v[:, None] * g).mean(0) * (n if variant == "sum F" else 1)
    field = field + {"one l2": 1, "no l2": 0}.get(variant, 2) * l2 * theta
    bend = ((slope * (g @ u))[:, None] * g).mean(0)
    if variant == "still":
        bend = 0 * bend
    if variant == "minus":
        bend = -bend
    if variant == "mean g":
        bend = slope.mean() * (g.mean(0) @ u) * g.mean(0)
    Hu = ((v[:, None] * hu).mean(0) + bend) * (n if variant == "sum H" else 1)
    along = theta if variant == "theta in H" else u
    Hu = Hu + {"one l2 in H": 1, "no l2 in H": 0}.get(variant, 2) * l2 * along
    return Hu if variant == "alone" else (field, Hu)


def attached(l, v, dv, ddv, variant=""):
    w = {"detached": v, "no l": v + dv, "value": v * l}.get(variant, v + dv * l)
    slope = {
        "slope of V": dv, "once": dv + ddv * l, "no l in V''": 2 * dv + ddv, "no V''": 2 * dv,
    }.get(variant, 2 * dv + ddv * l)  # fmt: skip
    return w if variant == "alone" else (w, slope)


def focal_weight(p, gamma, variant=""):
    q, l = 1 - p, -p.log()
    second = gamma * q ** (gamma - 1) * p * l
    return {
        "factor": q**gamma,
        "sign": q**gamma - second,
        "no p": q**gamma + second / p,
        "no l": q**gamma + second / l,
        "loss": q**gamma * l,
        "no gamma": q**gamma + second / gamma,
    }.get(variant, q**gamma + second)


def one_step(lam, theta, train, meta, lr, detach=True, at_new=True, mean=True, sign=1, stop_b=True):
    (x, y), (u, z) = train, meta
    lam = lam.clone().requires_grad_()
    theta = theta.clone().requires_grad_()
    losses = 0.5 * (x @ theta - y) ** 2
    read = losses.detach() if detach else losses
    weighted = torch.sigmoid(lam[0] + lam[1] * read) * losses
    g = weighted.mean() if mean else weighted.sum()
    (step,) = torch.autograd.grad(g, theta, create_graph=True)
    new = theta - sign * lr * step
    at = new if at_new else theta
    b = u.T @ (u @ at - z) / len(z)
    b = b.detach() if stop_b else b
    return torch.autograd.grad(new @ b, lam)[0]


def selection(held, test, variant=""):
    rows = torch.arange(len(test))
    last, chosen = test[:, -1], test[rows, held.argmax(1)]
    best = test.max(1).values
    if variant == "mean first":
        best = test.mean(0).max()[None]
    if variant == "one look":
        chosen = test[:, held.mean(0).argmax()]
    if variant == "held out":
        chosen = held.max(1).values
    if variant == "lowest":
        chosen, best = test[rows, held.argmin(1)], test.min(1).values
    if variant == "luckiest":
        last, chosen, best = (row.max()[None] for row in (last, chosen, best))
    if variant == "order":
        last, best = best, last
    return tuple(float(row.mean()) for row in (last, chosen, best))


RIGHT = {
    "13.A": (2 / 3, 8 / 9),
    "13.B": ("meta", "balanced", "network"),
    "13.1": field_and_product,
    "13.2": attached,
    "13.3": focal_weight,
    "13.4": one_step,
    "13.5": selection,
}

WRONG = {
    "13.A": [(8 / 9, 8 / 9), (4 / 3, 8 / 9), (2 / 3, 2 / 3), (2 / 3, 1 / 9), (2 / 3, 7 / 9),
             (2 / 3, 2 / 9), 2 / 3, "V"],
    "13.B": [("balanced", "meta", "network"), ("meta", "network", "balanced"),
             ("network", "balanced", "meta"), ("meta", "balanced"), "meta", (1, 2, 3), 1],
    "13.1": [
        lambda *a, variant=variant: field_and_product(*a, variant=variant)
        for variant in ("one l2", "no l2", "sum F", "still", "one l2 in H", "no l2 in H", "sum H",
                        "theta in H", "minus", "mean g", "alone")
    ],
    "13.2": [
        lambda *a, variant=variant: attached(*a, variant=variant)
        for variant in ("detached", "no l", "value", "slope of V", "once", "no l in V''", "no V''",
                        "alone")
    ],
    "13.3": [
        lambda *a, variant=variant: focal_weight(*a, variant=variant)
        for variant in ("factor", "sign", "no p", "no l", "loss", "no gamma")
    ],
    "13.4": [
        lambda *a, how=how: one_step(*a, **how)
        for how in (
            {"detach": False}, {"at_new": False}, {"mean": False}, {"sign": -1}, {"stop_b": False},
            {"detach": False, "at_new": False}, {"detach": False, "mean": False},
            {"at_new": False, "mean": False}, {"detach": False, "at_new": False, "mean": False},
        )
    ],
    "13.5": [
        lambda *a, variant=variant: selection(*a, variant=variant)
        for variant in ("mean first", "one look", "held out", "lowest", "luckiest", "order")
    ],
}  # fmt: skip

ALSO = {"13.B": [["meta", "balanced", "network"]], "13.2": [lambda *a: torch.stack(attached(*a))]}
TOLD = {
    "13.4": [
        (lambda *a: one_step(*a, stop_b=False), "b is a constant"),
        (lambda *a: one_step(*a, stop_b=False, mean=False), "a mean over the batch. b is a"),
        (lambda *a: one_step(*a, detach=False, mean=False), "not detached. The inner loss is"),
        (lambda *a: one_step(*a, detach=False, at_new=False, mean=False), "The meta images judge"),
    ],
}
