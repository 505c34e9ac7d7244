"""Checks of chapter 3: inverse-Hessian-vector products."""

import math

import torch

from bilevel_lite.exercises import Wrong, close, compare, exercise, numbers
from bilevel_lite.linsolve import cg


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _system(eigenvalues: list[float], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with these eigenvalues in a random basis, and a right-hand side."""
    mu = torch.tensor(eigenvalues, dtype=torch.float64)
    basis = torch.linalg.qr(_draw(len(mu), len(mu), seed=seed)).Q
    return (basis * mu) @ basis.T, _draw(len(mu), seed=seed + 1)


class _Counting:
    """v -> H v that counts its calls."""

    def __init__(self, matrix: torch.Tensor):
        self.matrix, self.products = matrix, 0

    def __call__(self, v):
        self.products += 1
        return self.matrix @ v


def _unpack(answer, names: str) -> tuple:
    try:
        first, second = answer
    except (TypeError, ValueError):
        raise Wrong(f"Give a pair ({names}).") from None
    return first, second


@exercise("3.A")
def _ten_products(answer):
    steep, flat = numbers(answer, 2)
    if abs(steep) > 1e-6 and abs(flat) <= 1e-6:
        raise Wrong("The other way round: first the error along the eigenvalue 1.")
    if abs(steep) > 1e-6:
        raise Wrong("Along the eigenvalue 1 the factor is 1 - step mu = 1 - 1. What is left?")
    mistakes = (
        ("That is 0.99^10; ten products are eleven summands, the first costs none.", 0.99**10),
        ("That is one summand; ten products have been spent.", 0.99),
        ("That is the part of v that is found; how much is left?", 1 - 0.99**11),
        ("The factor along the eigenvalue 0.01 is 1 - 0.01, not 0.01.", 0.01),
        ("The factor along the eigenvalue 0.01 is 1 - 0.01, not 0.01.", 0.0),
        ("That is 1 - 0.1: the powers of 0.99 multiply, eleven of them.", 0.9),
        ("That is 1 - 11 times 0.01: the powers of 0.99 multiply, they do not add up.", 0.89),
    )
    if abs(flat - 0.99**11) <= 0.003:
        return
    for sentence, wrong in mistakes:
        if abs(flat - wrong) <= 0.002:
            raise Wrong(sentence)
    raise Wrong("Along the eigenvalue 0.01 the error is (1 - 0.01)^K. How many summands K?")


@exercise("3.B")
def _two_dimensions(answer):
    residual, error = numbers(answer, 2)
    if abs(residual - 1e-3) > 5e-5:
        if abs(residual - 0.995) <= 0.006 and abs(error - 1e-3) <= 5e-5:
            raise Wrong("The other way round: first the relative residual.")
        raise Wrong("The residual: b - H v^ is (0, 0.001), and b is about 1 long.")
    mistakes = (
        ("That is the residual again. The error is v - v^, and v = b / mu = (1, 10).", 1e-3),
        ("That is the length of the error; divide it by that of v = (1, 10).", 10.0),
        ("That is 10 / 11; the length of v = (1, 10) is the root of 1 + 100.", 10 / 11),
    )
    if abs(error - 0.995) <= 0.006:
        return
    for sentence, wrong in mistakes:
        if abs(error - wrong) <= 0.002 * max(1.0, wrong):
            raise Wrong(sentence)
    raise Wrong("The error: v = b / mu entry by entry is (1, 10). How far is (1, 0) from it?")


@exercise("3.1")
def _predict(answer):
    steps, terms = numbers(answer, 2)
    if steps == 4:
        raise Wrong("(a) Does CG ever see an eigenspace in which b has no component?")
    if steps != 3:
        raise Wrong("(a) Count distinct eigenvalues, not their multiplicities.")
    if terms == 89:
        raise Wrong("(b) That is the number of products; the first summand costs none.")
    if terms != 90:
        raise Wrong("(b) Find the smallest K with |1 - step mu|^K <= 0.01, step = 1/2, mu = 0.1.")


@exercise("3.2")
def _plan(function):
    for mu_min, mu_max, tolerance in ((0.1, 1.0, 0.01), (0.02, 5.0, 1e-3), (3.0, 4.0, 0.3)):
        step, terms = _unpack(function(mu_min, mu_max, tolerance), "step, terms")
        best = torch.tensor(2 / (mu_min + mu_max), dtype=torch.float64)
        mistakes = [
            (
                "The step is 1 / mu_max: safe, but another one has a smaller worst factor.",
                1 / mu_max,
            ),
            ("The step is 2 / mu_max: there the factor at mu_max is 1 in size.", 2 / mu_max),
            (
                "The step is half the best one: 2, not 1, over the sum of both ends.",
                float(best) / 2,
            ),
        ]
        mistakes = [(text, torch.tensor(value).to(best)) for text, value in mistakes]
        compare(step, best, mistakes, "The step", rtol=1e-6)
        rate = (mu_max - mu_min) / (mu_max + mu_min)
        expected = math.ceil(math.log(tolerance) / math.log(rate))
        if terms != int(terms):
            raise Wrong(f"The number of summands should be an integer, got {float(terms):.3f}.")
        if terms == expected - 1:
            raise Wrong(
                "You return one summand too few: round up, and count summands rather than products."
            )
        if terms != expected:
            raise Wrong(
                f"For mu from {mu_min} to {mu_max} and tolerance {tolerance} you need {expected} "
                f"summands, got {int(terms)}. The worst factor per summand is "
                "(mu_max - mu_min) / (mu_max + mu_min)."
            )


class _Forward(torch.autograd.Function):
    """log(1 + e^z); a backward pass gives NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return torch.log1p(torch.exp(z))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, tangent):
        return torch.sigmoid(ctx.saved_tensors[0]) * tangent

    @staticmethod
    def backward(ctx, slope):
        return slope * torch.nan


