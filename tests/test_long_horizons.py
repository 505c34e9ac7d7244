"""Schedules, populations and functional hypergradients: each against another way to its number."""

import math

import kinds
import numpy as np
import pytest
import torch

import bilevel_lite as bl
from bilevel_lite.functional import functional_hypergradient, spread, tangents
from bilevel_lite.population import Member, Teacher, _ranked, evolve, rescale
from bilevel_lite.problem import NotFinite
from bilevel_lite.schedules import SignSteps, forward_schedule
from bilevel_lite.tasks.rates import Trainings


def error(got, truth):
    return float((got - truth).norm() / truth.norm())


# ------------------------------------------------------------------ schedules

T = 12


@pytest.fixture(scope="module")
def training():
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(20, 3, generator=generator), torch.randn(20, generator=generator)
    x_val, y_val = torch.randn(15, 3, generator=generator), torch.randn(15, generator=generator)
    rows = [torch.randperm(20, generator=generator)[:8] for _ in range(T)]

    def inner(lam, theta, rows):
        return torch.tanh(x[rows] @ theta - y[rows]).square().mean()

    def outer(lam, theta, _):
        return torch.tanh(x_val @ theta - y_val).square().mean()

    theta0 = 0.3 * torch.randn(3, generator=generator)
    return bl.BilevelProblem(inner, outer), theta0, lambda t: rows[t]


RATES = {
    "lr": torch.tensor([0.3, 0.2, 0.4]),
    "momentum": torch.tensor([0.7, 0.5]),
    "weight_decay": torch.tensor([0.05]),
}


