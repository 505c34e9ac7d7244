"""What a hypergradient costs, in multiples of one gradient: ``python -m bilevel_lite bench``.

One process; all methods interleaved, round after round; medians. On a CPU one thread and process
time (other programs then matter little), on CUDA wall time between synchronisations.

Next to each measured ratio stands the ratio of counted floating-point operations (matrix products,
convolutions, factorisations): what the arithmetic alone would cost. The reference does the same
work by plain composition of curvlinops operators and autograd: outer gradient, operator, inverse
product, cross product by double backward. Weights are all one (so that curvlinops' losses can
express the problem) and BatchNorm is frozen (it has no Kronecker block there): both sides then
give the same hypergradient, and their relative difference is stored beside the times.
"""

import gc
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bilevel_lite import kronecker, models
from bilevel_lite.algorithms.aid import AID
from bilevel_lite.curvature import ggn_vp
from bilevel_lite.data import Batches
from bilevel_lite.ekfac import EKFAC
from bilevel_lite.experiment.folder import Clock, RunError, RunFolder, provenance
from bilevel_lite.hypergrad import implicit
from bilevel_lite.kfac import KFAC
from bilevel_lite.linsolve import cg
from bilevel_lite.params import flatten
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import cross_vp, hvp
from bilevel_lite.recorded import Recordings
from bilevel_lite.risk import WeightedRisk
from bilevel_lite.session import no_tf32
from bilevel_lite.solvers import CG, CGNormal, Identity, Neumann

__all__ = ["CASES", "MODELS", "draw_bench", "run"]

DAMPING = 1e-3
CG_DAMPING = 10.0  # no negative curvature at random parameters, so no early stop
# model -> (its shape of input, batch, options); ResNet-18 has the stem that the paper's code builds
CASES = {
    "linear": ("linear", (784,), 1000, {}),
    "mlp": ("mlp", (784,), 128, {}),
    "lenet": ("lenet", (3, 32, 32), 128, {}),
    "resnet18": ("resnet18", (3, 32, 32), 128, {"stem": "imagenet"}),
    "resnet18-cifar": ("resnet18", (3, 32, 32), 128, {"stem": "cifar"}),
}
MODELS = ("linear", "mlp", "lenet", "resnet18")  # measured by default
FISHERS = {"mc": "mc", "empirical": "empirical", "exact": "type-2"}  # our name -> curvlinops'
MEMORY = ("hvp", "cross", "cross double backward", "kfac-mc", "ekfac-mc", "curvlinops kfac-mc")


