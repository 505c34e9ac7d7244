"""Checks of chapter 8, EKFAC, EMA and reuse."""

import torch

from bilevel_lite.exercises import Wrong, compare, draw, exercise, numbers


def _basis(generator, d):
    return torch.linalg.qr(draw(generator, d, d))[0]


@exercise("8.A")
def check_early(answer):
    """The squared weights after 40 updates, from running the recursion on them."""
    (value,) = numbers(answer, 1)
    beta, weights = 0.98, [1.0]
    for _ in range(40):
        weights = [beta * weight for weight in weights] + [1 - beta]
    truth = sum(weight**2 for weight in weights)
    if abs(value - (1 - beta) / (1 + beta)) < 0.002:
        raise Wrong("That is the limit for ever. What does the first estimate weigh after 40?")
    if abs(value - beta**80) < 0.004:
        raise Wrong("That is the first estimate's part alone; (8.5) has a second term.")
    if abs(value - beta**40) < 0.01:
        raise Wrong("That is the first estimate's weight; a variance goes with its square.")
    if abs(value - truth**0.5) < 0.01:
        raise Wrong("That is its root, the standard deviation over nu; the variance is asked for.")
    if abs(value - 100 * truth) < 1:
        raise Wrong("Give a part of one, not per cent.")
    if not abs(value - truth) < 0.005:
        raise Wrong(f"{value:.4g} is not right: put beta = 0.98 and t = 40 into (8.5).")


@exercise("8.B")
def check_who_gains(answer):
    """Section 8.7's run is the judge."""
    told = {
        "heuristic": "It lifts the small eigenvalues and so hides much of the noise: there is "
        "less to average away. Look at the column of the noise.",
        "both": "The noise of one is several times that of the other (the table above); so is what "
        "an average can remove.",
        "none": "It moves slowly enough: section 8.5 found a best memory of 0.9 or more.",
    }
    if not isinstance(answer, str):
        raise Wrong('Answer with one of the strings "heuristic", "full", "both", "none".')
    word = answer.strip().strip("\"'").lower()
    if word in told:
        raise Wrong(told[word])
    if word != "full":
        raise Wrong('Answer with one of "heuristic", "full", "both", "none".')


@exercise("8.1")
def check_memory(answer):
    """Found by running the recursion on weights, not from a formula."""
    values = numbers(answer, 3)
    beta, weight, updates, first = 0.95, 1.0, 0, None
    squares = 1.0  # sum of the squared weights
    while updates < 2000:
        weight, updates = beta * weight, updates + 1
        squares = beta**2 * squares + (1 - beta) ** 2
        if updates == 20:
            after_20 = weight
        if first is None and weight < 0.01:
            first = updates
    if abs(values[0] - (1 - beta) * beta**20) < 1e-3:
        raise Wrong("The first estimate initialises the average: it starts with weight 1.")
    if not abs(values[0] - after_20) < 0.005:
        raise Wrong(f"The weight after 20 updates: {values[0]:.4g} is not right.")
    if values[1] != first:
        raise Wrong(
            f"The number of updates: {values[1]:.6g} is not right; a whole number t with "
            "0.95^t < 0.01, and not yet one update before."
        )
    if abs(values[2] - 1 / (1 - beta)) < 0.5:
        raise Wrong("That is the window; how many estimates have the variance of (8.5)?")
    if not abs(values[2] - 1 / squares) < 0.1:
        raise Wrong(f"The number of independent estimates: {values[2]:.4g} is not right.")


@exercise("8.2")
def check_corrected(corrected_variance):
    """The squared weights, from running the recursion on each estimate."""
    for beta, t in ((0.9, 1), (0.9, 5), (0.5, 3), (0.99, 40), (0.0, 4)):
        weights = torch.zeros(t, dtype=torch.float64)
        for s in range(t):
            weights *= beta
            weights[s] += 1 - beta
        weights /= 1 - beta**t
        uncorrected = beta ** (2 * t) + (1 - beta) / (1 + beta) * (1 - beta ** (2 * t))
        plain = (1 - beta) / (1 + beta) * (1 - beta ** (2 * t))
        truth = weights.square().sum()
        mistakes = [
            ("That is (8.5), where the first estimate initialises.", uncorrected),
            ("That is the variance before the division by 1 - beta^t.", plain),
            ("A variance is divided by the square of 1 - beta^t.", plain / (1 - beta**t)),
            ("That is the limit for many updates.", (1 - beta) / (1 + beta)),
            ("That is the standard deviation: square it.", float(truth) ** 0.5),
        ]
        compare(
            corrected_variance(beta, t),
            truth,
            [(sentence, torch.tensor(wrong, dtype=torch.float64)) for sentence, wrong in mistakes],
            f"The variance for beta = {beta}, t = {t}",
            rtol=1e-6,
        )


