"""Settings of a run: declared once, as fields with their meaning; checked, read from words."""

import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields, make_dataclass
from difflib import get_close_matches
from typing import Any

from bilevel_lite.algorithms.method import Method
from bilevel_lite.experiment.methods import METHODS, OWN, by_name
from bilevel_lite.kfac import KFAC
from bilevel_lite.options import (
    Option,
    again,
    fraction,
    one_of,
    option,
    positive,
    same,
    types_of,
    whole,
)
from bilevel_lite.solvers import Direct, Neumann

__all__ = [
    "SYSTEM", "Settings", "given", "of", "read", "require_batches", "require_read", "setting",
    "switch", "with_own", "written",
]  # fmt: skip

# of the linear system; each method reads some of them
SYSTEM = ("iters", "damping", "step", "curvature", "fisher", "ema", "every")
# ... and others that not all methods read
STEPPED = ("inner_lr", "inner_momentum", "inner_steps", "curvature_batch_size", "cross_batch_size")

# Settings that runs did not have at first. At their default they are not written, so that an older
# run is compared, and resumed, as one with the same settings.
LATER = ("inner_optimizer", "inner_schedule", "outer_momentum", "outer_optimizer", "truncate")


def switch(default: int, meaning: str) -> Any:
    """A field of a dataclass of settings that is 0 or 1."""
    return option("0 or 1", lambda v: v in (0, 1), default, help=meaning)


def setting(default: Any, meaning: str, least: float | None = None, known: tuple = ()) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: Its default.
        meaning: One line, for the command line.
        least: The smallest value that it may have, if there is one.
        known: The values that it may have, if they are a few.
    """
    if known:
        return one_of(*sorted(known), default=default, help=meaning)
    if isinstance(default, int):
        return whole(default, -math.inf if least is None else least, help=meaning)
    if least is not None:
        return option(f"at least {least}", lambda v: v >= least, default, help=meaning)
    return option("a value", lambda v: True, default, help=meaning)


@dataclass(kw_only=True)
class Common:
    """How long, on which batches, by which method; `Settings` adds the methods' own options."""

    method: str = setting("aid-cg", "the method, see bilevel_lite.experiment.methods.by_name")
    seed: int = option(
        "an integer from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63, 0,
        help="of splits, initial values and batches",
    )  # fmt: skip
    outer_steps: int = setting(100, "outer iterations", least=1)
    inner_steps: int = setting(10, "inner steps per outer iteration")
    inner_lr: float = positive(
        0.1, help="inner step size", search=Method.options()["inner_lr"].search
    )
    inner_momentum: float = fraction(0.9, help="inner momentum; AdamW's beta1")
    inner_optimizer: str = setting("sgd", "how theta moves", known=("adamw", "sgd"))
    inner_schedule: str = setting(
        "constant", "inner step size over the run", known=("constant", "cosine", "steps")
    )
    outer_lr: float = positive(1.0, help="outer step size")
    outer_momentum: float = fraction(0.0, help="outer momentum; Adam's beta1, 0.9 if it is 0")
    outer_optimizer: str = setting("sgd", "how lam moves", known=("adam", "sgd", "sign"))
    batch_size: int = setting(0, "inner batch; 0 is the whole training set")
    curvature_batch_size: int = setting(0, "batch of the Hessian; 0 is the whole training set")
    outer_batch_size: int = setting(0, "batch of f; 0 is the whole validation set")
    cross_batch_size: int = setting(0, "batch of J; 0 is the whole training set")
    iters: int = setting(3, "CG, AmIGO or NBO steps on the linear system, or Neumann terms")
    damping: float = again(
        KFAC, "damping", default=0.1, help="added to the curvature; NHGD: the start of its Fisher"
    )
    step: float = again(
        Neumann, "step", default=0.1,
        help="step on the linear system, of the identity, or of BOME's copy",
    )  # fmt: skip
    curvature: str = again(Direct, "curvature", help="H of CG and Neumann")
    fisher: str = again(KFAC, "fisher", help="gradients of KFAC and EKFAC")
    ema: float = again(KFAC, "ema", help="memory of KFAC's factors, 0 is none")
    every: int = again(KFAC, "every", help="outer iterations for which KFAC's factors are kept")
    evaluate_every: int = setting(
        10, "outer iterations between evaluations and checkpoints", least=1
    )
    baselines: int = switch(1, "also train what the task compares with; 0 does not")
    budget: float = option(
        "at least 0 (0 or inf: no limit)", lambda v: v >= 0, 0.0, endless=True,
        help="stop after so many gradients (of one inner batch), 0: no limit",
    )  # fmt: skip


