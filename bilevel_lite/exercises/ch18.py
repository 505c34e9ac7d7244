"""Checks of chapter 18, long horizons and drift."""

import math

import torch

from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers


@exercise("18.A")
def check_signs(answer):
    """Negative at the start, positive in the mean at the end: measured in 18.3."""
    first, last = numbers(answer, 2)
    if first > 0:
        raise Wrong(
            "The first step: after 60 short steps the loss still falls. Would a longer first step "
            "not help?"
        )
    if last < 0:
        raise Wrong(
            "The last step: no later step repairs its noise, and what it gains is small. Which "
            "sign has a rate that should be lower?"
        )
    if (first, last) != (-1, 1):
        raise Wrong("Answer with two signs, such as (+1, -1).")


@exercise("18.B")
def check_jump(answer):
    """2 to 2.4 crosses a ripple's crest; the trap's members sit near 1, and its ridge is at 2.1."""
    if not isinstance(answer, str) or answer not in ("ripples", "trap", "both", "neither"):
        raise Wrong('Answer with one of "ripples", "trap", "both", "neither".')
    if answer in ("trap", "both"):
        raise Wrong(
            "The trap: from 1 a mutant gets to 0.8 or 1.2, where the slope leads straight back."
        )
    if answer == "neither":
        raise Wrong("The ripples: the next wave is 0.5 away; how far does a factor of 1.2 carry 2?")


def _curved(generator, d=4):
    """A loss that is no quadratic, and its gradient and Hessian product at a point."""
    A = draw(generator, d, d)
    A = A @ A.T / d + 0.3 * torch.eye(d).double()

    def loss(theta):
        return (theta @ A @ theta) / 2 + 0.1 * (theta**4).sum()

    return loss


def _slope(loss, theta):
    return torch.func.grad(loss)(theta)


def _product(loss, theta):
    return lambda p: torch.func.jvp(torch.func.grad(loss), (theta,), (p,))[1]


@exercise("18.1")
def check_nesterov(back):
    """By autograd through one step, with weights on both of its ends."""
    generator = torch.Generator().manual_seed(1801)
    for eta, beta in ((0.2, 0.9), (0.05, 0.4)):
        loss = _curved(generator)
        theta, u, w, u_bar = (draw(generator, 4) for _ in range(4))
        leaves = [x.clone().requires_grad_() for x in (theta, u)]
        rate = torch.tensor(eta, dtype=torch.float64).requires_grad_()
        q = torch.autograd.grad(loss(leaves[0]), leaves[0], create_graph=True)[0]
        u_next = beta * leaves[1] + q
        end = w @ (leaves[0] - rate * (q + beta * u_next)) + u_bar @ u_next
        truth = torch.autograd.grad(end, (*leaves, rate))
        q, hvp = q.detach(), _product(loss, theta)
        got = back(w.clone(), u_bar.clone(), u.clone(), q.clone(), hvp, eta, beta)
        if not isinstance(got, tuple | list) or len(got) != 3:
            raise Wrong("Return three things: w_t, the bar of u_t, and this step's part of h_eta.")
        c = u_bar - eta * beta * w
        plain = u_bar - eta * w
        compare(
            got[0], truth[0],
            [("That is heavy-ball momentum: here u_{t+1} reaches theta times beta, and q directly.",
              w + hvp(plain)),
             ("q also acts on theta_{t+1} directly, by -eta.", w + hvp(c)),
             ("w_t also contains w_{t+1}: theta_t moves theta_{t+1} one to one.",
              hvp(c - eta * w)),
             ("u_{t+1} reaches theta_{t+1} times beta.", w + hvp(plain - eta * w))],
            "w_t",
        )  # fmt: skip
        compare(
            got[1], truth[1],
            [("u_t reaches u_{t+1} times beta.", c),
             ("That is heavy-ball momentum: here u_{t+1} reaches theta times beta.", beta * plain),
             ("That leaves out the way through theta_{t+1}.", beta * u_bar)],
            "the bar of u_t",
        )  # fmt: skip
        end = (q + beta * (beta * u + q)).detach()
        compare(
            torch.as_tensor(got[2]), truth[2],
            [("The step goes downhill: minus.", w @ end),
             ("The step is along q + beta u_{t+1}, not along u_{t+1}.", -w @ (beta * u + q)),
             ("The step is along q + beta u_{t+1}, with the new u.", -w @ (q + beta * u))],
            "h_eta",
        )  # fmt: skip