def final_loss(training, rates):
    """The training by torch's own optimiser, its rates set before each step."""
    problem, theta0, batch = training
    theta = torch.nn.Parameter(theta0.clone())
    optimizer = torch.optim.SGD([theta], lr=1.0, momentum=0.5)
    for t in range(T):
        for name, values in rates.items():
            optimizer.param_groups[0][name] = float(values[len(values) * t // T])
        optimizer.zero_grad()
        problem.inner_loss(None, theta, batch(t)).backward()
        optimizer.step()
    return float(problem.outer_loss(None, theta, None).detach())


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_derivative_of_a_schedule_is_that_of_torchs_training(training, mode):
    problem, theta0, batch = training
    h, _ = forward_schedule(problem, theta0, T, **RATES, inner_batch=batch, mode=mode)
    for name, values in RATES.items():
        for k in range(len(values)):
            ends = []
            for sign in (1, -1):
                moved = {**RATES, name: values.clone()}
                moved[name][k] += sign * 1e-5
                ends.append(final_loss(training, moved))
            slope = (ends[0] - ends[1]) / 2e-5
            assert abs(float(h[name][k]) - slope) < 1e-8 + 1e-6 * abs(slope), (name, k)


def test_forward_and_reverse_mode_are_one_number(training):
    problem, theta0, batch = training
    both = [
        forward_schedule(problem, theta0, T, **RATES, inner_batch=batch, mode=mode)[0]
        for mode in ("forward", "reverse")
    ]
    for name in RATES:
        assert error(both[0][name], both[1][name]) < 1e-12


@pytest.mark.parametrize("own, other", [("float32", "float64"), ("float64", "float32")])
def test_sign_steps_keep_the_type_of_the_values(own, other):
    own, other = getattr(torch, own), getattr(torch, other)
    outer = SignSteps({"lr": torch.zeros(2, dtype=own)}, {"lr": 0.25})
    for h in ([-3.0, 2.0], [1.0, -1.0]):
        outer.step({"lr": torch.tensor(h, dtype=other)})
    assert outer.values["lr"].tolist() == [0.125, 0.125]
    kept = (outer.values, outer.size, outer.sign)
    assert {one["lr"].dtype for one in kept} == {own}


def test_a_derivative_is_of_its_schedules_type(training):
    problem, theta0, batch = training
    h, _ = forward_schedule(problem, theta0, T, torch.full((2,), 0.3).float(), inner_batch=batch)
    assert h["lr"].dtype == torch.float32 != theta0.dtype


def test_a_window_is_the_sum_of_its_steps_and_a_number_is_fixed(training):
    problem, theta0, batch = training
    at = {"momentum": 0.6, "weight_decay": 0.01, "inner_batch": batch}
    each, _ = forward_schedule(problem, theta0, T, torch.full((T,), 0.3), **at)
    three, info = forward_schedule(problem, theta0, T, torch.full((3,), 0.3), **at)
    assert set(three) == {"lr"}
    assert error(three["lr"], each["lr"].view(3, -1).sum(1)) < 1e-12
    assert info.stored == 3 * 2 * 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 0.1}, "lr: got 0.1, expected a tensor of values"),
        ({"lr": torch.ones(13)}, r"lr: got shape \(13,\), expected \(n,\) with n from 1 to the 12"),
        ({"momentum": torch.ones(1, 1)}, r"momentum: got shape \(1, 1\)"),
        ({"lr": torch.ones(2, dtype=torch.int64)}, "^lr: "),
        ({"momentum": 1.5}, "momentum: got 1.5"),
        ({"steps": 0}, "steps: got 0"),
    ],
)
def test_bad_schedules_are_refused(training, change, message):
    problem, theta0, batch = training
    given = {"steps": T, "lr": torch.ones(2), "inner_batch": batch, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        forward_schedule(problem, theta0, **given)


def test_sign_steps_by_hand():
    outer = SignSteps(
        {"lr": torch.tensor([0.1, 0.1]), "momentum": torch.tensor([0.9])},
        {"lr": 0.08, "momentum": 0.2},
    )
    seen = []
    for lr, momentum in (([-9.0, 1e-9], -1.0), ([4.0, 2.0], 1.0), ([0.0, -1.0], 1.0),
                         ([-1.0, -1.0], 1.0)):  # fmt: skip
        outer.step({"lr": torch.tensor(lr), "momentum": torch.tensor([momentum])})
        seen.append([*outer.values["lr"].tolist(), float(outer.values["momentum"])])
    by_hand = [
        [0.18, 0.02, 0.999],  # momentum is held at its bound
        [0.14, 0.0, 0.899],  # 0.08 halved at a change of sign; 0.02 - 0.08 is held at zero
        [0.14, 0.04, 0.799],  # a derivative of zero changes nothing
        [0.16, 0.08, 0.699],
    ]
    assert torch.allclose(torch.tensor(seen), torch.tensor(by_hand), atol=1e-12)


@pytest.mark.parametrize(
    "h, message",
    [
        ({"lr": torch.tensor([1.0, float("nan")])}, "h of lr: 1 of 2 entries are NaN"),
        ({"lr": torch.ones(2, 1)}, r"h: got shapes \{'lr': \(2, 1\)\}"),
        ({"momentum": torch.ones(2)}, "h: got shapes"),
    ],
)
def test_a_derivative_without_a_sign_is_refused(h, message):
    given = {"lr": torch.ones(2)}
    outer = SignSteps(given, {"lr": 0.1})
    with pytest.raises(ValueError, match=message):
        outer.step(h)
    outer.step({"lr": torch.ones(2)})
    assert torch.equal(given["lr"], torch.ones(2))  # what was handed over is not changed


def test_a_state_of_sign_steps_is_a_copy_and_is_checked_before_it_is_taken():
    def make():
        return SignSteps({"lr": torch.ones(2, requires_grad=True)}, {"lr": 0.1})

    h = [{"lr": torch.tensor(some)} for some in ([1.0, -1.0], [-1.0, -1.0], [1.0, 1.0])]
    outer, again = make(), make()
    outer.step(h[0])
    state = outer.state_dict()
    for one in h[1:]:
        outer.step(one)
    again.load_state_dict(state)
    for one in h[1:]:
        again.step(one)
    assert torch.equal(outer.values["lr"], again.values["lr"])
    assert not outer.values["lr"].requires_grad
    for bad in (
        None, {}, {**state, "sign": {}}, {**state, "sign": {"lr": torch.ones(5)}},
        {**state, "sign": {"momentum": torch.ones(2)}}, {**state, "sign": [torch.ones(2)]},
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match="^state: "):
            again.load_state_dict(bad)
    assert torch.equal(outer.values["lr"], again.values["lr"])


@pytest.mark.parametrize(
    "sizes",
    [{"lr": 0.0}, {"momentum": 0.1}, {"lr": 0.1, "momentum": 0.1}, {"lr": float("inf")},
     {"lr": "0.1"}, {"lr": True}],
)  # fmt: skip
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="^sizes: got"):
        SignSteps({"lr": torch.ones(1)}, sizes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"values": None}, "values: got NoneType, expected a dict by name"),
        ({"values": torch.ones(1)}, "values: got Tensor, expected a dict by name"),
        ({"sizes": 0.1}, "sizes: got float, expected a dict by name"),
        ({"bounds": None}, "bounds: got NoneType, expected a dict by name"),
        ({"bounds": {"lr": (1, 0)}}, r"bounds: got \(1, 0\) for lr, expected \(least, most\)"),
        ({"bounds": {"lr": (float("nan"), 1)}}, r"bounds: got \(nan, 1\) for lr, expected"),
        ({"bounds": {"lr": (None, 1)}}, r"bounds: got \(None, 1\) for lr, .* for no bound"),
        ({"bounds": {"lr": 1.0}}, "bounds: got 1.0 for lr, expected"),
        ({"bounds": {"lr": (0, 1, 2)}}, r"bounds: got \(0, 1, 2\) for lr, expected"),
    ],
)
def test_what_sign_steps_cannot_be_made_of(given, message):
    good = {"values": {"lr": torch.ones(1)}, "sizes": {"lr": 0.1}, "bounds": {"lr": (0, 1)}}
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        SignSteps(**{**good, **given})
    for bounds in ([np.float64(0), torch.tensor(2.0)], (1, 1), (-math.inf, math.inf)):
        outer = SignSteps(**{**good, "sizes": {"lr": np.float32(0.1)}, "bounds": {"lr": bounds}})
        outer.step({"lr": torch.ones(1)})


