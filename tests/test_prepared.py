"""A prepared point serves several solves and J v; what changes meanwhile is followed or refused."""

import pytest
import torch
from test_risk import case, error, problem_of
from torch import nn

import bilevel_lite as bl
from bilevel_lite.kfac import kfac_operator
from bilevel_lite.products import cross_vp
from bilevel_lite.solvers import Solver

MAKE = {
    "Direct": lambda: bl.Direct(damping=0.1),
    "CG": lambda: bl.CG(3, damping=0.1),
    "CG GGN": lambda: bl.CG(3, damping=0.1, curvature="ggn"),
    "CG, KFAC": lambda: bl.CG(3, damping=1.0, precondition=bl.KFAC(0.1)),
    "CGNormal": lambda: bl.CGNormal(3),
    "Neumann": lambda: bl.Neumann(3, 0.1),
    "Identity": lambda: bl.Identity(0.1),
    "Richardson": lambda: bl.KFACRichardson(2, warm_start=False),
    "KFAC": lambda: bl.KFAC(0.1),
    "KFAC every": lambda: bl.KFAC(0.1, "empirical", every=2, fixed_batch=True),
    "EKFAC": lambda: bl.EKFAC(0.1, "exact"),
}


def directions(c):
    g = torch.Generator().manual_seed(3)
    return [torch.randn(c.theta.shape, generator=g, dtype=c.theta.dtype) for _ in range(2)]


@pytest.mark.parametrize("name", MAKE)
def test_two_solves_and_j_v_of_the_one_that_is_asked_for(name):
    c = case("weights")
    at = problem_of(c), c.lam, c.theta, c.batch
    prepared = MAKE[name]().prepare(*at, cross=True)
    one, two = directions(c)
    made = [prepared.solve(b)[0] for b in (one, two)]
    for b, v in zip((one, two), made, strict=True):
        assert error(v, MAKE[name]().solve(*at, b)[0]) < 1e-12
    jv, how = prepared.cross(made[0])
    assert how and error(jv, cross_vp(c.risk, *at[1:], made[0], "double_backward")) < 1e-10


def test_j_v_of_a_v_that_was_written_into_is_of_what_it_is_now():
    c = case("weights")
    at = problem_of(c), c.lam, c.theta, c.batch
    prepared = bl.KFAC(0.1).prepare(*at, cross=True, once=True)
    v, _ = prepared.solve(directions(c)[0])
    assert prepared.cross(v)[1] == "KFAC's own pass"
    v.mul_(2)
    jv, how = prepared.cross(v)
    assert how == "forward mode"
    assert error(jv, cross_vp(c.risk, *at[1:], v, "double_backward")) < 1e-10


def test_what_serves_once_serves_once():
    c = case("weights")
    at = problem_of(c), c.lam, c.theta, c.batch
    b = directions(c)[0]
    prepared = bl.KFAC(0.1).prepare(*at, once=True)
    prepared.solve(b)
    with pytest.raises(ValueError, match="once=True serves one solve, and this is the second"):
        prepared.solve(b)
    prepared = bl.CG(2).prepare(*at, cross=True)
    v, _ = prepared.solve(b)
    prepared.cross(v)
    for again in (lambda: prepared.cross(v), lambda: prepared.solve(b)):
        with pytest.raises(ValueError, match="solver: J v was read .* prepare anew"):
            again()


def test_kept_blocks_follow_the_damping_and_the_l2():
    c = case("weights")
    kept, fresh = bl.KFAC(0.1, "exact", every=5), bl.KFAC(10.0, "exact")
    at = problem_of(c), c.lam, c.theta, c.batch, directions(c)[0]
    kept.solve(*at)
    kept.damping = 10.0
    assert error(kept.solve(*at)[0], fresh.solve(*at)[0]) < 1e-12
    c.risk.l2 *= 3
    assert error(kept.solve(*at)[0], fresh.solve(*at)[0]) < 1e-12


# ------------------------------------------------------------------ a stranger's solver


class Twice(bl.CG):
    """One option more, and another solution."""

    factor: float = 2.0

    def _solve(self, at, b):
        info = super()._solve(at, b)
        info.solution = self.factor * info.solution
        return info


class Kronecker(bl.KFAC):
    def _solve(self, at, b):
        return bl.solvers.SolveInfo(3 * b, 0, 0)


def test_a_solver_of_ones_own():
    c = case("weights")
    at = problem_of(c), c.lam, c.theta, c.batch
    b = directions(c)[0]
    plain = bl.CG(3, damping=0.1).solve(*at, b)[0]
    assert error(Twice(3, damping=0.1, factor=4.0).solve(*at, b)[0], 4 * plain) < 1e-12
    assert torch.equal(Kronecker(0.1).solve(*at, b)[0], 3 * b)
    h = bl.hypergradient(*at, None, solver=Twice(3, damping=0.1))
    assert error(h, 2 * bl.hypergradient(*at, None, solver=bl.CG(3, damping=0.1))) < 1e-12
    with pytest.raises(TypeError, match="Late: overrides solve, which hypergradients do not call"):

        class Late(Solver):
            def solve(self, *args):
                return args


# ------------------------------------------------------------------ hooks of a risk


def counting(kind):
    calls, g = [], torch.Generator().manual_seed(0)

    def weight(lam, batch):
        calls.append(1)
        return torch.sigmoid(lam[batch[2]]) * (1 + 0.3 * len(calls))

    def drawing(lam, batch):
        return torch.sigmoid(lam[batch[2]]) * torch.rand(len(batch[2]), dtype=lam.dtype)

    def own(lam, batch):
        return torch.sigmoid(lam[batch[2]]) * torch.rand(1, generator=g, dtype=lam.dtype)

    def noisy(lam, batch):
        x, *more = batch
        return (x + 0.1 * torch.randn(x.shape, generator=g, dtype=x.dtype), *more)

    hooks = {"counts": weight, "draws": drawing, "draws, its own": own}
    return {"inputs": noisy} if kind == "inputs" else {"weight": hooks[kind]}


