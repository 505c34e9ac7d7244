r"""Steps of fixed shape as one launch: recorded as a CUDA graph at first use, replayed afterwards.

On a GPU the models of this book are bound by the launches of kernels, not by arithmetic: a gradient
of ResNet-18 is some thousand operations of a few microseconds each. A recording holds them all,
with the memory that they work in, and starts them at once. It also freezes whatever Python decided
on the way; so only code that we know is recorded, and what the user wrote stays outside:

    g(lam, theta; batch) = G(sigma, theta; x, y),         sigma = sigma(lam; batch)
    grad_lam g = (d sigma / d lam)^T grad_sigma G,        J v = (d sigma / d lam)^T J_sigma v

G, a `bilevel_lite.WeightedRisk` over a model of known layers, is recorded with sigma as its outer
variable; the weights are evaluated, and the chain rule applied, at each call.

Trust. A recording is compared with the plain computation at its 1st, 2nd, 4th, 8th ... use, and
dropped where they differ by more than rounding; as it is where the model draws random numbers or
keeps statistics, where the library cannot record, and where memory is short. Then the plain path
runs, and one line says why (`Recordings.lines`, and the log of ``bilevel_lite``). Another shape,
mode or option is another recording. ``BILEVEL_LITE_GRAPHS=0`` turns all of it off.
"""

import logging
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_lite import products
from bilevel_lite.curvature import Drawn
from bilevel_lite.kfac import KFAC
from bilevel_lite.linsolve import SolveInfo
from bilevel_lite.problem import BilevelProblem, Loss
from bilevel_lite.refuse import every_look_on, while_recording
from bilevel_lite.risk import WeightedRisk, only_reads
from bilevel_lite.same_function import equal_states, random_state, restore_random_state
from bilevel_lite.solvers import Prepared, Solver
from bilevel_lite.surroundings import differentiating, second_order
from bilevel_lite.trust import doubling, low_precision, still

__all__ = ["CudaGraphs", "Recordings"]

SETTINGS = {bool, int, float, str, tuple}  # of a layer: its stride, its mode, a slope
MOST = 4  # recordings of one computation: a shape each, with memory of its own
log = logging.getLogger("bilevel_lite")


# ------------------------------------------------------------------ recording and replaying


class CudaGraphs:
    """Records on one CUDA device; all recordings share memory, since they never run at once."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def capture(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Run a function without arguments; return its result and what runs it again, in place."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                function()  # libraries set themselves up, which cannot be recorded
            torch.cuda.current_stream().wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                result = function()
        return result, graph.replay


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CudaGraphs}


class Recording:
    """A function of tensors of fixed shapes, recorded."""

    def __init__(self, recorder: Any, function: Callable[..., tuple], inputs: tuple[Tensor, ...]):
        self.inputs = tuple(value.detach().clone() for value in inputs)
        with while_recording():
            self.outputs, self.replay = recorder.capture(partial(function, *self.inputs))

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Evaluate at other numbers; what comes back is the caller's own."""
        for place, value in zip(self.inputs, inputs, strict=True):
            place.copy_(value.detach())
        self.replay()
        return tuple(output.detach().clone() for output in self.outputs)


class _Dropped(Exception):
    """Why something is not recorded, in words."""


@dataclass
class _Kept:
    recording: Any
    uses: int = 0

    def due(self) -> bool:
        """True at the 1st, 2nd, 4th, 8th ... use."""
        self.uses += 1
        return doubling(self.uses)


# ------------------------------------------------------------------ what is recorded


def _sigma(sigma: Tensor, batch: Any) -> Tensor:
    return sigma


@dataclass
class Point:
    """A weighted risk at one point, with its weights as the outer variable.

    Attributes:
        risk: G(sigma, theta; x, y).
        inputs: sigma (empty without weights), theta, x, y; no graph.
        chain: (grad in sigma) -> (grad in lam).
        key: What a recording of it is frozen to.
    """

    risk: WeightedRisk
    inputs: tuple[Tensor, ...]
    chain: Callable[[Tensor], Tensor]
    key: Hashable


