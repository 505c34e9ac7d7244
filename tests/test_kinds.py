r"""Kinds of layer x place of lam x solver: J v is right, or refused by us.

The truth of J v is reverse over reverse, by the few lines here, with the solver's own v:

    J v = grad_lam < grad_theta g(lam, theta), v >

The matrices that v comes from are held against dense ones: H and J^T C J from plain Jacobians,
KFAC's blocks, its diagonals and EKFAC's eigenvalues from the layers' inputs and the gradients of
each example.

`REFUSED` says which cells are refused, and with which word; every other cell is a number. A cell
that changes sides fails, and so does a line of `REFUSED` that is true of no cell.
"""

import contextlib
import copy
import operator
import sys
import traceback
import warnings
import zlib
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from kinds import KINDS, N
from torch import Tensor, nn
from torch._higher_order_ops import associative_scan
from torch._higher_order_ops.map import map as torch_map
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import bilevel_lite as bl
from bilevel_lite import exact, slopes
from bilevel_lite.curvature import GGN, EmpiricalFisher
from bilevel_lite.ekfac import ekfac_operator
from bilevel_lite.forward_mode import push_forward
from bilevel_lite.kfac import kfac_factors, kfac_operator
from bilevel_lite.products import cross_vp, hvp, theta_gradient
from bilevel_lite.products import gradient as gradient_and_value

PACKAGE = str(Path(bl.__file__).parent)
L2, DAMPING, TOLERANCE, ROUGH = 0.1, 0.5, 1e-9, 1e-4

SOLVERS = {
    "Direct": lambda: bl.Direct(damping=5.0),
    "CG": lambda: bl.CG(2, damping=5.0),
    "CG GGN": lambda: bl.CG(2, damping=DAMPING, curvature="ggn"),
    "CGNormal": lambda: bl.CGNormal(2, damping=DAMPING),
    "Neumann": lambda: bl.Neumann(2, step=0.05),
    "Identity": lambda: bl.Identity(0.5),
    "KFAC": lambda: bl.KFAC(DAMPING),
    "KFAC empirical": lambda: bl.KFAC(DAMPING, fisher="empirical", damping_rule="exact"),
    "KFAC damping": lambda: bl.KFAC(DAMPING, rest="damping", bias="separate"),
    "KFAC drop": lambda: bl.KFAC(DAMPING, fisher="empirical", rest="drop"),
    "KFAC every": lambda: bl.KFAC(DAMPING, fisher="empirical", every=2),
    "EKFAC": lambda: bl.EKFAC(DAMPING),
    "EKFAC empirical": lambda: bl.EKFAC(DAMPING, fisher="empirical", rest="damping"),
    "Richardson": lambda: bl.KFACRichardson(2, bl.KFAC(DAMPING), step=0.1),
    "CG, KFAC": lambda: bl.CG(2, damping=5.0, precondition=bl.KFAC(DAMPING, every=2)),
}
MATRICES = {
    "weights": ("H", "GGN", "empirical Fisher", "KFAC matrix", "KFAC blocks", "EKFAC matrix"),
    "losses": ("KFAC matrix",),
    "inputs": ("EKFAC matrix",),
}

# ------------------------------------------------------------------ the objectives, by hand


def read(model, theta):
    """The named parameters that theta holds."""
    named, start = {}, 0
    for name, p in model.named_parameters():
        if p.requires_grad:
            named[name] = theta[start : start + p.numel()].view_as(p)
            start += p.numel()
    return named


def outputs_of(model, theta, x):
    named = read(model, theta)
    value = {id(p): named[name] for name, p in model.named_parameters() if name in named}
    here = {
        f"{prefix}.{local}".lstrip("."): value[id(p)]
        for prefix, module in model.named_modules()  # each module once, under its first name
        for local, p in module._parameters.items()
        if p is not None and id(p) in value
    }
    return functional_call(model, here, (x,), tie_weights=False)


def losses_of(outputs, y, loss):
    if loss == "mse":
        return 0.5 * (outputs - y).square().reshape(len(y), -1).sum(1)
    rows = F.cross_entropy(outputs.flatten(0, -2), y.flatten(), reduction="none")
    return rows.view(len(y), -1).mean(1)


def by_index(lam, batch):
    return torch.sigmoid(lam[batch[2]])


def by_loss(lam, batch, losses):
    return torch.sigmoid(lam[0] + lam[1] * losses + lam[2] * losses.square())


def shifted(lam, batch):
    """The inputs moved by lam, or the targets where the inputs are tokens."""
    x, y, index = batch
    return (x + lam * (1 + x.sin()), y, index) if x.is_floating_point() else (x, y + lam, index)


def head(model):
    """The layer before which features are moved: the head, or the last linear one."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    return getattr(model, "o", linear[-1])


def weighted(place, model, loss, lam, theta, batch):
    """g where lam is in the weights."""
    losses = losses_of(outputs_of(model, theta, batch[0]), batch[1], loss)
    sigma = by_index(lam, batch) if place == "weights" else by_loss(lam, batch, losses.detach())
    return (sigma * losses).mean()


def moved(model, loss, lam, theta, batch):
    """g where lam is in the inputs."""
    x, y, _ = shifted(lam, batch)
    return losses_of(outputs_of(model, theta, x), y, loss).mean()


def features(model, loss, lam, theta, batch):
    """g where lam is added to what the last layer reads."""

    def move(module, inputs, options):
        return tuple(i + lam for i in inputs), {name: i + lam for name, i in options.items()}

    hook = head(model).register_forward_pre_hook(move, with_kwargs=True)
    try:
        outputs = outputs_of(model, theta, batch[0])
    finally:
        hook.remove()
    return losses_of(outputs, batch[1], loss).mean()


def logits(model, loss, lam, theta, batch):
    """g where lam is a temperature and a bias of the outputs."""
    outputs = outputs_of(model, theta, batch[0]) * lam[0].exp() + lam[1:]
    return losses_of(outputs, batch[1], loss).mean()


def penalties(model, loss, lam, theta, batch):
    """g where lam is one penalty a parameter."""
    losses = losses_of(outputs_of(model, theta, batch[0]), batch[1], loss)
    return losses.mean() + (lam.exp() * theta.square()).sum()


def smoothing(model, loss, lam, theta, batch):
    """g where lam, a number, smooths the labels (or shrinks the targets)."""
    outputs, y, s = outputs_of(model, theta, batch[0]), batch[1], torch.sigmoid(lam)
    if loss == "mse":
        return losses_of(outputs, (1 - s) * y, loss).mean()
    return (1 - s) * losses_of(outputs, y, loss).mean() - s * outputs.log_softmax(-1).mean()


PLAIN = {
    "plain inputs": moved,
    "features": features,
    "logits": logits,
    "regulariser": penalties,
    "smoothing": smoothing,
}
RISK = ("weights", "losses", "inputs")


def lam_for(place, theta, batch, outputs):
    g = torch.Generator().manual_seed(1)
    shape = {
        "weights": (2 * N,),
        "losses": (3,),
        "logits": (1 + outputs.shape[-1],),
        "regulariser": theta.shape,
        "smoothing": (),
        "features": (1,),
    }.get(place)
    if shape is None:
        like = batch[0] if batch[0].is_floating_point() else outputs
        shape = like.shape[1:]
    return 0.3 * torch.randn(shape, generator=g)


def objective(place, model, loss):
    """g by hand, with the l2 term, and the same as the package is given it."""
    if place in PLAIN:

        def plain(lam, theta, batch):
            return PLAIN[place](model, loss, lam, theta, batch) + L2 * theta.square().sum()

        return plain, plain

    def by_hand(lam, theta, batch):
        value = (
            moved(model, loss, lam, theta, batch)
            if place == "inputs"
            else weighted(place, model, loss, lam, theta, batch)
        )
        return value + L2 * theta.square().sum()

    weight = {"weights": by_index, "losses": by_loss, "inputs": None}[place]
    inputs = shifted if place == "inputs" else None
    return by_hand, bl.WeightedRisk(model, loss, weight, L2, inputs=inputs)


# ------------------------------------------------------------------ truth


@contextlib.contextmanager
def plainly():
    """Every operation with all its derivatives: attention by the math kernel, nothing compiled,
    and written out what torch differentiates wrongly."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, was)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for where, name, by_hand in BY_HAND:
            stack.enter_context(mock.patch.object(where, name, by_hand))
        yield


