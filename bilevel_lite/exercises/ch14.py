"""Checks of chapter 14, auxiliary pretraining."""

import torch
import torch.nn.functional as F

from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers
from bilevel_lite.tasks.pretraining import macro_f1

IGNORED = -100


@exercise("14.A")
def check_nothing_shared(answer):
    """Nothing shared: nothing arrives."""
    (value,) = numbers(answer, 1)
    if abs(value) > 1e-9:
        raise Wrong("v has no part in u: H is block-diagonal, and b is zero there. Put this into "
                    "(14.3), in which there is no S any more.")  # fmt: skip


@exercise("14.B")
def check_sign(answer):
    """d Phi / dc = c grad M^T H^-1 grad M."""
    if isinstance(answer, bool):
        raise Wrong("Answer with a number: +1, -1 or 0.")
    (sign,) = numbers(answer, 1)
    near(
        sign, 1, "The sign",
        [(-1, "two minus signs: that of b = -c grad M, and that of the hypergradient."),
         (0, "the texts do not matter: H^-1 is positive definite, whatever grad M is.")],
        "Put b = -c grad M into - grad M^T H^-1 b.", 1e-9,
    )  # fmt: skip


@exercise("14.1")
def check_masked(masked_losses):
    """By a loop over texts and hidden places."""
    generator = torch.Generator().manual_seed(141)
    for n, slots, words in ((4, 3, 5), (3, 5, 4)):
        z = draw(generator, n, slots, words)
        y = torch.randint(words, (n, slots), generator=generator)
        counts = torch.arange(n) % slots + 1  # 1, 2, ...: of different lengths
        y[torch.arange(slots) >= counts[:, None]] = IGNORED
        rows = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(n, slots)
        truth = torch.stack([
            sum(F.cross_entropy(z[i, q], y[i, q]) for q in range(int(counts[i]))) / counts[i]
            for i in range(n)
        ])  # fmt: skip
        zero = F.cross_entropy(z.flatten(0, 1), y.clamp(min=0).flatten(), reduction="none")
        zero = zero.view(n, slots)
        got = masked_losses(z.clone(), y.clone())
        if torch.is_tensor(got) and got.dim() == 0:
            raise Wrong("Return one loss for each text, shape (n,): the weights need them apart.")
        compare(
            got, truth,
            [("Divide by the text's own number of hidden words, not by that of slots.",
              rows.sum(1) / slots),
             ("That is the sum: a text with many hidden words would count more.", rows.sum(1)),
             ("An empty slot, label -100, has no loss; it is not the word 0.", zero.mean(1)),
             ("An empty slot has no loss, also in the sum.",
              zero.sum(1) / counts),
             ("Divide by each text's number, not by the mean number.",
              rows.sum(1) / counts.double().mean())],
            f"With {counts.tolist()} hidden words m", 1e-9,
        )  # fmt: skip


