"""The bilevel tasks of the book."""

from bilevel_lite.tasks import cleaning_run, hypercleaning

__all__ = ["cleaning_run", "hypercleaning"]
