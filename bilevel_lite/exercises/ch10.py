"""Checks of chapter 10, hypercleaning MNIST."""

import torch

from bilevel_lite import data
from bilevel_lite.exercises import Wrong, close, compare, draw, exercise, numbers


def _matrix(generator, c):
    return draw(generator, c, c).exp().softmax(1)


@exercise("10.A")
def check_count(answer):
    """The mean and standard deviation of a binomial count."""
    mean, spread = numbers(answer, 2)
    trials, p = 25_000, 0.9
    truths = (trials * p, (trials * p * (1 - p)) ** 0.5)
    mistakes = (
        [(25_000, "that many are redrawn; one in ten of them is right by luck."),
         (2_500, "that many redrawn labels are right by luck."),
         (45_000, "only half of the labels are redrawn."),
         (27_500, "that many are right."),
         (0.45, "give the count, not the share.")],
        [((50_000 * 0.45 * 0.55) ** 0.5,
          "that would be right if each label were drawn with probability 1/2; here exactly "
          "25,000 are, and only their new labels are left to chance."),
         ((50_000 * 0.9 * 0.1) ** 0.5, "only 25,000 labels are left to chance."),
         (truths[1] ** 2, "that is the variance."),
         (truths[0] ** 0.5, "that is the root of the mean; a label that is nearly always wrong "
          "varies less.")],
    )  # fmt: skip
    for value, truth, known, name in zip(
        (mean, spread), truths, mistakes, ("The mean", "The standard deviation"), strict=True
    ):
        if abs(value - truth) <= 0.02 * truth:
            continue
        for wrong, sentence in known:
            if abs(value - wrong) <= 0.02 * wrong:
                raise Wrong(f"{name}: {sentence}")
        raise Wrong(f"{name}: {value:.6g} is not right. Each redrawn label is wrong with "
                    "probability 0.9.")  # fmt: skip


