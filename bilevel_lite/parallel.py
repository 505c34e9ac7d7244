r"""Several processes, one problem: each holds lam and theta whole, and its own rows of every batch.

    g(lam, theta) = sum over r of (n_r / n) g_r(lam, theta)

Two operators carry a loss, and all its derivatives, from one process to several. Copy takes what
is the same everywhere to where each process goes on with it alone; Sum adds what each has made.
They are transposes of each other, which is all that reverse mode needs to know, twice as once:

    g = S( (n_r / n) g_r(C lam, C theta) ),      C^T = S,      S^T = C
    grad g = S( (n_r / n) grad g_r ),            H v = S( (n_r / n) H_r v )

What is linear in the loss (H v, J v, A, B, E) may also be made by each process alone, and summed.
"""

import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bilevel_lite.problem import BilevelProblem, Loss, NotFinite, Portion, tensors
from bilevel_lite.surroundings import nodes
from bilevel_lite.trust import doubling, mixes_examples

__all__ = [
    "Group", "Part", "ProcessLost", "Sharded", "Shards", "Traffic", "apart", "dealt", "part_of",
    "require_shared", "shard", "sharded",
]  # fmt: skip


# what gloo and NCCL say where another process is gone or silent
LOST = ("onnect", "imed out", "imeout", "losed", "peer", "NCCL", "aborted")


class ProcessLost(ConnectionError):
    """Another process is gone, or did not answer in time: nothing more can be summed."""


@dataclass
class Traffic:
    """What was sent for one purpose.

    Attributes:
        calls: How often every process waited for all others.
        bytes: Size of what one process gave or was given, before any algorithm of the network.
        seconds: Spent in these calls, on a CPU; they hold the waiting for whoever is slower.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Group:
    """The processes that share a problem, and a count of what they tell each other.

    Args:
        processes: A ``torch.distributed`` process group; by default all processes.

    Attributes:
        rank: Which of them this is, from 0.
        size: How many there are.
        traffic: Purpose -> `Traffic`: ``"value"``, ``"theta"``, ``"lam"``, ``"factors"``, ...

    Raises:
        RuntimeError: if there is no process group yet.
        ProcessLost: in every method, if a process is gone or silent for too long.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()  # here one process; torchrun makes several
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> group = bl.parallel.Group()
        >>> group.sum(torch.ones(3), "theta"), group.traffic["theta"].calls
        (tensor([1., 1., 1.]), 1)
        >>> dist.destroy_process_group()
    """

    def __init__(self, processes: Any = None):
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "group: there is no process group; start with torchrun, or call "
                "torch.distributed.init_process_group first"
            )
        self.processes = processes
        self.rank, self.size = dist.get_rank(processes), dist.get_world_size(processes)
        self.traffic: dict[str, Traffic] = {}

    def sum(self, x: Tensor, what: str) -> Tensor:
        """Return the sum of everybody's x, the same to the last bit for all."""
        out = x.detach().clone(memory_format=torch.contiguous_format)
        with self._counted(what, out):
            dist.all_reduce(out, group=self.processes)
        return out

    def gather(self, x: Tensor, what: str, rows: list[int] | None = None) -> Tensor:
        """Return everybody's rows, one below the other in the order of the processes.

        Args:
            x: This process's, shape (its rows, ...).
            what: The purpose.
            rows: How many each has; by default as many as here.
        """
        rows = [len(x)] * self.size if rows is None else rows
        most = max(rows)  # gloo gathers equal shapes only
        own = x.new_zeros(most, *x.shape[1:])
        own[: len(x)] = x.detach()
        parts = [torch.empty_like(own) for _ in rows]
        with self._counted(what, own, self.size):
            dist.all_gather(parts, own, group=self.processes)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])

    def broadcast(self, x: Tensor, source: int, what: str) -> Tensor:
        """Return what process ``source`` gives; all must give a tensor of that shape."""
        out = x.detach().clone(memory_format=torch.contiguous_format)
        with self._counted(what, out):
            dist.broadcast(out, self._global(source), group=self.processes)
        return out

    def sent(self, iterations: int) -> dict[str, dict[str, float]]:
        """By purpose, the calls and bytes of one iteration on average."""
        each = max(1, iterations)
        return {
            what: {"calls": one.calls / each, "bytes": one.bytes / each}
            for what, one in self.traffic.items()
        }

    def tell(self, value: Any = None) -> Any:
        """Return what process 0 says: anything that can be pickled. Not counted."""
        box = [value]
        with self._lost():
            dist.broadcast_object_list(box, self._global(0), group=self.processes)
        return box[0]

    def first(self, function: Callable[[], Any]) -> Any:
        """Call a function in process 0 and tell all what it returned; or what it raised.

        Raises:
            Exception: as the function, in every process.
        """
        said = None
        if self.rank == 0:
            try:
                said = function(), None
            except Exception as error:
                said = None, error
        value, error = self.tell(said)
        if error is not None:
            raise error
        return value

    def _global(self, rank: int) -> int:
        return rank if self.processes is None else dist.get_global_rank(self.processes, rank)

    def require_same(self, **tensors: Tensor) -> None:
        """Refuse to go on where the processes no longer hold the same numbers.

        Raises:
            NotFinite: (a ValueError) for one that is not finite.
            RuntimeError: naming the tensor that is not the same everywhere.
        """
        for name, x in tensors.items():
            flat = x.detach().reshape(-1).double()
            if not bool(torch.isfinite(flat.sum())):
                raise NotFinite(f"{name}: has entries that are NaN or infinite")
            along = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
            marks = self.gather(torch.stack([flat.sum(), flat @ along])[None], "check")
            if not torch.equal(marks, marks[:1].expand_as(marks)):
                raise RuntimeError(
                    f"{name}: is not the same in all {self.size} processes; they must start from "
                    "the same seed, and draw nothing that is not drawn for the whole batch"
                )

    @contextmanager
    def _counted(self, what: str, x: Tensor, times: int = 1) -> Iterator[None]:
        before = time.perf_counter()
        with self._lost():
            yield
        one = self.traffic.setdefault(what, Traffic())
        one.calls += 1
        one.bytes += times * x.numel() * x.element_size()
        one.seconds += time.perf_counter() - before

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            said = str(error).splitlines()[0]
            if not any(word in said for word in LOST):
                raise
            raise ProcessLost(
                f"process {self.rank} of {self.size}: another one is gone, or did not answer in "
                f"time; what it said itself says why ({said[:120]})"
            ) from error


