"""Data poisoning: the task, its equations by hand, its defenders, its study."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from together import stopped_and_resumed

import bilevel_lite as bl
from bilevel_lite import data
from bilevel_lite.__main__ import main
from bilevel_lite.curvature import ggn_vp
from bilevel_lite.experiment import job, methods
from bilevel_lite.experiment.comparing import joined
from bilevel_lite.factors import kfac_factors
from bilevel_lite.params import predict
from bilevel_lite.tasks import poisoning, poisoning_figures, poisoning_study, studies
from bilevel_lite.tasks.poisoning import Poisoning

CPU = torch.device("cpu")
SIZES = ("batch_size", "curvature_batch_size", "cross_batch_size")


@pytest.fixture
def float32():
    with job.float32():
        yield


def small(seed=0, n=24, dtype=torch.float64):
    """Three classes in the plane, six poisoned rows, a generator of width 3: all in float64."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = (torch.rand(n, 2, generator=draws).to(dtype) + F.one_hot(y, 3)[:, :2]) / 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = poisoning.Generator(2, 3, 3).to(dtype)
        model = torch.nn.Linear(2, 3).to(dtype)
    inputs = poisoning.with_poison(generator, (x[:6], y[:6]), 0.25)
    inner = bl.WeightedRisk(model, l2=1e-2, inputs=inputs)
    x_valid = torch.rand(9, 2, generator=draws).to(dtype)
    valid = x_valid, torch.arange(9) % 3

    def outer(lam, theta, batch):
        return poisoning.not_the_label(predict(model, theta, batch[0]), batch[1])

    problem = bl.BilevelProblem(inner, outer)
    return problem, generator, model, (x, y, torch.arange(n)), valid


def solved(problem, lam, batch, d):
    """theta*(lam) of a strictly convex inner problem, by Newton's method."""
    theta = torch.zeros(d, dtype=lam.dtype)
    for _ in range(12):
        at = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(problem.inner_loss(lam, at, batch), at)
        H = torch.autograd.functional.hessian(lambda t: problem.inner_loss(lam, t, batch), theta)
        theta = theta - torch.linalg.solve(H, g)
    assert g.norm() < 1e-12
    return theta


def test_the_inner_loss_is_one_mean_over_clean_and_poisoned_rows():
    problem, generator, model, batch, _ = small()
    lam, theta = bl.flatten(generator), bl.flatten(model)
    x, y, _ = batch
    poison = generator(x[:6], y[:6]).detach()
    logits = model(torch.cat([x, poison]))
    by_hand = F.cross_entropy(logits, torch.cat([y, y[:6]])) + 1e-2 * (theta**2).sum()
    assert torch.allclose(problem.inner_loss(lam, theta, batch), by_hand, rtol=1e-12)
    assert 0 < poison.min() and poison.max() < 1


def test_a_batch_says_which_poison_comes_with_it():
    _, generator, _, (x, y, _), _ = small()
    lam, sources = bl.flatten(generator), (x[:6], y[:6])
    inputs = poisoning.with_poison(generator, sources, 0.25)
    index = torch.tensor([7, 13, 2, 22])
    seen, labels = inputs(lam, (x[index], y[index], index))
    assert torch.equal(seen[:4], x[index]) and torch.equal(labels[:4], y[index])
    assert torch.equal(seen[4:], generator(x[1:2], y[1:2]).detach())  # 7 modulo 6
    whole, labels = inputs(lam, (x, y, torch.arange(24)))  # the whole set: each source once
    assert torch.equal(whole[24:], generator(*sources).detach())
    with pytest.raises(ValueError, match="batch: 1 rows with share=0.25 hold no poisoned row"):
        inputs(lam, (x[:1], y[:1], torch.zeros(1, dtype=torch.int64)))


