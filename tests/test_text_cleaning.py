"""Texts with weak labels, the vote, the task that weighs them, its study."""

import json
import os
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from together import timeless

import bilevel_lite as bl
from bilevel_lite.__main__ import main
from bilevel_lite.data import DataError, WeakTexts, majority, wrench
from bilevel_lite.drawings import ch12
from bilevel_lite.experiment import job, methods
from bilevel_lite.params import predict
from bilevel_lite.tasks import (
    studies,
    text_cleaning,
    text_figures,
    text_study,
    text_variants,
)
from bilevel_lite.tasks.exact_ggn import ExactGGN
from bilevel_lite.tasks.text_cleaning import TextCleaning

pytest.importorskip("transformers")
CPU = torch.device("cpu")
REAL = Path(os.environ.get("BILEVEL_LITE_DATA", "")) / "wrench"
real = pytest.mark.skipif(not (REAL / "trec").is_dir(), reason="no local WRENCH")


@pytest.fixture
def float32():
    with job.float32():
        yield


# ---------------------------------------------------------------- the vote


def by_hand(weak, classes):
    """For each text the classes with the most votes; all of them where nobody votes."""
    out = []
    for row in weak.tolist():
        counts = Counter(vote for vote in row if vote >= 0)
        most = max(counts.values(), default=0)
        out.append([c for c in range(classes) if counts[c] == most])
    return out


# What is published of the sets (sizes), and what was measured of them: covered, %,
# ties among them, accuracy of the vote in % if the first class wins, if ties are drawn, and if only
# covered texts count.
TABLE = {
    "trec": (6, (5033, 500, 500), 68, 95.2, 719, (48.7, 51.9, 53.7)),
    "semeval": (9, (1749, 178, 600), 164, 100.0, 199, (85.0, 79.9, 79.9)),
    "youtube": (2, (1586, 120, 250), 10, 87.7, 233, (79.9, 81.7, 86.1)),  # 1268 of 1586
}


@real
@pytest.mark.parametrize("name", TABLE)
def test_the_sets_and_their_votes_are_those_of_the_table(name):
    classes, sizes, functions, covered, ties, accuracy = TABLE[name]
    d = bl.data.load(name, download=False)
    assert isinstance(d, WeakTexts) and d.source == "" and len(d.classes) == classes
    assert tuple(len(part.texts) for part in (d.train, d.valid, d.test)) == sizes
    t, n = d.train, sizes[0]
    assert t.weak.shape == (n, functions)
    spoken = (t.weak != -1).any(1)
    assert round(100 * spoken.double().mean().item(), 1) == covered
    tied = by_hand(t.weak, classes)
    assert sum(len(some) > 1 for some, any_ in zip(tied, spoken, strict=True) if any_) == ties
    # a draw among the tied classes is right with this probability
    right = [
        Fraction(int(y in some), len(some)) for some, y in zip(tied, t.y.tolist(), strict=True)
    ]
    seen = [p for p, any_ in zip(right, spoken, strict=True) if any_]
    first = majority(t.weak, classes)
    assert first.tolist() == [some[0] for some in tied]
    found = ((first == t.y).double().mean(), sum(right) / n, sum(seen) / len(seen))
    assert tuple(round(100 * float(value), 1) for value in found) == accuracy
    if name == "semeval":  # chapter 12: of its ties the first class gets so many right
        of_ties = [
            bool(got == y)
            for got, y, some, any_ in zip(first, t.y, tied, spoken, strict=True)
            if any_ and len(some) > 1
        ]
        assert round(100 * sum(of_ties) / ties) == 93
    # the draws: within four standard deviations of what is expected of them, and tied classes only
    drawn = majority(t.weak, classes, "drawn", generator=torch.Generator().manual_seed(1))
    assert all(y in some for y, some in zip(drawn.tolist(), tied, strict=True))
    variance = float(sum(p * (1 - p) for p in right))
    assert abs(int((drawn == t.y).sum()) - float(sum(right))) < 4 * variance**0.5


@real
def test_the_authors_labels_of_trec_are_the_vote_in_which_the_first_class_wins():
    d = bl.data.load("trec", download=False)
    theirs = np.load(REAL / "trec" / "hard_labels.npy", allow_pickle=False)
    assert np.array_equal(majority(d.train.weak, 6, "first").numpy(), theirs)
    assert not np.array_equal(majority(d.train.weak, 6, "drawn").numpy(), theirs)


