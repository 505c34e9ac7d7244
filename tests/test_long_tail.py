"""Long-tailed classes: the split, the weights, their inner problem, the study."""

import io
import json
import math
import tarfile
from itertools import combinations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import bilevel_lite as bl
from bilevel_lite import models, plotting
from bilevel_lite.__main__ import main
from bilevel_lite.data import DataError, cifar10
from bilevel_lite.experiment import job, methods
from bilevel_lite.experiment.comparing import difference, fresh
from bilevel_lite.experiment.supervised import PLAIN
from bilevel_lite.params import predict
from bilevel_lite.products import hvp
from bilevel_lite.tasks import long_tail, long_tail_study, studies
from bilevel_lite.tasks.long_tail import LongTail

CPU = torch.device("cpu")


@pytest.fixture
def float32():
    with job.float32():
        yield


def made(**given):
    s = LongTail.settings(**given)
    return s, LongTail.make(s, CPU)


def batch_of(task, count):
    x, y = task.train
    return x[:count], y[:count], torch.arange(count)


# ---------------------------------------------------------------- split and sizes


@pytest.mark.parametrize(
    ("imbalance", "images"),
    [(200, 11_177), (100, 12_380), (50, 13_967), (20, 16_989), (10, 20_391)],
)
def test_the_classes_have_the_sizes_of_the_rule(imbalance, images):
    counts = long_tail.sizes(4990, imbalance, 10)
    assert counts == [math.floor(4990 * imbalance ** (-c / 9) + 1e-9) for c in range(10)]
    assert sum(counts) == images
    assert counts[0] == 4990 and counts[9] == int(4990 / imbalance)


def test_no_image_is_in_two_splits(float32):
    s, task = made(seed=3, imbalance=10)
    assert task.counts.tolist() == long_tail.sizes(80, 10, 10)
    assert task.validation[1].bincount().tolist() == [10] * 10
    assert task.tuning[1].bincount().tolist() == [10] * 10
    splits = [getattr(task, name) for name in ("train", "validation", "tuning", "test")]
    rows = torch.cat([x for x, _ in splits])
    assert len(torch.unique(rows, dim=0)) == len(rows) == 260 + 100 + 100 + sum(task.counts)
    digits = bl.data.load("digits")
    known = {tuple(row) for row in digits.x_test.tolist()}
    for name in ("tuning", "test"):
        assert all(tuple(row) in known for row in getattr(task, name)[0].tolist())
    # BatchNorm reads the first training images: they are of all kinds, not of the first class
    assert len(task.train[1][:60].unique()) > 5
    _, other = made(seed=4, imbalance=10)
    assert not torch.equal(other.validation[0], task.validation[0])
    assert not torch.equal(other.lam0, task.lam0) and not torch.equal(other.theta0, task.theta0)


# ---------------------------------------------------------------- what weighs


def by_hand(task, kind, lam, losses, y):
    """The weights, written out."""
    if kind in ("network", "frozen"):
        w, b, out, c = lam.split([100, 100, 100, 1])
        hidden = torch.relu(losses[:, None] * w + b)
        return 2 / (1 + (-(hidden @ out + c)).exp())
    if kind == "focal":
        leaf = losses.clone().requires_grad_()
        value = ((1 - (-leaf).exp()) ** 1.0 * leaf).sum()
        return torch.autograd.grad(value, leaf)[0]
    n = task.counts.double()
    if kind == "balanced":
        rare = (1 - 0.9999) / (1 - 0.9999**n)
        return (10 * rare / rare.sum()).to(losses)[y]
    return (lam if kind == "class" else torch.ones(10))[y]


