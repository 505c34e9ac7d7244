"""Checks of chapter 7, weighted losses."""

import torch
import torch.nn.functional as F

from bilevel_lite.exercises import Wrong, close, draw, exercise, name_mistake, numbers


def _tensors(result, names, what):
    """The answer as a tuple of tensors in float64, one for each name."""
    if not isinstance(result, tuple | list) or len(result) != len(names):
        raise Wrong(f"Return {what}, in this order.")
    result = [_array(value) for value in result]
    for name, value in zip(names, result, strict=True):
        if not isinstance(value, torch.Tensor):
            raise Wrong(f"{name} should be a tensor, got {type(value).__name__}.")
    return [value.detach().cpu().double() for value in result]


def _array(part):
    """A part of an answer as a tensor where it can be one."""
    try:
        return torch.as_tensor(part)
    except (TypeError, ValueError, RuntimeError):
        return part


@exercise("7.A")
def check_half(answer):
    """Weights of one half: the limits of (7.2), for a matrix of norm 1."""
    values, sigma = numbers(answer, 2), 0.5
    found = [abs(sigma ** (2 * power) - sigma) / sigma for power in (1, 0)]
    if all(abs(v - t) <= 1e-6 for v, t in zip(values, (0.25, 0.5), strict=True)):
        raise Wrong("Those are differences; a relative error divides by sigma Omega, 1/2 of Omega.")
    if values == found[::-1]:
        raise Wrong("The two are exchanged: sigma^2 = 1/4 is nearer to 1/2 than 1 is.")
    hints = (
        "The limit is sigma^2 Omega, the truth sigma Omega.",
        "The limit is Omega, the truth sigma Omega.",
    )
    for k, (value, truth, hint) in enumerate(zip(values, found, hints, strict=True)):
        if not abs(value - truth) <= 1e-6:
            raise Wrong(f"Number {k + 1}: {value:.4g} is not right. {hint}")


@exercise("7.B")
def check_knows_labels(answer):
    """Which probes are made of the labels of the data."""
    told = {
        "all classes": "These probes know the labels only through theta, so their size hardly "
        "goes with weights that follow the labels.",
        "drawn": "A drawn label comes from the model's probabilities, not from the data's label.",
        "empirical": None,
    }
    word = answer.strip().lower().replace("-", " ") if isinstance(answer, str) else None
    word = {"all class": "all classes", "exact": "all classes", "mc": "drawn"}.get(word, word)
    if word not in told:
        raise Wrong('Answer with "all classes", "drawn" or "empirical".')
    if told[word]:
        raise Wrong(told[word])


@exercise("7.1")
def check_equal_weights(answer):
    """From the scalar case: G = 1, b = 1, where v and the damping can be read off."""
    values = numbers(answer, 4)
    sigma, tau, found = 0.25, 0.02, []
    for power in (2, 0):  # the right curvature is sigma
        curvature = sigma**power
        found += [sigma / curvature, tau * sigma / curvature]
    hints = (
        "The curvature is sigma^2 where sigma would be right; v is its inverse.",
        "Write (alpha G + tau I) as alpha (G + ...).",
        "The curvature is 1 where sigma would be right.",
        "Write (alpha G + tau I) as alpha (G + ...), with alpha above 1.",
    )
    if all(abs(v - t) <= 1e-6 * t for v, t in zip(values, found[2:] + found[:2], strict=True)):
        raise Wrong("The two rules are swapped: with a weight below 1, sigma^2 is smaller.")
    for k, (value, truth, hint) in enumerate(zip(values, found, hints, strict=True)):
        if not abs(value - truth) <= 1e-6 * truth:
            raise Wrong(f"Number {k + 1}: {value:.6g} is not right. {hint}")


@exercise("7.2")
def check_normalised(normalised_scale):
    """The Hessian of the normalised loss in the outputs, by automatic differentiation."""
    generator = torch.Generator().manual_seed(72)
    n, classes = 6, 3
    logits, sigma = draw(generator, n, classes), 0.2 + 3 * draw(generator, n).square()
    y = torch.randint(classes, (n,), generator=generator)

    def loss(outputs):
        losses = F.cross_entropy(outputs.view(n, classes), y, reduction="none")
        return (sigma * losses).sum() / sigma.sum()

    hessian = torch.autograd.functional.hessian(loss, logits.flatten())
    traces = hessian.diagonal().view(n, classes).sum(1)
    p = logits.softmax(1)
    truth = (n * traces / (1 - p.square().sum(1))).sqrt()  # (1/n) s s^T has the trace of the block
    got = normalised_scale(sigma.clone())
    name_mistake(
        got,
        truth,
        [
            ("B divides by n, the loss does not: multiply by the root of n.",
             (sigma / sigma.sum()).sqrt()),
            ("That is the scale of (7.1): divide by the mean weight.", sigma.sqrt()),
            ("That is what the loss carries; the probe enters B twice.", sigma / sigma.mean()),
            ("That is what the loss carries; the probe enters B twice.", sigma / sigma.sum()),
            ("The mean weight stands under the root, too.", sigma.sqrt() / sigma.mean()),
            ("The sum of the weights stands under the root, too.", sigma.sqrt() / sigma.sum()),
            ("Divide by the mean of the weights, not of their roots.",
             sigma.sqrt() / sigma.sqrt().mean()),
        ],
    )  # fmt: skip
    close(got, truth, "The scale of the probes", 1e-6)


