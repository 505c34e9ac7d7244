"""Where and with what the package is called: gradients off, threads, float types, copies."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from together import solve_and_cross
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel_lite as bl
from bilevel_lite import algorithms, data, products
from bilevel_lite.functional import spread
from bilevel_lite.params import predict
from bilevel_lite.population import Member, Teacher, evolve
from bilevel_lite.surroundings import ordinary


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y, INDEX = numbers(0, 12, 3), torch.arange(12) % 4, torch.arange(12)
BATCH = (X, Y, INDEX)
MODEL = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
for _i, _p in enumerate(MODEL.parameters()):
    _p.data = 0.5 * numbers(10 + _i, *_p.shape)
LAM, THETA = numbers(1, 12), bl.flatten(MODEL)


def sigma(lam, batch):
    return torch.sigmoid(lam[batch[2]])


def weighted(model=MODEL):
    inner = bl.WeightedRisk(model, weight=sigma, l2=0.5)
    return bl.BilevelProblem(inner, bl.WeightedRisk(model))


def saba(problem, lam, theta, inner_batch, outer_batch, **rates):
    batches = [inner_batch, inner_batch], [outer_batch]
    return bl.SABA(problem, lam, theta, 0.1, *batches, torch.Generator().manual_seed(0), **rates)


METHODS = {
    "AID": (bl.AID, {"solver": bl.CG(3), "inner_steps": 2}),
    "AID, KFAC": (bl.AID, {"solver": bl.KFAC(0.1), "inner_steps": 2}),
    "ITD": (bl.ITD, {"inner_steps": 3}),
    "ITD, forward": (bl.ITD, {"inner_steps": 3, "mode": "forward"}),
    "AmIGO": (bl.AmIGO, {"inner_steps": 2, "linear_steps": 2, "linear_lr": 0.1}),
    "StocBiO": (bl.StocBiO, {"inner_steps": 2}),
    "MRBO": (bl.MRBO, {"solver": bl.Neumann(2, 0.1)}),
    "SOBA": (bl.SOBA, {"linear_lr": 0.1}),
    "SABA": (saba, {}),
    "NBO": (bl.NBO, {"linear_lr": 0.1}),
    "NHGD": (bl.NHGD, {"inner_steps": 2}),
    "NHGD, KFAC": (
        bl.NHGD,
        {"inner_steps": 2, "kfac": bl.KFAC(0.1, fisher="empirical", ema=0.5)},
    ),
    "SAMA": (bl.SAMA, {"inner_steps": 2}),
    "BSG1": (bl.BSG1, {}),
    "BOME": (bl.BOME, {"copy_steps": 2}),
    "BVFSM": (bl.BVFSM, {"inner_steps": 2}),
    "F2SA": (bl.F2SA, {"inner_steps": 2}),
}


def make(name, problem=None, lam=LAM, theta=THETA, inner=BATCH, outer=BATCH, **common):
    cls, options = METHODS[name]
    common = {"inner_lr": 0.1, "outer_lr": 0.1, **copy.deepcopy(options), **common}
    return cls(problem or weighted(), lam, theta, inner_batch=inner, outer_batch=outer, **common)


def test_all_methods_are_here():
    named = {cls.__name__ for cls, _ in METHODS.values()} - {"saba"} | {"SABA"}
    assert named == set(algorithms.METHODS)


def entries(lam, theta, batch):
    """Every entry point that differentiates, by name; each gives one tensor."""
    p = weighted()
    g = p.inner_loss

    def through_audit():
        sampler = data.Batches(X, Y, 6, torch.Generator().manual_seed(0))
        report = bl.audit(p, lam, theta, batch, batch, [bl.CG(2)], solve_inner, sampler, draws=2)
        return report.rows[0].vectors["inner"]

    def through_check():
        report = bl.check(
            p, lam, theta, batch, batch, bl.CG(3), solve_inner, num_directions=1, eps=1e-3,
            generator=torch.Generator().manual_seed(0), verbose=False,
        )  # fmt: skip
        return report.info.v

    def solve_inner(lam):  # the user's own autograd
        at = theta.clone().requires_grad_()
        return at.detach() - 0.1 * torch.autograd.grad(g(lam, at, BATCH), at)[0]

    solvers = {
        "Direct": bl.Direct(), "CG": bl.CG(3), "CGNormal": bl.CGNormal(3),
        "GGN": bl.CG(3, curvature="ggn"), "Neumann": bl.Neumann(3, 0.1),
        "Identity": bl.Identity(0.1), "KFAC": bl.KFAC(0.1), "EKFAC": bl.EKFAC(0.1),
        "PCG": bl.CG(3, precondition=bl.KFAC(0.1)),
    }  # fmt: skip
    found = {
        name: lambda s=s: bl.hypergradient(p, lam, theta, batch, batch, s)
        for name, s in solvers.items()
    }
    for mode in ("reverse", "forward"):
        found[mode] = lambda mode=mode: bl.unrolled_hypergradient(
            p, lam, theta, 3, 0.1, mode, inner_batch=batch, outer_batch=batch
        )
    return {
        **found,
        "differences": lambda: bl.finite_difference_hypergradient(p, lam, solve_inner, 1e-4, batch),
        "check": through_check,
        "audit": through_audit,
        "solve": lambda: bl.Direct().solve(p, lam, theta, batch, theta)[0],
        "solve_and_cross": lambda: solve_and_cross(bl.KFAC(0.1), p, lam, theta, batch, theta)[1],
        "inverse": lambda: bl.KFAC(0.1).inverse(g, lam, theta, batch)(theta),
        "gradient": lambda: products.gradient(g, lam, theta, batch)[1],
        "theta_gradient": lambda: products.theta_gradient(g, lam, theta, batch)[1],
        "lam_gradient": lambda: products.lam_gradient(g, lam, theta, batch)[1],
        "hvp": lambda: products.hvp_operator(g, lam, theta, batch)(theta),
        "first_and_second": lambda: products.first_and_second(g, lam, theta, batch, theta)[2],
        "update_vjp": lambda: products.update_vjp(g, lam, theta, batch, theta)[1],
        "update_operator": lambda: products.update_operator(g, lam, theta, batch)[1](lam, theta),
    }


# ------------------------------------------------------------------ gradients off

CONTEXTS = pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])


@CONTEXTS
@pytest.mark.parametrize("name", entries(LAM, THETA, BATCH))
def test_entry_points_compute_where_gradients_are_off(name, off):
    truth = entries(LAM, THETA, BATCH)[name]()
    with off():
        assert torch.equal(entries(LAM, THETA, BATCH)[name](), truth)
        here = LAM.clone(), THETA.clone()  # inference_mode makes another kind of tensor
        got = entries(*here, BATCH)[name]()
        assert torch.equal(got, truth) and (name == "inverse" or not got.is_inference())
    assert torch.equal(entries(*here, BATCH)[name](), truth)


@CONTEXTS
def test_operators_are_applied_where_gradients_are_off(off):
    at = weighted().inner_loss, LAM, THETA, BATCH
    apply, (_, along) = products.hvp_operator(*at), products.update_operator(*at)
    truth = apply(THETA), along(LAM, THETA)
    with off():
        got = apply(THETA.clone()), along(LAM.clone(), THETA.clone())
    assert all(map(torch.equal, got, truth))
    assert not any(one.is_inference() for one in got)


@pytest.mark.parametrize(
    "name", ["CG", "KFAC", "GGN", "reverse", "forward", "solve", "differences"]
)
def test_batches_made_under_inference_mode_are_taken(name):
    truth = entries(LAM, THETA, BATCH)[name]()
    with torch.inference_mode():
        batch = tuple(part.clone() for part in BATCH)
        assert torch.equal(entries(LAM, THETA, batch)[name](), truth)
    assert torch.equal(entries(LAM, THETA, batch)[name](), truth)


def test_a_product_names_inference_mode_where_it_cannot_pass():
    with torch.inference_mode():
        batch = tuple(part.clone() for part in BATCH)
    first = products.gradient, products.theta_gradient, products.lam_gradient
    for product in (*first, products.hvp_operator):
        with pytest.raises(ValueError, match="made under torch.inference_mode, .* clone it"):
            product(weighted().inner_loss, LAM, THETA, batch)


def test_only_tensors_of_inference_mode_are_copied():
    with torch.inference_mode():
        other = torch.ones(2)
    mixed = {"x": [X, other], "data": data.Dataset("toy", X, Y, X, Y, 4, (1, 3)), "n": 3}
    got = ordinary(mixed)
    assert got["x"][0] is X and got["data"] is mixed["data"]
    assert torch.equal(got["x"][1], other) and not got["x"][1].is_inference()
    assert ordinary(BATCH) is BATCH


@CONTEXTS
@pytest.mark.parametrize("name", METHODS)
def test_methods_step_where_gradients_are_off(name, off):
    twin = make(name)
    truth = [twin.step().hypergradient for _ in range(3)]
    with off():
        here = [value.clone() for value in (LAM, THETA)]
        batch = tuple(part.clone() for part in BATCH)
        method = make(name, None, *here, batch, batch)
        got = [method.step().hypergradient for _ in range(2)]
        resumed = make(name, None, *here, batch, batch)
        resumed.load_state_dict(method.state_dict())
        assert not method.state_dict()["lam"].is_inference()
    got.append(method.step().hypergradient)  # made inside, stepped outside
    assert all(map(torch.equal, got, truth))
    assert torch.equal(resumed.step().hypergradient, truth[2])
    assert torch.equal(method.lam, twin.lam) and not method.lam.is_inference()


# ------------------------------------------------------------------ float types

PAIRS = [
    (torch.float32, torch.float64, 1e-4),
    (torch.float64, torch.float32, 1e-4),
    (torch.float16, torch.float32, 2e-2),
    (torch.bfloat16, torch.float64, 1e-1),
]


@pytest.mark.parametrize(("of_lam", "of_theta", "rtol"), PAIRS)
@pytest.mark.parametrize("shape", [(12,), ()])
def test_a_hypergradient_is_like_lam(of_lam, of_theta, rtol, shape):
    model = copy.deepcopy(MODEL).to(of_theta)

    def weight(lam, batch):
        return torch.sigmoid(lam).expand(len(batch[1])) * 1.0

    def problem(model):
        risk = bl.WeightedRisk(model, weight=weight, l2=0.5)
        return bl.BilevelProblem(risk, bl.WeightedRisk(model))

    lam = LAM[: 12 if shape else 1].reshape(shape)
    truth, batch = problem(MODEL), (X.to(of_theta), Y, INDEX)
    at = problem(model), lam.to(of_lam), THETA.to(of_theta)

    def like_lam(got, expected, rtol=rtol):
        assert (got.dtype, got.shape) == (of_lam, lam.shape)
        assert float((got.double() - expected).norm()) <= rtol * float(expected.norm())

    for s in (bl.Direct(), bl.CG(3), bl.Neumann(3, 0.1), bl.Identity(0.1), bl.KFAC(0.1)):
        expected = bl.hypergradient(truth, lam, THETA, BATCH, BATCH, copy.deepcopy(s))
        like_lam(bl.hypergradient(*at, batch, batch, s), expected)
    for mode in ("reverse", "forward"):
        options = {"steps": 3, "lr": 0.1, "mode": mode}
        like_lam(
            bl.unrolled_hypergradient(*at, **options, inner_batch=batch, outer_batch=batch),
            bl.unrolled_hypergradient(
                truth, lam, THETA, **options, inner_batch=BATCH, outer_batch=BATCH
            ),
        )
    direct = bl.finite_difference_hypergradient(
        bl.BilevelProblem(lambda *_: 0, lambda lam, t, _: 0.25 * lam.sum() + t.sum()),
        at[1], lambda lam: at[2], eps=0.25,
    )  # fmt: skip
    like_lam(direct, torch.full(shape, 0.25))
    for name in METHODS:
        twin, method = make(name, truth, lam), make(name, *at, batch, batch)
        expected, got = twin.step(), method.step()
        # the differences that some methods take leave little of 8 bits
        rough = {} if of_lam.itemsize > 2 else {"rtol": 1e9}
        like_lam(got.hypergradient, expected.hypergradient, **rough)
        assert (method.lam.dtype, method.theta.dtype) == (of_lam, of_theta)


def test_audit_and_check_take_two_float_types():
    lam = LAM.float()
    report = bl.audit(weighted(), lam, THETA, BATCH, BATCH, [bl.CG(3)], lambda lam: THETA)
    assert report.truth.dtype == torch.float32
    sum_of_parts = sum(report.rows[0].vectors.values())
    assert float(sum_of_parts.norm() / report.truth.norm()) == pytest.approx(
        report.rows[0].relative_error, rel=1e-4
    )
    assert bl.check(weighted(), lam, THETA, BATCH, BATCH, bl.CG(40), verbose=False).passed


def test_differences_lost_in_rounding_are_refused():
    problem = bl.BilevelProblem(lambda *_: 0, lambda lam, t, _: lam.sum())
    lam = torch.ones(2, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="eps: got 1e-05, which is lost .* torch.bfloat16"):
        bl.finite_difference_hypergradient(problem, lam, lambda lam: THETA, 1e-5)


# ------------------------------------------------------------------ forward mode


def losses():
    y = numbers(2, 12)
    return {
        "mse": lambda t: F.mse_loss(X @ t[:3], y),
        "huber": lambda t: F.smooth_l1_loss(X @ t[:3], y),
        "cross_entropy": lambda t: F.cross_entropy(X @ t.view(3, 4), Y),
        "layer_norm": lambda t: (
            F.layer_norm(X @ t.view(3, 4), (4,)).square().mul(y[:, None]).mean()
        ),
        "batch_norm": lambda t: (
            F.batch_norm(X @ t.view(3, 4), None, None, training=True).pow(3).mean()
        ),
    }


@pytest.mark.parametrize("name", losses())
def test_forward_mode_equals_the_graph_for_operations_without_a_forward_rule(name):
    lam, theta = torch.tensor([0.3, -0.2]), numbers(3, 12)

    def inner(lam, t, _):
        return losses()[name](t * lam.sum().exp()) + lam[0].exp() * t.square().sum()

    def outer(lam, t, _):
        return (t - 1).square().sum() + lam.square().sum()

    at = lam.clone().requires_grad_()
    t = theta.clone().requires_grad_()
    for _ in range(4):
        t = t - 0.1 * torch.autograd.grad(inner(at, t, None), t, create_graph=True)[0]
    truth = torch.autograd.grad(outer(at, t, None), at)[0]
    h = bl.unrolled_hypergradient(
        bl.BilevelProblem(inner, outer), lam, theta, 4, 0.1, mode="forward"
    )
    assert float((h - truth).norm() / truth.norm()) < 1e-12


def test_forward_mode_evaluates_a_step_once():
    calls = []

    def inner(lam, t, _):
        calls.append(1)
        return (lam.exp() * t.square()).sum()

    problem = bl.BilevelProblem(inner, lambda lam, t, _: t.sum())
    bl.unrolled_hypergradient(problem, numbers(1, 5), numbers(2, 5), 4, 0.1, mode="forward")
    assert len(calls) == 4


# ------------------------------------------------------------------ attention


def test_products_pass_attention_and_leave_its_kernels_as_they_were():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(self.attend(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model = Attends().eval()
    lam, theta, batch = LAM, bl.flatten(model), (numbers(4, 12, 3, 4), Y, INDEX)
    g, v = weighted(model).inner_loss, numbers(6, len(theta))
    at = [t.clone().requires_grad_() for t in (lam, theta)]
    with sdpa_kernel(SDPBackend.MATH):
        slope = torch.autograd.grad(g(*at, batch), at, create_graph=True)
        jv, hv = torch.autograd.grad(slope[1], at, v, retain_graph=True)
        both = torch.autograd.grad(slope, at[1], (lam, v))[0]
    flags = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    got = (
        products.hvp(g, lam, theta, batch, v),
        *products.update_vjp(g, lam, theta, batch, v),
        products.update_operator(g, lam, theta, batch)[1](lam, v),
    )
    for one, truth in zip(got, (hv, jv, hv, both), strict=True):
        assert float((one - truth).norm() / truth.norm()) < 1e-12
    after = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    assert after == flags == (True, True)
    problem, options = weighted(model), {"inner_batch": batch, "outer_batch": batch}
    back, forth = (
        bl.unrolled_hypergradient(problem, lam, theta, 3, 0.1, mode, **options)
        for mode in ("reverse", "forward")
    )
    assert float((back - forth).norm() / back.norm()) < 1e-12


# ------------------------------------------------------------------ what the caller owns


class Renormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(7, 4, max_norm=0.5), nn.Linear(4, 4)

    def forward(self, x):
        return self.out(torch.tanh(self.table(x)).mean(1))


TOKENS = (torch.arange(36).view(12, 3) % 7, Y, INDEX)


def attempts(problem, lam, theta, batch):
    for solver in (
        bl.Direct(), bl.CG(2), bl.CGNormal(2), bl.CG(2, curvature="ggn"), bl.Neumann(2, 0.1),
        bl.Identity(0.1), bl.KFAC(0.1), bl.EKFAC(0.1), bl.CG(2, precondition=bl.KFAC(0.1)),
    ):  # fmt: skip
        yield lambda s=solver: bl.hypergradient(problem, lam, theta, batch, batch, s)
    for mode in ("reverse", "forward"):
        yield lambda mode=mode: bl.unrolled_hypergradient(
            problem, lam, theta, 2, 0.1, mode, inner_batch=batch, outer_batch=batch
        )
    yield lambda: bl.check(problem, lam, theta, batch, batch, bl.CG(2), lambda lam: theta)
    yield lambda: bl.audit(problem, lam, theta, batch, batch, [bl.CG(2)], lambda lam: theta)
    yield lambda: bl.finite_difference_hypergradient(
        problem, lam, lambda lam: theta, outer_batch=batch
    )
    for loss in (problem.inner_loss, problem.outer_loss):
        yield lambda loss=loss: products.gradient(loss, lam, theta, batch)
        yield lambda loss=loss: products.theta_gradient(loss, lam, theta, batch)
        yield lambda loss=loss: products.lam_gradient(loss, lam, theta, batch)
        yield lambda loss=loss: products.hvp(loss, lam, theta, batch, theta)
    for name in METHODS:
        yield lambda name=name: make(name, problem, lam, theta, batch, batch).step()


def test_a_model_that_writes_into_its_weights_is_refused_and_theta_kept():
    model = Renormed()
    model.table.weight.data = 3 * numbers(5, 7, 4)
    lam, theta = LAM.clone(), bl.flatten(model)
    kept = lam.clone(), theta.clone()
    for attempt in attempts(weighted(model), lam, theta, TOKENS):
        with pytest.raises(ValueError, match="changes theta in place, .* max_norm=None"):
            attempt()
        assert torch.equal(lam, kept[0]) and torch.equal(theta, kept[1])


def test_a_loss_that_writes_into_lam_is_refused_and_lam_kept():
    def clamped(lam, theta, batch):
        with torch.no_grad():
            lam.clamp_(-0.1, 0.1)
        return (lam.exp().sum() * theta.square()).sum()

    lam, theta = LAM.clone(), numbers(2, 4)
    for attempt in attempts(bl.BilevelProblem(clamped, clamped), lam, theta, None):
        with pytest.raises((ValueError, TypeError), match="changes lam in place|WeightedRisk"):
            attempt()
        assert torch.equal(lam, LAM)


def test_inputs_are_left_alone():
    lam, theta, batch = LAM.clone(), THETA.clone(), tuple(part.clone() for part in BATCH)
    for attempt in attempts(weighted(), lam, theta, batch):
        attempt()
    for now, before in zip((lam, theta, *batch), (LAM, THETA, *BATCH), strict=True):
        assert torch.equal(now, before) and now.grad is None and not now.requires_grad


# ------------------------------------------------------------------ threads


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["forward", "reverse", "BOME", "ITD, forward", "SOBA"])
def test_threads_give_the_same_numbers(name, shared):
    def compute(model):
        if name in METHODS:
            method = make(name, weighted(model))
            return [method.step().hypergradient for _ in range(3)][-1]
        return bl.unrolled_hypergradient(
            weighted(model), LAM, THETA, 6, 0.1, name, inner_batch=BATCH, outer_batch=BATCH
        )

    truth, wrong = compute(MODEL), []
    models = [MODEL if shared else copy.deepcopy(MODEL) for _ in range(3)]

    def work(model):
        try:
            for _ in range(8):
                torch.randn(10)  # the generators are everyone's
                if not torch.allclose(compute(model), truth, rtol=1e-12, atol=0):
                    wrong.append("another number")
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------ copies


def adam(tensors):
    return torch.optim.Adam(tensors, lr=0.05)


def halved(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def clamped(lam):
    return lam.clamp(-1, 1)


@pytest.mark.filterwarnings("error:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_a_used_method_goes_on_by_itself(name, copied):
    common = {"outer_optimizer": adam, "outer_scheduler": halved, "projection": clamped}
    g = torch.Generator().manual_seed(2)
    sampler = BATCH if name == "SABA" else data.Batches(X, Y, 5, g)
    method = make(name, inner=sampler, outer=sampler, **common)
    for _ in range(2):
        method.step()
    twin = copied(method)
    ours = [method.step().hypergradient for _ in range(3)]
    here = method.lam.clone(), method.theta.clone()
    theirs = [twin.step().hypergradient for _ in range(3)]
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(twin.lam, here[0]) and torch.equal(twin.theta, here[1])
    twin.step()
    assert torch.equal(method.lam, here[0])  # nothing is shared


def test_reports_can_be_pickled_and_copied():
    at = weighted(), LAM, THETA, BATCH, BATCH
    _, info = bl.hypergradient(*at, bl.KFAC(0.1), return_info=True)
    _, unrolled = bl.unrolled_hypergradient(
        *at[:3], 2, 0.1, inner_batch=BATCH, outer_batch=BATCH, return_info=True
    )
    step = make("AID").step()
    checked = bl.check(*at, bl.CG(3), verbose=False)
    audited = bl.audit(*at, [bl.CG(3)])
    for report in (info, info.solve, unrolled, step, checked, audited):
        for twin in (pickle.loads(pickle.dumps(report)), copy.deepcopy(report)):
            assert str(twin) == str(report)


# ------------------------------------------------------------------ compiled models


def test_a_compiled_model_is_its_module():
    compiled = torch.compile(MODEL, backend="eager")
    assert torch.equal(bl.flatten(compiled), THETA)
    assert torch.equal(predict(compiled, THETA, X), predict(MODEL, THETA, X))
    for solver in (bl.CG(3), bl.Identity(0.1), bl.CG(3, curvature="ggn"), bl.KFAC(0.1)):
        h = bl.hypergradient(weighted(compiled), LAM, THETA, BATCH, BATCH, copy.deepcopy(solver))
        truth = bl.hypergradient(weighted(), LAM, THETA, BATCH, BATCH, solver)
        assert torch.equal(h, truth)


def test_draws_of_a_cpu_generator_are_made_there_whatever_the_default_device():
    model = nn.Linear(3, 2)
    x, y, index = torch.randn(12, 3), torch.arange(12) % 2, torch.arange(12)
    inner = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.1)
    problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
    at, near, far = (problem, torch.ones(12), bl.flatten(model)), (x, y, index), (x, y)
    draws = torch.Generator().manual_seed(0)
    rates = {"inner_lr": 0.1, "outer_lr": 0.1}
    members = [Member(torch.ones(1, device="cpu") * k, loss=float(k)) for k in range(4)]

    def still(member):
        return Member(member.lam, loss=float(member.lam.sum()))

    torch.set_default_device("meta")  # stands for a GPU that the data are not on
    try:
        for solver in (bl.CG(2), bl.KFAC(0.1), bl.KFAC(0.1, fisher="exact"), bl.EKFAC(0.1)):
            assert bl.hypergradient(*at, near, far, solver).device.type == "cpu"
        bl.SABA(*at, 0.1, [near], [far], draws, **rates).step()
        assert bl.data.Batches(x, y, 4, draws).draw()[0].device.type == "cpu"
        evolve(members, still, 3, draws)
        Teacher(2, 3, 0.1, draws)(torch.ones(2, device="cpu"))
        basis = spread(lambda x: x, 2)
        assert basis(x).device.type == "cpu"
        for pair in (
            bl.meta.sinusoids(draws, 2, 3),
            bl.meta.few_shot((x, y), [0, 1], draws, 2, 2, 1, 1),
        ):
            assert pair[0][0].device.type == "cpu"
        assert bl.data.corrupt_labels(y, 0.5, 2, draws)[0].device.type == "cpu"
        images = torch.zeros(2, 1, 8, 8, device="cpu")
        assert bl.data.crop_and_flip(images, draws).device.type == "cpu"
    finally:
        torch.set_default_device(None)
