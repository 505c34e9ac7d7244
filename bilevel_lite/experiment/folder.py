"""Long runs that lose nothing: a folder that can be stopped at any moment and resumed.

A run writes into one folder: ``config.json`` (its settings), ``log.jsonl`` (a line per evaluation),
``checkpoint.pt`` (everything that the next step depends on, replaced atomically), and at the end
``result.json`` with its provenance. What is large and seldom changes stands in a file of its own
(``best-N.pt``), so that it is not written again with each checkpoint. Resuming cuts the log back to
the checkpoint and goes on; the numbers are those of a run that was never interrupted.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["RunError", "RunFolder", "collect", "figures_folder", "provenance", "stored"]

FORMAT = 2  # of the folder; raised when an older folder can no longer be resumed
# what a folder holds before anything was done; the last is a search's
BEGUN = {".lock", "config.json", "log.jsonl", "trials.db"}
RESULT_FORMAT = 1  # of a result; raised when an older result can no longer be read
_PACKAGE = Path(__file__).resolve().parent.parent
_REPOSITORY = _PACKAGE.parent
_SHIPPED = _PACKAGE / "_results"  # of the book; only an installed package has them


class RunError(RuntimeError):
    """A run cannot start, go on, or write; the message says why and what is kept."""


class RunFolder:
    """The output folder of one run, held by one process.

    Args:
        path: The folder; made if missing.
        config: The settings, JSON values only. A folder made with other settings is refused.
        only_look: Make, lock and write nothing: another process may be at work there.

    Raises:
        RunError: if the folder cannot be written, is in use by another process, was made with
            other settings or by another version, or holds a file that cannot be read.
    """

    def __init__(self, path: str | Path, config: dict, only_look: bool = False):
        from filelock import FileLock, Timeout

        self.path, self.only_look = Path(path), only_look
        self.config = json.loads(json.dumps({"format": FORMAT, **config}))
        if only_look:
            self._read()
            return
        with self._writing("made"):
            self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._before = set(os.listdir(self.path))
            self._lock = FileLock(self.path / ".lock")
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise RunError(f"{self.path} is in use by another process") from None
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _read(self) -> bool:
        """Read and compare what is there; False if it is nothing."""
        told = (self.path / "config.json").exists()
        if told:
            self._compare(_read(self.path / "config.json", "use another folder"))
        try:
            self.state = self._read_checkpoint()
        except RunError:
            if not self.finished:
                raise
            self.state = None  # the result stands without it
        if self.state and "config" in self.state:  # checkpoints of earlier versions do not tell
            self._compare(self.state["config"])
        elif not told and (self.state or self.finished):
            raise RunError(
                f"{self.path} has lost its config.json, so that nobody knows the settings of what "
                "it holds; use another folder"
            )
        return told

    def _open(self):
        log = self.path / "log.jsonl"
        size = log.stat().st_size if log.exists() else 0
        self._new = not self._read()
        if self._new and size and self.state is None:
            raise RunError(f"{log} is of nothing that was run here; use another folder")
        if self._new:
            self._write("config.json", _json(self.config))
        if self.state is None and self.finished:
            return  # finished and thinned: the log is whole
        kept = self.state["log_bytes"] if self.state else 0
        if size < kept:
            raise RunError(f"{log} is shorter than its checkpoint says: it was changed; start anew")
        with self._writing("written"), open(log, "ab") as file:
            file.truncate(kept)
        if not self.finished:
            self.rows()  # a damaged line is told now and not at the end

    @property
    def finished(self) -> bool:
        """Whether it holds a result."""
        return (self.path / "result.json").exists()

    def _compare(self, there: dict):
        if there.get("format") != FORMAT:
            raise RunError(
                f"{self.path} was made by another version (format {there.get('format')!r}, this "
                f"one writes {FORMAT}); use another folder"
            )
        differences = [
            f"{key}: {there.get(key)!r} there, {self.config.get(key)!r} here"
            for key in sorted(there.keys() | self.config.keys())
            if there.get(key) != self.config.get(key)
        ]
        if differences:
            raise RunError(
                f"{self.path} was made with other settings ({'; '.join(differences)}); "
                "give the same settings to resume it, or another folder"
            )

    def _read_checkpoint(self) -> dict | None:
        if not (self.path / "checkpoint.pt").exists():
            return None
        state = self.read_tensors("checkpoint.pt", "log_bytes")
        if not isinstance(state["log_bytes"], int):
            raise RunError(f"{self.path / 'checkpoint.pt'} is damaged; {self._anew()}")
        return state

    def _anew(self) -> str:
        return f"remove {self.path / 'checkpoint.pt'} to start this run anew"

    def read_tensors(self, name: str, *parts: str) -> dict:
        """Read what `write_tensors` wrote, onto the CPU.

        Args:
            name: Of the file.
            parts: What it must hold.

        Raises:
            RunError: if it is missing or damaged, or cannot be read.
        """
        path = self.path / name
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            return {**state, **{part: state[part] for part in parts}}
        except MemoryError:
            raise
        except FileNotFoundError:
            raise RunError(f"{path} is missing; {self._anew()}") from None
        except OSError as error:  # it may be whole
            raise RunError(f"{path} cannot be read: {error}") from error
        except Exception as error:  # whatever a damaged file makes the reader raise
            raise RunError(f"{path} is damaged ({type(error).__name__}); {self._anew()}") from error

    def write_tensors(self, name: str, state: dict) -> None:
        """Write a file of tensors; after a crash there is the old one, if any, or the new one.

        Args:
            name: Of the file.
            state: Tensors, numbers, strings, and lists and dicts of them.

        Raises:
            RunError: if it cannot be written, or could not be read back; the previous one is kept.
        """
        content = io.BytesIO()  # first: written by torch itself, a full disk is told in its words
        torch.save(state, content)
        content.seek(0)
        try:
            torch.load(content, weights_only=True)
        except pickle.UnpicklingError as error:
            raise RunError(
                f"{self.path / name}: {_odd(state) or 'something'} cannot be kept in a checkpoint; "
                "expected tensors, numbers, strings, and lists and dicts of them"
            ) from error
        self._replace(name, content.getbuffer())

    def remove(self, pattern: str, but: str = "") -> None:
        """Remove the files that match, all but one."""
        for path in self.path.glob(pattern):
            if path.name != but:
                path.unlink(missing_ok=True)

    def log(self, row: dict) -> None:
        """Append one line to the log.

        Raises:
            RunError: if it cannot be written.
        """
        with self._writing("written"), open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            _settle(file)  # or after a power cut a checkpoint may know more lines than there are

    def checkpoint(self, state: dict) -> None:
        """Replace the checkpoint by ``state``; after a crash there is the old one or the new one.

        Args:
            state: Tensors, numbers, strings, and lists and dicts of them.

        Raises:
            RunError: if it cannot be written; the previous checkpoint is kept.
        """
        log = self.path / "log.jsonl"
        own = {"log_bytes": log.stat().st_size, "config": self.config}
        self.write_tensors("checkpoint.pt", {**state, **own})

    def rows(self) -> list[dict]:
        """Read the log back.

        Raises:
            RunError: if a line is damaged.
        """
        log, anew = self.path / "log.jsonl", self.path / "checkpoint.pt"
        # of a run at work the log may be ahead of the checkpoint, and its last line half written
        end = (self.state["log_bytes"] if self.state else 0) if self.only_look else None
        return [
            _object(line, f"{log}, line {number},", f"remove {anew} to start this run anew")
            for number, line in enumerate(log.read_bytes()[:end].splitlines(), 1)
        ]

    def read_result(self) -> dict:
        """Read ``result.json`` of a finished run.

        Raises:
            RunError: if it cannot be read, was edited, or was made by another version.
        """
        return read_sealed(self.path / "result.json")

    def finish(self, result: dict) -> None:
        """Write ``result.json``, sealed."""
        self._write("result.json", _json(seal(result)))

    def close(self) -> None:
        """Let another process use the folder."""
        if not self.only_look:
            self._lock.release()

    def __enter__(self):
        return self

    def __exit__(self, failed: type[BaseException] | None, *_):
        empty = failed is not None and not self.only_look and self._new
        empty = empty and set(os.listdir(self.path)) - self._before <= BEGUN
        empty = empty and not (self.path / "log.jsonl").stat().st_size
        self.close()
        if empty:  # it was begun here and holds nothing: as if it had not been
            for name in BEGUN - self._before:
                self.remove(name)
            with suppress(OSError):  # something else is in it
                for path in self._made:
                    path.rmdir()

    def _write(self, name: str, text: str):
        self._replace(name, text.encode())

    def _replace(self, name: str, content: bytes | memoryview):
        """Write a file; after a crash, or a power cut, there is the old one or the new one."""
        with self._writing("written"):
            temporary = self.path / f"{Path(name).stem}.tmp"
            with open(temporary, "wb") as file:
                file.write(content)
                _settle(file)
            os.replace(temporary, self.path / name)
            with suppress(OSError), _opened(self.path) as folder:  # Windows opens no folders
                os.fsync(folder)

    def _writing(self, verb: str):
        kept = "; the last checkpoint is kept, and the same command resumes"
        return writing(self.path, verb, kept)


def _settle(file: Any) -> None:
    """Have a file's content on the disk, and not in the system's memory alone."""
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _opened(folder: Path):
    number = os.open(folder, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def _odd(value: Any, at: str = "state") -> str | None:
    """Where in a state there is something that is neither torch's nor plain Python's."""
    if type(value) in (dict, OrderedDict, list, tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        found = (_odd(part, f"{at}[{key!r}]") for key, part in parts)
        return next(filter(None, found), None)
    plain = isinstance(value, torch.Tensor) or type(value).__module__ in ("builtins", "torch")
    return None if plain else f"{at}, a {type(value).__module__}.{type(value).__name__},"


@contextmanager
def writing(path: Path, verb: str = "written", kept: str = ""):
    """Around what writes: the operating system's refusal becomes one sentence, a `RunError`.

    Args:
        path: What is written.
        verb: What is done to it.
        kept: What to add where the disk is full.
    """
    try:
        yield
    except RunError:
        raise
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            reason = f"the disk is full{kept}"
        else:
            reason = str(error)
        raise RunError(f"{path} cannot be {verb}: {reason}") from error


def _json(value: dict) -> str:
    return json.dumps(value, indent=1) + "\n"


def _object(text: bytes, what: str, way_out: str) -> dict:
    """A JSON object, or one sentence."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunError(f"{what} cannot be read: {error}; {way_out}") from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise RunError(f"{what} cannot be read: got a {kind}, expected an object; {way_out}")
    return value


