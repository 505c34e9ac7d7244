"""The studies of full-scale hypercleaning, each a list of variants under one search.

After the main paper (arXiv 2603.29108): the trade-off of the solvers (its Figure 1), the batch size
(Figures 3 and 7), factors kept for several iterations (Table 2), the moving average of the factors
(Figure 6); and one of ours, the rate and kind of the noise. Its Figures 2 and 5, all methods, are
`cleaning_comparison`. Every variant runs for the same number of outer iterations.
"""

from dataclasses import replace

from bilevel_lite.experiment import search
from bilevel_lite.experiment.search import Variant
from bilevel_lite.tasks.cleaning_comparison import BOTH, DAMPING, MINIBATCHES, ROLES, STEP, searched
from bilevel_lite.tasks.hypercleaning import SIZES, Hypercleaning

__all__ = ["STUDIES", "run", "variants"]


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
    train, validation, _ = SIZES[dataset]
    return {role: min(size, validation if role == "outer_batch_size" else train) for role in ROLES}


def _batch(dataset: str, model: str) -> list[Variant]:
    out = []
    for size in (32, 64, 128, 256) if dataset == "digits" else (64, 256, 1024, 4096):
        for name in ("identity", "cg-3", "kfac", "ekfac"):
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
    return [
        Variant(
            f"ema{ema:g}-damping{damping:g}-b{size}",
            {"method": "aid-kfac", "ema": ema, "damping": damping, **_sizes(dataset, size)},
            BOTH,
        )
        for size in ((64, 256) if dataset == "digits" else (128, 1024))
        for ema in (0.0, 0.5, 0.9, 0.99)
        for damping in (0.001, 0.01, 0.1, 1.0)
    ]


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


# name -> (what it asks, its variants on a dataset and a model)
STUDIES = {
    "solvers": ("test loss against time per outer iteration, by solver", _solvers),
    "batch": ("test loss by batch size", _batch),
    "refresh": ("factors kept for several outer iterations, KFAC and EKFAC", _refresh),
    "ema": ("moving average of the factors, by damping and batch size", _ema),
    "noise": ("rate and kind of the label noise", _noise),
}


def variants(study: str, dataset: str, model: str) -> list[Variant]:
    """Return the variants of a study.

    Raises:
        ValueError: for an unknown study or dataset.
    """
    if study not in STUDIES:
        raise ValueError(f"study: got {study!r}, expected one of {sorted(STUDIES)}")
    if dataset not in SIZES:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {sorted(SIZES)}")
    found = STUDIES[study][1](dataset, model)
    return [replace(variant, space=searched(variant.space, model)) for variant in found]


def _fixed(variant: Variant, at: dict[str, float]) -> Variant:
    """The variant at these values, without a search."""
    if missing := sorted(set(variant.space) - set(at)):
        raise ValueError(f"at: {variant.name} also needs {missing}")
    values = {name: at[name] for name in variant.space}
    return replace(variant, settings={**variant.settings, **values}, space={})


def run(
    study: str,
    dataset: str,
    model: str,
    out: str,
    only: list[str] | None = None,
    seeds: int = 3,
    trials: int = 16,
    search_steps: int = 400,
    outer_steps: int = 1000,
    at: dict[str, float] | None = None,
    stem: str = "cifar",
    batchnorm: str = "batch",
    storage: str | None = None,
    device: str | None = None,
    looks: int = 50,
    sizes: dict[str, int] | None = None,
) -> dict:
    """Run or resume a study.

    Args:
        study: A key of `STUDIES`.
        dataset: ``"mnist"``, ``"cifar10"`` or ``"digits"``.
        model: A key of `bilevel_lite.models.MODELS`.
        out: Output folder; stopped, the same command goes on there.
        only: Names of variants to run; all of them by default.
        seeds: How many, from 0.
        trials: Points tried for each variant, on seed 0.
        search_steps: Outer iterations of a trial.
        outer_steps: Outer iterations of a final run.
        at: Instead of a search: values of what it would search for, where a variant has it.
        stem: Of resnet18, ``"cifar"`` or ``"imagenet"``.
        batchnorm: ``"batch"``, ``"refresh"`` or ``"frozen"``.
        storage: Optuna's database; SQLite in ``out`` by default.
        device: Such as ``"cpu"``; CUDA if there, by default.
        looks: Evaluations in a final run; fewer where they cost much beside its iterations.
        sizes: Other batch sizes than ``MINIBATCHES[dataset]``, by role (a name in ``ROLES``); not
            in the studies that set them.

    Returns:
        The result, also written to ``result.json``.

    Raises:
        ValueError: for an unknown name or a number out of range.
        RunError: if the folder cannot be used, Optuna is missing, or the device is out of memory.
        DataError: if the dataset cannot be had.
    """
    chosen = variants(study, dataset, model)
    known = [variant.name for variant in chosen]
    unknown = sorted(set(only or []) - set(known))
    if unknown:
        raise ValueError(f"only: {study} has no {unknown}; expected some of {known}")
    chosen = [variant for variant in chosen if not only or variant.name in only]
    sizes = sizes or {}
    free = set(ROLES) - {name for variant in chosen for name in variant.settings}
    if unknown := sorted(set(sizes) - free):
        raise ValueError(f"sizes: got {unknown}, expected some of {sorted(free)} in {study}")
    if bad := {
        role: size for role, size in sizes.items() if not (size >= 1 and float(size).is_integer())
    }:
        raise ValueError(f"sizes: got {bad}, expected whole numbers of at least 1")
    sizes = {role: int(size) for role, size in sizes.items()}
    base = {**MINIBATCHES[dataset], **sizes, "stem": stem, "batchnorm": batchnorm}
    if at is not None:
        searched_for = {name for variant in chosen for name in variant.space}
        if unknown := sorted(set(at) - searched_for):
            raise ValueError(f"at: got {unknown}, expected some of {sorted(searched_for)}")
        chosen = [_fixed(variant, at) for variant in chosen]
    return search.run(
        Hypercleaning,
        {
            "kind": "hyperclean_study",
            "study": study,
            "dataset": dataset,
            "model": model,
            **({"sizes": sizes} if sizes else {}),
        },
        base,
        chosen,
        {"outer_steps": search_steps},
        {"outer_steps": outer_steps},
        out,
        seeds,
        trials,
        storage,
        device,
        looks,
    )
