"""Texts with weak labels: TREC, SemEval and YouTube as the WRENCH benchmark publishes them.

Nobody labelled the training texts by hand. Instead people wrote labelling functions (a keyword, a
pattern), each of which names a class for some texts and abstains, -1, on the others; `majority`
makes one label of them. True labels are there as well, so that one can see what went wrong
(Zhang et al., WRENCH, 2021, arXiv 2109.11377).
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bilevel_lite.data.files import DataError, find

__all__ = ["NAMES", "Texts", "WeakTexts", "load", "majority", "read", "toy"]

# The authors' own place; a folder for each set, with four files. Its list of files was seen when
# this was written, its files could not be compared: the hashes below are those of a copy.
HOST = "https://huggingface.co/datasets/jieyuz2/WRENCH/resolve/main/classification/{}/"
FILES = ("train.json", "valid.json", "test.json", "label.json")
NAMES = ("semeval", "trec", "youtube")
# sha256 of what a file says: copies that differ in blanks and order of keys are the same
CONTENT = {
    "trec/train.json": "ab6f55e5ce257dfbbec1d3f7fa47800ebbde6cd280e3d064bf0eafded6859d46",
    "trec/valid.json": "0dab62f6041ba93983afe5f1a5d2129f5f0549bc3454f073da07b318bc16a2ad",
    "trec/test.json": "62311c3d60c3a213c0e28c6653be35d79eba951bb662c77064e14d062eebc89c",
    "trec/label.json": "c5b6ea0cd3a4632639df7eea02f92640ffb561dd6421d831bad7544defdb2e71",
    "semeval/train.json": "cb2be6ef6386eb90522a7c2e2f4b8d5b73158bc1ca4b109db3ae1cb6fc88b952",
    "semeval/valid.json": "2d086cdbac4ac232cf6a3361f47e29959a96fdc8f56ee2e8d55f7d3b723d77cc",
    "semeval/test.json": "e922b7c702e1229c5b8561fd56a2b384802fb793789555db9eb015e90c90157a",
    "semeval/label.json": "0bca8968ca96fc8bc5d44e1fc4eddad6bc5117ae0442bb11e4e6eed7d59513db",
    "youtube/train.json": "c2c1a3d5f50d790e5e4e6ead98d3b0fe33c768cb1e0141530f247817f98db5e1",
    "youtube/valid.json": "ee336ab462ee2381bb838278d3e9ad9e78aab87b7686066e683a00cef7beb9c0",
    "youtube/test.json": "f3842b79cc2aef80c77e1d528bd5dc1321b08bb3cf0e0fd57cfd2fc0b357dc4d",
    "youtube/label.json": "6837af4230238ed5c9d5d32ce309083b24491fe5d085f0b779298e7c67eeb74a",
}
TIES = ("first", "drawn")
UNCOVERED = ("tie", "abstain")


class Texts(NamedTuple):
    """One split.

    Attributes:
        texts: n of them, in the file's order.
        y: True labels, shape (n,), int64.
        weak: What each labelling function says, shape (n, functions), int64; -1 abstains.
        spans: SemEval only, whose label is the relation of two entities: ((start, end), (start,
            end)) in characters of each text. A classifier that reads the text alone is not told
            which two are meant. Empty elsewhere.
    """

    texts: list[str]
    y: Tensor
    weak: Tensor
    spans: list[tuple[tuple[int, int], tuple[int, int]]]


class WeakTexts(NamedTuple):
    """A dataset of texts with weak labels.

    Attributes:
        name: Its name.
        train: Texts whose true labels a method must not see.
        valid: A few with labels to trust.
        test: For the end.
        classes: Their names; labels are positions in this list.
        source: What is to be said beside every number made from it; empty for a known set.
    """

    name: str
    train: Texts
    valid: Texts
    test: Texts
    classes: list[str]
    source: str = ""


def load(name: str, download: bool = True) -> WeakTexts:
    """Load a set by name: from ``BILEVEL_LITE_DATA/wrench/NAME``, the cache, or the network.

    Args:
        name: ``"trec"`` (questions: 5,033 training, 500 validation, 500 test texts; 6 classes),
            ``"semeval"`` (relations: 1,749, 178, 600; 9) or ``"youtube"`` (spam: 1,586, 120, 250;
            2).
        download: Whether the network may be used when no local copy is found.

    Raises:
        ValueError: for an unknown name.
        DataError: if a file cannot be had, or says something else than the known one.

    Example:
        >>> bl.data.wrench.load("imdb")
        Traceback (most recent call last):
        ValueError: dataset: got 'imdb', expected one of ('semeval', 'trec', 'youtube')
    """
    if name not in NAMES:
        raise ValueError(f"dataset: got {name!r}, expected one of {NAMES}")
    hosts = (HOST.format(name),)
    paths = [find(f"wrench/{name}", file, None, hosts, download) for file in FILES]
    for path in paths:
        _check(path, CONTENT[f"{name}/{path.name}"])
    return read(paths[0].parent, name)._replace(source="")


def read(folder: str | Path, name: str = "") -> WeakTexts:
    """Read a folder in WRENCH's format, also one of one's own.

    Args:
        folder: With ``train.json``, ``valid.json``, ``test.json`` (id -> ``{"label": 0, "data":
            {"text": "..."}, "weak_labels": [0, -1]}``; in ``data`` all or none with ``"span1": [0,
            3]`` and ``"span2"``) and ``label.json`` (number -> class name).
        name: Of the set; the folder's by default.

    Raises:
        DataError: if a file is missing or not of that form, a label is none of the classes, or a
            text is empty; naming file and entry.
    """
    folder = Path(folder)
    parts = {file: _json(folder / file) for file in FILES}
    names = parts.pop("label.json")
    if sorted(names) != sorted(map(str, range(len(names)))):
        raise DataError(
            f"{folder / 'label.json'}: names the classes {', '.join(names)}, expected 0 to "
            f"{len(names) - 1}"
        )
    if odd := [name for name in names.values() if not isinstance(name, str)]:
        raise DataError(f"{folder / 'label.json'}: names a class {odd[0]!r}, expected a string")
    classes = [names[str(number)] for number in range(len(names))]
    splits = [_split(folder / file, entries, len(classes)) for file, entries in parts.items()]
    widths = [split.weak.shape[1] for split in splits]
    if len(set(widths)) > 1:
        raise DataError(f"{folder}: train, valid and test have {widths} labelling functions")
    name = name or folder.name
    return WeakTexts(name, *splits, classes, f"{name}, a set of one's own")


def _split(path: Path, entries: dict, classes: int) -> Texts:
    texts, y, weak, spans = [], [], [], []
    for key, entry in entries.items():
        try:
            text, label, votes = entry["data"]["text"], entry["label"], entry["weak_labels"]
        except (KeyError, TypeError):
            raise DataError(
                f"{path}: entry {key!r} is not of the form "
                '{"label": 0, "data": {"text": "..."}, "weak_labels": [...]}'
            ) from None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{path}: the text of entry {key!r} is empty; leave the entry out")
        if not _whole(label, 0, classes):
            raise DataError(
                f"{path}: entry {key!r} has label {label!r}, expected 0 to {classes - 1}, the "
                "classes of label.json"
            )
        if not isinstance(votes, list):
            raise DataError(
                f"{path}: entry {key!r} has weak labels {votes!r}, expected a list, one for each "
                "labelling function"
            )
        if weak and len(votes) != len(weak[0]):
            raise DataError(
                f"{path}: entry {key!r} has {len(votes)} weak labels, the first has {len(weak[0])}"
            )
        if bad := [vote for vote in votes if not _whole(vote, -1, classes)]:
            raise DataError(
                f"{path}: entry {key!r} has the weak label {bad[0]!r}, expected -1 (abstains) to "
                f"{classes - 1}"
            )
        texts.append(text)
        y.append(label)
        weak.append(votes)
        if found := _spans(f"{path}: entry {key!r}", entry["data"]):
            spans.append(found)
        if len(spans) not in (0, len(texts)):
            raise DataError(
                f"{path}: up to entry {key!r} some have spans and some have none; give all or none"
            )
    if not texts:
        raise DataError(f"{path}: holds no text")
    return Texts(texts, torch.tensor(y), torch.tensor(weak), spans)


def _whole(value: Any, least: int, end: int) -> bool:
    """True for an integer of JSON, neither 1.0 nor true, from ``least`` to below ``end``."""
    return type(value) is int and least <= value < end


def _spans(where: str, data: dict) -> tuple | None:
    """Where the two entities of a text stand; None if it does not say so."""
    spans = [data.get(name) for name in ("span1", "span2")]
    if spans == [None, None]:
        return None
    for span in spans:
        pair = isinstance(span, list) and len(span) == 2
        if not pair or not all(_whole(place, 0, len(data["text"]) + 1) for place in span):
            raise DataError(
                f"{where} has the spans {spans[0]!r} and {spans[1]!r}, expected two pairs [start, "
                "end] of characters of its text"
            )
    return tuple(spans[0]), tuple(spans[1])


def majority(
    weak: Tensor,
    num_classes: int,
    ties: str = "first",
    uncovered: str | int = "tie",
    generator: torch.Generator | None = None,
) -> Tensor:
    """One label for each text: the class that most labelling functions name.

    Votes often end in a tie (719 of TREC's 5,033 training texts), and a text that no function
    speaks about is a tie of all classes at zero votes. Two rules are in use:

    - ``"first"``: the class that comes first in the list. It is ``argmax`` of the counts, always
      the same, and makes the labels that the authors of the main paper ship for TREC. But it
      favours the classes that happen to come first: 68 % of TREC's labels become DESC (57 % if ties
      are drawn), and of SemEval's 199 ties it gets 93 % right, by the order of the list alone.
    - ``"drawn"``: one of the tied classes at random. It favours nobody, and depends on the draw.

    Args:
        weak: Weak labels, shape (n, functions), integers; -1 abstains.
        num_classes: C; labels are 0 .. C-1. Classes that no function ever names get no text.
        ties: ``"first"`` or ``"drawn"``.
        uncovered: Of texts without any weak label: ``"tie"``, decided as every tie; ``"abstain"``,
            the label -1, so that one can leave them out; or a class.
        generator: CPU generator of the draws; seed 0 by default.

    Returns:
        Labels, shape (n,), int64.

    Raises:
        ValueError: if ``weak`` has another shape or kind, names a class that is not there, or says
            nothing about any text; or for an unknown rule.

    Example:
        >>> weak = torch.tensor([[1, 1, 0], [2, 0, -1], [-1, -1, -1]])
        >>> bl.data.majority(weak, 3)
        tensor([1, 0, 0])
        >>> bl.data.majority(weak, 3, uncovered="abstain")
        tensor([ 1,  0, -1])
    """
    counts = votes(weak, num_classes)
    if ties not in TIES:
        raise ValueError(f"ties: got {ties!r}, expected 'first' or 'drawn'")
    if uncovered not in (*UNCOVERED, *range(num_classes)):
        raise ValueError(
            f"uncovered: got {uncovered!r}, expected 'tie', 'abstain' or a class from 0 to "
            f"{num_classes - 1}"
        )
    if ties == "drawn":
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        # below one vote: it decides among equals only
        counts = counts + 0.5 * torch.rand(counts.shape, generator=generator, dtype=torch.float64)
    labels = counts.argmax(1)  # of equals the first
    if uncovered != "tie":
        label = -1 if uncovered == "abstain" else int(uncovered)
        labels = labels.masked_fill((weak == -1).all(1).cpu(), label)
    return labels


def votes(weak: Tensor, num_classes: int) -> Tensor:
    """How many labelling functions name each class, shape (n, C), on the CPU.

    Raises:
        ValueError: as `majority`.
    """
    if weak.dim() != 2 or weak.is_floating_point() or weak.dtype == torch.bool:
        raise ValueError(
            f"weak: got shape {tuple(weak.shape)} and dtype {weak.dtype}, expected integers of "
            "shape (n, functions)"
        )
    weak = weak.cpu()
    if bad := sorted(set(weak.unique().tolist()) - set(range(-1, num_classes))):
        raise ValueError(
            f"weak: names {bad}, expected -1 (abstains) or a class from 0 to {num_classes - 1}"
        )
    if bool((weak == -1).all()):
        raise ValueError(
            "weak: no text has a weak label, so there is nothing to vote on; add a labelling "
            "function, or label some texts by hand"
        )
    return (weak[..., None] == torch.arange(num_classes)).sum(1)


def toy() -> WeakTexts:
    """Made-up questions with unreliable labelling functions, for a machine without any texts.

    A function for each class knows its keyword and speaks up 7 times in 10; two more name any
    class.

    Example:
        >>> bl.data.wrench.toy().train.texts[0]
        'who keeps the schools of lima ?'
    """
    asks = ("how many {} has {} ?", "where are the {} of {} ?", "who keeps the {} of {} ?")
    things = ("bridges", "museums", "gardens", "trains", "towers", "markets", "canals", "schools")
    places = ("lima", "oslo", "cairo", "delhi", "paris", "accra", "quito", "seoul", "turin", "york")
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    def made(n: int) -> Texts:
        y, thing, place = draw(3, n), draw(len(things), n), draw(len(places), n)
        rows = zip(y.tolist(), thing.tolist(), place.tolist(), strict=True)
        texts = [asks[c].format(things[t], places[p]) for c, t, p in rows]
        knows = y[:, None] == torch.arange(3)
        speaks = torch.rand(n, 3, generator=generator, dtype=torch.float64) < 0.7
        known = torch.where(knows & speaks, torch.arange(3), -1)
        return Texts(texts, y, torch.cat([known, draw(3, n, 2)], 1), [])

    train, valid, test = map(made, (120, 40, 60))
    return WeakTexts("toy", train, valid, test, ["NUM", "LOC", "HUM"], "made-up questions")


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; expected {', '.join(FILES)}") from None
    except ValueError as error:
        raise DataError(f"{path} is damaged: not JSON ({error}); put it there anew") from error
    if not isinstance(found, dict) or not found:
        got = "an empty one" if found == {} else type(found).__name__
        raise DataError(f"{path}: expected a dictionary of entries, got {got}")
    return found


def _check(path: Path, sha256: str) -> None:
    """Refuse a file that says something else than the known one."""
    entries = _json(path)
    if path.name != "label.json":
        keys = ("data", "label", "weak_labels")
        entries = [[row.get(k) for k in keys] for row in entries.values()]  # ids say nothing
    found = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
    if found != sha256:
        raise DataError(
            f"{path} is damaged or not the known file: its content has sha256 {found[:12]}..., "
            f"expected {sha256[:12]}...; delete it and try again, or read a set of your own with "
            "bilevel_lite.data.wrench.read(FOLDER)"
        )