@differentiating
def point(loss: Loss, lam: Tensor, theta: Tensor, batch: Any) -> Point:
    """Take the user's part out of a loss.

    Raises:
        _Dropped: if there is code in it that we do not know.
    """
    if not isinstance(loss, WeightedRisk):
        raise _Dropped(f"{type(loss).__name__} is not a WeightedRisk, and what it reads is unknown")
    if not only_reads(loss):
        raise _Dropped(f"{type(loss.model).__name__} has layers whose code is not known")
    if loss.reads_losses or loss.mask is not None or loss.inputs is not None:
        raise _Dropped("weights that read the losses, a mask or inputs(lam, batch) stand in it")
    x, y = batch[:2]
    on = theta.device
    if not all(isinstance(part, Tensor) and part.device == on for part in (x, y)):
        raise _Dropped(f"the batch is not on {on}")
    if x.requires_grad or torch.is_autocast_enabled(on.type):
        raise _Dropped("inputs need a gradient, or autocast is on")
    lam = lam.detach().requires_grad_()
    sigma = loss.weights(lam, batch)

    def chain(slope: Tensor) -> Tensor:
        if sigma is None or not sigma.requires_grad:
            return torch.zeros_like(lam)
        return torch.autograd.grad(sigma, lam, slope.to(sigma), retain_graph=True)[0]

    weight = None if sigma is None else _sigma
    risk = WeightedRisk(loss.model, loss.loss, weight, loss.l2, ignore_index=loss.ignore_index)
    given = theta.new_empty(0) if sigma is None else sigma.detach()
    inputs = (given, theta.detach(), x, y)
    key = (
        loss.loss, loss.l2, loss.ignore_index, sigma is None, low_precision(theta),
        tuple((t.shape, t.stride(), t.dtype) for t in inputs), _frozen(loss.model),
    )  # fmt: skip
    return Point(risk, inputs, chain, key)


def _frozen(model: nn.Module) -> Hashable:
    """What a recording holds of a model: its modules with their settings, where its numbers lie."""
    modules, fixed = [], []
    for m in model.modules():
        modules.append((type(m), id(m), *(v for v in vars(m).values() if type(v) in SETTINGS)))
        tensors = [p for p in m._parameters.values() if p is not None and not p.requires_grad]
        tensors += [b for b in m._buffers.values() if b is not None]
        fixed += [t.data_ptr() for t in tensors]
    return tuple(modules), tuple(fixed)


class SecondRecorded:
    """`bilevel_lite.products.SecondDerivatives`, recorded in three parts that share one graph.

    The pass that builds the graph of grad_theta G; v -> H v; v -> J v.
    """

    def __init__(self, recorder: Any, at: Point):
        self.risk, self.place = at.risk, None
        self.build = Recording(recorder, self._build, at.inputs)
        v = at.inputs[1]
        self.h = Recording(recorder, partial(self._product, "theta"), (v,))
        self.j = Recording(recorder, partial(self._product, "sigma"), (v,))

    def _build(self, sigma, theta, x, y):
        self.sigma, self.theta = (t.detach().requires_grad_() for t in (sigma, theta))
        with torch.enable_grad(), second_order():
            value = self.risk(self.sigma, self.theta, (x, y))
            (self.grad,) = torch.autograd.grad(value, self.theta, create_graph=True)
        return (value,)

    def _product(self, of, v):
        variable = getattr(self, of)
        (out,) = torch.autograd.grad(self.grad, variable, v, retain_graph=True, allow_unused=True)
        return (torch.zeros_like(variable) if out is None else out,)

    def go_to(self, at: Point) -> "_SecondAt":
        """Build the graph at a point; the products there."""
        self.build(*at.inputs)
        self.place = _SecondAt(self, at)
        return self.place


class _SecondAt:
    """H v and J v at one point; it builds the graph again if another point was visited since."""

    recorded = True

    def __init__(self, both: SecondRecorded, at: Point):
        self.both, self.at = both, at

    def _product(self, recording, v):
        if self.both.place is not self:
            self.both.build(*self.at.inputs)
            self.both.place = self
        return recording(v)[0]

    def __call__(self, v: Tensor) -> Tensor:
        """Return H v."""
        return self._product(self.both.h, v)

    def cross(self, v: Tensor) -> Tensor:
        """Return J v, like lam."""
        return self.at.chain(self._product(self.both.j, v))


