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
from bilevel_lite.session import pick_device
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
from bilevel_lite.tasks.cleaning_comparison import BOTH, DAMPING, MINIBATCHES, ROLES, STEP, searched
from bilevel_lite.tasks.hypercleaning import BASELINES, SIZES, Hypercleaning

__all__ = ["STUDIES", "USUAL", "Study", "run", "runs", "variants"]


def _cg(iters: int, method: str = "aid-cg", **settings) -> tuple[dict, dict]:
    return {"method": method, "iters": iters, **settings}, {**BOTH, **DAMPING}


def _neumann(products: int, **settings) -> tuple[dict, dict]:
    # the papers count products: K of them make K + 1 terms
    return {"method": "aid-neumann", "iters": products + 1, "damping": 0.0, **settings}, {
        **BOTH,
        **STEP,
    }


def _kfac(method: str = "aid-kfac", **settings) -> tuple[dict, dict]:
    return {"method": method, **settings}, {**BOTH, **DAMPING}


GGN = {"curvature": "ggn"}

# name -> (settings, search space); the step of the identity only scales outer_lr
SOLVERS: dict[str, tuple[dict, dict]] = {
    "identity": ({"method": "aid-identity"}, BOTH),
    **{f"cg-{k}": _cg(k) for k in (1, 3, 10)},
    **{f"cg-{k}-ggn": _cg(k, **GGN) for k in (1, 3, 10)},
    "cg-normal-3": _cg(3, "aid-cg-normal"),
    **{f"neumann-{k}": _neumann(k) for k in (3, 10, 20)},
    **{f"neumann-{k}-ggn": _neumann(k, **GGN) for k in (3, 10, 20)},
    "kfac": _kfac(),
    "kfac-empirical": _kfac(fisher="empirical"),
    "ekfac": _kfac("aid-ekfac"),
    "pcg-3": _cg(3, "aid-pcg", **GGN),
}


def _solvers(dataset: str, model: str) -> list[Variant]:
    # with a linear model GGN and Hessian are the same matrix
    names = [name for name in SOLVERS if model != "linear" or not name.endswith("-ggn")]
    return [Variant(name, *SOLVERS[name]) for name in names]


def _sizes(dataset: str, size: int) -> dict[str, int]:
    """The same batch size in every role, as far as the split has examples."""
    train, validation = (text_study.SIZES if dataset in text_study.SIZES else SIZES)[dataset][:2]
    return {role: min(size, validation if role == "outer_batch_size" else train) for role in ROLES}


# the main paper's sizes on MNIST are 128, 1,000, 5,000, 10,000 and the whole set (Appendix G.2)
BATCHES = {"digits": (32, 64, 128, 256), "images": (64, 128, 256, 1000, 5000, 50_000)}


def _batch(dataset: str, model: str) -> list[Variant]:
    out = []
    for size in BATCHES["digits" if dataset == "digits" else "images"]:
        for name in ("identity", "cg-3", "cg-normal-3", "kfac", "ekfac"):
            settings, space = SOLVERS[name]
            out.append(Variant(f"{name}-b{size}", {**settings, **_sizes(dataset, size)}, space))
    return out


def _refresh(dataset: str, model: str) -> list[Variant]:
    return [
        Variant(f"{name}-every{every}", *_kfac(f"aid-{name}", every=every))
        for name in ("kfac", "ekfac")
        for every in (1, 5, 10, 50)
    ]


def _ema(dataset: str, model: str) -> list[Variant]:
    """Each memory at a point of its own; then a memory and none at the same point, both ways."""
    memories, dampings = (0.0, 0.3, 0.5, 0.9), (0.001, 0.01, 0.1, 1.0)  # as in the paper's Figure 6
    found, equal = [], []
    for size in (64, 256) if dataset == "digits" else (128, 1000):
        for damping in dampings:
            cell = {"method": "aid-kfac", "damping": damping, **_sizes(dataset, size)}
            name = f"ema{{:g}}-damping{damping:g}-b{size}".format
            found += [Variant(name(ema), {**cell, "ema": ema}, BOTH) for ema in memories]
            for ema in memories[1:]:
                for one, other in ((ema, 0.0), (0.0, ema)):
                    settings = {**cell, "ema": one}
                    at = f"{name(one)}-at{other:g}"
                    equal.append(Variant(at, settings, BOTH, follows=name(other)))
    return found + equal