@real
def test_where_the_wrong_labels_of_trec_come_from():
    # what chapter 12 says of them
    d = bl.data.load("trec", download=False)
    weak, y, desc = d.train.weak, d.train.y, d.classes.index("DESC")
    votes = (weak[..., None] == torch.arange(6)).sum(1)
    first = votes.argmax(1)
    bad = (first == desc) & (y != desc)
    ties = (votes == votes.max(1, keepdim=True).values).sum(1) > 1
    silent = (weak < 0).all(1)
    assert int((first != y).sum()) == 2582 and int(bad.sum()) == 2399
    assert [int((bad & k).sum()) for k in (~ties, ties & ~silent, silent)] == [1586, 667, 146]
    said = [(int((weak[:, j] == desc).sum()), j) for j in range(weak.shape[1])]
    count, rule = max(said)
    speaks = weak[:, rule] == desc
    assert count > 3000 and 0.2 < float((y[speaks] == desc).double().mean()) < 0.26
    with_what = torch.tensor(["what" in text.split() for text in d.train.texts])
    assert float(with_what[speaks].double().mean()) > 0.95


@real
def test_semevals_spans_point_at_the_entities():
    d = bl.data.load("semeval", download=False)
    entries = json.loads((REAL / "semeval" / "test.json").read_text("utf-8"))
    rows = zip(d.test.texts, d.test.spans, entries.values(), strict=True)
    for text, (first, second), entry in rows:
        assert text[slice(*first)] == entry["data"]["entity1"]
        assert text[slice(*second)] == entry["data"]["entity2"]
    assert bl.data.load("youtube", download=False).train.spans == []


def test_a_draw_is_fair_and_decides_among_equals_only():
    weak = torch.tensor([[0, 2, -1, -1], [1, 1, 2, -1]]).repeat(10_000, 1)
    labels = majority(weak, 4, "drawn", generator=torch.Generator().manual_seed(0)).view(-1, 2)
    assert set(labels[:, 1].tolist()) == {1}
    assert set(labels[:, 0].tolist()) == {0, 2}
    assert abs(int((labels[:, 0] == 0).sum()) - 5000) < 4 * 50  # sd 50
    again = majority(weak, 4, "drawn", generator=torch.Generator().manual_seed(0)).view(-1, 2)
    assert torch.equal(labels, again)


def test_texts_that_no_function_speaks_about():
    weak = torch.tensor([[-1, -1], [2, -1]])
    assert majority(weak, 3).tolist() == [0, 2]  # a tie of all classes at zero votes
    assert majority(weak, 3, uncovered="abstain").tolist() == [-1, 2]
    assert majority(weak, 3, uncovered=1).tolist() == [1, 2]
    drawn = majority(torch.cat([weak[:1].repeat(3000, 1), weak[1:]]), 3, "drawn")[:-1]
    assert all(abs(int((drawn == c).sum()) - 1000) < 4 * 26 for c in range(3))  # sd 25.8


