"""Checks of chapter 11, full-scale hypercleaning."""

import itertools
import math
import warnings

import torch

from bilevel_lite import data, linsolve
from bilevel_lite.exercises import Wrong, compare, draw, exercise, numbers


def _value(x):
    return torch.as_tensor(x, dtype=torch.float64)


def _near(value: float, truth: float, name: str, mistakes: list, hint: str) -> None:
    """To within 5 %; else the mistake whose value it is, or the hint."""
    if abs(value - truth) <= 0.05 * truth:
        return
    for wrong, sentence in mistakes:
        if abs(value - wrong) <= 0.02 * abs(wrong):
            raise Wrong(f"{name}: {sentence}")
    raise Wrong(f"{name}: {value:.4g} is not right. {hint}")


@exercise("11.A")
def check_moved(answer):
    """By (11.1), and by (11.2) itself, not by its limit."""
    mean, share = numbers(answer, 2)
    n, everything, rounds = 128, 40_000, 1_000
    visits, never = rounds * n / everything, (1 - n / everything) ** rounds
    _near(
        mean, visits, "The number of visits",
        [(rounds * n, "that counts all visits together; divide by N."),
         (everything / n, "that is the number of iterations in a pass."),
         (10 * visits, "the ten inner steps move theta, not the weights.")],
        "1,000 batches of 128 fall on 40,000 weights.",
    )  # fmt: skip
    _near(
        share, never, "The share never moved",
        [(1 - never, "that is the share that has moved."),
         (100 * never, "give a share between 0 and 1, not per cent.")],
        "One batch misses a weight with probability 1 - n/N, and there are 1,000 of them.",
    )  # fmt: skip


@exercise("11.B")
def check_half_width(answer):
    """By SciPy's interval of a mean."""
    from scipy import stats

    delta = torch.tensor([-0.008, -0.006, -0.016], dtype=torch.float64)
    sample = stats.ttest_1samp(delta.numpy(), 0.0).confidence_interval(0.95)
    half, spread = (sample.high - sample.low) / 2, float(delta.std())
    (value,) = numbers(answer, 1)
    _near(
        value, half, "The half width",
        [(1.96 * spread / 3**0.5, "1.96 is for many seeds; two degrees of freedom need 4.30."),
         (stats.t.ppf(0.975, 3) * spread / 3**0.5, "three seeds leave two degrees of freedom."),
         (stats.t.ppf(0.975, 2) * spread, "it is the mean that is uncertain: divide by sqrt(3)."),
         (half * (2 / 3) ** 0.5, "divide the sum of squares by 2, not by 3."),
         (spread, "that is the standard deviation of one difference."),
         (2 * half, "that is the whole width.")],
        "The standard deviation of the three, over sqrt(3), times 4.30.",
    )  # fmt: skip


@exercise("11.1")
def check_visits(visits):
    """Counted on the sampler itself, many passes; the formula then holds exactly."""
    for n, size, steps in ((50, 8, 15), (23, 5, 3), (43, 10, 6)):
        per_pass = n // size
        rest = n - per_pass * size
        full, begun = divmod(steps, per_pass)
        truth = (rest / n) ** full * (1 - begun * size / n)
        mean, independent, passes = numbers(visits(n, size, steps), 3)
        repeats, never = 100, 0
        for seed in range(repeats):
            sampler = data.Batches(
                torch.zeros(n, 1), torch.zeros(n), size, torch.Generator().manual_seed(seed)
            )
            seen = torch.zeros(n, dtype=torch.bool)
            for _ in range(steps):
                seen[sampler.draw()[2]] = True
            never += int((~seen).sum())
        assert abs(never / (repeats * n) - truth) < 0.03  # this check's own formula
        what = f"N = {n}, n = {size}, R = {steps}"
        rows = [
            (mean, "The mean", steps * size / n,
             [("That is the number of passes over N // n batches.", steps / per_pass),
              ("That counts all visits together; divide by N.", steps * size)]),
            (independent, "The share with independent draws", (1 - size / n) ** steps,
             [("Take (1 - n/N)^R itself, not its limit.", math.exp(-steps * size / n)),
              ("A batch holds n examples.", (1 - 1 / n) ** steps),
              ("That is the share that has moved.", 1 - (1 - size / n) ** steps),
              ("Within one batch no example is drawn twice.", (1 - 1 / n) ** (steps * size))]),
            (passes, "The share in passes", truth,
             [("The last pass may be incomplete.", (rest / n) ** full),
              ("The remainder N - n (N // n) is left out of each pass.",
               max(0.0, 1 - steps * size / n)),
              ("A pass leaves out a remainder, drawn anew each time.",
               1 - begun * size / n if full == 0 else 0.0)]),
        ]  # fmt: skip
        for value, name, right, mistakes in rows:
            listed = [(f"{name} ({what}): {why}", _value(bad)) for why, bad in mistakes]
            compare(_value(value), _value(right), listed, f"{name} ({what})", 1e-9)


