"""Checks of chapter 1, the hypergradient.

The truths do not use the implicit function theorem: closed forms of theta*(lam) differentiated by
autograd, and, where there is no closed form, finite differences of a re-solved inner problem.
"""

import torch
import torch.nn.functional as F

from bilevel_lite.checking import finite_difference_hypergradient
from bilevel_lite.exercises import Wrong, compare, exercise
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import gradient, hessian


def _draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _regression(seed, n=30, n_val=17, d=4):
    """A small regression problem: (train, validation), pairs (X, y)."""
    generator = torch.Generator().manual_seed(seed)
    theta = _draw(generator, d)
    pairs = []
    for rows in (n, n_val):
        X = _draw(generator, rows, d)
        pairs.append((X, X @ theta + 0.5 * _draw(generator, rows)))
    return pairs


def _slope(phi, lam):
    """Derivative of phi at lam, by autograd."""
    lam = lam.detach().clone().requires_grad_()
    return torch.autograd.grad(phi(lam), lam)[0]


def _half_mse(theta, batch):
    X, y = batch
    return 0.5 * (X @ theta - y).square().mean()


def _ridge(train, penalties):
    """The minimiser of half the mean squared error plus 1/2 sum_j penalties_j theta_j^2."""
    X, y = train
    return torch.linalg.solve(X.T @ X / len(y) + torch.diag(penalties), X.T @ y / len(y))


def _compare(got, truth, mistakes, what="The hypergradient", rtol=1e-6):
    """`compare` with this chapter's usual name and tolerance."""
    compare(got, truth, mistakes, what, rtol)


FORGOT_DIRECT = "The direct term is missing: f also depends on lam by itself."
SIGN = "The implicit term has the wrong sign: dtheta*/dlam = -H^-1 J^T."
DIRECT_ONLY = "Only the direct term is there: theta* moves with lam too."


@exercise("1.1")
def check_toy(toy_hypergradient):
    """theta* = 3 / (1 + e^lam); f = (theta - 1)^2 / 2 + lam / 10."""

    def phi(lam):
        return 0.5 * (3 / (1 + lam.exp()) - 1) ** 2 + lam / 10

    for value in (-1.3, 0.4, 2.1):
        lam = torch.tensor(value, dtype=torch.float64)
        truth, direct = _slope(phi, lam), torch.tensor(0.1, dtype=torch.float64)
        implicit, e = truth - direct, lam.exp()
        _compare(
            toy_hypergradient(lam),
            truth,
            [
                (FORGOT_DIRECT, implicit),
                (SIGN, direct - implicit),
                (DIRECT_ONLY, direct),
                ("A factor e^lam is missing: differentiate e^lam too.", direct + implicit / e),
                ("Use lam / 10, whose derivative is 1/10, as direct term.", lam / 10 + implicit),
            ],
            f"The hypergradient at lam = {value}",
        )


@exercise("1.2")
def check_ridge(ridge_hypergradient):
    """Autograd through the closed form of theta*, on two problems of different sizes."""
    for seed, rho, centre, d in ((11, 0.02, -1.5, 4), (12, 0.05, 0.7, 6)):
        train, validation = _regression(seed, d=d)
        lam = 0.5 * _draw(torch.Generator().manual_seed(seed + 50), d) - 1

        def phi(lam, train=train, validation=validation, rho=rho, centre=centre):
            penalty = 0.5 * rho * (lam - centre).square().sum()
            return _half_mse(_ridge(train, lam.exp()), validation) + penalty

        truth, direct = _slope(phi, lam), rho * (lam - centre)
        implicit = truth - direct
        scale = len(validation[1]) / len(train[1])
        _compare(
            ridge_hypergradient(lam.clone(), train, validation, rho, centre),
            truth,
            [
                (FORGOT_DIRECT, implicit),
                (SIGN, direct - implicit),
                (DIRECT_ONLY, direct),
                ("J lacks the factor e^lam.", direct + implicit / lam.exp()),
                ("b is a mean over the validation set: divide by n_v.", direct + implicit * scale),
                (
                    "b is a mean over the validation set: divide by n_v.",
                    direct + implicit * len(validation[1]),
                ),
            ],
        )


@exercise("1.3")
def check_shared(shared_hypergradient):
    """Autograd through the closed form, with one penalty."""
    train, validation = _regression(13)
    d = train[0].shape[1]
    for value in (-2.0, -0.3):
        lam = torch.tensor(value, dtype=torch.float64)

        def phi(lam):
            return _half_mse(_ridge(train, lam.exp().expand(d)), validation)

        truth = _slope(phi, lam)
        _compare(
            shared_hypergradient(lam.clone(), train, validation),
            truth,
            [
                ("The implicit term has the wrong sign.", -truth),
                ("That is the mean over the features; the chain rule asks for the sum.", truth / d),
                ("J lacks the factor e^lam.", truth / lam.exp()),
                ("J has a factor 2 too many: the penalty is 1/2 e^lam ||theta||^2.", 2 * truth),
            ],
        )