# ------------------------------------------------------------------ functional


@pytest.fixture(scope="module")
def regression():
    """Weighted softmax regression: lam has a weight for each example, theta is solved for."""
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    far = torch.randn(10, 4, generator=generator), torch.arange(10) % 3
    lam = torch.randn(30, generator=generator)

    def inner(lam, h, batch):
        losses = torch.nn.functional.cross_entropy(h, batch[1], reduction="none")
        return torch.sigmoid(lam) * losses + 0.01 * h.square().sum(1)

    def outer(lam, h, batch):
        losses = torch.nn.functional.cross_entropy(h, batch[1], reduction="none")
        return losses + 0.1 * (lam**2).mean()

    return inner, outer, lam, (x, y), far


def parametric(outputs, inner, outer, near, far):
    return bl.BilevelProblem(
        lambda lam, theta, batch: inner(lam, outputs(theta, batch[0]), batch).mean(),
        lambda lam, theta, batch: outer(lam, outputs(theta, batch[0]), batch).mean(),
    )


def test_with_the_tangents_of_a_linear_model_it_is_the_parametric_hypergradient(regression):
    inner, outer, lam, near, far = regression
    outputs = lambda theta, x: x @ theta.view(4, 3)  # noqa: E731
    problem = parametric(outputs, inner, outer, near, far)

    def solved(lam):
        theta = torch.zeros(12)
        for _ in range(30):  # Newton
            slope = bl.products.gradient(problem.inner_loss, lam, theta, near)[2]
            H = bl.products.hessian(problem.inner_loss, lam, theta, near)
            theta = theta - torch.linalg.solve(H, slope)
        return theta

    theta = solved(lam)
    truth = bl.hypergradient(
        problem, lam, theta, solver=bl.Direct(), inner_batch=near, outer_batch=far
    )
    for basis in (tangents(outputs, theta), spread(lambda x: x, 3)):
        h, v = functional_hypergradient(
            inner, outer, lam, lambda x: outputs(theta, x), basis, near, far
        )
        assert error(h, truth) < 1e-10 and v.shape == (12,)
    e, step = torch.eye(30)[7], 1e-4
    ends = [problem.outer_loss(lam + s * e, solved(lam + s * e), far) for s in (step, -step)]
    assert abs(float(h[7] - (ends[0] - ends[1]) / (2 * step))) < 1e-8


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_the_functional_one_computes_where_gradients_are_off(regression, off):
    inner, outer, lam, near, far = regression
    theta = torch.zeros(12)
    outputs = lambda theta, x: x @ theta.view(4, 3)  # noqa: E731
    at = inner, outer, lam, lambda x: outputs(theta, x)
    h, _ = functional_hypergradient(*at, tangents(outputs, theta), near, far)
    with off():
        there = tuple(part.clone() for part in near)
        again, _ = functional_hypergradient(*at, tangents(outputs, theta.clone()), there, far)
    assert torch.equal(h, again)
    with pytest.raises(ValueError, match="inner_loss: returned NoneType, expected a floating"):
        functional_hypergradient(lambda *_: None, *at[1:], tangents(outputs, theta), near, far)


