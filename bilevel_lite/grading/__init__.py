"""Grade notebooks: ``python -m bilevel_lite grade NOTEBOOK ...``.

Each submission runs in a process of its own, with limits of time and of what it writes. There its
answers are handed to the checks of `bilevel_lite.exercises`, on draws that no student has seen, and
all that they do is written down. Then this process, which never runs a line of a submission, holds
the same check on the record (`transcript`). "correct" is said where both say so: what a submission
prints, returns from its own ``check`` or changes in the package cannot make it so.

What this does not do: it is no sandbox. A submission runs with the rights of who grades; it is kept
from opening notebooks and from starting programs by a hook in Python, no more. It can read the
checks, and take a truth out of one. An answer that is an object of the package (`OBJECTS`) is
judged in its own process only: ``confirmed`` is then false.
"""

import csv
import io
import json
import os
import re
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bilevel_lite import __version__, exercises
from bilevel_lite.grading.transcript import CannotReplay, Replay

__all__ = ["cells", "expected", "grade", "notebooks", "said", "summary", "writable", "write"]

CALL = re.compile(r"\bcheck\(\s*[\"'](\d+[a-z]?\.(?:\d+|[A-Z]))[\"']")
TITLE = re.compile(r"^# (\d+[a-z]?)\. ", re.MULTILINE)
HEADING = re.compile(r"^### Exercise (\d+[a-z]?\.\d+)\b", re.MULTILINE)
EDITION = re.compile(r'"edition": *"(\w+)"')  # in the metadata of a student's chapter
LARGEST = 2**28  # bytes that are read of a record
COLUMNS = ["file", "chapter", "exercise", "counts", "verdict", "message", "seconds", "confirmed",
           "note", "seed"]  # fmt: skip
DAY = 86_400.0  # seconds