@pytest.mark.parametrize("kind", long_tail.WEIGHTS)
@pytest.mark.parametrize("reading", long_tail.READINGS)
def test_an_inner_step_follows_what_the_settings_say(kind, reading, float32):
    _, task = made(seed=1, weights=kind, reading=reading, l2=0.01)
    lam, batch = task.lam0.clone(), batch_of(task, 30)
    if kind in ("network", "class"):
        lam = lam + 0.1 * torch.rand(lam.shape, generator=torch.Generator().manual_seed(0))
    theta = task.theta0.clone().requires_grad_()
    losses = cross_entropy(predict(task.model, theta, batch[0]), batch[1], reduction="none")
    sigma = by_hand(task, kind, lam, losses.detach(), batch[1])
    if reading == "normalised" and kind != "focal":
        sigma = 30 * sigma / sigma.sum()
    g = (sigma * losses).mean() + 0.01 * theta.square().sum()
    value = task.problem.inner_loss(lam, task.theta0, batch)
    torch.testing.assert_close(value, g.detach(), rtol=1e-5, atol=1e-6)
    (field,) = torch.autograd.grad(g, theta)
    leaf = task.theta0.clone().requires_grad_()
    (got,) = torch.autograd.grad(task.problem.inner_loss(lam, leaf, batch), leaf)
    torch.testing.assert_close(got, field, rtol=1e-4, atol=1e-6)
    assert task.problem.inner_loss.weight_slope == (
        reading == "full" and kind in ("network", "frozen", "focal")
    )


def test_plain_training_may_have_the_meta_images_too():
    _, task = made(weights="network")
    both = task.on("meta")
    for part, own, more in zip(both.train, task.train, task.validation, strict=True):
        assert torch.equal(part, torch.cat([own, more])) and len(more)
    assert both.counts.tolist() == task.counts.tolist()
    for kind in ("equal", "meta"):  # and no other kind has them, or has them twice
        assert len(both.on(kind).train[1]) == len(task.on(kind).train[1])
    s, other = made(weights="meta", method="aid-identity")
    assert torch.equal(other.train[1], both.train[1]) and len(methods.build(s, other).theta)


def test_the_focal_loss_is_the_potential_of_its_weights():
    losses = torch.linspace(0.01, 8, 50, dtype=torch.float64)
    for gamma in (0.5, 1.0, 2.0):
        leaf = losses.clone().requires_grad_()
        focal = (1 - (-leaf).exp()) ** gamma * leaf  # Lin et al., eq. 4
        (slope,) = torch.autograd.grad(focal.sum(), leaf)
        torch.testing.assert_close(long_tail.focal(torch.tensor(gamma).double(), losses), slope)
    assert torch.isfinite(long_tail.focal(torch.tensor(1.0), torch.zeros(3))).all()


def test_class_balanced_weights_have_mean_one_and_go_as_the_inverse_where_classes_are_small():
    counts = torch.tensor([4990, 499, 50])
    weights = long_tail.class_balanced(counts)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
    effective = [(1 - 0.9999**n) / (1 - 0.9999) for n in (4990, 499, 50)]
    assert float(weights[2] / weights[0]) == pytest.approx(effective[0] / effective[2], rel=1e-3)
    small = long_tail.class_balanced(torch.tensor([40, 4]))
    assert float(small[1] / small[0]) == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("kind", long_tail.WEIGHTS)
def test_lam_moves_where_it_is_learned_and_only_there(kind, float32):
    s, task = made(weights=kind, method="aid-kfac", outer_steps=2, inner_steps=2)
    method = methods.build(s, task)
    method.step()
    assert torch.equal(method.lam, task.lam0) == (kind not in ("network", "class"))
    assert not torch.equal(method.theta, task.theta0)
    row = task.measure(method.lam, method.theta)
    assert row["tuning_error"] == 1 - row["tuning_accuracy"]
    curve = task.curve(method.lam)
    assert bool(curve) == (kind in ("network", "frozen", "focal"))
    if kind == "network":
        losses = torch.tensor(curve["loss"])
        for name, lam in (("start", task.lam0), ("learned", method.lam)):
            V = by_hand(task, kind, lam, losses, None)  # noqa: N806
            torch.testing.assert_close(torch.tensor(curve[name]), V, rtol=1e-4, atol=1e-5)
        weights = task.class_weights(method.lam, method.theta)
        x, y = task.train
        l = cross_entropy(predict(task.model, method.theta, x), y, reduction="none")
        V = by_hand(task, kind, method.lam, l, y)  # noqa: N806
        assert weights[3] == pytest.approx(float(V[y == 3].mean()), rel=1e-3)
    each = task.class_accuracy(method.theta)
    share = task.test[1].bincount() / len(task.test[1])
    assert float((torch.tensor(each) * share).sum()) == pytest.approx(
        row["test_accuracy"], abs=1e-5
    )


