"""What all methods share: variables, optimisers, batches, oracles that count, the outer step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, fields
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel_lite.algorithms.resume import Resumable, has_state
from bilevel_lite.hypergrad import HypergradientInfo, implicit
from bilevel_lite.options import (
    Option,
    check,
    dataclass_transform,
    document,
    flag,
    fraction,
    instance,
    not_negative,
    one_of,
    options_of,
    positive,
    whole,
)
from bilevel_lite.problem import BilevelProblem, examples, relative_size
from bilevel_lite.products import COST, cross_vp, hvp_operator, lam_gradient
from bilevel_lite.recorded import Recordings
from bilevel_lite.refuse import (
    NotFinite,
    every_look,
    looked_at,
    require_batch,
    require_constant,
    require_finite,
    require_function,
    require_problem,
    require_scalar,
    require_variable,
)
from bilevel_lite.same_function import SameDraws
from bilevel_lite.solvers import SolveInfo
from bilevel_lite.surroundings import differentiating, ordinary

__all__ = ["METHODS", "Method", "Slope", "StepInfo"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]

# Every method by name: a class is entered as soon as it says its own `_direction`.
METHODS: dict[str, type["Method"]] = {}


@dataclass
class StepInfo:
    """What one outer iteration did.

    Attributes:
        iteration: Number of outer iterations done, this one included.
        inner_loss: g as last evaluated in this iteration; a scalar tensor.
        outer_loss: f as last evaluated in this iteration, at the old lam; a scalar tensor.
        hypergradient: What the outer optimiser was given, like ``lam``.
        solve: The linear solver's diagnosis, None for a method without one.
        gradients: Cost so far, in gradients of the inner loss on one inner batch.
    """

    iteration: int
    inner_loss: Tensor
    outer_loss: Tensor
    hypergradient: Tensor
    solve: SolveInfo | None
    gradients: float


class Slope(NamedTuple):
    """A loss and its gradients in lam and theta."""

    value: Tensor
    lam: Tensor
    theta: Tensor


def draw(batch: Any) -> Any:
    """Return a batch as it is, or the next one of a sampler (anything with a ``draw`` method)."""
    return ordinary(batch.draw() if callable(getattr(batch, "draw", None)) else batch)


@dataclass_transform(
    field_specifiers=(positive, not_negative, fraction, whole, flag, one_of, instance)
)
@dataclass(eq=False, repr=False)
class Method(Resumable):
    r"""Base of the methods; a subclass says how one iteration finds its direction for lam.

    Used like a torch optimiser: ``info = method.step()`` is one outer iteration; ``method.lam``
    and ``method.theta`` are the current variables; ``state_dict`` and ``load_state_dict`` resume
    it to the last bit (optimisers, schedules, memory and the samplers' generators included; not
    torch's own generator, which dropout in training mode draws from, nor a sampler that has no
    ``state_dict``). A step that fails or is interrupted changes nothing: the state is that of the
    last good step, so that one can lower a step size, in ``inner_optimizer.param_groups`` (a
    loaded state brings its own), and go on.

    A subclass declares its options as fields (`bilevel_lite.options`), sets up its memory in
    ``__post_init__``, after super's, and writes ``_direction()``, which moves theta and returns
    (inner loss, outer loss, direction for lam, solver's diagnosis or None). It asks the oracles
    ``_g``, ``_g_theta``, ``_g_lam``, ``_f``, ``_hessian``, ``_cross``, ``_hypergradient``, which
    count their cost, and names in ``remembers`` what the next step depends on: values, which it
    replaces and never changes in place, unless in ``_commit()``, which is called once the step is
    known to be good; or anything with a ``state_dict``, and generators. It is then guarded, listed
    in `METHODS`, saved and resumed as the others are.

    Args:
        problem: The two losses.
        lam: Start of the outer variable, any shape; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_batch: A batch for g, or a sampler: anything with a ``draw()`` method, such as
            `bilevel_lite.data.Batches`.
        outer_batch: The same for f.
        curvature_batch: The same for H; by default draws of ``inner_batch``. Refused, as is the
            next, by methods that have no use for it.
        cross_batch: The same for J. Without batches of their own, H and J share one further draw
            of ``inner_batch`` (MRBO and NBO take g's own draw; methods that draw a batch for each H
            a further one for J).
        inner_optimizer: Function from a list of tensors to a ``torch.optim.Optimizer``.
        outer_optimizer: The same for lam.
        inner_scheduler: Function from the inner optimiser to one of torch's learning-rate
            schedulers; stepped once per outer iteration (``ReduceLROnPlateau`` with the outer
            loss).
        outer_scheduler: The same for the outer optimiser.
        projection: lam -> lam of the same shape, applied after each outer step and never
            differentiated, for example ``lambda lam: lam.clamp(0, 1)``.

    Raises:
        TypeError: if ``lam`` or ``theta`` is not a floating-point tensor, a batch is none (a
            DataLoader, an iterator), an optimiser's factory returns something else, an option is of
            another kind, or an argument is not the method's (a ``solver``, say).
        ValueError: if an option is out of range or a step size missing, an optimiser does not hold
            the variable that it was given or needs a closure, the inner one has a weight decay
            (except SAMA's) or maximises, or batches are given for which the method has no use.

    A method may be made and stepped where gradients are off (``no_grad``, ``inference_mode``).
    Inner steps may draw random numbers (dropout in training mode); where a method compares values
    of a loss on one batch, they are of the same draws, and second derivatives are refused.

    Example:
        >>> problem = bl.BilevelProblem(
        ...     lambda lam, theta, _: ((theta - lam) ** 2).sum(),
        ...     lambda lam, theta, _: ((theta - 1) ** 2).sum(),
        ... )
        >>> lam = theta = torch.zeros(2)
        >>> method = bl.AID(problem, lam, theta, bl.CG(2), inner_lr=0.3, outer_lr=0.3)
        >>> steps = [method.step() for _ in range(5)]
        >>> method.iteration
        5
        >>> saved = method.state_dict()
        >>> again = bl.AID(problem, method.lam, method.theta, bl.CG(2), inner_lr=0.3, outer_lr=0.3)
        >>> again.load_state_dict(saved)
        >>> torch.equal(again.step().hypergradient, method.step().hypergradient)
        True
    """

    problem: BilevelProblem
    lam: Tensor
    theta: Tensor
    _: KW_ONLY
    inner_lr: float | None = positive(
        default=None,
        expected="a positive step size (or give inner_optimizer)",
        help="Step size of plain gradient descent on theta; not read beside inner_optimizer",
        search=(0.02, 1.0),
    )
    outer_lr: float | None = positive(
        default=None,
        expected="a positive step size (or give outer_optimizer)",
        help="The same for lam, in whose units it is: the task says where to search",
    )
    inner_batch: Any = None
    outer_batch: Any = None
    curvature_batch: Any = None
    cross_batch: Any = None
    inner_optimizer: Optimizer | None = None
    outer_optimizer: Optimizer | None = None
    inner_scheduler: Scheduler | None = None
    outer_scheduler: Scheduler | None = None
    projection: Callable[[Tensor], Tensor] | None = None

    # What stands for H, how v is found, how lam and theta move: the method's row in the table.
    choices = ("", "", "")
    remembers = ()
    roles = ("inner", "outer")  # roles that may have batches of their own
    needs = ("inner", "outer")  # roles that have no default
    step_sizes = ()  # further step sizes, which a message about divergence names
    plain_inner = False  # True where theta moves by plain gradient descent only
    knows_decay = False  # True where the inner optimiser's own penalty is reckoned with
    solver = None
    # Around the inner steps of AID, AmIGO, StocBiO, BSG1 and SAMA: a place for what shall hold
    # there only, such as BatchNorm in training mode.
    descending = staticmethod(nullcontext)

    iteration, gradients, last_loss = 0, 0.0, None
    _unit = None  # an inner batch: what costs are counted in

    def __init_subclass__(cls, **options):
        """Make the constructor and the docstring from the fields, and enter the method."""
        super().__init_subclass__(**options)
        _declare(cls)
        document(cls, options_of(Method), "**common: See `bilevel_lite.algorithms.method.Method`.")
        if "_direction" in vars(cls):
            METHODS[cls.__name__] = cls

    def __post_init__(self):
        check(self)
        require_problem(self.problem)
        require_variable("lam", self.lam)
        require_variable("theta", self.theta)
        self.lam, self.theta = self.lam.detach().clone(), self.theta.detach().clone()
        self.recorded = Recordings()
        if self.plain_inner and self.inner_optimizer is not None:
            raise ValueError(
                f"inner_optimizer: {type(self).__name__} is defined for plain gradient descent; "
                "give inner_lr"
            )
        parts = [f"{level}_{p}" for level in ("inner", "outer") for p in ("optimizer", "scheduler")]
        for name in (*parts, "projection"):
            if (part := getattr(self, name)) is not None:
                require_function(name, part, "that makes it" if name in parts else "lam -> lam")
        self.inner_optimizer = self._optimizer("inner", self.theta)
        self.outer_optimizer = self._optimizer("outer", self.lam)
        for level in ("inner", "outer"):
            make, optimizer = (getattr(self, f"{level}_{p}") for p in ("scheduler", "optimizer"))
            made = make if make is None else make(optimizer)
            if make is not None and not hasattr(made, "step"):
                raise TypeError(
                    f"{level}_scheduler: made {type(made).__name__}, expected one of torch's "
                    "learning-rate schedulers of the optimiser that it is given"
                )
            setattr(self, f"{level}_scheduler", made)
        roles = ("inner", "outer", "curvature", "cross")
        self.batches = {role: getattr(self, f"{role}_batch") for role in roles}
        for role, batch in self.batches.items():
            if batch is not None and role not in self.roles:
                raise ValueError(
                    f"{role}_batch: {type(self).__name__} has no use for it; leave it out"
                )
            if batch is not None or role in self.needs:
                loss = self.problem.outer_loss if role == "outer" else self.problem.inner_loss
                require_batch(f"{role}_batch", batch, loss, sampler=True)

    def _optimizer(self, level: str, variable: Tensor) -> torch.optim.Optimizer:
        factory, name = getattr(self, f"{level}_optimizer"), "theta" if level == "inner" else "lam"
        if factory is None:
            check(self, f"{level}_lr")
            return torch.optim.SGD([variable], lr=getattr(self, f"{level}_lr"))
        optimizer = factory([variable])
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{level}_optimizer: returned {type(optimizer).__name__}, expected a "
                "torch.optim.Optimizer"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{level}_optimizer: LBFGS evaluates the loss by itself (a closure), which a "
                "bilevel method cannot give it; take another torch.optim.Optimizer"
            )
        for group in optimizer.param_groups if level == "inner" and not self.knows_decay else ():
            for name in ("weight_decay", "lambd"):  # ASGD calls it so
                if group.get(name):
                    raise ValueError(
                        f"inner_optimizer: has {name}={group[name]}, a penalty that g has not, so "
                        "theta would solve another problem than the one that H and J are of; give "
                        f"{name}=0 and put the penalty into g, WeightedRisk(l2=...)"
                    )
            if group.get("maximize"):
                raise ValueError("inner_optimizer: has maximize=True, but theta minimises g")
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if len(held) != 1 or held[0] is not variable:
            raise ValueError(
                f"{level}_optimizer: the optimiser does not hold the {name} it was given; build it "
                "on the list that the function receives"
            )
        return optimizer

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The method's options by name, each with its default, range, meaning and search."""
        return options_of(cls)

    # -- what subclasses write

    def _direction(self) -> tuple[Tensor, Tensor, Tensor, SolveInfo | None]:
        raise NotImplementedError

    def _commit(self) -> None:
        """Write what could not be taken back, now that the step is good."""

    # -- and what they ask: batches, and oracles that count their cost

    def _draw(self, role: str) -> Any:
        """Return the next batch of a role; H and J draw one of g where they have none of their own.

        The first inner batch becomes the unit of cost.
        """
        if role in ("curvature", "cross") and self.batches[role] is None:
            role = "inner"
        batch = draw(self.batches[role])
        require_constant(f"{role}_batch", batch)
        if role == "inner" and self._unit is None:
            self._unit = batch
        return batch

    def _draw_or(self, role: str, shared: Any) -> Any:
        """Return the next batch of a role, or this one where it has none of its own."""
        return shared if self.batches[role] is None else self._draw(role)

    def _draw_system(self) -> tuple[Any, Any]:
        """Batches for H and J: of their own, or one fresh inner batch for both."""
        own = all(self.batches[role] is not None for role in ("curvature", "cross"))
        shared = None if own else self._draw("inner")
        return self._draw_or("curvature", shared), self._draw_or("cross", shared)

    def _spend(self, what: str | float, batch: Any, times: float = 1) -> None:
        """Count ``times`` gradients, or products named as in `COST`, on a batch."""
        amount = COST[what] if isinstance(what, str) else what
        self.gradients += times * amount * relative_size(batch, self._unit)

    def _slope(
        self, gradient: str, name: str, batch: Any, theta: Any = None, lam: Any = None
    ) -> tuple:
        """A loss and a gradient of it, counted and looked at."""
        self._spend("gradient", batch)
        at = self.lam if lam is None else lam, self.theta if theta is None else theta, batch
        slope = getattr(self.recorded, gradient)(getattr(self.problem, name), *at, name)
        _look(f"gradient of {name} in theta", slope[-1])
        return slope

    def _g(self, batch: Any, theta: Tensor | None = None, lam: Tensor | None = None) -> Slope:
        """g with both gradients, here or at another point: 1 gradient."""
        return Slope(*self._slope("gradient", "inner_loss", batch, theta, lam))

    def _f(self, batch: Any) -> Slope:
        """f with both gradients: 1 gradient."""
        return Slope(*self._slope("gradient", "outer_loss", batch))

    def _g_theta(
        self, batch: Any, theta: Tensor | None = None, lam: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """g and its gradient in theta alone, here or at another point: 1 gradient."""
        return self._slope("theta_gradient", "inner_loss", batch, theta, lam)

    def _g_lam(self, batch: Any, theta: Tensor) -> tuple[Tensor, Tensor]:
        """g and its gradient in lam alone at another theta: counted as 1 gradient."""
        self._spend("gradient", batch)
        value, slope = lam_gradient(self.problem.inner_loss, self.lam, theta, batch, "inner_loss")
        _look("gradient of inner_loss in lam", slope)
        return value, slope

    def _f_theta(self, batch: Any) -> tuple[Tensor, Tensor]:
        """f and its gradient in theta alone: 1 gradient."""
        return self._slope("theta_gradient", "outer_loss", batch)

    def _value(self, name: str, batch: Any, theta: Tensor) -> Tensor:
        """g or f at another theta without a gradient, not looked at: half a gradient."""
        self._spend(0.5, batch)
        with torch.no_grad():
            value = getattr(self.problem, name)(self.lam, theta, batch)
        require_scalar(name, value)
        return value

    def _hessian(self, batch: Any) -> Callable[[Tensor], Tensor]:
        """v -> H v here on one batch, of which the graph is kept: 2 gradients a product."""
        operator = None

        def product(v: Tensor) -> Tensor:
            nonlocal operator
            if operator is None:  # not before it is needed
                at = self.problem.inner_loss, self.lam, self.theta, batch
                operator = self.recorded.second(*at) or hvp_operator(*at)
            self._spend("hvp", batch)
            return operator(v)

        return product

    def _fresh_hessian(self, v: Tensor) -> Tensor:
        """H v here on a fresh batch: 2 gradients."""
        return self._hessian(self._draw("curvature"))(v)

    def _cross(self, batch: Any, v: Tensor) -> Tensor:
        """J v here: 2 gradients."""
        self._spend("cross", batch)
        at = self.problem.inner_loss, self.lam, self.theta, batch
        there = self.recorded.second(*at)
        return cross_vp(*at, v) if there is None else there.cross(v)

    def _hypergradient(
        self,
        outer: Any,
        curvature: Any,
        cross: Any,
        theta: Tensor | None = None,
        lam: Tensor | None = None,
        **how: Any,
    ) -> tuple[Tensor, HypergradientInfo]:
        """The hypergradient by `solver`, here or at another point, and what it took; counted."""
        g, f = self.problem.inner_loss, self.problem.outer_loss
        # H and J refuse a g that draws, and solvers read its structure: they are given g itself
        problem = BilevelProblem(g.loss if isinstance(g, SameDraws) else g, f)
        lam, theta = self.lam if lam is None else lam, self.theta if theta is None else theta
        h, info = implicit(
            problem, lam, theta, self._unit, outer, self.solver, cross, curvature,
            recorded=self.recorded, **how,
        )  # fmt: skip
        self._spend(info.gradients, self._unit)
        return h, info

    def _preconditioner(self, batch: Any) -> Callable[[Tensor], Tensor] | None:
        """r -> G^-1 r with the method's KFAC on a batch, its build counted; None without one."""
        if self.solver is None:
            return None
        inverse = self.solver.inverse(self.problem.inner_loss, self.lam, self.theta, batch)
        self._spend(self.solver.last_cost, batch)
        return inverse

    def _observe(self, batch: Any) -> None:
        """Take a batch into the running average of the method's KFAC, counted."""
        at = self.problem.inner_loss, self.lam, self.theta, batch
        self._spend(self.solver.observe(*at), batch)

    @contextmanager
    def _same_draws(self) -> Iterator[None]:
        """A place where a loss draws the same random numbers whenever it is evaluated.

        For methods that compare values of a loss, or subtract its gradients: they are of one g.
        """
        problem = self.problem
        self.problem = BilevelProblem(SameDraws(problem.inner_loss), SameDraws(problem.outer_loss))
        try:
            yield
        finally:
            self.problem = problem

    def _move_theta(self, direction: Tensor) -> None:
        """One step of the inner optimiser along a direction."""
        _look("direction for theta", direction)
        self.theta.grad = direction.to(self.theta)
        self.inner_optimizer.step()

    def _set_theta(self, value: Tensor) -> None:
        """Put theta where a method's own descent led, and let the optimiser know of a step."""
        self.theta.copy_(value)
        self.theta.grad = None
        self.inner_optimizer.step()  # without a gradient it does nothing, but schedulers look

    def _inner_steps(self, steps: int) -> Tensor:
        """Descend on g, a batch a step; the loss before the last step."""
        with self.descending():
            for _ in range(steps):
                loss, grad = self._g_theta(self._draw("inner"))
                self._move_theta(grad)
        return loss

    @property
    def _lr(self) -> float:
        """The inner optimiser's present step size."""
        return self.inner_optimizer.param_groups[0]["lr"]

    # -- what users call

    @differentiating
    def step(self) -> StepInfo:
        """Do one outer iteration.

        Returns:
            `StepInfo`; its losses are tensors: they are read (on a GPU: waited for) by whoever
            wants them. The inner steps wait for nothing.

        Raises:
            NotFinite: (a ValueError) if a loss, a direction or a variable is not finite: it says
                at which step, from what value of the outer loss, and which step sizes to lower.
            ValueError: as the losses and the solver say.

        Whatever is raised, everything here is then as it was before the call (what a model keeps
        for itself, such as BatchNorm's statistics, is not here). On a GPU only the end of a step is
        looked at; one that went wrong is repeated with every look, to say where.
        """
        try:
            return self._step()
        except ValueError as error:
            if looked_at(self.theta):
                raise
            first, before = error, self._state(copies=False)
        with every_look():
            self._step()
        self.load_state_dict(before)  # a sampler without a state may have drawn a better batch
        raise first

    def _step(self) -> StepInfo:
        before = self._state(copies=False)
        try:
            inner_loss, outer_loss, direction, solve = self._direction()
            direction = direction.to(self.lam)  # scalars of other float types may have entered
            _look("direction for lam", direction)
            self._move_lam(direction)
            losses = {"inner_loss": inner_loss, "outer_loss": outer_loss}
            variables = {"direction for lam": direction, **self._like_theta(), "lam": self.lam}
            require_finite({**losses, **variables})
            for scheduler in filter(None, (self.inner_scheduler, self.outer_scheduler)):
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([float(outer_loss)] if plateau else []))
        except BaseException as error:
            self.load_state_dict(before)
            if isinstance(error, NotFinite):
                raise NotFinite(f"{self._where()}: {error}") from error
            raise
        self._commit()
        self.iteration += 1
        self.last_loss = outer_loss
        return StepInfo(self.iteration, inner_loss, outer_loss, direction, solve, self.gradients)

    def _like_theta(self) -> dict[str, Tensor]:
        """Theta and what is remembered in its shape, by name."""
        named = {"theta": self.theta, **{name: getattr(self, name) for name in self.remembers}}
        shape = self.theta.shape
        return {k: v for k, v in named.items() if isinstance(v, Tensor) and v.shape == shape}

    def _move_lam(self, direction: Tensor) -> None:
        self.lam.grad = direction.clone()  # Nesterov's momentum may be added in place
        self.outer_optimizer.step()
        if self.projection is not None:
            with torch.no_grad():
                projected = self.projection(self.lam)
                if not isinstance(projected, Tensor) or projected.shape != self.lam.shape:
                    got = getattr(projected, "shape", type(projected).__name__)
                    raise ValueError(
                        f"projection: returned {got}, expected a tensor of shape "
                        f"{tuple(self.lam.shape)}, that of lam"
                    )
                self.lam.copy_(projected)

    def _where(self) -> str:
        """What a message about divergence says first."""
        rates = {"inner_lr": self._lr, "outer_lr": self.outer_optimizer.param_groups[0]["lr"]}
        rates |= {name: getattr(self, name) for name in self.step_sizes}
        smaller = ", ".join(f"{k} (now {float(v):.3g})" for k, v in rates.items() if v is not None)
        since = ""
        if self.last_loss is not None:
            since = f" (the outer loss was {float(self.last_loss):.3g} one step before)"
        return f"{type(self).__name__}, step {self.iteration + 1}{since}, try a smaller {smaller}"

    # -- what is resumed, see `Resumable`

    def _values(self) -> tuple[str, ...]:
        mine = [name for name in self.remembers if not has_state(getattr(self, name))]
        return ("gradients", "unit", "last_loss", *mine)

    def _parts(self) -> dict[str, Any]:
        kinds = ("inner_optimizer", "outer_optimizer", "inner_scheduler", "outer_scheduler")
        named = {name: getattr(self, name) for name in ("solver", *kinds, *self.remembers)}
        samplers = {f"{role}_batch": b for role, b in self.batches.items() if hasattr(b, "draw")}
        return {name: part for name, part in (named | samplers).items() if has_state(part)}

    @property
    def unit(self) -> int | None:
        """Number of examples in the batch whose gradient is the unit of cost, None without rows."""
        return examples(self._unit)

    @unit.setter
    def unit(self, rows: int | None) -> None:
        if rows is not None:
            self._unit = (torch.empty(rows, 0),)  # its length is all that counts


document(Method)


def _declare(cls: type) -> None:
    """Give a method the constructor of its fields: with gradients on, what is no field refused.

    Raises:
        TypeError: for a constructor of its own, or an option whose name is taken.
    """
    if "__init__" in vars(cls):
        raise TypeError(
            f"{cls.__name__}: has an __init__ of its own; declare its options as fields (see "
            "bilevel_lite.options) and put the rest into __post_init__"
        )
    dataclass(eq=False, repr=False)(cls)
    known = {f.name for f in fields(cls)}
    for name in sorted(known - {f.name for f in fields(Method)} - {"solver"}):
        if hasattr(Method, name):
            raise TypeError(
                f"{cls.__name__}.{name}: every method has an attribute of this name; call the "
                "option something else"
            )
    build = cls.__init__

    @differentiating
    @wraps(build)
    def __init__(self, *args, **options):
        unknown = sorted(set(options) - known)
        if "solver" in unknown:
            raise TypeError(
                f"solver: {cls.__name__} takes none (v by: {cls.choices[1]}); leave it out"
            )
        if unknown:
            raise TypeError(f"{', '.join(unknown)}: no argument of {cls.__name__}")
        build(self, *args, **options)

    cls.__init__ = __init__


def _look(name: str, value: Tensor) -> None:
    """`require_finite` where it costs next to nothing: on a GPU it waits, and `step` looks once."""
    if looked_at(value) and not torch.isfinite(value.sum()):
        require_finite({name: value})