class Case:
    """One model with random data: the problem, a point, batches, and all that is measured on it.

    Args:
        name: A key of `CASES`.
        device: Where to compute.
        seed: Of data and initial parameters.
    """

    def __init__(self, name: str, device: torch.device, seed: int = 0):
        architecture, shape, n, options = CASES[name]
        g = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = models.build(architecture, shape, 10, **options)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.model, self.device, self.n = model.to(device).eval(), device, n
        self.x = torch.randn(4 * n, *shape, generator=g).to(device)
        self.y = torch.randint(10, (4 * n,), generator=g).to(device)
        self.index = torch.arange(4 * n, device=device)
        self.lam = torch.ones(4 * n, device=device)
        self.theta = flatten(model)
        risk = WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]])
        clean = WeightedRisk(model)
        self.problem = BilevelProblem(risk, clean)
        self.inner = tuple(t[:n].contiguous() for t in (self.x, self.y, self.index))
        self.outer = tuple(t[n : 2 * n].contiguous() for t in (self.x, self.y, self.index))
        self.v = torch.randn(self.theta.shape, generator=g).to(device)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.recorded = Recordings()

    # -- ours

    def rows(self) -> dict[str, Callable[[], Any]]:
        """Name -> what is measured under it; the first is the unit."""
        loss, at = self.problem.inner_loss, (self.lam, self.theta, self.inner)
        # these outlive the calls and keep the first layer's A
        kept, kept_e = KFAC(DAMPING, fixed_batch=True), EKFAC(DAMPING, fixed_batch=True)
        step = 0.1
        out = {
            "gradient": self.plain_gradient,
            "gradient in theta": lambda: self.recorded.theta_gradient(loss, *at, "inner_loss"),
            "hvp": lambda: hvp(loss, *at, self.v),
            "ggn": lambda: ggn_vp(loss, *at, self.v),
            "cross": lambda: cross_vp(loss, *at, self.v),
            "cross double backward": lambda: cross_vp(loss, *at, self.v, "double_backward"),
            "identity": lambda: self.hypergradient(Identity(step)),
            "cg-3": lambda: self.hypergradient(CG(3, 0.0, CG_DAMPING)),
            "cg-10": lambda: self.hypergradient(CG(10, 0.0, CG_DAMPING)),
            "cg-3-ggn": lambda: self.hypergradient(CG(3, 0.0, CG_DAMPING, curvature="ggn")),
            "cg-normal-3": lambda: self.hypergradient(CGNormal(3, damping=CG_DAMPING)),
            "neumann-10": lambda: self.hypergradient(Neumann(10, step)),
            "kfac-mc": lambda: self.hypergradient(KFAC(DAMPING)),
            "kfac-mc, first factor kept": lambda: self.hypergradient(kept),
            "kfac-empirical": lambda: self.hypergradient(KFAC(DAMPING, "empirical")),
            "kfac-exact": lambda: self.hypergradient(KFAC(DAMPING, "exact")),
            "ekfac-mc": lambda: self.hypergradient(EKFAC(DAMPING)),
            "ekfac-mc, first factor kept": lambda: self.hypergradient(kept_e),
            "curvlinops hvp": lambda: self.curvlinops("Hessian") @ self.v,
            "curvlinops ggn": lambda: self.curvlinops("GGN") @ self.v,
            "curvlinops cg-3": lambda: self.composed(self.composed_cg),
        }
        for fisher in FISHERS:
            out[f"curvlinops kfac-{fisher}"] = lambda f=fisher: self.composed(
                lambda b: self.composed_kfac(b, f)
            )
        out["curvlinops ekfac-mc"] = lambda: self.composed(
            lambda b: self.composed_kfac(b, "mc", "EKFAC")
        )
        aid = {"cg-3": CG(3, 0.0, CG_DAMPING), "kfac-mc": KFAC(DAMPING)}
        for name, solver in aid.items():
            out[f"aid step, {name}"] = self.aid(solver).step
        out["aid step, curvlinops kfac-mc"] = self.composed_step
        return out

    def hypergradient(self, solver) -> Tensor:
        """The package's hypergradient, by as many steps as the solver was asked for."""
        at = self.problem, self.lam, self.theta, self.inner, self.outer, solver
        h, info = implicit(*at, recorded=self.recorded)  # as a method does it
        if info.solve.iterations != getattr(solver, "iters", info.solve.iterations):
            raise RuntimeError(f"bench: {solver} stopped after {info.solve.iterations} steps")
        return h

    def aid(self, solver) -> AID:
        """Ten inner steps with momentum, then a hypergradient; a fresh batch for each."""
        sampler = Batches(self.x, self.y, self.n, torch.Generator().manual_seed(0))
        return AID(
            self.problem, self.lam, self.theta, solver, inner_steps=10,
            inner_optimizer=lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
            outer_lr=1.0, inner_batch=sampler, outer_batch=self.outer,
        )  # fmt: skip

    # -- the reference: curvlinops and autograd, put together plainly

    def plain_gradient(self) -> tuple[Tensor, ...]:
        """Gradient of the weighted loss in the module's own parameters."""
        return torch.autograd.grad(self.inner_loss(self.lam, self.inner), self.params)

    def inner_loss(self, lam: Tensor, batch: Any) -> Tensor:
        """The inner loss on the module's own parameters."""
        x, y, index = batch
        losses = nn.functional.cross_entropy(self.model(x), y, reduction="none")
        return (lam[index] * losses).mean()

    def curvlinops(self, kind: str, batch: Any = None, **options) -> Any:
        """A curvlinops operator on the batch."""
        import curvlinops

        cls = getattr(curvlinops, f"{kind}LinearOperator")
        data = [(batch or self.inner)[:2]]
        return cls(
            self.model, nn.CrossEntropyLoss(), self.params, data,
            check_deterministic=False, **options,
        )  # fmt: skip

    def composed_cg(self, b: Tensor) -> Tensor:
        """Three CG steps on the curvlinops Hessian."""
        hessian = self.curvlinops("Hessian")
        return cg(lambda v: hessian @ v, b, 3, 0.0, CG_DAMPING).solution

    def composed_kfac(
        self, b: Tensor, fisher: str, kind: str = "KFAC", batch: Any = None
    ) -> Tensor:
        """The damped inverse product of curvlinops; its default damping for each kind."""
        import curvlinops

        operator = self.curvlinops(
            kind, batch, fisher_type=FISHERS[fisher], separate_weight_and_bias=False, seed=0
        )
        damping = {"use_heuristic_damping": True}
        if kind == "EKFAC":
            damping = {"use_exact_damping": True}
        return curvlinops.KFACInverseLinearOperator(operator, damping=DAMPING, **damping) @ b

    def composed(self, solve: Callable[[Tensor], Tensor], batch: Any = None) -> Tensor:
        """Outer gradient, solve, cross product by double backward."""
        x, y, _ = self.outer
        f = nn.functional.cross_entropy(self.model(x), y)
        b = torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, self.params)])
        v = solve(b).detach()
        lam = self.lam.clone().requires_grad_()
        g = self.inner_loss(lam, batch or self.inner)
        grads = torch.autograd.grad(g, self.params, create_graph=True)
        along = torch.cat([g.reshape(-1) for g in grads]) @ v
        return -torch.autograd.grad(along, lam)[0]

    def composed_step(self) -> None:
        """One outer iteration: ten SGD-momentum steps, a composed KFAC hypergradient, a step."""
        if not hasattr(self, "optimizer"):
            self.start = [p.detach().clone() for p in self.params]
            self.optimizer = torch.optim.SGD(self.params, lr=1e-3, momentum=0.9)
            self.outer_lam = self.lam.clone()
            self.draws = torch.Generator().manual_seed(0)
        with torch.no_grad():  # the other rows stay at the first point
            for p, value in zip(self.params, self.start, strict=True):
                p.copy_(value)
        for _ in range(10):
            self.optimizer.zero_grad()
            self.inner_loss(self.outer_lam, self.draw()).backward()
            self.optimizer.step()
        batch = self.draw()
        h = self.composed(lambda b: self.composed_kfac(b, "mc", batch=batch), batch)
        self.outer_lam -= h
        with torch.no_grad():
            for p, value in zip(self.params, self.start, strict=True):
                p.copy_(value)

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """A fresh minibatch by index."""
        i = torch.randperm(len(self.x), generator=self.draws)[: self.n].to(self.device)
        return self.x[i], self.y[i], i

    # -- do both sides compute the same?

    def agreement(self) -> dict[str, float]:
        """Relative difference between ours and the composition, for all that draws nothing."""
        rows = self.rows()
        pairs = {name: rows[name]() for name in ("hvp", "ggn", "cg-3", "kfac-empirical")}
        out = {}
        for name, ours in pairs.items():
            theirs = rows[f"curvlinops {name}"]()
            out[name] = float((ours - theirs).norm() / theirs.norm())
        return out


