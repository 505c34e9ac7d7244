"""Unrolling through momentum, Adam, AdamW and a user's own step: each held to torch itself."""

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import updates
from bilevel_lite.refuse import require_constant

T = 6


def error(got, truth):
    return float((got - truth).norm() / truth.norm())


@pytest.fixture(scope="module")
def problem():
    """Logistic regression whose examples' weights are lam, and a loss that does without lam."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 4, generator=generator)
    y = torch.sign(x[:, 0] + 0.4 * torch.randn(12, generator=generator))
    x_val, y_val = torch.randn(9, 4, generator=generator), torch.ones(9)

    def losses(theta, x, y):
        return torch.nn.functional.softplus(-y * (x @ theta))

    def weighted(lam, theta, rows):
        return (torch.sigmoid(lam[:12][rows]) * losses(theta, x[rows], y[rows])).mean()

    def plain(lam, theta, rows):
        return losses(theta, x[rows], y[rows]).mean()

    def outer(lam, theta, _):
        return losses(theta, x_val, y_val).mean() + 0.01 * (lam**2).sum()

    rows = [torch.arange(12)[t % 3 :: 2] for t in range(T)]
    return {
        "weighted": bl.BilevelProblem(weighted, outer),
        "plain": bl.BilevelProblem(plain, outer),
        "batch": lambda t: rows[t],
        "theta": 0.1 * torch.randn(4, generator=generator),
        "lam": torch.cat(
            [torch.randn(12, generator=generator), torch.rand(4, generator=generator)]
        ),
    }


def rate(k, scale):
    return lambda lam, t: scale * torch.sigmoid(lam[12 + (k + updates.window(t, T, 2)) % 4])


class Friction(updates.Update):
    """A step of one's own, with two states."""

    def start(self, theta):
        return torch.zeros_like(theta), torch.ones((), dtype=theta.dtype)

    def step(self, theta, state, q, lam, t):
        u, c = state
        u = 0.8 * u - torch.tanh(q * lam[13] * c)
        return theta + 0.3 * u, (u, 0.9 * c + 0.01 * (theta**2).sum())


UPDATES = {
    "SGD": updates.SGD(0.3),
    "momentum": updates.SGD(0.3, 0.9, 0.01),
    "SGD schedule": updates.SGD(rate(0, 0.7), rate(1, 0.9), rate(2, 0.1)),
    "Adam": updates.Adam(0.1, weight_decay=0.02),
    "Adam schedule": updates.Adam(rate(0, 0.3), rate(1, 0.9), rate(2, 0.99), 1e-3, rate(3, 0.1)),
    "AdamW schedule": updates.AdamW(rate(0, 0.3), weight_decay=rate(3, 0.1)),
    "own": Friction(),
}


def by_torch(problem, lam, theta, update, batch, first=0):
    """The same by one graph through everything, from step ``first`` on."""
    lam = lam.clone().requires_grad_()
    state = update.start(theta)
    for t in range(T):
        at = theta if theta.requires_grad else theta.clone().requires_grad_()
        loss = problem.inner_loss(lam, at, batch(t))
        (q,) = torch.autograd.grad(loss, at, create_graph=True)
        theta, state = update.step(at, state, q, lam, t)
        if t < first:
            theta, state = theta.detach(), tuple(u.detach() for u in state)
    return torch.autograd.grad(problem.outer_loss(lam, theta, None), lam)[0]


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("of", ["weighted", "plain"])
def test_every_mode_is_one_graph_through_everything(problem, name, of):
    update, at = UPDATES[name], (problem[of], problem["lam"], problem["theta"])
    if of == "plain" and name in ("SGD", "momentum", "Adam"):  # nothing reads lam
        with pytest.raises(ValueError, match="inner_loss: does not depend on lam"):
            bl.unrolled_hypergradient(*at, T, inner_batch=problem["batch"], update=update)
        return
    truth = by_torch(*at, update, problem["batch"])
    for more in ({}, {"keep_graphs": True}, {"mode": "forward"}, {"truncate": T}):
        h = bl.unrolled_hypergradient(*at, T, inner_batch=problem["batch"], update=update, **more)
        assert error(h, truth) < 1e-12, more


