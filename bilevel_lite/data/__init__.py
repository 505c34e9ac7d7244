"""Datasets, splits, label noise, and batches that live on the device.

`load` looks first in the folder named by BILEVEL_LITE_DATA, then in the download cache, then on
the network. What is found there is compared with a known SHA-256 before it is returned: the files'
own bytes, or of WRENCH's and the pretraining texts what they say. The digits are as scikit-learn
has them. Nothing is unpickled.

Example:
    >>> bl.data.load("digits").image_shape
    (8, 8)
"""

from typing import Literal, overload

import torch

from bilevel_lite.data import cifar10, mnist, pretraining, wrench
from bilevel_lite.data.augment import crop_and_flip, jpeg
from bilevel_lite.data.batches import Batches
from bilevel_lite.data.files import DataError, Dataset
from bilevel_lite.data.mnist import read_idx
from bilevel_lite.data.noise import corrupt_labels, pair_flips, split, standardise
from bilevel_lite.data.wrench import WeakTexts, majority

__all__ = [
    "Batches",
    "DataError",
    "Dataset",
    "WeakTexts",
    "available",
    "corrupt_labels",
    "crop_and_flip",
    "jpeg",
    "load",
    "majority",
    "pair_flips",
    "pretraining",
    "read_idx",
    "split",
    "standardise",
    "wrench",
]


@overload
def load(  # type: ignore[overload-overlap]
    name: Literal["semeval", "trec", "youtube"], *, download: bool = True
) -> WeakTexts: ...
@overload
def load(name: str, dtype: torch.dtype | None = None, download: bool = True) -> Dataset: ...
def load(name, dtype=None, download=True):
    """Load a dataset by name.

    Args:
        name: ``"mnist"`` (60,000 + 10,000 images of 28 x 28), ``"cifar10"`` (50,000 + 10,000
            coloured images of 32 x 32), ``"cifar100"`` (the same number, 100 classes) or
            ``"digits"`` (1,437 + 360 images of 8 x 8 that ship with scikit-learn; no download); or
            texts with weak labels (`bilevel_lite.data.wrench`): ``"trec"``, ``"semeval"``,
            ``"youtube"``.
        dtype: Of the inputs; torch's default dtype if None.
        download: Whether the network may be used when no local copy is found.

    Returns:
        `Dataset`, on the CPU; of texts `WeakTexts`, which has no dtype.

    Raises:
        TypeError: if ``name`` is no string, or ``dtype`` no floating torch dtype.
        ValueError: for an unknown name.
        DataError: if a file cannot be had, or is corrupted or truncated.

    Example:
        >>> digits = bl.data.load("digits")
        >>> digits.x.shape, digits.y.shape, digits.num_classes
        (torch.Size([1437, 64]), torch.Size([1437]), 10)
    """
    _require_known("dataset", name)
    if not (dtype is None or isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating one such as torch.float32")
    if name in wrench.NAMES:
        return wrench.load(name, download)
    return _LOADERS[name](dtype or torch.get_default_dtype(), download)


def available(name: str, fallback: str = "digits") -> str:
    """Return ``name`` if it can be loaded, else ``fallback``, saying so in one line.

    For notebooks: nothing fails and nothing hangs on a machine without network or local data.

    Raises:
        TypeError, ValueError: if one of the two is no dataset's name.

    Example:
        >>> bl.data.available("digits")
        'digits'
    """
    _require_known("fallback", fallback)
    try:
        load(name)
    except DataError as error:
        print(f"{name} is not at hand here ({error.args[0].split(':')[0]}); using {fallback}.")
        return fallback
    return name


def _load_digits(dtype, download):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = torch.as_tensor(pixels / 16.0, dtype=dtype)[order]
    y = torch.as_tensor(labels, dtype=torch.int64)[order]
    return Dataset("digits", x[:1437], y[:1437], x[1437:], y[1437:], 10, (8, 8))


_LOADERS = {
    "mnist": mnist.load, "cifar10": cifar10.load, "cifar100": cifar10.load_100,
    "digits": _load_digits,
}  # fmt: skip


def _require_known(argument: str, name: str) -> None:
    known = sorted([*_LOADERS, *wrench.NAMES])
    if not isinstance(name, str):
        raise TypeError(f"{argument}: got {name!r}, expected a name, one of {known}")
    if name not in known:
        raise ValueError(f"{argument}: got {name!r}, expected one of {known}")
