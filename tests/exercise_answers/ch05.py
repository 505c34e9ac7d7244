"""Answers to the exercises of chapter 5: right ones, and the mistakes that students make."""

import torch


def inverse(A, B, V, delta, on_a=lambda pi, delta: pi * delta**0.5, on_b=None, sizes=True):
    on_b = on_b or (lambda pi, delta: delta**0.5 / pi)
    pi = ((A.trace() / (len(A) if sizes else 1)) / (B.trace() / (len(B) if sizes else 1))).sqrt()
    A = A + on_a(pi, delta) * torch.eye(len(A)).to(A)
    B = B + on_b(pi, delta) * torch.eye(len(B)).to(B)
    return torch.linalg.solve(A, torch.linalg.solve(B, V).T).T


def mc(logits, sigma, samples, generator, power=0.5, divide=None, labels=None):
    p, n = logits.softmax(1), len(logits)
    draws = p.multinomial(samples, replacement=True, generator=generator)
    if labels is not None:
        draws = labels(p, samples, generator)
    eye, total = torch.eye(p.shape[1]).to(p), 0
    for column in draws.T:
        s = sigma[:, None] ** power * (p - eye[column])
        total = total + s.T @ s
    return total / (n * samples if divide is None else divide(n, samples))


def centred(logits, sigma, samples, generator):  # (1 - 1/samples) times the right one
    draws = logits.softmax(1).multinomial(samples, replacement=True, generator=generator)
    share = torch.nn.functional.one_hot(draws, logits.shape[1]).to(logits).mean(1)
    h = torch.diag_embed(share) - share[:, :, None] * share[:, None]
    return (sigma[:, None, None] * h).mean(0)


def expectation(logits, sigma, samples, generator):
    p = logits.softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return (sigma[:, None, None] * h).mean(0)


def layer_solve(a, gamma, sigma, b, delta, power=0.5, extra=1, transposed=False):
    n, d1, d2 = len(a), gamma.shape[1], a.shape[1]
    gamma = sigma[:, None] ** power * gamma / extra
    A, B = a.T @ a / n, gamma.T @ gamma / n
    V = b.view(d2, d1).T if transposed else b.view(d1, d2)
    A, B = A + delta * torch.eye(d2).to(A), B + delta * torch.eye(d1).to(B)
    return torch.linalg.solve(A, torch.linalg.solve(B, V).T).T.flatten()


def full_damping(A, B, V, delta):
    dense = torch.kron(B, A) + delta * torch.eye(V.numel()).to(A)
    return torch.linalg.solve(dense, V.flatten()).view_as(V)


RIGHT = {
    "5.A": (9, 72),
    "5.B": ("all", "no", "blocks", "blocks"),
    "5.1": (5, 32, 10, 56),
    "5.2": (401, 32, 401**2 + 32**2, (401 * 32) ** 2),
    "5.3": inverse,
    "5.4": mc,
    "5.5": layer_solve,
    "5.6": (20, 500.5, 2.5, 1),
}

WRONG = {
    "5.A": [(10, 80), (10, 72), (9, 80), (1, 72), (9, 8), (9, 9), (72, 9), (9, 64), 9, "nine"],
    "5.B": [
        ("all", "all", "blocks", "blocks"),
        ("blocks", "no", "blocks", "blocks"),
        ("all", "no", "all", "blocks"),
        ("all", "no", "blocks", "all"),
        ("all", "no", "blocks"),
        ("all", "maybe", "blocks", "blocks"),
        1,
    ],
    "5.1": [
        (5, 10, 32, 56),
        (5, 7, 40, 60),
        (5, 8, 10, 14),
        (5, 8),
        "5 32 10 56",
        7,
    ],
    "5.2": [
        (32, 401, 401**2 + 32**2, (401 * 32) ** 2),
        (400, 32, 400**2 + 32**2, (400 * 32) ** 2),
        (17, 32, 17**2 + 32**2, (17 * 32) ** 2),
        (401, 32, 401 + 32, (401 * 32) ** 2),
        (401, 32, 401**2 + 32**2, 401 * 32),
        (401, 32),
    ],
    "5.3": [
        lambda *a: inverse(
            *a, on_a=lambda pi, delta: delta**0.5 / pi, on_b=lambda pi, delta: pi * delta**0.5
        ),
        lambda *a: inverse(
            *a, on_a=lambda pi, delta: pi * delta, on_b=lambda pi, delta: delta / pi
        ),
        lambda *a: inverse(*a, on_a=lambda pi, d: d**0.5, on_b=lambda pi, d: d**0.5),
        lambda *a: inverse(*a, on_a=lambda pi, d: d, on_b=lambda pi, d: d),
        lambda *a: inverse(*a, sizes=False),
        lambda *a: inverse(*a, on_a=lambda pi, d: 0, on_b=lambda pi, d: 0),
        full_damping,
        lambda *a: inverse(*a).T,
        lambda A, B, V, delta: torch.linalg.solve(B, V),
    ],
    "5.4": [
        lambda *a: mc(*a, power=1),
        lambda *a: mc(*a, power=0),
        lambda *a: mc(*a, power=0.25),
        lambda *a: mc(*a, divide=lambda n, m: n),
        lambda *a: mc(*a, divide=lambda n, m: m),
        lambda *a: mc(*a, divide=lambda n, m: n * m**2),
        lambda *a: mc(
            *a, labels=lambda p, m, g: torch.randint(p.shape[1], (len(p), m), generator=g)
        ),
        lambda *a: mc(*a, labels=lambda p, m, g: p.argmax(1)[:, None].expand(-1, m)),
        expectation,
        centred,
        lambda *a: mc(*a)[0],
    ],
    "5.5": [
        lambda *a: layer_solve(*a, power=1, extra=len(a[0]), transposed=True),
        lambda *a: layer_solve(*a, power=1),
        lambda *a: layer_solve(*a, extra=len(a[0])),
        lambda *a: layer_solve(*a, transposed=True),
        lambda *a: layer_solve(*a, power=0),
        lambda *a: layer_solve(*a, power=1, transposed=True),
        lambda *a: layer_solve(*a).view(3, 5),
    ],
    "5.6": [
        (10, 500.5, 2.5, 1),
        (20, 1000, 4, 1),
        (20, 500.5, 4, 1),
        (20, 500.5, 2.5, 0.5),
        (20, 500.5, 1, 1),
        (20, 500.5),
    ],
}
