"""Checks of chapter 17, natural hypergradients."""

from itertools import combinations, product

import torch
import torch.nn.functional as F

from bilevel_lite.exercises import Wrong, compare, draw, exercise, numbers, several
from bilevel_lite.problem import BilevelProblem


@exercise("17.A")
def check_slopes(answer):
    """Slopes fitted on a problem with one parameter: g = log(1+e^t) - lam t + rho t^2."""
    newton, hypergradient = numbers(answer, 2)
    if newton == 2 and hypergradient == 2:
        raise Wrong(
            "So one hopes. But at which theta are H and b taken, of which v_+ = H^-1 b is made?"
        )
    if newton == 1:
        raise Wrong("The first: Newton's method squares the error, see (17.3).")
    if hypergradient == 0:
        raise Wrong("The second: at e = 0 the hypergradient is exact, so its error does fall.")
    truths, got = _slopes(), (newton, hypergradient)
    if got == truths[::-1]:
        raise Wrong("The other way round: first theta, then the hypergradient.")
    for value, truth, name in zip(got, truths, ("The first", "The second"), strict=True):
        if value != truth:
            raise Wrong(f"{name}: {value:.6g} is not right. Which power of e is left?")


def _slopes():
    """The whole numbers next to the slopes of Newton's error and of (17.2)'s hypergradient."""

    def at(t, lam):
        s = t.sigmoid()
        return s - lam + 0.1 * t, s * (1 - s) + 0.1  # g', g''

    lam, star = 0.8, torch.zeros((), dtype=torch.float64)
    for _ in range(60):
        slope, curve = at(star, lam)
        star = star - slope / curve

    def h(t, curve):  # f = t^2, J = -1, v = f' / g''
        return 2 * t / curve

    errors = []
    for e in (1e-3, 1e-4):
        slope, curve = at(star + e, lam)
        new = star + e - slope / curve
        errors.append((abs(new - star), abs(h(star + e, curve) - h(star, at(star, lam)[1]))))
    return tuple(
        float((first / second).log10().round()) for first, second in zip(*errors, strict=True)
    )


@exercise("17.B")
def check_scale(answer):
    """(17.7) with mean zero and N much above n; v is longer by as much as F is smaller."""
    smaller, longer = numbers(answer, 2)
    for value, name in ((smaller, "The matrix"), (longer, "v")):
        if abs(value - 100) <= 2:
            continue
        known = {
            1: "a mean of n gradients scatters less than one gradient does.",
            10: "the length of a mean falls like the root of n, but q enters twice.",
            10_000: "the variance of a mean falls like n, not like n squared.",
            0.01: "give the factor as a number above 1.",
        }
        for wrong, sentence in known.items():
            if abs(value - wrong) <= 0.02 * wrong:
                raise Wrong(f"{name}: {sentence}")
        raise Wrong(f"{name}: {value:.6g} is not right. What is the variance of a mean?")


def _pair(answer, what):
    """Two tensors, theta and v."""
    return several(answer, 2, f"{what} should return two tensors, theta and v.")


def _problem(generator, n=40, d=4, gamma=0.02):
    """Weighted logistic regression with an l2 term, its outer loss, and a point."""
    x, x_val = draw(generator, n, d), draw(generator, 30, d)
    y = (draw(generator, n) > 0).to(x)
    y_val = (draw(generator, 30) > 0).to(x)

    def inner_loss(lam, theta, batch=None):
        o = x @ theta
        return (lam.sigmoid() * (F.softplus(o) - y * o)).mean() + gamma * theta.square().sum()

    def outer_loss(lam, theta, batch=None):
        o = x_val @ theta
        return (F.softplus(o) - y_val * o).mean()

    lam, theta, v = draw(generator, n), draw(generator, d), 3 * draw(generator, d)
    return inner_loss, outer_loss, lam, theta, v


def _oracles(inner_loss, outer_loss, lam):
    """H, grad_theta g and b as functions of theta, by torch.func."""
    return (
        lambda theta: torch.func.hessian(inner_loss, argnums=1)(lam, theta),
        lambda theta: torch.func.grad(inner_loss, argnums=1)(lam, theta),
        lambda theta: torch.func.grad(outer_loss, argnums=1)(lam, theta),
    )


