"""Texts of four end tasks, masked words, the task that weighs them, its study."""

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from together import stopped_and_resumed

import bilevel_lite as bl
from bilevel_lite import text
from bilevel_lite.__main__ import main
from bilevel_lite.algorithms.adaptation import adaptation
from bilevel_lite.curvature import ggn_vp
from bilevel_lite.data import DataError, pretraining
from bilevel_lite.experiment import job
from bilevel_lite.experiment.comparing import difference, fresh
from bilevel_lite.factors import kfac_factors
from bilevel_lite.params import flatten, predict
from bilevel_lite.slopes import slopes_and_route
from bilevel_lite.tasks import pretraining as tasks
from bilevel_lite.tasks import pretraining_study
from bilevel_lite.tasks.pretraining import Pretraining
from bilevel_lite.tasks.pretraining_parts import Cosines, scrambled

pytest.importorskip("transformers")
CPU = torch.device("cpu")
REAL = Path(os.environ.get("BILEVEL_LITE_DATA", "")) / "pretraining"
real = pytest.mark.skipif(not (REAL / "sciie").is_dir(), reason="no local texts")


@pytest.fixture
def float32():
    with job.float32():
        yield


# ---------------------------------------------------------------- files

TABLE = {  # classes; training, development, test texts; training texts among the last two
    "chemprot": (13, (4169, 2427, 3469), (0, 4)),
    "citation_intent": (6, (1688, 114, 139), (43, 52)),
    "hyperpartisan": (2, (516, 63, 65), (0, 51)),
    "sciie": (7, (3219, 455, 974), (0, 0)),
}


@real
@pytest.mark.parametrize("name", TABLE)
def test_the_sets_are_those_of_the_table(name):
    classes, sizes, again = TABLE[name]
    d = pretraining.load(name, download=False)
    assert d.source == "" and len(d.classes) == classes
    parts = (d.train, d.valid, d.test)
    assert tuple(len(p.texts) for p in parts) == tuple(len(p.y) for p in parts) == sizes
    assert tuple(int(pretraining.seen(p, d.train).sum()) for p in parts[1:]) == again
    assert sizes[:2] == tasks.SIZES[name]
    # train.txt, which is not read, says the same
    lines = (REAL / name / "train.txt").read_text("utf-8").split("\n")
    assert [line.strip() for line in lines if line.strip()] == [t.strip() for t in d.train.texts]


@real
def test_of_the_texts_in_two_splits_most_have_one_label():
    # what chapter 14 and the docstring say
    for name, split, same in (
        ("hyperpartisan", "test", 51), ("citation_intent", "test", 46),
        ("citation_intent", "valid", 40),
    ):  # fmt: skip
        d = pretraining.load(name, download=False)
        known = {}
        for one, y in zip(d.train.texts, d.train.y.tolist(), strict=True):
            known.setdefault(one.strip(), set()).add(y)
        part = getattr(d, split)
        rows = zip(part.texts, part.y.tolist(), strict=True)
        assert sum(known.get(one.strip()) == {y} for one, y in rows) == same
    d = pretraining.load("chemprot", download=False)
    assert len(d.valid.y.unique()) == len(d.test.y.unique()) == 12


@real
def test_what_chapter_14_says_of_the_texts():
    def known(part):
        return {one.strip() for one in part.texts}

    d = pretraining.load("citation_intent", download=False)
    assert len(known(d.train)) == 1270
    new = [k for k, old in enumerate(pretraining.seen(d.test, d.train).tolist()) if not old]
    assert len(new) == 87 and sum(d.test.texts[k].strip() in known(d.valid) for k in new) == 2
    assert sorted(d.test.y[new].bincount().tolist())[:3] == [3, 3, 3]
    for seed, *held in ((1, 21, 22), (2, 18, 25), (3, 21, 22)):  # f's, tuning texts that g has seen
        parts = bl.data.split(114, (57, 57), torch.Generator().manual_seed(seed))
        assert [int(pretraining.seen(d.valid, d.train)[one].sum()) for one in parts] == held
    guess = torch.full_like(d.test.y, int(d.train.y.bincount().argmax()))
    assert float((guess == d.test.y).double().mean()) == pytest.approx(0.511, abs=1e-3)
    assert tasks.macro_f1(guess, d.test.y) == pytest.approx(0.113, abs=1e-3)
    d = pretraining.load("hyperpartisan", download=False)
    new = [k for k, old in enumerate(pretraining.seen(d.test, d.train).tolist()) if not old]
    assert len(new) == 14 and sum(d.test.texts[k].strip() in known(d.valid) for k in new) == 7
    assert sorted(d.test.y.bincount().tolist()) == [27, 38]
    guess = torch.full_like(d.test.y, int(d.train.y.mode().values))
    assert float((d.test.y == guess).double().mean()) == pytest.approx(0.58, abs=0.01)
    assert tasks.macro_f1(guess, d.test.y) == pytest.approx(0.37, abs=5e-3)
    of: dict[int, list[float]] = {}  # macro-F1 by the number of errors
    for a in range(5):
        for b in range(5 - a):
            said = d.test.y.clone()
            for c, count in enumerate((a, b)):
                said[(d.test.y == c).nonzero()[:count, 0]] = 1 - c
            of.setdefault(a + b, []).append(100 * tasks.macro_f1(said, d.test.y))
    assert (min(of[3]), max(of[3])) == pytest.approx((95.16, 95.31), abs=5e-3)
    assert max(of[4]) == pytest.approx(93.77, abs=5e-3) and min(of[2]) > 96.7  # no mix within 0.05


def folder(path, **parts):
    path.mkdir(exist_ok=True)
    for name in ("train", "dev", "test"):
        lines = parts.get(name, [{"text": "a b", "label": "x"}, {"text": "c d", "label": "y"}])
        rows = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", "utf-8")
    return path


