"""Checks of chapter 15, data poisoning."""

import math

import torch
import torch.nn.functional as F

from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers


@exercise("15.A")
def check_share(answer):
    """Of 1,030 rows, 30."""
    rows, share = numbers(answer, 2)
    near(
        rows, 30, "The poisoned rows",
        [(1000 / 0.97 - 1000, "the 3 % are counted from the clean rows: 0.03 N.")],
        "3 % of 1,000.", 1e-3,
    )  # fmt: skip
    near(
        share, 30 / 1030, "The share of the mean",
        [(0.03, "the mean is over all rows, poison among them."),
         (3 / 103 * 100, "give a number between 0 and 1."),
         (1000 / 1030, "that is the share of the clean rows.")],
        "The mean is over 1,030 rows.", 2e-3,
    )  # fmt: skip


@exercise("15.B")
def check_price(answer):
    """Of 51,500 rows 5 % go, 1,500 of them poison."""
    gone, clean = numbers(answer, 2)
    near(
        gone, 2575, "The rows that go",
        [(2500, "the defender does not know which rows are clean: 5 % of all of them."),
         (1500, "that is the poison; the defender takes 5 % of all rows.")],
        "5 % of 50,000 + 1,500 rows.", 1e-3,
    )  # fmt: skip
    near(
        clean, (2575 - 1500) / 50_000, "The share of the clean rows",
        [(2575 / 50_000, "1,500 of the rows that go are poison."),
         (1075 / 51_500, "of the clean rows, of which there are 50,000."),
         (100 * 1075 / 50_000, "give a number between 0 and 1.")],
        "What goes beyond the poison is clean.", 4e-3,
    )  # fmt: skip


def _rows(generator, n, m, d, C):
    """Rows with poison, and a linear model's parameters."""
    x, poison = draw(generator, n, d), draw(generator, m, d)
    y = torch.randint(C, (n,), generator=generator)
    labels = torch.randint(C, (m,), generator=generator)
    return draw(generator, C, d), x, y, poison, labels


@exercise("15.1")
def check_loss(poisoned_loss):
    """By a loop over all rows."""
    generator = torch.Generator().manual_seed(151)
    for n, m, d, C, l2 in ((7, 2, 3, 4, 0.1), (5, 4, 2, 3, 0.3)):
        W, x, y, poison, labels = _rows(generator, n, m, d, C)
        clean = F.cross_entropy(x @ W.T, y, reduction="none")
        bad = F.cross_entropy(poison @ W.T, labels, reduction="none")
        square = l2 * (W**2).sum()
        truth = (clean.sum() + bad.sum()) / (n + m) + square
        got = poisoned_loss(*(part.clone() for part in (W, x, y, poison, labels)), l2)
        compare(
            got, truth,
            [("Two means added up give poison as much weight as all clean rows: take one mean over "
              "n + m rows.", clean.mean() + bad.mean() + square),
             ("Half of the two means gives a poisoned row more weight than a clean one.",
              (clean.mean() + bad.mean()) / 2 + square),
             ("Divide by all rows, n + m, not by the clean ones.",
              (clean.sum() + bad.sum()) / n + square),
             ("The penalty is missing.", truth - square),
             ("The penalty is l2 ||W||^2, without 1/2.", truth - square / 2),
             ("That is the sum: divide by n + m.", clean.sum() + bad.sum() + square),
             ("Here the defender's training *minimises* the loss of the poison too: the attacker's "
              "minus stands in f.", (clean.sum() - bad.sum()) / (n + m) + square),
             ("Poison is not in it.", clean.mean() + square)],
            f"With {n} clean and {m} poisoned rows g", 1e-9,
        )  # fmt: skip