@pytest.mark.parametrize(
    ("weak", "more", "message"),
    [
        (
            torch.tensor([[3, 0]]),
            {},
            r"weak: names \[3\], expected -1 \(abstains\) or a class from",
        ),
        (torch.tensor([[-2, 0]]), {}, r"weak: names \[-2\]"),
        (torch.tensor([0, 1]), {}, r"weak: got shape \(2,\)"),
        (torch.zeros(2, 2), {}, "weak: got shape .* and dtype torch.float64, expected integers"),
        (torch.full((2, 2), -1), {}, "weak: no text has a weak label, so there is nothing to vote"),
        (torch.zeros(2, 2).long(), {"ties": "last"}, "ties: got 'last', expected 'first' or 'dra"),
        (torch.zeros(2, 2).long(), {"uncovered": 3}, "uncovered: got 3, expected 'tie', 'abstain'"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(weak, more, message):
    with pytest.raises(ValueError, match=message):
        majority(weak, 3, **more)


# ---------------------------------------------------------------- files


def entry(label=0, text="what is it ?", weak=(0, -1), **spans):
    return {"label": label, "data": {"text": text, **spans}, "weak_labels": list(weak)}


def folder(path, **parts):
    path.mkdir(exist_ok=True)
    for name in ("train", "valid", "test"):
        rows = parts.get(name, {"a": entry(), "b": entry(1, "who is it ?", (1, 1))})
        (path / f"{name}.json").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    (path / "label.json").write_text(json.dumps(parts.get("label", {"0": "THING", "1": "HUM"})))
    return path


def test_a_folder_of_ones_own(tmp_path):
    d = wrench.read(folder(tmp_path / "mine"))
    assert d.name == "mine" and d.source == "mine, a set of one's own"
    assert d.classes == ["THING", "HUM"] and d.train.texts == ["what is it ?", "who is it ?"]
    assert d.train.y.tolist() == [0, 1] and d.train.weak.tolist() == [[0, -1], [1, 1]]


def test_spans_are_read(tmp_path):
    rows = {"a": entry(span1=[0, 4], span2=[5, 7]), "b": entry(span1=[8, 10], span2=[0, 4])}
    d = wrench.read(folder(tmp_path / "mine", train=rows))
    assert d.train.spans == [((0, 4), (5, 7)), ((8, 10), (0, 4))] and d.test.spans == []


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"train": {"a": entry(text="  ")}}, "train.json: the text of entry 'a' is empty; leave"),
        ({"valid": {"a": entry(2)}}, "valid.json: entry 'a' has label 2, expected 0 to 1"),
        ({"test": {"a": entry(weak=(5, 0))}}, "entry 'a' has the weak label 5, expected -1"),
        (
            {"train": {"a": entry(), "b": entry(weak=(0,))}},
            "'b' has 1 weak labels, the first has 2",
        ),
        ({"train": {"a": entry(weak=(0,))}}, r"train, valid and test have \[1, 2, 2\] labelling"),
        ({"train": {"a": {"text": "x"}}}, "entry 'a' is not of the form"),
        ({"train": {"a": entry(True)}}, "entry 'a' has label True, expected 0 to 1"),
        ({"train": {"a": entry(weak=(0.0, 1))}}, "entry 'a' has the weak label 0.0, expected -1"),
        ({"train": {"a": entry(weak=(0, False))}}, "entry 'a' has the weak label False, expect"),
        ({"train": {"a": entry(weak=(0, [1]))}}, r"entry 'a' has the weak label \[1\], expected"),
        ({"label": {"0": 1, "1": 2}}, "label.json: names a class 1, expected a string"),
        (
            {"train": {"a": entry(span1=[0, 4])}},
            r"'a' has the spans \[0, 4\] and None, expected two",
        ),
        (
            {"train": {"a": entry(span2=[0, 4])}},
            r"'a' has the spans None and \[0, 4\], expected two",
        ),
        ({"train": {"a": entry(span1=[0], span2=[0, 4])}}, r"'a' has the spans \[0\] and \[0, 4\]"),
        ({"train": {"a": entry(span1=3, span2=[0, 4])}}, r"'a' has the spans 3 and \[0, 4\], exp"),
        (
            {"train": {"a": entry(span1=[0, 4], span2=[0, 99])}},
            r"and \[0, 99\], expected two pairs",
        ),
        (
            {"train": {"a": entry(), "b": entry(span1=[0, 4], span2=[5, 7])}},
            "train.json: up to entry 'b' some have spans and some have none; give all or none",
        ),
        ({"train": "{"}, "train.json is damaged: not JSON"),
        ({"train": "[1]"}, "train.json: expected a dictionary of entries, got list"),
    ],
)
def test_a_folder_that_is_not_of_the_form(tmp_path, parts, message):
    with pytest.raises(DataError, match=message):
        wrench.read(folder(tmp_path / "mine", **parts))


