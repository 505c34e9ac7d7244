"""Run one submission: ``python -m bilevel_lite.grading.worker``, a process that may end any time.

Standard input: one line of JSON with the cells, the seed, the seconds for a cell and the file to
write to. The file gets one record after the other, so that what was done before an end stays.
"""

import ast
import io
import json
import linecache
import os
import re
import signal
import struct
import sys
import time
import types
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bilevel_lite import exercises
from bilevel_lite.grading.transcript import Recorder, TooLong

LARGEST = 64 * 2**20  # bytes of one record
HOME = Path(__file__).resolve().parents[2]
ANSWERS = tuple(f"{HOME / name}{os.sep}" for name in ("chapters", "tests"))  # in a checkout

# what no chapter needs: other programs, other processes
CLOSED = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.forkpty", "os.kill", "os.killpg", "os.startfile",
)  # fmt: skip


class TimeUp(BaseException):
    """Raised by the alarm; no `except Exception` stops it."""


class _Sink(io.TextIOBase):
    """Takes what a submission prints, and forgets it."""

    def writable(self):
        return True

    def write(self, text):
        return len(text)


def guard(event: str, args: tuple) -> None:
    """An audit hook: a submission reads no notebook, no answer, starts no program. No sandbox."""
    if event in CLOSED:
        raise PermissionError(f"the grader does not allow {event}")
    if event.partition(".")[0] in ("open", "os", "shutil"):
        for path in args[:2]:
            if isinstance(path, str | bytes | os.PathLike):
                name = os.fsdecode(path)
                if name.lower().endswith((".ipynb", ".record")):
                    raise PermissionError("the grader does not let a submission touch notebooks")
                if f"{os.path.realpath(name)}{os.sep}".startswith(ANSWERS):
                    raise PermissionError("the grader does not let a submission read answers")


class _Shell:
    """In the place of IPython's shell: whatever is asked of it, it does nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: None


def plain(source: str) -> str:
    """A cell as Python: lines for IPython alone, `%pip` and the like, do nothing."""
    try:
        ast.parse(source)
        return source
    except SyntaxError:
        lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        lines[0] = ""
    for k, line in enumerate(lines):
        bare = line.strip()
        indent = line[: len(line) - len(line.lstrip())]
        if timed := re.match(r"%time\s+(.+)", bare):
            lines[k] = indent + timed[1]
        elif asked := re.match(r"(\w+)\s*=\s*[!%]", bare):  # what a shell or a magic gives
            lines[k] = f"{indent}{asked[1]} = None"
        elif bare[:1] in ("%", "!", "?") or bare[-1:] == "?":
            lines[k] = indent + "pass"
    return "\n".join(lines)


def main() -> None:
    """Run the cells; write a record for each check, and for each cell that stopped."""
    order = json.loads(sys.stdin.readline())
    out = open(order["file"], "ab", buffering=0)

    def write(record: dict) -> None:
        blob = io.BytesIO()
        torch.save(record, blob)
        if blob.tell() > LARGEST:
            record = {"check": record.get("check"), "stopped": "Its results are too large."}
            torch.save(record, blob := io.BytesIO())
        data = blob.getvalue()
        out.write(struct.pack(">Q", len(data)) + data)

    def check(number, answer):
        """In the place of `exercises.check`: the answer, judged here, with all that it did."""
        start, recorder = time.perf_counter(), Recorder()
        record = {"check": number if isinstance(number, str) else repr(number)}
        try:
            with exercises.fresh(order["seed"]):
                record["said"] = list(exercises.judge(number, recorder.answer(answer)))
        except BaseException as error:
            record["stopped"] = said(error)
            raise
        finally:
            signal_off()
            record["seconds"] = time.perf_counter() - start
            record.update(getattr(recorder, "record", {}))
            write(record)
            signal_on()
        return record["said"][0] == "correct"

    def said(error: BaseException) -> str:
        if isinstance(error, TimeUp):
            return f"It ran for more than {order['cell']:g} s."
        if isinstance(error, SystemExit):
            return "It called exit."
        if isinstance(error, TooLong):
            return str(error)
        return f"{type(error).__name__}: {str(error)[:300]}"

    def alarm(*_):
        raise TimeUp

    def signal_on():
        if hasattr(signal, "setitimer"):  # where not, the time limit of the whole stays
            signal.setitimer(signal.ITIMER_REAL, max(0.01, deadline - time.monotonic()), 1.0)

    def signal_off():
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, alarm)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass
    module = types.ModuleType("__main__")
    module.__dict__.update(display=lambda *_: None, get_ipython=_Shell)
    sys.modules["__main__"] = module
    warnings.simplefilter("ignore")
    sys.stdout, sys.stderr, sys.stdin = _Sink(), _Sink(), io.StringIO()
    sys.argv = ["submission"]
    sys.addaudithook(guard)
    for position, source in enumerate(order["cells"]):
        exercises.check = check  # an earlier cell may have put something else there
        name = f"<code cell {position + 1}>"
        code = plain(source)
        linecache.cache[name] = (len(code), None, code.splitlines(True), name)
        deadline = time.monotonic() + order["cell"]
        try:
            signal_on()
            exec(compile(ast.parse(code, name), name, "exec"), module.__dict__)
            signal_off()
        except BaseException as error:
            signal_off()
            write({"cell": position, "stopped": said(error)})
        plt.close("all")
    write({"end": True})
    out.close()
    os._exit(0)  # whatever the submission has left running


if __name__ == "__main__":
    main()