def cells(path: str | Path) -> tuple[list[str], str]:
    """The sources of a notebook's code cells, and its whole text.

    Raises:
        ValueError: with one sentence, if there is no notebook at ``path``.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError("There is no such file.")
    if path.is_dir():
        raise ValueError("This is a folder without notebooks.")
    if path.suffix.lower() != ".ipynb":
        raise ValueError("This is no notebook: a name that ends in .ipynb was expected.")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The file cannot be read ({type(error).__name__}).") from None
    if not text.strip():
        raise ValueError("The file is empty.")
    try:
        found = json.loads(text)["cells"]
        found = [(cell["cell_type"], "".join(cell["source"])) for cell in found]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("This is no notebook: a list of cells in JSON was expected.") from None
    return [source for kind, source in found if kind == "code"], "\n\n".join(s for _, s in found)


def expected(text: str) -> list[str]:
    """The exercises and stops that a notebook should answer, in the order of their chapters.

    All of a chapter, if the notebook has its title; else those that it names in a heading or a
    check.
    """
    title = TITLE.search(text)
    whole = exercises.known(title[1]) if title else []
    named = list(dict.fromkeys(HEADING.findall(text) + CALL.findall(text)))
    return whole + [number for number in named if number not in whole and _exists(number)]


def _exists(number: str) -> bool:
    return number in exercises.known(re.match(r"\d+[a-z]?", number)[0])


OTHERS = (".zip", ".7z", ".rar", ".tar", ".gz", ".pdf", ".html", ".py")  # handed in by mistake


def notebooks(paths: list[str | Path]) -> list[Path]:
    """The submissions: each path, of a folder the notebooks below.

    A folder inside a folder that holds no notebook, and what looks like a submission and is none,
    are among them, so that nobody is left out in silence.

    Raises:
        ValueError: if nothing is given.
    """
    files = []
    for path in map(Path, paths):
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        inside = [
            p for p in inside if not any(x.startswith(".") for x in p.parts[len(path.parts) :])
        ]
        found = [p for p in inside if p.suffix.lower() == ".ipynb" and p.is_file()]
        empty = [p for p in inside if p.parent == path and p.is_dir()
                 and not any(p in one.parents for one in found)]  # fmt: skip
        others = [p for p in inside if p.suffix.lower() in OTHERS and p.parent not in empty]
        files += sorted([*found, *empty, *others]) or [path]
    if not files:
        raise ValueError("notebooks: none given")
    return files


def grade(
    paths: list[str | Path],
    seed: int | None = None,
    timeout: float = 600.0,
    each: Callable[[dict], None] | None = None,
) -> dict:
    """Grade submissions, one after the other.

    Args:
        paths: Notebooks, or folders: then all `notebooks` below.
        seed: Of the draws, the same for all submissions; drawn if left out. It is in the result.
        timeout: Seconds that a submission may run; one cell may run for a quarter of it.
        each: Called after each submission, with the result so far.

    Returns:
        ``{"version", "seed", "timeout", "submissions": [{"file", "chapter", "error", "note",
        "correct", "of", "exercises": [{"exercise", "verdict", "message", "seconds",
        "confirmed"}]}]}``. A verdict is "correct", "not yet", "not attempted" or "error";
        ``correct`` and ``of`` count exercises, not the stops inside a chapter.

    Raises:
        ValueError: if ``timeout`` is not positive or above a day, or nothing is given.
    """
    if not 0 < timeout <= DAY:
        raise ValueError(f"timeout: got {timeout}, expected seconds above 0 and up to a day")
    seed = secrets.randbelow(2**31) if seed is None else int(seed)
    result = {"version": __version__, "seed": seed, "timeout": timeout, "submissions": []}
    usual = torch.get_default_dtype()
    for path in notebooks(paths):
        torch.set_default_dtype(torch.float64)  # as in the notebooks
        try:
            result["submissions"].append(_submission(path, seed, timeout))
        finally:
            torch.set_default_dtype(usual)
        if each is not None:
            each(result)
    return result


def _submission(path: Path, seed: int, timeout: float) -> dict:
    shown = os.fsencode(path).decode("utf-8", "replace")
    out = {"file": shown, "chapter": "", "error": "", "note": "", "correct": 0, "of": 0,
           "exercises": []}  # fmt: skip
    try:
        sources, text = cells(path)
        title = TITLE.search(text)
        out["chapter"] = title[1] if title else ""
        asked = expected(text)
        if not asked:
            raise ValueError("It is no chapter of the course, and no cell calls a check.")
    except ValueError as error:
        return {**out, "error": str(error)}
    records, end = _run(sources, seed, timeout)
    stopped = {r["cell"]: _clean(r["stopped"]) for r in records if "cell" in r}
    calls = [r for r in records if isinstance(r.get("check"), str)]
    checked = {r["check"]: r for r in calls}  # the last call counts
    before = {r["check"] for r in calls if r.get("said") == ["correct", ""]}
    for number in asked:
        if number in checked:
            verdict, message, confirmed = _verdict(number, checked[number], seed)
            if verdict == "not attempted" and number in before:
                message = "An earlier call of this check said correct; the last one counts, a stub."
        else:
            verdict, message, confirmed = "error", _absent(number, sources, stopped, end), True
        seconds = checked.get(number, {}).get("seconds", 0.0)
        seconds = round(seconds, 2) if isinstance(seconds, float) else 0.0
        row = {"exercise": number, "verdict": verdict, "message": _clean(message)}
        out["exercises"].append({**row, "seconds": seconds, "confirmed": confirmed})
    if stopped:
        cell = min(stopped)
        more = f" (and {len(stopped) - 1} more)" if len(stopped) > 1 else ""
        out["note"] = f"Code cell {cell + 1} stopped{more}: {stopped[cell]}"
    made = EDITION.search(path.read_text("utf-8"))
    if made and out["chapter"] and made[1] != exercises.edition(out["chapter"]):
        end = f"{end} It was made with another edition of this chapter; exercises differ.".strip()
    if end:
        out["note"] = f"{end} {out['note']}".strip()
    counted = [row for row in out["exercises"] if not row["exercise"][-1].isalpha()]
    right = sum(row["verdict"] == "correct" for row in counted)
    return {**out, "correct": right, "of": len(counted)}


def _run(sources: list[str], seed: int, timeout: float) -> tuple[list[dict], str]:
    """Run the cells in a process of their own: its records, and a sentence if it did not end."""
    home = Path(__file__).resolve().parents[2]
    shown = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ, "PYTHONPATH": shown, "MPLBACKEND": "Agg", "BILEVEL_LITE_PROGRESS": "0",
        "BILEVEL_LITE_DEVICE": "cpu", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as folder:
        file = Path(place, "answers.record")
        order = {"cells": sources, "seed": seed, "cell": timeout / 4, "file": str(file)}
        process = subprocess.Popen(
            [sys.executable, "-m", "bilevel_lite.grading.worker"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        start, end = time.monotonic(), ""
        try:
            process.communicate(json.dumps(order).encode() + b"\n", timeout=timeout)
        except subprocess.TimeoutExpired:
            end = f"It was stopped after {timeout:g} s."
        finally:
            _kill(process)
        records = _read(file)
        if not end and not (records and records[-1].get("end") is True):
            end = f"Its process ended by itself after {time.monotonic() - start:.0f} s."
        return records, end


def _kill(process) -> None:
    """End a process and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


