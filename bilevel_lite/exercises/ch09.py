"""Checks of chapter 9, algorithms for bilevel problems."""

import math

import torch

from bilevel_lite.algorithms import AID
from bilevel_lite.exercises import Wrong, close, draw, exercise, near, numbers
from bilevel_lite.problem import BilevelProblem


def _require(rows, rtol):
    """Rows (value, name, truth, hint, [(wrong value, sentence)])."""
    for value, name, truth, hint, mistakes in rows:
        near(value, truth, name, mistakes, hint, rtol)


@exercise("9.A")
def check_penalty(answer):
    """The gap at rest by (9.7), on another draw of the labs at two condition numbers."""
    if not isinstance(answer, tuple | list) or len(answer) != 2:
        raise Wrong('Give two answers: (number, "yes" or "no").')
    number, word = answer if isinstance(answer[1], str) else reversed(answer)
    (ratio,), word = numbers([number], 1), str(word).strip().lower()
    if word not in ("yes", "no"):
        raise Wrong('The second answer is "yes" or "no".')
    if abs(ratio - 4) < 0.5:
        raise Wrong("That is how the distance of lam from lam* falls; the gap is quadratic in it.")
    if 0 < ratio < 1:
        raise Wrong("How many times smaller: a number above one.")
    if abs(ratio - 2) < 0.3:
        raise Wrong("The distance falls like 1/c, not like its root.")
    if not abs(ratio - 16) <= 1.5:
        raise Wrong(f"{ratio:g} is not right: distance like 1/c, gap like its square.")
    if word == "yes":
        raise Wrong("The number is right. But H and H_f are both multiplied by the same S.")


@exercise("9.B")
def check_newton(answer):
    """Section 9.5's measurement is the judge: about one."""
    if isinstance(answer, bool):
        raise Wrong("A number is asked for: the factor.")
    (growth,) = numbers(answer, 1)
    if abs(growth - 8) < 2:
        raise Wrong("The root of 64 is what CG's steps would grow by; here they are fixed at ten.")
    if abs(growth - 64) < 15:
        raise Wrong("That is how a method of gradient steps pays; NBO solves the systems.")
    if growth == 0:
        raise Wrong("A factor, not a difference: no growth is 1.")
    if not 0.6 <= growth <= 1.5:
        raise Wrong(f"{growth:g} is not right: what does an exact Newton step feel of kappa?")


@exercise("9.1")
def check_costs(answer):
    """Counted by hand from the definition of the methods."""
    aid, soba, amigo, f2sa = numbers(answer, 4)
    _require(
        [
            (aid, "AID", 10 + 1 + 5 * 2 + 2,
             "10 inner gradients, one of f, 5 products, one J v.",
             [(18, "a product with a second derivative counts 2."),
              (22, "f needs a gradient, too."),
              (21, "J v is missing."),
              (25, "from zero, CG needs no product for its first residual.")]),
            (soba, "SOBA", 1 + 2 + 1, "One gradient of g, one double backward pass, one of f.",
             [(6, "H v and J v come from one double backward pass."),
              (3, "f needs a gradient, too.")]),
            (amigo, "AmIGO", 5 + 1 + 5 * 2 + 2,
             "5 inner gradients, one of f, 5 products, one J v.",
             [(16, "J v is missing."),
              (13, "a product with a second derivative counts 2."),
              (17, "f needs a gradient, too.")]),
            (f2sa, "F2SA", 3 * 10 + 3,
             "z takes a gradient of g, theta one of g and one of f, in each inner step.",
             [(30, "the direction at the end needs three more gradients."),
              (31, "the direction at the end takes three gradients, not one."),
              (32, "the direction at the end takes three gradients, not two."),
              (23, "theta descends on f, too."),
              (22, "theta descends on f, too, and f needs a gradient at the end.")]),
        ],
        1e-9,
    )  # fmt: skip