def test_a_class_weight_stays_above_zero(float32):
    _, task = made(weights="class")
    assert task.project(torch.tensor([-1.0, 2.0])).tolist() == [0.0, 2.0]


# ---------------------------------------------------------------- the hypergradient


def test_the_hypergradient_is_that_of_the_field(float32, monkeypatch):
    """F(theta(lam)) = 0 solved by Newton in float64; finite differences of f as the truth."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 4, generator=generator), torch.arange(300) % 3
    x[:, 0] += y
    tiny = bl.data.Dataset("digits", x, y, x.clone(), y, 3, (2, 2))
    monkeypatch.setattr(long_tail.data, "load", lambda name: tiny)
    _, task = made(seed=2, imbalance=4, most=40, l2=0.02)
    task.model.double()
    lam, d = task.lam0.double(), len(task.theta0)
    batch = (task.train[0].double(), task.train[1], torch.arange(len(task.train[1])))
    outer = (task.validation[0].double(), task.validation[1])
    g, f = task.problem.inner_loss, task.problem.outer_loss

    def field(lam, theta):
        leaf = theta.clone().requires_grad_()
        losses = cross_entropy(predict(task.model, leaf, batch[0]), batch[1], reduction="none")
        sigma = by_hand(task, "network", lam, losses.detach(), None)
        loss = (sigma * losses).mean() + 0.02 * leaf.square().sum()
        return torch.autograd.grad(loss, leaf)[0]

    def solved(lam, theta):
        for _ in range(20):
            H = torch.stack([hvp(g, lam, theta, batch, e) for e in torch.eye(d).double()])  # noqa: N806
            theta = theta - torch.linalg.solve(H, field(lam, theta))
        assert field(lam, theta).norm() < 1e-12
        return theta

    theta = task.theta0.double()
    for _ in range(300):
        theta = theta - 0.5 * field(lam, theta)
    theta = solved(lam, theta)
    h = bl.hypergradient(task.problem, lam, theta, batch, outer, bl.Direct())
    u = torch.randn(lam.shape, generator=generator, dtype=torch.float64)
    up, down = (float(f(lam, solved(lam + e * u, theta), outer)) for e in (1e-5, -1e-5))
    truth = (up - down) / 2e-5
    assert float(h @ u) == pytest.approx(truth, rel=1e-6)
    still = bl.BilevelProblem(bl.WeightedRisk(task.model, weight=g.weight, l2=0.02), f)
    without = bl.hypergradient(still, lam, theta, batch, outer, bl.Direct())
    assert abs(float(without @ u) - truth) > 1e-3 * abs(truth)  # V' is not nothing


# ---------------------------------------------------------------- ResNet-32, crops, schedule


def test_resnet32_is_the_one_of_the_paper():
    model = models.build("resnet32", (3, 32, 32), 10)
    assert bl.flatten(model).numel() == 464_154  # He et al., Table 6: 0.46 M
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 32
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    shortcut = models.Padded(8, 2)
    x = torch.arange(16.0 * 4 * 4).view(1, 16, 4, 4)
    out = shortcut(x)
    assert out.shape == (1, 32, 2, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_crop_and_flip_is_a_crop_of_the_padded_image():
    x = torch.randn(40, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    one = bl.data.crop_and_flip(x, torch.Generator().manual_seed(1), padding=2)
    again = bl.data.crop_and_flip(x, torch.Generator().manual_seed(1), padding=2)
    other = bl.data.crop_and_flip(x, torch.Generator().manual_seed(2), padding=2)
    assert torch.equal(one, again) and not torch.equal(one, other)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    seen = set()

    def mirrored(image, flip):
        return image.flip(2) if flip else image

    for image, wide in zip(one, padded, strict=True):
        found = [
            (i, j, k)
            for i in range(5) for j in range(5) for k in (False, True)
            if torch.equal(image, mirrored(wide[:, i : i + 8, j : j + 6], k))
        ]  # fmt: skip
        assert len(found) == 1
        seen |= set(found)
    assert {i for i, _, _ in seen} == set(range(5)) and {k for _, _, k in seen} == {False, True}
    same = bl.data.crop_and_flip(x, torch.Generator().manual_seed(1), padding=0, flip=0.0)
    assert torch.equal(same, x)
    assert torch.equal(
        bl.data.crop_and_flip(x, torch.Generator().manual_seed(1), 0, 1.0), x.flip(3)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.zeros(2, 3)}, "x: got shape (2, 3), expected images, (n, C, H, W)"),
        ({"padding": 6}, "padding: got 6, expected a whole number from 0 to 5 for images of 8 x 6"),
        ({"padding": -1}, "padding: got -1"),
        ({"padding": 1.5}, "padding: got 1.5"),
        ({"flip": 1.5}, "flip: got 1.5, expected a number from 0 to 1"),
    ],
)
def test_crops_that_cannot_be(given, message):
    given = {"x": torch.zeros(2, 3, 8, 6), **given}
    with pytest.raises(ValueError) as error:
        bl.data.crop_and_flip(given.pop("x"), torch.Generator(), **given)
    assert message in str(error.value)


def test_transformed_batches_resume_to_the_last_pixel():
    x, y = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(30)

    def sampler(seed):
        generator = torch.Generator().manual_seed(seed)
        return bl.data.Batches(x, y.long(), 7, generator, transform=bl.data.crop_and_flip)

    one, other = sampler(1), sampler(5)
    drawn = [one.draw() for _ in range(3)]
    assert not torch.equal(drawn[0][0], x[drawn[0][2]])
    assert torch.equal(one.all()[0], x)
    other.load_state_dict(one.state_dict())
    for _ in range(6):  # over the end of a pass
        assert torch.equal(other.draw()[0], one.draw()[0])


def test_the_inner_step_falls_by_ten_twice_and_adam_moves_lam(float32):
    s, task = made(inner_schedule="steps", outer_steps=20, inner_steps=1, outer_lr=0.01)
    method, rates = methods.build(s, task), []
    for _ in range(20):
        rates.append(method.inner_optimizer.param_groups[0]["lr"])
        before = method.lam.clone()
        method.step()
        if len(rates) == 1:  # Adam's first step is the step size, whatever the gradient
            moved = (method.lam - before).abs()
            assert float(moved[moved > 1e-4].median()) == pytest.approx(0.01, rel=1e-3)
    assert rates == pytest.approx([0.1] * 16 + [0.01] * 2 + [0.001] * 2)
    assert isinstance(method.outer_optimizer, torch.optim.Adam)
    assert method.outer_optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("method", ["aid-kfac", "sama", "aid-identity"])
def test_resnet32_runs_with_each_batchs_statistics(method, float32, monkeypatch):
    x = torch.randn(400, 3 * 16 * 16, generator=torch.Generator().manual_seed(0))
    y = torch.arange(400) % 10
    tiny = bl.data.Dataset("cifar10", x, y, x.clone(), y, 10, (3, 16, 16), "noise")
    monkeypatch.setattr(long_tail.data, "load", lambda name: tiny)
    monkeypatch.setitem(long_tail.SIZES, "cifar10", (30, 2, 5))
    s, task = made(
        dataset="cifar10", model="resnet32", method=method, imbalance=5, batch_size=10,
        curvature_batch_size=10, cross_batch_size=10, outer_batch_size=10, inner_steps=2,
        outer_steps=2,
    )  # fmt: skip
    assert task.uses_batches and task.transform is bl.data.crop_and_flip
    run, modes = methods.build(s, task), []
    task.model.register_forward_pre_hook(lambda m, x: modes.append((m.training, len(x[0]))))
    run.step()
    modes = [(mode, n) for mode, n in modes if n != 4]  # a few examples, only looked at
    # the inner steps in training mode; all else with the statistics that refresh took
    assert modes[:2] == [(True, 10)] * 2 and (False, 10) in modes and (True, 10) not in modes[3:]
    assert not task.model.training and torch.isfinite(run.lam).all()
    assert not torch.equal(run.lam, task.lam0)


# ---------------------------------------------------------------- CIFAR-100, bad input


def archive(path, train, test):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("train", train), ("test", test)):
            info = tarfile.TarInfo(f"cifar-100-binary/{name}.bin")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_cifar100_is_read_from_its_archive(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (7, 2 + 3072), dtype=np.uint8)
    records[:, 0], records[:, 1] = 19, np.arange(7) * 16  # the superclass, the class
    (tmp_path / "cifar100").mkdir()
    path = tmp_path / "cifar100" / "cifar-100-binary.tar.gz"
    archive(path, records[:5].tobytes(), records[5:].tobytes())
    monkeypatch.setenv("BILEVEL_LITE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="damaged or not the known file"):
        bl.data.load("cifar100")
    monkeypatch.setattr(cifar10, "_check", lambda path, sha256: None)
    found = bl.data.load("cifar100")
    assert found.num_classes == 100 and found.image_shape == (3, 32, 32)
    assert found.y.tolist() == [0, 16, 32, 48, 64] and found.y_test.tolist() == [80, 96]
    assert torch.equal(found.x, torch.from_numpy(records[:5, 2:].copy()).to(found.x.dtype).div(255))
    with pytest.raises(DataError, match="label 112, expected 0 to 99"):
        records[0, 1] = 112
        cifar10.read_records(records.tobytes(), 100)
    with pytest.raises(DataError, match="expected a multiple of 3074"):
        cifar10.read_records(records.tobytes()[:-1], 100)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["most=81"], "most: got 81, expected 1 to 80 in digits, or 0"),
        (["imbalance=100"], "imbalance: got 100, which leaves the last class without images; "
         "expected 1 to 80"),
        (["augment=1"], "augment: got 1, but linear takes vectors"),
        (["augment=2"], "augment: got 2, expected 0 or 1"),
        (["model=lenet"], "model: lenet needs images of 16 x 16 or more"),
        (["weights=focals"], "weights: got 'focals', expected 'balanced', 'class', 'equal'"),
        (["reading=half"], "reading: got 'half', expected 'full', 'no_slope' or 'normalised'"),
        (["batch_size=300"], "batch_size: got 300, expected 1 to 269, or 0 for all 269"),
        (["outer_batch_size=300"], "outer_batch_size: got 300, expected 1 to 100"),
        (["hidden=0"], "hidden: got 0, expected an integer of at least 1"),
        (["dataset=svhn"], "dataset: got 'svhn'"),
        (["inner_schedule=steps", "budget=9"], "inner_schedule: got 'steps' with budget=9"),
        (["outer_optimizer=rmsprop"], "outer_optimizer: got 'rmsprop', expected 'adam', 'sgd' or"),
    ],
)  # fmt: skip
def test_bad_settings(words, message, tmp_path, capsys):
    command = ["run", "long_tail", "--device", "cpu", "--out", str(tmp_path), "--set", *words]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ---------------------------------------------------------------- runs and the study


def test_a_run_shows_its_rivals_and_draws(tmp_path, capsys):
    words = ["run", "long_tail", "--device", "cpu", "--outer-steps", "4", "--inner-steps", "3"]
    assert main([*words, "--evaluate-every", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in (*long_tail_study.RIVALS.values(), "network, aid-kfac", "imbalance 20", "V(0.1)"):
        assert words in out
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["baselines"]) == list(long_tail_study.RIVALS)
    # a rival is a run of its own name: same seed, same inner steps
    with job.float32():
        s, task = made(outer_steps=4, inner_steps=3, weights="balanced", **PLAIN)
        method = methods.build(s, task)
        for _ in range(4):
            method.step()
        row = task.measure(method.lam, method.theta)
    assert result["baselines"]["balanced"]["last_test_loss"] == pytest.approx(row["test_loss"])
    assert (tmp_path / "figure.png").stat().st_size > 5_000


def test_the_study_has_the_papers_rows_and_is_drawn(tmp_path, capsys):
    pytest.importorskip("optuna")
    found = studies.variants("long_tail", "cifar10", "lenet")
    names = [v.name for v in found]
    assert names == [
        "equal", "focal", "balanced", "frozen", "meta", "identity", "sama", "kfac-empirical",
        "kfac-mc", "kfac-normalised", "class", "kfac-1e-5",
    ]  # fmt: skip
    assert {v.name for v in found if v.space} == {
        *long_tail_study.SOLVERS, *long_tail_study.OTHERS,
    }  # fmt: skip
    assert len({json.dumps(v.space) for v in found if v.space}) == 1
    study = studies.STUDIES["long_tail"]
    assert study.usual["first_seed"] == 1  # the search's seed is not among them
    words = ["study", "long_tail", "--dataset", "digits", "--model", "linear", "--imbalance", "10"]
    words += ["--most", "40", "--device", "cpu", "--only", "equal", "kfac-mc", "--seeds", "1"]
    words += ["--trials", "1", "--search-steps", "2", "--outer-steps", "4", "--looks", "2"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["base"]["imbalance"], result["base"]["most"]) == (10, 40)
    assert sum(result["results"][0]["runs"][0]["counts"]) == sum(long_tail.sizes(40, 10, 10))
    (figure,) = LongTail.draw({"kind": result["kind"], "runs": [result]}).values()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["equal", "kfac-mc"]
    plotting.plt.close(figure)
    capsys.readouterr()
    assert main(["study", "solvers", "--most", "9", "--out", str(tmp_path / "x")]) == 1
    assert "--most: solvers has none" in capsys.readouterr().err


def test_what_the_selection_is_worth():
    history = [
        {"tuning_error": 0.5, "test_accuracy": 0.4},
        {"tuning_error": 0.3, "test_accuracy": 0.6},
        {"tuning_error": 0.4, "test_accuracy": 0.7},
        {"tuning_error": 0.6, "test_accuracy": 0.5},
    ]
    assert long_tail_study.selection(history) == {"last": 0.5, "held out": 0.6, "on test": 0.7}


def test_what_chapter_13_says_of_other_imbalances():
    less, decided, learned = {}, {}, {}
    for factor in long_tail_study.IMBALANCES:
        rows = fresh("long_tail_cifar10" + f"_imbalance_{factor}" * (factor != 100))
        for name in ("meta", "balanced", "class", "identity", "kfac-empirical"):
            each, middle, half = difference(rows[name], rows["equal"], "test_accuracy")
            assert len(each) == 3
            less.setdefault(name, []).append(100 * middle)
            decided.setdefault(name, []).extend([factor] * (abs(middle) > half))
        for name in ("identity", "kfac-empirical"):
            _, middle, half = difference(rows[name], rows["frozen"], "test_accuracy")
            assert middle < 0
            learned.setdefault(name, []).extend([factor] * (middle + half < 0))
            if factor == 10:
                pairs = zip(rows[name]["runs"], rows["equal"]["runs"], strict=True)
                assert all(a["best"]["test_loss"] > b["best"]["test_loss"] for a, b in pairs)
        if factor == 200:  # one step for all, and all became steep
            for name in ("identity", "sama", "kfac-empirical", "kfac-mc"):
                for curve in (run["curve"] for run in rows[name]["runs"]):
                    assert curve["learned"][0] < 0.3 and curve["learned"][-1] > 1.9
    assert learned == {"identity": [50, 20, 10], "kfac-empirical": [20, 10]}
    for name, low, high in (("balanced", 2.7, 9.0), ("class", 1.4, 2.6), ("meta", 0.5, 2.0)):
        assert (min(less[name]), max(less[name])) == pytest.approx((low, high), abs=0.06), name
    assert max(less["identity"] + less["kfac-empirical"]) < 0
    assert decided == {
        "balanced": [200, 100, 50, 20, 10], "class": [10], "meta": [50],
        "identity": [200, 50, 10], "kfac-empirical": [10],
    }  # fmt: skip
    paper = long_tail_study.TABLE_3
    gains = [k - e for k, e in zip(paper["kfac"], paper["equal"], strict=True)]
    assert gains == pytest.approx([1.7, 3.1, 4.7, 3.8, 2.3])


def test_what_chapter_13_says_of_the_stored_study():
    rows = fresh("long_tail_cifar10")

    def ratios(name):
        return [run["class_weights"][-1] / run["class_weights"][0] for run in rows[name]["runs"]]

    steps = {name: row["chosen"].get("outer_lr") for name, row in rows.items()}
    assert steps["identity"] == steps["kfac-empirical"] == 0.01319
    assert steps["sama"] == steps["kfac-mc"] == 0.001199
    for name in ("identity", "sama", "kfac-empirical", "kfac-mc"):
        trials = {t["outer_lr"]: 100 * t["tuning_error"] for t in rows[name]["trials"]}
        worst = trials.pop(max(trials))
        assert len(trials) == 3 and max(trials.values()) - min(trials.values()) < 2.8
        assert 3.5 < worst - min(trials.values()) < 9
    assert sorted(map(round, ratios("kfac-empirical"))) == [14, 15, 30]
    assert all(2.5 < ratio < 3.65 for ratio in ratios("class"))
    assert ratios("balanced") == pytest.approx([95, 95, 95], abs=0.5)
    for name in ("kfac-empirical", "class"):
        assert max(max(run["class_accuracy"][-2:]) for run in rows[name]["runs"]) < 0.0345
    curves = [run["curve"] for run in rows["kfac-1e-5"]["runs"]]
    for curve in curves:
        pairs = zip(curve["learned"], curve["start"], strict=True)
        assert 0.03 < max(abs(a - b) for a, b in pairs) < 0.045
    assert all(1.8 < run["last"]["inner_loss"] < 2.25 for run in rows["kfac-normalised"]["runs"])
    losses = {name: [run["best"]["test_loss"] for run in row["runs"]] for name, row in rows.items()}
    assert all(a < b for a, b in zip(losses["balanced"], losses["kfac-empirical"], strict=True))
    for name, said in (("identity", 2.0), ("kfac-empirical", 2.0), ("sama", 2.3), ("kfac-mc", 2.3)):
        assert all(a < b for a, b in zip(losses[name], losses["equal"], strict=True))
        assert round(sum(losses[name]) / 3, 1) == said
    behind = [difference(rows[name], rows["balanced"], "test_accuracy")
              for name in ("identity", "sama", "kfac-empirical", "kfac-mc", "equal")]  # fmt: skip
    assert all(middle + half < 0 for _, middle, half in behind)
    solvers = ("identity", "sama", "kfac-empirical", "kfac-mc")
    pairs = [difference(rows[a], rows[b], "test_accuracy")[1:] for a, b in combinations(solvers, 2)]
    assert all(abs(middle) < half for middle, half in pairs)
    decided = [(middle, half) for _, middle, half in (
        difference(rows[name], rows["frozen"], "test_accuracy") for name in solvers
    ) if middle + half < 0]  # fmt: skip
    assert decided == [pytest.approx((-0.029, 0.023), abs=6e-4)]  # SAMA
    counts = torch.tensor(rows["equal"]["runs"][0]["counts"]).double()
    for name, low, high in (("identity", 0.07, 0.165), ("kfac-empirical", 0.07, 0.165),
                            ("sama", 0.95, 1.35), ("kfac-mc", 0.95, 1.35)):  # fmt: skip
        levels = [float(torch.tensor(run["class_weights"]).double() @ counts / counts.sum())
                  for run in rows[name]["runs"]]  # fmt: skip
        assert low < min(levels) and max(levels) < high, (name, levels)
    assert rows["kfac-normalised"]["runs"][-1]["best"]["iteration"] == 30
    for name in (*solvers, "kfac-1e-5"):
        assert rows[name]["runs"][-1]["best"]["iteration"] >= 90


def test_what_a_result_says_of_each_class_is_of_the_chosen_iterate(tmp_path):
    """With BatchNorm: not of the statistics that the last iterate left."""
    words = ["run", "long_tail", "--method", "aid-identity", "--device", "cpu", "--set",
             "dataset=digits", "model=resnet18", "most=40", "imbalance=4", "outer_steps=4",
             "evaluate_every=1", "inner_steps=3", "batch_size=20", "curvature_batch_size=20",
             "cross_batch_size=20", "outer_batch_size=20", "inner_lr=0.2",
             "baselines=0"]  # fmt: skip
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["best"]["iteration"] < 4  # else it would say nothing
    counts = made(**result["settings"])[1].test[1].bincount()
    whole = sum(int(n) * a for n, a in zip(counts, result["class_accuracy"], strict=True))
    assert whole / int(counts.sum()) == pytest.approx(result["best"]["test_accuracy"], abs=1e-6)
