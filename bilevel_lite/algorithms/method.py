"""What all methods share: variables, optimisers, batches, the outer step, costs, resuming."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.problem import BilevelProblem, NotFinite, relative_size, require_variable
from bilevel_lite.products import COST, gradient, theta_gradient
from bilevel_lite.solvers import SolveInfo

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
    return batch.draw() if hasattr(batch, "draw") else batch


class Method:
    r"""Base of the methods; a subclass says how one iteration finds its direction for lam.

    Used like a torch optimiser: ``info = method.step()`` is one outer iteration; ``method.lam``
    and ``method.theta`` are the current variables; ``state_dict`` and ``load_state_dict`` resume
    it to the last bit (optimisers, schedules, memory and the samplers' generators included).

    A subclass writes ``_direction()``, which moves theta and returns (inner loss, outer loss,
    direction for lam, solver's diagnosis or None), counts its cost with `_spend`, and names in
    ``remembers`` the attributes that the next step depends on.

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
        curvature_batch: The same for H; by default draws of ``inner_batch``.
        cross_batch: The same for J; by default the curvature's draw.
        inner_optimizer: Function from a list of tensors to a ``torch.optim.Optimizer``.
        outer_optimizer: The same for lam.
        inner_scheduler: Function from the inner optimiser to one of torch's learning-rate
            schedulers; stepped once per outer iteration.
        outer_scheduler: The same for the outer optimiser.
        projection: lam -> lam of the same shape, applied after each outer step and never
            differentiated, for example ``lambda lam: lam.clamp(0, 1)``.

    Raises:
        TypeError: if ``lam`` or ``theta`` is not a floating-point tensor, or an optimiser's
            factory returns something else.
        ValueError: if a step size is missing or not positive, or an optimiser does not hold the
            variable that it was given.
    """

    # What stands for H, how v is found, how lam and theta move: the method's row in the table.
    choices: tuple[str, str, str] = ("", "", "")
    remembers: tuple[str, ...] = ()

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
    ):
        require_variable("lam", lam)
        require_variable("theta", theta)
        self.problem, self.projection = problem, projection
        self.lam, self.theta = lam.detach().clone(), theta.detach().clone()
        self.inner_optimizer = _optimizer("inner", self.theta, inner_lr, inner_optimizer)
        self.outer_optimizer = _optimizer("outer", self.lam, outer_lr, outer_optimizer)
        self.schedulers = [
            make(optimizer)
            for make, optimizer in (
                (inner_scheduler, self.inner_optimizer),
                (outer_scheduler, self.outer_optimizer),
            )
            if make is not None
        ]
        self.batches = {
            "inner": inner_batch,
            "outer": outer_batch,
            "curvature": curvature_batch,
            "cross": cross_batch,
        }
        self.iteration, self.gradients = 0, 0.0
        self._unit = None  # an inner batch: what costs are counted in
        self._last_loss: float | Tensor | None = None

    # -- what subclasses write and use

    def _direction(self) -> tuple[Tensor, Tensor, Tensor, SolveInfo | None]:
        raise NotImplementedError

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
        return theta_gradient(self.problem.inner_loss, self.lam, self.theta, batch, "inner_loss")

    def _outer_gradient(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """f and its gradients in lam and theta on a batch, counted."""
        self._spend("gradient", batch)
        return gradient(self.problem.outer_loss, self.lam, self.theta, batch, "outer_loss")

    def _move_theta(self, direction: Tensor) -> None:
        """One step of the inner optimiser along a direction."""
        self.theta.grad = direction
        self.inner_optimizer.step()

    def _inner_steps(self, steps: int) -> Tensor:
        """Descend on g, a batch a step; the loss before the last step."""
        for _ in range(steps):
            loss, grad = self._inner_gradient(self._draw("inner"))
            self._move_theta(grad)
        return loss

    # -- what users call

    def step(self) -> StepInfo:
        """Do one outer iteration.

        Returns:
            `StepInfo`; its losses are tensors, so that reading them is what waits for a GPU.

        Raises:
            NotFinite: (a ValueError) if a loss or the direction is not finite: it says at which
                step, from what value of the outer loss, and which step sizes to lower. ``lam``
                then keeps its last value.
            ValueError: as the losses and the solver say.
        """
        try:
            inner_loss, outer_loss, direction, solve = self._direction()
            bad = int((~torch.isfinite(direction)).sum())
            if bad:
                raise NotFinite(
                    f"direction for lam: {bad} of {direction.numel()} entries are NaN or infinite"
                )
        except NotFinite as error:
            raise NotFinite(f"{self._where()}: {error}") from error
        self._move_lam(direction)
        for scheduler in self.schedulers:
            scheduler.step()
        self.iteration += 1
        self._last_loss = outer_loss
        return StepInfo(self.iteration, inner_loss, outer_loss, direction, solve, self.gradients)

    def _move_lam(self, direction: Tensor) -> None:
        self.lam.grad = direction
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
        rates = ", ".join(
            f"{level}_lr (now {optimizer.param_groups[0]['lr']:.3g})"
            for level, optimizer in (
                ("inner", self.inner_optimizer),
                ("outer", self.outer_optimizer),
            )
        )
        since = ""
        if self._last_loss is not None:
            since = f" (the outer loss was {float(self._last_loss):.3g} one step before)"
        return f"{type(self).__name__}, step {self.iteration + 1}{since}, try a smaller {rates}"

    def state_dict(self) -> dict:
        """Return everything that the next step depends on."""
        return {
            "method": type(self).__name__,
            "iteration": self.iteration,
            "gradients": self.gradients,
            "lam": self.lam.clone(),
            "theta": self.theta.clone(),
            "inner_optimizer": self.inner_optimizer.state_dict(),
            "outer_optimizer": self.outer_optimizer.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "memory": {name: _copy(getattr(self, name)) for name in self.remembers},
            "solver": self._solver_state(),
            "batches": {
                role: batch.state_dict()
                for role, batch in self.batches.items()
                if _has_state(batch)
            },
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned, as if never interrupted.

        Raises:
            ValueError: if the state is another method's, or of variables of other shapes.
        """
        name = type(self).__name__
        if state.get("method") != name:
            raise ValueError(f"state: is of method {state.get('method')!r}, expected {name!r}")
        for variable in ("lam", "theta"):
            here, there = getattr(self, variable), state[variable]
            if here.shape != there.shape:
                raise ValueError(
                    f"state: {variable} has shape {tuple(there.shape)}, expected "
                    f"{tuple(here.shape)}"
                )
        if set(state["memory"]) != set(self.remembers):
            raise ValueError(
                f"state: remembers {sorted(state['memory'])}, expected {sorted(self.remembers)}"
            )
        with torch.no_grad():
            self.lam.copy_(state["lam"])
            self.theta.copy_(state["theta"])
        self.iteration, self.gradients = state["iteration"], state["gradients"]
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        for scheduler, saved in zip(self.schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        for key, value in state["memory"].items():
            setattr(self, key, _copy(value, self.theta.device))
        self._load_solver(state["solver"])
        for role, batch in self.batches.items():
            if _has_state(batch):
                batch.load_state_dict(state["batches"][role])

    solver = None

    def _solver_state(self) -> dict | None:
        return None if self.solver is None else self.solver.state_dict()

    def _load_solver(self, state: dict | None) -> None:
        if self.solver is not None:
            self.solver.load_state_dict(state)


def _copy(value: Any, device: torch.device | None = None) -> Any:
    """Copy a remembered value: a tensor, a list or dict of such, a number or None."""
    if isinstance(value, Tensor):
        return value.clone() if device is None else value.clone().to(device)
    if isinstance(value, list):
        return [_copy(item, device) for item in value]
    if isinstance(value, dict):
        return {key: _copy(item, device) for key, item in value.items()}
    return value


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
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if len(held) != 1 or held[0] is not variable:
        raise ValueError(
            f"{level}_optimizer: the optimiser does not hold the {name} it was given; build it on "
            "the list that the function receives"
        )
    return optimizer


def require_steps(name: str, value: int, least: int = 1) -> None:
    """Refuse anything but an integer of at least ``least``.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")


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
