"""Unlearnable examples: the equations against truths, the task, its settings, its study."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from together import stopped_and_resumed

import bilevel_lite as bl
from bilevel_lite import data
from bilevel_lite.__main__ import main
from bilevel_lite.experiment import job, methods
from bilevel_lite.experiment.comparing import joined
from bilevel_lite.params import predict
from bilevel_lite.tasks import (
    studies,
    unlearnable,
    unlearnable_figures,
    unlearnable_noise,
    unlearnable_study,
)
from bilevel_lite.tasks.unlearnable import Unlearnable

CPU = torch.device("cpu")


@pytest.fixture
def float32():
    with job.float32():
        yield


def small(seed=0, n=18, outer=None):
    """Three classes in the plane, a linear model, noise of radius 0.3, in float64."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = (torch.rand(n, 2, generator=draws).double() + F.one_hot(y, 3)[:, :2]) / 2
    model = torch.nn.Linear(2, 3).double()

    def inputs(lam, batch):
        return batch[0] + 0.3 * lam[batch[2]], batch[1]

    def wrong(lam, theta, batch):
        return unlearnable_noise.worst_wrong(predict(model, theta, batch[0]), batch[1])

    inner = bl.WeightedRisk(model, l2=0.1, inputs=inputs)
    lam = torch.rand(n, 2, generator=draws).double() - 0.5
    return bl.BilevelProblem(inner, outer or wrong), lam, (x, y, torch.arange(n))


def solved(problem, lam, batch, d=9):
    """theta*(lam) of a strictly convex inner problem, by Newton's method."""
    theta = torch.zeros(d, dtype=lam.dtype)
    for _ in range(12):
        at = theta.clone().requires_grad_()
        (g,) = torch.autograd.grad(problem.inner_loss(lam, at, batch), at)
        H = torch.autograd.functional.hessian(lambda t: problem.inner_loss(lam, t, batch), theta)
        theta = theta - torch.linalg.solve(H, g)
    assert g.norm() < 1e-12
    return theta


def differences(problem, lam, batch):
    return bl.finite_difference_hypergradient(
        problem,
        lam,
        solve_inner=lambda lam: solved(problem, lam, batch),
        outer_batch=batch,
        eps=1e-4,
    )


def apart(one, truth):
    return float((one - truth).norm() / truth.norm())


# -- the equations


def test_the_hypergradient_of_noise_is_that_of_the_solved_problem():
    problem, lam, batch = small()
    truth, theta = differences(problem, lam, batch), solved(problem, lam, batch)
    assert truth.norm() > 1e-3
    assert apart(bl.hypergradient(problem, lam, theta, batch, batch, bl.Direct()), truth) < 1e-6
    assert (
        apart(bl.hypergradient(problem, lam, theta, batch, batch, bl.CG(30, tol=1e-14)), truth)
        < 1e-6
    )
    unrolled = bl.unrolled_hypergradient(
        problem,
        lam,
        torch.zeros(9).double(),
        steps=80,
        lr=1.0,
        inner_batch=batch,
        outer_batch=batch,
    )
    assert apart(unrolled, truth) < 1e-4


def test_by_the_envelope_theorem_the_gradient_in_lam_is_all_where_f_is_g():
    problem, lam, batch = small()
    g = problem.inner_loss
    same = bl.BilevelProblem(g, g)
    theta = solved(same, lam, batch)
    truth = differences(same, lam, batch)
    at = lam.clone().requires_grad_()
    (direct,) = torch.autograd.grad(g(at, theta, batch), at)
    assert apart(direct, truth) < 1e-6
    # away from theta* it is not: the part that is left out is first order in the distance
    off = theta + torch.linspace(-1, 1, 9).double()
    at = lam.clone().requires_grad_()
    (direct,) = torch.autograd.grad(g(at, off, batch), at)
    assert apart(direct, truth) > 0.1