# ------------------------------------------------------------------ the loss


class _Copy(torch.autograd.Function):
    """C: what all hold, to where each goes on alone."""

    @staticmethod
    def forward(ctx, x, group, what):
        ctx.group, ctx.what = group, what
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return _Sum.apply(slope, ctx.group, ctx.what), None, None


class _Sum(torch.autograd.Function):
    """S: the sum of what each has made, which all then hold."""

    @staticmethod
    def forward(ctx, x, group, what):
        ctx.group, ctx.what = group, what
        return group.sum(x, what)

    @staticmethod
    def backward(ctx, slope):
        return _Copy.apply(slope, ctx.group, ctx.what), None, None


class Sharded:
    r"""A loss of which each process has a part of the batch: called in all of them, like any loss.

        g(lam, theta) = sum over r of (n_r / n) loss(lam, theta, batch_r)

    Value, gradient and every product are those of the whole batch, the same in all processes, so
    all solvers, methods and checks take it as they take the loss itself.

    Args:
        loss: A mean over the examples of its batch, plus what does not depend on the batch. n_r is
            the number of rows of the batch's first tensor; a batch without rows counts as one.
        group: The processes.

    Raises:
        TypeError: if the loss cannot be called, is sharded already, or has several batches.
        ValueError: where it is called, if a BatchNorm of the model takes its statistics from the
            batch, which would be those of this process's rows; or if a variable stands in the loss
            of some processes only (looked at in its 1st, 2nd, 4th, 8th ... call), since the others
            would wait.

    What else reads other examples (weights normalised over a batch) is not seen: it is no mean over
    examples, and is another loss for each number of processes. So is what draws in each process for
    its own rows (dropout in training mode).

    Cost: that of the loss on this process's rows; two numbers are sent for a value, theta's for a
    gradient in theta or a product H v, lam's for one in lam or J v.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()  # here one process; torchrun makes several
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> mine = torch.tensor([[1.0], [3.0]])  # this process's rows
        >>> loss = bl.parallel.Sharded(
        ...     lambda lam, theta, x: ((x - theta) ** 2).mean(), bl.parallel.Group()
        ... )
        >>> loss(None, torch.zeros(1), mine)
        tensor(5.)
        >>> dist.destroy_process_group()
    """

    def __init__(self, loss: Loss, group: Group):
        if not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected (lam, theta, batch) -> ()")
        if isinstance(loss, Sharded):
            raise TypeError("loss: is sharded already")
        if hasattr(loss, "risks"):
            raise TypeError(
                "loss: a sum of risks has a batch for each of them, and cannot be shared among "
                "processes; run it in one"
            )
        if not isinstance(group, Group):
            raise TypeError(f"group: got {group!r}, expected a bilevel_lite.parallel.Group")
        self.loss, self.group, self.uses = loss, group, 0

    def __call__(self, lam: Tensor, theta: Tensor, batch: Any) -> Tensor:
        """Evaluate it; every process must."""
        _require_own_rows(getattr(self.loss, "model", None))
        lam, theta = self._copy(lam, "lam"), self._copy(theta, "theta")
        value, n = self.loss(lam, theta, batch), _rows(batch)
        if not isinstance(value, Tensor) or value.dim():
            return value  # refused by whoever asked, in words of its own
        told, self.uses = [n * value, value.new_tensor(n)], self.uses + 1
        if looks := torch.is_grad_enabled() and doubling(self.uses):
            told += [value.new_tensor(float(_reaches(value, x))) for x in (lam, theta)]
        total = _Sum.apply(torch.stack(told), self.group, "value")
        if looks:
            self._require_alike(total[2:].tolist())
        return total[0] / total[1].detach()  # n has no slope, and none of its own is asked for

    def _require_alike(self, counts: list[float]) -> None:
        """Refuse a variable that some processes would sum a slope of, and others not."""
        for name, count in zip(("lam", "theta"), counts, strict=True):
            if 0 < count < self.group.size:
                raise ValueError(
                    f"{name}: stands in the loss of {count:g} of {self.group.size} processes, and "
                    f"in that of the others' rows not; add 0 * {name}.sum() to the loss"
                )

    def _copy(self, x: Any, what: str) -> Any:
        return _Copy.apply(x, self.group, what) if isinstance(x, Tensor) else x

    def total(self, x: Tensor, batch: Any, what: str) -> Tensor:
        """sum over r of (n_r / n) x_r, for what is linear in the loss."""
        n = _rows(batch)
        total = self.group.sum(torch.cat([n * x.reshape(-1), x.new_tensor([n])]), what)
        return (total[:-1] / total[-1]).view_as(x)


