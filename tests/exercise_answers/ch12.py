"""Answers to the exercises of chapter 12: right ones, and the mistakes that students make."""

from math import ceil

import torch

from bilevel_lite import data


def vote(weak, C, y, variant=""):
    counts = torch.stack([(weak == c).sum(1) for c in range(C)], 1)
    tied = counts == counts.max(1, keepdim=True).values
    labels = counts.argmax(1)
    right = tied[torch.arange(len(y)), y]
    chance = right.double() / tied.sum(1)
    if variant == "last":
        labels = C - 1 - counts.flip(1).argmax(1)
    if variant == "abstain":
        labels = data.majority(weak, C, "first", uncovered="abstain")
    if variant == "first":
        return labels, float((labels == y).double().mean())
    if variant == "always":
        chance = right.double()
    if variant == "covered":
        chance = chance[(weak >= 0).any(1)]
    if variant == "never":
        chance = chance * (weak >= 0).any(1)
    return labels if variant == "alone" else (labels, float(chance.mean()))


def factors(a, gamma, mask, variant=""):
    n, tokens, rows = len(a), int(mask.sum()), mask.numel()
    kept, probes = a[mask], gamma[mask]
    A, B = kept.T @ kept / tokens, probes.T @ probes / n
    if variant == "padding":
        A = torch.einsum("iqj,iqk->jk", a, a) / rows
    if variant == "padding in the sum":
        A = torch.einsum("iqj,iqk->jk", a, a) / tokens
    if variant == "rows":
        A = A * tokens / rows
    if variant == "texts":
        A = A * tokens / n
    if variant == "pairs":
        summed = (a * mask[..., None]).sum(1)
        A = summed.T @ summed / tokens
    if variant == "B tokens":
        B = B * n / tokens
    if variant == "B sum":
        B = B * n
    if variant == "B pairs":
        B = gamma.sum(1).T @ gamma.sum(1) / n
    return A if variant == "alone" else (A, B)


def head_block(a, mask, omega, variant=""):
    share = mask.double() / mask.sum(1, keepdim=True)
    means = a.mean(1) if variant == "padding" else (share[..., None] * a).sum(1)
    moments = means[..., None] * means[:, None]
    if variant == "tokens":
        moments = torch.einsum("iq,iqj,iqk->ijk", share, a, a)
    if variant == "factors":
        return torch.kron(omega.mean(0), moments.mean(0))
    pairs = list(zip(omega, moments, strict=True))
    blocks = [torch.kron(m, o) if variant == "order" else torch.kron(o, m) for o, m in pairs]
    return torch.stack(blocks).sum(0) / (1 if variant == "sum" else len(a))


def pool(hidden, ids, query, pad, variant=""):
    mask = ids != (0 if variant == "zero" else pad)
    scores = hidden @ query
    if variant == "plain":
        return (scores.softmax(1)[..., None] * hidden).sum(1)
    if variant == "product":
        return ((scores * mask).softmax(1)[..., None] * hidden).sum(1)
    if variant == "after":
        return (scores.softmax(1)[..., None] * hidden * mask[..., None]).sum(1)
    scores = scores.masked_fill(~mask, -1e30)
    return (scores.softmax(0 if variant == "texts" else 1)[..., None] * hidden).sum(1)


def texts_needed(both, one, other, variant=""):
    gap, first, second = one - other, both + one, both + other
    paired = one + other - (0 if variant == "square" else gap**2)
    apart = first * (1 - first) + second * (1 - second)
    if variant == "one":
        apart = first * (1 - first)
    if variant == "swapped":
        paired, apart = apart, paired
    z = (1.96 / gap) ** 2
    if variant == "down":
        return int(z * paired), int(z * apart)
    if variant == "no square":
        return abs(1.96 / gap) * paired**0.5, abs(1.96 / gap) * apart**0.5
    return ceil(z * paired), ceil(z * apart)


MAPS = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
ENTRIES = sum((i + 1) ** 2 + o**2 for i, o in MAPS)
PARAMETERS = sum((i + 1) * o for i, o in MAPS)
GIB = (385 * 1536) ** 2 * 4 / 2**30

