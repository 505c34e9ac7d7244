"""All methods on the hypercleaning job: the same search for each, then three seeds each.

For every method the same number of trials: the first points of a scrambled Sobol sequence in the
box of its step sizes and numbers (`SPACES`), each run on seed 0 for the same budget of gradients
and judged by the tuning loss. The best point then runs for every seed. Optuna keeps the trials, in
SQLite or any database it takes, so that the search can be stopped, resumed and shared.
"""

import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bilevel_lite.experiment import Clock, RunError, RunFolder, provenance
from bilevel_lite.problem import NotFinite
from bilevel_lite.session import pick_device, progress
from bilevel_lite.tasks import cleaning_methods, cleaning_run
from bilevel_lite.tasks import hypercleaning as hc
from bilevel_lite.tasks.cleaning_run import DEFAULTS, Settings

__all__ = ["SPACES", "run", "table"]

# What each method searches over: setting -> (low, high), all on a logarithmic scale.
_BOTH = {"inner_lr": (0.02, 1.0), "outer_lr": (10.0, 1e5)}
_DAMPING = {"damping": (1e-3, 1.0)}
_STEP = {"step": (0.02, 1.0)}


def _memory(low: float, high: float) -> dict:
    return {"strength": (low, high)}


SPACES: dict[str, dict[str, tuple[float, float]]] = {
    "aid-identity": {**_BOTH},  # its step only scales outer_lr
    "aid-neumann": {**_BOTH, **_STEP},
    "aid-cg": {**_BOTH, **_DAMPING},
    "aid-cg-normal": {**_BOTH, **_DAMPING},
    "aid-kfac": {**_BOTH, **_DAMPING},
    "aid-ekfac": {**_BOTH, **_DAMPING},
    "amigo": {**_BOTH, **_STEP},
    "amigo-kfac": {**_BOTH, **_DAMPING, "step": (0.05, 2.0)},
    "amigo-kfac-replace": {**_BOTH, **_DAMPING},
    "stocbio": {**_BOTH, **_STEP},
    "mrbo": {**_BOTH, **_STEP, **_memory(0.1, 0.95)},
    "mrbo-kfac": {**_BOTH, **_DAMPING, **_memory(0.1, 0.95)},
    "soba": {**_BOTH, **_STEP},
    "saba": {**_BOTH, **_STEP},
    "itd": {**_BOTH},
    "nbo-gd": {"outer_lr": _BOTH["outer_lr"], **_STEP},
    "nbo-cg": {"outer_lr": _BOTH["outer_lr"], **_STEP},  # the step of its warm-up
    "nsbo-sgd": {"outer_lr": _BOTH["outer_lr"], **_STEP},
    "nhgd-kfac": {**_BOTH, **_DAMPING, **_memory(0.5, 0.99)},
    "sama": {**_BOTH, **_memory(0.03, 3.0)},
    "bsg1": {**_BOTH, **_memory(1e-6, 1e-2)},
    "bome": {**_BOTH, **_STEP, **_memory(0.01, 1.0)},
    "bvfsm": {**_BOTH, **_memory(0.01, 1.0)},
    "f2sa": {**_BOTH, **_memory(0.1, 10.0)},
}

LOOKS = 50  # evaluations in a run, whatever an iteration of the method costs

# Every method sees minibatches in every role.
MINIBATCHES = {
    "mnist": {"batch_size": 1000, "outer_batch_size": 1000, "cross_batch_size": 1000,
              "curvature_batch_size": 1000},
    "digits": {"batch_size": 250, "outer_batch_size": 200, "cross_batch_size": 250,
               "curvature_batch_size": 250},
}  # fmt: skip


