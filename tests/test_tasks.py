"""The protocol of a task, on each one of the book and on a stranger's of forty lines."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import stranger  # registers its task
import torch
from together import stopped_and_resumed, timeless

import bilevel_lite as bl
import bilevel_lite.tasks  # registers those of the book
from bilevel_lite import plotting
from bilevel_lite.__main__ import main
from bilevel_lite.experiment import RunFolder, job, methods, search
from bilevel_lite.experiment.task import TASKS, Task, find, owner

CPU = torch.device("cpu")


@pytest.fixture
def float32():
    with job.float32():
        yield


def test_a_strangers_task_is_short_and_known_by_its_name(capsys):
    assert len(Path(stranger.__file__).read_text().splitlines()) <= 50
    assert find("ridge") is find("stranger:ridge") is TASKS["ridge"] is stranger.Ridge
    assert main(["tasks"]) == 0
    out = capsys.readouterr().out
    assert "ridge        Learn one penalty for each feature of ridge regression\n" in out
    assert "hyperclean   Learn one weight per training example from a small clean" in out
    assert main(["tasks", "ridge"]) == 0
    out = capsys.readouterr().out
    assert "rows=60  training examples\n" in out and "outer_steps=20  outer iterations\n" in out
    assert main(["tasks", "text_cleaning"]) == 0
    out = capsys.readouterr().out  # what is another default on another dataset
    assert "outer_steps=20 (150 on semeval, trec, youtube)  outer iterations\n" in out
    assert "encoder=tiny (nothing on semeval, trec, youtube)" in out and "layers=1  " in out


def test_what_a_task_cannot_give_a_method_is_said(tmp_path, capsys):
    words = ["run", "stranger:ridge", "--device", "cpu", "--outer-steps", "2", "--method"]
    assert main([*words, "aid-kfac", "--out", str(tmp_path / "a")]) == 1
    assert "error: inner_loss: got function, but KFAC needs to see" in capsys.readouterr().err
    for method, message in (
        ("nosuch", "got 'nosuch', expected one of"), ("nomod:X", "there is no module 'nomod'"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*words, method, "--help"])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_keeps_the_protocol(name, float32):
    kind = find(name)
    s = kind.settings()
    task = kind.make(s, CPU)
    method = methods.build(s, task)
    task.refresh(method.theta)
    method.step()
    task.refresh(method.theta)
    row = task.measure(method.lam, method.theta)
    assert task.judge(method.lam, method.theta) == row[kind.criterion]
    assert all(isinstance(value, float) for value in row.values())
    assert torch.equal(task.project(method.lam), method.lam)
    assert {column.key for column in kind.columns} <= set(row)
    assert list(task.batches(s)) == [
        "inner_batch", "outer_batch", "curvature_batch", "cross_batch",
    ]  # fmt: skip
    json.dumps(kind.config(s))
    assert owner(name) is owner(f"{name}_search") is kind


@pytest.mark.parametrize("name", ["long_tail", "stranger:ridge"])
def test_stopped_and_resumed_it_gives_the_same_numbers(name, tmp_path, monkeypatch, capsys):
    words = ["run", name, "--method", "soba", "--device", "cpu", "--seed", "1"]
    words += ["--set", "outer_steps=9", "evaluate_every=2", "--set", "batch_size=25"]
    words += ["outer_batch_size=40", "outer_lr=0.1", "inner_lr=0.05", "step=0.05"]
    whole, _ = stopped_and_resumed(words, tmp_path, monkeypatch, capsys, bl.SOBA, at=5)
    assert [row["iteration"] for row in whole["history"]] == [2, 4, 6, 8, 9]
    assert (tmp_path / "whole" / "figure.png").stat().st_size > 5_000
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    assert "holds the finished run" in capsys.readouterr().out


def test_a_checkpoint_of_another_version_is_refused(tmp_path, capsys):
    words = ["run", "ridge", "--device", "cpu", "--out", str(tmp_path), "--set", "outer_steps=9"]
    assert main(words) == 0
    fresh = timeless(tmp_path)
    (tmp_path / "result.json").unlink()
    state = torch.load(tmp_path / "checkpoint.pt")
    del state["method"]["theta"]
    torch.save(state, tmp_path / "checkpoint.pt")
    capsys.readouterr()
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "by a version whose checkpoints this one cannot resume" in error
    assert "remove its checkpoint.pt to start anew" in error and error.count("\n") == 1
    (tmp_path / "checkpoint.pt").unlink()  # the way out that it names
    assert main(words) == 0
    assert timeless(tmp_path) == fresh


def test_the_outer_problem_of_the_stranger_is_solved(tmp_path):
    """Against ridge in closed form, its penalties found by another optimiser."""
    words = ["run", "ridge", "--device", "cpu", "--set", "outer_steps=100", "outer_lr=30"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    with job.float32():
        task = stranger.Ridge.make(stranger.Ridge.settings(), CPU)
    (x, y), validation = task.train, task.validation

    def phi(lam):
        theta = torch.linalg.solve(x.T @ x / 60 + torch.diag(lam.exp()) / 10, x.T @ y / 60)
        return task.problem.outer_loss(lam, theta, validation)

    lam = task.lam0.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([lam], max_iter=50, line_search_fn="strong_wolfe")
    optimizer.step(lambda: (optimizer.zero_grad(), (value := phi(lam)).backward(), value)[-1])
    first, lowest = float(phi(task.lam0)), float(phi(lam.detach()))
    last = timeless(tmp_path)["history"][-1]["outer_loss"]
    assert lowest - 1e-3 < last < lowest + 0.3 * (first - lowest)


def test_a_search_of_any_task_is_resumed_and_drawn(tmp_path, capsys, monkeypatch):
    pytest.importorskip("optuna")
    words = ["search", "ridge", "--method", "soba", "aid-cg", "--over", "inner_lr=0.01:0.1"]
    words += ["outer_lr=0.1:2", "--trials", "3", "--seeds", "2", "--search-steps", "4"]
    words += ["--outer-steps", "6", "--looks", "3", "--device", "cpu", "--out", str(tmp_path)]
    assert main(words) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["method"] for row in result["results"]] == ["soba", "aid-cg"]
    for row in result["results"]:
        assert [{k: t[k] for k in row["space"]} for t in row["trials"]] == search._points(
            row["space"], 3
        )
        lowest = min(row["trials"], key=lambda trial: trial["criterion"])
        assert row["chosen"] == {k: lowest[k] for k in row["space"]}
        assert [look["iteration"] for look in row["runs"][0]["history"]] == [2, 4, 6]
        assert len(row["runs"]) == 2
    capsys.readouterr()
    assert main(words) == 0
    again = capsys.readouterr().out
    assert "holds the finished study" in again and "criterion       s  gradients" in again
    first = min(result["results"], key=lambda row: search.mean_best(row, "criterion"))
    assert again.splitlines()[2].split()[:2] == [
        first["method"], f"{search.mean_best(first, 'criterion'):.4g}"
    ]  # fmt: skip
    assert main([word.replace("0.1:2", "0.1:3") for word in words]) == 1
    assert "was made with other settings (over: " in capsys.readouterr().err
    (fig,) = stranger.Ridge.draw({"kind": result["kind"], "runs": [result]}).values()
    assert [line.get_label() for line in fig.axes[0].lines] == ["soba", "aid-cg"]
    plotting.plt.close(fig)

    to = tmp_path / "figures"
    assert main(["collect", str(tmp_path), "--name", "mine", "--to", str(to)]) == 0
    monkeypatch.delitem(TASKS, "ridge")  # as in a process of another day
    monkeypatch.delitem(sys.modules, "stranger")
    capsys.readouterr()
    assert main(["figures", "--to", str(to)]) == 1
    assert "for a task of your own, --task MODULE:NAME" in capsys.readouterr().err
    assert main(["figures", "--to", str(to), "--task", "stranger:ridge"]) == 0
    assert (to / "mine.svg").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "rigde"], "there is no task 'rigde'; known: ["),
        (["run", "nowhere:ridge"], "there is no module 'nowhere' with a task"),
        (["run", "./nowhere:ridge"], "expected MODULE:NAME"),
        (["run", ".nowhere:ridge"], "expected MODULE:NAME"),
        (["run", "ridge", "--set", "row=3"], "row: is no setting here (got 'row=3')"),
        (["run", "ridge", "--inner-lrr", "1"], "; did you mean inner_lr?"),
        (["run", "ridge", "--seed", "1", "--set", "seed=2"], "--seed: is given as an option and"),
        (
            ["search", "ridge", "--method", "soba", "--over", "inner_lr=1:2", "--set", "seed=3"],
            "--set: seed is chosen by the search",
        ),
        (
            [
                "search",
                "ridge",
                "--method",
                "soba",
                "--over",
                "inner_lr=1:2",
                "--set",
                "inner_lr=1",
            ],
            "--set: inner_lr is chosen by the search",
        ),
        (["run", "ridge", "--set", "rows=many"], "rows: got 'many', expected an integer"),
        (["run", "ridge", "--set", "rows=0"], "rows: got 0, expected an integer of at least 1"),
        (
            ["run", "ridge", "--set", "fisher=all"],
            "fisher: got 'all', expected 'mc', 'exact' or 'empirical'",
        ),
        (["run", "ridge", "--set", "method=sgd"], "method: got 'sgd', expected one of"),
        (["run", "long_tail", "--set", "imbalance=0"], "imbalance: got 0.0, expected at least 1"),
        (["search", "ridge", "--method", "soba", "--over", "inner_lr=1"], "over: got 'inner_lr=1'"),
        (["search", "ridge", "--method", "soba", "--over", "rows=1:9"], "expected a real setting"),
        (
            ["search", "ridge", "--method", "soba", "sama", "--over", "damping=1:9"],
            "damping: is not read by soba, sama; it is by aid-cg, ",
        ),
    ],
)
def test_bad_input(tmp_path, words, message, capsys):
    assert main([*words, "--out", str(tmp_path / "run"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_another_tasks_folder_is_refused(tmp_path, capsys):
    stranger_config = stranger.Ridge.config(stranger.Ridge.settings())
    RunFolder(tmp_path, stranger_config).close()
    assert main(["run", "long_tail", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert "was made with other settings" in capsys.readouterr().err


def test_a_task_lies_in_the_folder_where_one_is(tmp_path, monkeypatch):
    """The installed command has not that folder on its path."""
    source = Path(stranger.__file__).read_text()
    (tmp_path / "of_mine.py").write_text(source.replace("ridge", "of_mine"))
    (tmp_path / "lacks.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    try:
        assert find("of_mine:of_mine").__module__ == "of_mine"
        with pytest.raises(ValueError, match="'lacks' imports 'nothing_of_that_name'"):
            find("lacks:of_mine")
    finally:
        TASKS.pop("of_mine", None)
        sys.modules.pop("of_mine", None)


@pytest.fixture
def measured():
    """A task whose looks measure what is asked for."""
    values = []

    class Measured(stranger.Ridge, name="measured"):
        """Measures what it is told."""

        def measure(self, lam, theta):
            return values.pop(0)

    yield values
    TASKS.pop("measured")


def test_a_look_that_is_not_finite_is_not_the_best(measured, tmp_path):
    measured += [{"criterion": v} for v in (math.nan, 3.0, math.inf, 2.0, math.nan)]
    words = ["run", "measured", "--outer-steps", "5", "--evaluate-every", "1"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best"]["iteration"] == 4 and result["best"]["criterion"] == 2.0


@pytest.mark.parametrize(
    "row, message",
    [({"loss": 1.0}, "gave NoneType for the criterion 'criterion', expected a number"),
     ({"criterion": torch.ones(())}, "measure: gave Tensor for 'criterion'"),
     ({"criterion": 1.0, "a": np.float32(1)}, "measure: gave float32 for 'a'"),
     (1.0, "measure: gave float, expected a dict")],
)  # fmt: skip
def test_a_look_without_a_number_to_judge_by(measured, row, message, tmp_path, capsys):
    measured.append(row)
    words = ["run", "measured", "--outer-steps", "1", "--out", str(tmp_path / "run")]
    assert main(words) == 1
    assert message in capsys.readouterr().err


def test_numbers_of_numpy_are_kept_as_numbers(measured, tmp_path):
    words = ["run", "measured", "--outer-steps", "4", "--evaluate-every", "1"]
    words += ["--out", str(tmp_path / "run")]
    measured += [{"criterion": np.mean([v, v])} for v in (3.0, 2.0)]
    with pytest.raises(IndexError):  # the third look has nothing to say
        main(words)
    measured += [{"criterion": np.float64(v)} for v in (1.0, 4.0)]
    assert main(words) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [row["criterion"] for row in result["history"]] == [3.0, 2.0, 1.0, 4.0]


class Dropping(Task, name="dropping"):
    """A network that drops units while it trains: with torch's own generator."""

    defaults = {"outer_steps": 6, "evaluate_every": 2, "method": "sama", "outer_lr": 0.1}

    @classmethod
    def make(cls, s, device):
        x, y = torch.randn(60, 5), torch.randint(0, 3, (60,))  # of that generator, too
        layers = [torch.nn.Linear(5, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 3)]
        model = torch.nn.Sequential(*layers).train()
        risk = bl.WeightedRisk(model, weight=lambda lam, b: lam[b[2]].sigmoid())
        plain = bl.WeightedRisk(torch.nn.Sequential(layers[0], layers[2]))
        problem = bl.BilevelProblem(risk, plain)
        sets = (x[:40], y[:40]), (x[40:], y[40:])
        return cls(problem=problem, lam0=torch.zeros(40), theta0=bl.flatten(model),
                   train=sets[0], validation=sets[1])  # fmt: skip

    def measure(self, lam, theta):
        return {"criterion": float(self.problem.outer_loss(lam, theta, self.validation))}