def test_a_missing_file_and_another_content_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_LITE_DATA", str(tmp_path))
    monkeypatch.setenv("BILEVEL_LITE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="no local copy of train.json, and no download"):
        bl.data.load("trec", download=False)
    (tmp_path / "wrench").mkdir()
    folder(tmp_path / "wrench" / "trec")
    with pytest.raises(DataError, match="train.json is damaged or not the known file: its content"):
        bl.data.load("trec", download=False)
    (tmp_path / "wrench" / "trec" / "test.json").unlink()
    with pytest.raises(DataError, match="test.json is missing; expected train.json, valid.json"):
        wrench.read(tmp_path / "wrench" / "trec")
    with pytest.raises(ValueError, match="dataset: got 'imdb', expected one of"):
        bl.data.load("imdb")


@real
def test_a_copy_with_other_blanks_and_ids_is_the_same_set(tmp_path, monkeypatch):
    target = tmp_path / "wrench" / "youtube"
    shutil.copytree(REAL / "youtube", target)
    for path in target.glob("*.json"):
        path.chmod(0o644)
    rows = json.loads((target / "train.json").read_text("utf-8"))
    rows = {f"x{key}": dict(reversed(row.items())) for key, row in rows.items()}
    (target / "train.json").write_text(json.dumps(rows, indent=7))
    monkeypatch.setenv("BILEVEL_LITE_DATA", str(tmp_path))
    assert len(bl.data.load("youtube", download=False).train.texts) == 1586
    rows["x3"]["label"] = 1 - rows["x3"]["label"]
    (target / "train.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match="damaged or not the known file"):
        bl.data.load("youtube", download=False)


# ---------------------------------------------------------------- the task


def test_the_task_is_what_its_equations_say(float32):
    task = TextCleaning.make(TextCleaning.settings(seed=3), CPU)
    sets = text_cleaning.toy()
    assert task.strings == sets.train.texts and len(task.lam0) == 120
    assert torch.equal(task.train[1], majority(sets.train.weak, 3))
    assert torch.equal(task.wrong, task.train[1] != sets.train.y)
    assert torch.equal(task.lam0, torch.full((120,), 0.5))
    # g, by hand: losses of three texts from their ids, weighted
    words, rows = bl.text.tiny(max_length=100), torch.tensor([5, 17, 44])
    lam = torch.linspace(0, 1, 120)
    logits = predict(task.model, task.theta0, words.ids([task.strings[i] for i in rows]))
    losses = -logits.log_softmax(1)[range(3), task.train[1][rows]]
    g = task.problem.inner_loss(lam, task.theta0, (task.train[0][rows], task.train[1][rows], rows))
    assert float(g) == pytest.approx(float((lam[rows] * losses).mean()), rel=1e-5)
    # the validation texts are split, and the split is another for another seed
    assert len(task.validation[1]) == len(task.tuning[1]) == 20
    both = torch.cat([task.validation[0], task.tuning[0]])
    assert sorted(both.tolist()) == list(range(120, 160))
    other = TextCleaning.make(TextCleaning.settings(seed=4), CPU)
    assert not torch.equal(other.validation[0], task.validation[0])
    assert not torch.equal(other.theta0, task.theta0)
    whole = TextCleaning.make(TextCleaning.settings(seed=3, tuning_share=0.0), CPU)
    assert len(whole.validation[1]) == 40 and torch.equal(whole.tuning[0], whole.validation[0])


def test_texts_left_out_true_labels_and_weights_that_stay(float32):
    sets = text_cleaning.toy()
    silent = sets.train.weak.clone()
    silent[:7] = -1
    sets = sets._replace(train=sets.train._replace(weak=silent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cleaning, "toy", lambda: sets)
        text_cleaning._prepared.cache_clear()
        task = TextCleaning.make(TextCleaning.settings(uncovered="left_out"), CPU)
        assert len(task.lam0) == 113 and task.strings == sets.train.texts[7:]
        assert task.notes["left out"] == 7
        some = TextCleaning.make(TextCleaning.settings(texts=40), CPU)
        assert len(some.strings) == 40 and len(set(some.train[0].tolist())) == 40
    text_cleaning._prepared.cache_clear()
    clean = TextCleaning.make(TextCleaning.settings(labels="true", weights="one"), CPU)
    assert not clean.wrong.any() and torch.equal(clean.train[1], clean.y_clean)
    assert torch.equal(clean.project(torch.zeros(120)), torch.ones(120))
    trusted = TextCleaning.make(TextCleaning.settings(labels="validation"), CPU)
    assert torch.equal(trusted.train[0], trusted.validation[0])
    batch = trusted.batches(TextCleaning.settings(labels="validation"))["inner_batch"].draw()
    assert len(batch[0]) == 20  # of 32


def test_classes_that_no_vote_names_are_said(float32, monkeypatch):
    sets = text_cleaning.toy()
    weak = sets.train.weak.where(sets.train.weak != 2, -1)
    named = sets._replace(train=sets.train._replace(weak=weak))
    monkeypatch.setattr(text_cleaning, "toy", lambda: named)
    text_cleaning._prepared.cache_clear()
    task = TextCleaning.make(TextCleaning.settings(), CPU)
    text_cleaning._prepared.cache_clear()
    assert task.notes["never voted"] == ["HUM"] and task.num_classes == 3
    assert not (task.train[1] == 2).any() and (task.test[1] == 2).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": "imdb"}, "dataset: got 'imdb', expected"),
        ({"layers": "0"}, "layers: got '0', expected a number of layers, 'half' or 'all'"),
        ({"layers": "some"}, "layers: got 'some'"),
        ({"ties": "last"}, "ties: got 'last', expected"),
        ({"labels": "clean"}, "labels: got 'clean', expected"),
        ({"tuning_share": 1.0}, "tuning_share: got 1.0, expected from 0 up to"),
        ({"texts": 121}, "texts: got 121, expected 1 to 120, or 0 for all"),
        ({"batch_size": 121}, "batch_size: got 121, expected 1 to 120, or 0 for all 120"),
        ({"outer_batch_size": 21}, "outer_batch_size: got 21, expected 1 to 20"),
        ({"model": "bert"}, r"text_cleaning: has no setting \['model'\]"),
    ],
)
def test_wrong_settings_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TextCleaning.settings(**given)


def test_the_usual_numbers_are_those_that_won_the_searches():
    """The step on the weights and the batch of J, which no set of texts is too small for."""
    s = TextCleaning.settings(dataset="trec")
    assert (s.method, s.outer_lr, s.cross_batch_size) == ("aid-kfac", 0.5, 128)
    assert TextCleaning.settings(dataset="trec", texts=40, batch_size=8).cross_batch_size == 40
    assert TextCleaning.settings().cross_batch_size == 32
    assert TextCleaning.settings(dataset="trec", weights="one").outer_lr == 1
    runs = bl.experiment.stored("text_cleaning_trec")["runs"]
    for row in (row for run in runs for row in run["results"] if row["chosen"]):
        method = text_variants.SOLVERS[row["method"]]["method"]
        assert text_variants.OUTER_LR[method] == pytest.approx(row["chosen"]["outer_lr"], rel=0.13)


def test_an_encoder_that_is_not_there_is_said_as_typed(tmp_path, capsys):
    words = ["run", "text_cleaning", "--encoder", str(tmp_path), "--out", str(tmp_path / "run")]
    assert main([*words, "--device", "cpu"]) == 1
    assert "encoder: " in (said := capsys.readouterr().err) and str(tmp_path) in said
    words = ["run", "text_cleaning", "--layers", "3", "--out", str(tmp_path / "two")]
    assert main([*words, "--device", "cpu"]) == 1
    assert "layers: got 3, expected 1 to 2, or 'all'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["aid-kfac", "sama"])
def test_a_resumed_run_is_the_uninterrupted_one(method, tmp_path, monkeypatch, capsys):
    words = ["run", "text_cleaning", "--method", method, "--seed", "1", "--device", "cpu"]
    words += ["--outer-steps", "6", "--evaluate-every=2", "--inner-schedule", "cosine"]
    words += ["--inner-steps", "2", "--outer-lr", "0.5" if method == "sama" else "0.05"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    kind = {"aid-kfac": bl.AID, "sama": bl.SAMA}[method]
    step, stop = kind.step, [4]

    def stops(self):
        # the method of the run, not those of the baselines
        if len(stop) and self.outer_optimizer.param_groups[0]["lr"] and self.iteration == stop[0]:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(kind, "step", stops)
    assert main([*words, "--set", "baselines=0", "--out", str(tmp_path / "parts")]) == 130
    stop.clear()
    assert main([*words, "--set", "baselines=0", "--out", str(tmp_path / "parts")]) == 0
    assert "resuming" in capsys.readouterr().out
    whole, parts = timeless(tmp_path / "whole"), timeless(tmp_path / "parts")
    assert set(whole.pop("baselines")) == {"noisy", "balanced", "validation", "clean"}
    assert not parts.pop("baselines")
    del whole["settings"]["baselines"], parts["settings"]["baselines"]
    assert whole == parts


def test_a_run_tells_wrong_labels_and_names_what_it_rejects(tmp_path, capsys):
    words = ["run", "text_cleaning", "--method", "aid-kfac", "--device", "cpu"]
    words += ["--outer-lr", "0.05", "--evaluate-every", "5"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    out, result = capsys.readouterr().out, json.loads((tmp_path / "result.json").read_text())
    assert "52 of 120 labels are wrong" in out and "random weights, claims nothing" in out
    assert "(one is 5.0 points; of 60 test texts one is 1.67)" in out
    best, rejected = result["best"], result["surest"]
    assert best["auc"] > 0.8  # 0.5 is chance
    assert best["wrong_weight"] < 0.4 < 0.6 < best["right_weight"]
    sets, given = text_cleaning.toy(), majority(text_cleaning.toy().train.weak, 3)
    assert len(rejected) == 12
    for row in rejected:
        i = sets.train.texts.index(row["text"])
        same = [k for k, text in enumerate(sets.train.texts) if text == row["text"]]
        assert row["true"] == sets.classes[sets.train.y[i]]
        assert row["given"] in {sets.classes[given[k]] for k in same}
    assert sum(row["given"] != row["true"] for row in rejected) >= 10
    weights = result["weights"]
    assert sum(weights["wrong"]) == 52 and sum(weights["right"]) == 68
    assert (tmp_path / "figure.png").exists()


def test_plain_training_stands_where_its_labels_put_it(float32):
    s = TextCleaning.settings(outer_steps=15, evaluate_every=5, seed=1)
    task = TextCleaning.make(s, CPU)
    fits = {name: fit() for name, fit in task.baselines(s).items()}
    assert fits["noisy"]["test_accuracy"] < fits["validation"]["test_accuracy"]
    assert fits["clean"]["test_accuracy"] > 0.95
    assert set(fits["noisy"]) == {
        "iteration", "tuning_error", "test_loss", "test_accuracy", "last_test_loss",
        "last_test_accuracy",
    }  # fmt: skip


def test_balanced_weights_give_the_classes_the_shares_of_the_texts_to_trust():
    s = TextCleaning.settings(weights="balanced", method="aid-identity", outer_steps=2)
    task = TextCleaning.make(s, CPU)
    y, trusted, lam = task.train[1].tolist(), task.validation[1].tolist(), task.lam0.double()
    assert not task.learned and lam.mean() == pytest.approx(1, abs=1e-6)
    for c in range(3):
        mass = sum(float(lam[i]) for i, one in enumerate(y) if one == c) / len(y)
        assert mass == pytest.approx(trusted.count(c) / len(trusted), abs=1e-6)
    method = methods.build(s, task)
    method.step()
    assert torch.equal(method.lam, task.lam0)


@pytest.mark.parametrize("layers", ["half", "all"])
def test_more_layers(layers, float32):
    s = TextCleaning.settings(layers=layers, batch_size=8, inner_steps=1)
    task = TextCleaning.make(s, CPU)
    assert s.inner_lr == text_cleaning.INNER_LR[layers]
    assert task.train[0].dim() == (2 if layers == "all" else 1)  # ids, where nothing is frozen
    method = methods.build(s, task)
    method.step()
    assert not torch.equal(method.lam, task.lam0)


# ---------------------------------------------------------------- the study

SHORT = [
    "study", "text", "--dataset", "toy", "--encoder", "tiny", "--device", "cpu", "--trials", "1",
    "--search-steps", "2", "--outer-steps", "2", "--looks", "2", "--seeds", "2",
]  # fmt: skip


def test_the_study_covers_what_it_says():
    found = {v.name: v for v in studies.variants("text", "trec", "linear")}
    assert list(found) == [
        "noisy", "balanced", "validation", "clean", "identity", "sama", "neumann-3", "neumann-10",
        "cg-3-ggn", "ggn-exact", "cg-normal-3", "kfac-mc", "kfac-empirical",
    ]  # fmt: skip
    widths = {high / low for v in found.values() for low, high in v.space.values()}
    assert all(w == pytest.approx(100) for w in widths) and all(
        list(v.space) in ([], ["outer_lr"]) for v in found.values()
    )
    plain = [name for name, v in found.items() if not v.space]
    assert plain == ["noisy", "balanced", "validation", "clean"]
    for v in found.values():
        TextCleaning.settings(dataset="trec", **v.settings)
    # 6 trials of each of the 9, then 3 seeds of all 13
    assert studies.runs("text") == 9 * 6 + 13 * 3
    with pytest.raises(ValueError, match="dataset: got 'mnist', expected one of .*trec"):
        studies.variants("text", "mnist", "linear")


def test_the_study_runs_is_resumed_and_drawn(tmp_path, monkeypatch, capsys):
    only = ["--texts", "100", "--only", "noisy", "kfac-empirical"]
    words = [*SHORT, *only, "--out"]
    assert main([*words, str(tmp_path / "whole")]) == 0
    table = capsys.readouterr().out
    assert "at the end" in table
    run, calls = job.run_job, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(job, "run_job", stops)
    assert main([*words, str(tmp_path / "parts")]) == 130
    assert main([*words, str(tmp_path / "parts")]) == 0
    first, again = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts")
    )
    assert first["kind"] == "text_cleaning_study" and first["base"]["layers"] == "1"
    assert first["base"]["texts"] == 100
    assert "model" not in first and first["seeds"] == 2 and first["first_seed"] == 1
    for rows in (first["results"], again["results"]):
        for one in (one for row in rows for one in row["runs"]):
            del one["seconds"], one["memory"]
            for line in (one["best"], one["last"], *one["history"]):
                del line["seconds"]
    assert first["results"] == again["results"]
    noisy, kfac = first["results"]
    assert [one["seed"] for one in kfac["runs"]] == [1, 2]
    assert not noisy["trials"] and len(kfac["trials"]) == 1
    assert all(len(one["surest"]) == 12 for one in kfac["runs"])
    stored = {"kind": "text_cleaning_study", "runs": [first]}
    for rows in (first["results"],):
        for one in (one for row in rows for one in row["runs"]):
            one["best"]["seconds"] = 1.0
    fig = TextCleaning.draw(stored)[""]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["kfac-empirical", "noisy"]
    assert "random weights, claims nothing" in fig.axes[0].texts[0].get_text()
    (mark,) = (line for line in fig.axes[2].lines if line.get_marker() == "o")  # kfac alone
    looks = [one["best"]["iteration"] for one in kfac["runs"]]  # each at one second
    assert mark.get_xdata()[0] == pytest.approx(sum(1 / look for look in looks) / len(looks))
    text_figures.plt.close(fig)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["text", "--model", "mlp"],
            "--model: text has none; it has ['encoder', 'layers', 'texts']",
        ),
        (["solvers", "--layers", "2"], "--layers: solvers has none; it has ['batchnorm', 'model',"),
        (["text", "--layers", "few"], "layers: got 'few', expected a number of layers, 'half'"),
        (["text", "--dataset", "digits"], "--dataset: got 'digits', expected one of ['semeval',"),
    ],
)
def test_bad_input_of_the_study(words, message, tmp_path, capsys):
    assert main(["study", *words, "--out", str(tmp_path / "x")]) == 1
    assert message in capsys.readouterr().err


