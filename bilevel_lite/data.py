"""Datasets, splits, label noise, and batches that live on the device.

`load` looks first in the folder named by BILEVEL_LITE_DATA, then in the download cache, then on
the network. Every file is checked against a SHA-256 before it is read; nothing is unpickled.
"""

import gzip
import hashlib
import os
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bilevel_lite.problem import check_labels

__all__ = [
    "Batches",
    "DataError",
    "Dataset",
    "available",
    "corrupt_labels",
    "load",
    "pair_flips",
    "split",
    "standardise",
]


class DataError(RuntimeError):
    """A dataset cannot be had: no network and no local copy, or a damaged file."""


class Dataset(NamedTuple):
    """A classification dataset in memory.

    Attributes:
        name: Its name.
        x: Training inputs, shape (n, features), floating, pixels scaled to [0, 1].
        y: Training labels, shape (n,), int64.
        x_test: Test inputs.
        y_test: Test labels.
        num_classes: Labels are 0 .. num_classes-1.
        image_shape: (height, width) of a grey input, (3, height, width) of a coloured one.
        source: What is to be said beside every number made from it; empty for the original.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    num_classes: int
    image_shape: tuple[int, ...]
    source: str = ""


class _File(NamedTuple):
    name: str
    sha256_gz: str  # of the archive as the hosts below serve it
    sha256: str  # of its content, the same whoever compressed it


_MNIST_HOSTS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_MNIST = {
    "x": _File(
        "train-images-idx3-ubyte",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "y": _File(
        "train-labels-idx1-ubyte",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "x_test": _File(
        "t10k-images-idx3-ubyte",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "y_test": _File(
        "t10k-labels-idx1-ubyte",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def load(name: str, dtype: torch.dtype | None = None, download: bool = True) -> Dataset:
    """Load a dataset by name.

    Args:
        name: ``"mnist"`` (60,000 + 10,000 images of 28 x 28), ``"cifar10"`` (50,000 + 10,000
            coloured images of 32 x 32) or ``"digits"`` (1,437 + 360 images of 8 x 8 that ship with
            scikit-learn; no download).
        dtype: Of the inputs; torch's default dtype if None.
        download: Whether the network may be used when no local copy is found.

    Returns:
        `Dataset`, on the CPU.

    Raises:
        ValueError: for an unknown name.
        DataError: if a file cannot be had, or is corrupted or truncated.
    """
    loaders = {"mnist": _load_mnist, "cifar10": _load_cifar10, "digits": _load_digits}
    if name not in loaders:
        raise ValueError(f"dataset: got {name!r}, expected one of {sorted(loaders)}")
    return loaders[name](dtype or torch.get_default_dtype(), download)


def available(name: str, fallback: str = "digits") -> str:
    """Return ``name`` if it can be loaded, else ``fallback``, saying so in one line.

    For notebooks: nothing fails and nothing hangs on a machine without network or local data.
    """
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


def _load_mnist(dtype, download):
    parts = {key: read_idx(_fetch("mnist", file, download)) for key, file in _MNIST.items()}
    images = {
        key: torch.from_numpy(parts[key]).flatten(1).to(dtype).div_(255) for key in ("x", "x_test")
    }
    labels = {key: torch.from_numpy(parts[key]).long() for key in ("y", "y_test")}
    return Dataset("mnist", **images, **labels, num_classes=10, image_shape=(28, 28))


def _load_cifar10(dtype, download):
    from bilevel_lite import cifar10

    local = os.environ.get("BILEVEL_LITE_DATA")
    pack = Path(local) / "cifar10" if local else None
    if pack and cifar10.is_pack(pack):
        arrays, source = cifar10.read_pack(pack), cifar10.PACK_SOURCE
    else:
        name, sha256, hosts = cifar10.ARCHIVE
        path = _find("cifar10", name, sha256, hosts, download)
        arrays, source = cifar10.read_archive(path), ""
    return Dataset(
        "cifar10",
        **{key: torch.from_numpy(arrays[key]).to(dtype).div_(255) for key in ("x", "x_test")},
        **{key: torch.from_numpy(arrays[key]).long() for key in ("y", "y_test")},
        num_classes=10,
        image_shape=(3, 32, 32),
        source=source,
    )


def _fetch(folder: str, file: _File, download: bool) -> bytes:
    """Return a file's unzipped, verified content."""
    path = _find(folder, f"{file.name}.gz", file.sha256_gz, _MNIST_HOSTS, download)
    return _verified(path, file)