@exercise("8.3")
def check_eigenvalues(ekfac_eigenvalues):
    """The diagonal of U^T G U, with G formed from the gradients of the examples."""
    generator = torch.Generator().manual_seed(83)
    for n, d1, d2, P in ((7, 3, 5, 4), (6, 4, 4, 2), (5, 2, 3, 1)):
        a, g = draw(generator, n, d2, P), draw(generator, n, d1, P)
        UA, UB = _basis(generator, d2), _basis(generator, d1)
        gradients = torch.einsum("nct,npt->ncp", g, a)

        def diagonal(rows, UA=UA, UB=UB, shape=(d1, d2), n=n):
            U = torch.kron(UB, UA)
            return (U.T @ (rows.T @ rows / n) @ U).diagonal().view(shape)

        truth = diagonal(gradients.flatten(1))
        x = torch.einsum("cj,nct->njt", UB, g)
        z = torch.einsum("pk,npt->nkt", UA, a)
        early = torch.einsum("njt,nkt->jk", x.square(), z.square()) / n
        products = torch.outer(x.square().sum((0, 2)) / n, z.square().sum((0, 2)) / (n * P))
        compare(
            ekfac_eigenvalues(a.clone(), g.clone(), UA.clone(), UB.clone()),
            truth,
            [
                ("Sum over the positions first, then square.", early),
                ("The gradient sums over positions; it is no mean over them.", truth / P**2),
                ("Divide by n: it is a mean over examples.", n * truth),
                ("Divide by n only once.", truth / n),
                ("Divide by n, not by the number of columns n P.", truth / P),
                ("Square each example, then take the mean; this squares the mean.",
                 n * diagonal(gradients.mean(0).flatten()[None])),
                ("These are KFAC's products of means.", products),
                ("Rotate into the basis with the transposes of UA and UB.",
                 torch.einsum("njt,nkt->njk", torch.einsum("jc,nct->njt", UB, g),
                              torch.einsum("kp,npt->nkt", UA, a)).square().mean(0)),
                ("These are the entries in the original axes: rotate into the basis first.",
                 gradients.square().mean(0)),
            ],
            f"E for n, d1, d2, P = {n}, {d1}, {d2}, {P}",
            rtol=1e-6,
        )  # fmt: skip


@exercise("8.4")
def check_repaired(repaired):
    """A dense solve; every mixture of the three mistakes is known."""
    generator = torch.Generator().manual_seed(84)
    n, d1, d2, delta = 30, 3, 5, 0.04
    gamma, V = draw(generator, n, d1), draw(generator, d1, d2)
    a = draw(generator, n, d2) * (0.2 + gamma[:, :1].square()) * torch.arange(1, d2 + 1)
    gamma = gamma * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    UA = torch.linalg.eigh(a.T @ a / n)[1]
    UB = torch.linalg.eigh(gamma.T @ gamma / n)[1]
    U = torch.kron(UB, UA)
    rows = torch.einsum("ni,nj->nij", gamma, a).flatten(1)
    own = (U.T @ (rows.T @ rows / n) @ U).diagonal()
    products = torch.outer(
        torch.linalg.eigvalsh(gamma.T @ gamma / n), torch.linalg.eigvalsh(a.T @ a / n)
    ).flatten()

    def solve(kfac, forward, root):
        values = (products if kfac else own) + (delta**0.5 if root else delta)
        right = (UB @ V @ UA).flatten() if forward else U.T @ V.flatten()
        return (U @ (right / values)).view(d1, d2)

    truth = torch.linalg.solve(
        U @ torch.diag(own) @ U.T + delta * torch.eye(d1 * d2).to(V), V.flatten()
    ).view(d1, d2)
    told = (
        "The eigenvalues are products of means, as in KFAC; take the mean of the products.",
        "V is rotated into the basis by UB transposed from the left.",
        "Exact damping adds delta itself; the root belongs to the rule with two factors.",
    )
    mistakes = []
    for code in range(1, 8):
        present = [bool(code & 1), bool(code & 2), bool(code & 4)]
        sentence = " ".join(text for text, on in zip(told, present, strict=True) if on)
        mistakes.append((sentence, solve(*present)))
    for text, values in (
        ("E is a mean over the examples: divide by n.", n * own + delta),
        ("Divide E by n only once.", own / n + delta),
    ):
        mistakes.append((text, (U @ (U.T @ V.flatten() / values)).view(d1, d2)))
    mistakes.append(("V' is still in the eigenbasis: rotate it back.",
                     (U.T @ V.flatten() / (own + delta)).view(d1, d2)))  # fmt: skip
    got = repaired(a.clone(), gamma.clone(), V.clone(), delta)
    compare(got, truth, mistakes, "The solution", rtol=1e-6)


