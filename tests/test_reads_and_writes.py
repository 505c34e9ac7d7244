"""What a model reads past theta, keeps or writes: refused by every solver; its repair is right."""

from collections import UserDict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import bilevel_lite as bl
from bilevel_lite.params import predict


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


N = 8
X, X_OUT = numbers(0, N, 4), numbers(1, 5, 4)
Y, Y_OUT = torch.arange(N) % 3, torch.arange(5) % 3
INNER, OUTER, LAM = (X, Y, torch.arange(N)), (X_OUT, Y_OUT), 0.5 + numbers(2, N).sigmoid()
SOLVERS = {
    "Direct": bl.Direct(),
    "CG": bl.CG(60),
    "CG on the GGN": bl.CG(5, curvature="ggn"),
    "KFAC": bl.KFAC(0.1, rest="damping"),
    "unrolled": None,
}


def hypergradient(model, solver, theta=None):
    """By a solver at a theta that solves nothing (its Hessian is positive), or by 3 steps."""
    theta = bl.flatten(model) * 0.3 if theta is None else theta
    inner = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.5)
    problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
    inner_batch, outer_batch = [tuple(part.clone() for part in b) for b in (INNER, OUTER)]
    if solver is None:
        return bl.unrolled_hypergradient(
            problem, LAM, theta, 3, 0.1, inner_batch=inner_batch, outer_batch=outer_batch
        )
    return bl.hypergradient(problem, LAM, theta, inner_batch, outer_batch, solver)


class Net(nn.Module):
    """x -> out(tanh(F.linear(x, weight))), the weight got by one of the ways below."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.a, self.out = nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)
        self.made()

    def made(self):
        pass

    def weight(self, x):
        w = self.a.weight
        return w / w.norm(dim=1, keepdim=True)

    def forward(self, x):
        return self.out(torch.tanh(F.linear(x, self.weight(x))))


# ------------------------------------------------------------------ wrong ways


class InAList(Net):
    def made(self):
        self.weights = [self.a.weight]

    def weight(self, x):
        return self.weights[0]


class InAClosure(Net):
    def made(self):
        w = self.a.weight
        self.get = lambda: w

    def weight(self, x):
        return self.get() + 0.1 * self.a.weight


class MadeInInit(Net):
    def made(self):
        self.transposed = self.a.weight.t()

    def weight(self, x):
        return self.transposed.t()


class Memo(Net):
    """Computed once, and kept under a name; detached or not, the next theta does not move it."""

    detached = False

    def made(self):
        self.memo = None

    def weight(self, x):
        if self.memo is None:
            self.memo = super().weight(x).detach() if self.detached else super().weight(x)
        return self.memo


class DetachedMemo(Memo):
    detached = True


class MemoByShape(Net):
    def made(self):
        self.memo = {}

    def weight(self, x):
        return self.memo.setdefault(tuple(x.shape), super().weight(x))


class MemoByVersion(Net):
    """Right in a training, whose steps write into the parameter; theta's parts are all new."""

    def made(self):
        self.memo = {}

    def weight(self, x):
        return self.memo.setdefault(self.a.weight._version, super().weight(x))


class MemoBelow(Net):
    """A memo one level down: in a dict of dicts, a list of lists, a deque, an object."""

    def made(self):
        self.memo = [{}]

    def below(self):
        return self.memo[0]

    def weight(self, x):
        return self.below().setdefault("w", super().weight(x))


class MemoInADeque(MemoBelow):
    def made(self):
        self.memo = deque([{"layer": {}}])
        self.memo.append(self.memo)  # and a circle

    def below(self):
        return self.memo[0]["layer"]


class MemoInAnObject(MemoBelow):
    def made(self):
        self.memo = {"layer": SimpleNamespace()}

    def below(self):
        return vars(self.memo["layer"])


class Slots:
    """An object without a dict of attributes."""

    __slots__ = ("kept", "seen")


class MemoInSlots(MemoBelow):
    def made(self):
        self.memo = [Slots()]

    def weight(self, x):
        (memo,) = self.memo
        if not hasattr(memo, "kept"):
            memo.kept = super(MemoBelow, self).weight(x)
        return memo.kept


class MemoInAMapping(MemoBelow):
    def made(self):
        self.memo = [UserDict()]


class Clamped(Net):
    def weight(self, x):
        self.a.weight.data.clamp_(-0.2, 0.2)
        return self.a.weight


class Renormed(Net):
    def weight(self, x):
        self.a.weight.data = torch.renorm(self.a.weight.data, 2, 0, 0.3)
        return self.a.weight


