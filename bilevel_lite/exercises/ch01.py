"""Checks of chapter 1, the hypergradient.

The truths do not use the implicit function theorem: closed forms of theta*(lam) differentiated by
autograd, and, where there is no closed form, finite differences of a re-solved inner problem.
"""

import torch
import torch.nn.functional as F

from bilevel_lite.checking import finite_difference_hypergradient
from bilevel_lite.exercises import Wrong, compare, exercise, numbers
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


@exercise("1.A")
def check_two_roads(answer):
    """At lam = 1/2 of section 1.1: df/dlam = 1/20, and dPhi/dlam = 1/20 - 8/27."""
    partial, total = 1 / 20, 1 / 20 - 8 / 27
    first, second = numbers(answer, 2)
    if abs(first - total) + abs(second - partial) < 0.01:
        raise Wrong("These are the two numbers, in the other order: the partial one comes first.")
    if not abs(first - partial) < 0.001:
        raise Wrong(
            f"The partial derivative is not {first:.3g}: hold theta still and differentiate "
            "lam^2 / 20."
        )
    mistakes = (
        (partial, "That is the partial derivative again; theta* moves with lam, too."),
        (-8 / 27, "The second number lacks the direct part, which is the first number."),
        (8 / 27 + partial, "The sign is wrong: theta* = 2 / (1 + lam) falls when lam rises."),
        (partial - 4 / 9, "The derivative of 2 / (1 + lam) is -2 / (1 + lam)^2: mind the square."),
        (partial - 8 / 9, "That moves theta*, but b = theta* - 1 = 1/3 is missing as a factor."),
    )
    for value, sentence in mistakes:
        if abs(second - value) < 0.006:
            raise Wrong(sentence)
    if not abs(second - total) < 0.006:
        raise Wrong(
            f"The hypergradient is not {second:.3g}: add (theta* - 1) times the derivative of "
            "theta* to the first number."
        )


@exercise("1.B")
def check_orders_of_multiplication(answer):
    """m = 20, d = 1,000,000: solves and stored numbers of (J H^-1) b and of J (H^-1 b)."""
    m, d = 20, 1_000_000
    names = ("linear solves for D", "linear solves for v", "numbers in D", "numbers in v")
    hints = (
        "D has one column for each entry of lam: H z = J^T e_j, for j = 1, ..., m.",
        "v solves one system, H v = b, however many hyperparameters there are.",
        "D has a row for each entry of theta and a column for each entry of lam.",
        "v is like theta.",
    )
    truths = (m, 1, m * d, d)
    for value, name, truth, hint in zip(numbers(answer, 4), names, truths, hints, strict=True):
        if not abs(value - truth) < 1e-6 * truth:
            raise Wrong(f"The {name}: not {value:.10g}. {hint}")


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


def _without_n(lam, train, validation):
    """The implicit term of exercise 1.2 with X^T X for X^T X / n: in v, in both solves, in all."""
    (X, y), (X_val, y_val) = train, validation
    right, summed = (X.T @ X / n + torch.diag(lam.exp()) for n in (len(y), 1))
    for in_theta, in_v, n in (
        (right, summed, len(y)),
        (summed, summed, len(y)),
        (summed,) * 2 + (1,),
    ):
        theta = torch.linalg.solve(in_theta, X.T @ y / n)
        b = X_val.T @ (X_val @ theta - y_val) / len(y_val)
        yield -lam.exp() * theta * torch.linalg.solve(in_v, b)


