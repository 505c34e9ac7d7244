"""The study of schedules: greedy steps against their derivatives, equal cost, resuming."""

import json
from pathlib import Path
from statistics import mean

import pytest
import torch
from together import stopped_and_resumed
from words import main

import bilevel_lite as bl
from bilevel_lite.experiment import job
from bilevel_lite.experiment.comparing import joined
from bilevel_lite.experiment.supervised import evaluate
from bilevel_lite.products import theta_gradient
from bilevel_lite.refuse import NotFinite
from bilevel_lite.tasks import schedules_figures, schedules_ways, studies
from bilevel_lite.tasks.greedy import HypergradientDescent, Preconditioned
from bilevel_lite.tasks.schedules import Schedules
from bilevel_lite.tasks.schedules_figures import fresh

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent
TINY = {"inner_steps": 12, "images": 200, "held": 100, "outer_steps": 3, "fresh": 2}


@pytest.fixture
def float32():
    with job.float32():
        yield


@pytest.mark.parametrize("way", ["learned", "constant"])
def test_the_inner_problem_has_the_decay_that_the_steps_follow(way, float32):
    s = Schedules.settings(dataset="digits", way=way, **TINY)
    task = Schedules.make(s, CPU)
    lam, batch = torch.full_like(task.lam0, 0.8), task.train
    theta = task.theta0 + 0.1
    q = theta_gradient(task.plain.inner_loss, lam, theta, batch)[1]
    decayed = theta_gradient(task.problem.inner_loss, lam, theta, batch)[1]
    decay = 1e-5 * 1000**0.8  # the box of decays ends at 1e-2
    assert torch.allclose(decayed - q, decay * theta, rtol=1e-3, atol=1e-7)


# -- greedy steps


A = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.3], [0.1, 0.3, 3.0]]).double()


def test_the_rate_moves_along_the_derivative_of_the_next_loss():
    theta, meta = torch.tensor([1.0, -2.0, 0.5]).double(), 0.3
    update = HypergradientDescent(lr=0.1, momentum=0.9, weight_decay=0.2, meta=meta)
    state = update.start(theta)
    moved, state = update.step(theta, state, A @ theta, None, 0)
    again, state = update.step(moved, state, A @ moved, None, 1)
    rate = torch.tensor(0.1).double().requires_grad_()
    next_theta = theta - rate * (A @ theta + 0.2 * theta)
    (slope,) = torch.autograd.grad(next_theta @ A @ next_theta / 2, rate)
    lr = 0.1 - meta * float(slope)
    assert float(state[1]) == pytest.approx(lr, rel=1e-12)
    u = 0.9 * (A @ theta + 0.2 * theta) + A @ moved + 0.2 * moved
    assert torch.allclose(again, moved - lr * u, rtol=1e-12)


def test_a_rate_is_never_negative():
    update = HypergradientDescent(lr=0.1, meta=10.0)
    theta, q = torch.ones(1), torch.ones(1)
    state = update.start(theta)
    _, state = update.step(theta, state, q, None, 0)
    _, (_, lr) = update.step(theta, state, -q, None, 1)
    assert float(lr) == 0


def test_the_matrix_moves_along_the_derivative_of_the_next_loss():
    draws = torch.Generator().manual_seed(0)
    shapes, theta = ((2, 3), (2,)), torch.randn(8, generator=draws).double()
    B = torch.randn(8, 8, generator=draws).double()
    B = B @ B.T / 8
    update = Preconditioned(lr=0.05, momentum=0.8, weight_decay=0.1, meta=0.4, shapes=shapes)
    state = update.start(theta)
    moved, state = update.step(theta, state, B @ theta, None, 0)
    u = B @ theta + 0.1 * theta
    assert torch.allclose(moved, theta - 0.05 * u, rtol=1e-12)  # M_0 = I
    eyes = [torch.eye(2).double().requires_grad_() for _ in shapes]
    parts = [
        (M @ M.T @ part.view(2, -1)).flatten()
        for M, part in zip(eyes, u.split([6, 2]), strict=True)
    ]
    ahead = theta - 0.05 * torch.cat(parts)
    slopes = torch.autograd.grad(ahead @ B @ ahead / 2, eyes)
    again, state = update.step(moved, state, B @ moved, None, 1)
    for M, slope in zip(state[1:], slopes, strict=True):
        assert slope.norm() > 1e-3
        assert torch.allclose(M, torch.eye(2).double() - 0.4 * slope, rtol=1e-10)
    new = 0.8 * u + B @ moved + 0.1 * moved
    step = [
        (M @ M.T @ v.view(2, -1)).flatten()
        for M, v in zip(state[1:], new.split([6, 2]), strict=True)
    ]
    assert torch.allclose(again, moved - 0.05 * torch.cat(step), rtol=1e-12)


