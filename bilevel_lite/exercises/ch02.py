"""Checks of chapter 2, unrolling.

The truths are autograd through the whole graph of a descent, and counting. What the known mistakes
give is computed on the same draw.
"""

from math import inf

import torch

from bilevel_lite.exercises import Wrong, compare, exercise, numbers
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import gradient, update_vjp


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


def _autograd(problem, lam, theta0, lrs, momentum=0.0):
    """Gradients of Phi_T in lam and in each step size, by autograd through the whole graph."""
    lam = lam.detach().requires_grad_()
    lrs = torch.as_tensor(lrs, dtype=lam.dtype).requires_grad_()
    theta = theta0.detach().requires_grad_()
    velocity = torch.zeros_like(theta)
    for lr in lrs:
        (grad,) = torch.autograd.grad(
            problem.inner_loss(lam, theta, None), theta, create_graph=True
        )
        velocity = momentum * velocity + grad
        theta = theta - lr * velocity
    return torch.autograd.grad(problem.outer_loss(lam, theta, None), (lam, lrs))


@exercise("2.A")
def _(answer):
    """g = (theta - 2)^2 / 2 + lam theta^2 / 2, f = (theta - 1)^2 / 2; one step from theta0 = 1."""
    theta, slope = numbers(answer, 2)
    if not abs(theta - 1.25) < 0.005:
        raise Wrong(
            f"theta_1 is not {theta:.4g}: it is theta_0 - eta (theta_0 - 2 + lam theta_0), and all "
            "three numbers are given."
        )
    mistakes = (
        (0.125, "The sign is wrong: the step goes down the gradient, so J enters with a minus."),
        (-0.25, "The step size is missing: theta_1 moves by -eta J_0, not by -J_0."),
        (-0.5, "That is dtheta_1 / dlam; multiply by b = theta_1 - 1."),
        (-0.15625, "J belongs to the point where the step started: J_0 = theta_0, not theta_1."),
        (0.0, "b is taken at theta_1, where the descent ended, not at theta_0."),
        (
            -5 / 24,
            "That is the implicit formula at theta_1. There is no solve here: one step only.",
        ),
    )
    for value, sentence in mistakes:
        if abs(slope - value) < 0.004:
            raise Wrong(sentence)
    if not abs(slope + 0.125) < 0.004:
        raise Wrong(
            f"dPhi_1/dlam is not {slope:.4g}: differentiate theta_1 with theta_0 held still, "
            "and multiply by theta_1 - 1."
        )


@exercise("2.B")
def _(answer):
    """The least T with 1 - (1 - eta mu)^T >= 0.9 for eta = 0.2 and mu = 0.5."""
    steps = _count(answer)
    known = {
        10: "10 = 1 / (eta mu) steps recover 1 - 0.9^10, about 65 %.",
        21: "After 21 steps 0.9^21 = 0.109 is still missing.",
        1: "One step recovers eta mu = 0.1 of it.",
        9: "Each step recovers a tenth of what is missing, not a tenth of the whole.",
    }
    if 21 < steps < 22:
        raise Wrong("A number of steps is a whole number: round in the right direction.")
    if steps != 22:
        raise Wrong(
            known.get(steps, f"Not {steps:.6g}: what is missing is multiplied by 1 - eta mu = 0.9.")
        )


def _count(steps) -> float:
    """Read a number of steps."""
    try:
        return float(steps)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"Expected one number of steps, got {type(steps).__name__}.") from None