@exercise("11.2")
def check_costs(answer):
    """Counted by hand from (11.3)."""
    got = numbers(answer, 4)
    fixed = 5 + 4 + 2 * 8
    rows = [
        ("(a)", fixed, "Five inner steps, f on four batches' worth, J v on eight.",
         [(13, "J v counts 2, on eight batches' worth."),
          (8, "f is on 512 examples, J v on 1,024: in proportion to the batch."),
          (17, "J v is a product with a second derivative: it counts 2."),
          (22, "f is on 512 examples: 4, not 1.")]),
        ("(b)", fixed + 2 * 5 * 4, "Five products on four batches' worth, 2 each.",
         [(fixed + 10, "the curvature batch has 512 examples."),
          (fixed + 20, "a product with H counts 2."),
          (fixed + 48, "from zero, CG needs no product for its first residual.")]),
        ("(c)", fixed + 2 * 11 * 4, "2 T + 1 products on four batches' worth.",
         [(fixed + 80, "the right-hand side H b needs a product, too."),
          (fixed + 22, "the curvature batch has 512 examples."),
          (fixed + 44, "each of its steps needs two products.")]),
        ("(d)", fixed + 1, "Four gradients, every fourth iteration.",
         [(fixed + 4, "that is an iteration in which the factors are built; take the mean."),
          (fixed, "every fourth iteration builds the factors."),
          (fixed + 0.25, "the factors are built on 512 examples.")]),
    ]  # fmt: skip
    for value, (name, truth, hint, mistakes) in zip(got, rows, strict=True):
        if abs(value - truth) < 1e-6:
            continue
        for wrong, sentence in mistakes:
            if abs(value - wrong) < 1e-6:
                raise Wrong(f"{name}: {sentence}")
        raise Wrong(f"{name}: {value:g} is not right. {hint}")


@exercise("11.3")
def check_expected_best(expected_best):
    """By every tuple of k draws."""
    cases = [([0.4, 0.9, 0.5, 0.7], 2), ([0.31, 0.3, 0.9], 3), ([1.0, 2.0, 4.0, 8.0, 3.0], 4),
             ([0.6, 0.6, 0.2], 2), ([0.8, 0.1], 5), ([0.5, 0.2, 0.3], 1)]  # fmt: skip
    for losses, k in cases:
        n = len(losses)
        draws = [min(t) for t in itertools.product(losses, repeat=k)]
        truth = sum(draws) / len(draws)
        mistakes = [
            ("That is the largest of k: count from the smallest.",
             sum(max(t) for t in itertools.product(losses, repeat=k)) / n**k),
            ("That is the mean of one trial.", sum(losses) / n),
            ("That is the best of all trials.", min(losses)),
            ("You forgot that the same trial can be drawn again.",
             sum(min(t) for t in itertools.combinations(losses, min(k, n)))
             / math.comb(n, min(k, n))),
        ]  # fmt: skip
        mistakes = [(why, _value(v)) for why, v in mistakes if abs(v - truth) > 1e-6]
        what = f"For losses {losses} and k = {k} the result"
        compare(_value(expected_best(list(losses), k)), _value(truth), mistakes, what, 1e-9)