def test_a_set_of_ones_own_is_read(tmp_path):
    d = pretraining.read(folder(tmp_path / "own"))
    assert d.classes == ["x", "y"] and d.valid.y.tolist() == [0, 1] and d.train.texts[1] == "c d"
    assert d.source == "own, a set of one's own"
    assert pretraining.seen(d.test, d.train).all()
    empty = folder(tmp_path / "e", dev=[{"text": " ", "label": "x"}, {"text": "q", "label": "y"}])
    assert pretraining.read(empty, drop_empty=True).valid.texts == ["q"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": ["{"]}, "train.jsonl: line 1 is not of the form"),
        ({"dev": [{"text": "a"}]}, "dev.jsonl: line 1 is not of the form"),
        ({"dev": [{"text": 3, "label": "x"}]}, "dev.jsonl: the text of line 1 is int"),
        ({"dev": [{"text": " ", "label": "x"}]}, "dev.jsonl: the text of line 1 is empty; leave"),
        ({"test": [{"text": "a", "label": "z"}]}, "test.jsonl: line 1 has the label 'z', which no"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, parts, message):
    with pytest.raises(DataError, match=message):
        pretraining.read(folder(tmp_path, **parts))


def test_files_that_are_not_the_known_ones_are_refused(tmp_path, monkeypatch):
    (tmp_path / "pretraining").mkdir()
    folder(tmp_path / "pretraining" / "sciie")
    monkeypatch.setenv("BILEVEL_LITE_DATA", str(tmp_path))
    with pytest.raises(DataError, match="damaged or not the known file: its content has sha256"):
        pretraining.load("sciie", download=False)
    monkeypatch.setenv("BILEVEL_LITE_CACHE", str(tmp_path / "none"))
    with pytest.raises(DataError, match="no local copy of train.jsonl, and no download"):
        pretraining.load("chemprot", download=False)
    with pytest.raises(DataError, match="no host is known for this split; put its train.jsonl"):
        pretraining.load("hyperpartisan")
    (tmp_path / "own").mkdir()
    with pytest.raises(DataError, match=r"train\.jsonl is missing; expected train\.jsonl, dev"):
        pretraining.read(tmp_path / "own")


# ---------------------------------------------------------------- masked words

TEXTS = ["who built the old bridge of lima ?", "where is it ?", "how many gardens has oslo now ?"]


def masked(copies=2, share=0.3, layers=1, seed=0, dtype=torch.float32):
    encoder, draws = text.tiny(), torch.Generator().manual_seed(seed)
    made = text.hide(encoder, TEXTS, draws, copies, share)
    model = text.TextClassifier(encoder, 3, layers, generator=draws)
    first = None
    if layers != "all":
        first = len(TEXTS)
        wide = F.pad(encoder.ids(TEXTS), (0, made.ids.shape[1] - encoder.ids(TEXTS).shape[1]))
        model.remember(torch.cat([wide, made.ids]))
    words = text.MaskedWords(model, made, first, draws)
    return encoder, made, model.to(dtype), words.to(dtype)


def test_what_is_hidden_stands_in_the_labels():
    encoder, made, _, _ = masked(copies=40)
    ids = encoder.ids(TEXTS).repeat_interleave(40, 0)
    kept = made.y >= 0
    assert torch.equal(made.vocabulary[made.y[kept]], ids.gather(1, made.places)[kept])
    # put back, the texts are whole again; and nothing but these places was touched
    back = made.ids.clone()
    for row, (places, y, on) in enumerate(zip(made.places, made.y, kept, strict=True)):
        back[row, places[on]] = made.vocabulary[y[on]]
        assert len(set(places[on].tolist())) == int(on.sum())
    assert torch.equal(back, ids)
    # 8, 4 and 7 words: 2.4, 1.2 and 2.1 rounded
    assert kept.sum(1).view(3, 40).unique(dim=1).T.tolist() == [[2, 1, 2]]
    # every word is hidden now and then, the ends and the padding never
    hit = (made.ids != ids).view(3, 40, -1).any(1)
    special = torch.isin(encoder.ids(TEXTS), torch.tensor([0, 1, 2]))
    assert torch.equal(hit, ~special)


def test_the_loss_is_the_mean_over_the_hidden_words():
    _, made, model, words = masked()
    risk = bl.WeightedRisk(words, mask=words.mask)
    theta, x = flatten(words), torch.tensor([0, 2, 5])
    losses = risk.losses(theta, (x, made.y[x]))
    for i, loss in zip(x.tolist(), losses, strict=True):
        tokens = model.tokens(torch.tensor([3 + i]))[0]
        said = []
        for place, word in zip(made.places[i].tolist(), made.y[i].tolist(), strict=True):
            if word >= 0:
                u = words.norm(F.gelu(words.transform(tokens[place])))
                said.append(F.cross_entropy(words.decoder @ u + words.bias, torch.tensor(word)))
        assert torch.allclose(loss, torch.stack(said).mean(), atol=1e-5)


def test_remembered_or_not_the_logits_are_the_same():
    _, made, _, words = masked()
    again = text.MaskedWords(words.classifier, made, None)
    again.load_state_dict({**words.state_dict(), "ids": made.ids})
    assert not any(name.startswith("head") for name, _ in words.named_parameters())
    x = torch.arange(len(made.ids))
    assert torch.allclose(words(x), again(x), atol=1e-5)
    assert torch.equal(words.mask((x, None)), again.mask((x, None)))
    assert not any(p is words.decoder for p in words.parameters())  # frozen, and no factor


def test_words_belong_to_the_table_that_they_were_made_of():
    encoder, made, model, words = masked()
    x = torch.arange(2)
    copies = copy.deepcopy(words), pickle.loads(pickle.dumps(words))
    assert all(torch.equal(one(x), words(x)) for one in copies)
    for first in (0, 4, 100):  # none of them, one later, behind the end
        with pytest.raises(ValueError, match=f"first: got {first}, but the classifier does not"):
            text.MaskedWords(model, made, first)
    bare = text.TextClassifier(encoder, 3, 1)
    with pytest.raises(ValueError, match="first: got 3, .* call classifier.remember"):
        text.MaskedWords(bare, made, 3)
    model.remember(encoder.ids(TEXTS))
    for call in (lambda: words(x), lambda: words.mask((x, None))):
        with pytest.raises(ValueError, match="classifier: has remembered other texts since"):
            call()
    assert torch.equal(copies[0](x), copies[1](x))  # with tables of their own


def test_the_head_learns_and_the_encoder_stays():
    _, made, model, words = masked(copies=8)
    before = flatten(model).clone()
    uniform = float(torch.log(torch.tensor(float(len(made.vocabulary)))))
    words.fit(made.y, 1, torch.Generator().manual_seed(0), lr=1e-12)
    counts = made.y[made.y >= 0].bincount(minlength=len(words.bias)) + 1.0
    assert torch.allclose(words.bias, (counts / counts.sum()).log().to(words.bias))  # how often
    loss = words.fit(made.y, 400, torch.Generator().manual_seed(0), lr=1e-2)
    assert loss < 0.6 * uniform and torch.equal(flatten(model), before)
    with torch.no_grad():
        risk = bl.WeightedRisk(words)
        x = torch.arange(len(made.y))
        kept = (made.y >= 0).sum(1)
        mean = (risk.losses(flatten(words), (x, made.y)) * kept).sum() / kept.sum()
    assert abs(float(mean) - loss) < 0.3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"copies": 0}, "copies: got 0, expected an integer of at least 1"),
        ({"share": 1.0}, "share: got 1.0, expected a number between 0 and 1"),
    ],
)
def test_masks_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        text.hide(text.tiny(), TEXTS, torch.Generator(), **given)


