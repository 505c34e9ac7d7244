"""Processes beside a notebook's own, on this machine: they run functions that the notebook shows.

Each is started as ``python -m bilevel_lite.workers FOLDER`` and told on its standard input which
file to read next: the source of a function and its arguments. Where they cannot be started, or do
not find each other in time, functions run here, in a group of one.
"""

import inspect
import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bilevel_lite.parallel import Group

__all__ = ["Failed", "Workers", "environments"]

GRACE = 5.0  # seconds that are left to the others once one has failed


class Failed(str):
    """What a process said, or its exit code, where it has no result."""


class Workers:
    """A few processes that share a problem with each other, to try on one machine.

    Args:
        size: How many; 1 starts none, and runs all here.
        timeout: Seconds for the start, and for each `run`.

    Attributes:
        size: How many there are: 1 where they could not be started.

    Raises:
        ValueError: if ``size`` is no positive whole number.

    After a failure all are ended, and started anew for the next `run`.

    Example:
        >>> each = "def each(group, x): return float(group.sum(x * (1 + group.rank), 'x'))"
        >>> workers = bl.workers.Workers(1)  # 2 would give [6., 6.]
        >>> workers.run(each, torch.tensor(2.0))
        [2.0]
        >>> workers.close()
    """

    def __init__(self, size: int = 2, timeout: float = 60.0):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"size: got {size!r}, expected a positive whole number")
        self.size, self.timeout, self.done, self.known = size, timeout, 0, ""
        self.folder = tempfile.TemporaryDirectory(prefix="workers-")
        self.started: list[subprocess.Popen] = []
        self._start()

    def _start(self) -> None:
        """Start them; where that fails, all that follows runs here, and one line says so."""
        if self.size > 1:
            try:
                self._start_all()
            except (OSError, RuntimeError) as error:
                self._end()
                self.size = 1
                print(f"one process only: {str(error).splitlines()[0]}")

    def _start_all(self) -> None:
        words = [sys.executable, "-m", "bilevel_lite.workers", self.folder.name]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for own in environments(self.size):
            self.started.append(
                subprocess.Popen(words, env=own, stdin=subprocess.PIPE, text=True, **quiet)
            )
        if failed := [one for one in self._results("ready") if isinstance(one, Failed)]:
            raise RuntimeError(failed[0])

    def define(self, *functions: Callable | str) -> None:
        """Give functions that those to be run may call."""
        self.known = "\n".join([self.known, *map(_text, functions)])

    def run(self, function: Callable | str, *arguments: Any, may_fail: bool = False) -> list:
        """Call ``function(group, *arguments)`` in every process.

        Args:
            function: A function, or its text. It is read as text: what it uses beyond torch,
                ``bl``, its arguments and what `define` was given, it must import itself. It returns
                tensors, numbers, strings, or lists and dicts of them.
            arguments: Of these kinds, too.
            may_fail: Give what went wrong in a result's place, and do not raise it.

        Returns:
            What each returned; `Failed` where a process raised an error or is gone.

        Raises:
            RuntimeError: if one of them failed, unless it may, or after `close`.
        """
        source = [self.known, _text(function)]
        if not Path(self.folder.name).exists():
            raise RuntimeError("workers: they were closed; make new ones")
        if not self.started:  # ended by a failure
            self._start()
        if self.size == 1:
            results = [_alone(source, arguments)]
        else:
            self.done += 1
            job = {
                "source": source, "arguments": list(arguments),
                "dtype": str(torch.get_default_dtype()),
            }  # fmt: skip
            torch.save(job, Path(self.folder.name) / f"{self.done}.pt")
            for one in self.started:
                try:
                    print(self.done, file=one.stdin, flush=True)
                except OSError:
                    pass  # gone: its result says so
            results = self._results(str(self.done))
        failed = [f"process {k}: {one}" for k, one in enumerate(results) if isinstance(one, Failed)]
        if failed:  # who waits for a sum now must not be given the next one's part
            self._end()
        if failed and not may_fail:
            raise RuntimeError("; ".join(failed))
        return results

    def _results(self, name: str) -> list:
        """What each wrote under a name; waited for until the time is up, or where one failed."""
        end, results = time.monotonic() + self.timeout, {}
        while len(results) < len(self.started):
            for rank, one in enumerate(self.started):
                path = Path(self.folder.name) / f"{name}-{rank}.pt"
                if rank in results:
                    continue
                code = one.poll()  # asked first: a result may be its last act
                if path.exists():
                    value = torch.load(path)
                    results[rank] = Failed(value["error"]) if "error" in value else value["value"]
                elif code is not None:
                    results[rank] = Failed(f"it is gone (exit code {code})")
                elif time.monotonic() > end:
                    one.kill()
                    results[rank] = Failed(f"it did not answer in {self.timeout:g} s")
                if isinstance(results.get(rank), Failed):  # the others may wait for this one
                    end = min(end, time.monotonic() + GRACE)
            time.sleep(0.01)
        return [results[rank] for rank in range(len(self.started))]

    def close(self) -> None:
        """End the processes."""
        self._end()
        self.folder.cleanup()

    def _end(self) -> None:
        for one in self.started:
            one.kill()
            one.wait()
            one.stdin.close()
        self.started = []
        for old in Path(self.folder.name).glob("*.pt"):
            old.unlink()

    def __del__(self):
        if getattr(self, "started", None):
            self.close()


def environments(size: int) -> list[dict[str, str]]:
    """The environment of each of so many processes on this machine, as torchrun would set it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    root = str(Path(__file__).resolve().parent.parent)
    common = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def _text(function: Callable | str) -> str:
    return function if isinstance(function, str) else textwrap.dedent(inspect.getsource(function))


def _alone(source: list[str], arguments: tuple) -> Any:
    """Call the function here, in a group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return _function(source)(Group(), *arguments)
    finally:
        dist.destroy_process_group()


def _function(source: list[str]) -> Callable:
    import bilevel_lite

    space = {"torch": torch, "bl": bilevel_lite, "__name__": "worker"}
    for text in source:
        exec(text, space)  # the notebook's own code
    return space[re.search(r"^def (\w+)", source[-1], re.MULTILINE)[1]]


def _require_plain(value: Any) -> None:
    """Refuse a result that the notebook could not read."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for part in value:
            _require_plain(part)
    elif value is not None and type(value) not in (Tensor, bool, int, float, str, Failed):
        raise TypeError(f"returned a {type(value).__name__}; expected tensors, numbers, strings")


def _serve(folder: str) -> None:
    """What a process does: one job after the other, until nobody asks any more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()

    def write(name: str, result: dict) -> None:
        path = Path(folder) / f"{name}-{rank}"
        torch.save(result, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path.with_suffix(".pt"))

    write("ready", {"value": None})
    for line in sys.stdin:
        job = torch.load(Path(folder) / f"{line.strip()}.pt")
        torch.set_default_dtype(getattr(torch, job["dtype"].removeprefix("torch.")))
        try:
            value = _function(job["source"])(Group(), *job["arguments"])
            _require_plain(value)
            write(line.strip(), {"value": value})
        except Exception as error:  # whatever it is, it goes to the notebook
            write(line.strip(), {"error": f"{type(error).__name__}: {error}"})
    os._exit(0)  # the others may be gone, and would be waited for


if __name__ == "__main__":
    _serve(sys.argv[1])