def _read(path: Path, way_out: str) -> dict:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error}; {way_out}") from error
    return _object(text, str(path), way_out)


def read_sealed(path: Path) -> dict:
    """Read a result without its seal.

    Raises:
        RunError: if it cannot be read, was made by another version, or edited.
    """
    return unseal(_read(path, "remove it and make it anew"), path)


def seal(result: dict) -> dict:
    """Add the format's number and a hash of the content, by which an edited file is told."""
    content = json.loads(json.dumps({**result, "result_format": RESULT_FORMAT}))
    return {**content, "sha256": _digest(content)}


def unseal(sealed: dict, path: Path) -> dict:
    """Return a result without its seal.

    Raises:
        RunError: if it was made by another version, or edited.
    """
    content = dict(sealed)
    digest = content.pop("sha256", None)
    if content.get("result_format") != RESULT_FORMAT:
        raise RunError(
            f"{path} was made by another version (result format "
            f"{content.get('result_format')!r}, this one reads {RESULT_FORMAT}); make it anew"
        )
    if digest != _digest(content):
        raise RunError(f"{path} was edited: its content does not match its sha256; make it anew")
    del content["result_format"]
    return content


def _digest(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def compact(value: dict) -> str:
    """A result as JSON text, a line for each of its top-level entries and for each run."""
    runs = ",\n".join(json.dumps(run) for run in value["runs"])
    rest = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items() if k != "runs"]
    return "{" + ",\n".join([*rest, f'"runs": [\n{runs}\n]']) + "}\n"


