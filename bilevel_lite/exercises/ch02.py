"""Checks for chapter 2: unrolling."""

from math import inf

import torch

from bilevel_lite.exercises import Wrong, close, exercise
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.unroll import unrolled_hypergradient


def _toy(d: int = 4, m: int = 3, seed: int = 0):
    """A small nonlinear problem whose H depends on lam and theta; f has a direct term."""
    generator = torch.Generator().manual_seed(seed)
    a, c, w = (torch.randn(n, d, generator=generator, dtype=torch.float64) for n in (2 * d, m, 1))
    y = torch.randn(2 * d, generator=generator, dtype=torch.float64)

    def inner(lam, theta, batch=None):
        fit = torch.log(torch.cosh(a @ theta - y)).mean()
        return fit + 0.5 * ((torch.exp(0.5 * lam) @ c.abs()) * theta.square()).sum() / m

    def outer(lam, theta, batch=None):
        return 0.5 * (theta - w[0]).square().sum() + 0.1 * lam.square().sum()

    lam = 0.3 * torch.randn(m, generator=generator, dtype=torch.float64)
    theta0 = torch.randn(d, generator=generator, dtype=torch.float64)
    return BilevelProblem(inner, outer), lam, theta0


def _autograd(problem, lam, theta0, lrs, beta=0.0):
    """Gradients of Phi_T in lam and in each step size, by autograd through the whole graph."""
    lam = lam.detach().requires_grad_()
    lrs = torch.as_tensor(lrs, dtype=lam.dtype).requires_grad_()
    theta = theta0.detach().requires_grad_()
    u = torch.zeros_like(theta)
    for lr in lrs:
        (grad,) = torch.autograd.grad(
            problem.inner_loss(lam, theta, None), theta, create_graph=True
        )
        u = beta * u + grad
        theta = theta - lr * u
    return torch.autograd.grad(problem.outer_loss(lam, theta, None), (lam, lrs))


@exercise("2.1")
def _(answer):
    cases = [(0.1, 2.0, 0.5, 1e-3), (0.1, 2.0, 0.96, 1e-3), (0.02, 5.0, 0.2, 1e-8)]
    cases += [(1.0, 1.0, 0.5, 0.25), (0.5, 4.0, 0.45, 0.3)]
    for mu, L, lr, tol in cases:
        rho, steps = max(abs(1 - lr * mu), abs(1 - lr * L)), 0
        while rho**steps > tol * (1 + 1e-9):
            steps += 1
        got = answer(mu, L, lr, tol)
        try:
            same = float(got) == steps
        except (TypeError, ValueError):
            raise Wrong(f"expected a number of steps, got {type(got).__name__}.") from None
        if same:
            continue
        message = (
            f"For mu={mu}, L={L}, lr={lr}, tol={tol}: got {got}, but {steps} steps are needed."
        )
        if abs(1 - lr * L) > abs(1 - lr * mu):
            message += " There the large eigenvalue is the slow one."
        raise Wrong(message)
    for lr in (1.0, 1.2):
        got = answer(0.1, 2.0, lr, 1e-3)
        try:
            same = float(got) == inf
        except (TypeError, ValueError):
            raise Wrong(f"expected a number of steps, got {type(got).__name__}.") from None
        if not same:
            raise Wrong(
                f"For L=2, lr={lr}: got {got}, but |1 - lr L| >= 1, so no number of steps will do."
            )


@exercise("2.2")
def _(answer):
    for d, m, T in [(10, 1, 50), (1000, 20, 100), (50, 2, 10), (10_000, 1, 5), (10, 500, 30)]:
        got = answer(d, m, T)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("expected a pair (cheaper in gradients, smaller in memory).")
        cost = "forward" if 2 * T * m + 1 < 3 * T + 1 else "reverse"
        memory = "forward" if m < T else "reverse"
        for name, mine, theirs in (("gradients", got[0], cost), ("memory", got[1], memory)):
            if mine != theirs:
                raise Wrong(
                    f"For d={d}, m={m}, T={T} the answer for {name} is not {mine!r}. "
                    "Reverse: 3T + 1 gradients, T d numbers; forward: 2Tm + 1 and m d."
                )