def test_error_minimising_is_a_step_along_that_gradient():
    problem, lam, batch = small()
    g = problem.inner_loss
    method = unlearnable_noise.ErrorMinimising(
        bl.BilevelProblem(g, g),
        lam,
        torch.zeros(9).double(),
        bl.Identity(1.0),
        inner_steps=3,
        inner_lr=0.1,
        outer_lr=0.7,
        inner_batch=batch,
        outer_batch=batch,
    )
    info = method.step()
    at = lam.clone().requires_grad_()
    (direct,) = torch.autograd.grad(g(at, method.theta, batch), at)
    assert torch.allclose(info.hypergradient, direct, rtol=1e-12)
    assert torch.allclose(method.lam, lam - 0.7 * direct, rtol=1e-12)
    assert info.gradients == 4  # three inner steps, one in lam
    assert "ErrorMinimising" not in bl.algorithms.METHODS


def test_the_rows_of_a_batch_are_all_that_its_hypergradient_touches():
    problem, lam, (x, y, index) = small()
    rows = torch.tensor([4, 7, 8, 15, 0, 11])
    batch, theta = (
        (x[rows], y[rows], rows),
        torch.randn(9, generator=torch.Generator().manual_seed(1)).double(),
    )
    whole = bl.hypergradient(problem, lam, theta, batch, batch, bl.Direct(0.1))
    assert torch.equal(whole[~torch.isin(index, rows)], torch.zeros(12, 2).double())
    own = (x[rows], y[rows], torch.arange(6))
    few = bl.hypergradient(problem, lam[rows], theta, own, own, bl.Direct(0.1))
    assert torch.allclose(whole[rows], few, rtol=1e-12) and few.abs().min() > 0


def test_the_worst_wrong_label_in_closed_form():
    draws = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(40, 5, generator=draws).double()
    y = torch.arange(40) % 5
    each = torch.stack(
        [F.cross_entropy(z, torch.full((40,), c), reduction="none") for c in range(5)]
    )
    each[y, torch.arange(40)] = -math.inf
    assert torch.allclose(unlearnable_noise.worst_wrong(z, y), each.amax(0).mean(), rtol=1e-12)
    assert unlearnable_noise.worst_wrong(z, y) > math.log(4)
    least = torch.zeros(1, 5).double()
    least[0, 2] = -800
    assert torch.allclose(
        unlearnable_noise.worst_wrong(least, torch.tensor([2])), torch.tensor(4.0).double().log()
    )


def test_the_box_is_the_radius_and_the_range_of_a_pixel():
    x, r = torch.tensor([0.0, 0.01, 0.5, 0.98, 1.0]).double(), 8 / 255
    low, high = unlearnable_noise.limits(x, r)
    pixels = x + r * torch.stack([low, high])
    assert torch.allclose(pixels[0], (x - r).clamp(min=0)) and torch.allclose(
        pixels[1], (x + r).clamp(max=1)
    )


@pytest.mark.parametrize(("shape", "depth"), [((1, 8, 8), 3), ((1, 28, 28), 2), ((3, 32, 32), 3)])
def test_a_u_net_keeps_to_the_box_and_to_its_image(shape, depth):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = unlearnable_noise.UNet(shape, 2, 25 / 255)
    assert len(net.up) == depth
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    noise = net(x)
    low, high = unlearnable_noise.limits(x, 25 / 255)
    assert noise.shape == x.shape and (noise >= low).all() and (noise <= high).all()
    assert torch.allclose(noise[2:3], net(x[2:3]), atol=1e-6)  # whoever shares its batch
    far = unlearnable_noise.UNet(shape, 2, 25 / 255)
    with torch.no_grad():
        for p in far.parameters():
            p.mul_(50)
    assert (x + 25 / 255 * far(x)).min() >= -1e-6 and (x + 25 / 255 * far(x)).max() <= 1 + 1e-6


def test_the_probe_reads_noise_that_is_the_label_and_no_other():
    draws = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    means = torch.randn(4, 30, generator=draws)
    told = 1e-3 * (means[y] + 0.3 * torch.randn(400, 30, generator=draws))
    assert unlearnable_noise.probe(told, y) > 0.95
    assert unlearnable_noise.probe(torch.randn(400, 30, generator=draws), y) < 0.4