def place(device: torch.device) -> dict:
    """On what numbers are made: commit, device and versions."""
    import numpy

    import bilevel_lite

    return {
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": {
            "bilevel_lite": bilevel_lite.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": numpy.__version__,
        },
    }


def provenance(
    device: torch.device, seed: int, seconds: float, before: Sequence[dict] = ()
) -> dict:
    """Say where a number comes from: command, commit, device, versions, seed, date, time.

    Args:
        device: The device that was used.
        seed: The seed.
        seconds: As a `Clock` counts them, all parts of an interrupted run added up.
        before: The other places on which parts of it were made.
    """
    return {
        "command": shlex.join(["python", "-m", "bilevel_lite", *sys.argv[1:]]),
        **place(device),
        **({"before": list(before)} if before else {}),
        "seed": seed,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "seconds": round(seconds, 1),
    }


def _commit() -> str | None:
    """The commit of the source tree, with "+" if tracked files were changed; None outside git."""

    def git(*words):
        return subprocess.run(
            ["git", *words], cwd=_REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


class Clock:
    """Seconds of a run, added up over its interruptions; evaluation can be kept out of them.

    With one CPU thread they are processor time, which other work on the machine does not change;
    otherwise wall time, on a GPU with its queue emptied.

    Args:
        seconds: To start from.
        device: Where the work runs.
        waits: Whether it waits for other processes, so that processor time would not do.
    """

    def __init__(
        self, seconds: float = 0.0, device: torch.device | str = "cpu", waits: bool = False
    ):
        self.seconds, self._since, self._device = seconds, None, torch.device(device)
        alone = self._device.type != "cuda" and torch.get_num_threads() == 1 and not waits
        self._now = time.process_time if alone else time.perf_counter

    def _wait(self):
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def __enter__(self):
        self._wait()
        self._since = self._now()

    def __exit__(self, *_):
        self._wait()
        self.seconds += self._now() - self._since


def in_checkout() -> bool:
    """Whether this package runs from a checkout of the book and is not an installed copy."""
    return not _SHIPPED.is_dir()


def figures_folder(to: str | Path | None = None) -> Path:
    """The folder of figures, with the numbers behind them in its ``data``.

    Args:
        to: The folder itself, if it was named.

    Returns:
        ``to``; else ``figures`` of the checkout; else ``./figures``, since an installed package is
        not written into.
    """
    if to is not None:
        return Path(to)
    return _REPOSITORY / "figures" if in_checkout() else Path("figures")


def stored_names(to: str | Path | None = None) -> list[str]:
    """The names of the book's stored results, and of those in a folder of figures of one's own."""
    return sorted({path.stem for folder in _sources(to) for path in folder.glob("*.json")})


def _sources(to: str | Path | None) -> list[Path]:
    """Where stored results are looked for, in this order."""
    book = _REPOSITORY / "figures" / "data" if in_checkout() else _SHIPPED
    return [book] if to is None else [Path(to) / "data", book]


def stored(name: str, to: str | Path | None = None) -> dict:
    """Load a stored result of the book, ``figures/data/NAME.json``.

    Args:
        name: Its name.
        to: A folder of figures of one's own (`collect`), which is looked into first.

    Raises:
        ValueError: if there is none of that name.
        RunError: if it was edited, or made by another version.

    Example:
        >>> (run,) = bl.experiment.stored("bench_cpu")["runs"]
        >>> [case["model"] for case in run["cases"]]
        ['linear', 'mlp', 'lenet', 'resnet18']
    """
    for folder in _sources(to):
        path = folder / f"{name}.json"
        if path.exists():
            return read_sealed(path)
    raise ValueError(f"name: there is no stored result {name!r}; known: {stored_names(to)}")


def _without_folders(result: dict) -> dict:
    """The result with the last part alone of absolute paths, where commands and settings have them.

    Where somebody's folders lie is nobody's business, and of no use elsewhere.
    """
    path = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[\w.+-]+[/\\])+([\w.+-]+)")
    result = json.loads(json.dumps(result))
    places = [(result.get("provenance", {}), "command")]
    places += [(result.get(part, {}), "encoder") for part in ("settings", "base")]
    for where, key in places:
        if key in where:
            where[key] = path.sub(r"\1", where[key])
    return result


