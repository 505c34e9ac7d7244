"""A loss that is evaluated again is the same loss: the batch that was drawn, the same dropout."""

import copy
import random
from collections import UserDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import bilevel_lite as bl
from bilevel_lite import data, products
from bilevel_lite.same_function import SameDraws, same_twice

STEPS, LR = 5, 0.3


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y, INDEX = numbers(0, 20, 3), torch.arange(20) % 4, torch.arange(20)
WHOLE = (X, Y, INDEX)


def weighted(model):
    def sigma(lam, batch):
        return torch.sigmoid(lam[batch[2] % len(lam)])

    inner = bl.WeightedRisk(model, weight=sigma, l2=0.1)
    return bl.BilevelProblem(inner, bl.WeightedRisk(model))


def by_graph(problem, lam, theta, batch_at, outer, keep=STEPS):
    """Autograd through the descent itself, cut where a truncation starts: h and the last theta."""
    lam = lam.clone().requires_grad_()
    theta = theta.clone().requires_grad_()
    for t in range(STEPS):
        source = lam.detach() if t < STEPS - keep else lam
        loss = problem.inner_loss(source, theta, batch_at(t))
        theta = theta - LR * torch.autograd.grad(loss, theta, create_graph=True)[0]
        if source is not lam:
            theta = theta.detach().requires_grad_()
    return torch.autograd.grad(problem.outer_loss(lam, theta, outer), lam)[0], theta.detach()


def close(got, expected, rtol=1e-12):
    assert float((got - expected).norm()) <= rtol * float(expected.norm())


# ------------------------------------------------------------------ batches


@pytest.mark.parametrize(("mode", "keep"), [("reverse", 5), ("reverse", 2), ("forward", 5)])
def test_unrolling_takes_each_steps_batch_once_and_keeps_it(mode, keep):
    model = nn.Linear(3, 4)
    problem, lam, theta = weighted(model), numbers(1, 6), bl.flatten(model)
    g, drawn, asked = torch.Generator().manual_seed(0), [], []

    def inner_batch(t):
        asked.append(t)
        i = torch.randint(20, (4,), generator=g)
        drawn.append((X[i], Y[i], i))
        return drawn[-1]

    truncate = None if keep == STEPS else keep
    h = bl.unrolled_hypergradient(
        problem, lam, theta, STEPS, LR, mode, truncate, inner_batch, WHOLE
    )
    assert asked == list(range(STEPS))
    close(h, by_graph(problem, lam, theta, drawn.__getitem__, WHOLE, keep)[0])


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_unrolling_draws_from_a_sampler(mode):
    model = nn.Linear(3, 4)
    problem, lam, theta = weighted(model), numbers(1, 6), bl.flatten(model)
    sampler, twin = (data.Batches(X, Y, 4, torch.Generator().manual_seed(3)) for _ in range(2))
    h = bl.unrolled_hypergradient(
        problem, lam, theta, STEPS, LR, mode, inner_batch=sampler, outer_batch=WHOLE
    )
    close(h, by_graph(problem, lam, theta, lambda t: twin.draw(), WHOLE)[0])
    assert all(map(torch.equal, sampler.draw(), twin.draw()))


def test_itd_differentiates_the_batches_that_it_drew():
    model = nn.Linear(3, 4)
    problem, lam, theta = weighted(model), numbers(1, 6), bl.flatten(model)
    for mode, truncate in (("reverse", None), ("reverse", 2), ("forward", None)):
        sampler, twin = (data.Batches(X, Y, 4, torch.Generator().manual_seed(3)) for _ in range(2))
        method = bl.ITD(
            problem, lam, theta, STEPS, truncate, mode, inner_lr=LR, outer_lr=0.1,
            inner_batch=sampler, outer_batch=WHOLE,
        )  # fmt: skip
        info = method.step()
        keep = truncate or STEPS
        truth, last = by_graph(problem, lam, theta, lambda t, s=twin: s.draw(), WHOLE, keep)
        close(info.hypergradient, truth)
        close(method.theta, last)


