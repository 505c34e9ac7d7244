"""Answers to the exercises of chapter 15: right ones, and the mistakes that students make."""

import math

import torch
import torch.nn.functional as F


def poisoned_loss(W, x, y, poison, labels, l2, variant=""):
    clean = F.cross_entropy(x @ W.T, y, reduction="none")
    bad = F.cross_entropy(poison @ W.T, labels, reduction="none")
    rows, square = len(y) + len(labels), l2 * (W**2).sum()
    if variant == "two means":
        return clean.mean() + bad.mean() + square
    if variant == "half":
        return (clean.mean() + bad.mean()) / 2 + square
    if variant == "clean only":
        return clean.mean() + square
    if variant == "minus":
        return (clean.sum() - bad.sum()) / rows + square
    by = {"n": len(y), "sum": 1}.get(variant, rows)
    share = {"no l2": 0, "half l2": 0.5}.get(variant, 1)
    return (clean.sum() + bad.sum()) / by + share * square


def input_pull(W, V, x, y, variant=""):
    if variant == "swapped":
        W, V = V, W
        prob = (x @ V.T).softmax(1)
    else:
        prob = (x @ W.T).softmax(1)
    miss, along = prob - F.one_hot(y, len(W)), x @ V.T
    inner = prob * along
    first = miss @ V
    second = (inner - prob * inner.sum(1, keepdim=True)) @ W
    if variant == "swapped":
        p = (x @ V.T).softmax(1)
        inner = p * (x @ V.T)
        return (p - F.one_hot(y, len(W))) @ V + (inner - p * inner.sum(1, keepdim=True)) @ W
    if variant == "diagonal":
        return first + inner @ W
    parts = {"first": first, "second": second, "sign": -first - second}
    return parts.get(variant, (first + second) / (len(y) if variant == "mean" else 1))


def keep_near(x, y, removed, variant=""):
    classes = int(y.max()) + 1
    means = torch.stack([x[y == c].mean(0) for c in range(classes)])
    far = (x - means[y]).norm(dim=1)
    if variant == "one mean":
        far = (x - x.mean(0)).norm(dim=1)
    if variant == "nearest mean":
        far = torch.cdist(x, means).min(1).values
    if variant == "origin":
        far = x.norm(dim=1)
    if variant == "L1":
        far = (x - means[y]).abs().sum(1)
    if variant == "nearest":
        far = -far
    keep = torch.ones(len(y), dtype=torch.bool)
    if variant == "each class":
        for c in range(classes):
            rows = (y == c).nonzero().squeeze(1)
            keep[rows[far[rows].topk(round(removed * len(rows))).indices]] = False
        return keep
    count = removed * len(y)
    if variant == "quantile":
        return far <= torch.quantile(far, 1 - removed)
    if variant == "relative":
        far = far / torch.stack([far[y == c].mean() for c in range(classes)])[y]
    gone = far.topk({"up": math.ceil, "down": int}.get(variant, round)(count)).indices
    keep[gone] = False
    return {"other way": ~keep, "indices": gone}.get(variant, keep)


def poisoned_set(x, y, z, labels, psi, C, order, variant=""):
    poison = z if variant == "sources" else psi(z, labels)
    if variant == "twice":
        poison = psi(poison, labels)
    rows, targets = torch.cat([x, poison]), torch.cat([y, labels])
    if variant != "unshuffled":
        rows = rows[order]
    if variant == "back":
        targets = targets[order.argsort()]
    elif variant != "labels":
        targets = targets[order]
    flips = {"C": C - labels, "modulo": (C - labels) % C, "nine": 9 - labels}
    flipped = flips.get(variant, C - 1 - labels)
    return rows if variant == "alone" else (rows, targets, flipped)


def shift(n, m, r, R, variant=""):
    rows = n + m
    out = [m * r / rows, n * r / rows, m * R / n]
    other = {
        "n": (0, m * r / n), "distance": (0, r), "swapped": (0, n * r / rows),
        "clean mean": (1, r), "shift": (1, m * r / rows), "inside": (2, m * R / rows),
        "allowed": (2, R), "this r": (2, m * min(R, n * r / rows) / n),
    }  # fmt: skip
    if variant in other:
        place, value = other[variant]
        out[place] = value
    return out[:2] if variant == "two" else out


RIGHT = {
    "15.A": (30, 30 / 1030),
    "15.B": (2575, 0.0215),
    "15.1": poisoned_loss,
    "15.2": input_pull,
    "15.3": keep_near,
    "15.4": poisoned_set,
    "15.5": shift,
}


def variants(function, *names):
    """The function with each mistake."""
    return [lambda *a, variant=variant: function(*a, variant=variant) for variant in names]


WRONG = {
    "15.A": [(1000 / 0.97 - 1000, 0.029126), (30, 0.03), (30, 2.9126), (30, 0.9709), 30, "few"],
    "15.B": [
        (2500, 0.0215), (1500, 0.0215), (2575, 0.0515), (2575, 1075 / 51_500), (2575, 2.15), 2575,
        shift,
    ],
    "15.1": variants(
        poisoned_loss, "two means", "half", "clean only", "minus", "n", "sum", "no l2", "half l2"
    ),
    "15.2": variants(input_pull, "first", "second", "sign", "diagonal", "mean", "swapped"),
    "15.3": variants(
        keep_near, "L1", "one mean", "nearest mean", "origin", "nearest", "each class", "other way",
        "indices",
    ),
    "15.4": variants(
        poisoned_set, "sources", "twice", "unshuffled", "labels", "back", "C", "modulo", "nine",
        "alone",
    ),
    "15.5": variants(
        shift, "n", "distance", "swapped", "clean mean", "shift", "inside", "allowed", "this r",
        "two",
    ),
}  # fmt: skip

TOLD = {
    "15.3": [
        (lambda *a: keep_near(*a, variant="up"), "not rounded up"),
        (lambda *a: keep_near(*a, variant="down"), "not rounded down"),
        (lambda *a: keep_near(*a, variant="relative"), "mean distance"),
        (lambda *a: keep_near(*a, variant="quantile"), "not rounded up"),
    ],
}
