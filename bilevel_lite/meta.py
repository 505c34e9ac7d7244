"""Meta-learning: one lam for many small inner problems, all of them solved at once by ``vmap``.

    Phi(lam) = mean_i f_i(theta_i(lam))

Task i has a support set, on which theta_i is found, and a query set, on which it is judged: f_i is
``loss`` on the query set. lam is where the descent starts (`maml`), or the anchor that
theta_i may not leave for free (`imaml`). A batch of tasks is a pair (x, y) of tensors with one
leading entry for each task; ``loss(theta, batch) -> scalar`` knows one task only, and is
differentiated in reverse mode alone, twice.

At the 1st, 2nd, 4th, 8th ... use of a loss its first task is also computed by itself, at lam, under
the guards of `hypergradient`, and held against what ``vmap`` makes of it.

Example:
    >>> from bilevel_lite import meta
    >>> def loss(theta, batch):
    ...     return (theta * batch[0] - batch[1]).square().mean() / 2
    >>> support = query = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
    >>> phi, h = meta.maml(loss, torch.zeros(1), support, query, steps=1, lr=0.5)
    >>> h  # mean of (1 - lr)^2 (0 - y)
    tensor([-0.5000])
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vjp, vmap
from torch.utils._pytree import tree_map

from bilevel_lite import products
from bilevel_lite.exact import exactly
from bilevel_lite.linsolve import NegativeCurvatureWarning
from bilevel_lite.refuse import (
    at_least,
    require_finite,
    require_function,
    require_generator,
    require_number,
    require_variable,
)
from bilevel_lite.same_function import due, random_state, restore_random_state, was_the_same
from bilevel_lite.surroundings import differentiating, ordinary, second_order, transforming, way_out
from bilevel_lite.trust import tolerance, wave

__all__ = ["ImplicitInfo", "adapt", "few_shot", "imaml", "maml", "sinusoids"]

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]


def adapt(
    loss: Loss,
    lam: Tensor,
    support: Batch,
    steps: int,
    lr: float,
    tau: float = 0.0,
    theta: Tensor | None = None,
) -> Tensor:
    r"""Gradient descent on every task at once, from lam.

        theta_i <- theta_i - lr (grad l_i(theta_i) + tau (theta_i - lam))

    Differentiable in ``lam``, through all steps.

    Args:
        loss: l_i, a function (theta, batch) -> scalar of one task.
        lam: Start and anchor, shape (d,).
        support: One batch (x, y) for each task, along the first dimension.
        steps: T.
        lr: Step size.
        tau: Strength of the anchor, tau/2 ||theta - lam||^2.
        theta: Other starts, shape (tasks, d).

    Returns:
        theta_T of each task, shape (tasks, d).

    Raises:
        TypeError: if ``lam`` is not a floating-point tensor, ``support`` no pair of tensors with a
            first dimension, or ``loss`` no function.
        ValueError: if ``lam`` is not flat, ``steps`` below 1, ``lr`` not positive, ``tau``
            negative, ``theta`` of another shape, or x and y not of equally many tasks; if the loss
            cannot be mapped over tasks, is another function when it is, or is refused as by
            `hypergradient`.

    Cost: T gradients.

    Example:
        >>> from bilevel_lite import meta
        >>> support = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])
        >>> def loss(theta, batch):
        ...     return (theta - batch[1]).square().sum() / 2
        >>> meta.adapt(loss, torch.zeros(1), support, steps=50, lr=0.5, tau=1.0)  # half-way
        tensor([[0.5000],
                [1.5000]])
    """
    tasks = _require(loss, lam, support)
    at_least("steps", steps, 1)
    require_number("lr", lr, positive=True)
    require_number("tau", tau)
    if theta is not None:
        _require_theta(theta, tasks, lam)
    slope = vmap(grad(partial(exactly, loss)))
    theta = lam.expand(tasks, -1) if theta is None else theta
    with _mapped(loss, lam, support, twice=lam.requires_grad and torch.is_grad_enabled()):
        for _ in range(steps):
            theta = theta - lr * (slope(theta, support) + tau * (theta - lam))
    return theta


def maml(
    loss: Loss,
    lam: Tensor,
    support: Batch,
    query: Batch,
    steps: int,
    lr: float,
    first_order: bool = False,
    tau: float = 0.0,
) -> tuple[Tensor, Tensor]:
    r"""Phi_T and its derivative, through T steps of descent that starts at lam.

        h = mean_i (I - lr H_i(theta_0)) ... (I - lr H_i(theta_{T-1})) b_i,   b_i at theta_T

    With ``first_order`` the product is left out, h = mean_i b_i (FOMAML), which is no derivative
    of anything in general. With ``tau`` the steps feel the anchor as well, as in `adapt`:
    then h = mean_i D_T^T b_i with D_0 = I and D_{t+1} = (I - lr (H_i + tau I)) D_t + lr tau I.

    Args:
        loss: A function (theta, batch) -> scalar of one task.
        lam: Start of all tasks, shape (d,).
        support: Batches (x, y) for the descent, the first dimension being the task.
        query: Batches of the same tasks, on which theta_T is judged.
        steps: T, at least 1.
        lr: Inner step size.
        first_order: Leave out the product.
        tau: Strength of the anchor.

    Returns:
        Phi_T(lam), a scalar, and h, shape (d,); both detached.

    Raises:
        TypeError: as `adapt`.
        ValueError: as `adapt`; or if support and query are not of equally many tasks.
        NotFinite: if Phi or h is NaN or infinite.

    Cost, a task: T + 1 gradients, and 2 T more for the way back; the graph of T steps is
    kept. First-order: T + 1. Source: Finn, Abbeel and Levine (2017), equation 1.

    Example:
        >>> from bilevel_lite import meta
        >>> support = query = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])
        >>> def loss(theta, batch):
        ...     return (theta - batch[1]).square().sum() / 2
        >>> meta.maml(loss, torch.zeros(1), support, query, steps=2, lr=0.5)[1]  # -2 / 2^4
        tensor([-0.1250])
    """
    _require(loss, lam, support, query)

    def phi(lam):
        theta = adapt(loss, lam, support, steps, lr, tau)
        if first_order:  # the value of theta_T, and the slope of lam
            theta = theta.detach() + (lam - lam.detach())
        return vmap(partial(exactly, loss))(theta, query).mean()

    with _mapped(loss, lam, support, twice=not first_order):
        h, value = grad_and_value(phi)(lam.detach())
    require_finite({"Phi": value, "h": h}, lambda: f"; lower lr ({lr}) or steps ({steps})")
    return value.detach(), h.detach()


@dataclass
class ImplicitInfo:
    """What the systems of `imaml` met.

    Attributes:
        residual: ||b_i - (H_i + tau I) v_i|| / ||b_i|| of each task, as CG's own recurrence has it.
        curvature: The smallest p^T (H_i + tau I) p / p^T p along CG's directions, for each task;
            infinite where b_i = 0. Below zero only its sign means something.
    """

    residual: Tensor
    curvature: Tensor


def imaml(
    loss: Loss,
    lam: Tensor,
    theta: Tensor,
    support: Batch,
    query: Batch,
    tau: float,
    iters: int,
) -> tuple[Tensor, Tensor, ImplicitInfo]:
    r"""The implicit hypergradient, where each theta_i minimises l_i + tau/2 ||theta - lam||^2.

        h = mean_i tau v_i,   (H_i + tau I) v_i = b_i,   b_i = grad f_i,   H_i = hess l_i

    CG takes the same number of iterations on every task: under ``vmap`` none ends the loop for the
    others. A task that is solved, or that meets a direction without curvature, stays as it is.

    Args:
        loss: A function (theta, batch) -> scalar of one task.
        lam: The anchor of all tasks, shape (d,).
        theta: The tasks' solutions, shape (tasks, d), for example from `adapt`.
        support: Batches (x, y) of l_i, the first dimension being the task.
        query: Batches of f_i.
        tau: Strength of the anchor, positive.
        iters: Iterations of CG, at least 1.

    Returns:
        Phi, a scalar; h, shape (d,); and an `ImplicitInfo`. All detached.

    Raises:
        TypeError: as `adapt`.
        ValueError: if ``lam`` is not flat, ``tau`` not positive, ``iters`` below 1, ``theta`` of
            another shape, or support and query not of equally many tasks; for a loss, as `adapt`.
        NotFinite: if Phi, h or a residual is NaN or infinite.

    Warns:
        NegativeCurvatureWarning: if some H_i + tau I is seen not to be positive definite.

    Cost, a task: 1 gradient and ``iters`` products, whatever it took to find theta.
    Source: Rajeswaran, Finn, Kakade and Levine (2019), who write (I + H_i / tau) h_i = b_i.

    Example:
        >>> from bilevel_lite import meta
        >>> support = query = torch.zeros(2, 1), torch.tensor([[1.0], [3.0]])
        >>> def loss(theta, batch):
        ...     return (theta - batch[1]).square().sum() / 2
        >>> theta = torch.tensor([[0.5], [1.5]])  # half-way between lam and y
        >>> meta.imaml(loss, torch.zeros(1), theta, support, query, tau=1.0, iters=1)[1]
        tensor([-0.5000])
    """
    tasks = _require(loss, lam, support, query)
    require_number("tau", tau, positive=True, way_out="; without an anchor use maml")
    at_least("iters", iters, 1)
    _require_theta(theta, tasks, lam)

    right = partial(exactly, loss)

    def one(theta, support, query):
        b, value = grad_and_value(right)(theta, query)
        product = vjp(lambda theta: grad(right)(theta, support), theta)[1]
        v, r, low = _cg(lambda p: product(p)[0] + tau * p, b, iters)
        return value, tau * v, r.norm() / b.norm().clamp_min(torch.finfo(b.dtype).tiny), low

    with _mapped(loss, lam, support, twice=True):
        found = vmap(one)(theta.detach(), support, query)
    values, h, residual, curvature = (part.detach() for part in found)
    require_finite({"Phi": values, "h": h, "residual": residual})
    if bad := int((curvature <= 0).sum()):
        warnings.warn(
            f"CG stopped on {bad} of {tasks} tasks: the curvature along a direction is as low as "
            f"{float(curvature.min()):.3g}, so H + tau I is not positive definite there and theta "
            f"no strict minimum; raise tau ({tau}), or solve the inner problems further",
            NegativeCurvatureWarning,
            stacklevel=2,
        )
    return values.mean(), h.mean(0), ImplicitInfo(residual, curvature)


def _cg(matvec, b, iters):
    """``iters`` steps of CG from zero: v, the residual, the smallest curvature met."""
    v, r, p, rr = torch.zeros_like(b), b, b, b @ b
    low = torch.full_like(rr, math.inf)
    floor = torch.finfo(b.dtype).eps ** 2 * rr  # solved, as far as this precision goes
    for _ in range(iters):
        hp = matvec(p)
        php = p @ hp
        live = rr > floor
        low = torch.minimum(low, torch.where(live, php / (p @ p), low))
        step = torch.where((low > 0) & live, rr / php, 0.0)  # 0: this task stays as it is
        v, r, old = v + step * p, r - step * hp, rr
        rr = r @ r
        p = r + torch.where(old > 0, rr / old, 0.0) * p
    return v, r, low


def sinusoids(
    generator: torch.Generator,
    tasks: int,
    shots: int,
    query: int = 10,
    device: torch.device | str = "cpu",
) -> tuple[Batch, Batch]:
    """Regression tasks y = a sin(x - s): a uniform in [0.1, 5], s in [0, pi], x in [-5, 5].

    Args:
        generator: On the CPU.
        tasks: How many curves.
        shots: Points of each support set.
        query: Points of each query set.
        device: Where the result goes.

    Returns:
        (support, query), each a pair (x, y) of shape (tasks, points, 1).

    Raises:
        TypeError: if the generator is none.
        ValueError: if a number is below 1.

    Source: Finn et al. (2017), section 5.1.

    Example:
        >>> from bilevel_lite import meta
        >>> support, query = meta.sinusoids(torch.Generator().manual_seed(0), tasks=4, shots=10)
        >>> support[0].shape
        torch.Size([4, 10, 1])
    """
    require_generator(generator)
    for name, value in (("tasks", tasks), ("shots", shots), ("query", query)):
        at_least(name, value, 1)
    how = {"generator": generator, "device": generator.device, "dtype": torch.float64}
    draw = torch.rand(tasks, 2 + shots + query, **how)
    a, s, x = 0.1 + 4.9 * draw[:, :1], math.pi * draw[:, 1:2], 10 * draw[:, 2:] - 5
    y = a * torch.sin(x - s)
    x, y = (part[..., None].to(device, torch.get_default_dtype()) for part in (x, y))
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


def few_shot(
    data: Batch,
    classes: Sequence[int],
    generator: torch.Generator,
    tasks: int,
    ways: int,
    shots: int,
    query: int = 10,
) -> tuple[Batch, Batch]:
    """Episodes: a few classes in a random order, a few examples of each, their labels 0, 1, ...

    Args:
        data: (x, y), examples along the first dimension, y integers.
        classes: Those that may be drawn.
        generator: On the CPU.
        tasks: How many episodes.
        ways: Classes of an episode.
        shots: Support examples of a class.
        query: Query examples of a class; never one of its support.

    Returns:
        (support, query): x of shape (tasks, ways * points, ...), y of (tasks, ways * points).

    Raises:
        TypeError: if the generator is none, ``data`` no pair of tensors with a first dimension, or
            ``classes`` no whole numbers.
        ValueError: if a number is below 1, y holds no label for each example, there are fewer than
            ``ways`` classes, or a class has fewer than ``shots + query`` examples.

    Source: Vinyals et al. (2016), section 4.1; Ravi and Larochelle (2017).

    Example:
        >>> from bilevel_lite import meta
        >>> data, draws = (torch.arange(12.0), torch.arange(12) % 3), torch.Generator()
        >>> support, query = meta.few_shot(data, [0, 1, 2], draws, 5, ways=2, shots=1, query=3)
        >>> support[0].shape, query[1][0]
        (torch.Size([5, 2]), tensor([0, 0, 0, 1, 1, 1]))
    """
    require_generator(generator)
    for name, value in (("tasks", tasks), ("ways", ways), ("shots", shots), ("query", query)):
        at_least(name, value, 1)
    _require_pair("data", data)
    (x, y), each, place = data, shots + query, generator.device
    if y.shape != (len(x),):
        raise ValueError(f"data: y has shape {tuple(y.shape)}, expected ({len(x)},), a label each")
    try:
        wanted = [index(c) for c in classes]
    except TypeError:
        raise TypeError(f"classes: got {classes!r}, expected whole numbers, as (0, 1)") from None
    members = {c: (y.to(place) == c).nonzero().flatten() for c in wanted}
    if len(members) < ways:
        raise ValueError(f"ways: got {ways}, but there are {len(members)} classes to draw from")
    for c, found in members.items():
        if len(found) < each:
            raise ValueError(
                f"query: shots + query is {each}, but class {c} has {len(found)} examples"
            )

    def some(among, count):
        return among[torch.randperm(len(among), generator=generator, device=place)[:count]]

    known = torch.tensor(list(members), device=place)
    rows = torch.stack(
        [some(members[c], each) for _ in range(tasks) for c in some(known, ways).tolist()]
    ).view(tasks, ways, each)
    labels = torch.arange(ways, device=place)[:, None].expand(tasks, ways, each)
    sets = []
    for part in (slice(0, shots), slice(shots, each)):
        at = rows[..., part].flatten(1).to(x.device)
        sets.append((x[at], labels[..., part].flatten(1).to(x.device)))
    return sets[0], sets[1]


def _require_pair(name: str, batch: Any) -> None:
    """Refuse what is no pair of tensors with a first dimension."""
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not pair or not all(isinstance(part, Tensor) and part.dim() for part in batch):
        parts = batch if isinstance(batch, tuple | list) else ()
        kinds = [f"{type(p).__name__}{[*p.shape] if isinstance(p, Tensor) else ''}" for p in parts]
        got = type(batch).__name__ + f" of {', '.join(kinds)}" * bool(kinds)
        raise TypeError(
            f"{name}: got {got}, expected a pair (x, y) of tensors with a first dimension"
        )


def _require(loss: Loss, lam: Tensor, *sets: Batch) -> int:
    """Refuse what is no loss or start, and sets of unequally many tasks; return their number."""
    require_function("loss", loss, "(theta, batch) -> scalar")
    require_variable("lam", lam)
    for name, batch in zip(("support", "query"), sets, strict=False):
        _require_pair(name, batch)
    if lam.dim() != 1:
        raise ValueError(f"lam: got shape {tuple(lam.shape)}, expected a flat vector (d,)")
    counts = [len(part) for batch in sets for part in batch]
    if len(set(counts)) != 1:
        name = "support" if len(sets) == 1 else "support and query"
        raise ValueError(f"{name}: x and y hold {counts} tasks, expected equally many in each")
    if not counts[0]:
        raise ValueError("support: x and y hold no tasks, expected at least one")
    return counts[0]


def _require_theta(theta: Tensor, tasks: int, lam: Tensor) -> None:
    require_variable("theta", theta)
    if theta.shape != (tasks, lam.numel()):
        wanted = f"({tasks}, {lam.numel()}), a row for each task"
        raise ValueError(f"theta: got shape {tuple(theta.shape)}, expected {wanted}")


# ------------------------------------------------------------------ one task by itself, and mapped

# how often a loss was used: where its first derivatives are wanted, and where its second
_uses: dict[bool, WeakKeyDictionary] = {False: WeakKeyDictionary(), True: WeakKeyDictionary()}
_PARTS = ("value", "gradient", "product with the Hessian")
_TRANSFORM = ("vmap", "torch.func", "functorch", "transform", "atching rule")  # torch's words
_LOOP = (
    "take the tasks in a loop, by bl.hypergradient (in place of maml by bl.unrolled_hypergradient, "
    "with theta = lam + delta)"
)
_WAYS = (
    ("randomness", "call model.eval() (dropout), or put what is drawn into the batch"),
    ("mutate", "call model.eval() (BatchNorm), or write into new tensors only"),
    ("in-place", "call model.eval() (BatchNorm), or write into new tensors only"),
    (".item()", "let no branch and no number hang on values: torch.where, and tensors throughout"),
    ("dynamic shape", "let no shape hang on values: torch.where in place of a boolean mask"),
    ("accessing `data`", "use .detach() in place of .data"),
)


@contextmanager
def _mapped(loss: Loss, lam: Tensor, tasks: Batch, twice: bool) -> Iterator[None]:
    """Where ``loss`` is mapped over tasks: compared before, now and then; refused in our words.

    Raises:
        ValueError: if a task by itself is refused, as by `bilevel_lite.hypergradient`, comes out
            otherwise under ``vmap``, or ``vmap`` cannot take it; naming the way out.

    Cost: nothing, or at use 1, 2, 4, 8 ... of a loss a few gradients and products of one task. A
    function that is made anew for each call is at its first use each time.
    """
    if transforming():  # inside of maml, or of a transform of the caller's
        alone = None
    else:
        alone = partial(_alone, loss, lam, tasks, twice)
    with second_order(), way_out("loss"), _our_words(alone):
        if alone is not None:
            if due(loss, _uses[twice]):
                _require_alike(loss, lam, tasks, twice)
            was_the_same(loss, _uses[twice])
        yield


@contextmanager
def _our_words(alone: Callable[[], Any] | None) -> Iterator[None]:
    """Refuse in a sentence what a task by itself allows, and ``vmap`` does not."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if alone is not None:
            alone()  # a fault of the loss itself comes first
        elif not any(words in said for words in _TRANSFORM):
            raise
        way = next((way for words, way in _WAYS if words in said), _LOOP)
        raise ValueError(
            f"loss: cannot be mapped over the tasks by torch.func.vmap ({said[:300]}); {way}"
        ) from error


