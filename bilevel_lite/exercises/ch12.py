"""Checks of chapter 12, hypercleaning with BERT."""

import math
from itertools import product

import torch

from bilevel_lite import data
from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers


@exercise("12.A")
def check_padding(answer):
    """What padding does to h, by CG and by KFAC; of 100 rows of a text, those without a token."""
    words = ("longer", "shorter", "same")
    if not isinstance(answer, list | tuple) or len(answer) != 3:
        raise Wrong('Give two words and a number, as in ("longer", "shorter", 0.5).')
    cg, kfac, share = answer
    if cg not in words or kfac not in words:
        raise Wrong(f"The first two are words, each one of {', '.join(words)}.")
    if cg != "same":
        raise Wrong("CG knows products with G only, and no output depends on padding.")
    if kfac == "same":
        raise Wrong("KFAC inverts A, and padding has activations, too.")
    if kfac == "shorter":
        raise Wrong("Rows that are much alike fill few directions of the mean A and shrink it in "
                    "all others; h has its inverse.")  # fmt: skip
    (share,) = numbers(share, 1)
    near(
        share, 1 - 13.5 / 100, "The share",
        [(13.5 / 100, "that is the share of tokens."),
         (86.5, "give a number between 0 and 1."),
         ((100 - 13.5) / 13.5, "that is the number of padding rows for each token.")],
        "A text has 100 rows, 13.5 of them tokens.", 0.012,
    )  # fmt: skip


@exercise("12.B")
def check_points(answer):
    """What one text of 60 is worth, and the standard error of a share of them."""
    one, error = numbers(answer, 2)
    near(
        one, 100 / 60, "One text",
        [(1 / 60, "give points, of which 100 are the whole."),
         (100 / 120, "that is of all 120; 60 choose."),
         (60 / 100, "that is how many texts a point is.")],
        "60 texts are 100 points.", 0.02,
    )  # fmt: skip
    near(
        error, 100 * (0.8 * 0.2 / 60) ** 0.5, "The standard error",
        [(100 * 0.8 * 0.2 / 60, "that is the variance, of a share, times 100."),
         (100 * 0.8 * 0.2 / 60**0.5, "take the root of 0.8 * 0.2, too."),
         (100 * (0.8 / 60) ** 0.5, "a share p has the variance p (1 - p) / n."),
         (100 * (0.8 * 0.2 / 120) ** 0.5, "that is of all 120; 60 choose."),
         ((0.8 * 0.2 / 60) ** 0.5, "give points, of which 100 are the whole.")],
        "A share p of n texts has the standard error sqrt(p (1 - p) / n).", 0.02,
    )  # fmt: skip


@exercise("12.1")
def check_vote(vote):
    """By the package's votes, and by many draws of it."""
    generator = torch.Generator().manual_seed(121)
    for n, rules, C in ((40, 3, 4), (25, 5, 3), (12, 2, 6)):
        weak = torch.randint(-1, C, (n, rules), generator=generator)
        weak[:3] = -1
        y = torch.randint(C, (n,), generator=generator)
        counts = (weak[..., None] == torch.arange(C)).sum(1)
        tied = counts == counts.max(1, keepdim=True).values
        right = tied[torch.arange(n), y]
        truth = (right / tied.sum(1)).double().mean()
        draws = [data.majority(weak, C, "drawn", generator=generator) for _ in range(400)]
        seen = torch.stack([(label == y).double().mean() for label in draws]).mean()
        assert abs(float(seen - truth)) < 0.04  # this check's own formula
        answer = vote(weak.clone(), C, y.clone())
        if not isinstance(answer, tuple | list) or len(answer) != 2:
            raise Wrong("Return two things: the labels by the first rule, shape (n,), and the "
                        "expected accuracy if ties are drawn, a number.")  # fmt: skip
        labels, accuracy = answer
        first = data.majority(weak, C, "first")
        last = C - 1 - counts.flip(1).argmax(1)
        plus = (weak + 1)[..., None] == torch.arange(C + 1)
        compare(
            labels, first.double(),
            [("Of equals the first class in the list wins, not the last.", last.double()),
             ("-1 is no class: a rule that abstains has no vote.",
              (plus.sum(1).argmax(1) - 1).double()),
             ("A text without votes belongs to the first class, by this rule.",
              first.masked_fill((weak < 0).all(1), -1).double())],
            "The labels", 1e-9,
        )  # fmt: skip
        covered = (weak >= 0).any(1)
        compare(
            torch.as_tensor(accuracy, dtype=torch.float64), truth,
            [("That is the accuracy of the first rule: ties are drawn here.",
              (first == y).double().mean()),
             ("A tie that holds the true class is right once in so many, not always.",
              right.double().mean()),
             ("Texts without votes count, too: a tie of all classes.",
              (right / tied.sum(1)).double()[covered].mean()),
             ("Texts without votes are right once in C, not never.",
              (right & covered).div(tied.sum(1)).double().mean())],
            "The expected accuracy", 1e-6,
        )  # fmt: skip