@exercise("14.2")
def check_cosines(task_weights):
    """By the definition."""
    generator = torch.Generator().manual_seed(142)
    for d, k in ((9, 2), (12, 3)):
        grads, b, lam = draw(generator, k, d), draw(generator, d), draw(generator, k)
        shared = torch.zeros(d, dtype=torch.bool)
        shared[torch.randperm(d, generator=generator)[: d // 2]] = True
        lr = 0.3
        cos = F.cosine_similarity(grads[:, shared], b[shared][None], 1)
        every = F.cosine_similarity(grads, b[None], 1)
        dots = grads[:, shared] @ b[shared]
        w = (lam + lr * cos).softmax(0)
        jacobian = lam.softmax(0).diag() - torch.outer(lam.softmax(0), lam.softmax(0))
        got = task_weights(lam.clone(), grads.clone(), b.clone(), shared.clone(), lr)
        compare(
            got, w,
            [("The sign is turned: a loss that points with f gains weight.",
              (lam - lr * cos).softmax(0)),
             ("Only the shared parameters count: f has no gradient in the words' head, nor M in "
              "the end task's.", (lam + lr * every).softmax(0)),
             ("That is the inner product: divide by both lengths.", (lam + lr * dots).softmax(0)),
             ("Divide by both lengths, not by one.",
              (lam + lr * dots / grads[:, shared].norm(dim=1)).softmax(0)),
             ("Divide by both lengths, not by one.",
              (lam + lr * dots / b[shared].norm()).softmax(0)),
             ("The lengths are those on the shared parameters.",
              (lam + lr * dots / grads.norm(dim=1) / b.norm()).softmax(0)),
             ("That is lam: the weights are its softmax.", lam + lr * cos),
             ("The step is taken in lam, not in the weights.", lam.softmax(0) + lr * cos),
             ("TARTAN leaves the softmax's Jacobian out of the step.",
              (lam + lr * jacobian @ cos).softmax(0))],
            f"With {k} losses the weights", 1e-9,
        )  # fmt: skip


@exercise("14.3")
def check_own_judge(own_judge):
    """L, M and a penalty are quadratic, so the solution is known: by differences of Phi."""
    generator = torch.Generator().manual_seed(143)
    for d, c, l2 in ((3, 0.7, 0.4), (5, 2.0, 0.2)):
        A, B = (draw(generator, d, d) for _ in range(2))
        A, B = A @ A.T + torch.eye(d), B @ B.T + torch.eye(d)
        p, q = draw(generator, d), draw(generator, d)

        # L = (theta - p)^T A (theta - p) / 2,  M = (theta - q)^T B (theta - q) / 2
        def at(c, A=A, B=B, p=p, q=q, l2=l2):
            return torch.linalg.solve(A + c * B + 2 * l2 * torch.eye(len(p)), A @ p + c * B @ q)

        def phi(c, A=A, p=p):
            return 0.5 * (at(c) - p) @ A @ (at(c) - p)

        theta = at(c)
        a, H = B @ (theta - q), A + c * B + 2 * l2 * torch.eye(d)
        eps = 1e-4
        seen = (phi(c + eps) - phi(c - eps)) / (2 * eps)
        b, v = -c * a - 2 * l2 * theta, torch.linalg.solve(H, a)
        truth = -v @ b
        assert abs(float(seen - truth)) < 1e-5 * float(v.norm() * b.norm())  # its own formula
        compare(
            torch.as_tensor(own_judge(a.clone(), H.clone(), c, theta.clone(), l2), dtype=a.dtype),
            truth,
            [("The sign is turned: there are two minus signs.", -truth),
             ("That is (14.7), whose judge sees the penalty: here b = -c grad M - 2 rho theta.",
              c * v @ a),
             ("The penalty's gradient is 2 rho theta.", c * v @ a + l2 * v @ theta),
             ("The penalty's part has the other sign: it is in g, not in f.",
              c * v @ a - 2 * l2 * v @ theta),
             ("grad g = 0: in b the gradient of M comes c times.", v @ (a + 2 * l2 * theta)),
             ("That is the penalty's part alone: b = -c grad M - 2 rho theta.",
              2 * l2 * v @ theta),
             ("The solve is missing: H^-1 b, not H b.", -a @ H @ b),
             ("H is missing: that is one step, not the solution.", -a @ b)],
            f"At c = {c:g} d Phi / dc", 1e-8,
        )  # fmt: skip


@exercise("14.4")
def check_worth(worth):
    """By the two macro-F1, before and after."""
    generator = torch.Generator().manual_seed(144)
    for n, C in ((30, 4), (60, 6)):
        y = torch.cat([torch.arange(C), torch.randint(C, (n - C,), generator=generator)])
        guess = torch.where(torch.rand(n, generator=generator) < 0.7, y, (y + 1) % C)
        i = int((guess != y).nonzero()[0]) if bool((guess != y).any()) else 0
        guess[i] = (y[i] + 1) % C
        after = guess.clone()
        after[i] = y[i]
        truth = 100 * (macro_f1(after, y) - macro_f1(guess, y))

        def only_mine(g, y=y, i=i):
            c = int(y[i])
            both = int((g == c).sum() + (y == c).sum())
            return 2 * int(((g == y) & (y == c)).sum()) / both

        mine = 100 * (only_mine(after) - only_mine(guess))
        value = lambda x: torch.tensor(float(x), dtype=torch.float64)  # noqa: E731
        compare(
            torch.as_tensor(worth(guess.clone(), y.clone(), i), dtype=torch.float64), value(truth),
            [("That is what it moves in accuracy.", value(100 / n)),
             ("Give points, of which 100 are the whole.", value(truth / 100)),
             ("The class that was guessed before changes, too: one wrong guess less.",
              value(mine / C)),
             ("Macro-F1 is the mean over the classes: divide by their number.", value(truth * C)),
             ("That is the F1 of its own class alone.", value(mine)),
             ("The sign is turned: after, less before.", value(-truth))],
            f"Of {n} texts in {C} classes the one text is worth", 1e-9,
        )  # fmt: skip


@exercise("14.5")
def check_memory(memory):
    """By a loop over the test texts."""
    generator = torch.Generator().manual_seed(145)
    for n, C in ((12, 3), (25, 4)):
        train = [f"text {k} of the train" for k in range(n)]
        most = int(torch.randint(C, (1,), generator=generator))
        y = (most + torch.arange(n) * (torch.arange(n) % 2)) % C  # every other one is `most`
        y[[1, 3, 4]] = (most + 1) % C
        seen = torch.randperm(n, generator=generator)[: n // 3].tolist()
        old = [1, 3, 4, *(k for k in seen if k not in (1, 3, 4))]  # these are not of class `most`
        # what stands nowhere: nearly text 3, by its case, its blanks inside, and as a piece of it
        new = ["quite new", train[3].upper(), train[3].replace(" ", "  "), train[3][:-2]]
        test = [f" {train[k]}\n" if k % 2 else train[k] for k in old] + new
        given = [f"{one} \n" if k % 3 == 0 else one for k, one in enumerate(train)]
        order = [1, *(k for k in torch.randperm(n, generator=generator).tolist() if k != 1)]
        got = memory([given[k] for k in order], y[order], list(test))

        def guesses(known=lambda k: True, unknown=most, taken=None, y=y, old=old, most=most):
            said = [int(y[k]) if known(k) else most for k in old] + 4 * [unknown]
            if taken is not None:  # one of the new texts, for text 3
                said[len(old) + taken] = int(y[3])
            return torch.tensor(said).double()

        truth = guesses()
        compare(
            torch.as_tensor(got).double(), truth,
            [("A text that was seen has the label that it had there.", guesses(lambda k: False)),
             ("Blanks at the ends make no other text: strip them.",
              guesses(lambda k: k % 2 == 0 and k % 3)),
             ("Strip the training texts, too.", guesses(lambda k: k % 3)),
             ("Strip the test texts, too.", guesses(lambda k: k % 2 == 0)),
             ("Capitals make another text.", guesses(taken=1)),
             ("Blanks inside a text make another text.", guesses(taken=2)),
             ("A piece of a text is another text.", guesses(taken=3)),
             ("A new text gets the most frequent training label; nobody knows test labels.",
              guesses(unknown=-1)),
             ("A new text gets the most frequent training label, not the first.",
              guesses(unknown=int(y[1]))),
             ("A new text gets the most frequent training label, not class 0.",
              guesses(unknown=0))],
            "The guesses", 1e-9,
        )  # fmt: skip