def weight_norm_by_hand(v, g, dim):
    return v * g / v.square().sum([d for d in range(v.dim()) if d != dim], True).sqrt()


def layer_norm_by_hand(x, shape, weight=None, bias=None, eps=1e-5):
    dims = list(range(-len(shape), 0))
    out = (x - x.mean(dims, keepdim=True)) / (x.var(dims, False, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


# what torch differentiates wrongly, at some order: written out
BY_HAND = (
    (torch, "_weight_norm", weight_norm_by_hand),
    (sys.modules["torch.nn.utils.weight_norm"], "_weight_norm", weight_norm_by_hand),
    (F, "layer_norm", layer_norm_by_hand),
)


class Truth:
    """J v for many v at one point, reverse over reverse."""

    def __init__(self, g, lam, theta, batch, differences):
        self.at, self.lam, self.grad = (g, theta, batch), lam.clone().requires_grad_(), None
        self.differences = differences

    def jv(self, v):
        first = self.grad is None
        if first:
            with plainly():
                self.grad = self.gradient(self.lam)
        with plainly():
            (jv,) = torch.autograd.grad((self.grad * v).sum(), self.lam, retain_graph=True)
        if first and self.differences:  # the truth itself, along one direction
            e = torch.linspace(0.5, 1.5, jv.numel()).view_as(jv)
            along = differences_of(lambda t: self.gradient(self.lam + t * e) @ v)
            apart = abs(float((jv * e).sum() - along))
            assert apart <= ROUGH * float(jv.norm() + v.norm()), "the truth is not true"
        return jv

    def gradient(self, lam):
        g, theta, batch = self.at
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(g(lam, theta, batch), theta, create_graph=True)[0]


def differences_of(function, h=1e-5):
    """The derivative of a function of a number, at zero, by central differences."""
    with plainly():
        return (function(h).detach() - function(-h).detach()) / (2 * h)


def error(got, truth):
    return float((got - truth).detach().norm() / (truth.detach().norm() + 1e-12))


def jacobian(function, theta):
    theta = theta.clone().requires_grad_()
    with plainly():
        out = function(theta)
        rows = [
            torch.autograd.grad(o, theta, retain_graph=True, allow_unused=True)[0]
            for o in out.reshape(-1)
        ]
    rows = [torch.zeros_like(theta) if r is None else r for r in rows]
    return torch.stack(rows).view(*out.shape, -1)


def dense_ggn(model, loss, sigma, theta, batch):
    j = jacobian(lambda t: outputs_of(model, t, batch[0]), theta)  # (n, ..., C, d)
    n, d = len(j), j.shape[-1]
    j = j.reshape(n, -1, j.shape[-2], d)  # (n, T, C, d)
    h = torch.eye(j.shape[2]).expand(*j.shape[:3], -1)
    if loss != "mse":
        with plainly():
            p = outputs_of(model, theta, batch[0]).detach().softmax(-1).view(j.shape[:3])
        h = (torch.diag_embed(p) - p[..., None] * p[..., None, :]) / j.shape[1]
    return torch.einsum("i,itcd,itck,itke->de", sigma, j, h, j) / n + 2 * L2 * torch.eye(d)


class Dense:
    """Empirical Fisher, KFAC and EKFAC as matrices, from every example's gradient."""

    def __init__(self, model, loss, sigma, theta, batch):
        self.model, self.sigma, self.theta = model, sigma, theta
        self.d, self.n = theta.numel(), len(batch[0])

        def losses(t):
            return losses_of(outputs_of(model, t, batch[0]), batch[1], loss)

        self.g = jacobian(losses, theta)  # (n, d)
        self.pairs, self.calls = {}, {}
        hooks = [
            m.register_forward_hook(self.keep(name), with_kwargs=True)
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear | nn.Conv2d)
        ]
        with plainly():
            total = (sigma.sqrt() * losses(theta.clone().requires_grad_())).sum()
            for hook in hooks:
                hook.remove()
            for name, calls in self.calls.items():
                self.pairs[name] = [
                    (m, a, torch.autograd.grad(total, z, retain_graph=True, allow_unused=True))
                    for m, a, z in calls
                    if z is not None
                ]
        self.places, start = {}, 0
        for name, p in model.named_parameters():
            if p.requires_grad:
                place = torch.arange(start, start + p.numel())
                self.places[name] = place.view(len(p) if p.dim() else 1, -1)
                start += p.numel()

    def keep(self, name):
        def hook(module, inputs, options, output):
            if len(inputs) == 1:
                edge = get_gradient_edge(output) if output.requires_grad else None
                self.calls.setdefault(name, []).append((module, inputs[0].detach(), edge))

        return hook

    def fisher(self):
        return (self.g.T * self.sigma) @ self.g / self.n + 2 * L2 * torch.eye(self.d)

    def columns(self, name):
        """Inputs (R, d2) and output gradients (R, d1) of the one call of a layer."""
        ((module, a, (g,)),) = self.pairs[name]
        if g is None:
            g = torch.zeros(*a.shape[:-1], len(module.weight))
        if isinstance(module, nn.Linear):
            return a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        pad = module._reversed_padding_repeated_twice
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.unfold(F.pad(a, pad, mode), module.kernel_size, module.dilation, 0, module.stride)
        return a.mT.reshape(-1, a.shape[1]), g.flatten(2).mT.reshape(-1, g.shape[1])

    def matrix(self, layers, corrected):
        """The matrix with a Kronecker block (EKFAC: corrected) for these layers, diagonals else."""
        out = torch.diag((self.sigma[:, None] * self.g.square()).mean(0))
        for name, (with_weight, _) in layers.items():
            prefix = f"{name}." if name else ""
            parts = [self.places.get(prefix + p) for p in ("weight", "bias")]
            parts[0] = None if with_weight is None else parts[0]
            a, g = self.columns(name)
            if parts[1] is not None:
                a = torch.cat([a, torch.ones(len(a), 1)], 1)
            if parts[0] is None:  # the weight is frozen, or shared
                a = a[:, -1:]
            at = torch.cat([p for p in parts if p is not None], 1)
            a, b = a.T @ a / len(a), g.T @ g / self.n
            block = torch.kron(b, a)
            if corrected:
                (_, u_b), (_, u_a) = torch.linalg.eigh(b), torch.linalg.eigh(a)
                u = torch.kron(u_b, u_a)
                along = self.g[:, at.flatten()] @ u
                block = (u * (self.sigma[:, None] * along.square()).mean(0)) @ u.T
            out[at.flatten()[:, None], at.flatten()] = block
        return out + 2 * L2 * torch.eye(self.d)

    def faults(self, layers):
        """Layers with a block whose whole gradient is not sum g a^T over the rows of their call."""
        whole = self.sigma.sqrt() @ self.g
        for name, (with_weight, _) in layers.items():
            prefix = f"{name}." if name else ""
            a, g = self.columns(name)
            for local, made in (("weight", g.T @ a), ("bias", g.sum(0)[:, None])):
                at = self.places.get(prefix + local)
                if at is None or local == "weight" and with_weight is None:
                    continue
                if float((made - whole[at]).norm()) > TOLERANCE * float(whole.norm()):
                    yield f"{prefix}{local}"


# ------------------------------------------------------------------ one model's cells


class Cells:
    """What happened in each cell of one model: "", or what is wrong."""

    def __init__(self, name):
        self.name, self.happened = name, {}

    def attempt(self, cell, run):
        """Run a cell: it is "" if it is right, our refusal's sentence, or a fault."""
        try:
            faults = list(run())
        except Exception as err:
            where = traceback.extract_tb(err.__traceback__)[-1].filename
            ours = isinstance(err, ValueError | TypeError) and where.startswith(PACKAGE)
            said = f"{type(err).__name__}: {err}"
            self.happened[cell] = f"refused: {said}" if ours else f"RAW {where}: {said[:300]}"
        else:
            self.happened[cell] = "; ".join(f"WRONG {fault}" for fault in faults)

    def failures(self, refused):
        out = []
        for cell, what in self.happened.items():
            word = refused.get(cell)
            if word is None and what:
                out.append(f"{cell}: {what}")
            elif word is not None and not (what.startswith("refused: ") and word in what):
                out.append(f"{cell}: is to be refused with {word!r}, and is {what or 'a number'}")
        return out + [f"{cell}: is no cell" for cell in refused.keys() - self.happened.keys()]


def batches_of(kind, model, theta):
    """Two batches (x, y, index) with both kinds of targets: ours and mse's."""
    out = []
    index = torch.randperm(2 * N, generator=torch.Generator().manual_seed(2)).split(N)
    for x, i in zip(kind.inputs(), index, strict=True):
        with torch.random.fork_rng(), plainly():
            shape = outputs_of(kind.plain(model), theta.clone(), x).shape
        labels = torch.randint(shape[-1], shape[:-1])
        out.append((x, {"cross_entropy": labels, "mse": torch.randn(shape)}, i))
    return out


def run_cells(name):
    kind, cells = KINDS[name], Cells(name)
    torch.manual_seed(zlib.crc32(name.encode()))
    model = kind.make()
    plain = kind.plain(model)
    theta = bl.flatten(model) + 0.1 * torch.randn(bl.flatten(model).shape)  # not the module's own
    differences = name not in NO_POTENTIAL
    moves = model.training and any(True for _ in model.buffers())
    both = batches_of(kind, model, theta)
    for place in (*RISK, *PLAIN):
        tokens = not both[0][0].is_floating_point()
        loss = "mse" if tokens and place in ("inputs", "plain inputs") else kind.loss
        batches = [(x, y[loss], i) for x, y, i in both]
        lam = lam_for(place, theta, batches[0], both[0][1]["mse"])
        by_hand, _ = objective(place, plain, loss)
        _, loss_given = objective(place, model, loss)

        def outer(lam, theta, batch, loss=loss):
            fit = losses_of(outputs_of(model, theta, batch[0]), batch[1], loss).mean()
            return fit + 0.05 * (theta - 1).square().sum() + 0.1 * lam.square().sum()

        problem = bl.BilevelProblem(loss_given, outer)
        truths: dict[int, Truth] = {}
        calls = (problem, by_hand, lam, theta, batches, truths, moves, differences)
        for solver, make in SOLVERS.items():
            cells.attempt(f"{place}/{solver}", partial(faults_of, make, *calls))
        at = (loss_given, by_hand, place, plain, loss, lam, theta, batches, differences)
        for what in MATRICES.get(place, ()):
            cells.attempt(f"{place}/{what}", partial(matrix_faults, what, *at))
    return cells


def faults_of(make, problem, by_hand, lam, theta, batches, truths, moves, differences):
    """Two calls of one solver object, on two batches: what differs from the truth.

    `Direct` remembers nothing and takes long, so it is called once.
    """
    solver = make()
    for k, batch in enumerate(batches):
        if isinstance(solver, bl.Direct) and k == 0:
            continue
        before = [t.clone() for t in (lam, theta, batch[0])]
        again = copy.deepcopy(solver)
        outer_batch = batches[1 - k]
        h, info = bl.hypergradient(
            problem, lam, theta, batch, outer_batch, solver, return_info=True, diagnose=False
        )
        if not all(map(torch.equal, before, (lam, theta, batch[0]))):
            yield f"batch {k}: lam, theta or x was written to"
        if k not in truths or moves:
            truths[k] = Truth(by_hand, lam, theta, batch, differences)
        jv = truths[k].jv(info.v)
        if (e := error(0.2 * lam - h, jv)) > TOLERANCE:
            yield f"batch {k}: J v is off by {e:.2g} ({info.solve.cross})"
        if isinstance(solver, bl.KFAC) and k == 1:
            short = bl.hypergradient(problem, lam, theta, batch, outer_batch, again)
            if (e := error(short, h)) > TOLERANCE:
                yield f"batch {k}: without v, J v is off by {e:.2g} ({info.solve.cross})"


def matrix_faults(what, risk, by_hand, place, model, loss, lam, theta, batches, differences):
    """A matrix on both batches against the dense one; H also against differences."""
    for k, batch in enumerate(batches):
        seen = shifted(lam, batch) if place == "inputs" else batch
        if place == "inputs":
            sigma = torch.ones(N)
        elif place == "weights":
            sigma = by_index(lam, batch)
        else:
            with plainly():
                losses = losses_of(outputs_of(model, theta.clone(), batch[0]), batch[1], loss)
            sigma = by_loss(lam, batch, losses.detach())
        at, e = (risk, lam, theta, batch), torch.linspace(0.5, 1.5, len(theta))
        if what == "H":

            def slope(t, batch=batch, e=e):
                return gradient(by_hand, lam, (theta + t * e).requires_grad_(), batch)

            got, truth = hvp(*at, e), hvp_by_hand(by_hand, lam, theta, batch, e)
            if differences and (off := error(got, differences_of(slope))) > ROUGH:
                yield f"batch {k}: off by {off:.2g} from differences"
        elif what == "GGN":
            got, truth = GGN(*at) @ e, dense_ggn(model, loss, sigma, theta, seen) @ e
        elif what == "empirical Fisher":
            got = EmpiricalFisher(*at) @ e
            truth = Dense(model, loss, sigma, theta, seen).fisher() @ e
        else:
            operator, solver = {
                "KFAC matrix": (kfac_operator, bl.KFAC(1.0, "empirical", damping_rule="exact")),
                "KFAC blocks": (None, None),
                "EKFAC matrix": (ekfac_operator, bl.EKFAC(1.0, "empirical")),
            }[what]
            layers = kfac_factors(*at, fisher="empirical")
            got = operator and operator(*at, fisher="empirical").dense()
            dense = Dense(model, loss, sigma, theta, seen)
            if got is None:
                for fault in dense.faults(layers):
                    yield f"batch {k}: the block of {fault} is not that of its gradient"
                continue
            truth = dense.matrix(layers, corrected=what == "EKFAC matrix")
            v, _ = solver.solve(bl.BilevelProblem(risk, risk), lam, theta, batch, e, False)
            if (off := error(truth @ v + v, e)) > TOLERANCE:
                yield f"batch {k}: its inverse is off by {off:.2g}"
        if (off := error(got, truth)) > TOLERANCE:
            yield f"batch {k}: off by {off:.2g}"


def hvp_by_hand(g, lam, theta, batch, v):
    theta = theta.clone().requires_grad_()
    with plainly():
        grad = gradient(g, lam, theta, batch)
        return torch.autograd.grad(grad @ v, theta)[0]


def gradient(g, lam, theta, batch):
    return torch.autograd.grad(g(lam, theta, batch), theta, create_graph=True)[0]


# ------------------------------------------------------------------ which cells are refused


def cells(places, columns):
    """Cells of these places and columns, as far as they are there."""
    return [
        f"{place}/{column}"
        for place in places
        for column in columns
        if column in SOLVERS or column in MATRICES.get(place, ())
    ]


ALL = (*SOLVERS, *MATRICES["weights"])
NEED_RISK = [column for column in SOLVERS if "GGN" in column or "KFAC" in column]
NEED_RISK.append("Richardson")
KRONECKER = [column for column in ALL if "KFAC" in column or column == "Richardson"]
EXAMPLES = ["EKFAC", "EKFAC empirical", "EKFAC matrix"]
DIAGONALS = [
    column
    for column in KRONECKER
    if column not in ("KFAC damping", "KFAC drop", "EKFAC empirical", "KFAC blocks")
]
BY_PRODUCTS = [*SOLVERS, "H", "GGN", "empirical Fisher"]

EVERYWHERE = dict.fromkeys(cells(PLAIN, NEED_RISK), "give a bilevel_lite.WeightedRisk")


def in_risks(columns, word):
    return dict.fromkeys(cells(RISK, columns), word)


def in_plain(word, *but):
    """Solvers that take a plain function, but for those places where no such derivative is met."""
    columns = [column for column in SOLVERS if column not in NEED_RISK]
    return {c: word for c in cells(PLAIN, columns) if c not in but}


def no_diagonal(parameter):
    """KFAC without a way to this parameter's diagonal; damping alone and dropping are left."""
    return in_risks(DIAGONALS, f"parameter {parameter!r} has no Kronecker block, and")


def no_examples(parameter):
    """EKFAC alone needs examples told apart."""
    return in_risks(EXAMPLES, f"each example's gradient, but for parameter {parameter!r}")


def mixing(layer):
    """Nothing that Kronecker factors are made of exists where a layer mixes the examples."""
    return in_risks(KRONECKER, f"layer {layer!r}")


def no_second(word, *but):
    """No second derivative: everything but matrices that need none."""
    return in_risks(BY_PRODUCTS, word) | in_plain(word, *but)


def nothing(first, then):
    """Refused by the first gradient already; matrices, which come without one, with other words."""
    solvers = dict.fromkeys(cells((*RISK, *PLAIN), SOLVERS), first)
    return solvers | in_risks([column for column in ALL if column not in SOLVERS], then)


def no_features():
    """Features that move the head's outputs by a constant, which has no force."""
    columns = [column for column in SOLVERS if column not in NEED_RISK]
    return dict.fromkeys(cells(["features"], columns), "does not depend on lam")


IN_PLACE = "changes theta in place"
ONCE = "marked once_differentiable"
SCALED = "scale_grad_by_freq=True"
SPARSE = "sparse tensors"
AGAIN = "activation checkpointing"
ITERATES = "spectral_norm in training mode"
KEEPS = "has another value"
PARALLEL = "DataParallel module"
HELD_STILL = ("regulariser/Identity",)  # reads the penalty's derivatives alone

REFUSED: dict[str, dict[str, str]] = {
    "bilinear": no_diagonal("body.inner.weight"),
    "embedding with max_norm": nothing(IN_PLACE, "modified") | {"weights/H": IN_PLACE},
    "embedding with scale_grad_by_freq": no_second(SCALED)
    | no_diagonal("0.weight")
    | dict.fromkeys(cells((*RISK, *PLAIN), SOLVERS), SCALED),
    "embedding that is sparse": nothing(SPARSE, SPARSE),
    **{
        f"embedding bag{words}": no_second("'_embedding_bag_backward'", *HELD_STILL)
        for words in (", mean", ", sum", ", max", " with padding_idx")
    },
    "embedding bag with max_norm": nothing(IN_PLACE, "inner_loss: torch cannot differentiate")
    | {"weights/H": IN_PLACE, "weights/KFAC matrix": "", "losses/KFAC matrix": ""},
    "embedding bag that is sparse": nothing(SPARSE, SPARSE),
    "position table looked up once, T != n": no_diagonal("p.weight"),
    "position table looked up once, T == n": no_diagonal("p.weight"),
    "RNN": no_diagonal("body.weight_ih_l0"),
    "LSTM": no_diagonal("body.weight_ih_l0"),
    "GRU": no_diagonal("body.weight_ih_l0"),
    "LSTM, time first inside, T == n": no_diagonal("r.weight_ih_l0"),
    "GRU on packed sequences": no_diagonal("r.weight_ih_l0"),
    "RNN cell, by hand": no_diagonal("r.weight_ih"),
    "batch norm 2d, no running statistics": mixing("1"),
    "batch norm in training": mixing("1"),
    "batch norm 2d in training, no momentum": mixing("1"),
    "batch norm as a function": no_examples("a.weight"),
    "batch centring, large inputs only": no_examples("a.weight"),
    "weight norm, new": no_diagonal("0.parametrizations.weight.original0"),
    "weight norm of a convolution": no_diagonal("0.parametrizations.weight.original0"),
    "spectral norm, new": no_diagonal("0.parametrizations.weight.original"),
    "parametrised linear": no_diagonal("0.parametrizations.weight.original"),
    "parametrised linear, kept within a pass": no_diagonal(
        "body.0.parametrizations.weight.original"
    ),
    "attention": no_diagonal("body.m.in_proj_weight"),
    "attention without weights, in training": no_diagonal("body.m.in_proj_weight"),
    "attention, batch second inside": no_diagonal("body.m.in_proj_weight"),
    "transformer encoder layer": no_diagonal("body.self_attn.in_proj_weight"),
    "transformer encoder layer, no dropout, in training": no_diagonal(
        "body.self_attn.in_proj_weight"
    ),
    "a weight read outside of its module": no_diagonal("a.weight"),
    "a weight read as a function's argument only": no_diagonal("a.weight"),
    "a penalty on a weight among the outputs": no_diagonal("a.weight"),
    "lists and dicts": no_diagonal("free.0"),
    "modules called with keywords": no_diagonal("a.weight"),
    "nn.DataParallel": nothing(PARALLEL, PARALLEL),
    "sorts inside; the first batch is sorted": no_examples("a.weight"),
    "sorts inside": no_examples("a.weight"),
    "sends rows to one of two experts": no_examples("one.weight"),
    "time first inside, T != n": no_examples("a.weight"),
    "time first inside, T == n": no_examples("a.weight"),
    "flat tokens, time after time": no_examples("a.weight"),
    "two views of each example, one after the other": no_examples("a.weight"),
    "attention between examples": no_examples("a.weight"),
    "shapes that depend on the batch": no_diagonal("table"),
    "rows added and taken away": no_examples("a.weight"),
    "a function that is differentiable once": no_second(ONCE),
    "forward hook that mixes examples": no_examples("0.weight"),
    "checkpoint": nothing(AGAIN, AGAIN),
    "checkpoint, reentrant, of the inputs": nothing(AGAIN, AGAIN),
    "checkpoint, reentrant": nothing(AGAIN, AGAIN),
    **{
        name: in_risks(ALL, KEEPS) | in_plain(KEEPS)
        for name in (
            "a buffer that counts calls",
            "an attribute that counts calls",
            "a list that grows",
            "a running mean that is read",
            "activations of the pass before",
            "a hook that counts calls",
        )
    },
    **{
        f"spectral norm, {age}, in training": in_risks(ALL, ITERATES) | in_plain(ITERATES)
        for age in ("old", "new")
    },
    "forces: a gradient inside": no_diagonal("a.weight") | no_features(),
    "forces of a softmax": no_diagonal("a.weight") | no_features(),
    "forces of a layer norm": no_diagonal("a.weight") | no_features(),
    "torch.func inside": no_diagonal("a.weight") | no_features(),
    "forward mode inside": no_diagonal("a.weight"),
    "vmap inside": no_diagonal("a.weight"),
    "distances": no_second("'_cdist_backward'", *HELD_STILL),
}
for name in ("embedding with max_norm", "embedding bag with max_norm"):
    del REFUSED[name]["weights/KFAC blocks"]  # the head's, from inputs that are normalised

# what training follows there is the gradient of no function, so that H is autograd's own
NO_POTENTIAL = {
    "embedding with padding_idx",  # its row is not trained, and yet read
    "embedding with padding_idx=-1",
    "gradient reversal",
    "gradient reversal with a jvp of its own",
    "tensor hook where a gradient is asked for",
    "backward hook",
    "backward hook on a linear layer",
    "backward pre-hook",
    "straight-through rounding",
    "detached part",
    "a branch without gradients",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_cell_is_right_or_refused(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = run_cells(name)
    failures = done.failures(EVERYWHERE | REFUSED.get(name, {}))
    assert not failures, f"{len(failures)} of {len(done.happened)} cells:\n" + "\n".join(failures)


# ------------------------------------------------------------------ what the table found


def test_a_module_under_two_names_gets_its_own_parameters_back():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    before, theta = list(model.parameters()), bl.flatten(model) + 1
    bl.WeightedRisk(model)(torch.zeros(1), theta, (torch.randn(N, 4), torch.zeros(N, dtype=int)))
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("given", ["risk", "function"])
def test_checkpointing_is_refused_also_where_theta_is_the_modules_own(given):
    model = KINDS["checkpoint"].make()
    risk = bl.WeightedRisk(model, weight=by_index)
    loss = risk if given == "risk" else lambda *at: risk(*at)
    batch = (torch.randn(N, 5), torch.zeros(N, dtype=int), torch.arange(N))
    with pytest.raises(ValueError, match=r"checkpointing.*gradient_checkpointing_disable"):
        gradient_and_value(loss, torch.zeros(N), bl.flatten(model), batch)


def inputs_by_a_gradient(model, theta):
    """Inputs moved along the sign of their own gradient, and by lam."""

    def inputs(lam, batch):
        x = batch[0].clone().requires_grad_()
        loss = F.cross_entropy(outputs_of(model, theta, x), batch[1])
        (slope,) = torch.autograd.grad(loss, x)
        return batch[0] + 0.1 * slope.sign() + lam, *batch[1:]

    return inputs


@pytest.mark.parametrize("solver", ["CG GGN", "KFAC", "EKFAC", "Identity"])
def test_inputs_may_be_made_with_a_gradient(solver):
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    theta, lam = bl.flatten(model), 0.1 * torch.randn(5)
    batch = (torch.randn(N, 5), torch.randint(3, (N,)), torch.arange(N))
    inputs = inputs_by_a_gradient(model, theta)
    problem = bl.BilevelProblem(bl.WeightedRisk(model, inputs=inputs), bl.WeightedRisk(model))
    h, info = bl.hypergradient(
        problem, lam, theta, batch, batch, SOLVERS[solver](), return_info=True
    )

    def by_hand(lam, theta, batch):
        x, y, _ = inputs(lam, batch)
        return losses_of(outputs_of(model, theta, x), y, "cross_entropy").mean()

    assert error(-h, Truth(by_hand, lam, theta, batch, True).jv(info.v)) < TOLERANCE


def penalised(normalise):
    """A gradient penalty on a normalised linear map: third derivatives of the normalisation."""

    def loss(lam, theta, batch):
        x = batch.clone().requires_grad_()
        out = torch.tanh(normalise((x + lam) @ theta.view(4, 3))).square().sum()
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        return slope.square().sum() + theta.square().sum()

    return loss


def moving(h):
    return F.batch_norm(h, torch.zeros(3), torch.ones(3), training=True)


@pytest.mark.parametrize(
    "normalise",
    [
        lambda h: F.layer_norm(h, (3,), torch.ones(3), torch.ones(3)),
        lambda h: torch.layer_norm(h, (3,)),
        lambda h: F.batch_norm(h, None, None, torch.ones(3), torch.ones(3), training=True),
        lambda h: F.batch_norm(h, torch.zeros(3), torch.ones(3)),
        lambda h: torch.batch_norm(h, None, None, None, None, True, 0.1, 1e-5, False),
        moving,
        lambda h: F.instance_norm(h.T[None], weight=torch.ones(3), bias=torch.ones(3)),
        lambda h: torch.instance_norm(h.T[None], None, None, None, None, True, 0.1, 1e-5, False),
        lambda h: F.group_norm(h, 1),
        lambda h: torch.func.vmap(lambda row: F.layer_norm(row, (3,)))(h),
    ],
)
def test_second_derivatives_of_a_gradient_penalty(normalise):
    loss, batch, e = penalised(normalise), torch.randn(N, 4), torch.linspace(0.5, 1.5, 12)
    lam, theta = torch.randn(N, 4), torch.randn(12)

    def slope(t, along=0.0):
        at = (theta + t * e).requires_grad_()
        return torch.autograd.grad(loss(lam + along, at, batch), at)[0]

    h = 1e-5
    truth = (slope(h) - slope(-h)) / (2 * h)
    assert error(hvp(loss, lam, theta, batch, e), truth) < ROUGH
    w = torch.randn(N, 4)
    truth = (slope(0, h * w) - slope(0, -h * w)) @ e / (2 * h)
    assert error((cross_vp(loss, lam, theta, batch, e) * w).sum(), truth) < ROUGH


def tangent(by):
    """A loss that holds a derivative by forward mode, of a layer norm."""

    def net(theta, x):
        return F.layer_norm(x @ theta.view(4, 3), (3,)).tanh()

    def along(theta, x):
        if by == "torch.func.jvp":
            return torch.func.jvp(lambda x: net(theta, x), (x,), (torch.ones_like(x),))[1]
        if by == "jacfwd":
            return torch.func.vmap(torch.func.jacfwd(lambda x: net(theta, x)))(x).sum(-1)
        with fwad.dual_level():
            out = net(theta, fwad.make_dual(x, torch.ones_like(x)))
            return fwad.unpack_dual(out).tangent.clone()

    return lambda lam, theta, x: (lam * along(theta, x).square().sum(1)).sum() + theta @ theta


def flatness(lam, theta, x):
    """A penalty on the gradient in theta, over weight norm: first derivatives need second ones."""
    theta = theta if theta.requires_grad else theta.clone().requires_grad_()
    weight = torch._weight_norm(theta[:12].view(3, 4), theta[12:].view(3, 1), 0)
    value = (lam * (x @ weight.T).tanh().square().sum(1)).sum()
    return value + torch.autograd.grad(value, theta, create_graph=True)[0].square().sum()


@pytest.mark.parametrize(
    "loss, d",
    [*((tangent(by), 12) for by in ("torch.func.jvp", "jacfwd", "dual_level")), (flatness, 15)],
    ids=["torch.func.jvp", "jacfwd", "dual_level", "flatness"],
)
def test_all_derivatives_of_a_loss_that_holds_one(loss, d):
    """The first against differences of its values, the second against differences of the first."""
    batch, lam, theta = torch.randn(N, 4), torch.rand(N) + 0.5, torch.randn(d)
    e, w, h = torch.linspace(0.5, 1.5, d), torch.randn(N), 1e-5

    def across(function):
        return (function(h) - function(-h)) / (2 * h)

    def value(t):
        return loss(lam, theta + t * e, batch).detach()

    def slope(t, s=0.0):
        return theta_gradient(loss, lam + s * w, theta + t * e, batch)[1]

    assert error(gradient_and_value(loss, lam, theta, batch)[2] @ e, across(value)) < ROUGH
    assert error(slope(0) @ e, across(value)) < ROUGH
    assert error(hvp(loss, lam, theta, batch, e), across(slope)) < ROUGH
    truth = across(lambda s: slope(0, s) @ e)
    assert error((cross_vp(loss, lam, theta, batch, e) * w).sum(), truth) < ROUGH


def across_points(loss, lam, theta):
    """H e and J e against differences of the gradient, which is right at these points."""
    e, w, h = torch.linspace(0.5, 1.5, len(theta)), torch.randn_like(lam), 1e-6

    def slope(t, s=0.0):
        return theta_gradient(loss, lam + s * w, theta + t * e, None)[1]

    truth = (slope(h) - slope(-h)) / (2 * h), (slope(0, h) - slope(0, -h)) @ e / (2 * h)
    got = hvp(loss, lam, theta, None, e), (cross_vp(loss, lam, theta, None, e) * w).sum()
    return [error(one, other) for one, other in zip(got, truth, strict=True)]


@pytest.mark.parametrize(
    "power",
    [torch.pow, Tensor.pow, torch.float_power, lambda a, b: a**b,
     lambda a, b: torch.pow(input=a, exponent=b), lambda a, b: a.pow(exponent=b),
     lambda a, b: (1 * a).pow_(b), lambda a, b: operator.ipow(1 * a, b),
     lambda a, b: torch.cat([a[:, :1] ** b[0], a[:, 1:] ** b[1:]], 1)],
)  # fmt: skip
def test_a_learned_exponent_of_exactly_zero(power):
    """A focal loss begins there. With torch's own forms J v was off by half."""
    x, y = torch.randn(N, 4), torch.randn(N, 3)

    def loss(lam, theta, _):
        p = torch.sigmoid(x @ theta.view(4, 3))
        return (power(1 - p, lam) * (p - y).square()).sum()

    for lam in (torch.zeros(3), torch.tensor([0.0, 1.0, 2.0])):
        assert max(across_points(loss, lam, torch.randn(12))) < ROUGH


@pytest.mark.parametrize(
    "square",
    [
        lambda d: torch.abs(d) ** 2, lambda d: d.abs().square(), lambda d: d.abs() * d.abs(),
        lambda d: d.absolute() ** 2, lambda d: abs(d).pow(2.0), lambda d: torch.abs(input=d) ** 2,
        lambda d: (1 * d).abs_() ** 2, lambda d: (1 * d).absolute_().square(),
        lambda d: F.l1_loss(d, torch.zeros_like(d), reduction="none") ** 2,
    ],
)  # fmt: skip
def test_the_square_of_an_absolute_value_at_zero(square):
    """At the start of a proximal term all of it is zero, and torch's H and J of it were, too."""
    x, lam = torch.randn(N, 4), torch.randn(4)
    theta = lam + torch.tensor([0.0, 0.0, 0.3, -0.2])

    def loss(lam, theta, _):
        return (x @ theta).tanh().sum() + square(theta - lam).sum()

    assert max(across_points(loss, lam, theta)) < ROUGH
    problem = bl.BilevelProblem(loss, lambda lam, theta, _: (theta - 1).square().sum())
    plain = bl.BilevelProblem(
        lambda lam, theta, _: (x @ theta).tanh().sum() + (theta - lam).square().sum(),
        problem.outer_loss,
    )
    for mode in ("reverse", "forward"):
        ends = [bl.unrolled_hypergradient(p, lam, lam, 3, 0.1, mode) for p in (problem, plain)]
        assert error(*ends) < TOLERANCE


def test_the_square_of_an_absolute_value_within_a_loss_that_holds_a_derivative():
    """x is at right angles to w, so that z = 0, and its slope in x still moves with w."""
    x, theta = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([0.7, -0.7])

    def penalty(square):
        def loss(lam, theta, _):
            at = x.clone().requires_grad_()
            (slope,) = torch.autograd.grad(square(at @ theta).sum(), at, create_graph=True)
            return lam * ((slope + 1) ** 3 @ torch.tensor([1.0, 2.0])).sum()

        return loss

    at = torch.ones(()), theta, None
    squares = torch.square, lambda z: z.abs() ** 2
    one, other = (theta_gradient(penalty(square), *at)[1] for square in squares)
    assert float(one.norm()) > 1 and error(other, one) < TOLERANCE


def test_the_gradient_of_an_absolute_value_is_torchs():
    """Zero at zero, also on the way to the second derivatives."""
    at = torch.ones(()), torch.tensor([0.0, -2.0, 0.5]), None
    loss = lambda lam, theta, _: lam * theta.abs().sum() + theta.relu().abs().sum()  # noqa: E731
    assert theta_gradient(loss, *at)[1].tolist() == [0.0, -1.0, 2.0]
    assert hvp(loss, *at, torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    product = lambda lam, theta, _: lam * theta[0].abs() * theta[1]  # noqa: E731
    assert hvp(product, *at, torch.ones(3)).tolist() == [0.0, 0.0, 0.0]
    assert float(cross_vp(product, *at, torch.ones(3))) == 0.0


class BackwardsOnly(nn.Linear):
    """Its forward-mode derivative fails in the words of an x that does not fit."""

    def forward(self, x):
        if fwad._current_level >= 0:
            raise RuntimeError("The size of tensor a (1) must match the size of tensor b (2)")
        return super().forward(x)


@pytest.mark.parametrize(
    "make", [KINDS["weight norm, old, one length"].make, lambda: BackwardsOnly(5, 3)]
)
def test_where_forward_mode_fails_on_a_models_shapes_the_batch_is_not_to_blame(make):
    torch.manual_seed(0)
    model = make()
    risk = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]].sigmoid(), l2=0.1)
    theta, lam = bl.flatten(model), torch.randn(N)
    batch = (torch.randn(N, 5), torch.randint(3, (N,)), torch.arange(N))
    h, info = bl.hypergradient(
        bl.BilevelProblem(risk, bl.WeightedRisk(model)), lam, theta, batch, batch, bl.KFAC(1.0),
        return_info=True,
    )  # fmt: skip
    assert info.solve.cross.startswith("double backward (no forward mode")

    def by_hand(lam, theta, batch):
        x, y, _ = batch
        each = losses_of(outputs_of(model, theta, x), y, "cross_entropy")
        return (lam.sigmoid() * each).mean()

    assert error(-h, Truth(by_hand, lam, theta, batch, True).jv(info.v)) < TOLERANCE


def unnamed(how):
    """Weight norm by a name that is not torch's own function's."""

    def norm(v, g):
        if how == "torch.ops":
            return torch.ops.aten._weight_norm_interface(v, g, 0)[0]
        return scripted(v, g)

    return lambda lam, theta, x: (
        lam * (x @ norm(theta[:12].view(3, 4), theta[12:].view(3, 1)).T).tanh().square().sum(1)
    ).sum()


@torch.jit.script
def scripted(v: Tensor, g: Tensor) -> Tensor:
    return torch._weight_norm(v, g, 0)


@pytest.mark.parametrize("how", ["torch.ops", "TorchScript"])
def test_a_wrong_operation_by_another_name_is_refused(how):
    at = torch.rand(N), torch.randn(15), torch.randn(N, 4)
    with pytest.raises(ValueError, match="WeightNormInterface came by another way"):
        hvp(unnamed(how), *at, torch.randn(15))


class LayerNormOfOnesOwn(torch.autograd.Function):
    """Called like torch's, and differentiable as often as one likes."""

    @staticmethod
    def forward(ctx, a):
        ctx.save_for_backward(a)
        return a**3

    @staticmethod
    def backward(ctx, slope):
        return 3 * ctx.saved_tensors[0] ** 2 * slope


def test_a_function_of_ones_own_with_such_a_name_passes():
    batch, lam, theta = torch.randn(N, 4), torch.randn(N, 4), torch.randn(12)
    named = penalised(LayerNormOfOnesOwn.apply)
    plain = penalised(lambda h: h**3)
    e = torch.linspace(0.5, 1.5, 12)
    assert error(hvp(named, lam, theta, batch, e), hvp(plain, lam, theta, batch, e)) < TOLERANCE


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="torch before 2.13")
def test_cross_entropy_of_a_linear_map_in_chunks():
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    lam, theta, v = torch.randn(4), torch.randn(12), torch.randn(12)

    def loss(options):
        def value(lam, theta, batch):
            given = {} if options is None else {"options": options}
            return F.linear_cross_entropy(x + lam, theta.view(3, 4), y, **given)

        return value

    chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=2, allow_retain_graph=True)
    for product in (hvp, cross_vp):
        got, truth = (product(loss(o), lam, theta, None, v) for o in (chunks, None))
        assert error(got, truth) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "gradient reversal with a jvp of its own",
        "tensor hook where a gradient is asked for",
        "a branch without gradients",
    ],
)
def test_in_float32_no_wrong_slopes_agree_by_chance(name):
    """With one random number 1 in 60 of these were off by up to 200 %."""
    torch.manual_seed(0)
    for _ in range(100):
        model = KINDS[name].make().float()
        theta, batch = bl.flatten(model), (torch.randn(N, 5).float(), torch.randint(3, (N,)))
        v, risk = torch.randn_like(theta), bl.WeightedRisk(model)
        got, route = slopes.slopes_and_route(risk, theta, batch, v)
        assert error(got, slopes._twice(risk, theta, batch, v)) < 1e-2, route


