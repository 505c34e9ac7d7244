"""Checks of chapter 0, the tour.

The truths do not share code with the answers: a module evaluated by torch, a label count on a
fresh draw, the definition of a nearest point, and a run that keeps its own books.
"""

import torch
from torch import nn

from bilevel_lite.algorithms import AID
from bilevel_lite.data import corrupt_labels
from bilevel_lite.exercises import Wrong, compare, exercise, numbers
from bilevel_lite.params import flatten
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.solvers import CG, Identity, Neumann


@exercise("0.A")
def _other_side(answer):
    (h,) = numbers(answer, 1)
    # at lam = 3: theta* = 1/2, b = -1/2, H = 4, J = 1/2, v = -1/8, h = 1/16
    mistakes = (
        ("This is the derivative with theta held still; theta answers, too.", 0.0),
        ("The sign is wrong: the implicit part of (0.3) is minus J v, and v is negative.", -1 / 16),
        ("This is -J b: the division by the curvature H = 1 + lam is missing.", 1 / 4),
        ("This is J b: the division by H = 1 + lam and the minus sign are missing.", -1 / 4),
        ("This is v; it must still be multiplied by -J.", -1 / 8),
        ("This is -v; it must still be multiplied by J = theta*.", 1 / 8),
        ("This is b = theta* - 1; v = b / H and then -J v are still to come.", -1 / 2),
    )
    if abs(h - 1 / 16) <= 0.003:
        return
    for sentence, wrong in mistakes:
        if abs(h - wrong) <= 0.003:
            raise Wrong(sentence)
    raise Wrong(
        "Work out theta* = 2 / (1 + lam) at lam = 3 first, then b, H, J, v = b / H and -J v."
    )


@exercise("0.B")
def _how_many(answer):
    problems, systems = numbers(answer, 2)
    if problems == 1000:
        raise Wrong("Inner problems: central differences look on both sides of each weight.")
    if problems == 1001:
        raise Wrong(
            "Inner problems: that is forward differences, one for each weight and one in the "
            "middle. Central differences, which are far more exact, need two for each weight."
        )
    if problems != 2000:
        raise Wrong("Inner problems: how many trainings for one weight, and how many weights?")
    if systems == 1000:
        raise Wrong("Linear systems: b and H in H v = b do not know which weight is asked about.")
    if systems != 1:
        raise Wrong("Linear systems: v is found once and then serves every row of J. How many?")


@exercise("0.1")
def _predict(answer):
    sign, weight = numbers(answer, 2)
    if sign not in (-1, 1):
        raise Wrong("The first entry is the sign of dPhi/dlam_i: +1 or -1.")
    if sign == -1:
        raise Wrong("The sign is wrong: minus one over n times a negative number is what?")
    if weight < 0:
        raise Wrong(
            "The weight does fall, but section 0.4 clips it after every outer step. At which value "
            "does it stop?"
        )
    if weight != 0:
        raise Wrong(
            "The sign is right. A descent step subtracts the hypergradient, again and again, until "
            "something stops the weight: which value is that?"
        )


@exercise("0.2")
def _inner_loss(answer):
    generator = torch.Generator().manual_seed(20)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        model = nn.Linear(5, 3, dtype=torch.float64)
    theta, lam = flatten(model), torch.rand(40, generator=generator, dtype=torch.float64)
    index = torch.randperm(40, generator=generator)[:12]
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (12,), generator=generator)
    batch, l2 = (x, y, index), 0.03
    each = torch.stack([nn.functional.cross_entropy(model(x[i]), y[i]) for i in range(12)]).detach()
    penalty, weights = l2 * float(theta @ theta), lam[index]
    truth = (weights @ each) / 12 + penalty
    got = answer(lam, theta, batch, 3, l2)
    transposed = torch.cat([theta[:-3].view(5, 3).T.flatten(), theta[-3:]])
    biases_first = torch.cat([theta[3:], theta[:3]])
    mistakes = [
        (
            "These are the weights of the first examples of the training set; which positions "
            "does the batch hold?",
            (lam[:12] @ each) / 12 + penalty,
        ),
        (
            "The weighted losses are summed; (0.4) takes their mean over the batch.",
            weights @ each + penalty,
        ),
        (
            "The sum is divided by the sum of the weights. (0.4) divides by the number of "
            "examples: otherwise making all weights smaller would change nothing.",
            (weights @ each) / weights.sum() + penalty,
        ),
        ("The weights are not used.", each.mean() + penalty),
        ("The penalty is missing.", truth - penalty),
        ("The penalty has a factor 1/2 that (0.4) does not have.", truth - penalty / 2),
        ("The norm of theta in the penalty is not squared.", truth - penalty + l2 * theta.norm()),
        (
            "The penalty leaves out the biases; (0.4) penalises all of theta.",
            truth - l2 * float(theta[-3:] @ theta[-3:]),
        ),
        (
            "The sum is divided by the size of the whole training set; (0.4), on a batch, divides "
            "by the number of its examples.",
            (weights @ each) / 40 + penalty,
        ),
        (
            "The weight matrix is read as (features, num_classes); theta holds its num_classes "
            "rows one after the other.",
            weights @ _losses(transposed, x, y) / 12 + penalty,
        ),
        (
            "The biases are read first; theta holds the weight matrix first, then the biases.",
            weights @ _losses(biases_first, x, y) / 12 + penalty,
        ),
    ]
    compare(got, truth, mistakes, "The loss", rtol=1e-6)