def test_with_the_tangents_of_a_network_its_curvature_is_the_ggn(regression):
    inner, outer, lam, near, far = regression

    def outputs(theta, x):
        return torch.tanh(x @ theta[:8].view(4, 2)) @ theta[8:].view(2, 3)

    theta = torch.randn(14, generator=torch.Generator().manual_seed(0))
    at = inner, outer, lam, lambda x: outputs(theta, x), tangents(outputs, theta), near, far
    h, found = functional_hypergradient(*at, damping=0.01)
    # the same by hand: v from J^T S J, then J v by the package
    problem = parametric(outputs, inner, outer, near, far)
    J = torch.func.jacrev(lambda p: outputs(p, near[0]))(theta)
    S = torch.stack([
        torch.func.hessian(lambda o, i=i: inner(lam[i:i+1], o[None], (None, near[1][i:i+1]))[0])(
            outputs(theta, near[0])[i]
        )
        for i in range(30)
    ])  # fmt: skip
    G = torch.einsum("nck,nce,nel->kl", J, S, J) / 30 + 0.01 * torch.eye(14)
    _, direct, b = bl.products.gradient(problem.outer_loss, lam, theta, far)
    v = torch.linalg.solve(G, b)
    truth = direct - bl.products.cross_vp(problem.inner_loss, lam, theta, near, v)
    assert error(h, truth) < 1e-10 and error(found, v) < 1e-10


def test_a_richer_basis_is_the_hypergradient_of_functions():
    """Every function on five points: h* and Phi are known point by point, whatever predicts."""
    x, c = torch.arange(5.0)[:, None], torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0])
    lam = torch.tensor([0.5, 2.0])
    weight = lambda lam: lam[0] + lam[1] * x[:, 0]  # noqa: E731
    inner = lambda lam, h, batch: weight(lam) * (h[:, 0] - c) ** 2 + h[:, 0] ** 2  # noqa: E731
    outer = lambda lam, h, batch: (h[:, 0] - 1) ** 2  # noqa: E731
    star = lambda lam: weight(lam) * c / (weight(lam) + 1)  # noqa: E731
    at = lam.clone().requires_grad_()
    (truth,) = torch.autograd.grad(((star(at) - 1) ** 2).mean(), at)
    each = spread(lambda x: torch.nn.functional.one_hot(x[:, 0].long(), 5).to(x), 1)
    h, _ = functional_hypergradient(
        inner, outer, lam, lambda x: star(lam)[:, None], each, (x,), (x,)
    )
    assert error(h, truth) < 1e-12