def test_truncation_leaves_the_state_before_it_constant(problem):
    at = problem["weighted"], problem["lam"], problem["theta"]
    update = UPDATES["Adam schedule"]
    truth = by_torch(*at, update, problem["batch"], first=T - 2)
    for keep in (False, True):
        h = bl.unrolled_hypergradient(
            *at, T, truncate=2, inner_batch=problem["batch"], update=update, keep_graphs=keep
        )
        assert error(h, truth) < 1e-12


@pytest.mark.parametrize("name", ["SGD schedule", "AdamW schedule", "own"])
def test_it_agrees_with_differences_of_the_training_itself(problem, name):
    update, batch = UPDATES[name], problem["batch"]

    def trained(lam):
        theta, state = problem["theta"], update.start(problem["theta"])
        for t in range(T):
            at = theta.clone().requires_grad_()
            (q,) = torch.autograd.grad(problem["plain"].inner_loss(lam, at, batch(t)), at)
            theta, state = update.step(theta, state, q, lam, t)
        return problem["plain"].outer_loss(lam, theta, None)

    lam, h = problem["lam"], 1e-5
    slopes = [(trained(lam + h * e) - trained(lam - h * e)) / (2 * h) for e in torch.eye(16)]
    found = bl.unrolled_hypergradient(
        problem["plain"], lam, problem["theta"], T, inner_batch=batch, update=update
    )
    assert error(found, torch.stack(slopes)) < 1e-8


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (updates.SGD(0.1, 0.9, 0.02), lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.02)),
        (updates.Adam(0.1, 0.8, 0.95, 1e-3, 0.02),
         lambda p: torch.optim.Adam(p, 0.1, (0.8, 0.95), 1e-3, 0.02)),
        (updates.AdamW(0.1, 0.8, 0.95, 1e-3, 0.02),
         lambda p: torch.optim.AdamW(p, 0.1, (0.8, 0.95), 1e-3, 0.02)),
    ],
    ids=["SGD", "Adam", "AdamW"],
)  # fmt: skip
def test_steps_are_those_of_torch_optim(ours, theirs):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(5, generator=generator)
    parameter = torch.nn.Parameter(theta.clone())
    optimizer, state = theirs([parameter]), ours.start(theta)
    for t in range(8):
        q = torch.randn(5, generator=generator)
        q[2] = 0.0  # a dead unit: Adam's root has no slope there
        parameter.grad = q.clone()
        optimizer.step()
        theta, state = ours.step(theta, state, q, None, t)
        assert error(theta, parameter.detach()) < 1e-14


def test_a_dead_unit_does_not_make_adam_nan():
    g = lambda lam, theta, _: lam * theta[0] ** 2 + 0 * theta[1]  # noqa: E731
    problem = bl.BilevelProblem(g, lambda lam, theta, _: (theta**2).sum())
    at = problem, torch.tensor(1.0), torch.ones(2), 3
    for mode in ("reverse", "forward"):
        h = bl.unrolled_hypergradient(*at, mode=mode, update=updates.Adam(0.1))
        assert bool(torch.isfinite(h))


def test_columns_that_are_still_zero_cost_nothing(problem):
    """A rate of the last third is reached by two of six steps, the first of which gives it."""
    update = updates.SGD(lambda lam, t: lam[updates.window(t, T, 3)])
    at = problem["plain"], torch.tensor([0.3, 0.2, 0.1]), problem["theta"]
    _, info = bl.unrolled_hypergradient(
        *at, T, mode="forward", update=update, inner_batch=problem["batch"], return_info=True
    )
    # products: the three columns are not zero from steps 1, 3 and 5 on; step 0 is one gradient
    assert info.gradients == 2 * (5 + 3 + 1) + 1 + 1
    assert info.stored == 3 * 4