@pytest.mark.parametrize("looks", [True, False])
def test_a_derivative_taken_aside_is_none_of_the_losss_own(looks):
    """What a loss only looks at asks for no other form of its normalisation, and no second call."""
    calls = []

    def loss(theta):
        calls.append(theta)
        value = F.layer_norm(theta, theta.shape).pow(3).sum()
        with exact.aside() if looks else contextlib.nullcontext():
            torch.autograd.grad(value, theta, retain_graph=True)
        return value

    exact.exactly(loss, torch.arange(3.0).requires_grad_())
    assert len(calls) == (1 if looks else 2)


def _scaled_rows(table, way):
    where, ends = torch.tensor([0, 0, 1]), torch.arange(3)
    return {
        "torch.embedding": lambda: torch.embedding(table, where, -1, True, False),
        "torch.embedding_bag": lambda: torch.embedding_bag(table, where, ends, True, 0)[0],
        "F.embedding": lambda: F.embedding(where, table, None, None, 2.0, True),
        "F.embedding_bag": lambda: F.embedding_bag(where, table, ends, None, 2.0, True, "sum"),
    }[way]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", [False, True])  # in a transform, as in `bl.meta`
@pytest.mark.parametrize(
    "way", ["torch.embedding", "torch.embedding_bag", "F.embedding", "F.embedding_bag"]
)
def test_gradients_that_an_embedding_scales_are_refused_however_it_is_called(way, hidden, dtype):
    def g(lam, theta, batch):
        return (lam * _scaled_rows(theta.view(2, 2), way) ** 3).sum()

    lam, theta = torch.ones(1, dtype=dtype), torch.arange(1.0, 5.0, dtype=dtype)
    with pytest.raises(ValueError, match="scale_grad_by_freq=True, so what training follows"):
        if hidden:
            torch.func.grad(lambda theta: exact.exactly(g, lam, theta, None))(theta)
        else:
            cross_vp(g, lam, theta, None, torch.ones_like(theta))


