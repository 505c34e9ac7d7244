"""What a task says of itself; the job, the search and the command line ask nothing else.

    class Ridge(Task, name="ridge"):        # is known under this name from here on
        '''One penalty for each feature.'''

        @classmethod
        def make(cls, s, device): ...       # the two losses, the start, the data, from the settings
        def measure(self, lam, theta): ...  # a line of the log; ``criterion`` chooses the iterate

is all that must be said; what else may be said stands in `Task`, with its default.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bilevel_lite.algorithms.method import Method
from bilevel_lite.data.batches import Batches
from bilevel_lite.experiment import methods
from bilevel_lite.experiment import settings as declared
from bilevel_lite.options import check
from bilevel_lite.problem import BilevelProblem

__all__ = ["TASKS", "Column", "Task", "as_text", "find", "owner"]

TASKS: dict[str, type["Task"]] = {}  # filled by the subclasses themselves


def as_text(lines: list[str], source: str) -> str:
    """A table's lines as text, under them what is to be said of the data."""
    return "\n".join([*lines, *([f"data: {source}"] if source else [])])


class Column(NamedTuple):
    """A column of the table of a search: the mean over the seeds of one measure.

    Attributes:
        key: Of the measure.
        title: Of the column.
        form: How its numbers are written.
        width: Of the column.
        scale: What the numbers are multiplied by.
        spread: Whether the lowest and the highest seed are shown too.
        at: Of which look: ``"best"``, that of the chosen iterate, or ``"last"``.
    """

    key: str
    title: str
    form: str = ".4f"
    width: int = 10
    scale: float = 1
    spread: bool = False
    at: str = "best"