@exercise("8.5")
def check_window(answer):
    """The minimum over a fine grid of windows."""
    values = numbers(answer, 2)
    windows = torch.logspace(0, 5, 400_001, dtype=torch.float64)

    def best(s2, d2):
        return float(windows[(s2 / (2 * windows) + d2 * windows**2).argmin()])

    base = best(1.0, 1e-6)
    truths = best(1 / 8, 1e-6) / base, best(1.0, 64e-6) / base
    names = ("A batch 8 times as large", "A drift 8 times as large")
    for value, truth, name in zip(values, truths, names, strict=True):
        if abs(value * truth - 1) < 1e-3:
            raise Wrong(f"{name}: the other way round; does the window grow or shrink?")
        if truth == truths[1] and abs(value - 0.5) < 1e-3:
            raise Wrong(f"{name}: the lag enters (8.6) as a square.")
        if not abs(value / truth - 1) < 0.02:
            raise Wrong(f"{name}: {value:.4g} is not right. The window goes like a cube root.")


@exercise("8.6")
def check_builds(build_indices):
    """A plain loop over drifts, on paths that also turn back."""
    generator = torch.Generator().manual_seed(86)
    for limit, scale in ((0.2, 0.1), (0.5, 0.2), (10.0, 0.1), (0.05, 0.2)):
        start = 3 + draw(generator, 6).abs()
        thetas = [start]
        for _ in range(25):
            thetas.append(thetas[-1] * 1.05 + scale * start.norm() * draw(generator, 6) / 6**0.5)
        got = build_indices([theta.clone() for theta in thetas], limit)
        try:
            got = [int(k) for k in got]
        except (TypeError, ValueError):
            raise Wrong("The answer should be a list of indices.") from None

        def rule(size=lambda k, last: last, since=None, limit=limit, thetas=thetas):
            built = [0]
            for k in range(1, len(thetas)):
                origin = built[-1] if since is None else since(k)
                moved = float((thetas[k] - thetas[origin]).norm())
                if moved > limit * float(thetas[size(k, origin)].norm()):
                    built.append(k)
            return built

        if got == rule():
            continue
        if not got or got[0] != 0:
            raise Wrong("Index 0 is always built; it should come first.")
        if got == [0]:
            raise Wrong("Only index 0 is built: later indices, too, where the drift is too large.")
        if got == list(range(len(thetas))):
            raise Wrong("Factors are built at every index; the limit should decide.")
        if got == rule(since=lambda k: k - 1):
            raise Wrong("That is the step since the last point; measure from the last build.")
        if got == rule(since=lambda k: 0):
            raise Wrong("That is the drift since index 0; measure from the last build.")
        if got == rule(size=lambda k, last: k):
            raise Wrong("Divide by the norm of theta where it was built, not of the new theta.")
        moved = [0]
        for k in range(1, len(thetas)):
            if float((thetas[k] - thetas[moved[-1]]).norm()) > limit:
                moved.append(k)
        if got == moved:
            raise Wrong("The drift is relative: divide by the norm of theta where it was built.")
        raise Wrong(f"With a limit of {limit:g} the first builds should be {rule()[:4]}, not "
                    f"{got[:4]} (of {len(rule())} and {len(got)}).")  # fmt: skip