def test_a_study_of_text_fits_its_sets():
    assert text_study.SIZES["youtube"] == (1586, 60) and text_study.SIZES["semeval"] == (1749, 89)


def test_what_is_at_hand_is_both_or_neither(tmp_path, monkeypatch):
    def no_data(name, download=True):
        raise DataError("nothing here")

    def no_encoder(place):
        raise text_variants.text.EncoderError("nothing here")

    monkeypatch.setattr(text_variants.data, "load", lambda name: None)
    monkeypatch.setattr(text_variants.text, "encoder", lambda place: None)
    monkeypatch.delenv("BILEVEL_LITE_DATA", raising=False)
    monkeypatch.setenv("BILEVEL_LITE_MODELS", str(tmp_path))
    assert text_variants.at_hand() == ("trec", text_variants.SMALL)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text("{}")
    assert text_variants.at_hand() == ("trec", str(tmp_path / "own"))
    monkeypatch.setattr(text_variants.text, "encoder", no_encoder)
    assert text_variants.at_hand() == ("toy", "tiny")
    monkeypatch.setattr(text_variants.text, "encoder", lambda place: None)
    monkeypatch.setattr(text_variants.data, "load", no_data)
    assert text_variants.at_hand() == ("toy", "tiny")


def test_what_chooses_is_the_share_of_the_tuning_texts_that_is_misclassified(float32):
    s = TextCleaning.settings(outer_steps=2)
    task = TextCleaning.make(s, CPU)
    theta = task.theta0
    found = predict(task.model, theta, task.tuning[0]).argmax(1).tolist()
    missed = sum(a != b for a, b in zip(found, task.tuning[1].tolist(), strict=True))
    assert 0 < missed < len(found) and missed != len(found) / 2
    assert task.judge(task.lam0, theta) == pytest.approx(missed / len(found), abs=1e-6)
    row = task.measure(task.lam0, theta)
    assert row[task.criterion] == pytest.approx(missed / len(found), abs=1e-6)


