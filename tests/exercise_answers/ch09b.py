"""Answers to the exercises of chapter 9b: right ones, and the mistakes that students make."""

import torch


def made_of(h, direct, implicit, variant=""):
    P = torch.stack([direct, implicit], 1)
    a, c = torch.linalg.lstsq(P, h[:, None]).solution[:, 0]
    if variant == "alone":
        a, c = (h @ part / (part @ part) for part in (direct, implicit))
    left = (h - a * direct - c * implicit).norm()
    if variant == "of h":
        return a, c, left / h.norm()
    if variant == "length":
        return a, c, left
    if variant == "exact":
        left = (h - direct - implicit).norm()
    left = left / (direct + implicit).norm()
    if variant == "sign":
        c = -c
    if variant == "order":
        return c, a, left
    return (a, c) if variant == "two" else (a, c, left**2 if variant == "square" else left)


def diagnose(h, lam, direct, implicit, variant=""):
    exact, slope = direct + implicit, lam.sigmoid() * (1 - lam.sigmoid())

    def same(one, other):
        return float((one - other).norm()) < 1e-6 * float(other.norm())

    a, c, rest = (float(part) for part in made_of(h, direct, implicit))
    if same(h, exact):
        return "right"
    if variant == "chain of lam":
        slope = lam
    if variant != "no chain" and same(h * slope, exact):
        return "chain rule"
    if variant == "cosine" and float(h @ exact / h.norm() / exact.norm()) > 0.9:
        return "factor"
    if rest > (0 if variant == "no tolerance" else 1e-6):
        return "wrong" if variant == "words" else "order"
    if variant != "no direct" and abs(a) < 1e-6:
        return "direct term"
    if abs(a - 1) < 1e-6:
        return "factor"
    return "factor" if variant == "no sum" else "sum"


def repaired(H, J, b, direct, damping, stale=False, old=False, times=1, part=1, sign=-1):
    v, r, p = torch.zeros_like(b), b, b
    for _ in range(3 * len(b)):
        Hp = H(p) + times * damping * p
        step = r @ r / (p @ Hp)
        new, rest = v + step * p, r - step * Hp
        if rest.norm() < 1e-12 * b.norm():
            v = v if stale else new
            break
        v, p, r = new, (r if old else rest) + (rest @ rest) / (r @ r) * p, rest
    return part * direct + sign * J(v)


def finds(solve, variant=""):
    generator = torch.Generator().manual_seed(5)
    for d in (1, 2, 6, 20):
        for scale in (1.0, 1e3, 1e-3) if variant != "one scale" else (1.0,):
            Q = torch.linalg.qr(torch.randn(d, d, generator=generator).double())[0]
            random = Q @ torch.diag(torch.linspace(0.02, 1, d).double()) @ Q.T
            for H in (torch.eye(d).double(), random):
                if variant == "identity" and H is random:
                    continue
                b = torch.randn(d, generator=generator).double()
                v = solve(lambda p, H=scale * H: H @ p, b)
                left = (scale * H @ v - b).norm() / b.norm()
                if not left < (1e-15 if variant == "strict" else 1e-5):
                    return True
        if variant == "one size":
            break
    return False


RIGHT = {
    "9b.A": (0.8, 2.0),
    "9b.B": (6, 12, 13),
    "9b.1": made_of,
    "9b.2": diagnose,
    "9b.3": repaired,
    "9b.4": finds,
}

WRONG = {
    "9b.A": [(1.25, 2.0), (0.6, 2.0), (0.75, 2.0), (0.5, 2.0), (0.8, 0.5), (0.8, 1.0), 0.8],
    "9b.B": [(6, 12, 9), (3, 6, 12), (6, 6, 12), (1, 2, 3), (6, 12, 19), (6, 12, 25), 6],
    "9b.1": [
        lambda *a, variant=variant: made_of(*a, variant=variant)
        for variant in ("alone", "of h", "length", "exact", "sign", "order", "two", "square")
    ],
    "9b.2": [
        lambda *a, variant=variant: diagnose(*a, variant=variant)
        for variant in (
            "chain of lam", "no chain", "cosine", "no tolerance", "words", "no direct", "no sum",
        )
    ],
    "9b.3": [
        lambda *a, options=options: repaired(*a, **options)
        for options in (
            {"stale": True}, {"old": True}, {"times": 2}, {"part": 0}, {"sign": 1}, {"times": 0},
            {"stale": True, "part": 0}, {"times": 2, "part": 0}, {"stale": True, "times": 2},
        )
    ],
    "9b.4": [
        lambda solve: True,
        lambda solve: False,
        *(
            lambda solve, variant=variant: finds(solve, variant)
            for variant in ("one scale", "identity", "strict", "one size")
        ),
    ],
}  # fmt: skip