@dataclass(kw_only=True)
class Task:
    """A bilevel problem with its data, ready on one device.

    A subclass answers `make` and `measure`; all else has a default.

    Attributes:
        problem: The two losses.
        lam0: Start of the outer variable.
        theta0: Start of the inner one.
        train: (x, y) of the inner loss; None if `batches` is the subclass's own.
        validation: (x, y) of the outer loss, likewise.
        num_classes: If y are labels, by which they are checked; None if not.
        source: What is to be said beside every number; empty if nothing is.
    """

    problem: BilevelProblem
    lam0: Tensor
    theta0: Tensor
    train: tuple[Tensor, Tensor] | None = None
    validation: tuple[Tensor, Tensor] | None = None
    num_classes: int | None = None
    source: str = ""

    name: ClassVar[str] = ""
    Settings: ClassVar[type] = declared.Settings
    defaults: ClassVar[dict[str, Any]] = {}  # of settings, where the task has others
    criterion: ClassVar[str] = "criterion"  # the measure that chooses the iterate: lower is better
    columns: ClassVar[tuple[Column, ...]] = ()  # of a search's table, instead of the criterion
    group = None  # the processes that share each batch (`bilevel_lite.parallel.Group`)
    figures: ClassVar[str] = ""  # the module of the task's own figures, imported to draw one
    dropped: ClassVar[tuple[str, ...]] = ()  # measures that the thin log of a search leaves out

    def __init_subclass__(cls, name: str = "", **rest: Any):
        super().__init_subclass__(**rest)
        if name:
            cls.name, TASKS[name] = name, cls

    # -- from settings

    @classmethod
    def settings(cls, **given: Any) -> Any:
        """The settings of a run, those that were not given by their defaults.

        Raises:
            ValueError: for a name that is not a setting, or a value out of range.
        """
        given = {**cls.defaults, **given}
        kind = cls.fields(given.get("method"))
        if unknown := sorted(set(given) - set(declared.of(kind))):
            raise ValueError(f"{cls.name}: has no setting {unknown}")
        s = kind(**given)
        check(s)
        return s

    @classmethod
    def fields(cls, *names: str | None) -> type:
        """The dataclass of its settings, with the own options of these methods.

        Raises:
            ValueError: for a method that there is not, or with an option that has a setting's name.
        """
        usual = cls.defaults.get("method", cls.Settings.method)
        return declared.with_own(cls.Settings, [name or usual for name in names])

    @classmethod
    def make(cls, s: Any, device: torch.device) -> "Task":
        """Data, model and losses: all from the settings that the task declares, and the seed."""
        raise NotImplementedError

    @classmethod
    def config(cls, s: Any) -> dict:
        """What a run's folder is compared by: JSON values."""
        return {"task": cls.name, **declared.written(s)}

    @classmethod
    def label(cls, s: Any) -> str:
        """Under which name a search keeps its trials."""
        return cls.name

    # -- for the method

    def batches(self, s: Any) -> dict[str, Any]:
        """The four roles, ``inner_batch, outer_batch, curvature_batch, cross_batch``.

        Each draws from a generator of its own; the sets of f and J as they are if their size is 0.
        """

        def role(size: int, salt: int, split: tuple[Tensor, Tensor], whole: bool = False):
            sampler = self._sampler(s, size, salt, split)
            return sampler.all() if whole and not size else sampler

        return {
            "inner_batch": role(s.batch_size, 0, self.train),
            "outer_batch": role(s.outer_batch_size, 3, self.validation, whole=True),
            "curvature_batch": role(s.curvature_batch_size, 1, self.train),
            "cross_batch": role(s.cross_batch_size, 2, self.train, whole=True),
        }

    def fixed_batches(self, s: Any) -> tuple[list, list]:
        """Fixed minibatches of g and of f, for methods that remember one gradient for each.

        A remainder smaller than a batch is left out: the weights of its examples never move.
        """

        def parts(size: int, split: tuple[Tensor, Tensor]) -> list:
            sampler = self._sampler(s, size, 5, split)
            return [sampler.draw() for _ in range(len(sampler.x) // sampler.batch_size)]

        return parts(s.batch_size, self.train), parts(s.outer_batch_size, self.validation)

    def _sampler(self, s: Any, size: int, salt: int, split: tuple[Tensor, Tensor]) -> Batches:
        generator = torch.Generator().manual_seed(1_000_003 * (salt + 1) + s.seed)
        return Batches(*split, size or len(split[1]), generator, self.num_classes)

    def project(self, lam: Tensor) -> Tensor:
        """Where lam may be: everywhere, if the task does not say otherwise."""
        return lam

    def method(self, s: Any) -> Any:
        """The method of a run: that of the settings, if the task does not make another."""
        return methods.build(s, self)

    def attach(self, method: Method, s: Any) -> None:
        """Tell the method what its inner steps need beyond batches: nothing, by default."""

    def refresh(self, theta: Tensor) -> None:
        """Bring up to date what a model keeps for itself (BatchNorm's statistics)."""

    # -- for the log and the result

    def measure(self, lam: Tensor, theta: Tensor) -> dict[str, float]:
        """One line of the log; ``criterion`` is among it."""
        raise NotImplementedError

    def judge(self, lam: Tensor, theta: Tensor) -> float:
        """The criterion alone; a subclass may know a cheaper way to it than `measure`."""
        return self.measure(lam, theta)[self.criterion]

    def baselines(self, s: Any) -> dict[str, Callable[[], dict]]:
        """Name -> what is trained without the outer problem, as a function that does so."""
        return {}

    def result(self, s: Any, lam: Tensor, theta: Tensor) -> dict:
        """What table and figure need of the chosen iterate, beyond its line of the log.

        What a model keeps for itself was brought to ``theta`` (`refresh`).
        """
        return {}

    @classmethod
    def shown(cls) -> tuple[Column, ...]:
        """The columns of a search's table; the first one sorts it."""
        title = cls.criterion.replace("_", " ")
        return cls.columns or (Column(cls.criterion, title, ".4g", max(10, len(title) + 2)),)

    @classmethod
    def keep(cls, result: dict, given: dict[str, Any]) -> dict:
        """What a search keeps of a final run beyond its best line and a thin log.

        Args:
            result: Of the run.
            given: What the variant sets.
        """
        return {}

    @classmethod
    def table(cls, result: dict) -> str:
        """A run's result as text."""
        rows = {**result["baselines"], result["settings"]["method"]: result["best"]}
        rows |= {"retrained": result["retrained"]} if "retrained" in result else {}
        lines = [f"{cls.name}, seed {result['settings']['seed']}"]
        for name, row in rows.items():
            numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, int | float)]
            lines.append(f"{name:<20} {', '.join(numbers)}")
        return as_text(lines, result["source"])

    @classmethod
    def draw(cls, stored: dict) -> dict[str, Any]:
        """The figures of a stored result.

        Args:
            stored: ``{"kind": ..., "runs": [results of that kind]}``; a task's kinds begin with its
                name.

        Returns:
            Figures, by what follows the result's name in that of the file: of runs that of
            ``draw_runs``, of a study that of ``draw_study`` in the task's `figures`, if it has
            them. Else the criterion against gradients and seconds: of a search the first seed of
            each method, by name, else a line for each seed.
        """
        from bilevel_lite.plotting import STYLE, figure, plt

        if cls.figures:
            drawers = {f"{cls.name}_study": "draw_study", cls.name: "draw_runs"}
            own = getattr(import_module(cls.figures), drawers.get(stored["kind"], ""), None)
            if own is not None:
                return {"": own(stored)}
        lines = []
        for run in stored["runs"]:
            for row in run["results"] if "results" in run else [{"runs": [run]}]:
                found = [one for one in row["runs"] if "history" in one][:1]
                lines += [(row.get("method"), one["history"]) for one in found]
        with plt.rc_context(STYLE):
            fig, axes = figure(2, sharey=True)
            for ax, key in zip(axes, ("gradients", "seconds"), strict=True):
                for name, history in lines:
                    values = [row[cls.criterion] for row in history]
                    ax.plot([row[key] for row in history], values, label=name)
                ax.set_xlabel(key)
            axes[0].set_ylabel(cls.criterion.replace("_", " "))
            if any(name for name, _ in lines):
                axes[0].legend()
        return {"": fig}


def find(name: str) -> type[Task]:
    """The task of a name; ``MODULE:NAME`` imports the module first, so that a task may be anywhere.

    Raises:
        ValueError: if there is none.
    """
    _, task = methods.imported("task", name)
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r}; known: {sorted(TASKS)}")
    return TASKS[task]


def owner(kind: str) -> type[Task] | None:
    """The task that a kind of result belongs to: the longest name that it begins with."""
    names = [name for name in TASKS if kind == name or kind.startswith(f"{name}_")]
    return TASKS[max(names, key=len)] if names else None
