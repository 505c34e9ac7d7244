"""Right and wrong answers to the exercises of chapter 4."""

import torch
from torch.func import jacrev, jvp, vjp


def logistic(X, theta, sigma, rho, power=1, l2=2.0):
    q = (X @ theta).sigmoid()
    eye = torch.eye(X.shape[1], dtype=X.dtype)
    return (X.T * (sigma**power * q * (1 - q))) @ X / len(X) + l2 * rho * eye


def logistic_squared_weights(X, theta, sigma, rho):
    return logistic(X, theta, sigma, rho, power=2)


def logistic_unweighted(X, theta, sigma, rho):
    return logistic(X, theta, sigma, rho, power=0)


def logistic_no_l2(X, theta, sigma, rho):
    return logistic(X, theta, sigma, rho, l2=0.0)


def logistic_half_l2(X, theta, sigma, rho):
    return logistic(X, theta, sigma, rho, l2=1.0)


def logistic_sum(X, theta, sigma, rho):
    return len(X) * logistic(X, theta, sigma, rho, l2=0.0) + 2 * rho * torch.eye(X.shape[1])


def logistic_product(X, theta, sigma, rho):  # the squared gradients multiplied, not averaged
    q = (X @ theta).sigmoid()
    eye = torch.eye(X.shape[1], dtype=X.dtype)
    return (X.T * (sigma * q**2 * (1 - q) ** 2)) @ X / len(X) + 2 * rho * eye


def ggn(outputs, theta, v, sigma, rho, power=1, l2=2.0, middle="logistic"):
    o, u = jvp(outputs, (theta,), (v,))
    q = o.softmax(1) if middle == "softmax" else o.sigmoid()
    w = q * (1 - q) * u
    if middle == "softmax":
        w = q * u - q * (q * u).sum(1, keepdim=True)
    if middle == "none":
        w = u
    w = sigma[:, None] ** power * w / len(o)
    return vjp(outputs, theta)[1](w)[0] + l2 * rho * v


def variant(function, **options):
    """The function with other options: a plausible mistake."""

    def changed(*args):
        return function(*args, **options)

    return changed


def ggn_sum(outputs, theta, v, sigma, rho):
    return len(sigma) * ggn(outputs, theta, v, sigma, rho, l2=0.0) + 2 * rho * v


def empirical(losses, theta, sigma, rho, power=0.5, l2=2.0):
    g = sigma[:, None] ** power * jacrev(losses)(theta)
    return g.T @ g / len(sigma) + l2 * rho * torch.eye(len(theta), dtype=theta.dtype)


def empirical_slip(losses, theta, sigma, rho):
    g = jacrev(lambda t: sigma * losses(t) + rho * t.square().sum())(theta)
    return g.T @ g / len(sigma)


def empirical_l2_inside(losses, theta, sigma, rho):  # only the weights repaired
    g = jacrev(lambda t: sigma.sqrt() * losses(t) + rho * t.square().sum())(theta)
    return g.T @ g / len(sigma)


def monte_carlo(g, p, sigma, samples, root=0.5, weight=2, centred=True, rate=1.0):
    fourth = (p * g.square().sum(2).square()).sum(1)
    mean = torch.einsum("nc,nci,ncj->nij", p, g, g)
    variance = fourth - centred * mean.square().sum((1, 2))
    return ((sigma**weight * variance).sum() / len(g) ** 2) ** root / samples ** (rate * root)


def misleading(small=0.1, b=(1.0, 0.05)):
    X = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    return X, torch.tensor([1.0, -1.0, small, -small]), torch.tensor(b)


def misleading_no_minimum():
    X, r, b = misleading()
    return X, r.abs(), b


def misleading_singular():
    return misleading(small=1e-3)


def misleading_mild():
    return misleading(b=(1.0, 1.0))


def hessian_not_ggn(outputs, theta, v, sigma, rho):
    def slope(t):
        return jacrev(lambda u: (sigma[:, None] * outputs(u).exp().log1p()).sum() / len(sigma))(t)

    return jvp(slope, (theta,), (v,))[1] + 2 * rho * v


RIGHT = {
    "4.A": (True, True, False, True),
    "4.B": 11,
    "4.1": logistic,
    "4.2": (True, True, False, False, True, True),
    "4.3": ggn,
    "4.4": empirical,
    "4.5": monte_carlo,
    "4.6": lambda: misleading(small=0.02, b=(1.0, 0.01)),
}

WRONG = {
    "4.A": [
        (False, True, False, True),
        (True, False, False, True),
        (True, True, True, True),
        (True, True, False, False),
        (True, True, None, True),
        "1101",
        True,
    ],
    "4.B": [3.3, 0.09, 0.3, 1, 123, 5, "eleven"],
    "4.1": [
        logistic_squared_weights,
        logistic_unweighted,
        logistic_no_l2,
        logistic_half_l2,
        logistic_sum,
        logistic_product,
    ],
    "4.2": [
        (True, True, True, False, True, True),
        (True, True, False, True, True, True),
        (True, True, False, False, True, False),
        (True, False),
        True,
        (True, True, None, None, True, True),
        "110011",
    ],
    "4.3": [
        variant(ggn, power=2),
        variant(ggn, power=0),
        variant(ggn, l2=0.0),
        variant(ggn, l2=1.0),
        variant(ggn, middle="softmax"),
        variant(ggn, middle="none"),
        ggn_sum,
        hessian_not_ggn,
    ],
    "4.4": [
        empirical_slip,
        empirical_l2_inside,
        variant(empirical, power=1),
        variant(empirical, power=0),
        variant(empirical, l2=0.0),
        variant(empirical, l2=1.0),
    ],
    "4.5": [
        variant(monte_carlo, root=1),
        variant(monte_carlo, weight=1),
        variant(monte_carlo, weight=0),
        variant(monte_carlo, centred=False),
        variant(monte_carlo, rate=2.0),
        variant(monte_carlo, rate=0.0),
    ],
    "4.6": [
        misleading_no_minimum,
        misleading_singular,
        misleading_mild,
        lambda: misleading(small=0.02, b=(0.0, 0.0)),
        lambda: (torch.ones(3, 2), torch.ones(2), torch.ones(2)),
    ],
}
