"""All methods on the hypercleaning job, each with the same search (`experiment.search`)."""

from bilevel_lite.algorithms.method import Method
from bilevel_lite.experiment import search as searching
from bilevel_lite.experiment.methods import METHODS
from bilevel_lite.kfac import KFAC
from bilevel_lite.kfac_richardson import KFACRichardson
from bilevel_lite.models import FLAT
from bilevel_lite.options import options_of
from bilevel_lite.solvers import Neumann
from bilevel_lite.tasks.hypercleaning import SIZES, Hypercleaning

__all__ = ["MINIBATCHES", "SPACES", "run", "searched"]

# What is searched over, all on a logarithmic scale: where the options say it that the settings are
# read as, but for outer_lr, which is in the units of this task's lam.
BOTH = {"inner_lr": Method.options()["inner_lr"].search, "outer_lr": (10.0, 1e5)}
DAMPING = {"damping": options_of(KFAC)["damping"].search}
STEP = {"step": options_of(Neumann)["step"].search}
PRECONDITIONED = {"step": options_of(KFACRichardson)["step"].search}
NEWTON = {"outer_lr": BOTH["outer_lr"]}  # inner_lr is 1

SPACES: dict[str, dict[str, tuple[float, float]]] = {
    "aid-identity": {**BOTH},  # its step only scales outer_lr
    "aid-neumann": {**BOTH, **STEP},
    "aid-cg": {**BOTH, **DAMPING},
    "aid-cg-normal": {**BOTH, **DAMPING},
    "aid-kfac": {**BOTH, **DAMPING},
    "aid-ekfac": {**BOTH, **DAMPING},
    "amigo": {**BOTH, **STEP},
    "amigo-kfac": {**BOTH, **DAMPING, **PRECONDITIONED},
    "amigo-kfac-replace": {**BOTH, **DAMPING},
    "stocbio": {**BOTH, **STEP},
    "mrbo": {**BOTH, **STEP},
    "mrbo-kfac": {**BOTH, **DAMPING},
    "soba": {**BOTH, **STEP},
    "saba": {**BOTH, **STEP},
    "itd": {**BOTH},
    "nbo-gd": {**NEWTON, **STEP},
    "nbo-cg": {**NEWTON, **STEP},  # the step of its warm-up
    "nsbo-sgd": {**NEWTON, **STEP},
    "nhgd-kfac": {**BOTH, **DAMPING},
    "sama": {**BOTH},
    "bsg1": {**BOTH},
    "bome": {**BOTH, **STEP},
    "bvfsm": {**BOTH},
    "f2sa": {**BOTH},
}
for _name, _space in SPACES.items():  # and the method's own options
    _own, _tied = METHODS[_name].own, METHODS[_name].tied
    _space.update({k: one.search for k, one in _own.items() if one.search and k not in _tied})

# Convolutional networks have a steeper loss: smaller steps on theta and on the linear system.
CONVOLUTIONAL = {"inner_lr": (0.003, 0.3), "step": (0.002, 0.3)}


def searched(space: dict, model: str) -> dict:
    """Return a search space as it is for a model."""
    steeper = {} if model in FLAT else CONVOLUTIONAL
    return {name: steeper.get(name, bounds) for name, bounds in space.items()}


# Every method sees minibatches in every role.
ROLES = ("batch_size", "outer_batch_size", "cross_batch_size", "curvature_batch_size")
MINIBATCHES = {
    "mnist": dict.fromkeys(ROLES, 1000),
    "cifar10": dict.fromkeys(ROLES, 128),  # as in the authors' code
    "digits": {**dict.fromkeys(ROLES, 250), "outer_batch_size": 200},
}


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

    BatchNorm keeps its statistics within an outer iteration (``"refresh"``), whatever the method.

    Args:
        dataset: ``"mnist"``, ``"cifar10"`` or ``"digits"``.
        model: A key of `bilevel_lite.models.MODELS`.
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
        RunError: if the folder cannot be used, Optuna is missing, or the device is out of memory.
        DataError: if the dataset cannot be had.
    """
    if "all" in methods:
        raise ValueError(f"method: got {' '.join(methods)}, expected 'all' alone or names")
    if len(set(methods)) < len(methods):
        raise ValueError(f"method: got {' '.join(methods)}, expected different names")
    unknown = sorted(set(methods) - set(SPACES))
    if unknown or not methods:
        raise ValueError(
            f"method: got {unknown or methods}, expected 'all' or some of {sorted(SPACES)}"
        )
    if dataset not in SIZES:
        raise ValueError(f"dataset: got {dataset!r}, expected one of {sorted(SIZES)}")
    variants = [searching.Variant(m, {"method": m}, searched(SPACES[m], model)) for m in methods]
    config = {"kind": "hyperclean_methods", "dataset": dataset, "model": model}
    search, final = {"budget": search_budget}, {"budget": budget}
    # not every method has inner steps that could run with BatchNorm in training mode
    base = {**MINIBATCHES.get(dataset, {}), "batchnorm": "refresh"}
    return searching.run(
        Hypercleaning, config, base, variants, search, final, out, seeds, trials, storage, device
    )
