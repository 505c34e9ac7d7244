"""Runs and their results: nothing in here knows a task.

Example:
    >>> bl.experiment.stored("bench_cpu")["kind"]
    'bench'
"""

from bilevel_lite.experiment.folder import (
    Clock,
    RunError,
    RunFolder,
    collect,
    compact,
    figures_folder,
    provenance,
    seal,
    stored,
    unseal,
)
from bilevel_lite.experiment.settings import Settings, setting
from bilevel_lite.experiment.task import Column, Task

__all__ = [
    "Clock",
    "Column",
    "RunError",
    "RunFolder",
    "Settings",
    "Task",
    "collect",
    "compact",
    "figures_folder",
    "provenance",
    "seal",
    "setting",
    "stored",
    "unseal",
]
