"""Variants of a run of any task under one protocol: the same search for each, then some seeds.

For every variant the same number of trials: the first points of a scrambled Sobol sequence in the
box of its step sizes and numbers, each run on seed 0 for the same length and judged by the task's
criterion. The best point then runs for every seed. Optuna keeps the trials, in SQLite or any
database it takes, so that the search can be stopped and resumed. Several machines may use one
database if each has variants of its own: a trial of a variant that was left running counts as cut
off.
"""

import hashlib
import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bilevel_lite.experiment import job, methods
from bilevel_lite.experiment import settings as declared
from bilevel_lite.experiment.folder import Clock, RunError, RunFolder, provenance
from bilevel_lite.experiment.task import Column, Task
from bilevel_lite.refuse import NotFinite
from bilevel_lite.session import pick_device, progress

__all__ = ["Variant", "mean_best", "pace", "run", "table"]

TRIAL_LOOKS = 20  # evaluations in a trial, whatever an iteration costs


@dataclass(frozen=True)
class Variant:
    """One line of a study.

    Attributes:
        name: In the table and the figure.
        settings: What it sets, ``method`` among it.
        space: What its search covers: setting -> (low, high), all on a logarithmic scale; empty
            where nothing is searched for.
    """

    name: str
    settings: dict[str, Any]
    space: dict[str, tuple[float, float]] = field(default_factory=dict)


