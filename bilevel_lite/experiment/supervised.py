"""Supervised models: train with fixed weights, evaluate, keep BatchNorm's statistics at theta."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite import algorithms as alg
from bilevel_lite.algorithms.method import Method
from bilevel_lite.data.batches import Batches
from bilevel_lite.experiment import methods
from bilevel_lite.experiment.task import Column, Task
from bilevel_lite.params import predict
from bilevel_lite.risk import WeightedRisk

__all__ = [
    "BATCHNORM", "PLAIN", "Supervised", "batchnorms", "best_fit", "descend", "evaluate", "plain",
    "refresh_batchnorm", "train", "train_minibatch",
]  # fmt: skip

BATCHNORM = ("batch", "refresh", "frozen")
# plain training is a run whose lam does not move: no more is spent on it than must be
PLAIN = {
    "method": "aid-identity", "outer_batch_size": 1, "curvature_batch_size": 1,
    "cross_batch_size": 1,
}  # fmt: skip


@dataclass(kw_only=True)
class Supervised(Task):
    """A task whose theta are a classifier's parameters: measured by loss and accuracy.

    Attributes:
        model: The model; theta holds its parameters.
        tuning: (x, y) for choosing hyperparameters and when to stop.
        test: (x, y), to be looked at once.
        batchnorm: ``"batch"``: inner steps use each batch's own statistics, all else those that
            `refresh` takes at theta; ``"refresh"``: the inner steps do so too; ``"frozen"``: the
            statistics stay as they were at theta0.
    """

    model: nn.Module
    tuning: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batchnorm: str = "batch"

    criterion: ClassVar[str] = "tuning_loss"
    dropped: ClassVar[tuple[str, ...]] = ("tuning_accuracy",)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("test_loss", "test loss"),
        Column("test_accuracy", "accuracy", ".1f", 17, 100, spread=True),
    )

    def refresh(self, theta: Tensor) -> None:
        """Bring BatchNorm's statistics up to date with theta, unless they are to stay frozen."""
        if self.batchnorm != "frozen":
            refresh_batchnorm(self.model, theta, self.train[0])

    @property
    def uses_batches(self) -> bool:
        """Whether inner steps use a batch's own statistics."""
        return self.batchnorm == "batch" and bool(batchnorms(self.model))

    @contextmanager
    def descending(self, theta: Tensor):
        """Around inner steps: the model in the mode that they need, then statistics at theta."""
        if not self.uses_batches:
            yield
            return
        self.model.train()
        try:
            yield
        finally:
            self.model.eval()
            self.refresh(theta)

    def attach(self, method: Method, s: Any) -> None:
        """Run the method's inner steps in `descending`.

        Raises:
            ValueError: if it has none that could run with a batch's own statistics.
        """
        if not self.uses_batches:
            return
        if self.group is not None:
            raise ValueError(
                "batchnorm: 'batch' is of a batch's own statistics, and a process has only a part "
                "of it; expected 'refresh' or 'frozen'"
            )
        if not isinstance(method, alg.AID | alg.AmIGO | alg.StocBiO | alg.BSG1 | alg.SAMA):
            raise ValueError(
                f"batchnorm: {s.method} cannot use a batch's statistics in its inner steps; "
                + (
                    "expected 'refresh' or 'frozen'"
                    if hasattr(s, "batchnorm")
                    else "take AID, AmIGO, StocBiO, BSG1 or SAMA, or a model without BatchNorm"
                )
            )
        method.descending = lambda: self.descending(method.theta)

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """Loss and accuracy on tuning and test split.

        The test columns are for the figure; nothing is chosen by them.
        """
        return {
            f"{name}_{key}": value
            for name in ("tuning", "test")
            for key, value in evaluate(self.model, theta, getattr(self, name)).items()
        }

    def judge(self, lam: Tensor, theta: Tensor) -> float:
        """The loss on the tuning split."""
        return evaluate(self.model, theta, self.tuning)["loss"]