def test_the_studys_boxes_hold_the_points_that_won():
    found = {v.name: v.space for v in studies.variants("text", "trec", "linear")}
    runs = bl.experiment.stored("text_cleaning_trec")["runs"]
    rows = [row for run in runs for row in run["results"] if row["chosen"]]
    won = {row["method"]: row["chosen"]["outer_lr"] for row in rows}
    assert len(won) == 9
    for name, value in won.items():
        low, high = found[name]["outer_lr"]
        assert low < value < high


@pytest.mark.parametrize("l2", [0.0, 0.05])
def test_the_exact_row_solves_the_damped_ggn(l2):
    """Against the dense matrix, with weights that differ; more parameters than outputs, or less."""
    generator = torch.Generator().manual_seed(0)
    for n in (3, 40):
        model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        inner = bl.WeightedRisk(model.double(), weight=lambda lam, b: lam[b[2]], l2=l2)
        problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
        x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        batch = x, torch.arange(n) % 3, torch.arange(n)
        lam = torch.rand(n, generator=generator, dtype=torch.float64)
        at = problem, lam, bl.flatten(model), batch
        b = torch.randn(len(at[2]), generator=generator, dtype=torch.float64)
        v, info = ExactGGN(1e-3).solve(*at, b)
        truth, _ = bl.Direct(1e-3, "ggn").solve(*at, b)
        assert float((v - truth).norm() / truth.norm()) < 1e-9
        assert info.gradients == pytest.approx(3) and info.relative_residual < 1e-9
    if not l2:
        with pytest.raises(ValueError, match="damping: is 0, as is l2"):
            ExactGGN(0.0).solve(*at, b)
        plain = bl.BilevelProblem(lambda lam, theta, _: (theta**2).sum(), problem.outer_loss)
        with pytest.raises(TypeError, match="inner_loss: got function, expected a WeightedRisk"):
            ExactGGN(0.1).solve(plain, *at[1:], b)


