"""What learned weights say about labels: how well they tell wrong ones, and of which they are sure.

A task here has ``model``, ``train`` = (x, y), and for pictures also ``refresh``, ``y_clean``,
``image_shape`` (`bilevel_lite.tasks.hypercleaning.Hypercleaning`).
"""

import base64
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bilevel_lite.params import predict

__all__ = ["auc", "pictures", "precision", "surest"]


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
def surest(task: Any, lam: Tensor, theta: Tensor, count: int = 24, chunk: int = 5_000) -> Tensor:
    """The training examples that the learned weights are surest are mislabelled.

    Lowest weight first; among equal weights (many are 0) the highest loss under theta first.

    Args:
        task: The task.
        lam: Weights, shape (N,).
        theta: Parameters, shape (d,).
        count: How many.
        chunk: Examples of one forward pass.

    Returns:
        Positions among the training examples, shape (count,).
    """
    x, y = task.train
    parts = zip(x.split(chunk), y.split(chunk), strict=True)
    loss = torch.cat(
        [F.cross_entropy(predict(task.model, theta, a), b, reduction="none") for a, b in parts]
    )
    by_loss = loss.argsort(descending=True, stable=True)
    return by_loss[lam[by_loss].argsort(stable=True)][:count]


def pictures(task: Any, lam: Tensor, theta: Tensor, count: int = 12):
    """The images that the weights are surest are mislabelled, as JSON values.

    Returns:
        ``shape``; ``given`` and ``true``, a label each; ``pixels``, grey values from 0 to 255 of
        all images, each stretched to its whole range, compressed by zlib, in base 64.
    """
    task.refresh(theta)
    positions = surest(task, lam, theta, count)
    x = task.train[0][positions].flatten(1).cpu()
    low, high = x.min(1, keepdim=True).values, x.max(1, keepdim=True).values
    pixels = ((x - low) / (high - low).clamp(min=1e-12) * 255).round().to(torch.uint8)
    return {
        "shape": list(task.image_shape),
        "given": task.train[1][positions].tolist(),
        "true": task.y_clean[positions].tolist(),
        "pixels": base64.b64encode(zlib.compress(pixels.numpy().tobytes(), 9)).decode(),
    }
