"""Checks of chapter 13b, meta-learning in a page."""

import torch

from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers, several
from bilevel_lite.linsolve import cg


@exercise("13b.A")
def check_factors(answer):
    """(1 - lr a)^T, twice."""
    small, large = numbers(answer, 2)
    near(
        small, 0.5**5, "The first factor",
        [(0.5, "that is one step; each step has such a factor."),
         (0.5**6, "five steps have five factors."), (0.5**4, "five steps have five factors."),
         (0.5**10, "FOMAML's b has the error of the same end point: compare h with b."),
         (2**5, "that is how many times larger FOMAML's is.")],
        "Each step multiplies by 1 - lr a.", 0.02,
    )  # fmt: skip
    near(
        large, -(0.5**5), "The second factor",
        [(0.5**5, "1 - 3/2 is negative, and five is odd."),
         (1.5**5, "each step multiplies by 1 - lr a, not by lr a."),
         (2.5**5, "each step multiplies by 1 - lr a, not by 1 + lr a.")],
        "Each step multiplies by 1 - lr a.", 0.02,
    )  # fmt: skip


@exercise("13b.B")
def check_anchor_factors(answer):
    """tau / (mu + tau), three times."""
    for value, mu in zip(numbers(answer, 3), (8, 0, -1), strict=True):
        name = f"For mu = {mu}: the factor"
        near(
            value, 2 / (mu + 2), name,
            [(1 / (mu + 2), "that is v's; h is tau v."), (-2 / (mu + 2), "J is minus tau I."),
             (mu / (mu + 2), "that is what the anchor takes away: 1 minus the factor."),
             (2 * (mu + 2), "the matrix is inverted.")],
            "h_i is tau times the inverse of H_i + tau I, times b_i.", 0.02,
        )  # fmt: skip


def _task(generator, d=5, points=6):
    """A small network with one input, as a loss of (theta, batch), and two sets of points."""

    def loss(theta, batch):
        x, y = batch
        return (torch.tanh(x[:, None] * theta[:d] + theta[d : 2 * d]).sum(1) - y).square().mean()

    sets = [(draw(generator, points), draw(generator, points)) for _ in range(2)]
    return loss, draw(generator, 2 * d), *sets


def _slope(loss, theta, batch):
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(loss(theta, batch), theta)[0]


@exercise("13b.1")
def check_one_step(one_step):
    """By central differences of f(lam - lr grad l(lam)) along every coordinate."""
    generator = torch.Generator().manual_seed(1301)
    for lr in (0.05, 0.2):
        loss, lam, support, query = _task(generator)

        def phi(lam, lr=lr, loss=loss, support=support, query=query):
            return loss(lam - lr * _slope(loss, lam, support), query)

        step, eye = 1e-5, torch.eye(len(lam)).double()
        truth = torch.stack([(phi(lam + step * e) - phi(lam - step * e)) / (2 * step) for e in eye])
        got = one_step(loss, lam.clone(), support, query, lr)
        theta = lam - lr * _slope(loss, lam, support)
        b, early = _slope(loss, theta, query), _slope(loss, lam, query)

        def product(at, batch, v, loss=loss):
            return torch.autograd.functional.hvp(lambda t: loss(t, batch), at, v)[1]

        hb = product(lam, support, b)
        compare(
            got, truth,
            [("That is b alone, first-order MAML: the step's own derivative is missing.", b),
             ("b is taken where the task ends, at theta_1, not at lam.",
              early - lr * product(lam, support, early)),
             ("H belongs to the step, which begins at lam: not at theta_1.",
              b - lr * product(theta, support, b)),
             ("H is that of the support loss, on which the step was made.",
              b - lr * product(lam, query, b)),
             ("The step goes downhill: I minus lr H.", b + lr * hb),
             ("H is multiplied by lr.", b - hb),
             ("That is the product with H alone: I minus lr H.", -lr * hb)],
            f"With lr = {lr} the hypergradient", 1e-6,
            "One gradient at theta_1, one product with H at lam.",
        )  # fmt: skip


@exercise("13b.2")
def check_anchored(anchored):
    """By the package's CG with as many iterations; after d of them by a direct solve."""
    generator = torch.Generator().manual_seed(1302)
    for d, tau in ((6, 0.5), (4, 3.0)):
        root = draw(generator, d, d)
        H, b = root @ root.T, draw(generator, d)
        for iters in (1, 2, d):
            calls = []

            def hvp(v, H=H, calls=calls):
                calls.append(1)
                return H @ v

            truth = tau * cg(lambda v: H @ v + tau * v, b, iters, tol=0.0).solution  # noqa: B023
            if iters == d:
                truth = tau * torch.linalg.solve(H + tau * torch.eye(d).double(), b)
            got = anchored(hvp, b.clone(), tau, iters)
            plain = cg(lambda v: H @ v, b, iters, tol=0.0).solution  # noqa: B023
            more = cg(lambda v: H @ v + tau * v, b, iters + 1, tol=0.0).solution  # noqa: B023
            exact = torch.linalg.solve(H + tau * torch.eye(d).double(), b)
            half = cg(lambda v: H @ v + tau / 2 * v, b, iters, tol=0.0).solution  # noqa: B023
            compare(
                got, truth,
                [("That is v: h is tau v.", truth / tau), ("J is minus tau I: h is plus tau v.",
                                                           -truth),
                 ("The anchor is missing from the matrix: H + tau I.", plain),
                 ("The anchor is missing from the matrix: H + tau I.", tau * plain),
                 ("The derivative of tau/2 ||theta - lam||^2 is tau (theta - lam), without a half.",
                  tau * half),
                 ("That is one iteration more than asked for.", tau * more),
                 ("That is the exact solution: take as many iterations as asked for.",
                  tau * exact)],
                f"After {iters} iterations h", 1e-7,
                "Start at v = 0, with r = p = b.",
            )  # fmt: skip
            if len(calls) > iters + 1:
                raise Wrong(
                    f"{len(calls)} products for {iters} iterations: one an iteration is enough."
                )
    if anchored.kind is not torch.Tensor:
        return  # NumPy and lists know no vmap: their numbers are all there is to judge
    roots, b = draw(generator, 3, 4, 4), draw(generator, 3, 4)
    try:
        torch.func.vmap(lambda R, b: anchored(lambda v: R @ (R.mT @ v), b, 1.0, 2))(roots, b)
    except Exception as error:
        raise Wrong(
            "It does not run under torch.func.vmap. Some line looks at a number, leaves torch, or "
            f"writes into a tensor that has no place for all tasks (v = v + ..., not v += ...): "
            f"{str(error).splitlines()[0]}"
        ) from error


