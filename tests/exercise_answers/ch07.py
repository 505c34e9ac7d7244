"""Answers to the exercises of chapter 7: right ones, and the mistakes that students make."""

import torch
import torch.nn.functional as F


def factors(a, g, sigma, power=-1.0, scale=None, zero=True):
    """power: that of sigma in the weight that multiplies g g^T."""
    n = len(a)
    weight = sigma**power
    if zero:
        weight = torch.where(sigma > 0, weight, 0.0)
    return a.T @ a / n, (n if scale is None else scale(n)) * (g.T * weight) @ g


def probes(logits, y, class_weight, generator, pick=lambda drawn, y: y, power=0.5, draw=True):
    p = logits.softmax(1)
    drawn = p.multinomial(1, generator=generator).squeeze(1)
    label = drawn if draw else y
    scale = class_weight[pick(drawn, y)] ** power
    return scale[:, None] * (p - F.one_hot(label, p.shape[1]))


def averaged(logits, y, class_weight, generator):
    p = logits.softmax(1)
    s = probes(logits, y, torch.ones_like(class_weight), generator)
    return (p @ class_weight).sqrt()[:, None] * s


def groups(ratio=10.0, on_h=lambda r: 1 / r):
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    sigma = torch.tensor([ratio, 1 / ratio], dtype=torch.float64)
    return a, on_h(sigma), sigma


def best(a, gamma, sigma, B, weight=None, divide=None):
    along = ((gamma @ B) * gamma).sum(1)
    w = sigma * along if weight is None else weight(gamma, sigma, B, along)
    return (a.T * w) @ a / (len(a) * (B.square().sum() if divide is None else divide(B)))


RIGHT = {
    "7.A": (0.5, 1),
    "7.B": "empirical",
    "7.1": (4, 0.08, 0.25, 0.005),
    "7.2": lambda sigma: (sigma / sigma.mean()).sqrt(),
    "7.3": factors,
    "7.4": probes,
    "7.5": groups,
    "7.6": best,
}

WRONG = {
    "7.A": [(1, 0.5), (0.25, 0.5), (0.5, 0.5), (0.0, 1.0), (0.5,), "half"],
    "7.B": ["drawn", "all classes", "exact", "Fisher", 3],
    "7.1": [
        (0.25, 0.005, 4, 0.08),
        (2, 0.04, 0.5, 0.01),
        (4, 0.005, 0.25, 0.08),
        (4, 0.08, 1, 0.02),
        (16, 0.32, 1, 0.02),
        (4, 0.08, 0.25, 0.02),
        (4, 0.08),
        "four",
    ],
    "7.2": [
        lambda sigma: (sigma / sigma.sum()).sqrt(),
        lambda sigma: sigma.sqrt(),
        lambda sigma: sigma / sigma.mean(),
        lambda sigma: sigma / sigma.sum(),
        lambda sigma: sigma.sqrt() / sigma.mean(),
        lambda sigma: sigma.sqrt() / sigma.sum(),
        lambda sigma: sigma.sqrt() / sigma.sqrt().mean(),
        lambda sigma: torch.ones_like(sigma),
        lambda sigma: (sigma / sigma.mean()).sqrt()[:, None],
    ],
    "7.3": [
        lambda a, g, sigma: (a.T @ a / len(a), g.T @ g),
        lambda a, g, sigma: (a.T @ a / len(a), g.T @ g / len(a)),
        lambda a, g, sigma: factors(a, g, sigma, power=0.0),
        lambda a, g, sigma: factors(a, g, sigma, power=-2.0),
        lambda a, g, sigma: factors(a, g, sigma, power=1.0),
        lambda a, g, sigma: factors(a, g, sigma, zero=False),
        lambda a, g, sigma: factors(a, g, sigma, scale=lambda n: 1),
        lambda a, g, sigma: factors(a, g, sigma, scale=lambda n: 1 / n),
        lambda a, g, sigma: factors(a, g, sigma, scale=lambda n: n**2),
        lambda a, g, sigma: ((a.T * sigma) @ a / sigma.sum(), factors(a, g, sigma)[1]),
        lambda a, g, sigma: ((a.T * sigma) @ a / len(a), factors(a, g, sigma)[1]),
        lambda a, g, sigma: ((a.T * (sigma > 0)) @ a / len(a), factors(a, g, sigma)[1]),
        lambda a, g, sigma: factors(
            a[sigma > 0], len(a) / int((sigma > 0).sum()) * g[sigma > 0], sigma[sigma > 0]
        ),
        lambda a, g, sigma: (a.T @ a / len(a), len(a) ** 2 * g.T @ g),
        lambda a, g, sigma: factors(a, g, sigma, scale=lambda n: n**2 / int((sigma > 0).sum())),
        lambda a, g, sigma: factors(a, g, sigma)[::-1],
        lambda a, g, sigma: factors(a, g, sigma)[1],
        lambda a, g, sigma: (0.0, 1.0),
    ],
    "7.4": [
        lambda *args: probes(*args, pick=lambda drawn, y: drawn),
        lambda *args: probes(*args, pick=lambda drawn, y: drawn, power=1.0),
        lambda *args: probes(*args, power=1.0),
        lambda *args: probes(*args, power=0.0),
        lambda *args: probes(*args, power=0.25),
        lambda *args: probes(*args, draw=False),
        lambda *args: probes(*args, power=1.0, draw=False),
        averaged,
        lambda *args: probes(*args).T,
        lambda *args: 1.3 * probes(*args),
    ],
    "7.5": [
        lambda: groups(on_h=torch.ones_like),
        lambda: groups(ratio=1.2),
        lambda: groups(ratio=2.0),  # case 2 as printed
        lambda: groups(ratio=100.0),
        lambda: groups(on_h=lambda s: s),
        lambda: groups()[:2],
        lambda: (groups()[0].T[:1], *groups()[1:]),
        lambda: (groups()[0], groups()[1][:, None], groups()[2]),
        lambda: (0 * groups()[0], *groups()[1:]),
        lambda: ("a", *groups()[1:]),
        groups(on_h=torch.ones_like),
    ],
    "7.6": [
        lambda a, gamma, sigma, B: a.T @ a / len(a),
        lambda a, gamma, sigma, B: (a.T * sigma) @ a / sigma.sum(),
        lambda *args: best(*args, divide=lambda B: 1.0),
        lambda *args: best(*args, divide=lambda B: B.norm()),
        lambda *args: best(*args, weight=lambda g, s, B, along: along),
        lambda *args: best(*args, weight=lambda g, s, B, along: s**2 * along),
        lambda *args: best(*args, weight=lambda g, s, B, along: s * g.square().sum(1)),
        lambda *args: len(args[0]) * best(*args),
        lambda a, gamma, sigma, B: best(
            a, gamma, sigma, B, divide=lambda B: (sigma * ((gamma @ B) * gamma).sum(1)).mean()
        ),
        lambda *args: best(
            *args,
            weight=lambda g, s, B, along: s * (torch.linalg.solve(B, g.T).T * g).sum(1),
            divide=len,
        ),
        lambda *args: best(*args)[0],
    ],
}

ALSO = {"7.3": [lambda *a: [part.tolist() for part in factors(*a)]]}
