"""Checks of chapter 6, damping."""

from contextlib import contextmanager

import torch

from bilevel_lite.exercises import Wrong, compare, draw, exercise, numbers


def _positive(generator, d):
    """A random symmetric positive definite matrix, shape (d, d)."""
    root = draw(generator, d + 3, d)
    return root.T @ root / d


def _eye(matrix):
    return torch.eye(len(matrix), dtype=matrix.dtype)


def _name(answer, choices, how):
    """The answer as one of the choices, whatever its case; a sentence if it is none of them."""
    word = answer.strip().lower() if isinstance(answer, str) else None
    if word not in choices:
        raise Wrong(f"Answer with {how}.")
    return word


@exercise("6.A")
def check_spring(answer):
    """Which problem has the damped hypergradient: judged by finite differences in the chapter."""
    word = _name(answer, tuple("abcd"), 'one letter, "a", "b", "c" or "d"')
    told = {
        "a": "A penalty that pulls to 0 moves theta*, so b and J are taken somewhere else.",
        "c": "The minimiser of this one is theta*(lambda) for every lambda, as without any term: "
        "its hypergradient is the undamped one.",
        "d": "There is one: the term must leave theta*(lambda_0) and J as they are.",
    }
    if word in told:
        raise Wrong(told[word])


@exercise("6.B")
def check_scale(answer):
    """Which rule sees the scale of a factor: by its damped eigenvalues."""
    rules = ("full", "heuristic", "factored")
    word = _name(
        "full" if answer == "exact" else answer, rules, '"full", "heuristic" or "factored"'
    )
    xi, zeta, tau = torch.tensor([1.0, 0.2]), torch.tensor([0.5, 0.1]), 0.1

    def damped(xi, zeta):
        if word == "full":
            return torch.outer(zeta, xi) + tau
        pi = (xi.mean() / zeta.mean()).sqrt() if word == "heuristic" else 1.0
        return torch.outer(zeta + tau**0.5 / pi, xi + pi * tau**0.5)

    if torch.allclose(damped(100 * xi, zeta / 100), damped(xi, zeta)):
        why = {
            "full": "Full damping sees only the products of eigenvalues, which stay.",
            "heuristic": "Under this rule pi grows by 100 with A, and the dampings go with it.",
        }
        raise Wrong(why[word])


@exercise("6.1")
def check_limits(answer):
    """The filter by its formula; the limits from solves with a very large damping."""
    values = numbers(answer, 3)
    mu = torch.tensor([1.0, 100.0], dtype=torch.float64)
    b = torch.tensor([3.0, 4.0], dtype=torch.float64)
    newton, far = b / mu, b / (mu + 1e9)
    cosine = float(far @ newton / (far.norm() * newton.norm()))
    rows = (
        ("The fraction", 0.8, "It is mu / (mu + delta)."),
        ("The limit of delta times the length", 1e9 * float(far.norm()), "delta v goes to b."),
        ("The limit of the cosine", cosine, "v turns to the direction of b; H^-1 b = (3, 0.04)."),
    )
    if abs(values[0] - 0.2) < 1e-6:
        raise Wrong("The fraction: 0.2 is what damping removes; what passes is mu / (mu + delta).")
    for value, (name, truth, hint) in zip(values, rows, strict=True):
        if not abs(value - truth) < 2e-3 * truth:
            raise Wrong(f"{name}: {value:.4g} is not right. {hint}")


@exercise("6.2")
def check_best_pi(best_pi):
    """The bound itself, from dense Kronecker products, is smallest at pi."""
    generator = torch.Generator().manual_seed(62)
    for d1, d2 in ((3, 7), (6, 2), (4, 4)):
        A, B = 5 * _positive(generator, d2), 0.4 * _positive(generator, d1)
        on_a = torch.kron(_eye(B), A).norm()
        on_b = torch.kron(B, _eye(A)).norm()
        pi = (on_a / on_b).sqrt()
        plain = A.norm() / B.norm()
        compare(
            best_pi(A.clone(), B.clone()),
            pi,
            [
                ("That is the trace norm's pi, (6.7); take the Frobenius norm of each factor.",
                 ((A.trace() / d2) / (B.trace() / d1)).sqrt()),
                ("That is pi squared.", pi**2),
                ("That is 1 / pi: the derivative of pi b + a / pi is b - a / pi^2.", 1 / pi),
                ("The norms of the identities are missing: |I| = sqrt(d).", plain.sqrt()),
                ("The norm of the identity is sqrt(d), not d.", (plain * d1 / d2).sqrt()),
                ("The identities are exchanged: A stands next to I of size d1.",
                 (plain * (d2 / d1) ** 0.5).sqrt()),
            ],
            f"pi for A of size {d2} and B of size {d1}",
            1e-6,  # a numerical minimiser is right, too
        )  # fmt: skip