@exercise("17.1")
def check_predictions(answer):
    """(17.5), the costs that the package states, and the root of (17.10)."""
    values = numbers(answer, 4)
    low, high = 0.01, 1.0
    for _ in range(100):
        c = (low + high) / 2
        low, high = (low, c) if (2.718281828459045**c - 1) / c > 1.1 else (c, high)
    rows = (
        ("NBO-GD", 15, "Use (17.5); a product with H or J counts 2."),
        ("AID", 23, "Ten gradients, one of f, five products of 2, and J v."),
        ("NHGD", 13, "Ten gradients, one of f, and J v: the inverse costs no gradient."),
    )
    for value, (name, truth, hint) in zip(values[:3], rows, strict=True):
        if not abs(value - truth) < 1e-9:
            raise Wrong(f"{name}: {value:.6g} is not right. {hint}")
    memory = 7850 / c
    if abs(values[3] - 7850) < 100:
        raise Wrong("A memory as long as the dimension has nu = 1: an excess of 72 %.")
    if abs(values[3] - 78_500) < 1000:
        raise Wrong(
            "Nearly twice too long: for small nu, (e^nu - 1) / nu is 1 + nu / 2, not 1 + nu."
        )
    if abs(values[3] - 39_250) < 400:
        raise Wrong("Close, but too short: 1 + nu / 2 leaves out nu^2 / 6. Solve (17.10) itself.")
    if not abs(values[3] / memory - 1) < 0.02:
        raise Wrong(
            f"The memory: {values[3]:.6g} is not right. Solve (e^nu - 1) / nu = 1.1 for nu, for "
            "example by trial, and then nu = d (1 - beta)."
        )


@exercise("17.2")
def check_constant(newton_constant):
    """The third and second derivative by automatic differentiation."""
    generator = torch.Generator().manual_seed(172)
    for gamma in (0.0, 0.05):
        x, y = draw(generator, 30), (draw(generator, 30) > 0).double()
        sigma = torch.rand(30, generator=generator, dtype=torch.float64)

        def g(theta, x=x, y=y, sigma=sigma, gamma=gamma):
            o = x * theta
            return (sigma * (F.softplus(o) - y * o)).mean() + gamma * theta**2

        theta = torch.zeros((), dtype=torch.float64)
        first = torch.func.grad(g)
        second = torch.func.grad(first)
        third = torch.func.grad(second)
        for _ in range(50):
            theta = theta - first(theta) / second(theta)
        truth, p = third(theta) / (2 * second(theta)), (x * theta).sigmoid()
        h = (sigma * p * (1 - p) * x**2).mean()
        t = (sigma * p * (1 - p) * (1 - 2 * p) * x**3).mean()
        plain = (p * (1 - p) * x**2).mean() + 2 * gamma
        plain_t = (p * (1 - p) * (1 - 2 * p) * x**3).mean()
        compare(
            newton_constant(x.clone(), y.clone(), sigma.clone(), gamma, theta.clone()),
            truth,
            [
                ("The sign is wrong: expand g'(theta) AND g''(theta) around theta*.", -truth),
                ("A factor of 2 is missing: the two second-order terms partly cancel.", 2 * truth),
                ("That is half of the constant: compare with the factor in (17.3).", truth / 2),
                ("The l2 term adds 2 rho to the second derivative.", t / (2 * h)),
                ("The l2 term adds 2 rho, not rho.", t / (2 * (h + gamma))),
                ("The weights are missing.", plain_t / (2 * plain)),
            ],
            f"The constant at rho = {gamma}",
        )