def test_a_mask_that_is_another_at_each_call():
    """It leaves positions out of A, and of nothing else."""
    c, calls = case("positions"), []

    def mask(batch):
        calls.append(1)
        real = batch[1] != -100
        real[1, 3] = len(calls) % 2 == 0  # has no loss term: real or padding, both may be said
        return real

    c.risk.mask = mask
    with pytest.raises(ValueError, match="weight, inputs or mask: has another value"):
        bl.hypergradient(problem_of(c), c.lam, c.theta, c.batch, None, bl.KFAC(0.1))
    alone = bl.WeightedRisk(c.risk.model, mask=mask)
    with pytest.raises(ValueError, match="weight, inputs or mask: has another value"):
        kfac_operator(alone, c.lam, c.theta, c.batch)


@pytest.mark.parametrize("kind", ["counts", "draws", "draws, its own", "inputs"])
@pytest.mark.parametrize("name", MAKE)
def test_weights_and_inputs_that_are_others_at_each_call(name, kind):
    c = case("weights")
    hook = {"weight": lambda lam, batch: torch.sigmoid(lam[batch[2]]), **counting(kind)}
    risk = bl.WeightedRisk(c.risk.model, c.risk.loss, l2=0.1, **hook)
    problem = bl.BilevelProblem(risk, bl.WeightedRisk(c.risk.model, c.risk.loss))
    with pytest.raises(ValueError, match="another value when|draws random numbers"):
        bl.hypergradient(problem, c.lam, c.theta, c.batch, c.batch, MAKE[name]())


# ------------------------------------------------------------------ surroundings


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.o, self.calls = nn.Linear(3, 4), 0

    def forward(self, x):
        self.calls += 1
        return self.o(x) * (1 + 0.5 * self.calls)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_that_counts_in_low_precision(dtype):
    torch.manual_seed(0)
    model = Counting().to(dtype)
    x = 3 * torch.randn(6, 3).to(dtype)  # large outputs: the loss follows them
    y, index = torch.arange(6) % 4, torch.arange(6)
    risk = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.1)
    at = bl.BilevelProblem(risk, risk), torch.ones(6, dtype=dtype), bl.flatten(model), (x, y, index)
    with pytest.raises(ValueError, match="has another value"):
        bl.hypergradient(*at, at[-1], bl.CG(2))


class OfTokens(nn.Module):
    """A frozen encoder in eval, which torch would send along its fast path, and a head."""

    def __init__(self):
        super().__init__()
        self.e = nn.Embedding(9, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.t, self.o = nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)
        self.e.requires_grad_(False), self.t.requires_grad_(False)

    def forward(self, x):
        return self.o(self.t(self.e(x), src_key_padding_mask=x == 0).mean(1))


def test_b_and_h_of_a_frozen_encoder_are_of_one_function():
    torch.manual_seed(0)
    model = OfTokens().eval()
    x = torch.randint(1, 9, (6, 5))
    x[:, 3:] = 0
    batch = x, torch.arange(6) % 3, torch.arange(6)
    risk = bl.WeightedRisk(model, weight=lambda lam, b: torch.sigmoid(lam[b[2]]), l2=0.1)
    problem, theta = bl.BilevelProblem(risk, bl.WeightedRisk(model)), bl.flatten(model)
    at = problem, torch.linspace(-1, 1, 6), theta, batch, batch
    was = torch.backends.mha.get_fastpath_enabled()
    made = {}
    for on in (True, False):
        torch.backends.mha.set_fastpath_enabled(on)
        for name in ("Direct", "KFAC"):
            made[name, on] = bl.hypergradient(*at, MAKE[name]())
        made["unrolled", on] = bl.unrolled_hypergradient(
            *at[:3], 3, 0.1, inner_batch=batch, outer_batch=batch
        )
        assert torch.backends.mha.get_fastpath_enabled() is on
    torch.backends.mha.set_fastpath_enabled(was)
    for name in ("Direct", "KFAC", "unrolled"):
        assert error(made[name, True], made[name, False]) < 1e-12


def test_a_module_as_a_loss_is_watched():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4))

        def forward(self, lam, theta, batch):
            p = "parametrizations.weight.original"
            outputs = torch.func.functional_call(self.m, {p: theta.view(4, 3)}, (batch[0],))
            return (lam * outputs.square().sum(0)).sum()

    loss, theta = Loss(), torch.ones(12)
    at = bl.BilevelProblem(loss, lambda lam, theta, batch: theta.square().sum()), torch.ones(4)
    with pytest.raises(ValueError, match="spectral_norm in training mode"):
        bl.hypergradient(*at, theta, (torch.randn(6, 3),), None, bl.CG(2))


@pytest.mark.parametrize("name", MAKE)
def test_a_point_that_was_written_into_since_is_refused(name):
    """H and J are made when they are asked for: of another point, they would be of no use."""
    c = case("weights")
    theta, lam = c.theta.clone(), c.lam.clone()
    (b, _), written = directions(c), pytest.raises(ValueError, match="prepare: .* written into")
    for tensor in (theta, lam, c.batch[0]):
        prepared = MAKE[name]().prepare(problem_of(c), lam, theta, c.batch, cross=True)
        tensor.mul_(1.0)
        with written:
            prepared.solve(b)
        with written:
            prepared.cross(b)
