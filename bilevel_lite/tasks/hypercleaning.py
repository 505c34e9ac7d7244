"""Data hypercleaning: learn one weight per training example from a small clean validation set.

    f(theta)      = mean cross-entropy on the validation set
    g(lam, theta) = (1/n) sum_i lam_i * cross-entropy_i(theta) + l2 ||theta||^2,   lam in [0, 1]^N

Half of the training labels are redrawn at random; nobody says which.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite import data
from bilevel_lite.params import flatten, predict
from bilevel_lite.problem import BilevelProblem, WeightedRisk

__all__ = ["Hypercleaning", "SIZES", "auc", "build", "evaluate", "project", "train"]

# train, validation (outer loss), tuning (hyperparameters, stopping); the test set is its own.
SIZES = {"mnist": (50_000, 5_000, 5_000), "digits": (1_000, 200, 237)}


@dataclass
class Hypercleaning:
    """A hypercleaning task, on one device.

    Attributes:
        problem: The two losses, on batches (x, y, index).
        model: The model; theta holds its parameters.
        lam0: Start of the weights, 0.5 each, shape (N,).
        theta0: Start of the parameters, shape (d,).
        train: (x, noisy y), N examples.
        wrong: Mask of the training labels that are wrong, shape (N,).
        y_clean: The training labels before the noise.
        validation: (x, y) of the outer loss.
        tuning: (x, y) for choosing hyperparameters and when to stop.
        test: (x, y), to be looked at once.
        num_classes: Number of classes.
        image_shape: (height, width) of an input.
        l2: Coefficient of ||theta||^2.
    """

    problem: BilevelProblem
    model: nn.Module
    lam0: Tensor
    theta0: Tensor
    train: tuple[Tensor, Tensor]
    wrong: Tensor
    y_clean: Tensor
    validation: tuple[Tensor, Tensor]
    tuning: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    image_shape: tuple[int, int]
    l2: float


def build(
    dataset: data.Dataset,
    model: nn.Module,
    noise: float = 0.5,
    l2: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    sizes: tuple[int, int, int] | None = None,
) -> Hypercleaning:
    """Split a dataset, redraw labels, and write down the two losses.

    Args:
        dataset: From `bilevel_lite.data.load`.
        model: Takes x of shape (n, features), gives logits.
        noise: Fraction of training labels redrawn uniformly over all classes.
        l2: Coefficient of ||theta||^2 in the inner loss.
        generator: CPU generator of the split and the noise; seed 0 by default.
        device: Where everything goes.
        sizes: (train, validation, tuning); by default `SIZES` of the dataset.

    Returns:
        `Hypercleaning`.

    Raises:
        ValueError: if the sizes do not fit, or noise or l2 is out of range.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parts = data.split(len(dataset.y), sizes or SIZES[dataset.name], generator)
    (x, y), validation, tuning = [
        (dataset.x[index].to(device), dataset.y[index].to(device)) for index in parts
    ]
    noisy, wrong = data.corrupt_labels(y, noise, dataset.num_classes, generator)
    model = model.to(device)
    inner = WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=l2)
    outer = WeightedRisk(model)
    theta0 = flatten(model)
    return Hypercleaning(
        problem=BilevelProblem(inner, outer),
        model=model,
        lam0=torch.full((len(noisy),), 0.5, dtype=x.dtype, device=device),
        theta0=theta0,
        train=(x, noisy),
        wrong=wrong,
        y_clean=y,
        validation=validation,
        tuning=tuning,
        test=(dataset.x_test.to(device), dataset.y_test.to(device)),
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        l2=l2,
    )


def project(lam: Tensor) -> Tensor:
    """Clip the weights to [0, 1]."""
    return lam.clamp(0, 1)


@torch.no_grad()
def evaluate(model: nn.Module, theta: Tensor, split: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Mean cross-entropy and accuracy (from 0 to 1) on a split (x, y)."""
    logits = predict(model, theta, split[0])
    return {
        "loss": float(F.cross_entropy(logits, split[1])),
        "accuracy": float((logits.argmax(1) == split[1]).to(logits.dtype).mean()),
    }


def auc(lam: Tensor, wrong: Tensor) -> float:
    """How well low weights point at wrong labels: the area under the ROC curve.

    The probability that a random wrong example weighs less than a random right one (ties count
    one half): 0.5 is chance, 1 is perfect.

    Args:
        lam: Weights, shape (N,).
        wrong: Mask, shape (N,).

    Raises:
        ValueError: if no label, or every label, is wrong.
    """
    from sklearn.metrics import roc_auc_score

    if bool(wrong.all()) or not bool(wrong.any()):
        raise ValueError("wrong: needs at least one wrong and one right example")
    return float(roc_auc_score(wrong.cpu().numpy(), -lam.detach().cpu().numpy()))


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
