"""Checks of chapter 9b, a gallery of wrong hypergradients."""

import torch

from bilevel_lite import linsolve
from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers


@exercise("9b.A")
def check_factors(answer):
    """Damping added twice along one direction; a series without its step."""
    length, factor = numbers(answer, 2)
    near(
        length, 0.12 / 0.15, "The length",
        [(1.25, "that is the one with one damping over the one with two."),
         (0.09 / 0.15, "that is relative to no damping at all."),
         (0.09 / 0.12, "that is what one damping does, relative to none."),
         (0.5, "that is so where mu is zero.")],
        "Along an eigenvector v is b / (mu + what is added).", 0.01,
    )  # fmt: skip
    near(
        factor, 2.0, "The factor",
        [(0.5, "the other way round: what was left out is missing as a factor."),
         (1.0, "the sum without its step is not the solution.")],
        "The whole series is step times the sum, and it is the solution.", 0.01,
    )  # fmt: skip


WHY_IT_TRAINS = {
    1: "is right to three digits", 2: "still has a cosine near 0.9 with the exact one",
    3: "is far too long, but its cosine is 0.8", 4: "is too short, its cosine 0.9",
    5: "is a little short", 7: "is the exact one, with twice the implicit part",
    8: "lacks a small part", 9: "has the sign of the exact one in each entry",
    10: "adds up the exact ones", 11: "moves theta a little, and the inner problem is solved anew",
    14: "belongs to a model that is nearly the same", 15: "is nearly twice the exact one",
}  # fmt: skip


@exercise("9b.B")
def check_which_fail(answer):
    """Those without a direction, and the one that diverges; the chapter runs all fifteen."""
    given = numbers(answer, 3)
    for number in given:
        if number in (16, 17, 18, 19):
            raise Wrong(f"{number:.0f} is not among the fifteen.")
        if number not in (*WHY_IT_TRAINS, 6, 12, 13):
            raise Wrong("Give the numbers of three slips, from 1 to 15.")
        if number in WHY_IT_TRAINS:
            raise Wrong(f"{number:.0f} {WHY_IT_TRAINS[int(number)]}, and trains.")
    if len(set(given)) < 3:
        raise Wrong("Three different ones.")


def combination(h, direct, implicit):
    """a, c and what is left, by the normal equations."""
    P = torch.stack([direct, implicit], 1)
    a, c = torch.linalg.solve(P.T @ P, P.T @ h)
    return a, c, (h - P @ torch.stack([a, c])).norm()


@exercise("9b.1")
def check_made_of(made_of):
    """On parts that are far from orthogonal."""
    generator = torch.Generator().manual_seed(91)
    for k in range(4):
        m = 6 + 3 * k
        direct, other = draw(generator, m), draw(generator, m)
        implicit = 0.7 * direct + other * (1 + k)
        mixed = draw(generator, 2)
        h = mixed[0] * direct + mixed[1] * implicit + 0.3 * draw(generator, m)
        a, c, left = combination(h, direct, implicit)
        exact = (direct + implicit).norm()
        got = made_of(h.clone(), direct.clone(), implicit.clone())
        got = torch.tensor(numbers(got, 3), dtype=torch.float64)
        alone = [h @ part / (part @ part) for part in (direct, implicit)]
        alone_left = (h - alone[0] * direct - alone[1] * implicit).norm()
        rows = {
            "The parts are not orthogonal: solve for both numbers at once.":
                (*alone, alone_left / exact),
            "The rest is relative to the exact hypergradient, direct + implicit, not to h.":
                (a, c, left / h.norm()),
            "The rest is a length relative to that of the exact hypergradient.": (a, c, left),
            "implicit is -J H^-1 b already: its number is c, not -c.": (a, -c, left / exact),
            "The order is a (direct), c (implicit), rest.": (c, a, left / exact),
            "The rest is what is left of h, not its square.": (a, c, (left / exact) ** 2),
            "The rest is what the nearest combination leaves, not what the exact one leaves.":
                (a, c, (h - direct - implicit).norm() / exact),
        }  # fmt: skip
        compare(
            got, torch.stack([a, c, left / exact]),
            [(why, torch.stack(row)) for why, row in rows.items()], "(a, c, rest)", 1e-6,
        )  # fmt: skip


KINDS = ("right", "direct term", "factor", "sum", "chain rule", "order")


def wrong_ones(generator, n):
    """(kind, h, lam, direct, implicit) for each kind, on fresh draws."""
    lam = 1.5 * draw(generator, n)
    slope = lam.sigmoid() * (1 - lam.sigmoid())
    direct, implicit = (slope * draw(generator, n) for _ in range(2))
    exact = direct + implicit
    order = torch.arange(n).roll(int(torch.randint(1, n, (1,), generator=generator)))
    factors = (0.2, 0.9, 5.0, -1.0)
    c = factors[int(torch.randint(4, (1,), generator=generator))]
    made = {
        "right": exact, "direct term": implicit, "factor": direct + c * implicit,
        "sum": c * exact, "chain rule": exact / slope, "order": direct + implicit[order],
    }  # fmt: skip
    return [(kind, h, lam, direct, implicit) for kind, h in made.items()]


@exercise("9b.2")
def check_diagnose(diagnose):
    """Six kinds on five problems each."""
    generator = torch.Generator().manual_seed(92)
    for n in (6, 12, 20, 9, 30):
        for kind, *given in wrong_ones(generator, n):
            said = diagnose(*(part.clone() for part in given))
            if said not in KINDS:
                raise Wrong(f"Return one of {', '.join(KINDS)}; you returned {said!r}.")
            if said != kind:
                raise Wrong(f"One that is {WORDS[kind]} was called {said!r}.")


