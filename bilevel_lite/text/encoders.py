"""Hugging Face encoders by name or folder, their tokenizer, and a tiny one without a file."""

import logging
import os
import re
import sys
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bilevel_lite.surroundings import transforming

__all__ = [
    "Encoder", "EncoderError", "depth", "encoder", "learned_positions", "local", "require_ids",
    "tiny", "transformers",
]  # fmt: skip

DEFAULT = "bert-base-uncased"
LENGTH = 100  # tokens of a text by default: the papers' choice
SECONDS = 5.0  # how long a hub may take to answer
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


class EncoderError(ValueError):
    """An encoder cannot be had: the hub is silent, or a folder holds none."""


# ------------------------------------------------------------------ transformers


@lru_cache(maxsize=1)
def transformers() -> Any:
    """Import transformers, also where torchvision is installed and does not import.

    torchvision's wheel from PyPI does not import over a CPU build of torch, and transformers then
    cannot import a single model. There it is told, once and for all, that torchvision is absent;
    where torchvision works nothing is changed.

    Raises:
        ImportError: if transformers is not installed, with the command that does it.
    """
    if util.find_spec("transformers") is None:
        raise ImportError("bilevel_lite.text needs transformers: pip install 'bilevel-lite[text]'")
    broken = util.find_spec("torchvision") is not None and not _imports("torchvision")
    with _absent("torchvision") if broken else nullcontext():
        made = import_module("transformers")
        tools = import_module("transformers.utils.import_utils")
        if broken:  # it may have been imported before us, and remember otherwise
            for name in ("is_torchvision_available", "is_torchvision_v2_available"):
                ask = getattr(tools, name, bool)
                getattr(ask, "cache_clear", bool)()
                ask()
            if hasattr(tools, "_torchvision_available"):  # transformers 4
                tools._torchvision_available = False
    return made


def _imports(name: str) -> bool:
    """Whether a package can be imported; a failure leaves none of its modules behind."""
    before = set(sys.modules)
    try:
        import_module(name)
    except Exception:  # torch's own RuntimeError, in torchvision's case
        for module in set(sys.modules) - before:
            if module.split(".")[0] == name:
                del sys.modules[module]
        return False
    return True


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """As if a package were not installed."""
    sys.modules[name] = None  # type: ignore[assignment]  # the import system's word for it
    try:
        yield
    finally:
        del sys.modules[name]


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice and no progress bar from transformers, and the caller's generator left alone."""
    log = transformers().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.ERROR)
    log.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):  # what a file lacks is drawn
            yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# ------------------------------------------------------------------ encoders


