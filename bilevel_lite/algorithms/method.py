"""What all methods share: variables, optimisers, batches, the outer step, costs, resuming."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.problem import (
    BilevelProblem,
    NotFinite,
    every_look,
    examples,
    looked_at,
    relative_size,
    require_batch,
    require_problem,
    require_variable,
)
from bilevel_lite.products import COST, gradient, theta_gradient
from bilevel_lite.solvers import SolveInfo
from bilevel_lite.surroundings import differentiating, ordinary

__all__ = ["Method", "StepInfo"]

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


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


def draw(batch: Any) -> Any:
    """Return a batch as it is, or the next one of a sampler (anything with a ``draw`` method)."""
    return ordinary(batch.draw() if hasattr(batch, "draw") else batch)


class Method:
    r"""Base of the methods; a subclass says how one iteration finds its direction for lam.

    Used like a torch optimiser: ``info = method.step()`` is one outer iteration; ``method.lam``
    and ``method.theta`` are the current variables; ``state_dict`` and ``load_state_dict`` resume
    it to the last bit (optimisers, schedules, memory and the samplers' generators included). A step
    that fails or is interrupted changes nothing: the state is that of the last good step, so that
    one can lower a step size and go on.

    A subclass writes ``_direction()``, which moves theta and returns (inner loss, outer loss,
    direction for lam, solver's diagnosis or None), counts its cost with `_spend`, and names in
    ``remembers`` the attributes that the next step depends on. These it replaces and never changes
    in place, unless in ``_commit()``, which is called once the step is known to be good.

    Args:
        problem: The two losses.
        lam: Start of the outer variable, any shape; copied.
        theta: Start of the inner variable, shape (d,); copied.
        inner_lr: Step size of plain gradient descent on theta, unless ``inner_optimizer`` is
            given.
        outer_lr: The same for lam.
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
            DataLoader, an iterator), an optimiser's factory returns something else, or an argument
            is not the method's (a ``solver``, say).
        ValueError: if a step size is missing or not positive, an optimiser does not hold the
            variable that it was given or needs a closure, or batches are given for which the
            method has no use.

    A method may be made and stepped where gradients are off (``no_grad``, ``inference_mode``).
    Inner steps may draw random numbers (dropout in training mode); where a method compares values
    of a loss on one batch, they are of the same draws, and second derivatives are refused.
    """

    # What stands for H, how v is found, how lam and theta move: the method's row in the table.
    choices: tuple[str, str, str] = ("", "", "")
    remembers: tuple[str, ...] = ()
    # Roles that may have batches of their own; further step sizes, as the user knows them.
    roles: tuple[str, ...] = ("inner", "outer")
    needs: tuple[str, ...] = ("inner", "outer")  # roles that have no default
    step_sizes: dict[str, str] = {}
    # Around the inner steps of AID, AmIGO, StocBiO and BSG1: a place for what shall hold there
    # only, such as BatchNorm in training mode.
    descending: Callable[[], AbstractContextManager] = staticmethod(nullcontext)

    def __init_subclass__(cls, **options):
        """Let a subclass's tensors be ordinary ones where it is made under ``inference_mode``."""
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = differentiating(cls.__init__)

    @differentiating
    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        inner_lr: float | None = None,
        outer_lr: float | None = None,
        inner_batch: Any = None,
        outer_batch: Any = None,
        curvature_batch: Any = None,
        cross_batch: Any = None,
        inner_optimizer: Optimizer | None = None,
        outer_optimizer: Optimizer | None = None,
        inner_scheduler: Scheduler | None = None,
        outer_scheduler: Scheduler | None = None,
        projection: Callable[[Tensor], Tensor] | None = None,
        **unknown: Any,
    ):
        self._refuse(unknown)
        require_problem(problem)
        require_variable("lam", lam)
        require_variable("theta", theta)
        self.problem, self.projection = problem, projection
        self.lam, self.theta = lam.detach().clone(), theta.detach().clone()
        self.inner_optimizer = _optimizer("inner", self.theta, inner_lr, inner_optimizer)
        self.outer_optimizer = _optimizer("outer", self.lam, outer_lr, outer_optimizer)
        self.schedulers = {
            level: make(optimizer)
            for level, make, optimizer in (
                ("inner", inner_scheduler, self.inner_optimizer),
                ("outer", outer_scheduler, self.outer_optimizer),
            )
            if make is not None
        }
        self.batches = {
            "inner": inner_batch,
            "outer": outer_batch,
            "curvature": curvature_batch,
            "cross": cross_batch,
        }
        for role, batch in self.batches.items():
            if batch is not None and role not in self.roles:
                raise ValueError(
                    f"{role}_batch: {type(self).__name__} has no use for it; leave it out"
                )
            if batch is not None or role in self.needs:
                loss = problem.outer_loss if role == "outer" else problem.inner_loss
                require_batch(f"{role}_batch", batch, loss, sampler=True)
        self.iteration, self.gradients = 0, 0.0
        self._unit = None  # an inner batch: what costs are counted in
        self._last_loss: float | Tensor | None = None

    def _refuse(self, unknown: dict) -> None:
        name = type(self).__name__
        if "solver" in unknown:
            raise TypeError(f"solver: {name} takes none (v by: {self.choices[1]}); leave it out")
        if unknown:
            raise TypeError(f"{', '.join(sorted(unknown))}: no argument of {name}")

    # -- what subclasses write and use

    def _direction(self) -> tuple[Tensor, Tensor, Tensor, SolveInfo | None]:
        raise NotImplementedError

    def _commit(self) -> None:
        """Write what could not be taken back, now that the step is good."""

    def _draw(self, role: str) -> Any:
        """Return the next batch of a role; the first inner batch becomes the unit of cost."""
        batch = draw(self.batches[role])
        if role == "inner" and self._unit is None:
            self._unit = batch
        return batch

    def _draw_system(self) -> tuple[Any, Any]:
        """Batches for H and J: of their own, or one fresh inner batch for both."""
        shared = None
        if self.batches["curvature"] is None or self.batches["cross"] is None:
            shared = self._draw("inner")
        return tuple(
            shared if self.batches[role] is None else self._draw(role)
            for role in ("curvature", "cross")
        )

    def _draw_curvature(self) -> Any:
        """Return a batch for H alone: its own, or a fresh inner one."""
        return self._draw("curvature" if self.batches["curvature"] is not None else "inner")

    def _spend(self, what: str | float, batch: Any, times: float = 1) -> None:
        """Count ``times`` gradients, or products named as in `COST`, on a batch."""
        amount = COST[what] if isinstance(what, str) else what
        self.gradients += times * amount * relative_size(batch, self._unit)

    def _inner_gradient(self, batch: Any) -> tuple[Tensor, Tensor]:
        """g and its gradient in theta on a batch, counted."""
        self._spend("gradient", batch)
        at = self.lam, self.theta, batch
        loss, grad = theta_gradient(self.problem.inner_loss, *at, "inner_loss")
        _look("gradient of inner_loss in theta", grad)
        return loss, grad

    def _outer_gradient(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """f and its gradients in lam and theta on a batch, counted."""
        self._spend("gradient", batch)
        at = self.lam, self.theta, batch
        loss, grad_lam, grad_theta = gradient(self.problem.outer_loss, *at, "outer_loss")
        _look("gradient of outer_loss in theta", grad_theta)
        return loss, grad_lam, grad_theta

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
                loss, grad = self._inner_gradient(self._draw("inner"))
                self._move_theta(grad)
        return loss

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
            _require_finite({**losses, **variables})
            for scheduler in self.schedulers.values():
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([float(outer_loss)] if plateau else []))
        except BaseException as error:
            self.load_state_dict(before)
            if isinstance(error, NotFinite):
                raise NotFinite(f"{self._where()}: {error}") from error
            raise
        self._commit()
        self.iteration += 1
        self._last_loss = outer_loss
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
        rates = {
            "inner_lr": self.inner_optimizer.param_groups[0]["lr"],
            "outer_lr": self.outer_optimizer.param_groups[0]["lr"],
            **{name: getattr(self, attribute) for name, attribute in self.step_sizes.items()},
        }
        smaller = ", ".join(f"{k} (now {float(v):.3g})" for k, v in rates.items() if v is not None)
        since = ""
        if self._last_loss is not None:
            since = f" (the outer loss was {float(self._last_loss):.3g} one step before)"
        return f"{type(self).__name__}, step {self.iteration + 1}{since}, try a smaller {smaller}"

    @differentiating
    def state_dict(self) -> dict:
        """Return everything that the next step depends on, as copies."""
        return self._state(copies=True)

    def _state(self, copies: bool) -> dict:
        """The state; without ``copies`` what a step only replaces is not copied."""
        keep = _copy if copies else (lambda value: value)
        return {
            "method": type(self).__name__,
            "iteration": self.iteration,
            "gradients": self.gradients,
            "unit": examples(self._unit),
            "last_loss": keep(self._last_loss),
            "lam": self.lam.clone(),
            "theta": self.theta.clone(),
            "kinds": self._kinds(),
            "inner_optimizer": _copy(self.inner_optimizer.state_dict()),
            "outer_optimizer": _copy(self.outer_optimizer.state_dict()),
            "schedulers": {
                level: copy.deepcopy(scheduler.state_dict())
                for level, scheduler in self.schedulers.items()
            },
            "memory": {name: keep(getattr(self, name)) for name in self.remembers},
            "solver": None if self.solver is None else keep(self.solver.state_dict()),
            "batches": {
                role: batch.state_dict()
                for role, batch in self.batches.items()
                if _has_state(batch)
            },
        }

    def _kinds(self) -> dict[str, str]:
        """What the state is of: optimisers, schedulers, solver and samplers."""
        parts = {
            "inner_optimizer": self.inner_optimizer,
            "outer_optimizer": self.outer_optimizer,
            **{f"{level}_scheduler": one for level, one in self.schedulers.items()},
            **{f"{role}_batch": one for role, one in self.batches.items() if _has_state(one)},
            "solver": self.solver,
        }
        return {key: type(part).__name__ for key, part in parts.items() if part is not None}

    @differentiating
    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned, as if never interrupted.

        Raises:
            ValueError: if the state is another method's, of variables of other shapes or dtypes,
                or of other optimisers, schedulers, samplers or another solver.
        """
        name = type(self).__name__
        if state.get("method") != name:
            raise ValueError(f"state: is of method {state.get('method')!r}, expected {name!r}")
        for variable in ("lam", "theta"):
            here, there = getattr(self, variable), state[variable]
            if (here.shape, here.dtype) != (there.shape, there.dtype):
                raise ValueError(
                    f"state: {variable} has shape {tuple(there.shape)}, expected "
                    f"{tuple(here.shape)} (and is {there.dtype}, expected {here.dtype})"
                )
        here, there = self._kinds(), state["kinds"]
        for key in sorted(set(here) | set(there)):
            if here.get(key) != there.get(key):
                raise ValueError(
                    f"state: {key} was {there.get(key)}, expected {here.get(key)} as given here"
                )
        device = self.theta.device
        if self.solver is not None:
            self.solver.load_state_dict(_copy(state["solver"], device))
        with torch.no_grad():
            self.lam.copy_(state["lam"])
            self.theta.copy_(state["theta"])
        self.iteration, self.gradients = state["iteration"], state["gradients"]
        self._last_loss = _copy(state["last_loss"])
        if state["unit"] is not None:
            self._unit = (torch.empty(state["unit"], 0),)  # its length is all that counts
        # copies: torch would go on in the given tensors, and the state be good for one load only
        self.inner_optimizer.load_state_dict(_copy(state["inner_optimizer"]))
        self.outer_optimizer.load_state_dict(_copy(state["outer_optimizer"]))
        for level, scheduler in self.schedulers.items():
            scheduler.load_state_dict(copy.deepcopy(state["schedulers"][level]))
        for key in self.remembers:
            setattr(self, key, _copy(state["memory"][key], device))
        for role, batch in self.batches.items():
            if _has_state(batch):
                batch.load_state_dict(state["batches"][role])

    solver = None


def _copy(value: Any, device: torch.device | None = None) -> Any:
    """Copy a remembered value: a tensor, a list or dict of such, a number or None."""
    if isinstance(value, Tensor):
        return value.clone() if device is None else value.clone().to(device)
    if isinstance(value, list):
        return [_copy(item, device) for item in value]
    if isinstance(value, dict):
        return {key: _copy(item, device) for key, item in value.items()}
    return value


def _require_finite(named: dict[str, Tensor]) -> None:
    """Refuse tensors with NaN or infinity in them; one look for all."""
    counts = torch.stack([(~torch.isfinite(value)).sum() for value in named.values()])
    for (name, value), bad in zip(named.items(), counts.tolist(), strict=True):
        if bad:
            raise NotFinite(f"{name}: {bad} of {value.numel()} entries are NaN or infinite")


def _look(name: str, value: Tensor) -> None:
    """The same where it costs next to nothing; on a GPU it would stall, and `step` looks once."""
    if looked_at(value) and not torch.isfinite(value.sum()):
        _require_finite({name: value})


def _has_state(batch: Any) -> bool:
    return hasattr(batch, "draw") and hasattr(batch, "state_dict")


def _optimizer(level, variable, lr, factory):
    name = "theta" if level == "inner" else "lam"
    if factory is None:
        if lr is None or not lr > 0:
            raise ValueError(
                f"{level}_lr: got {lr}, expected a positive step size (or give {level}_optimizer)"
            )
        return torch.optim.SGD([variable], lr=lr)
    optimizer = factory([variable])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{level}_optimizer: returned {type(optimizer).__name__}, expected a "
            "torch.optim.Optimizer"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{level}_optimizer: LBFGS evaluates the loss by itself (a closure), which a bilevel "
            "method cannot give it; take another torch.optim.Optimizer"
        )
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if len(held) != 1 or held[0] is not variable:
        raise ValueError(
            f"{level}_optimizer: the optimiser does not hold the {name} it was given; build it on "
            "the list that the function receives"
        )
    return optimizer


def require_positive(name: str, value: float | None) -> None:
    """Refuse anything but a positive number.

    Raises:
        ValueError: naming the argument.
    """
    if value is None or not value > 0:
        raise ValueError(f"{name}: got {value}, expected a positive number")


def require_fraction(name: str, value: float) -> None:
    """Refuse anything but a number from 0 up to, not including, 1.

    Raises:
        ValueError: naming the argument.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name}: got {value}, expected a number from 0 up to, not including, 1")


def require_plain_inner(name: str, common: dict) -> None:
    """Refuse an inner optimiser where the method is defined for plain gradient descent.

    Raises:
        ValueError: naming the argument.
    """
    if common.get("inner_optimizer") is not None:
        raise ValueError(
            f"inner_optimizer: {name} is defined for plain gradient descent; give inner_lr"
        )
