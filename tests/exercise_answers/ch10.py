"""Answers to the exercises of chapter 10: right ones, and the mistakes that students make."""

import torch
import torch.nn.functional as F

import bilevel_lite as bl


def shares(rate, T, prior, variant=""):
    M = (1 - rate) * torch.eye(len(T), dtype=T.dtype) + rate * T
    given = prior @ M
    overall, by_given = rate * prior @ (1 - T.diagonal()), 1 - prior * M.diagonal() / given
    if variant == "rate":
        overall = torch.tensor(rate).double()
    if variant == "no rate":
        overall = prior @ (1 - T.diagonal())
    if variant == "unweighted":
        overall = rate * (1 - T.diagonal().mean())
    if variant == "true":
        by_given = 1 - M.diagonal()
    if variant == "right":
        by_given = prior * M.diagonal() / given
    if variant == "prior":
        by_given = 1 - M.diagonal() / M.sum(0)
    if variant == "joint":
        by_given = given - prior * M.diagonal()
    if variant == "rows":
        by_given = 1 - prior * M.diagonal() / (M @ prior)
    if variant == "kept":
        overall = rate * prior @ T.diagonal()
    return overall, by_given


def weight_gradients(lam, theta, v, x, y, C, variant=""):
    def scores(t):
        if variant == "columns":
            return x @ t[:-C].view(-1, C) + t[-C:]
        if variant == "head":
            return x @ t[C:].view(C, -1).T + t[:C]
        bias = 0 if variant == "bias" and t is v else t[-C:]
        return x @ t[:-C].view(C, -1).T + bias

    p = scores(theta).softmax(1)
    if variant != "one-hot":
        p = p - F.one_hot(y, C)
    sigma = lam.sigmoid()
    factor = {"sigma": sigma, "clip": torch.ones_like(lam)}.get(variant, sigma * (1 - sigma))
    h = -factor * (p * scores(v)).sum(1)
    if variant == "sign":
        h = -h
    return h if variant == "sum" else h / len(x)


def precision_range(lam, wrong, variant=""):
    K = int(wrong.sum())
    t = lam.sort().values[K - 1]
    below, tied = lam < t, lam == t
    B, M = int(below.sum()), int(tied.sum())
    w_B, w_M = int(wrong[below].sum()), int(wrong[tied].sum())
    lowest, highest = w_B + max(0, K - B - (M - w_M)), w_B + min(w_M, K - B)
    if variant == "swapped":
        lowest, highest = highest, lowest
    if variant == "no places":
        lowest, highest = w_B, w_B + w_M
    expected = w_B + (w_M if variant == "all tied" else (K - B) / M * w_M)
    if variant == "middle":
        expected = (lowest + highest) / 2
    if variant == "sorted":
        expected = int(wrong[lam.argsort(stable=True)[:K]].sum())
    return lowest / K, expected / K, highest / K


def pipeline(x, y, parts, rate, learn, score, generator, bugs=""):
    train, validation, tuning, test = parts
    kept = bl.data.corrupt_labels(y[train], rate, 10, generator)[0]

    def inner_batch():
        if "noise" in bugs:
            return x[train], bl.data.corrupt_labels(y[train], rate, 10, generator)[0]
        return x[train], y[train] if "clean" in bugs else kept

    trusted = torch.cat([validation, tuning]) if "outer" in bugs else validation
    iterates = learn(inner_batch, (x[trusted], y[trusted]))
    judge = {"test": test, "validation": validation}.get(bugs, tuning)
    best = max(iterates, key=lambda theta: score(theta, x[judge], y[judge]))
    if "curious" in bugs:
        [score(theta, x[test], y[test]) for theta in iterates]
    if "last" in bugs:
        best = iterates[-1]
    reported = tuning if "report" in bugs else test
    return best, score(best, x[reported], y[reported])


def breaking_rate(T, variant=""):
    off = T.clone()
    off.fill_diagonal_(0)
    others = off.sum(1) if variant == "sum" else off.max(1).values
    if variant == "columns":
        others = off.max(0).values
    diagonal = 0 * T.diagonal() if variant == "luck" else T.diagonal()
    rates = 1 / (1 + others - diagonal)
    if variant == "raw":
        return rates.min()
    if variant == "max":
        return rates.max().clamp(max=1)
    return rates.min().clamp(max=1)


RIGHT = {
    "10.A": (22_500, 47.4),
    "10.B": (1, 1, -1),
    "10.1": shares,
    "10.2": weight_gradients,
    "10.3": precision_range,
    "10.4": pipeline,
    "10.5": (127, 37, 1, 0.9**10),
    "10.6": breaking_rate,
}

WRONG = {
    "10.A": [
        (25_000, 47.4), (2_500, 47.4), (22_500, 111), (22_500, 67), (22_500, 2250), (22_500, 150),
        (0.45, 47), (21_000, 47), 22_500, "half", shares,
    ],
    "10.B": [(1, -1, 1), (-1, -1, 1), (1, 1, 1), (1, 1, 0), (1, 1), "up up down", shares],
    "10.1": [
        *(
            lambda *a, variant=variant: shares(*a, variant=variant)
            for variant in (
                "rate", "no rate", "unweighted", "true", "right", "prior", "joint", "rows", "kept",
            )
        ),
        lambda *a: shares(*a)[0],
    ],
    "10.2": [
        lambda *a, variant=variant: weight_gradients(*a, variant=variant)
        for variant in ("sign", "sum", "clip", "sigma", "bias", "one-hot", "columns", "head")
    ],
    "10.3": [
        *(
            lambda *a, variant=variant: precision_range(*a, variant=variant)
            for variant in ("swapped", "no places", "all tied", "middle", "sorted")
        ),
        lambda *a: precision_range(*a)[1],
    ],
    "10.4": [
        lambda *a, bugs=bugs: pipeline(*a, bugs=bugs)
        for bugs in (
            "noise outer test", "noise", "outer", "test", "clean", "validation", "last", "report",
            "curious",
        )
    ],
    "10.5": [
        (77, 37, 1, 0.9**10),
        (121, 31, 1, 0.9**10),
        (123, 33, 1, 0.9**10),
        (127, 127, 1, 0.9**10),
        (127, 37, 10, 0.9**10),
        (127, 37, 0.1, 0.9**10),
        (127, 37, 1, 0),
        (127, 37, 1, 1 - 0.9**10),
        (127, 37, 1, 34.9),
        (127, 37, 1),
    ],
    "10.6": [
        lambda T, variant=variant: breaking_rate(T, variant)
        for variant in ("sum", "luck", "raw", "max", "columns")
    ],
}  # fmt: skip

TOLD = {
    "10.6": [(lambda T: breaking_rate(T, "columns"), "compare with the largest entry of a column")],
}