@exercise("12.2")
def check_factors(factors):
    """By loops over texts and tokens."""
    generator = torch.Generator().manual_seed(122)
    for n, most, d2, d1 in ((4, 5, 3, 2), (3, 7, 2, 4)):
        lengths = torch.randint(1, most, (n,), generator=generator)
        lengths[0] = most
        mask = torch.arange(most) < lengths[:, None]
        a, gamma = draw(generator, n, most, d2), draw(generator, n, most, d1)
        gamma = gamma * mask[..., None]  # no loss depends on padding
        A, B = torch.zeros(d2, d2).double(), torch.zeros(d1, d1).double()
        for i in range(n):
            for q in range(int(lengths[i])):
                A += torch.outer(a[i, q], a[i, q]) / int(lengths.sum())
                B += torch.outer(gamma[i, q], gamma[i, q]) / n
        got = factors(a.clone(), gamma.clone(), mask.clone())
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("Return two matrices, A and B.")
        tokens = int(lengths.sum())
        every = torch.einsum("iqj,iqk->jk", a, a)
        summed = (a * mask[..., None]).sum(1)
        what = f"With texts of {lengths.tolist()} tokens"
        compare(
            got[0], A,
            [("Padding is in it: take the rows of the mask only.", every / (n * most)),
             ("Padding is in the sum; only the count is right.", every / tokens),
             ("A is a mean over tokens: divide by their number, not by n P.",
              A * tokens / (n * most)),
             ("A is a mean over tokens: divide by their number, not by n.", A * tokens / n),
             ("Products of different tokens are in it: sum after the outer products.",
              summed.T @ summed / tokens)],
            f"{what} A", 1e-9,
        )  # fmt: skip
        together = gamma.sum(1)
        compare(
            got[1], B,
            [("B is a sum over the tokens of a text: divide by n.", B * n / tokens),
             ("B is a sum over the tokens of a text: divide by n.", B / most),
             ("B is a mean over the texts: divide by n.", B * n),
             ("Products of different tokens are in it: sum after the outer products.",
              together.T @ together / n)],
            f"{what} B", 1e-9,
        )  # fmt: skip


