"""Checks of chapter 5, KFAC."""

import torch

from bilevel_lite.exercises import Wrong, close, compare, draw, exercise, numbers


def _apart(mistakes, truth):
    """The mistakes that differ from the truth on this draw: the others accuse nobody."""
    return [m for m in mistakes if float((m[1] - truth).norm()) > 1e-6 * float(truth.norm())]


def _positive(generator, d):
    """A random symmetric positive definite matrix, shape (d, d)."""
    root = draw(generator, d + 3, d)
    return root.T @ root / d


@exercise("5.A")
def check_ranks(answer):
    """Ten classes whose probes sum to zero, eight inputs: 9 x 1, and 9 x 8."""
    one, mean = numbers(answer, 2)
    if one == 10 or mean == 80:
        raise Wrong(
            "Each probe y_hat - e_k sums to zero, so B has a zero eigenvalue: its rank is 9."
        )
    if (one, mean) == (72, 9):
        raise Wrong("First the rank for one example, then for the mean over 300.")
    if one in (1, 8):
        raise Wrong("One example: a a^T has rank 1, B_i has rank 9; ranks of factors multiply.")
    if mean in (8, 9):
        raise Wrong("The mean: A now has rank 8, B still 9; ranks of factors multiply.")
    for value, truth, what in ((one, 9, "one example"), (mean, 72, "the mean")):
        if value != truth:
            raise Wrong(f"The rank for {what} is not {value:.6g}: multiply the ranks of A and B.")


@exercise("5.B")
def check_where_exact(answer):
    """By (5.5), where A_i or B_i is the same for all examples."""
    try:
        given = answer.replace(",", " ").split() if isinstance(answer, str) else list(answer)
        given = [str(word).strip().lower() for word in given]
    except TypeError:
        raise Wrong('Give four words, such as ("all", "no", ...).') from None
    if len(given) != 4:
        raise Wrong(f"Give four words; there are {len(given)}.")
    hints = (
        "Case 1: the loss bends alike for every example, and there is one layer.",
        "Case 2: B_i = diag(y_hat) - y_hat y_hat^T depends on the example's input.",
        "Case 3: one example is its own mean, so each block is exact; what couples two layers?",
        "Case 4: what comes back through linear layers is the same for all examples; and between "
        "the layers?",
    )
    for word, right, hint in zip(given, ("all", "no", "blocks", "blocks"), hints, strict=True):
        if word not in ("all", "blocks", "no"):
            raise Wrong(f'{word!r} is none of "all", "blocks", "no".')
        if word != right:
            raise Wrong(hint)


