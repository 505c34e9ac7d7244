"""The studies of the book's tasks, each a list of variants under one search.

After the main paper (arXiv 2603.29108): the trade-off of the solvers (its Figure 1), the batch size
(Figures 3 and 7), factors kept for several iterations (Table 2), the moving average of the factors
(Figure 6); and one of ours, the rate and kind of the noise. Its Figures 2 and 5, all methods, are
`cleaning_comparison`. Every variant runs for the same number of outer iterations. The study
``resnet18`` asks on a ResNet-18 what the paper's Figures 1 to 3 and Table 2 ask, for whoever has a
GPU for some minutes at a time; ``text`` asks on a BERT what its Table 7 asks, ``long_tail`` on
long-tailed classes what its Table 3 does, ``pretraining`` with masked words what its Table 4 does.
``schedules`` asks what chapter 18 does, on CIFAR-10.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from bilevel_lite.experiment import search
from bilevel_lite.experiment import settings as declared
from bilevel_lite.experiment.search import Variant
from bilevel_lite.experiment.task import Task
from bilevel_lite.options import check, options_of, whole
from bilevel_lite.session import pick_device
from bilevel_lite.tasks import cleaning_studies as cleaning
from bilevel_lite.tasks import (
    long_tail,
    long_tail_study,
    poisoning_study,
    pretraining,
    pretraining_study,
    schedules_study,
    text_study,
    unlearnable_study,
)
from bilevel_lite.tasks.cleaning_comparison import MINIBATCHES, ROLES, searched
from bilevel_lite.tasks.hypercleaning import BASELINES, SIZES, Hypercleaning

__all__ = ["STUDIES", "Numbers", "Study", "run", "runs", "usual", "variants"]


@dataclass(kw_only=True)
class Numbers:
    """How much a study runs."""

    seeds: int = whole(default=3, help="final runs of each variant")
    first_seed: int = whole(default=0, least=0, help="seed of the first of them; the search's is 0")
    trials: int = whole(default=16, help="points tried for each variant")
    widen: int = whole(
        default=0, least=0,
        help="how often a winner on its edge may widen the boxes; all then get more trials",
    )  # fmt: skip
    search_steps: int = whole(default=400, help="outer iterations of a trial")
    outer_steps: int = whole(default=1000, help="of a final run")
    final_budget: int = whole(
        default=0, least=0,
        help="instead of --outer-steps: gradients (of one inner batch); 0: none",
    )  # fmt: skip
    looks: int = whole(default=50, help="evaluations in a final run")
    baselines: int = declared.switch(0, "1: also train without weights, on the first seed")


# settings of the tasks that may be given to a study, the same for all its variants
SAME = (
    "model", "stem", "batchnorm", "layers", "encoder", "texts", "imbalance", "most",
    "examples", "victim", "width", "images",
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A study by its name.

    Attributes:
        asks: What it asks.
        variants: Of a dataset and a model.
        usual: What it is run with, where that differs from `Numbers` and the task's settings.
        batch: The batch size in every role, where it is not the dataset's.
        cross: That of J, where it is another one.
        on_gpu: What differs from ``usual`` on a GPU, ``batch`` among it.
        kind: The task.
        datasets: Of the task.
        also: Settings that are the same for all its rows.
        also_on_gpu: What of ``also`` is another one on a GPU.
        own_batches: Whether the task's own batch sizes are taken, not those of hypercleaning.
    """

    asks: str
    variants: Callable[[str, str], list[Variant]]
    usual: dict = field(default_factory=dict)
    batch: int | None = None
    cross: int | None = None
    on_gpu: dict = field(default_factory=dict)
    kind: type[Task] = Hypercleaning
    datasets: tuple[str, ...] = tuple(SIZES)
    also: dict = field(default_factory=dict)
    also_on_gpu: dict = field(default_factory=dict)
    own_batches: bool = False