@exercise("12.3")
def check_sizes(answer):
    """Counted by hand."""
    rows, entries, parameters, dense = numbers(answer, 4)
    width, wide = 384, 1536
    maps = [(width, width)] * 4 + [(width, wide), (wide, width)]  # inputs, outputs
    count = sum((i + 1) * o for i, o in maps)
    both = sum((i + 1) ** 2 + o**2 for i, o in maps)
    gib = (max((i + 1) * o for i, o in maps)) ** 2 * 4 / 2**30
    near(
        rows, wide + 1, "The rows of A",
        [(wide, "a 1 for the bias is appended to a."), (width + 1, "its inputs are 1,536."),
         (width, "that is B.")],
        "A is as large as the map's input, and one for the bias.", 1e-9,
    )  # fmt: skip
    near(
        entries, both, "The entries of all factors",
        [(sum(i**2 + o**2 for i, o in maps), "a 1 for the bias is appended to each a."),
         (sum((i + 1) ** 2 for i, _ in maps), "that is A alone."),
         (sum(o**2 for _, o in maps), "that is B alone."),
         (2 * (width + 1) ** 2 + 2 * width**2 + (wide + 1) ** 2 + wide**2,
          "four maps are 384 by 384.")],
        "Add (inputs + 1)^2 and outputs^2 over the six maps.", 1e-9,
    )  # fmt: skip
    near(
        parameters, count, "The parameters",
        [(sum(i * o for i, o in maps), "each map has a bias, too."),
         (count + 4 * width, "LayerNorm's are none of the six maps'.")],
        "Add (inputs + 1) * outputs over the six maps.", 1e-9,
    )  # fmt: skip
    near(
        dense, gib, "The dense block",
        [(gib / 4, "a number in float32 takes four bytes."), (2 * gib, "that is float64."),
         (((wide + 1) * width) ** 2 * 4 / 2**30, "that is the map back, from 1,536 to 384."),
         (count**2 * 4 / 2**30, "that is the block of all six together."),
         (gib * 2**30 / 1e9, "a GiB is 2^30 bytes."),
         (gib * (width / (width + 1)) ** 2, "the bias is a parameter, too.")],
        "It is a square matrix with a row for each parameter of the map.", 7e-4,
    )  # fmt: skip


@exercise("12.4")
def check_head(head_block):
    """By the Jacobian of the head's outputs, taken by automatic differentiation."""
    generator = torch.Generator().manual_seed(124)
    for n, most, width, C in ((3, 4, 2, 3), (5, 3, 3, 2)):
        lengths = torch.randint(1, most, (n,), generator=generator)
        lengths[0] = most
        mask = torch.arange(most) < lengths[:, None]
        a, root = draw(generator, n, most, width), draw(generator, n, C, C)
        omega = root @ root.mT
        share = mask.double() / lengths[:, None]
        means = (share[..., None] * a).sum(1)

        def outputs(W, means=means):
            return means @ W.T

        Z = torch.autograd.functional.jacobian(outputs, draw(generator, C, width))
        Z = Z.reshape(n, C, C * width)
        truth = (Z.mT @ omega @ Z).mean(0)

        def block(moments, omega=omega):
            return torch.stack([torch.kron(o, m) for o, m in zip(omega, moments, strict=True)])

        moments = means[..., None] * means[:, None]
        tokens = torch.einsum("iq,iqj,iqk->ijk", share, a, a)
        plain = a.mean(1)
        swapped = torch.stack([torch.kron(m, o) for o, m in zip(omega, moments, strict=True)])
        compare(
            head_block(a.clone(), mask.clone(), omega.clone()), truth,
            [("The mean over a text's tokens comes before the outer product: the head meets the "
              "mean alone.", block(tokens).mean(0)),
             ("Padding is in the mean of the tokens.",
              block(plain[..., None] * plain[:, None]).mean(0)),
             ("The mean over the texts is missing: divide by n.", truth * n),
             ("vec(V) goes row by row: kron(omega, m m^T), not the other way round.",
              swapped.mean(0)),
             ("KFAC takes the mean of both factors apart; the exact block takes that of their "
              "Kronecker products.", torch.kron(omega.mean(0), moments.mean(0))),
             ("That is KFAC of the head that meets every token, (12.2). W acts on a text once, on "
              "its mean.", torch.kron((omega / lengths[:, None, None]).mean(0),
                                      a[mask].T @ a[mask] / lengths.sum())),
             ("The head meets the mean of a text's tokens, not their sum.",
              block(moments * lengths[:, None, None] ** 2).mean(0))],
            f"With {n} texts the block", 1e-9,
        )  # fmt: skip