@exercise("9.2")
def check_rest(answer):
    """Each direction is linear in lam; its zero by Newton's method on the derivatives."""
    lam, v, identity, penalty = numbers(answer, 4)
    h, j = 4.0, -8.0

    def rest(p, direct=0.5):  # direct lam - j p (2 lam - 3) = 0
        return -3 * j * p / (direct - 2 * j * p)

    solution = rest(1 / h)
    _require(
        [
            (lam, "SOBA's lambda", solution,
             "It rests where Phi'(lambda) = 0, with theta = 2 lambda.",
             [(1.5, "that is where f is least in theta alone; the direct term is missing."),
              (rest(1 / h, 0.25), "the derivative of lambda^2 / 4 is lambda / 2."),
              (0.0, "lambda moves theta*, and so f.")]),
            (v, "SOBA's v", (2 * solution - 3) / h, "At rest H v = b with b = theta - 3 and H = 4.",
             [((3 - 2 * solution) / h, "the sign: b = theta - 3."),
              (2 * solution - 3, "that is b; v = b / H."),
              ((2 * solution - 3) / 2, "H is the second derivative of 2 (theta - 2 lambda)^2.")]),
            (identity, "The identity's lambda", rest(0.05),
             "Set lambda / 2 - J 0.05 b to zero with J = -8 and b = 2 lambda - 3.",
             [(solution, "P = 0.05 is not 1 / H = 0.25, so it rests elsewhere."),
              (rest(0.05, 0.25), "the derivative of lambda^2 / 4 is lambda / 2."),
              (rest(1.0), "v is 0.05 b, not b.")]),
            (penalty, "F2SA's lambda", rest(1 / (h + 1)), "Use (9.7) with H = 4 and H_f = 1.",
             [(solution, "at c = 1 the penalty has a bias: P = 1 / (H + H_f / c)."),
              (rest(1 / (h - 1)), "the sign: H_f / c is added to H."),
              (rest(1.0), "H is missing in P = 1 / (H + H_f / c).")]),
        ],
        5e-3,
    )  # fmt: skip


def _cubic(seed, d=5, p=3):
    """g and f with known derivatives, and one AmIGO iteration by matrices.

    H, J and the direct term move with theta, so that it is seen where each was taken.
    """
    generator = torch.Generator().manual_seed(seed)
    root = draw(generator, d + 3, d)
    H = root.T @ root / d
    J, target, centre = draw(generator, p, d), draw(generator, d), draw(generator, p)
    bend, pull = 0.3 * draw(generator, d), 0.3 * draw(generator, p)

    def inner_loss(lam, theta, batch):
        cube = (bend * theta**3).sum() / 6 + (lam @ pull) * theta.square().sum() / 2
        return batch * (0.5 * theta @ H @ theta + lam @ J @ theta + cube)

    def outer_loss(lam, theta, batch):
        both = (lam @ pull) * (theta @ bend)
        return batch * (
            0.5 * (theta - target).square().sum() + 0.5 * (lam - centre).square().sum() + both
        )

    def hessian(lam, theta):
        return H + torch.diag(bend * theta) + (lam @ pull) * torch.eye(d).double()

    def cross(theta):
        return J + torch.outer(pull, theta)

    scale, weight = 0.7, 1.3  # the batches: both losses must be given theirs

    def iterate(lam, theta, v, inner_steps, linear_steps, a, eta, gamma, variant=""):
        before = theta
        for _ in range(inner_steps):
            slope = H @ theta + J.T @ lam + bend * theta**2 / 2 + (lam @ pull) * theta
            theta = theta - a * scale * slope

        def at(part):
            return before if variant == f"old {part}" else theta

        b = weight * (at("b") - target + (lam @ pull) * bend)
        curved = hessian(lam, at("H"))
        v = torch.zeros_like(v) if variant == "cold" else v
        given = v
        for _ in range(1 if variant == "one" else linear_steps):
            v = v - eta * ((weight if variant == "outer H" else scale) * curved @ v - b)
        slope = weight * (lam - centre + (at("direct") @ bend) * pull)
        direct = 0 if variant == "direct" else slope
        sign = -1 if variant == "sign" else 1
        u = {"b": b, "old v": given}.get(variant, v)
        return lam - gamma * (direct - sign * scale * cross(at("J")) @ u), theta, v

    batches = [torch.tensor(factor, dtype=torch.float64) for factor in (scale, weight)]
    starts = draw(generator, p), draw(generator, d), draw(generator, d)
    return BilevelProblem(inner_loss, outer_loss), starts, batches, iterate