STUDIES = {
    "solvers": Study("test loss against time per outer iteration, by solver", cleaning.solvers),
    "batch": Study("test loss by batch size", cleaning.batch),
    "refresh": Study("factors kept for several outer iterations, KFAC and EKFAC", cleaning.refresh),
    "ema": Study("moving average of the factors, by damping and batch size", cleaning.ema),
    "noise": Study("rate and kind of the label noise", cleaning.noise),
    "resnet18": Study(
        "KFAC against its rivals on a ResNet-18, and its factors kept (5 to 8 hours of an H200: "
        "figures/README.md)",
        cleaning.resnet18,
        {
            "dataset": "cifar10", "model": "resnet18", "stem": "imagenet", "first_seed": 1,
            "trials": 8, "widen": 2, "search_steps": 1000, "baselines": 1,
        },
        batch=256,
    ),
    "text": Study(
        "weakly labelled texts and the last layers of an encoder, by solver",
        text_study.variants,
        {
            "dataset": "trec", "first_seed": 1, "trials": 6, "search_steps": 60,
            "outer_steps": 150, "looks": 15,
        },
        batch=32,
        cross=text_study.CROSS,
        on_gpu={"batch": 128, "search_steps": 200, "outer_steps": 1000, "looks": 50},
        kind=text_study.TextCleaning,
        datasets=tuple(text_study.SIZES),
    ),
    "poisoning": Study(
        "what an attack by poisoned rows costs a fresh defender, by solver",
        poisoning_study.variants,
        {"first_seed": 1, "seeds": 5, "trials": 6, "search_steps": 200, "looks": 20},
        kind=poisoning_study.Poisoning,
    ),
    "unlearnable": Study(
        "what noise within a radius costs whoever trains on it, by method; with victims that "
        "augment or recompress",
        unlearnable_study.variants,
        {
            "dataset": "cifar10", "model": "lenet", "first_seed": 1, "seeds": 2,
            "final_budget": 1000, "looks": 1,
        },
        on_gpu={"victim": "resnet18", "width": 16, "images": 10_000, "final_budget": 10_000},
        kind=unlearnable_study.Unlearnable,
        own_batches=True,
    ),
    "schedules": Study(
        "rates of a training: learned by forward mode, searched for with fixed shapes, greedy",
        schedules_study.variants,
        {
            "dataset": "cifar10", "model": "lenet", "images": 5000, "first_seed": 1,
            "outer_steps": 6, "looks": 6,
        },
        kind=schedules_study.Schedules,
        own_batches=True,
    ),
    "long_tail": Study(
        "how to weigh the examples of long-tailed classes: plain training, focal loss, "
        "class-balanced weights, a network of the losses by solver",
        long_tail_study.variants,
        {
            "dataset": "cifar10", "model": "lenet", "first_seed": 1, "trials": 4,
            "search_steps": 75, "outer_steps": 150, "looks": 15,
        },
        # 100 epochs of 123 batches, as the paper has them
        on_gpu={"model": "resnet32", "search_steps": 600, "outer_steps": 1230, "looks": 50},
        kind=long_tail.LongTail,
        own_batches=True,
        datasets=tuple(long_tail.SIZES),
    ),
    "pretraining": Study(
        "what a masked text is worth to an end task: nothing, a fixed weight, two weights by "
        "cosines, a network of its loss by solver",
        pretraining_study.variants,
        {
            "dataset": "sciie", "first_seed": 1, "trials": 4, "search_steps": 20,
            "outer_steps": 40, "looks": 8,
        },
        on_gpu={"layers": "all", "search_steps": 50, "outer_steps": 100, "looks": 20},
        kind=pretraining.Pretraining,
        datasets=tuple(pretraining.SIZES),
        also=pretraining_study.ALSO,
        also_on_gpu=pretraining_study.ALSO_GPU,
    ),
}  # fmt: skip


def _named(study: str, dataset: str | None = None) -> Study:
    if study not in STUDIES:
        raise ValueError(f"study: got {study!r}, expected one of {sorted(STUDIES)}")
    one = STUDIES[study]
    if dataset is not None and dataset not in one.datasets:
        known = sorted(one.datasets)
        raise ValueError(f"dataset: got {dataset!r}, expected one of {known} in {study}")
    return one


def usual(study: str, dataset: str | None = None, on_gpu: bool = False) -> dict:
    """What a study is run with where nothing is given: dataset, `Numbers`, `SAME`.

    Raises:
        ValueError: for an unknown study or dataset.
    """
    one = _named(study, dataset)
    own = {**one.usual, **(one.on_gpu if on_gpu else {})}
    dataset = dataset or own.get("dataset", "mnist")
    of_task = vars(one.kind.settings(dataset=dataset))
    same = {name: of_task[name] for name in SAME if name in of_task}
    return {**same, **vars(Numbers()), **own, "dataset": dataset}


def variants(study: str, dataset: str, model: str) -> list[Variant]:
    """Return the variants of a study.

    Raises:
        ValueError: for an unknown study or dataset.
    """
    one = _named(study, dataset)
    found = one.variants(dataset, model)
    if one.kind is not Hypercleaning:
        return found
    return [replace(variant, space=searched(variant.space, model)) for variant in found]


def runs(study: str) -> int:
    """How many runs a study has with its usual numbers, its trials among them, if no box widens."""
    s = usual(study)
    found = variants(study, s["dataset"], s.get("model", ""))
    searched_for = [variant for variant in found if variant.space and not variant.follows]
    trials = len(searched_for) * s["trials"]
    baselines = len(BASELINES) if s["baselines"] else 0
    return trials + baselines + len(found) * s["seeds"]


def _fixed(variant: Variant, at: dict[str, float]) -> Variant:
    """The variant at these values, without a search."""
    if missing := sorted(set(variant.space) - set(at)):
        raise ValueError(f"at: {variant.name} also needs {missing}")
    values = {name: at[name] for name in variant.space}
    return replace(variant, settings={**variant.settings, **values}, space={}, follows="")