@exercise("5.1")
def check_by_hand(answer):
    """The 4 x 4 Kronecker product, written out."""
    values = torch.tensor(numbers(answer, 4), dtype=torch.float64)
    A = torch.tensor([[1.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    B = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    V = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    truth = torch.kron(B, A) @ V.flatten()
    compare(
        values,
        truth,
        [
            ("These are the right numbers, column by column; write them row by row.",
             truth.view(2, 2).T.flatten()),
            ("That is A V B: B multiplies from the left.", (A @ V @ B).flatten()),
            ("That is B V: A is missing on the right.", (B @ V).flatten()),
            ("That is V transposed: vec reads V row by row.", (B @ V.T @ A).flatten()),
            ("That is B V A entry by entry; use matrix products.", (B * V * A).flatten()),
        ],
        "The vector",
    )  # fmt: skip


@exercise("5.2")
def check_shapes(answer):
    """Counted from the shapes that the exercise gives."""
    values = numbers(answer, 4)
    d2, d1 = 16 * 5 * 5 + 1, 32
    if values[0] == d1 and values[1] == d2:
        raise Wrong("A belongs to the inputs, B to the outputs; they are swapped.")
    rows = (
        ("A", d2, "A patch has 16 * 5 * 5 entries, and a 1 is appended."),
        ("B", d1, "B has one row for each output channel, at whatever position."),
        ("The entries of both factors", d1**2 + d2**2, "Each factor is square."),
        ("The entries of the GGN block", (d1 * d2) ** 2, "The block has d1 d2 rows and columns."),
    )
    for value, (name, truth, hint) in zip(values, rows, strict=True):
        if value != truth:
            raise Wrong(f"{name}: {value:.10g} is not right. {hint}")


@exercise("5.3")
def check_inverse(kfac_inverse_scratch):
    """A dense solve with the Kronecker product of the damped factors."""
    generator = torch.Generator().manual_seed(53)
    for d1, d2, delta in ((3, 5, 0.2), (4, 4, 1e-3), (6, 2, 1.5)):
        A, B = 7 * _positive(generator, d2), 0.3 * _positive(generator, d1)
        V = draw(generator, d1, d2)
        pi, root = ((A.trace() / d2) / (B.trace() / d1)).sqrt(), delta**0.5

        def solve(on_a, on_b, A=A, B=B, V=V):
            eye_a, eye_b = torch.eye(len(A)).to(A), torch.eye(len(B)).to(B)
            dense = torch.kron(B + on_b * eye_b, A + on_a * eye_a)
            return torch.linalg.solve(dense, V.flatten()).view_as(V)

        traces, truth = (A.trace() / B.trace()).sqrt(), solve(pi * root, root / pi)
        full = torch.kron(B, A) + delta * torch.eye(d1 * d2).to(A)
        mistakes = [
            ("pi is the wrong way round: A gets pi sqrt(delta), B sqrt(delta) / pi.",
             solve(root / pi, pi * root)),
            ("That is full damping, (5.7); here each factor gets its share, (5.8).",
             torch.linalg.solve(full, V.flatten()).view_as(V)),
            ("The square root of delta is missing.", solve(pi * delta, delta / pi)),
            ("pi is missing, which balances the two factors.", solve(root, root)),
            ("delta itself was added to both factors.", solve(delta, delta)),
            ("pi is missing its square root.", solve(pi**2 * root, root / pi**2)),
            ("Each trace is divided by the size of its matrix.",
             solve(traces * root, root / traces)),
            ("There is no damping: neither factor got its delta.", solve(0.0, 0.0)),
        ]  # fmt: skip
        got = kfac_inverse_scratch(A.clone(), B.clone(), V.clone(), delta)
        compare(got, truth, _apart(mistakes, truth), f"The result for V of shape {d1} x {d2}")


@exercise("5.4")
def check_mc_factor(mc_factor):
    """The exact expectation, within the noise of many draws."""
    generator = torch.Generator().manual_seed(54)
    logits, sigma = 1.5 * draw(generator, 40, 3), 0.2 + 3 * draw(generator, 40).square()
    p, n, samples = logits.softmax(1), 40, 4000
    h = torch.diag_embed(p) - torch.einsum("ni,nj->nij", p, p)

    def mean(weight, moment):
        return torch.einsum("n,nij->ij", weight, moment) / n

    def estimate(samples, copies=1):
        seeded = torch.Generator().manual_seed(5)
        got = mc_factor(logits.repeat(copies, 1), sigma.repeat(copies), samples, seeded)
        if not isinstance(got, torch.Tensor) or got.shape != (3, 3):
            shape = tuple(getattr(got, "shape", ()))
            raise Wrong(f"B has shape {shape}, expected (3, 3), one row for each class.")
        return got.detach().to(h)

    got, truth = estimate(samples), mean(sigma, h)
    size = float(truth.norm())

    def near(matrix):
        return float((got - matrix).norm()) <= 0.03 * float(matrix.norm())

    if not near(truth):
        uniform = torch.einsum("ni,nj->nij", p, p) - torch.einsum("ni,j->nij", p, p.new_ones(3)) / 3
        uniform = uniform - torch.einsum("i,nj->nij", p.new_ones(3), p) / 3
        uniform = uniform + torch.eye(3).to(p) / 3
        top = p - torch.eye(3).to(p)[p.argmax(1)]
        for sentence, wrong in (
            ("sigma enters squared: scale the probe by sqrt(sigma).", mean(sigma**2, h)),
            ("sigma is missing, the weight of each example.", mean(torch.ones_like(sigma), h)),
            ("sigma enters by its square root: it should enter B once.", mean(sigma.sqrt(), h)),
            ("Divide by the number of samples, too.", samples * truth),
            ("That divides by the number of samples twice.", truth / samples),
            ("Divide by n, too: B is a mean over examples.", n * truth),
            ("That divides by n twice.", truth / n),
            ("Draw the labels from y_hat, not uniformly.", mean(sigma, uniform)),
            ("Draw the labels; the most likely one is not a draw.",
             mean(sigma, torch.einsum("ni,nj->nij", top, top))),
            ("Subtract the unit vector of the label: s = y_hat - e.",
             mean(sigma, torch.einsum("ni,nj->nij", p, p))),
        ):  # fmt: skip
            if near(wrong):
                raise Wrong(sentence)
        off = float((got - truth).norm()) / size
        raise Wrong(f"With {samples} draws B is off by a relative error of {off:.2f}; expect 0.02.")
    few = estimate(1)
    if float((few - truth).norm()) < 1e-3 * size:
        raise Wrong("With one draw B is exact: draw labels instead of taking the expectation.")
    close(few.sum(1) + 1, torch.ones(3).to(few), "The row sum of B, plus 1,", rtol=1e-9)
    if float((estimate(1, copies=1000) - truth).norm()) > 0.05 * size:
        raise Wrong(
            "With one draw for each example the expectation is off: average s s^T over the draws, "
            "and do not subtract the mean of the draws themselves."
        )


@exercise("5.5")
def check_repaired(repaired):
    """A dense solve; every mixture of the three mistakes is known."""
    generator = torch.Generator().manual_seed(55)
    n, d1, d2, delta = 12, 3, 5, 0.1
    a, gamma = draw(generator, n, d2), 2 * draw(generator, n, d1)
    sigma, b = 0.1 + draw(generator, n).square(), draw(generator, d1 * d2)

    def solve(power, twice, transposed):
        A = a.T @ a / n + delta * torch.eye(d2).to(a)
        B = gamma.T @ (sigma[:, None] ** power * gamma) / (n * (n**2 if twice else 1))
        B = B + delta * torch.eye(d1).to(a)
        V = b.view(d2, d1).T if transposed else b.view(d1, d2)
        return torch.linalg.solve(torch.kron(B, A), V.flatten())

    weight = "sigma enters B squared, since gamma occurs twice."
    divide = "B is divided by n too often."
    order = "b is stored row by row: V has shape (d1, d2) as it is."
    mistakes = []
    for power in (2, 1, 0.5, 0):
        for twice in (True, False):
            for transposed in (True, False):
                found = [order] * transposed + [divide] * twice
                if power != 1:
                    found.insert(0, weight if power == 2 else "sigma should enter B exactly once.")
                if found:
                    mistakes.append((" ".join(found), solve(power, twice, transposed)))
    got = repaired(a.clone(), gamma.clone(), sigma.clone(), b.clone(), delta)
    compare(got, solve(1, False, False), mistakes, "The solution")


@exercise("5.6")
def check_cost(answer):
    """Ten products of 2 gradients each; (1 + probes) / 2 for KFAC."""
    values = numbers(answer, 4)
    if values[0] == 10:
        raise Wrong("CG: a product costs 2 gradients.")
    rows = (
        ("CG", 20, "From zero, ten steps take ten products of 2 gradients each."),
        (
            "KFAC with all-class probes",
            500.5,
            "Half a gradient for the forward pass, half for each probe.",
        ),
        ("KFAC with four draws", 2.5, "Each draw is a probe with its own backward pass."),
        ("KFAC empirical", 1.0, "One forward pass and one backward pass."),
    )
    for value, (name, truth, hint) in zip(values, rows, strict=True):
        if not abs(value - truth) < 1e-9:
            raise Wrong(f"{name}: {value:.6g} is not right. {hint}")
