"""Meta-learning: hypergradients against finite differences, loops and closed forms; the draws."""

import math
import re
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import bilevel_lite as bl
from bilevel_lite import meta

D = 12


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def model(theta, x):
    return torch.tanh(x * theta[:4] + theta[4:8]) @ theta[8:]


def loss(theta, batch):
    return (model(theta, batch[0]) - batch[1][:, 0]).square().mean()


@pytest.fixture
def tasks():
    lam = torch.randn(D, generator=gen(1), dtype=torch.float64)
    support, query = meta.sinusoids(gen(2), tasks=5, shots=6, query=7)
    assert support[0].dtype == torch.float64
    return lam, support, query


def differences(phi, lam, eps=1e-5):
    rows = torch.eye(len(lam), dtype=lam.dtype) * eps
    return torch.stack([(phi(lam + e) - phi(lam - e)) / (2 * eps) for e in rows])


@pytest.mark.parametrize(("steps", "tau"), [(1, 0.0), (4, 0.0), (3, 0.7)])
def test_maml_is_the_derivative_of_what_it_evaluates(tasks, steps, tau):
    lam, support, query = tasks

    def phi(lam):
        total = 0.0
        for i in range(5):  # one task after the other, by autograd alone
            batch, theta = (support[0][i], support[1][i]), lam
            for _ in range(steps):
                leaf = theta.detach().requires_grad_()
                slope = torch.autograd.grad(loss(leaf, batch), leaf)[0]
                theta = theta - 0.05 * (slope + tau * (theta - lam))
            total += loss(theta, (query[0][i], query[1][i])) / 5
        return total

    value, h = meta.maml(loss, lam, support, query, steps, 0.05, tau=tau)
    assert torch.allclose(value, phi(lam), rtol=1e-12)
    assert (h - differences(phi, lam)).norm() < 1e-7 * h.norm()
    _, b = meta.maml(loss, lam, support, query, steps, 0.05, first_order=True, tau=tau)
    assert (h - b).norm() > 0.05 * h.norm()


def test_first_order_is_the_gradient_at_the_last_iterate(tasks):
    lam, support, query = tasks
    value, h = meta.maml(loss, lam, support, query, 3, 0.05, first_order=True)
    theta = meta.adapt(loss, lam, support, 3, 0.05).requires_grad_()
    phi = vmap(loss)(theta, query).mean()
    assert torch.allclose(value, phi.detach(), rtol=1e-12)
    assert torch.allclose(h, torch.autograd.grad(phi, theta)[0].sum(0), rtol=1e-10)


def test_maml_is_unrolling_in_the_displacement(tasks):
    """theta = lam + delta, delta from 0: the package's unrolling has its start fixed."""
    lam, support, query = tasks
    total = torch.zeros(D, dtype=torch.float64)
    for i in range(5):
        batch, judge = ((part[0][i], part[1][i]) for part in (support, query))
        problem = bl.BilevelProblem(
            lambda lam, delta, batch: loss(lam + delta, batch),
            lambda lam, delta, batch: loss(lam + delta, batch),
        )
        total += bl.unrolled_hypergradient(
            problem, lam, torch.zeros_like(lam), 4, 0.05, inner_batch=batch, outer_batch=judge
        )
    assert torch.allclose(meta.maml(loss, lam, support, query, 4, 0.05)[1], total / 5, rtol=1e-9)


def between(*layers):
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 1))


NORMALISED = {
    "layer norm": lambda: between(nn.Linear(1, 4), nn.LayerNorm(4)),
    "batch norm": lambda: between(nn.Linear(1, 4), nn.BatchNorm1d(4, track_running_stats=False)),
    "weight norm": lambda: between(parametrizations.weight_norm(nn.Linear(1, 4))),
}