def test_a_frozen_embedding_may_scale_what_nobody_follows():
    model = nn.Embedding(2, 2, scale_grad_by_freq=True).requires_grad_(False)

    def g(lam, theta, batch):
        return (lam * theta**2 * model(torch.tensor([0, 0, 1])).sum()).sum()

    hv = hvp(g, torch.ones(1), torch.ones(1), None, torch.ones(1))
    rows = torch.tensor([0, 0, 1])
    assert hv.item() == pytest.approx(2 * float(model.weight[rows].sum()), rel=1e-5)


@pytest.mark.parametrize("by_place", [False, True])
@pytest.mark.parametrize("padding", [0, -1, None])
def test_the_padding_row_of_an_embedding_has_no_tangent(padding, by_place):
    """Without a second route to fall back to: the outputs are linear, so the tangent is known."""
    words, v = torch.tensor([[0, 2], [1, 0]]), torch.arange(1.0, 7.0)

    def outputs(theta):
        table = theta.view(3, 2)
        if by_place:  # where -1 is no padding
            return torch.embedding(table, words, -1 if padding is None else padding % 3)
        return F.embedding(words, table, padding)

    _, along = push_forward(outputs, torch.zeros(6), v)
    rows = v.view(3, 2).clone()
    if padding is not None:
        rows[padding] = 0
    assert torch.equal(along, rows[words])


