"""Checks of chapter 4: Hessian, GGN, Fisher."""

import torch
import torch.nn.functional as F

from bilevel_lite.exercises import Wrong, compare, exercise


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _booleans(answer, count: int) -> list[bool]:
    """So many of True, False, 1, 0; nothing else counts as one of them."""
    try:
        given = answer.tolist() if isinstance(answer, torch.Tensor) else list(answer)
    except TypeError:
        raise Wrong(f"Give {count} booleans, such as (True, False, ...).") from None
    if len(given) != count:
        raise Wrong(f"Give {count} booleans, got {len(given)}.")
    for k, value in enumerate(given):
        if isinstance(value, str) or value not in (True, False):
            raise Wrong(f"Entry {k + 1} is {value!r}; each should be True or False.")
    return [bool(value) for value in given]


def _network(n: int = 7, classes: int = 3, seed: int = 0):
    """The outputs of a small tanh network as a function of theta, and a theta."""
    x = _draw(n, 2, seed=seed)

    def outputs(theta):
        first, last = theta[:8].view(4, 2), theta[8:].view(classes, 4)
        return torch.tanh(x @ first.T) @ last.T

    return outputs, _draw(8 + 4 * classes, seed=seed + 1)


@exercise("4.A")
def _zero_blocks(answer):
    hints = (
        "The first layer: with the second held fixed and no kink crossed, how do the outputs "
        "depend on its parameters?",
        "The second layer: the outputs are linear in its parameters, with tanh and with ReLU.",
        "Between: a weight of one layer multiplies a weight of the other in the outputs.",
        "Softmax regression: what is the second derivative of outputs linear in theta?",
    )
    right = (True, True, False, True)
    for value, expected, hint in zip(_booleans(answer, 4), right, hints, strict=True):
        if value != expected:
            raise Wrong(hint)


@exercise("4.B")
def _too_long(answer):
    one = isinstance(answer, tuple | list) and len(answer) == 1
    try:
        value = float(answer[0] if one else answer)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong("Give one number.") from None
    if not abs(value - 1 / 0.09) <= 1:
        for wrong, sentence in (
            (1 / 0.3, "The residual enters squared."),
            (0.09, "That is the size of the matrix; v is its inverse times b."),
            (0.3, "The residual enters squared, and v is an inverse times b."),
            (1, "The matrix has the same shape, but each term carries the squared residual."),
            (1 / 0.0081, "The matrix is quadratic in the residual, not of fourth order."),
        ):
            if abs(value - wrong) <= 0.05 * wrong:
                raise Wrong(sentence)
        raise Wrong(
            "The empirical Fisher is 0.3^2 times the right matrix; v is its inverse times b."
        )


@exercise("4.1")
def _logistic(function):
    n, d, rho = 30, 4, 0.05
    X, theta = _draw(n, d, seed=1), _draw(d, seed=2)
    sigma = _draw(n, seed=3).sigmoid()
    y = (_draw(n, seed=4) > 0).to(X)

    def risk(t):
        o = X @ t
        return (sigma * (F.softplus(o) - y * o)).mean() + rho * t.square().sum()

    truth = torch.autograd.functional.hessian(risk, theta)
    eye = torch.eye(d, dtype=X.dtype)
    core = truth - 2 * rho * eye
    q = (X @ theta).sigmoid()

    def moment(weight):
        return (X.T * weight) @ X / n

    got = function(X, theta, sigma, rho)
    slips = (
        (core, "The l2 term is missing: its curvature is 2 rho I."),
        (core + rho * eye, "The curvature of rho ||theta||^2 is 2 rho I, not rho I."),
        (n * core + 2 * rho * eye, "You forgot the 1/n of the mean."),
        (moment(q * (1 - q)) + 2 * rho * eye, "You left out the weights."),
        (
            moment(sigma**2 * q * (1 - q)) + 2 * rho * eye,
            "The weights enter squared: they multiply the second moment once.",
        ),
        (
            moment(sigma * (q * (1 - q) ** 2 + (1 - q) * q**2) / 2) + 2 * rho * eye,
            "The two labels have the probabilities y_hat and 1 - y_hat: do not also halve the sum.",
        ),
        (
            moment(sigma * q**2 * (1 - q) ** 2) + 2 * rho * eye,
            "The second moment of the output's gradient is y_hat (1 - y_hat), not its square.",
        ),
    )
    mistakes = [(why, slip) for slip, why in slips]
    compare(
        got,
        truth,
        mistakes,
        "The Fisher",
        1e-6,
        hint="Sum over both labels, each with its probability.",
    )


