"""Recorded steps have the numbers of the plain path; what a recording would freeze is not recorded.

Recordings are made by `pretend_graphs`, which repeats a call's operators as a CUDA graph does.
"""

import copy
import pickle

import pytest
import torch
from pretend_graphs import PretendGraphs
from torch import nn

import bilevel_lite as bl
from bilevel_lite import kronecker, recorded
from bilevel_lite.data import Batches
from bilevel_lite.refuse import NotFinite

F64 = torch.float64


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Record on the CPU; count captures and replays of this test alone."""
    counting = type("Counting", (PretendGraphs,), {"captured": 0, "replayed": 0})
    monkeypatch.setitem(recorded.RECORDERS, "cpu", counting)
    monkeypatch.delenv("BILEVEL_LITE_GRAPHS", raising=False)
    monkeypatch.setattr(kronecker, "in_batches", True)  # KFAC as on another device
    monkeypatch.setattr(kronecker, "in_numpy", False)  # what torch does not see is not recorded
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield counting
    torch.set_default_dtype(before)


def build(name):
    torch.manual_seed(0)
    if name == "linear":
        return nn.Sequential(nn.Linear(6, 3))
    if name == "mlp":
        return nn.Sequential(
            nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3)
        )
    conv = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*conv).eval()


def weight(lam, batch):
    return torch.sigmoid(lam[batch[2]])


def method(name="mlp", solver=None, model=None, n=24, batch_size=8, **options):
    model = build(name) if model is None else model
    g = torch.Generator().manual_seed(1)
    shape = (1, 2, 3) if name == "conv" else (6,)
    x, y = torch.randn(n, *shape, generator=g), torch.randint(3, (n,), generator=g)
    draws = torch.Generator().manual_seed(2)
    inner, outer = Batches(x, y, batch_size, draws, 3), Batches(x.flip(0), y.flip(0), 6, draws, 3)
    problem = bl.BilevelProblem(
        bl.WeightedRisk(model, weight=weight, l2=1e-2), bl.WeightedRisk(model)
    )
    lam = torch.linspace(-1, 1, n)
    options = {"inner_lr": 0.1, "outer_lr": 1.0, "inner_steps": 3} | options
    solver = bl.CG(3, damping=1.0) if solver is None else solver
    return bl.AID(
        problem,
        lam,
        bl.flatten(model),
        solver=solver,
        inner_batch=inner,
        outer_batch=outer,
        **options,
    )


def trajectory(m, steps=6):
    out = []
    for _ in range(steps):
        info = m.step()
        out += [
            info.outer_loss,
            info.inner_loss,
            info.hypergradient,
            m.lam.clone(),
            m.theta.clone(),
        ]
    return out


def apart(one, other):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(one, other, strict=True))


SOLVERS = {
    "cg": lambda: bl.CG(3, damping=1.0),
    "warm": lambda: bl.CG(3, damping=1.0, warm_start=True),
    "normal": lambda: bl.CGNormal(3, damping=1.0),
    "neumann": lambda: bl.Neumann(5, 0.1),
    "identity": lambda: bl.Identity(0.1),
    "ggn": lambda: bl.CG(3, damping=1.0, curvature="ggn"),
    "kfac": lambda: bl.KFAC(0.1),
    "ekfac": lambda: bl.EKFAC(0.1),
    "preconditioned": lambda: bl.CG(3, damping=1.0, precondition=bl.KFAC(0.1)),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["linear", "mlp", "conv"])
def test_a_recorded_run_has_the_numbers_of_the_plain_one(name, solver, graphs, monkeypatch):
    m = method(name, SOLVERS[solver]())
    with_graphs = trajectory(m)
    assert graphs.captured > 1 and graphs.replayed > 20 and not m.recorded.lines
    before = graphs.replayed
    monkeypatch.setenv("BILEVEL_LITE_GRAPHS", "0")
    plain = trajectory(method(name, SOLVERS[solver]()))
    assert graphs.replayed == before
    assert apart(with_graphs, plain) < 1e-9


METHODS = {
    "amigo": lambda *at, **o: bl.AmIGO(*at, linear_steps=3, linear_lr=0.3, inner_steps=2, **o),
    "stocbio": lambda *at, **o: bl.StocBiO(*at, terms=3, linear_lr=0.3, inner_steps=2, **o),
    "nbo": lambda *at, **o: bl.NBO(*at, linear_lr=0.3, **o),
    "soba": lambda *at, **o: bl.SOBA(*at, linear_lr=0.3, **o),
    "f2sa": lambda *at, **o: bl.F2SA(*at, inner_steps=2, **o),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_have_the_numbers_of_the_plain_path(name, graphs, monkeypatch):
    def run():
        like = method()
        problem, batches = like.problem, like.batches
        m = METHODS[name](
            problem, like.lam, like.theta, inner_batch=batches["inner"],
            outer_batch=batches["outer"], inner_lr=0.1, outer_lr=1.0,
        )  # fmt: skip
        return trajectory(m)

    here = run()
    assert graphs.replayed > 5
    assert apart(here, plain(monkeypatch, run)) < 1e-9


def test_two_points_of_one_recording_keep_apart(graphs):
    m = method()
    risk, batch = m.problem.inner_loss, m.batches["inner"].draw()
    points = m.theta, m.theta + 1
    operators = [m.recorded.second(risk, m.lam, theta, batch) for theta in points]
    v = torch.linspace(-1, 1, len(m.theta))
    for theta, operator in [*zip(points, operators, strict=True), (points[0], operators[0])]:
        assert apart([operator(v)], [bl.products.hvp(risk, m.lam, theta, batch, v)]) < 1e-12
        truth = bl.products.cross_vp(risk, m.lam, theta, batch, v, "double_backward")
        assert apart([operator.cross(v)], [truth]) < 1e-12


@pytest.mark.parametrize(
    "options",
    [
        {"fisher": "empirical"},
        {"fisher": "exact"},
        {"samples": 3},
        {"bias": "separate", "damping_rule": "factored"},
        {"rest": "damping"},
    ],
)
def test_a_recorded_kfac_draws_and_solves_as_the_plain_one(options, graphs, monkeypatch):
    def run():
        m = method("conv", bl.KFAC(0.1, **options))
        return trajectory(m), m

    here, m = run()
    kept = [key for key in m.recorded.kept if key[0] == "KFAC"]
    assert kept and not m.recorded.lines
    there, other = plain(monkeypatch, run)
    assert apart(here, there) < 1e-9
    states = [one.solver.state_dict()["generator"] for one in (m, other)]
    assert torch.equal(*states)  # the same numbers were drawn


@pytest.mark.parametrize(
    "options", [{"every": 2}, {"ema": 0.9}, {"damping_rule": "exact"}, {"fixed_batch": True}]
)
def test_a_kfac_that_remembers_is_not_recorded(options, graphs, monkeypatch):
    def run():
        m = method("mlp", bl.KFAC(0.1, **options))
        return trajectory(m), m

    here, m = run()
    assert not [key for key in m.recorded.kept if key[0] == "KFAC"]
    assert apart(here, plain(monkeypatch, run)[0]) < 1e-9


def test_a_factorisation_that_fails_in_a_replay_is_repeated_plainly(graphs, monkeypatch):
    class Failing(graphs):
        failed = 0

        def capture(self, function):
            result, replay = super().capture(function)
            if result[-1].dtype != torch.bool:
                return result, replay

            def fails():  # as a pass does whose Cholesky factor does not exist
                replay()
                Failing.failed += 1
                result[0].data.fill_(float("nan"))
                result[1].data.fill_(True)

            return result, fails

    monkeypatch.setitem(recorded.RECORDERS, "cpu", Failing)

    def run():
        m = method("mlp", bl.KFAC(0.1))
        return trajectory(m), m.solver.state_dict()["generator"]

    here, draws = run()
    assert Failing.failed == 6
    there, other = plain(monkeypatch, run)
    assert apart(here, there) < 1e-12 and torch.equal(draws, other)


# ------------------------------------------------------------------ what would be frozen is not


def plain(monkeypatch, run):
    monkeypatch.setenv("BILEVEL_LITE_GRAPHS", "0")
    out = run()
    monkeypatch.delenv("BILEVEL_LITE_GRAPHS")
    return out


def dropping(model):
    return nn.Sequential(*model[:2], nn.Dropout(0.5), *model[2:])


def counting(model):
    return nn.Sequential(model[0], nn.BatchNorm1d(5), *model[1:])


@pytest.mark.parametrize("spoil, why", [(dropping, "random numbers"), (counting, "statistics")])
def test_what_draws_or_keeps_statistics_runs_plainly(spoil, why, graphs, monkeypatch):
    """In the inner steps only, where a model may be in training mode."""

    def run():
        model = spoil(build("mlp")).eval()
        m = method(model=model)

        class Training:
            def __enter__(self):
                model.train()

            def __exit__(self, *error):
                model.eval()

        m.descending = Training
        torch.manual_seed(7)
        buffers = [b.clone() for b in model.buffers()]
        return trajectory(m, 3), m, buffers

    here, m, _ = run()
    assert any("theta_gradient" in line and why in line for line in m.recorded.lines)
    assert graphs.captured  # the outer gradient and the products, in evaluation mode
    there = plain(monkeypatch, run)
    assert apart(here, there[0]) < 1e-9
    assert all(torch.equal(a, b) for a, b in zip(here[:1], there[0][:1], strict=True))


def test_the_users_weight_is_evaluated_at_every_call(graphs, monkeypatch):
    """A temperature that changes between the steps: Python that a recording would freeze."""

    def run():
        m, temperature = method(), [1.0]
        m.problem.inner_loss.weight = lambda lam, batch: torch.sigmoid(
            lam[batch[2]] * temperature[0]
        )
        out = []
        for k in range(5):
            temperature[0] = 1.0 + k
            out += trajectory(m, 1)
        return out

    assert apart(run(), plain(monkeypatch, run)) < 1e-9
    assert graphs.replayed


def change_l2(m, model):
    m.problem.inner_loss.l2 = 0.3


def change_slope(m, model):
    model[1].negative_slope = 0.9


def change_statistics(m, model):
    model[2].running_mean = torch.linspace(-1, 1, 5)


def change_frozen(m, model):
    model[3].bias = nn.Parameter(torch.ones(5), requires_grad=False)


def change_layer(m, model):
    model[1] = nn.Tanh()


@pytest.mark.parametrize(
    "change", [change_l2, change_slope, change_statistics, change_frozen, change_layer]
)
def test_what_is_changed_between_steps_is_recorded_anew(change, graphs, monkeypatch):
    def run():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(6, 5), nn.LeakyReLU(), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3)
        ).eval()
        model[3].bias.requires_grad_(False)
        m = method(model=model)
        before = trajectory(m, 3)
        change(m, model)
        return before + trajectory(m, 3)

    here = run()
    assert graphs.captured > 5
    there = plain(monkeypatch, run)
    assert apart(here, there) < 1e-9
    unchanged = trajectory(method(model=None), 6)
    assert len(unchanged) == len(here)


def test_a_new_shape_is_recorded_anew_and_the_fifth_one_is_not(graphs):
    m = method()
    risk, theta = m.problem.inner_loss, m.theta
    for rows in (3, 4, 5, 6, 7, 3):
        x, y = torch.randn(rows, 6), torch.arange(rows) % 3
        batch = x, y, torch.arange(rows)
        for _ in range(2):
            got = m.recorded.gradient(risk, m.lam, theta, batch, "inner_loss")
            assert apart(got, bl.products.gradient(risk, m.lam, theta, batch)) < 1e-12
    assert graphs.captured == recorded.MOST
    assert [line for line in m.recorded.lines if "4 shapes" in line] == m.recorded.lines


def test_a_recording_with_other_numbers_is_dropped(graphs, monkeypatch):
    class Wrong(graphs):
        def capture(self, function):
            result, replay = super().capture(function)

            def off():
                replay()
                for value in result:
                    value.data.mul_(1 + 1e-6)

            return result, off

    monkeypatch.setitem(recorded.RECORDERS, "cpu", Wrong)
    m = method()
    here = trajectory(m)
    assert len(m.recorded.lines) == 3
    assert all("off the plain ones" in line for line in m.recorded.lines)
    assert apart(here, plain(monkeypatch, lambda: trajectory(method()))) < 1e-12


def test_a_recording_that_goes_wrong_later_is_dropped_at_its_next_comparison(graphs, monkeypatch):
    class Tiring(graphs):
        def capture(self, function):
            result, replay = super().capture(function)
            uses = []
            if len(result) < 2:  # H v and J v are replayed more often than they are used
                return result, replay

            def off():
                replay()
                uses.append(1)
                if len(uses) > 2:  # compared at the 1st, 2nd and 4th use
                    for value in result:
                        value.data.mul_(1 + 1e-6)

            return result, off

    monkeypatch.setitem(recorded.RECORDERS, "cpu", Tiring)
    m = method(inner_steps=1)
    trajectory(m, 3)
    assert not m.recorded.lines
    trajectory(m, 1)
    assert len(m.recorded.lines) >= 2 and all("off the plain" in x for x in m.recorded.lines)


def padded():
    emb = nn.Embedding(5, 4, padding_idx=0)
    return nn.Sequential(emb, nn.Flatten(), nn.Linear(16, 3)), True, (24,)


def positions():
    return nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)), True, (24, 4)


def tied():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.GELU(), nn.Linear(4, 3)), False, (24,)


def frozen():
    model = nn.Sequential(nn.Linear(4, 5), nn.GroupNorm(1, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    return model, False, (24,)


@pytest.mark.parametrize("solver", ["cg", "kfac"])
@pytest.mark.parametrize("build", [padded, positions, tied, frozen])
def test_other_layers_have_the_numbers_of_the_plain_path(build, solver, graphs, monkeypatch):
    def run():
        torch.manual_seed(0)
        model, tokens, shape = build()
        g = torch.Generator().manual_seed(1)
        x = torch.randint(5, (24, 4), generator=g) if tokens else torch.randn(24, 4, generator=g)
        y = torch.randint(3, shape, generator=g)
        y.view(24, -1)[::5, -1] = -100 if len(shape) > 1 else 0
        problem = bl.BilevelProblem(
            bl.WeightedRisk(model, weight=weight, l2=1e-2), bl.WeightedRisk(model)
        )

        class Turns:  # batches in order
            at = 0

            def draw(self):
                index = (torch.arange(8) + self.at) % 24
                self.at += 5
                return x[index], y[index], index

        m = bl.AID(
            problem, torch.linspace(-1, 1, 24), bl.flatten(model), solver=SOLVERS[solver](),
            inner_batch=Turns(), outer_batch=Turns(), inner_lr=0.1, outer_lr=1.0, inner_steps=2,
        )  # fmt: skip
        return trajectory(m, 5), m.recorded

    here, recordings = run()
    assert graphs.replayed > 10 and not recordings.lines
    assert apart(here, plain(monkeypatch, run)[0]) < 1e-9


@pytest.mark.parametrize(
    "error, why",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "memory is short"),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), "permitted"),
    ],
)
def test_where_nothing_can_be_recorded_the_plain_path_runs(error, why, graphs, monkeypatch):
    def capture(self, function):
        raise error

    monkeypatch.setattr(graphs, "capture", capture)
    m = method()
    here = trajectory(m)
    assert len(m.recorded.lines) == 3 and all(why in line for line in m.recorded.lines)
    assert apart(here, plain(monkeypatch, lambda: trajectory(method()))) == 0


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_code_that_is_not_known_is_not_recorded(graphs, monkeypatch):
    def run():
        model = build("mlp")
        return method(model=nn.Sequential(Twice(), *model))

    m = run()
    here = trajectory(m)
    assert graphs.captured == 0 and all("not known" in line for line in m.recorded.lines)
    assert apart(here, plain(monkeypatch, lambda: trajectory(run()))) == 0


def test_an_interrupted_run_goes_on_with_the_same_bits(graphs):
    whole = trajectory(method(), 6)
    first = method()
    trajectory(first, 3)
    second = method()
    second.load_state_dict(first.state_dict())
    rest = trajectory(second, 3)
    assert all(torch.equal(a, b) for a, b in zip(whole[-len(rest) :], rest, strict=True))


def test_a_copy_records_for_itself(graphs):
    m = method()
    trajectory(m, 2)
    other = copy.deepcopy(m)
    assert not other.recorded.kept
    assert not pickle.loads(pickle.dumps(m.recorded)).kept
    assert apart(trajectory(other, 2), trajectory(m, 2)) < 1e-12


def test_a_step_that_diverges_is_refused_and_undone(graphs):
    m = method(inner_lr=0.1)
    trajectory(m, 2)
    before = m.theta.clone()
    m.inner_optimizer.param_groups[0]["lr"] = 1e300
    with pytest.raises(NotFinite, match="step 3"):
        m.step()
    assert torch.equal(m.theta, before)
    m.inner_optimizer.param_groups[0]["lr"] = 0.1
    assert torch.isfinite(m.step().outer_loss)


def test_a_weight_that_is_not_finite_says_so(graphs):
    m = method()
    trajectory(m, 1)
    m.lam[0] = float("nan")
    with pytest.raises(NotFinite):
        trajectory(m, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["linear", "mlp", "conv"])
def test_cuda_records_and_has_the_numbers_of_the_plain_path(name, solver, monkeypatch):
    def run():
        m = method(name, SOLVERS[solver]())
        device = torch.device("cuda")
        model = build(name).to(device)
        for sampler in m.batches.values():
            if sampler is not None:
                sampler.x, sampler.y = sampler.x.to(device), sampler.y.to(device)
                sampler._order = sampler._order.to(device)
        problem = bl.BilevelProblem(
            bl.WeightedRisk(model, weight=weight, l2=1e-2), bl.WeightedRisk(model)
        )
        m = bl.AID(
            problem, m.lam.to(device), m.theta.to(device), solver=SOLVERS[solver](), inner_lr=0.1,
            outer_lr=1.0, inner_steps=3, inner_batch=m.batches["inner"],
            outer_batch=m.batches["outer"],
        )  # fmt: skip
        return trajectory(m), m.recorded

    here, recordings = run()
    assert recordings.kept and not recordings.lines
    there, none = plain(monkeypatch, run)
    assert not none.kept
    assert apart(here, there) < 1e-9
