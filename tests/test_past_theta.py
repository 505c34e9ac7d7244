"""What a model computes with beside theta: refused each time, not only at the first look."""

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters
from torch.utils.checkpoint import checkpoint

import bilevel_lite as bl
from bilevel_lite import purity, slopes

N = 6


def numbers(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


INNER = numbers(0, N, 5), torch.arange(N) % 3, torch.arange(N)
OUTER = numbers(1, N, 5), torch.arange(N) % 3
LAM = 0.5 + numbers(2, N).sigmoid()


class Net(nn.Module):
    """x -> o(tanh(a(x))), by the ways below."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()
        for k, p in enumerate(self.parameters()):
            p.data = numbers(3 + k, *p.shape)
        self.made()

    def made(self):
        pass

    def hidden(self, x):
        return torch.tanh(self.a(x))

    def forward(self, x):
        return self.o(self.hidden(x))


class Memo(Net):
    w = None

    def hidden(self, x):
        if self.w is None:
            self.w = (self.a.weight / self.a.weight.norm()).detach()
        return torch.tanh(F.linear(x, self.w, self.a.bias))


class InAList(Net):
    def made(self):
        self.ws = [self.a.weight]

    def hidden(self, x):
        return torch.tanh(F.linear(x, self.ws[0], self.a.bias))


class InAListInTraining(InAList):
    def hidden(self, x):
        return super().hidden(x) if self.training else torch.tanh(self.a(x))


class Clamps(Net):
    def hidden(self, x):
        self.a.weight.data.clamp_(-0.1, 0.1)
        return super().hidden(x)


class Alias(Net):
    def made(self):
        self.w = self.a.weight.data.t()

    def hidden(self, x):
        return torch.tanh(super().hidden(x) @ self.w.t() @ self.w)


class AliasInABuffer(Alias):
    def made(self):
        self.register_buffer("w", self.a.weight.detach().t())


class Again(torch.autograd.Function):
    """Runs a module again in the backward pass, as checkpoints of training frameworks do."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, g)
        return None, x.grad


class RunsAgain(Net):
    def forward(self, x):
        return self.o(Again.apply(super().hidden, 0.5 * super().hidden(x) @ self.a.weight))


class Checkpointed(Net):
    def hidden(self, x):
        return checkpoint(super().hidden, x, use_reentrant=False)


def problem(inner, outer):
    def weighted(model):
        return bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=0.3)

    return bl.BilevelProblem(weighted(inner), bl.WeightedRisk(outer))


@pytest.mark.parametrize("solver", [bl.Direct, lambda: bl.Identity(0.1), lambda: bl.KFAC(0.1)])
@pytest.mark.parametrize(
    "cls", [Memo, InAList, Clamps, Alias, AliasInABuffer, RunsAgain, Checkpointed]
)
def test_what_was_refused_once_is_refused_again(cls, solver):
    model = cls()
    own, theta = dict(model.named_parameters()), 0.7 * bl.flatten(model)
    before = {name: p.detach().clone() for name, p in own.items()}
    for _ in range(6):
        with pytest.raises(ValueError, match="^model: "):
            bl.hypergradient(problem(model, model), LAM, theta, INNER, OUTER, solver())
    if cls is not Clamps:
        assert all(torch.equal(p, before[name]) for name, p in own.items())


def test_a_mode_of_the_model_is_looked_at_for_itself():
    model = InAListInTraining().eval()
    at = problem(model, model), LAM, 0.7 * bl.flatten(model), INNER, OUTER, bl.Direct()
    for _ in range(3):
        bl.hypergradient(*at)
    model.train()
    for _ in range(4):
        with pytest.raises(ValueError, match="^model: .* past the module"):
            bl.hypergradient(*at)


def test_a_checkpoint_under_hooks_of_the_callers_is_refused_too():
    model = Checkpointed()
    at = problem(model, model), LAM, 0.7 * bl.flatten(model), INNER, OUTER, bl.Direct()
    for _ in range(3):
        with torch.autograd.graph.save_on_cpu(), pytest.raises(ValueError, match="runs a module"):
            bl.hypergradient(*at)


def test_a_model_as_it_should_be_is_compared_on_a_few_examples():
    seen = []

    class Plain(Net):
        def hidden(self, x):
            seen.append(len(x))
            return super().hidden(x)

    model, x = Plain(), numbers(9, 40, 5)
    theta, risk = 0.7 * bl.flatten(model), bl.WeightedRisk(model)
    batch = x, torch.arange(40) % 3
    for _ in range(15):
        seen.clear()
        got, route = slopes.slopes_and_route(risk, theta, batch, theta)
        assert route == "forward mode"
    assert seen == [40, 2]  # forward mode, and two examples of an ordinary gradient
    at = theta.clone().requires_grad_()
    losses = risk.losses(at, batch)
    truth = [torch.autograd.grad(one, at, retain_graph=True)[0] @ theta for one in losses]
    assert float((got - torch.stack(truth)).norm()) < 1e-12 * float(got.norm())


