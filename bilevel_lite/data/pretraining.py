"""Four text tasks on which auxiliary pretraining is judged, as "Don't Stop Pretraining" has them.

ChemProt (how a chemical acts on a protein), ACL-ARC (``citation_intent``: why a paper is cited),
SciERC (``sciie``: how two terms are related) and HyperPartisan (is an article one-sided), each as
``train.jsonl``, ``dev.jsonl``, ``test.jsonl`` with a text and a label a line (Gururangan et al.,
2020, arXiv 2004.10964). Their folders also hold ``train.txt``, which is the training texts once
more, a line each: nothing is read from it.

**Texts that stand in two splits.** In the copy that the hashes below are of, 51 of HyperPartisan's
65 test texts are training texts, with the same number and the same label, and 7 of the other 14 are
development texts; of ACL-ARC, where a sentence with several citations stands once for each, 52 of
139 test texts and 43 of 114 development texts are training texts (46 and 40 of them always with the
label that they have there); of ChemProt 4 test texts. `seen` finds them; say so with every number
on these sets.
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bilevel_lite.data import wrench
from bilevel_lite.data.files import DataError, find

__all__ = ["NAMES", "EndTask", "Labelled", "load", "read", "seen", "toy"]

# The place that the authors' own scripts name; what it serves could not be compared: the hashes are
# those of a copy. HyperPartisan's copy mixes two ways of splitting, so no host is known for it.
HOST = "https://s3-us-west-2.amazonaws.com/allennlp/dont_stop_pretraining/data/{}/"
FILES = ("train.jsonl", "dev.jsonl", "test.jsonl")
NAMES = ("chemprot", "citation_intent", "hyperpartisan", "sciie")
UNHOSTED = ("hyperpartisan",)
# sha256 of the texts and labels of each file
CONTENT = {
    "chemprot": (
        "d2450906d95a2d99b387d0962147a6c916d5cfe561df80b116a84bb3bc506a40",
        "adeef7f0d15d14241604fbeae09ee4231e762731395c84f537b696881fd545b1",
        "da3364a500c0cdf379fa06f7ca541a2c3663a3f1edc916aff7d8cc6f33aff803",
    ),
    "citation_intent": (
        "0e77919c9da54eb2697fc17b37b72946d97b9dea0b4d793f627ab1feda2db1b5",
        "c45ef208b2052ef6e851f61048e44f53fbf93b25ebe56cb1e139586ae7543a0a",
        "eb197a0d536534201ef3ffbacf71ea35dd9e6877b0521a6dac5f637c505e1d96",
    ),
    "hyperpartisan": (
        "2258575c024d1dab6b3d8310638a6e94543c446edfae0d7bd170b4d3d9ffbaa9",
        "7bf7a56d2c7ce8c0f687b90b2d9f9bec2677d87f668f0cd141f17dfbf8d09d7b",
        "308cee51a607a29dff88ca250aa0709fc23f802ef579f8ac0852f4c112649ee5",
    ),
    "sciie": (
        "656c04cb4f8c46adcd9f92b63b976c58b061520809ae87365e78b4616fcf580a",
        "992f01d419b78702479732be16a0f24a6dab6f2f1b9d055203fca05512353a76",
        "332ea9212726c97da2b56ab458243d5359944fa9c8d433bf3ffaa2ca7f16bbbc",
    ),
}


class Labelled(NamedTuple):
    """One split.

    Attributes:
        texts: n of them, in the file's order.
        y: Labels, shape (n,), int64.
    """

    texts: list[str]
    y: Tensor


class EndTask(NamedTuple):
    """A text classification task.

    Attributes:
        name: Its name.
        train: What it is learned on.
        valid: The development texts.
        test: For the end.
        classes: Their names, sorted; those of the training texts.
        source: What is to be said beside every number made from it; empty for a known set.
    """

    name: str
    train: Labelled
    valid: Labelled
    test: Labelled
    classes: list[str]
    source: str = ""


def load(name: str, download: bool = True) -> EndTask:
    """Load a set by name: from ``BILEVEL_LITE_DATA/pretraining/NAME``, the cache, or the network.

    Args:
        name: ``"chemprot"`` (4,169 training, 2,427 development, 3,469 test texts; 13 classes, of
            which 12 occur in development and test), ``"citation_intent"`` (ACL-ARC; 1,688, 114,
            139; 6), ``"hyperpartisan"`` (516, 63 and an empty one that is left out, 65; 2) or
            ``"sciie"`` (SciERC; 3,219, 455, 974; 7).
        download: Whether the network may be used when no local copy is found.

    Raises:
        ValueError: for an unknown name.
        DataError: if a file cannot be had (of ``"hyperpartisan"`` no host is known), or says
            something else than the known one.

    Example:
        >>> bl.data.pretraining.load("imdb")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: dataset: got 'imdb', expected one of ('chemprot', 'citation_intent', ...
    """
    if name not in NAMES:
        raise ValueError(f"dataset: got {name!r}, expected one of {NAMES}")
    folder, hosts = f"pretraining/{name}", () if name in UNHOSTED else (HOST.format(name),)
    if not hosts and download:
        try:
            paths = [find(folder, file, None, hosts, False) for file in FILES]
        except DataError as error:
            raise DataError(
                f"no local copy of {name}, and no host is known for this split; put its "
                f"{', '.join(FILES)} in a folder {folder}/ of the one that BILEVEL_LITE_DATA names"
            ) from error
    else:
        paths = [find(folder, file, None, hosts, download) for file in FILES]
    if len({path.parent for path in paths}) > 1:
        places = ", ".join(map(str, paths))
        raise DataError(f"{name}: its files lie in different folders ({places}); put all in one")
    for path, known in zip(paths, CONTENT[name], strict=True):
        _check(path, known)
    return read(paths[0].parent, name, drop_empty=True)._replace(source="")


def read(folder: str | Path, name: str = "", drop_empty: bool = False) -> EndTask:
    """Read a folder of this format, also one of one's own.

    Args:
        folder: With ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``, each line ``{"text": "...",
            "label": "..."}`` (further entries are not read).
        name: Of the set; the folder's by default.
        drop_empty: Leave out lines whose text is empty; by default they are refused.

    Raises:
        DataError: if a file is missing or not of that form, a text is empty, or a label of dev or
            test is none of the training texts'; naming file and line.
    """
    folder = Path(folder)
    rows = {file: _lines(folder / file) for file in FILES}
    for file, found in rows.items():
        empty = [number for number, (text, _) in enumerate(found, 1) if not text.strip()]
        if empty and not drop_empty:
            raise DataError(
                f"{folder / file}: the text of line {empty[0]} is empty; leave the line out, or "
                "read with drop_empty=True"
            )
        rows[file] = [row for row in found if row[0].strip()]
        if not rows[file]:
            raise DataError(f"{folder / file}: holds no text")
    classes = sorted({label for _, label in rows[FILES[0]]})
    splits = [_split(folder / file, found, classes) for file, found in rows.items()]
    name = name or folder.name
    return EndTask(name, *splits, classes, f"{name}, a set of one's own")


def seen(part: Labelled, train: Labelled) -> Tensor:
    """True for each text of ``part`` that is a training text too, blanks at its ends aside.

    Returns:
        bool, shape (n,).

    Example:
        >>> part = bl.data.pretraining.Labelled(["a b", "c"], torch.zeros(2, dtype=torch.int64))
        >>> bl.data.pretraining.seen(part, part._replace(texts=["a b ", "d"]))
        tensor([ True, False])
    """
    known = {text.strip() for text in train.texts}
    return torch.tensor([text.strip() in known for text in part.texts], dtype=torch.bool)


def looked_up(part: Labelled, train: Labelled) -> Tensor:
    """Guess each text of ``part`` by looking it up in ``train``, blanks at its ends aside.

    Returns:
        int64, shape (n,): the label of the (last) same training text, or the most frequent training
        label where there is none.

    Example:
        >>> train = bl.data.pretraining.Labelled(["a", "b", "c"], torch.tensor([1, 0, 0]))
        >>> bl.data.pretraining.looked_up(train._replace(texts=["a ", "d"]), train)
        tensor([1, 0])
    """
    label = {text.strip(): int(y) for text, y in zip(train.texts, train.y, strict=True)}
    most = int(train.y.bincount().argmax())
    return torch.tensor([label.get(text.strip(), most) for text in part.texts])


def toy() -> EndTask:
    """The made-up questions of `bilevel_lite.data.wrench.toy` with their true labels.

    For a machine without any texts: a masked word can be told from its neighbours.

    Example:
        >>> bl.data.pretraining.toy().classes
        ['HUM', 'LOC', 'NUM']
    """
    made = wrench.toy()
    classes = sorted(made.classes)
    place = torch.tensor([classes.index(name) for name in made.classes])
    parts = (Labelled(part.texts, place[part.y]) for part in (made.train, made.valid, made.test))
    return EndTask("toy", *parts, classes, made.source)


def _split(path: Path, rows: list[tuple[str, str]], classes: list[str]) -> Labelled:
    place = {name: c for c, name in enumerate(classes)}
    for number, (_, label) in enumerate(rows, 1):
        if label not in place:
            raise DataError(
                f"{path}: line {number} has the label {label!r}, which no training text has "
                f"({', '.join(classes)})"
            )
    return Labelled([text for text, _ in rows], torch.tensor([place[label] for _, label in rows]))


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8").rstrip("\n").split("\n")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; expected {', '.join(FILES)}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: not UTF-8 ({error}); put it there anew") from error
    out = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            text, label = entry["text"], entry["label"]
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{path}: line {number} is not of the form {{"text": "...", "label": "..."}}'
            ) from None
        if not isinstance(text, str):
            raise DataError(f"{path}: the text of line {number} is {type(text).__name__}")
        out.append((text, str(label)))
    return out


def content(path: Path) -> str:
    """The sha256 of what a file says: its texts and labels, in order."""
    return hashlib.sha256(json.dumps(_lines(path)).encode()).hexdigest()


def _check(path: Path, sha256: str) -> None:
    """Refuse a file that says something else than the known one."""
    if (found := content(path)) != sha256:
        raise DataError(
            f"{path} is damaged or not the known file: its content has sha256 {found[:12]}..., "
            f"expected {sha256[:12]}...; delete it and try again, or read a set of your own with "
            "bilevel_lite.data.pretraining.read(FOLDER)"
        )