def plain(
    task: Supervised, s: Any, names: tuple[str, ...] = ("test_loss", "test_accuracy")
) -> dict:
    """Run a task whose lam does not move by the settings' inner steps, for comparison.

    Args:
        task: Its ``project`` keeps lam where it is.
        s: Settings of a run; its method and the batches of f, H and J do not matter.
        names: The measures that are told.

    Returns:
        The chosen look's iteration, criterion and measures, and the last look's measures.

    Cost: inner_steps + about 0.1 gradients an outer iteration.
    """
    method = task.method(replace(s, **{**dict.fromkeys(methods.OWN), **PLAIN}))
    rows = []
    for step in range(1, s.outer_steps + 1):
        task.refresh(method.theta)
        method.step()
        if step % s.evaluate_every == 0 or step == s.outer_steps:
            task.refresh(method.theta)
            rows.append({"iteration": step, **task.measure(method.lam, method.theta)})
    best = min(rows, key=lambda row: row[task.criterion])
    last = {f"last_{name}": rows[-1][name] for name in names}
    return {**{key: best[key] for key in ("iteration", task.criterion, *names)}, **last}


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


def descend(
    model: nn.Module,
    split: tuple[Tensor, Tensor],
    theta: Tensor,
    steps: int,
    lr: float,
    batch_size: int,
    l2: float,
    seed: int,
    transform: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    momentum: float = 0.9,
) -> Tensor:
    """Take that many steps of SGD with momentum on the rows of ``split``, and return the last.

    For whoever trains on spoiled data and has nothing clean to choose an iterate by.

    Args:
        model: The model; BatchNorm's statistics are at the end those of ``split``.
        split: (x, y).
        theta: Start, shape (d,).
        steps: Number of steps.
        lr: Step size.
        batch_size: Rows of a step; all of them, if there are fewer.
        l2: Coefficient of ||theta||^2.
        seed: Of the batches.
        transform: Of a batch's x, see `bilevel_lite.data.Batches`.
        momentum: Of SGD.

    Cost: one gradient a step.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, len(split[1]))
    batches = Batches(*split, size, generator, transform=transform)
    risk, theta = WeightedRisk(model, l2=l2), theta.clone().requires_grad_()
    optimizer = torch.optim.SGD([theta], lr, momentum)
    model.train(bool(batchnorms(model)))
    for _ in range(steps):
        optimizer.zero_grad()
        risk(None, theta, batches.draw()).backward()
        optimizer.step()
    model.eval()
    refresh_batchnorm(model, theta.detach(), split[0])
    return theta.detach()


def train_minibatch(
    task: Supervised,
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


def best_fit(
    task: Supervised,
    split: tuple[Tensor, Tensor],
    s: Any,
    l2: tuple[float, ...],
    weights: Tensor | None = None,
    minibatch: bool = False,
) -> dict:
    """Train with fixed weights and report the fit that is best on the tuning split.

    Args:
        task: Gives model, start, tuning and test split.
        split: (x, y) to train on.
        s: The run's settings; of minibatch training.
        l2: Coefficients of ||theta||^2 to choose from.
        weights: One per example of ``split``, shape (n,); all ones by default.
        minibatch: By SGD with the run's own step size and number of steps, not by L-BFGS.

    Returns:
        ``l2`` and what `Supervised.measure` measures.
    """
    fits = []
    for strength in l2:
        if minibatch:
            generator = torch.Generator().manual_seed(s.seed)
            size, steps = (
                min(s.batch_size or len(split[1]), len(split[1])),
                s.outer_steps * s.inner_steps,
            )
            theta = train_minibatch(
                task, split, strength, s.inner_lr, steps, size, generator, weights, s.inner_momentum
            )
        else:
            theta = train(task.model, split, task.theta0, task.tuning, strength, weights=weights)
        fits.append((evaluate(task.model, theta, task.tuning), strength, theta))
    tuning, strength, theta = min(fits, key=lambda fit: fit[0]["loss"])
    found = {"tuning": tuning, "test": evaluate(task.model, theta, task.test)}
    rows = {f"{name}_{key}": value for name, row in found.items() for key, value in row.items()}
    return {"l2": strength, **rows}