@dataclass(eq=False)
class Encoder:
    """A Hugging Face encoder with its tokenizer, frozen, in float32 and evaluation mode.

    Attributes:
        module: ids (n, L) -> an object with ``last_hidden_state``, shape (n, L, width).
        tokenizer: Texts to ids.
        name: Its hub name, or its folder's.
        max_length: Tokens of a text that are read, the two special ones among them.
        remark: What is to be said with every number made with it; empty for a trained one.
    """

    module: nn.Module
    tokenizer: Any
    name: str
    max_length: int
    remark: str = ""

    def __post_init__(self):
        words, rows = len(self.tokenizer), len(self.module.get_input_embeddings().weight)
        filled = max(-(-words // 128) * 128, int(1.03 * words))  # rows that no token uses
        if not words <= rows <= filled:
            raise EncoderError(
                f"tokenizer: knows {words} tokens, but the encoder {self.name} has embeddings for "
                f"{rows}; give the tokenizer that the model was trained with"
            )
        if self.tokenizer.pad_token_id is None:
            raise EncoderError(
                f"tokenizer: of {self.name} has no padding token, so texts of different lengths "
                "cannot stand in one batch; set tokenizer.pad_token"
            )
        pad = getattr(self.module.config, "pad_token_id", None)
        if pad is not None and pad >= 0 and pad != self.pad:
            raise EncoderError(
                f"tokenizer: pads with {self.pad}, but the encoder {self.name} with {pad}; give "
                "the tokenizer that the model was trained with, or set module.config.pad_token_id"
            )
        most = _most(self.module, self.tokenizer)
        if not isinstance(self.max_length, int) or not 2 < self.max_length <= most:
            raise EncoderError(
                f"max_length: got {self.max_length!r}, expected 3 to {most}, the most tokens that "
                f"{self.name} takes; longer texts are cut off"
            )
        self.module.float().eval().requires_grad_(False)

    @property
    def pad(self) -> int:
        """The id that stands where nothing stands."""
        return self.tokenizer.pad_token_id

    @property
    def layers(self) -> int:
        """Number of layers."""
        return depth(self.module)

    @property
    def width(self) -> int:
        """Size of a token's vector."""
        return self.module.config.hidden_size

    @property
    def description(self) -> str:
        """What is said with every number made with it: name, kind, layers, parameters."""
        millions = sum(p.numel() for p in self.module.parameters()) / 1e6
        size = f"{millions:.1f} M" if millions >= 0.1 else f"{millions * 1e3:.0f} thousand"
        kind = type(self.module).__name__
        said = f"{self.name} ({kind}, {self.layers} layers, {size} parameters)"
        return f"{said}: {self.remark}" if self.remark else said

    def lengths(self, texts: Sequence[str]) -> Tensor:
        """Return the number of tokens of each text before anything is cut off, shape (n,)."""
        rows = self.tokenizer(_checked(texts), truncation=False, verbose=False)["input_ids"]
        return torch.tensor([len(row) for row in rows])

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids of some texts, shape (n, L), int64, padded on the right.

        L is the length of the longest, at most ``max_length``; what is beyond is cut off
        (``(encoder.lengths(texts) > encoder.max_length).sum()`` says of how many).

        Raises:
            ValueError: for no text, an empty one, or what is no string.
        """
        texts = _checked(texts)
        rows = self.tokenizer(texts, truncation=True, max_length=self.max_length)["input_ids"]
        out = torch.full((len(rows), max(map(len, rows))), self.pad)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row)
        return out


def _checked(texts: Any) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        got = "one string" if isinstance(texts, str) else type(texts).__name__
        raise ValueError(f"texts: got {got}, expected a list of strings")
    if not texts:
        raise ValueError("texts: got an empty list, expected at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"texts: number {i} is {type(text).__name__}, expected a string")
        if not text.strip():
            raise ValueError(
                f"texts: number {i} is empty; leave it out, with its label and its weight"
            )
    return list(texts)


def depth(module: nn.Module) -> int:
    """Number of layers of an encoder; 0 if its configuration does not say."""
    return getattr(module.config, "num_hidden_layers", 0)


def learned_positions(module: nn.Module) -> nn.Embedding | None:
    """The embedding of absolute positions, where the model has one."""
    for name, child in module.named_modules():
        if name.endswith("position_embeddings") and isinstance(child, nn.Embedding):
            return child
    return None


def _most(module: nn.Module, tokenizer: Any = None) -> int:
    """The most tokens that a model, and its tokenizer, takes."""
    most = getattr(tokenizer, "model_max_length", 10**9)
    positions = learned_positions(module)
    if tokenizer is not None:
        most = min(most, getattr(module.config, "max_position_embeddings", most))
    if positions is not None:  # RoBERTa's positions start behind its padding id
        first = 0 if positions.padding_idx is None else positions.padding_idx + 1
        most = min(most, len(positions.weight) - first)
    return most


def require_ids(module: nn.Module, x: Tensor, mask: Tensor) -> None:
    """Refuse token ids of another vocabulary, texts of padding alone, and texts that are too long.

    The values are looked at on a CPU only; elsewhere a look would wait for the device.
    """
    if x.device.type == "cpu" and x.numel() and not transforming():
        words = len(module.get_input_embeddings().weight)
        if not 0 <= int(x.min()) <= int(x.max()) < words:
            raise ValueError(
                f"x: token ids from {int(x.min())} to {int(x.max())}, but the encoder has {words}; "
                "use the ids of its own tokenizer"
            )
        if empty := (~mask.any(1)).nonzero().flatten().tolist():
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            raise ValueError(
                f"x: the texts in rows {', '.join(map(str, empty[:5]))}{more} are empty, padding "
                "alone; leave them out, with their labels and their weights"
            )
    width, most = mask.shape[1], _most(module)
    if width > most and learned_positions(module).padding_idx is not None:  # it counts tokens alone
        width = int(mask.sum(1).max())
    if width > most:
        raise ValueError(
            f"x: texts are too long, {width} tokens, and the model takes at most {most}; cut them "
            f"off with the tokenizer's truncation=True, max_length={most}"
        )


def encoder(place: str | Path | None = None, max_length: int | None = None) -> Encoder:
    """Return a Hugging Face encoder with its tokenizer, by hub name or folder.

    Args:
        place: A folder, a name on the hub, or ``"tiny"`` (see `tiny`). By default
            ``bert-base-uncased`` if it lies in the hub's local cache or the hub answers within
            seconds; otherwise a local folder (that of the environment variable
            ``BILEVEL_LITE_MODELS`` or one in it, then ``models/`` beside the folder
            ``BILEVEL_LITE_DATA``); otherwise `tiny`.
        max_length: Tokens of a text that are read; by default 100, or as many as the model takes.

    Raises:
        ImportError: without transformers.
        EncoderError: (a ValueError) for a folder that holds no encoder with its tokenizer, a hub
            that does not answer (within seconds, naming what lies on this machine), a tokenizer of
            another model, or a ``max_length`` beyond what the model takes.

    Example:
        >>> from bilevel_lite import text
        >>> words = text.tiny()  # no file and no network; text.encoder("bert-base-uncased") needs
        >>> words.ids(["What is a hypergradient ?", "Who asks ?"]).shape
        torch.Size([2, 7])
    """
    if place == "tiny":
        return tiny(max_length=max_length)
    if place is not None:
        return _loaded(str(place), max_length)
    if _cached(DEFAULT) or not _silence(DEFAULT):
        try:
            return _loaded(DEFAULT, max_length)
        except EncoderError as error:
            if str(error).startswith("max_length"):
                raise
    found = local()
    return _loaded(str(found[0]), max_length) if found else tiny(max_length=max_length)


def local() -> list[Path]:
    """Folders on this machine that hold a model, `BILEVEL_LITE_MODELS` first; see `encoder`."""
    own, data = os.environ.get("BILEVEL_LITE_MODELS"), os.environ.get("BILEVEL_LITE_DATA")
    places = [Path(own)] if own else []
    places += [Path(data).resolve().parent / "models"] if data else []
    folders = [f for p in places if p.is_dir() for f in (p, *sorted(p.iterdir()))]
    return [folder for folder in folders if (folder / "config.json").is_file()]


def _loaded(place: str, max_length: int | None) -> Encoder:
    tools, folder = transformers(), Path(place).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise EncoderError(f"place: the folder {place} holds no model (no config.json)")
        place, alone = str(folder), True
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", place) or place.startswith("."):
        raise EncoderError(f"place: there is no folder {place}, and no hub has such a name")
    else:
        alone = _cached(place)
        if not alone and (why := _silence(place)):
            others = ", ".join(map(str, local())) or "none is here; see BILEVEL_LITE_MODELS"
            raise EncoderError(
                f"place: {place} is no folder and not in the hub's cache, and the hub {why}; give "
                f"a folder (on this machine: {others}) or take bilevel_lite.text.tiny()"
            )
    try:
        with _quiet():
            config = tools.AutoConfig.from_pretrained(place, local_files_only=alone)
            module, said = tools.AutoModel.from_pretrained(
                place, config=config, local_files_only=alone, output_loading_info=True
            )
            tokenizer = tools.AutoTokenizer.from_pretrained(place, local_files_only=alone)
    except Exception as error:  # whatever is wrong with the files: transformers raises all kinds
        reason = " ".join(str(error).split())[:200]
        raise EncoderError(
            f"place: {place} holds no encoder with its tokenizer ({type(error).__name__}: {reason})"
        ) from error
    name = folder.resolve().name if folder.is_dir() else place
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of no files
        raise EncoderError(
            f"place: {place} holds no tokenizer (tokenizer.json, vocab.txt or the like), so that "
            "every word would be unknown; put the model's own beside its weights"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise EncoderError(f"place: {name} is an encoder with a decoder; give an encoder alone")
    missing = list(said["missing_keys"])
    others = [key for key in missing if "pooler" not in key]
    if others:
        raise EncoderError(
            f"place: {name} lacks the weights of {others[0]!r}"
            + (f" and {len(others) - 1} more" if len(others) > 1 else "")
            + "; they would be random"
        )
    if missing:  # a random pooler is none
        module.pooler = None
    return Encoder(module, tokenizer, name, _length(max_length, _most(module, tokenizer)))


def _length(asked: int | None, most: int) -> int:
    return min(LENGTH, most) if asked is None else asked


def _cached(name: str) -> bool:
    """Whether a model lies in the hub's local cache."""
    try:
        find = import_module("huggingface_hub").try_to_load_from_cache
        files = [find(name, f) for f in ("config.json", "model.safetensors", "pytorch_model.bin")]
    except Exception:  # not a name that a hub may have, or no hub's library
        return False
    config, *weights = (isinstance(file, str) for file in files)
    return config and any(weights)


def _silence(name: str) -> str:
    """Why the hub cannot be asked; "" if it answers, whatever it says."""
    if any(os.environ.get(key, "0") not in ("0", "") for key in OFFLINE):
        return "is switched off (HF_HUB_OFFLINE)"
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    said: list[str] = []

    def ask():
        request = urllib.request.Request(f"{host}/{name}/resolve/main/config.json", method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS):
                said.append("")
        except urllib.error.HTTPError:  # an answer, too
            said.append("")
        except Exception as error:
            said.append(f"does not answer ({error})")

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit
    thread.start()
    thread.join(SECONDS)
    return said[0] if said else f"does not answer within {SECONDS:g} seconds"


class _Words:
    """A tokenizer without a file: lower-case words and signs, each to an id by its checksum."""

    pad_token_id, cls, sep, model_max_length = 0, 1, 2, 128
    all_special_ids = (0, 1, 2)

    def __init__(self, size: int):
        self.size = size
        self.mask_token_id = size - 1  # a word may share it, as any two may share an id

    def __len__(self) -> int:
        return self.size

    def __call__(self, texts, truncation=False, max_length=None, verbose=True):
        rows = []
        for text in texts:
            words = re.findall(r"\w+|[^\w\s]", text.lower())
            row = [3 + zlib.crc32(word.encode()) % (self.size - 3) for word in words]
            row = row[: max_length - 2] if truncation else row
            rows.append([self.cls, *row, self.sep])
        return {"input_ids": rows}


def tiny(
    layers: int = 2,
    width: int = 32,
    heads: int = 2,
    words: int = 500,
    max_length: int | None = None,
    seed: int = 0,
) -> Encoder:
    """Return a small BERT with random weights: no file, no network, and no claim.

    It keeps chapters and tests running where no pretrained encoder can be had.

    Args:
        layers: Number of layers.
        width: Size of a token's vector; feed-forward blocks have twice that.
        heads: Attention heads, a divisor of ``width``.
        words: Size of the vocabulary; two words may share an id.
        max_length: As in `encoder`.
        seed: Of the weights.

    Raises:
        ImportError: without transformers.

    Example:
        >>> from bilevel_lite import text
        >>> print(text.tiny().description)
        tiny (BertModel, 2 layers, 38 thousand parameters): random weights, claims nothing
    """
    tools, tokenizer = transformers(), _Words(words)
    config = tools.BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=tokenizer.model_max_length,
    )  # fmt: skip
    with _quiet():
        torch.manual_seed(seed)
        module = tools.BertModel(config)
    length = _length(max_length, tokenizer.model_max_length)
    return Encoder(module, tokenizer, "tiny", length, "random weights, claims nothing")