def test_the_hypergradient_is_that_of_the_solved_problem():
    problem, generator, model, batch, valid = small()
    lam, d = bl.flatten(generator), bl.flatten(model).numel()
    theta = solved(problem, lam, batch, d)
    truth = bl.finite_difference_hypergradient(
        problem, lam, solve_inner=lambda lam: solved(problem, lam, batch, d), outer_batch=valid,
        eps=1e-4,
    )  # fmt: skip
    assert truth.norm() > 1e-4

    def apart(solver):
        h = bl.hypergradient(problem, lam, theta, batch, valid, solver)
        return float((h - truth).norm() / truth.norm())

    assert apart(bl.Direct()) < 1e-6
    assert apart(bl.CG(2 * d, tol=1e-14)) < 1e-6
    assert apart(bl.CGNormal(4 * d, tol=1e-14)) < 1e-4
    h = bl.hypergradient(problem, lam, theta, batch, valid, bl.KFAC(1e-6, fisher="exact"))
    assert F.cosine_similarity(h, truth, dim=0) > 0.95 and 0.5 < h.norm() / truth.norm() < 2


def test_the_factors_hold_the_poisoned_rows():
    problem, generator, model, batch, _ = small()
    lam, theta = bl.flatten(generator), bl.flatten(model)
    seen = problem.inner_loss.seen(lam, batch)
    ((A, _),) = kfac_factors(problem.inner_loss, lam, theta, batch, fisher="exact").values()
    rows = torch.cat([seen[0], torch.ones(30, 1).double()], 1)
    assert torch.allclose(A, rows.T @ rows / 30)
    b = torch.randn(theta.numel(), generator=torch.Generator().manual_seed(1)).double()
    mine = bl.KFAC(0.1, fisher="exact").solve(problem, lam, theta, batch, b)[0]
    plain = bl.BilevelProblem(bl.WeightedRisk(model, l2=1e-2), problem.outer_loss)
    theirs = bl.KFAC(0.1, fisher="exact").solve(plain, lam, theta, tuple(seen), b)[0]
    clean = bl.KFAC(0.1, fisher="exact").solve(plain, lam, theta, batch, b)[0]
    assert torch.allclose(mine, theirs, rtol=1e-9)
    assert (mine - clean).norm() > 1e-3 * mine.norm()


def test_the_bounded_outer_loss():
    logits = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(50) % 4
    p = logits.softmax(1)[torch.arange(50), y]
    value = poisoning.not_the_label(logits.requires_grad_(), y)
    assert torch.allclose(value, -(1 - p).log().mean())
    (slope,) = torch.autograd.grad(value, logits)
    assert torch.allclose(50 * slope[torch.arange(50), y], p)
    lost = torch.tensor([[-1000.0, 1000.0]])
    assert poisoning.not_the_label(lost, torch.tensor([0])) == 0  # minus cross-entropy: -2000
    sure = torch.tensor([[1000.0, 0.0]])
    assert poisoning.not_the_label(sure, torch.tensor([0])) == 1000  # where log(1 - p) is -inf


def test_labels_are_flipped_into_labels():
    y = torch.arange(10)
    assert torch.equal(poisoning.flipped(y, 10), torch.arange(9, -1, -1))
    assert torch.equal(poisoning.flipped(poisoning.flipped(y, 10), 10), y)


def test_the_rows_far_from_their_class_mean():
    x = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [30.0], [12.0], [9.0]])
    y = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    means = torch.tensor([1.0, 14.4])
    far = (x[:, 0] - means[y]).abs()
    keep = poisoning.far_from_class_mean(x, y, 0.25)
    assert keep.sum() == 6 and far[~keep].min() >= far[keep].max()
    assert not keep[5]
    assert poisoning.far_from_class_mean(x, y, 0.0).all()


def test_splits_and_sources(float32):
    s = Poisoning.settings(seed=3)
    task = Poisoning.make(s, CPU)
    assert [len(part[1]) for part in (task.train, task.validation, task.tuning)] == [1000, 200, 237]
    rows = {tuple(row.tolist()) for row in task.train[0]}
    assert not any(tuple(row.tolist()) in rows for row in task.validation[0])
    assert all(tuple(row.tolist()) in rows for row in task.sources[0])
    assert len(task.sources[1]) == 30
    leak = Poisoning.make(Poisoning.settings(seed=3, leak=1), CPU)
    assert torch.equal(leak.train[0], task.train[0])
    assert torch.equal(leak.validation[0], task.train[0][:200])
    assert torch.equal(leak.tuning[0], task.tuning[0])
    few = Poisoning.make(Poisoning.settings(seed=3, examples=500), CPU)
    assert torch.equal(few.train[0], task.train[0][:500]) and len(few.sources[1]) == 15
    assert torch.equal(few.validation[0], task.validation[0])


