"""Rules of searches and comparisons that a reader of the package found broken once."""

import json

import pytest
import torch

import bilevel_lite as bl
from bilevel_lite.experiment import job, methods, search, stored
from bilevel_lite.tasks import cleaning_comparison, studies
from bilevel_lite.tasks.hypercleaning import Hypercleaning


def compared(out, budget=300):
    return cleaning_comparison.run(
        "digits", "linear", ["nbo-cg"], str(out), seeds=1, trials=1, search_budget=60,
        budget=budget, device="cpu",
    )  # fmt: skip


def test_a_budget_ends_a_run_whatever_its_iterations_cost(tmp_path, monkeypatch, capsys):
    real = methods.build

    def cheaper(s, task):
        """After four iterations, those by which the cost is told, each counts one gradient."""
        method = real(s, task)
        step = method.step

        def counted():
            before = method.gradients
            info = step()
            if method.iteration > 4:
                method.gradients = info.gradients = before + 1
            return info

        method.step = counted
        return method

    monkeypatch.setattr(methods, "build", cheaper)
    compared(tmp_path / "out")
    looks = (tmp_path / "out" / "nbo-cg-0" / "log.jsonl").read_text("utf-8").splitlines()
    assert 300 <= json.loads(looks[-1])["gradients"] < 320


def test_a_finished_study_is_shown_and_not_rewritten(tmp_path, monkeypatch, capsys):
    first = compared(tmp_path / "out")
    written = (tmp_path / "out" / "result.json").read_bytes()
    monkeypatch.setattr(search, "provenance", None)  # would be called to write
    assert compared(tmp_path / "out")["results"] == first["results"]
    assert (tmp_path / "out" / "result.json").read_bytes() == written


def test_kfac_in_amigo_and_mrbo_has_the_given_options():
    options = {"fisher": "empirical", "ema": 0.9, "every": 5}
    for name in ("amigo-kfac", "amigo-kfac-replace", "mrbo-kfac"):
        settings = Hypercleaning.settings(method=name, **options)
        task = Hypercleaning.make(settings, torch.device("cpu"))
        kfac = methods.build(settings, task).solver
        assert (kfac.fisher, kfac.ema, kfac.every) == ("empirical", 0.9, 5), name


def test_runs_keep_float32_at_its_precision():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        with job.float32():
            assert not any(flag.allow_tf32 for flag in flags)
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def test_a_methods_own_number_is_its_classes_by_default():
    settings = Hypercleaning.settings(method="bsg1")
    task = Hypercleaning.make(settings, torch.device("cpu"))
    assert isinstance(method := methods.build(settings, task), bl.BSG1)
    assert method.floor == 1e-4


class Once:
    """Batches of one number, without a state: the second is bad and does not come again."""

    def __init__(self):
        self.drawn = 0

    def draw(self):
        self.drawn += 1
        return torch.tensor(float("inf") if self.drawn == 2 else 1.0)


def test_a_repeated_step_that_succeeds_still_raises_what_failed_first(monkeypatch):
    problem = bl.BilevelProblem(
        lambda lam, theta, batch: batch * (theta - lam).square().sum(),
        lambda lam, theta, batch: theta.square().sum(),
    )
    lam, theta, batches = torch.ones(2), torch.zeros(2), Once()
    fixed = dict.fromkeys(("outer_batch", "curvature_batch", "cross_batch"), torch.tensor(1.0))
    run = bl.AID(
        problem, lam, theta, bl.CG(2), 1, inner_lr=0.1, outer_lr=0.1, inner_batch=batches, **fixed
    )
    run.step()
    before = run.lam.clone(), run.theta.clone()
    # as on a GPU, where only the end of a step is looked at
    monkeypatch.setattr("bilevel_lite.algorithms.method.looked_at", lambda value: False)
    with pytest.raises(bl.refuse.NotFinite):
        run.step()
    assert batches.drawn == 3  # the repeated step had a good batch
    assert run.iteration == 1
    assert torch.equal(run.lam, before[0]) and torch.equal(run.theta, before[1])
    run.step()
    assert run.iteration == 2


def test_the_defaults_are_those_that_the_stored_results_were_made_with():
    """Declared in several places once; a number that moves would part the records from the code."""
    for run in stored("hyperclean_mnist_linear")["runs"]:  # as README's command, nothing given
        was = {name: value for name, value in run["settings"].items() if name != "seed"}
        assert was.items() <= vars(Hypercleaning.settings(dataset="mnist")).items()
        assert {"damping", "step", "iters", "outer_lr"} <= set(was)
    checked = set()
    for part in stored("hyperclean_mnist_methods")["runs"]:
        for row in part["results"]:
            box = cleaning_comparison.SPACES[row["method"]]
            # a method's one own number was called its strength
            own = next((name for name in box if name in methods.OWN), None)
            named = {own if k == "strength" else k: ends for k, ends in row["space"].items()}
            was = {name: tuple(ends) for name, ends in named.items()}
            assert was == cleaning_comparison.searched(box, part["model"])
            checked |= set(was)
    assert {"inner_lr", "outer_lr", "damping", "step", "eta", "alpha", "beta"} <= checked
    for part in stored("hyperclean_mnist_refresh")["runs"]:
        usual = studies.usual("refresh")
        assert all(part[name] == usual[name] for name in ("seeds", "trials", "looks"))
        assert part["search"] == {"outer_steps": usual["search_steps"]}
        assert part["final"] == {"outer_steps": usual["outer_steps"]}
