"""Answers to the exercises of chapter 8: right ones, and the mistakes that students make."""

import torch


def corrected(beta, t):
    return (1 - beta) / (1 + beta) * (1 + beta**t) / (1 - beta**t)


def eigenvalues(a, g, U_A, U_B):
    rotated = torch.einsum("cj,nct,npt,pk->njk", U_B, g, a, U_A)
    return rotated.square().mean(0)


def early(a, g, U_A, U_B):
    x, z = torch.einsum("cj,nct->njt", U_B, g), torch.einsum("pk,npt->nkt", U_A, a)
    return torch.einsum("njt,nkt->jk", x.square(), z.square()) / len(a)


def solve(
    a, gamma, V, delta, kfac=False, forward=False, power=1, unit=30, back=True,
):  # fmt: skip
    U_A = torch.linalg.eigh(a.T @ a / len(a))[1]
    U_B = torch.linalg.eigh(gamma.T @ gamma / len(a))[1]
    x, z = (gamma @ U_B).square(), (a @ U_A).square()
    Lam = torch.outer(x.mean(0), z.mean(0)) if kfac else x.T @ z / unit
    V = U_B @ V @ U_A if forward else U_B.T @ V @ U_A
    V = V / (Lam + delta**power)
    return U_B @ V @ U_A.T if back else V


def builds(thetas, limit, since="build", relative="build", first=True):
    built = [0]
    for k in range(1, len(thetas)):
        origin = thetas[{"build": built[-1], "last": k - 1, "start": 0}[since]]
        size = {"build": origin.norm(), "new": thetas[k].norm(), "none": 1}[relative]
        if (thetas[k] - origin).norm() / size > limit:
            built.append(k)
    return built if first else built[1:]


RIGHT = {
    "8.A": 0.2069,
    "8.B": "full",
    "8.1": (0.95**20, 90, 39),
    "8.2": corrected,
    "8.3": eigenvalues,
    "8.4": solve,
    "8.5": (0.5, 0.25),
    "8.6": builds,
}

WRONG = {
    "8.A": [0.0101, 0.199, 0.446, 0.455, 20.7, 0.1, (0.2, 0.2), "a fifth"],
    "8.B": ["heuristic", "both", "none", "exact", 3],
    "8.1": [
        (0.05 * 0.95**20, 90, 39),
        (0.95, 90, 39),
        (0.358, 89, 39),
        (0.358, 89.78, 39),
        (0.358, 90, 20),
        (0.358, 90, 0.0256),
        (0.358, 90),
        0.358,
    ],
    "8.2": [
        lambda b, t: b ** (2 * t) + (1 - b) / (1 + b) * (1 - b ** (2 * t)),
        lambda b, t: (1 - b) / (1 + b) * (1 - b ** (2 * t)),
        lambda b, t: (1 - b) / (1 + b) * (1 + b**t),
        lambda b, t: (1 - b) / (1 + b),
        lambda b, t: corrected(b, t) ** 0.5,
        lambda b, t: "half",
    ],
    "8.3": [
        early,
        lambda a, g, *u: eigenvalues(a, g, *u) / a.shape[2] ** 2,
        lambda a, g, *u: eigenvalues(a, g, *u) / a.shape[2],
        lambda a, g, *u: eigenvalues(a, g, *u) * len(a),
        lambda a, g, U_A, U_B: eigenvalues(a, g, U_A.T, U_B.T),
        lambda a, g, U_A, U_B: torch.einsum("nct,npt->ncp", g, a).square().mean(0),
        lambda a, g, *u: eigenvalues(a.mean(0)[None], g.mean(0)[None], *u),
        lambda a, g, *u: eigenvalues(a, g, *u).T,
    ],
    "8.4": [
        lambda *a: solve(*a, kfac=True, forward=True, power=0.5),
        lambda *a: solve(*a, kfac=True),
        lambda *a: solve(*a, forward=True),
        lambda *a: solve(*a, power=0.5),
        lambda *a: solve(*a, kfac=True, power=0.5),
        lambda *a: solve(*a, power=2),
        lambda *a: solve(*a, unit=1),
        lambda *a: solve(*a, unit=900),
        lambda *a: solve(*a, back=False),
    ],
    "8.5": [
        (2, 0.25),
        (0.5, 4),
        (0.125, 0.25),
        (0.5, 0.5),
        (1 / 8**0.5, 1 / 8),
        0.5,
    ],
    "8.6": [
        lambda t, limit: builds(t, limit, since="last"),
        lambda t, limit: builds(t, limit, since="start"),
        lambda t, limit: builds(t, limit, relative="new"),
        lambda t, limit: builds(t, limit, relative="none"),
        lambda t, limit: builds(t, limit, first=False),
        lambda t, limit: len(builds(t, limit)),
        lambda t, limit: list(range(len(t))),
        lambda t, limit: [0],
    ],
}