def test_without_a_mask_or_words_nothing_can_be_hidden(monkeypatch):
    encoder = text.tiny()
    encoder.tokenizer.mask_token_id = None
    with pytest.raises(ValueError, match=r"encoder: the tokenizer of tiny has no \[MASK\]"):
        text.hide(encoder, TEXTS, torch.Generator())
    encoder = text.tiny()
    monkeypatch.setattr(encoder.tokenizer, "all_special_ids", tuple(range(500)), raising=False)
    with pytest.raises(ValueError, match="texts: number 0 has no word that could be hidden"):
        text.hide(encoder, TEXTS, torch.Generator())


# ---------------------------------------------------------------- the inner loss


def small(kind="network", texts=6, dtype=torch.float64, **given):
    """The toy task on a few texts, an encoder of 8 numbers a token, in float64."""
    s = Pretraining.settings(
        weights=kind, texts=texts, copies=1, head_steps=20, hidden=3, batch_size=4,
        curvature_batch_size=4, cross_batch_size=4, words_batch_size=4, outer_batch_size=4, **given
    )  # fmt: skip
    with job.float32():
        task = Pretraining.make(s, CPU)
    for module in (task.model, task.words, task.net):
        module.to(dtype)
    task.lam0 = task.lam0.to(dtype)
    return task.on(kind), s


def tangled(slope=True, l2=0.02, free=("output.dense",)):
    """Two losses on one small encoder of which one matrix trains, both heads too; float64."""
    encoder = text.tiny(layers=2, width=4, heads=2, words=40)
    made = text.hide(encoder, TEXTS, torch.Generator().manual_seed(1), 2, 0.3)
    draws = torch.Generator().manual_seed(0)
    model = text.TextClassifier(encoder, 3, 1, generator=draws)
    words = text.MaskedWords(model, made, None, draws).double()
    for name, p in model.encoder.named_parameters():
        ours = name.startswith("encoder.layer.1.") and any(part in name for part in free)
        p.requires_grad_(ours and "attention" not in name)
    net = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))
    net = net.double()

    def weight(lam, batch, losses):
        return 2 * predict(net, lam, losses[:, None] / 3).sigmoid().squeeze(1)

    aux = bl.WeightedRisk(words, weight=weight, weight_slope=slope, mask=words.mask)
    risk = bl.SumOfRisks([bl.WeightedRisk(model, mask=model.mask), aux], l2=l2)
    f = bl.SumOfRisks([bl.WeightedRisk(model)], model=risk.model)
    ids, y = encoder.ids(TEXTS), torch.tensor([0, 1, 2])
    copies = torch.arange(len(made.y))
    batch = ((ids, y, torch.arange(3)), (copies, made.y, copies))
    outer = ((ids.flip(0), torch.tensor([1, 1, 0]), torch.arange(3)),)
    start = 0.5 * torch.randn(7, generator=draws).double()
    return bl.BilevelProblem(risk, f), start, flatten(risk.model), batch, outer


def field(problem, lam, theta, batch, create=False):
    theta = theta.requires_grad_()
    g = problem.inner_loss(lam, theta, batch)
    return torch.autograd.grad(g, theta, create_graph=create)[0]


def curvature_of(problem, lam, theta, batch):
    """The dense Jacobian of the field that inner steps follow, V' in it, by differences."""
    eps, rows = 1e-6, []
    for e in torch.eye(len(theta), dtype=theta.dtype):
        up, down = (field(problem, lam, (theta + k * eps * e).detach(), batch) for k in (1, -1))
        rows.append((up - down) / (2 * eps))
    return torch.stack(rows, 1)