@exercise("9.3")
def check_amigo(amigo_scratch):
    """One iteration by dense matrices."""
    mistakes = {
        "cold": "v starts from zero: it should go on from the v that is given.",
        "old b": "b is taken at the old theta: theta moves first.",
        "old direct": "the direct term is taken at the old theta: theta moves first.",
        "old H": "H is taken at the old theta: theta moves first.",
        "old J": "J is taken at the old theta: theta moves first.",
        "one": "v takes one step only, not linear_steps.",
        "direct": "the direct term grad_lam f is missing.",
        "sign": "J v has the wrong sign.",
        "b": "J multiplies b instead of v.",
        "old v": "J multiplies the v from before its steps; it should be the new one.",
        "outer H": "H v is on the outer batch; it belongs to the inner one.",
    }
    for seed, steps in ((93, (3, 4)), (94, (1, 2))):
        problem, starts, batches, iterate = _cubic(seed)
        rates = 0.11, 0.07, 0.05
        truth = iterate(*starts, *steps, *rates)
        copies = [t.clone() for t in starts]
        got = amigo_scratch(problem, *copies, *batches, *steps, *rates)
        if not isinstance(got, tuple | list) or len(got) != 3:
            raise Wrong("Return three tensors: lam, theta, v.")
        if all(isinstance(t, torch.Tensor) for t in got):
            for variant, sentence in mistakes.items():
                wrong = iterate(*starts, *steps, *rates, variant)
                if all(
                    g.shape == w.shape and float((g.to(w) - w).norm()) <= 1e-9 * float(w.norm())
                    for g, w in zip(got, wrong, strict=True)
                ):
                    raise Wrong(f"Nearly: {sentence}")
            shapes = [tuple(t.shape) for t in got]
            if shapes != [tuple(t.shape) for t in truth]:
                raise Wrong(f"Return lam, theta, v in this order; the shapes are {shapes}.")
        for name, value, expected in zip(("theta", "v", "lam"), (got[1], got[2], got[0]),
                                         (truth[1], truth[2], truth[0]), strict=True):  # fmt: skip
            close(value, expected, f"The new {name}", 1e-9)


@exercise("9.4")
def check_stocbio(repaired):
    """The sum of products, written with matrices; every mixture of the three mistakes is known."""
    generator = torch.Generator().manual_seed(94)
    d, count, step = 4, 3, 0.2
    roots = [draw(generator, d + 2, d) for _ in range(count)]
    matrices = [r.T @ r / d for r in roots]
    b = draw(generator, d)

    def series(first, factor, reuse, count=count, reverse=False):
        p, total = b, b if first else torch.zeros_like(b)
        order = matrices[::-1] if reverse else matrices
        for matrix in order[:count]:
            p = p - step * ((matrices[0] if reuse else matrix) @ p)
            total = total + p
        return step * total if factor else total

    given = b.clone()
    got = repaired([lambda p, M=M: M @ p for M in matrices], given, step)
    if not torch.equal(given, b):
        raise Wrong("The function changes b in place: write p = p - ..., not p -= ...")
    parts = (
        "The summand k = 0, which is b itself, is missing.",
        "The sum is not multiplied by the step.",
        "Every factor uses the first batch; it should use its own.",
    )
    known = [
        (" ".join(s for s, bad in zip(parts, bits, strict=True) if bad), series(*keep))
        for bits in [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1) if i + j + k]
        for keep in [(not bits[0], not bits[1], bits[2])]
    ]
    known += [
        ("The last factor is missing.", series(True, True, False, count - 1)),
        ("The factors are used in the wrong order: H_1 comes first. (Horner's rule reverses them: "
         "the mean is the same, the sum is not.)", series(True, True, False, reverse=True)),
    ]  # fmt: skip
    if isinstance(got, torch.Tensor) and got.shape == b.shape:
        for sentence, wrong in known:
            if float((got.to(wrong) - wrong).norm()) <= 1e-9 * float(wrong.norm()):
                raise Wrong(sentence)
    close(got, series(True, True, False), "v", 1e-9)