class WritesX(Net):
    def forward(self, x):
        return super().forward(F.leaky_relu(x, 0.5, inplace=True))


class Drawing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return F.dropout(g, 0.5)


class DrawsBackwards(Net):
    def weight(self, x):
        return Drawing.apply(super().weight(x))


class CountsBackwards(Net):
    calls = 0

    def weight(self, x):
        w = super().weight(x)
        if w.requires_grad:
            w.register_hook(self.count)
        return w

    def count(self, g):
        CountsBackwards.calls += 1
        return g * (1 + 0.5 * CountsBackwards.calls)


PAST, KEEPS = "reads its parameter 'a.weight' past", "keeps something from call to call"
WRONG = {
    InAList: PAST,
    InAClosure: PAST,
    MadeInInit: PAST,
    Memo: KEEPS,
    DetachedMemo: KEEPS,
    MemoByShape: KEEPS,
    MemoByVersion: KEEPS,
    MemoBelow: KEEPS,
    MemoInADeque: KEEPS,
    MemoInAnObject: KEEPS,
    MemoInSlots: KEEPS,
    MemoInAMapping: KEEPS,
    Clamped: "writes into parameter 'a.weight'",
    Renormed: "writes into parameter 'a.weight'",
    WritesX: "writes into its batch",
    DrawsBackwards: "has another gradient when",
    CountsBackwards: "has another gradient when",
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cls", WRONG, ids=lambda cls: cls.__name__)
def test_it_is_refused(cls, solver):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=WRONG[cls]):
        for scale in (0.3, 0.36):
            hypergradient(model := cls(), SOLVERS[solver], scale * bl.flatten(model))


@pytest.mark.parametrize("cls", [InAList, Memo, DetachedMemo, Clamped])
def test_it_is_refused_of_a_network_whose_parameters_are_lam(cls):
    net, model = cls(), nn.Linear(4, 3)
    inner = bl.WeightedRisk(model, weight=lambda lam, b: predict(net, lam, b[0]).sigmoid()[:, 0])
    problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
    with pytest.raises(ValueError, match=WRONG[cls]):
        bl.hypergradient(problem, bl.flatten(net), bl.flatten(model), INNER, OUTER, bl.CG(3))


@pytest.mark.parametrize("cls", [DetachedMemo, MemoByShape, Clamped, InAClosure])
def test_it_is_refused_in_float32(cls):
    model = cls().float()
    model.made()
    with pytest.raises(ValueError, match=WRONG[cls]):
        predict(model, bl.flatten(model) * 0.3, X.float())


# ------------------------------------------------------------------ their repairs, and neighbours


class Read(Net):
    def weight(self, x):
        return self.a.weight


class Logged(Net):
    """What it keeps, with its graph too, nobody reads."""

    def made(self):
        self.seen, self.count, self.all = None, 0, {}

    def weight(self, x):
        self.seen = super().weight(x)
        self.count += 1
        self.all[self.count] = self.seen.detach()
        return self.seen


class LoggedBelow(Logged):
    def weight(self, x):
        self.all.setdefault("seen", [deque()])[0].append(super().weight(x).detach())
        return self.seen


class LoggedInSlots(Logged):
    """What it keeps there, a list and a mapping beside it, is put back as it was."""

    def made(self):
        super().made()
        self.slots, self.more = Slots(), UserDict(n=0)

    def weight(self, x):
        self.slots.seen = super().weight(x).detach()
        self.more["n"] += 1
        return super().weight(x)


class Renewed(Net):
    """A memo that is renewed for each theta."""

    def made(self):
        self.of, self.memo = None, None

    def weight(self, x):
        if self.of is not self.a.weight:
            self.of, self.memo = self.a.weight, super().weight(x)
        return self.memo


class WritesIntermediate(Net):
    def forward(self, x):
        return super().forward(F.leaky_relu(x * 1.0, 0.5, inplace=True))


def by_hand(cls, theta, x):
    w, out = theta[:16].view(4, 4), theta[16:].view(3, 4)
    w = w if cls is Read else w / w.norm(dim=1, keepdim=True)
    x = F.leaky_relu(x, 0.5) if cls is WritesIntermediate else x
    return torch.tanh(x @ w.t()) @ out.t()


