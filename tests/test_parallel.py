"""Several processes compute what one does, to rounding; and say so when one of them is lost."""

import sys
from pathlib import Path

import pytest
import several
import torch

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module", params=[2, 3])
def together(request, tmp_path_factory):
    """Every case of `several`, by so many processes: the results of each."""
    folder = tmp_path_factory.mktemp(f"by-{request.param}")
    words = [sys.executable, str(HERE / "several.py"), str(folder), *several.CASES]
    for code, _, errors in several.launch(request.param, words):
        assert code == 0, errors
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(request.param)]
        for name in several.CASES
    }


@pytest.fixture(scope="module")
def alone():
    return {name: case(None) for name, case in several.CASES.items()}


@pytest.mark.parametrize("name", several.CASES)
def test_as_one_process_to_rounding(name, together, alone):
    truth = alone[name]
    for made in together[name]:
        assert made.keys() == truth.keys()
        for key, value in truth.items():
            scale = max(1.0, float(value.abs().max()))
            assert float((made[key] - value).abs().max()) < 1e-12 * scale, key


@pytest.mark.parametrize("name", several.CASES)
def test_all_hold_the_same_to_the_last_bit(name, together):
    first, *others = together[name]
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)