@pytest.mark.parametrize(
    "change, message",
    [
        ({"damping": -1.0}, "^damping: got -1.0"),
        ({"basis": lambda x: x}, r"^basis: got shape \(30, 4\) on inner_batch"),
        ({"basis": spread(lambda x: torch.zeros(len(x), 2), 3)}, "^basis: the system .* singular"),
        ({"basis": spread(lambda x: torch.stack([x[:, 0], 3.1 * x[:, 0]], 1), 3)}, "singular"),
        ({"inner_loss": lambda lam, h, b: lam * h[:, 0]}, "^basis: the system .* singular"),
        ({"inner_loss": lambda lam, h, b: -h.square().sum(1) + lam}, "not convex"),
        ({"inner_loss": lambda lam, h, b: lam}, "^inner_loss: does not depend on the predictions"),
        ({"outer_loss": lambda lam, h, b: torch.ones(10)}, "^outer_loss: does not depend"),
        ({"damping": "a"}, "^damping: got 'a'"),
        ({"inner_loss": lambda lam, h, b: h.sum()}, r"^inner_loss: got losses of shape \(\)"),
        (
            {"inner_loss": lambda lam, h, b: h.square().sum(1)},
            "^inner_loss: does not depend on lam",
        ),
        ({"lam": torch.ones(3, dtype=torch.long)}, "^lam"),
    ],
)
def test_bad_functional_problems_are_refused(regression, change, message):
    inner, outer, lam, near, far = regression
    given = {
        "inner_loss": inner, "outer_loss": outer, "lam": lam, "predict": lambda x: x[:, :3],
        "basis": spread(lambda x: x, 3), "inner_batch": near, "outer_batch": far,
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        functional_hypergradient(**{**given, **change})


# ------------------------------------------------------------------ populations


def two_wells(lam):
    """A local trap at -1 and the minimum, -1, at 2."""
    return float(-0.5 * torch.exp(-2 * (lam + 1) ** 2) - torch.exp(-2 * (lam - 2) ** 2))


def student(member):
    at = member.lam.clone().requires_grad_()
    loss = -0.5 * torch.exp(-2 * (at + 1) ** 2) - torch.exp(-2 * (at - 2) ** 2)
    (slope,) = torch.autograd.grad(loss, at)
    lam = member.lam - 0.1 * slope
    return Member(lam, member.state + 1, two_wells(lam))


@pytest.mark.parametrize("bad", [None, 0])
def test_a_generator_is_required(bad):
    for call in (
        lambda: evolve([Member(torch.ones(1))] * 2, student, 1, bad),
        lambda: rescale(torch.ones(1), bad),
        lambda: Teacher(2, 2, 0.1, bad),
    ):
        with pytest.raises(TypeError, match="generator: got .*, expected a torch.Generator"):
            call()


def test_without_replacement_it_is_as_many_restarts():
    starts = [Member(torch.tensor(s), 0) for s in (-1.4, -0.5, 1.2, 2.5)]
    members, history = evolve(starts, student, 9, torch.Generator(), truncation=0.0)
    alone = []
    for member in starts:
        for _ in range(9):
            member = student(member)
        alone.append(member.loss)
    assert [m.loss for m in members] == sorted(alone)
    assert len(history) == 9 and all(m.state == 9 for m in members)
    assert starts[0].state == 0  # what was handed over is not changed


def test_the_trapped_are_replaced_by_mutants_of_the_best():
    starts = [Member(torch.tensor(s), 0) for s in (-1.2, -1.0, -0.8, 1.5)]
    drawn = [evolve(starts, student, 30, torch.Generator().manual_seed(1), truncation=0.25)
             for _ in range(2)]  # fmt: skip
    assert [m.loss for m in drawn[0][0]] == [m.loss for m in drawn[1][0]]  # seeded
    assert sum(m.loss < -0.9 for m in drawn[0][0]) >= 3
    alone, _ = evolve(starts, student, 30, torch.Generator(), truncation=0.0)
    assert sum(m.loss < -0.9 for m in alone) == 1


def test_copies_take_the_state_along_and_mutations_are_of_lam():
    def still(member):
        return Member(member.lam, member.state, float(member.lam.sum()))

    starts = [Member(torch.tensor([float(k)]), f"state of {k}") for k in (1, 2, 3, 4)]
    members, _ = evolve(starts, still, 2, torch.Generator(), truncation=0.25, mutate=None)
    assert [m.state for m in members] == ["state of 1", "state of 1", "state of 2", "state of 3"]
    assert torch.equal(members[1].lam, torch.tensor([1.0]))
    times = rescale(torch.ones(1000), torch.Generator().manual_seed(0))
    assert set(times.tolist()) == {0.8, 1.2}


def test_the_teacher_descends_on_the_loss_of_its_mutant():
    generator = torch.Generator().manual_seed(4)
    teacher = Teacher(3, 5, lr=1e-6, generator=generator)
    with torch.no_grad():
        teacher.W.copy_(0.3 * torch.randn(3, 5, generator=generator))
    lam, aim = torch.randn(3, generator=generator), torch.randn(3, generator=generator)

    def phi():
        return float(((teacher(lam).detach() - aim) ** 2).sum())

    before, slopes = phi(), []
    for parameter in (teacher.W, teacher.V):  # differences
        for k in range(parameter.numel()):
            with torch.no_grad():
                parameter.view(-1)[k] += 1e-6
                up = phi()
                parameter.view(-1)[k] -= 2e-6
                slopes.append((up - phi()) / 2e-6)
                parameter.view(-1)[k] += 1e-6
    held = [teacher.W.detach().clone(), teacher.V.detach().clone()]
    teacher.learn(lam, 2 * (teacher(lam).detach() - aim))
    moved = torch.cat([
        (a - b).flatten() / 1e-6
        for a, b in zip(held, (teacher.W.detach(), teacher.V.detach()), strict=True)
    ])  # fmt: skip
    assert error(moved, torch.tensor(slopes)) < 1e-6 and phi() < before


@pytest.mark.parametrize(
    "count, change, message",
    [
        (1, {}, "members: got 1"),
        (3, {"truncation": 0.5}, "at most half of them"),
        (4, {"truncation": 0.7}, "truncation: got 0.7, expected a number from 0 to 0.5"),
        (4, {"truncation": 1.0}, "truncation: got 1.0"),
        (4, {"rounds": 0}, "rounds: got 0"),
        (4, {"every": 0}, "every: got 0"),
        (4, {"truncation": "a"}, "truncation: got 'a', expected a number from 0 to 0.5"),
        (4, {"members": None}, "members: got NoneType, expected a list of Member"),
        (4, {"members": iter([])}, "members: got list_iterator, expected a list of Member"),
        (4, {"members": [torch.ones(1)] * 2}, "members: got Tensor, expected a Member"),
        (4, {"step": None}, "step: got NoneType, expected a function member -> member"),
        (4, {"step": lambda member: None}, "step: returned NoneType, expected a Member"),
        (4, {"mutate": 3}, r"mutate: got int, expected a function \(lam, generator\) -> lam"),
        (4, {"mutate": lambda *_: None}, "mutate: returned NoneType, expected a tensor like lam"),
    ],
)
def test_bad_populations_are_refused(count, change, message):
    given = {
        "members": [Member(torch.tensor(1.0), 0)] * count, "step": student, "rounds": 3,
        "generator": torch.Generator(),
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        evolve(**{**given, **change})


def test_a_population_without_a_finite_loss_is_refused():
    def lost(member):
        return Member(member.lam, 0, float("nan"))

    with pytest.raises(NotFinite, match="loss of the best member"):
        evolve([Member(torch.tensor(1.0))] * 2, lost, 2, torch.Generator())


# ------------------------------------------------------------------ trainings of softmax regression


@pytest.fixture(scope="module")
def trainings():
    return Trainings("digits", steps=12, size=10, fit=200, held=100)


def test_many_trainings_at_once_are_each_of_them_alone(trainings):
    rates = {
        "lr": torch.tensor([[0.3, 0.1], [0.05, 0.5]]),
        "momentum": torch.tensor([[0.9], [0.2]]),
        "weight_decay": torch.tensor([[0.01], [0.1]]),
    }
    found = trainings.losses(rates, [3, 4])
    for r in range(2):
        ends = []
        for seed in (3, 4):
            _, info = forward_schedule(
                trainings.problem, trainings.start, 12, **{k: v[r] for k, v in rates.items()},
                inner_batch=trainings.order(seed), outer_batch=trainings.judge, mode="reverse",
            )  # fmt: skip
            ends.append(float(info.outer_loss))
        assert abs(float(found[r]) - sum(ends) / 2) < 1e-5


def test_a_search_finds_the_best_of_its_own_trials(trainings):
    for shape, values in (("constant", 1), ("linear", 5), ("free", 5)):
        best = trainings.searched(shape, 8, seed=5)
        one = trainings.searched(shape, 1, seed=5)
        assert best["lr"].shape == (1, values)
        assert float(trainings.losses(best, [5])) <= float(trainings.losses(one, [5]))
    falling = trainings.searched("linear", 3, seed=1)["lr"][0]
    assert torch.allclose(falling / falling[0], torch.linspace(1, 0.1, 5))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: t.searched("steep", 3, 0), "shape: got 'steep'"),
        (lambda t: t.searched("free", 0, 0), "trials: got 0"),
        (lambda t: t.losses({"lr": torch.ones(2, 1)}, [0]), r"rates: got \{'lr': \(2, 1\)\}"),
        (lambda t: Trainings("digits", steps=0), "steps: got 0"),
        (lambda t: Trainings("digits", steps=5), "fit: got 5000 and held=2000, but digits has"),
    ],
)
def test_bad_trainings_are_refused(trainings, call, message):
    with pytest.raises(ValueError, match=message):
        call(trainings)