def test_bad_greedy_steps_are_refused():
    with pytest.raises(ValueError, match="meta: got 0, expected a positive number"):
        HypergradientDescent(lr=0.1, meta=0)
    with pytest.raises(ValueError, match=r"shapes: got \(\(2, 2\),\), expected those of all 5"):
        Preconditioned(lr=0.1, shapes=((2, 2),)).start(torch.zeros(5))


# -- ways


def courses(way, lam, steps=10):
    step = schedules_ways.update(way, 3, torch.tensor(lam), steps, ((1,),))
    return [step.at("lr", None, t) for t in range(steps)], step


def test_rates_are_on_the_scale_that_is_said():
    middle = schedules_ways.values("greedy", 3, torch.full((4,), 0.5).double())
    expected = {
        "lr": 0.03,
        "momentum": 1 - 0.02**0.5,
        "weight_decay": 1e-3**0.5 * 1e-2,
        "meta": 1e-5,
    }
    assert {k: float(v) for k, v in middle.items()} == pytest.approx(expected, rel=1e-12)
    for end, at in ((0, 0.0), (1, 1.0)):
        lam = torch.full((3,), at).double()
        ends = schedules_ways.values("constant", 3, lam)
        for name, box in schedules_ways.BOX.items():
            assert float(ends[name]) == pytest.approx(box[end], abs=1e-12)


def test_the_shapes_of_the_schedules():
    for way, shares in {
        "constant": [1] * 10,
        "steps": [1] * 8 + [0.1, 0.01],
        "cosine": [
            float(1 + torch.cos(torch.tensor(torch.pi * t / 10).double())) / 2 for t in range(10)
        ],
    }.items():
        course, step = courses(way, [0.5, 0.0, 0.0])
        assert course == pytest.approx([0.03 * share for share in shares], rel=1e-6), way
        assert step.momentum == pytest.approx(0, abs=1e-7)
        assert step.weight_decay == pytest.approx(1e-5, rel=1e-6)
    for way in ("free", "learned"):
        course, step = courses(way, [0.0, 0.5, 1.0, 1.0, 1.0])
        rates = [0.003] * 4 + [0.03] * 3 + [0.3] * 3  # floor(3 t / 10)
        assert course == pytest.approx(rates, rel=1e-6), way
        assert step.momentum == pytest.approx(0.98) and step.weight_decay == pytest.approx(0.01)


@pytest.mark.parametrize("windows", [1, 2, 3, 5])
def test_the_cost_is_what_the_package_counts(windows, float32):
    s = Schedules.settings(**TINY, windows=windows)
    method = Schedules.make(s, CPU).method(s)
    for k in range(1, 4):
        assert method.step().gradients == k * schedules_ways.cost(windows, 12)


@pytest.mark.parametrize("way", schedules_ways.WAYS[1:])
def test_a_search_spends_no_more_than_forward_mode_and_less_by_a_training_at_most(way, float32):
    s = Schedules.settings(**TINY, way=way)
    task = Schedules.make(s, CPU)
    method, real, trained = task.method(s), task.training, []

    def counted(s, lam, number):
        trained.append((lam, number))
        return real(s, lam, number)

    task.training = counted
    for k in range(1, 4):
        info, allowed = method.step(), k * schedules_ways.cost(3, 12)
        assert allowed - 12 < info.gradients <= allowed
        assert info.gradients == 12 * len(trained)
    assert torch.equal(trained[0][0], torch.full_like(task.lam0, 0.5))
    # the best of its own trials, each done anew
    losses = []
    for lam, number in trained:
        losses.append(evaluate(task.model, real(s, lam, number)[0], task.validation)["loss"])
    best = min(range(len(losses)), key=losses.__getitem__)
    assert task.judge(method.lam, method.theta) == losses[best]
    assert torch.equal(method.lam, trained[best][0])
    assert len({number for _, number in trained}) == len(trained)