@exercise("3.3")
def _cross(function):
    n, d = 30, 5
    x, theta, v = _draw(n, d, seed=1), _draw(d, seed=2), _draw(d, seed=3)
    calls = []

    def losses(point):
        calls.append(point)
        return _Forward.apply(x @ point)

    expected = torch.sigmoid(x @ theta) * (x @ v) / n  # row i of J is grad l_i / n
    got = function(losses, theta, v)
    if isinstance(got, torch.Tensor) and bool(got.isnan().all()):
        raise Wrong("That takes a backward pass; one forward-mode pass of the losses is enough.")
    spent = len(calls)
    values = losses(theta).detach()
    mistakes = [
        ("You forgot the 1/n of the mean.", n * expected),
        ("The sign is wrong: this is J v, not the term -J v of the hypergradient.", -expected),
        ("These are the losses themselves; you need their tangent along v.", values),
        ("These are the losses themselves; you need their tangent along v.", values / n),
        ("It is divided by d; the mean in g is over the n examples.", expected * n / d),
    ]
    compare(got, expected, mistakes, "J v", rtol=1e-6)
    if spent != 1:
        raise Wrong(f"J v is right, but you evaluated the losses {spent} times; once is enough.")


@exercise("3.4")
def _repaired(function):
    matrix, b = _system([1.0, 2.0, 3.0, 5.0, 8.0, 13.0])
    identity = torch.eye(len(b), dtype=b.dtype)

    got = function(lambda v: v, b, 10)
    if isinstance(got, torch.Tensor) and got.shape == b.shape and not bool(got.any()):
        raise Wrong(
            "On the identity it returns zero: it leaves the loop before storing the iterate."
        )
    if isinstance(got, torch.Tensor) and not bool(got.isfinite().all()):
        raise Wrong(
            "On the identity it returns nan: after the first step r = 0, and the next divides 0 by "
            "0. It must stop when it has converged."
        )
    close(got, b, "On the identity the result", hint="Is the last iterate stored?")
    counting = _Counting(matrix)
    got = function(counting, b, 6)
    close(got, torch.linalg.solve(matrix, b), "Without damping and scale the result")
    if counting.products > 6:
        raise Wrong(f"It spends {counting.products} products on 6 steps; one per step is enough.")
    got = function(lambda v: matrix @ v, b, 10, 1.0, 0.5)
    if isinstance(got, torch.Tensor) and got.shape == b.shape:
        twice = torch.linalg.solve(matrix + identity, b)
        if torch.allclose(got, twice, rtol=1e-6):
            raise Wrong("With damping 0.5 it solves (H + 1.0 I) v = b: the damping is added twice.")
    close(
        got,
        torch.linalg.solve(matrix + 0.5 * identity, b),
        "With damping 0.5 the result",
        hint="In how many places is the damping added, and should it be?",
    )
    close(
        function(lambda v: matrix @ v, b, 10, 0.1, 0.0),
        torch.linalg.solve(0.1 * matrix, b),
        "With scale 0.1 the result",
        hint="The step and the residual must use the same operator.",
    )
    close(
        function(lambda v: matrix @ v, b, 10, 0.1, 0.5),
        torch.linalg.solve(0.1 * matrix + 0.5 * identity, b),
        "With scale 0.1 and damping 0.5 the result",
        hint="Only H is scaled, not the damping.",
    )
    counting = _Counting(matrix)
    function(counting, b, 50)
    if counting.products > 10:
        raise Wrong("It no longer stops when it has converged; keep the test on the residual.")


