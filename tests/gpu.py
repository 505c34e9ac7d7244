"""What ten minutes of a GPU can show, in one command with a time limit: `make gpu`.

    gpu.py [--minutes 10] [--study "NAME ..."] [--out runs/gpu] [--device NAME] [--fresh] ...

In this order, each in processes of its own that have what is left of the time:

    tests      the tests that need a GPU
    bench      python -m bilevel_lite bench, its memory read in the same process
    notebook   every chapter and its solutions under strict nbval, at most four side by side
    study      python -m bilevel_lite study NAME ..., one after the other; a study that is stopped
               when the time is up goes on at the next call, with the numbers of one never stopped

What fails stops nothing else. All results lie in one folder; the same command goes on there: it
skips what passed, and runs again what failed or was cut off. It ends with a table, also when it is
interrupted. Exit status: 0, 1 if something failed, 130 if it was interrupted.

It runs the repository's tests and notebooks and therefore lies beside them, not in the package.
Without a GPU it does the same on the CPU, where it proves nothing about GPUs.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

BEGUN = time.monotonic()  # imports take seconds, and are part of the limit
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "chapters" / "book")]

import book  # noqa: E402
import form  # noqa: E402
from filelock import FileLock, Timeout  # noqa: E402

SIDE_BY_SIDE = 4  # notebooks; each holds a context on the GPU
GRACE = 10.0  # seconds, at most, to stop in; they are part of the limit
COMMANDS = ("study", "run", "search", "hyperclean")  # what --study may begin with
MADE = ("gpu.json", "logs", "figures", "bench-*", "study-*")  # what --fresh removes
FINISHED = ("passed", "skipped")


@dataclass
class Job:
    """One process.

    Attributes:
        part: ``"tests"``, ``"bench"``, ``"notebook"`` or ``"study"``.
        what: Which one; a job is known by part, what and device.
        command: To run in `ROOT`.
        log: Where its output goes.
        results: Where its results lie, for a table's reader; the log if it has none.
        environment: Beyond this process's.
    """

    part: str
    what: str
    command: list[str]
    log: Path
    results: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def shown(path: Path) -> str:
    """A path as it is said and stored: within the checkout without where that is."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# ------------------------------------------------------------------ what is to be done


def groups(o: argparse.Namespace) -> list[list[Job]]:
    """The jobs in their order; those of one group may run side by side."""
    package = [sys.executable, "-m", "bilevel_lite"]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    place = {"BILEVEL_LITE_DEVICE": o.device, "BILEVEL_LITE_PROGRESS": "0"}
    logs = o.out / "logs"
    out = []
    if "tests" in o.parts:
        files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in text(p)]
        command = [*pytest, "-q", "-m", "gpu", *map(shown, files)]
        out.append([Job("tests", "pytest -m gpu", command, logs / "tests.log")])
    if "bench" in o.parts:
        folder, models = o.out / f"bench-{o.device.replace(':', '-')}", o.models or []
        command = [*package, "bench", "--device", o.device, "--rounds", str(o.rounds)]
        command += ["--seconds", str(o.seconds), *(["--models", *models] if models else [])]
        command += [] if o.memory else ["--no-memory"]
        command += ["--out", shown(folder), "--to", shown(o.out / "figures")]
        what = " ".join([*(models or ["all models"]), f"x {o.rounds}"])
        out.append([Job("bench", what, command, logs / "bench.log", folder, place)])
    if "notebooks" in o.parts:
        strict = ["--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300", "-v"]
        strict += ["--nbval-sanitize-with", "tests/nbval_sanitize.cfg"]
        out.append(
            [
                Job(
                    "notebook",
                    path.stem,
                    [*pytest, *strict, shown(path)],
                    logs / f"{path.stem}.log",
                    environment={**form.ENVIRONMENT, **place},
                )  # fmt: skip
                for path in notebooks(o.chapters)
            ]
        )
    for words in o.study if "study" in o.parts else ():
        folder = o.out / f"study-{re.sub(r'[^a-z0-9.]+', '-', ' '.join(words[1:]).lower())[:80]}"
        device = [] if "--device" in words else ["--device", o.device]
        command = [*package, *words, "--out", shown(folder), *device]
        log = logs / f"{folder.name}.log"
        out.append([Job("study", shlex.join(words[1:]), command, log, folder, place)])
    return out


def text(path: Path) -> str:
    """A file's text."""
    return path.read_text("utf-8")


