"""Answers to the exercises of chapter 11: right ones, and the mistakes that students make."""

from itertools import combinations
from math import exp

import torch
from scipy import stats


def visits(n, size, steps, variant=""):
    per_pass = n // size
    rest = n - per_pass * size
    full, begun = divmod(steps, per_pass)
    mean, independent = steps * size / n, (1 - size / n) ** steps
    passes = (rest / n) ** full * (1 - begun * size / n)
    if variant == "passes":
        mean = steps / per_pass
    if variant == "sum":
        mean *= n
    if variant == "limit":
        independent = exp(-steps * size / n)
    if variant == "one":
        independent = (1 - 1 / n) ** steps
    if variant == "moved":
        independent = 1 - independent
    if variant == "replaced":
        independent = (1 - 1 / n) ** (steps * size)
    if variant == "complete":
        passes = (rest / n) ** full
    if variant == "no remainder":
        passes = max(0.0, 1 - steps * size / n)
    return mean, independent, passes


def expected_best(losses, k, variant=""):
    x, n = sorted(losses, reverse=variant == "largest"), len(losses)
    if variant == "subsets":
        subsets = list(combinations(x, min(k, n)))
        return sum(min(s) for s in subsets) / len(subsets)
    if variant == "mean":
        return sum(x) / n
    if variant == "best":
        return min(x)
    shift = 1 if variant == "index" else 0
    return sum(
        v * (((n - i + shift) / n) ** k - ((n - i - 1 + shift) / n) ** k) for i, v in enumerate(x)
    )


def compare(one, two, variant=""):
    by = "test_loss" if variant == "peek" else "tuning_loss"
    a, b = (
        torch.tensor([min(h, key=lambda row: row[by])["test_loss"] for h in method]).double()
        for method in (one, two)
    )
    n = len(a)
    spread = ((a.var() + b.var()) / n).sqrt() if "unpaired" in variant else (a - b).std() / n**0.5
    quantile = 1.96 if "normal" in variant else stats.t.ppf(0.975, n - (variant != "degrees"))
    if variant == "one-sided":
        quantile = stats.t.ppf(0.95, n - 1)
    if variant == "no root":
        spread = spread * n**0.5
    if variant == "whole":
        spread = 2 * spread
    if variant == "table":
        quantile = round(quantile, 3)
    mean = (a - b).mean()
    return -mean if variant == "sign" else mean, quantile * spread


def smallest(one, two, h, r, rho, variant=""):
    if variant == "ggn":
        r = 0.0
    if variant == "sign":
        r = -r
    if variant == "h":
        h = 1.0
    middle, off = h * (one**2 + two**2) / 2, h * one * two + r
    root = ((h * (two**2 - one**2) / 2) ** 2 + off**2) ** 0.5
    if variant == "largest":
        root = -root
    return middle - root + {"rho": rho, "no l2": 0.0}.get(variant, 2 * rho)


def least_damping(T, variant=""):
    values = torch.linalg.eigvalsh(T)
    off = (T - torch.diag(T.diagonal())).abs().sum(1)
    needed = {
        "diagonal": -T.diagonal().min(),
        "gershgorin": -(T.diagonal() - off).min(),
        "norm": values.abs().max(),
        "sign": values[0],
    }.get(variant, -values[0])
    return needed if variant == "no zero" else max(0.0, float(needed))


RIGHT = {
    "11.A": (3.2, 0.0405),
    "11.B": 0.0131,
    "11.1": visits,
    "11.2": (25, 65, 113, 26),
    "11.3": expected_best,
    "11.4": compare,
    "11.5": smallest,
    "11.6": least_damping,
}

WRONG = {
    "11.A": [
        (128_000, 0.04), (312.5, 0.04), (32, 0.04), (3.2, 0.96), (3.2, 4.05), (3.2, 0.32), 3.2,
        "three", visits,
    ],
    "11.B": [0.00599, 0.00972, 0.0228, 0.0107, 0.00529, 0.0263, 0.002, (0.01, 0.02), visits],
    "11.1": [
        *(
            lambda *a, variant=variant: visits(*a, variant=variant)
            for variant in (
                "passes", "sum", "limit", "one", "moved", "replaced", "complete", "no remainder",
            )
        ),
        lambda *a: visits(*a)[:2],
    ],
    "11.2": [
        (22, 65, 113, 26),
        (25, 35, 113, 26),
        (25, 73, 113, 26),
        (25, 65, 105, 26),
        (25, 65, 113, 29),
        (25, 65, 113, 25.25),
        (25, 65, 113),
    ],
    "11.3": [
        lambda *a, variant=variant: expected_best(*a, variant=variant)
        for variant in ("largest", "subsets", "mean", "best", "index")
    ],
    "11.4": [
        lambda *a, variant=variant: compare(*a, variant=variant)
        for variant in (
            "peek", "unpaired", "normal", "unpaired normal", "degrees", "one-sided", "no root",
            "sign",
        )
    ],
    "11.5": [
        lambda *a, variant=variant: smallest(*a, variant=variant)
        for variant in ("ggn", "sign", "h", "largest", "rho", "no l2")
    ],
    "11.6": [
        lambda T, variant=variant: least_damping(T, variant)
        for variant in ("diagonal", "gershgorin", "norm", "sign", "no zero")
    ],
}  # fmt: skip


def by_bisection(T):
    """The least damping by Cholesky factorisations; near zero where none is needed."""
    low, high = 0.0, float(T.abs().sum())
    for _ in range(200):
        middle = (low + high) / 2
        failed = torch.linalg.cholesky_ex(T + middle * torch.eye(len(T)).to(T)).info
        low, high = (middle, high) if failed else (low, middle)
    return high


ALSO = {"11.4": [lambda *a: compare(*a, variant="table")], "11.6": [by_bisection]}
TOLD = {"11.4": [(lambda *a: compare(*a, variant="whole"), "the whole width")]}
