"""One run of any task: baselines, iterations, log, the chosen iterate, a result; resumable."""

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from bilevel_lite.algorithms.method import Method
from bilevel_lite.experiment import settings as declared
from bilevel_lite.experiment.folder import (
    Clock,
    RunError,
    RunFolder,
    place,
    provenance,
    writing,
)
from bilevel_lite.experiment.methods import require_given
from bilevel_lite.experiment.processes import SharedFolder
from bilevel_lite.experiment.stopping import Stopped
from bilevel_lite.experiment.task import Task
from bilevel_lite.parallel import Group
from bilevel_lite.same_function import random_state, restore_random_state
from bilevel_lite.session import no_tf32, pick_device, progress

__all__ = ["float32", "no_memory", "run", "run_job"]


def run(
    kind: type[Task], s: Any, out: str, device: str | None = None, group: Group | None = None
) -> dict:
    """Run a task; write log, checkpoints, result and figure to ``out``, and print the table.

    Args:
        kind: The task.
        s: Its settings, from `Task.settings`.
        out: The output folder. If it holds an unfinished run with the same settings, that run is
            resumed; if it holds a finished one, its result is shown again.
        device: Such as ``"cpu"``; CUDA if there, by default.
        group: The processes that run it together, each with its part of every batch: the numbers
            are those of one process, to rounding.

    Returns:
        The result, as written to ``result.json``.

    Raises:
        ValueError: for a setting out of range, or a task that only one process can run.
        ProcessLost: if another process is gone; what was last written is kept.
        DataError: if the data cannot be had.
        RunError: if the folder cannot be used, or the device is out of memory.
    """
    device = pick_device(device)
    if group is not None and kind.method is not Task.method:
        raise ValueError(f"task: {kind.name} has iterations of its own, which one process runs")
    require_given(s.method, declared.given(s))
    opened = RunFolder if group is None else partial(SharedFolder, group=group)
    with float32(), opened(out, kind.config(s)) as folder:
        if folder.finished:
            result = folder.read_result()
            print(f"{folder.path} holds the finished run:")
        else:
            with drawing(s.seed, device):
                task = kind.make(s, device)
            if not isinstance(task, Task):
                raise RunError(f"make: returned {type(task).__name__}, expected the task")
            task.group = group
            result = run_job(s, device, folder, task)
        if s.baselines and (group is None or group.rank == 0):
            _draw(kind, result, folder.path)
    print(kind.table(result))
    return result


@contextmanager
def float32():
    """Hold the default dtype at float32, whatever a notebook has set: layers draw in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    no_tf32()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def drawing(seed: int, device: torch.device):
    """Begin torch's own generators, from which dropout draws, at a seed; then put them back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run_job(
    s: Any,
    device: torch.device,
    folder: RunFolder,
    task: Task,
    stop: Callable[[], str] = lambda: "",
    trial: bool = False,
) -> dict:
    """Run or resume the job in its folder, and put the result together.

    Args:
        s: Its settings.
        device: Where it runs.
        folder: Its output folder.
        task: The task of these settings.
        stop: Asked after every iteration (`bilevel_lite.experiment.stopping.stoppable`).
        trial: Only the log is wanted: leave out what the task's result takes beyond it.

    Raises:
        Stopped: if ``stop`` says so, once a checkpoint is written.
        ValueError: for a setting out of range.
        RunError: if the folder's checkpoint cannot be resumed, or nothing can be written.
    """
    with drawing(s.seed, device):
        return _run_job(s, device, folder, task, stop, trial)


def _run_job(s, device, folder, task, stop, trial):
    method = task.method(s)
    state, places = _resumed(folder, task, method, place(device))
    group = task.group
    clock = Clock(state["seconds"], device, waits=group is not None)
    if group is not None:
        group.require_same(lam=method.lam, theta=method.theta)
        group.traffic.clear()
    begun = method.iteration

    def save():
        mine = {"seconds": clock.seconds, "method": method.state_dict(), "places": places}
        mine["drawn"] = random_state(task.theta0, known=True)
        folder.checkpoint({"baselines": state["baselines"], "best": state["best"], **mine})

    for name, train in (task.baselines(s) if s.baselines else {}).items():
        if name not in state["baselines"]:
            with no_memory(s, task):
                state["baselines"][name] = _plain(f"baselines: {name}", train())
            save()

    steps = range(method.iteration, s.outer_steps)
    if 0 < s.budget <= method.gradients:
        steps = range(0)
    for _ in progress(
        steps, initial=method.iteration, total=None if s.budget else s.outer_steps, desc=s.method
    ):
        with clock, no_memory(s, task):
            task.refresh(method.theta)
            info = method.step()
        last = info.iteration == s.outer_steps or 0 < s.budget <= info.gradients
        stopped = "" if last else stop()
        if group is not None:  # one of them decides
            last, stopped = group.tell((last, stopped))
        if info.iteration % s.evaluate_every == 0 or last:
            task.refresh(method.theta)
            if group is not None:
                group.require_same(lam=method.lam, theta=method.theta)
            row = {
                "iteration": info.iteration,
                "seconds": clock.seconds,
                "gradients": info.gradients,
                "inner_loss": float(info.inner_loss),
                "outer_loss": float(info.outer_loss),
                "negative_curvature": info.solve is not None and info.solve.negative_curvature,
                **_plain("measure", task.measure(method.lam, method.theta)),
            }
            _judged(task, row)
            if group is not None:  # which iterate is best is decided by one of them, too
                row = group.tell(row)
            folder.log(row)
            best = state["best"]
            if best is None or _judged(task, row) < _judged(task, best["row"]):
                state["best"] = {"row": row}
                chosen = {"lam": method.lam.cpu().clone(), "theta": method.theta.cpu().clone()}
                folder.write_tensors(_chosen(state), chosen)
            save()
            folder.remove("best-*.pt", but=_chosen(state))  # the last checkpoint's, until here
        elif stopped:
            save()
        if stopped:
            raise Stopped(stopped, info.iteration, info.gradients)
        if last:
            break

    for line in method.recorded.lines:  # on a GPU: what ran kernel by kernel, and why
        print(line)
    made = provenance(device, s.seed, clock.seconds, places[:-1])
    result = _result(s, folder, task, state, trial) | {"history": folder.rows(), "provenance": made}
    if group is not None:
        result["processes"] = {
            "number": group.size,
            "each_iteration": group.sent(method.iteration - begun),
        }
    folder.finish(result)
    return result