def notebooks(chosen: list[str] | None) -> list[Path]:
    """All notebooks, or those of some chapters, or files that are named."""
    if chosen is None:
        return form.chapters() + form.solutions()
    files = [Path(word) for word in chosen if word.endswith(".ipynb")]
    numbers = [word for word in chosen if not word.endswith(".ipynb")]
    return files + [path for number in numbers for path in book.selected(number)]


# ------------------------------------------------------------------ running it


class Slot:
    """One call: a limit, a folder, the jobs that were run in it.

    Args:
        out: The folder.
        device: The name of the device.
        seconds: The limit.
    """

    def __init__(self, out: Path, device: str, seconds: float):
        from bilevel_lite.experiment.folder import _commit

        self.out, self.device, self.commit = out, device, _commit()
        self.grace = max(0.0, min(GRACE, 0.1 * seconds))
        self.end = time.monotonic() + seconds - self.grace
        self.interrupted = False
        self.path = out / "gpu.json"
        self.records = json.loads(text(self.path)) if self.path.exists() else {}
        self.rows: list[tuple[Job, dict]] = []

    def key(self, job: Job) -> str:
        """What a job is known by in the record."""
        return f"{job.part}: {job.what} ({self.device})"

    def over(self) -> bool:
        """Whether nothing more may be started."""
        return self.interrupted or time.monotonic() >= self.end

    def run(self, jobs: list[Job]) -> None:
        """Run the jobs of a group that have not passed, so many at a time, until the time is up."""
        old = [self.records.get(self.key(job), {}) for job in jobs]
        due = []
        for job, record in zip(jobs, old, strict=True):
            if record.get("status") in FINISHED:
                at = "" if record["commit"] == self.commit else f" at {record['commit']}"
                note = f"earlier{at}: {record['note']}".rstrip(": ")
                self.rows.append((job, {**record, "note": note}))
            else:
                due.append((record.get("status") != "cut off", job))
        # what was cut off is long: it comes first, and has the most of this slot
        waiting = [job for _, job in sorted(due, key=lambda pair: pair[0])]
        running: list[tuple[Job, subprocess.Popen, float]] = []
        while running or (waiting and not self.over()):
            while waiting and len(running) < SIDE_BY_SIDE and not self.over():
                job = waiting.pop(0)
                running.append((job, start(job), time.monotonic()))
            if self.over():
                stop([process for _, process, _ in running], self.grace)
            for one in [one for one in running if one[1].poll() is not None]:
                running.remove(one)
                job, process, since = one
                self.done(job, process.returncode, time.monotonic() - since, self.over())
            time.sleep(0.05)
        for job in waiting:
            self.rows.append((job, {"status": "not reached", "seconds": 0.0, "note": ""}))

    def done(self, job: Job, code: int, seconds: float, over: bool) -> None:
        """Record what became of a job."""
        # a study that is stopped says what is left, and that is no failure
        stopped = code == 0 and job.part == "study" and not (job.results / "result.json").exists()
        status = (
            "cut off" if stopped else "passed" if code == 0 else "cut off" if over else "failed"
        )
        note = said(job, status)
        if job.part == "tests" and status == "passed" and not re.search(r"\d passed", note):
            status = "skipped"
        if job.part == "notebook" and seconds > book.SLOW:
            note = f"SLOW: more than {book.SLOW} s; {note}"
        record = {"status": status, "seconds": round(seconds, 1), "note": note}
        self.rows.append((job, record))
        self.records[self.key(job)] = {**record, "commit": self.commit}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
        print(line(job, record), flush=True)


def start(job: Job) -> subprocess.Popen:
    """Start a job in a process group of its own: it is stopped by us alone, with all it started."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "w") as log:
        return subprocess.Popen(
            job.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env={**os.environ, **job.environment}, start_new_session=True,
        )  # fmt: skip


def stop(processes: list[subprocess.Popen], grace: float) -> None:
    """Ask the processes to stop as the keyboard does; kill what has not after a while."""
    end = time.monotonic() + 0.8 * grace
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in [process for process in processes if process.poll() is None]:
            os.killpg(process.pid, number)  # with what it started
        while any(process.poll() is None for process in processes):
            if number == signal.SIGINT and time.monotonic() >= end:
                break
            time.sleep(0.02)


# ------------------------------------------------------------------ saying it


def said(job: Job, status: str) -> str:
    """What a job's log or folder says of how far it came, or of why it failed."""
    log = job.log.read_text("utf-8", errors="replace")
    last = ([row for row in log.splitlines() if row.strip()] or [""])[-1].strip("= ")
    if job.part == "notebook":
        count = {
            word: len(re.findall(rf"^\S.* {word}", log, re.M)) for word in ("PASSED", "FAILED")
        }
        if any(count.values()):
            return "cells: " + ", ".join(f"{n} {word.lower()}" for word, n in count.items() if n)
    if job.part == "tests" or status == "failed":
        return last
    if job.part == "study" and job.command[3] in ("study", "search"):
        finals = len(list(job.results.glob("*/result.json")))
        return f"{finals} final runs are done" if status == "passed" else last
    return ""