def test_dropout_draws_the_same_in_a_resumed_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "dropping", Dropping)
    words = ["run", "dropping", "--device", "cpu", "--seed", "3"]
    state = torch.get_rng_state()
    whole, _ = stopped_and_resumed(words, tmp_path, monkeypatch, capsys, bl.SAMA, 3)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's is left alone
    torch.manual_seed(5)
    assert main([*words, "--out", str(tmp_path / "again")]) == 0
    assert timeless(tmp_path / "again") == whole
    assert main([*words[:-1], "4", "--out", str(tmp_path / "other")]) == 0
    assert timeless(tmp_path / "other")["best"] != whole["best"]


class Forgetful(stranger.Ridge, name="forgetful"):
    """Its batches do not know where they are."""

    def batches(self, s):
        draws = SimpleNamespace(draw=lambda: self.train)
        return {**super().batches(s), "inner_batch": draws}


class Nothing(stranger.Ridge, name="nothing"):
    """Forgets to return itself."""

    @classmethod
    def make(cls, s, device):
        super().make(s, device)


class Whole(stranger.Ridge, name="whole"):
    """Begins at a lam of integers."""

    @classmethod
    def make(cls, s, device):
        task = super().make(s, device)
        task.lam0 = task.lam0.long()
        return task


ODD = {"dropping": Dropping, "forgetful": Forgetful, "nothing": Nothing, "whole": Whole}
for name in ODD:
    TASKS.pop(name)  # nobody else's


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("forgetful", "inner_batch: SimpleNamespace has no state_dict(), so a run that is resumed"),
        ("nothing", "make: returned NoneType, expected the task"),
        ("whole", "lam: got torch.int64, expected a floating-point tensor"),
    ],
)
def test_tasks_that_a_run_refuses(task, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, task, ODD[task])
    assert main(["run", task, "--outer-steps", "1", "--out", str(tmp_path / "run")]) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_a_database_that_cannot_be_written_into(tmp_path, monkeypatch, capsys):
    import optuna

    def full(*_, **__):
        raise optuna.exceptions.StorageInternalError("too long") from OSError("disk is full")

    words = ["search", "ridge", "--method", "soba", "--over", "inner_lr=0.01:0.1", "--trials", "1",
             "--seeds", "1", "--search-steps", "2", "--outer-steps", "2"]  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(optuna.study.Study, "add_trial", full)
        assert main([*words, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "storage: Optuna cannot write into 'sqlite:" in said and "(disk is full)" in said
    assert main([*words, "--out", str(tmp_path)]) == 0


def test_a_database_that_cannot_be_opened(tmp_path, capsys):
    words = ["search", "ridge", "--method", "soba", "--over", "inner_lr=0.01:0.1", "--trials", "1",
             "--seeds", "1", "--search-steps", "2", "--outer-steps", "2"]  # fmt: skip
    for k, storage in enumerate(("nonsense", "sqlite:////nowhere/x.db")):
        assert main([*words, "--out", str(tmp_path / str(k)), "--storage", storage]) == 1
        assert "storage: Optuna cannot open" in capsys.readouterr().err