def require_shared(solver: Any, loss: Any) -> None:
    """Refuse a solver whose factors are of all processes' rows beside a loss of this one's alone.

    Raises:
        ValueError: saying what to give instead.
    """
    if getattr(solver, "group", None) is not None and not isinstance(loss, Sharded):
        raise ValueError(
            "solver: its factors are of all processes' rows, and the losses of this one's alone; "
            "give bilevel_lite.parallel.sharded(problem, group), and leave the solver's group out"
        )


def _require_own_rows(model: Any) -> None:
    if isinstance(model, nn.Module) and mixes_examples(model):
        raise ValueError(
            "model: BatchNorm takes the statistics of this process's rows alone; call model.eval() "
            "(and give the layer track_running_stats=True)"
        )


def _reaches(value: Tensor, x: Any) -> bool:
    """Whether the graph of value leads to x, an output of `_Copy`."""
    wanted = x.grad_fn if isinstance(x, Tensor) else None
    return wanted is not None and any(node is wanted for node in nodes(value))


def sharded(problem: BilevelProblem, group: Group) -> BilevelProblem:
    """Both losses of a problem, `Sharded`: what methods and hypergradients are given then.

    Args:
        problem: Of losses that a process evaluates alone.
        group: The processes.

    Raises:
        TypeError: as `Sharded`.

    Example:
        >>> import torch.distributed as dist
        >>> store = dist.HashStore()  # here one process; torchrun makes several
        >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        >>> risk = bl.WeightedRisk(torch.nn.Linear(2, 2), weight=lambda lam, batch: lam[batch[2]])
        >>> problem = bl.BilevelProblem(risk, bl.WeightedRisk(risk.model))
        >>> mine = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)  # this process's rows
        >>> shared = bl.parallel.sharded(problem, bl.parallel.Group())
        >>> at = shared, torch.ones(2), torch.zeros(6), mine, mine
        >>> bl.hypergradient(*at, solver=bl.Identity(1.0))
        tensor([-0.1250, -0.1250])
        >>> dist.destroy_process_group()
    """
    losses = problem.inner_loss, problem.outer_loss
    return BilevelProblem(*(Sharded(loss, group) for loss in losses))


def apart(loss: Any) -> tuple[Any, Group | None]:
    """The loss that a process evaluates alone, and the processes that share it, if any."""
    return (loss.loss, loss.group) if isinstance(loss, Sharded) else (loss, None)


@dataclass
class Part:
    """Which rows of a batch are here, where several processes share one.

    Attributes:
        group: The processes.
        rows: The examples of each process.
        columns: Whatever else was counted, by name: for each process.
    """

    group: Group
    rows: list[int]
    columns: dict[Hashable, list[int]]

    @property
    def n(self) -> int:
        """Examples in all."""
        return sum(self.rows)

    @property
    def before(self) -> int:
        """Examples in the processes before this one."""
        return sum(self.rows[: self.group.rank])

    @property
    def share(self) -> float:
        """n_r / n."""
        return self.rows[self.group.rank] / self.n

    def total(self, x: Tensor, what: str = "factors") -> Tensor:
        """sum over r of (n_r / n) x_r."""
        return self.group.sum(self.share * x, what)