@pytest.mark.parametrize("kind", NORMALISED)
def test_both_are_right_where_torch_has_wrong_higher_derivatives(tasks, kind):
    """Against differences of Phi_T, and of the gradient of each task: torch's first order only."""
    torch.manual_seed(0)
    net, (_, support, query) = NORMALISED[kind](), tasks
    lam = bl.flatten(net) + 0.1

    def loss(theta, batch):
        return (bl.params.predict(net, theta, batch[0]) - batch[1]).square().mean()

    def slope(theta, batch):
        leaf = theta.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf, batch), leaf)[0]

    def phi(lam):
        total = 0.0
        for i in range(5):
            theta = lam
            for _ in range(3):
                theta = theta - 0.1 * slope(theta, (support[0][i], support[1][i]))
            total += loss(theta, (query[0][i], query[1][i])).detach() / 5
        return total

    h = meta.maml(loss, lam, support, query, 3, 0.1)[1]
    assert (h - differences(phi, lam)).norm() < 1e-6 * h.norm()
    theta = lam + 0.1 * torch.randn(5, len(lam), generator=gen(6))
    h = meta.imaml(loss, lam, theta, support, query, tau=9.0, iters=4 * len(lam))[1]
    truth = 0.0
    for i, at in enumerate(theta):
        rows = [
            differences(lambda t, j=j, i=i: slope(t, (support[0][i], support[1][i]))[j], at)
            for j in range(len(lam))
        ]
        b = slope(at, (query[0][i], query[1][i]))
        truth += 9.0 * torch.linalg.solve(torch.stack(rows) + 9 * torch.eye(len(lam)), b) / 5
    assert (h - truth).norm() < 1e-6 * truth.norm()


def test_imaml_is_the_derivative_of_the_solved_problem(tasks):
    lam, support, query = tasks

    def solved(lam):
        return meta.adapt(loss, lam, support, 1500, 0.03, tau=4.0)

    theta = solved(lam)
    value, h, info = meta.imaml(loss, lam, theta, support, query, tau=4.0, iters=D)
    truth = differences(lambda lam: vmap(loss)(solved(lam), query).mean(), lam)
    assert (h - truth).norm() < 1e-6 * truth.norm()
    assert torch.allclose(value, vmap(loss)(theta, query).mean(), rtol=1e-12)
    assert float(info.residual.max()) < 1e-8
    unrolled = meta.maml(loss, lam, support, query, 1500, 0.03, tau=4.0)[1]
    assert (h - unrolled).norm() < 1e-6 * h.norm()


def anchored(tau):
    return bl.BilevelProblem(
        lambda lam, theta, batch: loss(theta, batch) + tau / 2 * (theta - lam).square().sum(),
        lambda lam, theta, batch: loss(theta, batch),
    )


@pytest.mark.parametrize("iters", [1, 3, 40])  # 40: long after every system is solved
def test_imaml_is_the_loop_over_tasks_with_the_packages_cg(tasks, iters):
    lam, support, query = tasks
    theta = meta.adapt(loss, lam, support, 300, 0.03, tau=4.0)
    _, h, info = meta.imaml(loss, lam, theta, support, query, 4.0, iters)
    each, residuals = [], []
    for i in range(5):
        batch, judge = ((part[0][i], part[1][i]) for part in (support, query))
        one, diagnosis = bl.hypergradient(
            anchored(4.0), lam, theta[i], batch, judge, bl.CG(iters), return_info=True
        )
        each.append(one)
        residuals.append(diagnosis.solve.relative_residual)
    assert torch.allclose(h, torch.stack(each).mean(0), rtol=1e-8, atol=1e-11)
    assert torch.allclose(info.residual, torch.tensor(residuals).double(), rtol=1e-5, atol=1e-9)
    assert torch.isfinite(h).all() and float(info.curvature.min()) > 0


def test_the_packages_cg_looks_at_its_residual_and_so_is_not_for_vmap():
    """What chapter 13b says of it (13b.4), and why `meta.imaml` has one of its own."""
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda b: bl.linsolve.cg(lambda v: 2 * v, b, 10).solution)(torch.ones(8, 3))


