"""Steps of SGD that choose a rate or a matrix while training, by the loss after one step alone.

With theta_{t+1} = theta_t - lr P u_{t+1} and b the gradient at theta_{t+1}, on the next batch:

    d g(theta_{t+1}) / d lr = -b . P u_{t+1},      d g(theta_{t+1}) / d P = -lr b u_{t+1}^T

One gradient a step, as without it: b is what the next step needs anyway.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel_lite.options import option
from bilevel_lite.updates import SGD

__all__ = ["HypergradientDescent", "Preconditioned"]


def _meta():
    return option("a positive number", lambda v: v > 0, 0.01, help="step on what is learned")


@dataclass(frozen=True)
class HypergradientDescent(SGD):
    r"""`SGD` whose rate descends, too.

        lr <- max(0, lr + meta b . u),      b = q_t, the gradient after the step along u = u_t

    Args:
        lr: The rate at the start, a number.
        momentum: As of `SGD`.
        weight_decay: As of `SGD`.
        meta: The rate's own step.

    Raises:
        ValueError: if a number is out of its range.

    Cost: that of `SGD`. Source: Baydin et al. (2018), arXiv 1703.04782; the bound is ours.

    Example:
        >>> from bilevel_lite.tasks.greedy import HypergradientDescent
        >>> update, theta = HypergradientDescent(lr=0.1, meta=0.5), torch.tensor([1.0])
        >>> state = update.start(theta)
        >>> for t in range(2):  # g = theta^2 / 2, so that q is theta
        ...     theta, state = update.step(theta, state, theta, None, t)
        >>> theta  # 0.9, where lr is 0.1 + 0.5 (0.9)(1): 0.9 - 0.55 (0.9)
        tensor([0.4050])
    """

    meta: float = _meta()

    def start(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return u_0 = 0 and the first rate."""
        return torch.zeros_like(theta), torch.tensor(self.lr).to(theta)

    def step(self, theta, state, q, lam, t):
        """Return the step above."""
        u, lr = state
        lr = (lr + self.meta * (q @ u)).clamp(min=0)
        u = self.momentum * u + q + self.weight_decay * theta
        return theta - lr * u, (u, lr)


@dataclass(frozen=True)
class Preconditioned(SGD):
    r"""`SGD` with a matrix P = M M^T for each parameter, which acts on its first dimension.

        M <- M + meta lr (b u^T + u b^T) M,      M_0 = I
        theta <- theta - lr M M^T u

    Written as M M^T, P cannot lose its sign. For a layer's weights P mixes its outputs; a matrix
    for all of theta would have d^2 numbers.

    Args:
        lr: A number.
        momentum: As of `SGD`.
        weight_decay: As of `SGD`.
        meta: M's own step.
        shapes: Of the parameters, in the order of theta.

    Raises:
        ValueError: if a number is out of its range, or the shapes are not those of theta.

    Cost: that of `SGD`, and products with M that are not counted. Source: Moskovitz et al. (2019),
    arXiv 1910.08461; one matrix for each parameter is our reading.

    Example:
        >>> from bilevel_lite.tasks.greedy import Preconditioned
        >>> update, theta = Preconditioned(lr=0.1, shapes=((1,),)), torch.tensor([1.0])
        >>> state = update.start(theta)
        >>> for t in range(2):
        ...     theta, state = update.step(theta, state, theta, None, t)
        >>> state[1]  # 1 + 0.01 (0.1) 2 (0.9)(1)
        tensor([[1.0018]])
    """

    meta: float = _meta()
    shapes: tuple[tuple[int, ...], ...] = option("shapes", lambda v: True, ())

    def start(self, theta: Tensor) -> tuple[Tensor, ...]:
        """Return u_0 = 0 and an identity for each parameter."""
        if sum(torch.Size(shape).numel() for shape in self.shapes) != len(theta):
            raise ValueError(
                f"shapes: got {self.shapes}, expected those of all {len(theta)} parameters"
            )
        return torch.zeros_like(theta), *(torch.eye(s[0]).to(theta) for s in self.shapes)

    def _layers(self, v: Tensor) -> list[Tensor]:
        """A vector like theta as one matrix for each parameter, a row for each output."""
        parts = v.split([torch.Size(shape).numel() for shape in self.shapes])
        return [part.view(shape[0], -1) for part, shape in zip(parts, self.shapes, strict=True)]

    def step(self, theta, state, q, lam, t):
        """Return the step above."""
        u, *matrices = state
        turns = [b @ w.T for b, w in zip(self._layers(q), self._layers(u), strict=True)]
        u = self.momentum * u + q + self.weight_decay * theta
        matrices = [
            M + self.meta * self.lr * (turn + turn.T) @ M
            for M, turn in zip(matrices, turns, strict=True)
        ]
        moved = [(M @ (M.T @ w)).flatten() for M, w in zip(matrices, self._layers(u), strict=True)]
        return theta - self.lr * torch.cat(moved), (u, *matrices)