def test_the_hypergradient_is_that_of_the_field_that_inner_steps_follow():
    """H and J by differences of the field, at any theta; the solved problem is in the chapter."""
    problem, lam, theta, batch, outer = tangled(l2=0.05)
    h = curvature_of(problem, lam, theta, batch)
    assert torch.allclose(h, h.T, atol=1e-6)  # with V' in it, the field has a potential
    eps, rows = 1e-6, []
    for e in torch.eye(len(lam)).double():
        up, down = (field(problem, lam + k * eps * e, theta, batch) for k in (1, -1))
        rows.append((up - down) / (2 * eps))
    here = theta.clone().requires_grad_()
    (b,) = torch.autograd.grad(problem.outer_loss(lam, here, outer), here)
    truth = -torch.stack(rows) @ torch.linalg.solve(h, b)
    at = {"inner_batch": batch, "outer_batch": outer}
    ours = bl.hypergradient(problem, lam, theta.detach(), solver=bl.Direct(), **at)
    assert truth.norm() > 1e-5 and (ours - truth).norm() < 1e-4 * truth.norm()
    # without V' in H it is another one: the test would see it
    other = bl.hypergradient(
        tangled(slope=False, l2=0.05)[0], lam, theta.detach(), solver=bl.Direct(), **at
    )
    assert (other - truth).norm() > 1e-2 * truth.norm()


def test_the_factors_of_the_two_losses_are_those_by_hand():
    """Empirical Fisher: V_i of each text in B, A over tokens that are no padding, sums of both."""
    problem, lam, theta, batch, _ = tangled(slope=False, l2=0.0)
    risk = problem.inner_loss
    found = kfac_factors(risk, lam, theta, batch, "empirical", bias="joint")
    name = next(n for n in found if n.endswith("output.dense"))
    a_sum, b_sum = 0.0, 0.0
    for term in risk.terms(lam, batch):
        model, own = term.risk.model, term.read(theta)
        layer = next(m for n, m in model.named_modules() if n.endswith("1.output.dense"))
        seen = {}
        hook = layer.register_forward_hook(
            lambda m, x, out, seen=seen: seen.update(x=x[0], out=out)
        )
        losses = term.risk.losses(own.detach().requires_grad_(), term.batch)
        hook.remove()
        sigma = term.risk.weights(lam, term.batch, losses)
        sigma = torch.ones_like(losses) if sigma is None else sigma
        (gamma,) = torch.autograd.grad(losses.sum(), seen["out"])
        real = term.risk.unpadded(term.batch)
        a = torch.cat([seen["x"], torch.ones_like(seen["x"][..., :1])], -1)[real]
        a_sum = a_sum + a.T @ a / len(a)
        rows = gamma[real] * sigma.repeat_interleave(real.sum(1)).sqrt()[:, None]
        b_sum = b_sum + rows.T @ rows / len(losses)
    a, b = found[name]
    assert torch.allclose(a.detach(), (a_sum / 2).detach(), rtol=1e-8)
    assert torch.allclose(b.detach(), b_sum.detach(), rtol=1e-8)


def test_the_ggn_has_every_hidden_word_once_with_its_texts_weight():
    problem, lam, theta, batch, _ = tangled(l2=0.0)
    risk, theta = problem.inner_loss, theta.detach()
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(3)).double()
    total, eps = 0.0, 1e-5
    for term in risk.terms(lam, batch):
        up, logits, down = (
            term.risk.outputs(term.read(theta + k * eps * v), term.batch) for k in (1, 0, -1)
        )
        along, y, n = (up - down) / (2 * eps), term.batch[1], len(term.batch[1])
        losses = term.risk.losses(term.read(theta), term.batch)
        sigma = term.risk.weights(lam, term.batch, losses)
        slope = term.risk.weight_slopes(lam, term.batch, losses)
        for i in range(n):
            z, u, words = (part[i].reshape(-1, *rest) for part, rest in (
                (logits, logits.shape[-1:]), (along, along.shape[-1:]), (y, ())))  # fmt: skip
            kept, change = (words >= 0).nonzero().flatten().tolist(), 0.0
            for k in kept:
                p = z[k].softmax(0)
                spread = (p * u[k] ** 2).sum() - (p * u[k]).sum() ** 2
                total += (1.0 if sigma is None else sigma[i]) * spread / len(kept) / n
                change += ((p * u[k]).sum() - u[k][words[k]]) / len(kept)
            total += 0.0 if slope is None else slope[i] * change**2 / n
    found = v @ ggn_vp(risk, lam, theta, batch, v)
    assert abs(float(found - total)) < 1e-6 * abs(float(total))


# ---------------------------------------------------------------- the task


def test_it_starts_where_both_losses_count_alike_and_batches_are_pairs(float32):
    task, s = small(dtype=torch.float32)
    (x, y, index), (copy, words, at) = task.batches(s)["inner_batch"].draw()
    assert torch.equal(copy, at) and torch.equal(words, task.masked[1][copy])
    assert torch.equal(y, task.train[1][index]) and len(x) == len(copy) == 4
    ((held, labels, _),) = task.batches(s)["outer_batch"].draw()
    assert set(held.tolist()) <= set(task.validation[0].tolist()) and len(labels) == 4
    v = task.V(task.lam0, torch.linspace(1, 6, 9))
    assert float((v - 1).abs().max()) < 0.5
    fixed = task.on("fixed")
    batch = task.batches(s)["inner_batch"].draw()
    end, aux = fixed.problem.inner_loss.terms(fixed.lam0, batch)
    mean = sum(t.risk.losses(t.read(fixed.theta0), t.batch).mean() for t in (end, aux))
    assert torch.allclose(fixed.problem.inner_loss(fixed.lam0, fixed.theta0, batch), mean)
    alone = task.on("none")
    assert len(alone.theta0) < len(fixed.theta0) and len(alone.problem.inner_loss.risks) == 1
    assert not set(task.tuning[0].tolist()) & set(task.validation[0].tolist())
    on_train = Pretraining.make(Pretraining.settings(outer="train"), CPU)
    assert torch.equal(on_train.validation[0], on_train.train[0])


