"""Supervised models: train with fixed weights, evaluate, keep BatchNorm's statistics at theta."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite.data.batches import Batches
from bilevel_lite.params import predict
from bilevel_lite.risk import WeightedRisk

__all__ = ["batchnorms", "evaluate", "refresh_batchnorm", "train", "train_minibatch"]


def batchnorms(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers of a model."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@torch.no_grad()
def refresh_batchnorm(model: nn.Module, theta: Tensor, x: Tensor, examples: int = 256) -> None:
    """Set the running statistics of every BatchNorm layer to those of some examples at theta.

    The statistics are then constants: an example's loss depends on that example and theta alone, as
    the hypergradient and every curvature here suppose.

    Args:
        model: The model; without BatchNorm nothing happens. Left in evaluation mode.
        theta: Parameters, shape (d,).
        x: Inputs, of which the first ``examples`` are used.
        examples: How many.

    Cost: a forward pass on them.
    """
    norms = batchnorms(model)
    if not norms:
        return
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()  # 0 times the old ones is not 0 where they are NaN
        norm.momentum = 1.0  # the new statistics replace the old ones
    model.train()
    predict(model, theta, x[:examples])
    model.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def evaluate(
    model: nn.Module, theta: Tensor, split: tuple[Tensor, Tensor], chunk: int = 5_000
) -> dict[str, float]:
    """Mean cross-entropy and accuracy (from 0 to 1) on a split (x, y), ``chunk`` at a time."""
    logits = torch.cat([predict(model, theta, part) for part in split[0].split(chunk)])
    return {
        "loss": float(F.cross_entropy(logits, split[1])),
        "accuracy": float((logits.argmax(1) == split[1]).to(logits.dtype).mean()),
    }


def train(
    model: nn.Module,
    split: tuple[Tensor, Tensor],
    theta: Tensor,
    tuning: tuple[Tensor, Tensor],
    l2: float = 0.0,
    iters: int = 100,
    weights: Tensor | None = None,
    patience: int = 3,
) -> Tensor:
    """Train with fixed weights by L-BFGS and return the iterate that is best on ``tuning``.

    For the baselines (the same model on noisy, on validation, on clean data) and for training
    anew with learned weights.

    Args:
        model: The model.
        split: (x, y) to train on.
        theta: Start, shape (d,).
        tuning: (x, y) that chooses the iterate.
        l2: Coefficient of ||theta||^2.
        iters: L-BFGS iterations at most; ``tuning`` is looked at every ten.
        weights: One per example of ``split``, shape (n,); all ones by default.
        patience: Stop after this many looks without a lower loss on ``tuning``.

    Returns:
        theta, shape (d,).

    Cost: about 1.25 gradients on ``split`` an iteration.
    """
    # the weights take the place of lam, so that the loss is the same weighted risk
    lam = torch.ones_like(split[1], dtype=theta.dtype) if weights is None else weights
    risk = WeightedRisk(model, weight=lambda lam, batch: lam, l2=l2)
    theta = theta.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = risk(lam, theta, split)
        value.backward()
        return value

    best, best_loss, looks = theta.detach().clone(), float("inf"), 0
    for _ in range(iters // 10):
        optimizer.step(closure)
        loss, looks = evaluate(model, theta, tuning)["loss"], looks + 1
        if loss < best_loss:
            best, best_loss, looks = theta.detach().clone(), loss, 0
        if looks == patience:
            break
    return best


def train_minibatch(
    task: Any,
    split: tuple[Tensor, Tensor],
    l2: float,
    lr: float,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    weights: Tensor | None = None,
    momentum: float = 0.9,
    looks: int = 50,
) -> Tensor:
    """As `train`, by minibatch SGD: for models and sets that are too large for it.

    Args:
        task: Gives model, start and tuning split.
        split: (x, y) to train on.
        l2: Coefficient of ||theta||^2.
        lr: Step size.
        steps: Number of steps.
        batch_size: Examples of a step.
        generator: CPU generator of the batches.
        weights: One per example of ``split``, shape (n,); all ones by default.
        momentum: Of SGD.
        looks: How often the tuning split is looked at.

    Returns:
        theta, shape (d,).

    Cost: one gradient a step.
    """
    lam = torch.ones_like(split[1], dtype=task.theta0.dtype) if weights is None else weights
    risk = WeightedRisk(task.model, weight=lambda lam, batch: lam[batch[2]], l2=l2)
    theta = task.theta0.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr, momentum)
    batches = Batches(*split, batch_size, generator)
    best, best_loss, every = task.theta0.clone(), float("inf"), max(1, steps // looks)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        task.model.train(task.uses_batches)
        risk(lam, theta, batches.draw()).backward()
        optimizer.step()
        if step % every == 0:
            task.refresh(theta)
            loss = evaluate(task.model, theta, task.tuning)["loss"]
            if loss < best_loss:
                best, best_loss = theta.detach().clone(), loss
    task.model.eval()
    task.refresh(best)
    return best