I, J = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 0]])
CUT = {
    "coo": lambda w: torch.sparse_coo_tensor(torch.stack([I, J]), w, (3, 3)).to_dense(),
    "csr": lambda w: torch.sparse_csr_tensor(torch.tensor([0, 2, 3, 4]), J, w, (3, 3)).to_dense(),
    "scan": lambda w: scan(lambda c, x: (c + x, (c + x) ** 2), torch.zeros(()), w)[1],
    "while_loop": lambda w: while_loop(
        lambda k, h: k < 3, lambda k, h: (k + 1, h.tanh() * h), (torch.tensor(0), w)
    )[1],
    "map": lambda w: torch_map(lambda r: r.tanh() * r, w),
    "cond": lambda w: torch.cond(w.sum() > -9, lambda w: w.tanh() * w, lambda w: w.sin(), (w,)),
}


@pytest.mark.parametrize("product", [hvp, cross_vp])
@pytest.mark.parametrize("how", CUT)
def test_second_derivatives_short_of_a_part_are_refused(how, product):
    """Of first order alone they are right, and taken."""
    lam, theta, e = torch.rand(1) + 1, torch.rand(4) + 0.5, torch.linspace(0.5, 1.5, 4)

    def g(lam, theta, batch):
        return (lam * CUT[how](theta**2) ** 3).sum()

    if how != "csr":  # of which torch has no derivative at all
        slope = theta_gradient(g, lam, theta)[1] @ e
        h = 1e-5
        truth = (g(lam, theta + h * e, None) - g(lam, theta - h * e, None)) / (2 * h)
        assert error(slope, truth) < ROUGH
    word = "builds a sparse tensor" if how in ("coo", "csr") else "torch's own control flow"
    with pytest.raises(ValueError, match=word):
        product(g, lam, theta, None, e)


