"""What KFAC and EKFAC remember between calls: factors, how old they are, and what they are of."""

import weakref
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from bilevel_lite.factors import Estimate
from bilevel_lite.kronecker import FORMS, Columns, Factor, Spectrum
from bilevel_lite.params import trainable
from bilevel_lite.risk import SumOfRisks, WeightedRisk

__all__ = ["STATE", "Memory", "owned"]

# what a state must hold; what came later may be missing
STATE = ("age", "theta", "factors", "diagonal", "without_block")


@dataclass
class Memory:
    """What is kept between calls.

    Attributes:
        solver: Name of the solver whose memory this is.
        age: Calls since the factors were built.
        theta: Where they were built.
        parameters: Names and shapes of the parameters that they are of.
        factors: Layer name -> factors, for ``every`` and ``ema``; None where nothing is kept.
        diagonal: Parameter name -> diagonal.
        blocks: The damped inverses, for ``every``; None where they are to be made of the factors.
        damped: By which tau and rule the blocks were.
        made: How the factors were made, in words; None in a state that does not say it.
        without: Names of the parameters without a Kronecker block.
        inputs: ``fixed_batch``: layer -> (module, input, its version, A).
        model: The model that the factors are of, weakly; None in a copy, and in a loaded state.
    """

    solver: str
    age: int = 0
    theta: Tensor | None = None
    parameters: list | None = None
    factors: dict[str, tuple] | None = None
    diagonal: dict[str, Tensor] = field(default_factory=dict)
    blocks: list | None = None
    without: tuple[str, ...] = ()
    inputs: dict[tuple, tuple] = field(default_factory=dict)
    damped: tuple | None = None
    made: str | None = None
    model: weakref.ref | None = None

    def __getstate__(self):
        return vars(self) | {"model": None}

    def keep(self, risk: WeightedRisk | SumOfRisks, made: str, factors: dict, diagonal: dict):
        """Take new factors and diagonals in the place of the old."""
        self.factors, self.diagonal, self.made = factors, diagonal, made
        self.parameters, self.model = _parameters(risk), weakref.ref(risk.model)

    def require_same(self, risk: WeightedRisk | SumOfRisks, made: str, theta: Tensor) -> None:
        """Refuse a problem that the remembered factors are not of."""
        new = "use a new solver for a new problem"
        if self.model is not None and self.model() is not risk.model:
            raise ValueError(f"{self.solver}: remembers factors of another model; {new}")
        if self.theta is not None and self.theta.shape != theta.shape:
            raise ValueError(
                f"{self.solver}: remembers factors for {self.theta.numel()} parameters, but theta "
                f"has {theta.numel()}; {new}"
            )
        if self.made not in (None, made):
            raise ValueError(
                f"{self.solver}: remembers factors of {self.made}, expected {made} as here; "
                "use a new solver"
            )
        if self.parameters is not None and self.parameters != _parameters(risk):
            raise ValueError(
                f"{self.solver}: remembers factors for parameters of other names or shapes (frozen "
                f"or replaced since?); {new}"
            )

    def staleness(self, theta: Tensor) -> dict[str, Any]:
        """What the diagnosis says of the factors; they are fresh where theta is not remembered."""
        drift = 0.0
        if self.theta is not None:
            size = float(self.theta.norm())
            drift = float((theta.detach() - self.theta).norm()) / (size or 1.0)
        return {"staleness": self.age, "drift": drift, "without_block": self.without}

    def state(self) -> dict[str, Any]:
        """What `restored` reads; the blocks are not in it, they are made again."""
        factors = self.factors
        if factors is not None:
            factors = {name: [_pack(part) for part in own] for name, own in factors.items()}
        return {
            "age": self.age,
            "theta": self.theta,
            "factors": factors,
            "diagonal": dict(self.diagonal),
            "parameters": self.parameters,
            "without_block": list(self.without),
            "made": self.made,
        }

    @classmethod
    def restored(cls, solver: str, state: dict[str, Any]) -> "Memory":
        """The memory of a solver that `state` wrote."""
        factors = state["factors"]
        if factors is not None:
            factors = {name: tuple(map(_unpack, own)) for name, own in factors.items()}
        return cls(
            solver, state["age"], state["theta"], state.get("parameters"), factors,
            dict(state["diagonal"]), without=tuple(state["without_block"]), made=state.get("made"),
        )  # fmt: skip


def _parameters(risk: WeightedRisk | SumOfRisks) -> list[list]:
    """Names and shapes of theta's parts."""
    return [[name, *p.shape] for name, p in trainable(risk.model).items()]


def owned(factors: tuple, done: Estimate) -> tuple:
    """The factors as they are kept: no view of the caller's batch, no spectrum's inputs."""
    given = {
        one.tape.x.untyped_storage().data_ptr()
        for one in done.passes
        if isinstance(one.tape.x, Tensor)
    }

    def alone(f):
        if isinstance(f, Spectrum):
            return Spectrum(f.values, f.vectors)
        if not isinstance(f, Columns):
            return f
        shared = f.columns.untyped_storage().data_ptr() in given
        return Columns(f.columns.clone(), f.scale) if shared else f

    return tuple(map(alone, factors))


def _pack(part: Factor | Tensor | None):
    if part is None or isinstance(part, Tensor):
        return part
    return [type(part).__name__, {f.name: getattr(part, f.name) for f in fields(part)}]


def _unpack(part):
    return FORMS[part[0]](**part[1]) if isinstance(part, list) else part