def _of(run: dict) -> dict:
    """What a result is of: all that was said, nothing that came out."""
    made = ("provenance", "source", "results", "baselines", "best", "history")
    said = run.get("settings")
    return {"settings": said} if said else {k: v for k, v in run.items() if k not in made}


def collect(folders: list[str], name: str, to: str | Path | None = None, add: bool = False) -> Path:
    """Gather the results of several finished runs into ``figures/data/NAME.json``.

    Args:
        folders: Output folders that hold a ``result.json`` of the same kind.
        name: Name of the stored result.
        to: Another folder than the one that `figures_folder` gives.
        add: Keep the runs that a stored result of this name holds already.

    Returns:
        The file written.

    Raises:
        RunError: if a folder holds no result, or one that was edited or made by another version, or
            that is there already, or the kinds differ, or the file cannot be written (then the old
            one is kept).
    """
    if Path(name).name != name:
        raise RunError(
            f"name: got {name!r}, expected a file's name without a folder (--to says it)"
        )
    runs = stored(name, to)["runs"] if add else []
    for folder in folders:
        path = Path(folder) / "result.json"
        if not path.exists():
            raise RunError(f"{folder} holds no result.json: is the run finished?")
        run = _without_folders(read_sealed(path))
        if any(_of(run) == _of(one) for one in runs):
            raise RunError(
                f"{folder} holds a run that is there already: the same settings and seed"
            )
        runs.append(run)
    kinds = sorted({run.get("kind") for run in runs})
    if len(kinds) != 1:
        raise RunError(f"the runs are of different kinds: {kinds}")
    target = figures_folder(to) / "data" / f"{name}.json"
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".json.tmp")  # the old file or the new one
        temporary.write_text(compact(seal({"kind": kinds[0], "runs": runs})), encoding="utf-8")
        os.replace(temporary, target)
    return target