def _find(folder: str, name: str, sha256: str, hosts: tuple[str, ...], download: bool) -> Path:
    """Return where a file lies: local folder, then cache, then (checked) network."""
    local = os.environ.get("BILEVEL_LITE_DATA")
    if local and (Path(local) / folder / name).exists():
        return Path(local) / folder / name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm's, in notebooks without widgets
        import pooch
    pooch.get_logger().setLevel("WARNING")  # the progress bar says enough

    cache = Path(os.environ.get("BILEVEL_LITE_CACHE") or pooch.os_cache("bilevel_lite"))
    cached = cache / folder / name
    if cached.exists():
        return cached
    if not download:
        raise DataError(f"no local copy of {name}, and no download: it is switched off")
    problems = []
    for host in hosts:
        try:
            path = pooch.retrieve(
                host + name,
                known_hash=f"sha256:{sha256}",
                fname=name,
                path=cached.parent,
                downloader=pooch.HTTPDownloader(timeout=10, progressbar=_progress_bar()),
            )
            return Path(path)
        except ValueError:  # pooch has deleted it: its hash is not the known one
            problems.append(f"{host} sent a file that is damaged or not the original")
        except OSError as error:  # requests' errors are among them
            problems.append(f"{host} could not be read ({type(error).__name__})")
    raise DataError(
        f"no local copy of {name}, and no download: {'; '.join(problems)}. Put the dataset's files "
        f"in a folder {folder}/ and name its parent in BILEVEL_LITE_DATA"
    )


def _progress_bar() -> bool:
    return os.environ.get("BILEVEL_LITE_PROGRESS") != "0"


def _verified(path: Path, file: _File) -> bytes:
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, ValueError) as error:
        raise DataError(
            f"{path.name} is damaged: it does not unzip ({error}); delete {path} and try again"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path.name} is damaged: its content has sha256 {found[:12]}..., expected "
            f"{file.sha256[:12]}...; delete {path} and try again"
        )
    return content


def read_idx(content: bytes) -> np.ndarray:
    """Read an array of bytes in the IDX format (MNIST's).

    The header is two zero bytes, the type code 0x08 (unsigned byte), the number of dimensions,
    and each dimension as a big-endian 32-bit integer; then the values, row-major.

    Args:
        content: The file, unzipped.

    Returns:
        uint8 array with the shape that the header gives; a writable copy.

    Raises:
        DataError: if the header is not IDX's, or the length does not match the header.
    """
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"not an IDX file of bytes: it starts with {content[:4].hex()}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError(f"IDX file cut short in its header ({len(content)} bytes)")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    values = np.frombuffer(content, dtype=np.uint8, offset=header)
    if values.size != np.prod(shape, dtype=np.int64):
        raise DataError(
            f"IDX file holds {values.size} values, its header says {shape}; is it truncated?"
        )
    return values.reshape(shape).copy()


