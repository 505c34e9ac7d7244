"""What several processes compute, and one alone: run as a script in each process.

python tests/several.py FOLDER CASE...     with RANK, WORLD_SIZE, ... as torchrun sets them
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import bilevel_lite as bl
from bilevel_lite import curvature, products
from bilevel_lite.parallel import Group, Sharded, Shards, shard, sharded
from bilevel_lite.workers import environments

LIMIT = 240  # seconds


def problem(kind, n=23, seed=0):
    """A weighted risk, where it is taken, and a batch of n examples: 23 is not shared evenly."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    mask, shape, classes = None, (5,), 3
    if kind == "mlp":
        model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))
    elif kind == "conv":
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(),
            nn.Linear(64, 3),
        )  # fmt: skip
        shape = (2, 4, 4)
    else:  # tokens, of which some are padding
        model = nn.Sequential(nn.Linear(5, 12), nn.LayerNorm(12), nn.Tanh(), Pooled(), Head())
        shape = (6, 5)
        mask = lambda batch: batch[0][..., 0] < 1.0  # noqa: E731
    model = model.double().eval()
    x, y = rand(n, *shape), torch.randint(classes, (n,), generator=g)
    index = torch.randperm(n, generator=g)
    theta = 0.3 * rand(bl.flatten(model).numel())
    inner = bl.WeightedRisk(
        model, weight=lambda lam, batch: lam[batch[2]].sigmoid(), l2=0.02, mask=mask
    )
    outer = bl.WeightedRisk(model, mask=mask)
    return bl.BilevelProblem(inner, outer), rand(n), theta, (x, y, index)


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Head(nn.Linear):
    def __init__(self):
        super().__init__(12, 3)


SOLVERS = {
    "cg": lambda: bl.CG(4, damping=1.0),
    "cg ggn": lambda: bl.CG(4, damping=0.1, curvature="ggn"),
    "cg normal": lambda: bl.CGNormal(3),
    "neumann": lambda: bl.Neumann(4, 0.2),
    "identity": lambda: bl.Identity(0.3),
    "pcg": lambda: bl.CG(3, damping=1.0, precondition=bl.KFAC(0.1)),
    "richardson": lambda: bl.KFACRichardson(2, bl.KFAC(0.3)),
    "kfac mc": lambda: bl.KFAC(0.1, seed=3),
    "kfac mc 3": lambda: bl.KFAC(0.1, samples=3, damping_rule="exact"),
    "kfac exact": lambda: bl.KFAC(0.1, "exact", bias="separate"),
    "kfac empirical": lambda: bl.KFAC(0.1, "empirical"),
    "kfac ema": lambda: bl.KFAC(0.1, ema=0.5, every=2),
    "kfac split": lambda: bl.KFAC(0.1, split_inverses=True),
    "kfac split kept": lambda: bl.KFAC(0.1, split_inverses=True, every=2),
    "ekfac": lambda: bl.EKFAC(0.1, "exact"),
    "ekfac split": lambda: bl.EKFAC(0.1, split_inverses=True, bias="separate"),
}


def hypergradients(group):
    """Every solver on every model, twice each: what is remembered counts."""
    out = {}
    for kind in ("mlp", "conv", "tokens"):
        problem_, lam, theta, batch = problem(kind)
        for name, make in SOLVERS.items():
            solver = make()
            for k, point in enumerate((theta, 0.9 * theta)):
                made = problem_ if group is None else sharded(problem_, group)
                mine = batch if group is None else shard(batch, group)
                at = made, lam, point, mine, mine
                h, info = bl.hypergradient(*at, solver=solver, return_info=True)
                out[f"{kind}, {name}, {k}"] = torch.cat([h, info.v, info.b])
                out[f"{kind}, {name}, {k}: residual"] = torch.as_tensor(info.solve.residual)
    return out


def small_batches(group):
    """Factors in their columns and as matrices: few examples, and many."""
    out = {}
    for n in (7, 60):
        problem_, lam, theta, batch = problem("mlp", n)
        loss, mine = problem_.inner_loss, batch
        if group is not None:
            loss, mine = sharded(problem_, group).inner_loss, shard(batch, group)
        draws = torch.Generator().manual_seed(1)
        factors = bl.kfac.kfac_factors(loss, lam, theta, mine, generator=draws)
        for name, made in factors.items():
            out[f"{n}, {name}, A"], out[f"{n}, {name}, B"] = made
        fisher = curvature.Fisher(loss, lam, theta, mine, generator=torch.Generator())
        out[f"{n}, Fisher"] = fisher @ theta
        out[f"{n}, H"] = products.hvp(loss, lam, theta, mine, theta)
        for mode in ("auto", "double_backward"):
            out[f"{n}, J {mode}"] = products.cross_vp(loss, lam, theta, mine, theta, mode)
        if group is None:
            solver, given = bl.KFAC(0.1), problem_
        else:  # a loss of one process, its own rows, and the group on the solver
            solver, given = bl.KFAC(0.1, group=group), problem_
        out[f"{n}, group= on the solver"] = solver.solve(given, lam, theta, mine, theta)[0]
    return out