@exercise("2.3")
def _(answer):
    problem, lam, theta0 = _toy(seed=1)
    lrs = [0.3, 0.2, 0.1, 0.05]
    truth, _ = _autograd(problem, lam, theta0, lrs)
    late = _swapped(problem, lam, theta0, lrs)
    got = answer(problem, lam, theta0, lrs)
    hint = "Check it with a single step, where the answer is grad_lam f - lr J b."
    if torch.is_tensor(got) and got.shape == lam.shape and bool(torch.allclose(got, late)):
        hint = "This is still the buggy result: which p belongs to theta_{t+1}, the old or the new?"
    close(got, truth, "the hypergradient", rtol=1e-8, hint=hint)


def _swapped(problem, lam, theta0, lrs):
    """The result of updating p before h."""
    from bilevel_lite.products import gradient, update_vjp

    iterates = [theta0]
    for lr in lrs:
        iterates.append(iterates[-1] - lr * gradient(problem.inner_loss, lam, iterates[-1])[2])
    _, h, p = gradient(problem.outer_loss, lam, iterates[-1])
    for lr, theta in zip(reversed(lrs), reversed(iterates[:-1]), strict=True):
        p = p - lr * update_vjp(problem.inner_loss, lam, theta, None, p)[1]
        h = h - lr * update_vjp(problem.inner_loss, lam, theta, None, p)[0]
    return h


@exercise("2.4")
def _(answer):
    for steps in (1, 7):
        problem, lam, theta0 = _toy(seed=2)
        truth = _autograd(problem, lam, theta0, [0.2] * steps)[1].sum()
        got = answer(problem, lam, theta0, steps, 0.2)
        what = f"dPhi_T/dlr for T = {steps}"
        hint = "Every step contributes - <p, grad_theta g(theta_t)>, with the p of theta_{t+1}."
        if isinstance(got, int | float):
            got = torch.tensor(float(got), dtype=truth.dtype)
        if torch.is_tensor(got) and got.numel() == 1:
            got = got.reshape(())
            if bool(torch.isclose(got.detach().to(truth), -truth, rtol=1e-6)):
                hint = "Only the sign is wrong: the step goes down the gradient."
        close(got, truth, what, rtol=1e-8, hint=hint)


@exercise("2.5")
def _(answer):
    problem, lam, theta0 = _toy(seed=3)
    plain = unrolled_hypergradient(problem, lam, theta0, 6, 0.1)
    close(
        answer(problem, lam, theta0, 6, 0.1, 0.0),
        plain,
        "the result without momentum (beta = 0)",
        rtol=1e-8,
        hint="It should equal plain unrolling; is the direct term there?",
    )
    truth, _ = _autograd(problem, lam, theta0, [0.1] * 6, beta=0.8)
    close(
        answer(problem, lam, theta0, 6, 0.1, 0.8),
        truth,
        "the result with beta = 0.8",
        rtol=1e-8,
        hint="beta = 0 is right. u_{t+1} depends on u_t, so on the way back q is multiplied by "
        "beta, and it collects from p at every step.",
    )


@exercise("2.6")
def _(answer):
    answer = answer() if callable(answer) else answer
    answer = answer.tolist() if hasattr(answer, "tolist") else answer  # a tensor or an array
    if not isinstance(answer, tuple | list) or len(answer) != 3:
        raise Wrong("expected three exponents, as in (1, 1, 1).")
    messages = (
        "The gradient alone: grad_lam g(lam, theta_T) - grad_lam g(lam, theta*) is of the size "
        "of theta_T - theta*.",
        "Unrolled: it adds Z_T^T b. That cancels the first-order error up to (Z_T - Z_*)^T b, "
        "and both of these factors go to zero.",
        "Implicit: it adds -J H^-1 b, the first-order change of grad_lam g from theta_T to theta*; "
        "what is left is of second order in theta_T - theta*.",
    )
    for got, expected, message in zip(answer, (1, 2, 2), messages, strict=True):
        try:
            same = float(got) == expected
        except (TypeError, ValueError):
            raise Wrong("expected three numbers.") from None
        if not same:
            raise Wrong(f"One exponent is not {got}. {message}")
