"""Random splits, redrawn labels, standardised inputs."""

from operator import index

import torch
from torch import Tensor

from bilevel_lite.data.files import Dataset
from bilevel_lite.refuse import (
    at_least,
    check_labels,
    require_fraction,
    require_generator,
    require_variable,
)

__all__ = ["corrupt_labels", "pair_flips", "split", "standardise"]


def split(n: int, sizes: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """Draw disjoint random index sets from range(n).

    Args:
        n: Number of examples.
        sizes: Size of each set; their sum is at most ``n``.
        generator: CPU generator.

    Returns:
        One int64 tensor per size, shape (size,).

    Raises:
        TypeError: if the generator is none, or ``sizes`` are no whole numbers.
        ValueError: if there is no size, or the sizes are negative or do not fit.

    Example:
        >>> train, tuning = bl.data.split(10, (7, 2), torch.Generator().manual_seed(0))
        >>> len(train), len(tuning), set(train.tolist()) & set(tuning.tolist())
        (7, 2, set())
    """
    require_generator(generator)
    at_least("n", n, 0)
    try:
        counts = [index(size) for size in sizes]
    except TypeError:
        raise TypeError(f"sizes: got {sizes!r}, expected whole numbers, as (60, 40)") from None
    if not counts:
        raise ValueError("sizes: is empty, expected at least one size, as (60, 40)")
    if min(counts) < 0 or sum(counts) > n:
        raise ValueError(f"sizes: {sizes} need {sum(counts)} examples, but there are {n}")
    order = torch.randperm(n, generator=generator, device=generator.device)
    return list(order[: sum(counts)].split(counts))


def corrupt_labels(
    y: Tensor,
    rate: float,
    num_classes: int,
    generator: torch.Generator,
    transition: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Redraw a fraction of the labels, uniformly over all classes or by a matrix.

    A label redrawn uniformly is right by luck with probability 1 / num_classes: of ten classes with
    rate 0.5, about 45 % of all labels end up wrong.

    Args:
        y: Labels, shape (n,).
        rate: Fraction redrawn, from 0 to 1.
        num_classes: C; labels are 0 .. C-1.
        generator: CPU generator.
        transition: Class-dependent noise, shape (C, C): row c holds the probabilities of what a
            redrawn label c becomes (`pair_flips` is one). Uniform by default.

    Returns:
        The noisy labels, shape (n,), and a mask of those that are now *wrong*, shape (n,), bool.

    Raises:
        TypeError: if ``y`` is no tensor of integers, ``transition`` no floating-point tensor, or
            the generator none.
        ValueError: if the rate or a label is out of range, or ``transition`` has another shape,
            negative entries, or rows that do not add up to 1.

    Example:
        >>> y, generator = torch.zeros(1000, dtype=torch.int64), torch.Generator().manual_seed(0)
        >>> noisy, wrong = bl.data.corrupt_labels(y, rate=0.5, num_classes=10, generator=generator)
        >>> round(wrong.double().mean().item(), 1), torch.equal(wrong, noisy != y)
        (0.5, True)
    """
    require_generator(generator)
    require_fraction("rate", rate)
    at_least("num_classes", num_classes, 1)
    check_labels(y, num_classes)
    if transition is not None:
        _check_transition(transition, num_classes)
    how = {"generator": generator, "device": generator.device}
    chosen = torch.randperm(len(y), **how)[: round(rate * len(y))].to(y.device)
    noisy = y.clone()
    if transition is None:
        drawn = torch.randint(num_classes, (len(chosen),), **how)
    else:
        rows = transition.detach().cpu()[y[chosen].cpu()]
        # the class where the cumulated probabilities pass a uniform number
        uniform = torch.rand(len(chosen), 1, **how, dtype=rows.dtype)
        drawn = (rows.cumsum(1) <= uniform).sum(1).clamp(max=num_classes - 1)
    noisy[chosen] = drawn.to(y)
    return noisy, noisy != y


def pair_flips(num_classes: int) -> Tensor:
    """Return the transition matrix that turns every label c into the next one, (c + 1) mod C.

    Raises:
        ValueError: if ``num_classes`` is no integer of at least 1.

    Example:
        >>> bl.data.pair_flips(3)
        tensor([[0., 1., 0.],
                [0., 0., 1.],
                [1., 0., 0.]])
    """
    at_least("num_classes", num_classes, 1)
    return torch.eye(num_classes).roll(1, 1)


def _check_transition(transition: Tensor, num_classes: int) -> None:
    require_variable("transition", transition)
    if tuple(transition.shape) != (num_classes, num_classes):
        raise ValueError(
            f"transition: got shape {tuple(transition.shape)}, expected "
            f"({num_classes}, {num_classes})"
        )
    off = float((transition.sum(1) - 1).abs().max())
    if not (off < 1e-5 and float(transition.min()) >= 0):
        raise ValueError(
            f"transition: rows must be probabilities; the smallest entry is "
            f"{float(transition.min()):.3g}, a row's sum differs from 1 by {off:.3g}"
        )


def standardise(dataset: Dataset) -> Dataset:
    """Shift and scale a dataset to mean 0 and variance 1, each colour by its training pixels.

    Args:
        dataset: With ``image_shape`` of a coloured image (a grey one has a single colour).

    Returns:
        The same dataset with other ``x`` and ``x_test``.

    Example:
        >>> digits = bl.data.standardise(bl.data.load("digits"))
        >>> abs(digits.x.mean().item()) < 1e-6, round(digits.x.std().item(), 2)
        (True, 1.0)
    """
    channels = dataset.image_shape[0] if len(dataset.image_shape) == 3 else 1
    x = dataset.x.view(len(dataset.x), channels, -1)
    mean, std = x.mean((0, 2))[:, None], x.std((0, 2))[:, None]

    def scaled(values):
        return ((values.view(len(values), channels, -1) - mean) / std).view_as(values)

    return dataset._replace(x=scaled(dataset.x), x_test=scaled(dataset.x_test))