@contextmanager
def _counted(names, counts):
    """Count the calls of functions of torch.linalg, and note the largest matrix."""
    originals = {name: getattr(torch.linalg, name) for name in names}

    def counting(name):
        def call(*args, **kwargs):
            counts[name] = counts.get(name, 0) + 1
            counts["largest"] = max(counts.get("largest", 0), len(args[0]) if args else 0)
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(torch.linalg, name, counting(name))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch.linalg, name, original)


@exercise("6.3")
def check_damping_path(damping_path):
    """Dense solves, one for each damping; and the factorisations counted."""
    generator = torch.Generator().manual_seed(63)
    names = ("eigh", "eigvalsh", "eig", "svd", "solve", "inv", "cholesky", "solve_ex", "inv_ex")
    for d1, d2 in ((3, 5), (4, 2)):
        A, B, V = _positive(generator, d2), 2 * _positive(generator, d1), draw(generator, d1, d2)
        taus, counts = [1e-3, 0.2, 1.0, 30.0], {}
        with _counted(names, counts):
            got = damping_path(A.clone(), B.clone(), V.clone(), list(taus))

        def solve(matrix, V=V):
            return torch.linalg.solve(matrix, V.flatten()).view_as(V)

        block = torch.kron(B, A)
        truth = torch.stack([solve(block + tau * _eye(block)) for tau in taus])
        roots = torch.stack([
            solve(torch.kron(B + tau**0.5 * _eye(B), A + tau**0.5 * _eye(A))) for tau in taus
        ])  # fmt: skip
        both = torch.stack([
            solve(torch.kron(B + tau * _eye(B), A + tau * _eye(A))) for tau in taus
        ])  # fmt: skip
        (xi, UA), (zeta, UB) = torch.linalg.eigh(A), torch.linalg.eigh(B)
        inside = UB.T @ V @ UA
        unrotated = torch.stack([inside / (torch.outer(zeta, xi) + tau) for tau in taus])
        one_sided = torch.stack([
            UB @ V @ UA / (torch.outer(zeta, xi) + tau) for tau in taus
        ])  # fmt: skip
        wrong_way = torch.stack([UB @ v @ UA for v in unrotated])
        not_turned = torch.stack([
            UB @ (V / (torch.outer(zeta, xi) + tau)) @ UA.T for tau in taus
        ])  # fmt: skip
        if isinstance(got, (list, tuple)):
            got = torch.stack([torch.as_tensor(v) for v in got])
        compare(
            got,
            truth,
            [
                ("That is the factored rule: its extra part is missing in (B x A + tau I).", roots),
                ("tau was added to both factors; add it to the products zeta_j xi_k.", both),
                ("tau is missing.", solve(block).expand_as(truth)),
                ("Rotate back: multiply by U_B from the left and U_A^T from the right.", unrotated),
                ("Into the eigenbasis goes U_B^T V U_A; back goes U_B (...) U_A^T.", wrong_way),
                ("Into the eigenbasis goes U_B^T V U_A; back goes U_B (...) U_A^T.", one_sided),
                ("V is not in the eigenbasis yet when you divide: take U_B^T V U_A.", not_turned),
            ],
            f"The path for V of shape {d1} x {d2}",
        )
        largest = counts.pop("largest", 0)
        if largest > max(d1, d2):
            raise Wrong(
                f"The numbers are right, but a matrix of size {largest} was factorised; the "
                f"factors have the sizes {d2} and {d1}, and the Kronecker product is never needed."
            )
        work = {name: times for name, times in counts.items() if name != "eigh"}
        if work or counts.get("eigh", 0) > 2:
            said = ", ".join(f"{times} x {name}" for name, times in counts.items())
            raise Wrong(
                f"The numbers are right, but it took {said} for {len(taus)} dampings; one "
                "eigendecomposition of A and one of B suffice for all."
            )