def test_jpeg_keeps_what_is_coarse():
    x = torch.full((1, 3, 32, 32), 0.3)
    x[..., 16:] = 0.7  # two flat halves, each of whole blocks
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2 - 1
    fine = data.jpeg(x + 8 / 255 * board, 10)
    assert (fine - x).abs().max() < 0.02  # the board is gone, the halves are there
    assert (data.jpeg(x + 8 / 255 * board, 95) - x).abs().mean() > 0.02
    assert data.jpeg(x[:, :1], 50).shape == (1, 1, 32, 32)
    assert torch.allclose(255 * fine, (255 * fine).round(), atol=1e-4)


def test_jpeg_leaves_every_flat_grey_as_it_is():
    for off in (-0.4, 0.0, 0.4):  # to the nearest of 256 levels
        levels = torch.arange(1, 255)
        flat = ((levels + off) / 255)[:, None, None, None].expand(-1, 1, 8, 8)
        assert torch.equal((255 * data.jpeg(flat, 95)).round()[:, 0, 0, 0], levels.float())


@pytest.mark.parametrize(
    ("x", "quality", "message"),
    [
        (torch.rand(3, 3072), 10, r"x: got shape \(3, 3072\), expected images"),
        (torch.rand(3, 2, 8, 8), 10, r"x: got shape \(3, 2, 8, 8\), expected images"),
        (torch.rand(3, 3, 8, 8), 96, "quality: got 96, expected a whole number from 1 to 95"),
        (torch.rand(3, 3, 8, 8), 9.5, "quality: got 9.5, expected a whole number"),
        (2 + torch.rand(3, 3, 8, 8), 10, "x: has pixels from 2"),
    ],
)
def test_what_is_no_jpeg_is_refused(x, quality, message):
    with pytest.raises(ValueError, match=message):
        data.jpeg(x, quality)


# -- the task


@pytest.mark.parametrize("method", ["aid-identity", "aid-cg", "aid-kfac", "bome"])
def test_a_step_moves_the_rows_of_its_batch(method, float32):
    s = Unlearnable.settings(method=method, radius=25, inner_steps=2)
    task = Unlearnable.make(s, CPU)
    run = task.method(s)
    run.step()
    moved = run.lam.abs().sum(1) > 0
    assert moved.sum() == 100 or method == "bome" and not moved.any()  # its multiplier may be 0
    low, high = unlearnable_noise.limits(task.train[0], task.radius)
    steps = run.lam[(run.lam > low) & (run.lam < high)].abs() / 0.2
    assert torch.allclose(steps, steps.round()) and steps.max() <= 1  # signs, of 0.2 radii
    for _ in range(40):  # four passes
        run.step()
    assert method == "bome" or (run.lam.abs().sum(1) > 0).all()
    assert run.lam.abs().sum() > 0
    assert (run.lam >= low).all() and (run.lam <= high).all()


def test_the_state_of_rows_is_a_copy_and_goes_on_from_there(float32):
    s = Unlearnable.settings(method="aid-identity", inner_steps=2)
    task = Unlearnable.make(s, CPU)
    run, twin = task.method(s), task.method(s)
    run.step()
    state, lam = run.state_dict(), run.lam.clone()
    run.step()
    assert torch.equal(state["lam"], lam) and not torch.equal(run.lam, lam)
    twin.load_state_dict(state)
    twin.step()
    assert torch.equal(twin.lam, run.lam) and torch.equal(twin.theta, run.theta)


def test_published_noise_is_as_large_as_lam_says(float32):
    s = Unlearnable.settings(radius=200, images=100, victim_batch=50, batch_size=100)
    task = Unlearnable.make(s, CPU)
    black = task.train[0] == 0
    for share in (0.25, 0.5, 1.0):
        noise = task.perturbed(torch.full_like(task.train[0], share), "bilevel") - task.train[0]
        assert torch.allclose(noise[black], torch.tensor(share * 200 / 255))


def test_rows_are_the_method_on_all_of_lam(float32):
    """One batch as large as the set: the same as the plain method with lam as it is."""
    sizes = dict.fromkeys(("batch_size", *unlearnable.SIZES_OF_ROWS), 200)
    s = Unlearnable.settings(method="aid-cg", images=200, inner_steps=3, radius=25, **sizes)
    task = Unlearnable.make(s, CPU)
    rows, plain = task.method(s), methods.build(s, task)
    plain.projection = lambda lam: lam.clamp(*unlearnable_noise.limits(task.train[0], task.radius))
    for _ in range(4):
        rows.step()
        plain.step()
    assert torch.allclose(rows.theta, plain.theta, atol=1e-5)
    assert (rows.lam - plain.lam).abs().gt(1e-3).float().mean() < 0.01  # signs of tiny numbers


