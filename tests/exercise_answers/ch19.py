"""Answers to the exercises of chapter 19: right ones, and the mistakes that students make."""

import torch


def pooled(parts, variant=""):
    n = sum(k for k, *_ in parts)
    mean = sum(k * m for k, m, _ in parts) / n
    if variant == "equal means":
        mean = sum(m for _, m, _ in parts) / len(parts)
    second = sum(k * (c + torch.outer(m, m)) for k, m, c in parts) / n
    cov = {
        "within": sum(k * c for k, _, c in parts) / n,
        "equal": sum(c for *_, c in parts) / len(parts),
        "second": second,
    }.get(variant, second - torch.outer(mean, mean))
    cov = cov * n / (n - 1) if variant == "unbiased" else cov
    return mean if variant == "one" else (mean, cov)


def seconds(d, columns, Q, latency, rate, variant=""):
    size = {"numbers": 1, "bits": 32}.get(variant, 4)
    piece = d**2 if variant == "whole" else d**2 / Q
    rounds = {"once": Q - 1, "Q": 2 * Q}.get(variant, 2 * (Q - 1))
    wait = 0.0 if variant == "no latency" else latency
    summed = rounds * (wait + size * piece / rate)
    own = {"shared": columns / Q, "all": columns * Q}.get(variant, columns)
    bytes_ = 1 if variant == "gathered numbers" else 4
    times = 2 if variant == "twice" else 1
    return summed, times * (Q - 1) * (latency + bytes_ * d * own / rate)


def transpose(slopes, variant=""):
    if variant == "own":
        return [one[p] for p, one in enumerate(slopes)]
    if variant == "sum over parts":
        return [one.sum(0) for one in slopes]
    total = sum(slopes)
    total = total / len(slopes) if variant == "mean" else total
    return list(total.flip(0) if variant == "order" else total)


def rows(parts, lam, variant=""):
    out, n = torch.zeros_like(lam), sum(len(i) for i, _ in parts)
    sigma = lam.sigmoid()
    for index, slopes in parts:
        by = {"own": len(index), "means": len(index) * len(parts), "sum": 1}.get(variant, n)
        if variant == "last":
            out[index] = slopes / by
        elif variant == "once":
            out[index] += slopes / by
        else:
            out.index_add_(0, index, slopes / by)
    return {"plain": 1.0, "value": sigma}.get(variant, sigma * (1 - sigma)) * out


def deal(costs, size, variant=""):
    if variant == "turns":
        return [k % size for k in range(len(costs))]
    order = (
        range(len(costs))
        if variant == "unsorted"
        else sorted(
            range(len(costs)), key=lambda k: costs[k] if variant == "cheapest" else -costs[k]
        )
    )
    load, owners = [0.0] * size, [0] * len(costs)
    for k in order:
        owners[k] = load.index(max(load) if variant == "most" else min(load))
        load[owners[k]] += costs[k]
    if variant == "sorted order":
        return [owners[k] for k in order]
    return [k + 1 for k in owners] if variant == "from one" else owners


def all_of(function, *variants):
    return [lambda *args, v=v: function(*args, variant=v) for v in variants]


RIGHT = {
    "19.A": 9,
    "19.B": "long",
    "19.1": pooled,
    "19.2": seconds,
    "19.3": transpose,
    "19.4": rows,
    "19.5": deal,
}
WRONG = {
    "19.A": [1, 1 / 9, 3, 81, "nine"],
    "19.B": ["short", "right", "longer", 1],
    "19.1": all_of(pooled, "equal means", "within", "equal", "second", "unbiased", "one"),
    "19.2": all_of(
        seconds, "numbers", "whole", "once", "Q", "no latency", "shared", "all",
        "gathered numbers", "twice",
    ),
    "19.3": all_of(transpose, "own", "sum over parts", "mean", "order"),
    "19.4": all_of(rows, "own", "means", "sum", "last", "plain", "value"),
    "19.5": all_of(deal, "turns", "unsorted", "cheapest", "most", "from one"),
}  # fmt: skip

TOLD = {
    "19.2": [(lambda *a: seconds(*a, variant="bits"), "bytes, not bits")],
    "19.4": [(lambda *a: rows(*a, variant="once"), "twice in one part")],
    "19.5": [(lambda *a: deal(*a, variant="sorted order"), "back into the given order")],
}