def test_a_hook_on_a_node_of_the_graph_is_no_reason_to_believe_a_few_rows():
    class Stops(Net):
        """Nothing goes back to the rows with a large first entry."""

        def hidden(self, x):
            h, kept = super().hidden(x), (x[:, :1] < 3).to(x)
            if h.grad_fn is not None:
                h.grad_fn.register_prehook(lambda gs: (gs[0] * kept,))
            return h

    model = Stops()
    theta, risk = bl.flatten(model), bl.WeightedRisk(model)
    for k in range(8):
        x = numbers(20 + k, 40, 5).clamp(-2.5, 2.5)
        x[7, 0] = 5.0 if k else 0.0
        batch = x, torch.arange(40) % 3
        got, _ = slopes.slopes_and_route(risk, theta, batch, theta)
        at = theta.clone().requires_grad_()
        losses = risk.losses(at, batch)
        truth = [torch.autograd.grad(one, at, retain_graph=True)[0] @ theta for one in losses]
        assert float((got - torch.stack(truth)).norm()) < 1e-10 * float(got.norm())


def test_a_global_hook_on_the_way_back_makes_code_unknown():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    theta, v = bl.flatten(model), numbers(8, 39)
    risk = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]])
    bl.products.cross_vp(risk, LAM, theta, INNER, v)
    halve = nn.modules.module.register_module_full_backward_pre_hook(
        lambda module, g: (0.5 * g[0],) if isinstance(module, nn.Tanh) else None
    )
    try:
        here = {k: p.detach().requires_grad_() for k, p in bl.unflatten(model, theta).items()}
        losses = F.cross_entropy(
            torch.func.functional_call(model, here, (INNER[0],)), INNER[1], reduction="none"
        )
        truth = [
            torch.cat([
                g.flatten()
                for g in torch.autograd.grad(one / N, list(here.values()), retain_graph=True)
            ]) @ v
            for one in losses
        ]  # fmt: skip
        got = bl.products.cross_vp(risk, LAM, theta, INNER, v)
    finally:
        halve.remove()
    assert float((got - torch.stack(truth)).norm()) < 1e-9 * float(got.norm())


PENALTIES = {
    "a weight": lambda model, x: model.weight.square().sum(),
    "all parameters": lambda model, x: sum(p.norm() ** 2 for p in model.parameters()),
    "a call": lambda model, x: model(x).square().mean(),
}