def _training(generator, steps=5):
    losses = [_curved(generator) for _ in range(steps)]

    def step_at(t, theta):
        theta = theta.detach()
        return _slope(losses[t], theta), _product(losses[t], theta)

    return step_at, losses, draw(generator, 4) / 2


@exercise("18.2")
def check_columns(two_columns):
    """By central differences of the training."""
    generator = torch.Generator().manual_seed(1802)
    for lr, beta, l2 in ((0.1, 0.8, 0.03), (0.2, 0.3, 0.1)):
        step_at, losses, theta0 = _training(generator)
        steps = len(losses)

        def train(beta, l2, losses=losses, theta0=theta0, lr=lr):
            theta, u = theta0, torch.zeros(4).double()
            for loss in losses:
                u = beta * u + _slope(loss, theta) + 2 * l2 * theta
                theta = theta - lr * u
            return theta

        e = 1e-5
        truth = torch.stack([
            (train(beta + e, l2) - train(beta - e, l2)) / (2 * e),
            (train(beta, l2 + e) - train(beta, l2 - e)) / (2 * e),
        ])  # fmt: skip
        got = two_columns(step_at, theta0.clone(), steps, lr, beta, l2)
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("Return two things: theta_T and the columns, shape (2, d).")
        compare(
            got[0], train(beta, l2),
            [("The penalty is missing from the step.", train(beta, 0.0)),
             ("The gradient of l2 ||theta||^2 is 2 l2 theta.", train(beta, l2 / 2))],
            "theta_T", 1e-8,
        )  # fmt: skip
        wrong = [
            ("The order within a step: S takes the old u and theta, D takes the new S.",
             _columns(losses, theta0, lr, beta, l2, late=True)),
            ("The penalty also acts on D: (H + 2 l2) D.",
             _columns(losses, theta0, lr, beta, l2, through=0.0)),
            ("S keeps beta of itself.", _columns(losses, theta0, lr, beta, l2, keep=0.0)),
            ("The momentum comes first, then l2.", truth.flip(0)),
            ("The step's own derivative in l2 is 2 theta.", truth / torch.tensor([[1], [2]])),
            ("D goes downhill: minus lr S.", -truth),
        ]  # fmt: skip
        compare(got[1], truth, wrong, "the columns", 1e-6)


def _columns(losses, theta, lr, beta, l2, late=False, through=1.0, keep=1.0):
    u, D = torch.zeros(4).double(), torch.zeros(2, 4).double()
    S = torch.zeros(2, 4).double()
    for loss in losses:
        H, old = _product(loss, theta), (u, theta)
        u = beta * u + _slope(loss, theta) + 2 * l2 * theta
        new = torch.stack([u, 2 * (theta - lr * u)]) if late else torch.stack([old[0], 2 * old[1]])
        S = keep * beta * S + torch.stack([H(z) for z in D]) + through * 2 * l2 * D + new
        D, theta = D - lr * S, theta - lr * u
    return D