@pytest.mark.parametrize("attack", ["min-min", "bilevel"])
def test_noise_protects(attack, float32):
    s = Unlearnable.settings(attack=attack, radius=128, method="aid-cg", epochs=20, images=500)
    task = Unlearnable.make(s, CPU)
    run = task.method(s)
    for _ in range(40):
        run.step()
    mine, clean = task.judged(run.lam, attack), task.judged(run.lam, "none")
    assert mine["none"] < clean["none"] - 0.05
    assert set(clean) == {"none", "augment", "jpeg", "train"} and "probe" in mine
    assert mine == task.judged(run.lam, attack)


def test_what_is_exported(float32):
    s = Unlearnable.settings(radius=25, images=300)
    task = Unlearnable.make(s, CPU)
    x = task.train[0]
    assert torch.equal(task.perturbed(task.lam0, "none"), x)
    noise = task.perturbed(task.lam0, "random") - x
    assert torch.equal(task.perturbed(task.lam0, "random") - x, noise)
    assert noise.abs().max() <= 25 / 255 + 1e-6
    inside = (x > 0.1) & (x < 0.9)
    assert torch.allclose(noise[inside].abs(), torch.tensor(25 / 255), atol=1e-6)
    lam = torch.full_like(x, 0.31)
    steps = 255 * (task.perturbed(lam, "bilevel") - x)[inside]
    assert torch.allclose(steps, torch.tensor(8.0), atol=1e-3)  # 7.75, in 8 bits
    with pytest.raises(ValueError, match="attack: got 'hope', expected one of"):
        task.judged(task.lam0, "hope")


def test_measuring_leaves_the_run_as_it_was(float32):
    s = Unlearnable.settings(look_steps=10, images=200)
    task = Unlearnable.make(s, CPU)
    run = task.method(s)
    run.step()
    before = run.lam.clone(), run.theta.clone()
    row = task.measure(run.lam, run.theta)
    assert row == task.measure(run.lam, run.theta)
    assert torch.equal(run.lam, before[0]) and torch.equal(run.theta, before[1])
    assert not any(name.startswith("test") for name in row)


def coloured(monkeypatch, n=90):
    draws = torch.Generator().manual_seed(0)
    x, y = torch.rand(n, 3072, generator=draws), torch.arange(n) % 10
    tiny = data.Dataset("cifar10", x, y, x[:20], y[:20], 10, (3, 32, 32))
    monkeypatch.setattr(unlearnable.data, "load", lambda name: tiny)
    monkeypatch.setattr(unlearnable, "SIZES", {"cifar10": (60, 20, 10)})
    sizes = dict.fromkeys(("batch_size", *unlearnable.SIZES_OF_ROWS), 20)
    return {
        "dataset": "cifar10",
        **sizes,
        "images": 60,
        "inner_steps": 2,
        "epochs": 1,
        "victim_batch": 20,
        "look_steps": 2,
    }


@pytest.mark.parametrize(
    ("attack", "noise", "victim"),
    [
        ("min-min", "rows", "resnet32"),
        ("bilevel", "rows", ""),
        ("min-min", "generator", ""),
        ("bilevel", "generator", ""),
    ],
)
def test_images_of_colours_and_another_victim(attack, noise, victim, float32, monkeypatch):
    given = coloured(monkeypatch)
    s = Unlearnable.settings(**given, attack=attack, noise=noise, width=2, victim=victim)
    task = Unlearnable.make(s, CPU)
    run = task.method(s)
    before = run.lam.clone()
    run.step()
    assert run.lam.isfinite().all() and not torch.equal(run.lam, before)
    row = task.result(s, run.lam, run.theta)["victims"]
    assert all(math.isfinite(value) for value in row.values())