def _own(which: dict[str, Option]) -> Any:
    """A method's own option as a field: None is what the method's class has."""
    one = next(iter(which.values()))
    known = [known.default for known in which.values()]
    usual = ", ".join(dict.fromkeys(f"{v:g}" if isinstance(v, float) else f"{v}" for v in known))
    usual = "; must be given" if MISSING in known else f"; by default {usual}"
    usual = "" if known == [None] else usual  # its meaning says it
    meaning = f"{', '.join(which)}: {one.help[:1].lower()}{one.help[1:]}{usual}"
    return same(one, default=None, none=True, help=meaning)


def _fields(own: dict[str, dict[str, Option]], known: dict[str, Any]) -> list[tuple]:
    """The fields of methods' own options, but those that are known already."""
    out = []
    for name in sorted(set(own) - set(known)):
        types = {types_of(by_name(method).cls)[name] for method in own[name]}
        kind = float if float in types else types.pop()
        out.append((name, kind | None, _own(own[name])))
    return out


class Settings(make_dataclass("Own", _fields(OWN, {}), bases=(Common,), kw_only=True)):
    """Every number that a run's result depends on; a task adds its own in a subclass."""


def with_own(kind: type, methods: list[str]) -> type:
    """Settings with the own options of methods that they lack: those of a stranger's.

    Raises:
        ValueError: if an option has the name of a setting that means something else.
    """
    own: dict[str, dict[str, Option]] = {}
    known = of(kind)
    for method in methods:
        for name, one in by_name(method).own.items():
            if name in known and one not in OWN.get(name, {}).values():
                raise ValueError(
                    f"method: {method} has an option {name!r}, which is the name of a setting of "
                    "the run; call it something else"
                )
            own.setdefault(name, {})[method] = one
    more = _fields(own, known)
    return make_dataclass(kind.__name__, more, bases=(kind,), kw_only=True) if more else kind


def require_batches(s: Any, train: int, validation: int) -> None:
    """Refuse batches that are larger than the set that they are drawn from; 0 is all of it.

    Args:
        s: Settings of a run.
        train: Examples of the training set.
        validation: Examples of f's.

    Raises:
        ValueError: naming the first batch size that does not fit.
    """
    for name, value in vars(s).items():
        most = validation if name == "outer_batch_size" else train
        if name.endswith("batch_size") and not 0 <= value <= most:
            raise ValueError(f"{name}: got {value}, expected 1 to {most}, or 0 for all {most}")


def require_read(methods: list[str], given: Iterable[str]) -> None:
    """Refuse settings that were given and that none of the methods reads.

    Raises:
        ValueError: naming the first of them, and the methods that read it.
    """
    reads = {name: by_name(name).reads(Settings()) for name in {*METHODS, *methods}}
    for name in sorted(
        {*SYSTEM, *STEPPED} & set(given) - set().union(*(reads[one] for one in methods))
    ):
        others = ", ".join(other for other in sorted(reads) if name in reads[other])
        raise ValueError(f"{name}: is not read by {', '.join(methods)}; it is by {others}")


def given(s: Any) -> set[str]:
    """The settings that have a value."""
    return {name for name, value in vars(s).items() if value is not None}


def written(s: Any) -> dict[str, Any]:
    """A run's settings by name, as a folder holds them and a later run is compared with."""
    default = {f.name: f.default for f in fields(s) if f.name in LATER}
    return {k: v for k, v in vars(s).items() if k not in default or v != default[k]}


def of(kind: type) -> dict[str, tuple[type, Any, str]]:
    """The settings of a dataclass by name: type, default, meaning (with the known values)."""
    types, out = types_of(kind), {}
    for f in fields(kind):
        one = f.metadata.get("option")  # a stranger's field may say nothing of itself
        meaning = "" if one is None else one.help
        if one is not None and one.known:
            meaning += f": {', '.join(filter(None, one.known))}"
        out[f.name] = (types[f.name], f.default, meaning)
    return out


def read(kind: type, words: list[str]) -> dict[str, Any]:
    """Read ``name=value`` words as settings of a dataclass.

    Raises:
        ValueError: for a name that it does not have, or has twice, or a value of another type.
    """
    known, out = of(kind), {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            close = get_close_matches(name, known, 1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"{name}: is no setting here (got {word!r}), expected NAME=VALUE, NAME one of "
                f"{sorted(known)}{meant}"
            )
        if name in out:
            raise ValueError(f"{name}: is given twice (again in {word!r}), expected once; give one")
        to = known[name][0]
        try:
            out[name] = {"0": False, "1": True}[text] if to is bool else to(text)
        except (KeyError, ValueError):
            words_of = {bool: "0 or 1", int: "an integer", float: "a number"}
            expected = words_of.get(to, to.__name__)
            raise ValueError(f"{name}: got {text!r}, expected {expected}") from None
    return out