def test_a_batch_that_is_overwritten_is_refused():
    model = nn.Linear(3, 4)
    problem, lam, theta = weighted(model), numbers(1, 6), bl.flatten(model)
    buffer = tuple(part[:4].clone() for part in WHOLE)

    class Reuses:
        def draw(self):
            buffer[0].normal_()
            return buffer

    for inner in (Reuses(), lambda t: Reuses().draw()):
        with pytest.raises(ValueError, match="inner_batch: a batch was changed in place after it"):
            bl.unrolled_hypergradient(
                problem, lam, theta, 3, LR, inner_batch=inner, outer_batch=WHOLE
            )
    for mode in ("reverse", "forward"):
        method = bl.ITD(
            problem, lam, theta, 3, None, mode, inner_lr=LR, outer_lr=0.1,
            inner_batch=Reuses(), outer_batch=WHOLE,
        )  # fmt: skip
        with pytest.raises(ValueError, match="inner_batch: a batch was changed in place after it"):
            method.step()


@dataclass
class Pair:
    x: object
    y: object


class Loose:
    def __init__(self, x, y):
        self.x, self.y = x, y


class Tight:
    __slots__ = ("x", "y")

    def __init__(self, x, y):
        self.x, self.y = x, y


KEPT = {
    "slots": (Tight, lambda batch: {"x": batch.x, "y": batch.y}),
    "dataclass": (Pair, vars),
    "mapping": (lambda x, y: UserDict(x=x, y=y), dict),
    "object": (Loose, vars),
    "arrays": (lambda x, y: Pair(x.numpy(), y.numpy()), vars),
    "memory of an array": (
        lambda x, y: Pair(torch.from_numpy(x.numpy()), torch.from_numpy(y.numpy())), vars
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEPT)
def test_a_batch_of_any_kind_that_is_refilled_is_refused(kind):
    make, parts = KEPT[kind]
    x, y = numbers(7, 6, 3), numbers(8, 6)

    def inner(lam, theta, batch):
        at, of = (torch.as_tensor(part) for part in parts(batch).values())
        return ((at @ theta - of) ** 2).mean() + (lam.exp() * theta**4).sum()

    problem = bl.BilevelProblem(inner, lambda lam, theta, _: (theta - 1).square().sum())
    lam, theta = numbers(9, 3), numbers(10, 3)

    class Draws:
        def __init__(self, again):
            self.again, self.t = again, 0
            self.x, self.y = x.clone(), y.clone()

        def draw(self):
            self.t += 1
            at, of = (self.x, self.y) if self.again else (x.clone(), y.clone())
            at.numpy()[:] = x.numpy() * self.t  # torch does not count it
            of.add_(0)  # this it does
            return make(at, of)

    for options in ({}, {"keep_graphs": True}):
        at = problem, lam, theta, 3, 0.01
        bl.unrolled_hypergradient(*at, inner_batch=Draws(again=False), **options)
        with pytest.raises(ValueError, match="inner_batch: a batch was changed in place after it"):
            bl.unrolled_hypergradient(*at, inner_batch=Draws(again=True), **options)
    for mode in ("reverse", "forward"):
        for again in (False, True):
            method = bl.ITD(
                problem, lam, theta, 3, None, mode, inner_lr=0.01, outer_lr=0.1,
                inner_batch=Draws(again),
            )  # fmt: skip
            if not again:
                method.step()
                continue
            with pytest.raises(ValueError, match="inner_batch: a batch was changed in place after"):
                method.step()


# ------------------------------------------------------------------ random numbers in the loss


def dropped():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4))


@pytest.mark.parametrize(("mode", "keep"), [("reverse", 5), ("reverse", 2), ("forward", 5)])
@pytest.mark.parametrize("drawing", [False, True])
def test_unrolling_differentiates_the_masks_of_the_descent(mode, keep, drawing):
    model = dropped()
    problem, lam, theta = weighted(model), numbers(1, 6), bl.flatten(model)

    def inner_batch(t):  # draws from the generator that dropout draws from
        i = torch.randint(20, (4,)) if drawing else INDEX
        return X[i], Y[i], i

    torch.manual_seed(7)
    truncate = None if keep == STEPS else keep
    h, info = bl.unrolled_hypergradient(
        problem, lam, theta, STEPS, LR, mode, truncate, inner_batch, WHOLE, return_info=True
    )
    after = torch.get_rng_state()
    torch.manual_seed(7)
    truth, last = by_graph(problem, lam, theta, inner_batch, WHOLE, keep)
    close(h, truth)
    close(info.theta, last)
    assert torch.equal(after, torch.get_rng_state())  # as if nothing had been evaluated again


