"""The comparison of all methods: the same points for each, resumed to the same numbers."""

import json
import math

import pytest
import torch

from bilevel_lite import plotting
from bilevel_lite.__main__ import main
from bilevel_lite.tasks import cleaning_comparison as comparison
from bilevel_lite.tasks import cleaning_methods

optuna = pytest.importorskip("optuna")

WORDS = ["hyperclean", "--dataset", "digits", "--device", "cpu", "--method", "aid-identity", "soba",
         "--trials", "3", "--seeds", "2", "--search-budget", "60", "--budget", "120"]  # fmt: skip


def numbers(folder):
    """The result without what may differ: times, dates."""
    result = json.loads((folder / "result.json").read_text())
    del result["provenance"]
    for row in result["results"]:
        for run in row["runs"]:
            del run["seconds"], run["best"]["seconds"]
            for line in run["history"]:
                del line["seconds"]
    return result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "whole"
    assert main([*WORDS, "--out", str(folder)]) == 0
    return folder


def test_every_method_has_a_space_and_is_tried_equally_often(whole):
    # dense NHGD keeps a matrix of d x d numbers: it has a command, but no place in the search
    assert set(comparison.SPACES) == set(cleaning_methods.METHODS) - {"nhgd"}
    for space in comparison.SPACES.values():
        points = comparison._points(space, 8)
        assert len(points) == 8 and points == comparison._points(space, 9)[:8]
        for name, (low, high) in space.items():
            values = [math.log(p[name] / low) / math.log(high / low) for p in points]
            assert all(-1e-3 <= v <= 1.001 for v in values)
            # eight points of a Sobol sequence: one in each eighth of every axis
            assert sorted(min(7, int(8 * v)) for v in values) == list(range(8))
    result = numbers(whole)
    for row in result["results"]:
        assert [{k: t[k] for k in row["space"]} for t in row["trials"]] == comparison._points(
            row["space"], 3
        )
        losses = [t["tuning_loss"] for t in row["trials"] if t["tuning_loss"] is not None]
        best = next(t for t in row["trials"] if t["tuning_loss"] == min(losses))
        assert row["chosen"] == {k: best[k] for k in row["space"]}
        assert [run["seed"] for run in row["runs"]] == [0, 1]
        for run in row["runs"]:
            assert run["history"][-1]["gradients"] <= 120 * 1.3


@pytest.mark.parametrize("stop_at", [2, 4])
def test_stopped_anywhere_it_gives_the_same_numbers(whole, tmp_path, monkeypatch, stop_at):
    """Stopped within the search (with a trial under way) and within the final runs."""
    calls, build = [], cleaning_methods.build

    def stops(*arguments):
        method = build(*arguments)
        calls.append(1)
        if len(calls) == 2 * stop_at:
            step = method.step

            def interrupted():
                if method.iteration == 1:
                    raise KeyboardInterrupt
                return step()

            method.step = interrupted
        return method

    monkeypatch.setattr(cleaning_methods, "build", stops)
    words = [*WORDS, "--out", str(tmp_path / "run")]
    assert main(words) == 130
    monkeypatch.setattr(cleaning_methods, "build", build)
    assert main(words) == 0
    assert numbers(tmp_path / "run") == numbers(whole)


def test_divergence_is_a_result_not_an_end(tmp_path, monkeypatch, capsys):
    space = {"inner_lr": (1e20, 1e21), "outer_lr": (1.0, 2.0)}
    monkeypatch.setitem(comparison.SPACES, "soba", {**space, "step": (1e20, 1e21)})
    words = [w if w != "aid-identity" else "aid-kfac" for w in WORDS]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert "soba                 diverged in every trial" in capsys.readouterr().out
    row = numbers(tmp_path / "run")["results"][1]
    assert row["runs"] == [] and {t["tuning_loss"] for t in row["trials"]} == {None}
    stored = json.loads((tmp_path / "run" / "result.json").read_text())
    plotting.plt.close(plotting.draw_hyperclean_methods({"runs": [stored]}))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--trials", "0"], "trials: got 0, expected at least 1"),
        (["--budget", "-1"], "budget: got -1.0, expected a positive number"),
        (["--inner-lr", "0.1"], "--inner-lr: is chosen by the search, or fixed"),
        (["--seed", "3"], "--seed: is chosen by the search, or fixed"),
    ],
)
def test_bad_input(tmp_path, extra, message, capsys):
    assert main([*WORDS, *extra, "--out", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"method: got \['sgd'\], expected 'all' or some of"):
        comparison.run("digits", "linear", ["sgd"], str(tmp_path / "other"))


def test_the_task_is_the_same_for_all(whole):
    assert torch.get_default_dtype() == torch.float64  # the run put it back