@exercise("3.5")
def _deceptive(function):
    eigenvalues, b = _unpack(function(), "eigenvalues, b")
    mu = torch.as_tensor(eigenvalues).detach().to("cpu", torch.float64).reshape(-1)
    b = torch.as_tensor(b).detach().to("cpu", torch.float64).reshape(-1)
    if mu.shape != b.shape:
        raise Wrong(f"{len(mu)} eigenvalues and {len(b)} entries of b: they should be as many.")
    if not bool((mu > 0).all()):
        raise Wrong("Every eigenvalue must be positive.")
    condition = float(mu.max() / mu.min())
    if condition > 1e4 * (1 + 1e-6):  # 1e-4 in single precision is not 1e-4
        raise Wrong(f"The condition number is {condition:.2g}; at most 1e4 is allowed.")
    solve = cg(lambda v: mu * v, b, 3)
    exact = b / mu
    error = float((solve.solution - exact).norm() / exact.norm())
    if not error > 0.9:
        raise Wrong(
            f"The relative error after three steps is {error:.2g}, not above 0.9. Are there more "
            "than three distinct eigenvalues, and is most of b / mu on the smallest?"
        )
    if not solve.relative_residual < 0.01:
        raise Wrong(
            f"The relative residual after three steps is {solve.relative_residual:.2g}, not below "
            "0.01. Put less of b on the small eigenvalue, or bring the large ones closer together."
        )


@exercise("3.6")
def _estimate(function):
    matrix, b = _system([0.05 * 1.35**j for j in range(16)], seed=4)
    exact = torch.linalg.solve(matrix, b)

    def energy(k):
        v = cg(lambda p: matrix @ p, b, k).solution if k else torch.zeros_like(b)
        return (exact - v) @ matrix @ (exact - v)

    for k, m in ((0, 3), (4, 2), (5, 4), (3, 13)):
        expected = (energy(k) - energy(k + m)).sqrt()
        counting = _Counting(matrix)
        got = torch.as_tensor(function(counting, b, k, m)).detach().to(expected)
        if got.shape == () and torch.allclose(got, expected**2, rtol=1e-4):
            raise Wrong("This is the square of the estimate; take the square root.")
        if got.shape == () and torch.allclose(got, expected / math.sqrt(2), rtol=1e-4):
            raise Wrong("A factor: q falls by half of what the squared energy error falls by.")
        close(
            got,
            expected,
            f"For k = {k} and m = {m} the estimate",
            rtol=1e-5,
            hint="Sum alpha_j ||r_j||^2 over the steps k to k + m - 1, r_j from before the step.",
        )
        if counting.products > k + m:
            raise Wrong(f"Right, but it took {counting.products} products instead of {k + m}.")