RIGHT = {
    "12.A": ("same", "longer", 0.865),
    "12.B": (1.667, 5.16),
    "12.1": vote,
    "12.2": factors,
    "12.3": (1537, ENTRIES, PARAMETERS, GIB),
    "12.4": head_block,
    "12.5": pool,
    "12.6": texts_needed,
}

WRONG = {
    "12.A": [
        *(("same", "longer", share) for share in (0.135, 86.5, 6.41, 0.5, "most", (0.8, 0.1))),
        ("longer", "longer", 0.865), ("same", "same", 0.865), ("same", "shorter", 0.865),
        ("same", 1.55, 0.865), ("same", "longer"), 0.865, "most", vote,
    ],
    "12.B": [
        (1 / 60, 5.16), (0.833, 5.16), (0.6, 5.16), (1.667, 0.267), (1.667, 2.07), (1.667, 11.5),
        (1.667, 3.65), (1.667, 0.0516), 1.667, vote,
    ],
    "12.1": [
        lambda *a, variant=variant: vote(*a, variant=variant)
        for variant in ("last", "abstain", "first", "always", "covered", "never", "alone")
    ],
    "12.2": [
        lambda *a, variant=variant: factors(*a, variant=variant)
        for variant in (
            "padding", "padding in the sum", "rows", "texts", "pairs", "B tokens", "B sum",
            "B pairs", "alone",
        )
    ],
    "12.3": [
        (1536, ENTRIES, PARAMETERS, GIB),
        (385, ENTRIES, PARAMETERS, GIB),
        (1537, sum(i**2 + o**2 for i, o in MAPS), PARAMETERS, GIB),
        (1537, sum((i + 1) ** 2 for i, _ in MAPS), PARAMETERS, GIB),
        (1537, ENTRIES, sum(i * o for i, o in MAPS), GIB),
        (1537, ENTRIES, PARAMETERS, GIB / 4),
        (1537, ENTRIES, PARAMETERS, GIB * (384 / 385) ** 2),
        (1537, ENTRIES, PARAMETERS, PARAMETERS**2 * 4 / 2**30),
        (1537, ENTRIES, PARAMETERS),
    ],
    "12.4": [
        lambda *a, variant=variant: head_block(*a, variant=variant)
        for variant in ("padding", "tokens", "factors", "order", "sum")
    ],
    "12.5": [
        lambda *a, variant=variant: pool(*a, variant=variant)
        for variant in ("zero", "plain", "product", "after", "texts")
    ],
    "12.6": [
        lambda *a, variant=variant: texts_needed(*a, variant=variant)
        for variant in ("square", "one", "swapped", "no square", "down")
    ],
}  # fmt: skip


def bugs(hidden, ids, query, pad, zero=True, times=True, texts=True):
    """The function as it is handed out, or with some of its mistakes mended."""
    mask, scores = ids != (0 if zero else pad), hidden @ query
    scores = scores * mask if times else scores.masked_fill(~mask, -1e30)
    return (scores.softmax(0 if texts else 1)[..., None] * hidden).sum(1)


def per_token(a, mask, omega):
    """KFAC of the head that meets every token."""
    lengths = mask.sum(1)[:, None, None]
    return torch.kron((omega / lengths).mean(0), a[mask].T @ a[mask] / mask.sum())


def of_sums(a, mask, omega):
    sums = (mask[..., None] * a).sum(1)
    return torch.stack(
        [torch.kron(o, torch.outer(s, s)) for o, s in zip(omega, sums, strict=True)]
    ).mean(0)


ALSO = {"12.3": [(1537, ENTRIES, PARAMETERS, 1303), (1537, ENTRIES, PARAMETERS, 1302.8)]}
TOLD = {
    "12.3": [((1537, ENTRIES, PARAMETERS, (1537 * 384) ** 2 * 4 / 2**30), "the map back")],
    "12.4": [(per_token, "KFAC of the head"), (of_sums, "not their sum")],
    "12.5": [
        (bugs, "padding's id and the score of padding and the dimension"),
        (lambda *a: bugs(*a, zero=False), "the score of padding and the dimension"),
        (lambda *a: bugs(*a, times=False), "padding's id and the dimension"),
        (lambda *a: bugs(*a, texts=False), "padding's id and the score"),
    ],
    "12.6": [(lambda *a: [n - 0.5 for n in texts_needed(*a)], "no parts of texts")],
}
