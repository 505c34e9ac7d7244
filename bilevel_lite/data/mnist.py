"""MNIST: 60,000 + 10,000 grey images of 28 x 28, in the IDX format."""

import struct

import numpy as np
import torch

from bilevel_lite.data.files import DataError, Dataset, File, find, verified

__all__ = ["load", "read_idx"]

HOSTS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {
    "x": File(
        "train-images-idx3-ubyte",
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "y": File(
        "train-labels-idx1-ubyte",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "x_test": File(
        "t10k-images-idx3-ubyte",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "y_test": File(
        "t10k-labels-idx1-ubyte",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def load(dtype: torch.dtype, download: bool) -> Dataset:
    """Load MNIST, see `bilevel_lite.data.load`."""
    parts = {key: read_idx(_fetch(file, download)) for key, file in FILES.items()}
    images = {
        key: torch.from_numpy(parts[key]).flatten(1).to(dtype).div_(255) for key in ("x", "x_test")
    }
    labels = {key: torch.from_numpy(parts[key]).long() for key in ("y", "y_test")}
    return Dataset("mnist", **images, **labels, num_classes=10, image_shape=(28, 28))


def _fetch(file: File, download: bool) -> bytes:
    """Return a file's unzipped, verified content."""
    return verified(find("mnist", f"{file.name}.gz", file.sha256_gz, HOSTS, download), file)


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