def _losses(theta, x, y):
    """Cross-entropies of a linear model with 3 classes, theta as exercise 0.2 says."""
    outputs = x @ theta[:-3].view(3, 5).T + theta[-3:]
    return nn.functional.cross_entropy(outputs, y, reduction="none")


@exercise("0.3")
def _fraction(answer):
    for rate, classes in ((0.8, 4), (0.3, 7), (0.5, 2), (1.0, 10)):  # the last two hide mistakes
        truth = torch.tensor(rate * (1 - 1 / classes), dtype=torch.float64)
        mistakes = [
            ("Some redrawn labels are right by luck.", rate),
            ("This is the fraction that is right by luck; which is wrong?", rate / classes),
            (
                "This is the fraction that is right; which is wrong?",
                1 - rate * (1 - 1 / classes),
            ),
            (
                "A redrawn label falls on each of all the classes with the same probability, the "
                "right one included.",
                rate * (1 - 1 / (classes - 1)),
            ),
        ]
        mistakes = [(text, torch.tensor(value).to(truth)) for text, value in mistakes]
        compare(answer(rate, classes), truth, mistakes, "The fraction", rtol=1e-6)
    # and the truth above against a count
    y = torch.zeros(200_000, dtype=torch.int64)
    _, wrong = corrupt_labels(y, 0.8, 4, torch.Generator().manual_seed(0))
    if abs(float(wrong.double().mean()) - float(answer(0.8, 4))) > 0.01:
        raise Wrong("It differs from a count on 200,000 labels.")


@exercise("0.4")
def _projection(answer):
    inside = torch.tensor([0.2, 0.4, 0.9, 0.1], dtype=torch.float64)
    _shape(got := answer(inside.clone()), inside)
    if not torch.allclose(got.detach().to(inside), inside, rtol=0, atol=1e-6):
        raise Wrong(
            f"It moves {inside.tolist()} to {_short(got)}, though that lies in the box: the "
            "nearest point of the box is the vector itself."
        )
    generator = torch.Generator().manual_seed(40)
    lam = 0.5 + torch.randn(50, generator=generator, dtype=torch.float64)
    before = lam.clone()
    _shape(got := answer(lam), lam)
    got = got.detach().to(before)
    if float(got.min()) < 0 or float(got.max()) > 1:
        raise Wrong("Some weights leave the box: between 0 and 1 they must be, on both sides.")
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    nearest = grid[(before[:, None] - grid).abs().argmin(1)]  # by the definition, to 1/2000
    away = ~((got - nearest).abs() <= 1e-3)  # also where it is no number
    outside = (before < 0) | (before > 1)  # there the grid holds the nearest point itself
    exact = torch.where(outside, nearest, before)
    away |= ~((got - exact).abs() <= 1e-6)
    if bool(away.any()):
        i = int(away.nonzero()[0])
        raise Wrong(
            f"The weight {float(before[i]):.3g} goes to {float(got[i]):.3g}; the nearest point of "
            f"the box is {float(exact[i]):.3g}."
        )


def _shape(got, expected):
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        raise Wrong("Return a tensor of the same shape as lam.")


def _short(values):
    return [round(float(value), 2) for value in values]


@exercise("0.5")
def _costs(answer):
    given = numbers(answer, 3)
    names = ("CG(10)", "Neumann(10, 1.0)", "Identity(1.0)")
    solvers = (CG(10), Neumann(10, 1.0), Identity(1.0))
    for value, name, solver in zip(given, names, solvers, strict=True):
        truth = _cost_of_a_step(solver)
        if abs(value - truth) <= 0.01:
            continue
        for message, off in (
            ("the product J v, counted as 2, is missing.", 2),
            ("the validation gradient b is missing; it costs 200 / 1000 of a gradient.", 0.2),
            ("b runs over 200 examples, a fifth of the inner batch: it does not count as 1.", -0.8),
            ("the ten inner steps are missing.", 10),
            ("K terms need K - 1 products: the first term is b itself.", -2),
        ):
            if abs(value + off - truth) <= 0.01 and (off != -2 or name[0] == "N"):
                raise Wrong(f"{name}: {message}")
        if abs(value - 100 * truth) <= 1:
            raise Wrong(f"{name}: this is the cost of 100 outer steps; what does one cost?")
        raise Wrong(
            f"{name}: {value:g} is not what the package counts. Add up the inner steps, b, two for "
            "each product with H, and two for J v."
        )


def _cost_of_a_step(solver):
    """What `AID` counts for one outer step with the sizes of section 0.4, on a made-up problem."""
    generator = torch.Generator().manual_seed(50)
    with torch.random.fork_rng(devices=[]):
        model = nn.Linear(4, 3, dtype=torch.float64)
    risk = WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=1e-3)
    x = torch.rand(1200, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (1200,), generator=generator)
    lam, theta = torch.full((1000,), 0.5, dtype=torch.float64), flatten(model) * 0
    train, validation = (x[:1000], y[:1000], torch.arange(1000)), (x[1000:], y[1000:])
    problem = BilevelProblem(risk, WeightedRisk(model))
    common = {"inner_lr": 1.0, "outer_lr": 10.0, "inner_batch": train, "outer_batch": validation}
    method = AID(problem, lam, theta, solver, 10, **common)
    return method.step().gradients