def test_imaml_stops_where_the_curvature_is_negative_and_says_so(tasks):
    lam, support, query = tasks
    curve = -torch.tensor([3.0, 0.5, 1.0]).double()[:, None].expand(3, D) + torch.arange(D) / 4

    def quadratic(theta, batch):  # H = diag(batch)
        return (batch[0] * theta.square()).sum() / 2 + batch[1].sum() * theta.sum()

    tilt = torch.randn(3, D, generator=gen(5), dtype=torch.float64)
    theta = torch.zeros(3, D, dtype=torch.float64)
    batch, judge = (curve, tilt), (curve.abs(), tilt)
    with pytest.warns(bl.NegativeCurvatureWarning, match="CG stopped on 2 of 3 tasks.*raise tau"):
        _, h, info = meta.imaml(quadratic, lam, theta, batch, judge, tau=0.75, iters=D)
    assert (info.curvature > 0).tolist() == [False, True, False]
    each = []
    for i in range(3):
        v, b = torch.zeros(D).double(), torch.full((D,), float(tilt[i].sum())).double()
        if i == 1:
            v = b / (curve[1] + 0.75)
        else:
            with pytest.warns(bl.NegativeCurvatureWarning):
                v = bl.linsolve.cg(lambda v: (curve[i] + 0.75) * v, b, D).solution  # noqa: B023
        each.append(0.75 * v)
    assert torch.allclose(h, torch.stack(each).mean(0), rtol=1e-7)


