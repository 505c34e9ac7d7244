"""CIFAR-10 as files: the original binary archive, or a copy whose images were stored as JPEG.

A record of the original is one label byte and 3,072 pixel bytes, channels x rows x columns
(Krizhevsky, Learning multiple layers of features from tiny images, 2009). One of CIFAR-100, of
which there is the original archive alone, has another label byte in front, that of its superclass.
"""

import hashlib
import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bilevel_lite.data.files import DataError, Dataset, find

__all__ = [
    "ARCHIVES", "PACK_SOURCE", "is_pack", "load", "load_100", "read_archive", "read_pack",
    "read_records",
]  # fmt: skip

HOSTS = ("https://www.cs.toronto.edu/~kriz/",)
PIXELS = 3 * 32 * 32


class Archive(NamedTuple):
    """An original archive: its name and hash, its files, the bytes of labels before the pixels."""

    name: str
    sha256: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: int


ARCHIVES = {  # by the number of classes
    10: Archive(
        "cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        1,
    ),
    100: Archive(
        "cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        2,
    ),
}

# The copy: train.jpegs and test.jpegs hold JPEG files end to end, *_index.npz lengths and labels.
PACK_SOURCE = "JPEG-recompressed CIFAR-10"
PACK = {
    "train.jpegs": "0d64f7a07ec7c78a203de8b37d857f1cd77480afbf196a6bc6f415a68e2384de",
    "train_index.npz": "155f2ac82e2dc524cf781ad9fb1cf32d867bfe104b800807a461ef704234d2fb",
    "test.jpegs": "90983a768ba9275b95beeb294504c3e7e588ad71f4fb7c347404177f904a8625",
    "test_index.npz": "c1c077805be46f1c0e471524479a742eadfda37b20e5c325c0b5f8c76123886b",
}


def load(dtype: torch.dtype, download: bool) -> Dataset:
    """Load CIFAR-10, see `bilevel_lite.data.load`."""
    local = os.environ.get("BILEVEL_LITE_DATA")
    pack = Path(local) / "cifar10" if local else None
    if pack and is_pack(pack):
        return _dataset(10, read_pack(pack), dtype, PACK_SOURCE)
    return _original(10, dtype, download)


def load_100(dtype: torch.dtype, download: bool) -> Dataset:
    """Load CIFAR-100, see `bilevel_lite.data.load`."""
    return _original(100, dtype, download)


def _original(classes: int, dtype: torch.dtype, download: bool) -> Dataset:
    one = ARCHIVES[classes]
    path = find(f"cifar{classes}", one.name, one.sha256, HOSTS, download)
    return _dataset(classes, read_archive(path, classes), dtype)


def _dataset(classes: int, arrays: dict[str, np.ndarray], dtype, source: str = "") -> Dataset:
    return Dataset(
        f"cifar{classes}",
        **{key: torch.from_numpy(arrays[key]).to(dtype).div_(255) for key in ("x", "x_test")},
        **{key: torch.from_numpy(arrays[key]).long() for key in ("y", "y_test")},
        num_classes=classes,
        image_shape=(3, 32, 32),
        source=source,
    )


def read_records(content: bytes, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Read records of the binary version.

    Args:
        content: Of a file.
        classes: 10; or 100, whose records have their superclass in front of the label.

    Returns:
        Pixels, shape (n, 3072), and labels, shape (n,), both uint8; writable copies.

    Raises:
        DataError: if the length is not a multiple of a record's, or a label is out of range.
    """
    own = ARCHIVES[classes].labels + PIXELS
    if not content or len(content) % own:
        raise DataError(
            f"CIFAR-{classes} file of {len(content)} bytes: expected a multiple of {own}; is it "
            "truncated?"
        )
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, own)
    labels = records[:, -PIXELS - 1]
    if labels.max() >= classes:
        raise DataError(
            f"CIFAR-{classes} file has a label {labels.max()}, expected 0 to {classes - 1}"
        )
    return records[:, -PIXELS:].copy(), labels.copy()


def read_archive(path: Path, classes: int = 10) -> dict[str, np.ndarray]:
    """Read the original archive, without unpacking it to disk.

    Returns:
        ``x, y, x_test, y_test`` as uint8, 50,000 and 10,000 records.

    Raises:
        DataError: if the file is not the original.
    """
    one = ARCHIVES[classes]
    _check(path, one.sha256)
    with tarfile.open(path, "r:gz") as archive:

        def member(name: str) -> bytes:
            return archive.extractfile(f"{one.folder}/{name}").read()

        x, y = read_records(b"".join(map(member, one.train)), classes)
        x_test, y_test = read_records(member(one.test), classes)
    return {"x": x, "y": y, "x_test": x_test, "y_test": y_test}


def is_pack(folder: Path) -> bool:
    """Whether the folder holds the JPEG copy."""
    return all((folder / name).exists() for name in PACK)


def read_pack(folder: Path) -> dict[str, np.ndarray]:
    """Read the JPEG copy: other pixels than the original's by compression noise, another order.

    Returns:
        As `read_archive`.

    Raises:
        DataError: if a file is not the known one.
    """
    out = {}
    for split, suffix in (("train", ""), ("test", "_test")):
        for name in (f"{split}.jpegs", f"{split}_index.npz"):
            _check(folder / name, PACK[name])
        with np.load(folder / f"{split}_index.npz", allow_pickle=False) as index:
            ends, out[f"y{suffix}"] = np.cumsum(index["length"], dtype=np.int64), index["label"]
        out[f"x{suffix}"] = _decode((folder / f"{split}.jpegs").read_bytes(), ends)
    return out


def _decode(content: bytes, ends: np.ndarray) -> np.ndarray:
    from PIL import Image  # comes with matplotlib

    pixels, start = np.empty((len(ends), PIXELS), np.uint8), 0
    for row, end in zip(pixels, ends, strict=True):
        image = np.asarray(Image.open(io.BytesIO(content[start:end])).convert("RGB"))
        row[:] = image.transpose(2, 0, 1).ravel()
        start = end
    return pixels


def _check(path: Path, sha256: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path.name} is damaged or not the known file: it has sha256 {found[:12]}..., "
            f"expected {sha256[:12]}...; delete {path} and try again"
        )