def test_a_loss_is_measured_against_that_of_a_guess(float32):
    task, _ = small(dtype=torch.float32)
    n, lam = len(task.words.bias), torch.randn(len(task.lam0))
    losses = torch.tensor([0.5, 2.0])
    by_hand = 2 * predict(task.net, lam, (losses / torch.log(torch.tensor(1.0 * n)))[:, None])
    assert torch.allclose(task.V(lam, losses), 2 * (by_hand / 2).sigmoid()[:, 0])


@pytest.mark.parametrize("kind", ["cosine"])
def test_cosines_are_those_by_hand(kind):
    task, s = small(kind)
    task.lam0 = torch.tensor([0.3, -0.2]).double()
    method = task.method(s)
    batches = {r: task.batches(s)[f"{r}_batch"].draw() for r in ("outer", "cross")}
    h, info = method._hypergradient(batches["outer"], None, batches["cross"])
    body = [p for p in task.model.encoder.parameters() if p.requires_grad]

    def along(model, batch):
        logits, y = model(batch[0]), batch[1]
        rows = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none").view(y.shape)
        kept = (y >= 0).double()
        losses = rows if y.dim() == 1 else (rows * kept).sum(1) / kept.sum(1)
        grads = torch.autograd.grad(losses.mean(), body)
        return torch.cat([g.flatten() for g in grads])

    f = along(task.model, batches["outer"][0])
    pair = [along(m, b) for m, b in zip((task.model, task.words), batches["cross"], strict=True)]
    by_hand = torch.stack([-(g @ f) / g.norm() / f.norm() for g in pair])
    assert torch.allclose(h, by_hand, atol=1e-10) and torch.isfinite(info.outer_loss)
    w = 2 * task.lam0.softmax(0)
    g = task.problem.inner_loss(task.lam0, task.theta0, batches["cross"])
    terms = task.problem.inner_loss.terms(task.lam0, batches["cross"])
    losses = [t.risk.losses(t.read(task.theta0), t.batch).mean() for t in terms]
    assert torch.allclose(g, w[0] * losses[0] + w[1] * losses[1])
    # the way down in -cos: the loss that points with f gains weight
    step = method.step()
    assert torch.allclose(method.lam, task.lam0 - 0.1 * step.hypergradient)


def test_samas_difference_has_the_derivative_of_adamws_step_and_the_weights_own_slope():
    task, s = small(method="sama", alpha=1e-4, inner_steps=2)
    method = task.method(s)
    method.step()
    twin = task.method(s)
    twin.load_state_dict(method.state_dict())
    twin.lam.copy_(method.lam)
    twin.theta.copy_(method.theta)
    lam = method.lam.clone()
    found = method.step().hypergradient
    g, f = task.problem.inner_loss, task.problem.outer_loss
    for _ in range(2):
        batch = twin._draw("inner")
        grad = field(task.problem, lam, twin.theta.clone(), batch)
        # D by differences of the optimiser's own step
        state = twin.inner_optimizer.state_dict()
        moved = []
        for k in (1e-6, -1e-6):
            theta = twin.theta.clone()
            optimizer = torch.optim.AdamW([theta], s.inner_lr, (0.9, 0.999), weight_decay=0.0)
            optimizer.load_state_dict(copy.deepcopy(state))
            theta.grad = grad + k * grad.abs().clamp(min=1e-9)
            optimizer.step()
            moved.append(theta)
        size = 2e-6 * grad.abs().clamp(min=1e-9)
        d = (moved[1] - moved[0]) / size
        known = adaptation(twin.inner_optimizer, twin.theta, grad)
        twin._move_theta(grad)
    assert torch.allclose(d, known, rtol=1e-2, atol=1e-3 * float(known.abs().max()))
    theta, lam = twin.theta.clone(), lam.requires_grad_()
    here = theta.clone().requires_grad_()
    (b,) = torch.autograd.grad(f(lam.detach(), here, twin._draw("outer")), here)
    v, term = (known * b).detach(), g.terms(lam, batch)[1]
    slopes, _ = slopes_and_route(term.risk, term.read(theta), term.batch, term.read(v))
    losses = term.risk.losses(term.read(theta), term.batch).detach().requires_grad_()
    value = task.V(lam, losses)
    (mine,) = torch.autograd.grad((value * slopes).mean(), lam, retain_graph=True)
    # J v is that; SAMA's difference is of grad_lam g, whose weights see the shifted losses
    (dv,) = torch.autograd.grad((slopes.detach() * value).sum(), losses, create_graph=True)
    (more,) = torch.autograd.grad((losses.detach() * dv).mean(), lam)
    assert torch.allclose(found, -(mine + more), rtol=1e-4, atol=1e-6 * float(found.norm()))
    assert float((found + mine).norm()) > 1e-2 * float(mine.norm())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "imdb"}, "dataset: got 'imdb', expected .*sciie"),
        ({"weights": "some"}, "weights: got 'some', expected .*cosine"),
        ({"outer": "test"}, "outer: got 'test', expected .*held_out"),
        ({"layers": "0"}, "layers: got '0', expected a number of layers, 'half' or 'all'"),
        ({"max_length": 2}, "max_length: got 2, expected an integer of at least 3"),
        ({"texts": 121}, "texts: got 121, expected 1 to 120, or 0 for all"),
        ({"copies": 0}, "copies: got 0, expected an integer of at least 1"),
        ({"masked": 0.0}, "masked: got 0.0, expected a number between 0 and 1"),
        ({"head_steps": -1}, "head_steps: got -1, expected an integer of at least 0"),
        ({"hidden": 0}, "hidden: got 0, expected an integer of at least 1"),
        ({"tuning_share": 1.0}, "tuning_share: got 1.0, expected between 0 and 1"),
        ({"tuning_share": 0.01}, "tuning_share: got 0.01, which leaves 40 of toy's 40 development"),
        ({"outer_batch_size": 21}, "outer_batch_size: got 21, expected 1 to 20, or 0 for all 20"),
        ({"words_batch_size": 121}, "words_batch_size: got 121, expected 1 to 120"),
        ({"kept_in": "int8"}, "kept_in: got 'int8', expected .*float16"),
        ({"weights": "cosine", "method": "sama"}, "method: got 'sama' with weights='cosine'"),
    ],
)
def test_settings_out_of_range_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Pretraining.settings(**given)