@exercise("2.1")
def _(answer):
    cases = [(0.1, 2.0, 0.5, 1e-3), (0.1, 2.0, 0.96, 1e-3), (0.02, 5.0, 0.2, 1e-8)]
    cases += [(1.0, 1.0, 0.5, 0.25), (0.5, 4.0, 0.45, 0.3)]
    cases = [(*case, _steps_needed(*case)) for case in cases]
    cases += [(0.1, 2.0, lr, 1e-3, inf) for lr in (1.0, 1.2)]
    for low, high, lr, tol, steps in cases:
        got = _count(answer(low, high, lr, tol))
        if got == steps:
            continue
        asked = f"For mu_min={low}, mu_max={high}, lr={lr}, tol={tol}: got {got:.6g}, but "
        if steps == inf:
            raise Wrong(asked + "|1 - lr mu_max| >= 1, so no number of steps will do.")
        slow = abs(1 - lr * high) > abs(1 - lr * low)
        why = " There the large eigenvalue is the slow one." * slow
        raise Wrong(f"{asked}{steps} steps are needed.{why}")


def _steps_needed(low, high, lr, tol):
    """Exercise 2.1 by counting."""
    q, steps = max(abs(1 - lr * low), abs(1 - lr * high)), 0
    while q**steps > tol * (1 + 1e-9):
        steps += 1
    return steps


@exercise("2.2")
def _(answer):
    for d, m, T in [(10, 1, 50), (1000, 20, 100), (50, 2, 10), (10_000, 1, 5), (10, 500, 30)]:
        got = answer(d, m, T)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("The answer should be a pair: cheaper in gradients, smaller in memory.")
        if not set(got) <= {"reverse", "forward"}:
            raise Wrong(f'The answer should be "reverse" or "forward", twice; got {got!r}.')
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
    direct = gradient(problem.outer_loss, lam, _descent(problem, lam, theta0, lrs)[-1])[1]
    mistakes = (
        (
            "This is still the buggy result: which w belongs to theta_{t+1}, the old or the new?",
            _reverse(problem, lam, theta0, lrs, late=True),
        ),
        ("The direct term is missing: h starts as grad_lam f.", truth - direct),
        ("The sign is wrong: h <- h - lr J w.", 2 * direct - truth),
        (
            "J_t and H_t belong to theta_t, where the step started, not to theta_{t+1}.",
            _reverse(problem, lam, theta0, lrs, shift=1),
        ),
        (
            "The schedule runs backwards on the way back: step t has lrs[t].",
            _reverse(problem, lam, theta0, lrs, turned=True),
        ),
    )
    got = answer(problem, lam, theta0, list(lrs))
    compare(got, truth, mistakes, "The hypergradient", 1e-6)


def _descent(problem, lam, theta, lrs):
    """All iterates of gradient descent."""
    iterates = [theta]
    for lr in lrs:
        iterates.append(iterates[-1] - lr * gradient(problem.inner_loss, lam, iterates[-1])[2])
    return iterates


def _reverse(problem, lam, theta0, lrs, late=False, shift=0, turned=False):
    """The reverse recursion with a mistake: w before h, the next iterate, lrs from the start."""
    iterates = _descent(problem, lam, theta0, lrs)
    _, h, w = gradient(problem.outer_loss, lam, iterates[-1])
    for k, t in enumerate(reversed(range(len(lrs)))):
        lr = lrs[k] if turned else lrs[t]
        Jw, Hw = update_vjp(problem.inner_loss, lam, iterates[t + shift], None, w)
        if late:
            Jw, _ = update_vjp(problem.inner_loss, lam, iterates[t], None, w - lr * Hw)
        h, w = h - lr * Jw, w - lr * Hw
    return h


@exercise("2.4")
def _(answer):
    for steps in (1, 7):
        problem, lam, theta0 = _toy(seed=2)
        slopes = _autograd(problem, lam, theta0, [0.2] * steps)[1]
        truth, (late, still) = slopes.sum(), _step_size_mistakes(problem, lam, theta0, steps, 0.2)
        mistakes = (
            ("Only the sign is wrong: the step goes down the gradient.", -truth),
            ("Only one step is there: each of the T steps contributes.", slopes[-1]),
            ("Only one step is there: each of the T steps contributes.", slopes[0]),
            (
                "That is the mean over the steps; they share one step size: add them up.",
                slopes.mean(),
            ),
            (
                "Meet the gradient at theta_t with the w of theta_{t+1}, not with that of theta_t.",
                late,
            ),
            ("w stays as it was at the end: carry it back, w <- w - lr H_t w.", still),
            ("The implicit formula says zero; Phi_T does depend on the step size.", 0 * truth),
        )
        got = answer(problem, lam, theta0, steps, 0.2)
        compare(got, truth, mistakes, f"dPhi_T/dlr for T = {steps}", 1e-6)


