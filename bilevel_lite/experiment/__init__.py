"""Runs and their results: nothing in here knows a task."""

from bilevel_lite.experiment.folder import (
    Clock,
    RunError,
    RunFolder,
    collect,
    compact,
    provenance,
    seal,
    stored,
    unseal,
)

__all__ = [
    "Clock",
    "RunError",
    "RunFolder",
    "collect",
    "compact",
    "provenance",
    "seal",
    "stored",
    "unseal",
]