def _require_alike(loss: Loss, lam: Tensor, tasks: Batch, twice: bool) -> None:
    """Refuse a loss whose first task comes out otherwise under ``vmap`` than by itself."""
    alone, mapped = _alone(loss, lam, tasks, twice), _first_mapped(loss, lam, tasks, twice)
    off = [float((b - a).norm()) for a, b in zip(alone, mapped, strict=True)]
    allowed = [tolerance(lam) * float(a.norm()) for a in alone]
    if all(not o > most for o, most in zip(off, allowed, strict=True)):
        return
    far = _first_mapped(loss, lam / 2 + wave(lam) / 10, tasks, twice)
    for name, o, most, size in zip(_PARTS, off, allowed, far, strict=False):
        rounding = 1e3 * torch.finfo(lam.dtype).eps * float(size.norm())  # of terms that cancel
        if o > most + (rounding if math.isfinite(rounding) else 0.0):
            raise ValueError(
                f"loss: the {name} of a task is off by {o:.1e} under torch.func.vmap from what it "
                "is by itself: it keeps something from call to call (a weight computed once, for "
                "another theta), or holds what a transform treats otherwise (.data, a hook on a "
                f"gradient); compute all of it in every call with .detach() and no hook, or {_LOOP}"
            )


@differentiating
def _alone(loss: Loss, lam: Tensor, tasks: Batch, twice: bool) -> list[Tensor]:
    """Value, gradient and with ``twice`` H v of the first task, by itself; nothing is drawn."""
    batch, drawn = _first(tasks), random_state(lam)

    def lone(_, theta, batch):
        return loss(theta, batch)

    try:
        value, _, slope = products.gradient(lone, lam, lam, batch)
        along = [wave(lam)] if twice else []
        return [value, slope, *(products.hvp(lone, lam, lam, batch, v) for v in along)]
    except ValueError as error:
        if not (said := str(error)).startswith("inner_loss"):
            raise
        raise type(error)(said.removeprefix("inner_")) from error
    finally:
        restore_random_state(drawn, lam)


@differentiating
def _first_mapped(loss: Loss, theta: Tensor, tasks: Batch, twice: bool) -> list[Tensor]:
    """The same by ``vmap``."""
    right = partial(exactly, loss)

    def one(theta, batch):
        slope, value = grad_and_value(right)(theta, batch)
        if not twice:
            return value, slope
        back = vjp(lambda theta: grad(right)(theta, batch), theta)[1]
        return value, slope, back(wave(theta))[0]

    batch = tree_map(lambda part: part[None], _first(tasks))
    return [part[0].detach() for part in vmap(one)(theta.detach()[None], batch)]


def _first(tasks: Batch) -> Batch:
    return tree_map(lambda part: ordinary(part[0]), tasks)