def test_the_exact_row_refuses_examples_that_do_not_stand_alone():
    """By themselves their weights, or inputs, would be others: a wrong number, once in silence."""
    model = torch.nn.Linear(3, 2).double()
    x, n = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 4
    batch = x, torch.tensor([0, 1, 1, 0]), torch.arange(n)
    lam = torch.linspace(-1, 1, n, dtype=torch.float64)
    theta, b = bl.flatten(model), torch.ones(8, dtype=torch.float64)
    for more in (
        {"weight": lambda lam, q: len(q[2]) * torch.softmax(lam[q[2]], 0)},
        {"weight": lambda lam, q: 1e-5 * torch.softmax(lam[q[2]], 0)},  # however small
        {"inputs": lambda lam, q: (q[0] - q[0].mean(0) + lam[q[2], None], *q[1:])},
    ):
        inner = bl.WeightedRisk(model, **more)
        problem = bl.BilevelProblem(inner, bl.WeightedRisk(model))
        with pytest.raises(ValueError, match="example 0 has another output or weight by itself"):
            ExactGGN(0.1).solve(problem, lam, theta, batch, b)


def test_the_exact_row_on_texts_of_unequal_length(float32):
    """One text at a time, trimmed to its own length, is the GGN of the padded batch."""
    task = TextCleaning.make(TextCleaning.settings(), CPU)
    batch = tuple(part[:12] for part in (*task.train, torch.arange(len(task.lam0))))
    at = task.problem, task.lam0, task.theta0, batch
    b = torch.randn(len(task.theta0), generator=torch.Generator().manual_seed(0))
    v, info = ExactGGN(0.01).solve(*at, b)
    full = bl.curvature.GGN(task.problem.inner_loss, *at[1:])
    assert float((full @ v + 0.01 * v - b).norm() / b.norm()) < 1e-4
    assert info.relative_residual < 1e-4


