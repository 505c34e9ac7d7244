"""Checks of chapter 13, learning to weight."""

from functools import partial
from itertools import combinations

import torch

from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers, several


@exercise("13.A")
def check_weight(answer):
    """V(l) = l / (1 + l) at l = 2, detached and not."""
    stopped, through = numbers(answer, 2)
    near(
        stopped, 2 / 3, "Detached",
        [(8 / 9, "that is with the gradient through V."), (4 / 3, "that is V times the loss.")],
        "The gradient of V l with V held fixed is V times the gradient of l.", 0.01,
    )  # fmt: skip
    near(
        through, 8 / 9, "Not detached",
        [(2 / 3, "V moves with l, too."), (1 / 9, "that is V' alone: it comes times l, beside V."),
         (7 / 9, "V' comes times l, which is 2."), (2 / 9, "that is V' l alone: V comes too.")],
        "The derivative of V(l) l in l is V + V' l, and V' = 1 / (1 + l)^2.", 0.01,
    )  # fmt: skip


@exercise("13.B")
def check_order(answer):
    """Three rows of the live run by their accuracy on the last three classes."""
    names = ["meta", "balanced", "network"]
    if not isinstance(answer, list | tuple) or sorted(map(str, answer)) != sorted(names):
        raise Wrong('Give the three names once each, as in ("network", "balanced", "meta").')
    place = {name: list(answer).index(name) for name in names}
    if place["network"] < place["balanced"]:
        raise Wrong(
            "The network is not above *balanced*: it reads losses, and a rare image that is "
            "fitted has a small one."
        )
    if place["meta"]:
        raise Wrong("16 images, or 16 and 30 more: an image more is worth more than a weight.")


@exercise("13.1")
def check_field(field_and_product):
    """By automatic differentiation of a potential with known W."""
    generator = torch.Generator().manual_seed(1301)
    for n, d, l2 in ((7, 3, 0.1), (12, 4, 0.03)):
        x, theta = draw(generator, n, d), draw(generator, d)
        a = draw(generator, n).abs()
        l = 0.5 * (x @ theta) ** 2 + a  # so that grad l_i = (x theta) x and hess l_i = x x^T
        g, h = (x @ theta)[:, None] * x, x[:, :, None] * x[:, None]
        v, slope, u = l / (1 + l), 1 / (1 + l) ** 2, draw(generator, d)

        def potential(t, x=x, a=a, l2=l2):
            l = 0.5 * (x @ t) ** 2 + a
            return (l - torch.log1p(l)).mean() + l2 * t.square().sum()

        F = torch.autograd.functional.jacobian(potential, theta)
        Hu = torch.autograd.functional.hessian(potential, theta) @ u
        got = several(
            field_and_product(*(t.clone() for t in (v, slope, g, h @ u, theta, u)), l2), 2,
            "Return two things: the field and H u, both of shape (d,).",
        )  # fmt: skip
        mean = (v[:, None] * g).mean(0)
        compare(
            got[0], F,
            [("The l2 term's gradient is 2 l2 theta.", mean + l2 * theta),
             ("The l2 term is missing.", mean),
             ("A mean over the examples, not a sum.", n * mean + 2 * l2 * theta)],
            "The field",
        )  # fmt: skip
        frozen = (v[:, None] * (h @ u)).mean(0)
        bend = ((slope * (g @ u))[:, None] * g).mean(0)
        compare(
            got[1], Hu,
            [("That is H u with weights that stand still: V' g g^T u is missing.",
              frozen + 2 * l2 * u),
             ("The l2 term's curvature is 2 l2: it adds 2 l2 u.", frozen + bend + l2 * u),
             ("The l2 term adds 2 l2 u, not its gradient 2 l2 theta.",
              frozen + bend + 2 * l2 * theta),
             ("The l2 term's curvature is missing.", frozen + bend),
             ("A mean over the examples, not a sum.", n * (frozen + bend) + 2 * l2 * u),
             ("V' adds V' g g^T; it is not taken away.", frozen - bend + 2 * l2 * u),
             ("The product g (g^T u) is that of each example, then the mean; not of the mean g.",
              frozen + slope.mean() * (g.mean(0) @ u) * g.mean(0) + 2 * l2 * u)],
            "H u",
        )  # fmt: skip


@exercise("13.2")
def check_attached(attached):
    """W' and W'' of W(l) = V(l) l, by automatic differentiation."""
    generator = torch.Generator().manual_seed(1302)
    for _ in range(2):
        c = draw(generator, 3)
        l = draw(generator, 9).abs().requires_grad_()
        v = torch.sigmoid(c[0] + c[1] * l + c[2] * l**2)
        (dv,) = torch.autograd.grad(v.sum(), l, create_graph=True)
        (ddv,) = torch.autograd.grad(dv.sum(), l, create_graph=True)
        (w,) = torch.autograd.grad((v * l).sum(), l, create_graph=True)
        (slope,) = torch.autograd.grad(w.sum(), l)
        v, dv, ddv, w, l = (t.detach() for t in (v, dv, ddv, w, l))
        got = several(
            attached(l.clone(), v.clone(), dv.clone(), ddv.clone()), 2,
            "Return two things: the effective weights and their slopes, shape (n,).",
        )  # fmt: skip
        compare(
            got[0], w,
            [("That is the detached weight: V moves with l, too.", v),
             ("V' comes times l.", v + dv), ("That is the value V l, not its slope.", v * l)],
            "The weights",
        )  # fmt: skip
        compare(
            got[1], slope,
            [("That is V' alone, the slope of a detached weight.", dv),
             ("V' comes twice: once from V, once from V' l.", dv + ddv * l),
             ("V'' comes times l.", 2 * dv + ddv), ("V'' l is missing.", 2 * dv)],
            "The slopes",
        )  # fmt: skip