def test_all_layers_train_without_a_table(float32):
    s = Pretraining.settings(layers="all", texts=20, copies=1, head_steps=5, batch_size=8,
                             curvature_batch_size=8, cross_batch_size=8)  # fmt: skip
    task = Pretraining.make(s, CPU)
    assert task.words.first is None and task.train[0].dim() == 2
    method = task.method(s)
    assert torch.isfinite(method.step().hypergradient).all()
    names = [name for name, _ in task.words.named_parameters()]
    assert any("word_embeddings" in name for name in names)  # they train; the decoder is a copy
    assert torch.equal(
        task.words.decoder,
        text.tiny().module.get_input_embeddings().weight[task.words.vocabulary].detach(),
    )


def test_an_encoder_that_is_not_there_is_named(float32):
    with pytest.raises(ValueError, match="encoder: place: the folder .* holds no model"):
        Pretraining.make(Pretraining.settings(encoder=str(Path(__file__).parent)), CPU)


def test_macro_f1_by_hand():
    guess, y = torch.tensor([0, 0, 1, 3, 1]), torch.tensor([0, 1, 1, 1, 1])
    # class 0: 2 / (2 + 1), class 1: 4 / (2 + 4), class 3: guessed once, never true; 2: neither
    assert abs(tasks.macro_f1(guess, y) - (2 / 3 + 2 / 3 + 0) / 3) < 1e-12


@pytest.mark.parametrize("weights", ["network", "cosine", "frozen", "fixed", "none"])
def test_what_is_not_learned_stays_and_what_is_moves(weights, float32):
    task, s = small(weights, dtype=torch.float32)
    method = task.method(s)
    for _ in range(2):
        method.step()
    moved = not torch.equal(method.lam, task.lam0)
    assert moved == (weights in ("network", "cosine"))
    row = task.measure(method.lam, method.theta)
    assert task.judge(method.lam, method.theta) == row["tuning_loss"]
    assert row["tuning_accuracy"] != row["tuning_f1"]  # macro