def test_a_trial_that_diverges_is_lost_alone(float32):
    s = Schedules.settings(**TINY, way="constant")
    task = Schedules.make(s, CPU)
    method, real, lost = task.method(s), task.training, []

    def training(s, lam, number):
        if number in (0, 2):
            lost.append(number)
            raise NotFinite("loss: value is nan")
        return real(s, lam, number)

    task.training = training
    info = method.step()
    assert lost == [0, 2] and method.trained == info.gradients / 12 > 3
    assert float(info.outer_loss) == method.lowest == task.judge(method.lam, method.theta)
    assert not torch.equal(method.lam, torch.full_like(method.lam, 0.5))  # the lost first one


def test_learned_rates_move_by_the_sign_of_differences(float32):
    s = Schedules.settings(**{**TINY, "inner_steps": 30, "start": 0.5})
    torch.set_default_dtype(torch.float64)
    task = Schedules.make(s, CPU)
    method = task.method(s)
    at = method.lam.clone()
    info = method.step()
    assert torch.equal(method.lam, at)  # what is reported was trained with these
    assert float(info.outer_loss) == pytest.approx(task.judge(method.lam, method.theta))

    def phi(lam):
        theta, _, _ = task.training(s, lam, 0)
        return float(task.plain.outer_loss(lam, theta, task.validation).detach())

    eps = 1e-5
    slopes = [(phi(at + e) - phi(at - e)) / (2 * eps) for e in eps * torch.eye(5)]
    signs = torch.tensor(slopes).sign()
    method.step()
    assert torch.allclose(method.lam, (at - s.outer_lr * signs).clamp(0, 1))
    # and the derivative in the rates is that in lam by the chain rule
    values = [schedules_ways.values("learned", 3, at + e) for e in (eps, -eps)]
    chain = [float(a - b) / (2 * eps) for a, b in zip(*(v.values() for v in values), strict=True)]
    h = [slope / factor for slope, factor in zip(slopes, chain, strict=True)]
    assert info.hypergradient.tolist() == pytest.approx(h, rel=1e-4)


def test_all_ways_begin_their_trainings_alike_and_fresh_ones_elsewhere(float32):
    starts = []
    for way in ("learned", "cosine", "greedy"):
        s = Schedules.settings(**TINY, way=way)
        task = Schedules.make(s, CPU)
        theta, batches = task.begin(s, 4)
        starts.append((theta, batches.draw()[2], task.train[1], task.validation[1]))
    for other in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], other, strict=True))
    theta, _ = task.begin(s, 5)
    assert not torch.equal(theta, starts[0][0])
    used = []
    real = task.begin
    task.begin = lambda s, number: (used.append(number), real(s, number))[1]
    task.result(s, task.lam0, task.theta0)
    assert len(set(used)) == 2 and min(used) > 10_000


def test_what_an_implicit_method_sees_is_the_decay_alone(float32):
    s = Schedules.settings(**TINY)
    torch.set_default_dtype(torch.float64)
    task = Schedules.make(s, CPU)
    h = bl.hypergradient(
        task.problem, task.lam0, task.theta0, task.train, task.validation, bl.CG(20, damping=1.0)
    )
    assert torch.equal(h[:4], torch.zeros(4)) and abs(float(h[4])) > 1e-8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"way": "hope"}, "way: got 'hope', expected 'constant', 'cosine'"),
        ({"model": "resnet18"}, "model: got 'resnet18'"),
        ({"windows": 31}, "windows: got 31, expected 1 to 30, half the steps of a training"),
        ({"windows": 0}, "windows: got 0, expected an integer of at least 1"),
        ({"images": 1001}, "images: got 1001, expected 1 to 1000, or 0 for all"),
        ({"held": 201}, "held: got 201, expected 1 to 200, or 0 for all"),
        ({"images": 10}, "batch_size: got 20, expected 1 to 10"),
        ({"start": 1.5}, "start: got 1.5, expected from 0 to 1"),
        ({"fresh": 0}, "fresh: got 0, expected an integer of at least 1"),
        ({"outer_lr": 0.0}, "outer_lr: got 0.0, expected above 0 and at most 1"),
        ({"outer_lr": 2.0}, "outer_lr: got 2.0, expected above 0 and at most 1"),
        (
            {"method": "soba"},
            "method: got 'soba', but rates are chosen by a way; expected 'aid-cg'",
        ),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Schedules.settings(**given)


