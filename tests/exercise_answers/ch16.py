"""Answers to the exercises of chapter 16: right ones, and the mistakes that students make."""

import torch
import torch.nn.functional as F


def worst_wrong(z, y, variant=""):
    mine = F.one_hot(y, z.shape[1]).bool()
    if variant == "probabilities":
        each = -z.softmax(1).log()
        return each.masked_fill(mine, -torch.inf).amax(1).mean()
    if variant == "all labels":
        return (z.logsumexp(1) - z.amin(1)).mean()
    if variant == "likeliest":
        return (z.logsumexp(1) - z.masked_fill(mine, -torch.inf).amax(1)).mean()
    if variant == "mean":
        return (z.logsumexp(1) - z.masked_fill(mine, 0).sum(1) / (z.shape[1] - 1)).mean()
    if variant in ("label", "minus label"):
        return F.cross_entropy(z, y) * (-1 if variant == "minus label" else 1)
    least = z.masked_fill(mine, torch.inf).amin(1)
    if variant == "normaliser":
        return (z.masked_fill(mine, -torch.inf).logsumexp(1) - least).mean()
    value = z.logsumexp(1) - least
    return {"sum": value.sum(), "sign": -value.mean()}.get(variant, value.mean())


def slope(z, y, variant=""):
    C, prob = z.shape[1], z.softmax(1)
    mine = F.one_hot(y, C).bool()
    at = z.masked_fill(mine, torch.inf).argmin(1)
    if variant == "label":
        at = y
    if variant == "likeliest":
        at = z.masked_fill(mine, -torch.inf).argmax(1)
    if variant == "all labels":
        at = z.argmin(1)
    if variant == "no normaliser":
        prob = 0 * prob
    out = (prob - F.one_hot(at, C)) / (1 if variant == "sum" else len(y))
    return -out if variant == "sign" else out


def sign_step(x, lam, slope, r, step, variant=""):
    move = slope if variant == "slope" else slope.sign()
    length = r * step if variant == "step times r" else step
    if variant == "project first":
        lam = lam.clamp(-1, 1)
    new = lam + length * move if variant == "ascent" else lam - length * move
    if variant in ("project first", "no projection"):
        return new
    bound = r if variant == "bounded by r" else torch.inf if variant == "no radius" else 1
    new = new.clamp(-bound, bound)
    if variant != "no range":
        new = torch.minimum(torch.maximum(new, -x / r), (1 - x) / r)
    return x + r * new if variant == "images" else new


def envelope(a, l2, lam, e, variant=""):
    star, truth = a * lam / (a + 2 * l2), 2 * a * l2 * lam / (a + 2 * l2)
    out = [star, truth, -a * e]
    other = {
        "lam": (0, lam), "one l2": (0, a * lam / (a + l2)), "swapped": (0, truth / a),
        "zero": (1, 0.0), "sign": (1, -truth), "at 0": (1, a * lam), "through": (1, a * star),
        "error sign": (2, a * e), "gradient": (2, truth - a * e), "square": (2, -a / 2 * e**2),
        "no a": (2, -e), "none": (2, 0.0),
    }  # fmt: skip
    if variant in other:
        place, value = other[variant]
        out[place] = value
    return out[:2] if variant == "two" else out


def published(x, y, lam, r, order, variant=""):
    if variant == "no noise":
        return x[order], y[order]
    noise = lam if variant == "no radius" else r * lam
    images = x + noise
    if variant in ("noise of others", "as given"):
        images = x[order] + noise
    if variant != "no clamp":
        images = images.clamp(0, 1)
    if variant in ("floor", "as given"):
        images = (255 * images).floor() / 255
    elif variant != "no bits":
        images = (255 * images).round() / 255
    if variant not in ("noise of others", "as given", "unshuffled"):
        images = images[order]
    labels = {"labels": y, "as given": y, "back": y[order.argsort()]}.get(variant, y[order])
    return images if variant == "alone" else (images, labels)


RIGHT = {
    "16.A": (2500 * 3072, 250 * 3072),
    "16.B": (5, 50),
    "16.1": worst_wrong,
    "16.2": slope,
    "16.3": sign_step,
    "16.4": envelope,
    "16.5": published,
}


def variants(function, *names):
    """The function with each mistake."""
    return [lambda *a, variant=variant: function(*a, variant=variant) for variant in names]


WRONG = {
    "16.A": [
        (2500 * 1024, 768_000), (3072, 768_000), (2500, 768_000), (7_680_000, 7_680_000),
        (7_680_000, 250), (7_680_000, 256_000), 7_680_000, "many",
    ],
    "16.B": [(10, 100), (1, 10), (5, 5), (5, 10), (5, 1250), 5, slope],
    "16.1": variants(
        worst_wrong, "probabilities", "all labels", "likeliest", "mean", "label", "minus label",
        "normaliser", "sum", "sign",
    ),
    "16.2": variants(slope, "label", "likeliest", "all labels", "no normaliser", "sum", "sign"),
    "16.3": variants(
        sign_step, "ascent", "slope", "no range", "bounded by r", "no radius", "step times r",
        "images", "project first",
    ),
    "16.4": variants(
        envelope, "lam", "one l2", "swapped", "zero", "sign", "at 0", "through", "error sign",
        "gradient", "square", "no a", "none", "two",
    ),
    "16.5": variants(
        published, "no noise", "no radius", "noise of others", "as given", "no clamp", "floor",
        "no bits", "unshuffled", "labels", "back", "alone",
    ),
}  # fmt: skip

TOLD = {"16.3": [(lambda *a: sign_step(*a, variant="no projection"), "is not projected")]}