# ------------------------------------------------------------------ measuring


class _FlopCounter(TorchDispatchMode):
    """Add up the operations of all that is called; torch's formulas, and those of LAPACK."""

    def __init__(self):
        super().__init__()
        self.total = 0
        aten = torch.ops.aten
        self.formulas = {
            **flop_registry,
            aten.linalg_cholesky_ex: lambda a, *_, **__: a.shape[-1] ** 3 // 3,
            aten.cholesky_solve: lambda b, c, *_, **__: 2 * b.shape[-1] * c.shape[-1] ** 2,
            aten.cholesky_inverse: lambda c, *_, **__: 2 * c.shape[-1] ** 3 // 3,
            aten._linalg_eigh: lambda a, *_, **__: 9 * a.shape[-1] ** 3,
            aten.linalg_qr: lambda a, *_, **__: 4 * a.shape[-2] * a.shape[-1] ** 2,
        }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of a call: matrix products, convolutions, factorisations.

    Products and convolutions by torch's formulas; n^3/3 for a Cholesky factorisation, 2 n^2 k for
    a solve with k right-hand sides, 2 n^3/3 for an inverse from it, 9 n^3 for a symmetric
    eigendecomposition, 4 d r^2 for a QR decomposition with its basis (Golub and Van Loan).
    """
    kronecker.in_numpy = False
    try:
        with _FlopCounter() as counter:
            call()
    finally:
        kronecker.in_numpy = True
    return counter.total


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds: of this process on a CPU, on the wall, after synchronising, on a GPU."""
    if device.type == "cpu":
        return time.process_time

    def now():
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