def test_a_solved_task_in_float32_is_not_accused_of_negative_curvature():
    """CG on what rounding left would meet a curvature of zero."""
    curve = torch.tensor([[0.5, 1.0, 2.0, 3.0, 4.0], [5.0, 4.0, 0.1, 0.2, 0.3]])
    batch = judge = curve, torch.ones(2, 5)

    def convex(theta, batch):
        return (batch[0] * (theta - batch[1]).square()).sum() / 2

    theta = (curve * 1.0 + 1e-3 * 0.0) / (curve + 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, h, info = meta.imaml(convex, torch.zeros(5), theta, batch, judge, tau=1e-3, iters=60)
    truth = 1e-3 / (curve + 1e-3) * curve * (theta - 1)
    assert torch.allclose(h, truth.mean(0), rtol=1e-4, atol=0) and (info.curvature > 0).all()


def test_what_is_not_finite_is_refused(tasks):
    lam, support, query = tasks
    with pytest.raises(bl.refuse.NotFinite, match="lower lr"):
        meta.maml(loss, lam, support, (query[0], query[1] * float("inf")), steps=2, lr=0.1)
    bad = support[0], support[1] * float("nan")
    theta = lam.expand(len(support[0]), -1)
    with pytest.raises(bl.refuse.NotFinite):
        meta.imaml(loss, lam, theta, bad, query, tau=1.0, iters=1)


def test_the_limits_of_the_anchor(tasks):
    """A strong anchor leaves b at lam; a weak one on a convex task forgets lam."""
    lam, support, query = tasks

    def convex(theta, batch):
        return (theta - batch[1][:, 0].sum()).square().sum() / 2

    for tau, factor in ((1e6, 1.0), (1.0, 0.5), (1e-6, 0.0)):
        y = support[1].sum((1, 2))[:, None]
        theta = (y + tau * lam) / (1 + tau)
        _, h, _ = meta.imaml(convex, lam, theta, support, query, tau, iters=2)
        b = (theta - query[1].sum((1, 2))[:, None]).mean(0)
        assert torch.allclose(h, factor * b, rtol=1e-5, atol=1e-5)


def test_sinusoids_are_sinusoids_in_their_ranges():
    support, query = meta.sinusoids(gen(3), tasks=400, shots=10, query=5)
    x, y = torch.cat([support[0], query[0]], 1)[..., 0], torch.cat([support[1], query[1]], 1)
    assert support[1].shape == (400, 10, 1) and query[0].shape == (400, 5, 1)
    assert -5 <= x.min() < -4.9 and 4.9 < x.max() <= 5
    basis = torch.stack([x.sin(), x.cos()], -1)  # a sin(x - s) = a cos s sin x - a sin s cos x
    fit = torch.linalg.lstsq(basis, y).solution[..., 0]
    assert torch.allclose(basis @ fit[..., None], y, atol=1e-9)
    a, s = fit.norm(dim=1), torch.atan2(-fit[:, 1], fit[:, 0])
    assert 0.1 <= a.min() < 0.3 and 4.8 < a.max() <= 5
    assert 0 <= s.min() < 0.1 and math.pi - 0.1 < s.max() <= math.pi
    again = meta.sinusoids(gen(3), tasks=400, shots=10, query=5)
    assert torch.equal(again[0][1], support[1])


def test_episodes_are_of_their_classes_and_share_no_example():
    y = torch.arange(200) % 10
    x = torch.arange(200.0)
    support, query = meta.few_shot((x, y), [6, 7, 8, 9], gen(4), 50, ways=3, shots=2, query=5)
    assert support[0].shape == (50, 6) and query[0].shape == (50, 15)
    orders = set()
    for i in range(50):
        rows = torch.cat([support[0][i], query[0][i]])
        assert len(set(rows.tolist())) == 21
        names = {}
        for rows_i, labels in ((support[0][i], support[1][i]), (query[0][i], query[1][i])):
            for row, label in zip(rows_i.long().tolist(), labels.tolist(), strict=True):
                assert names.setdefault(label, row % 10) == row % 10
        assert sorted(names) == [0, 1, 2] and len(set(names.values())) == 3
        assert set(names.values()) <= {6, 7, 8, 9}
        orders.add(tuple(names[k] for k in range(3)))
    assert len(orders) > 15  # of 24: a class has no label of its own


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lam, s, q: meta.maml(loss, lam, s, q, 0, 0.1), "steps: got 0"),
        (lambda lam, s, q: meta.adapt(loss, lam, s, 1, -0.1), "lr: got -0.1, expected a positive"),
        (lambda lam, s, q: meta.adapt(loss, lam, s, 1, 0.1, tau=-1.0), "tau: got -1.0"),
        (
            lambda lam, s, q: meta.adapt(loss, lam, s, 1, 0.1, theta=lam),
            r"theta: got shape \(12,\), expected \(5, 12\), a row for each task",
        ),
        (
            lambda lam, s, q: meta.imaml(loss, lam, lam, s, q, 1.0, 3),
            r"theta: got shape \(12,\), expected \(5, 12\)",
        ),
        (
            lambda lam, s, q: meta.imaml(loss, lam, lam.expand(5, -1), s, q, 0.0, 3),
            "tau: got 0.0, expected a positive number; without an anchor use maml",
        ),
        (
            lambda lam, s, q: meta.imaml(loss, lam, lam.expand(5, -1), s, q, 1.0, 0),
            "iters: got 0",
        ),
        (
            lambda lam, s, q: meta.maml(loss, lam, s, (q[0][:3], q[1][:3]), 1, 0.1),
            r"support and query: x and y hold \[5, 5, 3, 3\] tasks",
        ),
        (
            lambda lam, s, q: meta.adapt(loss, lam, (s[0], s[1][:2]), 1, 0.1),
            r"support: x and y hold \[5, 2\] tasks",
        ),
        (
            lambda lam, s, q: meta.maml(loss, lam[None], s, q, 1, 0.1),
            r"lam: got shape \(1, 12\), expected a flat vector",
        ),
        (
            lambda lam, s, q: meta.adapt(loss, lam, (s[0][:0], s[1][:0]), 1, 0.1),
            "support: x and y hold no tasks",
        ),
        (lambda lam, s, q: meta.sinusoids(gen(), 0, 3), "tasks: got 0"),
        (
            lambda lam, s, q: meta.few_shot((s[0], torch.arange(5)), [1, 2], gen(), 1, 3, 1),
            "ways: got 3, but there are 2 classes",
        ),
        (
            lambda lam, s, q: meta.few_shot((s[0], torch.ones(5)), [1], gen(), 1, 1, 1, query=5),
            r"query: shots \+ query is 6, but class 1 has 5 examples",
        ),
    ],
)
def test_what_is_refused(tasks, call, message):
    with pytest.raises(ValueError, match=message):
        call(*tasks)