@exercise("17.3")
def check_fisher(fisher_from_batches):
    """The formula on some of the batches; over all batches it is exact."""
    generator = torch.Generator().manual_seed(173)
    for N, n, kept in ((7, 3, 11), (6, 2, 8), (6, 5, 4)):
        rows = draw(generator, N, 3) + torch.tensor([0.7, 0.0, -0.4], dtype=torch.float64)
        mean, truth = rows.mean(0), rows.T @ rows / N
        every = torch.stack([rows[list(batch)].mean(0) for batch in combinations(range(N), n)])
        factor = n * (N - 1) / (N - n)

        def estimate(Q, mm, factor):
            return mm + factor * (Q.T @ Q / len(Q) - mm)

        mm = torch.outer(mean, mean)
        if float((estimate(every, mm, factor) - truth).norm()) > 1e-12 * float(truth.norm()):
            raise AssertionError("the formula of the check is wrong")
        Q = every[torch.randperm(len(every), generator=generator)[:kept]]
        second, own = Q.T @ Q / len(Q), torch.outer(Q.mean(0), Q.mean(0))
        around = (Q - mean).T @ (Q - mean) / len(Q)
        compare(
            fisher_from_batches(Q.clone(), mean.clone(), N, n),
            estimate(Q, mm, factor),
            [
                ("The mean's share must be taken out before scaling.", factor * second),
                ("That is n times the second moment: right at the optimum, for N much above n.",
                 n * second),
                ("Put the mean's share back after scaling.", factor * (second - mm)),
                ("The batches are drawn without replacement: the factor is not n.",
                 estimate(Q, mm, n)),
                ("The factor is upside down.", estimate(Q, mm, 1 / factor)),
                ("Nearly: the factor in (17.7) has N - 1, not N.",
                 estimate(Q, mm, n * N / (N - n))),
                ("That is the second moment of the batches, without any scale.", second),
                ("That is a sum over batches, not a mean.", mm + factor * (Q.T @ Q - mm)),
                *(
                    ("That is unbiased, too, but not (17.7) turned around: put the average of the "
                     "rows' q q^T in the place of its mean.", mm + factor * spread)
                    for spread in (around, torch.cov(Q.T))
                ),
                ("You use the mean of the rows of Q; that is biased. Use the mean that is given.",
                 estimate(Q, own, factor)),
                ("You use the mean of the rows of Q in one of its two places.",
                 mm + factor * (second - own)),
                ("You use the mean of the rows of Q in one of its two places.",
                 own + factor * (second - mm)),
            ],
            f"The estimate for N = {N}, n = {n}",
        )  # fmt: skip


@exercise("17.4")
def check_shared_step(shared_step):
    """Dense algebra."""
    generator = torch.Generator().manual_seed(174)
    inner_loss, outer_loss, lam, theta, v = _problem(generator)
    hessian, grad_g, grad_f = _oracles(inner_loss, outer_loss, lam)
    H, solve = hessian(theta), torch.linalg.solve
    theta_new = theta - solve(H, grad_g(theta))
    H_new, b, b_new = hessian(theta_new), grad_f(theta), grad_f(theta_new)
    v_new = v - solve(H, H_new @ v - b_new)
    problem = BilevelProblem(inner_loss, outer_loss)
    got = _pair(
        shared_step(problem, lam.clone(), theta.clone(), v.clone(), len(theta)), "shared_step"
    )
    compare(
        got[0],
        theta_new,
        [
            ("The order: theta first, then v.", v_new),
            ("theta moves the wrong way: subtract.", theta + solve(H, grad_g(theta))),
            ("theta did not move.", theta),
            ("theta made a plain gradient step; solve with H for it.", theta - grad_g(theta)),
        ],
        "theta",
        1e-6,
    )
    compare(
        got[1],
        v_new,
        [
            ("v solves the system of the old theta, as in (17.2): move the residual.", solve(H, b)),
            ("v moves the wrong way: subtract.", v + solve(H, H_new @ v - b_new)),
            ("v solves the system of the new theta exactly; use the old H for the solve.",
             solve(H_new, b_new)),
            ("H_+ v is missing: the residual uses the Hessian at the new theta.",
             v - solve(H, H @ v - b_new)),
            ("b belongs to the new theta as well.", v - solve(H, H_new @ v - b)),
            ("v did not move.", v),
        ],
        "v",
        1e-6,
    )  # fmt: skip
    one = _pair(shared_step(problem, lam.clone(), theta.clone(), v.clone(), 1), "shared_step")
    if float((torch.as_tensor(one[0]) - theta_new).norm()) <= 1e-6 * float(theta_new.norm()):
        raise Wrong("With steps = 1 theta is exact: give cg that number of steps, not more.")
    g = grad_g(theta)
    first = theta - g * (g @ g) / (g @ H @ g)
    r = hessian(first) @ v - grad_f(first)
    second = v - r * (r @ r) / (r @ H @ r)
    compare(one[0], first, [], "theta with steps = 1 (one step of cg from zero)", 1e-6)
    compare(one[1], second, [], "v with steps = 1 (one step of cg from zero)", 1e-6)