def _labs(kappa, seed, n=200, n_val=100, d=20, labs=10, rho=0.01):
    """Another draw of section 9.1's problem, and its gap in closed form."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(matrix):
        q, r = torch.linalg.qr(matrix)
        return q * r.diagonal().sign()

    c = torch.eye(labs, dtype=torch.float64).repeat_interleave(n // labs, 0)
    q = n**0.5 * orthonormal(draw(generator, n, d) + c @ draw(generator, labs, d))
    scale = torch.logspace(0, -0.5 * math.log10(kappa), d, dtype=torch.float64)
    r = scale[:, None] * orthonormal(draw(generator, d, d))
    q_val, signal = draw(generator, n_val, d), draw(generator, d)
    y = q @ signal + c @ draw(generator, labs) + 0.1 * draw(generator, n)
    y_val = q_val @ signal + 0.1 * draw(generator, n_val)
    x, x_val = q @ r, q_val @ r

    def inner_loss(lam, theta, batch):
        x, y, index = batch
        return 0.5 * (x @ theta - y + c[index] @ lam).square().mean()

    def outer_loss(lam, theta, batch):
        x, y = batch
        return 0.5 * (x @ theta - y).square().mean() + 0.5 * rho * lam.square().sum()

    # In the coordinates of q the inner solution is a projection.
    k = q.T @ c / n
    m = rho * torch.eye(labs, dtype=torch.float64) + (q_val @ k).T @ (q_val @ k) / n_val
    star = torch.linalg.solve(m, k.T @ q_val.T @ (q_val @ (q.T @ y / n) - y_val) / n_val)

    def gap(lam):
        error = lam.to(star) - star
        return float(error @ m @ error / (star @ m @ star))

    problem = BilevelProblem(inner_loss, outer_loss)
    return problem, (x, y, torch.arange(n)), (x_val, y_val), gap


@exercise("9.5")
def check_tuned(my_aid):
    """The student's method on two draws that the chapter does not show."""
    for seed in (95, 96):
        problem, inner, outer, gap = _labs(100.0, seed)
        lam, theta = (torch.zeros(size, dtype=torch.float64) for size in (10, 20))
        method = my_aid(problem, lam, theta, inner, outer)
        if not isinstance(method, AID):
            raise Wrong(f"Return a bl.AID; this is a {type(method).__name__}.")
        if method.problem is not problem or float(method.lam.norm() + method.theta.norm()) > 0:
            raise Wrong("The method should work on the given problem, from the given lam, theta.")
        last = 1.0
        while True:
            try:
                cost = method.step().gradients
            except ValueError as error:
                raise Wrong(f"The run diverged. {str(error).splitlines()[0]}") from None
            if cost > 1000:
                break
            last = gap(method.lam)
        if not last < 1e-5:
            advice = "Which of the two systems is not followed: the one for theta, or that for v?"
            if last > 1:
                advice = "That is no better than the start: is a step too long?"
            raise Wrong(f"The gap after 1000 gradients is {last:.2e}, not below 1e-5. {advice}")