@exercise("7.3")
def check_empirical_factors(empirical_factors):
    """Factors from gradients of single examples, taken one by one."""
    generator = torch.Generator().manual_seed(73)
    n, d1, d2 = 9, 3, 4
    a, gamma = draw(generator, n, d2), draw(generator, n, d1)
    for zero in (False, True):
        sigma = 0.1 + draw(generator, n).square()
        if zero:
            sigma[[2, 5]] = 0.0
        grad = sigma[:, None] * gamma / n
        A, B = _tensors(
            empirical_factors(a.clone(), grad.clone(), sigma.clone()),
            ("A", "B"),
            "two matrices, A, B",
        )
        if A.shape == (d1, d1) and B.shape == (d2, d2):
            raise Wrong("A belongs to the inputs and comes first; they are swapped.")
        name_mistake(
            A,
            a.T @ a / n,
            [
                ("A is the unweighted mean here.", (a.T * sigma) @ a / sigma.sum()),
                ("A is the unweighted mean here.", (a.T * sigma) @ a / n),
                ("Divide A by n.", a.T @ a),
                ("An example of weight zero leaves B; it stays in A.", (a.T * (sigma > 0)) @ a / n),
                ("An example of weight zero leaves B; it stays in A.",
                 (a.T * (sigma > 0)) @ a / int((sigma > 0).sum())),
            ],
        )  # fmt: skip
        close(A, a.T @ a / n, "A", 1e-8)
        if B.isnan().any() or B.isinf().any():
            raise Wrong("B holds NaN or infinity where a weight is zero: 0 / 0.")

        def moment(power, scale=1.0, sigma=sigma):
            weight = torch.where(sigma > 0, sigma**power, 0.0)
            return scale * (gamma.T * weight) @ gamma / n

        name_mistake(
            B,
            moment(1),
            [
                ("grad carries 1/n, so grad.T @ grad carries it twice; and sigma is squared.",
                 moment(2, 1 / n)),
                ("sigma enters B squared: grad carries it, and occurs twice.", moment(2)),
                ("sigma enters B squared: grad carries it, and occurs twice.",
                 moment(2, 1 / n**2)),
                ("sigma is gone: divide grad by its root, not by sigma.", moment(0)),
                ("sigma is gone, and n is wrong too.", moment(0, 1 / n**2)),
                ("sigma enters to the power 3: divide by the root instead.", moment(3)),
                ("grad carries 1/n, so grad.T @ grad carries it twice: multiply by n.",
                 moment(1, 1 / n)),
                ("B is too small by n^2: grad carries 1/n.", moment(1, 1 / n**2)),
                ("B is too large by n: divide by n once.", moment(1, n)),
                ("sigma enters B squared, and n^2 is once too much: n grad.T @ grad has the right "
                 "n.", moment(2, n)),
                ("The mean goes over all n examples, also over those of weight zero.",
                 moment(1, n / max(1, int((sigma > 0).sum())))),
            ],
        )  # fmt: skip
        close(B, moment(1), "B", 1e-8)