def unrolled(group):
    """A plain loss with lam everywhere, through ten steps of descent, both modes."""
    _, lam, theta, batch = problem("mlp")

    def g(lam, theta, batch):
        w = theta[:15].view(3, 5) * (1 + lam[:5])
        return (batch[0] @ w.T - lam[5:8]).pow(4).mean() + 0.1 * (theta**2).sum()

    problem_ = bl.BilevelProblem(g, lambda lam, theta, batch: (batch[0] @ theta[:5]).cos().mean())
    if group is not None:
        problem_, batch = sharded(problem_, group), shard(batch, group)
    how = dict(inner_batch=batch, outer_batch=batch, steps=10, lr=0.05)
    return {
        mode: bl.unrolled_hypergradient(problem_, 0.1 * lam, theta, mode=mode, **how)
        for mode in ("reverse", "forward")
    }


def elsewhere(kind):
    """Lam in the inputs, in weights that read the losses; labels at positions; a squared loss."""
    g = torch.Generator().manual_seed(4)
    problem_, lam, theta, (x, y, index) = problem("mlp")
    model, hooks = problem_.inner_loss.model, {"l2": 0.02}
    if kind == "inputs":
        hooks["inputs"] = lambda lam, b: (b[0] * (1 + lam[b[2]].tanh()[:, None]), *b[1:])
    elif kind == "losses":
        hooks["weight"] = lambda lam, b, losses: (lam[0] * losses + lam[1]).sigmoid()
        hooks["weight_slope"] = True
    else:
        hooks["weight"] = lambda lam, b: lam[b[2]].sigmoid()
    if kind == "positions":  # four an example, of which some have no label
        x = torch.randn(len(x), 4, 5, generator=g)
        y = torch.randint(-1, 3, (len(x), 4), generator=g)
        y[:, 0] = 0
        hooks["ignore_index"] = -1
    if kind == "mse":
        y, hooks["loss"] = torch.randn(len(x), 3, generator=g), "mse"
    plain = {k: v for k, v in hooks.items() if k in ("loss", "ignore_index")}
    inner, outer = bl.WeightedRisk(model, **hooks), bl.WeightedRisk(model, **plain)
    return bl.BilevelProblem(inner, outer), lam, theta, (x, y, index)


def siblings(group):
    """The other places of lam and the other losses, by products and by factors."""
    out = {}
    for kind in ("inputs", "losses", "positions", "mse"):
        problem_, lam, theta, batch = elsewhere(kind)
        if group is not None:
            problem_, batch = sharded(problem_, group), shard(batch, group)
        for name in ("cg", "cg ggn", "kfac mc", "kfac empirical", "ekfac"):
            at = problem_, lam, theta, batch, batch
            out[f"{kind}, {name}"] = bl.hypergradient(*at, solver=SOLVERS[name]())
    return out


METHODS = {
    "AID": lambda *at, **b: bl.AID(*at, bl.KFAC(0.1), inner_steps=2, **b),
    "AmIGO": lambda *at, **b: bl.AmIGO(*at, inner_steps=2, linear_lr=0.1, **b),
    "SOBA": lambda *at, **b: bl.SOBA(*at, linear_lr=0.1, **b),
    "SAMA": lambda *at, **b: bl.SAMA(*at, inner_steps=2, **b),
    "F2SA": lambda *at, **b: bl.F2SA(*at, **b),
    "StocBiO": lambda *at, **b: bl.StocBiO(*at, inner_steps=2, terms=3, linear_lr=0.1, **b),
    "NBO": lambda *at, **b: bl.NBO(*at, solve="gd", steps=2, linear_lr=0.1, **b),
    "NHGD": lambda *at, **b: bl.NHGD(
        *at, inner_steps=2, kfac=bl.KFAC(0.1, "empirical", ema=0.9), **b
    ),
    "NHGD dense": lambda *at, **b: bl.NHGD(*at, inner_steps=2, initial=1.0, **b),
    "BOME": lambda *at, **b: bl.BOME(*at, copy_steps=2, copy_lr=0.1, **b),
    "BVFSM": lambda *at, **b: bl.BVFSM(*at, inner_steps=2, **b),
    "BSG1": lambda *at, **b: bl.BSG1(*at, inner_steps=2, **b),
    "ITD": lambda *at, **b: bl.ITD(*at, inner_steps=2, **b),
    "MRBO": lambda *at, **b: bl.MRBO(*at, solver=bl.KFAC(0.1), **b),
}


