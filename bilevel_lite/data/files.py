"""What a dataset is, and where its files are: local folder, cache, network; each verified."""

import gzip
import hashlib
import os
import warnings
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

__all__ = ["DataError", "Dataset", "File", "find", "verified"]


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

    def as_images(self) -> "Dataset":
        """The same with inputs of shape (n, channels, height, width), for models of images."""
        shape = (*(1,) * (3 - len(self.image_shape)), *self.image_shape)
        return self._replace(x=self.x.view(-1, *shape), x_test=self.x_test.view(-1, *shape))


class File(NamedTuple):
    """A zipped file and its two hashes."""

    name: str
    sha256_gz: str  # of the archive as the hosts below serve it
    sha256: str  # of its content, the same whoever compressed it


def find(
    folder: str, name: str, sha256: str | None, hosts: tuple[str, ...], download: bool
) -> Path:
    """Return where a file lies: local folder, then cache, then network.

    A download is checked by its sha256, if there is one. What lies in a folder is returned as it
    is: the caller must check what the file says.

    Raises:
        DataError: if it is in none of them.
    """
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
                known_hash=sha256 and f"sha256:{sha256}",
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
        f"in a folder {folder}/ of the one that BILEVEL_LITE_DATA names"
    )


def _progress_bar() -> bool:
    return os.environ.get("BILEVEL_LITE_PROGRESS") != "0"


def verified(path: Path, file: File) -> bytes:
    """Return a file's unzipped content.

    Raises:
        DataError: if it does not unzip, or is not what its hash says.
    """
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