def pointwise(lam, o, batch):
    return lam[0].exp() * (o - batch[1]).square().sum(1) + lam[1] * (o**4).sum(1)


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda lam, o, b: pointwise(lam, o - o.mean(0), b), "reads the predictions of others"),
        (lambda lam, o, b: pointwise(lam, o, b) * torch.rand(8), "draws random numbers"),
        (lambda lam, o, b: lam.sum() * kinds.Square.apply(o).sum(1), "once_differentiable"),
        (
            lambda lam, o, b: (
                pointwise(lam, o, b) + torch.cdist(o[:, None], b[1][:, None])[:, 0, 0]
            ),
            "torch cannot differentiate it",
        ),
    ],
)
def test_the_functional_hypergradient_refuses_what_the_others_do(loss, message):
    g = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(*shape, generator=g) for shape in ((8, 2), (8, 2), (2, 2)))
    lam, batch = torch.tensor([0.3, 0.7]), (x, y)
    basis = spread(lambda x: x, 2)
    at = pointwise, lam, lambda x: x @ w, basis, batch, batch
    functional_hypergradient(pointwise, *at)
    with pytest.raises(ValueError, match="outer_batch: holds no examples"):
        functional_hypergradient(pointwise, *at[:5], (x[:0], y[:0]))
    with pytest.raises(ValueError, match=message):
        functional_hypergradient(loss, *at)


def test_mutations_are_exact_and_what_is_not_finite_comes_last():
    lam = torch.ones(40).double()
    factors = rescale(lam, torch.Generator().manual_seed(0)).unique().tolist()
    assert factors == [0.8, 1.2]
    losses = (float("-inf"), 2.0, float("nan"), 1.0)
    members = [Member(torch.ones(1), loss=loss) for loss in losses]
    assert _ranked(members)[:2] == [3, 1]