def line(job: Job, record: dict) -> str:
    """One line of the table."""
    made = job.results and job.results.exists() and record["status"] != "failed"
    where = shown(job.results if made else job.log)
    parts = [record["note"], where if record["status"] != "not reached" else ""]
    return (
        f"{job.part:<9} {job.what[:38]:<38} {record['seconds']:8.1f}  {record['status']:<11} "
        + "; ".join(part for part in parts if part)
    ).rstrip()


def table(slot: Slot) -> str:
    """All jobs, what remains, and how to take the results into the book."""
    lines = ["", f"{'part':<9} {'what':<38} {'seconds':>8}  {'result':<11} where", "-" * 90]
    lines += [line(job, record) for job, record in slot.rows]
    count = {}
    for _, record in slot.rows:
        count[record["status"]] = count.get(record["status"], 0) + 1
    lines.append(f"on {slot.device}: " + ", ".join(f"{n} {word}" for word, n in count.items()))
    if set(count) - set(FINISHED):
        lines.append("The same command goes on with what has not passed.")
    for job, record in slot.rows:
        if job.results and record["status"] == "passed":
            lines.append(
                f"python -m bilevel_lite collect {shown(job.results)} --name NAME"
                "  # takes it into figures/data"
            )
    return "\n".join(lines)


# ------------------------------------------------------------------ the command


def read(arguments: list[str]) -> argparse.Namespace:
    """Read the command line; a study that does not exist is refused before any time is spent."""
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=10.0, metavar="X", help="the limit")
    parser.add_argument(
        "--study", action="append", default=[], metavar='"NAME ..."',
        help="what stands behind `python -m bilevel_lite study`, without --out, in one word; or a "
        "whole command, from `run`, `search` or `hyperclean` on; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", metavar="DIR")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: CUDA if there)")
    parser.add_argument("--fresh", action="store_true", help="remove what is there, begin anew")
    parts = ("tests", "bench", "notebooks", "study")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="these only")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="of the bench (default: all)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of the bench")
    parser.add_argument(
        "--seconds", type=float, default=2.0, metavar="X", help="a row of the bench, at most"
    )
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="the bench: times only"
    )
    parser.add_argument(
        "--chapters", nargs="+", metavar="CH", help="these only, or notebooks' files (default: all)"
    )
    o = parser.parse_args(arguments)
    if not o.minutes > 0:
        parser.error(f"--minutes: got {o.minutes:g}, expected a positive number")

    from bilevel_lite.__main__ import parser as commands
    from bilevel_lite.session import _named

    studies = []
    for words in map(shlex.split, o.study):
        words = words if words[:1] and words[0] in COMMANDS else ["study", *words]
        if any(word.partition("=")[0] == "--out" for word in words):
            parser.error(f"--study {shlex.join(words)}: its folder is one in --out; leave it out")
        commands().parse_args([*words, "--out", "there"])  # or says what is wrong, and exits
        studies.append(words)
    try:
        o.device = str(_named(o.device))  # this process itself does not touch it
    except ValueError as error:
        parser.error(f"--{error}")
    o.study, o.out = studies, o.out.resolve()
    return o


def empty(out: Path) -> None:
    """Remove what an earlier call made in the folder, and nothing else."""
    there = {path.name for path in out.iterdir()} - {".lock"}
    if there and "gpu.json" not in there:
        sys.exit(f"--fresh: {shown(out)} holds no gpu.json, so it was not made by this command")
    for path in [path for pattern in MADE for path in out.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(arguments: list[str], begun: float | None = None) -> int:
    """Run one slot, whose time began then, or now."""
    begun = time.monotonic() if begun is None else begun
    o = read(arguments)
    o.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(o.out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(f"{shown(o.out)} is in use by another process")
    if o.fresh:
        empty(o.out)
    slot = Slot(o.out, o.device, 60 * o.minutes - (time.monotonic() - begun))

    def interrupt(*_):
        slot.interrupted = True

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        for jobs in groups(o):
            slot.run(jobs)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        print(table(slot), flush=True)
        lock.release()
    if not o.study and "study" in o.parts:
        print("No study was named; GPU='--study \"NAME ...\"' runs one in the time that is left.")
    if slot.interrupted:
        return 130
    return int(any(record["status"] == "failed" for _, record in slot.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], BEGUN))