@exercise("1.2")
def check_ridge(ridge_hypergradient):
    """Autograd through the closed form of theta*, on two problems of different sizes."""
    for seed, pull, centre, d in ((11, 0.02, -1.5, 4), (12, 0.05, 0.7, 6)):
        train, validation = _regression(seed, d=d)
        lam = 0.5 * _draw(torch.Generator().manual_seed(seed + 50), d) - 1

        def phi(lam, train=train, validation=validation, pull=pull, centre=centre):
            penalty = 0.5 * pull * (lam - centre).square().sum()
            return _half_mse(_ridge(train, lam.exp()), validation) + penalty

        truth, direct = _slope(phi, lam), pull * (lam - centre)
        implicit = truth - direct
        scale = len(validation[1]) / len(train[1])
        forgot_n = _without_n(lam, train, validation)
        _compare(
            ridge_hypergradient(lam.clone(), train, validation, pull, centre),
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
                *[("H is a mean over the training set: X^T X / n.", direct + h) for h in forgot_n],
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
    """Balance of a * eps^k and nu / eps."""
    values = numbers(answer, 4)
    hints = (
        (
            "1, the slope of truncation",
            1,
            "Nothing cancels the second derivative in a one-sided difference.",
        ),
        (
            "2, the slope where nu rules",
            -1,
            "The error of the values is divided by eps, so it grows as eps falls.",
        ),
        (
            "3, the power of nu in the best eps",
            1 / 2,
            "Set eps^k equal to nu / eps; k is number 1.",
        ),
        (
            "4, the power of nu in the smallest error",
            2 / 3,
            "For central differences the best eps is nu^(1/3); put it into eps^2.",
        ),
    )
    for value, (name, truth, hint) in zip(values, hints, strict=True):
        if not abs(value - truth) < 0.01:
            raise Wrong(f"Number {name}, is not {value:.3g}. {hint}")


def _half_l2(sigma, train, validation, l2):
    """Exercise 1.6 with rho I in H, where 2 rho I belongs."""
    (X, y), (X_val, y_val) = train, validation
    H = X.T @ (sigma[:, None] * X) / len(y) + l2 * torch.eye(X.shape[1]).to(X)
    theta = torch.linalg.solve(H, X.T @ (sigma * y) / len(y))
    b = X_val.T @ (X_val @ theta - y_val) / len(y_val)
    return -(X @ theta - y) * (X @ torch.linalg.solve(H, b)) / len(y)


@exercise("1.6")
def check_weights(weight_hypergradient):
    """Autograd through the closed form of weighted ridge regression."""
    for seed, l2 in ((16, 0.3), (17, 0.05)):
        train, validation = _regression(seed, n=23, n_val=31, d=5)
        (X, y), n, d = train, len(train[1]), 5
        sigma = 0.2 + torch.rand(
            n, generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64
        )
        ridge = 2 * l2 * torch.eye(d, dtype=torch.float64)

        def solve(sigma, X=X, y=y, n=n, ridge=ridge):
            return torch.linalg.solve(X.T @ (sigma[:, None] * X) / n + ridge, X.T @ (sigma * y) / n)

        truth = _slope(lambda sigma, solve=solve, v=validation: _half_mse(solve(sigma), v), sigma)
        theta = solve(sigma)
        b = validation[0].T @ (validation[0] @ theta - validation[1]) / len(validation[1])
        residual = X @ theta - y
        unweighted = torch.linalg.solve(X.T @ X / n + ridge, b)
        plain = _ridge(train, torch.full((d,), 2 * l2, dtype=torch.float64))
        b_plain = validation[0].T @ (validation[0] @ plain - validation[1]) / len(validation[1])
        v_plain = torch.linalg.solve(X.T @ X / n + ridge, b_plain)
        weights = "H is missing the weights: it is X^T diag(sigma) X / n + 2 rho I."
        _compare(
            weight_hypergradient(sigma.clone(), train, validation, l2),
            truth,
            [
                ("The implicit term has the wrong sign.", -truth),
                (
                    "The Hessian of rho ||theta||^2 is 2 rho I.",
                    _half_l2(sigma, train, validation, l2),
                ),
                ("The factor 1/n of the inner loss is missing in J.", n * truth),
                ("J does not contain the weights: g is linear in sigma.", sigma * truth),
                ("J does not contain the weights, and carries 1/n.", n * sigma * truth),
                (weights, -residual * (X @ unweighted) / n),
                ("theta* and H both need the weights.", -(X @ plain - y) * (X @ v_plain) / n),
                ("J is missing the residual x_i^T theta - y_i.", truth / residual),
            ],
        )
