"""Every method by its command-line name, put together from a run's settings.

`METHODS` has a recipe for each method of the package. A method of one's own needs none: its class
is known by its name, and its options are settings (`by_name`).
"""

import os
import sys
from collections.abc import Callable, Container
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch

from bilevel_lite import algorithms as alg
from bilevel_lite.algorithms.method import Method
from bilevel_lite.ekfac import EKFAC
from bilevel_lite.kfac import KFAC
from bilevel_lite.options import Option, options_of, types_of
from bilevel_lite.parallel import Group, Shards, shard, sharded
from bilevel_lite.solvers import CG, CGNormal, Identity, Neumann

__all__ = [
    "METHODS", "OWN", "Recipe", "Sign", "build", "by_name", "imported", "inner_optimizer",
    "inner_scheduler", "names", "require_given",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One method by name.

    Attributes:
        cls: The method.
        inner: How theta moves: by SGD with ``"momentum"``, by ``"plain"`` descent, or None where
            the method says it by itself.
        options: Option -> what it is here, or a function of the settings that it is read from. Its
            other options are its own: settings of their own names.
        tied: Own option -> the own option that it follows where it is not given.
        more: (settings, task) -> further arguments, in place of batches.
        kinds: What its own options may be; others keep their defaults.
    """

    cls: type[Method]
    inner: str | None = "momentum"
    options: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    more: Callable[[Any, Any], dict] | None = None
    kinds: tuple[type, ...] = (int, float, str, bool)

    @property
    def own(self) -> dict[str, Option]:
        """The options that are settings of their own."""
        said, types = {*Method.options(), *self.options}, types_of(self.cls)
        return {
            name: one
            for name, one in self.cls.options().items()
            if name not in said and types[name] in self.kinds
        }

    def reads(self, s: Any) -> set[str]:
        """The settings that it is made of, of settings ``s`` of any values."""
        seen = {"batch_size" if r == "inner" else f"{r}_batch_size" for r in self.cls.roles}
        seen |= {"inner_lr"} if self.inner else set()
        seen |= {"inner_momentum"} if self.inner == "momentum" else set()

        class Seen:
            def __getattr__(self, name):
                seen.add(name)
                return getattr(s, name)

        for value in self.options.values():
            if callable(value):
                value(Seen())
        return seen


def _kfac(kind: type[KFAC]) -> Callable[[Any], KFAC]:
    return lambda s: kind(s.damping, s.fisher, ema=s.ema, every=s.every, seed=s.seed)


def _aid(solver: Callable) -> Recipe:
    return Recipe(alg.AID, options={"solver": solver, "inner_steps": STEPS})


def _amigo(**options: Any) -> Recipe:
    usual = {"inner_steps": STEPS, "linear_steps": ITERS, "linear_lr": STEP}
    return Recipe(alg.AmIGO, options={**usual, **options})


def _mrbo(solver: Callable) -> Recipe:
    return Recipe(alg.MRBO, "plain", {"solver": solver}, tied={"outer_memory": "inner_memory"})


def _nbo(solve: str) -> Recipe:
    options = {"solve": solve, "steps": ITERS, "linear_lr": STEP, "warm_up": STEPS}
    return Recipe(alg.NBO, None, options)


def _nhgd(**options: Any) -> Recipe:
    return Recipe(alg.NHGD, options={"inner_steps": STEPS, "initial": DAMPING, **options})


def _averaged(s: Any) -> KFAC:
    """The KFAC whose average stands for NHGD's own."""
    declared = alg.NHGD.options()["beta"]
    declared.check("beta", beta := declared.default if s.beta is None else s.beta)
    return KFAC(s.damping, "empirical", ema=beta, seed=s.seed)


def _neumann(s: Any, **more: Any) -> Neumann:
    options_of(Neumann)["terms"].check("iters", s.iters)  # by the name that was given
    return Neumann(s.iters, s.step, **more)


def _tables(s: Any, task: Any) -> dict:
    """SABA's fixed minibatches."""
    g, f = task.fixed_batches(s)
    if task.group is not None:
        g, f = ([shard(batch, task.group) for batch in batches] for batches in (g, f))
    generator = torch.Generator().manual_seed(s.seed)
    return {"inner_batches": g, "outer_batches": f, "generator": generator}


SHARED = ("inner_steps", "iters", "step", "damping", "seed")
READ = {name: attrgetter(name) for name in SHARED}
STEPS, ITERS, STEP, DAMPING, _ = READ.values()
METHODS: dict[str, Recipe] = {
    "aid-cg": _aid(lambda s: CG(s.iters, damping=s.damping, curvature=s.curvature)),
    "aid-cg-normal": _aid(lambda s: CGNormal(s.iters, damping=s.damping, curvature=s.curvature)),
    "aid-neumann": _aid(lambda s: _neumann(s, damping=s.damping, curvature=s.curvature)),
    "aid-identity": _aid(lambda s: Identity(s.step)),
    "aid-kfac": _aid(_kfac(KFAC)),
    "aid-ekfac": _aid(_kfac(EKFAC)),
    "aid-pcg": _aid(
        lambda s: CG(s.iters, damping=s.damping, curvature=s.curvature, precondition=_kfac(KFAC)(s))
    ),
    "amigo": _amigo(),
    "amigo-kfac": _amigo(kfac=_kfac(KFAC), reading="precondition"),
    "amigo-kfac-replace": _amigo(kfac=_kfac(KFAC), reading="replace"),
    "stocbio": Recipe(
        alg.StocBiO, options={"inner_steps": STEPS, "terms": ITERS, "linear_lr": STEP}
    ),
    "mrbo": _mrbo(_neumann),
    "mrbo-kfac": _mrbo(_kfac(KFAC)),
    "soba": Recipe(alg.SOBA, "plain", {"linear_lr": STEP}),
    "saba": Recipe(alg.SABA, "plain", {"linear_lr": STEP}, more=_tables),
    "itd": Recipe(alg.ITD, "plain", {"inner_steps": STEPS}),
    "nbo-gd": _nbo("gd"),
    "nbo-cg": _nbo("cg"),
    "nsbo-sgd": _nbo("sgd"),
    "nhgd": _nhgd(),
    "nhgd-kfac": _nhgd(kfac=_averaged),
    "sama": Recipe(alg.SAMA, options={"inner_steps": STEPS}),
    "bsg1": Recipe(alg.BSG1, options={"inner_steps": STEPS}),
    "bome": Recipe(alg.BOME, "plain", {"copy_steps": STEPS, "copy_lr": STEP, "barrier": "gap"}),
    "bvfsm": Recipe(alg.BVFSM, "plain", {"inner_steps": STEPS}, tied={"slack": "nu"}),
    "f2sa": Recipe(alg.F2SA, "plain", {"inner_steps": STEPS}),
}

# the words among the options tell the package's methods apart: they have a name each instead
METHODS.update({name: replace(one, kinds=(int, float)) for name, one in METHODS.items()})
PACKAGE = tuple(METHODS)  # what anyone else adds comes after these

# own option -> {method that has it: what is known of it}
OWN: dict[str, dict[str, Option]] = {}
for _name, _recipe in METHODS.items():
    for _option, _known in _recipe.own.items():
        OWN.setdefault(_option, {})[_name] = _known


def names() -> list[str]:
    """The names of all methods: the package's, and the classes that others declared."""
    ours = {recipe.cls for recipe in METHODS.values()}
    return [*sorted(METHODS), *(name for name, cls in alg.METHODS.items() if cls not in ours)]


def by_name(name: str) -> Recipe:
    """The recipe of a method; a class that nobody wrote one for is made as its own fields say.

    Theta moves by SGD with momentum, unless the class wants plain descent. Options that have a name
    in `SHARED` take that setting's value, also its default, the others are settings of their own.

    Args:
        name: A key of `METHODS`, the name of a class that was declared in this process, or
            ``MODULE:NAME`` of a class or of a recipe that the module puts into `METHODS`.

    Raises:
        ValueError: for an unknown name, or a class with an option that no setting can give.
    """
    module, own = imported("method", name)
    if module is None and name in METHODS:
        return METHODS[name]
    if module is not None and own in METHODS and own not in PACKAGE:
        return METHODS[own]
    cls = alg.METHODS.get(name) if module is None else getattr(module, own, None)
    if module is not None and not (isinstance(cls, type) and issubclass(cls, Method)):
        raise ValueError(f"method: got {name!r}, but {module.__name__} has no method {own!r}")
    if cls is None or module is None and name not in names():
        raise ValueError(
            f"method: got {name!r}, expected one of {names()}, or MODULE:NAME of one of your own"
        )
    shared = {option: READ[option] for option in cls.options() if option in READ}
    recipe = Recipe(cls, "plain" if cls.plain_inner else "momentum", shared)
    for f in fields(cls)[3:]:  # after problem, lam and theta
        known = f.name in {*Method.options(), *shared, *recipe.own}
        if f.init and f.default is MISSING and not known:
            raise ValueError(
                f"method: {own} needs {f.name}, which no setting is; say how it is made, "
                f"bilevel_lite.experiment.methods.METHODS[{own.lower()!r}] = Recipe({own}, "
                f"options={{{f.name!r}: ...}}), beside the class"
            )
    return recipe


def require_given(method: str, given: Container[str]) -> None:
    """Refuse a method that has an option of its own without a default, if it is not given.

    Raises:
        ValueError: naming the option.
    """
    for name, one in by_name(method).own.items():
        if one.default is MISSING and name not in given:
            raise ValueError(
                f"{name}: is not given, expected {one.expected}; {method} has no default for it"
            )


def imported(what: str, name: str) -> tuple[ModuleType | None, str]:
    """Import the module of ``MODULE:NAME``, from the working folder, too; None where there is none.

    Returns:
        The module, and NAME.

    Raises:
        ValueError: naming ``what``, if it cannot be imported.
    """
    module, _, own = name.rpartition(":")
    if not module:
        return None, own
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{what}: got {name!r}, expected MODULE:NAME, such as my{what}:mine")
    if "" not in sys.path and os.getcwd() not in sys.path:  # the installed command
        sys.path.insert(0, os.getcwd())
    try:
        return import_module(module), own
    except ModuleNotFoundError as error:
        if module != error.name and not module.startswith(f"{error.name}."):
            why = f"module {module!r} imports {error.name!r}, which is not installed"
            raise ValueError(why) from error
        raise ValueError(f"there is no module {error.name!r} with a {what}") from None
    except Exception as error:  # whatever a module does when it is imported
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"module {module!r} cannot be imported ({why})") from error