def test_a_state_is_kept_only_where_numbers_were_drawn():
    def quiet(lam, theta, batch):
        return theta.sum()

    def drawing(lam, theta, batch):
        return (torch.rand(len(theta)) * theta).sum()

    at = torch.ones(2), torch.ones(3), None
    loss = SameDraws(quiet)
    loss(*at)
    assert loss.state is None
    torch.manual_seed(0)
    loss = SameDraws(drawing)
    first = loss(*at)
    after = torch.get_rng_state()
    assert torch.equal(loss(*at), first)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(drawing(*at), first)

    def broken(lam, theta, batch):
        torch.rand(1)
        if theta.sum() < 0:
            raise KeyError("broken")
        return theta.sum()

    loss = SameDraws(broken)
    loss(*at)
    after = torch.get_rng_state()
    with pytest.raises(KeyError):
        loss(at[0], -at[1], None)
    assert torch.equal(torch.get_rng_state(), after)


# ------------------------------------------------------------------ methods that compare values

LAM, THETA = torch.tensor([0.3, -0.4, 0.2]), torch.tensor([0.5, -0.2, 0.7])


def masked(lam, theta, mask):
    """g with a mask on theta; grad_lam g and H depend on it."""
    return (
        0.5 * (lam.exp() * (mask * theta).square()).sum()
        + 0.1 * theta.square().sum()
        - ((1 + lam) * mask * theta).sum()
    )


def drawn_mask():
    return (torch.rand(3) > 0.3) / 0.7


def drawing(lam, theta, batch):
    return masked(lam, theta, drawn_mask())


def outer(lam, theta, batch):
    return 0.5 * (theta - 1).square().sum() + 0.1 * lam.square().sum()


RATES = {"inner_lr": 0.1, "outer_lr": 0.05}


@pytest.mark.parametrize("cls", [bl.BOME, bl.BVFSM])
def test_a_gap_is_the_difference_of_one_function(cls):
    torch.manual_seed(11)
    masks = [drawn_mask() for _ in range(3)]
    torch.manual_seed(11)
    method = cls(bl.BilevelProblem(drawing, outer), LAM, THETA, **RATES)
    for mask in masks:  # the first evaluation of a step draws, the others follow
        fixed = bl.BilevelProblem(lambda lam, t, b, mask=mask: masked(lam, t, mask), outer)
        twin = cls(fixed, LAM, THETA, **RATES)
        twin.load_state_dict(method.state_dict())
        info, truth = method.step(), twin.step()
        close(info.hypergradient, truth.hypergradient)
        close(method.theta, twin.theta)


def grads(loss, lam, theta):
    at = [t.clone().requires_grad_() for t in (lam, theta)]
    return torch.autograd.grad(loss(*at), at, allow_unused=True)


def test_f2sa_subtracts_two_values_of_one_function():
    torch.manual_seed(11)
    masks = [drawn_mask() for _ in range(3)]  # z's step, theta's step, the difference
    torch.manual_seed(11)
    info = bl.F2SA(bl.BilevelProblem(drawing, outer), LAM, THETA, 1, 2.0, **RATES).step()
    slope = [grads(lambda lam, t, m=m: masked(lam, t, m), LAM, THETA)[1] for m in masks[:2]]
    z = THETA - 0.1 * slope[0]
    theta = THETA - 0.1 * (grads(lambda lam, t: outer(lam, t, None), LAM, THETA)[1] / 2 + slope[1])
    here, there = (grads(lambda lam, t: masked(lam, t, masks[2]), LAM, at)[0] for at in (theta, z))
    close(info.hypergradient, 0.2 * LAM + 2.0 * (here - there))