@exercise("13.3")
def check_focal(focal_weight):
    """By the derivative of the focal loss in the cross-entropy."""
    generator = torch.Generator().manual_seed(1303)
    for gamma in (0.5, 1.0, 2.0):
        p = torch.sigmoid(draw(generator, 8))
        l = (-p.log()).requires_grad_()
        (truth,) = torch.autograd.grad(((1 - (-l).exp()) ** gamma * l).sum(), l)
        q, l = 1 - p, l.detach()
        compare(
            focal_weight(p.clone(), gamma), truth,
            [("That is the factor in the loss: it moves with p, so its slope has a second term.",
              q**gamma),
             ("The second term has the other sign: with the loss, 1 - p grows.",
              q**gamma - gamma * q ** (gamma - 1) * p * l),
             ("In the second term dp/dl = -p is missing.",
              q**gamma + gamma * q ** (gamma - 1) * l),
             ("The second term comes times l.", q**gamma + gamma * q ** (gamma - 1) * p),
             ("That is the focal loss, not its slope.", q**gamma * l),
             ("In the second term the factor gamma is missing.",
              q**gamma + q ** (gamma - 1) * p * l)],
            "The weights",
        )  # fmt: skip


def _one_step(lam, theta, train, meta, lr, detach=True, at_new=True, mean=True, sign=1.0,
              stop_b=True):  # fmt: skip
    """The hypergradient by the formula, with its mistakes."""
    (x, y), (u, z), lam = train, meta, lam.clone().requires_grad_()
    residual = x @ theta - y
    losses = 0.5 * residual**2
    slope = torch.sigmoid(lam[0] + lam[1] * losses)
    if not detach:
        slope = slope + slope * (1 - slope) * lam[1] * losses  # V + V' l
    new = theta - sign * lr * (slope * residual) @ x / (len(y) if mean else 1)
    b = u.T @ (u @ (new if at_new else theta) - z) / len(z)
    return torch.autograd.grad(new @ (b.detach() if stop_b else b), lam)[0]


@exercise("13.4")
def check_one_step(repaired):
    """One step of Meta-Weight-Net on least squares, by automatic differentiation."""
    generator = torch.Generator().manual_seed(1304)
    for n, m, d in ((8, 5, 3), (6, 4, 2)):
        x, y, u, z = (draw(generator, *s) for s in ((n, d), (n,), (m, d), (m,)))
        theta, lam, lr = draw(generator, d), draw(generator, 2), 0.2

        hypergradient = partial(_one_step, lam, theta, (x, y), (u, z), lr)
        truth = hypergradient()
        slips = {
            "detach": "V's input is not detached.",
            "at_new": "The meta images judge the new theta, not the old one.",
            "mean": "The inner loss is a mean over the batch.",
            "stop_b": "b is a constant of the last line: detach it, or differentiate the meta loss "
                      "itself.",
        }  # fmt: skip
        made = [m for k in range(1, 5) for m in combinations(slips, k)]
        mistakes = [
            (" ".join(slips[name] for name in names), hypergradient(**dict.fromkeys(names, False)))
            for names in made
            if not {"at_new", "stop_b"} <= set(names)  # at the old theta b is a constant anyway
        ]
        compare(
            repaired(lam.clone(), theta.clone(), (x, y), (u, z), lr), truth,
            [*mistakes, ("The sign: theta goes down.", hypergradient(sign=-1.0))],
            "The hypergradient",
        )  # fmt: skip


@exercise("13.5")
def check_selection(selection):
    """Three rules on made-up runs."""
    generator = torch.Generator().manual_seed(1305)
    for runs, looks in ((4, 12), (7, 20)):
        truth = torch.rand(runs, looks, generator=generator, dtype=torch.float64)
        held = truth + 0.3 * draw(generator, runs, looks)
        rows = torch.arange(runs)
        last, chosen = truth[:, -1].mean(), truth[rows, held.argmax(1)].mean()
        best = truth.max(1).values.mean()
        got = torch.tensor(numbers(selection(held.clone(), truth.clone()), 3)).double()
        mixed = truth.mean(0)
        compare(
            got, torch.stack([last, chosen, best]),
            [("The best look is one of each run: the mean over the runs comes after the maximum.",
              torch.stack([last, chosen, mixed.max()])),
             ("Each run chooses its own look; you chose one look for all.",
              torch.stack([last, truth[:, held.mean(0).argmax()].mean(), best])),
             ("Report the test accuracy at the look that the held-out set chose, not the held-out "
              "one.", torch.stack([last, held.max(1).values.mean(), best])),
             ("Higher is better: take the largest.",
              torch.stack([last, truth[rows, held.argmin(1)].mean(), truth.min(1).values.mean()])),
             ("A mean over the runs, not the luckiest run.",
              torch.stack([truth[:, -1].max(), truth[rows, held.argmax(1)].max(), truth.max()])),
             ("That is the order: last, held out, on test.", torch.stack([best, chosen, last]))],
            "The three numbers", 1e-6,
        )  # fmt: skip