@pytest.mark.parametrize("by", ["predict", "functional_call"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_on_the_models_own_parameters_is_refused(penalty, by):
    """The line of every training loop; theta stands in for them, so its slope was zero."""
    model = nn.Linear(5, 3)

    def fit(theta, batch):
        if by == "predict":
            out = bl.params.predict(model, theta, batch[0])
        else:
            named = bl.unflatten(model, theta)
            out = torch.func.functional_call(model, named, (batch[0],))
        return F.cross_entropy(out, batch[1])

    def penalised(lam, theta, batch):
        own = lam.exp().sum() * PENALTIES[penalty](model, batch[0])
        return fit(theta, batch) + own + theta @ theta

    def plain(lam, theta, batch):
        return fit(theta, batch) + lam.exp().sum() * theta @ theta

    lam, theta = torch.zeros(2), bl.flatten(model)
    batch = numbers(1, 6, 5), torch.arange(6) % 3
    told = "reads parameters of Linear itself, for which theta stands in"
    for one, other, name in ((penalised, plain, "inner_loss"), (plain, penalised, "outer_loss")):
        at = bl.BilevelProblem(one, other), lam, theta
        for call in (
            lambda at=at: bl.hypergradient(*at, batch, batch, bl.CG(2)),
            lambda at=at: bl.unrolled_hypergradient(
                *at, 2, 0.1, inner_batch=batch, outer_batch=batch
            ),
        ):
            with pytest.raises(ValueError, match=f"{name}: {told}"):
                call()
    teacher = nn.Linear(5, 3)  # another model may be called

    def taught(lam, theta, batch):
        return (
            plain(lam, theta, batch)
            + (teacher(batch[0]).softmax(1)[:, 0] * lam[0]).sum() * theta[0]
        )

    bl.hypergradient(bl.BilevelProblem(taught, plain), lam, theta, batch, batch, bl.CG(2))


@pytest.mark.parametrize("put", ["vector_to_parameters", "load_state_dict", "copy_"])
def test_a_loss_that_puts_theta_into_a_module_is_refused(put):
    """With a penalty on theta, H and J were those of the penalty alone."""
    model = Net()

    def place(theta):
        if put == "vector_to_parameters":
            vector_to_parameters(theta, model.parameters())
        elif put == "load_state_dict":
            model.load_state_dict(bl.unflatten(model, theta))
        else:
            with torch.no_grad():
                for p, part in zip(
                    model.parameters(), bl.unflatten(model, theta).values(), strict=True
                ):
                    p.copy_(part)

    def g(lam, theta, batch):
        place(theta)
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return (lam[batch[2]] * losses).mean() + 0.3 * theta.square().sum()

    theta, made = 0.7 * bl.flatten(model), bl.BilevelProblem(g, bl.WeightedRisk(Net()))
    for solver in (bl.Direct(), bl.CG(3)):
        with pytest.raises(ValueError, match="puts theta into a module's parameters"):
            bl.hypergradient(made, LAM, theta, INNER, OUTER, solver)
    with pytest.raises(ValueError, match="puts theta into a module's parameters"):
        bl.unrolled_hypergradient(made, LAM, theta, 2, 0.1, inner_batch=INNER, outer_batch=OUTER)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
def test_a_model_compiled_by_the_default_backend_may_be_used():
    """Its graph frees parts of itself on the first way back."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    theta = bl.flatten(model)
    at = LAM, theta, INNER, OUTER, bl.CG(3)
    truth = bl.hypergradient(problem(model, model), *at)
    compiled = torch.compile(model)
    for _ in range(3):
        got = bl.hypergradient(problem(compiled, compiled), *at)
        assert float((got - truth).norm()) < 1e-9 * float(truth.norm())


def test_what_a_pass_keeps_is_of_that_pass_and_not_of_a_look():
    """Activations in an attribute, and by a hook in a dict of the caller's."""

    class Keeps(Net):
        def hidden(self, x):
            self.h = super().hidden(x)
            return self.h

    model, by_hook = Keeps(), {}
    model.a.register_forward_hook(lambda module, x, out: by_hook.update(out=out))
    theta = bl.flatten(model).requires_grad_()
    for k in range(9):
        x = numbers(30 + k, 8, 5)
        bl.params.predict(model, theta, x)
        assert torch.equal(by_hook["out"].tanh(), model.h) and len(model.h) == 8
        (slope,) = torch.autograd.grad(model.h.sum(), theta)
        assert float(slope.norm()) > 0


def test_a_look_takes_few_examples_of_a_dict():
    sizes = []

    class OfADict(Net):
        def forward(self, x):
            sizes.append(len(x["x"]))
            return super().forward(x["x"])

    model = OfADict()
    bl.params.predict(model, bl.flatten(model).requires_grad_(), {"x": numbers(0, 8, 5)})
    assert sizes.count(8) == 1 and set(sizes) == {4, 8}


class Rows(Net):
    """Its inputs are the rows of a matrix, or of as many lengths as there are examples."""

    def hidden(self, x):
        if x.is_nested:
            x = torch.stack([row.mean(0) for row in x.unbind()])
        return torch.tanh(x @ self.a.weight.T + self.a.bias)


@pytest.mark.parametrize("solver", [bl.Direct, lambda: bl.CG(3, 0.1), lambda: bl.Identity(0.1)])
@pytest.mark.filterwarnings("ignore:.*(beta state|prototype stage)")
def test_a_look_takes_inputs_that_have_no_rows_to_take(solver):
    def hyper(x, outer):
        model = Rows()
        inner = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=1.0)
        problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
        at = LAM, bl.flatten(model), (x, *INNER[1:]), (outer, OUTER[1])
        return bl.hypergradient(problem, *at, solver())

    dense = hyper(INNER[0], OUTER[0])
    for way in (Tensor.to_sparse, Tensor.to_sparse_csr):
        torch.testing.assert_close(hyper(way(INNER[0]), way(OUTER[0])), dense)
    of_lengths = [row.expand(1 + k, 5) for k, row in enumerate(INNER[0])]
    jagged = torch.nested.nested_tensor(of_lengths, layout=torch.jagged)
    torch.testing.assert_close(hyper(jagged, OUTER[0]), dense)
    with pytest.raises(ValueError, match="strided nested tensor as x, .*layout=torch.jagged"):
        hyper(torch.nested.nested_tensor(of_lengths), OUTER[0])


def test_parameters_that_processes_share_are_not_moved(monkeypatch):
    model, moved = Alias().share_memory(), []
    monkeypatch.setattr(Tensor, "add_", lambda self, *args: moved.append(1))
    bl.params.predict(model, bl.flatten(model).requires_grad_(), INNER[0])
    assert not moved


def test_the_hooks_of_a_factor_pass_leave_known_code_known(monkeypatch):
    # or the model is looked at, with copies of theta, in the pass that keeps the graph
    monkeypatch.setattr(purity, "_of_theta_alone", lambda *_: pytest.fail("looked at"))
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 1, 28, 28, generator=draws), torch.arange(4)
    for name in ("lenet", "resnet18"):
        model = bl.models.build(name, (1, 28, 28), 10).eval()
        risk = bl.WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]])
        problem = bl.BilevelProblem(risk, bl.WeightedRisk(model))
        batch, theta = (x, y, torch.arange(4)), bl.flatten(model)
        for solver in (bl.KFAC(1e-2), bl.EKFAC(1e-2), bl.CG(2, precondition=bl.KFAC(1e-2))):
            bl.hypergradient(problem, torch.ones(4), theta, batch, batch, solver)
    other = bl.models.build("lenet", (1, 28, 28), 10).eval()
    other[0].register_forward_hook(lambda module, inputs, output: None)  # somebody else's
    with pytest.raises(pytest.fail.Exception, match="looked at"):
        bl.params.predict(other, bl.flatten(other).requires_grad_(), x)