def run(
    study: str,
    out: str,
    only: list[str] | None = None,
    at: dict[str, float] | None = None,
    sizes: dict[str, int] | None = None,
    storage: str | None = None,
    device: str | None = None,
    minutes: float | None = None,
    status: bool = False,
    **given,
) -> dict:
    """Run or resume a study.

    Args:
        study: A key of `STUDIES`.
        out: Output folder; stopped, the same command goes on there.
        only: Names of variants to run; all of them by default.
        at: Instead of a search: values of what it would search for, where a variant has it.
        sizes: Other batch sizes than those of the study or dataset, by role (a name in ``ROLES``);
            not in the studies that set them.
        storage: Optuna's database; SQLite in ``out`` by default.
        device: Such as ``"cpu"``; CUDA if there, by default.
        minutes: Stop after so many; the same command goes on.
        status: Only say what is done and what is left.
        **given: What differs from `usual`: ``dataset``, a field of `Numbers`, or a setting of the
            task that is in `SAME`; None is the usual.

    Returns:
        The result, also written to ``result.json``.

    Raises:
        Stopped: if it was stopped before the end, or only asked where it stands.
        ValueError: for an unknown name or a number out of range.
        RunError: if the folder cannot be used, Optuna is missing, or the device is out of memory.
        DataError: if the dataset cannot be had.
    """
    known = {"dataset", *vars(Numbers()), *SAME}
    if unknown := sorted(set(given) - known):
        raise ValueError(f"study: has no setting {unknown}, expected some of {sorted(known)}")
    given = {name: v for name, v in given.items() if v is not None}
    one, on_gpu = _named(study), pick_device(device).type == "cuda"
    s = {**usual(study, given.get("dataset"), on_gpu), **given}
    numbers = Numbers(**{name: s[name] for name in vars(Numbers())})
    check(numbers)
    dataset, model, batch = s["dataset"], s.get("model", ""), s.get("batch", one.batch)
    if model != "resnet18" and "stem" in s and "stem" not in given:
        s["stem"] = options_of(one.kind.Settings)["stem"].default  # the study's is its model's
    same = {name: s[name] for name in SAME if name in declared.of(one.kind.Settings)}
    if none := [name for name in SAME if name in given and name not in same]:
        raise ValueError(f"{none[0]}: {study} has none; it has {sorted(same)}")
    chosen = variants(study, dataset, model)
    known = [variant.name for variant in chosen]
    unknown = sorted(set(only or []) - set(known))
    if unknown:
        raise ValueError(f"only: {study} has no {unknown}; expected some of {known}")
    chosen = [variant for variant in chosen if not only or variant.name in only]
    names = {variant.name for variant in chosen}
    for variant in chosen:
        if at is None and variant.follows and variant.follows not in names:
            raise ValueError(
                f"only: {variant.name} runs at the winner of {variant.follows}; name that too"
            )
    sizes = sizes or {}
    free = set(ROLES) - set.intersection(*(set(variant.settings) for variant in chosen))
    if unknown := sorted(set(sizes) - free):
        raise ValueError(f"sizes: got {unknown}, expected some of {sorted(free)} in {study}")
    if bad := {
        role: size for role, size in sizes.items() if not (size >= 1 and float(size).is_integer())
    }:
        raise ValueError(f"sizes: got {bad}, expected whole numbers of at least 1")
    sizes = {role: int(size) for role, size in sizes.items()}
    batches = cleaning.sizes(dataset, batch) if batch else {}
    if one.cross:
        most = same.get("texts") or text_study.SIZES[dataset][0]
        batches |= {"cross_batch_size": min(one.cross, most)}
    minibatches = {} if one.own_batches else MINIBATCHES.get(dataset, {})
    base = {**minibatches, **one.also, **(one.also_on_gpu if on_gpu else {}), **batches, **sizes}
    base |= {name: value for name, value in same.items() if name != "model"}
    if at is not None:
        searched_for = {name for variant in chosen for name in variant.space}
        if unknown := sorted(set(at) - searched_for):
            raise ValueError(f"at: got {unknown}, expected some of {sorted(searched_for)}")
        chosen = [_fixed(variant, at) for variant in chosen]
    final = {"outer_steps": numbers.outer_steps}
    if numbers.final_budget:
        final = {"budget": numbers.final_budget}
    return search.run(
        one.kind,
        {
            "kind": f"{one.kind.name}_study",
            "study": study,
            "dataset": dataset,
            **({"model": model} if "model" in same else {}),
            **({"sizes": sizes} if sizes else {}),
        },
        base,
        chosen,
        {"outer_steps": numbers.search_steps},
        final,
        out,
        numbers.seeds,
        numbers.trials,
        storage,
        device,
        numbers.looks,
        numbers.first_seed,
        numbers.widen,
        bool(numbers.baselines),
        minutes,
        status,
    )