@pytest.mark.parametrize("how", ["scan", "while_loop", "map", "cond"])
def test_control_flow_is_seen_in_the_graph_too(how, monkeypatch):
    """Where it came by a name that no mode sees."""
    monkeypatch.setattr(exact, "steers", lambda function: False)
    w = torch.rand(4, requires_grad=True)
    with pytest.raises(ValueError, match="torch's own control flow"):
        exact.exactly(lambda w: CUT[how](w).sum(), w)


def test_an_associative_scan_is_right():
    lam, theta, e = torch.rand(1) + 1, torch.rand(4) + 0.5, torch.linspace(0.5, 1.5, 4)

    def scanned(lam, theta, batch):
        out = associative_scan(torch.mul, theta[None] ** 2, 1, combine_mode="generic")
        return (lam * out**2).sum()

    def plain(lam, theta, batch):
        return (lam * torch.stack([(theta[: k + 1] ** 2).prod() for k in range(4)]) ** 2).sum()

    for product in (hvp, cross_vp):
        along, truth = (product(g, lam, theta, None, e) for g in (scanned, plain))
        assert error(along, truth) < TOLERANCE


def test_a_constant_sparse_tensor_is_taken():
    lam, theta, e = torch.rand(1), torch.rand(3, 2), torch.rand(3, 2)
    matrix = CUT["coo"](torch.rand(4))

    def loss(a):
        return lambda lam, theta, batch: (lam * (a @ theta.view(3, 2)) ** 3).sum()

    sparse, dense = (
        hvp(loss(a), lam, theta.view(-1), None, e.view(-1)) for a in (matrix.to_sparse(), matrix)
    )
    assert error(sparse, dense) < TOLERANCE