@dataclass
class Budget:
    """How long a row may be measured.

    Attributes:
        rounds: Rounds in which every row runs once.
        seconds: A row that has used as much is measured no more (it has run once at least).
    """

    rounds: int
    seconds: float


def measure(
    rows: dict[str, Callable[[], Any]], device: torch.device, budget: Budget
) -> dict[str, list[float]]:
    """Run every row in every round, after one round that is not counted; seconds of each run.

    A row of the reference in which a factorisation fails has no times.
    """
    now, times = clock(device), {name: [] for name in rows}
    spent = dict.fromkeys(rows, 0.0)
    for number in range(budget.rounds + 1):
        for name, call in rows.items():
            if spent[name] > budget.seconds:
                continue
            start = now()
            try:
                call()
            except torch.linalg.LinAlgError:
                if not name.startswith("curvlinops"):
                    raise
                spent[name] = float("inf")
                continue
            seconds = now() - start
            spent[name] += seconds
            if number > 0 or seconds > budget.seconds:  # too slow for a second run
                times[name].append(seconds)
    return times


def peak_memory(name: str, row: str, device: torch.device) -> int:
    """Bytes that one call needs at its peak, beyond model, data and v; in this process.

    On a CPU from the high-water mark of this process (Linux), so ask in a fresh one.
    """
    case = Case(name, device)
    call = case.rows()[row]
    small = Case("linear", device)  # load what is loaded at the first call of anything
    small.rows()[row]()
    if device.type == "cuda":
        return _peak_on_gpu(call, device)
    before = _resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:  # start the high-water mark anew
        file.write("5")
    call()
    return _resident("VmHWM") - before


def _peak_on_gpu(call: Callable[[], Any], device: torch.device) -> int:
    """The same where torch's allocator counts: any process will do, once the row has been called.

    What is held before, by other rows too, is subtracted.
    """
    gc.collect()  # or a later collection would lower the peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _resident(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key + ":"))