@exercise("12.5")
def check_pool(pool):
    """Padded, trimmed, alone and beside other texts, a text has one and the same mean."""
    generator = torch.Generator().manual_seed(125)
    width, query = 3, draw(generator, 3)
    for pad in (1, 7):
        lengths = (2, 4, 3)
        ids = torch.full((3, 6), pad)
        for i, length in enumerate(lengths):
            ids[i, :length] = torch.tensor([0, 3, 5, 2]).roll(i)[:length]  # 0 is a token, too
        hidden = draw(generator, 3, 6, width)
        truth = torch.stack([
            (h[:k] @ query).softmax(0) @ h[:k] for h, k in zip(hidden, lengths, strict=True)
        ])  # fmt: skip
        mask, scores = ids != pad, hidden @ query
        zero = ids != 0

        def mean(scores, dim=1, hidden=hidden):
            return (scores.softmax(dim)[..., None] * hidden).sum(1)

        out = float("-inf")

        def slipped(zero, times, texts, ids=ids, scores=scores, mean=mean, pad=pad):
            kept = ids != (0 if zero else pad)
            masked = scores * kept if times else scores.masked_fill(~kept, -1e30)
            return mean(masked, 0 if texts else 1)

        slips = "padding's id", "the score of padding", "the dimension of the softmax"
        left = [
            (" and ".join(slip for slip, bad in zip(slips, made, strict=True) if bad), made)
            for made in product((False, True), repeat=3) if sum(made) > 1
        ]  # fmt: skip
        mistakes = [
            *((f"Still wrong: {said}.", slipped(*made)) for said, made in left),
            ("Padding's id is `pad`; 0 may be a word.", mean(scores.masked_fill(~zero, out))),
            ("Padding keeps a share: a score of 0 is exp(0) = 1. It must be minus infinity.",
             mean(scores * mask)),
            ("The shares of one text add up over its tokens, dimension 1.",
             mean(scores.masked_fill(~mask, -1e30), 0)),
            ("Shares of padding were put to zero after the softmax, so that the others no longer "
             "add up to 1.", (scores.softmax(1)[..., None] * hidden * mask[..., None]).sum(1)),
            ("Padding is not left out.", mean(scores)),
        ]  # fmt: skip
        compare(pool(hidden.clone(), ids.clone(), query.clone(), pad), truth, mistakes,
                f"With pad = {pad} the result", 1e-9)  # fmt: skip


@exercise("12.6")
def check_needed(texts_needed):
    """By the variance of a difference, counted from a table of all four outcomes."""
    for both, one, other in ((0.7, 0.1, 0.08), (0.5, 0.2, 0.1), (0.6, 0.05, 0.15)):
        gap = one - other
        values = torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=torch.float64)
        shares = torch.tensor([both, one, other, 1 - both - one - other], dtype=torch.float64)
        paired = float((shares * values**2).sum() - (shares * values).sum() ** 2)
        first, second = both + one, both + other
        apart = first * (1 - first) + second * (1 - second)
        z = 1.96 / gap
        got = numbers(texts_needed(both, one, other), 2)
        for value, variance, name, known in (
            (got[0], paired, "The number with the same texts", [
                (apart, "that is the variance with two sets of texts: on the same texts what both "
                        "get right, or wrong, drops out."),
                (one + other, "the variance of a difference is its mean square less gap^2."),
            ]),
            (got[1], apart, "The number with other texts", [
                (paired, "that is the variance on the same texts."),
                (first * (1 - first), "both accuracies are uncertain: add their variances."),
            ]),
        ):  # fmt: skip
            exact = z**2 * variance
            if value in (math.ceil(exact), math.ceil(exact * (1 - 1e-9))):
                continue
            if value != int(value):
                raise Wrong(f"{name}: there are no parts of texts: round {value:.6g} up.")
            if value == math.floor(exact):
                raise Wrong(f"{name}: round up: with {value} texts it is not reached yet.")
            for wrong, sentence in known:
                if abs(value - z**2 * wrong) <= 1 + 1e-9 * value:
                    raise Wrong(f"{name}: {sentence}")
            if abs(value - abs(z) * variance**0.5) < 1:
                raise Wrong(f"{name}: solve 1.96 sqrt(variance / n) = gap for n: square it.")
            raise Wrong(f"{name}: {value:.6g} is not right for shares {both}, {one}, {other}.")