def _resumed(folder: RunFolder, task: Task, method: Any, here: dict) -> tuple[dict, list[dict]]:
    """Where the run stands, with the method and torch's generator there; and all its places."""
    for role, batch in (method.batches if isinstance(method, Method) else {}).items():
        if callable(getattr(batch, "draw", None)) and not hasattr(batch, "state_dict"):
            raise RunError(
                f"{role}_batch: {type(batch).__name__} has no state_dict(), so a run that is "
                "resumed would go on with other batches; give it one, or take "
                "bilevel_lite.data.Batches"
            )
    state, there = {"baselines": {}, "best": None, "seconds": 0.0, "method": None}, folder.state
    if there is None:
        return state, [here]
    try:
        state = {part: there[part] for part in state}
        if state["best"] is not None:
            _judged(task, state["best"]["row"])
        method.load_state_dict(state["method"])
        places = list(there.get("places", []))  # checkpoints of before have neither
        if "drawn" in there:
            restore_random_state(there["drawn"], task.theta0)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder.path} was left by a version whose checkpoints this one cannot resume "
            f"({type(error).__name__}: {error}); use another folder, or remove its "
            "checkpoint.pt to start anew"
        ) from error
    print(f"resuming {folder.path} after iteration {method.iteration}")
    if places and (last := places[-1]) != here:
        told = [f"{k}: {last.get(k)} there, {v} here" for k, v in here.items() if last.get(k) != v]
        print(f"elsewhere ({'; '.join(told)}): the numbers may differ by rounding")
    return state, [*(one for one in places if one != here), here]


def _result(s: Any, folder: RunFolder, task: Task, state: dict, trial: bool) -> dict:
    """What came out, at the chosen iterate."""
    best = state["best"]
    chosen = best if "theta" in best else folder.read_tensors(_chosen(state), "lam", "theta")
    lam, theta = chosen["lam"].to(task.lam0), chosen["theta"].to(task.theta0)
    if not trial:
        task.refresh(theta)
    return {
        "kind": task.name,
        "settings": declared.written(s),
        "source": task.source,
        "baselines": state["baselines"],
        "best": best["row"],
        **({} if trial else _plain("result", task.result(s, lam, theta))),
    }


def _plain(what: str, value: Any) -> dict:
    """What a task gave, as JSON has it; NumPy's float64 becomes a float."""
    if not isinstance(value, dict):
        raise RunError(f"{what}: gave {type(value).__name__}, expected a dict, name -> number")
    out = {}
    for name, part in value.items():
        try:
            out[name] = json.loads(json.dumps(part))
        except TypeError as error:
            raise RunError(
                f"{what}: gave {type(part).__name__} for {name!r} ({error}), expected a number, or "
                "lists and dicts of numbers"
            ) from error
    return out


def _judged(task: Task, row: dict) -> float:
    """The criterion of a look; one that is not finite is the worst."""
    value = row.get(task.criterion)
    if not isinstance(value, int | float):
        measured = sorted(set(row) - {"iteration", "seconds", "gradients"})
        raise RunError(
            f"measure: gave {type(value).__name__} for the criterion {task.criterion!r}, expected "
            f"a number (it measured {measured})"
        )
    return value if math.isfinite(value) else math.inf


def _chosen(state: dict) -> str:
    """The file of the chosen lam and theta; they change seldom, and are as large as the rest."""
    return f"best-{state['best']['row']['iteration']}.pt"


@contextmanager
def no_memory(s: Any, task: Task):
    """Turn a GPU's refusal into a sentence that names the largest batch."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        sizes = {name: size for name, size in vars(s).items() if name.endswith("batch_size")}
        for name in (name for name, size in sizes.items() if not size):
            split = task.validation if name == "outer_batch_size" else task.train
            sizes[name] = len(split[1]) if split else 0
        name = max(sizes, key=sizes.get)
        now = getattr(s, name) or "the whole set"
        raise RunError(
            f"the device is out of memory: lower --{name.replace('_', '-')} (now {now}); the last "
            "checkpoint is kept"
        ) from error


def _draw(kind: type[Task], result: dict, path) -> None:
    from bilevel_lite.plotting import plt

    for suffix, figure in kind.draw({"kind": kind.name, "runs": [result]}).items():
        with writing(path / f"figure{suffix}.png"):
            figure.savefig(path / f"figure{suffix}.png", dpi=150)
        plt.close(figure)