@exercise("10.B")
def check_signs(answer):
    """The signs of the inner products with v."""
    signs = [(value > 0) - (value < 0) for value in numbers(answer, 3)]
    H = torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64))
    b = torch.tensor([1.0, 5.0], dtype=torch.float64)
    pulls = torch.tensor([[2.0, 1.0], [1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    by_v, by_b, by_hb = [
        (pulls @ u).sign().int().tolist() for u in (torch.linalg.solve(H, b), b, H @ b)
    ]
    if signs == by_v:
        return
    if 0 in signs:
        raise Wrong("No pull is at a right angle to v: each weight rises or falls.")
    if signs in (by_b, by_hb):
        raise Wrong("You went by b, the wish. The step is v = H^-1 b: divide upwards by 10.")
    if [-sign for sign in signs] == by_v:
        raise Wrong("All three the other way round: whoever pulls along the step gains weight.")
    raise Wrong("Take v = H^-1 b, then the inner product of each pull with -v.")


@exercise("10.1")
def check_shares(wrong_shares):
    """By Bayes' rule on the joint table of true and given labels."""
    for seed, c in ((101, 4), (102, 7)):
        generator = torch.Generator().manual_seed(seed)
        T, prior, rate = _matrix(generator, c), draw(generator, c).softmax(0), 0.37
        got = wrong_shares(rate, T.clone(), prior.clone())
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("Return two things: a number, and a tensor with an entry for each class.")
        eye = torch.eye(c, dtype=torch.float64)
        joint = prior[:, None] * ((1 - rate) * eye + rate * T)  # true, given
        right = joint.diagonal()
        compare(
            got[0],
            1 - right.sum(),
            [
                ("The first: that is the rate; some redrawn labels are right by luck.",
                 torch.tensor(rate).double()),
                ("The first: that is the share of right labels.", right.sum()),
                ("The first: it is not multiplied by the rate.", 1 - prior @ T.diagonal()),
                ("The first: the classes are not equally frequent; weigh them by prior.",
                 rate * (1 - T.diagonal().mean())),
                ("The first: a redrawn label is wrong where P changes it, not where it keeps it.",
                 rate * prior @ T.diagonal()),
            ],
            "The first",
        )  # fmt: skip
        compare(
            got[1],
            1 - right / joint.sum(0),
            [
                ("The second: you condition on the true label, not on the given one.",
                 rate * (1 - T.diagonal())),
                ("The second: P is transposed. P_ck goes from the true c to the given k, so sum "
                 "over rows: prior @ M.", 1 - right / (joint.T.new_tensor(1 - rate) * prior
                                                      + rate * T @ prior)),
                ("The second: that is the probability that the label is right.",
                 right / joint.sum(0)),
                ("The second: you divide by the true frequencies; divide by those of the given "
                 "labels.", 1 - right / prior),
                ("The second: it is not divided by how often k is given.", joint.sum(0) - right),
                ("The second: Bayes' rule needs the class frequencies.",
                 1 - (joint / prior[:, None]).diagonal() / (joint / prior[:, None]).sum(0)),
            ],
            "The second",
        )  # fmt: skip


@exercise("10.2")
def check_weight_gradients(weight_gradients):
    """By double backward on the weighted risk, written without the closed form."""
    for seed, n, d, c in ((103, 9, 4, 3), (104, 6, 5, 4)):
        generator = torch.Generator().manual_seed(seed)
        x, y = draw(generator, n, d), torch.randint(c, (n,), generator=generator)
        theta, v = draw(generator, c * (d + 1)), draw(generator, c * (d + 1))
        lam = draw(generator, n).requires_grad_()
        point = theta.clone().requires_grad_()

        def losses(point):
            logits = x @ point[: c * d].view(c, d).T + point[c * d :]  # noqa: B023
            return torch.nn.functional.cross_entropy(logits, y, reduction="none")  # noqa: B023

        risk = (lam.sigmoid() * losses(point)).mean()
        (grad,) = torch.autograd.grad(risk, point, create_graph=True)
        (jv,) = torch.autograd.grad(grad @ v, lam)
        sigma = lam.detach().sigmoid()
        slope = sigma * (1 - sigma)
        biased = v.clone()
        biased[c * d :] = 0
        no_bias = torch.func.jvp(losses, (theta,), (biased,))[1]
        got = weight_gradients(
            lam.detach().clone(), theta.clone(), v.clone(), x.clone(), y.clone(), c
        )
        compare(
            got,
            -jv,
            [
                ("The sign: there is a minus in -J v.", jv),
                ("The factor 1/n of the mean is missing.", -n * jv),
                ("The sigmoid's derivative is missing.", -jv / slope),
                ("The factor is the sigmoid's derivative, not the weight itself.",
                 -jv / slope * sigma),
                ("The biases' part of v is missing.", -slope * no_bias / n),
                ("The one-hot label is missing in prob - e.",
                 -slope * _along_p(x, theta, v, c, d) / n),
                *_other_layouts(x, y, theta, v, c, slope),
            ],
            "The result",
        )  # fmt: skip


def _other_layouts(x, y, theta, v, c, slope):
    """The results if theta and v are read in another order than the exercise says."""

    def columns(t):
        return x @ t[:-c].view(-1, c) + t[-c:]

    def biases_first(t):
        return x @ t[c:].view(c, -1).T + t[:c]

    out = []
    for scores, sentence in (
        (columns, "The matrix is read by columns: view(C, -1), one row for each class."),
        (biases_first, "The biases are read from the head; they are the last C entries."),
    ):
        off = scores(theta).softmax(1) - torch.nn.functional.one_hot(y, c)
        out.append((sentence, -slope * (off * scores(v)).sum(1) / len(y)))
    return out


def _along_p(x, theta, v, c, d):
    def scores(t):
        return x @ t[: c * d].view(c, d).T + t[c * d :]

    return (scores(theta).softmax(1) * scores(v)).sum(1)


@exercise("10.3")
def check_precision_range(precision_range):
    """By trying every order of small examples."""
    from itertools import permutations

    cases = [
        ([0.0, 0.0, 0.0, 1.0, 0.5, 1.0], [1, 0, 1, 0, 1, 1]),
        ([0.5] * 6, [1, 0, 0, 1, 0, 0]),
        ([0.2, 0.1, 0.4, 0.3, 0.9], [0, 1, 1, 0, 0]),
        ([0.1, 0.6, 0.6, 0.6, 0.6, 0.9], [0, 1, 1, 1, 0, 1]),
        ([0.0, 0.3, 0.3, 0.3, 0.8, 0.8], [1, 0, 0, 1, 1, 0]),
    ]
    names = ("lowest", "expected", "highest")
    for weights, mask in cases:
        lam, wrong = torch.tensor(weights, dtype=torch.float64), torch.tensor(mask).bool()
        count, found = int(wrong.sum()), []
        for order in permutations(range(len(mask))):
            order = torch.tensor(order)
            taken = order[lam[order].argsort(stable=True)[:count]]
            found.append(float(wrong[taken].double().mean()))
        truth = (min(found), sum(found) / len(found), max(found))
        got = numbers(precision_range(lam.clone(), wrong.clone()), 3)
        for name, value, expected in zip(names, got, truth, strict=True):
            if abs(value - expected) > 1e-9:
                raise Wrong(
                    f"With weights {weights} and wrong labels {mask} the {name} precision is "
                    f"{expected:.4g}, not {value:.4g}."
                )


@exercise("10.4")
def check_pipeline(repaired):
    """Instruments watch which rows are used where."""
    y = torch.randint(10, (120,), generator=torch.Generator().manual_seed(106))
    x = torch.arange(120.0, dtype=torch.float64)[:, None]  # a row's value is its number
    order = torch.randperm(120, generator=torch.Generator().manual_seed(107))
    parts = order.split([60, 20, 20, 20])
    train, validation, tuning, test = (set(part.tolist()) for part in parts)
    seen, rate = {"tuning": [], "test": []}, 0.5
    # iterate -> its score on tuning, on test, on both and on validation: other sets, other choices
    table = {0: (0.5, 0.9, 0.2), 1: (0.8, 0.4, 0.3), 2: (0.6, 0.5, 0.9)}

    def rows(values):
        return {int(value) for value in values.flatten()}

    def learn(inner_batch, outer_batch):
        first, again = inner_batch(), inner_batch()
        for images, labels in (first, again):
            if len(images) != len(labels) or rows(images) != train:
                raise Wrong("The inner batch should hold the training images, each once.")
        if not torch.equal(first[1], again[1]):
            raise Wrong(
                "Two calls of inner_batch gave different labels: the noise is drawn anew each time."
            )
        changed = float((first[1] != y[first[0][:, 0].long()]).double().mean())
        if not 0.25 < changed < 0.65:
            raise Wrong(
                f"{changed:.0%} of the training labels differ from the clean ones; with rate 0.5 "
                "it should be about 45 %."
            )
        judges = rows(outer_batch[0])
        if judges & tuning:
            raise Wrong("The outer batch holds tuning images: choices made there are flattered.")
        if judges != validation or not torch.equal(outer_batch[1], y[outer_batch[0][:, 0].long()]):
            raise Wrong("The outer batch should be the validation set with its own labels.")
        return list(table)

    def score(theta, images, labels):
        used = rows(images)
        if not torch.equal(labels, y[images[:, 0].long()]):
            raise Wrong("Scores should be taken with the clean labels of the images given.")
        if used == tuning:
            seen["tuning"].append(theta)
            return table[theta][0]
        if used == test:
            seen["test"].append(theta)
            return table[theta][1]
        return table[theta][2]

    generator = torch.Generator().manual_seed(108)
    got = repaired(x.clone(), y.clone(), parts, rate, learn, score, generator)
    if not isinstance(got, tuple | list) or len(got) != 2:
        raise Wrong("Return the chosen iterate and its score on the test set.")
    if set(seen["tuning"]) != set(table) or got[0] != 1:
        if set(seen["test"]) == set(table):
            raise Wrong("All iterates were scored on the test set: it took part in the choice.")
        raise Wrong("The iterate should be the best on the tuning set.")
    if len(seen["test"]) > 1:
        raise Wrong("The choice is right, but look at the test set once: score the chosen one.")
    if seen["test"] != [1] or got[1] != table[1][1]:
        raise Wrong("The second value should be the chosen iterate's score on the test set.")


@exercise("10.5")
def check_costs(answer):
    """Counted by hand; the stored run's log has (a)."""
    a, b, factor, share = numbers(answer, 4)
    rows = [
        (a, "(a)", 10 + 5 + 3 * 2 * 2 + 2 * 50,
         "Ten inner steps, f on five batches' worth, three products on two, one on fifty.",
         [(121, "a product on 2,000 examples counts 4."),
          (77, "a product with a second derivative counts 2."),
          (71, "a product with a second derivative counts 2, and the curvature batch is 2,000."),
          (122, "f needs a gradient on 5,000 images."),
          (123, "f is taken on 5,000 images: 5, not 1."),
          (131, "from zero, CG needs no product for its first residual.")]),
        (b, "(b)", 10 + 5 + 3 * 2 * 2 + 2 * 5, "Only J v changes: five batches' worth.",
         [(31, "a product on 2,000 examples counts 4."),
          (32, "a product with a second derivative counts 2."),
          (33, "f is taken on 5,000 images: 5, not 1."),
          (29, "J v is on 5,000 examples.")]),
        (factor, "(c)", 1.0,
         "A weight moves at one iteration in ten. How large is 1/n then?",
         [(10.0, "1/n with n = 5,000 already makes each move ten times as long."),
          (0.1, "the moves are ten times as long, but ten times as rare, too.")]),
        (share, "(d)", 0.9**10, "In one iteration a weight stays with probability 0.9.",
         [(0.0, "the draws are independent: some examples are drawn twice."),
          (1 - 0.9**10, "that is the share that has moved."),
          (100 * 0.9**10, "give the share as a number between 0 and 1, not in per cent."),
          (0.1**10, "a weight stays where it is with probability 0.9 each time.")]),
    ]  # fmt: skip
    for value, name, truth, hint, mistakes in rows:
        if abs(value - truth) <= 5e-3 * truth:
            continue
        for wrong, sentence in mistakes:
            if abs(value - wrong) <= 2e-3 * wrong:
                raise Wrong(f"{name}: {sentence}")
        raise Wrong(f"{name}: {value:.6g} is not right. {hint}")


@exercise("10.6")
def check_breaking_rate(breaking_rate):
    """By bisection on the table of true and given labels, class by class."""
    generator = torch.Generator().manual_seed(109)
    sharp = (3 * draw(generator, 5, 5)).softmax(1)
    mixed = torch.eye(4, dtype=torch.float64)
    mixed[2] = torch.tensor([0.1, 0.0, 0.2, 0.7], dtype=torch.float64)
    uniform = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    cases = [
        ("pair flips of ten classes", data.pair_flips(10).double()),
        ("uniform noise over six classes", uniform),
        ("a random matrix", sharp),
        ("a matrix that changes one class only", mixed),
    ]
    for name, T in cases:
        eye = torch.eye(len(T), dtype=torch.float64)

        def breaks(rate, T=T, eye=eye):
            table = (1 - rate) * eye + rate * T
            return bool(((table - 2 * eye).max(1).values >= table.diagonal()).any())

        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if breaks(middle) else (middle, high)
        truth = torch.tensor(high, dtype=torch.float64)
        got = breaking_rate(T.clone())
        diagonal, others = T.diagonal(), (T - 2 * eye).max(1).values
        rates = 1 / (1 + others - diagonal)
        mistakes = [
            ("One class is enough: take the smallest rate over the classes.",
             rates.max().clamp(max=1)),
            ("One class is enough: take the smallest rate over the classes.", rates.mean()),
            ("A redrawn label can be right: P_cc counts for the true one.",
             (1 / (1 + others)).min().clamp(max=1)),
            ("You compare with the largest entry of a column; what a class c becomes is its row.",
             (1 / (1 + (T - 2 * eye).max(0).values - diagonal)).min().clamp(max=1)),
            ("There is no rate above 1.", rates.min()),
            ("Compare with the most frequent false label, not with all of them together.",
             (1 / (2 * (1 - diagonal))).min().clamp(max=1)),
        ]  # fmt: skip
        try:
            compare(got, truth, mistakes, f"The rate for {name}", 1e-8)
        except Wrong as wrong:
            text = str(wrong)
            raise Wrong(text if name in text else f"For {name}: {text}") from None
    close(breaking_rate(torch.eye(3, dtype=torch.float64)), 1.0, "The rate for no noise at all")
