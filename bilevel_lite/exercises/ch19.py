"""Checks of chapter 19, many processes."""

from functools import partial

import torch

from bilevel_lite.exercises import Wrong, compare, draw, exercise, near, numbers
from bilevel_lite.parallel import dealt


@exercise("19.A")
def check_share(answer):
    """900 and 100 examples whose means count alike: 1/200 against 1/1800."""
    (times,) = numbers(answer, 1)
    if abs(times - 1) < 1e-9:
        raise Wrong("That would be the mean over all. Here each *mean* gets the weight 1/2.")
    if abs(9 * times - 1) < 1e-9:
        raise Wrong("The other way round: the small part's mean is divided by fewer.")
    if abs(times - 9) > 1e-9:
        raise Wrong("An example of a part with n_p of them has the weight 1 / (2 n_p).")


@exercise("19.B")
def check_length(answer):
    """The inverse is convex: a mean of inverses is larger than the inverse of the mean."""
    if answer == "short":
        raise Wrong("Try it with numbers: 1/2 (1/1 + 1/3) against 1 / (1/2 (1 + 3)).")
    if answer == "right":
        raise Wrong("It would be if the inverse were linear. Is it?")
    if answer != "long":
        raise Wrong('Answer with one of "short", "right", "long".')


def _parts(generator, counts, d):
    whole = draw(generator, sum(counts), d) + torch.arange(sum(counts)).double()[:, None] / 9
    return whole, whole.split(counts)


@exercise("19.1")
def check_moments(pooled):
    """Against mean and covariance of all rows."""
    generator = torch.Generator().manual_seed(1901)
    for counts in ([7, 2, 4], [3, 9]):
        whole, parts = _parts(generator, counts, 3)
        mean, centred = whole.mean(0), whole - whole.mean(0)
        truth = centred.T @ centred / len(whole)
        given = [(len(x), x.mean(0), torch.cov(x.T, correction=0)) for x in parts]
        got = pooled([tuple(one) for one in given])
        if not isinstance(got, tuple | list) or len(got) != 2:
            raise Wrong("Return two things: the mean and the covariance of all rows.")
        within = sum(n * c for n, _, c in given) / len(whole)
        alike = sum(m for _, m, _ in given) / len(given)
        compare(
            got[0], mean,
            [("The mean: parts of different sizes count alike here.", alike)],
            "the mean",
            hint="The mean of all rows weighs each part's mean by its rows.",
        )  # fmt: skip
        plain = sum(c for *_, c in given) / len(given)
        second = sum(n * (c + torch.outer(m, m)) for n, m, c in given) / len(whole)
        compare(
            got[1], truth,
            [
                ("That is the mean of the covariances: the parts' means differ, too.", within),
                ("Covariances averaged alike, and what lies between the parts is missing.", plain),
                ("That is the second moment: the mean is still in it.", second),
                ("Divide by n, not by n - 1.", truth * len(whole) / (len(whole) - 1)),
            ],
            "the covariance",
            hint="Second moments are means over rows, so they add up; a covariance does not.",
        )  # fmt: skip


@exercise("19.2")
def check_seconds(seconds):
    """Against the rounds of the ring, counted one by one."""
    for d, columns, Q, latency, rate in (
        (500, 30, 6, 1e-5, 1e10), (100, 300, 3, 1e-3, 1e8), (2000, 5, 64, 2e-6, 5e10),
    ):  # fmt: skip
        got = numbers(seconds(d, columns, Q, latency, rate), 2)
        each = latency + 4 * d**2 / Q / rate
        summed = sum(each for _ in range(2) for _ in range(Q - 1))
        gathered = sum(latency + 4 * d * columns / rate for _ in range(Q - 1))
        near(
            got[0], summed, "the sum",
            [
                (sum(each for _ in range(Q - 1)), "one way round only: a sum goes round twice"),
                (2 * (Q - 1) * (latency + 4 * d**2 / rate), "a Q-th part of the matrix a round"),
                (2 * (Q - 1) * (latency + d**2 / Q / rate), "a number has four bytes"),
                (2 * (Q - 1) * (latency + 32 * d**2 / Q / rate), "count bytes, not bits"),
                (2 * Q * each, "Q - 1 rounds, not Q"),
                (2 * (Q - 1) * 4 * d**2 / Q / rate, "each round also waits for the latency"),
            ],
            "2 (Q - 1) rounds, each of d^2 / Q numbers", 1e-9,
        )  # fmt: skip
        near(
            got[1], gathered, "the gathering",
            [
                (2 * gathered, "a gathering goes round once"),
                ((Q - 1) * (latency + 4 * d * columns / Q / rate),
                 "whole parts go round: `columns` is already one process's"),
                ((Q - 1) * (latency + 4 * d * columns * Q / rate),
                 "in each round a process sends one part, not all"),
                ((Q - 1) * (latency + d * columns / rate), "a number has four bytes"),
                ((Q - 1) * (latency + 32 * d * columns / rate), "count bytes, not bits"),
            ],
            "Q - 1 rounds, each of d columns numbers", 1e-9,
        )  # fmt: skip


