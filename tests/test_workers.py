"""Processes beside a notebook's own: what they return, what they cannot, and none at all."""

import os
import sys

import pytest
import torch

from bilevel_lite import workers
from bilevel_lite.workers import Failed, Workers


def ranks(group, x, words):
    total = group.sum(x * (1 + group.rank), "x")
    return {
        "total": total,
        "rank": group.rank,
        "words": [*words, torch.get_default_dtype().itemsize],
    }


def twice(x):
    return 2 * x


def uses(group):
    return float(twice(torch.ones(1)))


def one_fails(group):
    if group.rank == 1:
        raise ValueError("lam: is bad")
    return 3


def one_leaves(group):
    import os

    if group.rank == 1:
        os._exit(7)
    return float(group.sum(torch.ones(2), "x")[0])


@pytest.fixture(scope="module")
def two():
    made = Workers(2, timeout=120)
    assert made.size == 2
    yield made
    made.close()


def test_both_return_what_they_made(two):
    first, second = two.run(ranks, torch.tensor([1.0, 2.0]), ["a"])
    assert torch.equal(first["total"], torch.tensor([3.0, 6.0]))
    assert torch.equal(second["total"], first["total"])
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["words"] == ["a", 8]


def test_what_was_defined_is_known(two):
    with pytest.raises(RuntimeError, match="name 'twice' is not defined"):
        two.run(uses)
    two.define(twice)
    assert two.run(uses) == [2.0, 2.0]


def one_fails_while_the_other_waits(group):
    if group.rank == 1:
        raise ValueError("lam: is bad")
    return float(group.sum(torch.ones(1), "x"))


def test_where_one_waits_for_one_that_failed_both_are_started_anew(two, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    waited, failed = two.run(one_fails_while_the_other_waits, may_fail=True)
    assert failed == "ValueError: lam: is bad"
    assert isinstance(waited, Failed)
    assert torch.equal(two.run(ranks, torch.ones(1), [])[0]["total"], 3 * torch.ones(1))


def test_what_one_raises_is_told(two):
    with pytest.raises(RuntimeError, match="process 1: ValueError: lam: is bad"):
        two.run(one_fails)
    three, failed = two.run(one_fails, may_fail=True)
    assert (three, failed, type(failed)) == (3, "ValueError: lam: is bad", Failed)
    assert two.run(ranks, torch.ones(1), [])[1]["rank"] == 1


def test_one_that_leaves_is_noticed_by_the_other_and_here():
    pair = Workers(2, timeout=120)
    lost, gone = pair.run(one_leaves, may_fail=True)
    assert lost.startswith("ProcessLost: process 0 of 2: another one is gone")
    assert gone == "it is gone (exit code 7)"
    pair.close()


def test_where_they_cannot_be_started_again_all_runs_here(monkeypatch, capsys):
    pair = Workers(2, timeout=120)
    pair.run(one_leaves, may_fail=True)
    monkeypatch.setattr(sys, "executable", os.devnull)
    (only,) = pair.run(ranks, torch.ones(1), [])
    assert only["rank"] == 0
    assert capsys.readouterr().out.startswith("one process only: ")
    pair.close()
    with pytest.raises(RuntimeError, match="workers: they were closed; make new ones"):
        pair.run(ranks, torch.ones(1), [])


def test_a_result_that_cannot_be_read_is_refused(two):
    odd = "def odd(group): import numpy; return [numpy.float64(1.0)]"
    with pytest.raises(RuntimeError, match="process 0: TypeError: returned a float64"):
        two.run(odd)


def test_where_none_can_be_started_all_runs_here(monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", os.devnull)
    made = Workers(2)
    assert made.size == 1
    assert capsys.readouterr().out.startswith("one process only: ")
    (only,) = made.run(ranks, torch.tensor([1.0, 2.0]), [])
    assert torch.equal(only["total"], torch.tensor([1.0, 2.0]))


def test_where_none_answers_in_time_all_runs_here(monkeypatch, capsys):
    monkeypatch.setattr(workers.Path, "exists", lambda path: False)
    made = Workers(2, timeout=0.01)
    assert made.size == 1
    assert "one process only: it did not answer in 0.01 s" in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 1.5, "2"])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="size: got .*, expected a positive whole number"):
        Workers(size)