def build(s: Any, task: Any, recipe: Recipe | None = None) -> Method:
    """Put a run's method together.

    Args:
        s: The run's settings (`bilevel_lite.experiment.settings.Settings`).
        task: The task (`bilevel_lite.experiment.task.Task`).
        recipe: Of a method that only this task has; by default that of the settings.

    Raises:
        ValueError: for an unknown method, an option that it does not have, and as it says itself.
    """
    recipe, roles, problem = recipe or by_name(s.method), task.batches(s), task.problem
    if task.group is not None:
        problem = sharded(problem, task.group)
        roles = {name: _shared(batch, task.group) for name, batch in roles.items()}
    for option, one in recipe.cls.options().items():  # a message names the setting that it is of
        for name in (name for name, of in READ.items() if recipe.options.get(option) is of):
            one.check(name, getattr(s, name))
    options = {name: v(s) if callable(v) else v for name, v in recipe.options.items()}
    options |= _own(recipe, s)
    options |= {"outer_lr": s.outer_lr, "projection": task.project}
    if recipe.inner == "momentum":
        options["inner_optimizer"] = inner_optimizer(s)
        options["inner_scheduler"] = inner_scheduler(s)
    else:
        _require_plain(recipe, s)
        if recipe.inner == "plain":
            options["inner_lr"] = s.inner_lr
    if s.outer_optimizer == "adam":
        betas = (s.outer_momentum or 0.9, 0.999)
        options["outer_optimizer"] = lambda p: torch.optim.Adam(p, s.outer_lr, betas)
    elif s.outer_optimizer == "sign":
        options["outer_optimizer"] = lambda p: Sign(p, s.outer_lr)
    elif s.outer_momentum:
        options["outer_optimizer"] = lambda p: torch.optim.SGD(p, s.outer_lr, s.outer_momentum)
    if recipe.more is None:
        options |= {name: roles[name] for name in (f"{role}_batch" for role in recipe.cls.roles)}
    else:
        options |= recipe.more(s, task)
    method = recipe.cls(problem, task.lam0, task.theta0, **options)
    task.attach(method, s)
    return method