def run(
    kind: type[Task],
    config: dict,
    base: dict[str, Any],
    variants: list[Variant],
    search: dict[str, float],
    final: dict[str, float],
    out: str,
    seeds: int = 3,
    trials: int = 8,
    storage: str | None = None,
    device: str | None = None,
    looks: int = 50,
) -> dict:
    """Search for each variant, then run its best settings for every seed.

    Args:
        kind: The task.
        config: What tells this search from others, ``kind`` of the result among it (it begins with
            the task's name); what is a setting there holds for all variants.
        base: Further settings of all variants.
        variants: What is compared.
        search: Length of a trial: ``budget`` (in gradients) or ``outer_steps``.
        final: Length of a final run, the same way.
        out: Output folder; stopped, the same call goes on there.
        seeds: How many, from 0.
        trials: Points tried for each, on seed 0.
        storage: Optuna's database; SQLite in ``out`` by default.
        device: Such as ``"cpu"``; CUDA if there, by default.
        looks: Evaluations in a final run.

    Returns:
        The result, also written to ``result.json``.

    Raises:
        ValueError: for a number out of range or an unknown setting.
        RunError: if the folder cannot be used, Optuna is missing, or the device is out of memory.
        DataError: if the data cannot be had.
    """
    for name, value in (("seeds", seeds), ("trials", trials), ("looks", looks)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for prefix, length in (("search_", search), ("", final)):
        for name, value in length.items():
            if not value > 0:
                called = (prefix + name).replace("search_outer", "search")
                raise ValueError(f"{called}: got {value}, expected a positive number")
    try:
        import optuna
    except ImportError:
        raise RunError("the search needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = pick_device(device)
    known = set(declared.of(kind.Settings)) - {"kind"}
    common = {name: value for name, value in config.items() if name in known}
    common = {**common, "seed": 0, "baselines": 0, **base}
    jobs = [(v, kind.settings(**{**common, **v.settings})) for v in variants]
    config = {
        **config, "seeds": seeds, "trials": trials, "search": search, "final": final, "base": base,
        "looks": looks,
        "variants": [{"name": v.name, "settings": v.settings} for v in variants],
    }  # fmt: skip
    timer = Clock(device=place)
    with job.float32(), RunFolder(out, config) as folder:
        if (folder.path / "result.json").exists():
            result = folder.read_result()
            print(
                f"{folder.path} holds the finished study:\n{table(result['results'], kind.columns)}"
            )
            return result
        if folder.state:
            timer.seconds = folder.state["seconds"]
        storage = storage or f"sqlite:///{(folder.path / 'trials.db').resolve()}"
        done = {row["method"] for row in folder.rows()} if folder.state else set()
        for variant, s in jobs:
            if variant.name in done:
                continue
            try:
                with timer:
                    row = _row(
                        kind, s, variant, search, final, seeds, trials, storage, folder.path,
                        place, looks,
                    )  # fmt: skip
            except KeyboardInterrupt:  # what was computed is kept, so are its seconds
                folder.checkpoint({"seconds": timer.seconds})
                raise
            folder.log(row)
            folder.checkpoint({"seconds": timer.seconds})
            print(table([row], kind.columns).splitlines()[-1], flush=True)
        rows = folder.rows()
        source = _made(kind, jobs[-1][1], place).source
        result = {**folder.config, "source": source, "results": rows}
        result["provenance"] = provenance(place, 0, timer.seconds)
        folder.finish(result)
    print(table(rows, kind.columns))
    return result


def _row(kind, s, variant, search, final, seeds, trials, storage, path, device, looks) -> dict:
    """Search and final runs of one variant."""
    row = {
        "method": variant.name, "settings": variant.settings, "space": variant.space, "trials": [],
        "chosen": {}, "runs": [], "diverged": [],
    }  # fmt: skip
    if variant.space:
        study = _search(kind, s, variant, trials, search, storage, device)
        row["trials"] = [{**t.params, kind.criterion: _finite(t.value)} for t in _finished(study)]
        if not math.isfinite(study.best_value):
            return {**row, "chosen": None}
        row["chosen"] = study.best_params
    s = replace(s, **row["chosen"])
    for seed in progress(range(seeds), desc=variant.name):
        try:
            one = replace(s, seed=seed)
            row["runs"].append(_final(kind, one, variant, final, looks, path, device))
        except NotFinite as error:  # a result too
            row["diverged"].append({"seed": seed, "why": str(error)})
    return row


def _of_length(kind: type[Task], s: Any, length: dict[str, float], looks: int, device) -> Any:
    """Set the length, and the number of evaluations on the way."""
    if "outer_steps" in length:
        steps = int(length["outer_steps"])
        return replace(s, outer_steps=steps, evaluate_every=max(1, steps // looks))
    budget = length["budget"]
    method = methods.build(s, _made(kind, s, device))
    method.step()  # the first may cost more (tables are filled) or less (v is zero)
    start = method.gradients
    for _ in range(3):
        method.step()
    cost = (method.gradients - start) / 3
    every = max(1, round(budget / looks / cost))
    # the budget ends the run, whatever later iterations cost; none costs less than a gradient
    return replace(s, budget=budget, outer_steps=math.ceil(budget), evaluate_every=every)


_tasks: dict = {}


def _made(kind: type[Task], s: Any, device: torch.device) -> Task:
    """The task of these settings; the last one made is kept.

    It depends on the seed and on what the task declares itself; the rest is as it is by default.
    """
    own = set(declared.of(kind.Settings)) - set(declared.of(declared.Settings)) | {"seed"}
    what = {name: value for name, value in vars(s).items() if name in own}
    key = (kind, *what.items(), device)
    if key not in _tasks:
        _tasks.clear()
        _tasks[key] = kind.make(kind.Settings(**what), device)
    return _tasks[key]


# ------------------------------------------------------------------ the search


def _search(kind, s, variant: Variant, trials: int, length: dict, storage: str, device):
    """Try the points that are still to be tried; returns the study."""
    import optuna
    from optuna.trial import TrialState

    text = json.dumps([vars(s), variant.space, length], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:12]  # other settings, another study
    study = optuna.create_study(
        storage=storage,
        study_name=f"{kind.label(s)}-{variant.name}-{key}",
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # cut off: tried anew
        study.tell(trial.number, state=TrialState.FAIL)
    tried = [trial.params for trial in _finished(study)]
    for point in _points(variant.space, trials):
        if point in tried:
            continue
        study.enqueue_trial(point, skip_if_exists=False)
        trial = study.ask()
        values = {
            name: trial.suggest_float(name, *bounds, log=True)
            for name, bounds in variant.space.items()
        }
        study.tell(trial, _lowest(kind, replace(s, **values), length, device))
    return study


def _finished(study) -> list:
    from optuna.trial import TrialState

    return study.get_trials(states=(TrialState.COMPLETE,))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _points(space: dict[str, tuple[float, float]], count: int) -> list[dict[str, float]]:
    """The first points of a scrambled Sobol sequence, on a logarithmic scale; always the same."""
    unit = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=0).draw(count).double()
    out = []
    for row in unit.tolist():
        point = {}
        for share, (name, (low, high)) in zip(row, space.items(), strict=True):
            point[name] = float(f"{low * (high / low) ** share:.4g}")
        out.append(point)
    return out


def _lowest(kind: type[Task], s: Any, length: dict[str, float], device: torch.device) -> float:
    """The lowest criterion met within the length; infinite if the run diverges before any."""
    task = _made(kind, s, device)
    best = math.inf
    try:
        with job.no_memory(s, task):
            s = _of_length(kind, s, length, TRIAL_LOOKS, device)
            method = methods.build(s, task)
            while method.iteration < s.outer_steps and not 0 < s.budget <= method.gradients:
                task.refresh(method.theta)
                method.step()
                if method.iteration % s.evaluate_every == 0:
                    task.refresh(method.theta)
                    value = task.judge(method.lam, method.theta)
                    best = min(best, value if math.isfinite(value) else math.inf)
    except NotFinite:
        pass
    return best


# ------------------------------------------------------------------ the final runs


def _final(kind, s, variant: Variant, length: dict, looks: int, path: Path, device) -> dict:
    """One final run, in a folder of its own, where it can be resumed."""
    s = _of_length(kind, s, length, looks, device)
    with RunFolder(path / f"{variant.name}-{s.seed}", kind.config(s)) as folder:
        if (folder.path / "result.json").exists():
            result = folder.read_result()
        else:
            result = job.run_job(s, device, folder, _made(kind, s, device))
        for name in ("checkpoint.pt", "best-*.pt"):  # a study has many: results only are kept
            folder.remove(name)
    return {
        "seed": s.seed,
        "best": result["best"],
        **({"history": _thin(result["history"], kind.dropped)} if s.seed == 0 else {}),
        "seconds": result["provenance"]["seconds"],
        # share of the looks at which CG stopped on a direction of negative curvature
        "negative_curvature": mean(row["negative_curvature"] for row in result["history"]),
        **kind.keep(result, variant.settings),
    }


def _thin(history: list[dict], dropped: tuple[str, ...], most: int = 60) -> list[dict]:
    """At most so many lines of a log, and of each what the figures need."""
    step = max(1, math.ceil(len(history) / most))
    dropped = {"inner_loss", "outer_loss", "negative_curvature", *dropped}
    rows = [{k: v for k, v in row.items() if k not in dropped} for row in history[::step]]
    return [{k: _round(v) for k, v in row.items()} for row in rows]


def _round(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(rows: list[dict], columns: tuple[Column, ...]) -> str:
    """The results as text: at the iterate that the criterion chose, mean over the seeds.

    Args:
        rows: Of the result of `run`.
        columns: Of the task; the first one sorts the rows, lowest first.
    """
    width = max([20, *(len(row["method"]) + 1 for row in rows)])
    titles = "".join(f"{column.title:>{column.width}}" for column in columns)
    lines = [f"{'':<{width}}{titles}{'s':>8}{'gradients':>11}"]
    for row in sorted(rows, key=lambda row: mean_best(row, columns[0].key) if columns else 0):
        if not row["runs"]:
            where = "trial" if row["chosen"] is None else "seed"
            lines.append(f"{row['method']:<{width}} diverged in every {where}")
            continue
        cells = "".join(f"{_cell(row, column):>{column.width}}" for column in columns)
        lost = len(row.get("diverged", []))
        lines.append(
            f"{row['method']:<{width}}{cells}"
            f"{mean_best(row, 'seconds'):8.1f}{mean_best(row, 'gradients'):11.0f}"
            + (f"  ({lost} of {lost + len(row['runs'])} seeds diverged)" if lost else "")
        )
    return "\n".join(lines)


def _cell(row: dict, column: Column) -> str:
    """A row's mean in a column; empty where the task did not measure it."""
    if column.key not in row["runs"][0]["best"]:
        return ""
    values = [column.scale * run["best"][column.key] for run in row["runs"]]
    text = [f"{value:{column.form}}" for value in (mean(values), min(values), max(values))]
    return f"{text[0]} ({text[1]}-{text[2]})" if column.spread else text[0]


def mean_best(row: dict, key: str) -> float:
    """Mean over the seeds of a measure at the chosen iterate; infinite if all diverged."""
    return mean(run["best"][key] for run in row["runs"]) if row["runs"] else math.inf


def pace(row: dict, key: str) -> float:
    """``"seconds"`` or ``"gradients"`` per outer iteration up to the best, mean over the seeds."""
    return mean(run["best"][key] / run["best"]["iteration"] for run in row["runs"])