def _histories(seed: int, shift: float) -> list[list[dict]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for level in (0.30, 0.36, 0.33, 0.41, 0.35):  # what the seeds have in common
        noise = draw(generator, 6, 2) * 0.02
        out.append(
            [
                {"tuning_loss": level + shift + t, "test_loss": level + shift + e}
                for t, e in noise.tolist()
            ]
        )
    return out


@exercise("11.4")
def check_compare(repaired):
    """By SciPy's paired interval on the iterates that the tuning loss chooses."""
    from scipy import stats

    def chosen(histories):
        best = [min(h, key=lambda row: row["tuning_loss"]) for h in histories]
        return torch.tensor([row["test_loss"] for row in best], dtype=torch.float64)

    for seed in (110, 111):
        one, two = _histories(seed, 0.0), _histories(seed + 50, 0.01)
        a, b = chosen(one), chosen(two)
        interval = stats.ttest_rel(a.numpy(), b.numpy()).confidence_interval(0.95)
        middle, half = (interval.low + interval.high) / 2, (interval.high - interval.low) / 2
        n = len(a)
        quantile = stats.t.ppf(0.975, n - 1)
        mean, spread = numbers(repaired(one, two), 2)
        peek = [min(row["test_loss"] for row in h) for h in one]
        peek_two = [min(row["test_loss"] for row in h) for h in two]
        peeked = _value(peek).mean() - _value(peek_two).mean()
        compare(
            _value(mean), _value(middle),
            [("The test loss chooses the iterate. The tuning loss should.", peeked),
             ("The sign: the first method minus the second.", _value(-middle))],
            "The mean difference", 1e-5,
        )  # fmt: skip
        unpaired = ((a.var() + b.var()) / n).sqrt()
        paired = (a - b).std() / n**0.5
        compare(
            _value(spread), _value(half),
            [("Two independent samples? The seeds are shared: take the differences in pairs.",
              quantile * unpaired),
             ("Two independent samples, and 1.96 for five seeds.", 1.96 * unpaired),
             ("Student's quantile is larger than 1.96 for so few seeds.", 1.96 * paired),
             ("The degrees of freedom are n - 1.", stats.t.ppf(0.975, n) * paired),
             ("The interval is two-sided: 2.5 % on each side.",
              stats.t.ppf(0.95, n - 1) * paired),
             ("Divide the variance by n - 1, not by n.", quantile * paired * ((n - 1) / n) ** 0.5),
             ("Divide by the square root of n: it is the mean that is uncertain.",
              quantile * paired * n**0.5),
             ("That is the whole width; half of it is asked for.", 2 * quantile * paired)],
            "The half width", 5e-4,  # Student's quantile may come from a table
        )  # fmt: skip


@exercise("11.5")
def check_smallest(smallest):
    """By automatic differentiation of a loss with the given two derivatives."""
    cases = [(0.7, -1.2, 0.5, 0.3, 0.0), (1.5, 0.4, 0.2, -0.6, 0.1), (-0.3, 0.2, 0.25, 0.5, 0.01),
             (2.0, 1.0, 0.1, 0.0, 0.05), (0.0, 0.0, 0.25, -0.5, 0.0)]  # fmt: skip
    for one, two, h, r, rho in cases:

        def g(theta, one=one, two=two, h=h, r=r, rho=rho):
            o = theta[0] * theta[1] - one * two
            return r * o + h / 2 * o**2 + rho * theta.square().sum()

        def eig(r=r, h=h, rho=rho, g=g, point=(one, two)):
            point = torch.tensor(point, dtype=torch.float64)
            return torch.linalg.eigvalsh(
                torch.autograd.functional.hessian(lambda t: g(t, r=r, h=h, rho=rho), point)
            )

        truth = eig()[0]
        mistakes = [
            ("That is the largest eigenvalue.", eig()[1]),
            ("The second derivative of rho ||theta||^2 is 2 rho.", truth - rho),
            ("The l2 term is missing.", truth - 2 * rho),
            ("That is the GGN's: the remainder r [[0, 1], [1, 0]] is missing.", eig(r=0.0)[0]),
            ("The remainder is + r [[0, 1], [1, 0]]; yours has a minus.", eig(r=-r)[0]),
            ("h multiplies the outer product of (theta_2, theta_1).", eig(h=1.0)[0]),
        ]  # fmt: skip
        mistakes = [m for m in mistakes if abs(float(m[1] - truth)) > 1e-9]
        what = f"For theta = ({one}, {two}), h = {h}, r = {r}, rho = {rho} the result"
        compare(_value(smallest(one, two, h, r, rho)), truth, mistakes, what, 1e-9)


@exercise("11.6")
def check_damping(least_damping):
    """By running CG with a little more and a little less of it."""
    generator = torch.Generator().manual_seed(112)
    for m, shift in ((6, 0.0), (4, -0.5), (5, 9.0)):
        diagonal, off = draw(generator, m) + shift, draw(generator, m - 1).abs() + 0.1
        T = torch.diag(diagonal) + torch.diag(off, 1) + torch.diag(off, -1)
        got = float(numbers(least_damping(T.clone()), 1)[0])
        low = torch.linalg.eigvalsh(T)[0]
        if low > 0:
            if not abs(got) <= 1e-9:
                raise Wrong(f"A matrix that is positive already needs damping 0, not {got:.4g}.")
            continue
        b = torch.zeros(m, dtype=torch.float64)
        b[0] = 1  # the Lanczos basis starts at b
        eye = torch.eye(m, dtype=torch.float64)
        mistakes = [
            ("The smallest diagonal entry is only a bound: -lambda_min is larger.",
             -diagonal.min()),
            ("That is Gershgorin's bound: enough, but not the least.",
             -(diagonal - (T - torch.diag(diagonal)).abs().sum(1)).min()),
            ("The largest absolute eigenvalue is more than is needed.",
             torch.linalg.eigvalsh(T).abs().max()),
            ("The sign: damping is positive.", low),
            ("None at all? This matrix has a negative eigenvalue.", _value(0.0)),
        ]  # fmt: skip
        compare(_value(got), -low, mistakes, f"The damping for a {m} x {m} matrix", 1e-6)
        for factor, enough in ((1.001, True), (0.999, False)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", linsolve.NegativeCurvatureWarning)
                done = linsolve.cg(lambda v, A=T + factor * got * eye: A @ v, b, m, tol=0.0)
            assert done.negative_curvature != enough