def test_what_is_exported_and_who_trains_on_it(float32):
    task = Poisoning.make(Poisoning.settings(epochs=10, share=0.5), CPU)
    lam = task.lam0 + 0.1
    x, y = task.poison(lam, "generator")
    assert torch.equal(x, predict(task.generator, lam, *task.sources).detach())
    assert torch.equal(y, task.sources[1])
    z, other = task.poison(lam, "flip")
    assert torch.equal(z, task.sources[0]) and torch.equal(other, 9 - task.sources[1])
    assert len(task.poison(lam, "none")[1]) == 0
    noise = task.poison(lam, "noise")[0]
    assert torch.equal(noise, task.poison(lam, "noise")[0]) and 0.45 < noise.mean() < 0.55
    assert not torch.equal(task.start, task.theta0)  # the defender is a fresh one
    clean = task.defended(task.poison(lam, "none"), "none")
    lost = task.defended(task.poison(lam, "flip"), "none")
    assert set(clean) == {"test_accuracy"} and lost["test_accuracy"] < clean["test_accuracy"] - 0.02
    assert task.defended(task.poison(lam, "none"), "none") == clean  # the same numbers again
    with pytest.raises(ValueError, match="defence: got 'prayer', expected one of"):
        task.defended(task.poison(lam, "none"), "prayer")


def test_defences_leave_out_what_they_say(float32):
    task = Poisoning.make(Poisoning.settings(epochs=10, removed=0.05), CPU)
    z, y = task.sources
    outliers = (torch.full_like(z, 5.0), y)  # far from every mean
    assert task.defended(outliers, "distance")["caught"] == 1.0
    flipped = task.poison(task.lam0, "flip")  # a high loss, where every digit has its usual place
    row = task.defended(flipped, "trimmed")
    assert row["caught"] > 0.8 > 51 / 1030 * 4
    assert task.defended(flipped, "none")["caught"] == 0.0


def test_measuring_leaves_the_run_as_it_was(float32):
    s = Poisoning.settings(outer_steps=2)
    task = Poisoning.make(s, CPU)
    method = methods.build(s, task)
    method.step()
    before = method.lam.clone(), method.theta.clone()
    row = task.measure(method.lam, method.theta)
    assert row == task.measure(method.lam, method.theta)
    assert torch.equal(method.lam, before[0]) and torch.equal(method.theta, before[1])
    assert "test_accuracy" not in row  # the test set is looked at once, by the fresh defender


@pytest.mark.parametrize("method", ["aid-identity", "aid-cg", "aid-cg-normal", "aid-kfac", "bome"])
def test_an_attack_lowers_what_it_is_to_lower(method, float32):
    """f at theta that has settled falls, against the generator's start."""
    step = {"aid-identity": 100.0, "bome": 300.0}.get(method, 10.0)
    s = Poisoning.settings(method=method, outer_lr=step, share=0.1, seed=1)
    task = Poisoning.make(s, CPU)
    run = methods.build(s, task)

    def value(lam):
        theta = task.descend(task.both(task.poison(lam, "generator")), task.start, 20)
        return float(task.problem.outer_loss(lam, theta, task.validation))

    for _ in range(40):
        run.step()
    assert value(run.lam) < value(task.lam0) - 0.05


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 0.0}, "share: got 0.0, expected above 0, up to 0.5"),
        ({"share": 0.6}, "share: got 0.6, expected above 0, up to 0.5"),
        ({"attack": "hope"}, "attack: got 'hope'"),
        ({"objective": "minus"}, "objective: got 'minus'"),
        ({"leak": 2}, "leak: got 2, expected 0 or 1"),
        ({"baselines": 7}, "baselines: got 7, expected 0 or 1"),
        ({"examples": 2000}, "examples: got 2000, expected 1 to 1000, or 0 for all"),
        ({"examples": -1}, "examples: got -1"),
        ({"hidden": 0}, "hidden: got 0, expected an integer of at least 1"),
        ({"epochs": 0}, "epochs: got 0, expected an integer of at least 1"),
        ({"removed": 0.7}, "removed: got 0.7, expected from 0 to 0.5"),
        ({"defender_lr": 0.0}, "defender_lr: got 0.0, expected above 0"),
        ({"defender_batch": 0}, "defender_batch: got 0, expected an integer of at least 1"),
        ({"batch_size": 10}, "batch_size: got 10 with share=0.03, so that no row of a batch is"),
        ({"batch_size": 1001}, "batch_size: got 1001, expected 1 to 1000, or 0 for all"),
        ({"outer_batch_size": 201}, "outer_batch_size: got 201, expected 1 to 200"),
        (
            {**dict.fromkeys(SIZES, 100), "leak": 1, "examples": 150, "outer_batch_size": 160},
            "outer_batch_size: got 160, expected 1 to 150",
        ),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Poisoning.settings(**given)