PAIR = r"expected a pair \(x, y\) of tensors with a first dimension"
NO_PAIRS = {
    "None": (lambda x, y: None, "NoneType"),
    "dict": (lambda x, y: {"x": x, "y": y}, "dict"),
    "generator": (lambda x, y: iter((x, y)), "tuple_iterator"),
    "tensor": (lambda x, y: x, "Tensor"),
    "three": (lambda x, y: (x, y, y), r"tuple of Tensor\[.*\], Tensor\[.*\], Tensor\[.*\]"),
    "none": (lambda x, y: (), "tuple"),
    "lists": (lambda x, y: (x.tolist(), y.tolist()), "tuple of list, list"),
    "arrays": (lambda x, y: [x.numpy(), y.numpy()], "list of ndarray, ndarray"),
    "0-d": (lambda x, y: (x, torch.tensor(1.0)), r"tuple of Tensor\[.*\], Tensor\[\]"),
}


@pytest.mark.parametrize("kind", list(NO_PAIRS))
def test_what_is_no_pair_of_tensors_is_refused(tasks, kind):
    (lam, support, query), (make, got) = tasks, NO_PAIRS[kind]
    at, data = lam.expand(5, -1), (torch.randn(6, 2), torch.arange(6) % 2)
    for name, call in (
        ("support", lambda: meta.adapt(loss, lam, make(*support), 1, 0.1)),
        ("support", lambda: meta.maml(loss, lam, make(*support), query, 1, 0.1)),
        ("query", lambda: meta.maml(loss, lam, support, make(*query), 1, 0.1)),
        ("query", lambda: meta.imaml(loss, lam, at, support, make(*query), 1.0, 1)),
        ("data", lambda: meta.few_shot(make(*data), [0, 1], gen(), 2, 2, 1, 1)),
    ):
        with pytest.raises(TypeError, match=f"^{name}: got {got}, {PAIR}$"):
            call()


def test_a_list_of_two_tensors_is_a_pair(tasks):
    lam, support, query = tasks
    both = [meta.maml(loss, lam, kind(support), kind(query), 1, 0.1)[1] for kind in (list, tuple)]
    assert torch.equal(*both)