def _logistic():
    """A logistic inner problem with per-feature penalties, solved by Newton's method."""
    generator = torch.Generator().manual_seed(14)
    batches = []
    for rows in (40, 25):
        X = _draw(generator, rows, 3)
        y = (X.sum(1) + _draw(generator, rows) > 0).to(X)
        batches.append((X, y))

    def loss(theta, batch):
        return F.binary_cross_entropy_with_logits(batch[0] @ theta, batch[1])

    def inner(lam, theta, batch):
        return loss(theta, batch) + 0.5 * (lam.exp() * theta.square()).sum()

    def outer(lam, theta, batch):
        return loss(theta, batch) + 0.01 * (lam + 2).square().sum()

    def solve_inner(lam):
        theta = torch.zeros_like(lam)
        for _ in range(12):
            H = hessian(inner, lam, theta, batches[0])
            q = gradient(inner, lam, theta, batches[0])[2]
            theta = theta - torch.linalg.solve(H, q)
        return theta

    lam = torch.tensor([-2.5, -1.0, -1.8], dtype=torch.float64)
    return BilevelProblem(inner, outer), lam, solve_inner, batches


@exercise("1.4")
def check_repaired(repaired):
    """Finite differences of a re-solved logistic regression."""
    problem, lam, solve_inner, (train, validation) = _logistic()
    theta = solve_inner(lam)
    truth = finite_difference_hypergradient(problem, lam, solve_inner, 1e-4, validation)
    _, direct, b = gradient(problem.outer_loss, lam, theta, validation)
    implicit = truth - direct
    H_val = hessian(problem.outer_loss, lam, theta, validation)
    H_mixed = hessian(problem.inner_loss, lam, theta, validation)
    H_train = hessian(problem.outer_loss, lam, theta, train)
    one, two, three = (
        -lam.exp() * theta * torch.linalg.solve(H, b) for H in (H_val, H_mixed, H_train)
    )
    both = "Both mistakes are still there."
    curvature = "H is still not the Hessian of the inner loss."
    batch = "H is the Hessian of the inner loss, so it belongs to the training data."
    _compare(
        repaired(problem, lam.clone(), theta.clone(), train, validation),
        truth,
        [
            (both, one),
            (curvature, direct + one),
            (curvature, direct + three),
            (both, three),
            ("One mistake is repaired. " + FORGOT_DIRECT, implicit),
            (batch + " " + FORGOT_DIRECT, two),
            (batch, direct + two),
            ("The sign was right: it is minus J v.", direct - implicit),
            ("The sign was right: it is minus J v.", -implicit),
        ],
        rtol=1e-6,
    )


@exercise("1.5")
def check_orders(answer):
    """Balance of a * eps^k and delta / eps."""
    try:
        values = [float(value) for value in answer]
    except (TypeError, ValueError):
        raise Wrong("The answer should be four numbers, (slope, slope, p, s).") from None
    if len(values) != 4:
        raise Wrong(f"The answer should be four numbers; there are {len(values)}.")
    hints = (
        (
            "1, the slope of truncation",
            1,
            "Nothing cancels the second derivative in a one-sided difference.",
        ),
        (
            "2, the slope where delta rules",
            -1,
            "The error of the values is divided by eps, so it grows as eps falls.",
        ),
        ("3, the power p", 1 / 2, "Set eps^k equal to delta / eps, with k from number 1."),
        (
            "4, the power s",
            2 / 3,
            "For central differences the best eps is delta^(1/3); put it into eps^2.",
        ),
    )
    for value, (name, truth, hint) in zip(values, hints, strict=True):
        if not abs(value - truth) < 0.01:
            raise Wrong(f"Number {name}, is not {value:.3g}. {hint}")


@exercise("1.6")
def check_weights(weight_hypergradient):
    """Autograd through the closed form of weighted ridge regression."""
    for seed, alpha in ((16, 0.3), (17, 0.05)):
        train, validation = _regression(seed, n=23, n_val=31, d=5)
        (X, y), n, d = train, len(train[1]), 5
        w = 0.2 + torch.rand(
            n, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64
        )
        ridge = alpha * torch.eye(d, dtype=torch.float64)

        def solve(w, X=X, y=y, n=n, ridge=ridge):
            return torch.linalg.solve(X.T @ (w[:, None] * X) / n + ridge, X.T @ (w * y) / n)

        truth = _slope(lambda w, solve=solve, v=validation: _half_mse(solve(w), v), w)
        theta = solve(w)
        b = validation[0].T @ (validation[0] @ theta - validation[1]) / len(validation[1])
        residual = X @ theta - y
        unweighted = torch.linalg.solve(X.T @ X / n + ridge, b)
        plain = _ridge(train, torch.full((d,), alpha, dtype=torch.float64))
        b_plain = validation[0].T @ (validation[0] @ plain - validation[1]) / len(validation[1])
        v_plain = torch.linalg.solve(X.T @ X / n + ridge, b_plain)
        weights = "H is missing the weights: it is X^T diag(w) X / n + alpha I."
        _compare(
            weight_hypergradient(w.clone(), train, validation, alpha),
            truth,
            [
                ("The implicit term has the wrong sign.", -truth),
                ("The factor 1/n of the inner loss is missing in J.", n * truth),
                ("J does not contain the weights: g is linear in w.", w * truth),
                ("J does not contain the weights, and carries 1/n.", n * w * truth),
                (weights, -residual * (X @ unweighted) / n),
                ("theta* and H both need the weights.", -(X @ plain - y) * (X @ v_plain) / n),
                ("J is missing the residual x_i^T theta - y_i.", truth / residual),
            ],
        )