def test_a_run_from_the_command_line(tmp_path, capsys):
    words = ["run", "pretraining", "--device", "cpu", "--set", "outer_steps=4", "texts=30"]
    words += ["evaluate_every=2", "inner_steps=2", "head_steps=20"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    for line in ("end task alone", "fixed weights", "V as it was drawn", "network, aid-kfac"):
        assert line in said
    assert "one of 60 test texts is 1.67 points of accuracy" in said
    result = json.loads((tmp_path / "one" / "result.json").read_text("utf-8"))
    assert result["sizes"]["copies"] == 60 and len(result["weighing"]["weights"]) == 3


@pytest.mark.parametrize("weights, method", [("network", bl.SAMA), ("cosine", Cosines)])
def test_a_run_is_resumed_to_the_last_digit(weights, method, tmp_path, monkeypatch, capsys):
    words = ["run", "pretraining", "--device", "cpu", "--seed", "1", "--set", f"weights={weights}"]
    words += ["outer_steps=4", "texts=30", "evaluate_every=2", "inner_steps=2", "head_steps=20"]
    words += ["--method", "sama"] if weights == "network" else []
    whole, shown = stopped_and_resumed(words, tmp_path, monkeypatch, capsys, method, at=3)
    assert "end task alone" in shown and len(whole["history"]) == 2


def test_the_study_has_both_judges_and_the_papers_numbers(tmp_path, capsys):
    rows = {row.name: row for row in pretraining_study.variants("sciie", "")}
    for name in pretraining_study.SOLVERS:
        assert rows[name].settings["outer"] == "held_out"
        assert rows[f"{name}-on-train"].settings["outer"] == "train"
    searched = {row.name for row in rows.values() if row.space}
    assert searched == set(rows) - {*pretraining_study.RIVALS, "fixed-scrambled", "cosine"}
    assert {tuple(row.space.items()) for row in rows.values() if row.space} == {
        tuple(pretraining_study.BOX.items())
    }
    words = ["study", "pretraining", "--dataset", "toy", "--encoder", "tiny", "--device", "cpu"]
    words += ["--at", "outer_lr=0.01", "--outer-steps", "2", "--looks", "1", "--seeds", "1"]
    words += ["--texts", "40", "--only", "fixed", "kfac-empirical", "kfac-empirical-on-train"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    stored = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    figure = Pretraining.draw({"kind": stored["kind"], "runs": [stored]})[""]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "fixed", "kfac-empirical", "kfac-empirical-on-train",
    ]  # fmt: skip


def test_scrambled_texts_keep_their_lengths_and_no_order():
    texts = [f"a{k} b{k} c{k} d{k}"[: 3 * (1 + k % 4)] for k in range(40)]
    drawn = scrambled(texts, torch.Generator().manual_seed(3))
    assert [len(one.split()) for one in drawn] == [len(one.split()) for one in texts]
    assert {*" ".join(drawn).split()} < {*" ".join(texts).split()} and drawn != texts
    assert drawn == scrambled(texts, torch.Generator().manual_seed(3))
    plain, other = (
        Pretraining.make(Pretraining.settings(texts=30, head_steps=0, masked_texts=kind), CPU)
        for kind in ("own", "scrambled")
    )
    assert len(plain.masked[1]) == len(other.masked[1])
    assert not torch.equal(plain.masked[1], other.masked[1])
    for one, two in ((plain.train, other.train), (plain.tuning, other.tuning)):
        assert torch.equal(one[1], two[1])


def test_what_chapter_14_says_of_chemprot():
    rows, kfac = fresh("pretraining_chemprot"), "kfac-empirical-on-train"
    table = ("none", "fixed", "sama-on-train", kfac)
    assert all([run["seed"] for run in rows[name]["runs"]] == [1, 2] for name in table)
    means = [50 * sum(run["best"]["test_f1"] for run in rows[name]["runs"]) for name in table]
    assert means == pytest.approx([62.2, 62.6, 62.3, 62.7], abs=0.06)
    for one, other, best, last in (
        ("fixed", "none", (1.4, -0.7), (0.3, -0.9)), (kfac, "fixed", (0.2, 0.1), (0.2, 0.6)),
        (kfac, "sama-on-train", (0.3, 0.6), (0.3, 0.35)),
    ):  # fmt: skip
        for at, said in (("best", best), ("last", last)):
            found = difference(rows[one], rows[other], "test_f1", at)[0]
            assert [100 * value for value in found] == pytest.approx(said, abs=0.06)
    _, middle, half = difference(rows[kfac], rows["sama-on-train"], "test_f1", "last")
    assert (100 * middle, 100 * half) == pytest.approx((0.34, 0.2), abs=0.03)
    falls = [
        100 * (rows[name]["runs"][0][at]["test_f1"] - rows[name]["runs"][1][at]["test_f1"])
        for name in table for at in ("best", "last")
    ]  # fmt: skip
    assert 1.6 < min(falls) < max(falls) < 4.4


def test_what_chapter_14_says_of_scierc():
    rows = fresh("pretraining_sciie")
    assert len(rows) == 11 and all(
        [r["seed"] for r in row["runs"]] == [1, 2, 3] for row in rows.values()
    )
    runs = [run for row in rows.values() for run in row["runs"]]
    for key, low, high in (("test_accuracy", 53.5, 63.5), ("test_f1", 18, 37)):
        found = [100 * run[at][key] for run in runs for at in ("best", "last")]
        assert low < min(found) < max(found) < high
    moves = [
        abs(one["test_f1"] - other["test_f1"])
        for run in runs
        for one, other in zip(run["history"], run["history"][1:], strict=False)
    ]
    assert 100 * max(moves) == pytest.approx(17.5, abs=0.1)
    third = [row["runs"][2] for name, row in rows.items() if name != "fixed-scrambled"]
    assert all(100 * run["best"]["test_f1"] > 34.5 for run in third)
    assert all(18 < 100 * run["last"]["test_f1"] < 25.5 for run in third)

    def less(one, other, at):
        pairs = zip(rows[one]["runs"], rows[other]["runs"], strict=True)
        return [100 * (a[at]["test_f1"] - b[at]["test_f1"]) for a, b in pairs]

    kfac = "kfac-empirical"
    assert less(kfac, "fixed", "best") == pytest.approx([0.8, -1.2, 0.4], abs=0.06)
    assert less(kfac, "none", "best") == pytest.approx([-0.2, -5.1, 0.0], abs=0.06)
    for one, other in (("fixed", "none"), (kfac, "none"), (kfac, "fixed"), (kfac, "frozen"),
                       (kfac, f"{kfac}-on-train"), (kfac, "sama")):  # fmt: skip
        both = less(one, other, "best") + less(one, other, "last")
        assert min(both) < 0 < max(both)
    for one, other, at, said in (
        ("fixed", "fixed-scrambled", "best", (-0.8, 8.3)),
        ("fixed", "fixed-scrambled", "last", (-0.9, 12.3)),
        (f"{kfac}-on-train", "none", "best", (-1.3, 0.9)),
        (f"{kfac}-on-train", "sama-on-train", "last", (1.1, 0.5)),
    ):
        found = difference(rows[one], rows[other], "test_f1", at)[1:]
        assert [100 * x for x in found] == pytest.approx(said, abs=0.06)
    middle = {
        name: [run["weighing"]["weights"][1] for run in row["runs"]]
        for name, row in rows.items() if "sama" in name or "identity" in name or kfac in name
    }  # fmt: skip
    for name in ("identity", kfac):
        pairs = zip(middle[f"{name}-on-train"], middle[name], strict=True)
        assert all(train > held for train, held in pairs)
        assert all(1.1 < w < 1.65 for w in middle[f"{name}-on-train"])
        assert all(0.85 < w < 1.35 for w in middle[name])
    assert all(0.95 < w < 1.25 for name in ("sama", "sama-on-train") for w in middle[name])


@real
def test_looking_texts_up_has_the_scores_that_the_chapter_says():
    found = {}
    for name in TABLE:
        d = pretraining.load(name, download=False)
        most = int(d.train.y.bincount().argmax())
        known = {one.strip(): int(y) for one, y in zip(d.train.texts, d.train.y, strict=True)}
        guess = torch.tensor([known.get(one.strip(), most) for one in d.test.texts])
        right = float((guess == d.test.y).double().mean())
        found[name] = round(100 * right, 1), round(100 * tasks.macro_f1(guess, d.test.y), 1)
    assert found["hyperpartisan"] == (90.8, 90.1) and found["citation_intent"] == (61.2, 46.6)


def test_what_chapter_14_says_of_the_stored_study():
    rows = fresh("pretraining_citation_intent")
    assert len(rows) == 11 and all(
        [r["seed"] for r in row["runs"]] == [1, 2, 3] for row in rows.values()
    )

    def less(one, other, at):
        pairs = zip(rows[one]["runs"], rows[other]["runs"], strict=True)
        return [100 * (a[at]["test_f1"] - b[at]["test_f1"]) for a, b in pairs]

    kfac = "kfac-empirical"
    for other, chosen, end in (
        ("fixed", (1.9, -1.7, 4.0), (-3.3, -5.8, -3.2)),
        ("frozen", (-1.9, 0.2, -2.4), (-0.5, -0.5, -3.7)),
        (f"{kfac}-on-train", (-5.3, 1.7, 3.4), (2.5, 1.2, -0.4)),
    ):  # fmt: skip
        assert less(kfac, other, "best") == pytest.approx(chosen, abs=0.06)
        assert less(kfac, other, "last") == pytest.approx(end, abs=0.06)
    assert less("fixed", "fixed-scrambled", "best") == pytest.approx((-3.7, 4.0, -6.7), abs=0.06)
    assert less("fixed", "fixed-scrambled", "last") == pytest.approx((0.4, 3.7, 11.0), abs=0.06)
    fixed = {*pretraining_study.RIVALS, "fixed-scrambled", "cosine"}
    learned = [name for name in rows if name not in fixed]
    ends = [100 * run["last"]["test_f1"] for name in learned for run in rows[name]["runs"]]
    assert 52 < min(ends) < max(ends) < 65.5
    plain = [100 * run["last"]["test_f1"] for run in rows["none"]["runs"]]
    assert plain == pytest.approx((62, 62, 50), abs=0.5)
    before = next(look for look in rows["none"]["runs"][2]["history"] if look["iteration"] == 35)
    lost = before["test_accuracy"] - rows["none"]["runs"][2]["last"]["test_accuracy"]
    assert 139 * lost == pytest.approx(10, abs=0.01)
    assert less("fixed", "none", "last") == pytest.approx((0.1, 1.6, 9.7), abs=0.06)
    pairs = [("fixed", "none"), ("fixed", "fixed-scrambled"), (kfac, "none"), (kfac, "fixed")]
    pairs += [(kfac, other) for other in ("frozen", f"{kfac}-on-train", "identity", "sama")]
    pairs += [(f"{kfac}-on-train", other) for other in ("none", "fixed", "sama-on-train")]
    assert len(pairs) == 11
    decided = {}
    for one, other in pairs:
        for at in ("best", "last"):
            _, middle, half = difference(rows[one], rows[other], "test_f1", at)
            if abs(middle) > half:
                decided[one, other, at] = 100 * middle, 100 * half
    assert decided == {
        (kfac, "fixed", "last"): pytest.approx((-4.1, 3.7), abs=0.06),
        (kfac, "identity", "last"): pytest.approx((-1.6, 0.5), abs=0.06),
    }
    runs = [run for row in rows.values() for run in row["runs"]]
    falls = [
        100 * (r[at]["test_f1"] - r[at]["test_new_f1"]) for r in runs for at in ("best", "last")
    ]
    assert 3 < min(falls) < max(falls) < 22
    for at, said in (("best", (1.4, 13.2)), ("last", (-5.2, 5.4))):
        found = difference(rows[f"{kfac}-on-train"], rows["fixed"], "test_f1", at)[1:]
        assert [100 * x for x in found] == pytest.approx(said, abs=0.06)
    for at, said in (("best", (-2.1, 13.8)), ("last", (5.0, 13.5))):
        found = difference(rows["fixed"], rows["fixed-scrambled"], "test_f1", at)[1:]
        assert [100 * x for x in found] == pytest.approx(said, abs=0.06)
    texts = difference(rows[kfac], rows["fixed"], "test_accuracy", "last")
    assert [139 * x for x in texts[0]] == pytest.approx([0, -3, -3], abs=0.01)
    assert texts[2] > abs(texts[1])
    early = [sum(run["best"]["iteration"] < look["iteration"] for look in run["history"]
                 if look["test_f1"] == max(one["test_f1"] for one in run["history"])) > 0
             for run in runs]  # fmt: skip
    assert (sum(early), len(early)) == (30, 33)
    for look, said in ((1, (-12.2, 23.9)), (2, (-8.4, 16.6)), (3, (-5.2, 14.2)), (4, (3.3, 5.1))):
        both = {
            name: {"runs": [{"seed": r["seed"], "best": r["history"][look]}
                            for r in rows[name]["runs"]]}
            for name in ("fixed", "none")
        }  # fmt: skip
        assert both["none"]["runs"][0]["best"]["iteration"] == 5 * (look + 1)
        each, *found = difference(both["fixed"], both["none"], "test_f1")
        assert [100 * x for x in found] == pytest.approx(said, abs=0.06)
        assert all((one < 0) == (look < 4) for one in each)
    for name, said in (("pretraining_citation_intent", (-0.24, 0.53)),
                       ("pretraining_sciie", (0.37, 0.36))):  # fmt: skip
        middles = [
            {"runs": [{"seed": r["seed"], "best": {"V": r["weighing"]["weights"][1]}}
                      for r in fresh(name)[row]["runs"]]}
            for row in (f"{kfac}-on-train", kfac)
        ]  # fmt: skip
        assert difference(*middles, "V")[1:] == pytest.approx(said, abs=6e-3)
    for at, texts in (("best", [3, 1, 0]), ("last", [2, -2, -2])):  # of 139 in the test set
        pairs = zip(rows[kfac]["runs"], rows["frozen"]["runs"], strict=True)
        ahead = [
            139 * (mine[at]["test_accuracy"] - other[at]["test_accuracy"]) for mine, other in pairs
        ]
        assert ahead == pytest.approx(texts, abs=0.01)
