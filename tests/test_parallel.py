"""Several processes compute what one does, to rounding; and say so when one of them is lost."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import several
import torch
import torch.distributed as dist

import bilevel_lite as bl
from bilevel_lite.__main__ import main
from bilevel_lite.experiment import job
from bilevel_lite.experiment.task import find
from bilevel_lite.parallel import Group, Sharded, Shards, dealt, shard
from bilevel_lite.products import theta_gradient
from bilevel_lite.workers import environments

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


# ------------------------------------------------------------------ runs

RUN = (
    "run hyperclean --method aid-kfac --device cpu --set dataset=digits model=mlp inner_steps=3 "
    "outer_steps=12 evaluate_every=4 baselines=0 batch_size=99 curvature_batch_size=99"
).split()
PYTHON = [sys.executable, "-m", "bilevel_lite"]


def numbers(folder):
    """The log, without what no two runs share."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """A run by two processes: its folder, and what they printed."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    return folder, several.launch(2, [*PYTHON, *RUN, "--out", str(folder)])


def test_a_run_by_two_processes_is_that_of_one(by_two, tmp_path):
    folder, ((code, said, _), (other, silent, _)) = by_two
    assert (code, other) == (0, 0)
    assert "aid-kfac on digits" in said
    assert not silent
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    for mine, theirs in zip(numbers(folder), numbers(tmp_path), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)  # float32, twelve iterations
    result = json.loads((folder / "result.json").read_text())
    assert result["processes"]["number"] == 2
    assert "processes" not in json.loads((tmp_path / "result.json").read_text())


def test_bytes_and_waits_are_those_of_the_equations(by_two):
    each = json.loads((by_two[0] / "result.json").read_text())["processes"]["each_iteration"]
    d, layers = 64 * 256 + 256 + 256 * 10 + 10, 2
    # three inner steps and f, two numbers each; two more at the 1st, 2nd, 4th ... call of a loss
    assert each["value"] == {"calls": 4, "bytes": pytest.approx((48 * 8 + 2 * 8 * 5) / 12)}
    assert each["theta"]["calls"] == 4
    assert each["theta"]["bytes"] == 4 * 4 * d
    assert each["lam"]["calls"] == 1
    assert each["factors"]["calls"] == 2 * layers
    # 99 examples: B of the first layer and A of the second are gathered by their columns, of which
    # gloo wants as many from each (50 of 99); A of the first and B of the second are summed
    assert each["factors"]["bytes"] == 4 * (2 * 50 * (256 + 257) + 65**2 + 10**2)


@pytest.mark.parametrize("how", ["gone", "silent"])
def test_where_one_is_lost_the_others_say_so_and_the_run_resumes(how, by_two, tmp_path):
    words = [sys.executable, str(HERE / "several.py"), "lost", how, *RUN, "--out", str(tmp_path)]
    wait = {"BILEVEL_LITE_WAIT": "20"} if how == "silent" else {}
    (code, _, errors), (other, _, _) = several.launch(2, words, **wait)
    assert code == 1
    assert other == (9 if how == "gone" else 1)
    assert "error: process 0 of 2: another one is gone, or did not answer in time" in errors
    assert "the same command resumes from the last checkpoint" in errors
    assert [row["iteration"] for row in numbers(tmp_path)] == [4]
    (code, said, _), _ = several.launch(2, [*PYTHON, *RUN, "--out", str(tmp_path)])
    assert code == 0
    assert "after iteration 4" in said
    assert numbers(tmp_path) == numbers(by_two[0])


