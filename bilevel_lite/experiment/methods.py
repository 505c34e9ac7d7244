"""Every method of the package by its command-line name, built from a run's settings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bilevel_lite import algorithms as alg
from bilevel_lite.algorithms.method import Method
from bilevel_lite.ekfac import EKFAC
from bilevel_lite.kfac import KFAC
from bilevel_lite.solvers import CG, CGNormal, Identity, Neumann

__all__ = ["METHODS", "build"]


@dataclass
class Parts:
    """What a method is put together from.

    Attributes:
        s: The run's settings.
        start: problem, lam, theta.
        batches: Batches for g and f.
        system: Batches of their own for H and J.
        outer: Step size of lam and the projection.
        fixed: A function that gives lists of fixed minibatches, of g and of f.
    """

    s: Any
    start: tuple
    batches: dict
    system: dict
    outer: dict
    fixed: Callable[[], tuple[list, list]]

    @property
    def momentum(self) -> dict:
        """Common arguments with SGD and momentum on theta."""
        s = self.s
        inner = {"inner_optimizer": lambda p: torch.optim.SGD(p, s.inner_lr, s.inner_momentum)}
        return {**self.batches, **self.outer, **inner}

    @property
    def plain(self) -> dict:
        """Common arguments with plain gradient descent on theta."""
        return {**self.batches, **self.outer, "inner_lr": self.s.inner_lr}


def _aid(solver) -> Callable[[Parts], Method]:
    def build(p: Parts) -> Method:
        steps = p.s.inner_steps
        return alg.AID(*p.start, solver(p.s), steps, **p.momentum, **p.system)

    return build


def _own(s: Any, *names: str) -> dict[str, float]:
    """``strength`` under the names that the method has for it, if it was given."""
    return {} if s.strength is None else dict.fromkeys(names, s.strength)


def _kfac(kind: type[KFAC], s: Any) -> KFAC:
    return kind(s.damping, s.fisher, ema=s.ema, every=s.every, seed=s.seed)


def _amigo(**options) -> Callable[[Parts], Method]:
    def build(p: Parts) -> Method:
        s, kfac = p.s, None
        if options:
            kfac = _kfac(KFAC, s)
        return alg.AmIGO(
            *p.start, s.inner_steps, s.iters, s.step, kfac, **options, **p.momentum, **p.system
        )

    return build


def _mrbo(solver) -> Callable[[Parts], Method]:
    def build(p: Parts) -> Method:
        memory = _own(p.s, "inner_memory", "outer_memory")
        return alg.MRBO(*p.start, solver(p.s), **memory, **p.plain, **p.system)

    return build


def _nbo(solve) -> Callable[[Parts], Method]:
    def build(p: Parts) -> Method:
        s, common = p.s, {**p.batches, **p.outer, **p.system}
        return alg.NBO(*p.start, solve, s.iters, s.step, s.inner_steps, **common)

    return build


def _saba(p: Parts) -> Method:
    generator = torch.Generator().manual_seed(p.s.seed)
    common = {**p.outer, "inner_lr": p.s.inner_lr}
    return alg.SABA(*p.start, p.s.step, *p.fixed(), generator, **common)


def _sama(p: Parts) -> Method:
    return alg.SAMA(*p.start, p.s.inner_steps, **_own(p.s, "alpha"), **p.momentum)


def _nhgd(kronecker: bool) -> Callable[[Parts], Method]:
    def build(p: Parts) -> Method:
        s = p.s
        beta = {"beta": 0.99, **_own(s, "beta")}
        kfac = KFAC(s.damping, "empirical", ema=beta["beta"], seed=s.seed) if kronecker else None
        common = {**p.momentum, "cross_batch": p.system["cross_batch"]}
        return alg.NHGD(*p.start, s.inner_steps, initial=s.damping, kfac=kfac, **beta, **common)

    return build


# name -> the method; `iters`, `step`, `damping` and `strength` mean what the help text says
METHODS: dict[str, Callable[[Parts], Method]] = {
    "aid-cg": _aid(lambda s: CG(s.iters, damping=s.damping, curvature=s.curvature)),
    "aid-cg-normal": _aid(lambda s: CGNormal(s.iters, damping=s.damping, curvature=s.curvature)),
    "aid-neumann": _aid(
        lambda s: Neumann(s.iters, s.step, damping=s.damping, curvature=s.curvature)
    ),
    "aid-identity": _aid(lambda s: Identity(s.step)),
    "aid-kfac": _aid(lambda s: _kfac(KFAC, s)),
    "aid-ekfac": _aid(lambda s: _kfac(EKFAC, s)),
    "aid-pcg": _aid(
        lambda s: CG(s.iters, damping=s.damping, curvature=s.curvature, precondition=_kfac(KFAC, s))
    ),
    "amigo": _amigo(),
    "amigo-kfac": _amigo(reading="precondition"),
    "amigo-kfac-replace": _amigo(reading="replace"),
    "stocbio": lambda p: alg.StocBiO(
        *p.start, p.s.inner_steps, p.s.iters, p.s.step, **p.momentum, **p.system
    ),
    "mrbo": _mrbo(lambda s: Neumann(s.iters, s.step)),
    "mrbo-kfac": _mrbo(lambda s: _kfac(KFAC, s)),
    "soba": lambda p: alg.SOBA(*p.start, p.s.step, **p.plain),
    "saba": _saba,
    "itd": lambda p: alg.ITD(*p.start, p.s.inner_steps, **p.plain),
    "nbo-gd": _nbo("gd"),
    "nbo-cg": _nbo("cg"),
    "nsbo-sgd": _nbo("sgd"),
    "nhgd": _nhgd(False),
    "nhgd-kfac": _nhgd(True),
    "sama": _sama,
    "bsg1": lambda p: alg.BSG1(*p.start, p.s.inner_steps, **_own(p.s, "floor"), **p.momentum),
    "bome": lambda p: alg.BOME(
        *p.start, p.s.inner_steps, p.s.step, barrier="gap", **_own(p.s, "eta"), **p.plain
    ),
    "bvfsm": lambda p: alg.BVFSM(*p.start, p.s.inner_steps, **_own(p.s, "nu", "slack"), **p.plain),
    "f2sa": lambda p: alg.F2SA(*p.start, p.s.inner_steps, **_own(p.s, "penalty"), **p.plain),
}


def build(s: Any, task: Any) -> Method:
    """Put a run's method together.

    Args:
        s: The run's settings (`bilevel_lite.experiment.settings.Settings`).
        task: The task (`bilevel_lite.experiment.task.Task`).

    Raises:
        ValueError: for an unknown method, and as the method says of its settings.
    """
    if s.method not in METHODS:
        raise ValueError(f"method: got {s.method!r}, expected one of {sorted(METHODS)}")
    roles = task.batches(s)
    method = METHODS[s.method](
        Parts(
            s,
            (task.problem, task.lam0, task.theta0),
            {name: roles[name] for name in ("inner_batch", "outer_batch")},
            {name: roles[name] for name in ("curvature_batch", "cross_batch")},
            {"outer_lr": s.outer_lr, "projection": task.project},
            lambda: task.fixed_batches(s),
        )
    )
    task.attach(method, s)
    return method
