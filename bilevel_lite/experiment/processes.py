"""A run in several processes, as torchrun starts them: one folder, one log, one end."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bilevel_lite.experiment.folder import RunFolder
from bilevel_lite.parallel import Group

__all__ = ["SharedFolder", "processes", "several", "told"]

WAIT = 600.0  # seconds for which one process waits for the others


@contextmanager
def processes(device: str | None = None) -> Iterator[tuple[Group | None, str | None]]:
    """Around a run: its processes, None if there is only this one, and this one's device.

    Where ``WORLD_SIZE`` says that there are several they find each other (gloo on CPUs, NCCL on
    GPUs, a GPU each); all but the first print nothing.

    Args:
        device: As it was asked for.

    Raises:
        ValueError: if ``BILEVEL_LITE_WAIT``, the seconds after which a process that says nothing is
            taken for lost, is no positive number.
    """
    if not several():
        yield None, device
        return
    wait = os.environ.get("BILEVEL_LITE_WAIT", str(WAIT))
    if not wait.replace(".", "", 1).isdigit() or not float(wait):
        raise ValueError(f"BILEVEL_LITE_WAIT: got {wait!r}, expected a positive number of seconds")
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    gpu = device is not None and device.startswith("cuda")
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=float(wait)))
    group = Group()
    with ExitStack() as stack:
        if group.rank:
            os.environ["BILEVEL_LITE_PROGRESS"] = "0"
            stack.enter_context(redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield group, device
    dist.destroy_process_group()  # not reached where a process was lost: this would wait for it


def several() -> bool:
    """Whether this process is one of several, by ``WORLD_SIZE``.

    Raises:
        ValueError: if that is no number of processes.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if not size.isdigit() or size == "0":
        raise ValueError(f"WORLD_SIZE: got {size!r}, expected a number of processes, 1 or more")
    return int(size) > 1


def told(runs: list[dict]) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """What the processes of each run told each other in an outer iteration, by purpose.

    Args:
        runs: Results of runs by several processes.

    Returns:
        (model, method) -> purpose -> ``{"calls": ..., "bytes": ...}``.
    """
    made = {}
    for run in runs:
        s = run["settings"]
        model = s["model"] if "model" in s else f"encoder, {s['layers']} of its layers"
        made[model, s["method"]] = run["processes"]["each_iteration"]
    return made


def _by_first(name: str) -> Callable[..., Any]:
    """A method of the folder, called in process 0; what it returns or raises, all get."""

    def method(self, *args: Any, **options: Any) -> Any:
        return self.group.first(lambda: getattr(self.folder, name)(*args, **options))

    return method


class SharedFolder:
    """A run's folder, which only process 0 opens: the others need not even see its disk.

    Args:
        path: The folder.
        config: The settings.
        group: The processes.

    Raises:
        RunError: as `RunFolder`, in every process.
    """

    def __init__(self, path: str | Path, config: dict, group: Group):
        self.path, self.group, self.folder = Path(path), group, None

        def opened():
            self.folder = RunFolder(path, config)
            return self.folder.state, self.folder.finished

        self.state, self.finished = group.first(opened)

    read_tensors, write_tensors, remove, log, checkpoint, rows, read_result, finish = map(
        _by_first,
        "read_tensors write_tensors remove log checkpoint rows read_result finish".split(),
    )

    def __enter__(self):
        return self

    def __exit__(self, *failed):
        if self.folder is not None:
            self.folder.__exit__(*failed)