def test_a_lam_without_entries_has_a_derivative_without_entries():
    g = lambda lam, theta, _: (theta**2).sum() + lam.sum() * theta.sum()  # noqa: E731
    problem = bl.BilevelProblem(g, lambda lam, theta, _: theta.sum())
    for mode in ("reverse", "forward"):
        h = bl.unrolled_hypergradient(problem, torch.zeros(0), torch.ones(2), 2, 0.1, mode=mode)
        assert h.shape == (0,)


def test_memory_counts_the_state(problem):
    at = problem["weighted"], problem["lam"], problem["theta"]
    for update, numbers in ((updates.SGD(0.1), 4), (updates.SGD(0.1, 0.9), 8)):
        _, info = bl.unrolled_hypergradient(
            *at, T, update=update, inner_batch=problem["batch"], return_info=True
        )
        assert info.stored == T * numbers


class Drawn(updates.Update):
    def step(self, theta, state, q, lam, t):
        return theta - 0.1 * q + 0.01 * torch.randn(4), state


class Writes(updates.Update):
    def step(self, theta, state, q, lam, t):
        return theta.sub_(q), state


class Alone(updates.Update):
    def step(self, theta, state, q, lam, t):
        return theta - q


class Wider(updates.Update):
    def step(self, theta, state, q, lam, t):
        return torch.cat([theta, q]), state


class Started(updates.Update):
    def start(self, theta):
        return torch.zeros_like(theta)


class Whole(updates.Update):
    def start(self, theta):
        return (torch.zeros(4, dtype=torch.int64),)


class NoGrad(updates.Update):
    @torch.no_grad()
    def step(self, theta, state, q, lam, t):
        return theta - 0.1 * q, state


class ByData(updates.Update):
    def step(self, theta, state, q, lam, t):
        return theta.data - 0.1 * q, state


class ByNumPy(updates.Update):
    def step(self, theta, state, q, lam, t):
        return torch.from_numpy(theta.detach().numpy() - 0.1 * q.detach().numpy()), state


class CutVelocity(updates.Update):
    def start(self, theta):
        return (torch.ones_like(theta),)

    def step(self, theta, state, q, lam, t):
        return theta - 0.1 * (0.9 * state[0].detach() + q), (0.9 * state[0].detach() + q,)


class CutRate(updates.Update):
    def step(self, theta, state, q, lam, t):
        return theta - lam.detach().square().mean() * q, state


BAD = {
    "changes with theta, but no graph": dict(update=NoGrad()),
    "step returns changes with theta, but": dict(update=ByData()),
    "returns changes with theta, but no": dict(update=ByNumPy()),
    "changes with the state, but no graph": dict(update=CutVelocity()),
    "changes with lam, but no graph": dict(update=CutRate()),
    "a tuple of tensors of floating-point numbers": dict(update=Whole()),
    "another one when it is done again": dict(update=Drawn()),
    "step writes into its arguments": dict(update=Writes()),
    "step returned Tensor, expected": dict(update=Alone()),
    r"step returned shapes \[\(8,\)\], expected \[\(4,\)\]": dict(update=Wider()),
    "start returned Tensor, expected a tuple": dict(update=Started()),
    "Update has no method step": dict(update=updates.Update()),
    "lr: got None and update=None": dict(),
    "lr: got 0.1 and update=SGD": dict(lr=0.1, update=updates.SGD(0.1)),
    "update: got float, expected one of": dict(update=0.1),
    "keep_graphs: got True": dict(lr=0.1, mode="forward", keep_graphs=True),
    "lr: got 0, expected a positive number": dict(lr=0),
}


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("message", BAD)
def test_bad_updates_are_refused(problem, message, mode):
    at = problem["weighted"], problem["lam"], problem["theta"], T
    given = {"mode": mode, "inner_batch": problem["batch"], **BAD[message]}
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=message):
        bl.unrolled_hypergradient(*at, **given)