@exercise("4.2")
def _predict(answer):
    given = _booleans(answer, 6)
    hints = (
        "Case 1: what is the second derivative of outputs that are linear in theta?",
        "Case 2: which factor of R is zero when every target is reproduced?",
        "Case 3: at a minimum the sum of Z^T s vanishes, but R is another sum. Is it zero?",
        "Case 4: is the product of two layers' weights linear in both together?",
        "Case 5: with the other layer held fixed, how do the outputs depend on this one?",
        "Case 6: equality asks for R = 0. Does R know whether the loss is convex?",
    )
    right = (True, True, False, False, True, True)
    for value, expected, hint in zip(given, right, hints, strict=True):
        if value != expected:
            raise Wrong(hint)


@exercise("4.3")
def _multilabel(function):
    outputs, theta = _network()
    n, rho = 7, 0.03
    sigma, v = _draw(n, seed=5).sigmoid(), _draw(len(theta), seed=6)
    D = torch.autograd.functional.jacobian(outputs, theta)
    q = outputs(theta).sigmoid()
    p = outputs(theta).softmax(1)
    u = D @ v

    def product(w):
        return torch.einsum("ncd,nc->d", D, w) / n

    l2 = 2 * rho * v
    truth = product(sigma[:, None] * q * (1 - q) * u) + l2

    def hessian_vp(y):
        def risk(t):
            o = outputs(t)
            return (sigma[:, None] * (F.softplus(o) - y * o)).sum() / n

        return torch.autograd.functional.hessian(risk, theta) @ v + l2

    softmax = product(sigma[:, None] * (p * u - p * (p * u).sum(1, keepdim=True))) + l2
    got = function(outputs, theta, v, sigma, rho)
    slips = (
        (hessian_vp(0.0), "That is H v (with all labels 0): the remainder is not part of G."),
        (hessian_vp(1.0), "That is H v (with all labels 1): the remainder is not part of G."),
        (softmax, "That is the output Hessian of softmax; here each output has its own loss."),
        (truth - l2, "The l2 term is missing: it contributes 2 rho v."),
        (truth - l2 / 2, "The l2 term contributes 2 rho v, not rho v."),
        (n * (truth - l2) + l2, "You forgot the 1/n of the mean."),
        (product(q * (1 - q) * u) + l2, "You left out the weights."),
        (
            product(sigma[:, None] ** 2 * q * (1 - q) * u) + l2,
            "The weights enter squared; they belong in the middle, once.",
        ),
        (
            product(sigma[:, None] * u) + l2,
            "The middle is missing: Omega is not the identity here.",
        ),
    )
    mistakes = [(why, slip) for slip, why in slips]
    compare(
        got,
        truth,
        mistakes,
        "G v",
        1e-6,
        hint="Omega is diagonal, with entries q (1 - q), q = sigmoid(o).",
    )


@exercise("4.4")
def _repaired(function):
    outputs, theta = _network(n=9, seed=10)
    n = 9
    y = torch.arange(n) % 3
    sigma, rho = 0.2 + _draw(n, seed=12).sigmoid(), 0.04

    def losses(t):
        return F.cross_entropy(outputs(t), y, reduction="none")

    g = torch.autograd.functional.jacobian(losses, theta)
    eye = torch.eye(len(theta), dtype=theta.dtype)

    def moment(rows):
        return rows.T @ rows / n

    got = function(losses, theta, sigma, 0.0)
    mistakes = [
        ("The weights enter squared: a column sigma_i g_i has the second moment sigma_i^2 "
         "g_i g_i^T.", moment(sigma[:, None] * g)),
        ("The weights have disappeared; each term should carry sigma_i once.", moment(g)),
    ]  # fmt: skip
    truth, what = moment(sigma.sqrt()[:, None] * g), "Without an l2 term the result"
    hint = "Each g_i g_i^T carries sigma_i once, and the mean is over n."
    compare(got, truth, mistakes, what, 1e-6, hint)
    mistakes = [
        ("The l2 term has disappeared: its curvature is 2 rho I.", truth),
        ("The curvature of rho ||theta||^2 is 2 rho I, not rho I.", truth + rho * eye),
    ]
    truth, what = truth + 2 * rho * eye, "With an l2 term the result"
    hint = "The l2 term is no example's loss: keep it out of the gradients, add its Hessian."
    compare(function(losses, theta, sigma, rho), truth, mistakes, what, 1e-6, hint)


