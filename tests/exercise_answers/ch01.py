"""Answers to the exercises of chapter 1: right ones, and the mistakes that students make."""

import torch

from bilevel_lite.products import cross_vp, gradient, hessian


def toy(lam, direct=1 / 10, sign=-1, inner=True):
    e = torch.exp(lam)
    theta = 3 / (1 + e)
    return direct + sign * (e if inner else 1) * theta * (theta - 1) / (1 + e)


def ridge(
    lam, train, validation, pull, centre, direct=1, sign=-1, rows=None, factor=True,
    summed=(False, False, False),
):  # fmt: skip
    (X, y), (X_val, y_val) = train, validation
    n_theta, n_y, n_v = (1 if one else len(y) for one in summed)
    H_theta, H = (X.T @ X / n + torch.diag(lam.exp()) for n in (n_theta, n_v))
    theta = torch.linalg.solve(H_theta, X.T @ y / n_y)
    b = X_val.T @ (X_val @ theta - y_val) / (rows(train, validation) if rows else len(y_val))
    v = torch.linalg.solve(H, b)
    return direct * pull * (lam - centre) + sign * (lam.exp() if factor else 1) * theta * v


def shared(lam, train, validation):
    return ridge(lam.expand(train[0].shape[1]), train, validation, 0.0, 0.0)


def repaired(
    problem, lam, theta, train, validation, curvature=("inner", "train"), direct=1, sign=-1
):
    _, partial, b = gradient(problem.outer_loss, lam, theta, validation)
    loss = problem.inner_loss if curvature[0] == "inner" else problem.outer_loss
    H = hessian(loss, lam, theta, train if curvature[1] == "train" else validation)
    v = torch.linalg.solve(H, b)
    return direct * partial + sign * cross_vp(problem.inner_loss, lam, theta, train, v)


def weights(
    sigma,
    train,
    validation,
    l2,
    sign=-1,
    divide=True,
    in_h=True,
    in_j=False,
    in_theta=True,
    twice=2,
):
    (X, y), (X_val, y_val) = train, validation
    n, eye = len(y), torch.eye(train[0].shape[1]).to(train[0])
    one = torch.ones_like(sigma)
    H, H_theta = [
        X.T @ ((sigma if use else one)[:, None] * X) / n + twice * l2 * eye
        for use in (in_h, in_theta)
    ]
    theta = torch.linalg.solve(H_theta, X.T @ ((sigma if in_theta else one) * y) / n)
    v = torch.linalg.solve(H, X_val.T @ (X_val @ theta - y_val) / len(y_val))
    result = sign * (X @ theta - y) * (X @ v) / (n if divide else 1)
    return sigma * result if in_j else result


RIGHT = {
    "1.A": (0.05, -133 / 540),
    "1.B": (20, 1, 20_000_000, 1_000_000),
    "1.1": toy,
    "1.2": ridge,
    "1.3": lambda lam, train, validation: shared(lam, train, validation).sum(),
    "1.4": repaired,
    "1.5": (1, -1, 1 / 2, 2 / 3),
    "1.6": weights,
}

WRONG = {
    "1.A": [
        (-0.246, 0.05),
        (0.05, 0.05),
        (0.05, -8 / 27),
        (0.05, 0.05 + 8 / 27),
        (0.05, 0.05 - 4 / 9),
        (0.05, 0.05 - 8 / 9),
        (0.05, 1.0),
        (0.1, -0.246),
        (0.05,),
        "falls",
    ],
    "1.B": [
        (1_000_000, 1, 20_000_000, 1_000_000),
        (20, 20, 20_000_000, 1_000_000),
        (20, 1, 1_000_000, 1_000_000),
        (20, 1, 20_000_000, 20),
        (20, 1),
    ],
    "1.1": [
        lambda lam: toy(lam, direct=0),
        lambda lam: toy(lam, sign=1),
        lambda lam: toy(lam, inner=False),
        lambda lam: toy(lam, direct=lam / 10),
        lambda lam: 0.1,
        lambda lam: "0.1",
    ],
    "1.2": [
        lambda *a: ridge(*a, direct=0),
        lambda *a: ridge(*a, sign=1),
        lambda *a: ridge(*a, sign=0),
        lambda *a: ridge(*a, factor=False),
        lambda *a: ridge(*a, rows=lambda train, validation: len(train[1])),
        lambda *a: ridge(*a, rows=lambda train, validation: 1),
        lambda *a: ridge(*a, summed=(False, False, True)),
        lambda *a: ridge(*a, summed=(True, False, True)),
        lambda *a: ridge(*a, summed=(True, True, True)),
        lambda *a: ridge(*a).sum(),
        lambda *a: ridge(*a) * float("nan"),
    ],
    "1.3": [
        lambda *a: shared(*a).mean(),
        lambda *a: -shared(*a).sum(),
        lambda *a: 2 * shared(*a).sum(),
        lambda *a: shared(*a).sum() / a[0].exp(),
        shared,
    ],
    "1.4": [
        lambda *a: repaired(*a, curvature=("outer", "validation"), direct=0),
        lambda *a: repaired(*a, curvature=("outer", "validation")),
        lambda *a: repaired(*a, curvature=("inner", "validation")),
        lambda *a: repaired(*a, curvature=("inner", "validation"), direct=0),
        lambda *a: repaired(*a, curvature=("outer", "train")),
        lambda *a: repaired(*a, direct=0),
        lambda *a: repaired(*a, sign=1),
        lambda *a: repaired(*a, sign=1, direct=0),
    ],
    "1.5": [
        (2, -1, 1 / 3, 2 / 3),
        (1, 1, 1 / 2, 2 / 3),
        (1, -1, 1 / 3, 2 / 3),
        (1, -1, 1 / 2, 1 / 3),
        (1, -1, 1 / 2),
        1.0,
    ],
    "1.6": [
        lambda *a: weights(*a, sign=1),
        lambda *a: weights(*a, divide=False),
        lambda *a: weights(*a, in_h=False),
        lambda *a: weights(*a, in_h=False, in_theta=False),
        lambda *a: weights(*a, in_j=True),
        lambda *a: weights(*a, in_j=True, divide=False),
        lambda *a: weights(*a, twice=1),
        lambda *a: weights(*a).sum(),
    ],
}