class Clipped(nn.Module):
    """Clips the gradients of some rows (a bound), or stops them where x is an outlier."""

    def __init__(self, how):
        super().__init__()
        self.a, self.o, self.how = nn.Linear(5, 4), nn.Linear(4, 3), how

    def forward(self, x):
        h = torch.tanh(self.a(x))
        if self.how == "no_grad":
            with torch.no_grad():
                still = h.clone()
            h = torch.where(x[:, :1] > 3, still, h)
        elif h.requires_grad:
            clip = self.how == "clip"
            h.register_hook(lambda g: g.clamp(-0.1, 0.1) if clip else g * (x[:, :1] < 3))
        return self.o(h)


@pytest.mark.parametrize("how", ["clip", "stop", "no_grad"])
def test_gradients_that_are_clipped_or_stopped_in_some_rows(how):
    """J v against differences of a training's gradient, in batches with and without outliers."""
    torch.manual_seed(0)
    model, lam, n, h = Clipped(how), torch.randn(24), 24, 1e-5
    theta = bl.flatten(model)
    risk = bl.WeightedRisk(model, weight=by_index, l2=0.05)
    problem = bl.BilevelProblem(risk, bl.WeightedRisk(model))

    def slope(lam, batch):
        model.zero_grad()
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        (by_index(lam, batch) * losses).mean().backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])

    for k in range(4):
        x = torch.randn(n, 5).clamp(-2.5, 2.5)
        x[7, 0] = 5 if k else 0
        batch = x, torch.randint(3, (n,)), torch.arange(n)
        jv, info = bl.hypergradient(
            problem, lam, theta, batch, batch, bl.Identity(0.5), return_info=True, diagnose=False
        )
        axes = torch.eye(n) * h
        truth = [(slope(lam + e, batch) - slope(lam - e, batch)) @ info.v for e in axes]
        assert error(-info.implicit, torch.stack(truth) / (2 * h)) < ROUGH, info.solve.cross