@exercise("4.5")
def _monte_carlo(function):
    n, C, d = 6, 3, 4
    o, D = _draw(n, C, seed=20), _draw(n, C, d, seed=21)
    sigma, p = _draw(n, seed=22).sigmoid(), o.softmax(1)
    s = p[:, None, :] - torch.eye(C, dtype=o.dtype)  # s[i, c] = p_i - e_c
    g = torch.einsum("nkc,ncd->nkd", s, D)
    outer = g[:, :, :, None] * g[:, :, None, :]
    mean = (p[:, :, None, None] * outer).sum(1)
    # the variance as a sum over labels of the squared deviation from the mean
    deviation = (outer - mean[:, None]).square().sum((2, 3))
    variance = (p * deviation).sum(1)
    for samples in (1, 4):
        truth = ((sigma**2 * variance).sum() / n**2 / samples).sqrt()
        got = function(g, p, sigma, samples)
        raw = (p * g.square().sum(2).square()).sum(1)
        never = torch.tensor(torch.nan)  # one draw cannot tell the rates apart
        slips = (
            (truth**2, "That is the mean square; take the root."),
            (
                truth / samples**0.5 if samples > 1 else never,
                "It should fall like 1/sqrt(M), not like 1/M.",
            ),
            (
                ((sigma**2 * raw).sum() / n**2 / samples).sqrt(),
                "You left out the second part of the variance, - ||E[g g^T]||^2.",
            ),
            (
                ((sigma * variance).sum() / n**2 / samples).sqrt(),
                "The weight multiplies g g^T, so the variance carries its square.",
            ),
            ((variance.sum() / n**2 / samples).sqrt(), "You left out the weights."),
            (
                ((sigma**2 * variance).sum() / n / samples).sqrt(),
                "F is a mean over n examples: the variance of a mean carries 1/n^2.",
            ),
            (
                truth * samples**0.5 if samples > 1 else never,
                "It does not depend on the number of draws; it should.",
            ),
        )
        mistakes = [(why, slip) for slip, why in slips]
        compare(got, truth, mistakes, f"The error for M = {samples}", 1e-6)


@exercise("4.6")
def _misleading(function):
    try:
        X, r, b = (torch.as_tensor(part, dtype=torch.float64) for part in function())
    except (TypeError, ValueError):
        raise Wrong("Return three tensors: X, s, b.") from None
    if X.dim() != 2 or X.shape[1] != 2 or r.shape != X.shape[:1] or b.shape != (2,):
        raise Wrong("Expected shapes (n, 2), (n,) and (2,).")
    if not float((X.T @ r).norm()) <= 1e-9 * float(X.norm() * r.norm()):
        raise Wrong("X^T s is not zero, so this is no minimum of the least-squares loss.")
    if not float(b.norm()) > 0:
        raise Wrong("b is zero, so it has no direction.")
    n = len(r)
    fisher, empirical = X.T @ X / n, (X.T * r.square()) @ X / n
    for name, matrix in (("F", fisher), ("F_emp", empirical)):
        low, high = torch.linalg.eigvalsh(matrix).tolist()
        if not low * 1e4 * (1 + 1e-9) >= high > 0:  # at most, up to rounding
            raise Wrong(f"The condition number of {name} is above 10^4.")
    right, wrong = torch.linalg.solve(fisher, b), torch.linalg.solve(empirical, b)
    cosine = float(right @ wrong / (right.norm() * wrong.norm()))
    if not cosine <= 0.1 + 1e-9:
        raise Wrong(
            f"The cosine between F^-1 b and F_emp^-1 b is {cosine:.2f}, above 0.1. Put most of b "
            "where the residuals are large, and a little where they are small."
        )