def test_torchrun_starts_it_and_one_process_takes_it_up(by_two, tmp_path):
    short = [*RUN, "--out", str(tmp_path)]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--master-addr", "127.0.0.1", "--master-port", environments(1)[0]["MASTER_PORT"]]
    stop = [*run, str(HERE / "several.py"), "lost", "gone", *short]
    done = subprocess.run(stop, capture_output=True, text=True, timeout=several.LIMIT, check=False)
    assert done.returncode == 1
    assert main(short) == 0
    for mine, theirs in zip(numbers(tmp_path), numbers(by_two[0]), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


# ------------------------------------------------------------------ bad input


@pytest.fixture
def group():
    """A group of one, in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Group()
    dist.destroy_process_group()


def test_a_group_needs_processes():
    with pytest.raises(RuntimeError, match="group: there is no process group; start with torchrun"):
        Group()


@pytest.mark.parametrize("part_in_training", [True, False])
def test_statistics_of_a_processs_own_rows_are_refused(group, part_in_training):
    """Also where the model as a whole is in evaluation mode."""
    norm = torch.nn.BatchNorm1d(3, track_running_stats=part_in_training)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), norm, torch.nn.Linear(3, 2)).eval()
    norm.train(part_in_training)
    loss, batch = Sharded(bl.WeightedRisk(model), group), (torch.randn(4, 2), torch.arange(4) % 2)
    with pytest.raises(ValueError, match=r"rows alone; call model.eval\(\) \(and .*running_stats="):
        loss(torch.zeros(1), bl.flatten(model), batch)


def test_losses_that_cannot_be_shared_are_refused(group):
    risk = bl.WeightedRisk(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="loss: is sharded already"):
        Sharded(Sharded(risk, group), group)
    with pytest.raises(TypeError, match="loss: a sum of risks has a batch for each"):
        Sharded(bl.SumOfRisks([risk, risk]), group)
    with pytest.raises(TypeError, match=r"loss: got int, expected \(lam, theta, batch\)"):
        Sharded(3, group)
    with pytest.raises(TypeError, match="group: got 2, expected a bilevel_lite.parallel.Group"):
        Sharded(risk, 2)
    with pytest.raises(TypeError, match="group: got 2, expected a bilevel_lite.parallel.Group"):
        bl.KFAC(group=2)


def test_a_group_on_the_solver_of_a_problem_that_is_not_shared_is_refused(group):
    risk = bl.WeightedRisk(torch.nn.Linear(2, 2), weight=lambda lam, batch: lam[batch[2]])
    batch = torch.eye(2), torch.tensor([0, 1]), torch.arange(2)
    at = bl.BilevelProblem(risk, risk), torch.ones(2), torch.zeros(6), batch, batch
    kfac = bl.KFAC(group=group)
    for solver in (kfac, bl.CG(2, precondition=kfac), bl.KFACRichardson(1, kfac)):
        with pytest.raises(ValueError, match="solver: its factors are of all processes' rows"):
            bl.hypergradient(*at, solver=solver)


def test_what_is_not_finite_is_said_to_be_that(group):
    with pytest.raises(ValueError, match="theta: has entries that are NaN or infinite"):
        group.require_same(theta=torch.tensor([1.0, float("nan")]))


def test_an_error_that_is_no_loss_of_a_process_stays_what_it_is(group):
    with pytest.raises(RuntimeError, match="dtype") as caught, group._lost():
        raise RuntimeError("unsupported dtype")
    assert not isinstance(caught.value, ConnectionError)


def test_a_loss_that_is_no_scalar_is_refused_in_the_usual_words(group):
    loss = Sharded(lambda lam, theta, batch: theta, group)
    with pytest.raises(ValueError, match=r"returned shape \(3,\), expected a scalar"):
        theta_gradient(loss, torch.zeros(1), torch.zeros(3), None)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2)), "batch: has 2 rows, fewer than the 3 processes"),
        ((torch.zeros(5, 3), torch.zeros(4)), r"batch: its tensors have \[4, 5\] rows"),
        ({"x": torch.zeros(5), "scale": torch.tensor(1.0)}, r"batch: its tensors have \[0, 5\]"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        shard(batch, SimpleNamespace(rank=0, size=3))


def test_the_rows_of_all_are_the_batch():
    batch = {"x": torch.arange(10).view(5, 2), "rest": (torch.arange(5), "word", None)}
    parts = [shard(batch, SimpleNamespace(rank=r, size=3)) for r in range(3)]
    assert torch.equal(torch.cat([part["x"] for part in parts]), batch["x"])
    assert torch.equal(torch.cat([part["rest"][0] for part in parts]), batch["rest"][0])
    assert all(part["rest"][1:] == ("word", None) for part in parts)
    pair = namedtuple("pair", "x y")(torch.arange(4), torch.arange(4))
    assert shard(pair, SimpleNamespace(rank=1, size=2)).y.tolist() == [2, 3]


def test_jobs_are_dealt_by_their_cost():
    assert dealt([1, 8, 3, 3, 2], 2) == [0, 0, 1, 1, 1]
    assert dealt([], 2) == []


def test_what_one_process_must_run_is_refused(group, monkeypatch, capsys, tmp_path):
    kind = find("pretraining")
    with pytest.raises(ValueError, match="task: pretraining has iterations of its own"):
        job.run(kind, kind.settings(), str(tmp_path / "a"), "cpu", group)
    kind = find("hyperclean")
    s = kind.settings(dataset="digits", model="mlp", method="aid-cg", batchnorm="batch")
    monkeypatch.setattr(kind, "uses_batches", True)
    with pytest.raises(ValueError, match="batchnorm: 'batch' is of a batch's own statistics"):
        job.run(kind, s, str(tmp_path / "b"), "cpu", group)
    kind = find("long_tail")
    s = kind.settings(dataset="digits", method="aid-kfac", reading="normalised")
    with pytest.raises(ValueError, match="reading: 'normalised' divides by the mean weight"):
        job.run(kind, s, str(tmp_path / "d"), "cpu", group)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["study", "solvers", "--out", str(tmp_path / "c")]) == 1
    assert "error: study runs in one process" in capsys.readouterr().err


def test_what_cannot_be_shared_is_refused():
    held = SimpleNamespace(x=torch.ones(4))
    with pytest.raises(TypeError, match="batch: holds tensors in a SimpleNamespace; expected tup"):
        shard((torch.ones(4), held), SimpleNamespace(rank=0, size=2))
    with pytest.raises(TypeError, match="sampler: got SimpleNamespace, expected one with draw"):
        Shards(SimpleNamespace(draw=lambda: None), SimpleNamespace(rank=0, size=2))


def test_a_wait_that_is_no_number_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("BILEVEL_LITE_WAIT", "soon")
    assert main([*RUN, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "BILEVEL_LITE_WAIT: got 'soon', expected a positive number of seconds" in said
    for size in ("two", "0", "-1"):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert main([*RUN, "--out", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert f"error: WORLD_SIZE: got '{size}', expected a number of processes" in said


@pytest.mark.gpu
def test_on_a_gpu_nccl_computes_what_one_process_does(tmp_path):
    """One process, as one GPU gives us: which calls NCCL takes, not how it scales."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    try:
        shared = Group()
        problem_, lam, theta, batch = several.problem("conv")
        model = problem_.inner_loss.model.cuda()
        lam, theta, batch = lam.cuda(), theta.cuda(), tuple(part.cuda() for part in batch)
        assert next(model.parameters()).is_cuda
        for make in (lambda: bl.CG(3, damping=1.0), lambda: bl.KFAC(0.1), lambda: bl.EKFAC(0.1)):
            made = [
                bl.hypergradient(of, lam, theta, batch, batch, solver=make())
                for of in (problem_, several.sharded(problem_, shared))
            ]
            torch.testing.assert_close(*made, rtol=1e-9, atol=1e-12)
        shared.require_same(theta=theta)
        assert shared.tell([1, "a"]) == [1, "a"]
        assert shared.first(lambda: 3) == 3
        assert torch.equal(shared.gather(theta[None], "x"), theta[None])
        assert torch.equal(shared.broadcast(theta, 0, "x"), theta)
    finally:
        dist.destroy_process_group()