def test_a_run_is_resumed_and_shown(tmp_path, monkeypatch, capsys):
    words = ["run", "poisoning", "--method", "aid-kfac", "--device", "cpu", "--seed", "1"]
    words += ["--set", "outer_steps=6", "evaluate_every=2", "epochs=3", "examples=400"]
    whole, shown = stopped_and_resumed(words, tmp_path, monkeypatch, capsys, bl.AID, at=3)
    assert "clean + aid-kfac" in shown
    assert whole["sizes"] == {"train": 400, "poison": 12, "test": 360}
    assert set(whole["baselines"]) == {"clean", "flip", "noise"}
    assert 0 <= whole["defender"]["trimmed_caught"] <= 1


@pytest.mark.parametrize("model", ["mlp", "lenet", "resnet18"])
def test_other_models_and_coloured_images(model, float32, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    x, y = torch.rand(90, 3072, generator=draws), torch.arange(90) % 10
    tiny = data.Dataset("cifar10", x, y, x[:20], y[:20], 10, (3, 32, 32))
    monkeypatch.setattr(poisoning.data, "load", lambda name: tiny)
    monkeypatch.setattr(poisoning, "SIZES", {"cifar10": (60, 20, 10)})
    size = dict.fromkeys(SIZES, 30)
    more = {"outer_batch_size": 20, "inner_steps": 2, "epochs": 1, "share": 0.1}
    s = Poisoning.settings(dataset="cifar10", model=model, method="aid-kfac", **size, **more)
    task = Poisoning.make(s, CPU)
    method = methods.build(s, task)
    task.refresh(method.theta)
    method.step()
    assert method.lam.isfinite().all() and not torch.equal(method.lam, task.lam0)
    assert task.poison(method.lam, "generator")[0].shape == task.sources[0].shape
    row = task.result(s, method.lam, method.theta)["defender"]
    assert all(math.isfinite(value) for value in row.values())


def test_a_generated_row_of_a_convolution_is_in_its_curvature(float32):
    """The GGN of LeNet on the materialised batch is that of the risk with inputs."""
    draws = torch.Generator().manual_seed(0)
    model = bl.models.lenet((1, 16, 16), 3)
    x, y = torch.rand(20, 1, 16, 16, generator=draws), torch.arange(20) % 3
    generator = poisoning.Generator(256, 3, 4)
    risk = bl.WeightedRisk(model, inputs=poisoning.with_poison(generator, (x[:4], y[:4]), 0.2))
    lam, theta, batch = bl.flatten(generator), bl.flatten(model), (x, y, torch.arange(20))
    v = torch.randn(theta.numel(), generator=draws)
    seen = tuple(risk.seen(lam, batch))
    one = ggn_vp(risk, lam, theta, batch, v)
    other = ggn_vp(bl.WeightedRisk(model), lam, theta, seen, v)
    assert (one - other).norm() < 1e-5 * other.norm()


def test_the_study_covers_the_table(tmp_path, monkeypatch, capsys):
    found = {v.name: v for v in studies.variants("poisoning", "mnist", "linear")}
    assert set(found) == {*poisoning_study.PLAIN, *poisoning_study.SOLVERS} - {"cg-3-ggn"}
    s = Poisoning.settings(**found["tgda"].settings)
    solver = methods.build(s, Poisoning.make(s, torch.device("cpu"))).solver
    assert (solver.iters, solver.damping) == (16, 0) and isinstance(solver, bl.CGNormal)
    inner = {name: Poisoning.settings(**v.settings).inner_steps for name, v in found.items()}
    assert inner["clean"] == inner["kfac"] > inner["flip"] == inner["noise"] == 1
    network = studies.variants("poisoning", "mnist", "mlp")
    assert {v.name for v in network} == {*poisoning_study.PLAIN, *poisoning_study.SOLVERS}
    for name, v in found.items():
        low, high = v.space.get("outer_lr", (1.0, 25.0))
        assert math.isclose(high / low, 25) and bool(v.space) == (name in poisoning_study.SOLVERS)
    words = ["study", "poisoning", "--dataset", "digits", "--device", "cpu", "--seeds", "1"]
    words += ["--trials", "1", "--search-steps", "2", "--outer-steps", "2", "--looks", "1"]
    words += ["--examples", "400", "--only", "clean", "flip", "cg-3"]
    words += ["--out", str(tmp_path / "out")]
    real, ends = Poisoning.outcomes, []
    monkeypatch.setattr(Poisoning, "outcomes", lambda *a: ends.append(a) or real(*a))
    assert main(words) == 0
    assert len(ends) == 3  # of the final runs: a trial is only judged by its log
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "result.json").read_text())
            ["results"]}  # fmt: skip
    (run,) = rows["cg-3"]["runs"]
    assert run["seed"] == 1 and run["sizes"]["train"] == 400
    assert run["sizes"]["poison"] == 12
    assert {"iteration", "tuning_accuracy", "as_trained"} <= set(run["history"][0])
    assert set(rows["clean"]["runs"][0]["defender"]) == {
        "test_accuracy", "distance_test_accuracy", "trimmed_test_accuracy",
    }  # fmt: skip
    assert main(["study", "poisoning", "--dataset", "trec", "--out", str(tmp_path / "no")]) == 1
    assert "--dataset: got 'trec'" in capsys.readouterr().err