@pytest.mark.parametrize(
    "cls", [Read, Logged, LoggedBelow, LoggedInSlots, Renewed, WritesIntermediate]
)
def test_what_is_right_passes(cls):
    model = cls()
    for scale in (0.3, 0.36, 0.4):
        lam = LAM.clone().requires_grad_()
        theta = (scale * bl.flatten(model)).requires_grad_()
        losses = F.cross_entropy(by_hand(cls, theta, X), Y, reduction="none")
        g = (lam * losses).mean() + 0.5 * theta.square().sum()
        (slope,) = torch.autograd.grad(g, theta, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(e, theta, retain_graph=True)[0] for e in slope])
        f = F.cross_entropy(by_hand(cls, theta, X_OUT), Y_OUT)
        v = torch.linalg.solve(hessian, torch.autograd.grad(f, theta)[0])
        expected = -torch.autograd.grad(slope @ v, lam)[0]
        got = hypergradient(model, bl.Direct(), theta.detach())
        assert float((got - expected).norm()) < 1e-10 * float(expected.norm())


def test_theta_may_have_a_graph_that_leads_to_the_models_own_parameters():
    model = Net()
    theta = torch.cat([p.reshape(-1) for p in model.parameters()])
    for given in (theta, dict(model.named_parameters())):
        predict(model, given, X).sum().backward()
    assert float(model.out.weight.grad.norm()) > 0


# ------------------------------------------------------------------ theta itself


def test_parameters_that_share_memory_are_refused():
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.t())
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' share their memory"):
        bl.flatten(model)


def test_parts_of_one_memory_that_do_not_overlap_are_two_parameters():
    memory = numbers(4, 12)
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(memory[::2].view(2, 3))
    model.bias = nn.Parameter(memory[1::6])
    assert torch.equal(bl.flatten(model), torch.cat([memory[::2], memory[1::6]]))


def test_tied_parameters_are_one():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    assert bl.flatten(model).shape == (9,)


def test_parameters_of_two_precisions_are_one_vector_of_the_higher():
    """Each part of theta stands in for its parameter, so that all is computed in that one."""
    model = nn.Sequential(nn.Linear(4, 4).float(), nn.Tanh(), nn.Linear(4, 3))
    assert bl.flatten(model).dtype == torch.float64
    same = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    same.load_state_dict(model.state_dict())
    assert torch.equal(hypergradient(model, bl.Direct()), hypergradient(same, bl.Direct()))


class Converting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(4, 4).float(), nn.Linear(4, 3)

    def forward(self, x):
        return self.o(torch.tanh(self.a(x.float())).double())


def test_a_model_that_converts_between_two_precisions_is_refused_by_their_names():
    with pytest.raises(
        ValueError, match=r"'a.bias' \(torch.float32\) and 'o.bias' \(torch.float64"
    ):
        hypergradient(Converting(), bl.CG(3))


def test_a_lazy_module_is_to_be_called_first():
    with pytest.raises(ValueError, match="'0.weight' of a lazy module has no shape yet; call"):
        bl.flatten(nn.Sequential(nn.LazyLinear(3)))


class ReadsAnEmptyOne(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.empty = nn.Parameter(torch.zeros(0))

    def forward(self, x):
        return super().forward(x) + self.empty.sum()


def test_a_parameter_without_entries_may_be_read():
    plain, model = nn.Linear(4, 3), ReadsAnEmptyOne()
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(hypergradient(model, bl.CG(3)), hypergradient(plain, bl.CG(3)))


class Triangle(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


@pytest.mark.parametrize("solver", ["Direct", "CG", "unrolled"])
def test_the_callers_cache_of_parametrized_weights_is_not_read(solver):
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Triangle())
    alone, theta = hypergradient(model, SOLVERS[solver]), bl.flatten(model) * 0.3
    with parametrize.cached():
        own = model[0].weight
        assert torch.equal(hypergradient(model, SOLVERS[solver], theta), alone)
        assert model[0].weight is own  # and goes on
    assert not parametrize._cache_enabled and not parametrize._cache


def test_a_parameter_without_entries_is_is_no_part_of_theta():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    with_empty = nn.Sequential(*plain)
    with_empty.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    own = {"fisher": "empirical"}
    for solver in (bl.Direct(), bl.KFAC(0.3, **own), bl.EKFAC(0.3, **own)):
        assert torch.equal(hypergradient(with_empty, solver), hypergradient(plain, solver))


@pytest.mark.parametrize("kept", [{"every": 5}, {"ema": 0.9}])
def test_factors_of_one_model_do_not_serve_another(kept):
    one, other = (nn.Sequential(nn.Linear(4, 3)) for _ in range(2))
    solver = bl.KFAC(0.1, fisher="empirical", **kept)
    hypergradient(one, solver)
    hypergradient(one, solver)
    with pytest.raises(ValueError, match="remembers factors of another model"):
        hypergradient(other, solver)
