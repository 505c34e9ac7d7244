"""The studies of hypercleaning: variants by dataset and model (`bilevel_lite.tasks.studies`)."""

from bilevel_lite.experiment.search import Variant
from bilevel_lite.tasks import text_study
from bilevel_lite.tasks.cleaning_comparison import BOTH, DAMPING, ROLES, STEP
from bilevel_lite.tasks.hypercleaning import SIZES

__all__ = ["batch", "ema", "noise", "refresh", "resnet18", "sizes", "solvers"]


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


def solvers(dataset: str, model: str) -> list[Variant]:
    """Every solver."""
    # with a linear model GGN and Hessian are the same matrix
    names = [name for name in SOLVERS if model != "linear" or not name.endswith("-ggn")]
    return [Variant(name, *SOLVERS[name]) for name in names]


def sizes(dataset: str, size: int) -> dict[str, int]:
    """The same batch size in every role, as far as the split has examples."""
    train, validation = (text_study.SIZES if dataset in text_study.SIZES else SIZES)[dataset][:2]
    return {role: min(size, validation if role == "outer_batch_size" else train) for role in ROLES}


# the main paper's sizes on MNIST are 128, 1,000, 5,000, 10,000 and the whole set (Appendix G.2)
BATCHES = {"digits": (32, 64, 128, 256), "images": (64, 128, 256, 1000, 5000, 50_000)}


def batch(dataset: str, model: str) -> list[Variant]:
    """Some solvers at each batch size, the same in every role."""
    out = []
    for size in BATCHES["digits" if dataset == "digits" else "images"]:
        for name in ("identity", "cg-3", "cg-normal-3", "kfac", "ekfac"):
            settings, space = SOLVERS[name]
            out.append(Variant(f"{name}-b{size}", {**settings, **sizes(dataset, size)}, space))
    return out


def refresh(dataset: str, model: str) -> list[Variant]:
    """KFAC and EKFAC with factors kept for some outer iterations."""
    return [
        Variant(f"{name}-every{every}", *_kfac(f"aid-{name}", every=every))
        for name in ("kfac", "ekfac")
        for every in (1, 5, 10, 50)
    ]


def ema(dataset: str, model: str) -> list[Variant]:
    """Each memory at a point of its own; then a memory and none at the same point, both ways."""
    memories, dampings = (0.0, 0.3, 0.5, 0.9), (0.001, 0.01, 0.1, 1.0)  # as in the paper's Figure 6
    found, equal = [], []
    for size in (64, 256) if dataset == "digits" else (128, 1000):
        for damping in dampings:
            cell = {"method": "aid-kfac", "damping": damping, **sizes(dataset, size)}
            name = f"ema{{:g}}-damping{damping:g}-b{size}".format
            found += [Variant(name(ema), {**cell, "ema": ema}, BOTH) for ema in memories]
            for ema in memories[1:]:
                for one, other in ((ema, 0.0), (0.0, ema)):
                    settings = {**cell, "ema": one}
                    at = f"{name(one)}-at{other:g}"
                    equal.append(Variant(at, settings, BOTH, follows=name(other)))
    return found + equal


def noise(dataset: str, model: str) -> list[Variant]:
    """Three solvers at each rate and kind of the label noise."""
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


def resnet18(dataset: str, model: str) -> list[Variant]:
    """The solvers; then KFAC at its own winner with factors kept, and on the other stem."""
    names = ("identity", "cg-3", "cg-normal-3", "neumann-10", "kfac", "kfac-empirical")
    found = [Variant(name, *SOLVERS[name]) for name in names]
    found.append(Variant("ekfac-every10", *_kfac("aid-ekfac", every=10)))
    for every in (5, 10, 50):  # 1 is the row of kfac
        found.append(Variant(f"kfac-every{every}", *_kfac(every=every), follows="kfac"))
    if model == "resnet18":
        found.append(Variant("kfac-cifar-stem", *_kfac(stem="cifar"), follows="kfac"))
    return found