def part_of(group: Group, n: int, columns: dict[Hashable, int], like: Tensor) -> Part:
    """Tell each other how many examples, and columns of whatever is named, there are."""
    counts = torch.zeros(group.size, 1 + len(columns), dtype=torch.int64, device=like.device)
    counts[group.rank] = torch.tensor([n, *columns.values()])
    rows, *rest = group.sum(counts, "counts").T.tolist()
    return Part(group, rows, dict(zip(columns, rest, strict=True)))


def dealt(costs: list[float], size: int) -> list[int]:
    """Who does which of some jobs: the dearest first, each to whoever has the least so far."""
    load, owners = [0.0] * size, {}
    for k, cost in sorted(enumerate(costs), key=lambda job: -job[1]):
        owners[k] = min(range(size), key=load.__getitem__)
        load[owners[k]] += cost
    return [owners[k] for k in range(len(costs))]


# ------------------------------------------------------------------ the batch


def _rows(batch: Any) -> int:
    first = next(tensors(batch), None)
    return len(first) if first is not None and first.dim() else 1


def shard(batch: Any, group: Group) -> Any:
    """This process's rows of a batch that all have: n r // R to n (r + 1) // R of every tensor.

    Args:
        batch: A tensor, or tuples, lists and dicts of tensors, with the same number of rows. What
            is no tensor stays.
        group: The R processes.

    Raises:
        TypeError: if a tensor stands in an object of another kind.
        ValueError: if there are fewer rows than processes, or not the same number everywhere.

    Example:
        >>> from types import SimpleNamespace
        >>> second = SimpleNamespace(rank=1, size=2)  # as a Group would say it
        >>> bl.parallel.shard((torch.arange(5), torch.arange(5)), second)
        (tensor([2, 3, 4]), tensor([2, 3, 4]))
    """
    n, r, size = _rows(batch), group.rank, group.size
    lengths = {len(x) if x.dim() else 0 for x in tensors(batch)}
    if lengths - {n}:
        raise ValueError(
            f"batch: its tensors have {sorted(lengths)} rows; expected the same number in each"
        )
    if lengths and n < size:
        raise ValueError(f"batch: has {n} rows, fewer than the {size} processes that share it")
    mine = slice(n * r // size, n * (r + 1) // size)

    def own(part):
        if isinstance(part, Tensor):
            return part[mine]
        if isinstance(part, Mapping):
            return {key: own(value) for key, value in part.items()}
        if hasattr(part, "_fields"):  # a namedtuple
            return type(part)(*map(own, part))
        if isinstance(part, tuple | list):
            return type(part)(map(own, part))
        if any(True for _ in tensors(part)):
            kind = type(part).__name__
            raise TypeError(f"batch: holds tensors in a {kind}; expected tuples, lists and dicts")
        return part

    part = own(batch)
    if type(part) is tuple:
        part = Portion(part)
        part.whole = n
    return part


@dataclass
class Shards:
    """A sampler of which each process takes its rows: all draw the same batch of one permutation.

    Every process must hold a sampler with the same generator. Each draws the whole batch, augments
    it where that is asked for, and keeps its part: so the batches are those of one process.

    Args:
        sampler: Anything with a ``draw()`` method and a state, such as `bilevel_lite.data.Batches`.
        group: The processes.

    Raises:
        TypeError: for a sampler without one of the two.

    Example:
        >>> from types import SimpleNamespace
        >>> first = SimpleNamespace(rank=0, size=2)  # as a Group would say it
        >>> x, y = torch.arange(6.0), torch.zeros(6)
        >>> batches = bl.data.Batches(x, y, 6, torch.Generator().manual_seed(0))
        >>> bl.parallel.Shards(batches, first).draw()[0]
        tensor([0., 1., 2.])
    """

    sampler: Any
    group: Group

    def __post_init__(self):
        if not (hasattr(self.sampler, "draw") and hasattr(self.sampler, "state_dict")):
            got = type(self.sampler).__name__
            raise TypeError(f"sampler: got {got}, expected one with draw() and state_dict()")

    def draw(self) -> Any:
        """This process's rows of the next batch."""
        return shard(self.sampler.draw(), self.group)

    def state_dict(self) -> dict:
        """Return the sampler's state, the same in all processes."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.sampler.load_state_dict(state)
