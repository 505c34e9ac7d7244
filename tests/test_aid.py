"""AID on a problem with a known optimum, and resumed runs."""

import subprocess
import sys

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite import data


class Quadratic:
    """theta*(lam) = A^-1 (B lam), f = 1/2 (||theta - c||^2 + ||lam||^2)."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        root = torch.randn(6, 6, generator=g)
        self.a = root @ root.T / 6 + 0.5 * torch.eye(6)
        self.b = torch.randn(6, 3, generator=g)
        self.c = torch.randn(6, generator=g)
        self.problem = bl.BilevelProblem(
            lambda lam, t, _: 0.5 * t @ self.a @ t - t @ self.b @ lam,
            lambda lam, t, _: 0.5 * (t - self.c).square().sum() + 0.5 * lam.square().sum(),
        )
        m = torch.linalg.solve(self.a, self.b)  # theta* = m lam
        h = m.T @ m + torch.eye(3)
        self.lam = torch.linalg.solve(h, m.T @ self.c)  # the minimiser of Phi
        self.outer_lr = 1 / float(torch.linalg.eigvalsh(h)[-1])
        self.lr = 1 / float(torch.linalg.eigvalsh(self.a)[-1])


@pytest.mark.parametrize(
    "solver", [bl.Direct(), bl.CG(6), bl.CG(2, warm_start=True), bl.CGNormal(6)]
)
def test_aid_reaches_the_closed_form_optimum(solver):
    q = Quadratic()
    method = bl.AID(
        q.problem, torch.zeros(3), torch.zeros(6), solver, inner_steps=30, inner_lr=q.lr,
        outer_lr=q.outer_lr,
    )  # fmt: skip
    for _ in range(400):
        info = method.step()
    assert float((method.lam - q.lam).norm() / q.lam.norm()) < 1e-8
    assert float(info.hypergradient.norm()) < 1e-8
    assert info.iteration == 400


def test_identity_stops_elsewhere():
    q = Quadratic()
    method = bl.AID(
        q.problem, torch.zeros(3), torch.zeros(6), bl.Identity(q.lr), inner_steps=30,
        inner_lr=q.lr, outer_lr=q.outer_lr,
    )  # fmt: skip
    for _ in range(400):
        method.step()
    assert float((method.lam - q.lam).norm() / q.lam.norm()) > 0.05


def supervised(seed=0):
    """AID with samplers for every role, momentum on both levels, a warm-started solver."""
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=g), torch.randint(2, (40,), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2).double()
    inner = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]], l2=0.1)
    problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))

    def batches(salt, size=8):
        return data.Batches(x, y, size, torch.Generator().manual_seed(10 * seed + salt), 2)

    return bl.AID(
        problem,
        torch.full((40,), 0.5),
        bl.flatten(model),
        bl.CG(2, warm_start=True),
        inner_steps=3,
        inner_batch=batches(1),
        outer_batch=batches(2),
        curvature_batch=batches(3, 16),
        cross_batch=batches(4, 16),
        inner_optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        outer_optimizer=lambda p: torch.optim.Adam(p, lr=0.05),
        projection=lambda lam: lam.clamp(0, 1),
    )


def test_a_resumed_run_is_bit_equal(tmp_path):
    whole = supervised()
    for _ in range(4):
        whole.step()
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    for _ in range(9):
        last = whole.step()
    resumed = supervised(seed=7)  # other batches, until the state is loaded
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(9):
        again = resumed.step()
    # to the last bit: the same operations in the same order
    assert torch.equal(whole.lam, resumed.lam) and torch.equal(whole.theta, resumed.theta)
    assert torch.equal(last.hypergradient, again.hypergradient)
    assert (last.iteration, last.gradients) == (again.iteration, again.gradients)
    assert bool((whole.lam >= 0).all()) and bool((whole.lam <= 1).all())


def test_costs_count_batches_by_their_size():
    info = supervised().step()
    # 3 inner steps of 8; b on 8; CG(2) without a start on 16 (2 products of 2); J on 16
    assert info.gradients == 3 + 1 + 2 * 2 * (16 / 8) + 2 * (16 / 8)


@pytest.mark.parametrize(("own", "draws"), [([], 4), (["curvature"], 4), (["cross"], 4),
                                            (["curvature", "cross"], 3)])  # fmt: skip
def test_the_linear_system_gets_a_fresh_inner_batch_unless_it_has_its_own(own, draws):
    method = supervised()
    for role in {"curvature", "cross"} - set(own):
        method.batches[role] = None
    counted, draw = [], method.batches["inner"].draw
    method.batches["inner"].draw = lambda: counted.append(1) or draw()
    method.step()  # three inner steps
    assert len(counted) == draws


def test_import_is_light_and_silent():
    code = (
        "import sys, torch; dtype = torch.get_default_dtype(); import bilevel_lite;"
        "assert torch.get_default_dtype() == dtype;"
        "heavy = {'matplotlib', 'sklearn', 'scipy', 'pooch', 'tqdm', 'filelock'};"
        "print(sorted(heavy & set(sys.modules) - before))"
    )
    before = (
        "import torch, sys; import torch.func, torch.autograd.forward_ad;before = set(sys.modules);"
    )
    out = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True)
    assert (out.returncode, out.stdout.strip(), out.stderr) == (0, "[]", "")


def test_all_names_exist():
    for name in bl.__all__:
        assert getattr(bl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bl.nonsense  # noqa: B018