def test_sama_differences_one_function():
    torch.manual_seed(11)
    masks = [drawn_mask() for _ in range(2)]  # theta's step, the difference
    torch.manual_seed(11)
    info = bl.SAMA(bl.BilevelProblem(drawing, outer), LAM, THETA, 1, **RATES).step()
    theta = THETA - 0.1 * grads(lambda lam, t: masked(lam, t, masks[0]), LAM, THETA)[1]
    v = 0.1 * (theta - 1)  # D is the step size
    eps = 0.1 / v.norm()
    up, down = (
        grads(lambda lam, t: masked(lam, t, masks[1]), LAM, theta + s * eps * v)[0] for s in (1, -1)
    )
    close(info.hypergradient, 0.2 * LAM - (up - down) / (2 * eps), 1e-10)


def test_mrbo_compares_two_points_of_one_outer_loss():
    def ridge(lam, theta, batch):
        return 0.5 * (lam.exp() * theta.square()).sum() - theta.sum()

    def noisy(lam, theta, batch):
        return outer(lam, drawn_mask() * theta, batch)

    torch.manual_seed(11)
    masks = [drawn_mask() for _ in range(2)]
    torch.manual_seed(11)
    method = bl.MRBO(
        bl.BilevelProblem(ridge, noisy), LAM, THETA, bl.Identity(0.1), 0.4, 0.4, **RATES
    )

    def e(lam, theta, mask):  # grad_lam f - J (0.1 grad_theta f)
        return 0.2 * lam - lam.exp() * theta * 0.1 * mask * (mask * theta - 1)

    first = method.step().hypergradient
    close(first, e(LAM, THETA, masks[0]))
    lam, theta = method.lam.clone(), method.theta.clone()
    truth = e(lam, theta, masks[1]) + 0.4 * (first - e(LAM, THETA, masks[1]))
    close(method.step().hypergradient, truth)


# ------------------------------------------------------------------ second derivatives


def second_order(problem, lam, theta, batch):
    common = {"inner_batch": batch, "outer_batch": batch, **RATES}
    return {
        "CG": lambda: bl.hypergradient(problem, lam, theta, batch, batch, bl.CG(2)),
        "CG on GGN": lambda: bl.hypergradient(
            problem, lam, theta, batch, batch, bl.CG(2, curvature="ggn")
        ),
        "Direct": lambda: bl.hypergradient(problem, lam, theta, batch, batch),
        "Neumann": lambda: bl.hypergradient(problem, lam, theta, batch, batch, bl.Neumann(2, 0.1)),
        "KFAC": lambda: bl.hypergradient(problem, lam, theta, batch, batch, bl.KFAC(0.1)),
        "check": lambda: bl.check(problem, lam, theta, batch, batch, bl.CG(2)),
        "audit": lambda: bl.audit(problem, lam, theta, batch, batch, [bl.CG(2)]),
        "first_and_second": lambda: products.first_and_second(
            problem.inner_loss, lam, theta, batch, theta
        ),
        "update_vjp": lambda: products.update_vjp(problem.inner_loss, lam, theta, batch, theta),
        "AID": lambda: bl.AID(problem, lam, theta, bl.CG(2), **common).step(),
        "AmIGO": lambda: bl.AmIGO(problem, lam, theta, linear_lr=0.1, **common).step(),
        "StocBiO": lambda: bl.StocBiO(problem, lam, theta, **common).step(),
        "MRBO": lambda: bl.MRBO(problem, lam, theta, bl.CG(2), **common).step(),
        "SOBA": lambda: bl.SOBA(problem, lam, theta, 0.1, **common).step(),
        "SABA": lambda: bl.SABA(
            problem, lam, theta, 0.1, [batch], [batch], torch.Generator(), **RATES
        ).step(),
        "NBO": lambda: bl.NBO(problem, lam, theta, linear_lr=0.1, **common).step(),
    }  # fmt: skip


@pytest.mark.parametrize("name", second_order(None, None, None, None))
def test_second_derivatives_of_a_loss_that_draws_are_refused(name):
    model = dropped()
    at = weighted(model), numbers(1, 20), bl.flatten(model), WHOLE
    with pytest.raises(ValueError, match=r"draws random numbers .* model.eval\(\)|training mode"):
        second_order(*at)[name]()
    model.eval()
    second_order(*at)[name]()