@exercise("19.3")
def check_transpose(back):
    """By autograd through a gathering that is written out as one function of all parts."""
    generator = torch.Generator().manual_seed(1903)
    for Q, n in ((3, 2), (4, 5)):
        parts = [draw(generator, n).requires_grad_() for _ in range(Q)]
        weights = [draw(generator, Q, n) for _ in range(Q)]
        total = sum((torch.stack(parts) * w).sum() for w in weights)
        truth = torch.stack(torch.autograd.grad(total, parts))
        got = back([w.clone() for w in weights])
        own = torch.stack([w[p] for p, w in enumerate(weights)])
        parts_summed = torch.stack([w.sum(0) for w in weights])
        compare(
            got, truth,
            [
                ("Each process's own cotangent of its own part: the others use it, too.", own),
                ("A sum, not a mean: every process's use of x_p counts.", truth / Q),
                ("Summed over the parts; sum over the processes that hold them.", parts_summed),
                ("The parts are in the wrong order.", sum(weights).flip(0)),
            ],
            "the gradients",
            hint="x_p stands in row p of what every process holds.",
        )  # fmt: skip


@exercise("19.4")
def check_rows(assembled):
    """Against autograd through the whole batch's weighted slopes."""
    generator = torch.Generator().manual_seed(1904)
    for counts, m in (([3, 5], 12), ([4, 1, 2], 9)):
        n = sum(counts)
        index = torch.randint(m, (n,), generator=generator)
        index[1] = index[-1] = index[0]  # an example twice in one part, and in another
        slopes, lam = draw(generator, n), draw(generator, m).requires_grad_()
        (truth,) = torch.autograd.grad((lam[index].sigmoid() * slopes).mean(), lam)
        given = [
            (i.clone(), s.clone())
            for i, s in zip(index.split(counts), slopes.split(counts), strict=True)
        ]
        got = assembled(given, lam.detach().clone())
        sigma = lam.detach().sigmoid()
        rows = sigma * (1 - sigma)
        placed, last = partial(torch.zeros(m).double().index_add, 0, index), torch.zeros(m).double()
        last[index] = slopes / n
        each = torch.cat([s / len(s) for _, s in given])
        once = torch.zeros(m).double()
        for i, s in given:
            once[i] = once[i] + s / n
        compare(
            got, truth,
            [
                ("Each process divided by its own n_p; all divide by n.", rows * placed(each)),
                ("A mean of the processes' means: by n, once.", rows * placed(each) / len(counts)),
                ("The mean over the n examples is missing.", rows * placed(slopes)),
                ("An example is in two parts, and only one of its terms is kept.", rows * last),
                ("An example is twice in one part, and only one of its terms is kept.",
                 rows * once),
                ("The derivative of the sigmoid is missing.", placed(slopes / n)),
                ("That is sigma itself, not its derivative.", sigma * placed(slopes / n)),
            ],
            "J v",
            hint="J v has an entry for each weight: sigma'(lam_i) times the slopes of i, over n.",
        )  # fmt: skip


@exercise("19.5")
def check_deal(deal):
    """By the loads that come out: of equal jobs it does not matter who gets which."""
    for costs, size in (([1, 8, 3, 3, 2], 2), ([5, 4, 3, 3, 3], 2), ([2, 7, 1, 7, 4, 6], 3)):
        owners = [int(owner) for owner in numbers(deal(list(costs), size), len(costs))]
        if not all(0 <= owner < size for owner in owners):
            raise Wrong(f"The processes are 0 to {size - 1}; you name {sorted(set(owners))}.")
        if loads(costs, owners, size) == loads(costs, dealt(costs, size), size):
            continue
        order, load = [], [0.0] * size
        for cost in costs:
            order.append(load.index(min(load)))
            load[order[-1]] += cost
        ranks = sorted(range(len(costs)), key=lambda k: -costs[k])
        mistakes = {
            "Those are the processes of the sorted layers: bring them back into the given order.": [
                dealt(costs, size)[k] for k in ranks
            ],
            "In the order given: sort first, or a large job comes last.": order,
            "In turns: what counts is the work, not the number of jobs.": [
                k % size for k in range(len(costs))
            ],
        }
        for sentence, other in mistakes.items():
            if loads(costs, owners, size) == loads(costs, other, size):
                raise Wrong(sentence)
        raise Wrong("The dearest job first, each to the process that has the least work so far.")


def loads(costs, owners, size):
    """How much each process has, from the least."""
    return sorted(
        sum(c for c, owner in zip(costs, owners, strict=True) if owner == k) for k in range(size)
    )