def _step_size_mistakes(problem, lam, theta0, steps, lr):
    """Exercise 2.4 with the w of theta_t, and with the w of the end."""
    iterates = _descent(problem, lam, theta0, [lr] * steps)
    b = w = gradient(problem.outer_loss, lam, iterates[-1])[2]
    late = still = torch.zeros((), dtype=torch.float64)
    for theta in reversed(iterates[:-1]):
        w = w - lr * update_vjp(problem.inner_loss, lam, theta, None, w)[1]
        grad = gradient(problem.inner_loss, lam, theta)[2]
        late, still = late - w @ grad, still - b @ grad
    return late, still


@exercise("2.5")
def _(answer):
    problem, lam, theta0 = _toy(seed=3)
    for momentum in (0.0, 0.8):
        truth, _ = _autograd(problem, lam, theta0, [0.1] * 6, momentum)
        wrong = [
            _heavy_ball(problem, lam, theta0, 6, 0.1, momentum, **kinds)
            for kinds in ({"hand_on": 1.0}, {"hand_on": 0.0}, {"direct": False})
        ]
        hand_on = "nu_{t+1} depends on nu_t with the factor momentum: on the way back, too."
        mistakes = (
            (hand_on, wrong[0]),
            (
                "nu_bar gets lost: hand it on to nu_t, with a factor, and add -eta w to it.",
                wrong[1],
            ),
            ("The direct term is missing: h starts as grad_lam f.", wrong[2]),
            ("That is the result without momentum.", _autograd(problem, lam, theta0, [0.1] * 6)[0]),
        )
        got = answer(problem, lam, theta0, 6, 0.1, momentum)
        compare(got, truth, mistakes, f"The hypergradient with momentum {momentum}", 1e-6)


def _heavy_ball(problem, lam, theta0, steps, lr, momentum, hand_on=None, direct=True):
    """The way back through heavy-ball momentum, with a mistake."""
    iterates, velocity = [theta0], torch.zeros_like(theta0)
    for _ in range(steps):
        grad = gradient(problem.inner_loss, lam, iterates[-1])[2]
        velocity = momentum * velocity + grad
        iterates.append(iterates[-1] - lr * velocity)
    _, h, w = gradient(problem.outer_loss, lam, iterates[-1])
    h, bar = h * direct, torch.zeros_like(w)
    for theta in reversed(iterates[:-1]):
        bar = bar - lr * w
        Jb, Hb = update_vjp(problem.inner_loss, lam, theta, None, bar)
        h, w, bar = h + Jb, w + Hb, bar * (momentum if hand_on is None else hand_on)
    return h


@exercise("2.6")
def _(answer):
    messages = (
        "The gradient alone: grad_lam g(lam, theta_T) - grad_lam g(lam, theta*) is of the size "
        "of theta_T - theta*.",
        "Unrolled: it adds D_T^T b. That cancels the first-order error up to (D_T - D_*)^T b, "
        "and both of these factors go to zero.",
        "Implicit: it adds -J H^-1 b, the first-order change of grad_lam g from theta_T to theta*; "
        "what is left is of second order in theta_T - theta*.",
    )
    for got, expected, message in zip(numbers(answer, 3), (1, 2, 2), messages, strict=True):
        if got != expected:
            raise Wrong(f"One exponent is not {got:.4g}. {message}")