def test_numbers_that_another_thread_draws_are_no_ones_fault():
    def beside(lam, theta, batch):
        torch.rand(1)  # moves the generator and is not used
        return (lam * theta.square()).sum()

    at = torch.ones(2), torch.tensor([1.0, 3.0])
    assert torch.equal(products.hvp(beside, *at, None, at[1]), 2 * at[1])
    with pytest.raises(ValueError, match="inner_loss: draws random numbers"):
        with same_twice("inner_loss", at[0], lambda: torch.rand(1)):
            torch.rand(1)


# ------------------------------------------------------------------ what a model keeps


class Late(nn.Module):
    """A model that stays the same for so many calls, and then keeps count where nobody sees it."""

    def __init__(self, calls):
        super().__init__()
        self.o, seen = nn.Linear(3, 4), []
        self.o.register_forward_hook(lambda *args: seen.append(1))
        self.late = lambda: max(0, len(seen) - calls)

    def forward(self, x):
        return self.o(x) * (1 + 0.1 * self.late())


def test_a_model_is_compared_at_its_first_second_fourth_eighth_use():
    """A use is one call, a comparison one more, and evaluation 1, 2, 4, 8 is looked at by two more.

    What begins after call 17, which is in use 7, is found at use 8.
    """
    problem = weighted(model := Late(calls=17))
    at = problem.inner_loss, numbers(1, 20), bl.flatten(model), WHOLE, numbers(3, 16)
    for _ in range(7):
        products.hvp(*at)
    for _ in range(2):  # and once found it is refused each time
        with pytest.raises(ValueError, match="inner_loss: has another value .* from call to call"):
            products.hvp(*at)


def test_a_comparison_leaves_running_statistics_as_the_one_pass_left_them():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    (once := copy.deepcopy(model))(X)
    theta = bl.flatten(model)
    products.hvp(weighted(model).inner_loss, numbers(1, 20), theta, WHOLE, theta)
    assert int(model[1].num_batches_tracked) == 1
    assert torch.equal(model[1].running_var, once[1].running_var)


def counting(calls):
    def g(lam, theta, batch):
        calls.append(1)
        return 0.5 * (lam * theta.square()).sum() * len(calls)

    return bl.BilevelProblem(g, lambda lam, theta, batch: theta.square().sum())


def test_unrolling_backwards_through_a_loss_that_counts_its_calls():
    with pytest.raises(ValueError, match="loss: has another value"):
        bl.unrolled_hypergradient(counting([]), torch.ones(2), torch.ones(2), 3, 0.1)


def test_unrolling_forwards_differentiates_the_descent_that_was_done():
    """theta_3 = theta_0 prod_k (1 - 0.1 k lam), one call of g a step."""
    calls, theta = [], torch.tensor([1.0, 3.0])
    at = counting(calls), torch.ones(2), theta, 3, 0.1, "forward"
    shrunk = torch.tensor([0.9, 0.8, 0.7])
    slope = sum(-0.1 * k / s for k, s in zip((1, 2, 3), shrunk, strict=True))
    close(bl.unrolled_hypergradient(*at), 2 * (theta * shrunk.prod()).square() * slope, 1e-6)
    assert len(calls) == 3


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.uniform()])
def test_numbers_of_pythons_and_numpys_own_generators_are_seen(draw):
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return h + torch.tanh(self.b(h)) if draw() > 0.5 else h

    problem = weighted(model := Skips())
    at = problem, numbers(1, 20), bl.flatten(model), WHOLE, WHOLE
    random.seed(0)
    np.random.seed(0)
    refused = 0
    for _ in range(8):
        try:
            bl.hypergradient(*at, solver=bl.CG(3, damping=1.0))
        except ValueError as error:
            refused += "draws random numbers" in str(error)
    assert refused >= 5  # four equal draws acquit, once in 8


def test_unrolling_replays_what_python_draws():
    def g(lam, theta, batch):
        return 0.5 * (lam * theta.square()).sum() * (1 + random.random())

    problem = bl.BilevelProblem(g, lambda lam, theta, batch: theta.square().sum())
    random.seed(0)
    factors = 1 - 0.1 * (1 + torch.tensor([random.random() for _ in range(3)]))
    random.seed(0)
    theta = torch.tensor([1.0, 3.0])
    got = bl.unrolled_hypergradient(problem, torch.ones(2), theta, 3, 0.1)
    end = theta * factors.prod()
    close(got, 2 * end.square() * sum((f - 1) / f for f in factors), 1e-6)
