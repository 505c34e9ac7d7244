"""Data hypercleaning: learn one weight per training example from a small clean validation set.

    f(theta)      = mean cross-entropy on the validation set
    g(lam, theta) = (1/n) sum_i lam_i * cross-entropy_i(theta) + l2 ||theta||^2,   lam in [0, 1]^N

A share of the training labels is redrawn at random; nobody says which.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bilevel_lite import data
from bilevel_lite.experiment.supervised import (
    batchnorms,
    evaluate,
    refresh_batchnorm,
    train,
    train_minibatch,
)
from bilevel_lite.params import flatten, predict
from bilevel_lite.problem import BilevelProblem
from bilevel_lite.risk import WeightedRisk

__all__ = [
    "Hypercleaning", "SIZES", "auc", "build", "evaluate", "precision", "project",
    "refresh_batchnorm", "surest", "train", "train_minibatch",
]  # fmt: skip

# train, validation (outer loss), tuning (hyperparameters, stopping); the test set is its own.
# The main paper does not say how it splits CIFAR-10, and its 50,000 + 5,000 + 5,000 do not fit.
SIZES = {
    "mnist": (50_000, 5_000, 5_000),
    "cifar10": (40_000, 5_000, 5_000),
    "digits": (1_000, 200, 237),
}


BATCHNORM = ("batch", "refresh", "frozen")


@dataclass
class Hypercleaning:
    """A hypercleaning task, on one device.

    Attributes:
        problem: The two losses, on batches (x, y, index).
        model: The model; theta holds its parameters.
        lam0: Start of the weights, 0.5 each, shape (N,).
        theta0: Start of the parameters, shape (d,).
        train: (x, noisy y), N examples.
        index: Their positions in the dataset, shape (N,).
        wrong: Mask of the training labels that are wrong, shape (N,).
        y_clean: The training labels before the noise.
        validation: (x, y) of the outer loss.
        tuning: (x, y) for choosing hyperparameters and when to stop.
        test: (x, y), to be looked at once.
        num_classes: Number of classes.
        image_shape: (height, width) of a grey input, (3, height, width) of a coloured one.
        l2: Coefficient of ||theta||^2.
        source: What is to be said beside numbers made from this dataset; empty for the original.
        batchnorm: ``"batch"``: inner steps use each batch's own statistics, all else those that
            `refresh` takes at theta; ``"refresh"``: the inner steps do so too; ``"frozen"``: the
            statistics stay as they were at theta0.
    """

    problem: BilevelProblem
    model: nn.Module
    lam0: Tensor
    theta0: Tensor
    train: tuple[Tensor, Tensor]
    index: Tensor
    wrong: Tensor
    y_clean: Tensor
    validation: tuple[Tensor, Tensor]
    tuning: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    num_classes: int
    image_shape: tuple[int, ...]
    l2: float
    source: str = ""
    batchnorm: str = "batch"

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


def build(
    dataset: data.Dataset,
    model: nn.Module,
    noise: float = 0.5,
    l2: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    sizes: tuple[int, int, int] | None = None,
    transition: Tensor | None = None,
    batchnorm: str = "batch",
) -> Hypercleaning:
    """Split a dataset, redraw labels, and write down the two losses.

    Args:
        dataset: From `bilevel_lite.data.load`.
        model: Takes the dataset's x, gives logits. BatchNorm is put in evaluation mode, with the
            statistics of the first training examples (`refresh_batchnorm`).
        noise: Fraction of training labels redrawn.
        l2: Coefficient of ||theta||^2 in the inner loss.
        generator: CPU generator of the split and the noise; seed 0 by default.
        device: Where everything goes.
        sizes: (train, validation, tuning); by default `SIZES` of the dataset.
        transition: What a redrawn label becomes (`bilevel_lite.data.corrupt_labels`); by default
            any class, with the same probability.
        batchnorm: ``"batch"``, ``"refresh"`` or ``"frozen"``, see `Hypercleaning`.

    Returns:
        `Hypercleaning`.

    Raises:
        ValueError: if the sizes do not fit, noise or l2 is out of range, or ``batchnorm`` is
            unknown.
    """
    if batchnorm not in BATCHNORM:
        raise ValueError(f"batchnorm: got {batchnorm!r}, expected one of {BATCHNORM}")
    if sizes is None and dataset.name not in SIZES:
        raise ValueError(f"sizes: needed for {dataset.name!r}; known for {sorted(SIZES)}")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    parts = data.split(len(dataset.y), sizes or SIZES[dataset.name], generator)
    (x, y), validation, tuning = [
        (dataset.x[index].to(device), dataset.y[index].to(device)) for index in parts
    ]
    noisy, wrong = data.corrupt_labels(y, noise, dataset.num_classes, generator, transition)
    model = model.to(device).eval()
    inner = WeightedRisk(model, weight=lambda lam, batch: lam[batch[2]], l2=l2)
    outer = WeightedRisk(model)
    theta0 = flatten(model)
    refresh_batchnorm(model, theta0, x)
    return Hypercleaning(
        problem=BilevelProblem(inner, outer),
        model=model,
        lam0=torch.full((len(noisy),), 0.5, dtype=x.dtype, device=device),
        theta0=theta0,
        train=(x, noisy),
        index=parts[0],
        wrong=wrong,
        y_clean=y,
        validation=validation,
        tuning=tuning,
        test=(dataset.x_test.to(device), dataset.y_test.to(device)),
        num_classes=dataset.num_classes,
        image_shape=dataset.image_shape,
        l2=l2,
        source=dataset.source,
        batchnorm=batchnorm,
    )


def project(lam: Tensor) -> Tensor:
    """Clip the weights to [0, 1]."""
    return lam.clamp(0, 1)


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


def precision(lam: Tensor, wrong: Tensor) -> float:
    """Share of wrong labels among the lowest weights, as many as there are wrong labels.

    "Precision at the noise rate": of the examples that one would throw away knowing how many are
    wrong, but not which. Many weights are exactly 0 or 1; ties are broken at random, and the
    expectation over that is returned.

    Args:
        lam: Weights, shape (N,).
        wrong: Mask, shape (N,).

    Raises:
        ValueError: if no label is wrong.
    """
    count = int(wrong.sum())
    if count == 0:
        raise ValueError("wrong: needs at least one wrong example")
    lam, wrong = lam.detach().cpu(), wrong.cpu()
    edge = lam.sort().values[count - 1]  # the weight at which the count is reached
    below, tied = lam < edge, lam == edge
    share = (count - int(below.sum())) / int(tied.sum())
    return (int((wrong & below).sum()) + share * int((wrong & tied).sum())) / count


@torch.no_grad()
def surest(task: Hypercleaning, lam: Tensor, theta: Tensor, count: int = 24) -> Tensor:
    """The training examples that the learned weights are surest are mislabelled.

    Lowest weight first; among equal weights (many are 0) the highest loss under theta first.

    Args:
        task: The task.
        lam: Weights, shape (N,).
        theta: Parameters, shape (d,).
        count: How many.

    Returns:
        Positions among the training examples, shape (count,).
    """
    x, y = task.train
    parts = zip(x.split(5_000), y.split(5_000), strict=True)
    loss = torch.cat(
        [F.cross_entropy(predict(task.model, theta, a), b, reduction="none") for a, b in parts]
    )
    by_loss = loss.argsort(descending=True, stable=True)
    return by_loss[lam[by_loss].argsort(stable=True)][:count]