class OneSize(nn.Module):
    """Takes batches of one size alone."""

    def __init__(self, how):
        super().__init__()
        self.a, self.o, self.how, self.table = nn.Linear(5, 4), nn.Linear(4, 3), how, {N: 1.0}

    def forward(self, x):
        if self.how == "assert":
            assert len(x) == N, len(x)
        if self.how == "type" and len(x) != N:
            raise TypeError(len(x))
        return self.o(torch.tanh(self.a(x * (self.table[len(x)] if self.how == "table" else 1))))


@pytest.mark.parametrize("solver", ["KFAC", "Identity"])
@pytest.mark.parametrize("how", ["assert", "type", "table"])
def test_a_model_that_takes_one_size_of_batches(how, solver):
    model, plain = OneSize(how), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = torch.randn(N, 5), torch.randint(3, (N,)), torch.arange(N)
    theta, made = bl.flatten(plain), []
    for one in (model, plain):
        problem = bl.BilevelProblem(bl.WeightedRisk(one, weight=by_index), bl.WeightedRisk(one))
        way = bl.KFAC(0.5, fisher="empirical") if solver == "KFAC" else bl.Identity(0.5)
        for _ in range(2):  # a few examples are looked at from the second call on
            h = bl.hypergradient(problem, torch.ones(N), theta, batch, batch, way)
        made.append(h)
    assert error(*made) < TOLERANCE


class OneImage(nn.Module):
    """A convolution of one learned image without a batch dimension."""

    def __init__(self):
        super().__init__()
        self.c, self.o = nn.Conv2d(1, 5, 2), nn.Linear(5, 3)
        self.z = nn.Parameter(torch.randn(1, 3, 3))

    def forward(self, x):
        return self.o(torch.tanh(x * self.c(self.z).mean((1, 2))))


@pytest.mark.parametrize(
    "make, sparse, word",
    [
        (OneImage, False, r"'c.weight' has no Kronecker block.*rest='damping'"),
        (lambda: nn.Linear(5, 3), True, "takes a sparse tensor .* put x.to_dense"),
    ],
)
def test_what_kfac_cannot_take_is_refused_in_a_sentence(make, sparse, word):
    x = torch.randn(N, 5)
    batch = x.to_sparse() if sparse else x, torch.randint(3, (N,)), torch.arange(N)
    model = make()
    problem = bl.BilevelProblem(bl.WeightedRisk(model, weight=by_index), bl.WeightedRisk(model))
    with pytest.raises(ValueError, match=word):
        bl.hypergradient(problem, torch.ones(N), bl.flatten(model), batch, batch, bl.KFAC(0.5))


@torch.library.custom_op("bilevel_lite_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("bilevel_lite_tests::cube_back", mutates_args=())
def cube_back(x: Tensor, g: Tensor) -> Tensor:
    return 3 * x**2 * g


cube.register_autograd(
    lambda ctx, g: cube_back(ctx.saved_tensors[0], g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def test_a_custom_operator_whose_backward_has_no_formula():
    at = torch.ones(1), torch.ones(2), None, torch.ones(2)
    with pytest.raises(ValueError, match=r"no autograd formula.*custom operator: a backward"):
        hvp(lambda lam, theta, batch: (lam * cube(theta)).sum(), *at)
