"""Variants of a run of any task under one protocol: the same search for each, then some seeds.

For every variant the same number of trials: the first points of a scrambled Sobol sequence in the
box of its step sizes and numbers, each run on seed 0 for the same length and judged by the task's
criterion. The best point then runs for every seed. The trials go in turns, as do the final runs,
so that whenever it is stopped all variants have had the same. Where it is asked for, a winner on
the edge of its box widens the box, for all variants, and all get the same number of further trials.

A trial is a run like the final ones, in a folder of its own until it is done: either can be stopped
between two iterations and goes on there. Optuna keeps what the trials gave, in SQLite or any
database it takes. Several machines may use one database if each has variants of its own.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bilevel_lite.experiment import job
from bilevel_lite.experiment import settings as declared
from bilevel_lite.experiment.folder import Clock, RunError, RunFolder, provenance, read_sealed
from bilevel_lite.experiment.methods import require_given
from bilevel_lite.experiment.stopping import Stopped, stoppable
from bilevel_lite.experiment.task import Column, Task
from bilevel_lite.options import options_of
from bilevel_lite.refuse import NotFinite
from bilevel_lite.session import pick_device

__all__ = ["Variant", "mean_best", "pace", "run", "table"]

TRIAL_LOOKS = 20  # evaluations in a trial, whatever an iteration costs
EDGE = 0.1  # the outer tenth of a box, on its logarithmic scale, is its edge
WIDER = 0.5  # by this share of its width, on the side of the winner, a box widens


@dataclass(frozen=True)
class Variant:
    """One line of a study.

    Attributes:
        name: In the table and the figure.
        settings: What it sets, ``method`` among it.
        space: What its search covers: setting -> (low, high), all on a logarithmic scale; empty
            where nothing is searched for.
        follows: Another variant of the same space, whose choice this one takes instead of a search.
    """

    name: str
    settings: dict[str, Any]
    space: dict[str, tuple[float, float]] = field(default_factory=dict)
    follows: str = ""


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
    first_seed: int = 0,
    widen: int = 0,
    baselines: bool = False,
    minutes: float | None = None,
    status: bool = False,
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
        seeds: How many.
        trials: Points tried for each, on seed 0.
        storage: Optuna's database; SQLite in ``out`` by default.
        device: Such as ``"cpu"``; CUDA if there, by default.
        looks: Evaluations in a final run.
        first_seed: Of the final runs; from 1 on the search's seed is not among them.
        widen: How often boxes may widen; each time all variants get half as many further trials.
        baselines: Also train what the task compares with, on the first seed.
        minutes: Stop after so many, or when asked to (`stopping.stoppable`).
        status: Only say what is done and what is left, also while another process is at it; makes
            nothing.

    Returns:
        The result, also written to ``result.json``.

    Raises:
        Stopped: if it was stopped before the end, or only asked where it stands; the message says
            what is left.
        ValueError: for a number out of range or an unknown setting.
        RunError: if the folder cannot be used, Optuna is missing, or the device is out of memory.
        DataError: if the data cannot be had.
    """
    for name, value, least in (
        ("seeds", seeds, 1), ("trials", trials, 1), ("looks", looks, 1),
        ("first_seed", first_seed, 0), ("widen", widen, 0),
    ):  # fmt: skip
        if not least <= value < 2**63:
            raise ValueError(f"{name}: got {value}, expected at least {least} and below 2**63")
    for prefix, length in (("search_", search), ("", final)):
        for name, value in length.items():
            if not 0 < value < math.inf:
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
    _require_boxes(jobs)
    rules = {"first_seed": first_seed, "widen": widen, "baselines": int(baselines)}
    config = {
        **config, "seeds": seeds, "trials": trials, "search": search, "final": final, "base": base,
        "looks": looks, **{name: value for name, value in rules.items() if value},
        "variants": [
            {"name": v.name, "settings": v.settings, **_follows(v)} for v in variants
        ],
    }  # fmt: skip
    with stoppable(minutes) as stop, job.float32(), RunFolder(out, config, status) as folder:
        if (folder.path / "result.json").exists():
            result = folder.read_result()
            print(
                f"{folder.path} holds the finished study:\n{table(result['results'], kind.shown())}"
            )
            return result
        trials_db = (folder.path / "trials.db").resolve()
        if not status or trials_db.exists():  # asked before it began: nothing is made
            storage = storage or f"sqlite:///{trials_db}"
        study = _Study(kind, jobs, folder, storage, place, stop)
        if status:
            raise Stopped(f"{folder.path}: {study.standing()}")
        for one in study.slices():
            if why := stop():
                raise Stopped(f"stopped ({why}): {study.standing()}; the same command goes on")
            try:
                study.do(one)
            except Stopped as stopped:
                raise Stopped(
                    f"stopped ({stopped}) in {one}, after iteration {stopped.iteration}: "
                    f"{study.standing()}; the same command goes on"
                ) from None
        shutil.rmtree(folder.path / "trials", ignore_errors=True)
        rows = study.rows()
        source = _made(kind, jobs[-1][1], place).source
        result = {**folder.config, "source": source, **study.fits(), "results": rows}
        result["provenance"] = provenance(place, first_seed, study.clock.seconds)
        folder.finish(result)
    print(table(rows, kind.shown()))
    return result