def test_the_generator_is_trained_as_any_lam(float32, monkeypatch):
    given = coloured(monkeypatch)
    s = Unlearnable.settings(**given, method="bome", noise="generator", width=2)
    task = Unlearnable.make(s, CPU)
    run = task.method(s)
    assert isinstance(run, bl.BOME) and run.lam.shape == bl.flatten(task.generator).shape
    run.step()
    assert run.lam.isfinite().all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"radius": 0}, "radius: got 0, expected from 1 to 255"),
        ({"radius": 300.0}, "radius: got 300.0"),
        ({"attack": "hope"}, "attack: got 'hope'"),
        ({"noise": "fog"}, "noise: got 'fog'"),
        ({"victim": "me"}, "victim: got 'me'"),
        ({"victim": "lenet"}, "victim: got 'lenet' with model='linear'; expected both"),
        ({"noise": "generator"}, "noise: got 'generator' with model='linear', which takes vectors"),
        ({"width": 0}, "width: got 0, expected an integer of at least 1"),
        ({"images": 2000}, "images: got 2000, expected 1 to 1000, or 0 for all"),
        ({"quality": 99}, "quality: got 99, expected from 1 to 95"),
        ({"epochs": 0}, "epochs: got 0, expected an integer of at least 1"),
        ({"look_steps": 0}, "look_steps: got 0, expected an integer of at least 1"),
        ({"victim_lr": 0.0}, "victim_lr: got 0.0, expected above 0"),
        ({"victim_batch": 1001}, "victim_batch: got 1001, expected 1 to 1000"),
        ({"l2": -1.0}, "l2: got -1.0, expected at least 0"),
        ({"batch_size": 1001}, "batch_size: got 1001, expected 1 to 1000, or 0 for all"),
        ({"method": "soba"}, "method: got 'soba' with noise='rows', where each step has other"),
        ({"outer_optimizer": "adam"}, "outer_optimizer: got 'adam' with outer_momentum=0 and"),
        ({"outer_momentum": 0.5}, "outer_optimizer: got 'sign' with outer_momentum=0.5 and"),
        ({"cross_batch_size": 50}, "cross_batch_size: got outer_batch_size=100, curvature_batch"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Unlearnable.settings(**given)


# -- runs and the study


@pytest.mark.parametrize("attack", ["min-min", "bilevel"])
def test_a_run_is_resumed_and_shown(attack, tmp_path, monkeypatch, capsys):
    words = ["run", "unlearnable", "--method", "aid-kfac", "--device", "cpu", "--seed", "1"]
    words += ["--set", "outer_steps=6", "evaluate_every=2", "epochs=3", "images=400"]
    words += [f"attack={attack}", "look_steps=5"]
    whole, shown = stopped_and_resumed(words, tmp_path, monkeypatch, capsys, bl.AID, at=3)
    assert ("aid-kfac " in shown) == (attack == "bilevel") and "chance is 10 %" in shown
    assert whole["sizes"] == {"train": 400, "test": 360}
    assert set(whole["baselines"]) == {"clean", "random"}
    assert set(whole["victims"]) == {"none", "augment", "jpeg", "train", "probe"}


def test_the_study_covers_the_table(tmp_path, capsys):
    names = {v.name for v in studies.variants("unlearnable", "cifar10", "lenet")}
    assert names == {
        "clean", "generator-em-25", "generator-kfac-25",
        *(f"{name}-{radius}" for name in ("random", *unlearnable_study.ROWS) for radius in (8, 25)),
    }  # fmt: skip
    assert not any(v.space for v in studies.variants("unlearnable", "cifar10", "lenet"))
    flat = {v.name for v in studies.variants("unlearnable", "digits", "linear")}
    assert flat == {name for name in names if not name.startswith("generator")}
    words = ["study", "unlearnable", "--dataset", "digits", "--model", "linear", "--device", "cpu"]
    words += ["--seeds", "1", "--final-budget", "40", "--images", "300"]
    words += ["--only", "clean", "em-25", "kfac-25", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {row["method"]: row for row in result["results"]}
    (run,) = rows["em-25"]["runs"]
    assert run["seed"] == 1 and run["sizes"]["train"] == 300
    assert set(run["victims"]) == {"none", "augment", "jpeg", "train", "probe"}
    assert "probe" not in rows["clean"]["runs"][0]["victims"]
    spent = [row["runs"][0]["history"][-1]["gradients"] for row in (rows["em-25"], rows["kfac-25"])]
    assert all(40 <= gradients < 60 for gradients in spent)
    assert main(["study", "unlearnable", "--dataset", "trec", "--out", str(tmp_path / "no")]) == 1
    assert "--dataset: got 'trec'" in capsys.readouterr().err


def test_accuracies_are_by_victim_and_seed():
    def row(method, *seeds):
        runs = [
            {"seed": k, "victims": {"none": v, "augment": v, "jpeg": v + 0.1, "train": 1.0, **more}}
            for k, v, more in seeds
        ]
        return {"method": method, "chosen": {}, "settings": {}, "runs": runs}

    read = {"probe": 0.9}
    em = row("em-25", (2, 0.2, read), (1, 0.3, read))
    found = unlearnable_figures.accuracies(em)
    assert found["none"] == pytest.approx([30, 20]) and found["probe"] == pytest.approx([90, 90])
    clean = row("clean", (1, 0.5, {}), (2, 0.5, {}))
    assert "probe" not in unlearnable_figures.accuracies(clean)
    results = [clean, em, row("em-8", (1, 0.4, read))]
    stored = {
        "kind": "unlearnable_study",
        "runs": [{"kind": "unlearnable_study", "results": results}],
    }
    figures = Unlearnable.draw(stored)
    assert set(figures) == {""} and len(figures[""].axes) == 2


def test_what_chapter_16_says_of_the_stored_study():
    rows = joined(bl.experiment.stored("unlearnable_cifar10_lenet")["runs"])
    found = {name: unlearnable_figures.accuracies(row) for name, row in rows.items()}
    bilevel = ("kfac-25", "cg-3-25", "identity-25", "bome-25")
    for seed in (0, 1):  # EM first on both
        assert found["em-25"]["none"][seed] < min(found[k]["none"][seed] for k in bilevel) - 5
    one, other = found["kfac-25"]["none"]
    assert abs(one - other) == pytest.approx(11.5, abs=0.1)

    def lost(name, kind="none"):
        pairs = zip(found["clean"][kind], found[name][kind], strict=True)
        return sum(clean - mine for clean, mine in pairs) / 2

    points = {"em-25": 21.8, "kfac-25": 9.3, "identity-25": 7.2, "cg-3-25": 5.1, "bome-25": 3.2}
    assert {name: lost(name) for name in points} == pytest.approx(points, abs=0.06)
    assert lost("em-25", "augment") == pytest.approx(16.8, abs=0.06)
    assert lost("em-25", "jpeg") == pytest.approx(12.9, abs=0.06)
    assert max(lost(name, "augment") for name in bilevel) < 3
    assert [max(bilevel, key=lambda k: -found[k]["none"][seed]) for seed in (0, 1)] == [
        "cg-3-25", "kfac-25",
    ]  # fmt: skip
    pairs = zip(found["clean"]["augment"], found["em-8"]["augment"], strict=True)
    assert sorted(c - x for c, x in pairs) == pytest.approx([4.2, 13.8], abs=0.06)
    assert sorted(found["random-8"]["augment"]) == pytest.approx([37.9, 44.5], abs=0.06)
    probes = [
        sum(found[f"{name[:-3]}-{radius}"]["probe"]) / 2 for name in bilevel for radius in (8, 25)
    ]
    assert (min(probes), max(probes)) == pytest.approx((50.3, 70.6), abs=0.06)
    steps = {name: row["runs"][0]["history"][-1]["iteration"] / 10 for name, row in rows.items()}
    visits = {"cg-3-25": 5, "kfac-25": 7, "identity-25": 8, "em-25": 9, "bome-25": 20}
    assert all(round(steps[name]) == count for name, count in visits.items())
    for kind, points in (("none", 16.0), ("augment", 9.0), ("jpeg", 1.9)):
        assert lost("em-8", kind) == pytest.approx(points, abs=0.06)
    for name in ("generator-em-25", "generator-kfac-25"):
        assert lost(name) < 2
    ends = {name: [run["last"]["inner_loss"] for run in row["runs"]] for name, row in rows.items()}
    for name, at in (("kfac-25", (1.9, 0.1)), ("identity-25", (1.3, 0.1)), ("bome-25", (2.3, 2.3))):
        assert ends[name] == pytest.approx(at, abs=0.06)
    assert ends["identity-8"][1] == pytest.approx(0.14, abs=0.005)
    assert ends["bome-8"] == pytest.approx((1.57, 2.03), abs=0.006)
    second = found["clean"]["none"][1] - found["identity-8"]["none"][1]
    assert second == pytest.approx(2.7, abs=0.06)
    assert lost("bome-8") > max(lost(f"{name}-8") for name in ("kfac", "cg-3", "identity"))
    apart = [abs(one - other) for one, other in found["clean"].values() if one != 100]
    assert max(apart) == pytest.approx(2.6, abs=0.05)


def test_what_chapter_16_says_of_the_large_study():
    rows = joined(bl.experiment.stored("unlearnable_cifar10_lenet_10000")["runs"])
    found = {name: unlearnable_figures.accuracies(row) for name, row in rows.items()}
    assert found["clean"]["none"] == pytest.approx([49.9, 45.3], abs=0.06)

    def off(name, kind):
        return [c - x for c, x in zip(found["clean"][kind], found[name][kind], strict=True)]

    for name, each, augmented, stored_again in (
        ("em-25", (30.1, 27.7), 25.9, 17.7), ("kfac-25", (17.2, 7.5), 5.2, 5.1),
        ("cg-3-25", (16.3, 2.6), 4.3, 4.2), ("identity-25", (13.3, 7.4), 4.8, 6.7),
        ("bome-25", (7.2, 2.6), 2.0, 3.4), ("random-25", (2.3, -1.1), 4.1, -0.3),
    ):  # fmt: skip
        assert off(name, "none") == pytest.approx(each, abs=0.06), name
        for kind, points in (("augment", augmented), ("jpeg", stored_again)):
            assert sum(off(name, kind)) / 2 == pytest.approx(points, abs=0.06), (name, kind)
    for kind, each, share in (("augment", (17, 4), 10), ("jpeg", (33, 45), 39)):
        plain, after = off("em-25", "none"), off("em-25", kind)
        back = [100 * (1 - b / a) for a, b in zip(plain, after, strict=True)]
        assert back == pytest.approx(each, abs=0.6)
        assert 100 * (1 - sum(after) / sum(plain)) == pytest.approx(share, abs=0.6)
    kfac = found["kfac-25"]["none"]
    for name, less in (("cg-3", (0.9, 4.9)), ("identity", (3.9, 0.1)), ("bome", (10.0, 4.9))):
        ahead = [x - k for x, k in zip(found[f"{name}-25"]["none"], kfac, strict=True)]
        assert ahead == pytest.approx(less, abs=0.06), name
    lead = [k - x for x, k in zip(found["em-25"]["none"], kfac, strict=True)]
    assert lead == pytest.approx([12.9, 20.2], abs=0.06)  # KFAC is the best of the others
    ends = {name: [run["last"]["inner_loss"] for run in row["runs"]] for name, row in rows.items()}
    fitted = [g for name in ("em-25", "kfac-25", "cg-3-25", "identity-25") for g in ends[name]]
    assert max(fitted) == pytest.approx(0.17, abs=0.005)
    assert ends["bome-25"] == pytest.approx([1.0, 1.1], abs=0.05)
    probes = [p for name in ("kfac", "cg-3", "identity") for p in found[f"{name}-25"]["probe"]]
    assert 51.5 < min(probes) < max(probes) < 74.5
    means = [sum(found[f"{k}-25"]["probe"]) / 2 for k in ("kfac", "cg-3", "identity", "bome")]
    assert (min(means), max(means)) == pytest.approx((40.8, 67.8), abs=0.06)


def test_a_sign_step_goes_down_by_its_size_in_every_number():
    p, still = (torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0])) for _ in range(2))
    optimizer = methods.Sign([p, still], lr=0.25)
    p.grad = torch.tensor([4.0, -1e-6, 0.0])
    optimizer.step()
    assert torch.equal(p.detach(), torch.tensor([0.75, 2.25, 3.0]))
    assert torch.equal(still.detach(), torch.tensor([1.0, 2.0, 3.0]))
