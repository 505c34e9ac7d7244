"""AID: approximate implicit differentiation, the double loop that most methods are a variant of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel_lite.hypergrad import hypergradient
from bilevel_lite.problem import BilevelProblem, require_variable
from bilevel_lite.products import COST, theta_gradient
from bilevel_lite.solvers import SolveInfo, Solver

__all__ = ["AID", "StepInfo"]


@dataclass
class StepInfo:
    """What one outer iteration did.

    Attributes:
        iteration: Number of outer iterations done, this one included.
        inner_loss: g on the last inner batch, before the last inner step; a scalar tensor.
        outer_loss: f at the new theta and the old lam; a scalar tensor.
        hypergradient: The hypergradient, like ``lam``.
        solve: The linear solver's diagnosis.
        gradients: Cost so far, in gradients of the inner loss on one inner batch.
    """

    iteration: int
    inner_loss: Tensor
    outer_loss: Tensor
    hypergradient: Tensor
    solve: SolveInfo
    gradients: float


def _draw(batch: Any) -> Any:
    """A batch as it is, or the next one of a sampler (anything with a ``draw`` method)."""
    return batch.draw() if hasattr(batch, "draw") else batch


class AID:
    r"""Approximate implicit differentiation with a warm-started inner problem.

        repeat:  theta <- inner_steps optimiser steps on g(lam, .), from the last theta
                 v     <- solver(H, b),  b = grad_theta f
                 lam   <- Proj( optimiser step with  grad_lam f - J v )

    Used like a torch optimiser: ``info = method.step()`` is one outer iteration; ``method.lam``
    and ``method.theta`` are the current variables; ``state_dict`` and ``load_state_dict`` resume
    it to the last bit (optimisers, solver memory and the samplers' generators included).

    Args:
        problem: The two losses.
        lam: Start of the outer variable, any shape; copied.
        theta: Start of the inner variable, shape (d,); copied.
        solver: How v is found.
        inner_steps: Inner steps per outer iteration, at least 1.
        inner_lr: Step size of plain gradient descent on theta, unless ``inner_optimizer`` is
            given.
        outer_lr: The same for lam.
        inner_batch: A batch for every inner step, or a sampler: anything with a ``draw()``
            method, such as `bilevel_lite.data.Batches`.
        outer_batch: The same for f.
        curvature_batch: The same for H; by default a fresh draw of ``inner_batch``.
        cross_batch: The same for J; by default the curvature's draw of ``inner_batch``.
        inner_optimizer: Function from a list of tensors to a ``torch.optim.Optimizer``.
        outer_optimizer: The same for lam.
        projection: lam -> lam, applied after each outer step, for example
            ``lambda lam: lam.clamp(0, 1)``.
        cross_mode: See `bilevel_lite.hypergradient`.

    Raises:
        TypeError: if ``lam`` or ``theta`` is not a floating-point tensor.
        ValueError: if ``inner_steps`` is below 1 or a step size is missing or not positive.

    Cost of a step: inner_steps gradients and one hypergradient.
    Source: Domke (2012); Pedregosa (2016); Grazzi et al. (2020).
    """

    def __init__(
        self,
        problem: BilevelProblem,
        lam: Tensor,
        theta: Tensor,
        solver: Solver,
        inner_steps: int = 10,
        inner_lr: float | None = None,
        outer_lr: float | None = None,
        inner_batch: Any = None,
        outer_batch: Any = None,
        curvature_batch: Any = None,
        cross_batch: Any = None,
        inner_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        outer_optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
        projection: Callable[[Tensor], Tensor] | None = None,
        cross_mode: str = "shared",
    ):
        require_variable("lam", lam)
        require_variable("theta", theta)
        if not isinstance(inner_steps, int) or inner_steps < 1:
            raise ValueError(f"inner_steps: got {inner_steps!r}, expected an integer of at least 1")
        self.problem, self.solver, self.inner_steps = problem, solver, inner_steps
        self.lam, self.theta = lam.detach().clone(), theta.detach().clone()
        self.inner_optimizer = _optimizer("inner", self.theta, inner_lr, inner_optimizer)
        self.outer_optimizer = _optimizer("outer", self.lam, outer_lr, outer_optimizer)
        self.batches = {
            "inner": inner_batch,
            "outer": outer_batch,
            "curvature": curvature_batch,
            "cross": cross_batch,
        }
        self.projection, self.cross_mode = projection, cross_mode
        self.iteration, self.gradients = 0, 0.0

    def step(self) -> StepInfo:
        """Do one outer iteration.

        Returns:
            `StepInfo`; its losses are tensors, so that reading them is what waits for a GPU.

        Raises:
            ValueError: if a loss or the hypergradient is not finite; ``lam`` then keeps its
                last value.
        """
        for _ in range(self.inner_steps):
            batch = _draw(self.batches["inner"])
            inner_loss, self.theta.grad = theta_gradient(
                self.problem.inner_loss, self.lam, self.theta, batch, "inner_loss"
            )
            self.inner_optimizer.step()

        shared = None
        if self.batches["curvature"] is None or self.batches["cross"] is None:
            shared = _draw(self.batches["inner"])
        drawn = {
            role: shared if self.batches[role] is None else _draw(self.batches[role])
            for role in ("curvature", "cross")
        }
        self.lam.grad, info = hypergradient(
            self.problem,
            self.lam,
            self.theta,
            inner_batch=batch,
            outer_batch=_draw(self.batches["outer"]),
            solver=self.solver,
            cross_batch=drawn["cross"],
            curvature_batch=drawn["curvature"],
            return_info=True,
            diagnose=False,
            cross_mode=self.cross_mode,
        )
        self.outer_optimizer.step()
        if self.projection is not None:
            with torch.no_grad():
                self.lam.copy_(self.projection(self.lam))
        self.iteration += 1
        self.gradients += COST["gradient"] * self.inner_steps + info.gradients
        return StepInfo(
            self.iteration, inner_loss, info.outer_loss, self.lam.grad, info.solve, self.gradients
        )

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
            "solver": self.solver.state_dict(),
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
            with torch.no_grad():
                here.copy_(there)
        self.iteration, self.gradients = state["iteration"], state["gradients"]
        self.inner_optimizer.load_state_dict(state["inner_optimizer"])
        self.outer_optimizer.load_state_dict(state["outer_optimizer"])
        self.solver.load_state_dict(state["solver"])
        for role, batch in self.batches.items():
            if _has_state(batch):
                batch.load_state_dict(state["batches"][role])


def _has_state(batch: Any) -> bool:
    return hasattr(batch, "draw") and hasattr(batch, "state_dict")


def _optimizer(level, variable, lr, factory):
    if factory is None:
        if lr is None or not lr > 0:
            raise ValueError(
                f"{level}_lr: got {lr}, expected a positive step size (or give {level}_optimizer)"
            )
        return torch.optim.SGD([variable], lr=lr)
    return factory([variable])