@exercise("18.3")
def check_parts(parts):
    """The second part by pairs of different orders, whose product has no noise in its mean."""
    generator = torch.Generator().manual_seed(1803)
    for n, T, L, drift in ((6, 12, 4, 4), (9, 20, 5, 4), (5, 8, 2, 0)):
        each = draw(generator, n, T) + torch.linspace(-1, drift - 1, T, dtype=torch.float64)
        if not drift:  # nothing is lost by sharing: an unbiased estimate is then below zero, too
            each = each - (1 - 1e-3) * each.mean(0)
        got = numbers(parts(each.clone(), L), 2)
        windows = each.view(n, T // L, L)
        shared = windows.mean(2)
        noise = float(shared.var(0).mean())
        gaps = shared[:, :, None] - windows  # of each order
        plain = float(gaps.mean(0).square().mean())
        excess = float(gaps.var(0).mean()) / n
        pairs = torch.einsum("atl,btl->ab", gaps, gaps) / T
        sharing = float((pairs.sum() - pairs.trace()) / (n * (n - 1)))
        near(
            got[0], noise, "The noise",
            [(noise * (n - 1) / n, "that divides by the number of orders; by n - 1."),
             (float(each.var(0).mean()) / L,
              "steps of one order need not vary alone: take the variance of the window's mean."),
             (float(each.var(0).mean()), "that is the noise of a single step's derivative."),
             (noise / n, "that is the variance of the mean over orders; we have one order.")],
            "The variance over orders of each window's mean, averaged over windows.", 1e-6,
        )  # fmt: skip
        near(
            got[1], sharing, "The part of sharing",
            [(plain, "the mean over orders is noisy itself: take the excess off."),
             (plain - float(each.var(0).mean()) / n,
              "the excess is the variance of (window mean minus h_t), which is less than h_t's."),
             (plain - excess * n, "the excess is 1/n of that variance."),
             (plain + excess, "the plain estimate is too large, not too small."),
             (0.0, "cut off at zero it is no longer unbiased: some estimates lie below."),
             (plain - excess * (n - 1) / n, "the variance divides by n - 1.")],
            "The mean square of the mean gaps, less 1/n of the gaps' variance.", 1e-6,
        )  # fmt: skip


@exercise("18.4")
def check_greedy(both):
    """By the exact second moments; the greedy rate by a fine grid as well."""
    generator = torch.Generator().manual_seed(1804)
    for steps, s2 in ((6, 0.5), (15, 0.1)):
        mu = 10 ** (2 * torch.rand(5, generator=generator, dtype=torch.float64) - 1)
        mu = 8 * mu / mu.max()  # so that the best rate lies within the grid
        theta, grid = (
            1 + draw(generator, 5).abs(),
            torch.linspace(0.002, 0.198, 393, dtype=torch.float64),
        )

        def after(eta, steps, mu=mu, theta=theta, s2=s2, power=1):
            second = theta**2
            for _ in range(steps):
                second = (1 - eta * mu) ** 2 * second + eta**2 * s2
            return float((mu**power * second).sum() / 2)

        def best(steps, grid=grid, after=after, **how):
            return min(grid.tolist(), key=lambda eta: after(eta, steps, **how))

        greedy = float((mu**2 * theta**2).sum() / (mu**3 * theta**2 + mu * s2).sum())
        far, one = best(steps), best(1)
        got = numbers(both(mu.clone(), theta.clone(), s2, steps, grid.clone()), 2)
        without = float((mu**2 * theta**2).sum() / (mu**3 * theta**2).sum())
        near(
            got[0], greedy, "The greedy rate",
            [(without, "the noise is missing: it adds eta^2 s2 mu / 2 for each coordinate."),
             (float((mu**2 * theta**2).sum() / (mu**3 * theta**2 + s2).sum()),
              "f weighs the noise of a coordinate with mu."),
             (float((mu * theta**2).sum() / (mu**2 * theta**2 + s2).sum()),
              "f weighs each coordinate with mu."),
             (one, "that is the best of the grid; the greedy rate is any real number."),
             (far, "that is the rate for all steps.")],
            "A parabola in eta: set its derivative to zero.", 1e-6,
        )  # fmt: skip
        near(
            got[1], far, "The rate for all steps",
            [(greedy, "that is the greedy rate."), (one, "that looks one step ahead."),
             (best(steps - 1), "count the steps: theta_T, not theta_{T-1}."),
             (best(steps + 1), "count the steps: theta_T, not theta_{T+1}."),
             (best(steps, power=0), "f weighs each coordinate with mu."),
             (best(steps, s2=0.0), "without the noise; it is drawn at every step.")],
            "Follow E theta^2 for all steps, for each rate of the grid.", 1e-9,
        )  # fmt: skip


@exercise("18.5")
def check_window(window):
    """By a fine grid around the minimum."""
    for noise, speed in ((1.0, 0.1), (3.0, 0.02), (0.2, 0.5), (0.05, 2.0)):
        grid = torch.linspace(1, 400, 400_001, dtype=torch.float64)
        cost = noise / grid + (speed * (grid - 1) / 2) ** 2
        truth = float(grid[cost.argmin()])
        near(
            numbers(window(noise, speed), 1)[0], truth, f"For noise {noise:g}, speed {speed:g}: L",
            [((2 * noise / speed**2) ** (1 / 3), "that is the rule for small drift; L - 1 counts."),
             ((noise / speed**2) ** (1 / 3), "the derivative of (L - 1)^2 / 4 is (L - 1) / 2."),
             ((2 * noise / speed) ** (1 / 3), "the speed enters squared.")],
            "Set the derivative of (18.8) to zero.", 2e-3,
        )  # fmt: skip
    if numbers(window(1.0, 0.0), 1)[0] != math.inf:
        raise Wrong("Without drift a longer window is always better: return math.inf.")