def _peak_in_fresh_process(name: str, row: str, device: torch.device) -> int | None:
    if device.type == "cpu" and not sys.platform.startswith("linux"):
        return None
    code = (
        "import sys, torch; from bilevel_lite import kronecker; "
        "from bilevel_lite.experiment import bench; kronecker.set_threads(1); "
        "print(bench.peak_memory(sys.argv[1], sys.argv[2], torch.device(sys.argv[3])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, name, row, str(device)],
        capture_output=True, text=True, env={**os.environ, "MALLOC_TRIM_THRESHOLD_": "0"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"bench: the memory of {row!r} on {name!r}: {done.stderr[-500:]}")
    return int(done.stdout.split()[-1])


def measure_case(
    name: str, device: torch.device, budget: Budget, memory: tuple[str, ...] = MEMORY
) -> dict:
    """Everything about one model: times, counted operations, memory, agreement.

    Args:
        name: A key of `CASES`.
        device: Where to compute.
        budget: Rounds and seconds.
        memory: The rows whose peak memory is measured.

    Returns:
        ``{"model", "parameters", "examples", "gradient_ms", "rows": {name: {"ratio", "lowest",
        "rounds", "ms", "flops", "bytes"}}, "agreement": {name: relative difference}}``; ratios and
        flops in multiples of one gradient's. A row of the reference that failed says so instead.
    """
    case = Case(name, device)
    rows = case.rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of curvlinops, about its own arguments
        times = measure(rows, device, budget)
        rows = {row: call for row, call in rows.items() if times[row]}
        counted = {row: flops(call) for row, call in rows.items()}
        agreement = case.agreement()
    unit = statistics.median(times["gradient"])
    out = {}
    for row, seconds in times.items():
        if not seconds:
            out[row] = {"failed": "a factorisation did not converge"}
            continue
        out[row] = {
            "ratio": statistics.median(seconds) / unit,
            "lowest": min(seconds) / min(times["gradient"]),
            "rounds": len(seconds),
            "ms": 1e3 * statistics.median(seconds),
            "flops": counted[row] / counted["gradient"],
        }
        if row in memory:
            out[row]["bytes"] = (
                _peak_on_gpu(rows[row], device)
                if device.type == "cuda"  # a fresh process takes seconds to start there
                else _peak_in_fresh_process(name, row, device)
            )
    return {
        "model": name,
        "parameters": case.theta.numel(),
        "examples": case.n,
        "gradient_ms": 1e3 * unit,
        "gradient_gflop": counted["gradient"] / 1e9,
        "rows": out,
        "agreement": agreement,
    }


def table(result: dict) -> str:
    """Format one model's numbers as text."""
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters, {result['examples']} examples, "
        f"one gradient {result['gradient_ms']:.3g} ms",
        f"{'x one gradient':32}{'time':>8}{'lowest':>8}{'flops':>8}{'rounds':>8}{'MiB':>8}",
    ]
    for name, row in result["rows"].items():
        if "failed" in row:
            lines.append(f"{name:32}{row['failed']}")
            continue
        memory = f"{row['bytes'] / 2**20:8.0f}" if row.get("bytes") is not None else ""
        lines.append(
            f"{name:32}{row['ratio']:8.2f}{row['lowest']:8.2f}{row['flops']:8.2f}"
            f"{row['rounds']:8d}{memory}"
        )
    same = ", ".join(f"{name} {value:.0e}" for name, value in result["agreement"].items())
    return "\n".join([*lines, f"relative difference to curvlinops: {same}", ""])


# row of the benchmark -> (its name in the figure, the curvlinops row that does the same work)
BENCH_ROWS = {
    "hvp": ("Hessian product", "curvlinops hvp"),
    "ggn": ("GGN product", "curvlinops ggn"),
    "identity": ("identity", None),
    "cg-3": ("CG, 3 steps", "curvlinops cg-3"),
    "cg-10": ("CG, 10 steps", None),
    "neumann-10": ("Neumann, 10 terms", None),
    "kfac-mc": ("KFAC", "curvlinops kfac-mc"),
    "kfac-mc, first factor kept": ("KFAC, first A kept", None),
    "ekfac-mc": ("EKFAC", "curvlinops ekfac-mc"),
    "ekfac-mc, first factor kept": ("EKFAC, first A kept", None),
    "aid step, kfac-mc": ("outer iteration, KFAC", "aid step, curvlinops kfac-mc"),
}