def _ends(A, c, lr, steps):
    """Zeros of the three directions, tasks being quadratic: sum_i K_i (lam - c_i) = 0."""
    eye = torch.eye(c.shape[1]).double()
    M = torch.linalg.matrix_power(eye - lr * A, steps)
    kinds = {"MAML": M @ A @ M, "FOMAML": A @ M, "Reptile": eye - M, "joint": A}
    return {
        name: torch.linalg.solve(K.sum(0), (K @ c[..., None]).sum(0)[:, 0])
        for name, K in kinds.items()
    }


@exercise("13b.3")
def check_ends(ends):
    """By linear algebra; the directions are held against autograd through the steps."""
    generator = torch.Generator().manual_seed(1303)
    for n, d, lr, steps in ((3, 2, 0.3, 3), (4, 3, 0.1, 5)):
        root = draw(generator, n, d, d)
        A = root @ root.mT / d + 0.2 * torch.eye(d).double()
        A = A / torch.linalg.eigvalsh(A).amax(1)[:, None, None]
        A = A * torch.linspace(0.5, 1.5, n).double()[:, None, None]
        c = draw(generator, n, d)
        truth = _ends(A, c, lr, steps)
        asked = "Return three vectors: where MAML, FOMAML and Reptile stand still."
        got = several(ends(A.clone(), c.clone(), lr, steps), 3, asked)
        other = {
            "one step more": _ends(A, c, lr, steps + 1),
            "one step less": _ends(A, c, lr, steps - 1),
        }
        for name, mine in zip(("MAML", "FOMAML", "Reptile"), got, strict=True):
            others = [(f"{name}: that is where {k} stands still.", v)
                      for k, v in truth.items() if k != name]  # fmt: skip
            compare(
                mine, truth[name],
                [*others,
                 (f"{name}: that is the mean of the tasks' minima; curvature weighs them.",
                  c.mean(0)),
                 *((f"{name}: count the steps; that is {k}.", v[name]) for k, v in other.items())],
                f"{name}: lam", 1e-7,
                "Each direction is a sum of K_i (lam - c_i), with theta_T - c_i = M_i (lam - c_i).",
            )  # fmt: skip


@exercise("13b.4")
def check_limits(limits):
    """By the eigenvectors of A; and near the limits by the formula itself."""
    generator = torch.Generator().manual_seed(1304)
    for d, rank in ((5, 3), (4, 1)):
        root = draw(generator, d, rank)
        A, c, q, lam = root @ root.T, draw(generator, d), draw(generator, d), draw(generator, d)
        eye = torch.eye(d).double()
        P = eye - root @ torch.linalg.pinv(root)

        def h(tau, A=A, c=c, q=q, lam=lam, eye=eye):
            theta = torch.linalg.solve(A + tau * eye, A @ c + tau * lam)
            return tau * torch.linalg.solve(A + tau * eye, theta - q)

        weak, strong = P @ (lam - q), lam - q
        assert (h(1e-5) - weak).norm() < 1e-2 * weak.norm() + 1e-2  # this check's own limits
        assert (h(1e6) - strong).norm() < 1e-3 * strong.norm()
        asked = "Return two vectors: h as tau goes to zero, and as tau goes to infinity."
        got = several(limits(A.clone(), c.clone(), q.clone(), lam.clone()), 2, asked)
        compare(
            got[0], weak,
            [("A has directions without curvature: there the anchor is all that there is.",
              0 * weak),
             ("In the directions without curvature theta stays at lam, it does not go to c.",
              P @ (c - q)),
             ("That is the part with curvature, which is forgotten.", strong - weak),
             ("That is the limit of a strong anchor.", strong),
             ("The limit of theta is meant to be used in b: b = theta - q.", P @ lam)],
            "For tau to zero h", 1e-6, "What is tau / (mu + tau) for mu > 0, and for mu = 0?",
        )  # fmt: skip
        compare(
            got[1], strong,
            [("A strong anchor keeps theta at lam: b is taken there, not at c.", c - q),
             ("tau / (mu + tau) goes to 1, not to 0.", 0 * strong),
             ("That is the limit of a weak anchor.", weak)],
            "For tau to infinity h", 1e-6, "Where is theta, and what is tau / (mu + tau)?",
        )  # fmt: skip