def _shared(batch: Any, group: Group) -> Any:
    """This process's part of a batch, or of whatever a sampler draws."""
    return Shards(batch, group) if hasattr(batch, "draw") else shard(batch, group)


class Sign(torch.optim.Optimizer):
    """p <- p - lr sign(grad): every number moves by lr, but those without a gradient."""

    def __init__(self, params: list[torch.Tensor], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):  # noqa: D102
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


def inner_optimizer(s: Any) -> Callable[[list[torch.Tensor]], torch.optim.Optimizer]:
    """How theta moves in a run with these settings: SGD with momentum, or AdamW.

    AdamW's own decay is off: it would move theta by what is not in g, and so be no part of H. What
    keeps theta small is the risk's l2.
    """
    if s.inner_optimizer == "adamw":
        betas = (s.inner_momentum, 0.999)
        return lambda p: torch.optim.AdamW(p, s.inner_lr, betas, weight_decay=0.0)
    return lambda p: torch.optim.SGD(p, s.inner_lr, s.inner_momentum)


def inner_scheduler(s: Any) -> Callable[[torch.optim.Optimizer], Any] | None:
    """The inner step size over a run: None where it is constant, half a cosine down to 0, or steps.

    At outer iteration k = 0, 1, ... of K the cosine's is inner_lr (1 + cos(pi k / K)) / 2; that of
    the steps is a tenth of inner_lr from k = 0.8 K on, a hundredth from 0.9 K on.

    Raises:
        ValueError: for a schedule in a run that a budget ends, of which K is not known.
    """
    if s.inner_schedule == "constant":
        return None
    if s.budget:
        raise ValueError(
            f"inner_schedule: got {s.inner_schedule!r} with budget={s.budget:g}, so that the "
            "number of outer iterations is not known; give outer_steps and no budget, or 'constant'"
        )
    rules = torch.optim.lr_scheduler
    if s.inner_schedule == "steps":
        at = [round(share * s.outer_steps) for share in (0.8, 0.9)]
        return lambda optimizer: rules.MultiStepLR(optimizer, at, gamma=0.1)
    return lambda optimizer: rules.CosineAnnealingLR(optimizer, s.outer_steps)


def _require_plain(recipe: Recipe, s: Any) -> None:
    """Refuse settings of an inner optimiser for a method that moves theta by itself."""
    for name, usual in (("inner_optimizer", "sgd"), ("inner_schedule", "constant")):
        if (value := getattr(s, name)) != usual:
            raise ValueError(
                f"{name}: got {value!r}, but {s.method} moves theta by {recipe.cls.__name__}'s own "
                f"descent; expected {usual!r}"
            )


def _own(recipe: Recipe, s: Any) -> dict[str, float]:
    """The method's own options that were given, by name."""
    given = {}
    for name in {**OWN, **recipe.own}:
        if (value := getattr(s, name, None)) is not None:
            given[name] = value
    require_given(s.method, given)
    for name in given:
        if name not in recipe.own:
            known = ", ".join(OWN[name])
            raise ValueError(f"{name}: is no option of {s.method}; it is one of {known}")
    tied = {name: given[other] for name, other in recipe.tied.items() if other in given}
    return {**tied, **given}