# -- runs and the study


@pytest.mark.parametrize("way", ["learned", "greedy"])
def test_a_run_is_resumed_and_shown(way, tmp_path, monkeypatch, capsys):
    words = ["run", "schedules", "--device", "cpu", "--seed", "1", "--set", f"way={way}"]
    words += [f"{name}={value}" for name, value in {**TINY, "outer_steps": 4}.items()]
    whole, shown = stopped_and_resumed(
        words, tmp_path, monkeypatch, capsys, schedules_ways.Way, at=2
    )
    assert shown.count(f"{way}: lr") == 1 and "in 2 fresh trainings" in shown
    assert [row["iteration"] for row in whole["history"]] == [1, 2, 3, 4]
    assert whole["best"]["tuning_loss"] == min(row["tuning_loss"] for row in whole["history"])
    each = whole["fresh"]["each"]
    assert len(each) == 2 and each[0] != each[1]
    assert whole["fresh"]["test_loss"] == mean(fit["test_loss"] for fit in each)
    assert len(whole["course"]) == 12


def test_the_study_is_stopped_resumed_and_drawn(tmp_path, monkeypatch, capsys):
    assert [v.name for v in studies.variants("schedules", "cifar10", "lenet")] == list(
        schedules_ways.WAYS
    )
    words = ["study", "schedules", "--dataset", "digits", "--model", "linear", "--device", "cpu"]
    words += ["--images", "100", "--outer-steps", "2", "--looks", "2", "--seeds", "2", "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    shown = capsys.readouterr().out
    assert "validation" in shown and "diverged" not in shown
    step, steps = schedules_ways.Way.step, []

    def stops(self):
        steps.append(self)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(schedules_ways.Way, "step", stops)
    assert main([*words, str(tmp_path / "cut")]) == 130
    monkeypatch.setattr(schedules_ways.Way, "step", step)
    assert main([*words, str(tmp_path / "cut")]) == 0
    whole, cut = (
        json.loads((tmp_path / name / "result.json").read_text())["results"]
        for name in ("whole", "cut")
    )
    for row in (run for rows in (whole, cut) for one in rows for run in one["runs"]):
        for look in (row, row["best"], row["last"], *row["history"]):
            look.pop("seconds")
    assert cut == whole
    for one in whole:
        spent = [run["history"][-1]["gradients"] for run in one["runs"]]
        most = 2 * schedules_ways.cost(3, 60)
        assert [run["seed"] for run in one["runs"]] == [1, 2]
        assert all(most - 60 < gradients <= most for gradients in spent), one["method"]
    rows = {one["method"]: one for one in whole}
    gradients, losses = schedules_figures.lowest(rows["learned"])
    assert list(gradients) == [schedules_ways.cost(3, 60), 2 * schedules_ways.cost(3, 60)]
    firsts = [run["history"][0]["tuning_loss"] for run in rows["learned"]["runs"]]
    assert losses[0] == pytest.approx(mean(firsts)) and losses[1] <= losses[0]
    assert schedules_figures.courses(rows["cosine"]).shape == (2, 60)
    figures = str(tmp_path / "figures")
    assert main(["collect", str(tmp_path / "cut"), "--name", "mine", "--to", figures]) == 0
    assert main(["figures", "mine", "--to", figures]) == 0
    assert (tmp_path / "figures" / "mine.svg").stat().st_size > 10_000
    assert main([*words[:-1], "--images", "5000", "--out", str(tmp_path / "no")]) == 1
    assert "--images: got 5000, expected 1 to 1000" in capsys.readouterr().err


# -- what is said of the stored study


def table_rows(rows):
    """The study's table in figures/README.md: means, and each seed or fresh training."""
    lines = []
    for way, row in sorted(rows.items(), key=lambda one: mean(fresh(one[1], "test_loss"))):
        chosen = [run["best"]["tuning_loss"] for run in row["runs"]]
        cells = [", ".join(f"{v:.3f}" for v in chosen)]
        for key, digits, scale in (
            ("tuning_loss", 3, 1), ("test_loss", 3, 1), ("test_accuracy", 1, 100),
        ):  # fmt: skip
            found = [scale * v for v in fresh(row, key)]
            each = ", ".join(f"{v:.{digits}f}" for v in found)
            cells.append(f"{mean(found):.{digits}f} ({each})")
        spent = {run["history"][-1]["gradients"] for run in row["runs"]}
        lines.append(f"| `{way}` | {' | '.join(cells)} | {max(spent):,.0f} |")
    return lines


def test_the_table_of_the_study_is_the_stored_one():
    stored = bl.experiment.stored("schedules_cifar10_lenet")
    text = (ROOT / "figures" / "README.md").read_text("utf-8")
    table = text.partition('name="schedules_cifar10_lenet"')[2]
    at = [table.find(row) for row in table_rows(joined(stored["runs"]))]
    assert min(at) >= 0 and at == sorted(at)


def test_what_chapter_18_says_of_the_stored_study():
    rows = joined(bl.experiment.stored("schedules_cifar10_lenet")["runs"])
    assert set(rows) == set(schedules_ways.WAYS)
    (derivative,) = {run["history"][0]["gradients"] for run in rows["learned"]["runs"]}
    assert derivative == schedules_ways.cost(3, 400) and round(derivative / 400) == 8
    spans = []
    for way, row in rows.items():
        assert not row["diverged"] and [run["seed"] for run in row["runs"]] == [1, 2, 3]
        for run in row["runs"]:
            assert len(run["fresh"]["each"]) == 3
            spent = run["history"][-1]["gradients"]
            assert spent == (6 * derivative if way == "learned" else 47 * 400), way
            losses = [fit["test_loss"] for fit in run["fresh"]["each"]]
            spans.append(max(losses) - min(losses))
    assert max(spans) == pytest.approx(0.25, abs=0.005)
    test = {way: torch.tensor(fresh(row, "test_loss")).view(3, 3).mean(1) for way, row in
            rows.items()}  # fmt: skip
    falling = torch.stack([test.pop("cosine"), test.pop("steps")])
    others = torch.stack(list(test.values()))
    assert bool((falling.max(0).values < others.min(0).values).all())
    assert float(test["greedy"][1]) == pytest.approx(1.544, abs=5e-4)
    assert float(falling[1, 1]) == pytest.approx(1.539, abs=5e-4)
    for way, said in {"cosine": (0.108, 0.092), "constant": (-0.004, 0.166),
                      "free": (0.040, 0.178), "greedy": (0.016, 0.127)}.items():  # fmt: skip
        minus = test["learned"] - (falling[0] if way == "cosine" else test[way])
        half = 4.3027 * minus.std() / 3**0.5  # Student's t, two degrees of freedom, 95 %
        assert (float(minus.mean()), float(half)) == pytest.approx(said, abs=6e-4), way
    minus = test["learned"] - falling[1]  # the steps
    half = 4.3027 * minus.std() / 3**0.5
    assert (float(minus.mean()), float(half)) == pytest.approx((0.098, 0.114), abs=6e-4)
    middle = schedules_ways.values("constant", 3, torch.full((3,), 0.5).double())
    for way, repeats in (("steps", (0, 1, 2)), ("learned", (0, 2))):
        for k in repeats:
            best, rate = rows[way]["runs"][k]["best"], "lr_1" if way == "learned" else "lr"
            assert best[rate] == pytest.approx(float(middle["lr"]), rel=1e-4)
            assert best["momentum"] == pytest.approx(float(middle["momentum"]), rel=1e-4)
    learned = [run["best"] for run in rows["learned"]["runs"]]
    assert [best["iteration"] for best in learned] == [3, 4, 3]
    assert all(learned[k]["lr_1"] == learned[k]["lr_3"] for k in (0, 2))
    assert [learned[1][f"lr_{k}"] for k in (1, 2, 3)] == pytest.approx(
        [0.022, 0.053, 0.015], abs=6e-4
    )
    assert mean(best["tuning_loss"] for best in learned) == pytest.approx(1.588, abs=5e-4)
    assert mean(fresh(rows["learned"], "tuning_loss")) == pytest.approx(1.669, abs=5e-4)
    assert float(test["learned"].min()) == pytest.approx(1.586, abs=5e-4)