def run(
    dataset: str,
    model: str,
    methods: list[str],
    out: str,
    seeds: int = 3,
    trials: int = 8,
    search_budget: float = 10_000,
    budget: float = 20_000,
    storage: str | None = None,
    device: str | None = None,
) -> dict:
    """Search for each method, then run its best settings for every seed.

    Args:
        dataset: ``"mnist"`` or ``"digits"``.
        model: ``"linear"``, ``"mlp"`` or ``"lenet"``.
        methods: Keys of `SPACES`.
        out: Output folder; stopped, the same command goes on there.
        seeds: How many, from 0.
        trials: Points tried for each method, on seed 0.
        search_budget: Gradients (of one inner batch) of a trial.
        budget: Gradients of a final run.
        storage: Optuna's database; SQLite in ``out`` by default.
        device: Such as ``"cpu"``; CUDA if there, by default.

    Returns:
        The result, also written to ``result.json``.

    Raises:
        ValueError: for an unknown name or a number out of range.
        RunError: if the folder cannot be used, Optuna is missing, or a final run diverges.
        DataError: if the dataset cannot be had.
    """
    unknown = sorted(set(methods) - set(SPACES))
    if unknown or not methods:
        raise ValueError(
            f"method: got {unknown or methods}, expected 'all' or some of {sorted(SPACES)}"
        )
    for name, value in (("seeds", seeds), ("trials", trials)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    for name, value in (("search_budget", search_budget), ("budget", budget)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a positive number")
    if dataset not in DEFAULTS:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {sorted(DEFAULTS)}")
    try:
        import optuna
    except ImportError:
        raise RunError("the search needs Optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    place = pick_device(device)
    config = {
        "kind": "hyperclean_methods", "dataset": dataset, "model": model, "methods": methods,
        "seeds": seeds, "trials": trials, "search_budget": search_budget, "budget": budget,
    }  # fmt: skip
    timer = Clock(device=place)
    with cleaning_run.float32(), RunFolder(out, config) as folder:
        if folder.state:
            timer.seconds = folder.state["seconds"]
        storage = storage or f"sqlite:///{(folder.path / 'trials.db').resolve()}"
        done = {row["method"] for row in folder.rows()} if folder.state else set()
        for method in methods:
            if method in done:
                continue
            base = _settings(dataset, model, method)
            with timer:
                study = _search(base, trials, search_budget, storage, place)
                row = {
                    "method": method,
                    "space": SPACES[method],
                    "trials": [
                        {**t.params, "tuning_loss": _finite(t.value)} for t in _finished(study)
                    ],
                    "chosen": None,
                    "runs": [],
                }
                if math.isfinite(study.best_value):
                    best = row["chosen"] = study.best_params
                    row["runs"] = _finals(base, best, seeds, budget, folder.path, place)
            folder.log(row)
            folder.checkpoint({"seconds": timer.seconds})
            print(table([row]).splitlines()[-1], flush=True)
        rows = folder.rows()
        result = {**folder.config, "results": rows}
        result["provenance"] = provenance(place, 0, timer.seconds)
        folder.finish(result)
    print(table(rows))
    return result


def _settings(dataset: str, model: str, method: str) -> Settings:
    values = {**DEFAULTS[dataset], **MINIBATCHES[dataset], "baselines": 0}
    return Settings(dataset, model, method, 0, **values)


def _paced(s: Settings, budget: float, device: torch.device) -> Settings:
    """Set the budget, as many iterations as it allows, and `LOOKS` evaluations on the way."""
    method = cleaning_methods.build(s, _task(s.dataset, s.model, s.seed, s.noise, s.l2, device))
    method.step()  # the first may cost more (tables are filled) or less (v is zero)
    start = method.gradients
    for _ in range(3):
        method.step()
    cost = (method.gradients - start) / 3
    every = max(1, round(budget / LOOKS / cost))
    return replace(s, budget=budget, outer_steps=math.ceil(budget / cost), evaluate_every=every)


@lru_cache(maxsize=1)
def _task(dataset: str, model: str, seed: int, noise: float, l2: float, device: torch.device):
    s = Settings(dataset, model, "aid-cg", seed, noise=noise, l2=l2)
    return cleaning_run.build_task(s, device)


# ------------------------------------------------------------------ the search


def _search(base: Settings, trials: int, budget: float, storage: str, device: torch.device):
    """Try the points that are still to be tried; returns the study."""
    import optuna
    from optuna.trial import TrialState

    space = SPACES[base.method]
    study = optuna.create_study(
        storage=storage,
        study_name=f"{base.dataset}-{base.model}-{base.method}-{budget:g}",
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):  # cut off: tried anew
        study.tell(trial.number, state=TrialState.FAIL)
    tried = [trial.params for trial in _finished(study)]
    for point in _points(space, trials):
        if point in tried:
            continue
        study.enqueue_trial(point, skip_if_exists=False)
        trial = study.ask()
        values = {name: trial.suggest_float(name, *space[name], log=True) for name in space}
        study.tell(trial, _tuning_loss(replace(base, **values), budget, device))
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


def _tuning_loss(s: Settings, budget: float, device: torch.device) -> float:
    """The lowest tuning loss met within the budget; infinite if the run diverges before any."""
    task = _task(s.dataset, s.model, s.seed, s.noise, s.l2, device)
    best = math.inf
    try:
        s = _paced(s, budget, device)
        method = cleaning_methods.build(s, task)
        while method.iteration < s.outer_steps and method.gradients < s.budget:
            method.step()
            if method.iteration % s.evaluate_every == 0:
                loss = hc.evaluate(task.model, method.theta, task.tuning)["loss"]
                best = min(best, loss if math.isfinite(loss) else math.inf)
    except NotFinite:
        pass
    return best


# ------------------------------------------------------------------ the final runs


def _finals(
    base: Settings, chosen: dict, seeds: int, budget: float, path: Path, device: torch.device
) -> list[dict]:
    """The chosen settings for every seed; each in a folder of its own, which can be resumed."""
    rows = []
    for seed in progress(range(seeds), desc=base.method):
        s = _paced(replace(base, **chosen, seed=seed), budget, device)
        with RunFolder(path / f"{s.method}-{seed}", vars(s)) as folder:
            if (folder.path / "result.json").exists():
                result = folder.read_result()
            else:
                task = _task(s.dataset, s.model, seed, s.noise, s.l2, device)
                result = cleaning_run.run_job(s, device, folder, task)
            rows.append(
                {
                    "seed": seed,
                    "best": result["best"],
                    "history": _thin(result["history"]),
                    "seconds": result["provenance"]["seconds"],
                }
            )
    return rows


def _thin(history: list[dict], most: int = 60) -> list[dict]:
    """At most so many lines of a log, and of each what the figure needs."""
    step = max(1, math.ceil(len(history) / most))
    keys = ("iteration", "seconds", "gradients", "tuning_loss", "test_loss", "test_accuracy", "auc")
    return [{k: _round(row[k]) for k in keys if k in row} for row in history[::step]]


def _round(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(rows: list[dict]) -> str:
    """The results as text: at the iterate that the tuning loss chose, mean over the seeds."""
    lines = [f"{'method':<20}{'test loss':>10}{'accuracy':>17}{'AUC':>7}{'s':>8}{'gradients':>11}"]
    for row in sorted(rows, key=_test_loss):
        if not row["runs"]:
            lines.append(f"{row['method']:<20} diverged in every trial")
            continue
        best = [run["best"] for run in row["runs"]]
        accuracies = [100 * b["test_accuracy"] for b in best]
        spread = f"{mean(accuracies):.1f} ({min(accuracies):.1f}-{max(accuracies):.1f})"
        aucs = f"{mean(b['auc'] for b in best):.3f}" if "auc" in best[0] else ""
        lines.append(
            f"{row['method']:<20}{_test_loss(row):10.4f}{spread:>17}{aucs:>7}"
            f"{mean(b['seconds'] for b in best):8.1f}{mean(b['gradients'] for b in best):11.0f}"
        )
    return "\n".join(lines)


def _test_loss(row: dict) -> float:
    return mean(run["best"]["test_loss"] for run in row["runs"]) if row["runs"] else math.inf
