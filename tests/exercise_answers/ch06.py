"""Answers to the exercises of chapter 6: right ones, and the mistakes that students make."""

import torch


def best_pi(A, B):
    d2, d1 = len(A), len(B)
    return ((d1**0.5 * A.norm()) / (d2**0.5 * B.norm())).sqrt()


def path(A, B, V, taus, damp=lambda beta, alpha, tau: torch.outer(beta, alpha) + tau, back=True):
    (alpha, U_A), (beta, U_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    inside = U_B.T @ V @ U_A
    out = [inside / damp(beta, alpha, tau) for tau in taus]
    return torch.stack([U_B @ v @ U_A.T for v in out] if back else out)


def path_by_solves(A, B, V, taus):
    block, eye = torch.kron(B, A), torch.eye(V.numel()).to(A)
    out = [torch.linalg.solve(block + tau * eye, V.flatten()).view_as(V) for tau in taus]
    return torch.stack(out)


def path_by_one_eigh(A, B, V, taus):
    values, U = torch.linalg.eigh(torch.kron(B, A))
    return torch.stack([(U @ (U.T @ V.flatten() / (values + tau))).view_as(V) for tau in taus])


def path_turned(A, B, V, taus, how):
    (alpha, U_A), (beta, U_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    into = {"back": U_B.T @ V @ U_A, "into": U_B @ V @ U_A, "none": V}[how]
    out = [into / (torch.outer(beta, alpha) + tau) for tau in taus]
    if how == "into":
        return torch.stack(out)
    return torch.stack([U_B @ v @ (U_A if how == "back" else U_A.T) for v in out])


def path_again_and_again(A, B, V, taus):
    return torch.cat([path(A, B, V, [tau]) for tau in taus])


def block_solve(
    A, B, V, delta, l2, tau=lambda delta, l2: delta + 2 * l2, power=0.5, inside=0.0, split=1
):
    eye_A, eye_B, t = torch.eye(len(A)).to(A), torch.eye(len(B)).to(B), tau(delta, l2)
    A, B = A + inside * l2 * eye_A, B + inside * l2 * eye_B
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt() ** split
    A, B = A + pi * t**power * eye_A, B + t**power / pi * eye_B
    return torch.linalg.solve(A, torch.linalg.solve(B, V).T).T


def choose(H_1, H_2, b, dampings, q=lambda v, H_1, H_2, b: 0.5 * v @ H_2 @ v - b @ v, top=False):
    eye = torch.eye(len(b)).to(b)
    scores = [
        float(q(torch.linalg.solve(H_1 + t * eye, b), H_1, H_2, b)) for t in dampings
    ]  # fmt: skip
    return dampings[scores.index((max if top else min)(scores))]


singular = torch.diag(torch.tensor([1.0, 0.0]))
eye = torch.eye(2)

RIGHT = {
    "6.A": "b",
    "6.B": "factored",
    "6.1": (0.8, 5, 0.6106),
    "6.2": best_pi,
    "6.3": path,
    "6.4": block_solve,
    "6.5": (singular, singular, torch.tensor([[0.0, 1.0], [0.0, 0.01]]), 1e-8),
    "6.6": choose,
}

WRONG = {
    "6.A": ["a", "c", "d", "spring", 2],
    "6.B": ["full", "heuristic", "exact", "all", 3],
    "6.1": [
        (0.2, 5, 0.6106),
        (0.8, 25, 0.6106),
        (0.8, 7, 0.6106),
        (0.8, 5, 1.0),
        (0.8, 5, 0.0),
        (0.8, 5),
        "0.8 5 0.61",
    ],
    "6.2": [
        lambda A, B: ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt(),
        lambda A, B: best_pi(A, B) ** 2,
        lambda A, B: 1 / best_pi(A, B),
        lambda A, B: (A.norm() / B.norm()).sqrt(),
        lambda A, B: (len(B) * A.norm() / (len(A) * B.norm())).sqrt(),
        lambda A, B: (len(A) ** 0.5 * A.norm() / (len(B) ** 0.5 * B.norm())).sqrt(),
        lambda A, B: torch.ones(3),
    ],
    "6.3": [
        lambda *a: path(*a, damp=lambda b, a, t: torch.outer(b + t**0.5, a + t**0.5)),
        lambda *a: path(*a, damp=lambda b, a, t: torch.outer(b + t, a + t)),
        lambda *a: path(*a, damp=lambda b, a, t: torch.outer(b, a)),
        lambda *a: path(*a, back=False),
        lambda *a: path(*a)[0],
        lambda A, B, V, taus: path_turned(A, B, V, taus, "back"),
        lambda A, B, V, taus: path_turned(A, B, V, taus, "into"),
        lambda A, B, V, taus: path_turned(A, B, V, taus, "none"),
        path_by_one_eigh,
        path_by_solves,
        path_again_and_again,
    ],
    "6.4": [
        lambda *a: block_solve(*a, tau=lambda delta, l2: delta, power=1, inside=1),
        lambda *a: block_solve(*a, tau=lambda delta, l2: delta, inside=1),
        lambda *a: block_solve(*a, tau=lambda delta, l2: delta, inside=2),
        lambda *a: block_solve(*a, tau=lambda delta, l2: delta + l2),
        lambda *a: block_solve(*a, tau=lambda delta, l2: delta + l2, power=1),
        lambda *a: block_solve(*a, power=1),
        lambda *a: block_solve(*a, inside=1),
        lambda *a: block_solve(*a, tau=lambda delta, l2: delta),
        lambda *a: block_solve(*a).T,
        lambda *a: block_solve(*a, split=-1),
        lambda *a: block_solve(*a, split=0),
        lambda *a: block_solve(*a, tau=lambda delta, l2: (delta**0.5 + (2 * l2) ** 0.5) ** 2),
        lambda A, B, V, delta, l2: path(A, B, V, [delta + 2 * l2])[0],
    ],
    "6.5": [
        (eye, eye, torch.tensor([[0.0, 1.0], [0.0, 0.01]]), 1e-8),
        (singular, singular, torch.ones(2, 2), 1e-8),
        lambda: (singular, singular, torch.ones(2, 2), 1e-8),
        (singular, singular, torch.tensor([[0.0, 1.0], [0.0, 0.01]]), 1.0),
        (-singular, singular, torch.ones(2, 2), 1e-8),
        (0 * eye, singular, torch.ones(2, 2), 1e-8),
        (singular, singular, torch.ones(2, 3), 1e-8),
        (singular, singular, torch.zeros(2, 2), 1e-8),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), singular, torch.ones(2, 2), 1e-8),
        (singular, singular, 1e-8),
        7,
    ],
    "6.6": [
        lambda *a: choose(*a, q=lambda v, H_1, H_2, b: 0.5 * v @ H_1 @ v - b @ v),
        lambda *a: choose(*a, top=True),
        lambda H_1, H_2, b, dampings: choose(H_2, H_1, b, dampings),
        lambda *a: choose(*a, q=lambda v, H_1, H_2, b: v @ H_2 @ v - b @ v),
        lambda *a: choose(*a, q=lambda v, H_1, H_2, b: (H_2 @ v - b).norm()),
        lambda *a: choose(*a, q=lambda v, H_1, H_2, b: (v - torch.linalg.solve(H_2, b)).norm()),
        lambda H_1, H_2, b, dampings: 0.1,
        lambda H_1, H_2, b, dampings: dampings[0],
        lambda H_1, H_2, b, dampings: choose((H_1 + H_2) / 2, (H_1 + H_2) / 2, b, dampings),
        lambda *a: a[3].index(choose(*a)),
        lambda *a: 0.123,
        lambda *a: torch.ones(2),
    ],
}