def _require_boxes(jobs: list[tuple[Variant, Any]]) -> None:
    """Refuse a box that is none, or in which a run would refuse a point."""
    boxes = {v.name: v.space for v, _ in jobs}
    if not jobs:
        raise ValueError("variants: got none, expected at least one")
    for v, s in jobs:
        if v.follows and v.follows not in boxes:
            raise ValueError(f"variants: {v.name} follows {v.follows!r}, which is none of them")
        for name, (low, high) in v.space.items():
            if name not in vars(s):
                raise ValueError(f"variants: {v.name} searches {name!r}, which is no setting")
            if not 0 < low < high < math.inf:
                raise ValueError(f"{name}: got a box from {low} to {high}, expected 0 < LOW < HIGH")
            for end in v.space[name]:
                _check(s, name, end)
        require_given(s.method, {*declared.given(s), *boxes[v.follows or v.name]})


def _check(s: Any, name: str, value: float) -> None:
    """Refuse a value that the setting's option does not take."""
    if (one := options_of(s).get(name)) is not None:
        one.check(name, value)


def _fits(s: Any, name: str, value: float) -> bool:
    try:
        _check(s, name, value)
    except ValueError:
        return False
    return True


def _follows(variant: Variant) -> dict:
    return {"follows": variant.follows} if variant.follows else {}


@dataclass(frozen=True)
class _Slice:
    """What is done at a time: a trial, the training of one baseline, a final run.

    Attributes:
        what: ``"trial"``, ``"baseline"`` or ``"final run"``.
        name: Of the variant, or of the baseline.
        number: Of the trial from 0; the seed of the others.
        point: What the trial tries.
    """

    what: str
    name: str
    number: int
    point: dict[str, float] | None = None

    def __str__(self):
        seed = "" if self.what == "trial" else "seed "
        return f"{self.what} of {self.name}, {seed}{self.number}"

    @property
    def key(self) -> list:
        """By which the log knows it."""
        return [self.what, self.name, self.number]


