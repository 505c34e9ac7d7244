"""Answers to the exercises of chapter 14: right ones, and the mistakes that students make."""

import torch
import torch.nn.functional as F

from bilevel_lite.tasks.pretraining import macro_f1


def masked_losses(z, y, variant=""):
    kept = y >= 0
    flat = y.clamp(min=0) if variant in ("zero", "zero sum") else y
    rows = F.cross_entropy(z.flatten(0, 1), flat.flatten(), reduction="none").view(y.shape)
    if variant == "slots":
        return rows.mean(1)
    if variant == "sum":
        return rows.sum(1)
    if variant == "zero":
        return rows.mean(1)
    if variant == "zero sum":
        return rows.sum(1) / kept.sum(1)
    if variant == "mean number":
        return rows.sum(1) / kept.sum(1).double().mean()
    if variant == "one":
        return rows[kept].mean()
    return rows.sum(1) / kept.sum(1)


def task_weights(lam, grads, b, shared, lr, variant=""):
    g, f = grads[:, shared], b[shared]
    if variant == "all":
        g, f = grads, b
    h = g @ f
    if variant != "dots":
        if variant != "first only":
            h = h / (b.norm() if variant == "long" else f.norm())
        if variant != "second only":
            h = h / (grads if variant == "long" else g).norm(dim=1)
    if variant == "jacobian":
        w = lam.softmax(0)
        h = (w.diag() - torch.outer(w, w)) @ h
    if variant == "weights":
        return lam.softmax(0) + lr * h
    moved = lam - lr * h if variant == "sign" else lam + lr * h
    return moved if variant == "lam" else moved.softmax(0)


def own_judge(a, H, c, theta, l2, variant=""):
    b = -c * a - 2 * l2 * theta
    b = {
        "no penalty": -c * a, "one l2": -c * a - l2 * theta, "plus": -c * a + 2 * l2 * theta,
        "no c": -a - 2 * l2 * theta, "alone": -2 * l2 * theta, "sign": -b,
    }.get(variant, b)  # fmt: skip
    if variant == "H":
        return -a @ H @ b
    return -a @ b if variant == "one step" else -a @ torch.linalg.solve(H, b)


def worth(guess, y, i, variant=""):
    after = guess.clone()
    after[i] = y[i]
    change = macro_f1(after, y) - macro_f1(guess, y)
    classes = len(torch.cat([guess, y]).unique())
    c = int(y[i])

    def own(g):
        return 2 * int(((g == y) & (y == c)).sum()) / int((g == c).sum() + (y == c).sum())

    mine = own(after) - own(guess)
    return 100 * {
        "accuracy": 1 / len(y), "share": change / 100, "own": mine / classes,
        "sum": change * classes, "alone": mine, "sign": -change,
    }.get(variant, change)  # fmt: skip


def memory(train, y, test, variant=""):
    strip = (lambda one: one) if variant == "exact" else str.strip
    given = (lambda one: one) if variant in ("exact", "test only") else str.strip
    known = {given(one): int(label) for one, label in zip(train, y, strict=True)}
    most = {"zero": 0, "none": -1}.get(variant, int(y.bincount().argmax()))
    if variant == "most":
        return torch.full((len(test),), most)
    return torch.tensor([known.get(strip(one), most) for one in test])


RIGHT = {
    "14.A": 0,
    "14.B": 1,
    "14.1": masked_losses,
    "14.2": task_weights,
    "14.3": own_judge,
    "14.4": worth,
    "14.5": memory,
}


def variants(function, *names):
    """The function with each mistake."""
    return [lambda *a, variant=variant: function(*a, variant=variant) for variant in names]


WRONG = {
    "14.A": [1.0, -0.3, (0, 0), "small", own_judge],
    "14.B": [-1, 0, 2, "plus", own_judge],
    "14.1": variants(masked_losses, "slots", "sum", "zero", "zero sum", "mean number", "one"),
    "14.2": variants(
        task_weights, "all", "dots", "first only", "second only", "long", "jacobian", "weights",
        "sign", "lam",
    ),
    "14.3": variants(
        own_judge, "sign", "no penalty", "one l2", "plus", "no c", "alone", "H", "one step"
    ),
    "14.4": variants(worth, "accuracy", "share", "own", "sum", "alone", "sign"),
    "14.5": variants(memory, "exact", "test only", "zero", "none", "most"),
}  # fmt: skip


def looser(train, y, test, how):
    """A memory that takes texts for one another that are not."""
    known = {how(one.strip()): int(label) for one, label in zip(train, y, strict=True)}
    most = int(y.bincount().argmax())
    return torch.tensor([known.get(how(one.strip()), most) for one in test])


def pieces(train, y, test):
    most = int(y.bincount().argmax())
    found = [[int(y[k]) for k, one in enumerate(train) if text.strip() in one] for text in test]
    return torch.tensor([labels[0] if labels else most for labels in found])


def first_label(train, y, test):
    known = {one.strip(): int(label) for one, label in zip(train, y, strict=True)}
    return torch.tensor([known.get(one.strip(), int(y[0])) for one in test])


TOLD = {
    "14.5": [
        (lambda *a: looser(*a, str.lower), "Capitals"),
        (lambda *a: looser(*a, lambda one: " ".join(one.split())), "Blanks inside"),
        (pieces, "A piece of a text"),
        (first_label, "not the first"),
        (lambda *a: memory(*a, variant="most"), "A text that was seen"),
        (lambda *a: memory(*a, variant="exact"), "Blanks at the ends"),
    ],
}