@exercise("6.4")
def check_repaired(repaired):
    """A dense solve with the factors damped by tau = delta + 2 l2 under the heuristic rule."""
    generator = torch.Generator().manual_seed(64)
    for d1, d2, delta, l2 in ((3, 5, 0.2, 0.07), (4, 3, 1e-3, 0.3)):
        A, B = 3 * _positive(generator, d2), 0.5 * _positive(generator, d1)
        V = draw(generator, d1, d2)

        def solve(tau, power, in_factors=0.0, split=1, A=A, B=B, V=V):
            A, B = A + in_factors * _eye(A), B + in_factors * _eye(B)
            pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt() ** split
            on_a, on_b = pi * tau**power, tau**power / pi
            matrix = torch.kron(B + on_b * _eye(B), A + on_a * _eye(A))
            return torch.linalg.solve(matrix, V.flatten()).view_as(V)

        block = torch.kron(B, A)
        full = torch.linalg.solve(block + (delta + 2 * l2) * _eye(block), V.flatten()).view_as(V)
        roots = (delta**0.5 + (2 * l2) ** 0.5) ** 2
        root = "The product of the two dampings should be tau: each factor gets its square root."
        twice = "The penalty's second derivative is 2 l2, not l2."
        inside = "The penalty is no part of A or B: it adds 2 l2 I to the block, so it joins tau."
        compare(
            repaired(A.clone(), B.clone(), V.clone(), delta, l2),
            solve(delta + 2 * l2, 0.5),
            [
                (f"{inside} And {root[0].lower()}{root[1:]}", solve(delta, 1, l2)),
                (inside, solve(delta, 0.5, l2)),
                (inside, solve(delta, 0.5, 2 * l2)),
                (inside, solve(delta, 0.5, l2**0.5)),
                (inside, solve(delta, 0.5, (2 * l2) ** 0.5)),
                (f"{twice} And {root[0].lower()}{root[1:]}", solve(delta + l2, 1)),
                (twice, solve(delta + l2, 0.5)),
                (root, solve(delta + 2 * l2, 1)),
                ("The penalty is counted twice, in the factors and in tau.",
                 solve(delta + 2 * l2, 0.5, l2)),
                ("The penalty is missing: it adds 2 l2 I to the curvature.", solve(delta, 0.5)),
                ("pi is the wrong way round: it multiplies the damping of A and divides that of B.",
                 solve(delta + 2 * l2, 0.5, split=-1)),
                ("That is factored damping: pi is missing.", solve(delta + 2 * l2, 0.5, split=0)),
                ("That is full damping of the block; the task is the heuristic rule.", full),
                ("The root of a sum is not the sum of the roots: tau = delta + 2 l2 comes first.",
                 solve(roots, 0.5)),
            ],
            f"The solution for V of shape {d1} x {d2}",
        )  # fmt: skip


@exercise("6.5")
def check_broken_rule(answer):
    """Both rules by dense solves with the student's block."""
    if callable(answer):
        answer = answer()
    try:
        A, B, V = [torch.as_tensor(part, dtype=torch.float64).cpu() for part in answer[:3]]
        tau = float(answer[3])
    except (TypeError, ValueError, IndexError, RuntimeError):
        raise Wrong("The answer should be (A, B, V, tau): three matrices and a number.") from None
    for name, F in (("A", A), ("B", B)):
        if F.dim() != 2 or F.shape[0] != F.shape[1] or not 1 <= len(F) <= 10:
            raise Wrong(f"{name} has shape {tuple(F.shape)}; it should be square, at most 10 x 10.")
        if not torch.allclose(F, F.T, atol=1e-12):
            raise Wrong(f"{name} is not symmetric.")
        if float(torch.linalg.eigvalsh(F)[0]) < -1e-6 * float(F.abs().max()):  # float32 is fine
            raise Wrong(f"{name} has a negative eigenvalue.")
        if float(F.trace()) <= 0:
            raise Wrong(f"{name} is zero; then every rule gives V / tau.")
    if V.shape != (len(B), len(A)):
        raise Wrong(f"V has shape {tuple(V.shape)}, expected {(len(B), len(A))}.")
    if not (tau > 0 and float(V.norm()) > 0):
        raise Wrong("tau should be positive, and V not zero.")
    pi = ((A.trace() / len(A)) / (B.trace() / len(B))).sqrt()
    exact = torch.kron(B, A) + tau * torch.eye(len(A) * len(B), dtype=A.dtype)
    heuristic = torch.kron(B + tau**0.5 / pi * _eye(B), A + pi * tau**0.5 * _eye(A))
    u, v = [torch.linalg.solve(matrix, V.flatten()) for matrix in (exact, heuristic)]
    cosine = float(u @ v / (u.norm() * v.norm()))
    if not cosine < 0.1:
        hint = (
            "Let one entry of V meet a zero eigenvalue of one factor only, another one of both, "
            "and give the two different sizes: with 1 in the one, try tau^(1/4) in the other."
        )
        if cosine > 0.999:
            hint = "The extra part of (6.6) must differ between directions that V contains."
        raise Wrong(f"The cosine is {cosine:.3f}, not below 0.1. {hint}")