@pytest.mark.parametrize("classes", [3, None, [0, 1.5], "01"])
def test_classes_that_are_no_whole_numbers_are_refused(classes):
    data = torch.randn(6, 2), torch.arange(6) % 2
    with pytest.raises(TypeError, match="^classes: got .*, expected whole numbers, as"):
        meta.few_shot(data, classes, gen(), 2, 2, 1, 1)
    one, other = (
        meta.few_shot(data, some, gen(), 2, 2, 1, 1)[0][0] for some in ([0, 1], data[1].unique())
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("wrong", [None, 1.0, torch.ones(D)])
def test_a_loss_that_is_no_function_is_refused(tasks, wrong):
    lam, support, query = tasks
    for call in (
        lambda: meta.adapt(wrong, lam, support, 1, 0.1),
        lambda: meta.maml(wrong, lam, support, query, 1, 0.1),
        lambda: meta.imaml(wrong, lam, lam.expand(5, -1), support, query, 1.0, 1),
    ):
        with pytest.raises(TypeError, match=r"^loss: got .*, expected a function \(theta, batch\)"):
            call()


def test_a_start_of_whole_numbers_is_refused(tasks):
    _, support, query = tasks
    with pytest.raises(TypeError, match=re.escape("lam: got torch.int64")):
        meta.maml(loss, torch.ones(D, dtype=torch.int64), support, query, 1, 0.1)


# ------------------------------------------------------------------ a task by itself, and mapped


class Between(nn.Module):
    def __init__(self, between):
        super().__init__()
        self.a, self.o, self.between = nn.Linear(1, 4), nn.Linear(4, 1), between

    def forward(self, x):
        return self.o(self.between(self, self.a(x)))


class Old(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Memo(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o, self.kept = nn.Linear(1, 4), nn.Linear(4, 1), {}

    def forward(self, x):
        weight = self.kept.setdefault("w", self.a.weight.tanh())
        return self.o(F.linear(x, weight, self.a.bias).tanh())


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.r, self.o = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x):
        return self.o(self.r(x[..., None])[0][:, -1])


def attend(module, h):
    heads = h.view(-1, 1, 2, 2)
    return F.scaled_dot_product_attention(heads, heads, heads).reshape(-1, 4)


def scaled_backward(module, h):
    out = h.tanh()
    if out.requires_grad:
        out.register_hook(lambda g: 0.3 * g)
    return out


MAPPED = r"loss: cannot be mapped over the tasks by torch.func.vmap \(.+\); "
LOOP = MAPPED + "take the tasks in a loop, by bl.hypergradient"
REFUSED = {
    "batch norm": (
        lambda: between(nn.Linear(1, 4), nn.BatchNorm1d(4)),
        MAPPED + r"call model.eval\(\)",
    ),
    "dropout": (
        lambda: between(nn.Linear(1, 4), nn.Dropout()),
        r"loss: draws random numbers .* model.eval\(\)",
    ),
    "spectral norm": (
        lambda: between(parametrizations.spectral_norm(nn.Linear(1, 4))),
        r"spectral_norm in training mode.*model.eval\(\)",
    ),
    "once": (lambda: Between(lambda m, h: Once.apply(h)), "loss: .* marked once_differentiable"),
    "old style": (lambda: Between(lambda m, h: Old.apply(h)), LOOP),
    "memo": (Memo, "loss: the gradient of a task is off by .* keeps something from call to call"),
    "hook": (lambda: Between(scaled_backward), "loss: the product with the Hessian .* a hook"),
    "data": (
        lambda: Between(lambda m, h: h.tanh() * m.a.weight.data.norm()),
        "loss: the product with the Hessian .* a transform treats otherwise",
    ),
    "branch": (lambda: Between(lambda m, h: h if h.sum() > 0 else 2 * h), MAPPED + "let no branch"),
    "item": (lambda: Between(lambda m, h: h * h.max().item()), MAPPED + "let no branch"),
    "mask": (
        lambda: Between(lambda m, h: h[h > -9.0].tanh().view(-1, 4)),
        MAPPED + "let no shape",
    ),
    "sparse": (
        lambda: Between(lambda m, h: torch.sparse.mm(torch.eye(len(h)).to(h).to_sparse(), h)),
        LOOP,
    ),
    "lstm": (Recurrent, LOOP),
    "checkpoint": (
        lambda: Between(lambda m, h: checkpoint(torch.tanh, h, use_reentrant=False)),
        "loss: uses activation checkpointing",
    ),
}
MAPPABLE = "lstm", "imaml"  # another order of the transforms: torch finds a way


def of(net):
    def loss(theta, batch):
        outputs = functional_call(net, bl.unflatten(net, theta), (batch[0],))
        return (outputs - batch[1]).square().mean()

    return loss


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in REFUSED for way in ("maml", "imaml") if (kind, way) != MAPPABLE],
)
def test_what_hypergradient_or_vmap_refuses_is_refused_in_a_sentence(tasks, kind, way):
    torch.manual_seed(0)
    (make, message), (_, support, query) = REFUSED[kind], tasks
    net = make()
    loss, lam, drawn = of(net), bl.flatten(net), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        if way == "maml":
            meta.maml(loss, lam, support, query, 2, 0.1)
        else:
            meta.imaml(loss, lam, lam.expand(5, -1), support, query, 9.0, 3)
    assert torch.equal(drawn, torch.get_rng_state())


def test_a_backward_without_a_derivative_is_right_where_none_is_taken(tasks):
    _, support, query = tasks
    torch.manual_seed(0)
    net = Between(lambda m, h: Once.apply(h))
    lam, same = bl.flatten(net), Between(lambda m, h: h.square())
    _, b = meta.maml(of(net), lam, support, query, 2, 0.1, first_order=True)
    _, truth = meta.maml(of(same), lam, support, query, 2, 0.1, first_order=True)
    assert torch.allclose(b, truth, rtol=1e-10)