@exercise("15.2")
def check_pull(input_pull):
    """By automatic differentiation, twice."""
    generator = torch.Generator().manual_seed(152)
    for m, d, C in ((3, 4, 3), (2, 5, 4)):
        W, _, _, x, y = _rows(generator, 2, m, d, C)
        V = draw(generator, C, d)
        rows, weights = x.clone().requires_grad_(), W.clone().requires_grad_()
        loss = F.cross_entropy(rows @ weights.T, y, reduction="sum")
        (slope,) = torch.autograd.grad(loss, weights, create_graph=True)
        (truth,) = torch.autograd.grad((slope * V).sum(), rows)
        prob = (x @ W.T).softmax(1)
        miss = prob - F.one_hot(y, C)
        along = x @ V.T
        first = miss @ V
        second = (prob * along - prob * (prob * along).sum(1, keepdim=True)) @ W
        compare(
            input_pull(W.clone(), V.clone(), x.clone(), y.clone()), truth,
            [("x stands in it twice: the probabilities move with it, too.", first),
             ("The factor x of the gradient is to be differentiated, too.", second),
             ("The sign is turned: this is a part of J v, and h is minus it.", -truth),
             ("omega is diag(p) - p p^T; the second part is missing.",
              first + (prob * along) @ W),
             ("V and W have changed places.", miss @ W
              + (prob * (x @ W.T) - prob * (prob * (x @ W.T)).sum(1, keepdim=True)) @ V),
             ("One row of pixels for each poisoned row: no mean here.", truth / m)],
            f"With {m} rows of {d} pixels the result", 1e-9,
        )  # fmt: skip


@exercise("15.3")
def check_keep(keep_near):
    """By a loop over the rows."""
    generator = torch.Generator().manual_seed(153)
    for n, C, removed in ((38, 2, 0.1), (32, 2, 0.1), (60, 3, 0.1)):
        # class 1 is wide, class 0 far from the origin, a few of class 1 are called 0: so that each
        # mistake leaves out other rows
        y, count = torch.arange(n) % C, round(removed * n)
        x = draw(generator, n, 3) * (1 + 4 * (y == 1))[:, None]
        x = x + 20.0 * F.one_hot(y, 3) - torch.tensor([60.0, 0, 0]).double() * (y == 0)[:, None]
        y[(y == 1).nonzero().squeeze(1)[: count - 1]] = 0
        means = torch.stack([x[y == c].mean(0) for c in range(C)])
        far = torch.stack([(x[i] - means[y[i]]).norm() for i in range(n)])

        def but(values, n=n, count=count):
            keep = torch.ones(n)
            keep[values.topk(count).indices] = 0
            return keep.double()

        truth = but(far)
        nearest = torch.cdist(x, means).min(1).values
        in_class = torch.ones(n).double()
        for c in range(C):
            rows = (y == c).nonzero().squeeze(1)
            in_class[rows[far[rows].topk(round(removed * len(rows))).indices]] = 0
        got = keep_near(x.clone(), y.clone(), removed)
        if isinstance(got, torch.Tensor) and got.shape == (count,):
            raise Wrong("Return a mask with an entry for each row: true where it is kept.")
        got = torch.as_tensor(got).double()
        compare(
            got, truth,
            [("True means kept; the mask is the other way round.", 1 - truth),
             ("Those are the rows nearest to their mean: leave out the farthest.", but(-far)),
             ("Each row is far from the mean of *its own label*, not from that of all rows.",
              but((x - x.mean(0)).norm(dim=1))),
             ("The label of a row says which mean is its own, not the nearest mean.",
              but(nearest)),
             ("One ranking for all rows: here each class lost its own share.", in_class),
             ("The distance to the origin is not the distance to a mean.", but(x.norm(dim=1))),
             ("Rounded, not rounded up: `round(removed * n)` rows go.",
              but(far, count=math.ceil(removed * n))),
             ("Rounded, not rounded down: `round(removed * n)` rows go.",
              but(far, count=math.floor(removed * n))),
             ("The distance itself, not in units of the class's own mean distance.",
              but(far / torch.stack([far[y == c].mean() for c in range(C)])[y]))],
            f"With {n} rows the mask", 1e-9,
        )  # fmt: skip
    x = torch.tensor([[5.0, 0], [-5, 0], [3, 3], [-3, -3]]).double()
    got = torch.as_tensor(keep_near(x, torch.zeros(4, dtype=torch.int64), 0.5)).double()
    truth = torch.tensor([0.0, 0, 1, 1]).double()
    wrong = [("Take the Euclidean distance, not the sum of absolute values.", 1 - truth)]
    compare(got, truth, wrong, "With four rows the mask", 1e-9)