WORDS = {
    "right": "right", "direct term": "without its direct term",
    "factor": "right but for a factor on its implicit part",
    "sum": "a multiple of the right one", "chain rule": "cut at the weights",
    "order": "made with the implicit part of other examples",
}  # fmt: skip


def system(generator, d, low=0.1):
    """A random symmetric matrix with eigenvalues from ``low`` to 1."""
    Q = torch.linalg.qr(draw(generator, d, d))[0]
    return Q @ torch.diag(torch.linspace(low, 1, d, dtype=torch.float64)) @ Q.T


@exercise("9b.3")
def check_four_slips(repaired):
    """By dense solves: the identity for the stale iterate, then random systems."""
    generator = torch.Generator().manual_seed(93)
    for d, m, damping in ((5, 3, 0.0), (4, 6, 0.5), (7, 4, 0.03), (9, 5, 0.2)):
        identity = torch.eye(d, dtype=torch.float64)
        H = identity if d < 6 else system(generator, d)
        J, b, direct = draw(generator, m, d), draw(generator, d), draw(generator, m)

        def v(added, H=H, b=b, identity=identity):
            return torch.linalg.solve(H + added * identity, b)

        got = repaired(
            lambda p, H=H: H @ p, lambda v, J=J: J @ v, b.clone(), direct.clone(), damping
        )
        mistakes = [
            ("The direct term is missing.", -J @ v(damping)),
            ("The damping is still added twice.", direct - J @ v(2 * damping)),
            ("The damping is still added twice, and the direct term is missing.",
             -J @ v(2 * damping)),
            ("No damping is left: it belongs there once.", direct - J @ v(0)),
            ("On a system that converges in one step nothing is returned: store the step before "
             "you leave.", direct),
            ("On a system that converges in one step nothing is returned, and the direct term is "
             "missing.", 0 * direct),
            ("The sign: the implicit part is -J v.", direct + J @ v(damping)),
        ]  # fmt: skip
        compare(
            got, direct - J @ v(damping), mistakes,
            "With H = I the result" if d < 6 else "On a random system the result", 1e-6,
            "Is every direction made from the residual of the same step?",
        )  # fmt: skip


def dense(H, b):
    """The matrix behind a product."""
    return torch.stack([H(e) for e in torch.eye(len(b), dtype=b.dtype)], 1)


def conjugate(H, b, stale=False, old=False, scale=1.0, iters=None):
    """CG, with one of three slips."""
    matrix, v, r, p = dense(H, b), torch.zeros_like(b), b, b
    for _ in range(iters or 4 * len(b) + 10):
        Hp = matrix @ p
        step = r @ r / (p @ Hp) / scale
        new, rest = v + step * p, r - step * Hp
        if rest.norm() < 1e-10 * b.norm():
            return (v if stale else new) * scale
        v, p, r = new, (r if old else rest) + (rest @ rest) / (r @ r) * p, rest
    return v * scale


def neumann(H, b, step=None, factor=None, terms=4000):
    """A Neumann series; its step is 1 / mu_max, its factor is its step."""
    matrix = dense(H, b)  # few calls: a grader keeps a record of each
    step = step or 1 / float(torch.linalg.eigvalsh(matrix)[-1])
    p = total = b
    for _ in range(terms):
        p = p - step * (matrix @ p)
        total = total + p
    return (factor or step) * total


def remembering():
    """A solver that goes on returning its first answer of a size."""
    seen = {}

    def solve(H, b):
        if len(b) not in seen:
            seen[len(b)] = torch.linalg.solve(dense(H, b), b)
        return seen[len(b)]

    return solve


SOLVERS = {
    "a direct solve": (False, lambda: lambda H, b: torch.linalg.solve(dense(H, b), b)),
    "textbook CG": (False, lambda: conjugate),
    "CG that stops at 1e-8": (False, lambda: lambda H, b: linsolve.cg(H, b, 200, 1e-8).solution),
    "a Neumann series with a good step": (False, lambda: neumann),
    "a loop that leaves before it stores its step":
        (True, lambda: lambda H, b: conjugate(H, b, stale=True)),
    "CG with the old residual in its direction":
        (True, lambda: lambda H, b: conjugate(H, b, old=True, iters=len(b))),
    "a scale in one line and not in the next":
        (True, lambda: lambda H, b: conjugate(H, b, scale=0.5, iters=len(b))),
    "a Neumann series without its step":
        (True, lambda: lambda H, b: neumann(H, b, factor=1.0)),
    "a Neumann series with the step 1 whatever H is":
        (True, lambda: lambda H, b: neumann(H, b, step=1.0)),
    "one that adds a damping of 1e-7, whatever the size of H":
        (True, lambda: lambda H, b: torch.linalg.solve(
            dense(H, b) + 1e-7 * torch.eye(len(b), dtype=b.dtype), b)),
    "one that returns its first answer again and again": (True, remembering),
}  # fmt: skip


@exercise("9b.4")
def check_finds(finds):
    """Each solver is handed over as new, under another order of the draws each time."""
    generator = torch.Generator().manual_seed(94)
    names = list(SOLVERS)
    for k in torch.randperm(len(names), generator=generator).tolist():
        wrong, make = SOLVERS[names[k]]
        said = finds(make())
        if not isinstance(said, bool | torch.Tensor) or int(said) not in (0, 1):
            raise Wrong(f"Return True or False; you returned {said!r}.")
        if bool(said) != wrong:
            what = "passes your test" if wrong else "is right, and is accused"
            raise Wrong(f"{names[k][0].upper()}{names[k][1:]} {what}.")