class DualAveraging(updates.Update):
    """theta' = theta_0 - 0.1 (q_0 + ... + q_t): it does not read theta, and need not."""

    def start(self, theta):
        return (theta,)

    def step(self, theta, state, q, lam, t):
        return state[0] - 0.1 * q, (state[0] - 0.1 * q,)


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_step_that_reads_its_state_alone_is_descent(problem, mode):
    given = {"mode": mode, "inner_batch": problem["batch"]}
    at = problem["weighted"], problem["lam"], problem["theta"], T
    got = bl.unrolled_hypergradient(*at, update=DualAveraging(), **given)
    assert torch.allclose(got, bl.unrolled_hypergradient(*at, lr=0.1, **given), rtol=1e-12)


class Plain(updates.Update):
    def step(self, theta, state, q, lam, t):
        return theta - 0.1 * q, state


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_lam_that_reaches_nothing_is_refused(problem, mode):
    given = {"mode": mode, "inner_batch": problem["batch"], "update": Plain()}
    at = problem["lam"], problem["theta"], T
    with pytest.raises(
        ValueError, match="inner_loss: does not depend on lam, and the step does not"
    ):
        bl.unrolled_hypergradient(problem["plain"], *at, **given)
    assert bl.unrolled_hypergradient(problem["weighted"], *at, **given).any()


@pytest.mark.parametrize(
    "name, make",
    [
        ("lr", lambda: updates.SGD(-1)),
        ("momentum", lambda: updates.SGD(1, 1.0)),
        ("weight_decay", lambda: updates.SGD(1, 0.9, -1e-4)),
        ("beta2", lambda: updates.Adam(1, 0.9, 1.0)),
        ("eps", lambda: updates.AdamW(1, eps=0)),
        ("lr", lambda: updates.AdamW("fast")),
    ],
)
def test_bad_rates_are_refused(name, make):
    with pytest.raises(ValueError, match=f"^{name}: got .*or a function"):
        make()


def test_what_is_made_of_lam_outside_of_the_loss_is_refused():
    """Else its derivative would be left out without a word."""
    lam = torch.tensor(0.3, requires_grad=True)
    problem = bl.BilevelProblem(
        lambda lam, theta, b: ((theta - lam) * b).square().sum(),
        lambda lam, theta, b: (theta * b).sum(),
    )
    theta, batch, rate = torch.zeros(2), torch.ones(2), lam.exp() / 10
    at = problem, lam.detach(), theta, 2
    with pytest.raises(ValueError, match="lr: got tensor.*a function"):
        bl.unrolled_hypergradient(*at, inner_batch=batch, outer_batch=batch, lr=rate)
    for update, name in ((bl.updates.SGD, "momentum"), (bl.updates.Adam, "lr")):
        with pytest.raises(ValueError, match=f"{name}: got tensor"):
            update(**{"lr": 0.1, name: rate})
    for name in ("inner_batch", "outer_batch"):
        both = {"inner_batch": batch, "outer_batch": batch, name: batch * rate}
        with pytest.raises(ValueError, match=f"{name}: holds a tensor that requires a gradient"):
            bl.unrolled_hypergradient(*at, **both, lr=0.1)
        with pytest.raises(ValueError, match=f"{name}: holds a tensor that requires a gradient"):
            bl.hypergradient(*at[:3], **both, solver=bl.Direct())
    with pytest.raises(ValueError, match="inner_batch: holds a tensor that requires a gradient"):
        bl.unrolled_hypergradient(
            *at, inner_batch=lambda t: batch * rate, outer_batch=batch, lr=0.1
        )
    drawn = SimpleNamespace(draw=lambda: batch * rate)
    method = bl.AID(problem, lam.detach(), theta, bl.CG(2), inner_lr=0.1, outer_lr=0.1,
                    inner_batch=drawn, outer_batch=batch)  # fmt: skip
    with pytest.raises(ValueError, match="inner_batch: holds a tensor that requires a gradient"):
        method.step()

    @dataclass
    class Batch:
        x: torch.Tensor

    for b, says in ((Batch(batch * rate), "holds a tensor"), (Batch(batch), "")):
        with pytest.raises(ValueError, match=says) if says else nullcontext():
            require_constant("batch", b)
