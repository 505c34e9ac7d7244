"""Tests compare with truths in float64.

A test that turns warnings into errors names their class: torch imports parts of itself on first use
and may warn of what it deprecates then, so that "error" alone depends on which test ran before.
"""

import pytest
import torch

from bilevel_lite import kronecker

torch.set_default_dtype(torch.float64)


@pytest.fixture(params=["one by one", "together"])
def both_routes(request, monkeypatch):
    """KFAC's layers one by one, as on a CPU, and together, as on any other device."""
    monkeypatch.setattr(kronecker, "in_batches", request.param == "together")
