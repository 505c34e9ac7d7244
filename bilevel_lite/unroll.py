"""The hypergradient through T steps of gradient descent, for an inner problem left unsolved."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from bilevel_lite.params import dot
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.products import COST, gradient, theta_gradient, update_graph, update_operator
from bilevel_lite.refuse import (
    at_least,
    looked_at,
    recording,
    require_as_drawn,
    require_batch,
    require_finite,
    require_problem,
    require_variable,
    versions,
)
from bilevel_lite.same_function import SameDraws
from bilevel_lite.surroundings import differentiating, nodes, ordinary
from bilevel_lite.trust import doubling
from bilevel_lite.updates import SGD, Update

__all__ = ["UnrollInfo", "unrolled_hypergradient"]


@dataclass
class UnrollInfo:
    """What an unrolled hypergradient was made of.

    Attributes:
        theta: The last inner iterate theta_T, like ``theta0``.
        outer_loss: f(lam, theta_T), a scalar tensor.
        stored: Numbers kept in memory beyond one iterate: the iterates stored for the way back
            (reverse), or the sensitivity d theta / d lam (forward); graphs that are kept, and the
            evaluations they save, are not counted.
        gradients: Total cost in gradient-equivalents.
    """

    theta: Tensor
    outer_loss: Tensor
    stored: int
    gradients: float


@overload
def unrolled_hypergradient(
    problem: BilevelProblem, lam: Tensor, theta0: Tensor, steps: int,
    lr: float | None = None, mode: str = "reverse", truncate: int | None = None,
    inner_batch: Any = None, outer_batch: Any = None, update: Update | None = None,
    keep_graphs: bool = False, return_info: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def unrolled_hypergradient(
    problem: BilevelProblem, lam: Tensor, theta0: Tensor, steps: int,
    lr: float | None = None, mode: str = "reverse", truncate: int | None = None,
    inner_batch: Any = None, outer_batch: Any = None, update: Update | None = None,
    keep_graphs: bool = False, *, return_info: Literal[True],
) -> tuple[Tensor, UnrollInfo]: ...  # fmt: skip
@overload
def unrolled_hypergradient(
    problem: BilevelProblem, lam: Tensor, theta0: Tensor, steps: int,
    lr: float | None = None, mode: str = "reverse", truncate: int | None = None,
    inner_batch: Any = None, outer_batch: Any = None, update: Update | None = None,
    keep_graphs: bool = False, return_info: bool = False,
) -> Tensor | tuple[Tensor, UnrollInfo]: ...  # fmt: skip
@differentiating
def unrolled_hypergradient(
    problem: BilevelProblem,
    lam: Tensor,
    theta0: Tensor,
    steps: int,
    lr: float | None = None,
    mode: str = "reverse",
    truncate: int | None = None,
    inner_batch: Any = None,
    outer_batch: Any = None,
    update: Update | None = None,
    keep_graphs: bool = False,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, UnrollInfo]:
    r"""The derivative of f(lam, theta_T(lam)) through T steps theta <- theta - lr grad_theta g.

    Or through T steps of momentum, Adam or any other ``update``, of which plain descent is one.

        reverse:  h = grad_lam f,  w = grad_theta f, both at theta_T;  for t = T-1, ..., T-K:
                      h <- h - lr J_t w,   w <- w - lr H_t w
        forward:  D_0 = 0;  D_{t+1} = D_t - lr (H_t D_t + J_t^T);
                      h = grad_lam f + D_T^T grad_theta f

    Reverse mode stores the iterates (K of them) and recomputes everything else, so it holds one
    graph at a time; ``keep_graphs`` saves the second evaluation, for K graphs kept. Forward mode
    stores one column of D per entry of lam, whatever T is. With a state u, both take (theta, u) for
    theta, and lam may also be in the step itself, a learning rate say. A column of D that is still
    zero costs no product.

    What is differentiated is the descent that was done: each step's batch is drawn once, in order,
    and kept for the way back; and where g drew random numbers from torch's generators (dropout in
    training mode), the way back evaluates it with the same numbers. Afterwards the generators are
    where the descent and f left them.

    Weights that read the losses (`WeightedRisk`) come detached, and H is that of weights that stand
    still unless they have ``weight_slope=True``: without it, of T > 1 steps another descent is
    differentiated than was done. A buffer that is filled anew through ``.data`` is not noticed.

    Args:
        problem: The two losses.
        lam: Outer variable, any shape.
        theta0: Start of the inner descent, shape (d,); taken not to depend on lam.
        steps: T, at least 1.
        lr: Inner step size of plain descent; or else ``update``.
        mode: ``"reverse"`` or ``"forward"``.
        truncate: K: differentiate the last K steps only (reverse mode); None means all.
        inner_batch: Batch of g; or a function t -> batch, or a sampler with ``draw()``, for a
            different one at each step, called once a step.
        outer_batch: Batch of f.
        update: The step, from `bilevel_lite.updates` or of one's own, instead of ``lr``.
        keep_graphs: Reverse mode: keep the graphs of the differentiated steps from the way there.
        return_info: Also return an `UnrollInfo`.

    Returns:
        A detached tensor like ``lam``; with ``return_info=True`` a pair (tensor, info).

    Raises:
        TypeError: if ``lam`` or ``theta0`` is not a floating-point tensor, or a batch is none.
        ValueError: if ``steps`` or ``truncate`` is below 1, ``lr`` is not positive or comes with
            ``update``, neither the inner loss nor the step depends on ``lam``, ``mode`` is unknown,
            ``truncate`` or ``keep_graphs`` comes in forward mode, a batch was changed in place
            before the way back, a step writes into its arguments or is another one when it is done
            again, or the descent or its derivative grows beyond the largest number.

    Cost: reverse, T gradients and 2 per differentiated step; forward, 2 per step and entry of
    lam; 1 for f. Source: Franceschi et al. (2017), both modes; Shaban et al. (2019), truncation.

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> lam, theta0 = torch.zeros(2), torch.ones(2)
        >>> h = bl.unrolled_hypergradient(problem, lam, theta0, steps=20, lr=0.2)
        >>> h.round(decimals=3)  # theta* = lam here, and Phi = ||lam - 1||^2
        tensor([-2., -2.])
    """
    require_problem(problem)
    require_variable("lam", lam)
    require_variable("theta0", theta0)
    at_least("steps", steps, 1)
    if truncate is not None:
        at_least("truncate", truncate, 1)
    if (lr is None) == (update is None):
        raise ValueError(f"lr: got {lr!r} and update={update!r}, expected one of the two")
    if update is None:
        update = SGD(lr)
    elif not isinstance(update, Update):
        raise TypeError(
            f"update: got {type(update).__name__}, expected one of bilevel_lite.updates, such as "
            "SGD(lr=0.1, momentum=0.9), or a subclass of its Update"
        )
    if mode not in ("reverse", "forward"):
        raise ValueError(f"mode: got {mode!r}, expected 'reverse' or 'forward'")
    if mode == "forward" and truncate is not None:
        raise ValueError(f"truncate: got {truncate} with mode='forward'; only reverse truncates")
    if mode == "forward" and keep_graphs:
        raise ValueError("keep_graphs: got True with mode='forward', which holds one graph anyway")
    require_batch("outer_batch", outer_batch, problem.outer_loss)
    lam, theta0, outer_batch = map(ordinary, (lam.detach(), theta0.detach(), outer_batch))
    batch_at = _batch_at(inner_batch, problem)
    start = problem, lam, theta0, update, steps
    if mode == "reverse":
        h, info = _unroll_reverse(*start, truncate, keep_graphs, batch_at, outer_batch)
    else:
        h, info = _unroll_forward(*start, batch_at, outer_batch)
    size = f"size {lr}" if lr is not None else repr(update)
    require_finite(
        {"hypergradient": h},
        lambda: f" (after {steps} steps of {size}; is lr above 2 / curvature?)",
    )
    return (h, info) if return_info else h


def _batch_at(inner_batch: Any, problem: BilevelProblem) -> Callable[[int], Any]:
    """The function t -> batch of a batch, a sampler, or such a function."""

    def batch_at(t):
        batch = inner_batch
        if callable(getattr(inner_batch, "draw", None)):
            batch = inner_batch.draw()
        elif callable(inner_batch):
            batch = inner_batch(t)
        require_batch("inner_batch", batch, problem.inner_loss)
        return ordinary(batch)

    return batch_at


def _unroll_reverse(problem, lam, theta, update, steps, truncate, keep, batch_at, outer_batch):
    trail = deque(maxlen=steps if truncate is None else min(truncate, steps))
    state = _started(update, theta)
    for t in range(steps):
        g, batch = SameDraws(problem.inner_loss), batch_at(t)
        if keep and t >= steps - trail.maxlen:
            q, back = update_graph(g, lam, theta, batch, need_lam=False)
        else:
            (_, q), back = theta_gradient(g, lam, theta, batch, "inner_loss"), None
        drawn = versions(batch, contents=True)
        trail.append((t, g, theta, state, batch, drawn, q if keep else None, back))
        theta, state = _stepped(update, theta, state, q, lam, t)
    outer_loss, h, w = gradient(problem.outer_loss, lam, theta, outer_batch, "outer_loss")
    cost = COST["gradient"] * (steps + 1) + COST["hvp"] * len(trail)
    info = UnrollInfo(theta, outer_loss, len(trail) * _numbers(theta, state), cost)
    bars, touched = [w, *map(torch.zeros_like, state)], False
    while trail:
        t, g, theta, state, batch, as_drawn, q, back = trail.pop()
        require_as_drawn("inner_batch", batch, as_drawn)
        if back is None:
            q, back = update_graph(g, lam, theta, batch, need_lam=False)
        step = _Step(update, theta, state, q, lam, t)
        by_step, w, q_bar, *bars = step.pull_back(bars)
        jq, hq = back(q_bar)
        h, bars = h + by_step + jq, [w + hq, *bars]
        touched = touched or back.reads_lam or step.reads_lam
    _require_touched(touched)
    return h, info


def _unroll_forward(problem, lam, theta, update, steps, batch_at, outer_batch):
    n = lam.numel()
    basis = torch.eye(n, dtype=lam.dtype, device=lam.device).view(n, *lam.shape)
    state = _started(update, theta)
    columns, cost = [None for _ in basis], 0  # d (theta_t, u_t) / d lam_j; None: still zero
    touched = False
    for t in range(steps):
        q, along = update_operator(problem.inner_loss, lam, theta, batch_at(t), need_lam=False)
        _stepped(update, theta, state, q, lam, t)  # refuses what is no function of its arguments
        step, spent = _Step(update, theta, state, q, lam, t), cost
        for j, (e, column) in enumerate(zip(basis, columns, strict=True)):
            z, *zu = column or [None] * (1 + len(state))
            q_dot = None
            if z is not None or along.reads_lam:
                q_dot, cost = along(e, z), cost + COST["hvp"]
            columns[j] = _nothing_yet(column, step.push_forward([e, z, q_dot, *zu]))
        touched = touched or along.reads_lam or step.reads_lam
        cost += COST["gradient"] if cost == spent else 0
        theta, state = step.out
    _require_touched(touched)
    outer_loss, direct, b = gradient(problem.outer_loss, lam, theta, outer_batch, "outer_loss")
    by_theta = [b.new_zeros(()) if c is None else dot(c[0], b) for c in columns]
    h = direct + torch.stack(by_theta).view_as(lam).to(lam) if n else direct
    stored = n * _numbers(theta, state)
    return h, UnrollInfo(theta, outer_loss, stored, cost + COST["gradient"])


def _nothing_yet(before: Any, column: list[Tensor]) -> list[Tensor] | None:
    return None if before is None and not any(bool(c.any()) for c in column) else column


def _require_touched(touched: bool) -> None:
    if not touched:
        raise ValueError("inner_loss: does not depend on lam, and the step does not, either")


def _numbers(theta: Tensor, state: tuple[Tensor, ...]) -> int:
    return theta.numel() + sum(u.numel() for u in state)


def _started(update: Update, theta: Tensor) -> tuple[Tensor, ...]:
    state = update.start(theta)
    if not isinstance(state, tuple) or not all(
        isinstance(u, Tensor) and u.is_floating_point() for u in state
    ):
        raise TypeError(
            f"update: start returned {type(state).__name__}, expected a tuple of tensors of "
            "floating-point numbers"
        )
    return tuple(map(ordinary, state))


def _stepped(update, theta, state, q, lam, t):
    """One step, checked, without a graph; done twice, as the way back will do it again."""
    before = versions((theta, *state, q, lam))
    with torch.no_grad():
        out, again = (update.step(theta, state, q, lam, t) for _ in range(2))
    if versions((theta, *state, q, lam)) != before:
        raise ValueError("update: step writes into its arguments; return new tensors")
    shapes = [tuple(u.shape) for u in (theta, *state)]
    try:
        new, news = out
        came = [tuple(u.shape) for u in (new, *news)]
    except (TypeError, ValueError, AttributeError):
        raise TypeError(
            f"update: step returned {type(out).__name__}, expected (theta, tuple of the state)"
        ) from None
    if came != shapes:
        raise ValueError(f"update: step returned shapes {came}, expected {shapes}")
    if new.dtype != theta.dtype:
        raise ValueError(
            f"update: step returned a theta in {new.dtype}, expected {theta.dtype} as theta0 is; "
            "bring rates that are tensors to it, rate.to(theta.dtype)"
        )
    pairs = zip((new, *news), (again[0], *again[1]), strict=True)
    if looked_at(new) and not all(bool(torch.equal(a, b) or a.isnan().any()) for a, b in pairs):
        raise ValueError(
            "update: step is another one when it is done again (does it draw random numbers, or "
            "count its calls?); make it a function of its arguments"
        )
    return new, tuple(news)


def _require_graph(step, at, ends, t):
    """Refuse a step that autograd cannot follow: that derivative would be zero, without a word.

    An argument that the graph does not lead back to is moved a little: nothing may come of it. On a
    GPU, where a comparison waits for the device, at steps 0, 1, 2, 4, 8 ... alone.
    """
    reached = {id(end) for end in ends} | {id(getattr(n, "variable", None)) for n in nodes(*ends)}
    if recording() or not (looked_at(ends[0]) or doubling(t)):
        return
    for k, name in enumerate(("lam", "theta", "q", *["the state"] * len(at[3:]))):
        if id(at[k]) in reached:
            continue
        moved = [x.detach() for x in at]
        moved[k] = torch.where(moved[k] == 0, 1e-6, moved[k] * (1 - 1e-3))
        with torch.no_grad():
            new, news = step(moved[1], tuple(moved[3:]), moved[2], moved[0], t)
        for one, other in zip(ends, (new, *news), strict=True):
            if not bool((one == other).logical_or(one.isnan()).all()):
                raise ValueError(
                    f"update: what step returns changes with {name}, but no graph leads back to it "
                    "(torch.no_grad, .data, .detach() or NumPy?), so its derivative would be taken "
                    "for zero; use torch's operations on the arguments as they are"
                )


class _Step:
    """One step theta', u' = step(theta, u, q; lam, t) with its derivative, by autograd."""

    def __init__(self, update, theta, state, q, lam, t):
        at = [x.detach().requires_grad_() for x in (lam, theta, q, *state)]
        with torch.enable_grad():
            new, news = update.step(at[1], tuple(at[3:]), at[2], at[0], t)
        self.at, self.ends = at, [new, *news]
        _require_graph(update.step, at, self.ends, t)
        self.out = new.detach(), tuple(u.detach() for u in news)
        self.linear, self.reads_lam = None, False

    def _grad(self, outs, inputs, bars, **kwargs):
        pairs = [
            (o, b) for o, b in zip(outs, bars, strict=True)
            if o is not None and b is not None and o.requires_grad
        ]  # fmt: skip
        if not pairs:
            return [None] * len(inputs)
        outs, bars = zip(*pairs, strict=True)
        return torch.autograd.grad(outs, inputs, bars, allow_unused=True, **kwargs)

    def pull_back(self, bars: list[Tensor]) -> list[Tensor]:
        """From weights on theta' and u' to those on lam, theta, q and u."""
        pulled = self._grad(self.ends, self.at, bars)
        self.reads_lam = pulled[0] is not None
        return [
            torch.zeros_like(x) if p is None else p for p, x in zip(pulled, self.at, strict=True)
        ]

    def push_forward(self, along: list[Tensor | None]) -> list[Tensor]:
        """From directions of lam, theta, q and u (None: zero) to those of theta' and u'.

        The way back is linear in its weights; its derivative in them is the way forward.
        """
        if self.linear is None:
            bars = [torch.zeros_like(o).requires_grad_() for o in self.ends]
            with torch.enable_grad():
                self.linear = self._grad(self.ends, self.at, bars, create_graph=True), bars
        pulled, bars = self.linear
        self.reads_lam = pulled[0] is not None
        pushed = self._grad(pulled, bars, along, retain_graph=True)
        return [torch.zeros_like(b) if p is None else p for p, b in zip(pushed, bars, strict=True)]