@exercise("17.5")
def check_repaired(fisher_update):
    """The inverse of the accumulated matrix."""
    generator = torch.Generator().manual_seed(175)
    d, size, beta = 4, 6, 0.7
    root = draw(generator, 2 * d, d)
    fisher = root.T @ root / d
    gradients = draw(generator, size, d)
    sigma = 0.2 + 2 * torch.rand(size, generator=generator, dtype=torch.float64)

    def inverse(power, mean, often, keep=beta):
        a = (1 - beta) / (size if mean else 1)
        if not often:
            return torch.linalg.inv(
                keep * fisher + a * (gradients.T * sigma ** (2 * power)) @ gradients
            )
        matrix = fisher
        for q in sigma[:, None] ** power * gradients:
            matrix = beta * matrix + a * torch.outer(q, q)
        return torch.linalg.inv(matrix)

    slips = (
        ("The gradients should carry sqrt(sigma), so that the matrix carries sigma once.", 1, 0.5),
        ("The new part is a mean over the batch, not a sum.", False, True),
        ("beta forgets once an update, not once for each example.", True, False),
    )
    mistakes = []
    for made in product((False, True), repeat=3):
        values = [slip[1] if bad else slip[2] for slip, bad in zip(slips, made, strict=True)]
        said = " ".join(slip[0] for slip, bad in zip(slips, made, strict=True) if bad)
        mistakes.append((said, inverse(*values)))
    truth = inverse(0.5, True, False)
    mistakes = mistakes[1:] + [
        ("The weights are missing.", inverse(0, True, False)),
        ("The old matrix is never multiplied by beta.", inverse(0.5, True, False, 1.0)),
        ("The inverse is never divided by beta.", beta * truth),
        ("The new part carries 1 - beta, too.",
         torch.linalg.inv(beta * fisher + (gradients.T * sigma) @ gradients / size)),
    ]  # fmt: skip
    half = (
        "Half of each repair: forget first, M / beta, and then beta must not stand in the "
        "denominator again; or leave it there, and divide once after the loop."
    )
    mistakes += [
        (half, _half(fisher, gradients, sigma, beta, 0.5, True)),
        (half + " And the new part is a mean over the batch.",
         _half(fisher, gradients, sigma, beta, 0.5, False)),
        (half + " And the gradients should carry sqrt(sigma).",
         _half(fisher, gradients, sigma, beta, 1.0, True)),
    ]  # fmt: skip
    got = fisher_update(torch.linalg.inv(fisher), gradients.clone(), sigma.clone(), beta)
    compare(got, truth, mistakes, "The inverse")


def _half(fisher, gradients, sigma, beta, power, mean):
    """M / beta first, and beta in the denominators as well."""
    M, a = torch.linalg.inv(fisher) / beta, (1 - beta) / (len(gradients) if mean else 1)
    for q in sigma[:, None] ** power * gradients:
        u = M @ q
        M = M - a * torch.outer(u, u) / (beta + a * q @ u)
    return M


@exercise("17.6")
def check_pair(pair_step):
    """Newton's step on the stacked residual, with its whole Jacobian by torch.func."""
    generator = torch.Generator().manual_seed(176)
    inner_loss, outer_loss, lam, theta, v = _problem(generator)
    hessian, grad_g, grad_f = _oracles(inner_loss, outer_loss, lam)
    d, z = len(theta), torch.cat([theta, v])

    def residual(z):
        theta, v = z[:d], z[d:]
        return torch.cat([grad_g(theta), hessian(theta) @ v - grad_f(theta)])

    jacobian = torch.func.jacfwd(residual)(z)
    theta_new, v_new = (z - torch.linalg.solve(jacobian, residual(z))).split(d)
    H, b, n = hessian(theta), grad_f(theta), theta - theta_new
    K, curvature = jacobian[d:, :d], torch.func.hessian(outer_loss, argnums=1)(lam, theta)
    solve = torch.linalg.solve
    H_new, b_new = hessian(theta_new), grad_f(theta_new)
    got = _pair(
        pair_step(inner_loss, outer_loss, lam.clone(), theta.clone(), v.clone()), "pair_step"
    )
    compare(
        got[0],
        theta_new,
        [
            ("theta moves the wrong way: subtract.", theta + n),
            ("The order: theta first, then v.", v_new),
        ],
        "theta",
    )
    compare(
        got[1],
        v_new,
        [
            ("That is (17.2): the block below the diagonal is missing.", solve(H, b)),
            ("The sign of the new term is wrong: theta moves by minus Delta theta.",
             solve(H, b - K @ n)),
            ("The Hessian of f is missing from the block: b moves with theta, too.",
             solve(H, b + (K + curvature) @ n)),
            ("The derivative of H v is missing from the block.", solve(H, b - curvature @ n)),
            ("That is (17.4), the moved residual; here the derivative at theta is asked for.",
             v - solve(H, H_new @ v - b_new)),
            ("That is v at the new theta, solved with its own Hessian.", solve(H_new, b_new)),
        ],
        "v",
    )  # fmt: skip