@exercise("6.6")
def check_choose_damping(choose_damping):
    """The quadratic of the second batch at each damping's solution, by dense solves."""
    generator = torch.Generator().manual_seed(66)
    d, dampings = 8, [10.0 ** (k / 2) for k in range(-8, 5)]
    scales = torch.logspace(0, -2, d, dtype=torch.float64)
    answers, truths, scores = [], [], {}
    for n in (9, 12, 40):
        x_1, x_2 = draw(generator, n, d) * scales.sqrt(), draw(generator, n, d) * scales.sqrt()
        H_1, H_2, b = x_1.T @ x_1 / n, x_2.T @ x_2 / n, scales.sqrt() * draw(generator, d)
        got = choose_damping(H_1.clone(), H_2.clone(), b.clone(), list(dampings))
        try:
            got = float(got)
        except (TypeError, ValueError, RuntimeError):
            raise Wrong("The function should return one number, a damping of the list.") from None
        near = [t for t in dampings if abs(got - t) <= 1e-6 * t]  # a float32 is near, not equal
        if not near:
            raise Wrong(f"{got:g} is not in the list of dampings; return the damping itself.")
        answers.append(near[0])
        path = torch.stack([torch.linalg.solve(H_1 + t * _eye(H_1), b) for t in dampings])
        swapped = torch.stack([torch.linalg.solve(H_2 + t * _eye(H_2), b) for t in dampings])
        along, own, other = path @ b, (path @ H_1 * path).sum(1), (path @ H_2 * path).sum(1)
        across = (swapped @ H_1 * swapped).sum(1) / 2 - swapped @ b
        truths.append(dampings[int((other / 2 - along).argmin())])
        for name, score in {
            "The batch that solves must not judge: use H_2 in q.": own / 2 - along,
            "That is the damping with the largest q.": along - other / 2,
            "The factor 1/2 of the quadratic is missing.": other - along,
            "That minimises the residual with H_2, whose mean is not smallest at H^-1 b.": (
                (path @ H_2 - b).norm(dim=1)
            ),
            "That minimises the distance to H_2^-1 b, which is as noisy as v and far too long; "
            "q needs no solve with H_2.": (path - torch.linalg.solve(H_2, b)).norm(dim=1),
            "The batches are exchanged: solve with H_1 and judge with H_2.": across,
            "That is symmetric in the two batches: H_1 only solves, H_2 only judges.": (
                across + other / 2 - along
            ),
        }.items():
            scores.setdefault(name, []).append(dampings[int(score.argmin())])
    if answers == truths:
        return
    if set(answers) == {dampings[0]}:
        raise Wrong(
            "You chose the smallest damping each time. That is what happens when the batch that "
            "solves also judges: solve with H_1 alone, and use H_2 in q."
        )
    for sentence, chosen in scores.items():
        if answers == chosen:
            raise Wrong(sentence)
    raise Wrong(
        f"For three problems you chose {', '.join(f'{t:.3g}' for t in answers)}; that is not where "
        "q(v) = v^T H_2 v / 2 - b^T v is smallest."
    )