@exercise("7.4")
def check_class_weights(repaired):
    """The expectation, within the noise of many draws."""
    generator = torch.Generator().manual_seed(74)
    n, classes, copies = 4, 3, 20_000
    logits = 1.2 * draw(generator, n, classes)
    y = torch.tensor([0, 1, 2, 0])
    weight = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    p = logits.softmax(1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    deviation = p[:, None, :] - torch.eye(classes, dtype=torch.float64)
    per_label = torch.einsum("nkc,nkd->nkcd", deviation, deviation)
    s = repaired(
        logits.repeat(copies, 1), y.repeat(copies), weight.clone(),
        torch.Generator().manual_seed(7),
    )  # fmt: skip
    if not isinstance(s, torch.Tensor) or s.shape != (n * copies, classes):
        raise Wrong(f"The probes have shape {tuple(getattr(s, 'shape', ()))}, expected (n, C).")
    s = s.detach().double().view(copies, n, classes)
    got = torch.einsum("mnc,mnd->ncd", s, s) / copies

    def near(matrix):
        return float((got - matrix).norm()) <= 0.03 * float(matrix.norm())

    own = weight[y][:, None, None]
    fixed = per_label[torch.arange(n), y]
    for sentence, wrong in (
        ("The weight is still that of the drawn label. The loss of example i is weighted by its "
         "own label.", torch.einsum("k,nk,nkcd->ncd", weight, p, per_label)),
        ("The weight is that of the drawn label, and squared.",
         torch.einsum("k,nk,nkcd->ncd", weight**2, p, per_label)),
        ("The weight is now the right one, but squared: the probe needs its root.", own**2 * h),
        ("The weight is gone altogether.", h),
        ("The label in the probe must be drawn; only the weight belongs to y.", own * fixed),
        ("Labels are not drawn, and the weight is squared.", own**2 * fixed),
        ("The mean over the classes is one weight for all examples; it should be that of y.",
         (p @ weight)[:, None, None] * h),
        ("The root of the root: one is enough.", own.sqrt() * h),
    ):  # fmt: skip
        if near(wrong):
            raise Wrong(sentence)
    if not near(own * h):
        off = float((got - own * h).norm() / (own * h).norm())
        raise Wrong(f"With many draws the second moment is off by {off:.2f}; expect 0.01.")


@exercise("7.5")
def check_weighted_is_worse(weighted_is_worse):
    """Both relative errors, from the matrices themselves."""
    answer = weighted_is_worse() if callable(weighted_is_worse) else weighted_is_worse
    if isinstance(answer, tuple | list):  # of tensors, arrays or nested lists
        answer = [_array(part) for part in answer]
    a, omega, sigma = _tensors(answer, ("a", "omega", "sigma"), "a, omega, sigma")
    if a.dim() != 2 or a.shape[1] != 2 or not omega.shape == sigma.shape == a.shape[:1]:
        raise Wrong(
            f"The shapes are {tuple(a.shape)}, {tuple(omega.shape)}, {tuple(sigma.shape)}; "
            "expected (n, 2), (n,), (n,)."
        )
    for name, value in (("omega", omega), ("sigma", sigma)):
        if not bool(((value >= 0.1 - 1e-6) & (value <= 10 + 1e-5)).all()):
            raise Wrong(f"{name} should lie between 0.1 and 10.")
    if not float(a.norm()) > 0 or not bool(torch.isfinite(a).all()):
        raise Wrong("The inputs a should be finite and not all zero.")
    n, product = len(a), sigma * omega
    block, B = (a.T * product) @ a / n, product.mean()
    plain = B * a.T @ a / n
    weighted = B * (a.T * sigma) @ a / sigma.sum()
    errors = [float((guess - block).norm() / block.norm()) for guess in (plain, weighted)]
    if errors[0] > 1e-10 and errors[1] < 1e-10:
        raise Wrong("It is the other way round: here A_sigma is exact and A is not.")
    if not errors[0] < 1e-10:
        raise Wrong(
            f"The unweighted A is off by {errors[0]:.2g}: sigma_i omega_i must not depend on a_i."
        )
    if not errors[1] >= 0.9:
        raise Wrong(
            f"A_sigma is off by {errors[1]:.2g} only: the weights must depend on a_i more strongly."
        )


@exercise("7.6")
def check_best_input_factor(best_input_factor):
    """Linear least squares on the Kronecker products, written out."""
    generator = torch.Generator().manual_seed(76)
    for n, d1, d2 in ((8, 3, 2), (15, 2, 4)):
        a, gamma = draw(generator, n, d2), draw(generator, n, d1)
        sigma = 0.1 + draw(generator, n).square()
        root = draw(generator, d1, d1 + 2)
        B = root @ root.T + 0.1 * torch.eye(d1, dtype=torch.float64)
        block = sum(
            s * torch.kron(torch.outer(g, g), torch.outer(x, x))
            for s, g, x in zip(sigma, gamma, a, strict=True)
        ) / n  # fmt: skip
        basis = []
        for k in range(d2 * d2):
            unit = torch.zeros(d2 * d2, dtype=torch.float64)
            unit[k] = 1.0
            basis.append(torch.kron(B, unit.view(d2, d2)).flatten())
        solution = torch.linalg.lstsq(torch.stack(basis, 1), block.flatten()[:, None]).solution
        truth = solution.view(d2, d2)
        got = best_input_factor(a.clone(), gamma.clone(), sigma.clone(), B.clone())

        def total(weight, a=a, n=n):
            return (a.T * weight) @ a / n

        along = ((gamma @ B) * gamma).sum(1)
        size, square = gamma.square().sum(1), B.square().sum()
        inverse = (torch.linalg.solve(B, gamma.T).T * gamma).sum(1)
        name_mistake(
            got,
            truth,
            [
                ("That is the unweighted A of KFAC.", total(torch.ones_like(sigma))),
                ("That is A_sigma: its weights do not know B.", total(sigma / sigma.mean())),
                ("Divide by the squared Frobenius norm of B.", total(sigma * along)),
                ("Divide by the norm of B squared, not by the norm.",
                 total(sigma * along) / square.sqrt()),
                ("sigma is missing.", total(along) / square),
                ("sigma enters once.", total(sigma**2 * along) / square),
                ("The weights need gamma^T B gamma, not the squared length of gamma.",
                 total(sigma * size) / square),
                ("Divide by n: the block is a mean.", n * truth),
                ("The weights are right, but they are no probabilities: divide by n times the "
                 "squared Frobenius norm of B, not by their sum.", total(along * sigma) / (
                     along * sigma).mean()),
                ("B enters by gamma^T B gamma, not by its inverse.", total(sigma * inverse) / d1),
            ],
        )  # fmt: skip
        close(got, truth, "The factor A", 1e-7)