@pytest.mark.parametrize("kind", ["attention", "lstm"])
def test_attention_has_second_derivatives_and_both_are_the_loop_over_tasks(tasks, kind):
    """By the package's unrolling, and its implicit hypergradient."""
    torch.manual_seed(0)
    net, (_, support, query) = Between(attend) if kind == "attention" else Recurrent(), tasks
    lam, loss, looped, solved = bl.flatten(net), of(net), 0.0, 0.0
    settings = torch.backends.cuda.flash_sdp_enabled()

    def displaced(lam, delta, batch):
        return loss(lam + delta, batch)

    def near(lam, theta, batch):
        return loss(theta, batch) + 4.5 * (theta - lam).square().sum()

    moved = bl.BilevelProblem(displaced, displaced)
    problem = bl.BilevelProblem(near, lambda _, theta, batch: loss(theta, batch))
    for i in range(5):
        one, judge = ((part[0][i], part[1][i]) for part in (support, query))
        solved += bl.hypergradient(problem, lam, lam, one, judge, bl.CG(3)) / 5
        if kind == "attention":
            start, sets = torch.zeros_like(lam), {"inner_batch": one, "outer_batch": judge}
            looped += bl.unrolled_hypergradient(moved, lam, start, 2, 0.1, **sets) / 5
    h = meta.imaml(loss, lam, lam.expand(5, -1), support, query, 9.0, 3)[1]
    assert (h - solved).norm() < 1e-8 * h.norm()
    if kind == "attention":
        h = meta.maml(loss, lam, support, query, 2, 0.1)[1]
        assert (h - looped).norm() < 1e-8 * h.norm()
    assert torch.backends.cuda.flash_sdp_enabled() == settings


def test_a_task_by_itself_is_computed_at_uses_1_2_4_and_8(tasks):
    lam, support, query = tasks
    counted, calls = [], 0

    def counting(theta, batch):
        nonlocal calls
        calls += 1
        return loss(theta, batch)

    for _ in range(9):
        before = calls
        meta.maml(counting, lam, support, query, 2, 0.1)
        counted.append(calls - before > 3)  # vmap calls it once for all tasks: T + 1
    assert counted == [True, True, False, True, False, False, False, True, False]


def test_a_gradient_that_is_rounding_alone_is_not_accused():
    """At a start that solves its tasks, terms of size 1 cancel."""
    x = torch.randn(3, 6, 4, generator=gen(7), dtype=torch.float64)
    lam = torch.randn(4, generator=gen(8), dtype=torch.float64)
    batch = x, x @ lam

    def linear(theta, batch):
        return (batch[0] @ theta - batch[1]).square().mean()

    meta.adapt(linear, lam, batch, 2, 0.1)
    assert meta.maml(linear, lam, batch, batch, 2, 0.1)[1].norm() < 1e-12


def test_a_fault_of_the_loss_itself_stays_what_it_is(tasks):
    lam, support, query = tasks
    whole = [True]

    def failing(theta, batch):
        if not whole:
            raise RuntimeError("the file is gone")
        return loss(theta, batch)

    for _ in range(3):
        meta.maml(failing, lam, support, query, 1, 0.1)
    whole.clear()
    with pytest.raises(RuntimeError, match="^the file is gone$"):
        meta.maml(failing, lam, support, query, 1, 0.1)


def test_a_generator_and_a_label_for_each_example_are_required():
    x, y, draws = torch.randn(6, 2), torch.arange(6) % 2, torch.Generator()
    for generator in (None, 0):
        with pytest.raises(TypeError, match="generator: got .*, expected a torch.Generator"):
            meta.sinusoids(generator, tasks=2, shots=1)
        with pytest.raises(TypeError, match="generator: got .*, expected a torch.Generator"):
            meta.few_shot((x, y), [0, 1], generator, 2, 2, 1, 1)
    one_hot = torch.nn.functional.one_hot(y)
    with pytest.raises(ValueError, match=r"data: y has shape \(6, 2\), expected \(6,\)"):
        meta.few_shot((x, one_hot), [0, 1], draws, 2, 2, 1, 1)


def test_what_comes_back_holds_no_graph():
    """Also where the loss is made of something that asks for a gradient."""
    net = torch.ones(1, requires_grad=True)
    support = query = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])

    def loss(theta, batch):
        return (net * theta - batch[1]).square().sum() / 2

    lam, theta = torch.zeros(1), torch.tensor([[0.5], [1.5]])
    value, h = meta.maml(loss, lam, support, query, steps=2, lr=0.5)
    again, g, info = meta.imaml(loss, lam, theta, support, query, tau=1.0, iters=1)
    for part in (value, h, again, g, info.residual, info.curvature):
        assert not part.requires_grad