def test_costs_are_named_by_the_study_or_refused():
    def run(peak, seconds=(9.0, 12.0), layers="1", **settings):
        looks = [{"iteration": k, "seconds": s} for k, s in zip((3, 6), seconds, strict=True)]
        settings = {"weights": "learned", "layers": layers, **settings}
        return {"settings": settings, "memory": {"peak_mib": peak}, "history": looks}

    own = text_variants.SOLVERS
    runs = [run(5.0, **own["kfac-mc"]), run(7.0, **own["cg-3-ggn"], batch_size=32)]
    runs += [run(9.0, (1.0, 10.0), **own["kfac-mc"]), run(4.0, (0.0, 6.0), "all", **own["sama"])]
    plain = run(3.0, method="aid-identity", weights="one")
    found = text_figures.costs([plain, *runs])
    assert found["1"] == {"noisy": (1, 3), "kfac-mc": (2, 7), "cg-3-ggn": (1, 7)}
    assert found["all"] == {"sama": (2, 4)}
    with pytest.raises(ValueError, match="runs: soba is none of"):
        text_figures.costs([run(1.0, method="soba")])
    with pytest.raises(ValueError, match="runs: sama has one look, expected two"):
        text_figures.costs([{**run(1.0, **own["sama"]), "history": plain["history"][:1]}])
    for several, label in ((runs[:2], "iteration"), ([*runs[:2], run(1.0, **own["sama"])], "= 1")):
        (one, *_), _ = ch12.costs(text_figures.costs(several)).axes, plt.close("all")
        assert one.get_xlabel().endswith(label)


def test_class_names_go_by_their_numbers(tmp_path):
    entry = {"label": 1, "data": {"text": "a word"}, "weak_labels": [0, -1]}
    for file in ("train", "valid", "test"):
        (tmp_path / f"{file}.json").write_text(json.dumps({"0": entry}))
    (tmp_path / "label.json").write_text(json.dumps({"1": "spam", "0": "ham"}))
    assert wrench.read(tmp_path).classes == ["ham", "spam"]
    (tmp_path / "label.json").write_text(json.dumps({"0": "ham", "2": "spam"}))
    with pytest.raises(bl.data.DataError, match="names the classes 0, 2, expected 0 to 1"):
        wrench.read(tmp_path)
    (tmp_path / "label.json").write_text(json.dumps({"0": "ham", "1": "spam"}))
    for key, value, message in (
        ("weak_labels", None, "has weak labels None, expected a list"),
        ("label", 1.0, "has label 1.0"),
    ):
        (tmp_path / "train.json").write_text(json.dumps({"0": {**entry, key: value}}))
        with pytest.raises(bl.data.DataError, match=message):
            wrench.read(tmp_path)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(bl.data.DataError, match="got an empty one"):
        wrench.read(tmp_path)