def methods(group):
    """All methods but SABA for six iterations on batches of one permutation."""
    out = {}
    for name, make in METHODS.items():
        problem_, lam, theta, (x, y, _) = problem("mlp")
        samplers = {
            role: bl.data.Batches(x, y, size, torch.Generator().manual_seed(size))
            for role, size in (("inner_batch", 6), ("outer_batch", 9))
        }
        if group is not None:
            problem_ = sharded(problem_, group)
            samplers = {role: Shards(one, group) for role, one in samplers.items()}
        method = make(problem_, lam, theta, inner_lr=0.1, outer_lr=0.3, **samplers)
        for _ in range(6):
            method.step()
        out[name] = torch.cat([method.lam, method.theta])
    return out


def repaired(group):
    """A factorisation that fails in process 0 alone is repaired for all, on the GPU's route."""
    from bilevel_lite import kronecker

    before, factor = kronecker.in_batches, kronecker._factor
    kronecker.in_batches = True

    def spoilt(made):
        failed = factor(made)
        if (group is None or group.rank == 0) and len(made[0].matrix) == 3:
            made[0].solve.chol, failed[0] = made[0].solve.chol * float("nan"), True
        return failed

    kronecker._factor = spoilt
    try:
        problem_, lam, theta, batch = problem("mlp")
        if group is not None:
            problem_, batch = sharded(problem_, group), shard(batch, group)
        at = problem_, lam, theta, batch, batch
        options = {"split_inverses": True, "bias": "separate", "fisher": "exact"}
        return {"h": bl.hypergradient(*at, solver=bl.KFAC(0.1, **options))}
    finally:
        kronecker.in_batches, kronecker._factor = before, factor


def refused(group):
    """What would hang, or be of one process's rows, is refused in all."""
    words = {"lam": 1.0, "model": 1.0}
    if group is None:
        return {name: torch.tensor(value) for name, value in words.items()}
    _, lam, theta, batch = problem("mlp")

    def some(lam, theta, batch):
        return (theta**2).sum() + ((lam**2).sum() if group.rank == 0 else 0.0)

    norm = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().train()
    losses = {"lam": some, "model": bl.WeightedRisk(norm)}
    for name, loss in losses.items():
        try:
            of = theta if name == "lam" else bl.flatten(norm)
            products.gradient(Sharded(loss, group), lam, of, shard(batch, group))
            words[name] = 0.0
        except ValueError as error:
            words[name] = float(f"{name}: " in str(error))
    return {name: torch.tensor(value) for name, value in words.items()}


def apart_and_said(group):
    """What is not the same everywhere is found; a whole batch can be told from a part."""
    theta = torch.arange(4.0)
    if group is None:
        return {"same": torch.tensor(1.0), "found": torch.tensor(1.0), "told": torch.arange(3.0)}
    group.require_same(theta=theta)
    theta[2] += 1e-12 * group.rank
    try:
        group.require_same(theta=theta)
        found = 0.0
    except RuntimeError as error:
        found = float(str(error).startswith("theta: is not the same in all"))
    try:
        group.first(lambda: [][1])  # in process 0 alone
        found = 0.0
    except IndexError:
        pass
    told = group.tell(torch.arange(3.0) if group.rank == 0 else None)
    return {"same": torch.tensor(1.0), "found": torch.tensor(found), "told": told}


CASES = {
    f.__name__: f
    for f in (
        hypergradients,
        small_batches,
        siblings,
        unrolled,
        methods,
        repaired,
        refused,
        apart_and_said,
    )
}


def lost(how, *words):
    """Run a command; in process 1 the sixth step never ends, or ends the process."""
    from bilevel_lite.__main__ import main as command

    step = bl.AID.step

    def until(self):
        if self.iteration == 5 and os.environ["RANK"] == "1":
            time.sleep(60) if how == "silent" else os._exit(9)
        return step(self)

    bl.AID.step = until
    code = command(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def launch(size, words, timeout=LIMIT, **more):
    """Start processes that find each other; return each one's exit code, output and errors."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank, own in enumerate(environments(size)):
            files = [open(Path(folder) / f"{rank}.{name}", "w+") for name in ("out", "err")]
            process = subprocess.Popen(words, env={**own, **more}, stdout=files[0], stderr=files[1])
            started.append((process, files))
        done = []
        for process, files in started:
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                code = "killed"
            for file in files:
                file.seek(0)
            done.append((code, *(file.read() for file in files)))
        return done


def main(folder, *names):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    group = Group()
    for name in names:
        torch.save(CASES[name](group), Path(folder) / f"{name}-{group.rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    lost(*sys.argv[2:]) if sys.argv[1] == "lost" else main(*sys.argv[1:])