def draw_bench(result: dict):
    """Draw the benchmark: cost of each row in gradients, beside curvlinops and the operation count.

    Args:
        result: ``{"runs": [one run of ``python -m bilevel_lite bench``]}``.

    Returns:
        The figure, an axis per model.
    """
    # here, so that the processes whose memory is measured load no matplotlib
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    from bilevel_lite.plotting import PALETTE, STYLE

    (run,) = result["runs"]
    with mpl.rc_context(STYLE):
        fig, axes = plt.subplots(
            1, len(run["cases"]), figsize=(9.0, 3.3), sharey=True, squeeze=False
        )
        heights = range(len(BENCH_ROWS))
        for ax, case in zip(axes[0], run["cases"], strict=True):
            for y, (row, (_, other)) in zip(heights, BENCH_ROWS.items(), strict=True):
                ours = case["rows"][row]
                theirs = case["rows"].get(other, {}).get("ratio")
                if theirs is not None:
                    ax.plot([ours["ratio"], theirs], [y, y], color="0.8", zorder=1)
                    ax.plot(theirs, y, "o", color=PALETTE[1], mfc="white", label="curvlinops")
                ax.plot(ours["flops"], y, "|", color="0.3", ms=9, label="operations counted")
                ax.plot(ours["ratio"], y, "o", color=PALETTE[2], label="bilevel_lite")
            ax.set(xscale="log", xlabel="gradients")
            ax.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
            ax.xaxis.set_minor_locator(mpl.ticker.NullLocator())
            size = f"N = {case['examples']}, gradient {case['gradient_ms']:.3g} ms"
            ax.set_title(f"{case['model']}\n{size}", fontsize=8)
        axes[0, 0].set_yticks(heights, [name for name, _ in BENCH_ROWS.values()])
        axes[0, 0].invert_yaxis()
        handles, labels = axes[0, 0].get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        fig.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)
    return fig


def run(
    names: list[str],
    device: torch.device,
    rounds: int,
    seconds: float,
    out: str,
    threads: int = 1,
    memory: bool = True,
) -> dict:
    """Measure the models one after the other; stopped, it goes on with the next one.

    Args:
        names: Keys of `CASES`.
        device: Where to compute.
        rounds: Rounds in which every row runs once.
        seconds: A row that has used as much is measured no more.
        out: Output folder, see `bilevel_lite.experiment.RunFolder`.
        threads: Threads on a CPU.
        memory: Measure peak memory too; on a CPU this starts a process for each row of `MEMORY`.

    Returns:
        The result, also written to ``result.json`` in the folder.

    Raises:
        ValueError: for an unknown model or a number out of range.
        RunError: if the folder cannot be used, or curvlinops is not installed.
    """
    unknown = sorted(set(names) - set(CASES))
    if unknown or not names:
        raise ValueError(f"models: got {unknown or names}, expected some of {sorted(CASES)}")
    for name, value in (("rounds", rounds), ("seconds", seconds), ("threads", threads)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a positive number")
    try:
        import curvlinops  # noqa: F401
    except ImportError:
        raise RunError(
            "bench compares with curvlinops: pip install curvlinops-for-pytorch"
        ) from None
    kronecker.set_threads(threads)
    no_tf32()
    config = {"kind": "bench", "models": names, "rounds": rounds, "seconds": seconds}
    config |= {"device": device.type, "threads": threads}
    if not memory:
        config["memory"] = False
    timer = Clock()
    with RunFolder(out, config) as folder:
        if folder.state:
            timer.seconds = folder.state["seconds"]
        for name in names[len(folder.rows()) if folder.state else 0 :]:
            with timer:
                budget, rows = Budget(rounds, seconds), {} if memory else {"memory": ()}
                case = measure_case(name, device, budget, **rows)
            print(table(case), flush=True)
            folder.log(case)
            folder.checkpoint({"seconds": timer.seconds})
        result = {
            "kind": "bench",
            "settings": config,
            "cases": folder.rows(),
            "provenance": provenance(device, 0, timer.seconds),
        }
        folder.finish(result)
    return result
