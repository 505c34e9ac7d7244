"""Answers to the exercises of chapter 18: right ones, and the mistakes that students make."""

import math

import torch


def nesterov(w, u_bar, u, q, hvp, eta, beta, variant=""):
    u_next = beta * u + q
    c = u_bar - eta * beta * w
    if variant == "heavy ball":
        c = u_bar - eta * w
        return w + hvp(c), beta * c, -w @ u_next
    direct = 0 * w if variant == "no direct" else eta * w
    back = hvp(c - direct) if variant == "no w" else w + hvp(c - direct)
    bar = {"bar": beta * u_bar, "no beta": c}.get(variant, beta * c)
    along = {"old u": q + beta * u, "u": u_next}.get(variant, q + beta * u_next)
    h = w @ along if variant == "sign" else -w @ along
    return (back, bar) if variant == "two" else (back, bar, h)


def columns(step_at, theta, steps, lr, momentum, l2, variant=""):
    u, D = torch.zeros_like(theta), torch.zeros(2, len(theta)).to(theta)
    S = torch.zeros_like(D)
    for t in range(steps):
        q, hvp = step_at(t, theta)
        decay = {"no decay": 0.0, "half": l2}.get(variant, 2 * l2)
        new = momentum * u + q + decay * theta
        active = torch.stack([u, theta if variant == "one" else 2 * theta])
        if variant == "late":
            active = torch.stack([new, 2 * (theta - lr * new)])
        S = momentum * S + torch.stack([hvp(z) for z in D]) + decay * D + active
        if variant == "forgets":
            S = torch.stack([hvp(z) for z in D]) + decay * D + active
        if variant == "not through":
            S = S - decay * D
        u, theta, D = new, theta - lr * new, D - lr * S
    D = {"swapped": D.flip(0), "sign": -D}.get(variant, D)
    return D if variant == "alone" else (theta, D)


def parts(each, L, variant=""):
    n = len(each)
    windows = each.view(n, -1, L)
    shared = windows.mean(2)
    gaps = shared[:, :, None] - windows
    noise = shared.var(0, unbiased=variant != "biased").mean()
    noise = {"single": each.var(0).mean(), "alone": each.var(0).mean() / L, "mean": noise / n}.get(
        variant, noise
    )
    excess = gaps.var(0).mean() / n
    excess = {"plain": 0.0, "all": each.var(0).mean() / n, "not mean": excess * n,
              "plus": -excess}.get(variant, excess)  # fmt: skip
    sharing = float(gaps.mean(0).square().mean() - excess)
    return float(noise), max(0.0, sharing) if variant == "cut off" else sharing


def greedy_and_far(mu, theta, s2, steps, grid, variant=""):
    noise = {"quiet": 0.0, "unweighted": s2 / mu}.get(variant, s2)
    greedy = (mu**2 * theta**2).sum() / (mu**3 * theta**2 + mu * noise).sum()

    def after(eta):
        second = theta**2
        for _ in range({"one": 1, "less": steps - 1, "more": steps + 1}.get(variant, steps)):
            second = (1 - eta * mu) ** 2 * second + eta**2 * (0.0 if variant == "far quiet" else s2)
        return float(((1 if variant == "no mu" else mu) * second).sum())

    far = min(grid.tolist(), key=after)
    if variant == "grid":
        variant = "one"
        return min(grid.tolist(), key=after), far
    return (far, greedy) if variant == "swapped" else (float(greedy), far)


def best_window(noise, speed, variant=""):
    if speed == 0:
        return 1.0 if variant == "no drift" else math.inf
    rule = (2 * noise / speed**2) ** (1 / 3)
    if variant == "rule":
        return rule
    if variant == "half":
        return (noise / speed**2) ** (1 / 3)
    low, high = 1.0, 2 + 2 * rule
    for _ in range(100):
        middle = (low + high) / 2
        slope = -noise / middle**2 + speed ** (1 if variant == "speed" else 2) * (middle - 1) / 2
        low, high = (middle, high) if slope < 0 else (low, middle)
    return low


def all_of(function, *variants):
    return [lambda *args, v=v: function(*args, variant=v) for v in variants]


RIGHT = {
    "18.A": (-1, 1),
    "18.B": "ripples",
    "18.1": nesterov,
    "18.2": columns,
    "18.3": parts,
    "18.4": greedy_and_far,
    "18.5": best_window,
}
WRONG = {
    "18.A": [(1, 1), (-1, -1), (1, -1), (0, 0)],
    "18.B": ["trap", "both", "neither", "waves", 2],
    "18.1": all_of(
        nesterov, "heavy ball", "no direct", "no w", "bar", "no beta", "old u", "u", "sign", "two"
    ),
    "18.2": all_of(
        columns,
        "no decay",
        "half",
        "one",
        "late",
        "forgets",
        "not through",
        "swapped",
        "sign",
        "alone",
    ),
    "18.3": all_of(parts, "biased", "single", "alone", "mean", "plain", "all", "not mean", "plus"),
    "18.4": all_of(greedy_and_far, "quiet", "unweighted", "one", "far quiet", "swapped"),
    "18.5": all_of(best_window, "no drift", "rule", "half", "speed"),
}

TOLD = {
    "18.3": [(lambda *a: parts(*a, variant="cut off"), "no longer unbiased")],
    "18.4": [
        (lambda *a, v=v: greedy_and_far(*a, variant=v), said)
        for v, said in (
            ("less", "not theta_{T-1}"), ("more", "not theta_{T+1}"), ("no mu", "with mu"),
            ("far quiet", "without the noise"), ("grid", "any real number"),
        )
    ],
}  # fmt: skip