@exercise("15.4")
def check_evaluation(poisoned_set):
    """A generator that shows how often it was called, labels that show where they stand."""
    generator = torch.Generator().manual_seed(154)
    for n, m, C in ((9, 3, 4), (8, 4, 10)):
        x, z = draw(generator, n, 2), draw(generator, m, 2)
        y = torch.randint(C, (n,), generator=generator)
        labels = torch.randint(C, (m,), generator=generator)
        labels[0] = 0
        order = torch.randperm(n + m, generator=generator)
        while bool((order == torch.arange(n + m)).all()):
            order = torch.randperm(n + m, generator=generator)

        def psi(z, labels):
            return torch.sin(2 * z) + labels[:, None]

        got = poisoned_set(*(part.clone() for part in (x, y, z, labels)), psi, C, order.clone())
        if not isinstance(got, tuple | list) or len(got) != 3:
            raise Wrong("Return three things: rows, labels, and the flipped labels.")
        rows, targets, flipped = got
        once = torch.cat([x, psi(z, labels)])
        twice = torch.cat([x, psi(psi(z, labels), labels)])
        truth = torch.cat([y, labels])
        compare(
            rows, once[order],
            [("The poison has been through the generator twice: what was exported is final.",
              twice[order]),
             ("The rows that poison is made from are in it, not the poison.",
              torch.cat([x, z])[order]),
             ("The rows are not in the given order.", once)],
            "The rows", 1e-9,
        )  # fmt: skip
        compare(
            torch.as_tensor(targets).double(), truth[order].double(),
            [("Rows were shuffled, labels were not: each row now has another's label.",
              truth.double()),
             ("A label goes where its row goes: index with the order, do not sort by it.",
              truth[order.argsort()].double())],
            "The labels", 1e-9,
        )  # fmt: skip
        compare(
            torch.as_tensor(flipped).double(), (C - 1 - labels).double(),
            [(f"C - y makes a class {C} of 0, and there is none: C - 1 - y.",
              (C - labels).double()),
             ("C - y modulo C leaves 0 what it is: C - 1 - y moves it.",
              ((C - labels) % C).double()),
             ("That is right for ten classes only: there are C.", (9 - labels).double())],
            "The flipped labels", 1e-9,
        )  # fmt: skip


@exercise("15.5")
def check_shift(shift):
    """By the means of rows that are there."""
    generator = torch.Generator().manual_seed(155)
    for n, m, r, R in ((20, 2, 3.0, 1.5), (50, 5, 4.0, 2.0), (30, 3, 1.0, 2.5)):
        clean = draw(generator, n, 3)
        clean = clean - clean.mean(0)
        spot = torch.tensor([r, 0, 0], dtype=torch.float64)
        mean = torch.cat([clean, spot.expand(m, 3)]).mean(0)
        far = float((spot - mean).norm())
        got = numbers(shift(n, m, r, R), 3)
        near(
            got[0], float(mean.norm()), "The shift",
            [(m * r / n, "the mean is over all rows, n + m."), (r, "that is the distance itself."),
             (n * r / (n + m), "that is the poison's distance from the new mean.")],
            "Average n rows with mean 0 and m rows at r.", 1e-5,
        )  # fmt: skip
        near(
            got[1], far, "The poison's distance",
            [(r, "the defender's mean is that of all rows: it has moved towards the poison."),
             (m * r / (n + m), "that is the shift.")],
            "From the mean of all rows, which has moved.", 1e-5,
        )  # fmt: skip
        near(
            got[2], m * R / n, "The largest shift that survives",
            [(m * R / (n + m), "the defender measures from the poisoned mean, so r may be larger "
                               "than R."),
             (R, "that is the distance that is allowed."),
             (m * min(R, n * r / (n + m)) / n, "over all r, not at the r that was given.")],
            "Solve n r / (n + m) = R for r, then shift.", 1e-5,
        )  # fmt: skip