class KFACPass:
    """A fresh KFAC from the pass to J v, recorded: factors, factorisations, solves, slopes.

    Args:
        recorder: Where to record.
        solver: Gives the options.
        at: Where.
        b: Right-hand side, shape (d,).
        info: The diagnosis of a plain solve of this shape.
    """

    def __init__(self, recorder: Any, solver: KFAC, at: Point, b: Tensor, info: SolveInfo):
        self.risk, self.info = at.risk, info
        names = (f.name for f in fields(solver) if f.init and f.name != "generator")
        self.twin = type(solver)(**{name: getattr(solver, name) for name in names})
        self.twin._generator = self.drawn = Drawn(torch.Generator())
        with while_recording():
            self._pass(*at.inputs, b)  # makes the places of what is drawn
        self.recording = Recording(recorder, self._pass, (*at.inputs, b))

    def _pass(self, sigma, theta, x, y, b):
        self.drawn.next = 0
        problem = BilevelProblem(self.risk, self.risk)
        at = self.twin.prepare(problem, sigma, theta, (x, y), cross=True, once=True)
        at.looks = False
        at.solve(b, False, want_v=False)
        return at.cross(None)[0], at.failed

    def __call__(self, draws: torch.Generator, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """J_sigma v, and whether a factorisation failed; the labels are drawn from ``draws``."""
        self.drawn.generator = draws
        self.drawn.again()
        return self.recording(*inputs)


class _KFACRecorded:
    """`kfac_solve.PreparedKFAC` for one solve of which J v is asked, recorded or plain."""

    def __init__(self, recordings, solver, problem, lam, theta, batch):
        self.recordings, self.at = recordings, (solver, problem, lam, theta, batch)
        self.plain = self.jv = None

    def solve(self, b: Tensor, diagnose: bool, want_v: bool) -> tuple[Tensor | None, SolveInfo]:
        found = None if diagnose or want_v else self.recordings.kfac(*self.at, b)
        if found is not None:
            self.jv, info = found
            return None, info
        solver, *at = self.at
        self.plain = solver.prepare(*at, cross=True, once=True)
        return self.plain.solve(b, diagnose, want_v)

    def cross(self, v: Tensor | None) -> tuple[Tensor, str]:
        if self.plain is None:
            return self.jv, f"{type(self.at[0]).__name__}'s own pass, recorded"
        return self.plain.cross(v)


def _fresh(solver: Solver, loss: Loss) -> bool:
    """True for a KFAC that builds all anew at each solve and looks at nothing on the way."""
    return (
        type(solver) is KFAC
        and isinstance(loss, WeightedRisk)
        and loss.weight is not None
        and solver.every == 1
        and not (solver.ema or solver.fixed_batch)
        and solver.damping_rule != "exact"
        and solver.damping + 2 * loss.l2 > 0
    )


# ------------------------------------------------------------------ what a method keeps


class Recordings:
    """What one method has recorded, and a line for each computation that it has not.

    Where nothing can be recorded (on a CPU, say), its gradients are the plain ones, and `second`
    and `kfac` return None.
    """

    def __init__(self, on: bool = True):
        self.on = on
        self.kept: dict[Hashable, _Kept | None] = {}
        self.lines: list[str] = []
        self._recorders: dict[torch.device, Any] = {}

    def __reduce__(self):
        return Recordings, (self.on,)  # a copy records for itself

    def gradient(self, *at: Any) -> tuple:
        """`bilevel_lite.products.gradient`, from a recording where there is one.

        Args:
            *at: Loss, lam, theta, batch, and what error messages call the loss.
        """
        return self._evaluated(products.gradient, *at)

    def theta_gradient(self, *at: Any) -> tuple:
        """`bilevel_lite.products.theta_gradient`, likewise."""
        return self._evaluated(products.theta_gradient, *at)

    def _evaluated(self, function, loss, lam, theta, batch, name):
        """A function of a loss at a point, finished by the chain rule; else the plain one's."""
        plain = partial(function, loss, lam, theta, batch, name)

        def record(at):
            def alone(sigma, theta, x, y):
                return function(at.risk, sigma, theta, (x, y), name)

            return Recording(self._recorder(theta.device), alone, at.inputs)

        what = f"{function.__name__} of {name}"
        found = self._find(what, record, plain, loss, lam, theta, batch)
        if found is None:
            return plain()
        kept, at = found
        out = kept.recording(*at.inputs)
        if function is products.gradient:  # the recorded slope is in the weights
            out = out[0], at.chain(out[1]), out[2]
        if kept.due() and not self._agree(what, at.key, out, plain()):
            return plain()
        return out

    def prepare(self, solver: Solver, problem: BilevelProblem, *at: Any, cross: bool) -> Any:
        """`bilevel_lite.solvers.Solver.prepare` for one solve, with recorded products or passes."""
        if self.on and cross and _fresh(solver, problem.inner_loss):
            return _KFACRecorded(self, solver, problem, *at)
        prepared = solver.prepare(problem, *at, cross=cross, once=True)
        if type(prepared) is Prepared and solver.curvature == "hessian":
            prepared.matvec.operator = self.second(problem.inner_loss, *at)
        return prepared

    def second(self, loss: Loss, lam: Tensor, theta: Tensor, batch: Any) -> _SecondAt | None:
        """v -> H v at a point, and its `cross`, v -> J v; None where they are not recorded."""
        ones = torch.ones_like(theta)

        def plain():
            both = products.SecondDerivatives(loss, lam, theta, batch)
            return both(ones), both.cross(ones)

        def record(at):  # what the pass keeps must not be written over by another recording
            return SecondRecorded(RECORDERS[theta.device.type](theta.device), at)

        what = "H v and J v"
        found = self._find(what, record, plain, loss, lam, theta, batch)
        if found is None:
            return None
        kept, at = found
        both = kept.recording.go_to(at)
        if kept.due() and not self._agree(what, at.key, (both(ones), both.cross(ones)), plain()):
            return None
        return both

    def kfac(
        self, solver: KFAC, problem: BilevelProblem, lam: Tensor, theta: Tensor, batch: Any,
        b: Tensor,
    ) -> tuple[Tensor, SolveInfo] | None:  # fmt: skip
        """J G^-1 b, like lam, of a fresh KFAC, and its diagnosis; None where it is not recorded."""
        what, draws = type(solver).__name__, solver._generator
        state = draws.get_state()

        def plain():
            draws.set_state(state)
            prepared = solver.prepare(problem, lam, theta, batch, cross=True, once=True)
            _, plain.info = prepared.solve(b, False, want_v=False)
            return (prepared.cross(None)[0],)

        def record(at):
            return KFACPass(self._recorder(theta.device), solver, at, b, plain.info)

        found = self._find(what, record, plain, problem.inner_loss, lam, theta, batch, repr(solver))
        draws.set_state(state)
        if found is None:
            return None
        kept, at = found
        jv, failed = kept.recording(draws, *at.inputs, b)
        out = (at.chain(jv),)
        if bool(failed) or kept.due() and not self._agree(what, at.key, out, plain()):
            draws.set_state(state)
            return None
        return out[0], replace(kept.recording.info)

    # -- finding, trusting, dropping

    def _recorder(self, device: torch.device) -> Any:
        if device not in self._recorders:
            self._recorders[device] = RECORDERS[device.type](device)
        return self._recorders[device]

    def _find(
        self, what, record, plain, loss, lam, theta, batch, *frozen: Hashable
    ) -> tuple[_Kept, Point] | None:
        """The recording for these shapes, made if there is none yet; None for the plain path."""
        if not (self.on and _wanted(theta)):
            return None
        try:
            at = point(loss, lam, theta, batch)
            at.key = (*at.key, *frozen)
        except _Dropped as why:
            return self._drop((what, str(why)), what, str(why))
        key = what, at.key
        if key not in self.kept:
            if sum(1 for other in self.kept if other[0] == what) >= MOST:
                return self._drop(
                    (what, MOST), what, f"{MOST} shapes or modes are recorded already"
                )
            try:
                self.kept[key] = _Kept(self._made(record, plain, at))
            except _Dropped as why:
                return self._drop(key, what, str(why))
        kept = self.kept[key]
        return None if kept is None else (kept, at)

    def _made(self, record, plain, at: Point) -> Any:
        """Record, after a plain run that shows whether there is something to freeze."""
        model, theta = at.risk.model, at.inputs[1]
        draws = random_state(theta, known=True)
        with still(model):  # the trial itself is to leave no trace
            before = [b._version for b in model.buffers()]
            plain()
            moved = before != [b._version for b in model.buffers()]
        if not equal_states(draws, random_state(theta, known=True)):
            restore_random_state(draws, theta)
            raise _Dropped("the model draws random numbers")
        if moved:
            raise _Dropped("the model keeps statistics")
        try:
            return record(at)
        except torch.cuda.OutOfMemoryError:
            raise _Dropped("memory is short") from None
        except (RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise _Dropped(f"it cannot be recorded ({said})") from error

    def _agree(self, what, key, got: tuple, truth: tuple) -> bool:
        """Hold a recording's numbers against the plain ones; drop it where they differ."""
        apart = max(map(_apart, got, truth))
        if apart <= _rounding(truth[0]):  # false for nan
            return True
        if all(bool(torch.isfinite(part).all()) for part in truth):
            self._drop((what, key), what, f"its numbers are {apart:.1e} off the plain ones")
        return False

    def _drop(self, key, what: str, why: str) -> None:
        if key not in self.kept or self.kept[key] is not None:
            self.kept[key] = None
            self.lines.append(f"{what} is not recorded: {why}")
            log.info(self.lines[-1])


def _wanted(theta: Tensor) -> bool:
    on = os.environ.get("BILEVEL_LITE_GRAPHS") != "0" and not every_look_on()
    return on and theta.device.type in RECORDERS


def _apart(one: Tensor, other: Tensor) -> float:
    size = float(other.norm())
    return float((one - other).norm()) / (size or 1.0)


def _rounding(like: Tensor) -> float:
    """How far two computations of one number, by the same kernels, may be apart."""
    return 3e-2 if low_precision(like) else 1e3 * torch.finfo(like.dtype).eps