def stored_row(method, accuracies, looks):
    """A study's row with two seeds: accuracies by defence, tuning accuracies of the looks."""
    keys = ("test_accuracy", "distance_test_accuracy", "trimmed_test_accuracy")
    runs = [
        {
            "seed": seed,
            "defender": dict(zip(keys, (a - 0.01 * seed for a in accuracies), strict=True)),
            "history": [{"iteration": 10 * k, "tuning_accuracy": v} for k, v in enumerate(looks)],
            "last": {"tuning_accuracy": looks[-1]},
        }
        for seed in (1, 2)
    ]
    return {"method": method, "chosen": {}, "settings": {}, "runs": runs}


def test_points_lost_are_paired_by_seed_and_less_the_undefended_clean_one():
    clean = stored_row("clean", (0.93, 0.92, 0.91), (0.9, 0.9))
    attack = stored_row("kfac", (0.90, 0.91, 0.89), (0.88, 0.85))
    none, distance, trimmed = poisoning_figures.lost(attack, clean)
    assert none == pytest.approx([3, 3]) and distance == pytest.approx([2, 2])
    assert trimmed == pytest.approx([4, 4])
    assert poisoning_figures.lost(clean, clean)[1] == pytest.approx([1, 1])  # the price
    attack["runs"].pop(0)
    assert len(poisoning_figures.lost(attack, clean)[0]) == 1
    steps, points = poisoning_figures.curves(attack, clean)
    assert steps == [0, 10] and points == pytest.approx([2, 5])
    results = [{"kind": "poisoning_study", "results": [clean, attack]}]
    figures = Poisoning.draw({"kind": "poisoning_study", "runs": results})
    assert set(figures) == {""} and len(figures[""].axes) == 2