def _read(file: Path) -> list[dict]:
    """The records of a file, as far as they are whole; they hold data only, never code."""
    data, records = b"", []
    if file.exists():
        with file.open("rb") as opened:
            data = opened.read(LARGEST)
    while len(data) >= 8:
        (size,) = struct.unpack(">Q", data[:8])
        if len(data) < 8 + size:
            break
        try:
            record = torch.load(io.BytesIO(data[8 : 8 + size]), weights_only=True)
        except Exception:  # written by the submission, then
            break
        if isinstance(record, dict):
            records.append(record)
        data = data[8 + size :]
    return records


# The answer is a method of the package, which the check runs: no record holds that.
OBJECTS = {"9.5"}
VERDICTS = {"correct": "correct", "not yet": "not yet", "not attempted yet": "not attempted"}


def _verdict(number: str, record: dict, seed: int) -> tuple[str, str, bool]:
    """(verdict, message, confirmed): what the submission's process said, judged again here."""
    if "stopped" in record:
        return "error", str(record["stopped"]), True
    try:
        there, message = record["said"]
        there, message = VERDICTS[there], str(message)
        with exercises.fresh(seed):
            here, why = exercises.judge(number, Replay(record).answer)
    except CannotReplay as why:
        if there == "correct" and number not in OBJECTS:
            return "error", f"Its check cannot be held again, and so does not count: {why}.", True
        return there, message, there != "correct"
    except Exception:
        return "error", "The record of its answer is damaged.", True
    if there == "correct" and here != "correct":
        return VERDICTS[here], f"{why} (In its own process the check said correct.)".strip(), True
    return there, message, True


def _absent(number: str, sources: list[str], stopped: dict[int, str], end: str) -> str:
    """Why no answer came."""
    holding = [k for k, source in enumerate(sources) if number in CALL.findall(source)]
    if not holding:
        return f'No cell calls bl.exercises.check("{number}", ...).'
    for k in holding:
        if k in stopped:
            return f"Its cell stopped before the check: {stopped[k]}"
    return end or "Its cell ran, but no answer reached the grader: is the check replaced there?"


def _clean(text: str) -> str:
    """One line of at most 400 characters."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:400]


def summary(result: dict) -> str:
    """A line for each submission, and one for each of its exercises that is not correct."""
    return "\n".join([f"seed {result['seed']}", *map(said, result["submissions"])])


def said(one: dict) -> str:
    """The lines of `summary` for one submission."""
    if one["error"]:
        return f"{one['file']}: {one['error']}"
    lines = [f"{one['file']}: {one['correct']} of {one['of']} exercises"]
    lines += [f"  note: {one['note']}"] * bool(one["note"])
    for row in one["exercises"]:
        if row["verdict"] != "correct":
            lines.append(f"  {row['exercise']} {row['verdict']}. {row['message']}".rstrip())
        elif not row["confirmed"]:
            lines.append(f"  {row['exercise']} correct, but judged in its own process only")
    return "\n".join(lines)


def writable(paths: list[Path], **files: str | Path | None) -> None:
    """Refuse, before any work is done, a file that is a submission or cannot be written.

    Args:
        paths: The submissions.
        files: Of `write`, by the names in its messages.

    Raises:
        ValueError: naming the file.
    """
    for name, path in ((name, path) for name, path in files.items() if path is not None):
        if Path(path).resolve() in {one.resolve() for one in paths}:
            raise ValueError(f"{name}: {path} is a submission, which would be lost; give another")
        with _writing(name, path):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()


@contextmanager
def _writing(name: str, path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name}: {path} cannot be written ({error.strerror})") from None


def write(result: dict, out: str | Path | None = None, table: str | Path | None = None) -> None:
    """Write a result as JSON to ``out``, and as CSV to ``table``, a line for each exercise.

    Marks are the lines whose verdict is "correct" and that count (the stops do not). The CSV begins
    with a mark by which spreadsheets know UTF-8.

    Raises:
        ValueError: as `writable`.
    """
    writable([Path(one["file"]) for one in result["submissions"]], out=out, csv=table)
    if out is not None:
        with _writing("out", out):
            Path(out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    if table is not None:
        with (
            _writing("csv", table),
            Path(table).open("w", encoding="utf-8-sig", newline="") as file,
        ):
            rows = csv.DictWriter(file, COLUMNS)
            rows.writeheader()
            rows.writerows(_rows(result))


def _rows(result: dict) -> Iterator[dict]:
    """The lines of the CSV."""
    for one in result["submissions"]:
        shared = {"file": one["file"], "chapter": one["chapter"], "note": one["note"],
                  "seed": result["seed"]}  # fmt: skip
        if one["error"]:
            yield {**shared, "verdict": "error", "message": one["error"]}
        for row in one["exercises"]:
            yield {**shared, **row, "counts": row["exercise"][-1].isdigit()}