class _Study:
    """A study in its folder: its slices in order, what they gave, what they took.

    The log has a line for each slice that ended or was stopped, with its seconds by the wall clock
    and the length that it went, in the unit of the study's lengths.
    """

    def __init__(self, kind, jobs, folder: RunFolder, storage: str | None, device, stop):
        self.kind, self.folder, self.device, self.stop = kind, folder, device, stop
        self.variants = {v.name: v for v, _ in jobs}
        self.settings = {v.name: s for v, s in jobs}
        c = folder.config
        self.search, self.final, self.looks = c["search"], c["final"], c["looks"]
        self.trials, self.widen = c["trials"], c.get("widen", 0)
        self.seeds = range(first := c.get("first_seed", 0), first + c["seeds"])
        self.clock = Clock(folder.state["seconds"] if folder.state else 0.0, device)
        self.log = [row for row in folder.rows() if "slice" in row] if folder.state else []
        self.found = {
            v.name: _Trials(kind, s, v, self.search, storage)
            for v, s in jobs
            if v.space and not v.follows
        }
        first = jobs[0][1]  # of all trials' task, so that nothing is made that is not needed
        self.baselines = (
            list(_made(kind, first, device).baselines(first)) if c.get("baselines") else []
        )

    # -- what there is to do

    def slices(self, all_: bool = False) -> Iterator[_Slice]:
        """What is left, in order; boxes are looked at when the trials before them are done."""
        start, boxes = 0, {name: self.variants[name].space for name in self.found}
        self._boxes, tried = boxes, {name: [] for name in boxes}
        for count in (self.trials, *(max(1, self.trials // 2),) * self.widen):
            if start:
                boxes = self._wider(before := boxes, tried)
                if boxes == before:
                    break
                self._boxes = boxes
            points = {name: _points(box, start + count)[start:] for name, box in boxes.items()}
            for k in range(count):
                for name, found in self.found.items():
                    if all_ or points[name][k] not in found.points:
                        yield _Slice("trial", name, start + k, points[name][k])
            if any(p not in self.found[n].points for n, several in points.items() for p in several):
                break  # only when asked where it stands: what follows is not known yet
            start += count
            tried = {name: tried[name] + several for name, several in points.items()}
        ends = [_Slice("baseline", name, self.seeds[0]) for name in self.baselines]
        for follow in (False, True):  # those that follow come last
            ends += [
                _Slice("final run", name, seed)
                for seed in self.seeds
                for name, v in self.variants.items()
                if bool(v.follows) == follow and self.chosen(name) is not None
            ]
        done = [row["slice"] for row in self.log if row["done"]]
        yield from (one for one in ends if all_ or one.key not in done)

    def _wider(self, boxes: dict, tried: dict) -> dict:
        """The boxes, wider in every setting in which some variant's winner is on an edge.

        The winner among the points of the rounds so far: resumed later, the boxes are the same.
        """
        sides = {
            side for name, box in boxes.items() for side in self._edges(name, box, tried[name])
        }
        out = {}
        for name, box in boxes.items():
            out[name] = dict(box)
            for setting, (low, high) in box.items():
                fits = partial(_fits, self.settings[name], setting)
                more = (high / low) ** WIDER
                ends = [float(f"{end:.4g}") for end in (low / more, high * more)]
                low = ends[0] if (setting, "low") in sides and fits(ends[0]) else low
                high = ends[1] if (setting, "high") in sides and fits(ends[1]) else high
                out[name][setting] = (low, high)
        return out

    def _edges(self, name: str, box: dict, among: list | None = None) -> list[tuple[str, str]]:
        """(setting, "low" or "high") where the winner lies in the outer `EDGE` of the box."""
        out = []
        for setting, value in (self.found[name].best(among) or {}).items():
            low, high = box[setting]
            share = math.log(value / low) / math.log(high / low)
            if not EDGE <= share <= 1 - EDGE:
                out.append((setting, "low" if share < EDGE else "high"))
        return out

    def chosen(self, name: str) -> dict[str, float] | None:
        """The best point so far; None if every trial diverged."""
        found = self.found.get(self.variants[name].follows or name)
        return found.best() if found else {}

    # -- doing it

    def do(self, one: _Slice) -> None:
        """Do a slice and log it; one that is stopped is logged as far as it went."""
        length = self.search if one.what == "trial" else self.final
        unit, full = next(iter(length.items()))
        before = sum(row["went"] for row in self.log if row["slice"] == one.key)
        # the data first: they are none of a slice's own time
        seed, some = 0 if one.what == "trial" else one.number, next(iter(self.settings.values()))
        _made(self.kind, replace(self.settings.get(one.name, some), seed=seed), self.device)
        work = {"trial": self._trial, "baseline": self._baseline, "final run": self._final}
        since, more = time.perf_counter(), {}
        try:
            with self.clock:
                more = work[one.what](one)
            went = full
        except Stopped as stopped:
            went = stopped.iteration if unit == "outer_steps" else stopped.gradients
            self._log(one, False, went - before, time.perf_counter() - since)
            raise
        went = more.pop("went", went)  # of one that diverged
        self._log(one, True, went - before, wall := time.perf_counter() - since, **more)
        note = "".join(f", {k} {_round(v)}" for k, v in more.items() if not isinstance(v, dict))
        print(f"{one}{note} ({wall:.1f} s)", flush=True)

    def _log(self, one: _Slice, done: bool, went: float, wall: float, **more) -> None:
        row = {"slice": one.key, "done": done, "went": went, "wall": round(wall, 3), **more}
        self.folder.log(row)
        self.folder.checkpoint({"seconds": self.clock.seconds})
        self.log.append(row)

    def _trial(self, one: _Slice) -> dict:
        """The lowest criterion met; infinite if the run diverges before any."""
        path = self.folder.path / "trials" / f"{one.name}-{one.number}"
        s, more = replace(self.settings[one.name], **one.point), {}
        with RunFolder(path, {"point": one.point}) as folder:
            try:
                s = _of_length(self.kind, s, self.search, TRIAL_LOOKS, self.device)
                made = _made(self.kind, s, self.device)
                job.run_job(s, self.device, folder, made, self.stop, trial=True)
            except NotFinite:
                rows = folder.rows()
                unit = "iteration" if "outer_steps" in self.search else "gradients"
                more["went"] = rows[-1][unit] if rows else 0
            values = [row[self.kind.criterion] for row in folder.rows()]
        value = min(filter(math.isfinite, values), default=math.inf)
        self.found[one.name].tell(one.point, value)
        shutil.rmtree(path)  # its checkpoint may be large
        return {**more, self.kind.criterion: _finite(value)}

    def _baseline(self, one: _Slice) -> dict:
        s = replace(next(iter(self.settings.values())), seed=one.number)
        s = _of_length(self.kind, s, self.final, self.looks, self.device)
        task = _made(self.kind, s, self.device)
        with job.no_memory(s, task):
            return {"fit": task.baselines(s)[one.name]()}

    def _final(self, one: _Slice) -> dict:
        s = replace(self.settings[one.name], **self.chosen(one.name), seed=one.number)
        if self._result(one.name, s):
            return {}
        s = _of_length(self.kind, s, self.final, self.looks, self.device)
        with RunFolder(self._path(one.name, s), self.kind.config(s)) as folder:
            try:
                job.run_job(s, self.device, folder, _made(self.kind, s, self.device), self.stop)
            except NotFinite as error:  # a result too
                return {"why": str(error), "went": 0}
            for name in ("checkpoint.pt", "best-*.pt"):  # large, and not needed any more
                folder.remove(name)
        return {}

    def _path(self, name: str, s: Any) -> Path:
        return self.folder.path / f"{name}-{s.seed}"

    def _result(self, name: str, s: Any) -> dict | None:
        """The result of a final run, if it is done."""
        path = self._path(name, s) / "result.json"
        if not path.exists():
            return None
        result = read_sealed(path)
        here, before = declared.written(s), result["settings"]
        for key in here.keys() | before.keys():
            if key not in ("outer_steps", "evaluate_every", "budget"):  # of `_of_length`
                if (there := before.get(key)) != (value := here.get(key)):
                    raise RunError(
                        f"{path} was made with other settings ({key}: {there!r} there, {value!r} "
                        "here); use another folder"
                    )
        return result

    # -- what it gave

    def fits(self) -> dict:
        """The baselines, if they were asked for."""
        found = {row["slice"][1]: row["fit"] for row in self.log if "fit" in row}
        return {"baselines": found} if found else {}

    def rows(self) -> list[dict]:
        """Search and final runs of each variant, as JSON gives them back."""
        rows = [
            self._row(v, {} if v.follows else self._boxes.get(name, v.space))
            for name, v in self.variants.items()
        ]
        return json.loads(json.dumps(rows))

    def _row(self, variant: Variant, box: dict) -> dict:
        name, found = variant.name, self.found.get(variant.name)
        values = zip(found.points, found.values, strict=True) if found else ()
        row = {
            "method": name, "settings": variant.settings, "space": box,
            "trials": [{**point, self.kind.criterion: _finite(value)} for point, value in values],
            "chosen": self.chosen(name), "runs": [], "diverged": [],
            # settings in which the winner is on the edge of its box: what is beyond is not known
            **({"edge": self._edges(name, box)} if found else {}),
            **_follows(variant),
        }  # fmt: skip
        why = {row["slice"][2]: row["why"] for row in self.log
               if row["slice"][:2] == ["final run", name] and "why" in row}  # fmt: skip
        for seed in self.seeds if row["chosen"] is not None else ():
            if seed in why:
                row["diverged"].append({"seed": seed, "why": why[seed]})
                continue
            s = replace(self.settings[name], **row["chosen"], seed=seed)
            row["runs"].append(self._kept(self._result(name, s), variant))
        return row

    def _kept(self, result: dict, variant: Variant) -> dict:
        """Of a final run, what figure and table need."""
        history = result["history"]
        return {
            "seed": result["settings"]["seed"],
            "best": result["best"],
            "last": {k: _round(v) for k, v in history[-1].items()},
            "history": _thin(history, self.kind.dropped),
            "seconds": result["provenance"]["seconds"],
            # share of the looks at which CG stopped on a direction of negative curvature
            "negative_curvature": mean(look["negative_curvature"] for look in history),
            **self.kind.keep(result, variant.settings),
        }

    def standing(self) -> str:
        """What is done, what is left, and how long that takes at the pace measured here."""
        left, every = list(self.slices()), list(self.slices(all_=True))
        parts = []
        for what in ("trial", "baseline", "final run"):
            of, open_ = (sum(one.what == what for one in some) for some in (every, left))
            parts += [f"{what}s {of - open_} of {of}"] if of else []
        text = f"{len(every) - len(left)} of {len(every)} runs done ({', '.join(parts)})"
        paces: dict[str, list[tuple[float, float]]] = {}
        for row in self.log:
            if row["went"] > 0:
                what, name, _ = row["slice"]
                key = what if what == "baseline" else name
                paces.setdefault(key, []).append((row["wall"], row["went"]))
        if not left or not paces:
            return f"{text}; how long one takes is known after the first" if left else text
        paces = {key: sum(w for w, _ in of) / sum(n for _, n in of) for key, of in paces.items()}
        seconds = 0.0
        for one in left:
            length = self.search if one.what == "trial" else self.final
            went = sum(row["went"] for row in self.log if row["slice"] == one.key)
            key = one.what if one.what == "baseline" else one.name
            pace_ = paces.get(key, mean(paces.values()))
            seconds += pace_ * max(0.0, next(iter(length.values())) - went)
        about = f"about {seconds / 60:.{0 if seconds > 600 else 1}f} minutes left as measured here"
        trials = any(one.what == "trial" for one in left)
        return f"{text}; {about}{', if no box widens' if self.widen and trials else ''}"


class _Trials:
    """What the trials of one variant gave, kept by Optuna.

    Attributes:
        points: That were tried, in order.
        values: The criterion of each; infinite if it diverged.
    """

    def __init__(self, kind, s, variant: Variant, length: dict, storage: str | None):
        import optuna

        text = json.dumps([declared.written(s), variant.space, length], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]  # other settings, another study
        name = f"{kind.label(s)}-{variant.name}-{key}"
        self._storage = storage
        with self._asking("open"):
            self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        done = self._study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
        self.points, self.values = [t.params for t in done], [t.value for t in done]

    @contextmanager
    def _asking(self, verb: str):
        """Whatever Optuna's database makes of its address, or of a full disk, as one sentence."""
        try:
            yield
        except Exception as error:
            raise RunError(
                f"storage: Optuna cannot {verb} {self._storage!r} "
                f"({str(error.__cause__ or error).splitlines()[0]}); give a database such as "
                "sqlite:///trials.db, with room on its disk: the same command goes on"
            ) from error

    def tell(self, point: dict[str, float], value: float) -> None:
        """Keep one more."""
        from optuna.distributions import FloatDistribution
        from optuna.trial import create_trial

        at = {name: FloatDistribution(x, x, log=True) for name, x in point.items()}
        with self._asking("write into"):
            self._study.add_trial(create_trial(params=point, distributions=at, value=value))
        self.points.append(point)
        self.values.append(value)

    def best(self, among: list | None = None) -> dict[str, float] | None:
        """The point with the lowest value, the first of them; None if all diverged.

        Args:
            among: Only these points; all by default. Where there are none yet: no values.
        """
        pairs = [
            (value, point)
            for value, point in zip(self.values, self.points, strict=True)
            if among is None or point in among
        ]
        value, point = min(pairs, key=lambda pair: pair[0], default=(0.0, {}))
        return point if math.isfinite(value) else None


def _of_length(kind: type[Task], s: Any, length: dict[str, float], looks: int, device) -> Any:
    """Set the length, and the number of evaluations on the way."""
    if "outer_steps" in length:
        steps = int(length["outer_steps"])
        return replace(s, outer_steps=steps, evaluate_every=max(1, steps // looks))
    budget = length["budget"]
    method = _made(kind, s, device).method(s)
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
        with job.drawing(what["seed"], device):
            _tasks[key] = kind.make(kind.Settings(**what), device)
    return _tasks[key]


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


def _thin(history: list[dict], dropped: tuple[str, ...], most: int = 60) -> list[dict]:
    """At most so many lines of a log, and of each what the figures need."""
    step = max(1, math.ceil(len(history) / most))
    dropped = {"inner_loss", "outer_loss", "negative_curvature", *dropped}
    rows = [{k: v for k, v in row.items() if k not in dropped} for row in history[::step]]
    return [{k: _round(v) for k, v in row.items()} for row in rows]


def _round(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(rows: list[dict], columns: tuple[Column, ...]) -> str:
    """The results as text: the mean over the seeds, at the iterate that the criterion chose.

    Args:
        rows: Of the result of `run`.
        columns: Of the task; the first one sorts the rows, lowest first.
    """
    width = max([20, *(len(row["method"]) + 1 for row in rows)])
    titles = "".join(f"{column.title:>{column.width}}" for column in columns)
    lines = [f"{'':<{width}}{titles}{'s':>8}{'gradients':>11}"]
    for row in sorted(rows, key=lambda row: mean_best(row, columns[0].key)):
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
    if column.key not in row["runs"][0][column.at]:
        return ""
    values = [column.scale * run[column.at][column.key] for run in row["runs"]]
    text = [f"{value:{column.form}}" for value in (mean(values), min(values), max(values))]
    return f"{text[0]} ({text[1]}-{text[2]})" if column.spread else text[0]


def mean_best(row: dict, key: str) -> float:
    """Mean over the seeds of a measure at the chosen iterate; infinite if all diverged."""
    return mean(run["best"][key] for run in row["runs"]) if row["runs"] else math.inf


def pace(row: dict, key: str) -> float:
    """``"seconds"`` or ``"gradients"`` per outer iteration up to the best, mean over the seeds."""
    return mean(run["best"][key] / run["best"]["iteration"] for run in row["runs"])