def split(n: int, sizes: tuple[int, ...], generator: torch.Generator) -> list[Tensor]:
    """Draw disjoint random index sets from range(n).

    Args:
        n: Number of examples.
        sizes: Size of each set; their sum is at most ``n``.
        generator: CPU generator.

    Returns:
        One int64 tensor per size, shape (size,).

    Raises:
        ValueError: if the sizes are negative or do not fit.
    """
    if min(sizes) < 0 or sum(sizes) > n:
        raise ValueError(f"sizes: {sizes} need {sum(sizes)} examples, but there are {n}")
    order = torch.randperm(n, generator=generator)
    return list(order[: sum(sizes)].split(list(sizes)))


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
        ValueError: if the rate or a label is out of range, or ``transition`` has another shape,
            negative entries, or rows that do not add up to 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate: got {rate}, expected a number from 0 to 1")
    check_labels(y, num_classes)
    chosen = torch.randperm(len(y), generator=generator)[: round(rate * len(y))].to(y.device)
    noisy = y.clone()
    if transition is None:
        drawn = torch.randint(num_classes, (len(chosen),), generator=generator)
    else:
        _check_transition(transition, num_classes)
        rows = transition.detach().cpu()[y[chosen].cpu()]
        # the class where the cumulated probabilities pass a uniform number
        uniform = torch.rand(len(chosen), 1, generator=generator, dtype=rows.dtype)
        drawn = (rows.cumsum(1) <= uniform).sum(1).clamp(max=num_classes - 1)
    noisy[chosen] = drawn.to(y)
    return noisy, noisy != y


def pair_flips(num_classes: int) -> Tensor:
    """Return the transition matrix that turns every label c into the next one, (c + 1) mod C."""
    return torch.eye(num_classes).roll(1, 1)


def _check_transition(transition: Tensor, num_classes: int) -> None:
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
    """
    channels = dataset.image_shape[0] if len(dataset.image_shape) == 3 else 1
    x = dataset.x.view(len(dataset.x), channels, -1)
    mean, std = x.mean((0, 2))[:, None], x.std((0, 2))[:, None]

    def scaled(values):
        return ((values.view(len(values), channels, -1) - mean) / std).view_as(values)

    return dataset._replace(x=scaled(dataset.x), x_test=scaled(dataset.x_test))


class Batches:
    """A sampler of batches (x, y, index) from tensors that stay on one device.

    Each pass visits the examples in a new random order; a remainder smaller than a batch is left
    out of that pass, so that every batch has the same size.

    Args:
        x: Inputs, shape (n, ...).
        y: Labels or targets, shape (n, ...).
        batch_size: Examples per batch, from 1 to n.
        generator: CPU generator, so that every device sees the same batches.
        num_classes: If given, labels are checked to be 0 .. num_classes-1 once, here.

    Raises:
        ValueError: if the lengths differ, the batch size does not fit, x is not finite, or a
            label is out of range.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        generator: torch.Generator,
        num_classes: int | None = None,
    ):
        if len(x) != len(y):
            raise ValueError(f"x has {len(x)} rows and y has {len(y)}; expected the same number")
        if not isinstance(batch_size, int) or not 1 <= batch_size <= len(x):
            raise ValueError(f"batch_size: got {batch_size!r}, expected 1 to {len(x)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"x: {int((~torch.isfinite(x)).sum())} entries are NaN or infinite")
        if num_classes is not None:
            check_labels(y, num_classes)
        self.x, self.y, self.batch_size, self.generator = x, y, batch_size, generator
        self._start_pass()

    def _start_pass(self):
        self._before = self.generator.get_state()  # enough to replay this pass when resuming
        self._order = torch.randperm(len(self.x), generator=self.generator).to(self.x.device)
        self._position = 0

    def draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next batch: x[index], y[index], index."""
        if self._position + self.batch_size > len(self.x):
            self._start_pass()
        index = self._order[self._position : self._position + self.batch_size]
        self._position += self.batch_size
        # the same rows as x[index], several times sooner on a CPU
        return self.x.index_select(0, index), self.y.index_select(0, index), index

    def all(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the whole set as one batch, in order."""
        return self.x, self.y, torch.arange(len(self.x), device=self.x.device)

    def state_dict(self) -> dict:
        """Return the place in the current pass, and what replays it."""
        return {
            "generator": self._before,
            "position": self._position,
            "now": self.generator.get_state(),  # elsewhere, if other samplers draw from it too
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from what `state_dict` returned, with the same batches to come."""
        self.generator.set_state(state["generator"].cpu())
        self._start_pass()
        self._position = state["position"]
        self.generator.set_state(state["now"].cpu())