def test_what_chapter_15_says_of_the_stored_study():
    rows = joined(bl.experiment.stored("poisoning_mnist_linear")["runs"])
    caught = {
        name: [run["defender"]["distance_caught"] for run in rows[name]["runs"]]
        for name in ("kfac", "bome")
    }
    assert min(caught["bome"]) > 0.98 and sum(caught["kfac"]) / 5 == pytest.approx(0.65, abs=0.01)
    assert (min(caught["kfac"]), max(caught["kfac"])) == pytest.approx((0.24, 0.89), abs=0.006)
    left = poisoning_figures.lost(rows["kfac"], rows["clean"])[1]
    assert max(left) == pytest.approx(0.89, abs=0.01)
    assert left.index(max(left)) == caught["kfac"].index(min(caught["kfac"]))
    one, other = (trial["tuning_accuracy"] for trial in rows["kfac"]["trials"])
    assert 100 * abs(one - other) == pytest.approx(0.76, abs=0.01)
    looked = {
        name: sum(run["best"]["tuning_accuracy"] for run in rows[name]["runs"]) / 5
        for name in ("kfac", "cg-3", "bome", "flip")
    }  # in the search's own measure
    for name, lead in (("cg-3", 0.88), ("bome", 0.0), ("flip", 1.75)):
        assert 100 * (looked[name] - looked["kfac"]) == pytest.approx(lead, abs=0.006)
    least = [run["defender"]["test_accuracy"] for run in rows["clean"]["runs"]]
    assert 100 * sum(least) / 5 == pytest.approx(92.27, abs=0.01)
    kfac = torch.tensor(poisoning_figures.lost(rows["kfac"], rows["clean"])[0])
    half = stats.t.ppf(0.975, 4) / 5**0.5
    for name, middle, spread in (
        ("cg-normal-3", 1.27, 0.41), ("cg-3", 0.74, 0.48), ("flip", 0.56, 0.44),
        ("bome", 0.28, 0.44), ("tgda", 0.99, 0.25),
    ):  # fmt: skip
        less = kfac - torch.tensor(poisoning_figures.lost(rows[name], rows["clean"])[0])
        assert float(less.mean()) == pytest.approx(middle, abs=0.006)
        assert float(less.std()) * half == pytest.approx(spread, abs=0.006)
    lost = {k: torch.tensor(poisoning_figures.lost(r, rows["clean"])[0]) for k, r in rows.items()}
    for one, other, middle, spread in (
        ("tgda", "flip", -0.43, 0.25), ("kfac-negative", "kfac", -1.18, 0.34),
    ):  # fmt: skip
        less = lost[one] - lost[other]
        assert float(less.mean()) == pytest.approx(middle, abs=0.006)
        assert float(less.std()) * half == pytest.approx(spread, abs=0.006)
    for name, said in (("tgda", 0.45), ("kfac-negative", 0.25)):
        assert float(lost[name].mean()) == pytest.approx(said, abs=0.006)
    grown = stats.t.ppf(1 - 0.05 / 10, 4) / stats.t.ppf(0.975, 4)  # five comparisons, Bonferroni
    assert grown == pytest.approx(1.66, abs=0.005)
    wide = [round(grown * spread, 2) for spread in (0.248, 0.4106, 0.4805, 0.4412)]
    assert wide == [0.41, 0.68, 0.80, 0.73]
    chosen = {name: [run["best"]["iteration"] for run in row["runs"]] for name, row in rows.items()}
    assert set(chosen["identity"]) == {30, 45}
    assert (min(chosen["kfac"]), max(chosen["kfac"])) == (240, 300)

    def points(name, key):  # lost on the tuning rows at the last look, against the clean row
        pairs = zip(rows["clean"]["runs"], rows[name]["runs"], strict=True)
        return 20 * sum(clean["history"][-1][key] - run["history"][-1][key] for clean, run in pairs)

    for name, own, anew in (("identity", 2.6, 0.3), ("kfac", 3.4, 2.3), ("bome", 6.7, 2.4)):
        assert points(name, "as_trained") == pytest.approx(own, abs=0.05)
        assert points(name, "tuning_accuracy") == pytest.approx(anew, abs=0.05)


def test_chapter_15_on_the_mlp():
    rows = joined(bl.experiment.stored("poisoning_mnist_mlp")["runs"])
    lost = {k: poisoning_figures.lost(row, rows["clean"]) for k, row in rows.items()}
    assert all(len(three[0]) == 3 for three in lost.values())
    attacks = [name for name in lost if name != "clean"]
    assert max(max(lost[name][0]) for name in attacks) == pytest.approx(0.15, abs=0.006)
    for name, said in (("kfac", -0.04), ("bome", -0.02), ("flip", -0.14)):
        assert sum(lost[name][0]) / 3 == pytest.approx(said, abs=0.006)
    assert max(sum(lost[name][0]) / 3 for name in attacks) < 0.1
    prices = [sum(lost["clean"][k]) / 3 for k in (1, 2)]
    assert prices == pytest.approx((0.65, 1.84), abs=0.006)
    base = [run["defender"]["test_accuracy"] for run in rows["clean"]["runs"]]
    assert 100 * sum(base) / 3 == pytest.approx(97.04, abs=0.006)