def _noise(dataset: str, model: str) -> list[Variant]:
    out = []
    for kind in ("uniform", "pair"):
        for rate in (0.0, 0.2, 0.4, 0.6, 0.8):
            if kind == "pair" and rate == 0:
                continue  # the same as uniform
            for name in ("identity", "cg-3", "kfac"):
                settings, space = SOLVERS[name]
                settings = {**settings, "noise": rate, "noise_kind": kind}
                out.append(Variant(f"{name}-{kind}-{rate:g}", settings, space))
    return out


def _resnet18(dataset: str, model: str) -> list[Variant]:
    """The solvers; then KFAC at its own winner with factors kept, and on the other stem."""
    names = ("identity", "cg-3", "cg-normal-3", "neumann-10", "kfac", "kfac-empirical")
    found = [Variant(name, *SOLVERS[name]) for name in names]
    found.append(Variant("ekfac-every10", *_kfac("aid-ekfac", every=10)))
    for every in (5, 10, 50):  # 1 is the row of kfac
        found.append(Variant(f"kfac-every{every}", *_kfac(every=every), follows="kfac"))
    if model == "resnet18":
        found.append(Variant("kfac-cifar-stem", *_kfac(stem="cifar"), follows="kfac"))
    return found


# what a study is run with where nothing else is said
USUAL: dict = {
    "dataset": "mnist", "model": "linear", "stem": "cifar", "batchnorm": "batch", "layers": "1",
    "encoder": "", "texts": 0, "imbalance": 100.0, "most": 0,
    "examples": 0, "victim": "", "width": 4, "images": 2500, "seeds": 3, "first_seed": 0,
    "trials": 16, "widen": 0, "search_steps": 400, "outer_steps": 1000, "final_budget": 0,
    "looks": 50, "baselines": 0,
}  # fmt: skip
# of these the settings that are the same for all variants, where the task has them
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
        usual: What it is run with beside `USUAL`.
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
    "solvers": Study("test loss against time per outer iteration, by solver", _solvers),
    "batch": Study("test loss by batch size", _batch),
    "refresh": Study("factors kept for several outer iterations, KFAC and EKFAC", _refresh),
    "ema": Study("moving average of the factors, by damping and batch size", _ema),
    "noise": Study("rate and kind of the label noise", _noise),
    "resnet18": Study(
        "KFAC against its rivals on a ResNet-18, and its factors kept (5 to 8 hours of an H200: "
        "figures/README.md)",
        _resnet18,
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


def _named(study: str) -> Study:
    if study not in STUDIES:
        raise ValueError(f"study: got {study!r}, expected one of {sorted(STUDIES)}")
    return STUDIES[study]


def variants(study: str, dataset: str, model: str) -> list[Variant]:
    """Return the variants of a study.

    Raises:
        ValueError: for an unknown study or dataset.
    """
    one = _named(study)
    if dataset not in one.datasets:
        known = sorted(one.datasets)
        raise ValueError(f"dataset: got {dataset!r}, expected one of {known} in {study}")
    found = one.variants(dataset, model)
    if one.kind is not Hypercleaning:
        return found
    return [replace(variant, space=searched(variant.space, model)) for variant in found]


def runs(study: str) -> int:
    """How many runs a study has with its usual numbers, its trials among them, if no box widens."""
    usual = {**USUAL, **STUDIES[study].usual}
    found = variants(study, usual["dataset"], usual["model"])
    searched_for = [variant for variant in found if variant.space and not variant.follows]
    trials = len(searched_for) * usual["trials"]
    baselines = len(BASELINES) if usual["baselines"] else 0
    return trials + baselines + len(found) * usual["seeds"]


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
        **given: What differs from the study's usual (`USUAL`, `Study.usual`); None is the usual.

            - dataset: ``"mnist"``, ``"cifar10"`` or ``"digits"``; of ``text`` a set of texts.
            - model: A key of `bilevel_lite.models.MODELS`.
            - stem: Of resnet18, ``"cifar"`` or ``"imagenet"``.
            - batchnorm: ``"batch"``, ``"refresh"`` or ``"frozen"``.
            - layers, encoder, texts: Of ``text``, see `bilevel_lite.tasks.text_cleaning`.
            - imbalance, most: Of ``long_tail``, see `bilevel_lite.tasks.long_tail`.
            - examples: Of ``poisoning``, see `bilevel_lite.tasks.poisoning`.
            - victim, width: Of ``unlearnable``, see `bilevel_lite.tasks.unlearnable`.
            - images: Training images of ``unlearnable`` and ``schedules``.
            - seeds, first_seed: How many final runs of each variant, from which seed on.
            - trials, search_steps: Points tried for each variant on seed 0, outer iterations of
              each.
            - widen: How often the boxes may widen (`bilevel_lite.experiment.search.run`).
            - outer_steps, looks: Outer iterations of a final run, evaluations in it.
            - final_budget: Instead of ``outer_steps``, gradients (of one inner batch).
            - baselines: 1 to train also without weights, on the first seed.

    Returns:
        The result, also written to ``result.json``.

    Raises:
        Stopped: if it was stopped before the end, or only asked where it stands.
        ValueError: for an unknown name or a number out of range.
        RunError: if the folder cannot be used, Optuna is missing, or the device is out of memory.
        DataError: if the dataset cannot be had.
    """
    if unknown := sorted(set(given) - set(USUAL)):
        raise ValueError(f"study: has no setting {unknown}, expected some of {sorted(USUAL)}")
    one = _named(study)
    on_gpu = pick_device(device).type == "cuda"
    own = {**one.usual, **(one.on_gpu if on_gpu else {})}
    batch = own.pop("batch", one.batch)
    s = {**USUAL, **own, **{name: v for name, v in given.items() if v is not None}}
    dataset, model = s["dataset"], s["model"]
    if s["baselines"] not in (0, 1):
        raise ValueError(f"baselines: got {s['baselines']}, expected 0 or 1")
    if model != "resnet18" and given.get("stem") is None:
        s["stem"] = USUAL["stem"]  # the study's own is that of its model
    same = {name: s[name] for name in SAME if name in declared.of(one.kind.Settings)}
    if none := [n for n in SAME if given.get(n) is not None and n not in same]:
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
    batches = _sizes(dataset, batch) if batch else {}
    if one.cross:
        most = same.get("texts") or text_study.SIZES[dataset][0]
        batches |= {"cross_batch_size": min(one.cross, most)}
    usual = {} if one.own_batches else MINIBATCHES.get(dataset, {})
    base = {**usual, **one.also, **(one.also_on_gpu if on_gpu else {}), **batches, **sizes}
    base |= {name: value for name, value in same.items() if name != "model"}
    if at is not None:
        searched_for = {name for variant in chosen for name in variant.space}
        if unknown := sorted(set(at) - searched_for):
            raise ValueError(f"at: got {unknown}, expected some of {sorted(searched_for)}")
        chosen = [_fixed(variant, at) for variant in chosen]
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
        {"outer_steps": s["search_steps"]},
        {"budget": s["final_budget"]} if s["final_budget"] else {"outer_steps": s["outer_steps"]},
        out,
        s["seeds"],
        s["trials"],
        storage,
        device,
        s["looks"],
        s["first_seed"],
        s["widen"],
        bool(s["baselines"]),
        minutes,
        status,
    )
